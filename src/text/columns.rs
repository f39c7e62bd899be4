//! Columns of a Parquet file as text, and the writer that rendered rows go through.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use arrow::array::{Array, AsArray, RecordBatch, StringArray};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Schema};
use minijinja::value::Value;
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};
use parquet::arrow::{ArrowWriter, ProjectionMask};
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;

use super::CREATED_BY;
use super::json::parse;
use crate::source::{Fault, suggest};

/// Rows that are held in memory at once.
const BATCH: usize = 1024;
/// Rows of a row group; it is flushed earlier when it grows past [`GROUP_BYTES`].
const GROUP_ROWS: usize = 1 << 16;
const GROUP_BYTES: usize = 64 << 20;

/// The Arrow schema of a Parquet file.
///
/// # Errors
/// When it cannot be read.
pub fn schema(path: &Path) -> Result<Arc<Schema>> {
    Ok(builder(path)?.schema().clone())
}

fn builder(path: &Path) -> Result<ParquetRecordBatchReaderBuilder<File>> {
    let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    ParquetRecordBatchReaderBuilder::try_new(file)
        .with_context(|| format!("{} is not a Parquet file", path.display()))
}

/// Number of rows, and a reader of some columns (all if none are named).
pub(super) fn read(path: &Path, columns: &[&str]) -> Result<(u64, ParquetRecordBatchReader)> {
    let builder = builder(path)?;
    let rows = u64::try_from(builder.metadata().file_metadata().num_rows()).unwrap_or(0);
    let mask = if columns.is_empty() {
        ProjectionMask::all()
    } else {
        let fields = builder.schema().fields();
        let known: Vec<&str> = fields.iter().map(|f| f.name().as_str()).collect();
        let mut indices = Vec::new();
        for name in columns {
            let at = known.iter().position(|k| k == name).ok_or_else(|| no_column(name, &known))?;
            indices.push(at);
        }
        ProjectionMask::roots(builder.parquet_schema(), indices)
    };
    Ok((rows, builder.with_projection(mask).with_batch_size(BATCH).build()?))
}

/// How large a file is.
pub(super) struct Size {
    pub(super) rows: u64,
    /// Of all columns, unpacked.
    pub(super) bytes: u64,
}

/// A reader of all columns whose batches are of about so many bytes, however long the rows are.
pub(super) fn read_within(path: &Path, batch: u64) -> Result<(Size, ParquetRecordBatchReader)> {
    let builder = builder(path)?;
    let groups = builder.metadata().row_groups().iter();
    let bytes = groups.map(|g| u64::try_from(g.total_byte_size()).unwrap_or(0)).sum();
    let rows = u64::try_from(builder.metadata().file_metadata().num_rows()).unwrap_or(0);
    let row = bytes / rows.max(1) + 1;
    let within = usize::try_from(batch / row).unwrap_or(usize::MAX).clamp(1, BATCH);
    Ok((Size { rows, bytes }, builder.with_batch_size(within).build()?))
}

pub(super) fn no_column(name: &str, known: &[&str]) -> anyhow::Error {
    let fault = Fault::new(format!("there is no column `{name}`"));
    fault.help(suggest(name, known).unwrap_or_else(|| "there are no columns".into())).into()
}

/// Some columns of a batch of rows, their values as text.
#[derive(Debug)]
pub struct Columns {
    names: Vec<String>,
    texts: Vec<Option<StringArray>>,
    /// JSON by row.
    nested: Vec<Option<Vec<String>>>,
    rows: usize,
}

impl Columns {
    /// From a batch; numbers become decimal, booleans `true` and `false`, and lists and structs
    /// are kept as JSON.
    ///
    /// # Errors
    /// When a column is of a type that has no text.
    pub fn new(batch: &RecordBatch) -> Result<Self> {
        let (mut texts, mut nested) = (Vec::new(), Vec::new());
        for (field, array) in batch.schema().fields().iter().zip(batch.columns()) {
            if array.data_type().is_nested() {
                nested.push(Some(json_values(field.name(), array.clone())?));
                texts.push(None);
                continue;
            }
            let array = cast(array, &DataType::Utf8)
                .with_context(|| format!("column `{}` cannot be read as text", field.name()))?;
            texts.push(Some(array.as_string::<i32>().clone()));
            nested.push(None);
        }
        let names = batch.schema().fields().iter().map(|f| f.name().clone()).collect();
        Ok(Self { names, texts, nested, rows: batch.num_rows() })
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    fn index(&self, column: &str) -> Result<usize> {
        self.names.iter().position(|n| n == column).ok_or_else(|| {
            let known: Vec<&str> = self.names.iter().map(String::as_str).collect();
            no_column(column, &known)
        })
    }

    /// A cell as text; `None` where it is null.
    ///
    /// # Errors
    /// When there is no such column, or it holds lists or structs.
    pub fn text(&self, column: &str, row: usize) -> Result<Option<&str>> {
        let texts = self.texts[self.index(column)?].as_ref();
        let texts = texts.with_context(|| format!("column `{column}` does not hold text"))?;
        Ok(texts.is_valid(row).then(|| texts.value(row)))
    }

    /// A cell that holds a list or a struct, or JSON as text.
    ///
    /// # Errors
    /// When there is no such column, or its text is not JSON.
    pub fn nested(&self, column: &str, row: usize) -> Result<Value> {
        let text = match &self.nested[self.index(column)?] {
            Some(values) => values[row].as_str(),
            None => self.text(column, row)?.filter(|text| !text.is_empty()).unwrap_or("null"),
        };
        parse(text).with_context(|| format!("column `{column}` does not hold JSON"))
    }
}

/// Each value as JSON; fields that are null are left out.
fn json_values(name: &str, array: Arc<dyn Array>) -> Result<Vec<String>> {
    let rows = array.len();
    let batch = RecordBatch::try_from_iter_with_nullable([("v", array, true)])?;
    let mut writer = arrow::json::LineDelimitedWriter::new(Vec::new());
    writer.write(&batch).with_context(|| format!("reading column `{name}`"))?;
    writer.finish()?;
    let bytes = writer.into_inner();
    let mut values = Vec::with_capacity(rows);
    for line in bytes.split(|b| *b == b'\n').filter(|l| !l.is_empty()) {
        let value = line.strip_prefix(b"{\"v\":").and_then(|rest| rest.strip_suffix(b"}"));
        // A null is left out with its name.
        values.push(String::from_utf8(value.unwrap_or(b"null").to_vec())?);
    }
    anyhow::ensure!(values.len() == rows, "column `{name}` cannot be read row by row");
    Ok(values)
}

/// The values of a column, nulls left out; fails on more than `limit` of them.
///
/// # Errors
/// When the file cannot be read, has no such column, or holds too many values.
pub fn distinct(path: &Path, column: &str, limit: usize) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    texts(path, &[column], &mut |text| {
        if !found.contains(text) {
            found.insert(text.to_owned());
        }
        anyhow::ensure!(
            found.len() <= limit,
            "column `{column}` has more than {limit} values; it does not look like a label"
        );
        Ok(())
    })?;
    Ok(found)
}

/// Every value of some columns, row by row, nulls left out.
///
/// # Errors
/// When the file cannot be read or has no such column, or `take` fails.
pub fn texts(
    path: &Path,
    columns: &[&str],
    take: &mut dyn FnMut(&str) -> Result<()>,
) -> Result<()> {
    for batch in read(path, columns)?.1 {
        let batch = Columns::new(&batch?)?;
        for row in 0..batch.rows() {
            for column in columns {
                if let Some(text) = batch.text(column, row)? {
                    take(text)?;
                }
            }
        }
    }
    Ok(())
}

/// A Parquet writer whose bytes depend on the rows alone.
pub(super) struct Writer {
    inner: ArrowWriter<File>,
}

impl Writer {
    pub(super) fn create(path: &Path, schema: Arc<Schema>) -> Result<Self> {
        let properties = WriterProperties::builder()
            .set_created_by(CREATED_BY.to_owned())
            .set_compression(Compression::ZSTD(ZstdLevel::try_new(1)?))
            .set_max_row_group_row_count(Some(GROUP_ROWS))
            .build();
        let file = File::create(path).with_context(|| format!("writing {}", path.display()))?;
        Ok(Self { inner: ArrowWriter::try_new(file, schema, Some(properties))? })
    }

    pub(super) fn write(&mut self, batch: &RecordBatch) -> Result<()> {
        self.inner.write(batch)?;
        if self.inner.in_progress_size() > GROUP_BYTES {
            self.inner.flush()?;
        }
        Ok(())
    }

    pub(super) fn finish(self) -> Result<()> {
        self.inner.close()?;
        Ok(())
    }
}

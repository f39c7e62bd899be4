//! The files of a split, in two passes: one finds columns, types and bad rows, the other hands out
//! the rows in batches. What is in memory is a batch, but for a JSON object whose rows lie in a
//! field that is not named, which is read whole.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use arrow::array::{ArrayRef, RecordBatch, new_null_array};
use arrow::compute::cast;
use arrow::datatypes::DataType;

use super::{Codec, Format, Reading, Table, delimited, json, parquet, text};

/// What the first pass found in a file.
enum Found {
    Parquet(parquet::Opened),
    Delimited(u8, delimited::Found),
    Text,
    Json(json::Found),
}

struct Part<'a> {
    path: &'a Path,
    codec: Codec,
    reading: Reading<'a>,
    found: Found,
    /// Columns of this file without any value, which take the type of the others.
    untyped: Vec<String>,
}

/// The files of a split whose columns are known.
pub struct Scan<'a> {
    /// Columns, class names, notes and the number of rows left out; no rows.
    pub head: Table,
    parts: Vec<Part<'a>>,
    columns: json::Columns,
}

impl<'a> Scan<'a> {
    /// Looks through the files.
    ///
    /// # Errors
    /// When a format is not known, a file is damaged, a row is bad and bad rows are errors, or
    /// files do not go together.
    pub fn of(files: Vec<(&'a Path, Reading<'a>)>) -> Result<Self> {
        let mut columns = json::Columns::default();
        let mut parts = Vec::with_capacity(files.len());
        let mut whole: Option<(String, Table)> = None;
        let mut first_json = None;
        for (path, mut reading) in files {
            let (format, codec) = Format::required(reading.name)?;
            let name = reading.name;
            let found = match format {
                Format::Parquet => parquet::open(path, codec, reading.columns).map(Found::Parquet),
                Format::Csv | Format::Tsv => {
                    let delimiter = if format == Format::Csv { b',' } else { b'\t' };
                    let found = delimited::scan(codec.open(path)?, delimiter, &mut reading);
                    found.map(|found| Found::Delimited(delimiter, found))
                }
                Format::Text => text::scan(codec.open(path)?, &mut reading).map(|()| Found::Text),
                Format::Json => {
                    columns.scan_document(codec.open(path)?, &mut reading).map(Found::Json)
                }
                Format::Jsonl => {
                    columns.scan_lines(codec.open(path)?, &mut reading).map(Found::Json)
                }
            };
            let found = found.with_context(|| about(name, codec))?;
            let head = match &found {
                Found::Parquet(opened) => Some(opened.head.clone()),
                Found::Delimited(_, found) => Some(found.head()?),
                Found::Text => Some(text::head()?),
                Found::Json(_) => None,
            };
            let untyped = head.iter().flat_map(|head| head.untyped.iter().cloned()).collect();
            match (&mut whole, head) {
                (Some((first, all)), Some(head)) => all.append(head, first, name)?,
                (None, Some(head)) => whole = Some((name.to_owned(), head)),
                (_, None) => {
                    first_json.get_or_insert(name);
                }
            }
            parts.push(Part { path, codec, reading, found, untyped });
        }
        let mut head = match (whole, first_json) {
            (Some((_, table)), None) => table,
            (None, _) => columns.head()?,
            (Some((first, mut table)), Some(name)) => {
                let rows = columns.head()?;
                let untyped: Vec<String> = rows.untyped.iter().cloned().collect();
                table.append(rows, &first, name)?;
                let json = parts.iter_mut().filter(|p| matches!(p.found, Found::Json(_)));
                json.for_each(|part| part.untyped.clone_from(&untyped));
                table
            }
        };
        head.skipped = parts.iter().map(|part| part.reading.skipped).sum();
        Ok(Self { head, parts, columns })
    }

    /// Hands out all rows, of the columns of `head`; those of JSON files come last.
    ///
    /// # Errors
    /// When a file cannot be read again, or `take` fails.
    pub fn each(&self, take: &mut dyn FnMut(RecordBatch) -> Result<()>) -> Result<()> {
        let (json, others): (Vec<&Part<'_>>, Vec<&Part<'_>>) =
            self.parts.iter().partition(|part| matches!(part.found, Found::Json(_)));
        for part in others.into_iter().chain(json) {
            let Part { path, codec, reading, found, .. } = part;
            let mut take = |batch: RecordBatch| match self.typed(&batch, part)? {
                batch if batch.num_rows() > 0 => take(batch),
                _ => Ok(()),
            };
            match found {
                Found::Parquet(opened) => opened.batches(&mut take),
                Found::Delimited(delimiter, found) => {
                    let about = (reading.name, reading.quote);
                    delimited::batches(codec.open(path)?, *delimiter, about, found, &mut take)
                }
                Found::Text => text::batches(codec.open(path)?, &mut take),
                Found::Json(found) => {
                    self.columns.batches(codec.open(path)?, reading, found, &mut take)
                }
            }
            .with_context(|| about(reading.name, *codec))?;
        }
        Ok(())
    }

    /// A batch of one file with the columns of all files.
    fn typed(&self, batch: &RecordBatch, part: &Part<'_>) -> Result<RecordBatch> {
        let schema = &self.head.schema;
        let columns = schema.fields().iter().map(|field| -> Result<ArrayRef> {
            let (name, ty) = (field.name(), field.data_type());
            if part.untyped.contains(name) && *ty != DataType::Utf8 {
                return Ok(new_null_array(ty, batch.num_rows()));
            }
            Ok(cast(batch.column(batch.schema().index_of(name)?), ty)?)
        });
        let columns = columns.collect::<Result<Vec<_>>>()?;
        Ok(RecordBatch::try_new(Arc::clone(schema), columns)?)
    }
}

fn about(name: &str, codec: Codec) -> String {
    match codec {
        Codec::Plain => format!("reading {name}"),
        Codec::Gzip | Codec::Zstd => format!("reading {name} (packed)"),
    }
}

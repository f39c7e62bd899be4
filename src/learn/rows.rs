//! Tokenized rows from Parquet, and the batches made of them.
//!
//! Columns: `input_ids: list<int32>` without padding; `labels: list<int32>` of the same length
//! for a causal model ([`IGNORE`] where no loss is taken, not shifted); `label: int32`, the class;
//! `token_type_ids: list<int32>` for text pairs.

use std::fs::File;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use arrow::array::{Array, AsArray, RecordBatch};
use arrow::datatypes::Int32Type;
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};

use super::batch::{Batch, IGNORE, Labels};
use super::setup::Task;

/// Rows that are read at a time.
const READ: usize = 1024;

/// One tokenized row.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Row {
    /// Token ids, at least one.
    pub ids: Vec<u32>,
    /// Token types, for text pairs.
    pub types: Option<Vec<u32>>,
    /// Labels as long as `ids`, for a causal model.
    pub labels: Option<Vec<i64>>,
    /// Class.
    pub class: Option<u32>,
}

impl Row {
    /// Tokens that are predicted: labelled ones, but for the first, which nothing comes before.
    pub fn targets(&self) -> usize {
        let labels = self.labels.as_deref().unwrap_or_default();
        labels.iter().skip(1).filter(|l| **l != IGNORE).count()
    }

    /// Tokens before the first label; all of them if none has a label.
    pub fn prompt(&self) -> &[u32] {
        let labels = self.labels.as_deref().unwrap_or_default();
        let end = labels.iter().position(|l| *l != IGNORE).unwrap_or(self.ids.len());
        &self.ids[..end.min(self.ids.len())]
    }
}

/// A stream of rows from a Parquet file; memory does not grow with the file.
pub struct RowReader {
    reader: ParquetRecordBatchReader,
    batch: Option<(RecordBatch, usize)>,
    row: u64,
}

impl RowReader {
    /// Opens a file.
    ///
    /// # Errors
    /// When it is not Parquet or lacks the column `input_ids`.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
        let builder = ParquetRecordBatchReaderBuilder::try_new(file)?;
        let columns: Vec<&String> = builder.schema().fields().iter().map(|f| f.name()).collect();
        ensure!(
            columns.iter().any(|c| *c == "input_ids"),
            "tokens have no column `input_ids`, only {columns:?}"
        );
        let reader = builder.with_batch_size(READ).build()?;
        Ok(Self { reader, batch: None, row: 0 })
    }

    fn read(&mut self) -> Result<Option<Row>> {
        loop {
            if let Some((batch, at)) = &mut self.batch
                && *at < batch.num_rows()
            {
                let row = row(batch, *at).with_context(|| format!("row {}", self.row))?;
                *at += 1;
                self.row += 1;
                return Ok(Some(row));
            }
            match self.reader.next() {
                None => return Ok(None),
                Some(batch) => self.batch = Some((batch?, 0)),
            }
        }
    }
}

impl Iterator for RowReader {
    type Item = Result<Row>;

    fn next(&mut self) -> Option<Self::Item> {
        self.read().transpose()
    }
}

fn integers(batch: &RecordBatch, column: &str, row: usize) -> Result<Option<Vec<i32>>> {
    let Some(array) = batch.column_by_name(column) else { return Ok(None) };
    let list = array.as_list_opt::<i32>();
    let list = list.with_context(|| format!("column `{column}` is not list<int32>"))?;
    if list.is_null(row) {
        return Ok(None);
    }
    let values = list.value(row);
    let values = values.as_primitive_opt::<Int32Type>();
    let values = values.with_context(|| format!("column `{column}` is not list<int32>"))?;
    Ok(Some(values.values().to_vec()))
}

fn unsigned(values: Vec<i32>, column: &str) -> Result<Vec<u32>> {
    let values = values
        .into_iter()
        .map(|x| u32::try_from(x).ok().with_context(|| format!("column `{column}` holds {x}")));
    values.collect()
}

fn row(batch: &RecordBatch, at: usize) -> Result<Row> {
    let ids = integers(batch, "input_ids", at)?.context("`input_ids` is null")?;
    let ids = unsigned(ids, "input_ids")?;
    ensure!(!ids.is_empty(), "there is no token in it");
    let types = integers(batch, "token_type_ids", at)?;
    let types = types.map(|t| unsigned(t, "token_type_ids")).transpose()?;
    let labels = integers(batch, "labels", at)?;
    let labels: Option<Vec<i64>> = labels.map(|l| l.into_iter().map(i64::from).collect());
    let fits = |n: Option<usize>| n.is_none_or(|n| n == ids.len());
    ensure!(
        fits(types.as_ref().map(Vec::len)) && fits(labels.as_ref().map(Vec::len)),
        "token ids, token types and labels differ in number"
    );
    let class = match batch.column_by_name("label") {
        None => None,
        Some(array) => {
            let values = array.as_primitive_opt::<Int32Type>();
            let values = values.context("column `label` is not int32")?;
            let value = values.is_valid(at).then(|| values.value(at));
            let value = value.map(|v| u32::try_from(v).ok().with_context(|| format!("label {v}")));
            value.transpose()?
        }
    };
    Ok(Row { ids, types, labels, class })
}

/// All rows of a file, for training.
///
/// # Errors
/// As [`RowReader`].
pub fn read_rows(path: &Path) -> Result<Vec<Row>> {
    RowReader::open(path)?.collect()
}

/// A batch of rows for a task, padded on the right to the longest of them (ids and types with 0,
/// labels with [`IGNORE`]; what is padded is never read).
///
/// # Errors
/// When a row lacks what the task learns from, or has a class outside the task's.
pub fn collate(rows: &[&Row], task: &Task) -> Result<Batch> {
    let length = rows.iter().map(|r| r.ids.len()).max().unwrap_or_default();
    let size = rows.len();
    let pad = |get: fn(&Row) -> Option<&[u32]>| {
        let mut out = vec![0; size * length];
        for (row, out) in rows.iter().zip(out.chunks_mut(length.max(1))) {
            let values = get(row).unwrap_or_default();
            out[..values.len()].copy_from_slice(values);
        }
        out
    };
    let labels = match task {
        Task::SequenceClassification { classes } => {
            let class = |row: &&Row| {
                let class = row.class.context("a row has no `label`")?;
                ensure!(
                    (class as usize) < *classes,
                    "label {class} is outside the {classes} classes of the task"
                );
                Ok(class)
            };
            Labels::Classes(rows.iter().map(class).collect::<Result<_>>()?)
        }
        Task::CausalLm => {
            let mut out = vec![IGNORE; size * length];
            for (row, out) in rows.iter().zip(out.chunks_mut(length.max(1))) {
                let labels = row.labels.as_deref().context("a row has no `labels`")?;
                out[..labels.len()].copy_from_slice(labels);
            }
            Labels::Tokens(out)
        }
    };
    let typed = rows.iter().any(|r| r.types.is_some());
    Ok(Batch {
        input_ids: pad(|r| Some(&r.ids)),
        token_type_ids: typed.then(|| pad(|r| r.types.as_deref())),
        lengths: rows.iter().map(|r| r.ids.len()).collect(),
        size,
        length,
        labels,
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{Int32Array, ListArray};
    use parquet::arrow::ArrowWriter;

    use super::*;

    fn list(rows: &[&[i32]]) -> ListArray {
        let rows = rows.iter().map(|r| Some(r.iter().map(|x| Some(*x)).collect::<Vec<_>>()));
        ListArray::from_iter_primitive::<Int32Type, _, _>(rows)
    }

    fn write(columns: Vec<(&str, Arc<dyn Array>)>) -> tempfile::NamedTempFile {
        let batch = RecordBatch::try_from_iter(columns).unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut writer =
            ArrowWriter::try_new(file.reopen().unwrap(), batch.schema(), None).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
        file
    }

    #[test]
    fn causal_rows_are_padded() {
        let ids = list(&[&[5, 6, 7], &[8, 9]]);
        let labels = list(&[&[-100, -100, 7], &[-100, 9]]);
        let label = Int32Array::from(vec![1, 0]);
        let file = write(vec![
            ("input_ids", Arc::new(ids)),
            ("labels", Arc::new(labels)),
            ("label", Arc::new(label)),
        ]);
        let rows = read_rows(file.path()).unwrap();
        assert_eq!(rows[0].prompt(), [5, 6]);
        assert_eq!((rows[0].targets(), rows[1].class), (1, Some(0)));
        let batch = collate(&[&rows[0], &rows[1]], &Task::CausalLm).unwrap();
        assert_eq!(batch.input_ids, [5, 6, 7, 8, 9, 0]);
        assert_eq!(batch.labels, Labels::Tokens(vec![-100, -100, 7, -100, 9, -100]));
        assert_eq!((batch.targets(), batch.lengths), (2, vec![3, 2]));
    }

    #[test]
    fn bad_rows_are_named() {
        let file = write(vec![("input_ids", Arc::new(list(&[&[1], &[-3]])))]);
        let err = format!("{:#}", read_rows(file.path()).unwrap_err());
        assert_eq!(err, "row 1: column `input_ids` holds -3");
        let row = Row { ids: vec![1], class: Some(2), ..Row::default() };
        let task = Task::SequenceClassification { classes: 2 };
        let err = collate(&[&row], &task).unwrap_err().to_string();
        assert!(err.contains("label 2 is outside the 2 classes"), "{err}");
        assert!(collate(&[&row], &Task::CausalLm).is_err());
        let file = write(vec![("text", Arc::new(Int32Array::from(vec![1])))]);
        assert!(RowReader::open(file.path()).is_err());
    }
}

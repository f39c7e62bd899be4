//! One entrance to the readers, and what they do with bad rows.

use std::path::Path;

use anyhow::Result;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Scan, Table};
use crate::source::Fault;

/// What to do with a row that cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnError {
    /// Stop, naming file, row and column.
    #[default]
    Fail,
    /// Leave it out and count it.
    Skip,
}

/// What a quote means in CSV and TSV.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Quote {
    /// `"` around a field, doubled inside it, as in RFC 4180.
    #[default]
    Double,
    /// Nothing: quotes are plain text.
    None,
}

/// A file being read: its name in messages, the policy, and the count of rows left out.
#[derive(Debug)]
pub struct Reading<'a> {
    /// The name that says the format and that messages show.
    pub name: &'a str,
    /// For rows that cannot be read.
    pub on_error: OnError,
    /// For JSON: the field that holds the rows, where the file is an object.
    pub field: Option<&'a str>,
    /// For CSV and TSV: what a quote means.
    pub quote: Quote,
    /// For Parquet: columns that are enough, where the file has all of them.
    pub columns: Option<&'a [String]>,
    pub(super) skipped: u64,
}

impl<'a> Reading<'a> {
    /// A file by name.
    pub fn new(name: &'a str, on_error: OnError) -> Self {
        let quote = Quote::default();
        Self { name, on_error, field: None, quote, columns: None, skipped: 0 }
    }

    /// Rows lie in this field of a JSON object.
    #[must_use]
    pub fn field(mut self, field: Option<&'a str>) -> Self {
        self.field = field;
        self
    }

    /// What a quote means in CSV and TSV.
    #[must_use]
    pub fn quote(mut self, quote: Quote) -> Self {
        self.quote = quote;
        self
    }

    /// These columns are enough; others need not be read.
    #[must_use]
    pub fn columns(mut self, columns: Option<&'a [String]>) -> Self {
        self.columns = columns;
        self
    }

    /// A bad row (counted from 1, headers apart): an error, or one more that is left out.
    pub(super) fn bad(&mut self, row: usize, column: Option<&str>, why: &str) -> Result<()> {
        if self.on_error == OnError::Skip {
            self.skipped += 1;
            return Ok(());
        }
        let column = column.map(|c| format!(", column `{c}`")).unwrap_or_default();
        let fault = Fault::new(format!("{}, row {row}{column}: {why}", self.name));
        Err(fault.help("mend the row, or set `on_error: skip` to leave such rows out").into())
    }
}

/// Reads a whole file into memory; the format is that of `reading.name`.
///
/// # Errors
/// When the format is not known, the file is damaged, or a row is bad and bad rows are errors.
pub fn read(path: &Path, reading: Reading<'_>) -> Result<Table> {
    read_all(vec![(path, reading)])
}

/// Reads the files of a split as one table. Rows of JSON files go together as if they stood in one
/// file: a field may be absent, or only null, in all rows of one of them. Other files must have
/// the same columns.
///
/// # Errors
/// As [`read`], and when files do not go together.
pub fn read_all(files: Vec<(&Path, Reading<'_>)>) -> Result<Table> {
    let mut scan = Scan::of(files)?;
    let mut batches = Vec::new();
    scan.each(&mut |batch| {
        batches.push(batch);
        Ok(())
    })?;
    scan.head.batches = batches;
    Ok(scan.head)
}

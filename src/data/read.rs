//! One entrance to the readers, and what they do with bad rows.

use std::path::Path;

use anyhow::{Context as _, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Codec, Format, Table, delimited, json, parquet, text};
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

/// A file being read: its name in messages, the policy, and the count of rows left out.
#[derive(Debug)]
pub struct Reading<'a> {
    /// The name that says the format and that messages show.
    pub name: &'a str,
    /// For rows that cannot be read.
    pub on_error: OnError,
    /// For JSON: the field that holds the rows, where the file is an object.
    pub field: Option<&'a str>,
    skipped: u64,
}

impl<'a> Reading<'a> {
    /// A file by name.
    pub fn new(name: &'a str, on_error: OnError) -> Self {
        Self { name, on_error, field: None, skipped: 0 }
    }

    /// Rows lie in this field of a JSON object.
    #[must_use]
    pub fn field(mut self, field: Option<&'a str>) -> Self {
        self.field = field;
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
pub fn read(path: &Path, mut reading: Reading<'_>) -> Result<Table> {
    let (format, codec) = Format::required(reading.name)?;
    let name = reading.name;
    let mut table = match format {
        Format::Parquet => parquet::read(path, codec),
        Format::Csv => delimited::read(codec.open(path)?, b',', &mut reading),
        Format::Tsv => delimited::read(codec.open(path)?, b'\t', &mut reading),
        Format::Json => json::read_document(codec.open(path)?, &mut reading),
        Format::Jsonl => json::read_lines(codec.open(path)?, &mut reading),
        Format::Text => text::read(codec.open(path)?, &mut reading),
    }
    .with_context(|| match codec {
        Codec::Plain => format!("reading {name}"),
        Codec::Gzip | Codec::Zstd => format!("reading {name} (packed)"),
    })?;
    table.skipped = reading.skipped;
    Ok(table)
}

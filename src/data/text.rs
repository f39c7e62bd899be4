//! Plain text: a row per line.

use std::io::{BufRead, BufReader, Read};
use std::sync::Arc;

use anyhow::Result;
use arrow::array::{ArrayBuilder as _, ArrayRef, RecordBatch, StringBuilder};
use arrow::datatypes::{DataType, Field, Schema};

use super::table::BATCH;
use super::{Reading, Table};

pub(super) fn read(from: impl Read, reading: &mut Reading<'_>) -> Result<Table> {
    let mut lines = BufReader::new(from);
    let mut text = StringBuilder::new();
    let mut columns: Vec<ArrayRef> = Vec::new();
    let mut line = Vec::new();
    let mut row = 0;
    while lines.read_until(b'\n', &mut line)? > 0 {
        row += 1;
        let bytes = if row == 1 { unmarked(&line) } else { &line };
        let bytes = bytes.strip_suffix(b"\n").unwrap_or(bytes);
        let bytes = bytes.strip_suffix(b"\r").unwrap_or(bytes);
        match std::str::from_utf8(bytes) {
            Ok(value) => text.append_value(value),
            Err(_) => reading.bad(row, None, "it is not UTF-8")?,
        }
        line.clear();
        if text.len() == BATCH {
            columns.push(Arc::new(text.finish()));
        }
    }
    columns.push(Arc::new(text.finish()));
    let schema = Arc::new(Schema::new(vec![Field::new("text", DataType::Utf8, true)]));
    let batch = |column| RecordBatch::try_new(Arc::clone(&schema), vec![column]);
    let batches = columns.into_iter().map(batch).collect::<Result<_, _>>()?;
    Table::new(&schema, batches)
}

/// Without a byte order mark.
pub(super) fn unmarked(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes)
}

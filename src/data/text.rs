//! Plain text: a row per line.

use std::io::{BufRead, BufReader, Read};
use std::sync::Arc;

use anyhow::Result;
use arrow::array::{ArrayBuilder as _, ArrayRef, RecordBatch, StringBuilder};
use arrow::datatypes::{DataType, Field, Schema};

use super::table::BATCH;
use super::{Reading, Table};

/// The columns, without rows.
pub(super) fn head() -> Result<Table> {
    Table::new(&Schema::new(vec![Field::new("text", DataType::Utf8, true)]), Vec::new())
}

/// Counts bad rows in a first pass.
pub(super) fn scan(from: impl Read, reading: &mut Reading<'_>) -> Result<()> {
    lines(from, &mut |row, bytes| match std::str::from_utf8(bytes) {
        Ok(_) => Ok(()),
        Err(_) => reading.bad(row, None, "it is not UTF-8"),
    })
}

/// Hands out the rows in batches, in a second pass.
pub(super) fn batches(
    from: impl Read,
    take: &mut dyn FnMut(RecordBatch) -> Result<()>,
) -> Result<()> {
    let schema = Arc::clone(&head()?.schema);
    let mut text = StringBuilder::new();
    let mut flush = |text: &mut StringBuilder| {
        let column: ArrayRef = Arc::new(text.finish());
        take(RecordBatch::try_new(Arc::clone(&schema), vec![column])?)
    };
    lines(from, &mut |_, bytes| {
        if let Ok(line) = std::str::from_utf8(bytes) {
            text.append_value(line);
        }
        if text.len() == BATCH { flush(&mut text) } else { Ok(()) }
    })?;
    if text.is_empty() { Ok(()) } else { flush(&mut text) }
}

/// Every line without its end, counted from 1.
fn lines(from: impl Read, each: &mut dyn FnMut(usize, &[u8]) -> Result<()>) -> Result<()> {
    let mut lines = BufReader::new(from);
    let mut line = Vec::new();
    let mut row = 0;
    while lines.read_until(b'\n', &mut line)? > 0 {
        row += 1;
        let bytes = if row == 1 { unmarked(&line) } else { &line };
        let bytes = bytes.strip_suffix(b"\n").unwrap_or(bytes);
        let bytes = bytes.strip_suffix(b"\r").unwrap_or(bytes);
        each(row, bytes)?;
        line.clear();
    }
    Ok(())
}

/// Without a byte order mark.
pub(super) fn unmarked(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes)
}

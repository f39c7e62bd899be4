//! Plain text: a row per line.

use std::io::{BufRead, BufReader, Read};
use std::sync::Arc;

use anyhow::Result;
use arrow::array::{ArrayRef, StringBuilder};

use super::{Reading, Table};

pub(super) fn read(from: impl Read, reading: &mut Reading<'_>) -> Result<Table> {
    let mut lines = BufReader::new(from);
    let mut text = StringBuilder::new();
    let mut line = Vec::new();
    let mut row = 0;
    while lines.read_until(b'\n', &mut line)? > 0 {
        row += 1;
        let bytes = line.strip_suffix(b"\n").unwrap_or(&line);
        let bytes = bytes.strip_suffix(b"\r").unwrap_or(bytes);
        match std::str::from_utf8(bytes) {
            Ok(value) => text.append_value(value),
            Err(_) => reading.bad(row, None, "it is not UTF-8")?,
        }
        line.clear();
    }
    let column: ArrayRef = Arc::new(text.finish());
    Table::of_columns([("text".to_owned(), column)])
}

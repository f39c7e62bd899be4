//! CSV and TSV: a header, quotes as in RFC 4180, types from all rows.
//!
//! A column of whole numbers is Int64, of numbers Float64, of `true` and `false` Boolean; an
//! empty field there is null. All else is text, where an empty field is empty text; so are
//! numbers with a leading zero or a plus, which are names of something, and whole numbers of more
//! than 64 bits.

use std::io::Read;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use arrow::array::{ArrayRef, BooleanArray, Float64Array, Int64Array, RecordBatch, StringArray};
use arrow::datatypes::{DataType, Field, Schema};
use csv::{ByteRecord, ReaderBuilder, StringRecord};

use super::table::BATCH;
use super::{Quote, Reading, Table};
use crate::source::Fault;

#[derive(Clone, Copy, PartialEq)]
enum Ty {
    Empty,
    Bool,
    Int,
    Float,
    Text,
}

impl Ty {
    fn arrow(self) -> DataType {
        match self {
            Self::Bool => DataType::Boolean,
            Self::Int => DataType::Int64,
            Self::Float => DataType::Float64,
            Self::Empty | Self::Text => DataType::Utf8,
        }
    }
}

/// A record of one field behind the last one. An open quote swallows it, which is how a quote
/// that is never closed is told from a field that ends with the file.
const END: &[u8] = b"\nflow: end of file\n";

/// What a file was found to hold.
pub(super) struct Found {
    names: Vec<String>,
    types: Vec<Ty>,
    /// Rows that are left out, counted from 1, in order.
    bad: Vec<usize>,
}

impl Found {
    /// The columns, without rows.
    pub(super) fn head(&self) -> Result<Table> {
        let fields = self.names.iter().zip(&self.types);
        let fields = fields.map(|(name, ty)| Field::new(name, ty.arrow(), true));
        let mut table = Table::new(&Schema::new(fields.collect::<Vec<_>>()), Vec::new())?;
        let empty = self.names.iter().zip(&self.types).filter(|(_, ty)| **ty == Ty::Empty);
        table.untyped = empty.map(|(name, _)| name.clone()).collect();
        Ok(table)
    }
}

/// Hands out the header, and then every row with its number (from 1).
fn records(
    from: impl Read,
    delimiter: u8,
    (name, quote): (&str, Quote),
    header: &mut dyn FnMut(Vec<String>) -> Result<()>,
    each: &mut dyn FnMut(usize, &ByteRecord) -> Result<()>,
) -> Result<()> {
    let mut reader = ReaderBuilder::new()
        .delimiter(delimiter)
        .quoting(quote == Quote::Double)
        .flexible(true)
        .from_reader(from.chain(END));
    let names: Vec<String> =
        reader.headers().context("the header")?.iter().map(str::to_owned).collect();
    let mut record = ByteRecord::new();
    if !reader.read_byte_record(&mut record)? {
        // The header itself is what stands behind the last row, or has swallowed it.
        if is_end(reader.byte_headers()?) {
            bail!("{name} is empty; a header is expected");
        }
        return Err(never_closed(name, "the header", 1));
    }
    for (i, column) in names.iter().enumerate() {
        if names[..i].contains(column) {
            bail!("{name}: the header names column `{column}` twice");
        }
    }
    header(names)?;
    let mut next = ByteRecord::new();
    let mut row = 0;
    // One record is read ahead: the last one is ours.
    while reader.read_byte_record(&mut next)? {
        row += 1;
        std::mem::swap(&mut record, &mut next);
        each(row, &next)?;
    }
    if !is_end(&record) {
        let line = record.position().map_or(0, csv::Position::line);
        return Err(never_closed(name, &format!("row {}", row + 1), line));
    }
    Ok(())
}

/// Finds names, types and bad rows in a first pass.
pub(super) fn scan(from: impl Read, delimiter: u8, reading: &mut Reading<'_>) -> Result<Found> {
    let about = (reading.name, reading.quote);
    let found = std::cell::RefCell::new(Found { names: vec![], types: vec![], bad: vec![] });
    let mut header = |names: Vec<String>| {
        let mut found = found.borrow_mut();
        found.types = vec![Ty::Empty; names.len()];
        found.names = names;
        Ok(())
    };
    records(from, delimiter, about, &mut header, &mut |row, fields| {
        let mut found = found.borrow_mut();
        let Found { names, types, bad } = &mut *found;
        if fields.len() != names.len() {
            let missing = names.get(fields.len()).map(String::as_str);
            let (has, want) = (fields.len(), names.len());
            reading.bad(row, missing, &format!("it has {has} fields, the header has {want}"))?;
            bad.push(row);
            return Ok(());
        }
        // Nothing of a bad row may stay in the types.
        for (column, field) in fields.iter().enumerate() {
            if std::str::from_utf8(field).is_err() {
                let column = names.get(column).map(String::as_str);
                reading.bad(row, column, "it is not UTF-8")?;
                bad.push(row);
                return Ok(());
            }
        }
        for (ty, field) in types.iter_mut().zip(fields) {
            *ty = merged(*ty, of_field(std::str::from_utf8(field).unwrap_or_default()));
        }
        Ok(())
    })?;
    Ok(found.into_inner())
}

/// Hands out the rows in batches, in a second pass.
pub(super) fn batches(
    from: impl Read,
    delimiter: u8,
    about: (&str, Quote),
    found: &Found,
    take: &mut dyn FnMut(RecordBatch) -> Result<()>,
) -> Result<()> {
    let schema = Arc::clone(&found.head()?.schema);
    let mut bad = found.bad.iter().peekable();
    let mut rows: Vec<StringRecord> = Vec::new();
    let mut flush = |rows: &mut Vec<StringRecord>| {
        let columns = found.types.iter().enumerate().map(|(i, ty)| column(rows, i, *ty));
        let batch = RecordBatch::try_new(Arc::clone(&schema), columns.collect())?;
        rows.clear();
        take(batch)
    };
    records(from, delimiter, about, &mut |_| Ok(()), &mut |row, fields| {
        if bad.next_if(|at| **at == row).is_none() {
            rows.push(StringRecord::from_byte_record(fields.clone())?);
            if rows.len() == BATCH {
                flush(&mut rows)?;
            }
        }
        Ok(())
    })?;
    if rows.is_empty() { Ok(()) } else { flush(&mut rows) }
}

fn is_end(record: &ByteRecord) -> bool {
    record.len() == 1 && record[0] == *END.trim_ascii()
}

fn never_closed(name: &str, what: &str, line: u64) -> anyhow::Error {
    let message = format!("{name}, {what}: a quote that opens there (line {line}) is never closed");
    Fault::new(message)
        .help(
            "a quote inside a quoted field is doubled; set `quote: none` if quotes are plain text",
        )
        .into()
}

fn column(rows: &[StringRecord], i: usize, ty: Ty) -> ArrayRef {
    let fields = rows.iter().map(|r| r.get(i).unwrap_or_default());
    match ty {
        Ty::Bool => {
            let fields = fields.map(|s| Some(s).filter(|s| !s.is_empty()));
            let values = fields.map(|s| s.map(|s| s.eq_ignore_ascii_case("true")));
            Arc::new(values.collect::<BooleanArray>())
        }
        Ty::Int => Arc::new(fields.map(|s| s.parse().ok()).collect::<Int64Array>()),
        Ty::Float => Arc::new(fields.map(|s| s.parse().ok()).collect::<Float64Array>()),
        Ty::Empty | Ty::Text => Arc::new(StringArray::from_iter_values(fields)),
    }
}

fn of_field(field: &str) -> Ty {
    if field.is_empty() {
        return Ty::Empty;
    }
    let unsigned = field.strip_prefix('-').unwrap_or(field);
    let digits = unsigned.bytes().all(|b| b.is_ascii_digit());
    let zeros = unsigned.len() > 1 && unsigned.starts_with('0') && !unsigned.starts_with("0.");
    // Words like `nan` and `inf` are text, though they parse as numbers, and so is what a number
    // would not give back: leading zeros, a plus, more digits than 64 bits hold.
    let number = |b: u8| b.is_ascii_digit() || b"+-.eE".contains(&b);
    let starts = unsigned.starts_with(|c: char| c.is_ascii_digit() || c == '.');
    match field {
        _ if zeros => Ty::Text,
        _ if digits && field.parse::<i64>().is_ok() => Ty::Int,
        _ if digits => Ty::Text,
        _ if starts && field.bytes().all(number) && field.parse::<f64>().is_ok() => Ty::Float,
        "true" | "false" | "True" | "False" | "TRUE" | "FALSE" => Ty::Bool,
        _ => Ty::Text,
    }
}

fn merged(a: Ty, b: Ty) -> Ty {
    match (a, b) {
        (a, b) if a == b => a,
        (Ty::Empty, other) | (other, Ty::Empty) => other,
        (Ty::Int, Ty::Float) | (Ty::Float, Ty::Int) => Ty::Float,
        _ => Ty::Text,
    }
}

//! CSV and TSV: a header, quotes as in RFC 4180, types from all rows.
//!
//! A column of whole numbers is Int64, of numbers Float64, of `true` and `false` Boolean; an
//! empty field there is null. All else is text, where an empty field is empty text; so are
//! numbers with a leading zero, which are names of something.

use std::io::Read;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use arrow::array::{ArrayRef, BooleanArray, Float64Array, Int64Array, StringArray};
use csv::{ByteRecord, ReaderBuilder, StringRecord};

use super::{Reading, Table};

#[derive(Clone, Copy, PartialEq)]
enum Ty {
    Empty,
    Bool,
    Int,
    Float,
    Text,
}

pub(super) fn read(from: impl Read, delimiter: u8, reading: &mut Reading<'_>) -> Result<Table> {
    let mut reader = ReaderBuilder::new().delimiter(delimiter).flexible(true).from_reader(from);
    let names: Vec<String> =
        reader.headers().context("the header")?.iter().map(str::to_owned).collect();
    for (i, name) in names.iter().enumerate() {
        if names[..i].contains(name) {
            bail!("{}: the header names column `{name}` twice", reading.name);
        }
    }
    let mut types = vec![Ty::Empty; names.len()];
    let mut rows: Vec<StringRecord> = Vec::new();
    let mut record = ByteRecord::new();
    let mut row = 0;
    while reader.read_byte_record(&mut record)? {
        row += 1;
        if record.len() != names.len() {
            let missing = names.get(record.len()).map(String::as_str);
            let (has, want) = (record.len(), names.len());
            reading.bad(row, missing, &format!("it has {has} fields, the header has {want}"))?;
            continue;
        }
        match StringRecord::from_byte_record(record.clone()) {
            Ok(fields) => {
                for (ty, field) in types.iter_mut().zip(&fields) {
                    *ty = merged(*ty, of_field(field));
                }
                rows.push(fields);
            }
            Err(e) => {
                let column = names.get(e.utf8_error().field()).map(String::as_str);
                reading.bad(row, column, "it is not UTF-8")?;
            }
        }
    }
    let columns = names.into_iter().zip(types).enumerate().map(|(i, (name, ty))| {
        let field = |r: &StringRecord| r.get(i).unwrap_or_default().to_owned();
        let column: ArrayRef = match ty {
            Ty::Bool => Arc::new(
                rows.iter()
                    .map(|r| Some(field(r)).filter(|s| !s.is_empty()))
                    .map(|s| s.map(|s| s.eq_ignore_ascii_case("true")))
                    .collect::<BooleanArray>(),
            ),
            Ty::Int => Arc::new(rows.iter().map(|r| field(r).parse().ok()).collect::<Int64Array>()),
            Ty::Float => {
                Arc::new(rows.iter().map(|r| field(r).parse().ok()).collect::<Float64Array>())
            }
            Ty::Empty | Ty::Text => Arc::new(StringArray::from_iter_values(rows.iter().map(field))),
        };
        (name, column)
    });
    Table::of_columns(columns)
}

fn of_field(field: &str) -> Ty {
    if field.is_empty() {
        return Ty::Empty;
    }
    let unsigned = field.strip_prefix(['-', '+']).unwrap_or(field);
    let zeros = unsigned.len() > 1 && unsigned.starts_with('0') && !unsigned.starts_with("0.");
    let digits = unsigned.bytes().all(|b| b.is_ascii_digit());
    if digits && !zeros && field.parse::<i64>().is_ok() {
        return Ty::Int;
    }
    // Words like `nan` and `inf` are text, though they parse as numbers.
    let number = |b: u8| b.is_ascii_digit() || b"+-.eE".contains(&b);
    let starts = unsigned.starts_with(|c: char| c.is_ascii_digit() || c == '.');
    if starts && !zeros && field.bytes().all(number) && field.parse::<f64>().is_ok() {
        return Ty::Float;
    }
    if matches!(field, "true" | "false" | "True" | "False" | "TRUE" | "FALSE") {
        return Ty::Bool;
    }
    Ty::Text
}

fn merged(a: Ty, b: Ty) -> Ty {
    match (a, b) {
        (a, b) if a == b => a,
        (Ty::Empty, other) | (other, Ty::Empty) => other,
        (Ty::Int, Ty::Float) | (Ty::Float, Ty::Int) => Ty::Float,
        _ => Ty::Text,
    }
}

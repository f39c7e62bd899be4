//! JSON and JSON lines. Columns stand in the order in which they first appear; their types are
//! those of the rows before, and a row that does not fit them is a bad row.

use std::fmt;
use std::io::{BufRead, BufReader, Read};
use std::sync::Arc;

use anyhow::Result;
use arrow::array::RecordBatch;
use arrow::datatypes::{DataType, Field, Schema};
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};
use serde::ser::{SerializeMap as _, SerializeSeq as _, Serializer};
use serde::{Deserialize, Serialize};

use super::document::document;
use super::table::BATCH;
use super::text::unmarked;
use super::{Reading, Table};

/// A JSON value whose fields keep their order.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Json {
    Null,
    Bool(bool),
    Int(i64),
    /// Beyond 63 bits; kept digit by digit.
    Digits(u64),
    Float(f64),
    Text(String),
    List(Vec<Json>),
    Map(Vec<(String, Json)>),
}

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Json;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("JSON")
            }
            fn visit_unit<E>(self) -> Result<Json, E> {
                Ok(Json::Null)
            }
            fn visit_bool<E>(self, v: bool) -> Result<Json, E> {
                Ok(Json::Bool(v))
            }
            fn visit_i64<E>(self, v: i64) -> Result<Json, E> {
                Ok(Json::Int(v))
            }
            fn visit_u64<E>(self, v: u64) -> Result<Json, E> {
                Ok(i64::try_from(v).map_or(Json::Digits(v), Json::Int))
            }
            fn visit_f64<E>(self, v: f64) -> Result<Json, E> {
                Ok(Json::Float(v))
            }
            fn visit_str<E>(self, v: &str) -> Result<Json, E> {
                Ok(Json::Text(v.to_owned()))
            }
            fn visit_string<E>(self, v: String) -> Result<Json, E> {
                Ok(Json::Text(v))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Json, A::Error> {
                let mut items = Vec::new();
                while let Some(item) = seq.next_element()? {
                    items.push(item);
                }
                Ok(Json::List(items))
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Json, A::Error> {
                let mut fields: Vec<(String, Json)> = Vec::new();
                while let Some((name, value)) = map.next_entry::<String, Json>()? {
                    if fields.iter().any(|(n, _)| *n == name) {
                        let twice = format!("field `{name}` stands there twice");
                        return Err(serde::de::Error::custom(twice));
                    }
                    fields.push((name, value));
                }
                Ok(Json::Map(fields))
            }
        }
        d.deserialize_any(Any)
    }
}

impl Serialize for Json {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Null => s.serialize_unit(),
            Self::Bool(v) => s.serialize_bool(*v),
            Self::Int(v) => s.serialize_i64(*v),
            Self::Digits(v) => s.serialize_str(&v.to_string()),
            Self::Float(v) => s.serialize_f64(*v),
            Self::Text(v) => s.serialize_str(v),
            Self::List(items) => {
                let mut seq = s.serialize_seq(Some(items.len()))?;
                for item in items {
                    seq.serialize_element(item)?;
                }
                seq.end()
            }
            Self::Map(fields) => {
                let mut map = s.serialize_map(Some(fields.len()))?;
                for (name, value) in fields {
                    map.serialize_entry(name, value)?;
                }
                map.end()
            }
        }
    }
}

/// What a column holds so far.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Ty {
    Null,
    Bool,
    Int,
    /// Whole numbers of which one is beyond 63 bits: text.
    Digits,
    Float,
    Text,
    List(Box<Ty>),
    Map(Vec<(String, Ty)>),
}

impl Ty {
    /// The type of a value; `None` for a list whose items do not go together.
    pub(super) fn of(value: &Json) -> Option<Self> {
        Some(match value {
            Json::Null => Self::Null,
            Json::Bool(_) => Self::Bool,
            Json::Int(_) => Self::Int,
            Json::Digits(_) => Self::Digits,
            Json::Float(_) => Self::Float,
            Json::Text(_) => Self::Text,
            Json::List(items) => {
                let mut inner = Self::Null;
                for item in items {
                    inner = inner.merged(&Self::of(item)?)?;
                }
                Self::List(Box::new(inner))
            }
            Json::Map(fields) => {
                let typed = fields.iter().map(|(n, v)| Some((n.clone(), Self::of(v)?)));
                Self::Map(typed.collect::<Option<_>>()?)
            }
        })
    }

    /// The type that holds both, if there is one.
    fn merged(&self, other: &Self) -> Option<Self> {
        Some(match (self, other) {
            (a, b) if a == b => a.clone(),
            (Self::Null, b) => b.clone(),
            (a, Self::Null) => a.clone(),
            (Self::Int, Self::Float) | (Self::Float, Self::Int) => Self::Float,
            (Self::Int, Self::Digits) | (Self::Digits, Self::Int) => Self::Digits,
            (Self::List(a), Self::List(b)) => Self::List(Box::new(a.merged(b)?)),
            (Self::Map(a), Self::Map(b)) => {
                let mut fields = a.clone();
                for (name, ty) in b {
                    match fields.iter_mut().find(|(n, _)| n == name) {
                        Some((_, known)) => *known = known.merged(ty)?,
                        None => fields.push((name.clone(), ty.clone())),
                    }
                }
                Self::Map(fields)
            }
            _ => return None,
        })
    }

    /// Without objects that have no field in any row: a column cannot hold them.
    fn filled(&self) -> Option<Self> {
        match self {
            Self::List(item) => Some(Self::List(Box::new(item.filled()?))),
            Self::Map(fields) => {
                let fields = fields.iter().filter_map(|(n, ty)| Some((n.clone(), ty.filled()?)));
                let fields: Vec<(String, Self)> = fields.collect();
                (!fields.is_empty()).then_some(Self::Map(fields))
            }
            plain => Some(plain.clone()),
        }
    }

    fn arrow(&self) -> DataType {
        match self {
            Self::Null | Self::Digits | Self::Text => DataType::Utf8,
            Self::Bool => DataType::Boolean,
            Self::Int => DataType::Int64,
            Self::Float => DataType::Float64,
            Self::List(item) => DataType::List(Arc::new(Field::new("item", item.arrow(), true))),
            Self::Map(fields) => DataType::Struct(fields_of(fields).into()),
        }
    }

    pub(super) fn noun(&self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Bool => "true or false",
            Self::Int | Self::Digits | Self::Float => "a number",
            Self::Text => "text",
            Self::List(_) => "a list",
            Self::Map(_) => "an object",
        }
    }
}

fn fields_of(columns: &[(String, Ty)]) -> Vec<Field> {
    columns.iter().map(|(name, ty)| Field::new(name, ty.arrow(), true)).collect()
}

/// Columns of rows that fit together, of one file or of several.
#[derive(Default)]
pub(super) struct Columns {
    columns: Vec<(String, Ty)>,
    notes: Vec<String>,
}

/// How the rows of a file are written, and which are left out.
pub(super) struct Found {
    lines: bool,
    /// Counted from 1, in order.
    bad: Vec<usize>,
}

impl Columns {
    /// Takes a row's types; whether it is a good row.
    fn add(&mut self, number: usize, value: &Json, reading: &mut Reading<'_>) -> Result<bool> {
        let mut bad =
            |column: Option<&str>, why: &str| reading.bad(number, column, why).map(|()| false);
        let Json::Map(fields) = value else {
            let found = Ty::of(value).map_or("a mixed list", |ty| ty.noun());
            return bad(None, &format!("expected an object, found {found}"));
        };
        // Nothing of a bad row may stay in the types, so they change after the last check.
        let mut changed = Vec::new();
        for (name, value) in fields {
            let known = self.columns.iter().position(|(n, _)| n == name);
            let Some(ty) = Ty::of(value) else {
                return bad(Some(name), "items of a list are of different types");
            };
            let Some(known) = known else {
                changed.push((None, name.clone(), ty));
                continue;
            };
            let held = &self.columns[known].1;
            let Some(merged) = held.merged(&ty) else {
                let (want, found) = (held.noun(), ty.noun());
                let why = if want == found {
                    format!("{found} of another form than in the rows before")
                } else {
                    format!("expected {want} as in the rows before, found {found}")
                };
                return bad(Some(name), &why);
            };
            if merged != *held {
                changed.push((Some(known), name.clone(), merged));
            }
        }
        for (known, name, ty) in changed {
            match known {
                Some(i) => self.columns[i].1 = ty,
                None => self.columns.push((name, ty)),
            }
        }
        Ok(true)
    }

    /// All columns, without rows.
    pub(super) fn head(&mut self) -> Result<Table> {
        let (columns, notes) = self.filled();
        let schema = Schema::new(fields_of(&columns));
        let mut table = Table::new(&schema, Vec::new())?;
        let untyped = columns.into_iter().filter(|(_, ty)| *ty == Ty::Null);
        table.untyped = untyped.map(|(name, _)| name).collect();
        table.notes = std::mem::take(&mut self.notes);
        table.notes.extend(notes);
        Ok(table)
    }

    /// Columns that can be written, and what is said of the others.
    fn filled(&self) -> (Vec<(String, Ty)>, Vec<String>) {
        let mut columns = Vec::with_capacity(self.columns.len());
        let mut notes = Vec::new();
        for (name, ty) in &self.columns {
            match ty.filled() {
                Some(ty) => columns.push((name.clone(), ty)),
                None => notes.push(format!(
                    "column `{name}` holds objects without any field in all rows; it was left out"
                )),
            }
        }
        (columns, notes)
    }

    /// Finds the columns of a file with an object per line.
    pub(super) fn scan_lines(
        &mut self,
        from: impl Read,
        reading: &mut Reading<'_>,
    ) -> Result<Found> {
        let mut bad = Vec::new();
        lines(from, &mut |number, parsed| {
            let good = match parsed {
                Ok(value) => self.add(number, &value, reading)?,
                Err(e) => reading.bad(number, None, &syntax(&e, number)).map(|()| false)?,
            };
            if !good {
                bad.push(number);
            }
            Ok(())
        })?;
        Ok(Found { lines: true, bad })
    }

    /// Finds the columns of a document.
    pub(super) fn scan_document(
        &mut self,
        from: impl Read,
        reading: &mut Reading<'_>,
    ) -> Result<Found> {
        let (mut bad, mut notes) = (Vec::new(), std::mem::take(&mut self.notes));
        let of = (reading.name, reading.field);
        let lines = document(from, of, &mut notes, &mut |number, row| {
            if !self.add(number, &row, reading)? {
                bad.push(number);
            }
            Ok(())
        });
        self.notes = notes;
        match lines? {
            Some(lines) => self.scan_lines(lines, reading),
            None => Ok(Found { lines: false, bad }),
        }
    }

    /// Hands out the rows of a file in batches, in a second pass; a field that is absent is null.
    pub(super) fn batches(
        &self,
        from: impl Read,
        reading: &Reading<'_>,
        found: &Found,
        take: &mut dyn FnMut(RecordBatch) -> Result<()>,
    ) -> Result<()> {
        let (columns, _) = self.filled();
        if columns.is_empty() {
            return Ok(());
        }
        let schema = Arc::new(Schema::new(fields_of(&columns)));
        let reader = arrow::json::ReaderBuilder::new(schema)
            .with_batch_size(BATCH)
            // Whole numbers beside longer ones, see `Digits`; all else was checked.
            .with_coerce_primitive(true);
        let mut decoder = reader.build_decoder()?;
        let mut rows: Vec<Json> = Vec::new();
        let mut flush = |rows: &mut Vec<Json>| {
            decoder.serialize(rows)?;
            rows.clear();
            decoder.flush()?.map_or(Ok(()), &mut *take)
        };
        let mut bad = found.bad.iter().peekable();
        let mut add = |number: usize, row: Json| {
            if bad.next_if(|at| **at == number).is_none() {
                rows.push(row);
                if rows.len() == BATCH {
                    flush(&mut rows)?;
                }
            }
            Ok(())
        };
        if found.lines {
            lines(from, &mut |number, parsed| add(number, parsed.unwrap_or(Json::Null)))?;
        } else {
            document(from, (reading.name, reading.field), &mut Vec::new(), &mut add)?;
        }
        if rows.is_empty() { Ok(()) } else { flush(&mut rows) }
    }
}

/// Every line that is not blank, parsed, with its number (from 1).
fn lines(
    from: impl Read,
    each: &mut dyn FnMut(usize, serde_json::Result<Json>) -> Result<()>,
) -> Result<()> {
    let mut lines = BufReader::new(from);
    let mut line = Vec::new();
    let mut number = 0;
    while lines.read_until(b'\n', &mut line)? > 0 {
        number += 1;
        let bytes = if number == 1 { unmarked(&line) } else { &line };
        if !bytes.trim_ascii().is_empty() {
            each(number, serde_json::from_slice(bytes))?;
        }
        line.clear();
    }
    Ok(())
}

/// serde_json counts lines within what it was given; ours is one line of the file.
fn syntax(e: &serde_json::Error, line: usize) -> String {
    let text = e.to_string();
    let message = text.split(" at line ").next().unwrap_or(&text);
    format!("not JSON: {message} (line {line}, character {})", e.column())
}

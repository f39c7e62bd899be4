//! JSON documents: a list of rows, an object with one, or what only looks like a document.

use std::fmt;
use std::io::{BufRead, BufReader, Read};

use anyhow::{Context as _, Result, bail};
use serde::de::{
    DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Unexpected, Visitor,
};

use super::json::{Json, Ty};
use super::text::unmarked;
use crate::source::{Fault, suggest};

/// Takes a row with its number, from 1.
type Each<'a> = &'a mut dyn FnMut(usize, Json) -> Result<()>;

/// A first line is looked for in so many bytes where a field of a document is asked for.
const FIRST_LINE: u64 = 1 << 20;

/// Hands out the rows of a `.json` file; or gives the file back, if it holds an object per line, as
/// many do. A list, and the list in the field that is asked for, are read row by row; another
/// document as a whole.
pub(super) fn document<'a>(
    from: impl Read + 'a,
    (name, field): (&str, Option<&str>),
    notes: &mut Vec<String>,
    each: Each<'_>,
) -> Result<Option<Box<dyn Read + 'a>>> {
    let not_json = || format!("{name} is not JSON");
    let mut from = BufReader::new(from);
    let mut head = Vec::new();
    let first = first_byte(&mut from, &mut head)?;
    head.drain(..head.len() - unmarked(&head).len());
    match (first, field) {
        // An empty file is a split's part without a row, as it is with a row a line.
        (None, _) => return Ok(None),
        (Some(b'['), None) => {
            stream(head.chain(from), None, each).with_context(not_json)?;
            return Ok(None);
        }
        (Some(b'['), Some(field)) => {
            let message = format!("{name} is a list and has no field `{field}`");
            return Err(Fault::new(message).help("leave `field` out").into());
        }
        _ => {}
    }
    let limit = if field.is_some() { FIRST_LINE } else { u64::MAX };
    from.by_ref().take(limit).read_until(b'\n', &mut head)?;
    let line = serde_json::from_slice::<Json>(&head);
    let one_line = matches!(line, Ok(Json::Map(_)));
    if one_line && first_byte(&mut from, &mut head)?.is_some() {
        return Ok(Some(Box::new(std::io::Cursor::new(head).chain(from))));
    }
    if let Some(field) = field {
        stream(head.chain(from), Some(field), each).with_context(not_json)?;
        return Ok(None);
    }
    let whole = match line {
        Ok(value) if one_line => value,
        _ => {
            from.read_to_end(&mut head)?;
            serde_json::from_slice(&head).with_context(not_json)?
        }
    };
    let rows = match whole {
        Json::Map(fields) if one_line => {
            if let [field] = lists_of_rows(&fields).as_slice() {
                notes.push(format!(
                    "{name} is one line and was read as one row; if its rows are the list in \
                     `{field}`, set `field: {field}`"
                ));
            }
            vec![Json::Map(fields)]
        }
        Json::Map(fields) => only_list(fields, name)?,
        other => {
            let found = Ty::of(&other).map_or("a list", |ty| ty.noun());
            bail!("{name}: expected a list of objects, found {found}")
        }
    };
    rows.into_iter().enumerate().try_for_each(|(i, row)| each(i + 1, row))?;
    Ok(None)
}

/// Reads up to the first byte that is no blank (nor the mark at the start of a file), which is the
/// last that is read.
fn first_byte(from: &mut impl BufRead, read: &mut Vec<u8>) -> Result<Option<u8>> {
    for byte in from.bytes() {
        let byte = byte?;
        read.push(byte);
        if !byte.is_ascii_whitespace() && !matches!(byte, 0xef | 0xbb | 0xbf) {
            return Ok(Some(byte));
        }
    }
    Ok(None)
}

/// Hands out the items of a list, or of the list in a field of an object, one by one.
fn stream(from: impl Read, field: Option<&str>, each: Each<'_>) -> Result<()> {
    let mut failed = None;
    let mut de = serde_json::Deserializer::from_reader(from);
    let rows = Rows { field, each, failed: &mut failed };
    let read = rows.deserialize(&mut de).and_then(|()| de.end());
    match failed {
        Some(e) => Err(e),
        None => Ok(read?),
    }
}

/// A list whose items are handed out, or an object with one.
struct Rows<'a> {
    field: Option<&'a str>,
    each: Each<'a>,
    /// What is wrong but for the JSON.
    failed: &'a mut Option<anyhow::Error>,
}

impl<'de> DeserializeSeed<'de> for Rows<'_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<(), D::Error> {
        d.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Rows<'_> {
    type Value = ();
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.field {
            Some(field) => write!(f, "an object with a list of rows in `{field}`"),
            None => f.write_str("a list of rows"),
        }
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        if self.field.is_some() {
            return Err(serde::de::Error::invalid_type(Unexpected::Seq, &self));
        }
        let mut number = 0;
        while let Some(item) = seq.next_element()? {
            number += 1;
            if let Err(e) = (self.each)(number, item) {
                *self.failed = Some(e);
                return Err(serde::de::Error::custom("a row is refused"));
            }
        }
        Ok(())
    }
    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<(), A::Error> {
        let Some(field) = self.field.take() else {
            return Err(serde::de::Error::invalid_type(Unexpected::Map, &self));
        };
        let (mut names, mut found) = (Vec::new(), false);
        while let Some(name) = map.next_key::<String>()? {
            if name != field {
                map.next_value::<IgnoredAny>()?;
                names.push(name);
                continue;
            }
            if found {
                let twice = format!("field `{name}` stands there twice");
                return Err(serde::de::Error::custom(twice));
            }
            found = true;
            let (each, failed) = (&mut *self.each, &mut *self.failed);
            map.next_value_seed(Rows { field: None, each, failed })?;
        }
        if !found {
            let known: Vec<&str> = names.iter().map(String::as_str).collect();
            let fault = Fault::new(format!("it has no list of rows in `{field}`"));
            let help = suggest(field, &known).unwrap_or_else(|| "it has no fields at all".into());
            *self.failed = Some(fault.help(help).into());
            return Err(serde::de::Error::custom("a field is missing"));
        }
        Ok(())
    }
}

/// Names of the fields that hold a list of objects with something in it.
fn lists_of_rows(fields: &[(String, Json)]) -> Vec<String> {
    let rows = |value: &Json| match value {
        Json::List(items) => !items.is_empty() && items.iter().all(|i| matches!(i, Json::Map(_))),
        _ => false,
    };
    fields.iter().filter(|(_, v)| rows(v)).map(|(n, _)| n.clone()).collect()
}

/// The list in the only field that holds a list of objects.
fn only_list(fields: Vec<(String, Json)>, file: &str) -> Result<Vec<Json>> {
    let names = lists_of_rows(&fields);
    let [name] = names.as_slice() else {
        let what = if names.is_empty() { "no field" } else { "more than one field" };
        let message = format!("{file} is an object with {what} that holds a list of rows");
        let fault = Fault::new(message).help(if names.is_empty() {
            "a list of objects is expected".to_owned()
        } else {
            format!("set `field` to one of {}", names.join(", "))
        });
        return Err(fault.into());
    };
    let rows = fields.into_iter().find(|(field, _)| field == name);
    Ok(match rows {
        Some((_, Json::List(rows))) => rows,
        _ => Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows by number, lines, and what is noted.
    type Found = (Vec<(usize, Json)>, String, Vec<String>);

    fn rows(text: &str, field: Option<&str>) -> Result<Found> {
        let (mut rows, mut notes, mut lines) = (Vec::new(), Vec::new(), String::new());
        let rest = document(text.as_bytes(), ("f.json", field), &mut notes, &mut |number, row| {
            rows.push((number, row));
            Ok(())
        })?;
        if let Some(mut rest) = rest {
            rest.read_to_string(&mut lines)?;
        }
        Ok((rows, lines, notes))
    }

    fn numbers(text: &str, field: Option<&str>) -> Vec<usize> {
        let (rows, lines, _) = rows(text, field).unwrap();
        assert_eq!(lines, "");
        let whole = |(at, (number, row)): (usize, (usize, Json))| {
            assert_eq!(row, Json::Map(vec![("a".into(), Json::Int(at as i64 + 1))]));
            number
        };
        rows.into_iter().enumerate().map(whole).collect()
    }

    #[test]
    fn lists_and_lists_in_fields_are_found() {
        for text in ["[{\"a\": 1}, {\"a\": 2}]", "\u{feff}\n [{\"a\":1},\n{\"a\":2}]\n"] {
            assert_eq!(numbers(text, None), [1, 2]);
        }
        let whole = "{\n\"rows\": [{\"a\": 1}, {\"a\": 2}], \"more\": {\"rows\": 3}, \"v\": 1}";
        assert_eq!(numbers(whole, None), [1, 2]);
        for text in [whole, &whole.replace('\n', "")] {
            assert_eq!(numbers(text, Some("rows")), [1, 2]);
        }
        assert_eq!(numbers("", None), [0; 0]);
        assert_eq!(numbers(" \n", Some("rows")), [0; 0]);
        assert_eq!(numbers("{\"rows\": []}", Some("rows")), [0; 0]);
        let (found, _, notes) = rows(&whole.replace('\n', ""), None).unwrap();
        assert!(found.len() == 1 && notes[0].contains("`field: rows`"), "{notes:?}");
    }

    #[test]
    fn lines_are_given_back_whole() {
        for field in [None, Some("rows")] {
            for text in ["{\"a\": 1}\n\n{\"a\": 2}\n", "\n {\"a\": 1} \n[nonsense"] {
                let (found, lines, _) = rows(text, field).unwrap();
                assert_eq!((found.len(), lines.as_str()), (0, text));
            }
        }
    }

    #[test]
    fn what_is_wrong_is_told() {
        let said = |text, field| {
            let e = rows(text, field).unwrap_err();
            format!("{e:#}; {}", crate::source::advice(&e).join("; "))
        };
        let cut = said("[{\"a\": 1},\n{\"a\"", None);
        assert!(cut.starts_with("f.json is not JSON: EOF") && cut.contains("line 2"), "{cut}");
        assert!(said("[] 7", None).contains("trailing"), "{}", said("[] 7", None));
        assert!(said("7", None).contains("expected a list of objects, found a number"));
        assert!(said("[]", Some("x")).contains("leave `field` out"));
        let gone = said("{\"rows\": []}", Some("row"));
        assert!(gone.contains("no list of rows in `row`") && gone.contains("`rows`"), "{gone}");
        let other = said("{\"rows\": 7}", Some("rows"));
        assert!(other.contains("expected a list of rows"), "{other}");
        assert!(said("{\"a\": [],\n\"a\": []}", Some("a")).contains("stands there twice"));
        let two = said("{\n\"a\": [{}], \"b\": [{}]}", None);
        assert!(two.contains("more than one field") && two.contains("a, b"), "{two}");
    }

    /// A list without an end.
    struct Endless(u64);

    impl Read for Endless {
        fn read(&mut self, to: &mut [u8]) -> std::io::Result<usize> {
            let row = if self.0 == 0 { b"[{\"a\": 0}" } else { b",{\"a\": 0}" };
            self.0 += 1;
            let length = row.len().min(to.len());
            to[..length].copy_from_slice(&row[..length]);
            Ok(length)
        }
    }

    #[test]
    fn a_list_is_read_row_by_row() {
        let mut seen = 0;
        let ended = document(Endless(0), ("f.json", None), &mut Vec::new(), &mut |number, _| {
            seen = number;
            if number == 10_000 { bail!("enough") } else { Ok(()) }
        });
        let said = format!("{:#}", ended.err().unwrap());
        assert!(seen == 10_000 && said.contains("enough"), "{said}");
    }
}

//! JSON for templates as Python has it: fields keep their order, and `tojson` writes what
//! `json.dumps` writes.
//!
//! Fields of messages and of tools keep theirs; a dict that is written in the template itself
//! comes out sorted.

use std::cmp::Ordering;
use std::fmt;
use std::sync::Arc;

use minijinja::value::{Enumerator, Kwargs, Object, ObjectRepr, Value, ValueKind};
use minijinja::{Error, ErrorKind};
use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};

/// A map whose fields keep their order.
#[derive(Debug)]
struct Fields(Vec<(Arc<str>, Value)>);

impl Object for Fields {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Map
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        let key = key.as_str()?;
        self.0.iter().find(|(name, _)| **name == *key).map(|(_, value)| value.clone())
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Values(self.0.iter().map(|(name, _)| Value::from(Arc::clone(name))).collect())
    }
}

/// A map with these fields, in this order.
pub(super) fn map<'a>(fields: impl IntoIterator<Item = (&'a str, Value)>) -> Value {
    let fields = fields.into_iter().map(|(name, value)| (Arc::from(name), value));
    Value::from_object(Fields(fields.collect()))
}

/// The fields of a map, in its order; none of anything else.
pub(super) fn fields(value: &Value) -> Vec<(String, Value)> {
    if value.kind() != ValueKind::Map {
        return Vec::new();
    }
    let names = value.try_iter().into_iter().flatten();
    let named = names.filter_map(|name| {
        let name = name.as_str()?.to_owned();
        let value = value.get_attr(&name).ok()?;
        Some((name, value))
    });
    named.collect()
}

/// Parses JSON.
///
/// # Errors
/// When it is not JSON.
pub fn parse(text: &str) -> serde_json::Result<Value> {
    serde_json::from_str::<Ordered>(text).map(|ordered| ordered.0)
}

struct Ordered(Value);

impl<'de> Deserialize<'de> for Ordered {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Ordered;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("JSON")
            }
            fn visit_unit<E>(self) -> Result<Ordered, E> {
                Ok(Ordered(Value::from(())))
            }
            fn visit_bool<E>(self, v: bool) -> Result<Ordered, E> {
                Ok(Ordered(v.into()))
            }
            fn visit_i64<E>(self, v: i64) -> Result<Ordered, E> {
                Ok(Ordered(v.into()))
            }
            fn visit_u64<E>(self, v: u64) -> Result<Ordered, E> {
                Ok(Ordered(v.into()))
            }
            fn visit_f64<E>(self, v: f64) -> Result<Ordered, E> {
                Ok(Ordered(v.into()))
            }
            fn visit_str<E>(self, v: &str) -> Result<Ordered, E> {
                Ok(Ordered(v.into()))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Ordered, A::Error> {
                let mut items = Vec::new();
                while let Some(Ordered(item)) = seq.next_element()? {
                    items.push(item);
                }
                Ok(Ordered(Value::from(items)))
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Ordered, A::Error> {
                let mut fields: Vec<(Arc<str>, Value)> = Vec::new();
                while let Some((name, Ordered(value))) = map.next_entry::<String, Ordered>()? {
                    // As in Python, the last of two has its say in the place of the first.
                    match fields.iter_mut().find(|(known, _)| **known == *name) {
                        Some((_, known)) => *known = value,
                        None => fields.push((name.into(), value)),
                    }
                }
                Ok(Ordered(Value::from_object(Fields(fields))))
            }
        }
        d.deserialize_any(Any)
    }
}

/// How `json.dumps` is asked to write.
struct Dump {
    ascii: bool,
    indent: Option<usize>,
    comma: String,
    colon: String,
    sort: bool,
}

/// The filter `tojson` of transformers: `json.dumps`, nothing escaped for HTML, letters beyond
/// ASCII as they are.
pub(super) fn to_json(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    let ascii: Option<bool> = options.get("ensure_ascii")?;
    let sort: Option<bool> = options.get("sort_keys")?;
    options.assert_all_used()?;
    let (comma, colon) = match separators.as_deref() {
        Some([comma, colon]) => (comma.clone(), colon.clone()),
        Some(_) => return Err(failed("`separators` are two texts")),
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
    };
    let (ascii, sort) = (ascii.unwrap_or(false), sort.unwrap_or(false));
    let mut out = String::new();
    Dump { ascii, indent, comma, colon, sort }.write(&mut out, value, 0)?;
    Ok(Value::from_safe_string(out))
}

fn failed(message: impl fmt::Display) -> Error {
    Error::new(ErrorKind::BadSerialization, message.to_string())
}

impl Dump {
    fn line(&self, out: &mut String, depth: usize) {
        if let Some(indent) = self.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }

    fn write(&self, out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push_str(&number(value)?),
            ValueKind::String => self.text(out, value.as_str().unwrap_or_default())?,
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.list(out, ('[', ']'), &items, depth, &|out, item| {
                    self.write(out, item, depth + 1)
                })?;
            }
            ValueKind::Map => {
                let mut fields = Vec::new();
                for key in value.try_iter()? {
                    let name = key.as_str().map_or_else(|| key.to_string(), str::to_owned);
                    fields.push((name, value.get_item(&key)?));
                }
                if self.sort {
                    fields.sort_by(|a, b| a.0.cmp(&b.0).then(Ordering::Equal));
                }
                self.list(out, ('{', '}'), &fields, depth, &|out, (name, value)| {
                    self.text(out, name)?;
                    out.push_str(&self.colon);
                    self.write(out, value, depth + 1)
                })?;
            }
            other => return Err(failed(format_args!("{other} is not JSON"))),
        }
        Ok(())
    }

    fn list<T>(
        &self,
        out: &mut String,
        (open, close): (char, char),
        items: &[T],
        depth: usize,
        one: &dyn Fn(&mut String, &T) -> Result<(), Error>,
    ) -> Result<(), Error> {
        out.push(open);
        for (i, item) in items.iter().enumerate() {
            out.push_str(if i > 0 { &self.comma } else { "" });
            self.line(out, depth + 1);
            one(out, item)?;
        }
        if !items.is_empty() {
            self.line(out, depth);
        }
        out.push(close);
        Ok(())
    }

    fn text(&self, out: &mut String, text: &str) -> Result<(), Error> {
        let quoted = serde_json::to_string(text).map_err(failed)?;
        if !self.ascii {
            out.push_str(&quoted);
            return Ok(());
        }
        let mut units = [0; 2];
        for c in quoted.chars() {
            if c.is_ascii() {
                out.push(c);
                continue;
            }
            for unit in c.encode_utf16(&mut units) {
                out.push_str(&format!("\\u{unit:04x}"));
            }
        }
        Ok(())
    }
}

/// A number as Python's `repr` writes it: with an exponent (`1e-05`, `1e+16`) only beyond sixteen
/// places before the point or four zeros behind it.
fn number(value: &Value) -> Result<String, Error> {
    if value.is_integer() {
        return Ok(value.to_string());
    }
    let number = f64::try_from(value.clone())?;
    let shortest = format!("{number:e}");
    let (digits, exponent) = shortest.split_once('e').unwrap_or((&shortest, "0"));
    let exponent: i32 = exponent.parse().map_err(failed)?;
    if (-4..16).contains(&exponent) {
        let text = number.to_string();
        return Ok(if text.contains('.') { text } else { text + ".0" });
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    Ok(format!("{digits}e{sign}{:02}", exponent.abs()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dumped(text: &str, options: &str) -> String {
        let mut env = minijinja::Environment::new();
        env.add_filter("tojson", to_json);
        let source = format!("{{{{ x | tojson({options}) }}}}");
        env.render_str(&source, minijinja::context! { x => parse(text).unwrap() }).unwrap()
    }

    /// What `json.dumps(json.loads(…), …)` of Python 3.11 gives.
    #[test]
    fn python_writes_the_same() {
        let text =
            r#"{"b": [1, 2.0, -0.5, 1e-5, 1e22, true, null], "a": {"ä\"\n\u0001": {}, "z": []}}"#;
        assert_eq!(
            dumped(text, "ensure_ascii=false"),
            r#"{"b": [1, 2.0, -0.5, 1e-05, 1e+22, true, null], "a": {"ä\"\n\u0001": {}, "z": []}}"#
        );
        assert_eq!(
            dumped(r#"{"b": "ä😀", "a": 1}"#, "ensure_ascii=true, sort_keys=true"),
            r#"{"a": 1, "b": "\u00e4\ud83d\ude00"}"#
        );
        assert_eq!(dumped("[1, {}]", "indent=2"), "[\n  1,\n  {}\n]");
        assert_eq!(dumped("{\"a\": [1, 2]}", "separators=[',', ':']"), "{\"a\":[1,2]}");
        assert_eq!(dumped("{\"a\": 1, \"b\": 2, \"a\": 3}", ""), "{\"a\": 3, \"b\": 2}");
    }

    #[test]
    fn fields_are_told_in_their_order() {
        let value = parse(r#"{"z": 1, "a": [{"y": 2, "b": 3}]}"#).unwrap();
        let names: Vec<String> = fields(&value).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["z", "a"]);
        assert!(fields(&Value::from("x")).is_empty());
        assert!(parse("{").is_err());
    }
}

//! From serde-saphyr's events to [`Node`].

use std::fmt;

use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Number;
use serde_yaml::{
    DuplicateKeyPolicy, Error, Location, NonFiniteFloatPolicy, Options, Spanned, budget::Budget,
};

use super::{Entry, Node, Shape};
use crate::source::{Diagnostic, Source, Span};

/// Deeper nesting than this is refused; a pipeline needs about ten.
const MAX_DEPTH: usize = 64;

pub(super) fn read(source: &Source) -> (Option<Node>, Vec<Diagnostic>) {
    let parsed: Result<Option<Raw>, Error> =
        serde_yaml::from_str_with_options(&source.text, options());
    match parsed {
        Ok(raw) => {
            let mut diagnostics = Vec::new();
            let node = raw.map_or(Node::new(Shape::Null, Span::default()), |raw| {
                node(raw, source, &mut diagnostics)
            });
            diagnostics.sort_by_key(|d| d.span);
            (Some(node), diagnostics)
        }
        Err(error) => (None, vec![syntax(&error, source)]),
    }
}

fn options() -> Options {
    let mut options = Options::default();
    options.strict_booleans = true;
    options.leading_zero_numbers_as_strings = true;
    options.underscored_numbers_as_strings = true;
    // Both are reported by `node`, together with everything else.
    options.duplicate_keys = DuplicateKeyPolicy::PassThrough;
    options.non_finite_float_policy = NonFiniteFloatPolicy::PassThrough;
    options.with_snippet = false;
    let mut budget = Budget::default();
    budget.max_depth = MAX_DEPTH;
    // Room for pipelines of 50,000 steps.
    budget.max_nodes = 1_000_000;
    budget.max_events = 4_000_000;
    options.budget = Some(budget);
    options
}

fn syntax(error: &Error, source: &Source) -> Diagnostic {
    let location = error.location();
    let span = location.map_or(Span::default(), |l| place(&l, source));
    let text = error.without_snippet().to_string();
    let message = location.map_or(text.as_str(), |l| {
        let at = format!("at line {}, column {}", l.line(), l.column());
        text.split(&at).next().unwrap_or_default()
    });
    let message = message.trim().trim_end_matches(':');
    Diagnostic::error(span, format!("not valid YAML: {message}"), "here")
}

/// The bytes that a location covers.
fn place(location: &Location, source: &Source) -> Span {
    let span = location.span();
    let len = source.text.len();
    let start = match span.byte_offset() {
        Some(start) => usize::try_from(start).unwrap_or(len),
        None => offset(location, source),
    };
    let bytes = usize::try_from(span.byte_len().unwrap_or(0)).unwrap_or(0);
    let start = start.min(len);
    Span::new(start, start.saturating_add(bytes).min(len))
}

/// The byte offset of a line and column.
fn offset(location: &Location, source: &Source) -> usize {
    let line = usize::try_from(location.line()).unwrap_or(0).saturating_sub(1);
    let column = usize::try_from(location.column()).unwrap_or(0).saturating_sub(1);
    let mut start = 0;
    for (i, text) in source.text.split_inclusive('\n').enumerate() {
        if i == line {
            return start + text.chars().take(column).map(char::len_utf8).sum::<usize>();
        }
        start += text.len();
    }
    source.text.len()
}

type Raw = Spanned<RawShape>;

enum RawShape {
    Null,
    Bool(bool),
    Int(Number),
    Float(f64),
    Text(String),
    List(Vec<Raw>),
    Map(Vec<(Spanned<String>, Raw)>),
}

fn node(raw: Raw, source: &Source, diagnostics: &mut Vec<Diagnostic>) -> Node {
    let mut span = place(&raw.referenced, source);
    let aliased = raw.referenced != raw.defined;
    let shape = match raw.value {
        RawShape::Null => {
            // What is not written takes no room.
            if !matches!(&source.text[span.start..span.end], "~" | "null" | "Null" | "NULL") {
                span.end = span.start;
            }
            Shape::Null
        }
        RawShape::Bool(b) => Shape::Bool(b),
        RawShape::Int(n) => Shape::Number(n),
        RawShape::Float(x) => match Number::from_f64(x) {
            Some(n) => Shape::Number(n),
            None => {
                let text = &source.text[span.start..span.end];
                let message = format!("`{text}` is not a finite number");
                diagnostics.push(Diagnostic::error(span, message, "not finite"));
                // Still a number, so that what expects one does not complain a second time.
                Shape::Number(0.into())
            }
        },
        RawShape::Text(text) => Shape::Text(text),
        RawShape::List(items) => {
            let items = items.into_iter().map(|raw| node(raw, source, diagnostics));
            Shape::List(items.collect())
        }
        RawShape::Map(pairs) => {
            let mut entries: Vec<Entry> = Vec::with_capacity(pairs.len());
            for (key, raw) in pairs {
                let key_span = place(&key.referenced, source);
                let value = node(raw, source, diagnostics);
                let Some(first) = entries.iter().find(|e| e.key == key.value) else {
                    entries.push(Entry { key: key.value, key_span, value });
                    continue;
                };
                let (line, column) = source.position(first.key_span.start);
                let message = format!("duplicate key `{}`", key.value);
                let label = format!("it stands first at {line}:{column}");
                diagnostics.push(Diagnostic::error(key_span, message, label));
            }
            Shape::Map(entries)
        }
    };
    if !aliased {
        span = around(&shape, span, source);
    }
    Node { shape, span }
}

/// The parser knows where a map or list starts; it ends with its last child, or with the bracket
/// that follows that.
fn around(shape: &Shape, start: Span, source: &Source) -> Span {
    let (ends, close): (Vec<usize>, _) = match shape {
        Shape::List(items) => (items.iter().map(|n| n.span.end).collect(), ']'),
        Shape::Map(es) => (es.iter().map(|e| e.value.span.end.max(e.key_span.end)).collect(), '}'),
        _ => return start,
    };
    let end = ends.into_iter().max().unwrap_or(start.end).max(start.end);
    let opened = source.text[start.start..].starts_with(if close == ']' { '[' } else { '{' });
    if opened && !source.text[start.start..end].ends_with(close) || end == start.start + 1 {
        let rest = &source.text[end..];
        let closing = rest.find(|c: char| !c.is_whitespace() && c != ',');
        if let Some(at) = closing.filter(|&at| rest[at..].starts_with(close)) {
            return Span::new(start.start, end + at + 1);
        }
    }
    Span::new(start.start, end)
}

impl<'de> Deserialize<'de> for RawShape {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        d.deserialize_any(ShapeVisitor)
    }
}

struct ShapeVisitor;

impl<'de> Visitor<'de> for ShapeVisitor {
    type Value = RawShape;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }
    fn visit_unit<E>(self) -> Result<RawShape, E> {
        Ok(RawShape::Null)
    }
    fn visit_none<E>(self) -> Result<RawShape, E> {
        Ok(RawShape::Null)
    }
    fn visit_some<D: Deserializer<'de>>(self, d: D) -> Result<RawShape, D::Error> {
        d.deserialize_any(self)
    }
    fn visit_bool<E>(self, b: bool) -> Result<RawShape, E> {
        Ok(RawShape::Bool(b))
    }
    fn visit_i64<E>(self, n: i64) -> Result<RawShape, E> {
        Ok(RawShape::Int(n.into()))
    }
    fn visit_u64<E>(self, n: u64) -> Result<RawShape, E> {
        Ok(RawShape::Int(n.into()))
    }
    fn visit_f64<E>(self, x: f64) -> Result<RawShape, E> {
        Ok(RawShape::Float(x))
    }
    fn visit_str<E>(self, text: &str) -> Result<RawShape, E> {
        Ok(RawShape::Text(text.to_owned()))
    }
    fn visit_string<E>(self, text: String) -> Result<RawShape, E> {
        Ok(RawShape::Text(text))
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<RawShape, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            items.push(item);
        }
        Ok(RawShape::List(items))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawShape, A::Error> {
        let mut pairs = Vec::new();
        while let Some(pair) = map.next_entry()? {
            pairs.push(pair);
        }
        Ok(RawShape::Map(pairs))
    }
}

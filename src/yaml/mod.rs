//! YAML as a tree in which every node knows its place.
//!
//! The parser is serde-saphyr; nothing outside this room sees it. Rules on top of YAML 1.2:
//! only `true` and `false` are booleans (`no` stays text), `010` and `1_000` stay text, numbers
//! are 64-bit integers or finite floats, keys are text, and a key stands once in a map.

mod read;

use serde_json::{Map, Number, Value};

use crate::source::{Diagnostic, Source, Span};

/// A value with its place.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// The value.
    pub shape: Shape,
    /// Where it stands; a map or list reaches from its first to its last child.
    pub span: Span,
}

/// What a [`Node`] is.
#[derive(Debug, Clone, PartialEq)]
pub enum Shape {
    /// `null`, `~` or nothing.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// A 64-bit integer or a finite float.
    Number(Number),
    /// Text.
    Text(String),
    /// A list.
    List(Vec<Node>),
    /// A map, in the order in which it was written.
    Map(Vec<Entry>),
}

/// A key of a map with its value.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// The key.
    pub key: String,
    /// Where the key stands.
    pub key_span: Span,
    /// The value.
    pub value: Node,
}

impl Node {
    /// A node from its parts.
    pub fn new(shape: Shape, span: Span) -> Self {
        Self { shape, span }
    }

    /// A JSON value of which every part stands at the same place.
    pub fn from_value(value: &Value, span: Span) -> Self {
        let shape = match value {
            Value::Null => Shape::Null,
            Value::Bool(b) => Shape::Bool(*b),
            Value::Number(n) => Shape::Number(n.clone()),
            Value::String(s) => Shape::Text(s.clone()),
            Value::Array(items) => {
                Shape::List(items.iter().map(|v| Self::from_value(v, span)).collect())
            }
            Value::Object(map) => {
                let entries = map.iter().map(|(key, v)| Entry {
                    key: key.clone(),
                    key_span: span,
                    value: Self::from_value(v, span),
                });
                Shape::Map(entries.collect())
            }
        };
        Self { shape, span }
    }

    /// The same value, every part of it at another place.
    #[must_use]
    pub fn moved_to(mut self, span: Span) -> Self {
        self.span = span;
        match &mut self.shape {
            Shape::List(items) => {
                for item in items {
                    *item = std::mem::replace(item, Self::new(Shape::Null, span)).moved_to(span);
                }
            }
            Shape::Map(entries) => {
                for entry in entries {
                    entry.key_span = span;
                    let null = Self::new(Shape::Null, span);
                    entry.value = std::mem::replace(&mut entry.value, null).moved_to(span);
                }
            }
            _ => {}
        }
        self
    }

    /// The plain value, without places.
    pub fn to_value(&self) -> Value {
        match &self.shape {
            Shape::Null => Value::Null,
            Shape::Bool(b) => Value::Bool(*b),
            Shape::Number(n) => Value::Number(n.clone()),
            Shape::Text(s) => Value::String(s.clone()),
            Shape::List(items) => Value::Array(items.iter().map(Self::to_value).collect()),
            Shape::Map(entries) => {
                let pairs = entries.iter().map(|e| (e.key.clone(), e.value.to_value()));
                Value::Object(pairs.collect::<Map<_, _>>())
            }
        }
    }

    /// Its entries, if it is a map.
    pub fn as_map(&self) -> Option<&[Entry]> {
        match &self.shape {
            Shape::Map(entries) => Some(entries),
            _ => None,
        }
    }

    /// Its items, if it is a list.
    pub fn as_list(&self) -> Option<&[Node]> {
        match &self.shape {
            Shape::List(items) => Some(items),
            _ => None,
        }
    }

    /// Its text, if it is text.
    pub fn as_text(&self) -> Option<&str> {
        match &self.shape {
            Shape::Text(text) => Some(text),
            _ => None,
        }
    }

    /// The entry under a key, if it is a map that has it.
    pub fn entry(&self, key: &str) -> Option<&Entry> {
        self.as_map()?.iter().find(|e| e.key == key)
    }

    /// The value under a key, if it is a map that has it.
    pub fn get(&self, key: &str) -> Option<&Node> {
        self.entry(key).map(|e| &e.value)
    }

    /// What it is, in the words of a message: `a list`, `the text "x"`, `the number 3`.
    pub fn describe(&self) -> String {
        match &self.shape {
            Shape::Null => "nothing".into(),
            Shape::Bool(b) => format!("`{b}`"),
            Shape::Number(n) => format!("the number {n}"),
            Shape::Text(s) if s.chars().count() <= 40 => format!("the text `{s}`"),
            Shape::Text(_) => "text".into(),
            Shape::List(_) => "a list".into(),
            Shape::Map(_) => "a map".into(),
        }
    }
}

/// Parses a text.
///
/// # Errors
/// With everything that is wrong: a syntax error at its line and column, else all duplicate keys
/// and numbers that are not finite.
pub fn parse(source: &Source) -> Result<Node, Vec<Diagnostic>> {
    match read(source) {
        (Some(node), diagnostics) if diagnostics.is_empty() => Ok(node),
        (_, diagnostics) => Err(diagnostics),
    }
}

/// Parses a text as far as possible: the tree (absent after a syntax error; of duplicate keys the
/// first is kept), and all that is wrong with it.
pub fn read(source: &Source) -> (Option<Node>, Vec<Diagnostic>) {
    read::read(source)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(text: &str) -> Value {
        parse(&Source::new("t", text)).unwrap_or_else(|d| panic!("{text}: {d:?}")).to_value()
    }

    fn errors(text: &str) -> Vec<String> {
        let source = Source::new("t", text);
        let diagnostics = parse(&source).expect_err(text);
        let line = |d: &Diagnostic| {
            let (line, column) = source.position(d.span.start);
            format!("{line}:{column} {}", d.message)
        };
        diagnostics.iter().map(line).collect()
    }

    #[test]
    fn scalars_are_what_they_look_like() {
        let text = "[no, yes, on, true, 010, 1_000, 0x10, 1, -1, 1.0, 'x', \"1e-4\", ~, null, '']";
        assert_eq!(
            value(text),
            serde_json::json!([
                "no", "yes", "on", true, "010", "1_000", 16, 1, -1, 1.0, "x", "1e-4", null, null,
                ""
            ])
        );
        assert_eq!(
            value("[1e-4, 1E-4, 1.0e-4, 0.0001]"),
            serde_json::json!([1e-4, 1e-4, 1e-4, 1e-4])
        );
        assert_eq!(
            value("{0: a, 1.50: b, true: c}"),
            serde_json::json!({"0":"a","1.50":"b","true":"c"})
        );
    }

    #[test]
    fn anchors_and_merge_keys() {
        let text = "a: &a {x: 1, y: 2}\nb: *a\nc: {<<: *a, y: 3}\n";
        let expected = serde_json::json!({
            "a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 2}, "c": {"x": 1, "y": 3}
        });
        assert_eq!(value(text), expected);
    }

    #[test]
    fn refused() {
        assert_eq!(errors("a: .nan"), ["1:4 `.nan` is not a finite number"]);
        assert_eq!(errors("a: 1e400"), ["1:4 `1e400` is not a finite number"]);
        assert_eq!(
            errors("é: 1\nb: 2\né: 3\nc: {d: 1, d: 2}\n"),
            ["3:1 duplicate key `é`", "4:11 duplicate key `d`"]
        );
        assert_eq!(errors("a: [1"), ["1:4 not valid YAML: unclosed bracket '['"]);
        for text in ["a: b: c", "a: 'x", "--- 1\n--- 2\n", "a: *b", "? [a]\n: b", "? {a: 1}\n: b"] {
            let found = errors(text);
            assert!(found[0].contains("not valid YAML: "), "{found:?}");
            assert!(!found[0].contains("line"), "{found:?}");
        }
        assert!(errors(&"[".repeat(500))[0].contains("not valid YAML"));
    }

    #[test]
    fn places_after_other_scripts() {
        let source =
            Source::new("t", "ключ: 'é'\nlist:\n  - ä: {b: 1}\n    c: [2, 3]\nz: |\n  text\n");
        let node = parse(&source).unwrap();
        let at = |n: &Node| &source.text[n.span.start..n.span.end];
        assert_eq!(at(node.get("ключ").unwrap()), "'é'");
        let list = node.get("list").unwrap();
        let item = &list.as_list().unwrap()[0];
        assert_eq!(at(list), "- ä: {b: 1}\n    c: [2, 3]");
        assert_eq!(at(item), "ä: {b: 1}\n    c: [2, 3]");
        assert_eq!(at(item.get("ä").unwrap()), "{b: 1}");
        assert_eq!(at(item.get("ä").unwrap().get("b").unwrap()), "1");
        assert_eq!(at(item.get("c").unwrap()), "[2, 3]");
        let key = item.entry("c").unwrap().key_span;
        assert_eq!(&source.text[key.start..key.end], "c");
    }
}

//! The values that templates read.

use std::collections::BTreeMap;
use std::path::Path;

use super::template::Name;
use crate::import::ImportError;
use crate::source::{Fault, Source, Span, suggest};
use crate::yaml::{self, Entry, Node, Shape};

/// Values by name, with DVC's rules of merging.
#[derive(Debug, Clone, Default)]
pub(super) struct Values {
    entries: Vec<Entry>,
    /// Names that only one stage sees: no parameters of the pipeline.
    local: Vec<String>,
    /// Axes of a matrix that a pipeline's sweep can have too.
    axes: Vec<String>,
    /// Files that were read, and the keys that were taken if not all.
    read: BTreeMap<String, Option<Vec<String>>>,
    /// How a map becomes arguments.
    pub(super) style: Style,
}

/// `parsing` of DVC's configuration.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Style {
    /// `--no-x` for false.
    pub(super) negated: bool,
    /// `--x 1 --x 2` for a list.
    pub(super) repeated: bool,
}

/// What a reference leads to.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) node: Node,
    pub(super) name: Option<Name>,
}

impl Values {
    /// Adds values; maps are merged.
    ///
    /// # Errors
    /// With a name that has another value already.
    pub(super) fn merge(&mut self, new: &[Entry]) -> Result<(), String> {
        merge(&mut self.entries, new)
    }

    /// As [`merge`](Self::merge), for one stage only.
    ///
    /// # Errors
    /// See there.
    pub(super) fn merge_local(&mut self, new: &[Entry]) -> Result<(), String> {
        self.local.extend(new.iter().map(|e| e.key.clone()));
        self.merge(new)
    }

    /// Sets a name for one stage, whatever it was.
    pub(super) fn set(&mut self, name: &str, value: Node) {
        self.entries.retain(|e| e.key != name);
        let key_span = value.span;
        self.entries.push(Entry { key: name.to_owned(), key_span, value });
        self.local.push(name.to_owned());
    }

    /// `item.axis` may stay a reference.
    pub(super) fn set_axes(&mut self, axes: Vec<String>) {
        self.axes = axes;
    }

    /// Reads `path` or `path:key,key`, a file below a folder.
    ///
    /// # Errors
    /// With a message, or with what is wrong in the file.
    pub(super) fn read(&mut self, dir: &Path, item: &str, local: bool) -> Result<(), ReadError> {
        let (path, keys) = item.split_once(':').unwrap_or((item, ""));
        let keys: Vec<String> =
            keys.split(',').filter(|k| !k.is_empty()).map(str::to_owned).collect();
        let keys = (!keys.is_empty()).then_some(keys);
        match (self.read.get(path), &keys) {
            (None, _) => {}
            (Some(None), None) => return Ok(()),
            (Some(None), Some(_)) => {
                let message = format!("`{path}` is read as a whole already");
                return Err(ReadError::Message(message));
            }
            (Some(Some(known)), Some(keys)) if keys.iter().all(|k| !known.contains(k)) => {}
            _ => return Err(ReadError::Message(format!("`{path}` is read in part already"))),
        }
        let file = dir.join(path);
        let known = ["yaml", "yml", "json"];
        let ending = file.extension().and_then(|e| e.to_str()).unwrap_or_default();
        if !known.contains(&ending) {
            let message = format!("`{path}`: values can be read from YAML and JSON only");
            return Err(ReadError::Message(message));
        }
        let text = std::fs::read_to_string(&file).map_err(|e| {
            let fault = Fault::new(format!("cannot read {}", file.display())).cause(e);
            ReadError::Import(ImportError::Unread(fault.into()))
        })?;
        let source = Source::new(file.display().to_string(), text);
        let node = yaml::parse(&source)
            .map_err(|wrong| ReadError::Import(ImportError::Refused(source.clone(), wrong)))?;
        let node = numbers(node, &source);
        let entries = match &node.shape {
            Shape::Map(entries) => entries.as_slice(),
            Shape::Null => &[],
            _ => {
                let message = format!("`{path}` holds {}, not a map", node.describe());
                return Err(ReadError::Message(message));
            }
        };
        let mut chosen: Vec<Entry> = entries.to_vec();
        if let Some(keys) = &keys {
            if let Some(key) = keys.iter().find(|k| node.get(k).is_none()) {
                return Err(ReadError::Message(format!("`{path}` has no `{key}`")));
            }
            chosen.retain(|e| keys.contains(&e.key));
        }
        let merged = if local { self.merge_local(&chosen) } else { self.merge(&chosen) };
        merged.map_err(ReadError::Message)?;
        match (self.read.get_mut(path), keys) {
            (Some(Some(known)), Some(keys)) => known.extend(keys),
            (_, keys) => {
                self.read.insert(path.to_owned(), keys);
            }
        }
        Ok(())
    }

    /// What a path leads to.
    ///
    /// # Errors
    /// With the nearest name, if it leads nowhere.
    pub(super) fn get(&self, inner: &str) -> Result<Found, Option<String>> {
        let path = inner.replace('[', ".").replace(']', "");
        let names: Vec<&str> = path.split('.').map(str::trim).collect();
        let top = Node::new(Shape::Map(self.entries.clone()), Span::default());
        let mut node = &top;
        let mut listed = false;
        for name in &names {
            node = match &node.shape {
                Shape::Map(entries) => {
                    let found = entries.iter().find(|e| e.key == *name).map(|e| &e.value);
                    let known: Vec<&str> = entries.iter().map(|e| e.key.as_str()).collect();
                    found.ok_or_else(|| suggest(name, &known))?
                }
                Shape::List(items) => {
                    listed = true;
                    let index = name.parse::<usize>().ok().and_then(|i| items.get(i));
                    index.ok_or_else(|| Some(format!("the list has {} items", items.len())))?
                }
                _ => return Err(None),
            };
        }
        let is_name = |n: &&str| {
            let fits = |c: char| c.is_alphanumeric() || c == '_' || c == '-';
            !n.is_empty() && n.chars().all(fits)
        };
        let scalar = own_text(node).is_some_and(|text| text == python_text(node));
        let name = match names.as_slice() {
            _ if !scalar || listed => None,
            ["item", axis] if self.axes.iter().any(|a| a == axis) => {
                Some(Name::Axis((*axis).to_owned()))
            }
            [top, ..] if self.local.iter().any(|l| l == top) => None,
            names if names.iter().all(is_name) => Some(Name::Param(names.join("."))),
            _ => None,
        };
        Ok(Found { node: node.clone(), name })
    }

    /// The value of a parameter by path, as [`get`](Self::get) gave it.
    pub(super) fn param(&self, path: &str) -> Option<Node> {
        self.get(path).ok().map(|found| found.node)
    }

    /// A map as arguments of a command: `--name value`, flags for booleans.
    ///
    /// # Errors
    /// When a list in it holds lists.
    pub(super) fn arguments(&self, node: &Node) -> Result<String, String> {
        let mut flat = Vec::new();
        flatten(node, "", &mut flat);
        let mut words: Vec<String> = Vec::new();
        for (key, value) in flat {
            match &value.shape {
                Shape::Bool(true) => words.push(format!("--{key}")),
                Shape::Bool(false) if self.style.negated => words.push(format!("--no-{key}")),
                Shape::Bool(false) => {}
                Shape::List(items) => {
                    for (i, item) in items.iter().enumerate() {
                        let word = match &item.shape {
                            Shape::Text(text) => quoted(text),
                            Shape::List(_) | Shape::Map(_) => {
                                return Err(format!("`{key}` is a list of lists or maps"));
                            }
                            // As Python's own `str` has it.
                            Shape::Bool(b) => if *b { "True" } else { "False" }.to_owned(),
                            _ => python_text(item),
                        };
                        if i == 0 || self.style.repeated {
                            words.push(format!("--{key}"));
                        }
                        words.push(word);
                    }
                }
                Shape::Text(text) => words.push(format!("--{key} {}", quoted(text))),
                _ => words.push(format!("--{key} {}", python_text(value))),
            }
        }
        Ok(words.join(" "))
    }
}

/// Why a file of values could not be taken.
pub(super) enum ReadError {
    /// To be said where the file is named.
    Message(String),
    /// The file itself.
    Import(ImportError),
}

fn merge(into: &mut Vec<Entry>, new: &[Entry]) -> Result<(), String> {
    for entry in new {
        match into.iter_mut().find(|e| e.key == entry.key) {
            None => into.push(entry.clone()),
            Some(old) => match (&mut old.value.shape, &entry.value.shape) {
                (Shape::Map(old), Shape::Map(new)) => merge(old, new)?,
                _ => return Err(format!("`{}` has a value already", entry.key)),
            },
        }
    }
    Ok(())
}

/// DVC's YAML reads `010` and `1_000` as numbers, which are text here.
pub(super) fn numbers(node: Node, source: &Source) -> Node {
    let span = node.span;
    let shape = match node.shape {
        Shape::Text(text) => {
            let plain = source.text.get(span.start..span.end) == Some(text.as_str());
            let digits = text.strip_prefix(['-', '+']).unwrap_or(&text);
            let number = digits.starts_with(|c: char| c.is_ascii_digit())
                && digits.chars().all(|c| c.is_ascii_digit() || c == '_');
            match text.replace('_', "").trim_start_matches('+').parse::<i64>() {
                Ok(n) if plain && number => Shape::Number(n.into()),
                _ => Shape::Text(text),
            }
        }
        Shape::List(items) => Shape::List(items.into_iter().map(|n| numbers(n, source)).collect()),
        Shape::Map(entries) => {
            let entries = entries
                .into_iter()
                .map(|entry| Entry { value: numbers(entry.value, source), ..entry });
            Shape::Map(entries.collect())
        }
        plain => plain,
    };
    Node { shape, span }
}

/// A scalar as DVC writes it into a text: as Python's `str`, but for booleans.
pub(super) fn python_text(node: &Node) -> String {
    match &node.shape {
        Shape::Null => "None".to_owned(),
        Shape::Bool(b) => b.to_string(),
        Shape::Text(text) => text.clone(),
        Shape::Number(n) if n.is_f64() => n.as_f64().map_or_else(|| n.to_string(), python_float),
        Shape::Number(n) => n.to_string(),
        Shape::List(_) | Shape::Map(_) => node.to_value().to_string(),
    }
}

/// A scalar as a pipeline writes it into a text.
fn own_text(node: &Node) -> Option<String> {
    match &node.shape {
        Shape::Bool(b) => Some(b.to_string()),
        Shape::Text(text) => Some(text.clone()),
        Shape::Number(n) => Some(n.to_string()),
        _ => None,
    }
}

/// `repr` of Python: the shortest digits that read back, with an exponent below 1e-4 and from 1e16.
fn python_float(x: f64) -> String {
    let shown = format!("{x:e}");
    let (digits, exponent) = shown.split_once('e').unwrap_or((&shown, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if x == 0.0 || (-4..16).contains(&exponent) {
        return format!("{x:?}");
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

fn flatten<'n>(node: &'n Node, prefix: &str, out: &mut Vec<(String, &'n Node)>) {
    for entry in node.as_map().unwrap_or_default() {
        let key = format!("{prefix}{}", entry.key);
        match &entry.value.shape {
            Shape::Map(inner) if !inner.is_empty() => {
                flatten(&entry.value, &format!("{key}."), out);
            }
            Shape::Map(_) => {}
            _ => out.push((key, &entry.value)),
        }
    }
}

/// As Python's `shlex.quote`.
fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_@%+=:,./-".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', "'\"'\"'"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_written_as_python_writes_them() {
        for (x, text) in [
            (0.1, "0.1"),
            (1.0, "1.0"),
            (1e-4, "0.0001"),
            (1e-5, "1e-05"),
            (1.5e-7, "1.5e-07"),
            (123_456.75, "123456.75"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (-2.5e300, "-2.5e+300"),
            (0.0, "0.0"),
        ] {
            assert_eq!(python_float(x), text);
        }
    }

    #[test]
    fn numbers_of_dvcs_yaml() {
        let source = Source::new("t", "a: 010\nb: '010'\nc: 1_000\nd: v_1\ne: -07\n");
        let node = numbers(yaml::parse(&source).unwrap(), &source);
        let expected = serde_json::json!({"a": 10, "b": "010", "c": 1000, "d": "v_1", "e": -7});
        assert_eq!(node.to_value(), expected);
    }
}

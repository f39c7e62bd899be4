//! Why a key is new: the typed difference between two pre-images.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::digest::Digest;

/// One field that differs between two pre-images.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Change {
    /// Path in the pre-image (`with.max_length`, `env.SEED`), or the input's name and port
    /// (`data.train`) where [`Change::input`] is set.
    pub path: String,
    /// Before; absent if there was none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub old: Option<Value>,
    /// Now; absent if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new: Option<Value>,
    /// It is the content of an input or of a file.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub input: bool,
    /// The step that the input comes from, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// Where that step ran in this run: what began it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Since>,
}

/// The first step of a chain of steps that ran because one before them gave other bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Since {
    /// The instance.
    pub step: String,
    /// Why it ran (`with.template "a" -> "b"`, `first time`).
    pub because: String,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.input {
            let what = match (&self.old, &self.new) {
                (None, Some(_)) => "is new",
                (Some(_), None) => "is gone",
                _ => "changed",
            };
            write!(f, "input {} {what}", self.path)?;
            return match (&self.from, &self.since) {
                (None, _) => Ok(()),
                (Some(step), None) => write!(f, " (from step {step})"),
                (Some(step), Some(since)) if *step == since.step => {
                    write!(f, " (from step {step}, which ran: {})", since.because)
                }
                (Some(step), Some(Since { step: first, because })) => {
                    write!(f, " (from step {step}, after {first} ran: {because})")
                }
            };
        }
        let text = |v: &Option<Value>| match v {
            None => "(absent)".to_owned(),
            Some(v) => shorten(&v.to_string()),
        };
        write!(f, "{} {} -> {}", self.path, text(&self.old), text(&self.new))
    }
}

fn shorten(text: &str) -> String {
    const LONGEST: usize = 60;
    if text.chars().count() <= LONGEST {
        return text.to_owned();
    }
    let (head, tail): (String, Vec<char>) =
        (text.chars().take(LONGEST / 2).collect(), text.chars().rev().take(LONGEST / 4).collect());
    format!("{head}…{}", tail.iter().rev().collect::<String>())
}

/// Why a step is not a hit.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "because", rename_all = "snake_case")]
pub enum Why {
    /// Nothing comparable was ever run.
    FirstTime,
    /// Its key differs from the nearest earlier one.
    Changed {
        /// What differs.
        changes: Vec<Change>,
        /// Fields that the key has now.
        of_fields: usize,
        /// The nearest earlier key.
        nearest: Digest,
        /// Its run.
        run: String,
        /// Its instance, where that is another one.
        step: Option<String>,
        /// Seconds since it was made.
        age_seconds: u64,
    },
    /// The record stands, but some of its output is gone.
    LostOutput {
        /// What is gone.
        reason: String,
    },
    /// The record is damaged.
    Corrupt {
        /// In what way.
        reason: String,
    },
    /// The user asked for it.
    Forced,
}

impl Why {
    /// What began the chain of steps that a step of this name ends, if it ran for this reason.
    pub(super) fn since(&self, step: &str) -> Since {
        let because = match self {
            Self::Changed { changes, .. } => {
                let own = changes.iter().find(|c| !c.input);
                if let (None, Some(since)) = (own, changes.iter().find_map(|c| c.since.clone())) {
                    return since;
                }
                own.or(changes.first()).map_or_else(|| "its key is new".into(), Change::to_string)
            }
            plain => plain.to_string(),
        };
        Since { step: step.to_owned(), because }
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FirstTime => f.write_str("first time"),
            Self::LostOutput { reason } => write!(f, "its output is lost: {reason}"),
            Self::Corrupt { reason } => write!(f, "its record is damaged: {reason}"),
            Self::Forced => f.write_str("forced"),
            Self::Changed { changes, of_fields, run, step, age_seconds, .. } => {
                const SHOWN: usize = 3;
                let lines = lines(changes);
                for line in lines.iter().take(SHOWN) {
                    write!(f, "{line}; ")?;
                }
                if lines.len() > SHOWN {
                    write!(f, "and {} more; ", lines.len() - SHOWN)?;
                }
                let fields = if *of_fields == 1 { "field" } else { "fields" };
                write!(f, "{} of {of_fields} {fields}; nearest ", changes.len())?;
                if let Some(step) = step {
                    write!(f, "{step} in ")?;
                }
                write!(f, "run {run}, {} ago", age(*age_seconds))
            }
        }
    }
}

/// Changes as people read them: the step's own first, and the ports of one input together.
fn lines(changes: &[Change]) -> Vec<String> {
    let own = changes.iter().filter(|c| !c.input).map(ToString::to_string);
    let mut lines: Vec<String> = own.collect();
    let mut inputs: Vec<(&str, Vec<&Change>)> = Vec::new();
    for change in changes.iter().filter(|c| c.input) {
        let name = change.path.rsplit_once('.').map_or(change.path.as_str(), |(name, _)| name);
        match inputs.last_mut() {
            Some((last, ports)) if *last == name && ports[0].from == change.from => {
                ports.push(change);
            }
            _ => inputs.push((name, vec![change])),
        }
    }
    for (name, ports) in inputs {
        let is_alike = |c: &&Change| c.old.is_some() == ports[0].old.is_some();
        let one = (ports.len() > 1 && ports.iter().all(is_alike))
            .then(|| Change { path: name.to_owned(), ..ports[0].clone() });
        match one {
            Some(all) => lines.push(all.to_string()),
            None => lines.extend(ports.iter().map(ToString::to_string)),
        }
    }
    lines
}

fn age(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86400),
    }
}

/// A leaf of a flattened pre-image.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Leaf {
    pub(super) value: Value,
    input: bool,
    /// Path of the `$input` that it belongs to.
    edge: Option<String>,
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

fn flatten(path: &str, value: &Value, out: &mut BTreeMap<String, Leaf>) {
    let leaf = |value: &Value| Leaf { value: value.clone(), input: false, edge: None };
    match value {
        Value::Object(map) if map.len() == 1 && map.contains_key("$input") => {
            flatten_input(path, &map["$input"], out);
        }
        Value::Object(map) if map.len() == 1 && map.contains_key("$file") => {
            let digest = &map["$file"]["digest"];
            out.insert(
                path.to_owned(),
                Leaf { value: digest.clone(), input: true, edge: Some(path.to_owned()) },
            );
        }
        Value::Object(map) if map.len() == 1 && map.contains_key("$gather") => {
            let members = map["$gather"].as_array();
            // A missing member is one change, not one per port.
            for member in members.into_iter().flatten() {
                flatten_input(&member_path(path, &member["point"]), &member["input"], out);
            }
        }
        Value::Object(map) if map.len() == 1 && map.contains_key("$text") => {
            flatten(path, &map["$text"], out);
        }
        Value::Object(map) if !map.is_empty() => {
            for (name, value) in map {
                flatten(&join(path, name), value, out);
            }
        }
        Value::Array(items) if items.iter().any(|v| v.is_object() || v.is_array()) => {
            for (i, value) in items.iter().enumerate() {
                flatten(&format!("{path}[{i}]"), value, out);
            }
        }
        plain => {
            out.insert(path.to_owned(), leaf(plain));
        }
    }
}

/// The name of a gather's member, `among@lora.r=8`.
pub(crate) fn member_path(path: &str, point: &Value) -> String {
    let coordinates = point.as_object().into_iter().flatten().map(|(axis, value)| {
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        format!("{axis}={value}")
    });
    format!("{path}@{}", coordinates.collect::<Vec<_>>().join(","))
}

fn flatten_input(path: &str, binding: &Value, out: &mut BTreeMap<String, Leaf>) {
    let edge = Some(path.to_owned());
    let ports = binding["ports"].as_object();
    for (port, digest) in ports.into_iter().flatten() {
        let leaf = Leaf { value: digest.clone(), input: true, edge: edge.clone() };
        out.insert(join(path, port), leaf);
    }
    if let Some(ty) = binding.get("type") {
        let leaf = Leaf { value: ty.clone(), input: true, edge: edge.clone() };
        out.insert(join(path, "type"), leaf);
    }
    if let Some(facts) = binding.get("facts").filter(|f| !f.is_null()) {
        let leaf = Leaf { value: facts.clone(), input: true, edge };
        out.insert(join(path, "record"), leaf);
    }
}

/// The fields of a pre-image, by path.
pub(super) fn leaves(preimage: &Value) -> BTreeMap<String, Leaf> {
    let mut out = BTreeMap::new();
    flatten("", preimage, &mut out);
    // An empty `env` and an absent `salt` are no fields.
    let empty = |v: &Value| v.is_null() || v.as_object().is_some_and(serde_json::Map::is_empty);
    out.retain(|path, leaf| path.starts_with("with.") || !empty(&leaf.value));
    out
}

/// The typed difference between two pre-images, field by field, sorted by path. `sources` names
/// the step behind each input of the new one, by path (`with.data`).
pub fn difference(old: &Value, new: &Value, sources: &BTreeMap<String, String>) -> Vec<Change> {
    let (old, new) = (leaves(old), leaves(new));
    let paths: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    let mut changes = Vec::new();
    for path in paths {
        let (a, b) = (old.get(path), new.get(path));
        if a.map(|l| &l.value) == b.map(|l| &l.value) {
            continue;
        }
        let leaf = b.or(a);
        let input = leaf.is_some_and(|l| l.input);
        let edge = leaf.and_then(|l| l.edge.as_ref());
        let shown = if input { path.strip_prefix("with.").unwrap_or(path) } else { path };
        changes.push(Change {
            path: shown.to_owned(),
            old: a.map(|l| l.value.clone()),
            new: b.map(|l| l.value.clone()),
            input,
            from: edge.and_then(|e| sources.get(e)).cloned(),
            since: None,
        });
    }
    changes
}

/// Fields that either of two pre-images has.
pub(super) fn fields(old: &Value, new: &Value) -> usize {
    let (mut all, new) = (leaves(old), leaves(new));
    all.extend(new);
    all.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn changes_are_typed_and_named() {
        let old = json!({
            "kind": "tokenize",
            "with": { "max_length": 512, "lora": { "r": 8 }, "gone": true,
                "data": { "$input": {
                    "type": "prompts", "ports": { "train": "aa", "test": "bb" } } },
                "file": { "$file": { "digest": "cc" } } },
            "env": {}, "salt": null });
        let new = json!({
            "kind": "tokenize",
            "with": { "max_length": 256, "lora": { "r": 8 },
                "data": { "$input": {
                    "type": "prompts", "ports": { "train": "ax", "test": "bb" } } },
                "file": { "$file": { "digest": "cx" } } },
            "env": { "SEED": "1" }, "salt": null });
        let sources = BTreeMap::from([("with.data".to_owned(), "prompts".to_owned())]);
        let lines: Vec<String> =
            difference(&old, &new, &sources).iter().map(ToString::to_string).collect();
        assert_eq!(
            lines,
            [
                "env.SEED (absent) -> \"1\"",
                "input data.train changed (from step prompts)",
                "input file changed",
                "with.gone true -> (absent)",
                "with.max_length 512 -> 256",
            ]
        );
        assert!(difference(&new, &new, &sources).is_empty());
    }

    #[test]
    fn members_of_a_gather_are_named_by_their_point() {
        let gather = |points: &[(i32, &str)]| {
            let members: Vec<Value> = points
                .iter()
                .map(|(r, d)| {
                    let input = json!({"type": "report", "ports": {"report": d}});
                    json!({"point": {"r": r}, "input": input})
                })
                .collect();
            json!({ "with": { "scores": { "$gather": members } } })
        };
        let sources = BTreeMap::from([("with.scores@r=16".to_owned(), "score@r=16".to_owned())]);
        let changes = difference(&gather(&[(8, "a")]), &gather(&[(8, "a"), (16, "b")]), &sources);
        assert_eq!(lines(&changes), ["input scores@r=16 is new (from step score@r=16)"]);
    }

    #[test]
    fn ports_of_one_input_are_one_line() {
        let input = |digest: &str| {
            let ports = json!({ "config": digest, "weights": digest });
            json!({ "with": { "model": { "$input": { "type": "model", "ports": ports } },
                "r": digest.len() } })
        };
        let sources = BTreeMap::from([("with.model".to_owned(), "base".to_owned())]);
        let changes = difference(&input("a"), &input("bb"), &sources);
        assert_eq!(changes.len(), 3);
        assert_eq!(lines(&changes), ["with.r 1 -> 2", "input model changed (from step base)"]);
        let changes = difference(&json!({ "with": { "r": 2 } }), &input("bb"), &sources);
        assert_eq!(lines(&changes), ["input model is new (from step base)"]);
    }

    #[test]
    fn a_chain_names_what_began_it() {
        let change = |input: bool, since: Option<Since>| Change {
            path: if input { "data.train".into() } else { "with.template".into() },
            old: Some(json!("a")),
            new: Some(json!("b")),
            input,
            from: input.then(|| "tokens".to_owned()),
            since,
        };
        let why = |change: Change| Why::Changed {
            changes: vec![change],
            of_fields: 4,
            nearest: Digest::of(b""),
            run: "r".into(),
            step: None,
            age_seconds: 0,
        };
        let first = why(change(false, None)).since("prompts");
        assert_eq!(first.because, "with.template \"a\" -> \"b\"");
        // Through any number of steps it stays the same one.
        let second = why(change(true, Some(first.clone()))).since("tokens");
        assert_eq!(second, first);
        assert_eq!(
            change(true, Some(second)).to_string(),
            "input data.train changed (from step tokens, after prompts ran: \
             with.template \"a\" -> \"b\")"
        );
        let forced = Why::Forced.since("tokens");
        assert_eq!(
            change(true, Some(forced)).to_string(),
            "input data.train changed (from step tokens, which ran: forced)"
        );
    }

    #[test]
    fn one_line() {
        let change = Change {
            path: "with.max_length".into(),
            old: Some(json!(512)),
            new: Some(json!(256)),
            input: false,
            from: None,
            since: None,
        };
        let why = Why::Changed {
            changes: vec![change],
            of_fields: 14,
            nearest: Digest::of(b""),
            run: "20261124-033012-ab12".into(),
            step: None,
            age_seconds: 125,
        };
        let line = "with.max_length 512 -> 256; 1 of 14 fields; \
                    nearest run 20261124-033012-ab12, 2 min ago";
        assert_eq!(why.to_string(), line);
    }
}

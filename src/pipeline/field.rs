//! Parameters against their kind: every mistake of a step, not only serde's first.
//!
//! serde stops at the first mistake. Here it is noted, the value at its place is replaced by one
//! that parses (the field left out, or a value of the expected type), and the step is parsed
//! again, until it parses or nothing helps.

use serde_json::{Map, Value, json};

use super::reference::near;
use crate::artifact::Type;
use crate::step::{BadField, Kind, Ports, Step};

/// Stands for a value that could not be found out and has been reported elsewhere.
const UNKNOWN: &str = "$unknown";

/// A placeholder for a value that has been reported elsewhere.
pub(super) fn unknown() -> Value {
    json!({ UNKNOWN: null })
}

/// Something wrong at a path under `with`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wrong {
    /// Like `lora.r` or `columns[2]`; the whole if empty.
    pub(super) path: String,
    /// The field that is missing there, or unknown there.
    pub(super) field: Option<Field>,
    pub(super) message: String,
    pub(super) label: String,
    pub(super) help: Option<String>,
}

/// Which part of the place is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Field {
    /// The key of this name at the path.
    Unknown(String),
    /// Nothing is there to point at.
    Missing,
}

/// What parsing a step came to.
pub(super) struct Parsed {
    /// All mistakes.
    pub(super) wrong: Vec<Wrong>,
    /// The step as written, if nothing is wrong and nothing unknown.
    pub(super) step: Option<Box<dyn Step>>,
    /// What comes out, as far as it can be said in spite of mistakes.
    pub(super) ports: Option<Ports>,
}

/// Parses the parameters of a step.
pub(super) fn parse(kind: &Kind, with: &Value) -> Parsed {
    let mut value = with.clone();
    let mut wrong: Vec<Wrong> = Vec::new();
    // Paths that hold something made up here: what is wrong below them is nobody's mistake.
    let mut made_up: Vec<String> = Vec::new();
    let mut edges: Vec<String> = Vec::new();
    let mut step = None;
    // Each round mends one place, and there are no more places than these.
    for _ in 0..64 {
        let bad = match (kind.parse)(&value) {
            Ok(parsed) => {
                step = Some(parsed);
                break;
            }
            Err(bad) => bad,
        };
        let path = place(&bad);
        let invented = made_up.iter().any(|p| within(&path, p)) || is_unknown(&value, &path);
        if !invented {
            let words = words(kind, &value, &path);
            wrong.push(explain(&bad, &value, &words));
        }
        if let Some(name) = between(&bad.message, "unknown field `") {
            let parent = bad
                .path
                .strip_suffix(name.as_str())
                .map_or(bad.path.as_str(), |p| p.strip_suffix('.').unwrap_or(p));
            if !remove(&mut value, parent, &name) {
                break;
            }
            continue;
        }
        if !mend(kind, &mut value, &bad, &path, &mut edges) {
            break;
        }
        made_up.push(path);
    }
    let ports = step.as_ref().and_then(|step| settled(kind, &value, step.as_ref(), &edges));
    let clean = wrong.is_empty() && made_up.is_empty() && !holds_unknown(with);
    let ports = ports.map(|p| if clean { p } else { Ports { names: None, ..p } });
    Parsed { wrong, step: step.filter(|_| clean), ports }
}

/// What comes out, if that is the same whatever flows along the made-up edges.
fn settled(kind: &Kind, value: &Value, step: &dyn Step, edges: &[String]) -> Option<Ports> {
    let ports = step.ports();
    for path in edges {
        for ty in Type::ALL {
            let mut other = value.clone();
            let Some(place) = at(&mut other, path) else { continue };
            *place = if place.get("$gather").is_some() { gather(ty) } else { edge(ty) };
            if (kind.parse)(&other).is_ok_and(|s| s.ports().ty != ports.ty) {
                return None;
            }
        }
    }
    Some(ports)
}

fn edge(ty: Type) -> Value {
    json!({ "$input": { "type": ty } })
}

fn gather(ty: Type) -> Value {
    json!({ "$gather": { "members": [{ "point": {}, "input": { "type": ty } }] } })
}

/// The known words of a place, if it takes words: a word that is none makes an enum list its own.
fn words(kind: &Kind, value: &Value, path: &str) -> Vec<String> {
    let mut probe = value.clone();
    let asked = put(&mut probe, path, json!("")).then(|| (kind.parse)(&probe).err()).flatten();
    let asked = asked.filter(|e| place(e) == path && e.message.starts_with("unknown variant"));
    asked.map(|e| named(&e.message)).unwrap_or_default()
}

/// Replaces what is at a path by something that parses.
fn mend(
    kind: &Kind,
    value: &mut Value,
    bad: &BadField,
    path: &str,
    edges: &mut Vec<String>,
) -> bool {
    let words = words(kind, value, path);
    let mut candidates: Vec<Value> = words.into_iter().map(Value::String).collect();
    candidates.extend(Type::ALL.into_iter().flat_map(|ty| [edge(ty), gather(ty)]));
    let plain = [json!("x"), json!(1), json!(0.5), json!(true), json!([]), json!({}), json!(0)];
    candidates.extend(plain);
    let helps = |candidate: &Value| match (kind.parse)(candidate) {
        Ok(_) => true,
        // A made-up map may itself lack fields: that is progress.
        Err(next) => {
            let there = place(&next);
            there != path && !(within(path, &there) && next.message == bad.message)
        }
    };
    let missing = bad.message.starts_with("missing field");
    if !missing {
        let mut without = value.clone();
        let (parent, name) = path.rsplit_once('.').unwrap_or(("", path));
        if remove(&mut without, parent, name) && helps(&without) {
            *value = without;
            return true;
        }
    }
    for candidate in candidates {
        let mut with = value.clone();
        let is_edge = candidate.get("$input").or_else(|| candidate.get("$gather")).is_some();
        if !put(&mut with, path, candidate) {
            return false;
        }
        if helps(&with) {
            *value = with;
            if is_edge {
                edges.push(path.to_owned());
            }
            return true;
        }
    }
    false
}

/// The path of the value that is bad; for a missing field, the path it would have.
fn place(bad: &BadField) -> String {
    match between(&bad.message, "missing field `") {
        Some(name) if bad.path.is_empty() => name,
        Some(name) => format!("{}.{name}", bad.path),
        None => bad.path.clone(),
    }
}

fn within(path: &str, outer: &str) -> bool {
    path.strip_prefix(outer).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
}

/// The text after `start` up to the next backtick.
fn between(message: &str, start: &str) -> Option<String> {
    let rest = message.strip_prefix(start)?;
    Some(rest[..rest.find('`')?].to_owned())
}

/// Names in backticks after "expected", as serde lists fields and variants.
fn named(message: &str) -> Vec<String> {
    let is_list = message.starts_with("unknown variant") || message.starts_with("unknown field");
    let Some((_, list)) = message.split_once("expected").filter(|_| is_list) else {
        return Vec::new();
    };
    list.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// One step of a path.
enum Part<'a> {
    Key(&'a str),
    Index(usize),
}

/// The first part of a path, given the value it leads into: keys may contain dots.
fn first<'a>(value: &Value, path: &'a str) -> Option<(Part<'a>, &'a str)> {
    if path.is_empty() {
        return None;
    }
    if let Some(rest) = path.strip_prefix('[') {
        let (index, rest) = rest.split_once(']')?;
        return Some((Part::Index(index.parse().ok()?), rest.strip_prefix('.').unwrap_or(rest)));
    }
    let ends = |n: usize| path.len() == n || path[n..].starts_with(['.', '[']);
    let known = value.as_object().into_iter().flat_map(Map::keys);
    let longest =
        known.filter(|k| path.starts_with(k.as_str()) && ends(k.len())).map(String::len).max();
    let length = longest.unwrap_or_else(|| path.find(['.', '[']).unwrap_or(path.len()));
    let rest = &path[length..];
    Some((Part::Key(&path[..length]), rest.strip_prefix('.').unwrap_or(rest)))
}

fn at<'v>(value: &'v mut Value, path: &str) -> Option<&'v mut Value> {
    let Some((part, rest)) = first(value, path) else { return Some(value) };
    let next = match part {
        Part::Key(key) => value.get_mut(key)?,
        Part::Index(i) => value.get_mut(i)?,
    };
    at(next, rest)
}

fn is_unknown(value: &Value, path: &str) -> bool {
    let Some((part, rest)) = first(value, path) else { return value.get(UNKNOWN).is_some() };
    let next = match part {
        Part::Key(key) => value.get(key),
        Part::Index(i) => value.get(i),
    };
    next.is_some_and(|next| next.get(UNKNOWN).is_some() || is_unknown(next, rest))
}

fn holds_unknown(value: &Value) -> bool {
    match value {
        Value::Array(items) => items.iter().any(holds_unknown),
        Value::Object(map) => map.contains_key(UNKNOWN) || map.values().any(holds_unknown),
        _ => false,
    }
}

fn remove(value: &mut Value, parent: &str, name: &str) -> bool {
    let place = at(value, parent).and_then(Value::as_object_mut);
    place.is_some_and(|map| map.remove(name).is_some())
}

fn put(value: &mut Value, path: &str, new: Value) -> bool {
    if let Some(place) = at(value, path) {
        *place = new;
        return true;
    }
    let (parent, name) = path.rsplit_once('.').unwrap_or(("", path));
    match at(value, parent).and_then(Value::as_object_mut) {
        Some(map) => {
            map.insert(name.to_owned(), new);
            true
        }
        None => false,
    }
}

/// serde's message in the words of the user.
fn explain(bad: &BadField, value: &Value, words: &[String]) -> Wrong {
    let message = bad.message.as_str();
    let mut value = value.clone();
    let wrong = |message: String, label: &str, help| Wrong {
        path: bad.path.clone(),
        field: None,
        message,
        label: label.to_owned(),
        help,
    };
    if let Some(name) = between(message, "unknown field `") {
        let known = named(message);
        let help = near(&name, known.iter().map(String::as_str));
        let help = help.or_else(|| Some("there are no fields here".into()));
        let path = bad.path.strip_suffix(name.as_str()).unwrap_or(&bad.path);
        let path = path.strip_suffix('.').unwrap_or(path).to_owned();
        let text = format!("unknown field `{name}`");
        let field = Some(Field::Unknown(name));
        return Wrong { path, field, ..wrong(text, "unknown field", help) };
    }
    if let Some(name) = between(message, "missing field `") {
        let text = format!("missing field `{name}`");
        let field = Some(Field::Missing);
        return Wrong { field, ..wrong(text, &format!("`{name}` is missing"), None) };
    }
    if let Some(name) = between(message, "unknown variant `") {
        let known = named(message);
        let help = near(&name, known.iter().map(String::as_str));
        return wrong(format!("unknown value `{name}`"), "not one of the known values", help);
    }
    let here = at(&mut value, &bad.path).cloned().unwrap_or(Value::Null);
    if here.get("$text").is_some() && message.contains("expected") {
        let text = "a reference to a step cannot stand inside this text".to_owned();
        let help = "a reference to a step is the whole value, like `${steps.name}`";
        return wrong(text, "not an edge", Some(help.into()));
    }
    let typed = message
        .strip_prefix("invalid type: ")
        .or_else(|| message.strip_prefix("invalid value: "))
        .and_then(|rest| rest.rsplit_once(", expected "));
    if let Some((_, expected)) = typed {
        let expected = match words {
            [] => in_words(expected),
            [one] => format!("`{one}`"),
            several => format!("one of `{}`", several.join("`, `")),
        };
        let found = describe(&here);
        let mut help = None;
        if let Value::String(text) = &here {
            let plain = text.trim().parse::<f64>().is_ok_and(f64::is_finite);
            if plain && expected.contains("number") {
                help = Some(format!("write it without quotes: `{text}`"));
            } else if expected == "`true` or `false`" {
                help = Some("only `true` and `false` are booleans".into());
            }
        } else if here.get("$input").or_else(|| here.get("$gather")).is_some() {
            help = Some("a step can be referenced only where its output is read".into());
        }
        return wrong(format!("expected {expected}, found {found}"), "wrong type", help);
    }
    if let Some(found) = message.strip_prefix("expected `").and_then(|m| m.split_once("found `")) {
        let label = format!("this yields `{}", found.1);
        return wrong(message.to_owned(), &label, None);
    }
    if message.starts_with("expected a reference") && here.get("$gather").is_some() {
        let help = "without the `.*` it is the one point that matches";
        return wrong(message.to_owned(), "all points", Some(help.into()));
    }
    if message.starts_with("expected a gather") && here.get("$input").is_some() {
        let text = "expected all points of a sweep, found one".to_owned();
        return wrong(text, "one point", Some("write it as `${steps.name.*}`".into()));
    }
    let form = message.split_once(", found ").filter(|_| message.starts_with("expected a"));
    let message = form.map_or_else(
        || message.to_owned(),
        |(want, _)| format!("{want}, found {}", describe(&here)),
    );
    wrong(message, "not accepted", None)
}

/// serde's names of types in plain words.
fn in_words(expected: &str) -> String {
    let words = match expected {
        "f32" | "f64" => "a number",
        "u8" | "u16" | "u32" | "u64" | "usize" => "a whole number, 0 or more",
        "i8" | "i16" | "i32" | "i64" | "isize" => "a whole number",
        "a nonzero u32" | "a nonzero u64" | "a nonzero usize" => "a whole number, 1 or more",
        "a boolean" => "`true` or `false`",
        "a string" | "string" => "text",
        "a sequence" => "a list",
        "a map" => "a map",
        s if s.starts_with("struct ") => "a map",
        s if s.starts_with("tuple ") => "a list",
        s if s.starts_with("a tuple") => "a list",
        s if s.contains("enum ") => "one of the known words",
        other => other,
    };
    words.to_owned()
}

fn describe(value: &Value) -> String {
    if value.get("$input").or_else(|| value.get("$gather")).is_some() {
        return "a step's output".into();
    }
    let span = crate::source::Span::default();
    crate::yaml::Node::from_value(value, span).describe()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::artifact::{Model, Tokens};
    use crate::step::{Context, Input, StepKind};
    use schemars::JsonSchema;
    use serde::{Deserialize, Serialize};

    #[derive(Serialize, Deserialize, JsonSchema)]
    #[serde(rename_all = "snake_case")]
    enum Method {
        Full,
        Lora,
    }

    #[derive(Serialize, Deserialize, JsonSchema)]
    #[serde(deny_unknown_fields)]
    struct Lora {
        r: usize,
        alpha: Option<f64>,
    }

    #[derive(Serialize, Deserialize, JsonSchema)]
    #[serde(deny_unknown_fields)]
    struct Train {
        data: Input<Tokens>,
        model: Input<Model>,
        method: Method,
        lora: Option<Lora>,
        rate: f64,
    }

    impl StepKind for Train {
        const NAME: &'static str = "train";
        const VERSION: u32 = 1;
        fn ports(&self) -> Ports {
            Ports::of(Type::TrainedModel)
        }
        fn run(&self, _: &mut Context<'_>) -> anyhow::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn every_mistake_is_found() {
        let with = json!({
            "data": edge(Type::Dataset), "model": unknown(), "method": "loar",
            "lora": { "alpha": "16" }, "rte": 1,
        });
        let parsed = parse(&Kind::of::<Train>(), &with);
        let told: Vec<String> =
            parsed.wrong.iter().map(|w| format!("{}: {}", w.path, w.message)).collect();
        assert_eq!(
            told,
            [
                "data: expected `tokens`, found `dataset`",
                "lora.alpha: expected a number, found the text `16`",
                "lora: missing field `r`",
                "method: unknown value `loar`",
                ": unknown field `rte`",
                ": missing field `rate`",
            ]
        );
        assert_eq!(parsed.ports.map(|p| p.ty), Some(Type::TrainedModel));
        assert!(parsed.step.is_none());
    }

    #[test]
    fn words_are_listed_where_one_is_expected() {
        let with = json!({
            "data": edge(Type::Tokens), "model": edge(Type::Model), "method": 3, "rate": 1,
        });
        let parsed = parse(&Kind::of::<Train>(), &with);
        let told: Vec<&str> = parsed.wrong.iter().map(|w| w.message.as_str()).collect();
        assert_eq!(told, ["expected one of `full`, `lora`, found the number 3"]);
    }
}

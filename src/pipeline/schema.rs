//! JSON Schemas, for editors.

use serde_json::{Map, Value, json};

/// A time, as the parser reads it.
const TIME: &str = r"^\s*[0-9.]+\s*(ms|s|m|min|h|d)\s*$";

use crate::step::Kind;

const DRAFT: &str = "https://json-schema.org/draft/2020-12/schema";

/// The schema of a whole pipeline file.
pub fn schema(kinds: &[Kind]) -> Value {
    let mut defs = Map::new();
    let mut cases = Vec::new();
    for kind in kinds {
        let with = with_schema(kind, &mut defs);
        let required = with["required"].as_array().is_some_and(|r| !r.is_empty());
        let needs_with: &[&str] = if required { &["kind", "with"] } else { &["kind"] };
        let own = json!({ "$ref": format!("#/$defs/{}", kind.name) });
        let none = json!({ "type": "null" });
        defs.insert(kind.name.to_owned(), with);
        let with = if required { own } else { json!({ "anyOf": [own, none] }) };
        cases.push(json!({
            "if": { "properties": { "kind": { "const": kind.name } }, "required": ["kind"] },
            "then": {
                "required": needs_with,
                "properties": { "with": with },
            },
        }));
    }
    json!({
        "$schema": DRAFT,
        "title": "flow pipeline",
        "type": "object",
        "additionalProperties": false,
        "required": ["steps"],
        "properties": {
            "name": { "type": "string", "pattern": "^[A-Za-z0-9_-]+$" },
            "description": { "type": "string" },
            "params": {
                "type": ["object", "null"],
                "description": "Values to reference as `${params.name}`.",
            },
            "sweep": sweep_schema(),
            "steps": {
                "type": "object",
                "minProperties": 1,
                "propertyNames": { "pattern": "^[a-z][a-z0-9_]*$" },
                "additionalProperties": step_schema(kinds, &cases),
            },
            "outputs": {
                "type": ["object", "null"],
                "description": "What is published under `outputs/` after a run that succeeded.",
                "additionalProperties": {
                    "type": "string",
                    "pattern": r"^\$\{steps\.[^}]+\}$",
                    "description": "A step or a port of it: `${steps.name}`, `${steps.name.port}`.",
                },
            },
        },
        "$defs": Value::Object(defs),
    })
}

fn step_schema(kinds: &[Kind], cases: &[Value]) -> Value {
    let rows = kinds.iter().map(|k| json!({ "const": k.name, "description": k.summary() }));
    let times = json!({ "type": "integer", "minimum": 0 });
    let variables = |what: &str| {
        json!({
            "type": ["array", "null"],
            "items": { "type": "string" },
            "description": what,
        })
    };
    json!({
        "type": "object",
        "additionalProperties": false,
        "required": ["kind"],
        "properties": {
            "kind": { "oneOf": rows.collect::<Vec<_>>() },
            "with": {
                "type": ["object", "null"],
                "description": "Parameters; all of them are in the cache key.",
            },
            "env": variables("Environment variables whose values are in the cache key."),
            "salt": {
                "type": ["string", "number", "boolean", "null"],
                "description": "Part of the cache key.",
            },
            "needs": {
                "type": ["object", "null"],
                "additionalProperties": {
                    "type": "integer",
                    "minimum": 0,
                    "description": "A resource that `flow.toml` declares under `[resources]`.",
                },
                "description": "Resources, instead of what the kind asks for. Never in the key.",
                "properties": {
                    "cpu": { "anyOf": [{ "type": "integer", "minimum": 1 }, { "const": "all" }] },
                    "memory": {
                        "type": ["integer", "string"],
                        "description": "Bytes, or like `8GiB`.",
                    },
                    "gpu": { "type": "integer", "minimum": 0 },
                    "exclusive": {
                        "type": "boolean",
                        "description": "Whether nothing may run beside it.",
                    },
                },
            },
            "retry": {
                "description": "How often a failed step is tried again: `3`, or with the first \
                    pause, which doubles (1s by default), `{ times: 3, backoff: 10s }`.",
                "anyOf": [times, {
                    "type": "object",
                    "additionalProperties": false,
                    "required": ["times"],
                    "properties": {
                        "times": times,
                        "backoff": { "type": "string", "pattern": TIME },
                    },
                }],
            },
            "timeout": {
                "type": "string",
                "pattern": TIME,
                "description": "Like `90s`, `15m` or `2h`.",
            },
            "checkpoint": {
                "type": "string",
                "pattern": TIME,
                "description": "How often a training keeps what it needs to go on later; 10m by \
                    default.",
            },
            "secrets": variables("Environment variables passed to the step and kept nowhere."),
        },
        "allOf": cases,
    })
}

fn sweep_schema() -> Value {
    let reference = json!({ "type": "string", "pattern": r"^\$\{params\.[^}]+\}$" });
    let points = |what: &str| {
        let point = json!({ "anyOf": [{ "type": "object", "minProperties": 1 }, reference] });
        json!({
            "anyOf": [{ "type": "array", "items": point }, reference],
            "description": what,
        })
    };
    let list = json!({ "anyOf": [{ "type": "array", "minItems": 1 }, reference] });
    json!({
        "type": "object",
        "additionalProperties": false,
        "minProperties": 1,
        "properties": {
            "grid": {
                "type": ["object", "null"],
                "description": "Every combination of these axes.",
                "additionalProperties": list,
            },
            "zip": {
                "type": ["object", "null"],
                "description": "Named axes whose members move together.",
                "additionalProperties": {
                    "type": "object",
                    "minProperties": 1,
                    "additionalProperties": list,
                },
            },
            "exclude": points("Points with all of these coordinates are left out."),
            "include": points("Points that are added; an axis left out is absent there."),
            "cap": {
                "anyOf": [
                    { "type": "integer", "minimum": 1 },
                    { "type": "string", "pattern": r"^\$\{" },
                ],
                "description": "The largest number of points that is not a mistake (256).",
            },
        },
    })
}

/// The schema of one kind's `with`.
pub fn kind_schema(kind: &Kind) -> Value {
    let mut defs = Map::new();
    let mut with = with_schema(kind, &mut defs);
    if let Some(map) = with.as_object_mut() {
        map.insert("$schema".into(), json!(DRAFT));
        map.insert("title".into(), json!(kind.name));
        if !defs.is_empty() {
            map.insert("$defs".into(), Value::Object(defs));
        }
    }
    with
}

/// A kind's own schema: definitions moved to `defs` under the kind's name, values widened.
fn with_schema(kind: &Kind, defs: &mut Map<String, Value>) -> Value {
    let mut own = (kind.schema)();
    let inner = own.as_object_mut().map(|map| {
        map.remove("$schema");
        map.remove("title");
        map.remove("$defs")
    });
    if let Some(Some(Value::Object(inner))) = inner {
        for (name, def) in inner {
            defs.insert(format!("{}.{name}", kind.name), widen(def, kind.name, true));
        }
    }
    widen(own, kind.name, false)
}

/// Keywords whose value is a schema, a list of schemas, or a map of schemas.
const ONE: [&str; 3] = ["items", "additionalProperties", "not"];
const LIST: [&str; 4] = ["anyOf", "oneOf", "allOf", "prefixItems"];
const MAP: [&str; 2] = ["properties", "patternProperties"];

/// Lets every value below also be a reference, and points `$ref`s at their new place.
fn widen(schema: Value, kind: &str, here: bool) -> Value {
    let Value::Object(map) = schema else { return schema };
    let mut out = Map::new();
    for (key, value) in map {
        let value = match (key.as_str(), value) {
            ("$ref", Value::String(target)) => {
                json!(target.replace("#/$defs/", &format!("#/$defs/{kind}.")))
            }
            (k, value @ Value::Object(_)) if ONE.contains(&k) => widen(value, kind, true),
            (k, Value::Array(list)) if LIST.contains(&k) => {
                // The reference stands beside the alternatives, not within each.
                list.into_iter().map(|s| widen(s, kind, false)).collect()
            }
            (k, Value::Object(fields)) if MAP.contains(&k) => {
                let fields = fields.into_iter().map(|(n, s)| (n, widen(s, kind, true)));
                Value::Object(fields.collect())
            }
            (_, value) => value,
        };
        out.insert(key, value);
    }
    if !here || out.contains_key("$ref") || takes_any_text(&out) {
        return Value::Object(out);
    }
    let mut wide = Map::new();
    for key in ["description", "default"] {
        if let Some(value) = out.remove(key) {
            wide.insert(key.to_owned(), value);
        }
    }
    let reference = json!({ "type": "string", "pattern": r"\$\{" });
    wide.insert("anyOf".into(), json!([Value::Object(out), reference]));
    Value::Object(wide)
}

/// Whether text with a reference in it fits already.
fn takes_any_text(schema: &Map<String, Value>) -> bool {
    let text = match schema.get("type") {
        None => {
            !["enum", "const", "anyOf", "oneOf", "allOf"].iter().any(|k| schema.contains_key(*k))
        }
        Some(Value::String(ty)) => ty == "string",
        Some(Value::Array(types)) => types.iter().any(|t| t == "string"),
        Some(_) => false,
    };
    let free = !["pattern", "enum", "const", "format", "maxLength"]
        .iter()
        .any(|k| schema.contains_key(*k));
    let edge = schema.get("pattern").and_then(Value::as_str).is_some_and(|p| p.contains(r"\$\{"));
    text && (free || edge)
}

//! The table of kinds, and the schemas generated from it.

use std::fs;
use std::path::Path;

use anyhow::Context as _;
use serde_json::{Value, json};

use super::error::{Exit, Failure};
use super::{Stage, out, table};
use crate::pipeline;
use crate::source::{Fault, suggest};
use crate::step::Kind;

/// `flow kinds [KIND]`.
pub(super) fn kinds(stage: &Stage, name: Option<&str>) -> Result<Exit, Failure> {
    let Some(name) = name else {
        if stage.json {
            let list = stage
                .kinds
                .iter()
                .map(|k| json!({ "kind": k.name, "version": k.version, "summary": k.summary() }));
            outln!("{}", Value::Array(list.collect()))?;
        } else {
            let rows = stage.kinds.iter().map(|k| vec![k.name.to_owned(), k.summary()]);
            out::text(&table::render(&["kind", "what it does"], &rows.collect::<Vec<_>>()))?;
        }
        return Ok(Exit::Done);
    };
    let schema = (find(stage, name)?.schema)();
    if stage.json {
        outln!("{schema}")?;
        return Ok(Exit::Done);
    }
    outln!("{name}\n\n{}\n", schema["description"].as_str().unwrap_or_default())?;
    let mut text = String::new();
    fields(&schema, &schema, "", DEEPEST, &mut text);
    out::text(&text)?;
    Ok(Exit::Done)
}

/// Fields within fields that are shown.
const DEEPEST: usize = 4;

/// The fields of an object, and those within them under their whole path (`lora.r`).
fn fields(schema: &Value, object: &Value, prefix: &str, depth: usize, text: &mut String) {
    let required: Vec<&str> =
        object["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    for (field, about) in object["properties"].as_object().into_iter().flatten() {
        let default = match about.get("default") {
            Some(Value::Null) => ", optional".to_owned(),
            Some(value) => format!(", default {value}"),
            None if required.contains(&field.as_str()) => ", required".to_owned(),
            None => ", optional".to_owned(),
        };
        let path = format!("{prefix}{field}");
        text.push_str(&format!("  {path}: {}{default}\n", type_of(schema, about)));
        for line in description(schema, about).lines() {
            text.push_str(&format!("      {line}\n"));
        }
        for (suffix, object) in within(schema, about, depth) {
            fields(schema, object, &format!("{path}{suffix}."), depth - 1, text);
        }
    }
}

/// The objects with fields of their own that a value can be or hold, and where: itself, the items
/// of a list, the values of a map.
fn within<'a>(schema: &'a Value, about: &'a Value, depth: usize) -> Vec<(String, &'a Value)> {
    let about = target(schema, about);
    if depth == 0 {
        return Vec::new();
    }
    let mut found = Vec::new();
    if about["properties"].is_object() {
        found.push((String::new(), about));
    }
    for list in ["anyOf", "oneOf", "allOf"] {
        for one in about[list].as_array().into_iter().flatten() {
            found.extend(within(schema, one, depth - 1));
        }
    }
    for (key, suffix) in [("items", "[]"), ("additionalProperties", ".NAME")] {
        if about[key].is_object() {
            let inner = within(schema, &about[key], depth - 1).into_iter();
            found.extend(inner.map(|(rest, object)| (format!("{suffix}{rest}"), object)));
        }
    }
    found
}

fn find<'a>(stage: &'a Stage, name: &str) -> Result<&'a Kind, Failure> {
    let names: Vec<&str> = stage.kinds.iter().map(|k| k.name).collect();
    stage.kinds.iter().find(|k| k.name == name).ok_or_else(|| {
        let fault = Fault::new(format!("there is no kind `{name}`"));
        let help = suggest(name, &names).unwrap_or_default();
        Failure::Usage(fault.help(help).into())
    })
}

/// Follows a `$ref` into the definitions of a schema.
fn target<'a>(schema: &'a Value, about: &'a Value) -> &'a Value {
    let named = about["$ref"].as_str().and_then(|r| r.strip_prefix('#'));
    named.and_then(|pointer| schema.pointer(pointer)).unwrap_or(about)
}

fn description(schema: &Value, about: &Value) -> String {
    let own = about["description"].as_str();
    own.or_else(|| target(schema, about)["description"].as_str()).unwrap_or_default().to_owned()
}

fn type_of(schema: &Value, about: &Value) -> String {
    let about = target(schema, about);
    if let Some(types) = about["x-yields"].as_array() {
        let types: Vec<&str> = types.iter().filter_map(Value::as_str).collect();
        let gather = about["pattern"].as_str().is_some_and(|p| p.ends_with(r"\.\*\}$"));
        let form = if gather { "${steps.NAME.*}" } else { "${steps.NAME}" };
        return format!("{form} ({})", types.join(" or "));
    }
    if let Some(options) = about["enum"].as_array() {
        let words: Vec<&str> = options.iter().filter_map(Value::as_str).collect();
        return words.join(" | ");
    }
    for list in ["anyOf", "oneOf", "allOf"] {
        if let Some(options) = about[list].as_array() {
            let types = options.iter().map(|o| match o["const"].as_str() {
                Some(word) => word.to_owned(),
                None => type_of(schema, o),
            });
            let types: Vec<String> = types.filter(|t| t != "null").collect();
            return types.join(" | ");
        }
    }
    let types: Vec<&str> = match &about["type"] {
        Value::String(one) => vec![one],
        Value::Array(many) => many.iter().filter_map(Value::as_str).collect(),
        _ => return "any".to_owned(),
    };
    let words = types.into_iter().filter(|t| *t != "null").map(|one| match one {
        "array" => format!("[{}]", type_of(schema, &about["items"])),
        "object" if about["additionalProperties"].is_object() => {
            format!("map of {}", type_of(schema, &about["additionalProperties"]))
        }
        other => other.to_owned(),
    });
    words.collect::<Vec<_>>().join(" | ")
}

/// `flow schema [KIND] [--write DIR]`.
pub(super) fn schema(
    stage: &Stage,
    name: Option<&str>,
    write: Option<&Path>,
) -> Result<Exit, Failure> {
    if let Some(dir) = write {
        fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
        let mut written = Vec::new();
        for (file, text) in schemas(stage.kinds) {
            let path = dir.join(file);
            fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
            errln!("{}", path.display());
            written.push(path);
        }
        if stage.json {
            outln!("{}", json!(written))?;
        }
        return Ok(Exit::Done);
    }
    let schema = match name {
        Some(name) => pipeline::kind_schema(find(stage, name)?),
        None => pipeline::schema(stage.kinds),
    };
    outln!("{schema:#}")?;
    Ok(Exit::Done)
}

/// Every schema as (file name, text): the pipeline's, and one for each kind's `with`.
pub fn schemas(kinds: &[Kind]) -> Vec<(String, String)> {
    let text = |schema: &Value| format!("{schema:#}\n");
    let mut files = vec![("pipeline.json".to_owned(), text(&pipeline::schema(kinds)))];
    let one = |kind: &Kind| (format!("{}.json", kind.name), text(&pipeline::kind_schema(kind)));
    files.extend(kinds.iter().map(one));
    files
}

/// The table of kinds as Markdown, for the README.
pub fn kinds_table(kinds: &[Kind]) -> String {
    let rows = kinds.iter().map(|k| format!("| `{}` | {} |\n", k.name, k.summary()));
    format!("| kind | what it does |\n|---|---|\n{}", rows.collect::<String>())
}

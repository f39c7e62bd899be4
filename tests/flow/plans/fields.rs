//! The laws of keys at the real kinds: every field of every kind is in the key, and how a step is
//! written down is not.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use flow::pipeline::{Plan, Settings};
use flow::source::Source;
use flow::step::{Kind, Step};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::laws::{Style, style, write};
use crate::engine::real;

fn plan(text: &str) -> Plan {
    let source = Source::new("test.yaml", text);
    let plan = Plan::new(Path::new("test.yaml"), source, flow::kinds::ALL, &Settings::default());
    plan.unwrap_or_else(|d| panic!("{text}\n{}", super::told(text, &d)))
}

fn keys(text: &str) -> BTreeMap<String, Value> {
    let plan = plan(text);
    let key = |i: &flow::pipeline::Instance| (i.id.0.clone(), i.parsed.key_params());
    plan.graph.node_weights().map(key).collect()
}

/// The pipeline of all kinds; on request with all defaults that parse, written out.
fn document(spelled_out: bool) -> Value {
    let mut steps = real::steps();
    if spelled_out {
        let plan = plan(&real::pipeline(&steps));
        for instance in plan.graph.node_weights() {
            let with = steps[&instance.step]["with"].as_object_mut().unwrap();
            for (field, value) in instance.parsed.params().as_object().unwrap() {
                let plain = !value.is_null() && !value.to_string().contains("\"$");
                if !with.contains_key(field) && plain {
                    with.insert(field.clone(), value.clone());
                }
            }
        }
    }
    json!({ "sweep": { "grid": { "r": [2, 4] } }, "steps": steps })
}

fn yaml(style: &Style) -> String {
    let mut text = String::new();
    write(&document(style.spelled_out), style, 0, &mut text);
    text.push('\n');
    text.trim_start().to_owned()
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 24, failure_persistence: None, ..Default::default()
    })]

    #[test]
    fn how_a_pipeline_of_real_kinds_is_written_does_not_matter(a in style(), b in style()) {
        prop_assert_eq!(keys(&yaml(&a)), keys(&yaml(&b)));
    }
}

/// Values to try for a field, one of which will parse and be another than it has.
fn others(value: &Value, words: &[String]) -> Vec<Value> {
    let digest = |n: usize| flow::digest::Digest::of(n.to_string().as_bytes());
    let content = json!({ "path": "/x", "digest": digest(1) });
    let file = json!({ "$file": content });
    if value.to_string().contains("\"$file\"") {
        // Another path is no other value: the content is.
        return vec![file.clone(), json!([file]), json!({ "x": file })];
    }
    let ports = json!({ "train": digest(2), "weights": digest(3) });
    let input = |ty: &str| json!({ "$input": { "type": ty, "ports": ports } });
    let gather = |ty: &str| {
        let member = json!({ "point": { "x": 1 }, "input": input(ty)["$input"] });
        json!({ "$gather": { "members": [member] } })
    };
    let types = ["dataset", "prompts", "tokens", "model", "trained_model", "report", "files"];
    let mut all = match value {
        Value::Bool(b) => vec![json!(!b)],
        Value::Number(n) if n.is_f64() => vec![json!(n.as_f64().unwrap() * 0.5 + 0.125)],
        Value::Number(n) => vec![json!(n.as_u64().unwrap_or_default() + 1)],
        Value::String(text) => vec![json!(format!("{text}x"))],
        _ => Vec::new(),
    };
    all.extend(words.iter().flat_map(|w| [json!(w), json!([w])]));
    all.extend([json!(1), json!(0.5), json!(true), json!("x"), json!(["x"]), json!({ "x": "x" })]);
    all.push(json!([0.5]));
    all.extend([json!({}), json!({ "x": 1 }), json!({ "x": 0.5 }), json!({ "prompt": "x" })]);
    all.extend([file.clone(), json!({ "x": file })]);
    for ty in types {
        all.extend([input(ty), gather(ty), json!({ "x": input(ty) }), json!({ "x": gather(ty) })]);
        all.push(json!([input(ty)]));
    }
    all.push(json!({ "cpu": "x", "threads": 1 }));
    all
}

/// Words that a schema allows somewhere.
fn words(schema: &Value, out: &mut Vec<String>) {
    match schema {
        Value::Object(map) => {
            for (key, value) in map {
                let given = match (key.as_str(), value) {
                    ("const", Value::String(word)) => vec![word.clone()],
                    ("enum", Value::Array(all)) => {
                        all.iter().filter_map(|w| w.as_str().map(str::to_owned)).collect()
                    }
                    _ => Vec::new(),
                };
                out.extend(given);
                words(value, out);
            }
        }
        Value::Array(items) => items.iter().for_each(|v| words(v, out)),
        _ => {}
    }
}

/// Changes a field to anything else that parses; the step then.
fn changed(kind: &Kind, params: &Value, path: &[&str], words: &[String]) -> Option<Box<dyn Step>> {
    let pointer: String = path.iter().map(|p| format!("/{p}")).collect();
    let old = params.pointer(&pointer).cloned().unwrap_or(Value::Null);
    others(&old, words).into_iter().find_map(|value| {
        let mut params = params.clone();
        let (last, inside) = path.split_last().unwrap();
        let inside: String = inside.iter().map(|p| format!("/{p}")).collect();
        params.pointer_mut(&inside)?.as_object_mut()?.insert((*last).to_owned(), value);
        let step = (kind.parse)(&params).ok()?;
        (step.params().pointer(&pointer).unwrap_or(&Value::Null) != &old).then_some(step)
    })
}

#[test]
fn every_field_of_every_kind_is_in_its_key() {
    let plan = plan(&real::pipeline(&real::steps()));
    let mut done = BTreeSet::new();
    for instance in plan.graph.node_weights() {
        let kind = instance.kind;
        let schema = (kind.schema)();
        let mut allowed = Vec::new();
        words(&schema, &mut allowed);
        let params = instance.parsed.params();
        let key = instance.parsed.key_params();
        // As the engine does it: what is parsed again is the same.
        let again = (kind.parse)(&params).unwrap();
        assert_eq!((again.params(), again.key_params()), (params.clone(), key.clone()));
        let top: Vec<&String> = schema["properties"].as_object().unwrap().keys().collect();
        let mut paths: Vec<Vec<&str>> = Vec::new();
        for name in &top {
            let inner = params[name.as_str()].as_object().into_iter().flatten();
            let inner: Vec<_> = inner.filter(|(field, _)| !field.starts_with('$')).collect();
            if inner.is_empty() {
                paths.push(vec![name]);
            }
            paths.extend(inner.into_iter().map(|(field, _)| vec![name.as_str(), field.as_str()]));
        }
        for path in paths {
            let step = changed(&kind, &params, &path, &allowed);
            let step = step.unwrap_or_else(|| panic!("{}: no other {path:?}", kind.name));
            assert_ne!(step.key_params(), key, "{}: {path:?} is not in the key", kind.name);
            let again = (kind.parse)(&step.params()).unwrap();
            assert_eq!(again.params(), step.params(), "{}: {path:?} gets lost", kind.name);
            done.insert((kind.name, path.join(".")));
        }
    }
    assert!(done.len() > 100, "{}", done.len());
    assert!(done.contains(&("train", "lora.use_rslora".to_owned())));
}

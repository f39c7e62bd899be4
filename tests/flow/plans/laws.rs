//! Laws: what must not matter to a key does not, what must does, and no text makes it panic.

use std::collections::BTreeMap;

use flow::source::Severity;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::{plan, told};

/// Key parameters of all instances, by name.
fn keys(text: &str) -> BTreeMap<String, Value> {
    let plan = plan(text).unwrap_or_else(|d| panic!("{text}\n{}", told(text, &d)));
    let key = |i: &flow::pipeline::Instance| (i.id.0.clone(), i.parsed.key_params());
    plan.graph.node_weights().map(key).collect()
}

/// A pipeline as data; what is `None` is left to its default.
#[derive(Debug, Clone)]
struct Model {
    dataset: String,
    splits: Option<Vec<String>>,
    rows: BTreeMap<String, u64>,
    shuffle: bool,
    max_length: u32,
    rate: f64,
    alpha: Option<f64>,
    ranks: Vec<u64>,
}

fn model() -> impl Strategy<Value = Model> {
    let split = prop_oneof![Just("train"), Just("test"), Just("no"), Just("1e3"), Just("ü ")];
    (
        "[a-zé:#'\" -]{1,12}",
        proptest::option::of(proptest::collection::vec(split.prop_map(str::to_owned), 1..3)),
        proptest::collection::btree_map("[a-z0-9.]{1,6}", 1..1000_u64, 1..3),
        any::<bool>(),
        1..4096_u32,
        1e-6..1.0_f64,
        proptest::option::of(0.5..64.0_f64),
        proptest::collection::btree_set(1..64_u64, 1..4),
    )
        .prop_map(|(dataset, splits, rows, shuffle, max_length, rate, alpha, ranks)| Model {
            dataset,
            splits,
            rows,
            shuffle,
            max_length,
            rate,
            alpha,
            ranks: ranks.into_iter().collect(),
        })
}

/// How a pipeline is written down; none of it is meant to matter.
#[derive(Debug, Clone)]
pub(super) struct Style {
    reversed: bool,
    flow: bool,
    quotes: bool,
    /// Texts as blocks of their own.
    literal: bool,
    comments: bool,
    pub(super) spelled_out: bool,
    through_params: bool,
}

pub(super) fn style() -> impl Strategy<Value = Style> {
    any::<[bool; 7]>().prop_map(|b| Style {
        reversed: b[0],
        flow: b[1],
        quotes: b[2],
        literal: b[3],
        comments: b[4],
        spelled_out: b[5],
        through_params: b[6],
    })
}

fn document(model: &Model, style: &Style) -> Value {
    let mut fetch = json!({ "dataset": model.dataset });
    let mut sample = json!({ "data": "${steps.rows}", "rows": model.rows });
    if model.shuffle || style.spelled_out {
        sample["shuffle"] = json!(model.shuffle);
    }
    if style.spelled_out {
        sample["seed"] = json!(0);
        fetch["splits"] = json!(["train", "test"]);
    }
    if let Some(splits) = &model.splits {
        fetch["splits"] = json!(splits);
    }
    let mut lora = json!({ "r": "${sweep.r}" });
    if let Some(alpha) = model.alpha {
        lora["alpha"] = json!(alpha);
    }
    let mut train = json!({
        "data": "${steps.ids}", "model": "${steps.base}", "method": "lora", "lora": lora,
        "learning_rate": model.rate,
    });
    let mut document = json!({ "sweep": { "grid": { "r": model.ranks } } });
    if style.through_params {
        document["params"] = json!({ "rate": model.rate });
        train["learning_rate"] = json!("${params.rate}");
    }
    document["steps"] = json!({
        "rows": { "kind": "fetch", "with": fetch },
        "some": { "kind": "sample", "with": sample },
        "base": { "kind": "model", "with": { "model": "tiny" } },
        "ids": { "kind": "tokenize", "with": {
            "data": "${steps.some}", "tokenizer": "${steps.base}", "max_length": model.max_length,
        } },
        "train": { "kind": "train", "with": train },
    });
    document
}

pub(super) fn write(value: &Value, style: &Style, depth: usize, out: &mut String) {
    match value {
        Value::Object(map) if !style.flow && !map.is_empty() => {
            let mut pairs: Vec<_> = map.iter().collect();
            if style.reversed {
                pairs.reverse();
            }
            for (key, value) in pairs {
                out.push('\n');
                if style.comments {
                    out.push_str(&format!("{}# {key}: x\n", "  ".repeat(depth)));
                }
                out.push_str(&"  ".repeat(depth));
                text(key, style.quotes, out);
                out.push(':');
                if !value.is_object() {
                    out.push(' ');
                }
                if let Some(text) = value.as_str().filter(|t| style.literal && is_literal(t)) {
                    // No comment may follow: it would be text.
                    let block = if text.ends_with('x') { ">-" } else { "|-" };
                    out.push_str(&format!("{block}\n{}{text}", "  ".repeat(depth + 1)));
                    continue;
                }
                write(value, style, depth + 1, out);
                if style.comments && !value.is_object() {
                    out.push_str(" # so");
                }
            }
        }
        Value::Object(map) => {
            let mut pairs: Vec<_> = map.iter().collect();
            if style.reversed {
                pairs.reverse();
            }
            out.push_str(" {");
            for (i, (key, value)) in pairs.into_iter().enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                text(key, style.quotes, out);
                out.push_str(": ");
                write(value, style, depth, out);
            }
            out.push('}');
        }
        Value::Array(items) => {
            out.push('[');
            for (i, item) in items.iter().enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                write(item, style, depth, out);
            }
            out.push(']');
        }
        Value::String(s) => text(s, style.quotes, out),
        Value::Number(n) if style.quotes => out.push_str(&match n.as_f64() {
            Some(x) if n.is_f64() => format!("{x:E}"),
            _ => n.to_string(),
        }),
        other => out.push_str(&other.to_string()),
    }
}

/// Whether a text stays itself as a block of one line.
fn is_literal(text: &str) -> bool {
    !text.is_empty() && !text.starts_with(' ') && !text.ends_with(' ') && !text.contains('\n')
}

fn text(s: &str, double: bool, out: &mut String) {
    if double {
        out.push_str(&Value::String(s.to_owned()).to_string());
    } else if s.len() > 1 && s.chars().all(|c| c.is_ascii_lowercase()) && s != "no" {
        out.push_str(s);
    } else {
        out.push_str(&format!("'{}'", s.replace('\'', "''")));
    }
}

fn yaml(model: &Model, style: &Style) -> String {
    let mut out = String::new();
    write(&document(model, style), style, 0, &mut out);
    out.push('\n');
    out.trim_start().to_owned()
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 48, failure_persistence: None, ..Default::default()
    })]

    #[test]
    fn how_it_is_written_does_not_matter(model in model(), a in style(), b in style()) {
        prop_assert_eq!(keys(&yaml(&model, &a)), keys(&yaml(&model, &b)));
    }

    #[test]
    fn every_field_matters(model in model(), style in style(), which in 0..8_usize) {
        let mut other = model.clone();
        let step = match which {
            0 => { other.dataset.push('x'); "rows" }
            1 => { other.splits = Some(vec!["other".into()]); "rows" }
            2 => { other.rows.insert("extra".into(), 1); "some" }
            3 => { other.shuffle = !other.shuffle; "some" }
            4 => { other.max_length += 1; "ids" }
            5 => { other.rate *= 1.5; "train" }
            6 => { other.alpha = Some(other.alpha.unwrap_or(0.0) + 1.0); "train" }
            _ => { other.ranks = vec![100]; "train" }
        };
        let of = |m: &Model| {
            let all = keys(&yaml(m, &style)).into_iter();
            let of_step = all.filter(|(id, _)| id.split('@').next() == Some(step));
            of_step.map(|(_, key)| key).collect::<Vec<_>>()
        };
        prop_assert_ne!(of(&model), of(&other));
    }

    #[test]
    fn no_text_makes_it_panic(text in "\\PC{0,200}") {
        let _ = plan(&text);
    }

    #[test]
    fn no_broken_pipeline_makes_it_panic(
        model in model(), style in style(), at in any::<prop::sample::Index>(),
        cut in 0..6_usize, put in "[\\[\\]{}:\"'#&*!$.\n a-z0-9é-]{0,6}",
    ) {
        let mut text: Vec<char> = yaml(&model, &style).chars().collect();
        let at = at.index(text.len());
        let end = (at + cut).min(text.len());
        text.splice(at..end, put.chars());
        let text: String = text.into_iter().collect();
        if let Err(diagnostics) = plan(&text) {
            let errors = diagnostics.iter().filter(|d| d.severity == Severity::Error);
            prop_assert!(errors.count() > 0);
            let of_ours = diagnostics.iter().any(|d| d.message.contains("could not be checked"));
            prop_assert!(!of_ours, "{}", text);
            for d in diagnostics {
                prop_assert!(text.is_char_boundary(d.span.start), "{:?}", d);
                prop_assert!(text.is_char_boundary(d.span.end), "{:?}", d);
            }
        }
    }
}

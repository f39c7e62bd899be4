//! Whether a `tokenizer.json` says what the fast path does. Anything that is not known means no.

use std::collections::HashMap;

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Value, json};

use super::bytes::{ByteLevel, Pattern};
use super::wordpiece::WordPiece;
use super::{Model, Trim};

/// Llama 3's pattern, with the number of digits that go together.
const LLAMA3: [&str; 3] = [
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|",
    r"\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
];
const QWEN2_DIGITS: &str = r"\p{N}";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    #[serde(rename = "version")]
    _version: IgnoredAny,
    /// Cleared when a tokenizer is loaded, as is the next.
    #[serde(rename = "truncation", default)]
    _truncation: Option<IgnoredAny>,
    #[serde(rename = "padding", default)]
    _padding: Option<IgnoredAny>,
    /// Taken from the crate, which settles their ids.
    #[serde(rename = "added_tokens", default)]
    _added_tokens: Option<IgnoredAny>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    #[serde(rename = "decoder", default)]
    _decoder: Option<IgnoredAny>,
    model: WrittenModel,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenModel {
    r#type: String,
    vocab: HashMap<String, u32>,
    unk_token: Option<String>,
    continuing_subword_prefix: Option<String>,
    max_input_chars_per_word: Option<usize>,
    merges: Option<Vec<WrittenMerge>>,
    dropout: Option<f64>,
    end_of_word_suffix: Option<String>,
    #[serde(default)]
    fuse_unk: bool,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    ignore_merges: bool,
}

/// A merge as files have it since 2024, and before.
#[derive(Deserialize)]
#[serde(untagged)]
enum WrittenMerge {
    Pair(String, String),
    Line(String),
}

/// What the file says, as far as the fast path is concerned.
pub(super) struct Known {
    pub(super) model: Model,
    /// Text is composed (NFC) before it is split.
    pub(super) nfc: bool,
    /// Whether there is any normaliser.
    pub(super) normalizer: bool,
    pub(super) trim: Trim,
}

/// `None` when something is not known.
pub(super) fn read(file: &[u8]) -> Option<Known> {
    let written: Written = serde_json::from_slice(file).ok()?;
    let trim = trim(&written.post_processor)?;
    let normalizer = !written.normalizer.is_null();
    match written.model.r#type.as_str() {
        "WordPiece" => {
            let model = wordpiece(&written)?;
            let trim = if trim == Trim::None { trim } else { Trim::Unknown };
            Some(Known { model: Model::WordPiece(model), nfc: false, normalizer, trim })
        }
        "BPE" => {
            let nfc = written.normalizer == json!({ "type": "NFC" });
            let model = bytes(written, nfc)?;
            Some(Known { model: Model::Bytes(Box::new(model)), nfc, normalizer, trim })
        }
        _ => None,
    }
}

fn wordpiece(written: &Written) -> Option<WordPiece> {
    let mut normalizer = written.normalizer.clone();
    let object = normalizer.as_object_mut()?;
    let lowercase = object.remove("lowercase")?.as_bool()?;
    // ASCII has no accents and no Chinese characters.
    object.remove("strip_accents").filter(|v| v.is_null() || v.is_boolean())?;
    object.remove("handle_chinese_chars").filter(Value::is_boolean)?;
    if normalizer != json!({ "type": "BertNormalizer", "clean_text": true })
        || written.pre_tokenizer != json!({ "type": "BertPreTokenizer" })
    {
        return None;
    }
    let model = &written.model;
    let of_bpe = model.merges.is_some()
        || model.dropout.is_some()
        || model.end_of_word_suffix.is_some()
        || model.fuse_unk
        || model.byte_fallback
        || model.ignore_merges;
    let (prefix, unknown) = (model.continuing_subword_prefix.as_ref()?, model.unk_token.as_ref()?);
    let max_chars = model.max_input_chars_per_word?;
    if of_bpe {
        return None;
    }
    WordPiece::new(&model.vocab, prefix, unknown, max_chars, lowercase)
}

fn bytes(written: Written, nfc: bool) -> Option<ByteLevel> {
    if !nfc && !written.normalizer.is_null() {
        return None;
    }
    let pattern = pattern(&written.pre_tokenizer)?;
    let model = written.model;
    let empty = |text: &Option<String>| text.as_deref().is_none_or(str::is_empty);
    let known = model.unk_token.is_none()
        && model.max_input_chars_per_word.is_none()
        && empty(&model.continuing_subword_prefix)
        && empty(&model.end_of_word_suffix)
        && model.dropout.is_none_or(|p| p == 0.0)
        && !model.byte_fallback;
    if !known {
        return None;
    }
    let merges = model.merges?.into_iter().filter_map(|merge| match merge {
        WrittenMerge::Pair(left, right) => Some(Some((left, right))),
        WrittenMerge::Line(line) if line.starts_with("#version") => None,
        WrittenMerge::Line(line) => {
            let pair = line.split_once(' ').filter(|(_, right)| !right.contains(' '));
            Some(pair.map(|(left, right)| (left.to_owned(), right.to_owned())))
        }
    });
    let merges: Vec<(String, String)> = merges.collect::<Option<_>>()?;
    ByteLevel::new(pattern, &model.vocab, &merges, model.ignore_merges)
}

fn pattern(pre_tokenizer: &Value) -> Option<Pattern> {
    if is_byte_level(pre_tokenizer, true) {
        return Some(Pattern::Gpt2);
    }
    let object = pre_tokenizer.as_object().filter(|o| o.len() == 2 && o["type"] == "Sequence")?;
    let [first, second] = object.get("pretokenizers")?.as_array()?.as_slice() else { return None };
    if *first == json!({ "type": "Digits", "individual_digits": true }) {
        return is_byte_level(second, true).then_some(Pattern::Gpt2Digits);
    }
    let [before, three, after] = LLAMA3;
    let numbers = [(three, 3), (QWEN2_DIGITS, 1)].into_iter();
    let digits = numbers.into_iter().find_map(|(numbers, digits)| {
        let regex = format!("{before}{numbers}{after}");
        let split = json!({
            "type": "Split", "pattern": { "Regex": regex }, "behavior": "Isolated", "invert": false,
        });
        (*first == split).then_some(digits)
    })?;
    is_byte_level(second, false).then_some(Pattern::Llama3 { digits })
}

fn is_byte_level(value: &Value, use_regex: bool) -> bool {
    let Some(object) = value.as_object() else { return false };
    let known = ["type", "add_prefix_space", "trim_offsets", "use_regex"];
    let flag = |name: &str| object.get(name).and_then(Value::as_bool);
    object.get("type").is_some_and(|t| t == "ByteLevel")
        && object.keys().all(|key| known.contains(&key.as_str()))
        && flag("add_prefix_space") == Some(false)
        // on where it is not written
        && object.get("use_regex").map_or(Some(true), Value::as_bool) == Some(use_regex)
}

/// What becomes of the places of tokens that begin or end with a blank; ids never depend on it.
fn trim(post_processor: &Value) -> Option<Trim> {
    let flag = |name: &str, default: Option<bool>| match post_processor.get(name) {
        None => default,
        Some(value) => value.as_bool(),
    };
    match post_processor.get("type").and_then(Value::as_str) {
        None => post_processor.is_null().then_some(Trim::None),
        Some("BertProcessing") => Some(Trim::None),
        // a template may leave a text out, or have it twice
        Some("TemplateProcessing") => (sequences(&post_processor["single"])? == ["A"]
            && sequences(&post_processor["pair"])? == ["A", "B"])
        .then_some(Trim::None),
        Some("ByteLevel" | "RobertaProcessing") => {
            let (trims, prefix) = (flag("trim_offsets", None)?, flag("add_prefix_space", None)?);
            Some(if trims { Trim::Blanks { but_first: prefix } } else { Trim::None })
        }
        Some("Sequence") => {
            let parts = post_processor.get("processors")?.as_array()?;
            let mut trims = Vec::new();
            for part in parts {
                trims.push(self::trim(part)?);
            }
            trims.retain(|trim| *trim != Trim::None);
            match trims.as_slice() {
                [] => Some(Trim::None),
                [one] => Some(*one),
                _ => Some(Trim::Unknown),
            }
        }
        Some(_) => None,
    }
}

/// The texts in a template, in order.
fn sequences(template: &Value) -> Option<Vec<&str>> {
    let pieces = template.as_array()?.iter();
    pieces.filter_map(|piece| Some(piece.get("Sequence")?.get("id")?.as_str())).collect()
}

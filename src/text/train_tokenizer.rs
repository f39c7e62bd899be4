//! Training of small tokenizers.
//!
//! The merges are computed here and not by the tokenizers crate: its trainer numbers the
//! continuing characters of WordPiece in the order of a randomly seeded hash map, so that two
//! trainings on the same text give different files.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap};
use std::path::Path;

use anyhow::{Context as _, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tokenizers::{
    NormalizedString, Normalizer, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer,
};

use super::tokenizer::wrong;
use crate::source::Fault;

/// How a tokenizer splits text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Algorithm {
    /// Byte-level BPE, as GPT-2's: any text can be written; `<s>` begins it, `</s>` ends it.
    Bpe,
    /// WordPiece, as BERT's: lower case, `[CLS]` and `[SEP]` around the text.
    Wordpiece,
}

/// What is trained.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenizerSpec {
    /// How it splits text.
    pub algorithm: Algorithm,
    /// Most entries of the vocabulary, special tokens included.
    pub vocab_size: usize,
    /// A pair is merged if it is seen this often.
    pub min_frequency: u64,
    /// `model_max_length` in `tokenizer_config.json`.
    pub max_length: usize,
    /// A chat template for `tokenizer_config.json`.
    pub chat_template: Option<String>,
}

const BPE_SPECIALS: [&str; 4] = ["<s>", "</s>", "<pad>", "<unk>"];
const WORDPIECE_SPECIALS: [&str; 5] = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"];
/// Characters that WordPiece knows at most, the frequent ones first; BERT's trainer keeps as many.
const ALPHABET: usize = 1000;
/// Longer words are unknown to WordPiece.
const LONGEST_WORD: usize = 100;

impl Algorithm {
    fn specials(self) -> &'static [&'static str] {
        match self {
            Self::Bpe => &BPE_SPECIALS,
            Self::Wordpiece => &WORDPIECE_SPECIALS,
        }
    }

    /// Entries that any vocabulary has: special tokens and the known alphabet (all bytes), or at
    /// least one character of it.
    pub fn least_vocabulary(self) -> usize {
        match self {
            Self::Bpe => BPE_SPECIALS.len() + 256,
            Self::Wordpiece => WORDPIECE_SPECIALS.len() + 1,
        }
    }

    /// What continues a word is written with this before it.
    fn prefix(self) -> &'static str {
        match self {
            Self::Bpe => "",
            Self::Wordpiece => "##",
        }
    }

    /// `tokenizer.json` of a vocabulary.
    fn json(self, vocab: &[String], merges: &[(String, String)]) -> Value {
        let ids: Map<String, Value> =
            vocab.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
        let specials = self.specials();
        let added = specials.iter().enumerate().map(|(id, token)| {
            json!({
                "id": id, "content": token, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true,
            })
        });
        let special = |token: &str| json!({ "SpecialToken": { "id": token, "type_id": 0 } });
        let special_b = |token: &str| json!({ "SpecialToken": { "id": token, "type_id": 1 } });
        let a = json!({ "Sequence": { "id": "A", "type_id": 0 } });
        let b = json!({ "Sequence": { "id": "B", "type_id": 1 } });
        let used = |tokens: &[&str]| -> Map<String, Value> {
            let entries = tokens.iter().map(|token| {
                let id = specials.iter().position(|s| s == token);
                ((*token).to_owned(), json!({ "id": token, "ids": [id], "tokens": [token] }))
            });
            entries.collect()
        };
        let (normalizer, pre_tokenizer, post_processor, decoder, model) = match self {
            Self::Bpe => {
                let bytes = json!({
                    "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                    "use_regex": true,
                });
                let post = json!({
                    "type": "TemplateProcessing",
                    "single": [special("<s>"), a],
                    "pair": [special("<s>"), a, b],
                    "special_tokens": used(&["<s>"]),
                });
                let model = json!({
                    "type": "BPE", "dropout": null, "unk_token": null,
                    "continuing_subword_prefix": null, "end_of_word_suffix": null,
                    "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                    "vocab": ids, "merges": merges,
                });
                (Value::Null, bytes.clone(), post, bytes, model)
            }
            Self::Wordpiece => {
                let normalizer = json!({
                    "type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
                    "strip_accents": null, "lowercase": true,
                });
                let post = json!({
                    "type": "TemplateProcessing",
                    "single": [special("[CLS]"), a, special("[SEP]")],
                    "pair": [special("[CLS]"), a, special("[SEP]"), b, special_b("[SEP]")],
                    "special_tokens": used(&["[CLS]", "[SEP]"]),
                });
                let decoder = json!({ "type": "WordPiece", "prefix": "##", "cleanup": true });
                let model = json!({
                    "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                    "max_input_chars_per_word": LONGEST_WORD, "vocab": ids,
                });
                (normalizer, json!({ "type": "BertPreTokenizer" }), post, decoder, model)
            }
        };
        json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": added.collect::<Vec<_>>(),
            "normalizer": normalizer, "pre_tokenizer": pre_tokenizer,
            "post_processor": post_processor, "decoder": decoder, "model": model,
        })
    }

    /// `tokenizer_config.json`.
    fn config(self, spec: &TokenizerSpec) -> Value {
        let mut config = match self {
            Self::Bpe => json!({
                "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>",
                "unk_token": "<unk>", "tokenizer_class": "PreTrainedTokenizerFast",
                "clean_up_tokenization_spaces": false,
            }),
            Self::Wordpiece => json!({
                "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]",
                "unk_token": "[UNK]", "mask_token": "[MASK]", "do_lower_case": true,
                "tokenizer_class": "BertTokenizer",
            }),
        };
        config["model_max_length"] = json!(spec.max_length);
        if let Some(template) = &spec.chat_template {
            config["chat_template"] = json!(template);
        }
        config
    }
}

fn load(json: &Value) -> Result<tokenizers::Tokenizer> {
    tokenizers::Tokenizer::from_bytes(serde_json::to_vec(json)?).map_err(wrong("loading"))
}

/// Trains a tokenizer on texts and writes `tokenizer.json` and `tokenizer_config.json` into a
/// directory. `each` calls back with every text. Returns the size of the vocabulary.
///
/// # Errors
/// When there is no text, the vocabulary is too small for the alphabet, or the disk refuses.
pub fn train_tokenizer(
    spec: &TokenizerSpec,
    each: impl FnOnce(&mut dyn FnMut(&str) -> Result<()>) -> Result<()>,
    dir: &Path,
) -> Result<usize> {
    let algorithm = spec.algorithm;
    let specials: Vec<String> = algorithm.specials().iter().map(|s| (*s).to_owned()).collect();
    // the normaliser and the splitter of the finished tokenizer, on an empty vocabulary
    let splitter = load(&algorithm.json(&specials, &[]))?;
    let mut words: BTreeMap<String, u64> = BTreeMap::new();
    each(&mut |text| count_words(&splitter, text, &mut words))?;
    anyhow::ensure!(!words.is_empty(), "there is no text to train a tokenizer on");

    let alphabet = alphabet(algorithm, &words);
    let mut vocab = specials;
    vocab.extend(alphabet.iter().cloned());
    if vocab.len() > spec.vocab_size {
        let least = vocab.len();
        let fault = Fault::new(format!("a vocabulary of {} is too small", spec.vocab_size));
        let help = format!("special tokens and single characters alone are {least}");
        return Err(fault.help(help).into());
    }
    let merges = merge(algorithm.prefix(), &words, &mut vocab, spec);
    let tokenizer = load(&algorithm.json(&vocab, &merges))?;
    let text = tokenizer.to_string(true).map_err(wrong("writing"))?;
    let write = |name: &str, text: String| {
        std::fs::write(dir.join(name), text).with_context(|| format!("writing `{name}`"))
    };
    write("tokenizer.json", text + "\n")?;
    let config = serde_json::to_string_pretty(&algorithm.config(spec))?;
    write("tokenizer_config.json", config + "\n")?;
    Ok(vocab.len())
}

fn count_words(
    splitter: &tokenizers::Tokenizer,
    text: &str,
    words: &mut BTreeMap<String, u64>,
) -> Result<()> {
    let mut normal = NormalizedString::from(text);
    if let Some(normalizer) = splitter.get_normalizer() {
        normalizer.normalize(&mut normal).map_err(wrong("normalising"))?;
    }
    let mut split = PreTokenizedString::from(normal);
    if let Some(pre_tokenizer) = splitter.get_pre_tokenizer() {
        pre_tokenizer.pre_tokenize(&mut split).map_err(wrong("splitting"))?;
    }
    for (word, _, _) in split.get_splits(OffsetReferential::Original, OffsetType::Byte) {
        match words.get_mut(word) {
            Some(count) => *count += 1,
            None => {
                words.insert(word.to_owned(), 1);
            }
        }
    }
    Ok(())
}

/// Single characters: all 256 bytes, or those seen, and those seen inside a word once more as
/// such.
fn alphabet(algorithm: Algorithm, words: &BTreeMap<String, u64>) -> Vec<String> {
    if algorithm == Algorithm::Bpe {
        let bytes: BTreeSet<char> =
            tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().collect();
        return bytes.into_iter().map(String::from).collect();
    }
    let mut counts: BTreeMap<char, u64> = BTreeMap::new();
    for (word, count) in words {
        for c in word.chars() {
            *counts.entry(c).or_default() += count;
        }
    }
    let mut frequent: Vec<(Reverse<u64>, char)> =
        counts.into_iter().map(|(c, n)| (Reverse(n), c)).collect();
    frequent.sort_unstable();
    frequent.truncate(ALPHABET);
    let kept: BTreeSet<char> = frequent.into_iter().map(|(_, c)| c).collect();
    let mut inside = BTreeSet::new();
    for word in words.keys() {
        let rest = word.chars().skip(1).filter(|c| kept.contains(c));
        inside.extend(rest.map(|c| format!("##{c}")));
    }
    // any of them may begin a word that is still to come, as in BERT's trainer
    kept.into_iter().map(String::from).chain(inside).collect()
}

type Bigram = (u32, u32);

/// A word as tokens, and how often it is seen.
struct Word {
    symbols: Vec<u32>,
    count: u64,
}

impl Word {
    fn bigrams(&self) -> impl Iterator<Item = Bigram> + '_ {
        self.symbols.windows(2).map(|w| (w[0], w[1]))
    }

    fn merge(&mut self, (a, b): Bigram, new: u32) {
        let mut out = Vec::with_capacity(self.symbols.len());
        let mut at = 0;
        while at < self.symbols.len() {
            let here = self.symbols[at];
            if here == a && self.symbols.get(at + 1) == Some(&b) {
                out.push(new);
                at += 2;
            } else {
                out.push(here);
                at += 1;
            }
        }
        self.symbols = out;
    }
}

/// Joins the most frequent pair of neighbours (of equals the one with the smallest ids), again
/// and again, until the vocabulary is full or no pair is frequent enough (Sennrich et al., 2016).
fn merge(
    prefix: &str,
    counted: &BTreeMap<String, u64>,
    vocab: &mut Vec<String>,
    spec: &TokenizerSpec,
) -> Vec<(String, String)> {
    let mut ids: HashMap<String, u32> =
        vocab.iter().zip(0..).map(|(token, id)| (token.clone(), id)).collect();
    let symbols = |word: &str| {
        let tokens = word.chars().enumerate().map(|(i, c)| match i {
            0 => c.to_string(),
            _ => format!("{prefix}{c}"),
        });
        tokens.filter_map(|token| ids.get(&token).copied()).collect::<Vec<u32>>()
    };
    let mut words: Vec<Word> = counted
        .iter()
        .map(|(word, count)| Word { symbols: symbols(word), count: *count })
        .collect();
    let mut counts: HashMap<Bigram, u64> = HashMap::new();
    let mut places: HashMap<Bigram, BTreeSet<usize>> = HashMap::new();
    for (at, word) in words.iter().enumerate() {
        for bigram in word.bigrams() {
            *counts.entry(bigram).or_default() += word.count;
            places.entry(bigram).or_default().insert(at);
        }
    }
    let mut queue: BinaryHeap<(u64, Reverse<Bigram>)> =
        counts.iter().map(|(bigram, count)| (*count, Reverse(*bigram))).collect();
    let mut merges = Vec::new();
    while vocab.len() < spec.vocab_size {
        let Some((count, Reverse(bigram))) = queue.pop() else { break };
        let now = counts.get(&bigram).copied().unwrap_or(0);
        if now != count {
            // an entry from before other merges; it comes again where it now belongs
            if now > 0 && now < count {
                queue.push((now, Reverse(bigram)));
            }
            continue;
        }
        if count < spec.min_frequency.max(1) {
            break;
        }
        let (a, b) = (vocab[bigram.0 as usize].clone(), vocab[bigram.1 as usize].clone());
        let token = format!("{a}{}", b.strip_prefix(prefix).unwrap_or(&b));
        let new = ids.get(&token).copied().unwrap_or_else(|| {
            let id = u32::try_from(vocab.len()).unwrap_or(u32::MAX);
            ids.insert(token.clone(), id);
            vocab.push(token);
            id
        });
        merges.push((a, b));
        let mut grown = BTreeSet::new();
        for at in places.remove(&bigram).unwrap_or_default() {
            let word = &mut words[at];
            for old in word.bigrams() {
                if let Some(count) = counts.get_mut(&old) {
                    *count -= word.count;
                }
            }
            word.merge(bigram, new);
            for fresh in word.bigrams() {
                *counts.entry(fresh).or_default() += word.count;
                if fresh.0 == new || fresh.1 == new {
                    places.entry(fresh).or_default().insert(at);
                    grown.insert(fresh);
                }
            }
        }
        for fresh in grown {
            queue.push((counts[&fresh], Reverse(fresh)));
        }
    }
    merges
}

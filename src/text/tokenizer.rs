//! A tokenizer with the special tokens and the chat template that its files name.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, LazyLock};

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::chat::ChatTemplate;
use super::fast::Fast;
use crate::source::Fault;

/// The files of a tokenizer; all but the first are optional.
#[derive(Debug, Clone, Default)]
pub struct TokenizerSource {
    /// `tokenizer.json`.
    pub tokenizer: PathBuf,
    /// `tokenizer_config.json`.
    pub config: Option<PathBuf>,
    /// `special_tokens_map.json`; what `tokenizer_config.json` names wins.
    pub special_tokens_map: Option<PathBuf>,
    /// `chat_template.jinja`; it wins over the one in `tokenizer_config.json`.
    pub chat_template: Option<PathBuf>,
}

/// A fast path that is made when the first text is encoded.
type LazyFast = LazyLock<Option<Fast>, Box<dyn FnOnce() -> Option<Fast> + Send>>;

/// A tokenizer, ready to encode; cheap to clone.
///
/// For most tokenizers ids come from a path of its own, many times as fast as the `tokenizers`
/// crate and with the same result; [`Tokenizer::plain`] is without it.
#[derive(Clone)]
pub struct Tokenizer {
    pub(super) inner: Arc<tokenizers::Tokenizer>,
    fast: Option<Arc<LazyFast>>,
    /// Named tokens: `bos_token`, `eos_token`, `pad_token`, ….
    specials: BTreeMap<String, String>,
    chat_template: Option<String>,
    special_ids: BTreeSet<u32>,
    prefix: Vec<u32>,
    /// What it puts after one, if that and the prefix are all that it does to a text.
    suffix: Option<Vec<u32>>,
    vocab_size: usize,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (specials, vocab_size) = (&self.specials, self.vocab_size);
        let mut shown = f.debug_struct("Tokenizer");
        shown.field("specials", specials).field("vocab_size", &vocab_size).finish_non_exhaustive()
    }
}

/// The library's errors are boxed; anyhow wants them named.
pub(super) fn wrong(what: &str) -> impl Fn(tokenizers::Error) -> anyhow::Error + '_ {
    move |e| anyhow::anyhow!("{what}: {e}")
}

fn json(path: Option<&PathBuf>) -> Result<Value> {
    let Some(path) = path else { return Ok(Value::Null) };
    let text = std::fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("{} is not JSON", path.display()))
}

impl Tokenizer {
    /// Loads a tokenizer. Truncation and padding that `tokenizer.json` carries from the last
    /// program that used it are dropped: they are the step's to decide.
    ///
    /// # Errors
    /// When a file cannot be read or is not what it should be.
    pub fn load(source: &TokenizerSource) -> Result<Self> {
        let bytes = std::fs::read(&source.tokenizer)
            .with_context(|| format!("reading {}", source.tokenizer.display()))?;
        let mut inner = tokenizers::Tokenizer::from_bytes(&bytes)
            .map_err(wrong("`tokenizer.json` is not a tokenizer"))?;
        inner.with_truncation(None).map_err(wrong("clearing truncation"))?;
        inner.with_padding(None);

        let (config, map) =
            (json(source.config.as_ref())?, json(source.special_tokens_map.as_ref())?);
        let mut specials = BTreeMap::new();
        for values in [&map, &config] {
            for (name, value) in values.as_object().into_iter().flatten() {
                // an added token is written as its text or as {"content": …}
                let text = value.as_str().or_else(|| value.get("content")?.as_str());
                if let (true, Some(text)) = (name.ends_with("_token"), text) {
                    specials.insert(name.clone(), text.to_owned());
                }
            }
        }
        let file = source.chat_template.as_ref().map(std::fs::read_to_string).transpose()?;
        let chat_template = file.or_else(|| chat_template_of(&config["chat_template"]));

        let added = inner.get_added_vocabulary().get_added_tokens_decoder();
        let special_ids =
            added.iter().filter(|(_, token)| token.special).map(|(id, _)| *id).collect();
        let largest = inner.get_vocab(true).into_values().max();
        let vocab_size = largest.map_or(0, |id| id as usize + 1);
        let probe = inner.encode("a", true).map_err(wrong("encoding"))?;
        let added = probe.get_special_tokens_mask().iter().take_while(|m| **m == 1).count();
        let (before, rest) = probe.get_ids().split_at(added);
        let prefix = before.to_vec();
        let bare = inner.encode("a", false).map_err(wrong("encoding"))?;
        let special = inner
            .get_post_processor()
            .map_or(0, |p| tokenizers::PostProcessor::added_tokens(p, false));
        let suffix = rest.strip_prefix(bare.get_ids()).filter(|s| added + s.len() == special);
        let suffix = suffix.map(<[u32]>::to_vec);
        let inner = Arc::new(inner);
        let of = Arc::clone(&inner);
        let fast: LazyFast = LazyLock::new(Box::new(move || Fast::of(&of, &bytes)));
        let fast = Some(Arc::new(fast));
        Ok(Self { inner, fast, specials, chat_template, special_ids, prefix, suffix, vocab_size })
    }

    /// The same tokenizer as the `tokenizers` crate alone has it.
    #[must_use]
    pub fn plain(&self) -> Self {
        Self { fast: None, ..self.clone() }
    }

    /// Whether it has the fast path.
    pub fn is_fast(&self) -> bool {
        self.fast().is_some()
    }

    fn fast(&self) -> Option<&Fast> {
        self.fast.as_ref().and_then(|fast| LazyLock::force(fast).as_ref())
    }

    /// The text of a named token (`eos_token`).
    pub fn special(&self, name: &str) -> Option<&str> {
        self.specials.get(name).map(String::as_str)
    }

    fn special_id(&self, name: &str) -> Option<u32> {
        self.inner.token_to_id(self.special(name)?)
    }

    /// The end-of-sequence token, if one is named.
    pub fn eos_id(&self) -> Option<u32> {
        self.special_id("eos_token")
    }

    /// The padding token, if one is named.
    pub fn pad_id(&self) -> Option<u32> {
        self.special_id("pad_token")
    }

    /// The token that the tokenizer puts before a text, if it puts one.
    pub fn bos_id(&self) -> Option<u32> {
        self.prefix.first().copied()
    }

    /// What the tokenizer puts before a text.
    pub fn prefix(&self) -> &[u32] {
        &self.prefix
    }

    /// What the tokenizer puts after a text, if that and the prefix are all that it does to one.
    pub(super) fn suffix(&self) -> Option<&[u32]> {
        self.suffix.as_deref()
    }

    /// Whether a token is a special one.
    pub fn is_special(&self, id: u32) -> bool {
        self.special_ids.contains(&id)
    }

    /// Size of the vocabulary, added tokens included: largest id + 1.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Token ids of a text, nothing added.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.encode_up_to(text, usize::MAX)?.0)
    }

    /// Token ids of a text, nothing added; if there are more than `limit`, that many or more of
    /// the first of them. With the bytes that they are of.
    pub(super) fn encode_up_to(&self, text: &str, limit: usize) -> Result<(Vec<u32>, usize)> {
        if let Some(fast) = self.fast() {
            let mut ids = Vec::with_capacity((text.len() / 3 + 4).min(limit.saturating_add(16)));
            let done = fast.encode(&self.inner, text, limit, &mut ids)?;
            return Ok((ids, done));
        }
        let encoding = self.inner.encode_fast(text, false).map_err(wrong("encoding"))?;
        Ok((encoding.get_ids().to_vec(), text.len()))
    }

    /// Where the tokens of a text begin and end in it, in bytes.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn places(&self, text: &str) -> Result<Vec<(usize, usize)>> {
        self.places_of(text, None)
    }

    /// Like [`Tokenizer::places`], of a text whose tokens may be known.
    pub(super) fn places_of(&self, text: &str, ids: Option<&[u32]>) -> Result<Vec<(usize, usize)>> {
        if let Some(fast) = self.fast()
            && let Some(places) = fast.places(&self.inner, text, ids)?
        {
            return Ok(places);
        }
        let encoding = self.inner.encode(text, false).map_err(wrong("encoding"))?;
        Ok(encoding.get_offsets().to_vec())
    }

    /// Text of token ids.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        self.inner.decode(ids, skip_special_tokens).map_err(wrong("decoding"))
    }

    /// A token as the vocabulary writes it.
    pub fn token(&self, id: u32) -> String {
        self.inner.id_to_token(id).unwrap_or_else(|| format!("#{id}"))
    }

    /// The chat template, compiled; `date` is what `strftime_now` tells.
    ///
    /// # Errors
    /// When there is none or it does not compile.
    pub fn chat_template(&self, date: Option<&str>) -> Result<ChatTemplate> {
        let source = self.chat_template.as_deref().ok_or_else(|| {
            let help = "take the tokenizer of a chat model, or another template (`alpaca`)";
            Fault::new("this tokenizer has no chat template").help(help)
        })?;
        ChatTemplate::new(source, self.specials.clone(), date)
    }
}

/// A text, or a list of `{name, template}` of which the default one counts.
fn chat_template_of(value: &Value) -> Option<String> {
    let named = || value.as_array()?.iter().find(|t| t["name"] == "default")?.get("template");
    value.as_str().or_else(|| named()?.as_str()).map(str::to_owned)
}

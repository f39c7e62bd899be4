//! Token ids as the `tokenizers` crate gives them, many times as fast, for the two pipelines that
//! most models have: BERT's normaliser and pre-tokenizer with WordPiece, and byte-level BPE with
//! the patterns of GPT-2, SmolLM2, Llama 3 and Qwen2.
//!
//! The crate spends its time on keeping track of where each character came from; what a word's
//! tokens are, it finds quickly. So words are found here, by a scan of bytes, and their ids are
//! remembered. What a scan cannot tell is left to the crate, stretch by stretch: between two
//! blanks nothing that one side holds has a part in the other. That is, for BERT every stretch
//! that is not all ASCII, and for byte-level BPE none, unless text is composed (NFC) first.
//!
//! Taken only where `tokenizer.json` says nothing else ([`written`]).

mod bytes;
mod memo;
mod tables;
mod wordpiece;
mod written;

use std::sync::{Mutex, PoisonError};

use anyhow::Result;
use memchr::{memchr, memchr2, memchr3};
use tokenizers::Model as _;

use self::bytes::ByteLevel;
use self::memo::Memo;
use self::wordpiece::{Step, WordPiece};
use super::tokenizer::wrong;

enum Model {
    WordPiece(WordPiece),
    Bytes(Box<ByteLevel>),
}

/// What becomes of the places of tokens that begin or end with a blank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trim {
    None,
    /// The blanks are left out of them.
    Blanks {
        /// But not a single one at the beginning of the text.
        but_first: bool,
    },
    Unknown,
}

/// A token that is found in text before anything else.
struct Added {
    text: Box<[u8]>,
    id: u32,
}

/// The added tokens.
struct AddedTokens {
    /// Those that begin with a byte, the longest first.
    by_first: Vec<(u8, Vec<Added>)>,
    /// Whether a text that holds one is split there and nothing else happens; else such a text is
    /// the crate's.
    split: bool,
}

impl AddedTokens {
    /// `None` when what they do cannot be told from the text.
    fn of(inner: &tokenizers::Tokenizer, normalizer: bool) -> Option<Self> {
        let added = inner.get_added_vocabulary().get_added_tokens_decoder();
        let mut tokens: Vec<_> = added.iter().map(|(id, token)| (*id, token)).collect();
        tokens.sort_by_key(|(id, _)| *id);
        let (mut by_first, mut split) = (Vec::<(u8, Vec<Added>)>::new(), true);
        for (id, token) in &tokens {
            let blank = token.content.contains(char::is_whitespace);
            if normalizer && token.normalized || blank {
                return None;
            }
            split &= !(token.lstrip || token.rstrip || token.single_word);
            split &= token.normalized == tokens[0].1.normalized;
            let text: Box<[u8]> = token.content.as_bytes().into();
            let Some(first) = text.first().copied() else { continue };
            let added = Added { text, id: *id };
            match by_first.iter_mut().find(|(byte, _)| *byte == first) {
                Some((_, tokens)) => tokens.push(added),
                None => by_first.push((first, vec![added])),
            }
        }
        for (_, tokens) in &mut by_first {
            tokens.sort_by_key(|added| std::cmp::Reverse(added.text.len()));
        }
        Some(Self { by_first, split })
    }

    /// The first of them from a byte on, the longest of those that begin there.
    fn find(&self, text: &[u8], mut from: usize) -> Option<(usize, &Added)> {
        loop {
            let rest = text.get(from..)?;
            let at = match self.by_first.as_slice() {
                [] => None,
                [(a, _)] => memchr(*a, rest),
                [(a, _), (b, _)] => memchr2(*a, *b, rest),
                [(a, _), (b, _), (c, _)] => memchr3(*a, *b, *c, rest),
                many => rest.iter().position(|byte| many.iter().any(|(first, _)| first == byte)),
            };
            let at = from + at?;
            let tokens = self.by_first.iter().find(|(first, _)| *first == text[at]);
            let mut tokens = tokens.into_iter().flat_map(|(_, tokens)| tokens);
            if let Some(found) = tokens.find(|added| text[at..].starts_with(&added.text)) {
                return Some((at, found));
            }
            from = at + 1;
        }
    }
}

/// A tokenizer's fast path.
pub(super) struct Fast {
    model: Model,
    added: AddedTokens,
    nfc: bool,
    trim: Trim,
    /// One for each thread that is encoding, or was.
    memos: Mutex<Vec<Memo>>,
}

impl std::fmt::Debug for Fast {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fast").finish_non_exhaustive()
    }
}

impl Fast {
    /// The fast path of the tokenizer that a `tokenizer.json` was loaded as, if it has one.
    pub(super) fn of(inner: &tokenizers::Tokenizer, file: &[u8]) -> Option<Self> {
        let known = written::read(file)?;
        let added = AddedTokens::of(inner, known.normalizer)?;
        let (model, nfc, trim) = (known.model, known.nfc, known.trim);
        Some(Self { model, added, nfc, trim, memos: Mutex::new(Vec::new()) })
    }

    fn with_memo<T>(&self, act: impl FnOnce(&mut Memo) -> T) -> T {
        let mut memos = self.memos.lock().unwrap_or_else(PoisonError::into_inner);
        let mut memo = memos.pop().unwrap_or_else(Memo::new);
        drop(memos);
        let made = act(&mut memo);
        self.memos.lock().unwrap_or_else(PoisonError::into_inner).push(memo);
        made
    }

    /// Appends the ids of a text, nothing added; stops soon after there are `limit` of them, and
    /// returns the bytes that they are of.
    pub(super) fn encode(
        &self,
        inner: &tokenizers::Tokenizer,
        text: &str,
        limit: usize,
        ids: &mut Vec<u32>,
    ) -> Result<usize> {
        self.with_memo(|memo| {
            let mut at = 0;
            loop {
                let found = self.added.find(text.as_bytes(), at);
                let end = found.map_or(text.len(), |(start, _)| start);
                if at < end {
                    let done = self.stretch(inner, &text[at..end], limit, memo, ids)?;
                    if done < end - at {
                        return Ok(at + done);
                    }
                }
                match found {
                    Some(_) if !self.added.split => {
                        ids.clear();
                        whole(inner, text, ids)?;
                        return Ok(text.len());
                    }
                    Some(_) if ids.len() >= limit => return Ok(end),
                    Some((start, added)) => {
                        ids.push(added.id);
                        at = start + added.text.len();
                    }
                    None => return Ok(text.len()),
                }
            }
        })
    }

    /// Text without added tokens.
    fn stretch(
        &self,
        inner: &tokenizers::Tokenizer,
        text: &str,
        limit: usize,
        memo: &mut Memo,
        ids: &mut Vec<u32>,
    ) -> Result<usize> {
        let bytes = text.as_bytes();
        let mut at = 0;
        match &self.model {
            Model::WordPiece(model) => loop {
                match model.encode(bytes, at, limit, memo, ids, None) {
                    Step::Done(end) => return Ok(end),
                    Step::Foreign(start, end) => {
                        foreign(inner, &text[start..end], memo, ids)?;
                        at = end;
                    }
                }
            },
            Model::Bytes(model) => {
                let mut long = |word: &[u8], ids: &mut Vec<u32>| long_word(inner, word, ids);
                if !self.nfc || text.is_ascii() {
                    return model.encode(bytes, 0, limit, memo, ids, &mut long);
                }
                while at < text.len() && ids.len() < limit {
                    let end = next_cut(bytes, at);
                    if text[at..end].is_ascii() {
                        let part = &bytes[at..end];
                        at += model.encode(part, 0, limit, memo, ids, &mut long)?;
                    } else {
                        foreign(inner, &text[at..end], memo, ids)?;
                        at = end;
                    }
                }
                Ok(at)
            }
        }
    }

    /// Where the tokens of a text begin and end, in bytes, as the crate tells them; `None` where
    /// that is for the crate to say. `known` are the text's ids, if they are known.
    pub(super) fn places(
        &self,
        inner: &tokenizers::Tokenizer,
        text: &str,
        known: Option<&[u32]>,
    ) -> Result<Option<Vec<(usize, usize)>>> {
        let composed = self.nfc && !text.is_ascii();
        let added = self.added.find(text.as_bytes(), 0).is_some();
        if self.trim == Trim::Unknown || composed || added {
            return Ok(None);
        }
        self.with_memo(|memo| match &self.model {
            Model::WordPiece(model) => {
                let (mut ids, mut places, mut at) = (Vec::new(), Vec::new(), 0);
                loop {
                    let bytes = text.as_bytes();
                    let places_now = Some(&mut places);
                    match model.encode(bytes, at, usize::MAX, memo, &mut ids, places_now) {
                        Step::Done(_) => return Ok(Some(places)),
                        Step::Foreign(start, end) => {
                            let encoding = inner.encode(&text[start..end], false);
                            let encoding = encoding.map_err(wrong("encoding"))?;
                            ids.extend_from_slice(encoding.get_ids());
                            let of = encoding.get_offsets().iter();
                            places.extend(of.map(|(a, b)| (start + a, start + b)));
                            at = end;
                        }
                    }
                }
            }
            Model::Bytes(model) => {
                if let Some(ids) = known {
                    return Ok(self.byte_places(model, text, ids));
                }
                let mut ids = Vec::new();
                let mut long = |word: &[u8], ids: &mut Vec<u32>| long_word(inner, word, ids);
                model.encode(text.as_bytes(), 0, usize::MAX, memo, &mut ids, &mut long)?;
                Ok(self.byte_places(model, text, &ids))
            }
        })
    }

    /// The same of tokens that are bytes of the text, one after the other.
    fn byte_places(
        &self,
        model: &ByteLevel,
        text: &str,
        ids: &[u32],
    ) -> Option<Vec<(usize, usize)>> {
        let bytes = text.as_bytes();
        let (mut places, mut at) = (Vec::with_capacity(ids.len()), 0);
        for id in ids {
            let to = at + model.length(*id);
            let of = bytes.get(at..to)?;
            let mut leading = of.iter().take_while(|b| **b == b' ').count();
            let trailing = of.iter().rev().take_while(|b| **b == b' ').count();
            // a part of a character counts as all of it
            let (mut a, mut b) = (text.floor_char_boundary(at), text.ceil_char_boundary(to));
            if let Trim::Blanks { but_first } = self.trim {
                if a == 0 && but_first && leading == 1 {
                    leading = 0;
                }
                a = (a + leading).min(b);
                b = b.saturating_sub(trailing).max(a);
            }
            places.push((a, b));
            at = to;
        }
        // a byte without a token is left out of the ids
        (at == bytes.len()).then_some(places)
    }
}

/// Text as the crate encodes it.
fn whole(inner: &tokenizers::Tokenizer, text: &str, ids: &mut Vec<u32>) -> Result<()> {
    let encoding = inner.encode_fast(text, false).map_err(wrong("encoding"))?;
    ids.extend_from_slice(encoding.get_ids());
    Ok(())
}

/// A stretch that is the crate's.
fn foreign(
    inner: &tokenizers::Tokenizer,
    text: &str,
    memo: &mut Memo,
    ids: &mut Vec<u32>,
) -> Result<()> {
    if memo.recall_long(text.as_bytes(), ids) {
        return Ok(());
    }
    let before = ids.len();
    whole(inner, text, ids)?;
    memo.keep_long(text.as_bytes(), &ids[before..]);
    Ok(())
}

/// A word of byte-level BPE by the crate's model.
fn long_word(inner: &tokenizers::Tokenizer, word: &[u8], ids: &mut Vec<u32>) -> Result<()> {
    let word: String = word.iter().map(|byte| bytes::character(*byte)).collect();
    let tokens = inner.get_model().tokenize(&word).map_err(wrong("encoding"))?;
    ids.extend(tokens.iter().map(|token| token.id));
    Ok(())
}

/// The next blank after something that is none: for every pattern a word ends there, and
/// composing characters does not reach over it.
fn next_cut(text: &[u8], from: usize) -> usize {
    let mut at = from + 1;
    while let Some(next) = text.get(at..).and_then(|rest| memchr(b' ', rest)) {
        at += next;
        let mut start = at - 1;
        while text[start] & 0xc0 == 0x80 {
            start -= 1;
        }
        if tables::class_at(text, start, false).0 != tables::Class::Blank {
            return at;
        }
        at += 1;
    }
    text.len()
}

/// The first blank from a byte on that stands between two letters or digits of ASCII: wherever
/// two texts are cut there, a part of each can be joined, and no token is another.
pub(super) fn joint(text: &str, from: usize) -> Option<usize> {
    let bytes = text.as_bytes();
    let plain = |at: usize| bytes.get(at).is_some_and(u8::is_ascii_alphanumeric);
    let mut at = from.max(1);
    loop {
        at += memchr(b' ', bytes.get(at..)?)?;
        if plain(at - 1) && plain(at + 1) {
            return Some(at);
        }
        at += 1;
    }
}

//! WordPiece after BERT's normaliser and pre-tokenizer, on words of ASCII.

use std::collections::HashMap;
use std::hash::BuildHasherDefault;

use super::memo::{Key, Memo, SHORT, key, lowered, word};
use super::tables::{WordHasher, lengths};

type Vocabulary = HashMap<Box<[u8]>, u32, BuildHasherDefault<WordHasher>>;

/// What a byte is to the normaliser and the pre-tokenizer.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    /// Of a word.
    Word,
    /// Blank: space, tab, line feed, carriage return.
    Blank,
    /// A word by itself.
    Punctuation,
    /// Taken out.
    Control,
    /// The beginning or a part of another character.
    Other,
}

const CLASSES: [Class; 256] = {
    let mut classes = [Class::Other; 256];
    let mut byte = 0;
    while byte < 128 {
        let ascii = byte as u8;
        classes[byte] = match ascii {
            b' ' | b'\t' | b'\n' | b'\r' => Class::Blank,
            _ if ascii.is_ascii_control() => Class::Control,
            _ if ascii.is_ascii_punctuation() => Class::Punctuation,
            _ => Class::Word,
        };
        byte += 1;
    }
    classes
};

fn is_blank(byte: u8) -> bool {
    CLASSES[usize::from(byte)] == Class::Blank
}

/// The model with its normaliser.
pub(super) struct WordPiece {
    lowercase: bool,
    /// Tokens that begin a word.
    first: Vocabulary,
    /// Tokens that go on with one, without the mark that says so.
    further: Vocabulary,
    /// Bytes of the longest token.
    longest: usize,
    /// Bytes of each token, by id; those of the mark of tokens that go on with a word.
    lengths: Vec<u16>,
    mark: usize,
    unknown: u32,
    max_chars: usize,
}

/// How far an encoding came.
pub(super) enum Step {
    /// To here, which is a blank or the end.
    Done(usize),
    /// This stretch between two blanks is not all ASCII.
    Foreign(usize, usize),
}

impl WordPiece {
    /// `None` when the unknown token is not in the vocabulary, or two tokens have one id.
    pub(super) fn new(
        vocabulary: &HashMap<String, u32>,
        prefix: &str,
        unknown: &str,
        max_chars: usize,
        lowercase: bool,
    ) -> Option<Self> {
        let (mut first, mut further) = (Vocabulary::default(), Vocabulary::default());
        first.extend(vocabulary.iter().map(|(token, id)| (token.as_bytes().into(), *id)));
        further.extend(
            vocabulary.iter().filter_map(|(token, id)| {
                Some((token.strip_prefix(prefix)?.as_bytes().into(), *id))
            }),
        );
        let lengths = lengths(vocabulary.iter().map(|(token, id)| (*id, token.len())))?;
        let longest = vocabulary.keys().map(String::len).max().unwrap_or(0);
        let (unknown, mark) = (*vocabulary.get(unknown)?, prefix.len());
        Some(Self { lowercase, first, further, longest, lengths, mark, unknown, max_chars })
    }

    /// Encodes from a blank or the beginning on, until the text ends, there are `limit` ids, or a
    /// stretch is not all ASCII. With `ends`, where tokens begin and end; stretches with control
    /// characters are foreign then.
    pub(super) fn encode(
        &self,
        text: &[u8],
        mut at: usize,
        limit: usize,
        memo: &mut Memo,
        ids: &mut Vec<u32>,
        mut ends: Option<&mut Vec<(usize, usize)>>,
    ) -> Step {
        loop {
            while at < text.len() && is_blank(text[at]) {
                at += 1;
            }
            if at == text.len() || ids.len() >= limit {
                return Step::Done(at);
            }
            let (start, known) = (at, ids.len());
            while at < text.len() {
                let from = at;
                while at < text.len() && CLASSES[usize::from(text[at])] == Class::Word {
                    at += 1;
                }
                let class = text.get(at).map_or(Class::Blank, |b| CLASSES[usize::from(*b)]);
                let control = class == Class::Control;
                if class == Class::Other || control && ends.is_some() {
                    ids.truncate(known);
                    if let Some(ends) = &mut ends {
                        ends.truncate(known);
                    }
                    return Step::Foreign(start, stretch_end(text, at));
                }
                if control {
                    at = self.with_controls(text, from, memo, ids);
                    if text.get(at).is_some_and(|b| CLASSES[usize::from(*b)] == Class::Other) {
                        ids.truncate(known);
                        return Step::Foreign(start, stretch_end(text, at));
                    }
                    continue;
                }
                let before = ids.len();
                if from < at {
                    self.word(text, from, at, memo, ids);
                    self.note(&mut ends, from..at, &ids[before..]);
                }
                if class == Class::Blank {
                    break;
                }
                let before = ids.len();
                self.word(text, at, at + 1, memo, ids);
                self.note(&mut ends, at..at + 1, &ids[before..]);
                at += 1;
            }
        }
    }

    /// A word with control characters in it, which are as if they were not there; returns its end.
    fn with_controls(
        &self,
        text: &[u8],
        from: usize,
        memo: &mut Memo,
        ids: &mut Vec<u32>,
    ) -> usize {
        let rest = &text[from..];
        let inside = |b: &u8| matches!(CLASSES[usize::from(*b)], Class::Word | Class::Control);
        let length = rest.iter().position(|b| !inside(b)).unwrap_or(rest.len());
        let of_word = |b: &u8| CLASSES[usize::from(*b)] == Class::Word;
        let plain: Vec<u8> = rest[..length].iter().copied().filter(of_word).collect();
        if !plain.is_empty() {
            self.word(&plain, 0, plain.len(), memo, ids);
        }
        from + length
    }

    fn word(&self, text: &[u8], from: usize, to: usize, memo: &mut Memo, ids: &mut Vec<u32>) {
        if to - from <= SHORT {
            let key = key(text, from, to);
            let key = if self.lowercase { lowered(key) } else { key };
            if !memo.recall(key, ids) {
                self.short(key, memo, ids);
            }
            return;
        }
        let mut long = std::mem::take(&mut memo.word);
        long.clear();
        long.extend_from_slice(&text[from..to]);
        if self.lowercase {
            long.make_ascii_lowercase();
        }
        if !memo.recall_long(&long, ids) {
            let before = ids.len();
            self.pieces(&long, ids);
            memo.keep_long(&long, &ids[before..]);
        }
        memo.word = long;
    }

    #[cold]
    fn short(&self, key: Key, memo: &mut Memo, ids: &mut Vec<u32>) {
        let (bytes, length) = word(key);
        let bytes = &bytes[..length];
        // one of many tokens
        if memo.recall_long(bytes, ids) {
            return;
        }
        let before = ids.len();
        self.pieces(bytes, ids);
        memo.keep(key, &ids[before..]);
    }

    /// The longest token that fits, again and again; one unknown token if at some place none does.
    fn pieces(&self, word: &[u8], ids: &mut Vec<u32>) {
        let before = ids.len();
        let mut at = 0;
        while at < word.len() && word.len() <= self.max_chars {
            let known = if at == 0 { &self.first } else { &self.further };
            let longest = (at + self.longest).min(word.len());
            let found =
                (at + 1..=longest).rev().find_map(|to| Some((to, known.get(&word[at..to])?)));
            let Some((to, id)) = found else { break };
            ids.push(*id);
            at = to;
        }
        if at < word.len() {
            ids.truncate(before);
            ids.push(self.unknown);
        }
    }

    /// Notes where the tokens of a word lie.
    fn note(
        &self,
        ends: &mut Option<&mut Vec<(usize, usize)>>,
        word: std::ops::Range<usize>,
        ids: &[u32],
    ) {
        let Some(ends) = ends else { return };
        if let [_] = ids {
            ends.push((word.start, word.end));
            return;
        }
        let mut at = word.start;
        for id in ids {
            let mark = if at == word.start { 0 } else { self.mark };
            let end = at + usize::from(self.lengths[*id as usize]) - mark;
            ends.push((at, end));
            at = end;
        }
    }
}

fn stretch_end(text: &[u8], at: usize) -> usize {
    text[at..].iter().position(|b| is_blank(*b)).map_or(text.len(), |n| at + n)
}

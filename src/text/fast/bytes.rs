//! Byte-level BPE: the patterns that split text into words, and the merges of a word.

use std::collections::HashMap;
use std::hash::BuildHasherDefault;

use super::memo::{Key, Memo, SHORT, key, word};
use super::tables::{Class, Merge, Pairs, WordHasher, class_at, lengths};

/// How text is split into words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pattern {
    /// GPT-2's, which `ByteLevel` has built in.
    Gpt2,
    /// The same after every digit was taken out as a word (SmolLM2).
    Gpt2Digits,
    /// Llama 3's, and Qwen2's: numbers in groups of up to so many digits.
    Llama3 {
        /// 3 for Llama 3, 1 for Qwen2.
        digits: usize,
    },
}

/// Longer words are left to the crate, whose time does not grow with the square of the length.
pub(super) const LONGEST_WORD: usize = 512;

const NO_TOKEN: u32 = u32::MAX;

/// `'s`, `'t`, `'re`, `'ve`, `'m`, `'ll`, `'d` at an apostrophe: their bytes, 0 if none is there.
fn contraction(text: &[u8], at: usize, any_case: bool) -> usize {
    let letter = |i: usize| {
        let byte = text.get(at + i).copied().unwrap_or(0);
        if any_case { byte.to_ascii_lowercase() } else { byte }
    };
    match (letter(1), letter(2)) {
        (b's' | b't' | b'm' | b'd', _) => 2,
        (b'r' | b'v', b'e') | (b'l', b'l') => 3,
        // the long s is an s in another case
        (0xc5, 0xbf) if any_case => 3,
        _ => 0,
    }
}

fn run(text: &[u8], mut at: usize, of: Class, digits: bool) -> usize {
    while at < text.len() {
        let (class, length) = class_at(text, at, digits);
        if class != of {
            break;
        }
        at += length;
    }
    at
}

/// Blanks from one on: where they end, the last of them, and where the last line end among them
/// ends (0 without one).
fn blanks(text: &[u8], at: usize) -> (usize, usize, usize) {
    let (mut end, mut last, mut line) = (at, at, 0);
    while end < text.len() {
        let (class, length) = class_at(text, end, false);
        if class != Class::Blank {
            break;
        }
        last = end;
        end += length;
        if matches!(text[last], b'\r' | b'\n') {
            line = end;
        }
    }
    (end, last, line)
}

impl Pattern {
    /// Where the word that begins at a byte ends; `text` is all that the pattern sees.
    pub(super) fn word_end(self, text: &[u8], at: usize) -> usize {
        match self {
            Self::Gpt2 => gpt2(text, at, false),
            Self::Gpt2Digits => gpt2(text, at, true),
            Self::Llama3 { digits } => llama3(text, at, digits),
        }
    }
}

/// `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`
fn gpt2(text: &[u8], at: usize, digits: bool) -> usize {
    let byte = text[at];
    if byte == b'\'' {
        let length = contraction(text, at, false);
        if length > 0 {
            return at + length;
        }
    }
    let (class, length) = class_at(text, at, digits);
    let next = at + length;
    match class {
        Class::Blank => {
            if byte == b' ' && next < text.len() {
                let (class, length) = class_at(text, next, digits);
                if class != Class::Blank && !(digits && class == Class::Number) {
                    return run(text, next + length, class, digits);
                }
            }
            let (end, last, _) = blanks(text, at);
            // a digit is taken out before: the pattern sees an end
            let ends =
                end == text.len() || digits && class_at(text, end, digits).0 == Class::Number;
            if ends || last == at { end } else { last }
        }
        Class::Number if digits => next,
        class => run(text, next, class, digits),
    }
}

/// `(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*`
/// `|\s*[\r\n]+|\s+(?!\S)|\s+`
fn llama3(text: &[u8], at: usize, digits: usize) -> usize {
    let byte = text[at];
    if byte == b'\'' {
        let length = contraction(text, at, true);
        if length > 0 {
            return at + length;
        }
    }
    let (class, length) = class_at(text, at, false);
    let next = at + length;
    let following = || (next < text.len()).then(|| class_at(text, next, false));
    match class {
        Class::Letter => run(text, next, Class::Letter, false),
        Class::Number => {
            let mut end = next;
            for _ in 1..digits {
                match (end < text.len()).then(|| class_at(text, end, false)) {
                    Some((Class::Number, length)) => end += length,
                    _ => break,
                }
            }
            end
        }
        Class::Other | Class::NewNumber | Class::Blank => {
            let line_end = matches!(byte, b'\r' | b'\n');
            match following() {
                Some((Class::Letter, length)) if !line_end => {
                    return run(text, next + length, Class::Letter, false);
                }
                Some((Class::Other, _)) if byte == b' ' => return others(text, next),
                _ => {}
            }
            if class == Class::Other {
                return others(text, at);
            }
            let (end, last, line) = blanks(text, at);
            if line > 0 {
                line
            } else if end == text.len() || last == at {
                end
            } else {
                last
            }
        }
    }
}

/// `[^\s\p{L}\p{N}]+[\r\n]*`
fn others(text: &[u8], at: usize) -> usize {
    let end = run(text, at, Class::Other, false);
    let lines = text[end..].iter().take_while(|b| matches!(b, b'\r' | b'\n')).count();
    end + lines
}

/// The model.
pub(super) struct ByteLevel {
    pub(super) pattern: Pattern,
    /// Tokens of single bytes.
    atoms: [u32; 256],
    merges: Pairs,
    /// Whole words that are taken as they are (`ignore_merges`).
    whole: HashMap<Box<[u8]>, u32, BuildHasherDefault<WordHasher>>,
    /// Bytes of each token, by id.
    lengths: Vec<u16>,
}

/// The character that stands for a byte in vocabularies.
pub(super) fn character(byte: u8) -> char {
    let plain = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if plain(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|b| !plain(*b)).count() as u32;
    char::from_u32(256 + before).unwrap_or('\0')
}

/// Encodes a word that is too long.
pub(super) type Long<'a> = dyn FnMut(&[u8], &mut Vec<u32>) -> anyhow::Result<()> + 'a;

impl ByteLevel {
    /// `None` when two tokens have one id, or a merge is not of tokens.
    pub(super) fn new(
        pattern: Pattern,
        vocabulary: &HashMap<String, u32>,
        merges: &[(String, String)],
        ignore_merges: bool,
    ) -> Option<Self> {
        let characters: HashMap<char, u8> = (0..=255).map(|b| (character(b), b)).collect();
        let mut atoms = [NO_TOKEN; 256];
        for (byte, atom) in (0..=255).zip(&mut atoms) {
            if let Some(id) = vocabulary.get(character(byte).to_string().as_str()) {
                *atom = *id;
            }
        }
        let mut found = Vec::with_capacity(merges.len());
        let mut joint = String::new();
        for (rank, (left, right)) in merges.iter().enumerate() {
            joint.clear();
            joint.extend([left.as_str(), right.as_str()]);
            let pair = (*vocabulary.get(left)?, *vocabulary.get(right)?);
            let merge = Merge { rank: u32::try_from(rank).ok()?, id: *vocabulary.get(&joint)? };
            found.push((pair, merge));
        }
        let lengths = lengths(vocabulary.iter().map(|(t, id)| (*id, t.chars().count())))?;
        let mut whole = HashMap::default();
        if ignore_merges {
            whole.extend(vocabulary.iter().filter_map(|(token, id)| {
                let bytes = token.chars().map(|c| characters.get(&c).copied());
                // one that has other characters is never met
                Some((bytes.collect::<Option<Box<[u8]>>>()?, *id))
            }));
        }
        let merges = Pairs::new(found.into_iter());
        Some(Self { pattern, atoms, merges, whole, lengths })
    }

    /// Encodes from the beginning of a word on, until the text ends or there are `limit` ids;
    /// returns where it stopped. `long` encodes a word that is too long.
    pub(super) fn encode(
        &self,
        text: &[u8],
        mut at: usize,
        limit: usize,
        memo: &mut Memo,
        ids: &mut Vec<u32>,
        long: &mut Long<'_>,
    ) -> anyhow::Result<usize> {
        while at < text.len() && ids.len() < limit {
            let end = self.pattern.word_end(text, at);
            let length = end - at;
            if length <= SHORT {
                let key = key(text, at, end);
                if !memo.recall(key, ids) {
                    self.short(key, memo, ids);
                }
            } else if length > LONGEST_WORD {
                long(&text[at..end], ids)?;
            } else if !memo.recall_long(&text[at..end], ids) {
                let before = ids.len();
                self.merge(&text[at..end], memo, ids);
                memo.keep_long(&text[at..end], &ids[before..]);
            }
            at = end;
        }
        Ok(at)
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
        self.merge(bytes, memo, ids);
        memo.keep(key, &ids[before..]);
    }

    /// Merges the neighbours of the lowest rank, the leftmost first, until none is left. A byte
    /// without a token is left out, as in the crate.
    fn merge(&self, word: &[u8], memo: &mut Memo, ids: &mut Vec<u32>) {
        if let Some(id) = self.whole.get(word) {
            ids.push(*id);
            return;
        }
        const NEVER: u32 = u32::MAX;
        let (symbols, ranks) = (&mut memo.symbols, &mut memo.ranks);
        symbols.clear();
        symbols.extend(word.iter().map(|b| self.atoms[usize::from(*b)]).filter(|a| *a != NO_TOKEN));
        let rank = |left: u32, right: u32| self.merges.get(left, right).map_or(NEVER, |m| m.rank);
        ranks.clear();
        ranks.extend(symbols.windows(2).map(|pair| rank(pair[0], pair[1])));
        while let Some((at, lowest)) = lowest(ranks) {
            if lowest == NEVER {
                break;
            }
            let Some(merge) = self.merges.get(symbols[at], symbols[at + 1]) else { break };
            symbols[at] = merge.id;
            symbols.remove(at + 1);
            ranks.remove(at);
            if at > 0 {
                ranks[at - 1] = rank(symbols[at - 1], symbols[at]);
            }
            if at < ranks.len() {
                ranks[at] = rank(symbols[at], symbols[at + 1]);
            }
        }
        ids.extend_from_slice(symbols);
    }

    /// The bytes of a token.
    pub(super) fn length(&self, id: u32) -> usize {
        self.lengths.get(id as usize).map_or(0, |n| usize::from(*n))
    }
}

/// The first of the lowest.
fn lowest(ranks: &[u32]) -> Option<(usize, u32)> {
    let lowest = ranks.iter().copied().min()?;
    Some((ranks.iter().position(|rank| *rank == lowest)?, lowest))
}

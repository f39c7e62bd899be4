//! Tables that are read for every word: hashes of short bytes, merges by pair, character classes.

use std::hash::Hasher;
use std::sync::LazyLock;

/// A fast hash of short byte strings. What they are, the tokenizer's file says, so nobody chooses
/// them to collide.
#[derive(Default)]
pub(super) struct WordHasher(u64);

impl Hasher for WordHasher {
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.write_u64(u64::from_le_bytes(word));
        }
    }

    fn write_u64(&mut self, word: u64) {
        let product = u128::from(self.0 ^ word ^ 0x9e37_79b9_7f4a_7c15) * 0xa076_1d64_78bd_642f;
        self.0 = product as u64 ^ (product >> 64) as u64;
    }

    fn write_usize(&mut self, length: usize) {
        self.write_u64(length as u64);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// The length of each token by id; `None` if two have one id or one is longer than can be noted.
pub(super) fn lengths(tokens: impl Iterator<Item = (u32, usize)>) -> Option<Vec<u16>> {
    const NONE: u16 = u16::MAX;
    /// Vocabularies are smaller than that.
    const MOST: usize = 1 << 24;
    let mut lengths = Vec::new();
    for (id, length) in tokens {
        let (id, length) = (id as usize, u16::try_from(length).ok()?);
        if id >= MOST || length == NONE {
            return None;
        }
        if lengths.len() <= id {
            lengths.resize(id + 1, NONE);
        }
        if std::mem::replace(&mut lengths[id], length) != NONE {
            return None;
        }
    }
    Some(lengths)
}

/// What two neighbours become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Merge {
    /// Lower ones come first.
    pub(super) rank: u32,
    pub(super) id: u32,
}

/// Merges by pair of ids.
pub(super) struct Pairs {
    slots: Vec<(u64, Merge)>,
}

/// No pair of ids that a vocabulary has.
const FREE: u64 = u64::MAX;

impl Pairs {
    /// Of equal pairs the last counts.
    pub(super) fn new(merges: impl ExactSizeIterator<Item = ((u32, u32), Merge)>) -> Self {
        let none = (FREE, Merge { rank: 0, id: 0 });
        let mut pairs = Self { slots: vec![none; (merges.len() * 2 + 1).next_power_of_two()] };
        for ((left, right), merge) in merges {
            let (key, mut at) = pairs.place(left, right);
            while pairs.slots[at].0 != FREE && pairs.slots[at].0 != key {
                at = (at + 1) % pairs.slots.len();
            }
            pairs.slots[at] = (key, merge);
        }
        pairs
    }

    fn place(&self, left: u32, right: u32) -> (u64, usize) {
        let key = u64::from(left) << 32 | u64::from(right);
        let product = u128::from(key ^ 0x9e37_79b9_7f4a_7c15) * 0xa076_1d64_78bd_642f;
        let hash = product as u64 ^ (product >> 64) as u64;
        (key, hash as usize & (self.slots.len() - 1))
    }

    pub(super) fn get(&self, left: u32, right: u32) -> Option<Merge> {
        let (key, mut at) = self.place(left, right);
        loop {
            let (found, merge) = self.slots[at];
            if found == key {
                return Some(merge);
            }
            if found == FREE {
                return None;
            }
            at = (at + 1) & (self.slots.len() - 1);
        }
    }
}

/// What a character is to the patterns of byte-level tokenizers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    /// `\p{L}`
    Letter,
    /// `\p{N}`
    Number,
    /// `\s`
    Blank,
    /// Anything else.
    Other,
    /// A number to the standard library alone, which knows a newer Unicode; only in the table.
    NewNumber,
}

const ASCII: [Class; 128] = {
    let mut classes = [Class::Other; 128];
    let mut byte = 0;
    while byte < 128 {
        classes[byte] = match byte as u8 {
            b'a'..=b'z' | b'A'..=b'Z' => Class::Letter,
            b'0'..=b'9' => Class::Number,
            b'\t'..=b'\r' | b' ' => Class::Blank,
            _ => Class::Other,
        };
        byte += 1;
    }
    classes
};

/// The classes of all characters, from the tables of the same library that runs the patterns in
/// the `tokenizers` crate.
static ALL: LazyLock<Vec<Class>> = LazyLock::new(|| {
    let mut classes = vec![Class::Other; 0x11_0000];
    let named = [(r"\p{L}", Class::Letter), (r"\p{N}", Class::Number), (r"\s", Class::Blank)];
    for (pattern, class) in named {
        let parsed = regex_syntax::parse(pattern).map(regex_syntax::hir::Hir::into_kind);
        let Ok(regex_syntax::hir::HirKind::Class(regex_syntax::hir::Class::Unicode(set))) = parsed
        else {
            continue;
        };
        for range in set.ranges() {
            classes[range.start() as usize..=range.end() as usize].fill(class);
        }
    }
    for (code, class) in (0..).zip(&mut classes) {
        if *class == Class::Other && char::from_u32(code).is_some_and(char::is_numeric) {
            *class = Class::NewNumber;
        }
    }
    classes
});

/// The class of the character that begins at a byte of valid UTF-8, and its length; with `digits`,
/// a number is what `Digits` takes for one, and it asks the standard library.
#[inline]
pub(super) fn class_at(text: &[u8], at: usize, digits: bool) -> (Class, usize) {
    let byte = text[at];
    if byte < 0x80 { (ASCII[usize::from(byte)], 1) } else { foreign(text, at, digits) }
}

fn foreign(text: &[u8], at: usize, digits: bool) -> (Class, usize) {
    let byte = |i: usize| text.get(at + i).map_or(0, |b| u32::from(b & 0x3f));
    let first = u32::from(text[at]);
    let (code, length) = match first {
        0xf0.. => ((first & 7) << 18 | byte(1) << 12 | byte(2) << 6 | byte(3), 4),
        0xe0.. => ((first & 15) << 12 | byte(1) << 6 | byte(2), 3),
        _ => ((first & 31) << 6 | byte(1), 2),
    };
    let class = match ALL.get(code as usize) {
        Some(Class::NewNumber) if digits => Class::Number,
        None | Some(Class::NewNumber) => Class::Other,
        Some(class) => *class,
    };
    (class, length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_found() {
        let merge = |rank| Merge { rank, id: rank + 1000 };
        let all = (0..500u32).map(|i| ((i % 25, i / 25), merge(i)));
        let pairs = Pairs::new(all.collect::<Vec<_>>().into_iter());
        assert_eq!(pairs.get(7, 3), Some(merge(82)));
        assert_eq!(pairs.get(25, 3), None);
        assert_eq!(Pairs::new([].into_iter()).get(0, 0), None);
        let twice = Pairs::new([((1, 2), merge(1)), ((1, 2), merge(9))].into_iter());
        assert_eq!(twice.get(1, 2), Some(merge(9)), "the last one, as in the crate");
    }

    #[test]
    fn every_character_has_its_class() {
        let mut buffer = [0; 4];
        for character in '\0'..=char::MAX {
            let text = character.encode_utf8(&mut buffer).as_bytes();
            let (class, length) = class_at(text, 0, false);
            assert_eq!(length, text.len());
            assert_eq!(class == Class::Blank, character.is_whitespace(), "{character:?}");
            if class == Class::Number {
                assert!(character.is_numeric(), "{character:?}");
            }
            let by_digits = class_at(text, 0, true).0 == Class::Number;
            assert_eq!(by_digits, character.is_numeric(), "{character:?}");
            if class == Class::Letter {
                assert!(character.is_alphabetic(), "{character:?}");
            }
        }
    }

    #[test]
    fn lengths_need_ids_of_their_own() {
        assert_eq!(lengths([(1, 3), (0, 2)].into_iter()), Some(vec![2, 3]));
        assert_eq!(lengths([(1, 3), (1, 2)].into_iter()), None);
    }
}

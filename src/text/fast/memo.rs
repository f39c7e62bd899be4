//! What a thread remembers of words: their token ids.

use std::collections::HashMap;

/// Slots of the table of short words: 2 MiB a thread.
const SLOTS: usize = 1 << 16;
/// Words and stretches that do not fit a slot; beyond so many, or so many bytes, it begins anew.
const LONG: usize = 1 << 15;
const LONG_BYTES: usize = 8 << 20;
/// Longer stretches hardly come twice.
const LONGEST: usize = 512;

/// A word of up to 15 bytes with its length: equal keys are equal words.
pub(super) type Key = [u64; 2];

/// Most bytes of a word that has a [`Key`].
pub(super) const SHORT: usize = 15;

/// The key of `text[start..end]`, 1 to [`SHORT`] bytes.
pub(super) fn key(text: &[u8], start: usize, end: usize) -> Key {
    let length = end - start;
    let word = match text.get(start..start + 16).and_then(|w| <[u8; 16]>::try_from(w).ok()) {
        Some(word) => u128::from_le_bytes(word),
        None => {
            let mut word = [0; 16];
            word[..length].copy_from_slice(&text[start..end]);
            u128::from_le_bytes(word)
        }
    };
    let word = word & ((1 << (8 * length)) - 1) | (length as u128) << 120;
    [word as u64, (word >> 64) as u64]
}

/// The bytes of a key, lower case, and how many of them count.
pub(super) fn lowered(key: Key) -> Key {
    // The length in the last byte is below `A`.
    key.map(|word| {
        const ONES: u64 = 0x0101_0101_0101_0101;
        let upper = (word + ONES * (0x80 - b'A' as u64)) ^ (word + ONES * (0x7f - b'Z' as u64));
        word | (upper & (ONES * 0x80)) >> 2
    })
}

/// The word of a key.
pub(super) fn word(key: Key) -> ([u8; 16], usize) {
    let bytes = (u128::from(key[0]) | u128::from(key[1]) << 64).to_le_bytes();
    (bytes, usize::from(bytes[SHORT]))
}

#[derive(Debug, Clone, Copy, Default)]
#[repr(align(32))]
struct Slot {
    key: Key,
    ids: [u32; 3],
    count: u32,
}

/// Token ids of words that were met, for one thread; bounded, and without any effect on what
/// comes out.
pub(super) struct Memo {
    short: Vec<Slot>,
    long: HashMap<Box<[u8]>, Box<[u32]>>,
    long_bytes: usize,
    /// For words that are being split.
    pub(super) symbols: Vec<u32>,
    pub(super) ranks: Vec<u32>,
    pub(super) word: Vec<u8>,
}

impl Memo {
    pub(super) fn new() -> Self {
        Self {
            short: vec![Slot::default(); SLOTS],
            long: HashMap::new(),
            long_bytes: 0,
            symbols: Vec::new(),
            ranks: Vec::new(),
            word: Vec::new(),
        }
    }

    fn slot(key: Key) -> usize {
        let product =
            u128::from(key[0] ^ 0x9e37_79b9_7f4a_7c15) * u128::from(key[1] ^ 0xd1b5_4a32_d192_ed03);
        let hash = product as u64 ^ (product >> 64) as u64;
        (hash >> 48) as usize % SLOTS
    }

    /// Appends the ids of a short word, if they are known.
    #[inline]
    pub(super) fn recall(&self, key: Key, ids: &mut Vec<u32>) -> bool {
        let slot = &self.short[Self::slot(key)];
        if slot.key != key {
            return false;
        }
        match slot.count {
            1 => ids.push(slot.ids[0]),
            count => ids.extend_from_slice(&slot.ids[..(count as usize).min(3)]),
        }
        true
    }

    /// Remembers the ids of a short word, in place of another one; more than three as those of
    /// anything else.
    pub(super) fn keep(&mut self, key: Key, ids: &[u32]) {
        let Some(count) = u32::try_from(ids.len()).ok().filter(|n| *n <= 3) else {
            let (bytes, length) = word(key);
            return self.keep_long(&bytes[..length], ids);
        };
        let slot = &mut self.short[Self::slot(key)];
        slot.ids[..ids.len()].copy_from_slice(ids);
        (slot.key, slot.count) = (key, count);
    }

    /// Appends the ids of anything else, if they are known.
    pub(super) fn recall_long(&self, stretch: &[u8], ids: &mut Vec<u32>) -> bool {
        let known = self.long.get(stretch);
        known.is_some_and(|known| {
            ids.extend_from_slice(known);
            true
        })
    }

    /// Remembers the ids of anything else.
    pub(super) fn keep_long(&mut self, stretch: &[u8], ids: &[u32]) {
        if stretch.len() > LONGEST {
            return;
        }
        if self.long.len() >= LONG || self.long_bytes > LONG_BYTES {
            self.long.clear();
            self.long_bytes = 0;
        }
        self.long_bytes += stretch.len() + 4 * ids.len();
        self.long.insert(stretch.into(), ids.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_tell_words_apart() {
        let text = b"abcABCxyz[@`{ 0123456789";
        for end in 1..=SHORT {
            let (bytes, length) = word(key(text, 0, end));
            assert_eq!(&bytes[..length], &text[..end]);
            let (bytes, length) = word(lowered(key(text, 0, end)));
            assert_eq!(&bytes[..length], text[..end].to_ascii_lowercase());
        }
        // at the end of a text there are no 16 bytes to read
        assert_eq!(key(b"abc", 0, 3), key(text, 0, 3));
        assert_ne!(key(b"ab\0", 0, 3), key(b"ab", 0, 2));
        let all: Vec<u8> = (0..128).collect();
        for start in 0..112 {
            let (bytes, length) = word(lowered(key(&all, start, start + SHORT)));
            assert_eq!(&bytes[..length], all[start..start + SHORT].to_ascii_lowercase());
        }
    }

    #[test]
    fn words_are_recalled() {
        let (mut memo, mut ids) = (Memo::new(), Vec::new());
        let hello = key(b"hello", 0, 5);
        assert!(!memo.recall(hello, &mut ids));
        memo.keep(hello, &[1, 2]);
        assert!(memo.recall(hello, &mut ids) && ids == [1, 2]);
        memo.keep(key(b"nothing", 0, 7), &[]);
        assert!(memo.recall(key(b"nothing", 0, 7), &mut ids) && ids == [1, 2]);
        memo.keep(key(b"many", 0, 4), &[1, 2, 3, 4]);
        assert!(!memo.recall(key(b"many", 0, 4), &mut ids));
        assert!(memo.recall_long(b"many", &mut ids) && ids.split_off(2) == [1, 2, 3, 4]);
        memo.keep_long(b"a longer one than that", &[9]);
        assert!(memo.recall_long(b"a longer one than that", &mut ids) && ids == [1, 2, 9]);
    }
}

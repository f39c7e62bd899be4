//! Memos: parts of results, by a key of their own, so that a step that runs again makes only what
//! is new.
//!
//! `memos/ab/cdef…` holds the BLAKE3 of what follows, then the bytes: what is damaged, or was cut
//! off by a crash of the machine, is not taken. `memo-uses/<key>` lists the memos that the result
//! of a step was made of, 32 bytes each: as long as the step's key is kept, they are. A memo that
//! is gone is made again, so nothing depends on one, and none is waited for until the disk has it.

use std::collections::BTreeSet;
use std::path::PathBuf;

use anyhow::Result;

use super::{Store, StoreError};
use crate::digest::Digest;

impl Store {
    fn memo_path(&self, key: &Digest) -> PathBuf {
        self.place("memos", key)
    }

    /// The bytes that were kept under a key, if they are there and undamaged. Damaged ones are set
    /// aside.
    pub fn memo(&self, key: &Digest) -> Option<Vec<u8>> {
        let path = self.memo_path(key);
        let mut bytes = std::fs::read(&path).ok()?;
        let sound = bytes.len() >= Digest::LENGTH && {
            let (digest, rest) = bytes.split_at(Digest::LENGTH);
            Digest::of(rest).as_bytes() == digest
        };
        if !sound {
            // If it cannot be (a read-only store), it is missing all the same.
            let _ = self.quarantine(&path);
            return None;
        }
        bytes.drain(..Digest::LENGTH);
        Some(bytes)
    }

    /// Keeps bytes under a key.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn keep_memo(&self, key: &Digest, bytes: &[u8]) -> Result<(), StoreError> {
        let whole = [Digest::of(bytes).as_bytes(), bytes].concat();
        self.unsynced().write_atomic(&self.memo_path(key), &whole)
    }

    fn uses_path(&self, step: &Digest) -> PathBuf {
        self.root().join("memo-uses").join(step.to_string())
    }

    /// Notes which memos the result of a step's key was made of.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn note_memos(&self, step: &Digest, memos: &BTreeSet<Digest>) -> Result<(), StoreError> {
        let list: Vec<u8> = memos.iter().flat_map(|memo| *memo.as_bytes()).collect();
        self.unsynced().write_atomic(&self.uses_path(step), &list)
    }

    /// The memos that the result of a step's key was made of, as far as is known.
    pub fn memos_of(&self, step: &Digest) -> Vec<Digest> {
        let list = std::fs::read(self.uses_path(step)).unwrap_or_default();
        let (digests, _) = list.as_chunks::<{ Digest::LENGTH }>();
        digests.iter().map(|digest| Digest::from_bytes(*digest)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memos_come_back_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap();
        let (key, other) = (Digest::of(b"key"), Digest::of(b"other"));
        assert_eq!(store.memo(&key), None);
        store.keep_memo(&key, b"bytes").unwrap();
        store.keep_memo(&key, b"bytes").unwrap();
        store.keep_memo(&other, b"").unwrap();
        assert_eq!(store.memo(&key).as_deref(), Some(&b"bytes"[..]));
        assert_eq!(store.memo(&other).as_deref(), Some(&b""[..]));
        let path = store.memo_path(&key);
        let whole = std::fs::read(&path).unwrap();
        for cut in 0..whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            assert_eq!(store.memo(&key), None, "cut at {cut}");
            assert!(!path.exists(), "it is set aside");
        }
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            std::fs::write(&path, damaged).unwrap();
            assert_eq!(store.memo(&key), None, "damaged at {at}");
        }
    }

    #[test]
    fn uses_are_noted() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap();
        let memos = BTreeSet::from([Digest::of(b"a"), Digest::of(b"b")]);
        let step = Digest::of(b"step");
        assert!(store.memos_of(&step).is_empty());
        store.note_memos(&step, &memos).unwrap();
        assert!(store.memos_of(&step).iter().eq(&memos));
    }
}

//! Memos: parts of results, by a key of their own, so that a step that runs again makes only what
//! is new.
//!
//! Memos that have all but their rows in common (one tokenizer, one set of limits) are of one
//! *scope*. `memos/<scope>.<pack>` holds those that one attempt made, one after the other: key,
//! BLAKE3 of the bytes, length, bytes. They share a file because a file for each costs more than
//! making what is in it. What is damaged, or was cut off by a crash, is not taken. A memo that is
//! gone is made again, so nothing depends on one, and none is waited for until the disk has it.
//!
//! `memo-uses/<key>` lists the packs that the result of a step was made of, 32 bytes each: as long
//! as the step's key is kept, they are.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::Result;

use super::{Item, Store, StoreError, host, unique};
use crate::digest::Digest;

/// Bytes before those of a memo: its key, its digest, its length.
const HEAD: usize = 2 * Digest::LENGTH + 8;

/// The memos of one scope: those that were kept when it was opened, and what is kept since. Threads
/// share it.
#[derive(Debug)]
pub struct Memos {
    store: Store,
    scope: Digest,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    places: HashMap<Digest, Place>,
    own: Own,
}

/// Where a memo is.
#[derive(Debug, Clone, Copy)]
struct Place {
    pack: Digest,
    start: u64,
    length: u64,
    digest: Digest,
}

/// The pack that is written.
#[derive(Debug, Default)]
enum Own {
    #[default]
    None,
    Open {
        pack: Digest,
        file: File,
        end: u64,
    },
    /// The disk refused: what follows a memo that is cut off could not be told from it.
    Refused,
}

impl Memos {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, pack: &Digest) -> PathBuf {
        self.store.root().join("memos").join(format!("{}.{pack}", self.scope))
    }

    /// The bytes that were kept under a key, if they are there and undamaged, with the pack that
    /// they are in. A pack that is damaged is set aside.
    pub fn get(&self, key: &Digest) -> Option<(Vec<u8>, Digest)> {
        let place = *self.known().places.get(key)?;
        let path = self.path(&place.pack);
        let read = || -> io::Result<Vec<u8>> {
            let mut bytes = vec![0; usize::try_from(place.length).map_err(io::Error::other)?];
            File::open(&path)?.read_exact_at(&mut bytes, place.start)?;
            Ok(bytes)
        };
        let bytes = read().ok().filter(|bytes| Digest::of(bytes) == place.digest);
        if bytes.is_none() {
            self.known().places.retain(|_, other| other.pack != place.pack);
            // If it cannot be (a read-only store), it is missing all the same.
            let _ = self.store.quarantine(&path);
        }
        Some((bytes?, place.pack))
    }

    /// Keeps bytes under a key; returns the pack that they are in.
    ///
    /// # Errors
    /// When the disk refuses, now or before.
    pub fn keep(&self, key: &Digest, bytes: &[u8]) -> Result<Digest, StoreError> {
        let (digest, length) = (Digest::of(bytes), bytes.len() as u64);
        let head = [key.as_bytes(), digest.as_bytes(), &length.to_le_bytes()[..]].concat();
        let mut known = self.known();
        let pack = match &known.own {
            Own::Open { pack, .. } => *pack,
            Own::None | Own::Refused => new_name(),
        };
        let path = self.path(&pack);
        let disk = self.store.disk();
        if matches!(known.own, Own::None) {
            // one attempt at a refusing disk is enough
            known.own = Own::Refused;
            known.own = Own::Open { pack, file: disk.open_append(&path)?, end: 0 };
        }
        let Own::Open { file, end, .. } = &mut known.own else {
            let refused = io::Error::other("an earlier part could not be kept");
            return Err(StoreError::from_io("appending to", &path, refused));
        };
        let start = *end + HEAD as u64;
        let written =
            disk.append(file, &head, &path).and_then(|()| disk.append(file, bytes, &path));
        *end = start + length;
        if let Err(e) = written {
            known.own = Own::Refused;
            return Err(e);
        }
        known.places.insert(*key, Place { pack, start, length, digest });
        Ok(pack)
    }
}

/// A name that no pack has, on whatever host.
fn new_name() -> Digest {
    let now = std::time::SystemTime::now();
    Digest::of(format!("{} {} {now:?}", host(), unique()).as_bytes())
}

/// Where the memos of a pack are.
fn places(path: &Path, pack: Digest) -> io::Result<Vec<(Digest, Place)>> {
    let file = File::open(path)?;
    let size = file.metadata()?.len();
    let (mut found, mut start, mut head) = (Vec::new(), HEAD as u64, [0; HEAD]);
    while start <= size {
        file.read_exact_at(&mut head, start - HEAD as u64)?;
        let (digests, length) = head.as_chunks::<{ Digest::LENGTH }>();
        let length = length.first_chunk().map_or(0, |length| u64::from_le_bytes(*length));
        let Some(end) = start.checked_add(length).filter(|end| *end <= size) else { break };
        let [key, digest] = [0, 1].map(|at| Digest::from_bytes(digests[at]));
        found.push((key, Place { pack, start, length, digest }));
        start = end + HEAD as u64;
    }
    Ok(found)
}

impl Store {
    /// The memos of a scope: of all that decides them but what is in their keys.
    pub fn memos(&self, scope: &Digest) -> Memos {
        let mut known = Known::default();
        let of_scope = format!("{scope}.");
        // What cannot be read is made again.
        for (pack, path) in self.packs().unwrap_or_default() {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if name.starts_with(&of_scope) {
                known.places.extend(places(&path, pack).unwrap_or_default());
            }
        }
        Memos { store: self.unsynced(), scope: *scope, known: Mutex::new(known) }
    }

    fn packs(&self) -> io::Result<Vec<(Digest, PathBuf)>> {
        let names = std::fs::read_dir(self.root().join("memos"))?;
        let paths = names.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
        Ok(paths.into_iter().filter_map(|path| Some((pack_of(&path)?, path))).collect())
    }

    /// Packs of memos, and what else lies among them.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn memo_packs(&self) -> Result<(BTreeMap<Digest, Item>, Vec<Item>), StoreError> {
        let (mut packs, mut others) = (BTreeMap::new(), Vec::new());
        for item in self.items("memos")? {
            match pack_of(&item.path) {
                Some(pack) => drop(packs.insert(pack, item)),
                None => others.push(item),
            }
        }
        Ok((packs, others))
    }

    fn uses_path(&self, step: &Digest) -> PathBuf {
        self.root().join("memo-uses").join(step.to_string())
    }

    /// Notes which packs of memos the result of a step's key was made of.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn note_memos(&self, step: &Digest, packs: &BTreeSet<Digest>) -> Result<(), StoreError> {
        let list: Vec<u8> = packs.iter().flat_map(|pack| *pack.as_bytes()).collect();
        self.unsynced().write_atomic(&self.uses_path(step), &list)
    }

    /// The packs of memos that the result of a step's key was made of, as far as is known.
    pub fn memos_of(&self, step: &Digest) -> Vec<Digest> {
        let list = std::fs::read(self.uses_path(step)).unwrap_or_default();
        let (digests, _) = list.as_chunks::<{ Digest::LENGTH }>();
        digests.iter().map(|digest| Digest::from_bytes(*digest)).collect()
    }
}

/// The pack that a file is, by its name.
fn pack_of(path: &Path) -> Option<Digest> {
    let (scope, pack) = path.file_name()?.to_str()?.split_once('.')?;
    scope.parse::<Digest>().ok()?;
    pack.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::super::{Disk, Faults};
    use super::*;

    #[test]
    fn memos_come_back_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap();
        let (key, other) = (Digest::of(b"key"), Digest::of(b"other"));
        let scope = Digest::of(b"scope");
        let memos = store.memos(&scope);
        assert_eq!(memos.get(&key), None);
        let pack = memos.keep(&other, b"").unwrap();
        assert_eq!(memos.keep(&key, b"bytes").unwrap(), pack);
        memos.keep(&key, b"bytes").unwrap();
        let again = store.memos(&scope);
        for memos in [&memos, &again] {
            assert_eq!(memos.get(&key), Some((b"bytes".to_vec(), pack)));
            assert_eq!(memos.get(&other), Some((Vec::new(), pack)));
        }
        assert_eq!(store.memos(&key).get(&key), None, "of another scope");
        // what another attempt keeps is in a pack of its own
        let more = Digest::of(b"more");
        assert_ne!(again.keep(&more, b"more").unwrap(), pack);
        assert_eq!(store.memo_packs().unwrap().0.len(), 2);
        let path = memos.path(&pack);
        let whole = std::fs::read(&path).unwrap();
        let first = HEAD + HEAD + b"bytes".len();
        for cut in 0..whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let found = store.memos(&scope).get(&key);
            assert_eq!(found.is_some(), cut >= first, "cut at {cut}");
            assert!(found.is_none_or(|(bytes, _)| bytes == b"bytes"));
        }
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            std::fs::write(&path, damaged).unwrap();
            let memos = store.memos(&scope);
            for (key, bytes) in [(&key, &b"bytes"[..]), (&other, b"")] {
                let found = memos.get(key);
                assert!(found.is_none_or(|found| found.0 == bytes), "damaged at {at}");
            }
            assert_eq!(memos.get(&more).unwrap().0, b"more");
        }
        std::fs::write(&path, &whole).unwrap();
        let memos = store.memos(&scope);
        std::fs::write(&path, vec![7; whole.len()]).unwrap();
        assert_eq!(memos.get(&key), None);
        assert!(!path.exists(), "it is set aside");
    }

    #[test]
    fn nothing_follows_a_memo_that_the_disk_refused() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("store");
        Store::open(&root).unwrap();
        let keys = [1_u8, 2, 3].map(|n| Digest::of(&[n]));
        let scope = Digest::of(b"scope");
        for n in 1.. {
            let _ = std::fs::remove_dir_all(root.join("memos"));
            let faults = Faults::at(n);
            let store = Store::open_on(&root, Disk::faulty(faults.clone())).unwrap();
            let memos = store.memos(&scope);
            let kept = keys.map(|key| memos.keep(&key, key.as_bytes()).is_ok());
            let failed = kept.iter().position(|kept| !kept).unwrap_or(keys.len());
            assert!(kept[failed..].iter().all(|kept| !kept), "{kept:?} at call {n}");
            for memos in [&memos, &store.memos(&scope)] {
                let found = keys.map(|key| memos.get(&key).is_some());
                assert_eq!(found, kept, "at call {n}");
            }
            if faults.calls() < n {
                assert_eq!(kept, [true; 3]);
                return;
            }
        }
    }

    #[test]
    fn uses_are_noted() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap();
        let packs = BTreeSet::from([Digest::of(b"a"), Digest::of(b"b")]);
        let step = Digest::of(b"step");
        assert!(store.memos_of(&step).is_empty());
        store.note_memos(&step, &packs).unwrap();
        assert!(store.memos_of(&step).iter().eq(&packs));
    }
}

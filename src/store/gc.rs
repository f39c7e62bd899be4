//! What lies in a store, file by file, and how it is removed. What may go, `lineage` knows.
//!
//! A sweep has the store alone ([`Store::try_lock_alone`]) from the moment it reads what refers to
//! what until the last file is gone. Whoever is about to rely on something that nothing on record
//! protects yet shares the store ([`Store::lock_shared`]) until it is on record:
//!
//! - a run, from looking keys up until its journal names them: from then on the journal of a run
//!   that is alive protects them;
//! - an attempt, from importing its first file (which may be there already, from a result that is
//!   about to be swept) until its record is written: its key is in the journal of its run;
//! - a pin, from checking what it pins until it is written;
//! - anything else that reads or writes results without a run, for as long as it does.
//!
//! So a sweep sees either that something is in use or that it is not, and runs go on beside it:
//! they hold the lock for moments, never while a step computes. The kernel frees it when a holder
//! dies. On a file system whose locks do not reach other hosts there is still the grace age of what
//! nothing refers to; should a file go in spite of it, every look-up and every read notices: a miss
//! with its reason, or a failed step, and the next run makes it again.
//!
//! Records go first and reach the disk before anything else goes, journals last: a sweep that is
//! cut off leaves files that nothing refers to, for the next one.

use std::collections::BTreeMap;
use std::fs::Metadata;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::{Store, StoreError};
use crate::digest::Digest;

/// A file or folder of a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// Where it is.
    pub path: PathBuf,
    /// Its size, with all that is in it.
    pub bytes: u64,
    /// When it, or the newest file in it, was last written; Unix milliseconds.
    pub modified_unix_ms: u64,
}

impl Item {
    /// Its name, as far as it is text.
    pub fn name(&self) -> &str {
        self.path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
    }

    /// Measures a path, of which this is the metadata; links in a folder are not followed. `None`
    /// if nothing is there.
    fn at(path: PathBuf, meta: io::Result<Metadata>) -> io::Result<Option<Self>> {
        let Some(meta) = there(meta)? else { return Ok(None) };
        let (mut bytes, mut modified_unix_ms) = (0, modified(&meta));
        if meta.is_dir() {
            for inner in children(&path)? {
                // Others may be at work in it.
                let meta = inner.symlink_metadata();
                let Some(inner) = Self::at(inner, meta)? else { continue };
                bytes += inner.bytes;
                modified_unix_ms = modified_unix_ms.max(inner.modified_unix_ms);
            }
        } else {
            bytes = meta.len();
        }
        Ok(Some(Self { path, bytes, modified_unix_ms }))
    }
}

fn modified(meta: &Metadata) -> u64 {
    let since = |time: SystemTime| time.duration_since(UNIX_EPOCH).ok();
    let since = meta.modified().ok().and_then(since);
    since.map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

fn there<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

/// Paths in a folder, sorted; none if there is no folder.
fn children(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let Some(entries) = there(std::fs::read_dir(dir))? else { return Ok(Vec::new()) };
    let mut paths = entries.map(|e| Ok(e?.path())).collect::<io::Result<Vec<_>>>()?;
    paths.sort_unstable();
    Ok(paths)
}

impl Store {
    /// The files and folders in one of the store's folders (`""` for the store itself), sorted.
    ///
    /// # Errors
    /// When it is there and cannot be read.
    pub fn items(&self, folder: &str) -> Result<Vec<Item>, StoreError> {
        let dir = self.root().join(folder);
        // A folder of the store may be a link to where there is more room.
        let measure = |path: PathBuf| {
            let meta = path.metadata();
            Item::at(path, meta).transpose()
        };
        let items = children(&dir).and_then(|all| all.into_iter().filter_map(measure).collect());
        items.map_err(|e| StoreError::from_io("reading", &dir, e))
    }

    /// The files of a folder that are spread over subfolders by their first two digits, each with
    /// its name in one piece.
    ///
    /// # Errors
    /// When it is there and cannot be read.
    pub fn sharded(&self, folder: &str) -> Result<Vec<(String, Item)>, StoreError> {
        let dir = self.root().join(folder);
        let mut found = Vec::new();
        let mut read = || {
            for shard in children(&dir)?.into_iter().filter(|shard| shard.is_dir()) {
                let head =
                    shard.file_name().and_then(|n| n.to_str()).unwrap_or_default().to_owned();
                for path in children(&shard)? {
                    let meta = path.symlink_metadata();
                    if let Some(item) = Item::at(path, meta)? {
                        found.push((format!("{head}{}", item.name()), item));
                    }
                }
            }
            Ok(())
        };
        read().map_err(|e| StoreError::from_io("reading", &dir, e))?;
        Ok(found)
    }

    /// What a folder holds by digest (`objects`, `trees`, `origins`).
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn by_digest(&self, folder: &str) -> Result<BTreeMap<Digest, Item>, StoreError> {
        let found = self.sharded(folder)?.into_iter();
        Ok(found.filter_map(|(name, item)| Some((name.parse().ok()?, item))).collect())
    }

    /// Removes a file or folder of the store; fine if it is gone already. The file of a lease that
    /// somebody holds stays.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn remove(&self, path: &Path) -> anyhow::Result<()> {
        if let (Some(parent), Some(name)) =
            (path.parent(), path.file_name().and_then(|n| n.to_str()))
            && parent == self.root().join("leases")
        {
            self.remove_lease(name)?;
        } else if path.symlink_metadata().is_ok_and(|meta| meta.is_dir()) {
            self.disk().remove_dir_all(path)?;
        } else {
            self.disk().remove_file(path)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_is_measured_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap();
        std::fs::create_dir(dir.path().join("made")).unwrap();
        std::fs::write(dir.path().join("made/file"), "12345").unwrap();
        let tree = store.publish_tree(&dir.path().join("made")).unwrap();
        let objects = store.by_digest("objects").unwrap();
        assert_eq!(objects.keys().collect::<Vec<_>>(), [&Digest::of(b"12345")]);
        let (bytes, total) = (objects[&Digest::of(b"12345")].bytes, |store: &Store| {
            store.items("").unwrap().iter().map(|item| item.bytes).sum::<u64>()
        });
        assert_eq!(bytes, 5);
        assert_eq!(store.by_digest("trees").unwrap().keys().collect::<Vec<_>>(), [&tree]);
        let before = total(&store);
        store.remove(&objects[&Digest::of(b"12345")].path).unwrap();
        store.remove(&objects[&Digest::of(b"12345")].path).unwrap();
        assert_eq!(total(&store), before - 5);
        assert!(store.missing(&tree).unwrap().unwrap().contains("gone"));
        assert!(store.items("no such folder").unwrap().is_empty());
    }
}

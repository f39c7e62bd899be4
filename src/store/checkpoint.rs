//! Checkpoints: what an attempt at a key leaves, so that the next one can go on from there.
//!
//! `checkpoints/<key>/<number>/` holds the files of one checkpoint and, in `build`, the program
//! that wrote it. A folder appears by rename when it is whole; only the newest is kept, and none
//! once the key has its result. The holder of the key's lease is the only writer.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::{Store, StoreError};
use crate::digest::Digest;

const BUILD: &str = "build";

impl Store {
    fn checkpoints(&self, key: &Digest) -> PathBuf {
        self.root().join("checkpoints").join(key.to_string())
    }

    /// Numbers of the checkpoints of a key, ascending.
    fn numbers(dir: &Path) -> Vec<u64> {
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
        let mut numbers: Vec<u64> =
            entries.filter_map(|e| e.file_name().to_str()?.parse().ok()).collect();
        numbers.sort_unstable();
        numbers
    }

    /// Takes a folder over as the newest checkpoint of a key; the older ones go.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn keep_checkpoint(&self, key: &Digest, build: &str, dir: &Path) -> Result<()> {
        let disk = self.disk();
        disk.write_new(&dir.join(BUILD), build.as_bytes())?;
        for entry in std::fs::read_dir(dir).map_err(|e| StoreError::from_io("reading", dir, e))? {
            disk.sync(&entry?.path())?;
        }
        disk.sync(dir)?;
        let place = self.checkpoints(key);
        disk.create_dir_all(&place)?;
        let older = Self::numbers(&place);
        let number = older.last().map_or(0, |n| n + 1);
        disk.rename(dir, &place.join(number.to_string()))?;
        disk.sync(&place)?;
        older.iter().try_for_each(|n| disk.remove_dir_all(&place.join(n.to_string())))?;
        Ok(())
    }

    /// The newest checkpoint of a key, and the build that wrote it.
    ///
    /// # Errors
    /// When it is there and cannot be read.
    pub fn checkpoint(&self, key: &Digest) -> Result<Option<(PathBuf, String)>> {
        let place = self.checkpoints(key);
        let Some(number) = Self::numbers(&place).pop() else { return Ok(None) };
        let dir = place.join(number.to_string());
        let build = std::fs::read_to_string(dir.join(BUILD));
        let build = build.with_context(|| format!("reading {}", dir.display()))?;
        Ok(Some((dir, build)))
    }

    /// Removes the checkpoints of a key that needs them no more.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn drop_checkpoints(&self, key: &Digest) -> Result<()> {
        let place = self.checkpoints(key);
        if place.exists() { Ok(self.disk().remove_dir_all(&place)?) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap();
        let key = Digest::of(b"key");
        assert!(store.checkpoint(&key).unwrap().is_none());
        for text in ["one", "two", "three"] {
            let made = dir.path().join(text);
            std::fs::create_dir(&made).unwrap();
            std::fs::write(made.join("state"), text).unwrap();
            store.keep_checkpoint(&key, text, &made).unwrap();
            assert!(!made.exists());
        }
        let (found, build) = store.checkpoint(&key).unwrap().unwrap();
        assert_eq!(build, "three");
        assert_eq!(std::fs::read_to_string(found.join("state")).unwrap(), "three");
        assert_eq!(std::fs::read_dir(found.parent().unwrap()).unwrap().count(), 1);
        store.drop_checkpoints(&key).unwrap();
        assert!(store.checkpoint(&key).unwrap().is_none());
    }
}

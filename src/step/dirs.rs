//! Folders of an attempt, of which some are there before it makes them.

use std::collections::BTreeSet;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// The folders below an attempt's own. A new one costs a trivial step more than all that it does in
/// it, so an attempt may have those that an earlier one has left, empty: it takes over what it
/// would make, and the others go before anything can look at them.
#[derive(Debug, Default)]
pub struct Dirs {
    spare: Mutex<BTreeSet<PathBuf>>,
    tidy: AtomicBool,
}

impl Dirs {
    /// With folders that are there, each with those that it is in, below the attempt's.
    pub fn with(spare: BTreeSet<PathBuf>) -> Self {
        Self { spare: Mutex::new(spare), tidy: AtomicBool::new(false) }
    }

    /// Makes a folder, with those that it is in.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn make(&self, dir: &Path) -> io::Result<()> {
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        let there = spare.remove(dir);
        dir.ancestors().skip(1).take_while(|parent| spare.remove(*parent)).for_each(drop);
        drop(spare);
        if there {
            return Ok(());
        }
        match (std::fs::create_dir(dir), dir.parent()) {
            (Err(e), Some(parent)) if e.kind() == ErrorKind::NotFound => {
                self.make(parent)?;
                std::fs::create_dir(dir)
            }
            (Err(e), _) if e.kind() == ErrorKind::AlreadyExists && dir.is_dir() => Ok(()),
            (made, _) => made,
        }
    }

    /// Removes those that nobody has made: from now on there is nothing that was not asked for.
    ///
    /// # Errors
    /// When one cannot be removed.
    pub fn only_made(&self) -> io::Result<()> {
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *spare).iter().rev().try_for_each(std::fs::remove_dir)
    }

    /// Says that nothing that the attempt has started can still write into its folders.
    pub fn leave_tidy(&self) {
        self.tidy.store(true, Ordering::Relaxed);
    }

    /// Whether the folders may be another attempt's.
    pub fn are_tidy(&self) -> bool {
        self.tidy.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_is_taken_over_or_goes() {
        let temp = tempfile::tempdir().unwrap();
        let at = |path: &str| temp.path().join(path);
        let there = ["a", "a/b", "a/b/c", "d", "d/e"].map(at);
        there.iter().for_each(|dir| std::fs::create_dir(dir).unwrap());
        let dirs = Dirs::with(there.into());
        for dir in ["a/b", "d/f/g", "d/f/g", "h"] {
            dirs.make(&at(dir)).unwrap();
        }
        dirs.only_made().unwrap();
        let gone = ["a/b/c", "d/e"].map(|dir| at(dir).exists());
        assert_eq!(gone, [false, false]);
        assert!(["a/b", "d/f/g", "h"].iter().all(|dir| at(dir).is_dir()));
        std::fs::write(at("file"), "").unwrap();
        assert!(dirs.make(&at("file")).is_err() && dirs.make(&at("file/x")).is_err());
    }
}

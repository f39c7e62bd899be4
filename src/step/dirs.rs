//! Folders of an attempt, of which some are there before it makes them.

use std::collections::BTreeSet;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::store::{states_in, unique};

/// Empty folders that attempts of a run have no use for, for those that have. To remove one and to
/// make it again is slow where a file system tells its device of every free block, and waits.
#[derive(Debug)]
pub struct Shelf {
    at: PathBuf,
    folders: Mutex<Vec<PathBuf>>,
}

impl Shelf {
    /// In a folder that is there before anything is put into it, and goes when the run is over.
    pub fn new(at: PathBuf) -> Self {
        Self { at, folders: Mutex::default() }
    }

    /// Puts a folder away, if it is empty.
    fn put(&self, folder: &Path) -> io::Result<()> {
        let to = self.at.join(unique());
        if !states_in(folder).is_empty() || std::fs::rename(folder, &to).is_err() {
            return std::fs::remove_dir(folder);
        }
        self.folders.lock().unwrap_or_else(PoisonError::into_inner).push(to);
        Ok(())
    }

    /// Whether there was one, which has this name now.
    fn take(&self, name: &Path) -> bool {
        let take = || self.folders.lock().unwrap_or_else(PoisonError::into_inner).pop();
        take().is_some_and(|folder| match std::fs::rename(&folder, name) {
            Ok(()) => true,
            // There is something of this name, or nothing to put it into.
            Err(_) => {
                self.folders.lock().unwrap_or_else(PoisonError::into_inner).push(folder);
                false
            }
        })
    }
}

/// The folders below an attempt's own. A new one costs a trivial step more than all that it does in
/// it, so an attempt may have those that an earlier one has left, empty: it takes over what it
/// would make, and the others go before anything can look at them.
#[derive(Debug, Default)]
pub struct Dirs {
    spare: Mutex<BTreeSet<PathBuf>>,
    shelf: Option<Arc<Shelf>>,
    tidy: AtomicBool,
}

impl Dirs {
    /// With folders that are there, each with those that it is in, below the attempt's; and a place
    /// for those that it has no use for.
    pub fn with(spare: BTreeSet<PathBuf>, shelf: &Arc<Shelf>) -> Self {
        let shelf = Some(Arc::clone(shelf));
        Self { spare: Mutex::new(spare), shelf, tidy: AtomicBool::new(false) }
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
        // One that is there is not to be replaced by another, which would remove it.
        if there || dir.is_dir() || self.shelf.as_ref().is_some_and(|shelf| shelf.take(dir)) {
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

    /// Puts those away that nobody has made: from now on there is nothing that was not asked for.
    ///
    /// # Errors
    /// When one cannot be removed.
    pub fn only_made(&self) -> io::Result<()> {
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        // What is in a folder before the folder.
        std::mem::take(&mut *spare).iter().rev().try_for_each(|dir| match &self.shelf {
            Some(shelf) => shelf.put(dir),
            None => std::fs::remove_dir(dir),
        })
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
        std::fs::create_dir(at("shelf")).unwrap();
        let shelf = Arc::new(Shelf::new(at("shelf")));
        let dirs = Dirs::with(there.into(), &shelf);
        for dir in ["a/b", "d/f/g", "d/f/g", "h"] {
            dirs.make(&at(dir)).unwrap();
        }
        dirs.only_made().unwrap();
        let gone = ["a/b/c", "d/e"].map(|dir| at(dir).exists());
        assert_eq!(gone, [false, false]);
        assert!(["a/b", "d/f/g", "h"].iter().all(|dir| at(dir).is_dir()));
        // They are there for the next one, under the names that it gives them.
        let on_shelf = || std::fs::read_dir(at("shelf")).unwrap().count();
        assert_eq!(on_shelf(), 2);
        let next = Dirs::with([at("h")].into(), &shelf);
        next.make(&at("i/j")).unwrap();
        assert!(at("i/j").is_dir() && on_shelf() <= 1);
        // What is not empty is nobody's.
        std::fs::write(at("h/x"), "").unwrap();
        assert!(next.only_made().is_err() && at("h/x").exists());
        std::fs::write(at("file"), "").unwrap();
        assert!(dirs.make(&at("file")).is_err() && dirs.make(&at("file/x")).is_err());
    }
}

//! Private folders of attempts, and what runs that died left in them.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::Result;

use crate::digest::Digest;
use crate::lineage::Runs;
use crate::store::{KEPT_ATTEMPT, Lease, Origin, SMALL, Store, is_within, spread, unique};

/// Separates the run's id from the rest of a name.
const SEPARATOR: char = '.';

fn attempts(store: &Store) -> PathBuf {
    store.root().join("attempts")
}

/// A new folder's path for an attempt of a run at a key.
pub(super) fn path(store: &Store, run: &str, key: &Digest) -> PathBuf {
    attempts(store).join(format!("{run}{SEPARATOR}{}-{}", key.short(), unique()))
}

/// Where what attempts of a run leave behind waits for its end.
pub(super) fn rest(store: &Store, run: &str) -> PathBuf {
    attempts(store).join(format!("{run}{SEPARATOR}rest-{}", unique()))
}

/// A store of its own for work that must leave nothing in the real one. It lies among the
/// attempts, so that inputs can be shared and what a killed process left is swept.
pub(super) struct Scratch {
    pub(super) store: Store,
    /// What its attempts are made for, where others have the id of a run.
    pub(super) name: String,
    real: Store,
    dir: PathBuf,
    _alive: Lease,
}

impl Scratch {
    pub(super) fn new(real: &Store, purpose: &str) -> Result<Self> {
        let name = format!("{purpose}-{}", unique());
        let alive = Runs::of(real).hold(&name)?;
        let dir = attempts(real).join(format!("{name}{SEPARATOR}store"));
        // Nothing in it outlives this process.
        let store = Store::open_on(&dir, real.disk().clone())?.unsynced();
        Ok(Self { store, name, real: real.clone(), dir, _alive: alive })
    }

    /// Makes a tree of the real store readable in this one, without a copy. `false` if its bytes
    /// are not all there.
    pub(super) fn lend(&self, tree: &Digest) -> Result<bool> {
        if self.store.missing(tree)?.is_none() {
            return Ok(true);
        }
        if self.real.missing(tree)?.is_some() {
            return Ok(false);
        }
        let mut referenced = Vec::new();
        for entry in self.real.tree(tree)?.into_iter().flat_map(|t| t.entries) {
            let Some(path) = self.real.locate_entry(&entry)? else { return Ok(false) };
            if path.starts_with(self.real.root()) && !self.real.verify(&entry.digest)? {
                return Ok(false);
            }
            referenced.push((entry, Origin { path, hub: None }));
        }
        let nothing = self.store.root().join("tmp").join("nothing");
        Ok(self.store.publish_tree_with(&nothing, &referenced)? == *tree)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What cannot be removed now is swept by a later run.
        let _ = self.real.disk().remove_dir_all(&self.dir);
    }
}

/// Folders of attempts that are over, removed at the end of the run.
///
/// A file system that has just removed many small files may look for free inodes among all of them
/// whenever it makes the next one (ext4 passes over those of the last minutes), so that a run of
/// thousands of trivial steps would spend most of its time there. What takes room goes at once.
#[derive(Debug, Default)]
pub(super) struct Spent(Mutex<Vec<PathBuf>>);

impl Spent {
    /// Has a folder removed, sooner or later.
    pub(super) fn remove(&self, store: &Store, dir: PathBuf) {
        if is_within(&dir, SMALL) {
            self.later(dir);
        } else {
            let _ = store.disk().remove_dir_all(&dir);
        }
    }

    /// Has a folder removed at the end.
    pub(super) fn later(&self, dir: PathBuf) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(dir);
    }

    /// Removes those that are left, by as many threads as there are processors: nothing else is
    /// left to do. What cannot be removed now is swept by a later run.
    pub(super) fn clear(&self, store: &Store) {
        /// What a thread has to do to be worth its start.
        const A_THREAD: usize = 16;
        let dirs = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let share = dirs.len().div_ceil(threads).max(A_THREAD);
        let remove = |dirs: &[PathBuf]| {
            for dir in dirs {
                let _ = store.disk().remove_dir_all(dir);
            }
        };
        std::thread::scope(|scope| {
            let mut shares = dirs.chunks(share);
            let own = shares.next().unwrap_or_default();
            shares.for_each(|share| drop(scope.spawn(move || remove(share))));
            remove(own);
        });
    }
}

/// Sets a folder aside, so that it is never swept.
pub(super) fn keep(dir: &Path) {
    if let (Some(parent), Some(name)) = (dir.parent(), dir.file_name()) {
        // If it cannot be renamed, it stays until the run has ended.
        let _ = std::fs::rename(dir, parent.join(format!("{KEPT_ATTEMPT}{}", name.display())));
    }
}

/// Removes the folders of runs whose processes are gone. Only tidiness: what cannot be removed
/// now is removed by a later run. A run of another host may be there although no lock of it is
/// seen here: it counts as alive for a day after its last word. A worker may outlive its runner
/// for the grace that it has to keep a checkpoint in: while it holds the lease of its key, its
/// folder stays.
pub(super) fn sweep(store: &Store) {
    let (runs, mut leased) = (Runs::of(store), None);
    spread(&attempts(store));
    for entry in std::fs::read_dir(attempts(store)).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(name) = name.to_str().filter(|n| !n.starts_with(KEPT_ATTEMPT)) else { continue };
        if let Some((run, rest)) = name.split_once(SEPARATOR)
            && !runs.may_be_alive(run)
            && let Some((key, _)) = rest.split_once('-')
            && !leased.get_or_insert_with(|| store.leased()).iter().any(|l| l.starts_with(key))
        {
            let _ = store.disk().remove_dir_all(&entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_spent_goes_at_once_or_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let spent = Spent::default();
        let made = |name: String, bytes: usize| {
            let dir = attempts(&store).join(name);
            std::fs::create_dir_all(dir.join("scratch")).unwrap();
            std::fs::write(dir.join("scratch/x"), vec![0; bytes]).unwrap();
            dir
        };
        for i in 0..100 {
            spent.remove(&store, made(format!("small{i}"), 10));
        }
        spent.remove(&store, made("large".into(), 1 << 20));
        let left = || std::fs::read_dir(attempts(&store)).unwrap().count();
        assert_eq!(left(), 100);
        spent.clear(&store);
        assert_eq!(left(), 0);
    }
}

//! Private folders of attempts, and what runs that died left in them.

use std::path::{Path, PathBuf};

use crate::digest::Digest;
use crate::lineage::Runs;
use crate::store::{Store, unique};

/// Begins the names of folders that are kept for inspection.
const KEPT: &str = "kept-";

/// Separates the run's id from the rest of a name.
const SEPARATOR: char = '.';

fn attempts(store: &Store) -> PathBuf {
    store.root().join("attempts")
}

/// A new folder's path for an attempt of a run at a key.
pub(super) fn path(store: &Store, run: &str, key: &Digest) -> PathBuf {
    attempts(store).join(format!("{run}{SEPARATOR}{}-{}", key.short(), unique()))
}

/// Sets a folder aside, so that it is never swept.
pub(super) fn keep(dir: &Path) {
    if let (Some(parent), Some(name)) = (dir.parent(), dir.file_name()) {
        // If it cannot be renamed, it stays until the run has ended.
        let _ = std::fs::rename(dir, parent.join(format!("{KEPT}{}", name.display())));
    }
}

/// Removes the folders of runs whose processes are gone. Only tidiness: what cannot be removed
/// now is removed by a later run. A worker may outlive its runner for the grace that it has to
/// keep a checkpoint in: while it holds the lease of its key, its folder stays.
pub(super) fn sweep(store: &Store) {
    let runs = Runs::of(store);
    let mut leased = None;
    for entry in std::fs::read_dir(attempts(store)).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(name) = name.to_str().filter(|n| !n.starts_with(KEPT)) else { continue };
        if let Some((run, rest)) = name.split_once(SEPARATOR)
            && !runs.is_alive(run)
            && let Some((key, _)) = rest.split_once('-')
            && !leased.get_or_insert_with(|| store.leased()).iter().any(|l| l.starts_with(key))
        {
            let _ = store.disk().remove_dir_all(&entry.path());
        }
    }
}

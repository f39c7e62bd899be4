//! Private folders of attempts, and what runs that died left in them.

use std::path::{Path, PathBuf};

use crate::digest::Digest;
use crate::lineage::Runs;
use crate::store::{KEPT_ATTEMPT, Store, unique};

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
        let _ = std::fs::rename(dir, parent.join(format!("{KEPT_ATTEMPT}{}", name.display())));
    }
}

/// Removes the folders of runs whose processes are gone. Only tidiness: what cannot be removed
/// now is removed by a later run.
pub(super) fn sweep(store: &Store) {
    let runs = Runs::of(store);
    for entry in std::fs::read_dir(attempts(store)).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(name) = name.to_str().filter(|n| !n.starts_with(KEPT_ATTEMPT)) else { continue };
        if let Some((run, _)) = name.split_once(SEPARATOR)
            && !runs.is_alive(run)
        {
            let _ = store.disk().remove_dir_all(&entry.path());
        }
    }
}

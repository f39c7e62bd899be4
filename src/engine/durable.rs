//! When a result is waited for until the disk has it.
//!
//! A sync costs milliseconds, most of them more than a trivial step. What was made in less than a
//! second is therefore left to the system, which writes it within half a minute; nothing wrong can
//! follow from its loss ([`Store::unsynced`]). What took longer is synced, and with it everything
//! recent that it was made from: with other bytes upstream its key would never be asked for again.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Duration;

use anyhow::Result;

use crate::digest::Digest;
use crate::lineage::{Loaded, Record};
use crate::store::Store;

/// Results that took less to make are not waited for.
const QUICK: Duration = Duration::from_secs(1);

/// By then the system has brought a file to the disk by itself (Linux: 30 s, and 5 s until it
/// looks again).
const WRITTEN_BACK: Duration = Duration::from_secs(60);

/// The store to publish a result to that took so long, made from results of these keys.
///
/// # Errors
/// When the disk refuses.
pub(super) fn store_for(
    store: &Store,
    took: Duration,
    sources: &BTreeMap<String, Digest>,
) -> Result<Store> {
    if took < QUICK {
        return Ok(store.unsynced());
    }
    let mut open: Vec<Digest> = sources.values().copied().collect();
    let mut seen: BTreeSet<Digest> = open.iter().copied().collect();
    while let Some(key) = open.pop() {
        let path = Record::path(store, &key);
        if !is_recent(&path) {
            continue;
        }
        let Loaded::Found(record) = Record::load(store, &key)? else { continue };
        record.ports.values().try_for_each(|tree| store.sync_tree(tree))?;
        store.disk().sync(&path)?;
        path.parent().map(|dir| store.disk().sync(dir)).transpose()?;
        open.extend(record.made.sources.values().filter(|key| seen.insert(**key)));
    }
    Ok(store.clone())
}

fn is_recent(path: &Path) -> bool {
    let modified = std::fs::metadata(path).and_then(|meta| meta.modified());
    // In the future counts as recent.
    modified.is_ok_and(|time| time.elapsed().map_or(true, |age| age < WRITTEN_BACK))
}

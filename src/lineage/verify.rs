//! Reads everything again: whether records, manifests and bytes are what their names say.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context as _, Result};
use rayon::prelude::*;
use serde::Serialize;
use serde_json::Value;

use super::{Loaded, Record};
use crate::digest::Digest;
use crate::store::{Item, Store, StoreError};

/// A part of a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// The record of a key.
    Record,
    /// The manifest of a tree.
    Tree,
    /// A file's bytes.
    Blob,
}

/// Something that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Finding {
    /// What it is.
    pub part: Part,
    /// Its name: of a record, the key.
    pub digest: Digest,
    /// It was there with other content, and lies in `quarantine/` now; otherwise it is gone.
    pub damaged: bool,
    /// In what way.
    pub reason: String,
}

/// A result that is not whole any more: the next run that needs it makes it again.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Lost {
    /// Its key.
    pub key: Digest,
    /// The instance that it is of, as far as that can be read.
    pub step: Option<String>,
    /// How long it took to make, in seconds.
    pub seconds: Option<f64>,
}

/// What a verification read and found.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct Checked {
    /// Records read.
    pub records: usize,
    /// Manifests read.
    pub trees: usize,
    /// Files hashed.
    pub blobs: usize,
    /// Their bytes.
    pub bytes: u64,
    /// What is damaged or gone.
    pub findings: Vec<Finding>,
    /// Results that it makes useless.
    pub lost: Vec<Lost>,
}

/// What was found of a blob.
struct Found {
    /// Bytes that are as they should be; none if no file has them any more.
    sound: Option<u64>,
    /// Whether the object was damaged, and what is wrong.
    wrong: Option<(bool, String)>,
}

/// Reads the results of some keys, or the whole store, without trust in the stat table. What is
/// damaged is set aside, so that it is a miss from then on. `progress` is told bytes done and in
/// all, from several threads.
///
/// # Errors
/// When something cannot be read for another reason than damage, or the disk refuses.
pub fn verify(
    store: &Store,
    keys: Option<&BTreeSet<Digest>>,
    progress: &(dyn Fn(u64, u64) + Sync),
) -> Result<Checked> {
    // Nothing is swept away from under it.
    let _shared = store.lock_shared()?;
    let mut checked = Checked::default();
    let mut bad = BTreeSet::new();
    let mut ports: Vec<(Record, Vec<Digest>)> = Vec::new();
    for (key, file) in Record::files(store)? {
        if keys.is_some_and(|keys| !keys.contains(&key)) {
            continue;
        }
        let Some((item, loaded)) = file.record else { continue };
        checked.records += 1;
        match loaded {
            Loaded::Found(record) => {
                let trees = record.ports.values().copied().collect();
                ports.push((*record, trees));
            }
            Loaded::Corrupt(reason) => {
                checked.lost.push(lost_with(&item, key));
                store.quarantine(&item.path)?;
                let part = Part::Record;
                checked.findings.push(Finding { part, digest: key, damaged: true, reason });
            }
            Loaded::Absent => {}
        }
    }
    let mut trees: BTreeSet<Digest> = ports.iter().flat_map(|(_, trees)| trees).copied().collect();
    let mut blobs: BTreeMap<Digest, u64> = BTreeMap::new();
    let objects = store.by_digest("objects")?;
    let manifests = store.by_digest("trees")?;
    if keys.is_none() {
        trees.extend(manifests.keys());
        blobs.extend(objects.iter().map(|(blob, item)| (*blob, item.bytes)));
    }
    let mut blobs_of: BTreeMap<Digest, Vec<Digest>> = BTreeMap::new();
    for tree in trees {
        checked.trees += 1;
        let (damaged, reason) = match store.tree(&tree) {
            Ok(Some(manifest)) => {
                blobs.extend(manifest.entries.iter().map(|entry| (entry.digest, entry.size)));
                blobs_of.insert(tree, manifest.entries.iter().map(|entry| entry.digest).collect());
                continue;
            }
            Ok(None) => (false, "its manifest is gone".to_owned()),
            Err(e) if e.chain().any(|e| e.is::<StoreError>()) => return Err(e),
            Err(e) => {
                if let Some(item) = manifests.get(&tree) {
                    store.quarantine(&item.path)?;
                }
                (true, format!("{e:#}"))
            }
        };
        bad.insert(tree);
        checked.findings.push(Finding { part: Part::Tree, digest: tree, damaged, reason });
    }
    let (done, all) = (AtomicU64::new(0), blobs.values().sum());
    progress(0, all);
    let found: Vec<(Digest, Found)> = blobs
        .into_par_iter()
        .map(|(blob, size)| {
            let found = look_at(store, &blob, objects.get(&blob))?;
            progress(done.fetch_add(size, Ordering::Relaxed) + size, all);
            Ok((blob, found))
        })
        .collect::<Result<_>>()?;
    checked.blobs = found.len();
    let mut bad_blobs = BTreeSet::new();
    for (digest, Found { sound, wrong }) in found {
        match sound {
            Some(bytes) => checked.bytes += bytes,
            None => drop(bad_blobs.insert(digest)),
        }
        let wrong = wrong.into_iter();
        checked.findings.extend(wrong.map(|(damaged, reason)| {
            let part = Part::Blob;
            Finding { part, digest, damaged, reason }
        }));
    }
    let whole = |tree: &Digest| {
        !bad.contains(tree) && blobs_of[tree].iter().all(|blob| !bad_blobs.contains(blob))
    };
    for (record, trees) in ports {
        if !trees.iter().all(whole) {
            let (step, seconds) = (Some(record.made.step), Some(record.made.seconds));
            checked.lost.push(Lost { key: record.key, step, seconds });
        }
    }
    checked.findings.sort();
    Ok(checked)
}

/// What a damaged record still says of itself.
fn lost_with(item: &Item, key: Digest) -> Lost {
    let text = std::fs::read(&item.path).unwrap_or_default();
    let value: Value = serde_json::from_slice(&text).unwrap_or_default();
    let made = &value["record"]["made"];
    let (step, seconds) = (made["step"].as_str().map(str::to_owned), made["seconds"].as_f64());
    Lost { key, step, seconds }
}

/// Hashes an object, or else the files outside the store that should have its bytes. A damaged
/// object is set aside.
fn look_at(store: &Store, blob: &Digest, object: Option<&Item>) -> Result<Found> {
    let mut wrong = None;
    if let Some(item) = object {
        let reason = match hash(&item.path)? {
            Some((digest, size)) if digest == *blob => {
                return Ok(Found { sound: Some(size), wrong: None });
            }
            Some((_, size)) => format!("its {size} bytes are not what its name says"),
            None => "the disk cannot read it".to_owned(),
        };
        wrong = Some((true, reason));
        store.quarantine(&item.path)?;
    }
    let origins = store.origins(blob)?;
    for origin in origins.iter().rev().filter(|origin| origin.path.is_file()) {
        if let Some((digest, size)) = hash(&origin.path)?
            && digest == *blob
        {
            return Ok(Found { sound: Some(size), wrong });
        }
    }
    let gone = || match origins.last() {
        Some(origin) => format!("{} is gone or has other bytes now", origin.path.display()),
        None => "its object is gone".to_owned(),
    };
    Ok(Found { sound: None, wrong: wrong.or_else(|| Some((false, gone()))) })
}

/// The digest and size of a file; `None` if the disk fails to read its bytes.
fn hash(path: &Path) -> Result<Option<(Digest, u64)>> {
    let failed =
        |e: &std::io::Error| e.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error());
    match Digest::of_file(path) {
        Ok(found) => Ok(Some(found)),
        Err(e) if failed(&e) => Ok(None),
        Err(e) => Err(e).with_context(|| format!("reading {}", path.display())),
    }
}

//! Results laid out for people under `outputs/`: writable, swapped in whole, never read back.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use petgraph::graph::NodeIndex;
use serde::{Deserialize, Serialize};

use super::{RunEvent, Session};
use crate::digest::Digest;
use crate::lineage::Record;
use crate::pipeline::{Output, Plan};
use crate::source::{Fault, suggest};
use crate::store::{Entry, States, Store, Tree, digest_of_states, unique};

/// What was put at a place, so that an edit can be told from what we wrote.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Put {
    /// Tree digest by port, and how they are laid out.
    ports: BTreeMap<String, Digest>,
    flat: bool,
    /// What lies there then.
    tree: Tree,
    /// And its files' states, so that an unchanged copy need not be read.
    states: States,
    /// The place, which a collection asks whether it is still there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    path: Option<PathBuf>,
}

/// Lays out every output that is not there yet.
pub(super) fn publish(
    plan: &Plan,
    session: &Session<'_>,
    records: &BTreeMap<NodeIndex, Record>,
    run: &str,
) -> Result<Vec<RunEvent>> {
    let store = &session.store;
    let dir = session.options.outputs.join(&plan.name);
    let mut events = Vec::new();
    let mut folded: BTreeMap<String, &Output> = BTreeMap::new();
    for output in &plan.outputs {
        let Some(record) = records.get(&output.node) else { continue };
        let name = file_name(output);
        if let Some(other) = folded.insert(name.to_lowercase(), output) {
            let place = |output| dir.join(file_name(output));
            apart((&other.name, &place(other)), (&output.name, &place(output)))?;
        }
        // One writer a place: runs of one pipeline at once publish one after the other.
        let lease = format!("outputs-{}", place_name(&dir.join(&name))?);
        let _lease = store.lease(&lease, run)?;
        let placed = place(store, &dir, &name, output, record);
        let placed = placed.with_context(|| format!("publishing output `{}`", output.name))?;
        if let Placed::New { kept } = placed {
            let (name, path) = (output.name.clone(), dir.join(&name));
            events.push(RunEvent::OutputPublished { name, path, kept });
        }
    }
    Ok(events)
}

/// Refuses two outputs that lie at one place: one would take the other's for an edited copy. Names
/// that differ by case only do so on some file systems, which is seen once one of them is there.
fn apart(one: (&str, &Path), other: (&str, &Path)) -> Result<()> {
    let own = |path: &Path| std::fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()));
    if one.1 != other.1 && (own(one.1).is_none() || own(one.1) != own(other.1)) {
        return Ok(());
    }
    let message = format!("outputs `{}` and `{}` would lie at one place", one.0, other.0);
    let help = "this file system does not tell upper from lower case: let one of them have another \
        name or value, or name another folder as `outputs` in flow.toml";
    Err(Fault::new(message).help(help).into())
}

/// Where the outputs of a plan lie, and the states of their files as they were put there.
pub(super) fn placed(plan: &Plan, session: &Session<'_>) -> Result<Vec<(PathBuf, Digest)>> {
    let dir = session.options.outputs.join(&plan.name);
    let put = plan.outputs.iter().map(|output| {
        let dest = dir.join(file_name(output));
        let put: Put = serde_json::from_slice(&std::fs::read(note_path(&session.store, &dest)?)?)?;
        Ok((dest, digest_of_states(&put.states)))
    });
    put.collect()
}

/// Whether what lies at a place is what was put there, by its states.
pub(super) fn is_as_placed(store: &Store, dest: &Path, states: Digest) -> bool {
    is_folder(dest) && store.states(dest).is_ok_and(|now| digest_of_states(&now) == states)
}

/// Whether it is a folder and no link to one.
fn is_folder(dest: &Path) -> bool {
    dest.is_dir() && !dest.is_symlink()
}

fn file_name(output: &Output) -> String {
    output.name.replace(['/', '\0'], "_")
}

enum Placed {
    Unchanged,
    New { kept: Option<PathBuf> },
}

/// The ports that are laid out, and whether their files lie side by side.
fn chosen(output: &Output, record: &Record) -> Result<(BTreeMap<String, Digest>, bool)> {
    if let Some(port) = &output.port {
        let Some(tree) = record.ports.get(port) else {
            let known: Vec<&str> = record.ports.keys().map(String::as_str).collect();
            let help = suggest(port, &known).unwrap_or_else(|| "it made nothing".into());
            let message = format!("{} made no `{port}`", record.made.step);
            return Err(Fault::new(message).help(help).into());
        };
        return Ok((BTreeMap::from([(port.clone(), *tree)]), true));
    }
    match record.ty.flat_ports() {
        None => Ok((record.ports.clone(), false)),
        Some(flat) => {
            let mut ports = record.ports.clone();
            ports.retain(|name, _| flat.contains(&name.as_str()));
            Ok((ports, true))
        }
    }
}

fn place(
    store: &Store,
    dir: &Path,
    name: &str,
    output: &Output,
    record: &Record,
) -> Result<Placed> {
    let dest = dir.join(name);
    let (ports, flat) = chosen(output, record)?;
    let note = note_path(store, &dest)?;
    let put: Option<Put> =
        std::fs::read(&note).ok().and_then(|text| serde_json::from_slice(&text).ok());
    let there = dest.symlink_metadata().is_ok();
    let edited = there && !put.as_ref().is_some_and(|put| is_as_put(store, &dest, put));
    let wanted = put.as_ref().is_some_and(|p| p.ports == ports && p.flat == flat);
    if there && !edited && wanted {
        return Ok(Placed::Unchanged);
    }
    sweep(store, dir, name);
    let tree = layout(store, &ports, flat)?;
    if edited && dest.is_dir() && store.tree_of_path(&dest).is_ok_and(|t| t == tree) {
        // Written by an earlier store or run whose note is gone; the same anyway.
        remember(
            store,
            &note,
            &dest,
            Put { ports, flat, tree, states: BTreeMap::new(), path: None },
        )?;
        return Ok(Placed::Unchanged);
    }
    let disk = store.disk();
    disk.create_dir_all(dir)?;
    let temp = dir.join(format!(".{name}{NEW}{}", unique()));
    let built = build(store, &tree, &temp);
    let kept = match built.and_then(|()| swap(store, dir, name, &temp, edited)) {
        Ok(kept) => kept,
        Err(e) => {
            let _ = std::fs::remove_dir_all(&temp);
            return Err(e);
        }
    };
    remember(store, &note, &dest, Put { ports, flat, tree, states: BTreeMap::new(), path: None })?;
    Ok(Placed::New { kept })
}

/// Where the note about a place is kept. In the store, not beside the output.
fn note_path(store: &Store, dest: &Path) -> Result<PathBuf> {
    Ok(store.root().join("outputs").join(format!("{}.json", place_name(dest)?)))
}

/// A name of a place that can be a file's.
fn place_name(dest: &Path) -> Result<Digest> {
    let place = std::path::absolute(dest)?;
    Ok(Digest::of(place.as_os_str().as_encoded_bytes()))
}

fn remember(store: &Store, note: &Path, dest: &Path, put: Put) -> Result<()> {
    let path = Some(std::path::absolute(dest)?);
    let put = Put { states: store.states(dest)?, path, ..put };
    store.write_atomic(note, &serde_json::to_vec(&put)?)?;
    Ok(())
}

fn is_as_put(store: &Store, dest: &Path, put: &Put) -> bool {
    let same_bytes = || store.tree_of_path(dest).is_ok_and(|tree| tree == put.tree);
    is_as_placed(store, dest, digest_of_states(&put.states)) || is_folder(dest) && same_bytes()
}

/// The files of an output: of several ports side by side, or in a folder each. Where two ports
/// side by side have a file of one name, the later port's goes into a folder.
fn layout(store: &Store, ports: &BTreeMap<String, Digest>, flat: bool) -> Result<Tree> {
    let mut entries: BTreeMap<String, Entry> = BTreeMap::new();
    for (port, digest) in ports {
        let tree = store.tree(digest)?;
        let tree = tree.with_context(|| format!("tree {} of `{port}` is lost", digest.short()))?;
        for entry in tree.entries {
            let taken = entries.get(&entry.path).is_some_and(|e| e.digest != entry.digest);
            let path = match flat && !taken {
                true => entry.path.clone(),
                false => format!("{port}/{}", entry.path),
            };
            entries.insert(path.clone(), Entry { path, ..entry });
        }
    }
    Tree::new(entries.into_values().collect())
}

fn build(store: &Store, tree: &Tree, dest: &Path) -> Result<()> {
    let disk = store.disk();
    disk.create_dir_all(dest)?;
    for entry in &tree.entries {
        store.materialise_entry(entry, &dest.join(&entry.path))?;
    }
    Ok(())
}

/// Between an output's name and what makes the name of a copy on its way in or out unique.
const NEW: &str = ".new-";
const OLD: &str = ".old-";

/// Removes what runs that died left of copies on their way. The caller holds the place's lease, so
/// nobody else's are there.
fn sweep(store: &Store, dir: &Path, name: &str) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let file = entry.file_name();
        let rest = file.to_str().and_then(|f| f.strip_prefix('.')?.strip_prefix(name));
        let of = |mark: &str| rest.and_then(|rest| rest.strip_prefix(mark));
        let numbers = |rest: &str| rest.chars().all(|c| c.is_ascii_digit() || c == '-');
        if of(NEW).or(of(OLD)).is_some_and(numbers) {
            // Only tidiness.
            let _ = store.disk().remove_dir_all(&entry.path());
        }
    }
}

/// Puts the new copy in place of the old one, which is removed, or set aside if it was edited.
fn swap(
    store: &Store,
    dir: &Path,
    name: &str,
    temp: &Path,
    edited: bool,
) -> Result<Option<PathBuf>> {
    let disk = store.disk();
    let dest = dir.join(name);
    if edited {
        let kept = (1_u32..).map(|n| dir.join(format!("{name}.edited-{n}")));
        let kept = kept.into_iter().find(|p| p.symlink_metadata().is_err());
        let kept = kept.context("no free name for the edited copy")?;
        disk.rename(&dest, &kept)?;
        disk.rename(temp, &dest)?;
        return Ok(Some(kept));
    }
    if dest.symlink_metadata().is_ok() {
        let old = dir.join(format!(".{name}{OLD}{}", unique()));
        disk.rename(&dest, &old)?;
        disk.rename(temp, &dest)?;
        disk.remove_dir_all(&old)?;
    } else {
        disk.rename(temp, &dest)?;
    }
    disk.sync(dir)?;
    Ok(None)
}

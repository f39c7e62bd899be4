//! The run in which nothing has changed: recognised by the pipeline's text, before any of it is
//! resolved.
//!
//! A run that ended well, and whose steps and inputs have settled, leaves an index in
//! `unchanged/<question>` of the store: what was asked (file, parameters, targets), the text of
//! the pipeline by digest, the environment and lock entries that it read, the state of every
//! outside file, of the published outputs, of the folders that hold records and manifests, and
//! every object by digest and size. If all of that is as it was, the run would find every result in
//! the cache, and so it is over. What differs, or cannot be read, only means that the run is done
//! in full.
//!
//! The index is trusted no further than file states are: a file that was written within two
//! seconds of being looked at may change again and look the same, so no index is left then.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime};

use anyhow::Result;
use petgraph::graph::NodeIndex;
use serde::{Deserialize, Serialize};

use super::prepare::{Prepared, lock_path};
use super::{Outcome, RunEvent, Session, machine, outputs};
use crate::digest::Digest;
use crate::lineage::{Lock, LockMode, Record, RunInfo, Runs, Status, Unchanged, unix_ms};
use crate::pipeline::Plan;
use crate::store::{Entry, FileState, States, Store, digest_of_states, states_in};

/// Raised when the file changes its meaning.
const FORMAT: u32 = 4;

/// Bytes of an object in the index: digest and size.
const OBJECT: usize = Digest::LENGTH + size_of::<u64>();

/// What everything is compared with.
#[derive(Debug, Serialize, Deserialize)]
struct Index {
    format: u32,
    build: String,
    /// The program's file: other kinds give other results.
    program: FileState,
    /// The pipeline's text.
    text: Digest,
    /// Environment that the pipeline reads; absent where it is not set.
    environment: BTreeMap<String, Option<String>>,
    /// Lines of the lock.
    lock: Digest,
    /// States of outside files and folders, and of files that the store refers to, by path.
    files: BTreeMap<PathBuf, Digest>,
    /// States of the store's folders with records and manifests.
    folders: Digest,
    /// States of published outputs.
    outputs: Vec<(PathBuf, Digest)>,
    pipeline: String,
    /// The run that did it in full, and its steps.
    since: String,
    steps: usize,
}

fn index_path(session: &Session<'_>, file: &Path) -> Result<PathBuf> {
    let options = &session.options;
    let question = serde_json::json!({
        "file": std::path::absolute(file)?,
        "sets": options.sets,
        "sweep_cap": options.sweep_cap,
        "targets": options.targets,
        "resources": options.resources.keys().collect::<Vec<_>>(),
        "device": options.device,
        "compute": options.compute,
        "outputs": options.outputs,
        "lock": options.lock,
    });
    let question = Digest::of_value("flow/unchanged/v1", &question)?;
    Ok(session.store.root().join("unchanged").join(question.to_string()))
}

fn program() -> Option<FileState> {
    Some(FileState::of(&fs::metadata(machine::program().ok()?).ok()?))
}

fn lock_digest(lock: &Lock) -> Result<Digest> {
    Ok(Digest::of_value("flow/lock/v1", &serde_json::to_value(lock.entries())?)?)
}

/// Folders whose entries are named by digests: those of records, and those of manifests.
fn folders(store: &Store) -> [Vec<(OsString, FileState)>; 2] {
    ["records", "trees"].map(|kind| states_in(&store.root().join(kind)))
}

fn folders_digest(folders: &[Vec<(OsString, FileState)>; 2]) -> Digest {
    let each = folders.each_ref().map(|kind| digest_of_states(kind.iter().map(|(n, s)| (n, s))));
    Digest::of(&each.map(|digest| *digest.as_bytes()).concat())
}

/// Leaves an index for the runs to come, if all that this run looked at has settled.
///
/// # Errors
/// When something cannot be read or the index cannot be written.
pub(super) fn remember(
    plan: &Plan,
    session: &Session<'_>,
    prepared: &Prepared,
    records: &BTreeMap<NodeIndex, Record>,
    (run, started): (&str, SystemTime),
) -> Result<()> {
    let path = index_path(session, &plan.file)?;
    let store = &session.store;
    // What is gone since this run looked for it has changed its folder after the start.
    let folders = folders(store);
    let settled = |states: &States| states.values().all(|state| state.settled(started));
    // Warnings are to be shown every time.
    let quiet = plan.warnings.is_empty() && prepared.force.is_empty();
    let all = folders.iter().flatten().all(|(_, state)| state.settled(started))
        && prepared.files.values().all(settled);
    let digests = prepared.files.iter().map(|(path, s)| (path.clone(), digest_of_states(s)));
    let mut files: BTreeMap<PathBuf, Digest> = digests.collect();
    let (true, true, Some(program)) = (quiet, all, program()) else { return Ok(()) };
    let mut objects: BTreeMap<Digest, u64> = BTreeMap::new();
    for record in records.values() {
        for tree in record.ports.values() {
            for Entry { digest, size, .. } in store.tree(tree)?.into_iter().flat_map(|t| t.entries)
            {
                objects.insert(digest, size);
            }
        }
    }
    let mut bytes = Vec::with_capacity(objects.len() * OBJECT);
    for (digest, size) in objects {
        let entry = Entry { path: String::new(), digest, size, executable: false };
        match store.locate_entry(&entry)? {
            Some(path) if path.starts_with(store.root()) => {
                bytes.extend_from_slice(digest.as_bytes());
                bytes.extend_from_slice(&size.to_le_bytes());
            }
            Some(path) => {
                let states = store.states(&path)?;
                anyhow::ensure!(settled(&states), "still fresh");
                files.insert(path, digest_of_states(&states));
            }
            None => return Ok(()),
        }
    }
    let index = Index {
        format: FORMAT,
        build: machine::BUILD.into(),
        program,
        text: Digest::of(plan.source.text.as_bytes()),
        environment: plan.environment.clone(),
        lock: lock_digest(&prepared.lock)?,
        files,
        folders: folders_digest(&folders),
        outputs: outputs::placed(plan, session)?,
        pipeline: plan.name.clone(),
        since: run.to_owned(),
        steps: prepared.order.len(),
    };
    let mut body = serde_json::to_vec(&index)?;
    body.push(b'\n');
    body.append(&mut bytes);
    let mut sealed = Digest::of(&body).as_bytes().to_vec();
    sealed.append(&mut body);
    store.unsynced().write_atomic(&path, &sealed)?;
    Ok(())
}

/// Ends a run of a pipeline of this text at once if nothing has changed since one was done in
/// full; `None` if it must be done in full again.
///
/// # Errors
/// When the journal cannot be written.
pub fn unchanged(
    file: &Path,
    text: &str,
    session: &Session<'_>,
    observe: &mut dyn FnMut(&RunEvent),
) -> Result<Option<Outcome>> {
    let started = Instant::now();
    let started_unix_ms = unix_ms();
    // What is found here may be swept away until it is on record that it was.
    let _shared = session.store.lock_shared()?;
    let Some(Index { pipeline, since, steps, .. }) = standing(file, text, session) else {
        return Ok(None);
    };
    let note = Unchanged { since: since.clone(), steps, seconds: started.elapsed().as_secs_f64() };
    let info = session.run_info(&pipeline, file, started_unix_ms)?;
    let info = RunInfo { unchanged: Some(note), ..info };
    let run = Runs::of(&session.store).note(info)?;
    observe(&RunEvent::Unchanged { run: run.clone(), pipeline, steps, since });
    let seconds = started.elapsed().as_secs_f64();
    let (status, ran, hits, failed, skipped) = (Status::Done, 0, steps, 0, 0);
    observe(&RunEvent::RunFinished {
        run: run.clone(),
        status,
        ran,
        hits,
        failed,
        skipped,
        seconds,
    });
    let (steps, store_failed) = (Vec::new(), false);
    Ok(Some(Outcome { run, status, steps, ran, hits, failed, skipped, seconds, store_failed }))
}

/// The index of what is asked, if everything is as it says.
fn standing(file: &Path, text: &str, session: &Session<'_>) -> Option<Index> {
    let (store, options) = (&session.store, &session.options);
    let sealed = fs::read(index_path(session, file).ok()?).ok()?;
    let (seal, body) = sealed.split_at_checked(Digest::LENGTH)?;
    let end = body.iter().position(|&b| b == b'\n')?;
    let index: Index = serde_json::from_slice(&body[..end]).ok()?;
    let chunks = body[end + 1..].chunks_exact(OBJECT);
    let objects: Vec<(Digest, u64)> = chunks.filter_map(object).collect();
    let lock = || Lock::load(&lock_path(file, options), LockMode::Frozen).ok();
    let same_environment =
        |(name, value): (&String, &Option<String>)| options.environment.get(name) == value.as_ref();
    let same_files = |(path, states): (&PathBuf, &Digest)| {
        store.states(path).is_ok_and(|now| digest_of_states(&now) == *states)
    };
    let stands = options.force.is_empty()
        && Digest::of(body).as_bytes() == seal
        && (index.format, index.build.as_str()) == (FORMAT, machine::BUILD)
        && Some(index.program) == program()
        && index.text == Digest::of(text.as_bytes())
        && index.environment.iter().all(same_environment)
        && index.lock == lock_digest(&lock()?).ok()?
        && index.files.iter().all(same_files)
        && index.outputs.iter().all(|(path, states)| outputs::is_as_placed(store, path, *states))
        && index.folders == folders_digest(&folders(store))
        && store.has_objects(&objects);
    stands.then_some(index)
}

fn object(bytes: &[u8]) -> Option<(Digest, u64)> {
    let (digest, size) = bytes.split_first_chunk::<{ Digest::LENGTH }>()?;
    Some((Digest::from_bytes(*digest), u64::from_le_bytes(size.try_into().ok()?)))
}

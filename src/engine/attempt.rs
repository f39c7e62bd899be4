//! One attempt at one key: lease, look up, run, verify, publish, record. The same function on a
//! thread of the runner and in a worker.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::bind::{Bound, look_up};
use super::gpu::Gpu;
use super::slots::Grant;
use super::{Options, durable, machine};
use crate::digest::Digest;
use crate::hub::Hub;
use crate::lineage::{Made, Record, Wrote, unix_ms};
use crate::pipeline::Instance;
use crate::source::{Fault, advice};
use crate::step::{CHECKPOINT_EVERY, Context, Device, Dirs, Event, Produced, Refused, Step};
use crate::store::{FileState, Lease, Spares, Store, StoreError, host};

/// What is to be done: all that an attempt needs beside the parsed step.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Task {
    pub(super) kind: String,
    pub(super) version: u32,
    /// Bound, narrowed, complete.
    pub(super) params: Value,
    pub(super) preimage: Value,
    pub(super) key: Digest,
    /// Keys of the steps behind the inputs, by path in the pre-image.
    pub(super) sources: BTreeMap<String, Digest>,
    /// Declared environment that is set.
    pub(super) env: BTreeMap<String, String>,
    /// Names only: values are never written down.
    pub(super) secrets: Vec<String>,
    pub(super) device: Device,
    pub(super) compute: String,
    pub(super) checkpoint_every: Duration,
    pub(super) threads: usize,
    pub(super) gpus: Vec<Gpu>,
    pub(super) run: String,
    pub(super) step: String,
    pub(super) pipeline: String,
    pub(super) attempt: u32,
    /// Run even if the result is there.
    pub(super) force: bool,
}

/// The variable that tells CUDA which GPUs there are.
pub(super) const VISIBLE_GPUS: &str = "CUDA_VISIBLE_DEVICES";

/// Its value for these.
pub(super) fn visible_gpus(gpus: &[Gpu]) -> String {
    gpus.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

impl Task {
    /// A first attempt of no run.
    pub(super) fn of(instance: &Instance, bound: &Bound, options: &Options, grant: &Grant) -> Self {
        let (device, compute) = options.place(instance);
        Self {
            kind: instance.kind.name.into(),
            version: instance.kind.version,
            params: bound.step.params(),
            preimage: bound.preimage.clone(),
            key: bound.key,
            sources: bound.source_keys.clone(),
            env: set(&instance.env),
            secrets: instance.policy.secrets.clone(),
            device,
            compute: compute.to_owned(),
            checkpoint_every: instance.policy.checkpoint.unwrap_or(CHECKPOINT_EVERY),
            threads: grant.threads,
            gpus: grant.gpus.clone(),
            run: String::new(),
            step: instance.id.0.clone(),
            pipeline: String::new(),
            attempt: 1,
            force: false,
        }
    }

    /// Values of its secrets, by name.
    pub(super) fn secrets_in(&self, options: &Options) -> BTreeMap<String, String> {
        let environment = &options.environment;
        let values = self.secrets.iter();
        values.filter_map(|n| Some((n.clone(), environment.get(n)?.clone()))).collect()
    }
}

/// Declared environment that is set.
pub(super) fn set(env: &BTreeMap<String, Option<String>>) -> BTreeMap<String, String> {
    env.iter().filter_map(|(name, value)| Some((name.clone(), value.clone()?))).collect()
}

/// What an attempt says while it lasts.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Said {
    Event(Event),
    Waiting(String),
    /// It needs what it was lent no longer.
    Resting,
}

/// A failure that can cross a process boundary.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Failure {
    pub(super) message: String,
    /// Causes, outermost first.
    pub(super) chain: Vec<String>,
    pub(super) help: Vec<String>,
    /// The store's disk refused.
    pub(super) store: bool,
    /// An input moved, or was refused: trying again cannot help, and the attempt's directory is
    /// worth keeping.
    pub(super) keep: bool,
}

impl Failure {
    pub(super) fn of(error: &anyhow::Error) -> Self {
        let mut chain = error.chain().map(ToString::to_string);
        let message = chain.next().unwrap_or_default();
        let mut seen = BTreeSet::from([message.clone()]);
        Self {
            chain: chain.filter(|m| seen.insert(m.clone())).collect(),
            message,
            help: advice(error),
            store: error.chain().any(|e| {
                let refused = e.downcast_ref::<StoreError>();
                let full = e.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
                matches!(refused, Some(StoreError::Full { .. } | StoreError::ReadOnly { .. }))
                    || matches!(full, Some(ErrorKind::StorageFull | ErrorKind::QuotaExceeded))
            }),
            keep: error.chain().any(|e| e.is::<Tainted>() || e.is::<Refused>()),
        }
    }

    pub(super) fn plain(message: impl Into<String>) -> Self {
        Self { message: message.into(), ..Self::default() }
    }
}

/// How an attempt ended.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Reply {
    /// It stands; at these ports a first result with other bytes stood already and stays.
    Made {
        record: Box<Record>,
        differs: Vec<String>,
    },
    /// Another process had made it meanwhile.
    Taken {
        record: Box<Record>,
    },
    Failed(Failure),
}

/// An input moved while it was read.
#[derive(Debug, thiserror::Error)]
#[error("{0} changed while the step ran, so its result is not published")]
struct Tainted(String);

/// What an attempt runs in.
pub(super) struct Around<'a> {
    pub(super) store: &'a Store,
    pub(super) hub: &'a Hub,
    pub(super) cancel: &'a AtomicBool,
    /// Folders in the attempt's own.
    pub(super) dirs: &'a Dirs,
    /// Leases of attempts that are over.
    pub(super) spares: &'a Spares,
    /// Between being asked to end and being ended.
    pub(super) grace: Duration,
    pub(super) say: &'a (dyn Fn(Said) + Sync),
    /// Values of the step's secrets.
    pub(super) secrets: BTreeMap<String, String>,
    /// In a process of its own, so that memory and CPU time are the step's.
    pub(super) alone: bool,
    /// The program: the digest of its content in a worker, else its version.
    pub(super) build: &'a str,
}

/// Does the attempt; never panics, and leaves nothing behind but what the reply says.
pub(super) fn attempt(task: &Task, step: &dyn Step, dir: &Path, around: &Around<'_>) -> Reply {
    match try_attempt(task, step, dir, around) {
        Ok(reply) => reply,
        Err(e) => Reply::Failed(Failure::of(&e)),
    }
}

fn try_attempt(task: &Task, step: &dyn Step, dir: &Path, around: &Around<'_>) -> Result<Reply> {
    let Some(lease) = lease(task, around)? else { bail!("interrupted") };
    let reply = hold(task, step, dir, around);
    around.spares.rest(lease);
    reply
}

/// What is done while the key's lease is held.
fn hold(task: &Task, step: &dyn Step, dir: &Path, around: &Around<'_>) -> Result<Reply> {
    let store = around.store;
    let before = look_up(store, &task.key)?;
    let stands = match before {
        Ok(record) if !task.force => return Ok(Reply::Taken { record }),
        Ok(_) => true,
        Err(_) => false,
    };
    let outside = Outsiders::of(store, &task.params)?;
    let started = Instant::now();
    let started_unix_ms = unix_ms();
    let mut env = task.env.clone();
    env.extend(around.secrets.clone());
    if !task.gpus.is_empty() {
        // A command's child sees what it was lent, too.
        env.insert(VISIBLE_GPUS.into(), visible_gpus(&task.gpus));
    }
    let mut cx = Context {
        store: store.clone(),
        hub: around.hub,
        attempt_dir: dir.to_path_buf(),
        dirs: around.dirs,
        key: task.key,
        build: around.build.to_owned(),
        checkpoint_every: task.checkpoint_every,
        grace: around.grace,
        threads: task.threads,
        device: task.device,
        compute: task.compute.clone(),
        env,
        cancel: around.cancel,
        emit: &|event| (around.say)(Said::Event(event)),
        rest: &|| (around.say)(Said::Resting),
        produced: Produced { afresh: task.force, ..Produced::default() },
    };
    // A body that is stopped gives an error; one that came to its end is finished work.
    guarded(|| step.run(&mut cx))?;
    store.disk().room(dir)?;
    let produced = std::mem::take(&mut cx.produced);
    outside.unchanged(store)?;
    let seconds = started.elapsed().as_secs_f64();
    let to = durable::store_for(store, started.elapsed(), &task.sources)?;
    // What it gives may be there already, from a result that is swept away: not before the record
    // is there too.
    let _shared = store.lock_shared()?;
    let ports = publish(&to, step, dir, &produced)?;
    let memos = produced.memos.into_inner().unwrap_or_else(PoisonError::into_inner);
    if !memos.is_empty() {
        // Without it they go sooner than they might.
        let _ = store.note_memos(&task.key, &memos);
    }
    let record = Record {
        key: task.key,
        kind: task.kind.clone(),
        version: task.version,
        preimage: task.preimage.clone(),
        ty: step.ports().ty,
        ports,
        facts: produced.facts,
        warnings: produced.warnings,
        made: Made {
            run: task.run.clone(),
            step: task.step.clone(),
            pipeline: task.pipeline.clone(),
            sources: task.sources.clone(),
            started_unix_ms,
            seconds,
            cpu_seconds: around.alone.then(machine::cpu_seconds).flatten(),
            peak_rss_bytes: around.alone.then(machine::peak_rss_bytes).flatten(),
            host: host(),
            build: machine::BUILD.into(),
            isa: machine::isa(),
            device: format!("{} {}", machine::device_name(task.device), task.compute),
            threads: task.threads,
            attempt: task.attempt,
        },
    };
    let wrote = record.write(&to, !stands)?;
    // What cannot be removed now is only space.
    let _ = store.drop_checkpoints(&task.key);
    let differs = match wrote {
        Wrote::New => return Ok(Reply::Made { record: Box::new(record), differs: Vec::new() }),
        Wrote::Same => Vec::new(),
        Wrote::Differs(ports) => ports,
    };
    // The first result stands; what flows on is what it says.
    let record = match look_up(store, &task.key)? {
        Ok(first) => first,
        Err(why) => {
            let why = why.map_or_else(|| "it is gone".into(), |w| w.to_string());
            bail!("the result was published and cannot be read back: {why}");
        }
    };
    Ok(Reply::Made { record, differs })
}

/// Takes the key's lease, saying once for whom it waits; `None` when the run is being stopped.
fn lease(task: &Task, around: &Around<'_>) -> Result<Option<Lease>> {
    let name = task.key.to_string();
    let mut pause = Duration::from_millis(5);
    let mut said = false;
    loop {
        if let Some(lease) = around.store.try_lease_with(&name, &task.run, around.spares)? {
            return Ok(Some(lease));
        }
        if around.cancel.load(Ordering::Relaxed) {
            return Ok(None);
        }
        std::thread::sleep(pause);
        // A holder that is gone after one pause was only looking; one that has just come has not
        // yet written down who it is.
        if !said && pause > Duration::from_millis(5) {
            let holder = around.store.holder(&name).map(|holder| holder.to_string());
            let unknown = pause > Duration::from_millis(100);
            if let Some(holder) = holder.or_else(|| unknown.then(|| "another run".into())) {
                said = true;
                (around.say)(Said::Waiting(holder));
            }
        }
        pause = (pause * 2).min(Duration::from_millis(250));
    }
}

/// Runs a body of a kind; a panic is a failure with its message.
pub(super) fn guarded(body: impl FnOnce() -> Result<()>) -> Result<()> {
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(result) => result,
        Err(panic) => {
            let message = panic_message(panic.as_ref());
            let fault = Fault::new(format!("the step panicked: {message}"));
            Err(fault.help("this is a bug in flow, not in the pipeline").into())
        }
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".into())
}

/// Checks that what came out is what was declared, and publishes it.
fn publish(
    store: &Store,
    step: &dyn Step,
    dir: &Path,
    produced: &Produced,
) -> Result<BTreeMap<String, Digest>> {
    let out = dir.join("out");
    let mut written = BTreeSet::new();
    if out.is_dir() {
        // A command may have taken its own right to write away.
        store.disk().open_folders(&out)?;
        for entry in std::fs::read_dir(&out)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            ensure!(
                entry.file_type()?.is_dir(),
                "the step wrote `{name}` beside its ports; files belong under a port"
            );
            written.insert(name);
        }
    }
    let referenced = &produced.referenced;
    let made: BTreeSet<&String> =
        written.iter().chain(produced.adopted.keys()).chain(referenced.keys()).collect();
    if let Some(declared) = step.ports().names {
        let list = |names: Vec<&String>| {
            names.iter().map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", ")
        };
        let missing: Vec<&String> = declared.iter().filter(|n| !made.contains(n)).collect();
        ensure!(missing.is_empty(), "the step did not make {}", list(missing));
        let extra: Vec<&String> = made.iter().filter(|n| !declared.contains(n)).copied().collect();
        ensure!(extra.is_empty(), "the step made {}, which it did not declare", list(extra));
    }
    ensure!(!made.is_empty(), "the step made no output");
    let mut ports = BTreeMap::new();
    for port in made {
        let tree = match produced.adopted.get(port) {
            Some(tree) => {
                let twice = written.contains(port) || referenced.contains_key(port);
                ensure!(!twice, "port `{port}` is adopted and written");
                ensure!(store.tree(tree)?.is_some(), "port `{port}` adopts a tree that is lost");
                *tree
            }
            None => {
                let entries = referenced.get(port).map_or(&[][..], Vec::as_slice);
                let published = store.publish_tree_with(&out.join(port), entries);
                published.with_context(|| format!("publishing port `{port}`"))?
            }
        };
        ports.insert(port.clone(), tree);
    }
    Ok(ports)
}

/// Files outside the store that a step reads: file inputs and referenced blobs. Anyone can edit
/// them while it runs.
struct Outsiders {
    files: Vec<(PathBuf, BTreeMap<PathBuf, FileState>)>,
}

impl Outsiders {
    /// Notes their state, after checking that file inputs still have the bytes in the key, and
    /// that what is read from the store is undamaged.
    fn of(store: &Store, params: &Value) -> Result<Self> {
        let mut files = Vec::new();
        let mut found = Vec::new();
        collect(params, &mut found);
        for what in found {
            match what {
                Read::File(path, digest) => {
                    let states = store.states(&path)?;
                    if store.tree_of_path(&path)?.digest_of_outside()? != digest {
                        let shown = path.display();
                        let fault = Fault::new(format!("{shown} changed after the plan was made"));
                        return Err(fault.help("run again").into());
                    }
                    files.push((path, states));
                }
                Read::Tree(tree) => {
                    for entry in store.tree(&tree)?.into_iter().flat_map(|t| t.entries) {
                        let Some(path) = store.locate_entry(&entry)? else { continue };
                        if !path.starts_with(store.root()) {
                            let states = store.states(&path)?;
                            files.push((path, states));
                        } else if !store.verify(&entry.digest)? {
                            let damaged = format!("`{}` in the store is damaged", entry.path);
                            let help = "it is set aside now: run again, and it is made again";
                            return Err(Fault::new(damaged).help(help).into());
                        }
                    }
                }
            }
        }
        Ok(Self { files })
    }

    fn unchanged(&self, store: &Store) -> Result<()> {
        for (path, before) in &self.files {
            if store.states(path).ok().as_ref() != Some(before) {
                let shown = path.display().to_string();
                let help = "run again once nothing writes to it any more";
                return Err(anyhow::Error::from(Tainted(shown))
                    .context(Fault::new("an input moved").help(help)));
            }
        }
        Ok(())
    }
}

/// The trees that a step with these parameters reads.
pub(super) fn trees_read(params: &Value) -> Vec<Digest> {
    let mut found = Vec::new();
    collect(params, &mut found);
    let trees = found.into_iter().filter_map(|read| match read {
        Read::Tree(tree) => Some(tree),
        Read::File(..) => None,
    });
    trees.collect()
}

enum Read {
    File(PathBuf, Digest),
    Tree(Digest),
}

fn collect(params: &Value, out: &mut Vec<Read>) {
    let digest = |v: &Value| v.as_str().and_then(|s| s.parse::<Digest>().ok());
    match params {
        Value::Array(items) => items.iter().for_each(|v| collect(v, out)),
        Value::Object(map) => {
            if let (1, Some(file)) = (map.len(), map.get("$file")) {
                let path = file["path"].as_str().map(PathBuf::from);
                if let (Some(path), Some(digest)) = (path, digest(&file["digest"])) {
                    out.push(Read::File(path, digest));
                }
            } else if let (1, Some(input)) = (map.len(), map.get("$input")) {
                let ports = input["ports"].as_object().into_iter().flatten();
                out.extend(ports.filter_map(|(_, v)| digest(v)).map(Read::Tree));
            } else if let (1, Some(gather)) = (map.len(), map.get("$gather")) {
                for member in gather["members"].as_array().into_iter().flatten() {
                    let ports = member["input"]["ports"].as_object().into_iter().flatten();
                    out.extend(ports.filter_map(|(_, v)| digest(v)).map(Read::Tree));
                }
            } else {
                map.values().for_each(|v| collect(v, out));
            }
        }
        _ => {}
    }
}

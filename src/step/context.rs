//! What a running step may touch.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Binding, Dirs, Input};
use crate::artifact::{Artifact, View};
use crate::digest::Digest;
use crate::hub;
use crate::source::Fault;
use crate::store::{Entry, KEPT_ATTEMPT, Memos, Origin, Store};

/// Numbers and words about a run that belong to its record, not to its output: parameter counts,
/// rows, throughput, times.
pub type Facts = Map<String, Value>;

/// [`Context::checkpoint_every`] where a step does not say: what a killed process may cost.
pub const CHECKPOINT_EVERY: Duration = Duration::from_secs(600);

/// The class of device that models run on; part of the key of kinds that run models.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Device {
    /// The processor.
    #[default]
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
}

/// A step's verdict on its inputs: to try again cannot help, and the folder of the attempt is kept
/// for the user to look at ([`Context::kept_dir`]).
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Refused(#[source] pub Fault);

/// What a step says while it runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// How far it is.
    Progress {
        /// Units done.
        done: u64,
        /// Units in all; 0 if not known.
        total: u64,
        /// What is counted (`rows`, `steps`, `bytes`).
        unit: String,
        /// A few words beside the bar (`loss 0.412  3,214 tok/s`).
        message: String,
    },
    /// A point of a curve.
    Metric {
        /// `train/loss`, `eval/accuracy`, …
        name: String,
        /// Optimizer step.
        step: u64,
        /// The value; never NaN or infinite.
        value: f64,
    },
    /// A line for the log.
    Log {
        /// The line.
        line: String,
    },
    /// Something the user should know; shown, and kept in the record.
    Warning {
        /// The message.
        message: String,
    },
}

/// What a step made, beside the files under its output directories.
#[derive(Debug, Default)]
pub struct Produced {
    /// Ports that are existing trees (a selected model, a trained model's base).
    pub adopted: BTreeMap<String, Digest>,
    /// Entries of ports whose bytes stay where they are.
    pub referenced: BTreeMap<String, Vec<(Entry, Origin)>>,
    /// For the record.
    pub facts: Facts,
    /// For the record.
    pub warnings: Vec<String>,
    /// Packs of the memos that it was made of.
    pub memos: Mutex<BTreeSet<Digest>>,
    /// Whether all of it is made, memos that are kept or not: a run that was forced.
    pub afresh: bool,
}

/// What a running step may touch: its inputs, its output directories, a scratch directory, the
/// hub client; and how it says how far it is.
pub struct Context<'a> {
    /// The store that inputs are read from.
    pub store: Store,
    /// The hub client.
    pub hub: &'a hub::Hub,
    /// The attempt's private directory; outputs go under `out/`.
    pub attempt_dir: PathBuf,
    /// Directories in it.
    pub dirs: &'a Dirs,
    /// The step's key: what checkpoints are kept under.
    pub key: Digest,
    /// The program; a checkpoint of another one is not gone on from.
    pub build: String,
    /// How often it keeps a checkpoint, if it can go on from one.
    pub checkpoint_every: Duration,
    /// How long it may take to end once the run is being stopped.
    pub grace: Duration,
    /// Threads it may use.
    pub threads: usize,
    /// Where models run.
    pub device: Device,
    /// In which arithmetic models run (`f32`, `bf16`).
    pub compute: String,
    /// Environment that the step declared (`env:`), by name.
    pub env: BTreeMap<String, String>,
    /// Raised when the run is being stopped.
    pub cancel: &'a AtomicBool,
    /// Takes events.
    pub emit: &'a (dyn Fn(Event) + Sync),
    /// To be called once the work is done and all that is left is to keep what it gave: what the
    /// step was lent can be another's meanwhile. Nothing need call it.
    pub rest: &'a (dyn Fn() + Sync),
    /// What it has made so far.
    pub produced: Produced,
}

impl Context<'_> {
    /// Opens an input.
    ///
    /// # Errors
    /// When the store has lost it or it is not of the expected form.
    pub fn open<A: Artifact>(&self, input: &Input<A>) -> Result<A> {
        A::open(self.view(&input.binding)?)
    }

    /// Opens what a binding (of a gather's member, of a text) is bound to.
    ///
    /// # Errors
    /// When it is not bound yet.
    pub fn view(&self, binding: &Binding) -> Result<View> {
        let ports = binding.ports.clone().context("this edge is not bound yet")?;
        Ok(View { ty: binding.ty, ports, store: self.store.clone() })
    }

    /// The directory of an output port, made if need be. What lies in it when the step returns is
    /// the port.
    ///
    /// # Errors
    /// When it cannot be made, or the name would lead out of the attempt's directory: names of
    /// splits come from cards and pipelines that others wrote.
    pub fn out_dir(&self, port: &str) -> Result<PathBuf> {
        let mut parts = Path::new(port).components();
        let plain = matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None));
        ensure!(plain && !port.contains(['/', '\0']), "`{port}` cannot be the name of an output");
        let dir = self.attempt_dir.join("out").join(port);
        self.make_dir(&dir)?;
        Ok(dir)
    }

    /// A directory for files that are not outputs.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn scratch_dir(&self) -> Result<PathBuf> {
        let dir = self.attempt_dir.join("scratch");
        self.make_dir(&dir)?;
        Ok(dir)
    }

    /// Makes a directory below the attempt's, with those that it is in; fine if it is there.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn make_dir(&self, dir: &Path) -> Result<()> {
        self.dirs.make(dir).with_context(|| format!("making {}", dir.display()))
    }

    /// Where the folder of this attempt lies in the end if the step fails as [`Refused`].
    pub fn kept_dir(&self) -> PathBuf {
        let name = self.attempt_dir.file_name().unwrap_or_default();
        self.attempt_dir.with_file_name(format!("{KEPT_ATTEMPT}{}", name.display()))
    }

    /// Keeps a folder of this attempt as the newest checkpoint, for the next attempt to go on
    /// from if this one does not come to its end. The folder is taken over.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn checkpoint(&self, dir: &Path) -> Result<()> {
        self.store.keep_checkpoint(&self.key, &self.build, dir)
    }

    /// The checkpoint that an earlier attempt at the same key left, if this program wrote it;
    /// otherwise the log says why there is none to go on from.
    pub fn resume(&self) -> Option<PathBuf> {
        match self.store.checkpoint(&self.key) {
            Ok(None) => None,
            Ok(Some((dir, build))) if build == self.build => Some(dir),
            Ok(Some(_)) => {
                self.log("starts over: its checkpoint is of another build of flow");
                None
            }
            Err(e) => {
                self.log(format!("starts over: its checkpoint cannot be read ({e:#})"));
                None
            }
        }
    }

    /// Parts of results that have a scope in common: what decides them beside their keys.
    pub fn memos(&self, scope: &Digest) -> Memos {
        self.store.memos(scope)
    }

    /// A part of the result: what was kept under a key, else what `make` makes, which is kept.
    /// Everything that decides the bytes must be in the key or in the scope. May be called by
    /// several threads.
    ///
    /// # Errors
    /// When `make` fails. What cannot be kept is made again another time.
    pub fn memo(
        &self,
        memos: &Memos,
        key: &Digest,
        make: &mut dyn FnMut() -> Result<Vec<u8>>,
    ) -> Result<Vec<u8>> {
        let kept = if self.produced.afresh { None } else { memos.get(key) };
        let (bytes, pack) = match kept {
            Some(kept) => kept,
            None => {
                let bytes = make()?;
                let Ok(pack) = memos.keep(key, &bytes) else { return Ok(bytes) };
                (bytes, pack)
            }
        };
        self.produced.memos.lock().unwrap_or_else(PoisonError::into_inner).insert(pack);
        Ok(bytes)
    }

    /// Makes an existing tree a port of this step's output.
    pub fn adopt(&mut self, port: impl Into<String>, tree: Digest) {
        self.produced.adopted.insert(port.into(), tree);
    }

    /// Adds a file to a port without copying it: its bytes stay at `origin`.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn reference(&mut self, port: &str, path: &str, origin: Origin) -> Result<()> {
        let (digest, size) = self.store.digest_of_file(&origin.path)?;
        let entry = Entry { path: path.to_owned(), digest, size, executable: false };
        let entries = self.produced.referenced.entry(port.to_owned()).or_default();
        entries.push((entry, origin));
        Ok(())
    }

    /// Writes a JSON file (pretty, with a newline at the end) into a directory.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write_json(&self, dir: &Path, name: &str, value: &impl Serialize) -> Result<()> {
        let mut text = serde_json::to_string_pretty(value)?;
        text.push('\n');
        let path = dir.join(name);
        std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
    }

    /// Says how far the step is.
    pub fn progress(&self, done: u64, total: u64, unit: &str, message: impl Into<String>) {
        let (unit, message) = (unit.to_owned(), message.into());
        (self.emit)(Event::Progress { done, total, unit, message });
    }

    /// A point of a curve; a value that is not finite is logged instead.
    pub fn metric(&self, name: &str, step: u64, value: f64) {
        if value.is_finite() {
            (self.emit)(Event::Metric { name: name.to_owned(), step, value });
        } else {
            self.log(format!("{name} at step {step} is {value}"));
        }
    }

    /// A line for the log.
    pub fn log(&self, line: impl Into<String>) {
        (self.emit)(Event::Log { line: line.into() });
    }

    /// Something the user should know; shown, and kept in the record.
    pub fn warn(&mut self, message: impl Into<String>) {
        let message = message.into();
        (self.emit)(Event::Warning { message: message.clone() });
        self.produced.warnings.push(message);
    }

    /// A number or word for the record.
    pub fn fact(&mut self, name: &str, value: impl Into<Value>) {
        self.produced.facts.insert(name.to_owned(), value.into());
    }

    /// Whether the run is being stopped; a step returns soon after with [`Context::stop`].
    pub fn cancelled(&self) -> bool {
        self.cancel.load(Ordering::Relaxed)
    }

    /// Fails if the run is being stopped; call it in every long loop.
    ///
    /// # Errors
    /// When the run is being stopped.
    pub fn stop(&self) -> Result<()> {
        ensure!(!self.cancelled(), "interrupted");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hub::{Hub, HubSettings};

    #[test]
    fn outputs_stay_in_the_attempt() {
        let dir = tempfile::tempdir().unwrap();
        let hub = Hub::new(HubSettings::new(dir.path()));
        let cx = Context {
            store: Store::open(&dir.path().join("store")).unwrap(),
            hub: &hub,
            attempt_dir: dir.path().join("attempt"),
            dirs: &Dirs::default(),
            key: Digest::of(b"key"),
            build: String::new(),
            checkpoint_every: CHECKPOINT_EVERY,
            grace: Duration::from_secs(30),
            threads: 1,
            device: Device::Cpu,
            compute: "f32".into(),
            env: BTreeMap::new(),
            cancel: &AtomicBool::new(false),
            emit: &|_| {},
            rest: &|| {},
            produced: Produced::default(),
        };
        let evil = dir.path().join("evil");
        for bad in ["../../evil", evil.to_str().unwrap(), "..", ".", "", "a/b", "a/", "a\0"] {
            assert!(cx.out_dir(bad).is_err(), "{bad:?}");
        }
        assert!(!evil.exists());
        assert_eq!(cx.out_dir("en.x-1").unwrap(), dir.path().join("attempt/out/en.x-1"));
    }
}

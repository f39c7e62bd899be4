//! What a run is given by the roof.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use super::gpu::Gpu;
use super::machine;
use crate::hub::Hub;
use crate::lineage::RunInfo;
use crate::step::Device;
use crate::store::{Store, host};

/// How to start this program as a worker: `exe args… DIR`.
#[derive(Debug, Clone)]
pub struct WorkerCommand {
    /// The program.
    pub exe: PathBuf,
    /// Arguments before the attempt's directory (`["worker"]`).
    pub args: Vec<String>,
}

/// Settings of a run.
#[derive(Debug, Clone)]
pub struct Options {
    /// CPU slots; at least 1.
    pub jobs: usize,
    /// GPUs that may be lent to steps.
    pub gpus: Vec<Gpu>,
    /// Where they were looked for, to be said to who asks for more; may be empty.
    pub gpus_sought: String,
    /// Bytes of memory that may be lent to steps; without limit if absent.
    pub memory: Option<u64>,
    /// What else may be lent, by name.
    pub resources: BTreeMap<String, u64>,
    /// Steps or instances to run, with what they need; all if empty.
    pub targets: Vec<String>,
    /// Steps or instances to run even if their result is there.
    pub force: Vec<String>,
    /// After a failure, still run what does not depend on it.
    pub keep_going: bool,
    /// The lock must not grow.
    pub locked: bool,
    /// No network; passed on to workers.
    pub offline: bool,
    /// Class of device that models run on.
    pub device: Device,
    /// Compute mode that models run in unless a step says otherwise (`f32`, `bf16`).
    pub compute: String,
    /// How to start workers; without it every step runs on a thread of this process.
    pub worker: Option<WorkerCommand>,
    /// Between SIGTERM and SIGKILL.
    pub grace: Duration,
    /// The folder named `outputs`; results appear under `<outputs>/<pipeline>/`.
    pub outputs: PathBuf,
    /// The lock's path; beside the pipeline file if absent.
    pub lock: Option<PathBuf>,
    /// As typed, for the journal.
    pub command_line: Vec<String>,
    /// Points that a sweep may have, as the plan was made with.
    pub sweep_cap: usize,
    /// `--set` values, as the plan was made with.
    pub sets: BTreeMap<String, String>,
    /// The environment of this process; workers get an allow-list of it and what a step declares.
    pub environment: BTreeMap<String, String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            jobs: 1,
            gpus: Vec::new(),
            gpus_sought: String::new(),
            memory: None,
            resources: BTreeMap::new(),
            targets: Vec::new(),
            force: Vec::new(),
            keep_going: false,
            locked: false,
            offline: false,
            device: Device::Cpu,
            compute: "f32".into(),
            worker: None,
            grace: Duration::from_secs(30),
            outputs: "outputs".into(),
            lock: None,
            command_line: Vec::new(),
            sweep_cap: 256,
            sets: BTreeMap::new(),
            environment: BTreeMap::new(),
        }
    }
}

/// A store, a hub and settings: all that a plan needs to be run.
#[derive(Debug)]
pub struct Session<'a> {
    /// Where results and records are.
    pub store: Store,
    /// The hub client.
    pub hub: &'a Hub,
    /// Raised by the roof when the user interrupts.
    pub cancel: &'a AtomicBool,
    /// Settings.
    pub options: Options,
}

impl Session<'_> {
    /// What the journal says at the start of a run of a pipeline; the id comes with the journal.
    pub(super) fn run_info(
        &self,
        pipeline: &str,
        file: &Path,
        started_unix_ms: u64,
    ) -> std::io::Result<RunInfo> {
        Ok(RunInfo {
            id: String::new(),
            pipeline: pipeline.to_owned(),
            // As it can be found from anywhere.
            file: std::path::absolute(file)?,
            command_line: self.options.command_line.clone(),
            sets: self.options.sets.clone(),
            started_unix_ms,
            host: host(),
            pid: std::process::id(),
            build: machine::BUILD.into(),
            unchanged: None,
        })
    }
}

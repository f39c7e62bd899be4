//! What a run says: the only way out of the engine.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::gpu::Gpu;
use crate::digest::Digest;
use crate::lineage::{State, Status, Why};
use crate::step::{Event, Facts};

/// Something that happened in a run. Bars, plain lines, `--json`, the journal and tests all
/// observe this one stream; it is delivered on the thread that called [`run`](super::run).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum RunEvent {
    /// The plan is resolved, and work begins.
    RunStarted {
        /// Run id.
        run: String,
        /// The pipeline's name.
        pipeline: String,
        /// Instances, in plan order.
        steps: Vec<String>,
        /// CPU slots.
        jobs: usize,
    },
    /// Nothing has changed since a run that was done in full: every result is in the store, and
    /// the pipeline was not resolved. Stands in place of [`RunEvent::RunStarted`] and the hits.
    Unchanged {
        /// Run id.
        run: String,
        /// The pipeline's name.
        pipeline: String,
        /// Steps.
        steps: usize,
        /// The run that was done in full; its journal has the steps and their keys.
        since: String,
    },
    /// The result was in the store.
    Hit {
        /// Instance.
        step: String,
        /// Its key.
        key: Digest,
        /// Seconds that making it took, when it was made.
        saved_seconds: f64,
        /// The run and the step in it that made it (`RUN:STEP`): its journal has the log and the
        /// curves.
        #[serde(default)]
        made_by: String,
        /// What it warned of when it was made.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        warnings: Vec<String>,
    },
    /// The result was not in the store.
    Miss {
        /// Instance.
        step: String,
        /// Its key.
        key: Digest,
        /// Why; its `Display` is one line.
        why: Why,
    },
    /// Another run is making the same result.
    Waiting {
        /// Instance.
        step: String,
        /// For whom (`run 2026…, pid 42 on host, for 12 s`).
        holder: String,
    },
    /// An attempt begins.
    Started {
        /// Instance.
        step: String,
        /// From 1.
        attempt: u32,
        /// CPU slots it got.
        threads: usize,
        /// GPUs it got.
        gpus: Vec<Gpu>,
    },
    /// The running step said something.
    Step {
        /// Instance.
        step: String,
        /// What.
        event: Event,
    },
    /// An attempt failed and the step is tried again.
    Retrying {
        /// Instance.
        step: String,
        /// The attempt that failed, from 1.
        attempt: u32,
        /// Attempts that it gets in all.
        #[serde(default)]
        of: u32,
        /// Why it failed.
        message: String,
        /// The pause before the next; the step holds no slot meanwhile.
        #[serde(default)]
        in_seconds: f64,
    },
    /// A result was made (or, after [`RunEvent::Waiting`], taken from the other run).
    Finished {
        /// Instance.
        step: String,
        /// Its key.
        key: Digest,
        /// Wall-clock seconds.
        seconds: f64,
        /// What the record says: rows, parameter counts, throughput.
        facts: Facts,
        /// Another process made it meanwhile.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        taken: bool,
        /// Ports at which it gave other bytes than an earlier time (a forced step: the first
        /// result stands).
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        differs: Vec<String>,
    },
    /// A step failed for good.
    Failed {
        /// Instance.
        step: String,
        /// What went wrong.
        message: String,
        /// Its causes, outermost first.
        chain: Vec<String>,
        /// What to do about it.
        help: Vec<String>,
        /// The last lines of its log.
        log_tail: Vec<String>,
        /// Its whole log.
        log_path: Option<PathBuf>,
    },
    /// A step was not run.
    Skipped {
        /// Instance.
        step: String,
        /// Why (`train@r=8 failed`, `the run was stopped`).
        because: String,
    },
    /// An output stands under `outputs/`.
    OutputPublished {
        /// Its name.
        name: String,
        /// Where.
        path: PathBuf,
        /// Where the copy that the user had edited was moved to.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        kept: Option<PathBuf>,
    },
    /// All is done.
    RunFinished {
        /// Run id.
        run: String,
        /// How it ended.
        status: Status,
        /// Steps that ran.
        ran: usize,
        /// Steps whose result was there.
        hits: usize,
        /// Steps that failed.
        failed: usize,
        /// Steps that were not run.
        skipped: usize,
        /// Wall-clock seconds.
        seconds: f64,
    },
}

/// How a run ended.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Run id.
    pub run: String,
    /// How it ended.
    pub status: Status,
    /// State by instance, in plan order.
    pub steps: Vec<(String, State)>,
    /// Steps that ran.
    pub ran: usize,
    /// Steps whose result was there.
    pub hits: usize,
    /// Steps that failed.
    pub failed: usize,
    /// Steps that were not run.
    pub skipped: usize,
    /// Wall-clock seconds.
    pub seconds: f64,
    /// A step failed because the store's disk is full or cannot be written.
    pub store_failed: bool,
}

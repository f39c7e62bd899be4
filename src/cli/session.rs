//! From a pipeline file and options to a plan and a session of the engine.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::Context as _;

use super::Stage;
use super::arguments::{PipelineOptions, PlanOptions};
use super::environment::project_root;
use super::error::{Exit, Failure};
use crate::engine::{Forecast, Options, Prospect, Session, WorkerCommand};
use crate::hub::Hub;
use crate::pipeline::{Instance, Plan, Settings};
use crate::source::{Fault, Source};
use crate::step::{Device, Needs};
use crate::store::Store;

/// Reads a pipeline file.
pub(super) fn read(file: &Path) -> Result<String, Failure> {
    std::fs::read_to_string(file).map_err(|e| {
        let fault = Fault::new(format!("cannot read the pipeline {}", file.display()));
        Failure::Usage(fault.help(neighbours(file)).cause(e).into())
    })
}

/// Reads and checks a pipeline file.
pub(super) fn load(stage: &Stage, options: &PipelineOptions) -> Result<Plan, Failure> {
    check(stage, options, read(&options.file)?)
}

/// Checks the text of a pipeline file.
pub(super) fn check(
    stage: &Stage,
    options: &PipelineOptions,
    text: String,
) -> Result<Plan, Failure> {
    let file = &options.file;
    let settings = Settings {
        sets: pairs(&options.sets)?,
        env: stage.environment.variables.clone(),
        sweep_cap: options.sweep_cap,
    };
    let source = Source::new(file.display().to_string(), text);
    Plan::new(file, source.clone(), stage.kinds, &settings)
        .map_err(|diagnostics| Failure::Pipeline(source, diagnostics))
}

/// The folder that a file is in.
fn folder_of(file: &Path) -> &Path {
    file.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// The pipelines that stand beside a path that does not exist.
fn neighbours(file: &Path) -> String {
    let dir = folder_of(file);
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path());
    let yaml = |p: &PathBuf| p.extension().is_some_and(|e| e == "yaml" || e == "yml");
    let mut names: Vec<String> = entries.filter(yaml).map(|p| p.display().to_string()).collect();
    names.sort_unstable();
    if names.is_empty() {
        return format!("there is no .yaml file in {}", dir.display());
    }
    format!("there is {}", names.join(", "))
}

fn pairs(sets: &[String]) -> Result<Vec<(String, String)>, Failure> {
    let split = sets.iter().map(|set| {
        let pair = set.split_once('=').map(|(path, value)| (path.to_owned(), value.to_owned()));
        let fault = || Fault::new(format!("`--set {set}` has no `=`"));
        pair.ok_or_else(|| fault().help("write `--set params.name=value`").into())
    });
    split.collect::<anyhow::Result<_>>().map_err(Failure::Usage)
}

/// What a session of the engine borrows.
pub(super) struct Ground {
    pub(super) store: Store,
    pub(super) hub: Hub,
    pub(super) cancel: Arc<AtomicBool>,
    /// Signals seen so far; a second one ends the program at once.
    pub(super) signals: Arc<AtomicUsize>,
}

/// Opens the store that belongs to the working directory (for commands without a pipeline).
pub(super) fn store_here(stage: &Stage) -> Result<Store, Failure> {
    let root = project_root(Path::new("."));
    let dir = stage.environment.store_dir(stage.store.as_deref(), &root);
    if !dir.is_dir() {
        let fault = Fault::new(format!("there is no store at {}", dir.display()));
        let help = "run a pipeline first, or name the store with --store or FLOW_STORE";
        return Err(Failure::Usage(fault.help(help).into()));
    }
    Ok(Store::open(&dir)?)
}

/// The folder of the store that belongs to a pipeline.
pub(super) fn store_dir(stage: &Stage, options: &PlanOptions) -> PathBuf {
    let root = project_root(folder_of(&options.pipeline.file));
    stage.environment.store_dir(stage.store.as_deref(), &root)
}

/// Opens the store that belongs to a pipeline, and the hub.
pub(super) fn ground(stage: &Stage, options: &PlanOptions) -> Result<Ground, Failure> {
    let dir = store_dir(stage, options);
    Ok(Ground::on(stage, Store::open(&dir)?, options.offline))
}

impl Ground {
    /// The ground over a store.
    pub(super) fn on(stage: &Stage, store: Store, offline: bool) -> Self {
        Self {
            store,
            hub: stage.environment.hub(offline),
            cancel: Arc::new(AtomicBool::new(false)),
            signals: Arc::new(AtomicUsize::new(0)),
        }
    }

    /// Ctrl-C and SIGTERM stop the run: children are ended, finished work is kept. A second
    /// signal does not wait for them.
    pub(super) fn listen(&self) -> Result<(), Failure> {
        let mut signals = signal_hook::iterator::Signals::new([
            signal_hook::consts::SIGINT,
            signal_hook::consts::SIGTERM,
            signal_hook::consts::SIGHUP,
        ])?;
        let (cancel, seen) = (Arc::clone(&self.cancel), Arc::clone(&self.signals));
        std::thread::spawn(move || {
            for _ in signals.forever() {
                cancel.store(true, Ordering::Relaxed);
                if seen.fetch_add(1, Ordering::Relaxed) > 0 {
                    // children die with this process: each watches for its end
                    signal_hook::low_level::exit(Exit::Interrupted as i32);
                }
            }
        });
        Ok(())
    }

    /// A session of the engine over this ground.
    pub(super) fn session(
        &self,
        stage: &Stage,
        options: &PlanOptions,
        keep_going: bool,
        grace: Duration,
    ) -> Result<Session<'_>, Failure> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let exe = std::env::current_exe().context("finding this program's own path")?;
        let file = std::path::absolute(&options.pipeline.file)?;
        let sets: BTreeMap<String, String> = pairs(&options.pipeline.sets)?.into_iter().collect();
        Ok(Session {
            store: self.store.clone(),
            hub: &self.hub,
            cancel: &self.cancel,
            options: Options {
                jobs: options.jobs.unwrap_or(cores).max(1),
                gpus: gpus(),
                targets: options.steps.clone(),
                force: options.force.clone(),
                keep_going,
                locked: options.locked,
                offline: options.offline,
                device: Device::Cpu,
                compute: "f32".to_owned(),
                worker: Some(WorkerCommand { exe, args: vec!["worker".to_owned()] }),
                grace,
                outputs: project_root(folder_of(&file)).join("outputs"),
                lock: None,
                command_line: std::env::args_os().map(|a| a.to_string_lossy().into()).collect(),
                sweep_cap: options.pipeline.sweep_cap,
                sets,
                environment: stage.environment.variables.clone(),
            },
        })
    }
}

/// GPUs that steps can be lent: none, as no build of this program computes on one yet.
fn gpus() -> Vec<u32> {
    Vec::new()
}

/// What a step asks for.
pub(super) fn needs_of(instance: &Instance) -> Needs {
    instance.policy.needs.unwrap_or_else(|| instance.parsed.needs())
}

/// Steps of a plan that ask for more than there is.
pub(super) fn shortages_of(plan: &Plan) -> Vec<String> {
    let steps = plan.order().into_iter().map(|node| &plan.graph[node]);
    shortages(steps.map(|i| (i.id.to_string(), needs_of(i).gpu)))
}

/// Steps that would run and ask for more than there is.
pub(super) fn shortages_ahead(forecasts: &[Forecast]) -> Vec<String> {
    let cached = |f: &&Forecast| matches!(f.prospect, Prospect::Cached { .. });
    shortages(forecasts.iter().filter(|f| !cached(f)).map(|f| (f.step.clone(), f.needs.gpu)))
}

fn shortages(steps: impl Iterator<Item = (String, usize)>) -> Vec<String> {
    let have = gpus().len();
    let mut short: BTreeMap<usize, Vec<String>> = BTreeMap::new();
    for (step, gpu) in steps.filter(|(_, gpu)| *gpu > have) {
        short.entry(gpu).or_default().push(step);
    }
    let lines = short.into_iter().map(|(gpu, steps)| {
        let (steps, s) = (steps.join(", "), if gpu == 1 { "" } else { "s" });
        format!("{steps}: asks for {gpu} GPU{s}, and there is none that this build can use")
    });
    lines.collect()
}

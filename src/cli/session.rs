//! From a pipeline file and options to a plan and a session of the engine.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::Context as _;

use super::Stage;
use super::arguments::{PipelineOptions, PlanOptions};
use super::error::{Exit, Failure};
use super::project::Project;
use crate::engine::{Forecast, Options, Prospect, Session, WorkerCommand};
use crate::hub::Hub;
use crate::pipeline::{Plan, Settings};
use crate::source::{Fault, Source};
use crate::step::Device;
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
    let project = Project::of(folder_of(file))?;
    let settings = Settings {
        sets: pairs(&options.sets)?,
        env: stage.environment.variables.clone(),
        sweep_cap: options.sweep_cap,
        resources: project.resources.into_keys().collect(),
    };
    let source = Source::new(file.display().to_string(), text);
    Plan::new(file, source.clone(), stage.kinds, &settings)
        .map_err(|diagnostics| Failure::Pipeline(source, diagnostics))
}

/// The folder that a file is in.
pub(super) fn folder_of(file: &Path) -> &Path {
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
    pub(super) project: Project,
    pub(super) store: Store,
    pub(super) hub: Hub,
    pub(super) cancel: Arc<AtomicBool>,
    /// Signals seen so far; a second one ends the program at once.
    pub(super) signals: Arc<AtomicUsize>,
}

/// Opens the store that belongs to the working directory (for commands without a pipeline).
pub(super) fn store_here(stage: &Stage) -> Result<Store, Failure> {
    let dir = Project::of(Path::new("."))?.store(stage);
    if !dir.is_dir() {
        let fault = Fault::new(format!("there is no store at {}", dir.display()));
        let help = "run a pipeline first, or name the store with --store or FLOW_STORE";
        return Err(Failure::Usage(fault.help(help).into()));
    }
    Ok(Store::open(&dir)?)
}

/// Opens the store that belongs to a pipeline, and the hub.
pub(super) fn ground(stage: &Stage, options: &PlanOptions) -> Result<Ground, Failure> {
    let project = Project::of(folder_of(&options.pipeline.file))?;
    let store = Store::open(&project.store(stage))?;
    Ok(Ground::on(stage, project, store, options.offline))
}

impl Ground {
    /// The ground over a store.
    pub(super) fn on(stage: &Stage, project: Project, store: Store, offline: bool) -> Self {
        Self {
            project,
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
        let mut session = self.asking(stage, options, keep_going, grace)?;
        self.lend(&mut session, options);
        Ok(session)
    }

    /// Fills in what there is to lend to steps, which takes a look at the machine.
    pub(super) fn lend(&self, session: &mut Session<'_>, options: &PlanOptions) {
        session.options.jobs = options.jobs.map_or_else(|| self.project.jobs(), |n| n.max(1));
        session.options.memory = self.project.memory();
    }

    /// A session that has nothing to lend yet: enough to see that nothing has changed.
    pub(super) fn asking(
        &self,
        stage: &Stage,
        options: &PlanOptions,
        keep_going: bool,
        grace: Duration,
    ) -> Result<Session<'_>, Failure> {
        let exe = std::env::current_exe().context("finding this program's own path")?;
        let (gpus, gpus_sought) = self.project.gpus(&stage.environment);
        let device = options.device.unwrap_or(match gpus.is_empty() {
            true => Device::Cpu,
            false => Device::Cuda,
        });
        let sets: BTreeMap<String, String> = pairs(&options.pipeline.sets)?.into_iter().collect();
        Ok(Session {
            store: self.store.clone(),
            hub: &self.hub,
            cancel: &self.cancel,
            options: Options {
                gpus,
                gpus_sought,
                resources: self.project.resources.clone(),
                targets: options.steps.clone(),
                force: options.force.clone(),
                keep_going,
                locked: options.locked,
                offline: options.offline,
                device,
                compute: options.compute(device).to_owned(),
                worker: Some(WorkerCommand { exe, args: vec!["worker".to_owned()] }),
                grace,
                outputs: self.project.outputs.clone(),
                lock: None,
                command_line: std::env::args_os().map(|a| a.to_string_lossy().into()).collect(),
                sweep_cap: options.pipeline.sweep_cap,
                sets,
                environment: stage.environment.variables.clone(),
                ..Options::default()
            },
        })
    }
}

/// Steps of a plan that ask for more than there is.
pub(super) fn shortages_of(plan: &Plan, options: &Options) -> Vec<String> {
    let steps = plan.order().into_iter().map(|node| &plan.graph[node]);
    shortages(steps.map(|i| (i.id.to_string(), options.shortage(&options.needs(i)))))
}

/// Steps that would run and ask for more than there is.
pub(super) fn shortages_ahead(forecasts: &[Forecast], options: &Options) -> Vec<String> {
    let cached = |f: &&Forecast| matches!(f.prospect, Prospect::Cached { .. });
    let ahead = forecasts.iter().filter(|f| !cached(f));
    shortages(ahead.map(|f| (f.step.clone(), options.shortage(&f.needs))))
}

fn shortages(steps: impl Iterator<Item = (String, Vec<String>)>) -> Vec<String> {
    let mut short: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (step, shortage) in steps.filter(|(_, shortage)| !shortage.is_empty()) {
        short.entry(shortage.join("; ")).or_default().push(step);
    }
    let lines = short.into_iter();
    lines.map(|(what, steps)| format!("{}: asks for {what}", steps.join(", "))).collect()
}

//! `flow run`, and the worker that it starts.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::Stage;
use super::arguments::{PipelineOptions, PlanOptions, RunOptions};
use super::error::{Exit, Failure, show_diagnostics};
use super::progress::Screen;
use super::session::{ground, load, needs_of, shortages_ahead};
use crate::digest::Digest;
use crate::engine::{self, RunEvent, Unresolved};
use crate::lineage::{Record, Results, Runs, Status};
use crate::source::{Diagnostic, Fault, advice};
use crate::store::Store;

/// `flow run FILE [STEP…]`.
pub(super) fn run(stage: &Stage, options: &RunOptions) -> Result<Exit, Failure> {
    let plan = load(stage, &options.plan.pipeline)?;
    show_diagnostics(&plan.source, &plan.warnings, stage.plain);
    let ground = ground(stage, &options.plan)?;
    let grace = Duration::from_secs(options.grace);
    let session = ground.session(stage, &options.plan, options.keep_going, grace)?;
    let needed = plan.needed_for(&session.options.targets)?;
    if needed.iter().any(|node| needs_of(&plan.graph[*node]).gpu > session.options.gpus.len()) {
        // Only now is it worth asking which of them would run at all.
        let short = shortages_ahead(&engine::forecast(&plan, &session)?);
        if !short.is_empty() {
            let help = "without `needs: { gpu: … }` the step runs on the CPU, if slowly";
            return Err(Failure::Usage(Fault::new(short.join("; ")).help(help).into()));
        }
    }
    ground.listen()?;
    let mut screen = Screen::new(stage.json, stage.plain);
    let mut fickle = Fickle::of(&ground.store);
    let outcome = engine::run(&plan, &session, &mut |event| {
        screen.show(event);
        fickle.watch(event);
    });
    drop(screen);
    let outcome = outcome.map_err(|error| unresolved(&plan.source, error))?;
    fickle.warn();
    if options.record && outcome.status == Status::Done {
        let path = plan.file.with_extension("results");
        let run = Runs::of(&ground.store).load(&outcome.run)?;
        Results::of_run(&ground.store, &run)?.save(&ground.store, &path)?;
        errln!("results -> {}", path.display());
    }
    Ok(match outcome.status {
        Status::Failed if outcome.store_failed => Exit::Internal,
        Status::Done => Exit::Done,
        Status::Interrupted => Exit::Interrupted,
        Status::Failed | Status::Running | Status::Died => Exit::StepFailed,
    })
}

/// Steps of a run whose key has given other bytes before.
struct Fickle {
    keys: BTreeSet<Digest>,
    seen: Vec<String>,
}

impl Fickle {
    fn of(store: &Store) -> Self {
        Self { keys: Record::differing(store), seen: Vec::new() }
    }

    fn watch(&mut self, event: &RunEvent) {
        if let RunEvent::Hit { step, key, .. } | RunEvent::Finished { step, key, .. } = event
            && self.keys.contains(key)
        {
            self.seen.push(step.clone());
        }
    }

    fn warn(&self) {
        for step in &self.seen {
            errln!(
                "warning: {step} does not give the same bytes every time; see `flow show {step}`"
            );
        }
    }
}

/// `flow update FILE`.
pub(super) fn update(stage: &Stage, pipeline: PipelineOptions) -> Result<Exit, Failure> {
    let plan = load(stage, &pipeline)?;
    show_diagnostics(&plan.source, &plan.warnings, stage.plain);
    let (steps, force) = (Vec::new(), Vec::new());
    let (jobs, locked, offline) = (None, false, false);
    let options = PlanOptions { pipeline, steps, jobs, force, locked, offline };
    let ground = ground(stage, &options)?;
    let session = ground.session(stage, &options, false, Duration::ZERO)?;
    let updated = engine::update(&plan, &session).map_err(|e| unresolved(&plan.source, e))?;
    if stage.json {
        let list = updated.iter().map(|u| json!({ "name": u.name, "old": u.old, "new": u.new }));
        outln!("{}", Value::Array(list.collect()))?;
        return Ok(Exit::Done);
    }
    if updated.is_empty() {
        outln!("nothing has changed outside")?;
    }
    for line in updated {
        outln!("{}  {} -> {}", line.name, line.old.as_deref().unwrap_or("(new)"), line.new)?;
    }
    Ok(Exit::Done)
}

/// Failures to resolve outside names, shown at the steps that name them.
pub(super) fn unresolved(source: &crate::source::Source, error: anyhow::Error) -> Failure {
    let Some(Unresolved(list)) = error.downcast_ref::<Unresolved>() else {
        return error.into();
    };
    let diagnostics = list.iter().map(|(step, span, error)| {
        let help = Some(advice(error).join("; ")).filter(|h| !h.is_empty());
        let label = format!("`{step}` needs it");
        Diagnostic::error(*span, format!("{error:#}"), label).maybe_help(help)
    });
    Failure::Pipeline(source.clone(), diagnostics.collect())
}

/// `flow worker DIR`.
pub(super) fn worker(stage: &Stage, dir: &Path) -> Result<Exit, Failure> {
    let hub = stage.environment.hub(false);
    let done = engine::worker(dir, stage.kinds, &hub, &stage.environment.variables)?;
    Ok(if done { Exit::Done } else { Exit::StepFailed })
}

//! `flow run`, and the worker that it starts.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::arguments::{PipelineOptions, PlanOptions, RunOptions};
use super::error::{Exit, Failure, show_diagnostics};
use super::progress::Screen;
use super::project::Project;
use super::session::{Ground, check, folder_of, ground, load, read, shortages_ahead};
use super::{Stage, shell};
use crate::digest::Digest;
use crate::engine::{self, Outcome, Unresolved};
use crate::lineage::{Record, Results, Runs, Status};
use crate::source::{Diagnostic, Fault, advice};
use crate::step::Needs;
use crate::store::Store;

/// `flow run FILE [STEP…]`.
pub(super) fn run(stage: &Stage, options: &RunOptions) -> Result<Exit, Failure> {
    let (pipeline, grace) = (&options.plan.pipeline, Duration::from_secs(options.grace));
    let text = read(&pipeline.file)?;
    let project = Project::of(folder_of(&pipeline.file))?;
    let dir = project.store(stage);
    // A pipeline that is wrong leaves no store behind.
    let checked = if dir.is_dir() { None } else { Some(check(stage, pipeline, text.clone())?) };
    let ground = Ground::on(stage, project, Store::open(&dir)?, options.plan.offline);
    let mut session = ground.asking(stage, &options.plan, options.keep_going, grace)?;
    let plan = match checked {
        Some(plan) => plan,
        None => {
            let mut screen = Screen::new(stage.json, stage.plain, String::new());
            let mut show = |event: &engine::RunEvent| screen.show(event);
            if let Some(outcome) = engine::unchanged(&pipeline.file, &text, &session, &mut show)? {
                let fickle = Record::differing(&ground.store);
                return finish(options, &ground.store, &outcome, &fickle);
            }
            check(stage, pipeline, text)?
        }
    };
    ground.lend(&mut session, &options.plan);
    show_diagnostics(&plan.source, &plan.warnings, stage.plain);
    let needed = plan.needed_for(&session.options.targets)?;
    let fits = |needs: Needs| session.options.shortage(&needs).is_empty();
    if !needed.iter().all(|node| fits(session.options.needs(&plan.graph[*node]))) {
        // Only now is it worth asking which of them would run at all.
        let short = shortages_ahead(&engine::forecast(&plan, &session)?, &session.options);
        if !short.is_empty() {
            let help = "let `needs` ask for less (without a GPU a step runs on the CPU, if \
                slowly), or declare what there is in `flow.toml` under `[resources]`";
            return Err(Failure::Usage(Fault::new(short.join("; ")).help(help).into()));
        }
    }
    ground.listen()?;
    let mut screen =
        Screen::new(stage.json, stage.plain, shell::line(&session.options.command_line));
    let fickle = Record::differing(&ground.store);
    let outcome = engine::run(&plan, &session, &mut |event| screen.show(event));
    drop(screen);
    let outcome = outcome.map_err(|error| unresolved(&plan.source, error))?;
    finish(options, &ground.store, &outcome, &fickle)
}

/// What is left to do and to say when a run has ended. `fickle` holds the keys that had given
/// several results before it.
fn finish(
    options: &RunOptions,
    store: &Store,
    outcome: &Outcome,
    fickle: &BTreeSet<Digest>,
) -> Result<Exit, Failure> {
    let record = options.record && outcome.status == Status::Done;
    if record || !fickle.is_empty() {
        let run = Runs::of(store).load(&outcome.run)?;
        for step in run.summary.iter().flat_map(|s| &s.steps) {
            if step.key.is_some_and(|key| fickle.contains(&key)) {
                let id = &step.id;
                errln!("warning: {id} has given other bytes for the same key: `flow show {id}`");
            }
        }
        if record {
            let path = options.plan.pipeline.file.with_extension("results");
            Results::of_run(store, &run)?.save(store, &path)?;
            errln!("results -> {}", path.display());
        }
    }
    Ok(match outcome.status {
        Status::Failed if outcome.store_failed => Exit::Internal,
        Status::Done => Exit::Done,
        Status::Interrupted => Exit::Interrupted,
        Status::Failed | Status::Running | Status::Died => Exit::StepFailed,
    })
}

/// `flow update FILE`.
pub(super) fn update(stage: &Stage, pipeline: PipelineOptions) -> Result<Exit, Failure> {
    let plan = load(stage, &pipeline)?;
    show_diagnostics(&plan.source, &plan.warnings, stage.plain);
    let (steps, force) = (Vec::new(), Vec::new());
    let options = PlanOptions {
        pipeline,
        steps,
        jobs: None,
        device: None,
        compute: None,
        force,
        locked: false,
        offline: false,
    };
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

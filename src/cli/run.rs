//! `flow run`, and the worker that it starts.

use std::path::Path;
use std::time::Duration;

use super::Stage;
use super::arguments::RunOptions;
use super::error::{Exit, Failure, show_diagnostics};
use super::progress::Screen;
use super::session::{ground, load, shortages};
use crate::engine::{self, Unresolved};
use crate::lineage::Status;
use crate::source::{Diagnostic, Fault, advice};

/// `flow run FILE [STEP…]`.
pub(super) fn run(stage: &Stage, options: &RunOptions) -> Result<Exit, Failure> {
    let plan = load(stage, &options.plan.pipeline)?;
    show_diagnostics(&plan.source, &plan.warnings, stage.plain);
    let ground = ground(stage, &options.plan)?;
    let grace = Duration::from_secs(options.grace);
    let session = ground.session(stage, &options.plan, options.keep_going, grace)?;
    let short = shortages(&plan, &session);
    if !short.is_empty() {
        let help = "run it where there is a GPU and a worker built for it (FLOW_CUDA_WORKER)";
        return Err(Failure::Usage(Fault::new(short.join("; ")).help(help).into()));
    }
    ground.listen()?;
    let mut screen = Screen::new(stage.json, stage.plain);
    let outcome = engine::run(&plan, &session, &mut |event| screen.show(event));
    drop(screen);
    let outcome = outcome.map_err(|error| unresolved(&plan.source, error))?;
    Ok(match outcome.status {
        Status::Done => Exit::Done,
        Status::Interrupted => Exit::Interrupted,
        Status::Failed | Status::Running | Status::Died => Exit::StepFailed,
    })
}

/// Failures to resolve outside names, shown at the steps that name them.
fn unresolved(source: &crate::source::Source, error: anyhow::Error) -> Failure {
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

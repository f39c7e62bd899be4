//! `flow reproduce`: results made again and compared with those on record.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::json;

use super::arguments::{PipelineOptions, PlanOptions, ReproduceOptions, device};
use super::error::{Exit, Failure, show_diagnostics};
use super::progress::Screen;
use super::project::Project;
use super::run::unresolved;
use super::session::{Ground, folder_of, ground, load, store_here};
use super::{Stage, out, table};
use crate::artifact::{Comparison, Likeness};
use crate::engine::{self, Reproduced, Verdict};
use crate::lineage::{Record, Results, Run, Runs};
use crate::source::Fault;
use crate::step::Device;
use crate::store::Store;

/// `flow reproduce FILE|RUN [STEP…]`.
pub(super) fn reproduce(stage: &Stage, options: ReproduceOptions) -> Result<Exit, Failure> {
    let file = PathBuf::from(&options.what);
    let against = if file.is_file() { Against::Results(file) } else { found_run(stage, &file)? };
    let (file, sets) = match &against {
        Against::Results(file) => {
            let results = Results::load(&file.with_extension("results"))?;
            (file.clone(), results.sets)
        }
        Against::Run(_, run) => (run.info.file.clone(), run.info.sets.clone()),
    };
    let mut plan_options = PlanOptions {
        pipeline: PipelineOptions {
            file,
            sets: sets.iter().map(|(path, value)| format!("{path}={value}")).collect(),
            // The run had its points, whatever cap it was given.
            sweep_cap: usize::MAX,
        },
        steps: options.steps,
        jobs: options.jobs,
        device: options.device,
        compute: options.compute,
        force: Vec::new(),
        locked: true,
        offline: options.offline,
    };
    let plan = load(stage, &plan_options.pipeline)?;
    show_diagnostics(&plan.source, &plan.warnings, stage.plain);
    let (ground, recorded) = match against {
        Against::Results(file) => {
            let ground = ground(stage, &plan_options)?;
            let recorded =
                Results::load(&file.with_extension("results"))?.records(&ground.store)?;
            (ground, recorded)
        }
        Against::Run(store, run) => {
            let recorded = run.records(&store)?;
            let project = Project::of(folder_of(&plan_options.pipeline.file))?;
            (Ground::on(stage, project, store, options.offline), recorded)
        }
    };
    if recorded.is_empty() {
        let fault = Fault::new(format!("`{}` has no results to compare with", options.what));
        return Err(Failure::Usage(fault.into()));
    }
    let (device, compute) = ran_on(&recorded).unzip();
    if plan_options.device.is_none() || plan_options.device == device {
        plan_options.device = device;
        plan_options.compute = plan_options.compute.or(compute);
    }
    let session = ground.session(stage, &plan_options, false, Duration::from_secs(30))?;
    ground.listen()?;
    let mut screen = Screen::new(false, stage.plain, String::new());
    let reproduced =
        engine::reproduce(&plan, &session, &recorded, options.tolerance, &mut |event| {
            screen.show(event);
        });
    drop(screen);
    let reproduced = reproduced.map_err(|error| unresolved(&plan.source, error))?;
    show(stage, &recorded, &reproduced)?;
    if ground.cancel.load(Ordering::Relaxed) {
        return Ok(Exit::Interrupted);
    }
    let holds = reproduced.iter().all(|r| r.verdict.holds());
    Ok(if holds { Exit::Done } else { Exit::StepFailed })
}

/// Where the models of what is on record ran, and in what arithmetic: on a GPU if any of them did,
/// because `needs` can send some of its steps to the CPU. Nothing if there are none.
fn ran_on(recorded: &BTreeMap<String, Record>) -> Option<(Device, String)> {
    let places = recorded.values().filter_map(Record::model_place);
    let places = places.filter_map(|(name, compute)| Some((device(name).ok()?, compute)));
    let place = places.max_by_key(|(device, _)| *device == Device::Cuda)?;
    Some((place.0, place.1.to_owned()))
}

/// What is compared with.
enum Against {
    /// The results file beside this pipeline.
    Results(PathBuf),
    /// The records of a run.
    Run(Store, Box<Run>),
}

/// The run of a name that is no file.
fn found_run(stage: &Stage, what: &Path) -> Result<Against, Failure> {
    let name = what.display().to_string();
    if what.extension().is_some_and(|e| e == "yaml" || e == "yml") {
        let fault = Fault::new(format!("there is no pipeline {name}"));
        return Err(Failure::Usage(fault.help("name a pipeline, or a run of `flow runs`").into()));
    }
    let store = store_here(stage)?;
    let run = Runs::of(&store).find(&name)?;
    if !run.info.file.is_file() {
        let file = run.info.file.display();
        let fault = Fault::new(format!("the pipeline of run {} is gone: {file}", run.info.id));
        let help = "put it back, or name a pipeline that has a results file";
        return Err(Failure::Usage(fault.help(help).into()));
    }
    Ok(Against::Run(store, Box::new(run)))
}

/// How a verdict reads, and what more there is to say.
fn words(reproduced: &Reproduced) -> (String, String) {
    let (word, mut more) = match &reproduced.verdict {
        Verdict::Compared(comparison) => {
            (comparison.likeness.name().to_owned(), detail(comparison))
        }
        Verdict::Measured => ("measured anew".to_owned(), String::new()),
        Verdict::Unchecked { because } => ("not compared".to_owned(), because.clone()),
        Verdict::Failed { message } => ("failed".to_owned(), message.clone()),
    };
    if !reproduced.inputs_from.is_empty() {
        let read = format!("read what {} gave now", reproduced.inputs_from.join(", "));
        more = if more.is_empty() { read } else { format!("{more}; {read}") };
    }
    (word, more)
}

fn detail(comparison: &Comparison) -> String {
    let mut parts = Vec::new();
    if let Some(first) = &comparison.first {
        let at = if first.at.is_empty() { String::new() } else { format!(", {}", first.at) };
        parts.push(format!("{}{at}: {} -> {}", first.file, first.old, first.new));
    }
    if let Some(largest) = comparison.largest.filter(|x| *x > 0.0) {
        parts.push(format!("floats at most {largest:.3e} off"));
    }
    if let Some(reason) = &comparison.unread {
        let by = match comparison.likeness {
            Likeness::WithinTolerance => "by its metrics",
            _ => "by digests and metrics",
        };
        parts.push(format!("{by} only ({reason})"));
    }
    parts.join("; ")
}

fn show(
    stage: &Stage,
    recorded: &BTreeMap<String, Record>,
    reproduced: &[Reproduced],
) -> Result<(), Failure> {
    let mut tally: Vec<(String, usize)> = Vec::new();
    let mut rows = Vec::new();
    for step in reproduced {
        let (word, more) = words(step);
        match tally.iter_mut().find(|(w, _)| *w == word) {
            Some((_, n)) => *n += 1,
            None => tally.push((word.clone(), 1)),
        }
        let time = if step.seconds > 0.0 { table::seconds(step.seconds) } else { String::new() };
        let before = recorded.get(&step.step).map_or(0.0, |r| r.made.seconds);
        let before = if before > 0.0 { table::seconds(before) } else { String::new() };
        rows.push(vec![step.step.clone(), word, time, before, more]);
    }
    if stage.json {
        let holds = reproduced.iter().all(|r| r.verdict.holds());
        outln!("{}", json!({ "holds": holds, "steps": reproduced }))?;
        return Ok(());
    }
    out::text(&table::render(&["step", "result", "time", "before", "first difference"], &rows))?;
    let counts: Vec<String> = tally.iter().map(|(word, n)| format!("{n} {word}")).collect();
    outln!("\n{}", counts.join(", "))?;
    Ok(())
}

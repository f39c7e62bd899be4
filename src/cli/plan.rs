//! `flow plan`, `flow validate`, `flow graph`: what would be done, without doing it.

use std::collections::BTreeSet;
use std::time::Duration;

use petgraph::visit::EdgeRef;
use serde::Serialize;
use serde_json::json;

use super::arguments::{PipelineOptions, PlanOptions};
use super::error::{Exit, Failure, diagnostics_json, show_diagnostics};
use super::project::Project;
use super::session::{folder_of, ground, load, shortages_ahead, shortages_of};
use super::{Stage, out, table};
use crate::engine::{self, Estimate, Forecast, Prospect};
use crate::pipeline::Plan;

/// `flow validate FILE`.
pub(super) fn validate(stage: &Stage, options: &PipelineOptions) -> Result<Exit, Failure> {
    let plan = load(stage, options)?;
    show_diagnostics(&plan.source, &plan.warnings, stage.plain);
    let lends = Project::of(folder_of(&options.file))?.lends(&stage.environment);
    for warning in shortages_of(&plan, &lends) {
        errln!("warning: {warning}");
    }
    if stage.json {
        outln!("{}", diagnostics_json(&plan.source, &plan.warnings))?;
    } else {
        let counts = counts(plan.points.len(), plan.graph.node_count());
        outln!("{}: {counts}", plan.source.name)?;
    }
    Ok(Exit::Done)
}

/// `flow graph FILE`.
pub(super) fn graph(stage: &Stage, options: &PipelineOptions) -> Result<Exit, Failure> {
    let plan = load(stage, options)?;
    if stage.json {
        let nodes = plan.order().into_iter().map(|node| {
            let i = &plan.graph[node];
            json!({ "id": i.id, "step": i.step, "kind": i.kind.name, "point": i.point })
        });
        let edges = plan.graph.edge_references().map(|edge| {
            let (from, to) = (&plan.graph[edge.source()].id, &plan.graph[edge.target()].id);
            json!({ "from": from, "to": to, "port": edge.weight().port })
        });
        let (nodes, edges): (Vec<_>, Vec<_>) = (nodes.collect(), edges.collect());
        outln!("{}", json!({ "name": plan.name, "nodes": nodes, "edges": edges }))?;
        return Ok(Exit::Done);
    }
    outln!("digraph {:?} {{\n  rankdir=LR; node [shape=box];", plan.name)?;
    for node in plan.order() {
        let instance = &plan.graph[node];
        outln!("  {:?} [label=\"{}\\n{}\"];", instance.id.0, instance.id, instance.kind.name)?;
    }
    for edge in plan.graph.edge_indices() {
        let Some((from, to)) = plan.graph.edge_endpoints(edge) else { continue };
        let port = plan.graph[edge].port.as_deref().unwrap_or_default();
        outln!("  {:?} -> {:?} [label={port:?}];", plan.graph[from].id.0, plan.graph[to].id.0)?;
    }
    outln!("}}")?;
    Ok(Exit::Done)
}

/// `flow plan FILE [STEP…]`.
pub(super) fn plan(stage: &Stage, options: &PlanOptions) -> Result<Exit, Failure> {
    let plan = load(stage, &options.pipeline)?;
    show_diagnostics(&plan.source, &plan.warnings, stage.plain);
    let ground = ground(stage, options)?;
    let session = ground.session(stage, options, false, Duration::ZERO)?;
    let forecasts = engine::forecast(&plan, &session)?;
    let short = shortages_ahead(&forecasts, &session.options);
    for warning in &short {
        errln!("warning: {warning}");
    }
    let tally = Tally::of(&plan, &forecasts);
    let estimate = Estimate::of(&plan, &forecasts, &session.options);
    if stage.json {
        let whole = json!({
            "points": plan.points.len(), "tally": tally, "steps": forecasts,
            "expected": estimate, "shortages": short,
        });
        outln!("{whole}")?;
        return Ok(Exit::Done);
    }
    let rows = forecasts.iter().map(|f| {
        let (state, because) = match &f.prospect {
            Prospect::Cached { key } => ("cached", key.short()),
            Prospect::WillRun { why, .. } => ("will run", why.to_string()),
            Prospect::WaitsOn { steps } => ("waits", format!("for {}", steps.join(", "))),
            Prospect::Unresolved { reason } => ("unresolved", reason.clone()),
        };
        let cached = state == "cached";
        let about = if cached { "" } else { "~" };
        let time = f.cost.as_ref().map(|c| format!("{about}{}", table::seconds(c.seconds)));
        vec![f.step.clone(), state.to_owned(), time.unwrap_or_default(), because]
    });
    let rows: Vec<Vec<String>> = rows.collect();
    out::text(&table::render(&["step", "state", "time", "because"], &rows))?;
    let Tally { cached, to_run, waiting, unresolved, shared } = tally;
    let shared = if plan.points.len() > 1 {
        format!(" ({shared} shared by all points)")
    } else {
        String::new()
    };
    let steps = counts(plan.points.len(), forecasts.len());
    outln!("\n{steps}{shared}: {cached} cached, {to_run} to run, {waiting} waiting for those")?;
    if estimate.steps > 0 {
        out::text(&told(&estimate, session.options.jobs))?;
    }
    if unresolved > 0 {
        outln!("{unresolved} could not be resolved: `flow run` would stop before it starts")?;
    }
    Ok(Exit::Done)
}

/// How many steps of a plan are in which state.
#[derive(Debug, Default, Serialize)]
struct Tally {
    cached: usize,
    to_run: usize,
    waiting: usize,
    unresolved: usize,
    /// Steps that read no axis of the sweep.
    shared: usize,
}

impl Tally {
    fn of(plan: &Plan, forecasts: &[Forecast]) -> Self {
        let mut tally = Self::default();
        let instances = plan.graph.node_weights();
        let shared: BTreeSet<&str> =
            instances.filter(|i| i.point.is_empty()).map(|i| i.id.0.as_str()).collect();
        for forecast in forecasts {
            match forecast.prospect {
                Prospect::Cached { .. } => tally.cached += 1,
                Prospect::WillRun { .. } => tally.to_run += 1,
                Prospect::WaitsOn { .. } => tally.waiting += 1,
                Prospect::Unresolved { .. } => tally.unresolved += 1,
            }
            tally.shared += usize::from(shared.contains(forecast.step.as_str()));
        }
        tally
    }
}

/// What a run is expected to cost, and of how much of it nothing is known.
fn told(estimate: &Estimate, jobs: usize) -> String {
    let Estimate { steps, unknown, unknown_memory, unknown_output, guessed, .. } = *estimate;
    let s = |n: usize| if n == 1 { "" } else { "s" };
    let line = |what: &str, amount: String, unknown: usize| {
        let known = steps - unknown;
        match (known, unknown) {
            (0, _) => format!("  {what}unknown: no step like these has it on record\n"),
            (_, 0) => format!("  {what}{amount}\n"),
            _ => format!("  {what}{amount}, unknown for {unknown} of {steps} steps\n"),
        }
    };
    let work = table::seconds(estimate.work_seconds);
    let time = table::seconds(estimate.seconds);
    let time = format!("about {time} on {jobs} CPU slot{} ({work} of work)", s(jobs));
    let memory = format!("about {} at one time", table::bytes(estimate.peak_rss_bytes));
    let disk = format!("about {}", table::bytes(estimate.output_bytes));
    let mut text = "expected, from what steps like these took before:\n".to_owned();
    text += &line("time    ", time, unknown);
    text += &line("memory  ", memory, unknown_memory);
    text += &line("disk    ", disk, unknown_output);
    if guessed > 0 {
        text += &format!("  {guessed} step{} judged by another of the same kind\n", s(guessed));
    }
    text
}

fn counts(points: usize, steps: usize) -> String {
    let s = |n: usize| if n == 1 { "" } else { "s" };
    format!("{points} point{}, {steps} step{}", s(points), s(steps))
}

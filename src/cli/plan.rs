//! `flow plan`, `flow validate`, `flow graph`: what would be done, without doing it.

use std::time::Duration;

use petgraph::visit::EdgeRef;
use serde_json::json;

use super::arguments::{PipelineOptions, PlanOptions};
use super::error::{Exit, Failure, diagnostics_json, show_diagnostics};
use super::session::{ground, load, shortages_ahead, shortages_of};
use super::{Stage, out, table};
use crate::engine::{self, Prospect};
use crate::pipeline::Plan;

/// `flow validate FILE`.
pub(super) fn validate(stage: &Stage, options: &PipelineOptions) -> Result<Exit, Failure> {
    let plan = load(stage, options)?;
    show_diagnostics(&plan.source, &plan.warnings, stage.plain);
    for warning in shortages_of(&plan) {
        errln!("warning: {warning}");
    }
    if stage.json {
        outln!("{}", diagnostics_json(&plan.source, &plan.warnings))?;
    } else {
        outln!("{}: {}", plan.source.name, counts(&plan))?;
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
    for warning in shortages_ahead(&forecasts) {
        errln!("warning: {warning}");
    }
    if stage.json {
        outln!("{}", json!(forecasts))?;
        return Ok(Exit::Done);
    }
    let mut tally = [0; 4];
    let rows = forecasts.iter().map(|f| {
        let (which, state, because) = match &f.prospect {
            Prospect::Cached { key } => (0, "cached", key.short()),
            Prospect::WillRun { why, .. } => (1, "will run", why.to_string()),
            Prospect::WaitsOn { steps } => (2, "waits", format!("for {}", steps.join(", "))),
            Prospect::Unresolved { reason } => (3, "unresolved", reason.clone()),
        };
        tally[which] += 1;
        let before = f.last_seconds.map(table::seconds).unwrap_or_default();
        vec![f.step.clone(), state.to_owned(), before, because]
    });
    let rows: Vec<Vec<String>> = rows.collect();
    out::text(&table::render(&["step", "state", "last time", "because"], &rows))?;
    let [cached, to_run, waiting, unresolved] = tally;
    outln!("\n{}: {cached} cached, {to_run} to run, {waiting} waiting for those", counts(&plan))?;
    if unresolved > 0 {
        outln!("{unresolved} could not be resolved: `flow run` would stop before it starts")?;
    }
    Ok(Exit::Done)
}

fn counts(plan: &Plan) -> String {
    let steps = plan.graph.node_count();
    let points = plan.points.len();
    let s = |n: usize| if n == 1 { "" } else { "s" };
    format!("{points} point{}, {steps} step{}", s(points), s(steps))
}

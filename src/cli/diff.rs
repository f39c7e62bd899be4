//! `flow diff`: what differs between two runs, two steps or two keys.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use serde_json::{Value, json};

use super::Stage;
use super::arguments::DiffOptions;
use super::error::{Exit, Failure};
use super::history::record_of;
use super::session::store_here;
use super::steps::steps_named;
use crate::digest::Digest;
use crate::lineage::{Change, Record, Run, Runs, difference, is_measured, trace};
use crate::source::Fault;
use crate::store::Store;

/// What is compared: a run with all of its records, or one record.
enum Side {
    Run(Box<Run>),
    One(String, Box<Record>),
}

/// How a step stands in two runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum State {
    Same,
    Changed,
    OnlyInA,
    OnlyInB,
}

/// A number or word that differs.
#[derive(Debug, PartialEq, Serialize)]
struct Pair<T> {
    name: String,
    a: Option<T>,
    b: Option<T>,
}

/// What differs at one step.
#[derive(Debug, Serialize)]
struct StepDiff {
    step: String,
    state: State,
    changes: Vec<Change>,
    metrics: Vec<Pair<Value>>,
    outputs: Vec<Pair<Digest>>,
}

/// `flow diff A B`.
pub(super) fn diff(stage: &Stage, options: &DiffOptions) -> Result<Exit, Failure> {
    let store = store_here(stage)?;
    let (a, b) = (side(&store, &options.a)?, side(&store, &options.b)?);
    let steps = match (a, b) {
        (Side::Run(a), Side::Run(b)) => {
            let (a, b) = (a.records(&store)?, b.records(&store)?);
            let ids: BTreeSet<&String> = a.keys().chain(b.keys()).collect();
            ids.into_iter().map(|id| step_diff(&store, id, a.get(id), b.get(id))).collect()
        }
        (Side::One(a_id, a), Side::One(b_id, b)) => {
            let id = if a_id == b_id { a_id } else { format!("{a_id} | {b_id}") };
            vec![step_diff(&store, &id, Some(&a), Some(&b))]
        }
        _ => {
            let fault = Fault::new("one of them is a run, the other is a step");
            let help = "name two runs, or a step of each as RUN:STEP";
            return Err(Failure::Usage(fault.help(help).into()));
        }
    };
    if stage.json {
        outln!("{}", json!(steps))?;
        return Ok(Exit::Done);
    }
    show(&steps)?;
    Ok(Exit::Done)
}

/// What a name stands for.
fn side(store: &Store, name: &str) -> Result<Side, Failure> {
    let runs = Runs::of(store);
    if let Some((run, step)) = name.split_once(':') {
        return one(store, &runs.find(run)?, step);
    }
    let not_a_run = match runs.find(name) {
        Ok(run) => return Ok(Side::Run(Box::new(run))),
        Err(error) => error,
    };
    let digest = name.len() >= 6 && name.bytes().all(|b| b.is_ascii_hexdigit());
    let latest = runs.find("latest")?;
    match one(store, &latest, name) {
        Err(_) if digest => {
            let lineage = trace(store, name)?;
            let record = lineage.records.into_iter().next().ok_or(not_a_run)?;
            Ok(Side::One(record.made.step.clone(), Box::new(record)))
        }
        other => other,
    }
}

/// The record of the one step of a run that a name stands for.
fn one(store: &Store, run: &Run, name: &str) -> Result<Side, Failure> {
    let steps = steps_named(run, Some(name))?;
    let [step] = steps.as_slice() else {
        let ids: Vec<&str> = steps.iter().map(|s| s.id.as_str()).collect();
        let (n, run) = (ids.len(), &run.info.id);
        let fault = Fault::new(format!("`{name}` names {n} steps of run {run}"));
        return Err(Failure::Usage(fault.help(format!("take one: {}", ids.join(", "))).into()));
    };
    let record = record_of(store, step.key)?.ok_or_else(|| {
        let fault = Fault::new(format!("{} has no result", step.id));
        Failure::Usage(
            fault.help(format!("in run {} it {}", run.info.id, step.state.word())).into(),
        )
    })?;
    Ok(Side::One(step.id.clone(), record))
}

fn step_diff(store: &Store, id: &str, a: Option<&Record>, b: Option<&Record>) -> StepDiff {
    let (changes, metrics, outputs) = (Vec::new(), Vec::new(), Vec::new());
    let mut diff = StepDiff { step: id.to_owned(), state: State::Same, changes, metrics, outputs };
    let (a, b) = match (a, b) {
        (Some(a), Some(b)) => (a, b),
        (a, _) => {
            diff.state = if a.is_some() { State::OnlyInA } else { State::OnlyInB };
            return diff;
        }
    };
    if a.key == b.key {
        return diff;
    }
    diff.state = State::Changed;
    diff.changes = difference(&a.preimage, &b.preimage, &names(store, b));
    let (mut of_a, mut of_b) = (a.metrics(store), b.metrics(store));
    of_a.retain(|name, _| !is_measured(name));
    of_b.retain(|name, _| !is_measured(name));
    diff.metrics = pairs(&of_a.into_iter().collect(), &of_b.into_iter().collect());
    diff.outputs = pairs(&a.ports, &b.ports);
    diff
}

/// The steps behind a record's inputs, by path.
fn names(store: &Store, record: &Record) -> BTreeMap<String, String> {
    let sources = record.made.sources.iter().filter_map(|(path, key)| {
        let source = record_of(store, Some(*key)).ok().flatten()?;
        Some((path.clone(), source.made.step))
    });
    sources.collect()
}

/// What has another value, by name.
fn pairs<T: Clone + PartialEq>(a: &BTreeMap<String, T>, b: &BTreeMap<String, T>) -> Vec<Pair<T>> {
    let names: BTreeSet<&String> = a.keys().chain(b.keys()).collect();
    let differ = names.into_iter().filter(|name| a.get(*name) != b.get(*name));
    differ
        .map(|name| Pair { name: name.clone(), a: a.get(name).cloned(), b: b.get(name).cloned() })
        .collect()
}

fn show(steps: &[StepDiff]) -> std::io::Result<()> {
    let count = |state| steps.iter().filter(|s| s.state == state).count();
    for step in steps {
        match step.state {
            State::Same => continue,
            State::OnlyInA => outln!("{}  only in A", step.step)?,
            State::OnlyInB => outln!("{}  only in B", step.step)?,
            State::Changed => outln!("{}", step.step)?,
        }
        for change in &step.changes {
            outln!("  {change}")?;
        }
        for Pair { name, a, b } in &step.metrics {
            let text = |v: &Option<Value>| v.as_ref().map_or("(absent)".into(), Value::to_string);
            outln!("  metric {name} {} -> {}", text(a), text(b))?;
        }
        for Pair { name, a, b } in &step.outputs {
            let text = |d: &Option<Digest>| d.as_ref().map_or("(absent)".into(), Digest::short);
            outln!("  output {name} {} -> {}", text(a), text(b))?;
        }
        if step.state == State::Changed && step.outputs.is_empty() {
            outln!("  the outputs are the same")?;
        }
    }
    let (same, changed) = (count(State::Same), count(State::Changed));
    let (a, b) = (count(State::OnlyInA), count(State::OnlyInB));
    outln!("{same} the same, {changed} changed, {a} only in A, {b} only in B")
}

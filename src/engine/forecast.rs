//! What a run would do.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use petgraph::Direction;
use petgraph::graph::NodeIndex;
use serde::Serialize;

use super::Session;
use super::bind::{Decision, bind, decide};
use super::prepare::prepare;
use crate::digest::Digest;
use crate::lineage::{Past, Record, Runs, State, Why};
use crate::pipeline::Plan;
use crate::step::Needs;

/// What would become of a step.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Prospect {
    /// Its result is there.
    Cached {
        /// Its key.
        key: Digest,
    },
    /// It would run.
    WillRun {
        /// Its key.
        key: Digest,
        /// Why.
        why: Why,
    },
    /// Its key depends on steps that would run; it may still be a hit.
    WaitsOn {
        /// Those steps.
        steps: Vec<String>,
    },
}

/// What would become of a step, and what is known about its cost.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Forecast {
    /// Instance.
    pub step: String,
    /// Kind.
    pub kind: String,
    /// What would become of it.
    #[serde(flatten)]
    pub prospect: Prospect,
    /// What it needs to run.
    pub needs: Needs,
    /// Seconds that it took when it last ran.
    pub last_seconds: Option<f64>,
}

/// What a run would do, in plan order. Outside names are resolved; nothing is run, and neither
/// the lock nor the store is written.
///
/// # Errors
/// When an outside name cannot be resolved ([`Unresolved`](super::Unresolved)), an input names a
/// port that its producer did not make, or the store cannot be read.
pub fn forecast(plan: &Plan, session: &Session<'_>) -> Result<Vec<Forecast>> {
    let prepared = prepare(plan, session, false)?;
    let past = Past::of(&session.store, &plan.name);
    let mut records: BTreeMap<NodeIndex, Record> = BTreeMap::new();
    let mut forecasts = Vec::new();
    for &node in &prepared.order {
        let instance = &plan.graph[node];
        let step = &prepared.steps[&node];
        let producers = plan.graph.neighbors_directed(node, Direction::Incoming);
        let waits: BTreeSet<String> = producers
            .filter(|p| !records.contains_key(p))
            .map(|p| plan.graph[p].id.0.clone())
            .collect();
        let prospect = if waits.is_empty() {
            let bound = bind(plan, node, step.as_ref(), &records, &session.options)?;
            let forced = prepared.force.contains(&node);
            match decide(&session.store, &past, instance, &bound, forced)? {
                Decision::Hit(record) => {
                    records.insert(node, *record);
                    Prospect::Cached { key: bound.key }
                }
                Decision::Miss(why) => Prospect::WillRun { key: bound.key, why },
            }
        } else {
            Prospect::WaitsOn { steps: waits.into_iter().collect() }
        };
        let last_seconds = records.get(&node).map(|record| record.made.seconds);
        forecasts.push(Forecast {
            step: instance.id.0.clone(),
            kind: instance.kind.name.to_owned(),
            prospect,
            needs: instance.policy.needs.unwrap_or_else(|| step.needs()),
            last_seconds,
        });
    }
    fill_last_seconds(plan, session, &mut forecasts)?;
    Ok(forecasts)
}

/// Looks in the newest journals for steps whose cost is not known from a record.
fn fill_last_seconds(plan: &Plan, session: &Session<'_>, forecasts: &mut [Forecast]) -> Result<()> {
    const NEWEST: usize = 50;
    let runs = Runs::of(&session.store);
    for id in runs.ids()?.into_iter().take(NEWEST) {
        if forecasts.iter().all(|f| f.last_seconds.is_some()) {
            break;
        }
        let Ok(run) = runs.load(&id) else { continue };
        if run.info.pipeline != plan.name {
            continue;
        }
        for forecast in forecasts.iter_mut().filter(|f| f.last_seconds.is_none()) {
            let ran = run.step(&forecast.step).filter(|s| s.state == State::Ran);
            forecast.last_seconds = ran.map(|s| s.seconds);
        }
    }
    Ok(())
}

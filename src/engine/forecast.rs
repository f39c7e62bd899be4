//! What a run would do.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use petgraph::Direction;
use petgraph::graph::NodeIndex;
use serde::Serialize;

use super::Session;
use super::bind::{Decision, bind, decide};
use super::estimate::Cost;
use super::prepare::prepare_what_can;
use crate::digest::Digest;
use crate::lineage::{Past, Record, Why};
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
    /// An outside name could not be resolved now (no network, no such repository): a run would
    /// stop here before anything starts.
    Unresolved {
        /// Why not.
        reason: String,
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
    /// What it cost if it is cached, and is expected to cost if it is not; absent where there
    /// never was a step like it.
    pub cost: Option<Cost>,
}

/// What a run would do, in plan order. Outside names are resolved where they can be; nothing is
/// run, and neither the lock nor the store is written.
///
/// # Errors
/// When an input names a port that its producer did not make, or the store cannot be read.
pub fn forecast(plan: &Plan, session: &Session<'_>) -> Result<Vec<Forecast>> {
    let (prepared, missing) = prepare_what_can(plan, session, false)?;
    let reasons: BTreeMap<&str, String> =
        missing.0.iter().map(|(step, _, error)| (step.as_str(), format!("{error:#}"))).collect();
    let past = Past::of(&session.store, &plan.name);
    let mut records: BTreeMap<NodeIndex, Record> = BTreeMap::new();
    let mut forecasts = Vec::new();
    for &node in &prepared.order {
        let instance = &plan.graph[node];
        let step = prepared.steps.get(&node);
        let producers = plan.graph.neighbors_directed(node, Direction::Incoming);
        let waits: BTreeSet<String> = producers
            .filter(|p| !records.contains_key(p))
            .map(|p| plan.graph[p].id.0.clone())
            .collect();
        let prospect = if let Some(reason) = reasons.get(instance.id.0.as_str()) {
            Prospect::Unresolved { reason: reason.clone() }
        } else if let (true, Some(step)) = (waits.is_empty(), step) {
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
        let cost = match (records.get(&node), &prospect) {
            (Some(record), _) => Some(Cost::spent(record)),
            (None, Prospect::Unresolved { .. }) => None,
            (None, _) => Cost::expected(&session.store, &past, instance)?,
        };
        forecasts.push(Forecast {
            step: instance.id.0.clone(),
            kind: instance.kind.name.to_owned(),
            prospect,
            needs: session.options.needs(instance),
            cost,
        });
    }
    Ok(forecasts)
}

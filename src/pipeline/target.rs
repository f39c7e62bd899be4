//! A part of a plan: some steps and all that they need.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use petgraph::Direction::Incoming;
use petgraph::graph::{DiGraph, NodeIndex};

use super::plan::Plan;
use crate::source::{Fault, suggest};

impl Plan {
    /// The instances that a target names: a step (`train`), an instance (`train@lora.r=8`), or
    /// all instances at some coordinates.
    ///
    /// # Errors
    /// When there is none; with the nearest name.
    pub fn targets(&self, target: &str) -> Result<Vec<NodeIndex>> {
        let named = |n: &NodeIndex| is_named(&self.graph[*n].id.0, target);
        let found: Vec<NodeIndex> = self.graph.node_indices().filter(named).collect();
        if !found.is_empty() {
            return Ok(found);
        }
        let step = target.split('@').next().unwrap_or_default();
        let instances = self.graph.node_weights();
        let of_step: Vec<&str> =
            instances.filter(|i| i.step == step).map(|i| i.id.0.as_str()).collect();
        let steps: BTreeSet<&str> = self.graph.node_weights().map(|i| i.step.as_str()).collect();
        let steps: Vec<&str> = steps.into_iter().collect();
        let help =
            if of_step.is_empty() { suggest(step, &steps) } else { suggest(target, &of_step) };
        let fault = Fault::new(format!("there is no step `{target}`"));
        Err(Fault { help, ..fault }.into())
    }

    /// The targets and everything that they read, directly or not; all of it without targets.
    ///
    /// # Errors
    /// When a target is not in the plan.
    pub fn needed_for(&self, targets: &[String]) -> Result<BTreeSet<NodeIndex>> {
        if targets.is_empty() {
            return Ok(self.graph.node_indices().collect());
        }
        let mut left = Vec::new();
        for target in targets {
            left.extend(self.targets(target)?);
        }
        let mut needed = BTreeSet::new();
        while let Some(node) = left.pop() {
            if needed.insert(node) {
                left.extend(self.graph.neighbors_directed(node, Incoming));
            }
        }
        Ok(needed)
    }

    /// The plan without what the targets do not need. Outputs of steps that are gone are gone.
    ///
    /// # Errors
    /// When a target is not in the plan.
    pub fn only(self, targets: &[String]) -> Result<Self> {
        let needed = self.needed_for(targets)?;
        let mut moved: BTreeMap<NodeIndex, NodeIndex> = BTreeMap::new();
        let mut graph = DiGraph::new();
        let (nodes, edges) = self.graph.into_nodes_edges();
        for (i, node) in nodes.into_iter().enumerate() {
            let old = NodeIndex::new(i);
            if needed.contains(&old) {
                moved.insert(old, graph.add_node(node.weight));
            }
        }
        for edge in edges {
            if let (Some(&from), Some(&to)) = (moved.get(&edge.source()), moved.get(&edge.target()))
            {
                graph.add_edge(from, to, edge.weight);
            }
        }
        let outputs = self.outputs.into_iter().filter_map(|mut output| {
            output.node = *moved.get(&output.node)?;
            Some(output)
        });
        Ok(Self { graph, outputs: outputs.collect(), ..self })
    }
}

/// Whether a target names an instance: by its id (`train@lora.alpha=16,lora.r=8`), by its step
/// (`train`), or by some of its coordinates in any order (`train@lora.r=8`).
pub fn is_named(id: &str, target: &str) -> bool {
    let (step, own) = id.split_once('@').unwrap_or((id, ""));
    let Some((wanted, coordinates)) = target.split_once('@') else { return step == target };
    let own: Vec<&str> = own.split(',').collect();
    id == target || step == wanted && coordinates.split(',').all(|c| own.contains(&c))
}

//! Which steps can be decided: those whose producers all have results.

use std::collections::{BTreeMap, BTreeSet};

use petgraph::Direction;
use petgraph::graph::NodeIndex;

use crate::pipeline::Plan;

/// Keeps count of the producers that each step still waits for, so that a result costs no more
/// than a look at its consumers.
pub(super) struct Ready {
    /// Positions in the order of the plan.
    positions: BTreeMap<NodeIndex, usize>,
    /// Edges from producers without a result.
    open: BTreeMap<NodeIndex, usize>,
    /// Positions of steps that wait for nothing.
    ready: BTreeSet<usize>,
}

impl Ready {
    /// Nothing has a result yet. `order` holds, with every step, its producers.
    pub(super) fn new(plan: &Plan, order: &[NodeIndex]) -> Self {
        let producers = |n| plan.graph.neighbors_directed(n, Direction::Incoming).count();
        let open: BTreeMap<NodeIndex, usize> = order.iter().map(|&n| (n, producers(n))).collect();
        let positions: BTreeMap<NodeIndex, usize> =
            order.iter().enumerate().map(|(i, &n)| (n, i)).collect();
        let ready = positions.iter().filter(|(n, _)| open[*n] == 0).map(|(_, &i)| i).collect();
        Self { positions, open, ready }
    }

    /// A step has its result.
    pub(super) fn produced(&mut self, plan: &Plan, node: NodeIndex) {
        for consumer in plan.graph.neighbors(node) {
            let Some(open) = self.open.get_mut(&consumer) else { continue };
            *open -= 1;
            if *open == 0 {
                self.ready.insert(self.positions[&consumer]);
            }
        }
    }

    /// The first step, in the order of the plan, that can be decided; each is given once.
    pub(super) fn next(&mut self) -> Option<usize> {
        self.ready.pop_first()
    }

    /// Whether a step can be decided.
    pub(super) fn any(&self) -> bool {
        !self.ready.is_empty()
    }

    /// The position of a step that was given.
    pub(super) fn position(&self, node: NodeIndex) -> usize {
        self.positions[&node]
    }
}

//! What is to be run: a DAG of step instances, all of it checked.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use petgraph::graph::{DiGraph, NodeIndex};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::source::{Diagnostic, Source, Span};
use crate::step::{Kind, Needs, Ports, Step};

/// Sweep coordinates: value by axis (`lora.r` for the member of a named zip), sorted.
pub type Point = BTreeMap<String, Value>;

/// The name of an instance: step name and its projection onto the axes it reads,
/// `train@lora.alpha=16,lora.r=8`, or just `sample`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct StepId(pub String);

impl StepId {
    /// From a step's name and its coordinates.
    pub fn new(step: &str, point: &Point) -> Self {
        if point.is_empty() {
            return Self(step.to_owned());
        }
        let text = |v: &Value| v.as_str().map_or_else(|| v.to_string(), str::to_owned);
        let coordinates: Vec<String> =
            point.iter().map(|(axis, value)| format!("{axis}={}", text(value))).collect();
        Self(format!("{step}@{}", coordinates.join(",")))
    }
}

impl fmt::Display for StepId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How often a failed step is tried again, and how soon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retry {
    /// Attempts after the first.
    pub times: u32,
    /// The pause before the first of them; each that follows is twice as long.
    pub backoff: Duration,
}

impl Default for Retry {
    fn default() -> Self {
        Self { times: 0, backoff: Duration::from_secs(1) }
    }
}

/// Keys of a step that are never part of its cache key.
#[derive(Debug, Clone, Default)]
pub struct Policy {
    /// Overrides of what the kind says it needs.
    pub needs: Option<Needs>,
    /// GPUs that the file says it needs; absent where it leaves that open.
    pub gpu: Option<usize>,
    /// How often a failed step is tried again, and how soon.
    pub retry: Retry,
    /// After which its process group is ended.
    pub timeout: Option<Duration>,
    /// How often a step that can go on later keeps a checkpoint.
    pub checkpoint: Option<Duration>,
    /// Names of environment variables passed to it that are secrets.
    pub secrets: Vec<String>,
}

/// A weight of the graph's edges: which of the target's inputs it feeds, and from which port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Edge {
    /// Index that `$input.edge` of the target's parameters names.
    pub index: usize,
    /// The port that the reference names, or all.
    pub port: Option<String>,
}

/// A step at one projection of the sweep.
pub struct Instance {
    /// Its name.
    pub id: StepId,
    /// The step's name in the file.
    pub step: String,
    /// Its coordinates on the axes that it reads, directly or through an input.
    pub point: Point,
    /// Its row.
    pub kind: Kind,
    /// The step with typed placeholders for edges; `parsed.params()` is what is bound later.
    pub parsed: Box<dyn Step>,
    /// What comes out.
    pub ports: Ports,
    /// Declared environment: value by name (absent when not set), part of the key.
    pub env: BTreeMap<String, Option<String>>,
    /// Part of the key.
    pub salt: Option<String>,
    /// Not part of the key.
    pub policy: Policy,
    /// Where the step's name stands in the file.
    pub span: Span,
}

impl Instance {
    /// What it needs to run: what the file says, else what its kind says.
    pub fn needs(&self) -> Needs {
        self.policy.needs.clone().unwrap_or_else(|| self.parsed.needs())
    }
}

impl fmt::Debug for Instance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Instance").field("id", &self.id).field("kind", &self.kind.name).finish()
    }
}

/// What is shown under `outputs/` after a run that succeeded.
#[derive(Debug, Clone)]
pub struct Output {
    /// Its name, with `@point` where the step has several instances.
    pub name: String,
    /// The instance.
    pub node: NodeIndex,
    /// One port of it, or all.
    pub port: Option<String>,
}

/// A checked pipeline. Holding one proves: known kinds, known and well-typed fields, resolved
/// references of matching types, no cycle, unique names.
#[derive(Debug)]
pub struct Plan {
    /// The pipeline's name.
    pub name: String,
    /// The file.
    pub file: PathBuf,
    /// Its text, for diagnostics.
    pub source: Source,
    /// Instances; an edge runs from producer to consumer. Petgraph refuses nothing here, the
    /// constructor does: the graph is acyclic.
    pub graph: DiGraph<Instance, Edge>,
    /// The points of the sweep (one, empty, without a sweep).
    pub points: Vec<Point>,
    /// What is published.
    pub outputs: Vec<Output>,
    /// Environment that it was made from: value by name, absent where a step declares a variable
    /// that is not set.
    pub environment: BTreeMap<String, Option<String>>,
    /// Warnings found while checking.
    pub warnings: Vec<Diagnostic>,
}

impl Plan {
    /// Instances in an order in which every producer comes before its consumers; ties by name,
    /// so the order is the same every time.
    pub fn order(&self) -> Vec<NodeIndex> {
        let mut left: BTreeMap<NodeIndex, usize> = BTreeMap::new();
        let mut ready = std::collections::BTreeSet::new();
        for node in self.graph.node_indices() {
            let inputs = self.graph.edges_directed(node, petgraph::Incoming).count();
            if inputs == 0 {
                ready.insert((self.graph[node].id.clone(), node));
            }
            left.insert(node, inputs);
        }
        let mut order = Vec::with_capacity(left.len());
        while let Some((_, node)) = ready.pop_first() {
            order.push(node);
            for next in self.graph.neighbors_directed(node, petgraph::Outgoing) {
                if let Some(count) = left.get_mut(&next) {
                    *count -= 1;
                    if *count == 0 {
                        ready.insert((self.graph[next].id.clone(), next));
                    }
                }
            }
        }
        order
    }
}

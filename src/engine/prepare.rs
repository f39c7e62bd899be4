//! Before anything runs: which steps, and what their outside names stand for.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow};
use petgraph::graph::NodeIndex;

use super::{Options, Session};
use crate::lineage::{Lock, LockMode};
use crate::pipeline::Plan;
use crate::source::{Fault, Span};
use crate::step::{BadField, Outside, Step};
use crate::store::States;

/// What is missing outside: every name that could not be resolved, with its step.
#[derive(Debug)]
pub struct Unresolved(pub Vec<(String, Span, anyhow::Error)>);

impl fmt::Display for Unresolved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (step, _, error)) in self.0.iter().enumerate() {
            let newline = if i == 0 { "" } else { "\n" };
            write!(f, "{newline}{step}: {error:#}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Unresolved {}

/// A plan whose outside names are pinned.
pub(super) struct Prepared {
    /// The instances to run, producers first.
    pub(super) order: Vec<NodeIndex>,
    /// Their steps, pinned.
    pub(super) steps: BTreeMap<NodeIndex, Box<dyn Step>>,
    /// Those to run even if their result is there.
    pub(super) force: BTreeSet<NodeIndex>,
    /// With what was added.
    pub(super) lock: Lock,
    /// Outside files in the state before they were read.
    pub(super) files: BTreeMap<PathBuf, States>,
}

pub(super) fn lock_path(file: &Path, options: &Options) -> PathBuf {
    options.lock.clone().unwrap_or_else(|| file.with_extension("lock"))
}

/// Chooses the steps and resolves them; all that is missing is reported together.
pub(super) fn prepare(plan: &Plan, session: &Session<'_>, update: bool) -> Result<Prepared> {
    let (prepared, missing) = prepare_what_can(plan, session, update)?;
    if missing.0.is_empty() { Ok(prepared) } else { Err(missing.into()) }
}

/// Chooses the steps and resolves those that can be, beside what is missing.
pub(super) fn prepare_what_can(
    plan: &Plan,
    session: &Session<'_>,
    update: bool,
) -> Result<(Prepared, Unresolved)> {
    let mode = match (update, session.options.locked) {
        (true, _) => LockMode::Update,
        (false, true) => LockMode::Frozen,
        (false, false) => LockMode::Grow,
    };
    let chosen = plan.needed_for(&session.options.targets)?;
    let mut force = BTreeSet::new();
    for name in &session.options.force {
        force.extend(plan.targets(name)?);
    }
    if let Some(node) = force.iter().find(|n| !chosen.contains(n)) {
        let id = &plan.graph[*node].id.0;
        let message = format!("`{id}` is to be forced, but the steps asked for do not need it");
        return Err(Fault::new(message).help("name it among the steps too").into());
    }
    let mut lock = Lock::load(&lock_path(&plan.file, &session.options), mode)?;
    let dir = plan.file.parent().unwrap_or(Path::new(""));
    let order: Vec<NodeIndex> = plan.order().into_iter().filter(|n| chosen.contains(n)).collect();
    let mut steps = BTreeMap::new();
    let mut missing = Vec::new();
    let mut files = BTreeMap::new();
    for &node in &order {
        let instance = &plan.graph[node];
        let parsed = (instance.kind.parse)(&instance.parsed.params()).map_err(bad_field);
        let resolved = parsed.and_then(|mut step| {
            let store = &session.store;
            let (lock, files, hub) = (&mut lock, &mut files, session.hub);
            let mut outside = Outside { dir, lock, hub, store, files };
            step.resolve(&mut outside)?;
            Ok(step)
        });
        match resolved {
            Ok(step) => {
                steps.insert(node, step);
            }
            Err(e) => missing.push((instance.id.0.clone(), instance.span, e)),
        }
    }
    Ok((Prepared { order, steps, force, lock, files }, Unresolved(missing)))
}

/// A step that does not parse once it is bound or resolved, as an error.
pub(super) fn bad_field(bad: BadField) -> anyhow::Error {
    let place = if bad.path.is_empty() { String::new() } else { format!("with.{}: ", bad.path) };
    anyhow!("{place}{}", bad.message)
}

/// A line of the lock that `flow update` changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Updated {
    /// The outside name.
    pub name: String,
    /// Its identity before; absent if it is new.
    pub old: Option<String>,
    /// Its identity now.
    pub new: String,
}

/// Asks for every outside name again and writes the lock: what `flow update` does.
///
/// # Errors
/// When a name cannot be resolved ([`Unresolved`]) or the lock cannot be written.
pub fn update(plan: &Plan, session: &Session<'_>) -> Result<Vec<Updated>> {
    let old = Lock::load(&lock_path(&plan.file, &session.options), LockMode::Grow)?;
    let mut prepared = prepare(plan, session, true)?;
    let mut updated = Vec::new();
    for (name, new) in prepared.lock.entries() {
        let old = old.entries().get(name);
        if old != Some(new) {
            let (name, new) = (name.clone(), new.clone());
            updated.push(Updated { name, old: old.cloned(), new });
        }
    }
    prepared.lock.save(&session.store)?;
    Ok(updated)
}

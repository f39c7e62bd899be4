//! The steps of a run as they stand on record: from its summary, or, while it runs and after it
//! died, from its events.

use std::collections::BTreeSet;

use serde::Serialize;

use super::error::Failure;
use crate::digest::Digest;
use crate::engine::RunEvent;
use crate::lineage::{Run, State, Status, StepSummary, Why};
use crate::pipeline::is_named;
use crate::source::{Fault, suggest};

/// How far a step has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Phase {
    /// Its result was there.
    Hit,
    /// It ran.
    Ran,
    /// It failed.
    Failed,
    /// It was not run.
    Skipped,
    /// It is running.
    Running,
    /// It has not begun.
    Waiting,
    /// It was running, or had not begun, when the run died.
    Unfinished,
}

impl Phase {
    /// In a table.
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Hit => "hit",
            Self::Ran => "ran",
            Self::Failed => "failed",
            Self::Skipped => "skipped",
            Self::Running => "running",
            Self::Waiting => "waiting",
            Self::Unfinished => "unfinished",
        }
    }
}

/// A step of a run.
#[derive(Debug, Clone, Serialize)]
pub(super) struct StepStatus {
    /// Instance.
    pub(super) id: String,
    /// Its key, where it was reached.
    pub(super) key: Option<Digest>,
    /// How far it has come.
    pub(super) state: Phase,
    /// Wall-clock seconds; 0 unless it ran.
    pub(super) seconds: f64,
    /// Why it ran.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) why: Option<Why>,
    /// Why it failed or was skipped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) message: Option<String>,
}

impl StepStatus {
    fn waiting(id: String) -> Self {
        let (key, state, seconds, why, message) = (None, Phase::Waiting, 0.0, None, None);
        Self { id, key, state, seconds, why, message }
    }

    fn ended(summary: &StepSummary) -> Self {
        let StepSummary { id, key, state, seconds, why, message } = summary.clone();
        let state = match state {
            State::Hit => Phase::Hit,
            State::Ran => Phase::Ran,
            State::Failed => Phase::Failed,
            State::Skipped => Phase::Skipped,
        };
        Self { id, key, state, seconds, why, message }
    }

    /// Goes on by an event of this step.
    fn take(&mut self, event: RunEvent) {
        match event {
            RunEvent::Hit { key, .. } => (self.state, self.key) = (Phase::Hit, Some(key)),
            RunEvent::Miss { key, why, .. } => (self.key, self.why) = (Some(key), Some(why)),
            RunEvent::Started { .. } => self.state = Phase::Running,
            RunEvent::Retrying { .. } => self.state = Phase::Waiting,
            RunEvent::Finished { key, seconds, taken, .. } => {
                self.state = if taken { Phase::Hit } else { Phase::Ran };
                (self.key, self.seconds) = (Some(key), seconds);
            }
            RunEvent::Failed { message, .. } => {
                (self.state, self.message) = (Phase::Failed, Some(message));
            }
            RunEvent::Skipped { because, .. } => {
                (self.state, self.message) = (Phase::Skipped, Some(because));
            }
            _ => {}
        }
    }
}

/// The step that an event is about.
fn step_of(event: &RunEvent) -> Option<&str> {
    match event {
        RunEvent::Hit { step, .. }
        | RunEvent::Miss { step, .. }
        | RunEvent::Started { step, .. }
        | RunEvent::Retrying { step, .. }
        | RunEvent::Finished { step, .. }
        | RunEvent::Failed { step, .. }
        | RunEvent::Skipped { step, .. } => Some(step),
        _ => None,
    }
}

/// All steps of a run, in plan order.
pub(super) fn steps_of(run: &Run) -> Vec<StepStatus> {
    if let Some(summary) = &run.summary {
        return summary.steps.iter().map(StepStatus::ended).collect();
    }
    // A run that died before its first event has no steps yet.
    let events = run.events().unwrap_or_default();
    follow(events, run.status == Status::Running)
}

fn follow(events: Vec<serde_json::Value>, runs: bool) -> Vec<StepStatus> {
    let mut steps: Vec<StepStatus> = Vec::new();
    for event in events.into_iter().filter_map(|e| serde_json::from_value(e).ok()) {
        if let RunEvent::RunStarted { steps: ids, .. } = event {
            steps = ids.into_iter().map(StepStatus::waiting).collect();
        } else if let Some(at) = steps.iter().position(|s| step_of(&event) == Some(&s.id)) {
            steps[at].take(event);
        }
    }
    for step in steps.iter_mut().filter(|_| !runs) {
        if matches!(step.state, Phase::Running | Phase::Waiting) {
            step.state = Phase::Unfinished;
        }
    }
    steps
}

/// Steps of a run by name: all, the instances of one step, or those at some coordinates.
pub(super) fn steps_named(run: &Run, name: Option<&str>) -> Result<Vec<StepStatus>, Failure> {
    let mut steps = steps_of(run);
    let Some(name) = name else { return Ok(steps) };
    if steps.iter().any(|s| is_named(&s.id, name)) {
        steps.retain(|s| is_named(&s.id, name));
        return Ok(steps);
    }
    let step = |id: &str| id.split('@').next().unwrap_or_default().to_owned();
    let wanted = step(name);
    let mut known: BTreeSet<String> =
        steps.iter().map(|s| &s.id).filter(|id| step(id) == wanted).cloned().collect();
    if known.is_empty() {
        known = steps.iter().map(|s| step(&s.id)).collect();
    }
    let known: Vec<&str> = known.iter().map(String::as_str).collect();
    let fault = Fault::new(format!("run {} has no step `{name}`", run.info.id));
    let help = suggest(name, &known).unwrap_or_else(|| "it has not begun any step".into());
    Err(Failure::Usage(fault.help(help).into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_run_under_way_is_told_from_its_events() {
        let key = Digest::of(b"x");
        let events = || {
            vec![
                json!({ "t": 1, "type": "run_started", "run": "r", "pipeline": "p", "jobs": 2,
                        "steps": ["a", "b", "c"] }),
                json!({ "t": 2, "type": "hit", "step": "a", "key": key, "saved_seconds": 1.0 }),
                json!({ "t": 3, "type": "miss", "step": "b", "key": key,
                        "why": { "because": "first_time" } }),
                json!({ "t": 4, "type": "started", "step": "b", "attempt": 1, "threads": 1,
                        "gpus": [] }),
            ]
        };
        let phases = |runs| follow(events(), runs).iter().map(|s| s.state).collect::<Vec<_>>();
        assert_eq!(phases(true), [Phase::Hit, Phase::Running, Phase::Waiting]);
        assert_eq!(phases(false), [Phase::Hit, Phase::Unfinished, Phase::Unfinished]);
        assert!(follow(events(), true)[1].why.is_some());
    }
}

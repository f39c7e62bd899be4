//! Curves: the metrics of a step as it gave them while it ran.
//!
//! They stand in the journal of the run that made a result. A result that is taken from the cache
//! has them all the same: its record names that run, and a collection keeps its journal.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use serde::Deserialize;

use super::{Record, Run, Runs};
use crate::store::Store;

/// Points of a metric, by optimizer step.
pub type Curve = Vec<(u64, f64)>;

/// Curves by name (`train/loss`).
pub type Curves = BTreeMap<String, Curve>;

/// A line of a journal, as far as it may hold a point.
#[derive(Deserialize)]
struct Line {
    step: String,
    event: Point,
}

#[derive(Deserialize)]
struct Point {
    event: String,
    name: String,
    step: u64,
    value: f64,
}

impl Run {
    /// The curves that an instance drew in this run. Where an attempt went over points of an
    /// earlier one again, those of the later stand.
    ///
    /// # Errors
    /// When the journal cannot be read.
    pub fn curves(&self, instance: &str) -> Result<Curves> {
        let mut curves = Curves::new();
        if self.info.unchanged.is_some() {
            return Ok(curves);
        }
        let path = self.dir.join("events.jsonl");
        let text = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        for line in text.split(|&b| b == b'\n') {
            let Ok(Line { step, event: point }) = serde_json::from_slice(line) else { continue };
            if step == instance && point.event == "metric" {
                let curve = curves.entry(point.name).or_default();
                let kept = curve.partition_point(|(at, _)| *at < point.step);
                curve.truncate(kept);
                curve.push((point.step, point.value));
            }
        }
        Ok(curves)
    }
}

impl Record {
    /// The curves that were drawn when it was made; none where that run's journal is gone.
    pub fn curves(&self, store: &Store) -> Curves {
        let run = Runs::of(store).load(&self.made.run);
        run.and_then(|run| run.curves(&self.made.step)).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lineage::RunInfo;
    use serde_json::json;

    #[test]
    fn a_later_attempt_goes_over_the_points_of_an_earlier_one() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let info = json!({ "id": "", "pipeline": "p", "file": "p.yaml", "command_line": [],
            "sets": {}, "started_unix_ms": 1, "host": "h", "pid": 1, "build": "0" });
        let info: RunInfo = serde_json::from_value(info).unwrap();
        let mut journal = Runs::of(&store).begin(info).unwrap();
        let mut say = |step: &str, name: &str, at: u64, value: f64| {
            let event = json!({ "event": "metric", "name": name, "step": at, "value": value });
            let line = json!({ "type": "step", "step": step, "event": event });
            journal.event(&line).unwrap();
        };
        for (at, value) in [(1, 4.0), (2, 3.0), (3, 2.5), (3, 2.0), (4, 1.0)] {
            say("train@r=2", "loss", at, value);
            say("train@r=4", "loss", at, 9.0);
        }
        say("train@r=2", "eval/accuracy", 4, 0.5);
        // Gone on with from a checkpoint after step 2.
        say("train@r=2", "loss", 3, 1.5);
        let log = json!({ "event": "log", "line": "loss" });
        journal.event(&json!({ "type": "step", "step": "train@r=2", "event": log })).unwrap();
        let run = Runs::of(&store).load(&journal.info.id).unwrap();
        let curves = run.curves("train@r=2").unwrap();
        assert_eq!(curves["loss"], [(1, 4.0), (2, 3.0), (3, 1.5)]);
        assert_eq!(curves["eval/accuracy"], [(4, 0.5)]);
        assert!(run.curves("train").unwrap().is_empty());
    }
}

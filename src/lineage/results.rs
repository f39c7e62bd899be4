//! The results beside a pipeline: what its steps gave, to be committed and compared with.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Loaded, Made, Record, Run, State};
use crate::artifact::{Artifact as _, Report, Type, View};
use crate::digest::Digest;
use crate::source::Fault;
use crate::store::Store;

/// Raised when the file changes its meaning.
const FORMAT: u32 = 1;

/// What the steps of a run gave: `<pipeline>.results`, written by `flow run --record`. JSON with
/// sorted names and one field a line, so that a change is a readable diff. It says nothing of
/// times, machines or paths: two runs that gave the same have the same file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Results {
    /// Version of the form.
    pub format: u32,
    /// The pipeline's name.
    pub pipeline: String,
    /// `--set` values.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub sets: BTreeMap<String, String>,
    /// By instance (`train@lora.r=8`).
    pub steps: BTreeMap<String, StepResult>,
}

/// What a step gave.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StepResult {
    /// Its kind.
    pub kind: String,
    /// The kind's version.
    pub version: u32,
    /// Its key.
    pub key: Digest,
    /// Type of the output.
    #[serde(rename = "type")]
    pub ty: Type,
    /// Device and arithmetic of its model (`cuda bf16`), as they are in its key, if it runs one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// Tree digest by port.
    pub outputs: BTreeMap<String, Digest>,
    /// Facts of the record and metrics of a report, without measured ones.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub metrics: Map<String, Value>,
}

impl Results {
    /// What the steps of a run that is done gave.
    ///
    /// # Errors
    /// When the run is not done, or a record of it is lost.
    pub fn of_run(store: &Store, run: &Run) -> Result<Self> {
        let mut steps = BTreeMap::new();
        for (id, record) in run.records(store)? {
            let mut metrics = record.metrics(store);
            metrics.retain(|name, _| !is_measured(name));
            let place = record.model_place();
            let device = place.map(|(device, compute)| format!("{device} {compute}"));
            let Record { kind, version, key, ty, ports: outputs, .. } = record;
            steps.insert(id, StepResult { kind, version, key, ty, device, outputs, metrics });
        }
        let (pipeline, sets) = (run.info.pipeline.clone(), run.info.sets.clone());
        Ok(Self { format: FORMAT, pipeline, sets, steps })
    }

    /// Reads a results file.
    ///
    /// # Errors
    /// When there is none, or it is not one.
    pub fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read(path).map_err(|e| {
            let fault = Fault::new(format!("there are no results at {}", path.display()));
            fault.help("`flow run FILE --record` writes them; commit them").cause(e)
        })?;
        let results: Self = serde_json::from_slice(&text).map_err(|e| {
            let fault = Fault::new(format!("{} does not hold results", path.display()));
            fault.help("take it from version control, or write it anew with --record").cause(e)
        })?;
        if results.format != FORMAT {
            let (path, found) = (path.display(), results.format);
            let fault = Fault::new(format!("{path} has format {found}, expected {FORMAT}"));
            return Err(fault.help("write it anew with `flow run FILE --record`").into());
        }
        Ok(results)
    }

    /// Writes a results file, whole or not at all.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn save(&self, store: &Store, path: &Path) -> Result<()> {
        let mut text = serde_json::to_vec_pretty(self)?;
        text.push(b'\n');
        Ok(store.write_atomic(path, &text)?)
    }

    /// The steps as records, by instance: from the store where it has them, for the pre-image
    /// and the facts; else with what the file says, and a pre-image that is null. Either way the
    /// outputs are those of the file.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn records(&self, store: &Store) -> Result<BTreeMap<String, Record>> {
        let records = self.steps.iter().map(|(id, step)| {
            let mut record = match Record::load(store, &step.key)? {
                Loaded::Found(record) => *record,
                Loaded::Absent | Loaded::Corrupt(_) => Record {
                    key: step.key,
                    kind: step.kind.clone(),
                    version: step.version,
                    preimage: Value::Null,
                    ty: step.ty,
                    ports: BTreeMap::new(),
                    facts: step.metrics.clone(),
                    warnings: Vec::new(),
                    made: Made {
                        device: step.device.clone().unwrap_or_default(),
                        ..Made::default()
                    },
                },
            };
            record.ports.clone_from(&step.outputs);
            Ok((id.clone(), record))
        });
        records.collect()
    }
}

impl Run {
    /// The records of its steps that have a result, by instance.
    ///
    /// # Errors
    /// When a record is lost; the message names its step.
    pub fn records(&self, store: &Store) -> Result<BTreeMap<String, Record>> {
        let steps = self.summary.iter().flat_map(|s| &s.steps);
        let mut records = BTreeMap::new();
        for step in steps.filter(|s| matches!(s.state, State::Hit | State::Ran)) {
            let key = step.key.with_context(|| format!("{} has no key", step.id))?;
            let reason = match Record::load(store, &key)? {
                Loaded::Found(record) => {
                    records.insert(step.id.clone(), *record);
                    continue;
                }
                Loaded::Absent => "is gone".to_owned(),
                Loaded::Corrupt(reason) => format!("is damaged: {reason}"),
            };
            let fault = Fault::new(format!("the record of {} {reason}", step.id));
            let help = format!("run {} has it no more; run the pipeline again", self.info.id);
            return Err(fault.help(help).into());
        }
        Ok(records)
    }
}

impl Record {
    /// The device and the arithmetic of the model that it ran, as they stand in its key (or in a
    /// results file, where that is all that is known of it).
    pub fn model_place(&self) -> Option<(&str, &str)> {
        match &self.preimage {
            Value::Null => self.made.device.split_once(' '),
            preimage => Some((preimage["device"].as_str()?, preimage["compute"].as_str()?)),
        }
    }

    /// Its facts and, of a report, its metrics. A report whose bytes are lost has none.
    pub fn metrics(&self, store: &Store) -> Map<String, Value> {
        let mut metrics = self.facts.clone();
        if self.ty == Type::Report {
            let (ty, ports) = (self.ty, self.ports.clone());
            let report = Report::open(View { ty, ports, store: store.clone() });
            let numbers = report.map(|r| r.file.metrics).unwrap_or_default();
            metrics.extend(numbers.into_iter().map(|(name, value)| (name, value.into())));
        }
        metrics
    }
}

/// Whether a metric is a measurement of time, speed or memory: never twice the same, and no
/// property of the result. Names of metrics say their unit.
pub fn is_measured(name: &str) -> bool {
    let timed = |word: &str| matches!(word, "seconds" | "second" | "ms" | "rss");
    name.split(['_', '.', '/']).any(timed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn measurements_are_told_by_their_unit() {
        for name in ["train_seconds", "tokens_per_second", "latency_ms_p90", "peak_rss_bytes"] {
            assert!(is_measured(name), "{name}");
        }
        for name in ["accuracy", "rows.train", "steps", "adapter_bytes", "loss", "items", "mcc"] {
            assert!(!is_measured(name), "{name}");
        }
    }

    #[test]
    fn a_file_says_the_same_again() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap();
        let path = dir.path().join("p.results");
        let error = Results::load(&path).unwrap_err();
        assert!(error.to_string().contains("there are no results"), "{error}");
        let step = StepResult {
            kind: "train".into(),
            version: 1,
            key: Digest::of(b"key"),
            ty: Type::TrainedModel,
            device: Some("cuda bf16".into()),
            outputs: BTreeMap::from([("trained".into(), Digest::of(b"tree"))]),
            metrics: json!({ "loss": 0.25 }).as_object().cloned().unwrap_or_default(),
        };
        let steps = BTreeMap::from([("b".to_owned(), step.clone()), ("a".to_owned(), step)]);
        let sets = BTreeMap::new();
        let results = Results { format: FORMAT, pipeline: "p".into(), sets, steps };
        results.save(&store, &path).unwrap();
        assert_eq!(Results::load(&path).unwrap(), results);
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.find("\"a\"") < text.find("\"b\"") && text.ends_with("}\n"), "{text}");
        let records = results.records(&store).unwrap();
        assert_eq!(records["a"].ports, results.steps["a"].outputs);
        assert!(records["a"].preimage.is_null());
        assert_eq!(records["a"].model_place(), Some(("cuda", "bf16")));
        for bad in [text.replace("\"format\": 1", "\"format\": 9"), text[..40].to_owned()] {
            std::fs::write(&path, bad).unwrap();
            let error = format!("{:#}", Results::load(&path).unwrap_err());
            assert!(error.contains("format 9") || error.contains("does not hold"), "{error}");
        }
    }
}

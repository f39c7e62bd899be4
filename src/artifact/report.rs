//! Metrics and tables.

use std::collections::BTreeMap;

use anyhow::Result;
use serde::ser::Error as _;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::Value;

use super::{Artifact, Type, View};

/// `report.json`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ReportFile {
    /// A line that says what this is.
    pub title: String,
    /// Numbers by name (`accuracy`, `f1`, `loss`, …), all finite: JSON has no others.
    #[serde(serialize_with = "finite")]
    pub metrics: BTreeMap<String, f64>,
    /// Whatever else there is: confusion matrix, samples, table rows.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub details: Value,
}

/// Refuses to write a number as null, which could not be read again.
fn finite<S: Serializer>(metrics: &BTreeMap<String, f64>, s: S) -> Result<S::Ok, S::Error> {
    match metrics.iter().find(|(_, value)| !value.is_finite()) {
        Some((name, value)) => {
            Err(S::Error::custom(format!("the metric `{name}` is {value}, which no report holds")))
        }
        None => metrics.serialize(s),
    }
}

/// Metrics: port `report` with `report.json`, and `report.md` for people where there is a table.
#[derive(Debug, Clone)]
pub struct Report {
    /// What it says.
    pub file: ReportFile,
    /// Where it is.
    pub view: View,
}

impl Artifact for Report {
    const ACCEPTS: &'static [Type] = &[Type::Report];

    fn open(view: View) -> Result<Self> {
        Ok(Self { file: view.json("report", "report.json")?, view })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_metric_that_is_no_number_is_not_written() {
        let with = |value| ReportFile {
            metrics: BTreeMap::from([("loss".to_owned(), value)]),
            ..ReportFile::default()
        };
        let text = serde_json::to_string(&with(f64::MAX)).unwrap();
        assert_eq!(serde_json::from_str::<ReportFile>(&text).unwrap(), with(f64::MAX));
        for bad in [f64::NAN, f64::INFINITY] {
            let err = serde_json::to_string(&with(bad)).unwrap_err().to_string();
            assert!(err.contains("`loss`"), "{err}");
        }
    }
}

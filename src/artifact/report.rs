//! Metrics and tables.

use std::collections::BTreeMap;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Artifact, Type, View};

/// `report.json`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ReportFile {
    /// A line that says what this is.
    pub title: String,
    /// Numbers by name (`accuracy`, `f1`, `loss`, …).
    pub metrics: BTreeMap<String, f64>,
    /// Whatever else there is: confusion matrix, samples, table rows.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub details: Value,
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

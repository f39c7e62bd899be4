//! What a run would do.

use serde::Serialize;

use crate::digest::Digest;
use crate::lineage::Why;
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
    /// Seconds that it took when it last ran.
    pub last_seconds: Option<f64>,
}

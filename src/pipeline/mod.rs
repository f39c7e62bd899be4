//! YAML to [`Pipeline`] (what was written, maybe wrong) to [`Plan`] (checked).
//!
//! In reading order: the form of the file is read ([`Pipeline::parse`]), parameters and
//! environment get their values, the sweep its points; names are looked up and the steps ordered;
//! each step is made once for each projection onto the axes that it reads, and parsed by its
//! kind. [`Plan::new`] returns everything that is wrong at once.

mod check;
mod field;
mod instance;
mod outputs;
mod plan;
mod reference;
mod schema;
mod scope;
mod sweep;
mod target;
mod units;
mod written;

use std::collections::{BTreeMap, BTreeSet};

pub use plan::{Edge, Instance, Output, Plan, Point, Policy, Retry, StepId};
pub use schema::{kind_schema, schema};
pub use sweep::by_coordinates;
pub use target::is_named;
pub use units::{bytes, duration};
pub use written::{Pipeline, WrittenNeeds, WrittenStep};

/// What a plan depends on beside its file.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Parameters given on the command line: path (`params.x`, `params.a.b`) and raw YAML value.
    pub sets: Vec<(String, String)>,
    /// The environment.
    pub env: BTreeMap<String, String>,
    /// Points that a sweep may have, where it gives no `cap` itself.
    pub sweep_cap: usize,
    /// Resources that the project declares: what else a step may `need`.
    pub resources: BTreeSet<String>,
}

impl Default for Settings {
    fn default() -> Self {
        let (sets, env, resources) = (Vec::new(), BTreeMap::new(), BTreeSet::new());
        Self { sets, env, sweep_cap: 256, resources }
    }
}

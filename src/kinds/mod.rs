//! The step kinds: one file and one row each.

mod command;
mod fetch;
mod model;
mod rows;
mod sample;

use crate::step::Kind;

/// The table of kinds. Parser, checks, keys, schemas, README, completions and reports read it.
pub const ALL: &[Kind] = &[
    Kind::of::<fetch::Fetch>(),
    Kind::of::<model::Model>(),
    Kind::of::<sample::Sample>(),
    Kind::of::<command::Command>(),
];

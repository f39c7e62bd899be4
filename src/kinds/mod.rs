//! The step kinds: one file and one row each.

mod benchmark;
mod compare;
mod evaluate;
mod loading;
mod merge;
mod select;
mod train;

use crate::step::Kind;

/// The table of kinds. Parser, checks, keys, schemas, README, completions and reports read it.
pub const ALL: &[Kind] = &[
    Kind::of::<train::Train>(),
    Kind::of::<evaluate::Evaluate>(),
    Kind::of::<select::Select>(),
    Kind::of::<merge::Merge>(),
    Kind::of::<benchmark::Benchmark>(),
    Kind::of::<compare::Compare>(),
];

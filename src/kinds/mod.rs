//! The step kinds: one file and one row each. A kind is a bridge: it reads its inputs through the
//! context, calls the room that does the work, and writes what comes out.

mod benchmark;
mod combine;
mod command;
pub(crate) mod compare;
mod evaluate;
mod fetch;
mod format;
mod init_model;
mod inspect;
mod loading;
mod merge;
mod model;
mod rows;
mod sample;
mod select;
mod tokenize;
mod train;
mod transform;

pub(crate) use command::is_inside;

use crate::step::Kind;

/// The table of kinds. Parser, checks, keys, schemas, README, completions and reports read it.
pub const ALL: &[Kind] = &[
    Kind::of::<fetch::Fetch>(),
    Kind::of::<model::Model>(),
    Kind::of::<init_model::InitModel>(),
    Kind::of::<transform::Transform>(),
    Kind::of::<combine::Combine>(),
    Kind::of::<sample::Sample>(),
    Kind::of::<format::Format>(),
    Kind::of::<tokenize::Tokenize>(),
    Kind::of::<inspect::Inspect>(),
    Kind::of::<train::Train>(),
    Kind::of::<evaluate::Evaluate>(),
    Kind::of::<select::Select>(),
    Kind::of::<merge::Merge>(),
    Kind::of::<benchmark::Benchmark>(),
    Kind::of::<compare::Compare>(),
    Kind::of::<command::Command>(),
];

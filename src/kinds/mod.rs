//! The step kinds: one file and one row each.

mod format;
mod init_model;
mod tokenize;

use crate::step::Kind;

/// The table of kinds. Parser, checks, keys, schemas, README, completions and reports read it.
pub const ALL: &[Kind] = &[
    Kind::of::<format::Format>(),
    Kind::of::<tokenize::Tokenize>(),
    Kind::of::<init_model::InitModel>(),
];

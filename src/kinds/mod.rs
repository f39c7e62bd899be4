//! The step kinds: one file and one row each.

use crate::step::Kind;

/// The table of kinds. Parser, checks, keys, schemas, README, completions and reports read it.
pub const ALL: &[Kind] = &[];

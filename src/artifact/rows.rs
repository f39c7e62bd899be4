//! Rows, however far they have come.

use anyhow::Result;

use super::{Artifact, Dataset, Prompts, Tokens, Type, View};

/// A dataset, prompts or tokens: what can be looked at row by row.
#[derive(Debug, Clone)]
pub enum AnyRows {
    /// As they were fetched or sampled.
    Dataset(Dataset),
    /// Rendered.
    Prompts(Prompts),
    /// Token ids.
    Tokens(Tokens),
}

impl Artifact for AnyRows {
    const ACCEPTS: &'static [Type] = &[Type::Tokens, Type::Prompts, Type::Dataset];

    fn open(view: View) -> Result<Self> {
        Ok(match view.ty {
            Type::Dataset => Self::Dataset(Dataset::open(view)?),
            Type::Prompts => Self::Prompts(Prompts::open(view)?),
            _ => Self::Tokens(Tokens::open(view)?),
        })
    }
}

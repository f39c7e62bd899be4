//! Hub client and cache.

use anyhow::Result;

/// Type of a hub repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RepoType {
    /// Models.
    Model,
    /// Datasets.
    Dataset,
}

impl RepoType {
    /// As in API routes: `models`, `datasets`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Model => "models",
            Self::Dataset => "datasets",
        }
    }
}

/// A hub client over the shared cache.
#[derive(Debug)]
pub struct Hub {}

impl Hub {
    /// The commit of a revision.
    ///
    /// # Errors
    /// When the hub cannot be reached, or has no such repository or revision.
    pub fn commit(&self, _ty: RepoType, _repo: &str, _revision: &str) -> Result<String> {
        todo!()
    }
}

//! `config.json` of a model.

use std::path::Path;

use anyhow::Result;

use super::setup::{TargetModules, Task};

/// The shape of a model, read from `config.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {}

impl ModelConfig {
    /// Reads `config.json`.
    ///
    /// # Errors
    /// When it cannot be read, or describes a model of a family that is not supported.
    pub fn read(_path: &Path) -> Result<Self> {
        todo!()
    }

    /// Rows of the embedding.
    pub fn vocab_size(&self) -> usize {
        todo!()
    }

    /// The longest sequence.
    pub fn max_positions(&self) -> usize {
        todo!()
    }

    /// Every linear layer that can carry an adapter, by full path.
    pub fn module_names(&self, _task: &Task) -> Vec<String> {
        todo!()
    }

    /// The linear layers that target modules mean, by full path.
    ///
    /// # Errors
    /// When a name matches none; the error lists those that there are.
    pub fn check_targets(&self, _task: &Task, _targets: &TargetModules) -> Result<Vec<String>> {
        todo!()
    }
}

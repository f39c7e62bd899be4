//! A model that can be trained.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Result;
use candle_core::{Tensor, Var};

use super::batch::Batch;
use super::config::ModelConfig;
use super::setup::{MergeBase, Setup, Task};

/// Where a model's files are. A path need not have an extension.
#[derive(Debug, Clone)]
pub struct ModelFiles {
    /// `config.json`.
    pub config: PathBuf,
    /// The safetensors files, as (name in the repository, readable path).
    pub weights: Vec<(String, PathBuf)>,
}

/// Numbers of parameters, as PEFT's `print_trainable_parameters` counts them: a quantized weight
/// counts as its unpacked numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    /// Those that are trained.
    pub trainable: u64,
    /// All of them, adapters included.
    pub all: u64,
}

/// What a merge measured.
#[derive(Debug, Clone, PartialEq)]
pub struct MergeReport {
    /// Largest absolute difference between the logits of the merged model, before rounding, and
    /// those of base and adapter, on a seeded probe batch.
    pub max_abs_difference: f64,
    /// The same over the largest absolute logit.
    pub max_rel_difference: f64,
    /// Largest absolute change of a probe logit by rounding the merged weights to the base's
    /// data type.
    pub rounding_loss: f64,
}

/// A model with its trainable parameters.
pub struct Model {}

impl Model {
    /// A base with a fresh adapter and, where it has none, a fresh head.
    ///
    /// # Errors
    /// When a file cannot be read, a tensor is missing or has another shape, or the setup does not
    /// fit the model.
    pub fn load(_files: &ModelFiles, _setup: &Setup) -> Result<Self> {
        todo!()
    }

    /// A base with a trained PEFT adapter (`adapter_config.json`, `adapter_model.safetensors`), or
    /// trained full weights (`config.json`, `model.safetensors`).
    ///
    /// # Errors
    /// As [`Model::load`], and when the adapter lacks a tensor or has one too many.
    pub fn load_trained(
        _files: &ModelFiles,
        _setup: &Setup,
        _trained: &[(String, PathBuf)],
    ) -> Result<Self> {
        todo!()
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        todo!()
    }

    /// How many parameters there are.
    pub fn counts(&self) -> Counts {
        todo!()
    }

    /// What is trained, under PEFT's names without the adapter's (`full`: transformers' names).
    pub fn trainable(&self) -> &BTreeMap<String, Var> {
        todo!()
    }

    /// Logits without dropout, f32: `[size, classes]`, or `[size, length, vocab]` with zeros on
    /// the padding.
    ///
    /// # Errors
    /// When the batch does not fit the model.
    pub fn logits(&self, _batch: &Batch) -> Result<Tensor> {
        todo!()
    }

    /// For each row the sum of the log-probabilities (natural logarithm) of its labels, and how
    /// many labels it has; without dropout.
    ///
    /// # Errors
    /// When the batch does not fit the model.
    pub fn target_log_probs(&self, _batch: &Batch) -> Result<Vec<(f64, usize)>> {
        todo!()
    }

    /// The sum of the losses over the targets of the batch, and the gradient of that sum over
    /// `denominator` for every trainable parameter. With dropout, seeded by the setup's seed and
    /// `step`, which must differ between micro-batches.
    ///
    /// # Errors
    /// When the batch does not fit the model, or a trainable parameter was not reached.
    pub fn gradients(
        &self,
        _batch: &Batch,
        _step: u64,
        _denominator: f64,
    ) -> Result<(f64, BTreeMap<String, Tensor>)> {
        todo!()
    }

    /// Writes a PEFT adapter directory.
    ///
    /// # Errors
    /// When the method has no adapter, or a file cannot be written.
    pub fn save_adapter(&self, _dir: &Path, _base_name: &str) -> Result<()> {
        todo!()
    }

    /// Writes a transformers directory: `config.json` and `model.safetensors`.
    ///
    /// # Errors
    /// When the model is not fully trained (an adapter is merged instead), or a file cannot be
    /// written.
    pub fn save_full(&self, _dir: &Path, _class_names: &[String]) -> Result<()> {
        todo!()
    }

    /// Adds the adapter into a base and writes a transformers directory.
    ///
    /// # Errors
    /// When the logits of the merged model differ from those of base and adapter, or a file cannot
    /// be written.
    pub fn merge(
        &self,
        _base: MergeBase,
        _dir: &Path,
        _class_names: &[String],
    ) -> Result<MergeReport> {
        todo!()
    }
}

/// Writes a model's weights from nothing: normal(0, `initializer_range`), norms 1, biases 0.
///
/// # Errors
/// When the file cannot be written.
pub fn random_weights(
    _config: &ModelConfig,
    _task: Option<&Task>,
    _seed: u64,
    _out: &Path,
) -> Result<()> {
    todo!()
}

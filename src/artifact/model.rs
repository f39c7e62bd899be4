//! Models, tokenizers, and what training makes of them.

use std::path::PathBuf;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::{Artifact, Type, View};

/// A tokenizer: `tokenizer.json`, and where there are some `tokenizer_config.json`,
/// `special_tokens_map.json`, `chat_template.jinja`, vocabulary files. It is the `tokenizer`
/// port of a model.
#[derive(Debug, Clone)]
pub struct TokenizerFiles(pub View);

impl Artifact for TokenizerFiles {
    const ACCEPTS: &'static [Type] = &[Type::Tokenizer, Type::Model, Type::TrainedModel];
    const PORTS: Option<&'static [&'static str]> = Some(&["tokenizer"]);

    fn open(view: View) -> Result<Self> {
        Ok(Self(view))
    }
}

impl TokenizerFiles {
    /// `tokenizer.json`.
    ///
    /// # Errors
    /// When there is none.
    pub fn tokenizer(&self) -> Result<PathBuf> {
        self.0.file("tokenizer", "tokenizer.json")
    }

    /// `tokenizer_config.json`, if there is one.
    ///
    /// # Errors
    /// When the store has lost it.
    pub fn config(&self) -> Result<Option<PathBuf>> {
        self.0.find("tokenizer", "tokenizer_config.json")
    }
}

/// A transformers model directory in three ports: `config` (`config.json`, and
/// `generation_config.json` where there is one), `weights` (`*.safetensors`, and the index of a
/// sharded one), `tokenizer`.
#[derive(Debug, Clone)]
pub struct Model(pub View);

impl Artifact for Model {
    const ACCEPTS: &'static [Type] = &[Type::Model];

    fn open(view: View) -> Result<Self> {
        Ok(Self(view))
    }
}

impl Model {
    /// `config.json`.
    ///
    /// # Errors
    /// When there is none.
    pub fn config(&self) -> Result<PathBuf> {
        self.0.file("config", "config.json")
    }

    /// The safetensors files, as (name, readable path), sorted by name.
    ///
    /// # Errors
    /// When the store has lost one.
    pub fn weights(&self) -> Result<Vec<(String, PathBuf)>> {
        let mut files = self.0.files("weights")?;
        files.retain(|(name, _)| name.ends_with(".safetensors"));
        Ok(files)
    }
}

/// `trained.json` of a trained model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainedInfo {
    /// `full`, `lora` or `qlora`.
    pub method: String,
    /// `causal_lm` or `sequence_classification`.
    pub task: String,
    /// How the frozen base was quantized: `none`, `nf4` or `nf4-double`.
    pub quantization: String,
    /// Hub id or directory name of the base, for `base_model_name_or_path`.
    pub base: String,
    /// Class names in class order (classification).
    #[serde(default)]
    pub classes: Vec<String>,
    /// Parameters that were trained.
    pub trainable_parameters: u64,
    /// All parameters.
    pub all_parameters: u64,
}

/// A base model with what was trained on it. Ports `config`, `weights`, `tokenizer` are the
/// base's own trees; port `trained` holds `trained.json`, `history.json` (losses and metrics by
/// step, without times), and either a PEFT adapter (`adapter_config.json`,
/// `adapter_model.safetensors`) or, for `full`, `config.json` and `model.safetensors`.
#[derive(Debug, Clone)]
pub struct TrainedModel {
    /// The base.
    pub base: Model,
    /// How it was trained.
    pub info: TrainedInfo,
}

impl Artifact for TrainedModel {
    const ACCEPTS: &'static [Type] = &[Type::TrainedModel];

    fn open(view: View) -> Result<Self> {
        let info = view.json("trained", "trained.json")?;
        Ok(Self { base: Model(view), info })
    }
}

impl TrainedModel {
    /// The files of the `trained` port, as (name, readable path).
    ///
    /// # Errors
    /// When the store has lost one.
    pub fn trained(&self) -> Result<Vec<(String, PathBuf)>> {
        self.base.0.files("trained")
    }
}

/// A base model or a trained one: what can be evaluated, selected and benchmarked.
#[derive(Debug, Clone)]
pub enum AnyModel {
    /// A transformers model.
    Base(Model),
    /// A base with what was trained on it.
    Trained(TrainedModel),
}

impl Artifact for AnyModel {
    const ACCEPTS: &'static [Type] = &[Type::TrainedModel, Type::Model];

    fn open(view: View) -> Result<Self> {
        Ok(match view.ty {
            Type::TrainedModel => Self::Trained(TrainedModel::open(view)?),
            _ => Self::Base(Model::open(view)?),
        })
    }
}

impl AnyModel {
    /// The base: config, weights and tokenizer.
    pub fn base(&self) -> &Model {
        match self {
            Self::Base(model) => model,
            Self::Trained(trained) => &trained.base,
        }
    }

    /// How it was trained, if it was.
    pub fn trained(&self) -> Option<&TrainedModel> {
        match self {
            Self::Base(_) => None,
            Self::Trained(trained) => Some(trained),
        }
    }
}

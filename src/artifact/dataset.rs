//! Datasets and rendered prompts: Parquet with a small description beside it, a port per split.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::{Artifact, Type, View};

/// File of every split of datasets, prompts and tokens.
pub const ROWS: &str = "data.parquet";

/// `features.json` of a dataset split.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Features {
    /// Number of rows.
    pub rows: u64,
    /// Column name to Arrow type, in file order.
    pub columns: Vec<(String, String)>,
    /// Class names by column, as the dataset's card or its features name them; class `i` of a
    /// column is `classes[column][i]`.
    #[serde(default)]
    pub classes: BTreeMap<String, Vec<String>>,
}

/// One split of a dataset.
#[derive(Debug, Clone)]
pub struct Split {
    /// The Parquet file.
    pub rows: PathBuf,
    /// What is in it.
    pub features: Features,
}

/// Rows in Parquet. Each port is a split: `data.parquet` and `features.json`.
#[derive(Debug, Clone)]
pub struct Dataset(pub View);

impl Artifact for Dataset {
    const ACCEPTS: &'static [Type] = &[Type::Dataset];

    fn open(view: View) -> Result<Self> {
        Ok(Self(view))
    }
}

impl Dataset {
    /// Split names, sorted.
    pub fn splits(&self) -> impl Iterator<Item = &str> {
        self.0.ports.keys().map(String::as_str)
    }

    /// One split.
    ///
    /// # Errors
    /// When there is none of that name; the message lists those there are.
    pub fn split(&self, name: &str) -> Result<Split> {
        let rows = self.0.file(name, ROWS)?;
        Ok(Split { rows, features: self.0.json(name, "features.json")? })
    }
}

/// What part of a rendered row a segment is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SegmentKind {
    /// Fixed text of the template; never shortened.
    Template,
    /// Text from the row that `truncate: input` may shorten.
    Input,
    /// What the model learns to write; never shortened, and the only part with labels.
    Target,
}

/// A piece of a rendered row.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// What it is.
    pub kind: SegmentKind,
    /// Its text.
    pub text: String,
}

/// `prompts.json` of a split of prompts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromptsInfo {
    /// Number of rows.
    pub rows: u64,
    /// `causal_lm` (columns `segments`, and `label` where there are candidates) or
    /// `sequence_classification` (columns `text`, optionally `text_pair`, and `label`).
    pub task: String,
    /// Name of the template.
    pub template: String,
    /// Words that stand for classes, in class order; empty if the target is free text.
    #[serde(default)]
    pub candidates: Vec<String>,
    /// The candidates as targets: each word with what the template puts around it.
    #[serde(default)]
    pub candidate_targets: Vec<String>,
    /// What the template writes right before them.
    #[serde(default)]
    pub candidate_prompt: String,
    /// Class names in class order, for classification.
    #[serde(default)]
    pub classes: Vec<String>,
    /// Whether the template already writes the special tokens (chat templates), so that the
    /// tokenizer must not add BOS, and the end-of-turn token ends the target.
    #[serde(default)]
    pub special_tokens: bool,
}

/// Rendered rows. Each port is a split: `data.parquet` and `prompts.json`.
///
/// Columns for `causal_lm`: `segments: list<struct<kind: utf8, text: utf8>>`, and
/// `label: int32` (class of the target) if there are candidates. For
/// `sequence_classification`: `text: utf8`, optional `text_pair: utf8`, `label: int32`.
#[derive(Debug, Clone)]
pub struct Prompts(pub View);

impl Artifact for Prompts {
    const ACCEPTS: &'static [Type] = &[Type::Prompts];

    fn open(view: View) -> Result<Self> {
        Ok(Self(view))
    }
}

impl Prompts {
    /// Split names, sorted.
    pub fn splits(&self) -> impl Iterator<Item = &str> {
        self.0.ports.keys().map(String::as_str)
    }

    /// One split: the Parquet file and its description.
    ///
    /// # Errors
    /// When there is none of that name; the message lists those there are.
    pub fn split(&self, name: &str) -> Result<(PathBuf, PromptsInfo)> {
        Ok((self.0.file(name, ROWS)?, self.0.json(name, "prompts.json")?))
    }
}

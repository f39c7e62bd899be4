//! Typed views of stored trees: what flows along an edge.
//!
//! An artifact is a set of *ports*, each a published tree with its own digest. A dataset has a
//! port per split; a model has `config`, `weights` and `tokenizer`. A step reads an artifact
//! through a typed view ([`Dataset`], [`Tokens`], …) and writes it as plain files under its
//! output directory; the file names and schemas of each type stand beside its view.

mod dataset;
mod equal;
mod model;
mod report;
mod rows;
mod tokens;

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

pub use dataset::{Dataset, Features, Prompts, PromptsInfo, ROWS, Segment, SegmentKind, Split};
pub use equal::{Comparison, Likeness, Place, Tolerance, compare};
pub use model::{AnyModel, Model, TokenizerFiles, TrainedInfo, TrainedModel};
pub use report::{Report, ReportFile};
pub use rows::AnyRows;
pub use tokens::{Candidate, Tokens, TokensInfo, TokensSplit};

use crate::digest::Digest;
use crate::source::{Fault, suggest};
use crate::store::{Store, Tree};

/// The types of artifact that edges carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Type {
    /// Rows in Parquet, a port per split.
    Dataset,
    /// Rendered rows (prompt and target segments), a port per split.
    Prompts,
    /// Token ids in Parquet, a port per split.
    Tokens,
    /// `tokenizer.json` and what goes with it.
    Tokenizer,
    /// A transformers model: ports `config`, `weights`, `tokenizer`.
    Model,
    /// What training made, with the base it was made from.
    TrainedModel,
    /// Metrics.
    Report,
    /// Plain files.
    Files,
}

impl Type {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Dataset,
        Self::Prompts,
        Self::Tokens,
        Self::Tokenizer,
        Self::Model,
        Self::TrainedModel,
        Self::Report,
        Self::Files,
    ];

    /// As written in messages and records.
    pub fn name(self) -> &'static str {
        match self {
            Self::Dataset => "dataset",
            Self::Prompts => "prompts",
            Self::Tokens => "tokens",
            Self::Tokenizer => "tokenizer",
            Self::Model => "model",
            Self::TrainedModel => "trained_model",
            Self::Report => "report",
            Self::Files => "files",
        }
    }

    /// The type of one of its ports when that port is named: a split of a dataset is a dataset,
    /// the `tokenizer` of a model is a tokenizer.
    pub fn of_port(self, port: &str) -> Self {
        match (self, port) {
            (Self::Model | Self::TrainedModel, "tokenizer") => Self::Tokenizer,
            (Self::Model | Self::TrainedModel, _) => Self::Files,
            (ty, _) => ty,
        }
    }

    /// The ports that every artifact of this type has, where the type fixes them.
    pub fn fixed_ports(self) -> Option<&'static [&'static str]> {
        match self {
            Self::Tokenizer => Some(&["tokenizer"]),
            Self::Model => Some(&["config", "tokenizer", "weights"]),
            // base `config`, `tokenizer`, `weights`, and `trained` (adapter or full weights)
            Self::TrainedModel => Some(&["config", "tokenizer", "trained", "weights"]),
            Self::Report => Some(&["report"]),
            Self::Dataset | Self::Prompts | Self::Tokens | Self::Files => None,
        }
    }

    /// How it is laid out under `outputs/`: the ports whose files are put side by side in one
    /// directory, or `None` when every port gets a directory of its own.
    pub fn flat_ports(self) -> Option<&'static [&'static str]> {
        match self {
            Self::Tokenizer => Some(&["tokenizer"]),
            Self::Model => Some(&["config", "tokenizer", "weights"]),
            Self::TrainedModel => Some(&["tokenizer", "trained"]),
            Self::Report => Some(&["report"]),
            Self::Dataset | Self::Prompts | Self::Tokens | Self::Files => None,
        }
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Type {
    type Err = anyhow::Error;

    fn from_str(s: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|t| t.name() == s);
        found.with_context(|| format!("`{s}` is not a type of artifact"))
    }
}

/// A typed view of an artifact.
pub trait Artifact: Sized {
    /// Types that this view can be opened on, the usual one first.
    const ACCEPTS: &'static [Type];
    /// The ports that the view reads, where it reads fewer than all (a tokenizer of a model).
    /// What is not read is not part of the reader's key.
    const PORTS: Option<&'static [&'static str]> = None;

    /// Opens the view.
    ///
    /// # Errors
    /// When a file is missing or not of the expected form.
    fn open(view: View) -> Result<Self>;
}

/// An artifact's ports, with the store that holds them.
#[derive(Debug, Clone)]
pub struct View {
    /// What it is.
    pub ty: Type,
    /// Tree digest by port.
    pub ports: BTreeMap<String, Digest>,
    /// Where the trees are.
    pub store: Store,
}

impl View {
    /// The digest of a port's tree.
    ///
    /// # Errors
    /// When there is no such port; the message lists those there are.
    pub fn port(&self, name: &str) -> Result<Digest> {
        self.ports.get(name).copied().ok_or_else(|| {
            let known: Vec<&str> = self.ports.keys().map(String::as_str).collect();
            let help = suggest(name, &known).unwrap_or_else(|| "it is empty".into());
            Fault::new(format!("this {} has no port `{name}`", self.ty)).help(help).into()
        })
    }

    /// The manifest of a port.
    ///
    /// # Errors
    /// When the port or its tree is missing.
    pub fn tree(&self, port: &str) -> Result<Tree> {
        let digest = self.port(port)?;
        let tree = self.store.tree(&digest)?;
        tree.with_context(|| format!("the store has lost tree {} ({port})", digest.short()))
    }

    /// A readable path of one file of a port. The path's own name is a digest: take the format
    /// from the name in the tree, not from the path.
    ///
    /// # Errors
    /// When the port or the file is missing.
    pub fn file(&self, port: &str, path: &str) -> Result<PathBuf> {
        self.find(port, path)?.ok_or_else(|| {
            let fault =
                Fault::new(format!("port `{port}` of this {} has no file `{path}`", self.ty));
            fault.into()
        })
    }

    /// Like [`View::file`], with `None` for a file that the port does not have.
    ///
    /// # Errors
    /// When the port is missing or the store has lost the bytes.
    pub fn find(&self, port: &str, path: &str) -> Result<Option<PathBuf>> {
        let tree = self.tree(port)?;
        let Some(entry) = tree.entries.iter().find(|e| e.path == path) else {
            return Ok(None);
        };
        let found = self.store.locate(&entry.digest)?;
        let lost = || format!("the store has lost `{path}` ({})", entry.digest.short());
        found.with_context(lost).map(Some)
    }

    /// Every file of a port, as (path in the tree, readable path), sorted.
    ///
    /// # Errors
    /// When the port is missing or the store has lost some bytes.
    pub fn files(&self, port: &str) -> Result<Vec<(String, PathBuf)>> {
        let tree = self.tree(port)?;
        let located = tree.entries.into_iter().map(|e| {
            let lost = || format!("the store has lost `{}` ({})", e.path, e.digest.short());
            Ok((e.path.clone(), self.store.locate(&e.digest)?.with_context(lost)?))
        });
        located.collect()
    }

    /// A JSON file of a port.
    ///
    /// # Errors
    /// When it is missing or not of the expected form.
    pub fn json<T: serde::de::DeserializeOwned>(&self, port: &str, path: &str) -> Result<T> {
        let text = std::fs::read(self.file(port, path)?)?;
        serde_json::from_slice(&text).with_context(|| format!("`{path}` of port `{port}`"))
    }
}

/// Any files.
#[derive(Debug, Clone)]
pub struct Files(pub View);

impl Artifact for Files {
    const ACCEPTS: &'static [Type] = &Type::ALL;

    fn open(view: View) -> Result<Self> {
        Ok(Self(view))
    }
}

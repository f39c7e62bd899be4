//! Token ids in Parquet.

use std::path::PathBuf;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::dataset::ROWS;
use super::{Artifact, Type, View};
use crate::digest::Digest;

/// A word that stands for a class, with the tokens that follow the prompt when it is the answer
/// (the end-of-sequence token included).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Candidate {
    /// The word.
    pub word: String,
    /// Its tokens as a target.
    pub ids: Vec<u32>,
}

/// `tokens.json` of a split of tokens.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokensInfo {
    /// `causal_lm` or `sequence_classification`.
    pub task: String,
    /// Number of rows.
    pub rows: u64,
    /// Rows whose input was shortened.
    pub truncated: u64,
    /// Rows left out: too long even when shortened, with nothing to learn, or with a second BOS.
    pub dropped: u64,
    /// Tokens in all rows.
    pub tokens: u64,
    /// Tokens with a label (causal only).
    pub target_tokens: u64,
    /// Positions of the longest row, with room for the longest candidate as its answer.
    pub longest: u64,
    /// The limit that was asked for.
    pub max_length: u64,
    /// Size of the tokenizer's vocabulary, added tokens included (largest id + 1).
    pub vocab_size: u64,
    /// The padding id, if the tokenizer names one.
    pub pad_id: Option<u32>,
    /// The end-of-sequence id, if there is one.
    pub eos_id: Option<u32>,
    /// Ids that end an answer: the end of sequence, or a chat template's end of turn.
    #[serde(default)]
    pub end_ids: Vec<u32>,
    /// The beginning-of-sequence id, if the tokenizer puts one.
    pub bos_id: Option<u32>,
    /// Tree digest of the tokenizer's files.
    pub tokenizer: Option<Digest>,
    /// Words for the classes, in class order (causal with label words).
    #[serde(default)]
    pub candidates: Vec<Candidate>,
    /// Class names in class order (classification).
    #[serde(default)]
    pub classes: Vec<String>,
}

/// One split of tokens.
#[derive(Debug, Clone)]
pub struct TokensSplit {
    /// The Parquet file.
    pub rows: PathBuf,
    /// What is in it.
    pub info: TokensInfo,
}

/// Token ids. Each port is a split: `data.parquet` and `tokens.json`.
///
/// Columns: `input_ids: list<int32>` (no padding); for `causal_lm`
/// `labels: list<int32>` of the same length (-100 where no loss is taken; not shifted) and, where
/// there are candidates, `label: int32`; for `sequence_classification` `label: int32`, and
/// `token_type_ids: list<int32>` only when there are text pairs.
#[derive(Debug, Clone)]
pub struct Tokens(pub View);

impl Artifact for Tokens {
    const ACCEPTS: &'static [Type] = &[Type::Tokens];

    fn open(view: View) -> Result<Self> {
        Ok(Self(view))
    }
}

impl Tokens {
    /// Split names, sorted.
    pub fn splits(&self) -> impl Iterator<Item = &str> {
        self.0.ports.keys().map(String::as_str)
    }

    /// One split.
    ///
    /// # Errors
    /// When there is none of that name; the message lists those there are.
    pub fn split(&self, name: &str) -> Result<TokensSplit> {
        let rows = self.0.file(name, ROWS)?;
        Ok(TokensSplit { rows, info: self.0.json(name, "tokens.json")? })
    }
}

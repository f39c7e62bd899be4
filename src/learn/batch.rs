//! A padded batch, and the same without its padding.

use std::ops::Range;

use anyhow::{Result, ensure};

/// The label that asks for no prediction, as in transformers.
pub const IGNORE: i64 = -100;

/// Rows of token ids, padded on the right to one length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Row-major `[size, length]`.
    pub input_ids: Vec<u32>,
    /// As `input_ids`; `None` means all 0. Read by BERT only.
    pub token_type_ids: Option<Vec<u32>>,
    /// Tokens of each row without its padding, at least 1.
    pub lengths: Vec<usize>,
    /// Number of rows.
    pub size: usize,
    /// Tokens of each row with its padding.
    pub length: usize,
    /// What is to be predicted.
    pub labels: Labels,
}

/// What is to be predicted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Labels {
    /// A class for each row.
    Classes(Vec<u32>),
    /// `[size, length]`: each position's own token id where it is to be predicted (by the
    /// position before it), or [`IGNORE`]. The model shifts, as transformers does.
    Tokens(Vec<i64>),
    /// Nothing: only logits are asked for.
    None,
}

impl Batch {
    /// How many targets the loss sums over: rows, or labelled tokens that have one before them.
    pub fn targets(&self) -> usize {
        match &self.labels {
            Labels::Classes(classes) => classes.len(),
            Labels::Tokens(_) => (0..self.size).map(|row| self.row_targets(row).count()).sum(),
            Labels::None => 0,
        }
    }

    /// Positions of one row that predict a label, each with that label.
    pub(crate) fn row_targets(&self, row: usize) -> impl Iterator<Item = (usize, i64)> + '_ {
        let labels = match &self.labels {
            Labels::Tokens(labels) => {
                let end = self.lengths.get(row).copied().unwrap_or(0).min(self.length);
                labels.get(row * self.length..row * self.length + end).unwrap_or(&[])
            }
            _ => &[],
        };
        let shifted = labels.iter().skip(1).enumerate();
        shifted.filter(|(_, l)| **l != IGNORE).map(|(i, l)| (i, *l))
    }

    /// Without its padding, checked against the sizes of a model.
    ///
    /// # Errors
    /// When lengths and shapes disagree, or an id, a label or a length is outside what the model
    /// has room for.
    pub(crate) fn pack(&self, vocab: usize, positions: usize) -> Result<Packed> {
        let all = self.size * self.length;
        ensure!(
            self.input_ids.len() == all && self.lengths.len() == self.size && self.size > 0,
            "a batch of {} x {} has {} token ids and {} lengths",
            self.size,
            self.length,
            self.input_ids.len(),
            self.lengths.len()
        );
        ensure!(
            self.token_type_ids.as_ref().is_none_or(|t| t.len() == all),
            "token types and token ids differ in number"
        );
        let labels = match &self.labels {
            Labels::Classes(c) => c.len() == self.size,
            Labels::Tokens(t) => t.len() == all,
            Labels::None => true,
        };
        ensure!(labels, "labels and rows of a batch differ in number");
        let mut packed = Packed { starts: vec![0], ..Packed::default() };
        for (row, &n) in self.lengths.iter().enumerate() {
            ensure!(
                n >= 1 && n <= self.length,
                "row {row} has {n} tokens in a batch {} wide",
                self.length
            );
            ensure!(
                n <= positions,
                "a sequence of {n} tokens is longer than the model's {positions} positions"
            );
            let range = row * self.length..row * self.length + n;
            let ids = &self.input_ids[range.clone()];
            if let Some(id) = ids.iter().find(|id| **id as usize >= vocab) {
                anyhow::bail!("token id {id} is outside the model's vocabulary of {vocab}");
            }
            packed.ids.extend_from_slice(ids);
            packed.positions.extend(0..n as u32);
            match &self.token_type_ids {
                Some(types) => packed.types.extend_from_slice(&types[range]),
                None => packed.types.resize(packed.ids.len(), 0),
            }
            packed.starts.push(packed.ids.len());
        }
        Ok(packed)
    }
}

/// The rows of a batch end to end, without padding.
#[derive(Debug, Clone, Default)]
pub(crate) struct Packed {
    /// Token ids, `[tokens]`.
    pub(crate) ids: Vec<u32>,
    /// Token types, `[tokens]`.
    pub(crate) types: Vec<u32>,
    /// Where each row begins, and the number of tokens; `[rows + 1]`.
    pub(crate) starts: Vec<usize>,
    /// Each token's position in its sequence, `[tokens]`.
    pub(crate) positions: Vec<u32>,
    /// Tokens of its row before it that each token does not see, `[tokens]`; empty: they see all.
    pub(crate) hidden: Vec<Range<usize>>,
}

impl Packed {
    /// The tokens of each row.
    pub(crate) fn rows(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        self.starts.windows(2).map(|w| w[0]..w[1])
    }

    /// A row for each prompt: behind it stand the answers without their last tokens, which nothing
    /// follows. The tokens of an answer see the prompt and their own answer, and have the
    /// positions that they would have behind the prompt alone.
    pub(crate) fn answered(prompts: &[&[u32]], answers: &[Vec<u32>]) -> Self {
        let mut packed = Self { starts: vec![0], ..Self::default() };
        for prompt in prompts {
            let (start, p) = (packed.ids.len(), prompt.len());
            packed.ids.extend_from_slice(prompt);
            packed.positions.extend(0..p as u32);
            packed.hidden.resize(packed.ids.len(), 0..0);
            for answer in answers {
                let shown = &answer[..answer.len().saturating_sub(1)];
                let others = p..packed.ids.len() - start;
                packed.ids.extend_from_slice(shown);
                packed.positions.extend((p as u32..).take(shown.len()));
                packed.hidden.resize(packed.ids.len(), others);
            }
            packed.starts.push(packed.ids.len());
        }
        packed.types.resize(packed.ids.len(), 0);
        packed
    }
}

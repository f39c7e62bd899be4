//! What is kept of the rows of one split.

use std::collections::BTreeMap;

use super::{Check, SHOWN};
use crate::data::minhash::Signature;

/// Class changes per class below which rows count as sorted.
const BLOCKS: u64 = 2;

/// A digest of some texts, which are told apart.
pub fn digest<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> u128 {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    let mut short = [0; 16];
    short.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    u128::from_le_bytes(short)
}

/// What is known of one row.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Facts {
    /// Characters or tokens.
    pub length: u64,
    /// Digest of what a model reads.
    pub content: u128,
    /// Digest of what it should answer.
    pub answer: u128,
    /// Its class, as [`super::Doctor::class`] numbers it.
    pub class: Option<u32>,
    /// What is wrong with the row by itself.
    pub flaws: Vec<Check>,
    /// Of its words, where near rows are looked for.
    pub signature: Option<Box<Signature>>,
}

/// Rows with a flaw.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Flawed {
    pub(super) count: u64,
    /// The first of them.
    pub(super) rows: Vec<u64>,
}

/// Rows that stand there more than once.
#[derive(Debug, Default)]
pub(super) struct Repeats {
    /// (row, the first that is the same), by row.
    pub(super) duplicates: Vec<(u64, u64)>,
    /// Rows whose text has several answers, by row.
    pub(super) conflicts: Vec<u64>,
}

/// What was seen of a split.
#[derive(Debug, Clone, Default)]
pub struct Survey {
    contents: Vec<u128>,
    answers: Vec<u128>,
    /// Rows by length.
    lengths: BTreeMap<u64, u64>,
    classes: BTreeMap<u32, u64>,
    flaws: BTreeMap<Check, Flawed>,
    /// Of all rows, or of none.
    signatures: Vec<Signature>,
    last: Option<u32>,
    pub(super) changes: u64,
    pub(super) dropped: u64,
    pub(super) truncated: u64,
}

impl Survey {
    /// Of rows of which an earlier step left some out and shortened some.
    pub fn after(dropped: u64, truncated: u64) -> Self {
        Self { dropped, truncated, ..Self::default() }
    }

    /// Takes the next row.
    pub fn add(&mut self, facts: Facts) {
        let row = self.rows();
        self.contents.push(facts.content);
        self.answers.push(facts.answer);
        *self.lengths.entry(facts.length).or_default() += 1;
        if let Some(class) = facts.class {
            *self.classes.entry(class).or_default() += 1;
            self.changes += u64::from(self.last.is_some_and(|last| last != class));
            self.last = Some(class);
        }
        self.signatures.extend(facts.signature.map(|s| *s));
        for flaw in facts.flaws {
            let flawed = self.flaws.entry(flaw).or_default();
            flawed.count += 1;
            if flawed.rows.len() < SHOWN {
                flawed.rows.push(row);
            }
        }
    }

    /// Forgets the classes: there are so many that they are none.
    pub(super) fn forget_classes(&mut self) {
        self.classes.clear();
        self.flaws.remove(&Check::NoLabel);
    }

    /// Rows seen so far.
    pub fn rows(&self) -> u64 {
        self.contents.len() as u64
    }

    pub(super) fn flaws(&self) -> impl Iterator<Item = (Check, &Flawed)> {
        self.flaws.iter().map(|(check, flawed)| (*check, flawed))
    }

    /// Rows by class.
    pub(super) fn classes(&self) -> &BTreeMap<u32, u64> {
        &self.classes
    }

    pub(super) fn lengths(&self) -> &BTreeMap<u64, u64> {
        &self.lengths
    }

    pub(super) fn contents(&self) -> &[u128] {
        &self.contents
    }

    pub(super) fn signatures(&self) -> &[Signature] {
        &self.signatures
    }

    pub(super) fn is_labelled(&self) -> bool {
        !self.classes.is_empty()
    }

    /// Whether classes stand in blocks; a few rows may do so by chance.
    pub(super) fn is_sorted(&self) -> bool {
        let classes = self.classes.len() as u64;
        let labelled: u64 = self.classes.values().sum();
        classes > 1 && self.changes < BLOCKS * classes && labelled > 4 * BLOCKS * classes
    }

    pub(super) fn repeats(&self) -> Repeats {
        let mut order: Vec<usize> = (0..self.contents.len()).collect();
        order.sort_unstable_by_key(|row| (self.contents[*row], *row));
        let mut repeats = Repeats::default();
        for run in order.chunk_by(|a, b| self.contents[*a] == self.contents[*b]) {
            if run.len() < 2 {
                continue;
            }
            let mut first: BTreeMap<u128, usize> = BTreeMap::new();
            for row in run {
                let earlier = *first.entry(self.answers[*row]).or_insert(*row);
                if earlier != *row {
                    repeats.duplicates.push((*row as u64, earlier as u64));
                }
            }
            if first.len() > 1 {
                repeats.conflicts.extend(run.iter().map(|row| *row as u64));
            }
        }
        repeats.duplicates.sort_unstable();
        repeats.conflicts.sort_unstable();
        repeats
    }

    /// The length that a share of the rows do not exceed (nearest rank).
    pub(super) fn length_at(&self, share: f64) -> u64 {
        let rank = ((share * self.rows() as f64).ceil() as u64).max(1);
        let mut seen = 0;
        for (length, rows) in &self.lengths {
            seen += rows;
            if seen >= rank {
                return *length;
            }
        }
        0
    }

    pub(super) fn total_length(&self) -> u64 {
        self.lengths.iter().map(|(length, rows)| length * rows).sum()
    }
}

//! Rows that repeat earlier ones, exactly or nearly.

use std::collections::HashSet;

use anyhow::{Context as _, Result};
use arrow::array::RecordBatch;
use arrow::util::display::{ArrayFormatter, FormatOptions};
use rayon::prelude::*;

use super::doctor::digest;
use super::minhash::{Alike, Near, Signature, signature};

/// What counts as a repetition.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Deduplicate {
    /// The same bytes.
    Exact,
    /// Nearly the same words.
    Near(Near),
}

/// What was seen of earlier rows.
#[derive(Debug)]
pub struct Seen {
    how: Deduplicate,
    exact: HashSet<u128>,
    /// Rows that were kept.
    kept: Option<Alike>,
}

impl Seen {
    /// Nothing yet.
    pub fn new(how: Deduplicate) -> Self {
        let kept = match how {
            Deduplicate::Exact => None,
            Deduplicate::Near(near) => Some(Alike::new(near.threshold)),
        };
        Self { how, exact: HashSet::new(), kept }
    }

    /// For each row of a batch whether it is new, by some of its columns; new ones are remembered.
    ///
    /// # Errors
    /// When there is no such column.
    pub fn are_new(&mut self, batch: &RecordBatch, columns: &[String]) -> Result<Vec<bool>> {
        let options = FormatOptions::new();
        let mut formats = Vec::with_capacity(columns.len());
        for column in columns {
            let array = batch.column_by_name(column);
            let array = array.with_context(|| format!("there is no column `{column}`"))?;
            formats.push(ArrayFormatter::try_new(array.as_ref(), &options)?);
        }
        let mut texts = Vec::with_capacity(batch.num_rows());
        for row in 0..batch.num_rows() {
            let values = formats.iter().map(|f| Ok(f.value(row).try_to_string()?));
            texts.push(values.collect::<Result<Vec<String>>>()?);
        }
        let signatures: Vec<Option<Signature>> = match self.how {
            Deduplicate::Exact => vec![None; texts.len()],
            Deduplicate::Near(near) => texts
                .par_iter()
                .map(|texts| Some(signature(&texts.join("\n"), near.words)))
                .collect(),
        };
        let rows = texts.iter().zip(signatures);
        Ok(rows.map(|(texts, signature)| self.is_new(texts, signature)).collect())
    }

    fn is_new(&mut self, texts: &[String], signature: Option<Signature>) -> bool {
        if !self.exact.insert(digest(texts.iter().map(String::as_bytes))) {
            return false;
        }
        let (Some(kept), Some(signature)) = (&mut self.kept, signature) else { return true };
        let new = !kept.has_like(&signature);
        if new {
            kept.add(signature);
        }
        new
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{ArrayRef, StringArray};

    use super::*;

    fn new(how: Deduplicate, rows: &[String]) -> Vec<bool> {
        let column: ArrayRef = Arc::new(StringArray::from(rows.to_vec()));
        let batch = RecordBatch::try_from_iter([("t", column)]).unwrap();
        let mut seen = Seen::new(how);
        let halves = [
            batch.slice(0, rows.len() / 2),
            batch.slice(rows.len() / 2, rows.len() - rows.len() / 2),
        ];
        let halves = halves.map(|half| seen.are_new(&half, &["t".to_owned()]).unwrap());
        halves.concat()
    }

    fn words(from: usize, n: usize) -> String {
        (from..from + n).map(|i| format!("word{i}")).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn exact_repetitions_go_even_across_batches() {
        let rows = ["a", "b", "a", "A", "b", "c"].map(str::to_owned);
        assert_eq!(new(Deduplicate::Exact, &rows), [true, true, false, true, false, true]);
    }

    #[test]
    fn near_repetitions_go() {
        let near = Deduplicate::Near(Near { threshold: 0.8, words: 3 });
        let rows = [
            words(0, 100),
            // Case and punctuation do not count.
            words(0, 100).to_uppercase().replace(' ', ", "),
            // One word of a hundred: 95 of 101 runs in common.
            words(0, 50) + " other " + &words(51, 49),
            // Half of the words: a third of the runs.
            words(50, 100),
            String::new(),
            "short".to_owned(),
        ];
        assert_eq!(new(near, &rows), [true, false, false, true, true, true]);
        let strict = Deduplicate::Near(Near { threshold: 1.0, words: 3 });
        assert_eq!(new(strict, &rows)[..3], [true, false, true]);
    }
}

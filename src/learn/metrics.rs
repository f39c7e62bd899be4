//! Classification metrics from a confusion matrix, with scikit-learn's conventions.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};

/// Counts of (true class, predicted class). All metrics come from it, so that scoring needs no
/// memory that grows with the number of rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Confusion {
    classes: usize,
    counts: Vec<u64>,
}

/// Precision, recall and F1 of one class; 0 where a denominator is 0, as scikit-learn's
/// `zero_division=0`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ClassScores {
    /// Of what was predicted as this class, how much is.
    pub precision: f64,
    /// Of what is of this class, how much was predicted so.
    pub recall: f64,
    /// Harmonic mean of the two.
    pub f1: f64,
}

fn ratio(a: f64, b: f64) -> f64 {
    if b == 0.0 { 0.0 } else { a / b }
}

impl Confusion {
    /// An empty matrix.
    pub fn new(classes: usize) -> Self {
        Self { classes, counts: vec![0; classes * classes] }
    }

    /// Counts one row.
    ///
    /// # Errors
    /// When a class is outside the matrix.
    pub fn add(&mut self, truth: usize, predicted: usize) -> Result<()> {
        let n = self.classes;
        ensure!(truth < n && predicted < n, "class {} is outside 0..{n}", truth.max(predicted));
        self.counts[truth * n + predicted] += 1;
        Ok(())
    }

    /// The counts: a row per true class, a column per predicted one.
    pub fn rows(&self) -> Vec<Vec<u64>> {
        self.counts.chunks(self.classes.max(1)).map(<[u64]>::to_vec).collect()
    }

    /// Number of rows counted.
    pub fn total(&self) -> u64 {
        self.counts.iter().sum()
    }

    fn count(&self, truth: usize, predicted: usize) -> f64 {
        self.counts[truth * self.classes + predicted] as f64
    }

    fn correct(&self) -> f64 {
        (0..self.classes).map(|k| self.count(k, k)).sum()
    }

    /// Rows of this true class.
    fn truths(&self, k: usize) -> f64 {
        (0..self.classes).map(|j| self.count(k, j)).sum()
    }

    /// Rows predicted as this class.
    fn predictions(&self, k: usize) -> f64 {
        (0..self.classes).map(|i| self.count(i, k)).sum()
    }

    /// Share of rows predicted right.
    pub fn accuracy(&self) -> f64 {
        ratio(self.correct(), self.total() as f64)
    }

    /// Share of the most frequent true class: what always answering it would score.
    pub fn majority(&self) -> f64 {
        let most = (0..self.classes).map(|k| self.truths(k)).fold(0.0, f64::max);
        ratio(most, self.total() as f64)
    }

    /// Scores of one class against the rest.
    pub fn class(&self, k: usize) -> ClassScores {
        let precision = ratio(self.count(k, k), self.predictions(k));
        let recall = ratio(self.count(k, k), self.truths(k));
        let f1 = ratio(2.0 * self.count(k, k), self.predictions(k) + self.truths(k));
        ClassScores { precision, recall, f1 }
    }

    /// Unweighted mean over the classes that occur, as truth or as prediction.
    pub fn macro_average(&self) -> ClassScores {
        let occurs = |k: &usize| self.truths(*k) + self.predictions(*k) > 0.0;
        let scores: Vec<ClassScores> =
            (0..self.classes).filter(occurs).map(|k| self.class(k)).collect();
        let n = scores.len() as f64;
        let mean = |get: fn(&ClassScores) -> f64| ratio(scores.iter().map(get).sum(), n);
        ClassScores {
            precision: mean(|s| s.precision),
            recall: mean(|s| s.recall),
            f1: mean(|s| s.f1),
        }
    }

    /// Matthews correlation coefficient (Gorodkin 2004 for more than two classes); 0 where it is
    /// not defined.
    pub fn matthews(&self) -> f64 {
        let total = self.total() as f64;
        let (mut both, mut predicted, mut truths) = (0.0, 0.0, 0.0);
        for k in 0..self.classes {
            let (p, t) = (self.predictions(k), self.truths(k));
            both += p * t;
            predicted += p * p;
            truths += t * t;
        }
        let numerator = self.correct() * total - both;
        ratio(numerator, ((total * total - predicted) * (total * total - truths)).sqrt())
    }

    /// All of them by name. With two classes `precision`, `recall` and `f1` are those of class 1
    /// (scikit-learn's `average="binary"`), with more the macro average; `macro_f1` is the macro
    /// average in both cases.
    pub fn metrics(&self) -> BTreeMap<String, f64> {
        let average = self.macro_average();
        let main = if self.classes == 2 { self.class(1) } else { average };
        let named = [
            ("accuracy", self.accuracy()),
            ("precision", main.precision),
            ("recall", main.recall),
            ("f1", main.f1),
            ("macro_f1", average.f1),
            ("matthews", self.matthews()),
            ("majority", self.majority()),
        ];
        named.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn confusion(classes: usize, pairs: &[(usize, usize)]) -> Confusion {
        let mut c = Confusion::new(classes);
        for (t, p) in pairs {
            c.add(*t, *p).unwrap();
        }
        c
    }

    fn close(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-9, "{a} {b}");
    }

    #[test]
    fn two_classes() {
        // true 1 0 1 1 0 1, predicted 1 1 0 1 0 1: tp 3, fp 1, fn 1, tn 1
        let c = confusion(2, &[(1, 1), (0, 1), (1, 0), (1, 1), (0, 0), (1, 1)]);
        let m = c.metrics();
        close(m["accuracy"], 4.0 / 6.0);
        close(m["precision"], 0.75);
        close(m["recall"], 0.75);
        close(m["f1"], 0.75);
        close(m["macro_f1"], (0.75 + 0.5) / 2.0);
        // (3*1 - 1*1) / sqrt(4*4*2*2)
        close(m["matthews"], 0.25);
        close(m["majority"], 4.0 / 6.0);
        assert_eq!(c.rows(), [vec![1, 1], vec![1, 3]]);
    }

    #[test]
    fn three_classes() {
        // scikit-learn's own example: y_true [0,1,2,0,1,2], y_pred [0,2,1,0,0,1]
        let c = confusion(3, &[(0, 0), (1, 2), (2, 1), (0, 0), (1, 0), (2, 1)]);
        let m = c.metrics();
        close(m["precision"], 2.0 / 9.0);
        close(m["recall"], 1.0 / 3.0);
        close(m["f1"], 0.8 / 3.0);
        // c 2, s 6, sum p*t = 3*2+2*2+1*2 = 12, p² = 9+4+1, t² = 4+4+4: (12-12)/...
        close(m["matthews"], 0.0);
    }

    #[test]
    fn always_one_class() {
        let c = confusion(2, &[(0, 0), (0, 0), (1, 0)]);
        let m = c.metrics();
        close(m["accuracy"], 2.0 / 3.0);
        close(m["f1"], 0.0);
        close(m["matthews"], 0.0);
        assert!(Confusion::new(2).metrics().values().all(|v| *v == 0.0));
        assert!(Confusion::new(2).add(2, 0).is_err());
    }
}

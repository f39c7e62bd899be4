//! Rows that repeat earlier ones, exactly or nearly.
//!
//! Near ones by MinHash (Broder 1997): a text is the set of its runs of words, and of 128 orders
//! of all such runs the first one in the set is its signature; two signatures agree in as many
//! places as the sets overlap (Jaccard). Rows that agree in a whole band of places are compared.

use std::collections::{HashMap, HashSet};

use anyhow::{Context as _, Result};
use arrow::array::RecordBatch;
use arrow::util::display::{ArrayFormatter, FormatOptions};
use rayon::prelude::*;

use super::doctor::digest;

/// Orders of a signature.
const ORDERS: usize = 128;

/// What counts as a repetition.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Deduplicate {
    /// The same bytes.
    Exact,
    /// Nearly the same words.
    Near(Near),
}

/// From where on texts are nearly the same.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Near {
    /// Share of runs of words that two texts have in common, of those that either has.
    pub threshold: f64,
    /// Words of a run.
    pub words: usize,
}

/// What was seen of earlier rows.
#[derive(Debug)]
pub struct Seen {
    how: Deduplicate,
    exact: HashSet<u128>,
    /// Places of a band.
    band: usize,
    /// Kept rows by band and its hash.
    bands: HashMap<(usize, u64), Vec<u32>>,
    signatures: Vec<[u32; ORDERS]>,
}

impl Seen {
    /// Nothing yet.
    pub fn new(how: Deduplicate) -> Self {
        let band = match how {
            Deduplicate::Exact => ORDERS,
            Deduplicate::Near(near) => band_of(near.threshold),
        };
        let (exact, bands) = (HashSet::new(), HashMap::new());
        Self { how, exact, band, bands, signatures: Vec::new() }
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
        let signatures: Vec<Option<[u32; ORDERS]>> = match self.how {
            Deduplicate::Exact => vec![None; texts.len()],
            Deduplicate::Near(near) => texts
                .par_iter()
                .map(|texts| Some(signature(&texts.join("\n"), near.words)))
                .collect(),
        };
        let rows = texts.iter().zip(signatures);
        Ok(rows.map(|(texts, signature)| self.is_new(texts, signature)).collect())
    }

    fn is_new(&mut self, texts: &[String], signature: Option<[u32; ORDERS]>) -> bool {
        if !self.exact.insert(digest(texts.iter().map(String::as_bytes))) {
            return false;
        }
        let (Deduplicate::Near(near), Some(signature)) = (self.how, signature) else {
            return true;
        };
        let bands: Vec<(usize, u64)> = signature
            .chunks_exact(self.band)
            .enumerate()
            .map(|(at, places)| (at, places.iter().fold(0, |h, p| mixed(h ^ u64::from(*p)))))
            .collect();
        let wanted = near.threshold * ORDERS as f64;
        for band in &bands {
            for other in self.bands.get(band).into_iter().flatten() {
                let other = &self.signatures[*other as usize];
                let same = signature.iter().zip(other).filter(|(a, b)| a == b).count();
                if same as f64 >= wanted {
                    return false;
                }
            }
        }
        let number = u32::try_from(self.signatures.len()).unwrap_or(u32::MAX);
        self.signatures.push(signature);
        for band in bands {
            self.bands.entry(band).or_default().push(number);
        }
        true
    }
}

/// The longest band by which pairs at the threshold are still found with 97 % and more: one of
/// `128 / band` bands agrees with probability 1 - (1 - t^band)^(128 / band).
fn band_of(threshold: f64) -> usize {
    let found = |band: i32| {
        let bands = ORDERS as f64 / f64::from(band);
        1.0 - (1.0 - threshold.powi(band)).powf(bands)
    };
    [32, 16, 8, 4, 2].into_iter().find(|band| found(*band) >= 0.97).unwrap_or(1) as usize
}

/// Finaliser of SplitMix64 (Steele, Lea, Flood 2014).
fn mixed(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

fn word_hash(word: &str) -> u64 {
    let lower = word.chars().flat_map(char::to_lowercase);
    lower.fold(0, |hash, c| mixed(hash ^ u64::from(c)))
}

/// The signature of a text: of each order, the least run of words. Case and punctuation do not
/// count; a text of fewer words than a run is one run.
fn signature(text: &str, words: usize) -> [u32; ORDERS] {
    let hashes: Vec<u64> = text
        .split(|c: char| !c.is_alphanumeric())
        .filter(|word| !word.is_empty())
        .map(word_hash)
        .collect();
    let mut least = [u32::MAX; ORDERS];
    let mut take = |run: &[u64]| {
        let run = run.iter().fold(0u64, |hash, word| mixed(hash.rotate_left(5) ^ word));
        for (order, least) in least.iter_mut().enumerate() {
            let place = mixed(run ^ mixed(order as u64)) >> 32;
            *least = (*least).min(place as u32);
        }
    };
    if hashes.len() <= words {
        take(&hashes);
    } else {
        hashes.windows(words.max(1)).for_each(take);
    }
    least
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

    #[test]
    fn bands_find_pairs_at_the_threshold() {
        assert_eq!([1.0, 0.9, 0.8, 0.5].map(band_of), [32, 8, 4, 2]);
    }

    /// The estimate is that of the sets, within chance.
    #[test]
    fn signatures_estimate_the_overlap() {
        for shared in [20, 60, 90] {
            let (a, b) = (words(0, 100), words(100 - shared, 100));
            let [a, b] = [a, b].map(|text| signature(&text, 1));
            let same = a.iter().zip(&b).filter(|(a, b)| a == b).count() as f64 / ORDERS as f64;
            let truth = shared as f64 / (200 - shared) as f64;
            assert!((same - truth).abs() < 0.15, "{same} for {truth}");
        }
    }
}

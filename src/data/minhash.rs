//! Texts that are nearly the same, by MinHash (Broder 1997): a text is the set of its runs of
//! words, and of 128 orders of all such runs the first one in the set is its signature; two
//! signatures agree in as many places as the sets overlap (Jaccard). Texts that agree in a whole
//! band of places are compared.

use std::collections::HashMap;

/// Orders of a signature.
const ORDERS: usize = 128;

/// Of each order, the least run of words of a text.
pub(super) type Signature = [u32; ORDERS];

/// From where on texts are nearly the same.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Near {
    /// Share of runs of words that two texts have in common, of those that either has.
    pub threshold: f64,
    /// Words of a run.
    pub words: usize,
}

/// Signatures, among which those are found that are like another.
#[derive(Debug)]
pub(super) struct Alike {
    /// Places of a band.
    band: usize,
    /// Places in which two signatures must agree.
    wanted: f64,
    /// Signatures by band and its hash.
    bands: HashMap<(usize, u64), Vec<u32>>,
    signatures: Vec<Signature>,
    taken: Vec<bool>,
}

impl Alike {
    /// None yet.
    pub(super) fn new(threshold: f64) -> Self {
        let (band, wanted) = (band_of(threshold), threshold * ORDERS as f64);
        let (signatures, taken) = (Vec::new(), Vec::new());
        Self { band, wanted, bands: HashMap::new(), signatures, taken }
    }

    fn bands(&self, signature: &Signature) -> Vec<(usize, u64)> {
        let bands = signature.chunks_exact(self.band).enumerate();
        bands
            .map(|(at, places)| (at, places.iter().fold(0, |h, p| mixed(h ^ u64::from(*p)))))
            .collect()
    }

    /// Whether one is like this one.
    pub(super) fn has_like(&self, signature: &Signature) -> bool {
        let bands = self.bands(signature);
        let mut others = bands.iter().filter_map(|band| self.bands.get(band)).flatten();
        others.any(|other| self.agrees(signature, *other))
    }

    /// Adds one; they are numbered from 0.
    pub(super) fn add(&mut self, signature: Signature) {
        let number = u32::try_from(self.signatures.len()).unwrap_or(u32::MAX);
        for band in self.bands(&signature) {
            self.bands.entry(band).or_default().push(number);
        }
        self.signatures.push(signature);
        self.taken.push(false);
    }

    fn agrees(&self, signature: &Signature, number: u32) -> bool {
        self.wanted <= places(signature, &self.signatures[number as usize]) as f64
    }

    /// The numbers of those that are like this one; none of them is found again.
    pub(super) fn take_like(&mut self, signature: &Signature) -> Vec<u32> {
        let mut found = Vec::new();
        let bands = self.bands(signature);
        let Self { wanted, signatures, taken, .. } = self;
        for band in bands {
            let Some(others) = self.bands.get_mut(&band) else { continue };
            others.retain(|number| {
                let at = *number as usize;
                if !taken[at] && *wanted <= places(signature, &signatures[at]) as f64 {
                    taken[at] = true;
                    found.push(*number);
                }
                !taken[at]
            });
        }
        found.sort_unstable();
        found
    }
}

/// Places in which two signatures agree.
fn places(a: &Signature, b: &Signature) -> usize {
    a.iter().zip(b).filter(|(a, b)| a == b).count()
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

/// The signature of a text. Case and punctuation do not count; a text of fewer words than a run
/// is one run.
pub(super) fn signature(text: &str, words: usize) -> Signature {
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
    use super::*;

    fn words(from: usize, n: usize) -> String {
        (from..from + n).map(|i| format!("word{i}")).collect::<Vec<_>>().join(" ")
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

    #[test]
    fn what_was_found_is_not_found_again() {
        let mut alike = Alike::new(0.8);
        let edited = words(0, 50) + " other " + &words(51, 49);
        for text in [words(0, 100), words(500, 100), edited, words(0, 100)] {
            alike.add(signature(&text, 3));
        }
        let asked = signature(&words(0, 100), 3);
        assert!(alike.has_like(&asked));
        assert_eq!(alike.take_like(&asked), [0, 2, 3]);
        assert_eq!(alike.take_like(&asked), [0; 0]);
        assert_eq!(alike.take_like(&signature(&words(500, 100), 3)), [1]);
        assert_eq!(alike.take_like(&signature(&words(900, 100), 3)), [0; 0]);
    }
}

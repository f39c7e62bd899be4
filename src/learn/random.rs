//! A counter-based generator: every number is a pure function of (seed, stream, index), so that
//! results depend neither on the order of calls nor on threads, and resuming needs no state.
//!
//! The function is Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as
//! 1, 2, 3"), keyed by a BLAKE3 hash of seed and stream name.

use crate::digest::Digest;

const M0: u64 = 0xD251_1F53;
const M1: u64 = 0xCD9E_8D57;
const W0: u32 = 0x9E37_79B9;
const W1: u32 = 0xBB67_AE85;
const ROUNDS: usize = 10;

/// Words that [`Stream::group`] draws at once.
pub(crate) const GROUP: usize = 64;
const BLOCKS: usize = GROUP / 4;

/// One stream of random numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stream {
    key: [u32; 2],
    high: [u32; 2],
}

impl Stream {
    /// The stream of a name under a seed. Different names give independent streams.
    pub fn new(seed: u64, name: &str) -> Self {
        let mut bytes = seed.to_le_bytes().to_vec();
        bytes.extend_from_slice(name.as_bytes());
        let hex = Digest::of(&bytes).to_string();
        let word = |i: usize| u32::from_str_radix(&hex[8 * i..8 * i + 8], 16).unwrap_or_default();
        Self { key: [word(0), word(1)], high: [word(2), word(3)] }
    }

    /// The stream of a number under this one: a step, an epoch, a layer.
    #[must_use]
    pub fn at(&self, number: u64) -> Self {
        let [a, b, c, d] = philox(self.key, [number as u32, (number >> 32) as u32, !0, !0]);
        Self { key: [a, b], high: [c ^ self.high[0], d ^ self.high[1]] }
    }

    /// What it is made of, for a generator elsewhere: the key, and the upper half of the counter.
    pub(crate) fn words_of_state(&self) -> ([u32; 2], [u32; 2]) {
        (self.key, self.high)
    }

    /// Four words at an index.
    pub fn words(&self, index: u64) -> [u32; 4] {
        philox(self.key, [index as u32, (index >> 32) as u32, self.high[0], self.high[1]])
    }

    /// [`GROUP`] words at an index: first the first words of 16 blocks, then their second words,
    /// and so on, so that the blocks can be drawn side by side in vectors.
    #[inline(always)]
    pub(crate) fn group(&self, index: u64) -> [[u32; BLOCKS]; 4] {
        // Each word in the lower half of 64 bits, where the multiplication of vectors reads and
        // writes; what is above is left to be anything. Loops and no closures: an array's `map`
        // is compiled on its own, and then knows no wide vectors.
        const LOW: u64 = u32::MAX as u64;
        let (mut a, mut b) = ([0; BLOCKS], [0; BLOCKS]);
        for i in 0..BLOCKS {
            a[i] = index * BLOCKS as u64 + i as u64;
            b[i] = a[i] >> 32;
        }
        let (mut c, mut d) = ([u64::from(self.high[0]); BLOCKS], [u64::from(self.high[1]); BLOCKS]);
        let mut key = self.key;
        for _ in 0..ROUNDS {
            let (k0, k1) = (u64::from(key[0]), u64::from(key[1]));
            for i in 0..BLOCKS {
                let (p, q) = (M0 * (a[i] & LOW), M1 * (c[i] & LOW));
                (a[i], b[i], c[i], d[i]) = ((q >> 32) ^ b[i] ^ k0, q, (p >> 32) ^ d[i] ^ k1, p);
            }
            key = next(key);
        }
        let mut words = [[0; BLOCKS]; 4];
        for (words, from) in words.iter_mut().zip([a, b, c, d]) {
            for (word, from) in words.iter_mut().zip(from) {
                *word = from as u32;
            }
        }
        words
    }

    /// Uniform in [0, 1), with 53 random bits.
    pub fn uniform(&self, index: u64) -> f64 {
        let [a, b, _, _] = self.words(index);
        unit(a, b)
    }

    /// Normal with mean 0 and variance 1 (Box-Muller).
    pub fn normal(&self, index: u64) -> f64 {
        let [a, b, c, d] = self.words(index);
        let radius = (-2.0 * (1.0 - unit(a, b)).ln()).sqrt();
        radius * (std::f64::consts::TAU * unit(c, d)).cos()
    }

    /// Uniform in `0..n` (0 if `n` is 0).
    pub fn below(&self, index: u64, n: u64) -> u64 {
        let [a, b, _, _] = self.words(index);
        let bits = u128::from(a) << 32 | u128::from(b);
        ((bits * u128::from(n)) >> 64) as u64
    }

    /// A random order of `0..n` (Fisher-Yates).
    pub fn permutation(&self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        for i in (1..n).rev() {
            order.swap(i, self.below(i as u64, i as u64 + 1) as usize);
        }
        order
    }
}

fn unit(a: u32, b: u32) -> f64 {
    let bits = (u64::from(a) << 32 | u64::from(b)) >> 11;
    bits as f64 / (1u64 << 53) as f64
}

#[inline(always)]
fn next(key: [u32; 2]) -> [u32; 2] {
    [key[0].wrapping_add(W0), key[1].wrapping_add(W1)]
}

fn philox(mut key: [u32; 2], mut c: [u32; 4]) -> [u32; 4] {
    for _ in 0..ROUNDS {
        let (p0, p1) = (M0 * u64::from(c[0]), M1 * u64::from(c[2]));
        c = [
            (p1 >> 32) as u32 ^ c[1] ^ key[0],
            p1 as u32,
            (p0 >> 32) as u32 ^ c[3] ^ key[1],
            p0 as u32,
        ];
        key = next(key);
    }
    c
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers of Random123's `kat_vectors` for philox4x32-10.
    #[test]
    fn philox_known_answers() {
        let zero = philox([0; 2], [0; 4]);
        assert_eq!(zero, [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        let ones = philox([!0; 2], [!0; 4]);
        assert_eq!(ones, [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
    }

    #[test]
    fn a_group_is_its_blocks() {
        let s = Stream::new(3, "g");
        let group = s.group(5);
        let same = |block: usize| {
            let words = s.words((5 * BLOCKS + block) as u64);
            words == [0, 1, 2, 3].map(|w| group[w][block])
        };
        assert!((0..BLOCKS).all(same));
    }

    #[test]
    fn moments() {
        let s = Stream::new(7, "x");
        let n = 20_000;
        let (mut m, mut v, mut u) = (0.0, 0.0, 0.0);
        for i in 0..n {
            let x = s.normal(i);
            m += x;
            v += x * x;
            u += s.uniform(i);
        }
        let n = n as f64;
        assert!((m / n).abs() < 0.03 && (v / n - 1.0).abs() < 0.03 && (u / n - 0.5).abs() < 0.01);
    }

    #[test]
    fn streams_differ_and_repeat() {
        let a = Stream::new(1, "a").permutation(50);
        assert_eq!(a, Stream::new(1, "a").permutation(50));
        assert_ne!(a, Stream::new(1, "b").permutation(50));
        assert_ne!(a, Stream::new(2, "a").permutation(50));
        assert_ne!(a, Stream::new(1, "a").at(1).permutation(50));
        let mut sorted = a;
        sorted.sort_unstable();
        assert_eq!(sorted, (0..50).collect::<Vec<_>>());
    }
}

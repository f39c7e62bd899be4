//! Dropout. Which elements are kept is a function of seed, step and place; it is drawn in the
//! forward pass and kept for the backward pass as a bit an element, because to draw an element
//! costs more than to read it.

use std::hint::black_box;
use std::ops::Range;

use rayon::prelude::*;

use super::{Buffer, wide};
use crate::learn::random::{GROUP, Stream};

/// Elements of a word of bits.
const WORD: usize = 16;

/// Rows of a task.
const ROWS: usize = 16;

/// A dropout mask: elements are kept with probability `1 - p` and scaled by `1 / (1 - p)`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Mask {
    stream: Stream,
    threshold: u32,
    scale: f32,
}

impl Mask {
    /// None if nothing is dropped.
    pub(crate) fn new(stream: Stream, p: f64) -> Option<Self> {
        (p > 0.0).then(|| Self {
            stream,
            threshold: (p * 2f64.powi(32)) as u32,
            scale: if p < 1.0 { (1.0 / (1.0 - p)) as f32 } else { 0.0 },
        })
    }

    /// What it is made of, for a kernel elsewhere: the stream, the word from which an element is
    /// kept, and the factor on it.
    pub(crate) fn parts(&self) -> (Stream, u32, f32) {
        (self.stream, self.threshold, self.scale)
    }

    /// The mask of a numbered part.
    pub(crate) fn at(&self, part: u64) -> Self {
        Self { stream: self.stream.at(part), ..*self }
    }

    /// The factor on what is kept.
    pub(super) fn scale(&self) -> f32 {
        self.scale
    }

    /// A bit for each element of a group of the stream.
    #[inline(always)]
    fn group(&self, index: usize) -> u64 {
        let words = self.stream.group(index as u64);
        let mut all = 0;
        for (i, words) in words.iter().enumerate() {
            let mut bits = 0_u16;
            for (j, word) in words.iter().enumerate() {
                bits |= u16::from(*word >= self.threshold) << j;
            }
            all |= u64::from(bits) << (WORD * i);
        }
        all
    }

    /// Draws elements from `start` on: a bit for each that is kept, as many as there is room for.
    pub(super) fn draw(&self, start: usize, bits: &mut [u16]) {
        let (mut at, skipped) = (start / GROUP, start % GROUP);
        // Bits of the last group that is drawn which the words before have not taken.
        let left = (GROUP - skipped) % GROUP;
        wide!({
            let mut group = 0;
            if left > 0 {
                group = self.group(at);
                at += 1;
            }
            for words in bits.chunks_mut(GROUP / WORD) {
                let mut these = if left > 0 { group >> skipped } else { 0 };
                if words.len() * WORD > left {
                    group = self.group(at);
                    at += 1;
                    these |= group << left;
                }
                for (i, word) in words.iter_mut().enumerate() {
                    *word = (these >> (WORD * i)) as u16;
                }
            }
        });
    }

    /// Draws a matrix with `cols` columns: the rows with these numbers.
    pub(crate) fn of(&self, rows: impl IndexedParallelIterator<Item = usize>, cols: usize) -> Kept {
        let words = words(cols);
        let mut bits = Buffer::new(rows.len() * words);
        let each = bits.par_chunks_mut(words.max(1)).with_min_len(ROWS).zip(rows);
        each.for_each(|(bits, row)| self.draw(row * cols, bits));
        Kept { bits, cols, scale: self.scale }
    }
}

/// Words of bits for so many elements.
pub(super) fn words(elements: usize) -> usize {
    elements.div_ceil(WORD)
}

/// The factor on element `i` of a word.
#[inline(always)]
fn factor(word: u32, i: usize, scale: f32) -> f32 {
    if word & (1 << i) == 0 { 0.0 } else { scale }
}

/// `out = f(out, x)` of the elements of a word, with `x` times the mask. All are read before one
/// is written, and no word is seen together with the next, else the compiler makes vectors of
/// elements of different words, which it then has to gather.
#[inline(always)]
fn word_of(word: u16, scale: f32, x: &[f32], out: &mut [f32], f: impl Fn(f32, f32) -> f32) {
    let word = black_box(u32::from(word));
    let (mut from, mut to) = ([0.0; WORD], [0.0; WORD]);
    from.copy_from_slice(x);
    to.copy_from_slice(out);
    for i in 0..WORD {
        to[i] = f(to[i], from[i] * factor(word, i, scale));
    }
    out.copy_from_slice(&to);
}

/// Multiplies elements by the mask.
#[inline(always)]
pub(super) fn mask(bits: &[u16], scale: f32, x: &mut [f32]) {
    let last = bits.get(x.len() / WORD).copied().unwrap_or_default();
    let mut whole = x.chunks_exact_mut(WORD);
    for (x, word) in whole.by_ref().zip(bits) {
        let mut from = [0.0; WORD];
        from.copy_from_slice(x);
        word_of(*word, scale, &from, x, |_, x| x);
    }
    for (i, x) in whole.into_remainder().iter_mut().enumerate() {
        *x *= factor(u32::from(last), i, scale);
    }
}

/// `out = f(out, x)` with `x` times the mask.
#[inline(always)]
pub(super) fn masked(
    bits: &[u16],
    scale: f32,
    x: &[f32],
    out: &mut [f32],
    f: impl Fn(f32, f32) -> f32,
) {
    let last = bits.get(x.len() / WORD).copied().unwrap_or_default();
    let (whole, mut outs) = (x.chunks_exact(WORD), out.chunks_exact_mut(WORD));
    let rest = whole.remainder();
    for ((x, out), word) in whole.zip(outs.by_ref()).zip(bits) {
        word_of(*word, scale, x, out, &f);
    }
    for (i, (out, x)) in outs.into_remainder().iter_mut().zip(rest).enumerate() {
        *out = f(*out, *x * factor(u32::from(last), i, scale));
    }
}

/// What a mask keeps of a matrix.
#[derive(Debug)]
pub(crate) struct Kept {
    /// Row by row, [`words`] each.
    bits: Buffer<u16>,
    cols: usize,
    scale: f32,
}

impl Kept {
    /// Multiplies a row of the matrix by its mask.
    #[inline(always)]
    pub(super) fn mask_row(&self, row: usize, x: &mut [f32]) {
        mask(self.row(row), self.scale, x);
    }

    fn row(&self, row: usize) -> &[u16] {
        let words = words(self.cols);
        &self.bits[row * words..][..words]
    }

    /// Multiplies the matrix by the mask, in parallel.
    pub(crate) fn apply(&self, x: &mut [f32]) {
        let rows = x.par_chunks_exact_mut(self.cols.max(1)).with_min_len(ROWS).enumerate();
        rows.for_each(|(row, x)| wide!(self.mask_row(row, x)));
    }

    /// `out = mask * x` of some rows, on this thread.
    pub(crate) fn of_rows(&self, rows: Range<usize>, x: &[f32], out: &mut [f32]) {
        self.each(rows, x, out, |_, x| x);
    }

    /// `out += mask * x` of some rows, on this thread.
    pub(crate) fn add_rows(&self, rows: Range<usize>, x: &[f32], out: &mut [f32]) {
        self.each(rows, x, out, |out, x| out + x);
    }

    fn each(&self, rows: Range<usize>, x: &[f32], out: &mut [f32], f: impl Fn(f32, f32) -> f32) {
        let cols = self.cols.max(1);
        wide!({
            for ((row, x), out) in
                rows.clone().zip(x.chunks_exact(cols)).zip(out.chunks_exact_mut(cols))
            {
                masked(self.row(row), self.scale, x, out, &f);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(mask: Mask, rows: &[usize], cols: usize) -> Vec<f32> {
        let mut x = vec![1.0; rows.len() * cols];
        mask.of(rows.par_iter().copied(), cols).apply(&mut x);
        x
    }

    #[test]
    fn keeps_the_mean_and_repeats() {
        let mask = Mask::new(Stream::new(1, "d"), 0.25).unwrap();
        let rows: Vec<usize> = (0..1000).collect();
        let y = kept(mask, &rows, 53);
        let mean = y.iter().sum::<f32>() / y.len() as f32;
        assert!((mean - 1.0).abs() < 0.01, "{mean}");
        assert!(y.iter().all(|y| *y == 0.0 || (*y - 4.0 / 3.0).abs() < 1e-6));
        assert_eq!(y, kept(mask, &rows, 53));
        assert_ne!(y, kept(mask.at(1), &rows, 53));
        assert!(Mask::new(Stream::new(1, "d"), 0.0).is_none());
    }

    /// Each element is kept by its own word of the stream, wherever a row begins.
    #[test]
    fn bits_are_those_of_the_stream() {
        let stream = Stream::new(1, "d");
        let mask = Mask::new(stream, 0.5).unwrap();
        for cols in [1, 16, 17, 63, 64, 65, 100, 128, 200] {
            let rows = [0, 1, 4, 7];
            let y = kept(mask, &rows, cols);
            for (i, y) in y.iter().enumerate() {
                let element = rows[i / cols] * cols + i % cols;
                let words = stream.group((element / GROUP) as u64);
                let word = words.as_flattened()[element % GROUP];
                assert_eq!(*y > 0.0, word >= 1 << 31, "{cols} {i}");
            }
        }
    }

    #[test]
    fn some_rows_alone() {
        let kept = Mask::new(Stream::new(1, "d"), 0.5).unwrap().of((0..9).into_par_iter(), 37);
        let x: Vec<f32> = (0..9 * 37).map(|i| i as f32 + 1.0).collect();
        let mut whole = x.clone();
        kept.apply(&mut whole);
        let (some, mut out) = (3 * 37..7 * 37, vec![f32::NAN; 4 * 37]);
        kept.of_rows(3..7, &x[some.clone()], &mut out);
        assert_eq!(out, whole[some.clone()]);
        kept.add_rows(3..7, &x[some.clone()], &mut out);
        assert!(out.iter().zip(&whole[some]).all(|(out, x)| *out == 2.0 * x));
    }
}

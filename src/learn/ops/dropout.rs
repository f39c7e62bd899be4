//! Dropout whose mask is a function of seed, step and place, and is drawn again in the backward
//! pass.

use rayon::prelude::*;

use super::{TASK, wide};
use crate::learn::random::{GROUP, Stream};

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

    /// Multiplies elements `start..` by the mask.
    pub(crate) fn apply_from(&self, start: usize, data: &mut [f32]) {
        let (threshold, scale) = (self.threshold, self.scale);
        // Up to the next whole group, then group by group.
        let (at, skipped) = (start / GROUP, start % GROUP);
        let head = if skipped == 0 { 0 } else { (GROUP - skipped).min(data.len()) };
        let (head, rest) = data.split_at_mut(head);
        wide!({
            if !head.is_empty() {
                let bits = self.stream.group(at as u64);
                for (x, bits) in head.iter_mut().zip(&bits.as_flattened()[skipped..]) {
                    *x *= if *bits >= threshold { scale } else { 0.0 };
                }
            }
            let first = start.div_ceil(GROUP);
            for (i, group) in rest.chunks_mut(GROUP).enumerate() {
                let bits = self.stream.group((first + i) as u64);
                for (x, bits) in group.iter_mut().zip(bits.as_flattened()) {
                    *x *= if *bits >= threshold { scale } else { 0.0 };
                }
            }
        });
    }

    /// Multiplies by the mask, in parallel.
    pub(crate) fn apply_to(&self, data: &mut [f32]) {
        let tasks = data.par_chunks_mut(TASK).enumerate();
        tasks.for_each(|(i, part)| self.apply_from(i * TASK, part));
    }

    /// Multiplies these rows of a matrix, which are all that is there, by the mask of the matrix.
    pub(crate) fn apply_to_rows(&self, rows: &[u32], data: &mut [f32]) {
        let cols = data.len() / rows.len().max(1);
        let each = data.par_chunks_mut(cols.max(1)).with_min_len(16).zip(rows);
        each.for_each(|(row, i)| self.apply_from(*i as usize * cols, row));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_mean_and_repeats() {
        let mask = Mask::new(Stream::new(1, "d"), 0.25).unwrap();
        let n = 3 * TASK + 5;
        let apply = |mask: Mask, n| {
            let mut x = vec![1.0; n];
            mask.apply_to(&mut x);
            x
        };
        let y = apply(mask, n);
        let mean = y.iter().sum::<f32>() / n as f32;
        assert!((mean - 1.0).abs() < 0.01, "{mean}");
        assert!(y.iter().all(|y| *y == 0.0 || (*y - 4.0 / 3.0).abs() < 1e-6));
        assert_eq!(y, apply(mask, n));
        assert_ne!(y, apply(mask.at(1), n));
        assert!(Mask::new(Stream::new(1, "d"), 0.0).is_none());
    }

    #[test]
    fn a_part_is_masked_as_in_the_whole() {
        let mask = Mask::new(Stream::new(1, "d"), 0.5).unwrap();
        let mut whole = vec![1.0; 500];
        mask.apply_to(&mut whole);
        for (start, end) in [(0, 500), (1, 2), (63, 65), (64, 130), (70, 75), (100, 500)] {
            let mut part = vec![1.0; end - start];
            mask.apply_from(start, &mut part);
            assert_eq!(part, whole[start..end], "{start}..{end}");
        }
        let mut rows = vec![1.0; 200];
        mask.apply_to_rows(&[1, 4], &mut rows);
        assert_eq!(rows, [&whole[100..200], &whole[400..]].concat());
    }
}

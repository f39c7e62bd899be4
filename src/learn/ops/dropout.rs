//! Dropout whose mask is a function of seed, step and place, and is drawn again in the backward
//! pass.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::{TASK, slice, tensor, wide, with_slices};
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

    /// Multiplies elements `start..` by the mask; `start` is a multiple of [`GROUP`].
    pub(crate) fn apply_from(&self, start: usize, data: &mut [f32]) {
        let (threshold, scale) = (self.threshold, self.scale);
        wide!({
            for (i, group) in data.chunks_mut(GROUP).enumerate() {
                let bits = self.stream.group((start / GROUP + i) as u64);
                for (x, bits) in group.iter_mut().zip(bits.as_flattened()) {
                    *x *= if *bits >= threshold { scale } else { 0.0 };
                }
            }
        });
    }

    /// A masked copy.
    pub(crate) fn apply(&self, data: &[f32]) -> Vec<f32> {
        let mut out = data.to_vec();
        self.apply_to(&mut out);
        out
    }

    /// Multiplies by the mask, in parallel.
    pub(crate) fn apply_to(&self, data: &mut [f32]) {
        let tasks = data.par_chunks_mut(TASK).enumerate();
        tasks.for_each(|(i, part)| self.apply_from(i * TASK, part));
    }
}

struct Dropout(Mask);

impl CustomOp1 for Dropout {
    fn name(&self) -> &'static str {
        "dropout"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let out = self.0.apply(slice(storage, layout)?);
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let dx = with_slices([grad], |[g]| self.0.apply(g))?;
        tensor(dx, x.shape()).map(Some)
    }
}

/// Drops elements by a mask, if there is one.
pub(crate) fn dropout(x: &Tensor, mask: Option<Mask>) -> Result<Tensor> {
    match mask {
        Some(mask) => x.apply_op1(Dropout(mask)),
        None => Ok(x.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{check, normal};
    use super::*;

    #[test]
    fn keeps_the_mean_and_repeats() {
        let mask = Mask::new(Stream::new(1, "d"), 0.25).unwrap();
        let n = 3 * TASK + 5;
        let y = mask.apply(&vec![1.0; n]);
        let mean = y.iter().sum::<f32>() / n as f32;
        assert!((mean - 1.0).abs() < 0.01, "{mean}");
        assert!(y.iter().all(|y| *y == 0.0 || (*y - 4.0 / 3.0).abs() < 1e-6));
        assert_eq!(y, mask.apply(&vec![1.0; n]));
        assert_ne!(y, mask.at(1).apply(&vec![1.0; n]));
        assert!(Mask::new(Stream::new(1, "d"), 0.0).is_none());
    }

    #[test]
    fn gradients() {
        let mask = Mask::new(Stream::new(1, "d"), 0.5);
        check(&[normal("x", &[7, 13])], |a| dropout(&a[0], mask));
    }
}

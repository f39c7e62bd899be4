//! Rotary position embedding (Su et al. 2021) in the half-split form of Hugging Face's models.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::{matrix, slice, tensor, wide, with_slices};

/// Cosines and sines of the positions of a batch, `[tokens, head / 2]` each.
#[derive(Debug, Clone)]
pub(crate) struct RopeTable {
    half: usize,
    cos: Arc<[f32]>,
    sin: Arc<[f32]>,
}

impl RopeTable {
    /// From the angle per position of each pair of elements, and each token's position.
    pub(crate) fn new(inverse_frequencies: &[f32], positions: &[u32]) -> Self {
        let angles = positions.iter().flat_map(|p| {
            let p = *p as f32;
            inverse_frequencies.iter().map(move |f| p * f)
        });
        let angles: Vec<f32> = angles.collect();
        Self {
            half: inverse_frequencies.len(),
            cos: angles.iter().map(|a| a.cos()).collect(),
            sin: angles.iter().map(|a| a.sin()).collect(),
        }
    }

    /// `[tokens, head / 2]`.
    pub(crate) fn cosines(&self) -> &[f32] {
        &self.cos
    }

    /// `[tokens, head / 2]`.
    pub(crate) fn sines(&self) -> &[f32] {
        &self.sin
    }

    /// Rotates every head of every token, forwards or (sign -1) back.
    fn rotate(&self, x: &[f32], width: usize, sign: f32) -> Vec<f32> {
        let half = self.half;
        let mut out = vec![0.0; x.len()];
        out.par_chunks_mut(width).zip(x.par_chunks(width)).enumerate().for_each(|(t, (out, x))| {
            let (cos, sin) = (&self.cos[t * half..][..half], &self.sin[t * half..][..half]);
            wide!({
                for (out, x) in out.chunks_exact_mut(2 * half).zip(x.chunks_exact(2 * half)) {
                    let ((a, b), (out_a, out_b)) = (x.split_at(half), out.split_at_mut(half));
                    let turned = out_a.iter_mut().zip(out_b).zip(a.iter().zip(b));
                    for (((out_a, out_b), (a, b)), (c, s)) in turned.zip(cos.iter().zip(sin)) {
                        let s = sign * s;
                        *out_a = a * c - b * s;
                        *out_b = b * c + a * s;
                    }
                }
            });
        });
        out
    }
}

struct Rope(RopeTable);

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, width) = matrix(layout.shape());
        if rows * self.0.half != self.0.cos.len() || !width.is_multiple_of(2 * self.0.half) {
            bail!("rope for heads of {} on {:?}", 2 * self.0.half, layout.dims());
        }
        let out = self.0.rotate(slice(storage, layout)?, width, 1.0);
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (_, width) = matrix(x.shape());
        let dx = with_slices([grad], |[g]| self.0.rotate(g, width, -1.0))?;
        tensor(dx, x.shape()).map(Some)
    }
}

/// Rotates each head of `[tokens, heads * head]`.
pub(crate) fn rope(x: &Tensor, table: &RopeTable) -> Result<Tensor> {
    x.apply_op1(Rope(table.clone()))
}

#[cfg(test)]
mod tests {
    use super::super::tests::{check, normal};
    use super::*;

    #[test]
    fn gradients() {
        let table = RopeTable::new(&[1.0, 0.3, 0.01], &[0, 1, 2, 0, 1]);
        check(&[normal("x", &[5, 18])], |a| rope(&a[0], &table));
        assert!(rope(&normal("x", &[5, 16]), &table).is_err());
        assert!(rope(&normal("x", &[4, 18]), &table).is_err());
    }

    #[test]
    fn keeps_lengths_and_position_zero() {
        let table = RopeTable::new(&[1.0, 0.3], &[0, 7]);
        let x = normal("x", &[2, 4]);
        let (x, y) = (x.to_vec2::<f32>().unwrap(), rope(&x, &table).unwrap());
        let y = y.to_vec2::<f32>().unwrap();
        assert_eq!(x[0], y[0]);
        let norm = |v: &[f32]| v.iter().map(|x| x * x).sum::<f32>();
        assert!((norm(&x[1]) - norm(&y[1])).abs() < 1e-5);
    }
}

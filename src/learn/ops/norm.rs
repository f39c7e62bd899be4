//! Layer norm (Ba et al. 2016) and root-mean-square norm (Zhang and Sennrich 2019), over the last
//! size.

use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::{dot, matrix, slice, sum, sum3, tensor, wide, with_slices};
use crate::learn::matrix::{add_all, chunks, sum_rows};

struct LayerNorm {
    eps: f32,
}

/// Mean and 1 / standard deviation of a row.
#[inline(always)]
fn moments(row: &[f32], eps: f32) -> (f32, f32) {
    let n = row.len() as f32;
    let mean = sum(row, |x| x) / n;
    let variance = sum(row, |x| (x - mean) * (x - mean)) / n;
    (mean, 1.0 / (variance + eps).sqrt())
}

/// 1 / root mean square of a row.
#[inline(always)]
fn inverse_rms(row: &[f32], eps: f32) -> f32 {
    let square = sum(row, |x| x * x) / row.len() as f32;
    1.0 / (square + eps).sqrt()
}

impl CustomOp3 for LayerNorm {
    fn name(&self) -> &'static str {
        "layer-norm"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, w, b) = (slice(s1, l1)?, slice(s2, l2)?, slice(s3, l3)?);
        let (_, d) = matrix(l1.shape());
        if w.len() != d || b.len() != d {
            bail!("layer norm of {d} with weights of {} and {}", w.len(), b.len());
        }
        let mut out = vec![0.0; x.len()];
        out.par_chunks_mut(d).with_min_len(16).zip(x.par_chunks(d)).for_each(|(out, x)| {
            wide!({
                let (mean, inverse) = moments(x, self.eps);
                for ((o, x), (w, b)) in out.iter_mut().zip(x).zip(w.iter().zip(b)) {
                    *o = (x - mean) * inverse * w + b;
                }
            });
        });
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (rows, d) = matrix(x.shape());
        let (to_x, to_w, to_b) = (x.track_op(), w.track_op(), b.track_op());
        let (dx, dw, db) = with_slices([x, w, grad], |[x, w, g]| {
            let dx = to_x.then(|| {
                let mut dx = vec![0.0; x.len()];
                let rows = x.par_chunks(d).zip(g.par_chunks(d));
                dx.par_chunks_mut(d).with_min_len(16).zip(rows).for_each(|(dx, (x, g))| {
                    wide!({
                        let (mean, inverse) = moments(x, self.eps);
                        let n = d as f32;
                        let m1 = dot(g, w) / n;
                        let m2 = sum3(x, g, w, |x, g, w| g * w * ((x - mean) * inverse)) / n;
                        for ((o, x), (g, w)) in dx.iter_mut().zip(x).zip(g.iter().zip(w)) {
                            *o = inverse * (g * w - m1 - (x - mean) * inverse * m2);
                        }
                    });
                });
                dx
            });
            let dw = to_w.then(|| {
                weight_gradient(rows, d, |i, sum| {
                    let (x, g) = (&x[i * d..][..d], &g[i * d..][..d]);
                    let (mean, inverse) = moments(x, self.eps);
                    for ((s, x), g) in sum.iter_mut().zip(x).zip(g) {
                        *s += g * (x - mean) * inverse;
                    }
                })
            });
            (dx, dw, to_b.then(|| sum_rows(g, d)))
        })?;
        Ok((
            dx.map(|v| tensor(v, x.shape())).transpose()?,
            dw.map(|v| tensor(v, w.shape())).transpose()?,
            db.map(|v| tensor(v, b.shape())).transpose()?,
        ))
    }
}

/// Sums what `add` adds for each row, in a fixed order.
fn weight_gradient(rows: usize, d: usize, add: impl Fn(usize, &mut [f32]) + Sync) -> Vec<f32> {
    let partial = chunks(rows).map(|rows| {
        let mut sum = vec![0.0; d];
        rows.for_each(|i| add(i, &mut sum));
        sum
    });
    add_all(partial.collect(), d)
}

struct RmsNorm {
    eps: f32,
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, w) = (slice(s1, l1)?, slice(s2, l2)?);
        let d = w.len();
        // Narrower than the last size where a norm acts on each head (Qwen3).
        if d == 0 || !matrix(l1.shape()).1.is_multiple_of(d) {
            bail!("rms norm of {:?} with weights of {d}", l1.dims());
        }
        let mut out = vec![0.0; x.len()];
        out.par_chunks_mut(d).with_min_len(16).zip(x.par_chunks(d)).for_each(|(out, x)| {
            wide!({
                let inverse = inverse_rms(x, self.eps);
                for ((o, x), w) in out.iter_mut().zip(x).zip(w) {
                    *o = x * inverse * w;
                }
            });
        });
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let d = w.elem_count();
        let rows = x.elem_count() / d;
        let (to_x, to_w) = (x.track_op(), w.track_op());
        let (dx, dw) = with_slices([x, w, grad], |[x, w, g]| {
            let dx = to_x.then(|| {
                let mut dx = vec![0.0; x.len()];
                let rows = x.par_chunks(d).zip(g.par_chunks(d));
                dx.par_chunks_mut(d).with_min_len(16).zip(rows).for_each(|(dx, (x, g))| {
                    wide!({
                        let inverse = inverse_rms(x, self.eps);
                        let dot = sum3(x, g, w, |x, g, w| g * w * x);
                        let c = dot / d as f32 * inverse * inverse;
                        for ((o, x), (g, w)) in dx.iter_mut().zip(x).zip(g.iter().zip(w)) {
                            *o = inverse * (g * w - c * x);
                        }
                    });
                });
                dx
            });
            let dw = to_w.then(|| {
                weight_gradient(rows, d, |i, sum| {
                    let (x, g) = (&x[i * d..][..d], &g[i * d..][..d]);
                    let inverse = inverse_rms(x, self.eps);
                    for ((s, x), g) in sum.iter_mut().zip(x).zip(g) {
                        *s += g * x * inverse;
                    }
                })
            });
            (dx, dw)
        })?;
        Ok((
            dx.map(|v| tensor(v, x.shape())).transpose()?,
            dw.map(|v| tensor(v, w.shape())).transpose()?,
        ))
    }
}

/// `(x - mean) / sqrt(variance + eps) * w + b` over the last size.
pub(crate) fn layer_norm(x: &Tensor, w: &Tensor, b: &Tensor, eps: f64) -> Result<Tensor> {
    x.apply_op3(w, b, LayerNorm { eps: eps as f32 })
}

/// `x / sqrt(mean square + eps) * w` over the last size, or over each part of it as long as `w`.
pub(crate) fn rms_norm(x: &Tensor, w: &Tensor, eps: f64) -> Result<Tensor> {
    x.apply_op2(w, RmsNorm { eps: eps as f32 })
}

#[cfg(test)]
mod tests {
    use super::super::tests::{check, normal};
    use super::*;

    #[test]
    fn layer_norm_gradients() {
        let args = [normal("x", &[67, 5]), normal("w", &[5]), normal("b", &[5])];
        check(&args, |a| layer_norm(&a[0], &a[1], &a[2], 1e-5));
    }

    #[test]
    fn rms_norm_gradients() {
        check(&[normal("x", &[67, 5]), normal("w", &[5])], |a| rms_norm(&a[0], &a[1], 1e-5));
        check(&[normal("x", &[3, 14]), normal("w", &[7])], |a| rms_norm(&a[0], &a[1], 1e-5));
    }

    #[test]
    fn refuses_other_widths() {
        let (x, w) = (normal("x", &[3, 5]), normal("w", &[4]));
        assert!(layer_norm(&x, &w, &w, 1e-5).is_err() && rms_norm(&x, &w, 1e-5).is_err());
    }
}

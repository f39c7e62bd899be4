//! Layer norm (Ba et al. 2016) and root-mean-square norm (Zhang and Sennrich 2019), over rows as
//! wide as their weights.

use rayon::prelude::*;

use super::{Kept, dot, sum, sum3, wide};
use crate::learn::matrix::{add_all, chunks};

/// Rows that one task takes at least.
const ROWS: usize = 16;

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

#[inline(always)]
fn normalize(x: &[f32], w: &[f32], b: &[f32], eps: f32, out: &mut [f32]) {
    let (mean, inverse) = moments(x, eps);
    for ((o, x), (w, b)) in out.iter_mut().zip(x).zip(w.iter().zip(b)) {
        *o = (x - mean) * inverse * w + b;
    }
}

/// `out = (x - mean) / sqrt(variance + eps) * w + b` for each row.
pub(crate) fn layer_norm(x: &[f32], w: &[f32], b: &[f32], eps: f32, out: &mut [f32]) {
    let d = w.len();
    out.par_chunks_mut(d).with_min_len(ROWS).zip(x.par_chunks(d)).for_each(|(out, x)| {
        wide!(normalize(x, w, b, eps, out));
    });
}

/// `sum += x` after dropout of `sum`, and the [`layer_norm`] of that.
pub(crate) fn add_layer_norm(
    (sum, x): (&mut [f32], &[f32]),
    kept: Option<&Kept>,
    w: &[f32],
    b: &[f32],
    eps: f32,
    out: &mut [f32],
) {
    let d = w.len();
    let rows = sum.par_chunks_mut(d).zip(x.par_chunks(d));
    out.par_chunks_mut(d).with_min_len(ROWS).zip(rows).enumerate().for_each(|(i, (out, rows))| {
        let (sum, x) = rows;
        wide!({
            if let Some(kept) = kept {
                kept.mask_row(i, sum);
            }
            for (s, x) in sum.iter_mut().zip(x) {
                *s += x;
            }
            normalize(sum, w, b, eps, out);
        });
    });
}

/// Makes the gradient of [`layer_norm`]'s result that of `x`.
pub(crate) fn layer_norm_backward(x: &[f32], w: &[f32], eps: f32, grad: &mut [f32]) {
    let (d, n) = (w.len(), w.len() as f32);
    grad.par_chunks_mut(d).with_min_len(ROWS).zip(x.par_chunks(d)).for_each(|(grad, x)| {
        wide!({
            let (mean, inverse) = moments(x, eps);
            let m1 = dot(grad, w) / n;
            let m2 = sum3(x, grad, w, |x, g, w| g * w * ((x - mean) * inverse)) / n;
            for (g, (x, w)) in grad.iter_mut().zip(x.iter().zip(w)) {
                *g = inverse * (*g * w - m1 - (x - mean) * inverse * m2);
            }
        });
    });
}

/// The gradient of [`layer_norm`]'s weight. That of its bias is the sum of the rows.
pub(crate) fn layer_norm_weight(x: &[f32], d: usize, eps: f32, grad: &[f32]) -> Vec<f32> {
    weight_gradient(x, d, grad, |x, g, sum| {
        let (mean, inverse) = moments(x, eps);
        for ((s, x), g) in sum.iter_mut().zip(x).zip(g) {
            *s += g * (x - mean) * inverse;
        }
    })
}

/// Sums what `add` adds for each row, in a fixed order.
fn weight_gradient(
    x: &[f32],
    d: usize,
    grad: &[f32],
    add: impl Fn(&[f32], &[f32], &mut [f32]) + Sync,
) -> Vec<f32> {
    let partial = chunks(x.len() / d).map(|rows| {
        let mut sum = vec![0.0; d];
        wide!(rows.clone().for_each(|i| add(&x[i * d..][..d], &grad[i * d..][..d], &mut sum)));
        sum
    });
    add_all(partial.collect(), d)
}

/// `out = x / sqrt(mean square + eps) * w` for each row. A row may be one head of a token (Qwen3).
pub(crate) fn rms_norm(x: &[f32], w: &[f32], eps: f32, out: &mut [f32]) {
    let d = w.len();
    out.par_chunks_mut(d).with_min_len(ROWS).zip(x.par_chunks(d)).for_each(|(out, x)| {
        wide!({
            let inverse = inverse_rms(x, eps);
            for ((o, x), w) in out.iter_mut().zip(x).zip(w) {
                *o = x * inverse * w;
            }
        });
    });
}

/// Makes the gradient of [`rms_norm`]'s result that of `x`.
pub(crate) fn rms_norm_backward(x: &[f32], w: &[f32], eps: f32, grad: &mut [f32]) {
    let d = w.len();
    grad.par_chunks_mut(d).with_min_len(ROWS).zip(x.par_chunks(d)).for_each(|(grad, x)| {
        wide!({
            let inverse = inverse_rms(x, eps);
            let dot = sum3(x, grad, w, |x, g, w| g * w * x);
            let c = dot / d as f32 * inverse * inverse;
            for (g, (x, w)) in grad.iter_mut().zip(x.iter().zip(w)) {
                *g = inverse * (*g * w - c * x);
            }
        });
    });
}

/// The gradient of [`rms_norm`]'s weight.
pub(crate) fn rms_norm_weight(x: &[f32], d: usize, eps: f32, grad: &[f32]) -> Vec<f32> {
    weight_gradient(x, d, grad, |x, g, sum| {
        let inverse = inverse_rms(x, eps);
        for ((s, x), g) in sum.iter_mut().zip(x).zip(g) {
            *s += g * x * inverse;
        }
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::{check, normal};
    use super::*;
    use crate::learn::matrix::sum_rows;
    use crate::learn::ops::Mask;
    use crate::learn::random::Stream;

    const EPS: f32 = 1e-5;

    #[test]
    fn layer_norm_gradients() {
        let (x, w, b) = (normal("x", 67 * 5), normal("w", 5), normal("b", 5));
        let forward = |a: &[&[f32]]| {
            let mut out = vec![0.0; a[0].len()];
            layer_norm(a[0], a[1], a[2], EPS, &mut out);
            out
        };
        check(&[&x, &w, &b], forward, |a, g| {
            let mut dx = g.to_vec();
            layer_norm_backward(a[0], a[1], EPS, &mut dx);
            vec![dx, layer_norm_weight(a[0], 5, EPS, g), sum_rows(g, 5)]
        });
    }

    #[test]
    fn the_norm_of_a_sum() {
        let (x, y, w, b) = (normal("x", 35), normal("y", 35), normal("w", 5), normal("b", 5));
        let kept = Mask::new(Stream::new(1, "n"), 0.5).unwrap().of((0..7).into_par_iter(), 5);
        for kept in [None, Some(&kept)] {
            let (mut sum, mut out, mut want) = (x.clone(), vec![0.0; 35], vec![0.0; 35]);
            add_layer_norm((&mut sum, &y), kept, &w, &b, EPS, &mut out);
            let mut dropped = x.clone();
            kept.iter().for_each(|kept| kept.apply(&mut dropped));
            let plain: Vec<f32> = dropped.iter().zip(&y).map(|(x, y)| x + y).collect();
            layer_norm(&plain, &w, &b, EPS, &mut want);
            assert_eq!((sum, out), (plain, want));
        }
    }

    #[test]
    fn rms_norm_gradients() {
        for (n, d) in [(67 * 5, 5), (3 * 14, 7)] {
            let (x, w) = (normal("x", n), normal("w", d));
            let forward = |a: &[&[f32]]| {
                let mut out = vec![0.0; n];
                rms_norm(a[0], a[1], EPS, &mut out);
                out
            };
            check(&[&x, &w], forward, |a, g| {
                let mut dx = g.to_vec();
                rms_norm_backward(a[0], a[1], EPS, &mut dx);
                vec![dx, rms_norm_weight(a[0], d, EPS, g)]
            });
        }
    }
}

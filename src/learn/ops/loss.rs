//! Cross-entropy with its gradient, from logits.

use anyhow::{Result, ensure};
use candle_core::Tensor;
use rayon::prelude::*;

use super::{exp, matrix, max, sum, tensor, wide, with_slices};

/// log-sum-exp of a row.
fn log_sum_exp(row: &[f32]) -> f64 {
    // In blocks, so that a sum over a large vocabulary keeps its digits.
    const BLOCK: usize = 1024;
    let max = wide!(max(row));
    let blocks = row.chunks(BLOCK).map(|x| f64::from(wide!(sum(x, |x| exp(x - max)))));
    f64::from(max) + blocks.sum::<f64>().ln()
}

fn checked(logits: &Tensor, targets: &[u32]) -> Result<usize> {
    let (rows, classes) = matrix(logits.shape());
    ensure!(rows == targets.len(), "{rows} rows of logits for {} targets", targets.len());
    if let Some(target) = targets.iter().find(|t| **t as usize >= classes) {
        anyhow::bail!("label {target} is outside the {classes} classes of the model");
    }
    Ok(classes)
}

/// Log-probability of each row's target. `logits` is `[rows, classes]`.
///
/// # Errors
/// When a target is not a class.
pub(crate) fn log_probs(logits: &Tensor, targets: &[u32]) -> Result<Vec<f64>> {
    let classes = checked(logits, targets)?;
    Ok(with_slices([logits], |[x]| {
        let rows = x.par_chunks(classes).zip(targets);
        rows.map(|(row, t)| f64::from(row[*t as usize]) - log_sum_exp(row)).collect()
    })?)
}

/// The sum of the cross-entropies of the rows, and the gradient of that sum times `scale`.
///
/// # Errors
/// When a target is not a class.
pub(crate) fn cross_entropy(logits: &Tensor, targets: &[u32], scale: f64) -> Result<(f64, Tensor)> {
    let classes = checked(logits, targets)?;
    let (losses, grad) = with_slices([logits], |[x]| {
        let mut grad = vec![0.0; x.len()];
        let rows = grad.par_chunks_mut(classes).zip(x.par_chunks(classes)).zip(targets);
        let losses: Vec<f64> = rows
            .map(|((grad, row), t)| {
                let (target, lse) = (*t as usize, log_sum_exp(row));
                // The difference in f32: it is small where the exponential is not.
                let (high, scale32) = (lse as f32, scale as f32);
                let low = (lse - f64::from(high)) as f32;
                wide!({
                    for (g, x) in grad.iter_mut().zip(row) {
                        *g = exp((x - high) - low) * scale32;
                    }
                });
                let p = (f64::from(row[target]) - lse).exp();
                grad[target] = ((p - 1.0) * scale) as f32;
                lse - f64::from(row[target])
            })
            .collect();
        (losses, grad)
    })?;
    Ok((losses.iter().sum(), tensor(grad, logits.shape())?))
}

#[cfg(test)]
mod tests {
    use super::super::tests::normal;
    use super::*;

    #[test]
    fn gradient_is_the_difference_quotient() {
        let (x, targets) = (normal("x", &[5, 7]), [0, 6, 3, 3, 1]);
        let (loss, grad) = cross_entropy(&x, &targets, 0.5).unwrap();
        let by_row = log_probs(&x, &targets).unwrap();
        assert!((loss + by_row.iter().sum::<f64>()).abs() < 1e-9);
        let (data, grad) = (x.to_vec2::<f32>().unwrap().concat(), grad.to_vec2::<f32>().unwrap());
        for (i, grad) in grad.concat().into_iter().enumerate() {
            let at = |by: f32| {
                let mut moved = data.clone();
                moved[i] += by;
                cross_entropy(&tensor(moved, (5, 7)).unwrap(), &targets, 1.0).unwrap().0
            };
            let numeric = 0.5 * (at(1e-2) - at(-1e-2)) / 2e-2;
            assert!((numeric - f64::from(grad)).abs() < 1e-4, "{numeric} {grad}");
        }
    }

    #[test]
    fn far_logits_are_finite() {
        let x = tensor(vec![1e4, -1e4, 0.0], (1, 3)).unwrap();
        let (loss, grad) = cross_entropy(&x, &[1], 1.0).unwrap();
        assert!((loss - 2e4).abs() < 1.0, "{loss}");
        assert_eq!(grad.to_vec2::<f32>().unwrap()[0], [1.0, -1.0, 0.0]);
        assert!(cross_entropy(&x, &[3], 1.0).is_err());
        assert!(cross_entropy(&x, &[1, 1], 1.0).is_err());
    }

    #[test]
    fn logits_that_are_no_numbers_are_not_scored() {
        for bad in [f32::NAN, f32::INFINITY] {
            let x = tensor(vec![0.0, bad, 1.0], (1, 3)).unwrap();
            assert!(!log_probs(&x, &[2]).unwrap()[0].is_finite(), "{bad}");
            assert!(!cross_entropy(&x, &[2], 1.0).unwrap().0.is_finite(), "{bad}");
        }
    }
}

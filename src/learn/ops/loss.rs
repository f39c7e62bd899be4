//! Cross-entropy with its gradient, from logits.

use anyhow::{Result, ensure};
use rayon::prelude::*;

use super::{exp, max, sum, wide};

/// log-sum-exp of a row.
fn log_sum_exp(row: &[f32]) -> f64 {
    // In blocks, so that a sum over a large vocabulary keeps its digits.
    const BLOCK: usize = 1024;
    let max = wide!(max(row));
    let blocks = row.chunks(BLOCK).map(|x| f64::from(wide!(sum(x, |x| exp(x - max)))));
    f64::from(max) + blocks.sum::<f64>().ln()
}

fn checked(logits: &[f32], classes: usize, targets: &[u32]) -> Result<()> {
    let rows = logits.len() / classes.max(1);
    ensure!(rows == targets.len(), "{rows} rows of logits for {} targets", targets.len());
    if let Some(target) = targets.iter().find(|t| **t as usize >= classes) {
        anyhow::bail!("label {target} is outside the {classes} classes of the model");
    }
    Ok(())
}

/// Log-probability of each row's target. `logits` is `[rows, classes]`.
///
/// # Errors
/// When a target is not a class.
pub(crate) fn log_probs(logits: &[f32], classes: usize, targets: &[u32]) -> Result<Vec<f64>> {
    checked(logits, classes, targets)?;
    let rows = logits.par_chunks(classes).zip(targets);
    Ok(rows.map(|(row, t)| f64::from(row[*t as usize]) - log_sum_exp(row)).collect())
}

/// The sum of the cross-entropies of the rows; makes the logits the gradient of that sum times
/// `scale`.
///
/// # Errors
/// When a target is not a class.
pub(crate) fn cross_entropy(
    logits: &mut [f32],
    classes: usize,
    targets: &[u32],
    scale: f64,
) -> Result<f64> {
    checked(logits, classes, targets)?;
    let losses = logits.par_chunks_mut(classes).zip(targets).map(|(row, t)| {
        let (target, lse) = (*t as usize, log_sum_exp(row));
        let loss = lse - f64::from(row[target]);
        // The difference in f32: it is small where the exponential is not.
        let (high, scale32) = (lse as f32, scale as f32);
        let low = (lse - f64::from(high)) as f32;
        wide!({
            for x in row.iter_mut() {
                *x = exp((*x - high) - low) * scale32;
            }
        });
        row[target] = (((-loss).exp() - 1.0) * scale) as f32;
        loss
    });
    Ok(losses.collect::<Vec<f64>>().iter().sum())
}

#[cfg(test)]
mod tests {
    use super::super::tests::normal;
    use super::*;

    #[test]
    fn gradient_is_the_difference_quotient() {
        let (data, targets) = (normal("x", 35), [0, 6, 3, 3, 1]);
        let mut grad = data.clone();
        let loss = cross_entropy(&mut grad, 7, &targets, 0.5).unwrap();
        let by_row = log_probs(&data, 7, &targets).unwrap();
        assert!((loss + by_row.iter().sum::<f64>()).abs() < 1e-9);
        for (i, grad) in grad.into_iter().enumerate() {
            let at = |by: f32| {
                let mut moved = data.clone();
                moved[i] += by;
                cross_entropy(&mut moved, 7, &targets, 1.0).unwrap()
            };
            let numeric = 0.5 * (at(1e-2) - at(-1e-2)) / 2e-2;
            assert!((numeric - f64::from(grad)).abs() < 1e-4, "{numeric} {grad}");
        }
    }

    #[test]
    fn far_logits_are_finite() {
        let mut x = [1e4, -1e4, 0.0];
        assert!(cross_entropy(&mut x, 3, &[3], 1.0).is_err());
        assert!(cross_entropy(&mut x, 3, &[1, 1], 1.0).is_err());
        let loss = cross_entropy(&mut x, 3, &[1], 1.0).unwrap();
        assert!((loss - 2e4).abs() < 1.0, "{loss}");
        assert_eq!(x, [1.0, -1.0, 0.0]);
    }

    #[test]
    fn logits_that_are_no_numbers_are_not_scored() {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut x = [0.0, bad, 1.0];
            assert!(!log_probs(&x, 3, &[2]).unwrap()[0].is_finite(), "{bad}");
            assert!(!cross_entropy(&mut x, 3, &[2], 1.0).unwrap().is_finite(), "{bad}");
        }
    }
}

//! Rotary position embedding (Su et al. 2021) in the half-split form of Hugging Face's models.

use std::sync::Arc;

use rayon::prelude::*;

use super::wide;

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

    /// Rotates every head of `[tokens, width]`, or of the `rows` of it that there are, in place:
    /// forwards, or back as gradients go.
    pub(crate) fn rotate(&self, x: &mut [f32], width: usize, rows: Option<&[u32]>, turn: Turn) {
        let half = self.half;
        let sign = if turn == Turn::Forwards { 1.0 } else { -1.0 };
        x.par_chunks_mut(width).with_min_len(16).enumerate().for_each(|(i, x)| {
            let t = rows.map_or(i, |rows| rows[i] as usize);
            let (cos, sin) = (&self.cos[t * half..][..half], &self.sin[t * half..][..half]);
            wide!({
                for x in x.chunks_exact_mut(2 * half) {
                    let (a, b) = x.split_at_mut(half);
                    for ((a, b), (c, s)) in a.iter_mut().zip(b).zip(cos.iter().zip(sin)) {
                        let s = sign * s;
                        (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
                    }
                }
            });
        });
    }
}

/// Which way a rotation goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    /// As the position says.
    Forwards,
    /// Against it.
    Back,
}

#[cfg(test)]
mod tests {
    use super::super::tests::{check, normal};
    use super::*;

    #[test]
    fn gradients() {
        let table = RopeTable::new(&[1.0, 0.3, 0.01], &[0, 1, 2, 0, 1]);
        let turned = |x: &[f32], turn| {
            let mut x = x.to_vec();
            table.rotate(&mut x, 18, None, turn);
            x
        };
        let x = normal("x", 5 * 18);
        check(&[&x], |a| turned(a[0], Turn::Forwards), |_, g| vec![turned(g, Turn::Back)]);
    }

    #[test]
    fn keeps_lengths_and_position_zero() {
        let table = RopeTable::new(&[1.0, 0.3], &[0, 7]);
        let x = normal("x", 8);
        let mut y = x.clone();
        table.rotate(&mut y, 4, None, Turn::Forwards);
        assert_eq!(x[..4], y[..4]);
        let norm = |v: &[f32]| v.iter().map(|x| x * x).sum::<f32>();
        assert!((norm(&x[4..]) - norm(&y[4..])).abs() < 1e-5);
        let mut second = x[4..].to_vec();
        table.rotate(&mut second, 4, Some(&[1]), Turn::Forwards);
        assert_eq!(second, y[4..]);
    }
}

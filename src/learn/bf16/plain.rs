//! Where there are no tiles: operands rounded to bf16, products in f32.

use half::bf16;
use rayon::prelude::*;

use super::{Block, Packed};
use crate::learn::matrix::{self, Matrix, Threads};
use crate::learn::ops::wide;

/// Columns of the product at a time; bounds the f32 copy of the right-hand side. Fixed, so that
/// sums do not depend on the number of threads.
const COLS: usize = 512;
/// Elements of a task.
const TASK: usize = 1 << 14;

/// Rounds `x` times `scale` row by row into `out`. The columns of `x` must be contiguous.
pub(super) fn round(x: Matrix<'_>, scale: f32, out: &mut [u16], threads: Threads) {
    let ((_, cols), (stride, _)) = (x.size(), x.strides());
    let round = |(i, out): (usize, &mut [u16])| {
        for (x, out) in x.data()[i * stride..].iter().zip(out) {
            *out = bf16::from_f32(x * scale).to_bits();
        }
    };
    match threads {
        Threads::One => out.chunks_mut(cols.max(1)).enumerate().for_each(round),
        Threads::All => out.par_chunks_mut(cols.max(1)).enumerate().for_each(round),
    }
}

/// In f32.
pub(super) fn widen(x: &[u16], out: &mut [f32]) {
    wide!({
        for (x, out) in x.iter().zip(out.iter_mut()) {
            *out = f32::from_bits(u32::from(*x) << 16);
        }
    });
}

/// Elements `cols` of every row of a row-major matrix with `width` elements a row, in f32.
fn part(x: &[u16], width: usize, cols: std::ops::Range<usize>, threads: Threads) -> Vec<f32> {
    let rows = x.len() / width.max(1);
    let mut out = vec![0.0; rows * cols.len()];
    let some = (TASK / cols.len().max(1)).max(1);
    let fill = |(x, out): (&[u16], &mut [f32])| {
        for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(cols.len())) {
            widen(&x[cols.clone()], out);
        }
    };
    let (of_x, of_out) = ((some * width).max(1), (some * cols.len()).max(1));
    match threads {
        Threads::One => x.chunks(of_x).zip(out.chunks_mut(of_out)).for_each(fill),
        Threads::All => x.par_chunks(of_x).zip(out.par_chunks_mut(of_out)).for_each(fill),
    }
    out
}

/// `out = beta * out + bias + ` the sum over the terms of lhs times rhs.
pub(super) fn product(
    mut out: Block<'_>,
    beta: bool,
    bias: Option<&[f32]>,
    terms: &[(&Packed, &Packed)],
    threads: Threads,
) {
    let (rows, cols) = out.size;
    for i in 0..rows {
        let row = out.row(i);
        match (beta, bias) {
            (false, None) => row.fill(0.0),
            (false, Some(bias)) => row.copy_from_slice(bias),
            (true, None) => {}
            (true, Some(bias)) => row.iter_mut().zip(bias).for_each(|(x, b)| *x += b),
        }
    }
    for (lhs, rhs) in terms {
        let width = if lhs.flipped() { rows } else { lhs.k() };
        let left = part(lhs.data(), width, 0..width, threads);
        let left = if lhs.flipped() {
            Matrix::new(&left, lhs.k(), rows).t()
        } else {
            Matrix::new(&left, rows, lhs.k())
        };
        let k = rhs.k();
        for first in (0..cols).step_by(COLS) {
            let some = first..(first + COLS).min(cols);
            let right;
            let rhs = if rhs.flipped() {
                right = part(rhs.data(), cols, some.clone(), threads);
                Matrix::new(&right, k, some.len())
            } else {
                let lines = &rhs.data()[some.start * k..some.end * k];
                right = part(lines, k, 0..k, threads);
                Matrix::new(&right, some.len(), k).t()
            };
            matrix::product(out.part(0..rows, some), 1.0, 1.0, left, rhs, threads);
        }
    }
}

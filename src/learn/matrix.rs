//! Matrix products on slices: a checked front of the `gemm` crate.

use std::ops::Range;

use rayon::prelude::*;

use super::ops::wide;
use super::output::{Shared, Target};

/// A read-only matrix in a slice: element (i, j) lies at `i * row + j * col`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row: usize,
    col: usize,
}

impl<'a> Matrix<'a> {
    /// Row-major, without gaps.
    pub(crate) fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// Row-major, with `stride` elements from one row to the next.
    pub(crate) fn strided(data: &'a [f32], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(fits(data.len(), rows, cols, stride, 1), "matrix outside its slice");
        Self { data, rows, cols, row: stride, col: 1 }
    }

    /// The transpose.
    pub(crate) fn t(self) -> Self {
        Self { rows: self.cols, cols: self.rows, row: self.col, col: self.row, ..self }
    }

    /// Some of its columns; at least one.
    fn columns(self, cols: Range<usize>) -> Self {
        Self { data: &self.data[cols.start * self.col..], cols: cols.len(), ..self }
    }

    /// Rows and columns.
    pub(crate) fn size(self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// Elements from one row to the next, and from one column to the next; one of them is 1.
    pub(crate) fn strides(self) -> (usize, usize) {
        (self.row, self.col)
    }

    /// The slice that it lies in, from element (0, 0) on.
    pub(crate) fn data(self) -> &'a [f32] {
        self.data
    }
}

fn fits(len: usize, rows: usize, cols: usize, row: usize, col: usize) -> bool {
    rows == 0 || cols == 0 || (rows - 1) * row + (cols - 1) * col < len
}

/// Where a product runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Threads {
    /// On this thread; for products inside a parallel loop.
    One,
    /// On all threads of the current pool. The sums do not depend on their number.
    All,
}

/// `out = beta * out + alpha * lhs * rhs`; `out` is row-major with `stride` elements from row to
/// row. With `beta` 0 the old content of `out` does not matter.
pub(crate) fn product<'a>(
    out: impl Target<'a>,
    beta: f32,
    alpha: f32,
    lhs: Matrix<'_>,
    rhs: Matrix<'_>,
    threads: Threads,
) {
    let (m, n, k) = (lhs.rows, rhs.cols, lhs.cols);
    assert_eq!(k, rhs.rows, "inner sizes of a product");
    let mut out = out.block((m, n));
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        for i in 0..m {
            out.row(i).iter_mut().for_each(|x| *x = if beta == 0.0 { 0.0 } else { *x * beta });
        }
        return;
    }
    let count = match threads {
        Threads::One => 1,
        Threads::All => rayon::current_num_threads(),
    };
    let out = out.share();
    // The crate copies a right-hand side whose columns are contiguous before it begins, on one
    // thread; in parts of columns, each thread copies its own.
    // (One row takes another way, whose sums depend on where a part begins.)
    let copied = m > 1 && rhs.col != 1 && m * n * k >= gemm::get_threading_threshold();
    let wanted = if m <= FEW_ROWS { 2 * count } else { count };
    let parts = if copied && count > 1 { wanted.min(n / MIN_PART).max(1) } else { 1 };
    if parts == 1 {
        let parallelism = match threads {
            Threads::One => gemm::Parallelism::None,
            Threads::All => gemm::Parallelism::Rayon(count),
        };
        return columns(&out, 0..n, beta, alpha, lhs, rhs, parallelism);
    }
    let at = |i: usize| if i == parts { n } else { n * i / parts / UNIT * UNIT };
    (0..parts).into_par_iter().for_each(|i| {
        let cols = at(i)..at(i + 1);
        let part = rhs.columns(cols.clone());
        columns(&out, cols, beta, alpha, lhs, part, gemm::Parallelism::None);
    });
}

/// Rows up to which a product is cut into more parts, so that none waits long for another.
const FEW_ROWS: usize = 512;
/// Columns that a part has more or less than its share, at most.
const UNIT: usize = 16;
/// Columns that fill a part. One of 64 columns or fewer might be summed in other blocks.
const MIN_PART: usize = 64 + UNIT;

/// Some columns of a product, which no other thread has: `beta` times themselves and
/// `alpha * lhs * rhs`.
#[expect(unsafe_code, reason = "the gemm crate takes raw pointers")]
fn columns(
    out: &Shared<'_>,
    cols: Range<usize>,
    beta: f32,
    alpha: f32,
    lhs: Matrix<'_>,
    rhs: Matrix<'_>,
    parallelism: gemm::Parallelism,
) {
    // SAFETY: `Matrix::strided` and `Block::new` have checked that the last element of each of the
    // three matrices lies in its slice, and `product` gives each thread other columns.
    unsafe {
        let out = out.block(0..lhs.rows, cols);
        gemm::gemm(
            lhs.rows,
            rhs.cols,
            lhs.cols,
            out.first,
            1,
            out.stride as isize,
            beta != 0.0,
            lhs.data.as_ptr(),
            lhs.col as isize,
            lhs.row as isize,
            rhs.data.as_ptr(),
            rhs.col as isize,
            rhs.row as isize,
            beta,
            alpha,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// Rows of one partial sum; fixed, so that sums do not depend on the number of threads.
const CHUNK: usize = 64;

/// Ranges of [`CHUNK`] rows.
pub(crate) fn chunks(rows: usize) -> impl IndexedParallelIterator<Item = Range<usize>> {
    (0..rows.div_ceil(CHUNK)).into_par_iter().map(move |i| i * CHUNK..((i + 1) * CHUNK).min(rows))
}

/// The sum over the rows of a row-major `[rows, cols]`.
pub(crate) fn sum_rows(data: &[f32], cols: usize) -> Vec<f32> {
    let partial: Vec<Vec<f32>> = chunks(data.len() / cols.max(1))
        .map(|rows| {
            let mut sum = vec![0.0; cols];
            wide!({
                for row in data[rows.start * cols..rows.end * cols].chunks_exact(cols) {
                    sum.iter_mut().zip(row).for_each(|(s, x)| *s += x);
                }
            });
            sum
        })
        .collect();
    add_all(partial, cols)
}

/// The sum of vectors, in their order.
pub(crate) fn add_all(parts: Vec<Vec<f32>>, len: usize) -> Vec<f32> {
    let mut sum = vec![0.0; len];
    for part in parts {
        sum.iter_mut().zip(&part).for_each(|(s, x)| *s += x);
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_in_all_layouts() {
        let a: Vec<f32> = (0..15).map(|i| i as f32 - 6.0).collect(); // [3, 5]
        let b: Vec<f32> = (0..10).map(|i| 0.5 * i as f32).collect(); // [5, 2]
        let want = |i: usize, j: usize| (0..5).map(|k| a[i * 5 + k] * b[k * 2 + j]).sum::<f32>();
        for threads in [Threads::One, Threads::All] {
            let mut out = vec![1.0; 12]; // [3, 2] in rows of 4
            let (l, r) = (Matrix::new(&a, 3, 5), Matrix::new(&b, 5, 2));
            product((&mut out, 4), 2.0, 3.0, l, r, threads);
            for i in 0..3 {
                for j in 0..2 {
                    assert_eq!(out[i * 4 + j], 2.0 + 3.0 * want(i, j));
                }
                assert_eq!(out[i * 4 + 2], 1.0);
            }
            let mut out = vec![f32::NAN; 6];
            product((&mut out, 3), 0.0, 1.0, r.t(), l.t(), threads);
            for i in 0..3 {
                for j in 0..2 {
                    assert_eq!(out[j * 3 + i], want(i, j));
                }
            }
        }
    }

    /// Wide enough to be cut: the bits are those of one thread, and the rest of the rows stays.
    #[test]
    fn parts_change_no_bit() {
        for (m, k, n) in [(70, 130, 333), (33, 700, 175), (600, 65, 400), (1, 3000, 333)] {
            let a: Vec<f32> = (0..m * k).map(|i| (i as f32 * 0.7).sin()).collect();
            let w: Vec<f32> = (0..n * k).map(|i| (i as f32 * 0.3).cos()).collect();
            let run = |threads| {
                let mut out = vec![0.5; m * (n + 3)];
                let (a, w) = (Matrix::new(&a, m, k), Matrix::new(&w, n, k).t());
                product((&mut out, n + 3), 1.0, 0.5, a, w, threads);
                assert!(out.chunks(n + 3).all(|row| row[n..] == [0.5; 3]));
                out
            };
            let want = run(Threads::One);
            for threads in 1..6 {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                assert!(pool.install(|| run(Threads::All)) == want, "{threads} {m} {k} {n}");
            }
        }
    }

    #[test]
    fn sums_of_rows() {
        let data: Vec<f32> = (0..3 * 200).map(|i| (i % 7) as f32).collect();
        let want: Vec<f32> =
            (0..3).map(|c| (0..200).map(|r| data[r * 3 + c]).sum::<f32>()).collect();
        assert_eq!(sum_rows(&data, 3), want);
    }

    #[test]
    #[should_panic(expected = "outside its slice")]
    fn refuses_to_read_outside() {
        let _ = Matrix::new(&[0.0; 5], 2, 3);
    }
}

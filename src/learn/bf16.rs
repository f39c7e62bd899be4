//! Matrix products of operands rounded to bf16 (to nearest, ties to even), summed in f32.
//!
//! Where the processor has matrix tiles (Intel AMX) they compute the product, several times as
//! fast as f32; elsewhere it is the f32 product of the rounded operands. Which of the two it is
//! says [`tiles`]. Each element is summed over the terms and over k in a fixed order, so the
//! bits do not depend on the number of threads. Subnormal numbers may count as 0.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
#[path = "bf16/no_amx.rs"]
mod amx;
mod pack;
mod plain;
#[cfg(test)]
mod tests;
mod through;

use std::cell::RefCell;
use std::ops::Range;

use super::matrix::{Matrix, Threads};
use super::output::{Block, Target};
use pack::{Form, PANEL, Packed, Side};
pub(crate) use through::Back;

/// Terms that a product can have.
pub(crate) const MAX_TERMS: usize = 4;

/// Whether this processor multiplies in bf16 on matrix tiles (Intel AMX).
pub fn tiles() -> bool {
    Form::best() != Form::Plain
}

/// When a result is read again, by which a large one is written into the caches or past them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reread {
    /// In memory that is used again and again: inference.
    Soon,
    /// After much else, or from memory that is not in a cache yet: training.
    Late,
}

/// The left-hand side of products, `[m, k]`, in bf16 and laid out for them.
#[derive(Debug)]
pub(crate) struct Lhs(Packed);

impl Lhs {
    /// Packs `x`, `[m, k]`.
    pub(crate) fn new(x: Matrix<'_>, threads: Threads) -> Self {
        Self::scaled(1.0, x, threads)
    }

    /// Packs `alpha * x`.
    pub(crate) fn scaled(alpha: f32, x: Matrix<'_>, threads: Threads) -> Self {
        let mut lhs = Self::empty();
        lhs.0.fill(x, alpha, threads);
        lhs
    }

    /// Packs `[rows, cols]` whose rows are made some at a time, see [`Rhs::from_rows`].
    pub(crate) fn from_rows(
        size: (usize, usize),
        make: impl Fn(Range<usize>, &mut [f32]) + Sync,
    ) -> Self {
        let mut lhs = Self::empty();
        lhs.0.fill_rows(size, false, make);
        lhs
    }

    /// `[0, 0]`: a buffer to be filled.
    pub(crate) fn empty() -> Self {
        Self(Packed::empty(Side::Lhs, Form::best()))
    }
}

/// The right-hand side of products, `[k, n]`, in bf16 and laid out for them.
#[derive(Debug)]
pub(crate) struct Rhs(Packed);

impl Rhs {
    /// Packs `x`, `[k, n]`.
    pub(crate) fn new(x: Matrix<'_>, threads: Threads) -> Self {
        Self::scaled(1.0, x, threads)
    }

    /// Packs `alpha * x`.
    pub(crate) fn scaled(alpha: f32, x: Matrix<'_>, threads: Threads) -> Self {
        let mut rhs = Self::empty();
        rhs.0.fill(x.t(), alpha, threads);
        rhs
    }

    /// `[0, 0]`: a buffer to be filled.
    pub(crate) fn empty() -> Self {
        Self(Packed::empty(Side::Rhs, Form::best()))
    }

    /// Packs `x`, `[k, n]` of any size, into the memory of what it was.
    pub(crate) fn refill(&mut self, x: Matrix<'_>, threads: Threads) {
        self.0.fill(x.t(), 1.0, threads);
    }

    /// Packs W or, if `transposed`, W^T of a row-major W `[rows, cols]` whose rows are made some
    /// at a time: `make` fills a slice with the rows of a range. In parallel; each row is made
    /// once, and only some are there at a time.
    pub(crate) fn from_rows(
        (rows, cols): (usize, usize),
        transposed: bool,
        make: impl Fn(Range<usize>, &mut [f32]) + Sync,
    ) -> Self {
        let mut rhs = Self::empty();
        rhs.refill_rows((rows, cols), transposed, make);
        rhs
    }

    /// As [`Rhs::from_rows`], into the memory of what it was.
    pub(crate) fn refill_rows(
        &mut self,
        (rows, cols): (usize, usize),
        transposed: bool,
        make: impl Fn(Range<usize>, &mut [f32]) + Sync,
    ) {
        let size = if transposed { (rows, cols) } else { (cols, rows) };
        self.0.fill_rows(size, !transposed, make);
    }
}

/// What is called with the row and the column of a finished square, counted in squares, and its
/// sums.
type Take<'a> = dyn Fn(usize, usize, &[f32; PANEL * PANEL]) + Sync + 'a;

/// Operands of a product that fit together.
struct Operands<'a> {
    pairs: [(&'a Packed, &'a Packed); MAX_TERMS],
    len: usize,
    /// Rows and columns of the product.
    size: (usize, usize),
}

impl<'a> Operands<'a> {
    fn new(bias: Option<&[f32]>, terms: &[(&'a Lhs, &'a Rhs)]) -> Self {
        assert!((1..=MAX_TERMS).contains(&terms.len()), "number of terms of a product");
        let mut pairs = [(&terms[0].0.0, &terms[0].1.0); MAX_TERMS];
        let (m, n, form) = (pairs[0].0.outer(), pairs[0].1.outer(), pairs[0].0.form());
        for (pair, (Lhs(lhs), Rhs(rhs))) in pairs.iter_mut().zip(terms) {
            assert_eq!((lhs.outer(), rhs.outer()), (m, n), "outer sizes of a product");
            assert_eq!(lhs.k(), rhs.k(), "inner sizes of a product");
            assert!((lhs.form(), rhs.form()) == (form, form), "forms of a product's operands");
            *pair = (lhs, rhs);
        }
        assert!(bias.is_none_or(|bias| bias.len() == n), "size of a product's bias");
        Self { pairs, len: terms.len(), size: (m, n) }
    }

    fn get(&self) -> &[(&'a Packed, &'a Packed)] {
        &self.pairs[..self.len]
    }

    fn form(&self) -> Form {
        self.pairs[0].0.form()
    }
}

/// `out = beta * out + bias + ` the sum over the terms of lhs times rhs; `out` is row-major
/// `[m, n]` with `stride` elements from row to row, `bias` is `[n]`. Without `beta` the old
/// content of `out` does not matter. At most [`MAX_TERMS`] terms, at least one.
pub(crate) fn product<'a>(
    out: impl Target<'a>,
    beta: bool,
    bias: Option<&[f32]>,
    terms: &[(&Lhs, &Rhs)],
    reread: Reread,
    threads: Threads,
) {
    let operands = Operands::new(bias, terms);
    let out = out.block(operands.size);
    if out.size.0 == 0 || out.size.1 == 0 {
        return;
    }
    let terms = operands.get();
    match operands.form() {
        Form::Tiles(amx) => amx.product(out, beta, bias, terms, reread, threads),
        Form::Plain => plain::product(out, beta, bias, terms, threads),
    }
}

/// `out = beta * out + (alpha * lhs) * rhs` on this thread, for small products inside a parallel
/// loop; `alpha * lhs` is what is rounded. Packs into memory that the thread keeps.
pub(crate) fn product_of<'a>(
    out: impl Target<'a>,
    beta: bool,
    alpha: f32,
    lhs: Matrix<'_>,
    rhs: Matrix<'_>,
) {
    thread_local! {
        static OPERANDS: RefCell<(Lhs, Rhs)> = RefCell::new((Lhs::empty(), Rhs::empty()));
    }
    OPERANDS.with_borrow_mut(|(l, r)| {
        l.0.fill(lhs, alpha, Threads::One);
        r.refill(rhs, Threads::One);
        product(out, beta, None, &[(l, r)], Reread::Soon, Threads::One);
    });
}

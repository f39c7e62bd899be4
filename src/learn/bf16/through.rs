//! Products whose results go through a function: what the next product reads, packed, without a
//! matrix between the two in memory.
//!
//! On tiles a square of sums is in the first cache when it is finished; there it is rounded, goes
//! through the function and is packed. Elsewhere the product is made first.

use std::ops::Range;
use std::ptr;

use super::pack::{Form, PANEL, Packed};
use super::{Lhs, Operands, Reread, Rhs, plain, product};
use crate::learn::buffer::Buffer;
use crate::learn::matrix::{Matrix, Threads};

/// From a function's argument and the gradient of its result that of the argument.
pub(crate) type Back = fn(&[f32], &[f32], &mut [f32]);

/// Elements of a square at a time: few, to leave the first cache to the right-hand side.
const PART: usize = 256;

/// Numbers that begin at a line of the cache.
#[repr(C, align(64))]
struct Aligned<T>([T; PART]);

impl Lhs {
    /// `f` of `x`, and `x` itself if it is to be kept: x is `bias + ` the sum over the terms of lhs
    /// times rhs, rounded to bf16, `[m, n]`. `f` works element by element and leaves 0 as it is.
    pub(crate) fn through(
        f: fn(&[f32], &mut [f32]),
        bias: Option<&[f32]>,
        terms: &[(&Lhs, &Rhs)],
        keep: bool,
    ) -> (Self, Option<Self>) {
        let operands = Operands::new(bias, terms);
        if let Form::Tiles(amx) = operands.form() {
            let new = || Packed::of_squares(operands.size, Form::Tiles(amx));
            let (mut out, mut kept) = (new(), keep.then(new));
            let (to, also) = (out.share(), kept.as_mut().map(Packed::share));
            let done = amx.squares(bias, operands.get(), &|row, col, sums| {
                // SAFETY: every square is finished once.
                #[expect(unsafe_code, reason = "threads fill parts of one slice")]
                let (to, also) =
                    unsafe { (to.get(row, col), also.as_ref().map(|also| also.get(row, col))) };
                let mut also = also.map(|also| also.as_chunks_mut().0);
                let parts = sums.as_chunks().0.iter().zip(to.as_chunks_mut().0);
                for (i, (sums, to)) in parts.enumerate() {
                    let (mut rounded, mut x, mut y) =
                        (Aligned([0; PART]), Aligned([0.0; PART]), Aligned([0.0; PART]));
                    amx.round(sums as &[f32; PART], &mut rounded.0);
                    plain::widen(&rounded.0, &mut x.0);
                    f(&x.0, &mut y.0);
                    amx.round(&y.0, to as &mut [u16; PART]);
                    if let Some(also) = &mut also {
                        amx.copy_past(&rounded.0, &mut also[i] as &mut [u16; PART]);
                    }
                }
            });
            if done {
                return (Self(out), kept.map(Self));
            }
        }
        let (m, n) = operands.size;
        let mut x = Buffer::new(m * n);
        product((&mut x, n), false, bias, terms, Reread::Soon, Threads::All);
        let x = Self::new(Matrix::new(&x, m, n), Threads::All);
        let out = Self::from_rows((m, n), |rows, out| x.apply(rows, out, f));
        (out, keep.then_some(x))
    }

    /// `f(x, g)` for this `x` and `g` the sum over the terms of lhs times rhs, both `[m, n]`; as
    /// the gradient of x from that of what [`Lhs::through`] made of it. `f(x, 0)` is 0.
    pub(crate) fn back_through(&self, f: Back, terms: &[(&Lhs, &Rhs)]) -> Self {
        let operands = Operands::new(None, terms);
        let (m, n) = operands.size;
        assert_eq!(self.size(), (m, n), "sizes of a function's arguments");
        if let (Form::Tiles(amx), Form::Tiles(_)) = (operands.form(), self.0.form()) {
            let mut out = Packed::of_squares((m, n), operands.form());
            let to = out.share();
            let done = amx.squares(None, operands.get(), &|row, col, g| {
                let x = self.0.square(row, col);
                // The next row's.
                amx.fetch(ptr::from_ref(x).wrapping_add(n.div_ceil(PANEL)));
                // SAFETY: every square is finished once.
                #[expect(unsafe_code, reason = "threads fill parts of one slice")]
                let to = unsafe { to.get(row, col) };
                let parts = x.as_chunks().0.iter().zip(g.as_chunks().0);
                for ((x, g), to) in parts.zip(to.as_chunks_mut().0) {
                    let (mut wide, mut y) = (Aligned([0.0; PART]), Aligned([0.0; PART]));
                    plain::widen(x as &[u16; PART], &mut wide.0);
                    f(&wide.0, g as &[f32; PART], &mut y.0);
                    amx.round(&y.0, to as &mut [u16; PART]);
                }
            });
            if done {
                return Self(out);
            }
        }
        let mut g = Buffer::new(m * n);
        product((&mut g, n), false, None, terms, Reread::Late, Threads::All);
        self.back_from(f, &g)
    }

    /// `f(x, g)` for this `x` and a `g` that is there, both `[m, n]`.
    pub(crate) fn back_from(&self, f: Back, g: &[f32]) -> Self {
        let (m, n) = self.size();
        Self::from_rows((m, n), |rows, out| {
            let g = &g[rows.start * n..rows.end * n];
            self.apply(rows, out, |x, out| f(x, g, out));
        })
    }

    /// `f` of some rows, see [`Lhs::read`].
    pub(crate) fn apply(
        &self,
        rows: Range<usize>,
        out: &mut [f32],
        f: impl Fn(&[f32], &mut [f32]),
    ) {
        let mut x = Buffer::new(out.len());
        self.read(rows, &mut x);
        f(&x, out);
    }

    /// Rows and columns.
    pub(crate) fn size(&self) -> (usize, usize) {
        (self.0.outer(), self.0.k())
    }

    /// Some rows, in f32; not of what was packed from a transpose.
    pub(crate) fn read(&self, rows: Range<usize>, out: &mut [f32]) {
        self.0.read(rows, out);
    }
}

//! Operands rounded to bf16 and laid out for the kernel.

use std::marker::PhantomData;
use std::ops::Range;

use rayon::prelude::*;

use super::amx::Amx;
use super::plain;
use crate::learn::buffer::Buffer;
use crate::learn::matrix::{Matrix, Threads};

/// Of k, what one instruction takes.
pub(super) const STEP: usize = 32;
/// Rows of the left-hand side, or columns of the right-hand side, that are multiplied together.
pub(super) const PANEL: usize = 32;
/// Elements of a tile.
pub(super) const TILE_LEN: usize = 512;
/// Elements of a step of a panel: two tiles.
pub(super) const STEP_LEN: usize = 2 * TILE_LEN;

/// Panels of a task, where the source lies across them.
const TOGETHER: usize = 4;

/// Which operand it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// The left one: a tile is [16 rows][32 k].
    Lhs,
    /// The right one: a tile is [16 pairs of k][16 columns][2].
    Rhs,
}

/// How operands are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// For tiles: `[outer / 32][k / 32][2]` tiles, filled up with zeros.
    Tiles(Amx),
    /// Row by row, as the source lies.
    Plain,
}

impl Form {
    /// The fastest there is.
    pub(super) fn best() -> Self {
        Amx::detect().map_or(Self::Plain, Self::Tiles)
    }
}

/// The squares of a left-hand side for tiles, each `[32 rows][32 k]`, of which threads hold
/// different ones.
pub(super) struct Squares<'a> {
    first: *mut [u16; STEP_LEN],
    len: usize,
    /// Squares in a row of them.
    steps: usize,
    slice: PhantomData<&'a mut [u16]>,
}

// SAFETY: it stands for a mutable slice of numbers, and gives parts of it away only by an unsafe
// function whose callers see to it that no two of them are the same.
#[expect(unsafe_code, reason = "holds a pointer, for a slice that several threads fill")]
unsafe impl Sync for Squares<'_> {}

impl Squares<'_> {
    /// A square by its row and column of squares.
    ///
    /// # Safety
    /// Nobody else may hold it.
    #[expect(unsafe_code, clippy::mut_from_ref, reason = "hands out parts of one slice")]
    pub(super) unsafe fn get(&self, row: usize, col: usize) -> &mut [u16; STEP_LEN] {
        let at = row * self.steps + col;
        assert!(col < self.steps && at < self.len, "square outside the matrix");
        // SAFETY: it lies in the slice, and is held by this caller only.
        unsafe { &mut *self.first.add(at) }
    }
}

/// An operand in bf16, `[outer, k]`: `outer` are the rows of the left-hand side or the columns
/// of the right-hand side.
#[derive(Debug)]
pub(super) struct Packed {
    form: Form,
    side: Side,
    outer: usize,
    k: usize,
    /// Held as `[k, outer]` (form `Plain` only).
    flipped: bool,
    /// At least the elements that there are.
    buffer: Buffer<u16>,
    /// How many there are.
    len: usize,
}

impl Packed {
    /// Of size 0.
    pub(super) fn empty(side: Side, form: Form) -> Self {
        Self { form, side, outer: 0, k: 0, flipped: false, buffer: Buffer::new(0), len: 0 }
    }

    /// A left-hand side `[outer, k]` of squares that are yet to be written.
    pub(super) fn of_squares((outer, k): (usize, usize), form: Form) -> Self {
        let mut packed = Self { outer, k, ..Self::empty(Side::Lhs, form) };
        packed.resize(outer.div_ceil(PANEL) * k.div_ceil(STEP) * STEP_LEN);
        packed
    }

    /// For the threads that write its squares; for tiles only.
    pub(super) fn share(&mut self) -> Squares<'_> {
        let steps = self.k.div_ceil(STEP);
        let (all, _) = self.buffer[..self.len].as_chunks_mut();
        Squares { first: all.as_mut_ptr(), len: all.len(), steps, slice: PhantomData }
    }

    /// A square of a left-hand side for tiles: 32 rows by 32 of k. The next row's lies `k / 32`
    /// squares further.
    pub(super) fn square(&self, row: usize, col: usize) -> &[u16; STEP_LEN] {
        &self.data().as_chunks().0[row * self.k.div_ceil(STEP) + col]
    }

    /// Some rows of a left-hand side that is not flipped, in f32.
    pub(super) fn read(&self, rows: Range<usize>, out: &mut [f32]) {
        assert!(self.side == Side::Lhs && !self.flipped, "rows of an operand that has none");
        let k = self.k;
        for (i, out) in rows.zip(out.chunks_exact_mut(k.max(1))) {
            match self.form {
                Form::Plain => plain::widen(&self.data()[i * k..][..k], out),
                Form::Tiles(_) => {
                    for (col, out) in out.chunks_mut(STEP).enumerate() {
                        plain::widen(&self.square(i / PANEL, col)[i % PANEL * STEP..], out);
                    }
                }
            }
        }
    }

    pub(super) fn form(&self) -> Form {
        self.form
    }

    pub(super) fn outer(&self) -> usize {
        self.outer
    }

    pub(super) fn k(&self) -> usize {
        self.k
    }

    /// Whether it is held as `[k, outer]`.
    pub(super) fn flipped(&self) -> bool {
        self.flipped
    }

    /// The elements, laid out as the form says.
    pub(super) fn data(&self) -> &[u16] {
        &self.buffer[..self.len]
    }

    /// Room for `len` elements, with any content.
    fn resize(&mut self, len: usize) -> &mut [u16] {
        if self.buffer.len() < len {
            self.buffer = Buffer::new(len);
        }
        self.len = len;
        &mut self.buffer[..len]
    }

    /// Takes the content of `x`, `[outer, k]`, times `scale`.
    pub(super) fn fill(&mut self, x: Matrix<'_>, scale: f32, threads: Threads) {
        (self.outer, self.k) = x.size();
        let Form::Tiles(amx) = self.form else {
            self.flipped = x.strides().1 != 1;
            let x = if self.flipped { x.t() } else { x };
            let (rows, cols) = x.size();
            return plain::round(x, scale, self.resize(rows * cols), threads);
        };
        let (side, panel) = (self.side, self.k.div_ceil(STEP) * STEP_LEN);
        let out = self.resize(self.outer.div_ceil(PANEL) * panel);
        // Where a panel is a narrow strip of long rows, some together read more of each row.
        let some = if x.strides().1 == 1 { 1 } else { TOGETHER };
        let pack = |(i, out): (usize, &mut [u16])| amx.pack(side, x, i * some * PANEL, scale, out);
        match threads {
            Threads::One => pack((0, out)),
            // A size of 0 would be refused; then there is no chunk anyway.
            Threads::All => out.par_chunks_mut((some * panel).max(1)).enumerate().for_each(pack),
        }
    }

    /// Takes the content of rows that `make` makes: of a row-major matrix `[outer, k]` or, if
    /// `flipped`, `[k, outer]`.
    pub(super) fn fill_rows(
        &mut self,
        (outer, k): (usize, usize),
        flipped: bool,
        make: impl Fn(Range<usize>, &mut [f32]) + Sync,
    ) {
        (self.outer, self.k) = (outer, k);
        let (rows, cols) = if flipped { (k, outer) } else { (outer, k) };
        // Both a panel and a step are 32 rows.
        let block = |i: usize| i * PANEL..((i + 1) * PANEL).min(rows);
        let made = |i: usize, buffer: &mut Vec<f32>| {
            buffer.resize(PANEL * cols, 0.0);
            make(block(i), &mut buffer[..block(i).len() * cols]);
        };
        let side = self.side;
        match self.form {
            Form::Plain => {
                self.flipped = flipped;
                let out = self.resize(rows * cols);
                out.par_chunks_mut((PANEL * cols).max(1)).enumerate().for_each_init(
                    Vec::new,
                    |buffer, (i, out)| {
                        made(i, buffer);
                        let x = Matrix::new(buffer, block(i).len(), cols);
                        plain::round(x, 1.0, out, Threads::One);
                    },
                );
            }
            Form::Tiles(amx) if !flipped => {
                let panel = k.div_ceil(STEP) * STEP_LEN;
                let out = self.resize(outer.div_ceil(PANEL) * panel);
                out.par_chunks_mut(panel.max(1)).enumerate().for_each_init(
                    Vec::new,
                    |buffer, (i, out)| {
                        made(i, buffer);
                        amx.pack(side, Matrix::new(buffer, block(i).len(), cols), 0, 1.0, out);
                    },
                );
            }
            Form::Tiles(amx) => {
                let (panels, steps) = (outer.div_ceil(PANEL), k.div_ceil(STEP));
                let out = self.resize(panels * steps * STEP_LEN);
                // A block of rows is one step of every panel.
                let mut by_step: Vec<Vec<&mut [u16]>> =
                    (0..steps).map(|_| Vec::with_capacity(panels)).collect();
                for (i, out) in out.chunks_exact_mut(STEP_LEN).enumerate() {
                    by_step[i % steps].push(out);
                }
                by_step.into_par_iter().enumerate().for_each_init(Vec::new, |buffer, (i, outs)| {
                    made(i, buffer);
                    let x = Matrix::new(buffer, block(i).len(), cols).t();
                    for (panel, out) in outs.into_iter().enumerate() {
                        amx.pack(side, x, panel * PANEL, 1.0, out);
                    }
                });
            }
        }
    }
}

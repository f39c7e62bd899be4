//! What a linear layer reads.

use std::cell::OnceCell;
use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use crate::learn::bf16::{Lhs, Rhs};
use crate::learn::buffer::Buffer;
use crate::learn::matrix::{Matrix, Threads};
use crate::learn::ops::Kept;

/// Fills a slice with some rows.
type Make<'a> = dyn Fn(Range<usize>, &mut [f32]) + Sync + 'a;

enum Source<'a> {
    There(&'a [f32]),
    Made(Box<Make<'a>>),
}

/// Numbers `[rows, cols]` that are there, or that are made of others when they are needed: packing
/// them for a product in bf16 then takes one pass over those others. Packed once, however many
/// layers read them.
pub(crate) struct Input<'a> {
    rows: usize,
    cols: usize,
    source: Source<'a>,
    made: OnceCell<Buffer>,
    packed: OnceCell<Arc<Lhs>>,
}

impl<'a> Input<'a> {
    fn new(rows: usize, cols: usize, source: Source<'a>) -> Self {
        Self { rows, cols, source, made: OnceCell::new(), packed: OnceCell::new() }
    }

    /// Numbers that are there.
    pub(crate) fn of(data: &'a [f32], cols: usize) -> Self {
        Self::new(data.len() / cols.max(1), cols, Source::There(data))
    }

    /// None: for a backward pass that does not read its input.
    pub(crate) fn none() -> Self {
        Self::of(&[], 1)
    }

    /// Rows that `make` makes, on any thread and maybe several times.
    pub(crate) fn made(
        rows: usize,
        cols: usize,
        make: impl Fn(Range<usize>, &mut [f32]) + Sync + 'a,
    ) -> Self {
        Self::new(rows, cols, Source::Made(Box::new(make)))
    }

    /// Numbers that are packed in bf16.
    pub(crate) fn of_packed(lhs: Lhs) -> Self {
        let ((rows, cols), lhs) = (lhs.size(), Arc::new(lhs));
        let packed = OnceCell::from(Arc::clone(&lhs));
        let input = Self::made(rows, cols, move |rows, out| lhs.read(rows, out));
        Self { packed, ..input }
    }

    /// What dropout kept of numbers that are there, `[_, cols]`.
    pub(crate) fn dropped(data: &'a [f32], cols: usize, kept: &'a Kept) -> Self {
        Self::made(data.len() / cols.max(1), cols, move |rows, out| {
            kept.of_rows(rows.clone(), &data[rows.start * cols..rows.end * cols], out);
        })
    }

    /// The gradient before a dropout, `[_, cols]`, of that behind it.
    pub(crate) fn past(grad: &'a [f32], cols: usize, kept: Option<&'a Kept>) -> Self {
        kept.map_or_else(|| Self::of(grad, cols), |kept| Self::dropped(grad, cols, kept))
    }

    pub(super) fn size(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// The numbers, row-major.
    pub(super) fn plain(&self) -> &[f32] {
        const ROWS: usize = 16;
        match &self.source {
            Source::There(data) => data,
            Source::Made(make) => self.made.get_or_init(|| {
                let cols = self.cols;
                let mut out = Buffer::new(self.rows * cols);
                let parts = out.par_chunks_mut((ROWS * cols).max(1)).enumerate();
                parts.for_each(|(i, part)| {
                    make(i * ROWS..(i * ROWS + part.len() / cols), part);
                });
                out
            }),
        }
    }

    fn matrix(&self) -> Matrix<'_> {
        Matrix::new(self.plain(), self.rows, self.cols)
    }

    /// As a left-hand side in bf16.
    pub(super) fn packed(&self) -> &Lhs {
        self.packed.get_or_init(|| {
            Arc::new(match &self.source {
                Source::Made(make) if self.made.get().is_none() => {
                    Lhs::from_rows((self.rows, self.cols), make)
                }
                _ => Lhs::new(self.matrix(), Threads::All),
            })
        })
    }

    /// As a right-hand side in bf16.
    pub(super) fn rhs(&self) -> Rhs {
        match &self.source {
            Source::Made(make) if self.made.get().is_none() => {
                Rhs::from_rows((self.rows, self.cols), false, make)
            }
            _ => Rhs::new(self.matrix(), Threads::All),
        }
    }
}

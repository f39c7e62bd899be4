//! Where a product is written: the whole matrix, and the blocks of it that threads hold.

use std::marker::PhantomData;
use std::ops::Range;
use std::ptr;

/// A row-major matrix `[rows, cols]` in a slice, `stride` elements from row to row.
pub(crate) struct Output<'a> {
    pub(crate) data: &'a mut [f32],
    pub(crate) stride: usize,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
}

impl<'a> Output<'a> {
    /// Panics if it does not fit into its slice.
    pub(crate) fn new(
        (data, stride): (&'a mut [f32], usize),
        (rows, cols): (usize, usize),
    ) -> Self {
        let fits = rows == 0 || cols == 0 || (rows - 1) * stride + cols <= data.len();
        assert!(cols <= stride && fits, "product outside its slice");
        Self { data, stride, rows, cols }
    }

    /// To be written by several threads.
    pub(crate) fn share(self) -> Shared<'a> {
        let Self { data, stride, rows, cols } = self;
        Shared { first: data.as_mut_ptr(), stride, rows, cols, slice: PhantomData }
    }
}

/// A matrix of which threads hold different blocks.
pub(crate) struct Shared<'a> {
    first: *mut f32,
    stride: usize,
    rows: usize,
    cols: usize,
    slice: PhantomData<&'a mut [f32]>,
}

// SAFETY: it stands for a mutable slice of numbers, and gives parts of it away only by an unsafe
// function whose callers see to it that no two of them overlap.
#[expect(unsafe_code, reason = "holds a pointer, for a slice that several threads fill")]
unsafe impl Sync for Shared<'_> {}

impl Shared<'_> {
    /// A block of it; what is outside the matrix is cut off.
    ///
    /// # Safety
    /// No two blocks that exist at a time may overlap.
    #[expect(unsafe_code, reason = "hands out parts of one slice")]
    pub(crate) unsafe fn block(&self, rows: Range<usize>, cols: Range<usize>) -> Block<'_> {
        let rows = rows.start.min(self.rows)..rows.end.min(self.rows);
        let cols = cols.start.min(self.cols)..cols.end.min(self.cols);
        let first = self.first.wrapping_add(rows.start * self.stride + cols.start);
        let size = (rows.len(), cols.len());
        Block { first, stride: self.stride, size, slice: PhantomData }
    }
}

/// A block of a product that one thread holds.
pub(crate) struct Block<'a> {
    /// Its first element.
    pub(crate) first: *mut f32,
    /// Elements from row to row.
    pub(crate) stride: usize,
    /// Rows and columns.
    pub(crate) size: (usize, usize),
    slice: PhantomData<&'a mut [f32]>,
}

impl Block<'_> {
    /// None of any.
    pub(crate) fn none() -> Self {
        Self { first: ptr::null_mut(), stride: 0, size: (0, 0), slice: PhantomData }
    }

    /// Its row `i`.
    #[expect(unsafe_code, reason = "a block is no slice: other threads hold what is between")]
    pub(crate) fn row(&mut self, i: usize) -> &mut [f32] {
        assert!(i < self.size.0, "row outside the block");
        let first = self.first.wrapping_add(i * self.stride);
        // SAFETY: the block lies in the slice of its matrix and is held by this thread only.
        unsafe { std::slice::from_raw_parts_mut(first, self.size.1) }
    }
}

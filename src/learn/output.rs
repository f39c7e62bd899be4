//! Where a product is written: a block of a matrix that one thread holds.

use std::marker::PhantomData;
use std::ops::Range;
use std::ptr;

/// A row-major block of a matrix that one thread holds: what lies between its rows may be others'.
pub(crate) struct Block<'a> {
    /// Its first element.
    pub(crate) first: *mut f32,
    /// Elements from row to row.
    pub(crate) stride: usize,
    /// Rows and columns.
    pub(crate) size: (usize, usize),
    slice: PhantomData<&'a mut [f32]>,
}

impl<'a> Block<'a> {
    /// The matrix `[rows, cols]` in a slice, `stride` elements from row to row. Panics if it does
    /// not fit into it.
    pub(crate) fn new(
        (data, stride): (&'a mut [f32], usize),
        (rows, cols): (usize, usize),
    ) -> Self {
        let fits = rows == 0 || cols == 0 || (rows - 1) * stride + cols <= data.len();
        assert!(cols <= stride && fits, "product outside its slice");
        Self { first: data.as_mut_ptr(), stride, size: (rows, cols), slice: PhantomData }
    }

    /// None of any.
    pub(crate) fn none() -> Self {
        Self { first: ptr::null_mut(), stride: 0, size: (0, 0), slice: PhantomData }
    }

    /// To be written by several threads.
    pub(crate) fn share(self) -> Shared<'a> {
        Shared(self)
    }

    /// Some of its rows and columns; what is outside is cut off.
    pub(crate) fn part(&mut self, rows: Range<usize>, cols: Range<usize>) -> Block<'_> {
        cut(self, rows, cols)
    }

    /// Its row `i`.
    #[expect(unsafe_code, reason = "a block is no slice: other threads hold what is between")]
    pub(crate) fn row(&mut self, i: usize) -> &mut [f32] {
        assert!(i < self.size.0, "row outside the block");
        let first = self.first.wrapping_add(i * self.stride);
        // SAFETY: the block lies in the slice of its matrix and is held by this thread only.
        unsafe { std::slice::from_raw_parts_mut(first, self.size.1) }
    }

    /// Makes all of it zeros.
    pub(crate) fn clear(&mut self) {
        (0..self.size.0).for_each(|i| self.row(i).fill(0.0));
    }
}

fn cut<'a>(block: &Block<'_>, rows: Range<usize>, cols: Range<usize>) -> Block<'a> {
    let rows = rows.start.min(block.size.0)..rows.end.min(block.size.0);
    let cols = cols.start.min(block.size.1)..cols.end.min(block.size.1);
    let first = block.first.wrapping_add(rows.start * block.stride + cols.start);
    let size = (rows.len(), cols.len());
    Block { first, stride: block.stride, size, slice: PhantomData }
}

/// A matrix of which threads hold different blocks.
pub(crate) struct Shared<'a>(Block<'a>);

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
        cut(&self.0, rows, cols)
    }
}

/// What can take a product: a slice with the elements from row to row, or a block of its size.
pub(crate) trait Target<'a> {
    /// The block `[rows, cols]`. Panics if it is not there.
    fn block(self, size: (usize, usize)) -> Block<'a>;
}

impl<'a, T: AsMut<[f32]> + ?Sized> Target<'a> for (&'a mut T, usize) {
    fn block(self, size: (usize, usize)) -> Block<'a> {
        Block::new((self.0.as_mut(), self.1), size)
    }
}

impl<'a> Target<'a> for Block<'a> {
    fn block(self, size: (usize, usize)) -> Block<'a> {
        assert_eq!(self.size, size, "size of a product");
        self
    }
}

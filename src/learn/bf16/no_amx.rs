//! Stands for the product on tiles where there are none.

use super::pack::Side;
use super::{Output, Packed, Reread};
use crate::learn::matrix::{Matrix, Threads};

/// Proof that this process may use the tiles: there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Amx {}

impl Amx {
    /// None.
    pub(super) fn detect() -> Option<Self> {
        None
    }

    /// Cannot be called.
    pub(super) fn pack(self, _: Side, _: Matrix<'_>, _: usize, _: f32, _: &mut [u16]) {
        match self {}
    }

    /// Cannot be called.
    pub(super) fn product(
        self,
        _: Output<'_>,
        _: bool,
        _: Option<&[f32]>,
        _: &[(&Packed, &Packed)],
        _: Reread,
        _: Threads,
    ) {
        match self {}
    }
}

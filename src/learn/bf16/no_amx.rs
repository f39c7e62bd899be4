//! Stands for the product on tiles where there are none.

use super::pack::{STEP_LEN, Side};
use super::{Block, Packed, Reread, Take};
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
        _: Block<'_>,
        _: bool,
        _: Option<&[f32]>,
        _: &[(&Packed, &Packed)],
        _: Reread,
        _: Threads,
    ) {
        match self {}
    }

    /// Cannot be called.
    pub(super) fn squares(self, _: Option<&[f32]>, _: &[(&Packed, &Packed)], _: &Take<'_>) -> bool {
        match self {}
    }

    /// Cannot be called.
    pub(super) fn copy_past(self, _: &[u16], _: &mut [u16]) {
        match self {}
    }

    /// Cannot be called.
    pub(super) fn round(self, _: &[f32], _: &mut [u16]) {
        match self {}
    }

    /// Cannot be called.
    pub(super) fn fetch(self, _: *const [u16; STEP_LEN]) {
        match self {}
    }
}

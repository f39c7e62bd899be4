//! Dropout of the inputs of adapters, where kernels of their own do it.

use anyhow::Result;

use super::{Projection, TILE};
use crate::learn::cuda::device::{Adapters, Device, Grid, Mat, float, int};
use crate::learn::linear::Mode;

/// As `Masks` in kernels.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct Masks {
    state: [[u32; 4]; MASKS],
    threshold: u32,
    scale: f32,
}

/// Adapters of one projection whose inputs are dropped by masks of their own, at most.
pub(super) const MASKS: usize = 4;

/// Bytes of a row of as many columns in shared memory, `PITCH` in adapters.cuh.
const ROW_OF_TILE: usize = 2 * 72;

impl Projection {
    /// Bytes for what the masks of its adapters keep, where kernels take it as bits: a bit for each
    /// element of so many rows, in whole tiles of 16.
    pub(in crate::learn::cuda) fn kept_bytes(&self, rows: usize, mode: Mode) -> usize {
        if self.tiles.is_none() || !self.drops(mode) {
            return 0;
        }
        self.adapters_of_modules().count() * rows.next_multiple_of(16) * self.inputs / 8
    }

    /// The masks of its adapters, in their order.
    fn masks(&self, mode: Mode) -> Masks {
        let mut all = Masks::default();
        for (state, adapter) in all.state.iter_mut().zip(self.adapters_of_modules()) {
            if let Some(mask) = adapter.dropout.mask(mode) {
                let (stream, threshold, scale) = mask.parts();
                let ([k0, k1], [h0, h1]) = stream.words_of_state();
                *state = [k0, k1, h0, h1];
                (all.threshold, all.scale) = (threshold, scale);
            }
        }
        all
    }

    /// The factor on what is kept.
    pub(super) fn kept_scale(&self, mode: Mode) -> f32 {
        self.masks(mode).scale
    }

    /// Ranks of each adapter and the number of adapters, where all are alike.
    fn each(&self) -> (usize, usize) {
        let count = self.adapters_of_modules().count().max(1);
        (self.ranks / count, count)
    }

    /// `z` of `x` by the rows `a` of all adapters, and what their masks keep.
    pub(super) fn dropped_ranks(
        &self,
        device: &Device,
        kernels: Adapters,
        (x, a, z, kept): (Mat, Mat, Mat, u64),
        rows: usize,
        mode: Mode,
    ) -> Result<()> {
        let (r, count) = self.each();
        let args =
            [x.at, int(x.ld), a.at, int(a.ld), z.at, kept, int(rows), int(self.inputs), int(r)];
        // As many warps as share the tiles of a row most evenly.
        let tiles = self.inputs / TILE;
        let warps = (4..=8).rev().min_by_key(|w| tiles.next_multiple_of(*w)).unwrap_or(8);
        let grid = Grid {
            blocks: (rows.div_ceil(16), count, 1),
            threads: (32 * warps, 1),
            shared: 4 * 16 * r * warps,
        };
        device.launch_with(kernels.dropped_ranks, grid, &args, &self.masks(mode))
    }

    /// What the adapters add to the gradient of their input, by the gradient `dz` of their ranks,
    /// and `plus`.
    pub(super) fn dropped_gradient(
        &self,
        device: &Device,
        kernels: Adapters,
        (dz, a, kept, plus, dx): (Mat, Mat, u64, Option<Mat>, Mat),
        rows: usize,
        mode: Mode,
    ) -> Result<()> {
        let (r, count) = self.each();
        let plus = plus.unwrap_or(Mat { at: 0, ld: 0 });
        let args = [
            dz.at,
            int(dz.ld),
            a.at,
            int(a.ld),
            kept,
            plus.at,
            int(plus.ld),
            dx.at,
            int(dx.ld),
            int(rows),
            int(self.inputs),
            int(r),
            int(count),
            float(self.kept_scale(mode).into()),
        ];
        let grid = Grid {
            blocks: (self.inputs / TILE, rows.div_ceil(128), 1),
            threads: (256, 1),
            shared: self.ranks * ROW_OF_TILE,
        };
        device.launch(kernels.dropped_gradient, grid, &args)
    }
}

//! The gradients of what is trained in a projection.

use anyhow::Result;

use super::{Behind, Parts, Projection, TILE};
use crate::learn::cuda::arena::Arena;
use crate::learn::cuda::device::{Device, Float, Grid, Mat, float, int};
use crate::learn::cuda::matmul::Target;
use crate::learn::linear::Mode;

/// Blocks of threads that an H100 runs at once of those that the gradients of a projection's
/// adapters are cut into.
const AT_ONCE: usize = 660;

impl Projection {
    /// Adds the gradients of what is trained, from the input, its ranks, the gradient of the
    /// output with its ranks, and what the forward kept. With `behind`, `x` is what the norm read.
    pub(in crate::learn::cuda) fn parameter_gradients(
        &self,
        device: &Device,
        scratch: &Arena,
        (x, ranks, g, kept): (Mat, Mat, Mat, u64),
        behind: Option<Behind>,
        rows: usize,
        mode: Mode,
    ) -> Result<()> {
        debug_assert!(behind.is_none() || self.norms_input());
        let sum = |at, ld, alpha| {
            let to = Mat { at, ld };
            Target { to, float: Float::F32, plus: Some(to), bias: None, alpha }
        };
        let mark = scratch.mark();
        let dropping = self.drops(mode);
        let tiles = self.tiles.as_ref();
        if let (Some(tiles), Some(kernels)) = (tiles, device.adapters) {
            let Parts { at, count, largest } = *tiles;
            // Twice as many where once leaves a tenth of the card idle. Fixed, so that sums do not
            // depend on the card.
            let once = AT_ONCE / count;
            let spans = if 10 * once * count < 9 * AT_ONCE { 2 * AT_ONCE / count } else { once };
            let spans = spans.clamp(1, rows.div_ceil(TILE));
            let span = rows.div_ceil(spans).next_multiple_of(TILE);
            let spans = rows.div_ceil(span);
            let parts = scratch.alloc(4 * largest * TILE * count * spans)?;
            let behind = behind.unwrap_or(Behind { weight: 0, rstd: 0 });
            let grid = Grid { blocks: (count, spans, 1), threads: (128, 1), shared: 0 };
            let args = [
                x.at,
                int(x.ld),
                ranks.at,
                int(ranks.ld),
                g.at,
                int(g.ld),
                at,
                parts,
                int(largest),
                int(rows),
                int(span),
                int(self.inputs),
                kept,
                float(self.kept_scale(mode).into()),
                behind.rstd,
                behind.weight,
            ];
            device.launch(kernels.gradients, grid, &args)?;
            let args = [at, parts, int(largest), int(spans)];
            let across = (largest * TILE).div_ceil(256);
            let grid = Grid { blocks: (count, across, 1), threads: (256, 1), shared: 0 };
            device.launch(device.kernels.add_tiles, grid, &args)?;
        }
        let dropped = if dropping && tiles.is_none() {
            scratch.alloc(rows * self.inputs * device.float.size())?
        } else {
            0
        };
        let dropped = Mat { at: dropped, ld: self.inputs };
        for module in &self.modules {
            let own = device.part(g, 0, module.start);
            if let Some(dw) = module.weight {
                let size = (module.outputs, self.inputs, rows);
                device.matmul(size, own.t(), x.n(), sum(dw, self.inputs, 1.0))?;
            }
            if let Some(db) = module.bias {
                let none = Mat { at: 0, ld: 0 };
                let sums = (None, Some(db));
                device.column_sums(scratch, (none, own), None, sums, (rows, module.outputs), 1)?;
            }
            let Some(adapter) = module.adapter.as_ref().filter(|_| tiles.is_none()) else {
                continue;
            };
            let x = match adapter.dropout.mask(mode) {
                Some(mask) => {
                    device.drop_elements(mask, (x, dropped), (rows, self.inputs), false)?;
                    dropped
                }
                None => x,
            };
            let dz = device.part(g, 0, self.outputs + adapter.offset);
            let da = sum(adapter.a, self.inputs, 1.0);
            device.matmul((adapter.r, self.inputs, rows), dz.t(), x.n(), da)?;
        }
        for module in &self.modules {
            let Some(adapter) = module.adapter.as_ref().filter(|_| tiles.is_none()) else {
                continue;
            };
            let own = device.part(g, 0, module.start);
            let z = device.part(ranks, 0, adapter.offset);
            let db = sum(adapter.b, adapter.r, self.scaling);
            device.matmul((module.outputs, adapter.r, rows), own.t(), z.n(), db)?;
        }
        scratch.release(mark);
        Ok(())
    }
}

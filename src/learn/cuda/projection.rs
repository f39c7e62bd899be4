//! Linear layers that read the same input, as one product.
//!
//! With adapters, weight and adapter are one matrix too. Of `[W | s B]` above `[A | -]`
//!
//! ```text
//!            in      ranks
//!        +---------+-------+
//!   out  |    W    |  s B  |      y  = [x | z] [W | s B]^T      z  = x A^T
//!        +---------+-------+      dx = [g | dz] [W ; A]         dz = g s B
//!  ranks |    A    |   -   |
//!        +---------+-------+
//! ```
//!
//! the forward reads the upper rows and the backward the left columns, so that an adapter costs no
//! pass over the activations beside the one that gives `z`. Activations therefore have room for
//! the ranks at the end of their rows. A quantized weight is unpacked for each product,
//! with the adapter beside it.

mod builder;
mod dropped;
mod gradients;

use anyhow::Result;

pub(super) use self::builder::{Builder, trained_name, upload_map};
use super::arena::Arena;
use super::device::{Device, Grid, Mat, float, int};
use super::matmul::Target;
use crate::learn::linear::{Dropout, Mode};
use crate::learn::ops::Mask;

/// Ranks are padded to this, so that every access is 16 bytes wide.
const RANKS: usize = 8;

/// As `Packed` in kernels.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Packed {
    packed: u64,
    codes: u64,
    scales: u64,
    offset: f32,
    rows: i32,
    cols: i32,
    start: i32,
    round: i32,
}

/// As `Adapter` in kernels.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct Adapter {
    a: u64,
    b: u64,
    to: u64,
    r: i32,
    inputs: i32,
    outputs: i32,
    start: i32,
    offset: i32,
    ranks: i32,
    below: i32,
    last: i32,
    scale: f32,
    ld: i32,
}

/// As `Tile` in kernels.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Tile {
    to: u64,
    of_gradient: i32,
    col: i32,
    width: i32,
    rank: i32,
    r: i32,
    ld: i32,
    scale: f32,
    mask: i32,
    each: i32,
}

/// A root-mean-square norm that a projection's input comes from: its weight, and a factor of each
/// row.
#[derive(Debug, Clone, Copy)]
pub(super) struct Behind {
    pub(super) weight: u64,
    pub(super) rstd: u64,
}

/// Columns and ranks of a [`Tile`] at most.
const TILE: usize = 64;

/// As `Copy` in kernels.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct TrainedCopy {
    from: u64,
    to: u64,
    rows: i32,
    cols: i32,
    ld: i32,
}

/// Descriptions on the GPU of parts that one launch works on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Parts {
    at: u64,
    count: usize,
    /// Elements of the largest; of tiles, the most ranks.
    largest: usize,
}

impl Parts {
    pub(super) fn new<T: Copy>(
        device: &Device,
        arena: &Arena,
        parts: &[T],
        largest: usize,
    ) -> Result<Self> {
        let at = arena.alloc(size_of_val(parts))?;
        device.upload(at, parts)?;
        device.synchronize()?;
        Ok(Self { at, count: parts.len(), largest })
    }

    /// The same of parts that each come with their number of elements; none if there are none.
    pub(super) fn of<T: Copy>(
        device: &Device,
        arena: &Arena,
        parts: Vec<(T, usize)>,
    ) -> Result<Option<Self>> {
        let largest = parts.iter().map(|p| p.1).max();
        let parts: Vec<T> = parts.into_iter().map(|p| p.0).collect();
        largest.map(|largest| Self::new(device, arena, &parts, largest)).transpose()
    }

    /// A launch over all parts, a thread for `each` elements of the largest.
    fn grid(&self, each: usize) -> Grid {
        let blocks = (self.largest / each).div_ceil(256).clamp(1, 4096);
        Grid { blocks: (blocks, self.count, 1), threads: (256, 1), shared: 0 }
    }
}

/// The part of a projection that is one module of the model.
#[derive(Debug)]
struct Module {
    start: usize,
    outputs: usize,
    /// Gradient of the weight, where it is trained.
    weight: Option<u64>,
    /// Gradient of the bias, where it is trained.
    bias: Option<u64>,
    adapter: Option<ModuleAdapter>,
}

#[derive(Debug)]
struct ModuleAdapter {
    r: usize,
    offset: usize,
    /// Gradients.
    a: u64,
    b: u64,
    dropout: Dropout,
}

#[derive(Debug)]
enum Weight {
    /// In place, adapters beside it.
    Here(u64),
    /// In 4 bits.
    Packed(Parts),
}

/// Linear layers with one input.
#[derive(Debug)]
pub(super) struct Projection {
    pub(super) inputs: usize,
    pub(super) outputs: usize,
    /// All ranks, padded.
    pub(super) ranks: usize,
    scaling: f32,
    weight: Weight,
    bias: Option<u64>,
    adapters: Option<Parts>,
    /// The adapters' gradients in tiles, where a kernel computes them.
    tiles: Option<Parts>,
    modules: Vec<Module>,
}

/// What projections of one model share.
#[derive(Debug)]
pub(super) struct Shared {
    /// The map of the scales' codes.
    pub(super) map: u64,
}

impl Device {
    /// Renews the copies of trained tensors.
    pub(super) fn renew(&self, parts: &Parts) -> Result<()> {
        self.launch(self.kernels.copy_trained, parts.grid(4), &[parts.at])
    }

    /// Puts adapters beside their weights, those of quantized ones into `unpacked`.
    pub(super) fn place(&self, parts: &Parts, unpacked: u64) -> Result<()> {
        self.launch(self.kernels.place_adapters, parts.grid(4), &[parts.at, unpacked])
    }

    /// `y = mask x`, or `y += mask x`, over `[rows, cols]`.
    pub(super) fn drop_elements(
        &self,
        mask: Mask,
        (x, y): (Mat, Mat),
        (rows, cols): (usize, usize),
        add: bool,
    ) -> Result<()> {
        let (stream, threshold, keep) = mask.parts();
        let ([k0, k1], [h0, h1]) = stream.words_of_state();
        let args = [
            x.at,
            int(x.ld),
            y.at,
            int(y.ld),
            int(rows),
            int(cols),
            k0.into(),
            k1.into(),
            h0.into(),
            h1.into(),
            threshold.into(),
            float(keep.into()),
            int(usize::from(add)),
        ];
        let grid = Grid::each((rows * cols).div_ceil(64) * 16);
        self.launch(self.kernels.dropout, grid, &args)
    }
}

impl Projection {
    /// Elements of a row of the input, with room for the ranks.
    pub(super) fn in_ld(&self) -> usize {
        self.inputs + self.ranks
    }

    /// Elements of a row of the output's gradient, with room for the ranks.
    pub(super) fn out_ld(&self) -> usize {
        self.outputs + self.ranks
    }

    /// The ranks at the end of the rows of its input.
    pub(super) fn ranks_in(&self, device: &Device, x: Mat) -> Mat {
        device.part(x, 0, self.inputs)
    }

    /// Whether anything in it is trained.
    pub(super) fn trains(&self) -> bool {
        self.ranks > 0 || self.modules.iter().any(|m| m.weight.is_some() || m.bias.is_some())
    }

    /// Whether its backward needs the input again.
    pub(super) fn reads_input(&self) -> bool {
        self.ranks > 0 || self.modules.iter().any(|m| m.weight.is_some())
    }

    /// Whether its backward takes what a norm read in place of what it gave, see [`Behind`].
    pub(super) fn norms_input(&self) -> bool {
        self.tiles.is_some() && self.modules.iter().all(|m| m.weight.is_none())
    }

    fn adapters_of_modules(&self) -> impl Iterator<Item = &ModuleAdapter> {
        self.modules.iter().filter_map(|module| module.adapter.as_ref())
    }

    /// Whether elements of its adapters' inputs are dropped.
    fn drops(&self, mode: Mode) -> bool {
        self.adapters_of_modules().any(|adapter| adapter.dropout.mask(mode).is_some())
    }

    /// The weight with the adapters beside it; a quantized one is unpacked on top of `scratch`.
    fn matrix(&self, device: &Device, shared: &Shared, scratch: &Arena) -> Result<Mat> {
        let ld = self.in_ld();
        let parts = match &self.weight {
            Weight::Here(at) => return Ok(Mat { at: *at, ld }),
            Weight::Packed(parts) => parts,
        };
        let at = self.room(device, scratch)?;
        // Parts of either kind are the projection's modules.
        let adapters = self.adapters.as_ref().map_or(0, |adapters| adapters.at);
        let args = [parts.at, adapters, shared.map, at, int(ld)];
        device.launch(device.kernels.nf4_dequantize, parts.grid(8), &args)?;
        Ok(Mat { at, ld })
    }

    /// Room for an unpacked weight and its adapters.
    fn room(&self, device: &Device, scratch: &Arena) -> Result<u64> {
        scratch.alloc(self.out_ld() * self.in_ld() * device.float.size())
    }

    /// `z = x A^T` at the end of the rows of `x` (after dropout of each adapter's own, which leaves
    /// what it keeps at `kept`, if that is not 0).
    fn ranks_of(
        &self,
        device: &Device,
        scratch: &Arena,
        (x, weight, kept): (Mat, Mat, u64),
        rows: usize,
        mode: Mode,
    ) -> Result<()> {
        let z = self.ranks_in(device, x);
        let a = device.part(weight, self.outputs, 0);
        let target = |to| Target { to, float: device.float, plus: None, bias: None, alpha: 1.0 };
        if !self.drops(mode) {
            return device.matmul((rows, self.ranks, self.inputs), x.n(), a.t(), target(z));
        }
        if let (Some(kernels), true) = (device.adapters, kept != 0) {
            return self.dropped_ranks(device, kernels, (x, a, z, kept), rows, mode);
        }
        let mark = scratch.mark();
        let dropped =
            Mat { at: scratch.alloc(rows * self.inputs * device.float.size())?, ld: self.inputs };
        for adapter in self.adapters_of_modules() {
            let Some(mask) = adapter.dropout.mask(mode) else { continue };
            device.drop_elements(mask, (x, dropped), (rows, self.inputs), false)?;
            let z = device.part(z, 0, adapter.offset);
            let a = device.part(a, adapter.offset, 0);
            // The last also fills the padding, with zeros.
            let last = adapter.offset + adapter.r + RANKS > self.ranks;
            let r = if last { self.ranks - adapter.offset } else { adapter.r };
            device.matmul((rows, r, self.inputs), dropped.n(), a.t(), target(z))?;
        }
        scratch.release(mark);
        Ok(())
    }

    /// `y = x W^T + bias + plus`, with the adapters; fills the ranks of `x` and `kept`.
    pub(super) fn forward(
        &self,
        device: &Device,
        shared: &Shared,
        scratch: &Arena,
        (x, y, plus, kept): (Mat, Mat, Option<Mat>, u64),
        rows: usize,
        mode: Mode,
    ) -> Result<()> {
        let mark = scratch.mark();
        let weight = self.matrix(device, shared, scratch)?;
        if self.ranks > 0 {
            self.ranks_of(device, scratch, (x, weight, kept), rows, mode)?;
        }
        let size = (rows, self.outputs, self.in_ld());
        let target = Target { to: y, float: device.float, plus, bias: self.bias, alpha: 1.0 };
        device.matmul(size, x.n(), weight.t(), target)?;
        scratch.release(mark);
        Ok(())
    }

    /// From the gradient `g` of the output, whose ranks it fills, and what the forward kept, the
    /// gradient of the input, plus `plus`.
    pub(super) fn input_gradient(
        &self,
        device: &Device,
        shared: &Shared,
        scratch: &Arena,
        (g, dx, plus, kept): (Mat, Mat, Option<Mat>, u64),
        rows: usize,
        mode: Mode,
    ) -> Result<()> {
        let mark = scratch.mark();
        let weight = self.matrix(device, shared, scratch)?;
        self.ranks_of_gradient(device, (g, weight), rows)?;
        let target = Target { to: dx, float: device.float, plus, bias: None, alpha: 1.0 };
        if !self.drops(mode) {
            let size = (rows, self.inputs, self.out_ld());
            device.matmul(size, g.n(), weight.n(), target)?;
            scratch.release(mark);
            return Ok(());
        }
        let size = (rows, self.inputs, self.outputs);
        if let (Some(kernels), true) = (device.adapters, kept != 0) {
            let dz = device.part(g, 0, self.outputs);
            let a = device.part(weight, self.outputs, 0);
            self.dropped_gradient(device, kernels, (dz, a, kept, plus, dx), rows, mode)?;
            device.matmul(size, g.n(), weight.n(), Target { plus: Some(dx), ..target })?;
            scratch.release(mark);
            return Ok(());
        }
        device.matmul(size, g.n(), weight.n(), target)?;
        let part =
            Mat { at: scratch.alloc(rows * self.inputs * device.float.size())?, ld: self.inputs };
        for adapter in self.adapters_of_modules() {
            let Some(mask) = adapter.dropout.mask(mode) else { continue };
            let dz = device.part(g, 0, self.outputs + adapter.offset);
            let a = device.part(weight, self.outputs + adapter.offset, 0);
            let target =
                Target { to: part, float: device.float, plus: None, bias: None, alpha: 1.0 };
            device.matmul((rows, self.inputs, adapter.r), dz.n(), a.n(), target)?;
            device.drop_elements(mask, (part, dx), (rows, self.inputs), true)?;
        }
        scratch.release(mark);
        Ok(())
    }

    /// `dz = g s B` at the end of the rows of `g`.
    fn ranks_of_gradient(
        &self,
        device: &Device,
        (g, weight): (Mat, Mat),
        rows: usize,
    ) -> Result<()> {
        if self.ranks == 0 {
            return Ok(());
        }
        let dz = device.part(g, 0, self.outputs);
        let b = device.part(weight, 0, self.inputs);
        let target = Target { to: dz, float: device.float, plus: None, bias: None, alpha: 1.0 };
        device.matmul((rows, self.ranks, self.outputs), g.n(), b.n(), target)
    }

    /// The same where the gradient of the input is not wanted.
    pub(super) fn only_ranks(
        &self,
        device: &Device,
        scratch: &Arena,
        g: Mat,
        rows: usize,
    ) -> Result<()> {
        if self.ranks == 0 {
            return Ok(());
        }
        let mark = scratch.mark();
        let weight = self.beside(device, scratch)?;
        self.ranks_of_gradient(device, (g, weight), rows)?;
        scratch.release(mark);
        Ok(())
    }

    /// Fills the ranks of an input that was computed again, and `kept`.
    pub(super) fn fill_ranks(
        &self,
        device: &Device,
        scratch: &Arena,
        (x, kept): (Mat, u64),
        rows: usize,
        mode: Mode,
    ) -> Result<()> {
        if self.ranks == 0 {
            return Ok(());
        }
        let mark = scratch.mark();
        let weight = self.beside(device, scratch)?;
        self.ranks_of(device, scratch, (x, weight, kept), rows, mode)?;
        scratch.release(mark);
        Ok(())
    }

    /// The adapters where [`Projection::matrix`] has them; a quantized weight is not unpacked.
    fn beside(&self, device: &Device, scratch: &Arena) -> Result<Mat> {
        let ld = self.in_ld();
        if let Weight::Here(at) = &self.weight {
            return Ok(Mat { at: *at, ld });
        }
        let at = self.room(device, scratch)?;
        if let Some(adapters) = &self.adapters {
            device.place(adapters, at)?;
        }
        Ok(Mat { at, ld })
    }
}

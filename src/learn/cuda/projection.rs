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
//! the ranks at the end of their rows. A quantized weight is unpacked into one buffer that all
//! layers share, with the adapter beside it.

use anyhow::{Context as _, Result, bail, ensure};
use candle_core::{CpuStorage, DType, Storage, Tensor};
use half::bf16;

use super::arena::Arena;
use super::device::{Device, Float, Grid, Mat, float, int};
use super::matmul::Target;
use super::trained::Trained;
use crate::learn::linear::{Held, Parameters};
use crate::learn::load::PEFT;
use crate::learn::nf4::{Nf4, dynamic_map};
use crate::learn::ops::Frozen;
use crate::learn::random::Stream;

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
    /// Elements of the largest.
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
    dropout: Stream,
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
    dropout: f64,
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
    /// The buffer that quantized weights are unpacked into.
    pub(super) unpacked: u64,
    /// The map of the scales' codes.
    pub(super) map: u64,
}

/// Numbers of a tensor as f32 or bf16 bytes.
pub(super) fn upload(device: &Device, to: Mat, tensor: &Tensor, float: Float) -> Result<()> {
    let (rows, width) = match tensor.dims() {
        [rows, width] => (*rows, *width),
        [width] => (1, *width),
        other => bail!("a tensor of {other:?}"),
    };
    let tensor = tensor.contiguous()?;
    if float == Float::F32 {
        let values = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        return device.upload_rows(to, &values, width);
    }
    let (storage, layout) = tensor.storage_and_layout();
    let range = layout.start_offset()..layout.start_offset() + rows * width;
    match &*storage {
        Storage::Cpu(CpuStorage::BF16(values)) => device.upload_rows(to, &values[range], width),
        Storage::Cpu(CpuStorage::F32(values)) => {
            use rayon::prelude::*;
            let values: Vec<bf16> = values[range].par_iter().map(|x| bf16::from_f32(*x)).collect();
            device.upload_rows(to, &values, width)
        }
        _ => {
            drop(storage);
            let values = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
            let values: Vec<bf16> = values.into_iter().map(bf16::from_f32).collect();
            device.upload_rows(to, &values, width)
        }
    }
}

/// Builds projections out of a model's tensors.
pub(super) struct Builder<'a> {
    pub(super) device: &'a Device,
    pub(super) arena: &'a Arena,
    pub(super) parameters: &'a Parameters,
    pub(super) trained: &'a Trained,
    /// Copies of trained tensors to be renewed after each update, with the elements of each.
    pub(super) copies: Vec<(TrainedCopy, usize)>,
    /// Adapters beside weights that stay, likewise: they are placed after each update.
    pub(super) placed: Vec<(Adapter, usize)>,
    /// Room for the largest unpacked weight, in bytes.
    pub(super) unpacked: usize,
}

/// The name under which a tensor of the model is trained.
pub(super) fn trained_name(trained: &Trained, name: &str) -> Option<String> {
    [name.to_owned(), format!("{PEFT}{name}")].into_iter().find(|n| trained.has(n))
}

impl Builder<'_> {
    fn held(&self, name: &str) -> Result<&Held> {
        let found = self.parameters.held.get(name);
        found.map(|(held, _)| held).with_context(|| format!("no tensor `{name}`"))
    }

    /// A tensor as f32 on the GPU: where it is trained its values, else a copy.
    pub(super) fn wide(&mut self, name: &str) -> Result<u64> {
        if let Some(name) = trained_name(self.trained, name) {
            return self.trained.value(&name);
        }
        let Held::Frozen(Frozen::Dense(tensor)) = self.held(name)? else {
            bail!("`{name}` is not a plain tensor");
        };
        let at = self.arena.alloc(4 * tensor.elem_count())?;
        let mat = Mat { at, ld: tensor.dims().last().copied().unwrap_or(0) };
        upload(self.device, mat, tensor, Float::F32)?;
        Ok(at)
    }

    /// A matrix or vector in the type of the arithmetic, renewed after each update if it is
    /// trained.
    pub(super) fn narrow(&mut self, name: &str) -> Result<u64> {
        let (rows, cols, size) = self.dims(name)?;
        let at = self.arena.alloc(size)?;
        self.fill(name, Mat { at, ld: cols }, rows, cols)?;
        Ok(at)
    }

    fn dims(&self, name: &str) -> Result<(usize, usize, usize)> {
        let (rows, cols) = match self.held(name)? {
            Held::Trained(var) => shape(var),
            Held::Frozen(Frozen::Dense(tensor)) => shape(tensor),
            Held::Frozen(other) => other.dims(),
        };
        Ok((rows, cols, rows * cols * self.device.float.size()))
    }

    fn fill(&mut self, name: &str, to: Mat, rows: usize, cols: usize) -> Result<()> {
        if let Some(own) = trained_name(self.trained, name) {
            let from = self.trained.value(&own)?;
            let copy = TrainedCopy {
                from,
                to: to.at,
                rows: i32::try_from(rows)?,
                cols: i32::try_from(cols)?,
                ld: i32::try_from(to.ld)?,
            };
            self.copies.push((copy, rows * cols));
            return Ok(());
        }
        match self.held(name)? {
            Held::Frozen(Frozen::Dense(tensor)) => {
                upload(self.device, to, tensor, self.device.float)
            }
            _ => bail!("`{name}` is not a plain tensor"),
        }
    }

    fn packed(&self, nf4: &Nf4, start: usize) -> Result<Packed> {
        let parts = nf4.parts();
        let put = |bytes: &[u8]| -> Result<u64> {
            let at = self.arena.alloc(bytes.len())?;
            self.device.upload(at, bytes)?;
            Ok(at)
        };
        let floats = |values: &[f32]| -> Result<u64> {
            let at = self.arena.alloc(4 * values.len())?;
            self.device.upload(at, values)?;
            Ok(at)
        };
        let (rows, cols) = nf4.dims();
        ensure!(cols.is_multiple_of(64), "a quantized matrix with rows of {cols}");
        Ok(Packed {
            packed: put(parts.packed)?,
            codes: parts.codes.map(put).transpose()?.unwrap_or(0),
            scales: floats(parts.scales)?,
            offset: parts.offset,
            rows: i32::try_from(rows)?,
            cols: i32::try_from(cols)?,
            start: i32::try_from(start)?,
            round: match parts.dtype {
                DType::BF16 => 1,
                DType::F16 => 2,
                _ => 0,
            },
        })
    }

    /// Modules of the model that read the same input.
    ///
    /// # Errors
    /// When a tensor is missing, or sizes are not multiples of 8.
    pub(super) fn projection(&mut self, names: &[String]) -> Result<Projection> {
        let mut dims = Vec::new();
        for name in names {
            let (outputs, inputs, _) = self.dims(&format!("{name}.weight"))?;
            ensure!(
                inputs.is_multiple_of(8),
                "`{name}` has {inputs} inputs; the GPU computes with multiples of 8"
            );
            dims.push((outputs, inputs));
        }
        let inputs = dims.first().context("no modules")?.1;
        let outputs = dims.iter().map(|d| d.0).sum();
        let (mut modules, mut adapters, mut offset, mut start) = (vec![], vec![], 0, 0);
        let of = |name: &String| self.parameters.adapters.get(name);
        let rank = |name| of(name).map_or(Ok(0), |a| a.a.dims2().map(|d| d.0));
        let ranks: usize = names.iter().map(rank).sum::<Result<usize, _>>()?;
        let ranks = ranks.next_multiple_of(RANKS);
        let ld = inputs + ranks;
        let scale = self.parameters.scaling;
        for (i, (name, (outputs, _))) in names.iter().zip(&dims).enumerate() {
            let r = rank(name)?;
            let mut part = Adapter {
                a: 0,
                b: 0,
                to: 0,
                r: i32::try_from(r)?,
                inputs: i32::try_from(inputs)?,
                outputs: i32::try_from(*outputs)?,
                start: i32::try_from(start)?,
                offset: i32::try_from(offset)?,
                ranks: i32::try_from(ranks)?,
                below: 0,
                last: i32::from(i + 1 == names.len()),
                scale: scale as f32,
                ld: i32::try_from(ld)?,
            };
            let mut adapter = None;
            if r > 0 {
                let own = |m: &str| format!("{PEFT}{name}.lora_{m}.weight");
                part.a = self.trained.value(&own("A"))?;
                part.b = self.trained.value(&own("B"))?;
                let seed = self.parameters.seed;
                adapter = Some(ModuleAdapter {
                    r,
                    offset,
                    a: self.trained.gradient(&own("A"))?,
                    b: self.trained.gradient(&own("B"))?,
                    dropout: Stream::new(seed, &format!("dropout/lora/{name}")),
                });
            }
            adapters.push(part);
            let gradient = |name: String| {
                trained_name(self.trained, &name).map(|n| self.trained.gradient(&n)).transpose()
            };
            modules.push(Module {
                start,
                outputs: *outputs,
                weight: gradient(format!("{name}.weight"))?,
                bias: gradient(format!("{name}.bias"))?,
                adapter,
            });
            offset += r;
            start += outputs;
        }
        for part in &mut adapters {
            part.below = i32::try_from(start)?;
        }
        let biased = names.iter().all(|n| self.parameters.held.contains_key(&format!("{n}.bias")));
        let bias = if biased {
            let size = self.device.float.size();
            let at = self.arena.alloc(size * start)?;
            for (name, module) in names.iter().zip(&modules) {
                let to = Mat { at: at + (size * module.start) as u64, ld: module.outputs };
                self.fill(&format!("{name}.bias"), to, 1, module.outputs)?;
            }
            Some(at)
        } else {
            None
        };
        let bytes = (start + ranks) * ld * self.device.float.size();
        let largest = |p: &Adapter| {
            (p.ranks as usize) * (p.inputs as usize) + (p.outputs as usize) * (p.ranks as usize)
        };
        let most = adapters.iter().map(largest).max().unwrap_or(0);
        let mut quantized = Vec::new();
        for (name, module) in names.iter().zip(&modules) {
            if let Held::Frozen(Frozen::Nf4(nf4)) = self.held(&format!("{name}.weight"))? {
                quantized.push(self.packed(&nf4.clone(), module.start)?);
            }
        }
        let weight = if quantized.is_empty() {
            let at = self.arena.alloc(bytes)?;
            self.device.zero(at, bytes)?;
            for (name, module) in names.iter().zip(&modules) {
                let first = module.start * ld * self.device.float.size();
                let to = Mat { at: at + first as u64, ld };
                self.fill(&format!("{name}.weight"), to, module.outputs, inputs)?;
            }
            for part in &mut adapters {
                part.to = at;
            }
            if ranks > 0 {
                self.placed.extend(adapters.iter().map(|part| (*part, most)));
            }
            Weight::Here(at)
        } else {
            ensure!(quantized.len() == names.len(), "some of {names:?} are quantized, some not");
            self.unpacked = self.unpacked.max(bytes);
            let most = dims.iter().map(|d| d.0 * d.1).max().unwrap_or(0);
            Weight::Packed(Parts::new(self.device, self.arena, &quantized, most)?)
        };
        let quantized = matches!(weight, Weight::Packed(_));
        let adapters = (ranks > 0 && quantized)
            .then(|| Parts::new(self.device, self.arena, &adapters, most))
            .transpose()?;
        let tiles = self.tiles(&modules, inputs, ranks)?;
        Ok(Projection {
            inputs,
            outputs: start,
            ranks,
            scaling: scale as f32,
            dropout: self.parameters.adapter_dropout,
            weight,
            bias,
            adapters,
            tiles,
            modules,
        }
        .checked(outputs))
    }

    /// The gradients of a projection's adapters in tiles, if the kernel can compute them.
    fn tiles(&self, modules: &[Module], inputs: usize, ranks: usize) -> Result<Option<Parts>> {
        let adapters = || modules.iter().filter_map(|m| m.adapter.as_ref().map(|a| (m, a)));
        let fits = ranks > 0
            && self.device.adapter_gradients.is_some()
            && adapters()
                .all(|(m, a)| a.r <= TILE && a.r.is_multiple_of(8) && m.start.is_multiple_of(8));
        if !fits {
            return Ok(None);
        }
        let outputs: usize = modules.iter().map(|m| m.outputs).sum();
        let mut tiles = Vec::new();
        for (module, adapter) in adapters() {
            let mut push = |columns: usize, of_gradient: bool| -> Result<()> {
                for col in (0..columns).step_by(TILE) {
                    // A is [r, in], B is [out, r].
                    let (base, ld, start, rank) = match of_gradient {
                        false => (adapter.a + 4 * col as u64, inputs, 0, outputs),
                        true => {
                            let at = adapter.b + 4 * (col * adapter.r) as u64;
                            (at, adapter.r, module.start, inputs)
                        }
                    };
                    tiles.push(Tile {
                        to: base,
                        of_gradient: i32::from(of_gradient),
                        col: i32::try_from(start + col)?,
                        width: i32::try_from(TILE.min(columns - col))?,
                        rank: i32::try_from(rank + adapter.offset)?,
                        r: i32::try_from(adapter.r)?,
                        ld: i32::try_from(ld)?,
                        scale: if of_gradient { self.parameters.scaling as f32 } else { 1.0 },
                    });
                }
                Ok(())
            };
            push(inputs, false)?;
            push(module.outputs, true)?;
        }
        Parts::new(self.device, self.arena, &tiles, tiles.len()).map(Some)
    }
}

fn shape(tensor: &Tensor) -> (usize, usize) {
    match tensor.dims() {
        [rows, cols] => (*rows, *cols),
        [n] => (1, *n),
        _ => (0, 0),
    }
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
        stream: Stream,
        p: f64,
        (x, y): (Mat, Mat),
        (rows, cols): (usize, usize),
        add: bool,
    ) -> Result<()> {
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
            u64::from((p * 2f64.powi(32)) as u32),
            float(1.0 / (1.0 - p)),
            int(usize::from(add)),
        ];
        let grid = Grid::each((rows * cols).div_ceil(64) * 16);
        self.launch(self.kernels.dropout, grid, &args)
    }
}

impl Projection {
    fn checked(self, outputs: usize) -> Self {
        debug_assert_eq!(self.outputs, outputs);
        self
    }

    /// Elements of a row of the input, with room for the ranks.
    pub(super) fn in_ld(&self) -> usize {
        self.inputs + self.ranks
    }

    /// Elements of a row of the output's gradient, with room for the ranks.
    pub(super) fn out_ld(&self) -> usize {
        self.outputs + self.ranks
    }

    /// Whether anything in it is trained.
    pub(super) fn trains(&self) -> bool {
        self.ranks > 0 || self.modules.iter().any(|m| m.weight.is_some() || m.bias.is_some())
    }

    /// Whether its backward needs the input again.
    pub(super) fn reads_input(&self) -> bool {
        self.ranks > 0 || self.modules.iter().any(|m| m.weight.is_some())
    }

    fn drops(&self, step: Option<u64>) -> Option<u64> {
        step.filter(|_| self.dropout > 0.0 && self.ranks > 0)
    }

    /// The weight with the adapters beside it.
    fn matrix(&self, device: &Device, shared: &Shared) -> Result<Mat> {
        let ld = self.in_ld();
        let parts = match &self.weight {
            Weight::Here(at) => return Ok(Mat { at: *at, ld }),
            Weight::Packed(parts) => parts,
        };
        let at = shared.unpacked;
        let args = [parts.at, shared.map, at, int(ld)];
        device.launch(device.kernels.nf4_dequantize, parts.grid(8), &args)?;
        if let Some(adapters) = &self.adapters {
            device.place(adapters, at)?;
        }
        Ok(Mat { at, ld })
    }

    fn offset(device: &Device, mat: Mat, rows: usize, cols: usize) -> Mat {
        let elements = rows * mat.ld + cols;
        Mat { at: mat.at + (elements * device.float.size()) as u64, ld: mat.ld }
    }

    /// `z = x A^T` at the end of the rows of `x` (after dropout of each adapter's own).
    fn ranks_of(
        &self,
        device: &Device,
        scratch: &Arena,
        (x, weight): (Mat, Mat),
        rows: usize,
        step: Option<u64>,
    ) -> Result<()> {
        let z = Self::offset(device, x, 0, self.inputs);
        let a = Self::offset(device, weight, self.outputs, 0);
        let target = |to| Target { to, float: device.float, plus: None, bias: None, alpha: 1.0 };
        let Some(step) = self.drops(step) else {
            return device.matmul((rows, self.ranks, self.inputs), x.n(), a.t(), target(z));
        };
        let mark = scratch.mark();
        let dropped =
            Mat { at: scratch.alloc(rows * self.inputs * device.float.size())?, ld: self.inputs };
        for adapter in self.modules.iter().filter_map(|m| m.adapter.as_ref()) {
            let mask = adapter.dropout.at(step);
            let size = (rows, self.inputs);
            device.drop_elements(mask, self.dropout, (x, dropped), size, false)?;
            let z = Self::offset(device, z, 0, adapter.offset);
            let a = Self::offset(device, a, adapter.offset, 0);
            // The last also fills the padding, with zeros.
            let last = adapter.offset + adapter.r + RANKS > self.ranks;
            let r = if last { self.ranks - adapter.offset } else { adapter.r };
            device.matmul((rows, r, self.inputs), dropped.n(), a.t(), target(z))?;
        }
        scratch.release(mark);
        Ok(())
    }

    /// `y = x W^T + bias + plus`, with the adapters; fills the ranks of `x`. `step` is that of
    /// training, for dropout.
    pub(super) fn forward(
        &self,
        device: &Device,
        shared: &Shared,
        scratch: &Arena,
        (x, y, plus): (Mat, Mat, Option<Mat>),
        rows: usize,
        step: Option<u64>,
    ) -> Result<()> {
        let weight = self.matrix(device, shared)?;
        if self.ranks > 0 {
            self.ranks_of(device, scratch, (x, weight), rows, step)?;
        }
        let size = (rows, self.outputs, self.in_ld());
        let target = Target { to: y, float: device.float, plus, bias: self.bias, alpha: 1.0 };
        device.matmul(size, x.n(), weight.t(), target)
    }

    /// From the gradient `g` of the output, whose ranks it fills, the gradient of the input, plus
    /// `plus`.
    pub(super) fn input_gradient(
        &self,
        device: &Device,
        shared: &Shared,
        scratch: &Arena,
        (g, dx, plus): (Mat, Mat, Option<Mat>),
        rows: usize,
        step: Option<u64>,
    ) -> Result<()> {
        let weight = self.matrix(device, shared)?;
        self.ranks_of_gradient(device, (g, weight), rows)?;
        let target = Target { to: dx, float: device.float, plus, bias: None, alpha: 1.0 };
        let Some(step) = self.drops(step) else {
            let size = (rows, self.inputs, self.out_ld());
            return device.matmul(size, g.n(), weight.n(), target);
        };
        device.matmul((rows, self.inputs, self.outputs), g.n(), weight.n(), target)?;
        let mark = scratch.mark();
        let part =
            Mat { at: scratch.alloc(rows * self.inputs * device.float.size())?, ld: self.inputs };
        for adapter in self.modules.iter().filter_map(|m| m.adapter.as_ref()) {
            let dz = Self::offset(device, g, 0, self.outputs + adapter.offset);
            let a = Self::offset(device, weight, self.outputs + adapter.offset, 0);
            let target =
                Target { to: part, float: device.float, plus: None, bias: None, alpha: 1.0 };
            device.matmul((rows, self.inputs, adapter.r), dz.n(), a.n(), target)?;
            let mask = adapter.dropout.at(step);
            device.drop_elements(mask, self.dropout, (part, dx), (rows, self.inputs), true)?;
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
        let dz = Self::offset(device, g, 0, self.outputs);
        let b = Self::offset(device, weight, 0, self.inputs);
        let target = Target { to: dz, float: device.float, plus: None, bias: None, alpha: 1.0 };
        device.matmul((rows, self.ranks, self.outputs), g.n(), b.n(), target)
    }

    /// The same where the gradient of the input is not wanted.
    pub(super) fn only_ranks(
        &self,
        device: &Device,
        shared: &Shared,
        g: Mat,
        rows: usize,
    ) -> Result<()> {
        if self.ranks == 0 {
            return Ok(());
        }
        let weight = self.matrix(device, shared)?;
        self.ranks_of_gradient(device, (g, weight), rows)
    }

    /// Fills the ranks of an input that was computed again.
    pub(super) fn fill_ranks(
        &self,
        device: &Device,
        shared: &Shared,
        scratch: &Arena,
        x: Mat,
        rows: usize,
        step: Option<u64>,
    ) -> Result<()> {
        if self.ranks == 0 {
            return Ok(());
        }
        // Only A is read: a quantized weight need not be unpacked for it.
        let ld = self.in_ld();
        let weight = match (&self.weight, &self.adapters) {
            (Weight::Packed(_), Some(adapters)) => {
                device.place(adapters, shared.unpacked)?;
                Mat { at: shared.unpacked, ld }
            }
            _ => self.matrix(device, shared)?,
        };
        self.ranks_of(device, scratch, (x, weight), rows, step)
    }

    /// Adds the gradients of what is trained, from the input and the gradient of the output, both
    /// with their ranks.
    pub(super) fn parameter_gradients(
        &self,
        device: &Device,
        scratch: &Arena,
        (x, g): (Mat, Mat),
        rows: usize,
        step: Option<u64>,
    ) -> Result<()> {
        let sum = |at, ld, alpha| {
            let to = Mat { at, ld };
            Target { to, float: Float::F32, plus: Some(to), bias: None, alpha }
        };
        let mark = scratch.mark();
        let dropping = self.drops(step);
        let tiles = self.tiles.as_ref().filter(|_| dropping.is_none());
        if let (Some(tiles), Some(kernel)) = (tiles, device.adapter_gradients) {
            // Fixed, so that sums do not depend on the card.
            let spans = (1024 / tiles.count).clamp(1, rows.div_ceil(TILE));
            let span = rows.div_ceil(spans).next_multiple_of(TILE);
            let spans = rows.div_ceil(span);
            let parts = scratch.alloc(4 * TILE * TILE * tiles.count * spans)?;
            let grid = Grid { blocks: (tiles.count, spans, 1), threads: (128, 1), shared: 0 };
            let args = [x.at, int(x.ld), g.at, int(g.ld), tiles.at, parts, int(rows), int(span)];
            device.launch(kernel, grid, &args)?;
            let args = [tiles.at, parts, int(spans)];
            device.launch(device.kernels.add_tiles, Grid::blocks(tiles.count, 256), &args)?;
        }
        let dropped = match dropping {
            Some(_) => scratch.alloc(rows * self.inputs * device.float.size())?,
            None => 0,
        };
        let dropped = Mat { at: dropped, ld: self.inputs };
        for module in &self.modules {
            let own = Self::offset(device, g, 0, module.start);
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
            let x = match dropping {
                Some(step) => {
                    let mask = adapter.dropout.at(step);
                    let size = (rows, self.inputs);
                    device.drop_elements(mask, self.dropout, (x, dropped), size, false)?;
                    dropped
                }
                None => x,
            };
            let dz = Self::offset(device, g, 0, self.outputs + adapter.offset);
            let da = sum(adapter.a, self.inputs, 1.0);
            device.matmul((adapter.r, self.inputs, rows), dz.t(), x.n(), da)?;
        }
        for module in &self.modules {
            let Some(adapter) = module.adapter.as_ref().filter(|_| tiles.is_none()) else {
                continue;
            };
            let own = Self::offset(device, g, 0, module.start);
            let z = Self::offset(device, x, 0, self.inputs + adapter.offset);
            let db = sum(adapter.b, adapter.r, self.scaling);
            device.matmul((module.outputs, adapter.r, rows), own.t(), z.n(), db)?;
        }
        scratch.release(mark);
        Ok(())
    }
}

/// The map of the scales' codes on the GPU.
pub(super) fn upload_map(device: &Device, arena: &Arena) -> Result<u64> {
    let at = arena.alloc(4 * 256)?;
    device.upload(at, dynamic_map().as_slice())?;
    device.synchronize()?;
    Ok(at)
}

//! From a model's tensors to projections on the GPU.

use anyhow::{Context as _, Result, bail, ensure};
use candle_core::{CpuStorage, DType, Storage, Tensor};
use half::bf16;

use super::dropped::MASKS;
use super::{
    Adapter, Module, ModuleAdapter, Packed, Parts, Projection, RANKS, TILE, Tile, TrainedCopy,
    Weight,
};
use crate::learn::cuda::arena::Arena;
use crate::learn::cuda::away::Pinned;
use crate::learn::cuda::device::{Device, Float, Mat};
use crate::learn::cuda::trained::Trained;
use crate::learn::linear::{Held, Parameters};
use crate::learn::load::PEFT;
use crate::learn::nf4::{Nf4, dynamic_map};
use crate::learn::ops::Frozen;

/// Numbers of a tensor as f32 or bf16 bytes.
pub(in crate::learn::cuda) fn upload(
    device: &Device,
    to: Mat,
    tensor: &Tensor,
    float: Float,
) -> Result<()> {
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
pub(in crate::learn::cuda) struct Builder<'a> {
    pub(in crate::learn::cuda) device: &'a Device,
    pub(in crate::learn::cuda) arena: &'a Arena,
    pub(in crate::learn::cuda) parameters: &'a Parameters,
    pub(in crate::learn::cuda) trained: &'a Trained,
    /// Copies of trained tensors to be renewed after each update, with the elements of each.
    pub(in crate::learn::cuda) copies: Vec<(TrainedCopy, usize)>,
    /// Adapters beside weights that stay, likewise: they are placed after each update.
    pub(in crate::learn::cuda) placed: Vec<(Adapter, usize)>,
    /// What was left on the host.
    pub(in crate::learn::cuda) pinned: Vec<Pinned>,
}

/// The name under which a tensor of the model is trained.
pub(in crate::learn::cuda) fn trained_name(trained: &Trained, name: &str) -> Option<String> {
    [name.to_owned(), format!("{PEFT}{name}")].into_iter().find(|n| trained.has(n))
}

impl Builder<'_> {
    fn held(&self, name: &str) -> Result<&Held> {
        let found = self.parameters.held.get(name);
        found.map(|(held, _)| held).with_context(|| format!("no tensor `{name}`"))
    }

    /// A tensor as f32 on the GPU: where it is trained its values, else a copy.
    pub(in crate::learn::cuda) fn wide(&mut self, name: &str) -> Result<u64> {
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
    pub(in crate::learn::cuda) fn narrow(&mut self, name: &str) -> Result<u64> {
        let (rows, cols, size) = self.dims(name)?;
        let at = self.arena.alloc(size)?;
        self.fill(name, Mat { at, ld: cols }, rows, cols)?;
        Ok(at)
    }

    /// The same in memory of the host, if that has the room.
    pub(in crate::learn::cuda) fn narrow_on_host(&mut self, name: &str) -> Result<Option<u64>> {
        let (rows, cols, size) = self.dims(name)?;
        let Some(pinned) = Pinned::new(self.device, size) else { return Ok(None) };
        let at = pinned.address();
        self.pinned.push(pinned);
        self.fill(name, Mat { at, ld: cols }, rows, cols)?;
        Ok(Some(at))
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
        ensure!(cols.is_multiple_of(8), "a quantized matrix with rows of {cols}");
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
    pub(in crate::learn::cuda) fn projection(&mut self, names: &[String]) -> Result<Projection> {
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
                adapter = Some(ModuleAdapter {
                    r,
                    offset,
                    a: self.trained.gradient(&own("A"))?,
                    b: self.trained.gradient(&own("B"))?,
                    dropout: self.parameters.lora_dropout(name),
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
            let bytes = (start + ranks) * ld * self.device.float.size();
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
            weight,
            bias,
            adapters,
            tiles,
            modules,
        })
    }

    /// The gradients of a projection's adapters in tiles, if the kernel can compute them.
    fn tiles(&self, modules: &[Module], inputs: usize, ranks: usize) -> Result<Option<Parts>> {
        let adapters = || modules.iter().filter_map(|m| m.adapter.as_ref().map(|a| (m, a)));
        let fits = ranks > 0
            && self.device.adapters.is_some()
            && adapters()
                .all(|(m, a)| a.r <= TILE && a.r.is_multiple_of(8) && m.start.is_multiple_of(8));
        // Each adapter then has a mask of its own, which kernels take 64 columns at a time.
        let dropping = self.parameters.adapter_dropout > 0.0;
        let r = adapters().map(|(_, a)| a.r).next().unwrap_or(0);
        let even = inputs.is_multiple_of(TILE) && adapters().all(|(_, a)| a.r == r);
        if !fits || dropping && (!even || adapters().count() > MASKS) {
            return Ok(None);
        }
        let outputs: usize = modules.iter().map(|m| m.outputs).sum();
        let mut tiles = Vec::new();
        let mut push = |columns: usize, tile: Tile| -> Result<()> {
            for col in (0..columns).step_by(TILE) {
                // A is [r, in], B is [out, r].
                let across = if tile.of_gradient == 1 { tile.ld as usize } else { 1 };
                tiles.push(Tile {
                    to: tile.to + 4 * (col * across) as u64,
                    col: tile.col + i32::try_from(col)?,
                    width: i32::try_from(TILE.min(columns - col))?,
                    ..tile
                });
            }
            Ok(())
        };
        // Those of modules that lie behind each other are one matrix. The kernel takes 16 ranks at
        // a time, by one mask.
        let joined = !dropping || r.is_multiple_of(16);
        let mut together: Vec<(u64, usize, usize)> = Vec::with_capacity(modules.len());
        for (_, adapter) in adapters() {
            match together.last_mut() {
                Some((a, offset, r))
                    if joined
                        && *a + (4 * *r * inputs) as u64 == adapter.a
                        && *offset + *r == adapter.offset
                        && *r + adapter.r <= TILE =>
                {
                    *r += adapter.r;
                }
                _ => together.push((adapter.a, adapter.offset, adapter.r)),
            }
        }
        for (a, offset, ranks) in together {
            let tile = Tile {
                to: a,
                of_gradient: 0,
                col: 0,
                width: 0,
                rank: i32::try_from(outputs + offset)?,
                r: i32::try_from(ranks)?,
                ld: i32::try_from(inputs)?,
                scale: 1.0,
                mask: i32::try_from(offset / r)?,
                each: i32::try_from(if dropping { r } else { ranks })?,
            };
            push(inputs, tile)?;
        }
        for (module, adapter) in adapters() {
            let tile = Tile {
                to: adapter.b,
                of_gradient: 1,
                col: i32::try_from(module.start)?,
                width: 0,
                rank: i32::try_from(adapter.offset)?,
                r: i32::try_from(adapter.r)?,
                ld: i32::try_from(adapter.r)?,
                scale: self.parameters.scaling as f32,
                mask: 0,
                each: i32::try_from(adapter.r)?,
            };
            push(module.outputs, tile)?;
        }
        let most = tiles.iter().map(|t| t.r as usize).max().unwrap_or(0);
        Parts::new(self.device, self.arena, &tiles, most).map(Some)
    }
}

fn shape(tensor: &Tensor) -> (usize, usize) {
    match tensor.dims() {
        [rows, cols] => (*rows, *cols),
        [n] => (1, *n),
        _ => (0, 0),
    }
}

/// The map of the scales' codes on the GPU.
pub(in crate::learn::cuda) fn upload_map(device: &Device, arena: &Arena) -> Result<u64> {
    let at = arena.alloc(4 * 256)?;
    device.upload(at, dynamic_map().as_slice())?;
    device.synchronize()?;
    Ok(at)
}

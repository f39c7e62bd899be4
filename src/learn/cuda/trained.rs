//! The trained parameters on the GPU: values, gradients and AdamW's moments in f32, each in one
//! run of memory.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use candle_core::{Device as Candle, Tensor, Var};

use super::arena::Arena;
use super::device::{Device, Grid, float};
use crate::learn::optimizer::{AdamWConfig, Decays};

/// Elements that one block of threads updates; also the unit of the norm's sums.
const CHUNK: usize = 8192;

/// A part of a parameter, as the kernels read it.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Chunk {
    start: i64,
    len: i32,
    decays: i32,
}

/// Where a parameter lies in each run.
#[derive(Debug, Clone)]
struct Place {
    start: usize,
    shape: Vec<usize>,
    chunks: std::ops::Range<usize>,
}

/// All trained parameters.
#[derive(Debug)]
pub(super) struct Trained {
    places: BTreeMap<String, Place>,
    len: usize,
    chunk_count: usize,
    values: u64,
    gradients: u64,
    mean: u64,
    square: u64,
    chunks: u64,
    sums: u64,
}

impl Trained {
    /// Puts parameters side by side in this order of names.
    ///
    /// # Errors
    /// When one is missing, or the GPU has no room for them.
    pub(super) fn new(
        device: &Device,
        arena: &Arena,
        order: &[String],
        parameters: &BTreeMap<String, Var>,
    ) -> Result<Self> {
        ensure!(order.len() == parameters.len(), "not every parameter has a place");
        let (mut places, mut chunks, mut len) = (BTreeMap::new(), Vec::new(), 0usize);
        for name in order {
            let var = parameters.get(name).with_context(|| format!("no parameter `{name}`"))?;
            let (n, first) = (var.elem_count(), chunks.len());
            let decays = i32::from(Decays::Weights.includes(name));
            for start in (0..n).step_by(CHUNK) {
                let (at, len) = ((len + start) as i64, CHUNK.min(n - start) as i32);
                chunks.push(Chunk { start: at, len, decays });
            }
            let place =
                Place { start: len, shape: var.dims().to_vec(), chunks: first..chunks.len() };
            places.insert(name.clone(), place);
            // Kernels read 8 at a time.
            len += n.next_multiple_of(8);
        }
        let run = || arena.alloc(4 * len);
        let all = Self {
            places,
            len,
            chunk_count: chunks.len(),
            values: run()?,
            gradients: run()?,
            mean: run()?,
            square: run()?,
            chunks: arena.alloc(chunks.len() * size_of::<Chunk>())?,
            sums: arena.alloc(chunks.len() * 8)?,
        };
        device.upload(all.chunks, &chunks)?;
        for at in [all.values, all.gradients, all.mean, all.square] {
            device.zero(at, 4 * len)?;
        }
        all.store(device, parameters)?;
        Ok(all)
    }

    /// Whether it is trained.
    pub(super) fn has(&self, name: &str) -> bool {
        self.places.contains_key(name)
    }

    fn place(&self, name: &str) -> Result<&Place> {
        self.places.get(name).with_context(|| format!("no parameter `{name}`"))
    }

    /// Address of a parameter's values.
    pub(super) fn value(&self, name: &str) -> Result<u64> {
        Ok(self.values + 4 * self.place(name)?.start as u64)
    }

    /// Address of a parameter's gradient.
    pub(super) fn gradient(&self, name: &str) -> Result<u64> {
        Ok(self.gradients + 4 * self.place(name)?.start as u64)
    }

    /// Takes values from the CPU.
    pub(super) fn store(&self, device: &Device, from: &BTreeMap<String, Var>) -> Result<()> {
        for (name, place) in &self.places {
            let var = from.get(name).with_context(|| format!("no parameter `{name}`"))?;
            let values = var.flatten_all()?.to_vec1::<f32>()?;
            device.upload(self.values + 4 * place.start as u64, &values)?;
        }
        device.synchronize()
    }

    fn run(&self, device: &Device, run: u64) -> Result<BTreeMap<String, Tensor>> {
        let all: Vec<f32> = device.download(run, self.len)?;
        let tensors = self.places.iter().map(|(name, place)| {
            let n: usize = place.shape.iter().product();
            let part = &all[place.start..place.start + n];
            Ok((name.clone(), Tensor::from_slice(part, place.shape.as_slice(), &Candle::Cpu)?))
        });
        tensors.collect()
    }

    /// Brings values to the CPU.
    pub(super) fn load(&self, device: &Device, into: &BTreeMap<String, Var>) -> Result<()> {
        for (name, tensor) in self.run(device, self.values)? {
            into.get(&name).with_context(|| format!("no parameter `{name}`"))?.set(&tensor)?;
        }
        Ok(())
    }

    /// The gradients by name.
    pub(super) fn gradients(&self, device: &Device) -> Result<BTreeMap<String, Tensor>> {
        self.run(device, self.gradients)
    }

    /// AdamW's state by `mean/` or `square/` and the parameter's name, flat.
    pub(super) fn moments(&self, device: &Device) -> Result<BTreeMap<String, Tensor>> {
        let mut all = BTreeMap::new();
        for (kind, run) in [("mean", self.mean), ("square", self.square)] {
            for (name, tensor) in self.run(device, run)? {
                all.insert(format!("{kind}/{name}"), tensor.flatten_all()?);
            }
        }
        Ok(all)
    }

    /// Takes AdamW's state; `get` gives it by `mean` or `square` and a parameter's name.
    pub(super) fn set_moments(
        &self,
        device: &Device,
        get: &dyn Fn(&str, &str) -> Result<Tensor>,
    ) -> Result<()> {
        for (kind, run) in [("mean", self.mean), ("square", self.square)] {
            for (name, place) in &self.places {
                let values = get(kind, name)?.to_vec1::<f32>()?;
                device.upload(run + 4 * place.start as u64, &values)?;
            }
        }
        device.synchronize()
    }

    /// Forgets all gradients.
    pub(super) fn zero(&self, device: &Device) -> Result<()> {
        device.zero(self.gradients, 4 * self.len)
    }

    /// The L2 norm of all gradients together, in f64; tensors are added in order of their names.
    pub(super) fn global_norm(&self, device: &Device) -> Result<f64> {
        let grid = Grid::blocks(self.chunk_count, 256);
        device.launch(
            device.kernels.square_sums,
            grid,
            &[self.gradients, self.chunks, self.sums],
        )?;
        let sums: Vec<f64> = device.download(self.sums, self.chunk_count)?;
        let each = self.places.values().map(|p| sums[p.chunks.clone()].iter().sum::<f64>());
        Ok(each.sum::<f64>().sqrt())
    }

    /// The update number `t` (from 1) of AdamW; gradients are multiplied by `scale` first.
    pub(super) fn update(
        &self,
        device: &Device,
        config: AdamWConfig,
        t: u64,
        rate: f64,
        scale: f64,
    ) -> Result<()> {
        let AdamWConfig { beta1, beta2, epsilon, weight_decay, decays } = config;
        ensure!(decays == Decays::Weights || weight_decay == 0.0, "weight decay on all parameters");
        let t = t as f64;
        let args = [
            self.values,
            self.gradients,
            self.mean,
            self.square,
            self.chunks,
            float(beta1),
            float(beta2),
            float(1.0 - beta1),
            float(1.0 - beta2),
            float(epsilon),
            float(rate / (1.0 - beta1.powf(t))),
            float((1.0 - beta2.powf(t)).sqrt()),
            float(1.0 - rate * weight_decay),
            float(scale),
        ];
        device.launch(device.kernels.adamw, Grid::blocks(self.chunk_count, 256), &args)
    }
}

//! A model on the GPU: from packed rows to losses, gradients and updates.

mod build;
mod embedding;
mod head;
mod inputs;
mod room;

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Result, bail, ensure};
use candle_core::{Tensor, Var};

use self::inputs::{Away, Inputs};
use super::arena::Arena;
use super::away::Pinned;
use super::decoder::{self, DecoderLayer};
use super::device::{Device, Float, Mat};
use super::encoder::{self, EncoderLayer};
use super::pass::{Norm, Pass};
use super::projection::{Builder, Parts, Projection, Shared, upload_map};
use super::trained::Trained;
use crate::learn::batch::Packed;
use crate::learn::config::ModelConfig;
use crate::learn::linear::{Dropout, Mode, Parameters};
use crate::learn::ops::RopeTable;
use crate::learn::optimizer::AdamWConfig;

/// Bytes of one block of logits, unless that is less than 1,024 rows. Fixed, so that sums do not
/// depend on the machine.
const LOGITS: usize = 64 << 20;

/// A model's layers.
#[derive(Debug)]
enum Layers {
    Encoder(Vec<EncoderLayer>),
    Decoder(Vec<DecoderLayer>),
}

/// What a layer of either kind kept.
#[derive(Debug, Clone, Copy)]
enum Saved {
    Encoder(encoder::Saved),
    Decoder(decoder::Saved),
}

/// An embedding: its table in the type of the arithmetic, and its gradient.
#[derive(Debug, Clone, Copy)]
struct Table {
    at: u64,
    gradient: Option<u64>,
}

#[derive(Debug)]
struct Embeddings {
    words: Table,
    /// Positions, and token types if there are any.
    encoder: Option<(Table, Option<Table>, Norm, Dropout)>,
}

/// What lies between the last layer and the output.
#[derive(Debug)]
enum Head {
    /// A norm and the output embedding.
    Decoder { norm: Norm, table: Table },
    /// A dense layer with an activation, and the classifier.
    Classes { dense: Box<Projection>, tanh: bool, drop: Dropout, classifier: Box<Projection> },
    /// None: it predicts nothing.
    Bare,
}

/// A batch on the GPU.
struct Uploaded {
    ids: u64,
    positions: u64,
    types: u64,
    starts: u64,
    hidden: u64,
}

/// A model on a GPU.
#[derive(Debug)]
pub(crate) struct Engine(Mutex<State>);

#[derive(Debug)]
struct State {
    // The arenas go before the device that they are of.
    weights: Arena,
    saved: Arena,
    scratch: Arena,
    device: Device,
    shared: Shared,
    trained: Trained,
    layers: Layers,
    embeddings: Embeddings,
    head: Head,
    /// Trained tensors with a copy in the type of the arithmetic.
    copies: Option<Parts>,
    /// Adapters beside weights that stay.
    placed: Option<Parts>,
    inverse_frequencies: Vec<f32>,
    rope: Option<(usize, u64, u64)>,
    hidden: usize,
    vocab: usize,
    pad: Option<u32>,
    checkpointing: bool,
    away: Away,
    /// Tables on the host.
    _tables: Vec<Pinned>,
}

impl Engine {
    /// Brings a model to the first GPU that the process sees.
    ///
    /// # Errors
    /// When there is none, its memory is too small, or the model's sizes do not suit it.
    pub(crate) fn new(
        config: &ModelConfig,
        parameters: &Parameters,
        trainable: &BTreeMap<String, Var>,
        float: Float,
        checkpointing: bool,
    ) -> Result<Self> {
        let device = Device::open(float, config.head)?;
        let memory = device.memory()?;
        let state = State::new(device, config, parameters, trainable, checkpointing);
        Ok(Self(Mutex::new(state.map_err(|e| room::too_small(e, memory))?)))
    }

    fn state(&self) -> Result<MutexGuard<'_, State>> {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.device.bind()?;
        Ok(state)
    }

    /// Bytes of the GPU's memory that it has taken.
    pub(crate) fn memory(&self) -> Result<usize> {
        let s = self.state()?;
        Ok(s.weights.mapped() + s.saved.mapped() + s.scratch.mapped())
    }

    /// Adds, to the gradients, that of the sum of the losses of `targets` over `denominator`;
    /// `rows` are the tokens that predict them. `first` forgets the gradients of before. Gives the
    /// sum of the losses.
    pub(crate) fn accumulate(
        &self,
        packed: &Packed,
        (rows, targets): (&[u32], &[u32]),
        step: u64,
        denominator: f64,
        first: bool,
    ) -> Result<f64> {
        let mut s = self.state()?;
        if first {
            s.trained.zero(&s.device)?;
        }
        if rows.is_empty() {
            return Ok(0.0);
        }
        let result = s.step(packed, rows, targets, step, denominator);
        result.map_err(|e| s.explain(e, packed, rows.len(), true))
    }

    /// The logarithm of each target's probability.
    pub(crate) fn log_probs(
        &self,
        packed: &Packed,
        rows: &[u32],
        targets: &[u32],
    ) -> Result<Vec<f64>> {
        let mut s = self.state()?;
        let result = s.evaluate(packed, rows, Some(targets));
        let losses = result.map_err(|e| s.explain(e, packed, rows.len(), false))?;
        Ok(losses.into_iter().map(|x| -f64::from(x)).collect())
    }

    /// The logits of chosen rows.
    pub(crate) fn logits(&self, packed: &Packed, rows: &[u32]) -> Result<Vec<f32>> {
        let mut s = self.state()?;
        let result = s.evaluate(packed, rows, None);
        result.map_err(|e| s.explain(e, packed, rows.len(), false))
    }

    /// The gradients by name.
    pub(crate) fn gradients(&self) -> Result<BTreeMap<String, Tensor>> {
        let s = self.state()?;
        s.trained.gradients(&s.device)
    }

    /// The L2 norm of all gradients together.
    pub(crate) fn global_norm(&self) -> Result<f64> {
        let s = self.state()?;
        s.trained.global_norm(&s.device)
    }

    /// The update number `t`, from 1.
    pub(crate) fn update(&self, c: AdamWConfig, t: u64, rate: f64, scale: f64) -> Result<()> {
        let s = self.state()?;
        s.trained.update(&s.device, c, t, rate, scale)?;
        s.renew()
    }

    /// Brings the trained values to the CPU.
    pub(crate) fn load(&self, into: &BTreeMap<String, Var>) -> Result<()> {
        let s = self.state()?;
        s.trained.load(&s.device, into)
    }

    /// Takes the trained values from the CPU.
    pub(crate) fn store(&self, from: &BTreeMap<String, Var>) -> Result<()> {
        let s = self.state()?;
        s.trained.store(&s.device, from)?;
        s.renew()
    }

    /// See [`Trained::moments`].
    pub(crate) fn moments(&self) -> Result<BTreeMap<String, Tensor>> {
        let s = self.state()?;
        s.trained.moments(&s.device)
    }

    /// See [`Trained::set_moments`].
    pub(crate) fn set_moments(&self, get: &dyn Fn(&str, &str) -> Result<Tensor>) -> Result<()> {
        let s = self.state()?;
        s.trained.set_moments(&s.device, get)
    }
}

impl State {
    fn new(
        device: Device,
        config: &ModelConfig,
        parameters: &Parameters,
        trainable: &BTreeMap<String, Var>,
        checkpointing: bool,
    ) -> Result<Self> {
        for (what, size) in [("hidden size", config.hidden), ("MLP", config.intermediate)] {
            ensure!(size.is_multiple_of(8), "a {what} of {size}; the GPU takes multiples of 8");
        }
        ensure!(
            config.head.is_multiple_of(8)
                && (config.rope.is_empty() || config.head.is_multiple_of(16)),
            "heads of {} elements; the GPU takes multiples of 16",
            config.head
        );
        let weights = Arena::new(&device)?;
        device.matmuls.reserve(&weights)?;
        let order = build::order(config, trainable);
        let trained = Trained::new(&device, &weights, &order, trainable)?;
        let mut builder = Builder {
            device: &device,
            arena: &weights,
            parameters,
            trained: &trained,
            copies: Vec::new(),
            placed: Vec::new(),
            pinned: Vec::new(),
        };
        let embeddings = builder.embeddings(config, checkpointing)?;
        let layers = builder.layers(config)?;
        let head = builder.head(config, embeddings.words)?;
        let Builder { copies, placed, pinned, .. } = builder;
        let copies = Parts::of(&device, &weights, copies)?;
        let placed = Parts::of(&device, &weights, placed)?;
        let shared = Shared { map: upload_map(&device, &weights)? };
        let state = State {
            saved: Arena::new(&device)?,
            scratch: Arena::new(&device)?,
            weights,
            device,
            shared,
            trained,
            layers,
            embeddings,
            head,
            copies,
            placed,
            inverse_frequencies: config.rope.clone(),
            rope: None,
            hidden: config.hidden,
            vocab: config.vocab,
            pad: config.pad,
            checkpointing,
            away: Away::new()?,
            _tables: pinned,
        };
        state.renew()?;
        state.device.synchronize()?;
        Ok(state)
    }

    /// Renews what is made of the trained values.
    fn renew(&self) -> Result<()> {
        if let Some(copies) = &self.copies {
            self.device.renew(copies)?;
        }
        if let Some(placed) = &self.placed {
            self.device.place(placed, 0)?;
        }
        Ok(())
    }

    /// The tables of the rotary embedding for so many positions.
    fn rope(&mut self, positions: usize) -> Result<Option<(u64, u64)>> {
        if self.inverse_frequencies.is_empty() {
            return Ok(None);
        }
        if let Some((have, cosines, sines)) = self.rope
            && have >= positions
        {
            return Ok(Some((cosines, sines)));
        }
        let n = positions.next_power_of_two().max(512);
        let positions: Vec<u32> = (0..n as u32).collect();
        let table = RopeTable::new(&self.inverse_frequencies, &positions);
        let put = |values: &[f32]| -> Result<u64> {
            let at = self.weights.alloc(size_of_val(values))?;
            self.device.upload(at, values)?;
            self.device.synchronize()?;
            Ok(at)
        };
        let (cosines, sines) = (put(table.cosines())?, put(table.sines())?);
        self.rope = Some((n, cosines, sines));
        Ok(Some((cosines, sines)))
    }

    /// Uploads what describes a batch, and further lists of indices behind it.
    fn upload<const N: usize>(
        &self,
        p: &Packed,
        more: [&[u32]; N],
    ) -> Result<(Uploaded, [u64; N])> {
        let mut all: Vec<u32> = Vec::new();
        let mut put = |values: &mut dyn Iterator<Item = u32>| {
            let at = all.len();
            all.extend(values);
            all.resize(all.len().next_multiple_of(4), 0);
            at
        };
        let ids = put(&mut p.ids.iter().copied());
        let positions = put(&mut p.positions.iter().copied());
        let types = put(&mut p.types.iter().copied());
        let starts = put(&mut p.starts.iter().map(|s| *s as u32));
        let hidden = put(&mut p.hidden.iter().flat_map(|h| [h.start as u32, h.end as u32]));
        let more = more.map(|m| put(&mut m.iter().copied()));
        let base = self.saved.alloc(4 * all.len())?;
        self.device.upload(base, &all)?;
        let at = |offset: usize| base + 4 * offset as u64;
        let uploaded = Uploaded {
            ids: at(ids),
            positions: at(positions),
            types: at(types),
            starts: at(starts),
            hidden: if p.hidden.is_empty() { 0 } else { at(hidden) },
        };
        Ok((uploaded, more.map(at)))
    }

    fn pass<'a>(
        &'a self,
        packed: &Packed,
        u: &Uploaded,
        rope: Option<(u64, u64)>,
        mode: Mode,
    ) -> Pass<'a> {
        Pass {
            device: &self.device,
            shared: &self.shared,
            saved: &self.saved,
            scratch: &self.scratch,
            tokens: packed.ids.len(),
            sequences: packed.starts.len() - 1,
            longest: packed.rows().map(|r| r.len()).max().unwrap_or(0),
            starts: u.starts,
            hidden: u.hidden,
            positions: u.positions,
            rope,
            mode,
        }
    }

    fn count(&self) -> usize {
        match &self.layers {
            Layers::Encoder(layers) => layers.len(),
            Layers::Decoder(layers) => layers.len(),
        }
    }

    /// Elements from row to row of a layer's input.
    fn input_ld(&self) -> usize {
        match &self.layers {
            // The first product reads it as it is, with its ranks behind it.
            Layers::Encoder(layers) => {
                layers.iter().map(|l| l.qkv.in_ld()).max().unwrap_or(self.hidden)
            }
            Layers::Decoder(_) => self.hidden,
        }
    }

    /// Elements from row to row of the gradient of a layer's result.
    fn gradient_ld(&self) -> usize {
        let ranks = match &self.layers {
            Layers::Encoder(_) => None,
            Layers::Decoder(layers) => layers.iter().map(|l| l.down.ranks.max(l.out.ranks)).max(),
        };
        self.hidden + ranks.unwrap_or(0)
    }

    fn forward(&self, p: &Pass<'_>, i: usize, x: Mat, y: Option<Mat>) -> Result<Saved> {
        match &self.layers {
            Layers::Encoder(layers) => layers[i].forward(p, x, y).map(Saved::Encoder),
            Layers::Decoder(layers) => layers[i].forward(p, x, y).map(Saved::Decoder),
        }
    }

    fn backward(&self, p: &Pass<'_>, i: usize, s: &Saved, g: Mat, below: bool) -> Result<()> {
        match (&self.layers, s) {
            (Layers::Encoder(layers), Saved::Encoder(s)) => layers[i].backward(p, s, g, below),
            (Layers::Decoder(layers), Saved::Decoder(s)) => layers[i].backward(p, s, g, below),
            _ => bail!("a layer of another kind"),
        }
    }

    /// Whether anything below the first layer is trained.
    fn embeddings_train(&self) -> bool {
        let e = &self.embeddings;
        let encoder = e.encoder.as_ref().is_some_and(|(places, kinds, norm, _)| {
            places.gradient.is_some()
                || kinds.is_some_and(|k| k.gradient.is_some())
                || norm.weight_gradient.is_some()
        });
        e.words.gradient.is_some() || encoder
    }

    /// The first layer that has something to train in it or below it.
    fn lowest(&self) -> usize {
        if self.embeddings_train() {
            return 0;
        }
        let first = match &self.layers {
            Layers::Encoder(layers) => layers.iter().position(|l| {
                [&l.qkv, &l.out, &l.up, &l.down].iter().any(|p| p.trains())
                    || l.output_norm.weight_gradient.is_some()
                    || l.attention_norm.weight_gradient.is_some()
            }),
            Layers::Decoder(layers) => layers.iter().position(|l| {
                [&l.qkv, &l.out, &l.gate_up, &l.down].iter().any(|p| p.trains())
                    || l.input_norm.weight_gradient.is_some()
                    || l.post_norm.weight_gradient.is_some()
            }),
        };
        first.unwrap_or(self.count())
    }

    /// One forward and backward; gives the sum of the losses.
    fn step(
        &mut self,
        packed: &Packed,
        rows: &[u32],
        targets: &[u32],
        step: u64,
        denominator: f64,
    ) -> Result<f64> {
        let rope = self.rope(packed.positions.iter().max().map_or(0, |p| *p as usize + 1))?;
        let (s, r) = (self.saved.mark(), self.scratch.mark());
        let (u, [rows_at, targets_at]) = self.upload(packed, [rows, targets])?;
        let p = self.pass(packed, &u, rope, Mode::Train(step));
        let (count, lowest) = (self.count(), self.lowest());
        let inputs = Inputs::new(self, &p, lowest)?;
        let (losses, g) = (p.saved.alloc(4 * rows.len())?, p.saved(self.gradient_ld())?);
        let embedded = self.embed(&p, &u, inputs.at(0))?;
        let mut kept = Vec::with_capacity(count);
        for i in 0..count {
            inputs.written(i)?;
            let mark = self.saved.mark();
            let saved = self.forward(&p, i, inputs.at(i), Some(inputs.at(i + 1)))?;
            // The last layer's backward follows at once.
            let again = (self.checkpointing && i + 1 < count) || i < lowest;
            if again {
                self.saved.release(mark);
            }
            kept.push((mark, (!again).then_some(saved)));
        }
        let place = (rows_at, targets_at, rows.len());
        let below = lowest < count;
        self.loss(&p, inputs.at(count), place, 1.0 / denominator, (losses, g), below)?;
        for i in (lowest..count).rev() {
            inputs.wanted(i)?;
            let below = i > lowest || self.embeddings_train();
            let (mark, saved) = kept[i];
            let saved = match saved {
                Some(saved) => saved,
                None => self.forward(&p, i, inputs.at(i), None)?,
            };
            self.backward(&p, i, &saved, g, below)?;
            self.saved.release(mark);
        }
        if self.embeddings_train() {
            self.embed_backward(&p, packed, embedded, g)?;
        }
        let losses: Vec<f32> = self.device.download(losses, rows.len())?;
        self.saved.release(s);
        self.scratch.release(r);
        Ok(losses.into_iter().map(f64::from).sum())
    }
}

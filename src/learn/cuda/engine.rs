//! A model on the GPU: from packed rows to losses, gradients and updates.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, Result, bail, ensure};
use candle_core::{Tensor, Var};

use super::arena::{Arena, OutOfMemory};
use super::attention::Attention;
use super::decoder::{self, DecoderLayer};
use super::device::{Device, Float, Grid, Mat, float, int};
use super::encoder::{self, EncoderLayer};
use super::matmul::Target;
use super::pass::{Norm, Pass};
use super::projection::{Builder, Parts, Projection, Shared, trained_name, upload_map};
use super::trained::Trained;
use crate::learn::batch::Packed;
use crate::learn::config::{Family, ModelConfig};
use crate::learn::layout::{EncoderNames, WORD, output_embedding};
use crate::learn::linear::{Dropout, Parameters};
use crate::learn::load::PEFT;
use crate::learn::optimizer::AdamWConfig;
use crate::source::Fault;

/// Bytes of one block of logits, unless that is less than 1,024 rows. Fixed, so that sums do not depend on the machine.
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
    Classes { dense: Projection, tanh: bool, drop: Dropout, classifier: Projection },
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
}

/// Where the parameters lie: those of one product side by side, then the rest by name.
fn order(config: &ModelConfig, parameters: &BTreeMap<String, Var>) -> Vec<String> {
    let mut order = Vec::with_capacity(parameters.len());
    for group in groups(config).iter().flatten() {
        for matrix in ["A", "B"] {
            let names = group.iter().map(|m| format!("{PEFT}{m}.lora_{matrix}.weight"));
            order.extend(names.filter(|n| parameters.contains_key(n)));
        }
    }
    let rest: Vec<_> = parameters.keys().filter(|n| !order.contains(n)).cloned().collect();
    order.extend(rest);
    order
}

/// The linear modules of each layer, by the input that they share: queries, keys and values; the
/// attention's output; up (and gate); down.
fn groups(c: &ModelConfig) -> Vec<[Vec<String>; 4]> {
    let layer = |i: usize| {
        if c.is_decoder() {
            let at = |name: &str| format!("model.layers.{i}.{name}");
            let attention = |n: &str| at(&format!("self_attn.{n}_proj"));
            let mlp = |n: &str| at(&format!("mlp.{n}_proj"));
            return [
                vec![attention("q"), attention("k"), attention("v")],
                vec![attention("o")],
                vec![mlp("gate"), mlp("up")],
                vec![mlp("down")],
            ];
        }
        let n = EncoderNames::new(c.family, i);
        [vec![n.query, n.key, n.value], vec![n.out], vec![n.up], vec![n.down]]
    };
    (0..c.layers).map(layer).collect()
}

impl Builder<'_> {
    fn norm(&mut self, module: &str, bias: bool, eps: f64) -> Result<Norm> {
        let gradient = |name: &str| {
            trained_name(self.trained, name).map(|n| self.trained.gradient(&n)).transpose()
        };
        let (weight, bias_name) = (format!("{module}.weight"), format!("{module}.bias"));
        let weight_gradient = gradient(&weight)?;
        let bias_gradient = if bias { gradient(&bias_name)? } else { None };
        Ok(Norm {
            weight: self.wide(&weight)?,
            bias: if bias { self.wide(&bias_name)? } else { 0 },
            weight_gradient,
            bias_gradient,
            eps,
        })
    }

    fn table(&mut self, name: &str) -> Result<Table> {
        let own = trained_name(self.trained, name);
        let gradient = own.map(|n| self.trained.gradient(&n)).transpose()?;
        Ok(Table { at: self.narrow(name)?, gradient })
    }

    fn layers(&mut self, c: &ModelConfig) -> Result<Layers> {
        let shape = (c.heads, c.kv_heads, c.head);
        let groups = groups(c);
        if c.is_decoder() {
            let mut layers = Vec::new();
            for (i, [qkv, out, gate_up, down]) in groups.iter().enumerate() {
                let at = |name: &str| format!("model.layers.{i}.{name}");
                let drop = self.parameters.dropout(&format!("{i}/attention"), c.attention_dropout);
                let window = c.windows.get(i).copied().flatten();
                let head_norms = if c.family == Family::Qwen3 {
                    let query = self.norm(&at("self_attn.q_norm"), false, c.eps)?;
                    Some((query, self.norm(&at("self_attn.k_norm"), false, c.eps)?))
                } else {
                    None
                };
                layers.push(DecoderLayer {
                    input_norm: self.norm(&at("input_layernorm"), false, c.eps)?,
                    qkv: self.projection(qkv)?,
                    head_norms,
                    attention: Attention::new(self.device, shape, true, window, drop)?,
                    out: self.projection(out)?,
                    post_norm: self.norm(&at("post_attention_layernorm"), false, c.eps)?,
                    gate_up: self.projection(gate_up)?,
                    down: self.projection(down)?,
                });
            }
            return Ok(Layers::Decoder(layers));
        }
        let mut layers = Vec::new();
        for (i, [qkv, out, up, down]) in groups.iter().enumerate() {
            let names = EncoderNames::new(c.family, i);
            let drop = |name: &str, rate| self.parameters.dropout(&format!("{i}/{name}"), rate);
            let (attention_drop, down_drop) =
                (drop("attention", c.attention_dropout), drop("down", c.hidden_dropout));
            let out_drop = (c.family == Family::Bert).then(|| drop("out", c.hidden_dropout));
            layers.push(EncoderLayer {
                qkv: self.projection(qkv)?,
                attention: Attention::new(self.device, shape, false, None, attention_drop)?,
                out: self.projection(out)?,
                out_drop,
                attention_norm: self.norm(&names.attention_norm, true, c.eps)?,
                up: self.projection(up)?,
                down: self.projection(down)?,
                down_drop,
                output_norm: self.norm(&names.output_norm, true, c.eps)?,
            });
        }
        Ok(Layers::Encoder(layers))
    }

    fn embeddings(&mut self, c: &ModelConfig) -> Result<Embeddings> {
        if c.is_decoder() {
            return Ok(Embeddings { words: self.table(WORD)?, encoder: None });
        }
        let at = |name: &str| format!("{}.embeddings.{name}", c.family.prefix());
        let table = |name: &str| at(&format!("{name}_embeddings.weight"));
        let words = self.table(&table("word"))?;
        let positions = self.table(&table("position"))?;
        let types = (c.type_vocab > 0).then(|| self.table(&table("token_type"))).transpose()?;
        let norm = self.norm(&at("LayerNorm"), true, c.eps)?;
        let drop = self.parameters.dropout("embeddings", c.hidden_dropout);
        Ok(Embeddings { words, encoder: Some((positions, types, norm, drop)) })
    }

    fn head(&mut self, c: &ModelConfig, words: Table) -> Result<Head> {
        if c.is_decoder() {
            let norm = self.norm("model.norm", false, c.eps)?;
            let table = if c.tied { words } else { self.table(output_embedding(c))? };
            return Ok(Head::Decoder { norm, table });
        }
        if !self.parameters.held.contains_key("classifier.weight") {
            return Ok(Head::Bare);
        }
        let bert = c.family == Family::Bert;
        let dense = if bert { "bert.pooler.dense" } else { "pre_classifier" };
        Ok(Head::Classes {
            dense: self.projection(&[dense.to_owned()])?,
            tanh: bert,
            drop: self.parameters.dropout("classifier", c.classifier_dropout),
            classifier: self.projection(&["classifier".to_owned()])?,
        })
    }
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
        for (what, size) in [("hidden size", config.hidden), ("MLP", config.intermediate)] {
            ensure!(size.is_multiple_of(8), "a {what} of {size}; the GPU takes multiples of 8");
        }
        ensure!(
            config.head.is_multiple_of(8)
                && (config.rope.is_empty() || config.head.is_multiple_of(16)),
            "heads of {} elements; the GPU takes multiples of 16",
            config.head
        );
        let device = Device::open(float, config.head)?;
        let weights = Arena::new(&device)?;
        device.matmuls.reserve(&weights)?;
        let order = order(config, trainable);
        let room = || "bringing the model to the GPU";
        let trained = Trained::new(&device, &weights, &order, trainable).with_context(room)?;
        let mut builder = Builder {
            device: &device,
            arena: &weights,
            parameters,
            trained: &trained,
            copies: Vec::new(),
            placed: Vec::new(),
            unpacked: 0,
        };
        let embeddings = builder.embeddings(config).with_context(room)?;
        let layers = builder.layers(config).with_context(room)?;
        let head = builder.head(config, embeddings.words).with_context(room)?;
        let Builder { copies, placed, unpacked, .. } = builder;
        let copies = Parts::of(&device, &weights, copies)?;
        let placed = Parts::of(&device, &weights, placed)?;
        let shared =
            Shared { unpacked: weights.alloc(unpacked)?, map: upload_map(&device, &weights)? };
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
        };
        state.renew()?;
        state.device.synchronize()?;
        Ok(Self(Mutex::new(state)))
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
        result.map_err(|e| s.explain(e, packed, rows.len()))
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
        let losses = result.map_err(|e| s.explain(e, packed, rows.len()))?;
        Ok(losses.into_iter().map(|x| -f64::from(x)).collect())
    }

    /// The logits of chosen rows.
    pub(crate) fn logits(&self, packed: &Packed, rows: &[u32]) -> Result<Vec<f32>> {
        let mut s = self.state()?;
        let result = s.evaluate(packed, rows, None);
        result.map_err(|e| s.explain(e, packed, rows.len()))
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
    /// Renews what is made of the trained values.
    fn renew(&self) -> Result<()> {
        if let Some(copies) = &self.copies {
            self.device.renew(copies)?;
        }
        if let Some(placed) = &self.placed {
            self.device.place(placed, self.shared.unpacked)?;
        }
        Ok(())
    }

    /// Says what was asked for and what would fit.
    fn explain(&self, e: anyhow::Error, packed: &Packed, targets: usize) -> anyhow::Error {
        // What was begun must not go on into what comes next.
        let _ = self.device.synchronize();
        self.saved.release(0);
        self.scratch.release(0);
        if e.downcast_ref::<OutOfMemory>().is_none() {
            return e;
        }
        let gib = |bytes: usize| bytes as f64 / (1 << 30) as f64;
        let (total, _) = self.device.memory().unwrap_or((0, 0));
        let tokens = packed.ids.len();
        let message = format!(
            "the GPU's memory ({:.1} GiB) is too small: the weights take {:.1} GiB, and {tokens} \
             tokens at once (with {targets} targets) need more than the {:.1} GiB that were left \
             for them",
            gib(total),
            gib(self.weights.mapped()),
            gib(self.saved.mapped() + self.scratch.mapped()),
        );
        let mut help = String::from(
            "lower `batch_size` (and raise `gradient_accumulation` by as much: the result is the \
             same), or `max_length` of the tokens",
        );
        if !self.checkpointing {
            help.push_str(", or set `gradient_checkpointing: true`");
        }
        Fault::new(message).help(help).into()
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
        let half = self.inverse_frequencies.len();
        let angles =
            (0..n).flat_map(|p| self.inverse_frequencies.iter().map(move |f| p as f32 * f));
        let angles: Vec<f32> = angles.collect();
        let put = |f: fn(f32) -> f32| -> Result<u64> {
            let at = self.weights.alloc(4 * n * half)?;
            self.device.upload(at, &angles.iter().map(|a| f(*a)).collect::<Vec<_>>())?;
            self.device.synchronize()?;
            Ok(at)
        };
        let (cosines, sines) = (put(f32::cos)?, put(f32::sin)?);
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
        step: Option<u64>,
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
            step,
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

    fn forward(&self, p: &Pass<'_>, i: usize, x: Mat, y: Mat) -> Result<Saved> {
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

    /// The first layer's input; for an encoder with what the norm's backward needs.
    fn embed(
        &self,
        p: &Pass<'_>,
        u: &Uploaded,
        x: Mat,
    ) -> Result<Option<(Mat, super::pass::Moments)>> {
        let e = &self.embeddings;
        let (places, kinds) = match &e.encoder {
            Some((places, kinds, ..)) => (places.at, kinds.map_or(0, |k| k.at)),
            None => (0, 0),
        };
        let sum = if e.encoder.is_some() { p.saved(self.hidden)? } else { x };
        let args = [
            u.ids,
            e.words.at,
            u.positions,
            places,
            u.types,
            kinds,
            sum.at,
            int(sum.ld),
            int(self.hidden),
            int(p.tokens),
        ];
        self.device.launch(self.device.kernels.embed, Grid::rows(p.tokens, self.hidden), &args)?;
        let Some((_, _, norm, drop)) = &e.encoder else { return Ok(None) };
        let moments = p.moments(p.tokens, norm)?;
        p.layer_norm(norm, (sum, None, sum, x), moments, self.hidden)?;
        p.drop_elements(drop, (x, x), (p.tokens, self.hidden))?;
        Ok(Some((sum, moments)))
    }

    /// Adds the gradients of the embeddings' tables, from that of the first layer's input.
    fn embed_backward(
        &self,
        p: &Pass<'_>,
        packed: &Packed,
        kept: Option<(Mat, super::pass::Moments)>,
        g: Mat,
    ) -> Result<()> {
        let e = &self.embeddings;
        if let (Some((places, kinds, norm, drop)), Some((sum, moments))) = (&e.encoder, kept) {
            p.drop_elements(drop, (g, g), (p.tokens, self.hidden))?;
            p.layer_norm_backward(norm, (sum, g, g), moments, self.hidden)?;
            self.table_gradient(places, &packed.positions, None, g)?;
            if let Some(kinds) = kinds {
                self.table_gradient(kinds, &packed.types, None, g)?;
            }
        }
        self.table_gradient(&e.words, &packed.ids, self.pad, g)
    }

    fn table_gradient(&self, table: &Table, ids: &[u32], but: Option<u32>, g: Mat) -> Result<()> {
        let Some(gradient) = table.gradient else { return Ok(()) };
        let kept = (0..ids.len() as u32).filter(|i| Some(ids[*i as usize]) != but);
        let mut sorted: Vec<u32> = kept.collect();
        sorted.sort_by_key(|i| ids[*i as usize]);
        let (mut starts, mut distinct) = (Vec::new(), Vec::new());
        for (at, i) in sorted.iter().enumerate() {
            let id = ids[*i as usize];
            if distinct.last() != Some(&id) {
                distinct.push(id);
                starts.push(at as u32);
            }
        }
        if distinct.is_empty() {
            return Ok(());
        }
        starts.push(sorted.len() as u32);
        let mark = self.scratch.mark();
        let put = |values: &[u32]| -> Result<u64> {
            let at = self.scratch.alloc(4 * values.len())?;
            self.device.upload(at, values)?;
            Ok(at)
        };
        let args = [
            g.at,
            int(g.ld),
            put(&sorted)?,
            put(&starts)?,
            put(&distinct)?,
            gradient,
            int(self.hidden),
        ];
        let grid = Grid::blocks(distinct.len(), 256);
        self.device.launch(self.device.kernels.embed_backward, grid, &args)?;
        self.scratch.release(mark);
        Ok(())
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
        let p = self.pass(packed, &u, rope, Some(step));
        let (count, ld) = (self.count(), self.input_ld());
        let inputs: Vec<Mat> = (0..=count).map(|_| p.saved(ld)).collect::<Result<_>>()?;
        let embedded = self.embed(&p, &u, inputs[0])?;
        let lowest = self.lowest();
        let mut kept = Vec::with_capacity(count);
        for i in 0..count {
            let mark = self.saved.mark();
            let saved = self.forward(&p, i, inputs[i], inputs[i + 1])?;
            let again = self.checkpointing || i < lowest;
            if again {
                self.saved.release(mark);
            }
            kept.push((!again).then_some(saved));
        }
        let g = p.saved(self.gradient_ld())?;
        let scale = 1.0 / denominator;
        let losses = self.loss(
            &p,
            inputs[count],
            (rows_at, targets_at, rows.len()),
            scale,
            g,
            lowest < count,
        )?;
        for i in (lowest..count).rev() {
            let below = i > lowest || self.embeddings_train();
            let mark = self.saved.mark();
            let saved = match kept[i] {
                Some(saved) => saved,
                None => self.forward(&p, i, inputs[i], inputs[i + 1])?,
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

    /// Rows of one block of logits.
    fn block(&self) -> usize {
        (LOGITS / 4 / self.vocab).max(1024)
    }

    /// The losses of the targets, and in `g` the gradient of the last layer's result, if that is
    /// wanted; adds the gradients of what is trained above it.
    fn loss(
        &self,
        p: &Pass<'_>,
        x: Mat,
        (rows, targets, n): (u64, u64, usize),
        scale: f64,
        g: Mat,
        below: bool,
    ) -> Result<u64> {
        let losses = p.saved.alloc(4 * n)?;
        let mark = p.scratch.mark();
        let d = self.hidden;
        let chosen = match &self.head {
            Head::Classes { dense, .. } => p.scratch_rows(n, dense.in_ld())?,
            _ => p.scratch_rows(n, d)?,
        };
        p.pick((x, chosen), rows, (n, d), false)?;
        let d_chosen = p.scratch_rows(n, d)?;
        match &self.head {
            Head::Decoder { norm, table } => {
                let features = p.scratch_rows(n, d)?;
                let d_features = p.scratch_rows(n, d)?;
                let rstd = p.scratch.alloc(4 * n)?;
                p.rms_norm(norm, (chosen, features), rstd, (n, d, 1))?;
                let block = self.block().min(n);
                let logits = Mat { at: p.scratch.alloc(4 * block * self.vocab)?, ld: self.vocab };
                let wide = self.vocab.next_multiple_of(8);
                let d_logits = p.scratch_rows(block, wide)?;
                for start in (0..n).step_by(block) {
                    let m = block.min(n - start);
                    let from = |mat: Mat| Mat {
                        at: mat.at + (start * mat.ld * self.device.float.size()) as u64,
                        ld: mat.ld,
                    };
                    let (x, dx) = (from(features), from(d_features));
                    self.logits_of(x, *table, logits, m)?;
                    let at = |base: u64| base + 4 * start as u64;
                    self.cross_entropy(
                        logits,
                        (at(targets), at(losses)),
                        d_logits,
                        (m, self.vocab),
                        scale,
                    )?;
                    let w = Mat { at: table.at, ld: d };
                    let target = Target {
                        to: dx,
                        float: self.device.float,
                        plus: None,
                        bias: None,
                        alpha: 1.0,
                    };
                    self.device.matmul((m, d, self.vocab), d_logits.n(), w.n(), target)?;
                    if let Some(gradient) = table.gradient {
                        let to = Mat { at: gradient, ld: d };
                        let sum = Target {
                            to,
                            float: Float::F32,
                            plus: Some(to),
                            bias: None,
                            alpha: 1.0,
                        };
                        self.device.matmul((self.vocab, d, m), d_logits.t(), x.n(), sum)?;
                    }
                }
                let mats = (chosen, d_features, None, d_chosen);
                p.rms_norm_backward(norm, mats, rstd, (n, d, 1))?;
            }
            Head::Classes { dense, tanh, drop, classifier } => {
                let classes = classifier.outputs;
                let (y, logits) = self.classes(p, chosen, n)?;
                let d_logits = p.scratch_rows(n, classifier.out_ld().next_multiple_of(8))?;
                let size = (n, classes);
                self.cross_entropy(logits, (targets, losses), d_logits, size, scale)?;
                let d_y = p.scratch_rows(n, dense.out_ld())?;
                p.input_gradient(classifier, d_logits, d_y, None, n)?;
                p.parameter_gradients(classifier, y.dropped, d_logits, n)?;
                p.drop_elements(drop, (d_y, d_y), (n, d))?;
                let tanh = int(usize::from(*tanh));
                let args = [y.active.at, d_y.at, int(d_y.ld), int(d), int(n), tanh];
                let kernel = self.device.kernels.activate_backward;
                self.device.launch(kernel, Grid::each(n * d), &args)?;
                p.input_gradient(dense, d_y, d_chosen, None, n)?;
                p.parameter_gradients(dense, chosen, d_y, n)?;
            }
            Head::Bare => bail!("the model has no head"),
        }
        if below {
            self.device.zero(g.at, p.tokens * g.ld * self.device.float.size())?;
            p.pick((d_chosen, g), rows, (n, d), true)?;
        }
        p.scratch.release(mark);
        Ok(losses)
    }

    fn logits_of(&self, x: Mat, table: Table, logits: Mat, rows: usize) -> Result<()> {
        let w = Mat { at: table.at, ld: self.hidden };
        let target = Target { to: logits, float: Float::F32, plus: None, bias: None, alpha: 1.0 };
        self.device.matmul((rows, self.vocab, self.hidden), x.n(), w.t(), target)
    }

    /// Losses, and the gradients of the logits unless `d_logits.at` is 0.
    fn cross_entropy(
        &self,
        logits: Mat,
        (targets, losses): (u64, u64),
        d_logits: Mat,
        (rows, classes): (usize, usize),
        scale: f64,
    ) -> Result<()> {
        let args =
            [logits.at, targets, losses, d_logits.at, int(d_logits.ld), int(classes), float(scale)];
        let grid = Grid::blocks(rows, if classes > 1024 { 512 } else { 32 });
        self.device.launch(self.device.kernels.cross_entropy, grid, &args)
    }

    /// The classifier's logits for chosen rows.
    fn classes(&self, p: &Pass<'_>, chosen: Mat, n: usize) -> Result<(Active, Mat)> {
        let Head::Classes { dense, tanh, drop, classifier } = &self.head else {
            bail!("the model is not a classifier")
        };
        let d = dense.outputs;
        let y = p.scratch_rows(n, d)?;
        p.project(dense, chosen, y, None, n)?;
        let args = [y.at, y.at, int(n * d), int(usize::from(*tanh))];
        self.device.launch(self.device.kernels.activate, Grid::each(n * d), &args)?;
        let mut dropped = y;
        if p.drops(drop) || classifier.ranks > 0 {
            ensure!(classifier.ranks == 0, "an adapter on the classifier");
            dropped = p.scratch_rows(n, d)?;
            p.drop_elements(drop, (y, dropped), (n, d))?;
        }
        let classes = classifier.outputs;
        let part = p.scratch_rows(n, classes.next_multiple_of(8))?;
        p.project(classifier, dropped, part, None, n)?;
        let logits = Mat { at: p.scratch.alloc(4 * n * classes)?, ld: classes };
        self.widen(part, logits, n)?;
        Ok((Active { active: y, dropped }, logits))
    }

    /// Copies a few numbers to f32.
    fn widen(&self, from: Mat, to: Mat, rows: usize) -> Result<()> {
        let args = [from.at, int(from.ld), to.at, int(to.ld), int(to.ld), int(rows)];
        self.device.launch(self.device.kernels.widen, Grid::each(rows * to.ld), &args)
    }

    /// Without dropout: the losses of targets, or the logits of rows.
    fn evaluate(
        &mut self,
        packed: &Packed,
        rows: &[u32],
        targets: Option<&[u32]>,
    ) -> Result<Vec<f32>> {
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        let rope = self.rope(packed.positions.iter().max().map_or(0, |p| *p as usize + 1))?;
        let (s, r) = (self.saved.mark(), self.scratch.mark());
        let (u, [rows_at, targets_at]) = self.upload(packed, [rows, targets.unwrap_or(&[])])?;
        let p = self.pass(packed, &u, rope, None);
        let (n, d, ld) = (rows.len(), self.hidden, self.input_ld());
        let (mut x, mut y) = (p.saved(ld)?, p.saved(ld)?);
        self.embed(&p, &u, x)?;
        for i in 0..self.count() {
            let mark = self.saved.mark();
            self.forward(&p, i, x, y)?;
            self.saved.release(mark);
            (x, y) = (y, x);
        }
        let result = match &self.head {
            Head::Decoder { norm, table } => {
                let chosen = p.scratch_rows(n, d)?;
                p.pick((x, chosen), rows_at, (n, d), false)?;
                p.rms_norm(norm, (chosen, chosen), 0, (n, d, 1))?;
                let block = self.block().min(n);
                let logits = Mat { at: p.scratch.alloc(4 * block * self.vocab)?, ld: self.vocab };
                let losses = p.scratch.alloc(4 * block)?;
                let mut out = Vec::new();
                for start in (0..n).step_by(block) {
                    let m = block.min(n - start);
                    let at = chosen.at + (start * d * self.device.float.size()) as u64;
                    self.logits_of(Mat { at, ld: d }, *table, logits, m)?;
                    if targets.is_some() {
                        let at = targets_at + 4 * start as u64;
                        let none = Mat { at: 0, ld: 0 };
                        self.cross_entropy(logits, (at, losses), none, (m, self.vocab), 1.0)?;
                        out.extend(self.device.download::<f32>(losses, m)?);
                    } else {
                        out.extend(self.device.download::<f32>(logits.at, m * self.vocab)?);
                    }
                }
                out
            }
            Head::Classes { dense, classifier, .. } => {
                let chosen = p.scratch_rows(n, dense.in_ld())?;
                p.pick((x, chosen), rows_at, (n, d), false)?;
                let (_, logits) = self.classes(&p, chosen, n)?;
                let classes = classifier.outputs;
                if targets.is_some() {
                    let losses = p.scratch.alloc(4 * n)?;
                    let none = Mat { at: 0, ld: 0 };
                    self.cross_entropy(logits, (targets_at, losses), none, (n, classes), 1.0)?;
                    self.device.download(losses, n)?
                } else {
                    self.device.download(logits.at, n * classes)?
                }
            }
            Head::Bare => bail!("the model has no head"),
        };
        self.saved.release(s);
        self.scratch.release(r);
        Ok(result)
    }
}

/// What the classifier reads.
struct Active {
    /// Behind the activation.
    active: Mat,
    /// The same behind dropout.
    dropped: Mat,
}

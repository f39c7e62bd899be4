//! A model that can be trained.

mod place;

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use candle_core::{Tensor, Var};

use super::adapter::SavedAdapter;
use super::batch::{Batch, Labels, Packed};
use super::buffer::Buffer;
use super::config::ModelConfig;
use super::cuda::{Engine, Float};
use super::gradients::Gradients;
use super::linear::{Held, Input, Mode, Parameters, Pass, Write};
use super::load::{Loaded, Loading};
use super::net::Net;
use super::ops::{Frozen, cross_entropy, log_probs, select_rows, tensor};
use super::setup::{Compute, Method, Setup};

/// Where a model's files are. A path need not have an extension.
#[derive(Debug, Clone)]
pub struct ModelFiles {
    /// `config.json`.
    pub config: PathBuf,
    /// The safetensors files, as (name in the repository, readable path).
    pub weights: Vec<(String, PathBuf)>,
}

/// Numbers of parameters, as PEFT's `print_trainable_parameters` counts them: a quantized weight
/// counts as its unpacked numbers, and a head that is trained with an adapter counts twice in
/// `all`, because PEFT keeps the original beside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    /// Those that are trained.
    pub trainable: u64,
    /// All of them, adapters included.
    pub all: u64,
}

/// A model with its trainable parameters.
pub struct Model {
    pub(super) config: ModelConfig,
    pub(super) setup: Setup,
    pub(super) files: ModelFiles,
    pub(super) parameters: Parameters,
    trainable: BTreeMap<String, Var>,
    runner: Runner,
}

/// What computes with a model.
enum Runner {
    /// Operations of the CPU.
    Host(Box<Net>),
    /// A GPU, which has the current values of what is trained.
    Gpu(Box<Engine>),
}

impl fmt::Debug for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Model").field("setup", &self.setup).finish_non_exhaustive()
    }
}

/// Elements of one block of logits: 64 MiB. Fixed, so that sums do not depend on the machine.
const LOGITS: usize = 1 << 24;

/// Answers that stand behind a prompt in one pass: attention grows with the square of them.
const ANSWERS: usize = 16;

/// What the output layer predicts: rows of the last layer, and a target for each.
struct Targets {
    rows: Vec<u32>,
    targets: Vec<u32>,
}

impl Model {
    /// A base with a fresh adapter and, where it has none, a fresh head.
    ///
    /// # Errors
    /// When a file cannot be read, a tensor is missing or has another shape, or the setup does not
    /// fit the model.
    pub fn load(files: &ModelFiles, setup: &Setup) -> Result<Self> {
        let config = ModelConfig::read(&files.config)?;
        let loading = Loading { config: &config, setup, quantization: setup.quantization };
        let mut loaded = loading.base(&files.weights)?;
        if setup.method != Method::Full {
            loading.fresh_adapters(&mut loaded)?;
        }
        Self::assemble(config, setup.clone(), files.clone(), loaded)
    }

    /// A base with a trained PEFT adapter (`adapter_config.json`, `adapter_model.safetensors`;
    /// its settings take the place of `setup.lora`), or trained full weights (`config.json`,
    /// `model.safetensors`).
    ///
    /// # Errors
    /// As [`Model::load`], and when the adapter lacks a tensor or has one too many.
    pub fn load_trained(
        files: &ModelFiles,
        setup: &Setup,
        trained: &[(String, PathBuf)],
    ) -> Result<Self> {
        if setup.method == Method::Full {
            let config = trained.iter().find(|(name, _)| name == "config.json");
            let config = config.map_or(&files.config, |(_, path)| path).clone();
            return Self::load(&ModelFiles { config, weights: trained.to_vec() }, setup);
        }
        let config = ModelConfig::read(&files.config)?;
        let saved = SavedAdapter::open(trained).context("the trained adapter")?;
        let setup = Setup { lora: Some(saved.lora.clone()), ..setup.clone() };
        let loading = Loading { config: &config, setup: &setup, quantization: setup.quantization };
        let mut loaded = loading.base(&files.weights)?;
        loading.saved_adapters(&saved, &mut loaded)?;
        Self::assemble(config, setup.clone(), files.clone(), loaded)
    }

    fn assemble(
        config: ModelConfig,
        setup: Setup,
        files: ModelFiles,
        (mut parameters, trainable): Loaded,
    ) -> Result<Self> {
        ensure!(setup.frozen || !trainable.is_empty(), "nothing in the model is trained");
        let float = match setup.compute {
            Compute::Cpu | Compute::CpuBf16 => None,
            Compute::GpuF32 => Some(Float::F32),
            Compute::GpuBf16 => Some(Float::Bf16),
        };
        let Some(float) = float else {
            let runner = Runner::Host(Box::new(Net::new(&config, &parameters)?));
            return Ok(Self { config, setup, files, parameters, trainable, runner });
        };
        let again = setup.gradient_checkpointing;
        let engine = Engine::new(&config, &parameters, &trainable, float, again)?;
        for (held, _) in parameters.held.values_mut() {
            let shape = match held {
                Held::Frozen(Frozen::Dense(tensor)) => tensor.shape().clone(),
                Held::Frozen(other) => other.dims().into(),
                Held::Trained(_) => continue,
            };
            *held = Held::Frozen(Frozen::Away(shape));
        }
        let runner = Runner::Gpu(Box::new(engine));
        Ok(Self { config, setup, files, parameters, trainable, runner })
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// What it was made with.
    pub fn setup(&self) -> &Setup {
        &self.setup
    }

    /// How many parameters there are.
    pub fn counts(&self) -> Counts {
        let size = |held: &Held| match held {
            Held::Trained(var) => var.elem_count(),
            Held::Frozen(weight) => weight.len(),
        };
        let base: usize = self.parameters.held.values().map(|(held, _)| size(held)).sum();
        let trainable: usize = self.trainable.values().map(|var| var.elem_count()).sum();
        let extra = if self.setup.method == Method::Full { 0 } else { trainable };
        Counts { trainable: trainable as u64, all: (base + extra) as u64 }
    }

    /// What is trained, under PEFT's names without the adapter's (`full`: transformers' names).
    pub fn trainable(&self) -> &BTreeMap<String, Var> {
        &self.trainable
    }

    /// The modules that the base lacks: they are drawn from the seed, and nothing has trained them
    /// yet. Those of a saved model are all there.
    pub fn fresh_modules(&self) -> Vec<&str> {
        self.parameters.fresh.iter().filter_map(|name| name.strip_suffix(".weight")).collect()
    }

    /// A digest of everything that is not trained, for checks that it stays as it was.
    ///
    /// # Errors
    /// When a tensor cannot be read.
    pub fn frozen_digest(&self) -> Result<crate::digest::Digest> {
        let mut all = Vec::new();
        for (name, (held, _)) in &self.parameters.held {
            if let Held::Frozen(weight) = held {
                let digest = weight.with(|w| {
                    let bytes: Vec<u8> = w.iter().copied().flat_map(f32::to_le_bytes).collect();
                    crate::digest::Digest::of(&bytes)
                })?;
                all.extend_from_slice(format!("{name} {digest}\n").as_bytes());
            }
        }
        Ok(crate::digest::Digest::of(&all))
    }

    fn pack(&self, batch: &Batch) -> Result<Packed> {
        batch.pack(self.config.vocab, self.config.positions)
    }

    /// Rows of the last layer's output without dropout, `[rows, hidden]`.
    fn hidden(&self, net: &Net, packed: &Packed, rows: &[u32]) -> Result<Buffer> {
        let sequences = net.sequences(packed);
        let pass = Pass::whole(Mode::Eval);
        // Only keys and values of the other rows are needed in the last layer.
        let ascending = rows.is_sorted_by(|a, b| a < b);
        // On a thread of the pool: from another, each parallel loop would wait for two of them.
        rayon::scope(|_| {
            let (mut x, _) = net.embed(packed, pass)?;
            for i in 0..net.layers() {
                let rows = (ascending && i + 1 == net.layers()).then_some(rows);
                (x, _) = net.layer(i, x, &sequences, Pass { rows, ..pass }, false)?;
            }
            Ok(if ascending { x } else { select_rows(&x, net.hidden(), rows) })
        })
    }

    /// Logits of some rows of the last layer's output, without dropout.
    fn logits_at(&self, net: &Net, rows: Buffer) -> Result<Buffer> {
        let pass = Pass::whole(Mode::Eval);
        let (features, _) = net.features(rows, pass)?;
        let x = Input::of(&features, net.output()?.inputs());
        Ok(net.output()?.forward(&x, pass)?.0)
    }

    /// Logits without dropout, f32: `[size, classes]`, or `[size, length, vocab]` with zeros on
    /// the padding.
    ///
    /// # Errors
    /// When the batch does not fit the model.
    pub fn logits(&self, batch: &Batch) -> Result<Tensor> {
        let engine = match &self.runner {
            Runner::Host(net) => return self.logits_of(net, batch),
            Runner::Gpu(engine) => engine,
        };
        let packed = self.pack(batch)?;
        if !self.config.is_decoder() {
            let logits = engine.logits(&packed, &first_tokens(&packed))?;
            return Ok(tensor(logits, (batch.size, self.classes()?))?);
        }
        let all: Vec<u32> = (0..packed.ids.len() as u32).collect();
        self.padded(batch, &packed, &engine.logits(&packed, &all)?)
    }

    /// Logits of a packed batch with zeros on the padding.
    fn padded(&self, batch: &Batch, packed: &Packed, logits: &[f32]) -> Result<Tensor> {
        let vocab = self.config.vocab;
        let mut padded = vec![0.0; batch.size * batch.length * vocab];
        for (row, range) in packed.rows().enumerate() {
            let from = &logits[range.start * vocab..range.end * vocab];
            padded[row * batch.length * vocab..][..from.len()].copy_from_slice(from);
        }
        Ok(tensor(padded, (batch.size, batch.length, vocab))?)
    }

    /// Classes of the head.
    fn classes(&self) -> Result<usize> {
        match &self.setup.task {
            super::setup::Task::SequenceClassification { classes } => Ok(*classes),
            super::setup::Task::CausalLm => bail!("the model has no classes"),
        }
    }

    pub(super) fn logits_of(&self, net: &Net, batch: &Batch) -> Result<Tensor> {
        let packed = self.pack(batch)?;
        let decoder = self.config.is_decoder();
        let rows = match decoder {
            true => (0..packed.ids.len() as u32).collect(),
            false => first_tokens(&packed),
        };
        let logits = self.logits_at(net, self.hidden(net, &packed, &rows)?)?;
        match decoder {
            true => self.padded(batch, &packed, &logits),
            false => Ok(tensor(logits.to_vec(), (batch.size, net.output()?.outputs()))?),
        }
    }

    /// Logits of what follows each row, without dropout, f32: `[size, vocab]`. Only the last token
    /// of each row reaches the output layer.
    ///
    /// # Errors
    /// When the model is not a decoder, or the batch does not fit it.
    pub fn next_logits(&self, batch: &Batch) -> Result<Tensor> {
        ensure!(self.config.is_decoder(), "an encoder does not predict the next token");
        let packed = self.pack(batch)?;
        let last: Vec<u32> = packed.rows().map(|range| range.end as u32 - 1).collect();
        let net = match &self.runner {
            Runner::Host(net) => net,
            Runner::Gpu(engine) => {
                let logits = engine.logits(&packed, &last)?;
                return Ok(tensor(logits, (batch.size, self.config.vocab))?);
            }
        };
        let logits = self.logits_at(net, self.hidden(net, &packed, &last)?)?;
        Ok(tensor(logits.to_vec(), (batch.size, self.config.vocab))?)
    }

    /// The rows of the last layer that predict something, in the order of the batch, and what.
    fn targets(&self, batch: &Batch, packed: &Packed) -> Result<Targets> {
        match (&batch.labels, self.config.is_decoder()) {
            (Labels::Classes(classes), false) => {
                Ok(Targets { rows: first_tokens(packed), targets: classes.clone() })
            }
            (Labels::Tokens(_), true) => {
                let (mut rows, mut targets) = (Vec::new(), Vec::new());
                for (row, range) in packed.rows().enumerate() {
                    for (position, label) in batch.row_targets(row) {
                        rows.push(u32::try_from(range.start + position)?);
                        let target = u32::try_from(label);
                        targets.push(target.with_context(|| format!("label {label}"))?);
                    }
                }
                Ok(Targets { rows, targets })
            }
            (Labels::None, _) => bail!("the batch has no labels"),
            (Labels::Classes(_), true) => {
                bail!("a decoder predicts tokens, the labels are classes")
            }
            (Labels::Tokens(_), false) => {
                bail!("an encoder predicts classes, the labels are tokens")
            }
        }
    }

    /// Rows of one block of logits.
    fn chunk(&self) -> usize {
        let width = if self.config.is_decoder() { self.config.vocab } else { 1024 };
        (LOGITS / width).max(16)
    }

    /// For each row of the batch the sum of the log-probabilities (natural logarithm) of its
    /// labels, and how many labels it has; without dropout.
    ///
    /// # Errors
    /// When the batch does not fit the model.
    pub fn target_log_probs(&self, batch: &Batch) -> Result<Vec<(f64, usize)>> {
        let packed = self.pack(batch)?;
        let targets = self.targets(batch, &packed)?;
        let mut each = self.log_probs_at(&packed, &targets)?.into_iter();
        let rows = (0..batch.size).map(|row| {
            let n = match batch.labels {
                Labels::Classes(_) => 1,
                _ => batch.row_targets(row).count(),
            };
            (each.by_ref().take(n).sum(), n)
        });
        Ok(rows.collect())
    }

    /// For each prompt the sum of the log-probabilities of each answer's tokens behind it, as
    /// [`Model::target_log_probs`] gives it to rounding; but a prompt passes through the model once
    /// for many answers. Without dropout.
    ///
    /// # Errors
    /// When the model is not a decoder, a prompt or an answer is empty, or both together do not
    /// fit the model.
    pub fn answer_log_probs(
        &self,
        prompts: &[&[u32]],
        answers: &[Vec<u32>],
    ) -> Result<Vec<Vec<f64>>> {
        ensure!(self.config.is_decoder(), "an encoder does not predict the next token");
        let longest = prompts.iter().map(|p| p.len()).max().unwrap_or_default()
            + answers.iter().map(Vec::len).max().unwrap_or_default();
        ensure!(
            longest <= self.config.positions,
            "a prompt and an answer of {longest} tokens are longer than the model's {} positions",
            self.config.positions
        );
        ensure!(prompts.iter().all(|p| !p.is_empty()), "there is no prompt to answer");
        ensure!(answers.iter().all(|a| !a.is_empty()), "an answer has no tokens");
        // A window counts the tokens between, and those of other answers would be among them.
        let windowed = self.config.windows.iter().any(Option::is_some);
        let mut sums = vec![Vec::with_capacity(answers.len()); prompts.len()];
        for answers in answers.chunks(if windowed { 1 } else { ANSWERS }) {
            let packed = Packed::answered(prompts, answers);
            let (mut rows, mut targets) = (Vec::new(), Vec::new());
            for (row, prompt) in packed.rows().zip(prompts) {
                // Each token is predicted by the one before it, the first by the prompt's last.
                let mut next = u32::try_from(row.start + prompt.len())?;
                for answer in answers {
                    let shown = answer.len() as u32 - 1;
                    rows.push((row.start + prompt.len()) as u32 - 1);
                    rows.extend(next..next + shown);
                    targets.extend_from_slice(answer);
                    next += shown;
                }
            }
            let each = self.log_probs_at(&packed, &Targets { rows, targets })?;
            let mut each = each.into_iter();
            for sums in &mut sums {
                sums.extend(answers.iter().map(|a| each.by_ref().take(a.len()).sum::<f64>()));
            }
        }
        Ok(sums)
    }

    fn log_probs_at(&self, packed: &Packed, targets: &Targets) -> Result<Vec<f64>> {
        let Targets { rows, targets } = targets;
        let net = match &self.runner {
            Runner::Host(net) => net,
            Runner::Gpu(engine) => return engine.log_probs(packed, rows, targets),
        };
        let x = self.hidden(net, packed, rows)?;
        let mut each = Vec::with_capacity(targets.len());
        let width = net.hidden();
        for (x, targets) in x.chunks(self.chunk() * width).zip(targets.chunks(self.chunk())) {
            let logits = self.logits_at(net, Buffer::of(x))?;
            each.extend(log_probs(&logits, net.output()?.outputs(), targets)?);
        }
        Ok(each)
    }

    /// The sum of the losses over the targets of the batch, and the gradient of that sum over
    /// `denominator` for every trainable parameter. With dropout, seeded by the setup's seed and
    /// `step`, which must differ between micro-batches.
    ///
    /// # Errors
    /// When the batch does not fit the model, or a trainable parameter was not reached.
    pub fn gradients(
        &self,
        batch: &Batch,
        step: u64,
        denominator: f64,
    ) -> Result<(f64, BTreeMap<String, Tensor>)> {
        ensure!(denominator > 0.0, "a loss over {denominator} targets");
        if let Some(engine) = self.gpu() {
            let loss = self.accumulate(engine, batch, step, denominator, true)?;
            return Ok((loss, engine.gradients()?));
        }
        let (loss, gradients) = self.host_gradients(batch, step, denominator)?;
        let shaped = gradients.into_iter().map(|(name, gradient)| {
            let gradient = tensor(gradient.to_vec(), self.trainable[&name].shape())?;
            Ok((name, gradient))
        });
        Ok((loss, shaped.collect::<Result<_>>()?))
    }

    /// The same where the model is on the CPU, flat.
    pub(super) fn host_gradients(
        &self,
        batch: &Batch,
        step: u64,
        denominator: f64,
    ) -> Result<(f64, BTreeMap<String, Buffer>)> {
        // On a thread of the pool, as in `hidden`.
        rayon::scope(|_| self.pass_gradients(batch, step, denominator))
    }

    fn pass_gradients(
        &self,
        batch: &Batch,
        step: u64,
        denominator: f64,
    ) -> Result<(f64, BTreeMap<String, Buffer>)> {
        let net = self.net()?;
        let packed = self.pack(batch)?;
        let targets = self.targets(batch, &packed)?;
        let pass = Pass::whole(Mode::Train(step));
        if targets.rows.is_empty() {
            let zeros = |var: &Var| Buffer::zeros(var.elem_count());
            let all = self.trainable.iter().map(|(name, var)| (name.clone(), zeros(var)));
            return Ok((0.0, all.collect()));
        }
        let sequences = net.sequences(&packed);
        // Above the last layer's attention only the rows that predict something are needed.
        let last = Pass { rows: Some(&targets.rows), ..pass };
        let (mut x, embedded) = net.embed(&packed, pass)?;
        let mut saved = Vec::with_capacity(net.layers());
        for i in 0..net.layers() {
            // Nothing goes back into layers below the first that is trained.
            let keep = net.trains_below(i + 1);
            let pass = if i + 1 == net.layers() { last } else { pass };
            let (output, kept) = net.layer(i, x, &sequences, pass, keep)?;
            saved.push(kept);
            x = output;
        }
        let (features, kept) = net.features(x, pass)?;
        let mut sums = Gradients::default();
        let (loss, grad) = self.output_gradients(&features, &targets, denominator, &mut sums)?;
        let mut grad = net.features_backward(kept, grad, &mut sums)?;
        while let Some(kept) = saved.pop() {
            let (Some(kept), Some(seed)) = (kept, grad.take()) else { break };
            let i = saved.len();
            let pass = if i + 1 == net.layers() { last } else { pass };
            grad = net.layer_backward(i, kept, seed, &sequences, pass, &mut sums)?;
        }
        if let Some(grad) = grad {
            net.embed_backward(&packed, embedded, grad, &mut sums)?;
        }
        let mut gradients = BTreeMap::new();
        for (name, var) in &self.trainable {
            let gradient = sums.take(var.as_tensor());
            let gradient =
                gradient.with_context(|| format!("no gradient reaches the parameter `{name}`"))?;
            gradients.insert(name.clone(), gradient);
        }
        Ok((loss, gradients))
    }

    /// Loss, and gradients of the output layer and of the features. In blocks of logits; the
    /// gradient of a trained output embedding is as large as that, so the blocks add theirs into
    /// one.
    fn output_gradients(
        &self,
        features: &[f32],
        targets: &Targets,
        denominator: f64,
        gradients: &mut Gradients,
    ) -> Result<(f64, Buffer)> {
        let output = self.net()?.output()?;
        let pass = Pass::whole(Mode::Eval);
        let (mut loss, mut dx) = (0.0, Buffer::new(features.len()));
        let width = features.len() / targets.targets.len();
        let rows = self.chunk();
        let parts = features.chunks(rows * width).zip(dx.chunks_mut(rows * width));
        for ((x, dx), wanted) in parts.zip(targets.targets.chunks(rows)) {
            let x = Input::of(x, output.inputs());
            let (mut logits, trace) = output.forward(&x, pass)?;
            loss += cross_entropy(&mut logits, output.outputs(), wanted, 1.0 / denominator)?;
            let g = Input::of(&logits, output.outputs());
            output.backward(&x, &g, trace.as_ref(), Some((dx, Write::Over)), gradients)?;
        }
        Ok((loss, dx))
    }
}

fn first_tokens(packed: &Packed) -> Vec<u32> {
    packed.rows().map(|range| range.start as u32).collect()
}

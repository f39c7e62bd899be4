//! The modules that models are built of, and where they get their tensors from.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Tensor, Var};

use super::init;
use super::ops::{Frozen, LoraArgs, Mask, affine, dropout, frozen_affine, lora_affine};
use super::random::Stream;

/// How a forward pass is run.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Mode {
    /// Without dropout.
    Eval,
    /// With the dropout of a step.
    Train(u64),
}

/// A place where elements are dropped.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dropout {
    stream: Stream,
    p: f64,
}

impl Dropout {
    /// The mask of a pass, if anything is dropped.
    pub(crate) fn mask(&self, mode: Mode) -> Option<Mask> {
        match mode {
            Mode::Eval => None,
            Mode::Train(step) => Mask::new(self.stream.at(step), self.p),
        }
    }

    /// Drops elements of `x`.
    pub(crate) fn forward(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        Ok(dropout(x, self.mask(mode))?)
    }
}

/// A tensor of the model.
#[derive(Debug, Clone)]
pub(crate) enum Held {
    /// Never changes.
    Frozen(Frozen),
    /// Is trained.
    Trained(Var),
}

/// A low-rank adapter.
#[derive(Debug, Clone)]
pub(crate) struct Adapter {
    /// `[r, in]`.
    pub(crate) a: Var,
    /// `[out, r]`.
    pub(crate) b: Var,
}

/// Every tensor of a model, by its name on the hub.
#[derive(Debug, Clone, Default)]
pub(crate) struct Parameters {
    /// With the data type that it was stored in.
    pub(crate) held: BTreeMap<String, (Held, DType)>,
    /// By module.
    pub(crate) adapters: BTreeMap<String, Adapter>,
    /// The factor on the adapters' outputs.
    pub(crate) scaling: f64,
    /// Probability of dropping an element of an adapter's input.
    pub(crate) adapter_dropout: f64,
    /// Names of those that the base lacks, drawn from the seed.
    pub(crate) fresh: BTreeSet<String>,
    /// Seeds the dropout.
    pub(crate) seed: u64,
    /// Takes the place of the model's own dropout.
    pub(crate) dropout: Option<f64>,
}

impl Parameters {
    fn held(&self, name: &str) -> Result<&Held> {
        self.held.get(name).map(|(held, _)| held).with_context(|| format!("no tensor `{name}`"))
    }

    /// A tensor that is not quantized; tracked if it is trained.
    pub(crate) fn tensor(&self, name: &str) -> Result<Tensor> {
        match self.held(name)? {
            Held::Trained(var) => Ok(var.as_tensor().clone()),
            Held::Frozen(Frozen::Dense(tensor)) => Ok(tensor.clone()),
            Held::Frozen(Frozen::Nf4(_)) => bail!("`{name}` is quantized"),
            Held::Frozen(Frozen::Away(_)) => bail!("`{name}` is on the GPU"),
        }
    }

    /// Whether the weight of a module is trained whole.
    pub(crate) fn whole(&self, module: &str) -> bool {
        matches!(self.held.get(&format!("{module}.weight")), Some((Held::Trained(_), _)))
    }

    /// A linear layer with its adapter, if it has one.
    pub(crate) fn linear(&self, module: &str) -> Result<Linear> {
        let weight = self.held(&format!("{module}.weight"))?.clone();
        let bias = format!("{module}.bias");
        let bias = self.held.contains_key(&bias).then(|| self.tensor(&bias)).transpose()?;
        let adapter = self.adapters.get(module).cloned();
        let dropout = self.lora_dropout(module);
        Ok(Linear { weight, bias, adapter, scaling: self.scaling, dropout })
    }

    /// The dropout of the input of a module's adapter.
    pub(crate) fn lora_dropout(&self, module: &str) -> Dropout {
        let stream = Stream::new(self.seed, &format!("dropout/lora/{module}"));
        Dropout { stream, p: self.adapter_dropout }
    }

    /// A place where the model drops elements with probability `p`, unless that is overruled.
    pub(crate) fn dropout(&self, place: &str, p: f64) -> Dropout {
        let stream = Stream::new(self.seed, &format!("dropout/{place}"));
        Dropout { stream, p: self.dropout.unwrap_or(p) }
    }
}

/// `x W^T + b`: trained, frozen or quantized, with or without an adapter.
#[derive(Debug, Clone)]
pub(crate) struct Linear {
    weight: Held,
    bias: Option<Tensor>,
    adapter: Option<Adapter>,
    scaling: f64,
    dropout: Dropout,
}

impl Linear {
    /// A layer without bias around a tensor that may be shared (a tied output embedding).
    pub(crate) fn of(parameters: &Parameters, weight: &str) -> Result<Self> {
        let stream = Stream::new(0, weight);
        Ok(Self {
            weight: parameters.held(weight)?.clone(),
            bias: None,
            adapter: None,
            scaling: 1.0,
            dropout: Dropout { stream, p: 0.0 },
        })
    }

    /// `[.., in]` to `[.., out]`.
    pub(crate) fn forward(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        let bias = self.bias.as_ref();
        Ok(match (&self.weight, &self.adapter) {
            (Held::Trained(w), None) => affine(x, w, bias)?,
            (Held::Frozen(w), None) => frozen_affine(x, w, bias)?,
            (Held::Frozen(weight), Some(Adapter { a, b })) => {
                let dropout = self.dropout.mask(mode);
                let scaling = self.scaling;
                lora_affine(x, LoraArgs { weight, bias, a, b, scaling, dropout })?
            }
            (Held::Trained(_), Some(_)) => bail!("an adapter on a layer that is trained whole"),
        })
    }
}

/// One frozen linear layer with a low-rank adapter, alone: what the models are built of.
#[derive(Debug, Clone)]
pub struct LoraLinear {
    linear: Linear,
    adapter: Adapter,
}

impl LoraLinear {
    /// An adapter of rank `r` and scaling `alpha / r` on a frozen weight `[out, in]` (f32) with an
    /// optional bias `[out]`. A is drawn from `seed`, B is zero.
    ///
    /// # Errors
    /// When the weight is not a matrix, or the rank is 0.
    pub fn new(
        weight: &Tensor,
        bias: Option<&Tensor>,
        r: usize,
        alpha: f64,
        seed: u64,
    ) -> Result<Self> {
        ensure!(r > 0, "the adapter's rank is 0");
        let (a, b) = init::adapter("linear", r, weight.dims2()?, seed)?;
        let adapter = Adapter { a: Var::from_tensor(&a)?, b: Var::from_tensor(&b)? };
        let linear = Linear {
            weight: Held::Frozen(Frozen::Dense(weight.detach())),
            bias: bias.map(Tensor::detach),
            adapter: Some(adapter.clone()),
            scaling: alpha / r as f64,
            dropout: Dropout { stream: Stream::new(seed, "dropout/linear"), p: 0.0 },
        };
        Ok(Self { linear, adapter })
    }

    /// A, `[r, in]`.
    pub fn a(&self) -> &Var {
        &self.adapter.a
    }

    /// B, `[out, r]`.
    pub fn b(&self) -> &Var {
        &self.adapter.b
    }

    /// `x W^T + b`, without the adapter.
    ///
    /// # Errors
    /// As [`LoraLinear::forward`].
    pub fn forward_frozen(&self, x: &Tensor) -> Result<Tensor> {
        Linear { adapter: None, ..self.linear.clone() }.forward(x, Mode::Eval)
    }

    /// `x W^T + b + s (x A^T) B^T`: `[.., in]` to `[.., out]`; `x`, A and B can get gradients.
    ///
    /// # Errors
    /// When the last size of `x` is not `in`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.linear.forward(x, Mode::Eval)
    }
}

//! Linear layers, and where models get their tensors from.

mod half;
mod input;
mod layer;

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail};
use candle_core::{DType, Tensor, Var};
use rayon::prelude::*;

use super::arithmetic::Arithmetic;
use super::ops::{Frozen, Kept, Mask};
use super::random::Stream;

pub(crate) use input::Input;
pub(crate) use layer::{Linear, Trace, Write};

/// How a forward pass is run.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Mode {
    /// Without dropout.
    Eval,
    /// With the dropout of a step.
    Train(u64),
}

/// A forward or backward pass over some rows of a batch.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pass<'a> {
    pub(crate) mode: Mode,
    /// Which rows of the batch there are, in their order; `None`: all.
    pub(crate) rows: Option<&'a [u32]>,
}

impl Pass<'_> {
    /// A pass over all rows.
    pub(crate) fn whole(mode: Mode) -> Self {
        Self { mode, rows: None }
    }
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

    /// Draws what is kept of a matrix `[rows, cols]` in a pass; none if that is all.
    pub(crate) fn draw(&self, (rows, cols): (usize, usize), pass: Pass<'_>) -> Option<Kept> {
        let mask = self.mask(pass.mode)?;
        Some(match pass.rows {
            Some(rows) => mask.of(rows.par_iter().map(|row| *row as usize), cols),
            None => mask.of((0..rows).into_par_iter(), cols),
        })
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
    /// In which products are computed.
    pub(crate) arithmetic: Arithmetic,
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
        let linear = Linear::new(weight, bias, adapter, self.scaling, dropout)?;
        Ok(linear.within(self.arithmetic))
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

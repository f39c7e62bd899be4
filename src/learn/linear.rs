//! Linear layers, and where models get their tensors from.

mod half;
mod input;
mod layer;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use anyhow::{Context, Result, bail};
use candle_core::{DType, Tensor, Var};
use rayon::prelude::*;

use super::arithmetic::Arithmetic;
use super::buffer::Buffer;
use super::ops::{Frozen, Mask, TASK, wide};
use super::random::Stream;

pub(crate) use input::Input;
pub(crate) use layer::{Linear, Write};

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

    /// Drops elements of `x`, or of its gradient.
    pub(crate) fn apply(&self, x: &mut [f32], pass: Pass<'_>) {
        match (self.mask(pass.mode), pass.rows) {
            (Some(mask), Some(rows)) => mask.apply_to_rows(rows, x),
            (Some(mask), None) => mask.apply_to(x),
            (None, _) => {}
        }
    }

    /// Drops elements of the numbered rows among those of the pass, on this thread.
    pub(crate) fn apply_at(&self, range: Range<usize>, x: &mut [f32], pass: Pass<'_>) {
        let Some(mask) = self.mask(pass.mode) else { return };
        let cols = x.len() / range.len().max(1);
        match pass.rows {
            None => mask.apply_from(range.start * cols, x),
            Some(rows) => {
                for (row, x) in rows[range].iter().zip(x.chunks_exact_mut(cols.max(1))) {
                    mask.apply_from(*row as usize * cols, x);
                }
            }
        }
    }

    /// Drops elements of `x` and adds the rest to `onto`.
    pub(crate) fn add_applied(&self, x: &mut [f32], pass: Pass<'_>, onto: &mut [f32]) {
        const ROWS: usize = 16;
        let rows = pass.rows.map_or(1, <[u32]>::len);
        // Without chosen rows any cut will do.
        let part = if pass.rows.is_some() { ROWS * (x.len() / rows.max(1)) } else { TASK };
        let parts = x.par_chunks_mut(part.max(1)).zip(onto.par_chunks_mut(part.max(1)));
        parts.enumerate().for_each(|(i, (x, onto))| {
            match (pass.rows, self.mask(pass.mode)) {
                (None, Some(mask)) => mask.apply_from(i * part, x),
                (None, None) => {}
                (Some(rows), _) => {
                    let first = i * ROWS;
                    self.apply_at(first..(first + ROWS).min(rows.len()), x, pass);
                }
            }
            wide!(onto.iter_mut().zip(x.iter()).for_each(|(o, x)| *o += x));
        });
    }

    /// A copy of `x` with elements dropped, if any are.
    pub(crate) fn applied(&self, x: &[f32], pass: Pass<'_>) -> Option<Buffer> {
        self.mask(pass.mode).map(|_| {
            let mut x = Buffer::of(x);
            self.apply(&mut x, pass);
            x
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

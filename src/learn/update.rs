//! Gradients of an update and what is done with them, on the CPU or where the model is.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use candle_core::Tensor;

use super::batch::Batch;
use super::buffer::Buffer;
use super::cuda::Engine;
use super::gate::GradientGate;
use super::model::Model;
use super::ops::add;
use super::optimizer::{AdamW, AdamWConfig, global_norm};

/// The gradients of the micro-batches of an update, summed.
pub(super) enum Gradients<'a> {
    /// By parameter, flat.
    Host(BTreeMap<String, Buffer>),
    /// They stay on the GPU; whether there are any yet.
    Gpu(&'a Engine, bool),
}

impl<'a> Gradients<'a> {
    /// None yet.
    pub(super) fn new(model: &'a Model) -> Self {
        match model.gpu() {
            Some(engine) => Self::Gpu(engine, false),
            None => Self::Host(BTreeMap::new()),
        }
    }

    /// Adds those of a micro-batch; gives the sum of its losses. See [`Model::gradients`].
    pub(super) fn add(
        &mut self,
        model: &Model,
        batch: &Batch,
        micro: u64,
        denominator: f64,
    ) -> Result<f64> {
        let all = match self {
            Self::Gpu(engine, begun) => {
                let first = !std::mem::replace(begun, true);
                return model.accumulate(engine, batch, micro, denominator, first);
            }
            Self::Host(all) => all,
        };
        let (loss, gradients) = model.host_gradients(batch, micro, denominator)?;
        if all.is_empty() {
            *all = gradients;
            return Ok(loss);
        }
        for (name, gradient) in gradients {
            let sum = all.get_mut(&name).with_context(|| {
                format!("parameter `{name}` has a gradient in one micro-batch and not in another")
            })?;
            add(sum, &gradient);
        }
        Ok(loss)
    }

    /// The L2 norm over all of them together.
    pub(super) fn global_norm(&self) -> Result<f64> {
        match self {
            Self::Host(all) => Ok(global_norm(all)),
            Self::Gpu(engine, _) => engine.global_norm(),
        }
    }

    /// Shows them to the gate.
    pub(super) fn pass(&self, gate: &mut GradientGate) -> Result<()> {
        match self {
            Self::Host(all) => gate.gradients(all),
            Self::Gpu(engine, _) => {
                let flat = |(name, g): (String, Tensor)| Ok((name, g.flatten_all()?.to_vec1()?));
                let all = engine.gradients()?.into_iter().map(flat);
                gate.gradients(&all.collect::<Result<BTreeMap<String, Vec<f32>>>>()?)
            }
        }
    }
}

/// AdamW where the model is.
#[derive(Debug)]
pub(super) enum Optimizer {
    /// With its moments.
    Host(AdamW),
    /// The moments are on the GPU.
    Gpu {
        config: AdamWConfig,
        /// Updates made so far.
        updates: u64,
    },
}

impl Optimizer {
    /// One that has made no update.
    pub(super) fn new(model: &Model, config: AdamWConfig) -> Self {
        match model.gpu() {
            Some(_) => Self::Gpu { config, updates: 0 },
            None => Self::Host(AdamW::new(model.trainable(), config)),
        }
    }

    /// Goes on after so many updates; `get` gives the moments of a parameter by `mean` or `square`
    /// and its name.
    pub(super) fn go_on(
        &mut self,
        model: &Model,
        done: u64,
        get: &dyn Fn(&str, &str) -> Result<Tensor>,
    ) -> Result<()> {
        match self {
            Self::Host(adamw) => {
                *adamw = AdamW::resumed(model.trainable(), adamw.config(), done, get)?;
            }
            Self::Gpu { updates, .. } => {
                *updates = done;
                if let Some(engine) = model.gpu() {
                    engine.set_moments(get)?;
                }
            }
        }
        Ok(())
    }

    /// Updates made so far.
    pub(super) fn updates(&self) -> u64 {
        match self {
            Self::Host(adamw) => adamw.updates(),
            Self::Gpu { updates, .. } => *updates,
        }
    }

    /// Its state by `mean/` or `square/` and the parameter's name, flat.
    pub(super) fn moments(&self, model: &Model) -> Result<BTreeMap<String, Tensor>> {
        match (self, model.gpu()) {
            (Self::Host(adamw), _) => adamw.moments(),
            (Self::Gpu { .. }, Some(engine)) => engine.moments(),
            (Self::Gpu { .. }, None) => Ok(BTreeMap::new()),
        }
    }

    /// One update at a rate. Gradients are multiplied by `scale` first.
    pub(super) fn update(
        &mut self,
        model: &Model,
        gradients: &Gradients<'_>,
        rate: f64,
        scale: f64,
    ) -> Result<()> {
        match (self, gradients) {
            (Self::Host(adamw), Gradients::Host(all)) => {
                adamw.update(model.trainable(), all, rate, scale)
            }
            (Self::Gpu { config, updates }, Gradients::Gpu(engine, _)) => {
                *updates += 1;
                engine.update(*config, *updates, rate, scale)
            }
            _ => anyhow::bail!("gradients and optimizer are not in the same place"),
        }
    }
}

//! Where a model's numbers are: what a model on a GPU does otherwise.

use anyhow::{Result, bail, ensure};

use super::{Model, Runner, Targets};
use crate::learn::batch::Batch;
use crate::learn::cuda::Engine;
use crate::learn::net::Net;

impl Model {
    /// The CPU's operations of it.
    pub(super) fn net(&self) -> Result<&Net> {
        match &self.runner {
            Runner::Host(net) => Ok(net),
            Runner::Gpu(_) => bail!("the model is on the GPU"),
        }
    }

    /// The GPU that it is on.
    pub(in crate::learn) fn gpu(&self) -> Option<&Engine> {
        match &self.runner {
            Runner::Host(_) => None,
            Runner::Gpu(engine) => Some(engine),
        }
    }

    /// Brings what is trained from the GPU, if the model is there, to [`Model::trainable`].
    ///
    /// # Errors
    /// When the GPU does not answer.
    pub fn fetch(&self) -> Result<()> {
        self.gpu().map_or(Ok(()), |engine| engine.load(&self.trainable))
    }

    /// Brings [`Model::trainable`], changed from outside, to the GPU, if the model is there.
    ///
    /// # Errors
    /// When the GPU does not answer.
    pub fn put(&self) -> Result<()> {
        self.gpu().map_or(Ok(()), |engine| engine.store(&self.trainable))
    }

    /// Bytes of a GPU's memory that it takes, with what training has needed so far.
    ///
    /// # Errors
    /// When the GPU does not answer.
    pub fn gpu_memory(&self) -> Result<Option<usize>> {
        self.gpu().map(Engine::memory).transpose()
    }

    /// The same on the GPU, where the gradients stay; they are added to those of before unless
    /// this is the `first` micro-batch of an update. The sum of the losses.
    pub(in crate::learn) fn accumulate(
        &self,
        engine: &Engine,
        batch: &Batch,
        step: u64,
        denominator: f64,
        first: bool,
    ) -> Result<f64> {
        ensure!(denominator > 0.0, "a loss over {denominator} targets");
        let packed = self.pack(batch)?;
        let Targets { rows, targets } = self.targets(batch, &packed)?;
        engine.accumulate(&packed, (&rows, &targets), step, denominator, first)
    }
}

//! Weights that are never trained.

use std::sync::Arc;

use candle_core::{Result, Shape, Tensor, bail};

use super::{Buffer, tensor, with_slices};
use crate::learn::nf4::Nf4;

/// A frozen weight, `[out, in]`.
#[derive(Debug, Clone)]
pub(crate) enum Frozen {
    /// As f32.
    Dense(Tensor),
    /// In 4 bits; unpacked for each use.
    Nf4(Arc<Nf4>),
    /// On the GPU: only its shape is here.
    Away(Shape),
}

const AWAY: &str = "the weight is on the GPU";

/// All leading sizes as one, and the last.
fn matrix(shape: &Shape) -> (usize, usize) {
    let cols = shape.dims().last().copied().unwrap_or(1);
    (shape.elem_count() / cols.max(1), cols)
}

impl Frozen {
    /// Outputs and inputs.
    pub(crate) fn dims(&self) -> (usize, usize) {
        match self {
            Self::Dense(w) => matrix(w.shape()),
            Self::Nf4(w) => w.dims(),
            Self::Away(shape) => matrix(shape),
        }
    }

    /// How many numbers it holds.
    pub(crate) fn len(&self) -> usize {
        let (outputs, inputs) = self.dims();
        outputs * inputs
    }

    /// Calls `f` with the weight as f32, row-major.
    pub(crate) fn with<T>(&self, f: impl FnOnce(&[f32]) -> T) -> Result<T> {
        match self {
            Self::Dense(w) => with_slices([w], |[w]| f(w)),
            Self::Nf4(w) => {
                let mut all = Buffer::new(self.len());
                w.dequantize_into(&mut all);
                Ok(f(&all))
            }
            Self::Away(_) => bail!("{AWAY}"),
        }
    }

    /// As an f32 tensor.
    pub(crate) fn dense(&self) -> Result<Tensor> {
        match self {
            Self::Dense(w) => Ok(w.clone()),
            Self::Nf4(w) => tensor(w.dequantize(), w.dims()),
            Self::Away(_) => bail!("{AWAY}"),
        }
    }
}

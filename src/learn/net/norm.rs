//! Norms with their weights.

use anyhow::{Result, ensure};
use candle_core::Tensor;

use crate::learn::buffer::Buffer;
use crate::learn::gradients::Gradients;
use crate::learn::linear::Parameters;
use crate::learn::matrix::sum_rows;
use crate::learn::ops::{
    Kept, add_layer_norm, layer_norm, layer_norm_backward, layer_norm_weight, rms_norm,
    rms_norm_backward, rms_norm_weight, with_slices,
};

#[derive(Debug)]
pub(super) struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f32,
}

impl LayerNorm {
    pub(super) fn new(p: &Parameters, module: &str, eps: f64) -> Result<Self> {
        let [weight, bias] = ["weight", "bias"].map(|part| p.tensor(&format!("{module}.{part}")));
        let (weight, bias) = (weight?, bias?);
        let (w, b) = (weight.elem_count(), bias.elem_count());
        ensure!(w == b && w > 0, "a layer norm `{module}` of {w} weights and {b} biases");
        Ok(Self { weight, bias, eps: eps as f32 })
    }

    pub(super) fn trains(&self) -> bool {
        self.weight.track_op() || self.bias.track_op()
    }

    /// Numbers of a row.
    pub(super) fn width(&self) -> usize {
        self.weight.elem_count()
    }

    pub(super) fn forward(&self, x: &[f32]) -> Result<Buffer> {
        let mut out = Buffer::new(x.len());
        with_slices([&self.weight, &self.bias], |[w, b]| layer_norm(x, w, b, self.eps, &mut out))?;
        Ok(out)
    }

    /// `sum += x` after dropout of `sum`, and the norm of that.
    pub(super) fn add_forward(
        &self,
        sum: &mut [f32],
        kept: Option<&Kept>,
        x: &[f32],
    ) -> Result<Buffer> {
        let mut out = Buffer::new(x.len());
        with_slices([&self.weight, &self.bias], |[w, b]| {
            add_layer_norm((sum, x), kept, w, b, self.eps, &mut out);
        })?;
        Ok(out)
    }

    /// Makes the gradient of the result that of `x`.
    pub(super) fn backward(
        &self,
        x: &[f32],
        grad: &mut [f32],
        gradients: &mut Gradients,
    ) -> Result<()> {
        let d = self.weight.elem_count();
        if self.weight.track_op() {
            gradients.add(&self.weight, layer_norm_weight(x, d, self.eps, grad))?;
        }
        if self.bias.track_op() {
            gradients.add(&self.bias, sum_rows(grad, d))?;
        }
        with_slices([&self.weight], |[w]| layer_norm_backward(x, w, self.eps, grad))?;
        Ok(())
    }
}

#[derive(Debug)]
pub(super) struct RmsNorm {
    weight: Tensor,
    eps: f32,
}

impl RmsNorm {
    pub(super) fn new(p: &Parameters, module: &str, eps: f64) -> Result<Self> {
        let weight = p.tensor(&format!("{module}.weight"))?;
        ensure!(weight.elem_count() > 0, "an RMS norm `{module}` without weights");
        Ok(Self { weight, eps: eps as f32 })
    }

    pub(super) fn trains(&self) -> bool {
        self.weight.track_op()
    }

    pub(super) fn forward(&self, x: &[f32]) -> Result<Buffer> {
        let mut out = Buffer::new(x.len());
        with_slices([&self.weight], |[w]| rms_norm(x, w, self.eps, &mut out))?;
        Ok(out)
    }

    /// Makes the gradient of the result that of `x`.
    pub(super) fn backward(
        &self,
        x: &[f32],
        grad: &mut [f32],
        gradients: &mut Gradients,
    ) -> Result<()> {
        if self.weight.track_op() {
            let d = self.weight.elem_count();
            gradients.add(&self.weight, rms_norm_weight(x, d, self.eps, grad))?;
        }
        with_slices([&self.weight], |[w]| rms_norm_backward(x, w, self.eps, grad))?;
        Ok(())
    }
}

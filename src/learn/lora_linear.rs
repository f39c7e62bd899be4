//! One linear layer with an adapter as an operation of candle's graph, to look at alone.

use anyhow::{Result, ensure};
use candle_core::{CpuStorage, CustomOp3, Layout, Shape, Tensor, Var};

use super::gradients::Gradients;
use super::init;
use super::linear::{Adapter, Input, Linear, Mode, Pass, Write};
use super::ops::{slice, tensor, with_slices};

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
        let linear = Linear::adapted(weight, bias, adapter.clone(), alpha / r as f64)?;
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
    /// When the last size of `x` is not `in`.
    pub fn forward_frozen(&self, x: &Tensor) -> Result<Tensor> {
        let layer = self.linear.bare();
        let pass = Pass::whole(Mode::Eval);
        let run = |[x]: [&[f32]; 1]| layer.forward(&Input::of(x, layer.inputs()), pass);
        let (out, _) = with_slices([x], run)??;
        Ok(tensor(out.to_vec(), self.shape(x.shape()))?)
    }

    /// `x W^T + b + s (x A^T) B^T`: `[.., in]` to `[.., out]`; `x`, A and B can get gradients.
    ///
    /// # Errors
    /// As [`LoraLinear::forward_frozen`].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let Adapter { a, b } = &self.adapter;
        Ok(x.apply_op3(a, b, Op(self.clone()))?)
    }

    fn shape(&self, x: &Shape) -> Shape {
        let mut dims = x.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = self.linear.outputs();
        }
        Shape::from(dims)
    }
}

struct Op(LoraLinear);

type Three = (Option<Tensor>, Option<Tensor>, Option<Tensor>);

impl CustomOp3 for Op {
    fn name(&self) -> &'static str {
        "lora-linear"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let out = {
            let x = Input::of(slice(s1, l1)?, self.0.linear.inputs());
            self.0.linear.forward(&x, Pass::whole(Mode::Eval))
        };
        let (out, _) = out.map_err(candle_core::Error::wrap)?;
        Ok((CpuStorage::F32(out.to_vec()), self.0.shape(l1.shape())))
    }

    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<Three> {
        let mut gradients = Gradients::default();
        let mut dx = vec![0.0; x.elem_count()];
        with_slices([x, grad], |[x, g]| {
            let into = Some((&mut dx[..], Write::Over));
            let layer = &self.0.linear;
            let (x, g) = (Input::of(x, layer.inputs()), Input::of(g, layer.outputs()));
            let trace = layer.trace(&x, Pass::whole(Mode::Eval))?;
            layer.backward(&x, &g, trace.as_ref(), into, &mut gradients)
        })?
        .map_err(candle_core::Error::wrap)?;
        let of = |gradients: &mut Gradients, var: &Tensor| {
            gradients.take(var).map(|g| tensor(g.to_vec(), var.shape())).transpose()
        };
        let dx = x.track_op().then(|| tensor(dx, x.shape())).transpose()?;
        Ok((dx, of(&mut gradients, a)?, of(&mut gradients, b)?))
    }
}

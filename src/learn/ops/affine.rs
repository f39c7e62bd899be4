//! Linear maps `y = x W^T + b`: trained, frozen, and frozen with a low-rank adapter.
//!
//! A frozen weight lives inside the operation, so nothing can ask for its gradient.

use std::sync::Arc;

use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, bail,
};
use rayon::prelude::*;

use super::dropout::Mask;
use super::{matrix, slice, tensor, with_slices};
use crate::learn::matrix::{Matrix, Threads, product, sum_rows};
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

impl Frozen {
    /// Outputs and inputs.
    pub(crate) fn dims(&self) -> (usize, usize) {
        match self {
            Self::Dense(w) => {
                let (inputs, outputs) = (matrix(w.shape()).1, matrix(w.shape()).0);
                (outputs, inputs)
            }
            Self::Nf4(w) => w.dims(),
            Self::Away(shape) => matrix(shape),
        }
    }

    /// How many numbers it holds.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Dense(w) => w.elem_count(),
            Self::Nf4(w) => w.dims().0 * w.dims().1,
            Self::Away(shape) => shape.elem_count(),
        }
    }

    /// Calls `f` with the weight as f32, row-major.
    pub(crate) fn with<T>(&self, f: impl FnOnce(&[f32]) -> T) -> Result<T> {
        match self {
            Self::Dense(w) => with_slices([w], |[w]| f(w)),
            Self::Nf4(w) => Ok(f(&w.dequantize())),
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

/// `x W^T + b` of row-major `x` `[rows, inputs]` and `w` `[outputs, inputs]`.
fn forward(x: &[f32], w: &[f32], b: Option<&[f32]>, (outputs, inputs): (usize, usize)) -> Vec<f32> {
    let rows = x.len() / inputs.max(1);
    let mut out = vec![0.0; rows * outputs];
    if let Some(b) = b {
        out.par_chunks_mut(outputs).with_min_len(16).for_each(|row| row.copy_from_slice(b));
    }
    let beta = if b.is_some() { 1.0 } else { 0.0 };
    let (x, w) = (Matrix::new(x, rows, inputs), Matrix::new(w, outputs, inputs));
    product((&mut out, outputs), beta, 1.0, x, w.t(), Threads::All);
    out
}

/// `g W`: the gradient of the input.
fn input_gradient(g: &[f32], w: &[f32], (outputs, inputs): (usize, usize)) -> Vec<f32> {
    let rows = g.len() / outputs.max(1);
    let mut dx = vec![0.0; rows * inputs];
    let (g, w) = (Matrix::new(g, rows, outputs), Matrix::new(w, outputs, inputs));
    product((&mut dx, inputs), 0.0, 1.0, g, w, Threads::All);
    dx
}

/// The shape of the result, if the sizes fit.
fn checked(x: &Shape, (outputs, inputs): (usize, usize), bias: Option<usize>) -> Result<Shape> {
    if matrix(x).1 != inputs || outputs == 0 || bias.is_some_and(|b| b != outputs) {
        bail!("a linear map of {inputs} to {outputs}, bias {bias:?}, on {:?}", x.dims());
    }
    let mut dims = x.dims().to_vec();
    if let Some(last) = dims.last_mut() {
        *last = outputs;
    }
    Ok(Shape::from(dims))
}

struct Affine;

impl Affine {
    fn gradients(x: &Tensor, w: &Tensor, g: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (outputs, inputs) = w.dims2()?;
        let (to_x, to_w) = (x.track_op(), w.track_op());
        let (dx, dw) = with_slices([x, w, g], |[x_, w_, g_]| {
            let dx = to_x.then(|| input_gradient(g_, w_, (outputs, inputs)));
            let dw = to_w.then(|| {
                let rows = x_.len() / inputs;
                let mut dw = vec![0.0; w_.len()];
                let (g, x) = (Matrix::new(g_, rows, outputs), Matrix::new(x_, rows, inputs));
                product((&mut dw, inputs), 0.0, 1.0, g.t(), x, Threads::All);
                dw
            });
            (dx, dw)
        })?;
        Ok((
            dx.map(|v| tensor(v, x.shape())).transpose()?,
            dw.map(|v| tensor(v, w.shape())).transpose()?,
        ))
    }
}

fn dims(layout: &Layout) -> Result<(usize, usize)> {
    layout.shape().dims2()
}

impl CustomOp2 for Affine {
    fn name(&self) -> &'static str {
        "affine"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let shape = checked(l1.shape(), dims(l2)?, None)?;
        Ok((CpuStorage::F32(forward(slice(s1, l1)?, slice(s2, l2)?, None, dims(l2)?)), shape))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Self::gradients(x, w, grad)
    }
}

impl CustomOp3 for Affine {
    fn name(&self) -> &'static str {
        "affine"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let shape = checked(l1.shape(), dims(l2)?, Some(l3.shape().elem_count()))?;
        let (x, w, b) = (slice(s1, l1)?, slice(s2, l2)?, slice(s3, l3)?);
        Ok((CpuStorage::F32(forward(x, w, Some(b), dims(l2)?)), shape))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (dx, dw) = Self::gradients(x, w, grad)?;
        let db = match b.track_op() {
            true => {
                let db = with_slices([grad], |[g]| sum_rows(g, b.elem_count()))?;
                Some(tensor(db, b.shape())?)
            }
            false => None,
        };
        Ok((dx, dw, db))
    }
}

/// `x W^T + b`, with gradients for whatever is tracked. `x` is `[.., in]`, `w` is `[out, in]`.
pub(crate) fn affine(x: &Tensor, w: &Tensor, b: Option<&Tensor>) -> Result<Tensor> {
    match b {
        Some(b) => x.apply_op3(w, b, Affine),
        None => x.apply_op2(w, Affine),
    }
}

struct FrozenAffine {
    weight: Frozen,
    bias: Option<Tensor>,
}

impl FrozenAffine {
    fn forward(&self, x: &[f32]) -> Result<Vec<f32>> {
        let dims = self.weight.dims();
        self.weight.with(|w| match &self.bias {
            Some(b) => with_slices([b], |[b]| forward(x, w, Some(b), dims)),
            None => Ok(forward(x, w, None, dims)),
        })?
    }

    fn shape(&self, x: &Layout) -> Result<Shape> {
        checked(x.shape(), self.weight.dims(), self.bias.as_ref().map(Tensor::elem_count))
    }
}

impl CustomOp1 for FrozenAffine {
    fn name(&self) -> &'static str {
        "frozen-affine"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let shape = self.shape(layout)?;
        Ok((CpuStorage::F32(self.forward(slice(storage, layout)?)?), shape))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let dims = self.weight.dims();
        let dx = with_slices([grad], |[g]| self.weight.with(|w| input_gradient(g, w, dims)))??;
        tensor(dx, x.shape()).map(Some)
    }
}

/// `x W^T + b` of a frozen map: only `x` can get a gradient.
pub(crate) fn frozen_affine(x: &Tensor, weight: &Frozen, bias: Option<&Tensor>) -> Result<Tensor> {
    let bias = bias.map(Tensor::detach);
    x.apply_op1(FrozenAffine { weight: weight.clone(), bias })
}

/// What a frozen map with an adapter is made of.
pub(crate) struct LoraArgs<'a> {
    /// `[out, in]`.
    pub(crate) weight: &'a Frozen,
    /// `[out]`.
    pub(crate) bias: Option<&'a Tensor>,
    /// `[r, in]`.
    pub(crate) a: &'a Tensor,
    /// `[out, r]`.
    pub(crate) b: &'a Tensor,
    /// The factor on the adapter's output.
    pub(crate) scaling: f64,
    /// Drops elements of the adapter's input.
    pub(crate) dropout: Option<Mask>,
}

struct LoraAffine {
    base: FrozenAffine,
    scaling: f32,
    dropout: Option<Mask>,
}

/// `x A^T`, `[rows, r]`.
fn down(x: &[f32], a: &[f32], (r, inputs): (usize, usize)) -> Vec<f32> {
    let rows = x.len() / inputs;
    let mut h = vec![0.0; rows * r];
    let (x, a) = (Matrix::new(x, rows, inputs), Matrix::new(a, r, inputs));
    product((&mut h, r), 0.0, 1.0, x, a.t(), Threads::All);
    h
}

impl CustomOp3 for LoraAffine {
    fn name(&self) -> &'static str {
        "lora-affine"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let shape = self.base.shape(l1)?;
        let (outputs, inputs) = self.base.weight.dims();
        let (r, _) = dims(l2)?;
        if dims(l2)? != (r, inputs) || dims(l3)? != (outputs, r) {
            bail!("an adapter of {:?} and {:?} on {outputs} x {inputs}", l2.dims(), l3.dims());
        }
        let (x, a, b) = (slice(s1, l1)?, slice(s2, l2)?, slice(s3, l3)?);
        let mut out = self.base.forward(x)?;
        let h = match &self.dropout {
            Some(mask) => down(&mask.apply(x), a, (r, inputs)),
            None => down(x, a, (r, inputs)),
        };
        let h = Matrix::new(&h, x.len() / inputs, r);
        let b = Matrix::new(b, outputs, r).t();
        product((&mut out, outputs), 1.0, self.scaling, h, b, Threads::All);
        Ok((CpuStorage::F32(out), shape))
    }

    /// With K = G B: dA = s K^T drop(X), dB = s G^T H, dX = G W + s mask(K A). B A is never formed.
    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (outputs, inputs) = self.base.weight.dims();
        let (r, _) = a.dims2()?;
        let (to_x, to_a, to_b) = (x.track_op(), a.track_op(), b.track_op());
        let s = self.scaling;
        let done = with_slices([x, a, b, grad], |[x, a, b, g]| -> Result<_> {
            let rows = x.len() / inputs;
            let dropped = self.dropout.as_ref().map(|mask| mask.apply(x));
            let fed = dropped.as_deref().unwrap_or(x);
            let g_ = Matrix::new(g, rows, outputs);
            let mut k = vec![0.0; rows * r];
            product((&mut k, r), 0.0, 1.0, g_, Matrix::new(b, outputs, r), Threads::All);
            let k = Matrix::new(&k, rows, r);
            let db = to_b.then(|| {
                let h = down(fed, a, (r, inputs));
                let mut db = vec![0.0; outputs * r];
                let h = Matrix::new(&h, rows, r);
                product((&mut db, r), 0.0, s, g_.t(), h, Threads::All);
                db
            });
            let da = to_a.then(|| {
                let mut da = vec![0.0; r * inputs];
                let fed = Matrix::new(fed, rows, inputs);
                product((&mut da, inputs), 0.0, s, k.t(), fed, Threads::All);
                da
            });
            if !to_x {
                return Ok((None, da, db));
            }
            let mut dx = self.base.weight.with(|w| input_gradient(g, w, (outputs, inputs)))?;
            let a = Matrix::new(a, r, inputs);
            match &self.dropout {
                None => product((&mut dx, inputs), 1.0, s, k, a, Threads::All),
                Some(mask) => {
                    let mut through = vec![0.0; rows * inputs];
                    product((&mut through, inputs), 0.0, s, k, a, Threads::All);
                    mask.apply_to(&mut through);
                    dx.par_iter_mut().zip(&through).for_each(|(x, t)| *x += t);
                }
            }
            Ok((Some(dx), da, db))
        })?;
        let (dx, da, db) = done?;
        Ok((
            dx.map(|v| tensor(v, x.shape())).transpose()?,
            da.map(|v| tensor(v, a.shape())).transpose()?,
            db.map(|v| tensor(v, b.shape())).transpose()?,
        ))
    }
}

/// `x W^T + b + s (drop(x) A^T) B^T` (Hu et al. 2021): gradients for `x`, `A` and `B` only.
pub(crate) fn lora_affine(x: &Tensor, args: LoraArgs<'_>) -> Result<Tensor> {
    let bias = args.bias.map(Tensor::detach);
    let base = FrozenAffine { weight: args.weight.clone(), bias };
    let op = LoraAffine { base, scaling: args.scaling as f32, dropout: args.dropout };
    x.apply_op3(args.a, args.b, op)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{check, normal};
    use super::*;
    use crate::learn::random::Stream;

    #[test]
    fn trained() {
        let args = [normal("x", &[67, 5]), normal("w", &[3, 5]), normal("b", &[3])];
        check(&args, |a| affine(&a[0], &a[1], Some(&a[2])));
        check(&args[..2], |a| affine(&a[0], &a[1], None));
        assert!(affine(&args[0], &normal("w", &[3, 4]), None).is_err());
    }

    #[test]
    fn frozen() {
        let (w, b) = (normal("w", &[3, 5]), normal("b", &[3]));
        let dense = Frozen::Dense(w.clone());
        check(&[normal("x", &[7, 5])], |a| frozen_affine(&a[0], &dense, Some(&b)));
        let packed = Frozen::Nf4(Arc::new(Nf4::quantize(&w, true).unwrap()));
        check(&[normal("x", &[7, 5])], |a| frozen_affine(&a[0], &packed, None));
    }

    #[test]
    fn adapted() {
        let (weight, bias) = (Frozen::Dense(normal("w", &[3, 5])), normal("b", &[3]));
        let args = [normal("x", &[7, 5]), normal("A", &[2, 5]), normal("B", &[3, 2])];
        for dropout in [None, Mask::new(Stream::new(1, "m"), 0.3)] {
            let lora = |t: &[Tensor]| {
                let (a, b) = (&t[1], &t[2]);
                let args =
                    LoraArgs { weight: &weight, bias: Some(&bias), a, b, scaling: 1.5, dropout };
                lora_affine(&t[0], args)
            };
            check(&args, lora);
        }
    }
}

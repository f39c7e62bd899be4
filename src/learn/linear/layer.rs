//! One linear layer, forward and backward.

use std::ops::Range;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail, ensure};
use candle_core::Tensor;
use rayon::prelude::*;

use super::half::Packed;
use super::input::Input;
use super::{Adapter, Dropout, Held, Parameters, Pass};
use crate::learn::arithmetic::Arithmetic;
use crate::learn::bf16::Lhs;
use crate::learn::buffer::Buffer;
use crate::learn::gradients::Gradients;
use crate::learn::matrix::{Matrix, Threads, product, sum_rows};
use crate::learn::ops::{Frozen, Kept, with_slices};
use crate::learn::random::Stream;

/// What a result does to what was there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Write {
    /// Takes its place.
    Over,
    /// Is added to it.
    Add,
}

impl Write {
    fn beta(self) -> f32 {
        if self == Self::Add { 1.0 } else { 0.0 }
    }
}

/// What an adapter leaves of its forward pass for the backward pass.
#[derive(Debug)]
pub(crate) struct Trace {
    /// What its dropout kept of the input, if not all.
    pub(super) kept: Option<Kept>,
    /// drop(x) A^T, `[rows, r]`.
    pub(super) h: Buffer,
}

/// `x W^T + b`: trained, frozen or quantized, with or without an adapter.
#[derive(Debug, Clone)]
pub(crate) struct Linear {
    pub(super) weight: Held,
    pub(super) bias: Option<Tensor>,
    pub(super) adapter: Option<Adapter>,
    pub(super) scaling: f32,
    pub(super) dropout: Dropout,
    pub(super) inputs: usize,
    pub(super) outputs: usize,
    pub(super) arithmetic: Arithmetic,
    pub(super) packed: Arc<Packed>,
}

impl Linear {
    pub(super) fn new(
        weight: Held,
        bias: Option<Tensor>,
        adapter: Option<Adapter>,
        scaling: f64,
        dropout: Dropout,
    ) -> Result<Self> {
        let (outputs, inputs) = match &weight {
            Held::Frozen(weight) => weight.dims(),
            Held::Trained(weight) => weight.dims2()?,
        };
        let bias_fits = bias.as_ref().is_none_or(|b| b.elem_count() == outputs);
        ensure!(bias_fits && outputs > 0, "a bias of another size than its {outputs} outputs");
        if let Some(Adapter { a, b }) = &adapter {
            ensure!(!matches!(weight, Held::Trained(_)), "an adapter on a layer trained whole");
            let (r, _) = a.dims2()?;
            if a.dims2()? != (r, inputs) || b.dims2()? != (outputs, r) {
                bail!("an adapter of {:?} and {:?} on {outputs} x {inputs}", a.dims(), b.dims());
            }
        }
        let (arithmetic, packed) = (Arithmetic::F32, Arc::default());
        let scaling = scaling as f32;
        Ok(Self { weight, bias, adapter, scaling, dropout, inputs, outputs, arithmetic, packed })
    }

    /// The same with its products in these numbers.
    pub(super) fn within(self, arithmetic: Arithmetic) -> Self {
        Self { arithmetic, ..self }
    }

    /// A layer without bias around a tensor that may be shared (a tied output embedding).
    pub(crate) fn of(parameters: &Parameters, weight: &str) -> Result<Self> {
        let dropout = Dropout { stream: Stream::new(0, weight), p: 0.0 };
        let linear = Self::new(parameters.held(weight)?.clone(), None, None, 1.0, dropout)?;
        Ok(linear.within(parameters.arithmetic))
    }

    /// A frozen layer with an adapter that drops nothing.
    pub(crate) fn adapted(
        weight: &Tensor,
        bias: Option<&Tensor>,
        adapter: Adapter,
        scaling: f64,
    ) -> Result<Self> {
        let weight = Held::Frozen(Frozen::Dense(weight.detach()));
        let dropout = Dropout { stream: Stream::new(0, "linear"), p: 0.0 };
        Self::new(weight, bias.map(Tensor::detach), Some(adapter), scaling, dropout)
    }

    /// The same without its adapter.
    pub(crate) fn bare(&self) -> Self {
        Self { adapter: None, ..self.clone() }
    }

    /// The last size of the argument.
    pub(crate) fn inputs(&self) -> usize {
        self.inputs
    }

    /// The last size of the result.
    pub(crate) fn outputs(&self) -> usize {
        self.outputs
    }

    /// Whether anything in it is trained.
    pub(crate) fn trains(&self) -> bool {
        self.reads_input() || self.bias.as_ref().is_some_and(Tensor::track_op)
    }

    /// Whether its backward pass reads the input.
    pub(crate) fn reads_input(&self) -> bool {
        self.adapter.is_some() || matches!(self.weight, Held::Trained(_))
    }

    /// Whether its products are in bf16.
    pub(crate) fn rounds(&self) -> bool {
        self.arithmetic == Arithmetic::Bf16
    }

    pub(super) fn check_input(&self, x: &Input<'_>) -> Result<()> {
        let ((_, cols), inputs) = (x.size(), self.inputs);
        ensure!(cols == inputs, "a linear map of {inputs} inputs on rows of {cols}");
        Ok(())
    }

    pub(super) fn bias_values(&self) -> Result<Option<Vec<f32>>> {
        Ok(self.bias.as_ref().map(|b| with_slices([b], |[b]| b.to_vec())).transpose()?)
    }

    pub(super) fn with_weight<T>(&self, f: impl FnOnce(&[f32]) -> T) -> Result<T> {
        Ok(match &self.weight {
            Held::Trained(weight) => with_slices([weight.as_tensor()], |[w]| f(w))?,
            Held::Frozen(weight) => weight.with(f)?,
        })
    }

    /// `x W^T + b + s (drop(x) A^T) B^T` (Hu et al. 2021): `[rows, in]` to `[rows, out]`, and
    /// what [`Linear::backward`] reads again.
    pub(crate) fn forward(&self, x: &Input<'_>, pass: Pass<'_>) -> Result<(Buffer, Option<Trace>)> {
        let mut out = Buffer::new(x.size().0 * self.outputs);
        let trace = self.forward_into(x, pass, Write::Over, &mut out)?;
        Ok((out, trace))
    }

    /// The same, into or onto `out`.
    pub(crate) fn forward_into(
        &self,
        x: &Input<'_>,
        pass: Pass<'_>,
        write: Write,
        out: &mut [f32],
    ) -> Result<Option<Trace>> {
        let ((rows, _), inputs, outputs) = (x.size(), self.inputs, self.outputs);
        self.check_input(x)?;
        ensure!(out.len() == rows * outputs, "a result of {} numbers for {rows} rows", out.len());
        if self.rounds() {
            return self.forward_bf16(x, pass, write, out);
        }
        let mut beta = write.beta();
        if let Some(b) = self.bias_values()? {
            let rows = out.par_chunks_mut(outputs).with_min_len(16);
            match write {
                Write::Over => rows.for_each(|row| row.copy_from_slice(&b)),
                Write::Add => rows.for_each(|row| {
                    row.iter_mut().zip(&b).for_each(|(x, b)| *x += b);
                }),
            }
            beta = 1.0;
        }
        self.with_weight(|w| {
            let (x, w) = (Matrix::new(x.plain(), rows, inputs), Matrix::new(w, outputs, inputs));
            product((&mut *out, outputs), beta, 1.0, x, w.t(), Threads::All);
        })?;
        let trace = self.trace(x, pass)?;
        if let (Some(Adapter { b, .. }), Some(Trace { h, .. })) = (&self.adapter, &trace) {
            with_slices([b.as_tensor()], |[b]| {
                let r = b.len() / outputs;
                let (h, b) = (Matrix::new(h, rows, r), Matrix::new(b, outputs, r));
                product((out, outputs), 1.0, self.scaling, h, b.t(), Threads::All);
            })?;
        }
        Ok(trace)
    }

    /// What an adapter makes of `x` first: all that its backward pass needs of the forward pass.
    pub(crate) fn trace(&self, x: &Input<'_>, pass: Pass<'_>) -> Result<Option<Trace>> {
        let Some(Adapter { a, .. }) = &self.adapter else { return Ok(None) };
        let kept = self.dropout.draw(x.size(), pass);
        let fed = fed(x, kept.as_ref());
        let read = fed.as_ref().unwrap_or(x);
        let h = with_slices([a.as_tensor()], |[a]| match self.arithmetic {
            Arithmetic::F32 => self.down(read, a),
            Arithmetic::Bf16 => self.down_bf16(read, a),
        })?;
        drop(fed);
        Ok(Some(Trace { kept, h }))
    }

    /// `x A^T`, `[rows, r]`.
    fn down(&self, x: &Input<'_>, a: &[f32]) -> Buffer {
        let ((rows, _), r) = (x.size(), a.len() / self.inputs);
        let mut h = Buffer::new(rows * r);
        let (x, a) = (Matrix::new(x.plain(), rows, self.inputs), Matrix::new(a, r, self.inputs));
        product((&mut h, r), 0.0, 1.0, x, a.t(), Threads::All);
        h
    }

    /// From the gradient `g` of the result: those of what is trained into `gradients`, and that of
    /// `x` into `dx`. With K = G B: dA = s K^T drop(X), dB = s G^T H, dX = G W + s mask(K A).
    /// B A is never formed. Where [`Linear::reads_input`] is false, `x` may be none. `trace` is
    /// what the forward pass gave.
    pub(crate) fn backward(
        &self,
        x: &Input<'_>,
        g: &Input<'_>,
        trace: Option<&Trace>,
        dx: Option<(&mut [f32], Write)>,
        gradients: &mut Gradients,
    ) -> Result<()> {
        self.backward_weight(x, g, gradients)?;
        if self.rounds() {
            return self.backward_bf16(x, g, trace, dx, gradients);
        }
        let ((rows, _), inputs, outputs) = (g.size(), self.inputs, self.outputs);
        let g = Matrix::new(g.plain(), rows, outputs);
        let mut dx = dx;
        if let Some((dx, write)) = &mut dx {
            self.with_weight(|w| {
                let w = Matrix::new(w, outputs, inputs);
                product((&mut **dx, inputs), write.beta(), 1.0, g, w, Threads::All);
            })?;
        }
        let Some((Adapter { a, b }, Trace { kept, h })) = self.traced(trace)? else {
            return Ok(());
        };
        let fed = fed(x, kept.as_ref());
        let fed = fed.as_ref().unwrap_or(x);
        with_slices([a.as_tensor(), b.as_tensor()], |[a_, b_]| -> Result<()> {
            let (r, s) = (a_.len() / inputs, self.scaling);
            let mut k = Buffer::new(rows * r);
            product((&mut k, r), 0.0, 1.0, g, Matrix::new(b_, outputs, r), Threads::All);
            let k = Matrix::new(&k, rows, r);
            gradients.product(b.as_tensor(), s, g.t(), Matrix::new(h, rows, r))?;
            let fed = Matrix::new(fed.plain(), rows, inputs);
            gradients.product(a.as_tensor(), s, k.t(), fed)?;
            let Some((dx, _)) = dx else { return Ok(()) };
            let a = Matrix::new(a_, r, inputs);
            let Some(kept) = kept else {
                product((dx, inputs), 1.0, s, k, a, Threads::All);
                return Ok(());
            };
            add_through(kept, dx, inputs, |rows, out| {
                let k = Matrix::new(&k.data()[rows.start * r..], rows.len(), r);
                product((out, inputs), 0.0, s, k, a, Threads::One);
            });
            Ok(())
        })?
    }

    /// The gradients of bias and weight, if these are trained.
    pub(super) fn backward_weight(
        &self,
        x: &Input<'_>,
        g: &Input<'_>,
        gradients: &mut Gradients,
    ) -> Result<()> {
        let ((rows, cols), inputs, outputs) = (g.size(), self.inputs, self.outputs);
        ensure!(cols == outputs, "gradients of {cols} for {outputs} outputs");
        let read = !self.reads_input() || x.size() == (rows, inputs);
        ensure!(read, "{rows} gradients for an input of {:?}", x.size());
        if let Some(bias) = self.bias.as_ref().filter(|b| b.track_op()) {
            gradients.add(bias, sum_rows(g.plain(), outputs))?;
        }
        if let Held::Trained(weight) = &self.weight {
            let weight = weight.as_tensor();
            let g = Matrix::new(g.plain(), rows, outputs).t();
            match self.arithmetic {
                Arithmetic::F32 => {
                    let x = Matrix::new(x.plain(), rows, inputs);
                    gradients.product(weight, 1.0, g, x)?;
                }
                Arithmetic::Bf16 => {
                    let g = Lhs::new(g, Threads::All);
                    gradients.product_bf16(weight, &g, &x.rhs(), inputs)?;
                }
            }
        }
        Ok(())
    }

    /// The adapter with what its forward pass left.
    pub(super) fn traced<'a>(
        &'a self,
        trace: Option<&'a Trace>,
    ) -> Result<Option<(&'a Adapter, &'a Trace)>> {
        let Some(adapter) = &self.adapter else { return Ok(None) };
        Ok(Some((adapter, trace.context("an adapter without a trace of its forward pass")?)))
    }
}

/// What an adapter reads, unless that is `x` itself.
pub(super) fn fed<'a>(x: &'a Input<'_>, kept: Option<&'a Kept>) -> Option<Input<'a>> {
    kept.map(|kept| Input::dropped(x.plain(), x.size().1, kept))
}

/// Adds what comes back through an adapter's dropout to `dx`, `[rows, cols]`: `make` computes some
/// rows of it, which are masked while they are in the cache.
pub(super) fn add_through(
    kept: &Kept,
    dx: &mut [f32],
    cols: usize,
    make: impl Fn(Range<usize>, &mut [f32]) + Sync,
) {
    const ROWS: usize = 64;
    let parts = dx.par_chunks_mut((ROWS * cols).max(1)).enumerate();
    parts.for_each(|(i, dx)| {
        let rows = i * ROWS..i * ROWS + dx.len() / cols;
        let mut out = Buffer::new(dx.len());
        make(rows.clone(), &mut out);
        kept.add_rows(rows, &out, dx);
    });
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use candle_core::{Device, Var};

    use super::super::Mode;
    use super::*;
    use crate::learn::nf4::Nf4;
    use crate::learn::ops::tensor;
    use crate::learn::ops::tests::{check, normal};

    fn matrix(name: &str, rows: usize, cols: usize) -> Tensor {
        tensor(normal(name, rows * cols), (rows, cols)).unwrap()
    }

    fn var(data: &[f32], shape: &[usize]) -> Var {
        Var::from_slice(data, shape, &Device::Cpu).unwrap()
    }

    /// Checks a layer of 5 to 3 that `make` builds of all arguments but the first, the input.
    fn check_layer(args: &[&[f32]], make: impl Fn(&[&[f32]]) -> (Linear, Vec<Tensor>)) {
        let pass = Pass::whole(Mode::Train(3));
        let forward =
            |a: &[&[f32]]| make(&a[1..]).0.forward(&Input::of(a[0], 5), pass).unwrap().0.to_vec();
        check(args, forward, |a, g| {
            let (layer, trained) = make(&a[1..]);
            let (x, g) = (Input::of(a[0], 5), Input::of(g, 3));
            let (_, trace) = layer.forward(&x, pass).unwrap();
            let trace = trace.as_ref();
            let mut gradients = Gradients::default();
            let mut dx = vec![f32::NAN; a[0].len()];
            let into = Some((&mut dx[..], Write::Over));
            layer.backward(&x, &g, trace, into, &mut gradients).unwrap();
            // Onto something, and only what is trained.
            let mut more = vec![1.0; dx.len()];
            let into = Some((&mut more[..], Write::Add));
            layer.backward(&x, &g, trace, into, &mut Gradients::default()).unwrap();
            assert!(more.iter().zip(&dx).all(|(m, d)| (m - d - 1.0).abs() < 1e-4));
            let mut alone = Gradients::default();
            layer.backward(&x, &g, trace, None, &mut alone).unwrap();
            let mut out = vec![dx];
            for var in &trained {
                let [one, other] =
                    [&mut gradients, &mut alone].map(|g| g.take(var).unwrap().to_vec());
                assert_eq!(one, other);
                out.push(one);
            }
            out
        });
    }

    const NO_DROPOUT: f64 = 0.0;

    fn dropout(p: f64) -> Dropout {
        Dropout { stream: Stream::new(1, "m"), p }
    }

    #[test]
    fn trained() {
        let (x, w, b) = (normal("x", 67 * 5), normal("w", 15), normal("b", 3));
        check_layer(&[&x, &w, &b], |a| {
            let (w, b) = (var(a[0], &[3, 5]), var(a[1], &[3]));
            let trained = vec![w.as_tensor().clone(), b.as_tensor().clone()];
            let bias = Some(b.as_tensor().clone());
            (Linear::new(Held::Trained(w), bias, None, 1.0, dropout(NO_DROPOUT)).unwrap(), trained)
        });
        let bias = Some(tensor(normal("b", 4), 4).unwrap());
        let weight = Held::Trained(var(&w, &[3, 5]));
        assert!(Linear::new(weight, bias, None, 1.0, dropout(NO_DROPOUT)).is_err());
    }

    #[test]
    fn frozen() {
        let w = matrix("w", 3, 5);
        let packed = Frozen::Nf4(Arc::new(Nf4::quantize(&w, true).unwrap()));
        for weight in [Frozen::Dense(w), packed] {
            let bias = Some(tensor(normal("b", 3), 3).unwrap());
            check_layer(&[&normal("x", 35)], |_| {
                let held = Held::Frozen(weight.clone());
                let drop = dropout(NO_DROPOUT);
                (Linear::new(held, bias.clone(), None, 1.0, drop).unwrap(), Vec::new())
            });
        }
    }

    #[test]
    fn adapted() {
        let (x, a, b) = (normal("x", 35), normal("A", 10), normal("B", 6));
        for p in [NO_DROPOUT, 0.3] {
            check_layer(&[&x, &a, &b], |args| {
                let (a, b) = (var(args[0], &[2, 5]), var(args[1], &[3, 2]));
                let trained = vec![a.as_tensor().clone(), b.as_tensor().clone()];
                let weight = Held::Frozen(Frozen::Dense(matrix("w", 3, 5)));
                let bias = Some(tensor(normal("b", 3), 3).unwrap());
                let adapter = Some(Adapter { a, b });
                (Linear::new(weight, bias, adapter, 1.5, dropout(p)).unwrap(), trained)
            });
        }
    }

    /// In bf16 all results are near those in f32, at sizes that fill no tile.
    #[test]
    fn in_bf16() {
        let (x, g) = (normal("x", 67 * 45), normal("g", 67 * 33));
        let (a, b) = (var(&normal("A", 3 * 45), &[3, 45]), var(&normal("B", 33 * 3), &[33, 3]));
        let w = matrix("w", 33, 45);
        let trained = Held::Trained(Var::from_tensor(&w).unwrap());
        let packed = Frozen::Nf4(Arc::new(Nf4::quantize(&w, true).unwrap()));
        let weights = [trained, Held::Frozen(Frozen::Dense(w)), Held::Frozen(packed)];
        let near = |a: &[f32], b: &[f32]| {
            let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| x * x).sum::<f32>().sqrt();
            let apart = norm(&mut a.iter().zip(b).map(|(a, b)| a - b));
            assert!(apart < 1e-2 * norm(&mut b.iter().copied()) && apart > 0.0, "{apart}");
        };
        for (weight, p) in weights.iter().flat_map(|w| [(w, NO_DROPOUT), (w, 0.3)]) {
            let adapted = !matches!(weight, Held::Trained(_));
            let adapter = adapted.then(|| Adapter { a: a.clone(), b: b.clone() });
            let bias = Some(var(&normal("b", 33), &[33]).as_tensor().clone());
            let layer = Linear::new(weight.clone(), bias.clone(), adapter, 1.5, dropout(p));
            let layer = layer.unwrap();
            let run = |arithmetic| {
                let (layer, pass) = (layer.clone().within(arithmetic), Pass::whole(Mode::Train(3)));
                let mut gradients = Gradients::default();
                let (x, g) = (Input::of(&x, 45), Input::of(&g, 33));
                let (out, trace) = layer.forward(&x, pass).unwrap();
                let mut dx = vec![1.0; 67 * 45];
                let into = Some((&mut dx[..], Write::Add));
                layer.backward(&x, &g, trace.as_ref(), into, &mut gradients).unwrap();
                let vars: Vec<Tensor> = match weight {
                    Held::Trained(w) => vec![w.as_tensor().clone()],
                    Held::Frozen(_) => [&a, &b].map(|v| v.as_tensor().clone()).to_vec(),
                };
                let mut all = vec![out.to_vec(), dx];
                all.extend(vars.iter().map(|v| gradients.take(v).unwrap().to_vec()));
                assert!(gradients.take(bias.as_ref().unwrap()).is_some());
                all
            };
            for (a, b) in run(Arithmetic::Bf16).iter().zip(run(Arithmetic::F32)) {
                near(a, &b);
            }
        }
    }
}

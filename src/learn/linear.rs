//! The modules that models are built of, and where they get their tensors from.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Tensor, Var};
use rayon::prelude::*;

use super::gradients::Gradients;
use super::matrix::{Matrix, Threads, product, sum_rows};
use super::ops::{Buffer, Frozen, Mask, add, with_slices};
use super::random::Stream;

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
        Linear::new(weight, bias, adapter, self.scaling, dropout)
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

/// `x W^T + b`: trained, frozen or quantized, with or without an adapter.
#[derive(Debug, Clone)]
pub(crate) struct Linear {
    weight: Held,
    bias: Option<Tensor>,
    adapter: Option<Adapter>,
    scaling: f32,
    dropout: Dropout,
    inputs: usize,
    outputs: usize,
}

impl Linear {
    fn new(
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
        Ok(Self { weight, bias, adapter, scaling: scaling as f32, dropout, inputs, outputs })
    }

    /// A layer without bias around a tensor that may be shared (a tied output embedding).
    pub(crate) fn of(parameters: &Parameters, weight: &str) -> Result<Self> {
        let dropout = Dropout { stream: Stream::new(0, weight), p: 0.0 };
        Self::new(parameters.held(weight)?.clone(), None, None, 1.0, dropout)
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

    fn with_weight<T>(&self, f: impl FnOnce(&[f32]) -> T) -> Result<T> {
        Ok(match &self.weight {
            Held::Trained(weight) => with_slices([weight.as_tensor()], |[w]| f(w))?,
            Held::Frozen(weight) => weight.with(f)?,
        })
    }

    fn rows(&self, x: &[f32]) -> Result<usize> {
        let fits = x.len().is_multiple_of(self.inputs.max(1));
        ensure!(fits, "a linear map of {} inputs on {} numbers", self.inputs, x.len());
        Ok(x.len() / self.inputs.max(1))
    }

    /// `x W^T + b + s (drop(x) A^T) B^T` (Hu et al. 2021): `[rows, in]` to `[rows, out]`.
    pub(crate) fn forward(&self, x: &[f32], pass: Pass<'_>) -> Result<Buffer> {
        let mut out = Buffer::new(self.rows(x)? * self.outputs);
        self.forward_into(x, pass, Write::Over, &mut out)?;
        Ok(out)
    }

    /// The same, into or onto `out`.
    pub(crate) fn forward_into(
        &self,
        x: &[f32],
        pass: Pass<'_>,
        write: Write,
        out: &mut [f32],
    ) -> Result<()> {
        let (rows, inputs, outputs) = (self.rows(x)?, self.inputs, self.outputs);
        ensure!(out.len() == rows * outputs, "a result of {} numbers for {rows} rows", out.len());
        let mut write = write;
        if let Some(bias) = &self.bias {
            with_slices([bias], |[b]| {
                let rows = out.par_chunks_mut(outputs).with_min_len(16);
                match write {
                    Write::Over => rows.for_each(|row| row.copy_from_slice(b)),
                    Write::Add => rows.for_each(|row| {
                        row.iter_mut().zip(b).for_each(|(x, b)| *x += b);
                    }),
                }
            })?;
            write = Write::Add;
        }
        let x_ = Matrix::new(x, rows, inputs);
        self.with_weight(|w| {
            let w = Matrix::new(w, outputs, inputs);
            product((&mut *out, outputs), write.beta(), 1.0, x_, w.t(), Threads::All);
        })?;
        let Some(Adapter { a, b }) = &self.adapter else { return Ok(()) };
        let dropped = self.dropout.applied(x, pass);
        with_slices([a.as_tensor(), b.as_tensor()], |[a, b]| {
            let h = self.down(dropped.as_deref().unwrap_or(x), a, rows);
            let r = a.len() / inputs;
            let (h, b) = (Matrix::new(&h, rows, r), Matrix::new(b, outputs, r));
            product((out, outputs), 1.0, self.scaling, h, b.t(), Threads::All);
        })?;
        Ok(())
    }

    /// `x A^T`, `[rows, r]`.
    fn down(&self, x: &[f32], a: &[f32], rows: usize) -> Buffer {
        let r = a.len() / self.inputs;
        let mut h = Buffer::new(rows * r);
        let (x, a) = (Matrix::new(x, rows, self.inputs), Matrix::new(a, r, self.inputs));
        product((&mut h, r), 0.0, 1.0, x, a.t(), Threads::All);
        h
    }

    /// From the gradient `g` of the result: those of what is trained into `gradients`, and that of
    /// `x` into `dx`. With K = G B: dA = s K^T drop(X), dB = s G^T H, dX = G W + s mask(K A).
    /// B A is never formed. Where [`Linear::reads_input`] is false, `x` may be empty.
    pub(crate) fn backward(
        &self,
        x: &[f32],
        g: &[f32],
        pass: Pass<'_>,
        dx: Option<(&mut [f32], Write)>,
        gradients: &mut Gradients,
    ) -> Result<()> {
        let (inputs, outputs) = (self.inputs, self.outputs);
        let rows = g.len() / outputs;
        let g_ = Matrix::new(g, rows, outputs);
        if let Some(bias) = self.bias.as_ref().filter(|b| b.track_op()) {
            gradients.add(bias, sum_rows(g, outputs))?;
        }
        if let Held::Trained(weight) = &self.weight {
            let x = Matrix::new(x, rows, inputs);
            gradients.product(weight.as_tensor(), 1.0, g_.t(), x)?;
        }
        let mut dx = dx;
        if let Some((dx, write)) = &mut dx {
            self.with_weight(|w| {
                let w = Matrix::new(w, outputs, inputs);
                product((&mut **dx, inputs), write.beta(), 1.0, g_, w, Threads::All);
            })?;
        }
        let Some(Adapter { a, b }) = &self.adapter else { return Ok(()) };
        let dropped = self.dropout.applied(x, pass);
        let fed = dropped.as_deref().unwrap_or(x);
        let s = self.scaling;
        with_slices([a.as_tensor(), b.as_tensor()], |[a_, b_]| -> Result<()> {
            let r = a_.len() / inputs;
            let mut k = Buffer::new(rows * r);
            product((&mut k, r), 0.0, 1.0, g_, Matrix::new(b_, outputs, r), Threads::All);
            let k = Matrix::new(&k, rows, r);
            let h = self.down(fed, a_, rows);
            gradients.product(b.as_tensor(), s, g_.t(), Matrix::new(&h, rows, r))?;
            gradients.product(a.as_tensor(), s, k.t(), Matrix::new(fed, rows, inputs))?;
            let Some((dx, _)) = dx else { return Ok(()) };
            let a = Matrix::new(a_, r, inputs);
            if dropped.is_none() {
                product((dx, inputs), 1.0, s, k, a, Threads::All);
                return Ok(());
            }
            let mut through = Buffer::new(rows * inputs);
            product((&mut through, inputs), 0.0, s, k, a, Threads::All);
            self.dropout.apply(&mut through, pass);
            add(dx, &through);
            Ok(())
        })?
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use candle_core::Device;

    use super::super::nf4::Nf4;
    use super::super::ops::tensor;
    use super::super::ops::tests::{check, normal};
    use super::*;

    fn matrix(name: &str, rows: usize, cols: usize) -> Tensor {
        tensor(normal(name, rows * cols), (rows, cols)).unwrap()
    }

    fn var(data: &[f32], shape: &[usize]) -> Var {
        Var::from_slice(data, shape, &Device::Cpu).unwrap()
    }

    /// Checks a layer of 5 to 3 that `make` builds of all arguments but the first, the input.
    fn check_layer(args: &[&[f32]], make: impl Fn(&[&[f32]]) -> (Linear, Vec<Tensor>)) {
        let pass = Pass::whole(Mode::Train(3));
        let forward = |a: &[&[f32]]| make(&a[1..]).0.forward(a[0], pass).unwrap().to_vec();
        check(args, forward, |a, g| {
            let (layer, trained) = make(&a[1..]);
            let mut gradients = Gradients::default();
            let mut dx = vec![f32::NAN; a[0].len()];
            let into = Some((&mut dx[..], Write::Over));
            layer.backward(a[0], g, pass, into, &mut gradients).unwrap();
            // Onto something, and only what is trained.
            let mut more = vec![1.0; dx.len()];
            let into = Some((&mut more[..], Write::Add));
            layer.backward(a[0], g, pass, into, &mut Gradients::default()).unwrap();
            assert!(more.iter().zip(&dx).all(|(m, d)| (m - d - 1.0).abs() < 1e-4));
            let mut alone = Gradients::default();
            layer.backward(a[0], g, pass, None, &mut alone).unwrap();
            let mut out = vec![dx];
            for var in &trained {
                let (one, other) = (gradients.take(var).unwrap(), alone.take(var).unwrap());
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
}

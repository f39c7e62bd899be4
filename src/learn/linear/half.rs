//! A linear layer's passes with products in bf16.

use std::ops::{Deref, Range};
use std::sync::OnceLock;

use anyhow::Result;

use super::input::Input;
use super::layer::{Linear, Trace, Write, add_through, fed};
use super::{Adapter, Held, Mode, Pass};
use crate::learn::bf16::{Back, Lhs, Reread, Rhs, product};
use crate::learn::buffer::Buffer;
use crate::learn::gradients::Gradients;
use crate::learn::matrix::{Matrix, Threads};
use crate::learn::ops::{Frozen, Kept, with_slices};

/// A frozen weight laid out for products in bf16, each way from when it is first needed.
#[derive(Debug, Default)]
pub(super) struct Packed {
    /// W^T.
    forward: OnceLock<Rhs>,
    /// W.
    backward: OnceLock<Rhs>,
}

/// Which way a pass goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Forward,
    Backward,
}

/// A weight that is kept, or made for one use.
enum Weight<'a> {
    Kept(&'a Rhs),
    Made(Rhs),
}

impl Deref for Weight<'_> {
    type Target = Rhs;

    fn deref(&self) -> &Rhs {
        match self {
            Self::Kept(rhs) => rhs,
            Self::Made(rhs) => rhs,
        }
    }
}

/// What an adapter adds to the gradient of the input: K s A with K = G B.
struct Added<'a> {
    /// `[rows, r]`.
    k: Buffer,
    r: usize,
    /// s A.
    a: Rhs,
    /// What dropout kept of the adapter's input, if not all.
    kept: Option<&'a Kept>,
}

/// Rows of K.
fn pack(k: &[f32], r: usize, threads: Threads) -> Lhs {
    Lhs::new(Matrix::new(k, k.len() / r, r), threads)
}

impl Linear {
    fn rhs(&self, way: Way) -> Result<Weight<'_>> {
        let (outputs, inputs) = (self.outputs, self.inputs);
        let pack = |w: &[f32]| {
            let w = Matrix::new(w, outputs, inputs);
            Rhs::new(if way == Way::Forward { w.t() } else { w }, Threads::All)
        };
        match &self.weight {
            Held::Frozen(Frozen::Nf4(w)) => {
                let unpack = |rows: Range<usize>, out: &mut [f32]| {
                    w.dequantize_range(rows.start * inputs..rows.end * inputs, out);
                };
                let rhs = Rhs::from_rows((outputs, inputs), way == Way::Forward, unpack);
                Ok(Weight::Made(rhs))
            }
            Held::Frozen(w) => {
                let slot = match way {
                    Way::Forward => &self.packed.forward,
                    Way::Backward => &self.packed.backward,
                };
                if let Some(rhs) = slot.get() {
                    return Ok(Weight::Kept(rhs));
                }
                let rhs = w.with(pack)?;
                Ok(Weight::Kept(slot.get_or_init(|| rhs)))
            }
            Held::Trained(_) => Ok(Weight::Made(self.with_weight(pack)?)),
        }
    }

    /// `x A^T`, `[rows, r]`.
    pub(super) fn down_bf16(&self, x: &Input<'_>, a: &[f32]) -> Buffer {
        let ((rows, _), r) = (x.size(), a.len() / self.inputs);
        let mut h = Buffer::new(rows * r);
        let a = Rhs::new(Matrix::new(a, r, self.inputs).t(), Threads::All);
        product((&mut h, r), false, None, &[(x.packed(), &a)], Reread::Soon, Threads::All);
        h
    }

    /// See [`Linear::forward_into`].
    pub(super) fn forward_bf16(
        &self,
        x: &Input<'_>,
        pass: Pass<'_>,
        write: Write,
        out: &mut [f32],
    ) -> Result<Option<Trace>> {
        let reread = if matches!(pass.mode, Mode::Eval) { Reread::Soon } else { Reread::Late };
        let (out, add) = ((out, self.outputs), write == Write::Add);
        let run = |bias: Option<&[f32]>, terms: &[(&Lhs, &Rhs)]| {
            product(out, add, bias, terms, reread, Threads::All);
        };
        Ok(self.forward_terms(x, pass, run)?.1)
    }

    /// `f` of the result, for the next layer, and the result itself, rounded to bf16, if it is to
    /// be kept; in bf16 only. See [`Lhs::through`].
    pub(crate) fn forward_through(
        &self,
        x: &Input<'_>,
        f: fn(&[f32], &mut [f32]),
        pass: Pass<'_>,
        keep: bool,
    ) -> Result<(Input<'static>, Option<Lhs>, Option<Trace>)> {
        self.check_input(x)?;
        let run = |bias: Option<&[f32]>, terms: &[(&Lhs, &Rhs)]| Lhs::through(f, bias, terms, keep);
        let ((out, kept), trace) = self.forward_terms(x, pass, run)?;
        Ok((Input::of_packed(out), kept, trace))
    }

    /// Calls `run` with the bias and the terms of the result.
    fn forward_terms<T>(
        &self,
        x: &Input<'_>,
        pass: Pass<'_>,
        run: impl FnOnce(Option<&[f32]>, &[(&Lhs, &Rhs)]) -> T,
    ) -> Result<(T, Option<Trace>)> {
        let (rows, outputs) = (x.size().0, self.outputs);
        let base = self.rhs(Way::Forward)?;
        let mut terms = vec![(x.packed(), &*base)];
        let trace = self.trace(x, pass)?;
        let adapter = self.adapter.as_ref().zip(trace.as_ref());
        let adapter = adapter.map(|(Adapter { b, .. }, Trace { h, .. })| {
            with_slices([b.as_tensor()], |[b]| {
                let r = b.len() / outputs;
                let h = Lhs::new(Matrix::new(h, rows, r), Threads::All);
                (h, Rhs::scaled(self.scaling, Matrix::new(b, outputs, r).t(), Threads::All))
            })
        });
        let adapter = adapter.transpose()?;
        terms.extend(adapter.as_ref().map(|(h, b)| (h, b)));
        let bias = self.bias_values()?;
        Ok((run(bias.as_deref(), &terms), trace))
    }

    /// See [`Linear::backward`]: from the gradients of the adapter on.
    pub(super) fn backward_bf16(
        &self,
        x: &Input<'_>,
        g: &Input<'_>,
        trace: Option<&Trace>,
        dx: Option<(&mut [f32], Write)>,
        gradients: &mut Gradients,
    ) -> Result<()> {
        let added = self.adapter_gradients(x, g, trace, gradients)?;
        let Some((dx, write)) = dx else { return Ok(()) };
        let add = write == Write::Add;
        self.backward_terms(g, added.as_ref(), |terms| {
            product((&mut *dx, self.inputs), add, None, terms, Reread::Late, Threads::All);
        })?;
        if let Some(Added { kept: Some(kept), k, r, a }) = &added {
            add_through(kept, dx, self.inputs, |rows, out| {
                let k = pack(&k[rows.start * r..rows.end * r], *r, Threads::One);
                product((out, self.inputs), false, None, &[(&k, a)], Reread::Soon, Threads::One);
            });
        }
        Ok(())
    }

    /// [`Linear::backward`] of a layer that reads what [`Linear::forward_through`] made of `x`, as
    /// far as the gradient of `x`: `f(x, dx)`. `read` is what this layer read.
    pub(crate) fn backward_through(
        &self,
        read: &Input<'_>,
        g: &Input<'_>,
        trace: Option<&Trace>,
        (x, f): (&Lhs, Back),
        gradients: &mut Gradients,
    ) -> Result<Input<'static>> {
        self.backward_weight(read, g, gradients)?;
        if trace.is_none_or(|trace| trace.kept.is_none()) {
            let added = self.adapter_gradients(read, g, trace, gradients)?;
            let out = self.backward_terms(g, added.as_ref(), |terms| x.back_through(f, terms))?;
            return Ok(Input::of_packed(out));
        }
        let (rows, cols) = x.size();
        let mut dx = Buffer::new(rows * cols);
        self.backward_bf16(read, g, trace, Some((&mut dx, Write::Over)), gradients)?;
        Ok(Input::of_packed(x.back_from(f, &dx)))
    }

    /// The adapter's gradients, and what it adds to that of the input.
    fn adapter_gradients<'a>(
        &'a self,
        x: &Input<'_>,
        g: &Input<'_>,
        trace: Option<&'a Trace>,
        gradients: &mut Gradients,
    ) -> Result<Option<Added<'a>>> {
        let (inputs, outputs, (rows, _)) = (self.inputs, self.outputs, g.size());
        let Some((Adapter { a, b }, Trace { kept, h })) = self.traced(trace)? else {
            return Ok(None);
        };
        let fed = fed(x, kept.as_ref());
        let fed = fed.as_ref().unwrap_or(x);
        with_slices([a.as_tensor(), b.as_tensor()], |[a_, b_]| -> Result<_> {
            let (r, s) = (a_.len() / inputs, self.scaling);
            // First, so that what is made of others is made once.
            let plain = Matrix::new(g.plain(), rows, outputs);
            let mut k = Buffer::new(rows * r);
            let up = Rhs::new(Matrix::new(b_, outputs, r), Threads::All);
            product((&mut k, r), false, None, &[(g.packed(), &up)], Reread::Soon, Threads::All);
            let h = Rhs::scaled(s, Matrix::new(h, rows, r), Threads::All);
            let g = Lhs::new(plain.t(), Threads::All);
            gradients.product_bf16(b.as_tensor(), &g, &h, r)?;
            let k_ = Lhs::scaled(s, Matrix::new(&k, rows, r).t(), Threads::All);
            gradients.product_bf16(a.as_tensor(), &k_, &fed.rhs(), inputs)?;
            let a = Rhs::scaled(s, Matrix::new(a_, r, inputs), Threads::All);
            Ok(Some(Added { k, r, a, kept: kept.as_ref() }))
        })?
    }

    /// Calls `run` with the terms of the input's gradient: all of them, unless dropout stands
    /// between the input and the adapter.
    fn backward_terms<T>(
        &self,
        g: &Input<'_>,
        added: Option<&Added<'_>>,
        run: impl FnOnce(&[(&Lhs, &Rhs)]) -> T,
    ) -> Result<T> {
        let base = self.rhs(Way::Backward)?;
        let mut terms = vec![(g.packed(), &*base)];
        let direct = added.filter(|added| added.kept.is_none());
        let direct = direct.map(|Added { k, r, a, .. }| (pack(k, *r, Threads::All), a));
        terms.extend(direct.as_ref().map(|(k, a)| (k, *a)));
        Ok(run(&terms))
    }
}

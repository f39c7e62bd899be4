//! A linear layer's passes with products in bf16.

use std::ops::{Deref, Range};
use std::sync::OnceLock;

use anyhow::Result;

use super::input::Input;
use super::layer::{Linear, Trace, Write, add_through, fed};
use super::{Adapter, Held, Mode, Pass};
use crate::learn::bf16::{Lhs, Reread, Rhs, product};
use crate::learn::buffer::Buffer;
use crate::learn::gradients::Gradients;
use crate::learn::matrix::{Matrix, Threads};
use crate::learn::ops::{Frozen, with_slices};

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
        bias: Option<&[f32]>,
        pass: Pass<'_>,
        write: Write,
        out: &mut [f32],
    ) -> Result<Option<Trace>> {
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
        let reread = if matches!(pass.mode, Mode::Eval) { Reread::Soon } else { Reread::Late };
        product((out, outputs), write == Write::Add, bias, &terms, reread, Threads::All);
        Ok(trace)
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
        let (inputs, outputs) = (self.inputs, self.outputs);
        let (rows, _) = g.size();
        // K = G B and s A: what the adapter adds to the input's gradient.
        let mut adapter = None;
        if let Some((Adapter { a, b }, Trace { kept, h })) = self.traced(trace)? {
            let fed = fed(x, kept.as_ref());
            let fed = fed.as_ref().unwrap_or(x);
            adapter = with_slices([a.as_tensor(), b.as_tensor()], |[a_, b_]| -> Result<_> {
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
                Ok(Some((k, r, a, kept.as_ref())))
            })??;
        }
        let Some((dx, write)) = dx else { return Ok(()) };
        let base = self.rhs(Way::Backward)?;
        let mut terms = vec![(g.packed(), &*base)];
        let pack = |k: &[f32], r, threads| Lhs::new(Matrix::new(k, k.len() / r, r), threads);
        // Unless dropout stands between, it is one sum.
        let direct = adapter.as_ref().filter(|(.., kept)| kept.is_none());
        let direct = direct.map(|(k, r, a, _)| (pack(k, *r, Threads::All), a));
        terms.extend(direct.as_ref().map(|(k, a)| (k, *a)));
        let add = write == Write::Add;
        product((&mut *dx, inputs), add, None, &terms, Reread::Late, Threads::All);
        if let Some((k, r, a, Some(kept))) = &adapter {
            add_through(kept, dx, inputs, |rows, out| {
                let k = pack(&k[rows.start * r..rows.end * r], *r, Threads::One);
                product((out, inputs), false, None, &[(&k, a)], Reread::Soon, Threads::One);
            });
        }
        Ok(())
    }
}

//! A linear layer's passes with products in bf16.

use std::ops::{Deref, Range};
use std::sync::OnceLock;

use anyhow::Result;

use super::input::Input;
use super::layer::{Linear, Write};
use super::{Adapter, Held, Pass};
use crate::learn::bf16::{Lhs, Rhs, product};
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
    fn down_bf16(&self, x: &Input<'_>, a: &[f32]) -> Buffer {
        let ((rows, _), r) = (x.size(), a.len() / self.inputs);
        let mut h = Buffer::new(rows * r);
        let a = Rhs::new(Matrix::new(a, r, self.inputs).t(), Threads::All);
        product((&mut h, r), false, None, &[(x.packed(), &a)], Threads::All);
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
    ) -> Result<()> {
        let (rows, outputs) = (x.size().0, self.outputs);
        let base = self.rhs(Way::Forward)?;
        let mut terms = vec![(x.packed(), &*base)];
        let adapter = self.adapter.as_ref().map(|Adapter { a, b }| {
            with_slices([a.as_tensor(), b.as_tensor()], |[a, b]| {
                let fed = self.fed(x, pass);
                let r = a.len() / self.inputs;
                let h = self.down_bf16(fed.as_ref().unwrap_or(x), a);
                let h = Lhs::new(Matrix::new(&h, rows, r), Threads::All);
                let b = Matrix::new(b, outputs, r).t();
                (h, Rhs::scaled(self.scaling, b, Threads::All))
            })
        });
        let adapter = adapter.transpose()?;
        terms.extend(adapter.as_ref().map(|(h, b)| (h, b)));
        product((out, outputs), write == Write::Add, bias, &terms, Threads::All);
        Ok(())
    }

    /// See [`Linear::backward`]: from the gradients of the adapter on.
    pub(super) fn backward_bf16(
        &self,
        x: &Input<'_>,
        g: &Input<'_>,
        pass: Pass<'_>,
        dx: Option<(&mut [f32], Write)>,
        gradients: &mut Gradients,
    ) -> Result<()> {
        let (inputs, outputs) = (self.inputs, self.outputs);
        let (rows, _) = g.size();
        // What the adapter adds to the input's gradient, unless its dropout stands in between.
        let mut onto = None;
        let mut through = None;
        if let Some(Adapter { a, b }) = &self.adapter {
            let fed = self.fed(x, pass);
            let (dropped, fed) = (fed.is_some(), fed.as_ref().unwrap_or(x));
            with_slices([a.as_tensor(), b.as_tensor()], |[a_, b_]| -> Result<()> {
                let (r, s) = (a_.len() / inputs, self.scaling);
                let mut k = Buffer::new(rows * r);
                let up = Rhs::new(Matrix::new(b_, outputs, r), Threads::All);
                product((&mut k, r), false, None, &[(g.packed(), &up)], Threads::All);
                let k = Matrix::new(&k, rows, r);
                let h = self.down_bf16(fed, a_);
                let h = Rhs::scaled(s, Matrix::new(&h, rows, r), Threads::All);
                let g = Matrix::new(g.plain(), rows, outputs);
                gradients.product_bf16(b.as_tensor(), &Lhs::new(g.t(), Threads::All), &h, r)?;
                let k_ = Lhs::scaled(s, k.t(), Threads::All);
                gradients.product_bf16(a.as_tensor(), &k_, &fed.rhs(), inputs)?;
                if dx.is_none() {
                    return Ok(());
                }
                let k = Lhs::new(k, Threads::All);
                let a = Rhs::scaled(s, Matrix::new(a_, r, inputs), Threads::All);
                if !dropped {
                    onto = Some((k, a));
                    return Ok(());
                }
                let mut out = Buffer::new(rows * inputs);
                product((&mut out, inputs), false, None, &[(&k, &a)], Threads::All);
                through = Some(out);
                Ok(())
            })??;
        }
        let Some((dx, write)) = dx else { return Ok(()) };
        let base = self.rhs(Way::Backward)?;
        let mut terms = vec![(g.packed(), &*base)];
        terms.extend(onto.as_ref().map(|(k, a)| (k, a)));
        product((&mut *dx, inputs), write == Write::Add, None, &terms, Threads::All);
        if let Some(mut through) = through {
            self.dropout.add_applied(&mut through, pass, dx);
        }
        Ok(())
    }
}

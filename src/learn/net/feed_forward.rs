//! The two linear layers of an encoder's layer with GELU between them.

use anyhow::Result;

use crate::learn::bf16::Lhs;
use crate::learn::buffer::Buffer;
use crate::learn::gradients::Gradients;
use crate::learn::linear::{Input, Linear, Pass, Trace, Write};
use crate::learn::ops::{Kept, gelu, gelu_backward};

#[derive(Debug)]
pub(super) struct FeedForward {
    pub(super) up: Linear,
    pub(super) down: Linear,
}

/// What the backward pass reads again.
pub(super) struct Saved {
    wide: Wide,
    up: Option<Trace>,
    down: Option<Trace>,
}

/// What GELU read. With products in bf16, so is this (as in PyTorch's autocast): half the memory,
/// and it goes from product to product in squares that stay in the cache.
enum Wide {
    F32(Buffer),
    Bf16(Lhs),
}

impl FeedForward {
    /// Whether anything in it is trained.
    pub(super) fn trains(&self) -> bool {
        self.up.trains() || self.down.trains()
    }

    /// `[tokens, hidden]` to the same.
    pub(super) fn forward(
        &self,
        x: &[f32],
        pass: Pass<'_>,
        keep: bool,
    ) -> Result<(Buffer, Option<Saved>)> {
        let x = Input::of(x, self.up.inputs());
        if self.up.rounds() {
            let (activated, wide, up) = self.up.forward_through(&x, gelu, pass, keep)?;
            let (out, down) = self.down.forward(&activated, pass)?;
            return Ok((out, wide.map(|wide| Saved { wide: Wide::Bf16(wide), up, down })));
        }
        let (wide, up) = self.up.forward(&x, pass)?;
        let (out, down) = self.down.forward(&self.activated(&wide), pass)?;
        Ok((out, keep.then_some(Saved { wide: Wide::F32(wide), up, down })))
    }

    /// What the second layer reads.
    fn activated<'a>(&self, wide: &'a [f32]) -> Input<'a> {
        let cols = self.up.outputs();
        Input::made(wide.len() / cols, cols, move |rows, out| {
            gelu(&wide[rows.start * cols..rows.end * cols], out);
        })
    }

    /// Adds to `grad`, the gradient of what a residual connection adds to the result, that of `x`.
    /// `x` is there only if the first layer reads it again; `kept` is what a dropout behind the
    /// second layer kept.
    pub(super) fn backward(
        &self,
        saved: Saved,
        x: &Input<'_>,
        grad: &mut [f32],
        kept: Option<&Kept>,
        gradients: &mut Gradients,
    ) -> Result<()> {
        let Saved { wide, up, down } = saved;
        let (up, down) = (up.as_ref(), down.as_ref());
        let to_down = Input::past(grad, self.down.outputs(), kept);
        match wide {
            Wide::Bf16(wide) => {
                let (rows, cols) = wide.size();
                let read = Input::made(rows, cols, |rows, out| wide.apply(rows, out, gelu));
                let back = (&wide, gelu_backward as fn(&[f32], &[f32], &mut [f32]));
                let to_up = self.down.backward_through(&read, &to_down, down, back, gradients)?;
                drop((read, to_down));
                drop(wide);
                self.up.backward(x, &to_up, up, Some((grad, Write::Add)), gradients)
            }
            Wide::F32(wide) => {
                let mut to_gelu = Buffer::new(wide.len());
                let into = Some((&mut to_gelu[..], Write::Over));
                self.down.backward(&self.activated(&wide), &to_down, down, into, gradients)?;
                drop(to_down);
                let cols = self.up.outputs();
                let to_up = Input::made(wide.len() / cols, cols, |rows, out| {
                    let range = rows.start * cols..rows.end * cols;
                    gelu_backward(&wide[range.clone()], &to_gelu[range], out);
                });
                self.up.backward(x, &to_up, up, Some((grad, Write::Add)), gradients)
            }
        }
    }
}

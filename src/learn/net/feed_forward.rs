//! The two linear layers of an encoder's layer with GELU between them.

use anyhow::Result;

use crate::learn::bf16::{Back, Lhs};
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
                let make = |rows, out: &mut [f32]| wide.apply(rows, out, gelu);
                // What the adapter's dropout took was rounded.
                let read = match down {
                    Some(_) => Input::of_packed(Lhs::from_rows((rows, cols), make)),
                    None => Input::made(rows, cols, make),
                };
                let back = (&wide, gelu_backward as Back);
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use candle_core::{DType, Device, Tensor, Var};

    use super::*;
    use crate::learn::arithmetic::Arithmetic;
    use crate::learn::linear::{Adapter, Held, Mode, Parameters};
    use crate::learn::nf4::Nf4;
    use crate::learn::ops::Frozen;
    use crate::learn::ops::tests::normal;

    const HIDDEN: usize = 45;
    const WIDE: usize = 70;

    fn var(name: &str, rows: usize, cols: usize) -> Var {
        let data = normal(name, rows * cols);
        let var = Var::from_slice(&data, (rows, cols), &Device::Cpu).unwrap();
        if cols == 1 { Var::from_tensor(&var.flatten_all().unwrap()).unwrap() } else { var }
    }

    /// What is trained comes second.
    fn layers(how: &str, p: f64, arithmetic: Arithmetic) -> (FeedForward, Vec<Tensor>) {
        let mut all = Parameters { arithmetic, scaling: 0.5, adapter_dropout: p, ..<_>::default() };
        let mut trained = Vec::new();
        for (name, rows, cols) in [("up", WIDE, HIDDEN), ("down", HIDDEN, WIDE)] {
            let (weight, bias) = (var(name, rows, cols), var("bias", rows, 1));
            let weight = match how {
                "trained" => {
                    trained.extend([weight.as_tensor().clone(), bias.as_tensor().clone()]);
                    Held::Trained(weight)
                }
                "nf4" => {
                    let packed = Nf4::quantize(weight.as_tensor(), true).unwrap();
                    Held::Frozen(Frozen::Nf4(Arc::new(packed)))
                }
                _ => Held::Frozen(Frozen::Dense(weight.as_detached_tensor())),
            };
            let bias = match how {
                "trained" => Held::Trained(bias),
                _ => Held::Frozen(Frozen::Dense(bias.as_detached_tensor())),
            };
            all.held.insert(format!("{name}.weight"), (weight, DType::F32));
            all.held.insert(format!("{name}.bias"), (bias, DType::F32));
            if how == "adapted" {
                let (a, b) = (var("a", 3, cols), var("b", rows, 3));
                trained.extend([a.as_tensor().clone(), b.as_tensor().clone()]);
                all.adapters.insert(name.to_owned(), Adapter { a, b });
            }
        }
        let [up, down] = ["up", "down"].map(|name| all.linear(name).unwrap());
        (FeedForward { up, down }, trained)
    }

    /// With products in bf16 everything is near what it is in f32, and the result is the same to
    /// the bit whether something is kept for a backward pass or not.
    #[test]
    fn in_bf16() {
        let (x, grad) = (normal("x", 67 * HIDDEN), normal("g", 67 * HIDDEN));
        let pass = Pass::whole(Mode::Train(3));
        for (how, p) in
            [("trained", 0.0), ("frozen", 0.0), ("nf4", 0.0), ("adapted", 0.0), ("adapted", 0.3)]
        {
            let run = |arithmetic| {
                let (layers, trained) = layers(how, p, arithmetic);
                let (out, saved) = layers.forward(&x, pass, true).unwrap();
                let (bare, none) = layers.forward(&x, pass, false).unwrap();
                assert!(bare[..] == out[..] && none.is_none());
                let (mut dx, mut gradients) = (grad.clone(), Gradients::default());
                let read = Input::of(&x, HIDDEN);
                layers.backward(saved.unwrap(), &read, &mut dx, None, &mut gradients).unwrap();
                let mut all = vec![out.to_vec(), dx];
                all.extend(trained.iter().map(|var| gradients.take(var).unwrap().to_vec()));
                all
            };
            for (i, (a, b)) in run(Arithmetic::Bf16).iter().zip(run(Arithmetic::F32)).enumerate() {
                let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| x * x).sum::<f32>().sqrt();
                let apart = norm(&mut a.iter().zip(&b).map(|(a, b)| a - b));
                let norm = norm(&mut b.iter().copied());
                assert!(apart < 1e-2 * norm, "{how} {p} {i}: {apart} {norm}");
                assert!(i > 0 || apart > 0.0, "nothing was rounded");
            }
        }
    }
}

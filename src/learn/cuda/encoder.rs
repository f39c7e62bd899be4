//! A layer of an encoder: post-norm, as BERT.

use anyhow::Result;

use super::attention::{Attention, Heads};
use super::device::Mat;
use super::pass::{Moments, Norm, Pass, Ranks};
use super::projection::Projection;
use crate::learn::linear::Dropout;

/// One layer.
#[derive(Debug)]
pub(super) struct EncoderLayer {
    pub(super) qkv: Projection,
    pub(super) attention: Attention,
    pub(super) out: Projection,
    pub(super) out_drop: Option<Dropout>,
    pub(super) attention_norm: Norm,
    pub(super) up: Projection,
    pub(super) down: Projection,
    pub(super) down_drop: Dropout,
    pub(super) output_norm: Norm,
}

/// What the backward of a layer needs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Saved {
    x: Mat,
    qkv: Mat,
    mixed: Mat,
    log_sums: u64,
    attention_sum: Mat,
    attention: Moments,
    middle: Mat,
    up: Mat,
    output_sum: Mat,
    output: Moments,
    /// Of the inputs of `qkv`, `out`, `up` and `down`; that of `down` is not kept itself.
    ranks: [Ranks; 4],
}

impl EncoderLayer {
    fn heads(&self, p: &Pass<'_>, qkv: Mat) -> Heads {
        let (queries, keys) = self.attention.widths();
        Heads { q: qkv, k: p.columns(qkv, queries), v: p.columns(qkv, queries + keys) }
    }

    /// `y` from `x`, `[tokens, hidden]` each, the rows of `x` with room for the ranks; without `y`
    /// only what the backward needs.
    pub(super) fn forward(&self, p: &Pass<'_>, x: Mat, y: Option<Mat>) -> Result<Saved> {
        let mark = p.scratch.mark();
        let (tokens, hidden) = (p.tokens, self.qkv.inputs);
        let qkv = p.saved(self.qkv.outputs)?;
        let qkv_ranks = p.project(&self.qkv, x, qkv, None, tokens)?;
        let mixed = p.saved(self.out.in_ld())?;
        let log_sums = p.saved.alloc(4 * tokens * self.attention.heads)?;
        self.attention.forward(p, self.heads(p, qkv), mixed, log_sums)?;
        let part = p.scratch(hidden)?;
        let out_ranks = p.project(&self.out, mixed, part, None, tokens)?;
        if let Some(place) = &self.out_drop {
            p.drop_elements(place, (part, part), (tokens, hidden))?;
        }
        let (attention_sum, middle) = (p.saved(hidden)?, p.saved(self.up.in_ld())?);
        let attention = p.moments(tokens, &self.attention_norm)?;
        let mats = (part, Some(x), attention_sum, middle);
        p.layer_norm(&self.attention_norm, mats, attention, hidden)?;
        let up = p.saved(self.up.outputs)?;
        let up_ranks = p.project(&self.up, middle, up, None, tokens)?;
        let act = p.scratch(self.down.in_ld())?;
        p.map(p.device.kernels.gelu, (up, act), self.down.inputs)?;
        let down_ranks = p.project(&self.down, act, part, None, tokens)?;
        let down_ranks = p.keep_ranks(&self.down, down_ranks)?;
        p.drop_elements(&self.down_drop, (part, part), (tokens, hidden))?;
        let output_sum = p.saved(hidden)?;
        let output = p.moments(tokens, &self.output_norm)?;
        let mats = (part, Some(middle), output_sum, y.unwrap_or(part));
        p.layer_norm(&self.output_norm, mats, output, hidden)?;
        p.scratch.release(mark);
        Ok(Saved {
            x,
            qkv,
            mixed,
            log_sums,
            attention_sum,
            attention,
            middle,
            up,
            output_sum,
            output,
            ranks: [qkv_ranks, out_ranks, up_ranks, down_ranks],
        })
    }

    /// Turns the gradient `g` of the layer's result into that of its input, if `below` wants it,
    /// and adds the gradients of what is trained.
    pub(super) fn backward(&self, p: &Pass<'_>, s: &Saved, g: Mat, below: bool) -> Result<()> {
        let mark = p.scratch.mark();
        let (tokens, hidden) = (p.tokens, self.qkv.inputs);
        let [qkv_ranks, out_ranks, up_ranks, down_ranks] = s.ranks;

        let d_sum = p.scratch(self.down.out_ld())?;
        p.layer_norm_backward(&self.output_norm, (s.output_sum, g, d_sum), s.output, hidden)?;
        let mut d_down = d_sum;
        if p.drops(&self.down_drop) {
            d_down = p.scratch(self.down.out_ld())?;
            p.drop_elements(&self.down_drop, (d_sum, d_down), (tokens, hidden))?;
        }
        let d_act = p.scratch(self.down.inputs)?;
        p.input_gradient((&self.down, down_ranks), d_down, d_act, None, tokens)?;
        let d_up = p.scratch(self.up.out_ld())?;
        let again = self.down.reads_input().then(|| p.scratch(self.down.inputs)).transpose()?;
        let mats = (s.up, d_act, d_up, again);
        p.map_backward(p.device.kernels.gelu_backward, mats, self.down.inputs)?;
        if self.down.trains() {
            let act = (again.unwrap_or(d_act), down_ranks);
            p.parameter_gradients(&self.down, act, d_down, tokens)?;
        }
        // The gradient of the result is no longer needed: its place takes that of the middle.
        p.input_gradient((&self.up, up_ranks), d_up, g, Some(d_sum), tokens)?;
        if self.up.trains() {
            p.parameter_gradients(&self.up, (s.middle, up_ranks), d_up, tokens)?;
        }

        let d_sum = p.scratch(self.out.out_ld())?;
        let mats = (s.attention_sum, g, d_sum);
        p.layer_norm_backward(&self.attention_norm, mats, s.attention, hidden)?;
        let mut d_out = d_sum;
        if let Some(place) = self.out_drop.as_ref().filter(|place| p.drops(place)) {
            d_out = p.scratch(self.out.out_ld())?;
            p.drop_elements(place, (d_sum, d_out), (tokens, hidden))?;
        }
        let d_mixed = p.scratch(self.out.inputs)?;
        p.input_gradient((&self.out, out_ranks), d_out, d_mixed, None, tokens)?;
        if self.out.trains() {
            p.parameter_gradients(&self.out, (s.mixed, out_ranks), d_out, tokens)?;
        }
        let d_qkv = p.scratch(self.qkv.out_ld())?;
        let (heads, gradients) = (self.heads(p, s.qkv), self.heads(p, d_qkv));
        self.attention.backward(p, heads, (s.mixed, d_mixed), s.log_sums, gradients, None)?;
        if below {
            p.input_gradient((&self.qkv, qkv_ranks), d_qkv, g, Some(d_sum), tokens)?;
        } else {
            p.only_ranks(&self.qkv, d_qkv, tokens)?;
        }
        if self.qkv.trains() {
            p.parameter_gradients(&self.qkv, (s.x, qkv_ranks), d_qkv, tokens)?;
        }
        p.scratch.release(mark);
        Ok(())
    }
}

//! A layer of a decoder: pre-norm, as Llama.

use anyhow::Result;

use super::attention::{Attention, Before, Heads};
use super::device::Mat;
use super::pass::{Moments, Norm, Pass, Ranks};
use super::projection::Projection;

/// One layer.
#[derive(Debug)]
pub(super) struct DecoderLayer {
    pub(super) input_norm: Norm,
    pub(super) qkv: Projection,
    /// Of queries and keys, head by head.
    pub(super) head_norms: Option<(Norm, Norm)>,
    pub(super) attention: Attention,
    pub(super) out: Projection,
    pub(super) post_norm: Norm,
    pub(super) gate_up: Projection,
    pub(super) down: Projection,
}

/// What the backward of a layer needs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Saved {
    x: Mat,
    input: Moments,
    /// As projected; also the values.
    qkv: Mat,
    /// Queries and keys as attention reads them.
    turned: Mat,
    head_norms: Option<(Moments, Moments)>,
    mixed: Mat,
    log_sums: u64,
    middle: Mat,
    post: Moments,
    gate_up: Mat,
    /// Of the inputs of `qkv`, `out`, `gate_up` and `down`; only that of `out` is kept itself.
    ranks: [Ranks; 4],
}

impl DecoderLayer {
    fn heads<'a>(&self, p: &Pass<'a>, turned: Mat, qkv: Mat) -> Heads {
        let (queries, keys) = self.attention.widths();
        Heads { q: turned, k: p.columns(turned, queries), v: p.columns(qkv, queries + keys) }
    }

    /// `y` from `x`, `[tokens, hidden]` each; without `y` only what the backward needs.
    pub(super) fn forward(&self, p: &Pass<'_>, x: Mat, y: Option<Mat>) -> Result<Saved> {
        let mark = p.scratch.mark();
        let (tokens, hidden) = (p.tokens, self.qkv.inputs);
        let (queries, keys) = self.attention.widths();
        let a = &self.attention;
        let (input, post) =
            (p.moments(tokens, &self.input_norm)?, p.moments(tokens, &self.post_norm)?);
        let h = p.scratch(self.qkv.in_ld())?;
        p.rms_norm(&self.input_norm, (x, h), input.rstd, (tokens, hidden))?;
        let qkv = p.saved(self.qkv.outputs)?;
        let qkv_ranks = p.project(&self.qkv, h, qkv, None, tokens)?;
        let qkv_ranks = p.keep_ranks(&self.qkv, qkv_ranks)?;
        let (turned, head_norms) = match &self.head_norms {
            None => {
                p.rotate(qkv, a.heads + a.kv_heads, a.head, 1.0)?;
                (qkv, None)
            }
            Some(norms @ (query, key)) => {
                let turned = p.saved(queries + keys)?;
                let moments =
                    (p.moments(tokens * a.heads, query)?, p.moments(tokens * a.kv_heads, key)?);
                p.norm_heads(a, norms, (qkv, turned), moments)?;
                (turned, Some(moments))
            }
        };
        let mixed = p.saved(self.out.in_ld())?;
        let log_sums = p.saved.alloc(4 * tokens * a.heads)?;
        a.forward(p, self.heads(p, turned, qkv), mixed, log_sums)?;
        let middle = p.saved(hidden)?;
        let out_ranks = p.project(&self.out, mixed, middle, Some(x), tokens)?;
        let h = p.scratch(self.gate_up.in_ld())?;
        p.rms_norm(&self.post_norm, (middle, h), post.rstd, (tokens, hidden))?;
        let gate_up = p.saved(self.gate_up.outputs)?;
        let gate_up_ranks = p.project(&self.gate_up, h, gate_up, None, tokens)?;
        let gate_up_ranks = p.keep_ranks(&self.gate_up, gate_up_ranks)?;
        let act = p.scratch(self.down.in_ld())?;
        if y.is_some() || self.down.ranks > 0 {
            p.map(p.device.kernels.swiglu, (gate_up, act), self.down.inputs)?;
        }
        let down_ranks = match y {
            Some(y) => p.project(&self.down, act, y, Some(middle), tokens)?,
            None => p.fill_ranks(&self.down, act, tokens)?,
        };
        let down_ranks = p.keep_ranks(&self.down, down_ranks)?;
        p.scratch.release(mark);
        Ok(Saved {
            x,
            input,
            qkv,
            turned,
            head_norms,
            mixed,
            log_sums,
            middle,
            post,
            gate_up,
            ranks: [qkv_ranks, out_ranks, gate_up_ranks, down_ranks],
        })
    }

    /// Turns the gradient `g` of the layer's result into that of its input, if `below` wants it,
    /// and adds the gradients of what is trained. The rows of `g` have room for the ranks.
    pub(super) fn backward(&self, p: &Pass<'_>, s: &Saved, g: Mat, below: bool) -> Result<()> {
        let mark = p.scratch.mark();
        let (tokens, hidden) = (p.tokens, self.qkv.inputs);
        let (queries, keys) = self.attention.widths();
        let a = &self.attention;
        let [qkv_ranks, out_ranks, gate_up_ranks, down_ranks] = s.ranks;
        let h = p.scratch(hidden)?;

        let inner = p.scratch.mark();
        let act = p.scratch(self.down.inputs)?;
        p.input_gradient((&self.down, down_ranks), g, act, None, tokens)?;
        let d_gate_up = p.scratch(self.gate_up.out_ld())?;
        let again = self.down.reads_input().then(|| p.scratch(self.down.inputs)).transpose()?;
        let mats = (s.gate_up, act, d_gate_up, again);
        p.map_backward(p.device.kernels.swiglu_backward, mats, self.down.inputs)?;
        if self.down.trains() {
            p.parameter_gradients(&self.down, (again.unwrap_or(act), down_ranks), g, tokens)?;
        }
        p.input_gradient((&self.gate_up, gate_up_ranks), d_gate_up, h, None, tokens)?;
        let of = (s.middle, s.post, gate_up_ranks, d_gate_up);
        self.again(p, &self.gate_up, &self.post_norm, of)?;
        p.scratch.release(inner);
        let size = (tokens, hidden);
        p.rms_norm_backward(&self.post_norm, (s.middle, h, Some(g), g), s.post.rstd, size)?;

        let d_mixed = p.scratch(queries)?;
        p.input_gradient((&self.out, out_ranks), g, d_mixed, None, tokens)?;
        if self.out.trains() {
            p.parameter_gradients(&self.out, (s.mixed, out_ranks), g, tokens)?;
        }
        let d_qkv = p.scratch(self.qkv.out_ld())?;
        let heads = self.heads(p, s.turned, s.qkv);
        let gradients = self.heads(p, d_qkv, d_qkv);
        let mixed = (s.mixed, d_mixed);
        if !a.backward(p, heads, mixed, s.log_sums, gradients, self.before_attention(s))? {
            match (&self.head_norms, s.head_norms) {
                (Some(norms), Some(moments)) => {
                    p.norm_heads_backward(a, norms, (s.qkv, d_qkv), moments)?;
                }
                _ => p.rotate(d_qkv, a.heads + a.kv_heads, a.head, -1.0)?,
            }
        }
        debug_assert_eq!(self.qkv.outputs, queries + 2 * keys);
        if below || self.input_norm.weight_gradient.is_some() {
            p.input_gradient((&self.qkv, qkv_ranks), d_qkv, h, None, tokens)?;
        } else {
            p.only_ranks(&self.qkv, d_qkv, tokens)?;
        }
        self.again(p, &self.qkv, &self.input_norm, (s.x, s.input, qkv_ranks, d_qkv))?;
        if below || self.input_norm.weight_gradient.is_some() {
            p.rms_norm_backward(&self.input_norm, (s.x, h, Some(g), g), s.input.rstd, size)?;
        }
        p.scratch.release(mark);
        Ok(())
    }

    /// What the gradients of queries and keys may go back through at once; not where a norm of
    /// heads is trained, whose gradient needs what is in between.
    fn before_attention(&self, s: &Saved) -> Option<Before> {
        let (Some((query, key)), Some((of_query, of_key))) = (&self.head_norms, s.head_norms)
        else {
            return Some(Before { norms: None });
        };
        let frozen = query.weight_gradient.is_none() && key.weight_gradient.is_none();
        let each = [(query.weight, of_query.rstd), (key.weight, of_key.rstd)];
        frozen.then_some(Before { norms: Some((s.qkv, each)) })
    }

    /// The gradients of what is trained in a projection behind a norm, whose result is not kept.
    fn again(
        &self,
        p: &Pass<'_>,
        projection: &Projection,
        norm: &Norm,
        (x, moments, ranks, g): (Mat, Moments, Ranks, Mat),
    ) -> Result<()> {
        if !projection.trains() {
            return Ok(());
        }
        p.gradients_behind(projection, norm, (x, moments, ranks), g)
    }
}

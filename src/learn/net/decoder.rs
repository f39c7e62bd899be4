//! One layer of a decoder: pre-norm, as Llama.

use anyhow::Result;

use super::norm::RmsNorm;
use crate::learn::buffer::Buffer;
use crate::learn::config::{Family, ModelConfig};
use crate::learn::gradients::Gradients;
use crate::learn::linear::{Dropout, Input, Linear, Parameters, Pass, Trace, Write};
use crate::learn::ops::{
    Attention, KeptProbabilities, RopeTable, Turn, add, add_rows, select_rows, swiglu,
    swiglu_backward,
};

#[derive(Debug)]
pub(super) struct DecoderLayer {
    input_norm: RmsNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    out: Linear,
    query_norm: Option<RmsNorm>,
    key_norm: Option<RmsNorm>,
    pub(super) attention_drop: Dropout,
    pub(super) window: Option<usize>,
    post_norm: RmsNorm,
    gate: Linear,
    up: Linear,
    down: Linear,
}

/// What the backward pass reads again; an input of linear layers only where it is read.
pub(in crate::learn) struct Saved {
    x: Buffer,
    normed: Option<Buffer>,
    /// The rows of `normed` that there are results for, if not all.
    chosen: Option<Buffer>,
    /// Queries and keys before their norms, where they have them.
    before: [Option<Buffer>; 2],
    attention: [Buffer; 3],
    kept: Option<KeptProbabilities>,
    mixed: Option<Buffer>,
    middle: Buffer,
    mlp: Mlp,
    traces: Traces,
}

/// Of each linear layer.
struct Traces {
    query: Option<Trace>,
    key: Option<Trace>,
    value: Option<Trace>,
    out: Option<Trace>,
    gate: Option<Trace>,
    up: Option<Trace>,
    down: Option<Trace>,
}

struct Mlp {
    normed: Option<Buffer>,
    gate: Buffer,
    up: Buffer,
}

impl DecoderLayer {
    pub(super) fn new(c: &ModelConfig, p: &Parameters, i: usize) -> Result<Self> {
        let at = |name: &str| format!("model.layers.{i}.{name}");
        let linear = |name: &str| p.linear(&at(name));
        let norm = |name: &str| RmsNorm::new(p, &at(name), c.eps);
        let qk = c.family == Family::Qwen3;
        Ok(Self {
            input_norm: norm("input_layernorm")?,
            query: linear("self_attn.q_proj")?,
            key: linear("self_attn.k_proj")?,
            value: linear("self_attn.v_proj")?,
            out: linear("self_attn.o_proj")?,
            query_norm: qk.then(|| norm("self_attn.q_norm")).transpose()?,
            key_norm: qk.then(|| norm("self_attn.k_norm")).transpose()?,
            attention_drop: p.dropout(&format!("{i}/attention"), c.attention_dropout),
            window: c.windows.get(i).copied().flatten(),
            post_norm: norm("post_attention_layernorm")?,
            gate: linear("mlp.gate_proj")?,
            up: linear("mlp.up_proj")?,
            down: linear("mlp.down_proj")?,
        })
    }

    /// Whether anything in it is trained.
    pub(super) fn trains(&self) -> bool {
        let attention = [&self.query, &self.key, &self.value, &self.out];
        let mlp = [&self.gate, &self.up, &self.down];
        let norms = [Some(&self.input_norm), Some(&self.post_norm)];
        let heads = [self.query_norm.as_ref(), self.key_norm.as_ref()];
        attention.iter().any(|l| l.trains())
            || mlp.iter().any(|l| l.trains())
            || norms.iter().chain(&heads).flatten().any(|n| n.trains())
    }

    /// `[tokens, hidden]` to the same, or to the rows of the pass: only keys and values are needed
    /// of the others.
    pub(super) fn forward(
        &self,
        x: Buffer,
        how: &Attention,
        table: Option<&RopeTable>,
        pass: Pass<'_>,
        keep: bool,
    ) -> Result<(Buffer, Option<Saved>)> {
        let normed = self.input_norm.forward(&x)?;
        let whole = Pass::whole(pass.mode);
        let width = self.query.inputs();
        let chosen = pass.rows.map(|rows| select_rows(&normed, width, rows));
        let turned =
            |layer: &Linear, norm: &Option<RmsNorm>, x: &Input<'_>, pass: Pass<'_>| -> Result<_> {
                let (before, trace) = layer.forward(x, pass)?;
                let (before, mut y) = match norm {
                    Some(norm) => {
                        let y = norm.forward(&before)?;
                        (Some(before), y)
                    }
                    None => (None, before),
                };
                if let Some(table) = table {
                    table.rotate(&mut y, layer.outputs(), pass.rows, Turn::Forwards);
                }
                Ok((before.filter(|_| keep), y, trace))
            };
        let all = Input::of(&normed, width);
        let some = chosen.as_deref().map(|x| Input::of(x, width));
        let own = some.as_ref().unwrap_or(&all);
        let (q_before, q, query) = turned(&self.query, &self.query_norm, own, pass)?;
        let (k_before, k, key) = turned(&self.key, &self.key_norm, &all, whole)?;
        let (v, value) = self.value.forward(&all, whole)?;
        drop((all, some));
        let reads = [&self.query, &self.key, &self.value].iter().any(|l| l.reads_input());
        let chosen = chosen.filter(|_| keep && self.query.reads_input());
        let normed = (keep && reads).then_some(normed);
        let mut mixed = Buffer::new(q.len());
        let kept = how.forward(&q, &k, &v, &mut mixed);
        let attention = keep.then_some([q, k, v]);
        let residual = pass.rows.map(|rows| select_rows(&x, width, rows));
        let (before, mut middle) = match (keep, residual) {
            (true, None) => (Some(Buffer::of(&x)), x),
            (false, None) => (None, x),
            (_, Some(residual)) => (Some(x), residual),
        };
        let read = Input::of(&mixed, self.out.inputs());
        let out = self.out.forward_into(&read, pass, Write::Add, &mut middle)?;
        drop(read);
        let mixed = (keep && self.out.reads_input()).then_some(mixed);
        let middle_normed = self.post_norm.forward(&middle)?;
        let read = Input::of(&middle_normed, width);
        let (gated, gate) = self.gate.forward(&read, pass)?;
        let (wide, up) = self.up.forward(&read, pass)?;
        drop(read);
        let reads = self.gate.reads_input() || self.up.reads_input();
        let middle_normed = (keep && reads).then_some(middle_normed);
        let mut result = Buffer::of(&middle);
        let activated = self.activated(&gated, &wide);
        let down = self.down.forward_into(&activated, pass, Write::Add, &mut result)?;
        drop(activated);
        let saved = attention.zip(before).map(|(attention, x)| Saved {
            x,
            normed,
            chosen,
            before: [q_before, k_before],
            attention,
            kept,
            mixed,
            middle,
            mlp: Mlp { normed: middle_normed, gate: gated, up: wide },
            traces: Traces { query, key, value, out, gate, up, down },
        });
        Ok((result, saved))
    }

    /// What the last linear layer reads.
    fn activated<'a>(&self, gate: &'a [f32], up: &'a [f32]) -> Input<'a> {
        let cols = self.up.outputs();
        Input::made(up.len() / cols, cols, move |rows, out| {
            let range = rows.start * cols..rows.end * cols;
            swiglu(&gate[range.clone()], &up[range], out);
        })
    }

    /// From the gradient of the result that of the input, if anything `below` wants it.
    #[expect(clippy::too_many_arguments, reason = "what a backward pass needs")]
    pub(super) fn backward(
        &self,
        saved: Saved,
        mut grad: Buffer,
        how: &Attention,
        table: Option<&RopeTable>,
        pass: Pass<'_>,
        below: bool,
        gradients: &mut Gradients,
    ) -> Result<Option<Buffer>> {
        let Saved { x, normed, chosen, before, attention, kept, mixed, middle, .. } = saved;
        let (mlp, traces) = (saved.mlp, saved.traces);
        let Mlp { normed: middle_normed, mut gate, up } = mlp;
        let width = self.query.inputs();

        let [q, k, v] = attention;
        let mut to_up = Buffer::new(up.len());
        let into = Some((&mut to_up[..], Write::Over));
        let g = Input::of(&grad, self.down.outputs());
        let trace = traces.down.as_ref();
        self.down.backward(&self.activated(&gate, &up), &g, trace, into, gradients)?;
        drop(g);
        swiglu_backward(&mut gate, &up, &mut to_up);
        drop(up);
        let mut to_normed = Buffer::new(grad.len());
        let read = middle_normed.as_deref().map_or_else(Input::none, |x| Input::of(x, width));
        let layers = [
            (&self.gate, &gate, &traces.gate, Write::Over),
            (&self.up, &to_up, &traces.up, Write::Add),
        ];
        for (layer, g, trace, write) in layers {
            let into = Some((&mut to_normed[..], write));
            let g = Input::of(g, layer.outputs());
            layer.backward(&read, &g, trace.as_ref(), into, gradients)?;
        }
        drop(read);
        drop((gate, to_up, middle_normed));
        self.post_norm.backward(&middle, &mut to_normed, gradients)?;
        add(&mut grad, &to_normed);
        drop((middle, to_normed));

        let norms = [self.query_norm.as_ref(), self.key_norm.as_ref()];
        let further = below || self.input_norm.trains();
        let mut wanted = [&self.query, &self.key, &self.value].map(|l| further || l.trains());
        for (wanted, norm) in wanted.iter_mut().zip(norms) {
            *wanted |= norm.is_some_and(RmsNorm::trains);
        }
        if wanted == [false; 3] && !self.out.trains() {
            return Ok(None);
        }
        let mut to_mixed = Buffer::new(q.len());
        let into = Some((&mut to_mixed[..], Write::Over));
        let read = mixed.as_deref().map_or_else(Input::none, |x| Input::of(x, self.out.inputs()));
        let g = Input::of(&grad, self.out.outputs());
        self.out.backward(&read, &g, traces.out.as_ref(), into, gradients)?;
        drop((read, g));
        drop(mixed);
        let by = how.backward([&q, &k, &v], kept.as_ref(), &to_mixed, wanted);
        drop((to_mixed, q, k, v));
        let all = normed.as_deref().map_or_else(Input::none, |x| Input::of(x, width));
        let some = chosen.as_deref().map(|x| Input::of(x, width));
        let own = some.as_ref().unwrap_or(&all);
        let [q_before, k_before] = before;
        let whole = Pass::whole(pass.mode);
        let layers = [
            (&self.query, by.query, norms[0].zip(q_before), table, own, pass, &traces.query),
            (&self.key, by.key, norms[1].zip(k_before), table, &all, whole, &traces.key),
            (&self.value, by.value, None, None, &all, whole, &traces.value),
        ];
        let mut to_normed: Option<Buffer> = None;
        for (layer, g, norm, table, read, at, trace) in layers {
            let Some(mut g) = g else { continue };
            if let Some(table) = table {
                table.rotate(&mut g, layer.outputs(), at.rows, Turn::Back);
            }
            if let Some((norm, before)) = norm {
                norm.backward(&before, &mut g, gradients)?;
            }
            let write = if to_normed.is_some() { Write::Add } else { Write::Over };
            let size = at.rows.map_or(x.len(), |rows| rows.len() * width);
            let into = further.then(|| to_normed.get_or_insert_with(|| Buffer::new(size)));
            let g = Input::of(&g, layer.outputs());
            let into = into.map(|b| (&mut b[..], write));
            layer.backward(read, &g, trace.as_ref(), into, gradients)?;
            // What the chosen rows got is part of what all get.
            if let (Some(rows), Some(some)) = (at.rows, &mut to_normed) {
                *some = spread(some, rows, x.len());
            }
        }
        let Some(mut to_normed) = to_normed else { return Ok(None) };
        self.input_norm.backward(&x, &mut to_normed, gradients)?;
        if !below {
            return Ok(None);
        }
        match pass.rows {
            None => add(&mut grad, &to_normed),
            Some(rows) => {
                add_rows(&grad, width, rows, None, &mut to_normed);
                grad = to_normed;
            }
        }
        Ok(Some(grad))
    }
}

/// Rows at their places among zeros, `all` numbers together.
fn spread(some: &[f32], rows: &[u32], all: usize) -> Buffer {
    let mut out = Buffer::zeros(all);
    add_rows(some, some.len() / rows.len().max(1), rows, None, &mut out);
    out
}

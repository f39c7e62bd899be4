//! One layer of an encoder: post-norm, as BERT.

use anyhow::Result;

use super::feed_forward::{self, FeedForward};
use super::norm::LayerNorm;
use crate::learn::buffer::Buffer;
use crate::learn::config::{Family, ModelConfig};
use crate::learn::gradients::Gradients;
use crate::learn::layout::EncoderNames;
use crate::learn::linear::{Dropout, Input, Linear, Parameters, Pass, Trace, Write};
use crate::learn::ops::{Attention, Kept, KeptProbabilities, add_rows, select_rows};

#[derive(Debug)]
pub(super) struct EncoderLayer {
    query: Linear,
    key: Linear,
    value: Linear,
    out: Linear,
    pub(super) attention_drop: Dropout,
    /// After the attention's output layer; DistilBERT has none.
    out_drop: Option<Dropout>,
    attention_norm: LayerNorm,
    feed_forward: FeedForward,
    down_drop: Dropout,
    output_norm: LayerNorm,
}

/// What the backward pass reads again; an input of linear layers only where it is read.
pub(in crate::learn) struct Saved {
    x: Option<Buffer>,
    /// The rows of `x` that there are results for, if not all.
    chosen: Option<Buffer>,
    attention: [Buffer; 3],
    mixed: Option<Buffer>,
    attention_sum: Buffer,
    middle: Option<Buffer>,
    feed_forward: feed_forward::Saved,
    output_sum: Buffer,
    traces: Traces,
    kept: Dropped,
}

/// Of each linear layer.
struct Traces {
    query: Option<Trace>,
    key: Option<Trace>,
    value: Option<Trace>,
    out: Option<Trace>,
}

/// What each dropout kept.
struct Dropped {
    attention: Option<KeptProbabilities>,
    out: Option<Kept>,
    down: Option<Kept>,
}

impl EncoderLayer {
    pub(super) fn new(c: &ModelConfig, p: &Parameters, i: usize) -> Result<Self> {
        let n = EncoderNames::new(c.family, i);
        let drop = |name: &str, rate| p.dropout(&format!("{i}/{name}"), rate);
        let bert = c.family == Family::Bert;
        Ok(Self {
            query: p.linear(&n.query)?,
            key: p.linear(&n.key)?,
            value: p.linear(&n.value)?,
            out: p.linear(&n.out)?,
            attention_drop: drop("attention", c.attention_dropout),
            out_drop: bert.then(|| drop("out", c.hidden_dropout)),
            attention_norm: LayerNorm::new(p, &n.attention_norm, c.eps)?,
            feed_forward: FeedForward { up: p.linear(&n.up)?, down: p.linear(&n.down)? },
            down_drop: drop("down", c.hidden_dropout),
            output_norm: LayerNorm::new(p, &n.output_norm, c.eps)?,
        })
    }

    /// Whether anything in it is trained.
    pub(super) fn trains(&self) -> bool {
        let all = [&self.query, &self.key, &self.value, &self.out];
        let norms = [&self.attention_norm, &self.output_norm];
        all.iter().any(|l| l.trains())
            || self.feed_forward.trains()
            || norms.iter().any(|n| n.trains())
    }

    /// `[tokens, hidden]` to the same, or to the rows of the pass: only keys and values are needed
    /// of the others.
    pub(super) fn forward(
        &self,
        x: Buffer,
        how: &Attention,
        pass: Pass<'_>,
        keep: bool,
    ) -> Result<(Buffer, Option<Saved>)> {
        let whole = Pass::whole(pass.mode);
        let chosen = pass.rows.map(|rows| select_rows(&x, self.query.inputs(), rows));
        let own = chosen.as_deref().unwrap_or(&x);
        let read = Input::of(&x, self.query.inputs());
        let some = chosen.as_deref().map(|x| Input::of(x, self.query.inputs()));
        let (q, query) = self.query.forward(some.as_ref().unwrap_or(&read), pass)?;
        let (k, key) = self.key.forward(&read, whole)?;
        let (v, value) = self.value.forward(&read, whole)?;
        drop((read, some));
        let mut mixed = Buffer::new(q.len());
        let kept_attention = how.forward(&q, &k, &v, &mut mixed);
        let attention = keep.then_some([q, k, v]);
        let (mut attention_sum, out) =
            self.out.forward(&Input::of(&mixed, self.out.inputs()), pass)?;
        let mixed = (keep && self.out.reads_input()).then_some(mixed);
        let size = (attention_sum.len() / self.out.outputs(), self.out.outputs());
        let kept_out = self.out_drop.and_then(|drop| drop.draw(size, pass));
        let norm = &self.attention_norm;
        let middle = norm.add_forward(&mut attention_sum, kept_out.as_ref(), own)?;
        let (mut output_sum, feed_forward) = self.feed_forward.forward(&middle, pass, keep)?;
        let kept_down = self.down_drop.draw(size, pass);
        let norm = &self.output_norm;
        let result = norm.add_forward(&mut output_sum, kept_down.as_ref(), &middle)?;
        let chosen = chosen.filter(|_| self.query.reads_input());
        let x = [&self.query, &self.key, &self.value].iter().any(|l| l.reads_input()).then_some(x);
        let middle = self.feed_forward.up.reads_input().then_some(middle);
        let saved = attention.zip(feed_forward).map(|(attention, feed_forward)| Saved {
            x,
            chosen,
            attention,
            mixed,
            attention_sum,
            middle,
            feed_forward,
            output_sum,
            traces: Traces { query, key, value, out },
            kept: Dropped { attention: kept_attention, out: kept_out, down: kept_down },
        });
        Ok((result, saved))
    }

    /// From the gradient of the result that of the input, if anything `below` wants it.
    pub(super) fn backward(
        &self,
        saved: Saved,
        mut grad: Buffer,
        how: &Attention,
        pass: Pass<'_>,
        below: bool,
        gradients: &mut Gradients,
    ) -> Result<Option<Buffer>> {
        let Saved { x, chosen, attention, mixed, attention_sum, middle, output_sum, .. } = saved;
        let (feed_forward, traces, kept) = (saved.feed_forward, saved.traces, saved.kept);
        let [q, k, v] = attention;
        self.output_norm.backward(&output_sum, &mut grad, gradients)?;
        drop(output_sum);
        // Past the dropout goes what it kept; the residual takes the gradient as it is.
        let middle = read(&middle, &self.feed_forward.up);
        let kept_down = kept.down.as_ref();
        self.feed_forward.backward(feed_forward, &middle, &mut grad, kept_down, gradients)?;
        drop(middle);
        self.attention_norm.backward(&attention_sum, &mut grad, gradients)?;
        drop(attention_sum);
        let wanted = [&self.query, &self.key, &self.value].map(|l| below || l.trains());
        if wanted == [false; 3] && !self.out.trains() {
            return Ok(None);
        }
        let to_out = Input::past(&grad, self.out.outputs(), kept.out.as_ref());
        let mut to_mixed = Buffer::new(q.len());
        let into = Some((&mut to_mixed[..], Write::Over));
        let trace = traces.out.as_ref();
        self.out.backward(&read(&mixed, &self.out), &to_out, trace, into, gradients)?;
        drop(to_out);
        drop(mixed);
        let by = how.backward([&q, &k, &v], kept.attention.as_ref(), &to_mixed, wanted);
        let tokens = k.len() / self.key.outputs();
        drop((to_mixed, q, k, v));
        let all = read(&x, &self.key);
        if let Some(g) = by.query {
            let some = chosen.as_deref().map(|x| Input::of(x, self.query.inputs()));
            let g = Input::of(&g, self.query.outputs());
            let into = below.then_some((&mut grad[..], Write::Add));
            let read = some.as_ref().unwrap_or(&all);
            self.query.backward(read, &g, traces.query.as_ref(), into, gradients)?;
        }
        // What the chosen rows got is part of what all get.
        if let Some(rows) = pass.rows.filter(|_| below) {
            let width = self.key.inputs();
            let mut spread = Buffer::zeros(tokens * width);
            add_rows(&grad, width, rows, None, &mut spread);
            grad = spread;
        }
        let layers = [(&self.key, by.key, &traces.key), (&self.value, by.value, &traces.value)];
        for (layer, g, trace) in layers {
            let Some(g) = g else { continue };
            let into = below.then_some((&mut grad[..], Write::Add));
            let g = Input::of(&g, layer.outputs());
            layer.backward(&all, &g, trace.as_ref(), into, gradients)?;
        }
        Ok(below.then_some(grad))
    }
}

/// What a layer had read, as far as it was kept.
fn read<'a>(kept: &'a Option<Buffer>, layer: &Linear) -> Input<'a> {
    kept.as_deref().map_or_else(Input::none, |x| Input::of(x, layer.inputs()))
}

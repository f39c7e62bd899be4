//! A model's blocks on the CPU, forward and backward: embedding, layers, features, output.

mod decoder;
mod embeddings;
mod encoder;
mod feed_forward;
mod norm;

use std::ops::Range;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};

use self::decoder::DecoderLayer;
use self::embeddings::{Embeddings, SavedEmbeddings};
use self::encoder::EncoderLayer;
use self::norm::RmsNorm;
use super::arithmetic::Arithmetic;
use super::batch::Packed;
use super::buffer::{Buffer, release};
use super::config::{Family, ModelConfig};
use super::gradients::Gradients;
use super::layout::output_embedding;
use super::linear::{Dropout, Input, Linear, Parameters, Pass, Trace, Write};
use super::ops::{Attention, Kept, RopeTable};

impl Drop for Net {
    fn drop(&mut self) {
        release();
    }
}

/// What the layers share in one pass.
pub(crate) struct Sequences {
    starts: Arc<[usize]>,
    hidden: Arc<[Range<usize>]>,
    rope: Option<RopeTable>,
}

/// A model's blocks.
#[derive(Debug)]
pub(crate) struct Net {
    arithmetic: Arithmetic,
    heads: usize,
    kv_heads: usize,
    head: usize,
    hidden: usize,
    rope: Vec<f32>,
    embeddings: Embeddings,
    layers: Vec<Layer>,
    features: Features,
    output: Option<Linear>,
}

#[derive(Debug)]
enum Layer {
    Encoder(Box<EncoderLayer>),
    Decoder(Box<DecoderLayer>),
}

/// What lies between the last layer and the output layer.
#[derive(Debug)]
enum Features {
    Norm(RmsNorm),
    Pool { dense: Linear, tanh: bool, dropout: Dropout },
    Bare,
}

/// What a layer keeps for its backward pass.
pub(crate) enum Saved {
    Encoder(Box<encoder::Saved>),
    Decoder(Box<decoder::Saved>),
}

/// What the features keep.
pub(crate) struct SavedFeatures {
    rows: Buffer,
    pooled: Option<Pooled>,
}

/// Pooled values before dropout, and what it kept of them.
struct Pooled {
    values: Buffer,
    trace: Option<Trace>,
    kept: Option<Kept>,
}

impl Net {
    /// Builds a model out of its tensors.
    ///
    /// # Errors
    /// When a tensor is missing, or two do not fit each other.
    pub(crate) fn new(c: &ModelConfig, p: &Parameters) -> Result<Self> {
        let layer = |i| -> Result<Layer> {
            Ok(match c.is_decoder() {
                true => Layer::Decoder(Box::new(DecoderLayer::new(c, p, i)?)),
                false => Layer::Encoder(Box::new(EncoderLayer::new(c, p, i)?)),
            })
        };
        let (features, output) = if c.is_decoder() {
            let norm = RmsNorm::new(p, "model.norm", c.eps)?;
            (Features::Norm(norm), Some(Linear::of(p, output_embedding(c))?))
        } else if p.held.contains_key("classifier.weight") {
            let bert = c.family == Family::Bert;
            let features = Features::Pool {
                dense: p.linear(if bert { "bert.pooler.dense" } else { "pre_classifier" })?,
                tanh: bert,
                dropout: p.dropout("classifier", c.classifier_dropout),
            };
            (features, Some(p.linear("classifier")?))
        } else {
            (Features::Bare, None)
        };
        Ok(Self {
            arithmetic: p.arithmetic,
            heads: c.heads,
            kv_heads: c.kv_heads,
            head: c.head,
            hidden: c.hidden,
            rope: c.rope.clone(),
            embeddings: Embeddings::new(c, p)?,
            layers: (0..c.layers).map(layer).collect::<Result<_>>()?,
            features,
            output,
        })
    }

    /// Number of layers.
    pub(crate) fn layers(&self) -> usize {
        self.layers.len()
    }

    /// Numbers of a token between layers.
    pub(crate) fn hidden(&self) -> usize {
        self.hidden
    }

    /// Whether anything below a layer is trained; below layer [`Net::layers`] means all layers
    /// and the embedding.
    pub(crate) fn trains_below(&self, layer: usize) -> bool {
        let trains = |layer: &Layer| match layer {
            Layer::Encoder(l) => l.trains(),
            Layer::Decoder(l) => l.trains(),
        };
        self.embeddings.trains() || self.layers.iter().take(layer).any(trains)
    }

    /// What the layers share for a batch.
    pub(crate) fn sequences(&self, batch: &Packed) -> Sequences {
        let table = || RopeTable::new(&self.rope, &batch.positions);
        Sequences {
            starts: batch.starts.as_slice().into(),
            hidden: batch.hidden.as_slice().into(),
            rope: (!self.rope.is_empty()).then(table),
        }
    }

    /// `[tokens, hidden]`, and what [`Net::embed_backward`] reads.
    ///
    /// # Errors
    /// When an id is outside its table.
    pub(crate) fn embed(
        &self,
        batch: &Packed,
        pass: Pass<'_>,
    ) -> Result<(Buffer, Option<SavedEmbeddings>)> {
        self.embeddings.forward(batch, pass)
    }

    /// Gradients of the embedding.
    ///
    /// # Errors
    /// When the gradient is of another size.
    pub(crate) fn embed_backward(
        &self,
        batch: &Packed,
        saved: Option<SavedEmbeddings>,
        grad: Buffer,
        gradients: &mut Gradients,
    ) -> Result<()> {
        self.embeddings.backward(batch, saved, grad, gradients)
    }

    fn attention(
        &self,
        s: &Sequences,
        drop: &Dropout,
        pass: Pass<'_>,
        (causal, window): (bool, Option<usize>),
    ) -> Attention {
        Attention {
            arithmetic: self.arithmetic,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head: self.head,
            causal,
            window,
            dropout: drop.mask(pass.mode),
            queries: pass.rows.map(Arc::from),
            starts: s.starts.clone(),
            hidden: s.hidden.clone(),
        }
    }

    /// One layer: `[tokens, hidden]` to the same, or to the rows of the pass, and what
    /// [`Net::layer_backward`] reads if that is to be kept.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub(crate) fn layer(
        &self,
        i: usize,
        x: Buffer,
        s: &Sequences,
        pass: Pass<'_>,
        keep: bool,
    ) -> Result<(Buffer, Option<Saved>)> {
        match self.layers.get(i) {
            Some(Layer::Encoder(l)) => {
                let how = self.attention(s, &l.attention_drop, pass, (false, None));
                let (x, saved) = l.forward(x, &how, pass, keep)?;
                Ok((x, saved.map(|s| Saved::Encoder(Box::new(s)))))
            }
            Some(Layer::Decoder(l)) => {
                let how = self.attention(s, &l.attention_drop, pass, (true, l.window));
                let (x, saved) = l.forward(x, &how, s.rope.as_ref(), pass, keep)?;
                Ok((x, saved.map(|s| Saved::Decoder(Box::new(s)))))
            }
            None => bail!("no layer {i}"),
        }
    }

    /// From the gradient of a layer's result that of its input, if anything below is trained.
    ///
    /// # Errors
    /// When it is of another size.
    pub(crate) fn layer_backward(
        &self,
        i: usize,
        saved: Saved,
        grad: Buffer,
        s: &Sequences,
        pass: Pass<'_>,
        gradients: &mut Gradients,
    ) -> Result<Option<Buffer>> {
        let below = self.trains_below(i);
        match (self.layers.get(i), saved) {
            (Some(Layer::Encoder(l)), Saved::Encoder(saved)) => {
                let how = self.attention(s, &l.attention_drop, pass, (false, None));
                l.backward(*saved, grad, &how, pass, below, gradients)
            }
            (Some(Layer::Decoder(l)), Saved::Decoder(saved)) => {
                let how = self.attention(s, &l.attention_drop, pass, (true, l.window));
                l.backward(*saved, grad, &how, s.rope.as_ref(), pass, below, gradients)
            }
            _ => bail!("no layer {i} of that kind"),
        }
    }

    /// What the output layer reads, for chosen rows `[rows, hidden]` of the last layer.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub(crate) fn features(&self, rows: Buffer, pass: Pass<'_>) -> Result<(Buffer, SavedFeatures)> {
        match &self.features {
            Features::Norm(norm) => {
                Ok((norm.forward(&rows)?, SavedFeatures { rows, pooled: None }))
            }
            Features::Pool { dense, tanh, dropout } => {
                let read = Input::of(&rows, dense.inputs());
                let (mut values, trace) = dense.forward(&read, pass)?;
                drop(read);
                // Not `max`, which passes over what is not a number.
                let activate = |x: f32| {
                    if *tanh {
                        x.tanh()
                    } else if x < 0.0 {
                        0.0
                    } else {
                        x
                    }
                };
                values.iter_mut().for_each(|x| *x = activate(*x));
                let mut out = Buffer::of(&values);
                let cols = dense.outputs();
                let kept = dropout.draw((out.len() / cols, cols), pass);
                kept.iter().for_each(|kept| kept.apply(&mut out));
                let pooled = Some(Pooled { values, trace, kept });
                Ok((out, SavedFeatures { rows, pooled }))
            }
            Features::Bare => Ok((Buffer::of(&rows), SavedFeatures { rows, pooled: None })),
        }
    }

    /// From the gradient of the features that of the rows, if any layer or the embedding is
    /// trained.
    ///
    /// # Errors
    /// When it is of another size.
    pub(crate) fn features_backward(
        &self,
        saved: SavedFeatures,
        mut grad: Buffer,
        gradients: &mut Gradients,
    ) -> Result<Option<Buffer>> {
        let below = self.trains_below(self.layers());
        let SavedFeatures { rows, pooled } = saved;
        match (&self.features, pooled) {
            (Features::Norm(norm), _) => norm.backward(&rows, &mut grad, gradients)?,
            (Features::Pool { dense, tanh, .. }, Some(Pooled { values, trace, kept })) => {
                kept.iter().for_each(|kept| kept.apply(&mut grad));
                let slope = |y: f32| match tanh {
                    true => 1.0 - y * y,
                    false => f32::from(u8::from(y > 0.0)),
                };
                grad.iter_mut().zip(&*values).for_each(|(g, y)| *g *= slope(*y));
                let mut to_rows = Buffer::new(rows.len());
                let into = below.then_some((&mut to_rows[..], Write::Over));
                let x = Input::of(&rows, dense.inputs());
                let g = Input::of(&grad, dense.outputs());
                dense.backward(&x, &g, trace.as_ref(), into, gradients)?;
                drop(g);
                grad = to_rows;
            }
            _ => {}
        }
        Ok(below.then_some(grad))
    }

    /// The output layer.
    ///
    /// # Errors
    /// When the model has no head.
    pub(crate) fn output(&self) -> Result<&Linear> {
        self.output.as_ref().context("the model has no head")
    }
}

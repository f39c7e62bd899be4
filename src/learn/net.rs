//! The forward pass, block by block.

use std::ops::Range;
use std::sync::Arc;

use anyhow::{Result, bail};
use candle_core::Tensor;

use super::batch::Packed;
use super::config::{Family, ModelConfig};
use super::layout::{EncoderNames, WORD, output_embedding};
use super::linear::{Dropout, Linear, Mode, Parameters};
use super::ops::{
    Attention, RopeTable, add, attention, gelu, layer_norm, rms_norm, rope, select_rows, swiglu,
};

/// What the layers share in one pass.
pub(crate) struct Sequences {
    starts: Arc<[usize]>,
    hidden: Arc<[Range<usize>]>,
    rope: Option<RopeTable>,
}

#[derive(Debug)]
struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    fn new(p: &Parameters, module: &str, eps: f64) -> Result<Self> {
        let (weight, bias) = (format!("{module}.weight"), format!("{module}.bias"));
        Ok(Self { weight: p.tensor(&weight)?, bias: p.tensor(&bias)?, eps })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(layer_norm(x, &self.weight, &self.bias, self.eps)?)
    }
}

#[derive(Debug)]
struct RmsNorm {
    weight: Tensor,
    eps: f64,
}

impl RmsNorm {
    fn new(p: &Parameters, module: &str, eps: f64) -> Result<Self> {
        Ok(Self { weight: p.tensor(&format!("{module}.weight"))?, eps })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(rms_norm(x, &self.weight, self.eps)?)
    }
}

/// A model's blocks: embedding, layers, features, output.
#[derive(Debug)]
pub(crate) struct Net {
    heads: usize,
    kv_heads: usize,
    head: usize,
    rope: Vec<f32>,
    pad: Option<u32>,
    embeddings: Embeddings,
    layers: Vec<Layer>,
    features: Features,
    output: Option<Linear>,
}

#[derive(Debug)]
enum Embeddings {
    Encoder {
        word: Tensor,
        position: Tensor,
        token_type: Option<Tensor>,
        norm: LayerNorm,
        drop: Dropout,
    },
    Decoder {
        word: Tensor,
    },
}

#[derive(Debug)]
enum Layer {
    Encoder(Box<EncoderLayer>),
    Decoder(Box<DecoderLayer>),
}

/// Post-norm, as BERT.
#[derive(Debug)]
struct EncoderLayer {
    query: Linear,
    key: Linear,
    value: Linear,
    out: Linear,
    attention_drop: Dropout,
    /// After the attention's output layer; DistilBERT has none.
    out_drop: Option<Dropout>,
    attention_norm: LayerNorm,
    up: Linear,
    down: Linear,
    down_drop: Dropout,
    output_norm: LayerNorm,
}

/// Pre-norm, as Llama.
#[derive(Debug)]
struct DecoderLayer {
    input_norm: RmsNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    out: Linear,
    query_norm: Option<RmsNorm>,
    key_norm: Option<RmsNorm>,
    attention_drop: Dropout,
    window: Option<usize>,
    post_norm: RmsNorm,
    gate: Linear,
    up: Linear,
    down: Linear,
}

/// What lies between the last layer and the output layer.
#[derive(Debug)]
enum Features {
    Norm(RmsNorm),
    Pool { dense: Linear, tanh: bool, drop: Dropout },
    Bare,
}

impl Net {
    /// Builds a model out of its tensors.
    ///
    /// # Errors
    /// When a tensor is missing.
    pub(crate) fn new(c: &ModelConfig, p: &Parameters) -> Result<Self> {
        let net = |embeddings, layers, features, output| Self {
            heads: c.heads,
            kv_heads: c.kv_heads,
            head: c.head,
            rope: c.rope.clone(),
            pad: c.pad,
            embeddings,
            layers,
            features,
            output,
        };
        let prefix = c.family.prefix();
        if c.is_decoder() {
            let layers =
                (0..c.layers).map(|i| DecoderLayer::layer(c, p, i)).collect::<Result<_>>()?;
            return Ok(net(
                Embeddings::Decoder { word: p.tensor(WORD)? },
                layers,
                Features::Norm(RmsNorm::new(p, "model.norm", c.eps)?),
                Some(Linear::of(p, output_embedding(c))?),
            ));
        }
        let embedding =
            |name: &str| p.tensor(&format!("{prefix}.embeddings.{name}_embeddings.weight"));
        let embeddings = Embeddings::Encoder {
            word: embedding("word")?,
            position: embedding("position")?,
            token_type: (c.type_vocab > 0).then(|| embedding("token_type")).transpose()?,
            norm: LayerNorm::new(p, &format!("{prefix}.embeddings.LayerNorm"), c.eps)?,
            drop: p.dropout("embeddings", c.hidden_dropout),
        };
        let layers = (0..c.layers).map(|i| EncoderLayer::layer(c, p, i)).collect::<Result<_>>()?;
        if !p.held.contains_key("classifier.weight") {
            return Ok(net(embeddings, layers, Features::Bare, None));
        }
        let bert = c.family == Family::Bert;
        let features = Features::Pool {
            dense: p.linear(if bert { "bert.pooler.dense" } else { "pre_classifier" })?,
            tanh: bert,
            drop: p.dropout("classifier", c.classifier_dropout),
        };
        Ok(net(embeddings, layers, features, Some(p.linear("classifier")?)))
    }

    /// Number of layers.
    pub(crate) fn layers(&self) -> usize {
        self.layers.len()
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

    /// `[tokens, hidden]`.
    ///
    /// # Errors
    /// When an id is outside its table.
    pub(crate) fn embed(&self, batch: &Packed, mode: Mode) -> Result<Tensor> {
        let ids: Arc<[u32]> = batch.ids.as_slice().into();
        match &self.embeddings {
            Embeddings::Decoder { word } => Ok(select_rows(word, ids, self.pad)?),
            Embeddings::Encoder { word, position, token_type, norm, drop } => {
                let mut x = select_rows(word, ids, self.pad)?;
                x = add(&x, &select_rows(position, batch.positions.as_slice().into(), None)?)?;
                if let Some(kinds) = token_type {
                    x = add(&x, &select_rows(kinds, batch.types.as_slice().into(), None)?)?;
                }
                drop.forward(&norm.forward(&x)?, mode)
            }
        }
    }

    /// One layer: `[tokens, hidden]` to the same.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub(crate) fn layer(&self, i: usize, x: &Tensor, s: &Sequences, mode: Mode) -> Result<Tensor> {
        let shape = |drop: &Dropout, causal, window| Attention {
            heads: self.heads,
            kv_heads: self.kv_heads,
            head: self.head,
            causal,
            window,
            dropout: drop.mask(mode),
            starts: s.starts.clone(),
            hidden: s.hidden.clone(),
        };
        match self.layers.get(i) {
            Some(Layer::Encoder(l)) => l.forward(x, shape(&l.attention_drop, false, None), mode),
            Some(Layer::Decoder(l)) => {
                l.forward(x, shape(&l.attention_drop, true, l.window), s.rope.as_ref(), mode)
            }
            None => bail!("no layer {i}"),
        }
    }

    /// What the output layer reads, for chosen rows `[rows, hidden]` of the last layer.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub(crate) fn features(&self, rows: &Tensor, mode: Mode) -> Result<Tensor> {
        match &self.features {
            Features::Norm(norm) => norm.forward(rows),
            Features::Pool { dense, tanh, drop } => {
                let pooled = dense.forward(rows, mode)?;
                let pooled = if *tanh { pooled.tanh()? } else { pooled.relu()? };
                drop.forward(&pooled, mode)
            }
            Features::Bare => Ok(rows.clone()),
        }
    }

    /// Logits.
    ///
    /// # Errors
    /// When the model has no head.
    pub(crate) fn output(&self, features: &Tensor, mode: Mode) -> Result<Tensor> {
        match &self.output {
            Some(output) => output.forward(features, mode),
            None => bail!("the model has no head"),
        }
    }
}

impl EncoderLayer {
    fn layer(c: &ModelConfig, p: &Parameters, i: usize) -> Result<Layer> {
        let n = EncoderNames::new(c.family, i);
        let drop = |name: &str, rate| p.dropout(&format!("{i}/{name}"), rate);
        let bert = c.family == Family::Bert;
        Ok(Layer::Encoder(Box::new(Self {
            query: p.linear(&n.query)?,
            key: p.linear(&n.key)?,
            value: p.linear(&n.value)?,
            out: p.linear(&n.out)?,
            attention_drop: drop("attention", c.attention_dropout),
            out_drop: bert.then(|| drop("out", c.hidden_dropout)),
            attention_norm: LayerNorm::new(p, &n.attention_norm, c.eps)?,
            up: p.linear(&n.up)?,
            down: p.linear(&n.down)?,
            down_drop: drop("down", c.hidden_dropout),
            output_norm: LayerNorm::new(p, &n.output_norm, c.eps)?,
        })))
    }

    fn forward(&self, x: &Tensor, how: Attention, mode: Mode) -> Result<Tensor> {
        let q = self.query.forward(x, mode)?;
        let k = self.key.forward(x, mode)?;
        let v = self.value.forward(x, mode)?;
        let mut mixed = self.out.forward(&attention(&q, &k, &v, how)?, mode)?;
        if let Some(drop) = &self.out_drop {
            mixed = drop.forward(&mixed, mode)?;
        }
        let x = self.attention_norm.forward(&add(&mixed, x)?)?;
        let y = self.down.forward(&gelu(&self.up.forward(&x, mode)?)?, mode)?;
        self.output_norm.forward(&add(&self.down_drop.forward(&y, mode)?, &x)?)
    }
}

impl DecoderLayer {
    fn layer(c: &ModelConfig, p: &Parameters, i: usize) -> Result<Layer> {
        let at = |name: &str| format!("model.layers.{i}.{name}");
        let linear = |name: &str| p.linear(&at(name));
        let norm = |name: &str| RmsNorm::new(p, &at(name), c.eps);
        let qk = c.family == Family::Qwen3;
        Ok(Layer::Decoder(Box::new(Self {
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
        })))
    }

    fn forward(
        &self,
        x: &Tensor,
        how: Attention,
        table: Option<&RopeTable>,
        mode: Mode,
    ) -> Result<Tensor> {
        let h = self.input_norm.forward(x)?;
        let turned = |y: Tensor, norm: &Option<RmsNorm>| -> Result<Tensor> {
            let y = norm.as_ref().map_or(Ok(y.clone()), |n| n.forward(&y))?;
            Ok(table.map_or(Ok(y.clone()), |t| rope(&y, t))?)
        };
        let q = turned(self.query.forward(&h, mode)?, &self.query_norm)?;
        let k = turned(self.key.forward(&h, mode)?, &self.key_norm)?;
        let v = self.value.forward(&h, mode)?;
        let x = add(x, &self.out.forward(&attention(&q, &k, &v, how)?, mode)?)?;
        let h = self.post_norm.forward(&x)?;
        let h = swiglu(&self.gate.forward(&h, mode)?, &self.up.forward(&h, mode)?)?;
        Ok(add(&x, &self.down.forward(&h, mode)?)?)
    }
}

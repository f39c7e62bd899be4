//! Every tensor of a model: its name on the hub, its shape and what it is for.

use super::config::{Family, ModelConfig};
use super::setup::Task;

/// What a tensor is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// The weight of a linear layer, `[out, in]`.
    Linear,
    /// The output embedding, `[vocab, hidden]`: never quantized, never adapted.
    Output,
    /// `[rows, hidden]`.
    Embedding,
    /// The weight of a norm.
    Norm,
    /// The bias of a linear layer or a norm.
    Bias,
}

/// A tensor of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Parameter {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) role: Role,
    /// Of the classification head: trained along with an adapter, saved with it.
    pub(crate) head: bool,
    /// A base without it gets a fresh one.
    pub(crate) optional: bool,
}

/// The input embedding of a decoder.
pub(crate) const WORD: &str = "model.embed_tokens.weight";
const OUTPUT: &str = "lm_head.weight";

/// Names of an encoder layer's modules.
pub(crate) struct EncoderNames {
    pub(crate) query: String,
    pub(crate) key: String,
    pub(crate) value: String,
    pub(crate) out: String,
    pub(crate) attention_norm: String,
    pub(crate) up: String,
    pub(crate) down: String,
    pub(crate) output_norm: String,
}

impl EncoderNames {
    /// Those of one layer.
    pub(crate) fn new(family: Family, layer: usize) -> Self {
        let (at, names) = match family {
            Family::Bert => (
                format!("bert.encoder.layer.{layer}."),
                [
                    "attention.self.query",
                    "attention.self.key",
                    "attention.self.value",
                    "attention.output.dense",
                    "attention.output.LayerNorm",
                    "intermediate.dense",
                    "output.dense",
                    "output.LayerNorm",
                ],
            ),
            _ => (
                format!("distilbert.transformer.layer.{layer}."),
                [
                    "attention.q_lin",
                    "attention.k_lin",
                    "attention.v_lin",
                    "attention.out_lin",
                    "sa_layer_norm",
                    "ffn.lin1",
                    "ffn.lin2",
                    "output_layer_norm",
                ],
            ),
        };
        let [query, key, value, out, attention_norm, up, down, output_norm] =
            names.map(|n| format!("{at}{n}"));
        Self { query, key, value, out, attention_norm, up, down, output_norm }
    }
}

#[derive(Default)]
struct List {
    all: Vec<Parameter>,
    head: bool,
    optional: bool,
}

impl List {
    fn push(&mut self, name: String, shape: &[usize], role: Role) {
        let (head, optional) = (self.head, self.optional);
        self.all.push(Parameter { name, shape: shape.to_vec(), role, head, optional });
    }

    fn linear(&mut self, module: &str, (inputs, outputs): (usize, usize), bias: bool) {
        self.push(format!("{module}.weight"), &[outputs, inputs], Role::Linear);
        if bias {
            self.push(format!("{module}.bias"), &[outputs], Role::Bias);
        }
    }

    fn layer_norm(&mut self, module: &str, size: usize) {
        self.push(format!("{module}.weight"), &[size], Role::Norm);
        self.push(format!("{module}.bias"), &[size], Role::Bias);
    }

    fn rms_norm(&mut self, module: &str, size: usize) {
        self.push(format!("{module}.weight"), &[size], Role::Norm);
    }
}

/// The output embedding of a decoder: the input embedding where they are tied.
pub(crate) fn output_embedding(config: &ModelConfig) -> &'static str {
    if config.tied { WORD } else { OUTPUT }
}

/// Every tensor of a model with the head of a task, in the order of the forward pass. `None`: the
/// bare encoder, or the language model of a decoder. A tied output embedding is not listed.
pub(crate) fn parameters(config: &ModelConfig, task: Option<&Task>) -> Vec<Parameter> {
    let mut list = List::default();
    match config.is_decoder() {
        true => decoder(config, &mut list),
        false => encoder(config, task, &mut list),
    }
    list.all
}

fn encoder(c: &ModelConfig, task: Option<&Task>, list: &mut List) {
    let (d, prefix) = (c.hidden, c.family.prefix());
    let mut embeddings = vec![("word", c.vocab), ("position", c.positions)];
    if c.type_vocab > 0 {
        embeddings.push(("token_type", c.type_vocab));
    }
    for (name, rows) in embeddings {
        let name = format!("{prefix}.embeddings.{name}_embeddings.weight");
        list.push(name, &[rows, d], Role::Embedding);
    }
    list.layer_norm(&format!("{prefix}.embeddings.LayerNorm"), d);
    for i in 0..c.layers {
        let names = EncoderNames::new(c.family, i);
        for name in [&names.query, &names.key, &names.value, &names.out] {
            list.linear(name, (d, d), true);
        }
        list.layer_norm(&names.attention_norm, d);
        list.linear(&names.up, (d, c.intermediate), true);
        list.linear(&names.down, (c.intermediate, d), true);
        list.layer_norm(&names.output_norm, d);
    }
    list.optional = true;
    if c.family == Family::Bert {
        list.linear("bert.pooler.dense", (d, d), true);
    }
    if let Some(Task::SequenceClassification { classes }) = task {
        list.head = true;
        if c.family == Family::DistilBert {
            list.linear("pre_classifier", (d, d), true);
        }
        list.linear("classifier", (d, *classes), true);
    }
}

fn decoder(c: &ModelConfig, list: &mut List) {
    let (d, wide, narrow) = (c.hidden, c.heads * c.head, c.kv_heads * c.head);
    list.push(WORD.to_owned(), &[c.vocab, d], Role::Embedding);
    for i in 0..c.layers {
        let at = |name: &str| format!("model.layers.{i}.{name}");
        list.rms_norm(&at("input_layernorm"), d);
        list.linear(&at("self_attn.q_proj"), (d, wide), c.qkv_bias);
        list.linear(&at("self_attn.k_proj"), (d, narrow), c.qkv_bias);
        list.linear(&at("self_attn.v_proj"), (d, narrow), c.qkv_bias);
        list.linear(&at("self_attn.o_proj"), (wide, d), c.out_bias);
        if c.family == Family::Qwen3 {
            list.rms_norm(&at("self_attn.q_norm"), c.head);
            list.rms_norm(&at("self_attn.k_norm"), c.head);
        }
        list.rms_norm(&at("post_attention_layernorm"), d);
        list.linear(&at("mlp.gate_proj"), (d, c.intermediate), c.mlp_bias);
        list.linear(&at("mlp.up_proj"), (d, c.intermediate), c.mlp_bias);
        list.linear(&at("mlp.down_proj"), (c.intermediate, d), c.mlp_bias);
    }
    list.rms_norm("model.norm", d);
    if !c.tied {
        list.push(OUTPUT.to_owned(), &[c.vocab, d], Role::Output);
    }
}

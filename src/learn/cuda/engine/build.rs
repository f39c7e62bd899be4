//! From a model's tensors to its layers on the GPU.

use std::collections::BTreeMap;

use anyhow::Result;
use candle_core::Var;

use super::{Embeddings, Head, Layers, Table};
use crate::learn::config::{Family, ModelConfig};
use crate::learn::cuda::attention::Attention;
use crate::learn::cuda::decoder::DecoderLayer;
use crate::learn::cuda::encoder::EncoderLayer;
use crate::learn::cuda::pass::Norm;
use crate::learn::cuda::projection::{Builder, trained_name};
use crate::learn::layout::{EncoderNames, WORD, output_embedding};
use crate::learn::load::PEFT;

/// Where the parameters lie: those of one product side by side, then the rest by name.
pub(super) fn order(config: &ModelConfig, parameters: &BTreeMap<String, Var>) -> Vec<String> {
    let mut order = Vec::with_capacity(parameters.len());
    for group in groups(config).iter().flatten() {
        for matrix in ["A", "B"] {
            let names = group.iter().map(|m| format!("{PEFT}{m}.lora_{matrix}.weight"));
            order.extend(names.filter(|n| parameters.contains_key(n)));
        }
    }
    let rest: Vec<_> = parameters.keys().filter(|n| !order.contains(n)).cloned().collect();
    order.extend(rest);
    order
}

/// The linear modules of each layer, by the input that they share: queries, keys and values; the
/// attention's output; up (and gate); down.
fn groups(c: &ModelConfig) -> Vec<[Vec<String>; 4]> {
    let layer = |i: usize| {
        if c.is_decoder() {
            let at = |name: &str| format!("model.layers.{i}.{name}");
            let attention = |n: &str| at(&format!("self_attn.{n}_proj"));
            let mlp = |n: &str| at(&format!("mlp.{n}_proj"));
            return [
                vec![attention("q"), attention("k"), attention("v")],
                vec![attention("o")],
                vec![mlp("gate"), mlp("up")],
                vec![mlp("down")],
            ];
        }
        let n = EncoderNames::new(c.family, i);
        [vec![n.query, n.key, n.value], vec![n.out], vec![n.up], vec![n.down]]
    };
    (0..c.layers).map(layer).collect()
}

impl Builder<'_> {
    pub(super) fn norm(&mut self, module: &str, bias: bool, eps: f64) -> Result<Norm> {
        let gradient = |name: &str| {
            trained_name(self.trained, name).map(|n| self.trained.gradient(&n)).transpose()
        };
        let (weight, bias_name) = (format!("{module}.weight"), format!("{module}.bias"));
        let weight_gradient = gradient(&weight)?;
        let bias_gradient = if bias { gradient(&bias_name)? } else { None };
        Ok(Norm {
            weight: self.wide(&weight)?,
            bias: if bias { self.wide(&bias_name)? } else { 0 },
            weight_gradient,
            bias_gradient,
            eps,
        })
    }

    pub(super) fn table(&mut self, name: &str) -> Result<Table> {
        let own = trained_name(self.trained, name);
        let gradient = own.map(|n| self.trained.gradient(&n)).transpose()?;
        Ok(Table { at: self.narrow(name)?, gradient })
    }

    pub(super) fn layers(&mut self, c: &ModelConfig) -> Result<Layers> {
        let shape = (c.heads, c.kv_heads, c.head);
        let groups = groups(c);
        if c.is_decoder() {
            let mut layers = Vec::new();
            for (i, [qkv, out, gate_up, down]) in groups.iter().enumerate() {
                let at = |name: &str| format!("model.layers.{i}.{name}");
                let drop = self.parameters.dropout(&format!("{i}/attention"), c.attention_dropout);
                let window = c.windows.get(i).copied().flatten();
                let head_norms = if c.family == Family::Qwen3 {
                    let query = self.norm(&at("self_attn.q_norm"), false, c.eps)?;
                    Some((query, self.norm(&at("self_attn.k_norm"), false, c.eps)?))
                } else {
                    None
                };
                layers.push(DecoderLayer {
                    input_norm: self.norm(&at("input_layernorm"), false, c.eps)?,
                    qkv: self.projection(qkv)?,
                    head_norms,
                    attention: Attention::new(self.device, shape, true, window, drop)?,
                    out: self.projection(out)?,
                    post_norm: self.norm(&at("post_attention_layernorm"), false, c.eps)?,
                    gate_up: self.projection(gate_up)?,
                    down: self.projection(down)?,
                });
            }
            return Ok(Layers::Decoder(layers));
        }
        let mut layers = Vec::new();
        for (i, [qkv, out, up, down]) in groups.iter().enumerate() {
            let names = EncoderNames::new(c.family, i);
            let drop = |name: &str, rate| self.parameters.dropout(&format!("{i}/{name}"), rate);
            let (attention_drop, down_drop) =
                (drop("attention", c.attention_dropout), drop("down", c.hidden_dropout));
            let out_drop = (c.family == Family::Bert).then(|| drop("out", c.hidden_dropout));
            layers.push(EncoderLayer {
                qkv: self.projection(qkv)?,
                attention: Attention::new(self.device, shape, false, None, attention_drop)?,
                out: self.projection(out)?,
                out_drop,
                attention_norm: self.norm(&names.attention_norm, true, c.eps)?,
                up: self.projection(up)?,
                down: self.projection(down)?,
                down_drop,
                output_norm: self.norm(&names.output_norm, true, c.eps)?,
            });
        }
        Ok(Layers::Encoder(layers))
    }

    /// With `away` a table that is neither trained nor the output's stays on the host: the GPU
    /// reads a few of its rows.
    pub(super) fn embeddings(&mut self, c: &ModelConfig, away: bool) -> Result<Embeddings> {
        if c.is_decoder() {
            let away = away && !c.tied && trained_name(self.trained, WORD).is_none();
            let there = if away { self.narrow_on_host(WORD)? } else { None };
            let words = match there {
                Some(at) => Table { at, gradient: None },
                None => self.table(WORD)?,
            };
            return Ok(Embeddings { words, encoder: None });
        }
        let at = |name: &str| format!("{}.embeddings.{name}", c.family.prefix());
        let table = |name: &str| at(&format!("{name}_embeddings.weight"));
        let words = self.table(&table("word"))?;
        let positions = self.table(&table("position"))?;
        let types = (c.type_vocab > 0).then(|| self.table(&table("token_type"))).transpose()?;
        let norm = self.norm(&at("LayerNorm"), true, c.eps)?;
        let drop = self.parameters.dropout("embeddings", c.hidden_dropout);
        Ok(Embeddings { words, encoder: Some((positions, types, norm, drop)) })
    }

    pub(super) fn head(&mut self, c: &ModelConfig, words: Table) -> Result<Head> {
        if c.is_decoder() {
            let norm = self.norm("model.norm", false, c.eps)?;
            let table = if c.tied { words } else { self.table(output_embedding(c))? };
            return Ok(Head::Decoder { norm, table });
        }
        if !self.parameters.held.contains_key("classifier.weight") {
            return Ok(Head::Bare);
        }
        let bert = c.family == Family::Bert;
        let dense = if bert { "bert.pooler.dense" } else { "pre_classifier" };
        Ok(Head::Classes {
            dense: Box::new(self.projection(&[dense.to_owned()])?),
            tanh: bert,
            drop: self.parameters.dropout("classifier", c.classifier_dropout),
            classifier: Box::new(self.projection(&["classifier".to_owned()])?),
        })
    }
}

//! Text from a causal model, token by token, with candle-transformers' sampler.

use anyhow::{Result, ensure};
use candle_core::{IndexOp, Tensor};
use candle_transformers::generation::{LogitsProcessor, Sampling};

use super::batch::{Batch, Labels};
use super::model::Model;

/// How the next token is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Generation<'a> {
    /// Tokens at most.
    pub max_new_tokens: usize,
    /// 0 takes the likeliest token; above 0 logits are divided by it and a token is drawn.
    pub temperature: f64,
    /// Draws only from the likeliest tokens that hold this much probability together.
    pub top_p: Option<f64>,
    /// Each ends the text, and is not part of it.
    pub ends: &'a [u32],
    /// Seeds the draws.
    pub seed: u64,
}

/// Continues a prompt. Every token runs the whole text through the model again, so this is for
/// samples of a report, not for serving.
///
/// # Errors
/// When the prompt is empty or an id is outside the vocabulary.
pub fn generate(model: &Model, prompt: &[u32], how: &Generation<'_>) -> Result<Vec<u32>> {
    ensure!(!prompt.is_empty(), "there is no prompt to continue");
    let sampling = match (how.temperature > 0.0, how.top_p) {
        (false, _) => Sampling::ArgMax,
        (true, None) => Sampling::All { temperature: how.temperature },
        (true, Some(p)) => Sampling::TopP { p, temperature: how.temperature },
    };
    let mut sampler = LogitsProcessor::from_sampling(how.seed, sampling);
    let mut ids = prompt.to_vec();
    let room = model.config().max_positions().saturating_sub(prompt.len());
    for _ in 0..how.max_new_tokens.min(room) {
        let next = sampler.sample(&next_logits(model, &ids)?)?;
        if how.ends.contains(&next) {
            break;
        }
        ids.push(next);
    }
    Ok(ids.split_off(prompt.len()))
}

fn next_logits(model: &Model, ids: &[u32]) -> Result<Tensor> {
    let n = ids.len();
    let batch = Batch {
        input_ids: ids.to_vec(),
        token_type_ids: None,
        lengths: vec![n],
        size: 1,
        length: n,
        labels: Labels::None,
    };
    Ok(model.next_logits(&batch)?.i(0)?)
}

//! Initial values: of models from nothing, of heads, of adapters.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use candle_core::Tensor;
use rayon::prelude::*;

use super::config::ModelConfig;
use super::files;
use super::layout::{Parameter, Role, parameters};
use super::ops::tensor;
use super::random::Stream;
use super::setup::Task;

fn fill(n: usize, value: impl Fn(u64) -> f64 + Sync) -> Vec<f32> {
    (0..n).into_par_iter().with_min_len(4096).map(|i| value(i as u64) as f32).collect()
}

/// A tensor as transformers initialises it: normal(0, `range`), norms 1, biases 0.
///
/// # Errors
/// When it cannot be allocated.
pub(super) fn fresh(parameter: &Parameter, range: f64, seed: u64) -> Result<Tensor> {
    let n = parameter.shape.iter().product();
    let data = match parameter.role {
        Role::Norm => vec![1.0; n],
        Role::Bias => vec![0.0; n],
        _ => {
            let stream = Stream::new(seed, &format!("init/{}", parameter.name));
            fill(n, |i| range * stream.normal(i))
        }
    };
    Ok(tensor(data, parameter.shape.as_slice())?)
}

/// A fresh adapter as PEFT initialises it: A uniform in ±1/sqrt(in) (Kaiming with a = sqrt 5), B
/// zero, so that the adapted layer begins as the base's.
///
/// # Errors
/// When it cannot be allocated.
pub(super) fn adapter(
    module: &str,
    r: usize,
    (outputs, inputs): (usize, usize),
    seed: u64,
) -> Result<(Tensor, Tensor)> {
    let stream = Stream::new(seed, &format!("init/{module}.lora_A"));
    let bound = 1.0 / (inputs as f64).sqrt();
    let a = fill(r * inputs, |i| bound * (2.0 * stream.uniform(i) - 1.0));
    Ok((tensor(a, (r, inputs))?, tensor(vec![0.0; outputs * r], (outputs, r))?))
}

/// Writes a model's weights from nothing, in f32 under the hub's names: normal(0,
/// `initializer_range`), norms 1, biases 0. `None`: the bare encoder, or the language model of a
/// decoder.
///
/// # Errors
/// When the model cannot have the task's head, or the file cannot be written.
pub fn random_weights(
    config: &ModelConfig,
    task: Option<&Task>,
    seed: u64,
    out: &Path,
) -> Result<()> {
    if let Some(task) = task {
        config.check_task(task)?;
    }
    let tensors: Result<BTreeMap<String, Tensor>> = parameters(config, task)
        .into_iter()
        .map(|p| fresh(&p, config.initializer_range, seed).map(|t| (p.name, t)))
        .collect();
    files::write(out, tensors?)
}

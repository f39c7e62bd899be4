//! The decoder families against candle-transformers' own implementations, on random weights.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models as theirs;
use flow::learn::{Method, Model, ModelConfig, ModelFiles, Task, random_weights};
use serde_json::{Value, json};

use super::{batch, files, lora, numbers, relative, setup};

fn tiny(extra: Value) -> Value {
    let mut config = json!({
        "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 101,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "initializer_range": 0.2,
        "tie_word_embeddings": false, "rope_theta": 10000.0, "hidden_act": "silu",
    });
    for (key, value) in extra.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

/// A model from nothing, with biases that are not zero.
fn model(dir: &Path, config: &Value) -> ModelFiles {
    let path = dir.join("config.json");
    std::fs::write(&path, config.to_string()).unwrap();
    let shape = ModelConfig::read(&path).unwrap();
    let weights = dir.join("model.safetensors");
    random_weights(&shape, None, 11, &weights).unwrap();
    let mut tensors = candle_core::safetensors::load(&weights, &Device::Cpu).unwrap();
    for (name, tensor) in &mut tensors {
        if name.ends_with("bias") || name.ends_with("norm.weight") {
            let n = tensor.elem_count();
            let wave = (0..n).map(|i| (i as f32 * 0.7).sin() * 0.3).collect::<Vec<_>>();
            let wave = Tensor::from_vec(wave, tensor.shape(), &Device::Cpu).unwrap();
            *tensor = (&*tensor + wave).unwrap();
        }
    }
    candle_core::safetensors::save(&tensors, &weights).unwrap();
    files(path, weights)
}

const IDS: [u32; 13] = [1, 5, 100, 3, 3, 77, 20, 9, 14, 15, 92, 65, 35];

/// Holds our logits of each prefix's last token against those of `run` on the prefix.
fn check(config: &Value, mut run: impl FnMut(&Path, VarBuilder<'_>, &Tensor) -> Tensor) {
    let dir = tempfile::tempdir().unwrap();
    let files = model(dir.path(), config);
    let weights = dir.path().join("model.safetensors");
    let setup = setup(Task::CausalLm, Method::Lora, Some(lora(&["q_proj", "down_proj"])));
    let ours = Model::load(&files, &setup).unwrap();
    compare(&ours, &weights, &mut run);
    // And once more when an adapter that does something is merged into it.
    for (name, var) in ours.trainable() {
        if name.contains("lora_B") {
            let n = var.elem_count();
            let data = (0..n).map(|i| (i as f32).sin() * 0.1).collect::<Vec<_>>();
            let data = Tensor::from_vec(data, var.shape(), var.device()).unwrap();
            var.set(&data).unwrap();
        }
    }
    let out = tempfile::tempdir().unwrap();
    ours.merge(flow::learn::MergeBase::Dequantized, out.path(), &[]).unwrap();
    compare(&ours, &out.path().join("model.safetensors"), &mut run);
}

fn compare(
    ours: &Model,
    weights: &Path,
    run: &mut impl FnMut(&Path, VarBuilder<'_>, &Tensor) -> Tensor,
) {
    let rows = batch(&[&IDS, &IDS[..4]]);
    let logits = numbers(&ours.logits(&rows).unwrap());
    let next = numbers(&ours.next_logits(&rows).unwrap());
    assert!(relative(&next[..101], &logits[12 * 101..13 * 101]) < 1e-5);
    assert!(relative(&next[101..], &logits[16 * 101..17 * 101]) < 1e-5);
    for n in [1, 6, IDS.len()] {
        let tensors = candle_core::safetensors::load(weights, &Device::Cpu).unwrap();
        let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
        let ids = Tensor::new(&IDS[..n], &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        let expected = numbers(&run(weights, vb, &ids));
        let found = &logits[(n - 1) * 101..n * 101];
        let error = relative(found, &expected[expected.len() - 101..]);
        assert!(error < 1e-4, "{n} tokens: {error}");
    }
}

fn llama(config: &Value) {
    let parsed: theirs::llama::LlamaConfig = serde_json::from_value(config.clone()).unwrap();
    check(config, |_, vb, ids| {
        let config = parsed.clone().into_config(false);
        let mut cache =
            theirs::llama::Cache::new(false, DType::F32, &config, &Device::Cpu).unwrap();
        let model = theirs::llama::Llama::load(vb, &config).unwrap();
        model.forward(ids, 0, &mut cache).unwrap()
    });
}

#[test]
fn llama_plain() {
    llama(&tiny(json!({ "model_type": "llama" })));
}

#[test]
fn llama_3_rope() {
    let scaling = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    });
    llama(&tiny(json!({
        "model_type": "llama", "rope_scaling": scaling, "tie_word_embeddings": true,
    })));
}

#[test]
fn mistral() {
    for window in [Value::Null, json!(4)] {
        let config = tiny(json!({ "model_type": "mistral", "sliding_window": window }));
        let mut parsed = theirs::mistral::Config::config_7b_v0_1(false);
        parsed.vocab_size = 101;
        parsed.hidden_size = 64;
        parsed.intermediate_size = 96;
        parsed.num_hidden_layers = 3;
        parsed.num_attention_heads = 4;
        parsed.head_dim = None;
        parsed.num_key_value_heads = 2;
        parsed.max_position_embeddings = 64;
        // transformers' window counts the token itself, candle's does not.
        parsed.sliding_window = window.as_u64().map(|w| w as usize - 1);
        check(&config, |_, vb, ids| {
            let mut model = theirs::mistral::Model::new(&parsed, vb).unwrap();
            model.forward(ids, 0).unwrap()
        });
    }
}

#[test]
fn qwen2() {
    let config = tiny(json!({
        "model_type": "qwen2", "sliding_window": 64, "max_window_layers": 3,
        "use_sliding_window": false, "rms_norm_eps": 1e-6,
    }));
    let parsed: theirs::qwen2::Config = serde_json::from_value(config.clone()).unwrap();
    check(&config, |_, vb, ids| {
        let mut model = theirs::qwen2::ModelForCausalLM::new(&parsed, vb).unwrap();
        model.forward(ids, 0).unwrap()
    });
}

#[test]
fn qwen3() {
    let config = tiny(json!({
        "model_type": "qwen3", "head_dim": 24, "attention_bias": false,
        "max_window_layers": 3, "use_sliding_window": false, "sliding_window": null,
    }));
    let parsed: theirs::qwen3::Config = serde_json::from_value(config.clone()).unwrap();
    check(&config, |_, vb, ids| {
        let mut model = theirs::qwen3::ModelForCausalLM::new(&parsed, vb).unwrap();
        model.forward(ids, 0).unwrap()
    });
}

//! The trainer, and the kinds around models.

#![allow(clippy::unwrap_used, reason = "a test stops where something is wrong")]

mod kinds; // train, evaluate, select, merge, benchmark, compare through the store
mod learning; // the loop on tiny random models
mod threads; // the same bytes on any number of threads

use std::path::Path;

use flow::learn::random::Stream;
use flow::learn::{IGNORE, ModelConfig, ModelFiles, Row, random_weights};

/// Token ids of the tests: below 8 stands for something, the rest are words.
const VOCABULARY: u32 = 40;
const EOS: u32 = 2;
/// The answers of the two classes.
const ANSWERS: [u32; 2] = [6, 7];

fn encoder() -> serde_json::Value {
    serde_json::json!({
        "architectures": ["DistilBertModel"],
        "model_type": "distilbert",
        "vocab_size": VOCABULARY,
        "dim": 32,
        "hidden_dim": 64,
        "n_layers": 2,
        "n_heads": 4,
        "max_position_embeddings": 32,
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "seq_classif_dropout": 0.2,
        "initializer_range": 0.1,
    })
}

fn decoder() -> serde_json::Value {
    serde_json::json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "initializer_range": 0.1,
        "tie_word_embeddings": true,
    })
}

/// A random model in a folder.
fn model(dir: &Path, config: &serde_json::Value) -> ModelFiles {
    let path = dir.join("config.json");
    std::fs::write(&path, config.to_string()).unwrap();
    let weights = dir.join("model.safetensors");
    random_weights(&ModelConfig::read(&path).unwrap(), None, 1, &weights).unwrap();
    ModelFiles { config: path, weights: vec![("model.safetensors".into(), weights)] }
}

/// Rows of two classes: most words of a row come from the half of the vocabulary that belongs to
/// its class. As prompts they are followed by the class's answer.
fn rows(n: usize, seed: u64, causal: bool) -> Vec<Row> {
    let stream = Stream::new(seed, "rows");
    let row = |i: usize| {
        let s = stream.at(i as u64);
        let class = (i % 2) as u32;
        let words = 6 + s.below(0, 6);
        let mut ids: Vec<u32> = (1..=words)
            .map(|k| {
                let own = s.uniform(3 * k) < 0.8;
                let half = if own { class } else { 1 - class };
                8 + 16 * half + s.below(3 * k + 1, 16) as u32
            })
            .collect();
        let mut row = Row { class: Some(class), ..Row::default() };
        if causal {
            let mut labels = vec![IGNORE; ids.len()];
            ids.extend([ANSWERS[class as usize], EOS]);
            labels.extend([i64::from(ANSWERS[class as usize]), i64::from(EOS)]);
            row.labels = Some(labels);
        }
        Row { ids, ..row }
    };
    (0..n).map(row).collect()
}

//! Dropout, frozen weights, counts, threads, and what is refused.

use std::path::Path;

use flow::learn::{
    Batch, Labels, LoraConfig, Method, Model, ModelConfig, ModelFiles, Quantization, Setup,
    TargetModules, Task, random_weights,
};
use serde_json::{Value, json};

use super::{batch, classes, files, lora, numbers, setup};

fn distilbert() -> Value {
    json!({
        "model_type": "distilbert", "dim": 48, "hidden_dim": 64, "n_heads": 4, "n_layers": 2,
        "vocab_size": 60, "max_position_embeddings": 12, "dropout": 0.1,
        "attention_dropout": 0.1, "seq_classif_dropout": 0.2,
    })
}

fn bare(dir: &Path, config: &Value) -> ModelFiles {
    let path = dir.join("config.json");
    std::fs::write(&path, config.to_string()).unwrap();
    let weights = dir.join("model.safetensors");
    random_weights(&ModelConfig::read(&path).unwrap(), None, 5, &weights).unwrap();
    files(path, weights)
}

fn labelled() -> Batch {
    let mut batch = batch(&[&[1, 5, 9, 30], &[4, 4], &[7]]);
    batch.labels = Labels::Classes(vec![0, 1, 1]);
    batch
}

fn adapter() -> LoraConfig {
    LoraConfig { dropout: 0.1, ..lora(&["q_lin", "v_lin"]) }
}

fn flat(gradients: &std::collections::BTreeMap<String, candle_core::Tensor>) -> Vec<u32> {
    gradients.values().flat_map(numbers).map(f32::to_bits).collect()
}

/// Dropout depends on the step and the seed alone, and evaluation has none.
#[test]
fn dropout_is_a_function_of_seed_and_step() {
    let dir = tempfile::tempdir().unwrap();
    let files = bare(dir.path(), &distilbert());
    let with = |seed| Setup { seed, ..setup(classes(2), Method::Lora, Some(adapter())) };
    let model = Model::load(&files, &with(1)).unwrap();
    let batch = labelled();
    let at = |model: &Model, step| flat(&model.gradients(&batch, step, 3.0).unwrap().1);
    assert_eq!(at(&model, 4), at(&model, 4));
    assert_ne!(at(&model, 4), at(&model, 5));
    assert_eq!(at(&model, 4), at(&Model::load(&files, &with(1)).unwrap(), 4));
    assert_ne!(at(&model, 4), at(&Model::load(&files, &with(2)).unwrap(), 4));
    let logits = numbers(&model.logits(&batch).unwrap());
    assert_eq!(logits, numbers(&model.logits(&batch).unwrap()));

    let still = LoraConfig { dropout: 0.0, ..adapter() };
    let still = Setup { dropout: Some(0.0), lora: Some(still), ..with(1) };
    let still = Model::load(&files, &still).unwrap();
    assert_eq!(at(&still, 4), at(&still, 5));
    let (loss, _) = still.gradients(&batch, 0, 3.0).unwrap();
    let log_probs = still.target_log_probs(&batch).unwrap();
    let sum: f64 = log_probs.iter().map(|(p, _)| p).sum();
    assert!((loss + sum).abs() < 1e-5 && log_probs.iter().all(|(_, n)| *n == 1));
}

/// The same bits on one thread and on three.
#[test]
fn threads_do_not_matter() {
    let dir = tempfile::tempdir().unwrap();
    let files = bare(dir.path(), &distilbert());
    let model = Model::load(&files, &setup(classes(2), Method::Full, None)).unwrap();
    let rows: Vec<Vec<u32>> = (0..40).map(|i| (0..1 + i % 12).map(|j| i + j).collect()).collect();
    let mut many = batch(&rows.iter().map(Vec::as_slice).collect::<Vec<_>>());
    many.labels = Labels::Classes((0..40).map(|i| i % 2).collect());
    let on = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let (loss, gradients) = model.gradients(&many, 0, 40.0).unwrap();
            (loss.to_bits(), flat(&gradients))
        })
    };
    assert_eq!(on(1), on(3));
}

/// As PEFT counts: the head is there twice.
#[test]
fn counts_are_those_of_peft() {
    let config = json!({
        "model_type": "distilbert", "dim": 768, "hidden_dim": 3072, "n_heads": 12, "n_layers": 1,
        "vocab_size": 10, "max_position_embeddings": 16,
    });
    let dir = tempfile::tempdir().unwrap();
    let files = bare(dir.path(), &config);
    let setup = setup(classes(2), Method::Lora, Some(lora(&["q_lin", "v_lin"])));
    let model = Model::load(&files, &setup).unwrap();
    let head = 768 * 768 + 768 + 2 * 768 + 2;
    let trainable = 2 * 2 * 8 * 768 + head;
    let body =
        (10 + 16) * 768 + 2 * 768 + 4 * (768 * 768 + 768) + 4 * 768 + 2 * 768 * 3072 + 3072 + 768;
    assert_eq!(model.counts().trainable, trainable);
    assert_eq!(model.counts().all, body + head + trainable);
    let packed =
        Setup { method: Method::Qlora, quantization: Quantization::Nf4 { double: false }, ..setup };
    assert_eq!(Model::load(&files, &packed).unwrap().counts(), model.counts());
}

fn refused(error: anyhow::Error, words: &[&str]) {
    let text = format!("{error:#} {}", flow::source::advice(&error).join(" "));
    for word in words {
        assert!(text.contains(word), "no `{word}` in: {text}");
    }
}

#[test]
fn bad_settings_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let files = bare(dir.path(), &distilbert());
    let load = |setup: Setup| Model::load(&files, &setup).unwrap_err();
    let with = |lora| setup(classes(2), Method::Lora, Some(lora));
    let wrong = lora(&["q_lim"]);
    refused(load(with(wrong)), &["`q_lim`", "did you mean `q_lin`", "`out_lin`", "all-linear"]);
    // Heads are trained whole.
    refused(load(with(lora(&["classifier"]))), &["no linear layer `classifier`"]);
    refused(load(with(LoraConfig { r: 0, ..adapter() })), &["rank"]);
    refused(load(with(LoraConfig { dropout: 1.0, ..adapter() })), &["dropout"]);
    refused(load(setup(classes(2), Method::Lora, None)), &["lora"]);
    refused(load(setup(classes(1), Method::Full, None)), &["at least 2"]);
    refused(load(setup(Task::CausalLm, Method::Full, None)), &["encoder"]);
    let full = setup(classes(2), Method::Full, None);
    refused(load(Setup { quantization: Quantization::Nf4 { double: true }, ..full }), &["qlora"]);

    let parse = |text: &str| ModelConfig::parse(text).unwrap_err();
    refused(parse(r#"{"model_type": "lama"}"#), &["`lama`", "did you mean `llama`", "`qwen3`"]);
    refused(parse("{}"), &["model_type", "`distilbert`"]);
    refused(parse(r#"{"model_type": "llama"}"#), &["`hidden_size` is missing"]);
    let config = ModelConfig::read(&files.config).unwrap();
    assert_eq!((config.vocab_size(), config.max_positions()), (60, 12));
    let all = config.check_targets(&classes(2), &TargetModules::AllLinear).unwrap();
    assert_eq!(all, config.module_names(&classes(2)));
    assert_eq!(all.len(), 12);
}

#[test]
fn bad_batches_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let files = bare(dir.path(), &distilbert());
    let model = Model::load(&files, &setup(classes(2), Method::Full, None)).unwrap();
    let refuse = |batch: &Batch, words: &[&str]| {
        refused(model.gradients(batch, 0, 1.0).unwrap_err(), words);
    };
    let long: Vec<u32> = (0..13).collect();
    refuse(&Batch { labels: Labels::Classes(vec![0]), ..batch(&[&long]) }, &["13", "12 positions"]);
    refuse(&Batch { labels: Labels::Classes(vec![0]), ..batch(&[&[60]]) }, &["60", "vocabulary"]);
    refuse(&Batch { labels: Labels::Classes(vec![2, 0, 0]), ..labelled() }, &["label 2"]);
    refuse(&Batch { labels: Labels::Classes(vec![0]), ..labelled() }, &["labels"]);
    refuse(&Batch { labels: Labels::None, ..labelled() }, &["no labels"]);
    refuse(&Batch { labels: Labels::Tokens(vec![0; 12]), ..labelled() }, &["classes"]);
    refuse(&Batch { lengths: vec![4, 2, 0], ..labelled() }, &["row 2"]);
    refuse(&Batch { token_type_ids: Some(vec![0]), ..labelled() }, &["token types"]);
}

#[test]
fn damaged_weights_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let files = bare(dir.path(), &distilbert());
    let path = &files.weights[0].1;
    let full = setup(classes(2), Method::Full, None);
    let whole = std::fs::read(path).unwrap();
    for damaged in [&whole[..whole.len() - 5], &whole[..20], &[][..], b"not tensors at all"] {
        std::fs::write(path, damaged).unwrap();
        refused(Model::load(&files, &full).unwrap_err(), &["model.safetensors", "damaged"]);
    }
    std::fs::write(path, &whole).unwrap();
    let mut other = distilbert();
    other["hidden_dim"] = json!(65);
    std::fs::write(&files.config, other.to_string()).unwrap();
    refused(Model::load(&files, &full).unwrap_err(), &["lin1.weight", "[64, 48]", "[65, 48]"]);
    other["n_layers"] = json!(3);
    std::fs::write(&files.config, other.to_string()).unwrap();
    refused(Model::load(&files, &full).unwrap_err(), &["lack", "layer.2."]);
    let none = ModelFiles { weights: vec![("pytorch_model.bin".into(), path.clone())], ..files };
    refused(Model::load(&none, &full).unwrap_err(), &["pytorch_model.bin", "safetensors"]);
}

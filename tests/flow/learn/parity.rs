//! Fifty steps of training, with the optimizer and the schedule that `train` uses, against PyTorch
//! (transformers, PEFT; AdamW, linear warm-up).

use std::collections::BTreeMap;

use candle_core::Tensor;
use flow::learn::{
    AdamW, AdamWConfig, Batch, Compute, Decays, Labels, LearningRate, Method, Model, Schedule,
    Setup, Task, global_norm,
};

use super::{classes, files, fixture, lora, numbers, numbers_by_name, read, relative, setup};

#[derive(Clone)]
pub(super) struct Case {
    pub(super) name: &'static str,
    pub(super) mode: &'static str,
    pub(super) task: Task,
    targets: &'static [&'static str],
}

/// The cases that there are references for.
pub(super) fn cases() -> Vec<Case> {
    let projections = &["q_proj", "k_proj", "v_proj", "o_proj"][..];
    [
        ("distilbert", "full", classes(2), &[][..]),
        ("distilbert", "lora", classes(2), &["q_lin", "v_lin"]),
        ("bert", "full", classes(2), &[]),
        ("bert", "lora", classes(2), &["query", "value"]),
        ("llama", "full", Task::CausalLm, &[]),
        ("llama", "lora", Task::CausalLm, projections),
    ]
    .map(|(name, mode, task, targets)| Case { name, mode, task, targets })
    .to_vec()
}

pub(super) fn model(case: &Case, compute: Compute) -> Model {
    let dir = |file: &str| fixture(&format!("{}/{file}", case.name));
    let files = files(dir("config.json"), dir("base.safetensors"));
    if case.mode == "full" {
        return Model::load(
            &files,
            &Setup { compute, ..setup(case.task.clone(), Method::Full, None) },
        )
        .unwrap();
    }
    let place = tempfile::tempdir().unwrap();
    let config = place.path().join("adapter_config.json");
    let settings = serde_json::json!({
        "peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": case.targets,
    });
    std::fs::write(&config, settings.to_string()).unwrap();
    let trained = [
        ("adapter_config.json".to_owned(), config),
        ("adapter_model.safetensors".to_owned(), dir("lora_initial.safetensors")),
    ];
    // The adapter's own settings count, not these.
    let other = lora(&["none"]);
    let setup = Setup { compute, ..setup(case.task.clone(), Method::Lora, Some(other)) };
    Model::load_trained(&files, &setup, &trained).unwrap()
}

pub(super) fn batches(case: &Case) -> Vec<Batch> {
    let all = read(&fixture(&format!("{}/batches.safetensors", case.name)));
    let (ids, lengths, labels) = (&all["input_ids"], &all["lengths"], &all["labels"]);
    let [steps, size, length] = ids.shape[..] else { panic!("{:?}", ids.shape) };
    (0..steps)
        .map(|step| {
            let n = size * length;
            let ids = &ids.data[step * n..][..n];
            let per = labels.data.len() / steps;
            let labels = &labels.data[step * per..][..per];
            Batch {
                input_ids: ids.iter().map(|x| *x as u32).collect(),
                token_type_ids: None,
                lengths: lengths.data[step * size..][..size].iter().map(|x| *x as usize).collect(),
                size,
                length,
                labels: match case.task {
                    Task::CausalLm => Labels::Tokens(labels.iter().map(|x| *x as i64).collect()),
                    _ => Labels::Classes(labels.iter().map(|x| *x as u32).collect()),
                },
            }
        })
        .collect()
}

/// torch's default decay, on everything.
pub(super) const ADAMW: AdamWConfig = AdamWConfig {
    beta1: 0.9,
    beta2: 0.999,
    epsilon: 1e-8,
    weight_decay: 0.01,
    decays: Decays::All,
};

/// `get_linear_schedule_with_warmup(optimizer, 5, 50)` at 1e-3.
pub(super) const RATE: LearningRate =
    LearningRate { peak: 1e-3, schedule: Schedule::Linear, warmup: 5, total: 50 };

fn list(reference: &serde_json::Value, key: &str) -> Vec<f64> {
    reference[key].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

/// Logits of valid tokens (their first columns) against the reference.
fn check_logits(model: &Model, batch: &Batch, expected: &super::Numbers) -> f64 {
    let logits = model.logits(batch).unwrap();
    let width = *expected.shape.last().unwrap();
    let all = *logits.dims().last().unwrap();
    let found: Vec<f32> =
        numbers(&logits).chunks(all).flat_map(|row| row[..width].to_vec()).collect();
    let rows = expected.data.len() / width / batch.size;
    let mut worst = 0.0f64;
    for row in 0..batch.size {
        let n = if rows == 1 { 1 } else { batch.lengths[row] };
        let range = row * rows * width..(row * rows + n) * width;
        worst = worst.max(relative(&found[range.clone()], &expected.data[range]));
    }
    worst
}

pub(super) fn run(case: &Case, compute: Compute) {
    let dir = |file: &str| fixture(&format!("{}/{}_{file}", case.name, case.mode));
    let model = model(case, compute);
    let batches = batches(case);
    let frozen = || (compute == Compute::Cpu).then(|| model.frozen_digest().unwrap());
    let before = frozen();
    let logits = read(&dir("logits.safetensors"));
    let error = check_logits(&model, &batches[0], &logits["initial"]);
    assert!(error < 1e-4, "initial logits: {error}");

    let expected = read(&dir("gradients.safetensors"));
    let first = &batches[0];
    let (_, grads) = model.gradients(first, 0, first.targets() as f64).unwrap();
    assert_eq!(grads.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    let scale = expected.values().flat_map(|n| &n.data).fold(0.0f32, |m, x| m.max(x.abs()));
    for (name, expected) in &expected {
        let found = numbers(&grads[name]);
        // Exactly zero in theory: softmax does not see a constant added to all keys' scores.
        if name.ends_with("key.bias") || name.ends_with("k_lin.bias") {
            assert!(found.iter().all(|x| x.abs() < 1e-6 * scale), "{name}: {found:?}");
            continue;
        }
        let error = relative(&found, &expected.data);
        assert!(error < 1e-4, "gradient of {name}: {error}");
    }

    let text = std::fs::read_to_string(dir("reference.json")).unwrap();
    let reference: serde_json::Value = serde_json::from_str(&text).unwrap();
    let (losses, rates) = (list(&reference, "loss"), list(&reference, "lr"));
    let norms = list(&reference, "grad_norm_before_clip");
    assert_eq!((losses.len(), rates.len(), batches.len()), (50, 50, 50));
    let mut optimizer = AdamW::new(model.trainable(), ADAMW);
    for (step, batch) in batches.iter().enumerate() {
        let n = batch.targets() as f64;
        let rate = RATE.at(step as u64);
        assert!((rate - rates[step]).abs() < 1e-15, "rate of step {step}: {rate}");
        let (loss, grads) = model.gradients(batch, step as u64, n).unwrap();
        let grads = numbers_by_name(&grads);
        let error = (loss / n - losses[step]).abs() / losses[step];
        assert!(error < 1e-4, "loss of step {step}: {} {}", loss / n, losses[step]);
        let norm = global_norm(&grads);
        let error = (norm - norms[step]).abs() / norms[step];
        assert!(error < 1e-3, "gradient norm of step {step}: {norm} {}", norms[step]);
        optimizer.update(model.trainable(), &grads, rate, 1.0).unwrap();
        model.put().unwrap();
    }
    for (name, expected) in read(&dir("final.safetensors")) {
        // Moved by rounding noise alone, see above.
        if name.ends_with("key.bias") || name.ends_with("k_lin.bias") {
            continue;
        }
        let error = relative(&numbers(&model.trainable()[&name]), &expected.data);
        assert!(error < 1e-3, "final {name}: {error}");
    }
    let error = check_logits(&model, &batches[0], &logits["final"]);
    assert!(error < 1e-3, "final logits: {error}");
    assert_eq!(frozen(), before, "a frozen weight changed");
}

#[test]
fn distilbert() {
    cases()[..2].iter().for_each(|case| run(case, Compute::Cpu));
}

#[test]
fn bert() {
    cases()[2..4].iter().for_each(|case| run(case, Compute::Cpu));
}

#[test]
fn llama() {
    cases()[4..].iter().for_each(|case| run(case, Compute::Cpu));
}

/// The sum of the losses of a batch is that of its rows, and so are the gradients.
#[test]
fn a_batch_is_its_rows() {
    let targets = &["q_proj", "k_proj", "v_proj", "o_proj"];
    let case = Case { name: "llama", mode: "lora", task: Task::CausalLm, targets };
    let (model, whole) = (model(&case, Compute::Cpu), batches(&case).remove(0));
    let n = whole.targets() as f64;
    let (loss, grads) = model.gradients(&whole, 0, n).unwrap();
    let (mut sum, mut summed) = (0.0, BTreeMap::<String, Tensor>::new());
    let log_probs = model.target_log_probs(&whole).unwrap();
    for (row, (log_prob, count)) in log_probs.into_iter().enumerate() {
        let range = row * whole.length..(row + 1) * whole.length;
        let Labels::Tokens(labels) = &whole.labels else { panic!() };
        let one = Batch {
            input_ids: whole.input_ids[range.clone()].to_vec(),
            token_type_ids: None,
            lengths: vec![whole.lengths[row]],
            size: 1,
            length: whole.length,
            labels: Labels::Tokens(labels[range].to_vec()),
        };
        let (loss, grads) = model.gradients(&one, 0, n).unwrap();
        assert!((loss + log_prob).abs() < 1e-4 * loss, "{loss} {log_prob}");
        assert_eq!(count, one.targets());
        sum += loss;
        for (name, grad) in grads {
            let before = summed.remove(&name);
            summed.insert(name, before.map_or(grad.clone(), |b| (b + &grad).unwrap()));
        }
    }
    assert!((sum - loss).abs() < 1e-5 * loss, "{sum} {loss}");
    for (name, grad) in grads {
        assert!(relative(&numbers(&summed[&name]), &numbers(&grad)) < 1e-4, "{name}");
    }
}

//! Fifty steps of training against PyTorch (transformers, PEFT; AdamW, linear warm-up).

use std::collections::BTreeMap;

use candle_core::{Tensor, Var};
use flow::learn::{Batch, Labels, Method, Model, Setup, Task};

use super::{classes, files, fixture, lora, numbers, read, relative, setup};

struct Case {
    name: &'static str,
    mode: &'static str,
    task: Task,
    targets: &'static [&'static str],
}

fn model(case: &Case) -> Model {
    let dir = |file: &str| fixture(&format!("{}/{file}", case.name));
    let files = files(dir("config.json"), dir("base.safetensors"));
    if case.mode == "full" {
        return Model::load(&files, &setup(case.task.clone(), Method::Full, None)).unwrap();
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
    let setup = Setup { ..setup(case.task.clone(), Method::Lora, Some(other)) };
    Model::load_trained(&files, &setup, &trained).unwrap()
}

fn batches(case: &Case) -> Vec<Batch> {
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

/// torch's AdamW with weight decay 0.01 on everything.
#[derive(Default)]
struct AdamW {
    step: i32,
    moments: BTreeMap<String, (Vec<f32>, Vec<f32>)>,
}

impl AdamW {
    fn update(
        &mut self,
        rate: f64,
        vars: &BTreeMap<String, Var>,
        grads: &BTreeMap<String, Tensor>,
    ) {
        self.step += 1;
        let (b1, b2, eps, decay) = (0.9f64, 0.999f64, 1e-8, 0.01);
        let (c1, c2) = (1.0 - b1.powi(self.step), 1.0 - b2.powi(self.step));
        for (name, var) in vars {
            let (g, mut p) = (numbers(&grads[name]), numbers(var));
            let zero = || (vec![0.0; p.len()], vec![0.0; p.len()]);
            let (m, v) = self.moments.entry(name.clone()).or_insert_with(zero);
            for i in 0..p.len() {
                let g = f64::from(g[i]);
                m[i] = (b1 * f64::from(m[i]) + (1.0 - b1) * g) as f32;
                v[i] = (b2 * f64::from(v[i]) + (1.0 - b2) * g * g) as f32;
                let root = (f64::from(v[i]) / c2).sqrt() + eps;
                let decayed = f64::from(p[i]) * (1.0 - rate * decay);
                p[i] = (decayed - rate * f64::from(m[i]) / c1 / root) as f32;
            }
            var.set(&Tensor::from_vec(p, var.shape(), var.device()).unwrap()).unwrap();
        }
    }
}

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

fn run(case: &Case) {
    let dir = |file: &str| fixture(&format!("{}/{}_{file}", case.name, case.mode));
    let model = model(case);
    let batches = batches(case);
    let frozen = model.frozen_digest().unwrap();
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
            let largest = found.iter().fold(0.0f32, |m, x| m.max(x.abs()));
            assert!(largest < 1e-6 * scale, "{name}: {largest}");
            continue;
        }
        let error = relative(&found, &expected.data);
        assert!(error < 1e-4, "gradient of {name}: {error}");
    }

    let text = std::fs::read_to_string(dir("reference.json")).unwrap();
    let reference: serde_json::Value = serde_json::from_str(&text).unwrap();
    let (losses, rates) = (list(&reference, "loss"), list(&reference, "lr"));
    let norms = list(&reference, "grad_norm_before_clip");
    let mut optimizer = AdamW::default();
    for (step, batch) in batches.iter().enumerate() {
        let n = batch.targets() as f64;
        let (loss, grads) = model.gradients(batch, step as u64, n).unwrap();
        let error = (loss / n - losses[step]).abs() / losses[step];
        assert!(error < 1e-4, "loss of step {step}: {} {}", loss / n, losses[step]);
        let square = grads.values().flat_map(numbers).map(|x| f64::from(x).powi(2)).sum::<f64>();
        let error = (square.sqrt() - norms[step]).abs() / norms[step];
        assert!(error < 1e-3, "gradient norm of step {step}: {} {}", square.sqrt(), norms[step]);
        optimizer.update(rates[step], model.trainable(), &grads);
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
    assert_eq!(model.frozen_digest().unwrap(), frozen, "a frozen weight changed");
}

#[test]
fn distilbert_full() {
    run(&Case { name: "distilbert", mode: "full", task: classes(2), targets: &[] });
}

#[test]
fn distilbert_lora() {
    let targets = &["q_lin", "v_lin"];
    run(&Case { name: "distilbert", mode: "lora", task: classes(2), targets });
}

#[test]
fn bert_full() {
    run(&Case { name: "bert", mode: "full", task: classes(2), targets: &[] });
}

#[test]
fn bert_lora() {
    run(&Case { name: "bert", mode: "lora", task: classes(2), targets: &["query", "value"] });
}

#[test]
fn llama_full() {
    run(&Case { name: "llama", mode: "full", task: Task::CausalLm, targets: &[] });
}

#[test]
fn llama_lora() {
    let targets = &["q_proj", "k_proj", "v_proj", "o_proj"];
    run(&Case { name: "llama", mode: "lora", task: Task::CausalLm, targets });
}

/// The sum of the losses of a batch is that of its rows, and so are the gradients.
#[test]
fn a_batch_is_its_rows() {
    let targets = &["q_proj", "k_proj", "v_proj", "o_proj"];
    let case = Case { name: "llama", mode: "lora", task: Task::CausalLm, targets };
    let (model, whole) = (model(&case), batches(&case).remove(0));
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

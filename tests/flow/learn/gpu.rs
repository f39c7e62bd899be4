//! Models on an NVIDIA GPU against the CPU, and against PyTorch's numbers.
//!
//! `cargo test --release gpu -- --ignored --test-threads=1` on a machine with a GPU: one of them
//! fills its memory.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Result, bail};
use candle_core::Tensor;
use flow::learn::{
    AdamWConfig, Batch, Compute, Duration, History, IGNORE, Labels, LoraConfig, Method, Model,
    ModelConfig, ModelFiles, Observer, Quantization, Row, Schedule, Setup, StepLog, TargetModules,
    Task, TrainingArguments, Warmup, random_weights, resume, train,
};
use flow::source::Fault;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::parity::{batches, cases, run};
use super::{classes, numbers, relative};

type Gradients = BTreeMap<String, Tensor>;

/// Looks at nothing; given a folder, keeps a checkpoint there after the first update and stops.
struct Watch<'a>(Option<&'a Path>);

impl Observer for Watch<'_> {
    fn step(&mut self, _: &StepLog, _: u64) -> Result<()> {
        Ok(())
    }

    fn between(&mut self, save: &mut dyn FnMut(&Path) -> Result<()>) -> Result<()> {
        let Some(dir) = self.0 else { return Ok(()) };
        save(dir)?;
        bail!("stopped")
    }

    fn evaluate(&mut self, _: &Model, _: u64) -> Result<Option<BTreeMap<String, f64>>> {
        Ok(None)
    }
}

/// A decoder with heads of `head` elements; Qwen3 has norms of its heads.
fn decoder(family: &str, head: usize) -> Value {
    let class = format!("{}{}ForCausalLM", family[..1].to_uppercase(), &family[1..]);
    let window = if family == "mistral" { json!(40) } else { Value::Null };
    json!({
        "architectures": [class], "model_type": family, "hidden_size": 4 * head,
        "intermediate_size": 184, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": head, "vocab_size": 320,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "hidden_act": "silu", "tie_word_embeddings": family != "mistral",
        "attention_bias": family == "llama", "sliding_window": window,
        "use_sliding_window": false, "initializer_range": 0.04
    })
}

fn encoder(head: usize) -> Value {
    json!({
        "architectures": ["BertForSequenceClassification"], "model_type": "bert",
        "hidden_size": 4 * head, "intermediate_size": 192, "num_hidden_layers": 3,
        "num_attention_heads": 4, "vocab_size": 320, "max_position_embeddings": 256,
        "type_vocab_size": 2, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1, "layer_norm_eps": 1e-12, "initializer_range": 0.04
    })
}

pub(super) fn files(dir: &Path, config: &Value, task: &Task) -> ModelFiles {
    let path = dir.join("config.json");
    std::fs::write(&path, config.to_string()).unwrap();
    let weights = dir.join("model.safetensors");
    random_weights(&ModelConfig::read(&path).unwrap(), Some(task), 7, &weights).unwrap();
    ModelFiles { config: path, weights: vec![("model.safetensors".into(), weights)] }
}

pub(super) fn setup(task: &Task, method: Method, compute: Compute, dropout: f64) -> Setup {
    let lora = LoraConfig {
        // The second is one that the kernel for adapters does not take.
        r: if method == Method::Lora { 16 } else { 12 },
        alpha: 16.0,
        dropout,
        target_modules: TargetModules::AllLinear,
        use_rslora: false,
    };
    Setup {
        task: task.clone(),
        method,
        lora: (method != Method::Full).then_some(lora),
        quantization: match method {
            Method::Qlora => Quantization::Nf4 { double: true },
            _ => Quantization::None,
        },
        seed: 5,
        dropout: Some(dropout),
        compute,
        gradient_checkpointing: false,
        frozen: false,
    }
}

/// Rows of ragged lengths, up to 150 tokens.
fn rows(task: &Task) -> Vec<Row> {
    let id = |i: usize| ((i * 7919 + i * i * 31) % 317) as u32;
    let row = |n: usize| {
        let length = [5, 150, 64, 33, 90, 17, 128, 1][n % 8] + 2;
        let ids: Vec<u32> = (0..length).map(|i| id(n * 1000 + i)).collect();
        let causal = *task == Task::CausalLm;
        let label = |i: usize| if i * 3 >= length { i64::from(id(n * 1000 + i)) } else { IGNORE };
        Row {
            ids,
            types: (!causal).then(|| (0..length).map(|i| (i * 2 / length) as u32).collect()),
            labels: causal.then(|| (0..length).map(label).collect()),
            class: (!causal).then_some((n % 2) as u32),
        }
    };
    (0..24).map(row).collect()
}

fn arguments(steps: u64) -> TrainingArguments {
    TrainingArguments {
        duration: Duration::Steps(steps),
        batch_size: 4,
        gradient_accumulation: 2,
        learning_rate: 1e-3,
        schedule: Schedule::Linear,
        warmup: Warmup::Steps(2),
        optimizer: AdamWConfig { weight_decay: 0.01, ..AdamWConfig::default() },
        max_grad_norm: Some(1.0),
        shuffle: true,
        seed: 9,
        best: None,
    }
}

pub(super) fn trained(files: &ModelFiles, setup: &Setup, steps: u64) -> (Model, History) {
    let model = Model::load(files, setup).unwrap();
    let history =
        train(&model, &setup.task, &rows(&setup.task), &arguments(steps), &mut Watch(None))
            .unwrap();
    (model, history)
}

/// Largest relative difference of the losses, and of the norms of the gradients.
pub(super) fn apart(a: &History, b: &History) -> (f64, f64) {
    let far = |a: f64, b: f64| ((a - b) / b).abs();
    let each = a.steps.iter().zip(&b.steps);
    let losses = each.clone().map(|(a, b)| far(a.loss, b.loss)).fold(0.0, f64::max);
    (losses, each.map(|(a, b)| far(a.grad_norm, b.grad_norm)).fold(0.0, f64::max))
}

pub(super) fn models() -> Vec<(Value, Task)> {
    vec![
        (decoder("llama", 64), Task::CausalLm),
        (decoder("mistral", 128), Task::CausalLm),
        (decoder("qwen3", 32), Task::CausalLm),
        (decoder("llama", 16), Task::CausalLm),
        (encoder(64), classes(2)),
    ]
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn trains_as_pytorch() {
    for case in cases() {
        run(&case, Compute::GpuF32);
    }
}

/// With dropout, whose masks are the same, accumulation, clipping and decay.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn trains_as_the_cpu() {
    let dir = tempfile::tempdir().unwrap();
    for (config, task) in models() {
        let files = files(dir.path(), &config, &task);
        for method in [Method::Full, Method::Lora, Method::Qlora] {
            let [cpu, f32, bf16] = [Compute::Cpu, Compute::GpuF32, Compute::GpuBf16]
                .map(|compute| trained(&files, &setup(&task, method, compute, 0.1), 6));
            let what = format!("{} {method:?}", config["model_type"]);
            let (loss, norm) = apart(&f32.1, &cpu.1);
            println!("{what}: f32 loss {loss:.1e} norm {norm:.1e}");
            assert!(loss < 1e-4 && norm < 1e-3, "{what}");
            for (name, var) in cpu.0.trainable() {
                let error = relative(&numbers(&f32.0.trainable()[name]), &numbers(var));
                // A gradient of rounding noise alone moves the weight by a whole rate.
                let noise = name.contains("key.bias") || name.contains("k_proj.bias");
                assert!(error < 1e-3 || noise, "{what}: {name} {error}");
            }
            let (loss, norm) = apart(&bf16.1, &cpu.1);
            println!("{what}: bf16 loss {loss:.1e} norm {norm:.1e}");
            assert!(loss < 1e-2 && norm < 5e-2, "{what}");
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn gradients_in_bf16() {
    near_gradients(Compute::GpuBf16);
}

/// The gradients of one batch in bf16: each tensor's within 3 % of the CPU's in f32, as a vector.
#[expect(clippy::print_stdout, reason = "shows how near")]
pub(super) fn near_gradients(compute: Compute) {
    let dir = tempfile::tempdir().unwrap();
    for (config, task) in models() {
        let files = files(dir.path(), &config, &task);
        let rows = rows(&task);
        let refs: Vec<&Row> = rows[..8].iter().collect();
        let batch = flow::learn::collate(&refs, &task).unwrap();
        let n = batch.targets() as f64;
        // Of adapters also with masks, whose ranks kernels take 16 and 8 at a time.
        let plain = [Method::Full, Method::Lora, Method::Qlora].map(|method| (method, 0.0, None));
        let dropping = [None, Some(8)].map(|r| (Method::Lora, 0.1, r));
        for (method, dropout, r) in plain.into_iter().chain(dropping) {
            let [cpu, other] = [Compute::Cpu, compute].map(|compute| {
                let mut setup = setup(&task, method, compute, dropout);
                if let (Some(lora), Some(r)) = (&mut setup.lora, r) {
                    lora.r = r;
                }
                let model = Model::load(&files, &setup).unwrap();
                model.gradients(&batch, 0, n).unwrap().1
            });
            let worst = worst(&cpu, &other);
            println!("{} {method:?} {dropout} {r:?}: {worst:?}", config["model_type"]);
            assert!(worst.0 < 3e-2, "{worst:?}");
        }
    }
}

/// The loss and the gradients where two, four and eight blocks share a row of logits, and where a
/// product is large enough to be tried out.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn large_vocabularies() {
    let dir = tempfile::tempdir().unwrap();
    for vocabulary in [2_051, 60_001, 140_003] {
        let (mut config, task) = (decoder("llama", 64), Task::CausalLm);
        config["vocab_size"] = json!(vocabulary);
        let files = files(dir.path(), &config, &task);
        let rows = rows(&task);
        let refs: Vec<&Row> = rows[..8].iter().collect();
        let batch = flow::learn::collate(&refs, &task).unwrap();
        let n = batch.targets() as f64;
        let [(expected, cpu), (loss, gpu), (again, same)] =
            [Compute::Cpu, Compute::GpuBf16, Compute::GpuBf16].map(|compute| {
                let model = Model::load(&files, &setup(&task, Method::Lora, compute, 0.0)).unwrap();
                model.gradients(&batch, 0, n).unwrap()
            });
        assert!((loss - expected).abs() < 1e-3 * expected, "{vocabulary}: {loss} {expected}");
        assert_eq!(loss, again, "{vocabulary}");
        for (name, g) in &gpu {
            assert_eq!(numbers(g), numbers(&same[name]), "{vocabulary}: {name}");
        }
        let worst = worst(&cpu, &gpu);
        assert!(worst.0 < 3e-2, "{vocabulary}: {worst:?}");
    }
}

/// Long rows, and heads whose norms' gradients come with those of attention: near the CPU, and the
/// same bits with checkpointing.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn long_rows() {
    let dir = tempfile::tempdir().unwrap();
    for (family, head) in [("qwen3", 128), ("qwen3", 64), ("mistral", 128)] {
        let (mut config, task) = (decoder(family, head), Task::CausalLm);
        config["max_position_embeddings"] = json!(4096);
        let files = files(dir.path(), &config, &task);
        let row = |n: u32| {
            let ids: Vec<u32> = (0..n).map(|i| i * 7919 % 320).collect();
            let labels = Some(ids.iter().map(|id| i64::from(*id)).collect());
            Row { ids, types: None, labels, class: None }
        };
        let rows = [row(2100), row(900)];
        let batch = flow::learn::collate(&[&rows[0], &rows[1]], &task).unwrap();
        let n = batch.targets() as f64;
        for method in [Method::Full, Method::Lora, Method::Qlora] {
            let gradients = |compute, gradient_checkpointing| {
                let plain = setup(&task, method, compute, 0.0);
                let model = Model::load(&files, &Setup { gradient_checkpointing, ..plain });
                model.unwrap().gradients(&batch, 0, n).unwrap()
            };
            let (expected, cpu) = gradients(Compute::Cpu, false);
            let (loss, gpu) = gradients(Compute::GpuBf16, false);
            let (again, same) = gradients(Compute::GpuBf16, true);
            let worst = worst(&cpu, &gpu);
            println!("{family} {head} {method:?}: {loss} {expected} {worst:?}");
            assert!((loss - expected).abs() < 1e-3 * expected && worst.0 < 3e-2);
            assert_eq!(loss, again);
            for (name, g) in &gpu {
                assert_eq!(numbers(g), numbers(&same[name]), "{family} {head}: {name}");
            }
        }
    }
}

/// The largest distance of a tensor of gradients from what is expected, and the tensor's name. What
/// is small beside all gradients together is noise.
fn worst(expected: &Gradients, found: &Gradients) -> (f64, String) {
    let all: f64 = expected.values().map(|g| norm(&numbers(g)).powi(2)).sum();
    let each = expected.iter().map(|(name, g)| {
        let (a, b) = (numbers(&found[name]), numbers(g));
        let difference: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a - b).collect();
        (norm(&difference) / norm(&b).max(1e-3 * all.sqrt()), name.clone())
    });
    each.max_by(|a, b| a.0.total_cmp(&b.0)).unwrap()
}

fn norm(x: &[f32]) -> f64 {
    x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt()
}

/// Equal bits: run again, with gradient checkpointing, and gone on from a checkpoint.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn repeats_itself() {
    let dir = tempfile::tempdir().unwrap();
    let methods = [Method::Lora, Method::Qlora];
    for ((config, task), method) in
        models().into_iter().flat_map(|m| methods.map(|x| (m.clone(), x)))
    {
        let files = files(dir.path(), &config, &task);
        let plain = setup(&task, method, Compute::GpuBf16, 0.1);
        let once = trained(&files, &plain, 4);
        let again = Setup { gradient_checkpointing: true, ..plain.clone() };
        let stopped = dir.path().join("checkpoint");
        std::fs::create_dir(&stopped).unwrap();
        let (data, args) = (rows(&task), arguments(4));
        let model = Model::load(&files, &plain).unwrap();
        train(&model, &task, &data, &args, &mut Watch(Some(&stopped))).unwrap_err();
        let model = Model::load(&files, &plain).unwrap();
        let from = flow::learn::Checkpoint::open(&stopped, &model).unwrap();
        let history = resume(from, &model, &task, &data, &args, &mut Watch(None)).unwrap();
        std::fs::remove_dir_all(&stopped).unwrap();
        for other in [trained(&files, &plain, 4), trained(&files, &again, 4), (model, history)] {
            assert_eq!(once.1, other.1);
            for (name, var) in once.0.trainable() {
                assert_eq!(numbers(var), numbers(&other.0.trainable()[name]), "{name}");
            }
        }
    }
}

/// Likelihoods of answers behind one prompt, and logits.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn evaluates_as_the_cpu() {
    let dir = tempfile::tempdir().unwrap();
    for (config, task) in models() {
        let files = files(dir.path(), &config, &task);
        let [cpu, f32, bf16] = [Compute::Cpu, Compute::GpuF32, Compute::GpuBf16].map(|compute| {
            Model::load(&files, &setup(&task, Method::Qlora, compute, 0.1)).unwrap()
        });
        let rows = rows(&task);
        let refs: Vec<&Row> = rows[..8].iter().collect();
        let mut batch = flow::learn::collate(&refs, &task).unwrap();
        for (model, limit) in [(&f32, 1e-4), (&bf16, 3e-2)] {
            let found = model.target_log_probs(&batch).unwrap();
            for ((a, n), (b, m)) in found.iter().zip(cpu.target_log_probs(&batch).unwrap()) {
                assert!(*n == m && (a - b).abs() <= limit * b.abs().max(1.0), "{a} {b}");
            }
            if task == Task::CausalLm {
                let prompts: [&[u32]; 3] = [&[1, 2, 3], &[7; 70], &[9]];
                let answers = [vec![4, 5], vec![6], vec![8, 2, 11, 4]];
                let found = model.answer_log_probs(&prompts, &answers).unwrap().concat();
                let wanted = cpu.answer_log_probs(&prompts, &answers).unwrap().concat();
                for (a, b) in found.iter().zip(wanted) {
                    assert!((a - b).abs() <= limit * b.abs().max(1.0), "{a} {b}");
                }
            }
            let labels = std::mem::replace(&mut batch.labels, Labels::None);
            let error = relative(
                &numbers(&model.logits(&batch).unwrap()),
                &numbers(&cpu.logits(&batch).unwrap()),
            );
            println!("{} logits {error:.1e}", config["model_type"]);
            assert!(error < limit, "{error}");
            batch.labels = labels;
        }
    }
}

/// A batch that is too large is an error that says how many rows would fit; they do, and the model
/// goes on.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn says_what_would_fit() {
    let dir = tempfile::tempdir().unwrap();
    let (config, task) = (decoder("llama", 64), Task::CausalLm);
    let files = files(dir.path(), &config, &task);
    let model = Model::load(&files, &setup(&task, Method::Qlora, Compute::GpuBf16, 0.0)).unwrap();
    let batch = |size: usize| Batch {
        input_ids: (0..size * 256).map(|i| (i % 317) as u32).collect(),
        token_type_ids: None,
        lengths: vec![256; size],
        size,
        length: 256,
        labels: Labels::Tokens((0..size * 256).map(|i| (i % 317) as i64).collect()),
    };
    let before = model.gradients(&batch(2), 0, 510.0).unwrap().0;
    let error = model.gradients(&batch(60_000), 0, 1e7).unwrap_err();
    let fault = error.downcast::<Fault>().unwrap();
    let help = fault.help.unwrap();
    println!("{}: {help}", fault.message);
    assert!(fault.message.contains("60000 rows of up to 256 tokens"));
    let fits = help.split("`batch_size: ").last().unwrap().split('`').next().unwrap();
    let fits: usize = fits.parse().unwrap();
    assert!((1000..60_000).contains(&fits), "{fits}");
    model.gradients(&batch(fits), 0, 1e7).unwrap();
    assert_eq!(model.gradients(&batch(2), 0, 510.0).unwrap().0, before);
}

/// Saved and loaded on the CPU, what was trained on the GPU predicts the same.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn saves_what_it_trained() {
    let case = &cases()[5];
    let dir = tempfile::tempdir().unwrap();
    let files = files(dir.path(), &decoder("llama", 64), &case.task);
    let (gpu, _) = trained(&files, &setup(&case.task, Method::Lora, Compute::GpuF32, 0.0), 6);
    let saved = dir.path().join("adapter");
    std::fs::create_dir(&saved).unwrap();
    gpu.save_adapter(&saved, "base").unwrap();
    let names = ["adapter_config.json", "adapter_model.safetensors"];
    let trained = names.map(|n| (n.to_owned(), saved.join(n)));
    let cpu = setup(&case.task, Method::Lora, Compute::Cpu, 0.0);
    let cpu = Model::load_trained(&files, &cpu, &trained).unwrap();
    let mut batch = batches(case).remove(0);
    batch.input_ids.iter_mut().for_each(|id| *id %= 320);
    batch.labels = Labels::None;
    let (a, b) = (gpu.logits(&batch).unwrap(), cpu.logits(&batch).unwrap());
    assert!(relative(&numbers(&a), &numbers(&b)) < 1e-4);
}

/// The committed PTX is what `ptx.sh` made of the committed sources.
#[test]
fn kernels_are_those_of_the_sources() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/learn/cuda");
    let listed = std::fs::read_to_string(dir.join("ptx/sources")).unwrap();
    let mut names = Vec::new();
    for line in listed.lines() {
        let (digest, name) = line.split_once("  ").unwrap();
        let name = name.trim_start_matches("./");
        let found = Sha256::digest(std::fs::read(dir.join(name)).unwrap());
        let found: String = found.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(digest, found, "{name} has changed: run src/learn/cuda/ptx.sh");
        names.push(name.to_owned());
    }
    let is_source = |name: &String| name.ends_with(".cu") || name.ends_with(".cuh");
    let there = std::fs::read_dir(&dir).unwrap().chain(std::fs::read_dir(dir.join("ptx")).unwrap());
    let there = there.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    for name in there.filter(|name| is_source(name) || name.ends_with(".zst")) {
        let listed = names.iter().any(|n| n.trim_start_matches("ptx/") == name);
        assert!(listed, "{name} is not listed: run src/learn/cuda/ptx.sh");
    }
}

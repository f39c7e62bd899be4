//! How fast a step of training and a pass of inference are on the CPU, beside PyTorch and PEFT.
//!
//! ```sh
//! cargo bench --bench training                      # flow alone
//! python3 -m venv peer && peer/bin/pip install torch transformers peft
//! cargo bench --bench training -- --peer peer/bin/python
//! cargo bench --bench training -- --peer peer/bin/python minilm bf16
//! ```
//!
//! Each work is one process after another on the same weights (random, of the shapes of real
//! models) and the same rows, in f32 and in bf16 (PyTorch: autocast). Seconds are the median of the
//! steps; CPU seconds and the peak of memory are the process's, so they also tell on a machine that
//! does other things. Words choose works by name: those that hold all of them.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a bench stops where it cannot go on"
)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::Result;
use flow::learn::random::Stream;
use flow::learn::{
    AdamWConfig, Compute, Duration, IGNORE, LoraConfig, Method, Model, ModelConfig, ModelFiles,
    Observer, Quantization, Row, Schedule, Setup, StepLog, TargetModules, Task, TrainingArguments,
    Warmup, collate, random_weights, train,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Steps that are timed; one more goes before them.
const STEPS: usize = 5;
/// Of one row: a few are over before the processor is at its speed.
const STEPS_OF_ONE: usize = 50;

/// What both programs are told.
#[derive(Debug, Serialize, Deserialize)]
struct Work {
    name: String,
    /// `full`, `lora`, `qlora` or `infer`.
    method: String,
    r: usize,
    targets: Vec<String>,
    batch: usize,
    /// Rows are padded to it where a program pads.
    length: usize,
    causal: bool,
    steps: usize,
    bf16: bool,
}

/// What a program measured.
#[derive(Debug, Deserialize)]
struct Measured {
    seconds: f64,
    cpu_seconds: f64,
    peak_rss_bytes: f64,
}

fn encoder(dim: usize, layers: usize, hidden: usize) -> Value {
    json!({
        "architectures": ["DistilBertForSequenceClassification"], "model_type": "distilbert",
        "vocab_size": 30522, "dim": dim, "hidden_dim": hidden, "n_layers": layers, "n_heads": 12,
        "max_position_embeddings": 512, "activation": "gelu", "dropout": 0.1,
        "attention_dropout": 0.1, "seq_classif_dropout": 0.2, "pad_token_id": 0,
    })
}

fn decoder() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 49152,
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "tie_word_embeddings": true,
        "hidden_act": "silu",
    })
}

fn works() -> Vec<(Work, Value)> {
    let all = [false, true].map(works_in);
    let [f32, bf16] = all;
    f32.into_iter().zip(bf16).flat_map(|(f32, bf16)| [f32, bf16]).collect()
}

fn works_in(bf16: bool) -> Vec<(Work, Value)> {
    let arithmetic = if bf16 { "bf16" } else { "f32" };
    let work = |name: &str, method: &str, r, targets: &[&str], batch, length| Work {
        bf16,
        name: format!("{name}, {arithmetic}"),
        method: method.to_owned(),
        r,
        targets: targets.iter().map(|t| (*t).to_owned()).collect(),
        batch,
        length,
        causal: name.starts_with("smollm2"),
        steps: if batch == 1 { STEPS_OF_ONE } else { STEPS },
    };
    let (qv, qkvo) = (&["q_lin", "v_lin"][..], &["q_proj", "k_proj", "v_proj", "o_proj"][..]);
    let (distilbert, minilm) = (|| encoder(768, 6, 3072), || encoder(384, 6, 1536));
    vec![
        (work("distilbert lora r=8, 16 x 128", "lora", 8, qv, 16, 128), distilbert()),
        (work("minilm lora r=8, 16 x 128", "lora", 8, qv, 16, 128), minilm()),
        (work("minilm full, 16 x 128", "full", 0, &[], 16, 128), minilm()),
        (work("smollm2 lora r=16, 4 x 256", "lora", 16, qkvo, 4, 256), decoder()),
        (work("smollm2 qlora r=16, 4 x 256", "qlora", 16, qkvo, 4, 256), decoder()),
        (work("minilm inference, 32 x 128", "infer", 0, &[], 32, 128), minilm()),
        (work("minilm inference, 1 x 128", "infer", 0, &[], 1, 128), minilm()),
    ]
}

/// Rows of a work: classes at full length; for a causal model 28 % of the length, of which the last
/// 4 tokens are the answer.
fn rows(work: &Work) -> Vec<Row> {
    let stream = Stream::new(7, &work.method);
    let row = |i: usize| {
        let s = stream.at(i as u64);
        let n = if work.causal { work.length * 28 / 100 } else { work.length };
        let ids = (0..n as u64).map(|k| 1000 + s.below(k, 20_000) as u32).collect::<Vec<_>>();
        let labels = work.causal.then(|| {
            let label = |(k, id): (usize, &u32)| if k + 4 >= n { i64::from(*id) } else { IGNORE };
            ids.iter().enumerate().map(label).collect()
        });
        let class = (!work.causal).then_some((i % 2) as u32);
        Row { ids, types: None, labels, class }
    };
    (0..work.batch * (work.steps + 1)).map(row).collect()
}

struct Clock {
    last: Instant,
    seconds: Vec<f64>,
    cpu: f64,
}

impl Clock {
    fn new() -> Self {
        Self { last: Instant::now(), seconds: Vec::new(), cpu: cpu_seconds() }
    }

    fn tick(&mut self) {
        self.seconds.push(self.last.elapsed().as_secs_f64());
        if self.seconds.len() == 1 {
            self.cpu = cpu_seconds();
        }
        self.last = Instant::now();
    }

    /// Without the first.
    fn report(mut self) -> Value {
        let cpu = (cpu_seconds() - self.cpu) / (self.seconds.len() - 1) as f64;
        let timed = &mut self.seconds[1..];
        timed.sort_by(f64::total_cmp);
        json!({
            "seconds": timed[timed.len() / 2],
            "cpu_seconds": cpu,
            "peak_rss_bytes": peak_rss_bytes(),
        })
    }
}

impl Observer for Clock {
    fn step(&mut self, _: &StepLog, _: u64) -> Result<()> {
        self.tick();
        Ok(())
    }

    fn evaluate(&mut self, _: &Model, _: u64) -> Result<Option<BTreeMap<String, f64>>> {
        Ok(None)
    }
}

fn status(name: &str) -> f64 {
    let text = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix(name)).unwrap_or("0");
    line.split_whitespace().next().and_then(|n| n.parse().ok()).unwrap_or(0.0)
}

fn peak_rss_bytes() -> f64 {
    status("VmHWM:") * 1024.0
}

fn cpu_seconds() -> f64 {
    let text = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields = text.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace();
    fields.skip(11).take(2).filter_map(|n| n.parse::<f64>().ok()).sum::<f64>() / 100.0
}

/// One work in this process.
fn measure(dir: &Path) -> Value {
    let work: Work = serde_json::from_slice(&fs::read(dir.join("work.json")).unwrap()).unwrap();
    let weights = vec![("model.safetensors".to_owned(), dir.join("model.safetensors"))];
    let files = ModelFiles { config: dir.join("config.json"), weights };
    let task = match work.causal {
        true => Task::CausalLm,
        false => Task::SequenceClassification { classes: 2 },
    };
    let target_modules = TargetModules::Names(work.targets.clone());
    let alpha = 2.0 * work.r as f64;
    let lora = LoraConfig { r: work.r, alpha, dropout: 0.05, target_modules, use_rslora: false };
    let (method, quantization) = match work.method.as_str() {
        "lora" => (Method::Lora, Quantization::None),
        "qlora" => (Method::Qlora, Quantization::Nf4 { double: true }),
        _ => (Method::Full, Quantization::None),
    };
    let lora = (method != Method::Full).then_some(lora);
    let setup = Setup {
        task: task.clone(),
        method,
        lora,
        quantization,
        seed: 1,
        dropout: None,
        compute: if work.bf16 { Compute::CpuBf16 } else { Compute::Cpu },
        gradient_checkpointing: false,
        frozen: work.method == "infer",
    };
    let model = Model::load(&files, &setup).unwrap();
    let rows = rows(&work);
    let mut clock = Clock::new();
    if work.method == "infer" {
        for rows in rows.chunks(work.batch) {
            let rows: Vec<&Row> = rows.iter().collect();
            model.logits(&collate(&rows, &task).unwrap()).unwrap();
            clock.tick();
        }
        return clock.report();
    }
    let args = TrainingArguments {
        duration: Duration::Epochs(1),
        batch_size: work.batch,
        gradient_accumulation: 1,
        learning_rate: 1e-4,
        schedule: Schedule::Constant,
        warmup: Warmup::Steps(0),
        optimizer: AdamWConfig::default(),
        max_grad_norm: Some(1.0),
        shuffle: false,
        seed: 1,
        best: None,
    };
    train(&model, &task, &rows, &args, &mut clock).unwrap();
    clock.report()
}

fn run(command: &mut Command) -> Measured {
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let line = text.lines().last().unwrap_or_else(|| panic!("{command:?} failed: {said}"));
    serde_json::from_str(line).unwrap_or_else(|e| panic!("{e} in {line}: {said}"))
}

fn prepare(work: &Work, config: &Value, dir: &Path) {
    fs::write(dir.join("work.json"), serde_json::to_vec(work).unwrap()).unwrap();
    let path = dir.join("config.json");
    fs::write(&path, config.to_string()).unwrap();
    let config = ModelConfig::read(&path).unwrap();
    random_weights(&config, None, 1, &dir.join("model.safetensors")).unwrap();
    let rows: Vec<Value> = rows(work)
        .iter()
        .map(|r| json!({ "ids": r.ids, "labels": r.labels, "class": r.class }))
        .collect();
    fs::write(dir.join("rows.json"), serde_json::to_vec(&rows).unwrap()).unwrap();
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let after = |name: &str| {
        let at = arguments.iter().position(|a| a == name)?;
        arguments.get(at + 1).cloned()
    };
    if let Some(dir) = after("--measure") {
        println!("{}", measure(Path::new(&dir)));
        return;
    }
    let peer = after("--peer");
    let words = arguments.iter().filter(|a| !a.starts_with("--") && Some(*a) != peer.as_ref());
    let words: Vec<&String> = words.collect();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    println!(
        "{threads} threads; per step: seconds, CPU seconds, rows a second; peak memory in GB\n"
    );
    println!("| work | | s | CPU s | rows/s | GB | times the peer's speed |");
    println!("|---|---|---:|---:|---:|---:|---:|");
    for (work, config) in works() {
        if !words.iter().all(|word| work.name.contains(word.as_str())) {
            continue;
        }
        let dir = tempfile::tempdir().unwrap();
        prepare(&work, &config, dir.path());
        let mut own = Command::new(std::env::current_exe().unwrap());
        let own = run(own.arg("--measure").arg(dir.path()));
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/training.py");
        let other = peer.as_ref().filter(|_| work.method != "qlora").map(|python| {
            run(Command::new(python).arg(&script).arg(dir.path()).arg(threads.to_string()))
        });
        let row = |who: &str, m: &Measured, ratio: String| {
            let Measured { seconds, cpu_seconds, peak_rss_bytes } = m;
            let rate = work.batch as f64 / seconds;
            let (name, gb) = (&work.name, peak_rss_bytes / 1e9);
            let times = format!("{seconds:.4} | {cpu_seconds:.3} | {rate:.1}");
            println!("| {name} | {who} | {times} | {gb:.2} | {ratio} |");
        };
        let ratio = other.as_ref().map(|o| format!("{:.2}", o.seconds / own.seconds));
        row("flow", &own, ratio.unwrap_or_default());
        if let Some(other) = other {
            row("PyTorch", &other, String::new());
        }
    }
}

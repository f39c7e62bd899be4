//! How fast a step of training is on an NVIDIA GPU, and how much of its memory it takes.
//!
//! ```sh
//! cargo bench --bench gpu                       # every row of the table
//! cargo bench --bench gpu -- smollm2 mistral    # rows whose name holds one of these words
//! cargo bench --bench gpu -- '8 x 1024$'        # ends with them
//! cargo bench --bench gpu -- --peer python3     # PEFT beside it (needs torch, transformers, peft)
//! ```
//!
//! Models are of the shapes of real ones, with random weights. Every row is full, so that padding
//! does not show. Seconds are the median of the steps after the first; memory is all that was taken
//! from the GPU but the CUDA context, for PEFT what PyTorch allocated at most. `benches/gpu.sh`
//! runs the tests on the GPU first.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a bench stops where it cannot go on"
)]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::Result;
use flow::learn::random::Stream;
use flow::learn::{
    AdamWConfig, Compute, Duration, LoraConfig, Method, Model, ModelFiles, Observer, Quantization,
    Row, Schedule, Setup, StepLog, TargetModules, Task, TrainingArguments, Warmup, devices, train,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Steps that are timed, and those before them: the first two also look whether gradients reach
/// every parameter.
const STEPS: usize = 10;
const BEFORE: usize = 4;

/// A row of the table.
#[derive(Debug, Serialize)]
struct Work {
    name: String,
    model: String,
    /// `full`, `lora` or `qlora`.
    method: String,
    r: usize,
    /// Modules; none: all linear ones.
    targets: Vec<String>,
    batch: usize,
    length: usize,
    checkpointing: bool,
    /// Of the adapters' inputs.
    dropout: f64,
    f32: bool,
    steps: usize,
    before: usize,
}

/// What was measured.
#[derive(Debug, Deserialize)]
struct Measured {
    seconds: f64,
    memory_bytes: f64,
}

fn decoder(
    family: &str,
    [hidden, mlp, layers, heads, kv_heads, head, vocab]: [usize; 7],
    tied: bool,
) -> Value {
    let class = format!("{}{}ForCausalLM", family[..1].to_uppercase(), &family[1..]);
    json!({
        "architectures": [class], "model_type": family, "vocab_size": vocab,
        "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": tied, "hidden_act": "silu", "torch_dtype": "bfloat16",
        "sliding_window": null,
    })
}

fn config(model: &str) -> Value {
    match model {
        "mistral-7b" => decoder("mistral", [4096, 14336, 32, 32, 8, 128, 32000], false),
        "smollm2-135m" => decoder("llama", [576, 1536, 30, 9, 3, 64, 49152], true),
        "smollm2-1.7b" => decoder("llama", [2048, 8192, 24, 32, 32, 64, 49152], true),
        "qwen3-0.6b" => decoder("qwen3", [1024, 3072, 28, 16, 8, 128, 151_936], true),
        _ => json!({
            "architectures": ["DistilBertForSequenceClassification"], "model_type": "distilbert",
            "vocab_size": 30522, "dim": 768, "hidden_dim": 3072, "n_layers": 6, "n_heads": 12,
            "max_position_embeddings": 512, "activation": "gelu", "dropout": 0.1,
            "attention_dropout": 0.1, "seq_classif_dropout": 0.2, "pad_token_id": 0,
            "torch_dtype": "bfloat16",
        }),
    }
}

fn works() -> Vec<Work> {
    let qkvo = &["q_proj", "k_proj", "v_proj", "o_proj"][..];
    let work = |model: &str, method: &str, targets: &[&str], batch, length, what: &str| Work {
        name: format!("{model} {method} {batch} x {length}{what}"),
        model: model.to_owned(),
        method: method.to_owned(),
        r: if model == "distilbert" { 8 } else { 16 },
        targets: targets.iter().map(|t| (*t).to_owned()).collect(),
        batch,
        length,
        checkpointing: what.contains("checkpointing"),
        dropout: if what.contains("dropout") { 0.05 } else { 0.0 },
        f32: what.contains("f32"),
        steps: STEPS,
        before: BEFORE,
    };
    let mut all = Vec::new();
    for what in ["", " checkpointing"] {
        for (batch, length) in [(1, 512), (4, 512), (4, 1024), (8, 1024)] {
            all.push(work("mistral-7b", "qlora", qkvo, batch, length, what));
        }
    }
    all.push(work("mistral-7b", "qlora", qkvo, 8, 1024, " dropout"));
    all.push(work("mistral-7b", "lora", qkvo, 8, 1024, ""));
    let small = [("smollm2-135m", 16, 256), ("smollm2-135m", 4, 2048), ("qwen3-0.6b", 4, 2048)];
    for (model, batch, length) in small.into_iter().chain([("smollm2-1.7b", 4, 2048)]) {
        for method in ["lora", "qlora"] {
            all.push(work(model, method, &[], batch, length, ""));
        }
        all.push(work(model, "lora", &[], batch, length, " dropout"));
    }
    for (batch, what) in [(16, " f32"), (16, ""), (64, " f32"), (64, "")] {
        all.push(work("distilbert", "lora", &["q_lin", "v_lin"], batch, 128, what));
    }
    all.push(work("distilbert", "full", &[], 64, 128, ""));
    all
}

/// Names and shapes of a model's tensors.
fn tensors(c: &Value) -> Vec<(String, Vec<usize>)> {
    let n = |key: &str| c[key].as_u64().unwrap() as usize;
    let mut all = Vec::new();
    let mut push = |name: String, shape: &[usize]| all.push((name, shape.to_vec()));
    if c["model_type"] == "distilbert" {
        let (d, mlp) = (n("dim"), n("hidden_dim"));
        let at = |name: &str| format!("distilbert.embeddings.{name}");
        push(at("word_embeddings.weight"), &[n("vocab_size"), d]);
        push(at("position_embeddings.weight"), &[n("max_position_embeddings"), d]);
        push(at("LayerNorm.weight"), &[d]);
        push(at("LayerNorm.bias"), &[d]);
        for i in 0..n("n_layers") {
            let at = |name: &str| format!("distilbert.transformer.layer.{i}.{name}");
            for name in ["q_lin", "k_lin", "v_lin", "out_lin"] {
                push(at(&format!("attention.{name}.weight")), &[d, d]);
                push(at(&format!("attention.{name}.bias")), &[d]);
            }
            for name in ["sa_layer_norm", "output_layer_norm"] {
                push(at(&format!("{name}.weight")), &[d]);
                push(at(&format!("{name}.bias")), &[d]);
            }
            push(at("ffn.lin1.weight"), &[mlp, d]);
            push(at("ffn.lin1.bias"), &[mlp]);
            push(at("ffn.lin2.weight"), &[d, mlp]);
            push(at("ffn.lin2.bias"), &[d]);
        }
        push("pre_classifier.weight".into(), &[d, d]);
        push("pre_classifier.bias".into(), &[d]);
        push("classifier.weight".into(), &[2, d]);
        push("classifier.bias".into(), &[2]);
        return all;
    }
    let (d, mlp, head) = (n("hidden_size"), n("intermediate_size"), n("head_dim"));
    let (wide, narrow) = (n("num_attention_heads") * head, n("num_key_value_heads") * head);
    push("model.embed_tokens.weight".into(), &[n("vocab_size"), d]);
    for i in 0..n("num_hidden_layers") {
        let at = |name: &str| format!("model.layers.{i}.{name}.weight");
        push(at("input_layernorm"), &[d]);
        push(at("post_attention_layernorm"), &[d]);
        push(at("self_attn.q_proj"), &[wide, d]);
        push(at("self_attn.k_proj"), &[narrow, d]);
        push(at("self_attn.v_proj"), &[narrow, d]);
        push(at("self_attn.o_proj"), &[d, wide]);
        if c["model_type"] == "qwen3" {
            push(at("self_attn.q_norm"), &[head]);
            push(at("self_attn.k_norm"), &[head]);
        }
        push(at("mlp.gate_proj"), &[mlp, d]);
        push(at("mlp.up_proj"), &[mlp, d]);
        push(at("mlp.down_proj"), &[d, mlp]);
    }
    push("model.norm.weight".into(), &[d]);
    if c["tie_word_embeddings"] == false {
        push("lm_head.weight".into(), &[n("vocab_size"), d]);
    }
    all
}

/// Writes a model in bf16: norms 1, biases 0, else a block of normal numbers over and over, as 7
/// billion different ones would take longer than the rest of the bench.
fn write_model(dir: &Path, config: &Value) {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let stream = Stream::new(1, "weights");
    let normal = |i: u64| half::bf16::from_f64(0.02 * stream.normal(i)).to_le_bytes();
    let block: Vec<u8> = (0..(1 << 20) + 7).flat_map(normal).collect();
    let (mut header, mut offset) = (serde_json::Map::new(), 0);
    let all = tensors(config);
    for (name, shape) in &all {
        let end = offset + 2 * shape.iter().product::<usize>();
        let entry = json!({ "dtype": "BF16", "shape": shape, "data_offsets": [offset, end] });
        header.insert(name.clone(), entry);
        offset = end;
    }
    let mut header = serde_json::to_vec(&header).unwrap();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut out = BufWriter::new(File::create(dir.join("model.safetensors")).unwrap());
    out.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    out.write_all(&header).unwrap();
    let one = half::bf16::ONE.to_le_bytes();
    for (name, shape) in &all {
        let n: usize = shape.iter().product();
        match shape.len() {
            1 if name.ends_with("bias") => out.write_all(&vec![0; 2 * n]).unwrap(),
            1 => out.write_all(&one.repeat(n)).unwrap(),
            _ => {
                let mut left = 2 * n;
                while left > 0 {
                    let part = left.min(block.len());
                    out.write_all(&block[..part]).unwrap();
                    left -= part;
                }
            }
        }
    }
    out.flush().unwrap();
}

/// Full rows; a causal model predicts every token.
fn rows(work: &Work, vocab: u64, causal: bool) -> Vec<Row> {
    let stream = Stream::new(7, &work.name);
    let row = |i: usize| {
        let s = stream.at(i as u64);
        let ids: Vec<u32> =
            (0..work.length as u64).map(|k| s.below(k, vocab.min(30_000)) as u32).collect();
        let labels = causal.then(|| ids.iter().map(|id| i64::from(*id)).collect());
        Row { ids, types: None, labels, class: (!causal).then_some((i % 2) as u32) }
    };
    (0..work.batch * (work.steps + work.before)).map(row).collect()
}

struct Clock {
    last: Instant,
    times: Vec<f64>,
}

impl Observer for Clock {
    fn step(&mut self, log: &StepLog, _: u64) -> Result<()> {
        assert!(log.loss.is_finite());
        self.times.push(self.last.elapsed().as_secs_f64());
        self.last = Instant::now();
        Ok(())
    }

    fn evaluate(&mut self, _: &Model, _: u64) -> Result<Option<BTreeMap<String, f64>>> {
        Ok(None)
    }
}

fn measure(work: &Work, dir: &Path, config: &Value) -> Result<Measured> {
    let causal = work.model != "distilbert";
    let task = match causal {
        true => Task::CausalLm,
        false => Task::SequenceClassification { classes: 2 },
    };
    let method = match work.method.as_str() {
        "full" => Method::Full,
        "lora" => Method::Lora,
        _ => Method::Qlora,
    };
    let target_modules = match work.targets.is_empty() {
        true => TargetModules::AllLinear,
        false => TargetModules::Names(work.targets.clone()),
    };
    let (r, alpha) = (work.r, 2.0 * work.r as f64);
    let dropout = work.dropout;
    let lora = LoraConfig { r, alpha, dropout, target_modules, use_rslora: false };
    let setup = Setup {
        task: task.clone(),
        method,
        lora: (method != Method::Full).then_some(lora),
        quantization: match method {
            Method::Qlora => Quantization::Nf4 { double: true },
            _ => Quantization::None,
        },
        seed: 1,
        dropout: None,
        compute: if work.f32 { Compute::GpuF32 } else { Compute::GpuBf16 },
        gradient_checkpointing: work.checkpointing,
        frozen: false,
    };
    let weights = vec![("model.safetensors".to_owned(), dir.join("model.safetensors"))];
    let model = Model::load(&ModelFiles { config: dir.join("config.json"), weights }, &setup)?;
    let args = TrainingArguments {
        duration: Duration::Steps((work.steps + work.before) as u64),
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
    let mut clock = Clock { last: Instant::now(), times: Vec::new() };
    let vocab = config["vocab_size"].as_u64().unwrap();
    train(&model, &task, &rows(work, vocab, causal), &args, &mut clock)?;
    let mut times = clock.times.split_off(work.before);
    times.sort_by(f64::total_cmp);
    let memory = model.gpu_memory()?.unwrap_or(0);
    Ok(Measured { seconds: times[times.len() / 2], memory_bytes: memory as f64 })
}

/// The same in PEFT.
fn peer(python: &str, work: &Work, dir: &Path) -> Option<Measured> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/gpu.py");
    let told = serde_json::to_string(work).unwrap();
    let out = Command::new(python).arg(script).arg(dir).arg(told).output().unwrap();
    if !out.status.success() {
        println!("{}", String::from_utf8_lossy(&out.stderr));
        return None;
    }
    serde_json::from_slice(&out.stdout).ok()
}

fn main() {
    let mut words: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let mut python = None;
    if let Some(at) = words.iter().position(|w| w == "--peer") {
        python = words.get(at + 1).cloned();
        words.drain(at..(at + 2).min(words.len()));
    }
    let Some(name) = devices().into_iter().next() else {
        println!("there is no GPU here");
        return;
    };
    println!("{name}");
    println!("{:44} {:>10} {:>8} {:>10} {:>8} {:>6}", "", "flow", "GiB", "PEFT", "GiB", "ratio");
    let dir = tempfile::tempdir_in(std::env::var("FLOW_BENCH_DIR").unwrap_or("/dev/shm".into()));
    let dir = dir.unwrap();
    let mut written = String::new();
    for work in works() {
        let name = format!("{}$", work.name);
        if !words.is_empty() && !words.iter().any(|w| name.contains(w.as_str())) {
            continue;
        }
        let (place, config) = (dir.path().join(&work.model), config(&work.model));
        if written != work.model {
            let _ = fs::remove_dir_all(dir.path().join(&written));
            write_model(&place, &config);
            written.clone_from(&work.model);
        }
        let per_step = match work.model.as_str() {
            "distilbert" => work.batch,
            _ => work.batch * work.length,
        } as f64;
        let gib = |m: &Measured| m.memory_bytes / f64::from(1 << 30);
        let own = match measure(&work, &place, &config) {
            Ok(own) => own,
            Err(e) => {
                println!("{:44} {e:#}", work.name);
                continue;
            }
        };
        print!("{:44} {:>10.0} {:>8.2}", work.name, per_step / own.seconds, gib(&own));
        // bitsandbytes is not asked of the machine: quantized rows stand alone.
        let other = python.as_ref().filter(|_| work.method != "qlora");
        if let Some(other) = other.and_then(|python| peer(python, &work, &place)) {
            let speed = per_step / other.seconds;
            print!(" {speed:>10.0} {:>8.2} {:>6.2}", gib(&other), other.seconds / own.seconds);
        }
        println!();
    }
}

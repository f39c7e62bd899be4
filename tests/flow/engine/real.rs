//! One small pipeline in which every real kind has a step.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use flow::digest::Digest;
use serde_json::{Value, json};

use super::toys::Bench;

/// Local files that the steps read, by name.
pub(crate) fn files() -> BTreeMap<&'static str, String> {
    let adjectives = ["good", "bad", "great", "awful", "fine", "poor", "nice", "dull"];
    let row = |i: usize| format!("{} film {i},{}\n", adjectives[i % 8], (i + 1) % 2);
    let rows: String = (0..32).map(row).collect();
    let corpus: String =
        (0..32).map(|i| format!("a {} film {i} says no more\n", adjectives[i % 8])).collect();
    BTreeMap::from([("rows.csv", format!("text,label\n{rows}")), ("corpus.txt", corpus)])
}

/// The steps, as they are written. `tiny` is a model's folder, made by [`bench`].
pub(crate) fn steps() -> Value {
    json!({
        "rows": { "kind": "fetch", "with": { "files": { "train": "rows.csv" } } },
        "shaped": { "kind": "transform", "with": {
            "data": "${steps.rows}", "rename": { "label": "sentiment" },
            "cast": { "sentiment": "text" }, "filter": "sentiment == '1'",
            "deduplicate": { "near": 0.9 },
        } },
        "twice": { "kind": "combine", "with": {
            "data": ["${steps.rows}", "${steps.rows}"], "how": "interleave", "stop": "all",
            "probabilities": [0.3, 0.7], "seed": 2,
        } },
        "some": { "kind": "sample", "with": {
            "data": "${steps.rows}", "stratify": "label", "seed": 3,
            "rows": { "train": 12, "validation": 4, "test": 4 },
        } },
        "prompts": { "kind": "format", "with": {
            "data": "${steps.some}", "template": "alpaca", "instruction": "Good or bad?",
            "input": "text",
            "output": { "column": "label", "words": { "0": "bad", "1": "good" } },
        } },
        "corpus": { "kind": "fetch", "with": { "files": { "train": "corpus.txt" } } },
        "blank": { "kind": "init_model", "with": blank() },
        "base": { "kind": "model", "with": { "model": "./tiny" } },
        "tokens": { "kind": "tokenize", "with": {
            "data": "${steps.prompts}", "tokenizer": "${steps.base.tokenizer}", "max_length": 320,
        } },
        "look": { "kind": "inspect", "with": {
            "data": "${steps.tokens}", "model": "${steps.base}",
        } },
        "train": { "kind": "train", "with": {
            "data": "${steps.tokens}", "model": "${steps.base}", "method": "lora",
            "lora": { "r": "${sweep.r}" }, "learning_rate": 1e-3, "max_steps": 2, "batch_size": 4,
        } },
        "score": { "kind": "evaluate", "with": {
            "model": "${steps.train}", "data": "${steps.tokens}",
        } },
        "best": { "kind": "select", "with": {
            "among": "${steps.train.*}", "scores": "${steps.score.*}", "metric": "loss",
            "goal": "minimize",
        } },
        "merged": { "kind": "merge", "with": { "model": "${steps.best}" } },
        "speed": { "kind": "benchmark", "with": {
            "model": "${steps.merged}", "batch_size": 1, "length": 4, "warmup": 0, "repeats": 1,
        } },
        "table": { "kind": "compare", "with": {
            "reports": "${steps.score.*}", "models": "${steps.train.*}",
        } },
        "words": { "kind": "command", "with": {
            "run": "tr a-z A-Z < ${files.corpus.txt} > ${out.upper}",
            "files": { "corpus.txt": "corpus.txt" }, "outputs": { "upper": "upper.txt" },
        } },
    })
}

fn blank() -> Value {
    json!({
        "config": {
            "model_type": "llama", "hidden_size": 16, "intermediate_size": 32,
            "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
            "max_position_embeddings": 512, "tie_word_embeddings": true,
        },
        "tokenizer": {
            "data": "${steps.corpus}", "column": "text", "algorithm": "bpe", "vocab_size": 300,
        },
        "seed": 5,
    })
}

/// The pipeline as text; JSON is YAML.
pub(crate) fn pipeline(steps: &Value) -> String {
    format!("sweep: {{ grid: {{ r: [2, 4] }} }}\nsteps: {steps}\n")
}

/// The files of the base model: what `blank` gives, made once.
fn tiny() -> &'static BTreeMap<String, Vec<u8>> {
    static TINY: OnceLock<BTreeMap<String, Vec<u8>>> = OnceLock::new();
    TINY.get_or_init(|| {
        let bench = with_files();
        let all = steps();
        let steps = json!({ "corpus": all["corpus"], "blank": all["blank"] });
        let text = format!("steps: {steps}\noutputs: {{ tiny: \"${{steps.blank}}\" }}\n");
        bench.run(&text);
        let entries = std::fs::read_dir(bench.path("outputs/toy/tiny")).unwrap();
        let files = entries.map(|entry| {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            (name, std::fs::read(path).unwrap())
        });
        files.collect()
    })
}

fn with_files() -> Bench {
    let mut bench = Bench::new();
    bench.kinds = flow::kinds::ALL;
    for (name, text) in files() {
        std::fs::write(bench.path(name), text).unwrap();
    }
    bench
}

/// A folder in which the pipeline runs, with all that it reads.
pub(super) fn bench() -> Bench {
    let bench = with_files();
    std::fs::create_dir(bench.path("tiny")).unwrap();
    for (name, bytes) in tiny() {
        std::fs::write(bench.path("tiny").join(name), bytes).unwrap();
    }
    bench
}

/// The files whose bytes do not depend on the processor, as one digest.
pub(super) fn content() -> Digest {
    let sums = files().into_iter().map(|(name, text)| (name, Digest::of(text.as_bytes())));
    let sums: BTreeMap<&str, Digest> = sums.collect();
    Digest::of_value("files", &serde_json::to_value(sums).unwrap()).unwrap()
}

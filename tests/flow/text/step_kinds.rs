//! The kinds `format`, `tokenize` and `init_model`, run on published trees.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::Result;
use arrow::array::AsArray as _;
use arrow::datatypes::Int32Type;
use flow::digest::Digest;
use flow::hub::{Hub, HubSettings};
use flow::step::{Context, Device, Event, Produced, Step};
use flow::store::Store;
use serde_json::{Value, json};

use super::{chain, corpus, fixture, parquet};

/// A store, and what is needed to run a kind on it.
struct Bench {
    dir: tempfile::TempDir,
    store: Store,
    attempts: AtomicUsize,
}

type Ports = BTreeMap<String, Digest>;

struct Ran {
    ports: Ports,
    warnings: Vec<String>,
    facts: flow::step::Facts,
    log: Vec<String>,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap();
        Self { dir, store, attempts: AtomicUsize::new(0) }
    }

    /// A dataset of splits of (text, label).
    fn dataset(&self, splits: &[(&str, &[(&str, i64)])], classes: &[&str]) -> Value {
        let mut ports = Ports::new();
        for (split, rows) in splits {
            let dir = tempfile::tempdir_in(self.dir.path()).unwrap();
            let texts = rows.iter().map(|(text, _)| *text).collect();
            let labels = rows.iter().map(|(_, label)| *label).collect();
            parquet(&dir.path().join("data.parquet"), &[("text", texts)], Some(("label", labels)));
            let classes = if classes.is_empty() { json!({}) } else { json!({ "label": classes }) };
            let features = json!({
                "rows": rows.len(), "columns": [["text", "Utf8"], ["label", "Int64"]],
                "classes": classes,
            });
            std::fs::write(dir.path().join("features.json"), features.to_string()).unwrap();
            ports.insert((*split).to_owned(), self.store.publish_tree(dir.path()).unwrap());
        }
        edge("dataset", &ports)
    }

    fn reviews(&self) -> Value {
        let train = [("good film", 1), ("bad film", 0), ("a good one", 1)];
        self.dataset(&[("train", &train), ("test", &[("a bad one", 0)])], &[])
    }

    fn run(&self, kind: &str, with: &Value) -> Result<Ran> {
        let step = parse(kind, with)?;
        let hub = Hub::new(HubSettings::new(self.dir.path().join("hub")));
        let n = self.attempts.fetch_add(1, Ordering::Relaxed);
        let attempt = self.dir.path().join(format!("attempt{n}"));
        let (cancel, log) = (AtomicBool::new(false), Mutex::new(Vec::new()));
        let emit = |event| {
            if let Event::Log { line } = event {
                log.lock().unwrap().push(line);
            }
        };
        let mut cx = Context {
            store: self.store.clone(),
            hub: &hub,
            attempt_dir: attempt.clone(),
            dirs: &flow::step::Dirs::default(),
            key: flow::digest::Digest::of(b"key"),
            build: String::new(),
            checkpoint_every: flow::step::CHECKPOINT_EVERY,
            grace: std::time::Duration::from_secs(30),
            threads: 2,
            device: Device::Cpu,
            compute: "f32".into(),
            env: BTreeMap::new(),
            cancel: &cancel,
            emit: &emit,
            rest: &|| {},
            produced: Produced::default(),
        };
        step.check_inputs(&cx)?;
        step.run(&mut cx)?;
        let (warnings, facts) = (cx.produced.warnings, cx.produced.facts);
        let mut ports = Ports::new();
        for port in std::fs::read_dir(attempt.join("out")).unwrap() {
            let port = port.unwrap();
            let tree = self.store.publish_tree(&port.path()).unwrap();
            ports.insert(port.file_name().to_string_lossy().into_owned(), tree);
        }
        let names = step.ports().names.unwrap();
        assert!(ports.keys().eq(names.iter()), "{ports:?} are the ports {names:?}");
        Ok(Ran { ports, warnings, facts, log: log.into_inner().unwrap() })
    }

    fn file(&self, ports: &Ports, port: &str, name: &str) -> PathBuf {
        let tree = self.store.tree(&ports[port]).unwrap().unwrap();
        let entry = tree.entries.iter().find(|e| e.path == name).unwrap();
        self.store.locate(&entry.digest).unwrap().unwrap()
    }

    fn json(&self, ports: &Ports, port: &str, name: &str) -> Value {
        serde_json::from_slice(&std::fs::read(self.file(ports, port, name)).unwrap()).unwrap()
    }

    /// A dataset of one split and one column of texts.
    fn texts(&self, column: &str, texts: Vec<&str>) -> Value {
        let dir = tempfile::tempdir_in(self.dir.path()).unwrap();
        let features = json!({ "rows": texts.len(), "columns": [[column, "Utf8"]], "classes": {} });
        parquet(&dir.path().join("data.parquet"), &[(column, texts)], None);
        std::fs::write(dir.path().join("features.json"), features.to_string()).unwrap();
        let tree = self.store.publish_tree(dir.path()).unwrap();
        edge("dataset", &Ports::from([("train".to_owned(), tree)]))
    }

    fn blank(&self, config: Value, algorithm: &str) -> Ran {
        self.blank_with(config, algorithm, None)
    }

    fn blank_with(&self, config: Value, algorithm: &str, chat_template: Option<&str>) -> Ran {
        let texts = corpus();
        let rows: Vec<(&str, i64)> = texts.iter().map(|t| (t.as_str(), 0)).collect();
        let data = self.dataset(&[("train", &rows)], &[]);
        let mut tokenizer =
            json!({ "data": data, "column": "text", "algorithm": algorithm, "vocab_size": 500 });
        if let Some(template) = chat_template {
            tokenizer["chat_template"] = json!(template);
        }
        let with = json!({ "config": config, "tokenizer": tokenizer, "seed": 7 });
        self.run("init_model", &with).unwrap()
    }
}

fn edge(ty: &str, ports: &Ports) -> Value {
    let names: Vec<&String> = ports.keys().collect();
    json!({ "$input": { "type": ty, "ports": ports, "names": names } })
}

fn parse(kind: &str, with: &Value) -> Result<Box<dyn Step>> {
    let kind = flow::kinds::ALL.iter().find(|k| k.name == kind).unwrap();
    (kind.parse)(with).map_err(|e| anyhow::anyhow!("{}: {}", e.path, e.message))
}

/// (path, message) of every problem.
fn problems(kind: &str, with: &Value) -> Vec<(String, String)> {
    let found = parse(kind, with).unwrap().check();
    found.into_iter().map(|p| (p.path, p.message)).collect()
}

fn alpaca(data: &Value) -> Value {
    json!({
        "data": data, "template": "alpaca", "instruction": "Classify.", "input": "text",
        "output": { "column": "label", "words": { "0": "negative", "1": "positive" } },
    })
}

fn llama() -> Value {
    json!({
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 128,
    })
}

#[test]
fn from_rows_to_tokens() {
    let bench = Bench::new();
    let prompts = bench.run("format", &alpaca(&bench.reviews())).unwrap();
    let info = bench.json(&prompts.ports, "train", "prompts.json");
    assert_eq!(info["rows"], 3);
    assert_eq!(info["task"], "causal_lm");
    assert_eq!(info["candidates"], json!(["negative", "positive"]));
    let samples = bench.json(&prompts.ports, "train", "samples.json");
    assert_eq!(samples[0]["segments"][1], json!({ "kind": "input", "text": "good film" }));
    assert_eq!(samples[0]["label"], 1);
    assert!(prompts.log.iter().any(|line| line.contains("### Instruction:\nClassify.")));

    let blank = bench.blank(llama(), "bpe");
    let with = json!({
        "data": edge("prompts", &prompts.ports), "tokenizer": edge("model", &blank.ports),
        "max_length": 512,
    });
    let tokens = bench.run("tokenize", &with).unwrap();
    let info = bench.json(&tokens.ports, "train", "tokens.json");
    assert_eq!(
        (&info["rows"], &info["dropped"], &info["truncated"]),
        (&json!(3), &json!(0), &json!(0))
    );
    assert_eq!(
        (&info["bos_id"], &info["eos_id"], &info["vocab_size"]),
        (&json!(0), &json!(1), &json!(500))
    );
    assert_eq!(info["tokenizer"], json!(blank.ports["tokenizer"]));
    let candidates = info["candidates"].as_array().unwrap();
    assert_eq!(candidates[0]["word"], "negative");
    assert_eq!(candidates[1]["ids"].as_array().unwrap().last(), Some(&json!(1)));
    let samples = bench.json(&tokens.ports, "test", "samples.json");
    assert_eq!(samples[0]["tokens"][0], "<s>");
    assert_eq!(samples[0]["target"].as_array().unwrap().last(), Some(&json!(true)));
    assert!(tokens.warnings.is_empty());

    // what is left out is told, and an empty split is not made
    let too_short = json!({
        "data": edge("prompts", &prompts.ports), "tokenizer": edge("model", &blank.ports),
        "max_length": 20,
    });
    let said = chain(&bench.run("tokenize", &too_short).err().unwrap());
    assert!(said.contains("no row of `test` is left: 1 are too long"), "{said}");
}

#[test]
fn chunks_that_are_known_are_not_encoded_again() {
    let bench = Bench::new();
    let blank = bench.blank(llama(), "bpe");
    let texts: Vec<String> =
        (0..2000).map(|i| format!("film {i} {}", "was good ".repeat(i % 23))).collect();
    let tokens = |edited: bool, max_length: usize| {
        let mut rows: Vec<(&str, i64)> = texts.iter().map(|t| (t.as_str(), 1)).collect();
        if edited {
            rows[1234] = ("another one", 0);
        }
        let data = bench.dataset(&[("train", &rows), ("test", &[("a bad one", 0)])], &[]);
        let prompts = bench.run("format", &alpaca(&data)).unwrap();
        let with = json!({
            "data": edge("prompts", &prompts.ports), "tokenizer": edge("model", &blank.ports),
            "max_length": max_length,
        });
        let ran = bench.run("tokenize", &with).unwrap();
        let told = ran.facts["chunks"].as_str().unwrap().to_owned();
        let mut numbers = told.split(' ').filter_map(|word| word.parse::<u32>().ok());
        (ran.ports, numbers.next().unwrap(), numbers.next().unwrap())
    };
    let (first, made, all) = tokens(false, 512);
    assert!(made == all && all > 10, "{made} of {all}");
    let (again, made, _) = tokens(false, 512);
    assert_eq!((&again, made), (&first, 0));
    let (edited, made, _) = tokens(true, 512);
    assert!((1..4).contains(&made), "{made} of {all}");
    assert_eq!(edited["test"], first["test"]);
    // with other limits nothing is known
    let (_, made, all) = tokens(true, 256);
    assert_eq!(made, all);
    // with none of it known the result is the same
    std::fs::remove_dir_all(bench.store.root().join("memos")).unwrap();
    let (cold, made, all) = tokens(true, 512);
    assert_eq!((cold, made), (edited, all));
}

#[test]
fn a_split_depends_on_its_rows_alone() {
    let bench = Bench::new();
    let train = [("good film", 1), ("bad film", 0)];
    let few = bench.dataset(&[("train", &train), ("test", &[("a bad one", 0)])], &[]);
    let test = [("a bad one", 0), ("a good one", 1)];
    let more = bench.dataset(&[("train", &train), ("test", &test)], &[]);
    let few = bench.run("format", &alpaca(&few)).unwrap();
    let more = bench.run("format", &alpaca(&more)).unwrap();
    assert_eq!(few.ports["train"], more.ports["train"]);
    assert_ne!(few.ports["test"], more.ports["test"]);
}

#[test]
fn classes_for_encoders() {
    let bench = Bench::new();
    let with = |data: &Value| {
        let template = "classification";
        json!({ "data": data, "template": template, "input": "text", "label": "label" })
    };
    let plain = bench.run("format", &with(&bench.reviews())).unwrap();
    let info = bench.json(&plain.ports, "test", "prompts.json");
    assert_eq!(
        (&info["task"], &info["classes"]),
        (&json!("sequence_classification"), &json!(["0", "1"]))
    );
    let named = bench.dataset(&[("train", &[("a", 1), ("b", 0)])], &["neg", "pos"]);
    let named = bench.run("format", &with(&named)).unwrap();
    assert_eq!(bench.json(&named.ports, "train", "prompts.json")["classes"], json!(["neg", "pos"]));

    let bert = json!({
        "model_type": "distilbert", "dim": 32, "hidden_dim": 64, "n_layers": 1, "n_heads": 2,
        "max_position_embeddings": 64,
    });
    let blank = bench.blank(bert, "wordpiece");
    let with = json!({
        "data": edge("prompts", &plain.ports), "tokenizer": edge("model", &blank.ports),
        "max_length": 4, "truncate": "right",
    });
    let tokens = bench.run("tokenize", &with).unwrap();
    let info = bench.json(&tokens.ports, "train", "tokens.json");
    assert_eq!((&info["longest"], &info["classes"]), (&json!(4), &json!(["0", "1"])));
    assert!(tokens.warnings.iter().any(|w| w.contains("were shortened")), "{:?}", tokens.warnings);
}

#[test]
fn labels_and_columns_that_do_not_fit() {
    let bench = Bench::new();
    let strange = bench.dataset(&[("train", &[("a", 1), ("b", 7)])], &["neg", "pos"]);
    let said = chain(&bench.run("format", &alpaca(&strange)).err().unwrap());
    assert!(said.contains("split `train`: row 2") && said.contains("label `7`"), "{said}");
    let with =
        json!({ "data": strange, "template": "classification", "input": "text", "label": "label" });
    let said = chain(&bench.run("format", &with).err().unwrap());
    assert!(said.contains("row 2") && said.contains("`7` is outside the classes"), "{said}");
    assert!(said.contains("0 `neg`, 1 `pos`"), "{said}");

    let mut with = alpaca(&bench.reviews());
    with["input"] = json!("txet");
    let said = chain(&bench.run("format", &with).err().unwrap());
    assert!(
        said.contains("has no column `txet`") && said.contains("did you mean `text`"),
        "{said}"
    );
    assert!(said.contains("(text, label)"), "{said}");
}

#[test]
fn what_a_template_needs_and_does_not_read() {
    let bench = Bench::new();
    let data = bench.reviews();
    let with = |fields: Value| {
        let mut with = json!({ "data": data });
        for (name, value) in fields.as_object().unwrap() {
            with[name] = value.clone();
        }
        problems("format", &with)
    };
    let messages = |found: Vec<(String, String)>| -> Vec<String> {
        found.into_iter().map(|(path, message)| format!("{path}: {message}")).collect()
    };
    assert_eq!(with(json!({ "template": "alpaca", "instruction": "x", "output": "label" })), []);
    assert_eq!(
        messages(with(json!({ "template": "alpaca", "output": "label", "label": "label" }))),
        [
            "label: template `alpaca` does not read `label`",
            ": template `alpaca` needs `instruction`"
        ]
    );
    assert_eq!(
        messages(with(json!({ "template": "chat", "instruction": "x", "output": "label" }))),
        [": template `chat` needs `tokenizer`"]
    );
    assert_eq!(
        messages(with(json!({ "template": "classification", "input": "text" }))),
        [": template `classification` needs `label`"]
    );
    let own = json!({ "template": "own", "output": "label", "own": { "prompt": "{text" } });
    assert_eq!(messages(with(own)), ["own.prompt: `{` is never closed"]);
    let words = json!({ "column": "label", "words": { "0": "yes", "1": "yes" } });
    let same = json!({ "template": "completion", "output": words });
    assert_eq!(messages(with(same)), ["output.words.1: `yes` stands for two labels"]);
    let own = json!({ "prompt": "{text} {output}" });
    let own = json!({ "template": "own", "output": "label", "own": own });
    assert_eq!(messages(with(own)), ["own: the prompt shows the answer: `{output}`"]);
    let own = json!({ "template": "own", "output": "label", "own": { "prompt": "{text}" } });
    assert_eq!(messages(with(own.clone())), [] as [&str; 0]);
    let mut unused = own;
    unused["system"] = json!("Be good.");
    assert_eq!(messages(with(unused)), ["own: the wording does not use `system`"]);
    let dated = json!({ "template": "chat", "output": "label", "input": "text", "date": "today" });
    assert!(messages(with(dated)).contains(&"date: `today` is not a date like 2026-01-31".into()));

    // mistakes inside `output` are placed
    let bad = json!({ "data": data, "template": "alpaca", "output": { "colum": "label" } });
    let said = parse("format", &bad).err().unwrap().to_string();
    assert!(said.starts_with("output") && said.contains("unknown field `colum`"), "{said}");
    let bad = json!({ "data": data, "template": "alpaka" });
    let said = parse("format", &bad).err().unwrap().to_string();
    assert!(said.starts_with("template") && said.contains("alpaca-seed"), "{said}");
}

#[test]
fn a_model_from_nothing_is_the_same_every_time() {
    let bench = Bench::new();
    let (one, two) = (bench.blank(llama(), "bpe"), bench.blank(llama(), "bpe"));
    assert_eq!(one.ports, two.ports);
    let config = bench.json(&one.ports, "config", "config.json");
    assert_eq!(config["vocab_size"], 500);
    assert_eq!((&config["bos_token_id"], &config["eos_token_id"]), (&json!(0), &json!(1)));
    assert_eq!((&config["pad_token_id"], &config["hidden_size"]), (&json!(2), &json!(32)));

    let data = bench.reviews();
    let with = |config: Value, split: &str| {
        let tokenizer = json!({
            "data": data, "split": split, "column": "text", "algorithm": "bpe", "vocab_size": 300,
        });
        problems("init_model", &json!({ "config": config, "tokenizer": tokenizer }))
    };
    assert_eq!(with(llama(), "train"), []);
    assert_eq!(with(llama(), "trian")[0].0, "tokenizer.split");
    let tokenizer = json!({
        "data": data, "column": "text", "algorithm": "bpe", "vocab_size": 259,
        "chat_template": "{% for %}",
    });
    let found = problems("init_model", &json!({ "config": llama(), "tokenizer": tokenizer }));
    let paths: Vec<&str> = found.iter().map(|(path, _)| path.as_str()).collect();
    assert_eq!(paths, ["tokenizer.vocab_size", "tokenizer.chat_template"]);
    let mut config = llama();
    config["vocab_size"] = json!(9);
    assert_eq!(with(config, "train")[0].0, "config.vocab_size");
    let found = with(json!({ "model_type": "gpt9" }), "train");
    assert!(found[0].1.contains("`gpt9` is not supported"), "{found:?}");
}

/// Labels of the first three rows of a split.
fn labels(bench: &Bench, made: &Ran) -> Vec<i64> {
    let samples = bench.json(&made.ports, "train", "samples.json");
    samples.as_array().unwrap().iter().map(|row| row["label"].as_i64().unwrap()).collect()
}

#[test]
fn class_names_that_are_numbers() {
    let bench = Bench::new();
    let stars = ["1", "2", "3", "4", "5"];
    let rows = [("bad", 0), ("poor", 1), ("best", 4)];
    let named = bench.dataset(&[("train", &rows)], &stars);
    let classification = |data: &Value, classes: &[&str]| {
        let mut with = json!({
            "data": data, "template": "classification", "input": "text", "label": "label",
        });
        if !classes.is_empty() {
            with["classes"] = json!(classes);
        }
        bench.run("format", &with).unwrap()
    };
    assert_eq!(labels(&bench, &classification(&named, &[])), [0, 1, 4]);
    // the column holds the names where no header says that it holds indices
    let plain = bench.dataset(&[("train", &[("bad", 1), ("poor", 2), ("best", 5)])], &[]);
    assert_eq!(labels(&bench, &classification(&plain, &stars)), [0, 1, 4]);
    let plain = bench.dataset(&[("train", &rows)], &[]);
    assert_eq!(labels(&bench, &classification(&plain, &stars)), [0, 1, 4]);
    let codes = bench.dataset(&[("train", &[("a", 9000), ("b", 100)])], &[]);
    let made = classification(&codes, &[]);
    assert_eq!(labels(&bench, &made), [1, 0]);
    assert_eq!(bench.json(&made.ports, "train", "prompts.json")["classes"], json!(["100", "9000"]));

    let worded = |words: Value| {
        let mut with = alpaca(&named);
        with["output"] = json!({ "column": "label", "words": words });
        let made = bench.run("format", &with).unwrap();
        let samples = bench.json(&made.ports, "train", "samples.json");
        let segments = samples[2]["segments"].as_array().unwrap();
        segments.last().unwrap()["text"].as_str().unwrap().to_owned()
    };
    let names = json!({ "1": "awful", "2": "poor", "3": "fair", "4": "good", "5": "great" });
    assert_eq!(worded(names), "great");
    let indices = json!({ "0": "awful", "1": "poor", "2": "fair", "3": "good", "4": "great" });
    assert_eq!(worded(indices), "great");
}

#[test]
fn long_rows_keep_their_whole_answers() {
    let bench = Bench::new();
    let lines = std::fs::read_to_string(fixture("long_reviews.jsonl")).unwrap();
    let rows: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let rows: Vec<(&str, i64)> = rows
        .iter()
        .map(|row| (row["text"].as_str().unwrap(), row["label"].as_i64().unwrap()))
        .collect();
    assert!(rows.iter().all(|(text, _)| text.split_whitespace().count() > 300));
    let mut with = alpaca(&bench.dataset(&[("train", &rows)], &[]));
    with["output"]["words"] = json!({ "0": "negative", "1": "positive and more than that" });
    with["template"] = json!("own");
    with["own"] = json!({ "prompt": "{instruction}\n### Review:\n{input}\n\n### Response:" });
    let prompts = bench.run("format", &with).unwrap();
    let blank = bench.blank(llama(), "bpe");
    let with = json!({
        "data": edge("prompts", &prompts.ports), "tokenizer": edge("model", &blank.ports),
        "max_length": 128,
    });
    let tokens = bench.run("tokenize", &with).unwrap();
    let info = bench.json(&tokens.ports, "train", "tokens.json");
    assert_eq!((&info["rows"], &info["truncated"]), (&json!(8), &json!(8)));
    assert_eq!((&info["dropped"], &info["end_ids"]), (&json!(0), &json!([1])));
    assert!(info["longest"].as_u64().unwrap() <= 128);

    let file = std::fs::File::open(bench.file(&tokens.ports, "train", "data.parquet")).unwrap();
    let reader =
        parquet::arrow::arrow_reader::ParquetRecordBatchReader::try_new(file, 100).unwrap();
    let batch = reader.into_iter().next().unwrap().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    std::fs::copy(bench.file(&blank.ports, "tokenizer", "tokenizer.json"), &path).unwrap();
    let tokenizer = super::load(dir.path());
    let list = |name: &str, row: usize| -> Vec<i32> {
        let lists = batch.column_by_name(name).unwrap().as_list::<i32>().value(row);
        lists.as_primitive::<Int32Type>().values().to_vec()
    };
    let mut prompts = std::collections::BTreeSet::new();
    for (at, (text, label)) in rows.iter().enumerate() {
        let (ids, labels) = (list("input_ids", at), list("labels", at));
        assert!(ids.len() <= 128);
        let part = |learnt: bool| {
            let both = ids.iter().zip(&labels).filter(|(_, label)| (**label >= 0) == learnt);
            let ids: Vec<u32> = both.map(|(id, _)| u32::try_from(*id).unwrap()).collect();
            (ids.len(), tokenizer.decode(&ids, false).unwrap())
        };
        let word = ["negative</s>", "positive and more than that</s>"];
        assert_eq!(part(true).1, word[usize::try_from(*label).unwrap()]);
        let (length, prompt) = part(false);
        assert!(
            prompt.starts_with("<s>Classify.\n### Review:\n")
                && prompt.ends_with("\n\n### Response:")
        );
        let left = prompt.split("### Review:\n").nth(1).unwrap().split("\n\n### Resp").next();
        assert!(text.starts_with(left.unwrap()) && !left.unwrap().is_empty());
        prompts.insert(length);
    }
    let spread = prompts.last().unwrap() - prompts.first().unwrap();
    assert!(spread <= 3, "the answer does not show in the prompt's length: {prompts:?}");
}

#[test]
fn conversations_in_json_and_those_that_are_refused() {
    let bench = Bench::new();
    let template = std::fs::read_to_string(fixture("strict.jinja")).unwrap();
    let chatty = bench.blank_with(llama(), "bpe", Some(&template));
    let says = |role: &str, text: &str| json!({ "role": role, "content": text });
    let talk = |first: &str| json!([says(first, "Hi"), says("assistant", "Yes")]);
    let call = json!([
        { "role": "user", "content": "Hi" },
        { "role": "assistant", "content": null, "tool_calls": [{ "name": "look" }] },
    ]);
    let rows = [talk("user").to_string(), talk("assistant").to_string(), call.to_string()];
    let data = bench.texts("messages", rows.iter().map(String::as_str).collect());
    let mut with = json!({
        "data": data, "template": "chat", "messages": "messages",
        "tokenizer": edge("model", &chatty.ports),
    });
    let said = chain(&bench.run("format", &with).err().unwrap());
    assert!(said.contains("row 2") && said.contains("roles must alternate"), "{said}");
    assert!(said.contains("on_refused: drop"), "{said}");
    with["on_refused"] = json!("drop");
    let made = bench.run("format", &with).unwrap();
    assert_eq!(bench.json(&made.ports, "train", "prompts.json")["rows"], 1);
    let warned = made.warnings.iter().any(|w| w.starts_with("2 rows of `train` were left out"));
    assert!(warned, "{:?}", made.warnings);

    // the template writes no BOS, which the tokenizer puts before other texts
    let with_tokens = json!({
        "data": edge("prompts", &made.ports), "tokenizer": edge("model", &chatty.ports),
        "max_length": 64,
    });
    let tokens = bench.run("tokenize", &with_tokens).unwrap();
    let warned = tokens.warnings.iter().any(|w| w.contains("1 of 1 rows of `train` do not begin"));
    assert!(warned, "{:?}", tokens.warnings);

    let data = bench.texts("messages", vec!["not JSON"]);
    with["data"] = data;
    let said = chain(&bench.run("format", &with).err().unwrap());
    assert!(said.contains("no row is left: row 1") && said.contains("JSON"), "{said}");
    with["data"] = bench.reviews();
    with["messages"] = json!("label");
    let said = chain(&bench.run("format", &with).err().unwrap());
    assert!(said.contains("column `label` of split `test` holds Int64"), "{said}");
}

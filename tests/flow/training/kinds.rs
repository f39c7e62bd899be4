//! The kinds around models, run one after the other through a store.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use anyhow::Result;
use arrow::array::{ArrayRef, Int32Array, ListArray, RecordBatch};
use arrow::datatypes::Int32Type;
use flow::artifact::{ReportFile, TrainedInfo, View};
use flow::digest::Digest;
use flow::hub::{Hub, HubSettings};
use flow::learn::Row;
use flow::source::advice;
use flow::step::{Context, Device, Event, Facts, Produced};
use flow::store::Store;
use parquet::arrow::ArrowWriter;
use serde_json::{Value, json};

use super::{ANSWERS, EOS, VOCABULARY, decoder, encoder, model, rows};

/// A store, and what stands for the engine in front of it.
pub(super) struct Bench {
    dir: tempfile::TempDir,
    store: Store,
    hub: Hub,
    attempts: RefCell<usize>,
    /// A run is stopped after so many steps.
    stop_after: Cell<Option<u64>>,
}

/// What a step made.
pub(super) struct Made {
    ty: &'static str,
    pub(super) ports: BTreeMap<String, Digest>,
    facts: Facts,
    warnings: Vec<String>,
    events: Vec<Event>,
}

impl Made {
    pub(super) fn input(&self) -> Value {
        json!({ "$input": self.binding() })
    }

    fn binding(&self) -> Value {
        json!({ "type": self.ty, "ports": self.ports, "facts": self.facts })
    }
}

fn gather(members: &[(Value, &Made)]) -> Value {
    let members =
        members.iter().map(|(point, made)| json!({ "point": point, "input": made.binding() }));
    json!({ "$gather": { "members": members.collect::<Vec<_>>() } })
}

impl Bench {
    pub(super) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap();
        let hub = Hub::new(HubSettings::new(dir.path().join("hub")));
        Self { dir, store, hub, attempts: RefCell::new(0), stop_after: Cell::new(None) }
    }

    fn fresh_dir(&self) -> std::path::PathBuf {
        *self.attempts.borrow_mut() += 1;
        let dir = self.dir.path().join(format!("attempt{}", self.attempts.borrow()));
        fs::create_dir(&dir).unwrap();
        dir
    }

    fn publish(&self, ty: &'static str, ports: &[(&str, &Path)]) -> Made {
        let ports = ports
            .iter()
            .map(|(name, dir)| ((*name).to_owned(), self.store.publish_tree(dir).unwrap()));
        let ports = ports.collect();
        Made { ty, ports, facts: Facts::new(), warnings: Vec::new(), events: Vec::new() }
    }

    /// Does what an attempt does: parse, narrow, check on headers, run, publish.
    pub(super) fn run(&self, kind: &str, ty: &'static str, with: Value) -> Result<Made> {
        let row = flow::kinds::ALL.iter().find(|k| k.name == kind).unwrap();
        let mut step = (row.parse)(&with).map_err(|e| anyhow::anyhow!("{e:?}"))?;
        let problems = step.check();
        anyhow::ensure!(problems.is_empty(), "{problems:?}");
        step.narrow();
        let attempt_dir = self.fresh_dir();
        let cancel = AtomicBool::new(false);
        let events = Arc::new(Mutex::new(Vec::new()));
        let stop_after = self.stop_after.get();
        let emit = |event: Event| {
            if matches!(&event, Event::Progress { done, .. } if Some(*done) == stop_after) {
                cancel.store(true, Ordering::Relaxed);
            }
            events.lock().unwrap().push(event);
        };
        let mut cx = Context {
            store: self.store.clone(),
            hub: &self.hub,
            attempt_dir: attempt_dir.clone(),
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
        let Produced { adopted: mut ports, facts, warnings, .. } = cx.produced;
        let out = attempt_dir.join("out");
        if out.exists() {
            for entry in fs::read_dir(out).unwrap() {
                let entry = entry.unwrap();
                let name = entry.file_name().to_string_lossy().into_owned();
                ports.insert(name, self.store.publish_tree(&entry.path()).unwrap());
            }
        }
        assert_eq!(step.ports().ty.name(), ty);
        if let Some(names) = step.ports().names {
            assert_eq!(names, ports.keys().cloned().collect::<Vec<_>>());
        }
        let events = std::mem::take(&mut *events.lock().unwrap());
        Ok(Made { ty, ports, facts, warnings, events })
    }

    fn view(&self, made: &Made) -> View {
        let ports = made.ports.clone();
        View { ty: made.ty.parse().unwrap(), ports, store: self.store.clone() }
    }

    fn report(&self, made: &Made) -> ReportFile {
        self.view(made).json("report", "report.json").unwrap()
    }

    /// A random model with a tokenizer of one word per id.
    pub(super) fn base(&self, config: &Value) -> Made {
        let dir = self.fresh_dir();
        let (c, w, t) = (dir.join("c"), dir.join("w"), dir.join("t"));
        for dir in [&c, &w, &t] {
            fs::create_dir(dir).unwrap();
        }
        let files = model(&dir, config);
        fs::rename(files.config, c.join("config.json")).unwrap();
        fs::write(c.join("source.json"), r#"{"name": "org/tiny"}"#).unwrap();
        fs::rename(&files.weights[0].1, w.join("model.safetensors")).unwrap();
        let vocab: BTreeMap<String, u32> = (0..VOCABULARY).map(|i| (format!("t{i}"), i)).collect();
        let model = json!({ "type": "WordLevel", "vocab": vocab, "unk_token": "t0" });
        let tokenizer = json!({ "version": "1.0", "added_tokens": [], "model": model });
        fs::write(t.join("tokenizer.json"), tokenizer.to_string()).unwrap();
        self.publish("model", &[("config", &c), ("weights", &w), ("tokenizer", &t)])
    }

    pub(super) fn tokens(&self, splits: &[(&str, Vec<Row>)], causal: bool, info: &Value) -> Made {
        let dir = self.fresh_dir();
        let mut ports = Vec::new();
        for (split, rows) in splits {
            let out = dir.join(split);
            fs::create_dir(&out).unwrap();
            write(&out.join("data.parquet"), rows, causal);
            let longest = rows.iter().map(|r| r.ids.len()).max().unwrap_or_default();
            let mut all = json!({
                "task": if causal { "causal_lm" } else { "sequence_classification" },
                "rows": rows.len(), "truncated": 0, "dropped": 0, "tokens": 0,
                "target_tokens": 0, "longest": longest, "max_length": 32,
                "vocab_size": VOCABULARY, "pad_id": null, "eos_id": EOS, "bos_id": null,
                "tokenizer": null,
            });
            for (key, value) in info.as_object().unwrap() {
                all[key] = value.clone();
            }
            fs::write(out.join("tokens.json"), all.to_string()).unwrap();
            ports.push((*split, out));
        }
        let ports: Vec<(&str, &Path)> = ports.iter().map(|(n, p)| (*n, p.as_path())).collect();
        self.publish("tokens", &ports)
    }
}

fn write(path: &Path, rows: &[Row], causal: bool) {
    let list = |get: &dyn Fn(&Row) -> Vec<i32>| -> ArrayRef {
        let rows = rows.iter().map(|r| Some(get(r).into_iter().map(Some).collect::<Vec<_>>()));
        Arc::new(ListArray::from_iter_primitive::<Int32Type, _, _>(rows))
    };
    let classes: Vec<i32> = rows.iter().map(|r| r.class.unwrap() as i32).collect();
    let ids = list(&|r| r.ids.iter().map(|x| *x as i32).collect());
    let mut columns = vec![("input_ids", ids)];
    if causal {
        let labels = |r: &Row| r.labels.iter().flatten().map(|x| *x as i32).collect();
        columns.push(("labels", list(&labels)));
    }
    columns.push(("label", Arc::new(Int32Array::from(classes))));
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    let file = File::create(path).unwrap();
    let mut writer = ArrowWriter::try_new(file, batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

pub(super) fn words() -> Value {
    let candidate =
        |i: usize| json!({ "word": format!("t{}", ANSWERS[i]), "ids": [ANSWERS[i], EOS] });
    json!({ "candidates": [candidate(0), candidate(1)] })
}

fn classes() -> Value {
    json!({ "classes": ["negative", "positive"] })
}

#[test]
fn a_sweep_of_qlora_from_tokens_to_a_table() {
    let bench = Bench::new();
    let base = bench.base(&decoder());
    let splits = [
        ("train", rows(200, 1, true)),
        ("validation", rows(40, 2, true)),
        ("test", rows(100, 3, true)),
    ];
    let tokens = bench.tokens(&splits, true, &words());
    let mut trained = Vec::new();
    for (r, rate) in [(2, 1e-5), (8, 1e-2)] {
        let with = json!({
            "data": tokens.input(), "model": base.input(), "method": "qlora",
            "lora": { "r": r, "alpha": 2 * r }, "learning_rate": rate,
            "warmup_ratio": 0.1, "epochs": 4,
        });
        trained.push((json!({ "lora.r": r }), bench.run("train", "trained_model", with).unwrap()));
    }
    let made = &trained[1].1;
    let info: TrainedInfo = bench.view(made).json("trained", "trained.json").unwrap();
    assert_eq!((info.method.as_str(), info.quantization.as_str()), ("qlora", "nf4-double"));
    assert_eq!((info.base.as_str(), made.ports["weights"]), ("org/tiny", base.ports["weights"]));
    let history: Value = bench.view(made).json("trained", "history.json").unwrap();
    assert_eq!(history["steps"].as_array().unwrap().len(), 100);
    assert_eq!(history["evaluations"].as_array().unwrap().len(), 4);
    assert_eq!(made.facts["trainable_parameters"], json!(info.trainable_parameters));
    assert!(made.facts["adapter_bytes"].as_u64().unwrap() > 4 * info.trainable_parameters);
    let curve = made
        .events
        .iter()
        .filter(|e| matches!(e, Event::Metric { name, .. } if name == "eval/loss"));
    assert_eq!(curve.count(), 4);
    let said = |e: &Event| matches!(e, Event::Log { line } if line.starts_with("trainable params"));
    assert!(made.events.iter().any(said));

    let evaluate = |model: &Made, extra: Value| {
        let mut with = json!({ "model": model.input(), "data": tokens.input() });
        for (key, value) in extra.as_object().unwrap() {
            with[key] = value.clone();
        }
        bench.run("evaluate", "report", with).unwrap()
    };
    let scores: Vec<(Value, Made)> = trained
        .iter()
        .map(|(p, m)| (p.clone(), evaluate(m, json!({ "split": "validation" }))))
        .collect();
    let pairs = |of: &'_ [(Value, Made)]| -> Value {
        let members: Vec<(Value, &Made)> = of.iter().map(|(p, m)| (p.clone(), m)).collect();
        gather(&members)
    };
    let with = json!({
        "among": pairs(&trained), "scores": pairs(&scores), "metric": "loss", "goal": "minimize",
    });
    let best = bench.run("select", "trained_model", with).unwrap();
    assert_eq!(best.ports, made.ports);
    assert_eq!(best.facts["selected"], json!("lora.r=8"));

    let report = evaluate(&best, json!({ "samples": 2, "max_new_tokens": 3 }));
    let file = bench.report(&report);
    assert!(file.metrics["accuracy"] > 0.85, "{:?}", file.metrics);
    assert_eq!((file.metrics["n"], file.metrics["target_tokens"]), (100.0, 200.0));
    let perplexity = file.metrics["loss"].exp();
    assert!((file.metrics["perplexity"] - perplexity).abs() < 1e-9);
    assert_eq!(file.details["samples"].as_array().unwrap().len(), 2);
    assert_eq!(file.details["samples"][1]["target"], json!("t7"));
    let lines = bench.view(&report).file("report", "predictions.jsonl").unwrap();
    assert_eq!(fs::read_to_string(lines).unwrap().lines().count(), 100);

    let merged = bench.run("merge", "model", json!({ "model": best.input() })).unwrap();
    assert!(merged.facts["max_rel_difference"].as_f64().unwrap() < 1e-3);
    assert_eq!(merged.ports["tokenizer"], base.ports["tokenizer"]);
    let after = bench.report(&evaluate(&merged, json!({})));
    assert!((after.metrics["accuracy"] - file.metrics["accuracy"]).abs() < 0.02);
    assert!((after.metrics["loss"] - file.metrics["loss"]).abs() < 1e-2);

    let with = json!({ "model": merged.input(), "batch_size": 2, "length": 8, "repeats": 3 });
    let speed = bench.run("benchmark", "report", with).unwrap();
    assert!(bench.report(&speed).metrics["latency_ms"] > 0.0);

    let speeds = [(json!({ "lora.r": 8 }), speed)];
    let with = json!({
        "reports": pairs(&scores), "models": pairs(&trained),
        "benchmarks": { "merged": pairs(&speeds) },
        "reference": { "lora.r": 8 }, "within": { "points": 1 },
    });
    let table = bench.run("compare", "report", with).unwrap();
    let file = bench.report(&table);
    let row = &file.details["rows"][1];
    assert_eq!(row["point"], json!({ "lora.r": 8 }));
    for column in ["accuracy", "f1", "trainable_parameters", "adapter_bytes", "merged_latency_ms"] {
        assert!(row["values"][column].is_number(), "{column}");
    }
    assert!(file.details["rows"][0]["values"]["merged_latency_ms"].is_null());
    assert!(file.title.starts_with("no: accuracy of lora.r=2"), "{}", file.title);
    let text = bench.view(&table).file("report", "report.md").unwrap();
    assert!(fs::read_to_string(text).unwrap().contains("| lora.r=8 |"));
}

#[test]
fn full_training_of_a_classifier_goes_through_the_same_steps() {
    let bench = Bench::new();
    let base = bench.base(&encoder());
    let splits = [("train", rows(160, 1, false)), ("test", rows(60, 2, false))];
    let tokens = bench.tokens(&splits, false, &classes());
    let train = |seed: u64| {
        let with = json!({
            "data": tokens.input(), "model": base.input(), "method": "full",
            "learning_rate": 3e-3, "epochs": 3, "seed": seed,
        });
        bench.run("train", "trained_model", with).unwrap()
    };
    let trained = train(1);
    assert_eq!(trained.ports, train(1).ports, "the same step gives the same bytes");
    assert_ne!(trained.ports["trained"], train(2).ports["trained"]);
    assert_eq!(trained.facts["trainable_percent"], json!(100.0));
    let evaluate = |model: &Made| {
        let with = json!({ "model": model.input(), "data": tokens.input() });
        let made = bench.run("evaluate", "report", with).unwrap();
        (bench.report(&made), made.warnings)
    };
    let (report, warnings) = evaluate(&trained);
    assert!(report.metrics["accuracy"] > 0.9, "{:?}", report.metrics);
    assert!(warnings.is_empty());
    assert_eq!(report.details["classes"], json!(["negative", "positive"]));
    let merged = bench.run("merge", "model", json!({ "model": trained.input() })).unwrap();
    assert_eq!(evaluate(&merged).0.metrics, report.metrics);
    assert_eq!(evaluate(&base).1.len(), 1, "a base without a head is warned of");
}

/// Rows of the other class names order: what was class 0 is class 1.
fn swapped(mut rows: Vec<Row>) -> Vec<Row> {
    rows.iter_mut().for_each(|row| row.class = row.class.map(|class| 1 - class));
    rows
}

#[test]
fn classes_are_matched_by_name() {
    let bench = Bench::new();
    let base = bench.base(&encoder());
    let splits = [("train", rows(160, 1, false)), ("test", rows(61, 2, false))];
    let tokens = bench.tokens(&splits, false, &classes());
    let with = json!({
        "data": tokens.input(), "model": base.input(), "method": "full",
        "learning_rate": 3e-3, "epochs": 3,
    });
    let trained = bench.run("train", "trained_model", with).unwrap();
    let evaluate = |model: &Made, test: Vec<Row>, names: [&str; 2]| {
        let data = bench.tokens(&[("test", test)], false, &json!({ "classes": names }));
        let with = json!({ "model": model.input(), "data": data.input() });
        bench.run("evaluate", "report", with).map(|made| bench.report(&made))
    };
    let own = evaluate(&trained, rows(61, 2, false), ["negative", "positive"]).unwrap();
    assert!(own.metrics["accuracy"] > 0.9, "{:?}", own.metrics);
    let other = evaluate(&trained, swapped(rows(61, 2, false)), ["Positive", "Negative"]).unwrap();
    assert_eq!(other.details["classes"], json!(["Positive", "Negative"]));
    for metric in ["accuracy", "loss", "macro_f1"] {
        assert!((own.metrics[metric] - other.metrics[metric]).abs() < 1e-9, "{metric}");
    }
    let (own, other) = (&own.details["confusion"], &other.details["confusion"]);
    assert_eq!((&own[0][0], &own[0][1]), (&other[1][1], &other[1][0]));
    let err = evaluate(&trained, rows(4, 2, false), ["sports", "politics"]).unwrap_err();
    let text = format!("{err:#} {}", advice(&err).join(" "));
    for part in ["`negative`, `positive`", "`sports`, `politics`", "`classes`"] {
        assert!(text.contains(part), "{text}");
    }
}

#[test]
fn what_a_model_says_must_be_a_number() {
    let bench = Bench::new();
    let base = bench.base(&decoder());
    // All of the row is to be predicted: what it is a sample of begins with its first tokens.
    let mut data = rows(5, 2, true);
    for row in &mut data {
        row.labels = Some(row.ids.iter().map(|id| i64::from(*id)).collect());
    }
    let tokens = bench.tokens(&[("test", data.clone())], true, &json!({}));
    let with = json!({
        "model": base.input(), "data": tokens.input(), "samples": 1, "max_new_tokens": 2,
    });
    let report = bench.report(&bench.run("evaluate", "report", with.clone()).unwrap());
    let sample = &report.details["samples"][0];
    let said = |key: &str| sample[key].as_str().unwrap().split_whitespace().count();
    assert_eq!(said("prompt"), data[0].ids.len().div_ceil(2).min(8));
    assert_eq!(said("prompt") + said("target"), data[0].ids.len() - 1, "but for the end");

    // One token whose vector is no number spoils the rows that it is in, and no others.
    let bad = data[3].ids.iter().find(|id| !data[..3].iter().any(|r| r.ids.contains(id)));
    let dir = bench.fresh_dir();
    let weights = bench.view(&base).file("weights", "model.safetensors").unwrap();
    let mut tensors = candle_core::safetensors::load(weights, &candle_core::Device::Cpu).unwrap();
    let name = "model.embed_tokens.weight";
    let mut vectors = tensors[name].to_vec2::<f32>().unwrap();
    vectors[*bad.unwrap() as usize][0] = f32::NAN;
    let vectors = candle_core::Tensor::new(vectors, &candle_core::Device::Cpu).unwrap();
    tensors.insert("lm_head.weight".into(), tensors[name].clone());
    tensors.insert(name.into(), vectors);
    candle_core::safetensors::save(&tensors, dir.join("model.safetensors")).unwrap();
    let mut config = decoder();
    config["tie_word_embeddings"] = json!(false);
    let spoilt = bench.base(&config);
    let mut ports = spoilt.ports.clone();
    ports.insert("weights".into(), bench.store.publish_tree(&dir).unwrap());
    let spoilt = Made { ports, ..spoilt };
    let with = json!({ "model": spoilt.input(), "data": tokens.input(), "batch_size": 2 });
    let err = bench.run("evaluate", "report", with).err().unwrap();
    assert!(err.to_string().contains("the likelihood of row 3 is NaN"), "{err:#}");
}

#[test]
fn only_the_splits_that_are_read_are_in_the_key() {
    let bench = Bench::new();
    let base = bench.base(&encoder());
    let splits = ["test", "train", "validation"].map(|s| (s, rows(4, 1, false)));
    let tokens = bench.tokens(&splits, false, &classes());
    let ports = |kind: &str, extra: Value| {
        let row = flow::kinds::ALL.iter().find(|k| k.name == kind).unwrap();
        let mut with = json!({ "data": tokens.input(), "model": base.input() });
        for (key, value) in extra.as_object().unwrap() {
            with[key] = value.clone();
        }
        let mut step = (row.parse)(&with).unwrap();
        step.narrow();
        let ports = step.key_params()["data"]["$input"]["ports"].clone();
        ports.as_object().unwrap().keys().cloned().collect::<Vec<_>>()
    };
    assert_eq!(ports("train", json!({ "method": "full" })), ["train", "validation"]);
    let no = json!({ "method": "full", "eval_strategy": "no" });
    assert_eq!(ports("train", no), ["train"]);
    assert_eq!(ports("evaluate", json!({})), ["test"]);
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let bench = Bench::new();
    let base = bench.base(&encoder());
    let refused = |data: &Made, extra: Value| {
        let mut with = json!({ "data": data.input(), "model": base.input(), "method": "full" });
        for (key, value) in extra.as_object().unwrap() {
            with[key] = value.clone();
        }
        let err = bench.run("train", "trained_model", with).err().unwrap();
        format!("{err:#} {}", advice(&err).join(" "))
    };
    let good = bench.tokens(&[("train", rows(8, 1, false))], false, &classes());
    let with_info = |info: Value| bench.tokens(&[("train", rows(8, 1, false))], false, &info);

    let text = refused(&with_info(json!({ "longest": 48 })), json!({}));
    assert!(text.contains("48 tokens") && text.contains("max_length: 32"), "{text}");
    let text = refused(&with_info(json!({ "vocab_size": 50 })), json!({}));
    assert!(text.contains("50 tokens") && text.contains("40 rows"), "{text}");
    let lora = json!({ "method": "lora", "lora": { "target_modules": ["q_proj"] } });
    let text = refused(&good, lora);
    assert!(text.contains("q_proj") && text.contains("q_lin"), "{text}");
    let one: Vec<Row> = rows(16, 1, false).into_iter().step_by(2).collect();
    let text = refused(&bench.tokens(&[("train", one)], false, &classes()), json!({}));
    assert!(text.contains("all 8 rows of `train` are of class `0 (negative)`"), "{text}");
    let causal = bench.tokens(&[("train", rows(8, 1, true))], true, &words());
    let text = refused(&causal, json!({}));
    assert!(text.contains("encoder"), "{text}");
    let text = refused(&good, json!({ "split": "trian" }));
    assert!(text.contains("trian"), "{text}");
}

#[test]
fn evaluations_that_cannot_be_are_refused_before_training() {
    let bench = Bench::new();
    let base = bench.base(&decoder());
    let train = |data: &Made, extra: Value| {
        let mut with = json!({
            "data": data.input(), "model": base.input(), "method": "lora",
            "lora": { "r": 2 }, "max_steps": 2, "metric_for_best": "accuracy",
        });
        for (key, value) in extra.as_object().unwrap() {
            with[key] = value.clone();
        }
        bench.run("train", "trained_model", with)
    };
    let text = |made: Result<Made>| {
        let err = made.err().unwrap();
        format!("{err:#} {}", advice(&err).join(" "))
    };
    let splits = || [("train", rows(16, 1, true)), ("validation", rows(6, 2, true))];
    let prompt = splits()[1].1.iter().map(|r| r.prompt().len()).max().unwrap();
    // The rows fit the model's 32 positions, the longer answer behind the longest prompt does not.
    let long = |n: usize| {
        let mut info = words();
        info["candidates"][1]["ids"] = json!(vec![7; n]);
        bench.tokens(&splits(), true, &info)
    };
    let refused = text(train(&long(33 - prompt), json!({})));
    assert!(refused.contains(&format!("{prompt} tokens")), "{refused}");
    assert!(refused.contains("`t7`") && refused.contains("32 positions"), "{refused}");
    assert!(refused.contains(&format!("max_length: {prompt}")), "{refused}");
    train(&long(32 - prompt), json!({})).unwrap();
    // Where the answers are not compared they need no room.
    train(&long(33 - prompt), json!({ "metric_for_best": "loss" })).unwrap();
    let made = train(&long(33 - prompt), json!({ "eval_strategy": "no" })).unwrap();
    assert!(made.warnings.iter().any(|w| w.contains("metric_for_best")), "{:?}", made.warnings);

    let wordless = bench.tokens(&splits(), true, &json!({}));
    let refused = text(train(&wordless, json!({})));
    assert!(refused.contains("no metric `accuracy`") && refused.contains("words"), "{refused}");
}

#[test]
fn mistakes_in_fields_are_found_before_anything_runs() {
    let row = flow::kinds::ALL.iter().find(|k| k.name == "train").unwrap();
    let problems = |extra: Value| {
        let edge = |ty: &str| json!({ "$input": { "type": ty } });
        let mut with = json!({ "data": edge("tokens"), "model": edge("model"), "method": "lora" });
        for (key, value) in extra.as_object().unwrap() {
            with[key] = value.clone();
        }
        let step = (row.parse)(&with).unwrap();
        step.check().into_iter().map(|p| p.path).collect::<Vec<_>>()
    };
    let lora = json!({ "r": 8 });
    assert_eq!(problems(json!({ "lora": lora })), Vec::<String>::new());
    assert_eq!(problems(json!({})), [""]);
    assert_eq!(problems(json!({ "method": "full", "lora": lora })), ["lora"]);
    let dropped = json!({ "method": "full", "lora": { "target_modules": "all-linear" } });
    assert_eq!(problems(dropped), Vec::<String>::new());
    let both = json!({ "lora": lora, "epochs": 1, "max_steps": 2, "quantization": {} });
    assert_eq!(problems(both), ["max_steps", "quantization"]);
    let ranges = json!({
        "lora": { "r": 0, "dropout": 1.0 }, "learning_rate": -1.0, "batch_size": 0,
    });
    assert_eq!(problems(ranges), ["learning_rate", "batch_size", "lora.r", "lora.dropout"]);
    let metric = |name: &str| problems(json!({ "lora": lora, "metric_for_best": name }));
    assert_eq!(metric("macro_f1"), Vec::<String>::new());
    assert_eq!(metric("acuracy"), ["metric_for_best"]);
    assert_eq!(metric("eval_loss"), ["metric_for_best"]);
}

#[test]
fn an_interrupted_training_goes_on_where_it_stopped() {
    let train = |bench: &Bench| {
        let base = bench.base(&encoder());
        let splits = [("train", rows(64, 1, false)), ("validation", rows(20, 2, false))];
        let tokens = bench.tokens(&splits, false, &classes());
        let with = json!({
            "data": tokens.input(), "model": base.input(), "method": "lora",
            "lora": { "r": 2, "alpha": 4, "dropout": 0.1 }, "learning_rate": 1e-2,
            "batch_size": 8, "epochs": 3,
        });
        bench.run("train", "trained_model", with)
    };
    let whole = train(&Bench::new()).unwrap();
    let bench = Bench::new();
    bench.stop_after.set(Some(13));
    assert_eq!(train(&bench).err().unwrap().to_string(), "interrupted");
    bench.stop_after.set(None);
    let made = train(&bench).unwrap();
    let resumed = |e: &Event| matches!(e, Event::Log { line } if line == "resumes: after step 13");
    assert!(made.events.iter().any(resumed), "{:?}", made.events);
    assert_eq!(made.ports, whole.ports);
    assert_eq!(made.facts["tokens"], whole.facts["tokens"]);
}

#[test]
fn a_tokenizer_larger_than_the_embedding_is_refused_on_headers() {
    let bench = Bench::new();
    let base = bench.base(&encoder());
    let train = |vocab: u32| {
        let mut info = classes();
        info["vocab_size"] = json!(vocab);
        let tokens = bench.tokens(&[("train", rows(16, 1, false))], false, &info);
        let with = json!({
            "data": tokens.input(), "model": base.input(), "method": "full", "max_steps": 2,
        });
        bench.run("train", "trained_model", with)
    };
    train(VOCABULARY).unwrap();
    let refused = format!("{:#}", train(VOCABULARY + 1).err().unwrap());
    assert!(refused.contains("has 41 tokens") && refused.contains("40"), "{refused}");
}

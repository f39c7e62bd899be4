//! The kinds that bring data and models in, each run as the engine runs it: fetch, model, sample,
//! command.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::Result;
use flow::data::{self, OnError, Reading, Table};
use flow::digest::Digest;
use flow::hub::{Hub, HubSettings};
use flow::kinds;
use flow::lineage::Lock;
use flow::source::advice;
use flow::step::{Context, Device, Event, Outside, Step};
use flow::store::Store;
use serde_json::{Value, json};

use super::{CSV, ints, texts, write};

/// A store, a hub client that must not be asked, and a folder of files.
pub(super) struct Room {
    pub(super) dir: tempfile::TempDir,
    store: Store,
    pub(super) hub: Hub,
    attempts: AtomicUsize,
    cancel: AtomicBool,
}

#[derive(Debug)]
pub(super) struct Ran {
    pub(super) ports: BTreeMap<String, Digest>,
    pub(super) warnings: Vec<String>,
    pub(super) log: Vec<String>,
}

impl Room {
    pub(super) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap();
        let mut settings = HubSettings::new(dir.path().join("hub"));
        settings.offline = true;
        let (attempts, cancel) = (AtomicUsize::new(0), AtomicBool::new(false));
        Self { dir, store, hub: Hub::new(settings), attempts, cancel }
    }

    pub(super) fn file(&self, name: &str, content: impl AsRef<[u8]>) {
        write(self.dir.path(), name, content);
    }

    pub(super) fn parse(kind: &str, with: &Value) -> Result<Box<dyn Step>, String> {
        let row = kinds::ALL.iter().find(|k| k.name == kind).unwrap();
        (row.parse)(with).map_err(|bad| format!("{}: {}", bad.path, bad.message))
    }

    fn resolve(&self, step: &mut dyn Step) -> Result<()> {
        let mut lock = Lock::default();
        let (hub, store) = (&self.hub, &self.store);
        let (dir, lock, files) = (self.dir.path(), &mut lock, &mut BTreeMap::new());
        step.resolve(&mut Outside { dir, lock, hub, store, files })
    }

    /// The life of a step as the engine lives it, without the cache.
    pub(super) fn run(&self, kind: &str, with: Value) -> Result<Ran> {
        let step = Self::parse(kind, &with).map_err(anyhow::Error::msg)?;
        let problems = step.check();
        assert!(problems.is_empty(), "{problems:?}");
        self.run_step(step)
    }

    fn run_step(&self, mut step: Box<dyn Step>) -> Result<Ran> {
        self.resolve(step.as_mut())?;
        step.narrow();
        let n = self.attempts.fetch_add(1, Ordering::Relaxed);
        let attempt = self.store.root().join("attempts").join(n.to_string());
        std::fs::create_dir_all(&attempt).unwrap();
        let log = Mutex::new(Vec::new());
        let emit = |event: Event| {
            if let Event::Log { line } = event {
                log.lock().unwrap().push(line);
            }
        };
        let mut cx = Context {
            store: self.store.clone(),
            hub: &self.hub,
            attempt_dir: attempt.clone(),
            dirs: &flow::step::Dirs::default(),
            key: flow::digest::Digest::of(b"key"),
            build: String::new(),
            checkpoint_every: flow::step::CHECKPOINT_EVERY,
            grace: std::time::Duration::from_secs(30),
            threads: 1,
            device: Device::Cpu,
            compute: "f32".into(),
            env: BTreeMap::from([("GREETING".to_owned(), "hello".to_owned())]),
            cancel: &self.cancel,
            emit: &emit,
            rest: &|| {},
            produced: flow::step::Produced::default(),
        };
        step.check_inputs(&cx)?;
        step.run(&mut cx)?;
        let produced = cx.produced;
        let mut ports = BTreeMap::new();
        for item in std::fs::read_dir(attempt.join("out")).unwrap().flatten() {
            let port = item.file_name().to_string_lossy().into_owned();
            let referenced = produced.referenced.get(&port).cloned().unwrap_or_default();
            let tree = self.store.publish_tree_with(&item.path(), &referenced).unwrap();
            ports.insert(port, tree);
        }
        if let Some(names) = step.ports().names {
            assert_eq!(names.iter().collect::<std::collections::BTreeSet<_>>().len(), ports.len());
        }
        let log = log.into_inner().unwrap();
        Ok(Ran { ports, warnings: produced.warnings, log })
    }

    pub(super) fn files(&self, ran: &Ran, port: &str) -> BTreeMap<String, PathBuf> {
        let tree = self.store.tree(&ran.ports[port]).unwrap().unwrap();
        let entries = tree.entries.into_iter();
        entries.map(|e| (e.path, self.store.locate(&e.digest).unwrap().unwrap())).collect()
    }

    pub(super) fn table(&self, ran: &Ran, split: &str) -> Table {
        let path = &self.files(ran, split)["data.parquet"];
        data::read(path, Reading::new("data.parquet", OnError::Fail)).unwrap()
    }

    pub(super) fn features(&self, ran: &Ran, split: &str) -> Value {
        let text = std::fs::read(&self.files(ran, split)["features.json"]).unwrap();
        serde_json::from_slice(&text).unwrap()
    }
}

pub(super) fn edge(ty: &str, ran: &Ran) -> Value {
    json!({ "$input": { "type": ty, "edge": 0, "ports": ran.ports } })
}

fn lines(rows: impl IntoIterator<Item = (usize, i64)>) -> String {
    let rows = rows.into_iter();
    rows.map(|(i, label)| format!("{{\"text\": \"row {i}\", \"label\": {label}}}\n")).collect()
}

/// Like IMDB: all of one class, then all of the other.
fn imdb(room: &Room) -> Ran {
    room.file("imdb/train.jsonl", lines((0..1000).map(|i| (i, i64::from(i >= 500)))));
    room.file("imdb/test.jsonl", lines((0..400).map(|i| (5000 + i, i64::from(i >= 200)))));
    room.run("fetch", json!({ "files": "imdb" })).unwrap()
}

#[test]
fn fetch_finds_splits_and_keeps_columns() {
    let room = Room::new();
    let ran = imdb(&room);
    assert_eq!(ran.ports.keys().collect::<Vec<_>>(), ["test", "train"]);
    let features = room.features(&ran, "test");
    assert_eq!(features["rows"], 400);
    assert_eq!(features["columns"], json!([["text", "Utf8"], ["label", "Int64"]]));
    let with = json!({
        "files": { "train": ["imdb/train.jsonl", "imdb/test.jsonl"], "dev": "imdb/test.jsonl" },
        "splits": ["train"], "columns": ["label"], "rename": { "label": "y" },
    });
    let ran = room.run("fetch", with).unwrap();
    assert_eq!(ran.ports.keys().collect::<Vec<_>>(), ["train"]);
    let table = room.table(&ran, "train");
    assert_eq!((table.rows(), table.columns()), (1400, vec!["y"]));
}

#[test]
fn fetch_counts_the_rows_it_leaves_out() {
    let room = Room::new();
    room.file("a.jsonl", "{\"a\": 1}\nnonsense\n{\"a\": 2}\n");
    let e = room.run("fetch", json!({ "files": "a.jsonl" })).unwrap_err();
    assert!(format!("{e:#}").contains("a.jsonl, row 2"), "{e:#}");
    let ran = room.run("fetch", json!({ "files": "a.jsonl", "on_error": "skip" })).unwrap();
    assert_eq!(room.table(&ran, "train").rows(), 2);
    assert!(ran.warnings[0].starts_with("1 rows"), "{:?}", ran.warnings);
}

#[test]
fn fetch_says_what_there_is() {
    let room = Room::new();
    room.file("d/train.csv", CSV);
    let e = room.run("fetch", json!({ "files": "d", "splits": ["test"] })).unwrap_err();
    assert!(e.to_string().contains("`train`"), "{e}");
    let e = room.run("fetch", json!({ "files": "d", "columns": ["lable"] })).unwrap_err();
    assert!(advice(&e)[0].contains("`label`"), "{e:?}");
    let e = room.run("fetch", json!({ "files": "nowhere" })).unwrap_err();
    assert!(e.to_string().contains("nowhere"), "{e}");
}

#[test]
fn a_link_keeps_the_name_that_was_written() {
    let room = Room::new();
    room.file("hub/blobs/0123", CSV);
    room.file("hub/snapshots/main/x", "");
    let link = room.dir.path().join("hub/snapshots/main/train.csv");
    std::os::unix::fs::symlink("../../blobs/0123", link).unwrap();
    let with = json!({ "files": "hub/snapshots/main/train.csv" });
    let ran = room.run("fetch", with).unwrap();
    assert_eq!(room.table(&ran, "train").rows(), 2);
}

#[test]
fn fetch_names_what_it_leaves_out() {
    let room = Room::new();
    room.file("d/reviews.csv", CSV);
    room.file("d/LICENSE.txt", "Permission is granted\n");
    for files in [json!("d"), json!({ "train": "d" })] {
        let ran = room.run("fetch", json!({ "files": files })).unwrap();
        assert_eq!(ints(&room.table(&ran, "train"), "label"), [Some(1), Some(0)]);
        assert!(ran.warnings[0].ends_with("left out: LICENSE.txt"), "{:?}", ran.warnings);
    }
    room.file("none/a.jsonl", "");
    let e = room.run("fetch", json!({ "files": "none" })).unwrap_err();
    assert!(format!("{e:#}").contains("a.jsonl"), "{e:#}");
}

#[test]
fn fetch_refuses_what_cannot_be() {
    for (with, want) in [
        (json!({}), "nothing says"),
        (json!({ "dataset": "a/b", "files": "x.csv" }), "exclude"),
        (json!({ "dataset": "a/b", "splits": ["train[:2000]"] }), "not the name of a split"),
        (json!({ "files": "x.csv", "config": "c" }), "belongs to `dataset`"),
        (json!({ "url": "https://x/y", "sha256": "12" }), "64 hex digits"),
        (json!({ "files": { "a/b": "x.csv" } }), "not the name of a split"),
    ] {
        let problems = Room::parse("fetch", &with).unwrap().check();
        assert!(problems.iter().any(|p| p.message.contains(want)), "{with}: {problems:?}");
    }
    assert!(Room::parse("fetch", &json!({ "files": 3 })).is_err());
    assert!(Room::parse("fetch", &json!({ "fils": "x" })).is_err());
}

#[test]
fn the_key_of_a_fetch_holds_content_not_paths() {
    let key = |room: &Room, at: &str| {
        let mut step = Room::parse("fetch", &json!({ "files": at })).unwrap();
        room.resolve(step.as_mut()).unwrap();
        step.key_params()
    };
    let room = Room::new();
    room.file("one/train.csv", CSV);
    room.file("two/train.csv", CSV);
    room.file("three/train.csv", CSV.replace("bad", "sad"));
    assert_eq!(key(&room, "one"), key(&room, "two"));
    assert_ne!(key(&room, "one"), key(&room, "three"));
    // A name says a format, so another name is another dataset.
    room.file("four/train.txt", CSV);
    assert_ne!(key(&room, "one/train.csv"), key(&room, "four/train.txt"));
}

#[test]
fn sample_is_stratified_disjoint_and_independent_by_split() {
    let room = Room::new();
    let data = imdb(&room);
    let sample = |rows: Value, seed: u64| {
        let data = edge("dataset", &data);
        let with = json!({ "data": data, "stratify": "label", "rows": rows, "seed": seed });
        room.run("sample", with).unwrap()
    };
    let one = sample(json!({ "train": 300, "validation": 100, "test": 50 }), 42);
    let table = room.table(&one, "train");
    let ones = ints(&table, "label").into_iter().filter(|l| *l == Some(1)).count();
    assert_eq!((table.rows(), ones), (300, 150));
    assert_eq!(room.features(&one, "validation")["rows"], 100);
    let train = texts(&table, "text");
    let validation = texts(&room.table(&one, "validation"), "text");
    assert!(validation.iter().all(|t| !train.contains(t)));
    assert!(texts(&room.table(&one, "test"), "text").iter().all(|t| t.starts_with("row 5")));

    let two = sample(json!({ "train": 300, "validation": 120, "test": 200 }), 42);
    assert_eq!(one.ports["train"], two.ports["train"]);
    let three = sample(json!({ "train": 200, "validation": 100 }), 42);
    assert_eq!(one.ports["validation"], three.ports["validation"]);
    let four = sample(json!({ "train": 300, "validation": 100, "test": 50 }), 43);
    assert_ne!(one.ports["train"], four.ports["train"]);
}

#[test]
fn sample_by_fraction() {
    let room = Room::new();
    let data = edge("dataset", &imdb(&room));
    let fraction = json!({ "train": 0.9, "validation": 0.1 });
    let ran = room.run("sample", json!({ "data": data, "fraction": fraction })).unwrap();
    assert_eq!(room.features(&ran, "train")["rows"], 900);
    assert_eq!(room.features(&ran, "validation")["rows"], 100);
    let ran = room.run("sample", json!({ "data": data })).unwrap();
    assert_eq!(ran.ports.keys().collect::<Vec<_>>(), ["test", "train"]);
    assert_eq!(room.features(&ran, "train")["rows"], 1000);
}

#[test]
fn sample_says_what_it_cannot_draw() {
    let room = Room::new();
    let data = edge("dataset", &imdb(&room));
    let with = json!({ "data": data, "fraction": { "validation": 0.0001 } });
    let e = room.run("sample", with).unwrap_err().to_string();
    assert!(e.contains("`validation`") && e.contains("1,000"), "{e}");
    let problems = |data: &Value, rows: Value| {
        Room::parse("sample", &json!({ "data": data, "rows": rows })).unwrap().check()
    };
    let message = problems(&data, json!({ "../x": 1 }))[0].message.clone();
    assert!(message.contains("not the name of a split"), "{message}");
    room.file("only/test.csv", CSV);
    let only = edge("dataset", &room.run("fetch", json!({ "files": "only" })).unwrap());
    let want = "the data has neither `validation` nor `train`";
    assert_eq!(problems(&only, json!({ "validation": 1 }))[0].message, want);
    // The same once the data is there, which is when its splits may first be known.
    let step = Room::parse("sample", &json!({ "data": only, "rows": { "validation": 1 } }));
    let e = room.run_step(step.unwrap()).unwrap_err();
    assert_eq!(e.to_string(), want);
    assert!(advice(&e)[0].contains("`test`"), "{e:?}");
}

#[test]
fn sample_refuses_slices_that_teach_nothing() {
    let room = Room::new();
    let data = edge("dataset", &imdb(&room));
    let with = |more: Value| {
        let mut with = json!({ "data": data, "shuffle": false });
        with.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        room.run("sample", with)
    };
    let e = with(json!({ "rows": { "train": 500 } })).unwrap_err();
    assert_eq!(e.to_string(), "all 500 rows of `train` have label 0");
    assert!(advice(&e)[0].contains("allow_one_class"), "{e:?}");
    let e = with(json!({ "rows": { "train": 1000 } })).unwrap_err().to_string();
    assert!(e.contains("sorted by `label`") && e.contains("1,000"), "{e}");
    with(json!({ "rows": { "train": 500 }, "allow_one_class": true })).unwrap();
    with(json!({ "rows": { "train": 1000 }, "allow_sorted": true })).unwrap();
    let e = with(json!({ "rows": { "train": 1001 } })).unwrap_err().to_string();
    assert!(e.contains("1,001") && e.contains("1,000"), "{e}");
    let e = with(json!({ "stratify": "lable" })).unwrap_err();
    assert!(advice(&e)[0].contains("`label`"), "{e:?}");
}

#[test]
fn sample_names_the_class_and_depends_only_on_what_it_reads() {
    let room = Room::new();
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/data/reviews.parquet");
    let files = json!({ "train": fixture, "test": fixture });
    let data = room.run("fetch", json!({ "files": files })).unwrap();
    assert_eq!(room.features(&data, "train")["classes"]["label"], json!(["neg", "pos"]));
    let mut step = Room::parse(
        "sample",
        &json!({ "data": edge("dataset", &data), "rows": { "train": 2, "validation": 1 } }),
    )
    .unwrap();
    step.narrow();
    let ports = step.params()["data"]["$input"]["ports"].clone();
    assert_eq!(ports.as_object().unwrap().keys().collect::<Vec<_>>(), ["train"]);

    room.file("neg/train.csv", "text,label\na,0\nb,0\nc,0\n");
    let one = room.run("fetch", json!({ "files": "neg" })).unwrap();
    let e = room.run("sample", json!({ "data": edge("dataset", &one) })).unwrap_err();
    assert_eq!(e.to_string(), "all 3 rows of `train` have label 0");
}

pub(super) fn safetensors(names: &[&str]) -> Vec<u8> {
    let header: Vec<String> = names
        .iter()
        .enumerate()
        .map(|(i, n)| {
            let (from, to) = (i * 4, i * 4 + 4);
            format!(r#""{n}":{{"dtype":"F32","shape":[1],"data_offsets":[{from},{to}]}}"#)
        })
        .collect();
    let header = format!("{{{}}}", header.join(","));
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend(std::iter::repeat_n(7, names.len() * 4));
    bytes
}

pub(super) fn model_folder(room: &Room, name: &str) {
    room.file(&format!("{name}/config.json"), "{}");
    room.file(&format!("{name}/tokenizer.json"), "{}");
    room.file(&format!("{name}/vocab.txt"), "a\n");
    room.file(&format!("{name}/README.md"), "not part of it");
}

#[test]
fn a_model_folder_has_three_ports() {
    let room = Room::new();
    model_folder(&room, "tiny");
    room.file("tiny/model.safetensors", safetensors(&["a", "b"]));
    let ran = room.run("model", json!({ "model": "./tiny" })).unwrap();
    let names = |port| room.files(&ran, port).into_keys().collect::<Vec<_>>();
    assert_eq!(names("config"), ["config.json", "source.json"]);
    assert_eq!(names("tokenizer"), ["tokenizer.json", "vocab.txt"]);
    assert_eq!(names("weights"), ["model.safetensors"]);
    let source = std::fs::read_to_string(&room.files(&ran, "config")["source.json"]).unwrap();
    assert!(source.contains("\"tiny\""), "{source}");
    // The weights stay where they are.
    let weights = &room.files(&ran, "weights")["model.safetensors"];
    assert_eq!(*weights, room.dir.path().join("tiny/model.safetensors").canonicalize().unwrap());
}

#[test]
fn a_sharded_model_must_be_whole() {
    let room = Room::new();
    model_folder(&room, "big");
    let index = r#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}"#;
    room.file("big/model.safetensors.index.json", index);
    room.file("big/model-1.safetensors", safetensors(&["a"]));
    let fails = || room.run("model", json!({ "model": "./big" })).unwrap_err();
    assert!(fails().to_string().contains("model-2.safetensors"));
    room.file("big/model-2.safetensors", safetensors(&["c"]));
    assert!(fails().to_string().contains("`b`"));
    room.file("big/model-2.safetensors", &safetensors(&["b"])[..20]);
    assert!(format!("{:#}", fails()).contains("damaged"));
    room.file("big/model-2.safetensors", safetensors(&["b"]));
    let ran = room.run("model", json!({ "model": "./big" })).unwrap();
    assert_eq!(room.files(&ran, "weights").len(), 3);
}

#[test]
fn a_model_that_is_none_says_what_lacks() {
    let room = Room::new();
    let fails = |with: Value| room.run("model", with).unwrap_err();
    room.file("adapter/adapter_config.json", "{}");
    let e = fails(json!({ "model": "./adapter" }));
    assert!(advice(&e)[0].contains("PEFT"), "{e:?}");
    model_folder(&room, "old");
    room.file("old/pytorch_model.bin", "x");
    let e = fails(json!({ "model": "./old" }));
    assert!(advice(&e)[0].contains("safetensors"), "{e:?}");
    room.file("slow/config.json", "{}");
    room.file("slow/vocab.txt", "a\n");
    let e = fails(json!({ "model": "./slow" }));
    assert!(advice(&e)[0].contains("vocab.txt"), "{e:?}");
    // No look-up of a hub's model without a network.
    let e = fails(json!({ "model": "org/name" }));
    assert!(advice(&e)[0].contains("HF_HUB_OFFLINE"), "{e:?}");
}

#[test]
fn a_command_reads_and_writes_what_it_declares() {
    let room = Room::new();
    let data = imdb(&room);
    room.file("tools/count.sh", "#!/bin/sh\nwc -l < \"$1\" | tr -d ' '\n");
    let run = json!({ "$text": [
        "ls ",
        edge("dataset", &data),
        " > ${out.list} && sh ${files.count.sh} ${files.rows.txt} > ${out.list}.count\n\
         echo $GREETING $HOME_IS_NOT_SET; echo problem >&2\n\
         cat \"$FLOW_INPUT_data/train/features.json\" > \"$FLOW_OUT_copy/f.json\"",
    ]});
    room.file("rows.txt", "a\nb\n");
    let ran = room
        .run(
            "command",
            json!({
                "run": run,
                "inputs": { "data": edge("dataset", &data) },
                "files": { "count.sh": "tools/count.sh", "rows.txt": "rows.txt" },
                "outputs": { "list": "list.txt", "copy": "copy/" },
            }),
        )
        .unwrap();
    let text =
        |port: &str, path: &str| std::fs::read_to_string(&room.files(&ran, port)[path]).unwrap();
    assert_eq!(text("list", "list.txt"), "test\ntrain\n");
    assert_eq!(text("list", "list.txt.count"), "2\n");
    assert!(text("copy", "copy/f.json").contains("1000"));
    assert!(ran.log.contains(&"hello".to_owned()) && ran.log.contains(&"problem".to_owned()));
}

#[test]
fn a_command_that_fails_says_how() {
    let room = Room::new();
    let run = |run: &str| {
        room.run("command", json!({ "run": run, "outputs": { "x": "x.txt", "d": "d/" } }))
    };
    let e = run("echo first; echo last words >&2; exit 3").unwrap_err();
    assert!(e.to_string().contains("status 3"), "{e}");
    assert!(advice(&e)[0].contains("last words"), "{e:?}");
    let e = run("true").unwrap_err();
    assert!(e.to_string().contains("output `d`"), "{e}");
    let e = run("echo 1 > ${out.d}/1").unwrap_err();
    assert!(e.to_string().contains("output `x`"), "{e}");
    // What the user's environment holds does not reach it.
    let e = run("if env | cut -d= -f1 | grep -v -x -E \
                 'PATH|HOME|LANG|LC_ALL|TMPDIR|GREETING|FLOW_OUT_.|PWD|OLDPWD|SHLVL|_'; \
                 then exit 9; fi");
    let e = e.unwrap_err();
    assert!(e.to_string().contains("output `d`"), "something else is set: {:?}", advice(&e));
}

#[test]
fn a_command_ends_with_the_run() {
    let room = Room::new();
    let started = std::time::Instant::now();
    let e = std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(std::time::Duration::from_millis(300));
            room.cancel.store(true, Ordering::Relaxed);
        });
        let run = "sleep 60 & sleep 60; wait";
        room.run("command", json!({ "run": run, "outputs": { "x": "x" } })).unwrap_err()
    });
    assert_eq!(e.to_string(), "interrupted");
    assert!(started.elapsed() < std::time::Duration::from_secs(20));
}

#[test]
fn a_command_cannot_change_what_it_reads() {
    let room = Room::new();
    model_folder(&room, "tiny");
    room.file("tiny/model.safetensors", safetensors(&["a"]));
    let model = room.run("model", json!({ "model": "./tiny" })).unwrap();
    let run = "cd inputs/m && ls -l > ${out.x} && chmod u+w model.safetensors && \
               echo more >> model.safetensors";
    let with = json!({
        "run": run.replace("${out.x}", "../../../out/x/x"),
        "inputs": { "m": edge("model", &model) }, "outputs": { "x": "x" },
    });
    let ran = room.run("command", with).unwrap();
    let list = std::fs::read_to_string(&room.files(&ran, "x")["x"]).unwrap();
    assert!(list.lines().any(|l| l.starts_with("-r--r--r--") && l.ends_with(".safetensors")));
    let weights = std::fs::read(room.dir.path().join("tiny/model.safetensors")).unwrap();
    assert_eq!(weights, safetensors(&["a"]));
}

#[test]
fn a_command_works_in_place() {
    let room = Room::new();
    room.file("src/make.sh", "#!/bin/sh\necho made\n");
    let make = |run: &str, outputs: Value, inputs: Value| {
        let files = json!({ "src/make.sh": "src/make.sh" });
        let with = json!({
            "run": run, "in_place": true, "outputs": outputs, "inputs": inputs, "files": files,
        });
        room.run("command", with)
    };
    let run = "sh src/make.sh > data/one.txt && mkdir data/two && echo 2 > data/two/x";
    let made = make(run, json!({ "one": "data/one.txt", "two": "data/two" }), json!({})).unwrap();
    // What the first wrote lies where it was; it is a copy, which may be changed.
    let inputs = json!({ "made": edge("files", &made) });
    let run = "echo more >> data/one.txt && cat data/one.txt data/two/x > all/list";
    let next = make(run, json!({ "all": "all/" }), inputs.clone()).unwrap();
    let text = |ran: &Ran, port: &str, path: &str| {
        std::fs::read_to_string(&room.files(ran, port)[path]).unwrap()
    };
    assert_eq!(text(&next, "all", "all/list"), "made\nmore\n2\n");
    assert_eq!(text(&made, "one", "data/one.txt"), "made\n");
    let e = make("true", json!({ "x": "data/one.txt" }), inputs.clone()).unwrap_err();
    assert!(format!("{e:#}").contains("an input lies where output `x`"), "{e:#}");
    let twice = json!({ "a": edge("files", &made), "b": edge("files", &made) });
    let e = make("true", json!({ "x": "x" }), twice).unwrap_err();
    assert!(format!("{e:#}").contains("two inputs bring `data/one.txt`"), "{e:#}");
    let e = make("true", json!({ "x": "x" }), inputs).unwrap_err();
    assert!(e.to_string().contains("output `x`"), "{e}");
}

/// A process that left the command's group keeps its pipes open.
#[test]
#[cfg(target_os = "linux")]
fn a_command_does_not_wait_for_what_it_left_behind() {
    let room = Room::new();
    let started = std::time::Instant::now();
    let run = "setsid sleep 25 & sleep 0.5; echo said; echo 1 > ${out.x}";
    let ran = room.run("command", json!({ "run": run, "outputs": { "x": "x" } })).unwrap();
    assert!(started.elapsed() < std::time::Duration::from_secs(20));
    assert!(ran.log.contains(&"said".to_owned()), "{:?}", ran.log);
    assert!(ran.log.iter().any(|line| line.contains("left behind")), "{:?}", ran.log);
}

#[test]
#[ignore = "needs the local hub: FLOW_TEST_HUB and FLOW_TEST_HUBD"]
fn the_local_hub_gives_imdb_and_a_model() {
    let mut room = Room::new();
    let mut settings = HubSettings::new(room.dir.path().join("hub"));
    let hub = crate::hub::LocalHub::start();
    settings.endpoint = hub.endpoint.clone();
    room.hub = Hub::new(settings.clone());
    let fetch = json!({ "dataset": "stanfordnlp/imdb", "splits": ["train", "test"] });
    let data = room.run("fetch", fetch.clone()).unwrap();
    assert_eq!(room.features(&data, "train")["classes"]["label"], json!(["neg", "pos"]));
    let mut naive = json!({ "data": edge("dataset", &data), "rows": { "train": 2000 } });
    naive["shuffle"] = json!(false);
    let e = room.run("sample", naive).unwrap_err().to_string();
    assert_eq!(e, "all 2,000 rows of `train` have label 0 (neg)");
    let bad = json!({ "dataset": "stanfordnlp/imdb", "splits": ["trian"] });
    assert!(advice(&room.run("fetch", bad).unwrap_err())[0].contains("`train`"));
    let model = json!({ "model": "HuggingFaceTB/SmolLM2-135M-Instruct" });
    let model = room.run("model", model).unwrap();
    assert!(room.files(&model, "weights").contains_key("model.safetensors"));
    // The same again without the network.
    drop(hub);
    settings.offline = true;
    room.hub = Hub::new(settings);
    assert_eq!(room.run("fetch", fetch).unwrap().ports, data.ports);
}

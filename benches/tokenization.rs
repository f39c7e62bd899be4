//! How fast rendered rows become token ids: the work of a `tokenize` step, Parquet in and Parquet
//! out, beside the `tokenizers` crate alone and `datasets` of Hugging Face.
//!
//! ```sh
//! cargo bench --bench tokenization -- --tokenizer bert.json --tokenizer smollm2.json
//! python3 -m venv peer && peer/bin/pip install datasets transformers tokenizers pyarrow
//! cargo bench --bench tokenization -- --peer peer/bin/python …
//! cargo bench --bench tokenization -- --megabytes 100 … prose
//! ```
//!
//! Without `--tokenizer` those of two models in `FLOW_TEST_HUB` are taken. Patterns of other
//! models are tried with the vocabulary of a byte-level tokenizer among them. Rows are paragraphs
//! of about 1.3 kB from `--data`, JSON lines with a `text`, or from the documentation that lies in
//! Cargo's registry; what there is too little of is taken again with other numbers in it. Texts in
//! other scripts are that prose with each letter or word replaced. Each measurement is a process of
//! its own, tokenizer and all; MB are 10^6 bytes of text; the peak of memory is the process's. A
//! last word chooses works by name.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a bench stops where it cannot go on"
)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use arrow::array::{ArrayRef, Int64Array, RecordBatch, StringArray};
use flow::digest::Digest;
use flow::store::Store;
use flow::text::{
    Chunks, Classes, Encoder, Fields, Formatter, Limits, OnRefused, Target, Task, Template,
    Tokenizer, TokenizerSource, TooLong, render_file, tokenize_file,
};
use parquet::arrow::ArrowWriter;
use serde_json::{Value, json};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const ROW: usize = 1300;

fn collect(dir: &Path, out: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    let mut paths: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).collect();
    paths.sort();
    for path in paths {
        let name = path.extension().and_then(|e| e.to_str());
        match (path.is_dir(), name) {
            (true, _) => collect(&path, out),
            (false, Some("md" | "rs")) => out.push(path),
            _ => {}
        }
    }
}

/// Prose of Markdown files and comments.
fn documentation(bytes: usize) -> Vec<String> {
    let home = std::env::var("CARGO_HOME").map(PathBuf::from);
    let home =
        home.unwrap_or_else(|_| PathBuf::from(std::env::var("HOME").unwrap()).join(".cargo"));
    let mut files = Vec::new();
    collect(&home.join("registry/src"), &mut files);
    let (mut rows, mut row, mut total) = (Vec::new(), String::new(), 0);
    let mut seen = std::collections::HashSet::new();
    for file in files {
        let Ok(text) = fs::read_to_string(&file) else { continue };
        let markdown = file.extension().is_some_and(|e| e == "md");
        for line in text.lines() {
            let line = if markdown {
                line
            } else {
                let line = line.trim_start();
                let comment = line.strip_prefix("/// ").or_else(|| line.strip_prefix("//! "));
                let Some(comment) = comment else { continue };
                comment
            };
            // licences and the like come a thousand times
            if line.split(' ').count() < 5 || !seen.insert(line.to_owned()) {
                continue;
            }
            row.push_str(line);
            row.push('\n');
            if row.len() >= ROW {
                total += row.len();
                rows.push(std::mem::take(&mut row));
                if total >= bytes {
                    return rows;
                }
            }
        }
    }
    rows
}

/// Other rows made of these until there are so many bytes.
fn enough(rows: Vec<String>, bytes: usize) -> Vec<String> {
    let mut out = Vec::new();
    let (mut total, mut round) = (0, 0);
    while total < bytes {
        for row in &rows {
            let row = if round == 0 { row.clone() } else { format!("{round} {row}") };
            total += row.len();
            out.push(row);
            if total >= bytes {
                break;
            }
        }
        round += 1;
    }
    out
}

/// Each letter replaced by a Cyrillic one.
fn cyrillic(text: &str) -> String {
    let letter = |c: char| match c {
        'a'..='z' => char::from_u32(0x430 + (c as u32 - 'a' as u32)).unwrap(),
        'A'..='Z' => char::from_u32(0x410 + (c as u32 - 'A' as u32)).unwrap(),
        c => c,
    };
    text.chars().map(letter).collect()
}

/// Each word replaced by one or two ideographs, without blanks.
fn chinese(text: &str) -> String {
    let mut out = String::new();
    for word in text.split_whitespace() {
        let bare = word.trim_matches(|c: char| !c.is_alphanumeric()).to_lowercase();
        let digest = Digest::of(bare.as_bytes());
        let number = |at: usize| u32::from(digest.as_bytes()[at]);
        // 3,000 of them, frequent words of one
        let character = |at| char::from_u32(0x4e00 + (number(at) * 256 + number(at + 1)) % 3000);
        out.extend(character(0));
        out.extend((bare.len() > 4).then(|| character(2)).flatten());
        match word.chars().last() {
            Some('.') => out.push('\u{3002}'),
            Some(',') => out.push('\u{ff0c}'),
            _ => {}
        }
    }
    out
}

fn write_rows(rows: &[String], path: &Path) {
    let labels: Vec<i64> = (0..rows.len() as i64).map(|i| i % 2).collect();
    let columns: [(&str, ArrayRef); 2] = [
        ("text", Arc::new(StringArray::from_iter_values(rows))),
        ("label", Arc::new(Int64Array::from(labels))),
    ];
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    let mut writer =
        ArrowWriter::try_new(fs::File::create(path).unwrap(), batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

fn render(rows: &Path, out: &Path, form: &str) {
    let text = || "text".to_owned();
    let names = ["a".to_owned(), "b".to_owned()];
    let fields = match form {
        "classification" => Fields {
            input: Some(text()),
            target: Some(Target::Class("label".into(), Classes::indexed(names.to_vec()))),
            ..Fields::default()
        },
        "completion" => Fields { target: Some(Target::Text(text())), ..Fields::default() },
        _ => Fields {
            instruction: Some("Classify the text.".into()),
            input: Some(text()),
            target: Some(Target::Text("label".into())),
            ..Fields::default()
        },
    };
    let template = match form {
        "classification" => Template::Classification,
        "completion" => Template::Completion,
        _ => Template::Alpaca,
    };
    let formatter = Formatter::new(template, None, None, fields).unwrap();
    render_file(rows, out, &formatter, OnRefused::Fail, &mut |_, _| Ok(())).unwrap();
}

fn status(field: &str) -> f64 {
    let text = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(field));
    let number = line.and_then(|l| l.split_whitespace().next()?.parse::<f64>().ok());
    number.unwrap_or_default() * 1024.0
}

fn cpu_seconds() -> f64 {
    let text = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields = text.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace();
    fields.skip(11).take(2).filter_map(|n| n.parse::<f64>().ok()).sum::<f64>() / 100.0
}

/// One work in this process.
fn measure(work: &Value) -> Value {
    let path = |name: &str| PathBuf::from(work[name].as_str().unwrap());
    let threads = work["threads"].as_u64().unwrap() as usize;
    let started = Instant::now();
    let causal = work["form"] != "classification";
    let config = path("tokenizer").with_file_name("tokenizer_config.json");
    let source = TokenizerSource {
        tokenizer: path("tokenizer"),
        config: config.exists().then_some(config),
        ..TokenizerSource::default()
    };
    let mut tokenizer = Tokenizer::load(&source).unwrap();
    if work["plain"] == true {
        tokenizer = tokenizer.plain();
    }
    let limits = Limits {
        max_length: work["max_length"].as_u64().unwrap() as usize,
        truncate: None,
        on_too_long: TooLong::Drop,
        append_eos: causal && tokenizer.eos_id().is_some(),
        special_tokens: false,
    };
    let encoder = Encoder::new(tokenizer, limits).unwrap();
    let task = if causal { Task::CausalLm } else { Task::SequenceClassification };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let salt = Digest::of(b"bench");
    let store = work["store"].as_str().map(|dir| Store::open(Path::new(dir)).unwrap());
    let memos = store.map(|store| store.memos(&salt));
    let keep = |key: &Digest, make: &mut dyn FnMut() -> anyhow::Result<Vec<u8>>| {
        let Some(memos) = &memos else { return make() };
        if let Some((kept, _)) = memos.get(key) {
            return Ok(kept);
        }
        let made = make()?;
        memos.keep(key, &made)?;
        Ok(made)
    };
    let chunks = Chunks { salt, keep: &keep };
    let (input, output) = (path("rows"), path("out"));
    let made = pool
        .install(|| tokenize_file(&input, &output, &encoder, task, &chunks, &mut |_, _| Ok(())));
    let made = made.unwrap();
    json!({
        "seconds": started.elapsed().as_secs_f64(), "cpu_seconds": cpu_seconds(),
        "peak_rss_bytes": status("VmHWM:"), "tokens": made.tokens, "rows": made.rows,
        "chunks": made.chunks, "encoded": made.encoded,
        "file_bytes": fs::metadata(&output).unwrap().len(),
    })
}

fn run(command: &mut Command) -> Value {
    let out = command.output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{said}");
    let text = String::from_utf8(out.stdout).unwrap();
    serde_json::from_str(text.lines().last().unwrap_or_default()).unwrap()
}

/// The best of some runs, since other programs can only slow one down.
fn best(times: usize, mut one: impl FnMut() -> Value) -> Value {
    let runs = (0..times).map(|_| one());
    runs.min_by(|a, b| a["seconds"].as_f64().unwrap().total_cmp(&b["seconds"].as_f64().unwrap()))
        .unwrap()
}

fn own(work: &Value, times: usize) -> Value {
    let exe = std::env::current_exe().unwrap();
    best(times, || run(Command::new(&exe).arg("--measure").arg(work.to_string())))
}

/// Tokenizers to try: those given, and one of them with the patterns of other models.
fn tokenizers(given: Vec<PathBuf>, dir: &Path) -> Vec<(String, PathBuf)> {
    let mut all = Vec::new();
    let mut patterns = false;
    for (at, path) in given.into_iter().enumerate() {
        let file: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        let model = file["model"]["type"].as_str().unwrap_or("?").to_owned();
        if model == "BPE" && file["pre_tokenizer"]["type"] == "ByteLevel" && !patterns {
            patterns = true;
            all.push(("BPE GPT-2".into(), path.clone()));
            let regex = |digits: &str| {
                let regex = format!(
                    concat!(
                        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}|",
                        r" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
                    ),
                    digits = digits
                );
                json!({ "type": "Split", "pattern": { "Regex": regex }, "behavior": "Isolated",
                        "invert": false })
            };
            let bytes = |use_regex: bool| {
                json!({ "type": "ByteLevel", "add_prefix_space": false,
                "trim_offsets": true, "use_regex": use_regex })
            };
            let digits = json!({ "type": "Digits", "individual_digits": true });
            let others = [
                ("BPE Llama 3", json!([regex(r"\p{N}{1,3}"), bytes(false)]), Value::Null),
                ("BPE Qwen2", json!([regex(r"\p{N}"), bytes(false)]), json!({ "type": "NFC" })),
                ("BPE SmolLM2", json!([digits, bytes(true)]), Value::Null),
            ];
            for (name, parts, normalizer) in others {
                let mut file = file.clone();
                file["pre_tokenizer"] = json!({ "type": "Sequence", "pretokenizers": parts });
                file["normalizer"] = normalizer;
                let copy = dir.join(format!("{}{at}", name.replace(' ', "")));
                fs::create_dir_all(&copy).unwrap();
                let config = path.with_file_name("tokenizer_config.json");
                if config.exists() {
                    fs::copy(config, copy.join("tokenizer_config.json")).unwrap();
                }
                fs::write(copy.join("tokenizer.json"), file.to_string()).unwrap();
                all.push((name.into(), copy.join("tokenizer.json")));
            }
        } else {
            all.push((model, path));
        }
    }
    all
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let mut options = BTreeMap::<&str, Vec<&str>>::new();
    let mut chosen = None;
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        match argument.strip_prefix("--") {
            Some(name) => options.entry(name).or_default().push(rest.next().unwrap()),
            None => chosen = Some(argument.as_str()),
        }
    }
    let first = |name: &str| options.get(name).map(|all| all[0]);
    if let Some(work) = first("measure") {
        println!("{}", measure(&serde_json::from_str(work).unwrap()));
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let given: Vec<PathBuf> = match options.get("tokenizer") {
        Some(paths) => paths.iter().map(PathBuf::from).collect(),
        None => {
            let hub = std::env::var("FLOW_TEST_HUB").expect("--tokenizer, or FLOW_TEST_HUB");
            let names =
                ["sentence-transformers/all-MiniLM-L6-v2", "HuggingFaceTB/SmolLM2-135M-Instruct"];
            let file = |name| Path::new(&hub).join("models").join(name).join("tokenizer.json");
            names.into_iter().map(file).collect()
        }
    };
    let megabytes: usize = first("megabytes").map_or(25, |n| n.parse().unwrap());
    let times: usize = first("times").map_or(3, |n| n.parse().unwrap());
    let prose = match first("data") {
        Some(path) => {
            let text = fs::read_to_string(path).unwrap();
            let row = |line: &str| {
                serde_json::from_str::<Value>(line).unwrap()["text"].as_str().unwrap().to_owned()
            };
            text.lines().map(row).collect()
        }
        None => documentation(megabytes * 1_000_000),
    };
    let prose = enough(prose, megabytes * 1_000_000);
    let ascii = prose.iter().filter(|row| row.is_ascii()).map(String::len).sum::<usize>();
    let total = prose.iter().map(String::len).sum::<usize>();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    println!(
        "{threads} threads; {} rows, {:.1} MB, {:.1} % of the bytes in rows of ASCII alone\n",
        prose.len(),
        total as f64 / 1e6,
        100.0 * ascii as f64 / total as f64
    );
    let few: Vec<String> = prose.iter().take(prose.len() / 5).cloned().collect();
    let texts: [(&str, Vec<String>); 3] = [
        ("prose", prose),
        ("Cyrillic", few.iter().map(|t| cyrillic(t)).collect()),
        ("Chinese", few.iter().map(|t| chinese(t)).collect()),
    ];
    println!("| tokenizer | rows | | MB/s | CPU s | peak MB | file MB | ratio |");
    println!("|---|---|---|---:|---:|---:|---:|---:|");
    let line = |name: &str, rows: &str, who: &str, bytes: usize, m: &Value, base: Option<f64>| {
        let number = |field: &str| m[field].as_f64().unwrap_or_default();
        let speed = bytes as f64 / 1e6 / number("seconds");
        let (cpu, peak) = (number("cpu_seconds"), number("peak_rss_bytes") / 1e6);
        let file = number("file_bytes") / 1e6;
        let ratio = base.map(|base| format!("{:.1}", speed / base)).unwrap_or_default();
        println!(
            "| {name} | {rows} | {who} | {speed:.1} | {cpu:.2} | {peak:.0} | {file:.1} | {ratio} |"
        );
        speed
    };
    let all = tokenizers(given, dir.path());
    let mut edited = texts[0].1.clone();
    let middle = edited.len() / 2;
    edited[middle].push_str(" edited");
    edited.extend(texts[0].1.iter().take(middle / 50).map(|row| format!("more {row}")));
    write_rows(&edited, &at("edited.parquet"));
    for form in ["classification", "completion"] {
        render(&at("edited.parquet"), &at(&format!("edited-{form}.parquet")), form);
    }
    for (text, rows) in &texts {
        let bytes = rows.iter().map(String::len).sum::<usize>();
        let raw = at(&format!("{text}.parquet"));
        write_rows(rows, &raw);
        for form in ["classification", "completion", "alpaca"] {
            render(&raw, &at(&format!("{text}-{form}.parquet")), form);
        }
        for (name, tokenizer) in &all {
            let usual = if name == "WordPiece" { "classification" } else { "completion" };
            let works =
                [("full", usual, 1 << 20), ("128", usual, 128), ("input 128", "alpaca", 128)];
            for (kind, form, max_length) in works {
                let rows = format!("{text}, {kind}");
                let skipped =
                    name == "WordPiece" && form == "alpaca" || *text != "prose" && kind != "full";
                if skipped || chosen.is_some_and(|c| !format!("{name} {rows}").contains(c)) {
                    continue;
                }
                let mut work = json!({
                    "tokenizer": tokenizer, "rows": at(&format!("{text}-{form}.parquet")),
                    "out": at("out.parquet"), "form": form, "max_length": max_length,
                    "threads": threads, "plain": true,
                });
                let base = line(name, &rows, "crate alone", bytes, &own(&work, 1), None);
                work["plain"] = json!(false);
                line(name, &rows, "flow", bytes, &own(&work, times), Some(base));
                if kind == "full" && *text == "prose" {
                    let edited = at(&format!("edited-{form}.parquet"));
                    kept(&work, &edited, times, &mut |who, m| {
                        line(name, &rows, who, bytes, m, Some(base));
                    });
                }
                if let Some(python) = first("peer").filter(|_| form != "alpaca") {
                    let script =
                        Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/tokenization.py");
                    let mut arguments = work.clone();
                    arguments["rows"] = json!(raw);
                    for processes in [1, threads] {
                        arguments["processes"] = json!(processes);
                        let measured =
                            run(Command::new(python).arg(&script).arg(arguments.to_string()));
                        let who = format!("datasets, {processes} processes");
                        line(name, &rows, &who, bytes, &measured, Some(base));
                    }
                }
            }
        }
    }
}

/// With chunks that are kept: none yet, all, and after one row was edited and 1 % were added.
fn kept(work: &Value, edited: &Path, times: usize, show: &mut dyn FnMut(&str, &Value)) {
    let dir = tempfile::tempdir().unwrap();
    let (store, copy) = (dir.path().join("store"), dir.path().join("copy"));
    let out = || fs::read(work["out"].as_str().unwrap()).unwrap();
    let mut work = work.clone();
    work["store"] = json!(store);
    let cold = best(times, || {
        let _ = fs::remove_dir_all(&store);
        own(&work, 1)
    });
    let first = out();
    show("flow, chunks kept", &cold);
    let told = |m: &Value| format!("{} of {} chunks", m["encoded"], m["chunks"]);
    let warm = own(&work, times);
    assert_eq!(first, out());
    show(&format!("flow, again: {}", told(&warm)), &warm);
    work["rows"] = json!(edited);
    let warm = best(times, || {
        // what one run adds, the next must not find
        let _ = fs::remove_dir_all(&copy);
        let status = Command::new("cp").arg("-r").arg(&store).arg(&copy).status();
        assert!(status.unwrap().success());
        work["store"] = json!(copy);
        own(&work, 1)
    });
    let second = out();
    show(&format!("flow, edited: {}", told(&warm)), &warm);
    work["store"] = Value::Null;
    own(&work, 1);
    assert!(second == out(), "kept chunks change the result");
}

//! What has to run again after an edit, and what has not: the table of the tokenization bugs of
//! other tools (a tokenizer swapped under one name, a path in the key, a cache without a key).

use std::collections::BTreeMap;
use std::time::Duration;

use flow::engine;
use flow::lineage::Status;
use serde_json::{Value, json};

use super::real;
use super::toys::{Bench, Ran};

/// The consumers, in the order of a row of the table.
const CONSUMERS: [&str; 5] = ["rows", "prompts", "base", "tokens", "train"];

fn steps() -> Value {
    let all = real::steps();
    let mut prompts = all["prompts"].clone();
    prompts["with"]["data"] = json!("${steps.rows}");
    let mut train = all["train"].clone();
    train["with"]["lora"]["r"] = json!(2);
    json!({
        "rows": all["rows"], "prompts": prompts, "base": all["base"], "tokens": all["tokens"],
        "train": train,
    })
}

/// The pipeline as a block, so that comments can be put into it.
fn text(steps: &Value) -> String {
    let mut text = "steps:\n".to_owned();
    for (name, step) in steps.as_object().unwrap() {
        text += &format!("  {name}:\n    kind: {}\n    with: {}\n", step["kind"], step["with"]);
    }
    text + "outputs: { adapter: \"${steps.train}\" }\n"
}

/// Which steps ran (`x`) and which were hits (`-`), in the order of [`CONSUMERS`].
fn row(run: &Ran, names: [&str; 5]) -> String {
    assert_eq!(run.outcome.status, Status::Done, "{:?}", run.events);
    let ran = run.ran();
    assert!(ran.iter().all(|step| names.contains(step)), "{ran:?}");
    names.map(|name| if ran.contains(&name) { "x" } else { "-" }).join(" ")
}

fn edit(bench: &Bench, file: &str, change: impl Fn(&str) -> String) {
    let path = bench.path(file);
    let old = std::fs::read_to_string(&path).unwrap_or_default();
    let new = change(&old);
    assert_ne!(old, new, "{file}");
    std::fs::write(path, new).unwrap();
}

fn json_edit(bench: &Bench, file: &str, change: impl Fn(&mut Value)) {
    edit(bench, file, |old| {
        let mut value = serde_json::from_str(old).unwrap_or_else(|_| json!({}));
        change(&mut value);
        value.to_string()
    });
}

/// An edit of files and steps, after which a run is asked what it did.
type Edit = fn(&Bench, &mut Value);

/// What is edited; how; what must run again of rows, prompts, base, tokens, train.
const TABLE: [(&str, Edit, &str); 16] = [
    ("nothing", |_, _| {}, "- - - - -"),
    (
        "another tokenizer under the same name",
        |bench, _| {
            json_edit(bench, "tiny/tokenizer.json", |t| {
                // Two words change their places: the same size, the same class, other ids.
                let vocab = t["model"]["vocab"].as_object_mut().unwrap();
                let (a, b) = (vocab["a"].clone(), vocab["b"].clone());
                vocab.insert("a".into(), b);
                vocab.insert("b".into(), a);
            });
        },
        "- - x x x",
    ),
    (
        "the tokenizer's settings",
        |bench, _| {
            json_edit(bench, "tiny/tokenizer_config.json", |c| {
                c["model_max_length"] = json!(511);
            });
        },
        // The tokens say by which tokenizer they were made.
        "- - x x x",
    ),
    (
        "the chat template",
        |bench, _| edit(bench, "tiny/chat_template.jinja", |_| "{{ messages[0].content }}".into()),
        "- - x x x",
    ),
    (
        "a file of the model's folder that is no part of the model",
        |bench, _| edit(bench, "tiny/README.md", |_| "notes".into()),
        // It is read again; what it gives is what it gave.
        "- - x - -",
    ),
    (
        "the template",
        |_, steps| steps["prompts"]["with"]["template"] = json!("alpaca-axolotl"),
        "- x - x x",
    ),
    (
        "a word of the instruction",
        |_, steps| steps["prompts"]["with"]["instruction"] = json!("Bad or good?"),
        "- x - x x",
    ),
    (
        "a row of the data, of the same length",
        |bench, _| edit(bench, "rows.csv", |old| old.replacen("good film 0", "poor film 0", 1)),
        "x x - x x",
    ),
    (
        "how a field of the data is quoted",
        |bench, _| edit(bench, "rows.csv", |o| o.replacen("good film 0", "\"good film 0\"", 1)),
        "x - - - -",
    ),
    (
        "the data's file, to one with other rows",
        |bench, steps| {
            let other = std::fs::read_to_string(bench.path("rows.csv")).unwrap();
            std::fs::write(bench.path("other.csv"), other.replace("film", "book")).unwrap();
            steps["rows"]["with"]["files"]["train"] = json!("other.csv");
        },
        "x x - x x",
    ),
    (
        "the data's file, moved",
        |bench, steps| {
            std::fs::create_dir(bench.path("elsewhere")).unwrap();
            let to = bench.path("elsewhere/rows.csv");
            std::fs::rename(bench.path("rows.csv"), to).unwrap();
            steps["rows"]["with"]["files"]["train"] = json!("elsewhere/rows.csv");
        },
        "- - - - -",
    ),
    (
        "the model's folder, moved",
        |bench, steps| {
            std::fs::create_dir(bench.path("models")).unwrap();
            std::fs::rename(bench.path("tiny"), bench.path("models/tiny")).unwrap();
            steps["base"]["with"]["model"] = json!("./models/tiny");
        },
        // The weights lie in the folder and are not copied, so where they are is looked up again.
        "- - x - -",
    ),
    (
        "the times of all files",
        |bench, _| {
            for name in ["rows.csv", "tiny/tokenizer.json", "tiny/model.safetensors"] {
                let file = std::fs::File::options().append(true).open(bench.path(name)).unwrap();
                file.set_modified(std::time::UNIX_EPOCH).unwrap();
            }
        },
        "- - - - -",
    ),
    ("max_length", |_, steps| steps["tokens"]["with"]["max_length"] = json!(310), "- - - x x"),
    (
        "a default, spelled out",
        |_, steps| {
            steps["tokens"]["with"]["append_eos"] = json!(true);
            steps["train"]["with"]["seed"] = json!(42);
            steps["train"]["with"]["weight_decay"] = json!(0.0);
        },
        "- - - - -",
    ),
    ("the learning rate", |_, s| s["train"]["with"]["learning_rate"] = json!(2e-3), "- - - - x"),
];

/// Does something with each of many, on two threads.
fn each<T: Send>(items: &mut [T], act: impl Fn(&mut T) + Sync) {
    let (one, other) = items.split_at_mut(items.len() / 2);
    std::thread::scope(|scope| {
        let half = scope.spawn(|| one.iter_mut().for_each(&act));
        other.iter_mut().for_each(&act);
        half.join().unwrap();
    });
}

/// Whether a run is over before the pipeline is read, because nothing has changed.
fn unchanged(bench: &Bench, text: &str) -> bool {
    let (file, text) = (bench.path("toy.yaml"), format!("name: toy\n{text}"));
    engine::unchanged(&file, &text, &bench.session(), &mut |_| {}).unwrap().is_some()
}

struct Case {
    bench: Bench,
    what: &'static str,
    change: Edit,
    expected: &'static str,
    found: String,
}

#[test]
fn hits_and_misses_are_the_truth() {
    let mut cases: Vec<Case> = TABLE
        .iter()
        .map(|&(what, change, expected)| Case {
            bench: real::bench(),
            what,
            change,
            expected,
            found: String::new(),
        })
        .collect();
    let plain = text(&steps());
    let run = |bench: &Bench, text: &str| row(&bench.run(text), CONSUMERS);
    each(&mut cases, |case| assert_eq!(run(&case.bench, &plain), "x x x x x"));
    // What is younger is not taken for settled, and no run is known to change nothing.
    std::thread::sleep(Duration::from_millis(2_100));
    each(&mut cases, |case| {
        let Case { bench, what, change, expected, .. } = case;
        assert_eq!(run(bench, &plain), "- - - - -");
        let mut edited = steps();
        change(bench, &mut edited);
        let edited = text(&edited);
        let seen = !unchanged(bench, &edited);
        assert!(seen || *expected == "- - - - -", "{what}: not seen");
        assert_eq!(seen, *what != "nothing", "{what}");
        case.found = run(&case.bench, &edited);
        assert_eq!(run(&case.bench, &edited), "- - - - -", "{}", case.what);
    });
    let wrong = cases.iter().filter(|case| case.found != case.expected);
    let wrong: Vec<String> = wrong
        .map(|Case { what, expected, found, .. }| {
            format!("{what}: expected {expected}, found {found}")
        })
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn what_only_people_see_is_in_no_key() {
    let bench = real::bench();
    let plain = text(&steps());
    assert_eq!(row(&bench.run(&plain), CONSUMERS), "x x x x x");
    let unchanged = |text: &str, names: [&str; 5]| {
        assert_ne!(text, plain);
        assert_eq!(row(&bench.run(text), names), "- - - - -", "{text}");
    };
    let commented = plain.replace("\n    kind:", " # why\n\n    # what\n    kind:");
    unchanged(&commented, CONSUMERS);
    unchanged(&plain.replace("adapter:", "result:"), CONSUMERS);
    unchanged(&plain.replace("    kind: \"train\"", "    retry: 2\n    kind: train"), CONSUMERS);
    let mut renamed = plain.clone();
    for (old, new) in CONSUMERS.iter().zip(["r", "p", "b", "ids", "t"]) {
        renamed = renamed.replace(&format!("\n  {old}:"), &format!("\n  {new}:"));
        for after in ['}', '.'] {
            let (from, to) = (format!("steps.{old}{after}"), format!("steps.{new}{after}"));
            renamed = renamed.replace(&from, &to);
        }
    }
    unchanged(&renamed, ["r", "p", "b", "ids", "t"]);
    // The steps in another order.
    let parts: Vec<&str> = plain.split("\n  ").collect();
    let (head, steps) = parts.split_first().unwrap();
    let blocks: BTreeMap<usize, String> = {
        let mut blocks: BTreeMap<usize, String> = BTreeMap::new();
        let mut n = steps.len();
        for line in steps {
            if line.starts_with(' ') {
                blocks.entry(n).or_default().push_str(&format!("\n  {line}"));
            } else {
                n -= 1;
                blocks.insert(n, format!("\n  {line}"));
            }
        }
        blocks
    };
    let (body, outputs): (Vec<String>, Vec<String>) = blocks
        .into_values()
        .map(|block| match block.split_once("\noutputs") {
            Some((steps, outputs)) => (steps.to_owned(), format!("\noutputs{outputs}")),
            None => (block, String::new()),
        })
        .unzip();
    let turned = format!("{head}{}{}", body.concat(), outputs.concat());
    unchanged(&turned, CONSUMERS);
}

#[test]
fn numerals_and_words() {
    let bench = real::bench();
    let steps = steps();
    let plain = text(&steps);
    bench.run(&plain);
    let rate = "\"learning_rate\":0.001";
    assert!(plain.contains(rate), "{plain}");
    for spelling in ["1e-3", "1E-3", "1.0e-3", "0.001", "0.0010", "10e-4"] {
        let text = plain.replace(rate, &format!("\"learning_rate\": {spelling}"));
        assert_eq!(row(&bench.run(&text), CONSUMERS), "- - - - -", "{spelling}");
    }
    let quoted = plain.replace(rate, "\"learning_rate\": \"1e-3\"");
    let source = flow::source::Source::new("toy.yaml", quoted);
    let settings = flow::pipeline::Settings::default();
    let refused =
        flow::pipeline::Plan::new(&bench.path("toy.yaml"), source, flow::kinds::ALL, &settings);
    let said = refused.unwrap_err();
    assert_eq!(said.len(), 1);
    assert_eq!(said[0].message, "expected a number, found the text `1e-3`");
    assert_eq!(said[0].help.as_deref(), Some("write it without quotes: `1e-3`"));
    // `NO` is Norway, not a falsehood, as a value, in a map and as the name of a column.
    let key = |value: &str| {
        let text = plain.replace("\"Good or bad?\"", value);
        let plan = bench.plan(&text);
        let node = plan.graph.node_indices().find(|&n| plan.graph[n].id.0 == "prompts").unwrap();
        plan.graph[node].parsed.key_params()
    };
    for word in ["NO", "no", "on", "Yes", "off", "y"] {
        assert_eq!(key(word)["instruction"], json!(word));
        assert_eq!(key(word), key(&format!("'{word}'")));
    }
}

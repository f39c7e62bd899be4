//! The data doctor as a step: datasets, prompts and tokens.

use flow::source::advice;
use serde_json::{Value, json};

use super::kinds::{Ran, Room, edge};

fn rows(n: usize, from: usize, label: impl Fn(usize) -> usize) -> String {
    let row = |i: usize| {
        format!("{{\"id\": {i}, \"text\": \"row number {}\", \"label\": {}}}\n", from + i, label(i))
    };
    (0..n).map(row).collect()
}

fn report(room: &Room, ran: &Ran) -> Value {
    let text = std::fs::read(&room.files(ran, "report")["report.json"]).unwrap();
    serde_json::from_slice(&text).unwrap()
}

#[test]
fn a_dataset_is_looked_at_split_by_split_and_between_them() {
    let room = Room::new();
    room.file("d/train.jsonl", rows(40, 0, |i| i % 2) + &rows(2, 0, |i| i % 2));
    room.file("d/test.jsonl", rows(20, 30, |i| i % 2));
    let data = room.run("fetch", json!({ "files": "d" })).unwrap();
    let with = json!({ "data": edge("dataset", &data) });
    let e = room.run("inspect", with.clone()).unwrap_err();
    let message = e.to_string();
    assert_eq!(
        message,
        "10 of 20 rows of `test` also stand in `train` (rows 0, 1, 2, 3, 4, 5, 6, 7, 8, 9)"
    );
    let advised = advice(&e).remove(0);
    let (help, at) = advised.rsplit_once("; the whole report is in ").unwrap();
    assert!(help.ends_with("set `allow: [overlap]`"), "{e:?}");
    assert!(at.ends_with("out/report/report.md") && at.contains("kept-"), "{at}");

    let mut allowed = with;
    allowed["allow"] = json!(["overlap"]);
    let ran = room.run("inspect", allowed.clone()).unwrap();
    let said = ran.warnings.join("\n");
    assert!(said.starts_with("`overlap`: 10 of 20"), "{said}");
    assert!(said.contains("`duplicates`: 2 of 42 rows of `train` repeat an earlier one"), "{said}");
    let report = report(&room, &ran);
    assert_eq!(report["title"], "62 rows in 2 splits: 1 allowed, 1 warning");
    assert_eq!(report["metrics"]["overlap.test.train"], 10.0);
    assert_eq!(report["details"]["splits"]["train"]["classes"], json!({ "0": 21, "1": 21 }));
    assert_eq!(report["details"]["findings"][1]["rows"], json!([40, 41]));
    let markdown = std::fs::read_to_string(&room.files(&ran, "report")["report.md"]).unwrap();
    assert!(markdown.contains("| train | 42 | 0 50.0 %, 1 50.0 % |"), "{markdown}");
    // Equal rows, equal bytes.
    assert_eq!(room.run("inspect", allowed).unwrap().ports, ran.ports);
}

#[test]
fn edited_copies_in_another_split_are_found() {
    let room = Room::new();
    let text =
        |from: usize| (from..from + 60).map(|i| format!("w{i}")).collect::<Vec<_>>().join(" ");
    let row = |text: &str, label| format!("{}\n", json!({ "text": text, "label": label }));
    let train: String = (0..20).map(|i| row(&text(i * 100), i % 2)).collect();
    room.file("d/train.jsonl", train);
    let edited = text(700).replace("w730", "another").to_uppercase();
    let test = [text(5000), edited, text(300), text(6000), text(1130)];
    room.file("d/test.jsonl", (0..).zip(&test).map(|(i, t)| row(t, i % 2)).collect::<String>());
    let data = room.run("fetch", json!({ "files": "d" })).unwrap();
    let look = |more: Value| {
        let mut with = json!({ "data": edge("dataset", &data), "allow": ["overlap"] });
        with.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        room.run("inspect", with)
    };
    let seen = report(&room, &look(json!({})).unwrap());
    assert_eq!(seen["metrics"]["overlap.test.train"], 1.0);
    assert!(seen["metrics"].get("near_overlap.test.train").is_none(), "{seen}");
    let e = look(json!({ "near": 0.7 })).unwrap_err();
    assert_eq!(
        e.to_string(),
        "1 of 5 rows of `test` nearly stand in `train`, as row 1 does in row 7 (row 1)"
    );
    assert!(advice(&e)[0].contains("[near_overlap]"), "{e:?}");
    // with other columns, or asking for more, it is another row
    let seen = look(json!({ "near": 1.0, "words": 3 })).unwrap();
    assert_eq!(report(&room, &seen)["metrics"]["near_overlap.test.train"], 0.0);
    let seen = look(json!({ "near": 0.2, "words": 1, "overlap": 0.5 })).unwrap();
    let seen = report(&room, &seen);
    assert_eq!(seen["metrics"]["near_overlap.test.train"], 2.0);
    let found = seen["details"]["findings"].as_array().unwrap();
    let near = found.iter().find(|f| f["check"] == "near_overlap").unwrap();
    assert_eq!((&near["rows"], &near["against"]), (&json!([1, 4]), &json!("train")));
}

#[test]
fn slices_of_one_class_and_missing_answers_are_refused() {
    let room = Room::new();
    room.file("d/train.jsonl", rows(30, 0, |_| 1));
    room.file("d/test.jsonl", "{\"text\": \"a\", \"answer\": \" \"}\n");
    let look = |more: Value| {
        let data = room.run("fetch", json!({ "files": { "train": "d/train.jsonl" } })).unwrap();
        let mut with = json!({ "data": edge("dataset", &data) });
        with.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        room.run("inspect", with)
    };
    let e = look(json!({})).unwrap_err();
    assert_eq!(e.to_string(), "all 30 rows of `train` are of class `1`");
    assert!(advice(&e)[0].contains("stratify") && advice(&e)[0].contains("[one_class]"), "{e:?}");
    look(json!({ "allow": ["one_class"] })).unwrap();
    let e = look(json!({ "label": "lable" })).unwrap_err();
    assert!(advice(&e)[0].contains("`label`"), "{e:?}");

    let data = room.run("fetch", json!({ "files": { "test": "d/test.jsonl" } })).unwrap();
    let with = json!({ "data": edge("dataset", &data), "target": "answer" });
    let e = room.run("inspect", with).unwrap_err();
    assert_eq!(e.to_string(), "1 of 1 rows of `test` have no target token (row 0)");
}

#[test]
fn fields_of_other_rows_are_refused_when_planned() {
    let data = json!({ "$input": { "type": "tokens", "edge": 0, "ports": {} } });
    let problems = |more: Value| {
        let mut with = json!({ "data": data });
        with.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let step = Room::parse("inspect", &with)?;
        Ok::<_, String>(step.check().into_iter().map(|p| p.message).collect::<Vec<_>>().join("; "))
    };
    let said = problems(json!({ "label": "y", "drift": 2.0 })).unwrap();
    assert!(said.contains("`label` is for a `dataset`"), "{said}");
    assert!(said.contains("this is 2"), "{said}");
    let said = problems(json!({ "allow": ["one_clas"] })).unwrap_err();
    assert!(said.contains("allow") && said.contains("`one_class`"), "{said}");
}

/// A model with a tokenizer of its own, and prompts and tokens made with it.
fn chain(room: &Room, tokenize: Value) -> (Ran, Ran, Ran) {
    let corpus: String = (0..64).map(|i| format!("row number {i} says yes or no\n")).collect();
    room.file("corpus.txt", corpus);
    let corpus = room.run("fetch", json!({ "files": "corpus.txt" })).unwrap();
    let base = json!({
        "config": {
            "model_type": "llama", "hidden_size": 16, "intermediate_size": 32,
            "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
            "max_position_embeddings": 512, "tie_word_embeddings": true,
        },
        "tokenizer": {
            "data": edge("dataset", &corpus), "column": "text", "algorithm": "bpe",
            "vocab_size": 300,
        },
    });
    let base = room.run("init_model", base).unwrap();
    room.file("train.jsonl", rows(24, 0, |i| i % 2));
    let data = room.run("fetch", json!({ "files": "train.jsonl" })).unwrap();
    let prompts = json!({
        "data": edge("dataset", &data), "template": "alpaca", "instruction": "Yes or no?",
        "input": "text", "output": { "column": "label", "words": { "0": "no", "1": "yes" } },
    });
    let prompts = room.run("format", prompts).unwrap();
    let mut with = json!({ "data": edge("prompts", &prompts), "tokenizer": edge("model", &base) });
    with.as_object_mut().unwrap().extend(tokenize.as_object().unwrap().clone());
    let tokens = room.run("tokenize", with).unwrap();
    (base, prompts, tokens)
}

#[test]
fn prompts_and_tokens_are_looked_at_as_they_are() {
    let room = Room::new();
    let (base, prompts, tokens) = chain(&room, json!({ "max_length": 400 }));
    let ran = room.run("inspect", json!({ "data": edge("prompts", &prompts) })).unwrap();
    let seen = report(&room, &ran);
    assert_eq!(seen["title"], "24 rows in 1 split: nothing found");
    let classes = json!({ "0 (no)": 12, "1 (yes)": 12 });
    assert_eq!(seen["details"]["splits"]["train"]["classes"], classes);

    let with = json!({ "data": edge("tokens", &tokens), "model": edge("model", &base) });
    let ran = room.run("inspect", with).unwrap();
    let seen = report(&room, &ran);
    assert_eq!(seen["title"], "24 rows in 1 split: nothing found", "{seen}");
    assert_eq!(seen["details"]["splits"]["train"]["classes"], classes);
    assert_eq!(seen["details"]["splits"]["train"]["lengths"]["unit"], "tokens");
}

#[test]
fn answers_without_an_end_are_refused() {
    let room = Room::new();
    let (.., tokens) = chain(&room, json!({ "max_length": 400, "append_eos": false }));
    let with = json!({ "data": edge("tokens", &tokens) });
    let e = room.run("inspect", with).unwrap_err();
    let said = e.to_string();
    assert!(said.starts_with("24 of 24 rows of `train` end without an end-of-sequence"), "{said}");
    assert!(advice(&e)[0].contains("append_eos"), "{e:?}");
}

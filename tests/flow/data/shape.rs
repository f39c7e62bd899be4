//! Kinds that change which rows and columns there are: transform, combine, and sample's groups and
//! folds.

use std::collections::BTreeSet;

use flow::source::advice;
use serde_json::{Value, json};

use super::kinds::{Ran, Room, edge};
use super::{ints, texts};

fn reviews(room: &Room) -> Ran {
    let row = |i: usize| {
        let (film, label) = (i % 10, i / 10 % 2);
        format!("{{\"text\": \"review {i}\", \"film\": \"film {film}\", \"label\": {label}}}\n")
    };
    room.file("d/train.jsonl", (0..100).map(row).collect::<String>());
    room.file("d/test.jsonl", (90..110).map(row).collect::<String>());
    room.run("fetch", json!({ "files": "d" })).unwrap()
}

fn extended(mut with: Value, more: Value) -> Value {
    with.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    with
}

#[test]
fn fetch_takes_patterns() {
    let room = Room::new();
    for name in ["a/train-0.csv", "a/train-1.csv", "b/test.csv", "b/.hidden.csv", "c/d/train-9.csv"]
    {
        room.file(name, format!("text,label\n{name},1\n"));
    }
    let fetch = |files: Value| room.run("fetch", json!({ "files": files }));
    let rows = |ran: &Ran, split: &str| texts(&room.table(ran, split), "text");
    let ran = fetch(json!("*/*.csv")).unwrap();
    assert_eq!(rows(&ran, "train"), ["a/train-0.csv", "a/train-1.csv"]);
    assert_eq!(rows(&ran, "test"), ["b/test.csv"]);
    let ran = fetch(json!({ "train": ["**/train-*.csv"], "dev": "b/*.csv" })).unwrap();
    assert_eq!(rows(&ran, "train"), ["a/train-0.csv", "a/train-1.csv", "c/d/train-9.csv"]);
    assert_eq!(rows(&ran, "dev"), ["b/test.csv"]);
    let ran = fetch(json!("a/train-[0-0].csv")).unwrap();
    assert_eq!(rows(&ran, "train"), ["a/train-0.csv"]);
    let e = fetch(json!("a/*.parquet")).unwrap_err().to_string();
    assert_eq!(e, "no file matches `a/*.parquet`");
    room.file("e/train.csv", "text\na\n");
    room.file("e/other.csv", "text\na\n");
    let e = fetch(json!("e/*.csv")).unwrap_err();
    assert!(e.to_string().contains("other.csv"), "{e}");
}

#[test]
fn transform_changes_names_types_columns_and_rows() {
    let room = Room::new();
    let data = reviews(&room);
    let with = json!({
        "data": edge("dataset", &data), "rename": { "label": "y" }, "cast": { "y": "text" },
        "filter": "film in ['film 1', 'film 2'] and y == '1'", "drop": ["film"],
    });
    let ran = room.run("transform", with).unwrap();
    let table = room.table(&ran, "train");
    assert_eq!(table.columns(), ["text", "y"]);
    assert_eq!(texts(&table, "y"), vec!["1"; 10]);
    assert_eq!(texts(&table, "text")[..2], ["review 11", "review 12"]);
    assert_eq!(room.features(&ran, "test")["rows"], 2);
    assert!(ran.log.iter().any(|line| line.starts_with("train: 10 of 100 rows; 90 filtered")));

    let with =
        |more| room.run("transform", extended(json!({ "data": edge("dataset", &data) }), more));
    let e = with(json!({ "drop": ["lable"] })).unwrap_err();
    assert!(advice(&e)[0].contains("`label`"), "{e:?}");
    let e = with(json!({ "cast": { "text": "int" } })).unwrap_err();
    let said = format!("{e:#}");
    assert!(said.contains("row 1, column `text`: `review 0` is not a whole number"), "{said}");
    let ran = with(json!({ "cast": { "text": "int" }, "on_error": "skip" })).unwrap();
    assert_eq!(room.features(&ran, "train")["rows"], 0);
    assert!(ran.warnings.iter().any(|w| w.starts_with("100 rows of `train`")), "{ran:?}");
}

#[test]
fn transform_leaves_out_what_repeats_within_and_across_splits() {
    let room = Room::new();
    let data = reviews(&room);
    let rows = |ran: &Ran, split: &str| room.features(ran, split)["rows"].as_u64().unwrap();
    let with = |more: Value| {
        let with = json!({ "data": edge("dataset", &data), "deduplicate": more });
        room.run("transform", with).unwrap()
    };
    let within = with(json!({ "columns": ["film"] }));
    assert_eq!((rows(&within, "train"), rows(&within, "test")), (10, 10));
    let across = with(json!({ "across": true }));
    assert_eq!((rows(&across, "train"), rows(&across, "test")), (100, 10));
    assert_eq!(texts(&room.table(&across, "test"), "text")[0], "review 100");
    // All that is left stays as it was.
    assert_eq!(across.ports["train"], with(json!({})).ports["train"]);
    let near = with(json!({ "columns": ["film"], "near": 0.9 }));
    assert_eq!(rows(&near, "train"), 10);
}

#[test]
fn transform_refuses_what_cannot_be_when_planned() {
    let data = json!({ "$input": { "type": "dataset", "edge": 0, "ports": {} } });
    for (more, want) in [
        (json!({ "filter": "label ==" }), "the filter"),
        (json!({ "columns": ["a"], "drop": ["a"] }), "kept and left out"),
        (json!({ "columns": ["a", "a"] }), "named twice"),
        (json!({ "deduplicate": { "near": 2.0 } }), "between 0 and 1"),
        (json!({ "deduplicate": { "words": 0 } }), "1 word"),
    ] {
        let step = Room::parse("transform", &extended(json!({ "data": data }), more.clone()));
        let problems = step.unwrap().check();
        assert!(problems.iter().any(|p| p.message.contains(want)), "{more}: {problems:?}");
    }
}

#[test]
fn combine_puts_rows_together() {
    let room = Room::new();
    room.file("a.jsonl", "{\"t\": \"a0\", \"n\": 0}\n{\"t\": \"a1\", \"n\": 1}\n");
    room.file("b.jsonl", "{\"n\": 0.5, \"t\": \"b0\"}\n{\"n\": 2, \"t\": \"b1\"}\n");
    room.file("c.jsonl", "{\"t\": \"c\"}\n");
    let fetch = |files: Value| room.run("fetch", json!({ "files": files })).unwrap();
    let one = fetch(json!({ "train": "a.jsonl", "test": "a.jsonl" }));
    let two = fetch(json!({ "train": "b.jsonl" }));
    let with = |more: Value| {
        let data = [edge("dataset", &one), edge("dataset", &two)];
        room.run("combine", extended(json!({ "data": data }), more))
    };
    let ran = with(json!({})).unwrap();
    assert_eq!(texts(&room.table(&ran, "train"), "t"), ["a0", "a1", "b0", "b1"]);
    assert_eq!(room.features(&ran, "train")["columns"], json!([["t", "Utf8"], ["n", "Float64"]]));
    assert_eq!(texts(&room.table(&ran, "test"), "t"), ["a0", "a1"]);
    let ran = with(json!({ "how": "interleave", "splits": ["train"] })).unwrap();
    assert_eq!(ran.ports.keys().collect::<Vec<_>>(), ["train"]);
    assert_eq!(texts(&room.table(&ran, "train"), "t"), ["a0", "b0", "a1", "b1"]);
    let shares = json!({ "how": "interleave", "probabilities": [0.5, 0.5] });
    let e = format!("{:#}", with(shares).unwrap_err());
    assert!(e.contains("not every dataset has a split `test`"), "{e}");
    let other = fetch(json!({ "train": "c.jsonl" }));
    let data = [edge("dataset", &one), edge("dataset", &other)];
    let e = format!("{:#}", room.run("combine", json!({ "data": data })).unwrap_err());
    assert!(e.contains("dataset 2 (`train`) lacks") && e.contains("`n`"), "{e}");
    let problems = |more: Value| {
        let data = [edge("dataset", &one), edge("dataset", &two)];
        let step = Room::parse("combine", &extended(json!({ "data": data }), more)).unwrap();
        step.check().into_iter().map(|p| p.message).collect::<Vec<_>>().join("; ")
    };
    let said = problems(json!({ "probabilities": [0.5, 0.2, 0.1] }));
    for want in ["how: interleave", "3 shares for 2", "add up to 0.7"] {
        assert!(said.contains(want), "{said} lacks {want}");
    }
}

#[test]
fn folds_are_a_cross_validation() {
    let room = Room::new();
    let data = reviews(&room);
    let mut seen = BTreeSet::new();
    for fold in 0..4 {
        let with = json!({
            "data": edge("dataset", &data), "stratify": "label", "folds": 4, "fold": fold,
        });
        let ran = room.run("sample", with).unwrap();
        assert_eq!(ran.ports.keys().collect::<Vec<_>>(), ["train", "validation"]);
        let (train, held) = (room.table(&ran, "train"), room.table(&ran, "validation"));
        assert_eq!((train.rows(), held.rows()), (75, 25));
        let ones = ints(&held, "label").into_iter().filter(|l| *l == Some(1)).count();
        assert!((12..=13).contains(&ones), "{ones}");
        seen.extend(texts(&held, "text"));
    }
    assert_eq!(seen.len(), 100);
    let problems = |more: Value| {
        let with = extended(json!({ "data": edge("dataset", &data) }), more);
        let step = Room::parse("sample", &with).unwrap();
        step.check().into_iter().map(|p| p.message).collect::<Vec<_>>().join("; ")
    };
    assert!(problems(json!({ "folds": 1, "fold": 1 })).contains("2 folds or more"));
    assert!(problems(json!({ "folds": 3, "fold": 3 })).contains("counted from 0 to 2"));
    assert!(problems(json!({ "folds": 3 })).contains("needs `fold`"));
    assert!(problems(json!({ "fold": 3 })).contains("belongs to `folds`"));
    let both = json!({ "folds": 3, "fold": 0, "rows": { "train": 5 } });
    assert!(problems(both).contains("exclude each other"));
}

#[test]
fn groups_stay_whole() {
    let room = Room::new();
    let data = reviews(&room);
    let with = |more: Value| {
        let with = json!({ "data": edge("dataset", &data), "group": "film", "seed": 3 });
        room.run("sample", extended(with, more))
    };
    let ran = with(json!({ "rows": { "train": 55, "validation": 30 } })).unwrap();
    let films = |split: &str| texts(&room.table(&ran, split), "film");
    assert_eq!((films("train").len(), films("validation").len()), (50, 30));
    let [train, held] =
        ["train", "validation"].map(|s| films(s).into_iter().collect::<BTreeSet<_>>());
    assert!(train.is_disjoint(&held));
    assert!(ran.warnings.iter().any(|w| w == "`train` has 50 rows of 55: groups stay whole"));
    let ran = with(json!({ "folds": 5, "fold": 2 })).unwrap();
    assert_eq!(texts(&room.table(&ran, "validation"), "film").len(), 20);
    let e = with(json!({ "group": "flim" })).unwrap_err();
    assert!(advice(&e)[0].contains("`film`"), "{e:?}");
}

#[test]
fn groups_keep_proportions_where_asked() {
    let room = Room::new();
    // every film is of one class, seven of ten of class 0
    let row = |i: usize| {
        let (film, label) = (i % 10, usize::from(i % 10 > 6));
        format!("{{\"text\": \"row {i}\", \"film\": {film}, \"label\": {label}}}\n")
    };
    room.file("f/train.jsonl", (0..100).map(row).collect::<String>());
    let data = room.run("fetch", json!({ "files": "f" })).unwrap();
    for seed in 0..4 {
        let with = |more: Value| {
            let with = json!({
                "data": edge("dataset", &data), "group": "film", "stratify": "label", "seed": seed,
            });
            room.run("sample", extended(with, more)).unwrap()
        };
        let ones = |ran: &Ran, split: &str| {
            let labels = ints(&room.table(ran, split), "label");
            (labels.iter().filter(|l| **l == Some(1)).count(), labels.len())
        };
        let ran = with(json!({ "rows": { "train": 60, "validation": 40 } }));
        assert_eq!([ones(&ran, "train"), ones(&ran, "validation")], [(20, 60), (10, 40)]);
        for fold in 0..3 {
            let ran = with(json!({ "folds": 3, "fold": fold }));
            assert_eq!(ones(&ran, "validation").0, 10);
        }
    }
}

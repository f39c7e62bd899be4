//! Datasets and models of a hub that a server in this process plays.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};

use flow::hub::{Hub, HubSettings};
use serde_json::json;
use sha1::Digest as _;

use super::kinds::{Room, model_folder, safetensors};
use super::{CSV, ints};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

const CONVERTED: &str = "fedcba9876543210fedcba9876543210fedcba98";

type Files = BTreeMap<String, Vec<u8>>;

/// Serves these files as those of every repository.
fn serve(files: Files) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            answer(stream, &files);
        }
    });
    endpoint
}

fn answer(mut stream: TcpStream, files: &Files) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
    let first = lines.next().unwrap();
    lines.take_while(|line| !line.is_empty()).for_each(drop);
    let path = first.split(' ').nth(1).unwrap();
    // Files below `converted/` are those of the branch with what the hub has converted.
    let converted = path.contains(CONVERTED) || path.contains("refs%2Fconvert%2Fparquet");
    let files: Files = files
        .iter()
        .filter(|(name, _)| name.starts_with("converted/") == converted)
        .map(|(name, body)| (name.trim_start_matches("converted/").to_owned(), body.clone()))
        .collect();
    let body = if path.contains("/revision/") {
        let sha = if converted { CONVERTED } else { COMMIT };
        json!({ "sha": sha }).to_string().into_bytes()
    } else if path.contains("/tree/") {
        let listed = files.iter().map(|(name, body)| {
            let mut hasher = sha1::Sha1::new();
            hasher.update(format!("blob {}\0", body.len()));
            hasher.update(body);
            let oid: String = hasher.finalize().iter().map(|b| format!("{b:02x}")).collect();
            json!({ "type": "file", "path": name, "size": body.len(), "oid": oid })
        });
        json!(listed.collect::<Vec<_>>()).to_string().into_bytes()
    } else {
        let commit = if converted { CONVERTED } else { COMMIT };
        let name = path.split(&format!("/resolve/{commit}/")).nth(1).unwrap();
        files[name].clone()
    };
    let head = format!("Content-Length: {}\r\nConnection: close\r\n", body.len());
    let _ = stream.write_all(format!("HTTP/1.1 200 OK\r\n{head}\r\n").as_bytes());
    let _ = stream.write_all(&body);
}

/// A room whose hub has these files, and the same without a network.
fn room(files: &[(&str, &[u8])]) -> (Room, Hub) {
    let files = files.iter().map(|(name, body)| ((*name).to_owned(), body.to_vec())).collect();
    let mut room = Room::new();
    let mut settings = HubSettings::new(room.dir.path().join("hub"));
    settings.endpoint = serve(files);
    room.hub = Hub::new(settings.clone());
    settings.offline = true;
    (room, Hub::new(settings))
}

const CARD: &str = "---
dataset_info:
  features:
  - name: label
    dtype:
      class_label:
        names:
          '0': no
          '1': yes
configs:
- config_name: default
  data_files:
  - split: train_sft
    path: rows/*.csv
---
";

#[test]
fn a_dataset_of_the_hub_and_again_without_a_network() {
    let files = [("README.md", CARD.as_bytes()), ("rows/a.csv", CSV.as_bytes())];
    let (mut room, offline) = room(&files);
    let fetch = json!({ "dataset": "org/name" });
    let data = room.run("fetch", fetch.clone()).unwrap();
    assert_eq!(data.ports.keys().collect::<Vec<_>>(), ["train_sft"]);
    assert_eq!(room.features(&data, "train_sft")["classes"]["label"], json!(["no", "yes"]));
    assert_eq!(ints(&room.table(&data, "train_sft"), "label"), [Some(1), Some(0)]);
    room.hub = offline;
    assert_eq!(room.run("fetch", fetch).unwrap().ports, data.ports);
    // A commit may be written in either case.
    let pinned = json!({ "dataset": "org/name", "revision": COMMIT.to_ascii_uppercase() });
    assert_eq!(room.run("fetch", pinned).unwrap().ports, data.ports);
}

#[test]
fn of_a_dataset_that_is_a_script_or_archives_the_converted_files_are_taken() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x");
    std::fs::write(&path, CSV).unwrap();
    let reading = flow::data::Reading::new("x.csv", flow::data::OnError::Fail);
    flow::data::write(&flow::data::read(&path, reading).unwrap(), &path).unwrap();
    let rows = std::fs::read(&path).unwrap();
    for other in ["name.py", "data/train.tar.gz"] {
        let (mut room, offline) = room(&[
            (other, b"import datasets"),
            ("converted/plain/train/0000.parquet", &rows),
            ("converted/plain/train/0001.parquet", &rows),
            ("converted/other/test/0000.parquet", &rows),
        ]);
        let fetch = json!({ "dataset": "org/name", "config": "plain" });
        let data = room.run("fetch", fetch.clone()).unwrap();
        let labels = ints(&room.table(&data, "train"), "label");
        assert_eq!(labels, [Some(1), Some(0), Some(1), Some(0)]);
        room.hub = offline;
        assert_eq!(room.run("fetch", fetch).unwrap().ports, data.ports);
    }
}

#[test]
fn names_of_splits_do_not_leave_the_attempt() {
    let card = CARD.replace("train_sft", "../../../evil");
    let (room, _) = room(&[("README.md", card.as_bytes()), ("rows/a.csv", CSV.as_bytes())]);
    let e = room.run("fetch", json!({ "dataset": "org/name" })).unwrap_err();
    assert!(format!("{e:#}").contains("names a split `../../../evil`"), "{e:#}");
}

#[test]
fn a_model_of_the_hub_is_that_of_its_folder() {
    let weights = safetensors(&["a"]);
    let (room, _) = room(&[
        ("README.md", b"not part of it"),
        ("config.json", b"{}"),
        ("model.safetensors", &weights),
        ("tokenizer.json", b"{}"),
        ("vocab.txt", b"a\n"),
    ]);
    let hub = room.run("model", json!({ "model": "org/name" })).unwrap();
    model_folder(&room, "tiny");
    room.file("tiny/model.safetensors", &weights);
    let local = json!({ "model": "./tiny", "name": "org/name" });
    assert_eq!(room.run("model", local).unwrap().ports, hub.ports);
}

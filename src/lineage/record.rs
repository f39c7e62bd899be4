//! Records: what a key gave, and how it was made. The cache entry is the lineage record.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::artifact::Type;
use crate::digest::Digest;
use crate::store::{Item, Store};

/// How, where and when a result was made. Never part of a key or of a published tree.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Made {
    /// Run id.
    pub run: String,
    /// Instance (`train@lora.r=8`).
    pub step: String,
    /// The pipeline's name.
    pub pipeline: String,
    /// Keys of the steps behind the inputs, by path in the pre-image (`with.data`).
    #[serde(default)]
    pub sources: BTreeMap<String, Digest>,
    /// Unix milliseconds.
    pub started_unix_ms: u64,
    /// Wall-clock seconds.
    pub seconds: f64,
    /// CPU seconds of its process; absent when it ran on a thread of the runner.
    pub cpu_seconds: Option<f64>,
    /// Largest resident memory of its process, in bytes; absent likewise.
    pub peak_rss_bytes: Option<u64>,
    /// Host name.
    pub host: String,
    /// Version of this program.
    pub build: String,
    /// Instruction set (`x86_64+avx512f`).
    pub isa: String,
    /// Device class and compute mode (`cpu f32`).
    pub device: String,
    /// CPU slots.
    pub threads: usize,
    /// Which attempt succeeded, from 1.
    pub attempt: u32,
}

/// What a key gave, and how it was made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The key.
    pub key: Digest,
    /// Kind of the step.
    pub kind: String,
    /// The kind's version.
    pub version: u32,
    /// What the key is the digest of: kind, version, parameters, input digests, environment.
    pub preimage: Value,
    /// Type of the output.
    #[serde(rename = "type")]
    pub ty: Type,
    /// Tree digest by port.
    pub ports: BTreeMap<String, Digest>,
    /// Numbers and words that the step gave for the record.
    pub facts: Map<String, Value>,
    /// Warnings that it gave.
    pub warnings: Vec<String>,
    /// How it was made.
    pub made: Made,
}

/// A later run of a key that gave other bytes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Difference {
    /// What it gave.
    pub ports: BTreeMap<String, Digest>,
    /// Its facts and metrics, for their spread.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub metrics: Map<String, Value>,
    /// How.
    pub made: Made,
}

/// What is found where a record should be.
#[derive(Debug, Clone, PartialEq)]
pub enum Loaded {
    /// Nothing.
    Absent,
    /// A whole record.
    Found(Box<Record>),
    /// Something that is not a whole record of this key, and why.
    Corrupt(String),
}

/// What became of a record that was to be written.
#[derive(Debug, Clone, PartialEq)]
pub enum Wrote {
    /// It stands.
    New,
    /// One with the same outputs stood already.
    Same,
    /// One with other outputs at these ports stood already: first wins, the difference is kept.
    Differs(Vec<String>),
}

/// What stands on the disk under a key.
#[derive(Debug, Default)]
pub(super) struct RecordFile {
    pub(super) record: Option<(Item, Loaded)>,
    pub(super) ledger: Option<(Item, Vec<Difference>)>,
}

#[derive(Serialize, Deserialize)]
struct Sealed {
    /// Digest of the record, against torn and damaged files.
    seal: Digest,
    record: Value,
}

impl Record {
    /// Domain of step keys.
    pub const KEY_DOMAIN: &str = "flow/step/v1";
    const SEAL_DOMAIN: &str = "flow/record/v1";

    /// Where the record of a key is.
    pub fn path(store: &Store, key: &Digest) -> PathBuf {
        let hex = key.to_string();
        store.root().join("records").join(&hex[..2]).join(format!("{}.json", &hex[2..]))
    }

    fn ledger(store: &Store, key: &Digest) -> PathBuf {
        Self::path(store, key).with_extension("differences.jsonl")
    }

    /// The record of a key, whole or not at all.
    ///
    /// # Errors
    /// When the file is there and cannot be read.
    pub fn load(store: &Store, key: &Digest) -> Result<Loaded> {
        let path = Self::path(store, key);
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Loaded::Absent),
            Err(e) => return Err(e).with_context(|| format!("reading {}", path.display())),
        };
        Ok(match Self::parse(&text) {
            Ok(record) if record.key == *key => Loaded::Found(Box::new(record)),
            Ok(record) => Loaded::Corrupt(format!("it is of key {}", record.key.short())),
            Err(e) => Loaded::Corrupt(format!("{e:#}")),
        })
    }

    fn parse(text: &[u8]) -> Result<Self> {
        let Sealed { seal, record } = serde_json::from_slice(text)?;
        let actual = Digest::of_value(Self::SEAL_DOMAIN, &record)?;
        anyhow::ensure!(actual == seal, "its content is not what its seal says");
        let record: Self = serde_json::from_value(record)?;
        let key = Digest::of_value(Self::KEY_DOMAIN, &record.preimage)?;
        anyhow::ensure!(key == record.key, "its key is not the digest of its pre-image");
        Ok(record)
    }

    /// Writes it, whole or not at all. The first result of a key stands; with `replace` (its
    /// outputs are lost) the new one does. Either way other outputs are kept in the ledger.
    /// The caller holds the key's lease.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn write(&self, store: &Store, replace: bool) -> Result<Wrote> {
        let old = match Self::load(store, &self.key)? {
            Loaded::Found(old) => Some(old),
            Loaded::Absent | Loaded::Corrupt(_) => None,
        };
        let mut differing = Vec::new();
        if let Some(old) = &old {
            let names = old.ports.keys().chain(self.ports.keys());
            differing.extend(names.filter(|n| old.ports.get(*n) != self.ports.get(*n)).cloned());
            differing.sort_unstable();
            differing.dedup();
            if !differing.is_empty() {
                let kept = if replace { old.as_ref() } else { self };
                kept.note_difference(store, kept.metrics(store))?;
            }
        }
        if old.is_none() || (replace && !differing.is_empty()) {
            let record = serde_json::to_value(self)?;
            let seal = Digest::of_value(Self::SEAL_DOMAIN, &record)?;
            let mut text = serde_json::to_vec_pretty(&Sealed { seal, record })?;
            text.push(b'\n');
            store.write_atomic(&Self::path(store, &self.key), &text)?;
        }
        Ok(match (old, differing.is_empty()) {
            (None, _) => Wrote::New,
            (Some(_), true) => Wrote::Same,
            (Some(_), false) => Wrote::Differs(differing),
        })
    }

    /// Adds it to the ledger of its key, as a result that is not the first one, with its metrics.
    /// The ledger lies beside the first record; the store's file `differing` lists the keys that
    /// have one.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn note_difference(&self, store: &Store, metrics: Map<String, Value>) -> Result<()> {
        let (ports, made) = (self.ports.clone(), self.made.clone());
        let difference = Difference { ports, metrics, made };
        let append = |path: &std::path::Path, mut line: Vec<u8>| -> Result<()> {
            line.push(b'\n');
            let mut file = store.disk().open_append(path)?;
            Ok(store.disk().append(&mut file, &line, path)?)
        };
        append(&Self::ledger(store, &self.key), serde_json::to_vec(&difference)?)?;
        append(&Self::differing_path(store), self.key.to_string().into_bytes())
    }

    fn differing_path(store: &Store) -> PathBuf {
        store.root().join("differing")
    }

    /// Keys that gave other bytes when they were made again: one small file, so that a run can
    /// ask for every hit. Nothing if it cannot be read: it only serves warnings.
    pub fn differing(store: &Store) -> BTreeSet<Digest> {
        let text = std::fs::read_to_string(Self::differing_path(store)).unwrap_or_default();
        text.lines().filter_map(|line| line.parse().ok()).collect()
    }

    /// Later runs of a key that gave other bytes, oldest first.
    ///
    /// # Errors
    /// When the ledger is there and cannot be read.
    pub fn differences(store: &Store, key: &Digest) -> Result<Vec<Difference>> {
        let path = Self::ledger(store, key);
        match std::fs::read(&path) {
            Ok(text) => {
                let lines = text.split(|&b| b == b'\n');
                Ok(lines.filter_map(|l| serde_json::from_slice(l).ok()).collect())
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(e) => Err(e).with_context(|| format!("reading {}", path.display())),
        }
    }

    /// Every record of a store, whole or not, and every ledger of differences, by key.
    ///
    /// # Errors
    /// When the folder, or a file that is there, cannot be read.
    pub(super) fn files(store: &Store) -> Result<BTreeMap<Digest, RecordFile>> {
        let mut files: BTreeMap<Digest, RecordFile> = BTreeMap::new();
        for (name, item) in store.sharded("records")? {
            let Some((key, ending)) = name.split_once('.') else { continue };
            let Ok(key) = key.parse() else { continue };
            let file = files.entry(key).or_default();
            match ending {
                "json" => file.record = Some((item, Self::load(store, &key)?)),
                "differences.jsonl" => file.ledger = Some((item, Self::differences(store, &key)?)),
                _ => {}
            }
        }
        Ok(files)
    }

    /// Keys that begin with some digits and have a record, whole or not.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn keys(store: &Store, beginning: &str) -> Result<Vec<Digest>> {
        let names = store.sharded("records")?.into_iter().map(|(name, _)| name);
        let names = names.filter(|name| name.starts_with(beginning));
        Ok(names.filter_map(|name| name.strip_suffix(".json")?.parse().ok()).collect())
    }

    /// The trees that a damaged record names, as far as it can be read.
    pub(super) fn trees_of_damaged(path: &std::path::Path) -> Vec<Digest> {
        let text = std::fs::read(path).unwrap_or_default();
        let value: Value = serde_json::from_slice(&text).unwrap_or_default();
        let ports = value["record"]["ports"].as_object().into_iter().flatten();
        ports.filter_map(|(_, tree)| tree.as_str()?.parse().ok()).collect()
    }

    /// All whole records of a store, newest first.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn all(store: &Store) -> Result<Vec<Self>> {
        let mut records = Vec::new();
        for path in record_files(store)? {
            if let Ok(text) = std::fs::read(&path)
                && let Ok(record) = Self::parse(&text)
            {
                records.push(record);
            }
        }
        records.sort_by(|a, b| {
            let newest = b.made.started_unix_ms.cmp(&a.made.started_unix_ms);
            newest.then_with(|| a.key.cmp(&b.key))
        });
        Ok(records)
    }
}

/// The files of all records of a store, whole or not.
pub(super) fn record_files(store: &Store) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for shard in read_dir(&store.root().join("records"))? {
        files.extend(read_dir(&shard)?);
    }
    files.retain(|path| path.extension().is_some_and(|e| e == "json"));
    Ok(files)
}

fn read_dir(dir: &std::path::Path) -> Result<Vec<PathBuf>> {
    match std::fs::read_dir(dir) {
        Ok(entries) => entries.map(|e| Ok(e?.path())).collect(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(e).with_context(|| format!("reading {}", dir.display())),
    }
}

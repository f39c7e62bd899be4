//! Where a result came from.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use serde::Serialize;
use serde_json::Value;

use super::Record;
use super::why::member_path;
use crate::digest::Digest;
use crate::source::{Fault, suggest};
use crate::store::Store;

/// An input of a record: the tree that it read, and who made that.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Link {
    /// Path in the pre-image and port (`data.train`).
    pub input: String,
    /// The tree.
    pub digest: Digest,
    /// Key of the record that made it; absent for a file from outside or a lost record.
    pub from: Option<Digest>,
}

/// A result and everything that it was made from.
#[derive(Debug, Clone)]
pub struct Lineage {
    /// Records, the one asked for first, producers after their consumers.
    pub records: Vec<Record>,
    /// Inputs by the consumer's key.
    pub links: BTreeMap<Digest, Vec<Link>>,
}

/// The records behind a key, a port's tree, or a unique beginning of either.
///
/// # Errors
/// When nothing or several things begin so, or the store cannot be read.
pub fn trace(store: &Store, name: &str) -> Result<Lineage> {
    // Oldest last, so that of several makers of one tree the first one counts.
    let records = Record::all(store)?;
    let mut makers: BTreeMap<Digest, &Record> = BTreeMap::new();
    let mut by_key: BTreeMap<Digest, &Record> = BTreeMap::new();
    for record in &records {
        by_key.insert(record.key, record);
        for digest in record.ports.values() {
            makers.insert(*digest, record);
        }
    }
    let start = find(name, &by_key, &makers)?;
    let mut found = Lineage { records: Vec::new(), links: BTreeMap::new() };
    let mut seen = BTreeSet::from([start.key]);
    let mut queue = std::collections::VecDeque::from([start]);
    while let Some(record) = queue.pop_front() {
        let mut links = Vec::new();
        inputs("", &record.preimage, &mut links);
        for link in &mut links {
            // A record names the steps that it read from. Where that step's record is lost, the
            // oldest other one that made the same bytes stands for it.
            let named = by_key.get(&source(record, &link.input).unwrap_or(record.key)).copied();
            let maker = named.filter(|r| r.key != record.key).or_else(|| {
                records.iter().rev().find(|r| {
                    r.key != record.key && r.ports.values().any(|digest| *digest == link.digest)
                })
            });
            if let Some(maker) = maker {
                link.from = Some(maker.key);
                if seen.insert(maker.key) {
                    queue.push_back(maker);
                }
            }
        }
        found.links.insert(record.key, links);
        found.records.push(record.clone());
    }
    Ok(found)
}

/// The key of the step behind an input (`data.train`), as the record has it.
fn source(record: &Record, input: &str) -> Option<Digest> {
    let edge = input.rsplit_once('.').map_or(input, |(edge, _)| edge);
    record.made.sources.get(&format!("with.{edge}")).copied()
}

fn find<'a>(
    name: &str,
    by_key: &BTreeMap<Digest, &'a Record>,
    makers: &BTreeMap<Digest, &'a Record>,
) -> Result<&'a Record> {
    let all = || by_key.iter().chain(makers).filter(|(d, _)| d.to_string().starts_with(name));
    let keys: BTreeSet<Digest> = all().map(|(_, r)| r.key).collect();
    match (keys.len(), all().next()) {
        (1, Some((_, record))) => Ok(record),
        (0, _) | (_, None) => {
            let known: Vec<String> = by_key.keys().map(Digest::short).collect();
            let known: Vec<&str> = known.iter().map(String::as_str).collect();
            let help = suggest(name, &known).unwrap_or_else(|| "there are no records yet".into());
            Err(Fault::new(format!("no key or output begins with `{name}`")).help(help).into())
        }
        (n, _) => {
            let fault = Fault::new(format!("{n} records have a key or output like `{name}`"));
            Err(fault.help("give more digits").into())
        }
    }
}

fn inputs(path: &str, value: &Value, out: &mut Vec<Link>) {
    let digest = |v: &Value| v.as_str().and_then(|s| s.parse::<Digest>().ok());
    match value {
        Value::Object(map) => {
            if let Some(ports) = map.get("ports").and_then(Value::as_object) {
                for (port, tree) in ports {
                    if let Some(digest) = digest(tree) {
                        out.push(Link { input: format!("{path}.{port}"), digest, from: None });
                    }
                }
                return;
            }
            if let (1, Some(Value::Array(members))) = (map.len(), map.get("$gather")) {
                for member in members {
                    inputs(&member_path(path, &member["point"]), &member["input"], out);
                }
                return;
            }
            if let (1, Some(file)) = (map.len(), map.get("$file")) {
                if let Some(digest) = digest(&file["digest"]) {
                    out.push(Link { input: path.to_owned(), digest, from: None });
                }
                return;
            }
            for (name, value) in map {
                let hidden = name.starts_with('$') || path.is_empty() && name == "with";
                let path = match (hidden, path.is_empty()) {
                    (true, _) => path.to_owned(),
                    (false, true) => name.clone(),
                    (false, false) => format!("{path}.{name}"),
                };
                inputs(&path, value, out);
            }
        }
        Value::Array(items) => {
            for (i, value) in items.iter().enumerate() {
                inputs(&format!("{path}[{i}]"), value, out);
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// As [`crate::lineage::Made::sources`] names them.
    #[test]
    fn inputs_are_named_by_path_point_and_port() {
        let digest = Digest::of(b"x");
        let input = json!({ "type": "report", "ports": { "report": digest } });
        let member = json!({ "point": { "lora.r": 8 }, "input": input });
        let with = json!({ "data": { "$input": input }, "scores": { "$gather": [member] } });
        let mut links = Vec::new();
        inputs("", &json!({ "kind": "k", "with": with }), &mut links);
        let names: Vec<&str> = links.iter().map(|l| l.input.as_str()).collect();
        assert_eq!(names, ["data.report", "scores@lora.r=8.report"]);
    }
}

//! Inputs bound to what flows along them, and the key that follows.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use petgraph::Direction;
use petgraph::graph::NodeIndex;
use petgraph::visit::EdgeRef;
use serde_json::{Map, Value, json};

use super::Options;
use super::prepare::bad_field;
use crate::digest::Digest;
use crate::lineage::{Current, Loaded, Past, Record, Why};
use crate::pipeline::{Instance, Plan};
use crate::source::{Fault, suggest};
use crate::step::Step;
use crate::store::Store;

/// A step whose inputs are bound and narrowed, with its key.
pub(super) struct Bound {
    pub(super) step: Box<dyn Step>,
    pub(super) preimage: Value,
    pub(super) key: Digest,
    /// The step behind each input, by path in the pre-image.
    pub(super) sources: BTreeMap<String, String>,
    /// Its key.
    pub(super) source_keys: BTreeMap<String, Digest>,
}

/// Binds a step to the records of its producers, all of which are there.
pub(super) fn bind(
    plan: &Plan,
    node: NodeIndex,
    resolved: &dyn Step,
    records: &BTreeMap<NodeIndex, Record>,
    options: &Options,
) -> Result<Bound> {
    let instance = &plan.graph[node];
    let mut feeds = BTreeMap::new();
    for edge in plan.graph.edges_directed(node, Direction::Incoming) {
        feeds.insert(edge.weight().index, (edge.source(), edge.weight().port.as_deref()));
    }
    let (mut sources, mut source_keys) = (BTreeMap::new(), BTreeMap::new());
    let mut params = resolved.params();
    for_inputs("with", &mut params, &mut |path, binding| {
        let index = binding.get("edge").and_then(Value::as_u64);
        let index = index.context("an input without an edge")?;
        let feed = usize::try_from(index).ok().and_then(|i| feeds.get(&i));
        let (producer, port) = feed.with_context(|| format!("the plan has no edge {index}"))?;
        let from = &plan.graph[*producer].id.0;
        let record = records.get(producer).with_context(|| format!("{from} has no result"))?;
        sources.insert(path.to_owned(), from.clone());
        source_keys.insert(path.to_owned(), record.key);
        binding.insert("ports".into(), serde_json::to_value(ports(record, *port, from)?)?);
        if instance.kind.reads_records {
            binding.insert("facts".into(), Value::Object(facts(record)));
        }
        Ok(())
    })?;
    let mut step = (instance.kind.parse)(&params).map_err(bad_field)?;
    step.narrow();
    let with = step.key_params();
    ensure!(
        resolved_files(&with),
        "kind `{}` left a file without its digest; its `resolve` must call `Outside::file`",
        instance.kind.name
    );
    let mut preimage = json!({
        "kind": instance.kind.name,
        "version": instance.kind.version,
        "with": with,
        "env": instance.env,
    });
    if let (Some(salt), Some(map)) = (&instance.salt, preimage.as_object_mut()) {
        map.insert("salt".into(), salt.as_str().into());
    }
    if let (true, Some(map)) = (instance.kind.runs_model, preimage.as_object_mut()) {
        let (device, compute) = options.place(instance);
        map.insert("device".into(), serde_json::to_value(device)?);
        map.insert("compute".into(), compute.into());
    }
    let key = Digest::of_value(Record::KEY_DOMAIN, &preimage)?;
    Ok(Bound { step, preimage, key, sources, source_keys })
}

/// Whether every file has its content digest: a key without one would never change.
fn resolved_files(with: &Value) -> bool {
    match with {
        Value::Array(items) => items.iter().all(resolved_files),
        Value::Object(map) => match (map.len(), map.get("$file")) {
            (1, Some(file)) => file["digest"].is_string(),
            _ => map.values().all(resolved_files),
        },
        _ => true,
    }
}

fn ports(record: &Record, port: Option<&str>, from: &str) -> Result<BTreeMap<String, Digest>> {
    let Some(port) = port else { return Ok(record.ports.clone()) };
    if let Some(digest) = record.ports.get(port) {
        return Ok(BTreeMap::from([(port.to_owned(), *digest)]));
    }
    let known: Vec<&str> = record.ports.keys().map(String::as_str).collect();
    let help = suggest(port, &known).unwrap_or_else(|| "it made nothing".into());
    Err(Fault::new(format!("{from} made no `{port}`")).help(help).into())
}

/// What a record says to kinds that read records.
fn facts(record: &Record) -> Map<String, Value> {
    let mut facts = record.facts.clone();
    facts.insert("seconds".into(), record.made.seconds.into());
    if let Some(seconds) = record.made.cpu_seconds {
        facts.insert("cpu_seconds".into(), seconds.into());
    }
    if let Some(bytes) = record.made.peak_rss_bytes {
        facts.insert("peak_rss_bytes".into(), bytes.into());
    }
    facts
}

/// Fills in one `$input`, given its path.
type Fill<'f> = dyn FnMut(&str, &mut Map<String, Value>) -> Result<()> + 'f;

/// Calls `bind` for every `$input` of some parameters, with the path that
/// [`difference`](crate::lineage::difference) gives it.
fn for_inputs(path: &str, value: &mut Value, bind: &mut Fill<'_>) -> Result<()> {
    match value {
        Value::Object(map) => {
            let alone = map.len() == 1;
            if let (true, Some(Value::Object(binding))) = (alone, map.get_mut("$input")) {
                return bind(path, binding);
            }
            if let (true, Some(text)) = (alone, map.get_mut("$text")) {
                return for_inputs(path, text, bind);
            }
            if let (true, Some(gather)) = (alone, map.get_mut("$gather")) {
                let members = gather.get_mut("members").and_then(Value::as_array_mut);
                for member in members.into_iter().flatten() {
                    let path = crate::lineage::member_path(path, &member["point"]);
                    if let Some(binding) = member.get_mut("input").and_then(Value::as_object_mut) {
                        bind(&path, binding)?;
                    }
                }
                return Ok(());
            }
            for (name, value) in map {
                for_inputs(&format!("{path}.{name}"), value, bind)?;
            }
        }
        Value::Array(items) => {
            for (i, value) in items.iter_mut().enumerate() {
                for_inputs(&format!("{path}[{i}]"), value, bind)?;
            }
        }
        _ => {}
    }
    Ok(())
}

/// Whether a result is there.
pub(super) enum Decision {
    Hit(Box<Record>),
    Miss(Why),
}

/// What the store has under a key: a hit only if the record is whole and every byte of its output
/// can be found.
pub(super) fn look_up(store: &Store, key: &Digest) -> Result<Result<Box<Record>, Option<Why>>> {
    let record = match Record::load(store, key)? {
        Loaded::Found(record) => record,
        Loaded::Absent => return Ok(Err(None)),
        Loaded::Corrupt(reason) => return Ok(Err(Some(Why::Corrupt { reason }))),
    };
    for (port, tree) in &record.ports {
        if let Some(reason) = store.missing(tree)? {
            return Ok(Err(Some(Why::LostOutput { reason: format!("{port}: {reason}") })));
        }
    }
    Ok(Ok(record))
}

/// Hit or miss, and why.
pub(super) fn decide(
    store: &Store,
    past: &Past,
    instance: &Instance,
    bound: &Bound,
    forced: bool,
) -> Result<Decision> {
    let noted = |why: Why| {
        past.note(&instance.id.0, &why);
        Ok(Decision::Miss(why))
    };
    if forced {
        return noted(Why::Forced);
    }
    match look_up(store, &bound.key)? {
        Ok(record) => Ok(Decision::Hit(record)),
        Err(Some(why)) => noted(why),
        Err(None) => {
            let current = Current {
                preimage: &bound.preimage,
                key: bound.key,
                step: &instance.step,
                id: &instance.id.0,
                kind: instance.kind.name,
                sources: &bound.sources,
            };
            Ok(Decision::Miss(past.explain(&current)?))
        }
    }
}

//! `flow pin`.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::json;

use super::arguments::PinOptions;
use super::error::{Exit, Failure};
use super::history::record_of;
use super::named::named;
use super::session::store_here;
use super::{Stage, out, table};
use crate::digest::Digest;
use crate::lineage::{Pin, Pins, unix_ms};

/// `flow pin WHAT`, `flow pin --list`, `flow pin --remove NAME`.
pub(super) fn pin(stage: &Stage, options: &PinOptions) -> Result<Exit, Failure> {
    let store = store_here(stage)?;
    let pins = Pins::of(&store);
    if let Some(name) = &options.remove {
        pins.remove(name)?;
        match stage.json {
            true => outln!("{}", json!({ "removed": name }))?,
            false => errln!("removed the pin {name}; what it held stays until the next gc"),
        }
        return Ok(Exit::Done);
    }
    let Some(what) = options.what.as_deref().filter(|_| !options.list) else {
        list(stage, &pins.list()?)?;
        return Ok(Exit::Done);
    };
    let found = named(&store, what, &options.run)?;
    let run = found.run.map(|run| run.info.id);
    // Steps that failed or were not reached hold nothing.
    let mut keys = BTreeSet::new();
    for key in found.keys.keys() {
        keys.extend(record_of(&store, Some(*key))?.map(|record| record.key));
    }
    let name = options.name.clone();
    let name = name.unwrap_or_else(|| default_name(run.as_deref(), &found.keys, what));
    let pin = Pin { name, what: found.what, run, keys, pinned_unix_ms: unix_ms() };
    pins.add(&pin)?;
    if stage.json {
        outln!("{}", as_json(&pin))?;
    } else {
        let (n, s) = (pin.keys.len(), if pin.keys.len() == 1 { "" } else { "s" });
        errln!(
            "pinned {} as {}: {n} result{s} and all that they were made from",
            pin.what,
            pin.name
        );
    }
    Ok(Exit::Done)
}

/// The run's id; else what was named and, to tell results of one step apart, a key.
fn default_name(run: Option<&str>, keys: &BTreeMap<Digest, String>, what: &str) -> String {
    if let Some(run) = run {
        return run.to_owned();
    }
    let (label, key) = match keys.iter().next() {
        Some((key, step)) if keys.len() == 1 => (step.as_str(), key.short()),
        Some((key, _)) => (what, key.short()),
        None => (what, String::new()),
    };
    let plain = |c: char| if c.is_ascii_alphanumeric() || "._-@=,+".contains(c) { c } else { '_' };
    let mut name: String = label.chars().map(plain).collect();
    name.truncate(Pins::LONGEST - key.len() - 1);
    format!("{name}-{key}")
}

fn as_json(pin: &Pin) -> serde_json::Value {
    let Pin { name, what, run, keys, pinned_unix_ms } = pin;
    json!({
        "name": name, "what": what, "run": run, "keys": keys, "pinned_unix_ms": pinned_unix_ms,
    })
}

fn list(stage: &Stage, pins: &[Pin]) -> Result<(), Failure> {
    if stage.json {
        outln!("{}", serde_json::Value::Array(pins.iter().map(as_json).collect()))?;
        return Ok(());
    }
    let rows = pins.iter().map(|pin| {
        let results = pin.keys.len().to_string();
        vec![pin.name.clone(), pin.what.clone(), results, table::when(pin.pinned_unix_ms)]
    });
    out::text(&table::render(&["pin", "what", "results", "since"], &rows.collect::<Vec<_>>()))?;
    Ok(())
}

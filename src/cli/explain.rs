//! `flow why` and `flow trace`: answers from the records.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::json;

use super::arguments::{StepOptions, TraceOptions};
use super::error::{Exit, Failure};
use super::history::record_of;
use super::session::store_here;
use super::steps::{Phase, steps_named};
use super::{Stage, table};
use crate::digest::Digest;
use crate::lineage::{Run, Runs, trace as trace_back};
use crate::source::Fault;

/// `flow why [STEP] [--run RUN]`.
pub(super) fn why(stage: &Stage, options: &StepOptions) -> Result<Exit, Failure> {
    let store = store_here(stage)?;
    let run = Runs::of(&store).find(&options.run)?;
    let steps = steps_named(&run, options.step.as_deref())?;
    if stage.json {
        outln!("{}", json!(steps))?;
        return Ok(Exit::Done);
    }
    for step in steps {
        let because = step.why.as_ref().map(|why| format!(": {why}")).unwrap_or_default();
        let text = match (step.state, &step.message) {
            (Phase::Hit, _) => match record_of(&store, step.key)? {
                Some(record) => format!("from the cache: made by run {}", record.made.run),
                None => "from the cache".to_owned(),
            },
            (Phase::Failed, message) => {
                let message = message.as_deref().unwrap_or("failed");
                let why = step.why.as_ref().map(|w| format!("; it ran because: {w}"));
                format!("failed: {message}{}", why.unwrap_or_default())
            }
            (Phase::Skipped, Some(message)) => format!("skipped: {message}"),
            (Phase::Waiting, _) if step.why.is_some() => format!("will run{because}"),
            (state, _) => {
                let record = record_of(&store, step.key)?;
                let chunks = record.as_ref().and_then(|r| r.facts.get("chunks")?.as_str());
                let chunks = chunks.map(|n| format!("; chunks: {n}")).unwrap_or_default();
                format!("{}{because}{chunks}", state.word())
            }
        };
        outln!("{}  {text}", step.id)?;
    }
    Ok(Exit::Done)
}

/// `flow trace WHAT`.
pub(super) fn trace(stage: &Stage, options: &TraceOptions) -> Result<Exit, Failure> {
    let store = store_here(stage)?;
    let what = match Runs::of(&store).find(&options.run) {
        Ok(run) => start_of(&run, &options.what)?,
        // Records can be traced without any run.
        Err(_) if options.run == "latest" => options.what.clone(),
        Err(error) => return Err(error.into()),
    };
    let lineage = trace_back(&store, &what)?;
    if stage.json {
        let records = lineage
            .records
            .iter()
            .map(|record| json!({ "record": record, "inputs": lineage.links.get(&record.key) }));
        outln!("{}", serde_json::Value::Array(records.collect()))?;
        return Ok(Exit::Done);
    }
    let names: BTreeMap<Digest, &str> =
        lineage.records.iter().map(|r| (r.key, r.made.step.as_str())).collect();
    for record in &lineage.records {
        let made = &record.made;
        outln!(
            "{}  {} v{}  key {}  run {}  {}",
            made.step,
            record.kind,
            record.version,
            record.key.short(),
            made.run,
            table::seconds(made.seconds)
        )?;
        for link in lineage.links.get(&record.key).into_iter().flatten() {
            let from = match link.from.and_then(|key| names.get(&key)) {
                Some(step) => format!("from {step}"),
                None => "from outside".to_owned(),
            };
            outln!("    {}  {}  {from}", link.input, link.digest.short())?;
        }
    }
    Ok(Exit::Done)
}

/// What a trace begins with: the key of a step of the run, else a digest as it was given.
fn start_of(run: &Run, what: &str) -> Result<String, Failure> {
    let digest = what.len() >= 6 && what.bytes().all(|b| b.is_ascii_hexdigit());
    let steps = match steps_named(run, Some(what)) {
        Ok(steps) => steps,
        Err(_) if digest => return Ok(what.to_owned()),
        Err(failure) => return Err(failure),
    };
    let ids: Vec<&str> = steps.iter().map(|s| s.id.as_str()).collect();
    let fault = match steps.as_slice() {
        [step] => match step.key {
            Some(key) => return Ok(key.to_string()),
            None => {
                let fault = Fault::new(format!("{} has no result", step.id));
                fault.help(format!("in run {} it is {}", run.info.id, step.state.word()))
            }
        },
        several => {
            let keys: BTreeSet<_> = several.iter().map(|s| s.key).collect();
            if let (1, Some(Some(key))) = (keys.len(), keys.first()) {
                return Ok(key.to_string());
            }
            let n = several.len();
            let fault = Fault::new(format!("`{what}` names {n} steps of run {}", run.info.id));
            fault.help(format!("trace one of them: {}", ids.join(", ")))
        }
    };
    Err(Failure::Usage(fault.into()))
}

//! `flow why` and `flow trace`: answers from the records.

use std::collections::BTreeMap;

use serde_json::json;

use super::arguments::{StepOptions, TraceOptions};
use super::error::{Exit, Failure};
use super::history::{record_of, steps_named};
use super::session::store_here;
use super::{Stage, table};
use crate::digest::Digest;
use crate::lineage::{Runs, State, trace as trace_back};

/// `flow why [STEP] [--run RUN]`.
pub(super) fn why(stage: &Stage, options: &StepOptions) -> Result<Exit, Failure> {
    let store = store_here(stage)?;
    let run = Runs::of(&store).find(&options.run)?;
    let steps = steps_named(&run, options.step.as_deref())?;
    if stage.json {
        println!("{}", serde_json::to_value(&steps).map_err(anyhow::Error::from)?);
        return Ok(Exit::Done);
    }
    for step in steps {
        let text = match (step.state, &step.why, &step.message) {
            (State::Hit, ..) => match record_of(&store, step.key)? {
                Some(record) => format!("from the cache: made by run {}", record.made.run),
                None => "from the cache".to_owned(),
            },
            (State::Ran, Some(why), _) => format!("ran: {why}"),
            (State::Failed, why, message) => {
                let why = why.as_ref().map(|w| format!("; it ran because: {w}"));
                let message = message.as_deref().unwrap_or("failed");
                format!("failed: {message}{}", why.unwrap_or_default())
            }
            (State::Skipped, _, Some(message)) => format!("skipped: {message}"),
            (state, ..) => format!("{state:?}").to_lowercase(),
        };
        println!("{}  {text}", step.id);
    }
    Ok(Exit::Done)
}

/// `flow trace WHAT`.
pub(super) fn trace(stage: &Stage, options: &TraceOptions) -> Result<Exit, Failure> {
    let store = store_here(stage)?;
    let runs = Runs::of(&store);
    let of_run = runs.find(&options.run).ok();
    let step = of_run.as_ref().and_then(|run| run.step(&options.what)).and_then(|s| s.key);
    let what = step.map_or_else(|| options.what.clone(), |key| key.to_string());
    let lineage = trace_back(&store, &what)?;
    if stage.json {
        let records = lineage
            .records
            .iter()
            .map(|record| json!({ "record": record, "inputs": lineage.links.get(&record.key) }));
        println!("{}", serde_json::Value::Array(records.collect()));
        return Ok(Exit::Done);
    }
    let names: BTreeMap<Digest, &str> =
        lineage.records.iter().map(|r| (r.key, r.made.step.as_str())).collect();
    for record in &lineage.records {
        let made = &record.made;
        println!(
            "{}  {} v{}  key {}  run {}  {}",
            made.step,
            record.kind,
            record.version,
            record.key.short(),
            made.run,
            table::seconds(made.seconds)
        );
        for link in lineage.links.get(&record.key).into_iter().flatten() {
            let from = match link.from.and_then(|key| names.get(&key)) {
                Some(step) => format!("from {step}"),
                None => "from outside".to_owned(),
            };
            println!("    {}  {}  {from}", link.input, link.digest.short());
        }
    }
    Ok(Exit::Done)
}

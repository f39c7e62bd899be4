//! `flow runs`, `flow show`, `flow log`: what is on record.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::arguments::{RunsOptions, ShowOptions, StepOptions};
use super::error::{Exit, Failure};
use super::session::store_here;
use super::sketch::sketch;
use super::steps::{Phase, StepStatus, steps_named, steps_of};
use super::{Stage, out, samples, shell, table};
use crate::artifact::View;
use crate::digest::Digest;
use crate::lineage::{Curves, Loaded, Record, Run, Runs, is_measured};
use crate::store::Store;

/// The record of a key, if it can be read.
pub(super) fn record_of(
    store: &Store,
    key: Option<Digest>,
) -> Result<Option<Box<Record>>, Failure> {
    let Some(key) = key else { return Ok(None) };
    Ok(match Record::load(store, &key)? {
        Loaded::Found(record) => Some(record),
        Loaded::Absent | Loaded::Corrupt(_) => None,
    })
}

/// `flow runs`.
pub(super) fn runs(stage: &Stage, options: &RunsOptions) -> Result<Exit, Failure> {
    let store = store_here(stage)?;
    let runs = Runs::of(&store).list()?;
    let runs: Vec<&Run> = runs.iter().take(options.limit).collect();
    if stage.json {
        let list =
            runs.iter().map(|r| json!({ "run": r.info, "status": r.status, "summary": r.summary }));
        outln!("{}", Value::Array(list.collect()))?;
        return Ok(Exit::Done);
    }
    let rows = runs.iter().map(|run| {
        let steps = steps_of(run);
        let count = |state| steps.iter().filter(|s| s.state == state).count().to_string();
        vec![
            run.info.id.clone(),
            run.info.pipeline.clone(),
            format!("{:?}", run.status).to_lowercase(),
            count(Phase::Ran),
            count(Phase::Hit),
            count(Phase::Failed),
            run.summary.as_ref().map_or_else(String::new, |s| table::seconds(s.seconds)),
        ]
    });
    let head = ["run", "pipeline", "status", "ran", "cached", "failed", "time"];
    out::text(&table::render(&head, &rows.collect::<Vec<_>>()))?;
    Ok(Exit::Done)
}

/// `flow show [RUN] [STEP]`.
pub(super) fn show(stage: &Stage, options: &ShowOptions) -> Result<Exit, Failure> {
    let store = store_here(stage)?;
    let runs = Runs::of(&store);
    let (run, step) = match (runs.find(&options.what), &options.step) {
        (Ok(run), step) => (run, step.clone()),
        (Err(error), Some(_)) => return Err(error.into()),
        // several runs begin so
        (Err(error), None) if runs.ids()?.iter().any(|id| id.starts_with(&options.what)) => {
            return Err(error.into());
        }
        // not a run: perhaps a step of the latest one
        (Err(_), None) => (runs.find("latest")?, Some(options.what.clone())),
    };
    let Some(name) = step else {
        show_run(stage, &run)?;
        return Ok(Exit::Done);
    };
    let steps = steps_named(&run, Some(&name))?;
    if stage.json {
        let mut list = Vec::with_capacity(steps.len());
        for step in &steps {
            let differences = match &step.key {
                Some(key) => Record::differences(&store, key)?,
                None => Vec::new(),
            };
            let record = record_of(&store, step.key)?;
            let curves = curves_of(&store, &run, step, record.as_deref());
            list.push(json!({
                "step": step, "record": record, "differences": differences, "curves": curves,
            }));
        }
        outln!("{}", Value::Array(list))?;
        return Ok(Exit::Done);
    }
    for step in &steps {
        show_step(&store, &run, step)?;
    }
    Ok(Exit::Done)
}

fn show_run(stage: &Stage, run: &Run) -> Result<(), Failure> {
    if stage.json {
        let (info, steps) = (&run.info, steps_of(run));
        let (status, summary) = (run.status, &run.summary);
        outln!("{}", json!({ "run": info, "status": status, "steps": steps, "summary": summary }))?;
        return Ok(());
    }
    let info = &run.info;
    outln!("run {}  {}  {:?}", info.id, info.pipeline, run.status)?;
    outln!("started {}  on {}", table::when(info.started_unix_ms), info.host)?;
    outln!(
        "$ {}
",
        shell::line(&info.command_line)
    )?;
    let steps = steps_of(run);
    let rows = steps.iter().map(|s| {
        let why = s.message.clone().or_else(|| s.why.as_ref().map(ToString::to_string));
        let time = if s.seconds > 0.0 { table::seconds(s.seconds) } else { String::new() };
        let key = s.key.map(|k| k.short()).unwrap_or_default();
        let state = s.state.word().to_owned();
        vec![s.id.clone(), state, key, time, why.unwrap_or_default()]
    });
    let head = ["step", "state", "key", "time", "because"];
    out::text(&table::render(&head, &rows.collect::<Vec<_>>()))?;
    Ok(())
}

fn show_step(store: &Store, run: &Run, step: &StepStatus) -> Result<(), Failure> {
    let record = record_of(store, step.key)?;
    outln!("{}  {}", step.id, step.state.word())?;
    let Some(record) = record else {
        let message = step.message.as_deref().map(|m| format!(": {m}")).unwrap_or_default();
        outln!("  no record{message}")?;
        show_curves(&curves_of(store, run, step, None))?;
        return Ok(());
    };
    let made = &record.made;
    outln!("  kind     {} v{}", record.kind, record.version)?;
    outln!("  key      {}", record.key)?;
    outln!(
        "  made     run {}, {}, in {}",
        made.run,
        table::when(made.started_unix_ms),
        table::seconds(made.seconds)
    )?;
    let threads = match made.threads {
        1 => "1 thread".to_owned(),
        n => format!("{n} threads"),
    };
    outln!("  on       {}, {} {}, {threads}", made.host, made.device, made.isa)?;
    if let Some(bytes) = made.peak_rss_bytes {
        outln!("  memory   {} at most", table::bytes(bytes))?;
    }
    outln!("  with")?;
    for line in format!("{:#}", record.preimage["with"]).lines() {
        outln!("    {line}")?;
    }
    outln!("  made")?;
    for (port, digest) in &record.ports {
        outln!("    {port}  {}", digest.short())?;
    }
    if !record.facts.is_empty() {
        outln!("  facts")?;
        for (name, value) in &record.facts {
            outln!("    {name}  {value}")?;
        }
    }
    for warning in &record.warnings {
        outln!("  warning: {warning}")?;
    }
    show_curves(&curves_of(store, run, step, Some(&record)))?;
    show_ledger(store, &record)?;
    let view = View { ty: record.ty, ports: record.ports.clone(), store: store.clone() };
    for port in record.ports.keys() {
        show_files(&view, port)?;
    }
    Ok(())
}

/// The curves of a step of a run: of one that ran (or runs, or failed), those that it drew there;
/// of a result from the cache, those of the run that made it.
fn curves_of(store: &Store, run: &Run, step: &StepStatus, record: Option<&Record>) -> Curves {
    match (step.state, record) {
        (Phase::Hit, Some(record)) => record.curves(store),
        _ => run.curves(&step.id).unwrap_or_default(),
    }
}

fn show_curves(curves: &Curves) -> std::io::Result<()> {
    let known = curves.iter().filter_map(|(name, curve)| Some((name, sketch(curve)?)));
    for (at, (name, sketch)) in known.enumerate() {
        if at == 0 {
            outln!("  curves")?;
        }
        outln!("    {name}  {sketch}")?;
    }
    Ok(())
}

/// What else the key has given: results that differ, and how far their metrics lie apart.
fn show_ledger(store: &Store, record: &Record) -> Result<(), Failure> {
    let ledger = Record::differences(store, &record.key)?;
    if ledger.is_empty() {
        return Ok(());
    }
    let mut given: Vec<&BTreeMap<String, Digest>> = vec![&record.ports];
    given.extend(ledger.iter().map(|d| &d.ports));
    given.sort_unstable();
    given.dedup();
    outln!(
        "  ledger   made {} times, {} results; the first stands",
        ledger.len() + 1,
        given.len()
    )?;
    for other in &ledger {
        let names = record.ports.keys().chain(other.ports.keys());
        let differ = |name: &&String| record.ports.get(*name) != other.ports.get(*name);
        let ports: BTreeSet<&str> = names.filter(differ).map(String::as_str).collect();
        let ports: Vec<&str> = ports.into_iter().collect();
        let (made, ports) = (&other.made, ports.join(", "));
        outln!("    {}  {}  other {ports}", made.run, table::when(made.started_unix_ms))?;
    }
    let own = record.metrics(store);
    for (name, first) in own.iter().filter(|(name, _)| !is_measured(name)) {
        let all = ledger.iter().filter_map(|d| d.metrics.get(name)?.as_f64());
        let Some(first) = first.as_f64() else { continue };
        let (low, high) = all.fold((first, first), |(l, h), x| (l.min(x), h.max(x)));
        if low < high {
            outln!("    {name}  {first}, from {low} to {high}")?;
        }
    }
    Ok(())
}

/// What a port holds for people: tables, metrics, samples.
fn show_files(view: &View, port: &str) -> std::io::Result<()> {
    for name in ["report.md", "samples.json", "report.json"] {
        let Ok(Some(path)) = view.find(port, name) else { continue };
        if let Ok(text) = std::fs::read_to_string(path) {
            let text = samples::readable(&text).filter(|_| name == "samples.json").unwrap_or(text);
            outln!("  {port}/{name}")?;
            for line in text.lines().take(120) {
                outln!("    {line}")?;
            }
            if name == "report.md" {
                break;
            }
        }
    }
    Ok(())
}

/// `flow log [STEP] [--run RUN]`.
pub(super) fn log(stage: &Stage, options: &StepOptions) -> Result<Exit, Failure> {
    let store = store_here(stage)?;
    let runs = Runs::of(&store);
    let run = runs.find(&options.run)?;
    let mut list = Vec::new();
    for step in steps_named(&run, options.step.as_deref())? {
        let mut path = run.log_path(&step.id);
        if !path.is_file()
            && let Some(record) = record_of(&store, step.key)?
            && let Ok(maker) = runs.find(&record.made.run)
        {
            path = maker.log_path(&record.made.step);
        }
        // A command may write any bytes.
        let log = std::fs::read(&path).map(|log| String::from_utf8_lossy(&log).into_owned());
        match log {
            Ok(text) if stage.json => {
                list.push(json!({ "step": step.id, "path": path, "text": text }));
            }
            Ok(text) if options.step.is_none() => {
                for line in text.lines() {
                    outln!("{}  {line}", step.id)?;
                }
            }
            Ok(text) => out::text(&text)?,
            Err(_) => errln!("{}  has no log", step.id),
        }
    }
    if stage.json {
        outln!("{}", Value::Array(list))?;
    }
    Ok(Exit::Done)
}

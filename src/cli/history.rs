//! `flow runs`, `flow show`, `flow log`: what is on record.

use serde_json::{Value, json};

use super::arguments::{RunsOptions, ShowOptions, StepOptions};
use super::error::{Exit, Failure};
use super::session::store_here;
use super::{Stage, table};
use crate::artifact::View;
use crate::digest::Digest;
use crate::lineage::{Loaded, Record, Run, Runs, State, StepSummary};
use crate::source::{Fault, suggest};
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

/// Steps of a run: all, the instances of one step, or one instance.
pub(super) fn steps_named(run: &Run, name: Option<&str>) -> Result<Vec<StepSummary>, Failure> {
    let Some(summary) = &run.summary else {
        let fault = Fault::new(format!("run {} has not ended", run.info.id));
        return Err(Failure::Usage(fault.help("see `flow log` for what it says").into()));
    };
    let Some(name) = name else { return Ok(summary.steps.clone()) };
    let matches = |id: &str| id == name || id.split('@').next() == Some(name);
    let found: Vec<_> = summary.steps.iter().filter(|s| matches(&s.id)).cloned().collect();
    if found.is_empty() {
        let known: Vec<&str> = summary.steps.iter().map(|s| s.id.as_str()).collect();
        let fault = Fault::new(format!("run {} has no step `{name}`", run.info.id));
        let help = suggest(name, &known).unwrap_or_default();
        return Err(Failure::Usage(fault.help(help).into()));
    }
    Ok(found)
}

fn when(unix_ms: u64) -> String {
    let time =
        i64::try_from(unix_ms).ok().and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
    time.map_or_else(String::new, |t| t.strftime("%Y-%m-%d %H:%M:%S UTC").to_string())
}

/// `flow runs`.
pub(super) fn runs(stage: &Stage, options: &RunsOptions) -> Result<Exit, Failure> {
    let store = store_here(stage)?;
    let runs = Runs::of(&store).list()?;
    let runs: Vec<&Run> = runs.iter().take(options.limit).collect();
    if stage.json {
        let list =
            runs.iter().map(|r| json!({ "run": r.info, "status": r.status, "summary": r.summary }));
        println!("{}", Value::Array(list.collect()));
        return Ok(Exit::Done);
    }
    let rows = runs.iter().map(|run| {
        let count = |state| {
            let steps = run.summary.iter().flat_map(|s| &s.steps);
            steps.filter(|s| s.state == state).count().to_string()
        };
        vec![
            run.info.id.clone(),
            run.info.pipeline.clone(),
            format!("{:?}", run.status).to_lowercase(),
            count(State::Ran),
            count(State::Hit),
            count(State::Failed),
            run.summary.as_ref().map_or_else(String::new, |s| table::seconds(s.seconds)),
        ]
    });
    let head = ["run", "pipeline", "status", "ran", "cached", "failed", "time"];
    print!("{}", table::render(&head, &rows.collect::<Vec<_>>()));
    Ok(Exit::Done)
}

/// `flow show [RUN] [STEP]`.
pub(super) fn show(stage: &Stage, options: &ShowOptions) -> Result<Exit, Failure> {
    let store = store_here(stage)?;
    let runs = Runs::of(&store);
    let (run, step) = match (runs.find(&options.what), &options.step) {
        (Ok(run), step) => (run, step.clone()),
        (Err(error), Some(_)) => return Err(error.into()),
        // not a run: perhaps a step of the latest one
        (Err(_), None) => (runs.find("latest")?, Some(options.what.clone())),
    };
    match step {
        Some(name) => {
            for step in steps_named(&run, Some(&name))? {
                show_step(stage, &store, &step)?;
            }
        }
        None => show_run(stage, &run)?,
    }
    Ok(Exit::Done)
}

fn show_run(stage: &Stage, run: &Run) -> Result<(), Failure> {
    if stage.json {
        println!("{}", json!({ "run": run.info, "status": run.status, "summary": run.summary }));
        return Ok(());
    }
    let info = &run.info;
    println!("run {}  {}  {:?}", info.id, info.pipeline, run.status);
    println!("started {}  on {}", when(info.started_unix_ms), info.host);
    println!("$ {}\n", info.command_line.join(" "));
    let rows = run.summary.iter().flat_map(|s| &s.steps).map(|s| {
        let why = s.message.clone().or_else(|| s.why.as_ref().map(ToString::to_string));
        let time = if s.seconds > 0.0 { table::seconds(s.seconds) } else { String::new() };
        let key = s.key.map(|k| k.short()).unwrap_or_default();
        let state = format!("{:?}", s.state).to_lowercase();
        vec![s.id.clone(), state, key, time, why.unwrap_or_default()]
    });
    let head = ["step", "state", "key", "time", "because"];
    print!("{}", table::render(&head, &rows.collect::<Vec<_>>()));
    Ok(())
}

fn show_step(stage: &Stage, store: &Store, step: &StepSummary) -> Result<(), Failure> {
    let record = record_of(store, step.key)?;
    if stage.json {
        println!("{}", json!({ "step": step, "record": record }));
        return Ok(());
    }
    println!("{}  {:?}", step.id, step.state);
    let Some(record) = record else {
        println!(
            "  no record{}",
            step.message.as_deref().map(|m| format!(": {m}")).unwrap_or_default()
        );
        return Ok(());
    };
    let made = &record.made;
    println!("  kind     {} v{}", record.kind, record.version);
    println!("  key      {}", record.key);
    println!(
        "  made     run {}, {}, in {}",
        made.run,
        when(made.started_unix_ms),
        table::seconds(made.seconds)
    );
    println!("  on       {}, {} {}, {} threads", made.host, made.device, made.isa, made.threads);
    if let Some(bytes) = made.peak_rss_bytes {
        println!("  memory   {} at most", table::bytes(bytes));
    }
    println!("  with");
    for line in format!("{:#}", record.preimage["with"]).lines() {
        println!("    {line}");
    }
    println!("  made");
    for (port, digest) in &record.ports {
        println!("    {port}  {}", digest.short());
    }
    if !record.facts.is_empty() {
        println!("  facts");
        for (name, value) in &record.facts {
            println!("    {name}  {value}");
        }
    }
    for warning in &record.warnings {
        println!("  warning: {warning}");
    }
    for other in Record::differences(store, &record.key)? {
        println!("  another result of the same key: run {}", other.made.run);
    }
    let view = View { ty: record.ty, ports: record.ports.clone(), store: store.clone() };
    for port in record.ports.keys() {
        show_files(&view, port);
    }
    Ok(())
}

/// What a port holds for people: tables, metrics, samples.
fn show_files(view: &View, port: &str) {
    for name in ["report.md", "samples.json", "report.json"] {
        let Ok(Some(path)) = view.find(port, name) else { continue };
        if let Ok(text) = std::fs::read_to_string(path) {
            println!("  {port}/{name}");
            for line in text.lines().take(120) {
                println!("    {line}");
            }
            if name == "report.md" {
                break;
            }
        }
    }
}

/// `flow log [STEP] [--run RUN]`.
pub(super) fn log(stage: &Stage, options: &StepOptions) -> Result<Exit, Failure> {
    let store = store_here(stage)?;
    let runs = Runs::of(&store);
    let run = runs.find(&options.run)?;
    for step in steps_named(&run, options.step.as_deref())? {
        let mut path = run.log_path(&step.id);
        if !path.is_file()
            && let Some(record) = record_of(&store, step.key)?
            && let Ok(maker) = runs.find(&record.made.run)
        {
            path = maker.log_path(&record.made.step);
        }
        match std::fs::read_to_string(&path) {
            Ok(text) if options.step.is_none() => {
                for line in text.lines() {
                    println!("{}  {line}", step.id);
                }
            }
            Ok(text) => print!("{text}"),
            Err(_) => eprintln!("{}  has no log", step.id),
        }
    }
    Ok(Exit::Done)
}

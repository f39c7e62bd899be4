//! `flow compare`: runs and points of a sweep against their metrics.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::arguments::CompareOptions;
use super::error::{Exit, Failure};
use super::session::store_here;
use super::{Stage, out, table};
use crate::artifact::Type;
use crate::kinds::compare::{FACTS, METRICS, SPEEDS, heading, shown};
use crate::lineage::{Record, Run, Runs, is_measured};
use crate::pipeline::{Point, by_coordinates};
use crate::source::{Fault, suggest};
use crate::store::Store;

/// A run, or a point of its sweep.
struct Row {
    run: String,
    point: Point,
    /// By step and metric.
    values: BTreeMap<(String, String), f64>,
}

/// `flow compare [RUN…] [--metric NAME]`.
pub(super) fn compare(stage: &Stage, options: &CompareOptions) -> Result<Exit, Failure> {
    let store = store_here(stage)?;
    let runs = Runs::of(&store);
    let latest = [String::from("latest")];
    let names = if options.runs.is_empty() { &latest[..] } else { &options.runs };
    let mut rows = Vec::new();
    for name in names {
        rows.extend(rows_of(&store, &runs.find(name)?, &options.metric)?);
    }
    let columns = columns(&rows, &options.metric)?;
    if let (Some((first, steps)), false) = (columns.first(), options.metric.is_empty()) {
        rows.sort_by(|a, b| {
            let value = |row: &Row| steps.iter().find_map(|s| row.values.get(&key(s, first)));
            best_first(first, value(a).copied(), value(b).copied())
        });
    }
    // A metric of one step has its name; one of several, the step's name before it.
    let cells: Vec<(String, String, String)> = columns
        .iter()
        .flat_map(|(metric, steps)| {
            steps.iter().map(|step| {
                let alone = steps.len() == 1;
                let name = if alone { metric.clone() } else { format!("{step}.{metric}") };
                (name, step.clone(), metric.clone())
            })
        })
        .collect();
    if stage.json {
        let list = rows.iter().map(|row| {
            let value = |(name, step, metric): &(String, String, String)| {
                Some((name.clone(), Value::from(*row.values.get(&key(step, metric))?)))
            };
            let values: serde_json::Map<String, Value> = cells.iter().filter_map(value).collect();
            json!({ "run": row.run, "point": row.point, "values": values })
        });
        outln!("{}", Value::Array(list.collect()))?;
        return Ok(Exit::Done);
    }
    show(&rows, &cells)?;
    Ok(Exit::Done)
}

fn key(step: &str, metric: &str) -> (String, String) {
    (step.to_owned(), metric.to_owned())
}

/// Best first: less of a loss, of time and of memory, more of anything else; what lacks the
/// metric comes last.
fn best_first(metric: &str, a: Option<f64>, b: Option<f64>) -> Ordering {
    let speed = metric.ends_with("per_second");
    let costs = ["loss", "perplexity", "bytes", "parameters", "percent"];
    let less = !speed && (is_measured(metric) || costs.iter().any(|end| metric.ends_with(end)));
    match (a, b) {
        (Some(a), Some(b)) if less => a.total_cmp(&b),
        (Some(a), Some(b)) => b.total_cmp(&a),
        (a, b) => b.is_some().cmp(&a.is_some()),
    }
}

/// The step's name and the coordinates of an instance.
fn coordinates(id: &str) -> (&str, Point) {
    let (step, point) = id.split_once('@').unwrap_or((id, ""));
    let pairs = point.split(',').filter_map(|pair| {
        let (axis, value) = pair.split_once('=')?;
        let value = serde_json::from_str(value).unwrap_or_else(|_| value.into());
        Some((axis.to_owned(), value))
    });
    (step, pairs.collect())
}

/// A row for every point of a run's sweep, with the metrics of all steps at it; one row for a
/// run without a sweep.
fn rows_of(store: &Store, run: &Run, asked: &[String]) -> Result<Vec<Row>, Failure> {
    let records = run.records(store)?;
    let mut points: Vec<Point> = records.keys().map(|id| coordinates(id).1).collect();
    points.sort_by(by_coordinates);
    points.dedup();
    let inside = |small: &Point, large: &Point| {
        small.iter().all(|(axis, value)| large.get(axis) == Some(value))
    };
    // What varies along fewer axes belongs to several points and is none itself.
    let whole = |p: &&Point| !points.iter().any(|q| q != *p && inside(p, q));
    let whole: Vec<Point> = points.iter().filter(whole).cloned().collect();
    let rows = whole.into_iter().map(|point| {
        let mut values = BTreeMap::new();
        for (id, record) in &records {
            let (step, own) = coordinates(id);
            if (own.is_empty() && !point.is_empty()) || !inside(&own, &point) {
                continue;
            }
            for (metric, value) in numbers(store, record, asked) {
                values.insert(key(step, &metric), value);
            }
        }
        Row { run: run.info.id.clone(), point, values }
    });
    Ok(rows.collect())
}

/// The numbers of a record that were asked for, else the usual ones of its type.
fn numbers(store: &Store, record: &Record, asked: &[String]) -> BTreeMap<String, f64> {
    let mut metrics = record.metrics(store);
    metrics.insert("seconds".into(), record.made.seconds.into());
    if let Some(bytes) = record.made.peak_rss_bytes {
        metrics.insert("peak_rss_bytes".into(), bytes.into());
    }
    let usual: &[&str] = match record.ty {
        Type::Report if record.kind == "benchmark" => &SPEEDS,
        Type::Report => &METRICS,
        Type::TrainedModel => &FACTS,
        _ => &[],
    };
    metrics.retain(|name, _| match asked {
        [] => usual.contains(&name.as_str()),
        asked => asked.contains(name),
    });
    metrics.into_iter().filter_map(|(name, value)| Some((name, value.as_f64()?))).collect()
}

/// The metrics that the rows have, with the steps that have them: as asked for, else in the usual
/// order.
fn columns(rows: &[Row], asked: &[String]) -> Result<Vec<(String, Vec<String>)>, Failure> {
    let mut known: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for (step, metric) in rows.iter().flat_map(|row| row.values.keys()) {
        known.entry(metric).or_default().insert(step);
    }
    let usual: Vec<String> =
        METRICS.iter().chain(&FACTS).chain(&SPEEDS).map(|m| (*m).to_owned()).collect();
    let names = if asked.is_empty() { &usual } else { asked };
    let mut columns = Vec::new();
    for name in names {
        match known.get(name.as_str()) {
            Some(steps) => {
                columns.push((name.clone(), steps.iter().map(|s| (*s).to_owned()).collect()));
            }
            None if asked.is_empty() => {}
            None => {
                let usual: Vec<&str> = usual.iter().map(String::as_str).collect();
                let fault = Fault::new(format!("no step here has a metric `{name}`"));
                let help = suggest(name, &usual).unwrap_or_default();
                return Err(Failure::Usage(fault.help(help).into()));
            }
        }
    }
    Ok(columns)
}

fn show(rows: &[Row], cells: &[(String, String, String)]) -> std::io::Result<()> {
    let axes: BTreeSet<&String> = rows.iter().flat_map(|row| row.point.keys()).collect();
    let runs: BTreeSet<&String> = rows.iter().map(|row| &row.run).collect();
    let named = runs.len() > 1 || axes.is_empty();
    let mut head = if named { vec!["run".to_owned()] } else { Vec::new() };
    head.extend(axes.iter().map(|axis| (*axis).clone()));
    head.extend(cells.iter().map(|(name, ..)| heading(name)));
    let text = |v: &Value| v.as_str().map_or_else(|| v.to_string(), str::to_owned);
    let lines = rows.iter().map(|row| {
        let mut line = if named { vec![row.run.clone()] } else { Vec::new() };
        line.extend(axes.iter().map(|axis| row.point.get(*axis).map(text).unwrap_or_default()));
        line.extend(cells.iter().map(|(_, step, metric)| {
            row.values.get(&key(step, metric)).map(|v| shown(metric, *v)).unwrap_or_default()
        }));
        line
    });
    let lines: Vec<Vec<String>> = lines.collect();
    let head: Vec<&str> = head.iter().map(String::as_str).collect();
    out::text(&table::render(&head, &lines))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn coordinates_are_typed() {
        let (step, point) = coordinates("train@lora.r=8,name=full");
        assert_eq!(step, "train");
        assert_eq!(json!(point), json!({ "lora.r": 8, "name": "full" }));
        assert!(coordinates("train").1.is_empty());
    }

    #[test]
    fn the_best_comes_first() {
        use Ordering::{Greater, Less};
        assert_eq!(best_first("accuracy", Some(0.9), Some(0.8)), Less);
        assert_eq!(best_first("eval_loss", Some(0.9), Some(0.8)), Greater);
        assert_eq!(best_first("latency_ms", Some(3.0), Some(2.0)), Greater);
        assert_eq!(best_first("tokens_per_second", Some(3.0), Some(2.0)), Less);
        assert_eq!(best_first("accuracy", None, Some(0.0)), Greater);
    }
}

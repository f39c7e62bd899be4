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
    values: BTreeMap<(String, String), Number>,
}

/// A number of a record.
#[derive(Debug, Clone, Copy)]
struct Number {
    value: f64,
    /// Shown without being asked for.
    usual: bool,
}

/// `flow compare [RUN…] [--metric NAME]`.
pub(super) fn compare(stage: &Stage, options: &CompareOptions) -> Result<Exit, Failure> {
    let store = store_here(stage)?;
    let runs = Runs::of(&store);
    let latest = [String::from("latest")];
    let names = if options.runs.is_empty() { &latest[..] } else { &options.runs };
    let mut rows = Vec::new();
    for name in names {
        rows.extend(rows_of(&store, &runs.find(name)?)?);
    }
    let columns = columns(&rows, &options.metric)?;
    if let (Some((first, steps)), false) = (columns.first(), options.metric.is_empty()) {
        let value = |row: &Row| {
            let mut found = steps.iter().filter_map(|step| row.values.get(&key(step, first)));
            found.next().map(|number| number.value)
        };
        rows.sort_by(|a, b| best_first(first, value(a), value(b)));
    }
    let cells = cells(&columns);
    if stage.json {
        let list = rows.iter().map(|row| {
            let value = |(name, step, metric): &(String, String, String)| {
                let number = row.values.get(&key(step, metric))?;
                Some((name.clone(), Value::from(number.value)))
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

/// The columns of the table: name, step, metric. A metric of one step has its name; one of
/// several has the step's name before it.
fn cells(columns: &[(String, Vec<String>)]) -> Vec<(String, String, String)> {
    let mut cells = Vec::new();
    for (metric, steps) in columns {
        for step in steps {
            let alone = steps.len() == 1;
            let name = if alone { metric.clone() } else { format!("{step}.{metric}") };
            cells.push((name, step.clone(), metric.clone()));
        }
    }
    cells
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
fn rows_of(store: &Store, run: &Run) -> Result<Vec<Row>, Failure> {
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
            for (metric, number) in numbers(store, record) {
                values.insert(key(step, &metric), number);
            }
        }
        Row { run: run.info.id.clone(), point, values }
    });
    Ok(rows.collect())
}

/// All numbers of a record, by name.
fn numbers(store: &Store, record: &Record) -> BTreeMap<String, Number> {
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
    let numbers = metrics.into_iter().filter_map(|(name, value)| {
        let usual = usual.contains(&name.as_str());
        Some((name, Number { value: value.as_f64()?, usual }))
    });
    numbers.collect()
}

/// The metrics to show, with the steps that have them: as asked for, else the usual ones.
fn columns(rows: &[Row], asked: &[String]) -> Result<Vec<(String, Vec<String>)>, Failure> {
    let mut known: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    let usual = METRICS.iter().chain(&FACTS).chain(&SPEEDS).map(|m| (*m).to_owned());
    for ((step, metric), number) in rows.iter().flat_map(|row| &row.values) {
        if number.usual || !asked.is_empty() {
            known.entry(metric).or_default().insert(step);
        }
    }
    let names = if asked.is_empty() { usual.collect() } else { asked.to_vec() };
    let mut columns = Vec::new();
    for name in names {
        match known.get(name.as_str()) {
            Some(steps) => {
                let steps = steps.iter().map(|step| (*step).to_owned()).collect();
                columns.push((name, steps));
            }
            None if asked.is_empty() => {}
            None => {
                let known: Vec<&str> = known.keys().copied().collect();
                let fault = Fault::new(format!("no step here has a metric `{name}`"));
                let help = suggest(&name, &known).unwrap_or_default();
                return Err(Failure::Usage(fault.help(help).into()));
            }
        }
    }
    if columns.is_empty() {
        let fault = Fault::new("nothing here has a metric that is usually compared");
        let help = "an evaluation or a training has some; `--metric NAME` shows any number";
        return Err(Failure::Usage(fault.help(help).into()));
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
            let number = row.values.get(&key(step, metric));
            number.map(|n| shown(metric, n.value)).unwrap_or_default()
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

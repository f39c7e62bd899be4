//! `compare`.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::{Context as _, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::loading::grouped;
use super::select::{coordinates, member_at};
use crate::artifact::{AnyModel, Artifact as _, Report, ReportFile, Type};
use crate::source::{Fault, suggest};
use crate::step::{Context, Gather, Ports, Problem, StepKind};

/// One table over the points of a sweep: metrics, trainable parameters, time, memory, size of the
/// adapter, inference speed.
///
/// Everything is joined by sweep coordinates. Numbers about the making of a model come from its
/// record, so a table shows the run that the models in it come from. With `reference` and
/// `within` it also answers whether the other points reach the reference. Written as `report.json`
/// (rows under `details`) and `report.md`.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Compare {
    /// A row for each of these.
    pub reports: Gather<Report>,
    /// Models whose records have parameters, time, memory and size.
    #[serde(default)]
    pub models: Option<Gather<AnyModel>>,
    /// More reports, by the name that their columns begin with (`unmerged`, `merged`).
    #[serde(default)]
    pub benchmarks: BTreeMap<String, Gather<Report>>,
    /// Metrics of `reports` to show; by default those there are of a usual choice.
    #[serde(default)]
    pub metrics: Option<Vec<String>>,
    /// Coordinates of the point that others are held against, like `{ method.name: full }`.
    #[serde(default)]
    pub reference: Option<BTreeMap<String, Value>>,
    /// How far below the reference another point may be.
    #[serde(default)]
    pub within: Option<Within>,
}

/// How far a metric may lie below that of the reference.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Within {
    /// The metric; more is better, and it is a share of 1 (accuracy, F1).
    #[serde(default = "accuracy")]
    pub metric: String,
    /// Points, hundredths of the metric.
    #[serde(default = "two")]
    pub points: f64,
}

fn accuracy() -> String {
    "accuracy".into()
}
fn two() -> f64 {
    2.0
}

/// Metrics of reports that a table shows unless others are asked for.
pub(crate) const METRICS: [&str; 5] = ["accuracy", "f1", "matthews", "loss", "perplexity"];
/// Numbers about the making of a model.
pub(crate) const FACTS: [&str; 6] = [
    "trainable_parameters",
    "trainable_percent",
    "seconds",
    "peak_rss_bytes",
    "adapter_bytes",
    "tokens_per_second",
];
/// Metrics of benchmarks.
pub(crate) const SPEEDS: [&str; 2] = ["latency_ms", "rows_per_second"];

/// A line of the table.
struct Row {
    point: BTreeMap<String, Value>,
    values: BTreeMap<String, f64>,
}

impl StepKind for Compare {
    const NAME: &'static str = "compare";
    const VERSION: u32 = 1;
    const READS_RECORDS: bool = true;

    fn ports(&self) -> Ports {
        Ports::of(Type::Report)
    }

    fn check(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        if self.within.is_some() && self.reference.is_none() {
            let problem = Problem::error("within", "there is no `reference` to be within");
            problems.push(problem.help("for example `reference: { method: full }`"));
        }
        if let Some(within) = self.within.as_ref().filter(|w| w.points.is_nan() || w.points < 0.0) {
            let message = format!("expected 0 or more, found {}", within.points);
            problems.push(Problem::error("within.points", message));
        }
        if let Some(reference) = &self.reference {
            let points = self.reports.members.iter();
            let found = points.filter(|m| holds(reference, &m.point)).count();
            if found != 1 {
                let message = format!("{found} points have these coordinates, expected one");
                let known = self.reports.members.iter().map(|m| coordinates(&m.point));
                let known: Vec<String> = known.take(8).collect();
                let help = format!("the points are {}", known.join("; "));
                problems.push(Problem::error("reference", message).help(help));
            }
        }
        problems
    }

    fn isolate(&self) -> bool {
        false
    }

    fn run(&self, cx: &mut Context<'_>) -> Result<()> {
        let mut columns = Vec::new();
        let mut rows = Vec::new();
        for member in &self.reports.members {
            let report = Report::open(cx.view(&member.input)?)?.file;
            let mut row = Row { point: member.point.clone(), values: BTreeMap::new() };
            for name in self.shown(&report.metrics, &coordinates(&member.point))? {
                put(&mut columns, &mut row, name.clone(), report.metrics[&name]);
            }
            let models = self.models.as_ref().map_or(&[][..], |g| &g.members);
            if let Some(model) = member_at(models, &member.point) {
                let facts = model.input.facts.clone().unwrap_or_default();
                for name in FACTS {
                    if let Some(value) = facts.get(name).and_then(Value::as_f64) {
                        put(&mut columns, &mut row, name.into(), value);
                    }
                }
            }
            for (prefix, gather) in &self.benchmarks {
                let Some(found) = member_at(&gather.members, &member.point) else { continue };
                let report = Report::open(cx.view(&found.input)?)?.file;
                for name in SPEEDS {
                    if let Some(value) = report.metrics.get(name) {
                        put(&mut columns, &mut row, format!("{prefix}_{name}"), *value);
                    }
                }
            }
            rows.push(row);
        }
        let answer = self.answer(&rows)?;
        let title = answer
            .as_ref()
            .map_or_else(|| format!("{} points", rows.len()), |(line, ..)| line.clone());
        let mut metrics = BTreeMap::new();
        if let Some((line, difference, holds)) = &answer {
            cx.log(line.clone());
            cx.fact("answer", line.clone());
            metrics.insert("points_below_reference".into(), *difference);
            metrics.insert("within".into(), f64::from(u8::from(*holds)));
        }
        let dir = cx.out_dir("report")?;
        std::fs::write(dir.join("report.md"), markdown(&title, &columns, &rows))
            .context("writing report.md")?;
        let details = json!({
            "columns": columns,
            "rows": rows.iter().map(|r| json!({
                "point": r.point,
                "name": coordinates(&r.point),
                "values": r.values,
            })).collect::<Vec<_>>(),
        });
        cx.write_json(&dir, "report.json", &ReportFile { title, metrics, details })
    }
}

/// Adds a value, and its column where it is new.
fn put(columns: &mut Vec<String>, row: &mut Row, name: String, value: f64) {
    if !columns.contains(&name) {
        columns.push(name.clone());
    }
    row.values.insert(name, value);
}

/// Whether a point has these coordinates.
fn holds(wanted: &BTreeMap<String, Value>, point: &BTreeMap<String, Value>) -> bool {
    wanted.iter().all(|(axis, value)| point.get(axis) == Some(value))
}

impl Compare {
    fn shown(&self, metrics: &BTreeMap<String, f64>, at: &str) -> Result<Vec<String>> {
        let Some(wanted) = &self.metrics else {
            let usual = METRICS.iter().filter(|m| metrics.contains_key(**m));
            return Ok(usual.map(|m| (*m).to_owned()).collect());
        };
        if let Some(missing) = wanted.iter().find(|m| !metrics.contains_key(*m)) {
            let known: Vec<&str> = metrics.keys().map(String::as_str).collect();
            let fault = Fault::new(format!("the report at {at} has no `{missing}`"));
            return Err(fault.help(suggest(missing, &known).unwrap_or_default()).into());
        }
        Ok(wanted.clone())
    }

    /// Whether the best of the other points is within so many points of the reference, in a line;
    /// by how many points it is below; and whether that is within.
    fn answer(&self, rows: &[Row]) -> Result<Option<(String, f64, bool)>> {
        let (Some(reference), Some(within)) = (&self.reference, &self.within) else {
            return Ok(None);
        };
        let Within { metric, points } = within;
        let value = |row: &Row| {
            let at = coordinates(&row.point);
            let found = row.values.get(metric).copied();
            found.with_context(|| format!("the table has no `{metric}` at {at}"))
        };
        let Some(own) = rows.iter().find(|r| holds(reference, &r.point)) else {
            return Err(Fault::new("no point has the coordinates of `reference`").into());
        };
        let own = value(own)?;
        let mut best: Option<(f64, &Row)> = None;
        for row in rows.iter().filter(|r| !holds(reference, &r.point)) {
            let value = value(row)?;
            if best.is_none_or(|(b, _)| value > b) {
                best = Some((value, row));
            }
        }
        let Some((value, row)) = best else {
            return Err(Fault::new("there is no point beside the reference").into());
        };
        let below = 100.0 * (own - value);
        // 0.83 - 0.81 is a little more than 0.02 in binary; a point more or less is not meant.
        let ok = below <= points + 1e-9;
        let direction = if below >= 0.0 { "below" } else { "above" };
        let line = format!(
            "{}: {metric} of {} is {value:.4}, {:.1} points {direction} {} ({own:.4}); asked: \
             within {points} points",
            if ok { "yes" } else { "no" },
            coordinates(&row.point),
            below.abs(),
            coordinates(reference),
        );
        Ok(Some((line, below, ok)))
    }
}

/// A value as people read it, by the name of its column.
pub(crate) fn shown(column: &str, value: f64) -> String {
    if column.ends_with("_bytes") {
        format!("{:.2}", value / 1e6)
    } else if column.ends_with("_parameters") {
        grouped(value as u64)
    } else if column.ends_with("seconds") || column.ends_with("per_second") {
        format!("{value:.1}")
    } else if column.ends_with("_ms") {
        format!("{value:.2}")
    } else {
        format!("{value:.4}")
    }
}

/// The name of a column for people, with the unit of its values.
pub(crate) fn heading(column: &str) -> String {
    match column.strip_suffix("_bytes") {
        Some(name) => format!("{} MB", name.replace('_', " ")),
        None => column.replace('_', " "),
    }
}

fn markdown(title: &str, columns: &[String], rows: &[Row]) -> String {
    let mut out = format!("{title}\n\n| point |");
    for column in columns {
        let _ = write!(out, " {} |", heading(column));
    }
    out.push_str("\n|---|");
    out.push_str(&"---:|".repeat(columns.len()));
    out.push('\n');
    for row in rows {
        let _ = write!(out, "| {} |", coordinates(&row.point).replace('|', "\\|"));
        for column in columns {
            let value = row.values.get(column).map(|v| shown(column, *v));
            let _ = write!(out, " {} |", value.as_deref().unwrap_or("–"));
        }
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(point: Value, values: &[(&str, f64)]) -> Row {
        let point: BTreeMap<String, Value> = serde_json::from_value(point).unwrap();
        let values = values.iter().map(|(k, v)| ((*k).to_owned(), *v));
        Row { point, values: values.collect() }
    }

    fn compare(points: f64) -> Compare {
        let gather = json!({ "$gather": { "members": [] } });
        serde_json::from_value(json!({
            "reports": gather,
            "reference": { "method": "full" },
            "within": { "points": points },
        }))
        .unwrap()
    }

    #[test]
    fn the_question_is_answered() {
        let rows = [
            row(json!({ "method": "full" }), &[("accuracy", 0.83)]),
            row(json!({ "method": "lora", "r": 4 }), &[("accuracy", 0.80)]),
            row(json!({ "method": "lora", "r": 8 }), &[("accuracy", 0.81)]),
        ];
        let (line, below, ok) = compare(2.0).answer(&rows).unwrap().unwrap();
        assert!(ok && (below - 2.0).abs() < 1e-9, "{line}");
        assert!(line.starts_with("yes: accuracy of method=lora,r=8 is 0.8100"), "{line}");
        let (line, _, ok) = compare(1.0).answer(&rows).unwrap().unwrap();
        assert!(!ok && line.starts_with("no:"), "{line}");
        assert!(compare(1.0).answer(&rows[..1]).is_err());
        assert!(compare(1.0).answer(&rows[1..]).is_err());
    }

    #[test]
    fn tables_are_markdown() {
        let columns = ["accuracy".to_owned(), "adapter_bytes".to_owned()];
        let rows = [
            row(json!({ "r": 4 }), &[("accuracy", 0.5), ("adapter_bytes", 2_960_000.0)]),
            row(json!({ "method": "full" }), &[("accuracy", 1.0)]),
        ];
        insta::assert_snapshot!(markdown("2 points", &columns, &rows), @r"
        2 points

        | point | accuracy | adapter MB |
        |---|---:|---:|
        | r=4 | 0.5000 | 2.96 |
        | method=full | 1.0000 | – |
        ");
    }
}

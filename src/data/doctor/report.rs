//! What was found, as metrics, as JSON and for people.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde_json::{Value, json};

use super::survey::Survey;
use super::{Check, Doctor, Finding, Severity, between, percent};
use crate::data::grouped;

/// Bars of a histogram, at most.
const BARS: u64 = 16;

impl Doctor {
    /// Numbers by name: `rows.train`, `duplicates.train`, `overlap.test`, `class_drift.test`, …;
    /// all finite.
    pub fn metrics(&self, findings: &[Finding]) -> BTreeMap<String, f64> {
        let mut metrics = BTreeMap::new();
        for severity in [Severity::Refused, Severity::Allowed, Severity::Warning] {
            let found = findings.iter().filter(|f| f.severity == severity).count();
            metrics.insert(severity.word().to_owned(), found as f64);
        }
        let splits = self.ordered();
        for (name, survey) in &splits {
            let mut put = |what: &str, value: f64| metrics.insert(format!("{what}.{name}"), value);
            put("rows", survey.rows() as f64);
            put("duplicates", survey.repeats().duplicates.len() as f64);
            put("length_mean", mean(survey));
            put("length_max", survey.length_at(1.0) as f64);
            if let Some(most) = survey.classes().values().max() {
                put("largest_class", *most as f64 / survey.rows() as f64);
            }
            for (check, flawed) in survey.flaws() {
                put(&check.name(), flawed.count as f64);
            }
            if let Some((first, base)) = splits.first().filter(|(first, _)| first != name) {
                let shared = between::shared(survey, base).len();
                metrics.insert(format!("overlap.{name}.{first}"), shared as f64);
                let near = |f: &&Finding| {
                    f.check == Check::NearOverlap && f.split == *name && f.against() == *first
                };
                if self.limits.near.is_some() {
                    let near = findings.iter().find(near).map_or(0, |f| f.count);
                    metrics.insert(format!("near_overlap.{name}.{first}"), near as f64);
                }
                let distance = between::length_distance(survey, base);
                metrics.insert(format!("length_drift.{name}"), distance);
                if let Some((distance, _)) = between::class_distance(survey, base) {
                    metrics.insert(format!("class_drift.{name}"), distance);
                }
            }
        }
        metrics
    }

    /// Splits with their classes and lengths, and the findings.
    pub fn details(&self, findings: &[Finding]) -> Value {
        let splits = self.ordered().into_iter().map(|(name, survey)| {
            let classes = survey.classes().iter().map(|(c, n)| (self.name_of(*c).to_owned(), *n));
            let histogram = histogram(survey).into_iter();
            let split = json!({
                "rows": survey.rows(),
                "dropped": survey.dropped,
                "truncated": survey.truncated,
                "classes": classes.collect::<BTreeMap<_, _>>(),
                "lengths": {
                    "unit": self.unit,
                    "min": survey.lengths().keys().next(),
                    "mean": mean(survey),
                    "p50": survey.length_at(0.5),
                    "p90": survey.length_at(0.9),
                    "p99": survey.length_at(0.99),
                    "max": survey.length_at(1.0),
                    "histogram": histogram
                        .map(|(from, to, rows)| json!({ "from": from, "to": to, "rows": rows }))
                        .collect::<Vec<_>>(),
                },
            });
            (name.to_owned(), split)
        });
        json!({ "splits": splits.collect::<serde_json::Map<_, _>>(), "findings": findings })
    }

    /// One line.
    pub fn title(&self, findings: &[Finding]) -> String {
        let rows: u64 = self.splits.values().map(Survey::rows).sum();
        let count = |severity| findings.iter().filter(|f| f.severity == severity).count();
        let (splits, rows) = (self.splits.len(), grouped(usize::try_from(rows).unwrap_or(0)));
        let noun = if splits == 1 { "split" } else { "splits" };
        let parts = [Severity::Refused, Severity::Allowed, Severity::Warning];
        let parts = parts.map(|severity| (count(severity), severity.word()));
        let found: Vec<String> =
            parts.iter().filter(|(n, _)| *n > 0).map(|(n, word)| format!("{n} {word}")).collect();
        let found = if found.is_empty() { "nothing found".to_owned() } else { found.join(", ") };
        format!("{rows} rows in {splits} {noun}: {found}")
    }

    /// For people: findings, a table of the splits, lengths as bars.
    pub fn markdown(&self, findings: &[Finding]) -> String {
        let mut out = format!("{}\n", self.title(findings));
        for finding in findings {
            let (word, check) = (finding.severity.word(), finding.check.name());
            let _ = write!(out, "\n- {word} `{check}`: {}; {}", finding.line(), finding.help);
        }
        if !findings.is_empty() {
            out.push('\n');
        }
        let unit = self.unit;
        let _ = write!(out, "\n| split | rows | classes | {unit}: mean | median | 99 % | most |\n");
        out.push_str("|---|---:|---|---:|---:|---:|---:|\n");
        let splits = self.ordered();
        for (name, survey) in &splits {
            let classes = self.class_shares(survey);
            let lengths = [0.5, 0.99, 1.0].map(|share| survey.length_at(share));
            let [median, most_but, most] = lengths;
            let (rows, mean) = (survey.rows(), mean(survey));
            let _ = writeln!(
                out,
                "| {name} | {rows} | {classes} | {mean:.1} | {median} | {most_but} | {most} |"
            );
        }
        for (name, survey) in &splits {
            let bars = histogram(survey);
            let Some(most) = bars.iter().map(|(_, _, rows)| *rows).max() else { continue };
            let _ = write!(out, "\n{unit} of `{name}`\n\n");
            for (from, to, rows) in bars {
                let bar = "#".repeat((40 * rows).div_ceil(most.max(1)) as usize);
                let _ = writeln!(out, "    {from:>7} to {to:<7} {rows:>9}  {bar}");
            }
        }
        out
    }

    fn class_shares(&self, survey: &Survey) -> String {
        const SHOWN: usize = 5;
        let mut classes: Vec<(&u32, &u64)> = survey.classes().iter().collect();
        classes.sort_by_key(|(class, n)| (std::cmp::Reverse(**n), self.name_of(**class)));
        let more = classes.len().saturating_sub(SHOWN);
        let shown = classes.into_iter().take(SHOWN).map(|(class, n)| {
            let name = self.name_of(*class).replace('|', "\\|").replace('\n', " ");
            format!("{name} {}", percent(*n, survey.rows()))
        });
        let mut shown: Vec<String> = shown.collect();
        if more > 0 {
            shown.push(format!("{more} more"));
        }
        shown.join(", ")
    }
}

fn mean(survey: &Survey) -> f64 {
    survey.total_length() as f64 / survey.rows().max(1) as f64
}

/// (from, to, rows) of equally wide classes of length whose width is 1, 2 or 5 times a power of
/// ten.
fn histogram(survey: &Survey) -> Vec<(u64, u64, u64)> {
    let lengths = survey.lengths();
    let (Some(low), Some(high)) = (lengths.keys().next(), lengths.keys().next_back()) else {
        return Vec::new();
    };
    let mut width = 1;
    for step in [2, 5, 10].into_iter().cycle() {
        if high / width - low / width < BARS {
            break;
        }
        width = match step {
            2 => width * 2,
            5 => width / 2 * 5,
            _ => width * 2,
        };
    }
    let first = low / width;
    let mut bars: Vec<(u64, u64, u64)> = (first..=high / width)
        .map(|at| (at * width, at.saturating_mul(width).saturating_add(width - 1), 0))
        .collect();
    for (length, rows) in lengths {
        if let Some(bar) = bars.get_mut((length / width - first) as usize) {
            bar.2 += rows;
        }
    }
    bars
}

#[cfg(test)]
mod tests {
    use super::super::{Check, Facts, Limits};
    use super::*;

    fn survey(rows: impl IntoIterator<Item = (u64, u128, Option<u32>)>) -> Survey {
        let mut survey = Survey::default();
        for (length, content, class) in rows {
            let answer = u128::from(class.unwrap_or(0));
            survey.add(Facts { length, content, answer, class, ..Facts::default() });
        }
        survey
    }

    fn doctor(splits: Vec<(&str, Survey)>, allowed: &[Check]) -> Doctor {
        let mut doctor = Doctor::new("tokens", Limits::default(), allowed);
        doctor.class("no");
        doctor.class("yes");
        splits.into_iter().for_each(|(name, survey)| doctor.take(name, survey));
        doctor
    }

    fn mixed(n: u64, from: u128) -> Survey {
        survey((0..n).map(|i| (10 + i % 7, from + u128::from(i), Some((i % 2) as u32))))
    }

    fn checks(doctor: &Doctor) -> Vec<(Check, Severity)> {
        doctor.findings().iter().map(|f| (f.check, f.severity)).collect()
    }

    #[test]
    fn good_rows_have_no_findings() {
        let doctor = doctor(vec![("train", mixed(200, 0)), ("test", mixed(100, 1000))], &[]);
        assert_eq!(checks(&doctor), []);
        assert_eq!(doctor.title(&[]), "300 rows in 2 splits: nothing found");
        let metrics = doctor.metrics(&[]);
        assert_eq!((metrics["rows.train"], metrics["overlap.test.train"]), (200.0, 0.0));
    }

    #[test]
    fn one_class_is_refused_and_can_be_allowed() {
        let rows = || survey((0..20).map(|i| (5, i, Some(0))));
        let found = doctor(vec![("train", rows())], &[]).findings();
        assert_eq!(found[0].message, "all 20 rows of `train` are of class `no`");
        assert_eq!((found[0].check, found[0].severity), (Check::OneClass, Severity::Refused));
        let allowed = doctor(vec![("train", rows())], &[Check::OneClass]);
        assert_eq!(checks(&allowed), [(Check::OneClass, Severity::Allowed)]);
    }

    #[test]
    fn sorted_rows_and_drift_are_told() {
        let sorted = survey((0..60).map(|i| (5, i, Some(u32::from(i >= 30)))));
        let other = survey((0..400).map(|i| (5, 100 + i, Some(u32::from(i % 10 == 0)))));
        let long = survey((0..400).map(|i| (50, 900 + i, Some((i % 2) as u32))));
        let doctor = doctor(vec![("train", sorted), ("test", other), ("dev", long)], &[]);
        let found = doctor.findings();
        let messages: Vec<String> = found.iter().map(Finding::line).collect();
        let found = checks(&doctor);
        let warned = |check| found.contains(&(check, Severity::Warning));
        assert!(warned(Check::Sorted), "{messages:?}");
        assert!(warned(Check::ClassDrift) && warned(Check::LengthDrift), "{messages:?}");
        assert!(messages.iter().any(|m| m.contains("class `no` has 90.0 %, there 50.0 %")));
        assert_eq!(found.len(), 3, "{messages:?}");
    }

    #[test]
    fn repeats_conflicts_and_overlap_name_rows() {
        let rows = [(0, Some(0)), (1, Some(1)), (0, Some(0)), (2, Some(1)), (1, Some(0))];
        let train = survey(rows.map(|(content, class)| (5, content, class)));
        let test = survey([(5, 7, Some(0)), (5, 1, Some(1)), (5, 9, Some(0))]);
        let doctor = doctor(vec![("test", test), ("train", train)], &[]);
        let found = doctor.findings();
        let lines: Vec<(Check, Severity, String)> =
            found.iter().map(|f| (f.check, f.severity, f.line())).collect();
        assert_eq!(
            lines,
            [
                (
                    Check::Overlap,
                    Severity::Refused,
                    "1 of 3 rows of `test` also stand in `train` (row 1)".to_owned()
                ),
                (
                    Check::Duplicates,
                    Severity::Warning,
                    "1 of 5 rows of `train` repeat an earlier one, as row 2 does row 0 (row 2)"
                        .to_owned()
                ),
                (
                    Check::Conflicts,
                    Severity::Warning,
                    "2 of 5 rows of `train` have a text that also has another label (rows 1, 4)"
                        .to_owned()
                ),
            ]
        );
        assert_eq!(found[0].against.as_deref(), Some("train"));
    }

    #[test]
    fn a_flaw_is_as_bad_as_its_share() {
        let with = |flawed: u64| {
            let mut survey = Survey::default();
            for i in 0..10 {
                let flaws = if i < flawed { vec![Check::MissingEos] } else { Vec::new() };
                survey.add(Facts { length: 3, content: i.into(), flaws, ..Facts::default() });
            }
            doctor(vec![("train", survey)], &[])
        };
        assert_eq!(checks(&with(3)), [(Check::MissingEos, Severity::Warning)]);
        assert_eq!(checks(&with(10)), [(Check::MissingEos, Severity::Refused)]);
        let empty = doctor(vec![("train", Survey::default())], &[]);
        assert_eq!(checks(&empty), [(Check::NoRows, Severity::Refused)]);
        assert!(empty.markdown(&empty.findings()).contains("`no_rows`"));
    }

    #[test]
    fn bars_are_round() {
        let bars = histogram(&survey((0..500).map(|i| (i, u128::from(i), None))));
        assert_eq!(bars.len(), 10);
        assert_eq!(bars[1], (50, 99, 50));
        let one = histogram(&survey([(512, 0, None)]));
        assert_eq!(one, [(512, 512, 1)]);
        assert_eq!(histogram(&Survey::default()), []);
    }
}

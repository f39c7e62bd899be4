//! `sample`: some rows of a dataset.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::rows::write_split;
use crate::artifact::{Dataset, Type};
use crate::data::{self, Labels, OnError, Pool, Reading, Table};
use crate::source::{Fault, suggest};
use crate::step::{Context, Input, Ports, Problem, StepKind};

/// Draws rows: shuffled, stratified, some or all of each split.
///
/// `rows` (numbers) and `fraction` (shares between 0 and 1) name the splits that come out; with
/// neither, every split comes out whole. A split that the data does not have is drawn from
/// `train`, and no row is in both. What is drawn for one split does not depend on how many rows
/// another one gets, as long as there are enough.
///
/// Slices of one class, and unshuffled slices sorted by class, are refused: a dataset that is
/// stored class by class (IMDB is) gives them easily, and a model trained on them learns nothing.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Sample {
    /// The dataset.
    data: Input<Dataset>,
    /// Column whose classes keep their proportions in every split.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    stratify: Option<String>,
    /// Number of rows by split.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    rows: BTreeMap<String, u64>,
    /// Share of the split (of `train` for one that is drawn from it), between 0 and 1.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    fraction: BTreeMap<String, f64>,
    /// Seed of the order.
    #[serde(default)]
    seed: u64,
    /// Whether rows come in a random order; if not, they are the first ones, in their order.
    #[serde(default = "yes")]
    shuffle: bool,
    /// Allows a split whose rows are all of one class.
    #[serde(default)]
    allow_one_class: bool,
    /// Allows an unshuffled split whose rows stand class by class.
    #[serde(default)]
    allow_sorted: bool,
}

fn yes() -> bool {
    true
}

/// The split that missing ones are drawn from.
const SOURCE: &str = "train";

impl StepKind for Sample {
    const NAME: &'static str = "sample";
    const VERSION: u32 = 1;

    fn ports(&self) -> Ports {
        let names = self.asked();
        if names.is_empty() {
            return Ports::like(Type::Dataset, self.data.names().as_deref());
        }
        Ports::named(Type::Dataset, names)
    }

    fn check(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        for (split, n) in &self.rows {
            if *n == 0 {
                let message = format!("no rows are asked of `{split}`");
                problems.push(
                    Problem::error(format!("rows.{split}"), message).help("leave the split out"),
                );
            }
            if self.fraction.contains_key(split) {
                let message = format!("`{split}` has a number of rows and a fraction");
                problems.push(Problem::error(format!("fraction.{split}"), message));
            }
        }
        for (split, share) in &self.fraction {
            if !(*share > 0.0 && *share <= 1.0) {
                let message = format!("a fraction lies between 0 and 1, this is {share}");
                problems.push(Problem::error(format!("fraction.{split}"), message));
            }
        }
        for (field, split) in self.fields() {
            if !data::is_split_name(split) {
                let message = format!("`{split}` is not the name of a split");
                let help = "letters, digits, `_`, `-`, and `.` between them";
                problems.push(Problem::error(format!("{field}.{split}"), message).help(help));
            } else if let Some(fault) = self.without_source(split) {
                let problem = Problem::error(format!("{field}.{split}"), fault.message);
                problems.push(problem.help(fault.help.unwrap_or_default()));
            }
        }
        problems
    }

    fn narrow(&mut self) {
        let asked = self.asked();
        // What lacks a source is refused by name, for which all names are needed.
        if asked.is_empty() || asked.iter().any(|s| self.without_source(s).is_some()) {
            return;
        }
        let known = self.data.names().unwrap_or_default();
        let used: Vec<&str> = asked
            .iter()
            .map(|split| if known.contains(split) { split.as_str() } else { SOURCE })
            .collect();
        self.data.keep(&used);
    }

    fn check_inputs(&self, cx: &Context<'_>) -> Result<()> {
        let data = cx.open(&self.data)?;
        if let Some(fault) = self.asked().iter().find_map(|s| self.without_source(s)) {
            return Err(fault.into());
        }
        let Some(column) = &self.stratify else {
            return Ok(());
        };
        for split in data.splits() {
            let features = data.split(split)?.features;
            let columns: Vec<&str> = features.columns.iter().map(|(n, _)| n.as_str()).collect();
            if !columns.contains(&column.as_str()) {
                let fault = Fault::new(format!("split `{split}` has no column `{column}`"));
                return Err(fault.help(suggest(column, &columns).unwrap_or_default()).into());
            }
        }
        Ok(())
    }

    fn run(&self, cx: &mut Context<'_>) -> Result<()> {
        let data = cx.open(&self.data)?;
        let have: Vec<String> = data.splits().map(str::to_owned).collect();
        let asked = if self.asked().is_empty() { have.clone() } else { self.asked() };
        // By the split that is read: the split that is its own first, then those drawn from it.
        let mut plan: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for split in asked {
            let source = if have.contains(&split) { split.clone() } else { SOURCE.to_owned() };
            plan.entry(source).or_default().push(split);
        }
        for (source, mut parts) in plan {
            cx.stop()?;
            // Validation comes first at the end of the pool, so that its rows do not depend on
            // how many a test split drawn from the same pool gets.
            parts.sort_by_key(|p| (*p != source, p != "validation", p.clone()));
            let rows = data.split(&source)?.rows;
            let reading = Reading::new(crate::artifact::ROWS, OnError::Fail);
            let mut table =
                data::read(&rows, reading).with_context(|| format!("reading split `{source}`"))?;
            table.classes = data.split(&source)?.features.classes;
            self.draw(cx, &source, &parts, &table)?;
        }
        Ok(())
    }
}

impl Sample {
    /// Every split that comes out, with the field that names it.
    fn fields(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let rows = self.rows.keys().map(|s| ("rows", s.as_str()));
        rows.chain(self.fraction.keys().map(|s| ("fraction", s.as_str())))
    }

    fn asked(&self) -> Vec<String> {
        let mut names: Vec<String> = self.fields().map(|(_, split)| split.to_owned()).collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// What is wrong with a split that is neither in the data nor can be drawn from it, as far as
    /// the data's splits are known.
    fn without_source(&self, split: &str) -> Option<Fault> {
        let known = self.data.names()?;
        let known: Vec<&str> = known.iter().map(String::as_str).collect();
        if known.contains(&split) || known.contains(&SOURCE) {
            return None;
        }
        let fault = Fault::new(format!("the data has neither `{split}` nor `{SOURCE}`"));
        Some(fault.help(suggest(split, &known).unwrap_or_else(|| "it has no splits".into())))
    }

    /// Rows asked for a split, of a pool of so many.
    fn count(&self, split: &str, pool: usize) -> Result<usize> {
        if let Some(n) = self.rows.get(split) {
            return Ok(usize::try_from(*n)?);
        }
        let share = self.fraction.get(split).copied().unwrap_or(1.0);
        // Rounded down, so that shares that add up to one never ask for a row too many; the
        // little more makes 0.29 of 100 rows 29 of them.
        let rows = ((share * pool as f64 + 1e-9) as usize).min(pool);
        if rows == 0 && self.fraction.contains_key(split) {
            let pool = data::grouped(pool);
            let message = format!("{share} of {pool} rows is not one row for `{split}`");
            return Err(Fault::new(message).help("ask for a larger fraction").into());
        }
        Ok(rows)
    }

    fn draw(
        &self,
        cx: &mut Context<'_>,
        source: &str,
        parts: &[String],
        table: &Table,
    ) -> Result<()> {
        let labels = match &self.stratify {
            Some(column) => {
                Some(Labels::of(table, column).with_context(|| format!("split `{source}`"))?)
            }
            None => Labels::guess(table),
        };
        let strata = labels.as_ref().filter(|_| self.stratify.is_some());
        let pool = Pool::new(source, table.rows(), self.seed, strata, self.shuffle);
        let (own, others) = match parts.split_first() {
            Some((first, others)) if first == source => (Some(first), others),
            _ => (None, parts),
        };
        let back: Result<Vec<usize>> =
            others.iter().map(|part| self.count(part, table.rows())).collect();
        let front = own.map_or(Ok(0), |own| self.count(own, table.rows()))?;
        let (first, rest) = pool.draw(front, &back?)?;
        let drawn = own.into_iter().zip([first]).chain(others.iter().zip(rest));
        for (split, rows) in drawn {
            if let Some(labels) = &labels {
                self.doubt(split, &rows, labels)?;
                let counts: Vec<String> = labels
                    .counts(&rows)
                    .into_iter()
                    .map(|(class, n)| format!("{n} of {}", labels.show(class)))
                    .collect();
                if counts.len() <= 20 {
                    let column = &labels.column;
                    cx.log(format!("{split}: by `{column}` {}", counts.join(", ")));
                }
            }
            write_split(cx, split, &table.take(&rows)?)?;
        }
        Ok(())
    }

    /// Refuses slices that teach nothing.
    fn doubt(&self, split: &str, rows: &[u64], labels: &Labels) -> Result<()> {
        let column = &labels.column;
        let n = data::grouped(rows.len());
        let one = labels.only_class(rows).filter(|_| rows.len() > 1 && !self.allow_one_class);
        if let Some(class) = one {
            let class = labels.show(class);
            let message = format!("all {n} rows of `{split}` have {column} {class}");
            let help = if self.shuffle {
                "draw from data with more classes, or set `allow_one_class: true`"
            } else {
                "the data is stored class by class: leave `shuffle` on and set `stratify`, or set \
                 `allow_one_class: true`"
            };
            return Err(Fault::new(message).help(help).into());
        }
        let classes = rows.iter().map(|r| labels.rows[*r as usize]);
        if !self.shuffle && !self.allow_sorted && data::looks_sorted(classes) {
            let counts = labels.counts(rows);
            let blocks: Vec<String> = counts
                .iter()
                .take(8)
                .map(|(class, n)| format!("{} of {}", data::grouped(*n), labels.show(*class)))
                .collect();
            let blocks = blocks.join(", ");
            let message = format!("the {n} rows of `{split}` are sorted by `{column}`: {blocks}");
            let help = "leave `shuffle` on, or set `allow_sorted: true`";
            return Err(Fault::new(message).help(help).into());
        }
        Ok(())
    }
}

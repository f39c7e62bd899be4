//! `sample`: some rows of a dataset.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::rows::SplitWriter;
use crate::artifact::{Dataset, Split, Type};
use crate::data::{self, Draw, Groups, Labels, Pool, RowStream, Table};
use crate::source::{Fault, suggest};
use crate::step::{Context, Input, Ports, Problem, StepKind};

/// Draws rows: shuffled, stratified, in groups or folds, some or all of each split.
///
/// `rows` (numbers) and `fraction` (shares between 0 and 1) name the splits that come out; with
/// neither, every split comes out whole. A split that the data does not have is drawn from
/// `train`, and no row is in both. What is drawn for one split does not depend on how many rows
/// another one gets, as long as there are enough.
///
/// With `group`, rows of one group (of one film, one user) all go to the same split, so numbers of
/// rows are upper bounds; `stratify` then keeps proportions as far as whole groups allow. With
/// `folds`, `train` is cut into so many folds, of which `fold` becomes `validation` and all others
/// `train`; a sweep over `fold` is a cross-validation.
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
    /// Column whose values say which rows belong together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    group: Option<String>,
    /// Number of folds of `train`, 2 or more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    folds: Option<u64>,
    /// The fold that becomes `validation`, counted from 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    fold: Option<u64>,
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
/// The split that a fold becomes.
const HELD_OUT: &str = "validation";

impl StepKind for Sample {
    const NAME: &'static str = "sample";
    const VERSION: u32 = 1;

    fn ports(&self) -> Ports {
        let names = self.asked();
        if self.folds.is_some() {
            return Ports::named(Type::Dataset, [SOURCE, HELD_OUT]);
        }
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
        self.check_folds(&mut problems);
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
        if self.folds.is_some() {
            self.data.keep(&[SOURCE]);
            return;
        }
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
        for split in data.splits() {
            let features = data.split(split)?.features;
            let columns: Vec<&str> = features.columns.iter().map(|(n, _)| n.as_str()).collect();
            let named = self.stratify.iter().chain(&self.group);
            if let Some(column) = named.into_iter().find(|c| !columns.contains(&c.as_str())) {
                let fault = Fault::new(format!("split `{split}` has no column `{column}`"));
                return Err(fault.help(suggest(column, &columns).unwrap_or_default()).into());
            }
        }
        Ok(())
    }

    fn run(&self, cx: &mut Context<'_>) -> Result<()> {
        let data = cx.open(&self.data)?;
        let have: Vec<String> = data.splits().map(str::to_owned).collect();
        let asked = match (self.folds, self.asked()) {
            (Some(_), _) => vec![SOURCE.to_owned(), HELD_OUT.to_owned()],
            (None, asked) if asked.is_empty() => have.clone(),
            (None, asked) => asked,
        };
        // By the split that is read: the split that is its own first, then those drawn from it.
        let mut plan: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for split in asked {
            let own = have.contains(&split) && self.folds.is_none();
            let source = if own { split.clone() } else { SOURCE.to_owned() };
            plan.entry(source).or_default().push(split);
        }
        for (source, mut parts) in plan {
            cx.stop()?;
            // Validation comes first at the end of the pool, so that its rows do not depend on
            // how many a test split drawn from the same pool gets.
            parts.sort_by_key(|p| (*p != source, p != "validation", p.clone()));
            let split = data.split(&source)?;
            self.draw(cx, &source, &parts, &split)?;
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

    fn check_folds(&self, problems: &mut Vec<Problem>) {
        let mut wrong = |path: &str, message: String| problems.push(Problem::error(path, message));
        let Some(folds) = self.folds else {
            if self.fold.is_some() {
                wrong("fold", "`fold` belongs to `folds`".into());
            }
            return;
        };
        if folds < 2 {
            wrong("folds", format!("expected 2 folds or more, found {folds}"));
        }
        match self.fold {
            None => wrong("", "`folds` needs `fold`: the one that becomes `validation`".into()),
            Some(fold) if fold >= folds => {
                wrong("fold", format!("{folds} folds are counted from 0 to {}", folds - 1));
            }
            Some(_) => {}
        }
        if let Some((field, split)) = self.fields().next() {
            let message = format!("`{field}` and `folds` exclude each other");
            wrong(&format!("{field}.{split}"), message);
        }
    }

    /// The columns by which rows are drawn or judged, of those there are.
    fn read(&self, split: &Split) -> Result<Table> {
        let features = &split.features;
        let known = features.columns.iter().map(|(name, _)| name.as_str());
        let used = |name: &&str| {
            [self.stratify.as_deref(), self.group.as_deref()].contains(&Some(*name))
                || features.classes.contains_key(*name)
                || ["label", "labels"].contains(name)
        };
        let columns: Vec<&str> = known.filter(used).collect();
        let rows = RowStream::open(&split.rows, Some(&columns))?;
        let schema = rows.schema().clone();
        let batches = if columns.is_empty() { Vec::new() } else { rows.collect::<Result<_>>()? };
        let mut table = Table::new(&schema, batches)?;
        table.classes = features.classes.clone();
        Ok(table)
    }

    fn draw(
        &self,
        cx: &mut Context<'_>,
        source: &str,
        parts: &[String],
        split: &Split,
    ) -> Result<()> {
        let table = self.read(split)?;
        let size = usize::try_from(split.features.rows)?;
        let labels = match &self.stratify {
            Some(column) => {
                let labels = Labels::of(&table, column);
                Some(labels.with_context(|| format!("split `{source}`"))?)
            }
            None => Labels::guess(&table),
        };
        let drawn = match &self.group {
            Some(column) => {
                let of = Labels::any(&table, column)?.rows;
                let strata = labels.as_ref().filter(|_| self.stratify.is_some());
                let groups = Groups::new(source, &of, strata, self.seed, self.shuffle);
                self.parts(
                    source,
                    parts,
                    size,
                    |k, i| groups.folds(k, i),
                    |front, back| groups.draw(front, back),
                )?
            }
            None => {
                let strata = labels.as_ref().filter(|_| self.stratify.is_some());
                let pool = Pool::new(source, size, self.seed, strata, self.shuffle);
                self.parts(
                    source,
                    parts,
                    size,
                    |k, i| pool.folds(k, i),
                    |front, back| pool.draw(front, back),
                )?
            }
        };
        drop(table);
        for (name, rows) in drawn {
            if let Some(labels) = &labels {
                self.doubt(name, &rows, labels)?;
                let counts: Vec<String> = labels
                    .counts(&rows)
                    .into_iter()
                    .map(|(class, n)| format!("{n} of {}", labels.show(class)))
                    .collect();
                if counts.len() <= 20 {
                    let column = &labels.column;
                    cx.log(format!("{name}: by `{column}` {}", counts.join(", ")));
                }
            }
            if let (Some(_), Some(asked)) = (&self.group, self.rows.get(name))
                && (rows.len() as u64) < *asked
            {
                let n = data::grouped(rows.len());
                cx.warn(format!("`{name}` has {n} rows of {asked}: groups stay whole"));
            }
            let scratch = cx.scratch_dir()?;
            let schema = RowStream::open(&split.rows, None)?.schema().clone();
            let mut writer = SplitWriter::create(cx, name, schema)?;
            let mut stop = || cx.stop();
            let budget = data::BUDGET;
            data::gather(&split.rows, &rows, writer.rows(), &scratch, budget, &mut stop)?;
            writer.finish(cx, &split.features.classes)?;
        }
        Ok(())
    }

    /// The rows of each part that comes of one source.
    fn parts<'a>(
        &self,
        source: &str,
        parts: &'a [String],
        size: usize,
        folds: impl Fn(usize, usize) -> Result<(Draw, Draw)>,
        draw: impl Fn(usize, &[usize]) -> Result<(Draw, Vec<Draw>)>,
    ) -> Result<Vec<(&'a str, Draw)>> {
        if let (Some(k), Some(fold)) = (self.folds, self.fold) {
            let (outside, inside) = folds(usize::try_from(k)?, usize::try_from(fold)?)?;
            return Ok(vec![(SOURCE, outside), (HELD_OUT, inside)]);
        }
        let (own, others) = match parts.split_first() {
            Some((first, others)) if first == source => (Some(first), others),
            _ => (None, parts),
        };
        let back: Result<Vec<usize>> = others.iter().map(|part| self.count(part, size)).collect();
        let front = own.map_or(Ok(0), |own| self.count(own, size))?;
        let (first, rest) = draw(front, &back?)?;
        let drawn = own.into_iter().zip([first]).chain(others.iter().zip(rest));
        Ok(drawn.map(|(name, rows)| (name.as_str(), rows)).collect())
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

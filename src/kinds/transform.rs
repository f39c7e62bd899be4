//! `transform`: other columns, fewer rows.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use arrow::array::BooleanArray;
use arrow::compute::filter_record_batch;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::rows::SplitWriter;
use crate::artifact::{Dataset, Type};
use crate::data::{self, Cast, Deduplicate, Near, OnError, Reshape, RowStream, Seen};
use crate::source::{advice, suggest};
use crate::step::{Context, Input, Ports, Problem, StepKind};

/// Renames, converts and drops columns, and leaves out rows by an expression or because they
/// repeat others.
///
/// In this order: `rename`, `cast`, `filter`, `columns` and `drop`, `deduplicate`; all but the
/// first go by the new names, and a filter may use columns that are dropped. The splits of the
/// data come out under the same names, their rows in the same order. Rows are read and written
/// in batches: memory does not grow with them, but for what `deduplicate` remembers (some 40 bytes
/// a row; with `near` some 900).
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Transform {
    /// The dataset.
    data: Input<Dataset>,
    /// New names of columns, by old name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    rename: BTreeMap<String, String>,
    /// Types of columns: `int`, `float`, `bool` or `text`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    cast: BTreeMap<String, Cast>,
    /// Rows that are kept: an expression over columns, as in Jinja, like `label in [0, 1] and
    /// text | length > 20`. A missing value is `none`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    filter: Option<String>,
    /// Columns to keep, in this order; all by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    columns: Option<Vec<String>>,
    /// Columns to leave out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    drop: Vec<String>,
    /// Leaves out rows that repeat an earlier one; `{}` compares all columns.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    deduplicate: Option<Repeated>,
    /// What to do with a row whose value cannot be converted, or on which the filter fails:
    /// `fail`, or `skip` it and count it.
    #[serde(default)]
    on_error: OnError,
}

/// What counts as a repetition.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Repeated {
    /// Columns that are compared; all by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    columns: Option<Vec<String>>,
    /// Compares words and not bytes (MinHash): the share of runs of words, of all that two rows
    /// have, from which on one repeats the other; 0.8 finds copies that were edited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    near: Option<f64>,
    /// Words of a run, for `near`.
    #[serde(default = "five")]
    words: usize,
    /// Also leaves out rows that stand in another split: `train` keeps its rows, the others lose
    /// those that `train` has.
    #[serde(default)]
    across: bool,
}

fn five() -> usize {
    5
}

impl Repeated {
    fn seen(&self) -> Seen {
        Seen::new(match self.near {
            Some(threshold) => Deduplicate::Near(Near { threshold, words: self.words }),
            None => Deduplicate::Exact,
        })
    }
}

impl StepKind for Transform {
    const NAME: &'static str = "transform";
    const VERSION: u32 = 1;

    fn ports(&self) -> Ports {
        Ports::like(Type::Dataset, self.data.names().as_deref())
    }

    fn check(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        if let Some(filter) = &self.filter
            && let Err(e) = Reshape::check_filter(filter)
        {
            problems.push(Problem::error("filter", e.to_string()).help(advice(&e).join("; ")));
        }
        for (i, column) in self.drop.iter().enumerate() {
            if self.columns.as_ref().is_some_and(|columns| columns.contains(column)) {
                let message = format!("column `{column}` is to be kept and left out");
                problems.push(Problem::error(format!("drop[{i}]"), message));
            }
        }
        for (i, column) in self.columns.iter().flatten().enumerate() {
            if self.columns.iter().flatten().take(i).any(|c| c == column) {
                let message = format!("column `{column}` is named twice");
                problems.push(Problem::error(format!("columns[{i}]"), message));
            }
        }
        if let Some(repeated) = &self.deduplicate {
            if repeated.near.is_some_and(|share| !(share > 0.0 && share <= 1.0)) {
                let message = "a share lies between 0 and 1";
                problems.push(Problem::error("deduplicate.near", message));
            }
            if repeated.words == 0 {
                problems.push(Problem::error("deduplicate.words", "a run has 1 word or more"));
            }
        }
        problems
    }

    fn check_inputs(&self, cx: &Context<'_>) -> Result<()> {
        let data = cx.open(&self.data)?;
        let (what, env) = (self.reshape(), data::environment());
        for split in data.splits() {
            let rows = RowStream::open(&data.split(split)?.rows, None)?;
            let reshaper = what.over(rows.schema(), &env);
            let reshaper = reshaper.with_context(|| format!("split `{split}`"))?;
            self.compared(&reshaper.schema).with_context(|| format!("split `{split}`"))?;
        }
        Ok(())
    }

    fn run(&self, cx: &mut Context<'_>) -> Result<()> {
        let data = cx.open(&self.data)?;
        let (what, env) = (self.reshape(), data::environment());
        let mut splits: Vec<String> = data.splits().map(str::to_owned).collect();
        splits.sort_by_key(|split| (split != "train", split.clone()));
        let mut seen = self.deduplicate.as_ref().map(Repeated::seen);
        for split in splits {
            if let Some(repeated) = self.deduplicate.as_ref().filter(|r| !r.across) {
                seen = Some(repeated.seen());
            }
            self.split(cx, &data, &split, &what, &env, seen.as_mut())
                .with_context(|| format!("split `{split}`"))?;
        }
        Ok(())
    }
}

impl Transform {
    fn reshape(&self) -> Reshape {
        Reshape {
            rename: self.rename.clone(),
            cast: self.cast.clone(),
            filter: self.filter.clone(),
            columns: self.columns.clone(),
            drop: self.drop.clone(),
        }
    }

    /// The columns that are compared, which must be there.
    fn compared(&self, schema: &arrow::datatypes::Schema) -> Result<Vec<String>> {
        let known: Vec<&str> = schema.fields().iter().map(|f| f.name().as_str()).collect();
        let named = self.deduplicate.as_ref().and_then(|r| r.columns.clone());
        let columns = named.unwrap_or_else(|| known.iter().map(|k| (*k).to_owned()).collect());
        if let Some(gone) = columns.iter().find(|c| !known.contains(&c.as_str())) {
            let fault =
                crate::source::Fault::new(format!("there is no column `{gone}` to compare"));
            return Err(fault.help(suggest(gone, &known).unwrap_or_default()).into());
        }
        Ok(columns)
    }

    fn split(
        &self,
        cx: &mut Context<'_>,
        data: &Dataset,
        split: &str,
        what: &Reshape,
        env: &minijinja::Environment<'static>,
        mut seen: Option<&mut Seen>,
    ) -> Result<()> {
        let from = data.split(split)?;
        let rows = RowStream::open(&from.rows, None)?;
        let (total, mut done, mut repeated) = (rows.rows(), 0, 0);
        let mut reshaper = what.over(rows.schema(), env)?;
        let compared = self.compared(&reshaper.schema)?;
        let mut writer = SplitWriter::create(cx, split, reshaper.schema.clone())?;
        for batch in rows {
            let batch = batch?;
            done += batch.num_rows() as u64;
            let mut kept = reshaper.apply(&batch, self.on_error)?;
            if let Some(seen) = &mut seen {
                let new = BooleanArray::from(seen.are_new(&kept, &compared)?);
                repeated += new.false_count() as u64;
                kept = filter_record_batch(&kept, &new)?;
            }
            writer.write(&kept)?;
            cx.progress(done, total, "rows", split);
            cx.stop()?;
        }
        let (skipped, filtered) = (reshaper.skipped, reshaper.filtered);
        let left = writer.finish(cx, &what.classes(&from.features.classes))?;
        if self.filter.is_some() {
            cx.fact(&format!("filtered.{split}"), filtered);
        }
        if self.deduplicate.is_some() {
            cx.fact(&format!("repeated.{split}"), repeated);
        }
        if skipped > 0 {
            cx.fact(&format!("skipped.{split}"), skipped);
            cx.warn(format!(
                "{skipped} rows of `{split}` could not be converted and were left out"
            ));
        }
        cx.log(format!(
            "{split}: {left} of {total} rows; {filtered} filtered, {repeated} repeated, {skipped} \
             skipped"
        ));
        if left == 0 && total > 0 {
            cx.warn(format!("no row of `{split}` is left"));
        }
        Ok(())
    }
}

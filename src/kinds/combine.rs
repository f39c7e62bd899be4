//! `combine`: several datasets as one.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use arrow::datatypes::SchemaRef;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::rows::{ClassNames, SplitWriter};
use crate::artifact::{Dataset, Type};
use crate::data::{self, How, Mix, RowStream, Stop, Table};
use crate::source::{Fault, suggest};
use crate::step::{Context, Input, Ports, Problem, StepKind};

/// Puts datasets together, one after the other or mixed.
///
/// Split by split: `train` of the result is made of every dataset's `train`, and a dataset that
/// lacks a split gives nothing to it. Datasets must have the same columns, whatever their order;
/// number types are widened to hold both. `interleave` takes rows in turn or by `probabilities`,
/// each dataset's in its own order; the choice depends on `seed`, the split and the row alone.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Combine {
    /// The datasets, in order.
    data: Vec<Input<Dataset>>,
    /// `concatenate` or `interleave`.
    #[serde(default)]
    how: How,
    /// Share of each dataset, in their order (`interleave`); in turn if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    probabilities: Option<Vec<f64>>,
    /// Seed of the choice.
    #[serde(default)]
    seed: u64,
    /// When `interleave` ends: with the `first` dataset that has no more rows, or when `all` have
    /// had all of theirs (those that end earlier begin again).
    #[serde(default)]
    stop: Stop,
    /// Splits to make; all that any dataset has by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    splits: Option<Vec<String>>,
}

impl StepKind for Combine {
    const NAME: &'static str = "combine";
    const VERSION: u32 = 1;

    fn ports(&self) -> Ports {
        let known: Option<Vec<Vec<String>>> = self.data.iter().map(Input::names).collect();
        let all = known.map(|lists| lists.into_iter().flatten().collect::<BTreeSet<String>>());
        match (&self.splits, all) {
            (Some(splits), _) => Ports::named(Type::Dataset, splits.clone()),
            (None, Some(all)) => Ports::named(Type::Dataset, all),
            (None, None) => Ports::of(Type::Dataset),
        }
    }

    fn check(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        if self.data.is_empty() {
            problems.push(Problem::error("data", "there is nothing to combine"));
        }
        if let Some(shares) = &self.probabilities {
            if self.how != How::Interleave {
                let problem = Problem::error("probabilities", "these are for `how: interleave`");
                problems.push(problem);
            }
            if shares.len() != self.data.len() {
                let (shares, data) = (shares.len(), self.data.len());
                let message = format!("{shares} shares for {data} datasets");
                problems.push(Problem::error("probabilities", message));
            }
            for (i, share) in shares.iter().enumerate() {
                if !(*share >= 0.0 && share.is_finite()) {
                    let message = format!("a share is 0 or more, this is {share}");
                    problems.push(Problem::error(format!("probabilities[{i}]"), message));
                }
            }
            let sum: f64 = shares.iter().sum();
            if (sum - 1.0).abs() > 1e-6 {
                let message = format!("the shares add up to {sum} and not to 1");
                problems.push(Problem::error("probabilities", message));
            }
        }
        for (i, split) in self.splits.iter().flatten().enumerate() {
            if !data::is_split_name(split) {
                let message = format!("`{split}` is not the name of a split");
                problems.push(Problem::error(format!("splits[{i}]"), message));
            }
        }
        problems
    }

    fn narrow(&mut self) {
        if let Some(splits) = &self.splits {
            let splits: Vec<&str> = splits.iter().map(String::as_str).collect();
            self.data.iter_mut().for_each(|data| data.keep(&splits));
        }
    }

    fn check_inputs(&self, cx: &Context<'_>) -> Result<()> {
        let data = self.data.iter().map(|d| cx.open(d)).collect::<Result<Vec<_>>>()?;
        self.wanted(&data)?.iter().try_for_each(|split| plan(&data, split).map(drop))
    }

    fn run(&self, cx: &mut Context<'_>) -> Result<()> {
        let data = self.data.iter().map(|d| cx.open(d)).collect::<Result<Vec<_>>>()?;
        for split in self.wanted(&data)? {
            let Planned { paths, schema, classes, rows } = plan(&data, &split)?;
            let mut writer = SplitWriter::create(cx, &split, schema)?;
            let mut told = |done: u64| {
                cx.progress(done, rows, "rows", split.as_str());
                cx.stop()
            };
            match self.how {
                How::Concatenate => {
                    let mut done = 0;
                    for path in &paths {
                        for batch in RowStream::open(path, None)? {
                            let batch = data::typed(&batch?, writer.rows().schema())?;
                            done += batch.num_rows() as u64;
                            writer.write(&batch)?;
                            told(done)?;
                        }
                    }
                }
                How::Interleave => {
                    let probabilities = self.probabilities.clone();
                    let mix = Mix { probabilities, seed: self.seed, stop: self.stop };
                    if paths.len() != self.data.len() && mix.probabilities.is_some() {
                        let message = format!("not every dataset has a split `{split}` to mix");
                        let help = "name the splits to make in `splits`";
                        return Err(Fault::new(message).help(help).into());
                    }
                    data::interleave(&paths, &split, &mix, writer.rows(), &mut told)?;
                }
            }
            if writer.finish(cx, &classes)? == 0 {
                cx.warn(format!("split `{split}` has no rows"));
            }
        }
        Ok(())
    }
}

/// What a split is made of.
struct Planned {
    paths: Vec<PathBuf>,
    schema: SchemaRef,
    classes: ClassNames,
    rows: u64,
}

/// The files of a split, and columns that hold the rows of all of them.
fn plan(data: &[Dataset], split: &str) -> Result<Planned> {
    let mut whole: Option<(String, Table)> = None;
    let (mut paths, mut rows, mut classes) = (Vec::new(), 0, ClassNames::new());
    for (at, dataset) in data.iter().enumerate() {
        if !dataset.splits().any(|s| s == split) {
            continue;
        }
        let from = dataset.split(split)?;
        let name = format!("dataset {} (`{split}`)", at + 1);
        for (column, names) in &from.features.classes {
            let known = classes.entry(column.clone()).or_insert_with(|| names.clone());
            if known != names {
                let message = format!("{name} has other classes in column `{column}`");
                let help = format!("{} and {}", known.join(", "), names.join(", "));
                return Err(Fault::new(message).help(help).into());
            }
        }
        let stream = RowStream::open(&from.rows, None)?;
        rows += stream.rows();
        let empty = Table::new(stream.schema(), Vec::new())?;
        match &mut whole {
            Some((first, all)) => all.append(empty, first, &name)?,
            None => whole = Some((name, empty)),
        }
        paths.push(from.rows);
    }
    let (_, table) = whole.with_context(|| format!("no dataset has a split `{split}`"))?;
    Ok(Planned { paths, schema: Arc::clone(&table.schema), classes, rows })
}

impl Combine {
    fn wanted(&self, data: &[Dataset]) -> Result<Vec<String>> {
        let all: BTreeSet<&str> = data.iter().flat_map(Dataset::splits).collect();
        let Some(splits) = &self.splits else {
            return Ok(all.into_iter().map(str::to_owned).collect());
        };
        if let Some(gone) = splits.iter().find(|s| !all.contains(s.as_str())) {
            let known: Vec<&str> = all.into_iter().collect();
            let fault = Fault::new(format!("no dataset has a split `{gone}`"));
            return Err(fault.help(suggest(gone, &known).unwrap_or_default()).into());
        }
        Ok(splits.clone())
    }
}

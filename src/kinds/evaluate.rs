//! `evaluate`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::Path;
use std::time::Instant;

use anyhow::{Result, anyhow};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokenizers::Tokenizer;

use super::loading;
use crate::artifact::{
    AnyModel, Artifact as _, ReportFile, TokenizerFiles, Tokens, TokensInfo, TokensSplit, Type,
};
use crate::learn::{self, Generation, Measure, ModelConfig, Row, RowReader, Task};
use crate::source::Fault;
use crate::step::{Context, Input, Needs, Ports, Problem, StepKind};

/// Scores a model on one split of tokens.
///
/// Classifiers: accuracy, precision, recall, F1 (of class 1 with two classes, else macro),
/// macro F1, Matthews correlation, confusion matrix, loss. Causal models: loss and perplexity over
/// the target tokens, and where the prompts have words for classes, the class whose word is
/// likeliest after the prompt (by the total likelihood of its tokens, end of sequence included;
/// ties go to the lower class), with the same metrics. `majority` is what always answering the
/// most frequent class would score. Classes are those of the tokens; a classifier with the same
/// names in another order is asked in theirs, one with other names is refused. Perplexity is
/// exp(loss), at most the largest f64. Predictions are written as `predictions.jsonl`; memory does
/// not grow with the number of rows.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Evaluate {
    /// The model: a base, or what training made.
    pub model: Input<AnyModel>,
    /// Tokens to score it on.
    pub data: Input<Tokens>,
    /// Split to score it on.
    #[serde(default = "split")]
    pub split: String,
    /// Rows at a time.
    #[serde(default = "batch_size")]
    pub batch_size: u64,
    /// Number of rows whose prompt is also continued, as samples in the report (causal models);
    /// of a row without a prompt, its first tokens.
    #[serde(default)]
    pub samples: u64,
    /// Tokens of a sample at most.
    #[serde(default = "max_new_tokens")]
    pub max_new_tokens: u64,
    /// 0 continues with the likeliest token; above 0 tokens are drawn.
    #[serde(default)]
    pub temperature: f64,
    /// Draws from the likeliest tokens that hold this much probability together.
    #[serde(default)]
    pub top_p: Option<f64>,
    /// Seeds the draws.
    #[serde(default = "seed")]
    pub seed: u64,
}

/// Tokens that a sample begins with where a row has no prompt.
const BEGINNING: usize = 8;

fn split() -> String {
    "test".into()
}
fn batch_size() -> u64 {
    16
}
fn max_new_tokens() -> u64 {
    64
}
fn seed() -> u64 {
    42
}

impl StepKind for Evaluate {
    const NAME: &'static str = "evaluate";
    const VERSION: u32 = 2;
    const RUNS_MODEL: bool = true;
    const ON_GPU: bool = true;

    fn ports(&self) -> Ports {
        Ports::of(Type::Report)
    }

    fn check(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        if self.batch_size == 0 {
            problems.push(Problem::error("batch_size", "expected 1 or more, found 0"));
        }
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            let message = format!("expected 0 or more, found {}", self.temperature);
            problems.push(Problem::error("temperature", message));
        }
        if let Some(p) = self.top_p.filter(|p| !(*p > 0.0 && *p <= 1.0)) {
            problems.push(Problem::error("top_p", format!("expected above 0 to 1, found {p}")));
        }
        problems
    }

    fn narrow(&mut self) {
        self.data.keep(&[self.split.as_str()]);
    }

    fn check_inputs(&self, cx: &Context<'_>) -> Result<()> {
        let (any, data) = (cx.open(&self.model)?, cx.open(&self.data)?);
        let split = data.split(&self.split)?;
        let info = &split.info;
        if info.rows == 0 {
            return Err(Fault::new(format!("split `{}` has no rows", self.split)).into());
        }
        let config = ModelConfig::read(&any.base().config()?)?;
        loading::check_fit(&config, info, &self.split)?;
        let Scored { task, .. } = scored(&any, info)?;
        if task == Task::CausalLm {
            loading::check_candidates(&config, &split, &self.split)?;
        }
        if self.samples > 0 && task != Task::CausalLm {
            let fault = Fault::new("only a causal model can continue prompts");
            return Err(fault.help("leave `samples` out").into());
        }
        config.check_task(&task)
    }

    fn needs(&self) -> Needs {
        Needs::ALL
    }

    fn run(&self, cx: &mut Context<'_>) -> Result<()> {
        let (any, data) = (cx.open(&self.model)?, cx.open(&self.data)?);
        let TokensSplit { rows, info } = data.split(&self.split)?;
        let Scored { task, classes, order } = scored(&any, &info)?;
        if let Some(warning) = loading::other_tokenizer(any.base(), &info) {
            cx.warn(warning);
        }
        let model = loading::load(&any, &task, loading::compute(cx)?)?;
        let fresh = model.fresh_modules();
        if !fresh.is_empty() {
            let list = fresh.join("`, `");
            cx.warn(format!("the model has no `{list}`: fresh random weights are scored"));
        }
        let candidates: Vec<Vec<u32>> = info.candidates.iter().map(|c| c.ids.clone()).collect();
        let measure = match (&task, &order) {
            (Task::SequenceClassification { .. }, Some(order)) => Measure::ClassesAs(order),
            (Task::SequenceClassification { classes }, None) => Measure::Classes(*classes),
            (Task::CausalLm, _) if candidates.is_empty() => Measure::Likelihood,
            (Task::CausalLm, _) => Measure::Candidates(&candidates),
        };
        let dir = cx.out_dir("report")?;
        let mut out = None;
        if !matches!(measure, Measure::Likelihood) {
            out = Some(BufWriter::new(File::create(dir.join("predictions.jsonl"))?));
        }
        let mut reader = RowReader::open(&rows)?;
        let batch = usize::try_from(self.batch_size)?;
        let start = Instant::now();
        let scores = learn::score(&model, &mut reader, batch, measure, &mut |seen, n| {
            for p in seen {
                let line = json!({
                    "row": p.row, "label": p.label, "predicted": p.predicted, "score": p.score,
                });
                if let Some(out) = &mut out {
                    writeln!(out, "{line}")?;
                }
            }
            cx.progress(n, info.rows, "rows", "");
            cx.stop()
        })?;
        let seconds = start.elapsed().as_secs_f64();
        if let Some(out) = &mut out {
            out.flush()?;
        }
        let mut details = json!({ "task": info.task, "split": self.split });
        if let Some(confusion) = &scores.confusion {
            details["confusion"] = json!(confusion.rows());
            details["classes"] = json!(classes);
        }
        if self.samples > 0 {
            details["samples"] = self.samples(cx, &any, &model, &info, &rows)?;
        }
        let what = any.trained().map_or("base model", |t| t.info.method.as_str());
        let title = format!("{what} on {}", self.split);
        for (name, value) in &scores.metrics {
            cx.metric(&format!("eval/{name}"), 0, *value);
        }
        cx.log(summary(&scores.metrics));
        cx.fact("rows_per_second", scores.metrics["n"] / seconds.max(1e-9));
        let report = ReportFile { title, metrics: scores.metrics, details };
        cx.write_json(&dir, "report.json", &report)
    }
}

fn summary(metrics: &BTreeMap<String, f64>) -> String {
    let names = ["accuracy", "f1", "matthews", "loss", "perplexity", "n"];
    let shown = names.iter().filter_map(|name| {
        let value = metrics.get(*name)?;
        Some(if *name == "n" { format!("n {value}") } else { format!("{name} {value:.4}") })
    });
    shown.collect::<Vec<_>>().join("  ")
}

/// What is scored.
struct Scored {
    task: Task,
    /// Names of the classes, in the order of the tokens.
    classes: Vec<String>,
    /// The model's class for each of them, where it has them in another order.
    order: Option<Vec<usize>>,
}

/// The task of the tokens, which must be the model's, and its classes.
fn scored(any: &AnyModel, info: &TokensInfo) -> Result<Scored> {
    if let Some(trained) = any.trained()
        && trained.info.task != info.task
    {
        let message = format!(
            "the model was trained for `{}`, the tokens are for `{}`",
            trained.info.task, info.task
        );
        return Err(Fault::new(message).into());
    }
    if info.task == loading::CAUSAL_LM {
        let classes = info.candidates.iter().map(|c| c.word.clone()).collect();
        return Ok(Scored { task: Task::CausalLm, classes, order: None });
    }
    let (own, theirs) = (loading::classes_of(any)?, &info.classes);
    // The config of a bare encoder may name classes, but there is no head that has them.
    let compared = loading::task_of(any)?.is_some() && !own.is_empty() && !theirs.is_empty();
    let order = if compared { loading::class_order(&own, theirs)? } else { None };
    if compared && own.len() != theirs.len() {
        let message =
            format!("the model has {} classes, the tokens have {}", own.len(), theirs.len());
        return Err(Fault::new(message).into());
    }
    let classes = if theirs.is_empty() { own } else { theirs.clone() };
    Ok(Scored { task: loading::task(&info.task, classes.len())?, classes, order })
}

/// What a sample continues: the prompt, or where all of a row is to be predicted its first tokens.
fn beginning(row: &Row) -> &[u32] {
    match row.prompt() {
        [] => &row.ids[..row.ids.len().div_ceil(2).min(BEGINNING)],
        prompt => prompt,
    }
}

impl Evaluate {
    /// Continues the prompts of the first rows.
    fn samples(
        &self,
        cx: &Context<'_>,
        any: &AnyModel,
        model: &learn::Model,
        info: &TokensInfo,
        rows: &Path,
    ) -> Result<Value> {
        let files = TokenizerFiles::open(any.base().0.clone())?;
        let tokenizer = Tokenizer::from_file(files.tokenizer()?).map_err(|e| anyhow!("{e}"))?;
        let text = |ids: &[u32]| tokenizer.decode(ids, false).map_err(|e| anyhow!("{e}"));
        let ends: Vec<u32> = info.end_ids.iter().copied().chain(info.eos_id).collect();
        let mut samples = Vec::new();
        for (i, row) in RowReader::open(rows)?.take(usize::try_from(self.samples)?).enumerate() {
            cx.stop()?;
            cx.progress(i as u64, self.samples, "samples", "");
            let row = row?;
            let how = Generation {
                max_new_tokens: usize::try_from(self.max_new_tokens)?,
                temperature: self.temperature,
                top_p: self.top_p,
                ends: &ends,
                seed: self.seed.wrapping_add(i as u64),
            };
            let prompt = beginning(&row);
            let written = learn::generate(model, prompt, &how)?;
            let mut target = &row.ids[prompt.len()..];
            if let [rest @ .., last] = target
                && ends.contains(last)
            {
                target = rest;
            }
            samples.push(json!({
                "row": i,
                "prompt": text(prompt)?,
                "target": text(target)?,
                "generated": text(&written)?,
            }));
        }
        Ok(Value::Array(samples))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_that_is_all_target_is_continued_from_its_first_tokens() {
        let row = |n: u32, labels: Vec<i64>| Row {
            ids: (0..n).collect(),
            labels: Some(labels),
            ..Row::default()
        };
        assert_eq!(beginning(&row(3, vec![-100, -100, 2])), [0, 1]);
        assert_eq!(beginning(&row(3, vec![0, 1, 2])), [0, 1]);
        assert_eq!(beginning(&row(1, vec![0])), [0]);
        assert_eq!(beginning(&row(40, (0..40).collect())).len(), BEGINNING);
    }
}

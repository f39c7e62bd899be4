//! `inspect`: what in the rows would ruin a run.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context as _, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::tokenize::load_tokenizer;
use crate::artifact::{
    AnyRows, Artifact as _, Dataset, Model, Prompts, ReportFile, TokenizerFiles, Tokens,
    TokensInfo, TokensSplit, Type,
};
use crate::data::Near;
use crate::data::doctor::{
    Check, Columns, Doctor, Facts, Finding, Limits, Severity, Survey, digest, survey_dataset,
    survey_prompts,
};
use crate::learn::{self, Embedding, Row, RowReader};
use crate::source::Fault;
use crate::step::{Added, Context, Input, Ports, Problem, Refused, StepKind};

/// Looks at rows and refuses what would ruin a run: the data doctor.
///
/// It takes a dataset, prompts or tokens, and looks at every split and at splits against each
/// other (`train` is the one that others are held against). What it finds has a name:
///
/// - refused: `no_rows`, `one_class`, `no_label`, `label_outside`, `no_target` (nothing to
///   learn), `doubled_bos`, `unknown_tokens`, and with more than a share of the rows `overlap`
///   (rows of a split that stand in an earlier one; share `overlap`), `near_overlap` (rows that
///   nearly do, where `near` is given; the same share), `cut_target` (a tenth),
///   `missing_eos`, `empty`, `dropped` and `untrained_tokens` (half);
/// - warned of: these in fewer rows, and `sorted`, `imbalance`, `unseen_class`, `class_drift`,
///   `length_drift`, `duplicates`, `conflicts` (one text, several labels), `missing_bos`.
///
/// Texts of a dataset can only show what stands in them; what a tokenizer makes of them is seen
/// in tokens. Rows are counted from 0, as they stand in `data.parquet`. The report has counts,
/// classes and a histogram of lengths of each split; `allow` lets a refused finding pass.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Inspect {
    /// The rows.
    data: Input<AnyRows>,
    /// Column of the class (datasets); if not given, one whose class names are known, `label` or
    /// `labels`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    label: Option<String>,
    /// Column of what is learnt, which must not be empty (datasets).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    target: Option<String>,
    /// Columns that make a row the same as another (datasets); by default all columns of text and
    /// of lists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    columns: Option<Vec<String>>,
    /// The base that will be trained (tokens): tokens that it never trained are looked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    model: Option<Input<Model>>,
    /// Findings that do not stop the run.
    #[serde(default)]
    allow: Vec<Check>,
    /// Share of a split's rows that may stand in an earlier split.
    #[serde(default = "overlap")]
    overlap: f64,
    /// Looks for rows that nearly stand in an earlier split (datasets; MinHash): the share of runs
    /// of words, of all that two rows have, from which on they do; 0.8 finds copies that were
    /// edited. Costs some 500 bytes a row, and more time than all the rest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    near: Option<f64>,
    /// Words of a run, for `near`.
    #[serde(default = "five")]
    words: usize,
    /// Distance between the classes, or the lengths, of two splits from which on it is told, 0
    /// (the same) to 1.
    #[serde(default = "drift")]
    drift: f64,
    /// Share of rows that the largest class may have without a warning.
    #[serde(default = "largest_class")]
    largest_class: f64,
}

fn overlap() -> f64 {
    Limits::default().overlap
}
fn five() -> usize {
    5
}
fn drift() -> f64 {
    Limits::default().drift
}
fn largest_class() -> f64 {
    Limits::default().largest_class
}

impl StepKind for Inspect {
    const NAME: &'static str = "inspect";
    const VERSION: u32 = 1;
    const ADDED: &'static [Added] = &[Added { field: "words", legacy: "5" }];

    fn ports(&self) -> Ports {
        Ports::of(Type::Report)
    }

    fn check(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        let ty = self.data.ty();
        let only = [
            ("label", self.label.is_some(), Type::Dataset),
            ("target", self.target.is_some(), Type::Dataset),
            ("columns", self.columns.is_some(), Type::Dataset),
            ("near", self.near.is_some(), Type::Dataset),
            ("model", self.model.is_some(), Type::Tokens),
        ];
        for (field, given, of) in only {
            if given && ty != of {
                let message = format!("`{field}` is for a `{of}`, and the data is a `{ty}`");
                problems.push(Problem::error(field, message));
            }
        }
        if self.columns.as_ref().is_some_and(Vec::is_empty) {
            let problem = Problem::error("columns", "no column is named");
            problems.push(problem.help("leave it out for all columns of text"));
        }
        if self.words == 0 {
            problems.push(Problem::error("words", "a run has 1 word or more"));
        }
        if self.near == Some(0.0) {
            let problem = Problem::error("near", "all rows have nothing in common");
            problems.push(problem.help("0.8 finds copies that were edited"));
        }
        for (field, share) in [
            ("overlap", self.overlap),
            ("near", self.near.unwrap_or(1.0)),
            ("drift", self.drift),
            ("largest_class", self.largest_class),
        ] {
            if !(0.0..=1.0).contains(&share) {
                let message = format!("a share lies between 0 and 1, this is {share}");
                problems.push(Problem::error(field, message));
            }
        }
        problems
    }

    fn narrow(&mut self) {
        if let Some(model) = &mut self.model {
            model.keep(&["weights", "tokenizer"]);
        }
    }

    fn run(&self, cx: &mut Context<'_>) -> Result<()> {
        let limits = Limits {
            overlap: self.overlap,
            near: self.near.map(|threshold| Near { threshold, words: self.words }),
            drift: self.drift,
            largest_class: self.largest_class,
        };
        let (doctor, notes) = match cx.open(&self.data)? {
            AnyRows::Dataset(data) => (self.of_dataset(cx, &data, limits)?, Vec::new()),
            AnyRows::Prompts(data) => (self.of_prompts(cx, &data, limits)?, Vec::new()),
            AnyRows::Tokens(data) => self.of_tokens(cx, &data, limits)?,
        };
        let findings = doctor.findings();
        let (title, metrics) = (doctor.title(&findings), doctor.metrics(&findings));
        let mut markdown = doctor.markdown(&findings);
        for note in notes {
            markdown.push_str(&format!("\n{note}\n"));
        }
        cx.log(markdown.clone());
        for finding in &findings {
            if finding.severity != Severity::Refused {
                cx.warn(told(finding));
            }
        }
        for (name, value) in &metrics {
            cx.fact(name, *value);
        }
        cx.fact("findings", serde_json::to_value(&findings)?);
        let details = doctor.details(&findings);
        let dir = cx.out_dir("report")?;
        std::fs::write(dir.join("report.md"), markdown).context("writing report.md")?;
        cx.write_json(&dir, "report.json", &ReportFile { title, metrics, details })?;
        let report = cx.kept_dir().join("out/report/report.md");
        refuse(&findings, &report)
    }
}

/// A finding as a warning.
pub(super) fn told(finding: &Finding) -> String {
    format!("`{}`: {}; {}", finding.check.name(), finding.line(), finding.help)
}

/// Fails with all that is refused, and how to let it pass.
fn refuse(findings: &[Finding], report: &Path) -> Result<()> {
    let refused: Vec<&Finding> =
        findings.iter().filter(|f| f.severity == Severity::Refused).collect();
    let Some(first) = refused.first() else { return Ok(()) };
    let lines: Vec<String> = refused.iter().map(|f| f.line()).collect();
    let names: BTreeSet<String> = refused.iter().map(|f| f.check.name()).collect();
    let names = names.into_iter().collect::<Vec<_>>().join(", ");
    let help = format!(
        "{}; or, if it is meant to be so, set `allow: [{names}]`; the whole report is in {}",
        first.help,
        report.display()
    );
    Err(Refused(Fault::new(lines.join("; ")).help(help)).into())
}

impl Inspect {
    fn of_dataset(&self, cx: &Context<'_>, data: &Dataset, limits: Limits) -> Result<Doctor> {
        let mut doctor = Doctor::new("characters", limits, &self.allow);
        for name in data.splits() {
            let split = data.split(name)?;
            let classes = &split.features.classes;
            let named = match &self.label {
                Some(column) => classes.get_key_value(column),
                None => classes.iter().next(),
            };
            let columns = Columns {
                label: self.label.as_deref(),
                target: self.target.as_deref(),
                texts: self.columns.as_deref(),
                named: named.map(|(column, names)| (column.as_str(), names.as_slice())),
            };
            let mut progress = |done, total| {
                cx.progress(done, total, "rows", name);
                cx.stop()
            };
            survey_dataset(&mut doctor, name, &split.rows, columns, &mut progress)?;
        }
        Ok(doctor)
    }

    fn of_prompts(&self, cx: &Context<'_>, data: &Prompts, limits: Limits) -> Result<Doctor> {
        let mut doctor = Doctor::new("characters", limits, &self.allow);
        for name in data.splits() {
            let (rows, info) = data.split(name)?;
            let names = if info.classes.is_empty() { &info.candidates } else { &info.classes };
            let mut progress = |done, total| {
                cx.progress(done, total, "rows", name);
                cx.stop()
            };
            survey_prompts(&mut doctor, name, &rows, names, &mut progress)?;
        }
        Ok(doctor)
    }

    fn of_tokens(
        &self,
        cx: &Context<'_>,
        data: &Tokens,
        limits: Limits,
    ) -> Result<(Doctor, Vec<String>)> {
        let mut doctor = Doctor::new("tokens", limits, &self.allow);
        let model = self.model.as_ref().map(|model| cx.open(model)).transpose()?;
        let embedding = model.as_ref().map(|m| learn::embedding(&m.weights()?)).transpose()?;
        let mut used = BTreeSet::new();
        for name in data.splits() {
            let TokensSplit { rows, info } = data.split(name)?;
            let mut done = 0;
            let rows = RowReader::open(&rows)?.inspect(|row| {
                done += 1;
                if done % 1024 == 0 {
                    cx.progress(done, info.rows, "rows", name);
                }
                if let (Some(embedding), Ok(row)) = (&embedding, row) {
                    used.extend(row.ids.iter().filter(|id| embedding.untrained.contains(id)));
                }
            });
            let rows = rows.map(|row| cx.stop().and(row));
            survey_tokens(&mut doctor, name, rows, &info, embedding.as_ref())?;
        }
        let mut notes = Vec::new();
        if let (Some(model), false) = (&model, used.is_empty()) {
            const SHOWN: usize = 20;
            let tokenizer = load_tokenizer(&TokenizerFiles::open(model.0.clone())?)?;
            let names =
                used.iter().take(SHOWN).map(|id| format!("{id} `{}`", tokenizer.token(*id)));
            let names = names.collect::<Vec<_>>().join(", ");
            let more = used.len().saturating_sub(SHOWN);
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            notes.push(format!("tokens that the base never trained: {names}{more}"));
        }
        Ok((doctor, notes))
    }
}

/// Looks at tokenized rows of a split.
pub(super) fn survey_tokens(
    doctor: &mut Doctor,
    split: &str,
    rows: impl Iterator<Item = Result<Row>>,
    info: &TokensInfo,
    embedding: Option<&Embedding>,
) -> Result<()> {
    let mut survey = Survey::after(info.dropped, info.truncated);
    let words: Vec<&str> = info.candidates.iter().map(|c| c.word.as_str()).collect();
    let names: Vec<&str> = match words.is_empty() {
        true => info.classes.iter().map(String::as_str).collect(),
        false => words,
    };
    // Labels belong to the task, or stand for the words that are answers.
    let labelled = info.task != super::loading::CAUSAL_LM || !info.candidates.is_empty();
    for row in rows {
        let row = row.with_context(|| format!("split `{split}`"))?;
        let mut facts = facts(&row, info, embedding);
        match row.class.map(|class| (class, names.get(class as usize))) {
            _ if !labelled => {}
            None => facts.flaws.push(Check::NoLabel),
            Some((_, None)) if !names.is_empty() => facts.flaws.push(Check::LabelOutside),
            Some((class, name)) => {
                let name = name.map_or(String::new(), |name| format!(" ({name})"));
                facts.class = Some(doctor.class(&format!("{class}{name}")));
            }
        }
        survey.add(facts);
    }
    doctor.take(split, survey);
    Ok(())
}

fn facts(row: &Row, info: &TokensInfo, embedding: Option<&Embedding>) -> Facts {
    let bytes = |ids: &[u32]| ids.iter().flat_map(|id| id.to_le_bytes()).collect::<Vec<u8>>();
    let (prompt, ids) = (row.prompt(), &row.ids);
    // Without a prompt all of it is read and learnt.
    let read = if prompt.is_empty() || row.labels.is_none() { ids } else { prompt };
    let class = row.class.map(u32::to_le_bytes).unwrap_or_default();
    let mut facts = Facts {
        length: ids.len() as u64,
        content: digest([bytes(read).as_slice()]),
        answer: digest([bytes(&ids[prompt.len()..]).as_slice(), &class]),
        ..Facts::default()
    };
    let mut flaw = |check, is: bool| {
        if is {
            facts.flaws.push(check);
        }
    };
    if let Some(labels) = &row.labels {
        flaw(Check::NoTarget, row.targets() == 0);
        let last = labels.iter().rposition(|label| *label != learn::IGNORE);
        let ends = last
            .and_then(|at| ids.get(at))
            .is_some_and(|id| info.eos_id == Some(*id) || info.end_ids.contains(id));
        let can_end = info.eos_id.is_some() || !info.end_ids.is_empty();
        let full = ids.len() as u64 >= info.max_length;
        flaw(Check::CutTarget, last.is_some() && can_end && !ends && full);
        flaw(Check::MissingEos, last.is_some() && can_end && !ends && !full);
        if let Some(bos) = info.bos_id {
            flaw(Check::DoubledBos, ids.len() > 1 && ids[..2] == [bos, bos]);
            flaw(Check::MissingBos, ids.first() != Some(&bos));
        }
    }
    if let Some(embedding) = embedding {
        flaw(Check::UnknownTokens, ids.iter().any(|id| *id as usize >= embedding.rows));
        flaw(Check::UntrainedTokens, ids.iter().any(|id| embedding.untrained.contains(id)));
    }
    facts
}

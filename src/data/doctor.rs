//! The data doctor: what in the rows would ruin a run, and what the user should know about them.
//!
//! A [`Doctor`] is fed row by row, split by split, with [`Facts`] (digests, lengths, flaws) and
//! never with the rows themselves, so that it takes some 40 bytes a row whatever is in it. It
//! knows neither texts nor tokens: who feeds it says what a row's flaws are. A row that is to be
//! found among nearly the same ones has a signature of 512 bytes besides.

mod between;
mod report;
mod survey;
mod texts;

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Near;

pub use survey::{Facts, Survey, digest};
pub use texts::{Columns, survey_dataset, survey_prompts};

/// What is looked for, by the name that `allow` takes.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Check {
    /// A split without rows.
    NoRows,
    /// All rows of a split are of one class.
    OneClass,
    /// Rows stand class by class.
    Sorted,
    /// One class has nearly all rows.
    Imbalance,
    /// A split has a class that the first one never shows.
    UnseenClass,
    /// Classes have other shares in two splits.
    ClassDrift,
    /// Rows are of other lengths in two splits.
    LengthDrift,
    /// Rows without a label.
    NoLabel,
    /// Labels outside of the classes.
    LabelOutside,
    /// Rows with nothing but blanks to read.
    Empty,
    /// Rows that repeat an earlier one.
    Duplicates,
    /// The same text with different labels.
    Conflicts,
    /// Rows of a split that stand in an earlier one as well.
    Overlap,
    /// Rows of a split of which nearly all words stand in a row of an earlier one.
    NearOverlap,
    /// Rows with nothing to learn.
    NoTarget,
    /// Rows that the tokenize step left out.
    Dropped,
    /// Rows as long as they may be whose answer has no end: it was cut.
    CutTarget,
    /// Answers without an end-of-sequence token.
    MissingEos,
    /// Two beginning-of-sequence tokens at the start.
    DoubledBos,
    /// No beginning-of-sequence token where the tokenizer puts one.
    MissingBos,
    /// Token ids that the model's embedding does not have.
    UnknownTokens,
    /// Tokens whose embedding the base never trained.
    UntrainedTokens,
}

impl Check {
    /// As it is written in `allow`.
    pub fn name(self) -> String {
        let value = serde_json::to_value(self).unwrap_or_default();
        value.as_str().unwrap_or_default().to_owned()
    }

    /// The share of rows above which it ruins a run; `None` where it never does.
    fn limit(self, limits: &Limits) -> Option<f64> {
        match self {
            Self::NoRows
            | Self::OneClass
            | Self::NoLabel
            | Self::LabelOutside
            | Self::NoTarget
            | Self::DoubledBos
            | Self::UnknownTokens => Some(0.0),
            Self::Overlap | Self::NearOverlap => Some(limits.overlap),
            Self::CutTarget => Some(0.1),
            Self::Empty | Self::Dropped | Self::MissingEos | Self::UntrainedTokens => Some(0.5),
            Self::Sorted
            | Self::Imbalance
            | Self::UnseenClass
            | Self::ClassDrift
            | Self::LengthDrift
            | Self::Duplicates
            | Self::Conflicts
            | Self::MissingBos => None,
        }
    }

    /// What to do about it.
    fn help(self) -> &'static str {
        match self {
            Self::NoRows => "look at what the steps before leave out",
            Self::OneClass => {
                "stratify the sample step by the label, or shuffle before taking rows: many \
                 datasets are stored sorted by label"
            }
            Self::Sorted => "leave `shuffle` of the sample and train steps on",
            Self::Imbalance => "judge by `f1` or `matthews` and not by accuracy",
            Self::UnseenClass => "stratify the sample step by the label",
            Self::ClassDrift => "draw the splits from one pool, with `stratify`",
            Self::LengthDrift => "draw the splits from one pool",
            Self::NoLabel => "give the rows a label, or leave them out",
            Self::LabelOutside => "see whether `classes` of the format step names all of them",
            Self::Empty => "leave the rows out with `filter` of a transform step",
            Self::Duplicates => "leave them out with `deduplicate` of a transform step",
            Self::Conflicts => "look at the labels of these rows",
            Self::Overlap => {
                "leave them out with `deduplicate: { across: true }` of a transform step: what was \
                 trained on says nothing about what was learnt"
            }
            Self::NearOverlap => {
                "leave them out with `deduplicate: { near: 0.8, across: true }` of a transform \
                 step: they are copies that were edited"
            }
            Self::NoTarget => {
                "check the target column of the format step, and `max_length` and `truncate` of \
                 the tokenize step"
            }
            Self::Dropped => "raise `max_length` of the tokenize step",
            Self::CutTarget => {
                "raise `max_length` of the tokenize step, or set `truncate: input` there"
            }
            Self::MissingEos => {
                "set `append_eos: true` in the tokenize step, or a model never learns to stop"
            }
            Self::DoubledBos => {
                "take the beginning-of-sequence token out of the data or the template; the \
                 tokenizer puts one by itself"
            }
            Self::MissingBos => "see whether the chat template is that of this model",
            Self::UnknownTokens => "tokenize with the tokenizer of the model that is trained",
            Self::UntrainedTokens => {
                "use a template of tokens that the base knows, or train the embeddings as well"
            }
        }
    }
}

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// It ruins a run.
    Refused,
    /// It would be refused, but was allowed by name.
    Allowed,
    /// The user should know.
    Warning,
}

impl Severity {
    fn word(self) -> &'static str {
        match self {
            Self::Refused => "refused",
            Self::Allowed => "allowed",
            Self::Warning => "warning",
        }
    }
}

/// One thing found in one split.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Finding {
    /// What.
    pub check: Check,
    /// How bad it is.
    pub severity: Severity,
    /// Where.
    pub split: String,
    /// In comparison with which other split.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub against: Option<String>,
    /// How many rows it is about.
    pub count: u64,
    /// Of how many.
    pub of: u64,
    /// The first of these rows, counted from 0.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rows: Vec<u64>,
    /// In words.
    pub message: String,
    /// What to do about it.
    pub help: String,
}

impl Finding {
    fn against(&self) -> &str {
        self.against.as_deref().unwrap_or_default()
    }

    /// Message and rows.
    pub fn line(&self) -> String {
        if self.rows.is_empty() || self.count >= self.of && self.of > SHOWN as u64 {
            return self.message.clone();
        }
        let rows: Vec<String> = self.rows.iter().map(u64::to_string).collect();
        let more = if self.count > self.rows.len() as u64 { ", …" } else { "" };
        let noun = if self.count == 1 { "row" } else { "rows" };
        format!("{} ({noun} {}{more})", self.message, rows.join(", "))
    }
}

/// Rows that a finding names.
const SHOWN: usize = 10;

/// From where on differences count.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// Share of a split's rows that may stand in an earlier split.
    pub overlap: f64,
    /// From where on a row nearly stands in another split; if not given, that is not looked at.
    pub near: Option<Near>,
    /// Distance of two distributions, 0 (the same) to 1.
    pub drift: f64,
    /// Share of rows that the largest class may have.
    pub largest_class: f64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { overlap: 0.01, near: None, drift: 0.1, largest_class: 0.9 }
    }
}

/// What is found in the splits of a dataset, of prompts or of tokens.
#[derive(Debug)]
pub struct Doctor {
    /// What lengths count: `characters`, `tokens`.
    unit: &'static str,
    limits: Limits,
    classes: Vec<String>,
    numbers: BTreeMap<String, u32>,
    splits: BTreeMap<String, Survey>,
    allowed: Vec<Check>,
}

impl Doctor {
    /// Nothing seen yet.
    pub fn new(unit: &'static str, limits: Limits, allowed: &[Check]) -> Self {
        let (classes, numbers) = (Vec::new(), BTreeMap::new());
        let (splits, allowed) = (BTreeMap::new(), allowed.to_vec());
        Self { unit, limits, classes, numbers, splits, allowed }
    }

    /// The number of a class.
    pub fn class(&mut self, name: &str) -> u32 {
        if let Some(known) = self.numbers.get(name) {
            return *known;
        }
        let number = u32::try_from(self.classes.len()).unwrap_or(u32::MAX);
        self.classes.push(name.to_owned());
        self.numbers.insert(name.to_owned(), number);
        number
    }

    /// Takes what was seen of a split.
    pub fn take(&mut self, split: &str, survey: Survey) {
        self.splits.insert(split.to_owned(), survey);
    }

    /// Splits, `train` first, which the others are held against.
    fn ordered(&self) -> Vec<(&str, &Survey)> {
        let mut splits: Vec<_> = self.splits.iter().map(|(n, s)| (n.as_str(), s)).collect();
        splits.sort_by_key(|(name, _)| (*name != "train", *name));
        splits
    }

    fn name_of(&self, class: u32) -> &str {
        self.classes.get(class as usize).map_or("?", String::as_str)
    }

    /// What was found, the worst first, else in the order of splits and checks.
    pub fn findings(&self) -> Vec<Finding> {
        let splits = self.ordered();
        let mut found = Vec::new();
        for (name, survey) in &splits {
            self.in_split(name, survey, &mut found);
        }
        between::compare(self, &splits, &mut found);
        found.sort_by_key(|f| f.severity);
        found
    }

    /// A finding, as bad as its share of rows makes it.
    fn finding(&self, check: Check, split: &str, about: About, message: String) -> Finding {
        let About { count, of, rows } = about;
        let share = if of == 0 { 1.0 } else { count as f64 / of as f64 };
        let ruins = check.limit(&self.limits).is_some_and(|limit| share > limit);
        let severity = match (ruins, self.allowed.contains(&check)) {
            (true, false) => Severity::Refused,
            (true, true) => Severity::Allowed,
            (false, _) => Severity::Warning,
        };
        let (split, help) = (split.to_owned(), check.help().to_owned());
        Finding { check, severity, split, against: None, count, of, rows, message, help }
    }

    fn in_split(&self, name: &str, survey: &Survey, found: &mut Vec<Finding>) {
        let of = survey.rows();
        let mut add = |check, count, rows: Vec<u64>, message| {
            found.push(self.finding(check, name, About { count, of, rows }, message));
        };
        if of == 0 {
            add(Check::NoRows, 0, Vec::new(), format!("split `{name}` has no rows"));
        }
        for (check, flawed) in survey.flaws() {
            let count = flawed.count;
            let message = format!("{count} of {of} rows of `{name}` {}", says(check));
            add(check, count, flawed.rows.clone(), message);
        }
        if survey.dropped > 0 {
            let (dropped, all) = (survey.dropped, survey.dropped + of);
            let message =
                format!("{dropped} of {all} rows of `{name}` were left out by the tokenize step");
            let about = About { count: dropped, of: all, rows: Vec::new() };
            found.push(self.finding(Check::Dropped, name, about, message));
        }
        self.classes_in(name, survey, found);
        let repeats = survey.repeats();
        if let Some((row, first)) = repeats.duplicates.first() {
            let count = repeats.duplicates.len() as u64;
            let message = format!(
                "{count} of {of} rows of `{name}` repeat an earlier one, as row {row} does row \
                 {first}"
            );
            let rows = repeats.duplicates.iter().map(|(row, _)| *row).take(SHOWN).collect();
            found.push(self.finding(Check::Duplicates, name, About { count, of, rows }, message));
        }
        if survey.is_labelled() && !repeats.conflicts.is_empty() {
            let count = repeats.conflicts.len() as u64;
            let message =
                format!("{count} of {of} rows of `{name}` have a text that also has another label");
            let rows = repeats.conflicts.into_iter().take(SHOWN).collect();
            found.push(self.finding(Check::Conflicts, name, About { count, of, rows }, message));
        }
    }

    fn classes_in(&self, name: &str, survey: &Survey, found: &mut Vec<Finding>) {
        let (of, counts) = (survey.rows(), survey.classes());
        let Some((largest, most)) = counts.iter().max_by_key(|(class, n)| (**n, **class)) else {
            return;
        };
        let mut add = |check, count, message| {
            let about = About { count, of, rows: Vec::new() };
            found.push(self.finding(check, name, about, message));
        };
        if counts.len() == 1 && of > 1 {
            let class = self.name_of(*largest);
            add(Check::OneClass, of, format!("all {of} rows of `{name}` are of class `{class}`"));
        } else if *most as f64 > self.limits.largest_class * of as f64 {
            let (class, share) = (self.name_of(*largest), percent(*most, of));
            let message = format!("{share} of the {of} rows of `{name}` are of class `{class}`");
            add(Check::Imbalance, *most, message);
        }
        if survey.is_sorted() {
            let changes = survey.changes;
            let message = format!(
                "the {of} rows of `{name}` stand class by class: the class changes {changes} times"
            );
            add(Check::Sorted, of, message);
        }
    }
}

/// What a finding is about.
struct About {
    count: u64,
    of: u64,
    rows: Vec<u64>,
}

/// What rows with a flaw do or lack.
fn says(check: Check) -> &'static str {
    match check {
        Check::NoLabel => "have no label",
        Check::LabelOutside => "have a label outside of the classes",
        Check::Empty => "have nothing but blanks to read",
        Check::NoTarget => "have no target token",
        Check::CutTarget => "are as long as they may be and end without an end of sequence",
        Check::MissingEos => "end without an end-of-sequence token",
        Check::DoubledBos => "begin with two beginning-of-sequence tokens",
        Check::MissingBos => "do not begin with the beginning-of-sequence token",
        Check::UnknownTokens => "have token ids that the model's embedding does not have",
        Check::UntrainedTokens => "have tokens that the base never trained",
        _ => "are not as they should be",
    }
}

/// `37.5 %`.
fn percent(count: u64, of: u64) -> String {
    format!("{:.1} %", 100.0 * count as f64 / of.max(1) as f64)
}

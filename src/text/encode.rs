//! From pieces to token ids with labels.

use anyhow::{Context as _, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::fit;
use super::piece::{Part, Piece};
use super::tokenizer::Tokenizer;
use crate::source::Fault;

/// No loss is taken where a label is this; PyTorch's and transformers' value.
const NO_LABEL: i32 = -100;

/// What happens to a row that is longer than the limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Truncate {
    /// The row's input is shortened at its end; template and target stay whole.
    Input,
    /// The end is cut off, target or not (for classification, the special tokens stay).
    Right,
    /// It fails the step.
    Error,
    /// It is left out and counted.
    Drop,
}

/// What happens to a row that is too long even with its input gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TooLong {
    /// It is left out and counted.
    #[default]
    Drop,
    /// It fails the step.
    Fail,
}

/// How rows are encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most tokens of a row.
    pub max_length: usize,
    /// What happens to longer ones; if not given, [`Truncate::Input`], but [`Truncate::Right`]
    /// for a row that is nothing but target, and so has no prompt and no question to keep.
    pub truncate: Option<Truncate>,
    /// What happens to those that cannot be shortened.
    pub on_too_long: TooLong,
    /// Whether the end-of-sequence token follows the last target.
    pub append_eos: bool,
    /// Whether the text already holds the special tokens (chat templates).
    pub special_tokens: bool,
}

/// Text for sequence classification, or two.
pub type Pair<'a> = (&'a str, Option<&'a str>);

/// An encoded row.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Encoded {
    /// Token ids, without padding.
    pub input_ids: Vec<u32>,
    /// As long as the ids: the id where it is to be learnt, else -100. Not shifted. Empty for
    /// classification.
    pub labels: Vec<i32>,
    /// Which text of a pair a token is of; empty where there is one text.
    pub type_ids: Vec<u32>,
    /// Positions that it needs: its tokens, or more where another candidate answer is longer.
    pub positions: usize,
    /// Whether something was cut off.
    pub truncated: bool,
    /// The special token that ends the last answer, if one does.
    pub end: Option<u32>,
}

/// What became of a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Row {
    /// It is encoded.
    Kept(Encoded),
    /// It is left out: it has this many tokens.
    TooLong(usize),
    /// It is left out: nothing in it can be learnt.
    NoTarget,
    /// It is left out: this part of it begins with a second beginning-of-sequence token.
    SecondBos(Part),
}

/// Encodes rows with one tokenizer and one set of limits.
#[derive(Debug)]
pub struct Encoder {
    tokenizer: Tokenizer,
    limits: Limits,
    /// Targets that stand for classes, with their tokens.
    candidates: Vec<(String, Vec<u32>)>,
}

impl Encoder {
    /// An encoder.
    ///
    /// # Errors
    /// When an end-of-sequence token is to be appended and the tokenizer names none.
    pub fn new(tokenizer: Tokenizer, limits: Limits) -> Result<Self> {
        anyhow::ensure!(limits.max_length > 0, "`max_length` is 0");
        if limits.append_eos && tokenizer.eos_id().is_none() && !limits.special_tokens {
            let fault = Fault::new("the tokenizer names no end-of-sequence token");
            let help = "give `eos_token` in tokenizer_config.json, or set `append_eos: false`";
            return Err(fault.help(help).into());
        }
        Ok(Self { tokenizer, limits, candidates: Vec::new() })
    }

    /// With the label words that rows have as targets: `targets` are the `words` with what the
    /// template puts around them, `before` what it writes right before them. A row whose target
    /// is one of them gets these tokens, and every row keeps room for the longest of them, so
    /// that what is left of a prompt does not depend on its answer.
    ///
    /// # Errors
    /// When the tokens of one word begin those of another (or are the same), so that no model
    /// could tell them apart.
    pub fn with_candidates(
        mut self,
        words: &[String],
        targets: &[String],
        before: &str,
    ) -> Result<Self> {
        let context = self.tokenizer.encode(before)?;
        let mut found: Vec<(String, Vec<u32>)> = Vec::with_capacity(targets.len());
        for (at, target) in targets.iter().enumerate() {
            let ids = self.ended(self.following(before, &context, target)?)?;
            let alike =
                |(_, known): &(String, Vec<u32>)| known.starts_with(&ids) || ids.starts_with(known);
            if let Some(other) = found.iter().position(alike) {
                let name = |i: usize| words.get(i).map_or("?", String::as_str);
                let (one, two) = (name(other), name(at));
                let fault = if found[other].1 == ids {
                    Fault::new(format!("`{one}` and `{two}` have the same tokens"))
                        .help("choose other words for these labels")
                } else {
                    let (short, long) =
                        if found[other].1.len() < ids.len() { (one, two) } else { (two, one) };
                    Fault::new(format!("the tokens of `{long}` begin with those of `{short}`"))
                        .help("set `append_eos: true`, or choose other words for these labels")
                };
                return Err(fault.into());
            }
            found.push((target.clone(), ids));
        }
        self.candidates = found;
        Ok(self)
    }

    /// The tokens of each label word as a target, its end included.
    pub fn candidates(&self) -> impl Iterator<Item = &[u32]> {
        self.candidates.iter().map(|(_, ids)| ids.as_slice())
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// A prompt as the model sees it in use, which is how it sees it in training: one string,
    /// with the beginning-of-sequence token once where the tokenizer puts one.
    ///
    /// # Errors
    /// When the tokenizer fails or the text already begins with that token.
    pub fn prompt(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.prefix().to_vec();
        ids.extend(self.tokenizer.encode(text)?);
        if self.has_second_bos(&ids) {
            return Err(second_bos());
        }
        Ok(ids)
    }

    /// The limits.
    pub(super) fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The same as the `tokenizers` crate alone encodes: what the fast path is checked against.
    #[must_use]
    pub fn plain(&self) -> Self {
        let (limits, candidates) = (self.limits, self.candidates.clone());
        Self { tokenizer: self.tokenizer.plain(), limits, candidates }
    }

    fn prefix(&self) -> &[u32] {
        if self.limits.special_tokens { &[] } else { self.tokenizer.prefix() }
    }

    fn has_second_bos(&self, ids: &[u32]) -> bool {
        let bos = self.tokenizer.bos_id();
        bos.is_some() && ids.first().copied() == bos && ids.get(1).copied() == bos
    }

    /// The part of a row that begins with the second beginning-of-sequence token.
    fn second_bos(&self, pieces: &[Piece]) -> Part {
        let bos = self.tokenizer.bos_id().map_or(0, |bos| self.tokenizer.token(bos).len());
        let at = if self.prefix().is_empty() { bos } else { 0 };
        let mut end = 0;
        let part = pieces.iter().find(|piece| {
            end += piece.text.len();
            end > at
        });
        part.map_or(Part::Template, |piece| piece.part)
    }

    /// Tokens of a text that follows another, whose tokens are `ids`: those that the two have as
    /// one string, as in transformers, provided that the first then keeps its own; else those of
    /// the text by itself. (A tokenizer may put a blank before every text that it is given, or
    /// join a character to the one before it.)
    fn following(&self, before: &str, ids: &[u32], text: &str) -> Result<Vec<u32>> {
        let mut context = near_end(before);
        let mut alone = self.tokenizer.encode(context)?;
        // from the first token on that both have, nothing further back has a part in the rest
        let agree = alone.iter().rev().zip(ids.iter().rev()).take_while(|(a, b)| a == b).count();
        if context.len() < before.len() && agree < alone.len().min(2) {
            context = before;
            alone = self.tokenizer.encode(context)?;
        }
        if context.len() < before.len() || ids.ends_with(&alone) {
            let joint = self.tokenizer.encode(&format!("{context}{text}"))?;
            if let Some(rest) = joint.strip_prefix(alone.as_slice()) {
                return Ok(rest.to_vec());
            }
        }
        self.tokenizer.encode(text)
    }

    /// The tokens of a row's last target with the end that it gets.
    fn ended(&self, mut ids: Vec<u32>) -> Result<Vec<u32>> {
        if !self.limits.append_eos {
            return Ok(ids);
        }
        let eos = self.tokenizer.eos_id();
        let end = ids.last().copied();
        // a chat template has written its end-of-turn token, which need not be the EOS
        let ended = end.is_some()
            && (end == eos
                || self.limits.special_tokens
                    && end.is_some_and(|id| self.tokenizer.is_special(id)));
        if !ended {
            let help = "the chat template ends no turn, and the tokenizer names no `eos_token`";
            ids.push(eos.with_context(|| help)?);
        }
        Ok(ids)
    }

    /// Encodes a row for a causal language model. The prompt pieces between two targets are one
    /// string to the tokenizer; what follows them is encoded as it stands there.
    ///
    /// # Errors
    /// When the tokenizer fails, the template begins with a second BOS, or the row is too long
    /// and that is to fail.
    pub fn causal(&self, pieces: &[Piece]) -> Result<Row> {
        let last = pieces.iter().rposition(|p| p.part == Part::Target && !p.text.is_empty());
        let Some(last) = last else { return Ok(Row::NoTarget) };
        let pieces = &pieces[..=last];
        let mut runs = runs(pieces);
        let max = self.limits.max_length;
        let usual = if runs.len() == 1 { Truncate::Right } else { Truncate::Input };
        let truncate = self.limits.truncate.unwrap_or(usual);
        let abridged = match truncate {
            Truncate::Input if self.tokenizer.is_fast() => fit::abridge(&mut runs, max),
            _ => Vec::new(),
        };
        if truncate == Truncate::Right && self.is_cut_early(&runs) {
            // two more than are kept tell all that is asked of the rest
            let ids = self.tokenizer.encode_up_to(&runs[0].text(), max + 2)?.0;
            runs[0].ids = self.ended(ids)?;
        } else {
            self.encode_runs(&mut runs, 0)?;
        }
        let mut full = self.length(&runs);
        let mut short = false;
        if !abridged.is_empty() {
            short = full > max && fit::shorten(self, &mut runs, max, &abridged)?;
        }
        if !abridged.is_empty() && !short {
            // there is not enough of the row to tell what is kept of it
            fit::restore(&mut runs, abridged);
            self.encode_runs(&mut runs, 0)?;
            full = self.length(&runs);
        }
        if full > max {
            match truncate {
                Truncate::Error => return Err(self.too_long(full)),
                Truncate::Drop => return Ok(Row::TooLong(full)),
                Truncate::Right => {}
                Truncate::Input => {
                    if !short {
                        fit::shorten(self, &mut runs, max, &[])?;
                    }
                    let left = self.length(&runs);
                    if left > max {
                        return self.left_over(left);
                    }
                }
            }
        }
        let mut row = Encoded::default();
        row.input_ids.extend(self.prefix());
        row.labels.resize(row.input_ids.len(), NO_LABEL);
        for run in &runs {
            row.input_ids.extend(&run.ids);
            if run.target {
                let known = run.ids.iter().all(|id| *id <= i32::MAX as u32);
                anyhow::ensure!(known, "a token's id is larger than labels are");
                row.labels.extend(run.ids.iter().map(|id| id.cast_signed()));
            } else {
                row.labels.resize(row.input_ids.len(), NO_LABEL);
            }
        }
        if self.has_second_bos(&row.input_ids) {
            return match self.second_bos(pieces) {
                Part::Template => Err(second_bos()),
                part => Ok(Row::SecondBos(part)),
            };
        }
        row.end =
            row.input_ids.last().copied().filter(|id| {
                Some(*id) == self.tokenizer.eos_id() || self.tokenizer.is_special(*id)
            });
        if self.limits.append_eos {
            anyhow::ensure!(
                row.end.is_some(),
                "the row does not end with an end-of-sequence token"
            );
        }
        row.truncated = full > max && (truncate != Truncate::Right || row.input_ids.len() > max);
        if row.input_ids.len() > max {
            row.end = None;
            row.input_ids.truncate(max);
            row.labels.truncate(max);
        }
        // the first token of a row is never predicted, so a label on it teaches nothing
        if row.labels.iter().skip(1).all(|label| *label == NO_LABEL) {
            return Ok(Row::NoTarget);
        }
        row.positions = row.input_ids.len();
        if !self.candidates.is_empty() {
            row.positions = row.positions.max(self.length(&runs));
        }
        Ok(Row::Kept(row))
    }

    /// Whether a row that is cut off at its end need not be encoded to its end.
    fn is_cut_early(&self, runs: &[Run]) -> bool {
        let ends = self.tokenizer.eos_id().is_some() || !self.limits.append_eos;
        runs.len() == 1 && ends && self.candidates.is_empty()
    }

    /// Tokens of a row, with room for the longest candidate as its last target.
    pub(super) fn length(&self, runs: &[Run]) -> usize {
        let reserve = self.candidates().map(<[u32]>::len).max().unwrap_or(0);
        let all: usize = runs.iter().map(|run| run.ids.len()).sum();
        let last = runs.last().map_or(0, |run| run.ids.len());
        self.prefix().len() + all - last + last.max(reserve)
    }

    /// What becomes of a row that is too long and cannot be shortened.
    pub(super) fn left_over(&self, length: usize) -> Result<Row> {
        match self.limits.on_too_long {
            TooLong::Drop => Ok(Row::TooLong(length)),
            TooLong::Fail => Err(self.too_long(length)),
        }
    }

    pub(super) fn too_long(&self, length: usize) -> anyhow::Error {
        let max = self.limits.max_length;
        let fault = Fault::new(format!("it has {length} tokens, more than `max_length: {max}`"));
        let help = "raise `max_length`; or `truncate: input` shortens inputs, `truncate: right` \
                    cuts the end off, target or not, `on_too_long: drop` leaves such rows out";
        fault.help(help).into()
    }

    /// Encodes the runs of a row from one of them on; those before it have their tokens.
    pub(super) fn encode_runs(&self, runs: &mut [Run], from: usize) -> Result<()> {
        let last = runs.len().saturating_sub(1);
        let (mut before, mut ids) = (String::new(), Vec::new());
        for (at, run) in runs.iter_mut().enumerate() {
            let text = run.text();
            if at >= from {
                let candidate = self.candidates.iter().find(|(target, _)| *target == text);
                run.ids = match candidate.filter(|_| run.target && at == last) {
                    Some((_, ids)) => ids.clone(),
                    None => {
                        let ids = if before.is_empty() {
                            self.tokenizer.encode(&text)?
                        } else {
                            self.following(&before, &ids, &text)?
                        };
                        if run.target && at == last { self.ended(ids)? } else { ids }
                    }
                };
            }
            before.push_str(&text);
            ids.extend(&run.ids);
        }
        Ok(())
    }
}

/// A text of up to this many bytes is encoded whole where only its end matters.
const NEAR: usize = 64;

/// The end of a text from a blank on, short where the text has blanks: what the tokens after it
/// may depend on.
fn near_end(text: &str) -> &str {
    let from = text.floor_char_boundary(text.len().saturating_sub(NEAR));
    &text[text[..from].rfind(' ').unwrap_or(0)..]
}

fn second_bos() -> anyhow::Error {
    let fault = Fault::new("the row begins with two beginning-of-sequence tokens");
    fault.help("the tokenizer puts one by itself; take it out of the template").into()
}

/// Pieces between two changes from prompt to target, with the tokens of their text.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) target: bool,
    pub(super) pieces: Vec<Piece>,
    pub(super) ids: Vec<u32>,
}

impl Run {
    pub(super) fn text(&self) -> String {
        self.pieces.iter().map(|p| p.text.as_str()).collect()
    }
}

fn runs(pieces: &[Piece]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for piece in pieces {
        let target = piece.part == Part::Target;
        match runs.last_mut() {
            Some(run) if run.target == target => run.pieces.push(piece.clone()),
            _ => runs.push(Run { target, pieces: vec![piece.clone()], ids: Vec::new() }),
        }
    }
    runs
}

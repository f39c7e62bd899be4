//! From pieces to token ids with labels.

use anyhow::{Context as _, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokenizers::{TruncationDirection, TruncationParams, TruncationStrategy};

use super::piece::{Part, Piece};
use super::tokenizer::{Tokenizer, wrong};
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
    /// What happens to longer ones.
    pub truncate: Truncate,
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
    /// Whether something was cut off.
    pub truncated: bool,
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
}

/// Encodes rows with one tokenizer and one set of limits.
#[derive(Debug)]
pub struct Encoder {
    tokenizer: Tokenizer,
    limits: Limits,
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
        Ok(Self { tokenizer, limits })
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
        self.check_bos(&ids)?;
        Ok(ids)
    }

    fn prefix(&self) -> &[u32] {
        if self.limits.special_tokens { &[] } else { self.tokenizer.prefix() }
    }

    fn check_bos(&self, ids: &[u32]) -> Result<()> {
        let bos = self.tokenizer.bos_id();
        if bos.is_some() && ids.first().copied() == bos && ids.get(1).copied() == bos {
            let fault = Fault::new("the row begins with two beginning-of-sequence tokens");
            let help = "the tokenizer puts one by itself; take it out of the template";
            return Err(fault.help(help).into());
        }
        Ok(())
    }

    /// A target's tokens, with the end that the last target of a row gets.
    fn target(&self, text: &str, last: bool) -> Result<Vec<u32>> {
        let mut ids = self.tokenizer.encode(text)?;
        if !last || !self.limits.append_eos {
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

    /// The tokens of each label word as a target; `targets` are the words with what the template
    /// puts around them.
    ///
    /// # Errors
    /// When two words have the same tokens, so that no model could tell them apart.
    pub fn candidates(&self, words: &[String], targets: &[String]) -> Result<Vec<Vec<u32>>> {
        let mut found: Vec<Vec<u32>> = Vec::with_capacity(targets.len());
        for (at, target) in targets.iter().enumerate() {
            let ids = self.target(target, true)?;
            if let Some(other) = found.iter().position(|known| *known == ids) {
                let name = |i: usize| words.get(i).map_or("?", String::as_str);
                let message = format!("`{}` and `{}` have the same tokens", name(other), name(at));
                let help = "choose other words for these labels";
                return Err(Fault::new(message).help(help).into());
            }
            found.push(ids);
        }
        Ok(found)
    }

    /// Encodes a row for a causal language model. The prompt pieces between two targets are one
    /// string to the tokenizer; targets are encoded by themselves.
    ///
    /// # Errors
    /// When the tokenizer fails, the row begins with two BOS, or it is too long and that is to
    /// fail.
    pub fn causal(&self, pieces: &[Piece]) -> Result<Row> {
        let last = pieces.iter().rposition(|p| p.part == Part::Target && !p.text.is_empty());
        let Some(last) = last else { return Ok(Row::NoTarget) };
        let mut runs = self.runs(&pieces[..=last])?;
        let length = |runs: &[Run]| {
            self.prefix().len() + runs.iter().map(|run| run.ids.len()).sum::<usize>()
        };
        let max = self.limits.max_length;
        let full = length(&runs);
        let mut truncated = full > max;
        if truncated {
            match self.limits.truncate {
                Truncate::Error => return Err(self.too_long(full)),
                Truncate::Drop => return Ok(Row::TooLong(full)),
                Truncate::Right => {}
                Truncate::Input => {
                    for (run, piece) in longest_inputs(&runs) {
                        let over = length(&runs).saturating_sub(max);
                        if over > 0 {
                            self.shorten(&mut runs[run], piece, over)?;
                        }
                    }
                    let left = length(&runs);
                    if left > max && self.limits.on_too_long == TooLong::Fail {
                        return Err(self.too_long(left));
                    } else if left > max {
                        return Ok(Row::TooLong(left));
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
                let labels = run.ids.iter().map(|id| i32::try_from(*id));
                row.labels.extend(labels.collect::<Result<Vec<_>, _>>()?);
            } else {
                row.labels.resize(row.input_ids.len(), NO_LABEL);
            }
        }
        self.check_bos(&row.input_ids)?;
        if self.limits.append_eos {
            let end = row.input_ids.last().copied();
            let ended = end == self.tokenizer.eos_id()
                || end.is_some_and(|id| self.tokenizer.is_special(id));
            anyhow::ensure!(ended, "the row does not end with an end-of-sequence token");
        }
        truncated &= row.input_ids.len() <= max || self.limits.truncate == Truncate::Right;
        row.truncated = truncated;
        row.input_ids.truncate(max);
        row.labels.truncate(max);
        // the first token of a row is never predicted, so a label on it teaches nothing
        if row.labels.iter().skip(1).all(|label| *label == NO_LABEL) {
            return Ok(Row::NoTarget);
        }
        Ok(Row::Kept(row))
    }

    fn too_long(&self, length: usize) -> anyhow::Error {
        let max = self.limits.max_length;
        let fault = Fault::new(format!("it has {length} tokens, more than `max_length: {max}`"));
        fault.help("raise `max_length`, or set `truncate: input` or `on_too_long: drop`").into()
    }

    fn runs(&self, pieces: &[Piece]) -> Result<Vec<Run>> {
        let mut runs: Vec<Run> = Vec::new();
        for piece in pieces {
            let target = piece.part == Part::Target;
            match runs.last_mut() {
                Some(run) if run.target == target => run.pieces.push(piece.clone()),
                _ => runs.push(Run { target, pieces: vec![piece.clone()], ids: Vec::new() }),
            }
        }
        let last = runs.len().saturating_sub(1);
        for (at, run) in runs.iter_mut().enumerate() {
            let text = run.text();
            run.ids = if run.target {
                self.target(&text, at == last)?
            } else {
                self.tokenizer.encode(&text)?
            };
        }
        Ok(runs)
    }

    /// Cuts the end of one input piece until its run has lost `over` tokens, or the piece is
    /// empty. The cut is at the end of a token, on a character boundary; the run is encoded
    /// again as a whole, since tokens at the seam may differ.
    fn shorten(&self, run: &mut Run, piece: usize, over: usize) -> Result<()> {
        let allowed = run.ids.len().saturating_sub(over);
        let start: usize = run.pieces[..piece].iter().map(|p| p.text.len()).sum();
        let whole = run.pieces[piece].text.clone();
        let end = start + whole.len();
        let encoding = self.tokenizer.inner.encode(run.text(), false).map_err(wrong("encoding"))?;
        let ends: Vec<usize> = encoding
            .get_offsets()
            .iter()
            .filter(|(from, to)| *to > start && *from < end)
            .map(|(_, to)| (*to).min(end) - start)
            .collect();
        let mut keep = ends.len().saturating_sub(over);
        loop {
            let cut = if keep == 0 { 0 } else { whole.floor_char_boundary(ends[keep - 1]) };
            run.pieces[piece].text.clear();
            run.pieces[piece].text.push_str(&whole[..cut]);
            run.ids = self.tokenizer.encode(&run.text())?;
            let over = run.ids.len().saturating_sub(allowed);
            if over == 0 || keep == 0 {
                return Ok(());
            }
            keep = keep.saturating_sub(over);
        }
    }

    /// Encodes a text, or two, for sequence classification, with the tokenizer's special tokens.
    ///
    /// # Errors
    /// When the tokenizer fails, or it is too long and that is to fail.
    pub fn classification(&self, (text, pair): Pair<'_>) -> Result<Row> {
        let inner = &self.tokenizer.inner;
        let encoding = match pair {
            Some(pair) => inner.encode_fast((text, pair), true),
            None => inner.encode_fast(text, true),
        };
        let mut encoding = encoding.map_err(wrong("encoding"))?;
        let (max, full) = (self.limits.max_length, encoding.len());
        let truncated = full > max;
        if truncated {
            match self.limits.truncate {
                Truncate::Error => return Err(self.too_long(full)),
                Truncate::Drop => return Ok(Row::TooLong(full)),
                Truncate::Right | Truncate::Input => {
                    encoding = self.truncated(text, pair)?;
                    if encoding.len() > max {
                        return Ok(Row::TooLong(encoding.len()));
                    }
                }
            }
        }
        Ok(Row::Kept(Encoded {
            input_ids: encoding.get_ids().to_vec(),
            labels: Vec::new(),
            type_ids: pair.map_or_else(Vec::new, |_| encoding.get_type_ids().to_vec()),
            truncated,
        }))
    }

    /// As transformers does with `truncation=True`: the longest text loses its end first, the
    /// special tokens stay.
    fn truncated(&self, text: &str, pair: Option<&str>) -> Result<tokenizers::Encoding> {
        let inner = &self.tokenizer.inner;
        let one = |text: &str| inner.encode_fast(text, false).map_err(wrong("encoding"));
        let added = inner
            .get_post_processor()
            .map_or(0, |p| tokenizers::PostProcessor::added_tokens(p, pair.is_some()));
        let room = self.limits.max_length.saturating_sub(added);
        let params = TruncationParams {
            direction: TruncationDirection::Right,
            max_length: room,
            strategy: TruncationStrategy::LongestFirst,
            stride: 0,
        };
        let (first, second) = (one(text)?, pair.map(one).transpose()?);
        let cut = tokenizers::utils::truncation::truncate_encodings(first, second, &params);
        let (first, second) = cut.map_err(|e| anyhow::anyhow!("truncating: {e}"))?;
        inner.post_process(first, second, true).map_err(wrong("adding special tokens"))
    }
}

/// Pieces between two changes from prompt to target, with the tokens of their text.
#[derive(Debug)]
struct Run {
    target: bool,
    pieces: Vec<Piece>,
    ids: Vec<u32>,
}

impl Run {
    fn text(&self) -> String {
        self.pieces.iter().map(|p| p.text.as_str()).collect()
    }
}

/// (run, piece) of every input, the longest first, ties in order.
fn longest_inputs(runs: &[Run]) -> Vec<(usize, usize)> {
    let mut inputs = Vec::new();
    for (r, run) in runs.iter().enumerate() {
        for (p, piece) in run.pieces.iter().enumerate() {
            if piece.part == Part::Input {
                inputs.push((std::cmp::Reverse(piece.text.len()), r, p));
            }
        }
    }
    inputs.sort_unstable();
    inputs.into_iter().map(|(_, r, p)| (r, p)).collect()
}

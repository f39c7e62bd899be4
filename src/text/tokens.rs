//! From rendered rows in Parquet to token ids in Parquet.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use arrow::array::{Array, ArrayRef, AsArray, Int32Array, Int32Builder, ListBuilder, RecordBatch};
use arrow::datatypes::{DataType, Field, Int32Type, Schema};
use rayon::prelude::*;
use serde::Serialize;

use super::columns::{Writer, read};
use super::encode::{Encoded, Encoder, Row};
use super::piece::{Part, Piece};
use super::tokenizer::Tokenizer;

/// What a model is trained for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Task {
    /// To write the target after the prompt.
    CausalLm,
    /// To tell the class of a text.
    SequenceClassification,
}

impl Task {
    /// As in records: `causal_lm`, `sequence_classification`.
    pub fn name(self) -> &'static str {
        match self {
            Self::CausalLm => "causal_lm",
            Self::SequenceClassification => "sequence_classification",
        }
    }

    /// From [`Task::name`].
    pub fn of_name(name: &str) -> Option<Self> {
        [Self::CausalLm, Self::SequenceClassification].into_iter().find(|t| t.name() == name)
    }
}

/// A row's tokens for people: what the vocabulary calls them, and which are learnt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TokenSample {
    /// The tokens.
    pub tokens: Vec<String>,
    /// Whether each is learnt; empty for classification.
    pub target: Vec<bool>,
    /// The class, where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label: Option<i32>,
}

/// What came of a file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tokenized {
    /// Rows written.
    pub rows: u64,
    /// Of these, rows that were shortened.
    pub truncated: u64,
    /// Rows left out because they are too long.
    pub too_long: u64,
    /// Rows left out because nothing in them is learnt.
    pub no_target: u64,
    /// Rows left out because a part of them (its name) begins with a second BOS.
    pub second_bos: BTreeMap<&'static str, u64>,
    /// Rows that do not begin with the BOS that the tokenizer puts before a text.
    pub without_bos: u64,
    /// Special tokens that end a row's last answer.
    pub ends: BTreeSet<u32>,
    /// Tokens written.
    pub tokens: u64,
    /// Of these, tokens with a label.
    pub target_tokens: u64,
    /// Positions of the longest row, with room for the longest candidate answer.
    pub longest: u64,
    /// The first three rows.
    pub samples: Vec<TokenSample>,
}

/// Encodes a file of rendered rows into a file of token ids, rows in parallel, their order kept.
/// `progress` gets rows done and rows in all.
///
/// # Errors
/// When a row fails (the message has its number, from 1) or the disk refuses.
pub fn tokenize_file(
    input: &Path,
    output: &Path,
    encoder: &Encoder,
    task: Task,
    progress: &mut dyn FnMut(u64, u64) -> Result<()>,
) -> Result<Tokenized> {
    let (total, reader) = read(input, &[])?;
    let names: Vec<String> = arrow::array::RecordBatchReader::schema(&reader)
        .fields()
        .iter()
        .map(|f| f.name().clone())
        .collect();
    let has = |name: &str| names.iter().any(|n| n == name);
    let (labelled, pairs) = (has("label"), has("text_pair"));
    let schema = Arc::new(schema(task, labelled, pairs));
    let mut writer = Writer::create(output, schema.clone())?;
    let mut done = 0;
    let mut out = Tokenized::default();
    for batch in reader {
        let batch = batch?;
        let rows = (0..batch.num_rows()).into_par_iter().map(|row| {
            let encoded = match task {
                Task::CausalLm => encoder.causal(&pieces(&batch, row)?),
                Task::SequenceClassification => {
                    let text = text(&batch, "text", row)?;
                    let pair = pairs.then(|| self::text(&batch, "text_pair", row)).transpose()?;
                    encoder.classification((text, pair))
                }
            };
            encoded.with_context(|| format!("row {}", done + row as u64 + 1))
        });
        let rows: Vec<Result<Row>> = rows.collect();
        let labels = labelled.then(|| labels(&batch)).transpose()?;
        let mut kept = Vec::with_capacity(rows.len());
        for (at, row) in rows.into_iter().enumerate() {
            // of several faults the first in the file is told, whatever the threads
            match row? {
                Row::Kept(row) => kept.push((row, labels.map_or(0, |l| l.value(at)))),
                Row::TooLong(_) => out.too_long += 1,
                Row::NoTarget => out.no_target += 1,
                Row::SecondBos(part) => *out.second_bos.entry(part.name()).or_default() += 1,
            }
        }
        let bos = encoder.tokenizer().bos_id();
        for (row, label) in &kept {
            out.count(row);
            out.without_bos += u64::from(bos.is_some() && row.input_ids.first().copied() != bos);
            if out.samples.len() < 3 {
                let label = labelled.then_some(*label);
                out.samples.push(sample(encoder.tokenizer(), row, label));
            }
        }
        writer.write(&batch_of(&kept, schema.clone())?)?;
        done += batch.num_rows() as u64;
        progress(done, total)?;
    }
    writer.finish()?;
    Ok(out)
}

impl Tokenized {
    /// Rows left out, for whatever reason.
    pub fn left_out(&self) -> u64 {
        self.too_long + self.no_target + self.second_bos.values().sum::<u64>()
    }

    fn count(&mut self, row: &Encoded) {
        let learnt = row.labels.iter().filter(|l| **l >= 0).count();
        self.rows += 1;
        self.truncated += u64::from(row.truncated);
        self.tokens += row.input_ids.len() as u64;
        self.target_tokens += learnt as u64;
        self.longest = self.longest.max(row.positions as u64);
        self.ends.extend(row.end);
    }
}

fn sample(tokenizer: &Tokenizer, row: &Encoded, label: Option<i32>) -> TokenSample {
    TokenSample {
        tokens: row.input_ids.iter().map(|id| tokenizer.token(*id)).collect(),
        target: row.labels.iter().map(|l| *l >= 0).collect(),
        label,
    }
}

fn column<'a>(batch: &'a RecordBatch, name: &str) -> Result<&'a ArrayRef> {
    batch.column_by_name(name).with_context(|| format!("rendered rows have no column `{name}`"))
}

fn text<'a>(batch: &'a RecordBatch, name: &str, row: usize) -> Result<&'a str> {
    let texts = column(batch, name)?.as_string_opt::<i32>();
    Ok(texts.with_context(|| format!("column `{name}` does not hold text"))?.value(row))
}

fn labels(batch: &RecordBatch) -> Result<&Int32Array> {
    let labels = column(batch, "label")?.as_primitive_opt::<Int32Type>();
    labels.context("column `label` does not hold int32")
}

fn pieces(batch: &RecordBatch, row: usize) -> Result<Vec<Piece>> {
    let form = "column `segments` is not a list of (kind, text)";
    let list = column(batch, "segments")?.as_list_opt::<i32>().context(form)?.value(row);
    let items = list.as_struct_opt().context(form)?;
    let field = |name: &str| items.column_by_name(name)?.as_string_opt::<i32>();
    let (kinds, texts) = (field("kind").context(form)?, field("text").context(form)?);
    let pieces = (0..items.len()).map(|i| {
        let kind = kinds.value(i);
        let part =
            Part::of_name(kind).with_context(|| format!("`{kind}` is no kind of segment"))?;
        Ok(Piece::new(part, texts.value(i)))
    });
    pieces.collect()
}

fn ids_field(name: &str) -> Field {
    let item = Field::new("item", DataType::Int32, false);
    Field::new(name, DataType::List(Arc::new(item)), false)
}

fn schema(task: Task, labelled: bool, pairs: bool) -> Schema {
    let mut fields = vec![ids_field("input_ids")];
    if task == Task::CausalLm {
        fields.push(ids_field("labels"));
    }
    if pairs {
        fields.push(ids_field("token_type_ids"));
    }
    if labelled {
        fields.push(Field::new("label", DataType::Int32, false));
    }
    Schema::new(fields)
}

fn batch_of(rows: &[(Encoded, i32)], schema: Arc<Schema>) -> Result<RecordBatch> {
    let list = |of: &dyn Fn(&Encoded) -> Vec<i32>| -> ArrayRef {
        let item = Field::new("item", DataType::Int32, false);
        let mut builder = ListBuilder::new(Int32Builder::new()).with_field(item);
        for (row, _) in rows {
            builder.values().append_slice(&of(row));
            builder.append(true);
        }
        Arc::new(builder.finish())
    };
    let signed =
        |ids: &[u32]| ids.iter().map(|id| i32::try_from(*id).unwrap_or(i32::MAX)).collect();
    let columns = schema.fields().iter().map(|field| match field.name().as_str() {
        "input_ids" => list(&|row| signed(&row.input_ids)),
        "labels" => list(&|row| row.labels.clone()),
        "token_type_ids" => list(&|row| signed(&row.type_ids)),
        _ => Arc::new(Int32Array::from_iter_values(rows.iter().map(|(_, label)| *label))),
    });
    Ok(RecordBatch::try_new(schema.clone(), columns.collect())?)
}

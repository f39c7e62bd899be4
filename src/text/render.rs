//! Files of rendered rows.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use arrow::array::{
    ArrayRef, Int32Builder, ListBuilder, RecordBatch, StringBuilder, StructBuilder,
};
use arrow::datatypes::{DataType, Field, FieldRef, Schema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::columns::{Columns, Writer, read};
use super::prompts::{Formatter, Outcome, Rendered, Target};
use crate::source::Fault;

/// What happens to a row whose conversation cannot be rendered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnRefused {
    /// It fails the step.
    #[default]
    Fail,
    /// It is left out and counted.
    Drop,
}

/// What came of a file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RenderedFile {
    /// Rows written.
    pub rows: u64,
    /// Rows left out, since their conversation cannot be rendered.
    pub refused: u64,
    /// Why the first of these cannot.
    pub first_refusal: Option<String>,
    /// Conversations of which only the last answer is learnt, since the template writes earlier
    /// ones otherwise once they are answered.
    pub last_only: u64,
    /// The first three rows.
    pub samples: Vec<Rendered>,
}

/// Renders a Parquet file into another: `segments` (and `label` where targets are label words),
/// or `text`, `text_pair`, `label`. `progress` gets rows done and rows in all.
///
/// # Errors
/// When a row cannot be rendered (the message has its number, from 1), no row is left, or the
/// disk refuses.
pub fn render_file(
    input: &Path,
    output: &Path,
    formatter: &Formatter,
    on_refused: OnRefused,
    progress: &mut dyn FnMut(u64, u64) -> Result<()>,
) -> Result<RenderedFile> {
    let (total, reader) = read(input, &formatter.columns())?;
    let labelled = matches!(formatter.target(), Some(Target::Words(..)));
    let schema = Arc::new(if formatter.classifies() {
        text_schema(formatter.pairs())
    } else {
        segments_schema(labelled)
    });
    let mut writer = Writer::create(output, schema.clone())?;
    let (mut done, mut out) = (0, RenderedFile::default());
    for batch in reader {
        let columns = Columns::new(&batch?)?;
        let mut rows = Vec::with_capacity(columns.rows());
        for row in 0..columns.rows() {
            let number = done + row as u64 + 1;
            let named = || format!("row {number}");
            match formatter.outcome(&columns, row).with_context(named)? {
                Outcome::Row(row, last_only) => {
                    out.last_only += u64::from(last_only);
                    rows.push(row);
                }
                Outcome::Refused(why) if on_refused == OnRefused::Fail => {
                    return Err(why.context(named()));
                }
                Outcome::Refused(why) => {
                    out.refused += 1;
                    out.first_refusal.get_or_insert_with(|| format!("{}: {why:#}", named()));
                }
            }
        }
        out.samples.extend(rows.iter().take(3 - out.samples.len()).cloned());
        writer.write(&batch_of(&rows, schema.clone())?)?;
        done += columns.rows() as u64;
        out.rows += rows.len() as u64;
        progress(done, total)?;
    }
    writer.finish()?;
    if let (0, Some(why)) = (out.rows, &out.first_refusal) {
        return Err(Fault::new(format!("no row is left: {why}")).into());
    }
    Ok(out)
}

fn segment_fields() -> [FieldRef; 2] {
    let text = |name: &str| Arc::new(Field::new(name, DataType::Utf8, false));
    [text("kind"), text("text")]
}

fn segments_schema(labelled: bool) -> Schema {
    let item = Field::new("item", DataType::Struct(segment_fields().into_iter().collect()), false);
    let mut fields = vec![Field::new("segments", DataType::List(Arc::new(item)), false)];
    if labelled {
        fields.push(Field::new("label", DataType::Int32, false));
    }
    Schema::new(fields)
}

fn text_schema(pair: bool) -> Schema {
    let mut fields = vec![Field::new("text", DataType::Utf8, false)];
    if pair {
        fields.push(Field::new("text_pair", DataType::Utf8, false));
    }
    fields.push(Field::new("label", DataType::Int32, false));
    Schema::new(fields)
}

fn batch_of(rows: &[Rendered], schema: Arc<Schema>) -> Result<RecordBatch> {
    let strings: Vec<Box<dyn arrow::array::ArrayBuilder>> =
        vec![Box::new(StringBuilder::new()), Box::new(StringBuilder::new())];
    let fields: Vec<FieldRef> = segment_fields().into();
    let item = Field::new("item", DataType::Struct(fields.clone().into()), false);
    let mut segments = ListBuilder::new(StructBuilder::new(fields, strings)).with_field(item);
    let (mut texts, mut pairs) = (StringBuilder::new(), StringBuilder::new());
    let mut labels = Int32Builder::new();
    for row in rows {
        match row {
            Rendered::Segments { segments: pieces, label } => {
                for piece in pieces {
                    let item = segments.values();
                    for (at, text) in [piece.part.name(), &piece.text].into_iter().enumerate() {
                        let builder = item.field_builder::<StringBuilder>(at);
                        builder.context("segments have two text fields")?.append_value(text);
                    }
                    item.append(true);
                }
                segments.append(true);
                labels.append_option(label.map(|l| i32::try_from(l).unwrap_or(i32::MAX)));
            }
            Rendered::Text { text, text_pair, label } => {
                texts.append_value(text);
                pairs.append_value(text_pair.as_deref().unwrap_or_default());
                labels.append_value(i32::try_from(*label)?);
            }
        }
    }
    let columns = schema.fields().iter().map(|field| -> ArrayRef {
        match field.name().as_str() {
            "segments" => Arc::new(segments.finish()),
            "text" => Arc::new(texts.finish()),
            "text_pair" => Arc::new(pairs.finish()),
            _ => Arc::new(labels.finish()),
        }
    });
    Ok(RecordBatch::try_new(schema.clone(), columns.collect())?)
}

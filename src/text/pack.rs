//! A chunk of rows as token ids in Parquet, with what came of it: what is kept between runs, and
//! put together into a file.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use arrow::array::{ArrayRef, AsArray, Int32Array, ListArray, RecordBatch};
use arrow::buffer::{OffsetBuffer, ScalarBuffer};
use arrow::datatypes::{DataType, Field, Int32Type, Schema};
use bytes::Bytes;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::arrow::{ArrowSchemaConverter, ArrowWriter, add_encoded_arrow_schema_to_metadata};
use parquet::basic::Compression;
use parquet::column::writer::ColumnCloseResult;
use parquet::file::metadata::ParquetMetaDataReader;
use parquet::file::properties::{EnabledStatistics, WriterProperties, WriterPropertiesBuilder};
use parquet::file::writer::SerializedFileWriter;

use super::CREATED_BY;
use super::chunk::{Chunk, RowReader};
use super::encode::{Encoded, Encoder, Row};
use super::tokenizer::Tokenizer;
use super::tokens::{Task, TokenSample, Tokenized};
use crate::source::Fault;

/// One row in so many is encoded by the `tokenizers` crate, too.
const AUDIT: u64 = 1000;

/// What rows are and become.
#[derive(Debug, Clone)]
pub(super) struct Shape {
    pub(super) task: Task,
    /// Rows have a label.
    pub(super) labelled: bool,
    /// Rows are two texts.
    pub(super) pairs: bool,
    pub(super) schema: Arc<Schema>,
}

fn ids_field(name: &str) -> Field {
    Field::new(name, DataType::List(Arc::new(item())), false)
}

fn item() -> Field {
    Field::new("item", DataType::Int32, false)
}

impl Shape {
    pub(super) fn new(task: Task, labelled: bool, pairs: bool) -> Self {
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
        Self { task, labelled, pairs, schema: Arc::new(Schema::new(fields)) }
    }
}

/// Columns while they grow; ids, labels and type ids of a row are equally long.
#[derive(Default)]
struct Columns {
    ends: Vec<i32>,
    ids: Vec<i32>,
    labels: Vec<i32>,
    types: Vec<i32>,
    label: Vec<i32>,
}

impl Columns {
    fn of(chunk: &Chunk, shape: &Shape) -> Self {
        // a token has more than three bytes, most often
        let tokens = || Vec::with_capacity(chunk.bytes().len() / 3);
        let mut columns = Self { ids: tokens(), ..Self::default() };
        if shape.task == Task::CausalLm {
            columns.labels = tokens();
        }
        columns
    }
}

fn signed(ids: &[u32]) -> impl Iterator<Item = i32> {
    ids.iter().map(|id| id.cast_signed())
}

impl Columns {
    fn push(&mut self, row: &Encoded, label: i32) -> Result<()> {
        self.ids.extend(signed(&row.input_ids));
        self.labels.extend_from_slice(&row.labels);
        self.types.extend(signed(&row.type_ids));
        self.ends.push(i32::try_from(self.ids.len()).context("a chunk has too many tokens")?);
        self.label.push(label);
        Ok(())
    }

    fn batch(self, shape: &Shape) -> Result<RecordBatch> {
        let ends = std::iter::once(0).chain(self.ends).collect::<ScalarBuffer<i32>>();
        let ends = OffsetBuffer::new(ends);
        let list = |values: Vec<i32>| -> Result<ArrayRef> {
            let values = Arc::new(Int32Array::from(values));
            Ok(Arc::new(ListArray::try_new(Arc::new(item()), ends.clone(), values, None)?))
        };
        let (mut ids, mut labels, mut types) =
            (Some(self.ids), Some(self.labels), Some(self.types));
        let mut label = Some(self.label);
        let columns = shape.schema.fields().iter().map(|field| match field.name().as_str() {
            "input_ids" => list(ids.take().unwrap_or_default()),
            "labels" => list(labels.take().unwrap_or_default()),
            "token_type_ids" => list(types.take().unwrap_or_default()),
            _ => Ok(Arc::new(Int32Array::from(label.take().unwrap_or_default())) as ArrayRef),
        });
        let columns = columns.collect::<Result<Vec<_>>>()?;
        Ok(RecordBatch::try_new(Arc::clone(&shape.schema), columns)?)
    }
}

/// Ids are packed into as many bits as a chunk's vocabulary needs; compression would take longer
/// than all the rest, and minima and maxima of ids tell nothing.
fn properties() -> WriterPropertiesBuilder {
    WriterProperties::builder()
        .set_created_by(CREATED_BY.to_owned())
        .set_compression(Compression::UNCOMPRESSED)
        .set_statistics_enabled(EnabledStatistics::None)
        .set_offset_index_disabled(true)
        .set_max_row_group_row_count(None)
}

/// Encodes rows. `plain` is the encoder that some rows are checked with.
///
/// # Errors
/// When a row fails, or the two encoders differ; the message has its number in the file, from 1.
pub(super) fn pack(
    chunk: &Chunk,
    encoder: &Encoder,
    plain: Option<&Encoder>,
    shape: &Shape,
) -> Result<Vec<u8>> {
    let (mut columns, mut made) = (Columns::of(chunk, shape), Tokenized::default());
    let bos = encoder.tokenizer().bos_id();
    for (at, mut row) in chunk.rows().enumerate() {
        let number = chunk.first + at as u64;
        let named = || format!("row {}", number + 1);
        let label = if shape.labelled { row.label()? } else { 0 };
        let texts = Texts::read(&mut row, shape)?;
        let encoded = texts.encode(encoder).with_context(named)?;
        if let (0, Some(plain)) = (number % AUDIT, plain)
            && texts.encode(plain).with_context(named)? != encoded
        {
            let what = "the fast path of the tokenizer gives other tokens than `tokenizers` does";
            let help = "this is a bug in flow, not in the data; please report it with this row";
            return Err(anyhow::Error::from(Fault::new(what).help(help)).context(named()));
        }
        match encoded {
            Row::Kept(row) => {
                made.count(&row);
                made.without_bos +=
                    u64::from(bos.is_some() && row.input_ids.first().copied() != bos);
                columns.push(&row, label)?;
            }
            Row::TooLong(_) => made.too_long += 1,
            Row::NoTarget => made.no_target += 1,
            Row::SecondBos(part) => *made.second_bos.entry(part.name().into()).or_default() += 1,
        }
    }
    let batch = columns.batch(shape)?;
    let head = serde_json::to_vec(&made)?;
    let mut packed = Vec::with_capacity(head.len() + chunk.bytes().len() + 4096);
    packed.extend(u32::try_from(head.len())?.to_le_bytes());
    packed.extend(head);
    let mut writer = ArrowWriter::try_new(&mut packed, batch.schema(), Some(properties().build()))?;
    writer.write(&batch)?;
    writer.close()?;
    Ok(packed)
}

/// The text of a row.
enum Texts<'a> {
    Pieces(Vec<super::Piece>),
    Classified(&'a str, Option<&'a str>),
}

impl<'a> Texts<'a> {
    fn read(row: &mut RowReader<'a>, shape: &Shape) -> Result<Self> {
        Ok(match shape.task {
            Task::CausalLm => Self::Pieces(row.pieces()?),
            Task::SequenceClassification => {
                let text = row.text()?;
                Self::Classified(text, shape.pairs.then(|| row.text()).transpose()?)
            }
        })
    }

    fn encode(&self, encoder: &Encoder) -> Result<Row> {
        match self {
            Self::Pieces(pieces) => encoder.causal(pieces),
            Self::Classified(text, pair) => encoder.classification((text, *pair)),
        }
    }
}

/// Puts packed chunks together into one file, a row group each: its bytes depend on the rows and
/// on where they are cut alone.
pub(super) struct Assembly {
    writer: SerializedFileWriter<File>,
}

impl Assembly {
    pub(super) fn create(path: &Path, shape: &Shape) -> Result<Self> {
        let file = File::create(path).with_context(|| format!("writing {}", path.display()))?;
        let mut properties = properties().build();
        add_encoded_arrow_schema_to_metadata(&shape.schema, &mut properties);
        let schema = ArrowSchemaConverter::new().convert(&shape.schema)?;
        let (schema, properties) = (schema.root_schema_ptr(), Arc::new(properties));
        Ok(Self { writer: SerializedFileWriter::new(file, schema, properties)? })
    }

    /// Adds a chunk; returns what came of it, with its first `samples` rows as samples.
    pub(super) fn add(
        &mut self,
        packed: Vec<u8>,
        samples: usize,
        tokenizer: &Tokenizer,
    ) -> Result<Tokenized> {
        const CUT: &str = "a packed chunk is cut short";
        let packed = Bytes::from(packed);
        let (length, rest) = packed.split_first_chunk().context(CUT)?;
        let length = u32::from_le_bytes(*length) as usize;
        ensure!(length <= rest.len(), CUT);
        let mut made: Tokenized = serde_json::from_slice(&rest[..length]).context(CUT)?;
        let rows = packed.slice(4 + length..);
        let metadata = ParquetMetaDataReader::new().parse_and_finish(&rows)?;
        for group in metadata.row_groups() {
            let mut out = self.writer.next_row_group()?;
            for column in group.columns() {
                let close = ColumnCloseResult {
                    bytes_written: u64::try_from(column.compressed_size())?,
                    rows_written: u64::try_from(group.num_rows())?,
                    metadata: column.clone(),
                    bloom_filter: None,
                    column_index: None,
                    offset_index: None,
                };
                out.append_column(&rows, close)?;
            }
            out.close()?;
        }
        if samples > 0 {
            made.samples = first_rows(rows, samples, tokenizer)?;
        }
        Ok(made)
    }

    pub(super) fn finish(self) -> Result<()> {
        self.writer.close()?;
        Ok(())
    }
}

/// The first rows of packed ones, for people.
fn first_rows(rows: Bytes, count: usize, tokenizer: &Tokenizer) -> Result<Vec<TokenSample>> {
    let reader = ParquetRecordBatchReaderBuilder::try_new(rows)?.with_batch_size(count).build()?;
    let mut samples = Vec::new();
    for batch in reader.take(1) {
        let batch = batch?;
        let numbers = |array: &ArrayRef| array.as_primitive::<Int32Type>().values().to_vec();
        let list = |name: &str, row: usize| {
            let column = batch.column_by_name(name).map(|c| c.as_list::<i32>().value(row));
            column.map(|values| numbers(&values)).unwrap_or_default()
        };
        let label = batch.column_by_name("label").map(numbers);
        samples.extend((0..batch.num_rows()).map(|row| {
            TokenSample {
                tokens: list("input_ids", row)
                    .into_iter()
                    .map(|id| tokenizer.token(id.cast_unsigned()))
                    .collect(),
                target: list("labels", row).into_iter().map(|label| label >= 0).collect(),
                label: label.as_ref().map(|label| label[row]),
            }
        }));
    }
    Ok(samples)
}

#[cfg(test)]
mod tests {
    use super::super::chunk::Splitter;
    use super::super::encode::{Limits, TooLong, Truncate};
    use super::super::{Algorithm, TokenizerSource, TokenizerSpec, train_tokenizer};
    use super::*;

    fn encoder(max_length: usize) -> Encoder {
        let dir = tempfile::tempdir().unwrap();
        let spec = TokenizerSpec {
            algorithm: Algorithm::Bpe,
            vocab_size: 300,
            min_frequency: 2,
            max_length: 64,
            chat_template: None,
        };
        train_tokenizer(&spec, |take| take("some words, some more words"), dir.path()).unwrap();
        let tokenizer = dir.path().join("tokenizer.json");
        let config = Some(dir.path().join("tokenizer_config.json"));
        let source = TokenizerSource { tokenizer, config, ..Default::default() };
        let limits = Limits {
            max_length,
            truncate: Some(Truncate::Right),
            on_too_long: TooLong::Drop,
            append_eos: false,
            special_tokens: false,
        };
        Encoder::new(Tokenizer::load(&source).unwrap(), limits).unwrap()
    }

    #[test]
    fn one_row_in_a_thousand_is_checked() {
        let mut splitter = Splitter::new(1 << 30);
        for row in 0..2500 {
            let long = if row == 999 || row == 2000 { "a longer row" } else { "row" };
            splitter.push(|to| to.text(long)).unwrap();
        }
        let chunk = splitter.finish().unwrap();
        let shape = Shape::new(Task::SequenceClassification, false, false);
        // the other one cuts long rows off: of the two it is told the one that is checked
        let (whole, short) = (encoder(64), encoder(4));
        assert!(pack(&chunk, &whole, None, &shape).is_ok());
        assert!(pack(&chunk, &whole, Some(&whole.plain()), &shape).is_ok());
        let error = pack(&chunk, &whole, Some(&short), &shape).unwrap_err();
        let said = format!("{error:#}");
        assert!(said.starts_with("row 2001: the fast path"), "{said}");
    }
}

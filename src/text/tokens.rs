//! From rendered rows in Parquet to token ids in Parquet.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use arrow::array::{AsArray, Int32Array, ListArray, RecordBatch, StringArray};
use arrow::datatypes::Int32Type;
use serde::{Deserialize, Serialize};

use super::chunk::{Chunk, Splitter};
use super::columns::read_within;
use super::encode::{Encoded, Encoder};
use super::pack::{Assembly, Shape, pack};
use super::piece::Part;
use super::tokenizer::Tokenizer;
use crate::digest::Digest;

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
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
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
    pub second_bos: BTreeMap<String, u64>,
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
    #[serde(skip)]
    pub samples: Vec<TokenSample>,
    /// Chunks of rows.
    #[serde(skip)]
    pub chunks: u64,
    /// Of these, chunks that were not kept from before.
    #[serde(skip)]
    pub encoded: u64,
}

/// Looks a packed chunk up by its key, or makes it.
pub type Keep<'a> =
    dyn Fn(&Digest, &mut dyn FnMut() -> Result<Vec<u8>>) -> Result<Vec<u8>> + Sync + 'a;

/// Where chunks of encoded rows are kept.
pub struct Chunks<'a> {
    /// All that decides, beside the rows, what becomes of them: tokenizer, limits, versions.
    pub salt: Digest,
    /// The place.
    pub keep: &'a Keep<'a>,
}

impl Chunks<'_> {
    /// Nowhere.
    pub fn none() -> Self {
        Self { salt: Digest::of(b""), keep: &|_, make| make() }
    }

    fn key(&self, chunk: &Chunk, shape: &Shape) -> Digest {
        const FORMAT: &[u8] = b"flow/tokens/chunk/v1";
        let (task, labelled, pairs) = (shape.task, shape.labelled, shape.pairs);
        let mut named = FORMAT.to_vec();
        named.extend(self.salt.as_bytes());
        named.extend([task as u8, labelled.into(), pairs.into()]);
        named.extend(Digest::of(chunk.bytes()).as_bytes());
        // the pieces of two rows may be those of one
        named.extend(Digest::of(&chunk.ends()).as_bytes());
        Digest::of(&named)
    }
}

impl std::fmt::Debug for Chunks<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Chunks").field("salt", &self.salt).finish_non_exhaustive()
    }
}

/// Encodes a file of rendered rows into a file of token ids, chunks of rows in parallel on the
/// threads of the current pool, their order kept. `progress` gets rows done and rows in all.
///
/// Few chunks are in memory at once, whatever the size of the file, and the bytes of the result
/// do not depend on the number of threads or on what was kept.
///
/// # Errors
/// When a row fails (the message has its number, from 1) or the disk refuses.
pub fn tokenize_file(
    input: &Path,
    output: &Path,
    encoder: &Encoder,
    task: Task,
    chunks: &Chunks<'_>,
    progress: &mut dyn FnMut(u64, u64) -> Result<()>,
) -> Result<Tokenized> {
    /// Bytes of rows that are decoded at once.
    const DECODED: u64 = 4 << 20;
    let (size, reader) = read_within(input, DECODED)?;
    let schema = arrow::array::RecordBatchReader::schema(&reader);
    let has = |name: &str| schema.fields().iter().any(|field| field.name() == name);
    let shape = Shape::new(task, has("label"), has("text_pair"));
    let mut out = Collected {
        assembly: Assembly::create(output, &shape)?,
        tokenizer: encoder.tokenizer(),
        made: Tokenized::default(),
        done: 0,
        total: size.rows,
        progress,
    };
    let plain = encoder.tokenizer().is_fast().then(|| encoder.plain());
    let (stopped, encoded) = (AtomicBool::new(false), AtomicU64::new(0));
    let work = |chunk: &Chunk| {
        let mut make = || {
            encoded.fetch_add(1, Ordering::Relaxed);
            pack(chunk, encoder, plain.as_ref(), &shape)
        };
        (chunks.keep)(&chunks.key(chunk, &shape), &mut make)
    };
    let ahead = 2 * rayon::current_num_threads() + 2;
    rayon::in_place_scope_fifo(|scope| {
        let mut queue = VecDeque::new();
        let mut start = |chunk: Chunk, out: &mut Collected<'_>| {
            let (send, receive) = channel();
            let (work, stopped, rows) = (&work, &stopped, chunk.len() as u64);
            scope.spawn_fifo(move |_| {
                if !stopped.load(Ordering::Relaxed) {
                    // nobody waits for it any more once another one has failed
                    let _ = send.send(work(&chunk));
                }
            });
            queue.push_back((rows, receive));
            if queue.len() < ahead { Ok(()) } else { out.take(queue.pop_front()) }
        };
        let all = || -> Result<()> {
            let mut splitter = Splitter::new(size.bytes);
            for batch in reader {
                let batch = Batch::of(&batch?, &shape)?;
                for row in 0..batch.rows {
                    let ended = splitter.push(|to| batch.write(row, to))?;
                    ended.map_or(Ok(()), |chunk| start(chunk, &mut out))?;
                }
            }
            splitter.finish().map_or(Ok(()), |chunk| start(chunk, &mut out))
        };
        // of several faults the first in the file is told, whatever the threads
        let mut ended = all();
        while let (Ok(()), Some(next)) = (&ended, queue.pop_front()) {
            ended = out.take(Some(next));
        }
        stopped.store(true, Ordering::Relaxed);
        ended
    })?;
    let Collected { assembly, mut made, .. } = out;
    assembly.finish()?;
    made.encoded = encoded.into_inner();
    Ok(made)
}

/// Chunks that are done, in order.
struct Collected<'a> {
    assembly: Assembly,
    tokenizer: &'a Tokenizer,
    made: Tokenized,
    done: u64,
    total: u64,
    progress: &'a mut dyn FnMut(u64, u64) -> Result<()>,
}

type Waiting = (u64, Receiver<Result<Vec<u8>>>);

impl Collected<'_> {
    /// Waits for the next chunk and adds it.
    fn take(&mut self, next: Option<Waiting>) -> Result<()> {
        let Some((rows, receive)) = next else { return Ok(()) };
        let packed = loop {
            match receive.try_recv() {
                Ok(packed) => break packed?,
                Err(TryRecvError::Disconnected) => bail!("encoding a chunk of rows panicked"),
                Err(TryRecvError::Empty) => {}
            }
            // This thread may be one of the pool, or the only one: it does its share.
            if rayon::yield_now() != Some(rayon::Yield::Executed)
                && let Ok(packed) = receive.recv_timeout(Duration::from_millis(1))
            {
                break packed?;
            }
        };
        let samples = 3 - self.made.samples.len().min(3);
        self.made.add(self.assembly.add(packed, samples, self.tokenizer)?);
        self.done += rows;
        (self.progress)(self.done, self.total)
    }
}

/// Rows of a batch, their columns found.
struct Batch {
    rows: usize,
    label: Option<Int32Array>,
    texts: Vec<StringArray>,
    pieces: Option<(ListArray, StringArray, StringArray)>,
}

impl Batch {
    fn of(batch: &RecordBatch, shape: &Shape) -> Result<Self> {
        let column = |name: &str| {
            let column = batch.column_by_name(name);
            column.with_context(|| format!("rendered rows have no column `{name}`"))
        };
        let text = |name: &str| -> Result<StringArray> {
            let texts = column(name)?.as_string_opt::<i32>();
            Ok(texts.with_context(|| format!("column `{name}` does not hold text"))?.clone())
        };
        let label = shape.labelled.then(|| {
            let labels = column("label")?.as_primitive_opt::<Int32Type>();
            Ok(labels.context("column `label` does not hold int32")?.clone())
        });
        let mut found = Self {
            rows: batch.num_rows(),
            label: label.transpose().map_err(|e: anyhow::Error| e)?,
            texts: Vec::new(),
            pieces: None,
        };
        match shape.task {
            Task::CausalLm => {
                let form = "column `segments` is not a list of (kind, text)";
                let list = column("segments")?.as_list_opt::<i32>().context(form)?;
                let items = list.values().as_struct_opt().context(form)?;
                let field = |name: &str| items.column_by_name(name)?.as_string_opt::<i32>();
                let (kinds, texts) = (field("kind").context(form)?, field("text").context(form)?);
                found.pieces = Some((list.clone(), kinds.clone(), texts.clone()));
            }
            Task::SequenceClassification => {
                found.texts.push(text("text")?);
                if shape.pairs {
                    found.texts.push(text("text_pair")?);
                }
            }
        }
        Ok(found)
    }

    fn write(&self, row: usize, to: &mut super::chunk::RowWriter<'_>) -> Result<()> {
        if let Some(labels) = &self.label {
            to.label(labels.value(row));
        }
        for texts in &self.texts {
            to.text(texts.value(row))?;
        }
        if let Some((list, kinds, texts)) = &self.pieces {
            let ends = list.value_offsets();
            for at in usize::try_from(ends[row])?..usize::try_from(ends[row + 1])? {
                let kind = kinds.value(at);
                let part = Part::of_name(kind);
                let part = part.with_context(|| format!("`{kind}` is no kind of segment"))?;
                to.piece(part, texts.value(at))?;
            }
        }
        Ok(())
    }
}

impl Tokenized {
    /// Rows left out, for whatever reason.
    pub fn left_out(&self) -> u64 {
        self.too_long + self.no_target + self.second_bos.values().sum::<u64>()
    }

    /// Adds what came of the rows that follow.
    fn add(&mut self, next: Self) {
        self.rows += next.rows;
        self.truncated += next.truncated;
        self.too_long += next.too_long;
        self.no_target += next.no_target;
        for (part, rows) in next.second_bos {
            *self.second_bos.entry(part).or_default() += rows;
        }
        self.without_bos += next.without_bos;
        self.ends.extend(next.ends);
        self.tokens += next.tokens;
        self.target_tokens += next.target_tokens;
        self.longest = self.longest.max(next.longest);
        self.samples.extend(next.samples);
        self.chunks += 1;
    }

    pub(super) fn count(&mut self, row: &Encoded) {
        let learnt = row.labels.iter().filter(|l| **l >= 0).count();
        self.rows += 1;
        self.truncated += u64::from(row.truncated);
        self.tokens += row.input_ids.len() as u64;
        self.target_tokens += learnt as u64;
        self.longest = self.longest.max(row.positions as u64);
        self.ends.extend(row.end);
    }
}

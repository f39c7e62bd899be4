//! Templates, tokenization, and the kinds on them.
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod chunks;
mod encoding;
mod fast;
mod references;
mod seams;
mod step_kinds;
mod templates;
mod training;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{ArrayRef, Int64Array, RecordBatch, StringArray};
use flow::text::{
    Algorithm, Encoder, Limits, Tokenizer, TokenizerSource, TokenizerSpec, TooLong, Truncate,
    train_tokenizer,
};
use parquet::arrow::ArrowWriter;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/text").join(name)
}

/// Enough text for a vocabulary with whole words in it.
fn corpus() -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/reviews/corpus.txt");
    std::fs::read_to_string(path).unwrap().lines().take(400).map(str::to_owned).collect()
}

fn spec(algorithm: Algorithm, vocab_size: usize) -> TokenizerSpec {
    TokenizerSpec { algorithm, vocab_size, min_frequency: 2, max_length: 512, chat_template: None }
}

fn train_into(dir: &Path, spec: &TokenizerSpec) -> usize {
    let texts = corpus();
    train_tokenizer(spec, |take| texts.iter().try_for_each(|text| take(text)), dir).unwrap()
}

fn load(dir: &Path) -> Tokenizer {
    let config = dir.join("tokenizer_config.json");
    Tokenizer::load(&TokenizerSource {
        tokenizer: dir.join("tokenizer.json"),
        config: config.exists().then_some(config),
        ..TokenizerSource::default()
    })
    .unwrap()
}

fn tokenizer(algorithm: Algorithm) -> Tokenizer {
    let dir = tempfile::tempdir().unwrap();
    train_into(dir.path(), &spec(algorithm, 600));
    load(dir.path())
}

fn limits(max_length: usize, truncate: Truncate) -> Limits {
    Limits {
        max_length,
        truncate: Some(truncate),
        on_too_long: TooLong::Drop,
        append_eos: true,
        special_tokens: false,
    }
}

fn encoder(max_length: usize, truncate: Truncate) -> Encoder {
    Encoder::new(tokenizer(Algorithm::Bpe), limits(max_length, truncate)).unwrap()
}

/// A Parquet file of text columns and one column of whole numbers.
fn parquet(path: &Path, texts: &[(&str, Vec<&str>)], label: Option<(&str, Vec<i64>)>) {
    let mut columns: Vec<(&str, ArrayRef)> = Vec::new();
    for (name, values) in texts {
        columns.push((*name, Arc::new(StringArray::from(values.clone()))));
    }
    if let Some((name, values)) = label {
        columns.push((name, Arc::new(Int64Array::from(values))));
    }
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    let file = std::fs::File::create(path).unwrap();
    let mut writer = ArrowWriter::try_new(file, batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

/// The error with all its causes.
fn chain(e: &anyhow::Error) -> String {
    format!("{e:#}; {}", flow::source::advice(e).join("; "))
}

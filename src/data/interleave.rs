//! Several datasets as one: one after the other, or mixed.

use std::path::PathBuf;

use anyhow::Result;
use arrow::array::RecordBatch;
use arrow::compute::{cast, concat_batches, interleave_record_batch};
use arrow::datatypes::SchemaRef;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::table::BATCH;
use super::{RowStream, RowWriter};

/// How datasets come together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum How {
    /// One after the other.
    #[default]
    Concatenate,
    /// Row by row, in turn or by chance.
    Interleave,
}

/// When mixing ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Stop {
    /// When the first dataset has no more rows.
    #[default]
    First,
    /// When every dataset has had all of its rows; those that end earlier begin again.
    All,
}

/// How rows are mixed.
#[derive(Debug, Clone, PartialEq)]
pub struct Mix {
    /// Share of each dataset; in turn if there are none.
    pub probabilities: Option<Vec<f64>>,
    /// Seed of the choice.
    pub seed: u64,
    /// When it ends.
    pub stop: Stop,
}

impl Mix {
    /// The dataset of a row: counted from the seed and the row alone, so that it depends on
    /// nothing else.
    fn source(&self, key: &[u8; 32], row: u64, sources: usize) -> usize {
        let Some(probabilities) = &self.probabilities else {
            return usize::try_from(row % sources as u64).unwrap_or(0);
        };
        let hash = blake3::keyed_hash(key, &row.to_le_bytes());
        let mut word = [0; 8];
        word.copy_from_slice(&hash.as_bytes()[..8]);
        // 53 bits, as many as a double holds.
        let point = (u64::from_le_bytes(word) >> 11) as f64 / (1u64 << 53) as f64;
        let point = point * probabilities.iter().sum::<f64>();
        let mut below = 0.0;
        for (at, share) in probabilities.iter().enumerate() {
            below += share;
            if point < below {
                return at;
            }
        }
        // Only rounding leads here: the last one that has a share.
        probabilities.iter().rposition(|p| *p > 0.0).unwrap_or(0)
    }
}

struct Source {
    path: PathBuf,
    rows: RowStream,
    /// Rows taken since it began.
    taken: u64,
    /// Whether it has ended once.
    ended: bool,
}

/// Mixes the rows of some files of the same columns into a writer; `split` is part of the seed.
///
/// # Errors
/// When a file cannot be read, or the disk refuses.
pub fn interleave(
    paths: &[PathBuf],
    split: &str,
    mix: &Mix,
    writer: &mut RowWriter,
    stop: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<()> {
    let mut key = blake3::Hasher::new_derive_key("flow interleave v1");
    key.update(&mix.seed.to_le_bytes());
    key.update(split.as_bytes());
    let key = *key.finalize().as_bytes();
    let open = |path: &PathBuf| {
        let rows = RowStream::open(path, None)?;
        Ok(Source { path: path.clone(), rows, taken: 0, ended: false })
    };
    let mut sources = paths.iter().map(open).collect::<Result<Vec<_>>>()?;
    // A dataset without rows has had all of them, and can end nothing but `first`.
    if sources.iter().any(|s| s.rows.rows() == 0) && mix.stop == Stop::First {
        return Ok(());
    }
    sources.iter_mut().for_each(|s| s.ended = s.rows.rows() == 0);
    let chosen = |at: usize| mix.probabilities.as_ref().is_none_or(|p| p[at] > 0.0);
    let mut row = 0;
    let mut done = sources.iter().all(|s| s.ended);
    while !done {
        // Which source each of the next rows is of, and the how manieth of what is taken of it.
        let mut places: Vec<(usize, usize)> = Vec::with_capacity(BATCH);
        let mut parts: Vec<Vec<RecordBatch>> = sources.iter().map(|_| Vec::new()).collect();
        let mut counts = vec![0; sources.len()];
        let mut pending = vec![0; sources.len()];
        while places.len() < BATCH && !done {
            let at = mix.source(&key, row, sources.len());
            row += 1;
            let source = &mut sources[at];
            if source.rows.rows() == 0 {
                continue;
            }
            places.push((at, counts[at]));
            counts[at] += 1;
            pending[at] += 1;
            source.taken += 1;
            if source.taken == source.rows.rows() {
                parts[at].push(source.rows.next_rows(pending[at])?);
                pending[at] = 0;
                source.rows = RowStream::open(&source.path, None)?;
                (source.taken, source.ended) = (0, true);
            }
            // In turn, every dataset gives a row of the last round.
            if mix.probabilities.is_some() || row.is_multiple_of(sources.len() as u64) {
                let mut wanted = sources.iter().enumerate().filter(|(at, _)| chosen(*at));
                done = match mix.stop {
                    Stop::First => wanted.any(|(_, s)| s.ended),
                    Stop::All => wanted.all(|(_, s)| s.ended),
                };
            }
        }
        for (at, source) in sources.iter_mut().enumerate() {
            parts[at].push(source.rows.next_rows(pending[at])?);
        }
        let schema = SchemaRef::clone(writer.schema());
        let joined = parts.iter().map(|parts| {
            let typed =
                parts.iter().map(|part| typed(part, &schema)).collect::<Result<Vec<_>>>()?;
            Ok(concat_batches(&schema, &typed)?)
        });
        let joined = joined.collect::<Result<Vec<RecordBatch>>>()?;
        let joined: Vec<&RecordBatch> = joined.iter().collect();
        writer.write(&interleave_record_batch(&joined, &places)?)?;
        stop(row)?;
    }
    Ok(())
}

/// A batch with the columns of a schema, in its order and of its types.
///
/// # Errors
/// When it lacks one, or one cannot be converted.
pub fn typed(batch: &RecordBatch, schema: &SchemaRef) -> Result<RecordBatch> {
    let columns = schema.fields().iter().map(|field| {
        let at = batch.schema().index_of(field.name())?;
        Ok(cast(batch.column(at), field.data_type())?)
    });
    let columns = columns.collect::<Result<Vec<_>>>()?;
    Ok(RecordBatch::try_new(SchemaRef::clone(schema), columns)?)
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use arrow::array::{ArrayRef, AsArray as _, Int64Array};
    use arrow::datatypes::Int64Type;

    use super::*;
    use crate::data::{Table, write};

    fn file(dir: &Path, name: &str, values: std::ops::Range<i64>) -> PathBuf {
        let column: ArrayRef = Arc::new(Int64Array::from_iter_values(values));
        let path = dir.join(name);
        write(&Table::of_columns([("n".to_owned(), column)]).unwrap(), &path).unwrap();
        path
    }

    fn mixed(lengths: &[i64], mix: &Mix) -> Vec<i64> {
        let dir = tempfile::tempdir().unwrap();
        let named = lengths.iter().enumerate();
        let paths: Vec<PathBuf> = named
            .map(|(i, n)| {
                file(dir.path(), &i.to_string(), i as i64 * 100_000..i as i64 * 100_000 + n)
            })
            .collect();
        let out = dir.path().join("out");
        let schema = Arc::clone(RowStream::open(&paths[0], None).unwrap().schema());
        let mut writer = RowWriter::create(&out, schema).unwrap();
        interleave(&paths, "train", mix, &mut writer, &mut |_| Ok(())).unwrap();
        writer.finish().unwrap();
        let rows = RowStream::open(&out, None).unwrap();
        rows.flat_map(|b| b.unwrap().column(0).as_primitive::<Int64Type>().values().to_vec())
            .collect()
    }

    #[test]
    fn in_turn_until_the_first_or_the_last_ends() {
        let mut mix = Mix { probabilities: None, seed: 0, stop: Stop::First };
        // As `datasets` does: the round is finished.
        assert_eq!(mixed(&[3, 2], &mix), [0, 100_000, 1, 100_001]);
        assert_eq!(mixed(&[1, 3], &mix), [0, 100_000]);
        mix.stop = Stop::All;
        assert_eq!(mixed(&[3, 2], &mix), [0, 100_000, 1, 100_001, 2, 100_000]);
        assert_eq!(mixed(&[1, 3], &mix), [0, 100_000, 0, 100_001, 0, 100_002]);
        assert_eq!(mixed(&[0, 2], &mix), [100_000, 100_001]);
        mix.stop = Stop::First;
        assert_eq!(mixed(&[0, 2], &mix), [0; 0]);
    }

    #[test]
    fn by_chance_with_the_shares_that_are_asked_for() {
        let mix = |seed| Mix { probabilities: Some(vec![0.8, 0.2]), seed, stop: Stop::All };
        let rows = mixed(&[9000, 3000], &mix(7));
        let second = rows.iter().filter(|n| **n >= 100_000).count() as f64 / rows.len() as f64;
        assert!((second - 0.2).abs() < 0.02, "{second}");
        // Each source comes in its own order, and again from its start.
        let first: Vec<i64> = rows.iter().copied().filter(|n| *n < 100_000).collect();
        assert!(first.len() > 9000);
        assert!(first.iter().enumerate().all(|(i, n)| *n == i as i64 % 9000));
        assert_eq!(rows, mixed(&[9000, 3000], &mix(7)));
        assert_ne!(rows[..50], mixed(&[9000, 3000], &mix(8))[..50]);
        let none = Mix { probabilities: Some(vec![1.0, 0.0]), seed: 1, stop: Stop::All };
        assert_eq!(mixed(&[4, 2], &none), [0, 1, 2, 3]);
    }
}

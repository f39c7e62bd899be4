//! Some rows of a Parquet file in another order, in bounded memory.
//!
//! Rows that fit are picked in one pass and put in order. Of more, the new order is cut into
//! stretches that fit; one pass over the file hands every row to the scratch file of its stretch,
//! and each stretch is put in order by itself.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result};
use arrow::array::{RecordBatch, UInt32Array};
use arrow::compute::{interleave_record_batch, take_record_batch};
use parquet::arrow::ArrowWriter;
use parquet::file::properties::WriterProperties;

use super::table::BATCH;
use super::{RowStream, RowWriter};

/// Bytes of rows that are held at once.
pub const BUDGET: u64 = 64 << 20;

/// Bytes of a scratch file that are held before they are written, at most and at least.
const HELD: std::ops::Range<u64> = 1 << 16..1 << 20;

/// Where rows go: their number, and their place.
type Places = Vec<(u64, u64)>;

/// Writes rows of a file in the order in which `rows` names them. `scratch` is a folder for files
/// that are needed on the way, `budget` the bytes that may be held.
///
/// # Errors
/// When there is no such row, or the disk refuses.
pub fn gather(
    path: &Path,
    rows: &[u64],
    writer: &mut RowWriter,
    scratch: &Path,
    budget: u64,
    stop: &mut dyn FnMut() -> Result<()>,
) -> Result<()> {
    let stream = RowStream::open(path, None)?;
    anyhow::ensure!(rows.iter().all(|row| *row < stream.rows()), "no such row");
    let mut places: Places = rows.iter().copied().zip(0..).collect();
    places.sort_unstable();
    if places.iter().zip(0..).all(|((_, place), at)| *place == at) {
        return each(stream, &places, stop, &mut |batch, _| writer.write(&batch));
    }
    let bytes = stream.bytes_of_a_row() * rows.len() as u64;
    let stretches = bytes.div_ceil(budget.max(1)).max(1);
    if stretches == 1 {
        return in_order(stream, &places, writer, stop);
    }
    let stretch = (rows.len() as u64).div_ceil(stretches);
    let held = (budget / stretches).clamp(HELD.start, HELD.end);
    let mut files: Vec<Scratch> = (0..stretches)
        .map(|i| Scratch::create(scratch.join(format!("stretch-{i}")), &stream, held))
        .collect::<Result<_>>()?;
    let mut inner: Vec<Vec<u64>> = files.iter().map(|_| Vec::new()).collect();
    each(stream, &places, stop, &mut |batch, places| {
        let mut by_file: Vec<Vec<u32>> = vec![Vec::new(); files.len()];
        for (at, place) in places.iter().enumerate() {
            let file = usize::try_from(place / stretch)?;
            by_file[file].push(u32::try_from(at)?);
            inner[file].push(place % stretch);
        }
        for (file, rows) in files.iter_mut().zip(by_file).filter(|(_, rows)| !rows.is_empty()) {
            file.write(&take_record_batch(&batch, &UInt32Array::from(rows))?)?;
        }
        Ok(())
    })?;
    for (file, inner) in files.into_iter().zip(inner) {
        let path = file.finish()?;
        let places: Places = (0..).zip(inner).collect();
        in_order(RowStream::open(&path, None)?, &places, writer, stop)?;
        std::fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))?;
    }
    Ok(())
}

/// Hands out the rows that are asked for, in the file's order, with their places. `places` are
/// sorted by row.
fn each(
    stream: RowStream,
    places: &Places,
    stop: &mut dyn FnMut() -> Result<()>,
    take: &mut dyn FnMut(RecordBatch, &[u64]) -> Result<()>,
) -> Result<()> {
    let (mut from, mut at) = (0, 0);
    for batch in stream {
        let batch = batch?;
        let end = from + batch.num_rows() as u64;
        let (mut rows, mut to) = (Vec::new(), Vec::new());
        while let Some((row, place)) = places.get(at).filter(|(row, _)| *row < end) {
            rows.push(u32::try_from(row - from)?);
            to.push(*place);
            at += 1;
        }
        if rows.len() == batch.num_rows() {
            take(batch, &to)?;
        } else if !rows.is_empty() {
            take(take_record_batch(&batch, &UInt32Array::from(rows))?, &to)?;
        }
        stop()?;
        from = end;
    }
    Ok(())
}

/// Rows that fit into memory.
fn in_order(
    stream: RowStream,
    places: &Places,
    writer: &mut RowWriter,
    stop: &mut dyn FnMut() -> Result<()>,
) -> Result<()> {
    let mut held: Vec<RecordBatch> = Vec::new();
    let mut order = vec![(0, 0); places.len()];
    each(stream, places, stop, &mut |batch, to| {
        for (at, place) in to.iter().enumerate() {
            order[usize::try_from(*place)?] = (held.len(), at);
        }
        held.push(batch);
        Ok(())
    })?;
    let held: Vec<&RecordBatch> = held.iter().collect();
    for chunk in order.chunks(BATCH) {
        writer.write(&interleave_record_batch(&held, chunk)?)?;
    }
    Ok(())
}

/// A file that is read once more and then gone.
struct Scratch {
    path: PathBuf,
    inner: ArrowWriter<File>,
    held: u64,
}

impl Scratch {
    fn create(path: PathBuf, of: &RowStream, held: u64) -> Result<Self> {
        let properties = WriterProperties::builder().set_dictionary_enabled(false).build();
        let file = File::create(&path).with_context(|| format!("writing {}", path.display()))?;
        let inner = ArrowWriter::try_new(file, Arc::clone(of.schema()), Some(properties))?;
        Ok(Self { path, inner, held })
    }

    fn write(&mut self, batch: &RecordBatch) -> Result<()> {
        self.inner.write(batch)?;
        if self.inner.in_progress_size() as u64 > self.held {
            self.inner.flush()?;
        }
        Ok(())
    }

    fn finish(self) -> Result<PathBuf> {
        self.inner.close()?;
        Ok(self.path)
    }
}

#[cfg(test)]
mod tests {
    use arrow::array::{ArrayRef, AsArray as _, Int64Array, StringArray};
    use arrow::datatypes::Int64Type;

    use super::*;
    use crate::data::{Table, write};

    #[test]
    fn any_budget_gives_the_same_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let n = 10_000u64;
        let number: ArrayRef = Arc::new(Int64Array::from_iter_values(0..n as i64));
        let text = (0..n).map(|i| format!("row {i} {}", "x".repeat((i % 90) as usize)));
        let text: ArrayRef = Arc::new(StringArray::from_iter_values(text));
        let columns = [("n".to_owned(), number), ("t".to_owned(), text)];
        let path = dir.path().join("in");
        write(&Table::of_columns(columns).unwrap(), &path).unwrap();
        let mut order: Vec<u64> = (0..n).map(|i| (i * 7919) % n).collect();
        let mut made = Vec::new();
        for (name, budget) in [("all", u64::MAX), ("some", 200_000), ("few", 20_000)] {
            let out = dir.path().join(name);
            let schema = Arc::clone(RowStream::open(&path, None).unwrap().schema());
            let mut writer = RowWriter::create(&out, schema).unwrap();
            gather(&path, &order, &mut writer, dir.path(), budget, &mut || Ok(())).unwrap();
            assert_eq!(writer.finish().unwrap(), n);
            made.push(std::fs::read(out).unwrap());
        }
        assert!(made[0] == made[1] && made[1] == made[2]);
        let rows = RowStream::open(&dir.path().join("few"), None).unwrap();
        let got: Vec<i64> = rows
            .flat_map(|b| b.unwrap().column(0).as_primitive::<Int64Type>().values().to_vec())
            .collect();
        assert!(got.iter().zip(&order).all(|(got, wanted)| *got as u64 == *wanted));
        assert!(!dir.path().join("stretch-0").exists());
        order[0] = n;
        let schema = Arc::clone(RowStream::open(&path, None).unwrap().schema());
        let mut writer = RowWriter::create(&dir.path().join("bad"), schema).unwrap();
        assert!(gather(&path, &order, &mut writer, dir.path(), 9, &mut || Ok(())).is_err());
    }
}

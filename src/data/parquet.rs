//! Parquet in and out.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use arrow::array::RecordBatch;
use arrow::datatypes::Schema;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;
use serde_json::Value;

use super::table::BATCH;
use super::{Codec, RowWriter, Table, card};
use crate::source::Fault;

/// Rows of a row group: small enough to stream, large enough to pack well.
const ROW_GROUP: usize = 16 * BATCH;

/// A file that was opened once; a packed one lies unpacked in a temporary file.
pub(super) struct Opened {
    file: File,
    /// The columns, without rows.
    pub(super) head: Table,
    /// Places of the columns that are read.
    places: Option<Vec<usize>>,
}

/// Only `columns` are read from the disk, if all of them are there.
pub(super) fn open(path: &Path, codec: Codec, columns: Option<&[String]>) -> Result<Opened> {
    let file = match codec {
        Codec::Plain => File::open(path).with_context(|| format!("opening {}", path.display()))?,
        // Parquet is read from its end, so a packed file is unpacked first.
        Codec::Gzip | Codec::Zstd => {
            let mut whole = tempfile::tempfile()?;
            io::copy(&mut codec.open(path)?, &mut whole)?;
            whole
        }
    };
    undamaged(|| {
        let reader = ParquetRecordBatchReaderBuilder::try_new(file.try_clone()?)?;
        let notes = reader.metadata().file_metadata().key_value_metadata();
        let note = notes.into_iter().flatten().find(|kv| kv.key == "huggingface");
        let classes = note.and_then(|kv| kv.value.as_deref()).map(class_names);
        let mut schema = Schema::clone(reader.schema());
        let place = |name: &String| schema.index_of(name).ok();
        let places: Option<Vec<usize>> =
            columns.and_then(|names| names.iter().map(place).collect());
        let places = places.map(|mut places| {
            places.sort_unstable();
            places
        });
        if let Some(places) = &places {
            schema = schema.project(places)?;
        }
        let mut head = Table::new(&schema, Vec::new())?;
        head.classes = classes.unwrap_or_default();
        Ok(Opened { file, head, places })
    })
}

impl Opened {
    /// Hands out the rows in batches.
    pub(super) fn batches(&self, take: &mut dyn FnMut(RecordBatch) -> Result<()>) -> Result<()> {
        let mut reader = undamaged(|| {
            let mut reader = ParquetRecordBatchReaderBuilder::try_new(self.file.try_clone()?)?;
            if let Some(places) = &self.places {
                let mask = ProjectionMask::roots(reader.parquet_schema(), places.iter().copied());
                reader = reader.with_projection(mask);
            }
            Ok(reader.with_batch_size(BATCH).build()?)
        })?;
        while let Some(batch) = undamaged(|| Ok(reader.next().transpose()?))? {
            take(batch)?;
        }
        Ok(())
    }
}

/// On some damaged files the library panics, as on a length below zero.
fn undamaged<T>(read: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|_| {
        let help = "fetch or write it again";
        Err(Fault::new("the Parquet file is damaged").help(help).into())
    })
}

/// Class names in the note that the `datasets` library leaves in its Parquet files.
fn class_names(note: &str) -> BTreeMap<String, Vec<String>> {
    let note: Value = serde_json::from_str(note).unwrap_or_default();
    let features = note["info"]["features"].as_object().into_iter().flatten();
    let named = features.filter_map(|(column, feature)| {
        let names = card::names(&feature["names"])?;
        Some((column.clone(), names))
    });
    named.collect()
}

/// How rows are laid out in a file: no time and no machine is named, so that equal rows give equal
/// bytes.
pub(super) fn properties() -> Result<WriterProperties> {
    Ok(WriterProperties::builder()
        .set_created_by("flow".to_owned())
        .set_compression(Compression::ZSTD(ZstdLevel::try_new(1)?))
        .set_max_row_group_row_count(Some(ROW_GROUP))
        .build())
}

/// Writes a table as Parquet. Equal rows give equal bytes.
///
/// # Errors
/// When the disk refuses.
pub fn write(table: &Table, path: &Path) -> Result<()> {
    let mut writer = RowWriter::create(path, Arc::clone(&table.schema))?;
    for batch in &table.batches {
        writer.write(batch)?;
    }
    writer.finish().with_context(|| format!("writing {}", path.display()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_file_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.parquet");
        let sample = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/data/reviews.parquet");
        let good = std::fs::read(sample).unwrap();
        let mut refused = 0;
        // Where the metadata begin; at byte 381 stands a length, which is below zero then.
        for at in 270..800 {
            let mut bad = good.clone();
            bad[at] ^= 0x01;
            std::fs::write(&path, bad).unwrap();
            // Some damage cannot be seen; none may panic.
            let read = open(&path, Codec::Plain, None);
            refused += usize::from(read.and_then(|f| f.batches(&mut |_| Ok(()))).is_err());
        }
        assert!(refused > 0, "no damage was seen");
    }
}

//! Parquet in and out.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use arrow::datatypes::Schema;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::arrow::{ArrowWriter, ProjectionMask};
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;
use serde_json::Value;

use super::table::BATCH;
use super::{Codec, Table, card};
use crate::source::Fault;

/// Rows of a row group: small enough to stream, large enough to pack well.
const ROW_GROUP: usize = 16 * BATCH;

/// Only `columns` are read from the disk, if all of them are there.
pub(super) fn read(path: &Path, codec: Codec, columns: Option<&[String]>) -> Result<Table> {
    let file = match codec {
        Codec::Plain => File::open(path).with_context(|| format!("opening {}", path.display()))?,
        // Parquet is read from its end, so a packed file is unpacked first.
        Codec::Gzip | Codec::Zstd => {
            let mut whole = tempfile::tempfile()?;
            io::copy(&mut codec.open(path)?, &mut whole)?;
            whole
        }
    };
    // On some damaged files the library panics, as on a length below zero.
    catch_unwind(AssertUnwindSafe(|| read_file(file, columns))).unwrap_or_else(|_| {
        let help = "fetch or write it again";
        Err(Fault::new("the Parquet file is damaged").help(help).into())
    })
}

fn read_file(file: File, columns: Option<&[String]>) -> Result<Table> {
    let reader = ParquetRecordBatchReaderBuilder::try_new(file)?;
    let notes = reader.metadata().file_metadata().key_value_metadata();
    let note = notes.into_iter().flatten().find(|kv| kv.key == "huggingface");
    let classes = note.and_then(|kv| kv.value.as_deref()).map(class_names).unwrap_or_default();
    let mut schema = Schema::clone(reader.schema());
    let mut reader = reader.with_batch_size(BATCH);
    let place = |name: &String| schema.index_of(name).ok();
    let places: Option<Vec<usize>> = columns.and_then(|names| names.iter().map(place).collect());
    if let Some(mut places) = places {
        places.sort_unstable();
        let mask = ProjectionMask::roots(reader.parquet_schema(), places.iter().copied());
        reader = reader.with_projection(mask);
        schema = schema.project(&places)?;
    }
    let batches = reader.build()?.collect::<Result<Vec<_>, _>>()?;
    let mut table = Table::new(&schema, batches)?;
    table.classes = classes;
    Ok(table)
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

/// Writes a table as Parquet. Equal rows give equal bytes: batches are cut anew, and the file
/// names no time and no machine.
///
/// # Errors
/// When the disk refuses.
pub fn write(table: &Table, path: &Path) -> Result<()> {
    let canonical = table.batches.iter().rev().skip(1).all(|b| b.num_rows() == BATCH);
    let canonical = canonical && table.batches.last().is_none_or(|b| b.num_rows() <= BATCH);
    if !canonical {
        let rows: Vec<u64> = (0..table.rows() as u64).collect();
        return write(&table.take(&rows)?, path);
    }
    let properties = WriterProperties::builder()
        .set_created_by("flow".to_owned())
        .set_compression(Compression::ZSTD(ZstdLevel::try_new(1)?))
        .set_max_row_group_row_count(Some(ROW_GROUP))
        .build();
    let file = File::create(path).with_context(|| format!("writing {}", path.display()))?;
    let mut writer = ArrowWriter::try_new(file, Arc::clone(&table.schema), Some(properties))?;
    for batch in &table.batches {
        writer.write(batch)?;
    }
    writer.close().with_context(|| format!("writing {}", path.display()))?;
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
            refused += usize::from(read(&path, Codec::Plain, None).is_err());
        }
        assert!(refused > 0, "no damage was seen");
    }
}

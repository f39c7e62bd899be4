//! Splits of a dataset, written.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Result;
use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;

use crate::artifact::{Features, ROWS};
use crate::data::RowWriter;
use crate::step::Context;

/// Class names by column.
pub(super) type ClassNames = BTreeMap<String, Vec<String>>;

/// A split that is written batch by batch.
pub(super) struct SplitWriter {
    split: String,
    dir: PathBuf,
    rows: RowWriter,
}

impl SplitWriter {
    /// Begins the split's `data.parquet`.
    pub(super) fn create(cx: &Context<'_>, split: &str, schema: SchemaRef) -> Result<Self> {
        let dir = cx.out_dir(split)?;
        let rows = RowWriter::create(&dir.join(ROWS), schema)?;
        Ok(Self { split: split.to_owned(), dir, rows })
    }

    /// The Parquet file, for those who fill it.
    pub(super) fn rows(&mut self) -> &mut RowWriter {
        &mut self.rows
    }

    /// Adds rows.
    pub(super) fn write(&mut self, batch: &RecordBatch) -> Result<()> {
        self.rows.write(batch)
    }

    /// Ends it, with `features.json` beside it; the number of rows.
    pub(super) fn finish(self, cx: &mut Context<'_>, classes: &ClassNames) -> Result<u64> {
        let schema = SchemaRef::clone(self.rows.schema());
        let rows = self.rows.finish()?;
        let fields = schema.fields().iter();
        let features = Features {
            rows,
            columns: fields.map(|f| (f.name().clone(), f.data_type().to_string())).collect(),
            classes: classes.clone(),
        };
        cx.write_json(&self.dir, "features.json", &features)?;
        cx.fact(&format!("rows.{}", self.split), rows);
        Ok(rows)
    }
}

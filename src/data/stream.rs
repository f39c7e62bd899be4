//! Rows of Parquet files, batch by batch: what is in memory does not grow with the file.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use arrow::array::RecordBatch;
use arrow::compute::{cast, concat_batches};
use arrow::datatypes::{Schema, SchemaRef};
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};
use parquet::arrow::{ArrowWriter, ProjectionMask};

use super::parquet::properties;
use super::table::BATCH;
use crate::source::{Fault, suggest};

/// The rows of a split as it lies in the store.
pub struct RowStream {
    schema: SchemaRef,
    total: u64,
    bytes: u64,
    reader: ParquetRecordBatchReader,
    left: Option<RecordBatch>,
}

impl RowStream {
    /// Opens a Parquet file; `columns` are read in the file's order, all if none are named.
    ///
    /// # Errors
    /// When it cannot be read, or has no such column.
    pub fn open(path: &Path, columns: Option<&[&str]>) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
        let builder = ParquetRecordBatchReaderBuilder::try_new(file)?;
        let total = u64::try_from(builder.metadata().file_metadata().num_rows()).unwrap_or(0);
        let groups = builder.metadata().row_groups().iter();
        let bytes = groups.map(|group| u64::try_from(group.total_byte_size()).unwrap_or(0)).sum();
        let mut schema = Schema::clone(builder.schema());
        let mut builder = builder.with_batch_size(BATCH);
        if let Some(columns) = columns {
            let known: Vec<&str> = schema.fields().iter().map(|f| f.name().as_str()).collect();
            let mut places = Vec::with_capacity(columns.len());
            for column in columns {
                let place = known.iter().position(|k| k == column).ok_or_else(|| {
                    let help = suggest(column, &known).unwrap_or_default();
                    Fault::new(format!("there is no column `{column}`")).help(help)
                })?;
                places.push(place);
            }
            places.sort_unstable();
            places.dedup();
            let mask = ProjectionMask::roots(builder.parquet_schema(), places.iter().copied());
            builder = builder.with_projection(mask);
            schema = schema.project(&places)?;
        }
        let fields: Vec<_> = schema.fields().iter().cloned().collect();
        // The writer's own note about types is not part of the rows.
        let schema = Arc::new(Schema::new(fields));
        Ok(Self { schema, total, bytes, reader: builder.build()?, left: None })
    }

    /// Its columns.
    pub fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    /// Number of rows.
    pub fn rows(&self) -> u64 {
        self.total
    }

    /// Bytes that a row takes on the average, as the file says.
    pub fn bytes_of_a_row(&self) -> u64 {
        self.bytes.div_ceil(self.total.max(1))
    }

    /// The next `n` rows as one batch; fewer at the end, none behind it.
    ///
    /// # Errors
    /// When the file is damaged.
    pub fn next_rows(&mut self, n: usize) -> Result<RecordBatch> {
        let (mut parts, mut have) = (Vec::new(), 0);
        while have < n {
            let Some(batch) = self.left.take().map(Ok).or_else(|| self.next()) else { break };
            let batch = batch?;
            let part = batch.slice(0, batch.num_rows().min(n - have));
            if part.num_rows() < batch.num_rows() {
                self.left = Some(batch.slice(part.num_rows(), batch.num_rows() - part.num_rows()));
            }
            have += part.num_rows();
            parts.push(part);
        }
        Ok(concat_batches(&self.schema, &parts)?)
    }
}

impl Iterator for RowStream {
    type Item = Result<RecordBatch>;

    fn next(&mut self) -> Option<Self::Item> {
        let batch = self.reader.next()?;
        let schema = Arc::clone(&self.schema);
        Some(
            batch
                .map_err(Into::into)
                .and_then(|batch| Ok(RecordBatch::try_new(schema, batch.columns().to_vec())?)),
        )
    }
}

/// Writes rows as Parquet. Equal rows give equal bytes, however they are cut into batches.
pub struct RowWriter {
    inner: ArrowWriter<File>,
    schema: SchemaRef,
    held: Vec<RecordBatch>,
    waiting: usize,
    rows: u64,
}

impl RowWriter {
    /// A new file of these columns.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn create(path: &Path, schema: SchemaRef) -> Result<Self> {
        let file = File::create(path).with_context(|| format!("writing {}", path.display()))?;
        let inner = ArrowWriter::try_new(file, Arc::clone(&schema), Some(properties()?))?;
        Ok(Self { inner, schema, held: Vec::new(), waiting: 0, rows: 0 })
    }

    /// The columns of the file.
    pub fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    /// Adds rows; columns of other types than the file's are converted.
    ///
    /// # Errors
    /// When a column cannot be converted, or the disk refuses.
    pub fn write(&mut self, batch: &RecordBatch) -> Result<()> {
        let columns = batch.columns().iter().zip(self.schema.fields());
        let columns = columns.map(|(column, field)| cast(column, field.data_type()));
        let mut batch =
            RecordBatch::try_new(Arc::clone(&self.schema), columns.collect::<Result<_, _>>()?)?;
        self.rows += batch.num_rows() as u64;
        while self.waiting + batch.num_rows() >= BATCH {
            let cut = BATCH - self.waiting;
            self.held.push(batch.slice(0, cut));
            batch = batch.slice(cut, batch.num_rows() - cut);
            self.flush()?;
        }
        if batch.num_rows() > 0 {
            self.waiting += batch.num_rows();
            self.held.push(batch);
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        if !self.held.is_empty() {
            self.inner.write(&concat_batches(&self.schema, &self.held)?)?;
            self.held.clear();
            self.waiting = 0;
        }
        Ok(())
    }

    /// Ends the file; the number of its rows.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn finish(mut self) -> Result<u64> {
        self.flush()?;
        self.inner.close()?;
        Ok(self.rows)
    }
}

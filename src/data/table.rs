//! Rows in memory.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use arrow::array::{ArrayRef, RecordBatch, new_null_array};
use arrow::compute::{cast, interleave_record_batch};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};

use crate::source::{Fault, suggest};

/// Rows of a batch that [`Table::take`] makes.
pub(super) const BATCH: usize = 4096;

/// Record batches of one schema.
#[derive(Debug, Clone)]
pub struct Table {
    /// Columns, without metadata.
    pub schema: SchemaRef,
    /// The rows.
    pub batches: Vec<RecordBatch>,
    /// Class names by column, where the file names them.
    pub classes: BTreeMap<String, Vec<String>>,
    /// Rows that could not be read and were left out.
    pub skipped: u64,
    /// What the user should know about how it was read.
    pub notes: Vec<String>,
    /// Text columns without any value: in another file of the split they may have a type.
    pub(super) untyped: BTreeSet<String>,
}

impl Table {
    /// From batches; metadata of the schema is dropped, dictionaries and text views become
    /// plain text, so that equal rows have equal schemas whatever wrote them.
    ///
    /// # Errors
    /// When the batches are not of that schema.
    pub fn new(schema: &Schema, batches: Vec<RecordBatch>) -> Result<Self> {
        let fields: Vec<Field> = schema
            .fields()
            .iter()
            .map(|f| Field::new(f.name(), plain(f.data_type()), true))
            .collect();
        let nulls = schema.fields().iter().filter(|f| *f.data_type() == DataType::Null);
        let untyped = nulls.map(|f| f.name().clone()).collect();
        let schema = Arc::new(Schema::new(fields));
        let batches = batches.into_iter().filter(|b| b.num_rows() > 0).map(|batch| {
            let columns = batch.columns().iter().zip(schema.fields());
            let columns: Result<Vec<ArrayRef>, _> =
                columns.map(|(column, field)| cast(column, field.data_type())).collect();
            Ok(RecordBatch::try_new(Arc::clone(&schema), columns?)?)
        });
        let batches = batches.collect::<Result<_>>()?;
        let (classes, notes) = (BTreeMap::new(), Vec::new());
        Ok(Self { schema, batches, classes, skipped: 0, notes, untyped })
    }

    /// From whole columns of equal length.
    ///
    /// # Errors
    /// When lengths differ.
    pub fn of_columns(columns: impl IntoIterator<Item = (String, ArrayRef)>) -> Result<Self> {
        let batch = RecordBatch::try_from_iter_with_nullable(
            columns.into_iter().map(|(name, column)| (name, column, true)),
        )?;
        Self::new(&batch.schema(), vec![batch])
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.batches.iter().map(RecordBatch::num_rows).sum()
    }

    /// Column names in order.
    pub fn columns(&self) -> Vec<&str> {
        self.schema.fields().iter().map(|f| f.name().as_str()).collect()
    }

    /// The place of a column.
    ///
    /// # Errors
    /// When there is none of that name; the message names the nearest, or all.
    pub fn index_of(&self, column: &str) -> Result<usize> {
        let columns = self.columns();
        columns.iter().position(|c| *c == column).ok_or_else(|| {
            let help = suggest(column, &columns).unwrap_or_else(|| "there are no columns".into());
            Fault::new(format!("there is no column `{column}`")).help(help).into()
        })
    }

    /// Only these columns, in this order.
    ///
    /// # Errors
    /// When one is missing.
    pub fn select(mut self, columns: &[String]) -> Result<Self> {
        let indices: Result<Vec<usize>> = columns.iter().map(|c| self.index_of(c)).collect();
        let indices = indices?;
        self.schema = Arc::new(self.schema.project(&indices)?);
        for batch in &mut self.batches {
            *batch = batch.project(&indices)?;
        }
        self.classes.retain(|column, _| columns.contains(column));
        Ok(self)
    }

    /// With columns under new names: from old name to new.
    ///
    /// # Errors
    /// When a column is missing, or two would have one name.
    pub fn rename(mut self, names: &BTreeMap<String, String>) -> Result<Self> {
        for old in names.keys() {
            self.index_of(old)?;
        }
        let new = |name: &String| names.get(name).unwrap_or(name).clone();
        let fields: Vec<Field> = self
            .schema
            .fields()
            .iter()
            .map(|f| Field::new(new(f.name()), f.data_type().clone(), true))
            .collect();
        for (i, field) in fields.iter().enumerate() {
            if fields[..i].iter().any(|f| f.name() == field.name()) {
                bail!("two columns would be named `{}`", field.name());
            }
        }
        self.schema = Arc::new(Schema::new(fields));
        for batch in &mut self.batches {
            *batch = RecordBatch::try_new(Arc::clone(&self.schema), batch.columns().to_vec())?;
        }
        self.classes = self.classes.iter().map(|(k, v)| (new(k), v.clone())).collect();
        Ok(self)
    }

    /// These rows, in this order, in batches of a fixed size.
    ///
    /// # Errors
    /// When a row does not exist.
    pub fn take(&self, rows: &[u64]) -> Result<Self> {
        let mut ends = Vec::with_capacity(self.batches.len());
        let mut end = 0;
        for batch in &self.batches {
            end += batch.num_rows() as u64;
            ends.push(end);
        }
        let place = |row: &u64| -> Result<(usize, usize)> {
            let batch = ends.partition_point(|end| end <= row);
            let size = self.batches.get(batch).context("no such row")?.num_rows() as u64;
            Ok((batch, usize::try_from(row + size - ends[batch])?))
        };
        let sources: Vec<&RecordBatch> = self.batches.iter().collect();
        let mut batches = Vec::with_capacity(rows.len().div_ceil(BATCH));
        for chunk in rows.chunks(BATCH) {
            let places: Result<Vec<(usize, usize)>> = chunk.iter().map(place).collect();
            batches.push(interleave_record_batch(&sources, &places?)?);
        }
        let (schema, classes) = (Arc::clone(&self.schema), self.classes.clone());
        let untyped = self.untyped.clone();
        Ok(Self { schema, batches, classes, skipped: 0, notes: Vec::new(), untyped })
    }

    /// The rows of another file below these: its columns may stand in another order, number types
    /// are widened to hold both, and a column without a value takes the other's type. A file
    /// without columns (JSON without a row) adds nothing.
    ///
    /// # Errors
    /// When a column is missing on either side or types do not go together; `name` and `other`
    /// are the files.
    pub fn append(&mut self, mut more: Self, name: &str, other: &str) -> Result<()> {
        let skipped = self.skipped + more.skipped;
        let mut notes = std::mem::take(&mut self.notes);
        notes.append(&mut more.notes);
        if self.columns().is_empty() {
            *self = more;
        } else if !more.columns().is_empty() {
            self.join(more, name, other)?;
        }
        (self.skipped, self.notes) = (skipped, notes);
        Ok(())
    }

    fn join(&mut self, mut more: Self, name: &str, other: &str) -> Result<()> {
        for (has, lacks, from, of) in [(&*self, &more, name, other), (&more, &*self, other, name)] {
            let gone: Vec<String> = has
                .columns()
                .into_iter()
                .filter(|c| !lacks.columns().contains(c))
                .map(|c| format!("`{c}`"))
                .collect();
            if !gone.is_empty() {
                let gone = gone.join(", ");
                return Err(Fault::new(format!("{of} lacks columns that {from} has: {gone}"))
                    .help("files of one split must have the same columns")
                    .into());
            }
        }
        let names: Vec<String> = self.columns().into_iter().map(str::to_owned).collect();
        let untyped = self.untyped.intersection(&more.untyped).cloned().collect();
        for column in &names {
            match (self.untyped.contains(column), more.untyped.contains(column)) {
                (true, false) => self.retype(column, more.type_of(column)?)?,
                (false, true) => more.retype(column, self.type_of(column)?)?,
                _ => {}
            }
        }
        let mut fields = Vec::with_capacity(names.len());
        for field in self.schema.fields() {
            let theirs = more.type_of(field.name())?;
            let wide = wider(field.data_type(), &theirs).ok_or_else(|| {
                Fault::new(format!(
                    "column `{}` is {} in {name} and {theirs} in {other}",
                    field.name(),
                    field.data_type(),
                ))
            })?;
            fields.push(Field::new(field.name(), wide, true));
        }
        let mut classes = std::mem::take(&mut more.classes);
        classes.extend(std::mem::take(&mut self.classes));
        let mut batches = std::mem::take(&mut self.batches);
        batches.extend(more.select(&names)?.batches);
        *self = Self::new(&Schema::new(fields), batches)?;
        (self.classes, self.untyped) = (classes, untyped);
        Ok(())
    }

    fn type_of(&self, column: &str) -> Result<DataType> {
        Ok(self.schema.field(self.index_of(column)?).data_type().clone())
    }

    /// Gives a column without a value another type; as text it stays as it is (empty or null).
    fn retype(&mut self, column: &str, ty: DataType) -> Result<()> {
        if ty == DataType::Utf8 {
            return Ok(());
        }
        let index = self.index_of(column)?;
        let mut fields: Vec<Field> = self.schema.fields().iter().map(|f| Field::clone(f)).collect();
        fields[index] = Field::new(column, ty.clone(), true);
        self.schema = Arc::new(Schema::new(fields));
        for batch in &mut self.batches {
            let mut columns = batch.columns().to_vec();
            columns[index] = new_null_array(&ty, batch.num_rows());
            *batch = RecordBatch::try_new(Arc::clone(&self.schema), columns)?;
        }
        Ok(())
    }
}

/// A type without dictionaries, views and large offsets at the top.
fn plain(ty: &DataType) -> DataType {
    match ty {
        DataType::Dictionary(_, value) => plain(value),
        DataType::LargeUtf8 | DataType::Utf8View | DataType::Null => DataType::Utf8,
        DataType::LargeBinary | DataType::BinaryView => DataType::Binary,
        other => other.clone(),
    }
}

fn wider(a: &DataType, b: &DataType) -> Option<DataType> {
    if a == b {
        return Some(a.clone());
    }
    if a.is_integer() && b.is_integer() {
        return Some(DataType::Int64);
    }
    (a.is_numeric() && b.is_numeric()).then_some(DataType::Float64)
}

//! Parquet: the same schema and rows, floats within a tolerance.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, bail};
use arrow::array::{Array, ArrayRef, AsArray, RecordBatch};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Float64Type, Schema};
use arrow::util::display::array_value_to_string;
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};

use super::{Found, Likeness, Tolerance, shortened};

const BATCH: usize = 1024;

/// Compares two Parquet files row by row, in memory for a batch at a time.
pub(super) fn compare(old: &Path, new: &Path, tolerance: &Tolerance) -> Result<Found> {
    let (mut a, mut b) = (Rows::open(old)?, Rows::open(new)?);
    if let Some(found) = schemas(&a.schema, &b.schema) {
        return Ok(found);
    }
    let mut found = Found::EQUAL;
    let mut row = 0;
    loop {
        a.fill()?;
        b.fill()?;
        let n = a.batch.num_rows().min(b.batch.num_rows());
        if n == 0 {
            break;
        }
        batches(&a.take(n), &b.take(n), row, tolerance, &mut found)?;
        if found.likeness == Likeness::Different {
            return Ok(found);
        }
        row += n;
    }
    let (more, less) = (a.batch.num_rows() > 0, b.batch.num_rows() > 0);
    if more || less {
        let word = |more| if more { "present" } else { "absent" };
        let different = Found::different(format!("row {row}"), word(more), word(less));
        found = Found { largest: found.largest, ..different };
    }
    Ok(found)
}

/// Where two schemas first differ. Notes in them do not count.
fn schemas(old: &Schema, new: &Schema) -> Option<Found> {
    let text = |schema: &Schema, i: usize| {
        let field = schema.fields().get(i)?;
        Some(format!("{}: {}", field.name(), field.data_type()))
    };
    (0..old.fields().len().max(new.fields().len())).find_map(|i| {
        let (a, b) = (text(old, i), text(new, i));
        let differ = a != b;
        let word = |text: Option<String>| text.unwrap_or_else(|| "absent".into());
        differ.then(|| Found::different(format!("column {i}"), word(a), word(b)))
    })
}

/// A file's rows, cut as the reader of the other file needs them.
struct Rows {
    reader: ParquetRecordBatchReader,
    schema: Arc<Schema>,
    batch: RecordBatch,
}

impl Rows {
    fn open(path: &Path) -> Result<Self> {
        let reader = ParquetRecordBatchReaderBuilder::try_new(File::open(path)?)?;
        let schema = Arc::clone(reader.schema());
        let reader = reader.with_batch_size(BATCH).build()?;
        Ok(Self { reader, batch: RecordBatch::new_empty(Arc::clone(&schema)), schema })
    }

    /// Reads on if there is nothing left to take.
    fn fill(&mut self) -> Result<()> {
        while self.batch.num_rows() == 0 {
            match self.reader.next() {
                Some(batch) => self.batch = batch?,
                None => break,
            }
        }
        Ok(())
    }

    fn take(&mut self, n: usize) -> RecordBatch {
        let taken = self.batch.slice(0, n);
        self.batch = self.batch.slice(n, self.batch.num_rows() - n);
        taken
    }
}

/// Compares rows that stand at `start` in their files.
fn batches(
    old: &RecordBatch,
    new: &RecordBatch,
    start: usize,
    tolerance: &Tolerance,
    found: &mut Found,
) -> Result<()> {
    let unequal = |i: &usize| old.column(*i).as_ref() != new.column(*i).as_ref();
    let columns: Vec<usize> = (0..old.num_columns()).filter(unequal).collect();
    if columns.is_empty() {
        return Ok(());
    }
    for row in 0..old.num_rows() {
        for &column in &columns {
            let (a, b) = (old.column(column).slice(row, 1), new.column(column).slice(row, 1));
            if a.as_ref() == b.as_ref() {
                continue;
            }
            let mut one = Found::EQUAL;
            values(&a, &b, tolerance, &mut one)?;
            if let Some(deviation) = one.largest {
                found.largest = Some(found.largest.unwrap_or(0.0).max(deviation));
            }
            if one.likeness > found.likeness {
                let name = old.schema_ref().field(column).name().clone();
                let text = |array: &ArrayRef| -> Result<String> {
                    Ok(shortened(&array_value_to_string(array, 0)?))
                };
                // Of a long list only the value itself says anything.
                let first = one.first.filter(|(at, ..)| !at.is_empty());
                let (at, a, b) = match first {
                    Some((at, a, b)) => (format!(", {at}"), a, b),
                    None => (String::new(), text(&a)?, text(&b)?),
                };
                found.likeness = one.likeness;
                let place = format!("row {}, column `{name}`{at}", start + row);
                found.first = Some((place, a, b));
            }
            if found.likeness == Likeness::Different {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Compares two arrays of one type, floats at any depth within the tolerance.
fn values(old: &ArrayRef, new: &ArrayRef, tolerance: &Tolerance, found: &mut Found) -> Result<()> {
    if old.as_ref() == new.as_ref() || found.likeness == Likeness::Different {
        return Ok(());
    }
    let nulls =
        |array: &ArrayRef| -> Vec<bool> { (0..array.len()).map(|i| array.is_null(i)).collect() };
    if old.len() != new.len() || nulls(old) != nulls(new) {
        *found = Found::different("", "", "");
        return Ok(());
    }
    match old.data_type() {
        DataType::Float16 | DataType::Float32 | DataType::Float64 => {
            let (a, b) = (cast(old, &DataType::Float64)?, cast(new, &DataType::Float64)?);
            let pairs = a.as_primitive::<Float64Type>().iter().zip(b.as_primitive::<Float64Type>());
            let many = old.len() > 1;
            for (i, pair) in pairs.enumerate() {
                if let (Some(a), Some(b)) = pair {
                    let at = || if many { format!("element {i}") } else { String::new() };
                    found.floats(a, b, tolerance, at);
                }
            }
        }
        DataType::List(_) | DataType::LargeList(_) | DataType::FixedSizeList(..) => {
            for i in 0..old.len() {
                if !old.is_null(i) {
                    values(&element(old, i)?, &element(new, i)?, tolerance, found)?;
                }
            }
        }
        DataType::Struct(_) => {
            let (a, b) = (old.as_struct(), new.as_struct());
            for (a, b) in a.columns().iter().zip(b.columns()) {
                values(a, b, tolerance, found)?;
            }
        }
        _ => {
            // Ids are exact; the first of a list that differs is named.
            let differs = |i: &usize| old.slice(*i, 1).as_ref() != new.slice(*i, 1).as_ref();
            let at = (0..old.len()).find(differs).unwrap_or_default();
            let place = if old.len() > 1 { format!("element {at}") } else { String::new() };
            let text = |array: &ArrayRef| anyhow::Ok(shortened(&array_value_to_string(array, at)?));
            let different = Found::different(place, text(old)?, text(new)?);
            *found = Found { largest: found.largest, ..different };
        }
    }
    Ok(())
}

/// What a list holds at a row.
fn element(list: &ArrayRef, row: usize) -> Result<ArrayRef> {
    Ok(match list.data_type() {
        DataType::List(_) => list.as_list::<i32>().value(row),
        DataType::LargeList(_) => list.as_list::<i64>().value(row),
        DataType::FixedSizeList(..) => list.as_fixed_size_list().value(row),
        other => bail!("{other} is not a list"),
    })
}

#[cfg(test)]
mod tests {
    use arrow::array::{Float32Array, Int32Array, ListArray, StringArray};
    use arrow::datatypes::{Float32Type, Int32Type};
    use parquet::arrow::ArrowWriter;
    use parquet::basic::Compression;
    use parquet::file::properties::WriterProperties;

    use super::*;

    /// Three thousand rows, of which one may be other than it should be.
    fn columns(change: impl Fn(usize, &mut i32, &mut f32, &mut Vec<Option<i32>>)) -> RecordBatch {
        let (mut ids, mut floats, mut lists) = (Vec::new(), Vec::new(), Vec::new());
        for row in 0..3000 {
            let n = i32::try_from(row).unwrap();
            let (mut id, mut float, mut list) = (n, n as f32, vec![Some(n), Some(n + 1)]);
            change(row, &mut id, &mut float, &mut list);
            ids.push(id);
            floats.push(float);
            lists.push(Some(list));
        }
        let texts = (0..3000).map(|i| format!("text {i}"));
        RecordBatch::try_from_iter([
            ("id", Arc::new(Int32Array::from(ids)) as ArrayRef),
            ("x", Arc::new(Float32Array::from(floats))),
            ("ids", Arc::new(ListArray::from_iter_primitive::<Int32Type, _, _>(lists))),
            ("text", Arc::new(StringArray::from_iter_values(texts))),
        ])
        .unwrap()
    }

    fn write(path: &Path, batch: &RecordBatch, packed: bool, group: usize) {
        let packing = if packed { Compression::SNAPPY } else { Compression::UNCOMPRESSED };
        let properties = WriterProperties::builder()
            .set_compression(packing)
            .set_max_row_group_row_count(Some(group))
            .build();
        let file = File::create(path).unwrap();
        let mut writer = ArrowWriter::try_new(file, batch.schema(), Some(properties)).unwrap();
        writer.write(batch).unwrap();
        writer.close().unwrap();
    }

    fn found(old: &RecordBatch, new: &RecordBatch) -> Found {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        write(&a, old, false, 3000);
        write(&b, new, true, 700);
        compare(&a, &b, &Tolerance { relative: 1e-3, absolute: 0.0 }).unwrap()
    }

    #[test]
    fn packing_and_row_groups_do_not_matter() {
        let rows = columns(|_, _, _, _| {});
        assert_eq!(found(&rows, &rows), Found::EQUAL);
    }

    #[test]
    fn the_first_row_and_column_are_named() {
        let rows = columns(|_, _, _, _| {});
        let place = |new: &RecordBatch| {
            let found = found(&rows, new);
            let (at, a, b) = found.first.unwrap();
            (found.likeness, format!("{at}: {a} {b}"))
        };
        let different = |text: &str| (Likeness::Different, text.to_owned());
        let id = columns(|row, id, x, _| {
            if row >= 2100 {
                *id = -1;
                *x = 0.0;
            }
        });
        assert_eq!(place(&id), different("row 2100, column `id`: 2100 -1"));
        let list = columns(|row, _, _, list| {
            if row == 1500 {
                list[1] = Some(7);
            }
        });
        assert_eq!(place(&list), different("row 1500, column `ids`, element 1: 1501 7"));
        let longer = columns(|row, _, _, list| {
            if row == 2 {
                list.push(None);
            }
        });
        assert_eq!(place(&longer), different("row 2, column `ids`: [2, 3] [2, 3, ]"));
        let near = columns(|row, _, x, _| {
            if row == 1024 {
                *x += 1.0;
            }
        });
        let expected =
            (Likeness::WithinTolerance, "row 1024, column `x`: 1024.0 1025.0".to_owned());
        assert_eq!(place(&near), expected);
        assert_eq!(found(&rows, &near).largest, Some(1.0));
        assert_eq!(place(&rows.slice(0, 2999)), different("row 2999: present absent"));
        let renamed = rows.project(&[0, 2, 1, 3]).unwrap();
        let (at, _, b) = found(&rows, &renamed).first.unwrap();
        assert!(at == "column 1" && b.starts_with("ids: "), "{at} {b}");
    }

    #[test]
    fn floats_in_lists_may_deviate() {
        let lists = |x: f32| {
            let rows = [Some(vec![Some(1.0), Some(x)]), None];
            let array: ArrayRef =
                Arc::new(ListArray::from_iter_primitive::<Float32Type, _, _>(rows));
            RecordBatch::try_from_iter([("v", array)]).unwrap()
        };
        let near = found(&lists(2.0), &lists(2.001));
        assert_eq!(near.likeness, Likeness::WithinTolerance);
        let far = found(&lists(2.0), &lists(2.5));
        let place = ("row 0, column `v`, element 1".into(), "2".into(), "2.5".into());
        assert_eq!((far.likeness, far.first), (Likeness::Different, Some(place)));
    }
}

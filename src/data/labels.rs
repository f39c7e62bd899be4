//! The classes of rows, by one column.

use std::collections::BTreeMap;

use anyhow::Result;
use arrow::array::Array as _;
use arrow::datatypes::DataType;
use arrow::util::display::{ArrayFormatter, FormatOptions};

use super::Table;
use crate::source::Fault;

/// The class of every row.
#[derive(Debug, Clone)]
pub struct Labels {
    /// The column.
    pub column: String,
    /// Class by row: an index into `values`.
    pub rows: Vec<u32>,
    /// Distinct values as text, sorted; a missing value is `null`.
    pub values: Vec<String>,
    names: Vec<String>,
}

impl Labels {
    /// The classes in a column.
    ///
    /// # Errors
    /// When there is no such column, or nearly every row has a value of its own.
    pub fn of(table: &Table, column: &str) -> Result<Self> {
        let labels = Self::any(table, column)?;
        let (n, distinct) = (labels.rows.len(), labels.values.len());
        if distinct > 100 && distinct > n / 2 {
            let (n, distinct) = (grouped(n), grouped(distinct));
            let message = format!("column `{column}` has {distinct} values in {n} rows");
            return Err(Fault::new(message).help("name a column that holds classes").into());
        }
        Ok(labels)
    }

    /// The values of a column, however many they are.
    ///
    /// # Errors
    /// When there is no such column.
    pub fn any(table: &Table, column: &str) -> Result<Self> {
        let index = table.index_of(column)?;
        let mut seen: BTreeMap<String, u32> = BTreeMap::new();
        let mut rows = Vec::with_capacity(table.rows());
        let options = FormatOptions::default().with_null("null");
        for batch in &table.batches {
            let values = batch.column(index);
            let format = ArrayFormatter::try_new(values.as_ref(), &options)?;
            for row in 0..values.len() {
                let value = format.value(row).try_to_string()?;
                let next = u32::try_from(seen.len())?;
                rows.push(*seen.entry(value).or_insert(next));
            }
        }
        let distinct = seen.len();
        // Numbered anew by value, so that nothing depends on which class comes first.
        let mut order = vec![0; distinct];
        for (new, old) in seen.values().enumerate() {
            order[*old as usize] = u32::try_from(new)?;
        }
        rows.iter_mut().for_each(|class| *class = order[*class as usize]);
        let names = table.classes.get(column).cloned().unwrap_or_default();
        Ok(Self { column: column.to_owned(), rows, values: seen.into_keys().collect(), names })
    }

    /// The column that most likely holds classes: one whose class names are known, else `label`
    /// or `labels`, where it is not a column of fractions, lists or free text.
    pub fn guess(table: &Table) -> Option<Self> {
        let columns = table.columns();
        let named = table.classes.keys().map(String::as_str).find(|c| columns.contains(c));
        let column =
            named.or_else(|| columns.into_iter().find(|c| ["label", "labels"].contains(c)))?;
        let ty = table.schema.field(table.index_of(column).ok()?).data_type();
        let plain = ty.is_integer() || matches!(ty, DataType::Utf8 | DataType::Boolean);
        plain.then(|| Self::of(table, column).ok()).flatten()
    }

    /// A class as people know it: `0 (neg)`.
    pub fn show(&self, class: u32) -> String {
        let value = &self.values[class as usize];
        match value.parse::<usize>().ok().and_then(|i| self.names.get(i)) {
            Some(name) => format!("{value} ({name})"),
            None => value.clone(),
        }
    }

    /// The class of these rows, if it is one for all of them.
    pub fn only_class(&self, rows: &[u64]) -> Option<u32> {
        let mut classes = rows.iter().map(|r| self.rows[*r as usize]);
        let first = classes.next()?;
        classes.all(|c| c == first).then_some(first)
    }

    /// Number of rows by class, for those classes that occur.
    pub fn counts(&self, rows: &[u64]) -> BTreeMap<u32, usize> {
        let mut counts = BTreeMap::new();
        for row in rows {
            *counts.entry(self.rows[*row as usize]).or_default() += 1;
        }
        counts
    }
}

/// Whether classes stand in blocks, one after the other: at least two of them, and no class
/// comes back. Fewer than four rows a class may be so by chance.
pub fn looks_sorted(classes: impl IntoIterator<Item = u32>) -> bool {
    let (mut rows, mut changes) = (0usize, 0usize);
    let mut last = None;
    let mut seen = std::collections::BTreeSet::new();
    for class in classes {
        rows += 1;
        if last.is_some_and(|l| l != class) {
            changes += 1;
        }
        last = Some(class);
        seen.insert(class);
    }
    seen.len() >= 2 && changes == seen.len() - 1 && rows >= 4 * seen.len()
}

/// `2000` as `2,000`.
pub fn grouped(n: usize) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_sorted() {
        assert!(looks_sorted([0, 0, 0, 0, 1, 1, 1, 1]));
        assert!(looks_sorted([1, 1, 1, 1, 0, 0, 0, 0]));
        assert!(!looks_sorted([0, 1, 0, 0, 1, 1, 0, 1]));
        assert!(!looks_sorted([0; 20]));
        assert!(!looks_sorted([0, 1]));
    }

    #[test]
    fn thousands() {
        assert_eq!(grouped(1), "1");
        assert_eq!(grouped(999), "999");
        assert_eq!(grouped(25000), "25,000");
        assert_eq!(grouped(1_234_567), "1,234,567");
    }
}

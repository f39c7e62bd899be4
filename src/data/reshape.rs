//! Columns under other names, of other types, left out, and rows chosen by an expression: batch by
//! batch.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use arrow::array::{Array, ArrayRef, BooleanArray, RecordBatch};
use arrow::compute::{CastOptions, cast_with_options, filter_record_batch};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use arrow::util::display::{ArrayFormatter, FormatOptions};
use minijinja::value::Value;
use minijinja::{Environment, Expression, UndefinedBehavior};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::OnError;
use crate::source::{Fault, suggest};

/// The type that a column is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Cast {
    /// Whole numbers of 64 bits.
    Int,
    /// Numbers of 64 bits with a fraction.
    Float,
    /// True or false.
    Bool,
    /// Text.
    Text,
}

impl Cast {
    fn arrow(self) -> DataType {
        match self {
            Self::Int => DataType::Int64,
            Self::Float => DataType::Float64,
            Self::Bool => DataType::Boolean,
            Self::Text => DataType::Utf8,
        }
    }

    fn noun(self) -> &'static str {
        match self {
            Self::Int => "a whole number",
            Self::Float => "a number",
            Self::Bool => "true or false",
            Self::Text => "text",
        }
    }
}

/// What is done to the columns and rows of a split, in this order: names, types, rows, columns.
/// All but `rename` go by the new names.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Reshape {
    /// New names by old name.
    pub rename: BTreeMap<String, String>,
    /// Types by column.
    pub cast: BTreeMap<String, Cast>,
    /// An expression over columns (Jinja's); rows for which it is false are left out.
    pub filter: Option<String>,
    /// Columns that are kept, in this order; all if none are named.
    pub columns: Option<Vec<String>>,
    /// Columns that are left out.
    pub drop: Vec<String>,
}

/// A [`Reshape`] made ready for the columns of one file.
pub struct Reshaper<'a> {
    what: &'a Reshape,
    filter: Option<(Expression<'a, 'a>, Vec<usize>)>,
    /// After names and types.
    wide: SchemaRef,
    /// Places in `wide` of what is kept.
    kept: Vec<usize>,
    /// What comes out.
    pub schema: SchemaRef,
    /// Rows seen so far.
    row: u64,
    /// Rows that could not be read as they should, and were left out.
    pub skipped: u64,
    /// Rows that the expression leaves out.
    pub filtered: u64,
}

impl fmt::Debug for Reshaper<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reshaper").field("what", self.what).finish_non_exhaustive()
    }
}

/// What an expression may use; made once for all splits.
pub fn environment() -> Environment<'static> {
    let mut env = Environment::new();
    // A name that is no column is a mistake and not false.
    env.set_undefined_behavior(UndefinedBehavior::Strict);
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env
}

fn place(schema: &Schema, column: &str) -> Result<usize> {
    let known: Vec<&str> = schema.fields().iter().map(|f| f.name().as_str()).collect();
    known.iter().position(|k| *k == column).ok_or_else(|| {
        let help = suggest(column, &known).unwrap_or_else(|| "there are no columns".into());
        Fault::new(format!("there is no column `{column}`")).help(help).into()
    })
}

impl Reshape {
    /// Whether an expression is one.
    ///
    /// # Errors
    /// When it is not; the message says where.
    pub fn check_filter(text: &str) -> Result<()> {
        environment().compile_expression(text).map(drop).map_err(|e| bad_expression(text, &e))
    }

    /// The names that columns have after `rename`, class names by column.
    pub fn classes(&self, of: &BTreeMap<String, Vec<String>>) -> BTreeMap<String, Vec<String>> {
        let new = |name: &String| self.rename.get(name).unwrap_or(name).clone();
        let kept = |name: &String| {
            !self.drop.contains(name) && self.columns.as_ref().is_none_or(|c| c.contains(name))
        };
        let named = of.iter().map(|(name, names)| (new(name), names.clone()));
        named.filter(|(name, _)| kept(name)).collect()
    }

    /// Ready for a file with these columns.
    ///
    /// # Errors
    /// When a column is missing, two would have one name, or the expression is none.
    pub fn over<'a>(&'a self, of: &Schema, env: &'a Environment<'static>) -> Result<Reshaper<'a>> {
        for old in self.rename.keys() {
            place(of, old)?;
        }
        let mut fields: Vec<Field> = Vec::with_capacity(of.fields().len());
        for field in of.fields() {
            let name = self.rename.get(field.name()).unwrap_or(field.name());
            if fields.iter().any(|f| f.name() == name) {
                anyhow::bail!("two columns would be named `{name}`");
            }
            let ty = self.cast.get(name).map_or_else(|| field.data_type().clone(), |c| c.arrow());
            fields.push(Field::new(name, ty, true));
        }
        let wide = Schema::new(fields);
        for column in self.cast.keys().chain(&self.drop) {
            place(&wide, column)?;
        }
        let kept: Vec<usize> = match &self.columns {
            Some(columns) => columns.iter().map(|c| place(&wide, c)).collect::<Result<_>>()?,
            None => (0..wide.fields().len()).collect(),
        };
        let dropped = |at: &usize| self.drop.contains(wide.field(*at).name());
        let kept: Vec<usize> = kept.into_iter().filter(|at| !dropped(at)).collect();
        if kept.is_empty() {
            return Err(Fault::new("no column is left").help("keep one at least").into());
        }
        let filter = match &self.filter {
            Some(text) => {
                let expression =
                    env.compile_expression(text).map_err(|e| bad_expression(text, &e))?;
                let mut used: Vec<String> =
                    expression.undeclared_variables(false).into_iter().collect();
                used.sort_unstable();
                let globals = env.globals().map(|(name, _)| name.to_owned()).collect::<Vec<_>>();
                used.retain(|name| place(&wide, name).is_ok() || !globals.contains(name));
                let places = used.iter().map(|c| place(&wide, c)).collect::<Result<_>>();
                Some((expression, places.context("the filter")?))
            }
            None => None,
        };
        let schema = Arc::new(wide.project(&kept)?);
        let wide = Arc::new(wide);
        let (row, skipped, filtered) = (0, 0, 0);
        Ok(Reshaper { what: self, filter, wide, kept, schema, row, skipped, filtered })
    }
}

impl Reshaper<'_> {
    /// The rows of a batch that stay, as they come out.
    ///
    /// # Errors
    /// When a value cannot be read as its column should be, or the expression fails on a row, and
    /// such rows are errors.
    pub fn apply(&mut self, batch: &RecordBatch, on_error: OnError) -> Result<RecordBatch> {
        let mut keep = vec![true; batch.num_rows()];
        let mut columns = Vec::with_capacity(batch.num_columns());
        let wide = Arc::clone(&self.wide);
        for (field, column) in wide.fields().iter().zip(batch.columns()) {
            let cast = self.what.cast.get(field.name());
            columns.push(match cast {
                Some(to) => {
                    let (column, bad) = converted(column, *to)?;
                    for (row, value) in bad {
                        self.bad(&mut keep, row, field.name(), *to, &value, on_error)?;
                    }
                    column
                }
                None => Arc::clone(column),
            });
        }
        let wide = RecordBatch::try_new(wide, columns)?;
        self.choose(&wide, &mut keep, on_error)?;
        self.row += batch.num_rows() as u64;
        let narrow = wide.project(&self.kept)?;
        if keep.iter().all(|k| *k) {
            return Ok(narrow);
        }
        Ok(filter_record_batch(&narrow, &BooleanArray::from(keep))?)
    }

    fn bad(
        &mut self,
        keep: &mut [bool],
        row: usize,
        column: &str,
        to: Cast,
        value: &str,
        on_error: OnError,
    ) -> Result<()> {
        if on_error == OnError::Skip {
            self.skipped += u64::from(std::mem::replace(&mut keep[row], false));
            return Ok(());
        }
        let (number, noun) = (self.row + row as u64 + 1, to.noun());
        let shown: String = value.chars().take(40).collect();
        let message = format!("row {number}, column `{column}`: `{shown}` is not {noun}");
        let help = "mend the row, or set `on_error: skip` to leave such rows out";
        Err(Fault::new(message).help(help).into())
    }

    fn choose(&mut self, wide: &RecordBatch, keep: &mut [bool], on_error: OnError) -> Result<()> {
        let Some((expression, places)) = &self.filter else { return Ok(()) };
        let mut columns = Vec::with_capacity(places.len());
        for at in places {
            let name = wide.schema().field(*at).name().clone();
            columns.push((name, values(wide.column(*at))?));
        }
        for (row, keep) in keep.iter_mut().enumerate().filter(|(_, keep)| **keep) {
            let named = columns.iter().map(|(name, values)| (name.as_str(), values[row].clone()));
            let context: BTreeMap<&str, Value> = named.collect();
            match expression.eval(context) {
                Ok(value) if value.is_true() => {}
                Ok(_) => {
                    *keep = false;
                    self.filtered += 1;
                }
                Err(_) if on_error == OnError::Skip => {
                    *keep = false;
                    self.skipped += 1;
                }
                Err(e) => {
                    let text = self.what.filter.as_deref().unwrap_or_default();
                    let number = self.row + row as u64 + 1;
                    return Err(bad_expression(text, &e).context(format!("row {number}")));
                }
            }
        }
        Ok(())
    }
}

fn bad_expression(text: &str, e: &minijinja::Error) -> anyhow::Error {
    let why = e.detail().map_or_else(|| e.kind().to_string(), str::to_owned);
    let fault = Fault::new(format!("the filter `{text}`: {why}"));
    fault.help("an expression over columns, like `label in [0, 1] and text | length > 20`").into()
}

/// A column of another type, and (row, value) of what cannot be read so.
fn converted(column: &ArrayRef, to: Cast) -> Result<(ArrayRef, Vec<(usize, String)>)> {
    let options = CastOptions { safe: true, ..CastOptions::default() };
    let texts = FormatOptions::new();
    if to == Cast::Text && column.data_type().is_nested() {
        let format = ArrayFormatter::try_new(column.as_ref(), &texts)?;
        let values = (0..column.len()).map(|row| {
            let value = (!column.is_null(row)).then(|| format.value(row).try_to_string());
            value.transpose()
        });
        let values = values.collect::<Result<arrow::array::StringArray, _>>()?;
        return Ok((Arc::new(values), Vec::new()));
    }
    let made = cast_with_options(column, &to.arrow(), &options)?;
    if made.null_count() == column.null_count() {
        return Ok((made, Vec::new()));
    }
    let format = ArrayFormatter::try_new(column.as_ref(), &texts)?;
    let lost = (0..column.len()).filter(|row| made.is_null(*row) && !column.is_null(*row));
    let lost = lost.map(|row| Ok((row, format.value(row).try_to_string()?)));
    let lost = lost.collect::<Result<Vec<_>>>()?;
    Ok((made, lost))
}

/// A column's values for an expression; a missing one is `none`.
fn values(column: &ArrayRef) -> Result<Vec<Value>> {
    let batch = RecordBatch::try_from_iter_with_nullable([("v", Arc::clone(column), true)])?;
    let mut writer = arrow::json::LineDelimitedWriter::new(Vec::new());
    writer.write(&batch)?;
    writer.finish()?;
    let bytes = writer.into_inner();
    let mut out = Vec::with_capacity(column.len());
    for line in bytes.split(|b| *b == b'\n').filter(|line| !line.is_empty()) {
        let mut row: serde_json::Value = serde_json::from_slice(line)?;
        let value = row.get_mut("v").map_or(serde_json::Value::Null, serde_json::Value::take);
        out.push(Value::from_serialize(value));
    }
    anyhow::ensure!(out.len() == column.len(), "a column cannot be read row by row");
    Ok(out)
}

#[cfg(test)]
mod tests {
    use arrow::array::{AsArray as _, Int64Array, StringArray};
    use arrow::datatypes::Int64Type;

    use super::*;
    use crate::source::advice;

    fn batch() -> RecordBatch {
        let text: ArrayRef = Arc::new(StringArray::from(vec![Some("a"), Some("bb"), None]));
        let n: ArrayRef = Arc::new(StringArray::from(vec!["1", "x", "3"]));
        let label: ArrayRef = Arc::new(Int64Array::from(vec![Some(0), Some(1), None]));
        let columns = [("text", text, true), ("n", n, true), ("label", label, true)];
        RecordBatch::try_from_iter_with_nullable(columns).unwrap()
    }

    fn run(what: &Reshape, on_error: OnError) -> Result<(RecordBatch, u64, u64)> {
        let env = environment();
        let mut reshaper = what.over(&batch().schema(), &env)?;
        let out = reshaper.apply(&batch(), on_error)?;
        Ok((out, reshaper.skipped, reshaper.filtered))
    }

    #[test]
    fn names_types_rows_and_columns() {
        let what = Reshape {
            rename: [("n".to_owned(), "number".to_owned())].into(),
            cast: [("number".to_owned(), Cast::Int)].into(),
            filter: Some("text is none or text | length < 2".to_owned()),
            columns: Some(vec!["number".into(), "text".into()]),
            drop: vec!["text".into()],
        };
        let (out, skipped, filtered) = run(&what, OnError::Skip).unwrap();
        assert_eq!((skipped, filtered), (1, 0));
        assert_eq!(out.schema().field(0).name(), "number");
        assert_eq!(out.num_columns(), 1);
        let numbers: Vec<_> = out.column(0).as_primitive::<Int64Type>().iter().collect();
        assert_eq!(numbers, [Some(1), Some(3)]);
        let e = run(&what, OnError::Fail).unwrap_err().to_string();
        assert_eq!(e, "row 2, column `number`: `x` is not a whole number");
    }

    #[test]
    fn rows_are_chosen_by_an_expression() {
        let count = |filter: &str| {
            let what = Reshape { filter: Some(filter.to_owned()), ..Reshape::default() };
            run(&what, OnError::Fail).map(|(out, ..)| out.num_rows())
        };
        assert_eq!(count("label == 1 or label is none").unwrap(), 2);
        assert_eq!(count("label in [0, 1]").unwrap(), 2);
        assert_eq!(count("n in ['1', 'x'] and text.startswith('b')").unwrap(), 1);
        assert_eq!(count("true").unwrap(), 3);
        let e = count("lable == 1").unwrap_err();
        assert!(advice(&e)[0].contains("`label`"), "{e:?}");
        assert!(count("label ==").unwrap_err().to_string().contains("the filter `label ==`"));
        // Of a missing value there is no length.
        let e = count("text | length > 0").unwrap_err();
        assert!(format!("{e:#}").starts_with("row 3: the filter"), "{e:#}");
        assert!(Reshape::check_filter("a b").is_err());
    }

    #[test]
    fn what_cannot_be_is_named() {
        let e = run(&Reshape { drop: vec!["txt".into()], ..Reshape::default() }, OnError::Fail);
        assert!(advice(&e.unwrap_err())[0].contains("`text`"));
        let same = Reshape { rename: [("n".into(), "text".into())].into(), ..Reshape::default() };
        let e = run(&same, OnError::Fail).unwrap_err().to_string();
        assert!(e.contains("two columns would be named `text`"), "{e}");
        let all = ["text", "n", "label"].map(str::to_owned).to_vec();
        let none = Reshape { drop: all, ..Reshape::default() };
        assert!(run(&none, OnError::Fail).unwrap_err().to_string().contains("no column is left"));
    }
}

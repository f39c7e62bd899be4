//! Rows of texts: datasets, and prompts before they are tokenized.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use arrow::array::{Array, AsArray as _, RecordBatch};
use arrow::datatypes::{DataType, Int32Type, SchemaRef};
use arrow::util::display::{ArrayFormatter, FormatOptions};
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};
use rayon::prelude::*;

use super::{Check, Doctor, Facts, Survey, digest};
use crate::data::minhash::signature;
use crate::source::{Fault, suggest};

/// Distinct values from which on a column that was only guessed holds no classes.
const MOST_CLASSES: usize = 10_000;

/// Told rows done and rows in all.
type Progress<'a> = &'a mut dyn FnMut(u64, u64) -> Result<()>;

/// The columns of a dataset that are looked at.
#[derive(Debug, Clone, Copy, Default)]
pub struct Columns<'a> {
    /// The column of the class; if not given, one whose class names are known, `label` or
    /// `labels`.
    pub label: Option<&'a str>,
    /// The column of what is learnt, which must not be empty.
    pub target: Option<&'a str>,
    /// The columns that a model reads; by default all columns of text and of lists.
    pub texts: Option<&'a [String]>,
    /// The column whose class names are known, and the names.
    pub named: Option<(&'a str, &'a [String])>,
}

fn open(path: &Path) -> Result<(u64, SchemaRef, ParquetRecordBatchReader)> {
    let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    let builder = ParquetRecordBatchReaderBuilder::try_new(file)?;
    let rows = u64::try_from(builder.metadata().file_metadata().num_rows()).unwrap_or(0);
    Ok((rows, Arc::clone(builder.schema()), builder.with_batch_size(1024).build()?))
}

/// Looks at a split of a dataset.
///
/// # Errors
/// When the file cannot be read, has no such column, or a label column that was asked for holds
/// no classes.
pub fn survey_dataset(
    doctor: &mut Doctor,
    split: &str,
    path: &Path,
    columns: Columns<'_>,
    progress: Progress<'_>,
) -> Result<()> {
    let (total, schema, reader) = open(path)?;
    let known: Vec<&str> = schema.fields().iter().map(|f| f.name().as_str()).collect();
    let place = |column: &str| {
        known.iter().position(|k| *k == column).ok_or_else(|| {
            let fault = Fault::new(format!("split `{split}` has no column `{column}`"));
            fault.help(suggest(column, &known).unwrap_or_else(|| "there are no columns".into()))
        })
    };
    let label = match columns.label {
        Some(column) => Some(place(column)?),
        None => guess(&schema, columns.named.map(|(column, _)| column)),
    };
    let target = columns.target.map(place).transpose()?;
    let texts: Vec<usize> = match columns.texts {
        Some(texts) => texts.iter().map(|c| place(c)).collect::<Result<_, _>>()?,
        None => read_by_default(&schema, label, target),
    };
    let names = match (columns.named, label) {
        (Some((column, names)), Some(at)) if known[at] == column => names,
        _ => &[],
    };
    let mut survey = Survey::default();
    let (mut distinct, mut labelled) = (std::collections::BTreeSet::new(), label.is_some());
    for batch in reader {
        let batch = batch?;
        let texts = texts.iter().map(|at| Texts::of(&batch, *at)).collect::<Result<Vec<_>>>()?;
        let label = label.filter(|_| labelled).map(|at| Texts::of(&batch, at)).transpose()?;
        let target = target.map(|at| Texts::of(&batch, at)).transpose()?;
        let values = |row| texts.iter().map(|t| t.at(row)).collect::<Result<Vec<_>>>();
        let values = (0..batch.num_rows()).map(values).collect::<Result<Vec<_>>>()?;
        let near = doctor.limits.near;
        let signatures: Vec<_> = near.map_or_else(Vec::new, |near| {
            let rows = values.par_iter();
            rows.map(|row| Box::new(signature(&row.join("\n"), near.words))).collect()
        });
        let mut signatures = signatures.into_iter();
        for (row, values) in values.iter().enumerate() {
            let mut facts = Facts { signature: signatures.next(), ..Facts::default() };
            facts.content = digest(values.iter().map(String::as_bytes));
            facts.length = values.iter().map(|v| v.chars().count() as u64).sum();
            if values.iter().all(|v| v.trim().is_empty()) {
                facts.flaws.push(Check::Empty);
            }
            let mut answer = Vec::new();
            if let Some(target) = &target {
                answer.push(target.at(row)?);
                if answer[0].trim().is_empty() {
                    facts.flaws.push(Check::NoTarget);
                }
            }
            if let Some(label) = &label {
                let value = label.at(row)?;
                match class_name(&value, label.is_null(row), names) {
                    Ok(name) => facts.class = Some(doctor.class(&name)),
                    Err(flaw) => facts.flaws.push(flaw),
                }
                distinct.extend(facts.class);
                answer.push(value);
            }
            facts.answer = digest(answer.iter().map(String::as_bytes));
            survey.add(facts);
        }
        labelled &= distinct.len() <= MOST_CLASSES;
        progress(survey.rows(), total)?;
    }
    let (n, classes) = (survey.rows(), distinct.len() as u64);
    if classes > 100 && classes > n / 2 {
        if let Some(column) = columns.label {
            let message =
                format!("column `{column}` of `{split}` has {classes} values in {n} rows");
            return Err(Fault::new(message).help("name a column that holds classes").into());
        }
        survey.forget_classes();
    }
    doctor.take(split, survey);
    Ok(())
}

/// Looks at a split of prompts. `names` are the classes or label words in class order.
///
/// # Errors
/// When the file cannot be read or does not hold prompts.
pub fn survey_prompts(
    doctor: &mut Doctor,
    split: &str,
    path: &Path,
    names: &[String],
    progress: Progress<'_>,
) -> Result<()> {
    let (total, _, reader) = open(path)?;
    let mut survey = Survey::default();
    for batch in reader {
        let batch = batch?;
        let labels = batch.column_by_name("label").map(|l| l.as_primitive_opt::<Int32Type>());
        let labels = labels.map(|l| l.context("column `label` does not hold int32")).transpose()?;
        for row in 0..batch.num_rows() {
            let mut facts = match batch.column_by_name("segments") {
                Some(_) => conversation(&batch, row)?,
                None => plain(&batch, row)?,
            };
            if let Some(labels) = labels {
                let (value, null) = (labels.value(row).to_string(), labels.is_null(row));
                match class_name(&value, null, names) {
                    Ok(name) => facts.class = Some(doctor.class(&name)),
                    Err(flaw) => facts.flaws.push(flaw),
                }
                facts.answer ^= digest([value.as_bytes()]);
            }
            survey.add(facts);
        }
        progress(survey.rows(), total)?;
    }
    doctor.take(split, survey);
    Ok(())
}

/// A row of segments: what is learnt, and the rest.
fn conversation(batch: &RecordBatch, row: usize) -> Result<Facts> {
    let form = "column `segments` is not a list of (kind, text)";
    let list = batch.column_by_name("segments").and_then(|c| c.as_list_opt::<i32>());
    let items = list.context(form)?.value(row);
    let items = items.as_struct_opt().context(form)?;
    let field = |name: &str| items.column_by_name(name)?.as_string_opt::<i32>();
    let (kinds, texts) = (field("kind").context(form)?, field("text").context(form)?);
    let mut facts = Facts::default();
    let (mut asked, mut learnt) = (Vec::new(), Vec::new());
    for at in 0..items.len() {
        let text = texts.value(at);
        facts.length += text.chars().count() as u64;
        if kinds.value(at) == "target" { learnt.push(text) } else { asked.push(text) }
    }
    if learnt.iter().all(|text| text.trim().is_empty()) {
        facts.flaws.push(Check::NoTarget);
    }
    // Without a prompt all of it is read and learnt.
    let read = if asked.is_empty() { &learnt } else { &asked };
    facts.content = digest(read.iter().map(|t| t.as_bytes()));
    facts.answer = digest(learnt.iter().map(|t| t.as_bytes()));
    Ok(facts)
}

/// A row of a text, or of two, and a class.
fn plain(batch: &RecordBatch, row: usize) -> Result<Facts> {
    let mut facts = Facts::default();
    let mut texts = Vec::new();
    for name in ["text", "text_pair"] {
        let Some(column) = batch.column_by_name(name) else { continue };
        let column = column.as_string_opt::<i32>();
        texts.push(column.with_context(|| format!("column `{name}` does not hold text"))?);
    }
    anyhow::ensure!(!texts.is_empty(), "prompts have neither `segments` nor `text`");
    let texts: Vec<&str> = texts.into_iter().map(|column| column.value(row)).collect();
    facts.length = texts.iter().map(|t| t.chars().count() as u64).sum();
    facts.content = digest(texts.iter().map(|t| t.as_bytes()));
    if texts.iter().all(|t| t.trim().is_empty()) {
        facts.flaws.push(Check::Empty);
    }
    Ok(facts)
}

/// A class by the name that people know it under; a whole number is the place of a name.
fn class_name(value: &str, null: bool, names: &[String]) -> Result<String, Check> {
    if null || value.is_empty() {
        return Err(Check::NoLabel);
    }
    if names.is_empty() || names.iter().any(|name| name == value) {
        return Ok(value.to_owned());
    }
    match value.parse::<i64>() {
        // As hidden labels of test splits are written.
        Ok(-1) => Err(Check::NoLabel),
        Ok(place) => {
            let name = usize::try_from(place).ok().and_then(|at| names.get(at));
            name.map(|name| format!("{place} ({name})")).ok_or(Check::LabelOutside)
        }
        Err(_) => Err(Check::LabelOutside),
    }
}

/// The column that most likely holds classes.
fn guess(schema: &SchemaRef, named: Option<&str>) -> Option<usize> {
    let names = schema.fields().iter().map(|f| f.name().as_str());
    let names: Vec<&str> = names.collect();
    let named = named.and_then(|column| names.iter().position(|n| *n == column));
    let at = named.or_else(|| names.iter().position(|n| ["label", "labels"].contains(n)))?;
    let ty = schema.field(at).data_type();
    (ty.is_integer() || is_text(ty) || *ty == DataType::Boolean).then_some(at)
}

fn is_text(ty: &DataType) -> bool {
    matches!(ty, DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View)
}

/// Columns of text and of lists; all columns where there are none of these.
fn read_by_default(schema: &SchemaRef, label: Option<usize>, target: Option<usize>) -> Vec<usize> {
    let rest = (0..schema.fields().len()).filter(|at| Some(*at) != label && Some(*at) != target);
    let (texts, others): (Vec<usize>, Vec<usize>) = rest.partition(|at| {
        let ty = schema.field(*at).data_type();
        is_text(ty) || ty.is_nested()
    });
    if texts.is_empty() { others } else { texts }
}

/// A column's values as text.
struct Texts<'a> {
    array: &'a dyn Array,
    format: ArrayFormatter<'a>,
}

impl<'a> Texts<'a> {
    fn of(batch: &'a RecordBatch, at: usize) -> Result<Self> {
        static OPTIONS: FormatOptions<'static> = FormatOptions::new();
        let array = batch.column(at).as_ref();
        Ok(Self { array, format: ArrayFormatter::try_new(array, &OPTIONS)? })
    }

    fn is_null(&self, row: usize) -> bool {
        self.array.is_null(row)
    }

    fn at(&self, row: usize) -> Result<String> {
        Ok(self.format.value(row).try_to_string()?)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Finding, Limits, Severity};
    use super::*;
    use crate::data::{OnError, Reading, read, write};

    fn look(jsonl: &str, columns: Columns<'_>) -> Result<Vec<Finding>> {
        let dir = tempfile::tempdir()?;
        std::fs::write(dir.path().join("a"), jsonl)?;
        let table = read(&dir.path().join("a"), Reading::new("a.jsonl", OnError::Fail))?;
        write(&table, &dir.path().join("b"))?;
        let mut doctor = Doctor::new("characters", Limits::default(), &[]);
        survey_dataset(&mut doctor, "train", &dir.path().join("b"), columns, &mut |_, _| Ok(()))?;
        Ok(doctor.findings())
    }

    #[test]
    fn texts_are_compared_without_numbers_and_labels() {
        let rows = "{\"id\": 1, \"text\": \"a\", \"label\": 0}\n\
                    {\"id\": 2, \"text\": \"b\", \"label\": 1}\n\
                    {\"id\": 3, \"text\": \"a\", \"label\": 0}\n\
                    {\"id\": 4, \"text\": \" \", \"label\": 1}\n\
                    {\"id\": 5, \"text\": \"c\", \"label\": null}\n";
        let found = look(rows, Columns::default()).unwrap();
        let found: Vec<(Check, Vec<u64>)> = found.into_iter().map(|f| (f.check, f.rows)).collect();
        let wanted =
            [(Check::NoLabel, vec![4]), (Check::Empty, vec![3]), (Check::Duplicates, vec![2])];
        assert_eq!(found, wanted);
        let texts = ["id".to_owned()];
        let by_id = Columns { texts: Some(&texts), ..Columns::default() };
        assert_eq!(look(rows, by_id).unwrap().len(), 1);
        let bad = Columns { label: Some("lable"), ..Columns::default() };
        assert!(crate::source::advice(&look(rows, bad).unwrap_err())[0].contains("`label`"));
    }

    #[test]
    fn labels_have_names_or_lie_outside() {
        let names = ["neg".to_owned(), "pos".to_owned()];
        let named = Columns { named: Some(("y", &names)), ..Columns::default() };
        let row = |y: i64, t: usize| format!("{{\"t\": \"{t}\", \"y\": {y}}}\n");
        let one: String = (0..3).map(|t| row(1, t)).collect();
        let found = look(&one, named).unwrap();
        assert_eq!(found[0].message, "all 3 rows of `train` are of class `1 (pos)`");
        let found = look(&[row(0, 1), row(1, 2), row(2, 3), row(-1, 4)].concat(), named).unwrap();
        let found: Vec<(Check, Severity)> = found.iter().map(|f| (f.check, f.severity)).collect();
        let refused = Severity::Refused;
        assert_eq!(found, [(Check::NoLabel, refused), (Check::LabelOutside, refused)]);
    }

    #[test]
    fn a_column_of_free_text_holds_no_classes() {
        let rows: String =
            (0..150).map(|i| format!("{{\"t\": \"{i}\", \"label\": \"free {i}\"}}\n")).collect();
        assert_eq!(look(&rows, Columns::default()).unwrap(), []);
        let named = Columns { label: Some("label"), ..Columns::default() };
        assert!(look(&rows, named).unwrap_err().to_string().contains("150 values in 150 rows"));
    }
}

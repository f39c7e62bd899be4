//! Cheap checks of rows before a model is trained on them.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;

use super::rows::Row;
use super::setup::Task;
use crate::source::Fault;

/// Rows in a run of one class, over rows in all, from which an order counts as sorted: rows that
/// change class at most this often per class are in blocks.
const BLOCKS: usize = 2;

/// Looks at training rows; returns warnings.
///
/// # Errors
/// When all rows are of one class (a model that always gives it would look perfect), a row has a
/// class outside the task's, or a row has no target token.
pub fn check_rows(
    rows: &[Row],
    task: &Task,
    classes: &[String],
    shuffle: bool,
) -> Result<Vec<String>> {
    if *task == Task::CausalLm {
        let empty: Vec<usize> =
            rows.iter().enumerate().filter(|(_, r)| r.targets() == 0).map(|(i, _)| i).collect();
        if !empty.is_empty() {
            let first: Vec<String> = empty.iter().take(10).map(usize::to_string).collect();
            let message = format!(
                "{} of {} training rows have no target token (rows {}{})",
                empty.len(),
                rows.len(),
                first.join(", "),
                if empty.len() > first.len() { ", …" } else { "" }
            );
            let help =
                "check `max_length` and `truncate` of the tokenize step, and the target column";
            return Err(Fault::new(message).help(help).into());
        }
    }
    let labels: Vec<u32> = rows.iter().filter_map(|r| r.class).collect();
    if let Task::SequenceClassification { classes } = task {
        if labels.len() != rows.len() {
            let missing = rows.len() - labels.len();
            let fault = Fault::new(format!("{missing} training rows have no label"));
            return Err(fault.help("give the label column in the format step").into());
        }
        if let Some(bad) = labels.iter().find(|l| **l as usize >= *classes) {
            let message =
                format!("a training row has label {bad}, but there are {classes} classes");
            return Err(Fault::new(message).into());
        }
    }
    classes_vary(&labels, classes)?;
    Ok(sorted(&labels, shuffle).into_iter().collect())
}

fn classes_vary(labels: &[u32], classes: &[String]) -> Result<()> {
    let seen: BTreeSet<u32> = labels.iter().copied().collect();
    let (Some(one), 1) = (seen.first(), seen.len()) else { return Ok(()) };
    let name = classes.get(*one as usize).map(|n| format!(" (`{n}`)")).unwrap_or_default();
    let message = format!("all {} training rows are of class {one}{name}", labels.len());
    let help = "stratify the sample step by the label, or shuffle before taking rows: \
                many datasets are stored sorted by label";
    Err(Fault::new(message).help(help).into())
}

fn sorted(labels: &[u32], shuffle: bool) -> Option<String> {
    let mut sizes: BTreeMap<u32, usize> = BTreeMap::new();
    for label in labels {
        *sizes.entry(*label).or_default() += 1;
    }
    let changes = labels.windows(2).filter(|w| w[0] != w[1]).count();
    let few = changes < BLOCKS * sizes.len() && labels.len() > 4 * BLOCKS * sizes.len();
    (few && !shuffle && sizes.len() > 1).then(|| {
        format!(
            "the {} training rows are sorted by label (it changes {changes} times) and `shuffle` \
             is off: the model sees one class after the other",
            labels.len()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(labels: impl IntoIterator<Item = u32>) -> Vec<Row> {
        let row = |class| Row { ids: vec![1, 2], class: Some(class), ..Row::default() };
        labels.into_iter().map(row).collect()
    }

    const TASK: Task = Task::SequenceClassification { classes: 2 };

    #[test]
    fn one_class_is_refused() {
        let names = ["negative".to_owned(), "positive".to_owned()];
        let err = check_rows(&rows([0; 20]), &TASK, &names, true).unwrap_err().to_string();
        assert_eq!(err, "all 20 training rows are of class 0 (`negative`)");
        assert!(check_rows(&rows([0, 1, 2]), &TASK, &[], true).is_err());
        assert!(check_rows(&[Row::default()], &TASK, &[], true).is_err());
    }

    #[test]
    fn sorted_rows_are_warned_of_unless_shuffled() {
        let blocks = || rows((0..40).map(|i| u32::from(i >= 20)));
        assert_eq!(check_rows(&blocks(), &TASK, &[], false).unwrap().len(), 1);
        assert!(check_rows(&blocks(), &TASK, &[], true).unwrap().is_empty());
        let mixed = rows((0..40).map(|i| i % 2));
        assert!(check_rows(&mixed, &TASK, &[], false).unwrap().is_empty());
    }

    #[test]
    fn rows_without_targets_are_counted() {
        let row = |l: [i64; 2]| Row { ids: vec![1, 2], labels: Some(l.into()), ..Row::default() };
        let rows = [row([-100, 2]), row([-100, -100]), row([1, -100])];
        let err = check_rows(&rows, &Task::CausalLm, &[], true).unwrap_err().to_string();
        assert!(err.contains("2 of 3") && err.contains("rows 1, 2"), "{err}");
    }
}

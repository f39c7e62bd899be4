//! From the values of a label column to classes, and to the words that stand for them.

use std::collections::BTreeMap;

use anyhow::Result;

use crate::source::Fault;

/// Class names in class order, and how a cell says which it is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Classes(pub Vec<String>);

impl Classes {
    /// The class of a cell: a name, or (where no name is the same) an index.
    ///
    /// # Errors
    /// When it is neither; the message names the value and the classes that there are.
    pub fn of(&self, cell: &str) -> Result<usize> {
        if let Some(at) = self.0.iter().position(|name| name == cell) {
            return Ok(at);
        }
        let index = match cell {
            "false" => Some(0),
            "true" => Some(1),
            number => number.parse::<usize>().ok(),
        };
        if let Some(index) = index.filter(|i| *i < self.0.len()) {
            return Ok(index);
        }
        let fault = Fault::new(format!("label `{cell}` is outside the classes"));
        let list: Vec<String> =
            self.0.iter().enumerate().map(|(i, name)| format!("{i} `{name}`")).collect();
        Err(fault.help(format!("the classes are {}", list.join(", "))).into())
    }

    /// Classes from the values that a column holds, where nothing names them: whole numbers
    /// from 0 up to the largest, else the values in alphabetical order.
    pub fn of_values<'a>(values: impl IntoIterator<Item = &'a str> + Clone) -> Self {
        let numbers: Option<Vec<usize>> =
            values.clone().into_iter().map(|v| v.parse().ok()).collect();
        // far more classes than any label column has means that this is not one
        let most = numbers.and_then(|n| n.into_iter().max()).filter(|most| *most < 10_000);
        if let Some(most) = most {
            return Self((0..=most).map(|i| i.to_string()).collect());
        }
        let mut names: Vec<String> = values.into_iter().map(str::to_owned).collect();
        names.sort();
        names.dedup();
        Self(names)
    }
}

/// The words that stand for the values of a label column, in class order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LabelWords {
    /// Value, then word.
    entries: Vec<(String, String)>,
    names: Classes,
}

impl LabelWords {
    /// From words by value. Values that are all whole numbers are in their order; values that
    /// are all names of `classes` (the column's class names, if it has some) are in that order;
    /// others in alphabetical order.
    pub fn new(words: &BTreeMap<String, String>, classes: &[String]) -> Self {
        let mut entries: Vec<(String, String)> =
            words.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
        let place = |name: &str| classes.iter().position(|c| c == name);
        if entries.iter().all(|(value, _)| value.parse::<i64>().is_ok()) {
            entries.sort_by_key(|(value, _)| value.parse::<i64>().unwrap_or(i64::MAX));
        } else if entries.iter().all(|(value, _)| place(value).is_some()) {
            entries.sort_by_key(|(value, _)| place(value));
        }
        Self { entries, names: Classes(classes.to_vec()) }
    }

    /// The names of the classes as words.
    pub fn from_classes(classes: &[String]) -> Self {
        let entries = classes.iter().map(|name| (name.clone(), name.clone())).collect();
        Self { entries, names: Classes(classes.to_vec()) }
    }

    /// The words, in class order.
    pub fn words(&self) -> Vec<String> {
        self.entries.iter().map(|(_, word)| word.clone()).collect()
    }

    /// Class and word of a cell, which holds a value, or the index of a class whose name is one.
    ///
    /// # Errors
    /// When no word is given for it; the message lists the values that have one.
    pub fn of(&self, cell: &str) -> Result<(usize, &str)> {
        let find = |value: &str| self.entries.iter().position(|(known, _)| known == value);
        let named = || self.names.of(cell).ok().and_then(|i| find(&self.names.0[i]));
        if let Some(at) = find(cell).or_else(named) {
            return Ok((at, &self.entries[at].1));
        }
        let known: Vec<String> =
            self.entries.iter().map(|(value, _)| format!("`{value}`")).collect();
        let fault = Fault::new(format!("no word is given for label `{cell}`"));
        Err(fault.help(format!("words are given for {}", known.join(", "))).into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn numbers_keep_their_order() {
        let w = LabelWords::new(&words(&[("10", "c"), ("2", "b"), ("0", "a")]), &[]);
        assert_eq!(w.words(), ["a", "b", "c"]);
        assert_eq!(w.of("10").unwrap(), (2, "c"));
    }

    #[test]
    fn class_names_keep_theirs() {
        let classes = ["neg".to_owned(), "abc".to_owned()];
        let w = LabelWords::new(&words(&[("abc", "good"), ("neg", "bad")]), &classes);
        assert_eq!(w.words(), ["bad", "good"]);
        assert_eq!(w.of("1").unwrap(), (1, "good"));
        assert_eq!(w.of("neg").unwrap(), (0, "bad"));
    }

    #[test]
    fn unknown_labels_are_named() {
        let w = LabelWords::new(&words(&[("0", "a"), ("1", "b")]), &[]);
        assert_eq!(w.of("7").unwrap_err().to_string(), "no word is given for label `7`");
        let e = Classes(vec!["a".into(), "b".into()]).of("2").unwrap_err();
        assert_eq!(e.to_string(), "label `2` is outside the classes");
        assert!(Classes(vec!["a".into()]).of("-1").is_err());
    }

    #[test]
    fn classes_of_values() {
        assert_eq!(Classes::of_values(["2", "0"]).0, ["0", "1", "2"]);
        assert_eq!(Classes::of_values(["b", "a", "b"]).0, ["a", "b"]);
    }
}

//! From the values of a label column to classes, and to the words that stand for them.

use std::collections::BTreeMap;

use anyhow::Result;

use crate::source::Fault;

/// Class names in class order, and how the cells of one column say which class they are: all by
/// name, or all by index. It is decided once for the column, since a class may have a number for
/// a name (`1` to `5` for stars), which is then not its index.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Classes {
    names: Vec<String>,
    places: BTreeMap<String, usize>,
    by_index: bool,
}

fn index_of(cell: &str, classes: usize) -> Option<usize> {
    let index = match cell {
        "false" => Some(0),
        "true" => Some(1),
        number => number.parse::<usize>().ok(),
    };
    index.filter(|i| *i < classes)
}

impl Classes {
    fn new(names: Vec<String>, by_index: bool) -> Self {
        let places = names.iter().enumerate().map(|(at, name)| (name.clone(), at)).collect();
        Self { names, places, by_index }
    }

    /// Names of a column of indices, as `ClassLabel` columns are.
    pub fn indexed(names: Vec<String>) -> Self {
        Self::new(names, true)
    }

    /// Names of a column with these values: they are names if all of them are, else indices if
    /// all of them are. Of other columns, [`Classes::of`] names the values that are neither.
    pub fn named<'a>(
        names: Vec<String>,
        values: impl IntoIterator<Item = &'a str> + Clone,
    ) -> Self {
        let mut classes = Self::new(names, false);
        let is_name = |value: &str| classes.places.contains_key(value);
        let is_index = |value: &str| index_of(value, classes.names.len()).is_some();
        let all_names = values.clone().into_iter().all(is_name);
        let all_indices = values.clone().into_iter().all(is_index);
        classes.by_index = !all_names && (all_indices || !values.into_iter().any(is_name));
        classes
    }

    /// Classes from the values that a column holds, where nothing names them: whole numbers in
    /// their order, else the values in alphabetical order.
    pub fn of_values<'a>(values: impl IntoIterator<Item = &'a str> + Clone) -> Self {
        let whole = values.clone().into_iter().all(|v| v.parse::<i64>().is_ok());
        let mut names: Vec<String> = values.into_iter().map(str::to_owned).collect();
        names.sort_by_cached_key(|v| (whole.then(|| v.parse::<i64>().ok()), v.clone()));
        names.dedup();
        Self::new(names, false)
    }

    /// The names, in class order.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// The class of a cell.
    ///
    /// # Errors
    /// When it is none; the message names the value and the classes that there are.
    pub fn of(&self, cell: &str) -> Result<usize> {
        let class = if self.by_index {
            index_of(cell, self.names.len())
        } else {
            self.places.get(cell).copied()
        };
        class.ok_or_else(|| {
            let how = if self.by_index { "index" } else { "name" };
            let fault = Fault::new(format!("label `{cell}` is outside the classes"));
            let list = self.list();
            fault.help(format!("this column says classes by {how}: {list}")).into()
        })
    }

    fn list(&self) -> String {
        let list = self.names.iter().enumerate().map(|(i, name)| format!("{i} `{name}`"));
        list.collect::<Vec<_>>().join(", ")
    }
}

/// The words that stand for the values of a label column, in class order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LabelWords {
    /// Value or class, then word.
    entries: Vec<(String, String)>,
    /// Where the column's classes have names: these, and the entry of each class.
    classes: Option<(Classes, BTreeMap<usize, usize>)>,
}

impl LabelWords {
    /// From words by value, or by name or index of the column's classes if it has some. Words
    /// are in class order; without classes, values that are all whole numbers are in their
    /// order, others in alphabetical order.
    ///
    /// # Errors
    /// When a word is for no class, or the words could be meant by name and by index.
    pub fn new(words: &BTreeMap<String, String>, classes: Option<Classes>) -> Result<Self> {
        let mut entries: Vec<(String, String)> =
            words.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
        let Some(classes) = classes else {
            if entries.iter().all(|(value, _)| value.parse::<i64>().is_ok()) {
                entries.sort_by_key(|(value, _)| value.parse::<i64>().unwrap_or(i64::MAX));
            }
            return Ok(Self { entries, classes: None });
        };
        let place = |key: &str| classes.places.get(key).copied();
        let index = |key: &str| index_of(key, classes.names.len());
        let all = |of: &dyn Fn(&str) -> Option<usize>| -> Option<Vec<usize>> {
            words.keys().map(|key| of(key)).collect()
        };
        let of = match (all(&place), all(&index)) {
            (Some(by_name), Some(by_index)) if by_name != by_index => {
                let fault =
                    Fault::new("the words could be for the names of classes or for indices");
                let help = format!("give a word for every class by its name: {}", classes.list());
                return Err(fault.help(help).into());
            }
            (Some(of), _) | (None, Some(of)) => of,
            (None, None) => {
                let known = |key: &&String| place(key).or_else(|| index(key)).is_some();
                let stray = words.keys().find(|key| !known(key));
                let message = stray.map_or_else(
                    || "words are given for names and for indices of classes".to_owned(),
                    |key| format!("a word is given for `{key}`, which is no class"),
                );
                let help = format!("the classes are {}", classes.list());
                return Err(Fault::new(message).help(help).into());
            }
        };
        let mut order: Vec<usize> = (0..entries.len()).collect();
        order.sort_by_key(|at| of[*at]);
        let by_class = order.iter().enumerate().map(|(place, at)| (of[*at], place)).collect();
        let entries = order.iter().map(|at| entries[*at].clone()).collect();
        Ok(Self { entries, classes: Some((classes, by_class)) })
    }

    /// The names of the classes as words.
    pub fn from_classes(classes: Classes) -> Self {
        let entries = classes.names.iter().map(|name| (name.clone(), name.clone())).collect();
        let by_class = (0..classes.names.len()).map(|class| (class, class)).collect();
        Self { entries, classes: Some((classes, by_class)) }
    }

    /// The words, in class order.
    pub fn words(&self) -> Vec<String> {
        self.entries.iter().map(|(_, word)| word.clone()).collect()
    }

    /// Place among the words, and word, of a cell.
    ///
    /// # Errors
    /// When it is no class, or no word is given for it; the message lists those that have one.
    pub fn of(&self, cell: &str) -> Result<(usize, &str)> {
        let at = match &self.classes {
            Some((classes, by_class)) => by_class.get(&classes.of(cell)?).copied(),
            None => self.entries.iter().position(|(known, _)| known == cell),
        };
        if let Some(at) = at {
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

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|n| (*n).to_owned()).collect()
    }

    const STARS: [&str; 5] = ["1", "2", "3", "4", "5"];

    #[test]
    fn numbers_keep_their_order() {
        let w = LabelWords::new(&words(&[("10", "c"), ("2", "b"), ("0", "a")]), None).unwrap();
        assert_eq!(w.words(), ["a", "b", "c"]);
        assert_eq!(w.of("10").unwrap(), (2, "c"));
    }

    #[test]
    fn class_names_keep_theirs() {
        let classes = Classes::indexed(names(&["neg", "abc"]));
        for keys in [["abc", "neg"], ["1", "0"]] {
            let keyed = words(&[(keys[0], "good"), (keys[1], "bad")]);
            let w = LabelWords::new(&keyed, Some(classes.clone())).unwrap();
            assert_eq!(w.words(), ["bad", "good"]);
            assert_eq!(w.of("1").unwrap(), (1, "good"));
            assert!(w.of("neg").is_err(), "the column holds indices");
        }
        let by_name = Classes::named(names(&["neg", "abc"]), ["abc", "neg"]);
        let w = LabelWords::new(&words(&[("1", "good"), ("0", "bad")]), Some(by_name)).unwrap();
        assert_eq!(w.of("neg").unwrap(), (0, "bad"));
    }

    #[test]
    fn a_number_for_a_name_is_no_index() {
        let indexed = Classes::indexed(names(&STARS));
        assert_eq!((indexed.of("1").unwrap(), indexed.of("4").unwrap()), (1, 4));
        assert!(indexed.of("5").is_err());
        let stars = Classes::named(names(&STARS), STARS);
        assert_eq!((stars.of("1").unwrap(), stars.of("5").unwrap()), (0, 4));
        let indices = Classes::named(names(&STARS), ["0", "1", "2"]);
        assert_eq!((indices.of("0").unwrap(), indices.of("1").unwrap()), (0, 1));

        // words by name, and by index, for a column of indices
        let by_name: Vec<(&str, &str)> = STARS.into_iter().zip(["a", "b", "c", "d", "e"]).collect();
        let w = LabelWords::new(&words(&by_name), Some(indexed.clone())).unwrap();
        assert_eq!((w.of("0").unwrap(), w.of("4").unwrap()), ((0, "a"), (4, "e")));
        let by_index = [("0", "a"), ("1", "b"), ("4", "e")];
        let w = LabelWords::new(&words(&by_index), Some(indexed.clone())).unwrap();
        assert_eq!((w.of("1").unwrap(), w.of("4").unwrap()), ((1, "b"), (2, "e")));
        assert_eq!(w.of("2").unwrap_err().to_string(), "no word is given for label `2`");
        let either = LabelWords::new(&words(&[("1", "a"), ("2", "b")]), Some(indexed.clone()));
        assert!(either.unwrap_err().to_string().contains("could be for the names"));
        let stray = LabelWords::new(&words(&[("0", "a"), ("7", "b")]), Some(indexed));
        assert!(stray.unwrap_err().to_string().contains("`7`, which is no class"));
        assert_eq!(LabelWords::from_classes(stars).of("5").unwrap(), (4, "5"));
    }

    #[test]
    fn unknown_labels_are_named() {
        let w = LabelWords::new(&words(&[("0", "a"), ("1", "b")]), None).unwrap();
        assert_eq!(w.of("7").unwrap_err().to_string(), "no word is given for label `7`");
        // some cells are names, some are not
        let mixed = Classes::named(names(&["a", "b"]), ["a", "1"]);
        assert_eq!(mixed.of("a").unwrap(), 0);
        assert_eq!(mixed.of("1").unwrap_err().to_string(), "label `1` is outside the classes");
        assert!(Classes::indexed(names(&["a"])).of("-1").is_err());
    }

    #[test]
    fn classes_of_values() {
        let of = |values: &[&str]| Classes::of_values(values.iter().copied()).names;
        assert_eq!(of(&["9000", "100", "-1", "100"]), ["-1", "100", "9000"]);
        assert_eq!(of(&["b", "a", "b", "10", "9"]), ["10", "9", "a", "b"]);
        assert_eq!(Classes::of_values(["9000", "100"]).of("9000").unwrap(), 1);
    }
}

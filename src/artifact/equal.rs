//! How alike two results are: their bytes, and where those differ what the bytes say.
//!
//! Rows of Parquet, tensors of safetensors and values of JSON are compared as such, whatever the
//! order of a header or the packing of a page. Everything else is its bytes.

mod bytes;
mod json;
mod rows;
mod tensors;

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use super::View;
use crate::store::{Entry, Store};

/// How alike, from best to worst.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Likeness {
    /// The same bytes.
    BitIdentical,
    /// Other bytes that say the same: rows and schema, tensors, JSON values.
    LogicallyEqual,
    /// Floats differ, none by more than the tolerance; all else says the same.
    WithinTolerance,
    /// Not the same.
    Different,
}

impl Likeness {
    /// As people read it.
    pub fn name(self) -> &'static str {
        match self {
            Self::BitIdentical => "bit-identical",
            Self::LogicallyEqual => "logically equal",
            Self::WithinTolerance => "within tolerance",
            Self::Different => "different",
        }
    }
}

/// How far a float may lie from the one on record.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Tolerance {
    /// In parts of the value on record.
    pub relative: f64,
    /// In units of the value.
    pub absolute: f64,
}

impl Tolerance {
    /// Whether `new` will do for `old`: `|new - old| <= absolute + relative * |old|`, as NumPy's
    /// `allclose` has it. A NaN will do for a NaN.
    pub fn allows(&self, old: f64, new: f64) -> bool {
        let both = old == new || (old.is_nan() && new.is_nan());
        both || (new - old).abs() <= self.absolute + self.relative * old.abs()
    }

    /// How two floats compare.
    fn likeness(&self, old: f64, new: f64) -> Likeness {
        if old == new || (old.is_nan() && new.is_nan()) {
            Likeness::LogicallyEqual
        } else if self.allows(old, new) {
            Likeness::WithinTolerance
        } else {
            Likeness::Different
        }
    }
}

/// The first place at which two results differ.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Place {
    /// Port and path (`train/data.parquet`).
    pub file: String,
    /// Row and column, tensor and index, path in the JSON, line; empty for the file as a whole.
    pub at: String,
    /// What is on record there.
    pub old: String,
    /// What is there now.
    pub new: String,
}

/// How two results compare.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// As a whole: that of the file which is least alike.
    pub likeness: Likeness,
    /// The first difference of that likeness; none where bits are identical.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first: Option<Place>,
    /// The largest deviation of any float, in units of the value.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub largest: Option<f64>,
    /// Why what is on record could not be read, where only digests were compared.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unread: Option<String>,
}

impl Comparison {
    /// Nothing seen so far that differs.
    const SAME: Self =
        Self { likeness: Likeness::BitIdentical, first: None, largest: None, unread: None };

    /// Takes one more finding about a file in.
    fn add(&mut self, file: &str, found: Found) {
        if let Some(deviation) = found.largest {
            self.largest = Some(self.largest.unwrap_or(0.0).max(deviation));
        }
        if found.likeness > self.likeness {
            self.likeness = found.likeness;
            let file = file.to_owned();
            self.first = found.first.map(|(at, old, new)| Place { file, at, old, new });
        }
    }
}

/// How two files compare: where they first differ so, what is there on record and now, and the
/// largest deviation of a float.
#[derive(Debug, Clone, PartialEq)]
struct Found {
    likeness: Likeness,
    first: Option<(String, String, String)>,
    largest: Option<f64>,
}

impl Found {
    /// What says the same until something else is found.
    const EQUAL: Self = Self { likeness: Likeness::LogicallyEqual, first: None, largest: None };

    fn different(at: impl Into<String>, old: impl Into<String>, new: impl Into<String>) -> Self {
        let first = Some((at.into(), old.into(), new.into()));
        Self { likeness: Likeness::Different, first, largest: None }
    }

    /// Takes a pair of floats in; the place is worked out only where it is worth telling.
    fn floats(&mut self, old: f64, new: f64, tolerance: &Tolerance, at: impl FnOnce() -> String) {
        let likeness = tolerance.likeness(old, new);
        if likeness == Likeness::LogicallyEqual {
            return;
        }
        let deviation = (new - old).abs();
        if deviation.is_finite() {
            self.largest = Some(self.largest.unwrap_or(0.0).max(deviation));
        }
        if likeness > self.likeness {
            self.likeness = likeness;
            self.first = Some((at(), old.to_string(), new.to_string()));
        }
    }
}

/// Compares what a step made with what is on record for it. What is on record may be lost (it is
/// known by its digests alone on another machine): then unequal digests are a difference, and
/// [`Comparison::unread`] says why no more can be told.
///
/// # Errors
/// When the store of either cannot be read.
pub fn compare(old: &View, new: &View, tolerance: &Tolerance) -> Result<Comparison> {
    let mut all = Comparison::SAME;
    let names: BTreeSet<&String> = old.ports.keys().chain(new.ports.keys()).collect();
    for port in names {
        let (a, b) = match (old.ports.get(port), new.ports.get(port)) {
            (Some(a), Some(b)) if a == b => continue,
            (Some(a), Some(b)) => (a, b),
            (a, _) => {
                let (a, b) = presence(a.is_some());
                all.add(port, Found::different("", a, b));
                continue;
            }
        };
        if let Some(reason) = old.store.missing(a)? {
            all.add(port, Found::different("", a.short(), b.short()));
            all.unread.get_or_insert(reason);
            continue;
        }
        let (a, b) = (old.tree(port)?.entries, new.tree(port)?.entries);
        let mut paths: BTreeSet<&String> = a.iter().map(|e| &e.path).collect();
        paths.extend(b.iter().map(|e| &e.path));
        for path in paths {
            let find = |entries: &[Entry]| entries.iter().find(|e| e.path == *path).cloned();
            let file = format!("{port}/{path}");
            let found = match (find(&a), find(&b)) {
                (Some(a), Some(b)) => files((&old.store, &a), (&new.store, &b), tolerance)?,
                (a, _) => {
                    let (a, b) = presence(a.is_some());
                    Some(Found::different("", a, b))
                }
            };
            if let Some(found) = found {
                all.add(&file, found);
            }
        }
    }
    Ok(all)
}

/// Words for something that only one of two has.
fn presence(old: bool) -> (&'static str, &'static str) {
    if old { ("present", "absent") } else { ("absent", "present") }
}

/// Compares two files of one name; `None` if they are the same to the bit.
fn files(
    (old_store, old): (&Store, &Entry),
    (new_store, new): (&Store, &Entry),
    tolerance: &Tolerance,
) -> Result<Option<Found>> {
    if old.executable != new.executable {
        let word = |e: &Entry| if e.executable { "executable" } else { "not executable" };
        return Ok(Some(Found::different("", word(old), word(new))));
    }
    if old.digest == new.digest {
        return Ok(None);
    }
    let lost = |e: &Entry| anyhow::anyhow!("the store has lost `{}`", e.path);
    let a = old_store.locate_entry(old)?.ok_or_else(|| lost(old))?;
    let b = new_store.locate_entry(new)?.ok_or_else(|| lost(new))?;
    contents(&old.path, &a, &b, tolerance).map(Some)
}

/// Compares the content of two files by the ending of their name; one that is not what its name
/// says is its bytes.
fn contents(name: &str, old: &Path, new: &Path, tolerance: &Tolerance) -> Result<Found> {
    let ending = Path::new(name).extension().and_then(|e| e.to_str()).unwrap_or_default();
    let meant = match ending {
        "parquet" => rows::compare(old, new, tolerance),
        "safetensors" => tensors::compare(old, new, tolerance),
        "json" => json::compare(old, new, tolerance),
        "jsonl" => json::compare_lines(old, new, tolerance),
        _ => return bytes::compare(old, new),
    };
    match meant {
        Ok(found) => Ok(found),
        Err(_) => bytes::compare(old, new),
    }
}

/// The beginning of a text, for a line of a table.
fn shortened(text: &str) -> String {
    const LONGEST: usize = 60;
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::artifact::Type;

    fn view(store: &Store, files: &[(&str, &str)]) -> View {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        let ports = BTreeMap::from([("p".to_owned(), store.publish_tree(dir.path()).unwrap())]);
        View { ty: Type::Files, ports, store: store.clone() }
    }

    #[test]
    fn the_file_that_is_least_alike_decides() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap();
        let tolerance = Tolerance { relative: 0.1, absolute: 0.0 };
        let old = view(&store, &[("a.json", "[1.0]"), ("b.json", "[2]"), ("c.txt", "x\ny\n")]);
        let against = |files: &[(&str, &str)]| {
            let found = compare(&old, &view(&store, files), &tolerance).unwrap();
            (found.likeness, found.first.map(|p| (p.file, p.at, p.old, p.new)), found.largest)
        };
        let same = [("a.json", "[1.0]"), ("b.json", "[2]"), ("c.txt", "x\ny\n")];
        assert_eq!(against(&same), (Likeness::BitIdentical, None, None));
        let spaced = [("a.json", "[ 1.0 ]"), ("b.json", "[2]"), ("c.txt", "x\ny\n")];
        assert_eq!(against(&spaced), (Likeness::LogicallyEqual, None, None));
        let place = |file: &str, at: &str, old: &str, new: &str| {
            Some((file.to_owned(), at.to_owned(), old.to_owned(), new.to_owned()))
        };
        let near = [("a.json", "[1.0625]"), ("b.json", "[ 2 ]"), ("c.txt", "x\ny\n")];
        let expected = (Likeness::WithinTolerance, place("p/a.json", "[0]", "1", "1.0625"));
        assert_eq!(against(&near), (expected.0, expected.1, Some(0.0625)));
        let far = [("a.json", "[1.0625]"), ("b.json", "[ 2 ]"), ("c.txt", "x\nz\n")];
        let expected = (Likeness::Different, place("p/c.txt", "line 2", "y", "z"));
        assert_eq!(against(&far), (expected.0, expected.1, Some(0.0625)));
        let gone = [("a.json", "[1.0]"), ("b.json", "[2]")];
        let expected = place("p/c.txt", "", "present", "absent");
        assert_eq!(against(&gone), (Likeness::Different, expected, None));
    }

    #[test]
    fn what_is_lost_is_compared_by_digest() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap();
        let empty = Store::open(&dir.path().join("empty")).unwrap();
        let tolerance = Tolerance { relative: 1.0, absolute: 1.0 };
        let new = view(&store, &[("a.json", "[1.0]")]);
        let same = View { store: empty.clone(), ..new.clone() };
        let found = compare(&same, &new, &tolerance).unwrap();
        assert_eq!(found, Comparison::SAME);
        let other = view(&store, &[("a.json", "[1.5]")]);
        let found = compare(&View { store: empty, ..other }, &new, &tolerance).unwrap();
        assert_eq!(found.likeness, Likeness::Different);
        assert!(found.unread.is_some_and(|reason| reason.contains("is gone")));
    }

    #[test]
    fn a_file_that_is_not_what_its_name_says_is_its_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        std::fs::write(&a, "no\n").unwrap();
        std::fs::write(&b, "nor this\n").unwrap();
        let tolerance = Tolerance { relative: 0.0, absolute: 0.0 };
        for name in ["x.parquet", "x.safetensors", "x.json"] {
            let found = contents(name, &a, &b, &tolerance).unwrap();
            assert_eq!(found, Found::different("line 1", "no", "nor this"), "{name}");
        }
    }
}

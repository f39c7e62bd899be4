//! JSON: the same values, floats within a tolerance.

use std::path::Path;

use anyhow::Result;
use serde_json::Value;

use super::{Found, Tolerance, shortened};

/// Compares two JSON files.
pub(super) fn compare(old: &Path, new: &Path, tolerance: &Tolerance) -> Result<Found> {
    let read = |path| anyhow::Ok(serde_json::from_slice::<Value>(&std::fs::read(path)?)?);
    let mut found = Found::EQUAL;
    values("", &read(old)?, &read(new)?, tolerance, &mut found);
    Ok(found)
}

/// Compares two files of one JSON value a line.
pub(super) fn compare_lines(old: &Path, new: &Path, tolerance: &Tolerance) -> Result<Found> {
    let read = |path| {
        let text = std::fs::read_to_string(path)?;
        let lines = text.lines().map(|line| Ok(serde_json::from_str::<Value>(line)?));
        lines.collect::<Result<Vec<_>>>()
    };
    let (old, new) = (read(old)?, read(new)?);
    let mut found = Found::EQUAL;
    for (i, (a, b)) in old.iter().zip(&new).enumerate() {
        values(&format!("line {} ", i + 1), a, b, tolerance, &mut found);
    }
    if old.len() != new.len() && found.likeness < super::Likeness::Different {
        let lines = |n: usize| format!("{n} lines");
        let different = Found::different("", lines(old.len()), lines(new.len()));
        found = Found { largest: found.largest, ..different };
    }
    Ok(found)
}

fn values(path: &str, old: &Value, new: &Value, tolerance: &Tolerance, found: &mut Found) {
    if old == new || found.likeness == super::Likeness::Different {
        return;
    }
    let nothing = Value::Null;
    match (old, new) {
        (Value::Object(a), Value::Object(b)) => {
            let both: std::collections::BTreeSet<&String> = a.keys().chain(b.keys()).collect();
            for name in both {
                let dot = if path.is_empty() || path.ends_with(' ') { "" } else { "." };
                let path = format!("{path}{dot}{name}");
                match (a.get(name), b.get(name)) {
                    (Some(a), Some(b)) => values(&path, a, b, tolerance, found),
                    (a, b) => differ(&path, a.unwrap_or(&nothing), b.unwrap_or(&nothing), found),
                }
            }
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            for (i, (a, b)) in a.iter().zip(b).enumerate() {
                values(&format!("{path}[{i}]"), a, b, tolerance, found);
            }
        }
        // Counts are exact: only a float may deviate.
        (Value::Number(a), Value::Number(b)) if a.is_f64() || b.is_f64() => {
            let float = |n: &serde_json::Number| n.as_f64().unwrap_or(f64::NAN);
            found.floats(float(a), float(b), tolerance, || path.trim_end().to_owned());
        }
        _ => differ(path, old, new, found),
    }
}

fn differ(path: &str, old: &Value, new: &Value, found: &mut Found) {
    if found.likeness < super::Likeness::Different {
        let text = |v: &Value| shortened(&v.to_string());
        let different = Found::different(path.trim_end(), text(old), text(new));
        *found = Found { largest: found.largest, ..different };
    }
}

#[cfg(test)]
mod tests {
    use super::super::Likeness;
    use super::*;
    use serde_json::json;

    fn of(old: &Value, new: &Value) -> (Likeness, String) {
        let mut found = Found::EQUAL;
        let tolerance = Tolerance { relative: 0.01, absolute: 0.0 };
        values("", old, new, &tolerance, &mut found);
        (
            found.likeness,
            found.first.map_or_else(String::new, |(at, a, b)| format!("{at}: {a} {b}")),
        )
    }

    #[test]
    fn only_floats_may_deviate() {
        let close =
            of(&json!({ "m": { "x": 0.5, "n": [1] } }), &json!({ "m": { "x": 0.501, "n": [1] } }));
        assert_eq!(close, (Likeness::WithinTolerance, "m.x: 0.5 0.501".into()));
        let far =
            of(&json!({ "m": { "a": 2.0, "x": 0.5 } }), &json!({ "m": { "a": 2.01, "x": 0.6 } }));
        assert_eq!(far, (Likeness::Different, "m.x: 0.5 0.6".into()));
        let count = of(&json!([[100, 3]]), &json!([[100, 4]]));
        assert_eq!(count, (Likeness::Different, "[0][1]: 3 4".into()));
        assert_eq!(of(&json!(1), &json!(1.0)).0, Likeness::LogicallyEqual);
        assert_eq!(of(&json!({ "a": 1 }), &json!({})), (Likeness::Different, "a: 1 null".into()));
        assert_eq!(of(&json!([1]), &json!([1, 2])).0, Likeness::Different);
    }

    #[test]
    fn lines_are_counted() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        let tolerance = Tolerance { relative: 0.0, absolute: 0.5 };
        std::fs::write(&a, "{\"x\":1.0}\n{\"x\":2.0}\n").unwrap();
        std::fs::write(&b, "{\"x\": 1.0}\n{\"x\": 2.5}\n").unwrap();
        let found = compare_lines(&a, &b, &tolerance).unwrap();
        let place = found.first.unwrap();
        assert_eq!((found.likeness, place.0.as_str()), (Likeness::WithinTolerance, "line 2 x"));
        std::fs::write(&b, "{\"x\": 1.0}\n").unwrap();
        let found = compare_lines(&a, &b, &tolerance).unwrap();
        assert_eq!(found, Found::different("", "2 lines", "1 lines"));
    }
}

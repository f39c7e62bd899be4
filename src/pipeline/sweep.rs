//! The points of a sweep.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use serde_json::Value;

use super::plan::{Point, StepId};
use super::reference::{Piece, Reference, check_keys, near, pieces, texts};
use super::scope::Scope;
use crate::source::{Diagnostic, Severity, Source, Span};
use crate::yaml::{Entry, Node, Shape};

/// More combinations than this are not even counted one by one.
const TOO_MANY: usize = 1_000_000;

/// A sweep: its coordinates by name, and its points in the order of the file (the first axis
/// outermost, included points last).
#[derive(Debug, Default)]
pub(super) struct Sweep {
    /// Where each coordinate (`lr`, `lora.r`) is declared.
    pub(super) axes: BTreeMap<String, Span>,
    /// One, empty, without a sweep.
    pub(super) points: Vec<Point>,
    /// Something is wrong with it, and reported: what a point lacks may be due to that.
    pub(super) refused: bool,
}

impl Sweep {
    /// No sweep at all.
    pub(super) fn none() -> Self {
        Self { axes: BTreeMap::new(), points: vec![Point::new()], refused: false }
    }

    /// The coordinates that a reference reads: itself, the members of a named zip, or the
    /// coordinate that it reaches into.
    pub(super) fn read_by(&self, name: &str) -> Vec<String> {
        if self.axes.contains_key(name) {
            return vec![name.to_owned()];
        }
        let group = format!("{name}.");
        let members: Vec<String> =
            self.axes.keys().filter(|a| a.starts_with(&group)).cloned().collect();
        if !members.is_empty() {
            return members;
        }
        let outer = self.axes.keys().filter(|a| name.starts_with(&format!("{a}.")));
        outer.max_by_key(|a| a.len()).cloned().into_iter().collect()
    }

    /// What is wrong with a reference that reaches into the values of an axis (`model.name`), if
    /// one of them has no such part.
    pub(super) fn dead_end(&self, name: &str, span: Span) -> Option<Diagnostic> {
        let axis = self.read_by(name).pop()?;
        let path = name.strip_prefix(&axis)?.strip_prefix('.')?;
        let (value, key) = self.points.iter().filter_map(|p| p.get(&axis)).find_map(|value| {
            let mut value = value;
            let lacking =
                path.split('.').find(|key| value.get(key).map(|next| value = next).is_none());
            lacking.map(|key| (value, key))
        })?;
        let help = match value.as_object() {
            Some(map) => near(key, map.keys().map(String::as_str)),
            None => Some(format!("write `${{sweep.{axis}}}`: its values have no parts")),
        };
        let message = format!("axis `{axis}` has no part `{key}`");
        let label = format!("not in {}", Node::from_value(value, span).describe());
        Some(Diagnostic::error(span, message, label).maybe_help(help))
    }

    /// The value of a reference at a point; `None` where the point lacks it.
    pub(super) fn value(&self, name: &str, point: &Point) -> Option<Value> {
        if self.axes.contains_key(name) {
            return point.get(name).cloned();
        }
        let group = format!("{name}.");
        let members: serde_json::Map<String, Value> = point
            .iter()
            .filter_map(|(axis, v)| Some((axis.strip_prefix(&group)?.to_owned(), v.clone())))
            .collect();
        if !members.is_empty() {
            return Some(Value::Object(members));
        }
        let axis = self.read_by(name).pop()?;
        let mut value = point.get(&axis)?;
        for key in name.strip_prefix(&axis)?.split('.').skip(1) {
            value = value.get(key)?;
        }
        Some(value.clone())
    }
}

/// An order of points: by axis, then numbers by size before text by bytes.
pub fn by_coordinates(a: &Point, b: &Point) -> Ordering {
    let pairs = a.iter().zip(b.iter());
    let first = pairs.map(|((ka, va), (kb, vb))| ka.cmp(kb).then_with(|| by_value(va, vb)));
    first.fold(Ordering::Equal, Ordering::then).then_with(|| a.len().cmp(&b.len()))
}

fn by_value(a: &Value, b: &Value) -> Ordering {
    let rank = |v: &Value| match v {
        Value::Null => 0,
        Value::Bool(_) => 1,
        Value::Number(_) => 2,
        Value::String(_) => 3,
        Value::Array(_) => 4,
        Value::Object(_) => 5,
    };
    let by_kind = rank(a).cmp(&rank(b));
    by_kind.then_with(|| match (a, b) {
        (Value::Number(x), Value::Number(y)) => {
            let (x, y) = (x.as_f64().unwrap_or(0.0), y.as_f64().unwrap_or(0.0));
            x.total_cmp(&y).then_with(|| a.to_string().cmp(&b.to_string()))
        }
        (Value::String(x), Value::String(y)) => x.cmp(y),
        _ => a.to_string().cmp(&b.to_string()),
    })
}

/// Reads a sweep. When something is wrong with it, that is reported and the sweep that comes
/// back has one point, so that the rest of the file can still be checked.
pub(super) fn read(
    entry: &Entry,
    scope: &Scope<'_>,
    source: &Source,
    cap: usize,
    out: &mut Vec<Diagnostic>,
) -> Sweep {
    let mut found = Vec::new();
    let (axes, factors) = (BTreeMap::new(), Vec::new());
    let mut reader = Reader { scope, source, out: &mut found, axes, factors, refused: false };
    let points = reader.sweep(entry, cap);
    let refused = reader.is_refused();
    let Reader { axes, factors, .. } = reader;
    out.append(&mut found);
    if refused {
        let point = factors.iter().filter_map(|f| f.first().cloned()).flatten().collect();
        return Sweep { axes, points: vec![point], refused };
    }
    Sweep { axes, points, refused }
}

/// An axis, where it is written, and a value.
type Coordinate = (String, Span, Value);

/// Coordinates that stand together, and where.
type Pattern = (Span, Vec<Coordinate>);

struct Reader<'a> {
    scope: &'a Scope<'a>,
    source: &'a Source,
    out: &'a mut Vec<Diagnostic>,
    axes: BTreeMap<String, Span>,
    /// What is multiplied: the values of an axis, or the rows of a named zip.
    factors: Vec<Vec<Point>>,
    /// Something is wrong that the scope reports.
    refused: bool,
}

const KEYS: [&str; 5] = ["grid", "zip", "exclude", "include", "cap"];

impl Reader<'_> {
    fn wrong(&mut self, span: Span, message: impl Into<String>, label: &str, help: &str) {
        self.out.push(Diagnostic::error(span, message, label).help(help));
    }

    fn is_refused(&self) -> bool {
        self.refused || self.out.iter().any(|d| d.severity == Severity::Error)
    }

    /// A node with its references to parameters replaced; `None` if that was refused.
    fn resolve(&mut self, node: &Node) -> Option<Node> {
        let mut nodes = Vec::new();
        texts(node, &mut |n| nodes.push(n));
        let before = self.out.len();
        check_keys(node, self.out);
        for text in nodes {
            match pieces(text, self.source) {
                Err(wrong) => self.out.extend(wrong),
                Ok(found) => {
                    for piece in found {
                        match piece {
                            Piece::Plain(_) => {}
                            Piece::Ref(Reference::Param(p), s) => self.scope.check_param(&p, s),
                            Piece::Ref(Reference::Env(name), s) => self.scope.check_env(&name, s),
                            Piece::Ref(_, span) => {
                                let message = "a sweep can refer to parameters only";
                                self.wrong(span, message, "not here", "write the value itself");
                            }
                        }
                    }
                }
            }
        }
        if self.out.len() > before {
            return None;
        }
        let resolved = self.scope.resolve(node).ok();
        self.refused |= resolved.is_none();
        resolved
    }

    fn sweep(&mut self, entry: &Entry, cap: usize) -> Vec<Point> {
        let help = "give `grid: { axis: [values] }`, a named `zip`, or `include`";
        let keys = match &entry.value.shape {
            Shape::Map(keys) if !keys.is_empty() => keys,
            Shape::Map(_) | Shape::Null => {
                self.wrong(entry.key_span, "the sweep is empty", "no points", help);
                return Vec::new();
            }
            _ => {
                let message = format!("expected a map, found {}", entry.value.describe());
                self.wrong(entry.value.span, message, "wrong type", help);
                return Vec::new();
            }
        };
        for key in keys.iter().filter(|k| !KEYS.contains(&k.key.as_str())) {
            let message = format!("unknown key `{}` of a sweep", key.key);
            let wrong = Diagnostic::error(key.key_span, message, "unknown key");
            self.out.push(wrong.maybe_help(near(&key.key, KEYS)));
        }
        let find = |name: &str| keys.iter().find(|k| k.key == name);
        let mut cap = (cap, entry.key_span);
        if let Some(entry) = find("cap")
            && let Some(node) = self.resolve(&entry.value)
        {
            match node.to_value().as_u64() {
                Some(n) if n > 0 => {
                    cap = (usize::try_from(n).unwrap_or(usize::MAX), entry.value.span);
                }
                _ => {
                    let found = node.describe();
                    let message = format!("expected a whole number, 1 or more, found {found}");
                    let help = "the cap is the largest number of points that is not a mistake";
                    self.wrong(entry.value.span, message, "not a cap", help);
                }
            }
        }
        // Axes in the order in which they were written.
        for key in keys {
            match key.key.as_str() {
                "grid" => self.grid(key),
                "zip" => self.zip(key),
                _ => {}
            }
        }
        let exclude = find("exclude").map(|entry| self.excluded(entry)).unwrap_or_default();
        let product = self.product(cap, &exclude);
        let too_many = product.is_none();
        let mut points = product.unwrap_or_default();
        if let Some(entry) = find("include") {
            self.include(entry, &mut points);
        }
        if too_many { Vec::new() } else { self.settle(points, entry, cap) }
    }

    /// The points, each once, not none and not too many.
    fn settle(&mut self, points: Vec<Point>, entry: &Entry, cap: (usize, Span)) -> Vec<Point> {
        let mut names: BTreeMap<StepId, Point> = BTreeMap::new();
        let mut kept = Vec::with_capacity(points.len());
        for point in points {
            let name = StepId::new("", &point);
            match names.get(&name) {
                None => {
                    names.insert(name, point.clone());
                    kept.push(point);
                }
                Some(other) if *other == point => {
                    let message = format!("the point `{}` stands here twice", &name.0[1..]);
                    let warning = Diagnostic::warning(entry.key_span, message, "taken once");
                    if !self.out.iter().any(|d| d.message == warning.message) {
                        self.out.push(warning);
                    }
                }
                Some(_) => {
                    let message = format!("two points have the same name `{}`", &name.0[1..]);
                    let help = "use one spelling: either text or number";
                    self.wrong(entry.key_span, message, "not told apart", help);
                }
            }
        }
        if kept.is_empty() && !self.is_refused() {
            let help = "give `grid`, `zip` or `include` with at least one value";
            self.wrong(entry.key_span, "the sweep is empty", "no points", help);
        }
        if kept.len() > cap.0 {
            self.above_cap(&kept.len().to_string(), cap);
        }
        kept
    }

    fn above_cap(&mut self, count: &str, (cap, span): (usize, Span)) {
        let message = format!("the sweep has {count} points, above its cap of {cap}");
        let help = "if that is meant, raise `cap:` under `sweep`";
        self.wrong(span, message, "too many points", help);
    }

    fn axis(&mut self, name: &str, span: Span) -> bool {
        let fits = |part: &str| {
            !part.is_empty() && part.chars().all(|c| c.is_alphanumeric() || c == '_' || c == '-')
        };
        if !name.split('.').all(fits) {
            let help = "use letters, digits, `_` and `-`, with dots between";
            self.wrong(span, format!("`{name}` cannot name an axis"), "not a name", help);
            return false;
        }
        let part = |of: &str, name: &str| name.strip_prefix(of).is_some_and(|r| r.starts_with('.'));
        if let Some(other) = self.axes.keys().find(|o| part(o, name) || part(name, o)) {
            let message = format!("axis `{name}` cannot stand beside axis `{other}`");
            let help = "one would be a part of the other: give the members, or rename one";
            self.wrong(span, message, "two meanings", help);
            return false;
        }
        if self.axes.insert(name.to_owned(), span).is_some() {
            let help = "an axis is declared once, under `grid` or under `zip`";
            self.wrong(span, format!("axis `{name}` is declared twice"), "again", help);
            return false;
        }
        true
    }

    /// The values of an axis; the list itself may be a reference to a parameter.
    fn values(&mut self, entry: &Entry) -> Option<Vec<Value>> {
        let help = "an axis is a list of values, like `[4, 8, 16]`";
        let node = self.resolve(&entry.value)?;
        let Some(items) = node.as_list() else {
            let message = format!("expected a list, found {}", node.describe());
            self.wrong(entry.value.span, message, "wrong type", help);
            return None;
        };
        if items.is_empty() {
            let message = format!("axis `{}` has no values: the sweep is empty", entry.key);
            self.wrong(entry.value.span, message, "no values", help);
            return None;
        }
        Some(items.iter().map(Node::to_value).collect())
    }

    fn entries<'n>(&mut self, entry: &'n Entry, help: &str) -> &'n [Entry] {
        if let Some(entries) = entry.value.as_map() {
            return entries;
        }
        if entry.value.shape != Shape::Null {
            let message = format!("expected a map, found {}", entry.value.describe());
            self.wrong(entry.value.span, message, "wrong type", help);
        }
        &[]
    }

    fn grid(&mut self, entry: &Entry) {
        for axis in self.entries(entry, "a grid is `axis: [values]`") {
            if !self.axis(&axis.key, axis.key_span) {
                continue;
            }
            if let Some(values) = self.values(axis) {
                let point = |v| Point::from([(axis.key.clone(), v)]);
                self.factors.push(values.into_iter().map(point).collect());
            }
        }
    }

    fn zip(&mut self, entry: &Entry) {
        for group in self.entries(entry, "a zip is `name: { member: [values], … }`") {
            let help = "a zip is a name with members that move together, like \
                        `lora: { r: [4, 8], alpha: [8, 16] }`";
            let Some(members) = group.value.as_map().filter(|m| !m.is_empty()) else {
                let found = group.value.describe();
                let message = format!("expected a map of lists, found {found}");
                self.wrong(group.value.span, message, "wrong type", help);
                continue;
            };
            let mut rows: Option<(usize, String, Vec<Point>)> = None;
            for member in members {
                let name = format!("{}.{}", group.key, member.key);
                if !self.axis(&name, member.key_span) {
                    continue;
                }
                let Some(values) = self.values(member) else { continue };
                let (n, first, points) = rows.get_or_insert_with(|| {
                    (values.len(), member.key.clone(), vec![Point::new(); values.len()])
                });
                if values.len() != *n {
                    let message = format!(
                        "`{}` has {} values and `{first}` has {n}: members of a zip move together",
                        member.key,
                        values.len()
                    );
                    let help = "give every member as many values, or make them axes of `grid`";
                    self.wrong(member.value.span, message, "another length", help);
                    continue;
                }
                for (point, value) in points.iter_mut().zip(values) {
                    point.insert(name.clone(), value);
                }
            }
            if let Some((_, _, points)) = rows {
                self.factors.push(points);
            }
        }
    }

    /// All combinations but the excluded ones; `None` if there are too many.
    fn product(&mut self, cap: (usize, Span), exclude: &[Pattern]) -> Option<Vec<Point>> {
        if self.factors.is_empty() {
            return Some(Vec::new());
        }
        let mut sizes = self.factors.iter().map(Vec::len);
        let count = sizes.try_fold(1_usize, usize::checked_mul).filter(|n| *n <= TOO_MANY);
        let Some(count) = count else {
            self.above_cap("more than a million", cap);
            return None;
        };
        if exclude.is_empty() && count > cap.0 {
            self.above_cap(&count.to_string(), cap);
            return None;
        }
        let mut matched = vec![false; exclude.len()];
        let (mut points, mut kept) = (Vec::new(), 0);
        for index in 0..count {
            let point = self.combination(index);
            let mut excluded = false;
            for ((_, pattern), matched) in exclude.iter().zip(&mut matched) {
                if pattern.iter().all(|(name, _, v)| point.get(name) == Some(v)) {
                    (excluded, *matched) = (true, true);
                }
            }
            if !excluded {
                kept += 1;
                if kept <= cap.0 {
                    points.push(point);
                }
            }
        }
        for ((span, pattern), matched) in exclude.iter().zip(matched) {
            let known = pattern.iter().all(|(name, ..)| self.axes.contains_key(name));
            if known && !matched {
                let message = "this excludes no point";
                self.out.push(Diagnostic::warning(*span, message, "matches nothing"));
            }
        }
        if kept > cap.0 {
            self.above_cap(&kept.to_string(), cap);
            return None;
        }
        Some(points)
    }

    /// One value of each factor; the last factor changes first.
    fn combination(&self, index: usize) -> Point {
        let mut left = index;
        let mut point = Point::new();
        for factor in self.factors.iter().rev() {
            point.extend(factor[left % factor.len()].clone());
            left /= factor.len();
        }
        point
    }

    /// A list of coordinates with values; members of a zip may stand under its name.
    fn partial_points(&mut self, entry: &Entry) -> Vec<Pattern> {
        let help = "give a list of points, like `[{ lr: 1e-4, lora.r: 8 }]`";
        let Some(node) = self.resolve(&entry.value) else { return Vec::new() };
        let Some(items) = node.as_list() else {
            let message = format!("expected a list, found {}", entry.value.describe());
            self.wrong(entry.value.span, message, "wrong type", help);
            return Vec::new();
        };
        let mut points = Vec::new();
        for item in items {
            let Some(entries) = item.as_map().filter(|e| !e.is_empty()) else {
                let message = format!("expected coordinates, found {}", item.describe());
                self.wrong(item.span, message, "wrong type", help);
                continue;
            };
            let mut point = Vec::new();
            for entry in entries {
                let group = format!("{}.", entry.key);
                let nested = entry.value.as_map().filter(|_| {
                    !self.axes.contains_key(&entry.key)
                        && self.axes.keys().any(|a| a.starts_with(&group))
                });
                for member in nested.unwrap_or_default() {
                    let name = format!("{group}{}", member.key);
                    point.push((name, member.key_span, member.value.to_value()));
                }
                if nested.is_none() {
                    point.push((entry.key.clone(), entry.key_span, entry.value.to_value()));
                }
            }
            points.push((item.span, point));
        }
        points
    }

    /// What `exclude` leaves out; unknown axes are reported.
    fn excluded(&mut self, entry: &Entry) -> Vec<Pattern> {
        let patterns = self.partial_points(entry);
        for (_, pattern) in &patterns {
            for (name, span, _) in pattern {
                if !self.axes.contains_key(name) {
                    let help = near(name, self.axes.keys().map(String::as_str));
                    let wrong = format!("unknown axis `{name}`");
                    let wrong = Diagnostic::error(*span, wrong, "not an axis of this sweep");
                    self.out.push(wrong.maybe_help(help));
                }
            }
        }
        patterns
    }

    fn include(&mut self, entry: &Entry, points: &mut Vec<Point>) {
        for (_, coordinates) in self.partial_points(entry) {
            let mut point = Point::new();
            for (name, span, value) in coordinates {
                if !self.axes.contains_key(&name) && !self.axis(&name, span) {
                    continue;
                }
                point.insert(name, value);
            }
            points.push(point);
        }
    }
}

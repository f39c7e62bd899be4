//! Stages as `dvc.yaml` has them, one for each item of a loop, with every template replaced.

mod keys;

use std::path::Path;

use self::keys::Maker;
use super::path::Place;
use super::template::{self, Text};
use super::values::{ReadError, Values, python_text};
use crate::import::ImportError;
use crate::source::{Diagnostic, Severity, Span, suggest};
use crate::yaml::{Entry, Node, Shape};

/// More stages than this are a mistake.
const MOST: usize = 10_000;

/// A stage that DVC would run.
#[derive(Debug, Clone)]
pub(super) struct Stage {
    /// `train`, or `train@item`.
    pub(super) name: String,
    /// Where its definition is named.
    pub(super) span: Span,
    /// The matrix that it is of, and where in it: values by axis.
    pub(super) matrix: Option<(usize, Vec<(String, Node)>)>,
    /// What is run, each in a shell of its own.
    pub(super) commands: Vec<Text>,
    pub(super) command_span: Span,
    /// Where it is run.
    pub(super) wdir: Place,
    pub(super) deps: Vec<(Place, Span)>,
    pub(super) outs: Vec<Out>,
    /// Its results are as they lie there.
    pub(super) frozen: bool,
    /// What is to be said beside the step.
    pub(super) notes: Vec<String>,
    /// Texts from which paths were made.
    pub(super) path_texts: Vec<Text>,
}

/// What a stage writes.
#[derive(Debug, Clone)]
pub(super) struct Out {
    pub(super) place: Place,
    /// As it was written.
    pub(super) text: Text,
    pub(super) span: Span,
}

/// All that a `dvc.yaml` says.
#[derive(Debug, Default)]
pub(super) struct Project {
    pub(super) stages: Vec<Stage>,
    /// What is to be said at the top of the file.
    pub(super) notes: Vec<String>,
    pub(super) values: Values,
    pub(super) found: Vec<Diagnostic>,
}

const TOP: [&str; 7] = ["stages", "vars", "params", "metrics", "plots", "artifacts", "datasets"];
const STAGE: [&str; 13] = [
    "cmd",
    "wdir",
    "deps",
    "outs",
    "params",
    "metrics",
    "plots",
    "vars",
    "frozen",
    "always_changed",
    "desc",
    "meta",
    "matrix",
];
const LOOP: [&str; 2] = ["foreach", "do"];
const OUT: [&str; 9] =
    ["cache", "persist", "checkpoint", "remote", "push", "desc", "type", "labels", "meta"];
const PLOT: [&str; 7] = ["template", "x", "y", "x_label", "y_label", "title", "header"];

/// Reads a whole `dvc.yaml` that lies in a folder.
///
/// # Errors
/// When a file of values cannot be read; what is wrong with the file itself is among `found`.
pub(super) fn read(node: &Node, dir: &Path) -> Result<Project, ImportError> {
    let mut reader = Reader { dir, project: Project::default(), matrices: 0 };
    reader.project.values.style = super::style(dir);
    reader.top(node)?;
    Ok(reader.project)
}

struct Reader<'a> {
    dir: &'a Path,
    project: Project,
    matrices: usize,
}

impl Reader<'_> {
    fn wrong(&mut self, span: Span, message: impl Into<String>, label: &str) {
        self.project.found.push(Diagnostic::error(span, message, label));
    }

    fn expected(&mut self, node: &Node, what: &str) {
        let message = format!("expected {what}, found {}", node.describe());
        self.wrong(node.span, message, "wrong type");
    }

    fn unknown(&mut self, entry: &Entry, known: &[&str]) {
        let message = format!("DVC has no key `{}` here", entry.key);
        let wrong = Diagnostic::error(entry.key_span, message, "unknown key");
        self.project.found.push(wrong.maybe_help(suggest(&entry.key, known)));
    }

    fn warn(&mut self, span: Span, message: &str) {
        self.project.found.push(Diagnostic::warning(span, message, "not taken over as it is"));
    }

    /// Says at the top of the file, and as a warning, what is not taken over.
    fn unmapped(&mut self, span: Span, message: String) {
        self.warn(span, &message);
        self.project.notes.push(message);
    }

    fn top(&mut self, node: &Node) -> Result<(), ImportError> {
        let Some(entries) = node.as_map() else {
            self.expected(node, "a map with `stages`");
            return Ok(());
        };
        if self.dir.join("params.yaml").is_file() {
            self.load("params.yaml", Span::default())?;
        }
        if let Some(entry) = node.entry("vars") {
            let mut values = std::mem::take(&mut self.project.values);
            self.vars(&mut values, &entry.value, self.dir, false)?;
            self.project.values = values;
        }
        for entry in entries {
            match entry.key.as_str() {
                "stages" | "vars" => {}
                "params" | "metrics" | "plots" | "artifacts" | "datasets" => {
                    let message = format!(
                        "`{}` at the top of dvc.yaml says what DVC shows or registers; it has no \
                         counterpart",
                        entry.key
                    );
                    self.unmapped(entry.key_span, message);
                }
                _ => self.unknown(entry, &TOP),
            }
        }
        match node.get("stages").map(|stages| (stages, stages.as_map())) {
            Some((_, Some(stages))) if !stages.is_empty() => {
                for entry in stages {
                    self.definition(entry)?;
                }
            }
            Some((stages, None)) if stages.shape != Shape::Null => self.expected(stages, "a map"),
            _ => self.wrong(Span::new(node.span.start, node.span.start), "no stages", "empty"),
        }
        Ok(())
    }

    fn load(&mut self, path: &str, span: Span) -> Result<(), ImportError> {
        let mut values = std::mem::take(&mut self.project.values);
        let read = values.read(self.dir, path, false);
        self.project.values = values;
        self.said(read, span)
    }

    fn said(&mut self, read: Result<(), ReadError>, span: Span) -> Result<(), ImportError> {
        match read {
            Ok(()) => Ok(()),
            Err(ReadError::Message(message)) => {
                self.wrong(span, message, "these values");
                Ok(())
            }
            Err(ReadError::Import(error)) => Err(error),
        }
    }

    fn vars(
        &mut self,
        values: &mut Values,
        node: &Node,
        dir: &Path,
        local: bool,
    ) -> Result<(), ImportError> {
        let Some(items) = node.as_list() else {
            self.expected(node, "a list of files and maps");
            return Ok(());
        };
        for item in items {
            match &item.shape {
                Shape::Text(path) => {
                    let read = values.read(dir, path, local);
                    self.said(read, item.span)?;
                }
                Shape::Map(entries) => {
                    let merged = match local {
                        true => values.merge_local(entries),
                        false => values.merge(entries),
                    };
                    if let Err(message) = merged {
                        self.wrong(item.span, message, "a second value");
                    }
                }
                _ => self.expected(item, "a file or a map"),
            }
        }
        Ok(())
    }

    /// A definition: one stage, or a loop of them.
    fn definition(&mut self, entry: &Entry) -> Result<(), ImportError> {
        let (name, span) = (&entry.key, entry.key_span);
        let Some(keys) = entry.value.as_map() else {
            self.expected(&entry.value, "a stage with `cmd`");
            return Ok(());
        };
        if let Some(each) = entry.value.get("foreach") {
            for key in keys.iter().filter(|k| !LOOP.contains(&k.key.as_str())) {
                self.unknown(key, &LOOP);
            }
            let Some(body) = entry.value.get("do") else {
                self.wrong(span, format!("stage `{name}` has `foreach` and no `do`"), "no `do`");
                return Ok(());
            };
            let Some(items) = self.items(each) else { return Ok(()) };
            for (key, item, named) in items {
                let mut values = self.project.values.clone();
                values.set("item", item);
                if named {
                    let key = Node::new(Shape::Text(key.clone()), each.span);
                    values.set("key", key);
                }
                self.stage(&format!("{name}@{key}"), span, body, values, None)?;
            }
            return Ok(());
        }
        let Some(matrix) = entry.value.entry("matrix") else {
            let values = self.project.values.clone();
            return self.stage(name, span, &entry.value, values, None);
        };
        let Some(axes) = self.axes(&matrix.value) else { return Ok(()) };
        self.matrices += 1;
        let matrix = self.matrices - 1;
        let scalars = |values: &[Node]| values.iter().all(is_scalar);
        let count = axes.iter().try_fold(1_usize, |n, (_, values)| n.checked_mul(values.len()));
        let Some(count) = count.filter(|&n| n <= MOST) else {
            self.wrong(span, format!("more than {MOST} stages"), "too many");
            return Ok(());
        };
        let mut points: Vec<(String, Vec<(String, Node)>)> = Vec::new();
        for index in 0..count {
            let (mut left, mut point, mut words) = (index, Vec::new(), Vec::new());
            for (axis, values) in axes.iter().rev() {
                let (at, value) = (left % values.len(), &values[left % values.len()]);
                left /= values.len();
                let composite = !is_scalar(value);
                words.push(if composite { format!("{axis}{at}") } else { python_text(value) });
                point.push((axis.clone(), value.clone()));
            }
            point.reverse();
            words.reverse();
            let key = words.join("-");
            // As in DVC, of two items of one name the last counts.
            match points.iter_mut().find(|(k, _)| *k == key) {
                Some(old) => old.1 = point,
                None => points.push((key, point)),
            }
        }
        let whole = points.len() == count && axes.iter().all(|(_, values)| scalars(values));
        for (key, point) in points {
            let mut values = self.project.values.clone();
            let item = point.iter().map(|(axis, value)| Entry {
                key: axis.clone(),
                key_span: span,
                value: value.clone(),
            });
            values.set("item", Node::new(Shape::Map(item.collect()), span));
            values.set("key", Node::new(Shape::Text(key.clone()), span));
            values.set_axes(axes.iter().map(|(axis, _)| axis.clone()).collect());
            let place = whole.then_some((matrix, point));
            self.stage(&format!("{name}@{key}"), span, &entry.value, values, place)?;
        }
        Ok(())
    }

    /// The items of a `foreach`: key, value, and whether they have keys of their own.
    fn items(&mut self, each: &Node) -> Option<Vec<(String, Node, bool)>> {
        let resolved = self.resolved(each)?;
        let items: Vec<(String, Node, bool)> = match &resolved.shape {
            Shape::Map(entries) => {
                entries.iter().map(|e| (e.key.clone(), e.value.clone(), true)).collect()
            }
            Shape::List(items) => {
                let indexed = !items.iter().all(is_scalar);
                let key = |i: usize, n| if indexed { i.to_string() } else { python_text(n) };
                items.iter().enumerate().map(|(i, n)| (key(i, n), n.clone(), false)).collect()
            }
            _ => {
                self.expected(&resolved, "a list or a map");
                return None;
            }
        };
        if items.len() > MOST {
            self.wrong(each.span, format!("more than {MOST} stages"), "too many");
            return None;
        }
        let mut unique: Vec<(String, Node, bool)> = Vec::new();
        for item in items {
            if !unique.iter().any(|(key, ..)| *key == item.0) {
                unique.push(item);
            }
        }
        Some(unique)
    }

    fn axes(&mut self, matrix: &Node) -> Option<Vec<(String, Vec<Node>)>> {
        let Some(entries) = matrix.as_map().filter(|m| !m.is_empty()) else {
            self.expected(matrix, "a map of lists");
            return None;
        };
        let mut axes = Vec::new();
        for axis in entries {
            let resolved = self.resolved(&axis.value)?;
            let Some(values) = resolved.as_list().filter(|v| !v.is_empty()) else {
                self.expected(&resolved, "a list of values");
                return None;
            };
            axes.push((axis.key.clone(), values.to_vec()));
        }
        Some(axes)
    }

    fn resolved(&mut self, node: &Node) -> Option<Node> {
        match template::value(node, &self.project.values) {
            Ok(node) => Some(node),
            Err(diagnostic) => {
                self.project.found.push(diagnostic);
                None
            }
        }
    }

    fn stage(
        &mut self,
        name: &str,
        span: Span,
        body: &Node,
        mut values: Values,
        matrix: Option<(usize, Vec<(String, Node)>)>,
    ) -> Result<(), ImportError> {
        if self.project.stages.len() >= MOST {
            self.wrong(span, format!("more than {MOST} stages"), "too many");
            return Ok(());
        }
        let Some(keys) = body.as_map() else {
            self.expected(body, "a stage with `cmd`");
            return Ok(());
        };
        for key in keys.iter().filter(|k| !STAGE.contains(&k.key.as_str())) {
            self.unknown(key, &STAGE);
        }
        let wdir = match body.get("wdir") {
            Some(node) => match template::text(node, &values, template::Place::Field) {
                Ok(text) => Some((text, node.span)),
                Err(diagnostic) => {
                    self.project.found.push(diagnostic);
                    return Ok(());
                }
            },
            None => None,
        };
        let mut stage = Stage {
            name: name.to_owned(),
            span,
            matrix,
            commands: Vec::new(),
            command_span: span,
            wdir: Place::here(),
            deps: Vec::new(),
            outs: Vec::new(),
            frozen: false,
            notes: Vec::new(),
            path_texts: Vec::new(),
        };
        if let Some((text, span)) = wdir {
            match Place::here().join(&text.literal()) {
                Ok(place) => stage.wdir = place,
                Err(_) => self.wrong(span, "`wdir` is not a folder of the project", "outside"),
            }
            stage.path_texts.push(text);
        }
        if let Some(vars) = body.get("vars") {
            let dir = self.dir.join(stage.wdir.text());
            self.vars(&mut values, vars, &dir, true)?;
        }
        let mut maker = Maker { reader: self, stage, values };
        for key in keys {
            maker.key(key);
        }
        let Maker { stage, .. } = maker;
        if stage.commands.is_empty() && body.get("cmd").is_none() {
            self.wrong(span, format!("stage `{name}` has no `cmd`"), "no `cmd`");
        }
        self.project.stages.push(stage);
        Ok(())
    }
}

fn is_scalar(node: &Node) -> bool {
    !matches!(node.shape, Shape::List(_) | Shape::Map(_))
}

impl Project {
    /// Whether it is worth going on.
    pub(super) fn is_wrong(&self) -> bool {
        self.found.iter().any(|d| d.severity == Severity::Error)
    }
}

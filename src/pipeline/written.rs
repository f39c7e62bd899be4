//! What was written, before anything is looked up: it may be wrong.

use std::time::Duration;

use super::plan::Retry;
use super::reference::near;
use super::units::{bytes, duration};
use crate::source::{Diagnostic, Source, Span};
use crate::step::Cpu;
use crate::yaml::{self, Entry, Node, Shape};

/// A pipeline as it was written.
#[derive(Debug, Clone)]
pub struct Pipeline {
    /// Its name, if it gives one.
    pub name: Option<String>,
    /// Values to reference as `${params.name}`.
    pub params: Node,
    /// The sweep, unread.
    pub sweep: Option<Entry>,
    /// The steps, in the order of the file.
    pub steps: Vec<WrittenStep>,
    /// What is published: references by name.
    pub outputs: Vec<Entry>,
}

/// A step as it was written.
#[derive(Debug, Clone)]
pub struct WrittenStep {
    /// Its name.
    pub name: String,
    /// Where its name stands.
    pub span: Span,
    /// The name of its kind, with its place.
    pub kind: Option<(String, Span)>,
    /// Its parameters: a map, references unresolved.
    pub with: Node,
    /// Names of environment variables whose values are part of the key.
    pub env: Vec<(String, Span)>,
    /// Part of the key.
    pub salt: Option<Node>,
    /// What it needs instead of what its kind says.
    pub needs: WrittenNeeds,
    /// How often it is tried again, and how soon.
    pub retry: Retry,
    /// After which it is ended.
    pub timeout: Option<Duration>,
    /// `checkpoint`.
    pub checkpoint: Option<Duration>,
    /// Names of environment variables that are passed to it and kept nowhere.
    pub secrets: Vec<(String, Span)>,
}

/// The keys of `needs` that were given.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WrittenNeeds {
    /// CPU slots.
    pub cpu: Option<Cpu>,
    /// Bytes of memory.
    pub memory: Option<u64>,
    /// GPUs.
    pub gpu: Option<usize>,
    /// Whether nothing may run beside it.
    pub exclusive: Option<bool>,
    /// Everything else: resources by name, with the place of the name.
    pub named: Vec<(String, u64, Span)>,
}

/// The keys of `needs` that are the same everywhere; others name resources of the project.
pub(super) const NEEDS: [&str; 4] = ["cpu", "memory", "gpu", "exclusive"];

const TOP: [&str; 6] = ["name", "description", "params", "sweep", "steps", "outputs"];
const STEP: [&str; 9] =
    ["kind", "with", "env", "salt", "needs", "retry", "timeout", "checkpoint", "secrets"];
const LATER: [&str; 2] = ["slurm", "log"];

impl Pipeline {
    /// Reads a pipeline: what could be read (nothing after a YAML syntax error), and all that is
    /// wrong with its form.
    pub fn parse(source: &Source) -> (Option<Self>, Vec<Diagnostic>) {
        let (node, mut diagnostics) = yaml::read(source);
        let pipeline = node.and_then(|node| Form { out: &mut diagnostics }.pipeline(node));
        (pipeline, diagnostics)
    }
}

struct Form<'a> {
    out: &'a mut Vec<Diagnostic>,
}

impl Form<'_> {
    fn wrong(&mut self, span: Span, message: impl Into<String>, label: &str, help: &str) {
        self.out.push(Diagnostic::error(span, message, label).help(help));
    }

    fn expected(&mut self, node: &Node, what: &str, help: &str) {
        let message = format!("expected {what}, found {}", node.describe());
        self.wrong(node.span, message, "wrong type", help);
    }

    fn unknown_key(&mut self, entry: &Entry, whose: &str, known: &[&str]) {
        let message = format!("unknown key `{}` of {whose}", entry.key);
        let wrong = Diagnostic::error(entry.key_span, message, "unknown key");
        self.out.push(wrong.maybe_help(near(&entry.key, known.iter().copied())));
    }

    fn pipeline(mut self, node: Node) -> Option<Pipeline> {
        let span = node.span;
        let Shape::Map(entries) = node.shape else {
            let help = "a pipeline has `name`, `params`, `sweep`, `steps` and `outputs`";
            self.expected(&node, "a map with `steps`", help);
            return None;
        };
        let empty = Node::new(Shape::Map(Vec::new()), Span::new(span.start, span.start));
        let mut pipeline = Pipeline {
            name: None,
            params: empty,
            sweep: None,
            steps: Vec::new(),
            outputs: Vec::new(),
        };
        let mut has_steps = false;
        for entry in entries {
            match entry.key.as_str() {
                "name" => pipeline.name = self.name(&entry.value),
                "description" => {
                    if entry.value.as_text().is_none() {
                        self.expected(&entry.value, "text", "say what the pipeline is for");
                    }
                }
                "params" => match entry.value.shape {
                    Shape::Map(_) => pipeline.params = entry.value,
                    Shape::Null => {}
                    _ => self.expected(&entry.value, "a map", "params are names with values"),
                },
                "sweep" => pipeline.sweep = Some(entry),
                "steps" => {
                    has_steps = true;
                    pipeline.steps = self.steps(entry);
                }
                "outputs" => match entry.value.shape {
                    Shape::Map(outputs) => pipeline.outputs = outputs,
                    Shape::Null => {}
                    _ => {
                        let help = "outputs are names with references like `${steps.name}`";
                        self.expected(&entry.value, "a map", help);
                    }
                },
                _ => self.unknown_key(&entry, "a pipeline", &TOP),
            }
        }
        if !has_steps {
            let at = Span::new(span.start, span.start);
            let help = "add `steps:` with a name, a `kind` and `with` for each";
            self.wrong(at, "this pipeline has no `steps`", "no `steps`", help);
        }
        Some(pipeline)
    }

    fn name(&mut self, node: &Node) -> Option<String> {
        let help = "a pipeline's name is a folder under `outputs`: letters, digits, `_` and `-`";
        let Some(name) = node.as_text() else {
            self.expected(node, "text", help);
            return None;
        };
        let fits = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
        if name.is_empty() || !name.chars().all(fits) {
            self.wrong(node.span, format!("`{name}` cannot be a name"), "not a name", help);
            return None;
        }
        Some(name.to_owned())
    }

    fn steps(&mut self, entry: Entry) -> Vec<WrittenStep> {
        let help = "steps are names, each with a `kind` and `with`";
        let Shape::Map(entries) = entry.value.shape else {
            self.expected(&entry.value, "a map", help);
            return Vec::new();
        };
        if entries.is_empty() {
            self.wrong(entry.key_span, "this pipeline has no steps", "empty", help);
        }
        entries.into_iter().filter_map(|entry| self.step(entry)).collect()
    }

    fn step(&mut self, entry: Entry) -> Option<WrittenStep> {
        let mut rest = entry.key.chars();
        let starts = rest.next().is_some_and(|c| c.is_ascii_lowercase());
        if !starts || !rest.all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_') {
            let message = format!("`{}` cannot be the name of a step", entry.key);
            let help = "use lower-case letters, digits and `_`, a letter first";
            self.wrong(entry.key_span, message, "not a name", help);
        }
        let Shape::Map(keys) = entry.value.shape else {
            self.expected(&entry.value, "a map", "a step has a `kind` and `with`");
            return None;
        };
        let no_with = Node::new(Shape::Map(Vec::new()), entry.key_span);
        let mut step = WrittenStep {
            name: entry.key,
            span: entry.key_span,
            kind: None,
            with: no_with,
            env: Vec::new(),
            salt: None,
            needs: WrittenNeeds::default(),
            retry: Retry::default(),
            timeout: None,
            checkpoint: None,
            secrets: Vec::new(),
        };
        let mut has_kind = false;
        for key in keys {
            match key.key.as_str() {
                "kind" => {
                    has_kind = true;
                    match key.value.as_text() {
                        Some(kind) => step.kind = Some((kind.to_owned(), key.value.span)),
                        None => self.expected(&key.value, "the name of a kind", "see `flow kinds`"),
                    }
                }
                "with" => match key.value.shape {
                    Shape::Map(_) => step.with = key.value,
                    Shape::Null => {}
                    _ => self.expected(&key.value, "a map", "`with` holds the step's parameters"),
                },
                "env" => step.env = self.names(&key.value),
                "secrets" => step.secrets = self.names(&key.value),
                "salt" => match key.value.shape {
                    Shape::List(_) | Shape::Map(_) => {
                        self.expected(&key.value, "text or a number", "the salt is in the key");
                    }
                    Shape::Null => {}
                    _ => step.salt = Some(key.value),
                },
                "needs" => step.needs = self.needs(&key.value),
                "retry" => step.retry = self.retry(&key.value),
                "timeout" => step.timeout = self.time(&key.value),
                "checkpoint" => step.checkpoint = self.time(&key.value),
                later if LATER.contains(&later) => {
                    let message = format!("`{later}` is not available yet");
                    self.wrong(key.key_span, message, "not available", "remove it");
                }
                _ => self.unknown_key(&key, "a step", &STEP),
            }
        }
        if !has_kind {
            let message = format!("step `{}` has no `kind`", step.name);
            self.wrong(step.span, message, "no `kind`", "see `flow kinds` for what there is");
        }
        Some(step)
    }

    fn time(&mut self, node: &Node) -> Option<Duration> {
        let time = node.as_text().and_then(duration).filter(|d| !d.is_zero());
        if time.is_none() {
            self.expected(node, "a time", "write it like `90s`, `15m` or `2h`");
        }
        time
    }

    fn names(&mut self, node: &Node) -> Vec<(String, Span)> {
        let help = "list the names of environment variables, like `[LANG]`";
        let Some(items) = node.as_list() else {
            if node.shape != Shape::Null {
                self.expected(node, "a list of names", help);
            }
            return Vec::new();
        };
        let mut names = Vec::new();
        for item in items {
            match item.as_text().filter(|n| !n.is_empty() && !n.contains(['=', '$', '\0'])) {
                Some(name) => names.push((name.to_owned(), item.span)),
                None => self.expected(item, "the name of an environment variable", help),
            }
        }
        names
    }

    /// `3`, or `{ times: 3, backoff: 10s }`.
    fn retry(&mut self, node: &Node) -> Retry {
        let mut retry = Retry::default();
        let Some(entries) = node.as_map() else {
            retry.times = self.times(node);
            return retry;
        };
        let before = self.out.len();
        for entry in entries {
            match entry.key.as_str() {
                "times" => retry.times = self.times(&entry.value),
                "backoff" => retry.backoff = self.time(&entry.value).unwrap_or(retry.backoff),
                _ => self.unknown_key(entry, "`retry`", &["times", "backoff"]),
            }
        }
        if self.out.len() == before && !entries.iter().any(|e| e.key == "times") {
            let help = "like `retry: { times: 3, backoff: 10s }`";
            self.wrong(node.span, "this `retry` has no `times`", "no `times`", help);
        }
        retry
    }

    fn times(&mut self, node: &Node) -> u32 {
        whole(node).and_then(|n| u32::try_from(n).ok()).unwrap_or_else(|| {
            let help = "how often a failed step is tried again";
            self.expected(node, "a whole number, 0 or more", help);
            0
        })
    }

    fn needs(&mut self, node: &Node) -> WrittenNeeds {
        let mut needs = WrittenNeeds::default();
        let Some(entries) = node.as_map() else {
            if node.shape != Shape::Null {
                self.expected(node, "a map", "like `needs: { cpu: 4, memory: 8GiB, gpu: 1 }`");
            }
            return needs;
        };
        for entry in entries {
            let value = &entry.value;
            match entry.key.as_str() {
                "cpu" if value.as_text() == Some("all") => needs.cpu = Some(Cpu::All),
                "cpu" => match whole(value).and_then(|n| usize::try_from(n).ok()) {
                    Some(n) if n > 0 => needs.cpu = Some(Cpu::N(n)),
                    _ => self.expected(value, "a number of slots or `all`", "like `cpu: 4`"),
                },
                "memory" => match whole(value).or_else(|| value.as_text().and_then(bytes)) {
                    Some(n) => needs.memory = Some(n),
                    None => self.expected(value, "a size", "write it like `512MiB` or `8GB`"),
                },
                "gpu" => match whole(value).and_then(|n| usize::try_from(n).ok()) {
                    Some(n) => needs.gpu = Some(n),
                    None => self.expected(value, "a number of GPUs", "like `gpu: 1`"),
                },
                "exclusive" => match value.shape {
                    Shape::Bool(alone) => needs.exclusive = Some(alone),
                    _ => self.expected(value, "`true` or `false`", "like `exclusive: true`"),
                },
                // Whether there is such a resource is not the file's to say.
                name => match whole(value) {
                    Some(n) => needs.named.push((name.to_owned(), n, entry.key_span)),
                    None => self.expected(value, "a whole number", "like `licence: 1`"),
                },
            }
        }
        needs
    }
}

fn whole(node: &Node) -> Option<u64> {
    match &node.shape {
        Shape::Number(n) => n.as_u64(),
        _ => None,
    }
}

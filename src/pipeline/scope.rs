//! What `${params.…}` and `${env.…}` stand for.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};

use super::Settings;
use super::reference::{Piece, Reference, check_keys, near, pieces, texts};
use crate::source::{Diagnostic, Source, Span, nearest};
use crate::yaml::{self, Entry, Node, Shape};

/// Parameters and environment, checked once, and what was read of them.
pub(super) struct Scope<'a> {
    source: &'a Source,
    params: Node,
    env: &'a BTreeMap<String, String>,
    secrets: BTreeSet<String>,
    values: RefCell<BTreeMap<String, Result<Node, Unresolved>>>,
    used: RefCell<BTreeSet<String>>,
    env_read: RefCell<BTreeMap<String, Option<String>>>,
    on_the_way: RefCell<Vec<String>>,
    /// Bytes that references have brought into parameters.
    brought: Cell<usize>,
    wrong: RefCell<Vec<Diagnostic>>,
}

/// A longer chain of parameters that refer to each other is a mistake.
const LONGEST_CHAIN: usize = 64;

/// Parameters that refer to each other can double with each line; this many bytes are none.
const MOST_BROUGHT: usize = 4 << 20;

/// About how many bytes a value takes.
fn size(node: &Node) -> usize {
    let items = node.as_list().unwrap_or_default().iter();
    let values = node.as_map().unwrap_or_default().iter();
    let inner = items.map(size).sum::<usize>()
        + values.map(|e| e.key.len() + size(&e.value)).sum::<usize>();
    size_of::<Node>() + node.as_text().map_or(0, str::len) + inner
}

/// Why a parameter has no value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Unresolved {
    /// There is no such name; the known ones.
    Unknown(Vec<String>),
    /// It has been reported where it stands.
    Reported,
}

/// What a node without references to steps or sweep resolves to.
pub(super) fn interpolate(value: &Node, span: Span, out: &mut String) -> Result<(), Diagnostic> {
    match &value.shape {
        Shape::Text(text) => out.push_str(text),
        Shape::Number(n) => out.push_str(&n.to_string()),
        Shape::Bool(b) => out.push_str(if *b { "true" } else { "false" }),
        _ => {
            let message = format!("{} cannot be put inside text", value.describe());
            return Err(Diagnostic::error(span, message, "not text, a number or a boolean")
                .help("let the reference be the whole value: then it keeps its type"));
        }
    }
    Ok(())
}

impl<'a> Scope<'a> {
    pub(super) fn new(
        source: &'a Source,
        mut params: Node,
        secrets: BTreeSet<String>,
        settings: &'a Settings,
    ) -> Self {
        let mut wrong = Vec::new();
        for (path, raw) in &settings.sets {
            if let Err(diagnostic) = set(&mut params, path, raw) {
                wrong.push(diagnostic);
            }
        }
        let scope = Self {
            source,
            params,
            env: &settings.env,
            secrets,
            values: RefCell::default(),
            used: RefCell::default(),
            env_read: RefCell::default(),
            on_the_way: RefCell::default(),
            brought: Cell::default(),
            wrong: RefCell::new(wrong),
        };
        scope.check_params();
        scope
    }

    fn report(&self, diagnostic: Diagnostic) {
        self.wrong.borrow_mut().push(diagnostic);
    }

    /// Everything found wrong, and warnings for parameters that nothing reads.
    pub(super) fn finish(self) -> Vec<Diagnostic> {
        let mut found = self.wrong.into_inner();
        let used = self.used.into_inner();
        for entry in self.params.as_map().unwrap_or_default() {
            if !used.contains(&entry.key) {
                let message = format!("parameter `{}` is not used", entry.key);
                found.push(Diagnostic::warning(entry.key_span, message, "not used"));
            }
        }
        found
    }

    /// References in parameters to names that are not there, once and for all.
    fn check_params(&self) {
        check_keys(&self.params, &mut self.wrong.borrow_mut());
        let mut nodes = Vec::new();
        texts(&self.params, &mut |node| nodes.push(node));
        for node in nodes {
            let found = match pieces(node, self.source) {
                Ok(found) => found,
                Err(wrong) => {
                    wrong.into_iter().for_each(|d| self.report(d));
                    continue;
                }
            };
            for piece in found {
                match piece {
                    Piece::Ref(Reference::Param(path), span) => self.check_param(&path, span),
                    Piece::Ref(Reference::Env(name), span) => self.check_env(&name, span),
                    Piece::Ref(_, span) => {
                        let message = "a parameter cannot depend on steps or on the sweep";
                        let help = "write the reference in the step's `with`";
                        self.report(Diagnostic::error(span, message, "not here").help(help));
                    }
                    Piece::Plain(_) => {}
                }
            }
        }
        for entry in self.params.as_map().unwrap_or_default() {
            let _ = self.value(&entry.key);
        }
    }

    /// Reports a reference to a parameter that does not exist; marks it as used.
    pub(super) fn check_param(&self, path: &str, span: Span) {
        let top = path.split('.').next().unwrap_or_default();
        self.used.borrow_mut().insert(top.to_owned());
        if let Err(Unresolved::Unknown(known)) = self.value(path) {
            let help = if known.is_empty() {
                Some("add it under `params:`".to_owned())
            } else {
                near(path.rsplit('.').next().unwrap_or(path), known.iter().map(String::as_str))
            };
            // The one that was meant is not unused.
            let meant = nearest(path, known.iter().map(String::as_str)).map(str::to_owned);
            self.used.borrow_mut().extend(meant);
            let message = format!("unknown parameter `{path}`");
            self.report(Diagnostic::error(span, message, "not in `params`").maybe_help(help));
        }
    }

    /// Reports a reference to a variable that is not set or is secret.
    pub(super) fn check_env(&self, name: &str, span: Span) {
        if self.is_secret(name) {
            let message = format!("`{name}` is a secret and cannot be written into parameters");
            let help = "parameters are part of the key and are saved; the step sees its secrets \
                        in its environment";
            self.report(Diagnostic::error(span, message, "a secret").help(help));
        } else if !self.env.contains_key(name) {
            let message = format!("environment variable `{name}` is not set");
            let near = nearest(name, self.env.keys().map(String::as_str));
            let near = near.map(|n| format!("did you mean `{n}`? ")).unwrap_or_default();
            let help = format!(
                "{near}set it before running, or write a parameter, which has a value of its own \
                 and takes another with `--set params.name=value`"
            );
            self.report(Diagnostic::error(span, message, "not set").help(help));
        }
    }

    /// Whether any step of the pipeline calls a variable a secret.
    pub(super) fn is_secret(&self, name: &str) -> bool {
        self.secrets.contains(name)
    }

    /// The value of an environment variable that may be read.
    pub(super) fn env(&self, name: &str) -> Option<&str> {
        let value = self.env.get(name).filter(|_| !self.is_secret(name));
        self.env_read.borrow_mut().insert(name.to_owned(), value.cloned());
        value.map(String::as_str)
    }

    /// The environment that was read so far.
    pub(super) fn env_read(&self) -> BTreeMap<String, Option<String>> {
        self.env_read.borrow().clone()
    }

    /// The value of a parameter, or of a part of it (`a.b`).
    pub(super) fn value(&self, path: &str) -> Result<Node, Unresolved> {
        if let Some(known) = self.values.borrow().get(path) {
            return known.clone();
        }
        let way = self.on_the_way.borrow().clone();
        if let Some(at) = way.iter().position(|p| p == path) {
            let mut circle = way[at..].to_vec();
            circle.push(path.to_owned());
            let top = path.split('.').next().unwrap_or_default();
            let span = self.params.entry(top).map_or(self.params.span, |e| e.key_span);
            let message = format!("parameters refer to each other: {}", circle.join(" -> "));
            self.report(Diagnostic::error(span, message, "a cycle"));
            return Err(Unresolved::Reported);
        }
        if way.len() == LONGEST_CHAIN {
            let top = path.split('.').next().unwrap_or_default();
            let span = self.params.entry(top).map_or(self.params.span, |e| e.key_span);
            let message =
                format!("more than {LONGEST_CHAIN} parameters refer to each other in a row");
            self.report(Diagnostic::error(span, message, "and so on"));
            return Err(Unresolved::Reported);
        }
        self.on_the_way.borrow_mut().push(path.to_owned());
        let value = self.walk(path);
        self.on_the_way.borrow_mut().pop();
        // What was found in the middle of a circle is not the whole truth about it.
        self.values.borrow_mut().insert(path.to_owned(), value.clone());
        value
    }

    fn walk(&self, path: &str) -> Result<Node, Unresolved> {
        let mut node = &self.params;
        let resolved;
        let names: Vec<&str> = path.split('.').collect();
        for (i, name) in names.iter().enumerate() {
            if node.as_text().is_some() {
                resolved = self.value(&names[..i].join("."))?;
                return descend(&resolved, &names[i..]);
            }
            node = child(node, name)?;
        }
        self.resolve(node)
    }

    /// A node with its references to parameters and environment replaced.
    pub(super) fn resolve(&self, node: &Node) -> Result<Node, Unresolved> {
        let shape = match &node.shape {
            Shape::Text(_) => return self.text(node),
            Shape::List(items) => {
                Shape::List(items.iter().map(|n| self.resolve(n)).collect::<Result<_, _>>()?)
            }
            Shape::Map(entries) => {
                let entries = entries.iter().map(|e| {
                    let value = self.resolve(&e.value)?;
                    Ok(Entry { key: e.key.clone(), key_span: e.key_span, value })
                });
                Shape::Map(entries.collect::<Result<_, Unresolved>>()?)
            }
            plain => plain.clone(),
        };
        Ok(Node::new(shape, node.span))
    }

    fn text(&self, node: &Node) -> Result<Node, Unresolved> {
        let found = pieces(node, self.source).map_err(|_| Unresolved::Reported)?;
        if let [Piece::Ref(reference, span)] = found.as_slice() {
            return self.bring(reference, *span).map(|n| n.moved_to(*span));
        }
        let mut text = String::new();
        for piece in &found {
            match piece {
                Piece::Plain(plain) => text.push_str(plain),
                Piece::Ref(reference, span) => {
                    let value = self.bring(reference, *span)?;
                    if let Err(diagnostic) = interpolate(&value, *span, &mut text) {
                        self.report(diagnostic);
                        return Err(Unresolved::Reported);
                    }
                }
            }
        }
        Ok(Node::new(Shape::Text(text), node.span))
    }

    /// What a reference in parameters stands for; refused once that is too much in all.
    fn bring(&self, reference: &Reference, span: Span) -> Result<Node, Unresolved> {
        let value = self.lookup(reference)?;
        let before = self.brought.get();
        self.brought.set(before.saturating_add(size(&value)));
        if self.brought.get() <= MOST_BROUGHT {
            return Ok(value);
        }
        if before <= MOST_BROUGHT {
            let message = format!("parameters grow to more than {} MiB", MOST_BROUGHT >> 20);
            let help = "each reference is replaced by all that it stands for";
            self.report(Diagnostic::error(span, message, "here").help(help));
        }
        Err(Unresolved::Reported)
    }

    /// A parameter or an environment variable; anything else has been reported.
    pub(super) fn lookup(&self, reference: &Reference) -> Result<Node, Unresolved> {
        match reference {
            Reference::Param(path) => self.value(path).map_err(|_| Unresolved::Reported),
            Reference::Env(name) => {
                let text = self.env(name).ok_or(Unresolved::Reported)?;
                Ok(Node::new(Shape::Text(text.to_owned()), Span::default()))
            }
            _ => Err(Unresolved::Reported),
        }
    }
}

fn child<'n>(node: &'n Node, name: &str) -> Result<&'n Node, Unresolved> {
    node.get(name).ok_or_else(|| {
        let known = node.as_map().unwrap_or_default().iter().map(|e| e.key.clone());
        Unresolved::Unknown(known.collect())
    })
}

fn descend(node: &Node, names: &[&str]) -> Result<Node, Unresolved> {
    let mut node = node;
    for name in names {
        node = child(node, name)?;
    }
    Ok(node.clone())
}

/// Replaces a parameter by a value given on the command line.
fn set(params: &mut Node, path: &str, raw: &str) -> Result<(), Diagnostic> {
    let start = Span::new(params.span.start, params.span.start);
    let wrong = |span, message: String, help| {
        Diagnostic::error(span, message, "for `--set`").maybe_help(help)
    };
    let Some(names) = path.strip_prefix("params.") else {
        let help = format!("write `--set params.{path}={raw}`");
        return Err(wrong(start, format!("`--set {path}` is not a parameter"), Some(help)));
    };
    let value = yaml::parse(&Source::new("--set", raw)).map_err(|found| {
        let why = found.into_iter().next().map(|d| d.message).unwrap_or_default();
        wrong(start, format!("the value of `--set {path}` is {why}"), None)
    })?;
    let mut node = params;
    for name in names.split('.') {
        let known: Vec<String> =
            node.as_map().unwrap_or_default().iter().map(|e| e.key.clone()).collect();
        let Shape::Map(entries) = &mut node.shape else {
            return Err(wrong(node.span, format!("`--set {path}`: no such parameter"), None));
        };
        match entries.iter_mut().find(|e| e.key == name) {
            Some(entry) => node = &mut entry.value,
            None => {
                let help = near(name, known.iter().map(String::as_str));
                return Err(wrong(start, format!("`--set {path}`: no such parameter"), help));
            }
        }
    }
    let span = node.span;
    *node = value.moved_to(span);
    Ok(())
}

//! Instances of a step: one for each projection of the sweep onto the axes that it reads.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::Settings;
use super::check::Names;
use super::field::{self, Field, Wrong};
use super::plan::{Instance, Point, Policy, StepId};
use super::reference::{Piece, Reference, near, pieces};
use super::scope::interpolate;
use super::sweep::by_coordinates;
use super::written::WrittenStep;
use crate::source::{Diagnostic, Severity, Span};
use crate::step::{Binding, Kind, Member, Needs, Ports, Step};
use crate::yaml::{Entry, Node, Shape};

/// A step at a projection of the sweep, as far as it could be made.
pub(super) struct Made {
    pub(super) point: Point,
    /// What comes out, if that can be said.
    pub(super) ports: Option<Ports>,
    /// The instance, if nothing is wrong with it.
    pub(super) instance: Option<Instance>,
    /// What it reads, in the order of `$input.edge`.
    pub(super) edges: Vec<Read>,
}

/// One end of an edge.
pub(super) struct Read {
    pub(super) step: usize,
    pub(super) instance: usize,
    pub(super) port: Option<String>,
}

/// Makes the instances of one step after another.
pub(super) struct Maker<'m, 'a> {
    names: &'m Names<'a>,
    made: &'m [Vec<Made>],
    settings: &'m Settings,
    point: Point,
    edges: Vec<Read>,
    /// References to axes that the point lacks.
    absent: Vec<String>,
    pub(super) found: Vec<Diagnostic>,
}

/// The part of a point on some axes.
pub(super) fn project(point: &Point, axes: &BTreeSet<String>) -> Point {
    point.iter().filter(|(k, _)| axes.contains(*k)).map(|(k, v)| (k.clone(), v.clone())).collect()
}

fn stand_in(span: Span) -> Node {
    Node::from_value(&field::unknown(), span)
}

impl<'m, 'a> Maker<'m, 'a> {
    pub(super) fn new(names: &'m Names<'a>, made: &'m [Vec<Made>], settings: &'m Settings) -> Self {
        let (edges, absent, found) = (Vec::new(), Vec::new(), Vec::new());
        Self { names, made, settings, point: Point::new(), edges, absent, found }
    }

    /// All instances of a step, in the order of the points.
    pub(super) fn step(&mut self, step: usize) -> Vec<Made> {
        let known = &self.names.steps[step];
        let mut seen = BTreeSet::new();
        let points = self.names.sweep.points.iter().map(|point| project(point, &known.axes));
        // Told apart as JSON: the names of `1` and "1" are the same, which is reported later.
        let points: Vec<Point> = points.filter(|p| seen.insert(json!(p).to_string())).collect();
        let mut made = Vec::with_capacity(points.len());
        let mut places: BTreeSet<Span> = BTreeSet::new();
        for point in points {
            self.point = point;
            let before = self.found.len();
            made.push(self.instance(known.written, known.kind.as_ref()));
            // The same place is reported once, not once for each point of the sweep.
            let new = self.found.split_off(before);
            self.found.extend(new.into_iter().filter(|d| !places.contains(&d.span)));
            places.extend(self.found[before..].iter().map(|d| d.span));
        }
        made
    }

    fn instance(&mut self, written: &WrittenStep, kind: Option<&Kind>) -> Made {
        (self.edges, self.absent) = (Vec::new(), Vec::new());
        let before = self.found.len();
        let with = match &written.with.shape {
            Shape::Map(entries) => Node::new(Shape::Map(self.entries(entries)), written.with.span),
            _ => self.node(&written.with).unwrap_or_else(|| stand_in(written.span)),
        };
        let salt = written.salt.as_ref().and_then(|salt| self.salt(salt));
        let point = self.point.clone();
        let edges = std::mem::take(&mut self.edges);
        let Some(kind) = kind else { return Made { point, ports: None, instance: None, edges } };
        let parsed = field::parse(kind, &with.to_value());
        for mut wrong in parsed.wrong {
            if let (Some(Field::Missing), Some(axis)) = (&wrong.field, self.absent.first()) {
                let help = format!("a point that `include` adds has no `{axis}`");
                wrong.help = wrong.help.or(Some(help));
            }
            self.found.push(place(wrong, &with, written));
        }
        let mut refused = self.found[before..].iter().any(|d| d.severity == Severity::Error);
        let Some(step) = parsed.step else {
            return Made { point, ports: parsed.ports, instance: None, edges };
        };
        for problem in step.check() {
            refused |= problem.severity == Severity::Error;
            let (span, label) = (span_of(&problem.path, &with, written), "refused");
            let diagnostic = match problem.severity {
                Severity::Error => Diagnostic::error(span, problem.message, label),
                Severity::Warning => Diagnostic::warning(span, problem.message, "look here"),
            };
            self.found.push(diagnostic.maybe_help(problem.help));
        }
        let instance = (!refused).then(|| self.finish(written, *kind, step, salt));
        Made { point, ports: parsed.ports, instance, edges }
    }

    /// The salt as text; `None` if the point has none or it is refused.
    fn salt(&mut self, written: &Node) -> Option<String> {
        let salt = self.node(written)?;
        if salt.shape == Shape::Null || salt == stand_in(salt.span) {
            return None;
        }
        let mut text = String::new();
        if interpolate(&salt, salt.span, &mut text).is_ok() {
            return Some(text);
        }
        let message = format!("expected text, a number or a boolean, found {}", salt.describe());
        let help = "the salt is one word of the key: change it to have the step run anew";
        self.found.push(Diagnostic::error(written.span, message, "not a salt").help(help));
        None
    }

    fn finish(
        &self,
        written: &WrittenStep,
        kind: Kind,
        step: Box<dyn Step>,
        salt: Option<String>,
    ) -> Instance {
        let given = &written.needs;
        let needs = (*given != super::written::WrittenNeeds::default()).then(|| {
            let own = step.needs();
            let named = given.named.iter().map(|(name, n, _)| (name.clone(), *n));
            Needs {
                cpu: given.cpu.unwrap_or(own.cpu),
                memory: given.memory.or(own.memory),
                gpu: given.gpu.unwrap_or(own.gpu),
                exclusive: given.exclusive.unwrap_or(own.exclusive),
                named: own.named.into_iter().chain(named).collect(),
            }
        });
        let env = written.env.iter().map(|(n, _)| (n.clone(), self.settings.env.get(n).cloned()));
        Instance {
            id: StepId::new(&written.name, &self.point),
            step: written.name.clone(),
            point: self.point.clone(),
            kind,
            ports: step.ports(),
            parsed: step,
            env: env.collect(),
            salt,
            policy: Policy {
                needs,
                gpu: given.gpu,
                retry: written.retry,
                timeout: written.timeout,
                checkpoint: written.checkpoint,
                secrets: written.secrets.iter().map(|(n, _)| n.clone()).collect(),
            },
            span: written.span,
        }
    }

    /// A node with its references replaced; `None` if it reads an axis that the point lacks.
    fn node(&mut self, node: &Node) -> Option<Node> {
        let shape = match &node.shape {
            Shape::Text(_) => return self.text(node),
            Shape::List(items) => {
                Shape::List(items.iter().filter_map(|item| self.kept(item)).collect())
            }
            Shape::Map(entries) => {
                let kept = self.entries(entries);
                // `lora: { r: "${sweep.r}" }` is nothing without its axis.
                if kept.is_empty() && !entries.is_empty() {
                    return None;
                }
                Shape::Map(kept)
            }
            plain => plain.clone(),
        };
        Some(Node::new(shape, node.span))
    }

    /// As [`node`](Self::node); what is left out leaves no edges.
    fn kept(&mut self, node: &Node) -> Option<Node> {
        let edges = self.edges.len();
        let kept = self.node(node);
        if kept.is_none() {
            self.edges.truncate(edges);
        }
        kept
    }

    /// The entries of a map, without those that read an axis that the point lacks.
    fn entries(&mut self, entries: &[Entry]) -> Vec<Entry> {
        let kept = entries.iter().filter_map(|e| {
            let value = self.kept(&e.value)?;
            Some(Entry { key: e.key.clone(), key_span: e.key_span, value })
        });
        kept.collect()
    }

    fn text(&mut self, node: &Node) -> Option<Node> {
        let Ok(found) = pieces(node, self.names.source) else { return Some(stand_in(node.span)) };
        if let [Piece::Ref(reference, span)] = found.as_slice() {
            return self.value(reference, *span);
        }
        let mut out: Vec<Value> = Vec::new();
        let mut plain = String::new();
        for piece in &found {
            let (reference, span) = match piece {
                Piece::Plain(text) => {
                    plain.push_str(text);
                    continue;
                }
                Piece::Ref(reference, span) => (reference, *span),
            };
            let value = self.value(reference, span)?;
            let gather = matches!(reference, Reference::Gather { .. });
            if gather || value == stand_in(span) {
                return Some(stand_in(node.span));
            }
            if matches!(reference, Reference::Step { .. }) {
                out.push(Value::String(std::mem::take(&mut plain)));
                out.push(value.to_value());
            } else if let Err(diagnostic) = interpolate(&value, span, &mut plain) {
                self.found.push(diagnostic);
                return Some(stand_in(node.span));
            }
        }
        if out.is_empty() {
            return Some(Node::new(Shape::Text(plain), node.span));
        }
        out.push(Value::String(plain));
        out.retain(|piece| piece.as_str() != Some(""));
        Some(Node::from_value(&json!({ "$text": out }), node.span))
    }

    /// What a reference stands for; a stand-in where that has been reported.
    fn value(&mut self, reference: &Reference, span: Span) -> Option<Node> {
        match reference {
            Reference::Param(_) | Reference::Env(_) => {
                let value = self.names.scope.lookup(reference);
                Some(value.map_or_else(|_| stand_in(span), |n| n.moved_to(span)))
            }
            Reference::Sweep(name) => {
                if self.names.sweep.read_by(name).is_empty() {
                    return Some(stand_in(span));
                }
                match self.names.sweep.value(name, &self.point) {
                    Some(value) => Some(Node::from_value(&value, span)),
                    None if self.names.sweep.refused || self.has_axis(name) => Some(stand_in(span)),
                    None => {
                        self.absent.push(name.clone());
                        None
                    }
                }
            }
            Reference::Step { step, port } => {
                let binding = self.step_output(step, port.as_deref(), span);
                let node = binding.map(|b| Node::from_value(&json!({ "$input": b }), span));
                Some(node.unwrap_or_else(|| stand_in(span)))
            }
            Reference::Gather { step } => {
                let members = self.members(step);
                let value = members.map(|m| json!({ "$gather": { "members": m } }));
                Some(value.map_or_else(|| stand_in(span), |v| Node::from_value(&v, span)))
            }
        }
    }

    /// Whether the point has the axis that a reference reads or reaches into.
    fn has_axis(&self, name: &str) -> bool {
        self.names.sweep.read_by(name).iter().any(|axis| self.point.contains_key(axis))
    }

    fn edge(&mut self, step: usize, instance: usize, port: Option<&str>) -> usize {
        self.edges.push(Read { step, instance, port: port.map(str::to_owned) });
        self.edges.len() - 1
    }

    /// The edge to the instance at this point.
    fn step_output(&mut self, step: &str, port: Option<&str>, span: Span) -> Option<Binding> {
        let &index = self.names.index.get(step)?;
        let here = project(&self.point, &self.names.steps[index].axes);
        let instance = self.made[index].iter().position(|m| m.point == here)?;
        let ports = self.made[index][instance].ports.clone()?;
        let mut ty = ports.ty;
        let mut names = ports.names;
        if let Some(port) = port {
            if let Some(names) = names.as_ref().filter(|names| !names.iter().any(|n| n == port)) {
                let message = format!("step `{step}` has no port `{port}`");
                let label = format!("not a port of this {ty}");
                let wrong = Diagnostic::error(span, message, label);
                let help = near(port, names.iter().map(String::as_str));
                self.found.push(wrong.maybe_help(help));
                return None;
            }
            ty = ty.of_port(port);
            names = Some(vec![port.to_owned()]);
        }
        let edge = Some(self.edge(index, instance, port));
        Some(Binding { ty, edge, names, ports: None, facts: None })
    }

    /// The edges to all instances, sorted by coordinates.
    fn members(&mut self, step: &str) -> Option<Vec<Member>> {
        let &index = self.names.index.get(step)?;
        let made = &self.made[index];
        let mut order: Vec<usize> = (0..made.len()).collect();
        order.sort_by(|&a, &b| by_coordinates(&made[a].point, &made[b].point));
        let mut members = Vec::with_capacity(order.len());
        for instance in order {
            let ports = made[instance].ports.clone()?;
            let edge = Some(self.edge(index, instance, None));
            let (ty, names) = (ports.ty, ports.names);
            let input = Binding { ty, edge, names, ports: None, facts: None };
            members.push(Member { point: made[instance].point.clone(), input });
        }
        (!members.is_empty()).then_some(members)
    }
}

/// Where a mistake stands.
fn place(wrong: Wrong, with: &Node, written: &WrittenStep) -> Diagnostic {
    let span = match &wrong.field {
        Some(Field::Unknown(name)) => {
            let (node, _) = locate(with, &wrong.path);
            node.entry(name).map_or(node.span, |e| e.key_span)
        }
        Some(Field::Missing) if wrong.path.is_empty() => written.span,
        Some(Field::Missing) => {
            let (node, key) = locate(with, &wrong.path);
            key.unwrap_or(node.span)
        }
        None => span_of(&wrong.path, with, written),
    };
    let message = match (&wrong.field, wrong.path.as_str()) {
        (Some(Field::Missing), "") => format!("step `{}`: {}", written.name, wrong.message),
        _ => wrong.message,
    };
    Diagnostic::error(span, message, wrong.label).maybe_help(wrong.help)
}

/// The place of a field; of the step's name for the whole.
fn span_of(path: &str, with: &Node, written: &WrittenStep) -> Span {
    if path.is_empty() {
        return written.span;
    }
    let (node, key) = locate(with, path);
    if std::ptr::eq(node, with) {
        return written.span;
    }
    // Nothing is written where a value is missing: its key is.
    if node.span.start == node.span.end { key.unwrap_or(node.span) } else { node.span }
}

/// The node that a path leads to, or the deepest that is there, with the place of its key.
fn locate<'n>(with: &'n Node, path: &str) -> (&'n Node, Option<Span>) {
    let (mut node, mut key, mut rest) = (with, None, path);
    while !rest.is_empty() {
        if let Some((index, after)) = rest.strip_prefix('[').and_then(|r| r.split_once(']')) {
            let item = index.parse::<usize>().ok().and_then(|i| node.as_list()?.get(i));
            let Some(item) = item else { break };
            (node, rest) = (item, after.strip_prefix('.').unwrap_or(after));
            continue;
        }
        // Keys may contain dots: the longest that fits.
        let ends = |n: usize| rest.len() == n || rest[n..].starts_with(['.', '[']);
        let entries = node.as_map().unwrap_or_default().iter();
        let fits = entries.filter(|e| rest.starts_with(&e.key) && ends(e.key.len()));
        let Some(entry) = fits.max_by_key(|e| e.key.len()) else { break };
        let after = &rest[entry.key.len()..];
        (node, key) = (&entry.value, Some(entry.key_span));
        rest = after.strip_prefix('.').unwrap_or(after);
    }
    (node, key)
}

//! The one constructor of [`Plan`]: names are looked up, the order found, the axes of each step
//! gathered, and every instance parsed by its kind. Everything wrong is reported together.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use petgraph::algo::tarjan_scc;
use petgraph::graph::{DiGraph, NodeIndex};

use super::instance::{Made, Maker};
use super::plan::{Instance, Plan, StepId};
use super::reference::{Piece, Reference, check_keys, near, pieces, texts};
use super::scope::Scope;
use super::sweep::{self, Sweep};
use super::written::{NEEDS, Pipeline, WrittenStep};
use super::{Settings, outputs};
use crate::source::{Diagnostic, Severity, Source, Span, nearest};
use crate::step::Kind;
use crate::yaml::Node;

/// A step with everything that names mean.
pub(super) struct Known<'a> {
    pub(super) written: &'a WrittenStep,
    pub(super) kind: Option<Kind>,
    /// Steps it reads: index, whether as a gather, and where it says so.
    reads: Vec<(usize, bool, Span)>,
    /// Axes it reads, directly or through an input.
    pub(super) axes: BTreeSet<String>,
}

/// All that instances are made from.
pub(super) struct Names<'a> {
    pub(super) source: &'a Source,
    pub(super) scope: &'a Scope<'a>,
    pub(super) sweep: &'a Sweep,
    pub(super) steps: Vec<Known<'a>>,
    pub(super) index: BTreeMap<&'a str, usize>,
}

impl Plan {
    /// Checks a pipeline.
    ///
    /// # Errors
    /// With everything that is wrong with it and all warnings, in the order of the file.
    pub fn new(
        file: &Path,
        source: Source,
        kinds: &[Kind],
        settings: &Settings,
    ) -> Result<Self, Vec<Diagnostic>> {
        let (pipeline, mut found) = Pipeline::parse(&source);
        let Some(pipeline) = pipeline else { return Err(found) };
        let checked = check(&pipeline, &source, kinds, settings, &mut found);
        found.sort_by(|a, b| {
            (a.span, a.severity, &a.message).cmp(&(b.span, b.severity, &b.message))
        });
        found.dedup_by(|a, b| a.span == b.span && a.message == b.message);
        match checked {
            Some(checked) if found.iter().all(|d| d.severity == Severity::Warning) => Ok(Self {
                name: pipeline.name.unwrap_or_else(|| name_of(file)),
                file: file.to_owned(),
                source,
                graph: checked.graph,
                points: checked.points,
                outputs: checked.outputs,
                environment: checked.environment,
                warnings: found,
            }),
            Some(_) => Err(found),
            None => {
                if found.iter().all(|d| d.severity == Severity::Warning) {
                    // Nothing may be refused without a reason.
                    let message = "this pipeline could not be checked";
                    let help = "this is a mistake of the program: please report the file";
                    let start = Span::default();
                    found.push(Diagnostic::error(start, message, "the whole file").help(help));
                }
                Err(found)
            }
        }
    }
}

/// A pipeline that gives no name is called as its file.
fn name_of(file: &Path) -> String {
    let stem = file.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    let fits = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    let name: String = stem.chars().map(|c| if fits(c) { c } else { '_' }).collect();
    if name.is_empty() { "pipeline".into() } else { name }
}

struct Checked {
    graph: DiGraph<Instance, super::plan::Edge>,
    points: Vec<super::plan::Point>,
    outputs: Vec<super::plan::Output>,
    environment: BTreeMap<String, Option<String>>,
}

fn check(
    pipeline: &Pipeline,
    source: &Source,
    kinds: &[Kind],
    settings: &Settings,
    found: &mut Vec<Diagnostic>,
) -> Option<Checked> {
    let secrets = pipeline.steps.iter().flat_map(|s| s.secrets.iter().map(|(n, _)| n.clone()));
    let scope = Scope::new(source, pipeline.params.clone(), secrets.collect(), settings);
    let cap = settings.sweep_cap;
    let sweep = match &pipeline.sweep {
        Some(entry) => sweep::read(entry, &scope, source, cap, found),
        None => Sweep::none(),
    };
    let index: BTreeMap<&str, usize> =
        pipeline.steps.iter().enumerate().map(|(i, s)| (s.name.as_str(), i)).collect();
    let steps = pipeline.steps.iter().map(|written| Known {
        written,
        kind: None,
        reads: Vec::new(),
        axes: BTreeSet::new(),
    });
    let mut names = Names { source, scope: &scope, sweep: &sweep, steps: steps.collect(), index };
    let (resources, axes_read) = (&settings.resources, BTreeSet::new());
    let mut lookup = Lookup { names: &mut names, kinds, resources, found, axes_read };
    lookup.all();
    let axes_read = lookup.axes_read;
    for (axis, span) in sweep.axes.iter().filter(|(axis, _)| !axes_read.contains(*axis)) {
        let message = format!("no step reads the axis `{axis}`");
        let warning = Diagnostic::warning(*span, message, "not read");
        found.push(warning.help(format!("read it with `${{sweep.{axis}}}`")));
    }
    let groups = order(&names, found);
    let mut made: Vec<Vec<Made>> = names.steps.iter().map(|_| Vec::new()).collect();
    for group in &groups {
        // Members of a circle have been reported; they are made last to first, each reading
        // the others as unknown.
        for &step in group {
            inherit(&mut names, step);
        }
        for &step in group {
            let mut maker = Maker::new(&names, &made, settings);
            let instances = maker.step(step);
            found.append(&mut maker.found);
            made[step] = instances;
        }
    }
    let wanted = outputs::read(&pipeline.outputs, &names, &made, found);
    let Names { steps, .. } = names;
    let graph = assemble(&steps, made, pipeline, found);
    let points = sweep.points.clone();
    drop(steps);
    let mut environment = scope.env_read();
    found.extend(scope.finish());
    let (graph, nodes) = graph?;
    environment.extend(graph.node_weights().flat_map(|instance| instance.env.clone()));
    let outputs = wanted.into_iter().map(|o| o.at(&nodes)).collect::<Option<Vec<_>>>()?;
    Some(Checked { graph, points, outputs, environment })
}

/// Axes flow along edges, but not through a gather.
fn inherit(names: &mut Names<'_>, step: usize) {
    let inherited: Vec<String> = names.steps[step]
        .reads
        .iter()
        .filter(|(_, gather, _)| !gather)
        .flat_map(|(read, ..)| names.steps[*read].axes.iter().cloned())
        .collect();
    names.steps[step].axes.extend(inherited);
}

/// Looks names up, once for each place in the file.
struct Lookup<'n, 'a> {
    names: &'n mut Names<'a>,
    kinds: &'n [Kind],
    resources: &'n BTreeSet<String>,
    found: &'n mut Vec<Diagnostic>,
    axes_read: BTreeSet<String>,
}

impl Lookup<'_, '_> {
    fn all(&mut self) {
        for step in 0..self.names.steps.len() {
            let written = self.names.steps[step].written;
            if let Some((name, span)) = &written.kind {
                self.names.steps[step].kind = self.kinds.iter().find(|k| k.name == name).copied();
                if self.names.steps[step].kind.is_none() {
                    let help = near(name, self.kinds.iter().map(|k| k.name));
                    let wrong = format!("unknown kind `{name}`");
                    let wrong = Diagnostic::error(*span, wrong, "not a kind of step");
                    self.found.push(wrong.maybe_help(help));
                }
            }
            for (name, span) in &written.env {
                if self.names.scope.is_secret(name) {
                    let message = format!("`{name}` is a secret: its value cannot be in the key");
                    let help = "name it under `secrets` only, in each step that needs it; the \
                                step sees it all the same";
                    self.found.push(Diagnostic::error(*span, message, "a secret").help(help));
                }
            }
            self.resources(written);
            check_keys(&written.with, self.found);
            self.node(step, &written.with, true);
            if let Some(salt) = &written.salt {
                self.node(step, salt, false);
            }
        }
    }

    /// A step can only need what there is.
    fn resources(&mut self, written: &WrittenStep) {
        for (name, _, span) in &written.needs.named {
            if self.resources.contains(name) {
                continue;
            }
            let known = NEEDS.into_iter().chain(self.resources.iter().map(String::as_str));
            let help = nearest(name, known).map_or_else(
                || format!("say how many there are in `flow.toml`: `[resources]`, `{name} = 1`"),
                |name| format!("did you mean `{name}`?"),
            );
            let message = format!("there is no resource `{name}`");
            let wrong = Diagnostic::error(*span, message, "not a resource");
            self.found.push(wrong.help(help));
        }
    }

    fn node(&mut self, step: usize, node: &Node, edges: bool) {
        let mut nodes = Vec::new();
        texts(node, &mut |n| nodes.push(n));
        for text in nodes {
            let found = match pieces(text, self.names.source) {
                Ok(found) => found,
                Err(wrong) => {
                    self.found.extend(wrong);
                    continue;
                }
            };
            let alone = found.len() == 1;
            for piece in &found {
                if let Piece::Ref(reference, span) = piece {
                    self.reference(step, reference, *span, edges, alone);
                }
            }
        }
    }

    fn reference(&mut self, at: usize, it: &Reference, span: Span, edges: bool, alone: bool) {
        match it {
            Reference::Param(path) => self.names.scope.check_param(path, span),
            Reference::Env(name) => self.names.scope.check_env(name, span),
            Reference::Sweep(name) => {
                let axes = self.names.sweep.read_by(name);
                if axes.is_empty() {
                    let known = &self.names.sweep.axes;
                    let help = match near(name, known.keys().map(String::as_str)) {
                        None => "this pipeline has no sweep".to_owned(),
                        Some(help) => help,
                    };
                    let message = format!("unknown axis `{name}`");
                    let wrong = Diagnostic::error(span, message, "not an axis of the sweep");
                    self.found.push(wrong.help(help));
                } else {
                    self.found.extend(self.names.sweep.dead_end(name, span));
                }
                self.axes_read.extend(axes.iter().cloned());
                self.names.steps[at].axes.extend(axes);
            }
            Reference::Step { step, .. } | Reference::Gather { step } => {
                let gather = matches!(it, Reference::Gather { .. });
                if !edges {
                    let message = "a step cannot be referenced here";
                    let help = "edges are made in `with`";
                    self.found.push(Diagnostic::error(span, message, "not here").help(help));
                } else if gather && !alone {
                    let message = "a gather cannot stand inside text";
                    let help = "let `${steps.name.*}` be the whole value";
                    self.found.push(Diagnostic::error(span, message, "not here").help(help));
                } else if let Some(&read) = self.names.index.get(step.as_str()) {
                    self.names.steps[at].reads.push((read, gather, span));
                } else {
                    self.found.push(unknown_step(step, span, &self.names.index));
                }
            }
        }
    }
}

/// A reference to a step that is not there.
pub(super) fn unknown_step(name: &str, span: Span, index: &BTreeMap<&str, usize>) -> Diagnostic {
    let message = format!("unknown step `{name}`");
    let wrong = Diagnostic::error(span, message, "not a step of this pipeline");
    wrong.maybe_help(near(name, index.keys().copied()))
}

/// Steps in an order in which what is read comes first; members of a circle, which is reported,
/// come as one group.
fn order(names: &Names<'_>, found: &mut Vec<Diagnostic>) -> Vec<Vec<usize>> {
    let mut graph: DiGraph<usize, ()> = DiGraph::new();
    let nodes: Vec<NodeIndex> = (0..names.steps.len()).map(|i| graph.add_node(i)).collect();
    for (i, step) in names.steps.iter().enumerate() {
        for (read, ..) in &step.reads {
            graph.update_edge(nodes[i], nodes[*read], ());
        }
    }
    // Edges run from the reader to what it reads, so components come in the order of running.
    let mut groups = Vec::new();
    for component in tarjan_scc(&graph) {
        let mut members: Vec<usize> = component.into_iter().map(|n| graph[n]).collect();
        members.sort_unstable();
        let reads_itself = |&i: &usize| names.steps[i].reads.iter().any(|(read, ..)| *read == i);
        if members.len() > 1 || members.iter().any(reads_itself) {
            found.push(circle(names, &members));
        }
        groups.push(members);
    }
    groups
}

/// The shortest way round from the first member, told in the order in which data would flow.
fn circle(names: &Names<'_>, members: &[usize]) -> Diagnostic {
    let start = members[0];
    let mut came_from: BTreeMap<usize, usize> = BTreeMap::new();
    let mut queue = std::collections::VecDeque::from([start]);
    'search: while let Some(at) = queue.pop_front() {
        for &(read, ..) in &names.steps[at].reads {
            if members.contains(&read) && !came_from.contains_key(&read) {
                came_from.insert(read, at);
                if read == start {
                    break 'search;
                }
                queue.push_back(read);
            }
        }
    }
    // `came_from` leads from what is read to its reader, which is how data flows.
    let mut way = vec![start];
    while let Some(&next) = way.last().and_then(|last| came_from.get(last)) {
        way.push(next);
        if next == start {
            break;
        }
    }
    let told: Vec<&str> = way.iter().map(|&i| names.steps[i].written.name.as_str()).collect();
    let before = way.get(way.len().saturating_sub(2)).copied().unwrap_or(start);
    let reads = &names.steps[start].reads;
    let span = reads.iter().find(|(read, ..)| *read == before).map(|(.., span)| *span);
    let span = span.unwrap_or(names.steps[start].written.span);
    let message = format!("steps read each other in a cycle: {}", told.join(" -> "));
    Diagnostic::error(span, message, "closes the cycle")
        .help("a step can only read steps that do not depend on it")
}

type Nodes = Vec<Vec<NodeIndex>>;

/// The graph, if every instance could be made.
fn assemble(
    steps: &[Known<'_>],
    made: Vec<Vec<Made>>,
    pipeline: &Pipeline,
    found: &mut Vec<Diagnostic>,
) -> Option<(DiGraph<Instance, super::plan::Edge>, Nodes)> {
    let mut graph = DiGraph::new();
    let mut nodes: Nodes = Vec::with_capacity(made.len());
    let mut edges = Vec::new();
    let mut ids: BTreeSet<StepId> = BTreeSet::new();
    let mut complete = true;
    for (step, instances) in made.into_iter().enumerate() {
        complete &= !instances.is_empty();
        let mut of_step = Vec::with_capacity(instances.len());
        for one in instances {
            let Some(instance) = one.instance else {
                complete = false;
                continue;
            };
            if !ids.insert(instance.id.clone()) {
                let span = pipeline.sweep.as_ref().map_or(steps[step].written.span, |s| s.key_span);
                let message = format!("two points have the same name `{}`", instance.id);
                let wrong = Diagnostic::error(span, message, "not told apart");
                found.push(wrong.help("use one spelling: either text or number"));
            }
            let node = graph.add_node(instance);
            of_step.push(node);
            edges.push((node, one.edges));
        }
        nodes.push(of_step);
    }
    if !complete {
        return None;
    }
    for (node, reads) in edges {
        for (index, read) in reads.into_iter().enumerate() {
            let edge = super::plan::Edge { index, port: read.port };
            graph.add_edge(nodes[read.step][read.instance], node, edge);
        }
    }
    Some((graph, nodes))
}

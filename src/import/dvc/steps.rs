//! From stages to steps: a matrix becomes an axis of the sweep where all of its stages are one step
//! but for their values, and else a step for each.

use std::collections::{BTreeMap, BTreeSet};

use super::links::Links;
use super::path::Place;
use super::stage::{Out, Stage};
use super::template::{Name, Text, escape};
use super::values::python_text;
use crate::yaml::Node;

/// Points that a sweep has without a cap of its own.
const MOST_POINTS: usize = 256;

/// A step of the pipeline.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Step {
    pub(super) name: String,
    /// What DVC calls it, if that is another name.
    pub(super) stage: Option<String>,
    pub(super) notes: Vec<String>,
    pub(super) env: Vec<String>,
    pub(super) run: String,
    /// References by name.
    pub(super) inputs: Vec<(String, String)>,
    /// Local files by the path that the command sees.
    pub(super) files: Vec<(String, String)>,
    /// Paths by name.
    pub(super) outputs: Vec<(String, String)>,
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Steps {
    pub(super) steps: Vec<Step>,
    pub(super) sweep: BTreeMap<String, Vec<Node>>,
    /// Parameters that are referred to, by path.
    pub(super) params: BTreeSet<String>,
}

/// Where an input comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Source {
    Stage(usize, usize),
    Matrix(usize, usize),
}

/// A step before steps have names.
#[derive(Debug, Clone, PartialEq)]
struct Draft {
    run: String,
    env: Vec<String>,
    sources: BTreeSet<Source>,
    files: BTreeSet<Place>,
    /// What the output is called after, and its path.
    outs: Vec<(String, String)>,
}

/// A matrix that may become part of the sweep.
#[derive(Debug, Clone)]
struct Matrix {
    stages: Vec<usize>,
    axes: BTreeMap<String, Vec<Node>>,
}

struct Planner<'a> {
    stages: &'a [Stage],
    links: &'a Links,
    /// Parameters from which paths are made: with other values the paths would be wrong.
    fixed: BTreeSet<String>,
    matrices: BTreeMap<usize, Matrix>,
    params: BTreeSet<String>,
}

/// Makes the steps. `way` leads from the pipeline's folder to that of `dvc.yaml`.
pub(super) fn make(stages: &[Stage], links: &Links, way: &str) -> Steps {
    let names = stages.iter().flat_map(|s| &s.path_texts).flat_map(Text::names);
    let fixed = names.filter_map(|name| match name {
        Name::Param(path) => Some(path.clone()),
        Name::Axis(_) => None,
    });
    let mut planner = Planner {
        stages,
        links,
        fixed: fixed.collect(),
        matrices: matrices(stages),
        params: BTreeSet::new(),
    };
    while planner.unfold() {}
    planner.params.clear();
    planner.finish(way)
}

/// The matrices whose values can be axes, by number.
fn matrices(stages: &[Stage]) -> BTreeMap<usize, Matrix> {
    let mut found: BTreeMap<usize, Matrix> = BTreeMap::new();
    for (index, stage) in stages.iter().enumerate() {
        let Some((number, point)) = &stage.matrix else { continue };
        let entry = found.entry(*number);
        let matrix = entry.or_insert_with(|| Matrix { stages: Vec::new(), axes: BTreeMap::new() });
        matrix.stages.push(index);
        for (axis, value) in point {
            let values = matrix.axes.entry(axis.clone()).or_default();
            if !values.iter().any(|v| python_text(v) == python_text(value)) {
                values.push(value.clone());
            }
        }
    }
    let fits = |axis: &String| {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
        !axis.is_empty() && axis.chars().all(plain)
    };
    let mut taken: BTreeMap<String, Vec<String>> = BTreeMap::new();
    found.retain(|_, matrix| {
        let product: usize = matrix.axes.values().map(Vec::len).product();
        let texts = |values: &[Node]| values.iter().map(python_text).collect::<Vec<_>>();
        let good = product == matrix.stages.len()
            && matrix.axes.keys().all(fits)
            && !matrix.stages.iter().any(|&s| stages[s].frozen)
            && matrix
                .axes
                .iter()
                .all(|(axis, values)| taken.get(axis).is_none_or(|other| *other == texts(values)));
        if good {
            taken.extend(matrix.axes.iter().map(|(axis, v)| (axis.clone(), texts(v))));
        }
        good
    });
    found
}

impl Planner<'_> {
    /// Takes a matrix out of the sweep that does not fit it; `false` when all of them fit.
    fn unfold(&mut self) -> bool {
        let axes: BTreeMap<&String, usize> =
            self.matrices.values().flat_map(|m| &m.axes).map(|(a, v)| (a, v.len())).collect();
        if axes
            .values()
            .try_fold(1_usize, |n, len| n.checked_mul(*len))
            .is_none_or(|n| n > MOST_POINTS)
        {
            return self.matrices.pop_last().is_some();
        }
        let mut bad = None;
        'all: for (&number, matrix) in &self.matrices.clone() {
            let mut first: Option<Draft> = None;
            for &stage in &matrix.stages {
                match (self.draft(stage, Some(number)), &first) {
                    (Some(draft), None) => first = Some(draft),
                    (Some(draft), Some(other)) if draft == *other => {}
                    _ => {
                        bad = Some(number);
                        break 'all;
                    }
                }
            }
        }
        // A stage outside the sweep cannot read one point of it.
        let outside = (0..self.stages.len()).filter(|&s| self.folded(s).is_none());
        let read = outside.flat_map(|s| self.links.sources[s].iter().map(|(made, _)| *made));
        let bad = bad.or_else(|| read.filter_map(|s| self.folded(s)).next());
        bad.is_some_and(|number| self.matrices.remove(&number).is_some())
    }

    /// The matrix of the sweep that a stage is a point of.
    fn folded(&self, stage: usize) -> Option<usize> {
        let (number, _) = self.stages[stage].matrix.as_ref()?;
        self.matrices.contains_key(number).then_some(*number)
    }

    fn point(&self, stage: usize) -> BTreeMap<&str, String> {
        let point = self.stages[stage].matrix.iter().flat_map(|(_, point)| point);
        point.map(|(axis, value)| (axis.as_str(), python_text(value))).collect()
    }

    /// A stage as a step; as a point of the sweep, `None` if it cannot be one.
    fn draft(&mut self, index: usize, sweep: Option<usize>) -> Option<Draft> {
        let (stage, links) = (&self.stages[index], self.links);
        let mut sources = BTreeSet::new();
        for &(made, out) in &links.sources[index] {
            let Some(other) = self.folded(made) else {
                sources.insert(Source::Stage(made, out));
                continue;
            };
            let here = self.point(index);
            let same = |(axis, value): (&str, String)| here.get(axis) == Some(&value);
            if sweep.is_none() || !self.point(made).into_iter().all(same) {
                return None;
            }
            sources.insert(Source::Matrix(other, out));
        }
        let axes = sweep.and_then(|number| self.matrices.get(&number)).map(|m| m.axes.clone());
        let axes = axes.unwrap_or_default();
        let fixed = &self.fixed;
        let mut params = BTreeSet::new();
        let mut keep = |name: &Name| match name {
            Name::Axis(axis) => axes.contains_key(axis),
            Name::Param(path) => {
                let holds = |a: &str, b: &str| a == b || a.starts_with(&format!("{b}."));
                let free = !fixed.iter().any(|f| holds(path, f) || holds(f, path));
                if free {
                    params.insert(path.clone());
                }
                free
            }
        };
        let run = run(stage, &links.folder, &mut keep);
        let outs: Option<Vec<_>> =
            stage.outs.iter().map(|out| named(out, &links.folder, sweep.is_some())).collect();
        self.params.extend(params);
        let mut env = BTreeSet::new();
        stage.commands.iter().for_each(|command| variables(&command.literal(), &mut env));
        let (env, files) = (env.into_iter().collect(), links.files[index].clone());
        Some(Draft { run, env, sources, files, outs: outs? })
    }

    fn finish(mut self, way: &str) -> Steps {
        let mut done = BTreeSet::new();
        let mut drafts: Vec<(usize, Option<usize>, Draft)> = Vec::new();
        for index in 0..self.stages.len() {
            let folded = self.folded(index);
            if self.stages[index].frozen || folded.is_some_and(|number| !done.insert(number)) {
                continue;
            }
            if let Some(draft) = self.draft(index, folded) {
                drafts.push((index, folded, draft));
            }
        }
        let mut taken = BTreeSet::new();
        let mut names: BTreeMap<Source, (String, String)> = BTreeMap::new();
        let mut steps = Vec::new();
        for (index, folded, draft) in &drafts {
            let stage = &self.stages[*index];
            let own = match folded {
                Some(_) => stage.name.split('@').next().unwrap_or_default(),
                None => stage.name.as_str(),
            };
            let name = unique(step_name(own), &mut taken);
            let mut step =
                Step { run: draft.run.clone(), env: draft.env.clone(), ..Step::default() };
            step.stage = (name != own).then(|| own.to_owned());
            step.notes = stage.notes.iter().chain(&self.links.notes[*index]).cloned().collect();
            step.name.clone_from(&name);
            let mut ports = BTreeSet::new();
            for (out, (stem, path)) in draft.outs.iter().enumerate() {
                let again = draft.outs.iter().filter(|(other, _)| other == stem).count() > 1;
                let port = if again { identifier(path) } else { stem.clone() };
                let port = unique(port, &mut ports);
                step.outputs.push((port.clone(), path.clone()));
                let source = folded.map_or(Source::Stage(*index, out), |n| Source::Matrix(n, out));
                names.insert(source, (name.clone(), port));
            }
            if step.outputs.is_empty() {
                step.outputs.push(("ran".to_owned(), RAN.to_owned()));
                step.notes.push("it writes no file; `ran` says that it ran".to_owned());
            }
            steps.push(step);
        }
        let prefix = if way.is_empty() { String::new() } else { format!("{way}/") };
        for (step, (.., draft)) in steps.iter_mut().zip(&drafts) {
            let from: Vec<&(String, String)> =
                draft.sources.iter().filter_map(|source| names.get(source)).collect();
            let mut taken = BTreeSet::new();
            for (made, port) in &from {
                let several = from.iter().filter(|(other, _)| other == made).count() > 1;
                let name = if several { format!("{made}_{port}") } else { made.clone() };
                let reference = format!("${{steps.{made}.{port}}}");
                step.inputs.push((unique(name, &mut taken), reference));
            }
            for place in &draft.files {
                let from = match place.is_absolute() {
                    true => place.text(),
                    false => format!("{prefix}{}", place.text()),
                };
                step.files.push((place.below(&self.links.folder), from));
            }
        }
        let sweep = self.matrices.into_values().flat_map(|m| m.axes).collect();
        Steps { steps, sweep, params: self.params }
    }
}

/// What a step without outputs leaves.
const RAN: &str = ".ran";

/// The text of `run`: each command in a shell of its own, as DVC has it.
fn run(stage: &Stage, folder: &[String], keep: &mut impl FnMut(&Name) -> bool) -> String {
    let dir = stage.wdir.below(folder);
    let texts: Vec<String> = stage.commands.iter().map(|text| text.reference(keep)).collect();
    if let ([text], ".", false) = (texts.as_slice(), dir.as_str(), stage.outs.is_empty()) {
        return text.clone();
    }
    let enter = match dir.as_str() {
        "." => String::new(),
        dir => format!("mkdir -p {dir} && cd {dir} || exit\n"),
    };
    let mut script: String =
        texts.iter().map(|text| format!("(\n{enter}{text}\n) || exit\n")).collect();
    if stage.outs.is_empty() {
        script += &format!("echo yes > {RAN}\n");
    }
    script
}

/// What an output is called after, and its path; `None` where the path of a point of the sweep
/// cannot be written as one.
fn named(out: &Out, folder: &[String], sweep: bool) -> Option<(String, String)> {
    let axes = out.text.names().any(|name| matches!(name, Name::Axis(_)));
    let literal = out.place.below(folder);
    if !sweep || !axes {
        return Some((stem(&literal), escape(&literal)));
    }
    if out.text.literal().trim_end_matches('/') != literal {
        return None;
    }
    let path = out.text.reference(&mut |name| matches!(name, Name::Axis(_)));
    let mut plain = path.clone();
    for name in out.text.names() {
        if let Name::Axis(axis) = name {
            plain = plain.replace(&format!("${{sweep.{axis}}}"), "");
        }
    }
    Some((stem(&plain), path.trim_end_matches('/').to_owned()))
}

fn stem(path: &str) -> String {
    let name = path.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
    identifier(name.split('.').find(|part| !part.is_empty()).unwrap_or_default())
}

/// Letters, digits and `_`, no digit first.
fn identifier(text: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
    let name: String = text.chars().map(plain).collect();
    let name = name.trim_matches('_');
    match name.chars().next() {
        None => "out".to_owned(),
        Some(c) if c.is_ascii_digit() => format!("out_{name}"),
        Some(_) => name.to_owned(),
    }
}

fn step_name(stage: &str) -> String {
    let name = stage.to_ascii_lowercase().replace(|c: char| !c.is_ascii_alphanumeric(), "_");
    let name = name.trim_matches('_');
    match name.chars().next() {
        Some(c) if c.is_ascii_lowercase() => name.to_owned(),
        _ => format!("stage_{name}").trim_end_matches('_').to_owned(),
    }
}

fn unique(name: String, taken: &mut BTreeSet<String>) -> String {
    let numbered = (2..).map(|n| format!("{name}_{n}"));
    let free = std::iter::once(name.clone()).chain(numbered).find(|n| !taken.contains(n));
    let name = free.unwrap_or(name);
    taken.insert(name.clone());
    name
}

/// What a shell has without being told.
const KNOWN: [&str; 12] = [
    "PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "PWD", "OLDPWD", "IFS", "OPTARG", "OPTIND", "PPID",
    "RANDOM",
];

/// Variables that a command reads and does not set.
fn variables(command: &str, out: &mut BTreeSet<String>) {
    let starts = |c: char| c.is_ascii_alphabetic() || c == '_';
    let name = |text: &str| -> String {
        text.chars().take_while(|&c| starts(c) || c.is_ascii_digit()).collect()
    };
    let mut quoted = false;
    let mut double = false;
    let mut rest = command;
    while let Some(c) = rest.chars().next() {
        rest = &rest[c.len_utf8()..];
        match c {
            '\\' if !quoted => {
                let mut after = rest.chars();
                after.next();
                rest = after.as_str();
            }
            '\'' if !double => quoted = !quoted,
            '"' if !quoted => double = !double,
            '$' if !quoted => {
                let name = name(rest.strip_prefix('{').unwrap_or(rest));
                let word = format!("{name}=");
                let set = command.match_indices(&word).any(|(at, _)| {
                    command[..at].chars().next_back().is_none_or(|c| " \t;(&|".contains(c))
                });
                let read = [format!("for {name} "), format!("read {name}")];
                let is_set = set || read.iter().any(|text| command.contains(text.as_str()));
                if name.starts_with(starts) && !is_set && !KNOWN.contains(&name.as_str()) {
                    out.insert(name);
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_of_commands() {
        let of = |command: &str| {
            let mut out = BTreeSet::new();
            variables(command, &mut out);
            out.into_iter().collect::<Vec<_>>().join(" ")
        };
        assert_eq!(of("echo $A ${B:-x} $HOME $1 '$C' \"$D\" \\$E $$ \"'$F'\""), "A B D F");
        assert_eq!(of("X=1 y $X; for f in *; do echo $f; done; read g; echo $g"), "");
        assert_eq!(of("echo é\\é $A $"), "A");
    }

    #[test]
    fn names() {
        assert_eq!(step_name("Train@LR-0.1"), "train_lr_0_1");
        assert_eq!(step_name("1st"), "stage_1st");
        assert_eq!(step_name("@"), "stage");
        assert_eq!(stem("data/prepared.csv"), "prepared");
        assert_eq!(stem("models/.bin"), "bin");
        assert_eq!(stem("x/2024"), "out_2024");
        let mut taken = BTreeSet::new();
        let names = ["a", "a", "a_2"].map(|n| unique(n.to_owned(), &mut taken));
        assert_eq!(names, ["a", "a_2", "a_2_2"]);
    }
}

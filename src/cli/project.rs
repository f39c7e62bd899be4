//! The project that a pipeline belongs to, and its settings in `flow.toml`.
//!
//! ```toml
//! store = "/scratch/flow"      # paths are relative to this file
//! outputs = "results"
//! jobs = 8
//! [resources]
//! memory = "24GiB"             # what may be lent to steps; all of the machine's by default
//! gpu = 2                      # the first so many; all that there are by default
//! licence = 2                  # anything else that there is only so much of
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::Stage;
use super::environment::{Environment, project_root};
use super::error::Failure;
use crate::engine::{Gpu, Options, memory_bytes};
use crate::pipeline::bytes;
use crate::source::{Diagnostic, Fault, Source, Span, suggest};

/// A project's folder, and what its `flow.toml` says.
#[derive(Debug)]
pub(super) struct Project {
    root: PathBuf,
    store: Option<PathBuf>,
    /// The folder in which results appear.
    pub(super) outputs: PathBuf,
    jobs: Option<usize>,
    memory: Option<u64>,
    gpus: Option<u32>,
    /// Named resources.
    pub(super) resources: BTreeMap<String, u64>,
}

impl Project {
    /// The project of a folder; without a `flow.toml`, one with the settings that are usual.
    pub(super) fn of(folder: &Path) -> Result<Self, Failure> {
        let root = project_root(folder);
        let path = root.join("flow.toml");
        match std::fs::read_to_string(&path) {
            Ok(text) => {
                let source = Source::new(path.display().to_string(), text);
                Self::read(root, &source).map_err(|wrong| Failure::Pipeline(source, wrong))
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Self::plain(root)),
            Err(e) => {
                let fault = Fault::new(format!("cannot read {}", path.display()));
                Err(Failure::Usage(fault.cause(e).into()))
            }
        }
    }

    fn plain(root: PathBuf) -> Self {
        let (outputs, resources) = (root.join("outputs"), BTreeMap::new());
        Self { root, store: None, outputs, jobs: None, memory: None, gpus: None, resources }
    }

    fn read(root: PathBuf, source: &Source) -> Result<Self, Vec<Diagnostic>> {
        let table = DeTable::parse(&source.text).map_err(|e| {
            let span = e.span().map_or(Span::default(), |s| Span::new(s.start, s.end));
            let line = e.message().lines().next().unwrap_or_default();
            vec![Diagnostic::error(span, format!("not valid TOML: {line}"), "here")]
        })?;
        let (mut project, mut wrong) = (Self::plain(root), Vec::new());
        for (key, value) in table.get_ref() {
            let path = || value.get_ref().as_str().map(|path| project.root.join(path));
            match key.get_ref().as_ref() {
                "store" => match path() {
                    Some(path) => project.store = Some(path),
                    None => wrong.push(expected(value, "a folder", "store = \".flow\"")),
                },
                "outputs" => match path() {
                    Some(path) => project.outputs = path,
                    None => wrong.push(expected(value, "a folder", "outputs = \"outputs\"")),
                },
                "jobs" => match whole(value).and_then(|n| usize::try_from(n).ok()) {
                    Some(n) if n > 0 => project.jobs = Some(n),
                    _ => wrong.push(expected(value, "a number of CPU slots", "jobs = 8")),
                },
                "resources" => match value.get_ref().as_table() {
                    Some(table) => project.resources(table, &mut wrong),
                    None => wrong.push(expected(value, "a table", "[resources]")),
                },
                name => {
                    let known = ["store", "outputs", "jobs", "resources"];
                    let message = format!("unknown setting `{name}`");
                    let found = Diagnostic::error(place(key), message, "not a setting");
                    wrong.push(found.maybe_help(suggest(name, &known)));
                }
            }
        }
        wrong.sort_by_key(|found| found.span);
        if wrong.is_empty() { Ok(project) } else { Err(wrong) }
    }

    fn resources(&mut self, table: &DeTable<'_>, wrong: &mut Vec<Diagnostic>) {
        for (key, value) in table {
            match key.get_ref().as_ref() {
                "memory" => match whole(value).or_else(|| value.get_ref().as_str().and_then(bytes))
                {
                    Some(n) => self.memory = Some(n),
                    None => wrong.push(expected(value, "a size", "memory = \"24GiB\"")),
                },
                "gpu" => match whole(value).and_then(|n| u32::try_from(n).ok()) {
                    Some(n) => self.gpus = Some(n),
                    None => wrong.push(expected(value, "a whole number", "gpu = 2")),
                },
                name @ ("cpu" | "exclusive") => {
                    let help = match name {
                        "cpu" => {
                            "say how many CPU slots there are with `jobs`, above `[resources]`"
                        }
                        _ => "it is something that a step needs, not something there is",
                    };
                    let message = format!("`{name}` cannot be declared");
                    wrong.push(Diagnostic::error(place(key), message, "not here").help(help));
                }
                name => match whole(value) {
                    Some(n) => {
                        self.resources.insert(name.to_owned(), n);
                    }
                    None => wrong.push(expected(value, "a whole number", &format!("{name} = 2"))),
                },
            }
        }
    }

    /// The store: what the command or its environment names, else what the project does.
    pub(super) fn store(&self, stage: &Stage) -> PathBuf {
        let named = stage.environment.store_dir(stage.store.as_deref());
        named.or_else(|| self.store.clone()).unwrap_or_else(|| self.root.join(".flow"))
    }

    /// What there is to lend to steps, in options that are otherwise plain.
    pub(super) fn lends(&self, environment: &Environment) -> Options {
        let (jobs, memory, resources) = (self.jobs(), self.memory(), self.resources.clone());
        let (gpus, gpus_sought) = self.gpus(environment);
        Options { jobs, memory, resources, gpus, gpus_sought, ..Options::default() }
    }

    /// CPU slots to lend to steps.
    pub(super) fn jobs(&self) -> usize {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        self.jobs.unwrap_or_else(cores)
    }

    /// GPUs to lend to steps, and where they were looked for.
    pub(super) fn gpus(&self, environment: &Environment) -> (Vec<Gpu>, String) {
        let Some(n) = self.gpus else { return environment.gpus() };
        let declared = format!("`flow.toml` says `gpu = {n}`");
        match environment.visible_gpus() {
            // The first so many of those that it may use.
            Some((mut gpus, sought)) => {
                gpus.truncate(n as usize);
                (gpus, format!("{declared}, {sought}"))
            }
            None => ((0..n).map(Gpu::Index).collect(), declared),
        }
    }

    /// Bytes of memory to lend to steps, as far as the machine says.
    pub(super) fn memory(&self) -> Option<u64> {
        self.memory.or_else(memory_bytes)
    }
}

fn place<T>(of: &Spanned<T>) -> Span {
    Span::new(of.span().start, of.span().end)
}

fn whole(value: &Spanned<DeValue<'_>>) -> Option<u64> {
    let number = value.get_ref().as_integer()?;
    u64::from_str_radix(number.as_str(), number.radix()).ok()
}

fn expected(value: &Spanned<DeValue<'_>>, what: &str, like: &str) -> Diagnostic {
    let message = format!("expected {what}, found a value of type {}", value.get_ref().type_str());
    Diagnostic::error(place(value), message, "wrong type").help(format!("like `{like}`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Project, Vec<(usize, String)>> {
        let source = Source::new("flow.toml", text);
        Project::read(PathBuf::from("/p"), &source).map_err(|wrong| {
            let told = wrong.into_iter().map(|d| {
                let help = d.help.unwrap_or_default();
                (source.position(d.span.start).0, format!("{} ({help})", d.message))
            });
            told.collect()
        })
    }

    #[test]
    fn settings_are_read() {
        let text = "store = \"/s\"\noutputs = \"out\"\njobs = 3\n\
            [resources]\ngpu = 2\nmemory = \"2GiB\"\nlicence = 0x2\n";
        let project = read(text).unwrap();
        assert_eq!(project.store.as_deref(), Some(Path::new("/s")));
        assert_eq!(project.outputs, Path::new("/p/out"));
        let environment = Environment { variables: BTreeMap::new() };
        let lent = project.lends(&environment);
        assert_eq!((lent.jobs, lent.memory), (3, Some(2 << 30)));
        assert_eq!(lent.gpus, [Gpu::Index(0), Gpu::Index(1)]);
        assert_eq!(lent.gpus_sought, "`flow.toml` says `gpu = 2`");
        let visible = |value: &str| {
            let value = ("CUDA_VISIBLE_DEVICES".to_owned(), value.to_owned());
            let lent = project.lends(&Environment { variables: BTreeMap::from([value]) });
            lent.gpus.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(visible("3,GPU-a1b2,0"), ["3", "GPU-a1b2"], "no other than it may use");
        assert!(visible("").is_empty());
        assert_eq!(lent.resources, BTreeMap::from([("licence".to_owned(), 2)]));
        let plain = read("").unwrap();
        assert_eq!((plain.store, plain.jobs), (None, None));
    }

    #[test]
    fn all_that_is_wrong_is_told_with_its_place() {
        let text =
            "stor = \"x\"\njobs = 0\n[resources]\nmemory = true\nlicence = \"two\"\ncpu = 1\n";
        let wrong = read(text).unwrap_err();
        let lines: Vec<usize> = wrong.iter().map(|(line, _)| *line).collect();
        assert_eq!(lines, [1, 2, 4, 5, 6]);
        assert_eq!(wrong[0].1, "unknown setting `stor` (did you mean `store`?)");
        assert!(wrong[3].1.contains("like `licence = 2`"), "{wrong:?}");
        let wrong = read("jobs = \n").unwrap_err();
        assert!(wrong[0].0 == 1 && wrong[0].1.starts_with("not valid TOML: "), "{wrong:?}");
    }
}

//! `command`: any program, with declared inputs and outputs.

mod left;
mod process;
mod watch;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _, symlink};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use self::process::Job;
use crate::artifact::{Files, Type};
use crate::source::{Fault, suggest};
use crate::step::{
    Binding, Context, FileInput, Input, Outside, Ports, Problem, StepKind, Text, TextPiece,
};

/// Runs a command with declared inputs and outputs.
///
/// `run` is given to the shell in an empty working directory. In it `${steps.name}` is an edge
/// and becomes the path of a folder to read from; `${out.name}` is the path to write an output
/// to, and `${files.name}` that of a staged file. Paths are relative to the working directory, so
/// that nothing the command notes down depends on the machine. The folder of an input holds a
/// folder for each port (a dataset's splits), or the port's own files if it is one port; models,
/// tokenizers and reports are laid out flat, as their programs expect them.
///
/// With `in_place` a command works as in the folder of a project: the files of an input lie where
/// the command before wrote them, and an output is what this command leaves at the path given.
/// They are private copies, which it may change.
///
/// The environment is empty but for `PATH`, `HOME`, `LANG` and `LC_ALL` (`C.UTF-8`), `TMPDIR`,
/// the step's own `env:`, and absolute paths: `FLOW_INPUT_<name>` for `inputs`, `FLOW_OUT_<name>`
/// for `outputs`. A status other than 0 fails the step, and so does an output that is not there.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Command {
    /// What the shell is given.
    run: Text,
    /// Edges beside those in `run`, by name; they lie in `inputs/<name>`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    inputs: BTreeMap<String, Input<Files>>,
    /// Outputs by name: the file that `${out.name}` stands for, or a folder if it ends with `/`.
    outputs: BTreeMap<String, String>,
    /// Local files or folders by the name under which they lie in the working directory.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    files: BTreeMap<String, FileInput>,
    /// Inputs lie, and outputs are written, at their own paths in the working directory.
    // Not in the key where it is false, which is how commands were before there was the field.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    in_place: bool,
    /// The shell; it is given `-c` and the text.
    #[serde(default = "sh")]
    shell: String,
}

fn sh() -> String {
    "sh".to_owned()
}

impl StepKind for Command {
    const NAME: &'static str = "command";
    const VERSION: u32 = 1;

    fn ports(&self) -> Ports {
        Ports::named(Type::Files, self.outputs.keys())
    }

    fn resolve(&mut self, outside: &mut Outside<'_>) -> Result<()> {
        self.files.values_mut().try_for_each(|file| outside.file(file))
    }

    fn check(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        for (field, names) in [
            ("inputs", self.inputs.keys().collect::<Vec<_>>()),
            ("outputs", self.outputs.keys().collect()),
        ] {
            for name in names.into_iter().filter(|n| !is_name(n)) {
                let message = format!("`{name}` cannot be a name here");
                let help = "letters, digits and `_`, not a digit first, because it becomes part of \
                            a variable's name";
                problems.push(Problem::error(format!("{field}.{name}"), message).help(help));
            }
        }
        for (name, path) in &self.outputs {
            if !is_inside(path) {
                let message = format!("`{path}` is not a name below the output's folder");
                problems.push(Problem::error(format!("outputs.{name}"), message));
            }
        }
        for name in self.files.keys().filter(|n| !is_inside(n) || self.is_taken(n)) {
            let message = format!("`{name}` cannot be a name in the working directory");
            problems.push(Problem::error(format!("files.{name}"), message));
        }
        if self.in_place {
            problems.extend(self.overlaps());
        }
        if self.outputs.is_empty() {
            let message = "the command declares no output";
            let help = "what nothing can read is never reused: declare what it writes";
            problems.push(Problem::error("outputs", message).help(help));
        }
        for piece in &self.run.pieces {
            let TextPiece::Plain(text) = piece else { continue };
            if let Err(problem) = self.filled(text) {
                problems.push(problem);
            }
        }
        problems
    }

    fn isolate(&self) -> bool {
        false
    }

    fn shares_dirs(&self) -> bool {
        // There, a folder says where an input lies.
        !self.in_place
    }

    fn run(&self, cx: &mut Context<'_>) -> Result<()> {
        let work = cx.scratch_dir()?;
        let mut environment = BTreeMap::new();
        for (name, input) in &self.inputs {
            let place = match self.in_place {
                true => work.clone(),
                false => work.join("inputs").join(name),
            };
            let how = if self.in_place { Layout::InPlace } else { Layout::Folder };
            lay_out(cx, &input.binding, &place, how)
                .with_context(|| format!("laying out input `{name}`"))?;
            environment.insert(format!("FLOW_INPUT_{name}"), text(&place)?);
        }
        for (name, file) in &self.files {
            stage(cx, &file.path, &work.join(name), self.in_place)
                .with_context(|| format!("staging `{name}`"))?;
        }
        for (name, path) in &self.outputs {
            let out = if self.in_place { work.clone() } else { cx.out_dir(name)? };
            let to = out.join(path);
            if self.in_place && to.symlink_metadata().is_ok() {
                let place = format!("where output `{name}` is to be written: `{path}`");
                return Err(Fault::new(format!("an input lies {place}")).into());
            }
            let folder = if path.ends_with('/') { Some(to.as_path()) } else { to.parent() };
            folder.map(|folder| cx.make_dir(folder)).transpose()?;
            environment.insert(format!("FLOW_OUT_{name}"), text(&to)?);
        }
        let mut script = String::new();
        let mut edges = 0;
        for piece in &self.run.pieces {
            match piece {
                TextPiece::Plain(text) => {
                    script += &self.filled(text).map_err(|p| anyhow::anyhow!(p.message))?;
                }
                TextPiece::Edge(binding) => {
                    edges += 1;
                    let place = format!("inputs/{edges}");
                    lay_out(cx, binding, &work.join(&place), Layout::Folder)
                        .context("laying out an input")?;
                    script += &place;
                }
            }
        }
        environment.insert("TMPDIR".into(), text(&cx.attempt_dir)?);
        environment.extend(cx.env.clone());
        cx.dirs.only_made().context("removing what an earlier attempt left")?;
        let job = Job { shell: &self.shell, script: &script, dir: &work, environment };
        process::run(&job, cx)?;
        for (name, path) in &self.outputs {
            let from = work.join(path);
            if self.in_place && from.symlink_metadata().is_ok() {
                let to = cx.out_dir(name)?.join(path);
                to.parent().map(fs::create_dir_all).transpose()?;
                fs::rename(&from, &to).with_context(|| format!("taking output `{name}`"))?;
            }
            self.require(cx, name, path)?;
        }
        Ok(())
    }
}

impl Command {
    /// Text with `${out.name}` and `${files.name}` replaced by paths.
    fn filled(&self, text: &str) -> Result<String, Problem> {
        let mut filled = String::with_capacity(text.len());
        let mut rest = text;
        while let Some(start) = rest.find("${") {
            let Some(length) = rest[start..].find('}') else { break };
            let inner = &rest[start + 2..start + length];
            filled += &rest[..start];
            let (root, name) = inner.split_once('.').unwrap_or((inner, ""));
            let known: Vec<&str> = match root {
                "out" => self.outputs.keys().map(String::as_str).collect(),
                "files" => self.files.keys().map(String::as_str).collect(),
                _ => Vec::new(),
            };
            match root {
                // The attempt's outputs lie beside its working directory.
                "out" if known.contains(&name) => {
                    let path = self.outputs[name].trim_end_matches('/');
                    match self.in_place {
                        true => filled += path,
                        false => filled += &format!("../out/{name}/{path}"),
                    }
                }
                "files" if known.contains(&name) => filled += name,
                "out" | "files" => {
                    let field = if root == "out" { "outputs" } else { "files" };
                    let message = format!("`${{{inner}}}` is not declared under `{field}`");
                    let help = suggest(name, &known);
                    let problem = Problem::error("run", message);
                    return Err(problem.help(help.unwrap_or_else(|| "declare it there".into())));
                }
                // The shell's own `${VARIABLE}`, in which there may be a reference.
                _ => {
                    filled += "${";
                    rest = &rest[start + 2..];
                    continue;
                }
            }
            rest = &rest[start + length + 1..];
        }
        Ok(filled + rest)
    }

    /// Outputs that hold each other or a file that was staged: what would be taken first?
    fn overlaps(&self) -> Vec<Problem> {
        let holds = |a: &str, b: &str| Path::new(b).starts_with(a) || Path::new(a).starts_with(b);
        let mut problems = Vec::new();
        for (name, path) in &self.outputs {
            let others = self.outputs.iter().filter(|(other, _)| *other > name).map(|(_, p)| p);
            for other in others.chain(self.files.keys()).filter(|other| holds(path, other)) {
                let message = format!("output `{path}` and `{other}` lie in each other");
                let help = "with `in_place` an output is a path of its own";
                problems.push(Problem::error(format!("outputs.{name}"), message).help(help));
            }
        }
        problems
    }

    /// Whether a name in the working directory is another's.
    fn is_taken(&self, name: &str) -> bool {
        !self.in_place && Path::new(name).starts_with("inputs") || name.ends_with('/')
    }

    fn require(&self, cx: &Context<'_>, name: &str, path: &str) -> Result<()> {
        let to = cx.attempt_dir.join("out").join(name).join(path);
        let missing = |what: &str| {
            let fault = Fault::new(format!("the command did not write output `{name}`: {what}"));
            fault.help(format!("write to `${{out.{name}}}`"))
        };
        if path.ends_with('/') {
            let full = fs::read_dir(&to).is_ok_and(|mut items| items.next().is_some());
            return if full { Ok(()) } else { Err(missing("its folder is empty").into()) };
        }
        ensure!(to.exists(), missing(&format!("there is no `{path}`")));
        Ok(())
    }
}

fn is_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
    !name.is_empty() && name.chars().all(plain) && !name.starts_with(|c: char| c.is_ascii_digit())
}

/// Whether a path stays below its folder and has no character that a shell would take apart.
pub(crate) fn is_inside(path: &str) -> bool {
    let plain = |c: char| c.is_alphanumeric() || "/_-.+,=@%".contains(c);
    let inside = Path::new(path).components().all(|c| matches!(c, Component::Normal(_)));
    !path.is_empty() && inside && path.chars().all(plain) && !path.starts_with('-')
}

fn text(path: &Path) -> Result<String> {
    let text = path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))?;
    Ok(text.to_owned())
}

/// How an input's files are laid out.
#[derive(Clone, Copy, PartialEq)]
enum Layout {
    /// In a folder of their own, below one for each port, to be read only.
    Folder,
    /// Those of all ports at their paths, as copies.
    InPlace,
}

/// Puts an artifact's files below a folder: the store's own as [`bring`] does, and read-only copies
/// of what lies outside it (blocks are shared where the file system can), because
/// a command that writes to its input must not change the user's file or the hub's cache.
fn lay_out(cx: &Context<'_>, binding: &Binding, to: &Path, how: Layout) -> Result<()> {
    let view = cx.view(binding)?;
    let flat = view.ty.flat_ports();
    for port in view.ports.keys() {
        let folder = match flat {
            _ if how == Layout::InPlace => to.to_path_buf(),
            Some(ports) if ports.contains(&port.as_str()) => to.to_path_buf(),
            _ if view.ports.len() == 1 => to.to_path_buf(),
            _ => to.join(port),
        };
        cx.make_dir(&folder)?;
        for (path, from) in view.files(port)? {
            let to = folder.join(&path);
            let new = to.parent().filter(|parent| *parent != folder);
            new.map(|folder| cx.make_dir(folder)).transpose()?;
            if how == Layout::InPlace {
                let message = || Fault::new(format!("two inputs bring `{path}`"));
                let help = "with `in_place` all inputs lie in one folder";
                ensure!(to.symlink_metadata().is_err(), message().help(help));
                copy(&from, &to, 0o644)?;
            } else if from.starts_with(view.store.root()) {
                bring(&from, &to).with_context(|| format!("bringing `{path}`"))?;
            } else {
                view.store.disk().copy(&from, &to)?;
                view.store.disk().set_mode(&to, 0o444)?;
            }
        }
    }
    Ok(())
}

/// Brings a file of the store: by a link, or as a copy where that takes no more room. A link whose
/// path is as long as that of an object has a block of its own, and costs more to make and remove.
fn bring(from: &Path, to: &Path) -> Result<()> {
    const BLOCK: u64 = 4096;
    if fs::metadata(from)?.len() > BLOCK {
        return Ok(symlink(from, to)?);
    }
    let bytes = fs::read(from)?;
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o444).open(to)?;
    Ok(file.write_all(&bytes)?)
}

/// Copies a file; it can be run if the original can.
fn copy(from: &Path, to: &Path, mode: u32) -> Result<()> {
    fs::copy(from, to).with_context(|| format!("copying {}", from.display()))?;
    let executable = fs::metadata(from)?.permissions().mode() & 0o111 != 0;
    let mode = if executable { mode | 0o111 } else { mode };
    Ok(fs::set_permissions(to, fs::Permissions::from_mode(mode))?)
}

/// Copies a file or folder, read-only unless the copy is to be worked on: a command that writes to
/// it must not change the original.
fn stage(cx: &Context<'_>, from: &Path, to: &Path, writable: bool) -> Result<()> {
    to.parent().map(|folder| cx.make_dir(folder)).transpose()?;
    if !from.is_dir() {
        return copy(from, to, if writable { 0o644 } else { 0o444 });
    }
    cx.make_dir(to)?;
    let mut items: Vec<PathBuf> =
        fs::read_dir(from)?.map(|i| Ok(i?.path())).collect::<Result<_>>()?;
    items.sort_unstable();
    for item in items {
        let name = item.file_name().context("an item of a folder has a name")?;
        stage(cx, &item, &to.join(name), writable)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(run: &str) -> Command {
        let with = serde_json::json!({
            "run": run,
            "outputs": { "table": "table.csv", "model": "model/" },
            "files": { "make.py": "./tools/make.py" },
        });
        serde_json::from_value(with).unwrap()
    }

    #[test]
    fn references_become_paths() {
        let run = "python ${files.make.py} --to ${out.table} ${out.model}/x ${HOME} $x";
        let filled = command(run).filled(run).unwrap();
        let want = "python make.py --to ../out/table/table.csv ../out/model/model/x ${HOME} $x";
        assert_eq!(filled, want);
        assert!(command(run).check().is_empty());
        let inner = command("cat ${X:-${out.table}} ${Y").filled("cat ${X:-${out.table}} ${Y");
        assert_eq!(inner.unwrap(), "cat ${X:-../out/table/table.csv} ${Y");
    }

    #[test]
    fn names_of_inputs_leave_room_for_edges() {
        let edge = serde_json::json!({ "$input": { "type": "files" } });
        let with = serde_json::json!({
            "run": "true", "outputs": { "x": "x" }, "inputs": { "1": edge, "a1": edge },
        });
        let command: Command = serde_json::from_value(with).unwrap();
        let problems = command.check();
        assert_eq!(problems.len(), 1);
        assert_eq!(problems[0].path, "inputs.1");
    }

    #[test]
    fn undeclared_names_are_refused() {
        let problems = command("x > ${out.tables}").check();
        assert_eq!(problems.len(), 1);
        assert_eq!(problems[0].help.as_deref(), Some("did you mean `table`?"));
    }

    #[test]
    fn outputs_in_place_lie_apart() {
        let problems = |outputs: serde_json::Value| {
            let with = serde_json::json!({
                "run": "true", "in_place": true, "outputs": outputs, "files": { "src": "./src" },
            });
            let command: Command = serde_json::from_value(with).unwrap();
            command.check().into_iter().map(|p| p.path).collect::<Vec<_>>()
        };
        assert!(problems(serde_json::json!({ "a": "data/a", "b": "data/ab" })).is_empty());
        assert_eq!(problems(serde_json::json!({ "a": "data/", "b": "data/b" })), ["outputs.a"]);
        assert_eq!(problems(serde_json::json!({ "a": "src/x" })), ["outputs.a"]);
    }

    #[test]
    fn in_place_paths_are_their_own() {
        let with = serde_json::json!({
            "run": "x > ${out.x}", "in_place": true, "outputs": { "x": "data/x" },
            "files": { "inputs/y": "./y" },
        });
        let command: Command = serde_json::from_value(with).unwrap();
        assert!(command.check().is_empty());
        assert_eq!(command.filled("x > ${out.x}").unwrap(), "x > data/x");
    }

    #[test]
    fn names_stay_inside() {
        for bad in ["../x", "/x", "a/../../b", "", "a b", "-rf"] {
            assert!(!is_inside(bad), "{bad}");
        }
        for good in ["a", "a/b.csv", "a/"] {
            assert!(is_inside(good), "{good}");
        }
    }
}

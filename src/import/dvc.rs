//! `dvc.yaml`, with the files of parameters beside it.
//!
//! Source: DVC 3 (`dvc/schema.py`, `dvc/parsing/`): stages with `cmd`, `deps`, `outs`, `metrics`,
//! `plots`, `params`, `vars`, `wdir`, `foreach` and `matrix`, and the `${…}` in all of them. DVC
//! runs a stage in the folder of the project; here it is a `command` that works in place, in a
//! folder with the files that the stage declares, at the same relative paths.

mod links;
mod path;
mod stage;
mod steps;
mod template;
mod values;
mod write;

use std::path::Path;

use super::{ImportError, Imported};
use crate::pipeline::{Plan, Settings};
use crate::source::{Fault, Severity, Source};
use crate::step::Kind;
use crate::yaml;

/// Imports a `dvc.yaml`, or that of a folder, for a pipeline file that lies in the folder `to`.
/// Nothing is written.
///
/// # Errors
/// With all that is wrong in the file, or the reason why one could not be read. What is made is
/// checked with `kinds` as any pipeline is.
pub fn import(
    file: &Path,
    to: &Path,
    kinds: &[Kind],
    settings: &Settings,
) -> Result<Imported, ImportError> {
    let file = if file.is_dir() { file.join("dvc.yaml") } else { file.to_owned() };
    let unread = |path: &Path, e: std::io::Error| {
        let fault = Fault::new(format!("cannot read {}", path.display())).cause(e);
        ImportError::Unread(fault.help("name a dvc.yaml, or the folder that it is in").into())
    };
    let text = std::fs::read_to_string(&file).map_err(|e| unread(&file, e))?;
    let dir = file.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let dir = dir.canonicalize().map_err(|e| unread(dir, e))?;
    let to = to.canonicalize().map_err(|e| unread(to, e))?;
    let source = Source::new(file.display().to_string(), text);
    let refused = |found| ImportError::Refused(source.clone(), found);
    let node = values::numbers(yaml::parse(&source).map_err(refused)?, &source);
    let mut project = stage::read(&node, &dir)?;
    if project.is_wrong() {
        return Err(refused(settled(project.found)));
    }
    let links = links::find(&project.stages, &dir, &mut project.found);
    if project.is_wrong() {
        return Err(refused(settled(project.found)));
    }
    let steps = steps::make(&project.stages, &links, &path::way(&to, &dir));
    if steps.steps.is_empty() {
        let message = "every stage is frozen: there is nothing to run";
        let start = crate::source::Span::default();
        project.found.push(crate::source::Diagnostic::error(start, message, "nothing to run"));
        return Err(refused(settled(project.found)));
    }
    for stage in project.stages.iter().filter(|stage| stage.frozen) {
        let notes = stage.notes.iter().map(|note| format!("stage `{}`: {note}", stage.name));
        project.notes.extend(notes);
    }
    if ignores(&dir) {
        let note = "`.dvcignore` is not read: a folder under `files` is taken whole";
        project.notes.push(note.to_owned());
    }
    let name = dir.file_name().map(|name| name.to_string_lossy().into_owned());
    let text = write::pipeline(&name_of(name), &steps, &project.values, &project.notes);
    let made = Source::new("the pipeline that was made", text.as_str());
    if let Err(wrong) = Plan::new(&to.join("dvc.yaml"), made.clone(), kinds, settings) {
        return Err(ImportError::Refused(made, wrong));
    }
    Ok(Imported { text, source, warnings: settled(project.found) })
}

/// What was found, in the order of the file, each thing once: a loop finds it for each item.
fn settled(mut found: Vec<crate::source::Diagnostic>) -> Vec<crate::source::Diagnostic> {
    if found.iter().any(|d| d.severity == Severity::Error) {
        found.retain(|d| d.severity == Severity::Error);
    }
    found.sort_by(|a, b| (a.span, &a.message).cmp(&(b.span, &b.message)));
    found.dedup_by(|a, b| a.span == b.span && a.message == b.message);
    found
}

fn name_of(folder: Option<String>) -> String {
    let fits = |c: char| if c.is_ascii_alphanumeric() || c == '_' || c == '-' { c } else { '_' };
    let name: String = folder.unwrap_or_default().chars().map(fits).collect();
    if name.is_empty() { "pipeline".to_owned() } else { name }
}

/// Whether DVC leaves files out of folders here.
fn ignores(dir: &Path) -> bool {
    let text = std::fs::read_to_string(dir.join(".dvcignore")).unwrap_or_default();
    text.lines().any(|line| !line.trim().is_empty() && !line.starts_with('#'))
}

/// How DVC's configuration wants maps to become arguments.
fn style(dir: &Path) -> values::Style {
    let mut style = values::Style::default();
    let config = dir.ancestors().map(|dir| dir.join(".dvc/config")).find(|path| path.is_file());
    let text = config.and_then(|path| std::fs::read_to_string(path).ok()).unwrap_or_default();
    let mut parsing = false;
    for line in text.lines().map(str::trim) {
        if line.starts_with('[') {
            parsing = line == "[parsing]";
        }
        let Some((key, value)) = line.split_once('=').filter(|_| parsing) else { continue };
        match (key.trim(), value.trim()) {
            ("bool", "boolean_optional") => style.negated = true,
            ("list", "append") => style.repeated = true,
            _ => {}
        }
    }
    style
}

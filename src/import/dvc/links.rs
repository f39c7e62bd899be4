//! Which stage reads what another writes, and which files lie there already.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::path::Place;
use super::stage::Stage;
use crate::kinds::is_inside;
use crate::source::Diagnostic;

/// An output of a stage, both by number.
pub(super) type Made = (usize, usize);

/// What stages read.
#[derive(Debug, Default)]
pub(super) struct Links {
    /// For each stage: outputs of others.
    pub(super) sources: Vec<BTreeSet<Made>>,
    /// For each stage: files and folders of the project.
    pub(super) files: Vec<BTreeSet<Place>>,
    /// For each stage: what is to be said beside it.
    pub(super) notes: Vec<Vec<String>>,
    /// The folders between the one that commands see and that of `dvc.yaml`, outermost first.
    pub(super) folder: Vec<String>,
}

struct Finder<'a> {
    stages: &'a [Stage],
    dir: &'a Path,
    outs: BTreeMap<Place, Made>,
    links: Links,
    found: &'a mut Vec<Diagnostic>,
}

/// Finds them. `dir` is the folder of `dvc.yaml`, absolute.
pub(super) fn find(stages: &[Stage], dir: &Path, found: &mut Vec<Diagnostic>) -> Links {
    let mut links = Links {
        sources: vec![BTreeSet::new(); stages.len()],
        files: vec![BTreeSet::new(); stages.len()],
        notes: vec![Vec::new(); stages.len()],
        folder: Vec::new(),
    };
    let places = |s: &Stage| {
        let deps = s.deps.iter().map(|(place, _)| place.above());
        deps.chain(s.outs.iter().map(|out| out.place.above())).chain([s.wdir.above()]).max()
    };
    let up = stages.iter().filter_map(places).max().unwrap_or(0);
    let names = dir.components().filter_map(|c| match c {
        std::path::Component::Normal(name) => name.to_str().map(str::to_owned),
        _ => None,
    });
    let names: Vec<String> = names.collect();
    links.folder = names[names.len().saturating_sub(up)..].to_vec();
    let mut finder = Finder { stages, dir, outs: BTreeMap::new(), links, found };
    if names.len() < up {
        let span = stages.first().map(|s| s.span).unwrap_or_default();
        finder.wrong(span, "a path leads above the root of the file system".to_owned());
        return finder.links;
    }
    finder.outs();
    for index in 0..stages.len() {
        finder.stage(index);
    }
    finder.links
}

impl Finder<'_> {
    fn wrong(&mut self, span: crate::source::Span, message: String) {
        self.found.push(Diagnostic::error(span, message, "this path"));
    }

    fn fits(&mut self, place: &Place, span: crate::source::Span) -> bool {
        let path = place.below(&self.links.folder);
        let fits = path == "." || is_inside(&path);
        if !fits {
            let message = format!(
                "a `command` cannot have the path `{path}`: letters, digits and `/_-.+,=@%`, no \
                 `-` first"
            );
            self.wrong(span, message);
        }
        fits
    }

    /// Outputs by place, none of which lies in another.
    fn outs(&mut self) {
        for (index, stage) in self.stages.iter().enumerate() {
            for (number, out) in stage.outs.iter().enumerate() {
                if !self.fits(&out.place, out.span) || stage.frozen {
                    continue;
                }
                if let Some(&(other, _)) = self.near(&out.place).first() {
                    let message = format!(
                        "stages `{}` and `{}` both write `{}`",
                        self.stages[other].name,
                        stage.name,
                        out.place.text()
                    );
                    self.wrong(out.span, message);
                    continue;
                }
                self.outs.insert(out.place.clone(), (index, number));
            }
        }
    }

    /// Outputs that are a place, lie in it, or hold it.
    fn near(&self, place: &Place) -> Vec<Made> {
        let above = place.folders().filter_map(|folder| self.outs.get(&folder)).copied();
        let below = self.outs.range(place.clone()..).take_while(|(out, _)| out.is_in(place));
        above.chain(below.map(|(_, made)| *made)).collect()
    }

    fn path(&self, place: &Place) -> PathBuf {
        self.dir.join(place.text())
    }

    fn stage(&mut self, index: usize) {
        let stage = &self.stages[index];
        if stage.frozen {
            return;
        }
        self.fits(&stage.wdir, stage.span);
        for (dep, span) in &stage.deps {
            if !self.fits(dep, *span) {
                continue;
            }
            let made = self.near(dep);
            if made.iter().any(|(other, _)| *other == index) {
                let text = dep.text();
                self.wrong(
                    *span,
                    format!("stage `{}` reads `{text}`, which it writes", stage.name),
                );
                continue;
            }
            let holds = made.iter().any(|&(s, o)| self.stages[s].outs[o].place != *dep);
            let whole = made.iter().any(|&(s, o)| dep.is_in(&self.stages[s].outs[o].place));
            self.links.sources[index].extend(made);
            if whole {
                continue;
            }
            if holds {
                self.parts(index, dep);
                let message = format!(
                    "`{}` holds outputs of other stages; its other files are named as they are now",
                    dep.text()
                );
                self.note(index, *span, message);
                continue;
            }
            if dep.is_here() {
                let message = format!("stage `{}` depends on the whole folder", stage.name);
                self.wrong(*span, format!("{message}: name what it reads"));
                continue;
            }
            if !self.path(dep).exists() {
                let tracked = self.dir.join(format!("{}.dvc", dep.text())).exists();
                let how = if tracked { "`dvc pull` brings it" } else { "no stage here makes it" };
                let message = format!("`{}` is not there yet: {how}", dep.text());
                self.note(index, *span, message);
            }
            self.links.files[index].insert(dep.clone());
        }
        self.named(index);
    }

    fn note(&mut self, index: usize, span: crate::source::Span, message: String) {
        let definition = self.stages[index].name.split('@').next().unwrap_or_default();
        let warning = format!("stage `{definition}`: {message}");
        self.found.push(Diagnostic::warning(span, warning, "look at this"));
        self.links.notes[index].push(message);
    }

    /// What lies in a folder beside outputs.
    fn parts(&mut self, index: usize, folder: &Place) {
        let entries = std::fs::read_dir(self.path(folder)).into_iter().flatten().flatten();
        let mut names: Vec<String> =
            entries.filter_map(|e| e.file_name().into_string().ok()).collect();
        names.sort_unstable();
        for name in names.iter().filter(|n| *n != ".gitignore") {
            let child = folder.child(name);
            if self.outs.contains_key(&child) {
                continue;
            }
            if self.near(&child).is_empty() {
                if is_inside(&child.below(&self.links.folder)) {
                    self.links.files[index].insert(child);
                }
            } else {
                self.parts(index, &child);
            }
        }
    }

    /// Files that the command names and the stage does not: DVC runs in the project's folder, so
    /// there they are found all the same.
    fn named(&mut self, index: usize) {
        let stage = &self.stages[index];
        for command in &stage.commands {
            let text = command.literal();
            let breaks = |c: char| c.is_whitespace() || "\"'`;|&()<>=:,".contains(c);
            let mut from = 0;
            for word in text.split(breaks) {
                let before = text[..from].trim_end();
                from +=
                    word.len() + text[from + word.len()..].chars().next().map_or(0, char::len_utf8);
                if word.starts_with(['/', '-', '$', '~']) || before.ends_with('>') {
                    continue;
                }
                let Ok(place) = stage.wdir.join(word) else { continue };
                let known = |other: &Place| place.is_in(other);
                let declared = stage.deps.iter().any(|(dep, _)| known(dep))
                    || stage.outs.iter().any(|out| known(&out.place))
                    || !self.near(&place).is_empty();
                let inside = place.above() <= self.links.folder.len()
                    && is_inside(&place.below(&self.links.folder));
                if declared || !inside || !self.path(&place).is_file() {
                    continue;
                }
                if self.links.files[index].insert(place) {
                    let message =
                        format!("the command names `{word}`, which is no dep: it is one now");
                    self.note(index, stage.command_span, message);
                }
            }
        }
    }
}

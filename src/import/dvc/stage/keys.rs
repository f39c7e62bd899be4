//! The keys of one stage.

use super::{OUT, Out, PLOT, Reader, Stage};
use crate::import::dvc::path::Outside;
use crate::import::dvc::template::{self, Piece, Text};
use crate::import::dvc::values::{Values, python_text};
use crate::source::Span;
use crate::yaml::{Entry, Node, Shape};

/// Reads the keys of one stage.
pub(super) struct Maker<'r, 'a> {
    pub(super) reader: &'r mut Reader<'a>,
    pub(super) stage: Stage,
    pub(super) values: Values,
}

impl Maker<'_, '_> {
    /// Says beside the step, and as a warning, what is not taken over.
    fn unmapped(&mut self, span: Span, message: &str) {
        let definition = self.stage.name.split('@').next().unwrap_or_default();
        self.reader.warn(span, &format!("stage `{definition}`: {message}"));
        self.stage.notes.push(message.to_owned());
    }

    fn text(&mut self, node: &Node, place: template::Place) -> Option<Text> {
        match template::text(node, &self.values, place) {
            Ok(text) => Some(text),
            Err(diagnostic) => {
                self.reader.project.found.push(diagnostic);
                None
            }
        }
    }

    fn list<'n>(&mut self, node: &'n Node) -> &'n [Node] {
        if node.as_list().is_none() && node.shape != Shape::Null {
            self.reader.expected(node, "a list");
        }
        node.as_list().unwrap_or_default()
    }

    fn flag(&mut self, node: &Node) -> bool {
        if !matches!(node.shape, Shape::Bool(_)) {
            self.reader.expected(node, "`true` or `false`");
        }
        node.shape == Shape::Bool(true)
    }

    pub(super) fn key(&mut self, entry: &Entry) {
        let value = &entry.value;
        match entry.key.as_str() {
            "cmd" => self.command(value),
            "deps" => {
                for dep in self.list(value) {
                    if let Some(text) = self.text(dep, template::Place::Field) {
                        self.dep(&text, dep.span);
                    }
                }
            }
            "params" => self.params(value),
            "outs" | "metrics" | "plots" => self.outs(&entry.key, value),
            "frozen" => {
                self.stage.frozen = self.flag(value);
                if self.stage.frozen {
                    let message = "`frozen`: what it wrote is taken as it lies there, and it \
                                   is not run";
                    self.unmapped(entry.key_span, message);
                }
            }
            "always_changed" => {
                let message = "`always_changed` has no counterpart: a result that is there is \
                               taken; `flow run --force STEP` runs it again";
                let set = self.flag(value);
                set.then(|| self.unmapped(entry.key_span, message));
            }
            "desc" => match value.as_text() {
                Some(text) => {
                    let lines = text.lines().map(str::to_owned);
                    self.stage.notes.splice(0..0, lines);
                }
                None => self.reader.expected(value, "text"),
            },
            "meta" => {
                self.unmapped(
                    entry.key_span,
                    &format!("`meta` is kept here only: {}", value.to_value()),
                );
            }
            _ => {}
        }
    }

    /// DVC gives each line, or each item of a list, to a shell of its own.
    fn command(&mut self, node: &Node) {
        self.stage.command_span = node.span;
        let items = match &node.shape {
            Shape::List(items) => items.as_slice(),
            _ => std::slice::from_ref(node),
        };
        for item in items {
            let Some(text) = self.text(item, template::Place::Command) else { continue };
            if node.as_list().is_some() {
                self.stage.commands.push(text);
                continue;
            }
            let mut lines = vec![Text::default()];
            for piece in text.0 {
                let Piece::Plain(plain) = &piece else {
                    lines.last_mut().into_iter().for_each(|line| line.0.push(piece.clone()));
                    continue;
                };
                for (i, part) in plain.split('\n').enumerate() {
                    if i > 0 {
                        lines.push(Text::default());
                    }
                    let part = Piece::Plain(part.trim_end_matches('\r').to_owned());
                    lines.last_mut().into_iter().for_each(|line| line.0.push(part.clone()));
                }
            }
            self.stage.commands.extend(lines);
        }
        let mut texts = self.stage.commands.iter().map(Text::literal);
        if texts.any(|text| text.contains("DVC_STAGE") || text.contains("DVC_ROOT")) {
            self.unmapped(node.span, "`DVC_STAGE` and `DVC_ROOT` are not set");
        }
        self.stage.commands.retain(|text| !text.literal().trim().is_empty());
        if self.stage.commands.is_empty() {
            self.reader.wrong(node.span, "the command is empty", "nothing to run");
        }
    }

    fn dep(&mut self, text: &Text, span: Span) {
        match self.stage.wdir.join(&text.literal()) {
            Ok(place) => {
                self.stage.deps.push((place, span));
                self.stage.path_texts.push(text.clone());
            }
            Err(Outside::Url) => {
                let message = format!(
                    "dep `{}` is not a file: it is not watched; `fetch` it in a step, or declare a \
                     copy under `files`",
                    text.literal()
                );
                self.unmapped(span, &message);
            }
            Err(Outside::Not(why)) => self.reader.wrong(span, why, "not a path of the project"),
        }
    }

    /// Files of parameters are read by the command itself, so they are deps; a key in one of them
    /// says less than the file.
    fn params(&mut self, node: &Node) {
        let mut files: Vec<(Text, Span)> = Vec::new();
        for item in self.list(node) {
            match &item.shape {
                Shape::Map(entries) => {
                    for entry in entries {
                        let key = Node::new(Shape::Text(entry.key.clone()), entry.key_span);
                        if let Some(text) = self.text(&key, template::Place::Field) {
                            files.push((text, entry.key_span));
                        }
                        self.list(&entry.value);
                    }
                }
                _ => {
                    if self.text(item, template::Place::Field).is_some() {
                        files.push((Text::plain("params.yaml"), item.span));
                    }
                }
            }
        }
        for (text, span) in files {
            let place = self.stage.wdir.join(&text.literal());
            if !self.stage.deps.iter().any(|(dep, _)| place.as_ref().is_ok_and(|p| p == dep)) {
                self.dep(&text, span);
            }
        }
    }

    fn outs(&mut self, key: &str, node: &Node) {
        for item in self.list(node) {
            let Shape::Map(entries) = &item.shape else {
                self.out(item);
                continue;
            };
            for entry in entries {
                self.out(&Node::new(Shape::Text(entry.key.clone()), entry.key_span));
                let options = match &entry.value.shape {
                    // A plot may be drawn in several ways.
                    Shape::List(items) => items.as_slice(),
                    _ => std::slice::from_ref(&entry.value),
                };
                for option in options.iter().flat_map(|o| o.as_map().unwrap_or_default()) {
                    self.option(key, &entry.key, option);
                }
                if options.iter().any(|o| o.as_map().is_none() && o.shape != Shape::Null) {
                    self.reader.expected(&entry.value, "options");
                }
            }
        }
    }

    fn out(&mut self, node: &Node) {
        let Some(text) = self.text(node, template::Place::Field) else { return };
        match self.stage.wdir.join(&text.literal()) {
            Ok(place) if !place.is_here() && !place.is_absolute() => {
                self.stage.path_texts.push(text.clone());
                self.stage.outs.push(Out { place, text, span: node.span });
            }
            _ => {
                let message = format!("`{}` is not below the project's folder", text.literal());
                self.reader.wrong(node.span, message, "cannot be an output");
            }
        }
    }

    fn option(&mut self, list: &str, out: &str, option: &Entry) {
        let (key, value) = (option.key.as_str(), &option.value);
        let is = |b: bool| value.shape == Shape::Bool(b);
        let why = match key {
            "cache" if is(true) => return,
            "persist" | "checkpoint" if is(false) => return,
            "push" if is(true) => return,
            "cache" => "every output is kept in the store",
            "persist" | "checkpoint" => "a step begins without what an earlier run of it wrote",
            "push" | "remote" => "the store is not pushed to DVC's remotes",
            "desc" => {
                let text = python_text(value).replace('\n', " ");
                self.stage.notes.push(format!("{out}: {text}"));
                return;
            }
            _ if PLOT.contains(&key) && list == "plots" => {
                "the file is an output; nothing is drawn"
            }
            _ if OUT.contains(&key) => "it is kept here only",
            _ => {
                let known: Vec<&str> = OUT.iter().chain(&PLOT).copied().collect();
                self.reader.unknown(option, &known);
                return;
            }
        };
        let message = format!("`{key}: {}` of `{out}`: {why}", value.to_value());
        self.unmapped(option.key_span, &message);
    }
}

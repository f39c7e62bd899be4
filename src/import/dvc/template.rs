//! DVC's `${…}`: a path into the values of `params.yaml`, `vars`, and the item of a loop.

use super::values::{Found, Values, python_text};
use crate::source::{Diagnostic, Span};
use crate::yaml::{Node, Shape};

/// A text with its references replaced.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Text(pub(super) Vec<Piece>);

/// A part of it.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Piece {
    /// As it was written.
    Plain(String),
    /// What a reference stood for.
    Value {
        /// As DVC writes it.
        text: String,
        /// The reference of this program's own that gives the same text, if there is one.
        name: Option<Name>,
    },
}

/// What a value is called in a pipeline.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Name {
    /// A parameter, by its path.
    Param(String),
    /// An axis of a matrix.
    Axis(String),
}

impl Text {
    /// Text without references.
    pub(super) fn plain(text: impl Into<String>) -> Self {
        Self(vec![Piece::Plain(text.into())])
    }

    /// What DVC makes of it.
    pub(super) fn literal(&self) -> String {
        let text = |piece: &Piece| match piece {
            Piece::Plain(text) | Piece::Value { text, .. } => text.clone(),
        };
        self.0.iter().map(text).collect()
    }

    /// The same as text of a pipeline: a name stays a reference where `keep` says so.
    pub(super) fn reference(&self, keep: &mut impl FnMut(&Name) -> bool) -> String {
        let (mut out, mut plain) = (String::new(), String::new());
        for piece in &self.0 {
            match piece {
                Piece::Plain(text) => plain.push_str(text),
                // `$${` would be an escape.
                Piece::Value { name: Some(name), .. } if !plain.ends_with('$') && keep(name) => {
                    out.push_str(&escape(&std::mem::take(&mut plain)));
                    out.push_str(&match name {
                        Name::Param(path) => format!("${{params.{path}}}"),
                        Name::Axis(axis) => format!("${{sweep.{axis}}}"),
                    });
                }
                Piece::Value { text, .. } => plain.push_str(text),
            }
        }
        out + &escape(&plain)
    }

    /// The names in it.
    pub(super) fn names(&self) -> impl Iterator<Item = &Name> {
        self.0.iter().filter_map(|piece| match piece {
            Piece::Value { name, .. } => name.as_ref(),
            Piece::Plain(_) => None,
        })
    }
}

/// Plain text as a pipeline writes it.
pub(super) fn escape(text: &str) -> String {
    text.replace("${", "$${")
}

/// What may be put into a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// The command, where a map becomes arguments.
    Command,
    /// Anything else.
    Field,
}

enum Token<'t> {
    Plain(&'t str),
    Open,
    Reference(&'t str),
}

/// Takes a template apart: `\${` is a plain `${`, and so is one that is not closed on its line.
fn tokens(text: &str) -> Vec<Token<'_>> {
    let mut found = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find("${") {
        let (before, after) = (&rest[..at], &rest[at + 2..]);
        if let Some(before) = before.strip_suffix('\\') {
            found.extend([Token::Plain(before), Token::Open]);
            rest = after;
            continue;
        }
        found.push(Token::Plain(before));
        match after.find(['}', '\n']).filter(|&end| after[end..].starts_with('}')) {
            Some(end) => {
                found.push(Token::Reference(&after[..end]));
                rest = &after[end + 1..];
            }
            None => {
                found.push(Token::Open);
                rest = after;
            }
        }
    }
    found.push(Token::Plain(rest));
    found.retain(|token| !matches!(token, Token::Plain("")));
    found
}

fn wrong(span: Span, message: impl Into<String>, help: Option<String>) -> Diagnostic {
    Diagnostic::error(span, message, "in this template").maybe_help(help)
}

fn look_up(inner: &str, values: &Values, span: Span) -> Result<Found, Diagnostic> {
    values.get(inner).map_err(|help| {
        let message = format!("`${{{inner}}}` is not known to `params.yaml` or `vars`");
        wrong(span, message, help.or_else(|| Some("write `\\${` for a `${` of the shell".into())))
    })
}

/// The value of a node: a text that is one reference keeps the value's type.
///
/// # Errors
/// With the first reference that leads nowhere.
pub(super) fn value(node: &Node, values: &Values) -> Result<Node, Diagnostic> {
    let shape = match &node.shape {
        Shape::Text(text) => match tokens(text).as_slice() {
            [Token::Reference(inner)] => {
                return look_up(inner, values, node.span).map(|f| f.node.moved_to(node.span));
            }
            _ => Shape::Text(self::text(node, values, Place::Field)?.literal()),
        },
        Shape::List(items) => {
            Shape::List(items.iter().map(|n| value(n, values)).collect::<Result<_, _>>()?)
        }
        Shape::Map(entries) => {
            let entries = entries.iter().map(|entry| {
                let mut entry = entry.clone();
                let key = Node::new(Shape::Text(entry.key), entry.key_span);
                entry.key = text(&key, values, Place::Field)?.literal();
                entry.value = value(&entry.value, values)?;
                Ok(entry)
            });
            Shape::Map(entries.collect::<Result<_, Diagnostic>>()?)
        }
        plain => plain.clone(),
    };
    Ok(Node::new(shape, node.span))
}

/// The text of a node.
///
/// # Errors
/// When it is a list or a map, or a reference in it leads nowhere or to what cannot be text.
pub(super) fn text(node: &Node, values: &Values, place: Place) -> Result<Text, Diagnostic> {
    let template = match &node.shape {
        Shape::Text(text) => text,
        Shape::List(_) | Shape::Map(_) => {
            let message = format!("expected text, found {}", node.describe());
            return Err(Diagnostic::error(node.span, message, "wrong type"));
        }
        _ => return Ok(Text::plain(python_text(node))),
    };
    let mut pieces = Vec::new();
    for token in tokens(template) {
        match token {
            Token::Plain(text) => pieces.push(Piece::Plain(text.to_owned())),
            Token::Open => pieces.push(Piece::Plain("${".to_owned())),
            Token::Reference(inner) => {
                let found = look_up(inner, values, node.span)?;
                let text = match &found.node.shape {
                    Shape::Map(_) if place == Place::Command => {
                        values.arguments(&found.node).map_err(|m| wrong(node.span, m, None))?
                    }
                    Shape::List(_) | Shape::Map(_) => {
                        let what = found.node.describe();
                        let message = format!("`${{{inner}}}` is {what}, which is no text");
                        return Err(wrong(node.span, message, None));
                    }
                    _ => python_text(&found.node),
                };
                pieces.push(Piece::Value { text, name: found.name });
            }
        }
    }
    Ok(Text(pieces))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::Source;
    use crate::yaml::parse;

    fn values() -> Values {
        let text = "lr: 1e-5\nrate: 0.5\nname: a b\non: true\nnone: null\nlist: [x, 2]\n\
                    deep: { x: 1, 'odd key': y }\nargs: { a: 1, flag: true, off: false, \
                    s: it's, many: [1, two], in: { b: c } }\n";
        let node = parse(&Source::new("params.yaml", text)).unwrap();
        let mut values = Values::default();
        values.merge(node.as_map().unwrap()).unwrap();
        values
    }

    fn both(template: &str) -> (String, String) {
        let node = Node::new(Shape::Text(template.into()), Span::default());
        let text = text(&node, &values(), Place::Command).unwrap();
        (text.literal(), text.reference(&mut |_| true))
    }

    #[test]
    fn texts_are_dvcs_and_references_give_the_same() {
        for (template, literal, reference) in [
            ("a ${deep.x} ${name}", "a 1 a b", "a ${params.deep.x} ${params.name}"),
            ("${deep[x]}${on}", "1true", "${params.deep.x}${params.on}"),
            // Python writes these otherwise than a pipeline would.
            ("${lr} ${rate}", "1e-05 0.5", "1e-05 ${params.rate}"),
            ("${none}${list[0]}${list.1}", "Nonex2", "Nonex2"),
            ("${deep.odd key}", "y", "y"),
            ("\\${HOME} $$", "${HOME} $$", "$${HOME} $$"),
            ("$${deep.x} ${deep.x", "$1 ${deep.x", "$1 $${deep.x"),
            ("${args}", "--a 1 --flag --s 'it'\"'\"'s' --many 1 two --in.b c", ""),
        ] {
            let (l, r) = both(template);
            assert_eq!(l, literal, "{template}");
            assert_eq!(r, if reference.is_empty() { literal } else { reference }, "{template}");
        }
    }

    #[test]
    fn what_leads_nowhere_is_refused() {
        for bad in ["${x}", "${}", "${deep.y}", "${list[9]}", "${list}", "${name.x}", "${deep..x}"]
        {
            let node = Node::new(Shape::Text(bad.into()), Span::default());
            assert!(text(&node, &values(), Place::Command).is_err(), "{bad}");
        }
    }
}

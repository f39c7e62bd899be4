//! The one grammar of references.
//!
//! `${params.x}`, `${steps.name}`, `${steps.name.port}`, `${steps.name.*}`, `${sweep.axis}`,
//! `${sweep.axis.member}`, `${env.NAME}`; `$${` stands for `${`. `${out.…}` and `${files.…}` belong
//! to the kinds that run commands and are left as they are.

use crate::source::{Diagnostic, Source, Span, suggest};
use crate::yaml::Node;

/// What a `${…}` names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Reference {
    /// A parameter, with a path into it.
    Param(String),
    /// A step, or a port of it.
    Step { step: String, port: Option<String> },
    /// All points of a step.
    Gather { step: String },
    /// A coordinate of the sweep.
    Sweep(String),
    /// An environment variable.
    Env(String),
}

/// A part of a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Piece {
    /// Plain text, escapes undone.
    Plain(String),
    /// A reference, and where it stands.
    Ref(Reference, Span),
}

/// What a reference can start with.
const ROOTS: [&str; 4] = ["params", "steps", "sweep", "env"];
/// Left for the kind.
const LITERAL: [&str; 2] = ["out", "files"];
/// Keys that mean something between the steps.
const RESERVED: [&str; 5] = ["$input", "$gather", "$file", "$text", "$unknown"];

/// The pieces of a text node: none for what is not text or is empty.
///
/// # Errors
/// With each reference that is not one.
pub(super) fn pieces(node: &Node, source: &Source) -> Result<Vec<Piece>, Vec<Diagnostic>> {
    let Some(text) = node.as_text() else { return Ok(Vec::new()) };
    let mut places = Places { source, node, next: node.span.start };
    let (mut pieces, mut wrong) = (Vec::new(), Vec::new());
    let mut plain = String::new();
    let mut rest = text;
    while let Some(at) = rest.find("${") {
        if rest[..at].ends_with('$') {
            plain.push_str(&rest[..at - 1]);
            plain.push_str("${");
            rest = &rest[at + 2..];
            places.of("$${"); // what is escaped is not found again as a reference
            continue;
        }
        plain.push_str(&rest[..at]);
        rest = &rest[at..];
        let Some(end) = rest.find('}') else {
            let span = places.of(rest);
            let wrong_here = Diagnostic::error(span, "this reference is not closed", "no `}`");
            wrong.push(wrong_here.help("write `$${` for a plain `${`"));
            rest = "";
            break;
        };
        let token = &rest[..=end];
        rest = &rest[end + 1..];
        let span = places.of(token);
        let inner = &token[2..end];
        if LITERAL.contains(&inner.split('.').next().unwrap_or_default()) {
            plain.push_str(token);
            continue;
        }
        match reference(inner) {
            Ok(reference) => {
                if !plain.is_empty() {
                    pieces.push(Piece::Plain(std::mem::take(&mut plain)));
                }
                pieces.push(Piece::Ref(reference, span));
            }
            Err((message, help)) => {
                wrong.push(Diagnostic::error(span, message, "not a reference").help(help));
            }
        }
    }
    plain.push_str(rest);
    if !plain.is_empty() || pieces.is_empty() {
        pieces.push(Piece::Plain(plain));
    }
    if wrong.is_empty() { Ok(pieces) } else { Err(wrong) }
}

/// Finds tokens of a text in the source: the two differ by quotes, escapes and folding.
struct Places<'a> {
    source: &'a Source,
    node: &'a Node,
    next: usize,
}

impl Places<'_> {
    fn of(&mut self, token: &str) -> Span {
        let end = self.node.span.end;
        let within = self.source.text.get(self.next..end).unwrap_or_default();
        let Some(at) = within.find(token) else { return self.node.span };
        let start = self.next + at;
        self.next = start + token.len();
        Span::new(start, self.next)
    }
}

fn is_name(s: &str) -> bool {
    !s.is_empty() && s.chars().all(|c| c.is_alphanumeric() || c == '_' || c == '-')
}

fn reference(inner: &str) -> Result<Reference, (String, String)> {
    let literal = "write `$${` for a plain `${`";
    let whole = || format!("`${{{inner}}}` is not a reference");
    let (root, rest) = inner.split_once('.').unwrap_or((inner, ""));
    if !ROOTS.contains(&root) {
        let near = crate::source::nearest(root, ROOTS.into_iter().chain(LITERAL));
        let near = near.map(|r| format!("did you mean `{r}`? "));
        let forms = "a reference starts with `params.`, `steps.`, `sweep.` or `env.` (in a \
                     command's text also `out.` or `files.`)";
        return Err((whole(), format!("{}{forms}; {literal}", near.unwrap_or_default())));
    }
    let names: Vec<&str> = rest.split('.').collect();
    let all_names = names.iter().all(|n| is_name(n));
    match (root, names.as_slice()) {
        ("params", _) if all_names => Ok(Reference::Param(rest.to_owned())),
        ("sweep", _) if all_names => Ok(Reference::Sweep(rest.to_owned())),
        ("env", [name]) if all_names => Ok(Reference::Env((*name).to_owned())),
        ("steps", [step]) if all_names => {
            Ok(Reference::Step { step: (*step).to_owned(), port: None })
        }
        ("steps", [step, "*"]) if is_name(step) => {
            Ok(Reference::Gather { step: (*step).to_owned() })
        }
        ("steps", [step, port]) if all_names => {
            let port = Some((*port).to_owned());
            Ok(Reference::Step { step: (*step).to_owned(), port })
        }
        ("steps", _) => Err((
            whole(),
            "steps are named by `${steps.name}`, a port by `${steps.name.port}`, all points of \
             a sweep by `${steps.name.*}`"
                .into(),
        )),
        ("env", _) => Err((whole(), "an environment variable is named by `${env.NAME}`".into())),
        _ => Err((whole(), format!("write a name after the dot, like `${{{root}.name}}`"))),
    }
}

/// All text nodes of a tree.
pub(super) fn texts<'a>(node: &'a Node, visit: &mut impl FnMut(&'a Node)) {
    if node.as_text().is_some() {
        visit(node);
    }
    for item in node.as_list().unwrap_or_default() {
        texts(item, visit);
    }
    for entry in node.as_map().unwrap_or_default() {
        texts(&entry.value, visit);
    }
}

/// Keys that nobody can mean: references are replaced in values only, and a few names stand for
/// edges and files.
pub(super) fn check_keys(node: &Node, out: &mut Vec<Diagnostic>) {
    for item in node.as_list().unwrap_or_default() {
        check_keys(item, out);
    }
    for entry in node.as_map().unwrap_or_default() {
        if entry.key.contains("${") {
            let message = format!("a reference cannot stand in a key: `{}`", entry.key);
            let wrong = Diagnostic::error(entry.key_span, message, "not replaced here");
            out.push(wrong.help("write the key itself; references are replaced in values"));
        } else if RESERVED.contains(&entry.key.as_str()) {
            let message = format!("`{}` cannot be a key", entry.key);
            let wrong = Diagnostic::error(entry.key_span, message, "reserved");
            out.push(wrong.help("an edge is written as `${steps.name}`, a file as its path"));
        }
        check_keys(&entry.value, out);
    }
}

/// "did you mean `x`?" over owned names.
pub(super) fn near<'a>(wrong: &str, known: impl IntoIterator<Item = &'a str>) -> Option<String> {
    let known: Vec<&str> = known.into_iter().collect();
    suggest(wrong, &known)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::yaml::parse;

    fn of(yaml: &str) -> Result<Vec<Piece>, Vec<Diagnostic>> {
        let source = Source::new("t", yaml);
        pieces(&parse(&source).unwrap(), &source)
    }

    #[test]
    fn forms() {
        let span = Span::new(1, 18);
        let port = Some("train".to_owned());
        let whole = Piece::Ref(Reference::Step { step: "tok".into(), port }, span);
        assert_eq!(
            of("'${steps.tok.train}'").unwrap()[0],
            Piece::Ref(
                Reference::Step { step: "tok".into(), port: Some("train".into()) },
                Span::new(1, 19)
            )
        );
        assert_ne!(of("'${steps.tok.train}'").unwrap(), [whole]);
        let mixed = of("\"a $${x} ${params.p.q}${out.y} $5\"").unwrap();
        assert_eq!(
            mixed,
            [
                Piece::Plain("a ${x} ".into()),
                Piece::Ref(Reference::Param("p.q".into()), Span::new(9, 22)),
                Piece::Plain("${out.y} $5".into()),
            ]
        );
        assert_eq!(of("''").unwrap(), [Piece::Plain(String::new())]);
    }

    #[test]
    fn places_of_repeated_references() {
        let found = of("'${env.A}, ${env.A}'").unwrap();
        let spans: Vec<Span> = found
            .iter()
            .filter_map(|p| if let Piece::Ref(_, s) = p { Some(*s) } else { None })
            .collect();
        assert_eq!(spans, [Span::new(1, 9), Span::new(11, 19)]);
    }

    #[test]
    fn an_escape_is_not_found_as_a_reference() {
        let found = of("'$${env.A} ${env.A}'").unwrap();
        assert_eq!(found[1], Piece::Ref(Reference::Env("A".into()), Span::new(11, 19)));
    }

    #[test]
    fn the_words_of_commands_are_suggested() {
        let help = |text: &str| of(text).unwrap_err()[0].help.clone().unwrap();
        assert!(help("'${file.x}'").starts_with("did you mean `files`?"));
        assert!(help("'${output.a}'").starts_with("did you mean `out`?"));
    }

    #[test]
    fn refused() {
        for bad in [
            "${",
            "${}",
            "${x}",
            "${HOME}",
            "${params}",
            "${params.}",
            "${steps.a.b.c}",
            "${steps.*}",
            "${ params.x }",
            "${env.A.B}",
            "${sweep.a b}",
            "a ${steps.x",
        ] {
            assert!(of(&format!("'{bad}'")).is_err(), "{bad}");
        }
        let two = of("'${x} and ${step.y}'").unwrap_err();
        assert_eq!(two.len(), 2);
        assert!(two[1].help.as_ref().unwrap().starts_with("did you mean `steps`?"));
    }
}

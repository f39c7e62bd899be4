//! Text with `{field}` places, `{{` and `}}` for braces.

use anyhow::Result;

use super::piece::{Part, Piece, push};
use crate::source::Fault;

#[derive(Debug, Clone, PartialEq, Eq)]
enum Token {
    Literal(String),
    Field(String),
}

/// A parsed text with places for fields.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern(Vec<Token>);

const HELP: &str = "a place for a field is `{field}`; write `{{` and `}}` for braces";

impl Pattern {
    /// Parses a text.
    ///
    /// # Errors
    /// When a brace is left open or stands alone, or a place has no name.
    pub fn parse(text: &str) -> Result<Self> {
        let mut tokens = Vec::new();
        let mut literal = String::new();
        let mut rest = text;
        while let Some(at) = rest.find(['{', '}']) {
            literal.push_str(&rest[..at]);
            let brace = &rest[at..=at];
            rest = &rest[at + 1..];
            if let Some(after) = rest.strip_prefix(brace) {
                literal.push_str(brace);
                rest = after;
                continue;
            }
            let end = rest.find('}').filter(|_| brace == "{");
            let Some(end) = end else {
                let what = if brace == "{" { "is never closed" } else { "closes nothing" };
                return Err(Fault::new(format!("`{brace}` {what}")).help(HELP).into());
            };
            let name = rest[..end].trim();
            if name.is_empty() || name.contains('{') {
                return Err(Fault::new(format!("`{{{name}}}` names no field")).help(HELP).into());
            }
            if !literal.is_empty() {
                tokens.push(Token::Literal(std::mem::take(&mut literal)));
            }
            tokens.push(Token::Field(name.to_owned()));
            rest = &rest[end + 1..];
        }
        literal.push_str(rest);
        if !literal.is_empty() {
            tokens.push(Token::Literal(literal));
        }
        Ok(Self(tokens))
    }

    /// The fields it has places for, in order.
    pub fn fields(&self) -> impl Iterator<Item = &str> {
        self.0.iter().filter_map(|t| match t {
            Token::Field(name) => Some(name.as_str()),
            Token::Literal(_) => None,
        })
    }

    /// Fills the places; `literals` is the part that the fixed text is.
    ///
    /// # Errors
    /// When `value` fails for a field.
    pub fn render<'a>(
        &self,
        literals: Part,
        value: impl Fn(&str) -> Result<(Part, &'a str)>,
    ) -> Result<Vec<Piece>> {
        let mut pieces = Vec::new();
        for token in &self.0 {
            let (part, text) = match token {
                Token::Literal(text) => (literals, text.as_str()),
                Token::Field(name) => value(name)?,
            };
            push(&mut pieces, Piece::new(part, text));
        }
        Ok(pieces)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_and_braces() {
        let p = Pattern::parse("a {{x}} {b}{ c }}}").unwrap();
        assert_eq!(p.fields().collect::<Vec<_>>(), ["b", "c"]);
        let pieces = p
            .render(Part::Template, |f| {
                Ok(if f == "b" { (Part::Input, "B") } else { (Part::Template, "C") })
            })
            .unwrap();
        let text: Vec<(Part, &str)> = pieces.iter().map(|p| (p.part, p.text.as_str())).collect();
        assert_eq!(text, [(Part::Template, "a {x} "), (Part::Input, "B"), (Part::Template, "C}")]);
    }

    #[test]
    fn faults_are_named() {
        for (text, message) in [
            ("a {b", "`{` is never closed"),
            ("a } b", "`}` closes nothing"),
            ("a {} b", "`{}` names no field"),
        ] {
            assert_eq!(Pattern::parse(text).unwrap_err().to_string(), message);
        }
    }
}

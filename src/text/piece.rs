//! Pieces of a rendered row.

use serde::Serialize;

/// What part of a rendered row a piece is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// Fixed text of the template; never shortened.
    Template,
    /// The row's own input; the only part that truncation may shorten.
    Input,
    /// What the model learns to write; the only part with labels.
    Target,
}

impl Part {
    /// As stored in the `kind` field of a segment.
    pub fn name(self) -> &'static str {
        match self {
            Self::Template => "template",
            Self::Input => "input",
            Self::Target => "target",
        }
    }

    /// From [`Part::name`].
    pub fn of_name(name: &str) -> Option<Self> {
        [Self::Template, Self::Input, Self::Target].into_iter().find(|p| p.name() == name)
    }
}

/// A piece of a rendered row.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Piece {
    /// What it is.
    #[serde(rename = "kind")]
    pub part: Part,
    /// Its text.
    pub text: String,
}

impl Piece {
    /// A piece of a row.
    pub fn new(part: Part, text: impl Into<String>) -> Self {
        Self { part, text: text.into() }
    }
}

/// Adds a piece, joining it to the one before it where both are the same part; two inputs stay
/// apart, since either may be shortened alone.
pub(super) fn push(pieces: &mut Vec<Piece>, piece: Piece) {
    if piece.text.is_empty() && piece.part != Part::Target {
        return;
    }
    match pieces.last_mut() {
        Some(last) if last.part == piece.part && piece.part != Part::Input => {
            last.text.push_str(&piece.text);
        }
        _ => pieces.push(piece),
    }
}

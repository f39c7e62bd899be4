//! Source text, spans in it, and what there is to say about them.

use std::fmt;
use std::sync::Arc;

use serde::Serialize;

/// A text that a person wrote, with the name it is shown under.
#[derive(Debug, Clone)]
pub struct Source {
    /// Shown in diagnostics; usually the path as the user gave it.
    pub name: String,
    /// The whole text.
    pub text: Arc<str>,
}

impl Source {
    /// A source from a name and its text.
    pub fn new(name: impl Into<String>, text: impl Into<Arc<str>>) -> Self {
        Self { name: name.into(), text: text.into() }
    }

    /// Line and column (both from 1, columns in characters) of a byte offset.
    pub fn position(&self, offset: usize) -> (usize, usize) {
        let mut offset = offset.min(self.text.len());
        while !self.text.is_char_boundary(offset) {
            offset -= 1;
        }
        let before = &self.text[..offset];
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().map_or(0, |l| l.chars().count()) + 1;
        (line, column)
    }
}

/// A byte range in a [`Source`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize)]
pub struct Span {
    /// First byte.
    pub start: usize,
    /// One past the last byte.
    pub end: usize,
}

impl Span {
    /// The span from `start` up to, not including, `end`.
    pub fn new(start: usize, end: usize) -> Self {
        Self { start, end: end.max(start) }
    }
}

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// The pipeline is refused.
    Error,
    /// It can run, but the user should know.
    Warning,
}

/// One thing wrong at one place: message, where, and what to do.
/// Messages are lower-case fragments without a full stop.
#[derive(Debug, Clone, Serialize)]
pub struct Diagnostic {
    /// How bad it is.
    pub severity: Severity,
    /// What is wrong.
    pub message: String,
    /// Where.
    pub span: Span,
    /// A few words shown under the span.
    pub label: String,
    /// What to do about it.
    pub help: Option<String>,
}

impl Diagnostic {
    /// An error at a place.
    pub fn error(span: Span, message: impl Into<String>, label: impl Into<String>) -> Self {
        Self {
            severity: Severity::Error,
            message: message.into(),
            span,
            label: label.into(),
            help: None,
        }
    }

    /// A warning at a place.
    pub fn warning(span: Span, message: impl Into<String>, label: impl Into<String>) -> Self {
        Self { severity: Severity::Warning, ..Self::error(span, message, label) }
    }

    /// With what to do about it.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// With what to do about it, if anything is known.
    #[must_use]
    pub fn maybe_help(mut self, help: Option<String>) -> Self {
        self.help = help.or(self.help);
        self
    }
}

/// A failure that carries advice: message, cause (as `source`) and help apart.
/// Every room below the engine returns `anyhow::Error`; wrap a `Fault` in it wherever the user
/// can do something about the failure, and the roof prints the help.
#[derive(Debug)]
pub struct Fault {
    /// What went wrong, as a lower-case fragment.
    pub message: String,
    /// What to do about it.
    pub help: Option<String>,
    /// Why, one level down.
    pub cause: Option<anyhow::Error>,
}

impl Fault {
    /// A failure without advice yet.
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), help: None, cause: None }
    }

    /// With advice.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// With its cause.
    #[must_use]
    pub fn cause(mut self, cause: impl Into<anyhow::Error>) -> Self {
        self.cause = Some(cause.into());
        self
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Fault {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.cause.as_ref().map(|e| &**e as _)
    }
}

/// All advice found along the chain of an error.
pub fn advice(error: &anyhow::Error) -> Vec<String> {
    let faults = error.chain().filter_map(|e| e.downcast_ref::<Fault>());
    faults.filter_map(|f| f.help.clone()).collect()
}

/// The known name that a mistyped one most likely meant, if any is near: one that holds it or that
/// it holds (`bench`, `benchmark`) or that it abbreviates (`lr`, `learning_rate`), else the one
/// with the fewest edits.
pub fn nearest<'a>(
    wrong: &str,
    known: impl IntoIterator<Item = impl Into<&'a str>>,
) -> Option<&'a str> {
    let wrong = wrong.to_lowercase();
    let length = wrong.chars().count();
    let scored = known.into_iter().map(Into::into).filter_map(|name: &str| {
        let other = name.to_lowercase();
        let other_length = other.chars().count();
        let edits = strsim::damerau_levenshtein(&wrong, &other);
        let holds = other.contains(&wrong) || wrong.contains(&other);
        let initials = other.split(['_', '-']).filter_map(|word| word.chars().next());
        let related = holds && length.min(other_length) >= 3
            || length >= 2 && initials.collect::<String>() == wrong;
        // Of a short name nothing would be left.
        let limit = (length / 3).max(2).min(length.saturating_sub(1)).min(other_length);
        (related || edits <= limit).then_some((!related, edits, name))
    });
    scored.min_by_key(|(unrelated, edits, _)| (*unrelated, *edits)).map(|(.., name)| name)
}

/// Names that are listed where nothing is near.
const LISTED: usize = 20;

/// "did you mean `x`?" or, with nothing near, the list of what there is.
pub fn suggest(wrong: &str, known: &[&str]) -> Option<String> {
    if let Some(name) = nearest(wrong, known.iter().copied()) {
        return Some(format!("did you mean `{name}`?"));
    }
    (!known.is_empty()).then(|| {
        let list: Vec<String> = known.iter().take(LISTED).map(|k| format!("`{k}`")).collect();
        let more = match known.len().saturating_sub(LISTED) {
            0 => String::new(),
            n => format!(" and {n} more"),
        };
        format!("there is {}{more}", list.join(", "))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_count_characters() {
        let s = Source::new("x", "aé\nbç d");
        assert_eq!(s.position(0), (1, 1));
        assert_eq!(s.position(3), (1, 3));
        assert_eq!(s.position(4), (2, 1));
        assert_eq!(s.position(8), (2, 4));
        assert_eq!(s.position(999), (2, 5));
    }

    #[test]
    fn nearest_names() {
        assert_eq!(nearest("tokenise", ["tokenize", "train"]), Some("tokenize"));
        assert_eq!(nearest("q", ["tokenize", "train"]), None);
        assert_eq!(suggest("zzzzzz", &["a", "b"]).unwrap(), "there is `a`, `b`");
        let lora = ["r", "alpha", "dropout", "lora"];
        assert_eq!(nearest("lora_alpha", lora), Some("alpha"));
        assert_eq!(nearest("lr", ["r", "learning_rate", "model"]), Some("learning_rate"));
        assert_eq!(nearest("bench", ["merge", "benchmark"]), Some("benchmark"));
        assert_eq!(nearest("a", ["b"]), None);
        assert_eq!(nearest("abr", ["r"]), None);
        let many: Vec<String> = (100..150).map(|i| format!("name-{i}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert!(suggest("zz", &many).unwrap().ends_with("`name-119` and 30 more"));
    }
}

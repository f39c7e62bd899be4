//! How things that went wrong are shown, and which exit code they give.

use std::io::{ErrorKind, IsTerminal};
use std::process::ExitCode;

use miette::{
    GraphicalReportHandler, GraphicalTheme, LabeledSpan, MietteDiagnostic, MietteError,
    MietteSpanContents, SourceCode, SourceSpan, SpanContents,
};

use crate::source::{Diagnostic, Fault, Severity, Source, advice};
use crate::store::StoreError;

/// Exit codes, as `flow --help` lists them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Exit {
    Done = 0,
    StepFailed = 1,
    Usage = 2,
    Internal = 3,
    Interrupted = 130,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// A command's end that is not success.
#[derive(Debug)]
pub(super) enum Failure {
    /// The pipeline is wrong: all that was found.
    Pipeline(Source, Vec<Diagnostic>),
    /// The command is wrong, or something outside is.
    Usage(anyhow::Error),
    /// The store, the disk or `flow` itself.
    Internal(anyhow::Error),
    /// It was already shown (a step failed, the run was interrupted).
    Shown(Exit),
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        if error.chain().any(|e| e.is::<StoreError>()) {
            return Self::Internal(error);
        }
        Self::Usage(error)
    }
}

/// What the roof itself could not do: nearly always, write to stdout. That nobody reads any more
/// is no failure; it ends the command.
impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        match error.kind() {
            ErrorKind::BrokenPipe => Self::Shown(Exit::Done),
            _ => Self::Internal(error.into()),
        }
    }
}

impl Failure {
    /// A command line that cannot be read, from what clap says of it.
    pub(super) fn misused(error: &clap::Error) -> Self {
        let text = error.render().to_string();
        let mut lines = text.lines().map(str::trim).filter(|l| !l.is_empty());
        let message = lines.next().unwrap_or_default().trim_start_matches("error: ").to_owned();
        let help = lines.collect::<Vec<_>>().join("; ");
        Self::Usage(Fault::new(message).help(help).into())
    }

    /// Shows it on stderr (as JSON on stdout if asked) and gives the exit code.
    pub(super) fn show(self, json: bool, plain: bool) -> Exit {
        match self {
            Self::Pipeline(source, diagnostics) => {
                if json {
                    let _ = outln!("{}", diagnostics_json(&source, &diagnostics));
                } else {
                    show_diagnostics(&source, &diagnostics, plain);
                    let errors = count(&diagnostics, Severity::Error);
                    let s = if errors == 1 { "" } else { "s" };
                    errln!("{}: {errors} error{s}; nothing was run", source.name);
                }
                Exit::Usage
            }
            Self::Usage(error) => {
                show_error(&error, json);
                Exit::Usage
            }
            Self::Internal(error) => {
                show_error(&error, json);
                Exit::Internal
            }
            Self::Shown(exit) => exit,
        }
    }
}

fn count(diagnostics: &[Diagnostic], severity: Severity) -> usize {
    diagnostics.iter().filter(|d| d.severity == severity).count()
}

fn show_error(error: &anyhow::Error, json: bool) {
    let chain: Vec<String> = error.chain().map(ToString::to_string).collect();
    let help = advice(error);
    if json {
        let json = serde_json::json!({ "error": chain[0], "because": &chain[1..], "help": help });
        let _ = outln!("{json}");
        return;
    }
    errln!("error: {}", chain[0]);
    for cause in &chain[1..] {
        errln!("  because: {cause}");
    }
    for line in help {
        errln!("  help: {line}");
    }
}

/// A source for miette, which counts columns in bytes by itself.
#[derive(Debug, Clone)]
struct Shown(Source);

impl SourceCode for Shown {
    fn read_span<'a>(
        &'a self,
        span: &SourceSpan,
        before: usize,
        after: usize,
    ) -> Result<Box<dyn SpanContents<'a> + 'a>, MietteError> {
        let Source { name, text } = &self.0;
        let read = text.as_bytes().read_span(span, before, after)?;
        let (data, at, lines) = (read.data(), *read.span(), read.line_count());
        // Without lines around it, this asks for the position to name.
        let (line, column) = match before + after {
            0 => self.0.position(span.offset()),
            _ => (read.line() + 1, read.column() + 1),
        };
        let name = name.clone();
        let named = MietteSpanContents::new_named(name, data, at, line - 1, column - 1, lines);
        Ok(Box::new(named))
    }
}

/// Diagnostics with file, line, column and the text they speak of.
pub(super) fn show_diagnostics(source: &Source, diagnostics: &[Diagnostic], plain: bool) {
    let colours = !plain && std::io::stderr().is_terminal();
    let theme = if colours { GraphicalTheme::unicode() } else { GraphicalTheme::unicode_nocolor() };
    let handler = GraphicalReportHandler::new_themed(theme).with_links(false).with_width(100);
    let text = Shown(source.clone());
    for diagnostic in diagnostics {
        let span = diagnostic.span.start..diagnostic.span.end;
        let severity = match diagnostic.severity {
            Severity::Error => miette::Severity::Error,
            Severity::Warning => miette::Severity::Warning,
        };
        let mut shown = MietteDiagnostic::new(&diagnostic.message)
            .with_severity(severity)
            .with_label(LabeledSpan::at(span, &diagnostic.label));
        shown.help.clone_from(&diagnostic.help);
        let report = miette::Report::from(shown).with_source_code(text.clone());
        let mut out = String::new();
        if handler.render_report(&mut out, report.as_ref()).is_ok() {
            errln!("{out}");
        }
    }
}

/// Diagnostics as JSON, with positions resolved.
pub(super) fn diagnostics_json(source: &Source, diagnostics: &[Diagnostic]) -> serde_json::Value {
    let list = diagnostics.iter().map(|d| {
        let (line, column) = source.position(d.span.start);
        serde_json::json!({
            "severity": d.severity, "file": source.name, "line": line, "column": column,
            "message": d.message, "label": d.label, "help": d.help,
        })
    });
    serde_json::Value::Array(list.collect())
}

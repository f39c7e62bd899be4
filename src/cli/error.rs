//! How things that went wrong are shown, and which exit code they give.

use std::io::IsTerminal;
use std::process::ExitCode;

use miette::{GraphicalReportHandler, GraphicalTheme, LabeledSpan, MietteDiagnostic, NamedSource};

use crate::source::{Diagnostic, Severity, Source, advice};
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
        let broken_pipe = error.chain().any(|e| {
            let io = e.downcast_ref::<std::io::Error>();
            io.is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
        });
        if broken_pipe {
            return Self::Shown(Exit::Done);
        }
        if error.chain().any(|e| e.is::<StoreError>()) {
            return Self::Internal(error);
        }
        Self::Usage(error)
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        anyhow::Error::from(error).into()
    }
}

impl Failure {
    /// Shows it on stderr (as JSON on stdout if asked) and gives the exit code.
    pub(super) fn show(self, json: bool, plain: bool) -> Exit {
        match self {
            Self::Pipeline(source, diagnostics) => {
                if json {
                    println!("{}", diagnostics_json(&source, &diagnostics));
                } else {
                    show_diagnostics(&source, &diagnostics, plain);
                    let errors = count(&diagnostics, Severity::Error);
                    let s = if errors == 1 { "" } else { "s" };
                    eprintln!("{}: {errors} error{s}; nothing was run", source.name);
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
        println!(
            "{}",
            serde_json::json!({ "error": chain[0], "because": &chain[1..], "help": help })
        );
        return;
    }
    eprintln!("error: {}", chain[0]);
    for cause in &chain[1..] {
        eprintln!("  because: {cause}");
    }
    for line in help {
        eprintln!("  help: {line}");
    }
}

/// Diagnostics with file, line, column and the text they speak of.
pub(super) fn show_diagnostics(source: &Source, diagnostics: &[Diagnostic], plain: bool) {
    let colours = !plain && std::io::stderr().is_terminal();
    let theme = if colours { GraphicalTheme::unicode() } else { GraphicalTheme::unicode_nocolor() };
    let handler = GraphicalReportHandler::new_themed(theme).with_links(false).with_width(100);
    let text = NamedSource::new(&source.name, source.text.to_string());
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
            eprintln!("{out}");
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

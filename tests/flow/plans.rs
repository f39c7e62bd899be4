//! Good and bad pipelines.

mod added; // fields that a kind did not have at first
mod fields; // the laws of keys at the real kinds
mod good;
mod laws;
mod refused;
mod toys;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use flow::pipeline::{Plan, Settings};
use flow::source::{Diagnostic, Severity, Source};

fn settings() -> Settings {
    let env = BTreeMap::from([("TOKEN".to_owned(), "x".to_owned())]);
    let resources = ["licence".to_owned()].into();
    Settings { env, resources, ..Settings::default() }
}

fn plan(text: &str) -> Result<Plan, Vec<Diagnostic>> {
    plan_with(text, &settings())
}

fn plan_with(text: &str, settings: &Settings) -> Result<Plan, Vec<Diagnostic>> {
    let source = Source::new("test.yaml", text);
    Plan::new(Path::new("test.yaml"), source, toys::KINDS, settings)
}

/// `line:column` of both ends, the text there, message, label, help.
fn told(text: &str, diagnostics: &[Diagnostic]) -> String {
    let source = Source::new("test.yaml", text);
    let mut out = String::new();
    for d in diagnostics {
        let (line, column) = source.position(d.span.start);
        let severity = if d.severity == Severity::Error { "" } else { "warning: " };
        let _ = writeln!(out, "{line}:{column} {severity}{}", d.message);
        let _ = writeln!(out, "  at    {:?} ({})", &text[d.span.start..d.span.end], d.label);
        if let Some(help) = &d.help {
            let _ = writeln!(out, "  help  {help}");
        }
    }
    out
}

#[test]
fn bad_pipelines() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/flow/bad");
    let entries = std::fs::read_dir(&folder).unwrap();
    let mut files: Vec<PathBuf> = entries
        .map(|e| e.unwrap().path())
        .filter(|p| p.extension().is_some_and(|e| e == "yaml"))
        .collect();
    files.sort();
    assert!(files.len() > 40);
    let mut settings = insta::Settings::clone_current();
    settings.set_prepend_module_to_snapshot(false);
    settings.set_snapshot_path(&folder);
    settings.set_omit_expression(true);
    settings.bind(|| {
        for file in files {
            let text = std::fs::read_to_string(&file).unwrap();
            let name = file.file_stem().unwrap().to_string_lossy().into_owned();
            let diagnostics = plan(&text).expect_err(&name);
            assert!(diagnostics.iter().any(|d| d.severity == Severity::Error), "{name}");
            insta::assert_snapshot!(name, told(&text, &diagnostics));
        }
    });
}

#[test]
fn shipped_pipelines_are_good() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("pipelines");
    let mut seen = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let file = entry.unwrap().path();
        if file.extension().is_none_or(|e| e != "yaml") {
            continue;
        }
        let text = std::fs::read_to_string(&file).unwrap();
        let source = Source::new(file.display().to_string(), text.clone());
        let checked = Plan::new(&file, source, flow::kinds::ALL, &Settings::default());
        let plan = checked.unwrap_or_else(|d| panic!("{}\n{}", file.display(), told(&text, &d)));
        assert_eq!(plan.order().len(), plan.graph.node_count());
        seen += 1;
    }
    assert!(seen >= 3);
}

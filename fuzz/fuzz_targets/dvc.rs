//! A `dvc.yaml` beside files of parameters: imported to a pipeline that passes every check, or
//! refused with a reason. What is made is always checked, so a refusal of that is a mistake.

#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

use flow::import::{ImportError, dvc};
use flow::pipeline::Settings;
use libfuzzer_sys::fuzz_target;

static PROJECT: LazyLock<(tempfile::TempDir, PathBuf)> = LazyLock::new(|| {
    let dir = tempfile::tempdir().unwrap();
    let project = dir.path().join("project");
    for folder in ["data/parts", "src", "reports", "models"] {
        std::fs::create_dir_all(project.join(folder)).unwrap();
    }
    for file in ["data/raw.txt", "data/parts/a.txt", "src/prepare.sh"] {
        std::fs::write(project.join(file), "x").unwrap();
    }
    let params = "prepare: { lines: 3 }\ntrain: { rate: 0.5, small: 1e-6, layers: [8, 4], name: a b }\n\
                  rates: [0.1, 0.01]\nmodels: models\nseed: 7\n";
    std::fs::write(project.join("params.yaml"), params).unwrap();
    std::fs::write(project.join("names.json"), r#"{"title": "world"}"#).unwrap();
    (dir, project)
});

fuzz_target!(|text: &str| {
    let project = &PROJECT.1;
    let file = project.join("dvc.yaml");
    std::fs::write(&file, text).unwrap();
    match dvc::import(&file, project, flow::kinds::ALL, &Settings::default()) {
        Ok(imported) => assert!(imported.text.contains("steps:")),
        Err(ImportError::Refused(source, found)) => {
            assert!(!found.is_empty(), "refused without a reason");
            for diagnostic in &found {
                let _ = &source.text[diagnostic.span.start..diagnostic.span.end];
            }
            if source.name.contains("was made") {
                // A circle of stages is one of steps, and a `${out}` of the shell is one of ours.
                let known = |m: &str| {
                    ["each other", "is not declared", "depends on itself", "characters"]
                        .iter()
                        .any(|k| m.contains(k))
                };
                assert!(found.iter().any(|d| known(&d.message)), "{}\n{found:?}", source.text);
            }
        }
        Err(ImportError::Unread(_)) => {}
    }
});

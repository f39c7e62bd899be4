//! Projects of DVC (`tests/fixtures/dvc`): imported, checked, run; the same outputs as DVC's.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::{Project, err, out};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/dvc").join(name)
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        if from.is_dir() {
            copy(&from, &to);
        } else {
            fs::copy(&from, &to).unwrap();
        }
    }
}

/// Texts by path, of all files below a folder.
fn files(dir: &Path, prefix: &str, into: &mut BTreeMap<String, String>) {
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let path = format!("{prefix}{}", entry.file_name().into_string().unwrap());
        if entry.path().is_dir() {
            files(&entry.path(), &format!("{path}/"), into);
        } else {
            into.insert(path, fs::read_to_string(entry.path()).unwrap());
        }
    }
}

/// A project in a folder of its name, imported and run; its pipeline, what was said, its outputs.
fn import(name: &str) -> (String, String, BTreeMap<String, String>) {
    let project = Project::new("");
    copy(&fixture(name), &project.path(name));
    let path = format!("{name}/flow.yaml");
    let imported = project.flow(&["import", name, "--output", &path]);
    assert_eq!(imported.status.code(), Some(0), "{}", err(&imported));
    let validated = project.flow(&["validate", &path]);
    assert_eq!(validated.status.code(), Some(0), "{}", err(&validated));
    let ran = project.flow(&["run", &path]);
    let text = fs::read_to_string(project.path(&path)).unwrap();
    assert_eq!(ran.status.code(), Some(0), "{text}\n{}", err(&ran));
    let mut outputs = BTreeMap::new();
    for entry in fs::read_dir(project.path("outputs").join(name)).unwrap() {
        files(&entry.unwrap().path(), "", &mut outputs);
    }
    outputs.remove(".ran");
    (text, err(&imported), outputs)
}

fn gives_what_dvc_gives(name: &str) {
    let (text, said, outputs) = import(name);
    let expected = fs::read_to_string(fixture(name).join("expected.json")).unwrap();
    let expected: BTreeMap<String, String> = serde_json::from_str(&expected).unwrap();
    assert_eq!(outputs, expected);
    insta::assert_snapshot!(name, format!("{text}\n---- stderr\n{said}"));
}

#[test]
fn templates_params_folders_and_plots() {
    gives_what_dvc_gives("basic");
}

#[test]
fn loops_become_steps() {
    gives_what_dvc_gives("loops");
}

#[test]
fn a_matrix_becomes_a_sweep() {
    gives_what_dvc_gives("matrix");
}

#[test]
fn what_has_no_counterpart_is_said() {
    gives_what_dvc_gives("rest");
}

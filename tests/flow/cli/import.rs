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

#[test]
fn mistakes_have_places_and_nothing_is_written() {
    let project = Project::new("");
    project.write("params.yaml", "lr: 0.1\n");
    let refused = |text: &str, told: &str| {
        project.write("dvc.yaml", text);
        let output = project.flow(&["import", "dvc.yaml", "-o", "flow.yaml"]);
        assert_eq!(output.status.code(), Some(2), "{text}\n{}", err(&output));
        assert!(!project.path("flow.yaml").exists());
        let said = err(&output);
        assert!(said.contains("dvc.yaml:"), "{said}");
        assert!(said.contains(told), "{told}: {said}");
    };
    let stage = |keys: &str| format!("stages:\n  a:\n    outs: [o]\n{keys}\n");
    refused("stages: 3\n", "dvc.yaml:1:9");
    refused("stages: {}\n", "no stages");
    refused("a: b: c", "not valid YAML");
    refused(&stage("    cmdd: x"), "unknown key");
    refused(&stage("    cmdd: x"), "did you mean `cmd`?");
    refused(&stage("    cmd: x ${lrr}"), "dvc.yaml:4:10");
    refused(&stage("    cmd: x ${lrr}"), "did you mean `lr`?");
    refused(&stage("    cmd: [x, [y]]"), "expected text");
    refused(&stage("    cmd: x\n    deps: [o]"), "reads `o`, which it writes");
    refused(&stage("    cmd: x\n    deps: ['a b']"), "cannot have the path `a b`");
    refused(&stage("    cmd: x\n    vars: [lr: 2]"), "`lr` has a value already");
    refused(&stage("    cmd: x\n    vars: [no.toml]"), "YAML and JSON only");
    refused(&stage("    cmd: x\n    frozen: 1"), "expected `true` or `false`");
    refused(&(stage("    cmd: x") + "  b: { cmd: x, outs: [o/x] }\n"), "both write `o/x`");
    refused("stages:\n  a: { foreach: ['${lr}'] }\n", "has `foreach` and no `do`");
    refused("stages:\n  a: { matrix: { x: '${lr}' }, cmd: x }\n", "expected a list of values");
    let axis = (0..2000).map(|n| n.to_string()).collect::<Vec<_>>().join(", ");
    let huge = format!("stages:\n  a: {{ matrix: {{ x: [{axis}], y: [{axis}] }}, cmd: x }}\n");
    refused(&huge, "more than 10000 stages");

    let missing = project.flow(&["import", "nowhere/dvc.yaml"]);
    assert_eq!(missing.status.code(), Some(2));
    assert!(err(&missing).contains("cannot read nowhere/dvc.yaml"), "{}", err(&missing));
    project.write("dvc.yaml", &stage("    cmd: touch o"));
    let shown = project.flow(&["import", "."]);
    assert!(out(&shown).contains("kind: command"), "{}", err(&shown));
    let json = project.flow(&["--json", "import", "."]);
    let json: serde_json::Value = serde_json::from_str(&out(&json)).unwrap();
    assert!(json["pipeline"].as_str().unwrap().contains("run: touch o"), "{json}");
    // A variable may be called as YAML calls a boolean.
    project.write("dvc.yaml", &stage("    cmd: echo $false > o"));
    let shown = project.flow(&["import", "."]);
    assert!(out(&shown).contains(r#"env: ["false"]"#), "{}", err(&shown));
    let there = project.flow(&["import", ".", "-o", "p.yaml"]);
    assert_eq!(there.status.code(), Some(2));
    assert!(err(&there).contains("is there already"), "{}", err(&there));
}

/// Paths above the folder of the file, a pipeline in another folder, a file of another root.
#[test]
fn paths_are_kept() {
    let project = Project::new("");
    fs::create_dir_all(project.path("work/pipes")).unwrap();
    fs::create_dir_all(project.path("flows")).unwrap();
    project.write("work/in.txt", "in\n");
    project.write("far.txt", "far\n");
    let far = project.path("far.txt").canonicalize().unwrap().display().to_string();
    let text = format!(
        "stages:\n  a:\n    cmd: cat ../in.txt {far} > ../out.txt\n    \
         deps: [../in.txt, {far}]\n    outs: [../out.txt]\n"
    );
    project.write("work/pipes/dvc.yaml", &text);
    let imported = project.flow(&["import", "work/pipes", "-o", "flows/x.yaml"]);
    assert_eq!(imported.status.code(), Some(0), "{}", err(&imported));
    let ran = project.flow(&["run", "flows/x.yaml"]);
    assert_eq!(ran.status.code(), Some(0), "{}", err(&ran));
    let made = fs::read_to_string(project.path("outputs/pipes/a/out.txt")).unwrap();
    assert_eq!(made, "in\nfar\n");
    // Both are in the key.
    project.write("far.txt", "farther\n");
    assert_eq!(super::finished(&project.flow(&["--json", "run", "flows/x.yaml"]))["ran"], 1);
}

//! The program as a user types it: what it prints, and how it exits.

mod crowd; // several runs at once
#[cfg(target_os = "linux")]
mod full; // a disk without room
mod import;
mod keeping;
#[cfg(target_os = "linux")]
mod kills; // processes that are killed
mod records;
mod reproduced;
mod rim;
#[cfg(target_os = "linux")]
mod rooms; // folders that are used again
mod steps;
mod unchanged;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use serde_json::Value;

/// A project in a temporary folder.
struct Project {
    dir: tempfile::TempDir,
}

impl Project {
    fn new(pipeline: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join(".git")).unwrap();
        let project = Self { dir };
        project.write("p.yaml", pipeline);
        project
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_flow"));
        command.args(arguments).current_dir(self.dir.path());
        for name in ["FLOW_STORE", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_HUB_CACHE"] {
            command.env_remove(name);
        }
        command.env("HF_HOME", self.path("hf"));
        command
    }

    fn flow(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }
}

fn out(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The last event of a `--json` run.
fn finished(output: &Output) -> Value {
    let text = out(output);
    let last = text.lines().last().unwrap_or_else(|| panic!("no events; {}", err(output)));
    serde_json::from_str(last).unwrap()
}

const REVIEWS: &str = "text,label\nvery good,1\nquite bad,0\nreally good,1\nrather bad,0\n\
    a good one,1\na bad one,0\nso good,1\nso bad,0\n";

const SAMPLE: &str = r#"
name: small
params: { rows: 4, test: 2 }
steps:
  reviews:
    kind: fetch
    with: { files: { train: reviews.csv, test: reviews.csv } }
  sample:
    kind: sample
    with:
      data: "${steps.reviews}"
      stratify: label
      rows: { train: "${params.rows}", test: "${params.test}" }
  texts:
    kind: format
    with: { data: "${steps.sample}", template: classification, input: text, label: label }
outputs: { texts: "${steps.texts}" }
"#;

#[test]
fn runs_once_and_then_from_the_cache() {
    let project = Project::new(SAMPLE);
    project.write("reviews.csv", REVIEWS);
    let first = project.flow(&["run", "p.yaml"]);
    assert_eq!(first.status.code(), Some(0), "{}", err(&first));
    assert!(project.path("outputs/small/texts").is_dir());
    let second = finished(&project.flow(&["--json", "run", "p.yaml"]));
    assert_eq!((second["ran"].as_u64(), second["hits"].as_u64()), (Some(0), Some(3)), "{second}");

    let third = project.flow(&["run", "p.yaml", "--set", "params.rows=6"]);
    assert!(err(&third).contains("rows.train 4 -> 6"), "{}", err(&third));
    let why = out(&project.flow(&["why"]));
    assert!(why.contains("reviews  from the cache"), "{why}");
    assert!(why.contains("sample  ran: with.rows.train 4 -> 6"), "{why}");
    let trace = out(&project.flow(&["trace", "texts"]));
    assert!(trace.contains("from sample") && trace.contains("from reviews"), "{trace}");
    assert_eq!(out(&project.flow(&["runs"])).lines().count(), 4);
    let show = out(&project.flow(&["show", "latest", "texts"]));
    assert!(show.contains("format v"), "{show}");

    // what the user edits in the input is noticed; the clock is not
    project.write("reviews.csv", &REVIEWS.replace("good", "great").replace("bad", "awful"));
    let fourth = finished(&project.flow(&["--json", "run", "p.yaml"]));
    assert_eq!((fourth["ran"].as_u64(), fourth["hits"].as_u64()), (Some(3), Some(0)), "{fourth}");
    project.write("reviews.csv", REVIEWS);
    let fifth = finished(&project.flow(&["--json", "run", "p.yaml"]));
    assert_eq!(fifth["ran"], 0, "{fifth}");
}

#[test]
fn all_mistakes_are_shown_and_nothing_runs() {
    let text = SAMPLE.replace("kind: sample", "kind: sampel").replace("template", "tempalte");
    let project = Project::new(&text);
    let output = project.flow(&["run", "p.yaml"]);
    assert_eq!(output.status.code(), Some(2));
    let said = err(&output);
    assert!(said.contains("p.yaml:9:11") && said.contains("did you mean `sample`?"), "{said}");
    assert!(said.contains("`tempalte`") && said.contains("`template`"), "{said}");
    assert!(!project.path(".flow").exists());
    let list: Value =
        serde_json::from_str(&out(&project.flow(&["--json", "validate", "p.yaml"]))).unwrap();
    assert_eq!(list[0]["line"], 9, "{list}");
}

#[test]
fn a_missing_file_names_its_neighbours() {
    let project = Project::new(SAMPLE);
    let output = project.flow(&["run", "q.yaml"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(err(&output).contains("p.yaml"), "{}", err(&output));
    // the data that the pipeline names is not there either
    let output = project.flow(&["run", "p.yaml"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(err(&output).contains("reviews.csv"), "{}", err(&output));
}

#[test]
fn an_unreachable_hub_is_named() {
    let text = "name: p\nsteps:\n  base:\n    kind: model\n    with: { model: a/b }\n";
    let project = Project::new(text);
    let output = project
        .command(&["run", "p.yaml"])
        .env("HF_ENDPOINT", "http://127.0.0.1:9")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", err(&output));
    let said = err(&output);
    for word in ["127.0.0.1:9", "HF_ENDPOINT", "HF_HUB_OFFLINE"] {
        assert!(said.contains(word), "{word} is missing from {said}");
    }
    assert!(!project.path("p.lock").exists());
    // a plan can be made all the same
    let output = project
        .command(&["plan", "p.yaml"])
        .env("HF_ENDPOINT", "http://127.0.0.1:9")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", err(&output));
    assert!(out(&output).contains("unresolved"), "{}", out(&output));
}

const FAILING: &str = r#"
name: failing
steps:
  good:
    kind: command
    with: { run: "echo fine > ${out.a}", outputs: { a: a.txt } }
  bad:
    kind: command
    with: { run: "echo the reason >&2; exit 7", outputs: { a: a.txt } }
  after:
    kind: command
    with: { run: "cat ${steps.bad}/a.txt > ${out.b}", outputs: { b: b.txt } }
"#;

#[test]
fn a_failed_step_exits_with_1_and_keeps_the_rest() {
    let project = Project::new(FAILING);
    let output = project.flow(&["run", "p.yaml", "--keep-going"]);
    assert_eq!(output.status.code(), Some(1), "{}", err(&output));
    let said = err(&output);
    assert!(said.contains("the reason") && said.contains("skipped"), "{said}");
    let end = finished(&project.flow(&["--json", "run", "p.yaml", "--keep-going"]));
    assert_eq!((end["hits"].as_u64(), end["failed"].as_u64()), (Some(1), Some(1)), "{end}");
}

#[test]
fn asking_for_a_gpu_where_there_is_none_is_refused() {
    let text = FAILING.replace("  good:\n", "  good:\n    needs: { gpu: 1 }\n");
    let project = Project::new(&text);
    let plan = project.flow(&["plan", "p.yaml"]);
    assert_eq!(plan.status.code(), Some(0), "{}", err(&plan));
    assert!(err(&plan).contains("warning: good: asks for 1 GPU"), "{}", err(&plan));
    let run = project.flow(&["run", "p.yaml"]);
    assert_eq!(run.status.code(), Some(2));
    assert!(!project.path(".flow/runs").exists_with_entries());
    // what does not need it runs
    let run = project.flow(&["run", "p.yaml", "bad"]);
    assert_eq!(run.status.code(), Some(1), "{}", err(&run));
    // and what is there need not run
    assert_eq!(project.flow(&["validate", "p.yaml"]).status.code(), Some(0));
    project.write("p.yaml", FAILING);
    assert_eq!(project.flow(&["run", "p.yaml", "good"]).status.code(), Some(0));
    project.write("p.yaml", &text);
    let end = finished(&project.flow(&["--json", "run", "p.yaml", "good"]));
    assert_eq!(end["hits"], 1, "{end}");
}

#[test]
fn the_pipeline_for_a_gpu_can_be_planned_and_says_so() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/pipelines/mistral_qlora.yaml");
    let project = Project::new(SAMPLE);
    let store = project.path("store");
    let flow = |verb: &str| {
        let mut command = project.command(&[verb, file, "--store", store.to_str().unwrap()]);
        command.env("HF_HUB_OFFLINE", "1").output().unwrap()
    };
    for (verb, code) in [("validate", 0), ("plan", 0), ("run", 2)] {
        let output = flow(verb);
        assert_eq!(output.status.code(), Some(code), "{verb}: {}", err(&output));
        assert!(err(&output).contains("train, score: asks for 1 GPU"), "{}", err(&output));
    }
}

trait Entries {
    fn exists_with_entries(&self) -> bool;
}

impl Entries for Path {
    fn exists_with_entries(&self) -> bool {
        fs::read_dir(self).is_ok_and(|mut entries| entries.next().is_some())
    }
}

#[cfg(target_os = "linux")]
#[test]
fn an_interrupt_ends_children_and_keeps_finished_work() {
    let text = r#"
name: slow
steps:
  quick:
    kind: command
    with: { run: "echo done > ${out.a}", outputs: { a: a.txt } }
  slow:
    kind: command
    with: { run: "cat ${steps.quick}/a.txt; sleep 4217", outputs: { a: a.txt } }
"#;
    let project = Project::new(text);
    let mut child = project.command(&["run", "p.yaml"]).spawn().unwrap();
    let sleeping = || {
        let found = Command::new("pgrep").args(["-f", "sleep 4217"]).output().unwrap();
        !found.stdout.is_empty()
    };
    let begun = Instant::now();
    while !sleeping() {
        assert!(begun.elapsed() < Duration::from_secs(60), "the step never started");
        std::thread::sleep(Duration::from_millis(50));
    }
    let pid = child.id().to_string();
    Command::new("kill").args(["-INT", &pid]).status().unwrap();
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(130));
    assert!(!sleeping(), "the step outlived its runner");
    let end = finished(&project.flow(&["--json", "run", "p.yaml", "quick"]));
    assert_eq!(end["hits"], 1, "{end}");
}

#[test]
fn two_runs_at_once_do_each_step_once() {
    let text = r#"
name: twice
steps:
  a:
    kind: command
    with: { run: "sleep 1; date +%N > ${out.t}", outputs: { t: t.txt } }
  b:
    kind: command
    with: { run: "cat ${steps.a}/t.txt > ${out.t}", outputs: { t: t.txt } }
outputs: { t: "${steps.b}" }
"#;
    let project = Project::new(text);
    let start = || {
        let mut command = project.command(&["--json", "run", "p.yaml"]);
        command.stdout(std::process::Stdio::piped()).spawn().unwrap()
    };
    let (one, two) = (start(), start());
    let outputs = [one.wait_with_output().unwrap(), two.wait_with_output().unwrap()];
    let ends = outputs.each_ref().map(finished);
    let ran = |end: &Value| end["ran"].as_u64().unwrap();
    assert_eq!(ran(&ends[0]) + ran(&ends[1]), 2, "{ends:?}");
    let records = fs::read_dir(project.path(".flow/records")).unwrap().count();
    assert_eq!(records, 2);
}

#[test]
fn help_kinds_and_schemas() {
    let project = Project::new(SAMPLE);
    assert!(out(&project.flow(&["--help"])).contains("Exit codes"));
    let kinds = out(&project.flow(&["kinds"]));
    for kind in flow::kinds::ALL {
        assert!(kinds.contains(kind.name));
        let about = out(&project.flow(&["kinds", kind.name]));
        assert!(about.lines().count() > 4, "{about}");
    }
    let wrong = project.flow(&["kinds", "trian"]);
    assert_eq!(wrong.status.code(), Some(2));
    assert!(err(&wrong).contains("did you mean `train`?"), "{}", err(&wrong));
    assert!(out(&project.flow(&["completions", "bash"])).contains("_flow"));
    assert_eq!(project.flow(&["frobnicate"]).status.code(), Some(2));
}

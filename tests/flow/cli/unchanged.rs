//! A run in which nothing has changed is over at once; whatever changes is noticed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;

use serde_json::Value;

use super::{Project, err, out};

const PIPELINE: &str = r#"
name: p
params: { word: one }
steps:
  a:
    kind: command
    with:
      run: "cat ${files.in} > ${out.t}; echo ${params.word} ${env.FLAVOUR} >> ${out.t}"
      files: { in: data/in.txt }
      outputs: { t: t }
  b:
    kind: command
    env: [COLOUR]
    with: { run: "cat ${steps.a}/t > ${out.t}", outputs: { t: t } }
outputs: { result: "${steps.b}" }
"#;

/// A project whose pipeline has an index: it was run, has settled, and was run again.
struct Settled(Project);

impl Settled {
    fn new() -> Self {
        let project = Project::new(PIPELINE);
        fs::create_dir(project.path("data")).unwrap();
        project.write("data/in.txt", "in\n");
        let settled = Self(project);
        assert_eq!(settled.events(&[]).1["ran"], 2);
        // Until its files are old enough to be trusted, and a run has seen them so.
        std::thread::sleep(Duration::from_millis(2_100));
        assert!(!settled.is_unchanged(&[]));
        assert!(settled.is_unchanged(&[]));
        settled
    }

    fn run(&self, more: &[&str]) -> Output {
        let mut command = self.0.command(&[&["--json", "run", "p.yaml"], more].concat());
        command.env("FLAVOUR", "sweet").env("COLOUR", "red").output().unwrap()
    }

    fn events(&self, more: &[&str]) -> (Value, Value) {
        let output = self.run(more);
        let text = out(&output);
        let lines: Vec<&str> = text.lines().collect();
        let [first, .., last] = lines[..] else { panic!("no events: {text}{}", err(&output)) };
        (serde_json::from_str(first).unwrap(), serde_json::from_str(last).unwrap())
    }

    /// Whether a run is over before the pipeline is read.
    fn is_unchanged(&self, more: &[&str]) -> bool {
        let (first, last) = self.events(more);
        assert_eq!(last["status"], "done");
        first["type"] == "unchanged"
    }

    fn only_file(&self, folder: &str) -> PathBuf {
        fn first(dir: &Path, found: &mut Vec<PathBuf>) {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() { first(&path, found) } else { found.push(path) }
            }
        }
        let mut found = Vec::new();
        first(&self.0.path(".flow").join(folder), &mut found);
        found.sort();
        found.swap_remove(0)
    }
}

#[test]
fn an_unchanged_run_is_on_record_with_the_steps_it_stands_for() {
    let project = Settled::new();
    let (first, last) = project.events(&[]);
    assert_eq!((&first["type"], &first["steps"]), (&Value::from("unchanged"), &Value::from(2)));
    assert_eq!((&last["ran"], &last["hits"]), (&Value::from(0), &Value::from(2)));
    let shown = project.0.flow(&["--json", "show"]);
    let run: Value = serde_json::from_str(&out(&shown)).unwrap();
    let text = run.to_string();
    assert!(text.contains(first["run"].as_str().unwrap()), "{text}");
    let states = run["steps"].as_array().unwrap().iter().map(|step| &step["state"]);
    assert_eq!(states.collect::<Vec<_>>(), ["hit", "hit"], "{text}");
    for command in [&["runs"][..], &["why"], &["trace", "b"], &["log"], &["show", "latest", "a"]] {
        let output = project.0.flow(command);
        assert!(output.status.success(), "{command:?}: {}", err(&output));
    }
    // Other questions are other indexes.
    assert!(!project.is_unchanged(&["--set", "params.word=two"]));
    assert!(!project.is_unchanged(&["--force", "a"]));
    assert!(!project.is_unchanged(&["a"]));
}

/// What may change, and how.
type Change = (&'static str, fn(&Settled));

const CHANGES: [Change; 10] = [
    ("a comment", |p| p.0.write("p.yaml", &format!("# new\n{PIPELINE}"))),
    ("an input", |p| p.0.write("data/in.txt", "IN\n")),
    ("an edited output", |p| p.0.write("outputs/p/result/t/t", "mine\n")),
    ("a lost output", |p| fs::remove_dir_all(p.0.path("outputs")).unwrap()),
    ("the lock", |p| p.0.write("p.lock", "hub:datasets/a/b@main = 12ab\n")),
    ("a lost object", |p| fs::remove_file(p.only_file("objects")).unwrap()),
    ("a cut object", |p| {
        let object = p.only_file("objects");
        fs::remove_file(&object).unwrap();
        fs::write(object, "x").unwrap();
    }),
    ("a lost record", |p| fs::remove_file(p.only_file("records")).unwrap()),
    ("a lost manifest", |p| fs::remove_file(p.only_file("trees")).unwrap()),
    ("a torn index", |p| {
        let index = p.only_file("unchanged");
        let bytes = fs::read(&index).unwrap();
        fs::write(index, &bytes[..bytes.len() - 1]).unwrap();
    }),
];

#[test]
fn every_change_is_noticed() {
    std::thread::scope(|scope| {
        for (what, change) in CHANGES {
            scope.spawn(move || {
                let project = Settled::new();
                change(&project);
                assert!(!project.is_unchanged(&[]), "{what}");
                let result = fs::read_to_string(project.0.path("outputs/p/result/t/t")).unwrap();
                assert!(result.to_lowercase() == "in\none sweet\n", "{what}: {result}");
            });
        }
    });
}

#[test]
fn the_environment_that_is_read_is_noticed_and_no_other() {
    let project = Settled::new();
    let changes = [
        ("OTHER", Some("new"), true),
        ("FLAVOUR", Some("sour"), false),
        ("COLOUR", Some("blue"), false),
        ("COLOUR", None, false),
    ];
    for (name, value, unchanged) in changes {
        let mut command = project.0.command(&["--json", "run", "p.yaml"]);
        command.env("FLAVOUR", "sweet").env("COLOUR", "red");
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
        let text = out(&command.output().unwrap());
        assert_eq!(text.starts_with(r#"{"type":"unchanged""#), unchanged, "{name}: {text}");
    }
}

#[test]
fn a_pipeline_with_a_warning_says_it_every_time() {
    let project = Project::new(
        "params: { unread: 1 }\nsteps:\n  a:\n    kind: command\n    \
                                with: { run: 'echo > ${out.t}', outputs: { t: t } }\n",
    );
    for _ in 0..3 {
        let output = project.flow(&["run", "p.yaml"]);
        assert!(err(&output).contains("unread"), "{}", err(&output));
        std::thread::sleep(Duration::from_millis(1_100));
    }
}

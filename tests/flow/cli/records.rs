//! Steps and runs by name: points by a part of their coordinates, runs that have not ended.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::{Project, err, finished, out};

const SWEEP: &str = r#"
name: swept
sweep: { zip: { lora: { r: [4, 8], alpha: [8, 16] } } }
steps:
  train:
    kind: command
    with:
      run: "echo training ${sweep.lora.r} ${sweep.lora.alpha}; echo ${sweep.lora.r} > ${out.a}"
      outputs: { a: a.txt }
  score:
    kind: command
    with: { run: "cat ${steps.train}/a.txt > ${out.a}", outputs: { a: a.txt } }
"#;

fn json(project: &Project, arguments: &[&str]) -> Value {
    let output = project.flow(&[&["--json"], arguments].concat());
    serde_json::from_str(&out(&output)).unwrap_or_else(|_| panic!("{}", err(&output)))
}

#[test]
fn points_are_named_by_some_of_their_coordinates() {
    let project = Project::new(SWEEP);
    let whole = "train@lora.alpha=16,lora.r=8";
    let first = finished(&project.flow(&["--json", "run", "p.yaml", "train@lora.r=8"]));
    assert_eq!(first["ran"], 1, "{first}");
    let planned = json(&project, &["plan", "p.yaml", "train@lora.r=8"]);
    assert_eq!(
        (planned["steps"][0]["step"].as_str(), planned["steps"][0]["state"].as_str()),
        (Some(whole), Some("cached"))
    );
    let forced = ["--json", "run", "p.yaml", "train", "--force", "train@lora.alpha=16"];
    let forced = finished(&project.flow(&forced));
    assert_eq!(forced["ran"], 2, "one for the first time, one by force: {forced}");

    for verb in ["why", "show", "log"] {
        let one = json(&project, &[verb, "train@lora.r=8"]);
        assert_eq!(one.as_array().map(Vec::len), Some(1), "{verb}: {one}");
        assert!(one.to_string().contains(whole), "{verb}: {one}");
        let both = json(&project, &[verb, "train"]);
        assert_eq!(both.as_array().map(Vec::len), Some(2), "{verb}: {both}");
    }
    assert_eq!(out(&project.flow(&["log", "train@lora.r=8"])), "training 8 16\n");
    let trace = json(&project, &["trace", "train@lora.r=8"]);
    assert_eq!(trace[0]["record"]["made"]["step"], whole);
    let several = project.flow(&["trace", "train"]);
    assert_eq!(several.status.code(), Some(2));
    assert!(err(&several).contains("names 2 steps") && err(&several).contains(whole));
    let none = project.flow(&["show", "latest", "train@lora.r=9"]);
    assert!(err(&none).contains("has no step `train@lora.r=9`"), "{}", err(&none));
    assert!(err(&none).contains("train@lora."), "{}", err(&none));
}

#[test]
fn mistakes_in_names_are_not_swallowed() {
    let project = Project::new(SWEEP);
    for _ in 0..2 {
        assert_eq!(project.flow(&["run", "p.yaml"]).status.code(), Some(0));
    }
    let ambiguous = project.flow(&["show", "20"]);
    assert_eq!(ambiguous.status.code(), Some(2));
    assert!(err(&ambiguous).contains("2 runs begin with `20`"), "{}", err(&ambiguous));
    let wrong = project.flow(&["trace", "score@lora.r=4", "--run", "nothing"]);
    assert!(err(&wrong).contains("there is no run `nothing`"), "{}", err(&wrong));
    let step = project.flow(&["trace", "scor"]);
    assert!(err(&step).contains("did you mean `score`?"), "{}", err(&step));
    assert_eq!(project.flow(&["why", "--run", "nothing"]).status.code(), Some(2));
}

#[cfg(target_os = "linux")]
#[test]
fn a_run_that_died_is_told_from_its_events() {
    let text = r#"
name: dies
steps:
  quick:
    kind: command
    with: { run: "echo quickly; echo 1 > ${out.a}", outputs: { a: a.txt } }
  slow:
    kind: command
    with: { run: "cat ${steps.quick}/a.txt; echo begun; sleep 60", outputs: { a: a.txt } }
  after:
    kind: command
    with: { run: "cat ${steps.slow}/a.txt > ${out.a}", outputs: { a: a.txt } }
"#;
    let project = Project::new(text);
    let mut child = project.command(&["run", "p.yaml"]).spawn().unwrap();
    let begun = Instant::now();
    let log = || out(&project.flow(&["log", "slow"]));
    while !log().contains("begun") {
        assert!(begun.elapsed() < Duration::from_secs(60), "the step never started");
        std::thread::sleep(Duration::from_millis(50));
    }
    let running = json(&project, &["show"]);
    assert_eq!(running["status"], "running");
    let states = |of: &Value| {
        let steps = of["steps"].as_array().unwrap().iter();
        steps.map(|s| s["state"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(states(&running), ["ran", "running", "waiting"]);
    assert!(out(&project.flow(&["why", "slow"])).contains("slow  running: "));
    child.kill().unwrap();
    child.wait().unwrap();
    let died = json(&project, &["show"]);
    assert_eq!(died["status"], "died");
    assert_eq!(states(&died), ["ran", "unfinished", "unfinished"]);
    assert!(log().contains("begun"));
    assert!(out(&project.flow(&["log"])).contains("quick  quickly"));
}

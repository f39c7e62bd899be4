//! `gc`, `pin` and `verify` as a user types them.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{Project, err, finished, out};

const CHAIN: &str = r#"
name: chain
params: { word: one }
steps:
  a:
    kind: command
    with: { run: "echo ${params.word} > ${out.t}", outputs: { t: t.txt } }
  b:
    kind: command
    with: { run: "cat ${steps.a}/t.txt > ${out.t}; echo more >> ${out.t}", outputs: { t: t.txt } }
"#;

fn json(project: &Project, arguments: &[&str]) -> Value {
    let output = project.flow(&[&["--json"], arguments].concat());
    serde_json::from_str(&out(&output)).unwrap_or_else(|_| panic!("{}", err(&output)))
}

fn run(project: &Project, word: &str) -> Value {
    finished(&project.flow(&["--json", "run", "p.yaml", "--set", &format!("params.word={word}")]))
}

fn objects(project: &Project) -> Vec<PathBuf> {
    let shards = fs::read_dir(project.path(".flow/objects")).unwrap();
    let files = shards.flat_map(|shard| fs::read_dir(shard.unwrap().path()).unwrap());
    files.map(|file| file.unwrap().path()).collect()
}

#[test]
fn a_dry_run_says_what_is_then_done() {
    let project = Project::new(CHAIN);
    assert_eq!(project.flow(&["gc"]).status.code(), Some(2), "there is no store yet");
    for word in ["one", "two", "three"] {
        assert_eq!(run(&project, word)["ran"], 2);
    }
    let nothing = project.flow(&["gc"]);
    assert!(out(&nothing).starts_with("freed 0 B, leaving "), "{}", out(&nothing));
    let planned = json(&project, &["gc", "--keep-runs", "1", "--dry-run"]);
    assert_eq!((planned["applied"].as_bool(), objects(&project).len()), (Some(false), 6));
    let said = out(&project.flow(&["gc", "--keep-runs", "1", "-n"]));
    assert!(said.contains("records         4") && said.contains("would free"), "{said}");
    let done = json(&project, &["gc", "--keep-runs", "1"]);
    assert_eq!(done["plan"], planned["plan"]);
    assert_eq!((done["applied"].as_bool(), objects(&project).len()), (Some(true), 2));
    assert_eq!(out(&project.flow(&["runs"])).lines().count(), 2);
    assert_eq!(run(&project, "three")["hits"], 2);
    assert_eq!(run(&project, "one")["ran"], 2);
    for wrong in [["--older-than", "30"], ["--max-size", "big"], ["--keep-runs", "-1"]] {
        let output = project.flow(&["gc", wrong[0], wrong[1]]);
        assert_eq!(output.status.code(), Some(2), "{}", err(&output));
    }
    let over = project.flow(&["gc", "--max-size", "1kB"]);
    assert!(err(&over).contains("more than --max-size"), "{}", err(&over));
}

#[test]
fn pins_are_made_listed_and_removed() {
    let project = Project::new(CHAIN);
    run(&project, "one");
    run(&project, "two");
    let first = json(&project, &["runs"])[1]["run"]["id"].as_str().unwrap().to_owned();
    let pinned = project.flow(&["pin", "b", "--run", &first]);
    assert_eq!(pinned.status.code(), Some(0), "{}", err(&pinned));
    let list = json(&project, &["pin", "--list"]);
    let name = list[0]["name"].as_str().unwrap();
    assert!(name.starts_with("b-") && list[0]["keys"].as_array().unwrap().len() == 1, "{list}");
    assert!(out(&project.flow(&["pin", "--list"])).contains(&format!("b of run {first}")));
    assert_eq!(project.flow(&["gc", "--keep-runs", "0"]).status.code(), Some(0));
    assert_eq!(run(&project, "one")["hits"], 2, "b, and a that it was made from");
    assert_eq!(run(&project, "two")["ran"], 2);
    let key = list[0]["keys"][0].as_str().unwrap();
    let again = project.flow(&["pin", &key[..8], "--name", "again"]);
    assert_eq!(again.status.code(), Some(0), "{}", err(&again));
    assert_eq!(project.flow(&["pin", "latest", "--name", "again"]).status.code(), Some(2));
    assert_eq!(json(&project, &["pin", "latest"])["keys"].as_array().unwrap().len(), 2);
    for (wrong, said) in [("c", "has no step `c`"), ("ffffff", "no key or output begins with")] {
        let output = project.flow(&["pin", wrong]);
        assert!(output.status.code() == Some(2) && err(&output).contains(said), "{}", err(&output));
    }
    let wrong = project.flow(&["pin", "--remove", "agian"]);
    assert!(err(&wrong).contains("did you mean `again`?"), "{}", err(&wrong));
    assert_eq!(project.flow(&["pin", "--remove", "again"]).status.code(), Some(0));
    assert_eq!(json(&project, &["pin", "--list"]).as_array().unwrap().len(), 2);
    assert_eq!(project.flow(&["pin"]).status.code(), Some(2));
}

#[test]
fn damage_is_found_and_healed() {
    let project = Project::new(CHAIN);
    run(&project, "one");
    let sound = project.flow(&["verify"]);
    assert_eq!(sound.status.code(), Some(0), "{}", out(&sound));
    assert!(out(&sound).contains("2 records, 2 manifests, 2 files"), "{}", out(&sound));
    let object = objects(&project).into_iter().find(|o| fs::read(o).unwrap() == b"one\n").unwrap();
    fs::remove_file(&object).unwrap();
    fs::write(&object, "0ne\n").unwrap();
    assert_eq!(project.flow(&["verify", "b"]).status.code(), Some(0));
    let found = project.flow(&["verify", "latest"]);
    assert_eq!(found.status.code(), Some(1));
    let said = out(&found);
    assert!(said.contains("damaged, set aside") && said.contains("1 finding"), "{said}");
    assert!(said.contains("a (key ") && said.contains("will be made again"), "{said}");
    let still = json(&project, &["verify", "all"]);
    assert_eq!(
        (&still["findings"][0]["damaged"], &still["lost"][0]["step"]),
        (&false.into(), &"a".into())
    );
    assert_eq!(run(&project, "one")["ran"], 1);
    assert_eq!(project.flow(&["verify"]).status.code(), Some(0));
    assert_eq!(project.flow(&["verify", "nothing"]).status.code(), Some(2));
}

#[test]
fn a_run_without_changes_keeps_what_it_stands_for() {
    let project = Project::new(CHAIN);
    run(&project, "one");
    run(&project, "two");
    // Only what has settled is recognised.
    std::thread::sleep(Duration::from_millis(2100));
    let full = run(&project, "two")["run"].as_str().unwrap().to_owned();
    let first = || {
        let output = project.flow(&["--json", "run", "p.yaml", "--set", "params.word=two"]);
        serde_json::from_str::<Value>(out(&output).lines().next().unwrap()).unwrap()
    };
    let unchanged = first();
    assert_eq!((&unchanged["type"], &unchanged["since"]), (&"unchanged".into(), &full.into()));
    let done = json(&project, &["gc", "--keep-runs", "1"]);
    assert_eq!(done["plan"]["runs"].as_array().unwrap().len(), 1, "{done}");
    assert_eq!(json(&project, &["show"])["steps"].as_array().unwrap().len(), 2);
    assert_eq!(json(&project, &["runs"]).as_array().unwrap().len(), 3);
    assert_eq!(first()["type"], "run_started", "the index went too");
    assert_eq!(run(&project, "two")["hits"], 2);
    assert_eq!(run(&project, "one")["ran"], 2);
}

#[cfg(target_os = "linux")]
#[test]
fn a_run_of_another_process_loses_nothing() {
    let text = r#"
name: slow
steps:
  quick:
    kind: command
    with: { run: "echo quick > ${out.a}", outputs: { a: a.txt } }
  slow:
    kind: command
    with:
      run: "until test -e GO; do sleep 0.02; done; cat ${steps.quick}/a.txt > ${out.a}"
      outputs: { a: a.txt }
  last:
    kind: command
    with: { run: "cat ${steps.quick}/a.txt ${steps.slow}/a.txt > ${out.a}", outputs: { a: a.txt } }
"#;
    let project = Project::new(CHAIN);
    let go = project.path("go");
    project.write("slow.yaml", &text.replace("GO", &go.display().to_string()));
    run(&project, "one");
    let mut child = project.command(&["run", "slow.yaml"]).spawn().unwrap();
    let started = Instant::now();
    let begun = || json(&project, &["show"])["steps"][1]["state"] == "running";
    while !begun() {
        assert!(started.elapsed() < Duration::from_secs(60), "the step never started");
        std::thread::sleep(Duration::from_millis(20));
    }
    let done = project.flow(&["gc", "--keep-runs", "0", "--max-size", "0", "--grace", "0"]);
    assert_eq!(done.status.code(), Some(0), "{}", err(&done));
    assert!(err(&done).contains("at work now"), "{}", err(&done));
    assert!(out(&done).contains("chain"), "{}", out(&done));
    fs::write(go, "").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert_eq!(json(&project, &["verify"])["findings"].as_array().unwrap().len(), 0);
    assert_eq!(run(&project, "one")["ran"], 2, "what was not in use is gone");
}

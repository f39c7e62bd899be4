//! Steps that fail or ask for much, as a user meets them; and `--json` everywhere.

use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{Entries, FAILING, Project, REVIEWS, SAMPLE, err, finished, out};

/// Every command, with arguments under which it is content.
const COMMANDS: [&[&str]; 26] = [
    &["validate", "p.yaml"],
    &["plan", "p.yaml"],
    &["graph", "p.yaml"],
    &["run", "p.yaml"],
    &["plan", "p.yaml"],
    &["update", "p.yaml"],
    &["why"],
    &["trace", "texts"],
    &["runs"],
    &["show"],
    &["show", "latest", "texts"],
    &["log"],
    &["diff", "latest", "latest"],
    &["compare", "--metric", "rows.test"],
    &["reproduce", "latest"],
    &["pin", "latest", "--name", "kept"],
    &["pin", "--list"],
    &["pin", "--remove", "kept"],
    &["gc", "--dry-run"],
    &["verify"],
    &["import", "dvc.yaml"],
    &["kinds"],
    &["kinds", "train"],
    &["schema"],
    &["schema", "--write", "schemas"],
    &["completions", "bash"],
];

/// Commands that are refused, and by which part of the program.
const REFUSED: [(&[&str], i32); 17] = [
    (&["validate", "absent.yaml"], 2),
    (&["plan", "wrong.yaml"], 2),
    (&["run", "wrong.yaml"], 2),
    (&["run", "p.yaml", "tetxs"], 2),
    (&["run", "p.yaml", "--set", "params.rows"], 2),
    (&["why", "tetxs"], 2),
    (&["trace", "tetxs"], 2),
    (&["show", "nothing"], 2),
    (&["diff", "latest", "tetxs"], 2),
    (&["reproduce", "nothing"], 2),
    (&["pin", "nothing"], 2),
    (&["gc", "--max-size", "much"], 2),
    (&["import", "absent.yaml"], 2),
    (&["kinds", "trian"], 2),
    (&["frobnicate"], 2),
    (&["run"], 2),
    (&["plan", "p.yaml", "--jobs", "many"], 2),
];

#[test]
fn every_command_speaks_json() {
    let project = Project::new(SAMPLE);
    project.write("reviews.csv", REVIEWS);
    let dvc = "stages:\n  a: { cmd: cp reviews.csv b.csv, deps: [reviews.csv], outs: [b.csv] }\n";
    project.write("dvc.yaml", dvc);
    project.write("wrong.yaml", "steps: { a: { kind: sampel } }\n");
    let said = |arguments: &[&str], code: i32| -> Vec<Value> {
        let output = project.flow(&[arguments, &["--json"]].concat());
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {}", err(&output));
        let text = out(&output);
        let values = serde_json::Deserializer::from_str(&text).into_iter();
        let values: Result<Vec<Value>, _> = values.collect();
        values.unwrap_or_else(|e| panic!("{arguments:?}: {e} in {text}"))
    };
    for arguments in COMMANDS {
        let values = said(arguments, 0);
        let many = arguments[0] == "run";
        assert!(values.len() == 1 || many && values.len() > 5, "{arguments:?}: {values:?}");
    }
    for (arguments, code) in REFUSED {
        let values = said(arguments, code);
        let told = values[0][0]["message"].is_string() || values[0]["error"].is_string();
        assert!(values.len() == 1 && told, "{arguments:?}: {values:?}");
    }
    // No command is left out.
    let help = out(&project.flow(&["--help"]));
    let listed = help.split("Commands:").nth(1).unwrap().split("Options:").next().unwrap();
    for line in listed.lines().filter(|l| l.starts_with("  ") && !l.starts_with("   ")) {
        let command = line.split_whitespace().next().unwrap();
        let known = COMMANDS.iter().any(|c| c[0] == command) || command == "help";
        assert!(known, "`{command}` is not among those that are tried");
    }
}

#[test]
fn the_command_that_goes_on_is_printed_and_goes_on() {
    let text = r#"
name: later
params: { word: x }
steps:
  good:
    kind: command
    with: { run: "echo '${params.word}' > ${out.a}", outputs: { a: a.txt } }
  bad:
    kind: command
    with:
      run: "cat ${steps.good}/a.txt; test -e FLAG && cp ${steps.good}/a.txt ${out.a}"
      outputs: { a: a.txt }
  after:
    kind: command
    with: { run: "cat ${steps.bad}/a.txt > ${out.b}", outputs: { b: b.txt } }
"#;
    let project = Project::new("");
    let flag = project.path("flag");
    project.write("the pipeline.yaml", &text.replace("FLAG", flag.to_str().unwrap()));
    let set = "params.word=two words";
    let first = project.flow(&["run", "the pipeline.yaml", "--keep-going", "--set", set]);
    assert_eq!(first.status.code(), Some(1), "{}", err(&first));
    let said = err(&first);
    assert!(said.contains("after  skipped: bad failed"), "{said}");
    assert!(said.contains("| two words"), "the end of its log is shown: {said}");
    let command = said.lines().find_map(|l| l.strip_prefix("to go on from here: "));
    let command = command.unwrap_or_else(|| panic!("{said}"));
    assert!(
        command.ends_with("run 'the pipeline.yaml' --keep-going --set 'params.word=two words'")
    );
    std::fs::write(flag, "").unwrap();
    let mut shell = Command::new("sh");
    let second = shell.args(["-c", command]).current_dir(project.dir.path()).output().unwrap();
    assert_eq!(second.status.code(), Some(0), "{}", err(&second));
    assert!(err(&second).contains("done: 2 ran, 1 from the cache"), "{}", err(&second));
    assert!(!err(&second).contains("to go on"), "{}", err(&second));
}

#[cfg(target_os = "linux")]
#[test]
fn a_timeout_ends_what_a_command_has_started() {
    let text = r#"
name: late
steps:
  slow:
    kind: command
    timeout: 500ms
    with:
      run: "sh -c 'sleep 4218 & sleep 4218' & wait"
      outputs: { a: a.txt }
"#;
    let project = Project::new(text);
    let begun = Instant::now();
    let output = project.flow(&["run", "p.yaml"]);
    assert_eq!(output.status.code(), Some(1), "{}", err(&output));
    assert!(err(&output).contains("longer than its timeout (500ms)"), "{}", err(&output));
    assert!(begun.elapsed() < Duration::from_secs(20));
    let left = Command::new("pgrep").args(["-f", "sleep 4218"]).output().unwrap();
    assert!(left.stdout.is_empty(), "its grandchildren outlived it");
    // One that does not heed the request has as long as the user says.
    let deaf = text.replace("sh -c", "trap '' TERM; sh -c");
    let project = Project::new(&deaf);
    let begun = Instant::now();
    let output = project.flow(&["run", "p.yaml", "--grace", "1"]);
    assert_eq!(output.status.code(), Some(1), "{}", err(&output));
    let took = begun.elapsed();
    assert!(took > Duration::from_millis(1500) && took < Duration::from_secs(9), "{took:?}");
}

#[cfg(target_os = "linux")]
#[test]
fn huge_pages_are_for_those_who_compute() {
    // Of the run: it asks for none. Of what it starts: nothing is forbidden to it.
    let text = r#"
name: pages
steps:
  one:
    kind: command
    with:
      run: |
        grep -c '^VmFlags.* hg' /proc/$PPID/smaps > ${out.n}
        grep THP_enabled /proc/self/status > ${out.t}
      outputs: { n: n, t: t }
outputs: { pages: "${steps.one}" }
"#;
    let project = Project::new(text);
    let output = project.flow(&["run", "p.yaml"]);
    assert!(output.status.success(), "{}", err(&output));
    let read = |name: &str| {
        std::fs::read_to_string(project.path(&format!("outputs/pages/pages/{name}"))).unwrap()
    };
    assert_eq!(read("n/n").trim(), "0");
    assert_eq!(read("t/t").split_whitespace().last(), Some("1"));
}

#[test]
fn what_a_project_declares_can_be_needed() {
    let needs =
        |needs: &str| FAILING.replace("  good:\n", &format!("  good:\n    needs: {needs}\n"));
    let project = Project::new(&needs("{ licens: 1 }"));
    project.write("flow.toml", "store = \"kept\"\njobs = 2\n[resources]\nlicence = 2\n");
    let wrong = project.flow(&["validate", "p.yaml"]);
    assert_eq!(wrong.status.code(), Some(2));
    let said = err(&wrong);
    assert!(said.contains("there is no resource `licens`") && said.contains("mean `licence`?"));
    // More than there is: told by all, refused by a run before anything starts.
    project.write("p.yaml", &needs("{ licence: 3, memory: 4096TiB }"));
    for (verb, code) in [("validate", 0), ("plan", 0), ("run", 2)] {
        let output = project.flow(&[verb, "p.yaml"]);
        assert_eq!(output.status.code(), Some(code), "{verb}: {}", err(&output));
        let said = err(&output);
        assert!(said.contains("good: asks for 4194304.0 GiB of memory, and there is"), "{said}");
        assert!(said.contains("3 of `licence`, and there are only 2"), "{said}");
    }
    assert!(!project.path("kept/runs").exists_with_entries());
    project.write("p.yaml", &needs("{ licence: 2 }"));
    let first = finished(&project.flow(&["--json", "run", "p.yaml", "good"]));
    assert_eq!((first["ran"].as_u64(), first["status"].as_str()), (Some(1), Some("done")));
    assert!(project.path("kept/records").exists_with_entries() && !project.path(".flow").exists());
    assert_eq!(out(&project.flow(&["runs"])).lines().count(), 2);
    // A mistake in the settings is shown where it is.
    project.write("flow.toml", "[resources]\nlicence = \"two\"\n");
    let output = project.flow(&["run", "p.yaml"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(err(&output).contains("flow.toml:2:11"), "{}", err(&output));
}

#[test]
fn a_plan_counts_and_says_what_to_expect() {
    let text = r#"
name: counted
sweep: { grid: { n: [1, 2] } }
steps:
  first:
    kind: command
    with: { run: "sleep 0.2; echo 12345678 > ${out.a}", outputs: { a: a.txt } }
  each:
    kind: command
    with: { run: "cat ${steps.first}/a.txt; echo ${sweep.n} > ${out.a}", outputs: { a: a.txt } }
"#;
    let project = Project::new(text);
    let plan = out(&project.flow(&["plan", "p.yaml"]));
    let counts = "2 points, 3 steps (1 shared by all points): 0 cached, 1 to run, 2 waiting";
    assert!(plan.contains(counts), "{plan}");
    assert!(plan.contains("time    unknown"), "{plan}");
    assert_eq!(project.flow(&["run", "p.yaml"]).status.code(), Some(0));
    project.write("p.yaml", &text.replace("12345678", "1"));
    let plan = out(&project.flow(&["plan", "p.yaml"]));
    let first = plan.lines().find(|l| l.starts_with("first ")).unwrap();
    assert!(first.contains("will run") && first.contains(" s  with.run"), "{plan}");
    assert!(plan.contains("time    about ") && plan.contains("of work)\n"), "{plan}");
    assert!(plan.contains("memory  unknown"), "{plan}");
    let output = project.flow(&["plan", "p.yaml", "--json"]);
    let json: Value = serde_json::from_str(&out(&output)).unwrap();
    assert_eq!(json["tally"]["shared"], 1, "{json}");
    // `12345678` with its end of line, and the two numbers with theirs.
    assert_eq!(json["expected"]["output_bytes"], 13, "{json}");
}

//! Several runs of one sweep at once, inputs that move, limits of the system.

use std::collections::BTreeMap;
use std::fs;
use std::process::{Command, Stdio};

use serde_json::Value;

use super::{Project, err, finished, out};

/// Every step notes in a file outside that it ran.
const SWEEP: &str = r#"
name: crowd
sweep: { grid: { n: [1, 2, 3, 4] } }
steps:
  base:
    kind: command
    with: { run: "echo base >> DIARY; sleep 0.2; echo 1 > ${out.a}", outputs: { a: a.txt } }
  point:
    kind: command
    with:
      run: "echo point${sweep.n} >> DIARY; sleep 0.1; cat ${steps.base}/a.txt > ${out.a}"
      outputs: { a: a.txt }
  all:
    kind: command
    with:
      run: "echo all >> DIARY; ls > ${out.a}"
      inputs: { one: "${steps.base}" }
      outputs: { a: a.txt }
outputs: { all: "${steps.all}", point: "${steps.point}" }
"#;

fn together(runs: usize) {
    let project = Project::new("");
    let diary = project.path("diary");
    project.write("p.yaml", &SWEEP.replace("DIARY", diary.to_str().unwrap()));
    let start = |_| {
        let mut command = project.command(&["--json", "run", "p.yaml"]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let children: Vec<_> = (0..runs).map(start).collect();
    let outputs = children.into_iter().map(|c| c.wait_with_output().unwrap());
    let outputs: Vec<_> = outputs.collect();
    let mut ran = 0;
    for output in &outputs {
        assert_eq!(output.status.code(), Some(0), "{}", err(output));
        let end = finished(output);
        ran += end["ran"].as_u64().unwrap();
        assert_eq!(end["ran"].as_u64().unwrap() + end["hits"].as_u64().unwrap(), 6, "{end}");
        assert_eq!((&end["failed"], &end["skipped"]), (&0.into(), &0.into()));
    }
    assert_eq!(ran, 6);
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for line in fs::read_to_string(&diary).unwrap().lines() {
        *counts.entry(line.to_owned()).or_default() += 1;
    }
    assert_eq!(counts.len(), 6, "{counts:?}");
    assert!(counts.values().all(|n| *n == 1), "each step once: {counts:?}");
    // Who waits says for whom.
    let events: Vec<Value> = outputs
        .iter()
        .flat_map(|o| out(o).lines().map(|l| serde_json::from_str(l).unwrap()).collect::<Vec<_>>())
        .collect();
    let runs: Vec<&str> = events.iter().filter_map(|e| e["run"].as_str()).collect();
    let holders: Vec<&str> = events.iter().filter_map(|e| e["holder"].as_str()).collect();
    assert!(!holders.is_empty(), "somebody waits");
    for holder in holders {
        let known = runs.iter().any(|run| holder.starts_with(&format!("run {run}, pid ")));
        assert!(known, "`{holder}` names none of {runs:?}");
    }
    let names: Vec<_> = fs::read_dir(project.path("outputs/crowd"))
        .unwrap()
        .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    assert!(names.iter().all(|n| !n.starts_with('.') && !n.contains("edited")), "{names:?}");
    assert_eq!(names.len(), 5);
}

#[test]
fn two_runs_of_a_sweep_do_each_step_once() {
    together(2);
}

#[test]
fn eight_runs_of_a_sweep_do_each_step_once() {
    together(8);
}

#[test]
fn an_input_that_a_step_edits_is_not_published() {
    let text = r#"
name: meddler
steps:
  meddle:
    kind: command
    with:
      run: "cat in.txt > ${out.a}; ORDER"
      files: { in.txt: in.txt }
      outputs: { a: a.txt }
"#;
    let project = Project::new("");
    project.write("in.txt", "before");
    let input = project.path("in.txt");
    let order = format!("echo after > {}", input.display());
    project.write("p.yaml", &text.replace("ORDER", &order));
    let output = project.flow(&["run", "p.yaml"]);
    assert_eq!(output.status.code(), Some(1), "{}", err(&output));
    assert!(err(&output).contains("in.txt changed while the step ran"), "{}", err(&output));
    assert!(!project.path("outputs").exists());
    assert_eq!(fs::read_dir(project.path(".flow/records")).unwrap().count(), 0);
}

/// No file may become larger than this many blocks of 512 bytes, as on a disk with a quota.
#[cfg(target_os = "linux")]
#[test]
fn a_limit_on_file_sizes_poisons_nothing() {
    let text = r#"
name: limited
steps:
  small:
    kind: command
    with: { run: "echo small > ${out.a}", outputs: { a: a.txt } }
  large:
    kind: command
    with:
      run: "cat ${steps.small}/a.txt; head -c 200000 /dev/zero > ${out.a} || true"
      outputs: { a: a.txt }
  fetched:
    kind: fetch
    with: { files: { train: rows.csv } }
"#;
    let project = Project::new(text);
    let rows: String = (0..20_000).map(|i| format!("{i} {}\n", i * 7919 % 10_007)).collect();
    project.write("rows.csv", &format!("text\n{rows}"));
    let run = |limit: &str| {
        // The signal is ignored, so that writes fail instead.
        let script = format!("trap '' XFSZ; ulimit -f {limit}; exec \"$0\" \"$@\"");
        let mut command = Command::new("sh");
        command.args(["-c", &script, env!("CARGO_BIN_EXE_flow")]);
        command.args(["--json", "run", "p.yaml", "--keep-going"]).current_dir(project.dir.path());
        command.output().unwrap()
    };
    let limited = run("64");
    let code = limited.status.code();
    assert!(matches!(code, Some(1 | 3)), "{code:?} {}", err(&limited));
    assert!(err(&limited).contains("File too large") || out(&limited).contains("File too large"));
    let end = finished(&run("unlimited"));
    assert_eq!((end["failed"].as_u64(), end["skipped"].as_u64()), (Some(0), Some(0)), "{end}");
    let sizes = fs::read_dir(project.path(".flow/objects")).unwrap();
    let sizes = sizes.flat_map(|shard| fs::read_dir(shard.unwrap().path()).unwrap());
    let sizes: Vec<u64> = sizes.map(|f| f.unwrap().metadata().unwrap().len()).collect();
    assert!(sizes.iter().any(|s| *s > 64 * 512), "{sizes:?}");
    let end = finished(&run("64"));
    assert_eq!(end["hits"], 3, "an unchanged run needs no room: {end}");
}

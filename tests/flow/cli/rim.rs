//! Where the program meets the machine: closed pipes, odd environments, broken stores, schemas.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::process::{Output, Stdio};
use std::sync::{Arc, Mutex};

use serde_json::Value;

use super::{FAILING, Project, REVIEWS, SAMPLE, err, out};

/// Runs with nobody reading what is printed.
fn unread(project: &Project, arguments: &[&str]) -> Output {
    let mut command = project.command(arguments);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    child.wait_with_output().unwrap()
}

#[test]
fn nobody_has_to_read_on() {
    let project = Project::new(SAMPLE);
    project.write("reviews.csv", REVIEWS);
    let run = unread(&project, &["--json", "run", "p.yaml"]);
    assert_eq!((run.status.code(), err(&run).as_str()), (Some(0), ""));
    assert!(project.path("outputs/small/texts").is_dir(), "the run went on");
    for arguments in [["schema", "train"], ["kinds", "train"], ["completions", "bash"]] {
        let output = unread(&project, &arguments);
        assert_eq!((output.status.code(), err(&output).as_str()), (Some(0), ""), "{arguments:?}");
    }
    // a mistake is a mistake all the same
    assert_eq!(unread(&project, &["--json", "show", "nothing"]).status.code(), Some(2));
    // stderr may be closed too
    let mut command = project.command(&["run", "p.yaml"]);
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stderr.take());
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[cfg(target_os = "linux")]
#[test]
fn the_environment_may_hold_any_bytes() {
    use std::os::unix::ffi::OsStrExt as _;
    let project = Project::new(SAMPLE);
    let odd = std::ffi::OsStr::from_bytes(b"\xff\xfe");
    let mut command = project.command(&["validate", "p.yaml"]);
    let output = command.env("ODD", odd).env(odd, "x").output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", err(&output));
}

#[cfg(target_os = "linux")]
#[test]
fn a_store_that_breaks_is_not_a_step_that_failed() {
    let project = Project::new("");
    let objects = project.path(".flow/objects");
    let objects = objects.display();
    // nothing can be put there, by whomever
    let run = format!("echo 1 > ${{out.a}}; rm -rf {objects}; ln -s /sys {objects}");
    let text = FAILING.replace("echo fine > ${out.a}", &run);
    project.write("p.yaml", &text);
    let output = project.flow(&["run", "p.yaml", "good"]);
    assert_eq!(output.status.code(), Some(3), "{}", err(&output));
}

#[test]
fn positions_agree_whatever_the_script() {
    let text = "steps:\n  rows: { kind: fetch, with: { dataset: 'отзывы é', splitz: [a] } }\n";
    let project = Project::new(text);
    let list: Value =
        serde_json::from_str(&out(&project.flow(&["--json", "validate", "p.yaml"]))).unwrap();
    assert_eq!((list[0]["line"].as_u64(), list[0]["column"].as_u64()), (Some(2), Some(53)));
    let shown = err(&project.flow(&["validate", "p.yaml"]));
    assert!(shown.contains("p.yaml:2:53"), "{shown}");
}

#[test]
fn fields_within_fields_and_types_of_edges() {
    let project = Project::new(SAMPLE);
    let train = out(&project.flow(&["kinds", "train"]));
    for line in ["  lora.r: integer", "  quantization.double: boolean", "${steps.NAME} (tokens)"] {
        assert!(train.contains(line), "{line} is not in {train}");
    }
    assert!(out(&project.flow(&["kinds", "format"])).contains("  output.words: map of string"));
    assert!(out(&project.flow(&["kinds", "select"])).contains("${steps.NAME.*} (report)"));
    let schema: Value = serde_json::from_str(&out(&project.flow(&["schema", "train"]))).unwrap();
    let rank = &schema["$defs"]["train.Lora"]["anyOf"][0]["properties"]["r"]["anyOf"];
    assert_eq!(rank[1]["pattern"], r"\$\{", "{schema:#}");
    let graph: Value =
        serde_json::from_str(&out(&project.flow(&["--json", "graph", "p.yaml"]))).unwrap();
    assert_eq!(graph["nodes"].as_array().map(Vec::len), Some(3), "{graph}");
    assert_eq!(graph["edges"][0]["from"], "reviews", "{graph}");
}

/// Serves one changing file to whoever asks.
fn serve(body: Arc<Mutex<String>>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut request = [0; 4096];
            let n = stream.read(&mut request).unwrap_or(0);
            let body = body.lock().unwrap().clone();
            let length = body.len();
            let body = if request[..n].starts_with(b"HEAD") { "" } else { &body };
            let head = "HTTP/1.1 200 OK\r\nContent-Type: text/csv\r\nConnection: close\r\n";
            let _ = write!(stream, "{head}Content-Length: {length}\r\n\r\n{body}");
        }
    });
    port
}

#[test]
fn the_lock_changes_by_update_only() {
    let body = Arc::new(Mutex::new(REVIEWS.to_owned()));
    let url = format!("http://127.0.0.1:{}/reviews.csv", serve(Arc::clone(&body)));
    let text = format!("steps:\n  rows:\n    kind: fetch\n    with: {{ url: \"{url}\" }}\n");
    let project = Project::new(&text);
    let lock = || std::fs::read_to_string(project.path("p.lock")).unwrap();
    let run = project.flow(&["run", "p.yaml"]);
    assert_eq!(run.status.code(), Some(0), "{}", err(&run));
    let first = lock();
    let none = project.flow(&["update", "p.yaml"]);
    assert_eq!(out(&none), "nothing has changed outside\n", "{}", err(&none));
    *body.lock().unwrap() = REVIEWS.replace("good", "great");
    assert_eq!(project.flow(&["plan", "p.yaml"]).status.code(), Some(0));
    assert_eq!(lock(), first);
    let changed: Value =
        serde_json::from_str(&out(&project.flow(&["--json", "update", "p.yaml"]))).unwrap();
    let (old, new) = (changed[0]["old"].as_str().unwrap(), changed[0]["new"].as_str().unwrap());
    assert!(first.contains(old) && lock().contains(new) && old != new, "{changed}");
    assert_eq!(project.flow(&["run", "p.yaml"]).status.code(), Some(0));
}

#[test]
fn points_that_differ_by_case_have_their_own_logs_and_places() {
    let text = r#"
name: points
sweep: { grid: { w: [Ab, aB] } }
steps:
  word:
    kind: command
    with: { run: "echo says ${sweep.w}; echo ${sweep.w} > ${out.t}", outputs: { t: t.txt } }
outputs: { word: "${steps.word}" }
"#;
    let project = Project::new(text);
    assert_eq!(project.flow(&["run", "p.yaml"]).status.code(), Some(0));
    let place = |point: &str| project.path("outputs/points").join(format!("word@w={point}"));
    assert_eq!(fs::read_to_string(place("Ab").join("t/t.txt")).unwrap(), "Ab\n");
    assert_eq!(fs::read_to_string(place("aB").join("t/t.txt")).unwrap(), "aB\n");
    let run = fs::read_dir(project.path(".flow/runs")).unwrap().next().unwrap().unwrap();
    let logs = fs::read_dir(run.path().join("logs")).unwrap();
    let folded: BTreeSet<String> =
        logs.map(|log| log.unwrap().file_name().to_str().unwrap().to_lowercase()).collect();
    assert_eq!(folded.len(), 2, "{folded:?}");
    assert_eq!(out(&project.flow(&["log", "word@w=aB"])), "says aB\n");

    // A file system that takes one name for the other, as far as a link can do that.
    fs::remove_dir_all(place("aB")).unwrap();
    std::os::unix::fs::symlink("word@w=Ab", place("aB")).unwrap();
    let one = project.flow(&["run", "p.yaml"]);
    assert_ne!(one.status.code(), Some(0), "{}", err(&one));
    assert!(err(&one).contains("`word@w=Ab` and `word@w=aB` would lie at one place"));
    assert_eq!(fs::read_to_string(place("Ab").join("t/t.txt")).unwrap(), "Ab\n");
}

//! Runs whose processes are killed at any moment: nothing wrong is a hit, nothing finished is lost,
//! nothing goes on running, nothing has to be unlocked.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use flow::digest::Digest;
use flow::learn::random::Stream;
use flow::lineage::Record;
use flow::store::Store;
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use serde_json::{Value, json};

use super::{Project, err, out};

/// Fetch, sample, format, tokenize, a training that keeps a checkpoint after every update, and a
/// command with children and grandchildren, one of them in a group of its own.
fn pipeline() -> String {
    let words = "(sleep 0.05; true) & timeout 9 sh -c 'sleep 0.05 & wait'; \
                 tr a-z A-Z < ${files.corpus.txt} > ${out.upper}; wait";
    let mut steps = crate::engine::real::steps();
    let others = ["shaped", "twice", "look"];
    for name in ["base", "score", "best", "merged", "speed", "table"].into_iter().chain(others) {
        steps.as_object_mut().unwrap().remove(name);
    }
    steps["words"]["with"]["run"] = json!(words);
    steps["tokens"]["with"]["tokenizer"] = json!("${steps.blank.tokenizer}");
    steps["train"] = json!({ "kind": "train", "checkpoint": "1ms", "with": {
        "data": "${steps.tokens}", "model": "${steps.blank}", "method": "lora",
        "lora": { "r": 2, "dropout": 0.1 }, "learning_rate": 1e-3, "max_steps": 6,
        "batch_size": 4,
    } });
    format!("name: killed\nsteps: {steps}\noutputs: {{ adapter: \"${{steps.train}}\" }}\n")
}

/// A project in memory where there is a place for that: what was written is there for the next
/// process whether it is on the disk or not, and runs take a tenth of the time.
fn in_memory(pipeline: &str) -> Project {
    let memory = Path::new("/dev/shm");
    let dir = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
    let project = Project { dir: dir.unwrap() };
    fs::create_dir(project.path(".git")).unwrap();
    project.write("p.yaml", pipeline);
    project
}

fn project() -> Project {
    let project = in_memory(&pipeline());
    for (name, text) in crate::engine::real::files() {
        project.write(name, &text);
    }
    project
}

/// Starts a run in a process group of its own.
fn start(project: &Project) -> Child {
    let mut command = project.command(&["--json", "run", "p.yaml", "--jobs", "2"]);
    command.stdout(Stdio::null()).stderr(Stdio::null()).process_group(0).spawn().unwrap()
}

/// Processes that work in a folder or below it, with what they were called with.
fn processes(dir: &Path) -> Vec<(Pid, String)> {
    let dir = dir.canonicalize().unwrap();
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
    let inside = pids.filter(|pid| {
        fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd.starts_with(&dir))
    });
    let named = inside.filter_map(|pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        Some((Pid::from_raw(pid)?, String::from_utf8_lossy(&line).replace('\0', " ")))
    });
    named.collect()
}

/// Waits until nothing works in a folder any more.
fn all_gone(dir: &Path, what: &str) {
    let begun = Instant::now();
    loop {
        let left = processes(dir);
        if left.is_empty() {
            return;
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "{what}: {left:?} outlived the runner");
        std::thread::sleep(Duration::from_millis(5));
    }
}

type Results = BTreeMap<String, BTreeMap<String, Digest>>;

/// All records, by step; each must be whole.
fn records(project: &Project) -> BTreeMap<String, Record> {
    let dir = project.path(".flow");
    if !dir.is_dir() {
        return BTreeMap::new();
    }
    let store = Store::open(&dir).unwrap();
    let records = Record::all(&store).unwrap();
    for tree in records.iter().flat_map(|r| r.ports.values()) {
        assert_eq!(store.missing(tree).unwrap(), None);
        for entry in store.tree(tree).unwrap().unwrap().entries {
            let path = store.locate_entry(&entry).unwrap().unwrap();
            assert_eq!(Digest::of_file(&path).unwrap().0, entry.digest);
        }
    }
    records.into_iter().map(|r| (r.made.step.clone(), r)).collect()
}

fn results(project: &Project) -> Results {
    records(project).into_iter().map(|(step, record)| (step, record.ports)).collect()
}

/// A run to its end; steps that ran, and those that were hits.
fn finish(project: &Project, what: &str) -> (BTreeSet<String>, BTreeSet<String>) {
    let output = project.flow(&["--json", "run", "p.yaml", "--jobs", "2"]);
    assert_eq!(output.status.code(), Some(0), "{what}: {}\n{}", err(&output), out(&output));
    let text = out(&output);
    let events: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let of = |ty: &str| {
        let events = events.iter().filter(|e| e["type"] == ty);
        events.map(|e| e["step"].as_str().unwrap().to_owned()).collect()
    };
    if events.iter().any(|e| e["type"] == "unchanged") {
        return (BTreeSet::new(), records(project).into_keys().collect());
    }
    (of("finished"), of("hit"))
}

/// Whom the signal is for.
#[derive(Debug, Clone, Copy)]
enum Victim {
    Runner,
    Group,
    Worker,
}

/// Kills at so many moments, and looks after each at what is left.
fn kill_at(moments: u64, seed: u64) {
    let sound = project();
    let begun = Instant::now();
    let (ran, _) = finish(&sound, "undisturbed");
    let whole = begun.elapsed().as_secs_f64();
    assert_eq!(ran.len(), 8);
    let expected = results(&sound);
    let random = Stream::new(seed, "moments");
    let (mut killed, mut n, mut resumed) = (0, 0, 0);
    let mut project = project();
    while killed < moments {
        let s = random.at(n);
        n += 1;
        assert!(n < 20 * moments + 100, "the runs end before they are killed");
        let victim = [Victim::Runner, Victim::Group, Victim::Worker][s.below(0, 3) as usize];
        let what = format!("seed {seed}, moment {n}, {victim:?}");
        let fresh = !project.path(".flow").exists();
        let mut child = start(&project);
        let within = if fresh { whole } else { whole / 2.0 };
        let until = Instant::now() + Duration::from_secs_f64(s.uniform(1) * within);
        let mut found = None;
        while Instant::now() < until && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        let runner = Pid::from_raw(child.id() as i32).unwrap();
        let begun = Instant::now();
        while found.is_none() && child.try_wait().unwrap().is_none() {
            found = match victim {
                Victim::Runner => kill_process(runner, Signal::KILL).ok(),
                Victim::Group => kill_process_group(runner, Signal::KILL).ok(),
                Victim::Worker => {
                    let all = processes(project.dir.path());
                    let worker = all.iter().find(|(_, line)| line.contains(" worker "));
                    worker.and_then(|(pid, _)| kill_process(*pid, Signal::KILL).ok())
                }
            };
            assert!(begun.elapsed() < Duration::from_secs(60), "{what}: the run does not end");
        }
        let status = child.wait().unwrap();
        if found.is_none() {
            assert_eq!(status.code(), Some(0), "{what}");
            project = crate::cli::kills::project();
            continue;
        }
        killed += 1;
        if let Victim::Worker = victim {
            // The worker may have had its result written.
            assert!(matches!(status.code(), Some(0 | 1)), "{what}: {status:?}");
        }
        // Now or after the next run: it must not matter whether a worker is still ending.
        let wait = s.below(2, 2) == 0;
        if wait {
            all_gone(project.dir.path(), &what);
        }
        let stood = records(&project);
        for (step, record) in &stood {
            assert_eq!(record.ports, expected[step], "{what}: {step}");
        }
        // Half of the time it is killed again before it is through.
        if s.below(3, 2) == 0 {
            continue;
        }
        let (ran, hits) = finish(&project, &what);
        for step in stood.keys() {
            assert!(hits.contains(step) && !ran.contains(step), "{what}: {step} ran again");
        }
        assert_eq!(results(&project), expected, "{what}");
        let log = project.flow(&["log", "train"]);
        resumed += u64::from(ran.contains("train") && out(&log).contains("resumes: after step"));
        let (ran, hits) = finish(&project, &what);
        assert_eq!((ran.len(), hits.len()), (0, 8), "{what}");
        all_gone(project.dir.path(), &what);
        let left = fs::read_dir(project.path(".flow/attempts")).unwrap().count();
        assert_eq!(left, 0, "{what}: folders of attempts");
        let outputs = fs::read_dir(project.path("outputs/killed")).unwrap();
        let outputs: Vec<_> = outputs.map(|e| e.unwrap().file_name()).collect();
        assert_eq!(outputs, ["adapter"], "{what}");
        project = crate::cli::kills::project();
    }
    #[allow(clippy::print_stdout, reason = "what `.ci/run` shows of it")]
    {
        println!("{moments} moments within {whole:.2} s, {n} runs, {resumed} resumed trainings");
    }
}

#[test]
fn killed_at_ten_moments() {
    kill_at(10, 1);
}

#[test]
#[ignore = "takes a minute; `.ci/run` starts it"]
fn killed_at_two_hundred_moments() {
    std::thread::scope(|scope| {
        for seed in 0..2 {
            scope.spawn(move || kill_at(100, 100 + seed));
        }
    });
}

/// A command with grandchildren: in its group, in a group of their own, without a parent.
const FAMILY: &str = r#"
name: family
steps:
  slow:
    kind: command
    with:
      run: "sh -c 'sleep 3001 & sleep 3002' & timeout 3003 sh -c 'sleep 3004 & sleep 3005' &
        (sleep 3006 &) ; echo begun; wait"
      outputs: { a: a.txt }
"#;

fn begin_family(project: &Project) -> Child {
    let child = start(project);
    let begun = Instant::now();
    let sleeping = |n: usize| {
        let all = processes(project.dir.path());
        let line = format!("sleep 300{n} ");
        all.iter().any(|(_, l)| *l == line)
    };
    while ![1, 2, 4, 5, 6].into_iter().all(sleeping) {
        assert!(begun.elapsed() < Duration::from_secs(60), "the family never came together");
        std::thread::sleep(Duration::from_millis(10));
    }
    child
}

#[test]
fn a_grandchild_never_outlives_its_runner() {
    for (signal, group) in [(Signal::KILL, false), (Signal::KILL, true), (Signal::TERM, false)] {
        let project = in_memory(FAMILY);
        let mut child = begin_family(&project);
        let runner = Pid::from_raw(child.id() as i32).unwrap();
        let sent = if group { kill_process_group } else { kill_process };
        sent(runner, signal).unwrap();
        child.wait().unwrap();
        all_gone(project.dir.path(), "a family");
    }
}

#[test]
fn who_waits_for_a_run_that_dies_takes_over() {
    let text = r#"
name: relay
steps:
  slow:
    kind: command
    with:
      run: "echo x >> DIARY; [ $(wc -l < DIARY) -gt 1 ] || sleep 4000; echo 1 > ${out.a}"
      outputs: { a: a.txt }
"#;
    let project = in_memory("");
    let diary = project.path("diary");
    project.write("p.yaml", &text.replace("DIARY", diary.to_str().unwrap()));
    let mut first = start(&project);
    let wait = |done: &dyn Fn() -> bool| {
        let begun = Instant::now();
        while !done() {
            assert!(begun.elapsed() < Duration::from_secs(60));
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    wait(&|| diary.exists());
    let mut command = project.command(&["run", "p.yaml"]);
    let second = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    let pid = first.id();
    let runs = project.path(".flow/runs");
    wait(&|| {
        let journals = fs::read_dir(&runs).unwrap().flatten();
        let mut journals = journals.map(|run| fs::read_to_string(run.path().join("events.jsonl")));
        journals.any(|text| text.is_ok_and(|text| text.contains("\"type\":\"waiting\"")))
    });
    first.kill().unwrap();
    first.wait().unwrap();
    let second = second.wait_with_output().unwrap();
    assert_eq!(second.status.code(), Some(0), "{}", err(&second));
    assert!(err(&second).contains("waits for run 20"), "{}", err(&second));
    assert!(err(&second).contains(&format!("pid {pid} on ")), "{}", err(&second));
    assert_eq!(fs::read_to_string(&diary).unwrap(), "x\nx\n");
}

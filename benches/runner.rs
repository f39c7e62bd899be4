//! What the runner costs: a first run and an unchanged run of a layered DAG of trivial `command`
//! steps, beside ninja and make on the same DAG, in the same run.
//!
//! `cargo bench --bench runner [-- [--peers] STEPS…]` (default 100 1000 10000). Each step is one
//! shell that reads the numbers of one to three steps of the layer before and writes one number;
//! about sqrt(N) steps a layer. The first layer and one step in the middle read a file each. A tool
//! that is not installed is left out. Times are of whole processes; unchanged runs are medians.
//!
//! With `--peers` Snakemake (up to 1,000 steps) and DVC (up to 100) run beside them, which takes
//! minutes. All folders stay until the end: a file system may make files slowly that has just
//! removed many (ext4 does).

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a bench prints, and stops at errors")]

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const FLOW: &str = env!("CARGO_BIN_EXE_flow");

/// A step: the steps of the layer before that it reads, or its source file.
struct Step {
    layer: usize,
    reads: Vec<usize>,
    source: bool,
}

/// About sqrt(n) steps a layer, each with 1 to 3 inputs from the layer before.
fn layered(n: usize) -> Vec<Step> {
    let width = (n as f64).sqrt().round() as usize;
    let mut state = 42_u64;
    let mut draw = |below: usize| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    let step = |i: usize| {
        let layer = i / width;
        let mut reads = Vec::new();
        if layer > 0 {
            reads.extend((0..=draw(3)).map(|_| (layer - 1) * width + draw(width)));
            reads.sort_unstable();
            reads.dedup();
        }
        Step { layer, reads, source: layer == 0 || i == n / 2 }
    };
    (0..n).map(step).collect()
}

/// The step of the middle and all that read from it.
fn dependents(steps: &[Step]) -> usize {
    let mut touched = vec![false; steps.len()];
    for i in steps.len() / 2..steps.len() {
        touched[i] = i == steps.len() / 2 || steps[i].reads.iter().any(|&r| touched[r]);
    }
    touched.iter().filter(|t| **t).count()
}

/// The shell's line: one number from several, as long as they are.
fn script(i: usize, inputs: &[String], out: &str) -> String {
    let mut text = String::new();
    for (k, input) in inputs.iter().enumerate() {
        write!(text, "read -r a{k} < {input}; ").unwrap();
    }
    let sum: Vec<String> = (0..inputs.len()).map(|k| format!("a{k}*{}", 31 + k)).collect();
    write!(text, "echo $(( ({} + {i}) % 900000 + 100000 )) > {out}", sum.join(" + ")).unwrap();
    text
}

fn write_pipelines(dir: &Path, steps: &[Step]) {
    let (mut flow, mut ninja, mut make) =
        (String::from("name: layered\nsteps:\n"), String::new(), String::from("all:"));
    ninja.push_str("rule sh\n  command = $line\n  description = $out\n");
    for i in 0..steps.len() {
        write!(make, " out/{i}").unwrap();
    }
    make.push('\n');
    for (i, step) in steps.iter().enumerate() {
        let source = step.source.then(|| format!("source/{i}"));
        let files: Vec<String> =
            step.reads.iter().map(|r| format!("out/{r}")).chain(source.clone()).collect();
        let line = script(i, &files, &format!("out/{i}")).replace('$', "$$");
        writeln!(ninja, "build out/{i}: sh {}\n  line = {line}", files.join(" ")).unwrap();
        writeln!(make, "out/{i}: {}\n\t@{line}", files.join(" ")).unwrap();
        let mut inputs: Vec<String> =
            step.reads.iter().map(|r| format!("${{steps.s{r}}}/n")).collect();
        inputs.extend(source.as_ref().map(|_| "number".to_owned()));
        let line = script(i, &inputs, "${out.n}");
        writeln!(flow, "  s{i}:\n    kind: command\n    with:").unwrap();
        writeln!(flow, "      run: \"{line}\"\n      outputs: {{ n: n }}").unwrap();
        if let Some(source) = source {
            fs::write(dir.join(&source), format!("{}\n", 100_000 + i)).unwrap();
            writeln!(flow, "      files: {{ number: ../{source} }}").unwrap();
        }
    }
    write_peers(dir, steps);
    fs::create_dir_all(dir.join("flow")).unwrap();
    fs::write(dir.join("flow/layered.yaml"), flow).unwrap();
    fs::write(dir.join("build.ninja"), ninja).unwrap();
    fs::write(dir.join("Makefile"), make).unwrap();
}

/// The same for Snakemake and DVC.
fn write_peers(dir: &Path, steps: &[Step]) {
    let (mut snakemake, mut dvc) = (String::from("rule all:\n    input:\n"), String::new());
    for i in 0..steps.len() {
        writeln!(snakemake, "        \"out/{i}\",").unwrap();
    }
    dvc.push_str("stages:\n");
    for (i, step) in steps.iter().enumerate() {
        let source = step.source.then(|| format!("source/{i}"));
        let files: Vec<String> =
            step.reads.iter().map(|r| format!("out/{r}")).chain(source).collect();
        let line = script(i, &files, &format!("out/{i}"));
        let quoted: Vec<String> = files.iter().map(|file| format!("\"{file}\"")).collect();
        let quoted = quoted.join(", ");
        writeln!(snakemake, "rule s{i}:\n    input: {quoted}\n    output: \"out/{i}\"").unwrap();
        writeln!(snakemake, "    shell: \"{line}\"").unwrap();
        writeln!(dvc, "  s{i}:\n    cmd: \"{line}\"\n    deps: [{quoted}]").unwrap();
        writeln!(dvc, "    outs: [\"out/{i}\"]").unwrap();
    }
    fs::write(dir.join("Snakefile"), snakemake).unwrap();
    fs::write(dir.join("dvc.yaml"), dvc).unwrap();
}

/// Makes a folder one that DVC works in.
fn prepare(tool: &str, dir: &Path) {
    if tool == "dvc" {
        run(dir, &["dvc", "init", "--no-scm", "-q"]);
        run(dir, &["dvc", "config", "core.analytics", "false"]);
    }
}

/// Runs a program to its end: its time, its largest memory in MB, what it wrote to stdout.
fn run(dir: &Path, words: &[&str]) -> (Duration, f64, String) {
    let started = Instant::now();
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).current_dir(dir).env_remove("FLOW_STORE");
    let child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let status = format!("/proc/{}/status", child.id());
    let watch = std::thread::spawn(move || {
        let mut peak = 0.0_f64;
        // Until the process is reaped, or is a zombie without memory.
        while let Ok(text) = fs::read_to_string(&status) {
            let Some(line) = text.lines().find_map(|l| l.strip_prefix("VmHWM:")) else { break };
            let kb: f64 = line.trim().trim_end_matches(" kB").parse().unwrap_or(0.0);
            peak = peak.max(kb / 1000.0);
            std::thread::sleep(Duration::from_millis(2));
        }
        peak
    });
    let output = child.wait_with_output().unwrap();
    let time = started.elapsed();
    assert!(output.status.success(), "{words:?} failed");
    (time, watch.join().unwrap(), String::from_utf8_lossy(&output.stdout).into_owned())
}

fn median(dir: &Path, words: &[&str], times: usize) -> (Duration, f64) {
    let mut taken: Vec<(Duration, f64)> =
        (0..times).map(|_| run(dir, words)).map(|(time, peak, _)| (time, peak)).collect();
    taken.sort_by_key(|(time, _)| *time);
    (taken[times / 2].0, taken.iter().map(|t| t.1).fold(0.0, f64::max))
}

/// Steps that a run of flow ran, as it says itself.
fn ran(json: &str) -> u64 {
    let end: serde_json::Value = serde_json::from_str(json.lines().last().unwrap()).unwrap();
    end["ran"].as_u64().unwrap()
}

fn bytes(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let size = |e: fs::DirEntry| match e.file_type().unwrap().is_dir() {
        true => bytes(&e.path()),
        false => e.metadata().map_or(0, |m| m.len()),
    };
    entries.map(size).sum()
}

/// Measures at a size; `folders` keeps what was made.
fn measure(n: usize, peers: bool, folders: &mut Vec<tempfile::TempDir>) {
    let steps = layered(n);
    let flow = [FLOW, "run", "flow/layered.yaml"];
    let flow_json = [FLOW, "--json", "run", "flow/layered.yaml"];
    // Each with the largest size at which it is run.
    let mut tools: Vec<(&str, &[&str], usize)> = vec![
        ("flow", &flow, usize::MAX),
        ("ninja", &["ninja"], usize::MAX),
        ("make", &["make", "-s", "-j2"], usize::MAX),
    ];
    if peers {
        tools.push(("snakemake", &["snakemake", "--cores", "2", "--quiet"], 1_000));
        tools.push(("dvc", &["dvc", "repro", "-q"], 100));
    }
    let ms = |d: Duration| d.as_secs_f64() * 1e3;
    println!("\n{n} steps in {} layers", steps.last().map_or(0, |s| s.layer + 1));
    println!("{:9} {:>10} {:>13} {:>10}", "", "first, s", "unchanged, ms", "peak, MB");
    let mut of_ninja = Vec::new();
    for (name, words, largest) in tools {
        if n > largest {
            continue;
        }
        if Command::new(words[0]).arg("--version").output().is_err() {
            println!("{name:9} is not installed");
            continue;
        }
        let times = match name {
            "snakemake" | "dvc" => 3,
            _ if n >= 5_000 => 11,
            _ => 31,
        };
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("source")).unwrap();
        fs::create_dir_all(dir.path().join("out")).unwrap();
        write_pipelines(dir.path(), &steps);
        prepare(name, dir.path());
        let (first, first_peak, _) = run(dir.path(), words);
        // What was just written is hashed again; a run of the next minute is the ordinary case.
        std::thread::sleep(Duration::from_millis(2_500));
        run(dir.path(), words);
        let (again, again_peak) = median(dir.path(), words, times);
        let peak = first_peak.max(again_peak);
        println!("{name:9} {:10.2} {:13.1} {peak:10.1}", first.as_secs_f64(), ms(again));
        of_ninja.push((first.as_secs_f64(), ms(again)));
        if name == "flow" {
            let store = dir.path().join(".flow");
            let size = bytes(&store);
            for _ in 0..10 {
                run(dir.path(), words);
            }
            let grown = (bytes(&store) - size) / 10;
            fs::write(dir.path().join(format!("source/{}", n / 2)), "999999\n").unwrap();
            let (time, _, said) = run(dir.path(), &flow_json);
            let (ran, expected) = (ran(&said), dependents(&steps) as u64);
            assert_eq!(ran, expected, "touching one file reruns exactly what depends on it");
            println!("         one input changed: {ran} ran in {:.3} s", time.as_secs_f64());
            println!(
                "         store: {} bytes a step; {grown} bytes for an unchanged run",
                size / n as u64
            );
        }
        folders.push(dir);
    }
    if let [flow, ninja, ..] = of_ninja[..] {
        println!("flow / ninja: first {:.2}, unchanged {:.2}", flow.0 / ninja.0, flow.1 / ninja.1);
    }
}

fn main() {
    let asked: Vec<usize> = std::env::args().filter_map(|a| a.parse().ok()).collect();
    let sizes = if asked.is_empty() { vec![100, 1_000, 10_000] } else { asked };
    let peers = std::env::args().any(|a| a == "--peers");
    let mut folders = Vec::new();
    sizes.into_iter().for_each(|n| measure(n, peers, &mut folders));
}

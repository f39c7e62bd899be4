//! A child process in a group of its own: its lines are logged, and it ends with the run.

use std::collections::{BTreeMap, VecDeque};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use rustix::process::{Pid, Signal, kill_process_group};

use crate::source::Fault;
use crate::step::{Context, Event};

/// Lines of output that an error shows.
const TAIL: usize = 20;

/// Longest line that is logged whole, in bytes.
const LONGEST_LINE: u64 = 64 << 10;

/// How long a process may take to end after it was asked to.
const GRACE: Duration = Duration::from_secs(10);

/// What is to be run.
pub(super) struct Job<'a> {
    pub(super) shell: &'a str,
    pub(super) script: &'a str,
    pub(super) dir: &'a Path,
    pub(super) environment: BTreeMap<String, String>,
}

/// Runs it to its end.
pub(super) fn run(job: &Job<'_>, cx: &Context<'_>) -> Result<()> {
    let mut command = Command::new(job.shell);
    command.arg("-c").arg(job.script).current_dir(job.dir).env_clear();
    for (name, value) in inherited()? {
        command.env(name, value);
    }
    command.env("LANG", "C.UTF-8").env("LC_ALL", "C.UTF-8").envs(&job.environment);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child = command.spawn().map_err(|e| {
        let fault = Fault::new(format!("the shell `{}` cannot be started", job.shell));
        fault.help("set `shell` to a program that is on the PATH").cause(e)
    })?;
    let tail = Mutex::new(VecDeque::with_capacity(TAIL));
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let status = std::thread::scope(|scope| {
        let emit = cx.emit;
        let tail = &tail;
        let stdout = stdout.map(|from| scope.spawn(move || follow(from, emit, tail)));
        let stderr = stderr.map(|from| scope.spawn(move || follow(from, emit, tail)));
        let status = wait(&mut child, cx);
        // Whatever it left running would hold the pipes open, and its slots are free now.
        signal(&child, Signal::KILL);
        for reader in [stdout, stderr].into_iter().flatten() {
            reader.join().map_err(|_| anyhow!("reading the command's output failed"))?;
        }
        status
    })?;
    if cx.cancelled() {
        bail!("interrupted");
    }
    if status.success() {
        return Ok(());
    }
    let how = match (status.code(), status.signal()) {
        (Some(code), _) => format!("the command ended with status {code}"),
        (None, Some(signal)) => format!("the command was ended by signal {signal}"),
        (None, None) => "the command failed".to_owned(),
    };
    let tail = tail.into_inner().unwrap_or_default();
    let tail: Vec<String> = tail.into_iter().collect();
    let help = if tail.is_empty() {
        "it wrote nothing".to_owned()
    } else {
        format!("its last lines:\n{}", tail.join("\n"))
    };
    Err(Fault::new(how).help(help).into())
}

/// `PATH` and `HOME` of this process, as a child sees them: only the roof reads the environment.
fn inherited() -> Result<Vec<(&'static str, String)>> {
    let script = r#"printf '%s\0%s' "$PATH" "$HOME""#;
    let output = Command::new("sh").arg("-c").arg(script).output().context("starting `sh`")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let (path, home) = text.split_once('\0').unwrap_or((&text, ""));
    let pairs = [("PATH", path), ("HOME", home)].into_iter().filter(|(_, v)| !v.is_empty());
    Ok(pairs.map(|(name, value)| (name, value.to_owned())).collect())
}

fn wait(child: &mut Child, cx: &Context<'_>) -> Result<ExitStatus> {
    let mut pause = Duration::from_millis(1);
    let mut asked: Option<Instant> = None;
    loop {
        if let Some(status) = child.try_wait().context("waiting for the command")? {
            return Ok(status);
        }
        match asked {
            None if cx.cancelled() => {
                signal(child, Signal::TERM);
                asked = Some(Instant::now());
            }
            Some(since) if since.elapsed() > GRACE => signal(child, Signal::KILL),
            _ => {}
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

fn signal(child: &Child, signal: Signal) {
    let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    if let Some(group) = group {
        // It fails when the whole group has ended, which is what is wanted.
        let _ = kill_process_group(group, signal);
    }
}

fn follow(from: impl Read, emit: &(dyn Fn(Event) + Sync), tail: &Mutex<VecDeque<String>>) {
    let mut from = BufReader::new(from);
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut from).take(LONGEST_LINE).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let text = String::from_utf8_lossy(&line).trim_end_matches(['\n', '\r']).to_owned();
        if let Ok(mut tail) = tail.lock() {
            if tail.len() == TAIL {
                tail.pop_front();
            }
            tail.push_back(text.clone());
        }
        emit(Event::Log { line: text });
    }
}

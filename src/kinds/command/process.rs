//! A child process in a group of its own: its lines are logged, and it ends with the run.
//!
//! What keeps that promise when the runner itself is killed is a small shell beside it, which waits
//! for the end of a pipe that only the runner holds, and then ends the group. (The kernel's own
//! parent-death signal reaches the command's shell but not what the shell has started.)

use std::collections::{BTreeMap, VecDeque};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};

use crate::source::Fault;
use crate::step::Context;

/// Lines of output that an error shows.
const TAIL: usize = 20;

/// Longest line that is logged whole, in bytes.
const LONGEST_LINE: u64 = 64 << 10;

/// How long a process may take to end after it was asked to.
const GRACE: Duration = Duration::from_secs(10);

/// How long its output is followed after it has ended: a process that left its group may hold the
/// pipes open for ever.
const LAST_WORDS: Duration = Duration::from_secs(3);

/// Lines that wait to be logged before the command has to.
const WAITING: usize = 1024;

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
    let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let group = group.context("a process without a number")?;
    let watch = Watch::start(group).inspect_err(|_| signal(group, Signal::KILL))?;
    let (send, lines) = sync_channel(WAITING);
    if let Some(from) = child.stdout.take() {
        follow(from, send.clone());
    }
    if let Some(from) = child.stderr.take() {
        follow(from, send);
    }
    let mut said = Said { lines, tail: VecDeque::with_capacity(TAIL) };
    wait(group, cx, &mut said);
    // Whatever it left running would hold the pipes open, and its slots are free now. Before it is
    // reaped, so that its group's number cannot be another's yet.
    signal(group, Signal::KILL);
    watch.stop();
    let status = child.wait().context("waiting for the command")?;
    let deadline = Instant::now() + LAST_WORDS;
    while said.hear(cx, deadline.saturating_duration_since(Instant::now())) {
        if Instant::now() >= deadline {
            cx.log("a process that the command left behind holds its output open: no more is read");
            break;
        }
    }
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
    let tail: Vec<String> = said.tail.into_iter().collect();
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

/// Waits for its end, without reaping it; asks it to stop, and ends its group, when it must.
fn wait(group: Pid, cx: &Context<'_>, said: &mut Said) {
    let mut pause = Duration::from_millis(1);
    let mut asked: Option<Instant> = None;
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    while matches!(waitid(WaitId::Pid(group), options), Ok(None) | Err(rustix::io::Errno::INTR)) {
        match asked {
            None if cx.cancelled() => {
                signal(group, Signal::TERM);
                asked = Some(Instant::now());
            }
            Some(since) if since.elapsed() > GRACE => signal(group, Signal::KILL),
            _ => {}
        }
        if !said.hear(cx, pause) {
            std::thread::sleep(pause);
        }
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

fn signal(group: Pid, signal: Signal) {
    // It fails when the whole group has ended, which is what is wanted.
    let _ = kill_process_group(group, signal);
}

/// Ends a process group when this process ends without having stopped it.
struct Watch(Child);

impl Watch {
    fn start(group: Pid) -> Result<Self> {
        // In a group of its own, so that a key pressed at the terminal does not end it first.
        let script = "trap '' HUP INT TERM; read -r end; kill -s KILL -- \"-$0\"";
        let group = group.as_raw_nonzero().to_string();
        let mut command = Command::new("sh");
        command.args(["-c", script, &group]).process_group(0);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(Self(command.spawn().context("starting `sh`")?))
    }

    /// Before the group's number is free for others, and before the pipe is closed.
    fn stop(mut self) {
        let pipe = self.0.stdin.take();
        // Both fail only if it has ended, which is what is wanted.
        let _ = self.0.kill();
        let _ = self.0.wait();
        drop(pipe);
    }
}

/// What the command writes.
struct Said {
    lines: Receiver<String>,
    tail: VecDeque<String>,
}

impl Said {
    /// Logs lines for so long; `false` once both pipes are closed.
    fn hear(&mut self, cx: &Context<'_>, time: Duration) -> bool {
        let until = Instant::now() + time;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return true;
            }
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    if self.tail.len() == TAIL {
                        self.tail.pop_front();
                    }
                    self.tail.push_back(line.clone());
                    cx.log(line);
                }
                Err(RecvTimeoutError::Timeout) => return true,
                Err(RecvTimeoutError::Disconnected) => return false,
            }
        }
    }
}

/// Reads lines on a thread that nobody waits for.
fn follow(from: impl Read + Send + 'static, to: SyncSender<String>) {
    std::thread::spawn(move || {
        let mut from = BufReader::new(from);
        let mut line = Vec::new();
        loop {
            line.clear();
            match (&mut from).take(LONGEST_LINE).read_until(b'\n', &mut line) {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
            let text = String::from_utf8_lossy(&line).trim_end_matches(['\n', '\r']).to_owned();
            // Nobody listens any more once the command's last words are over.
            if to.send(text).is_err() {
                return;
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_ends_with_its_runner() {
        let sleeper = || {
            let child = Command::new("sleep").arg("60").process_group(0).spawn().unwrap();
            let group = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
            (child, Watch::start(group).unwrap())
        };
        // The end of a process closes its pipes, as this does.
        let (mut child, watch) = sleeper();
        drop(watch);
        assert_eq!(child.wait().unwrap().signal(), Some(9));
        let (mut child, watch) = sleeper();
        watch.stop();
        assert!(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

//! A child process in a session of its own: its lines are logged, and it ends with the run.
//!
//! What keeps that promise when the runner itself is killed is a small shell beside it, the
//! [`Watch`]. It is there before the command is, and waits for the end of a pipe that only the
//! runner holds, to end the session then. (The kernel's own parent-death signal reaches the
//! command's shell but not what the shell has started.) A process that makes a session for itself
//! (`setsid`, a daemon) has left on purpose and is not followed.

use std::collections::{BTreeMap, VecDeque};
use std::io::{BufRead, BufReader, Read, Write as _};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::process::{
    Pid, Signal, WaitId, WaitIdOptions, getpgid, getpid, getsid, kill_process, kill_process_group,
    setsid, waitid,
};

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
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let watch = Watch::start()?;
    let mut child = match watch.spawn(command) {
        Ok(child) => child,
        Err(e) => {
            watch.stop();
            let fault = Fault::new(format!("the shell `{}` cannot be started", job.shell));
            let fault = fault.help("set `shell` to a program that is on the PATH").cause(e);
            return Err(fault.into());
        }
    };
    let leader = number(&child)?;
    let (send, lines) = sync_channel(WAITING);
    if let Some(from) = child.stdout.take() {
        follow(from, send.clone());
    }
    if let Some(from) = child.stderr.take() {
        follow(from, send);
    }
    let mut said = Said { lines, tail: VecDeque::with_capacity(TAIL) };
    wait(leader, cx, &mut said);
    // Whatever it left running would hold the pipes open, and its slots are free now. Before it is
    // reaped, so that its number cannot be another's yet.
    signal(leader, Signal::KILL);
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

/// Waits for its end, without reaping it; asks it to stop, and ends its session, when it must.
fn wait(leader: Pid, cx: &Context<'_>, said: &mut Said) {
    let mut pause = Duration::from_millis(1);
    let mut asked: Option<Instant> = None;
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    while matches!(waitid(WaitId::Pid(leader), options), Ok(None) | Err(rustix::io::Errno::INTR)) {
        match asked {
            None if cx.cancelled() => {
                signal(leader, Signal::TERM);
                asked = Some(Instant::now());
            }
            Some(since) if since.elapsed() > GRACE => signal(leader, Signal::KILL),
            _ => {}
        }
        if !said.hear(cx, pause) {
            std::thread::sleep(pause);
        }
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

fn number(child: &Child) -> Result<Pid> {
    let number = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    number.context("a process without a number")
}

/// Signals all of a session: the group of its leader, and what has left the group.
fn signal(leader: Pid, signal: Signal) {
    // Each fails when what it is for has ended, which is what is wanted.
    let _ = kill_process_group(leader, signal);
    for stray in strays(leader) {
        let _ = kill_process(stray, signal);
    }
}

/// Processes of a session outside the group of its leader: `timeout` and shells with job control
/// make groups of their own. Where there is no `/proc` they are not found.
fn strays(leader: Pid) -> Vec<Pid> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|e| e.file_name().to_str()?.parse().ok().and_then(Pid::from_raw));
    let of_session = pids.filter(|pid| getsid(Some(*pid)) == Ok(leader));
    of_session.filter(|pid| getpgid(Some(*pid)) != Ok(leader)).collect()
}

/// Ends a session when this process ends without having stopped it.
struct Watch {
    shell: Child,
    pipe: ChildStdin,
}

impl Watch {
    /// Reads the session's number, then waits for the end of the pipe. Three looks at `/proc`,
    /// because a process may have started another one meanwhile.
    const SCRIPT: &str = r#"
        trap '' HUP INT TERM
        read -r leader || exit 0
        read -r end
        kill -s KILL -- "-$leader"
        for look in 1 2 3; do
            for stat in /proc/[0-9]*/stat; do
                read -r line < "$stat" || continue
                set -- ${line##*) }
                pid=${stat#/proc/}
                [ "$4" = "$leader" ] && kill -s KILL "${pid%/stat}"
            done
        done"#;

    fn start() -> Result<Self> {
        let mut command = Command::new("sh");
        // In a group of its own, so that a key pressed at the terminal does not end it first.
        command.args(["-c", Self::SCRIPT]).process_group(0);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut shell = command.spawn().context("starting `sh`")?;
        let pipe = shell.stdin.take().context("a pipe that was asked for")?;
        Ok(Self { shell, pipe })
    }

    /// Starts a command as the leader of a session. It tells the watch its number itself, before
    /// it runs, so that there is no moment at which it runs and nobody watches.
    #[expect(unsafe_code, reason = "what runs between fork and exec is unsafe by its nature")]
    fn spawn(&self, mut command: Command) -> std::io::Result<Child> {
        use std::os::fd::AsFd as _;
        let pipe = self.pipe.as_fd().try_clone_to_owned()?;
        let announce = move || {
            setsid()?;
            // On the stack: nothing may be allocated here.
            let mut line = [0; 16];
            let mut rest = &mut line[..];
            writeln!(rest, "{}", getpid().as_raw_nonzero())?;
            let length = 16 - rest.len();
            rustix::io::write(&pipe, &line[..length])?;
            Ok(())
        };
        // SAFETY: `announce` makes system calls and writes to its own stack; it allocates nothing
        // and takes no lock.
        unsafe { command.pre_exec(announce) };
        command.spawn()
    }

    /// Before the session's number is free for others, and before the pipe is closed.
    fn stop(mut self) {
        // Both fail only if it has ended, which is what is wanted.
        let _ = self.shell.kill();
        let _ = self.shell.wait();
        drop(self.pipe);
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

    fn sleeper(script: &str) -> (Child, Watch) {
        let watch = Watch::start().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", script]).stdout(Stdio::piped());
        (watch.spawn(command).unwrap(), watch)
    }

    #[test]
    fn a_session_ends_with_its_runner() {
        // The end of a process closes its pipes, as this does.
        let (mut child, watch) = sleeper("sleep 60");
        drop(watch);
        assert_eq!(child.wait().unwrap().signal(), Some(9));
        let (mut child, watch) = sleeper("sleep 60");
        watch.stop();
        assert!(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// All of these hold the pipe that is read to its end here.
    #[cfg(target_os = "linux")]
    #[test]
    fn what_the_command_started_ends_too_whatever_its_group() {
        let script = "sleep 61 & timeout 60 sh -c 'sleep 62 & sleep 63' & echo; wait";
        for by_watch in [true, false] {
            let (mut child, watch) = sleeper(script);
            let mut pipe = child.stdout.take().unwrap();
            pipe.read_exact(&mut [0]).unwrap();
            let leader = number(&child).unwrap();
            let begun = Instant::now();
            while strays(leader).len() < 3 {
                assert!(begun.elapsed() < Duration::from_secs(20), "`timeout` makes a group");
                std::thread::sleep(Duration::from_millis(5));
            }
            if by_watch {
                drop(watch);
            } else {
                signal(leader, Signal::KILL);
                watch.stop();
            }
            assert_eq!(pipe.read(&mut [0]).unwrap(), 0);
            child.wait().unwrap();
            assert!(begun.elapsed() < Duration::from_secs(20));
        }
    }
}

//! A child process in a group of its own: its lines are logged, and it ends with the run.
//!
//! What it starts is in its group, unless that makes a group for itself, as `timeout` and daemons
//! do: those are known by their `TMPDIR`, which is the attempt's own folder. What keeps the promise
//! when the runner itself is killed is [`Watch`](super::watch::Watch).

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::Read as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{
    Pid, Signal, WaitId, WaitIdOptions, kill_process, kill_process_group, waitid,
};

use super::{left, watch};
use crate::source::Fault;
use crate::step::Context;

/// Lines of output that an error shows.
const TAIL: usize = 20;

/// Longest line that is logged whole, in bytes.
const LONGEST_LINE: usize = 64 << 10;

/// How long its output is followed after it has ended: a process that left its group may hold the
/// pipes open for ever.
const LAST_WORDS: Duration = Duration::from_secs(3);

/// Commands that took longer have their folders for themselves: what a new one costs is nothing to
/// them, and they may have had time to have a service of the machine work in it.
const BRIEF: Duration = Duration::from_millis(200);

/// What is to be run.
pub(super) struct Job<'a> {
    pub(super) shell: &'a str,
    pub(super) script: &'a str,
    pub(super) dir: &'a Path,
    pub(super) environment: BTreeMap<String, String>,
}

/// Runs it to its end.
pub(super) fn run(job: &Job<'_>, cx: &Context<'_>) -> Result<()> {
    let Some(shell) = shell(job.shell)? else {
        let fault = Fault::new(format!("the shell `{}` cannot be started", job.shell));
        return Err(fault.help("set `shell` to a program that is on the PATH").into());
    };
    let inherited = inherited()?;
    let mark = mark(&cx.attempt_dir);
    left::adopt();
    let what = watch::Announcing { shell: &shell, script: job.script };
    // One pipe for both, so that lines come in the order in which they were written.
    let (from, to) = std::io::pipe().context("making a pipe")?;
    let stderr = to.try_clone().context("making a pipe")?;
    let set = |command: &mut Command| {
        command.current_dir(job.dir).env_clear().envs(inherited.iter().map(|(n, v)| (n, v)));
        command.env("LANG", "C.UTF-8").env("LC_ALL", "C.UTF-8").envs(&job.environment);
        command.stdout(to).stderr(stderr);
    };
    let (mut child, watch) = watch::ready(&mark)?.spawn(&what, set).map_err(|e| {
        let fault = Fault::new(format!("the shell `{}` cannot be started", job.shell));
        fault.help("set `shell` to a program that is on the PATH").cause(e)
    })?;
    let (leader, begun) = (watch.leader(), Instant::now());
    let lines = Lines { from: OwnedFd::from(from).into(), rest: Vec::new() };
    let mut said = Said { lines: Some(lines), tail: VecDeque::with_capacity(TAIL) };
    let waited = wait(leader, cx, &mut said);
    // Whatever it left running would hold the pipes open, and its slots are free now. Before it is
    // reaped, so that its number cannot be another's yet.
    send(leader, Signal::KILL);
    if cx.cancelled() {
        send_to_strays(&cx.attempt_dir, Signal::KILL);
    }
    drop(watch);
    let status = child.wait().context("waiting for the command")?;
    if left::nothing() && begun.elapsed() < BRIEF {
        cx.dirs.leave_tidy();
    }
    waited?;
    let deadline = Instant::now() + LAST_WORDS;
    while said.is_open() {
        if Instant::now() >= deadline {
            cx.log("a process that the command left behind holds its output open: no more is read");
            break;
        }
        said.hear(cx, None, deadline.saturating_duration_since(Instant::now()))?;
    }
    if cx.cancelled() {
        bail!("interrupted");
    }
    if status.success() {
        (cx.rest)();
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
fn inherited() -> Result<&'static [(&'static str, String)]> {
    static INHERITED: OnceLock<Vec<(&str, String)>> = OnceLock::new();
    if let Some(known) = INHERITED.get() {
        return Ok(known);
    }
    let script = r#"printf '%s\0%s' "$PATH" "$HOME""#;
    let output = Command::new("sh").arg("-c").arg(script).output().context("starting `sh`")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let (path, home) = text.split_once('\0').unwrap_or((&text, ""));
    let pairs = [("PATH", path), ("HOME", home)].into_iter().filter(|(_, v)| !v.is_empty());
    Ok(INHERITED.get_or_init(|| pairs.map(|(name, value)| (name, value.to_owned())).collect()))
}

/// Where a shell is, searched for once.
fn shell(program: &str) -> Result<Option<PathBuf>> {
    static FOUND: Mutex<BTreeMap<String, PathBuf>> = Mutex::new(BTreeMap::new());
    let mut found = FOUND.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(path) = found.get(program) {
        return Ok(Some(path.clone()));
    }
    let path = on_path(program, inherited()?);
    found.extend(path.clone().map(|path| (program.to_owned(), path)));
    Ok(path)
}

/// Where a program is. Given by its path it can be started without a copy of this process, which
/// a search on another `PATH` than its own would take.
fn on_path(program: &str, environment: &[(&str, String)]) -> Option<PathBuf> {
    let path = environment.iter().find(|(name, _)| *name == "PATH").map(|(_, path)| path);
    let places = path.into_iter().flat_map(|path| path.split(':')).filter(|dir| !dir.is_empty());
    let is_program = |path: &PathBuf| {
        std::fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
    };
    let mut found = places.map(|dir| Path::new(dir).join(program)).filter(is_program);
    if program.contains('/') { Some(PathBuf::from(program)) } else { found.next() }
}

/// What the variables of all commands of a run begin with, and of nothing else: their `TMPDIR`, as
/// far as it is the same for all attempts of the run.
fn mark(attempt_dir: &Path) -> String {
    let name = attempt_dir.file_name().unwrap_or_default().to_string_lossy();
    let run = name.split_inclusive('.').next().unwrap_or_default();
    format!("TMPDIR={}", attempt_dir.with_file_name(run).display())
}

/// Waits for its end, without reaping it; asks it to stop, and ends what it started, when it must.
fn wait(leader: Pid, cx: &Context<'_>, said: &mut Said) -> Result<()> {
    // Where the system can say when a process ends, nothing need look for it.
    #[cfg(target_os = "linux")]
    let end = rustix::process::pidfd_open(leader, rustix::process::PidfdFlags::empty()).ok();
    #[cfg(not(target_os = "linux"))]
    let end: Option<OwnedFd> = None;
    let mut pause = Duration::from_millis(if end.is_some() { 50 } else { 1 });
    let mut asked: Option<Instant> = None;
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    while matches!(waitid(WaitId::Pid(leader), options), Ok(None) | Err(rustix::io::Errno::INTR)) {
        match asked {
            None if cx.cancelled() => {
                send(leader, Signal::TERM);
                send_to_strays(&cx.attempt_dir, Signal::TERM);
                asked = Some(Instant::now());
            }
            Some(since) if since.elapsed() > cx.grace => send(leader, Signal::KILL),
            _ => {}
        }
        said.hear(cx, end.as_ref(), pause)?;
        pause = (pause * 2).min(Duration::from_millis(50));
    }
    Ok(())
}

fn send(group: Pid, signal: Signal) {
    // It fails when the whole group has ended, which is what is wanted.
    let _ = kill_process_group(group, signal);
}

/// Signals what a command started and is not in its group. Where there is no `/proc` it is not
/// found.
fn send_to_strays(attempt_dir: &Path, signal: Signal) {
    for pid in strays(attempt_dir) {
        let _ = kill_process(pid, signal);
    }
}

fn strays(attempt_dir: &Path) -> Vec<Pid> {
    let variable = format!("TMPDIR={}", attempt_dir.display());
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|e| e.file_name().to_str()?.parse().ok().and_then(Pid::from_raw));
    let of_it = pids.filter(|pid| {
        let environment = std::fs::read(format!("/proc/{}/environ", pid.as_raw_nonzero()));
        environment.is_ok_and(|e| e.split(|b| *b == 0).any(|v| v == variable.as_bytes()))
    });
    of_it.collect()
}

/// What the command writes.
struct Said {
    /// Until the end of its output.
    lines: Option<Lines>,
    tail: VecDeque<String>,
}

impl Said {
    /// Whether more may come.
    fn is_open(&self) -> bool {
        self.lines.is_some()
    }

    /// Waits so long for lines, or for the process to end, and logs what has come.
    fn hear(&mut self, cx: &Context<'_>, end: Option<&OwnedFd>, time: Duration) -> Result<()> {
        let pipe = self.lines.iter().map(|lines| lines.from.as_fd());
        let fds = pipe.chain(end.map(|fd| fd.as_fd()));
        let mut fds: Vec<PollFd<'_>> =
            fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
        match poll(&mut fds, Some(&Timespec::try_from(time)?)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e).context("waiting for the command"),
        }
        // The pipe, if there is one, is the first of them.
        let ready = fds.first().is_some_and(|fd| !fd.revents().is_empty());
        let mut heard = Vec::new();
        if ready && self.lines.as_mut().is_some_and(|lines| !lines.read(&mut heard)) {
            self.lines = None;
        }
        for line in heard {
            if self.tail.len() == TAIL {
                self.tail.pop_front();
            }
            self.tail.push_back(line.clone());
            cx.log(line);
        }
        Ok(())
    }
}

/// Lines of a pipe as they come.
struct Lines {
    from: File,
    /// Of a line without its end.
    rest: Vec<u8>,
}

impl Lines {
    /// Reads once; `false` at the end of the pipe.
    fn read(&mut self, heard: &mut Vec<String>) -> bool {
        let mut chunk = [0; 16 << 10];
        let n = match self.from.read(&mut chunk) {
            Ok(n) => n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => return true,
            Err(_) => 0,
        };
        self.rest.extend_from_slice(&chunk[..n]);
        let mut start = 0;
        loop {
            let rest = &self.rest[start..];
            let window = &rest[..rest.len().min(LONGEST_LINE)];
            let end = match window.iter().position(|&b| b == b'\n') {
                Some(end) => end + 1,
                None if window.len() == LONGEST_LINE || n == 0 && !rest.is_empty() => window.len(),
                None => break,
            };
            let text = String::from_utf8_lossy(&rest[..end]);
            heard.push(text.trim_end_matches(['\n', '\r']).to_owned());
            start += end;
        }
        self.rest.drain(..start);
        n > 0
    }
}

#[cfg(test)]
mod tests {
    use std::process::Stdio;

    use super::*;

    #[cfg(target_os = "linux")]
    #[test]
    fn what_a_command_started_is_known_whatever_its_group() {
        let dir = tempfile::tempdir().unwrap();
        let script = "sleep 61 & timeout 60 sh -c 'sleep 62 & sleep 63' & echo; wait";
        let what = watch::Announcing { shell: Path::new("/bin/sh"), script };
        let set = |command: &mut Command| {
            command.env("TMPDIR", dir.path()).stdout(Stdio::piped());
        };
        let ready = watch::ready(&mark(dir.path())).unwrap();
        let (mut child, watch) = ready.spawn(&what, set).unwrap();
        let begun = Instant::now();
        while strays(dir.path()).len() < 5 {
            assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", strays(dir.path()));
            std::thread::sleep(Duration::from_millis(5));
        }
        send(watch.leader(), Signal::KILL);
        send_to_strays(dir.path(), Signal::KILL);
        // Each of them holds the pipe that is read to its end here.
        let mut said = Vec::new();
        child.stdout.take().unwrap().read_to_end(&mut said).unwrap();
        assert_eq!(said, b"\n");
        drop(watch);
        child.wait().unwrap();
        assert!(begun.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn a_mark_is_that_of_the_run() {
        let dir = Path::new("/store/attempts/20261125-014722-2bed.ab12-7-0-1");
        assert_eq!(mark(dir), "TMPDIR=/store/attempts/20261125-014722-2bed.");
    }

    #[test]
    fn lines_come_whole() {
        let mut file = tempfile::tempfile().unwrap();
        let long = "x".repeat(LONGEST_LINE + 5);
        std::io::Write::write_all(&mut file, format!("a\r\n\n{long}\nend").as_bytes()).unwrap();
        std::io::Seek::rewind(&mut file).unwrap();
        let (mut lines, mut heard) = (Lines { from: file, rest: Vec::new() }, Vec::new());
        while lines.read(&mut heard) {}
        let want = ["a", "", &long[..LONGEST_LINE], &long[LONGEST_LINE..], "end"];
        assert_eq!(heard, want);
    }
}

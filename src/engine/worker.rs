//! An attempt in a process of its own: both ends.
//!
//! The runner makes the attempt's directory with `request.json` in it and starts `flow worker
//! DIR`. The worker appends what it says to `events.jsonl`, which the runner follows, and leaves
//! `result.json` by atomic rename. Its standard input is a pipe that the runner never writes: its
//! end means that the runner is gone or wants the worker to stop. A detached job needs no pipe.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};
use serde::{Deserialize, Serialize};

use super::attempt::{Around, Failure, Reply, Said, Task, VISIBLE_GPUS, attempt, visible_gpus};
use super::bind::look_up;
use super::machine::{self, BUILD};
use super::prepare::bad_field;
use super::{Options, WorkerCommand};
use crate::digest::Digest;
use crate::hub::Hub;
use crate::source::Fault;
use crate::step::{Device, Dirs, Kind};
use crate::store::{Spares, Store};

/// Raised when the files in an attempt's directory change their meaning.
const PROTOCOL: u32 = 1;

/// Exit code of a worker that could not write its result.
const REFUSED: i32 = 3;

const REQUEST: &str = "request.json";
const EVENTS: &str = "events.jsonl";
const RESULT: &str = "result.json";

#[derive(Serialize, Deserialize)]
struct Request {
    protocol: u32,
    build: String,
    /// Content of the program.
    program: Digest,
    store: PathBuf,
    grace_ms: u64,
    task: Task,
}

/// Variables that a worker inherits; everything else is emptied, so that what is not declared
/// cannot change a result unseen. A name that ends in `*` stands for all that begin so.
const INHERITED: [&str; 24] = [
    "HOME",
    "PATH",
    "TMPDIR",
    "USER",
    "LOGNAME",
    "LANG",
    "LC_*",
    "TZ",
    "XDG_*",
    "HF_*",
    "HUGGING_FACE_*",
    "FLOW_*",
    "SSL_CERT_*",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "LD_LIBRARY_PATH",
    "CUDA_*",
    "NVIDIA_*",
    "SLURM_*",
    "RUST_BACKTRACE",
];

fn inherited(name: &str) -> bool {
    INHERITED.iter().any(|allowed| match allowed.strip_suffix('*') {
        Some(beginning) => name.starts_with(beginning),
        None => name == *allowed,
    })
}

/// The environment of a worker.
fn environment(task: &Task, options: &Options) -> BTreeMap<String, String> {
    let given = &options.environment;
    let mut env: BTreeMap<String, String> = given
        .iter()
        .filter(|(name, _)| inherited(name) || task.secrets.contains(name))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    env.extend(task.env.clone());
    env.insert("RAYON_NUM_THREADS".into(), task.threads.to_string());
    if task.device == Device::Cuda || !task.gpus.is_empty() {
        env.insert(VISIBLE_GPUS.into(), visible_gpus(&task.gpus));
    }
    if options.offline {
        env.insert("HF_HUB_OFFLINE".into(), "1".into());
    }
    env
}

/// The program that workers run, as it was when the run began.
pub(super) struct Program<'a> {
    command: &'a WorkerCommand,
    content: Digest,
}

impl<'a> Program<'a> {
    /// Notes its content, from the stat table where it has not changed.
    pub(super) fn of(command: &'a WorkerCommand, store: &Store) -> Result<Self> {
        Ok(Self { command, content: store.digest_of_file(&command.exe)?.0 })
    }
}

/// Does an attempt in a worker and waits for it.
pub(super) fn attempt_in_worker(
    task: &Task,
    dir: &Path,
    log: &Path,
    program: &Program<'_>,
    options: &Options,
    around: &Around<'_>,
) -> Reply {
    match start(task, dir, log, program, options, around.store) {
        Ok(child) => follow(child, dir, (&task.key, task.force), options.grace, around),
        Err(e) => Reply::Failed(Failure::of(&e.context("starting a worker"))),
    }
}

fn start(
    task: &Task,
    dir: &Path,
    log: &Path,
    program: &Program<'_>,
    options: &Options,
    store: &Store,
) -> Result<Child> {
    let command = program.command;
    let grace_ms = u64::try_from(options.grace.as_millis())?;
    let root = store.root().to_path_buf();
    let request = Request {
        protocol: PROTOCOL,
        build: BUILD.into(),
        program: program.content,
        store: root,
        grace_ms,
        task: task.clone(),
    };
    store.unsynced().write_atomic(&dir.join(REQUEST), &serde_json::to_vec_pretty(&request)?)?;
    let log_file = store.disk().open_append(log)?;
    let child = Command::new(&command.exe)
        .args(&command.args)
        .arg(dir)
        .env_clear()
        .envs(environment(task, options))
        .stdin(Stdio::piped())
        .stdout(log_file.try_clone()?)
        .stderr(log_file)
        .process_group(0)
        .spawn();
    child.with_context(|| format!("running {}", command.exe.display()))
}

/// Follows a worker to its end; asks it to stop, and ends its process group, when it must.
fn follow(
    mut child: Child,
    dir: &Path,
    (key, force): (&Digest, bool),
    grace: Duration,
    around: &Around<'_>,
) -> Reply {
    let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let stdin = child.stdin.take();
    let mut tail = Tail::new(dir.join(EVENTS));
    let mut pause = Duration::from_millis(2);
    let mut stopping: Option<Instant> = None;
    let mut stdin = stdin;
    let mut killed = false;
    loop {
        tail.read(&mut |said| (around.say)(said));
        if has_ended(&child) {
            break;
        }
        if around.cancel.load(Ordering::Relaxed) {
            let since = *stopping.get_or_insert_with(|| {
                stdin = None;
                if let Some(group) = group {
                    let _ = kill_process_group(group, Signal::TERM);
                }
                Instant::now()
            });
            if since.elapsed() >= grace
                && let Some(group) = group
            {
                killed = true;
                let _ = kill_process_group(group, Signal::KILL);
            }
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
    // Before it is reaped, so that its group's number cannot be another's yet.
    if let Some(group) = group {
        let _ = kill_process_group(group, Signal::KILL);
    }
    let status = child.wait();
    drop(stdin);
    tail.read(&mut |said| (around.say)(said));
    // A worker may die between its record and its reply.
    let made = || look_up(around.store, key).ok().and_then(Result::ok).filter(|_| !force);
    match (read_reply(dir).or_else(|| made().map(|record| Reply::Taken { record })), status) {
        (Some(reply), _) => reply,
        (None, Ok(status)) => Reply::Failed(died(status, killed, around)),
        (None, Err(e)) => Reply::Failed(Failure::plain(format!("waiting for the worker: {e}"))),
    }
}

/// Whether a child has ended, without reaping it.
fn has_ended(child: &Child) -> bool {
    let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) else { return true };
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    !matches!(waitid(WaitId::Pid(pid), options), Ok(None) | Err(rustix::io::Errno::INTR))
}

fn read_reply(dir: &Path) -> Option<Reply> {
    serde_json::from_slice(&std::fs::read(dir.join(RESULT)).ok()?).ok()
}

/// What to say of a worker that left no result.
fn died(status: ExitStatus, killed: bool, around: &Around<'_>) -> Failure {
    const SIGKILL: i32 = 9;
    if around.cancel.load(Ordering::Relaxed) {
        return Failure::plain("interrupted");
    }
    let mut failure = match (status.signal(), status.code()) {
        (Some(signal), _) => {
            Failure::plain(format!("its process was ended by signal {signal} ({})", name(signal)))
        }
        (None, Some(REFUSED)) => Failure {
            store: true,
            help: vec!["its log says more; make room, or give the store's folder back".into()],
            ..Failure::plain("its process could not write to the store")
        },
        (None, code) => {
            let code = code.map_or_else(String::new, |c| format!(" with code {c}"));
            Failure::plain(format!("its process exited{code} and left no result"))
        }
    };
    if status.signal() == Some(SIGKILL) && !killed {
        failure.help.push("most likely it ran out of memory; give it less to do at once".into());
    }
    failure
}

fn name(signal: i32) -> &'static str {
    match signal {
        1 => "SIGHUP",
        2 => "SIGINT",
        4 => "SIGILL",
        6 => "SIGABRT",
        8 => "SIGFPE",
        9 => "SIGKILL",
        11 => "SIGSEGV",
        15 => "SIGTERM",
        24 => "SIGXCPU",
        _ => "see `man 7 signal`",
    }
}

/// Reads whole lines that were added to a file.
struct Tail {
    path: PathBuf,
    at: u64,
    rest: Vec<u8>,
}

impl Tail {
    fn new(path: PathBuf) -> Self {
        Self { path, at: 0, rest: Vec::new() }
    }

    fn read(&mut self, take: &mut dyn FnMut(Said)) {
        let Ok(mut file) = File::open(&self.path) else { return };
        if file.seek(SeekFrom::Start(self.at)).is_err() {
            return;
        }
        self.at += file.read_to_end(&mut self.rest).unwrap_or(0) as u64;
        while let Some(end) = self.rest.iter().position(|&b| b == b'\n') {
            let line: Vec<u8> = self.rest.drain(..=end).collect();
            if let Ok(said) = serde_json::from_slice(&line) {
                take(said);
            }
        }
    }
}

/// Does one attempt in this process: what the hidden command `flow worker DIR` calls. `hub` is
/// made from the environment as anywhere else; `environment` holds the values of secrets.
/// `Ok(false)` when the attempt failed: its runner has the reason.
///
/// # Errors
/// When the directory holds no request that this program can serve.
pub fn worker(
    dir: &Path,
    kinds: &[Kind],
    hub: &Hub,
    environment: &BTreeMap<String, String>,
) -> Result<bool> {
    let path = dir.join(REQUEST);
    let text = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
    let request: Request =
        serde_json::from_slice(&text).with_context(|| format!("reading {}", path.display()))?;
    let Request { protocol, build, program, store, grace_ms, task } = request;
    if (protocol, build.as_str()) != (PROTOCOL, BUILD) {
        let message = format!("the request is of flow {build}, this is {BUILD}");
        return Err(Fault::new(message).help("use one version of flow on all machines").into());
    }
    let kind = kinds.iter().find(|k| k.name == task.kind);
    let kind = kind.with_context(|| format!("this program has no kind `{}`", task.kind))?;
    ensure!(
        kind.version == task.version,
        "kind `{}` has version {} here and {} in the request",
        task.kind,
        kind.version,
        task.version
    );
    let store = Store::open(&store)?;
    let own = machine::program().context("finding this program's own path")?;
    if store.digest_of_file(&own)?.0 != program {
        let fault = Fault::new("flow was built anew while the run was going on");
        return Err(fault.help("start the run again; finished work is kept").into());
    }
    let cancel = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(signal_hook::consts::SIGTERM, Arc::clone(&cancel))?;
    watch_stdin(Arc::clone(&cancel), Duration::from_millis(grace_ms));
    let step = (kind.parse)(&task.params).map_err(bad_field)?;
    let path = dir.join(EVENTS);
    let events = Mutex::new(store.disk().open_append(&path)?);
    let say = |said: Said| {
        if let Ok(mut line) = serde_json::to_vec(&said) {
            line.push(b'\n');
            let mut events = events.lock().unwrap_or_else(PoisonError::into_inner);
            // What cannot be said is no reason to lose the work.
            let _ = store.disk().append(&mut events, &line, &path);
        }
    };
    let secrets = task.secrets.iter();
    let secrets = secrets.filter_map(|n| environment.get(n).map(|v| (n.clone(), v.clone())));
    let around = Around {
        store: &store,
        hub,
        cancel: &cancel,
        dirs: &Dirs::default(),
        spares: &Spares::default(),
        grace: Duration::from_millis(grace_ms),
        say: &say,
        secrets: secrets.collect(),
        alone: true,
        build: &program.to_string(),
    };
    let reply = attempt(&task, step.as_ref(), dir, &around);
    store.unsynced().write_atomic(&dir.join(RESULT), &serde_json::to_vec_pretty(&reply)?)?;
    Ok(!matches!(reply, Reply::Failed(_)))
}

/// The end of standard input means that the runner died: stop, and after the grace end the whole
/// process group, this process included.
fn watch_stdin(cancel: Arc<AtomicBool>, grace: Duration) {
    let stdin = std::io::stdin();
    // A detached job has no pipe there.
    let fifo = rustix::fs::fstat(&stdin)
        .is_ok_and(|s| rustix::fs::FileType::from_raw_mode(s.st_mode).is_fifo());
    if !fifo {
        return;
    }
    std::thread::spawn(move || {
        let mut byte = [0; 64];
        loop {
            match stdin.lock().read(&mut byte) {
                Ok(0) => break,
                Err(e) if e.kind() != std::io::ErrorKind::Interrupted => break,
                _ => {}
            }
        }
        cancel.store(true, Ordering::Relaxed);
        std::thread::sleep(grace);
        let own = rustix::process::getpgrp();
        // Only a group of its own: never the group of a shell that it was started from.
        if own == rustix::process::getpid() {
            let _ = kill_process_group(own, Signal::KILL);
        }
    });
}

//! What ends a command's processes when the runner itself is killed.

use std::collections::BTreeSet;
use std::io::{self, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, Result};
use rustix::process::{Pid, getpid, setsid};

/// Told which sessions there are, by their leaders; at the end of its input, which only this
/// process can write, it ends those that still are. A process may start another one while it looks
/// for what has left its leader's group (`timeout` makes one of its own), so it looks three times.
/// It heeds no signal: a key pressed at the terminal must not end it first.
const SCRIPT: &str = r#"
trap '' HUP INT TERM
leaders=' '
while read -r sign leader; do
  case $sign in
    +) leaders="$leaders$leader " ;;
    -) leaders="${leaders%% $leader *} ${leaders#* $leader }" ;;
  esac
done
set -- $leaders
[ $# -gt 0 ] || exit 0
for leader; do kill -s KILL -- "-$leader"; done
for look in 1 2 3; do
  for stat in /proc/[0-9]*/stat; do
    read -r line < "$stat" || continue
    set -- ${line##*) }
    case $leaders in
      *" $4 "*) pid=${stat#/proc/}; kill -s KILL "${pid%/stat}" ;;
    esac
  done
done
"#;

/// Ends a session if this process ends before this value is dropped.
///
/// One small shell watches for all of them, from the first on, through a pipe that only this
/// process holds. (The kernel's own parent-death signal reaches a command's shell but not what the
/// shell has started.)
#[derive(Debug)]
pub(super) struct Watch(Pid);

impl Watch {
    /// The first process of the session, and of the group that is named after it.
    pub(super) fn leader(&self) -> Pid {
        self.0
    }
}

impl Drop for Watch {
    /// To be dropped before the session's first process is reaped, and its number is free for
    /// others.
    fn drop(&mut self) {
        lock().remove(self.0.as_raw_nonzero().get());
    }
}

/// The shell that watches, there and listening.
pub(super) struct Ready(MutexGuard<'static, Watcher>);

/// Sees that there is a shell to watch over what is about to start.
pub(super) fn ready() -> Result<Ready> {
    let mut watcher = lock();
    watcher.ready()?;
    Ok(Ready(watcher))
}

impl Ready {
    /// Starts a command as the leader of a session, and watches over it.
    pub(super) fn spawn(mut self, command: Command) -> io::Result<(Child, Watch)> {
        let (child, leader) = self.0.spawn(command)?;
        Ok((child, Watch(leader)))
    }
}

fn lock() -> MutexGuard<'static, Watcher> {
    static WATCHER: Mutex<Watcher> = Mutex::new(Watcher { shell: None, leaders: BTreeSet::new() });
    WATCHER.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug)]
struct Watcher {
    shell: Option<(Child, ChildStdin)>,
    leaders: BTreeSet<i32>,
}

impl Watcher {
    /// Starts the shell if there is none that listens.
    fn ready(&mut self) -> Result<()> {
        if self.tell('=', 0) { Ok(()) } else { self.start() }
    }

    /// The new process tells the shell of itself before it becomes the command, so that there is
    /// no moment at which the command runs and nobody watches.
    #[expect(unsafe_code, reason = "what runs between fork and exec is unsafe by its nature")]
    fn spawn(&mut self, mut command: Command) -> io::Result<(Child, Pid)> {
        let pipe = self.shell.as_ref().map(|(_, pipe)| pipe.as_fd().try_clone_to_owned());
        let pipe = pipe.unwrap_or_else(|| Err(io::ErrorKind::BrokenPipe.into()))?;
        let announce = move || {
            setsid()?;
            // On the stack: nothing may be allocated here.
            let mut line = [0; 16];
            let mut rest = &mut line[..];
            writeln!(rest, "+ {}", getpid().as_raw_nonzero())?;
            let length = 16 - rest.len();
            rustix::io::write(&pipe, &line[..length])?;
            Ok(())
        };
        // SAFETY: `announce` makes system calls and writes to its own stack; it allocates nothing
        // and takes no lock.
        unsafe { command.pre_exec(announce) };
        let child = match command.spawn() {
            Ok(child) => child,
            Err(e) => {
                // It may have told of a process that never became the command, and whose number
                // will be another's: a shell that knows of it must not act on it.
                if let Some((shell, _)) = &mut self.shell {
                    let _ = shell.kill();
                }
                let _ = self.start();
                return Err(e);
            }
        };
        let number = i32::try_from(child.id()).ok();
        let leader = number.and_then(Pid::from_raw).ok_or(io::ErrorKind::Unsupported)?;
        self.leaders.insert(leader.as_raw_nonzero().get());
        Ok((child, leader))
    }

    fn remove(&mut self, leader: i32) {
        self.leaders.remove(&leader);
        // If it is gone, the next one is told of those that are left.
        self.tell('-', leader);
    }

    /// Whether the shell is there to be told.
    fn tell(&mut self, sign: char, leader: i32) -> bool {
        let pipe = self.shell.as_mut().map(|(_, pipe)| pipe);
        pipe.is_some_and(|pipe| pipe.write_all(format!("{sign} {leader}\n").as_bytes()).is_ok())
    }

    /// Starts the shell and tells it of all leaders.
    fn start(&mut self) -> Result<()> {
        if let Some((mut dead, pipe)) = self.shell.take() {
            drop(pipe);
            let _ = dead.wait();
        }
        let mut command = Command::new("sh");
        command.args(["-c", SCRIPT]).process_group(0);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().context("starting `sh`")?;
        let mut pipe = child.stdin.take().context("a process without its pipe")?;
        for leader in &self.leaders {
            pipe.write_all(format!("+ {leader}\n").as_bytes()).context("telling `sh`")?;
        }
        self.shell = Some((child, pipe));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt as _;

    fn sleeper(watcher: &mut Watcher) -> Child {
        watcher.ready().unwrap();
        let mut command = Command::new("sleep");
        command.arg("60");
        watcher.spawn(command).unwrap().0
    }

    #[test]
    fn sessions_end_with_their_runner_unless_they_ended_before() {
        let id = |child: &Child| i32::try_from(child.id()).unwrap();
        let mut watcher = Watcher { shell: None, leaders: BTreeSet::new() };
        let mut children: Vec<Child> = (0..4).map(|_| sleeper(&mut watcher)).collect();
        watcher.remove(id(&children[0]));
        watcher.remove(id(&children[2]));
        // The watcher itself was killed: another takes over.
        watcher.shell.as_mut().unwrap().0.kill().unwrap();
        watcher.shell.as_mut().unwrap().0.wait().unwrap();
        children.push(sleeper(&mut watcher));
        watcher.remove(id(&children[3]));
        // One that cannot be started is nobody's, and the others are still watched over.
        let shell = watcher.shell.as_ref().unwrap().0.id();
        assert!(watcher.spawn(Command::new("/is/not/there")).is_err());
        assert_ne!(watcher.shell.as_ref().unwrap().0.id(), shell);
        // The end of a process closes its pipes, as this does.
        let (mut shell, pipe) = watcher.shell.take().unwrap();
        drop(pipe);
        shell.wait().unwrap();
        for (i, child) in children.iter_mut().enumerate() {
            let watched = [1, 4].contains(&i);
            if !watched {
                assert!(child.try_wait().unwrap().is_none(), "{i}");
                child.kill().unwrap();
            }
            assert_eq!(child.wait().unwrap().signal(), Some(9), "{i}");
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn what_left_the_group_ends_too() {
        let mut watcher = Watcher { shell: None, leaders: BTreeSet::new() };
        watcher.ready().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", "timeout 60 sh -c 'echo; sleep 64 & sleep 65' & wait"]);
        command.stdout(Stdio::piped());
        let (mut child, _) = watcher.spawn(command).unwrap();
        let mut said = child.stdout.take().unwrap();
        io::Read::read_exact(&mut said, &mut [0]).unwrap();
        drop(watcher.shell.take().unwrap().1);
        // All of them hold this pipe: its end is theirs.
        assert_eq!(io::Read::read(&mut said, &mut [0]).unwrap(), 0);
        child.wait().unwrap();
    }
}

//! What ends a command's processes when the runner itself is killed.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, Result, bail};
use rustix::process::Pid;

/// Waits for the end of its input, which only this process and commands that have not announced
/// themselves yet hold open. Then it reads the notes that have been taken: which groups began and
/// ended, and how variables of their processes begin. It ends the groups that still run and all
/// that has such a variable (`timeout` and daemons leave their group). What is found may start
/// another process meanwhile, so it looks three times. It heeds no signal: a key pressed at the
/// terminal must not end it first. It works in no folder of the user's: a disk can be taken out
/// once the run is over.
const SCRIPT: &str = r#"
trap '' HUP INT TERM
cd /
groups=' '
marks=
newline='
'
while read -r sign; do :; done
while read -r sign what; do
  case $sign in
    +) groups="$groups$what " ;;
    -) case $groups in
         *" $what "*) groups="${groups%% $what *} ${groups#* $what }" ;;
       esac ;;
    =) marks="$marks${marks:+$newline}$what" ;;
  esac
done <"$1"
rm "$1"
for group in $groups; do kill -s KILL -- "-$group"; done
[ -n "$marks" ] || exit 0
for look in 1 2 3; do
  for file in $(grep -lsF -e "$marks" /proc/[0-9]*/environ); do
    pid=${file#/proc/}
    kill -s KILL "${pid%/environ}"
  done
done
"#;

/// For shells of another language: their script and the path of the notes.
const ANNOUNCE_OTHER: &str = r#"echo "+ $$" >>"$2"; exec "$0" -c "$1" </dev/null"#;

/// Begins a command's script: its shell takes a note of itself before it does anything, so that
/// there is no moment at which the command runs and nobody watches. Its input is the watcher's
/// until then.
fn announce(notes: &Path) -> String {
    let notes = notes.display().to_string().replace('\'', r"'\''");
    format!(r#"echo "+ $$" >>'{notes}'; exec </dev/null; "#)
}

/// Notes of this size are written anew, without what is over.
const MANY_NOTES: u64 = 32 << 10;

/// Shells that understand [`ANNOUNCE`].
const POSIX: [&str; 6] = ["sh", "dash", "bash", "ash", "ksh", "zsh"];

/// A shell with a script, to be started by [`Ready::spawn`].
#[derive(Debug)]
pub(super) struct Announcing<'a> {
    pub(super) shell: &'a Path,
    pub(super) script: &'a str,
}

impl Announcing<'_> {
    fn command(&self, notes: &Path) -> Command {
        let Self { shell, script } = self;
        if shell.file_name().is_some_and(|name| POSIX.iter().any(|posix| name == *posix)) {
            let mut command = Command::new(shell);
            command.arg("-c").arg(announce(notes) + script);
            return command;
        }
        let mut command = Command::new("/bin/sh");
        command.arg("-c").arg(ANNOUNCE_OTHER).arg(shell).arg(script).arg(notes);
        command
    }
}

/// Ends a process group if this process ends before this value is dropped.
///
/// One small shell watches for all of them, from the first on. It sleeps until a pipe that only
/// this process holds has ended, and finds in a file what there is to end. (The kernel's own
/// parent-death signal reaches a command's shell but not what the shell has started, and asking
/// for it takes a copy of this process for every command.)
#[derive(Debug)]
pub(super) struct Watch(Pid);

impl Watch {
    /// The first process of the group.
    pub(super) fn leader(&self) -> Pid {
        self.0
    }
}

impl Drop for Watch {
    /// To be dropped before the group's first process is reaped, and its number is free for
    /// others.
    fn drop(&mut self) {
        lock().remove(self.0.as_raw_nonzero().get());
    }
}

/// The shell that watches, there and listening, for one command that is about to start.
pub(super) struct Ready {
    /// Held open until the command has announced itself.
    pipe: OwnedFd,
    notes: PathBuf,
}

/// Sees that there is a shell to watch over what is about to start, in whose processes a variable
/// begins with this mark.
pub(super) fn ready(mark: &str) -> Result<Ready> {
    lock().ready(mark)
}

impl Ready {
    /// Starts a command, in a group of its own, and watches over it. `set` prepares it.
    pub(super) fn spawn(
        self,
        what: &Announcing<'_>,
        set: impl FnOnce(&mut Command),
    ) -> io::Result<(Child, Watch)> {
        // This thread stands still until the command's program is loaded. Others start theirs.
        let child = self.command(what, set).spawn();
        let leader = lock().started(child.as_ref().ok());
        Ok((child?, Watch(leader.ok_or(io::ErrorKind::Unsupported)?)))
    }

    fn command(self, what: &Announcing<'_>, set: impl FnOnce(&mut Command)) -> Command {
        let mut command = what.command(&self.notes);
        set(&mut command);
        command.process_group(0).stdin(Stdio::from(self.pipe));
        command
    }
}

fn lock() -> MutexGuard<'static, Watcher> {
    static WATCHER: Mutex<Watcher> = Mutex::new(Watcher::new());
    WATCHER.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug)]
struct Watcher {
    shell: Option<(Child, ChildStdin)>,
    notes: Option<Notes>,
    groups: BTreeSet<i32>,
    marks: BTreeSet<String>,
    /// Commands about to start, whose groups are not known yet.
    starting: usize,
}

/// What the shell will read: lines of a sign and a word.
#[derive(Debug)]
struct Notes {
    path: PathBuf,
    file: File,
    /// About so long, with what commands added.
    bytes: u64,
}

impl Notes {
    fn new() -> io::Result<Self> {
        let file = tempfile::Builder::new().prefix("flow-watch-").append(true).tempfile()?;
        // The shell removes it, from another folder.
        let (file, path) = file.keep().map_err(|e| e.error)?;
        let path = std::path::absolute(path)?;
        Ok(Self { path, file, bytes: 0 })
    }

    fn take(&mut self, sign: char, what: &str) -> io::Result<()> {
        let line = format!("{sign} {what}\n");
        self.bytes += 2 * line.len() as u64;
        self.file.write_all(line.as_bytes())
    }
}

impl Watcher {
    const fn new() -> Self {
        Self {
            shell: None,
            notes: None,
            groups: BTreeSet::new(),
            marks: BTreeSet::new(),
            starting: 0,
        }
    }

    /// Notes a mark; starts a shell if none is there.
    fn ready(&mut self, mark: &str) -> Result<Ready> {
        // A name with a line break cannot be told: then groups have to do.
        let new = !mark.contains('\n') && self.marks.insert(mark.to_owned());
        match &mut self.notes {
            // A command that is starting announces itself in the file that is there.
            Some(notes) if notes.bytes < MANY_NOTES || self.starting > 0 => {
                if new {
                    notes.take('=', mark).context("taking notes of what runs")?;
                }
            }
            _ => self.write_anew().context("taking notes of what runs")?,
        }
        let there =
            self.shell.as_mut().is_some_and(|(shell, _)| matches!(shell.try_wait(), Ok(None)));
        if !there {
            self.start()?;
        }
        let (Some((_, pipe)), Some(notes)) = (&self.shell, &self.notes) else {
            bail!("nobody watches over commands");
        };
        let pipe = pipe.as_fd().try_clone_to_owned()?;
        self.starting += 1;
        Ok(Ready { pipe, notes: notes.path.clone() })
    }

    /// Takes the notes anew, without groups that have ended. Whatever runs is among `groups`: what
    /// it may still add to the old file is known.
    fn write_anew(&mut self) -> io::Result<()> {
        let mut notes = Notes::new()?;
        self.marks.iter().try_for_each(|mark| notes.take('=', mark))?;
        self.groups.iter().try_for_each(|group| notes.take('+', &group.to_string()))?;
        if let Some(old) = &self.notes {
            std::fs::rename(&notes.path, &old.path)?;
            notes.path.clone_from(&old.path);
        }
        notes.bytes = 0;
        self.notes = Some(notes);
        Ok(())
    }

    /// A command has started, or could not.
    fn started(&mut self, child: Option<&Child>) -> Option<Pid> {
        self.starting -= 1;
        let leader = child.and_then(|child| Pid::from_raw(i32::try_from(child.id()).ok()?));
        self.groups.extend(leader.map(|leader| leader.as_raw_nonzero().get()));
        leader
    }

    fn remove(&mut self, group: i32) {
        self.groups.remove(&group);
        // If it cannot be noted now, the next command takes all notes anew.
        if let Some(notes) = &mut self.notes
            && notes.take('-', &group.to_string()).is_err()
        {
            notes.bytes = MANY_NOTES;
        }
    }

    /// Starts the shell.
    fn start(&mut self) -> Result<()> {
        if let Some((mut dead, pipe)) = self.shell.take() {
            drop(pipe);
            let _ = dead.wait();
        }
        let notes = self.notes.as_ref().context("there are no notes to read")?;
        let mut command = Command::new("sh");
        // A run that a command of another run started ends with that one; its watcher must not.
        command.args(["-c", SCRIPT, "sh"]).arg(&notes.path).process_group(0).env_remove("TMPDIR");
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().context("starting `sh`")?;
        let pipe = child.stdin.take().context("a process without its pipe")?;
        self.shell = Some((child, pipe));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt as _;

    fn start(watcher: &mut Watcher, script: &str) -> Child {
        let ready = watcher.ready("TMPDIR=/is/not/there/").unwrap();
        let what = Announcing { shell: Path::new("/bin/sh"), script };
        spawn(watcher, ready, &what, |command| {
            command.stdout(Stdio::piped());
        })
    }

    fn spawn(
        watcher: &mut Watcher,
        ready: Ready,
        what: &Announcing<'_>,
        set: impl FnOnce(&mut Command),
    ) -> Child {
        let child = ready.command(what, set).spawn().unwrap();
        watcher.started(Some(&child)).unwrap();
        child
    }

    /// Its first byte: then it has announced itself.
    fn begun(child: &mut Child) {
        io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut [0]).unwrap();
    }

    #[test]
    fn groups_end_with_their_runner_unless_they_ended_before() {
        let id = |child: &Child| i32::try_from(child.id()).unwrap();
        let mut watcher = Watcher::new();
        let sleeper = |watcher: &mut Watcher| {
            let mut child = start(watcher, "echo; exec sleep 60");
            begun(&mut child);
            child
        };
        let mut children: Vec<Child> = (0..4).map(|_| sleeper(&mut watcher)).collect();
        watcher.remove(id(&children[0]));
        watcher.remove(id(&children[2]));
        // The watcher itself was killed: another takes over.
        watcher.shell.as_mut().unwrap().0.kill().unwrap();
        watcher.shell.as_mut().unwrap().0.wait().unwrap();
        children.push(sleeper(&mut watcher));
        // So many notes that they are taken anew.
        watcher.notes.as_mut().unwrap().bytes = MANY_NOTES;
        watcher.ready("TMPDIR=/is/not/there/").unwrap();
        watcher.remove(id(&children[3]));
        // The end of a process closes its pipes, as this does.
        let (mut shell, pipe) = watcher.shell.take().unwrap();
        drop(pipe);
        shell.wait().unwrap();
        assert!(!watcher.notes.as_ref().unwrap().path.exists());
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
    fn what_left_the_group_is_known_by_its_mark() {
        let dir = tempfile::tempdir().unwrap();
        let mut watcher = Watcher::new();
        let mark = format!("TMPDIR={}/20261125.", dir.path().display());
        let ready = watcher.ready(&mark).unwrap();
        let script = "timeout 60 sh -c 'sleep 64 & setsid sleep 65 & echo; sleep 66' & wait";
        let what = Announcing { shell: Path::new("/bin/sh"), script };
        let set = |command: &mut Command| {
            command.env("TMPDIR", dir.path().join("20261125.abc")).stdout(Stdio::piped());
        };
        let mut child = spawn(&mut watcher, ready, &what, set);
        begun(&mut child);
        drop(watcher.shell.take().unwrap().1);
        // All of them hold this pipe: its end is theirs.
        assert_eq!(io::Read::read(child.stdout.as_mut().unwrap(), &mut [0]).unwrap(), 0);
        child.wait().unwrap();
    }

    #[test]
    fn a_script_is_what_it_was() {
        let mut watcher = Watcher::new();
        let mut said = |shell: &str, script: &str| {
            let what = Announcing { shell: Path::new(shell), script };
            let set = |command: &mut Command| {
                command.stdout(Stdio::piped()).stderr(Stdio::piped());
            };
            let ready = watcher.ready("TMPDIR=/is/not/there/").unwrap();
            let child = spawn(&mut watcher, ready, &what, set);
            watcher.remove(child.id() as i32);
            let output = child.wait_with_output().unwrap();
            String::from_utf8(output.stdout).unwrap() + &String::from_utf8_lossy(&output.stderr)
        };
        // Its input is empty, its lines have their numbers, a comment may stand first.
        assert_eq!(said("/bin/sh", "cat; echo end"), "end\n");
        assert_eq!(said("/bin/sh", "# what\ncat <<X\na b\nX"), "a b\n");
        assert!(said("/bin/sh", "true\nnone-such").contains(": 2: "));
        // A shell of another language. (No copy: a test beside this one that starts a process at
        // that moment would hold it open for writing.)
        let dir = tempfile::tempdir().unwrap();
        let other = dir.path().join("other");
        std::os::unix::fs::symlink("/bin/sh", &other).unwrap();
        assert_eq!(said(other.to_str().unwrap(), "cat; echo '$0'"), "$0\n");
    }
}

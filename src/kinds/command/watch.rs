//! What ends a command's processes when the runner itself is killed.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, Result};
use rustix::process::Pid;

/// Told which groups run; at the end of its input, which only this process can write, it ends
/// those that still do. It heeds no signal: a key pressed at the terminal must not end it first.
const SCRIPT: &str = r#"
trap '' HUP INT TERM
groups=' '
while read -r sign group; do
  case $sign in
    +) groups="$groups$group " ;;
    -) groups="${groups%% $group *} ${groups#* $group }" ;;
  esac
done
for group in $groups; do kill -s KILL -- "-$group"; done
"#;

/// Ends a process group if this process ends before this value is dropped.
///
/// One small shell watches for all of them, from the first on, through a pipe that only this
/// process holds. (The kernel's own parent-death signal reaches a command's shell but not what the
/// shell has started.)
#[derive(Debug)]
pub(super) struct Watch(i32);

impl Watch {
    /// Begins to watch over a group.
    pub(super) fn over(group: Pid) -> Result<Self> {
        let group = group.as_raw_nonzero().get();
        watcher().add(group)?;
        Ok(Self(group))
    }
}

impl Drop for Watch {
    /// To be dropped before the group's first process is reaped, and its number is free for
    /// others.
    fn drop(&mut self) {
        watcher().remove(self.0);
    }
}

fn watcher() -> MutexGuard<'static, Watcher> {
    static WATCHER: Mutex<Watcher> = Mutex::new(Watcher { shell: None, groups: BTreeSet::new() });
    WATCHER.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug)]
struct Watcher {
    shell: Option<(Child, ChildStdin)>,
    groups: BTreeSet<i32>,
}

impl Watcher {
    fn add(&mut self, group: i32) -> Result<()> {
        self.groups.insert(group);
        if !self.tell('+', group) {
            self.start().inspect_err(|_| {
                self.groups.remove(&group);
            })?;
        }
        Ok(())
    }

    fn remove(&mut self, group: i32) {
        self.groups.remove(&group);
        // If it is gone, the next one is told of those that are left.
        self.tell('-', group);
    }

    /// Whether the shell is there to be told.
    fn tell(&mut self, sign: char, group: i32) -> bool {
        let pipe = self.shell.as_mut().map(|(_, pipe)| pipe);
        pipe.is_some_and(|pipe| pipe.write_all(format!("{sign} {group}\n").as_bytes()).is_ok())
    }

    /// Starts the shell and tells it of all groups.
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
        for group in &self.groups {
            pipe.write_all(format!("+ {group}\n").as_bytes()).context("telling `sh`")?;
        }
        self.shell = Some((child, pipe));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt as _;

    #[test]
    fn groups_end_with_their_runner_unless_they_ended_before() {
        let sleeper = || Command::new("sleep").arg("60").process_group(0).spawn().unwrap();
        let id = |child: &Child| i32::try_from(child.id()).unwrap();
        let mut watcher = Watcher { shell: None, groups: BTreeSet::new() };
        let mut children: Vec<Child> = (0..4).map(|_| sleeper()).collect();
        children.iter().for_each(|child| watcher.add(id(child)).unwrap());
        watcher.remove(id(&children[0]));
        watcher.remove(id(&children[2]));
        // The watcher itself was killed: another takes over.
        watcher.shell.as_mut().unwrap().0.kill().unwrap();
        watcher.shell.as_mut().unwrap().0.wait().unwrap();
        let late = sleeper();
        watcher.add(id(&late)).unwrap();
        children.push(late);
        watcher.remove(id(&children[3]));
        // The end of a process closes its pipes, as this does.
        let (mut shell, pipe) = watcher.shell.take().unwrap();
        drop(pipe);
        assert!(shell.wait().unwrap().success());
        for (i, child) in children.iter_mut().enumerate() {
            let watched = [1, 4].contains(&i);
            if !watched {
                assert!(child.try_wait().unwrap().is_none(), "{i}");
                child.kill().unwrap();
            }
            assert_eq!(child.wait().unwrap().signal(), Some(9), "{i}");
        }
    }
}

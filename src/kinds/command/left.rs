//! Whether processes are left of commands that have ended.
//!
//! What a command starts is a descendant of this process, and is one of its children once those
//! between them have ended, because it asks for them (`PR_SET_CHILD_SUBREAPER`). They are children
//! of the first thread, and those that threads start for commands are not.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::OnceLock;

use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};

static CHILDREN: OnceLock<Option<File>> = OnceLock::new();

/// Asks for what commands leave behind; before the first of them starts.
pub(super) fn adopt() {
    CHILDREN.get_or_init(|| {
        #[cfg(target_os = "linux")]
        {
            let own = rustix::process::getpid();
            rustix::process::set_child_subreaper(Some(own)).ok()?;
            File::open(format!("/proc/self/task/{}/children", own.as_raw_nonzero())).ok()
        }
        #[cfg(not(target_os = "linux"))]
        None
    });
}

/// Whether nothing is left of a command whose first process has been waited for; of others that
/// still run there may be something. Nobody else waits for what has ended.
pub(super) fn nothing() -> bool {
    let Some(Some(children)) = CHILDREN.get() else { return false };
    let mut text = [0; 4096];
    let Ok(length) = children.read_at(&mut text, 0) else { return false };
    let ended = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
    let is_gone = |pid: Pid| match waitid(WaitId::Pid(pid), ended) {
        Ok(status) => status.is_some(),
        Err(e) => e == rustix::io::Errno::CHILD,
    };
    let pids = String::from_utf8_lossy(&text[..length]);
    let pids = pids.split_whitespace().map(|pid| pid.parse().ok().and_then(Pid::from_raw));
    // All of them are asked.
    pids.filter(|pid| !pid.is_some_and(is_gone)).count() == 0
}

//! Leases: locks that the kernel frees when their holder dies.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{FileExt as _, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::{Store, StoreError};

/// A lock held by this process; freed on drop, and by the kernel if the process dies.
#[derive(Debug)]
pub struct Lease {
    file: File,
    name: String,
}

/// Files of leases that this process has given up, to be renamed for others: a new file for each
/// of thousands of keys costs more than the trivial steps that they belong to. Nobody holds them;
/// whoever asks for one of these keys finds it free.
#[derive(Debug, Default)]
pub struct Spares(Mutex<Vec<(String, File)>>);

impl Spares {
    /// More than a run has steps at a time are of no use.
    const ENOUGH: usize = 64;

    /// Gives up a lease and keeps its file.
    pub fn rest(&self, lease: Lease) {
        let Ok(file) = lease.file.try_clone() else { return };
        let name = lease.name.clone();
        drop(lease);
        let mut spares = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if spares.len() < Self::ENOUGH {
            spares.push((name, file));
        }
    }

    fn take(&self) -> Option<(String, File)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // Closing frees it too; a child that inherited the descriptor must not keep it.
        let _ = flock(&self.file, FlockOperation::Unlock);
    }
}

/// Who holds a lease, as it wrote itself down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Run id.
    pub run: String,
    /// Process id.
    pub pid: u32,
    /// Host name.
    pub host: String,
    /// Unix milliseconds.
    pub since_unix_ms: u64,
}

/// The lock that [`Store::lock_shared`] shares. Never removed: its name begins with a dot.
const SWEEP: &str = ".sweep";

/// Whether an open file is the one at a path.
fn is_at(file: &File, path: &Path) -> bool {
    let same =
        |a: &std::fs::Metadata, b: &std::fs::Metadata| (a.dev(), a.ino()) == (b.dev(), b.ino());
    matches!((file.metadata(), std::fs::metadata(path)), (Ok(a), Ok(b)) if same(&a, &b))
}

/// Puts a text in place of what a file holds. (To empty it first would give back its block, for
/// another to be sought.)
fn write_over(file: &File, text: &[u8]) -> std::io::Result<()> {
    file.write_all_at(text, 0)?;
    let length = text.len() as u64;
    if file.metadata()?.len() == length { Ok(()) } else { file.set_len(length) }
}

fn now_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

/// The name of this host, as it stands in leases, journals and records.
pub fn host() -> String {
    static HOST: OnceLock<String> = OnceLock::new();
    HOST.get_or_init(|| rustix::system::uname().nodename().to_string_lossy().into_owned()).clone()
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let seconds = now_ms().saturating_sub(self.since_unix_ms) / 1000;
        let Self { run, pid, host, .. } = self;
        write!(f, "run {run}, pid {pid} on {host}, for {seconds} s")
    }
}

impl Store {
    fn lease_path(&self, name: &str) -> PathBuf {
        self.root().join("leases").join(name)
    }

    fn open_lease(&self, name: &str) -> anyhow::Result<File> {
        let path = self.lease_path(name);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let open = || options.open(&path).map_err(|e| StoreError::from_io("opening", &path, e));
        Ok(self.disk().within(&self.root().join("leases"), open)?)
    }

    /// Takes a lease if it is free. `run` is written into it for those who wait.
    ///
    /// # Errors
    /// When the lease's file cannot be opened.
    pub fn try_lease(&self, name: &str, run: &str) -> anyhow::Result<Option<Lease>> {
        self.try_lease_with(name, run, &Spares::default())
    }

    /// Like [`Store::try_lease`], with the file of an earlier lease if one can be had.
    ///
    /// # Errors
    /// When the lease's file cannot be opened.
    pub fn try_lease_with(
        &self,
        name: &str,
        run: &str,
        spares: &Spares,
    ) -> anyhow::Result<Option<Lease>> {
        let spare = spares.take().and_then(|spare| self.renamed(spare, name));
        let lease = if spare.is_some() { spare } else { self.try_lock(name)? };
        let Some(lease) = lease else { return Ok(None) };
        let (pid, since_unix_ms) = (std::process::id(), now_ms());
        let holder = Holder { run: run.to_owned(), pid, host: host(), since_unix_ms };
        // Only for people: a lease whose note cannot be written still holds.
        if let Ok(text) = serde_json::to_vec(&holder) {
            let _ = write_over(&lease.file, &text);
        }
        Ok(Some(lease))
    }

    /// The file of another lease under a new name, locked; `None` if it is in use or gone, or
    /// there is a file of this name. Whoever waits for the old name opens its file anew each time.
    fn renamed(&self, (old, file): (String, File), name: &str) -> Option<Lease> {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        flock(&file, FlockOperation::NonBlockingLockExclusive).ok()?;
        let (from, to) = (self.lease_path(&old), self.lease_path(name));
        let lease = Lease { file, name: name.to_owned() };
        let ours = is_at(&lease.file, &from)
            && renameat_with(CWD, &from, CWD, &to, RenameFlags::NOREPLACE).is_ok();
        ours.then_some(lease)
    }

    /// Locks a lease's file if nobody else has.
    fn try_lock(&self, name: &str) -> anyhow::Result<Option<Lease>> {
        let path = self.lease_path(name);
        loop {
            let file = self.open_lease(name)?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                // A sweep may have removed the file after it was opened here; a lock on that one
                // would keep nobody off.
                Ok(()) if is_at(&file, &path) => {
                    return Ok(Some(Lease { file, name: name.to_owned() }));
                }
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => return Ok(None),
                Err(e) => {
                    return Err(StoreError::from_io("locking", &path, e.into()).into());
                }
            }
        }
    }

    /// Removes the file of a lease that nobody holds; `false` if somebody does.
    pub(super) fn remove_lease(&self, name: &str) -> anyhow::Result<bool> {
        // Held while its file goes: who opened it meanwhile will see that it is no longer there.
        let Some(_lease) = self.try_lock(name)? else { return Ok(false) };
        self.disk().remove_file(&self.lease_path(name))?;
        Ok(true)
    }

    /// Shares the store: nothing that is in it is swept away meanwhile. Waits while a sweep goes
    /// on. See [`gc`](super) for who has to.
    ///
    /// # Errors
    /// When the lock's file cannot be opened or locked.
    pub fn lock_shared(&self) -> anyhow::Result<Lease> {
        let file = self.open_lease(SWEEP)?;
        loop {
            match flock(&file, FlockOperation::LockShared) {
                Ok(()) => return Ok(Lease { file, name: SWEEP.to_owned() }),
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => {
                    let path = self.lease_path(SWEEP);
                    return Err(StoreError::from_io("locking", &path, e.into()).into());
                }
            }
        }
    }

    /// Has the store alone, if nobody shares it now.
    ///
    /// # Errors
    /// When the lock's file cannot be opened or locked.
    pub fn try_lock_alone(&self) -> anyhow::Result<Option<Lease>> {
        self.try_lock(SWEEP)
    }

    /// Takes a lease, waiting for it.
    ///
    /// # Errors
    /// When the lease's file cannot be opened.
    pub fn lease(&self, name: &str, run: &str) -> anyhow::Result<Lease> {
        loop {
            if let Some(lease) = self.try_lease(name, run)? {
                return Ok(lease);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Whether somebody holds a lease.
    pub fn is_leased(&self, name: &str) -> bool {
        let Ok(file) = File::open(self.lease_path(name)) else { return false };
        flock(&file, FlockOperation::NonBlockingLockShared).is_err()
    }

    /// Names of the leases that somebody holds.
    pub fn leased(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.root().join("leases")).into_iter().flatten().flatten();
        let names = entries.filter_map(|e| e.file_name().into_string().ok());
        names.filter(|name| self.is_leased(name)).collect()
    }

    /// Who holds a lease, as far as it can be read.
    pub fn holder(&self, name: &str) -> Option<Holder> {
        let mut text = String::new();
        File::open(self.lease_path(name)).ok()?.read_to_string(&mut text).ok()?;
        serde_json::from_str(&text).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_whose_file_was_removed_holds_nobody_off() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap();
        let held = store.lease("key", "run").unwrap();
        assert!(!store.remove_lease("key").unwrap());
        drop(held);
        // Opened before the removal, locked after it.
        let stale = store.open_lease("key").unwrap();
        assert!(store.remove_lease("key").unwrap());
        assert!(!is_at(&stale, &store.lease_path("key")));
        assert!(store.try_lease("key", "run").unwrap().is_some());
    }

    #[test]
    fn a_file_serves_one_key_after_the_other() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap();
        let (spares, other) = (Spares::default(), Spares::default());
        let lease = |name: &str| store.try_lease_with(name, "run", &spares).unwrap();
        let files = || {
            let entries = std::fs::read_dir(store.root().join("leases")).unwrap();
            let mut names: Vec<_> =
                entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
            names.sort_unstable();
            names
        };
        spares.rest(lease("a").unwrap());
        assert!(!store.is_leased("a"), "nobody holds it");
        let b = lease("b").unwrap();
        assert_eq!(files(), ["b"]);
        assert!(store.is_leased("b") && store.holder("b").unwrap().run == "run");
        assert!(store.try_lease("b", "other").unwrap().is_none());
        // Another has the file's key meanwhile: it is theirs.
        spares.rest(b);
        let theirs = store.try_lease_with("b", "other", &other).unwrap().unwrap();
        let c = lease("c").unwrap();
        assert_eq!(files(), ["b", "c"]);
        // A file of the wanted name is never replaced, and one that was removed serves nobody.
        spares.rest(c);
        assert!(lease("b").is_none() && spares.take().is_none());
        drop(theirs);
        spares.rest(lease("b").unwrap());
        assert!(store.remove_lease("b").unwrap());
        let _d = lease("d").unwrap();
        assert_eq!(files(), ["c", "d"]);
    }

    #[test]
    fn many_share_a_store_and_one_has_it_alone() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap();
        let shared = [store.lock_shared().unwrap(), store.lock_shared().unwrap()];
        assert!(store.try_lock_alone().unwrap().is_none());
        drop(shared);
        let alone = store.try_lock_alone().unwrap().unwrap();
        let (send, receive) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            let store = &store;
            scope.spawn(move || {
                let _shared = store.lock_shared().unwrap();
                send.send(()).unwrap();
            });
            assert!(receive.recv_timeout(Duration::from_millis(30)).is_err(), "it waits");
            drop(alone);
            receive.recv().unwrap();
        });
    }
}

//! Leases: locks that the kernel frees when their holder dies.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::path::PathBuf;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::Store;

/// A lock held by this process; freed on drop, and by the kernel if the process dies.
#[derive(Debug)]
pub struct Lease {
    file: File,
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

fn now_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
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
        if let Some(parent) = path.parent() {
            self.disk().create_dir_all(parent)?;
        }
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false).open(&path);
        file.map_err(|e| super::StoreError::from_io("opening", &path, e).into())
    }

    /// Takes a lease if it is free. `run` is written into it for those who wait.
    ///
    /// # Errors
    /// When the lease's file cannot be opened.
    pub fn try_lease(&self, name: &str, run: &str) -> anyhow::Result<Option<Lease>> {
        let mut file = self.open_lease(name)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => return Ok(None),
            Err(e) => {
                let path = self.lease_path(name);
                return Err(super::StoreError::from_io("locking", &path, e.into()).into());
            }
        }
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let (pid, since_unix_ms) = (std::process::id(), now_ms());
        let holder = Holder { run: run.to_owned(), pid, host, since_unix_ms };
        // Only for people: a lease whose note cannot be written still holds.
        if let Ok(text) = serde_json::to_vec(&holder) {
            let _ =
                file.set_len(0).and_then(|()| file.rewind()).and_then(|()| file.write_all(&text));
        }
        Ok(Some(Lease { file }))
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

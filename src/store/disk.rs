//! Every write of the store goes through here, so that tests can make any one of them fail.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::folder::{self, Look};

/// A disk that refused. The roof looks for it in an error's chain.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// No space is left, or a quota is used up.
    #[error("the disk is full: {doing} {path}")]
    Full {
        /// What was being done.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// The system's word.
        source: io::Error,
    },
    /// The store may not be written.
    #[error("the store cannot be written: {doing} {path}")]
    ReadOnly {
        /// What was being done.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// The system's word.
        source: io::Error,
    },
    /// Anything else.
    #[error("{doing} {path}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// The system's word.
        source: io::Error,
    },
}

/// Bytes of room in which no result has place.
const LITTLE: u64 = 128 << 10;

/// Bytes that may lie about for a while.
pub const SMALL: u64 = 64 << 10;

/// What reads say that they do.
const READING: &str = "reading";

impl StoreError {
    pub(super) fn from_io(doing: &'static str, path: &Path, source: io::Error) -> Self {
        let path = path.to_path_buf();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::Full { doing, path, source }
            }
            // A file that may not be read says nothing about the store.
            io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied
                if doing != READING =>
            {
                Self::ReadOnly { doing, path, source }
            }
            _ => Self::Io { doing, path, source },
        }
    }
}

/// Makes writes of a [`Disk`] fail: for tests.
#[derive(Debug)]
pub struct Faults {
    calls: AtomicU64,
    fail: Range<u64>,
    kind: io::ErrorKind,
}

impl Faults {
    fn new(fail: Range<u64>, kind: io::ErrorKind) -> Arc<Self> {
        Arc::new(Self { calls: AtomicU64::new(0), fail, kind })
    }

    /// Fails at the `n`th call, from 1, as a full disk would; 0 never fails and only counts.
    pub fn at(n: u64) -> Arc<Self> {
        Self::new(n..n + 1, io::ErrorKind::StorageFull)
    }

    /// Fails from the `n`th call on, as a disk that is full and stays so.
    pub fn from(n: u64) -> Arc<Self> {
        Self::new(n..u64::MAX, io::ErrorKind::StorageFull)
    }

    /// Fails always, as a file system that is mounted read-only.
    pub fn read_only() -> Arc<Self> {
        Self::new(0..u64::MAX, io::ErrorKind::ReadOnlyFilesystem)
    }

    /// Calls so far.
    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }
}

/// The disk as the store writes it.
#[derive(Debug, Clone, Default)]
pub struct Disk {
    faults: Option<Arc<Faults>>,
    /// Leaves it to the system when written bytes reach the disk.
    unsynced: bool,
}

type Done<T> = Result<T, StoreError>;

impl Disk {
    /// A disk on which a call fails.
    pub fn faulty(faults: Arc<Faults>) -> Self {
        Self { faults: Some(faults), unsynced: false }
    }

    /// The same disk, without waiting for it: see [`Store::unsynced`](super::Store::unsynced).
    pub(super) fn unsynced(&self) -> Self {
        Self { faults: self.faults.clone(), unsynced: true }
    }

    fn call<T>(
        &self,
        doing: &'static str,
        path: &Path,
        act: impl FnOnce() -> io::Result<T>,
    ) -> Done<T> {
        if let Some(faults) = &self.faults
            && faults.fail.contains(&(faults.calls.fetch_add(1, Ordering::Relaxed) + 1))
        {
            let injected = io::Error::new(faults.kind, format!("{} (injected)", faults.kind));
            return Err(StoreError::from_io(doing, path, injected));
        }
        act().map_err(|e| StoreError::from_io(doing, path, e))
    }

    /// Makes a directory and its parents.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn create_dir_all(&self, path: &Path) -> Done<()> {
        if path.is_dir() {
            return Ok(());
        }
        self.call("making", path, || std::fs::create_dir_all(path))
    }

    /// Does something that makes a file or folder, after making the directory that it is in where
    /// there is none.
    pub(super) fn within<T>(&self, dir: &Path, mut make: impl FnMut() -> Done<T>) -> Done<T> {
        match make() {
            Err(StoreError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                self.create_dir_all(dir)?;
                make()
            }
            done => done,
        }
    }

    /// Makes a directory; `false` if something is there already.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn create_new_dir(&self, path: &Path) -> Done<bool> {
        self.call("making", path, || match std::fs::create_dir(path) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            Err(e) => Err(e),
        })
    }

    /// Writes a new file and, unless this disk is [unsynced](super::Store::unsynced), brings it to
    /// the disk.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn write_new(&self, path: &Path, bytes: &[u8]) -> Done<()> {
        let mut file = self
            .call("making", path, || OpenOptions::new().write(true).create_new(true).open(path))?;
        self.call("writing", path, || file.write_all(bytes))?;
        if self.unsynced {
            return Ok(());
        }
        self.call("syncing", path, || file.sync_all())
    }

    /// Like [`Disk::write_new`], but `false` if something is there already; leaves nothing behind
    /// if it fails.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn write_if_new(&self, path: &Path, bytes: &[u8]) -> Done<bool> {
        match self.write_new(path, bytes) {
            Ok(()) => Ok(true),
            Err(StoreError::Io { source, .. }) if source.kind() == io::ErrorKind::AlreadyExists => {
                Ok(false)
            }
            Err(e) => {
                let _ = std::fs::remove_file(path);
                Err(e)
            }
        }
    }

    /// Copies a file's content to a new file.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn copy(&self, from: &Path, to: &Path) -> Done<()> {
        self.call("copying to", to, || {
            let source = File::open(from)?;
            let target = OpenOptions::new().write(true).create_new(true).open(to)?;
            clone_or_copy(&source, &target)
        })
    }

    /// Brings a file's content, or a directory's names, to the disk; an
    /// [unsynced](super::Store::unsynced) one does nothing.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn sync(&self, path: &Path) -> Done<()> {
        if self.unsynced {
            return Ok(());
        }
        self.call("syncing", path, || File::open(path)?.sync_all())
    }

    /// Sets permission bits.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn set_mode(&self, path: &Path, mode: u32) -> Done<()> {
        self.call("protecting", path, || {
            std::fs::set_permissions(path, Permissions::from_mode(mode))
        })
    }

    /// Renames within one file system; replaces what is there.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn rename(&self, from: &Path, to: &Path) -> Done<()> {
        self.call("renaming to", to, || std::fs::rename(from, to))
    }

    /// Makes a symbolic link.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn symlink(&self, target: &Path, link: &Path) -> Done<()> {
        self.call("linking", link, || std::os::unix::fs::symlink(target, link))
    }

    /// Opens a file for appending, made with its folder if need be.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn open_append(&self, path: &Path) -> Done<File> {
        self.within(path.parent().unwrap_or(path), || {
            self.call("opening", path, || {
                OpenOptions::new().append(true).create(true).mode(0o644).open(path)
            })
        })
    }

    /// Appends in one write, so that lines of several writers do not mix.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn append(&self, file: &mut File, bytes: &[u8], path: &Path) -> Done<()> {
        self.call("appending to", path, || file.write_all(bytes))
    }

    /// Removes a file or link; fine if there is none.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn remove_file(&self, path: &Path) -> Done<()> {
        self.call("removing", path, || match std::fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        })
    }

    /// Removes a directory and what is in it, folders that may not be written included; fine if
    /// there is none.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn remove_dir_all(&self, path: &Path) -> Done<()> {
        self.call("removing", path, || match folder::remove(path) {
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
                open_folders(path)?;
                folder::remove(path)
            }
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        })
    }

    /// Takes what is in a folder out of it but for the folders, which are returned, each by its
    /// path. Some of it may go to another folder, made if need be, to be removed later.
    ///
    /// # Errors
    /// When the disk refuses, or the folder or one in it does not look like this. Then part of it
    /// may be gone.
    pub fn vacate(&self, path: &Path, look: &Look, to: &Path) -> Done<BTreeSet<PathBuf>> {
        self.create_dir_all(to)?;
        self.call("emptying", path, || folder::vacate(path, look, SMALL, to))
    }

    /// Refuses to go on where nothing more can be written: a program that cannot write its output
    /// to the end need not say so, and what is cut short must not be taken for its result.
    ///
    /// # Errors
    /// When next to no room is left at this path.
    pub fn room(&self, path: &Path) -> Done<()> {
        self.call("writing", path, || {
            let Ok(disk) = rustix::fs::statvfs(path) else { return Ok(()) };
            // Some blocks are for the superuser alone.
            let own = rustix::process::geteuid().is_root();
            let blocks = if own { disk.f_bfree } else { disk.f_bavail };
            let (files, left) = (disk.f_files, if own { disk.f_ffree } else { disk.f_favail });
            let full = disk.f_blocks > 0 && blocks.saturating_mul(disk.f_frsize) < LITTLE;
            // A system that makes room for names as they come says that it has none.
            if full || files > 0 && left == 0 {
                let message = "next to nothing is left, so that what was written may be cut short";
                return Err(io::Error::new(io::ErrorKind::StorageFull, message));
            }
            Ok(())
        })
    }

    /// Lets the owner write into a directory and all folders below it; links are not followed.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn open_folders(&self, path: &Path) -> Done<()> {
        self.call("opening", path, || open_folders(path))
    }
}

fn open_folders(dir: &Path) -> io::Result<()> {
    const OWNER: u32 = 0o700;
    let meta = std::fs::symlink_metadata(dir)?;
    let mode = meta.permissions().mode();
    if mode & OWNER != OWNER {
        std::fs::set_permissions(dir, Permissions::from_mode(mode | OWNER))?;
    }
    // Where folders are counted, its own name and its `.` are all that lead to it.
    if meta.nlink() == 2 {
        return Ok(());
    }
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            open_folders(&entry.path())?;
        }
    }
    Ok(())
}

/// Shares the blocks where the file system can, else copies the bytes.
fn clone_or_copy(source: &File, target: &File) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    if rustix::fs::ioctl_ficlone(target, source).is_ok() {
        return Ok(());
    }
    let (mut from, mut to) = (source, target);
    io::copy(&mut from, &mut to).map(|_| ())
}

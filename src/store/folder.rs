//! Folders as they are measured and removed. The C library reads each through 32 KiB of its own;
//! the half dozen folders of a trivial attempt are read from the system itself, where it lets one.

use std::ffi::OsString;
use std::io;
use std::path::Path;

use super::FileState;

/// The states of what is directly in a folder (or behind a link to one), by name, sorted; of links
/// in it their own. None of what cannot be read.
pub fn states_in(dir: &Path) -> Vec<(OsString, FileState)> {
    #[cfg(target_os = "linux")]
    let mut found = raw::states(dir).unwrap_or_default();
    #[cfg(not(target_os = "linux"))]
    let mut found: Vec<_> = {
        let state = |entry: std::fs::DirEntry| {
            Some((entry.file_name(), FileState::of(&entry.metadata().ok()?)))
        };
        std::fs::read_dir(dir).into_iter().flatten().flatten().filter_map(state).collect()
    };
    found.sort_unstable();
    found
}

/// Whether all that is in a folder has no more bytes than these; every item counts for some.
pub fn is_within(dir: &Path, bytes: u64) -> bool {
    let mut left = bytes;
    within(dir, &mut left)
}

/// What an item takes beside its bytes.
const ITEM: u64 = 256;

fn take(left: &mut u64, size: u64) -> bool {
    let fits = left.checked_sub(size.saturating_add(ITEM));
    *left = fits.unwrap_or(0);
    fits.is_some()
}

#[cfg(target_os = "linux")]
fn within(dir: &Path, left: &mut u64) -> bool {
    let opened = raw::open(rustix::fs::CWD, dir);
    opened.is_ok_and(|dir| raw::within(&dir, left).unwrap_or(false))
}

#[cfg(not(target_os = "linux"))]
fn within(dir: &Path, left: &mut u64) -> bool {
    let Ok(entries) = std::fs::read_dir(dir) else { return false };
    entries.flatten().all(|entry| {
        let ty = entry.file_type().ok();
        let (is_dir, is_file) = (ty.is_some_and(|t| t.is_dir()), ty.is_some_and(|t| t.is_file()));
        let size = if is_file { entry.metadata().map_or(u64::MAX, |meta| meta.len()) } else { 0 };
        take(left, size) && (!is_dir || within(&entry.path(), left))
    })
}

/// Removes a folder and all that is in it; links are not followed.
pub(super) fn remove(dir: &Path) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    if raw::remove(rustix::fs::CWD, dir).is_ok() {
        return Ok(());
    }
    // With what is left, and its word for what is wrong.
    std::fs::remove_dir_all(dir)
}

#[cfg(target_os = "linux")]
mod raw {
    use std::ffi::{CString, OsString};
    use std::mem::MaybeUninit;
    use std::os::fd::{AsFd, OwnedFd};
    use std::os::unix::ffi::OsStringExt as _;
    use std::path::Path;

    use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir, openat, statat, unlinkat};
    use rustix::io::{Errno, Result};
    use rustix::path::Arg;

    use super::FileState;

    const FOLDER: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

    pub(super) fn open(at: impl AsFd, name: impl Arg) -> Result<OwnedFd> {
        openat(at, name, FOLDER | OFlags::NOFOLLOW, Mode::empty())
    }

    /// What is in a folder, all of it read before any of it goes.
    fn items(dir: &OwnedFd) -> Result<Vec<(CString, FileType)>> {
        let mut buffer = [MaybeUninit::uninit(); 2048];
        let (mut entries, mut items) = (RawDir::new(dir, &mut buffer), Vec::new());
        while let Some(entry) = entries.next() {
            let entry = entry?;
            if ![c".", c".."].contains(&entry.file_name()) {
                items.push((entry.file_name().to_owned(), entry.file_type()));
            }
        }
        Ok(items)
    }

    pub(super) fn states(dir: &Path) -> Result<Vec<(OsString, FileState)>> {
        let dir = openat(rustix::fs::CWD, dir, FOLDER, Mode::empty())?;
        let state = |(name, _): (CString, FileType)| {
            let stat = statat(&dir, &name, AtFlags::SYMLINK_NOFOLLOW).ok()?;
            Some((OsString::from_vec(name.into_bytes()), FileState::of_stat(&stat)))
        };
        Ok(items(&dir)?.into_iter().filter_map(state).collect())
    }

    pub(super) fn within(dir: &OwnedFd, left: &mut u64) -> Result<bool> {
        for (name, ty) in items(dir)? {
            let stat = match ty {
                FileType::Directory | FileType::Symlink => None,
                _ => Some(statat(dir, &name, AtFlags::SYMLINK_NOFOLLOW)?),
            };
            let size = stat.map_or(0, |stat| u64::try_from(stat.st_size).unwrap_or(u64::MAX));
            let ty = stat.map_or(ty, |stat| FileType::from_raw_mode(stat.st_mode));
            let fits = super::take(left, if ty.is_dir() { 0 } else { size })
                && (!ty.is_dir() || within(&open(dir, &name)?, left)?);
            if !fits {
                return Ok(false);
            }
        }
        Ok(true)
    }

    pub(super) fn remove(at: impl AsFd + Copy, name: impl Arg + Copy) -> Result<()> {
        let dir = open(at, name)?;
        for (name, ty) in items(&dir)? {
            let gone = match ty {
                FileType::Directory => Err(Errno::ISDIR),
                _ => unlinkat(&dir, &name, AtFlags::empty()),
            };
            match gone {
                Err(Errno::ISDIR) => remove(dir.as_fd(), &name)?,
                gone => gone?,
            }
        }
        unlinkat(at, name, AtFlags::REMOVEDIR)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn folders_are_measured_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let (root, other) = (dir.path().join("root"), dir.path().join("other"));
        fs::create_dir_all(root.join("a/b")).unwrap();
        fs::create_dir_all(&other).unwrap();
        fs::write(other.join("kept"), "x").unwrap();
        for i in 0..200 {
            fs::write(root.join(format!("a/b/a name of some length {i}")), [0; 100]).unwrap();
        }
        symlink(&other, root.join("a/link")).unwrap();
        // 203 items, 20,000 bytes.
        let bytes = 203 * ITEM + 20_000;
        assert!(is_within(&root, bytes) && !is_within(&root, bytes - 1));
        assert!(!is_within(&dir.path().join("none"), bytes));
        let states = states_in(&root.join("a"));
        assert_eq!(states.iter().map(|(name, _)| name).collect::<Vec<_>>(), ["b", "link"]);
        assert_eq!(states[0].1, FileState::of(&fs::metadata(root.join("a/b")).unwrap()));
        assert_eq!(states_in(&root.join("a/link")).len(), 1);
        remove(&root).unwrap();
        assert!(!root.exists() && other.join("kept").exists());
        assert_eq!(remove(&root).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}

//! Folders as they are measured and removed. The C library reads each through 32 KiB of its own;
//! the half dozen folders of a trivial attempt are read from the system itself, where it lets one.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

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

/// What a folder is beside its content: who comes to work in one after others must find it as a new
/// one is.
#[derive(Debug, PartialEq, Eq)]
pub struct Look {
    device: u64,
    owner: (u32, u32),
    mode: u32,
    /// As `chattr` shows them, where the file system has such.
    flags: Option<u32>,
}

impl Look {
    /// That of a new folder; none where folders cannot be told by it.
    pub fn of(dir: &Path) -> Option<Self> {
        #[cfg(target_os = "linux")]
        return raw::look(&raw::open(rustix::fs::CWD, dir).ok()?).ok();
        #[cfg(not(target_os = "linux"))]
        return None.filter(|_: &Self| dir.is_dir());
    }
}

/// Takes what is in a folder out of it but for the folders, which are returned, each by its path.
/// The first bytes go to another folder, what is more is removed. Fails, in the midst of it, if the
/// folder or one in it does not look like this, or is in use by another file system.
pub(super) fn vacate(
    dir: &Path,
    look: &Look,
    bytes: u64,
    to: &Path,
) -> io::Result<BTreeSet<PathBuf>> {
    #[cfg(target_os = "linux")]
    {
        let (root, to) = (raw::open(rustix::fs::CWD, dir)?, raw::open(rustix::fs::CWD, to)?);
        let mut vacate = raw::Vacate { look, to, left: bytes, folders: BTreeSet::new() };
        vacate.folder(&root, dir)?;
        Ok(vacate.folders)
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = (dir, look, bytes, to);
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Has a file system put the folders in this one where there is most room for each. One that puts
/// them side by side (ext4, elsewhere than at its top) makes new files slowly where many have been
/// removed in the last minutes: it looks at all of those first. Only a hint, and where it is not
/// understood it is not needed.
pub fn spread(dir: &Path) {
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};
        let spread = || {
            let dir = std::fs::File::open(dir).ok()?;
            let flags = ioctl_getflags(&dir).ok()?;
            let new = !flags.contains(IFlags::TOPDIR);
            new.then(|| ioctl_setflags(&dir, flags | IFlags::TOPDIR).ok()).flatten()
        };
        let _ = spread();
    }
    #[cfg(not(target_os = "linux"))]
    let _ = dir;
}

#[cfg(target_os = "linux")]
mod raw {
    use std::collections::BTreeSet;
    use std::ffi::{CString, OsStr, OsString};
    use std::mem::MaybeUninit;
    use std::os::fd::{AsFd, OwnedFd};
    use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
    use std::path::{Path, PathBuf};

    use rustix::fs::{
        AtFlags, FileType, Mode, OFlags, RawDir, flistxattr_query, fstat, ioctl_getflags, openat,
        renameat, statat, unlinkat,
    };
    use rustix::io::{Errno, Result};
    use rustix::path::Arg;

    use super::{FileState, Look};
    use crate::store::unique;

    const FOLDER: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

    pub(super) fn open(at: impl AsFd, name: impl Arg) -> Result<OwnedFd> {
        openat(at, name, FOLDER | OFlags::NOFOLLOW, Mode::empty())
    }

    /// What is in a folder, with the numbers that stand in it, all read before any of it goes.
    fn items(dir: &OwnedFd) -> Result<Vec<(CString, FileType, u64)>> {
        let mut buffer = [MaybeUninit::uninit(); 2048];
        let (mut entries, mut items) = (RawDir::new(dir, &mut buffer), Vec::new());
        while let Some(entry) = entries.next() {
            let entry = entry?;
            if ![c".", c".."].contains(&entry.file_name()) {
                items.push((entry.file_name().to_owned(), entry.file_type(), entry.ino()));
            }
        }
        Ok(items)
    }

    pub(super) fn states(dir: &Path) -> Result<Vec<(OsString, FileState)>> {
        let dir = openat(rustix::fs::CWD, dir, FOLDER, Mode::empty())?;
        let state = |(name, ..): (CString, FileType, u64)| {
            let stat = statat(&dir, &name, AtFlags::SYMLINK_NOFOLLOW).ok()?;
            Some((OsString::from_vec(name.into_bytes()), FileState::of_stat(&stat)))
        };
        Ok(items(&dir)?.into_iter().filter_map(state).collect())
    }

    pub(super) fn within(dir: &OwnedFd, left: &mut u64) -> Result<bool> {
        for (name, ty, _) in items(dir)? {
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

    /// The look of a folder. There is none of one with attributes, such as rights that its content
    /// inherits.
    pub(super) fn look(dir: &OwnedFd) -> Result<Look> {
        if flistxattr_query(dir)? > 0 {
            return Err(Errno::NOTSUP);
        }
        let stat = fstat(dir)?;
        let (device, owner, mode) = (stat.st_dev, (stat.st_uid, stat.st_gid), stat.st_mode);
        let flags = ioctl_getflags(dir).ok().map(|flags| flags.bits());
        Ok(Look { device, owner, mode, flags })
    }

    pub(super) struct Vacate<'a> {
        pub(super) look: &'a Look,
        pub(super) to: OwnedFd,
        pub(super) left: u64,
        pub(super) folders: BTreeSet<PathBuf>,
    }

    impl Vacate<'_> {
        pub(super) fn folder(&mut self, dir: &OwnedFd, path: &Path) -> Result<()> {
            if look(dir)? != *self.look {
                return Err(Errno::NOTSUP);
            }
            for (name, ty, listed) in items(dir)? {
                if !ty.is_dir() {
                    let stat = statat(dir, &name, AtFlags::SYMLINK_NOFOLLOW)?;
                    let size = u64::try_from(stat.st_size).unwrap_or(u64::MAX);
                    match super::take(&mut self.left, size) {
                        true => renameat(dir, &name, &self.to, unique())?,
                        false => unlinkat(dir, &name, AtFlags::empty())?,
                    }
                    continue;
                }
                let (inner, path) =
                    (open(dir, &name)?, path.join(OsStr::from_bytes(name.as_bytes())));
                // Another number is that of what is mounted there.
                if fstat(&inner)?.st_ino != listed {
                    return Err(Errno::BUSY);
                }
                self.folder(&inner, &path)?;
                self.folders.insert(path);
            }
            Ok(())
        }
    }

    pub(super) fn remove(at: impl AsFd + Copy, name: impl Arg + Copy) -> Result<()> {
        let dir = open(at, name)?;
        for (name, ty, _) in items(&dir)? {
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

    #[cfg(target_os = "linux")]
    #[test]
    fn only_folders_as_new_ones_are_left() {
        use std::os::unix::fs::PermissionsExt as _;
        let temp = tempfile::tempdir().unwrap();
        let (dir, rest) = (temp.path().join("dir"), temp.path().join("rest"));
        fs::create_dir(&dir).unwrap();
        fs::create_dir(&rest).unwrap();
        let look = Look::of(&dir).unwrap();
        let fill = |sizes: &[usize]| {
            fs::create_dir_all(dir.join("a/b")).unwrap();
            for (i, size) in sizes.iter().enumerate() {
                fs::write(dir.join(format!("a/f{i}")), vec![0; *size]).unwrap();
            }
            symlink("f0", dir.join("a/link")).unwrap();
        };
        fill(&[10, 20, 5_000]);
        let left = vacate(&dir, &look, 2_000, &rest).unwrap();
        assert_eq!(left, BTreeSet::from([dir.join("a"), dir.join("a/b")]));
        assert!(states_in(&dir.join("a")).iter().all(|(name, _)| name == "b"));
        // What took more room than it may did not wait.
        let sizes = fs::read_dir(&rest).unwrap().map(|e| e.unwrap().metadata().unwrap().len());
        assert!(sizes.max() < Some(5_000));
        fill(&[1]);
        fs::set_permissions(dir.join("a/b"), fs::Permissions::from_mode(0o711)).unwrap();
        assert!(vacate(&dir, &look, 2_000, &rest).is_err());
    }
}

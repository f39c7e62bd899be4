//! The stat table: digests of files that have not changed, so that they are not read again.
//!
//! One append-only file per host (device and inode numbers mean nothing elsewhere). Each line
//! ends in a check sum, so torn lines of concurrent writers drop out. Only an accelerator: it is
//! never an error, and may be deleted at any time.

use std::collections::BTreeMap;
use std::fs::Metadata;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::Store;
use crate::digest::Digest;

/// A file that changed this shortly before it was hashed may change again within the same clock
/// tick of its file system, and look the same.
const RACY: Duration = Duration::from_secs(2);

/// Larger tables are rewritten without what is said twice.
const COMPACT_BYTES: u64 = 16 << 20;

/// What identifies a state of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct FileState {
    dev: u64,
    ino: u64,
    size: u64,
    mtime_ns: i64,
    ctime_ns: i64,
}

impl FileState {
    /// The state that metadata (of the file behind any link) shows.
    pub fn of(meta: &Metadata) -> Self {
        let ns = |s: i64, ns: i64| s.saturating_mul(1_000_000_000).saturating_add(ns);
        Self {
            dev: meta.dev(),
            ino: meta.ino(),
            size: meta.size(),
            mtime_ns: ns(meta.mtime(), meta.mtime_nsec()),
            ctime_ns: ns(meta.ctime(), meta.ctime_nsec()),
        }
    }

    /// The state that the system's own record of a file shows.
    #[cfg(target_os = "linux")]
    pub(super) fn of_stat(stat: &rustix::fs::Stat) -> Self {
        let nanos = |nanos: u64| i64::try_from(nanos).unwrap_or(0);
        let ns = |s: i64, ns: i64| s.saturating_mul(1_000_000_000).saturating_add(ns);
        Self {
            dev: stat.st_dev,
            ino: stat.st_ino,
            size: u64::try_from(stat.st_size).unwrap_or(0),
            mtime_ns: ns(stat.st_mtime, nanos(stat.st_mtime_nsec)),
            ctime_ns: ns(stat.st_ctime, nanos(stat.st_ctime_nsec)),
        }
    }

    /// Whether it was two seconds old at a time: a younger file may change again within the same
    /// clock tick of its file system, and look the same.
    pub fn settled(&self, now: SystemTime) -> bool {
        let limit = now.checked_sub(RACY).and_then(|t| t.duration_since(UNIX_EPOCH).ok());
        let limit = limit.map_or(0, |d| i64::try_from(d.as_nanos()).unwrap_or(0));
        self.mtime_ns <= limit && self.ctime_ns <= limit
    }

    fn line(&self, digest: &Digest) -> String {
        let Self { dev, ino, size, mtime_ns, ctime_ns } = self;
        let body = format!("{dev} {ino} {size} {mtime_ns} {ctime_ns} {digest}");
        format!("{body} {}\n", Digest::of(body.as_bytes()).short())
    }

    fn parse(line: &str) -> Option<(Self, Digest)> {
        let (body, check) = line.rsplit_once(' ')?;
        if Digest::of(body.as_bytes()).short() != check {
            return None;
        }
        let mut words = body.split(' ');
        let state = Self {
            dev: words.next()?.parse().ok()?,
            ino: words.next()?.parse().ok()?,
            size: words.next()?.parse().ok()?,
            mtime_ns: words.next()?.parse().ok()?,
            ctime_ns: words.next()?.parse().ok()?,
        };
        Some((state, words.next()?.parse().ok()?))
    }
}

/// States of a file or of all files of a folder, by path below it.
pub type States = BTreeMap<PathBuf, FileState>;

/// Digests by state of file.
#[derive(Debug)]
pub(super) struct StatTable {
    path: PathBuf,
    known: Mutex<Option<BTreeMap<FileState, Digest>>>,
}

impl StatTable {
    pub(super) fn new(dir: &Path) -> Self {
        let host = rustix::system::uname();
        let host = Digest::of(host.nodename().to_bytes()).short();
        Self { path: dir.join(host), known: Mutex::new(None) }
    }

    fn load(&self) -> BTreeMap<FileState, Digest> {
        let Ok(text) = std::fs::read(&self.path) else { return BTreeMap::new() };
        let lines = text.split(|&b| b == b'\n').filter_map(|l| std::str::from_utf8(l).ok());
        let known: BTreeMap<FileState, Digest> = lines.filter_map(FileState::parse).collect();
        if text.len() as u64 > COMPACT_BYTES && known.len() * 150 * 2 < text.len() {
            let lines: String = known.iter().map(|(state, digest)| state.line(digest)).collect();
            let temp = self.path.with_extension(super::unique());
            let _ = std::fs::write(&temp, lines).and_then(|()| std::fs::rename(&temp, &self.path));
        }
        known
    }

    fn get(&self, state: &FileState) -> Option<Digest> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.get_or_insert_with(|| self.load()).get(state).copied()
    }

    fn put(&self, state: FileState, digest: Digest) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.get_or_insert_with(|| self.load()).insert(state, digest);
        let append = || -> io::Result<()> {
            if let Some(dir) = self.path.parent() {
                std::fs::create_dir_all(dir)?;
            }
            let mut file =
                std::fs::OpenOptions::new().append(true).create(true).open(&self.path)?;
            // A line that another writer tore is ended first.
            file.write_all(format!("\n{}", state.line(&digest)).as_bytes())
        };
        // Only an accelerator: what cannot be kept is hashed again.
        let _ = append();
    }
}

impl Store {
    /// The content of a file as a digest, from the stat table where the file has not changed.
    ///
    /// # Errors
    /// When it cannot be read, or changes while it is read.
    pub fn digest_of_file(&self, path: &Path) -> anyhow::Result<(Digest, u64)> {
        let read = |e| super::StoreError::from_io("reading", path, e);
        for _ in 0..3 {
            let before = FileState::of(&std::fs::metadata(path).map_err(read)?);
            if let Some(digest) = self.stat.get(&before) {
                return Ok((digest, before.size));
            }
            let now = SystemTime::now();
            let (digest, size) = Digest::of_file(path).map_err(read)?;
            let after = FileState::of(&std::fs::metadata(path).map_err(read)?);
            if before == after && size == before.size {
                if before.settled(now) {
                    self.stat.put(before, digest);
                }
                return Ok((digest, size));
            }
        }
        anyhow::bail!("{} keeps changing while it is read", path.display())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn age(path: &Path, seconds: u64) {
        let time = SystemTime::now() - Duration::from_secs(seconds);
        std::fs::File::options().append(true).open(path).unwrap().set_modified(time).unwrap();
    }

    #[test]
    fn torn_lines_drop_out() {
        let state = FileState { dev: 1, ino: 2, size: 3, mtime_ns: 4, ctime_ns: -5 };
        let line = state.line(&Digest::of(b"x"));
        assert_eq!(FileState::parse(line.trim_end()), Some((state, Digest::of(b"x"))));
        assert_eq!(FileState::parse(&line[..line.len() - 3]), None);
        assert_eq!(FileState::parse(&line.replacen('1', "7", 1)), None);
    }

    #[test]
    fn fresh_files_are_hashed_again() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("s")).unwrap();
        let path = dir.path().join("a");
        std::fs::write(&path, "one").unwrap();
        let first = store.digest_of_file(&path).unwrap().0;
        // The same size within the same tick: only a hash can tell.
        let time = std::fs::metadata(&path).unwrap().modified().unwrap();
        std::fs::write(&path, "two").unwrap();
        std::fs::File::options().append(true).open(&path).unwrap().set_modified(time).unwrap();
        assert_ne!(store.digest_of_file(&path).unwrap().0, first);
    }

    #[test]
    fn a_settled_file_is_read_once() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("s")).unwrap();
        let path = dir.path().join("a");
        std::fs::write(&path, "one").unwrap();
        age(&path, 60);
        let state = FileState::of(&std::fs::metadata(&path).unwrap());
        // ctime is now, which is not settled: it may be edited and its mtime set back.
        assert!(!state.settled(SystemTime::now()));
        assert!(state.settled(SystemTime::now() + Duration::from_secs(3)));
        store.stat.put(state, Digest::of(b"known"));
        assert_eq!(store.digest_of_file(&path).unwrap().0, Digest::of(b"known"));
        let again = Store::open(&dir.path().join("s")).unwrap();
        assert_eq!(again.digest_of_file(&path).unwrap().0, Digest::of(b"known"));
        std::fs::remove_dir_all(dir.path().join("s/stat")).unwrap();
        let again = Store::open(&dir.path().join("s")).unwrap();
        assert_eq!(again.digest_of_file(&path).unwrap().0, Digest::of(b"one"));
    }
}

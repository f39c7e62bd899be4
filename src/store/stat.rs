//! The stat table: digests of files that have not changed, so that they are not read again.
//!
//! One append-only file per host (device and inode numbers mean nothing elsewhere). Each line
//! ends in a check sum, so torn lines of concurrent writers drop out. Only an accelerator: it is
//! never an error, and may be deleted at any time.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::Metadata;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rayon::prelude::*;
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

/// The digest of named states, by which they are compared where there may be millions.
pub fn digest_of_states<'a, N: AsRef<OsStr>>(
    states: impl IntoIterator<Item = (N, &'a FileState)>,
) -> Digest {
    // Many small pieces cost more one by one.
    const ENOUGH: usize = 32 << 10;
    let (mut hasher, mut bytes) = (blake3::Hasher::new(), Vec::with_capacity(4 << 10));
    for (name, FileState { dev, ino, size, mtime_ns, ctime_ns }) in states {
        let name = name.as_ref().as_encoded_bytes();
        bytes.extend_from_slice(&(name.len() as u64).to_le_bytes());
        bytes.extend_from_slice(name);
        for number in [*dev, *ino, *size, mtime_ns.cast_unsigned(), ctime_ns.cast_unsigned()] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        if bytes.len() >= ENOUGH {
            hasher.update(&bytes);
            bytes.clear();
        }
    }
    hasher.update(&bytes);
    Digest::from_bytes(*hasher.finalize().as_bytes())
}

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

    fn put(&self, new: &[(FileState, Digest)]) {
        if new.is_empty() {
            return;
        }
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.get_or_insert_with(|| self.load()).extend(new.iter().copied());
        // A line that another writer tore is ended first.
        let mut lines = String::from("\n");
        lines.extend(new.iter().map(|(state, digest)| state.line(digest)));
        let append = || -> io::Result<()> {
            if let Some(dir) = self.path.parent() {
                std::fs::create_dir_all(dir)?;
            }
            let mut file =
                std::fs::OpenOptions::new().append(true).create(true).open(&self.path)?;
            file.write_all(lines.as_bytes())
        };
        // Only an accelerator: what cannot be kept is hashed again.
        let _ = append();
    }
}

/// The content of a file.
struct Hashed {
    digest: Digest,
    size: u64,
    /// The state to know it by, if that is worth keeping in mind.
    new: Option<FileState>,
}

impl Store {
    /// The content of a file as a digest, from the stat table where the file has not changed.
    ///
    /// # Errors
    /// When it cannot be read, or changes while it is read.
    pub fn digest_of_file(&self, path: &Path) -> anyhow::Result<(Digest, u64)> {
        let Hashed { digest, size, new } = self.hashed(path)?;
        self.stat.put(new.map(|state| (state, digest)).as_slice());
        Ok((digest, size))
    }

    /// The same of several files in a folder. As many as a folder of data may hold are read by
    /// several threads, and kept in mind together.
    pub(super) fn digests_of_files<'a>(
        &self,
        folder: &Path,
        paths: impl ExactSizeIterator<Item = &'a str>,
    ) -> anyhow::Result<Vec<(Digest, u64)>> {
        const MANY: usize = 256;
        let hashed: Vec<Hashed> = if paths.len() < MANY {
            paths.map(|path| self.hashed(&folder.join(path))).collect::<anyhow::Result<_>>()?
        } else {
            let paths: Vec<&str> = paths.collect();
            let hashed = paths.par_iter().map(|path| self.hashed(&folder.join(path)));
            hashed.collect::<anyhow::Result<_>>()?
        };
        let new = hashed.iter().filter_map(|hashed| Some((hashed.new?, hashed.digest)));
        self.stat.put(&new.collect::<Vec<_>>());
        Ok(hashed.into_iter().map(|Hashed { digest, size, .. }| (digest, size)).collect())
    }

    fn hashed(&self, path: &Path) -> anyhow::Result<Hashed> {
        let read = |e| super::StoreError::from_io("reading", path, e);
        for _ in 0..3 {
            let before = FileState::of(&std::fs::metadata(path).map_err(read)?);
            if let Some(digest) = self.stat.get(&before) {
                return Ok(Hashed { digest, size: before.size, new: None });
            }
            let now = SystemTime::now();
            let (digest, size) = Digest::of_file(path).map_err(read)?;
            let after = FileState::of(&std::fs::metadata(path).map_err(read)?);
            if before == after && size == before.size {
                let new = before.settled(now).then_some(before);
                return Ok(Hashed { digest, size, new });
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
    fn states_differ_where_any_number_or_path_does() {
        let state = FileState { dev: 1, ino: 2, size: 3, mtime_ns: 4, ctime_ns: -5 };
        let states = |list: &[(&str, FileState)]| -> States {
            list.iter().map(|(path, state)| (PathBuf::from(path), *state)).collect()
        };
        let all = [
            states(&[]),
            states(&[("a", state)]),
            states(&[("b", state)]),
            states(&[("a", state), ("b", state)]),
            states(&[("a", FileState { dev: 2, ..state })]),
            states(&[("a", FileState { ino: 3, ..state })]),
            states(&[("a", FileState { size: 4, ..state })]),
            states(&[("a", FileState { mtime_ns: -4, ..state })]),
            states(&[("a", FileState { ctime_ns: 5, ..state })]),
        ];
        for (i, a) in all.iter().enumerate() {
            for (j, b) in all.iter().enumerate() {
                assert_eq!(i == j, digest_of_states(a) == digest_of_states(b), "{a:?} {b:?}");
            }
        }
    }

    #[test]
    fn many_files_are_hashed_together_and_known_afterwards() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("s")).unwrap();
        let names: Vec<String> = (0..400).map(|i| format!("d{}/f{i}", i % 7)).collect();
        for (i, name) in names.iter().enumerate() {
            let path = dir.path().join("in").join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, i.to_string()).unwrap();
        }
        let folder = dir.path().join("in");
        let tree = store.tree_of_path(&folder).unwrap();
        assert_eq!(tree.entries.len(), 400);
        for entry in &tree.entries {
            let text = std::fs::read(folder.join(&entry.path)).unwrap();
            assert_eq!((entry.digest, entry.size), (Digest::of(&text), text.len() as u64));
        }
        // What is kept in mind stands in for the bytes.
        let states = store.states(&folder).unwrap();
        let put: Vec<_> = states.values().map(|state| (*state, Digest::of(b"known"))).collect();
        store.stat.put(&put);
        let again = Store::open(&dir.path().join("s")).unwrap().tree_of_path(&folder).unwrap();
        assert!(again.entries.iter().all(|entry| entry.digest == Digest::of(b"known")));
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
        store.stat.put(&[(state, Digest::of(b"known"))]);
        assert_eq!(store.digest_of_file(&path).unwrap().0, Digest::of(b"known"));
        let again = Store::open(&dir.path().join("s")).unwrap();
        assert_eq!(again.digest_of_file(&path).unwrap().0, Digest::of(b"known"));
        std::fs::remove_dir_all(dir.path().join("s/stat")).unwrap();
        let again = Store::open(&dir.path().join("s")).unwrap();
        assert_eq!(again.digest_of_file(&path).unwrap().0, Digest::of(b"one"));
    }
}

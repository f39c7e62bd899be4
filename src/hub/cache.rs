//! The shared cache on disk. Only names that were checked become paths in it.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;

use super::{RepoFile, RepoType};
use crate::source::Fault;

/// Whether a text is so many lower-case hex digits.
pub(super) fn is_hex(text: &str, digits: usize) -> bool {
    let hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    text.len() == digits && text.bytes().all(hex)
}

/// Whether a text is a git commit.
pub(super) fn is_commit(text: &str) -> bool {
    is_hex(text, 40)
}

/// Refuses a relative path that would leave its folder or hide in it.
pub(super) fn check_path(path: &str) -> Result<()> {
    let odd = |part: &str| matches!(part, "" | "." | "..");
    let bad = path.split('/').any(odd) || path.contains(['\0', '\\']) || path.len() > 1024;
    ensure!(!bad, "`{path}` is not a path inside a repository");
    Ok(())
}

/// Refuses what is not `name` or `organisation/name`.
pub(super) fn check_repo(repo: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let part = |p: &str| !p.is_empty() && p.chars().all(plain) && p.chars().any(|c| c != '.');
    let good = repo.split('/').count() <= 2 && repo.split('/').all(part);
    if good && !repo.contains("--") && !repo.contains("..") {
        return Ok(());
    }
    let fault = Fault::new(format!("`{repo}` is not the name of a hub repository"));
    Err(fault.help("it is written `organisation/name`; a local path starts with `./`").into())
}

/// Opens a lock file, made with its folder if need be, and takes the lock; it falls with the
/// handle.
pub(super) fn take_lock(path: &Path) -> Result<File> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    }
    let file = OpenOptions::new().create(true).append(true).open(path);
    let file = file.with_context(|| format!("opening {}", path.display()))?;
    file.lock().with_context(|| format!("locking {}", path.display()))?;
    Ok(file)
}

/// Where one blob lies or will lie.
pub(super) struct Slot {
    pub(super) blob: PathBuf,
    pub(super) part: PathBuf,
    lock: PathBuf,
    seen: PathBuf,
}

#[derive(Debug)]
pub(super) struct Cache {
    root: PathBuf,
    hf: hf_hub::Cache,
}

impl Cache {
    pub(super) fn new(root: PathBuf) -> Self {
        Self { hf: hf_hub::Cache::new(root.clone()), root }
    }

    fn folder(ty: RepoType, repo: &str) -> String {
        hf_hub::Repo::new(repo.into(), ty.hf()).folder_name()
    }

    fn repo_dir(&self, ty: RepoType, repo: &str) -> PathBuf {
        self.root.join(Self::folder(ty, repo))
    }

    fn snapshot(&self, ty: RepoType, repo: &str, commit: &str) -> PathBuf {
        self.hf.repo(hf_hub::Repo::new(repo.into(), ty.hf())).pointer_path(commit)
    }

    /// A folder of our own in the cache.
    pub(super) fn own(&self, name: &str) -> PathBuf {
        self.root.join(".flow").join(name)
    }

    pub(super) fn read_ref(&self, ty: RepoType, repo: &str, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return self.snapshot(ty, repo, revision).is_dir().then(|| revision.to_owned());
        }
        let text = fs::read_to_string(self.repo_dir(ty, repo).join("refs").join(revision)).ok()?;
        Some(text.trim().to_owned()).filter(|c| is_commit(c))
    }

    pub(super) fn write_ref(
        &self,
        ty: RepoType,
        repo: &str,
        revision: &str,
        commit: &str,
    ) -> Result<()> {
        if revision == commit || self.read_ref(ty, repo, revision).as_deref() == Some(commit) {
            return Ok(());
        }
        write(&self.repo_dir(ty, repo).join("refs").join(revision), commit.as_bytes())
    }

    fn tree_path(&self, ty: RepoType, repo: &str, commit: &str) -> PathBuf {
        self.own("trees").join(Self::folder(ty, repo)).join(format!("{commit}.json"))
    }

    /// The list of files kept by [`Cache::write_tree`]; one that cannot be read is as good as
    /// none.
    pub(super) fn read_tree(
        &self,
        ty: RepoType,
        repo: &str,
        commit: &str,
    ) -> Option<Vec<RepoFile>> {
        let text = fs::read(self.tree_path(ty, repo, commit)).ok()?;
        let files: Vec<RepoFile> = serde_json::from_slice(&text).ok()?;
        files.iter().all(|f| super::check_file(f).is_ok()).then_some(files)
    }

    pub(super) fn write_tree(
        &self,
        ty: RepoType,
        repo: &str,
        commit: &str,
        files: &[RepoFile],
    ) -> Result<()> {
        write(&self.tree_path(ty, repo, commit), &serde_json::to_vec(files)?)
    }

    /// The list that Python's client keeps beside its snapshots (from version 1.22 on).
    pub(super) fn read_python_tree(
        &self,
        ty: RepoType,
        repo: &str,
        commit: &str,
    ) -> Option<Vec<RepoFile>> {
        #[derive(Deserialize)]
        struct Listed {
            size: u64,
            blob_id: String,
            lfs_sha256: Option<String>,
        }
        #[derive(Deserialize)]
        struct List {
            format_version: u32,
            files: BTreeMap<String, Listed>,
        }
        let path = self.repo_dir(ty, repo).join("trees").join(format!("{commit}.json"));
        let list: List = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
        let files = list.files.into_iter().map(|(path, f)| RepoFile {
            path,
            size: f.size,
            oid: f.blob_id,
            lfs_sha256: f.lfs_sha256,
        });
        let files: Vec<RepoFile> = files.collect();
        let good = files.iter().all(|f| super::check_file(f).is_ok());
        (list.format_version == 1 && good).then_some(files)
    }

    /// The folder of a snapshot, if there is one. What it holds may be a part of the repository.
    pub(super) fn has_snapshot(&self, ty: RepoType, repo: &str, commit: &str) -> Option<PathBuf> {
        Some(self.snapshot(ty, repo, commit)).filter(|path| path.is_dir())
    }

    pub(super) fn slot(&self, ty: RepoType, repo: &str, file: &RepoFile) -> Slot {
        let digest = file.digest();
        let folder = Self::folder(ty, repo);
        let blobs = self.root.join(&folder).join("blobs");
        Slot {
            blob: blobs.join(digest),
            part: blobs.join(format!("{digest}.incomplete")),
            lock: self.root.join(".locks").join(&folder).join(format!("{digest}.lock")),
            seen: self.own("checked").join(folder).join(digest),
        }
    }

    /// Whether the blob is there and is what its name says. A blob that has been checked is not
    /// read again while its inode, size and times stay as they were.
    pub(super) fn is_good(&self, slot: &Slot, file: &RepoFile) -> Result<bool> {
        let Ok(stat) = fs::metadata(&slot.blob) else {
            return Ok(false);
        };
        if stat.len() != file.size {
            return Ok(false);
        }
        let stamp = stamp(&stat);
        if fs::read_to_string(&slot.seen).is_ok_and(|seen| seen == stamp) {
            return Ok(true);
        }
        let expected = file.checksum();
        if expected.of_file(&slot.blob)? != expected {
            return Ok(false);
        }
        // Only saves time: a cache that cannot be written (shared, read-only) is still good.
        let _ = write(&slot.seen, stamp.as_bytes());
        Ok(true)
    }

    /// Takes the lock of a blob, as the Python client does; it falls with the handle.
    pub(super) fn lock(&self, slot: &Slot) -> Result<File> {
        if let Some(folder) = slot.blob.parent() {
            fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
        }
        take_lock(&slot.lock)
    }

    /// Makes a checked part the blob.
    pub(super) fn land(&self, slot: &Slot) -> Result<()> {
        fs::rename(&slot.part, &slot.blob)
            .with_context(|| format!("moving a download to {}", slot.blob.display()))?;
        let _ = write(&slot.seen, stamp(&fs::metadata(&slot.blob)?).as_bytes());
        Ok(())
    }

    /// The path of a file in the snapshot, made if need be. In a cache that cannot be written it
    /// is the blob's own path.
    pub(super) fn link(&self, ty: RepoType, repo: &str, commit: &str, file: &RepoFile) -> PathBuf {
        let path = self.snapshot(ty, repo, commit).join(&file.path);
        let up = "../".repeat(file.path.split('/').count() + 1);
        let target = PathBuf::from(format!("{up}blobs/{}", file.digest()));
        if fs::read_link(&path).is_ok_and(|to| to == target) {
            return path;
        }
        // two threads may link the same file at once
        static LINKS: AtomicU64 = AtomicU64::new(0);
        let (pid, n) = (std::process::id(), LINKS.fetch_add(1, Ordering::Relaxed));
        let linked = path.parent().map_or(Ok(()), |folder| {
            let temp = folder.join(format!(".{}.{pid}.{n}", file.digest()));
            fs::create_dir_all(folder)?;
            let _ = fs::remove_file(&temp);
            std::os::unix::fs::symlink(&target, &temp)?;
            fs::rename(&temp, &path)
        });
        if linked.is_ok() { path } else { self.slot(ty, repo, file).blob }
    }
}

fn stamp(stat: &fs::Metadata) -> String {
    let (dev, ino, size) = (stat.dev(), stat.ino(), stat.size());
    let times = (stat.mtime(), stat.mtime_nsec(), stat.ctime(), stat.ctime_nsec());
    format!("{dev} {ino} {size} {times:?}")
}

/// Writes a small file whole or not at all.
pub(super) fn write(path: &Path, content: &[u8]) -> Result<()> {
    let attempt = || -> std::io::Result<()> {
        let folder = path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(folder)?;
        // As any other file of a shared cache: the umask says who may read it.
        let mode = fs::Permissions::from_mode(0o666);
        let mut temp = tempfile::Builder::new().permissions(mode).tempfile_in(folder)?;
        temp.write_all(content)?;
        temp.persist(path).map_err(|e| e.error)?;
        Ok(())
    };
    attempt().with_context(|| format!("writing {}", path.display()))
}

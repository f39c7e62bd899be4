//! The content-addressed store: blobs and trees, published atomically, located by digest.
//!
//! ```text
//! objects/ab/cdef…      blobs, read-only, named by BLAKE3
//! trees/ab/cdef…        manifests: sorted (path, executable, digest, size); named by tree digest
//! origins/ab/cdef…      where a blob that is referenced, not copied, lies outside the store
//! records/ab/cdef….json one record per key (written by `lineage`)
//! differing             keys that gave other bytes when made again (written by `lineage`)
//! runs/<id>             one journal per run: a folder, or a file (written by `lineage`)
//! leases/<key>          kernel-released locks
//! checkpoints/<key>/    the newest checkpoint of a key without a result
//! unchanged/…           what runs that would do nothing are recognised by; may be deleted too
//! attempts/<name>/      private scratch of one attempt, removed after publishing
//! stat/…                digests by (dev, ino, size, mtime, ctime); may be deleted at any time
//! outputs/…             what was put at the places of outputs
//! quarantine/…          damaged objects and manifests, kept for inspection
//! tmp/…                 files on their way to `objects`
//! memos/<scope>.<pack>  parts of results below a step; may be deleted at any time
//! memo-uses/<key>       the packs of memos that a key's result was made of
//! pins/<name>           results that are never collected (written by `lineage`)
//! ```

mod checkpoint;
mod disk;
mod folder;
mod gc;
mod lease;
mod memo;
mod objects;
mod place;
mod stat;
mod tree;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use disk::{Disk, Faults, SMALL, StoreError};
pub use folder::{Look, is_within, spread, states_in};
pub use gc::Item;
pub use lease::{Holder, Lease, Spares, host};
pub use memo::Memos;
use stat::StatTable;
pub use stat::{FileState, States, digest_of_states};

use crate::digest::Digest;

/// One file of a [`Tree`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Relative path with `/`, never empty, absolute or with `..`.
    pub path: String,
    /// Digest of the content.
    pub digest: Digest,
    /// Bytes.
    pub size: u64,
    /// The executable bit.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub executable: bool,
}

/// A directory's content: entries sorted by path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tree {
    /// Sorted by path.
    pub entries: Vec<Entry>,
}

/// Where a blob lies that is referenced instead of copied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// Absolute path of the file now.
    pub path: PathBuf,
    /// Where it came from: `hub` repository, commit and path in it; absent for a local file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hub: Option<HubFile>,
}

/// A file of a hub repository at a commit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HubFile {
    /// `models`, `datasets` or `spaces`.
    pub repo_type: String,
    /// `org/name`.
    pub repo: String,
    /// 40 hex digits.
    pub commit: String,
    /// Path in the repository.
    pub path: String,
}

/// Begins the names of folders of attempts that are kept for inspection; other names begin with the
/// run's id and a dot.
pub const KEPT_ATTEMPT: &str = "kept-";

/// A handle on a store; cheap to clone.
#[derive(Debug, Clone)]
pub struct Store {
    root: Arc<PathBuf>,
    disk: Disk,
    stat: Arc<StatTable>,
}

impl Store {
    /// Opens a store, making its folders if there are none.
    ///
    /// # Errors
    /// When the folder cannot be made or written.
    pub fn open(root: &Path) -> anyhow::Result<Self> {
        Self::open_on(root, Disk::default())
    }

    /// Opens a store on a given disk (a faulty one, in tests).
    ///
    /// # Errors
    /// When the folder cannot be made or written.
    pub fn open_on(root: &Path, disk: Disk) -> anyhow::Result<Self> {
        if !root.is_dir() {
            disk.create_dir_all(root)?;
            spread(root);
        }
        for name in ["objects", "trees", "origins", "records", "runs", "leases", "attempts", "tmp"]
        {
            disk.create_dir_all(&root.join(name))?;
        }
        let root = root.canonicalize().map_err(|e| StoreError::from_io("opening", root, e))?;
        let stat = StatTable::new(&root.join("stat"));
        Ok(Self { root: Arc::new(root), disk, stat: Arc::new(stat) })
    }

    /// The same store, whose writes do not wait for the disk: the system brings them there within
    /// its usual half minute. A crash of the program loses none of them. A crash of the machine may
    /// lose some, but never shows a wrong one: an object of another size is a miss, one of other
    /// bytes is found when it is first read, and records and manifests carry their digests. For
    /// results that cost less to make than to sync.
    #[must_use]
    pub fn unsynced(&self) -> Self {
        Self { disk: self.disk.unsynced(), ..self.clone() }
    }

    /// The store's folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The disk that it writes.
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// Replaces a file's content, whole or not at all, and brings it to the disk. The file need
    /// not be in the store.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn write_atomic(&self, path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
        let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let temp = dir.join(format!(".{}.tmp", unique()));
        let written = self
            .disk
            .within(dir, || self.disk.write_new(&temp, bytes))
            .and_then(|()| self.disk.rename(&temp, path))
            .and_then(|()| self.disk.sync(dir));
        if written.is_err() {
            // Gone already if it was renamed; otherwise nobody will miss it.
            let _ = std::fs::remove_file(&temp);
        }
        written
    }

    /// Where a digest's file stands under one of the store's folders.
    fn place(&self, folder: &str, digest: &Digest) -> PathBuf {
        let hex = digest.to_string();
        self.root.join(folder).join(&hex[..2]).join(&hex[2..])
    }
}

/// A name that no other thread or process of this host uses now.
pub fn unique() -> String {
    use std::sync::atomic::{AtomicU64, Ordering};
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let nanos = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let nanos = nanos.map_or(0, |d| d.subsec_nanos());
    format!("{}-{}-{nanos}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

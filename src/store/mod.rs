//! The content-addressed store: blobs and trees, published atomically, located by digest.
//!
//! ```text
//! objects/ab/cdef…      blobs, read-only, named by BLAKE3
//! trees/ab/cdef…        manifests: sorted (path, executable, digest, size); named by tree digest
//! origins/ab/cdef…      where a blob that is referenced, not copied, lies outside the store
//! records/ab/cdef….json one record per key (written by `lineage`)
//! runs/<id>/            one journal per run (written by `lineage`)
//! leases/<key>          kernel-released locks
//! attempts/<name>/      private scratch of one attempt, removed after publishing
//! stat/…                digests by (dev, ino, size, mtime, ctime); may be deleted at any time
//! ```

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

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

/// A handle on a store; cheap to clone.
#[derive(Debug, Clone)]
pub struct Store {
    root: Arc<PathBuf>,
}

impl Store {
    /// Opens a store, making its folders if there are none.
    ///
    /// # Errors
    /// When the folder cannot be made or written.
    pub fn open(_root: &Path) -> anyhow::Result<Self> {
        todo!()
    }

    /// The store's folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The content of a file as a digest, from the stat table where the file has not changed.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn digest_of_file(&self, _path: &Path) -> anyhow::Result<(Digest, u64)> {
        todo!()
    }

    /// The digest of a tree (a directory's or a single file's content), from the stat table where
    /// nothing has changed. Symbolic links are followed; a single file gives a tree of one entry.
    ///
    /// # Errors
    /// When something in it cannot be read.
    pub fn tree_of_path(&self, _path: &Path) -> anyhow::Result<Tree> {
        todo!()
    }

    /// Imports a directory: every file becomes an object, the manifest is written last.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn publish_tree(&self, _dir: &Path) -> anyhow::Result<Digest> {
        todo!()
    }

    /// Imports a directory and, beside its files, entries whose bytes stay where they are.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn publish_tree_with(
        &self,
        _dir: &Path,
        _referenced: &[(Entry, Origin)],
    ) -> anyhow::Result<Digest> {
        todo!()
    }

    /// The manifest of a published tree, or `None` if the store has no such tree.
    ///
    /// # Errors
    /// When the manifest is unreadable or is not what its digest says.
    pub fn tree(&self, _digest: &Digest) -> anyhow::Result<Option<Tree>> {
        todo!()
    }

    /// A readable path of a blob: the object, else an origin that still has these bytes.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn locate(&self, _blob: &Digest) -> anyhow::Result<Option<PathBuf>> {
        todo!()
    }
}

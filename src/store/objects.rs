//! Blobs: objects of the store, and files outside it that are referenced.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Entry, Origin, Store, StoreError, unique};
use crate::digest::Digest;

/// A line of an `origins` file.
#[derive(Serialize, Deserialize)]
struct OriginLine {
    size: u64,
    #[serde(flatten)]
    origin: Origin,
}

/// Directories whose names are to be brought to the disk once, at the end.
pub(super) type Dirty = BTreeSet<PathBuf>;

impl Store {
    pub(super) fn object_path(&self, blob: &Digest) -> PathBuf {
        self.place("objects", blob)
    }

    /// Whether the object stands with this size. A damaged one (another size) is set aside.
    fn has_object(&self, blob: &Digest, size: u64) -> Result<bool, StoreError> {
        let path = self.object_path(blob);
        match std::fs::symlink_metadata(&path) {
            Ok(meta) if meta.is_file() && meta.len() == size => Ok(true),
            // If it cannot be set aside (a read-only store), it is missing all the same.
            Ok(_) => {
                let _ = self.quarantine(&path);
                Ok(false)
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(StoreError::from_io("reading", &path, e)),
        }
    }

    /// Whether all of these objects stand with these sizes. As many as a large pipeline has are
    /// looked for by several threads, from the folder that they are in: it is most of what a run
    /// costs in which nothing has changed.
    pub fn has_objects(&self, objects: &[(Digest, u64)]) -> bool {
        const A_THREAD: usize = 2_000;
        let folder = self.root().join("objects");
        if objects.len() <= A_THREAD {
            return stand_in(&folder, objects);
        }
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let share = objects.len().div_ceil(threads).max(A_THREAD);
        std::thread::scope(|scope| {
            let mut shares = objects.chunks(share);
            let own = shares.next().unwrap_or_default();
            let others = shares.map(|share| scope.spawn(|| stand_in(&folder, share)));
            let others: Vec<_> = others.collect();
            let own = stand_in(&folder, own);
            others.into_iter().all(|other| other.join().unwrap_or(false)) && own
        })
    }

    /// Makes a file an object: taken over if it is private to an attempt, else copied.
    pub(super) fn import(
        &self,
        file: &Path,
        blob: &Digest,
        size: u64,
        take: bool,
        dirty: &mut Dirty,
    ) -> anyhow::Result<()> {
        if self.has_object(blob, size)? && self.verify(blob)? {
            return Ok(());
        }
        let path = self.object_path(blob);
        let dir = path.parent().unwrap_or(&path).to_path_buf();
        let disk = self.disk();
        let meta = std::fs::metadata(file).map_err(|e| StoreError::from_io("reading", file, e))?;
        // Another name of the same file could be used to write into the object.
        let temp = if take && meta.nlink() == 1 {
            file.to_path_buf()
        } else {
            let temp = self.root().join("tmp").join(unique());
            disk.copy(file, &temp)?;
            let (copied, _) =
                Digest::of_file(&temp).map_err(|e| StoreError::from_io("reading", &temp, e))?;
            if copied != *blob {
                let _ = std::fs::remove_file(&temp);
                anyhow::bail!("{} changed while it was copied", file.display());
            }
            temp
        };
        disk.set_mode(&temp, 0o444)?;
        disk.sync(&temp)?;
        disk.within(&dir, || disk.rename(&temp, &path))?;
        dirty.insert(dir);
        Ok(())
    }

    pub(super) fn settle(&self, dirty: Dirty) -> Result<(), StoreError> {
        dirty.iter().try_for_each(|dir| self.disk().sync(dir))
    }

    /// Remembers that a blob's bytes lie outside the store.
    pub(super) fn refer(&self, entry: &Entry, origin: &Origin) -> anyhow::Result<()> {
        if self.origins(&entry.digest)?.contains(origin) {
            return Ok(());
        }
        let path = self.place("origins", &entry.digest);
        let line = OriginLine { size: entry.size, origin: origin.clone() };
        let mut line = serde_json::to_vec(&line)?;
        line.insert(0, b'\n');
        line.push(b'\n');
        let mut file = self.disk().open_append(&path)?;
        self.disk().append(&mut file, &line, &path)?;
        self.disk().sync(&path)?;
        Ok(())
    }

    /// Every place outside the store where a blob was seen, oldest first.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn origins(&self, blob: &Digest) -> anyhow::Result<Vec<Origin>> {
        let path = self.place("origins", blob);
        match std::fs::read(&path) {
            Ok(text) => {
                let lines = text.split(|&b| b == b'\n');
                let lines = lines.filter_map(|l| serde_json::from_slice::<OriginLine>(l).ok());
                Ok(lines.map(|l| l.origin).collect())
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(e) => Err(StoreError::from_io("reading", &path, e).into()),
        }
    }

    /// A readable path of a blob: the object, else an origin that still has these bytes.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn locate(&self, blob: &Digest) -> anyhow::Result<Option<PathBuf>> {
        let path = self.object_path(blob);
        if path.is_file() {
            return Ok(Some(path));
        }
        self.locate_origin(blob)
    }

    /// A file outside the store that has a blob's bytes now. The stat table makes this a matter
    /// of one `stat` for a file that has not moved.
    fn locate_origin(&self, blob: &Digest) -> anyhow::Result<Option<PathBuf>> {
        for origin in self.origins(blob)?.into_iter().rev() {
            if origin.path.is_file()
                && let Ok((digest, _)) = self.digest_of_file(&origin.path)
                && digest == *blob
            {
                return Ok(Some(origin.path));
            }
        }
        Ok(None)
    }

    /// Like [`Store::locate`]; an object whose size is not the entry's is set aside as damaged.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn locate_entry(&self, entry: &Entry) -> anyhow::Result<Option<PathBuf>> {
        if self.has_object(&entry.digest, entry.size)? {
            return Ok(Some(self.object_path(&entry.digest)));
        }
        self.locate_origin(&entry.digest)
    }

    /// Whether the object has the bytes that its name says. A damaged one is set aside, so that
    /// it is a miss from then on. The stat table makes this one `stat` for an object that was
    /// read through before.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn verify(&self, blob: &Digest) -> anyhow::Result<bool> {
        let path = self.object_path(blob);
        let gone = |e: &StoreError| match e {
            StoreError::Io { source, .. } => source.kind() == std::io::ErrorKind::NotFound,
            StoreError::Full { .. } | StoreError::ReadOnly { .. } => false,
        };
        let actual = match self.digest_of_file(&path) {
            Ok((actual, _)) => actual,
            Err(e) if e.downcast_ref().is_some_and(gone) => return Ok(false),
            Err(e) => return Err(e),
        };
        if actual != *blob {
            self.quarantine(&path)?;
        }
        Ok(actual == *blob)
    }

    /// Moves a damaged file of the store out of the way; never deletes it.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn quarantine(&self, path: &Path) -> Result<(), StoreError> {
        let dir = self.root().join("quarantine");
        self.disk().create_dir_all(&dir)?;
        let shard = path.parent().and_then(Path::file_name).unwrap_or_default();
        let name = path.file_name().unwrap_or_default();
        let name = format!("{}{}-{}", shard.display(), name.display(), unique());
        match self.disk().rename(path, &dir.join(name)) {
            // Another process was faster.
            Err(StoreError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                Ok(())
            }
            other => other,
        }
    }
}

/// Whether objects stand in the store's folder of objects.
fn stand_in(objects: &Path, share: &[(Digest, u64)]) -> bool {
    use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, openat, statat};
    let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
    let Ok(folder) = openat(CWD, objects, flags, Mode::empty()) else { return false };
    let mut path = String::with_capacity(2 * Digest::LENGTH + 1);
    share.iter().all(|(digest, size)| {
        path.clear();
        let _ = write!(path, "{digest}");
        path.insert(2, '/');
        statat(&folder, path.as_str(), AtFlags::SYMLINK_NOFOLLOW).is_ok_and(|stat| {
            let is_file = FileType::from_raw_mode(stat.st_mode).is_file();
            is_file && u64::try_from(stat.st_size) == Ok(*size)
        })
    })
}

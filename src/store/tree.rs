//! Trees: directories by content.

use std::collections::BTreeMap;
use std::fs::Metadata;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};

use super::objects::Dirty;
use super::{Entry, FileState, Origin, Store, StoreError, Tree};
use crate::digest::Digest;

impl Tree {
    /// A tree from entries, sorted. Paths are bytes: two that differ by case only are two files,
    /// which a file system that takes them for one refuses to lay out.
    ///
    /// # Errors
    /// When a path is not safe (absolute, with `..`), is there twice, or is a file and a folder.
    pub fn new(mut entries: Vec<Entry>) -> Result<Self> {
        entries.sort_by(|a, b| a.path.cmp(&b.path));
        let tree = Self { entries };
        tree.check()?;
        Ok(tree)
    }

    fn check(&self) -> Result<()> {
        let mut seen: BTreeMap<&str, ()> = BTreeMap::new();
        for entry in &self.entries {
            let path = entry.path.as_str();
            let plain = |c: Component<'_>| matches!(c, Component::Normal(_));
            let safe = !path.is_empty()
                && !path.contains(['\0', '\n', '\r', '\\'])
                && Path::new(path).components().all(plain)
                && path.split('/').all(|part| !part.is_empty() && part != ".");
            ensure!(safe, "`{}` is not a path that a tree can hold", path.escape_default());
            ensure!(seen.insert(path, ()).is_none(), "`{path}` is twice in one tree");
        }
        for path in seen.keys() {
            for (i, _) in path.match_indices('/') {
                let folder = &path[..i];
                ensure!(!seen.contains_key(folder), "`{folder}` is a file and a folder");
            }
        }
        ensure!(self.entries.is_sorted_by(|a, b| a.path < b.path), "the tree is not sorted");
        Ok(())
    }

    /// Its digest: of paths, executable bits, digests and sizes, never of where bytes lie.
    ///
    /// # Errors
    /// Never for a tree that was checked.
    pub fn digest(&self) -> Result<Digest> {
        self.digest_as("flow/tree/v1")
    }

    /// The digest under which a file or folder from outside stands in a key.
    ///
    /// # Errors
    /// Never for a tree that was checked.
    pub fn digest_of_outside(&self) -> Result<Digest> {
        self.digest_as("flow/file/v1")
    }

    /// That of the tree as a value.
    fn digest_as(&self, domain: &str) -> Result<Digest> {
        Digest::of_list(domain, "entries", self.entries.iter().map(serde_json::to_value))
    }

    /// Bytes in all.
    pub fn size(&self) -> u64 {
        self.entries.iter().map(|e| e.size).sum()
    }
}

/// A file of a directory that is being read.
struct Found {
    /// Relative, with `/`.
    path: String,
    executable: bool,
    state: FileState,
    /// Whether it is a link or lies in a folder that is one.
    link: bool,
}

/// All files under a directory, or the one file, sorted. Links are followed.
fn walk(root: &Path) -> Result<Vec<Found>> {
    Ok(walk_from(root)?.1)
}

/// The same, with the directory that the paths are relative to.
fn walk_from(root: &Path) -> Result<(&Path, Vec<Found>)> {
    let mut folder = root;
    let mut found = Vec::new();
    let meta = std::fs::metadata(root).map_err(|e| StoreError::from_io("reading", root, e))?;
    if meta.is_dir() {
        walk_dir(root, &meta, ("", false), &mut Vec::new(), &mut found)?;
    } else {
        let name = root.file_name().and_then(|n| n.to_str());
        let name = name.with_context(|| format!("{} is not a file name", root.display()))?;
        let executable = meta.permissions().mode() & 0o100 != 0;
        let (path, state) = (name.to_owned(), FileState::of(&meta));
        found.push(Found { path, executable, state, link: false });
        folder = root.parent().unwrap_or(root);
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    Ok((folder, found))
}

/// `prefix` is what the paths below it begin with, `linked` whether it lies behind a link.
fn walk_dir(
    dir: &Path,
    meta: &Metadata,
    (prefix, linked): (&str, bool),
    above: &mut Vec<(u64, u64)>,
    found: &mut Vec<Found>,
) -> Result<()> {
    let read = |e| StoreError::from_io("reading", dir, e);
    let own = (meta.dev(), meta.ino());
    ensure!(!above.contains(&own), "{} is a link to a folder above it", dir.display());
    above.push(own);
    for entry in std::fs::read_dir(dir).map_err(read)? {
        let entry = entry.map_err(read)?;
        let file = entry.path();
        let name = entry.file_name();
        let name = name.to_str().with_context(|| format!("{} is not UTF-8", file.display()))?;
        let path = format!("{prefix}{name}");
        let symlink = entry.file_type().map_err(read)?.is_symlink();
        let link = linked || symlink;
        let meta = if symlink { std::fs::metadata(&file) } else { entry.metadata() };
        let meta = meta.map_err(|e| StoreError::from_io("reading", &file, e))?;
        if meta.is_dir() {
            walk_dir(&file, &meta, (&format!("{path}/"), link), above, found)?;
        } else if meta.is_file() {
            let executable = meta.permissions().mode() & 0o100 != 0;
            found.push(Found { path, executable, state: FileState::of(&meta), link });
        } else {
            bail!("{} is neither a file nor a folder", file.display());
        }
    }
    above.pop();
    Ok(())
}

impl Store {
    /// The digest of a tree (a directory's or a single file's content), from the stat table where
    /// nothing has changed. Symbolic links are followed; a single file gives a tree of one entry.
    ///
    /// # Errors
    /// When something in it cannot be read.
    pub fn tree_of_path(&self, path: &Path) -> Result<Tree> {
        let (folder, found) = walk_from(path)?;
        let digests = self.digests_of_files(folder, found.iter().map(|f| f.path.as_str()))?;
        let entries = found.into_iter().zip(digests).map(|(found, (digest, size))| {
            let Found { path, executable, .. } = found;
            Entry { path, digest, size, executable }
        });
        Tree::new(entries.collect())
    }

    /// Imports a directory: every file becomes an object, the manifest is written last.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn publish_tree(&self, dir: &Path) -> Result<Digest> {
        self.publish_tree_with(dir, &[])
    }

    /// Imports a directory and, beside its files, entries whose bytes stay where they are. Files
    /// of a directory under `attempts/` are taken over, so the directory is spent afterwards;
    /// others are copied. A directory that does not exist counts as empty.
    ///
    /// # Errors
    /// When the disk refuses, or a link leads out of the directory.
    pub fn publish_tree_with(&self, dir: &Path, referenced: &[(Entry, Origin)]) -> Result<Digest> {
        let (folder, found) = match walk_from(dir) {
            Err(_) if !dir.exists() => (dir, Vec::new()),
            found => found?,
        };
        let take = dir.starts_with(self.root().join("attempts"));
        // What other names lead to is known by its real path.
        let links = found.iter().any(|found| found.link);
        let real = links.then(|| dir.canonicalize()).and_then(Result::ok);
        let real = real.unwrap_or_else(|| dir.to_path_buf());
        let mut entries = Vec::new();
        let mut linked = std::collections::BTreeSet::new();
        for Found { path, executable, link, .. } in &found {
            let file = &folder.join(path);
            if *link {
                let target = file.canonicalize()?;
                let inside = target.starts_with(&real);
                ensure!(inside, "`{path}` leads out of the output; outputs hold their own bytes");
                linked.insert(target);
            }
            // Hashed afresh: a file that was just written is never in the stat table.
            let (digest, size) =
                Digest::of_file(file).map_err(|e| StoreError::from_io("reading", file, e))?;
            entries.push(Entry { path: path.clone(), digest, size, executable: *executable });
        }
        let mut dirty = Dirty::new();
        let known: Vec<Entry> = entries.clone();
        for (entry, origin) in referenced {
            self.refer(entry, origin)?;
            entries.push(entry.clone());
        }
        let tree = Tree::new(entries)?;
        for (Found { path, link, .. }, entry) in found.iter().zip(&known) {
            let file = &folder.join(path);
            // What other names lead to must stay until they are read too.
            let take = take && !link && !linked.contains(&real.join(&entry.path));
            self.import(file, &entry.digest, entry.size, take, &mut dirty)?;
        }
        self.settle(dirty)?;
        self.write_manifest(&tree)
    }

    fn write_manifest(&self, tree: &Tree) -> Result<Digest> {
        let digest = tree.digest()?;
        let path = self.place("trees", &digest);
        match self.tree(&digest) {
            Ok(Some(_)) => return Ok(digest),
            Ok(None) => {}
            Err(_) => self.quarantine(&path)?,
        }
        let mut text = serde_json::to_vec_pretty(tree)?;
        text.push(b'\n');
        self.write_atomic(&path, &text)?;
        Ok(digest)
    }

    /// Brings a published tree to the disk: its manifest and the objects that it names.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn sync_tree(&self, digest: &Digest) -> Result<()> {
        let mut dirty = Dirty::new();
        let entries = self.tree(digest)?.into_iter().flat_map(|tree| tree.entries);
        let objects = entries.map(|entry| self.object_path(&entry.digest));
        for path in objects.chain([self.place("trees", digest)]).filter(|path| path.exists()) {
            self.disk().sync(&path)?;
            dirty.extend(path.parent().map(Path::to_path_buf));
        }
        Ok(self.settle(dirty)?)
    }

    /// The manifest of a published tree, or `None` if the store has no such tree.
    ///
    /// # Errors
    /// When the manifest is unreadable or is not what its digest says.
    pub fn tree(&self, digest: &Digest) -> Result<Option<Tree>> {
        let path = self.place("trees", digest);
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(StoreError::from_io("reading", &path, e).into()),
        };
        let damaged = || format!("the manifest of tree {} is damaged", digest.short());
        let tree: Tree = serde_json::from_slice(&text).with_context(damaged)?;
        ensure!(tree.digest()? == *digest, damaged());
        tree.check().with_context(damaged)?;
        Ok(Some(tree))
    }

    /// What of a tree is not there any more, as a line; `None` if all of it is.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn missing(&self, digest: &Digest) -> Result<Option<String>> {
        let tree = match self.tree(digest) {
            Ok(Some(tree)) => tree,
            Ok(None) => return Ok(Some(format!("tree {} is gone", digest.short()))),
            Err(e) => return Ok(Some(format!("{e:#}"))),
        };
        for entry in &tree.entries {
            if self.locate_entry(entry)?.is_some() {
                continue;
            }
            let short = entry.digest.short();
            let origins = self.origins(&entry.digest)?;
            let hub = origins.iter().rev().find_map(|o| o.hub.as_ref());
            return Ok(Some(match (hub, origins.last()) {
                (Some(hub), _) => format!(
                    "`{}` ({short}) of {} is no longer in the hub cache",
                    entry.path, hub.repo
                ),
                (None, Some(_)) => {
                    format!("`{}` ({short}) is no longer where it was referenced", entry.path)
                }
                (None, None) => format!("`{}` ({short}) is gone or damaged", entry.path),
            }));
        }
        Ok(None)
    }
}

impl Store {
    /// The states (device, inode, size, times) of a file, or of all files under a directory, by
    /// path: equal states mean that nothing was edited in between.
    ///
    /// # Errors
    /// When something in it cannot be read.
    pub fn states(&self, path: &Path) -> Result<BTreeMap<PathBuf, FileState>> {
        Ok(walk(path)?.into_iter().map(|found| (found.path.into(), found.state)).collect())
    }
}

//! Trees laid out as files again.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::{Entry, Store, StoreError};
use crate::digest::Digest;
use crate::source::Fault;

impl Store {
    /// Writes a tree's files under a directory: shared blocks where the file system can, else
    /// copies; writable. Files that are there already are an error.
    ///
    /// # Errors
    /// When the tree or its bytes are lost, or the disk refuses.
    pub fn materialise(&self, tree: &Digest, dest: &Path) -> Result<()> {
        self.lay_out(tree, dest, &|entry, to| self.materialise_entry(entry, to))
    }

    /// Writes one file of a tree to a path, making its folder: shared blocks where the file
    /// system can, else a copy; writable.
    ///
    /// # Errors
    /// When its bytes are lost, or the disk refuses.
    pub fn materialise_entry(&self, entry: &Entry, to: &Path) -> Result<()> {
        let from = self.find_entry(entry)?;
        if let Some(folder) = to.parent() {
            self.disk().create_dir_all(folder)?;
        }
        self.disk().copy(&from, to).map_err(|e| taken(e, to))?;
        self.disk().set_mode(to, if entry.executable { 0o755 } else { 0o644 })?;
        Ok(())
    }

    fn find_entry(&self, entry: &Entry) -> Result<PathBuf> {
        let lost = || format!("the store has lost `{}` ({})", entry.path, entry.digest.short());
        let path = self.locate_entry(entry)?.with_context(lost)?;
        let sound = !path.starts_with(self.root()) || self.verify(&entry.digest)?;
        sound.then_some(path).with_context(lost)
    }

    /// Lays a tree out as symbolic links to read-only files, for a process that reads it.
    ///
    /// # Errors
    /// When the tree or its bytes are lost, or the disk refuses.
    pub fn stage(&self, tree: &Digest, dest: &Path) -> Result<()> {
        self.lay_out(tree, dest, &|entry, to| {
            let from = self.find_entry(entry)?;
            if let Some(folder) = to.parent() {
                self.disk().create_dir_all(folder)?;
            }
            self.disk().symlink(&from, to).map_err(|e| taken(e, to))
        })
    }

    fn lay_out(
        &self,
        tree: &Digest,
        dest: &Path,
        put: &dyn Fn(&Entry, &Path) -> Result<()>,
    ) -> Result<()> {
        let manifest = self.tree(tree)?;
        let manifest = manifest.with_context(|| format!("tree {} is lost", tree.short()))?;
        self.disk().create_dir_all(dest)?;
        manifest.entries.iter().try_for_each(|entry| put(entry, &dest.join(&entry.path)))
    }
}

/// What to say when a name is taken: a tree may hold `A` and `a`, which are one file for some file
/// systems. Nothing is ever written over the other.
fn taken(error: StoreError, to: &Path) -> anyhow::Error {
    match &error {
        StoreError::Io { source, .. } if source.kind() == std::io::ErrorKind::AlreadyExists => {
            let fault = Fault::new(format!("{} is there already", to.display())).cause(error);
            let help = "if it differs from another file only by upper and lower case, use a file \
                        system that tells them apart, or let the step give other names";
            fault.help(help).into()
        }
        _ => error.into(),
    }
}

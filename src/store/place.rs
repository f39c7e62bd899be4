//! Trees laid out as files again.

use std::path::Path;

use anyhow::{Context as _, Result};

use super::{Entry, Store};
use crate::digest::Digest;

impl Store {
    /// Writes a tree's files under a directory: shared blocks where the file system can, else
    /// copies; writable. Files that are there already are an error.
    ///
    /// # Errors
    /// When the tree or its bytes are lost, or the disk refuses.
    pub fn materialise(&self, tree: &Digest, dest: &Path) -> Result<()> {
        self.lay_out(tree, dest, &|entry, from, to| {
            self.disk().copy(from, to)?;
            let mode = if entry.executable { 0o755 } else { 0o644 };
            self.disk().set_mode(to, mode)?;
            Ok(())
        })
    }

    /// Lays a tree out as symbolic links to read-only files, for a process that reads it.
    ///
    /// # Errors
    /// When the tree or its bytes are lost, or the disk refuses.
    pub fn stage(&self, tree: &Digest, dest: &Path) -> Result<()> {
        self.lay_out(tree, dest, &|_, from, to| Ok(self.disk().symlink(from, to)?))
    }

    fn lay_out(
        &self,
        tree: &Digest,
        dest: &Path,
        put: &dyn Fn(&Entry, &Path, &Path) -> Result<()>,
    ) -> Result<()> {
        let manifest = self.tree(tree)?;
        let manifest = manifest.with_context(|| format!("tree {} is lost", tree.short()))?;
        self.disk().create_dir_all(dest)?;
        for entry in &manifest.entries {
            let lost = || format!("the store has lost `{}` ({})", entry.path, entry.digest.short());
            let from = self.locate_entry(entry)?.with_context(lost)?;
            let to = dest.join(&entry.path);
            if let Some(folder) = to.parent() {
                self.disk().create_dir_all(folder)?;
            }
            put(entry, &from, &to)?;
        }
        Ok(())
    }
}

//! The world outside, seen by `resolve`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Result;

use super::FileInput;
use crate::digest::Digest;
use crate::hub::{Hub, RepoType};
use crate::lineage::Lock;
use crate::source::Fault;
use crate::store::{States, Store};

/// The only access to the lock and to hub metadata. Replaces names by identities.
pub struct Outside<'a> {
    /// Folder of the pipeline file; paths in it are relative to this.
    pub dir: &'a Path,
    /// Identities found before, and where new ones go.
    pub lock: &'a mut Lock,
    /// The hub client.
    pub hub: &'a Hub,
    /// For the stat table.
    pub store: &'a Store,
    /// Local files and folders seen so far, in the state before they were read.
    pub files: &'a mut BTreeMap<PathBuf, States>,
}

impl Outside<'_> {
    /// The commit (40 hex digits) of a hub repository's revision (`main` if none is given).
    ///
    /// # Errors
    /// When it is not in the lock and the hub cannot be asked.
    pub fn commit(&mut self, ty: RepoType, repo: &str, revision: Option<&str>) -> Result<String> {
        let revision = revision.unwrap_or("main");
        if revision.len() == 40 && revision.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Ok(revision.to_ascii_lowercase());
        }
        let name = format!("hub:{}/{repo}@{revision}", ty.as_str());
        let hub = self.hub;
        self.lock.get_or_insert(&name, || hub.commit(ty, repo, revision))
    }

    /// The digest of what a URL gives, as the lock knows it; on first use it is fetched by `get`,
    /// which returns the digest as text.
    ///
    /// # Errors
    /// When it is not in the lock and cannot be fetched.
    pub fn url(&mut self, url: &str, get: impl FnOnce(&Hub) -> Result<String>) -> Result<String> {
        let hub = self.hub;
        self.lock.get_or_insert(&format!("url:{url}"), || get(hub))
    }

    /// Makes the path of a file input absolute and fills in its content digest. A file keeps the
    /// name that was written, which says its format: a link in the hub's cache leads to a blob
    /// without an ending.
    ///
    /// # Errors
    /// When it is not there or cannot be read.
    pub fn file(&mut self, input: &mut FileInput) -> Result<()> {
        let path = self.dir.join(&input.path);
        if !path.exists() {
            let fault = Fault::new(format!("there is no file or folder {}", path.display()));
            let help = "paths in a pipeline are relative to the pipeline file";
            return Err(fault.help(help).into());
        }
        let path = std::path::absolute(path)?;
        let path = match (path.is_dir(), path.parent(), path.file_name()) {
            (false, Some(folder), Some(name)) => folder.canonicalize()?.join(name),
            _ => path.canonicalize()?,
        };
        if self.store.root().starts_with(&path) {
            let fault = Fault::new(format!("{} holds the store, which changes", path.display()));
            return Err(fault.help("name the files, or a folder beside the store").into());
        }
        let states = self.store.states(&path)?;
        let tree = self.store.tree_of_path(&path)?;
        let value = serde_json::to_value(&tree)?;
        input.digest = Some(Digest::of_value("flow/file/v1", &value)?);
        self.files.insert(path.clone(), states);
        input.path = path;
        Ok(())
    }
}

//! The world outside, seen by `resolve`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::FileInput;
use crate::data::{Format, glob_match, is_archive, with_rows};
use crate::hub::{Hub, RepoFile, RepoType};
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

/// Where the hub keeps what it has converted to Parquet.
const CONVERTED: &str = "refs/convert/parquet";

/// Whether a dataset has a script, or archives, and no rows.
fn needs_converting(files: &[RepoFile]) -> bool {
    let names: Vec<&str> = files.iter().map(|f| f.path.as_str()).collect();
    let (rows, _) = with_rows(&names);
    let text = |name: &&str| matches!(Format::of_name(name), Some((Format::Text, _)));
    let made = |name: &&str| is_archive(name) || name.ends_with(".py") && !name.contains('/');
    rows.iter().all(text) && names.iter().any(made)
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

    /// The commit of a dataset's rows: where a dataset is only a script that makes them, or has
    /// them in archives, and no revision is asked for, that of the branch in which the hub keeps
    /// them as Parquet. A lock that knows the dataset says which of the two it was.
    ///
    /// # Errors
    /// As [`Outside::commit`].
    pub fn dataset(&mut self, repo: &str, revision: Option<&str>) -> Result<String> {
        let ty = RepoType::Dataset;
        let knows = |lock: &Lock, revision: &str| {
            lock.entries().contains_key(&format!("hub:{}/{repo}@{revision}", ty.as_str()))
        };
        let known = knows(self.lock, "main");
        let commit = self.commit(ty, repo, revision)?;
        if revision.is_some() {
            return Ok(commit);
        }
        let converted = match known {
            true => knows(self.lock, CONVERTED),
            // What is wrong with the list of files is said where they are read.
            false => self.hub.tree(ty, repo, &commit).is_ok_and(|files| needs_converting(&files)),
        };
        if !converted {
            return Ok(commit);
        }
        self.commit(ty, repo, Some(CONVERTED)).map_err(|e| {
            let message = format!(
                "`{repo}` has a script or archives instead of files with rows, and there is no \
                 Parquet of it on the hub (`{CONVERTED}`)"
            );
            let help = "unpack its archives, or run its script, and name the files under `files`";
            Fault::new(message).help(help).cause(e).into()
        })
    }

    /// The files that a path with `*`, `?` or `[…]` in it names, resolved, each with its path
    /// below the folder in which the pattern begins, sorted; `**` goes through folders. Hidden
    /// files are passed over. A path that is there as it is written is that file.
    ///
    /// # Errors
    /// When nothing matches or a file cannot be read.
    pub fn files(&mut self, input: &FileInput) -> Result<Vec<(String, FileInput)>> {
        let pattern = input.path.to_string_lossy().into_owned();
        let wild = |text: &str| text.contains(['*', '?', '[']);
        if !wild(&pattern) || self.dir.join(&input.path).exists() {
            let mut file = input.clone();
            self.file(&mut file)?;
            let name = file.path.file_name().map(|n| n.to_string_lossy().into_owned());
            return Ok(vec![(name.unwrap_or_default(), file)]);
        }
        let mut folder = self.dir.to_path_buf();
        let mut parts = input.path.components().peekable();
        while let Some(part) = parts.next_if(|part| !wild(&part.as_os_str().to_string_lossy())) {
            folder.push(part);
        }
        let rest: PathBuf = parts.collect();
        let rest = rest.to_string_lossy().into_owned();
        let depth = if rest.contains("**") { usize::MAX } else { rest.split('/').count() };
        let mut found = Vec::new();
        self.below(&folder, "", depth, &mut |path| {
            if glob_match(&rest, path) {
                found.push(path.to_owned());
            }
        })?;
        // Whether another file matches is seen only by looking again, so a run that reads a pattern
        // is never taken for unchanged: there is no file of this name.
        self.files.insert(self.dir.join(&input.path), States::new());
        if found.is_empty() {
            let fault = Fault::new(format!("no file matches `{pattern}`"));
            let help = "paths in a pipeline are relative to the pipeline file";
            return Err(fault.help(help).into());
        }
        found.sort_unstable();
        let resolved = found.into_iter().map(|path| {
            let mut file = FileInput { path: folder.join(&path), digest: None };
            self.file(&mut file)?;
            Ok((path, file))
        });
        resolved.collect()
    }

    fn below(
        &self,
        folder: &Path,
        prefix: &str,
        depth: usize,
        each: &mut dyn FnMut(&str),
    ) -> Result<()> {
        let items = std::fs::read_dir(folder);
        for item in items.with_context(|| format!("reading {}", folder.display()))? {
            let item = item?;
            let (path, name) = (item.path(), item.file_name().to_string_lossy().into_owned());
            let hidden = name.starts_with('.') || path == *self.store.root();
            if hidden {
                continue;
            }
            let name = format!("{prefix}{name}");
            if !path.is_dir() {
                each(&name);
            } else if depth > 1 {
                self.below(&path, &format!("{name}/"), depth - 1, each)?;
            }
        }
        Ok(())
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
        input.digest = Some(self.store.tree_of_path(&path)?.digest_of_outside()?);
        self.files.insert(path.clone(), states);
        input.path = path;
        Ok(())
    }
}

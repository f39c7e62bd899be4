//! Hub client over the cache that Python's `huggingface_hub` and the `hf-hub` crate share.
//!
//! ```text
//! {models|datasets}--org--name/refs/<revision>           40 hex digits, no newline
//!                             /snapshots/<commit>/<path> -> ../../blobs/<digest>
//!                             /blobs/<digest>            git SHA-1 (40 hex) or SHA-256 (64 hex)
//!                             /trees/<commit>.json       Python's list of files; read, not written
//! .locks/<repo>/<digest>.lock                            held while a blob is fetched
//! .flow/                                                 ours: file lists, checked blobs, URLs
//! ```
//!
//! The layout and the routes are those of the `hf-hub` crate, whose types name them. The transfer
//! is our own: `hf-hub` 0.5 neither checks what it got, nor resumes, nor takes empty files or
//! names with a space or `#` in them. Every blob is checked against its digest before its path is
//! given out; what fails the check is never left where a reader finds it.

mod cache;
mod http;
mod parallel;
mod transfer;
mod url;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use self::cache::Cache;
use self::http::{Failure, Http};
use self::transfer::Checksum;
use crate::source::Fault;

/// Where the hub is if nothing else is said.
pub const ENDPOINT: &str = "https://huggingface.co";

/// Type of a hub repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RepoType {
    /// Models.
    Model,
    /// Datasets.
    Dataset,
}

impl RepoType {
    /// As in API routes: `models`, `datasets`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Model => "models",
            Self::Dataset => "datasets",
        }
    }

    /// As in messages: `model`, `dataset`.
    pub fn noun(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::Dataset => "dataset",
        }
    }

    fn hf(self) -> hf_hub::RepoType {
        match self {
            Self::Model => hf_hub::RepoType::Model,
            Self::Dataset => hf_hub::RepoType::Dataset,
        }
    }
}

/// An access token. It is never shown and never serialised: a worker gets it through its
/// environment and the roof puts it back with [`HubSettings::token`].
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    /// From the text of `HF_TOKEN` or of the token file; blanks around it are dropped.
    pub fn new(text: &str) -> Self {
        Self(text.trim().to_owned())
    }

    /// The text, for the `Authorization` header or a worker's environment.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_empty() { "Token(none)" } else { "Token(hidden)" })
    }
}

/// Where the hub and its cache are. Never part of a key or a record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HubSettings {
    /// `HF_ENDPOINT`, without a slash at the end.
    pub endpoint: String,
    /// `HF_HUB_CACHE`, else `HF_HOME/hub`.
    pub cache_dir: PathBuf,
    /// `HF_TOKEN`, else the token file. Left out when settings are serialised.
    #[serde(skip)]
    pub token: Option<Token>,
    /// `HF_HUB_OFFLINE`: only the cache is read.
    #[serde(default)]
    pub offline: bool,
}

impl HubSettings {
    /// The public hub with a cache at `cache_dir`, no token, not offline.
    pub fn new(cache_dir: impl Into<PathBuf>) -> Self {
        let cache_dir = cache_dir.into();
        Self { endpoint: ENDPOINT.to_owned(), cache_dir, token: None, offline: false }
    }
}

/// A file of a repository at a commit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepoFile {
    /// Path in the repository.
    pub path: String,
    /// Bytes.
    pub size: u64,
    /// Git's name of the blob: SHA-1 of `blob LEN\0` and the content; for a large file, of its
    /// pointer.
    pub oid: String,
    /// SHA-256 of the content of a large file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lfs_sha256: Option<String>,
}

impl RepoFile {
    /// The name of its blob in the cache.
    pub fn digest(&self) -> &str {
        self.lfs_sha256.as_deref().unwrap_or(&self.oid)
    }

    fn checksum(&self) -> Checksum {
        match &self.lfs_sha256 {
            Some(sha256) => Checksum::Sha256(sha256.clone()),
            None => Checksum::Git(self.oid.clone()),
        }
    }
}

/// Told how many bytes of how many there are; an error from it ends the transfer, and what has
/// been fetched stays for the next try.
pub type Progress<'a> = &'a (dyn Fn(u64, u64) -> Result<()> + Sync);

/// A hub client over the shared cache.
#[derive(Debug)]
pub struct Hub {
    settings: HubSettings,
    cache: Cache,
    http: Http,
}

impl Hub {
    /// A client; nothing is asked yet.
    pub fn new(mut settings: HubSettings) -> Self {
        settings.endpoint = settings.endpoint.trim_end_matches('/').to_owned();
        let token = settings.token.clone().filter(|t| !t.reveal().is_empty());
        Self {
            cache: Cache::new(settings.cache_dir.clone()),
            http: Http::new(&settings.endpoint, token, Duration::from_millis(300)),
            settings,
        }
    }

    /// What it was made from.
    pub fn settings(&self) -> &HubSettings {
        &self.settings
    }

    /// The commit of a revision, and the cache's `refs/` brought up to date. Offline it is what
    /// the cache's `refs/` say.
    ///
    /// # Errors
    /// When the hub cannot be reached, or has no such repository or revision.
    pub fn commit(&self, ty: RepoType, repo: &str, revision: &str) -> Result<String> {
        cache::check_repo(repo)?;
        cache::check_path(revision).context("this is not a revision")?;
        let noun = ty.noun();
        if self.settings.offline {
            let known = self.cache.read_ref(ty, repo, revision);
            return known.ok_or_else(|| self.not_in_cache(&format!("{noun} {repo}@{revision}")));
        }
        let (endpoint, routes) = (&self.settings.endpoint, ty.as_str());
        let route = format!("{endpoint}/api/{routes}/{repo}/revision/{}", http::encode(revision));
        let body = self.http.json(&route).map_err(|f| self.explain(f, noun, repo, revision))?.value;
        let sha = body["sha"].as_str().unwrap_or_default().to_owned();
        ensure!(cache::is_commit(&sha), "the hub gave no commit for {noun} {repo}@{revision}");
        // Only serves later runs: a cache that cannot be written (shared, read-only) is still good.
        let _ = self.cache.write_ref(ty, repo, revision, &sha);
        Ok(sha)
    }

    /// The files of a repository at a commit, sorted by path. Asked for once: later calls read
    /// the list that is kept in the cache, ours or that of Python's client. Offline and without a
    /// list nothing says whether a snapshot in the cache is whole, so it is not taken.
    ///
    /// # Errors
    /// When the hub cannot be reached, has no such repository or commit, or names a file that
    /// would lie outside the cache.
    pub fn tree(&self, ty: RepoType, repo: &str, commit: &str) -> Result<Vec<RepoFile>> {
        cache::check_repo(repo)?;
        ensure!(cache::is_commit(commit), "`{commit}` is not a commit (40 hex digits)");
        let kept = self.cache.read_tree(ty, repo, commit);
        let kept = kept.or_else(|| self.cache.read_python_tree(ty, repo, commit));
        if let Some(files) = kept {
            return Ok(files);
        }
        let noun = ty.noun();
        if self.settings.offline {
            let what = format!("{noun} {repo}@{commit}");
            return Err(match self.cache.has_snapshot(ty, repo, commit) {
                Some(folder) => unlisted(&what, &folder),
                None => self.not_in_cache(&what),
            });
        }
        let endpoint = &self.settings.endpoint;
        let route = format!("{endpoint}/api/{}/{repo}/tree/{commit}?recursive=true", ty.as_str());
        let mut next = Some(route);
        let mut files = BTreeMap::new();
        while let Some(url) = next {
            let page = self.http.json(&url).map_err(|f| self.explain(f, noun, repo, commit))?;
            let items = page.value.as_array().context("the hub's list of files is not a list")?;
            for item in items.iter().filter(|item| item["type"] == "file") {
                let file = repo_file(item)
                    .with_context(|| format!("in the hub's list of files of {repo}"))?;
                files.insert(file.path.clone(), file);
            }
            next = page.next;
        }
        let files: Vec<RepoFile> = files.into_values().collect();
        // As with the revision: without it the hub is asked again.
        let _ = self.cache.write_tree(ty, repo, commit, &files);
        Ok(files)
    }

    /// A file of a repository, fetched unless the cache has it, checked against its digest, as
    /// its path in the cache's snapshot. An interrupted transfer goes on where it stopped.
    ///
    /// # Errors
    /// When the hub cannot be reached, refuses, or gives other bytes than its list of files says.
    pub fn file(
        &self,
        ty: RepoType,
        repo: &str,
        commit: &str,
        file: &RepoFile,
        progress: Progress<'_>,
    ) -> Result<PathBuf> {
        cache::check_repo(repo)?;
        ensure!(cache::is_commit(commit), "`{commit}` is not a commit (40 hex digits)");
        check_file(file)?;
        let slot = self.cache.slot(ty, repo, file);
        if !self.cache.is_good(&slot, file)? {
            if self.settings.offline {
                let what = format!("`{}` of {} {repo}@{commit}", file.path, ty.noun());
                return Err(self.not_in_cache(&what));
            }
            let _lock = self.cache.lock(&slot)?;
            // Another process may have fetched it while this one waited for the lock.
            if !self.cache.is_good(&slot, file)? {
                let route = hf_hub::Repo::new(repo.into(), ty.hf()).url();
                let path: Vec<String> = file.path.split('/').map(http::encode).collect();
                let endpoint = &self.settings.endpoint;
                let url = format!("{endpoint}/{route}/resolve/{commit}/{}", path.join("/"));
                let name = format!("`{}` of {} {repo}", file.path, ty.noun());
                let checksum = file.checksum();
                let want = transfer::Want { url: &url, size: Some(file.size), checksum, name };
                transfer::fetch(&self.http, &want, &slot.part, progress).map_err(|e| match e {
                    transfer::Stopped::Http(f) => self.explain(f, ty.noun(), repo, commit),
                    transfer::Stopped::Other(e) => e,
                })?;
                self.cache.land(&slot)?;
            }
        }
        Ok(self.cache.link(ty, repo, commit, file))
    }

    fn not_in_cache(&self, what: &str) -> anyhow::Error {
        let dir = self.settings.cache_dir.display();
        Fault::new(format!("{what} is not in the cache {dir}, and the hub must not be asked"))
            .help("unset HF_HUB_OFFLINE (or leave out --offline) to fetch it")
            .into()
    }

    fn explain(&self, failure: Failure, noun: &str, repo: &str, revision: &str) -> anyhow::Error {
        let what = format!("{noun} {repo}@{revision}");
        let endpoint = &self.settings.endpoint;
        match failure {
            Failure::Unreachable(cause) => {
                Fault::new(format!("the hub at {endpoint} cannot be reached"))
                    .help(
                        "set HF_ENDPOINT to a hub that can be reached, or HF_HUB_OFFLINE=1 to use \
                         only what is in the cache",
                    )
                    .cause(anyhow::anyhow!(cause))
                    .into()
            }
            Failure::Status { code: 401 | 403, error, reason } if error == "GatedRepo" => {
                let page = match noun {
                    "dataset" => format!("{endpoint}/datasets/{repo}"),
                    _ => format!("{endpoint}/{repo}"),
                };
                let token = if self.http.has_token() {
                    "with the account that the token belongs to"
                } else {
                    "and set HF_TOKEN to a token of that account"
                };
                Fault::new(format!("{what} is gated: its terms have not been accepted{reason}"))
                    .help(format!("accept them on {page} {token}"))
                    .into()
            }
            Failure::Status { code: 401 | 403, reason, .. } => {
                let has = self.http.has_token();
                let help = if has {
                    "if it is gated, accept its terms on its page; else check its name and that \
                     the token may read it"
                } else {
                    "it may not exist, or be private or gated: check the name, and set HF_TOKEN"
                };
                let with = if has { "with this token" } else { "without a token" };
                Fault::new(format!("the hub does not give out {what} {with}{reason}"))
                    .help(help)
                    .into()
            }
            Failure::Status { code: 404, error, reason } => match error.as_str() {
                "RevisionNotFound" => {
                    let message = format!("{noun} {repo} has no revision `{revision}`");
                    Fault::new(message).help("a branch, a tag or a commit is expected").into()
                }
                "EntryNotFound" => Fault::new(format!("{what} has no such file{reason}")).into(),
                _ => Fault::new(format!("the hub at {endpoint} has no {noun} {repo}{reason}"))
                    .help("check the name; it is written `organisation/name`")
                    .into(),
            },
            Failure::Status { code: 429, reason, .. } => {
                let help = if self.http.has_token() {
                    "try again in some minutes: what has been fetched is kept"
                } else {
                    "try again in some minutes, or set HF_TOKEN: without one few requests are \
                     answered"
                };
                Fault::new(format!("the hub at {endpoint} answers no more requests{reason}"))
                    .help(help)
                    .into()
            }
            Failure::Status { code, reason, .. } => {
                Fault::new(format!("the hub at {endpoint} answered {code} for {what}{reason}"))
                    .help("try again later")
                    .into()
            }
            Failure::Broken(cause) => {
                Fault::new(format!("the connection to {endpoint} broke while fetching {what}"))
                    .help("run again: what has been fetched is kept")
                    .cause(anyhow::anyhow!(cause))
                    .into()
            }
        }
    }
}

/// A snapshot that another program left without a list of the repository's files.
fn unlisted(what: &str, folder: &Path) -> anyhow::Error {
    let message =
        format!("the cache may hold only a part of {what}, and no list says what is in it");
    let help = format!(
        "run once online; or, if you know that it is whole, name its folder as a local path: {}",
        folder.display()
    );
    Fault::new(message).help(help).into()
}

fn repo_file(item: &serde_json::Value) -> Result<RepoFile> {
    let text = |v: &serde_json::Value| v.as_str().map(str::to_owned);
    let file = RepoFile {
        path: text(&item["path"]).context("a file without a path")?,
        size: item["size"].as_u64().context("a file without a size")?,
        oid: text(&item["oid"]).context("a file without an oid")?,
        lfs_sha256: text(&item["lfs"]["oid"]),
    };
    check_file(&file)?;
    Ok(file)
}

/// Digests become file names and paths become links, so neither may be anything else.
fn check_file(file: &RepoFile) -> Result<()> {
    cache::check_path(&file.path)?;
    ensure!(cache::is_hex(&file.oid, 40), "`{}` is not a git digest", file.oid);
    if let Some(sha256) = file.lfs_sha256.as_deref().filter(|s| !cache::is_hex(s, 64)) {
        bail!("`{sha256}` is not a SHA-256 digest");
    }
    Ok(())
}

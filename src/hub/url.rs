//! Plain URLs, kept by content.

use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};

use super::http::Failure;
use super::transfer::{self, Checksum, Stopped, Want};
use super::{Hub, Progress, cache};
use crate::digest::Digest;
use crate::source::Fault;

impl Hub {
    /// What a URL gives, as (SHA-256, path in the cache). With an expected SHA-256 a file that
    /// was fetched before is not fetched again, and another content is refused and not kept.
    /// The hub's token is not sent.
    ///
    /// # Errors
    /// When the URL cannot be fetched, offline without the file in the cache, or when the
    /// content is another.
    pub fn url(
        &self,
        url: &str,
        sha256: Option<&str>,
        progress: Progress<'_>,
    ) -> Result<(String, PathBuf)> {
        let web = url.starts_with("http://") || url.starts_with("https://");
        ensure!(web, "`{url}` is not a URL: it starts with neither `https://` nor `http://`");
        let expected = sha256.map(str::to_ascii_lowercase);
        let folder = self.cache.own("urls");
        if let Some(expected) = &expected {
            ensure!(cache::is_hex(expected, 64), "`{expected}` is not a SHA-256 (64 hex digits)");
        }
        let kept = || -> Result<Option<(String, PathBuf)>> {
            let Some(expected) = &expected else { return Ok(None) };
            let path = folder.join(expected);
            let good = path.exists() && transfer::sha256(&path)? == *expected;
            Ok(good.then(|| (expected.clone(), path)))
        };
        if let Some(kept) = kept()? {
            return Ok(kept);
        }
        if self.settings.offline {
            return Err(self.not_in_cache(url));
        }
        std::fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
        let name = Digest::of(format!("{url} {expected:?}").as_bytes());
        let part = folder.join(format!("{name}.incomplete"));
        let _lock = cache::take_lock(&self.cache.own("locks").join(format!("{name}.lock")))?;
        // Another process may have fetched it while this one waited for the lock.
        if let Some(kept) = kept()? {
            return Ok(kept);
        }
        // What an earlier run left goes on only towards a content that is known.
        if expected.is_none() {
            let _ = std::fs::remove_file(&part);
        }
        let checksum = Checksum::Sha256(expected.clone().unwrap_or_default());
        let want = Want { url, size: None, checksum, name: format!("`{url}`") };
        let fetched = transfer::fetch(&self.http, &want, &part, progress);
        fetched.map_err(|stopped| refusal(url, stopped))?;
        let sha256 = transfer::sha256(&part)?;
        let path = folder.join(&sha256);
        std::fs::rename(&part, &path).with_context(|| format!("keeping `{url}`"))?;
        Ok((sha256, path))
    }
}

fn refusal(url: &str, stopped: Stopped) -> anyhow::Error {
    match stopped {
        Stopped::Other(e) => e,
        Stopped::Http(Failure::Unreachable(cause)) => {
            let fault = Fault::new(format!("`{url}` cannot be reached"));
            fault.cause(anyhow::anyhow!(cause)).into()
        }
        Stopped::Http(Failure::Status { code, reason, .. }) => {
            Fault::new(format!("`{url}` answered {code}{reason}")).into()
        }
        Stopped::Http(Failure::Broken(cause)) => {
            let fault = Fault::new(format!("the connection broke while fetching `{url}`"));
            fault.cause(anyhow::anyhow!(cause)).into()
        }
    }
}

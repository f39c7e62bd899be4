//! Several files of a repository at once.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, Result, ensure};

use super::{Hub, Progress, RepoFile, RepoType};

/// Files that are fetched at the same time, as many as Python's client does.
const AT_ONCE: usize = 8;

impl Hub {
    /// Files of a repository, as [`Hub::file`] gives each, eight at a time; `progress` is told the
    /// bytes of all of them. The first failure ends all transfers; what has come is kept.
    ///
    /// # Errors
    /// As [`Hub::file`].
    pub fn files(
        &self,
        ty: RepoType,
        repo: &str,
        commit: &str,
        files: &[RepoFile],
        progress: Progress<'_>,
    ) -> Result<Vec<PathBuf>> {
        let total: u64 = files.iter().map(|file| file.size).sum();
        let have: Vec<AtomicU64> = files.iter().map(|_| AtomicU64::new(0)).collect();
        let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
        let fetched: Vec<Mutex<Option<PathBuf>>> = files.iter().map(|_| Mutex::new(None)).collect();
        let failure: Mutex<Option<anyhow::Error>> = Mutex::new(None);
        let fetch = |at: usize| {
            let told = |bytes, _| {
                have[at].store(bytes, Ordering::Relaxed);
                ensure!(!failed.load(Ordering::Relaxed), "another file could not be fetched");
                progress(have.iter().map(|h| h.load(Ordering::Relaxed)).sum(), total)
            };
            let path = self.file(ty, repo, commit, &files[at], &told)?;
            have[at].store(files[at].size, Ordering::Relaxed);
            *fetched[at].lock().unwrap_or_else(PoisonError::into_inner) = Some(path);
            Ok(())
        };
        std::thread::scope(|scope| {
            for _ in 0..AT_ONCE.min(files.len()) {
                scope.spawn(|| {
                    while !failed.load(Ordering::Relaxed) {
                        let at = next.fetch_add(1, Ordering::Relaxed);
                        if at >= files.len() {
                            return;
                        }
                        if let Err(error) = fetch(at)
                            && !failed.swap(true, Ordering::Relaxed)
                        {
                            *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                        }
                    }
                });
            }
        });
        if let Some(error) = failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(error);
        }
        let fetched = fetched.into_iter().zip(files).map(|(path, file)| {
            let path = path.into_inner().unwrap_or_else(PoisonError::into_inner);
            path.with_context(|| format!("`{}` was not fetched", file.path))
        });
        fetched.collect()
    }
}

//! Fetching one file: resumed where it stopped, checked before it counts.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use sha1::Digest as _;

use super::Progress;
use super::http::{Failure, Http, TRIES, header};
use crate::source::Fault;

/// Time between two words of progress.
const BETWEEN: Duration = Duration::from_millis(100);

/// What a file's content must hash to; hex digits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Checksum {
    /// SHA-1 of `blob LEN\0` and the content, as git names blobs.
    Git(String),
    /// SHA-256 of the content.
    Sha256(String),
}

impl Checksum {
    /// The same kind of digest, of a file.
    pub(super) fn of_file(&self, path: &Path) -> Result<Self> {
        match self {
            Self::Git(_) => git(path).map(Self::Git),
            Self::Sha256(_) => sha256(path).map(Self::Sha256),
        }
    }
}

impl fmt::Display for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Git(hex) => write!(f, "git {hex}"),
            Self::Sha256(hex) => write!(f, "sha256 {hex}"),
        }
    }
}

fn git(path: &Path) -> Result<String> {
    let (file, size) = open(path)?;
    let mut hasher = sha1::Sha1::new();
    hasher.update(format!("blob {size}\0"));
    drain(file, path, |bytes| hasher.update(bytes))?;
    Ok(hex(&hasher.finalize()))
}

/// SHA-256 of a file's content, as hex digits.
pub(super) fn sha256(path: &Path) -> Result<String> {
    let mut hasher = sha2::Sha256::new();
    drain(open(path)?.0, path, |bytes| hasher.update(bytes))?;
    Ok(hex(&hasher.finalize()))
}

fn open(path: &Path) -> Result<(File, u64)> {
    let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    let size = file.metadata()?.len();
    Ok((file, size))
}

fn drain(mut file: File, path: &Path, mut take: impl FnMut(&[u8])) -> Result<()> {
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = file.read(&mut buffer).with_context(|| format!("reading {}", path.display()))?;
        if n == 0 {
            return Ok(());
        }
        take(&buffer[..n]);
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// What is to be fetched.
pub(super) struct Want<'a> {
    /// From where.
    pub(super) url: &'a str,
    /// Bytes, if known.
    pub(super) size: Option<u64>,
    /// What it must hash to; an empty digest takes what comes.
    pub(super) checksum: Checksum,
    /// In messages.
    pub(super) name: String,
}

impl Want<'_> {
    /// Whether any content is taken.
    fn is_free(&self) -> bool {
        matches!(&self.checksum, Checksum::Sha256(s) if s.is_empty())
    }
}

/// Why it stopped.
pub(super) enum Stopped {
    /// The server.
    Http(Failure),
    /// The disk, the content, or the caller.
    Other(anyhow::Error),
}

impl<E: Into<anyhow::Error>> From<E> for Stopped {
    fn from(e: E) -> Self {
        Self::Other(e.into())
    }
}

/// Fetches into `part`, going on with what is there, and checks it. After a success `part` is
/// whole and good; after a wrong content it is gone; else it holds what has come so far.
pub(super) fn fetch(
    http: &Http,
    want: &Want<'_>,
    part: &Path,
    progress: Progress<'_>,
) -> Result<(), Stopped> {
    let mut fresh = !part.exists();
    loop {
        complete(http, want, part, progress)?;
        let found = want.checksum.of_file(part)?;
        if want.is_free() || found == want.checksum {
            return Ok(());
        }
        std::fs::remove_file(part).context("removing a file with wrong content")?;
        // A part left by an earlier try may have been bad; from the start it gets one chance.
        if std::mem::replace(&mut fresh, true) {
            let expected = &want.checksum;
            let message = format!(
                "{} has the wrong content: expected {expected}, received {found}",
                want.name
            );
            let help = "the transfer was damaged or the file was replaced; nothing was kept";
            return Err(Fault::new(message).help(help).into());
        }
    }
}

fn complete(
    http: &Http,
    want: &Want<'_>,
    part: &Path,
    progress: Progress<'_>,
) -> Result<(), Stopped> {
    let mut tried = 0;
    // What is not checked at the end may change between two tries: it goes on only with the
    // server's word that it is still the same.
    let mut validator: Option<String> = None;
    loop {
        let file = OpenOptions::new().create(true).append(true).open(part);
        let mut file = file.with_context(|| format!("writing {}", part.display()))?;
        let mut have = file.metadata()?.len();
        if want.size.is_some_and(|size| have > size) {
            file.set_len(0)?;
            have = 0;
        }
        if want.size == Some(have) {
            file.sync_all().context("writing a download to disk")?;
            return Ok(());
        }
        if have > 0 && want.is_free() && validator.is_none() {
            file.set_len(0)?;
            have = 0;
        }
        let (failure, wait) = match http.get_once(want.url, have, validator.as_deref()) {
            Err((Failure::Status { code: 416, .. }, _)) if have > 0 => {
                file.set_len(0)?;
                (Failure::Broken("the server has fewer bytes than were fetched".into()), None)
            }
            Err(failed) => failed,
            Ok(response) => {
                let from = resumed_at(&response).filter(|_| response.status().as_u16() == 206);
                if from.unwrap_or(0) != have {
                    file.set_len(0)?;
                }
                if want.is_free() {
                    validator = strong_validator(&response);
                }
                let start = file.metadata()?.len();
                match receive(response, &mut file, want, start, progress)? {
                    Ok(end) if want.size.is_none_or(|size| size == end) => {
                        file.sync_all().context("writing a download to disk")?;
                        return Ok(());
                    }
                    Ok(end) => {
                        if end > start {
                            tried = 0;
                        }
                        (Failure::Broken(format!("{} ended after {end} bytes", want.name)), None)
                    }
                    Err(cause) => {
                        if file.metadata()?.len() > start {
                            tried = 0;
                        }
                        (Failure::Broken(cause), None)
                    }
                }
            }
        };
        tried += 1;
        if !http.passes(&failure) || tried >= TRIES {
            return Err(Stopped::Http(failure));
        }
        pause(http.pause(tried, wait), want, part, progress)?;
    }
}

/// Waits, and asks now and then whether to go on.
fn pause(
    time: Duration,
    want: &Want<'_>,
    part: &Path,
    progress: Progress<'_>,
) -> Result<(), Stopped> {
    let start = Instant::now();
    let have = std::fs::metadata(part).map_or(0, |stat| stat.len());
    while let Some(left) = time.checked_sub(start.elapsed()).filter(|left| !left.is_zero()) {
        progress(have, want.size.unwrap_or(0))?;
        std::thread::sleep(left.min(BETWEEN));
    }
    Ok(())
}

/// The first byte's position that `Content-Range: bytes A-B/N` names.
fn resumed_at(response: &super::http::Response) -> Option<u64> {
    let range = header(response, "content-range")?;
    range.trim().strip_prefix("bytes ")?.split('-').next()?.trim().parse().ok()
}

/// What tells one content of a URL from another: a strong `ETag`, else `Last-Modified`.
fn strong_validator(response: &super::http::Response) -> Option<String> {
    let tag = header(response, "etag").filter(|tag| !tag.starts_with("W/"));
    tag.or_else(|| header(response, "last-modified"))
}

/// Appends a body to the file; the outer error is the disk's or the caller's, the inner one the
/// server's.
fn receive(
    response: super::http::Response,
    file: &mut File,
    want: &Want<'_>,
    start: u64,
    progress: Progress<'_>,
) -> Result<Result<u64, String>> {
    let length = header(&response, "content-length").and_then(|s| s.parse::<u64>().ok());
    let total = want.size.or(length.map(|n| n + start)).unwrap_or(0);
    let mut body = response.into_body().into_reader();
    let mut buffer = vec![0; 1 << 18];
    let mut have = start;
    let mut told: Option<Instant> = None;
    loop {
        let n = match body.read(&mut buffer) {
            Ok(0) if length.is_some_and(|n| start + n > have) => {
                return Ok(Err(format!("the body ended after {have} bytes")));
            }
            Ok(0) => return Ok(Ok(have)),
            Ok(n) => n,
            Err(e) => return Ok(Err(e.to_string())),
        };
        have += n as u64;
        let more = want.size.is_some_and(|size| have > size);
        ensure!(!more, "{} is larger than the {total} bytes it should have", want.name);
        file.write_all(&buffer[..n]).context("writing a download to disk")?;
        if told.is_none_or(|at| at.elapsed() > BETWEEN) || have == total {
            progress(have, total)?;
            told = Some(Instant::now());
        }
    }
}

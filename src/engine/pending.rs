//! A step on its way to its result: waiting for its slots, or under way.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use super::bind::Bound;
use super::slots::Grant;
use crate::lineage::Why;
use crate::step::Needs;
use crate::store::{Disk, StoreError};

/// A miss that waits for its slots.
pub(super) struct Queued {
    pub(super) bound: Arc<Bound>,
    pub(super) why: Why,
    pub(super) needs: Needs,
    /// The attempt to come, from 1.
    pub(super) attempt: u32,
    /// Not before, if an attempt has failed.
    pub(super) due: Option<Instant>,
}

/// An attempt under way.
pub(super) struct Running {
    pub(super) queued: Queued,
    /// What it was lent, until it needs that no longer.
    pub(super) grant: Option<Grant>,
    pub(super) cancel: Arc<AtomicBool>,
    pub(super) deadline: Option<Instant>,
    pub(super) timed_out: bool,
    pub(super) started: Instant,
    pub(super) log: Log,
}

/// The log of a step in this run; its file is made with its first line.
pub(super) struct Log {
    pub(super) path: PathBuf,
    file: Option<File>,
}

impl Log {
    pub(super) fn at(path: PathBuf) -> Self {
        Self { path, file: None }
    }

    /// Adds lines.
    pub(super) fn append(&mut self, disk: &Disk, lines: &str) -> Result<(), StoreError> {
        let file = match &mut self.file {
            Some(file) => file,
            none => none.insert(disk.open_append(&self.path)?),
        };
        disk.append(file, lines.as_bytes(), &self.path)
    }
}

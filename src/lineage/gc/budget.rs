//! What a collection may remove.

use std::time::Duration;

use crate::lineage::unix_ms;

/// What may go beside that which nothing refers to. All that is set must allow it.
#[derive(Debug, Clone)]
pub struct Budget {
    /// Runs that are not among the newest so many of their pipeline; 1 where another budget is set
    /// and this is not.
    pub keep_runs: Option<usize>,
    /// Runs that ended longer ago; with them damaged files and attempts that were set aside.
    pub older_than: Option<Duration>,
    /// No more than it takes to get the store down to this many bytes, the oldest first.
    pub max_bytes: Option<u64>,
    /// What nothing refers to stays while it is younger.
    pub grace: Duration,
    /// The time, in Unix milliseconds.
    pub now_unix_ms: u64,
}

impl Budget {
    /// Longer than any file is on its way from a step into a record.
    pub const GRACE: Duration = Duration::from_secs(3600);

    /// Only what nothing refers to.
    pub fn none() -> Self {
        let (keep_runs, older_than, max_bytes) = (None, None, None);
        Self { keep_runs, older_than, max_bytes, grace: Self::GRACE, now_unix_ms: unix_ms() }
    }

    pub(super) fn is_set(&self) -> bool {
        self.keep_runs.is_some() || self.older_than.is_some() || self.max_bytes.is_some()
    }

    pub(super) fn is_past(&self, unix_ms: u64, age: Duration) -> bool {
        u128::from(self.now_unix_ms.saturating_sub(unix_ms)) >= age.as_millis()
    }
}

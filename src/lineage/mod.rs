//! Records, runs, the lock: how everything came to be.

mod lock;
mod record;
mod results;
mod runs;
mod trace;
mod why;

pub use lock::{Lock, LockMode};
pub use record::{Difference, Loaded, Made, Record, Wrote};
pub use results::{Results, StepResult, is_measured};
pub use runs::{
    Journal, Run, RunInfo, Runs, State, Status, StepSummary, Summary, Unchanged, unix_ms,
};
pub use trace::{Lineage, Link, trace};
pub(crate) use why::member_path;
pub use why::{Change, Current, Past, Why, difference};

//! Records, runs, the lock: how everything came to be.

mod curves;
mod gc;
mod lock;
mod past;
mod pins;
mod record;
mod results;
mod runs;
mod trace;
mod uses;
mod verify;
mod why;

pub use curves::{Curve, Curves};
pub use gc::{Budget, Class, Dropped, Removal, Sweep, plan_sweep, sweep};
pub use lock::{Lock, LockMode};
pub use past::{Current, Likeness, Past};
pub use pins::{Pin, Pins};
pub use record::{Difference, Loaded, Made, Record, Wrote};
pub use results::{Results, StepResult, is_measured};
pub use runs::{
    Journal, Run, RunInfo, Runs, State, Status, StepSummary, Summary, Unchanged, unix_ms,
};
pub use trace::{Lineage, Link, trace};
pub use verify::{Checked, Finding, Lost, Part, verify};
pub(crate) use why::member_path;
pub use why::{Change, Since, Why, difference};

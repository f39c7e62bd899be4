//! Plan in, run out: scheduler, cache decision, attempts, workers, events.

mod event;
mod forecast;
mod session;

pub use event::{Outcome, RunEvent};
pub use forecast::{Forecast, Prospect};
pub use session::{Options, Session, WorkerCommand};

use std::path::Path;

use anyhow::Result;

use crate::hub::Hub;
use crate::pipeline::Plan;
use crate::step::Kind;

/// Runs a plan.
///
/// # Errors
/// When the plan cannot be resolved ([`Unresolved`] in the chain) or the store cannot be written
/// ([`StoreError`](crate::store::StoreError) in the chain). A failed step is not an error here:
/// see [`Outcome::status`].
pub fn run(
    _plan: &Plan,
    _session: &Session<'_>,
    _observe: &mut dyn FnMut(&RunEvent),
) -> Result<Outcome> {
    anyhow::bail!("not built yet")
}

/// What a run would do.
///
/// # Errors
/// As [`run`].
pub fn forecast(_plan: &Plan, _session: &Session<'_>) -> Result<Vec<Forecast>> {
    anyhow::bail!("not built yet")
}

/// Does one attempt in this process: what the hidden command `flow worker DIR` calls.
/// `Ok(false)` when the attempt failed (its runner has the reason).
///
/// # Errors
/// When the directory holds no request that this program can serve.
pub fn worker(_dir: &Path, _kinds: &'static [Kind], _hub: &Hub) -> Result<bool> {
    anyhow::bail!("not built yet")
}

/// What is missing outside: every failure to resolve a name, with its step.
#[derive(Debug)]
pub struct Unresolved(pub Vec<(String, crate::source::Span, anyhow::Error)>);

impl std::fmt::Display for Unresolved {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (i, (step, _, error)) in self.0.iter().enumerate() {
            let newline = if i == 0 { "" } else { "\n" };
            write!(f, "{newline}{step}: {error:#}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Unresolved {}

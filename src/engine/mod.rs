//! Plan in, run out: scheduler, cache decision, attempts, workers, events.
//!
//! [`run`] pins outside names, then decides step by step: bind inputs to the records of their
//! producers, take the key, look it up. A hit costs a few `stat`s and starts nothing; a miss is
//! explained and attempted, on a thread or in a worker, as soon as its slots are free. Because
//! keys are over content, a step that gives the bytes it gave before cuts off what follows.

mod attempt;
mod bind;
mod check;
mod durable;
mod ended;
mod estimate;
mod event;
mod forecast;
mod gpu;
mod hands;
mod machine;
mod outputs;
mod pending;
mod placement;
mod prepare;
mod ready;
mod reproduce;
mod retry;
mod rooms;
mod run;
mod scratch;
mod session;
mod slots;
mod unchanged;
mod worker;

pub use estimate::{Cost, Estimate};
pub use event::{Outcome, RunEvent};
pub use forecast::{Forecast, Prospect, forecast};
pub use gpu::Gpu;
pub use machine::memory_bytes;
pub use prepare::{Unresolved, Updated, update};
pub use reproduce::{Reproduced, Verdict, reproduce};
pub use run::run;
pub use session::{Options, Session, WorkerCommand};
pub use unchanged::unchanged;
pub use worker::worker;

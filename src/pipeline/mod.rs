//! YAML to `Pipeline` (what was written, maybe wrong) to [`Plan`] (checked).

mod plan;

pub use plan::{Edge, Instance, Output, Plan, Point, Policy, StepId};

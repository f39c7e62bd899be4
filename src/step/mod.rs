//! The contract between step kinds and the engine.
//!
//! A step is a struct. Its fields are its parameters; a field of type [`Input`] is an edge; its
//! serialised form, with each edge replaced by the digests of what flows along it, is its cache
//! key; the record of having run it is its lineage.
//!
//! Its life: the plan parses it from `with:` with placeholders for edges, so that types are
//! checked before anything runs; [`StepKind::resolve`] pins outside names; when its inputs exist
//! the engine binds their digests and parses it again; [`StepKind::narrow`] drops the ports that
//! it does not read; it is serialised and hashed; and on a miss it is run.

mod context;
mod dirs;
mod input;
mod kind;
mod outside;

pub use context::{CHECKPOINT_EVERY, Context, Device, Event, Facts, Produced, Refused};
pub use dirs::{Dirs, Shelf};
pub use input::{Binding, FileInput, Gather, Input, Member, Text, TextPiece, key_form};
pub use kind::{Added, BadField, Cpu, Kind, Needs, Ports, Problem, Step, StepKind};
pub use outside::Outside;

//! A step's look at its inputs before it is queued.

use std::sync::{Mutex, PoisonError};

use anyhow::Result;

use super::attempt::{guarded, set};
use super::bind::Bound;
use super::{Session, machine, scratch};
use crate::pipeline::Instance;
use crate::step::{CHECKPOINT_EVERY, Context, Dirs, Event, Produced};

/// Lets a step look at its inputs' headers; with what it said.
pub(super) fn check_inputs(
    session: &Session<'_>,
    run: &str,
    instance: &Instance,
    bound: &Bound,
) -> (Result<()>, Vec<Event>) {
    let (store, options) = (&session.store, &session.options);
    let said = Mutex::new(Vec::new());
    let emit = |event| said.lock().unwrap_or_else(PoisonError::into_inner).push(event);
    let attempt_dir = scratch::path(store, run, &bound.key);
    let (device, compute) = options.place(instance);
    let cx = Context {
        store: store.clone(),
        hub: session.hub,
        attempt_dir: attempt_dir.clone(),
        dirs: &Dirs::default(),
        key: bound.key,
        build: machine::BUILD.into(),
        checkpoint_every: CHECKPOINT_EVERY,
        grace: options.grace,
        threads: options.jobs,
        device,
        compute: compute.to_owned(),
        env: set(&instance.env),
        cancel: session.cancel,
        emit: &emit,
        rest: &|| {},
        produced: Produced::default(),
    };
    let checked = guarded(|| bound.step.check_inputs(&cx));
    drop(cx);
    let _ = std::fs::remove_dir_all(attempt_dir);
    (checked, said.into_inner().unwrap_or_else(PoisonError::into_inner))
}

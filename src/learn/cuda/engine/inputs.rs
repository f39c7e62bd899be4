//! Where the inputs of the layers wait for the backward.
//!
//! With gradient checkpointing they are all that a layer keeps, and they wait in memory of the
//! host: three places on the GPU take turns, and each input is copied away and back while others
//! are worked on. Where the host has no room, and without checkpointing, each has a place of its
//! own on the GPU.

use std::cell::RefCell;

use anyhow::Result;

use super::State;
use crate::learn::cuda::away::{Copies, PLACES, Pinned};
use crate::learn::cuda::device::Mat;
use crate::learn::cuda::pass::Pass;

/// The host's memory is asked for in multiples of this.
const STEP: usize = 64 << 20;

/// What is needed to keep inputs on the host.
#[derive(Debug)]
pub(super) struct Away {
    pub(super) copies: Copies,
    room: RefCell<Option<Pinned>>,
}

impl Away {
    pub(super) fn new() -> Result<Self> {
        Ok(Self { copies: Copies::new()?, room: RefCell::default() })
    }

    /// Room for so many bytes, if the host has it.
    fn room(&self, state: &State, bytes: usize) -> Option<u64> {
        if state.device.dry.get() {
            return Some(0);
        }
        let mut room = self.room.borrow_mut();
        if room.as_ref().is_none_or(|r| r.bytes() < bytes) {
            // Copies of earlier steps have ended: a step waits for its own.
            *room = None;
            *room = Pinned::new(&state.device, bytes.next_multiple_of(STEP));
        }
        room.as_ref().map(Pinned::address)
    }
}

/// The inputs of the layers of one step, and the last layer's result behind them.
pub(super) struct Inputs<'a> {
    state: &'a State,
    places: Vec<Mat>,
    bytes: usize,
    /// The first that the backward reads.
    lowest: usize,
    away: Option<(&'a Copies, u64)>,
}

impl<'a> Inputs<'a> {
    pub(super) fn new(state: &'a State, p: &Pass<'_>, lowest: usize) -> Result<Self> {
        let (count, ld) = (state.count(), state.input_ld());
        let bytes = p.tokens * ld * state.device.float.size();
        let away = (state.checkpointing && count > PLACES).then_some(&state.away);
        let away = away.and_then(|a| Some((&a.copies, a.room(state, bytes * count)?)));
        let own = if away.is_some() { PLACES } else { count + 1 };
        let places = (0..own).map(|_| p.saved(ld)).collect::<Result<_>>()?;
        Ok(Self { state, places, bytes, lowest, away })
    }

    /// Where an input is.
    pub(super) fn at(&self, i: usize) -> Mat {
        self.places[i % self.places.len()]
    }

    /// Whether an input goes away and comes back: the last ones stay where they are.
    fn travels(&self, i: usize) -> bool {
        i >= self.lowest && i + PLACES <= self.state.count()
    }

    fn on_host(&self, host: u64, i: usize) -> u64 {
        host + (i * self.bytes) as u64
    }

    /// An input was written and is about to be read: room is made for the next.
    pub(super) fn written(&self, i: usize) -> Result<()> {
        let Some((copies, host)) = self.away else { return Ok(()) };
        let device = &self.state.device;
        if self.travels(i) {
            let way = (self.at(i).at, self.on_host(host, i));
            copies.copy(device, i % PLACES, way, self.bytes)?;
        }
        copies.wait(device, (i + 1) % PLACES)
    }

    /// A layer's backward is about to read its input; the layer above is done.
    pub(super) fn wanted(&self, i: usize) -> Result<()> {
        let Some((copies, host)) = self.away else { return Ok(()) };
        let device = &self.state.device;
        if i >= self.lowest + 2 && self.travels(i - 2) {
            let way = (self.on_host(host, i - 2), self.at(i - 2).at);
            copies.copy(device, (i - 2) % PLACES, way, self.bytes)?;
        }
        copies.wait(device, i % PLACES)
    }
}

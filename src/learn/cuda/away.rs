//! Memory of the host that the GPU reads and writes, and copies beside the computation.

// Calls of the driver, see device.rs.
#![allow(unsafe_code)]

use std::ffi::c_void;

use anyhow::Result;
use cudarc::driver::{result, sys};

use super::device::{Device, failed};

/// Memory of the host that stays where it is, so that the GPU reaches it itself.
#[derive(Debug)]
pub(super) struct Pinned {
    context: sys::CUcontext,
    at: *mut c_void,
    bytes: usize,
}

// Memory that is this value's alone.
unsafe impl Send for Pinned {}

impl Pinned {
    /// So many bytes; none when the host does not give them.
    pub(super) fn new(device: &Device, bytes: usize) -> Option<Self> {
        // Safety: the context of the device is bound.
        let at = unsafe { result::malloc_host(bytes, 0) }.ok()?;
        Some(Self { context: device.context(), at, bytes })
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Its address, which is the same for the GPU.
    pub(super) fn address(&self) -> u64 {
        self.at as u64
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // Safety: nothing uses it any more; an error leaves it to the end of the process.
        unsafe {
            let _ = result::ctx::set_current(self.context);
            let _ = result::free_host(self.at);
        }
    }
}

/// Places on the GPU that take turns.
pub(super) const PLACES: usize = 3;

/// Copies of what lies in one of a few places, while other work goes on.
#[derive(Debug)]
pub(super) struct Copies {
    stream: sys::CUstream,
    /// The work that a copy must wait for.
    ready: sys::CUevent,
    /// The last copy of each place.
    done: [sys::CUevent; PLACES],
}

// Handles of the driver, which is thread-safe.
unsafe impl Send for Copies {}

impl Copies {
    pub(super) fn new() -> Result<Self> {
        let kind = result::stream::StreamKind::NonBlocking;
        let event =
            || result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING).map_err(failed);
        let stream = result::stream::create(kind).map_err(failed)?;
        Ok(Self { stream, ready: event()?, done: [event()?, event()?, event()?] })
    }

    /// Begins a copy after all that the device was told so far; one side is [`Pinned`].
    pub(super) fn copy(
        &self,
        device: &Device,
        place: usize,
        (from, to): (u64, u64),
        bytes: usize,
    ) -> Result<()> {
        if device.dry.get() {
            return Ok(());
        }
        let always = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // Safety: both sides are as large as said, and stay until the device waited for the copy.
        unsafe {
            result::event::record(self.ready, device.stream).map_err(failed)?;
            result::stream::wait_event(self.stream, self.ready, always).map_err(failed)?;
            sys::cuMemcpyAsync(to, from, bytes, self.stream).result().map_err(failed)?;
            result::event::record(self.done[place], self.stream).map_err(failed)
        }
    }

    /// What the device is told from now on waits for the last copy of a place.
    pub(super) fn wait(&self, device: &Device, place: usize) -> Result<()> {
        if device.dry.get() {
            return Ok(());
        }
        let always = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // Safety: stream and event are alive.
        unsafe { result::stream::wait_event(device.stream, self.done[place], always) }
            .map_err(failed)
    }

    /// Waits for all copies.
    pub(super) fn synchronize(&self) -> Result<()> {
        // Safety: the stream is alive.
        unsafe { result::stream::synchronize(self.stream) }.map_err(failed)
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        // Safety: nothing uses them any more; an error leaves them to the end of the process.
        unsafe {
            let _ = result::stream::synchronize(self.stream);
            for event in self.done.into_iter().chain([self.ready]) {
                let _ = result::event::destroy(event);
            }
            let _ = result::stream::destroy(self.stream);
        }
    }
}

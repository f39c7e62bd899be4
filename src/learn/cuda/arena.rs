//! Memory of the GPU as a stack that grows where it stands.
//!
//! Addresses are reserved once; memory is put under them as the stack first reaches there, and
//! stays.
//! So what training takes is exactly its largest extent, nothing is allocated after the first step,
//! and nothing moves.

// Calls of the driver, see device.rs.
#![allow(unsafe_code)]

use std::cell::Cell;

use anyhow::Result;
use cudarc::driver::sys::{self, CUresult};

use super::device::{Device, failed};

/// Every allocation begins at a multiple of this.
const ALIGN: usize = 256;
/// What the stack grows by at least.
const STEP: usize = 8 << 20;

/// A stack of memory on a GPU.
#[derive(Debug)]
pub(super) struct Arena {
    base: u64,
    reserved: usize,
    ordinal: i32,
    mapped: Cell<usize>,
    used: Cell<usize>,
    /// The highest that it stood since [`Arena::count`].
    highest: Cell<usize>,
    /// Nothing is put under what is allocated: only its extent is wanted.
    counting: Cell<bool>,
}

impl Arena {
    /// An empty one.
    pub(super) fn new(device: &Device) -> Result<Self> {
        let (total, _) = device.memory()?;
        let (used, mapped, highest) = (Cell::new(0), Cell::new(0), Cell::new(0));
        let reserved = total.next_multiple_of(1 << 30);
        let mut base = 0;
        // Safety: writes an address into `base`.
        unsafe { sys::cuMemAddressReserve(&raw mut base, reserved, 0, 0, 0) }
            .result()
            .map_err(failed)?;
        let ordinal = device.ordinal();
        let counting = Cell::new(false);
        Ok(Self { base, reserved, ordinal, mapped, used, highest, counting })
    }

    /// Bytes that it has taken from the GPU.
    pub(super) fn mapped(&self) -> usize {
        self.mapped.get()
    }

    /// How high it stands, for [`Arena::release`].
    pub(super) fn mark(&self) -> usize {
        self.used.get()
    }

    /// Gives back all that was allocated since the mark.
    pub(super) fn release(&self, mark: usize) {
        self.used.set(mark);
    }

    /// Gives all of its memory back to the GPU, which must be done with it.
    pub(super) fn empty(&self) -> Result<()> {
        self.used.set(0);
        let mapped = self.mapped.replace(0);
        if mapped == 0 {
            return Ok(());
        }
        // Safety: this is all that was put under the addresses.
        unsafe { sys::cuMemUnmap(self.base, mapped) }.result().map_err(failed)
    }

    /// So many bytes.
    ///
    /// # Errors
    /// When the GPU has no more.
    pub(super) fn alloc(&self, bytes: usize) -> Result<u64> {
        let start = self.used.get();
        let end = start + bytes.max(1).next_multiple_of(ALIGN);
        if end > self.mapped.get() && !self.counting.get() {
            self.grow(end)?;
        }
        self.used.set(end);
        self.highest.set(self.highest.get().max(end));
        Ok(self.base + start as u64)
    }

    /// From now on counts what would be taken, or takes it again.
    pub(super) fn count(&self, on: bool) {
        self.counting.set(on);
        self.highest.set(self.used.get());
    }

    /// Bytes that it would have taken from the GPU since it counts.
    pub(super) fn counted(&self) -> usize {
        self.highest.get().next_multiple_of(STEP)
    }

    fn grow(&self, end: usize) -> Result<()> {
        let have = self.mapped.get();
        let more = (end - have).next_multiple_of(STEP);
        if have + more > self.reserved {
            return Err(OutOfMemory { asked: more }.into());
        }
        let location = sys::CUmemLocation {
            type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE,
            id: self.ordinal,
        };
        let kind = sys::CUmemAllocationProp {
            type_: sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
            requestedHandleTypes: sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_NONE,
            location,
            win32HandleMetaData: std::ptr::null_mut(),
            allocFlags: sys::CUmemAllocationProp_st__bindgen_ty_1 {
                compressionType: 0,
                gpuDirectRDMACapable: 0,
                usage: 0,
                reserved: [0; 4],
            },
        };
        let mut handle = 0;
        // Safety: writes a handle.
        match unsafe { sys::cuMemCreate(&raw mut handle, more, &raw const kind, 0) } {
            CUresult::CUDA_SUCCESS => {}
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => return Err(OutOfMemory { asked: more }.into()),
            other => return Err(failed(cudarc::driver::result::DriverError(other))),
        }
        let at = self.base + have as u64;
        let access = sys::CUmemAccessDesc {
            location,
            flags: sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        };
        // Safety: the addresses are reserved, and nothing is mapped at them yet.
        unsafe {
            sys::cuMemMap(at, more, 0, handle, 0).result().map_err(failed)?;
            // The mapping keeps the memory.
            sys::cuMemRelease(handle).result().map_err(failed)?;
            sys::cuMemSetAccess(at, more, &raw const access, 1).result().map_err(failed)?;
        }
        self.mapped.set(have + more);
        Ok(())
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // An error leaves it to the end of the process.
        let _ = self.empty();
        // Safety: the addresses are this arena's, and nothing is under them.
        let _ = unsafe { sys::cuMemAddressFree(self.base, self.reserved) };
    }
}

/// The GPU has no more memory.
#[derive(Debug, thiserror::Error)]
#[error("the GPU has no {} MiB more", asked >> 20)]
pub(super) struct OutOfMemory {
    asked: usize,
}

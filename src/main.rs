//! The program: the library over its own table of kinds.

use std::process::ExitCode;

fn main() -> ExitCode {
    flow::main(flow::kinds::ALL)
}

/// The allocator. A worker computes: mimalloc keeps pages between training steps, where the system's
/// would return them and fault them in again. The program itself is over in 2 ms where nothing has
/// changed: to set mimalloc up would be a twentieth of that.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[expect(
    unsafe_code,
    reason = "an allocator is unsafe, and has to be told before it is first used"
)]
mod memory {
    use std::alloc::{GlobalAlloc, Layout, System};
    use std::ffi::{CStr, c_char, c_int};
    use std::sync::atomic::{AtomicU8, Ordering::Relaxed};

    use mimalloc::MiMalloc;

    #[global_allocator]
    static ALLOCATOR: Allocator = Allocator;

    const OPEN: u8 = 0;
    const SYSTEM: u8 = 1;
    const WORKER: u8 = 2;

    /// Which of the two it is; it never changes once something has been allocated.
    static CHOSEN: AtomicU8 = AtomicU8::new(OPEN);

    struct Allocator;

    fn is_worker() -> bool {
        CHOSEN.load(Relaxed) == WORKER
    }

    // SAFETY: all calls go to one of two sound allocators, and always to the same.
    unsafe impl GlobalAlloc for Allocator {
        unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
            // SAFETY: as promised to this function.
            unsafe {
                match CHOSEN.load(Relaxed) {
                    WORKER => return MiMalloc.alloc(layout),
                    // Before the arguments were seen, by one thread.
                    OPEN => CHOSEN.store(SYSTEM, Relaxed),
                    _ => {}
                }
                System.alloc(layout)
            }
        }

        unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
            // SAFETY: as promised to this function.
            unsafe {
                match CHOSEN.load(Relaxed) {
                    WORKER => return MiMalloc.alloc_zeroed(layout),
                    OPEN => CHOSEN.store(SYSTEM, Relaxed),
                    _ => {}
                }
                System.alloc_zeroed(layout)
            }
        }

        unsafe fn realloc(&self, old: *mut u8, layout: Layout, size: usize) -> *mut u8 {
            // SAFETY: as promised to this function.
            unsafe {
                match is_worker() {
                    true => MiMalloc.realloc(old, layout, size),
                    false => System.realloc(old, layout, size),
                }
            }
        }

        unsafe fn dealloc(&self, old: *mut u8, layout: Layout) {
            // SAFETY: as promised to this function.
            unsafe {
                match is_worker() {
                    true => MiMalloc.dealloc(old, layout),
                    false => System.dealloc(old, layout),
                }
            }
        }
    }

    extern "C" fn choose(count: c_int, arguments: *const *const c_char) {
        // SAFETY: the C library passes the arguments of `main`, `count` of them.
        let worker = unsafe { count > 1 && CStr::from_ptr(*arguments.add(1)) == c"worker" };
        let choice = if worker { WORKER } else { SYSTEM };
        let _ = CHOSEN.compare_exchange(OPEN, choice, Relaxed, Relaxed);
    }

    #[used]
    #[unsafe(link_section = ".init_array")]
    static CHOOSE: extern "C" fn(c_int, *const *const c_char) = choose;
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

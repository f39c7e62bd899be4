//! The program: the library over its own table of kinds.

use std::process::ExitCode;

/// Keeps pages between training steps, where the system allocator would return and fault them in
/// again.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    flow::main(flow::kinds::ALL)
}

/// Huge pages and much address space are for workers, which compute. The first of the pages, filled
/// with zeros before `main`, would be a tenth of a run in which nothing has changed, and thousands
/// of small things would spread over many; the tables of a gigabyte are another 0.1 ms.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[expect(unsafe_code, reason = "the allocator has to be told before it is first used")]
mod pages {
    use std::ffi::{CStr, c_char, c_int, c_long};

    /// Whether mimalloc asks for huge pages: `mi_option_allow_thp` in `mimalloc.h` of version 3.
    const ALLOW_HUGE: c_int = 43;

    /// How much address space it takes at a time, in KiB: `mi_option_arena_reserve`.
    const RESERVE: c_int = 23;

    unsafe extern "C" {
        fn mi_process_init();
        fn mi_option_set(option: c_int, value: c_long);
        fn mi_version() -> c_int;
    }

    extern "C" fn choose(count: c_int, arguments: *const *const c_char) {
        // SAFETY: the C library passes the arguments of `main`, `count` of them. The functions of
        // mimalloc have these signatures, may be called at any time, and allocate nothing.
        unsafe {
            let worker = count > 1 && CStr::from_ptr(*arguments.add(1)) == c"worker";
            // Once it has started: before, it would take this for a wish to have huge pages off
            // for this process and all that it starts.
            mi_process_init();
            if !worker && mi_version() / 10_000 == 3 {
                mi_option_set(ALLOW_HUGE, 0);
                mi_option_set(RESERVE, 64 << 10);
            }
        }
    }

    #[used]
    #[unsafe(link_section = ".init_array")]
    static CHOOSE: extern "C" fn(c_int, *const *const c_char) = choose;
}

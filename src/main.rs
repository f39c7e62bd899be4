//! The program: the library over its own table of kinds.

use std::process::ExitCode;

/// Keeps pages between training steps, where the system allocator would return and fault them in
/// again.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    flow::main(flow::kinds::ALL)
}

//! How the program is linked.

use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let is = |name: &str, value: &str| std::env::var(name).is_ok_and(|v| v == value);
    if is("CARGO_CFG_TARGET_OS", "linux") && is("CARGO_CFG_TARGET_ENV", "gnu") {
        // At a fixed address 70,000 pointers in tables (most of them candle's and arrow's) need no
        // correction when the program starts: 0.7 of 2 ms, which a run pays in which nothing has
        // changed. `benches/runner.rs` shows it.
        println!("cargo:rustc-link-arg-bins=-no-pie");
        unwinder();
    }
}

/// Brings the unwinder in from the compiler's archive, ahead of the shared library that would be
/// taken otherwise: to map that one, and to let it look at the processor, is another 0.1 ms of each
/// start. Where there is no archive, the shared library serves.
fn unwinder() {
    let compiler = std::env::var_os("CC").unwrap_or_else(|| "cc".into());
    let answer = Command::new(compiler).arg("-print-file-name=libgcc_eh.a").output();
    let path = answer.ok().and_then(|answer| String::from_utf8(answer.stdout).ok());
    let folder = path.as_deref().map(|path| Path::new(path.trim())).and_then(Path::parent);
    if let Some(folder) = folder.filter(|folder| folder.join("libgcc_eh.a").is_file()) {
        println!("cargo:rerun-if-env-changed=CC");
        println!("cargo:rustc-link-search=native={}", folder.display());
        println!("cargo:rustc-link-lib=static=gcc_eh");
    }
}

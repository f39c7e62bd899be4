//! How the program is linked.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let is = |name: &str, value: &str| std::env::var(name).is_ok_and(|v| v == value);
    if is("CARGO_CFG_TARGET_OS", "linux") && is("CARGO_CFG_TARGET_ENV", "gnu") {
        // At a fixed address 70,000 pointers in tables (most of them candle's and arrow's) need no
        // correction when the program starts: 0.7 of 2 ms, which a run pays in which nothing has
        // changed. `benches/runner.rs` shows it.
        println!("cargo:rustc-link-arg-bins=-no-pie");
    }
}

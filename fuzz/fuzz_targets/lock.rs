//! A lock file: read or refused; what was read is the same after it was written and read again.

#![no_main]

use flow::lineage::{Lock, LockMode};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let path = std::env::temp_dir().join(format!("fuzz-{}.lock", std::process::id()));
    std::fs::write(&path, bytes).unwrap();
    if let Ok(lock) = Lock::load(&path, LockMode::Grow) {
        let lines = lock.entries().iter().map(|(name, identity)| format!("{name} = {identity}\n"));
        std::fs::write(&path, lines.collect::<String>()).unwrap();
        let again = Lock::load(&path, LockMode::Grow).expect("what was read can be written");
        assert_eq!(again.entries(), lock.entries());
    }
});

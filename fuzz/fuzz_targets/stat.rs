//! The stat table: lines of other writers, torn or damaged, must never give a wrong digest.

#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

use flow::digest::Digest;
use flow::store::Store;
use libfuzzer_sys::fuzz_target;

/// A store, its stat table, and a file that is old enough to be in it.
static PLACE: LazyLock<(tempfile::TempDir, PathBuf, PathBuf)> = LazyLock::new(|| {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "content").unwrap();
    std::thread::sleep(std::time::Duration::from_millis(2100));
    let root = dir.path().join("store");
    let store = Store::open(&root).unwrap();
    store.digest_of_file(&file).unwrap();
    let tables = std::fs::read_dir(root.join("stat")).unwrap();
    let table = tables.map(|e| e.unwrap().path()).next().expect("a settled file is remembered");
    (dir, table, file)
});

fuzz_target!(|bytes: &[u8]| {
    let (dir, table, file) = &*PLACE;
    let mut text = bytes.to_vec();
    // A line with a check sum that fits, so that what stands before it is read.
    if let Ok(body) = std::str::from_utf8(bytes) {
        for line in body.lines() {
            let line = line.rsplit_once(' ').map_or(line, |(body, _)| body);
            let check = Digest::of(line.as_bytes()).short();
            text.extend_from_slice(format!("\n{line} {check}\n").as_bytes());
        }
    }
    std::fs::write(table, &text).unwrap();
    let store = Store::open(&dir.path().join("store")).unwrap();
    let (_, size) = store.digest_of_file(file).expect("the table is only an accelerator");
    assert_eq!(size, 7);
});

//! The files of a run: how it began, its events, its summary.

#![no_main]

use std::sync::LazyLock;

use flow::lineage::Runs;
use flow::store::Store;
use libfuzzer_sys::fuzz_target;

static STORE: LazyLock<(tempfile::TempDir, Store)> = LazyLock::new(|| {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    (dir, store)
});

const INFO: &str = include_str!("../seeds/journal/run.json");

fuzz_target!(|bytes: &[u8]| {
    let store = &STORE.1;
    let runs = Runs::of(store);
    let dir = store.root().join("runs/20260101-000000-0000");
    std::fs::create_dir_all(&dir).unwrap();
    let names = std::fs::read_dir(&dir).unwrap().map(|e| e.unwrap().file_name());
    let mut names: Vec<_> = names.filter_map(|n| n.into_string().ok()).collect();
    names.extend(["run.json", "summary.json", "events.jsonl"].map(str::to_owned));
    // The same bytes as one file, and then as all of them.
    for name in &names {
        std::fs::write(dir.join(name), bytes).unwrap();
    }
    let _ = runs.list();
    std::fs::write(dir.join("run.json"), INFO).unwrap();
    let run = runs.find("latest").expect("its beginning is whole");
    let _ = run.events();
    let _ = run.step("train@lora.r=8");
    let _ = run.log_path(&String::from_utf8_lossy(bytes));
});

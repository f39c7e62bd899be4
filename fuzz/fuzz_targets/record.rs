//! Records and their ledgers, as another program or a torn disk may leave them.
//!
//! A seal that fits is hard to guess, so the target also seals what it is given.

#![no_main]

use std::sync::LazyLock;

use flow::digest::Digest;
use flow::lineage::{Loaded, Record, trace};
use flow::store::Store;
use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};

static STORE: LazyLock<(tempfile::TempDir, Store)> = LazyLock::new(|| {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    (dir, store)
});

fn put(key: &Digest, bytes: &[u8]) {
    let path = Record::path(&STORE.1, key);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(&path, bytes).unwrap();
    std::fs::write(path.with_extension("differences.jsonl"), bytes).unwrap();
}

/// The record under its own key, sealed, if it has a pre-image that can have one.
fn sealed(bytes: &[u8]) -> Option<(Digest, Vec<u8>)> {
    let mut sealed: Value = serde_json::from_slice(bytes).ok()?;
    let record = sealed.get_mut("record")?;
    let key = Digest::of_value(Record::KEY_DOMAIN, record.get("preimage")?).ok()?;
    record.as_object_mut()?.insert("key".into(), json!(key));
    let seal = Digest::of_value("flow/record/v1", record).ok()?;
    Some((key, serde_json::to_vec(&json!({ "seal": seal, "record": record })).ok()?))
}

fuzz_target!(|bytes: &[u8]| {
    let store = &STORE.1;
    let key = Digest::of(b"key");
    put(&key, bytes);
    assert!(!matches!(Record::load(store, &key), Ok(Loaded::Found(_))), "a forged record");
    let _ = Record::differences(store, &key);
    if let Some((key, text)) = sealed(bytes) {
        put(&key, &text);
        let loaded = Record::load(store, &key).expect("it can be read");
        if let Loaded::Found(record) = loaded {
            assert_eq!(record.key, key);
        }
        let _ = Record::all(store);
        let _ = trace(store, &key.to_string());
        let _ = std::fs::remove_dir_all(store.root().join("records"));
    }
});

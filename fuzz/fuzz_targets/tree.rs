//! Manifests of trees: what is read back never names a path outside its folder.

#![no_main]

use std::path::{Component, Path};
use std::sync::LazyLock;

use flow::digest::Digest;
use flow::store::Store;
use libfuzzer_sys::fuzz_target;

static STORE: LazyLock<(tempfile::TempDir, Store)> = LazyLock::new(|| {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    (dir, store)
});

fuzz_target!(|bytes: &[u8]| {
    let store = &STORE.1;
    // Under the digest that the tree would have, so that its content is looked at.
    let value = serde_json::from_slice::<serde_json::Value>(bytes).ok();
    let digest = value.and_then(|v| Digest::of_value("flow/tree/v1", &v).ok());
    let digest = digest.unwrap_or_else(|| Digest::of(b"tree"));
    let hex = digest.to_string();
    let path = store.root().join("trees").join(&hex[..2]).join(&hex[2..]);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(&path, bytes).unwrap();
    if let Ok(Some(tree)) = store.tree(&digest) {
        for entry in &tree.entries {
            let plain = |c: Component<'_>| matches!(c, Component::Normal(_));
            assert!(Path::new(&entry.path).components().all(plain), "{:?}", entry.path);
        }
        let to = store.root().join("to");
        let _ = store.materialise(&digest, &to);
        let _ = std::fs::remove_dir_all(&to);
    }
    let _ = store.missing(&digest);
    let _ = std::fs::remove_dir_all(store.root().join("trees").join(&hex[..2]));
});

//! Readers of datasets. The first byte chooses the format and what is done with bad rows.

#![no_main]

use flow::data::{OnError, Reading, read, write};
use libfuzzer_sys::fuzz_target;

const NAMES: [&str; 6] = ["x.jsonl", "x.json", "x.csv", "x.tsv", "x.txt", "x.parquet"];

// A panic that the reader catches is no crash: only one that comes out of it.
fuzz_target!(init: std::panic::set_hook(Box::new(|_| {})), |bytes: &[u8]| {
    let Some((&how, rest)) = bytes.split_first() else { return };
    let how = usize::from(how);
    let name = NAMES[how % NAMES.len()];
    let on_error = if how / NAMES.len() % 2 == 0 { OnError::Skip } else { OnError::Fail };
    let path = std::env::temp_dir().join(format!("fuzz-{}-{name}", std::process::id()));
    std::fs::write(&path, rest).unwrap();
    if let Ok(table) = read(&path, Reading::new(name, on_error)) {
        // What can be read can be written and read again.
        let copy = path.with_extension("copy.parquet");
        if write(&table, &copy).is_ok() {
            let again = read(&copy, Reading::new("x.parquet", OnError::Fail)).unwrap();
            assert_eq!((again.rows(), again.columns()), (table.rows(), table.columns()));
        }
    }
});

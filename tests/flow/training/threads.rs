//! Training gives the same bytes on any number of threads.

use serde_json::{Value, json};

use super::kinds::{Bench, words};
use super::{decoder, rows};

/// The digests of what the kind `train` makes on so many threads.
fn trained(threads: usize, method: &str) -> Value {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    pool.install(|| {
        let bench = Bench::new();
        let base = bench.base(&decoder());
        let splits = [("train", rows(48, 1, true)), ("validation", rows(20, 2, true))];
        let tokens = bench.tokens(&splits, true, &words());
        let with = json!({
            "data": tokens.input(), "model": base.input(), "method": method,
            "lora": { "r": 4, "alpha": 8, "dropout": 0.1, "target_modules": "all-linear" },
            "learning_rate": 1e-2, "batch_size": 8, "epochs": 1,
        });
        json!(bench.run("train", "trained_model", with).unwrap().ports)
    })
}

#[test]
fn lora_with_dropout_is_the_same_on_any_number_of_threads() {
    for method in ["lora", "qlora"] {
        let one = trained(1, method);
        for threads in [2, 3, 8] {
            assert_eq!(trained(threads, method), one, "{method} on {threads} threads");
        }
    }
}

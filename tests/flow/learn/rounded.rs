//! The CPU with products in bf16 against itself in f32 and PyTorch's autocast: on matrix tiles
//! where there are any, else with the same rounding.

use flow::learn::{AdamW, Compute, Method, Model};

use super::gpu::{apart, files, models, near_gradients, setup, trained};
use super::parity::{ADAMW, RATE, batches, cases, model};
use super::{fixture, numbers, numbers_by_name};

/// Fifty steps beside PyTorch's bf16 autocast, whose losses `autocast.py` of the fixtures gave.
/// Labels of the fixtures are random, so that full training follows every rounding in the end.
#[test]
fn trains_as_autocast() {
    for case in cases() {
        let path = fixture(&format!("{}/{}_autocast.json", case.name, case.mode));
        let text = std::fs::read_to_string(path).unwrap();
        let autocast: Vec<f64> = serde_json::from_str(&text).unwrap();
        let model = model(&case, Compute::CpuBf16);
        let mut optimizer = AdamW::new(model.trainable(), ADAMW);
        let mut apart = Vec::new();
        for (step, (batch, want)) in batches(&case).iter().zip(&autocast).enumerate() {
            let n = batch.targets() as f64;
            let (loss, grads) = model.gradients(batch, step as u64, n).unwrap();
            apart.push((loss / n - want).abs() / want);
            let grads = numbers_by_name(&grads);
            optimizer.update(model.trainable(), &grads, RATE.at(step as u64), 1.0).unwrap();
        }
        assert_eq!(apart.len(), 50);
        let most = |apart: &[f64]| apart.iter().copied().fold(0.0, f64::max);
        let (first, all) = (most(&apart[..20]), most(&apart));
        println!("{} {}: {first:.1e} in 20 steps, {all:.1e} in 50", case.name, case.mode);
        assert!(first < 3e-3 && all < 3e-2, "{} {}: {first} {all}", case.name, case.mode);
    }
}

/// With dropout, whose masks are the same, accumulation, clipping and decay.
#[test]
fn trains_as_in_f32() {
    let dir = tempfile::tempdir().unwrap();
    for (config, task) in models() {
        let files = files(dir.path(), &config, &task);
        for method in [Method::Full, Method::Lora, Method::Qlora] {
            let [f32, bf16] = [Compute::Cpu, Compute::CpuBf16]
                .map(|compute| trained(&files, &setup(&task, method, compute, 0.1), 6));
            let what = format!("{} {method:?}", config["model_type"]);
            let (loss, norm) = apart(&bf16.1, &f32.1);
            assert!(loss < 1e-2 && norm < 5e-2, "{what}: {loss} {norm}");
            assert_ne!(f32.1, bf16.1, "{what}: nothing was rounded");
        }
    }
}

#[test]
fn gradients_are_near() {
    near_gradients(Compute::CpuBf16);
}

/// The same bits on one thread, two and three.
#[test]
fn threads_do_not_matter() {
    let dir = tempfile::tempdir().unwrap();
    for (config, task) in models() {
        let files = files(dir.path(), &config, &task);
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let setup = setup(&task, Method::Qlora, Compute::CpuBf16, 0.1);
                let (model, history): (Model, _) = trained(&files, &setup, 2);
                let all: Vec<f32> = model.trainable().values().flat_map(|v| numbers(v)).collect();
                (history, all)
            })
        };
        let one = on(1);
        assert!(one == on(2) && one == on(3), "{}", config["model_type"]);
    }
}

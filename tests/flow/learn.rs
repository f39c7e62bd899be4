//! Numbers: parity with PyTorch, PEFT and bitsandbytes, and with candle-transformers.
//!
//! `tests/fixtures/parity` was made by PyTorch, transformers, PEFT and bitsandbytes. Tensors that
//! are large and sparse in information are cut: gradients and final values of an embedding to
//! their first rows, logits over a vocabulary to their first 32 columns.

#![expect(clippy::unwrap_used, reason = "helpers of tests, outside the test functions")]

mod adapters; // PEFT's directories both ways, merge
mod decoders; // against candle-transformers
mod gate; // dropout, frozen weights, counts, errors
mod gpu; // an NVIDIA GPU against the CPU and PyTorch
// an NVIDIA GPU against the CPU and PyTorch
mod nf4; // against bitsandbytes
mod parity; // training against PyTorch
mod rounded; // the CPU in bf16 against itself and PyTorch's autocast

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use flow::learn::{
    Batch, Compute, Labels, LoraConfig, Method, ModelFiles, Quantization, Setup, TargetModules,
    Task,
};
use safetensors::{Dtype, SafeTensors};

/// Numbers and shape.
#[derive(Debug, Clone)]
struct Numbers {
    shape: Vec<usize>,
    data: Vec<f32>,
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parity").join(name)
}

/// All tensors of a file, as f32.
fn read(path: &Path) -> BTreeMap<String, Numbers> {
    let bytes = std::fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let tensors = tensors.tensors().into_iter().map(|(name, view)| {
        let data = view.data();
        let pairs = || data.chunks(2).map(|c| [c[0], c[1]]);
        let data = match view.dtype() {
            Dtype::F32 => {
                data.chunks(4).map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect()
            }
            Dtype::BF16 => pairs().map(|c| half::bf16::from_le_bytes(c).to_f32()).collect(),
            Dtype::I16 => pairs().map(|c| f32::from(i16::from_le_bytes(c))).collect(),
            Dtype::U16 => pairs().map(|c| f32::from(u16::from_le_bytes(c))).collect(),
            Dtype::U8 => data.iter().map(|c| f32::from(*c)).collect(),
            other => panic!("{name} is {other:?}"),
        };
        (name, Numbers { shape: view.shape().to_vec(), data })
    });
    tensors.collect()
}

fn numbers(tensor: &candle_core::Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn numbers_by_name(tensors: &BTreeMap<String, candle_core::Tensor>) -> BTreeMap<String, Vec<f32>> {
    tensors.iter().map(|(name, tensor)| (name.clone(), numbers(tensor))).collect()
}

/// Largest difference over the largest expected number; expected may be a prefix.
fn relative(found: &[f32], expected: &[f32]) -> f64 {
    assert!(found.len() >= expected.len());
    // `max` passes over what is not a number.
    assert!(found.iter().chain(expected).all(|x| x.is_finite()), "not all numbers are finite");
    let largest = expected.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let difference = found.iter().zip(expected).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
    if difference == 0.0 { 0.0 } else { f64::from(difference) / f64::from(largest) }
}

fn files(config: PathBuf, weights: PathBuf) -> ModelFiles {
    ModelFiles { config, weights: vec![("model.safetensors".to_owned(), weights)] }
}

fn lora(targets: &[&str]) -> LoraConfig {
    LoraConfig {
        r: 8,
        alpha: 16.0,
        dropout: 0.0,
        target_modules: TargetModules::Names(targets.iter().map(|t| (*t).to_owned()).collect()),
        use_rslora: false,
    }
}

fn setup(task: Task, method: Method, lora: Option<LoraConfig>) -> Setup {
    let quantization = match method {
        Method::Qlora => Quantization::Nf4 { double: true },
        _ => Quantization::None,
    };
    Setup {
        task,
        method,
        lora,
        quantization,
        seed: 3,
        dropout: None,
        compute: Compute::Cpu,
        gradient_checkpointing: false,
        frozen: false,
    }
}

fn classes(classes: usize) -> Task {
    Task::SequenceClassification { classes }
}

/// A batch of rows of ids without labels.
fn batch(rows: &[&[u32]]) -> Batch {
    let length = rows.iter().map(|r| r.len()).max().unwrap();
    let padded = |row: &&[u32]| {
        let mut row = row.to_vec();
        row.resize(length, 0);
        row
    };
    Batch {
        input_ids: rows.iter().flat_map(padded).collect(),
        token_type_ids: None,
        lengths: rows.iter().map(|r| r.len()).collect(),
        size: rows.len(),
        length,
        labels: Labels::None,
    }
}

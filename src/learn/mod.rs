//! Tensors and numbers: models, adapters, quantization and training, testable alone.
//!
//! candle gives tensors, storage and matrix products. The rest is here, because candle's fused
//! operations cut gradients without an error and its products compute gradients for frozen
//! weights: own models under Hugging Face names, own operations with forward and backward.
//!
//! Everything is f32 on the CPU; frozen weights are widened when they are loaded.

mod batch;
mod config;
mod model;
pub mod random;
mod setup;

pub use batch::{Batch, IGNORE, Labels};
pub use config::ModelConfig;
pub use model::{Counts, MergeReport, Model, ModelFiles, random_weights};
pub use setup::{LoraConfig, MergeBase, Method, Quantization, Setup, TargetModules, Task};

//! Tensors and numbers: models, adapters, quantization and training, testable alone.
//!
//! candle gives tensors, storage and matrix products. The rest is here, because candle's fused
//! operations cut gradients without an error and its products compute gradients for frozen
//! weights: own models under Hugging Face names, own operations with forward and backward.
//!
//! On the CPU everything is f32, products on request of operands rounded to bf16; frozen weights
//! are widened when they are loaded. `cuda` has the same models on an NVIDIA GPU.

mod adapter;
mod arithmetic;
mod batch;
mod bf16;
mod buffer;
mod checkpoint;
mod config;
mod cuda;
mod embedding;
mod files;
mod gate;
mod generate;
mod gradients;
mod init;
mod layout;
mod linear;
mod load;
mod lora_linear;
mod matrix;
mod merge;
mod metrics;
mod model;
mod net;
pub mod nf4;
mod ops;
mod optimizer;
mod output;
pub mod random;
mod rows;
mod schedule;
mod scoring;
mod setup;
mod trainer;
mod update;

pub use batch::{Batch, IGNORE, Labels};
pub use bf16::tiles;
pub use checkpoint::Checkpoint;
pub use config::{Family, ModelConfig};
pub use cuda::devices;
pub use embedding::{Embedding, embedding};
pub use gate::GradientGate;
pub use generate::{Generation, generate};
pub use init::random_weights;
pub use lora_linear::LoraLinear;
pub use merge::MergeReport;
pub use metrics::{ClassScores, Confusion};
pub use model::{Counts, Model, ModelFiles};
pub use optimizer::{AdamW, AdamWConfig, Decays, clip_factor, global_norm};
pub use rows::{Row, RowReader, collate, read_rows};
pub use schedule::{LearningRate, Schedule, warmup_steps};
pub use scoring::{Measure, Prediction, Scores, score};
pub use setup::{Compute, LoraConfig, MergeBase, Method, Quantization, Setup, TargetModules, Task};
pub use trainer::{
    Best, Duration, EvaluationLog, History, Observer, StepLog, TrainingArguments, Warmup, resume,
    train,
};

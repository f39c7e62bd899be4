//! Tensors and numbers: models, adapters, quantization and training, testable alone.
//!
//! candle gives tensors, storage and matrix products. The rest is here, because candle's fused
//! operations cut gradients without an error and its products compute gradients for frozen
//! weights: own models under Hugging Face names, own operations with forward and backward.
//!
//! Everything is f32 on the CPU; frozen weights are widened when they are loaded.

mod batch;
mod config;
mod matrix;
mod model;
pub mod nf4;
mod ops;
pub mod random;
mod setup;

pub use batch::{Batch, IGNORE, Labels};
pub use config::ModelConfig;
pub use model::{Counts, MergeReport, Model, ModelFiles, random_weights};
pub use setup::{LoraConfig, MergeBase, Method, Quantization, Setup, TargetModules, Task};

mod doctor;
mod gate;
mod generate;
mod metrics;
mod optimizer;
mod rows;
mod schedule;
mod scoring;
mod trainer;

pub use doctor::check_rows;
pub use gate::GradientGate;
pub use generate::{Generation, generate};
pub use metrics::{ClassScores, Confusion};
pub use optimizer::{AdamW, AdamWConfig, Decays, clip_factor, global_norm};
pub use rows::{Row, RowReader, collate, read_rows};
pub use schedule::{LearningRate, Schedule, warmup_steps};
pub use scoring::{Measure, Prediction, Scores, score};
pub use trainer::{
    Best, Duration, EvaluationLog, History, Observer, StepLog, TrainingArguments, Warmup, train,
};

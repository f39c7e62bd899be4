//! Models on an NVIDIA GPU: the same numbers as [`Net`](super::net) and the operations of `ops`
//! give on the CPU, in f32 or bf16.
//!
//! There is no graph of operations here. A pass is written out layer by layer (`decoder.rs`,
//! `encoder.rs`), forward and backward, over addresses; large products go to cublasLt
//! (`matmul.rs`), all else to kernels of this folder (`kernels.cu`, `attention.cu`, committed as
//! PTX, which the driver compiles for the card). Memory is three stacks (`arena.rs`): weights, what
//! the backward needs, and what a layer needs; with gradient checkpointing some of it is the host's
//! (`away.rs`). The trained parameters, their gradients and
//! AdamW's moments stay on the GPU (`trained.rs`); a step waits for the GPU once, for the loss and
//! the norm of the gradients.
//!
//! The driver and cublasLt are opened at run time: the same program runs where there is no GPU.

mod arena;
mod attention;
mod away;
mod decoder;
mod device;
mod encoder;
mod engine;
mod matmul;
mod pass;
mod projection;
mod trained;

pub(crate) use device::Float;
pub use device::devices;
pub(crate) use engine::Engine;

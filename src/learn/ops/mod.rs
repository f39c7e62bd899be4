//! Operations with forward and backward on f32 slices, parallel and fused.
//!
//! A forward writes where it is told to; a backward turns the gradient of the result into that of
//! the argument, in place where it can. Results do not depend on the number of threads: every sum
//! has a fixed order.

mod activation;
mod attention;
mod dropout;
mod frozen;
mod loss;
mod norm;
mod rope;
mod rows;
mod wide;

use super::buffer::Buffer;
pub(crate) use activation::{add, gelu, gelu_backward, swiglu, swiglu_backward};
pub(crate) use attention::{Attention, KeptProbabilities};
pub(crate) use dropout::{Kept, Mask};
pub(crate) use frozen::Frozen;
pub(crate) use loss::{cross_entropy, log_probs};
pub(crate) use norm::{
    add_layer_norm, layer_norm, layer_norm_backward, layer_norm_weight, rms_norm,
    rms_norm_backward, rms_norm_weight,
};
pub(crate) use rope::{RopeTable, Turn};
pub(crate) use rows::{add_rows, select_rows};
pub(crate) use wide::{Loop, TASK, wide};
use wide::{dot, exp, max, polynomial, sum, sum3, update};

use candle_core::{CpuStorage, Device, Layout, Result, Shape, Storage, Tensor, bail};

/// The elements of a contiguous f32 storage.
pub(crate) fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(data), Some((start, end))) => Ok(&data[start..end]),
        _ => bail!("expected a contiguous f32 tensor"),
    }
}

/// Calls `f` with the elements of contiguous f32 tensors on the CPU.
pub(crate) fn with_slices<const N: usize, T>(
    tensors: [&Tensor; N],
    f: impl FnOnce([&[f32]; N]) -> T,
) -> Result<T> {
    let contiguous = tensors.map(Tensor::contiguous);
    let mut held = Vec::with_capacity(N);
    for tensor in contiguous {
        held.push(tensor?);
    }
    let guards: Vec<_> = held.iter().map(Tensor::storage_and_layout).collect();
    let mut slices: [&[f32]; N] = [&[]; N];
    for (slot, (storage, layout)) in slices.iter_mut().zip(&guards) {
        *slot = match &**storage {
            Storage::Cpu(storage) => slice(storage, layout)?,
            _ => bail!("expected a tensor on the CPU"),
        };
    }
    Ok(f(slices))
}

/// A tensor from its elements.
pub(crate) fn tensor(data: Vec<f32>, shape: impl Into<Shape>) -> Result<Tensor> {
    Tensor::from_vec(data, shape.into(), &Device::Cpu)
}

#[cfg(test)]
pub(crate) mod tests;

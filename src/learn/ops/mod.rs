//! Operations with forward and backward, parallel and fused.
//!
//! All take and give contiguous f32 on the CPU. An argument that nothing asks a gradient for
//! (`Tensor::track_op` is false) gets none and costs none. Results do not depend on the number
//! of threads: every sum has a fixed order.

mod activation;
mod affine;
mod attention;
mod dropout;
mod loss;
mod norm;
mod rope;
mod rows;
mod wide;

pub(crate) use activation::{add, gelu, swiglu};
pub(crate) use affine::{Frozen, LoraArgs, affine, frozen_affine, lora_affine};
pub(crate) use attention::{Attention, attention};
pub(crate) use dropout::{Mask, dropout};
pub(crate) use loss::{cross_entropy, log_probs};
pub(crate) use norm::{layer_norm, rms_norm};
pub(crate) use rope::{RopeTable, rope};
pub(crate) use rows::{backward, select_rows};
pub(crate) use wide::{Loop, TASK, wide};
use wide::{dot, exp, map, map2, map3, max, sum, sum3};

use candle_core::{CpuStorage, Device, Layout, Result, Shape, Storage, Tensor, bail};

/// The elements of a contiguous f32 storage.
fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
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

/// All leading sizes as one, and the last.
fn matrix(shape: &Shape) -> (usize, usize) {
    let cols = shape.dims().last().copied().unwrap_or(1);
    (shape.elem_count() / cols.max(1), cols)
}

#[cfg(test)]
pub(crate) mod tests;

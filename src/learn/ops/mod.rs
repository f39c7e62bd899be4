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

pub(crate) use activation::{gelu, swiglu};
pub(crate) use affine::{Frozen, LoraArgs, affine, frozen_affine, lora_affine};
pub(crate) use attention::{Attention, attention};
pub(crate) use dropout::{Mask, dropout};
pub(crate) use loss::{cross_entropy, log_probs};
pub(crate) use norm::{layer_norm, rms_norm};
pub(crate) use rope::{RopeTable, rope};
pub(crate) use rows::{backward, select_rows};

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

/// Elements of one task in an elementwise loop.
const TASK: usize = 1 << 14;

/// `out[i] = f(x[i])`, in parallel.
fn map(x: &[f32], f: impl Fn(f32) -> f32 + Sync) -> Vec<f32> {
    use rayon::prelude::*;
    let mut out = vec![0.0; x.len()];
    out.par_chunks_mut(TASK).zip(x.par_chunks(TASK)).for_each(|(out, x)| {
        out.iter_mut().zip(x).for_each(|(o, x)| *o = f(*x));
    });
    out
}

/// `out[i] = f(x[i], y[i])`, in parallel.
fn map2(x: &[f32], y: &[f32], f: impl Fn(f32, f32) -> f32 + Sync) -> Vec<f32> {
    use rayon::prelude::*;
    let mut out = vec![0.0; x.len()];
    let inputs = x.par_chunks(TASK).zip(y.par_chunks(TASK));
    out.par_chunks_mut(TASK).zip(inputs).for_each(|(out, (x, y))| {
        out.iter_mut().zip(x.iter().zip(y)).for_each(|(o, (x, y))| *o = f(*x, *y));
    });
    out
}

/// exp in f32 without a call: 2^n times a Taylor polynomial on |r| <= ln 2 / 2; relative error
/// below 3e-7, 0 below -87, that of 88 above 88. Not a number stays not a number.
#[inline]
fn exp(x: f32) -> f32 {
    if x < -87.0 {
        return 0.0;
    }
    // `min` would make a number of what is none.
    let x = if x > 88.0 { 88.0 } else { x };
    let n = (x * std::f32::consts::LOG2_E).round_ties_even();
    // ln 2 in two parts, so that the reduced argument is exact to the last bits.
    let r = (x - n * 0.693_359_4) + n * 2.121_944_4e-4;
    let p = 1.0
        + r * (1.0
            + r * (0.5
                + r * (1.0 / 6.0
                    + r * (1.0 / 24.0 + r * (1.0 / 120.0 + r * (1.0 / 720.0 + r / 5040.0))))));
    p * f32::from_bits(((n as i32 + 127) << 23) as u32)
}

#[cfg(test)]
pub(crate) mod tests;

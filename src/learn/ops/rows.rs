//! Choosing rows of a matrix, and starting a backward pass from a given gradient.

use std::sync::Arc;

use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::{matrix, slice, tensor, with_slices};

struct SelectRows {
    indices: Arc<[u32]>,
    /// A row that gets no gradient.
    skip: Option<u32>,
}

impl CustomOp1 for SelectRows {
    fn name(&self) -> &'static str {
        "select-rows"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let data = slice(storage, layout)?;
        let (rows, cols) = matrix(layout.shape());
        if let Some(i) = self.indices.iter().find(|i| **i as usize >= rows) {
            bail!("row {i} of a matrix of {rows}");
        }
        let mut out = vec![0.0; self.indices.len() * cols];
        out.par_chunks_mut(cols).zip(self.indices.par_iter()).for_each(|(out, i)| {
            out.copy_from_slice(&data[*i as usize * cols..][..cols]);
        });
        Ok((CpuStorage::F32(out), Shape::from((self.indices.len(), cols))))
    }

    fn bwd(&self, arg: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (_, cols) = matrix(arg.shape());
        let mut out = vec![0.0f32; arg.elem_count()];
        with_slices([grad], |[grad]| {
            for (i, g) in self.indices.iter().zip(grad.chunks_exact(cols)) {
                if Some(*i) != self.skip {
                    let row = &mut out[*i as usize * cols..][..cols];
                    row.iter_mut().zip(g).for_each(|(o, g)| *o += g);
                }
            }
        })?;
        tensor(out, arg.shape()).map(Some)
    }
}

/// Rows of a `[rows, cols]` by index (which may repeat): `[indices, cols]`. The row `skip` gets no
/// gradient, as torch's `padding_idx`.
pub(crate) fn select_rows(x: &Tensor, indices: Arc<[u32]>, skip: Option<u32>) -> Result<Tensor> {
    x.apply_op1(SelectRows { indices, skip })
}

struct Seed(Tensor);

impl CustomOp1 for Seed {
    fn name(&self) -> &'static str {
        "seed"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}

/// The gradients of `sum(x * grad)`.
pub(crate) fn backward(x: &Tensor, grad: &Tensor) -> Result<GradStore> {
    if x.dims() != grad.dims() {
        bail!("a gradient of {:?} for a tensor of {:?}", grad.dims(), x.dims());
    }
    x.apply_op1(Seed(grad.detach()))?.backward()
}

#[cfg(test)]
mod tests {
    use super::super::tests::{check, normal};
    use super::*;

    #[test]
    fn selects_and_scatters() {
        let indices: Arc<[u32]> = [3, 0, 3, 1, 3].into();
        check(&[normal("x", &[5, 7])], |a| select_rows(&a[0], indices.clone(), None));
        assert!(select_rows(&normal("x", &[3, 2]), indices, None).is_err());
    }

    #[test]
    fn skips_the_padding_row() {
        let x = candle_core::Var::from_tensor(&normal("x", &[3, 2])).unwrap();
        let y = select_rows(&x, [1, 2, 1].into(), Some(1)).unwrap();
        let g = backward(&y, &normal("g", &[3, 2])).unwrap();
        let g: Vec<Vec<f32>> = g.get(&x).unwrap().to_vec2().unwrap();
        assert!(g[1].iter().all(|x| *x == 0.0) && g[2].iter().all(|x| *x != 0.0));
    }
}

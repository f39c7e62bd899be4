//! Gradients of what is trained, as a backward pass finds them.

use std::collections::HashMap;

use anyhow::{Result, ensure};
use candle_core::{Tensor, TensorId};
use rayon::prelude::*;

use super::bf16::{self, Lhs, Reread, Rhs};
use super::buffer::Buffer;
use super::matrix::{Matrix, Threads, product};
use super::ops::TASK;

/// Gradients by parameter; one that is used in several places gets the sum. In buffers: a whole
/// model's are large, and memory that is new in each step costs more than to compute them.
#[derive(Debug, Default)]
pub(crate) struct Gradients {
    by: HashMap<TensorId, Buffer>,
}

impl Gradients {
    /// Adds a gradient, row-major.
    ///
    /// # Errors
    /// When it is of another size than the parameter.
    pub(crate) fn add(&mut self, parameter: &Tensor, gradient: Vec<f32>) -> Result<()> {
        let (n, found) = (parameter.elem_count(), gradient.len());
        ensure!(n == found, "a gradient of {found} numbers for a parameter of {n}");
        match self.by.get_mut(&parameter.id()) {
            Some(sum) => sum.iter_mut().zip(gradient).for_each(|(s, g)| *s += g),
            None => _ = self.by.insert(parameter.id(), Buffer::of(&gradient)),
        }
        Ok(())
    }

    /// Adds `alpha * lhs * rhs`.
    ///
    /// # Errors
    /// As [`Gradients::add`].
    pub(crate) fn product(
        &mut self,
        parameter: &Tensor,
        alpha: f32,
        lhs: Matrix<'_>,
        rhs: Matrix<'_>,
    ) -> Result<()> {
        let n = parameter.elem_count();
        let ((rows, _), (_, cols)) = (lhs.size(), rhs.size());
        let found = rows * cols;
        ensure!(n == found, "a gradient of {found} numbers for a parameter of {n}");
        let (sum, beta) = self.sum(parameter);
        product((sum, cols), beta, alpha, lhs, rhs, Threads::All);
        Ok(())
    }

    /// Adds `lhs * rhs`, a product in bf16 with `cols` columns.
    ///
    /// # Errors
    /// When the parameter is of another size.
    pub(crate) fn product_bf16(
        &mut self,
        parameter: &Tensor,
        lhs: &Lhs,
        rhs: &Rhs,
        cols: usize,
    ) -> Result<()> {
        let (last, rows) = (parameter.dims().last().copied(), lhs.size().0);
        let fits = last == Some(cols) && rows * cols == parameter.elem_count();
        ensure!(fits, "a gradient of {rows} x {cols} for {:?}", parameter.dims());
        let (sum, beta) = self.sum(parameter);
        let terms = &[(lhs, rhs)];
        bf16::product((sum, cols), beta != 0.0, None, terms, Reread::Late, Threads::All);
        Ok(())
    }

    /// The sum for a parameter, and 1, or memory for it that may hold anything, and 0.
    fn sum(&mut self, parameter: &Tensor) -> (&mut [f32], f32) {
        let n = parameter.elem_count();
        let beta = if self.by.contains_key(&parameter.id()) { 1.0 } else { 0.0 };
        (self.by.entry(parameter.id()).or_insert_with(|| Buffer::new(n)), beta)
    }

    /// The sum for a parameter, which begins as zeros.
    pub(crate) fn sum_from_zero(&mut self, parameter: &Tensor) -> &mut [f32] {
        let (sum, beta) = self.sum(parameter);
        if beta == 0.0 {
            sum.par_chunks_mut(TASK).for_each(|sum| sum.fill(0.0));
        }
        sum
    }

    /// Takes the gradient of a parameter.
    pub(crate) fn take(&mut self, parameter: &Tensor) -> Option<Buffer> {
        self.by.remove(&parameter.id())
    }
}

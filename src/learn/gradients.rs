//! Gradients of what is trained, as a backward pass finds them.

use std::collections::HashMap;

use anyhow::{Result, ensure};
use candle_core::{Tensor, TensorId};

use super::bf16::{self, Lhs, Reread, Rhs};
use super::matrix::{Matrix, Threads, product};

/// Gradients by parameter; one that is used in several places gets the sum.
#[derive(Debug, Default)]
pub(crate) struct Gradients {
    by: HashMap<TensorId, Vec<f32>>,
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
            None => _ = self.by.insert(parameter.id(), gradient),
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
    /// When the parameter's last size is another.
    pub(crate) fn product_bf16(
        &mut self,
        parameter: &Tensor,
        lhs: &Lhs,
        rhs: &Rhs,
        cols: usize,
    ) -> Result<()> {
        let last = parameter.dims().last().copied();
        ensure!(last == Some(cols), "a gradient of {cols} columns for {:?}", parameter.dims());
        let (sum, beta) = self.sum(parameter);
        let terms = &[(lhs, rhs)];
        bf16::product((sum, cols), beta != 0.0, None, terms, Reread::Late, Threads::All);
        Ok(())
    }

    /// The sum for a parameter, and 1 if there is anything in it, else 0.
    pub(crate) fn sum(&mut self, parameter: &Tensor) -> (&mut [f32], f32) {
        let n = parameter.elem_count();
        let beta = if self.by.contains_key(&parameter.id()) { 1.0 } else { 0.0 };
        (self.by.entry(parameter.id()).or_insert_with(|| vec![0.0; n]), beta)
    }

    /// Takes the gradient of a parameter.
    pub(crate) fn take(&mut self, parameter: &Tensor) -> Option<Vec<f32>> {
        self.by.remove(&parameter.id())
    }
}

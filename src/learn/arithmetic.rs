//! In which numbers products are computed.

use super::bf16;
use super::matrix::{self, Matrix, Threads};
use super::output::Target;

/// In which numbers products are computed. Everything else is f32, but for what stands between the
/// two products of an encoder's feed-forward layer, which then is bf16 as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Arithmetic {
    /// In f32.
    #[default]
    F32,
    /// Operands are rounded to bf16 (to nearest, ties to even), sums are f32.
    Bf16,
}

impl Arithmetic {
    /// `out = beta * out + alpha * lhs * rhs` on this thread, see [`matrix::product`]; `beta` is 0
    /// or 1.
    pub(crate) fn product<'a>(
        self,
        out: impl Target<'a>,
        beta: f32,
        alpha: f32,
        lhs: Matrix<'_>,
        rhs: Matrix<'_>,
    ) {
        match self {
            Self::F32 => matrix::product(out, beta, alpha, lhs, rhs, Threads::One),
            Self::Bf16 => bf16::product_of(out, beta != 0.0, alpha, lhs, rhs),
        }
    }
}

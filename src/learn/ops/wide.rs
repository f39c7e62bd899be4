//! Loops over f32 slices as wide as the processor's vectors.
//!
//! The compiler vectorises these plain loops for the instruction set found at run time (AVX-512,
//! AVX2, NEON; `pulp` chooses). Every sum has a fixed order and a product is fused with an addition
//! only where it says so, so the bits do not depend on that choice, nor on the number of threads.
//! (Where the processor cannot fuse them, which AVX2 and NEON can, it is a slow call.) What is
//! called inside must be inlined: a function compiled on its own knows no wide vectors.

use rayon::prelude::*;

/// Elements of one task in an elementwise loop.
pub(crate) const TASK: usize = 1 << 14;

/// Partial sums side by side.
const LANES: usize = 16;

/// Runs a loop compiled for the widest vectors there are.
macro_rules! wide {
    ($body:expr) => {
        pulp::Arch::new().dispatch($crate::learn::ops::Loop(
            #[inline(always)]
            || $body,
        ))
    };
}
pub(crate) use wide;

/// A loop for [`wide!`]. Called by reference: a closure that could be called again is otherwise
/// called through a shim, which is compiled on its own.
pub(crate) struct Loop<F>(pub(crate) F);

impl<R, F: FnMut() -> R> pulp::NullaryFnOnce for Loop<F> {
    type Output = R;

    #[inline(always)]
    fn call(mut self) -> R {
        (self.0)()
    }
}

/// `out[i] = f(out[i], x[i])`, in parallel.
pub(super) fn update(out: &mut [f32], x: &[f32], f: impl Fn(f32, f32) -> f32 + Sync) {
    out.par_chunks_mut(TASK).zip(x.par_chunks(TASK)).for_each(|(out, x)| {
        wide!({
            for (o, x) in out.iter_mut().zip(x) {
                *o = f(*o, *x);
            }
        });
    });
}

/// Folds lanes into one number, in a fixed order.
#[inline(always)]
fn fold(mut lanes: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut n = LANES / 2;
    while n > 0 {
        for i in 0..n {
            lanes[i] = f(lanes[i], lanes[i + n]);
        }
        n /= 2;
    }
    lanes[0]
}

/// The sum of `f` over a slice, in lanes.
#[inline(always)]
pub(super) fn sum(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest = chunks.remainder();
    for x in chunks {
        for i in 0..LANES {
            lanes[i] += f(x[i]);
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane += f(*x);
    }
    fold(lanes, |a, b| a + b)
}

/// The sum of `f` over slices side by side, in lanes.
#[inline(always)]
pub(super) fn sum3(x: &[f32], y: &[f32], z: &[f32], f: impl Fn(f32, f32, f32) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let (xs, ys, zs) = (x.chunks_exact(LANES), y.chunks_exact(LANES), z.chunks_exact(LANES));
    let rest = xs.remainder().iter().zip(ys.remainder()).zip(zs.remainder());
    for ((x, y), z) in xs.zip(ys).zip(zs) {
        for i in 0..LANES {
            lanes[i] += f(x[i], y[i], z[i]);
        }
    }
    for (lane, ((x, y), z)) in lanes.iter_mut().zip(rest) {
        *lane += f(*x, *y, *z);
    }
    fold(lanes, |a, b| a + b)
}

/// The inner product of two slices, in lanes.
#[inline(always)]
pub(super) fn dot(x: &[f32], y: &[f32]) -> f32 {
    sum3(x, y, y, |x, y, _| x * y)
}

/// The largest number of a slice; NaN if there is one.
#[inline(always)]
pub(super) fn max(x: &[f32]) -> f32 {
    #[inline(always)]
    fn larger(a: f32, b: f32) -> f32 {
        // `b` wins unless it is smaller, and so does NaN.
        if a > b || a.is_nan() { a } else { b }
    }
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest = chunks.remainder();
    for x in chunks {
        for i in 0..LANES {
            lanes[i] = larger(lanes[i], x[i]);
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane = larger(*lane, *x);
    }
    fold(lanes, larger)
}

/// A polynomial from its coefficients, that of the highest power first (Horner's scheme).
#[inline(always)]
pub(super) fn polynomial(coefficients: &[f32], x: f32) -> f32 {
    coefficients.iter().fold(0.0, |sum, c| sum.mul_add(x, *c))
}

/// exp in f32 without a call or a branch: 2^n times a Taylor polynomial on |r| <= ln 2 / 2;
/// relative error below 3e-7, 0 below -87, NaN of NaN.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    /// Adding it rounds to a whole number, which then stands in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let small = x < -87.0;
    let x = if x > 88.0 { 88.0 } else { x };
    let x = if small { -87.0 } else { x };
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    // ln 2 in two parts, so that the reduced argument is exact to the last bits.
    let r = n.mul_add(2.121_944_4e-4, n.mul_add(-0.693_359_4, x));
    const TAYLOR: [f32; 8] =
        [1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];
    let p = polynomial(&TAYLOR, r);
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
    let y = p * f32::from_bits(exponent);
    if small { 0.0 } else { y }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponential() {
        for i in -8700..8800 {
            let x = i as f32 / 100.0;
            let want = f64::from(x).exp();
            assert!((f64::from(exp(x)) - want).abs() <= 3e-7 * want, "{x}");
        }
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NAN).is_nan() && exp(f32::INFINITY) > 1e38);
    }

    #[test]
    fn sums_of_odd_lengths() {
        for n in [0, 1, 15, 16, 17, 100] {
            let x: Vec<f32> = (0..n).map(|i| i as f32 - 3.0).collect();
            let want: f32 = x.iter().sum();
            assert_eq!(sum(&x, |x| x), want);
            assert_eq!(dot(&x, &x), x.iter().map(|x| x * x).sum::<f32>());
            assert_eq!(max(&x), x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        }
        assert!(max(&[1.0, f32::NAN, 2.0]).is_nan());
    }

    /// The widest vectors give the bits of the plain loop.
    #[test]
    fn vectors_do_not_matter() {
        let x: Vec<f32> = (0..1000).map(|i| (i as f32 * 0.37).sin() * 20.0).collect();
        let plain: Vec<u32> = x.iter().map(|x| exp(*x).to_bits()).collect();
        let mut there = vec![0.0; x.len()];
        update(&mut there, &x, |_, x| exp(x));
        let there: Vec<u32> = there.into_iter().map(f32::to_bits).collect();
        assert_eq!(plain, there);
        let plain = sum(&x, |x| exp(0.1 * x));
        assert_eq!(plain.to_bits(), wide!(sum(&x, |x| exp(0.1 * x))).to_bits());
    }
}

//! GELU in its erf form, SwiGLU, and sums.

use rayon::prelude::*;

use super::{TASK, exp, polynomial, update, wide};

/// erf as a rational function of the clamped argument (the approximation that Eigen and XLA use);
/// absolute error below 5e-7.
#[inline(always)]
fn erf(x: f32) -> f32 {
    let x = x.clamp(-4.0, 4.0);
    let z = x * x;
    const P: [f32; 7] = [
        -2.726_142_3e-10,
        2.770_681_4e-8,
        -2.101_024_1e-6,
        -5.692_506_5e-5,
        -7.349_906_3e-4,
        -2.954_6e-3,
        -1.609_603_3e-2,
    ];
    const Q: [f32; 5] =
        [-1.456_607_2e-5, -2.133_740_6e-4, -1.682_827e-3, -7.373_329e-3, -1.426_473_9e-2];
    x * polynomial(&P, z) / polynomial(&Q, z)
}

const FRAC_1_SQRT_TAU: f32 = 0.398_942_3;

/// `out = x * Phi(x)` with the normal distribution function (Hendrycks and Gimpel 2016), not its
/// tanh approximation; on this thread.
pub(crate) fn gelu(x: &[f32], out: &mut [f32]) {
    wide!({
        for (o, x) in out.iter_mut().zip(x) {
            let half = 0.5 * x;
            *o = half.mul_add(erf(x * std::f32::consts::FRAC_1_SQRT_2), half);
        }
    });
}

/// The gradient of [`gelu`]'s argument from that of its result, on this thread.
pub(crate) fn gelu_backward(x: &[f32], grad: &[f32], out: &mut [f32]) {
    wide!({
        for (o, (g, x)) in out.iter_mut().zip(grad.iter().zip(x)) {
            let cdf = erf(x * std::f32::consts::FRAC_1_SQRT_2).mul_add(0.5, 0.5);
            *o = g * (x * FRAC_1_SQRT_TAU).mul_add(exp(-0.5 * x * x), cdf);
        }
    });
}

/// `out += x`.
pub(crate) fn add(out: &mut [f32], x: &[f32]) {
    update(out, x, |o, x| o + x);
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `out = gate * sigmoid(gate) * up` (Shazeer 2020), on this thread.
pub(crate) fn swiglu(gate: &[f32], up: &[f32], out: &mut [f32]) {
    wide!({
        for (o, (e, g)) in out.iter_mut().zip(gate.iter().zip(up)) {
            *o = e * sigmoid(*e) * g;
        }
    });
}

/// Makes the gradient of [`swiglu`]'s result that of `up`, and `gate` its own gradient.
pub(crate) fn swiglu_backward(gate: &mut [f32], up: &[f32], grad: &mut [f32]) {
    let inputs = up.par_chunks(TASK).zip(gate.par_chunks_mut(TASK));
    grad.par_chunks_mut(TASK).zip(inputs).for_each(|(grad, (up, gate))| {
        wide!({
            for (d, (g, e)) in grad.iter_mut().zip(up.iter().zip(gate.iter_mut())) {
                let s = sigmoid(*e);
                let to_up = *e * s * *d;
                *e = g * s * (1.0 + *e * (1.0 - s)) * *d;
                *d = to_up;
            }
        });
    });
}

#[cfg(test)]
mod tests {
    use super::super::tests::{check, normal};
    use super::*;

    #[test]
    fn erf_is_near() {
        for i in -6000..6000 {
            let x = i as f32 / 1000.0;
            let want = candle_core::cpu::erf::erf_f64(f64::from(x));
            assert!((f64::from(erf(x)) - want).abs() < 5e-7, "{x}");
        }
    }

    #[test]
    fn gradients() {
        let (x, y) = (normal("x", 91), normal("y", 91));
        let forward = |a: &[&[f32]]| {
            let mut out = vec![0.0; 91];
            gelu(a[0], &mut out);
            out
        };
        check(&[&x], forward, |a, g| {
            let mut dx = vec![f32::NAN; 91];
            gelu_backward(a[0], g, &mut dx);
            vec![dx]
        });
        let forward = |a: &[&[f32]]| {
            let mut out = vec![0.0; 91];
            swiglu(a[0], a[1], &mut out);
            out
        };
        check(&[&x, &y], forward, |a, g| {
            let (mut gate, mut g) = (a[0].to_vec(), g.to_vec());
            swiglu_backward(&mut gate, a[1], &mut g);
            vec![gate, g]
        });
    }

    #[test]
    fn far_ends() {
        let x = [-60.0, -200.0, 200.0];
        let mut y = [0.0; 3];
        swiglu(&x, &[1.0; 3], &mut y);
        assert!(y[0].abs() < 1e-20 && y[1].abs() < 1e-20 && y[2] == 200.0, "{y:?}");
        gelu(&x, &mut y);
        assert!(y[0].abs() < 1e-4 && y[2] == 200.0, "{y:?}");
    }
}

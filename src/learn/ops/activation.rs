//! GELU in its erf form, SwiGLU, and sums.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor, bail};

use super::{exp, map, map2, map3, slice, tensor, with_slices};

/// erf as a rational function of the clamped argument (the approximation that Eigen and XLA use);
/// absolute error below 5e-7.
#[inline(always)]
fn erf(x: f32) -> f32 {
    let x = x.clamp(-4.0, 4.0);
    let z = x * x;
    let mut p = -2.726_142_3e-10;
    for c in [
        2.770_681_4e-8,
        -2.101_024_1e-6,
        -5.692_506_5e-5,
        -7.349_906_3e-4,
        -2.954_6e-3,
        -1.609_603_3e-2,
    ] {
        p = p * z + c;
    }
    let mut q = -1.456_607_2e-5;
    for c in [-2.133_740_6e-4, -1.682_827e-3, -7.373_329e-3, -1.426_473_9e-2] {
        q = q * z + c;
    }
    x * p / q
}

const FRAC_1_SQRT_TAU: f32 = 0.398_942_3;

struct Gelu;

impl CustomOp1 for Gelu {
    fn name(&self) -> &'static str {
        "gelu"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = slice(storage, layout)?;
        let out = map(x, |x| 0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2)));
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let dx = with_slices([x, grad], |[x, g]| {
            map2(x, g, |x, g| {
                let cdf = 0.5 * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2));
                g * (cdf + x * FRAC_1_SQRT_TAU * exp(-0.5 * x * x))
            })
        })?;
        tensor(dx, x.shape()).map(Some)
    }
}

/// `x * Phi(x)` with the normal distribution function (Hendrycks and Gimpel 2016), not its tanh
/// approximation.
pub(crate) fn gelu(x: &Tensor) -> Result<Tensor> {
    x.apply_op1(Gelu)
}

/// `f` of two tensors of one shape, element by element.
fn elementwise(
    (s1, l1): (&CpuStorage, &Layout),
    (s2, l2): (&CpuStorage, &Layout),
    f: impl Fn(f32, f32) -> f32 + Sync,
) -> Result<(CpuStorage, Shape)> {
    if l1.shape() != l2.shape() {
        bail!("expected one shape, found {:?} and {:?}", l1.dims(), l2.dims());
    }
    let out = map2(slice(s1, l1)?, slice(s2, l2)?, f);
    Ok((CpuStorage::F32(out), l1.shape().clone()))
}

struct Add;

impl CustomOp2 for Add {
    fn name(&self) -> &'static str {
        "add"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        elementwise((s1, l1), (s2, l2), |x, y| x + y)
    }

    fn bwd(
        &self,
        x: &Tensor,
        y: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((x.track_op().then(|| grad.clone()), y.track_op().then(|| grad.clone())))
    }
}

/// `x + y` of one shape.
pub(crate) fn add(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    x.apply_op2(y, Add)
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

struct Swiglu;

impl CustomOp2 for Swiglu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        elementwise((s1, l1), (s2, l2), |e, g| e * sigmoid(e) * g)
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (to_gate, to_up) = (gate.track_op(), up.track_op());
        let (de, dg) = with_slices([gate, up, grad], |[e, g, d]| {
            let de = to_gate.then(|| {
                map3(e, g, d, |e, g, d| {
                    let s = sigmoid(e);
                    g * s * (1.0 + e * (1.0 - s)) * d
                })
            });
            (de, to_up.then(|| map2(e, d, |e, d| e * sigmoid(e) * d)))
        })?;
        Ok((
            de.map(|v| tensor(v, gate.shape())).transpose()?,
            dg.map(|v| tensor(v, up.shape())).transpose()?,
        ))
    }
}

/// `gate * sigmoid(gate) * up` (Shazeer 2020).
pub(crate) fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gate.apply_op2(up, Swiglu)
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
        check(&[normal("x", &[7, 13])], |a| gelu(&a[0]));
        check(&[normal("x", &[7, 13]), normal("y", &[7, 13])], |a| swiglu(&a[0], &a[1]));
        check(&[normal("x", &[7, 13]), normal("y", &[7, 13])], |a| add(&a[0], &a[1]));
    }

    #[test]
    fn far_ends() {
        let x = tensor(vec![-60.0, -200.0, 200.0], 3).unwrap();
        let one = tensor(vec![1.0; 3], 3).unwrap();
        let y: Vec<f32> = swiglu(&x, &one).unwrap().to_vec1().unwrap();
        assert!(y[0].abs() < 1e-20 && y[1].abs() < 1e-20 && y[2] == 200.0, "{y:?}");
        let y: Vec<f32> = gelu(&x).unwrap().to_vec1().unwrap();
        assert!(y[0].abs() < 1e-4 && y[2] == 200.0, "{y:?}");
    }
}

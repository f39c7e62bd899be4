//! Finite differences: what every operation's backward is held against.

use candle_core::{Result, Tensor, Var};

use super::{backward, exp, tensor, with_slices};
use crate::learn::random::Stream;

/// Normal numbers.
pub(crate) fn normal(name: &str, shape: &[usize]) -> Tensor {
    let stream = Stream::new(5, name);
    let n = shape.iter().product::<usize>();
    tensor((0..n as u64).map(|i| stream.normal(i) as f32).collect(), shape).unwrap()
}

/// Checks the gradients of `f` at `args` against central differences of `sum(f(args) * g)` in
/// f64 for a random g; every element of every argument.
pub(crate) fn check(args: &[Tensor], f: impl Fn(&[Tensor]) -> Result<Tensor>) {
    let vars: Vec<Var> = args.iter().map(|a| Var::from_tensor(a).unwrap()).collect();
    let tracked: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let out = f(&tracked).unwrap();
    let g = normal("gradient", out.dims());
    let grads = backward(&out, &g).unwrap();
    let value = |args: &[Tensor]| -> f64 {
        let out = f(args).unwrap();
        with_slices([&out, &g], |[o, g]| {
            o.iter().zip(g).map(|(o, g)| f64::from(*o) * f64::from(*g)).sum()
        })
        .unwrap()
    };
    let h = 1e-2f32;
    for (k, arg) in args.iter().enumerate() {
        let grad = grads.get(&tracked[k]).unwrap_or_else(|| panic!("no gradient for {k}"));
        let grad: Vec<f32> = grad.flatten_all().unwrap().to_vec1().unwrap();
        let data: Vec<f32> = arg.flatten_all().unwrap().to_vec1().unwrap();
        for i in 0..data.len() {
            let at = |by: f32| {
                let mut moved = data.clone();
                moved[i] += by;
                let mut args = args.to_vec();
                args[k] = tensor(moved, arg.shape()).unwrap();
                value(&args)
            };
            // Fourth order: the error of the formula stays below that of f32.
            let (near, far) = (at(h) - at(-h), at(2.0 * h) - at(-2.0 * h));
            let numeric = (8.0 * near - far) / (12.0 * f64::from(h));
            let error = (numeric - f64::from(grad[i])).abs();
            assert!(error < 2e-3 * (1.0 + numeric.abs()), "arg {k} [{i}]: {numeric} {}", grad[i]);
        }
    }
    // An argument that is not tracked gets nothing and does not disturb the others.
    for k in 0..args.len().min(if args.len() > 1 { args.len() } else { 0 }) {
        let mut mixed = tracked.clone();
        mixed[k] = args[k].clone();
        let some = backward(&f(&mixed).unwrap(), &g).unwrap();
        assert!(some.get(&mixed[k]).is_none());
        for other in (0..args.len()).filter(|o| *o != k) {
            let (a, b) = (some.get(&mixed[other]).unwrap(), grads.get(&tracked[other]).unwrap());
            with_slices([a, b], |[a, b]| assert_eq!(a, b)).unwrap();
        }
    }
}

#[test]
fn exponential() {
    for i in -8700..8800 {
        let x = i as f32 / 100.0;
        let want = f64::from(x).exp();
        assert!((f64::from(exp(x)) - want).abs() <= 3e-7 * want, "{x}");
    }
    assert_eq!(exp(f32::NEG_INFINITY), 0.0);
    assert_eq!(exp(0.0), 1.0);
    assert_eq!(exp(f32::INFINITY), exp(88.0));
    assert!(exp(f32::NAN).is_nan());
}

//! Finite differences: what every operation's backward is held against.

use crate::learn::random::Stream;

/// Normal numbers.
pub(crate) fn normal(name: &str, n: usize) -> Vec<f32> {
    let stream = Stream::new(5, name);
    (0..n as u64).map(|i| stream.normal(i) as f32).collect()
}

/// Checks the gradients that `backward` gives for all arguments, from those of the result, against
/// central differences of `sum(forward(args) * g)` in f64 for a random g; every element of every
/// argument.
pub(crate) fn check(
    args: &[&[f32]],
    forward: impl Fn(&[&[f32]]) -> Vec<f32>,
    backward: impl Fn(&[&[f32]], &[f32]) -> Vec<Vec<f32>>,
) {
    let g = normal("gradient", forward(args).len());
    let grads = backward(args, &g);
    assert_eq!(grads.len(), args.len());
    let value = |args: &[&[f32]]| -> f64 {
        forward(args).iter().zip(&g).map(|(o, g)| f64::from(*o) * f64::from(*g)).sum()
    };
    let h = 1e-2f32;
    for (k, (arg, grad)) in args.iter().zip(&grads).enumerate() {
        assert_eq!(grad.len(), arg.len(), "arg {k}");
        for i in 0..arg.len() {
            let at = |by: f32| {
                let mut moved = arg.to_vec();
                moved[i] += by;
                let mut args = args.to_vec();
                args[k] = &moved;
                value(&args)
            };
            // Fourth order: the error of the formula stays below that of f32.
            let (near, far) = (at(h) - at(-h), at(2.0 * h) - at(-2.0 * h));
            let numeric = (8.0 * near - far) / (12.0 * f64::from(h));
            let error = (numeric - f64::from(grad[i])).abs();
            assert!(error < 2e-3 * (1.0 + numeric.abs()), "arg {k} [{i}]: {numeric} {}", grad[i]);
        }
    }
}

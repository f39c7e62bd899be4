//! AdamW as `torch.optim.AdamW` computes it, and clipping by the global norm.

use std::collections::BTreeMap;
use std::ops::Deref;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, Result, ensure};
use candle_core::{CpuStorage, Device, InplaceOp1, Layout, Tensor, Var};
use rayon::prelude::*;

use super::ops::wide;

/// Elements that one task updates; every element is independent of every other, so that the
/// number does not show in the result.
const CHUNK: usize = 16 * 1024;

/// Constants of [`AdamW`]; the defaults are torch's, but for the decay, which is transformers' 0.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWConfig {
    /// Decay of the mean of the gradients.
    pub beta1: f64,
    /// Decay of the mean of their squares.
    pub beta2: f64,
    /// Added to the root of the squares, outside of it.
    pub epsilon: f64,
    /// Decoupled weight decay: each update first multiplies by `1 - rate * weight_decay`.
    pub weight_decay: f64,
    /// Which parameters decay.
    pub decays: Decays,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0, decays: Decays::Weights }
    }
}

/// Which parameters weight decay acts on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decays {
    /// All.
    All,
    /// All but biases and the weights of layer norms and RMS norms, by name, as transformers'
    /// `Trainer` groups them.
    Weights,
}

impl Decays {
    /// Whether a parameter of this name decays.
    pub fn includes(self, name: &str) -> bool {
        let name = name.to_lowercase();
        let norm = |part: &str| part == "norm" || part.ends_with("_norm");
        self == Self::All
            || !(name.contains("bias")
                || name.contains("layernorm")
                || name.contains("rmsnorm")
                || name.split('.').any(norm))
    }
}

/// Adam with decoupled weight decay (Loshchilov and Hutter 2019), in f32, with its state in the
/// order of the parameters' names.
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    updates: u64,
    moments: BTreeMap<String, Mutex<Moments>>,
}

#[derive(Debug)]
struct Moments {
    mean: Vec<f32>,
    square: Vec<f32>,
    decays: bool,
}

impl AdamW {
    /// An optimizer of these parameters.
    pub fn new(parameters: &BTreeMap<String, Var>, config: AdamWConfig) -> Self {
        let moments = parameters.iter().map(|(name, var)| {
            let n = var.elem_count();
            let decays = config.decays.includes(name);
            (name.clone(), Mutex::new(Moments { mean: vec![0.0; n], square: vec![0.0; n], decays }))
        });
        Self { config, updates: 0, moments: moments.collect() }
    }

    /// An optimizer that has made so many updates; `get` gives the moments of a parameter by
    /// `mean` or `square` and its name.
    pub(super) fn resumed(
        parameters: &BTreeMap<String, Var>,
        config: AdamWConfig,
        updates: u64,
        get: &dyn Fn(&str, &str) -> Result<Tensor>,
    ) -> Result<Self> {
        let moments = parameters.keys().map(|name| {
            let load = |kind| -> Result<Vec<f32>> { Ok(get(kind, name)?.to_vec1()?) };
            let decays = config.decays.includes(name);
            let moments = Moments { mean: load("mean")?, square: load("square")?, decays };
            Ok((name.clone(), Mutex::new(moments)))
        });
        Ok(Self { config, updates, moments: moments.collect::<Result<_>>()? })
    }

    /// Its state by `mean/` or `square/` and the parameter's name, flat.
    pub(super) fn moments(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut all = BTreeMap::new();
        for (name, moments) in &self.moments {
            let moments = moments.lock().unwrap_or_else(PoisonError::into_inner);
            for (kind, data) in [("mean", &moments.mean), ("square", &moments.square)] {
                let tensor = Tensor::from_slice(data, data.len(), &Device::Cpu)?;
                all.insert(format!("{kind}/{name}"), tensor);
            }
        }
        Ok(all)
    }

    /// Its constants.
    pub(super) fn config(&self) -> AdamWConfig {
        self.config
    }

    /// Updates made so far.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// One update in place at a rate. Gradients are multiplied by `scale` first
    /// (see [`clip_factor`]).
    ///
    /// # Errors
    /// When a parameter has no gradient, or one of another size: a missing gradient means that
    /// something on the way cut it, never that there is nothing to do.
    pub fn update(
        &mut self,
        parameters: &BTreeMap<String, Var>,
        gradients: &BTreeMap<String, impl Deref<Target = [f32]>>,
        rate: f64,
        scale: f64,
    ) -> Result<()> {
        self.updates += 1;
        let t = self.updates as f64;
        let AdamWConfig { beta1, beta2, epsilon, weight_decay, .. } = self.config;
        for (name, var) in parameters {
            let gradient = gradients
                .get(name)
                .with_context(|| format!("parameter `{name}` has no gradient"))?;
            ensure!(
                gradient.len() == var.elem_count(),
                "the gradient of `{name}` has {} numbers, the parameter the shape {:?}",
                gradient.len(),
                var.shape()
            );
            let moments = self
                .moments
                .get(name)
                .with_context(|| format!("parameter `{name}` is unknown to the optimizer"))?;
            let decays = moments.lock().is_ok_and(|m| m.decays);
            let update = Update {
                gradient,
                moments,
                beta1,
                beta2,
                epsilon: epsilon as f32,
                step: (rate / (1.0 - beta1.powf(t))) as f32,
                root: (1.0 - beta2.powf(t)).sqrt() as f32,
                keep: if decays { (1.0 - rate * weight_decay) as f32 } else { 1.0 },
                scale: scale as f32,
            };
            var.inplace_op1(&update).with_context(|| format!("updating parameter `{name}`"))?;
        }
        Ok(())
    }
}

struct Update<'a> {
    gradient: &'a [f32],
    moments: &'a Mutex<Moments>,
    beta1: f64,
    beta2: f64,
    epsilon: f32,
    /// Rate over the bias correction of the mean.
    step: f32,
    /// Root of the bias correction of the squares.
    root: f32,
    /// What weight decay leaves.
    keep: f32,
    scale: f32,
}

impl InplaceOp1 for Update<'_> {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(&self, parameter: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let (CpuStorage::F32(p), Some((start, end))) = (parameter, layout.contiguous_offsets())
        else {
            candle_core::bail!("parameters are f32 and contiguous");
        };
        let (p, g) = (&mut p[start..end], self.gradient);
        let Ok(mut moments) = self.moments.lock() else {
            candle_core::bail!("an earlier update of this parameter failed");
        };
        let Moments { mean, square, .. } = &mut *moments;
        let (b1, b2) = (self.beta1 as f32, self.beta2 as f32);
        let (c1, c2) = ((1.0 - self.beta1) as f32, (1.0 - self.beta2) as f32);
        let chunks = p.par_chunks_mut(CHUNK).zip(g.par_chunks(CHUNK));
        let state = mean.par_chunks_mut(CHUNK).zip(square.par_chunks_mut(CHUNK));
        chunks.zip(state).for_each(|((p, g), (m, v))| {
            wide!({
                for (((p, g), m), v) in p.iter_mut().zip(g).zip(m.iter_mut()).zip(v.iter_mut()) {
                    let g = g * self.scale;
                    *m = b1 * *m + c1 * g;
                    *v = b2 * *v + c2 * g * g;
                    let denominator = v.sqrt() / self.root + self.epsilon;
                    *p = *p * self.keep - self.step * (*m / denominator);
                }
            });
        });
        Ok(())
    }
}

/// The L2 norm over all gradients together. Sums are in f64, of parts that are added in order of
/// the names, so that it does not depend on threads.
pub fn global_norm(gradients: &BTreeMap<String, impl Deref<Target = [f32]> + Sync>) -> f64 {
    let parts: Vec<&[f32]> = gradients.values().flat_map(|g| g.chunks(CHUNK)).collect();
    let sums: Vec<f64> = parts.into_par_iter().map(sum_of_squares).collect();
    sums.into_iter().sum::<f64>().sqrt()
}

/// In f64 and in lanes.
fn sum_of_squares(x: &[f32]) -> f64 {
    let square = |x: f32| f64::from(x) * f64::from(x);
    let (all, rest) = x.as_chunks::<16>();
    wide!({
        let mut lanes = [0.0; 16];
        for x in all {
            for (lane, x) in lanes.iter_mut().zip(x) {
                *lane += square(*x);
            }
        }
        lanes.iter().sum::<f64>() + rest.iter().map(|x| square(*x)).sum::<f64>()
    })
}

/// What gradients of this global norm are multiplied by so that it is at most `max_norm`
/// (`torch.nn.utils.clip_grad_norm_`, its 1e-6 included).
pub fn clip_factor(norm: f64, max_norm: f64) -> f64 {
    (max_norm / (norm + 1e-6)).min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn var(values: &[f32]) -> Var {
        Var::from_slice(values, values.len(), &Device::Cpu).unwrap()
    }

    fn one(name: &str, values: &[f32]) -> BTreeMap<String, Var> {
        BTreeMap::from([(name.to_owned(), var(values))])
    }

    fn gradient(name: &str, values: &[f32]) -> BTreeMap<String, Vec<f32>> {
        BTreeMap::from([(name.to_owned(), values.to_vec())])
    }

    fn values(p: &BTreeMap<String, Var>, name: &str) -> Vec<f32> {
        p[name].to_vec1().unwrap()
    }

    /// The same recurrence in f64, straight from the definition.
    fn reference(p0: f64, grads: &[f64], rates: &[f64], decay: f64) -> f64 {
        let (mut p, mut m, mut v) = (p0, 0.0, 0.0);
        for (i, (g, lr)) in grads.iter().zip(rates).enumerate() {
            let t = (i + 1) as i32;
            p -= lr * decay * p;
            m = 0.9 * m + 0.1 * g;
            v = 0.999 * v + 0.001 * g * g;
            let (mh, vh) = (m / (1.0 - 0.9f64.powi(t)), v / (1.0 - 0.999f64.powi(t)));
            p -= lr * mh / (vh.sqrt() + 1e-8);
        }
        p
    }

    #[test]
    fn follows_the_recurrence() {
        let grads = [0.1, -0.3, 0.25, 0.0, 1.5];
        let rates = [0.0, 0.01, 0.02, 0.015, 0.01];
        for decay in [0.0, 0.1] {
            let p = one("w", &[1.0]);
            let config = AdamWConfig { weight_decay: decay, ..AdamWConfig::default() };
            let mut adam = AdamW::new(&p, config);
            for (g, lr) in grads.iter().zip(rates) {
                adam.update(&p, &gradient("w", &[*g as f32]), lr, 1.0).unwrap();
            }
            let want = reference(1.0, &grads, &rates, decay);
            let got = f64::from(values(&p, "w")[0]);
            assert!((got - want).abs() < 1e-6, "{got} {want}");
        }
    }

    #[test]
    fn first_update_moves_by_the_rate() {
        // m/(1-b1) = g and sqrt(v/(1-b2)) = |g|: the step is the rate, whatever the gradient.
        let p = one("w", &[1.0, 1.0]);
        let mut adam = AdamW::new(&p, AdamWConfig::default());
        adam.update(&p, &gradient("w", &[3.0, -0.01]), 0.5, 1.0).unwrap();
        let got = values(&p, "w");
        assert!((got[0] - 0.5).abs() < 1e-6 && (got[1] - 1.5).abs() < 1e-5, "{got:?}");
    }

    #[test]
    fn decay_spares_biases_and_norms() {
        for name in [
            "classifier.bias",
            "bert.encoder.layer.0.output.LayerNorm.weight",
            "model.layers.1.input_layernorm.weight",
            "model.norm.weight",
            "model.layers.0.self_attn.q_norm.weight",
            "distilbert.transformer.layer.0.sa_layer_norm.weight",
        ] {
            assert!(!Decays::Weights.includes(name), "{name}");
            assert!(Decays::All.includes(name));
        }
        for name in ["model.layers.0.self_attn.q_proj.lora_A.weight", "classifier.weight"] {
            assert!(Decays::Weights.includes(name), "{name}");
        }
        let p = one("a.bias", &[1.0]);
        let config = AdamWConfig { weight_decay: 0.5, ..AdamWConfig::default() };
        AdamW::new(&p, config).update(&p, &gradient("a.bias", &[0.0]), 0.1, 1.0).unwrap();
        assert_eq!(values(&p, "a.bias"), [1.0]);
    }

    #[test]
    fn missing_gradient_is_an_error() {
        let p = one("w", &[1.0]);
        let mut adam = AdamW::new(&p, AdamWConfig::default());
        let err = adam.update(&p, &gradient("v", &[]), 0.1, 1.0).unwrap_err();
        assert!(err.to_string().contains("`w` has no gradient"), "{err}");
        assert!(adam.update(&p, &gradient("w", &[1.0, 2.0]), 0.1, 1.0).is_err());
    }

    #[test]
    fn clipping_is_by_the_norm_of_all() {
        let mut g = gradient("a", &[3.0]);
        g.extend(gradient("b", &[0.0, 4.0]));
        assert_eq!(global_norm(&g), 5.0);
        let many = gradient("a", &vec![0.5; 3 * CHUNK + 21]);
        assert_eq!(global_norm(&many), (0.25 * (3 * CHUNK + 21) as f64).sqrt());
        assert!((clip_factor(5.0, 1.0) - 1.0 / 5.000_001).abs() < 1e-12);
        assert_eq!(clip_factor(0.5, 1.0), 1.0);
    }

    #[test]
    fn long_parameters_are_updated_to_the_end() {
        let n = CHUNK + 7;
        let p = one("w", &vec![1.0; n]);
        let mut adam = AdamW::new(&p, AdamWConfig::default());
        adam.update(&p, &gradient("w", &vec![2.0; n]), 0.5, 1.0).unwrap();
        let got = values(&p, "w");
        assert!(got.iter().all(|x| *x == got[0]) && got[0] < 0.51, "{} {}", got[0], got[n - 1]);
    }
}

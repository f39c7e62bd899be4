//! The gradient gate: training that does not reach a parameter fails instead of looking fine.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Deref;

use anyhow::Result;
use candle_core::Var;
use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::source::Fault;

/// Updates with a non-zero rate after which every parameter must have moved. Two, because the
/// first gradient of a fresh adapter's `A` is exactly zero while its `B` is.
const UPDATES: u64 = 2;

/// Sum of rates below which an f32 weight of size 1 may well not have moved (a long warm-up);
/// movement is judged once the sum is larger.
const RATE: f64 = 1e-6;

/// Checks that after the first backward every trainable parameter has a finite gradient, and that
/// once two updates with a non-zero rate are done each has had a non-zero gradient and has
/// changed.
#[derive(Debug)]
pub struct GradientGate {
    initial: BTreeMap<String, Digest>,
    seen: Seen,
}

/// What a gate has seen so far.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Seen {
    reached: BTreeSet<String>,
    rates: f64,
    updates: u64,
    done: bool,
}

fn digest(var: &Var) -> Result<Digest> {
    let values = var.flatten_all()?.to_vec1::<f32>()?;
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    Ok(Digest::of(&bytes))
}

fn list(names: &[&str]) -> String {
    let shown: Vec<String> = names.iter().take(5).map(|n| format!("`{n}`")).collect();
    let more = names.len().saturating_sub(5);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("{}{more}", shown.join(", "))
}

impl GradientGate {
    /// A gate over parameters as they are before the first update.
    ///
    /// # Errors
    /// When a parameter is not f32.
    pub fn new(parameters: &BTreeMap<String, Var>) -> Result<Self> {
        let initial = parameters.iter().map(|(n, v)| Ok((n.clone(), digest(v)?)));
        Ok(Self { initial: initial.collect::<Result<_>>()?, seen: Seen::default() })
    }

    /// Whether it has seen enough.
    pub(super) fn is_done(&self) -> bool {
        self.seen.done
    }

    /// What it has seen, for a checkpoint.
    pub(super) fn seen(&self) -> Seen {
        self.seen.clone()
    }

    /// Goes on from a checkpoint.
    pub(super) fn go_on(&mut self, seen: Seen) {
        self.seen = seen;
    }

    /// Looks at the gradients of a step, before the update.
    ///
    /// # Errors
    /// When a parameter has none, or one with a number in it that is not finite.
    pub fn gradients(
        &mut self,
        gradients: &BTreeMap<String, impl Deref<Target = [f32]>>,
    ) -> Result<()> {
        if self.seen.done {
            return Ok(());
        }
        for name in self.initial.keys() {
            let Some(gradient) = gradients.get(name) else {
                let fault = Fault::new(format!("no gradient reaches parameter `{name}`"));
                return Err(fault.help("an operation between it and the loss cuts it").into());
            };
            if let Some(bad) = gradient.iter().find(|x| !x.is_finite()) {
                let fault = Fault::new(format!("the gradient of `{name}` holds {bad}"));
                return Err(fault.help("lower the learning rate or look at the data").into());
            }
            if gradient.iter().any(|x| *x != 0.0) {
                self.seen.reached.insert(name.clone());
            }
        }
        Ok(())
    }

    /// Looks at the parameters after an update at a rate.
    ///
    /// # Errors
    /// When enough updates are done, and a parameter has had no gradient but zeros or is
    /// bit for bit what it was.
    pub fn updated(&mut self, parameters: &BTreeMap<String, Var>, rate: f64) -> Result<()> {
        if self.seen.done || rate == 0.0 {
            return Ok(());
        }
        self.seen.updates += 1;
        self.seen.rates += rate;
        if self.seen.rates < RATE { self.all_reached() } else { self.judge(parameters) }
    }

    /// Judges at the end of training, however small the rates were.
    ///
    /// # Errors
    /// As [`GradientGate::updated`], unless there were too few updates to tell.
    pub fn finish(&mut self, parameters: &BTreeMap<String, Var>) -> Result<()> {
        if self.seen.done { Ok(()) } else { self.judge(parameters) }
    }

    fn all_reached(&self) -> Result<()> {
        if self.seen.updates < UPDATES {
            return Ok(());
        }
        let zero: Vec<&str> = self
            .initial
            .keys()
            .filter(|n| !self.seen.reached.contains(*n))
            .map(String::as_str)
            .collect();
        if !zero.is_empty() {
            let message = format!(
                "after {} updates the gradient of {} of {} trainable tensors has been zero: {}",
                self.seen.updates,
                zero.len(),
                self.initial.len(),
                list(&zero)
            );
            let help = "they are not trained: something between them and the loss cuts them off";
            return Err(Fault::new(message).help(help).into());
        }
        Ok(())
    }

    fn judge(&mut self, parameters: &BTreeMap<String, Var>) -> Result<()> {
        self.all_reached()?;
        if self.seen.updates < UPDATES {
            return Ok(());
        }
        let mut same = Vec::new();
        for (name, before) in &self.initial {
            if parameters.get(name).map(digest).transpose()?.as_ref() == Some(before) {
                same.push(name.as_str());
            }
        }
        if !same.is_empty() {
            let message = format!(
                "after {} updates {} trainable tensors have not changed: {}",
                self.seen.updates,
                same.len(),
                list(&same)
            );
            let help = "the learning rate is too small to move a number of f32: raise it";
            return Err(Fault::new(message).help(help).into());
        }
        self.seen.done = true;
        Ok(())
    }

    /// Whether everything has been seen to be trained.
    pub fn passed(&self) -> bool {
        self.seen.done
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn parameters() -> BTreeMap<String, Var> {
        let var = |x: f32| Var::from_slice(&[x, x], 2, &Device::Cpu).unwrap();
        BTreeMap::from([("a".to_owned(), var(1.0)), ("b".to_owned(), var(2.0))])
    }

    fn gradients(a: f32, b: f32) -> BTreeMap<String, Vec<f32>> {
        BTreeMap::from([("a".to_owned(), vec![0.0, a]), ("b".to_owned(), vec![0.0, b])])
    }

    fn bump(p: &BTreeMap<String, Var>, name: &str) {
        let next = (p[name].as_tensor() + 0.5).unwrap();
        p[name].set(&next).unwrap();
    }

    #[test]
    fn passes_when_all_move() {
        let p = parameters();
        let mut gate = GradientGate::new(&p).unwrap();
        gate.gradients(&gradients(0.0, 1.0)).unwrap(); // as a fresh adapter's A
        gate.updated(&p, 0.0).unwrap(); // warm-up: not counted
        bump(&p, "b");
        gate.updated(&p, 0.1).unwrap();
        gate.gradients(&gradients(1.0, 0.0)).unwrap();
        bump(&p, "a");
        assert!(!gate.passed());
        gate.updated(&p, 0.1).unwrap();
        assert!(gate.passed());
    }

    #[test]
    fn fails_on_a_missing_or_infinite_gradient() {
        let p = parameters();
        let mut gate = GradientGate::new(&p).unwrap();
        let mut cut = gradients(1.0, 1.0);
        cut.remove("b");
        let err = gate.gradients(&cut).unwrap_err();
        assert!(err.to_string().contains("`b`"), "{err}");
        let err = gate.gradients(&gradients(f32::NAN, 1.0)).unwrap_err();
        assert!(err.to_string().contains("`a`"), "{err}");
    }

    #[test]
    fn fails_on_a_gradient_that_is_cut_to_zero() {
        let p = parameters();
        let mut gate = GradientGate::new(&p).unwrap();
        for _ in 0..2 {
            gate.gradients(&gradients(0.0, 1.0)).unwrap();
            bump(&p, "b");
        }
        gate.updated(&p, 0.1).unwrap();
        let err = gate.updated(&p, 0.1).unwrap_err().to_string();
        assert!(err.contains("1 of 2") && err.contains("`a`"), "{err}");
    }

    #[test]
    fn fails_on_a_parameter_that_stays() {
        let p = parameters();
        let mut gate = GradientGate::new(&p).unwrap();
        gate.gradients(&gradients(1.0, 1.0)).unwrap();
        bump(&p, "a");
        gate.updated(&p, 0.1).unwrap();
        let err = gate.updated(&p, 0.1).unwrap_err().to_string();
        assert!(err.contains("not changed: `b`"), "{err}");
    }

    #[test]
    fn a_long_warm_up_is_waited_for() {
        let p = parameters();
        let mut gate = GradientGate::new(&p).unwrap();
        gate.gradients(&gradients(1.0, 1.0)).unwrap();
        for _ in 0..10 {
            gate.updated(&p, 1e-8).unwrap();
        }
        assert!(!gate.passed());
        bump(&p, "a");
        let err = gate.finish(&p).unwrap_err().to_string();
        assert!(err.contains("not changed: `b`"), "{err}");
        bump(&p, "b");
        gate.finish(&p).unwrap();
        assert!(gate.passed());
    }

    #[test]
    fn one_update_tells_nothing() {
        let p = parameters();
        let mut gate = GradientGate::new(&p).unwrap();
        gate.gradients(&gradients(0.0, 1.0)).unwrap(); // as a fresh adapter's A
        gate.updated(&p, 0.1).unwrap();
        gate.finish(&p).unwrap();
        assert!(!gate.passed());
    }
}

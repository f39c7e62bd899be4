//! Whole models as transformers directories: trained whole, or an adapter added into its base.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Tensor};
use serde_json::{Value, json};

use super::batch::{Batch, Labels};
use super::files;
use super::linear::{Held, Parameters};
use super::load::Loading;
use super::matrix::{Matrix, Threads, product};
use super::model::Model;
use super::net::Net;
use super::ops::{Frozen, tensor, with_slices};
use super::random::Stream;
use super::setup::{MergeBase, Method, Quantization, Task};
use crate::source::Fault;

/// How far the logits of a merged model may be from those of base and adapter, relative to the
/// largest logit: f32 sums in another order stay well below, a wrong merge does not.
const TOLERANCE: f64 = 1e-3;

/// What a merge measured, on a seeded batch of random tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct MergeReport {
    /// Largest absolute difference between the logits of the merged model, before rounding, and
    /// those of base and adapter.
    pub max_abs_difference: f64,
    /// The same over the largest absolute logit.
    pub max_rel_difference: f64,
    /// Largest absolute change of a logit by rounding the merged weights to the base's data type.
    pub rounding_loss: f64,
}

impl Model {
    /// Writes a transformers directory: `config.json` and `model.safetensors` (f32).
    /// `class_names` become `id2label`; without any, transformers' `LABEL_0`… are written.
    ///
    /// # Errors
    /// When the model is not fully trained (an adapter is merged instead), the class names are not
    /// as many as the classes, or a file cannot be written.
    pub fn save_full(&self, dir: &Path, class_names: &[String]) -> Result<()> {
        ensure!(self.setup.method == Method::Full, "an adapter is saved as such, or merged");
        let tensors = self
            .trainable()
            .iter()
            .map(|(name, var)| (name.clone(), (var.as_detached_tensor(), DType::F32)));
        self.write_whole(dir, class_names, tensors.collect(), DType::F32)
    }

    /// Adds the adapter into a base, W' = W + s B A in f32, rounded once to the base's data type,
    /// and writes a transformers directory.
    ///
    /// # Errors
    /// When there is no adapter, the logits of the merged model differ from those of base and
    /// adapter, or a file cannot be read or written.
    pub fn merge(
        &self,
        base: MergeBase,
        dir: &Path,
        class_names: &[String],
    ) -> Result<MergeReport> {
        ensure!(self.setup.method != Method::Full, "a fully trained model has nothing to merge");
        let quantized = self.setup.quantization != Quantization::None;
        let adapted = match base {
            MergeBase::Original if quantized => self.on_original()?,
            _ => self.parameters.clone(),
        };
        let probe = self.probe();
        let expected = self.finite_logits(&adapted, &probe, "base and adapter")?;
        let mut merged = merged(adapted)?;
        let found = self.finite_logits(&frozen(&merged), &probe, "the merged model")?;
        let max_abs_difference = difference(&expected, &found);
        let zeros = vec![0.0; expected.len()];
        let largest = difference(&expected, &zeros);
        let max_rel_difference = max_abs_difference / largest.max(f64::MIN_POSITIVE);
        // Written so that a difference that is not a number fails too.
        ensure!(
            max_rel_difference <= TOLERANCE,
            "the merged model's logits differ from those of base and adapter by {:.2e} of the \
             largest (at most {TOLERANCE:.0e} is expected)",
            max_rel_difference
        );
        // Rounded in place, one tensor after the other: the model is alive once more, not thrice.
        for (tensor, dtype) in merged.values_mut().filter(|(_, dtype)| *dtype != DType::F32) {
            *tensor = tensor.to_dtype(*dtype)?.to_dtype(DType::F32)?;
        }
        let after = self.finite_logits(&frozen(&merged), &probe, "the rounded model")?;
        let rounding_loss = difference(&found, &after);
        let dtype = merged.values().next().map_or(DType::F32, |(_, dtype)| *dtype);
        self.write_whole(dir, class_names, merged, dtype)?;
        Ok(MergeReport { max_abs_difference, max_rel_difference, rounding_loss })
    }

    /// The logits of the probe, which must all be numbers, else nothing can be compared.
    fn finite_logits(&self, p: &Parameters, probe: &Batch, what: &str) -> Result<Vec<f32>> {
        let net = Net::new(&self.config, p).with_context(|| what.to_owned())?;
        let logits: Vec<f32> = self.logits_of(&net, probe)?.flatten_all()?.to_vec1()?;
        if let Some(bad) = logits.iter().find(|x| !x.is_finite()) {
            let fault = Fault::new(format!("the logits of {what} hold {bad}"));
            let help = "weights of base or adapter are not finite numbers, or too large for the \
                        base's data type: train again with a lower learning rate";
            return Err(fault.help(help).into());
        }
        Ok(logits)
    }

    /// The same adapter and head on the base before quantization.
    fn on_original(&self) -> Result<Parameters> {
        let loading =
            Loading { config: &self.config, setup: &self.setup, quantization: Quantization::None };
        let (base, _) = loading.base(&self.files.weights)?;
        let mut parameters = self.parameters.clone();
        for (name, (held, dtype)) in base.held {
            if matches!(held, Held::Frozen(_)) {
                parameters.held.insert(name, (held, dtype));
            }
        }
        Ok(parameters)
    }

    /// Two short rows of random tokens.
    fn probe(&self) -> Batch {
        let length = self.config.positions.min(24);
        let stream = Stream::new(self.setup.seed, "merge/probe");
        let ids = (0..2 * length as u64).map(|i| stream.below(i, self.config.vocab as u64) as u32);
        Batch {
            input_ids: ids.collect(),
            token_type_ids: None,
            lengths: vec![length, length.div_ceil(2)],
            size: 2,
            length,
            labels: Labels::None,
        }
    }

    fn write_whole(
        &self,
        dir: &Path,
        class_names: &[String],
        tensors: BTreeMap<String, (Tensor, DType)>,
        dtype: DType,
    ) -> Result<()> {
        let mut config: BTreeMap<String, Value> = self.config.raw.clone().into_iter().collect();
        let task = &self.setup.task;
        let architecture = self.config.family.architecture(Some(task));
        config.insert("architectures".to_owned(), json!([architecture]));
        let key = if config.contains_key("dtype") { "dtype" } else { "torch_dtype" };
        let dtype = match dtype {
            DType::BF16 => "bfloat16",
            DType::F16 => "float16",
            _ => "float32",
        };
        config.insert(key.to_owned(), json!(dtype));
        if let Task::SequenceClassification { classes } = task {
            let names: Vec<String> = match class_names.is_empty() {
                true => (0..*classes).map(|i| format!("LABEL_{i}")).collect(),
                false => class_names.to_vec(),
            };
            if names.len() != *classes {
                bail!("{} class names for {classes} classes", names.len());
            }
            let to_label: BTreeMap<String, &String> =
                names.iter().enumerate().map(|(i, name)| (i.to_string(), name)).collect();
            let to_id: BTreeMap<&String, usize> =
                names.iter().enumerate().map(|(i, name)| (name, i)).collect();
            config.insert("id2label".to_owned(), json!(to_label));
            config.insert("label2id".to_owned(), json!(to_id));
            config.insert("problem_type".to_owned(), json!("single_label_classification"));
        }
        files::write_as(&dir.join("model.safetensors"), tensors)?;
        files::write_json(&dir.join("config.json"), &config)
    }
}

/// Every tensor of the model as f32, adapters added in, with the type that it came in. Each tensor
/// of the parameters is let go of once it is merged.
fn merged(parameters: Parameters) -> Result<BTreeMap<String, (Tensor, DType)>> {
    let Parameters { held, adapters, scaling, .. } = parameters;
    let mut out = BTreeMap::new();
    for (name, (held, dtype)) in held {
        let base = match held {
            Held::Trained(var) => var.as_detached_tensor(),
            Held::Frozen(weight) => weight.dense()?,
        };
        let adapter = name.strip_suffix(".weight").and_then(|m| adapters.get(m));
        let whole = match adapter {
            None => base,
            Some(adapter) => {
                let (outputs, inputs) = base.dims2()?;
                let (a, b) = (adapter.a.as_tensor(), adapter.b.as_tensor());
                let r = a.dim(0)?;
                let sum = with_slices([&base, a, b], |[w, a, b]| {
                    let mut sum = w.to_vec();
                    let (a, b) = (Matrix::new(a, r, inputs), Matrix::new(b, outputs, r));
                    product((&mut sum, inputs), 1.0, scaling as f32, b, a, Threads::All);
                    sum
                })?;
                tensor(sum, (outputs, inputs))?
            }
        };
        out.insert(name, (whole, dtype));
    }
    Ok(out)
}

fn frozen(tensors: &BTreeMap<String, (Tensor, DType)>) -> Parameters {
    let held = tensors.iter().map(|(name, (tensor, dtype))| {
        (name.clone(), (Held::Frozen(Frozen::Dense(tensor.clone())), *dtype))
    });
    Parameters { held: held.collect(), ..Parameters::default() }
}

/// The largest absolute difference; not a number if one of them is none.
fn difference(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).fold(0.0, |max: f64, (a, b)| {
        let d = f64::from((a - b).abs());
        // `f64::max` passes over what is not a number, on either side.
        if max.is_nan() || d.is_nan() { f64::NAN } else { max.max(d) }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_that_is_no_number_is_not_forgotten() {
        assert_eq!(difference(&[1.0, -2.0, 0.5], &[1.0, 1.0, 0.0]), 3.0);
        for at in 0..3 {
            let mut a = [1.0; 3];
            a[at] = f32::NAN;
            assert!(difference(&a, &[0.5; 3]).is_nan(), "{at}");
            assert!(difference(&[0.5; 3], &a).is_nan(), "{at}");
        }
    }
}

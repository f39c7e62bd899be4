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
        let tensors =
            self.trainable().iter().map(|(name, var)| (name.clone(), var.as_detached_tensor()));
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
        let original;
        let adapted = match base {
            MergeBase::Original if quantized => {
                original = self.on_original()?;
                &original
            }
            _ => &self.parameters,
        };
        let probe = self.probe();
        let expected = logits(self, adapted, &probe)?;
        let merged = merged(adapted)?;
        let found = logits(self, &frozen(&merged), &probe)?;
        let largest = expected.iter().fold(0.0f64, |m, x| m.max(f64::from(x.abs())));
        let max_abs_difference = difference(&expected, &found);
        let max_rel_difference = max_abs_difference / largest.max(f64::MIN_POSITIVE);
        // Written so that a difference that is not a number fails too.
        ensure!(
            max_rel_difference <= TOLERANCE,
            "the merged model's logits differ from those of base and adapter by {:.2e} of the \
             largest (at most {TOLERANCE:.0e} is expected)",
            max_rel_difference
        );
        let mut rounded = BTreeMap::new();
        for (name, (tensor, dtype)) in &merged {
            rounded.insert(name.clone(), (tensor.to_dtype(*dtype)?, *dtype));
        }
        let mut widened = BTreeMap::new();
        for (name, (tensor, dtype)) in &rounded {
            widened.insert(name.clone(), (tensor.to_dtype(DType::F32)?, *dtype));
        }
        let after = logits(self, &frozen(&widened), &probe)?;
        let rounding_loss = difference(&found, &after);
        let dtype = rounded.values().next().map_or(DType::F32, |(_, dtype)| *dtype);
        let tensors = rounded.into_iter().map(|(name, (tensor, _))| (name, tensor)).collect();
        self.write_whole(dir, class_names, tensors, dtype)?;
        Ok(MergeReport { max_abs_difference, max_rel_difference, rounding_loss })
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
        tensors: BTreeMap<String, Tensor>,
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
        files::write(&dir.join("model.safetensors"), tensors)?;
        files::write_json(&dir.join("config.json"), &config)
    }
}

/// Every tensor of the model as f32, adapters added in, with the type that it came in.
fn merged(parameters: &Parameters) -> Result<BTreeMap<String, (Tensor, DType)>> {
    let mut out = BTreeMap::new();
    for (name, (held, dtype)) in &parameters.held {
        let base = match held {
            Held::Trained(var) => var.as_detached_tensor(),
            Held::Frozen(weight) => weight.dense()?,
        };
        let adapter = name.strip_suffix(".weight").and_then(|m| parameters.adapters.get(m));
        let whole = match adapter {
            None => base,
            Some(adapter) => {
                let (outputs, inputs) = base.dims2()?;
                let (a, b) = (adapter.a.as_tensor(), adapter.b.as_tensor());
                let r = a.dim(0)?;
                let sum = with_slices([&base, a, b], |[w, a, b]| {
                    let mut sum = w.to_vec();
                    let (a, b) = (Matrix::new(a, r, inputs), Matrix::new(b, outputs, r));
                    let scaling = parameters.scaling as f32;
                    product((&mut sum, inputs), 1.0, scaling, b, a, Threads::All);
                    sum
                })?;
                tensor(sum, (outputs, inputs))?
            }
        };
        out.insert(name.clone(), (whole, *dtype));
    }
    Ok(out)
}

fn frozen(tensors: &BTreeMap<String, (Tensor, DType)>) -> Parameters {
    let held = tensors.iter().map(|(name, (tensor, dtype))| {
        (name.clone(), (Held::Frozen(Frozen::Dense(tensor.clone())), *dtype))
    });
    Parameters { held: held.collect(), ..Parameters::default() }
}

fn logits(model: &Model, parameters: &Parameters, probe: &Batch) -> Result<Vec<f32>> {
    let net = Net::new(&model.config, parameters).context("the merged model")?;
    Ok(model.logits_of(&net, probe)?.flatten_all()?.to_vec1()?)
}

fn difference(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).fold(0.0, |max, (a, b)| {
        let d = f64::from((a - b).abs());
        // `max` would pass over a difference that is not a number.
        if d.is_nan() { f64::NAN } else { max.max(d) }
    })
}

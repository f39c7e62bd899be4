//! From files to the tensors of a model.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Tensor, Var};

use super::adapter::SavedAdapter;
use super::arithmetic::Arithmetic;
use super::config::ModelConfig;
use super::files::Weights;
use super::init;
use super::layout::{Parameter, Role, parameters};
use super::linear::{Adapter, Held, Parameters};
use super::nf4::Nf4;
use super::ops::Frozen;
use super::setup::{Compute, LoraConfig, Method, Quantization, Setup};
use crate::source::Fault;

/// What the names of an adapter's tensors begin with.
pub(super) const PEFT: &str = "base_model.model.";

/// The tensor's name in a file, which may leave out the body's prefix, or use the older names of
/// the first BERT checkpoints.
fn name_in(weights: &Weights, config: &ModelConfig, name: &str) -> Option<String> {
    let bare = name.strip_prefix(config.family.prefix()).and_then(|n| n.strip_prefix('.'));
    let candidates = [Some(name), bare];
    candidates.into_iter().flatten().find_map(|name| {
        let older = name
            .replace("LayerNorm.weight", "LayerNorm.gamma")
            .replace("LayerNorm.bias", "LayerNorm.beta");
        [name.to_owned(), older].into_iter().find(|n| weights.shape(n).is_some())
    })
}

/// Every tensor that the model asks for, by parameter, under its name in the file; `None` for one
/// that gets a fresh value.
fn found(
    weights: &Weights,
    config: &ModelConfig,
    wanted: &[Parameter],
) -> Result<Vec<Option<String>>> {
    let (mut names, mut missing, mut odd) = (Vec::new(), Vec::new(), Vec::new());
    for p in wanted {
        let name = name_in(weights, config, &p.name);
        match name.as_deref().and_then(|n| weights.shape(n)) {
            None if !p.optional => missing.push(p.name.clone()),
            Some(shape) if shape != p.shape => {
                odd.push(format!("`{}` is {shape:?}, expected {:?}", p.name, p.shape));
            }
            _ => {}
        }
        names.push(name);
    }
    if let Some(first) = missing.first() {
        let have: Vec<&str> = weights.names().take(3).collect();
        return Err(Fault::new(format!(
            "the weights lack {} of the model's {} tensors, `{first}` first",
            missing.len(),
            wanted.len()
        ))
        .help(format!("config.json and weights do not fit; there is `{}` …", have.join("`, `")))
        .into());
    }
    if !odd.is_empty() {
        odd.truncate(3);
        return Err(Fault::new(format!("weights and config.json differ: {}", odd.join("; ")))
            .help("for a head with another number of classes, start from the model without it")
            .into());
    }
    Ok(names)
}

/// How the tensors of a model are held.
pub(super) struct Loading<'a> {
    pub(super) config: &'a ModelConfig,
    pub(super) setup: &'a Setup,
    /// Whether the frozen linear layers are to be quantized.
    pub(super) quantization: Quantization,
}

/// The tensors of a base, and names of those that are trained mapped to their variables.
pub(super) type Loaded = (Parameters, BTreeMap<String, Var>);

impl Loading<'_> {
    /// Reads a base; trained are all tensors (`full`) or those of the head. With an adapter, what
    /// the base lacks counts as part of the head: only what is saved can be loaded again.
    ///
    /// # Errors
    /// When a tensor is missing, has another shape or cannot be read.
    pub(super) fn base(&self, files: &[(String, PathBuf)]) -> Result<Loaded> {
        let setup = self.setup;
        self.config.check_task(&setup.task)?;
        let full = setup.method == Method::Full;
        ensure!(
            !(full && self.quantization != Quantization::None),
            "a quantized base cannot be trained whole; use `method: qlora`"
        );
        if let Some(p) = setup.dropout {
            ensure!((0.0..1.0).contains(&p), "a dropout of {p}, expected a probability below 1");
        }
        let trains_all = full && !(setup.frozen && setup.compute.on_cpu());
        let weights = Weights::open(files)?;
        let wanted = parameters(self.config, Some(&setup.task));
        let names = found(&weights, self.config, &wanted)?;
        let mut held = BTreeMap::new();
        let mut trainable = BTreeMap::new();
        let mut fresh = BTreeSet::new();
        let mut common = DType::F32;
        for (p, name) in wanted.into_iter().zip(names) {
            let lacking = name.is_none();
            let tensor = match name {
                Some(name) => weights.get(&name)?,
                None => {
                    let range = self.config.initializer_range;
                    init::fresh(&p, range, setup.seed)?.to_dtype(common)?
                }
            };
            let dtype = tensor.dtype();
            common = if held.is_empty() { dtype } else { common };
            if lacking {
                fresh.insert(p.name.clone());
            }
            let trains = if full { trains_all } else { p.head || lacking };
            let value = if trains {
                let var = Var::from_tensor(&tensor.to_dtype(DType::F32)?)?;
                let peft = if full { String::new() } else { PEFT.to_owned() };
                trainable.insert(format!("{peft}{}", p.name), var.clone());
                Held::Trained(var)
            } else {
                Held::Frozen(match self.quantization {
                    Quantization::Nf4 { double } if p.role == Role::Linear => {
                        let packed = Nf4::quantize(&tensor, double);
                        Frozen::Nf4(Arc::new(packed.with_context(|| p.name.clone())?))
                    }
                    // Another arithmetic takes the numbers as they came.
                    _ if !setup.compute.on_cpu() => Frozen::Dense(tensor),
                    _ => Frozen::Dense(tensor.to_dtype(DType::F32)?),
                })
            };
            held.insert(p.name, (value, dtype));
        }
        let (seed, dropout) = (setup.seed, setup.dropout);
        let arithmetic = match setup.compute {
            Compute::CpuBf16 => Arithmetic::Bf16,
            _ => Arithmetic::F32,
        };
        let parameters =
            Parameters { held, fresh, seed, dropout, arithmetic, ..Parameters::default() };
        Ok((parameters, trainable))
    }

    /// Adds fresh adapters to a base.
    ///
    /// # Errors
    /// When the setup has no adapter, or its target modules are not in the model.
    pub(super) fn fresh_adapters(&self, (parameters, trainable): &mut Loaded) -> Result<()> {
        let Some(lora) = &self.setup.lora else {
            bail!("`method: lora` and `method: qlora` need the adapter's settings (`lora`)");
        };
        checked(lora)?;
        parameters.scaling = lora.scaling();
        parameters.adapter_dropout = lora.dropout;
        let mut modules = self.config.check_targets(&self.setup.task, &lora.target_modules)?;
        modules.retain(|module| !parameters.whole(module));
        ensure!(!modules.is_empty(), "the base lacks every layer that `target_modules` names");
        for module in modules {
            let dims = frozen_dims(parameters, &module)?;
            let (a, b) = init::adapter(&module, lora.r, dims, self.setup.seed)?;
            insert(parameters, trainable, module, (a, b))?;
        }
        Ok(())
    }

    /// Adds saved adapters, and the head saved with them, to a base.
    ///
    /// # Errors
    /// When a tensor is missing, superfluous or of another shape.
    pub(super) fn saved_adapters(
        &self,
        saved: &SavedAdapter,
        (parameters, trainable): &mut Loaded,
    ) -> Result<()> {
        parameters.scaling = saved.lora.scaling();
        parameters.adapter_dropout = saved.lora.dropout;
        let mut modules = saved.modules(self.config, &self.setup.task)?;
        modules.retain(|module| !parameters.whole(module));
        let mut expected: BTreeSet<String> = trainable.keys().cloned().collect();
        for module in &modules {
            expected.extend(["A", "B"].map(|m| format!("{PEFT}{module}.lora_{m}.weight")));
        }
        saved.check_names(&expected)?;
        for (name, var) in trainable.iter() {
            let tensor = saved.weights.get(name)?.to_dtype(DType::F32)?;
            ensure!(
                tensor.shape() == var.shape(),
                "the adapter's `{name}` is {:?}, expected {:?}",
                tensor.dims(),
                var.dims()
            );
            var.set(&tensor)?;
        }
        parameters.fresh.clear();
        for module in modules {
            let (outputs, inputs) = frozen_dims(parameters, &module)?;
            let r = saved.lora.r;
            let read = |matrix: &str, shape: (usize, usize)| -> Result<Tensor> {
                let name = format!("{PEFT}{module}.lora_{matrix}.weight");
                let tensor = saved.weights.get(&name)?.to_dtype(DType::F32)?;
                ensure!(
                    tensor.dims() == [shape.0, shape.1],
                    "the adapter's `{name}` is {:?}, expected {shape:?}",
                    tensor.dims()
                );
                Ok(tensor)
            };
            let pair = (read("A", (r, inputs))?, read("B", (outputs, r))?);
            insert(parameters, trainable, module, pair)?;
        }
        Ok(())
    }
}

fn checked(lora: &LoraConfig) -> Result<()> {
    ensure!(lora.r > 0, "the adapter's rank `r` is 0");
    ensure!(lora.alpha > 0.0, "the adapter's `alpha` is {}, expected above 0", lora.alpha);
    ensure!(
        (0.0..1.0).contains(&lora.dropout),
        "the adapter's `dropout` is {}, expected a probability below 1",
        lora.dropout
    );
    Ok(())
}

fn frozen_dims(parameters: &Parameters, module: &str) -> Result<(usize, usize)> {
    match parameters.held.get(&format!("{module}.weight")) {
        Some((Held::Frozen(weight), _)) => Ok(weight.dims()),
        _ => bail!("`{module}` is not a frozen linear layer of the model"),
    }
}

fn insert(
    parameters: &mut Parameters,
    trainable: &mut BTreeMap<String, Var>,
    module: String,
    (a, b): (Tensor, Tensor),
) -> Result<()> {
    let (a, b) = (Var::from_tensor(&a)?, Var::from_tensor(&b)?);
    trainable.insert(format!("{PEFT}{module}.lora_A.weight"), a.clone());
    trainable.insert(format!("{PEFT}{module}.lora_B.weight"), b.clone());
    parameters.adapters.insert(module, Adapter { a, b });
    Ok(())
}

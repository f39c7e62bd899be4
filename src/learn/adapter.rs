//! PEFT's adapter directories.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};

use super::config::ModelConfig;
use super::files::{self, Weights};
use super::load::PEFT;
use super::model::Model;
use super::setup::{LoraConfig, TargetModules, Task};
use crate::source::Fault;

/// The adapter's settings.
pub(super) const CONFIG: &str = "adapter_config.json";
/// The adapter's tensors.
pub(super) const WEIGHTS: &str = "adapter_model.safetensors";

/// The version of PEFT whose files these are.
const PEFT_VERSION: &str = "0.17.0";

/// An adapter directory.
pub(super) struct SavedAdapter {
    pub(super) lora: LoraConfig,
    pub(super) weights: Weights,
    /// Modules that carry none although they are named.
    excluded: Vec<String>,
}

impl SavedAdapter {
    /// Opens an adapter among files, given as (name, readable path).
    ///
    /// # Errors
    /// When a file is missing or damaged, or the adapter is of a kind that is not supported.
    pub(super) fn open(files: &[(String, PathBuf)]) -> Result<Self> {
        let file = |name: &str| {
            let found = files.iter().find(|(n, _)| n == name).map(|(_, path)| path);
            found.with_context(|| format!("the adapter has no {name}"))
        };
        let text = std::fs::read_to_string(file(CONFIG)?).context(CONFIG)?;
        let config: Map<String, Value> = serde_json::from_str(&text).context(CONFIG)?;
        let mut lora = settings(&config).context(CONFIG)?;
        let weights = Weights::open(&[(WEIGHTS.to_owned(), file(WEIGHTS)?.clone())])?;
        let excluded = match config.get("exclude_modules") {
            Some(Value::Array(names)) => {
                names.iter().filter_map(|n| n.as_str().map(str::to_owned)).collect()
            }
            _ => Vec::new(),
        };
        if by_pattern(&config) {
            let adapted = weights.names().filter_map(|name| {
                Some(name.strip_prefix(PEFT)?.strip_suffix(".lora_A.weight")?.to_owned())
            });
            lora.target_modules = TargetModules::Names(adapted.collect());
        }
        Ok(Self { lora, weights, excluded })
    }

    /// The modules that carry the adapter.
    ///
    /// # Errors
    /// When a named module is not in the model.
    pub(super) fn modules(&self, config: &ModelConfig, task: &Task) -> Result<BTreeSet<String>> {
        let named = config.check_targets(task, &self.lora.target_modules)?;
        let excluded = TargetModules::Names(self.excluded.clone());
        Ok(named.into_iter().filter(|module| !excluded.names(module)).collect())
    }

    /// Holds the names of the tensors against those that there should be.
    ///
    /// # Errors
    /// When one is missing or superfluous; both are listed.
    pub(super) fn check_names(&self, expected: &BTreeSet<String>) -> Result<()> {
        let there: BTreeSet<String> = self.weights.names().map(str::to_owned).collect();
        let list = |a: &BTreeSet<String>, b: &BTreeSet<String>| {
            let names: Vec<String> = a.difference(b).map(|n| format!("`{n}`")).collect();
            match names.len() {
                0 => "none".to_owned(),
                1..=4 => names.join(", "),
                n => format!("{} and {} more", names[..4].join(", "), n - 4),
            }
        };
        if there == *expected {
            return Ok(());
        }
        Err(Fault::new(format!(
            "the adapter does not fit the model: missing {}; unexpected {}",
            list(expected, &there),
            list(&there, expected)
        ))
        .help("load it on the base that it was trained on, with the task that it was trained for")
        .into())
    }
}

/// Whether the adapted modules are said by a regular expression or by layer; then they are those
/// that have a tensor.
fn by_pattern(config: &Map<String, Value>) -> bool {
    let text = |key: &str| config.get(key).and_then(Value::as_str);
    text("target_modules").is_some_and(|t| t != "all-linear")
        || text("exclude_modules").is_some()
        || config.get("layers_to_transform").is_some_and(|layers| !layers.is_null())
}

fn settings(config: &Map<String, Value>) -> Result<LoraConfig> {
    let get = |key: &str| config.get(key).filter(|v| !v.is_null());
    let kind = get("peft_type").and_then(Value::as_str).unwrap_or("none");
    ensure!(kind == "LORA", "`peft_type` is {kind}, only LORA is supported");
    for key in ["use_dora", "fan_in_fan_out", "lora_bias", "use_qalora"] {
        let on = get(key).and_then(Value::as_bool).unwrap_or(false);
        ensure!(!on, "`{key}` is not supported");
    }
    for key in ["rank_pattern", "alpha_pattern"] {
        let empty = get(key).and_then(Value::as_object).is_none_or(Map::is_empty);
        ensure!(empty, "`{key}` is not supported");
    }
    let bias = get("bias").and_then(Value::as_str).unwrap_or("none");
    ensure!(bias == "none", "`bias: {bias}` is not supported");
    let number = |key: &str, default: f64| get(key).and_then(Value::as_f64).unwrap_or(default);
    let targets = get("target_modules").cloned().unwrap_or_else(|| json!([]));
    Ok(LoraConfig {
        r: number("r", 8.0) as usize,
        alpha: number("lora_alpha", 8.0),
        dropout: number("lora_dropout", 0.0),
        target_modules: serde_json::from_value(targets).context("`target_modules`")?,
        use_rslora: get("use_rslora").and_then(Value::as_bool).unwrap_or(false),
    })
}

impl Model {
    /// Writes a PEFT adapter directory. `base_name` goes to `base_model_name_or_path`.
    ///
    /// # Errors
    /// When the method has no adapter, or a file cannot be written.
    pub fn save_adapter(&self, dir: &Path, base_name: &str) -> Result<()> {
        let lora = self.setup.lora.as_ref().context("a fully trained model has no adapter")?;
        let tensors =
            self.trainable().iter().map(|(name, var)| (name.clone(), var.as_detached_tensor()));
        files::write(&dir.join(WEIGHTS), tensors.collect())?;
        let adapted = self.parameters.adapters.keys();
        // Explicit names, because PEFT has no default for DistilBERT.
        let targets: BTreeSet<&str> = match &lora.target_modules {
            TargetModules::AllLinear => adapted.filter_map(|m| m.rsplit('.').next()).collect(),
            TargetModules::Names(names) => names.iter().map(String::as_str).collect(),
        };
        let heads = self.trainable().keys().filter(|n| !n.contains(".lora_"));
        let heads = heads.filter_map(|n| n.strip_prefix(PEFT)?.strip_suffix(".weight"));
        let mut heads: Vec<&str> = heads.collect();
        heads.sort_by_key(|name| std::cmp::Reverse(*name));
        // PEFT would put an adapter on these too.
        let names = TargetModules::Names(targets.iter().map(|t| (*t).to_owned()).collect());
        let mut excluded = self.config.module_names(&self.setup.task);
        excluded.retain(|module| names.names(module) && self.parameters.whole(module));
        let excluded = if excluded.is_empty() { Value::Null } else { json!(excluded) };
        let whole = lora.alpha.fract() == 0.0 && lora.alpha.abs() < 1e15;
        let alpha = if whole { json!(lora.alpha as i64) } else { json!(lora.alpha) };
        let task = match self.setup.task {
            Task::CausalLm => "CAUSAL_LM",
            Task::SequenceClassification { .. } => "SEQ_CLS",
        };
        let heads = if heads.is_empty() { Value::Null } else { json!(heads) };
        let config = json!({
            "alpha_pattern": {},
            "auto_mapping": null,
            "base_model_name_or_path": base_name,
            "bias": "none",
            "exclude_modules": excluded,
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "layers_pattern": null,
            "layers_to_transform": null,
            "lora_alpha": alpha,
            "lora_bias": false,
            "lora_dropout": lora.dropout,
            "megatron_config": null,
            "megatron_core": "megatron.core",
            "modules_to_save": heads,
            "peft_type": "LORA",
            "peft_version": PEFT_VERSION,
            "qalora_group_size": 16,
            "r": lora.r,
            "rank_pattern": {},
            "revision": null,
            "target_modules": targets,
            "target_parameters": null,
            "task_type": task,
            "trainable_token_indices": null,
            "use_dora": false,
            "use_rslora": lora.use_rslora,
        });
        let Value::Object(config) = config else { return Ok(()) };
        files::write_json(&dir.join(CONFIG), &config.into_iter().collect::<BTreeMap<_, _>>())
    }
}

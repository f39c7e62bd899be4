//! `merge`.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::loading;
use crate::artifact::{TrainedModel, Type};
use crate::learn::{Compute, MergeBase};
use crate::step::{Context, Input, Needs, Ports, StepKind};

/// Adds an adapter into its base: a transformers model with its tokenizer.
///
/// `W + scaling * B A` is computed in f32 and rounded once to the base's data type. A QLoRA
/// adapter was fitted to the quantized base, so by default it is merged into that, dequantized;
/// `original` takes the weights before quantization. Before rounding, the merged model's logits
/// must equal those of base and adapter, else the step fails; the difference and the loss by
/// rounding are in the record. Fully trained weights are taken as they are.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Merge {
    /// What training made.
    pub model: Input<TrainedModel>,
    /// The base to merge into; by default the one that was trained.
    #[serde(default)]
    pub base: Option<MergeBase>,
}

impl StepKind for Merge {
    const NAME: &'static str = "merge";
    const VERSION: u32 = 1;
    const RUNS_MODEL: bool = true;

    fn ports(&self) -> Ports {
        Ports::of(Type::Model)
    }

    fn needs(&self) -> Needs {
        Needs::ALL
    }

    fn run(&self, cx: &mut Context<'_>) -> Result<()> {
        let trained = cx.open(&self.model)?;
        let (config, weights) = (cx.out_dir("config")?, cx.out_dir("weights")?);
        if trained.info.method == "full" {
            for (name, path) in trained.trained()? {
                let port = port_of(&name, &config, &weights);
                if let Some(port) = port {
                    copy(&path, &port.join(&name))?;
                }
            }
        } else {
            let base = self.base.unwrap_or(match trained.info.quantization.as_str() {
                "none" => MergeBase::Original,
                _ => MergeBase::Dequantized,
            });
            let scratch = cx.scratch_dir()?;
            let model = loading::load_trained(&trained, Compute::Cpu)?;
            cx.stop()?;
            let report = model.merge(base, &scratch, &trained.info.classes)?;
            for entry in fs::read_dir(&scratch)? {
                let entry = entry?;
                let name = entry.file_name().to_string_lossy().into_owned();
                if let Some(port) = port_of(&name, &config, &weights) {
                    fs::rename(entry.path(), port.join(&name))?;
                }
            }
            cx.log(format!(
                "merged and unmerged logits differ by {:.2e} at most; rounding changes them by \
                 {:.2e}",
                report.max_abs_difference, report.rounding_loss
            ));
            cx.fact("max_abs_difference", report.max_abs_difference);
            cx.fact("max_rel_difference", report.max_rel_difference);
            cx.fact("rounding_loss", report.rounding_loss);
        }
        let view = &trained.base.0;
        if let Some(path) = view.find("config", "generation_config.json")? {
            copy(&path, &config.join("generation_config.json"))?;
        }
        cx.adopt("tokenizer", view.port("tokenizer")?);
        Ok(())
    }
}

/// The port that a file of a transformers directory belongs to.
fn port_of<'a>(name: &str, config: &'a Path, weights: &'a Path) -> Option<&'a Path> {
    if name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json") {
        Some(weights)
    } else {
        (name == "config.json").then_some(config)
    }
}

/// Copies content only: what the store holds is read-only, an output need not be.
fn copy(from: &Path, to: &Path) -> Result<()> {
    let copied = fs::File::open(from).and_then(|mut source| {
        let mut target = fs::File::create(to)?;
        std::io::copy(&mut source, &mut target)
    });
    copied.map(|_| ()).with_context(|| format!("copying to {}", to.display()))
}

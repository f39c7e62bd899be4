//! From artifacts to models and tasks, for the kinds that run a model.

use anyhow::Result;
use serde_json::Value;

use crate::artifact::{AnyModel, Model, TokensInfo, TokensSplit, TrainedModel};
use crate::learn::{
    self, Compute, Method, ModelConfig, ModelFiles, Quantization, RowReader, Setup, Task,
};
use crate::source::Fault;
use crate::step::{Context, Device};

pub(super) const CAUSAL_LM: &str = "causal_lm";
pub(super) const SEQUENCE_CLASSIFICATION: &str = "sequence_classification";

/// Names in artifacts of how a base is quantized.
pub(super) fn quantization_name(quantization: Quantization) -> &'static str {
    match quantization {
        Quantization::None => "none",
        Quantization::Nf4 { double: false } => "nf4",
        Quantization::Nf4 { double: true } => "nf4-double",
    }
}

/// Where a step's model runs.
pub(super) fn compute(cx: &mut Context<'_>) -> Result<Compute> {
    match (cx.device, cx.compute.as_str()) {
        (Device::Cpu, "f32") => Ok(Compute::Cpu),
        (Device::Cpu, "bf16") => {
            if !learn::tiles() {
                cx.warn(
                    "this processor has no matrix tiles (AMX): numbers are rounded to bf16 and \
                     multiplied in f32, which is slower than `--compute f32`",
                );
            }
            Ok(Compute::CpuBf16)
        }
        (Device::Cuda, "f32") => Ok(Compute::GpuF32),
        (Device::Cuda, "bf16") => Ok(Compute::GpuBf16),
        (device, mode) => anyhow::bail!("no arithmetic `{mode}` on {device:?}"),
    }
}

/// The files of a base model.
pub(super) fn files(model: &Model) -> Result<ModelFiles> {
    Ok(ModelFiles { config: model.config()?, weights: model.weights()? })
}

/// A task from its name and, for classification, its classes.
pub(super) fn task(name: &str, classes: usize) -> Result<Task> {
    match name {
        CAUSAL_LM => Ok(Task::CausalLm),
        SEQUENCE_CLASSIFICATION => {
            anyhow::ensure!(classes >= 2, "a classifier needs 2 classes or more, not {classes}");
            Ok(Task::SequenceClassification { classes })
        }
        other => anyhow::bail!("unknown task `{other}`"),
    }
}

/// The model, ready to run: a base as it is, or with what was trained on it.
pub(super) fn load(any: &AnyModel, task: &Task, compute: Compute) -> Result<learn::Model> {
    match any {
        AnyModel::Trained(trained) => load_trained(trained, compute),
        AnyModel::Base(base) => {
            let setup = Setup {
                task: task.clone(),
                method: Method::Full,
                lora: None,
                quantization: Quantization::None,
                seed: 0,
                dropout: None,
                compute,
                gradient_checkpointing: false,
                frozen: true,
            };
            learn::Model::load(&files(base)?, &setup)
        }
    }
}

/// A trained model on the base it was trained on, quantized as it was then.
pub(super) fn load_trained(trained: &TrainedModel, compute: Compute) -> Result<learn::Model> {
    let info = &trained.info;
    let method = match info.method.as_str() {
        "full" => Method::Full,
        "lora" => Method::Lora,
        "qlora" => Method::Qlora,
        other => anyhow::bail!("unknown training method `{other}`"),
    };
    let quantization = match info.quantization.as_str() {
        "none" => Quantization::None,
        "nf4" => Quantization::Nf4 { double: false },
        "nf4-double" => Quantization::Nf4 { double: true },
        other => anyhow::bail!("unknown quantization `{other}`"),
    };
    let task = task(&info.task, info.classes.len())?;
    // The adapter's own settings are read from its files.
    let setup = Setup {
        task,
        method,
        lora: None,
        quantization,
        seed: 0,
        dropout: None,
        compute,
        gradient_checkpointing: false,
        frozen: true,
    };
    learn::Model::load_trained(&files(&trained.base)?, &setup, &trained.trained()?)
}

/// The task that a model was made for: a trained one says so, a base by the architecture in its
/// `config.json` (a bare encoder has none).
pub(super) fn task_of(any: &AnyModel) -> Result<Option<Task>> {
    if let Some(trained) = any.trained() {
        return task(&trained.info.task, trained.info.classes.len()).map(Some);
    }
    let config: Value = any.base().0.json("config", "config.json")?;
    let architecture = config["architectures"][0].as_str().unwrap_or_default();
    Ok(if architecture.ends_with("ForCausalLM") {
        Some(Task::CausalLm)
    } else if architecture.ends_with("ForSequenceClassification") {
        let classes = config["id2label"].as_object().map_or(2, serde_json::Map::len);
        Some(Task::SequenceClassification { classes })
    } else {
        None
    })
}

/// Class names of a model that is a classifier already.
pub(super) fn classes_of(any: &AnyModel) -> Result<Vec<String>> {
    if let Some(trained) = any.trained() {
        return Ok(trained.info.classes.clone());
    }
    let config: Value = any.base().0.json("config", "config.json")?;
    let labels = config["id2label"].as_object();
    let count = labels.map_or(0, serde_json::Map::len);
    let name = |i: usize| config["id2label"][i.to_string()].as_str().map(str::to_owned);
    Ok((0..count).map_while(name).collect())
}

/// Whether these are names that someone gave, not numbers or transformers' `LABEL_0`…
fn are_named(classes: &[String]) -> bool {
    let number = |name: &str| name.strip_prefix("LABEL_").unwrap_or(name).parse::<i64>().is_ok();
    classes.iter().any(|name| !number(name))
}

/// The model's class for each class of the data, by name, whatever the case; `None` where the
/// order is the same, or one side has no names to tell by.
///
/// # Errors
/// When the names are not the same; both sides are listed.
pub(super) fn class_order(model: &[String], data: &[String]) -> Result<Option<Vec<usize>>> {
    if !are_named(model) || !are_named(data) {
        return Ok(None);
    }
    let lower = |names: &[String]| names.iter().map(|n| n.to_lowercase()).collect::<Vec<_>>();
    let (own, theirs) = (lower(model), lower(data));
    if own == theirs {
        return Ok(None);
    }
    let order: Option<Vec<usize>> =
        theirs.iter().map(|name| own.iter().position(|n| n == name)).collect();
    let mut each = order.clone().unwrap_or_default();
    each.sort_unstable();
    if each.into_iter().eq(0..own.len()) {
        return Ok(order);
    }
    let list = |names: &[String]| format!("`{}`", names.join("`, `"));
    let message =
        format!("the model's classes are {}, those of the tokens {}", list(model), list(data));
    let help = "say which is which: give the tokens the model's names, as `classes` of the format \
                step in the order of the labels";
    Err(Fault::new(message).help(help).into())
}

/// Refuses tokens that do not fit a model, from headers alone.
pub(super) fn check_fit(config: &ModelConfig, info: &TokensInfo, split: &str) -> Result<()> {
    let positions = config.max_positions() as u64;
    if info.longest > positions {
        let message = format!(
            "the longest row of split `{split}` has {} tokens, but the model has {positions} \
             positions",
            info.longest
        );
        let help = format!("set `max_length: {positions}` or less in the tokenize step");
        return Err(Fault::new(message).help(help).into());
    }
    let vocabulary = config.vocab_size() as u64;
    if info.vocab_size > vocabulary {
        let message = format!(
            "the tokenizer of split `{split}` has {} tokens, but the model's embedding has \
             {vocabulary} rows",
            info.vocab_size
        );
        let help = "tokenize with the tokenizer of this model (`${steps.<model>.tokenizer}`)";
        return Err(Fault::new(message).help(help).into());
    }
    Ok(())
}

/// Refuses candidates that do not fit a model behind a split's longest prompt. The rows are read
/// only where their lengths alone leave it open.
pub(super) fn check_candidates(
    config: &ModelConfig,
    TokensSplit { rows, info }: &TokensSplit,
    split: &str,
) -> Result<()> {
    let positions = config.max_positions() as u64;
    let Some(longest) = info.candidates.iter().max_by_key(|c| c.ids.len()) else { return Ok(()) };
    let room = longest.ids.len() as u64;
    if info.longest + room <= positions {
        return Ok(());
    }
    let mut prompt = 0;
    for row in RowReader::open(rows)? {
        prompt = prompt.max(row?.prompt().len() as u64);
    }
    if prompt + room <= positions {
        return Ok(());
    }
    let message = format!(
        "the longest prompt of split `{split}` has {prompt} tokens; with the {room} of the answer \
         `{}` that is more than the model's {positions} positions",
        longest.word
    );
    let fits = (positions + 1).saturating_sub(room);
    let help = format!("set `max_length: {fits}` or less in the tokenize step");
    Err(Fault::new(message).help(help).into())
}

/// Whether tokens were made with another tokenizer than the model's, in a sentence.
pub(super) fn other_tokenizer(model: &Model, info: &TokensInfo) -> Option<String> {
    let (made, own) = (info.tokenizer?, model.0.port("tokenizer").ok()?);
    (made != own).then(|| "the tokens were made with another tokenizer than the model's".into())
}

/// `12,345,678`.
pub(super) fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_are_grouped() {
        assert_eq!(grouped(0), "0");
        assert_eq!(grouped(999), "999");
        assert_eq!(grouped(739_586), "739,586");
        assert_eq!(grouped(67_694_596), "67,694,596");
    }

    #[test]
    fn classes_are_told_by_name() {
        let names = |list: &[&str]| list.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>();
        let order = |a: &[&str], b: &[&str]| class_order(&names(a), &names(b));
        assert_eq!(order(&["bad", "good"], &["Bad", "Good"]).unwrap(), None);
        assert_eq!(order(&["LABEL_0", "LABEL_1"], &["bad", "good"]).unwrap(), None);
        assert_eq!(order(&["bad", "good"], &["0", "1"]).unwrap(), None);
        let three = order(&["c", "a", "b"], &["a", "b", "c"]).unwrap();
        assert_eq!(three, Some(vec![1, 2, 0]));
        for other in [&["bad", "great"][..], &["good", "good"], &["bad", "good", "best"]] {
            let err = order(&["good", "bad"], other).unwrap_err().to_string();
            assert!(err.contains("`good`, `bad`") && err.contains(&other.join("`, `")), "{err}");
        }
    }

    #[test]
    fn tasks_are_checked() {
        assert!(task(SEQUENCE_CLASSIFICATION, 1).is_err());
        assert!(task("regression", 2).is_err());
        assert_eq!(task(CAUSAL_LM, 0).unwrap(), Task::CausalLm);
    }
}

//! From artifacts to models and tasks, for the kinds that run a model.

use anyhow::Result;
use serde_json::Value;

use crate::artifact::{AnyModel, Model, TokensInfo, TrainedModel};
use crate::learn::{self, Method, ModelConfig, ModelFiles, Quantization, Setup, Task};
use crate::source::Fault;

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
pub(super) fn load(any: &AnyModel, task: &Task) -> Result<learn::Model> {
    match any {
        AnyModel::Trained(trained) => load_trained(trained),
        AnyModel::Base(base) => {
            let setup = Setup {
                task: task.clone(),
                method: Method::Full,
                lora: None,
                quantization: Quantization::None,
                seed: 0,
                dropout: None,
            };
            learn::Model::load(&files(base)?, &setup)
        }
    }
}

/// A trained model on the base it was trained on, quantized as it was then.
pub(super) fn load_trained(trained: &TrainedModel) -> Result<learn::Model> {
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
    let setup = Setup { task, method, lora: None, quantization, seed: 0, dropout: None };
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
    fn tasks_are_checked() {
        assert!(task(SEQUENCE_CLASSIFICATION, 1).is_err());
        assert!(task("regression", 2).is_err());
        assert_eq!(task(CAUSAL_LM, 0).unwrap(), Task::CausalLm);
    }
}

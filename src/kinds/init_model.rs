//! `init_model`: a small base model from nothing.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::artifact::{Dataset, Type};
use crate::learn::{ModelConfig, random_weights};
use crate::step::{Context, Input, Needs, Ports, Problem, StepKind};
use crate::text::{
    Algorithm, ChatTemplate, Tokenizer, TokenizerSource, TokenizerSpec, texts, train_tokenizer,
};

/// Makes a small base model from nothing: a tokenizer trained on the data, and random weights.
///
/// `config` is what `config.json` will say, in the words of its `model_type` (`llama`, `mistral`,
/// `qwen2`, `qwen3`, `bert`, `distilbert`); the size of the vocabulary and the ids of the special
/// tokens are the tokenizer's. Weights are normal with `initializer_range` (0.02), norms 1,
/// biases 0. The ports are those of any model: `config`, `weights`, `tokenizer`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct InitModel {
    /// `config.json`, without the vocabulary.
    config: BTreeMap<String, Value>,
    /// The tokenizer that is trained.
    tokenizer: TokenizerFrom,
    /// Seed of the weights.
    #[serde(default)]
    seed: u64,
}

/// How the tokenizer is trained.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct TokenizerFrom {
    /// The dataset that it is trained on.
    data: Input<Dataset>,
    /// The split.
    #[serde(default = "train")]
    split: String,
    /// The column of the text.
    column: String,
    /// `bpe` (byte-level, as GPT-2's) or `wordpiece` (as BERT's).
    algorithm: Algorithm,
    /// Most entries of the vocabulary.
    vocab_size: usize,
    /// How often a pair must be seen to become an entry.
    #[serde(default = "twice")]
    min_frequency: u64,
    /// A chat template for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    chat_template: Option<String>,
}

fn train() -> String {
    "train".to_owned()
}

fn twice() -> u64 {
    2
}

/// Set by the step.
const OWN: [&str; 4] = ["vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"];

impl StepKind for InitModel {
    const NAME: &'static str = "init_model";
    const VERSION: u32 = 1;

    fn ports(&self) -> Ports {
        Ports::of(Type::Model)
    }

    fn check(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        for key in OWN.iter().filter(|key| self.config.contains_key(**key)) {
            let problem =
                Problem::error(format!("config.{key}"), format!("`{key}` is not yours to set"));
            problems.push(problem.help("it comes from the tokenizer"));
        }
        if let Err(e) = self.model_config(self.tokenizer.vocab_size, &Value::Null) {
            let problem = Problem::error("config", format!("{:#}", e));
            let help = crate::source::advice(&e).join("; ");
            problems.push(if help.is_empty() { problem } else { problem.help(help) });
        }
        let (size, least) =
            (self.tokenizer.vocab_size, self.tokenizer.algorithm.least_vocabulary());
        if size < least {
            let message = format!("a vocabulary of {size} is too small");
            let problem = Problem::error("tokenizer.vocab_size", message);
            let help = format!("special tokens and single characters alone are {least} or more");
            problems.push(problem.help(help));
        }
        if let Some(template) = &self.tokenizer.chat_template
            && let Err(e) = ChatTemplate::new(template, BTreeMap::new(), None)
        {
            problems.push(Problem::error("tokenizer.chat_template", format!("{e:#}")));
        }
        if let Some(known) = self.tokenizer.data.names()
            && !known.contains(&self.tokenizer.split)
        {
            let split = &self.tokenizer.split;
            let known: Vec<&str> = known.iter().map(String::as_str).collect();
            let problem = Problem::error("tokenizer.split", format!("there is no split `{split}`"));
            problems.push(problem.help(crate::source::suggest(split, &known).unwrap_or_default()));
        }
        problems
    }

    fn narrow(&mut self) {
        let split = self.tokenizer.split.clone();
        self.tokenizer.data.keep(&[&split]);
    }

    fn check_inputs(&self, cx: &Context<'_>) -> Result<()> {
        let from = &self.tokenizer;
        let features = cx.open(&from.data)?.split(&from.split)?.features;
        let known: Vec<&str> = features.columns.iter().map(|(name, _)| name.as_str()).collect();
        if known.contains(&from.column.as_str()) {
            return Ok(());
        }
        let message = format!("split `{}` has no column `{}`", from.split, from.column);
        let help = crate::source::suggest(&from.column, &known).unwrap_or_default();
        Err(crate::source::Fault::new(message).help(help).into())
    }

    fn needs(&self) -> Needs {
        Needs::ALL
    }

    fn run(&self, cx: &mut Context<'_>) -> Result<()> {
        let from = &self.tokenizer;
        let split = cx.open(&from.data)?.split(&from.split)?;
        let positions = self.model_config(from.vocab_size, &Value::Null)?.1.max_positions();
        let spec = TokenizerSpec {
            algorithm: from.algorithm,
            vocab_size: from.vocab_size,
            min_frequency: from.min_frequency,
            max_length: positions,
            chat_template: from.chat_template.clone(),
        };
        let dir = cx.out_dir("tokenizer")?;
        cx.log("training the tokenizer");
        let mut seen = 0;
        let read = |take: &mut dyn FnMut(&str) -> Result<()>| {
            texts(&split.rows, &[&from.column], &mut |text| {
                seen += 1;
                if seen % 1000 == 0 {
                    cx.progress(seen, split.features.rows, "rows", "tokenizer");
                    cx.stop()?;
                }
                take(text)
            })
        };
        let vocab = train_tokenizer(&spec, read, &dir)?;
        cx.stop()?;
        let tokenizer = Tokenizer::load(&TokenizerSource {
            tokenizer: dir.join("tokenizer.json"),
            config: Some(dir.join("tokenizer_config.json")),
            ..TokenizerSource::default()
        })?;
        let ids = json!({
            "bos_token_id": tokenizer.bos_id().filter(|_| from.algorithm == Algorithm::Bpe),
            "eos_token_id": tokenizer.eos_id(),
            "pad_token_id": tokenizer.pad_id(),
        });
        let (text, config) = self.model_config(vocab, &ids)?;
        cx.write_json(&cx.out_dir("config")?, "config.json", &text)?;
        cx.log(format!("a vocabulary of {vocab}; random weights"));
        let weights = cx.out_dir("weights")?.join("model.safetensors");
        random_weights(&config, None, self.seed, &weights)?;
        cx.fact("vocab_size", vocab);
        Ok(())
    }
}

impl InitModel {
    /// `config.json` with a vocabulary and token ids, and what it says.
    fn model_config(&self, vocab_size: usize, ids: &Value) -> Result<(Value, ModelConfig)> {
        let mut config = self.config.clone();
        config.insert("vocab_size".into(), json!(vocab_size));
        config.entry("initializer_range".into()).or_insert(json!(0.02));
        config.entry("torch_dtype".into()).or_insert(json!("float32"));
        let ids = ids.as_object().into_iter().flatten();
        for (name, id) in ids.filter(|(_, id)| !id.is_null()) {
            config.insert(name.clone(), id.clone());
        }
        let config = serde_json::to_value(config)?;
        let read = ModelConfig::parse(&config.to_string()).context("as a model")?;
        Ok((config, read))
    }
}

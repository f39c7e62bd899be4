//! `config.json` of a model.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value};

use super::layout::{Role, parameters};
use super::setup::{TargetModules, Task};
use crate::source::{Fault, nearest, suggest};

/// A family of models that share a definition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Devlin et al. 2018.
    Bert,
    /// Sanh et al. 2019.
    DistilBert,
    /// Touvron et al. 2023, and SmolLM.
    Llama,
    /// Jiang et al. 2023.
    Mistral,
    /// Yang et al. 2024.
    Qwen2,
    /// Yang et al. 2025.
    Qwen3,
}

const FAMILIES: [(&str, Family); 6] = [
    ("bert", Family::Bert),
    ("distilbert", Family::DistilBert),
    ("llama", Family::Llama),
    ("mistral", Family::Mistral),
    ("qwen2", Family::Qwen2),
    ("qwen3", Family::Qwen3),
];

impl Family {
    /// Whether its models predict the next token.
    pub fn is_decoder(self) -> bool {
        !matches!(self, Self::Bert | Self::DistilBert)
    }

    /// What the names of the body's tensors begin with.
    pub(crate) fn prefix(self) -> &'static str {
        match self {
            Self::Bert => "bert",
            Self::DistilBert => "distilbert",
            _ => "model",
        }
    }

    /// transformers' class for a task (`None`: the bare model, or the language model of a
    /// decoder).
    pub(crate) fn architecture(self, task: Option<&Task>) -> String {
        let stem = match self {
            Self::Bert => "Bert",
            Self::DistilBert => "DistilBert",
            Self::Llama => "Llama",
            Self::Mistral => "Mistral",
            Self::Qwen2 => "Qwen2",
            Self::Qwen3 => "Qwen3",
        };
        let end = match task {
            Some(Task::SequenceClassification { .. }) => "ForSequenceClassification",
            None if !self.is_decoder() => "Model",
            _ => "ForCausalLM",
        };
        format!("{stem}{end}")
    }
}

/// The shape of a model, read from `config.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    pub(crate) family: Family,
    /// The file itself.
    pub(crate) raw: Map<String, Value>,
    /// Elements of a token's vector.
    pub(crate) hidden: usize,
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    /// Elements of a head.
    pub(crate) head: usize,
    pub(crate) intermediate: usize,
    pub(crate) vocab: usize,
    pub(crate) positions: usize,
    pub(crate) type_vocab: usize,
    /// Added to the variance in norms.
    pub(crate) eps: f64,
    pub(crate) initializer_range: f64,
    /// Whether the output embedding is the input embedding.
    pub(crate) tied: bool,
    pub(crate) pad: Option<u32>,
    pub(crate) hidden_dropout: f64,
    pub(crate) attention_dropout: f64,
    pub(crate) classifier_dropout: f64,
    pub(crate) qkv_bias: bool,
    pub(crate) out_bias: bool,
    pub(crate) mlp_bias: bool,
    /// Angle per position of each pair of a head's elements; empty without rotary embedding.
    pub(crate) rope: Vec<f32>,
    /// How many tokens a token sees, by layer.
    pub(crate) windows: Vec<Option<usize>>,
}

/// Typed reads of a JSON object.
struct Fields<'a>(&'a Map<String, Value>);

impl Fields<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|v| !v.is_null())
    }

    fn size(&self, key: &str) -> Result<usize> {
        self.maybe_size(key)?.ok_or_else(|| anyhow::anyhow!("`{key}` is missing"))
    }

    fn maybe_size(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let size = value.as_u64().filter(|n| *n > 0 && *n < 1 << 40);
        let size = size.with_context(|| format!("`{key}` is {value}, expected a size above 0"))?;
        Ok(Some(usize::try_from(size)?))
    }

    fn number(&self, key: &str, default: f64) -> Result<f64> {
        match self.get(key) {
            None => Ok(default),
            Some(v) => v.as_f64().with_context(|| format!("`{key}` is {v}, expected a number")),
        }
    }

    fn flag(&self, key: &str, default: bool) -> bool {
        self.get(key).and_then(Value::as_bool).unwrap_or(default)
    }

    fn text(&self, key: &str, default: &'static str) -> &str {
        self.get(key).and_then(Value::as_str).unwrap_or(default)
    }
}

impl ModelConfig {
    /// Reads `config.json`.
    ///
    /// # Errors
    /// When it cannot be read, or describes a model of a family that is not supported.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read the model's {}", path.display()))?;
        Self::parse(&text).context("the model's config.json")
    }

    /// From the text of `config.json`.
    ///
    /// # Errors
    /// As [`ModelConfig::read`].
    pub fn parse(text: &str) -> Result<Self> {
        let raw: Map<String, Value> = serde_json::from_str(text)?;
        let f = Fields(&raw);
        let known: Vec<&str> = FAMILIES.iter().map(|(name, _)| *name).collect();
        let name = f.text("model_type", "");
        let Some((_, family)) = FAMILIES.iter().find(|(known, _)| *known == name) else {
            let message = match name {
                "" => "it has no `model_type`".to_owned(),
                name => format!("model type `{name}` is not supported"),
            };
            return Err(Fault::new(message).help(supported(name, &known)).into());
        };
        if f.get("quantization_config").is_some() {
            return Err(Fault::new("the model is quantized already")
                .help("name the model that it was made from; `method: qlora` quantizes it")
                .into());
        }
        match family {
            Family::Bert | Family::DistilBert => encoder(*family, &f),
            _ => decoder(*family, &f),
        }
        .map(|config| Self { raw: raw.clone(), ..config })
    }

    /// Rows of the embedding.
    pub fn vocab_size(&self) -> usize {
        self.vocab
    }

    /// The longest sequence.
    pub fn max_positions(&self) -> usize {
        self.positions
    }

    /// Whether the model predicts the next token.
    pub fn is_decoder(&self) -> bool {
        self.family.is_decoder()
    }

    /// Whether the model can have this head.
    ///
    /// # Errors
    /// When it cannot; the error says which task it has.
    pub fn check_task(&self, task: &Task) -> Result<()> {
        let name = self.family.architecture(None);
        match (task, self.is_decoder()) {
            (Task::CausalLm, false) => {
                bail!("{name} is an encoder: it does not predict the next token")
            }
            (Task::SequenceClassification { .. }, true) => {
                bail!("sequence classification is for BERT and DistilBERT models, not for {name}")
            }
            (Task::SequenceClassification { classes }, _) if *classes < 2 => {
                bail!("classification into {classes} class(es): at least 2 are needed")
            }
            _ => Ok(()),
        }
    }

    /// Every linear layer that can carry an adapter, by full path.
    pub fn module_names(&self, task: &Task) -> Vec<String> {
        let linear = parameters(self, Some(task)).into_iter();
        let linear = linear.filter(|p| p.role == Role::Linear && !p.head);
        linear.filter_map(|p| p.name.strip_suffix(".weight").map(str::to_owned)).collect()
    }

    /// The linear layers that target modules mean, by full path.
    ///
    /// # Errors
    /// When a name matches none; the error lists those that there are.
    pub fn check_targets(&self, task: &Task, targets: &TargetModules) -> Result<Vec<String>> {
        let modules = self.module_names(task);
        let mut ends: Vec<&str> = modules.iter().filter_map(|m| m.rsplit('.').next()).collect();
        ends.sort_unstable();
        ends.dedup();
        if let TargetModules::Names(names) = targets {
            ensure!(!names.is_empty(), "`target_modules` is empty");
            for name in names {
                let one = TargetModules::Names(vec![name.clone()]);
                if !modules.iter().any(|m| one.names(m)) {
                    let list = ends.iter().map(|e| format!("`{e}`")).collect::<Vec<_>>();
                    let near = nearest(name, ends.iter().copied());
                    let near = near.map_or(String::new(), |n| format!("did you mean `{n}`? "));
                    return Err(Fault::new(format!("the model has no linear layer `{name}`"))
                        .help(format!("{near}there is {}, or `all-linear`", list.join(", ")))
                        .into());
                }
            }
        }
        Ok(modules.into_iter().filter(|m| targets.names(m)).collect())
    }
}

fn supported(name: &str, known: &[&str]) -> String {
    let list = known.iter().map(|k| format!("`{k}`")).collect::<Vec<_>>().join(", ");
    match nearest(name, known.iter().copied()).filter(|_| !name.is_empty()) {
        Some(near) => format!("did you mean `{near}`? supported are {list}"),
        None => format!("supported are {list}"),
    }
}

/// An error unless a setting has the one value that is implemented.
fn only(f: &Fields<'_>, key: &str, allowed: &[&'static str]) -> Result<()> {
    let value = f.text(key, allowed[0]);
    if allowed.contains(&value) {
        return Ok(());
    }
    let help = suggest(value, allowed).unwrap_or_default();
    Err(Fault::new(format!("`{key}: {value}` is not supported")).help(help).into())
}

fn encoder(family: Family, f: &Fields<'_>) -> Result<ModelConfig> {
    let bert = family == Family::Bert;
    let key = |in_bert: &'static str, other: &'static str| if bert { in_bert } else { other };
    only(f, key("hidden_act", "activation"), &["gelu"])?;
    only(f, "position_embedding_type", &["absolute"])?;
    ensure!(!f.flag("is_decoder", false), "`is_decoder: true` is not supported");
    ensure!(!f.flag("sinusoidal_pos_embds", false), "`sinusoidal_pos_embds` is not supported");
    let hidden = f.size(key("hidden_size", "dim"))?;
    let layers = f.size(key("num_hidden_layers", "n_layers"))?;
    let heads = f.size(key("num_attention_heads", "n_heads"))?;
    ensure!(hidden % heads == 0, "{heads} heads do not divide a hidden size of {hidden}");
    let dropout = probability(f, key("hidden_dropout_prob", "dropout"), 0.1)?;
    let classifier = match bert {
        true => probability(f, "classifier_dropout", dropout)?,
        false => probability(f, "seq_classif_dropout", 0.2)?,
    };
    Ok(ModelConfig {
        family,
        raw: Map::new(),
        hidden,
        layers,
        heads,
        kv_heads: heads,
        head: hidden / heads,
        intermediate: f.size(key("intermediate_size", "hidden_dim"))?,
        vocab: f.size("vocab_size")?,
        positions: f.size("max_position_embeddings")?,
        type_vocab: if bert { f.maybe_size("type_vocab_size")?.unwrap_or(2) } else { 0 },
        eps: f.number("layer_norm_eps", 1e-12)?,
        initializer_range: f.number("initializer_range", 0.02)?,
        tied: true,
        pad: Some(pad(f).unwrap_or(0)),
        hidden_dropout: dropout,
        attention_dropout: {
            probability(f, key("attention_probs_dropout_prob", "attention_dropout"), 0.1)?
        },
        classifier_dropout: classifier,
        qkv_bias: true,
        out_bias: true,
        mlp_bias: true,
        rope: Vec::new(),
        windows: vec![None; layers],
    })
}

fn pad(f: &Fields<'_>) -> Option<u32> {
    f.get("pad_token_id").and_then(Value::as_u64).and_then(|id| u32::try_from(id).ok())
}

fn probability(f: &Fields<'_>, key: &str, default: f64) -> Result<f64> {
    let p = f.number(key, default)?;
    ensure!((0.0..1.0).contains(&p), "`{key}` is {p}, expected a probability below 1");
    Ok(p)
}

fn decoder(family: Family, f: &Fields<'_>) -> Result<ModelConfig> {
    only(f, "hidden_act", &["silu"])?;
    let hidden = f.size("hidden_size")?;
    let layers = f.size("num_hidden_layers")?;
    let heads = f.size("num_attention_heads")?;
    let kv_heads = f.maybe_size("num_key_value_heads")?.unwrap_or(heads);
    let head = match (f.maybe_size("head_dim")?, family) {
        (Some(head), _) => head,
        (None, Family::Qwen3) => 128,
        (None, _) => {
            ensure!(hidden % heads == 0, "{heads} heads do not divide a hidden size of {hidden}");
            hidden / heads
        }
    };
    ensure!(heads % kv_heads == 0, "{kv_heads} key heads do not divide {heads} heads");
    ensure!(head % 2 == 0, "heads of {head} elements cannot be rotated in pairs");
    let attention_bias = f.flag("attention_bias", false);
    Ok(ModelConfig {
        family,
        raw: Map::new(),
        hidden,
        layers,
        heads,
        kv_heads,
        head,
        intermediate: f.size("intermediate_size")?,
        vocab: f.size("vocab_size")?,
        positions: f.maybe_size("max_position_embeddings")?.unwrap_or(2048),
        type_vocab: 0,
        eps: f.number("rms_norm_eps", 1e-6)?,
        initializer_range: f.number("initializer_range", 0.02)?,
        tied: f.flag("tie_word_embeddings", false),
        pad: pad(f),
        hidden_dropout: 0.0,
        attention_dropout: probability(f, "attention_dropout", 0.0)?,
        classifier_dropout: 0.0,
        qkv_bias: match family {
            Family::Qwen2 => true,
            Family::Mistral => false,
            _ => attention_bias,
        },
        out_bias: matches!(family, Family::Llama | Family::Qwen3) && attention_bias,
        mlp_bias: family == Family::Llama && f.flag("mlp_bias", false),
        rope: inverse_frequencies(f, head)?,
        windows: windows(family, f, layers)?,
    })
}

/// Which layers see a window only.
fn windows(family: Family, f: &Fields<'_>, layers: usize) -> Result<Vec<Option<usize>>> {
    let window = f.maybe_size("sliding_window")?;
    let window = match family {
        Family::Llama => None,
        Family::Mistral => window,
        _ => window.filter(|_| f.flag("use_sliding_window", false)),
    };
    if window.is_some()
        && let Some(Value::Array(types)) = f.get("layer_types")
    {
        ensure!(types.len() == layers, "`layer_types` is not as long as the model");
        let sliding = |t: &Value| t.as_str() == Some("sliding_attention");
        return Ok(types.iter().map(|t| window.filter(|_| sliding(t))).collect());
    }
    let first = match family {
        Family::Mistral => 0,
        _ => f.number("max_window_layers", 28.0)? as usize,
    };
    Ok((0..layers).map(|i| window.filter(|_| i >= first)).collect())
}

/// Angles per position, with the scaling of `rope_scaling` (or `rope_parameters`, as newer files
/// call it): `linear` (Chen et al. 2023) or Llama 3's.
fn inverse_frequencies(f: &Fields<'_>, head: usize) -> Result<Vec<f32>> {
    let empty = Map::new();
    let parameters = f.get("rope_parameters").or_else(|| f.get("rope_scaling"));
    let rope = Fields(parameters.and_then(Value::as_object).unwrap_or(&empty));
    let theta = f.number("rope_theta", 10_000.0)?;
    let theta = rope.number("rope_theta", theta)?;
    let plain = (0..head / 2).map(|i| 1.0 / theta.powf(2.0 * i as f64 / head as f64));
    let key = if rope.get("rope_type").is_some() { "rope_type" } else { "type" };
    only(&rope, key, &["default", "linear", "llama3"])?;
    let kind = rope.text(key, "default");
    if kind == "default" {
        return Ok(plain.map(|f| f as f32).collect());
    }
    let factor = rope.number("factor", 1.0)?;
    ensure!(factor > 0.0, "a rope scaling factor of {factor}");
    if kind == "linear" {
        return Ok(plain.map(|f| (f / factor) as f32).collect());
    }
    let low = rope.number("low_freq_factor", 1.0)?;
    let high = rope.number("high_freq_factor", 4.0)?;
    let original = rope.number("original_max_position_embeddings", 8192.0)?;
    ensure!(high > low, "rope's high_freq_factor is not above its low_freq_factor");
    let scaled = plain.map(|f| {
        let wavelength = std::f64::consts::TAU / f;
        if wavelength < original / high {
            f
        } else if wavelength > original / low {
            f / factor
        } else {
            let smooth = (original / wavelength - low) / (high - low);
            (1.0 - smooth) * f / factor + smooth * f
        }
    });
    Ok(scaled.map(|f| f as f32).collect())
}

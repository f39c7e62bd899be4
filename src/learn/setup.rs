//! What to train and how: task, method, LoRA, quantization.

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{SeqAccess, Visitor, value::SeqAccessDeserializer};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// What the model's head predicts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Task {
    /// One of so many classes for a whole sequence.
    SequenceClassification {
        /// Number of classes, at least 2.
        classes: usize,
    },
    /// The next token.
    CausalLm,
}

/// Which parameters are trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// All of them.
    Full,
    /// Low-rank adapters on frozen linear layers (Hu et al. 2021), and the head of a classifier.
    Lora,
    /// The same on a base quantized to 4 bits (Dettmers et al. 2023).
    Qlora,
}

/// A low-rank adapter, in PEFT's words.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraConfig {
    /// Rank.
    pub r: usize,
    /// The adapter's output is scaled by `alpha / r` (`alpha / sqrt(r)` with rsLoRA).
    pub alpha: f64,
    /// Probability of dropping an element of the adapter's input.
    pub dropout: f64,
    /// Which linear layers get an adapter.
    pub target_modules: TargetModules,
    /// Rank-stabilised scaling (Kalajdzievski 2023).
    pub use_rslora: bool,
}

impl LoraConfig {
    /// The factor on the adapter's output.
    pub fn scaling(&self) -> f64 {
        let r = self.r as f64;
        if self.use_rslora { self.alpha / r.sqrt() } else { self.alpha / r }
    }
}

/// Which linear layers get an adapter. Written as `all-linear`, as one name, or as a list; a name
/// matches a module exactly or as the end of its path after a dot, as in PEFT.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetModules {
    /// Every linear layer but the output embedding and the classification head.
    AllLinear,
    /// Modules of these names.
    Names(Vec<String>),
}

const ALL_LINEAR: &str = "all-linear";

impl TargetModules {
    /// Whether a module of this full path is meant by name.
    pub fn names(&self, module: &str) -> bool {
        match self {
            Self::AllLinear => true,
            Self::Names(names) => names.iter().any(|name| {
                module.strip_suffix(name.as_str()).is_some_and(|h| h.is_empty() || h.ends_with('.'))
            }),
        }
    }
}

impl Serialize for TargetModules {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::AllLinear => s.serialize_str(ALL_LINEAR),
            Self::Names(names) => names.serialize(s),
        }
    }
}

impl<'de> Deserialize<'de> for TargetModules {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Names;
        impl<'de> Visitor<'de> for Names {
            type Value = TargetModules;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("`all-linear`, a module name or a list of module names")
            }

            fn visit_str<E>(self, v: &str) -> Result<TargetModules, E> {
                Ok(match v {
                    ALL_LINEAR => TargetModules::AllLinear,
                    name => TargetModules::Names(vec![name.to_owned()]),
                })
            }

            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<TargetModules, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(seq)).map(TargetModules::Names)
            }
        }
        d.deserialize_any(Names)
    }
}

impl JsonSchema for TargetModules {
    fn schema_name() -> Cow<'static, str> {
        "TargetModules".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "`all-linear`, a module name or a list of module names",
            "anyOf": [
                { "type": "string" },
                { "type": "array", "items": { "type": "string" }, "minItems": 1 },
            ],
        })
    }
}

/// How the frozen base is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantization {
    /// As it came.
    None,
    /// 4-bit NormalFloat in blocks of 64, as bitsandbytes does it.
    Nf4 {
        /// Whether the scales of the blocks are quantized too.
        double: bool,
    },
}

/// Where a model runs, and in which arithmetic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compute {
    /// The processor, in f32.
    #[default]
    Cpu,
    /// The processor: the operands of products are rounded to bf16, on matrix tiles (AMX) where
    /// there are any, and so is what GELU reads between two of them; sums and all else are f32.
    CpuBf16,
    /// An NVIDIA GPU, in f32 throughout.
    GpuF32,
    /// An NVIDIA GPU: activations and frozen weights are bf16, sums, trained weights, gradients
    /// and the optimizer's state f32.
    GpuBf16,
}

impl Compute {
    /// Whether it is the processor.
    pub fn on_cpu(self) -> bool {
        matches!(self, Self::Cpu | Self::CpuBf16)
    }
}

/// Everything that makes a trainable model out of files.
#[derive(Debug, Clone, PartialEq)]
pub struct Setup {
    /// What the head predicts.
    pub task: Task,
    /// Which parameters are trained.
    pub method: Method,
    /// The adapter; required by [`Method::Lora`] and [`Method::Qlora`].
    pub lora: Option<LoraConfig>,
    /// How the frozen base is stored; [`Quantization::None`] unless the method is
    /// [`Method::Qlora`].
    pub quantization: Quantization,
    /// Seeds the initial values of adapters and heads, and the dropout masks.
    pub seed: u64,
    /// `None`: the model's own dropout, as `config.json` says. `Some`: this probability in its
    /// place, everywhere in the model. (The adapter's dropout is its own.)
    pub dropout: Option<f64>,
    /// Where it runs.
    pub compute: Compute,
    /// On a GPU keeps only the input of each layer for the backward pass, which computes the rest
    /// again: the same results in less memory and more time.
    pub gradient_checkpointing: bool,
    /// Whether the model only predicts: then on the CPU no weight of it counts as trained, and
    /// what can be prepared for products is prepared once.
    pub frozen: bool,
}

/// Which base a merge adds the adapter to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum MergeBase {
    /// The one that was trained: for QLoRA the quantized weights, unpacked.
    Dequantized,
    /// The weights before quantization.
    Original,
}

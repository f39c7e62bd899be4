//! Kinds that do nothing, shaped like the real ones.

use std::collections::BTreeMap;

use flow::artifact::{Dataset, Files, Model, Report, TokenizerFiles, Tokens, TrainedModel, Type};
use flow::step::{Context, Gather, Input, Kind, Ports, Problem, StepKind, Text};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub(super) const KINDS: &[Kind] = &[
    Kind::of::<Fetch>(),
    Kind::of::<Sample>(),
    Kind::of::<Base>(),
    Kind::of::<Tokenize>(),
    Kind::of::<Train>(),
    Kind::of::<Evaluate>(),
    Kind::of::<Select>(),
    Kind::of::<Command>(),
];

macro_rules! runs_nothing {
    () => {
        fn run(&self, _: &mut Context<'_>) -> anyhow::Result<()> {
            anyhow::bail!("a toy does not run")
        }
    };
}

/// Rows from somewhere.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Fetch {
    /// Where from.
    dataset: String,
    /// What is kept.
    #[serde(default = "both")]
    splits: Vec<String>,
}

fn both() -> Vec<String> {
    vec!["train".into(), "test".into()]
}

impl StepKind for Fetch {
    const NAME: &'static str = "fetch";
    const VERSION: u32 = 1;
    fn ports(&self) -> Ports {
        Ports::named(Type::Dataset, self.splits.clone())
    }
    runs_nothing!();
}

/// Some of the rows.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Sample {
    data: Input<Dataset>,
    #[serde(default)]
    rows: BTreeMap<String, u64>,
    #[serde(default)]
    seed: u64,
    #[serde(default)]
    shuffle: bool,
}

impl StepKind for Sample {
    const NAME: &'static str = "sample";
    const VERSION: u32 = 1;
    fn ports(&self) -> Ports {
        Ports::named(Type::Dataset, self.rows.keys())
    }
    fn check(&self) -> Vec<Problem> {
        let empty = self.rows.iter().filter(|(_, n)| **n == 0);
        let problem = |(name, _): (&String, _)| {
            Problem::error(format!("rows.{name}"), "no rows").help("ask for one at least")
        };
        empty.map(problem).collect()
    }
    runs_nothing!();
}

/// A model from somewhere.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Base {
    model: String,
}

impl StepKind for Base {
    const NAME: &'static str = "model";
    const VERSION: u32 = 1;
    fn ports(&self) -> Ports {
        Ports::of(Type::Model)
    }
    runs_nothing!();
}

/// Ids of the rows.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Tokenize {
    data: Input<Dataset>,
    tokenizer: Input<TokenizerFiles>,
    #[serde(default = "longest")]
    max_length: usize,
}

fn longest() -> usize {
    512
}

impl StepKind for Tokenize {
    const NAME: &'static str = "tokenize";
    const VERSION: u32 = 1;
    fn ports(&self) -> Ports {
        Ports::like(Type::Tokens, self.data.names().as_deref())
    }
    runs_nothing!();
}

#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy)]
#[serde(rename_all = "snake_case")]
enum Method {
    Full,
    Lora,
    Qlora,
}

#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Lora {
    /// The rank.
    r: usize,
    #[serde(default)]
    alpha: Option<f64>,
    #[serde(default)]
    targets: Vec<String>,
}

/// Learns.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Train {
    data: Input<Tokens>,
    model: Input<Model>,
    method: Method,
    #[serde(default)]
    lora: Option<Lora>,
    learning_rate: f64,
    #[serde(default)]
    seed: u64,
}

impl StepKind for Train {
    const NAME: &'static str = "train";
    const VERSION: u32 = 1;
    const RUNS_MODEL: bool = true;
    fn ports(&self) -> Ports {
        Ports::of(Type::TrainedModel)
    }
    runs_nothing!();
}

/// Measures.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Evaluate {
    model: Input<TrainedModel>,
    data: Input<Tokens>,
    split: String,
}

impl StepKind for Evaluate {
    const NAME: &'static str = "evaluate";
    const VERSION: u32 = 1;
    fn ports(&self) -> Ports {
        Ports::of(Type::Report)
    }
    runs_nothing!();
}

/// The best of several.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Select {
    among: Gather<Files>,
    scores: Gather<Report>,
    metric: String,
}

impl StepKind for Select {
    const NAME: &'static str = "select";
    const VERSION: u32 = 1;
    fn ports(&self) -> Ports {
        Ports::of(self.among.ty().unwrap_or(Type::Files))
    }
    runs_nothing!();
}

/// Anything.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Command {
    run: Text,
    #[serde(default)]
    values: BTreeMap<String, serde_json::Value>,
    #[serde(default)]
    words: Vec<String>,
}

impl StepKind for Command {
    const NAME: &'static str = "command";
    const VERSION: u32 = 1;
    fn ports(&self) -> Ports {
        Ports::named(Type::Files, ["out"])
    }
    runs_nothing!();
}

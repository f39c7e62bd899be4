//! The templates that have a name, as data.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How a row becomes a prompt and a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Template {
    /// Stanford Alpaca, word for word: a form with and a form without input; the prompt ends
    /// with `### Response:` and no newline.
    Alpaca,
    /// A shortened Alpaca wording with one form for all rows: the sentence of Stanford's form
    /// without input, the Input section kept even when it is empty, and a newline after
    /// `### Response:`. It is not Stanford's; models trained on `alpaca` expect that.
    AlpacaSeed,
    /// Alpaca as axolotl writes it: Stanford's sentences (or `system`), and a newline after
    /// `### Response:`.
    AlpacaAxolotl,
    /// Alpaca as LLaMA-Factory writes it: instruction and input joined by a newline, no Input
    /// section, one sentence (or `system`) for both, and a newline after `### Response:`.
    /// The two newlines that it puts after the end-of-sequence token between turns are left out.
    AlpacaLlamafactory,
    /// The tokenizer's own chat template: `system`, then instruction and input as the user's
    /// message (an empty line between them), output as the assistant's; or a `messages` column.
    Chat,
    /// `input` is the prompt and `output` what follows; without `input`, all of it is learnt.
    Completion,
    /// Text and label for sequence classification; there is no prompt.
    Classification,
    /// Own wording, under `own`.
    Own,
}

impl Template {
    /// As written in a pipeline.
    pub fn name(self) -> &'static str {
        match self {
            Self::Alpaca => "alpaca",
            Self::AlpacaSeed => "alpaca-seed",
            Self::AlpacaAxolotl => "alpaca-axolotl",
            Self::AlpacaLlamafactory => "alpaca-llamafactory",
            Self::Chat => "chat",
            Self::Completion => "completion",
            Self::Classification => "classification",
            Self::Own => "own",
        }
    }

    /// The wording of the templates that are plain text with places.
    pub fn wording(self) -> Option<Wording> {
        match self {
            Self::Alpaca => Some(ALPACA),
            Self::AlpacaSeed => Some(ALPACA_SEED),
            Self::AlpacaAxolotl => Some(ALPACA_AXOLOTL),
            Self::AlpacaLlamafactory => Some(ALPACA_LLAMAFACTORY),
            Self::Completion => Some(COMPLETION),
            Self::Chat | Self::Classification | Self::Own => None,
        }
    }
}

/// A template that is plain text with places `{system}`, `{instruction}`, `{input}`, `{output}`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wording {
    /// The prompt of a row that has an input.
    pub with_input: &'static str,
    /// The prompt of a row whose input is empty.
    pub without_input: &'static str,
    /// What `{system}` is where the user gives none, with and without input.
    pub system: (&'static str, &'static str),
    /// The target.
    pub target: &'static str,
}

macro_rules! sentence {
    (with) => {
        "Below is an instruction that describes a task, paired with an input that provides \
         further context. Write a response that appropriately completes the request."
    };
    (without) => {
        "Below is an instruction that describes a task. Write a response that appropriately \
         completes the request."
    };
}

const ALPACA: Wording = Wording {
    with_input: concat!(
        sentence!(with),
        "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
    ),
    without_input: concat!(
        sentence!(without),
        "\n\n### Instruction:\n{instruction}\n\n### Response:"
    ),
    system: ("", ""),
    target: "{output}",
};

const SEED: &str = concat!(
    sentence!(without),
    "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
);

const ALPACA_SEED: Wording =
    Wording { with_input: SEED, without_input: SEED, system: ("", ""), target: "{output}" };

const ALPACA_AXOLOTL: Wording = Wording {
    with_input: "{system}\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n\
                 ### Response:\n",
    without_input: "{system}\n\n### Instruction:\n{instruction}\n\n### Response:\n",
    system: (sentence!(with), sentence!(without)),
    target: "{output}",
};

const ALPACA_LLAMAFACTORY: Wording = Wording {
    with_input: "{system}\n\n### Instruction:\n{instruction}\n{input}\n\n### Response:\n",
    without_input: "{system}\n\n### Instruction:\n{instruction}\n\n### Response:\n",
    system: (sentence!(without), sentence!(without)),
    target: "{output}",
};

const COMPLETION: Wording =
    Wording { with_input: "{input}", without_input: "", system: ("", ""), target: "{output}" };

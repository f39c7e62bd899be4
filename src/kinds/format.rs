//! `format`: rows become prompts and targets.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use anyhow::{Context as _, Result};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::tokenize::load_tokenizer;
use crate::artifact::{Dataset, Features, PromptsInfo, ROWS, TokenizerFiles, Type};
use crate::source::{Fault, suggest};
use crate::step::{Context, Input, Ports, Problem, StepKind};
use crate::text::{
    Classes, Fields, Formatter, LabelWords, Pattern, Rendered, Target, Task, Template, distinct,
    render_file,
};

/// Renders rows into prompts and targets, or into texts and classes.
///
/// The `alpaca` templates take an instruction (the same for every row, or a column), an `input`
/// column that may be empty, and an `output`: a column of text, or a label column with a word
/// for each of its values, which are kept as the candidates that `evaluate` chooses among.
/// `chat` renders the same through the tokenizer's own chat template, or whole conversations
/// from a `messages` column. `completion` continues `input` with `output`. `classification`
/// keeps text and label apart, for encoders. `own` takes wording with `{column}` places.
///
/// What is learnt is the target, by construction; only the `input` column may be shortened later.
/// The splits of the data come out under the same names.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Format {
    /// The dataset.
    data: Input<Dataset>,
    /// How a row is worded.
    template: Template,
    /// The instruction, the same for every row.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    instruction: Option<String>,
    /// The column that holds the instruction.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    instruction_column: Option<String>,
    /// The column of the input, or of the text to classify.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    input: Option<String>,
    /// The column of the second text, for classification of pairs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pair: Option<String>,
    /// What is learnt: a column, or `{ column, words }`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    output: Option<Output>,
    /// The column of the class (classification).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    label: Option<String>,
    /// Class names in class order, where the data does not name them (classification).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    classes: Vec<String>,
    /// The system message of a chat, or the first sentence of `alpaca-axolotl` and
    /// `alpaca-llamafactory`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    system: Option<String>,
    /// The column of whole conversations (chat): a list of `{role, content}`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    messages: Option<String>,
    /// Whose chat template is used (chat).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tokenizer: Option<Input<TokenizerFiles>>,
    /// The date that a chat template prints as today's, `YYYY-MM-DD`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    date: Option<String>,
    /// Own wording (template `own`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    own: Option<Own>,
}

/// Own wording. `{name}` is `{instruction}`, `{input}`, `{output}`, `{system}` as given above, or
/// a column; `{{` and `}}` are braces.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Own {
    /// The prompt.
    prompt: String,
    /// What is learnt.
    #[serde(default = "output_place")]
    target: String,
}

fn output_place() -> String {
    "{output}".to_owned()
}

/// A column of texts, or of labels with a word for each.
#[derive(Debug, Clone, Serialize)]
struct Output {
    column: String,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    words: BTreeMap<String, String>,
}

/// A label column, and the word that stands for each of its values.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Labelled {
    /// The column.
    column: String,
    /// Word by value.
    #[serde(default)]
    words: BTreeMap<String, String>,
}

impl<'de> Deserialize<'de> for Output {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = Output;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a column, or `{ column: …, words: … }`")
            }
            fn visit_str<E>(self, column: &str) -> Result<Output, E> {
                Ok(Output { column: column.to_owned(), words: BTreeMap::new() })
            }
            fn visit_map<M: MapAccess<'de>>(self, map: M) -> Result<Output, M::Error> {
                let given = Labelled::deserialize(MapAccessDeserializer::new(map))?;
                Ok(Output { column: given.column, words: given.words })
            }
        }
        d.deserialize_any(Either)
    }
}

impl JsonSchema for Output {
    fn inline_schema() -> bool {
        true
    }
    fn schema_name() -> Cow<'static, str> {
        "Output".into()
    }
    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let labelled = generator.subschema_for::<Labelled>();
        json_schema!({ "anyOf": [{ "type": "string" }, labelled] })
    }
}

/// More values than any label column has.
const MOST_LABELS: usize = 10_000;

impl StepKind for Format {
    const NAME: &'static str = "format";
    const VERSION: u32 = 1;

    fn ports(&self) -> Ports {
        Ports::like(Type::Prompts, self.data.names().as_deref())
    }

    fn check(&self) -> Vec<Problem> {
        let mut problems = self.misplaced();
        let mut wrong = |field: &str, message: String, help: &str| {
            let problem = Problem::error(field, message);
            problems.push(if help.is_empty() { problem } else { problem.help(help) });
        };
        let name = self.template.name();
        let lacks = |what: &str| format!("template `{name}` needs `{what}`");
        let instructed = self.instruction.is_some() || self.instruction_column.is_some();
        match self.template {
            Template::Classification => {
                if self.input.is_none() {
                    wrong("", lacks("input"), "it names the column of the text");
                }
                if self.label.is_none() {
                    wrong("", lacks("label"), "it names the column of the class");
                }
            }
            Template::Chat => {
                if self.tokenizer.is_none() {
                    let help = "the chat template is the tokenizer's: `${steps.base.tokenizer}`";
                    wrong("", lacks("tokenizer"), help);
                }
                if self.messages.is_none() && self.output.is_none() {
                    let help = "name the column of the answers, or one of whole conversations";
                    wrong("", format!("{} or `messages`", lacks("output")), help);
                }
                if self.messages.is_none() && !instructed && self.input.is_none() {
                    wrong("", lacks("input"), "or `instruction`, or `messages`");
                }
            }
            _ if self.output.is_none() => {
                wrong("", lacks("output"), "it names the column of what is learnt");
            }
            Template::Own if self.own.is_none() => {
                wrong("", lacks("own"), "own: { prompt: \"…{input}…\", target: \"{output}\" }");
            }
            Template::Own | Template::Completion => {}
            _ if !instructed => {
                wrong("", lacks("instruction"), "or `instruction_column`, if rows have their own");
            }
            _ => {}
        }
        if self.instruction.is_some() && self.instruction_column.is_some() {
            wrong("instruction_column", "`instruction` is given as well".into(), "give one");
        }
        if let Some(Output { words, .. }) = &self.output {
            let mut seen = BTreeSet::new();
            for (value, word) in words {
                let field = format!("output.words.{value}");
                if word.is_empty() {
                    wrong(&field, format!("the word for `{value}` is empty"), "");
                } else if !seen.insert(word) {
                    wrong(&field, format!("`{word}` stands for two labels"), "");
                }
            }
            if words.len() == 1 {
                wrong("output.words", "one word is no choice".into(), "give one for each label");
            }
        }
        let mut classes = BTreeSet::new();
        for (at, class) in self.classes.iter().enumerate() {
            if !classes.insert(class) {
                wrong(&format!("classes[{at}]"), format!("class `{class}` is named twice"), "");
            }
        }
        if let Some(own) = &self.own {
            for (field, text) in [("own.prompt", &own.prompt), ("own.target", &own.target)] {
                if let Err(e) = Pattern::parse(text) {
                    wrong(field, e.to_string(), "`{name}` is a place; write `{{` for a brace");
                }
            }
        }
        problems
    }

    fn check_inputs(&self, cx: &Context<'_>) -> Result<()> {
        let data = cx.open(&self.data)?;
        for split in data.splits() {
            let features = data.split(split)?.features;
            let known: Vec<&str> = features.columns.iter().map(|(name, _)| name.as_str()).collect();
            // classes do not matter for which columns are read
            let formatter = self.formatter(cx, &features, Classes::default())?;
            for column in formatter.columns() {
                if !known.contains(&column) {
                    let fault = Fault::new(format!("split `{split}` has no column `{column}`"));
                    let help = suggest(column, &known).unwrap_or_default();
                    return Err(fault.help(format!("{help} ({})", known.join(", "))).into());
                }
            }
        }
        Ok(())
    }

    fn run(&self, cx: &mut Context<'_>) -> Result<()> {
        let data = cx.open(&self.data)?;
        let splits: Vec<String> = data.splits().map(str::to_owned).collect();
        let classes = self.classes(&data, &splits)?;
        for name in &splits {
            let split = data.split(name)?;
            let formatter = self.formatter(cx, &split.features, classes.clone())?;
            let dir = cx.out_dir(name)?;
            let mut progress = |done, total| {
                cx.progress(done, total, "rows", name.as_str());
                cx.stop()
            };
            let (rows, samples) =
                render_file(&split.rows, &dir.join(ROWS), &formatter, &mut progress)
                    .with_context(|| format!("split `{name}`"))?;
            let task =
                if formatter.classifies() { Task::SequenceClassification } else { Task::CausalLm };
            let info = PromptsInfo {
                rows,
                task: task.name().to_owned(),
                template: self.template.name().to_owned(),
                candidates: self.words(&split.features).map(|w| w.words()).unwrap_or_default(),
                candidate_targets: formatter.candidate_targets()?,
                classes: if formatter.classifies() { classes.0.clone() } else { Vec::new() },
                special_tokens: formatter.writes_special_tokens(),
            };
            cx.write_json(&dir, "prompts.json", &info)?;
            cx.write_json(&dir, "samples.json", &samples)?;
            if let Some(first) = samples.first() {
                cx.log(format!("first row of `{name}`:\n{}", shown(first)));
            }
            cx.fact(&format!("rows.{name}"), rows);
        }
        Ok(())
    }
}

impl Format {
    /// Fields that the template does not read.
    fn misplaced(&self) -> Vec<Problem> {
        use Template::{AlpacaAxolotl, AlpacaLlamafactory, Chat, Classification, Completion, Own};
        let t = self.template;
        let worded = !matches!(t, Classification | Completion) && self.messages.is_none();
        let system = matches!(t, AlpacaAxolotl | AlpacaLlamafactory | Chat | Own);
        let rows = [
            ("instruction", self.instruction.is_some(), worded),
            ("instruction_column", self.instruction_column.is_some(), worded),
            ("input", self.input.is_some(), self.messages.is_none()),
            ("pair", self.pair.is_some(), t == Classification),
            ("output", self.output.is_some(), t != Classification && self.messages.is_none()),
            ("label", self.label.is_some(), t == Classification),
            ("classes", !self.classes.is_empty(), t == Classification),
            ("system", self.system.is_some(), system && self.messages.is_none()),
            ("messages", self.messages.is_some(), t == Chat),
            ("tokenizer", self.tokenizer.is_some(), t == Chat),
            ("date", self.date.is_some(), t == Chat),
            ("own", self.own.is_some(), t == Own),
        ];
        let misplaced = rows.into_iter().filter(|(_, given, read)| *given && !read);
        let name = t.name();
        let problem = |(field, _, _): (&str, bool, bool)| {
            let with = if self.messages.is_some() && t == Chat { " with `messages`" } else { "" };
            Problem::error(field, format!("template `{name}`{with} does not read `{field}`"))
        };
        misplaced.map(problem).collect()
    }

    /// Class names: those given, those of the data, or the values of the label column.
    fn classes(&self, data: &Dataset, splits: &[String]) -> Result<Classes> {
        let Some(column) = &self.label else { return Ok(Classes::default()) };
        if !self.classes.is_empty() {
            return Ok(Classes(self.classes.clone()));
        }
        let mut values = BTreeSet::new();
        for split in splits {
            let split = data.split(split)?;
            if let Some(names) = split.features.classes.get(column).filter(|n| !n.is_empty()) {
                return Ok(Classes(names.clone()));
            }
            values.extend(distinct(&split.rows, column, MOST_LABELS)?);
        }
        Ok(Classes::of_values(values.iter().map(String::as_str)))
    }

    /// The words of the labels, if targets are such; the column's class names if none are given
    /// for a column that has them.
    fn words(&self, features: &Features) -> Option<LabelWords> {
        let Output { column, words } = self.output.as_ref()?;
        let names = features.classes.get(column).map_or(&[][..], Vec::as_slice);
        if !words.is_empty() {
            return Some(LabelWords::new(words, names));
        }
        (!names.is_empty()).then(|| LabelWords::from_classes(names))
    }

    fn formatter(
        &self,
        cx: &Context<'_>,
        features: &Features,
        classes: Classes,
    ) -> Result<Formatter> {
        let target = match (&self.label, &self.output, self.words(features)) {
            (Some(column), _, _) => Some(Target::Class(column.clone(), classes)),
            (_, Some(output), Some(words)) => Some(Target::Words(output.column.clone(), words)),
            (_, Some(output), None) => Some(Target::Text(output.column.clone())),
            _ => None,
        };
        let fields = Fields {
            system: self.system.clone(),
            instruction: self.instruction.clone(),
            instruction_column: self.instruction_column.clone(),
            input: self.input.clone(),
            pair: self.pair.clone(),
            target,
            messages: self.messages.clone(),
        };
        let chat = match &self.tokenizer {
            Some(tokenizer) => {
                let tokenizer = load_tokenizer(&cx.open(tokenizer)?)?;
                Some(tokenizer.chat_template(self.date.as_deref())?)
            }
            None => None,
        };
        let own = self.own.as_ref().map(|own| (own.prompt.as_str(), own.target.as_str()));
        Formatter::new(self.template, own, chat, fields)
    }
}

/// A rendered row for the log, parts told apart.
fn shown(row: &Rendered) -> String {
    match row {
        Rendered::Segments { segments, .. } => {
            let parts = segments.iter().map(|s| format!("[{}] {}", s.part.name(), s.text));
            parts.collect::<Vec<_>>().join("\n")
        }
        Rendered::Text { text, text_pair, label } => {
            let pair = text_pair.as_ref().map(|p| format!("\n[pair] {p}")).unwrap_or_default();
            format!("[text] {text}{pair}\n[label] {label}")
        }
    }
}

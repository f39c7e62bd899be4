//! `format`: rows become prompts and targets.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use anyhow::{Context as _, Result};
use arrow::datatypes::DataType;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::tokenize::load_tokenizer;
use crate::artifact::{Dataset, Features, PromptsInfo, ROWS, TokenizerFiles, Type};
use crate::source::{Fault, advice, suggest};
use crate::step::{Context, Input, Ports, Problem, StepKind};
use crate::text::{
    ChatTemplate, Classes, Fields, Formatter, LabelWords, OnRefused, Pattern, Rendered,
    RenderedFile, Tags, Target, Task, Template, distinct, known_roles, render_file, schema,
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
/// Label columns whose class names the data gives hold indices if they hold whole numbers; in
/// other columns labels are class names if all are, else indices if all are.
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
    /// The column of whole conversations (chat): a list of `{role, content}` (OpenAI) or of
    /// `{from, value}` (ShareGPT), or that as JSON. Calls of tools are answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    messages: Option<String>,
    /// What `messages` call role and text where that is neither OpenAI's nor ShareGPT's:
    /// `{ role: speaker, content: text, roles: { customer: user, agent: assistant } }`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tags: Option<Tags>,
    /// The column of the turns before the row's own (chat with `output`): a list of `[asked,
    /// answered]`, or that as JSON, as in LLaMA-Factory. Their answers are learnt, too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    history: Option<String>,
    /// The column of the tools that a conversation may call (with `messages`): a list of their
    /// descriptions, or that as JSON.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tools: Option<String>,
    /// Whose chat template is used (chat).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tokenizer: Option<Input<TokenizerFiles>>,
    /// The date that a chat template prints as today's, `YYYY-MM-DD`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    date: Option<String>,
    /// What happens to a row whose conversation cannot be rendered (chat): the template refuses
    /// it, it has no answer, a message has an unknown role, or the template leaves out tools.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    on_refused: Option<OnRefused>,
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
    // 2: calls of tools are rendered, which were refused before.
    const VERSION: u32 = 2;

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
        for (name, role) in self.tags.iter().flat_map(Tags::unknown) {
            let help = format!("known are {}, function_call", known_roles());
            wrong(&format!("tags.roles.{name}"), format!("`{role}` is no role"), &help);
        }
        if let Some(date) = &self.date
            && let Err(e) = ChatTemplate::date(date)
        {
            wrong("date", e.to_string(), "");
        }
        if let Some(own) = &self.own {
            let texts = [("own.prompt", &own.prompt), ("own.target", &own.target)];
            let mut parsed = true;
            for (field, text) in texts {
                if let Err(e) = Pattern::parse(text) {
                    parsed = false;
                    wrong(field, e.to_string(), "`{name}` is a place; write `{{` for a brace");
                }
            }
            // class names are not known yet; with words they are of no account
            let words = self.words(None).ok().flatten();
            let own = Some((own.prompt.as_str(), own.target.as_str()));
            if parsed
                && self.template == Template::Own
                && let Err(e) = Formatter::new(Template::Own, own, None, self.fields(None, words))
            {
                wrong("own", e.to_string(), &advice(&e).join("; "));
            }
        }
        problems
    }

    fn check_inputs(&self, cx: &Context<'_>) -> Result<()> {
        let data = cx.open(&self.data)?;
        let splits: Vec<String> = data.splits().map(str::to_owned).collect();
        let formatter = self.formatter(cx, self.classes(&data, &splits, false)?)?;
        for split in &splits {
            let schema = schema(&data.split(split)?.rows)?;
            let known: Vec<&str> = schema.fields().iter().map(|f| f.name().as_str()).collect();
            for column in formatter.columns() {
                let Ok(field) = schema.field_with_name(column) else {
                    let fault = Fault::new(format!("split `{split}` has no column `{column}`"));
                    let help = suggest(column, &known).unwrap_or_default();
                    return Err(fault.help(format!("{help} ({})", known.join(", "))).into());
                };
                self.check_type(split, column, field.data_type())?;
            }
        }
        Ok(())
    }

    fn run(&self, cx: &mut Context<'_>) -> Result<()> {
        let data = cx.open(&self.data)?;
        let splits: Vec<String> = data.splits().map(str::to_owned).collect();
        let classes = self.classes(&data, &splits, true)?;
        let formatter = self.formatter(cx, classes.clone())?;
        let words = match formatter.target() {
            Some(Target::Words(_, words)) => words.words(),
            _ => Vec::new(),
        };
        for name in &splits {
            let split = data.split(name)?;
            let dir = cx.out_dir(name)?;
            let mut progress = |done, total| {
                cx.progress(done, total, "rows", name.as_str());
                cx.stop()
            };
            let on_refused = self.on_refused.unwrap_or_default();
            let out = dir.join(ROWS);
            let made = render_file(&split.rows, &out, &formatter, on_refused, &mut progress)
                .with_context(|| format!("split `{name}`"))?;
            let task =
                if formatter.classifies() { Task::SequenceClassification } else { Task::CausalLm };
            let classes = classes.as_ref().filter(|_| formatter.classifies());
            let info = PromptsInfo {
                rows: made.rows,
                task: task.name().to_owned(),
                template: self.template.name().to_owned(),
                candidates: words.clone(),
                candidate_targets: formatter.candidate_targets()?,
                candidate_prompt: formatter.candidate_prompt()?,
                classes: classes.map(|c| c.names().to_vec()).unwrap_or_default(),
                special_tokens: formatter.writes_special_tokens(),
            };
            cx.write_json(&dir, "prompts.json", &info)?;
            cx.write_json(&dir, "samples.json", &made.samples)?;
            report(cx, name, &made);
        }
        Ok(())
    }
}

fn report(cx: &mut Context<'_>, split: &str, made: &RenderedFile) {
    if let Some(first) = made.samples.first() {
        cx.log(format!("first row of `{split}`:\n{}", shown(first)));
    }
    cx.fact(&format!("rows.{split}"), made.rows);
    if let Some(why) = &made.first_refusal {
        cx.fact(&format!("refused.{split}"), made.refused);
        cx.warn(format!("{} rows of `{split}` were left out; {why}", made.refused));
    }
    if made.last_only > 0 {
        cx.fact(&format!("last_only.{split}"), made.last_only);
        cx.warn(format!(
            "of {} conversations of `{split}` only the last answer is learnt: the chat template \
             writes earlier ones otherwise once they are answered",
            made.last_only
        ));
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
            ("tags", self.tags.is_some(), t == Chat && self.messages.is_some()),
            ("history", self.history.is_some(), t == Chat && self.messages.is_none()),
            ("tools", self.tools.is_some(), t == Chat && self.messages.is_some()),
            ("tokenizer", self.tokenizer.is_some(), t == Chat),
            ("date", self.date.is_some(), t == Chat),
            ("on_refused", self.on_refused.is_some(), t == Chat),
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

    /// Refuses a column whose values cannot be what they are read as.
    fn check_type(&self, split: &str, column: &str, held: &DataType) -> Result<()> {
        let json = [&self.messages, &self.tools, &self.history];
        let json = json.iter().any(|named| named.as_deref() == Some(column));
        let text = matches!(held, DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View);
        let lists = matches!(held, DataType::List(_) | DataType::LargeList(_));
        let bytes = matches!(
            held,
            DataType::Binary
                | DataType::LargeBinary
                | DataType::BinaryView
                | DataType::FixedSizeBinary(_)
        );
        let (fits, expected) = if json {
            (text || lists, "lists, or these as JSON")
        } else {
            (!held.is_nested() && !bytes, "text or numbers")
        };
        if fits {
            return Ok(());
        }
        let message = format!("column `{column}` of split `{split}` holds {held}");
        let fault = Fault::new(message).help(format!("it should hold {expected}"));
        Err(fault.into())
    }

    /// The classes of the label column, with the names that are given or that the data has; of
    /// its values if it has none, and then only for classification. Without `scan` values are
    /// not looked at.
    fn classes(&self, data: &Dataset, splits: &[String], scan: bool) -> Result<Option<Classes>> {
        let column = self.label.as_ref().or(self.output.as_ref().map(|o| &o.column));
        let Some(column) = column else { return Ok(None) };
        let mut names = self.classes.clone();
        for split in splits {
            let features = data.split(split)?.features;
            let Some(own) = features.classes.get(column).filter(|n| !n.is_empty()) else {
                continue;
            };
            if names.is_empty() {
                names.clone_from(own);
            }
            if holds_indices(&features, column) {
                return Ok(Some(Classes::indexed(names)));
            }
        }
        if names.is_empty() && self.label.is_none() {
            return Ok(None);
        }
        let mut values = BTreeSet::new();
        for split in splits.iter().filter(|_| scan) {
            values.extend(distinct(&data.split(split)?.rows, column, MOST_LABELS)?);
        }
        let values = values.iter().map(String::as_str);
        let of_values = names.is_empty();
        Ok(Some(if of_values { Classes::of_values(values) } else { Classes::named(names, values) }))
    }

    /// The words of the labels, if targets are such; the column's class names if none are given
    /// for a column that has them.
    fn words(&self, classes: Option<Classes>) -> Result<Option<LabelWords>> {
        match &self.output {
            Some(output) if !output.words.is_empty() => {
                let words = LabelWords::new(&output.words, classes);
                words.with_context(|| format!("words for column `{}`", output.column)).map(Some)
            }
            _ => Ok(classes.map(LabelWords::from_classes)),
        }
    }

    fn fields(&self, classes: Option<Classes>, words: Option<LabelWords>) -> Fields {
        let target = match (&self.label, &self.output, words) {
            (Some(column), _, _) => {
                Some(Target::Class(column.clone(), classes.unwrap_or_default()))
            }
            (_, Some(output), Some(words)) => Some(Target::Words(output.column.clone(), words)),
            (_, Some(output), None) => Some(Target::Text(output.column.clone())),
            _ => None,
        };
        Fields {
            system: self.system.clone(),
            instruction: self.instruction.clone(),
            instruction_column: self.instruction_column.clone(),
            input: self.input.clone(),
            pair: self.pair.clone(),
            target,
            messages: self.messages.clone(),
            tags: self.tags.clone().unwrap_or_default(),
            history: self.history.clone(),
            tools: self.tools.clone(),
        }
    }

    fn formatter(&self, cx: &Context<'_>, classes: Option<Classes>) -> Result<Formatter> {
        let words = if self.label.is_some() { None } else { self.words(classes.clone())? };
        let fields = self.fields(classes, words);
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

/// Whether a column holds whole numbers or truth values, as columns of class indices do.
fn holds_indices(features: &Features, column: &str) -> bool {
    let held = features.columns.iter().find(|(name, _)| name == column);
    held.is_some_and(|(_, held)| {
        let bits = held.strip_prefix("UInt").or_else(|| held.strip_prefix("Int"));
        held == "Boolean" || bits.is_some_and(|bits| bits.parse::<u8>().is_ok())
    })
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

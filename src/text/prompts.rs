//! From rows of a dataset to rendered rows.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use arrow::array::{
    ArrayRef, Int32Builder, ListBuilder, RecordBatch, StringBuilder, StructBuilder,
};
use arrow::datatypes::{DataType, Field, FieldRef, Schema};
use serde::Serialize;
use serde_json::Value;

use super::chat::{ChatTemplate, Message};
use super::columns::{Columns, Writer, read};
use super::labels::{Classes, LabelWords};
use super::pattern::Pattern;
use super::piece::{Part, Piece};
use super::template::{Template, Wording};
use crate::source::Fault;

/// What is learnt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// The text of a column.
    Text(String),
    /// The word that stands for a label.
    Words(String, LabelWords),
    /// A class (sequence classification).
    Class(String, Classes),
}

impl Target {
    /// The column that it is read from.
    pub fn column(&self) -> &str {
        match self {
            Self::Text(column) | Self::Words(column, _) | Self::Class(column, _) => column,
        }
    }
}

/// Where the parts of a row come from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Fields {
    /// A system message or first sentence, in place of the template's own.
    pub system: Option<String>,
    /// The same instruction for every row.
    pub instruction: Option<String>,
    /// Or the column that holds it.
    pub instruction_column: Option<String>,
    /// The column that may be shortened.
    pub input: Option<String>,
    /// The second text (classification of pairs).
    pub pair: Option<String>,
    /// What is learnt.
    pub target: Option<Target>,
    /// The column that holds whole conversations.
    pub messages: Option<String>,
}

/// A rendered row.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Rendered {
    /// For a causal language model.
    Segments {
        /// Prompt and target, in order.
        segments: Vec<Piece>,
        /// The class that the target stands for.
        #[serde(skip_serializing_if = "Option::is_none")]
        label: Option<usize>,
    },
    /// For sequence classification.
    Text {
        /// The text.
        text: String,
        /// The second text.
        #[serde(skip_serializing_if = "Option::is_none")]
        text_pair: Option<String>,
        /// The class.
        label: usize,
    },
}

#[derive(Debug)]
enum Form {
    Wording { with: Pattern, without: Pattern, system: (String, String), target: Pattern },
    Own { prompt: Pattern, target: Pattern },
    Chat(Box<ChatTemplate>),
    Classification,
}

/// Renders rows.
#[derive(Debug)]
pub struct Formatter {
    form: Form,
    fields: Fields,
}

/// A whole conversation: `{role, content}` (OpenAI) or `{from, value}` (ShareGPT) entries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conversation(pub Vec<Message>);

impl Conversation {
    /// Reads a cell.
    ///
    /// # Errors
    /// When it is not a list of messages, or a message has no role or no text.
    pub fn read(cell: &Value) -> Result<Self> {
        let list = cell.as_array().context("a conversation is a list of messages")?;
        let messages = list.iter().enumerate().map(|(i, m)| {
            let get = |names: [&str; 2]| names.into_iter().find_map(|n| m.get(n)?.as_str());
            let role = get(["role", "from"]);
            let role = role.with_context(|| format!("message {} has no role", i + 1))?;
            let role = match role {
                "human" => "user",
                "gpt" => "assistant",
                "observation" => "tool",
                same => same,
            };
            let text = get(["content", "value"]);
            let text = text.with_context(|| format!("message {} has no text", i + 1))?;
            let input_from = (role == "user").then_some(0);
            Ok(Message { role: role.to_owned(), content: text.to_owned(), input_from })
        });
        messages.collect::<Result<_>>().map(Self)
    }
}

impl Formatter {
    /// A formatter. `own` is prompt and target of [`Template::Own`], `chat` the compiled template
    /// of [`Template::Chat`].
    ///
    /// # Errors
    /// When the template needs something that is not given, own wording does not parse or shows
    /// the answer in the prompt, or a target with label words is made of more than the word.
    pub fn new(
        template: Template,
        own: Option<(&str, &str)>,
        chat: Option<ChatTemplate>,
        fields: Fields,
    ) -> Result<Self> {
        let form = match (template, template.wording()) {
            (_, Some(Wording { with_input, without_input, system, target })) => Form::Wording {
                with: Pattern::parse(with_input)?,
                without: Pattern::parse(without_input)?,
                system: (system.0.to_owned(), system.1.to_owned()),
                target: Pattern::parse(target)?,
            },
            (Template::Own, _) => {
                let (prompt, target) = own.context("template `own` needs `own`")?;
                let own = (Pattern::parse(prompt)?, Pattern::parse(target)?);
                Form::Own { prompt: own.0, target: own.1 }
            }
            (Template::Chat, _) => {
                Form::Chat(Box::new(chat.context("template `chat` needs a chat template")?))
            }
            (_, _) => Form::Classification,
        };
        if let Form::Own { prompt, target } = &form {
            check_own(prompt, target, &fields)?;
        }
        Ok(Self { form, fields })
    }

    /// The columns that it reads, each once.
    pub fn columns(&self) -> Vec<&str> {
        let f = &self.fields;
        let mut columns: Vec<&str> = Vec::new();
        let own = match &self.form {
            Form::Own { prompt, target } => prompt.fields().chain(target.fields()).collect(),
            _ => Vec::new(),
        };
        let roles = own.iter().filter_map(|name| match *name {
            "system" if f.system.is_some() => None,
            "instruction" if f.instruction.is_some() || f.instruction_column.is_some() => None,
            "input" if f.input.is_some() => None,
            "output" if f.target.is_some() => None,
            column => Some(column),
        });
        let named = [&f.instruction_column, &f.input, &f.pair, &f.messages];
        let named = named.into_iter().flatten().map(String::as_str);
        for name in named.chain(f.target.as_ref().map(Target::column)).chain(roles) {
            if !columns.contains(&name) {
                columns.push(name);
            }
        }
        columns
    }

    /// Whether rows are for sequence classification.
    pub fn classifies(&self) -> bool {
        matches!(self.form, Form::Classification)
    }

    /// Whether the template writes the special tokens itself.
    pub fn writes_special_tokens(&self) -> bool {
        matches!(self.form, Form::Chat(_))
    }

    /// What stands for each class as a target: the word, with what the template puts around it.
    /// Empty where the target is not a label word.
    ///
    /// # Errors
    /// When the template fails.
    pub fn candidate_targets(&self) -> Result<Vec<String>> {
        let Some(Target::Words(_, words)) = &self.fields.target else { return Ok(Vec::new()) };
        let target_of = |word: String| -> Result<String> {
            let pieces = match &self.form {
                Form::Wording { target, .. } | Form::Own { target, .. } => {
                    target.render(Part::Target, |_| Ok((Part::Target, &word)))?
                }
                Form::Chat(chat) => {
                    // what follows an answer does not depend on what was asked
                    let asked = self.conversation("", "?", &word);
                    chat.pieces(&asked)?
                }
                Form::Classification => Vec::new(),
            };
            let target = pieces.into_iter().find(|p| p.part == Part::Target);
            Ok(target.map(|p| p.text).unwrap_or_default())
        };
        words.words().into_iter().map(target_of).collect()
    }

    fn conversation(&self, instruction: &str, input: &str, output: &str) -> Vec<Message> {
        let mut asked = instruction.to_owned();
        if !asked.is_empty() && !input.is_empty() {
            asked.push_str("\n\n");
        }
        let input_from = Some(asked.len());
        asked.push_str(input);
        let system = self.fields.system.as_ref().map(|text| Message::new("system", text));
        let user = Message { role: "user".into(), content: asked, input_from };
        system.into_iter().chain([user, Message::new("assistant", output)]).collect()
    }

    /// Renders one row.
    ///
    /// # Errors
    /// When a column is missing, a label unknown, or the chat template refuses the row.
    pub fn row(&self, columns: &Columns, row: usize) -> Result<Rendered> {
        let f = &self.fields;
        let cell = |column: &str| Ok::<_, anyhow::Error>(columns.text(column, row)?.unwrap_or(""));
        let optional = |column: &Option<String>| column.as_deref().map_or(Ok(""), cell);
        let label = |column: &str| {
            columns.text(column, row)?.with_context(|| format!("column `{column}` is empty"))
        };
        let input = optional(&f.input)?;
        if let (Form::Classification, Some(Target::Class(column, classes))) =
            (&self.form, &f.target)
        {
            let label = classes.of(label(column)?)?;
            let pair = f.pair.as_deref().map(cell).transpose()?.map(str::to_owned);
            return Ok(Rendered::Text { text: input.to_owned(), text_pair: pair, label });
        }
        let (output, label) = match &f.target {
            Some(Target::Words(column, words)) => {
                let (class, word) = words.of(label(column)?)?;
                (word, Some(class))
            }
            Some(Target::Text(column) | Target::Class(column, _)) => (cell(column)?, None),
            None => ("", None),
        };
        let literal = f.instruction.as_deref();
        let instruction = literal.map_or_else(|| optional(&f.instruction_column), Ok)?;
        let segments = match &self.form {
            Form::Wording { with, without, system, target } => {
                let (prompt, system) =
                    if input.is_empty() { (without, &system.1) } else { (with, &system.0) };
                let system = f.system.as_ref().unwrap_or(system);
                let mut pieces = prompt.render(Part::Template, |name| {
                    Ok(match name {
                        "input" => (Part::Input, input),
                        "instruction" => (Part::Template, instruction),
                        _ => (Part::Template, system.as_str()),
                    })
                })?;
                pieces.extend(target.render(Part::Target, |_| Ok((Part::Target, output)))?);
                pieces
            }
            Form::Own { prompt, target } => {
                let value = |name: &str, fallback: Part| -> Result<(Part, &str)> {
                    let given = |is: bool, part: Part, text| is.then_some((part, text));
                    let has_instruction = literal.is_some() || f.instruction_column.is_some();
                    let role = match name {
                        "system" => f.system.as_deref().map(|text| (Part::Template, text)),
                        "instruction" => given(has_instruction, Part::Template, instruction),
                        "input" => given(f.input.is_some(), Part::Input, input),
                        "output" => given(f.target.is_some(), Part::Target, output),
                        _ => None,
                    };
                    role.map_or_else(|| Ok((fallback, cell(name)?)), Ok)
                };
                // without an input named, any column of the prompt may be shortened
                let part_of = |name: &str| match &f.input {
                    Some(input) if input != name => Part::Template,
                    _ => Part::Input,
                };
                let mut pieces =
                    prompt.render(Part::Template, |name| value(name, part_of(name)))?;
                let target = target.render(Part::Target, |name| {
                    Ok((Part::Target, value(name, Part::Target)?.1))
                })?;
                pieces.extend(target);
                pieces
            }
            Form::Chat(chat) => {
                let messages = match &f.messages {
                    Some(column) => Conversation::read(columns.nested(column, row)?)?.0,
                    None => self.conversation(instruction, input, output),
                };
                chat.pieces(&messages)?
            }
            Form::Classification => anyhow::bail!("classification needs a label column"),
        };
        Ok(Rendered::Segments { segments, label })
    }
}

fn check_own(prompt: &Pattern, target: &Pattern, fields: &Fields) -> Result<()> {
    let answer = fields.target.as_ref();
    let shows = |name: &str| answer.is_some_and(|t| name == "output" || name == t.column());
    if let Some(name) = prompt.fields().find(|name| shows(name)) {
        let fault = Fault::new(format!("the prompt shows the answer: `{{{name}}}`"));
        return Err(fault.help("put it into `target`").into());
    }
    if matches!(answer, Some(Target::Words(..))) && target.fields().any(|name| name != "output") {
        let fault = Fault::new("a target with label words may hold no field but `{output}`");
        return Err(fault.help("put other fields into `prompt`").into());
    }
    if target.fields().next().is_none() {
        let fault = Fault::new("the target is the same for every row");
        return Err(fault.help("give it a field, like `{output}`").into());
    }
    Ok(())
}

/// Renders a Parquet file into another: `segments` (and `label` where targets are label words),
/// or `text`, `text_pair`, `label`. Returns the number of rows and the first three.
/// `progress` gets rows done and rows in all.
///
/// # Errors
/// When a row cannot be rendered (the message has its number, from 1), or the disk refuses.
pub fn render_file(
    input: &Path,
    output: &Path,
    formatter: &Formatter,
    progress: &mut dyn FnMut(u64, u64) -> Result<()>,
) -> Result<(u64, Vec<Rendered>)> {
    let (total, reader) = read(input, &formatter.columns())?;
    let labelled = matches!(formatter.fields.target, Some(Target::Words(..)));
    let schema = Arc::new(if formatter.classifies() {
        text_schema(formatter.fields.pair.is_some())
    } else {
        segments_schema(labelled)
    });
    let mut writer = Writer::create(output, schema.clone())?;
    let (mut done, mut samples) = (0, Vec::new());
    for batch in reader {
        let columns = Columns::new(&batch?)?;
        let mut rows = Vec::with_capacity(columns.rows());
        for row in 0..columns.rows() {
            let number = done + row as u64 + 1;
            rows.push(formatter.row(&columns, row).with_context(|| format!("row {number}"))?);
        }
        samples.extend(rows.iter().take(3 - samples.len()).cloned());
        writer.write(&batch_of(&rows, schema.clone())?)?;
        done += rows.len() as u64;
        progress(done, total)?;
    }
    writer.finish()?;
    Ok((done, samples))
}

fn segment_fields() -> [FieldRef; 2] {
    let text = |name: &str| Arc::new(Field::new(name, DataType::Utf8, false));
    [text("kind"), text("text")]
}

fn segments_schema(labelled: bool) -> Schema {
    let item = Field::new("item", DataType::Struct(segment_fields().into_iter().collect()), false);
    let mut fields = vec![Field::new("segments", DataType::List(Arc::new(item)), false)];
    if labelled {
        fields.push(Field::new("label", DataType::Int32, false));
    }
    Schema::new(fields)
}

fn text_schema(pair: bool) -> Schema {
    let mut fields = vec![Field::new("text", DataType::Utf8, false)];
    if pair {
        fields.push(Field::new("text_pair", DataType::Utf8, false));
    }
    fields.push(Field::new("label", DataType::Int32, false));
    Schema::new(fields)
}

fn batch_of(rows: &[Rendered], schema: Arc<Schema>) -> Result<RecordBatch> {
    let strings: Vec<Box<dyn arrow::array::ArrayBuilder>> =
        vec![Box::new(StringBuilder::new()), Box::new(StringBuilder::new())];
    let fields: Vec<FieldRef> = segment_fields().into();
    let item = Field::new("item", DataType::Struct(fields.clone().into()), false);
    let mut segments = ListBuilder::new(StructBuilder::new(fields, strings)).with_field(item);
    let (mut texts, mut pairs) = (StringBuilder::new(), StringBuilder::new());
    let mut labels = Int32Builder::new();
    for row in rows {
        match row {
            Rendered::Segments { segments: pieces, label } => {
                for piece in pieces {
                    let item = segments.values();
                    for (at, text) in [piece.part.name(), &piece.text].into_iter().enumerate() {
                        let builder = item.field_builder::<StringBuilder>(at);
                        builder.context("segments have two text fields")?.append_value(text);
                    }
                    item.append(true);
                }
                segments.append(true);
                labels.append_option(label.map(|l| i32::try_from(l).unwrap_or(i32::MAX)));
            }
            Rendered::Text { text, text_pair, label } => {
                texts.append_value(text);
                pairs.append_value(text_pair.as_deref().unwrap_or_default());
                labels.append_value(i32::try_from(*label)?);
            }
        }
    }
    let columns = schema.fields().iter().map(|field| -> ArrayRef {
        match field.name().as_str() {
            "segments" => Arc::new(segments.finish()),
            "text" => Arc::new(texts.finish()),
            "text_pair" => Arc::new(pairs.finish()),
            _ => Arc::new(labels.finish()),
        }
    });
    Ok(RecordBatch::try_new(schema.clone(), columns.collect())?)
}

//! From rows of a dataset to rendered rows.

use anyhow::{Context as _, Result};
use minijinja::value::Value;
use serde::Serialize;

use super::chat::{ChatTemplate, Message};
use super::columns::Columns;
use super::conversation::{self, Conversation, Tags};
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
    /// What their messages call role and text.
    pub tags: Tags,
    /// The column that holds turns before the row's own (chat).
    pub history: Option<String>,
    /// The column that holds the tools of a conversation.
    pub tools: Option<String>,
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

/// What becomes of a row.
#[derive(Debug)]
pub(super) enum Outcome {
    /// It is rendered; whether all but its last answer had to be left to the prompt.
    Row(Rendered, bool),
    /// Its conversation cannot be rendered, for this reason.
    Refused(anyhow::Error),
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
        let named = [&f.instruction_column, &f.input, &f.pair, &f.messages, &f.history, &f.tools];
        let named = named.into_iter().flatten().map(String::as_str);
        for name in named.chain(f.target.as_ref().map(Target::column)).chain(roles) {
            if !columns.contains(&name) {
                columns.push(name);
            }
        }
        columns
    }

    /// What is learnt.
    pub fn target(&self) -> Option<&Target> {
        self.fields.target.as_ref()
    }

    /// Whether rows have a second text.
    pub(super) fn pairs(&self) -> bool {
        self.fields.pair.is_some()
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
            let target = self.example(&word)?.into_iter().find(|p| p.part == Part::Target);
            Ok(target.map(|p| p.text).unwrap_or_default())
        };
        words.words().into_iter().map(target_of).collect()
    }

    /// The template's text right before a candidate; empty where a row's own text stands there.
    ///
    /// # Errors
    /// When the template fails.
    pub fn candidate_prompt(&self) -> Result<String> {
        let Some(Target::Words(_, words)) = &self.fields.target else { return Ok(String::new()) };
        let Some(word) = words.words().into_iter().next() else { return Ok(String::new()) };
        let example = self.example(&word)?;
        let before = example.iter().take_while(|p| p.part != Part::Target).last();
        let before = before.filter(|p| p.part == Part::Template);
        Ok(before.map(|p| p.text.clone()).unwrap_or_default())
    }

    /// A row with a word as its answer, and something for an input.
    fn example(&self, word: &str) -> Result<Vec<Piece>> {
        let f = &self.fields;
        let value = |name: &str| {
            let fixed = match name {
                "system" => f.system.as_deref(),
                "instruction" => f.instruction.as_deref(),
                _ => None,
            };
            Ok(fixed.map_or((Part::Input, "?"), |text| (Part::Template, text)))
        };
        match &self.form {
            Form::Wording { with: prompt, target, .. } | Form::Own { prompt, target } => {
                let mut pieces = prompt.render(Part::Template, value)?;
                pieces.extend(target.render(Part::Target, |_| Ok((Part::Target, word)))?);
                Ok(pieces)
            }
            // what follows an answer does not depend on what was asked
            Form::Chat(chat) => {
                Ok(chat.pieces(&self.conversation(Vec::new(), "", "?", word))?.pieces)
            }
            Form::Classification => Ok(Vec::new()),
        }
    }

    fn conversation(
        &self,
        history: Vec<Message>,
        instruction: &str,
        input: &str,
        output: &str,
    ) -> Vec<Message> {
        let mut asked = instruction.to_owned();
        if !asked.is_empty() && !input.is_empty() {
            asked.push_str("\n\n");
        }
        let input_from = Some(asked.len());
        asked.push_str(input);
        let system = self.fields.system.as_ref().map(|text| Message::new("system", text));
        let user = Message { input_from, ..Message::new("user", asked) };
        let turn = [user, Message::new("assistant", output)];
        system.into_iter().chain(history).chain(turn).collect()
    }

    /// Renders one row.
    ///
    /// # Errors
    /// When a column is missing, a label unknown, or the chat template refuses the row.
    pub fn row(&self, columns: &Columns, row: usize) -> Result<Rendered> {
        match self.outcome(columns, row)? {
            Outcome::Row(rendered, _) => Ok(rendered),
            Outcome::Refused(why) => Err(why),
        }
    }

    pub(super) fn outcome(&self, columns: &Columns, row: usize) -> Result<Outcome> {
        let f = &self.fields;
        let cell = |column: &str| Ok::<_, anyhow::Error>(columns.text(column, row)?.unwrap_or(""));
        let optional = |column: &Option<String>| column.as_deref().map_or(Ok(""), cell);
        let label = |column: &str| {
            columns.text(column, row)?.ok_or_else(|| {
                let fault = Fault::new(format!("there is no label: column `{column}` is null"));
                anyhow::Error::from(fault.help("give the row a label, or leave it out of the data"))
            })
        };
        let input = optional(&f.input)?;
        if let (Form::Classification, Some(Target::Class(column, classes))) =
            (&self.form, &f.target)
        {
            let label = classes.of(label(column)?)?;
            let pair = f.pair.as_deref().map(cell).transpose()?.map(str::to_owned);
            let rendered = Rendered::Text { text: input.to_owned(), text_pair: pair, label };
            return Ok(Outcome::Row(rendered, false));
        }
        let mut last_only = false;
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
                    Some(column) => {
                        let cell = columns.nested(column, row);
                        cell.and_then(|cell| Conversation::read(&cell, &f.tags))
                            .map(|found| found.0)
                    }
                    None => {
                        let history = f.history.as_ref().map_or(Ok(Vec::new()), |column| {
                            columns.nested(column, row).and_then(|c| conversation::history(&c))
                        });
                        history
                            .map(|history| self.conversation(history, instruction, input, output))
                    }
                };
                let tools = match &f.tools {
                    Some(column) => {
                        columns.nested(column, row).and_then(|cell| conversation::tools(&cell))
                    }
                    None => Ok(Value::from(())),
                };
                let written = messages
                    .and_then(|messages| Ok((messages, tools?)))
                    .and_then(|(messages, tools)| chat.pieces_with(&messages, &tools));
                match written {
                    Ok(turns) => {
                        last_only = turns.last_only;
                        turns.pieces
                    }
                    Err(why) => return Ok(Outcome::Refused(why)),
                }
            }
            Form::Classification => anyhow::bail!("classification needs a label column"),
        };
        Ok(Outcome::Row(Rendered::Segments { segments, label }, last_only))
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
    let given = [
        ("instruction", fields.instruction.is_some(), None),
        ("instruction_column", fields.instruction_column.is_some(), None),
        ("input", fields.input.is_some(), fields.input.as_deref()),
        ("output", answer.is_some(), answer.map(Target::column)),
        ("system", fields.system.is_some(), None),
    ];
    for (field, _, column) in given.into_iter().filter(|(_, given, _)| *given) {
        let place = if field == "instruction_column" { "instruction" } else { field };
        let mut places = prompt.fields().chain(target.fields());
        if !places.any(|name| name == place || Some(name) == column) {
            let fault = Fault::new(format!("the wording does not use `{field}`"));
            return Err(fault.help(format!("write `{{{place}}}` where it goes")).into());
        }
    }
    Ok(())
}

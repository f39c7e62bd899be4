//! A tokenizer's chat template: Jinja as Hugging Face renders it.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use minijinja::value::Value;
use minijinja::{Environment, Error, ErrorKind, context};

use super::json::{map, to_json};
use super::piece::{Part, Piece, push};
use crate::source::Fault;

/// A message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// `system`, `user`, `assistant`, `tool`.
    pub role: String,
    /// Its text.
    pub content: String,
    /// Byte offset from which the text is the row's own input (up to its end).
    pub input_from: Option<usize>,
    /// What else it has (`tool_calls`, `name`, `reasoning_content`), as templates read it.
    pub more: Vec<(String, Value)>,
}

/// The field that holds a message's calls of tools.
const CALLS: &str = "tool_calls";

impl Message {
    /// A message without input in it.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        let (role, content) = (role.into(), content.into());
        Self { role, content, input_from: None, more: Vec::new() }
    }

    fn calls(&self) -> bool {
        self.more.iter().any(|(name, _)| name == CALLS)
    }

    /// Whether there is anything in it.
    fn says(&self) -> bool {
        !self.content.trim().is_empty() || self.calls()
    }

    /// As a template reads it.
    fn value(&self, content: &str) -> Value {
        let own = [("role", self.role.as_str()), ("content", content)];
        let own = own.into_iter().map(|(name, text)| (name, Value::from(text)));
        map(own.chain(self.more.iter().map(|(name, value)| (name.as_str(), value.clone()))))
    }
}

/// What is learnt of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turns {
    /// Prompt and targets, in order.
    pub pieces: Vec<Piece>,
    /// Whether only the last answer is learnt, since the template writes earlier ones otherwise
    /// once they are answered (Qwen3 leaves out what was thought).
    pub last_only: bool,
}

/// A compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    env: Environment<'static>,
    specials: BTreeMap<String, String>,
}

const NAME: &str = "chat_template";

impl ChatTemplate {
    /// Compiles a template. `specials` are the tokenizer's named tokens (`bos_token`, …), which
    /// templates print. `date` (`YYYY-MM-DD`) is what `strftime_now` tells; without one the
    /// function is not defined, since equal inputs must give equal prompts every day.
    ///
    /// # Errors
    /// When the template is not valid Jinja, or the date is not one.
    pub fn new(
        source: &str,
        specials: BTreeMap<String, String>,
        date: Option<&str>,
    ) -> Result<Self> {
        let mut env = Environment::new();
        env.set_trim_blocks(true);
        env.set_lstrip_blocks(true);
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        env.add_filter("tojson", to_json);
        env.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        if let Some(date) = date {
            let day = Self::date(date)?;
            env.add_function("strftime_now", move |format: String| -> Result<String, Error> {
                let time = day.at(0, 0, 0, 0);
                jiff::fmt::strtime::format(&format, time)
                    .map_err(|e| Error::new(ErrorKind::InvalidOperation, e.to_string()))
            });
        }
        env.add_template_owned(NAME, without_generation_tags(source))
            .map_err(|e| anyhow::anyhow!("the chat template does not compile: {e:#}"))?;
        Ok(Self { env, specials })
    }

    /// A date as it is written in a pipeline.
    ///
    /// # Errors
    /// When it is not one.
    pub fn date(text: &str) -> Result<jiff::civil::Date> {
        text.parse().with_context(|| format!("`{text}` is not a date like 2026-01-31"))
    }

    /// Renders a conversation, with the opening of the assistant's answer if asked for.
    ///
    /// # Errors
    /// When the template fails or refuses the conversation.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        self.render_with(messages, &Value::from(()), add_generation_prompt)
    }

    /// The same, with tools that may be called (`none` without any).
    ///
    /// # Errors
    /// As [`ChatTemplate::render`].
    pub fn render_with(
        &self,
        messages: &[Message],
        tools: &Value,
        add_generation_prompt: bool,
    ) -> Result<String> {
        let turns = messages.iter().map(|m| m.value(&m.content)).collect();
        self.render_turns(turns, tools, add_generation_prompt)
    }

    fn render_turns(
        &self,
        messages: Vec<Value>,
        tools: &Value,
        add_generation_prompt: bool,
    ) -> Result<String> {
        let named = Value::from_serialize(&self.specials);
        let values = context! {
            messages => messages,
            add_generation_prompt => add_generation_prompt,
            tools => tools,
            documents => (),
            ..named
        };
        let template = self.env.get_template(NAME)?;
        template.render(values).map_err(|e| {
            let text = e.detail().map_or_else(|| e.to_string(), str::to_owned);
            let fault = Fault::new(format!("the chat template refuses this conversation: {text}"));
            if text.contains("strftime_now") {
                return fault
                    .help("it prints today's date; give one with `date: YYYY-MM-DD`")
                    .into();
            }
            anyhow::Error::from(fault.help("leave such rows out with `on_refused: drop`"))
        })
    }

    /// A conversation as pieces: what the template writes for each assistant message is a
    /// target (blank space after its end-of-turn token excepted), all else is prompt. Empty
    /// answers are part of the prompt of later ones. Where the template does not write a prompt
    /// as the start of what it writes when the answer is there, the prompt in training would not
    /// be the prompt in use; then only the last answer is learnt.
    ///
    /// # Errors
    /// When there is no assistant message, the template fails, or even the last prompt is not
    /// the start of what is written with the answer.
    pub fn pieces(&self, messages: &[Message]) -> Result<Turns> {
        self.pieces_with(messages, &Value::from(()))
    }

    /// The same, with tools that may be called. A call is an answer.
    ///
    /// # Errors
    /// As [`ChatTemplate::pieces`], and when the template does not write the calls or the tools,
    /// which would then be lost.
    pub fn pieces_with(&self, messages: &[Message], tools: &Value) -> Result<Turns> {
        self.check_tools(messages, tools)?;
        let answers = messages.iter().enumerate().filter(|(_, m)| m.role == "assistant");
        let Some((first, _)) = answers.clone().next() else {
            let fault = Fault::new("the conversation has no answer to learn");
            return Err(fault.help("one message needs the role `assistant`").into());
        };
        let full = answers.filter(|(_, m)| m.says());
        let full: Vec<usize> = full.map(|(at, _)| at).collect();
        let Some(last) = full.last() else {
            // the bare end of a turn is nothing to learn
            let prompt = self.render_with(&messages[..first], tools, true)?;
            let pieces = vec![Piece::new(Part::Template, prompt), Piece::new(Part::Target, "")];
            return Ok(Turns { pieces, last_only: false });
        };
        if let Ok(pieces) = self.learnt(messages, tools, &full)? {
            return Ok(Turns { pieces, last_only: false });
        }
        match self.learnt(messages, tools, &[*last])? {
            Ok(pieces) => Ok(Turns { pieces, last_only: true }),
            Err(at) => Err(not_a_prefix(at)),
        }
    }

    /// The conversation up to the last of some answers, these as targets; or the answer whose
    /// prompt is not the start of what is written with it.
    fn learnt(
        &self,
        messages: &[Message],
        tools: &Value,
        answers: &[usize],
    ) -> Result<std::result::Result<Vec<Piece>, usize>> {
        let mut pieces = Vec::new();
        let mut done = String::new();
        let mut marked_done = 0;
        for at in answers.iter().copied() {
            let prompt = self.render_with(&messages[..at], tools, true)?;
            let full = self.render_with(&messages[..=at], tools, false)?;
            let Some(opening) = prompt.strip_prefix(done.as_str()) else { return Ok(Err(at)) };
            let Some(target) = full.strip_prefix(&prompt) else { return Ok(Err(at)) };
            let marked = self.marked(&messages[..at], tools)?;
            match marked.get(marked_done..) {
                Some(marked) => mark(&mut pieces, opening, marked, messages),
                None => push(&mut pieces, Piece::new(Part::Template, opening)),
            }
            let learnt = target.trim_end();
            push(&mut pieces, Piece::new(Part::Target, learnt));
            done.push_str(opening);
            done.push_str(learnt);
            // same text as `done`, with marks in place of inputs
            marked_done = marked.len() + learnt.len();
        }
        Ok(Ok(pieces))
    }

    /// Refuses calls and tools that the template leaves out.
    fn check_tools(&self, messages: &[Message], tools: &Value) -> Result<()> {
        let calls = messages.iter().any(Message::calls);
        if !calls && tools.is_none() {
            return Ok(());
        }
        let whole = self.render_with(messages, tools, false)?;
        let silent = |messages: &[Message], tools: &Value| {
            self.render_with(messages, tools, false).is_ok_and(|text| text == whole)
        };
        let lost = |what: &str| {
            let fault = Fault::new(format!("the chat template does not write {what}"));
            let help = "use the tokenizer of a model that calls tools, or leave such rows out with \
                        `on_refused: drop`";
            fault.help(help)
        };
        if calls {
            let mut without = messages.to_vec();
            without.iter_mut().for_each(|m| m.more.retain(|(name, _)| name != CALLS));
            if silent(&without, tools) {
                return Err(lost("calls of tools").into());
            }
        }
        if !tools.is_none() && silent(messages, &Value::from(())) {
            return Err(lost("which tools there are").into());
        }
        Ok(())
    }

    /// The prompt with a mark in place of each input.
    fn marked(&self, messages: &[Message], tools: &Value) -> Result<String> {
        let turns = messages.iter().enumerate().map(|(i, m)| {
            let from = m.input_from.and_then(|from| m.content.get(..from));
            match from {
                Some(text) => m.value(&format!("{text}{}", mark_of(i))),
                None => m.value(&m.content),
            }
        });
        self.render_turns(turns.collect(), tools, true)
    }
}

fn not_a_prefix(at: usize) -> anyhow::Error {
    let fault = Fault::new(format!(
        "the chat template writes the messages before message {} otherwise when it follows",
        at + 1
    ));
    let help = "use another template, or leave such rows out with `on_refused: drop`";
    fault.help(help).into()
}

/// No text holds this by chance, and no template changes it (no blank, no punctuation).
fn mark_of(message: usize) -> String {
    format!("\u{e0f0}input{message}\u{e0f1}")
}

/// Adds `text` as pieces, input where `marked` (the same text rendered with marks) has marks.
/// Where the two do not agree the whole is template, and so is never shortened.
fn mark(pieces: &mut Vec<Piece>, text: &str, marked: &str, messages: &[Message]) {
    let mut found = Vec::new();
    let (mut text_left, mut marked_left) = (text, marked);
    for (i, message) in messages.iter().enumerate() {
        let Some(input) = message.input_from.and_then(|from| message.content.get(from..)) else {
            continue;
        };
        let Some((before, after)) = marked_left.split_once(&mark_of(i)) else { continue };
        let Some(rest) = text_left.strip_prefix(before) else { break };
        // templates trim messages
        let forms = [input, input.trim_end(), input.trim_start(), input.trim()];
        let next = after.split('\u{e0f0}').next().unwrap_or_default();
        let fits = |form: &&&str| rest.strip_prefix(**form).is_some_and(|r| r.starts_with(next));
        let Some(form) = forms.iter().find(fits) else { break };
        found.push(Piece::new(Part::Template, before));
        found.push(Piece::new(Part::Input, *form));
        (text_left, marked_left) = (&rest[form.len()..], after);
    }
    if text_left == marked_left {
        found.push(Piece::new(Part::Template, text_left));
        found.into_iter().for_each(|piece| push(pieces, piece));
    } else {
        push(pieces, Piece::new(Part::Template, text));
    }
}

/// `{% generation %}` marks the answer for loss masks; here masks come from the pieces, so the
/// tags become comments, which keep the trimming of white space around them.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let Some(end) = rest.find("%}") else { break };
        let (tag, after) = rest.split_at(end + 2);
        let word = tag[2..end].trim_matches(['-', '+']).trim();
        if matches!(word, "generation" | "endgeneration") {
            out.push_str(&tag.replace("{%", "{#").replace("%}", "#}"));
        } else {
            out.push_str(tag);
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

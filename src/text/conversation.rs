//! Whole conversations as data sets write them.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use minijinja::value::{Value, ValueKind};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::chat::Message;
use super::json::{fields, map, parse};
use crate::source::Fault;

/// The roles that chat templates know.
const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];
const LEAVE_OUT: &str = "leave such rows out with `on_refused: drop`";

/// What the calls of tools are called where they are messages of their own.
const CALL: &str = "function_call";

/// What a data set calls the parts of a message.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Tags {
    /// The key of a message's role; `role` or `from` if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    role: Option<String>,
    /// The key of its text; `content` or `value` if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    content: Option<String>,
    /// Roles (`user`, `assistant`, `system`, `developer`, `tool`, `function_call`) by what the
    /// data calls them, where that is none of these or ShareGPT's `human`, `gpt`, `observation`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    roles: BTreeMap<String, String>,
}

impl Tags {
    /// Names in `roles` that stand for no role, with the role.
    pub fn unknown(&self) -> impl Iterator<Item = (&str, &str)> {
        let known = |role: &str| ROLES.contains(&role) || role == CALL;
        let roles = self.roles.iter().map(|(name, role)| (name.as_str(), role.as_str()));
        roles.filter(move |(_, role)| !known(role))
    }

    fn role_of<'a>(&'a self, name: &'a str) -> &'a str {
        match self.roles.get(name).map_or(name, String::as_str) {
            "human" => "user",
            "gpt" => "assistant",
            "observation" => "tool",
            same => same,
        }
    }
}

/// Roles as they are listed in messages.
pub fn known_roles() -> String {
    ROLES.join(", ")
}

/// A whole conversation: `{role, content}` (OpenAI) or `{from, value}` (ShareGPT) entries, with
/// the calls of tools (`tool_calls`, the older `function_call`, ShareGPT's `function_call` entries)
/// and whatever else an entry has (`name`, `tool_call_id`, `reasoning_content`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conversation(pub Vec<Message>);

impl Conversation {
    /// Reads a cell.
    ///
    /// # Errors
    /// When it is not a list of messages, or a message has no role or no text, a role that chat
    /// templates do not write, a part that is not text, or a call that is not one.
    pub fn read(cell: &Value, tags: &Tags) -> Result<Self> {
        let list = items(cell).context("a conversation is a list of messages")?;
        let messages = list.iter().enumerate().map(|(i, m)| message(m, i + 1, tags));
        messages.collect::<Result<_>>().map(Self)
    }
}

fn items(value: &Value) -> Option<Vec<Value>> {
    (value.kind() == ValueKind::Seq).then(|| value.try_iter().ok().map(Iterator::collect))?
}

/// Turns before a row's own, as in the `history` of LLaMA-Factory: a list of (asked, answered).
///
/// # Errors
/// When it is not that.
pub(super) fn history(cell: &Value) -> Result<Vec<Message>> {
    if cell.is_none() || cell.is_undefined() {
        return Ok(Vec::new());
    }
    let turns = items(cell).context("a history is a list of turns")?;
    let mut messages = Vec::with_capacity(2 * turns.len());
    for (at, turn) in turns.iter().enumerate() {
        let texts = items(turn).unwrap_or_default();
        let texts: Vec<&str> = texts.iter().filter_map(Value::as_str).collect();
        let [asked, answered] = texts.as_slice() else {
            let fault = Fault::new(format!("turn {} of the history is not two texts", at + 1));
            return Err(fault.help(format!("[\"asked\", \"answered\"]; or {LEAVE_OUT}")).into());
        };
        let user = Message { input_from: Some(0), ..Message::new("user", *asked) };
        messages.extend([user, Message::new("assistant", *answered)]);
    }
    Ok(messages)
}

fn text_of(message: &Value, own: Option<&str>, usual: [&str; 2]) -> Option<String> {
    let names = own.map_or(usual.to_vec(), |own| vec![own]);
    names.into_iter().find_map(|name| match message.get_attr(name).ok()? {
        text if text.as_str().is_some() => text.as_str().map(str::to_owned),
        parts => parts_of(&parts),
    })
}

/// The text of a list of parts (`{type: text, text: …}`), if that is all there is in it.
fn parts_of(parts: &Value) -> Option<String> {
    let texts = items(parts)?.into_iter().map(|part| {
        let is_text = part.get_attr("type").is_ok_and(|ty| ty.as_str() == Some("text"));
        let text = part.get_attr("text").ok()?.as_str().map(str::to_owned);
        text.filter(|_| is_text)
    });
    texts.collect::<Option<Vec<String>>>().filter(|texts| !texts.is_empty()).map(|t| t.concat())
}

fn message(m: &Value, number: usize, tags: &Tags) -> Result<Message> {
    let keys = [tags.role.as_deref(), tags.content.as_deref()];
    let lacks = |what: &str, key: Option<&str>, usual: &str| {
        let key = key.map_or(usual.to_owned(), |key| format!("`{key}`"));
        format!("message {number} has no {what} in {key}; `tags` names other keys")
    };
    let role = text_of(m, keys[0], ["role", "from"]);
    let role = role.with_context(|| lacks("role", keys[0], "`role` or `from`"))?;
    let role = tags.role_of(&role);
    let mut more: Vec<(String, Value)> = Vec::new();
    for (name, value) in fields(m) {
        let given = !value.is_none() && !value.is_undefined();
        match name.as_str() {
            "role" | "from" | "content" | "value" => {}
            name if keys.contains(&Some(name)) => {}
            "tool_calls" if given => {
                let list = items(&value);
                let list = list.with_context(|| no_call(number, "`tool_calls` is no list"))?;
                if !list.is_empty() {
                    more.push((name, calls(&list, number)?));
                }
            }
            "function_call" if given && !fields(&value).iter().all(|(_, v)| v.is_none()) => {
                more.push(("tool_calls".to_owned(), calls(&[value], number)?));
            }
            "tool_calls" | "function_call" => {}
            _ if given => more.push((name, value)),
            _ => {}
        }
    }
    let text = text_of(m, keys[1], ["content", "value"]);
    if role == CALL {
        let text = text.with_context(|| no_call(number, "it has no text"))?;
        let call = parse(&text).with_context(|| no_call(number, "its text is not JSON"))?;
        let list = items(&call).unwrap_or_else(|| vec![call]);
        more.push(("tool_calls".to_owned(), calls(&list, number)?));
        let (role, content) = ("assistant".to_owned(), String::new());
        return Ok(Message { role, content, input_from: None, more });
    }
    if !ROLES.contains(&role) {
        let fault = Fault::new(format!("message {number} has the unknown role `{role}`"));
        let help = format!(
            "known are {}; name others in `tags: {{ roles: {{ \"{role}\": user }} }}`, or \
             {LEAVE_OUT}",
            known_roles()
        );
        return Err(fault.help(help).into());
    }
    let text = text.or_else(|| (role == "assistant").then(String::new));
    let text = text.with_context(|| lacks("text", keys[1], "`content` or `value`"))?;
    let input_from = (role == "user").then_some(0);
    Ok(Message { role: role.to_owned(), content: text, input_from, more })
}

fn no_call(number: usize, why: &str) -> String {
    format!("message {number} calls a tool, but {why}; {LEAVE_OUT}")
}

/// Calls in the form that templates read: `{…, function: {name, arguments}}`, arguments that are
/// JSON in a text as what they say.
fn calls(list: &[Value], number: usize) -> Result<Value> {
    let calls = list.iter().map(|call| {
        let function = call.get_attr("function").ok().filter(|f| f.kind() == ValueKind::Map);
        let bare = function.is_none();
        let function = function.unwrap_or_else(|| call.clone());
        let name = function.get_attr("name").ok();
        if name.is_none_or(|name| name.as_str().is_none()) {
            let fault = Fault::new(format!("message {number} calls a tool that has no name"));
            return Err(fault.help(LEAVE_OUT).into());
        }
        let inner = fields(&function).into_iter().map(|(name, value)| {
            let said = value.as_str().filter(|_| name == "arguments").and_then(|t| parse(t).ok());
            (name, said.filter(|v| v.kind() == ValueKind::Map).unwrap_or(value))
        });
        let inner: Vec<(String, Value)> = inner.collect();
        let function = map(inner.iter().map(|(name, value)| (name.as_str(), value.clone())));
        if bare {
            return Ok(map([("type", Value::from("function")), ("function", function)]));
        }
        let outer = fields(call).into_iter().map(|(name, value)| {
            let value = if name == "function" { function.clone() } else { value };
            (name, value)
        });
        let outer: Vec<(String, Value)> = outer.collect();
        Ok(map(outer.iter().map(|(name, value)| (name.as_str(), value.clone()))))
    });
    calls.collect::<Result<Vec<Value>>>().map(Value::from)
}

/// The tools of a row as templates read them: a list of `{type: function, function: …}`, or that
/// as JSON; `none` without any.
///
/// # Errors
/// When it is neither.
pub fn tools(cell: &Value) -> Result<Value> {
    let parsed = match cell.as_str() {
        Some(text) if text.trim().is_empty() => return Ok(Value::from(())),
        Some(text) => parse(text).context("the tools are not JSON")?,
        None => cell.clone(),
    };
    if parsed.is_none() || parsed.is_undefined() {
        return Ok(Value::from(()));
    }
    let list = items(&parsed).context("the tools of a row are a list")?;
    if list.is_empty() {
        return Ok(Value::from(()));
    }
    let wrapped = list.into_iter().map(|tool| {
        let bare = tool.get_attr("function").map_or(true, |f| f.is_undefined());
        let named = tool.get_attr("name").is_ok_and(|name| name.as_str().is_some());
        if bare && named {
            map([("type", Value::from("function")), ("function", tool)])
        } else {
            tool
        }
    });
    Ok(Value::from(wrapped.collect::<Vec<_>>()))
}

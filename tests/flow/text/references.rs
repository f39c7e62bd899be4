//! Chat templates against what transformers renders (`tests/fixtures/text/chat/references.py`).

use std::collections::BTreeMap;

use flow::text::{ChatTemplate, Conversation, Message, Part, Tags, parse, tools};
use serde_json::Value;

use super::{chain, fixture, map};

const SPECIALS: [(&str, &str); 2] = [("bos_token", "<s>"), ("eos_token", "</s>")];

fn references() -> Value {
    let text = std::fs::read_to_string(fixture("chat/references.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn template(name: &str) -> ChatTemplate {
    let source = std::fs::read_to_string(fixture(&format!("chat/{name}"))).unwrap();
    ChatTemplate::new(&source, map(&SPECIALS), Some("2026-01-31")).unwrap()
}

/// Conversations with their tools. The order of fields is that of the text, which
/// `serde_json::Value` would lose.
fn conversations() -> BTreeMap<String, (Vec<Message>, minijinja::Value)> {
    let text = std::fs::read_to_string(fixture("chat/references.json")).unwrap();
    let whole = parse(&text).unwrap();
    let all = whole.get_attr("conversations").unwrap();
    let names = all.try_iter().unwrap().map(|name| name.as_str().unwrap().to_owned());
    let named = names.map(|name| {
        let one = all.get_attr(&name).unwrap();
        let messages =
            Conversation::read(&one.get_attr("messages").unwrap(), &Tags::default()).unwrap().0;
        (name, (messages, tools(&one.get_attr("tools").unwrap()).unwrap()))
    });
    named.collect()
}

#[test]
fn templates_render_as_in_transformers() {
    let conversations = conversations();
    let mut wrong = Vec::new();
    let references = references();
    let cases = references["cases"].as_array().unwrap();
    assert!(cases.len() > 150);
    for case in cases {
        let (name, file) = (case["name"].as_str().unwrap(), case["template"].as_str().unwrap());
        let (messages, tools) = &conversations[name];
        let prompt = case["add_generation_prompt"].as_bool().unwrap();
        let given = template(file).render_with(messages, tools, prompt);
        match (given, case["text"].as_str(), case["refused"].as_str()) {
            (Ok(text), Some(wanted), _) if text == wanted => {}
            (Err(e), None, Some(why)) if chain(&e).contains(why) => {}
            (given, text, refused) => {
                wrong
                    .push(format!("{file}, {name}, {prompt}: {given:?}, not {text:?} {refused:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

/// What is learnt of a conversation with calls: the calls and the answer, and nothing else.
#[test]
fn calls_of_tools_are_learnt() {
    let conversations = conversations();
    let (messages, tools) = &conversations["tools"];
    let turns = template("qwen25-tools.jinja").pieces_with(messages, tools).unwrap();
    assert!(!turns.last_only);
    let learnt = turns.pieces.iter().filter(|p| p.part == Part::Target);
    let learnt: Vec<&str> = learnt.map(|p| p.text.as_str()).collect();
    let call = "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"place\": \"Ulm\", \
                \"days\": 3}}\n</tool_call><|im_end|>";
    assert_eq!(learnt, [call, "Grey.<|im_end|>"]);
    let whole: String = turns.pieces.iter().map(|p| p.text.as_str()).collect();
    let rendered = template("qwen25-tools.jinja").render_with(messages, tools, false).unwrap();
    assert_eq!(whole, rendered.trim_end());

    // A template that does not know of tools would drop them without a word.
    let said = chain(&template("chatml.jinja").pieces_with(messages, tools).unwrap_err());
    assert!(said.contains("does not write calls of tools"), "{said}");
    let (plain, _) = &conversations["one turn"];
    let said = chain(&template("chatml.jinja").pieces_with(plain, tools).unwrap_err());
    assert!(said.contains("does not write which tools there are"), "{said}");
}

/// ShareGPT's way to write the same conversation.
#[test]
fn sharegpt_and_openai_are_one() {
    let call = r#"{"name": "weather", "arguments": {"place": "Ulm", "days": 3}}"#;
    let shared = serde_json::json!([
        { "from": "system", "value": "Use tools." },
        { "from": "human", "value": "Weather in Ulm?" },
        { "from": "function_call", "value": call },
        { "from": "observation", "value": "{\"sky\": \"grey\"}" },
        { "from": "gpt", "value": "Grey." },
    ]);
    let shared =
        Conversation::read(&parse(&shared.to_string()).unwrap(), &Tags::default()).unwrap().0;
    let (messages, tools) = &conversations()["tools"];
    let render = |messages: &[Message]| {
        template("qwen25-tools.jinja").render_with(messages, tools, false).unwrap()
    };
    assert_eq!(render(&shared), render(messages));
    // Arguments as OpenAI's interface gives them: JSON in a text.
    let text = serde_json::json!([{ "role": "assistant", "content": null, "tool_calls": [
        { "id": "1", "type": "function", "function": {
            "name": "weather", "arguments": "{\"place\": \"Ulm\", \"days\": 3}",
        } },
    ] }]);
    let text = Conversation::read(&parse(&text.to_string()).unwrap(), &Tags::default()).unwrap().0;
    let both = [messages[..2].to_vec(), text].concat();
    assert_eq!(render(&both), render(&messages[..3]));
}

#[test]
fn bare_descriptions_of_tools_are_wrapped() {
    let bare = parse(r#""[{\"name\": \"now\", \"parameters\": {}}]""#).unwrap();
    let wrapped = tools(&bare).unwrap();
    let first = wrapped.get_item_by_index(0).unwrap();
    assert_eq!(first.get_attr("type").unwrap().as_str(), Some("function"));
    for none in ["null", "[]", "\"\""] {
        assert!(tools(&parse(none).unwrap()).unwrap().is_none(), "{none}");
    }
    assert!(tools(&parse("3").unwrap()).is_err());
}

//! Wording, exactly.

use flow::text::{
    ChatTemplate, Columns, Conversation, Fields, Formatter, LabelWords, Message, OnRefused, Part,
    Piece, Rendered, Tags, Target, Template, Turns, parse, render_file,
};

use super::{chain, fixture, map, parquet};

const WITH: &str = "Below is an instruction that describes a task, paired with an input that \
    provides further context. Write a response that appropriately completes the request.";
const WITHOUT: &str = "Below is an instruction that describes a task. Write a response that \
    appropriately completes the request.";

fn fields() -> Fields {
    Fields {
        instruction: Some("Do it.".into()),
        input: Some("input".into()),
        target: Some(Target::Text("output".into())),
        ..Fields::default()
    }
}

fn columns() -> Columns {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.parquet");
    let texts = [
        ("input", vec!["some {text}", ""]),
        ("output", vec!["yes", "no"]),
        ("other", vec!["more", "less"]),
    ];
    parquet(&path, &texts, Some(("label", vec![1, 7])));
    let file = std::fs::File::open(&path).unwrap();
    let mut reader =
        parquet::arrow::arrow_reader::ParquetRecordBatchReader::try_new(file, 10).unwrap();
    Columns::new(&reader.next().unwrap().unwrap()).unwrap()
}

fn pieces(rendered: Rendered) -> Vec<Piece> {
    match rendered {
        Rendered::Segments { segments, .. } => segments,
        Rendered::Text { .. } => panic!("rendered for classification"),
    }
}

fn text(pieces: &[Piece], target: bool) -> String {
    let part = pieces.iter().filter(|p| (p.part == Part::Target) == target);
    part.map(|p| p.text.as_str()).collect()
}

fn rendered(template: Template, fields: Fields, row: usize) -> Vec<Piece> {
    let own = Some(("Q: {input} ({other}) {{", " A: {output}"));
    let own = own.filter(|_| template == Template::Own);
    // own wording is refused what it does not use
    let instruction = fields.instruction.filter(|_| template != Template::Own);
    let fields = Fields { instruction, ..fields };
    let formatter = Formatter::new(template, own, None, fields).unwrap();
    pieces(formatter.row(&columns(), row).unwrap())
}

#[test]
fn alpaca_is_stanfords_wording() {
    let with = rendered(Template::Alpaca, fields(), 0);
    let prompt =
        format!("{WITH}\n\n### Instruction:\nDo it.\n\n### Input:\nsome {{text}}\n\n### Response:");
    assert_eq!(text(&with, false), prompt);
    assert_eq!(text(&with, true), "yes");
    let without = rendered(Template::Alpaca, fields(), 1);
    let prompt = format!("{WITHOUT}\n\n### Instruction:\nDo it.\n\n### Response:");
    assert_eq!(text(&without, false), prompt);
    assert_eq!(text(&without, true), "no");
}

#[test]
fn other_alpacas() {
    let seed = rendered(Template::AlpacaSeed, fields(), 1);
    let prompt =
        format!("{WITHOUT}\n\n### Instruction:\nDo it.\n\n### Input:\n\n\n### Response:\n");
    assert_eq!(text(&seed, false), prompt);

    let axolotl = rendered(Template::AlpacaAxolotl, fields(), 0);
    let rest = "### Instruction:\nDo it.\n\n### Input:\nsome {text}\n\n### Response:\n";
    assert_eq!(text(&axolotl, false), format!("{WITH}\n\n{rest}"));
    let system = Fields { system: Some("Be good.".into()), ..fields() };
    let axolotl = rendered(Template::AlpacaAxolotl, system, 0);
    assert_eq!(text(&axolotl, false), format!("Be good.\n\n{rest}"));

    let factory = rendered(Template::AlpacaLlamafactory, fields(), 0);
    let rest = "### Instruction:\nDo it.\nsome {text}\n\n### Response:\n";
    assert_eq!(text(&factory, false), format!("{WITHOUT}\n\n{rest}"));
    let factory = rendered(Template::AlpacaLlamafactory, fields(), 1);
    let rest = "### Instruction:\nDo it.\n\n### Response:\n";
    assert_eq!(text(&factory, false), format!("{WITHOUT}\n\n{rest}"));
}

#[test]
fn only_the_input_column_is_input() {
    for template in [
        Template::Alpaca,
        Template::AlpacaSeed,
        Template::AlpacaAxolotl,
        Template::AlpacaLlamafactory,
        Template::Own,
    ] {
        let found = rendered(template, fields(), 0);
        let inputs: Vec<&str> =
            found.iter().filter(|p| p.part == Part::Input).map(|p| p.text.as_str()).collect();
        assert_eq!(inputs, ["some {text}"], "{}", template.name());
        assert_eq!(found.last().unwrap().part, Part::Target);
    }
}

#[test]
fn completion_and_own_wording() {
    let all = Fields { input: None, instruction: None, ..fields() };
    let found = rendered(Template::Completion, all, 0);
    assert_eq!(found, [Piece::new(Part::Target, "yes")]);
    let prompted = Fields { instruction: None, ..fields() };
    let found = rendered(Template::Completion, prompted, 0);
    assert_eq!((text(&found, false), text(&found, true)), ("some {text}".into(), "yes".into()));

    let own = rendered(Template::Own, fields(), 0);
    assert_eq!(text(&own, false), "Q: some {text} (more) {");
    assert_eq!(text(&own, true), " A: yes");
}

#[test]
fn own_wording_that_shows_the_answer_is_refused() {
    for prompt in ["{output}", "x {output} y", "{label}"] {
        let target = Some(Target::Text("label".into()));
        let fields = Fields { target, ..fields() };
        let e = Formatter::new(Template::Own, Some((prompt, "{output}")), None, fields);
        assert!(chain(&e.unwrap_err()).contains("shows the answer"), "{prompt}");
    }
    let e = Formatter::new(Template::Own, Some(("{input}", "fixed")), None, fields());
    assert!(chain(&e.unwrap_err()).contains("same for every row"));
    let e = Formatter::new(Template::Own, Some(("{input}", "{output}")), None, fields());
    assert!(chain(&e.unwrap_err()).contains("does not use `instruction`"));
}

fn words() -> Fields {
    let words = LabelWords::new(&map(&[("0", "negative"), ("1", "positive")]), None).unwrap();
    Fields { target: Some(Target::Words("label".into(), words)), ..fields() }
}

#[test]
fn labels_become_words() {
    let formatter = Formatter::new(Template::Alpaca, None, None, words()).unwrap();
    let Rendered::Segments { segments, label } = formatter.row(&columns(), 0).unwrap() else {
        panic!("not segments");
    };
    assert_eq!((text(&segments, true).as_str(), label), ("positive", Some(1)));
    assert_eq!(formatter.candidate_targets().unwrap(), ["negative", "positive"]);
    assert_eq!(formatter.candidate_prompt().unwrap(), "\n\n### Response:");
}

#[test]
fn an_unknown_label_names_row_and_value() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("a.parquet"), dir.path().join("b.parquet"));
    parquet(&from, &[("input", vec!["a", "b"])], Some(("label", vec![1, 7])));
    let formatter = Formatter::new(Template::Alpaca, None, None, words()).unwrap();
    let e = render_file(&from, &to, &formatter, OnRefused::Drop, &mut |_, _| Ok(())).unwrap_err();
    let said = chain(&e);
    for part in ["row 2", "`7`", "`0`, `1`"] {
        assert!(said.contains(part), "{said}");
    }
}

fn chat(name: &str, date: Option<&str>) -> ChatTemplate {
    let source = std::fs::read_to_string(fixture(&format!("{name}.jinja"))).unwrap();
    ChatTemplate::new(&source, map(&[("bos_token", "<s>"), ("eos_token", "</s>")]), date).unwrap()
}

fn conversation() -> Vec<Message> {
    let user = |text: &str| Message { input_from: Some(0), ..Message::new("user", text) };
    vec![
        Message::new("system", " Be brief. "),
        user("Hi  \n"),
        Message::new("assistant", "Yes"),
        user("And?"),
        Message::new("assistant", "No"),
    ]
}

/// What Jinja2 3.1 writes for these templates with transformers' settings.
#[test]
fn chat_templates_render_as_jinja2_does() {
    let cases = [
        (
            "chatml",
            "<|im_start|>system\n Be brief. <|im_end|>\n<|im_start|>user\nHi  \n<|im_end|>\n\
             <|im_start|>assistant\n",
            "Yes<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n\
             No<|im_end|>\n",
        ),
        (
            "llama3",
            "<s><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\nBe brief.\
             <|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>\
             <|start_header_id|>assistant<|end_header_id|>\n\n",
            "Yes<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nAnd?<|eot_id|>\
             <|start_header_id|>assistant<|end_header_id|>\n\nNo<|eot_id|>",
        ),
        ("strict", "[INST] Be brief.\nHi  \n [/INST]", " Yes</s>\n[INST] And? [/INST] No</s>\n"),
    ];
    for (name, prompt, rest) in cases {
        let template = chat(name, None);
        let messages = conversation();
        assert_eq!(template.render(&messages[..2], true).unwrap(), prompt, "{name}");
        assert_eq!(template.render(&messages, false).unwrap(), format!("{prompt}{rest}"), "{name}");
    }
}

#[test]
fn chats_are_masked_by_construction() {
    for (name, answers, inputs) in [
        ("chatml", ["Yes<|im_end|>", "No<|im_end|>"], ["Hi  \n", "And?"]),
        ("llama3", ["Yes<|eot_id|>", "No<|eot_id|>"], ["Hi", "And?"]),
        ("strict", [" Yes</s>", " No</s>"], ["Hi  \n", "And?"]),
    ] {
        let template = chat(name, None);
        let messages = conversation();
        let Turns { pieces: found, last_only } = template.pieces(&messages).unwrap();
        assert!(!last_only);
        let of = |part: Part| -> Vec<&str> {
            found.iter().filter(|p| p.part == part).map(|p| p.text.as_str()).collect()
        };
        assert_eq!(of(Part::Target), answers, "{name}");
        assert_eq!(of(Part::Input), inputs, "{name}");
        let whole: String = found.iter().map(|p| p.text.as_str()).collect();
        assert_eq!(whole, template.render(&messages, false).unwrap().trim_end(), "{name}");
        let prompt = template.render(&messages[..2], true).unwrap();
        let asked: String =
            found.iter().take_while(|p| p.part != Part::Target).map(|p| p.text.as_str()).collect();
        assert_eq!(asked, prompt, "{name}");
    }
}

#[test]
fn a_chat_from_columns() {
    let fields = Fields { system: Some("Be brief.".into()), ..words() };
    let formatter =
        Formatter::new(Template::Chat, None, Some(chat("chatml", None)), fields).unwrap();
    let found = pieces(formatter.row(&columns(), 0).unwrap());
    let system = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nDo it.\n\n";
    assert_eq!(
        found,
        [
            Piece::new(Part::Template, system),
            Piece::new(Part::Input, "some {text}"),
            Piece::new(Part::Template, "<|im_end|>\n<|im_start|>assistant\n"),
            Piece::new(Part::Target, "positive<|im_end|>"),
        ]
    );
    let candidates = formatter.candidate_targets().unwrap();
    assert_eq!(candidates, ["negative<|im_end|>", "positive<|im_end|>"]);
    assert!(formatter.candidate_prompt().unwrap().ends_with("<|im_start|>assistant\n"));
    assert!(formatter.writes_special_tokens());
}

#[test]
fn dates_in_chats_are_given() {
    let messages = &conversation()[..2];
    let dated = chat("llama3", Some("2025-03-09")).render(messages, true).unwrap();
    assert!(dated.contains("Today Date: 09 Mar 2025"), "{dated}");
    let always = "{{ strftime_now('%Y') }}";
    let template = ChatTemplate::new(always, map(&[]), None).unwrap();
    let said = chain(&template.render(messages, true).unwrap_err());
    assert!(said.contains("date: YYYY-MM-DD"), "{said}");
    assert!(ChatTemplate::new(always, map(&[]), Some("tomorrow")).is_err());
}

#[test]
fn templates_may_refuse() {
    let messages = vec![Message::new("assistant", "First!")];
    let said = chain(&chat("strict", None).pieces(&messages).unwrap_err());
    assert!(said.contains("roles must alternate"), "{said}");
    let said = chain(&chat("chatml", None).pieces(&conversation()[..2]).unwrap_err());
    assert!(said.contains("no answer to learn"), "{said}");
    // a template that writes earlier messages otherwise once there is an answer
    let fickle = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}";
    let template = ChatTemplate::new(fickle, map(&[]), None).unwrap();
    let said = chain(&template.pieces(&conversation()).unwrap_err());
    assert!(said.contains("otherwise when it follows"), "{said}");
    assert!(ChatTemplate::new("{% if %}", map(&[]), None).is_err());
}

/// What Jinja2 3.1 writes with its `loopcontrols`, which transformers turns on.
#[test]
fn loops_may_break_and_continue() {
    let mut messages = conversation();
    messages[3].content = "stop".into();
    let template = chat("controls", None);
    let asked = template.render(&conversation()[..2], true).unwrap();
    assert_eq!(asked, "<user>Hi  \n<end><assistant>");
    let said = template.render(&messages, false).unwrap();
    assert_eq!(said, "<user>Hi  \n<end><assistant>Yes<end><stopped>");
}

/// Qwen3's way: what was thought before an answer is left out once the user has gone on.
const THINKING: &str = "{% for m in messages %}{{ '<' + m.role + '>' }}\
    {% if m.role == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}\
    {{ m.content + '<end>' }}{% endfor %}\
    {% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}";

#[test]
fn of_a_rewritten_conversation_the_last_answer_is_learnt() {
    let template = ChatTemplate::new(THINKING, map(&[]), None).unwrap();
    let messages = conversation();
    let Turns { pieces, last_only } = template.pieces(&messages).unwrap();
    assert!(last_only);
    let prompt = template.render(&messages[..4], true).unwrap();
    assert_eq!(text(&pieces, false), prompt);
    assert_eq!(text(&pieces, true), "<think></think>No<end>");
    let inputs: Vec<_> = pieces.iter().filter(|p| p.part == Part::Input).collect();
    assert_eq!(inputs.len(), 2);
    assert!(!template.pieces(&messages[..3]).unwrap().last_only);
}

#[test]
fn empty_answers_are_not_learnt() {
    let template = chat("chatml", None);
    let mut messages = conversation();
    messages[2].content = " ".into();
    let found = template.pieces(&messages).unwrap().pieces;
    assert_eq!(text(&found, true), "No<|im_end|>");
    assert_eq!(text(&found, false), template.render(&messages[..4], true).unwrap());
    messages[4].content = String::new();
    let found = template.pieces(&messages).unwrap().pieces;
    assert_eq!(text(&found, true), "");
    assert_eq!(found.last().unwrap().part, Part::Target);
}

#[test]
fn what_a_conversation_may_hold() {
    let read = |role: &str, rest: serde_json::Value| {
        let mut message = serde_json::json!({ "role": role, "content": "text" });
        for (key, value) in rest.as_object().unwrap() {
            message[key] = value.clone();
        }
        let cell = parse(&serde_json::json!([message]).to_string()).unwrap();
        Conversation::read(&cell, &Tags::default())
    };
    use serde_json::json;
    assert!(read("tool", json!({ "tool_calls": [], "function_call": null })).is_ok());
    let said = chain(&read("assistant", json!({ "tool_calls": [{ "id": 1 }] })).unwrap_err());
    assert!(said.contains("message 1 calls a tool that has no name"), "{said}");
    let parts =
        json!({ "content": [{ "type": "text", "text": "a" }, { "type": "text", "text": "b" }] });
    assert_eq!(read("user", parts).unwrap().0[0].content, "ab");
    assert!(read("user", json!({ "content": [{ "type": "image" }] })).is_err());
    let said = chain(&read("function", json!({})).unwrap_err());
    assert!(said.contains("unknown role `function`") && said.contains("on_refused"), "{said}");
    let silent = read("assistant", json!({ "content": null })).unwrap();
    assert_eq!(silent.0[0].content, "");
    assert!(read("user", json!({ "content": null })).is_err());
}

#[test]
fn messages_with_other_names_are_read_as_they_are_told() {
    use serde_json::json;
    let cell = json!([
        { "speaker": "boss", "text": "Be kind.", "role": 7 },
        { "speaker": "customer", "text": "Hi", "mood": "good" },
        { "speaker": "gpt", "text": "Hello" },
    ]);
    let cell = parse(&cell.to_string()).unwrap();
    let tags = |value| serde_json::from_value::<Tags>(value).unwrap();
    let roles = json!({ "boss": "system", "customer": "user" });
    let all = tags(json!({ "role": "speaker", "content": "text", "roles": roles }));
    let read = Conversation::read(&cell, &all).unwrap().0;
    let said: Vec<(&str, &str)> =
        read.iter().map(|m| (m.role.as_str(), m.content.as_str())).collect();
    assert_eq!(said, [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello")]);
    assert_eq!(read[1].more.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["mood"]);
    assert_eq!(read[1].input_from, Some(0));
    let fails = |given| chain(&Conversation::read(&cell, &tags(given)).unwrap_err());
    assert!(fails(json!({})).contains("message 1 has no role in `role` or `from`; `tags`"));
    let said = fails(json!({ "role": "speaker", "roles": { "boss": "system" } }));
    assert!(said.contains("message 1 has no text in `content` or `value`"), "{said}");
    let said = fails(json!({ "role": "speaker", "content": "text" }));
    assert!(said.contains("unknown role `boss`") && said.contains("tags: { roles"), "{said}");
    let wrong = tags(json!({ "roles": { "a": "user", "b": "usr", "c": "function_call" } }));
    assert_eq!(wrong.unknown().collect::<Vec<_>>(), [("b", "usr")]);
}

#[test]
fn turns_of_a_history_come_before() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.parquet");
    let history = [r#"[["a", "b"], ["c", "d"]]"#, "[]", "", r#"[["a"]]"#];
    let same = |text| vec![text; 4];
    parquet(
        &path,
        &[("input", same("e")), ("output", same("f")), ("history", history.to_vec())],
        None,
    );
    let file = std::fs::File::open(&path).unwrap();
    let mut reader =
        parquet::arrow::arrow_reader::ParquetRecordBatchReader::try_new(file, 8).unwrap();
    let columns = Columns::new(&reader.next().unwrap().unwrap()).unwrap();
    let source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}\
                  {% if add_generation_prompt %}<assistant>{% endif %}";
    let chat = ChatTemplate::new(source, map(&[]), None).unwrap();
    let fields = Fields {
        system: Some("s".into()),
        input: Some("input".into()),
        target: Some(Target::Text("output".into())),
        history: Some("history".into()),
        ..Fields::default()
    };
    let formatter = Formatter::new(Template::Chat, None, Some(chat), fields).unwrap();
    assert_eq!(formatter.columns(), ["input", "history", "output"]);
    let row = |at| pieces(formatter.row(&columns, at).unwrap());
    let told = row(0);
    assert_eq!(text(&told, true), "bdf");
    let before = "<system>s\n<user>a\n<assistant>\n<user>c\n<assistant>\n<user>e\n<assistant>";
    assert_eq!(text(&told, false), before);
    for at in [1, 2] {
        assert_eq!(text(&row(at), false), "<system>s\n<user>e\n<assistant>");
    }
    let said = chain(&formatter.row(&columns, 3).unwrap_err());
    assert!(said.contains("turn 1 of the history is not two texts"), "{said}");
}

#[test]
fn a_null_label_is_told() {
    let columns: [(&str, arrow::array::ArrayRef); 2] = [
        ("input", std::sync::Arc::new(arrow::array::StringArray::from(vec!["a"]))),
        ("label", std::sync::Arc::new(arrow::array::Int64Array::from(vec![None]))),
    ];
    let batch = arrow::array::RecordBatch::try_from_iter_with_nullable(
        columns.map(|(name, column)| (name, column, true)),
    );
    let formatter = Formatter::new(Template::Alpaca, None, None, words()).unwrap();
    let said = chain(&formatter.row(&Columns::new(&batch.unwrap()).unwrap(), 0).unwrap_err());
    assert!(said.contains("there is no label: column `label` is null"), "{said}");
}

#[test]
fn tojson_is_pythons() {
    let source = "{{ x | tojson }}|{{ x | tojson(indent=2) }}";
    let source = format!("{{% set x = {{'a': [1, '<é>'], 'b': {{}}}} %}}{source}");
    let template = ChatTemplate::new(&source, map(&[]), None).unwrap();
    let expected = "{\"a\": [1, \"<é>\"], \"b\": {}}|\
                    {\n  \"a\": [\n    1,\n    \"<é>\"\n  ],\n  \"b\": {}\n}";
    assert_eq!(template.render(&[], false).unwrap(), expected);
}

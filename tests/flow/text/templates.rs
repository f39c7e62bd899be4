//! Wording, exactly.

use flow::text::{
    ChatTemplate, Columns, Fields, Formatter, LabelWords, Message, Part, Piece, Rendered, Target,
    Template, render_file,
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
}

fn words() -> Fields {
    let words = LabelWords::new(&map(&[("0", "negative"), ("1", "positive")]), &[]);
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
}

#[test]
fn an_unknown_label_names_row_and_value() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("a.parquet"), dir.path().join("b.parquet"));
    parquet(&from, &[("input", vec!["a", "b"])], Some(("label", vec![1, 7])));
    let formatter = Formatter::new(Template::Alpaca, None, None, words()).unwrap();
    let e = render_file(&from, &to, &formatter, &mut |_, _| Ok(())).unwrap_err();
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
        let found = template.pieces(&messages).unwrap();
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

#[test]
fn tojson_is_pythons() {
    let source = "{{ x | tojson }}|{{ x | tojson(indent=2) }}";
    let source = format!("{{% set x = {{'a': [1, '<é>'], 'b': {{}}}} %}}{source}");
    let template = ChatTemplate::new(&source, map(&[]), None).unwrap();
    let expected = "{\"a\": [1, \"<é>\"], \"b\": {}}|\
                    {\n  \"a\": [\n    1,\n    \"<é>\"\n  ],\n  \"b\": {}\n}";
    assert_eq!(template.render(&[], false).unwrap(), expected);
}

//! Labels, ends, truncation.

use std::path::Path;

use flow::text::{
    Algorithm, Chunks, Encoded, Encoder, Fields, Formatter, LabelWords, Limits, OnRefused, Part,
    Piece, Row, Target, Task, Template, TooLong, Truncate, render_file, tokenize_file,
};
use proptest::prelude::*;

use super::{chain, encoder, limits, map, parquet, spec, tokenizer, train_into};

pub(super) fn row(input: &str, target: &str) -> Vec<Piece> {
    vec![
        Piece::new(Part::Template, "### Input:\n"),
        Piece::new(Part::Input, input),
        Piece::new(Part::Template, "\n\n### Response:"),
        Piece::new(Part::Target, target),
    ]
}

pub(super) fn kept(row: Row) -> Encoded {
    match row {
        Row::Kept(row) => row,
        other => panic!("left out: {other:?}"),
    }
}

pub(super) fn split(row: &Encoded) -> (Vec<u32>, Vec<u32>) {
    let at = row.labels.iter().position(|l| *l >= 0).unwrap();
    assert!(row.labels[at..].iter().all(|l| *l >= 0), "the target is in one piece");
    (row.input_ids[..at].to_vec(), row.input_ids[at..].to_vec())
}

#[test]
fn labels_are_the_target_and_its_end() {
    let encoder = encoder(256, Truncate::Error);
    let row = kept(encoder.causal(&row("The film was good.", "positive")).unwrap());
    assert_eq!(row.labels.len(), row.input_ids.len());
    let (prompt, target) = split(&row);
    // in training as in use
    let text = "### Input:\nThe film was good.\n\n### Response:";
    assert_eq!(prompt, encoder.prompt(text).unwrap());
    let tokenizer = encoder.tokenizer();
    let eos = tokenizer.eos_id().unwrap();
    assert_eq!(target.last(), Some(&eos));
    assert_eq!(tokenizer.decode(&target, true).unwrap(), "positive");
    let bos = tokenizer.bos_id().unwrap();
    assert_eq!(row.input_ids.iter().filter(|id| **id == bos).count(), 1);
    assert_eq!(row.input_ids[0], bos);
    assert!(!row.truncated);
    for (id, label) in row.input_ids.iter().zip(&row.labels) {
        assert!(*label == -100 || *label == i32::try_from(*id).unwrap());
    }
}

#[test]
fn a_second_bos_is_refused() {
    let encoder = encoder(256, Truncate::Error);
    let pieces = [Piece::new(Part::Template, "<s>Hello"), Piece::new(Part::Target, "yes")];
    let said = chain(&encoder.causal(&pieces).unwrap_err());
    assert!(said.contains("two beginning-of-sequence"), "{said}");
    assert!(encoder.prompt("<s>Hello").is_err());
}

#[test]
fn rows_without_a_target_are_told() {
    let encoder = encoder(256, Truncate::Input);
    assert_eq!(encoder.causal(&row("text", "")).unwrap(), Row::NoTarget);
    assert_eq!(encoder.causal(&row("text", "")[..3]).unwrap(), Row::NoTarget);
}

#[test]
fn chat_targets_end_once() {
    let tokenizer = tokenizer(Algorithm::Bpe);
    let limits = Limits { special_tokens: true, ..limits(256, Truncate::Error) };
    let encoder = Encoder::new(tokenizer, limits).unwrap();
    let pieces = [Piece::new(Part::Template, "<s>user: hi"), Piece::new(Part::Target, "yes</s>")];
    let row = kept(encoder.causal(&pieces).unwrap());
    let (bos, eos) = (encoder.tokenizer().bos_id().unwrap(), encoder.tokenizer().eos_id().unwrap());
    let count = |id: u32| row.input_ids.iter().filter(|i| **i == id).count();
    assert_eq!((count(bos), count(eos)), (1, 1));
    assert_eq!(row.labels.last(), Some(&i32::try_from(eos).unwrap()));
    // a template that ends no turn gets the token
    let bare = [Piece::new(Part::Template, "<s>user: hi"), Piece::new(Part::Target, "yes")];
    assert_eq!(kept(encoder.causal(&bare).unwrap()).input_ids.last(), Some(&eos));
}

#[test]
fn several_answers_are_all_learnt() {
    let encoder = encoder(256, Truncate::Error);
    let pieces = [
        Piece::new(Part::Template, "q1 "),
        Piece::new(Part::Target, "a1"),
        Piece::new(Part::Template, " q2 "),
        Piece::new(Part::Target, "a2"),
    ];
    let row = kept(encoder.causal(&pieces).unwrap());
    let learnt: Vec<u32> =
        row.labels.iter().filter(|l| **l >= 0).map(|l| u32::try_from(*l).unwrap()).collect();
    let tokenizer = encoder.tokenizer();
    assert_eq!(tokenizer.decode(&learnt, false).unwrap(), "a1a2</s>");
    assert_eq!(tokenizer.decode(&row.input_ids, true).unwrap(), "q1 a1 q2 a2");
}

#[test]
fn candidates_are_targets() {
    let encoder = encoder(256, Truncate::Error);
    let words = ["negative".to_owned(), "positive".to_owned()];
    let before = "\n\n### Response:";
    let encoder = encoder.with_candidates(&words, &words, before).unwrap();
    for (word, ids) in words.iter().zip(encoder.candidates()) {
        let row = kept(encoder.causal(&row("x", word)).unwrap());
        assert_eq!(split(&row).1, *ids);
    }
    let same = ["yes".to_owned(), "yes".to_owned()];
    let again = |limits| Encoder::new(encoder.tokenizer().clone(), limits).unwrap();
    let found = again(limits(256, Truncate::Error)).with_candidates(&words, &same, before);
    let said = chain(&found.unwrap_err());
    assert!(said.contains("`negative` and `positive` have the same tokens"), "{said}");
    // without an end the shorter word is always the likelier one
    let words = ["good".to_owned(), "good and bad".to_owned()];
    let open = Limits { append_eos: false, ..limits(256, Truncate::Error) };
    let said = chain(&again(open).with_candidates(&words, &words, before).unwrap_err());
    assert!(said.contains("tokens of `good and bad` begin with those of `good`"), "{said}");
    assert!(again(limits(256, Truncate::Error)).with_candidates(&words, &words, before).is_ok());
}

pub(super) fn review(words: usize) -> String {
    let words: Vec<&str> =
        "the film was good and the ending bad".split(' ').cycle().take(words).collect();
    words.join(" ")
}

#[test]
fn other_ways_to_shorten() {
    let long = row(&review(200), "positive");
    let needed = kept(encoder(4096, Truncate::Error).causal(&long).unwrap()).input_ids.len();
    let said = chain(&encoder(32, Truncate::Error).causal(&long).unwrap_err());
    assert!(said.contains(&format!("it has {needed} tokens")) && said.contains("`max_length: 32`"));
    assert_eq!(encoder(32, Truncate::Drop).causal(&long).unwrap(), Row::TooLong(needed));
    // the answer is beyond the cut
    assert_eq!(encoder(32, Truncate::Right).causal(&long).unwrap(), Row::NoTarget);
    let text = [Piece::new(Part::Target, review(200))];
    let row = kept(encoder(32, Truncate::Right).causal(&text).unwrap());
    assert_eq!((row.input_ids.len(), row.labels.len(), row.truncated), (32, 32, true));
}

#[test]
fn what_cannot_be_shortened_is_left_out_or_fails() {
    let pieces = row("good", &review(100));
    let encoder = encoder(32, Truncate::Input);
    assert!(matches!(encoder.causal(&pieces).unwrap(), Row::TooLong(n) if n > 32));
    let fail = Limits { on_too_long: TooLong::Fail, ..limits(32, Truncate::Input) };
    let encoder = Encoder::new(encoder.tokenizer().clone(), fail).unwrap();
    assert!(chain(&encoder.causal(&pieces).unwrap_err()).contains("max_length: 32"));
}

#[test]
fn what_to_do_with_long_rows_if_not_told() {
    let limits = Limits { truncate: None, ..limits(64, Truncate::Error) };
    let encoder = Encoder::new(tokenizer(Algorithm::Bpe), limits).unwrap();
    let text = [Piece::new(Part::Target, review(200))];
    let cut = kept(encoder.causal(&text).unwrap());
    assert_eq!((cut.input_ids.len(), cut.truncated, cut.end), (64, true, None));
    let row = kept(encoder.causal(&row(&review(200), "positive")).unwrap());
    assert_eq!(encoder.tokenizer().decode(&split(&row).1, false).unwrap(), "positive</s>");
    // with a prompt there is an answer to keep
    let answer = [Piece::new(Part::Template, "Tell:"), Piece::new(Part::Target, review(200))];
    assert!(matches!(encoder.causal(&answer).unwrap(), Row::TooLong(_)));
}

#[test]
fn the_longest_input_is_shortened_first() {
    let pieces = [
        Piece::new(Part::Input, "short and good"),
        Piece::new(Part::Template, " | "),
        Piece::new(Part::Input, review(100)),
        Piece::new(Part::Template, " ="),
        Piece::new(Part::Target, "yes"),
    ];
    let encoder = encoder(40, Truncate::Input);
    let row = kept(encoder.causal(&pieces).unwrap());
    let (prompt, _) = split(&row);
    let text = encoder.tokenizer().decode(&prompt, true).unwrap();
    assert!(text.starts_with("short and good | the film"), "{text}");
    assert!(row.input_ids.len() > 35, "not more is cut than must be: {}", row.input_ids.len());
    // two long ones are left about as long as each other
    let pieces = [
        Piece::new(Part::Input, review(100)),
        Piece::new(Part::Template, " | "),
        Piece::new(Part::Input, review(120)),
        Piece::new(Part::Template, " ="),
        Piece::new(Part::Target, "yes"),
    ];
    let (prompt, _) = split(&kept(encoder.causal(&pieces).unwrap()));
    let text = encoder.tokenizer().decode(&prompt, true).unwrap();
    let (one, two) = text.strip_suffix(" =").unwrap().split_once(" | ").unwrap();
    assert!(one.len().abs_diff(two.len()) < 12, "{text}");
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 64, failure_persistence: None, ..Default::default()
    })]
    #[test]
    fn truncation_keeps_template_and_target(
        input in "([a-z]{1,9} |é|日本|🙂|\n){0,150}",
        target in "[a-z ]{1,20}",
        max_length in 16usize..200,
    ) {
        thread_local! {
            static TOKENIZER: flow::text::Tokenizer = tokenizer(Algorithm::Bpe);
        }
        let tokenizer = TOKENIZER.with(Clone::clone);
        let encoder = Encoder::new(tokenizer, limits(max_length, Truncate::Input)).unwrap();
        match encoder.causal(&row(&input, &target)).unwrap() {
            Row::Kept(row) => {
                prop_assert!(row.input_ids.len() <= max_length);
                let (prompt, learnt) = split(&row);
                let tokenizer = encoder.tokenizer();
                prop_assert_eq!(tokenizer.decode(&learnt, false).unwrap(), format!("{target}</s>"));
                let text = tokenizer.decode(&prompt, true).unwrap();
                let rest = text.strip_prefix("### Input:\n").unwrap();
                let left = rest.strip_suffix("\n\n### Response:").unwrap();
                prop_assert!(input.starts_with(left));
                prop_assert_eq!(row.truncated, left.len() < input.len());
                // what is fed is what the shortened text gives in use
                prop_assert_eq!(prompt, encoder.prompt(&text).unwrap());
            }
            Row::TooLong(length) => {
                prop_assert!(length > max_length);
                let bare = kept(
                    Encoder::new(encoder.tokenizer().clone(), limits(4096, Truncate::Error))
                        .unwrap()
                        .causal(&row("", &target))
                        .unwrap(),
                );
                prop_assert!(bare.input_ids.len() > max_length);
            }
            other => prop_assert!(false, "a target was there: {other:?}"),
        }
    }
}

fn alpaca(words: &[(&str, &str)]) -> Formatter {
    let fields = Fields {
        instruction: Some("Classify the sentiment.".into()),
        input: Some("text".into()),
        target: Some(Target::Words("label".into(), LabelWords::new(&map(words), None).unwrap())),
        ..Fields::default()
    };
    Formatter::new(Template::Alpaca, None, None, fields).unwrap()
}

fn tokenized(dir: &Path, threads: usize, out: &str) -> (Vec<u8>, flow::text::Tokenized) {
    let (rows, prompts) = (dir.join("rows.parquet"), dir.join("prompts.parquet"));
    let texts: Vec<String> = (0..2500).map(|i| review(if i == 3 { 400 } else { i % 40 })).collect();
    let labels = (0..2500).map(|i| i % 2).collect();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    parquet(&rows, &[("text", texts)], Some(("label", labels)));
    let formatter = alpaca(&[("0", "negative"), ("1", "positive")]);
    render_file(&rows, &prompts, &formatter, OnRefused::Fail, &mut |_, _| Ok(())).unwrap();
    train_into(dir, &spec(Algorithm::Bpe, 600));
    let encoder = Encoder::new(super::load(dir), limits(256, Truncate::Input)).unwrap();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let out = dir.join(out);
    let made = pool
        .install(|| {
            tokenize_file(&prompts, &out, &encoder, Task::CausalLm, &Chunks::none(), &mut |_, _| {
                Ok(())
            })
        })
        .unwrap();
    (std::fs::read(out).unwrap(), made)
}

#[test]
fn equal_rows_give_equal_bytes_whatever_the_threads() {
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (one, made) = tokenized(a.path(), 1, "one.parquet");
    let (two, _) = tokenized(b.path(), 3, "two.parquet");
    assert_eq!(one, two);
    assert_eq!((made.rows, made.truncated, made.longest), (2500, 1, 256));
    // the long row keeps its answer
    let long = made.samples.len();
    assert_eq!(long, 3);
    assert!(made.target_tokens >= 2 * made.rows, "every row has a target and its end");
}

#[test]
fn long_rows_keep_their_answer() {
    let encoder = encoder(128, Truncate::Input);
    for words in [300, 301, 500, 2000] {
        let row = kept(encoder.causal(&row(&review(words), "positive")).unwrap());
        assert!(row.truncated && row.input_ids.len() <= 128);
        let (_, learnt) = split(&row);
        assert_eq!(encoder.tokenizer().decode(&learnt, false).unwrap(), "positive</s>");
    }
}

#[test]
fn classification_keeps_its_special_tokens() {
    let tokenizer = tokenizer(Algorithm::Wordpiece);
    let limits = Limits { append_eos: false, ..limits(16, Truncate::Right) };
    let encoder = Encoder::new(tokenizer, limits).unwrap();
    let ids = |row: &Encoded| -> Vec<String> {
        row.input_ids.iter().map(|id| encoder.tokenizer().token(*id)).collect()
    };
    let row = kept(encoder.classification(("the film was good", None)).unwrap());
    let tokens = ids(&row);
    assert_eq!((tokens[0].as_str(), tokens.last().unwrap().as_str()), ("[CLS]", "[SEP]"));
    assert!(!row.truncated && row.type_ids.is_empty() && row.labels.is_empty());
    let long = kept(encoder.classification((&review(100), None)).unwrap());
    let tokens = ids(&long);
    assert_eq!((tokens.len(), long.truncated), (16, true));
    assert_eq!((tokens[0].as_str(), tokens[15].as_str()), ("[CLS]", "[SEP]"));
    let pair = kept(encoder.classification(("the film", Some(&review(100)))).unwrap());
    assert_eq!((pair.input_ids.len(), pair.type_ids.len()), (16, 16));
    assert_eq!(ids(&pair).iter().filter(|t| *t == "[SEP]").count(), 2);
    assert_eq!((pair.type_ids[0], pair.type_ids[15]), (0, 1));
    // what is cut off two long texts is gone, and not joined to millions of rows
    let long = review(20_000);
    let pair = kept(encoder.classification((&long, Some(&long))).unwrap());
    assert_eq!(pair.input_ids.len(), 16);
    // not even the special tokens fit
    let fail = Limits { max_length: 1, on_too_long: TooLong::Fail, ..limits };
    let encoder = Encoder::new(encoder.tokenizer().clone(), fail).unwrap();
    let said = chain(&encoder.classification(("the film", None)).unwrap_err());
    assert!(said.contains("2 tokens, more than `max_length: 1`"), "{said}");
}

#[test]
fn of_several_faults_the_first_row_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let (rows, prompts) = (dir.path().join("rows.parquet"), dir.path().join("prompts.parquet"));
    let texts: Vec<String> = (0..400).map(|i| review(if i < 3 { 5 } else { 600 })).collect();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    parquet(&rows, &[("text", texts)], Some(("label", vec![1; 400])));
    let formatter = alpaca(&[("0", "negative"), ("1", "positive")]);
    render_file(&rows, &prompts, &formatter, OnRefused::Fail, &mut |_, _| Ok(())).unwrap();
    let encoder = encoder(400, Truncate::Error);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(4).build().unwrap();
    let out = dir.path().join("out.parquet");
    for _ in 0..3 {
        let made = pool.install(|| {
            tokenize_file(&prompts, &out, &encoder, Task::CausalLm, &Chunks::none(), &mut |_, _| {
                Ok(())
            })
        });
        let said = chain(&made.unwrap_err());
        assert!(said.starts_with("row 4:"), "{said}");
    }
}

#[test]
fn what_the_last_program_left_in_tokenizer_json_is_dropped() {
    let dir = tempfile::tempdir().unwrap();
    train_into(dir.path(), &spec(Algorithm::Wordpiece, 400));
    let clean = super::load(dir.path());
    let path = dir.path().join("tokenizer.json");
    let mut json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    json["truncation"] = serde_json::json!({
        "max_length": 8, "strategy": "LongestFirst", "stride": 0, "direction": "Right",
    });
    json["padding"] = serde_json::json!({
        "strategy": { "Fixed": 128 }, "direction": "Right", "pad_to_multiple_of": null,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]",
    });
    std::fs::write(&path, json.to_string()).unwrap();
    let limits = Limits { append_eos: false, ..limits(100, Truncate::Right) };
    let [clean, written] = [clean, super::load(dir.path())].map(|tokenizer| {
        let encoder = Encoder::new(tokenizer, limits).unwrap();
        kept(encoder.classification((&review(30), None)).unwrap())
    });
    assert_eq!(clean, written);
    assert!((31..100).contains(&clean.input_ids.len()));
}

#[test]
fn no_eos_no_causal_training() {
    let limits = limits(16, Truncate::Input);
    let e = Encoder::new(tokenizer(Algorithm::Wordpiece), limits).unwrap_err();
    assert!(chain(&e).contains("append_eos: false"), "{}", chain(&e));
}

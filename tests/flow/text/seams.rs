//! Where a target meets its prompt, and the room that candidate answers get.

use flow::text::{
    Algorithm, Encoder, Limits, Part, Piece, Row, Tokenizer, TokenizerSource, Truncate,
};
use proptest::prelude::*;
use serde_json::json;

use super::encoding::{kept, review, row, split};
use super::{chain, encoder, limits, tokenizer};

/// A tokenizer as Llama 2's: a blank before every text, blanks written `▁`, no words split.
fn prepending() -> Tokenizer {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>", "▁"].map(str::to_owned).to_vec();
    tokens.extend(('a'..='z').chain([':', '\n']).map(String::from));
    let merges = [("e", "s"), ("y", "es"), ("▁", "yes"), ("n", "o"), ("▁", "no"), ("a", ":")];
    tokens.extend(merges.iter().map(|(a, b)| format!("{a}{b}")));
    let vocab: serde_json::Map<_, _> =
        tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
    let special = |id: usize| {
        json!({ "id": id, "content": tokens[id], "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true })
    };
    let blank = json!([
        { "type": "Prepend", "prepend": "▁" },
        { "type": "Replace", "pattern": { "String": " " }, "content": "▁" },
    ]);
    let written = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(0), special(1), special(2)],
        "normalizer": { "type": "Sequence", "normalizers": blank },
        "pre_tokenizer": null,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{ "SpecialToken": { "id": "<s>", "type_id": 0 } },
                       { "Sequence": { "id": "A", "type_id": 0 } }],
            "pair": [{ "Sequence": { "id": "A", "type_id": 0 } },
                     { "Sequence": { "id": "B", "type_id": 1 } }],
            "special_tokens": { "<s>": { "id": "<s>", "ids": [1], "tokens": ["<s>"] } },
        },
        "decoder": null,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": "<unk>", "fuse_unk": true,
            "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "byte_fallback": false, "ignore_merges": false, "vocab": vocab, "merges": merges,
        },
    });
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    std::fs::write(&path, written.to_string()).unwrap();
    let config = dir.path().join("tokenizer_config.json");
    std::fs::write(&config, r#"{ "bos_token": "<s>", "eos_token": "</s>" }"#).unwrap();
    let source = TokenizerSource { tokenizer: path, config: Some(config), ..Default::default() };
    Tokenizer::load(&source).unwrap()
}

fn names(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<String> {
    ids.iter().map(|id| tokenizer.token(*id)).collect()
}

#[test]
fn a_target_is_encoded_as_it_stands_after_its_prompt() {
    let words = ["no".to_owned(), "yes".to_owned()];
    let encoder = Encoder::new(prepending(), limits(1024, Truncate::Error)).unwrap();
    let encoder = encoder.with_candidates(&words, &words, "b:").unwrap();
    let long = "good or not so good ".repeat(20) + "b:";
    for prompt in ["b:", long.as_str()] {
        let pieces = [Piece::new(Part::Template, prompt), Piece::new(Part::Target, "yes")];
        let (asked, learnt) = split(&kept(encoder.causal(&pieces).unwrap()));
        assert_eq!(names(encoder.tokenizer(), &learnt), ["yes", "</s>"], "no blank before it");
        assert_eq!(asked, encoder.prompt(prompt).unwrap());
        let whole = encoder.prompt(&format!("{prompt}yes")).unwrap();
        assert_eq!([&asked[..], &learnt[..1]].concat(), whole);
        assert!(encoder.candidates().any(|ids| ids == learnt));
    }
    // so is what follows an answer
    let pieces = [
        Piece::new(Part::Template, "b:"),
        Piece::new(Part::Target, "so"),
        Piece::new(Part::Template, "\nb:"),
        Piece::new(Part::Target, "not"),
    ];
    let row = kept(encoder.causal(&pieces).unwrap());
    let whole = encoder.prompt("b:so\nb:not").unwrap();
    assert_eq!(row.input_ids[..row.input_ids.len() - 1], whole);
    // a prompt that would lose its last token keeps it: in use it has that token
    let pieces = [Piece::new(Part::Template, "xx y"), Piece::new(Part::Target, "es")];
    let (asked, learnt) = split(&kept(encoder.causal(&pieces).unwrap()));
    assert_eq!(asked, encoder.prompt("xx y").unwrap());
    assert_eq!(names(encoder.tokenizer(), &learnt), ["▁", "es", "</s>"]);
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 128, failure_persistence: None, ..Default::default()
    })]
    #[test]
    fn looking_at_the_end_of_a_prompt_is_enough(
        prompt in "([a-z]{1,12} |yes|no|a:|[.:] ?|  |\n|é|日本|🙂|'s){1,80}",
        target in "([a-z]{1,6}|yes|es| |\n|:|!|é){1,6}[a-z]",
    ) {
        thread_local! {
            static BOTH: [Tokenizer; 2] = [tokenizer(Algorithm::Bpe), prepending()];
        }
        for tokenizer in BOTH.with(Clone::clone) {
            let encoder = Encoder::new(tokenizer, limits(4096, Truncate::Error)).unwrap();
            let piece = |part, text: &String| Piece::new(part, text.clone());
            let pieces = [piece(Part::Template, &prompt), piece(Part::Target, &target)];
            let (asked, learnt) = split(&kept(encoder.causal(&pieces).unwrap()));
            prop_assert_eq!(&asked, &encoder.prompt(&prompt).unwrap());
            let whole = encoder.prompt(&format!("{prompt}{target}")).unwrap();
            let joint = whole.strip_prefix(asked.as_slice()).map(<[u32]>::to_vec);
            let expected = match joint {
                Some(ids) => ids,
                None => encoder.tokenizer().encode(&target).unwrap(),
            };
            prop_assert_eq!(&learnt[..learnt.len() - 1], expected);
        }
    }
}

#[test]
fn what_is_left_of_a_prompt_does_not_tell_its_answer() {
    let words = ["good".to_owned(), "not good and not so bad in the end".to_owned()];
    let max = 64;
    let encoder = encoder(max, Truncate::Input);
    let encoder = encoder.with_candidates(&words, &words, "\n\n### Response:").unwrap();
    let longest = encoder.candidates().map(<[u32]>::len).max().unwrap();
    let rows: Vec<_> =
        words.iter().map(|w| kept(encoder.causal(&row(&review(200), w)).unwrap())).collect();
    let prompts: Vec<_> = rows.iter().map(|row| split(row).0).collect();
    assert_eq!(prompts[0], prompts[1]);
    assert!(prompts[0].len() + longest > max - 6, "not more is cut than must be");
    for row in &rows {
        assert_eq!(row.positions, prompts[0].len() + longest);
        assert!(row.positions <= max && row.truncated);
    }
    // just long enough for the short answer is too long for the other
    let whole = kept(encoder.causal(&row("good", &words[0])).unwrap()).input_ids.len();
    let tight = Encoder::new(encoder.tokenizer().clone(), limits(whole, Truncate::Drop)).unwrap();
    assert!(matches!(tight.causal(&row("good", &words[0])).unwrap(), Row::Kept(_)));
    let tight = tight.with_candidates(&words, &words, "\n\n### Response:").unwrap();
    assert!(matches!(tight.causal(&row("good", &words[0])).unwrap(), Row::TooLong(_)));
}

#[test]
fn a_second_bos_of_the_data_leaves_the_row_out() {
    let encoder = encoder(256, Truncate::Input);
    let answer = Piece::new(Part::Target, "yes");
    let asked = [Piece::new(Part::Input, "<s>the film"), answer.clone()];
    assert_eq!(encoder.causal(&asked).unwrap(), Row::SecondBos(Part::Input));
    let text = [Piece::new(Part::Target, "<s>the film")];
    assert_eq!(encoder.causal(&text).unwrap(), Row::SecondBos(Part::Target));
    // a chat template writes the first one
    let limits = Limits { special_tokens: true, ..limits(256, Truncate::Input) };
    let encoder = Encoder::new(encoder.tokenizer().clone(), limits).unwrap();
    let chat =
        [Piece::new(Part::Template, "<s>"), Piece::new(Part::Input, "<s>the film"), answer.clone()];
    assert_eq!(encoder.causal(&chat).unwrap(), Row::SecondBos(Part::Input));
    let twice = [Piece::new(Part::Template, "<s><s>"), answer];
    assert!(chain(&encoder.causal(&twice).unwrap_err()).contains("two beginning-of-sequence"));
}

#[test]
fn the_end_of_a_turn_is_known() {
    let limits = Limits { special_tokens: true, ..limits(256, Truncate::Input) };
    let encoder = Encoder::new(tokenizer(Algorithm::Bpe), limits).unwrap();
    let asked = Piece::new(Part::Template, "<s>user: hi");
    let end = |answer: &str| {
        let pieces = [asked.clone(), Piece::new(Part::Target, answer)];
        kept(encoder.causal(&pieces).unwrap()).end.map(|id| encoder.tokenizer().token(id))
    };
    assert_eq!(end("yes<unk>").as_deref(), Some("<unk>"));
    assert_eq!(end("yes").as_deref(), Some("</s>"));
}

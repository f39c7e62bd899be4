//! The fast path gives what the `tokenizers` crate gives.

use std::path::Path;

use flow::text::{Algorithm, Encoder, Limits, Row, Tokenizer, TokenizerSource, Truncate};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::encoding::row;
use super::{limits, spec, train_into};

const LLAMA3: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);

fn split(regex: &str) -> Value {
    let split = json!({
        "type": "Split", "pattern": { "Regex": regex }, "behavior": "Isolated", "invert": false,
    });
    let bytes = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false,
    });
    json!({ "type": "Sequence", "pretokenizers": [split, bytes] })
}

/// A small tokenizer whose file was edited.
fn edited(algorithm: Algorithm, edit: impl Fn(&mut Value)) -> Tokenizer {
    let dir = tempfile::tempdir().unwrap();
    train_into(dir.path(), &spec(algorithm, 600));
    let path = dir.path().join("tokenizer.json");
    let mut file: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    edit(&mut file);
    std::fs::write(&path, file.to_string()).unwrap();
    super::load(dir.path())
}

/// One of each kind that has a fast path.
fn small() -> Vec<(&'static str, Tokenizer)> {
    let trims = |prefix: bool| {
        json!({
            "type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": true,
            "use_regex": true,
        })
    };
    let one_digit = LLAMA3.replace("{1,3}", "");
    vec![
        ("WordPiece", edited(Algorithm::Wordpiece, |_| {})),
        (
            "WordPiece, cased",
            edited(Algorithm::Wordpiece, |file| {
                file["normalizer"]["lowercase"] = json!(false);
                file["model"]["max_input_chars_per_word"] = json!(20);
            }),
        ),
        ("GPT-2", edited(Algorithm::Bpe, |_| {})),
        (
            "GPT-2, places trimmed",
            edited(Algorithm::Bpe, |file| {
                file["post_processor"] = trims(true);
                // a byte without a token is left out
                let missing = ["\u{120}\u{120}", "Q"];
                missing
                    .iter()
                    .for_each(|t| drop(file["model"]["vocab"].as_object_mut().unwrap().remove(*t)));
                let merges = file["model"]["merges"].as_array_mut().unwrap();
                merges.retain(|m| {
                    !m.to_string().contains('Q') && !m.to_string().contains("\u{120}\u{120}")
                });
            }),
        ),
        (
            "SmolLM2",
            edited(Algorithm::Bpe, |file| {
                file["pre_tokenizer"] = json!({ "type": "Sequence", "pretokenizers": [
                { "type": "Digits", "individual_digits": true },
                { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                  "use_regex": true },
            ] });
                file["post_processor"] = trims(false);
            }),
        ),
        (
            "Llama 3",
            edited(Algorithm::Bpe, |file| {
                file["pre_tokenizer"] = split(LLAMA3);
                file["model"]["ignore_merges"] = json!(true);
                // a whole word that no merge leads to
                file["model"]["vocab"]["\u{120}whole"] = json!(700);
                let template = file["post_processor"].clone();
                file["post_processor"] =
                    json!({ "type": "Sequence", "processors": [trims(true), template] });
            }),
        ),
        (
            "Qwen2",
            edited(Algorithm::Bpe, move |file| {
                file["pre_tokenizer"] = split(&one_digit);
                file["normalizer"] = json!({ "type": "NFC" });
            }),
        ),
        (
            "GPT-2, a token that takes blanks",
            edited(Algorithm::Bpe, |file| {
                file["added_tokens"][0]["lstrip"] = json!(true);
            }),
        ),
    ]
}

/// What tokenizers fall over.
fn adversarial() -> Vec<String> {
    let mut texts: Vec<String> = [
        "",
        " ",
        "  ",
        "   ",
        "\n",
        "\n\n",
        " \n",
        "\n ",
        "\t",
        "\r\n",
        "\r\n\r\n  x",
        "a",
        " a",
        "a ",
        "a  ",
        "  a",
        "a\n\nb",
        "a \n b",
        "a\n \nb",
        "a\t\tb",
        "a\u{b}b",
        "a\u{c} b",
        "a\u{1c}b",
        "it's",
        "IT'S",
        "'s",
        " 's",
        "x''s",
        "'S'T'RE'VE'M'LL'D",
        "'re've'll",
        "don't they'd we'll",
        "'\u{17f}",
        "it'\u{17f} so",
        "'\u{212a}",
        "rock 'n' roll",
        "'abc",
        "\"abc",
        "(abc)",
        "!!abc??",
        "...\n\nNext",
        "end.\r\n  begin",
        "a.\n",
        "?!\n\n\n x",
        " !\n",
        "x = [1, 2];\n\treturn x\n",
        "1",
        " 1",
        "12",
        "123",
        "1234",
        "1234567",
        "a1b22c333",
        "3.14",
        " 1  2   3",
        "1'st 2's",
        "x  1",
        "x \t1",
        "x\u{11de0}\u{11de1} \u{11de0} a \u{11de0}",
        "\u{661}\u{662} \u{bd} \u{2160}",
        "v1.2.3-rc4",
        "0x1F",
        "1e-4",
        "caf\u{e9} na\u{ef}ve",
        "cafe\u{301} nai\u{308}ve",
        "\u{301}alone",
        "a \u{301}b",
        "a\u{323}\u{307} a\u{307}\u{323}",
        "\u{c5}\u{212b}A\u{30a}",
        "\u{3a3}\u{3a3} \u{39f}\u{394}\u{39f}\u{3a3} ok",
        "\u{130}stanbul I\u{307}",
        "stra\u{df}e STRASSE \u{1e9e}",
        "\u{65e5}\u{672c}\u{8a9e}",
        "\u{65e5}\u{672c} and \u{8a9e}",
        "a\u{4e2d}b",
        "\u{4e2d}\u{6587}\u{ff0c}\u{6807}\u{70b9}\u{3002}",
        "\u{ac00}\u{b098} \u{1112}\u{1161}\u{11ab}",
        "\u{43f}\u{440}\u{438}\u{432}\u{435}\u{442} \u{43c}\u{438}\u{440}!",
        "\u{5e9}\u{5dc}\u{5d5}\u{5dd} world",
        "\u{645}\u{631}\u{62d}\u{628}\u{627}, a",
        "\u{928}\u{92e}\u{938}\u{94d}\u{924}\u{947} x",
        "\u{1f642}",
        "a\u{1f642}b",
        "\u{1f468}\u{200d}\u{1f469}\u{200d}\u{1f467} family",
        "\u{1f1eb}\u{1f1f7}\u{1f1e9}\u{1f1ea}",
        "\u{2764}\u{fe0f} x",
        "zero\u{200b}width",
        "\u{feff}bom",
        "soft\u{ad}hyphen",
        "a\u{200d}b \u{200e}c",
        "nbsp\u{a0}here \u{a0} x",
        "en\u{2002}quad \u{2003} x",
        "line\u{2028}sep\u{2029} para",
        "\u{3000}wide\u{3000}",
        "x\u{85}y",
        "\u{a0}1",
        " \u{a0}a",
        "a\0b",
        "\0",
        "\u{1}\u{2} \u{3}x",
        "bell\u{7}ring \u{7f}del",
        "a\u{7f}",
        "\u{fffd} x\u{fffd}y",
        "\u{e000}\u{10ffff} x",
        "half\u{ff21}\u{ff22} \u{fb01}ne \u{2460}",
        "\u{201c}quotes\u{201d} \u{2014} dash\u{2026}",
        "\u{20ac}5 \u{a3}6",
        "x\u{2019}s",
        "<s>",
        "</s>",
        "a<s>b",
        " <s> ",
        "<s",
        "<<s>>",
        "<s><s></s>",
        "x </s>\n y",
        "[CLS]",
        "[SEP]a[MASK]",
        "a [UNK] b",
        "[cls]",
        "[CLS",
        "[[PAD]]",
        "[PAD][PAD] [PAD]",
        "\u{e9}<s>\u{e9}",
        "\u{e9}[SEP]\u{e9} a",
        "whole a whole wholes",
        "QQ a Q bQc",
        "a  \u{e9}",
        "\u{e9}  a",
        "\u{e9}\n\na",
        "mixed\u{e9}ascii and \u{e9} mixed!",
        "\u{e9} a",
        "a \u{e9}",
        "a, \u{e9}, b",
        "x\ty\u{e9}z\tw",
        "\u{37e} \u{1fef} \u{2126}",
        "e\u{301}\n\u{301}e",
        "a=\u{338}b <\u{338} \u{338}",
        "\u{1100}\u{1161} \u{1100} \u{1161}",
        "\u{fb2c} \u{958}",
    ]
    .iter()
    .map(|text| (*text).to_owned())
    .collect();
    for length in [14, 15, 16, 17, 31, 99, 100, 101, 511, 512, 513, 5_000] {
        texts.push("a".repeat(length));
        texts.push("ab".repeat(length / 2) + " tail");
        texts.push(" ".repeat(length) + "x");
        texts.push("\n".repeat(length) + " x");
        texts.push("!".repeat(length));
        texts.push("7".repeat(length));
        texts.push("\u{e9}".repeat(length));
        texts.push("\u{4e2d}".repeat(length.min(600)));
        texts.push(format!("the{}good", "Film".repeat(length / 4)));
    }
    let ascii = || (0u8..128).map(char::from);
    for (a, b) in ascii().flat_map(|a| ascii().map(move |b| (a, b))) {
        texts.push(format!("x{a}{b}y {a}{b} {b}"));
    }
    // several of them beside each other
    let seams: Vec<&str> = [
        "it's",
        "\u{e9}",
        " ",
        "\n",
        "<s>",
        "[SEP]",
        "12",
        "\u{1f642}",
        "\u{301}",
        "'",
        "\u{a0}",
        "\u{4e2d}",
        "\0",
        "Q",
    ]
    .to_vec();
    for a in &seams {
        for b in &seams {
            for c in &seams {
                texts.push(format!("{a}{b}{c}"));
                texts.push(format!("{a} {b}{c} good"));
            }
        }
    }
    texts
}

/// Panics with the text where the two differ.
fn same(name: &str, tokenizer: &Tokenizer, plain: &Tokenizer, text: &str) {
    let (fast, crate_s) = (tokenizer.encode(text).unwrap(), plain.encode(text).unwrap());
    assert_eq!(fast, crate_s, "{name}: ids of {text:?}");
    let (fast, crate_s) = (tokenizer.places(text).unwrap(), plain.places(text).unwrap());
    assert_eq!(fast, crate_s, "{name}: places in {text:?}");
}

#[test]
fn ids_and_places_are_those_of_the_crate() {
    let texts = adversarial();
    for (name, tokenizer) in small() {
        assert!(tokenizer.is_fast(), "{name}");
        let plain = tokenizer.plain();
        assert!(!plain.is_fast());
        // twice, since what was met is remembered
        for text in texts.iter().chain(texts.iter().take(200)) {
            same(name, &tokenizer, &plain, text);
        }
    }
}

fn mixed() -> impl Strategy<Value = String> {
    let ascii = "[ -~\t\n\r]{0,40}";
    let words = "([a-zA-Z]{1,9}[ .,'!-]{0,2}){0,12}";
    let wild = concat!(
        "([a-zA-Z ]{1,6}|[0-9]{1,4}|'[a-zA-Z]{1,2}|[ \t\n\r]{1,4}|\\PC|\\p{M}|\\p{Z}|\\p{C}|",
        "[\u{400}-\u{4ff}]{1,5}|[\u{4e00}-\u{4e80}]{1,3}|[\u{1f600}-\u{1f640}]|",
        "<s>|</s>|\\[SEP\\]){0,30}",
    );
    prop_oneof![ascii, words, wild, ".{0,30}"]
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 400, failure_persistence: None, ..Default::default()
    })]
    #[test]
    fn so_are_those_of_any_text(texts in prop::collection::vec(mixed(), 1..4)) {
        thread_local! {
            static ALL: Vec<(&'static str, Tokenizer, Tokenizer)> =
                small().into_iter().map(|(n, t)| (n, t.clone(), t.plain())).collect();
        }
        ALL.with(|all| {
            for (name, tokenizer, plain) in all {
                texts.iter().for_each(|text| same(name, tokenizer, plain, text));
            }
        });
    }

    #[test]
    fn so_are_rows(
        input in prop_oneof![mixed(), "([a-z]{1,8} ){30}"],
        target in "[a-z\u{e9}\u{1f642} ]{1,12}",
        max_length in 12usize..80,
        repeat in 1usize..60,
        truncate in prop_oneof![
            Just(Truncate::Input), Just(Truncate::Right), Just(Truncate::Drop)
        ],
    ) {
        thread_local! {
            static ALL: Vec<(&'static str, Tokenizer)> = small();
        }
        let input = input.repeat(repeat);
        ALL.with(|all| {
            for (name, tokenizer) in all {
                let causal = tokenizer.eos_id().is_some();
                let limits = Limits {
                    append_eos: causal, special_tokens: false, ..limits(max_length, truncate)
                };
                let [fast, slow] = [tokenizer.clone(), tokenizer.plain()]
                    .map(|tokenizer| Encoder::new(tokenizer, limits).unwrap());
                let rows = |e: &Encoder| -> Vec<Result<Row, String>> {
                    let text = |e: anyhow::Error| format!("{e:#}");
                    let completion = [flow::text::Piece::new(flow::text::Part::Target, &*input)];
                    vec![
                        e.classification((&input, None)).map_err(text),
                        e.classification((&target, Some(&input))).map_err(text),
                        e.classification((&input, Some(&input))).map_err(text),
                        e.causal(&row(&input, &target)).map_err(text),
                        e.causal(&completion).map_err(text),
                    ]
                };
                // how long a row is that is left out, is not told where nobody asks
                assert_eq!(rows(&fast), rows(&slow), "{name}: {input:?}");
            }
        });
    }
}

/// Edits after which a file says something that the fast path does not do.
#[test]
fn what_is_not_known_is_left_to_the_crate() {
    type Edit = (&'static str, Value);
    let bert: [Edit; 9] = [
        ("/normalizer/clean_text", json!(false)),
        ("/normalizer/type", json!("Lowercase")),
        ("/normalizer/lowercase", json!(null)),
        ("/normalizer", json!(null)),
        ("/pre_tokenizer", json!({ "type": "Whitespace" })),
        ("/pre_tokenizer", json!(null)),
        ("/post_processor", json!(null)),
        ("/added_tokens/1/normalized", json!(true)),
        ("/added_tokens/1/content", json!("[a b]")),
    ];
    let gpt2: [Edit; 13] = [
        ("/normalizer", json!({ "type": "NFKC" })),
        ("/normalizer", json!({ "type": "Lowercase" })),
        ("/pre_tokenizer/add_prefix_space", json!(true)),
        ("/pre_tokenizer/use_regex", json!(false)),
        ("/pre_tokenizer", json!(null)),
        ("/pre_tokenizer", split(&LLAMA3.replace("1,3", "1,2"))),
        (
            "/pre_tokenizer",
            json!({ "type": "Sequence", "pretokenizers": [
            { "type": "Digits", "individual_digits": false },
            { "type": "ByteLevel", "add_prefix_space": false, "use_regex": true },
        ] }),
        ),
        ("/model/dropout", json!(0.1)),
        ("/model/byte_fallback", json!(true)),
        ("/model/unk_token", json!("<unk>")),
        ("/model/end_of_word_suffix", json!("</w>")),
        (
            "/post_processor",
            json!({ "type": "TemplateProcessing", "single": [], "pair": [],
            "special_tokens": {} }),
        ),
        ("/added_tokens/0/content", json!("<a b>")),
    ];
    for (algorithm, edits) in [(Algorithm::Wordpiece, &bert[..]), (Algorithm::Bpe, &gpt2[..])] {
        for (place, value) in edits {
            let dir = tempfile::tempdir().unwrap();
            train_into(dir.path(), &spec(algorithm, 600));
            let path = dir.path().join("tokenizer.json");
            let mut file: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
            *file.pointer_mut(place).unwrap() = value.clone();
            std::fs::write(&path, file.to_string()).unwrap();
            let source = TokenizerSource { tokenizer: path, ..Default::default() };
            // some of them the crate refuses, too
            let Ok(tokenizer) = Tokenizer::load(&source) else { continue };
            // without special tokens ids are what they were
            let fine = (*place, value) == ("/post_processor", &json!(null));
            assert_eq!(tokenizer.is_fast(), fine, "{place} = {value}");
            // which no two encodings agree on
            let random = *place == "/model/dropout";
            for text in ["It's 12345 [a b] <a b> caf\u{e9}", "  x "].iter().filter(|_| !random) {
                same(place, &tokenizer, &tokenizer.plain(), text);
            }
        }
    }
}

/// Tokenizers of real models, where the local hub is (`FLOW_TEST_HUB`).
#[test]
#[ignore = "needs the local hub; minutes"]
fn real_tokenizers_agree_on_every_character() {
    let hub = std::env::var("FLOW_TEST_HUB").expect("FLOW_TEST_HUB");
    let names = ["sentence-transformers/all-MiniLM-L6-v2", "HuggingFaceTB/SmolLM2-135M-Instruct"];
    let texts = adversarial();
    for name in names {
        let path = Path::new(&hub).join("models").join(name).join("tokenizer.json");
        let source = TokenizerSource { tokenizer: path, ..Default::default() };
        let tokenizer = Tokenizer::load(&source).unwrap();
        assert!(tokenizer.is_fast(), "{name}");
        let plain = tokenizer.plain();
        texts.iter().for_each(|text| same(name, &tokenizer, &plain, text));
        for line in super::corpus() {
            same(name, &tokenizer, &plain, &line);
        }
        use rayon::prelude::*;
        let all: Vec<char> = ('\u{80}'..=char::MAX).collect();
        all.par_chunks(16).for_each(|some| {
            for c in some {
                let text = format!("a{c}b {c} x{c} '{c}1\n{c}A{c}\u{301} {c}{c}\t9");
                let (fast, slow) = (tokenizer.encode(&text), plain.encode(&text));
                assert_eq!(fast.unwrap(), slow.unwrap(), "{name}: {text:?}");
            }
        });
    }
}

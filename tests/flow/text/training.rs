//! Tokenizers trained from text, and real ones.

use std::path::Path;

use flow::text::{Algorithm, Tokenizer, TokenizerSource, train_tokenizer};

use super::{chain, corpus, load, spec, train_into};

#[test]
fn equal_text_gives_equal_files() {
    for algorithm in [Algorithm::Bpe, Algorithm::Wordpiece] {
        let files = |_| {
            let dir = tempfile::tempdir().unwrap();
            train_into(dir.path(), &spec(algorithm, 500));
            ["tokenizer.json", "tokenizer_config.json"]
                .map(|name| std::fs::read(dir.path().join(name)).unwrap())
        };
        let all: Vec<_> = (0..4).map(files).collect();
        assert!(all.windows(2).all(|w| w[0] == w[1]), "{algorithm:?}");
    }
}

#[test]
fn byte_level_bpe_writes_any_text() {
    let dir = tempfile::tempdir().unwrap();
    let size = train_into(dir.path(), &spec(Algorithm::Bpe, 500));
    let tokenizer = load(dir.path());
    assert_eq!((size, tokenizer.vocab_size()), (500, 500));
    for text in ["The film was good.", "naïve 日本語 🙂\n\ttab", ""] {
        let ids = tokenizer.encode(text).unwrap();
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
    }
    let names = ["bos_token", "eos_token", "pad_token"].map(|n| tokenizer.special(n).unwrap());
    assert_eq!(names, ["<s>", "</s>", "<pad>"]);
    assert_eq!(tokenizer.bos_id(), Some(0));
    assert_eq!((tokenizer.eos_id(), tokenizer.pad_id()), (Some(1), Some(2)));
    // it has learnt words, not only bytes
    let line = &corpus()[1];
    assert!(tokenizer.encode(line).unwrap().len() * 2 < line.len());
}

#[test]
fn wordpiece_knows_words() {
    let dir = tempfile::tempdir().unwrap();
    train_into(dir.path(), &spec(Algorithm::Wordpiece, 400));
    let tokenizer = load(dir.path());
    let ids = tokenizer.encode("THE film").unwrap();
    let tokens: Vec<String> = ids.iter().map(|id| tokenizer.token(*id)).collect();
    assert_eq!(tokens[0], "the");
    assert_eq!(tokens.iter().map(|t| t.trim_start_matches("##")).collect::<String>(), "thefilm");
    let unknown = tokenizer.encode("日").unwrap();
    assert_eq!(tokenizer.token(unknown[0]), "[UNK]");
}

/// Merges of the textbook example (Sennrich et al. 2016): es, est, then lo (of the equals, the
/// one with the smallest ids).
#[test]
fn merges_are_the_most_frequent_pairs() {
    let words = [("low", 5), ("lower", 2), ("newest", 6), ("widest", 3)]
        .map(|(w, n)| vec![w; n].join("\n"));
    let dir = tempfile::tempdir().unwrap();
    let mut spec = spec(Algorithm::Wordpiece, 30);
    spec.min_frequency = 7;
    train_tokenizer(&spec, |take| words.iter().try_for_each(|w| take(w)), dir.path()).unwrap();
    let tokenizer = load(dir.path());
    let tokens = |word: &str| -> Vec<String> {
        tokenizer.encode(word).unwrap().iter().map(|id| tokenizer.token(*id)).collect()
    };
    assert_eq!(tokens("widest"), ["w", "##i", "##d", "##est"]);
    assert_eq!(tokens("low"), ["low"]);
    assert_eq!(tokens("newest"), ["n", "##e", "##w", "##est"]);
    // a character seen inside words only may begin another
    assert_eq!(tokens("to"), ["t", "##o"]);
}

#[test]
fn too_small_a_vocabulary_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let one = |take: &mut dyn FnMut(&str) -> anyhow::Result<()>| take("text");
    let said = chain(&train_tokenizer(&spec(Algorithm::Bpe, 100), one, dir.path()).unwrap_err());
    assert!(said.contains("alone are 260"), "{said}");
    let none = |_: &mut dyn FnMut(&str) -> anyhow::Result<()>| Ok(());
    assert!(train_tokenizer(&spec(Algorithm::Bpe, 300), none, dir.path()).is_err());
}

#[test]
fn damaged_files_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    std::fs::write(&path, "{\"model\": 1}").unwrap();
    let source = TokenizerSource { tokenizer: path, ..TokenizerSource::default() };
    let said = chain(&Tokenizer::load(&source).unwrap_err());
    assert!(said.contains("`tokenizer.json` is not a tokenizer"), "{said}");
}

#[test]
#[ignore = "needs the local hub: FLOW_TEST_HUB names its folder"]
fn real_tokenizers_load() {
    let hub = std::env::var("FLOW_TEST_HUB").unwrap();
    let load = |model: &str| load(&Path::new(&hub).join("models").join(model));
    let smol = load("HuggingFaceTB/SmolLM2-135M-Instruct");
    assert_eq!((smol.vocab_size(), smol.bos_id(), smol.eos_id()), (49152, None, Some(2)));
    assert_eq!(smol.encode("### Response:").unwrap().len(), 3);
    let chat = smol.chat_template(None).unwrap();
    let said = chat.render(&[flow::text::Message::new("user", "Hi")], true).unwrap();
    assert!(said.starts_with("<|im_start|>system\nYou are a helpful AI assistant named SmolLM"));
    let bert = load("local/minilm-l6-distilbert");
    assert_eq!((bert.vocab_size(), bert.bos_id(), bert.pad_id()), (30522, Some(101), Some(0)));
}

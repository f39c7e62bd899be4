//! Chunks of rows that are kept: the result is what it is without them.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use flow::digest::Digest;
use flow::store::Store;
use flow::text::{
    Algorithm, Chunks, Encoder, Fields, Formatter, OnRefused, Target, Task, Template, Tokenized,
    Truncate, render_file, tokenize_file,
};
use proptest::prelude::*;

use super::{chain, limits, parquet, tokenizer};

/// Renders texts as rows that are learnt whole.
fn render(texts: &[String], dir: &Path) -> std::path::PathBuf {
    let (rows, prompts) = (dir.join("rows.parquet"), dir.join("prompts.parquet"));
    parquet(&rows, &[("text", texts.iter().map(String::as_str).collect())], None);
    let fields = Fields { target: Some(Target::Text("text".into())), ..Fields::default() };
    let formatter = Formatter::new(Template::Completion, None, None, fields).unwrap();
    render_file(&rows, &prompts, &formatter, OnRefused::Fail, &mut |_, _| Ok(())).unwrap();
    prompts
}

fn encoder() -> Encoder {
    thread_local! {
        static ENCODER: Encoder =
            Encoder::new(tokenizer(Algorithm::Bpe), limits(64, Truncate::Right)).unwrap();
    }
    ENCODER.with(|encoder| {
        Encoder::new(encoder.tokenizer().clone(), limits(64, Truncate::Right)).unwrap()
    })
}

fn made(texts: &[String], store: Option<&Store>, threads: usize) -> (Vec<u8>, Tokenized) {
    let dir = tempfile::tempdir().unwrap();
    let (prompts, out) = (render(texts, dir.path()), dir.path().join("out.parquet"));
    let memos = store.map(|store| store.memos(&Digest::of(b"salt")));
    let keep = |key: &Digest, make: &mut dyn FnMut() -> anyhow::Result<Vec<u8>>| {
        let Some(memos) = &memos else { return make() };
        if let Some((kept, _)) = memos.get(key) {
            return Ok(kept);
        }
        let made = make()?;
        memos.keep(key, &made)?;
        Ok(made)
    };
    let chunks = Chunks { salt: Digest::of(b"salt"), keep: &keep };
    let encoder = encoder();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let mut last = 0;
    let mut progress = |done: u64, total: u64| {
        assert!(done > last && done <= total);
        last = done;
        Ok(())
    };
    let made = pool.install(|| {
        tokenize_file(&prompts, &out, &encoder, Task::CausalLm, &chunks, &mut progress)
    });
    let made = made.unwrap();
    assert_eq!(last, texts.len() as u64);
    (std::fs::read(out).unwrap(), made)
}

fn counted(made: &Tokenized) -> Tokenized {
    Tokenized { encoded: 0, ..made.clone() }
}

fn texts(n: usize) -> Vec<String> {
    (0..n).map(|i| format!("film {i}: {}", "it was good, ".repeat(i * 31 % 17))).collect()
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 12, failure_persistence: None, ..Default::default()
    })]
    #[test]
    fn what_is_kept_changes_nothing_but_the_time(
        edits in prop::collection::vec((0usize..2900, 0usize..4), 1..4),
        threads in 1usize..4,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap();
        let mut rows = texts(3000);
        let (_, first) = made(&rows, Some(&store), 2);
        prop_assert_eq!(first.encoded, first.chunks);
        let kinds = edits.len() as u64;
        for (at, kind) in edits {
            match kind {
                0 => rows[at] = "another row".into(),
                1 => drop(rows.remove(at)),
                2 => rows.insert(at, "one more row".into()),
                _ => rows.extend((0..30).map(|i| format!("appended {i}"))),
            }
        }
        let (warm, again) = made(&rows, Some(&store), threads);
        let (cold, anew) = made(&rows, None, 1);
        prop_assert!(warm == cold, "the bytes differ");
        prop_assert_eq!(counted(&again), counted(&anew));
        prop_assert!(again.encoded <= 4 * kinds, "{} of {}", again.encoded, again.chunks);
    }
}

#[test]
fn an_appended_percent_is_about_a_percent_of_the_work() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("store")).unwrap();
    let mut rows = texts(30_000);
    let (_, first) = made(&rows, Some(&store), 2);
    assert!(first.chunks > 100, "{} chunks", first.chunks);
    rows.extend((0..300).map(|i| format!("appended {i}: {}", "and good ".repeat(i % 20))));
    let (warm, again) = made(&rows, Some(&store), 2);
    assert!(again.encoded * 40 <= again.chunks, "{} of {}", again.encoded, again.chunks);
    assert_eq!(warm, made(&rows, None, 2).0);
    rows[12_345] = "edited".into();
    let (warm, again) = made(&rows, Some(&store), 2);
    assert!((1..=3).contains(&again.encoded), "{} of {}", again.encoded, again.chunks);
    assert_eq!(warm, made(&rows, None, 2).0);
}

#[test]
fn damaged_chunks_are_made_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("store")).unwrap();
    let rows = texts(1000);
    let (first, cold) = made(&rows, Some(&store), 2);
    assert!(cold.chunks > 2, "{}", cold.chunks);
    let pack = || store.memo_packs().unwrap().0.into_values().next().unwrap().path;
    let whole = std::fs::read(pack()).unwrap();
    let middle = whole.len() / 2;
    // what stands before the place where it was cut off is taken
    std::fs::write(pack(), &whole[..middle]).unwrap();
    let (second, again) = made(&rows, Some(&store), 2);
    assert!((1..cold.chunks).contains(&again.encoded), "{}", again.encoded);
    assert_eq!(second, first);
    // a damaged pack is set aside
    for item in store.memo_packs().unwrap().0.into_values().skip(1) {
        std::fs::remove_file(item.path).unwrap();
    }
    let mut damaged = whole;
    damaged[middle..].fill(1);
    std::fs::write(pack(), damaged).unwrap();
    let (third, again) = made(&rows, Some(&store), 2);
    assert!((1..=cold.chunks).contains(&again.encoded), "{}", again.encoded);
    assert_eq!(third, first);
}

#[test]
fn a_stopped_step_keeps_what_it_has_and_a_fault_names_its_row() {
    let dir = tempfile::tempdir().unwrap();
    let rows = texts(2000);
    let prompts = render(&rows, dir.path());
    let out = dir.path().join("out.parquet");
    let (stop, calls) = (AtomicBool::new(false), AtomicU64::new(0));
    let keep = |_: &Digest, make: &mut dyn FnMut() -> anyhow::Result<Vec<u8>>| {
        calls.fetch_add(1, Ordering::Relaxed);
        make()
    };
    let chunks = Chunks { salt: Digest::of(b"salt"), keep: &keep };
    let encoder = encoder();
    let mut progress = |_, _| {
        assert!(!stop.swap(true, Ordering::Relaxed), "nothing goes on after a fault");
        anyhow::bail!("interrupted")
    };
    let stopped = tokenize_file(&prompts, &out, &encoder, Task::CausalLm, &chunks, &mut progress);
    assert_eq!(chain(&stopped.unwrap_err()), "interrupted; ");
    assert!(calls.into_inner() > 0);
    // of rows that fail in several chunks, the first is named
    let limits = limits(20, Truncate::Error);
    let strict = Encoder::new(encoder.tokenizer().clone(), limits).unwrap();
    let first = rows.iter().position(|row| {
        strict.causal(&[flow::text::Piece::new(flow::text::Part::Target, &**row)]).is_err()
    });
    let failed =
        tokenize_file(&prompts, &out, &strict, Task::CausalLm, &Chunks::none(), &mut |_, _| Ok(()));
    let said = chain(&failed.unwrap_err());
    assert!(said.starts_with(&format!("row {}:", first.unwrap() + 1)), "{said}");
}

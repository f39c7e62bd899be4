//! Whatever is run and collected, in whatever order: what is kept is whole, and what is run again
//! gives what it gave.

use std::collections::BTreeMap;
use std::time::Duration;

use flow::digest::Digest;
use flow::lineage::{Budget, Loaded, Pin, Pins, Record, Runs, Status};
use flow::store::Store;
use proptest::prelude::*;

use super::super::toys::Bench;
use super::{DAY_MS, all_whole, collect, strict};

/// A step: what it reads (nothing: it emits a word), and its word or suffix.
type Node = (Option<usize>, u8);

#[derive(Debug, Clone)]
enum Act {
    /// Runs a pipeline of one of two names.
    Run(bool, Vec<Node>),
    Collect {
        keep_runs: Option<usize>,
        old: bool,
        max_bytes: Option<u64>,
    },
    /// Pins a step of the newest run.
    Pin(usize),
    Unpin,
}

fn dag() -> impl Strategy<Value = Vec<Node>> {
    let node = (any::<prop::sample::Index>(), any::<bool>(), 0..3_u8);
    prop::collection::vec(node, 1..5).prop_map(|nodes| {
        let wire = nodes.iter().enumerate().map(|(i, (from, root, word))| {
            let from = (i > 0 && !root).then(|| from.index(i));
            (from, *word)
        });
        wire.collect()
    })
}

fn act() -> impl Strategy<Value = Act> {
    let run = || (any::<bool>(), dag()).prop_map(|(name, dag)| Act::Run(name, dag));
    let (keep, max) = (prop::option::of(0..3_usize), prop::option::of(0..40_000_u64));
    let collect = (keep, any::<bool>(), max);
    let collect =
        collect.prop_map(|(keep_runs, old, max_bytes)| Act::Collect { keep_runs, old, max_bytes });
    let pin = (0..4_usize).prop_map(Act::Pin);
    prop_oneof![4 => run(), 3 => collect, 1 => pin, 1 => Just(Act::Unpin)]
}

fn text(name: bool, dag: &[Node]) -> String {
    let mut text = format!("name: {}\nsteps:\n", if name { "p" } else { "q" });
    for (i, (from, word)) in dag.iter().enumerate() {
        let (kind, with) = match from {
            None => ("emit", format!("texts: {{ x: \"w{word}\" }}")),
            Some(j) => ("upper", format!("data: \"${{steps.s{j}}}\", suffix: \"{word}\"")),
        };
        text += &format!("  s{i}: {{ kind: {kind}, with: {{ {with} }} }}\n");
    }
    text
}

/// What each step gives, said independently.
fn expected(dag: &[Node]) -> Vec<String> {
    let mut texts: Vec<String> = Vec::new();
    for (from, word) in dag {
        texts.push(match from {
            None => format!("w{word}"),
            Some(j) => format!("{}{word}", texts[*j].to_uppercase()),
        });
    }
    texts
}

fn text_of(store: &Store, key: &Digest) -> String {
    let Loaded::Found(record) = Record::load(store, key).unwrap() else { panic!("no record") };
    let tree = store.tree(&record.ports["x"]).unwrap().unwrap();
    std::fs::read_to_string(store.locate_entry(&tree.entries[0]).unwrap().unwrap()).unwrap()
}

/// Runs a pipeline and checks what it gives; the keys by step.
fn run(bench: &Bench, name: bool, dag: &[Node]) -> BTreeMap<String, Digest> {
    let ran = bench.run(&text(name, dag));
    assert_eq!(ran.outcome.status, Status::Done);
    let store = bench.store();
    let run = Runs::of(&store).load(&ran.outcome.run).unwrap();
    let steps = run.summary.unwrap().steps.into_iter();
    let keys: BTreeMap<String, Digest> = steps.map(|s| (s.id, s.key.unwrap())).collect();
    for (i, text) in expected(dag).iter().enumerate() {
        assert_eq!(text_of(&store, &keys[&format!("s{i}")]), *text);
    }
    keys
}

fn law(acts: &[Act]) {
    let bench = Bench::new();
    let store = bench.store();
    let pins = Pins::of(&store);
    let mut newest: BTreeMap<bool, BTreeMap<String, Digest>> = BTreeMap::new();
    let mut last = None;
    for act in acts {
        match act {
            Act::Run(name, dag) => {
                newest.insert(*name, run(&bench, *name, dag));
                last = Some((*name, dag));
            }
            Act::Pin(n) => {
                let Some((name, _)) = last else { continue };
                let Some(key) = newest[&name].values().nth(*n) else { continue };
                if pins.list().unwrap().is_empty()
                    && matches!(Record::load(&store, key).unwrap(), Loaded::Found(_))
                {
                    let keys = [*key].into();
                    let (name, what) = ("pin".into(), String::new());
                    pins.add(&Pin { name, what, run: None, keys, pinned_unix_ms: 0 }).unwrap();
                }
            }
            Act::Unpin => drop(pins.remove("pin")),
            Act::Collect { keep_runs, old, max_bytes } => {
                let older_than = old.then_some(Duration::from_secs(86_400));
                let now_unix_ms = strict().now_unix_ms + DAY_MS * 2;
                let budget = Budget {
                    older_than,
                    now_unix_ms,
                    keep_runs: *keep_runs,
                    max_bytes: *max_bytes,
                    ..strict()
                };
                collect(&store, &budget);
                assert_eq!(collect(&store, &strict()).removals, [], "nothing is left behind");
                let pinned: Vec<Digest> =
                    pins.list().unwrap().into_iter().flat_map(|p| p.keys).collect();
                let kept =
                    newest.values().filter(|_| *keep_runs != Some(0)).flat_map(BTreeMap::values);
                for key in kept.chain(&pinned) {
                    let loaded = Record::load(&store, key).unwrap();
                    let Loaded::Found(record) = loaded else { panic!("a root was collected") };
                    for tree in record.ports.values() {
                        assert_eq!(store.missing(tree).unwrap(), None);
                    }
                }
                if *keep_runs == Some(0) {
                    newest.clear();
                    last = None;
                }
            }
        }
    }
    for act in acts {
        if let Act::Run(name, dag) = act {
            run(&bench, *name, dag);
        }
    }
    all_whole(&store);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    #[test]
    fn what_is_kept_is_whole_and_what_is_run_again_is_the_same(
        acts in prop::collection::vec(act(), 1..8)
    ) {
        law(&acts);
    }
}

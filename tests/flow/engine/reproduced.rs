//! Results made again: how alike they are, and what is left alone.

use std::collections::BTreeMap;

use flow::artifact::Likeness;
use flow::engine::{Reproduced, Verdict, reproduce};
use flow::lineage::{Record, Results, Runs};

use super::CHAIN;
use super::toys::{Bench, Ran};

const DICE: &str = r#"
steps:
  dice: { kind: wrong, with: { way: random } }
  after: { kind: upper, with: { data: "${steps.dice}" } }
  other: { kind: emit, with: { texts: { a: "one" } } }
"#;

fn recorded(bench: &Bench, run: &Ran) -> BTreeMap<String, Record> {
    Runs::of(&bench.store()).load(&run.outcome.run).unwrap().records(&bench.store()).unwrap()
}

fn again(
    bench: &Bench,
    steps: &str,
    recorded: &BTreeMap<String, Record>,
) -> anyhow::Result<Vec<Reproduced>> {
    reproduce(&bench.plan(steps), &bench.session(), recorded, None, &mut |_| {})
}

/// Each step with how alike it is.
fn likenesses(reproduced: &[Reproduced]) -> Vec<(&str, Option<Likeness>)> {
    let likeness = |r: &Reproduced| match &r.verdict {
        Verdict::Compared(comparison) => Some(comparison.likeness),
        _ => None,
    };
    reproduced.iter().map(|r| (r.step.as_str(), likeness(r))).collect()
}

#[test]
fn what_is_made_again_is_the_same_and_leaves_nothing() {
    for bench in [Bench::new(), Bench::new().with_workers()] {
        let steps = format!("{CHAIN}\n").replace(
            "outputs",
            "  d: { kind: nap, with: { ms: 1, name: nap, isolated: true } }\noutputs",
        );
        let run = bench.run(&steps);
        let before = Record::all(&bench.store()).unwrap();
        let reproduced = again(&bench, &steps, &recorded(&bench, &run)).unwrap();
        let same = Some(Likeness::BitIdentical);
        assert_eq!(likenesses(&reproduced), [("a", same), ("b", same), ("c", same), ("d", same)]);
        assert!(reproduced.iter().all(|r| r.verdict.holds() && r.inputs_from.is_empty()));
        assert_eq!(Record::all(&bench.store()).unwrap(), before);
        assert!(Record::differing(&bench.store()).is_empty());
        let left = std::fs::read_dir(bench.path("store/attempts")).unwrap().count();
        assert_eq!(left, 0, "the scratch store is gone");
    }
}

#[test]
fn a_difference_is_named_noted_and_does_not_spread() {
    let bench = Bench::new();
    let run = bench.run(DICE);
    let before = Record::all(&bench.store()).unwrap();
    let recorded = recorded(&bench, &run);
    let reproduced = again(&bench, DICE, &recorded).unwrap();
    let same = Some(Likeness::BitIdentical);
    assert_eq!(
        likenesses(&reproduced),
        [("dice", Some(Likeness::Different)), ("after", same), ("other", same)]
    );
    let Verdict::Compared(comparison) = &reproduced[0].verdict else { panic!("{reproduced:?}") };
    let first = comparison.first.as_ref().unwrap();
    assert_eq!((first.file.as_str(), first.at.as_str()), ("done/text", "line 1"));
    assert_eq!(first.old, bench.text("dice", "done"));
    assert_ne!(first.new, first.old);
    assert!(!reproduced[0].verdict.holds());
    // The first result stands, and the ledger has the other one.
    assert_eq!(Record::all(&bench.store()).unwrap(), before);
    let key = recorded["dice"].key;
    let ledger = Record::differences(&bench.store(), &key).unwrap();
    assert_eq!(ledger.len(), 1);
    assert_ne!(ledger[0].ports, recorded["dice"].ports);
    assert!(Record::differing(&bench.store()).into_iter().eq([key]));
}

#[test]
fn where_bytes_are_nowhere_a_step_reads_what_was_made_now_and_says_so() {
    let bench = Bench::new();
    let run = bench.run(DICE);
    let store = bench.store();
    let run = Runs::of(&store).load(&run.outcome.run).unwrap();
    let path = bench.path("toy.results");
    Results::of_run(&store, &run).unwrap().save(&store, &path).unwrap();
    // Another machine has the pipeline and the results, and an empty store.
    let other = Bench::new();
    let records = Results::load(&path).unwrap().records(&other.store()).unwrap();
    let reproduced = again(&other, DICE, &records).unwrap();
    let same = Some(Likeness::BitIdentical);
    assert_eq!(
        likenesses(&reproduced),
        [("dice", Some(Likeness::Different)), ("after", None), ("other", same)]
    );
    let Verdict::Compared(comparison) = &reproduced[0].verdict else { panic!("{reproduced:?}") };
    assert!(comparison.unread.as_ref().is_some_and(|reason| reason.contains("is gone")));
    assert_eq!(reproduced[1].inputs_from, ["dice"]);
    let Verdict::Unchecked { because } = &reproduced[1].verdict else { panic!("{reproduced:?}") };
    assert!(because.contains("another result of dice"), "{because}");
    assert!(Record::all(&other.store()).unwrap().is_empty(), "nothing is left there");
    // A step asked for alone takes what it needs with it, and no more.
    let mut alone = Bench::new();
    alone.options.targets = vec!["after".into()];
    let reproduced = again(&alone, DICE, &records).unwrap();
    assert_eq!(
        likenesses(&reproduced).iter().map(|(s, _)| *s).collect::<Vec<_>>(),
        ["dice", "after"]
    );
    let mut here = bench;
    here.options.targets = vec!["after".into()];
    let reproduced = again(&here, DICE, &records).unwrap();
    assert_eq!(likenesses(&reproduced), [("after", same)]);
}

#[test]
fn a_pipeline_that_changed_is_refused_with_the_typed_difference() {
    let bench = Bench::new();
    let run = bench.run(CHAIN);
    let recorded = recorded(&bench, &run);
    let said = |steps: &str| format!("{:#}", again(&bench, steps, &recorded).unwrap_err());
    let changed = said(&CHAIN.replace("\"!\"", "\"?\""));
    assert!(changed.contains("1 step of") && changed.contains("c: with.suffix \"!\" -> \"?\""));
    assert!(!changed.contains("b: "), "{changed}");
    let gone = said("steps:\n  a: { kind: emit, with: { texts: { train: \"one\" } } }\n");
    assert!(gone.contains("there is no step `b`"), "{gone}");
    // What is new and was never recorded does not matter.
    let more =
        CHAIN.replace("outputs:", "  z: { kind: upper, with: { data: \"${steps.c}\" } }\noutputs:");
    assert_eq!(again(&bench, &more, &recorded).unwrap().len(), 3);
    // Of another machine's results only the key is known.
    let mut unknown = recorded.clone();
    for record in unknown.values_mut() {
        record.preimage = serde_json::Value::Null;
    }
    unknown.get_mut("c").unwrap().version = 7;
    unknown.get_mut("c").unwrap().key = flow::digest::Digest::of(b"another");
    let error = format!("{:#}", again(&bench, CHAIN, &unknown).unwrap_err());
    assert!(error.contains("c: version 7 -> 1"), "{error}");
}

#[test]
fn a_step_that_fails_leaves_the_others_to_be_compared() {
    let bench = Bench::new();
    let flaky = bench.path("count");
    std::fs::write(&flaky, "xx").unwrap();
    let steps = format!(
        "steps:\n  nap: {{ kind: nap, with: {{ ms: 1, flaky: [{flaky:?}, 2] }} }}\n  \
         after: {{ kind: upper, with: {{ data: \"${{steps.nap}}\" }} }}\n"
    );
    let run = bench.run(&steps);
    let recorded = recorded(&bench, &run);
    std::fs::write(&flaky, "").unwrap();
    let reproduced = again(&bench, &steps, &recorded).unwrap();
    let failed =
        matches!(&reproduced[0].verdict, Verdict::Failed { message } if message.contains("flaky"));
    assert!(failed && !reproduced[0].verdict.holds(), "{reproduced:?}");
    assert_eq!(likenesses(&reproduced)[1], ("after", Some(Likeness::BitIdentical)));
    // It is tried as often as in a run.
    let often = steps.replace("kind: nap,", "kind: nap, retry: { times: 2, backoff: 1ms },");
    std::fs::write(&flaky, "").unwrap();
    let reproduced = again(&bench, &often, &recorded).unwrap();
    assert!(reproduced.iter().all(|one| one.verdict.holds()), "{reproduced:?}");
}

#[test]
fn results_that_gave_the_same_have_the_same_file() {
    let (one, two) = (Bench::new(), Bench::new());
    let text = |bench: &Bench| {
        let run = bench.run(CHAIN);
        let store = bench.store();
        let run = Runs::of(&store).load(&run.outcome.run).unwrap();
        let path = bench.path("toy.results");
        Results::of_run(&store, &run).unwrap().save(&store, &path).unwrap();
        std::fs::read_to_string(path).unwrap()
    };
    assert_eq!(text(&one), text(&two));
}

#[test]
fn a_measurement_is_made_again_and_nothing_is_held_against_it() {
    let bench = Bench::new();
    let steps = "steps:\n  now: { kind: clock, with: {} }\n";
    let run = bench.run(steps);
    let reproduced = again(&bench, steps, &recorded(&bench, &run)).unwrap();
    assert_eq!(reproduced[0].verdict, Verdict::Measured);
    assert!(Record::differing(&bench.store()).is_empty());
}

#[test]
fn where_only_metrics_are_known_those_of_a_model_decide() {
    let bench = Bench::new();
    let steps = "steps:\n  infer: { kind: infer, with: {} }\n";
    let run = bench.run(steps);
    let mut recorded = recorded(&bench, &run);
    let other = Bench::new();
    let mut against = |score: f64| {
        let record = recorded.get_mut("infer").unwrap();
        let lost = flow::digest::Digest::of(b"made on another machine");
        record.ports.insert("out".into(), lost);
        record.facts.insert("score".into(), score.into());
        again(&other, steps, &recorded).unwrap().remove(0)
    };
    let near = against(0.5001);
    assert_eq!(
        likenesses(std::slice::from_ref(&near)),
        [("infer", Some(Likeness::WithinTolerance))]
    );
    let far = against(0.6);
    let Verdict::Compared(comparison) = &far.verdict else { panic!("{far:?}") };
    let first = comparison.first.as_ref().unwrap();
    assert_eq!(
        (first.at.as_str(), first.old.as_str(), first.new.as_str()),
        ("score", "0.6", "0.5")
    );
    assert!(!far.verdict.holds());
}

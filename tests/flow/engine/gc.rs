//! What a collection removes and what it never does; what a verification finds.

mod laws;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use flow::digest::Digest;
use flow::engine::{self, RunEvent};
use flow::lineage::{
    Budget, Class, Part, Pin, Pins, Record, Runs, Status, Sweep, plan_sweep, sweep, verify,
};
use flow::store::{Disk, Faults, Store};

use super::toys::{Bench, Ran, at_every_call};

const DAY_MS: u64 = 86_400_000;

/// `a` and `b` of a pipeline of this name; the text decides what is new.
fn steps(name: &str, text: &str) -> String {
    format!(
        "name: {name}\nsteps:\n  a: {{ kind: emit, with: {{ texts: {{ x: \"{text}\" }} }} }}\n  \
         b: {{ kind: upper, with: {{ data: \"${{steps.a}}\", suffix: \"!\" }} }}\n"
    )
}

/// Everything that nobody needs, at once.
fn greedy() -> Budget {
    Budget { keep_runs: Some(0), grace: Duration::ZERO, ..Budget::none() }
}

/// Only garbage, at once.
fn strict() -> Budget {
    Budget { grace: Duration::ZERO, ..Budget::none() }
}

fn collect(store: &Store, budget: &Budget) -> Sweep {
    let planned = plan_sweep(store, budget).unwrap();
    let done = sweep(store, budget, &mut || {}).unwrap();
    assert_eq!(done, planned, "a dry run is the same plan, not applied");
    for removal in &done.removals {
        assert!(!store.root().join(&removal.path).exists(), "{removal:?}");
    }
    let left: u64 = store.items("").unwrap().iter().map(|item| item.bytes).sum();
    assert_eq!(left, done.bytes_after);
    all_whole(store);
    done
}

/// Every record that stands has all its bytes.
fn all_whole(store: &Store) {
    for record in Record::all(store).unwrap() {
        for tree in record.ports.values() {
            assert_eq!(store.missing(tree).unwrap(), None, "{}", record.made.step);
        }
    }
}

fn count(sweep: &Sweep, class: Class) -> usize {
    sweep.removals.iter().filter(|r| r.class == class).count()
}

fn key_of(bench: &Bench, ran: &Ran, step: &str) -> Digest {
    let run = Runs::of(&bench.store()).load(&ran.outcome.run).unwrap();
    run.step(step).unwrap().key.unwrap()
}

fn object_of(store: &Store, key: &Digest) -> PathBuf {
    let records = Record::all(store).unwrap();
    let record = records.iter().find(|r| r.key == *key).unwrap();
    let tree = store.tree(record.ports.values().next().unwrap()).unwrap().unwrap();
    store.locate(&tree.entries[0].digest).unwrap().unwrap()
}

fn text_of(bench: &Bench, ran: &Ran, step: &str) -> String {
    std::fs::read_to_string(object_of(&bench.store(), &key_of(bench, ran, step))).unwrap()
}

fn damage(path: &Path, bytes: &str) {
    std::fs::remove_file(path).unwrap();
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn parts_of_results_go_with_the_last_that_was_made_of_them() {
    let bench = Bench::new();
    let (one, two) = (bench.run(&steps("p", "one")), bench.run(&steps("p", "two")));
    let store = bench.store();
    let memo = |name: &str| Digest::of(name.as_bytes());
    let scope = memo("scope");
    let names = ["of one", "of both", "of two", "of none", "of an unknown key"];
    // each in a pack of its own
    let keep = |name| (name, store.memos(&scope).keep(&memo(name), name.as_bytes()).unwrap());
    let packs = std::collections::BTreeMap::from(names.map(keep));
    let note = |key: Digest, names: [&str; 2]| {
        store.note_memos(&key, &names.map(|name| packs[name]).into_iter().collect()).unwrap();
    };
    note(key_of(&bench, &one, "b"), ["of one", "of both"]);
    note(key_of(&bench, &two, "b"), ["of two", "of both"]);
    note(memo("no step"), ["of an unknown key", "of both"]);
    std::fs::write(bench.path("store/memo-uses/.1-2-3.tmp"), "half").unwrap();
    let left = || names.map(|name| store.memos(&scope).get(&memo(name)).is_some());
    // what is not noted yet may be of a step that is under way
    let swept = collect(&store, &Budget::none());
    assert_eq!((count(&swept, Class::Memo), left()), (2, [true, true, true, true, false]));
    let swept = collect(&store, &strict());
    assert_eq!((count(&swept, Class::Memo), left()), (1, [true, true, true, false, false]));
    assert_eq!(count(&swept, Class::Temporary), 1);
    let budget = Budget { keep_runs: Some(1), ..strict() };
    let swept = collect(&store, &budget);
    assert_eq!((count(&swept, Class::Memo), left()), (2, [false, true, true, false, false]));
}

#[test]
fn without_a_budget_only_what_nothing_refers_to_goes() {
    let bench = Bench::new();
    bench.run(&steps("p", "one"));
    bench.run(&steps("p", "two"));
    let store = bench.store();
    // What crashes leave: objects without a record, and files on their way.
    let made = bench.path("made");
    std::fs::create_dir(&made).unwrap();
    std::fs::write(made.join("text"), "nobody's").unwrap();
    store.publish_tree(&made).unwrap();
    std::fs::write(bench.path("store/tmp/1-2-3"), "half").unwrap();
    std::fs::write(bench.path("store/trees/.1-2-3.tmp"), "half").unwrap();
    std::fs::create_dir_all(bench.path("store/records/ab")).unwrap();
    std::fs::write(bench.path("store/records/ab/.1-2-3.tmp"), "half").unwrap();
    for name in ["20200101-000000-0000.abcd-1/out", "kept-20200101-000000-0000.abcd-2/out"] {
        std::fs::create_dir_all(bench.path("store/attempts").join(name)).unwrap();
    }
    // Work that is under way and keeps no journal.
    let _reproduction = Runs::of(&store).hold("reproduce-1").unwrap();
    std::fs::create_dir(bench.path("store/attempts/reproduce-1.store")).unwrap();
    std::fs::create_dir(bench.path("store/runs/20200101-000000-0000")).unwrap();
    std::fs::write(bench.path("store/runs/20200101-000000-0001"), "{\"id\": \"20").unwrap();
    // What was put at two places, of which one is there, and at one that nobody knows.
    std::fs::create_dir(bench.path("store/outputs")).unwrap();
    for (name, place) in [("a", "made"), ("b", "gone"), ("c", "")] {
        let path = (!place.is_empty()).then(|| bench.path(place));
        let note = serde_json::json!({ "path": path }).to_string();
        std::fs::write(bench.path(&format!("store/outputs/{name}.json")), note).unwrap();
    }
    // All of it is young.
    assert_eq!(collect(&store, &Budget::none()).removals, []);
    let later = Budget { now_unix_ms: Budget::none().now_unix_ms + DAY_MS, ..Budget::none() };
    let done = collect(&store, &later);
    let n = |class| count(&done, class);
    assert_eq!((n(Class::Object), n(Class::Tree), n(Class::Temporary)), (1, 1, 2));
    assert_eq!((n(Class::Attempt), n(Class::Run), n(Class::Record)), (1, 2, 0));
    assert_eq!(n(Class::Output), 1);
    assert!(!bench.path("store/outputs/b.json").exists());
    assert!(n(Class::Lease) > 0 && done.runs.is_empty());
    assert!(bench.path("store/attempts/kept-20200101-000000-0000.abcd-2").is_dir());
    assert!(bench.path("store/attempts/reproduce-1.store").is_dir());
    assert_eq!(collect(&store, &later).removals, [], "once is enough");
    assert_eq!(bench.run(&steps("p", "one")).outcome.ran, 0);
    assert_eq!(bench.run(&steps("p", "two")).outcome.ran, 0);
    assert_eq!(Runs::of(&store).list().unwrap().len(), 4);
}

#[test]
fn the_newest_runs_stay_and_what_they_share_with_others() {
    let bench = Bench::new();
    let store = bench.store();
    for text in ["one", "two", " two ", "three"] {
        bench.run(&steps("p", text));
    }
    bench.run(&steps("q", "one"));
    let done = collect(&store, &Budget { keep_runs: Some(2), ..Budget::none() });
    // `one` is in use by q; `b` of `two` gave what `b` of ` two ` gave.
    let gone: BTreeSet<_> = done.removals.iter().filter_map(|r| r.step.as_deref()).collect();
    assert_eq!(gone, BTreeSet::from(["a", "b"]));
    assert_eq!((count(&done, Class::Record), count(&done, Class::Object)), (2, 1));
    assert_eq!(
        done.runs.len(),
        1,
        "the run of `one` made what q needs, so its logs stay: {done:?}"
    );
    assert_eq!(bench.run(&steps("p", "one")).outcome.ran, 0);
    assert_eq!(bench.run(&steps("p", "two")).ran(), ["a", "b"]);
    // A run of one step, or one that fails early, does not drive out the results of the others.
    let mut bench = bench;
    bench.options.targets = vec!["a".into()];
    bench.run(&steps("p", "four"));
    collect(&store, &Budget { keep_runs: Some(1), ..Budget::none() });
    bench.options.targets.clear();
    assert_eq!(bench.run(&steps("p", "two")).outcome.ran, 0);
    let done = collect(&store, &greedy());
    assert_eq!(store.by_digest("objects").unwrap().len() + Record::all(&store).unwrap().len(), 0);
    assert!(Runs::of(&store).ids().unwrap().is_empty() && done.bytes_after < done.bytes_before);
    let run = bench.run(&steps("p", "two"));
    assert_eq!((run.ran(), text_of(&bench, &run, "b")), (vec!["a", "b"], "TWO!".to_owned()));
}

#[test]
fn age_counts_from_the_last_use() {
    let bench = Bench::new();
    let store = bench.store();
    let old = bench.run(&steps("p", "one"));
    bench.run(&steps("p", "two"));
    bench.run(&steps("q", "three"));
    let now = Budget::none().now_unix_ms;
    let aged = |days: u64| Budget {
        older_than: Some(Duration::from_secs(30 * 86_400)),
        now_unix_ms: now + days * DAY_MS,
        ..Budget::none()
    };
    assert_eq!(collect(&store, &aged(29)).runs, []);
    // The newest run of each pipeline stays, however old.
    let runs: Vec<String> =
        plan_sweep(&store, &aged(31)).unwrap().runs.into_iter().map(|r| r.run).collect();
    assert_eq!(runs, std::slice::from_ref(&old.outcome.run));
    // A hit is a use.
    let path = bench.path("store/runs").join(&old.outcome.run).join("summary.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let ended = Runs::of(&store).load(&old.outcome.run).unwrap().summary.unwrap().ended_unix_ms;
    std::fs::write(&path, text.replace(&ended.to_string(), &(ended - 40 * DAY_MS).to_string()))
        .unwrap();
    assert_eq!(plan_sweep(&store, &aged(0)).unwrap().runs.len(), 1);
    bench.run(&steps("p", "one"));
    let done = collect(&store, &aged(0));
    assert_eq!(count(&done, Class::Record), 0, "{done:?}");
    assert_eq!(bench.run(&steps("p", "one")).outcome.ran, 0);
    // With no run to be kept, age alone decides.
    collect(&store, &Budget { keep_runs: Some(0), ..aged(31) });
    assert!(Record::all(&store).unwrap().is_empty());
}

#[test]
fn a_size_is_reached_from_the_oldest_on_and_no_further() {
    let bench = Bench::new();
    let store = bench.store();
    let text = |n: usize| format!("{n}").repeat(20_000);
    let runs: Vec<Ran> = (0..5).map(|n| bench.run(&steps("p", &text(n)))).collect();
    let total: u64 = store.items("").unwrap().iter().map(|item| item.bytes).sum();
    let fit = |max| Budget { max_bytes: Some(max), ..Budget::none() };
    assert_eq!(collect(&store, &fit(total)).removals, [], "it fits");
    let done = collect(&store, &fit(total - 90_000));
    let gone: Vec<&str> = done.runs.iter().map(|r| r.run.as_str()).collect();
    assert_eq!(gone, [&runs[0].outcome.run, &runs[1].outcome.run]);
    assert_eq!((done.over_budget, done.bytes_after <= total - 90_000), (0, true));
    // Never the newest run of a pipeline.
    let done = collect(&store, &fit(1000));
    assert_eq!((done.runs.len(), done.over_budget), (2, done.bytes_after - 1000));
    assert_eq!(bench.run(&steps("p", &text(4))).outcome.ran, 0);
    // What was set aside for inspection goes before any result.
    let run = bench.run(&steps("p", &text(5)));
    let aside = bench.path("store/quarantine");
    std::fs::create_dir_all(&aside).unwrap();
    std::fs::write(aside.join("damaged"), "x".repeat(30_000)).unwrap();
    let total: u64 = store.items("").unwrap().iter().map(|item| item.bytes).sum();
    let done = collect(&store, &Budget { grace: Duration::ZERO, ..fit(total - 20_000) });
    assert_eq!((count(&done, Class::Quarantine), done.runs.len()), (1, 0));
    assert_eq!(run.outcome.status, Status::Done);
}

#[test]
fn pins_hold_results_and_what_they_were_made_from() {
    let bench = Bench::new();
    let store = bench.store();
    let one = bench.run(&steps("p", "one"));
    let two = bench.run(&steps("p", "two"));
    bench.run(&steps("p", "three"));
    let pins = Pins::of(&store);
    let pin = |name: &str, run: Option<&Ran>, keys: &[Digest]| Pin {
        name: name.into(),
        what: "a test".into(),
        run: run.map(|r| r.outcome.run.clone()),
        keys: keys.iter().copied().collect(),
        pinned_unix_ms: 1,
    };
    let b = key_of(&bench, &one, "b");
    pins.add(&pin("best@x=1", None, &[b])).unwrap();
    pins.add(&pin("run", Some(&two), &[key_of(&bench, &two, "b")])).unwrap();
    assert!(pins.add(&pin("run", None, &[b])).unwrap_err().to_string().contains("already"));
    for bad in ["", ".x", "a/b", "..", "a b"] {
        assert!(pins.add(&pin(bad, None, &[b])).is_err(), "{bad:?}");
    }
    assert!(pins.add(&pin("none", None, &[Digest::of(b"none")])).is_err());
    assert!(pins.add(&pin("empty", None, &[])).is_err());
    let names: Vec<String> = pins.list().unwrap().into_iter().map(|p| p.name).collect();
    assert_eq!(names, ["best@x=1", "run"]);
    collect(&store, &greedy());
    assert_eq!(Record::all(&store).unwrap().len(), 4);
    assert!(Runs::of(&store).load(&two.outcome.run).is_ok(), "its journal is pinned too");
    assert_eq!(bench.run(&steps("p", "one")).outcome.ran, 0);
    assert_eq!(bench.run(&steps("p", "two")).outcome.ran, 0);
    let wrong = pins.remove("rum").unwrap_err();
    assert!(flow::source::advice(&wrong).join(" ").contains("run"), "{wrong:?}");
    pins.remove("run").unwrap();
    pins.remove("best@x=1").unwrap();
    collect(&store, &greedy());
    assert!(Record::all(&store).unwrap().is_empty());
    // Lost results cannot be pinned, and a pin that cannot be read stops the collection.
    let run = bench.run(&steps("p", "one"));
    let key = key_of(&bench, &run, "b");
    std::fs::remove_file(object_of(&store, &key)).unwrap();
    assert!(pins.add(&pin("lost", None, &[key])).unwrap_err().to_string().contains("is lost"));
    std::fs::write(bench.path("store/pins/torn"), "{").unwrap();
    assert!(sweep(&store, &greedy(), &mut || {}).unwrap_err().to_string().contains("not a pin"));
}

#[test]
fn nothing_that_a_running_pipeline_uses_goes() {
    let bench = Bench::new();
    let store = bench.store();
    bench.run(&steps("other", "shared"));
    bench.run(&steps("other", "alone"));
    bench.run(&steps("live", "before"));
    let live = "name: live\nsteps:\n  a: { kind: emit, with: { texts: { x: \"shared\" } } }\n  \
        n: { kind: nap, with: { ms: 1, after: [\"${steps.a}\"] } }\n  \
        b: { kind: upper, with: { data: \"${steps.a}\", suffix: \"!\" } }\n  \
        c: { kind: upper, with: { data: \"${steps.n}\", suffix: \"?\" } }\n";
    let (plan, session) = (bench.plan(live), bench.session());
    let mut sweeps = Vec::new();
    let outcome = engine::run(&plan, &session, &mut |event| match event {
        RunEvent::Started { .. } | RunEvent::Finished { .. } => {
            sweeps.push(
                sweep(&store, &Budget { max_bytes: Some(0), ..greedy() }, &mut || {}).unwrap(),
            );
        }
        _ => {}
    });
    let outcome = outcome.unwrap();
    assert_eq!((outcome.status, outcome.hits, outcome.ran), (Status::Done, 2, 2));
    assert!(sweeps.iter().all(|s| s.alive == [outcome.run.clone()]));
    let dropped: Vec<&str> = sweeps[0].runs.iter().map(|r| r.pipeline.as_str()).collect();
    assert_eq!(
        dropped,
        ["other"],
        "of `shared` all is in use, and pipelines that run lose nothing"
    );
    all_whole(&store);
    assert_eq!(bench.run(live).outcome.hits, 4);
    assert_eq!(bench.run(&steps("live", "before")).outcome.hits, 2);
    assert_eq!(bench.run(&steps("other", "shared")).outcome.hits, 2);
    assert_eq!(bench.run(&steps("other", "alone")).ran(), ["a", "b"]);
}

#[test]
fn what_keeps_no_journal_may_need_anything() {
    let bench = Bench::new();
    let store = bench.store();
    bench.run(&steps("p", "one"));
    let folder = bench.path("store/attempts/reproduce-1.store/out");
    std::fs::create_dir_all(&folder).unwrap();
    let later = || Budget { now_unix_ms: Budget::none().now_unix_ms + DAY_MS, ..greedy() };
    let alive = Runs::of(&store).hold("reproduce-1").unwrap();
    let done = collect(&store, &later());
    assert_eq!((done.alive, done.runs), (vec!["reproduce-1".to_owned()], vec![]));
    assert!(folder.is_dir());
    assert_eq!(bench.run(&steps("p", "one")).outcome.ran, 0);
    drop(alive);
    assert_eq!(collect(&store, &later()).runs.len(), 2);
    assert!(!folder.exists() && Record::all(&store).unwrap().is_empty());
}

#[test]
fn collections_without_a_pause_do_no_harm_to_runs() {
    let bench = Bench::new();
    let done = AtomicBool::new(false);
    let removed = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let runs: Vec<_> = (0..2)
            .map(|thread| {
                let bench = &bench;
                scope.spawn(move || {
                    for n in 0..6 {
                        // Both threads make equal bytes under different keys.
                        let (name, text) =
                            (format!("p{thread}"), format!("{}{n}", " ".repeat(thread)));
                        let run = bench.run(&steps(&name, &text));
                        assert_eq!(run.outcome.status, Status::Done, "{:?}", run.outcome);
                    }
                })
            })
            .collect();
        scope.spawn(|| {
            let store = bench.store();
            while !done.load(Ordering::Relaxed) {
                let swept = sweep(&store, &greedy(), &mut || {}).unwrap();
                removed.fetch_add(swept.removals.len() as u64, Ordering::Relaxed);
            }
        });
        let ended: Vec<_> = runs.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
        done.store(true, Ordering::Relaxed);
        assert!(ended.into_iter().all(|e| e.is_ok()));
    });
    assert!(removed.into_inner() > 0);
    all_whole(&bench.store());
}

#[test]
fn what_vanishes_in_spite_of_all_is_a_failed_step_or_a_miss_never_a_wrong_result() {
    let bench = Bench::new();
    bench.run(&steps("p", "one"));
    let changed = steps("p", "one").replace("\"!\"", "\"?\"");
    let (plan, session) = (bench.plan(&changed), bench.session());
    // After the look-up of `a`, before `b` reads it: on a file system without locks.
    let mut failed = String::new();
    let outcome = engine::run(&plan, &session, &mut |event| match event {
        RunEvent::Hit { .. } => {
            std::fs::remove_dir_all(bench.path("store/objects")).unwrap();
            std::fs::remove_dir_all(bench.path("store/trees")).unwrap();
        }
        RunEvent::Failed { message, .. } => failed.clone_from(message),
        _ => {}
    });
    assert_eq!(outcome.unwrap().status, Status::Failed);
    assert!(!failed.is_empty());
    let run = bench.run(&changed);
    assert_eq!(run.ran(), ["a", "b"]);
    assert!(run.why("a").contains("its output is lost: x: tree"), "{}", run.why("a"));
    assert_eq!(bench.text("b", "x"), "ONE?");
}

#[test]
fn checkpoints_stay_until_they_are_old_and_nothing_names_them() {
    let bench = Bench::new();
    let store = bench.store();
    let run = bench.run(&steps("p", "one"));
    let failing = bench.run("name: p\nsteps:\n  bad: { kind: wrong, with: { way: error } }\n");
    let (finished, failed) = (key_of(&bench, &run, "b"), key_of(&bench, &failing, "bad"));
    let unknown = Digest::of(b"unknown");
    for key in [finished, failed, unknown] {
        let made = bench.path("made");
        std::fs::create_dir(&made).unwrap();
        std::fs::write(made.join("state"), "state").unwrap();
        store.keep_checkpoint(&key, "build", &made).unwrap();
    }
    let at = |days: u64, budget: Budget| Budget {
        now_unix_ms: budget.now_unix_ms + days * DAY_MS,
        ..budget
    };
    let has = |key| store.checkpoint(key).unwrap().is_some();
    collect(&store, &Budget::none());
    assert!(has(&finished) && has(&failed) && has(&unknown), "all are young");
    let lease = store.lease(&finished.to_string(), &run.outcome.run).unwrap();
    collect(&store, &at(1, Budget::none()));
    assert!(has(&finished) && has(&failed) && !has(&unknown), "an attempt is under way");
    drop(lease);
    collect(&store, &at(1, Budget::none()));
    assert!(!has(&finished) && has(&failed), "a run names the key of the one that failed");
    let month = Some(Duration::from_secs(30 * 86_400));
    collect(&store, &at(20, Budget { older_than: month, ..greedy() }));
    assert!(has(&failed));
    collect(&store, &at(31, Budget { older_than: month, ..greedy() }));
    assert!(!has(&failed));
}

#[test]
fn other_results_of_a_key_stay_with_the_run_that_made_them() {
    let mut bench = Bench::new();
    let store = bench.store();
    let dice = "name: p\nsteps:\n  dice: { kind: wrong, with: { way: random } }\n";
    bench.run(dice);
    bench.options.force = vec!["dice".into()];
    bench.run(dice);
    bench.options.force.clear();
    bench.run(dice);
    assert_eq!(store.by_digest("objects").unwrap().len(), 2);
    assert_eq!(
        collect(&store, &strict()).removals.iter().filter(|r| r.class <= Class::Object).count(),
        0
    );
    let done = collect(&store, &Budget { keep_runs: Some(1), ..strict() });
    assert_eq!((count(&done, Class::Object), count(&done, Class::Record)), (1, 0));
    assert_eq!(bench.run(dice).outcome.hits, 1);
    assert_eq!(Record::differences(&store, &Record::all(&store).unwrap()[0].key).unwrap().len(), 1);
}

/// A store with something of every class that goes.
fn cluttered() -> Bench {
    let bench = Bench::new();
    for text in ["one", "two", "three"] {
        bench.run(&steps("p", text));
    }
    std::fs::write(bench.path("in.txt"), "text").unwrap();
    bench.run("name: r\nsteps:\n  t: { kind: take, with: { file: in.txt, refer: true } }\n");
    std::fs::create_dir_all(bench.path("store/quarantine")).unwrap();
    std::fs::write(bench.path("store/quarantine/damaged"), "x").unwrap();
    std::fs::write(bench.path("store/tmp/half"), "x").unwrap();
    std::fs::create_dir_all(bench.path("store/attempts/20200101-000000-0000.abcd-1/out")).unwrap();
    bench
}

/// A bench with a store of the same content.
fn copy_of(bench: &Bench) -> Bench {
    fn copy(from: &Path, to: &Path) {
        std::fs::create_dir(to).unwrap();
        for entry in std::fs::read_dir(from).unwrap() {
            let from = entry.unwrap().path();
            let to = to.join(from.file_name().unwrap());
            if from.is_dir() { copy(&from, &to) } else { _ = std::fs::copy(&from, &to).unwrap() }
        }
    }
    let other = Bench::new();
    copy(&bench.path("store"), &other.path("store"));
    other
}

#[test]
fn a_full_disk_at_every_call_leaves_a_store_that_can_be_used() {
    let budget = || {
        let now_unix_ms = Budget::none().now_unix_ms + DAY_MS;
        let older_than = Some(Duration::ZERO);
        Budget { keep_runs: Some(0), older_than, now_unix_ms, ..Budget::none() }
    };
    let counted = Faults::at(0);
    let sound = cluttered();
    let copy = copy_of(&sound);
    let store = Store::open_on(&copy.path("store"), Disk::faulty(counted.clone())).unwrap();
    let done = sweep(&store, &budget(), &mut || {}).unwrap();
    let classes: BTreeSet<Class> = done.removals.iter().map(|r| r.class).collect();
    assert_eq!(classes.len(), 9, "{classes:?}");
    let calls = counted.calls();
    assert!(calls > 20, "{calls}");
    at_every_call(calls, |n| {
        let bench = copy_of(&sound);
        let disk = Disk::faulty(Faults::at(n));
        let store = Store::open_on(&bench.path("store"), disk).unwrap();
        assert!(sweep(&store, &budget(), &mut || {}).is_err(), "call {n} of {calls}");
        all_whole(&store);
        let run = bench.run(&steps("p", "two"));
        assert_eq!(run.outcome.status, Status::Done, "call {n}");
        assert_eq!(text_of(&bench, &run, "b"), "TWO!", "call {n}");
        collect(&bench.store(), &budget());
        assert!(Record::all(&store).unwrap().is_empty(), "call {n}");
    });
}

#[test]
fn a_verification_finds_every_flipped_byte_and_the_next_run_heals() {
    let bench = Bench::new();
    let store = bench.store();
    std::fs::write(bench.path("in.txt"), "text").unwrap();
    let text = steps("p", "one") + "  t: { kind: take, with: { file: in.txt, refer: true } }\n";
    let run = bench.run(&text);
    let done = AtomicU64::new(0);
    let sound = verify(&store, None, &|now, all| {
        assert!(now <= all);
        done.fetch_max(now, Ordering::Relaxed);
    });
    let sound = sound.unwrap();
    assert_eq!((sound.records, sound.trees, sound.blobs, sound.bytes), (3, 3, 3, 3 + 4 + 4));
    assert_eq!((sound.findings.len(), sound.lost.len(), done.into_inner()), (0, 0, 11));
    let (a, b) = (key_of(&bench, &run, "a"), key_of(&bench, &run, "b"));
    // Same size, and the stat table says that it was read: only reading tells.
    damage(&object_of(&store, &b), "0NE!");
    let tree = Record::all(&store).unwrap().into_iter().find(|r| r.key == a).unwrap().ports["x"];
    let hex = tree.to_string();
    let manifest = bench.path("store/trees").join(&hex[..2]).join(&hex[2..]);
    let torn = std::fs::read_to_string(&manifest).unwrap();
    damage(&manifest, &torn.replace("\"size\": 3", "\"size\": 4"));
    let t = key_of(&bench, &run, "t");
    let record = Record::path(&store, &t);
    let other = std::fs::read_to_string(&record).unwrap();
    damage(&record, &other.replacen("\"attempt\": 1", "\"attempt\": 2", 1));
    // Only what was asked for.
    let one = verify(&store, Some(&BTreeSet::from([b])), &|_, _| {}).unwrap();
    assert_eq!((one.findings.len(), one.findings[0].part, one.lost.len()), (1, Part::Blob, 1));
    assert!(one.findings[0].damaged && one.lost[0].step.as_deref() == Some("b"));
    let all = verify(&store, None, &|_, _| {}).unwrap();
    let parts: Vec<(Part, bool)> = all.findings.iter().map(|f| (f.part, f.damaged)).collect();
    assert_eq!(parts, [(Part::Record, true), (Part::Tree, true), (Part::Blob, false)]);
    let mut lost: Vec<_> = all.lost.iter().filter_map(|l| l.step.as_deref()).collect();
    lost.sort_unstable();
    assert_eq!(lost, ["a", "b", "t"]);
    assert_eq!(std::fs::read_dir(bench.path("store/quarantine")).unwrap().count(), 3);
    assert_eq!(bench.run(&text).ran(), ["a", "b", "t"]);
    assert_eq!(bench.text("b", "x"), "ONE!");
    let healed = verify(&store, None, &|_, _| {}).unwrap();
    assert_eq!(healed.findings, []);
    // A file outside that has other bytes now is a result that is lost.
    std::fs::write(bench.path("in.txt"), "else").unwrap();
    let moved = verify(&store, None, &|_, _| {}).unwrap();
    assert_eq!((moved.findings.len(), moved.findings[0].damaged), (1, false));
    assert!(moved.findings[0].reason.contains("in.txt"), "{:?}", moved.findings);
    assert_eq!(moved.lost[0].step.as_deref(), Some("t"));
}

#[test]
fn a_damaged_record_keeps_what_it_names() {
    let bench = Bench::new();
    let store = bench.store();
    let run = bench.run(&steps("p", "one"));
    let path = Record::path(&store, &key_of(&bench, &run, "b"));
    let text = std::fs::read_to_string(&path).unwrap();
    damage(&path, &text.replacen("\"attempt\": 1", "\"attempt\": 2", 1));
    let done = collect(&store, &greedy());
    assert_eq!((done.damaged_records, count(&done, Class::Record)), (1, 1));
    assert_eq!(store.by_digest("objects").unwrap().len(), 1);
}

//! Disks that refuse at any call, stores that are damaged or odd, clocks that are wrong.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Result;
use flow::artifact::Type;
use flow::digest::Digest;
use flow::engine::{self, Prospect};
use flow::lineage::{Record, State, Status};
use flow::source::advice;
use flow::step::{Context, Ports, StepKind};
use flow::store::{Disk, Entry, Faults, Store, StoreError, Tree};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::toys::{Bench, at_every_call};

/// Climbs level by level, keeps a checkpoint on each, and notes each in a file.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Climb {
    to: u64,
    diary: PathBuf,
    /// Panics when it is there.
    #[serde(default)]
    fall_at: Option<u64>,
}

impl StepKind for Climb {
    const NAME: &'static str = "climb";
    const VERSION: u32 = 1;
    fn ports(&self) -> Ports {
        Ports::named(Type::Files, ["top"])
    }
    fn isolate(&self) -> bool {
        false
    }
    fn run(&self, cx: &mut Context<'_>) -> Result<()> {
        let from = cx.resume().and_then(|dir| std::fs::read_to_string(dir.join("level")).ok());
        let from = from.and_then(|text| text.parse().ok()).unwrap_or(0);
        for level in from + 1..=self.to {
            let mut diary = std::fs::File::options().append(true).create(true).open(&self.diary)?;
            writeln!(diary, "{level}")?;
            assert_ne!(self.fall_at, Some(level), "fell");
            let dir = cx.scratch_dir()?.join(level.to_string());
            std::fs::create_dir(&dir)?;
            std::fs::write(dir.join("level"), level.to_string())?;
            cx.checkpoint(&dir)?;
        }
        std::fs::write(cx.out_dir("top")?.join("text"), self.to.to_string())?;
        Ok(())
    }
}

const LEVELS: u64 = 3;

fn climb(bench: &Bench) -> String {
    let diary = bench.path("diary").display().to_string();
    format!(
        "steps:\n  a: {{ kind: climb, with: {{ to: {LEVELS}, diary: '{diary}' }} }}\n  \
         b: {{ kind: upper, with: {{ data: \"${{steps.a}}\" }} }}\n\
         outputs: {{ top: \"${{steps.b}}\" }}\n"
    )
}

fn diary(bench: &Bench) -> Vec<u64> {
    let text = std::fs::read_to_string(bench.path("diary")).unwrap_or_default();
    text.lines().map(|l| l.parse().unwrap()).collect()
}

type AllPorts = BTreeMap<&'static str, BTreeMap<String, Digest>>;

fn all_ports(bench: &Bench) -> AllPorts {
    ["a", "b"].into_iter().map(|id| (id, bench.ports(id))).collect()
}

#[test]
fn a_checkpoint_outlives_a_disk_that_refuses_at_any_call() {
    let sound = Bench::new();
    let count = Faults::at(0);
    let session = sound.session_on(Disk::faulty(count.clone())).unwrap();
    sound.run_in(&session, &climb(&sound)).unwrap();
    assert_eq!(diary(&sound), [1, 2, 3]);
    let (calls, expected) = (count.calls(), all_ports(&sound));
    at_every_call(calls, |n| {
        // Full for a moment, and full until somebody makes room.
        refuse(Faults::at(n), n, &expected);
        refuse(Faults::from(n), n, &expected);
    });
}

fn refuse(faults: Arc<Faults>, n: u64, expected: &AllPorts) {
    let bench = Bench::new();
    let steps = climb(&bench);
    let session = bench.session_on(Disk::faulty(faults));
    // Whether it failed, and how, `durable` asks of every call.
    let _ = session.and_then(|session| bench.run_in(&session, &steps));
    let store = bench.store();
    let stood = Record::all(&store).unwrap();
    for record in &stood {
        for tree in record.ports.values() {
            assert_eq!(store.missing(tree).unwrap(), None, "call {n}");
        }
    }
    let run = bench.run(&steps);
    assert_eq!(run.outcome.status, Status::Done, "call {n}");
    for record in stood {
        assert!(run.in_state(State::Hit).contains(&record.made.step.as_str()), "call {n}");
    }
    assert_eq!(all_ports(&bench), *expected, "call {n}");
    let levels = diary(&bench);
    assert!(levels.len() as u64 <= LEVELS + 1, "call {n}: one level at most twice, {levels:?}");
    let last = bench.run(&steps);
    assert_eq!((last.outcome.hits, last.outcome.ran), (2, 0), "call {n}");
}

#[test]
fn a_damaged_checkpoint_is_no_obstacle() {
    let bench = Bench::new();
    let (steps, falling) = (climb(&bench), climb(&bench).replace("to: 3", "fall_at: 3, to: 3"));
    let fall = || assert!(bench.run(&falling).failure("a").contains("fell"));
    fall();
    fall();
    assert_eq!(diary(&bench), [1, 2, 3, 3], "it goes on where it was");
    let key = std::fs::read_dir(bench.path("store/checkpoints")).unwrap().next().unwrap().unwrap();
    let newest = key.path().join("1");
    assert!(newest.is_dir());
    // What is left if a process dies while it removes one.
    std::fs::remove_file(newest.join("build")).unwrap();
    fall();
    assert_eq!(diary(&bench)[4..], [1, 2, 3], "it starts over");
    std::fs::write(key.path().join("3/build"), "another").unwrap();
    fall();
    assert_eq!(diary(&bench)[7..], [1, 2, 3]);
    assert_eq!(bench.run(&steps).ran(), ["a", "b"]);
}

/// All files of a folder with their content.
fn contents(dir: &Path, out: &mut BTreeMap<PathBuf, Vec<u8>>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            contents(&path, out);
        } else {
            out.insert(path.clone(), std::fs::read(&path).unwrap());
        }
    }
}

#[test]
fn a_store_that_may_only_be_read_is_read() {
    let read_only = || Disk::faulty(Faults::read_only());
    let refused = |error: &anyhow::Error| {
        let refused = error.chain().find_map(|e| e.downcast_ref::<StoreError>());
        assert!(matches!(refused, Some(StoreError::ReadOnly { .. })), "{error:?}");
        assert!(error.chain().any(|e| e.to_string().contains("cannot be written")), "{error:?}");
    };
    let bench = Bench::new();
    refused(&bench.session_on(read_only()).err().unwrap());
    let steps = climb(&bench);
    bench.run(&steps);
    let state = || {
        let mut all = BTreeMap::new();
        for folder in ["objects", "trees", "records", "origins"] {
            contents(&bench.path("store").join(folder), &mut all);
        }
        all
    };
    let before = state();
    let session = bench.session_on(read_only()).unwrap();
    let forecast = engine::forecast(&bench.plan(&steps), &session).unwrap();
    assert!(forecast.iter().all(|f| matches!(f.prospect, Prospect::Cached { .. })));
    refused(&bench.run_in(&session, &steps).err().unwrap());
    let other = steps.replace("to: 3", "to: 2");
    refused(&bench.run_in(&session, &other).err().unwrap());
    assert_eq!(state(), before);
    assert_eq!(bench.run(&steps).outcome.hits, 2);
}

#[test]
fn a_clock_that_was_wrong_changes_no_decision() {
    let bench = Bench::new();
    let take = "steps:\n  t: { kind: take, with: { file: in.txt } }\n";
    let file = bench.path("in.txt");
    let future = SystemTime::now() + Duration::from_secs(86_400);
    let write = |text: &str| {
        std::fs::write(&file, text).unwrap();
        std::fs::File::options().append(true).open(&file).unwrap().set_modified(future).unwrap();
    };
    write("one");
    bench.run(take);
    // As a machine whose clock runs ahead would have written it.
    let store = bench.store();
    let mut record = Record::all(&store).unwrap().remove(0);
    record.made.started_unix_ms = u64::MAX / 2;
    std::fs::remove_file(Record::path(&store, &record.key)).unwrap();
    record.write(&store, false).unwrap();
    assert_eq!(bench.run(take).outcome.hits, 1);
    // Times that lie ahead of the clock are never trusted: the same size and time, other bytes.
    write("two");
    let run = bench.run(take);
    assert_eq!(run.ran(), ["t"]);
    assert!(run.why("t").starts_with("input file changed"), "{}", run.why("t"));
    write("one");
    assert_eq!(bench.run(take).outcome.hits, 1);
    // A holder from the future has held for no time.
    let _lease = store.try_lease("x", "run").unwrap().unwrap();
    let holder = std::fs::read_to_string(bench.path("store/leases/x")).unwrap();
    let since = holder.split("since_unix_ms\":").nth(1).unwrap().trim_end_matches('}');
    let ahead = holder.replace(since, &(u64::MAX / 2).to_string());
    std::fs::write(bench.path("store/leases/x"), ahead).unwrap();
    assert!(store.holder("x").unwrap().to_string().ends_with("for 0 s"));
}

#[test]
fn names_that_differ_by_case_only_are_two_files() {
    let bench = Bench::new();
    let store = bench.store();
    let entry = |path: &str, text: &str| Entry {
        path: path.into(),
        digest: Digest::of(text.as_bytes()),
        size: text.len() as u64,
        executable: false,
    };
    let names: Vec<Entry> = vec![entry("Readme", "one"), entry("README", "two")];
    assert_eq!(Tree::new(names).unwrap().entries.len(), 2);
    // To a file system that takes them for one, the second's name is taken: nothing is lost.
    std::fs::create_dir(bench.path("made")).unwrap();
    std::fs::write(bench.path("made/readme"), "one").unwrap();
    let tree = store.publish_tree(&bench.path("made")).unwrap();
    let to = bench.path("laid");
    store.materialise(&tree, &to).unwrap();
    std::fs::write(to.join("readme"), "theirs").unwrap();
    for error in [store.materialise(&tree, &to).unwrap_err(), store.stage(&tree, &to).unwrap_err()]
    {
        assert!(error.to_string().contains("readme is there already"), "{error:?}");
        assert!(advice(&error).iter().any(|a| a.contains("upper and lower case")), "{error:?}");
    }
    assert_eq!(std::fs::read_to_string(to.join("readme")).unwrap(), "theirs");
}

#[test]
fn what_a_run_that_died_left_among_the_outputs_goes() {
    let bench = Bench::new();
    let steps = "steps:\n  a: { kind: emit, with: { texts: { t: \"1\" } } }\n\
                 outputs: { t: \"${steps.a}\", t.new: \"${steps.a}\" }\n";
    bench.run(steps);
    let dir = bench.path("outputs/toy");
    for name in [".t.new-1-2-3", ".t.old-1-2-3", ".t.mine", ".u.new-1-2-3"] {
        std::fs::create_dir_all(dir.join(name).join("x")).unwrap();
    }
    bench.run(&steps.replace("\"1\"", "\"2\""));
    let names = std::fs::read_dir(&dir).unwrap();
    let names: BTreeSet<_> =
        names.map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
    assert_eq!(names.into_iter().collect::<Vec<_>>(), [".t.mine", ".u.new-1-2-3", "t", "t.new"]);
}

#[test]
fn a_worker_that_outlives_its_runner_keeps_its_folder() {
    let bench = Bench::new();
    let store: Store = bench.store();
    let attempts = bench.path("store/attempts");
    let key = |text: &str| Digest::of(text.as_bytes());
    for text in ["held", "free"] {
        let name = format!("20200101-000000-0000.{}-1-2-3", key(text).short());
        std::fs::create_dir_all(attempts.join(name)).unwrap();
    }
    let lease = store.try_lease(&key("held").to_string(), "20200101-000000-0000").unwrap();
    let left = || {
        bench.run(&climb(&bench));
        std::fs::read_dir(&attempts).unwrap().map(|e| e.unwrap().path()).collect::<Vec<_>>()
    };
    let left_while_held = left();
    assert_eq!(left_while_held.len(), 1);
    assert!(left_while_held[0].to_string_lossy().contains(&key("held").short()));
    drop(lease);
    assert_eq!(left().len(), 0);
}

//! What a crash, a full disk, an edit or another run cannot break.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use flow::digest::Digest;
use flow::engine::{self, RunEvent};
use flow::lineage::{Record, Runs, State, Status};
use flow::store::{Disk, Faults, Store, StoreError};

use super::toys::{Bench, Ran, at_every_call};

const STEPS: &str = r#"
steps:
  a: { kind: emit, with: { texts: { train: "one", test: "two" } } }
  p: { kind: pin, with: { url: "u" } }
  b: { kind: upper, with: { data: "${steps.a}" } }
outputs: { result: "${steps.b}", one: "${steps.a.train}" }
"#;

fn all_ports(bench: &Bench) -> BTreeMap<String, BTreeMap<String, Digest>> {
    ["a", "p", "b"].into_iter().map(|id| (id.to_owned(), bench.ports(id))).collect()
}

fn files(dir: &Path, out: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() { files(&path, out) } else { out.push(path) }
    }
}

#[test]
fn a_full_disk_at_every_call_leaves_nothing_wrong_behind() {
    let sound = Bench::new();
    let count = Faults::at(0);
    let session = sound.session_on(Disk::faulty(count.clone())).unwrap();
    sound.run_in(&session, STEPS).unwrap();
    let (calls, expected) = (count.calls(), all_ports(&sound));
    let failed = AtomicU64::new(0);
    at_every_call(calls, |n| {
        failed.fetch_add(u64::from(fail_at(n, &expected)), Ordering::Relaxed);
    });
    // The last calls of a run lay out its outputs and tidy up: some of those may fail unseen.
    let failed = failed.into_inner();
    assert!(failed * 10 > calls * 8, "{failed} of {calls} calls failed");
}

/// Fills the disk at the `n`th call, looks at what is left, and runs again; whether it failed.
fn fail_at(n: u64, expected: &BTreeMap<String, BTreeMap<String, Digest>>) -> bool {
    let bench = Bench::new();
    let session = bench.session_on(Disk::faulty(Faults::at(n)));
    let failed = match session.and_then(|session| bench.run_in(&session, STEPS)) {
        Ok(run) => {
            let failed = run.outcome.status != Status::Done;
            assert_eq!(run.outcome.store_failed, failed, "call {n}: {:?}", run.outcome);
            failed
        }
        Err(e) => {
            let refused = e.chain().find_map(|e| e.downcast_ref::<StoreError>());
            assert!(matches!(refused, Some(StoreError::Full { .. })), "call {n}: {e:?}");
            true
        }
    };
    // Every record that stands is whole and its outputs are there.
    let store = bench.store();
    for record in Record::all(&store).unwrap() {
        for tree in record.ports.values() {
            assert_eq!(store.missing(tree).unwrap(), None, "call {n}");
        }
    }
    assert_eq!(bench.run(STEPS).outcome.status, Status::Done, "call {n}");
    assert_eq!(all_ports(&bench), *expected, "call {n}");
    let text = bench.path("outputs/toy/result/train/text");
    assert_eq!(std::fs::read_to_string(text).unwrap(), "ONE", "call {n}");
    failed
}

#[test]
fn a_torn_record_and_a_lost_or_cut_object_are_misses_with_a_reason() {
    let bench = Bench::new();
    bench.run(STEPS);
    let before = all_ports(&bench);
    let store = bench.store();
    let record =
        |id: &str| Record::all(&store).unwrap().into_iter().find(|r| r.made.step == id).unwrap();
    // Torn in the middle.
    let path = Record::path(&store, &record("a").key);
    let text = std::fs::read(&path).unwrap();
    std::fs::write(&path, &text[..text.len() / 2]).unwrap();
    let run = bench.run(STEPS);
    assert_eq!(run.ran(), ["a"]);
    assert!(run.why("a").starts_with("its record is damaged"), "{}", run.why("a"));
    // A flipped digit that still parses.
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replacen("\"threads\": 1", "\"threads\": 2", 1)).unwrap();
    assert!(bench.run(STEPS).why("a").contains("not what its seal says"));
    // A lost object.
    let tree = store.tree(&record("b").ports["train"]).unwrap().unwrap();
    let object = store.locate(&tree.entries[0].digest).unwrap().unwrap();
    std::fs::remove_file(&object).unwrap();
    let run = bench.run(STEPS);
    assert_eq!(run.ran(), ["b"]);
    assert!(run.why("b").contains("train: `text` (") && run.why("b").contains("gone"));
    // A cut one is set aside, not deleted.
    std::fs::remove_file(&object).unwrap();
    std::fs::write(&object, "O").unwrap();
    assert_eq!(bench.run(STEPS).ran(), ["b"]);
    let mut quarantined = Vec::new();
    files(&bench.path("store/quarantine"), &mut quarantined);
    assert_eq!(quarantined.len(), 1);
    // Damage of the same size is found by reading.
    std::fs::remove_file(&object).unwrap();
    std::fs::write(&object, "0NE").unwrap();
    assert!(!store.verify(&tree.entries[0].digest).unwrap());
    assert_eq!(bench.run(STEPS).ran(), ["b"]);
    assert_eq!(all_ports(&bench), before);
}

#[test]
fn a_damaged_object_of_the_same_size_is_never_read() {
    let mut bench = Bench::new();
    bench.run(STEPS);
    let store = bench.store();
    let tree = store.tree(&bench.ports("a")["train"]).unwrap().unwrap();
    let object = store.locate(&tree.entries[0].digest).unwrap().unwrap();
    std::fs::remove_file(&object).unwrap();
    std::fs::write(&object, "0ne").unwrap();
    let steps =
        STEPS.replace("{ data: \"${steps.a}\" }", "{ data: \"${steps.a}\", suffix: \"!\" }");
    let said = bench.run(&steps).failure("b");
    assert!(said.contains("damaged") && said.contains("run again"), "{said}");
    let run = bench.run(&steps);
    assert_eq!(run.ran(), ["a", "b"]);
    assert_eq!(bench.text("b", "train"), "ONE!");
    // A step that makes the same bytes again puts a sound object in a damaged one's place.
    std::fs::remove_file(&object).unwrap();
    std::fs::write(&object, "0ne").unwrap();
    bench.options.force = vec!["a".into()];
    bench.run(&steps);
    assert_eq!(std::fs::read_to_string(&object).unwrap(), "one");
}

#[test]
fn folders_of_dead_runs_are_swept() {
    let bench = Bench::new();
    let attempts = bench.path("store/attempts");
    for name in ["20200101-000000-0000.abcd-1", "kept-20200101-000000-0000.abcd-2"] {
        std::fs::create_dir_all(attempts.join(name).join("out")).unwrap();
    }
    bench.run(STEPS);
    let left: Vec<_> = std::fs::read_dir(&attempts).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(left, [attempts.join("kept-20200101-000000-0000.abcd-2")]);
}

#[test]
fn a_run_of_another_host_keeps_its_folders_while_it_may_be_alive() {
    let bench = Bench::new();
    let first = bench.run(STEPS).outcome.run;
    let (run, folder) = (bench.path("store/runs/20200101-000000-0000"), "20200101-000000-0000.a-1");
    std::fs::create_dir(&run).unwrap();
    let info =
        std::fs::read_to_string(bench.path(&format!("store/runs/{first}/run.json"))).unwrap();
    let mut info: serde_json::Value = serde_json::from_str(&info).unwrap();
    info["id"] = "20200101-000000-0000".into();
    info["host"] = "elsewhere".into();
    std::fs::write(run.join("run.json"), info.to_string()).unwrap();
    std::fs::write(run.join("events.jsonl"), "").unwrap();
    let folder = bench.path("store/attempts").join(folder);
    std::fs::create_dir(&folder).unwrap();
    bench.run(STEPS);
    assert!(folder.is_dir());
    let long_ago = std::time::SystemTime::now() - std::time::Duration::from_secs(48 * 3600);
    let events = std::fs::File::options().append(true).open(run.join("events.jsonl")).unwrap();
    events.set_modified(long_ago).unwrap();
    bench.run(STEPS);
    assert!(!folder.exists());
}

#[test]
fn runs_at_once_publish_one_after_the_other() {
    let bench = Bench::new();
    let publish = |n: usize| {
        let steps = "steps:\n  a: { kind: emit, with: { texts: { t: \"TEXT\" } } }\n\
                     outputs: { t: \"${steps.a}\" }\n";
        let run = bench.run(&steps.replace("TEXT", &n.to_string()));
        let kept = |e: &RunEvent| matches!(e, RunEvent::OutputPublished { kept: Some(_), .. });
        assert!(!run.events.iter().any(kept), "nobody edited anything");
    };
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let publish = &publish;
            scope.spawn(move || (0..8).for_each(|n| publish(10 * thread + n)));
        }
    });
}

#[test]
fn a_lost_result_that_comes_back_different_is_replaced_and_noted() {
    let bench = Bench::new();
    let steps = "steps:\n  dice: { kind: wrong, with: { way: random } }\n";
    bench.run(steps);
    let first = bench.ports("dice");
    std::fs::remove_dir_all(bench.path("store/objects")).unwrap();
    assert_eq!(bench.run(steps).ran(), ["dice"]);
    assert_ne!(bench.ports("dice"), first);
    assert_eq!(bench.run(steps).outcome.hits, 1);
    let store = bench.store();
    let key = Record::all(&store).unwrap()[0].key;
    assert_eq!(Record::differences(&store, &key).unwrap()[0].ports, first);
}

#[test]
fn objects_are_read_only() {
    let bench = Bench::new();
    bench.run(STEPS);
    let mut objects = Vec::new();
    files(&bench.path("store/objects"), &mut objects);
    assert_eq!(objects.len(), 5);
    for object in objects {
        assert!(std::fs::metadata(object).unwrap().permissions().readonly());
    }
}

fn take(more: &str) -> String {
    format!("steps:\n  t: {{ kind: take, with: {{ file: in.txt{more} }} }}\n")
}

#[test]
fn an_input_that_is_edited_meanwhile_is_not_published() {
    let bench = Bench::new();
    std::fs::write(bench.path("in.txt"), "before").unwrap();
    let run = bench.run(&take(", meddle: true"));
    let said = run.failure("t");
    assert!(said.contains("in.txt changed while the step ran"), "{said}");
    assert!(Record::all(&bench.store()).unwrap().is_empty());
    let kept: Vec<_> = std::fs::read_dir(bench.path("store/attempts")).unwrap().collect();
    assert_eq!(kept.len(), 1, "it is kept for inspection");
    std::fs::write(bench.path("in.txt"), "after").unwrap();
    assert_eq!(bench.run(&take("")).ran(), ["t"]);
    assert_eq!(bench.text("t", "file"), "after");
}

#[test]
fn a_file_is_its_content_not_its_path_or_time() {
    let bench = Bench::new();
    std::fs::write(bench.path("in.txt"), "text").unwrap();
    bench.run(&take(""));
    std::fs::write(bench.path("in.txt"), "text").unwrap();
    assert_eq!(bench.run(&take("")).outcome.hits, 1);
    std::fs::write(bench.path("in.txt"), "other").unwrap();
    let run = bench.run(&take(""));
    assert!(run.why("t").starts_with("input file changed; 1 of"), "{}", run.why("t"));
}

#[test]
fn a_folder_around_the_store_is_no_input() {
    let bench = Bench::new();
    let error = bench.try_run(&take("").replace("in.txt", ".")).map(|_| ()).unwrap_err();
    let said = format!("{error:#}");
    assert!(said.contains("holds the store"), "{said}");
}

#[test]
fn a_referenced_file_counts_only_while_it_has_its_bytes() {
    let bench = Bench::new();
    std::fs::write(bench.path("in.txt"), "text").unwrap();
    let steps = take(", refer: true") + "  u: { kind: upper, with: { data: \"${steps.t}\" } }\n";
    // `upper` reads `text` of every port.
    assert_eq!(bench.run(&steps).ran(), ["t", "u"]);
    let mut objects = Vec::new();
    files(&bench.path("store/objects"), &mut objects);
    assert_eq!(objects.len(), 1, "only what `upper` made is copied");
    assert_eq!(bench.run(&steps).outcome.hits, 2);
    // Moved, and the same content elsewhere: found at the new place after one run.
    std::fs::create_dir(bench.path("sub")).unwrap();
    std::fs::rename(bench.path("in.txt"), bench.path("sub/in.txt")).unwrap();
    let run = bench.run(&steps.replace("in.txt", "sub/in.txt"));
    assert_eq!(run.ran(), ["t"]);
    assert!(run.why("t").contains("no longer where it was referenced"), "{}", run.why("t"));
}

fn count_ran(runs: &[Ran]) -> usize {
    runs.iter().map(|r| r.outcome.ran).sum()
}

#[test]
fn runs_at_once_do_each_step_once() {
    let steps = r#"
sweep: { grid: { n: ["1", "2", "3"] } }
steps:
  base: { kind: nap, with: { ms: 60, name: base } }
  x: { kind: nap, with: { ms: 40, name: "${sweep.n}", after: ["${steps.base}"] } }
"#;
    let bench = Bench::new();
    let runs: Vec<Ran> = std::thread::scope(|scope| {
        let handles: Vec<_> = (0..3).map(|_| scope.spawn(|| bench.run(steps))).collect();
        handles.into_iter().map(|h| h.join().unwrap()).collect()
    });
    assert_eq!(count_ran(&runs), 4, "4 instances, each once");
    assert_eq!(runs.iter().map(|r| r.outcome.hits).sum::<usize>(), 8);
    let waited = runs.iter().flat_map(|r| &r.events).find_map(|e| match e {
        RunEvent::Waiting { holder, .. } => Some(holder.clone()),
        _ => None,
    });
    let waited = waited.expect("somebody waits");
    assert!(waited.starts_with("run 20") && waited.contains("pid"), "{waited}");
}

#[test]
fn a_run_that_died_is_told_from_one_that_runs() {
    let bench = Bench::new();
    let steps = "steps:\n  x: { kind: nap, with: { ms: 1 } }\n";
    let mut while_running = None;
    let (plan, session) = (bench.plan(steps), bench.session());
    let outcome = engine::run(&plan, &session, &mut |event| {
        if let RunEvent::RunStarted { run, .. } = event {
            while_running = Some(Runs::of(&session.store).find(run).unwrap().status);
        }
    });
    let run = outcome.unwrap().run;
    assert_eq!(while_running, Some(Status::Running));
    std::fs::remove_file(bench.path("store/runs").join(&run).join("summary.json")).unwrap();
    assert_eq!(Runs::of(&bench.store()).find("latest").unwrap().status, Status::Died);
}

#[test]
fn a_store_can_be_moved() {
    let bench = Bench::new();
    bench.run(STEPS);
    std::fs::rename(bench.path("store"), bench.path("moved")).unwrap();
    let mut session = bench.session();
    session.store = Store::open(&bench.path("moved")).unwrap();
    let run = bench.run_in(&session, STEPS).unwrap();
    assert_eq!(run.in_state(State::Hit), ["a", "b", "p"]);
}

#[test]
fn trees_hold_only_safe_paths() {
    use flow::store::{Entry, Tree};
    let entry = |path: &str| Entry {
        path: path.into(),
        digest: Digest::of(b""),
        size: 0,
        executable: false,
    };
    for bad in ["", "/a", "../a", "a/../b", "a//b", "./a", "a/", "a\0b", "a\\b"] {
        assert!(Tree::new(vec![entry(bad)]).is_err(), "{bad:?}");
    }
    assert!(Tree::new(vec![entry("a"), entry("a")]).is_err());
    assert!(Tree::new(vec![entry("a"), entry("a/b")]).is_err());
    assert!(Tree::new(vec![entry("b"), entry("a/b"), entry("a-b")]).is_ok());
}

#[test]
fn a_link_out_of_an_output_is_refused_and_one_inside_is_followed() {
    let bench = Bench::new();
    let store = bench.store();
    let dir = bench.path("store/attempts/x/out/port");
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("real"), "bytes").unwrap();
    std::os::unix::fs::symlink("real", dir.join("link")).unwrap();
    let tree = store.tree(&store.publish_tree(&dir).unwrap()).unwrap().unwrap();
    assert_eq!(tree.entries.len(), 2);
    assert_eq!(tree.entries[0].digest, tree.entries[1].digest);
    assert!(store.verify(&tree.entries[0].digest).unwrap());
    std::fs::write(bench.path("secret"), "not an output").unwrap();
    std::os::unix::fs::symlink(bench.path("secret"), dir.join("out")).unwrap();
    assert!(store.publish_tree(&dir).unwrap_err().to_string().contains("leads out"));
}

#[test]
fn a_published_tree_can_be_laid_out_again() {
    let bench = Bench::new();
    let store = bench.store();
    let dir = bench.path("made");
    std::fs::create_dir_all(dir.join("sub")).unwrap();
    std::fs::write(dir.join("sub/script"), "#!/bin/sh\n").unwrap();
    std::fs::write(dir.join("empty"), "").unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(dir.join("sub/script"), mode).unwrap();
    let digest = store.publish_tree(&dir).unwrap();
    assert!(dir.join("empty").exists(), "a directory that is not an attempt's is copied");
    store.materialise(&digest, &bench.path("copy")).unwrap();
    let again = store.tree_of_path(&bench.path("copy")).unwrap();
    assert_eq!(again.digest().unwrap(), digest);
    store.stage(&digest, &bench.path("staged")).unwrap();
    assert!(bench.path("staged/sub/script").is_symlink());
    let staged = store.tree_of_path(&bench.path("staged")).unwrap();
    assert_eq!(staged.entries.len(), 2);
}

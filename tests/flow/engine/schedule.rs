//! Slots, order, workers, cancellation.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use flow::engine::{self, Gpu, RunEvent};
use flow::lineage::{Record, Runs, State, Status};
use proptest::prelude::*;

use super::toys::{Bench, Ran};

/// A step of a random pipeline: producers among the earlier steps, and its needs.
type Drawn = (Vec<usize>, usize, usize, bool);

fn drawn() -> impl Strategy<Value = Vec<Drawn>> {
    let step = (proptest::collection::vec(0_usize..12, 0..3), 0_usize..4, 0_usize..3, 0_u8..8);
    let step = step.prop_map(|(from, cpu, gpu, alone)| (from, cpu, gpu, alone == 0));
    proptest::collection::vec(step, 1..12)
}

fn pipeline(steps: &[Drawn]) -> (String, Vec<BTreeSet<usize>>) {
    let mut text = "steps:\n".to_owned();
    let mut producers = Vec::new();
    for (i, (from, cpu, gpu, alone)) in steps.iter().enumerate() {
        let from: BTreeSet<usize> = from.iter().copied().filter(|&f| f < i).collect();
        let after: Vec<String> = from.iter().map(|f| format!("\"${{steps.s{f}}}\"")).collect();
        let after = after.join(", ");
        text += &format!(
            "  s{i}: {{ kind: nap, with: {{ ms: 1, name: s{i}, cpu: {cpu}, gpu: {gpu}, \
             exclusive: {alone}, after: [{after}] }} }}\n"
        );
        producers.push(from);
    }
    (text, producers)
}

/// Follows a run's events: slots are never exceeded, what must be alone is, order holds.
fn hold(run: &Ran, steps: &[Drawn], producers: &[BTreeSet<usize>], jobs: usize) {
    let number = |step: &str| step[1..].parse::<usize>().unwrap();
    let mut running: BTreeMap<usize, (usize, Vec<Gpu>)> = BTreeMap::new();
    let mut done = BTreeSet::new();
    for event in &run.events {
        match event {
            RunEvent::Started { step, threads, gpus, .. } => {
                let i = number(step);
                assert!(producers[i].is_subset(&done), "{step} before its producers");
                running.insert(i, (*threads, gpus.clone()));
                assert!(running.values().map(|(t, _)| t).sum::<usize>() <= jobs);
                let lent: Vec<Gpu> = running.values().flat_map(|(_, g)| g.clone()).collect();
                assert_eq!(lent.iter().collect::<BTreeSet<_>>().len(), lent.len(), "one GPU twice");
                assert_eq!(gpus.len(), steps[i].2);
                assert!(running.len() == 1 || running.keys().all(|&r| !steps[r].3), "not alone");
            }
            RunEvent::Finished { step, .. } => {
                running.remove(&number(step));
                done.insert(number(step));
            }
            _ => {}
        }
    }
    assert_eq!(done.len(), steps.len());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    #[test]
    fn slots_are_respected_and_everything_runs(steps in drawn(), jobs in 1_usize..5) {
        let mut bench = Bench::new();
        bench.options.jobs = jobs;
        bench.options.gpus = [0, 3].map(Gpu::Index).into();
        let (text, producers) = pipeline(&steps);
        let run = bench.run(&text);
        prop_assert_eq!(run.outcome.ran, steps.len());
        hold(&run, &steps, &producers, jobs);
    }
}

#[test]
fn independent_steps_run_side_by_side() {
    let steps =
        (0..4).map(|i| format!("  s{i}: {{ kind: nap, with: {{ ms: 300, name: s{i} }} }}\n"));
    let run = Bench::new().run(&format!("steps:\n{}", steps.collect::<String>()));
    let mut running = 0;
    let most = run.events.iter().map(|e| {
        match e {
            RunEvent::Started { .. } => running += 1,
            RunEvent::Finished { .. } => running -= 1,
            _ => {}
        }
        running
    });
    assert_eq!(most.max(), Some(4));
}

/// One at a time is kept beside one that works; what must be alone waits for both.
#[test]
fn what_a_resting_step_was_lent_is_lent_again() {
    let mut bench = Bench::new();
    bench.options.jobs = 1;
    let step = |name: &str, with: &str| {
        format!("  {name}: {{ kind: nap, with: {{ ms: 150, name: {name}, {with} }} }}\n")
    };
    let resting = ["a", "b", "c"].map(|name| step(name, "rests: true")).concat();
    let run = bench.run(&format!("steps:\n{resting}{}", step("d", "exclusive: true")));
    let (mut running, mut most) = (BTreeSet::new(), 0);
    for event in &run.events {
        match event {
            RunEvent::Started { step, .. } => {
                running.insert(step.clone());
                assert!(step != "d" || running.len() == 1, "{running:?}");
            }
            RunEvent::Finished { step, .. } => drop(running.remove(step)),
            _ => {}
        }
        most = most.max(running.len());
    }
    assert_eq!((run.outcome.ran, most), (4, 2));
}

#[test]
fn two_steps_of_one_key_run_once() {
    let steps =
        "steps:\n  x: { kind: nap, with: { ms: 20 } }\n  y: { kind: nap, with: { ms: 20 } }\n";
    let run = Bench::new().run(steps);
    assert_eq!((run.ran(), run.in_state(State::Hit)), (vec!["x"], vec!["y"]));
}

#[test]
fn more_gpus_than_there_are_is_a_failure_with_advice() {
    let run = Bench::new().run("steps:\n  x: { kind: nap, with: { ms: 0, gpu: 1 } }\n");
    let said = run.failure("x");
    assert!(said.contains("needs 1 GPU, and there is none") && said.contains("help: "), "{said}");
}

#[test]
fn cancelling_keeps_finished_work_and_skips_the_rest() {
    let steps = r#"
steps:
  quick: { kind: nap, with: { ms: 1, name: quick } }
  long: { kind: nap, with: { ms: 60000, after: ["${steps.quick}"] } }
  never: { kind: upper, with: { data: "${steps.long}" } }
"#;
    for bench in [Bench::new(), Bench::new().with_workers()] {
        let steps = steps.replace("ms: 60000", "ms: 60000, isolated: true");
        let plan = bench.plan(&steps);
        let session = bench.session();
        let started = Instant::now();
        let outcome = engine::run(&plan, &session, &mut |event| {
            if matches!(event, RunEvent::Step { step, .. } if step == "long") {
                bench.cancel.store(true, Ordering::Relaxed);
            }
        });
        let outcome = outcome.unwrap();
        assert!(started.elapsed() < Duration::from_secs(30));
        assert_eq!(outcome.status, Status::Interrupted);
        assert_eq!((outcome.ran, outcome.skipped, outcome.failed), (1, 2, 0));
        bench.cancel.store(false, Ordering::Relaxed);
        let run = bench.run(&steps.replace("60000", "1"));
        assert_eq!(run.in_state(State::Hit), ["quick"]);
        let runs = Runs::of(&bench.store());
        assert_eq!(runs.find(&outcome.run).unwrap().status, Status::Interrupted);
        assert!(std::fs::read_dir(bench.path("store/attempts")).unwrap().next().is_none());
    }
}

#[test]
fn a_worker_does_the_attempt_and_says_what_it_does() {
    let mut bench = Bench::new().with_workers();
    bench.options.environment = [("UNDECLARED", "seen"), ("NAP_ENV", "given")]
        .map(|(n, v)| (n.to_owned(), v.to_owned()))
        .into();
    let steps = "steps:\n  x: { kind: nap, with: { ms: 5, isolated: true }, env: [NAP_ENV] }\n";
    let run = bench.run(steps);
    assert_eq!(run.ran(), ["x"], "{:?}", run.events);
    let metric = run.events.iter().any(|e| {
        let text = serde_json::to_string(e).unwrap();
        text.contains("nap/ms")
    });
    assert!(metric);
    let record = &Record::all(&bench.store()).unwrap()[0];
    assert_eq!(record.facts["env"], "given");
    assert_eq!(record.facts["undeclared"], "", "a worker sees only what is declared");
    assert!(record.made.peak_rss_bytes.is_some_and(|b| b > 1 << 20));
    assert!(record.made.cpu_seconds.is_some());
    let log = Runs::of(&bench.store()).find("latest").unwrap().log_path("x");
    assert!(std::fs::read_to_string(log).unwrap().contains("napping for 5 ms"));
    assert_eq!(bench.run(steps).outcome.hits, 1);
    // The same key on a thread: where a step runs is not in it.
    bench.options.worker = None;
    assert_eq!(bench.run(steps).outcome.hits, 1);
}

#[test]
fn a_worker_that_is_killed_costs_one_attempt() {
    let bench = Bench::new().with_workers();
    let steps = "steps:\n  x: { kind: nap, with: { ms: 5, isolated: true, die: true } }\n";
    let run = bench.run(steps);
    let said = run.failure("x");
    assert!(said.contains("signal 9 (SIGKILL)"), "{said}");
    assert!(said.contains("ran out of memory"), "{said}");
    assert!(said.contains("last words"), "its own output is in its log: {said}");
}

//! Steps that fail, time out and are tried again; what they are lent.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use flow::engine::{self, Gpu, RunEvent};
use flow::lineage::{Record, State, Status};

use super::toys::{Bench, Ran};

#[test]
fn retries_and_timeouts() {
    for bench in [Bench::new(), Bench::new().with_workers()] {
        let count = bench.path("count");
        let flaky = format!("flaky: [{}, 2]", count.display());
        let steps = |retry: u32| {
            format!(
                "steps:\n  x: {{ kind: nap, retry: {{ times: {retry}, backoff: 1ms }}, \
                 with: {{ ms: 1, isolated: true, {flaky} }} }}\n"
            )
        };
        let run = bench.run(&steps(1));
        assert_eq!(run.outcome.status, Status::Failed);
        assert!(run.failure("x").contains("flaky for the 2. time"), "{}", run.failure("x"));
        std::fs::remove_file(&count).unwrap();
        let run = bench.run(&steps(2));
        assert_eq!(run.outcome.status, Status::Done);
        assert_eq!(Record::all(&bench.store()).unwrap()[0].made.attempt, 3);
        let steps =
            "steps:\n  x: { kind: nap, timeout: 1s, with: { ms: 60000, isolated: true } }\n";
        let run = bench.run(steps);
        assert!(run.failure("x").contains("longer than its timeout (1s)"), "{}", run.failure("x"));
    }
}

/// The order in which steps began and were found to be tried again.
fn told(run: &Ran) -> Vec<String> {
    let told = run.events.iter().filter_map(|event| match event {
        RunEvent::Started { step, attempt, .. } => Some(format!("{step} {attempt}")),
        RunEvent::Retrying { step, .. } => Some(format!("{step} again")),
        _ => None,
    });
    told.collect()
}

#[test]
fn a_step_that_waits_to_be_tried_again_holds_no_slot() {
    let mut bench = Bench::new();
    bench.options.jobs = 1;
    let count = bench.path("count");
    let steps = format!(
        "steps:\n  \
         a: {{ kind: nap, retry: {{ times: 2, backoff: 100ms }}, \
         with: {{ ms: 1, name: a, flaky: [{}, 1] }} }}\n  \
         b: {{ kind: nap, with: {{ ms: 1, name: b }} }}\n",
        count.display()
    );
    let run = bench.run(&steps);
    assert_eq!(run.outcome.status, Status::Done);
    assert_eq!(told(&run), ["a 1", "a again", "b 1", "a 2"]);
    assert!(run.outcome.seconds >= 0.1, "{}", run.outcome.seconds);
    let log = flow::lineage::Runs::of(&bench.store()).find("latest").unwrap().log_path("a");
    let log = std::fs::read_to_string(log).unwrap();
    assert!(log.contains("attempt 1 failed: flaky for the 1. time"), "{log}");
}

#[test]
fn stopping_ends_the_wait_to_be_tried_again() {
    let bench = Bench::new();
    let steps = "steps:\n  x: { kind: wrong, retry: { times: 3, backoff: 1h }, \
                 with: { way: error } }\n";
    let (plan, begun) = (bench.plan(steps), Instant::now());
    let outcome = engine::run(&plan, &bench.session(), &mut |event| {
        if let RunEvent::Retrying { attempt, of, in_seconds, .. } = event {
            assert_eq!((*attempt, *of), (1, 4));
            assert!((3600.0..3961.0).contains(in_seconds), "{in_seconds}");
            bench.cancel.store(true, Ordering::Relaxed);
        }
    });
    assert_eq!(outcome.unwrap().status, Status::Interrupted);
    assert!(begun.elapsed() < Duration::from_secs(10));
}

#[test]
fn what_fails_is_named_by_all_that_needs_it() {
    let mut bench = Bench::new();
    bench.options.keep_going = true;
    let steps = r#"
steps:
  one: { kind: wrong, with: { way: error } }
  two: { kind: wrong, with: { way: panic } }
  both: { kind: nap, with: { ms: 1, after: ["${steps.one}", "${steps.two}"] } }
  last: { kind: upper, with: { data: "${steps.both}" } }
"#;
    let run = bench.run(steps);
    assert_eq!(
        (run.in_state(State::Failed), run.in_state(State::Skipped)),
        (vec!["one", "two"], vec!["both", "last"],)
    );
    let failed = |because: &str| because == "one failed" || because == "two failed";
    for event in &run.events {
        if let RunEvent::Skipped { because, .. } = event {
            assert!(failed(because), "{because}");
        }
    }
}

/// The most steps that ran at one time.
fn at_once(run: &Ran) -> usize {
    let mut running = 0_usize;
    let counts = run.events.iter().map(|event| {
        match event {
            RunEvent::Started { .. } => running += 1,
            RunEvent::Finished { .. } => running -= 1,
            _ => {}
        }
        running
    });
    counts.max().unwrap_or(0)
}

#[test]
fn memory_and_named_resources_are_not_lent_twice() {
    let mut bench = Bench::new();
    bench.options.memory = Some(10 << 30);
    bench.options.resources = BTreeMap::from([("licence".to_owned(), 3)]);
    let steps = |name: &str, needs: &str| {
        let steps = (0..4).map(|i| {
            format!(
                "  s{i}: {{ kind: nap, needs: {needs}, with: {{ ms: 30, name: {name}{i} }} }}\n"
            )
        });
        format!("steps:\n{}", steps.collect::<String>())
    };
    for (name, needs, most) in [
        ("licence", "{ licence: 1 }", 3),
        ("licences", "{ licence: 2 }", 1),
        ("memory", "{ memory: 5GiB }", 2),
        ("alone", "{ exclusive: true }", 1),
    ] {
        let run = bench.run(&steps(name, needs));
        assert_eq!((run.outcome.ran, at_once(&run)), (4, most), "{needs}");
    }
    let run = bench.run(&steps("more", "{ memory: 11GiB, licence: 4 }"));
    let said = run.failure("s0");
    assert!(said.contains("11.0 GiB of memory, and there is only 10.0 GiB"), "{said}");
    assert!(said.contains("4 of `licence`, and there are only 3"), "{said}");
    // What is asked for is not in the key.
    assert_eq!(bench.run(&steps("licence", "{ licence: 3 }")).outcome.hits, 4);
}

#[test]
fn each_worker_sees_the_gpus_that_it_was_lent() {
    let mut bench = Bench::new().with_workers();
    bench.options.gpus = [0, 3, 5].map(Gpu::Index).into();
    let nap = |name: &str, gpu: usize| {
        let with = format!("{{ ms: 1, isolated: true, name: {name}, gpu: {gpu} }}");
        format!("  {name}: {{ kind: nap, with: {with} }}\n")
    };
    let steps = format!("steps:\n{}{}{}", nap("a", 1), nap("b", 2), nap("none", 0));
    let run = bench.run(&steps);
    assert_eq!(run.outcome.ran, 3);
    let mut lent = BTreeMap::new();
    for event in &run.events {
        if let RunEvent::Started { step, gpus, .. } = event {
            let gpus: Vec<String> = gpus.iter().map(ToString::to_string).collect();
            lent.insert(step.clone(), gpus.join(","));
        }
    }
    assert_eq!((lent["a"].as_str(), lent["b"].as_str(), lent["none"].as_str()), ("0", "3,5", ""));
    for record in Record::all(&bench.store()).unwrap() {
        assert_eq!(record.facts["gpus"], lent[&record.made.step], "{}", record.made.step);
    }
}

//! Cache decisions: what runs, what does not, and why.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "also outside of `#[test]` functions"
)]

mod attempts;
mod durable;
mod expected;
mod faults; // disks that refuse, damaged and odd stores
mod gc;
mod golden; // what every kind makes of one small input, and its key
pub(crate) mod real; // a pipeline of all real kinds
mod reproduced;
mod schedule;
mod toys;
mod truth; // what has to run again after an edit, and what has not

use flow::engine::{self, Prospect, RunEvent};
use flow::lineage::{Record, Runs, State, Status, trace};
use toys::Bench;

const CHAIN: &str = r#"
steps:
  a: { kind: emit, with: { texts: { train: "one", test: "two" } } }
  b: { kind: upper, with: { data: "${steps.a}" } }
  c: { kind: upper, with: { data: "${steps.b}", suffix: "!" } }
outputs: { result: "${steps.c}" }
"#;

fn edited(from: &str, to: &str) -> String {
    assert!(CHAIN.contains(from));
    CHAIN.replace(from, to)
}

#[test]
fn a_second_run_does_nothing() {
    let bench = Bench::new();
    let first = bench.run(CHAIN);
    assert_eq!(first.ran(), ["a", "b", "c"]);
    assert_eq!(bench.text("c", "train"), "ONE!");
    assert_eq!(first.why("a"), "first time");
    let second = bench.run(CHAIN);
    assert_eq!((second.outcome.hits, second.outcome.ran), (3, 0));
    assert!(second.events.iter().all(|e| !matches!(e, RunEvent::Started { .. })));
    assert!(std::fs::read_dir(bench.path("store/attempts")).unwrap().next().is_none());
}

#[test]
fn equal_bytes_cut_off_what_follows() {
    let bench = Bench::new();
    bench.run(CHAIN);
    // `upper` trims, so another text gives the same bytes.
    let run = bench.run(&edited("\"one\"", "\" one \""));
    assert_eq!(run.ran(), ["a", "b"]);
    assert_eq!(run.in_state(State::Hit), ["c"]);
    let why = run.why("a");
    assert!(why.starts_with("with.texts.train \"one\" -> \" one \"; 1 of 4 fields"), "{why}");
    let why = run.why("b");
    let because = "which ran: with.texts.train \"one\" -> \" one \"";
    assert!(why.starts_with(&format!("input data.train changed (from step a, {because}); 1 of ")));
}

#[test]
fn a_chain_of_misses_names_what_began_it() {
    let bench = Bench::new();
    bench.run(CHAIN);
    let run = bench.run(&edited("\"one\"", "\"three\""));
    assert_eq!(run.ran(), ["a", "b", "c"]);
    let why = run.why("c");
    let because = "from step b, after a ran: with.texts.train \"one\" -> \"three\"";
    assert!(why.starts_with(&format!("input data.train changed ({because}); 1 of ")), "{why}");
    // A producer that was a hit began nothing.
    let run = bench.run(&edited("\"!\"", "\"?\""));
    assert!(run.why("c").contains("input data.train changed (from step b); "), "{}", run.why("c"));
}

#[test]
fn a_changed_parameter_runs_only_what_depends_on_it() {
    let bench = Bench::new();
    bench.run(CHAIN);
    let run = bench.run(&edited("\"!\"", "\"?\""));
    assert_eq!(run.ran(), ["c"]);
    assert!(run.why("c").starts_with("with.suffix \"!\" -> \"?\"; 1 of "), "{}", run.why("c"));
    // Going back is a hit: nothing is replaced.
    assert_eq!(bench.run(CHAIN).outcome.ran, 0);
}

#[test]
fn what_a_step_is_called_is_not_in_its_key() {
    let bench = Bench::new();
    bench.run(CHAIN);
    let renamed = CHAIN.replace("  a:", "  z:").replace("steps.a", "steps.z");
    assert_eq!(bench.run(&renamed).outcome.ran, 0);
}

#[test]
fn an_edge_keys_only_the_ports_that_are_read() {
    let bench = Bench::new();
    let steps = r#"
steps:
  a: { kind: emit, with: { texts: { train: "one", test: "two" } } }
  narrowed: { kind: upper, with: { data: "${steps.a}", only: [train] } }
  named: { kind: upper, with: { data: "${steps.a.train}", suffix: "." } }
  whole: { kind: upper, with: { data: "${steps.a}", suffix: "," } }
"#;
    bench.run(steps);
    let run = bench.run(&steps.replace("two", "three"));
    assert_eq!(run.ran(), ["a", "whole"]);
    let run = bench.run(&steps.replace("one", "three"));
    assert_eq!(run.ran(), ["a", "named", "narrowed", "whole"]);
}

#[test]
fn points_share_what_reads_no_axis_and_a_new_point_runs_alone() {
    let bench = Bench::new();
    let steps = r#"
sweep: { grid: { s: ["1", "2"] } }
steps:
  a: { kind: emit, with: { texts: { train: "one" } } }
  b: { kind: upper, with: { data: "${steps.a}", suffix: "${sweep.s}" } }
  all: { kind: join, with: { parts: "${steps.b.*}" } }
"#;
    let run = bench.run(steps);
    assert_eq!(run.ran(), ["a", "all", "b@s=1", "b@s=2"]);
    assert_eq!(bench.text("all", "all"), "ONE1\nONE2\n");
    let run = bench.run(&steps.replace("\"2\"]", "\"2\", \"3\"]"));
    assert_eq!(run.ran(), ["all", "b@s=3"]);
    let why = run.why("all");
    assert!(why.contains("input parts@s=3.text is new") || why.contains("parts@s=3"), "{why}");
    // Both of the earlier ones are as near.
    let near =
        |old: &str| why.contains(&format!("b@s=3, which ran: with.suffix \"{old}\" -> \"3\")"));
    assert!(near("1") || near("2"), "{why}");
}

#[test]
fn salt_environment_version_and_device_are_in_the_key() {
    let mut bench = Bench::new();
    let step = |rest: &str| format!("steps:\n  a: {{ kind: nap, with: {{ ms: 0 }}{rest} }}\n");
    bench.run(&step(""));
    assert_eq!(bench.run(&step("")).outcome.ran, 0);
    assert_eq!(bench.run(&step(", salt: x")).outcome.ran, 1);
    let with_env = step(", env: [NAP_ENV]");
    let run = bench.run(&with_env);
    assert!(run.why("a").contains("env.NAP_ENV (absent) -> \"one\""), "{}", run.why("a"));
    bench.options.environment.insert("NAP_ENV".into(), "two".into());
    let run = bench.run(&with_env);
    assert!(run.why("a").contains("env.NAP_ENV \"one\" -> \"two\""), "{}", run.why("a"));
    // Policy never is.
    assert_eq!(bench.run(&step(", retry: 3, timeout: 10m")).outcome.ran, 0);
    let infer = "steps:\n  m: { kind: infer, with: {} }\n";
    bench.run(infer);
    bench.options.device = flow::step::Device::Cuda;
    bench.options.gpus = vec![flow::engine::Gpu::Index(0)];
    bench.options.compute = "bf16".into();
    let run = bench.run(infer);
    assert!(run.why("m").contains("device \"cpu\" -> \"cuda\""), "{}", run.why("m"));
    assert!(run.why("m").contains("compute \"f32\" -> \"bf16\""), "{}", run.why("m"));
    assert_eq!(bench.run(&step("")).outcome.ran, 0, "a step that runs no model keys no device");
}

#[test]
fn targets_run_with_what_they_need_and_unknown_names_are_refused() {
    let mut bench = Bench::new();
    bench.options.targets = vec!["b".into()];
    let run = bench.run(CHAIN);
    assert_eq!(run.ran(), ["a", "b"]);
    bench.options.targets = vec!["bb".into()];
    let error = bench.try_run(CHAIN).err().unwrap();
    assert_eq!(error.to_string(), "there is no step `bb`");
    assert!(!flow::source::advice(&error).is_empty());
}

#[test]
fn failure_skips_what_is_downstream_and_keep_going_runs_the_rest() {
    let steps = r#"
steps:
  bad: { kind: wrong, with: { way: error } }
  after: { kind: upper, with: { data: "${steps.bad}" } }
  later: { kind: upper, with: { data: "${steps.after}" } }
  other: { kind: emit, with: { texts: { x: "1" } } }
  next: { kind: upper, with: { data: "${steps.other}" } }
"#;
    let mut bench = Bench::new();
    bench.options.jobs = 1;
    let run = bench.run(steps);
    assert_eq!(run.outcome.status, Status::Failed);
    let failure = run.failure("bad");
    assert!(
        failure.starts_with("while doing it: it cannot be done (help: do it otherwise)"),
        "{failure}"
    );
    assert_eq!(run.in_state(State::Skipped), ["after", "later", "next", "other"]);
    bench.options.keep_going = true;
    let run = bench.run(steps);
    assert_eq!(run.ran(), ["next", "other"]);
    assert_eq!(run.in_state(State::Skipped), ["after", "later"]);
    let because: Vec<String> = run
        .events
        .iter()
        .filter_map(|e| match e {
            RunEvent::Skipped { step, because } => Some(format!("{step}: {because}")),
            _ => None,
        })
        .collect();
    assert_eq!(because, ["after: bad failed", "later: bad failed"]);
    // What was done stays done, what failed is tried again.
    let run = bench.run(steps);
    assert_eq!((run.outcome.hits, run.outcome.failed), (2, 1));
}

#[test]
fn every_way_to_go_wrong_is_said() {
    let bench = Bench::new();
    let wrong = |way: &str| {
        let run = bench.run(&format!("steps:\n  a: {{ kind: wrong, with: {{ way: {way} }} }}\n"));
        assert_eq!(run.outcome.status, Status::Failed);
        run.failure("a")
    };
    let said = wrong("panic");
    assert!(said.contains("panicked: out of cheese"), "{said}");
    let said = wrong("port");
    assert!(said.contains("did not make `done`"), "{said}");
    let said = wrong("nothing");
    assert!(said.contains("did not make `done`"), "{said}");
    let said = wrong("input");
    assert!(said.contains("the input does not fit"), "{said}");
}

#[test]
fn a_port_that_was_not_made_names_those_that_were() {
    let bench = Bench::new();
    // The plan knows no ports of what comes out of `unknown` (it depends on the input).
    let steps = r#"
steps:
  a: { kind: emit, with: { texts: { train: "one" } } }
  b: { kind: upper, with: { data: "${steps.a}", only: [train, tests] } }
"#;
    let run = bench.run(steps);
    let said = run.failure("b");
    assert!(said.contains("did not make `tests`"), "{said}");
}

#[test]
fn a_forced_step_that_gives_other_bytes_is_a_difference_and_replaces_nothing() {
    let mut bench = Bench::new();
    let steps = r#"
steps:
  dice: { kind: wrong, with: { way: random } }
  after: { kind: upper, with: { data: "${steps.dice}" } }
"#;
    bench.run(steps);
    let before = bench.ports("dice");
    bench.options.force = vec!["dice".into()];
    let run = bench.run(steps);
    assert_eq!((run.ran(), run.in_state(State::Hit)), (vec!["dice"], vec!["after"]));
    assert_eq!(run.why("dice"), "forced");
    let differs = run.events.iter().any(|e| match e {
        RunEvent::Finished { step, differs, .. } => step == "dice" && *differs == ["done"],
        _ => false,
    });
    assert!(differs);
    assert_eq!(bench.ports("dice"), before);
    let store = bench.store();
    let key = Record::all(&store).unwrap().into_iter().find(|r| r.made.step == "dice").unwrap().key;
    let ledger = Record::differences(&store, &key).unwrap();
    assert_eq!(ledger.len(), 1);
    assert_ne!(ledger[0].ports, before);
}

#[test]
fn the_lock_grows_and_locked_refuses() {
    let mut bench = Bench::new();
    let pins = |urls: &[&str]| {
        let steps = urls.iter().enumerate();
        let steps =
            steps.map(|(i, u)| format!("  p{i}: {{ kind: pin, with: {{ url: '{u}' }} }}\n"));
        format!("steps:\n{}", steps.collect::<String>())
    };
    bench.run(&pins(&["b"]));
    bench.run(&pins(&["b", "a"]));
    let lock = std::fs::read_to_string(bench.path("toy.lock")).unwrap();
    let lines: Vec<&str> = lock.lines().filter(|l| !l.starts_with('#')).collect();
    assert_eq!(lines, ["url:a = id-of-a", "url:b = id-of-b"]);
    bench.options.locked = true;
    assert_eq!(bench.run(&pins(&["b", "a"])).outcome.hits, 2);
    let error = bench.try_run(&pins(&["b", "c"])).err().unwrap();
    assert!(error.to_string().contains("p1: `url:c` is not in"), "{error}");
    bench.options.locked = false;
    // A line is never changed by a run; an update asks again.
    let old = lock.replace("id-of-b", "old");
    std::fs::write(bench.path("toy.lock"), &old).unwrap();
    bench.run(&pins(&["b"]));
    assert_eq!(bench.text("p0", "pinned"), "old");
    assert_eq!(std::fs::read_to_string(bench.path("toy.lock")).unwrap(), old);
    let updated = engine::update(&bench.plan(&pins(&["b"])), &bench.session()).unwrap();
    assert_eq!((updated[0].old.as_deref(), updated[0].new.as_str()), (Some("old"), "id-of-b"));
}

#[test]
fn all_that_is_missing_outside_is_said_at_once_before_anything_runs() {
    let bench = Bench::new();
    let steps = r#"
steps:
  fine: { kind: emit, with: { texts: { x: "1" } } }
  one: { kind: pin, with: { url: "no:this" } }
  two: { kind: pin, with: { url: "no:that" } }
  three: { kind: take, with: { file: absent.txt } }
"#;
    let error = bench.try_run(steps).err().unwrap();
    let unresolved = error.downcast_ref::<engine::Unresolved>().unwrap();
    let steps: Vec<&str> = unresolved.0.iter().map(|(step, ..)| step.as_str()).collect();
    assert_eq!(steps, ["one", "three", "two"]);
    assert!(Runs::of(&bench.store()).ids().unwrap().is_empty());
}

#[test]
fn a_forecast_says_what_a_run_then_does() {
    let bench = Bench::new();
    let states = |steps: &str| -> Vec<String> {
        let forecast = engine::forecast(&bench.plan(steps), &bench.session()).unwrap();
        let states = forecast.iter().map(|f| match &f.prospect {
            Prospect::Cached { .. } => format!("{} cached", f.step),
            Prospect::WillRun { why, .. } => format!("{} runs: {why}", f.step),
            Prospect::WaitsOn { steps } => format!("{} waits for {}", f.step, steps.join(",")),
            Prospect::Unresolved { reason } => format!("{} unresolved: {reason}", f.step),
        });
        states.collect()
    };
    assert_eq!(states(CHAIN), ["a runs: first time", "b waits for a", "c waits for b"]);
    bench.run(CHAIN);
    assert_eq!(states(CHAIN), ["a cached", "b cached", "c cached"]);
    let forecast = states(&edited("\"!\"", "\"?\""));
    assert!(forecast[2].starts_with("c runs: with.suffix"), "{forecast:?}");
    assert_eq!(Runs::of(&bench.store()).ids().unwrap().len(), 1, "a forecast is no run");
}

#[test]
fn runs_are_on_record() {
    let bench = Bench::new();
    let first = bench.run(CHAIN);
    let second = bench.run(CHAIN);
    let runs = Runs::of(&bench.store());
    let ids: Vec<String> = runs.list().unwrap().into_iter().map(|r| r.info.id).collect();
    assert_eq!(ids.len(), 2);
    assert_eq!(runs.find(&first.outcome.run).unwrap().status, Status::Done);
    let run = runs.load(&second.outcome.run).unwrap();
    let summary = run.summary.as_ref().unwrap();
    assert!(summary.steps.iter().all(|s| s.state == State::Hit && s.key.is_some()));
    assert_eq!(run.events().unwrap().len(), second.events.len());
    assert!(runs.find("2").is_err_and(|e| e.to_string().contains("2 runs begin with")));
    assert!(runs.find("nonsense").is_err());
    let record = Record::all(&bench.store()).unwrap();
    let c = record.iter().find(|r| r.made.step == "c").unwrap();
    assert_eq!(c.made.run, first.outcome.run);
    // From an output back to all that it was made from.
    let lineage = trace(&bench.store(), &c.ports["train"].to_string()).unwrap();
    let steps: Vec<&str> = lineage.records.iter().map(|r| r.made.step.as_str()).collect();
    assert_eq!(steps, ["c", "b", "a"]);
    let inputs: Vec<&str> = lineage.links[&c.key].iter().map(|l| l.input.as_str()).collect();
    assert_eq!(inputs, ["data.test", "data.train"]);
}

#[test]
fn a_step_that_passes_bytes_on_is_in_the_lineage() {
    let bench = Bench::new();
    let steps = edited("\"one\"", "\"ONE\"").replace("\"two\"", "\"TWO\"");
    bench.run(&steps);
    assert_eq!(bench.ports("a"), bench.ports("b"));
    let lineage = trace(&bench.store(), &bench.ports("c")["train"].to_string()).unwrap();
    let steps: Vec<&str> = lineage.records.iter().map(|r| r.made.step.as_str()).collect();
    assert_eq!(steps, ["c", "b", "a"]);
}

#[test]
fn outputs_appear_whole_and_an_edited_copy_is_kept() {
    let bench = Bench::new();
    let file = bench.path("outputs/toy/result/train/text");
    let published = |run: &toys::Ran| -> Vec<Option<String>> {
        let kept = run.events.iter().filter_map(|e| match e {
            RunEvent::OutputPublished { kept, .. } => Some(kept.as_ref()),
            _ => None,
        });
        kept.map(|k| k.map(|p| p.file_name().unwrap().to_string_lossy().into_owned())).collect()
    };
    assert_eq!(published(&bench.run(CHAIN)), [None]);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "ONE!");
    assert!(!std::fs::metadata(&file).unwrap().permissions().readonly());
    assert_eq!(published(&bench.run(CHAIN)), []);
    // A new result replaces an unedited copy.
    assert_eq!(published(&bench.run(&edited("\"!\"", "\"?\""))), [None]);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "ONE?");
    // An edited one is set aside.
    std::fs::write(&file, "mine").unwrap();
    assert_eq!(published(&bench.run(CHAIN)), [Some("result.edited-1".to_owned())]);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "ONE!");
    let kept = bench.path("outputs/toy/result.edited-1/train/text");
    assert_eq!(std::fs::read_to_string(kept).unwrap(), "mine");
    let names: Vec<_> = std::fs::read_dir(bench.path("outputs/toy")).unwrap().collect();
    assert_eq!(names.len(), 2, "{names:?}");
    assert_eq!(bench.text("c", "train"), "ONE?", "the store's own bytes are untouched");
}

//! What a run is expected to cost, and the past that it is judged by.

use flow::engine::{self, Estimate, Prospect};
use flow::lineage::Likeness;

use super::CHAIN;
use super::toys::Bench;

fn forecast(bench: &Bench, steps: &str) -> (Vec<engine::Forecast>, Estimate) {
    let plan = bench.plan(steps);
    let session = bench.session();
    let forecasts = engine::forecast(&plan, &session).unwrap();
    let estimate = Estimate::of(&plan, &forecasts, &session.options);
    (forecasts, estimate)
}

#[test]
fn nothing_is_made_up_where_nothing_is_known() {
    let bench = Bench::new();
    let (forecasts, estimate) = forecast(&bench, CHAIN);
    assert!(forecasts.iter().all(|f| f.cost.is_none()));
    assert_eq!((estimate.steps, estimate.unknown, estimate.unknown_output), (3, 3, 3));
    assert_eq!((estimate.seconds, estimate.output_bytes), (0.0, 0));
}

#[test]
fn costs_come_from_the_step_that_is_most_alike() {
    let bench = Bench::new();
    let nap = |name: &str, ms: u32| format!("  {name}: {{ kind: nap, with: {{ ms: {ms} }} }}\n");
    bench.run(&format!("steps:\n{}{}", nap("long", 200), nap("short", 1)));
    let steps = format!("steps:\n{}{}{}", nap("long", 201), nap("short", 2), nap("other", 3));
    let (forecasts, estimate) = forecast(&bench, &steps);
    let cost = |step: &str| {
        forecasts.iter().find(|f| f.step == step).and_then(|f| f.cost.clone()).unwrap()
    };
    assert!(cost("long").seconds >= 0.2 && cost("short").seconds < 0.2);
    assert_eq!((cost("long").like, cost("other").like), (Likeness::Instance, Likeness::Kind));
    assert_eq!((estimate.steps, estimate.unknown, estimate.guessed), (3, 0, 1));
    // They were threads of the runner: their memory is not theirs alone.
    assert_eq!(estimate.unknown_memory, 3);
    assert!(estimate.seconds >= 0.2 && estimate.seconds < estimate.work_seconds);
    // What is there costs nothing more.
    let (forecasts, estimate) = forecast(&bench, &format!("steps:\n{}", nap("long", 200)));
    assert!(matches!(forecasts[0].prospect, Prospect::Cached { .. }));
    assert_eq!(forecasts[0].cost.as_ref().map(|c| c.output_bytes), Some(Some(0)));
    assert_eq!(estimate, Estimate::default());
}

#[test]
fn what_the_store_would_grow_by_is_what_the_step_made_last_time() {
    let bench = Bench::new();
    bench.run(CHAIN);
    let (forecasts, estimate) = forecast(&bench, &CHAIN.replace("\"!\"", "\"??\""));
    assert_eq!(forecasts[2].cost.as_ref().unwrap().like, Likeness::Instance);
    // `ONE!` and `TWO!`
    assert_eq!((estimate.steps, estimate.output_bytes), (1, 8));
}

#[test]
fn a_point_is_explained_by_the_nearest_of_many() {
    let bench = Bench::new();
    let steps = |points: &str| {
        format!(
            r#"
sweep: {{ grid: {{ n: [{points}], s: [x, y] }}, cap: 4000 }}
steps:
  a:
    kind: emit
    with: {{ texts: {{ n: "${{sweep.n}}", s: "${{sweep.s}}", m: "${{sweep.n}}" }} }}
"#
        )
    };
    let many: Vec<String> = (0..150).map(|n| format!("\"{n}\"")).collect();
    bench.run(&steps(&many.join(", ")));
    let run = bench.run(&steps(&(many.join(", ") + ", \"new\"")));
    assert_eq!(run.ran(), ["a@n=new,s=x", "a@n=new,s=y"]);
    // Two fields of five differ from the points with the same `s`, three from the others.
    for (id, s) in [("a@n=new,s=x", "s=x"), ("a@n=new,s=y", "s=y")] {
        let why = run.why(id);
        assert!(why.contains("; 2 of 5 fields; nearest a@n=") && why.contains(s), "{why}");
    }
}

//! `flow run --record`, `reproduce`, `diff`, `compare`, and the ledger, as a user types them.

use std::fmt::Write as _;
use std::fs;

use serde_json::Value;

use super::{Project, err, finished, out};

/// The main job on a model of a few thousand parameters.
const TINY: &str = r#"
name: tiny
params: { steps: 3 }
sweep: { grid: { r: [2, 4] } }
steps:
  reviews: { kind: fetch, with: { files: { train: reviews.csv } } }
  blank:
    kind: init_model
    with:
      config:
        model_type: llama
        hidden_size: 32
        intermediate_size: 64
        num_hidden_layers: 2
        num_attention_heads: 2
        max_position_embeddings: 512
        tie_word_embeddings: true
        initializer_range: 0.1
      tokenizer: { data: "${steps.reviews}", column: text, algorithm: bpe, vocab_size: 300 }
  prompts:
    kind: format
    with:
      data: "${steps.reviews}"
      template: alpaca-seed
      instruction: Good or bad?
      input: text
      output: { column: label, words: { "0": negative, "1": positive } }
  tokens:
    kind: tokenize
    with: { data: "${steps.prompts}", tokenizer: "${steps.blank.tokenizer}", max_length: 500 }
  train:
    kind: train
    with:
      data: "${steps.tokens}"
      model: "${steps.blank}"
      method: lora
      lora: { r: "${sweep.r}", alpha: 8, dropout: 0.1, target_modules: all-linear }
      learning_rate: 1e-2
      batch_size: 8
      max_steps: "${params.steps}"
  score:
    kind: evaluate
    with: { model: "${steps.train}", data: "${steps.tokens}", split: train }
  merged: { kind: merge, with: { model: "${steps.train}" } }
"#;

fn tiny() -> Project {
    let project = Project::new(TINY);
    let mut rows = String::from("text,label\n");
    for i in 0..16 {
        let word = ["bad", "good", "poor", "fine"][i % 4];
        writeln!(rows, "a {word} film number {i},{}", i % 2).unwrap();
    }
    project.write("reviews.csv", &rows);
    project
}

fn json(project: &Project, arguments: &[&str]) -> Value {
    let output = project.flow(&[&["--json"], arguments].concat());
    serde_json::from_str(&out(&output)).unwrap_or_else(|_| panic!("{}", err(&output)))
}

/// How alike the steps of a `reproduce --json` are, without repetitions.
fn likenesses(reproduced: &Value) -> Vec<&str> {
    let steps = reproduced["steps"].as_array().unwrap().iter();
    let mut all: Vec<&str> = steps.map(|s| s["likeness"].as_str().unwrap_or("none")).collect();
    all.sort_unstable();
    all.dedup();
    all
}

#[test]
fn an_experiment_is_reproduced_from_what_is_committed_beside_it() {
    let project = tiny();
    let first = project.flow(&["run", "p.yaml", "--record", "--jobs", "1"]);
    assert_eq!(first.status.code(), Some(0), "{}", err(&first));
    let results = fs::read_to_string(project.path("p.results")).unwrap();
    for word in ["seconds", "rss", "host", project.dir.path().to_str().unwrap()] {
        assert!(!results.contains(word), "{word} stands in {results}");
    }
    assert!(results.contains("\"score@r=2\"") && results.contains("\"perplexity\""), "{results}");

    // on more threads each training gives the same bytes: a forced step says if not
    for jobs in ["2", "3", "8"] {
        let run = ["--json", "run", "p.yaml", "train@r=4", "--force", "train@r=4", "--jobs", jobs];
        let run = project.flow(&run);
        assert_eq!(finished(&run)["ran"], 1, "{}", out(&run));
        assert!(!out(&run).contains("differs"), "on {jobs} threads: {}", out(&run));
    }

    // another machine: the pipeline, its data, its lock and its results, no store, and a GPU, on
    // which models are not run when they ran on the CPU
    fs::remove_dir_all(project.path(".flow")).unwrap();
    project.write("flow.toml", "[resources]\ngpu = 1\n");
    let again = json(&project, &["reproduce", "p.yaml", "--jobs", "2"]);
    assert_eq!((likenesses(&again), &again["holds"]), (vec!["bit_identical"], &Value::Bool(true)));
    assert_eq!(again["steps"].as_array().unwrap().len(), 10, "{again}");
    let other = project.flow(&["reproduce", "p.yaml", "--device", "cuda"]);
    assert_eq!(other.status.code(), Some(2), "{}", out(&other));
    assert!(err(&other).contains("train@r=2: parameters, files, environment or device"));
    let mut none = project.command(&["run", "p.yaml", "--device", "cuda"]);
    let none = err(&none.env("CUDA_VISIBLE_DEVICES", "-1").output().unwrap());
    let sought = "1 GPU, and there is none (`flow.toml` says `gpu = 1`, `CUDA_VISIBLE_DEVICES` is";
    assert!(none.contains(sought), "{none}");
    let second = ["run", "p.yaml", "--record", "--jobs", "2", "--device", "cpu"];
    let second = project.flow(&second);
    assert_eq!(second.status.code(), Some(0), "{}", err(&second));
    assert_eq!(fs::read_to_string(project.path("p.results")).unwrap(), results);

    // a result from the cache has the log and the curves of the run that made it
    let shown = |run: &str| json(&project, &["show", run, "train@r=2"])[0].clone();
    let ran = shown("latest");
    assert_eq!(ran["curves"]["train/loss"].as_array().map(Vec::len), Some(3), "{ran}");
    let third = project.flow(&["--json", "run", "p.yaml", "--device", "cpu"]);
    assert_eq!(finished(&third)["ran"], 0, "{}", out(&third));
    let made_by =
        format!("\"made_by\":\"{}:train@r=2\"", ran["record"]["made"]["run"].as_str().unwrap());
    assert!(out(&third).contains(&made_by), "{made_by}: {}", out(&third));
    let hit = shown("latest");
    assert_eq!((&hit["step"]["state"], &hit["curves"]), (&Value::from("hit"), &ran["curves"]));
    let said = out(&project.flow(&["show", "latest", "train@r=2"]));
    assert!(said.contains("  curves\n") && said.contains("3 points, "), "{said}");

    // from the records of a run, and some steps only
    let some = project.flow(&["reproduce", "latest", "tokens", "merged@r=2"]);
    assert_eq!(some.status.code(), Some(0), "{}", err(&some));
    assert!(out(&some).contains("2 bit-identical"), "{}", out(&some));

    project.write("p.yaml", &TINY.replace("max_length: 500", "max_length: 400"));
    for what in ["latest", "p.yaml"] {
        let changed = project.flow(&["reproduce", what]);
        assert_eq!(changed.status.code(), Some(2));
        let said = err(&changed);
        assert!(said.contains("tokens: with.max_length 500 -> 400"), "{said}");
    }

    let table = out(&project.flow(&["compare"]));
    let head = table.lines().next().unwrap();
    let mut words = head.split_whitespace();
    assert_eq!((words.next(), words.next()), (Some("r"), Some("accuracy")), "{table}");
    assert!(head.contains("adapter MB") && table.lines().count() == 3, "{table}");
    let sorted = json(&project, &["compare", "--metric", "final_loss"]);
    let losses: Vec<f64> = sorted
        .as_array()
        .unwrap()
        .iter()
        .map(|row| row["values"]["final_loss"].as_f64().unwrap())
        .collect();
    assert!(losses.len() == 2 && losses[0] <= losses[1], "{sorted}");
    let wrong = project.flow(&["compare", "--metric", "final_los"]);
    assert_eq!(wrong.status.code(), Some(2));
    assert!(err(&wrong).contains("did you mean `final_loss`?"), "{}", err(&wrong));

    let steps = out(&project.flow(&["diff", "train@r=2", "train@r=4"]));
    assert!(steps.contains("with.lora.r 2 -> 4") && steps.contains("metric final_loss"), "{steps}");
}

const FICKLE: &str = r#"
name: fickle
params: { word: one }
steps:
  clock:
    kind: command
    with: { run: "date +%s%N > ${out.t}", outputs: { t: t.txt } }
  after:
    kind: command
    with:
      run: "cat ${steps.clock}/t.txt > ${out.t}; echo ${params.word} >> ${out.t}"
      outputs: { t: t.txt }
"#;

#[test]
fn what_differs_is_named_kept_in_the_ledger_and_warned_of() {
    let project = Project::new(FICKLE);
    let set = ["run", "p.yaml", "--record", "--set", "params.word=two"];
    let first = project.flow(&set);
    assert_eq!(first.status.code(), Some(0), "{}", err(&first));
    assert!(!err(&first).contains("warning"), "{}", err(&first));
    for what in ["p.yaml", "latest"] {
        // with the values that it was run with
        let again = project.flow(&["reproduce", what]);
        assert_eq!(again.status.code(), Some(1), "{}", err(&again));
        let said = out(&again);
        assert!(said.contains("t/t.txt, line 1: "), "{said}");
        assert!(said.contains("1 different, 1 bit-identical"), "{said}");
    }
    let show = out(&project.flow(&["show", "clock"]));
    assert!(show.contains("made 3 times, 3 results; the first stands"), "{show}");
    assert!(!out(&project.flow(&["show", "after"])).contains("ledger"));
    let shown = json(&project, &["show", "clock"]);
    assert_eq!(shown[0]["differences"].as_array().map(Vec::len), Some(2), "{shown}");
    let second = project.flow(&set);
    let said = err(&second);
    assert!(said.contains("warning: clock has given other bytes for the same key"), "{said}");
    assert_eq!(said.matches("warning").count(), 1, "{said}");
}

#[test]
fn runs_are_told_apart_step_by_step() {
    let project = Project::new(FICKLE);
    for set in ["params.word=one", "params.word=two"] {
        let run = project.flow(&["run", "p.yaml", "--set", set]);
        assert_eq!(run.status.code(), Some(0), "{}", err(&run));
    }
    project.write("p.yaml", &FICKLE.replace("after:", "later:"));
    assert_eq!(project.flow(&["run", "p.yaml"]).status.code(), Some(0));
    let runs = json(&project, &["runs"]);
    let id = |n: usize| runs[n]["run"]["id"].as_str().unwrap().to_owned();
    let (later, two, one) = (id(0), id(1), id(2));
    let words = out(&project.flow(&["diff", &one, &two]));
    assert!(words.contains("after\n") && words.contains("output t "), "{words}");
    assert!(words.ends_with("1 the same, 1 changed, 0 only in A, 0 only in B\n"), "{words}");
    let names = json(&project, &["diff", &two, &later]);
    let states: Vec<&str> =
        names.as_array().unwrap().iter().map(|s| s["state"].as_str().unwrap()).collect();
    assert_eq!(states, ["only_in_a", "same", "only_in_b"]);
    // a step of an earlier run, and a key
    let step = out(&project.flow(&["diff", &format!("{one}:after"), &format!("{two}:after")]));
    assert!(step.contains("1 changed"), "{step}");
    let shown = json(&project, &["show", &one, "after"]);
    let key = shown[0]["record"]["key"].as_str().unwrap();
    let same = out(&project.flow(&["diff", &key[..12], &format!("{one}:after")]));
    assert!(same.contains("1 the same"), "{same}");
    let mixed = project.flow(&["diff", &one, "later"]);
    assert_eq!(mixed.status.code(), Some(2));
    assert!(err(&mixed).contains("one of them is a run"), "{}", err(&mixed));
    let nothing = project.flow(&["compare"]);
    assert!(err(&nothing).contains("--metric"), "{}", err(&nothing));
}

#[test]
fn what_cannot_be_reproduced_says_why() {
    let project = Project::new(FICKLE);
    let said = |arguments: &[&str]| {
        let output = project.flow(arguments);
        assert_eq!(output.status.code(), Some(2), "{}", err(&output));
        err(&output)
    };
    assert!(said(&["reproduce", "p.yaml"]).contains("--record"));
    assert!(said(&["reproduce", "q.yaml"]).contains("there is no pipeline q.yaml"));
    assert_eq!(project.flow(&["run", "p.yaml", "--record"]).status.code(), Some(0));
    assert!(said(&["reproduce", "nothing"]).contains("there is no run `nothing`"));
    assert!(said(&["reproduce", "latest", "clokc"]).contains("did you mean `clock`?"));
    let tolerance = said(&["reproduce", "latest", "--tolerance", "1e-3,x"]);
    assert!(tolerance.contains("`x` is not a number"), "{tolerance}");
    fs::rename(project.path("p.yaml"), project.path("moved.yaml")).unwrap();
    assert!(said(&["reproduce", "latest"]).contains("the pipeline of run"));
}

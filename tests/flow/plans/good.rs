//! What good pipelines become.

use std::time::Duration;

use flow::pipeline::{Plan, Retry, Settings};
use flow::step::Cpu;
use petgraph::Direction::Incoming;
use serde_json::{Value, json};

use super::{plan, plan_with, settings, told};

fn good(text: &str) -> Plan {
    plan(text).unwrap_or_else(|d| panic!("{}", told(text, &d)))
}

fn ids(plan: &Plan) -> Vec<String> {
    plan.order().into_iter().map(|n| plan.graph[n].id.0.clone()).collect()
}

fn params(plan: &Plan, id: &str) -> Value {
    let node = plan.graph.node_indices().find(|&n| plan.graph[n].id.0 == id).unwrap();
    plan.graph[node].parsed.params()
}

/// Producers of an instance, by edge index.
fn reads(plan: &Plan, id: &str) -> Vec<String> {
    use petgraph::visit::EdgeRef;
    let node = plan.graph.node_indices().find(|&n| plan.graph[n].id.0 == id).unwrap();
    let mut edges: Vec<(usize, String)> = plan
        .graph
        .edges_directed(node, Incoming)
        .map(|e| {
            let port = e.weight().port.as_ref().map_or(String::new(), |p| format!(".{p}"));
            (e.weight().index, format!("{}{port}", plan.graph[e.source()].id))
        })
        .collect();
    edges.sort();
    edges.into_iter().map(|(_, read)| read).collect()
}

const SWEEP: &str = r#"
name: imdb_sweep
params: { model: tiny, rows: 2000, seed: 42 }
sweep:
  zip: { lora: { r: [16, 4, 8], alpha: [32, 8, 16] } }
steps:
  reviews: { kind: fetch, with: { dataset: imdb } }
  sample:
    kind: sample
    with:
      data: "${steps.reviews}"
      rows: { train: "${params.rows}", validation: 500, test: 500 }
      seed: "${params.seed}"
  base: { kind: model, with: { model: "${params.model}" } }
  tokens:
    kind: tokenize
    with: { data: "${steps.sample}", tokenizer: "${steps.base.tokenizer}" }
  train:
    kind: train
    with:
      data: "${steps.tokens}"
      model: "${steps.base}"
      method: qlora
      lora: { r: "${sweep.lora.r}", alpha: "${sweep.lora.alpha}" }
      learning_rate: 2e-4
  score:
    kind: evaluate
    with: { model: "${steps.train}", data: "${steps.tokens.validation}", split: validation }
  best:
    kind: select
    with: { among: "${steps.train.*}", scores: "${steps.score.*}", metric: accuracy }
  final:
    kind: evaluate
    with: { model: "${steps.best}", data: "${steps.tokens}", split: test }
outputs: { adapter: "${steps.best}", each: "${steps.train}", words: "${steps.base.tokenizer}" }
"#;

#[test]
fn steps_are_shared_across_points_and_gathers_are_sorted() {
    let plan = good(SWEEP);
    assert_eq!(
        ids(&plan),
        [
            "base",
            "reviews",
            "sample",
            "tokens",
            "train@lora.alpha=16,lora.r=8",
            "score@lora.alpha=16,lora.r=8",
            "train@lora.alpha=32,lora.r=16",
            "score@lora.alpha=32,lora.r=16",
            "train@lora.alpha=8,lora.r=4",
            "score@lora.alpha=8,lora.r=4",
            "best",
            "final",
        ]
    );
    assert_eq!(plan.points.len(), 3);
    assert_eq!(
        plan.points[0],
        [("lora.alpha".into(), json!(32)), ("lora.r".into(), json!(16))].into()
    );
    assert!(plan.warnings.is_empty(), "{:?}", plan.warnings);
    assert_eq!(
        reads(&plan, "score@lora.alpha=8,lora.r=4"),
        ["train@lora.alpha=8,lora.r=4", "tokens.validation"]
    );
    assert_eq!(reads(&plan, "tokens"), ["sample", "base.tokenizer"]);
    // By size, not as text: 4, 8, 16.
    assert_eq!(
        reads(&plan, "best")[..3],
        [
            "train@lora.alpha=8,lora.r=4",
            "train@lora.alpha=16,lora.r=8",
            "train@lora.alpha=32,lora.r=16"
        ]
    );
    let among = &params(&plan, "best")["among"]["$gather"]["members"];
    assert_eq!(among[0]["point"], json!({ "lora.r": 4, "lora.alpha": 8 }));
    assert_eq!(among[0]["input"]["type"], json!("trained_model"));
    assert_eq!(params(&plan, "final")["model"]["$input"]["type"], json!("trained_model"));
    let outputs: Vec<(&str, Option<&str>)> =
        plan.outputs.iter().map(|o| (o.name.as_str(), o.port.as_deref())).collect();
    assert_eq!(
        outputs,
        [
            ("adapter", None),
            ("each@lora.alpha=32,lora.r=16", None),
            ("each@lora.alpha=8,lora.r=4", None),
            ("each@lora.alpha=16,lora.r=8", None),
            ("words", Some("tokenizer")),
        ]
    );
}

#[test]
fn a_projection_for_each_set_of_axes() {
    let text = r#"
sweep: { grid: { size: [1, 2], seed: [7, 8, 9] } }
steps:
  rows: { kind: fetch, with: { dataset: imdb } }
  some: { kind: sample, with: { data: "${steps.rows}", rows: { train: "${sweep.size}" } } }
  more: { kind: sample, with: { data: "${steps.some}", seed: "${sweep.seed}" } }
  last: { kind: sample, with: { data: "${steps.more}" } }
  show: { kind: command, with: { run: "ls", values: { all: "${steps.last.*}" } } }
"#;
    let plan = good(text);
    let count = |step: &str| plan.graph.node_weights().filter(|i| i.step == step).count();
    assert_eq!(["rows", "some", "more", "last", "show"].map(count), [1, 2, 6, 6, 1]);
    assert_eq!(reads(&plan, "more@seed=8,size=2"), ["some@size=2"]);
    assert_eq!(reads(&plan, "last@seed=8,size=2"), ["more@seed=8,size=2"]);
    assert_eq!(plan.points[1]["seed"], json!(8), "the first axis is the outermost");
}

#[test]
fn exclude_and_include() {
    let text = r#"
sweep:
  grid: { lr: [1e-4, 2e-4], cut: [1, 2] }
  zip: { lora: { r: [4, 8], alpha: [8, 16] } }
  exclude:
    - { lora: { r: 8 }, lr: 1e-4 }
    - { lora.r: 4, cut: 2 }
  include:
    - { lora: { r: 64, alpha: 128 }, lr: 5e-5 }
    - { cut: 3 }
steps:
  rows: { kind: fetch, with: { dataset: imdb } }
  one:
    kind: command
    with:
      run: "cut ${sweep.cut}"
      values: { r: "${sweep.lora.r}", lr: "${sweep.lr}", both: "${sweep.lora}" }
      words: [always, "${sweep.cut}"]
"#;
    let text = text
        .replace(r#""cut ${sweep.cut}""#, "ls")
        .replace(r#", "${sweep.cut}"]"#, r#", "${sweep.cut} cuts"]"#);
    let plan = good(&text);
    let named: Vec<String> = ids(&plan).into_iter().filter(|i| i != "rows").collect();
    assert_eq!(
        named,
        [
            "one@cut=1,lora.alpha=16,lora.r=8,lr=0.0002",
            "one@cut=1,lora.alpha=8,lora.r=4,lr=0.0001",
            "one@cut=1,lora.alpha=8,lora.r=4,lr=0.0002",
            "one@cut=2,lora.alpha=16,lora.r=8,lr=0.0002",
            "one@cut=3",
            "one@lora.alpha=128,lora.r=64,lr=0.00005",
        ]
    );
    let absent = params(&plan, "one@cut=3");
    assert_eq!(absent["values"], json!({}));
    assert_eq!(absent["words"], json!(["always", "3 cuts"]));
    let other = params(&plan, "one@lora.alpha=128,lora.r=64,lr=0.00005");
    assert_eq!(other["words"], json!(["always"]));
    assert_eq!(other["values"], json!({ "r": 64, "lr": 5e-5, "both": { "r": 64, "alpha": 128 } }));
}

#[test]
fn references_keep_their_type_and_text_takes_their_words() {
    let text = r#"
params:
  n: 3
  x: 1e-4
  yes: true
  words: [a, b]
  deep: { list: "${params.words}", n: "${params.n}" }
  path: "${params.n}/${params.yes}/${env.TOKEN}"
steps:
  one:
    kind: command
    with:
      run: plain
      words: "${params.deep.list}"
      values:
        n: "${params.deep.n}"
        x: "${params.x}"
        yes: "${params.yes}"
        deep: "${params.deep}"
        text: "n=${params.n} x=${params.x} yes=${params.yes}"
        path: "${params.path}"
        escaped: "$${params.n} $HOME $$"
        for_the_kind: "${out.model} ${files.main}"
        no: no
"#;
    let plan = good(text);
    assert_eq!(
        params(&plan, "one")["values"],
        json!({
            "n": 3, "x": 1e-4, "yes": true, "deep": { "list": ["a", "b"], "n": 3 },
            "text": "n=3 x=0.0001 yes=true", "path": "3/true/x",
            "escaped": "${params.n} $HOME $$", "for_the_kind": "${out.model} ${files.main}",
            "no": "no",
        })
    );
    assert_eq!(params(&plan, "one")["words"], json!(["a", "b"]));
    assert!(plan.warnings.is_empty(), "{:?}", plan.warnings);
}

#[test]
fn steps_inside_text_are_edges() {
    let text = r#"
steps:
  rows: { kind: fetch, with: { dataset: imdb } }
  show:
    kind: command
    with: { run: "head ${steps.rows.train}/x ${steps.rows} > ${out.top}" }
"#;
    let plan = good(text);
    assert_eq!(reads(&plan, "show"), ["rows.train", "rows"]);
    let edge = |i: usize, names: &[&str]| {
        let inner = json!({ "type": "dataset", "edge": i, "names": names });
        json!({ "$input": inner })
    };
    assert_eq!(
        params(&plan, "show")["run"]["$text"],
        json!(["head ", edge(0, &["train"]), "/x ", edge(1, &["train", "test"]), " > ${out.top}"])
    );
}

#[test]
fn policy_is_read() {
    let text = r#"
steps:
  rows:
    kind: fetch
    with: { dataset: imdb }
    needs: { cpu: 3, memory: 2GiB, exclusive: true, licence: 2 }
    retry: { times: 2, backoff: 5s }
    timeout: 90s
    checkpoint: 5m
    env: [TOKEN, NOT_SET]
    secrets: [HF_TOKEN]
    salt: 7
"#;
    let plan = good(text);
    let rows = plan.graph.node_weights().next().unwrap();
    let needs = rows.needs();
    assert_eq!((needs.cpu, needs.memory, needs.gpu), (Cpu::N(3), Some(2 << 30), 0));
    assert_eq!((needs.exclusive, needs.named["licence"]), (true, 2));
    let retry = Retry { times: 2, backoff: Duration::from_secs(5) };
    assert_eq!((rows.policy.retry, rows.policy.timeout), (retry, Some(Duration::from_secs(90))));
    let short = good(&text.replace("{ times: 2, backoff: 5s }", "2"));
    let retry = short.graph.node_weights().next().unwrap().policy.retry;
    assert_eq!((retry.times, retry.backoff), (2, Duration::from_secs(1)));
    assert_eq!(rows.policy.checkpoint, Some(Duration::from_secs(300)));
    assert_eq!(rows.policy.secrets, ["HF_TOKEN"]);
    assert_eq!(rows.env["TOKEN"].as_deref(), Some("x"));
    assert_eq!(rows.env["NOT_SET"], None);
    assert_eq!(rows.salt.as_deref(), Some("7"));
    assert_eq!(plan.name, "test", "a pipeline without a name is called as its file");
}

#[test]
fn parameters_can_be_set() {
    let text = r#"
params: { n: 3, deep: { x: a } }
steps:
  one: { kind: command, with: { run: x, values: { n: "${params.n}", x: "${params.deep.x}" } } }
"#;
    let set = |path: &str, raw: &str| {
        let sets = vec![(path.to_owned(), raw.to_owned())];
        plan_with(text, &Settings { sets, ..settings() })
    };
    assert_eq!(
        params(&set("params.n", "[1, no]").unwrap(), "one")["values"]["n"],
        json!([1, "no"])
    );
    let deep = set("params.deep.x", "${params.n}").unwrap();
    assert_eq!(params(&deep, "one")["values"]["x"], json!(3));
    let told = |path: &str, raw: &str| told(text, &set(path, raw).unwrap_err());
    assert!(told("params.m", "1").contains("there is `n`, `deep`"));
    assert!(told("params.depe.x", "1").contains("did you mean `deep`?"));
    assert!(told("n", "1").contains("write `--set params.n=1`"));
    assert!(told("params.n", "[1").contains("not valid YAML"));
    assert!(told("params.deep.y", "1").contains("no such parameter"));
    assert!(told("params.n", "${params.nn}").contains("unknown parameter `nn`"));
}

#[test]
fn warnings_do_not_refuse() {
    let text = r#"
params: { left: 1 }
sweep: { grid: { seed: [1, 1], other: [1] }, exclude: [{ seed: 9 }] }
steps:
  rows: { kind: fetch, with: { dataset: "${sweep.seed}-" } }
"#;
    let plan = good(text);
    insta::assert_snapshot!(told(text, &plan.warnings), @r#"
    2:11 warning: parameter `left` is not used
      at    "left" (not used)
    3:1 warning: the point `other=1,seed=1` stands here twice
      at    "sweep" (taken once)
    3:32 warning: no step reads the axis `other`
      at    "other" (not read)
      help  read it with `${sweep.other}`
    3:56 warning: this excludes no point
      at    "{ seed: 9 }" (matches nothing)
    "#);
    assert_eq!(plan.points.len(), 1);
}

#[test]
fn a_part_of_a_plan() {
    let only = |targets: &[&str]| {
        let targets: Vec<String> = targets.iter().map(|&t| t.to_owned()).collect();
        good(SWEEP).only(&targets)
    };
    let train = only(&["train@lora.r=8"]).unwrap();
    assert_eq!(
        ids(&train),
        ["base", "reviews", "sample", "tokens", "train@lora.alpha=16,lora.r=8"]
    );
    assert_eq!(reads(&train, "tokens"), ["sample", "base.tokenizer"]);
    let outputs: Vec<&str> = train.outputs.iter().map(|o| o.name.as_str()).collect();
    assert_eq!(outputs, ["each@lora.alpha=16,lora.r=8", "words"]);
    assert_eq!(train.graph[train.outputs[0].node].step, "train");
    assert_eq!(only(&["score"]).unwrap().graph.node_count(), 10);
    assert_eq!(only(&[]).unwrap().graph.node_count(), 12);
    let help = |target: &str| flow::source::advice(&only(&[target]).unwrap_err())[0].clone();
    assert_eq!(help("trian"), "did you mean `train`?");
    assert!(help("train@lora.r=9").contains("train@lora."));
}

#[test]
fn schemas_stand_on_their_own() {
    fn each(value: &Value, visit: &mut impl FnMut(&serde_json::Map<String, Value>)) {
        match value {
            Value::Array(items) => items.iter().for_each(|v| each(v, visit)),
            Value::Object(map) => {
                visit(map);
                map.values().for_each(|v| each(v, visit));
            }
            _ => {}
        }
    }
    let pipeline = flow::pipeline::schema(super::toys::KINDS);
    let one = |name: &str| {
        let kind = super::toys::KINDS.iter().find(|k| k.name == name).unwrap();
        flow::pipeline::kind_schema(kind)
    };
    for schema in [&pipeline, &one("train"), &one("fetch")] {
        each(schema, &mut |map| {
            if let Some(target) = map.get("$ref").and_then(Value::as_str) {
                let pointer = target.strip_prefix('#').unwrap();
                assert!(schema.pointer(pointer).is_some(), "{target}");
            }
        });
    }
    let train = one("train");
    let rate = &train["properties"]["learning_rate"]["anyOf"];
    assert_eq!(rate[0]["type"], json!("number"));
    assert_eq!(rate[1], json!({ "type": "string", "pattern": r"\$\{" }));
    assert_eq!(train["properties"]["data"]["type"], json!("string"));
    assert_eq!(train["additionalProperties"], json!(false));
    assert_eq!(train["required"], json!(["data", "model", "method", "learning_rate"]));
    assert_eq!(pipeline["$defs"]["train"]["properties"], train["properties"]);
    let kinds = pipeline.pointer("/properties/steps/additionalProperties/allOf").unwrap();
    assert_eq!(kinds.as_array().unwrap().len(), super::toys::KINDS.len());
    assert_eq!(kinds[0]["then"]["required"], json!(["kind", "with"]));
}

#[test]
fn names_of_outputs_are_names_of_folders() {
    let text = r#"
sweep: { grid: { model: [org/a, "50%"] } }
steps: { base: { kind: model, with: { model: "${sweep.model}" } } }
outputs: { m: "${steps.base}" }
"#;
    let names: Vec<String> = good(text).outputs.into_iter().map(|o| o.name).collect();
    assert_eq!(names, ["m@model=org%2Fa", "m@model=50%25"]);
}

#[test]
fn what_an_axis_leaves_out_is_one_entry() {
    let text = r#"
sweep: { grid: { n: [100] }, include: [{ seed: 3 }] }
steps:
  rows: { kind: fetch, with: { dataset: imdb } }
  some:
    kind: sample
    with:
      data: "${steps.rows}"
      rows: { train: "${sweep.n}", validation: 500 }
      seed: "${sweep.seed}"
  show:
    kind: command
    with: { run: ls, values: { both: "${steps.rows}/${sweep.n}", all: "${steps.some}" } }
"#;
    let plan = good(text);
    assert_eq!(params(&plan, "some@n=100")["rows"], json!({ "train": 100, "validation": 500 }));
    assert_eq!(params(&plan, "some@seed=3")["rows"], json!({ "validation": 500 }));
    // An entry that is left out leaves no edge behind.
    assert_eq!(reads(&plan, "show@n=100"), ["rows", "some@n=100"]);
    assert_eq!(reads(&plan, "show@seed=3"), ["some@seed=3"]);
}

#[test]
fn long_names_of_outputs_are_cut_and_stay_apart() {
    let long = "x".repeat(400);
    let text = format!(
        "sweep: {{ grid: {{ model: [a{long}, b{long}, \"a{long}é\"] }} }}\n\
         steps: {{ base: {{ kind: model, with: {{ model: \"${{sweep.model}}\" }} }} }}\n\
         outputs: {{ m: \"${{steps.base}}\" }}\n"
    );
    let names: Vec<String> = good(&text).outputs.into_iter().map(|o| o.name).collect();
    let distinct: std::collections::BTreeSet<&String> = names.iter().collect();
    assert_eq!(distinct.len(), 3, "{names:?}");
    assert!(names.iter().all(|n| n.len() <= 120 && n.starts_with("m@model=")), "{names:?}");
}

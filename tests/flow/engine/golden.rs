//! What is pinned of every kind: its schema, the key of one step, and what that step makes of one
//! small input. Who changes what a kind does has to raise its `VERSION`, or old results would be
//! taken for new ones.
//!
//! Sums of floats differ in their last bits between processors, so of weights and scores only the
//! form is pinned to the byte, and their magnitude to a hundredth.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context as _, Result, ensure};
use flow::digest::Digest;
use flow::lineage::Record;
use petgraph::Direction::Incoming;
use petgraph::visit::EdgeRef as _;
use safetensors::SafeTensors;
use serde_json::{Value, json};

use super::real;
use super::toys::Bench;

/// Kinds whose files hold what the clock or the machine says.
const TIMED: [&str; 2] = ["benchmark", "compare"];
/// Kinds whose files hold floats that a model computed.
const COMPUTED: [&str; 4] = ["train", "evaluate", "select", "merge"];
/// How far the magnitude of computed floats may be from the pinned one.
const TOLERANCE: f64 = 1e-2;

/// A line of the committed file.
#[derive(Debug, Clone, PartialEq)]
struct Line {
    kind: String,
    version: u32,
    /// The schema, without its descriptions.
    schema: String,
    /// The parameters in the key, edges open.
    key: String,
    /// What is put in: the step as written, and what its producers made.
    input: String,
    /// What comes out.
    output: String,
    /// Sum of the floats in a file, without signs, by port and file.
    magnitudes: Magnitudes,
}

type Magnitudes = BTreeMap<String, f64>;

/// Whether floats are as large as they were, as far as processors agree.
fn close(old: &Magnitudes, new: &Magnitudes) -> bool {
    let near = |(a, b): (&f64, &f64)| (a - b).abs() <= TOLERANCE * a.abs();
    old.keys().eq(new.keys()) && old.values().zip(new.values()).all(near)
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, version, schema, key, input, output, magnitudes } = self;
        write!(f, "{kind} v{version} schema {schema} key {key} input {input} output {output}")?;
        magnitudes.iter().try_for_each(|(file, sum)| write!(f, " {file} {sum:.3e}"))
    }
}

impl FromStr for Line {
    type Err = anyhow::Error;

    fn from_str(line: &str) -> Result<Self> {
        let words: Vec<&str> = line.split(' ').collect();
        let [kind, version, _, schema, _, key, _, input, _, output, ref sums @ ..] = words[..]
        else {
            anyhow::bail!("`{line}` is no line of the golden file");
        };
        let version = version.strip_prefix('v').context("a version")?.parse()?;
        let [schema, key, input, output] = [schema, key, input, output].map(str::to_owned);
        let sums = sums.chunks_exact(2).map(|pair| Ok((pair[0].to_owned(), pair[1].parse()?)));
        let magnitudes = sums.collect::<Result<_>>()?;
        Ok(Self { kind: kind.into(), version, schema, key, input, output, magnitudes })
    }
}

/// Whether a kind's line may take the place of the old one; the error says what to do instead.
fn judge(old: Option<&Line>, new: &Line) -> Result<()> {
    let Some(old) = old else { return Ok(()) };
    let kind = &new.kind;
    ensure!(new.version >= old.version, "`{kind}`: a VERSION that was used is never used again");
    if new.version > old.version {
        return Ok(());
    }
    let same_output = old.output == new.output && close(&old.magnitudes, &new.magnitudes);
    ensure!(
        old.input != new.input || same_output,
        "`{kind}` makes other bytes of the same input, and stores hold what it made before: raise \
         its VERSION"
    );
    ensure!(
        old.input != new.input || old.key == new.key,
        "the same step of `{kind}` has another key, so all that was made before is made again: \
         name the new field in `StepKind::ADDED` with the value that means what was done before \
         it, or raise its VERSION"
    );
    Ok(())
}

/// Whether two lines say the same, as far as processors agree.
fn same(old: &Line, new: &Line) -> bool {
    let rest = Line { magnitudes: old.magnitudes.clone(), ..new.clone() };
    close(&old.magnitudes, &new.magnitudes) && *old == rest
}

fn short(domain: &str, value: &Value) -> String {
    Digest::of_value(domain, value).unwrap().short()
}

/// A schema without what may change freely.
fn fields(value: &Value) -> Value {
    match value {
        Value::Object(map) => map
            .iter()
            .filter(|(key, _)| *key != "description" && *key != "title")
            .map(|(key, value)| (key.clone(), fields(value)))
            .collect(),
        Value::Array(items) => items.iter().map(fields).collect(),
        plain => plain.clone(),
    }
}

/// The form of some JSON: numbers, and on request words, are only what they are.
fn form(value: &Value, words: bool, magnitude: &mut f64) -> Value {
    match value {
        Value::Number(n) => {
            *magnitude += n.as_f64().filter(|_| n.is_f64()).unwrap_or_default().abs();
            json!("a number")
        }
        Value::String(_) if !words => json!("a word"),
        Value::Array(items) => items.iter().map(|v| form(v, words, magnitude)).collect(),
        Value::Object(map) => {
            map.iter().map(|(k, v)| (k.clone(), form(v, words, magnitude))).collect()
        }
        plain => plain.clone(),
    }
}

/// What is pinned of a file of an output.
fn describe(kind: &str, path: &Path, magnitude: &mut f64) -> Value {
    let bytes = std::fs::read(path).unwrap();
    let computed = COMPUTED.contains(&kind) || TIMED.contains(&kind);
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
    match extension {
        "safetensors" => {
            let tensors = SafeTensors::deserialize(&bytes).unwrap();
            let mut all: Vec<_> = tensors.tensors();
            all.sort_by(|a, b| a.0.cmp(&b.0));
            let described = all.iter().map(|(name, tensor)| {
                let floats = tensor.data().chunks_exact(4);
                let floats = floats.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]).abs());
                *magnitude += floats.map(f64::from).sum::<f64>();
                json!([name, format!("{:?}", tensor.dtype()), tensor.shape()])
            });
            described.collect()
        }
        "json" if computed => {
            let words = !TIMED.contains(&kind);
            form(&serde_json::from_slice(&bytes).unwrap(), words, magnitude)
        }
        "jsonl" if computed => json!(bytes.split(|b| *b == b'\n').count()),
        "md" if computed => json!("for people"),
        _ => json!(Digest::of(&bytes).to_string()),
    }
}

/// What is pinned of a record's output, by port and path.
fn output(bench: &Bench, record: &Record, magnitudes: &mut Magnitudes) -> Value {
    let store = bench.store();
    let ports = record.ports.iter().map(|(port, tree)| {
        let tree = store.tree(tree).unwrap().unwrap();
        let files = tree.entries.iter().map(|entry| {
            let mut named = store.locate_entry(entry).unwrap().unwrap();
            if named.starts_with(store.root()) {
                let dir = tempfile::tempdir_in(bench.path("store")).unwrap().keep();
                let to = dir.join(entry.path.replace('/', "_"));
                store.materialise_entry(entry, &to).unwrap();
                named = to;
            }
            let mut sum = 0.0;
            let form = describe(&record.kind, &named, &mut sum);
            if sum > 0.0 && !TIMED.contains(&record.kind.as_str()) {
                *magnitudes.entry(format!("{port}/{}", entry.path)).or_default() += sum;
            }
            (entry.path.clone(), form)
        });
        (port.clone(), files.collect::<Value>())
    });
    ports.collect()
}

/// Runs the pipeline, and says what is to be pinned.
fn lines() -> Vec<Line> {
    let bench = real::bench();
    let steps = real::steps();
    let text = real::pipeline(&steps);
    let run = bench.run(&text);
    assert_eq!(run.outcome.hits + run.outcome.ran, run.outcome.steps.len(), "{:?}", run.events);
    let plan = bench.plan(&text);
    let records = Record::all(&bench.store()).unwrap();
    let mut outputs: BTreeMap<String, (Value, Magnitudes)> = BTreeMap::new();
    for record in &records {
        let mut magnitudes = Magnitudes::new();
        let value = output(&bench, record, &mut magnitudes);
        outputs.insert(record.made.step.clone(), (value, magnitudes));
    }
    let order = plan.order();
    let line = |kind: &flow::step::Kind| {
        let of_kind: Vec<_> =
            order.iter().filter(|n| plan.graph[**n].kind.name == kind.name).collect();
        assert!(!of_kind.is_empty(), "`{}` has no step in tests/flow/engine/real.rs", kind.name);
        let (mut keys, mut inputs, mut made) = (Vec::new(), Vec::new(), Vec::new());
        let mut magnitudes = Magnitudes::new();
        for &&node in &of_kind {
            let instance = &plan.graph[node];
            let mut producers: BTreeSet<&str> = plan
                .graph
                .edges_directed(node, Incoming)
                .map(|e| plan.graph[e.source()].id.0.as_str())
                .collect();
            if kind.name == "model" {
                // The folder that it reads is a copy of what this step makes.
                producers.insert("blank");
            }
            let read: Vec<&Value> = producers.iter().map(|id| &outputs[*id].0).collect();
            keys.push(instance.parsed.key_params());
            inputs.push(json!([steps[&instance.step], read, real::content()]));
            let (value, sums) = &outputs[&instance.id.0];
            made.push(value.clone());
            for (file, sum) in sums {
                *magnitudes.entry(file.clone()).or_default() += sum;
            }
        }
        Line {
            kind: kind.name.into(),
            version: kind.version,
            schema: short("flow/schema/v1", &fields(&(kind.schema)())),
            key: short("flow/golden-key/v1", &json!(keys)),
            input: short("flow/golden-input/v1", &json!(inputs)),
            output: short("flow/golden-output/v1", &json!(made)),
            magnitudes,
        }
    };
    flow::kinds::ALL.iter().map(line).collect()
}

fn committed() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/flow/golden.txt")
}

#[test]
fn every_kind_makes_what_its_version_made() {
    let text = std::fs::read_to_string(committed()).unwrap_or_default();
    let old: Vec<Line> = text.lines().map(|l| l.parse().unwrap()).collect();
    let new = lines();
    let before = |kind: &str| old.iter().find(|l| l.kind == kind);
    let refused: Vec<String> = new
        .iter()
        .filter_map(|line| judge(before(&line.kind), line).err())
        .map(|e| e.to_string())
        .collect();
    assert!(refused.is_empty(), "{}", refused.join("\n"));
    let fresh = |line: &Line| before(&line.kind).filter(|old| same(old, line)).cloned();
    let text_of = |line: &Line| fresh(line).unwrap_or_else(|| line.clone()).to_string() + "\n";
    let wanted: String = new.iter().map(text_of).collect();
    if wanted == text {
        return;
    }
    assert!(
        std::env::var_os("FLOW_BLESS").is_some(),
        "kinds changed in a way that keeps every key and result right; `FLOW_BLESS=1 cargo test \
         golden` takes this down:\n{wanted}"
    );
    std::fs::write(committed(), wanted).unwrap();
}

#[test]
fn a_change_without_another_version_cannot_be_blessed() {
    let old: Line = "train v1 schema aa key bb input cc output dd w/x 2e0".parse().unwrap();
    assert_eq!(old.to_string().parse::<Line>().unwrap(), old);
    assert!(!close(&old.magnitudes, &Magnitudes::new()));
    let refused = |change: &dyn Fn(&mut Line)| {
        let mut new = old.clone();
        change(&mut new);
        judge(Some(&old), &new).err().map(|e| e.to_string()).unwrap_or_default()
    };
    // Documentation, a wider range, a field that is left out of the key at its legacy value.
    assert_eq!(refused(&|l| l.schema = "ee".into()), "");
    assert!(refused(&|l| l.output = "ee".into()).contains("raise its VERSION"));
    assert!(
        refused(&|l| *l.magnitudes.get_mut("w/x").unwrap() = 2.1).contains("raise its VERSION")
    );
    assert_eq!(refused(&|l| *l.magnitudes.get_mut("w/x").unwrap() = 2.001), "");
    let field = |l: &mut Line| (l.schema, l.key) = ("ee".into(), "ff".into());
    assert!(refused(&field).contains("StepKind::ADDED"));
    // What a producer's new version gives is no change of this kind.
    assert_eq!(refused(&|l| (l.input, l.output) = ("ee".into(), "ff".into())), "");
    let raised = |l: &mut Line| {
        field(l);
        (l.version, l.output) = (2, "gg".into());
    };
    assert_eq!(refused(&raised), "");
    assert!(refused(&|l| l.version = 0).contains("never used again"));
    assert!(judge(None, &old).is_ok());
}

//! Makes results again, in scratch, and compares them with those on record.
//!
//! Every step gets the inputs that are on record, from the store or because they were just made
//! again to the bit, so that one difference does not spoil what follows. Only where those bytes
//! are nowhere (another machine, a producer that gave something else) does a step read what its
//! producer gave now; that producer is named then.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use petgraph::Direction;
use petgraph::graph::NodeIndex;
use serde::Serialize;

use super::attempt::{Around, Failure, Reply, Said, Task, attempt, trees_read};
use super::bind::{Bound, bind};
use super::prepare::{Prepared, prepare};
use super::retry::pause;
use super::scratch::{self, Scratch};
use super::slots::Slots;
use super::worker::{Program, attempt_in_worker};
use super::{Options, RunEvent, Session, machine};
use crate::artifact::{Comparison, Likeness, Place, Tolerance, View, compare};
use crate::digest::Digest;
use crate::lineage::{Change, Loaded, Record, difference, is_measured};
use crate::pipeline::Plan;
use crate::source::Fault;
use crate::step::{Dirs, Event, Step};
use crate::store::Spares;

/// Lines of a failed step's log that are shown.
const TAIL_LINES: usize = 20;

/// How far the floats of a step that runs a model may deviate: sums of many terms, taken in
/// another order on another machine, and carried on by an optimizer.
const MODEL: Tolerance = Tolerance { relative: 1e-3, absolute: 1e-5 };

/// How far those of any other step may: a few roundings.
const PLAIN: Tolerance = Tolerance { relative: 1e-6, absolute: 1e-9 };

/// A step that was made again.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Reproduced {
    /// Instance.
    pub step: String,
    /// Kind.
    pub kind: String,
    /// Its key on record.
    pub key: Digest,
    /// How it compares.
    #[serde(flatten)]
    pub verdict: Verdict,
    /// Producers whose result of now it read, because those on record are nowhere.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub inputs_from: Vec<String>,
    /// What floats were allowed.
    pub tolerance: Tolerance,
    /// Wall-clock seconds; 0 if it did not run.
    pub seconds: f64,
}

/// How a result compares with the one on record.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "verdict", rename_all = "snake_case")]
pub enum Verdict {
    /// It was made and compared.
    Compared(Comparison),
    /// It is a measurement (of time, of memory), or was made from some: it ran, and nothing is
    /// held against it.
    Measured,
    /// It could not be compared.
    Unchecked {
        /// Why not.
        because: String,
    },
    /// It failed.
    Failed {
        /// What went wrong.
        message: String,
    },
}

impl Verdict {
    /// Whether it is what was recorded, as far as can be said.
    pub fn holds(&self) -> bool {
        match self {
            Self::Compared(comparison) => comparison.likeness < Likeness::Different,
            Self::Measured | Self::Unchecked { .. } => true,
            Self::Failed { .. } => false,
        }
    }
}

/// Makes every recorded step of a plan again (or the targets of the session's options) and
/// compares. `recorded` holds what each instance gave, by id; a pre-image that is null is not
/// known. The lock must not grow. Nothing in the store is replaced: what gives other bytes is
/// noted in the ledger of its key. Steps run one after the other.
///
/// # Errors
/// When the plan is not what was recorded (a key differs: the message names the typed
/// differences), when it cannot be resolved, or when the store cannot be read.
pub fn reproduce(
    plan: &Plan,
    session: &Session<'_>,
    recorded: &BTreeMap<String, Record>,
    tolerance: Option<Tolerance>,
    observe: &mut dyn FnMut(&RunEvent),
) -> Result<Vec<Reproduced>> {
    let asked = &session.options.targets;
    let targets = if asked.is_empty() { recorded.keys().cloned().collect() } else { asked.clone() };
    let options = Options { targets, force: Vec::new(), locked: true, ..session.options.clone() };
    let (store, hub, cancel) = (session.store.clone(), session.hub, session.cancel);
    let session = &Session { store, hub, cancel, options };
    let prepared = prepare(plan, session, false)?;
    let mut expected = BTreeMap::new();
    for &node in &prepared.order {
        let id = &plan.graph[node].id.0;
        let record = recorded.get(id).ok_or_else(|| {
            let fault = Fault::new(format!("nothing is recorded of `{id}`"));
            fault.help("run the whole pipeline once, and compare with that")
        })?;
        expected.insert(node, record.clone());
    }
    let bounds = bound(plan, &prepared, &expected, session)?;
    let chosen = chosen(plan, &prepared, &bounds, &expected, session, asked)?;
    let program = session.options.worker.as_ref();
    let program = program.map(|command| Program::of(command, &session.store)).transpose()?;
    scratch::sweep(&session.store);
    let scratch = Scratch::new(&session.store, "reproduce")?;
    let nodes: Vec<NodeIndex> =
        prepared.order.iter().copied().filter(|n| chosen.contains(n)).collect();
    observe(&RunEvent::RunStarted {
        run: scratch.name.clone(),
        pipeline: plan.name.clone(),
        steps: nodes.iter().map(|n| plan.graph[*n].id.0.clone()).collect(),
        jobs: session.options.jobs,
    });
    let mut work = Work {
        plan,
        session,
        prepared: &prepared,
        program: program.as_ref(),
        scratch: &scratch,
        expected: &expected,
        tolerance,
        observe,
        made: BTreeMap::new(),
    };
    nodes.into_iter().map(|node| work.step(node, &bounds[&node])).collect()
}

/// Every step bound to what is on record for its producers, after a check that this gives the
/// keys on record.
fn bound(
    plan: &Plan,
    prepared: &Prepared,
    expected: &BTreeMap<NodeIndex, Record>,
    session: &Session<'_>,
) -> Result<BTreeMap<NodeIndex, Bound>> {
    let mut bounds = BTreeMap::new();
    let mut changed = Vec::new();
    for &node in &prepared.order {
        let (instance, record) = (&plan.graph[node], &expected[&node]);
        let step = prepared.steps[&node].as_ref();
        let bound = bind(plan, node, step, expected, &session.options)?;
        let mut changes = Vec::new();
        if bound.key != record.key && record.preimage.is_null() {
            let (old, new) = (&record.kind, instance.kind.name);
            if old != new {
                changes.push(format!("kind {old} -> {new}"));
            } else if record.version != instance.kind.version {
                changes.push(format!("version {} -> {}", record.version, instance.kind.version));
            }
            if changes.is_empty() && !instance.kind.reads_records {
                changes.push("parameters, files, environment or device".to_owned());
            }
        } else if bound.key != record.key {
            let all = difference(&record.preimage, &bound.preimage, &bound.sources);
            // Times of another machine, in the key of a kind that reads them.
            let timed = |c: &Change| instance.kind.reads_records && c.path.ends_with(".record");
            changes.extend(all.iter().filter(|c| !timed(c)).map(ToString::to_string));
        }
        if !changes.is_empty() {
            changed.push(format!("{}: {}", instance.id, changes.join("; ")));
        }
        bounds.insert(node, bound);
    }
    if changed.is_empty() {
        return Ok(bounds);
    }
    let n = changed.len();
    let (s, are) = if n == 1 { ("", "is") } else { ("s", "are") };
    let file = plan.file.display();
    let fault = Fault::new(format!("{n} step{s} of {file} {are} not what was recorded"));
    let fault = fault.help("put the pipeline back as it was, or record it anew");
    Err(fault.cause(anyhow::anyhow!(changed.join("\n           "))).into())
}

/// The steps to make: those asked for, and the producers of what they read that is nowhere.
fn chosen(
    plan: &Plan,
    prepared: &Prepared,
    bounds: &BTreeMap<NodeIndex, Bound>,
    expected: &BTreeMap<NodeIndex, Record>,
    session: &Session<'_>,
    asked: &[String],
) -> Result<BTreeSet<NodeIndex>> {
    if asked.is_empty() {
        return Ok(prepared.order.iter().copied().collect());
    }
    let mut left = Vec::new();
    for target in asked {
        left.extend(plan.targets(target)?);
    }
    let mut chosen = BTreeSet::new();
    while let Some(node) = left.pop() {
        if !chosen.insert(node) {
            continue;
        }
        for tree in trees_read(&bounds[&node].step.params()) {
            if session.store.missing(&tree)?.is_some() {
                let producers = plan.graph.neighbors_directed(node, Direction::Incoming);
                let made = |p: &NodeIndex| expected[p].ports.values().any(|t| *t == tree);
                left.extend(producers.filter(made));
            }
        }
    }
    Ok(chosen)
}

/// Steps being made again.
struct Work<'a, 's> {
    plan: &'a Plan,
    session: &'a Session<'s>,
    prepared: &'a Prepared,
    program: Option<&'a Program<'a>>,
    scratch: &'a Scratch,
    /// What is on record.
    expected: &'a BTreeMap<NodeIndex, Record>,
    tolerance: Option<Tolerance>,
    observe: &'a mut dyn FnMut(&RunEvent),
    /// What was made again.
    made: BTreeMap<NodeIndex, Record>,
}

/// What a step reads.
enum Feed {
    /// What is on record.
    Recorded,
    /// Of these producers what they gave now.
    Now(Vec<NodeIndex>),
    /// This producer gave nothing.
    Nothing(NodeIndex),
}

impl Work<'_, '_> {
    fn id(&self, node: NodeIndex) -> &str {
        &self.plan.graph[node].id.0
    }

    fn step(&mut self, node: NodeIndex, bound: &Bound) -> Result<Reproduced> {
        let (instance, record) = (&self.plan.graph[node], &self.expected[&node]);
        let mut reproduced = Reproduced {
            step: instance.id.0.clone(),
            kind: instance.kind.name.to_owned(),
            key: record.key,
            verdict: Verdict::Measured,
            inputs_from: Vec::new(),
            tolerance: self.tolerance.unwrap_or(PLAIN),
            seconds: 0.0,
        };
        let unchecked = |because: String| Verdict::Unchecked { because };
        if self.session.cancel.load(Ordering::Relaxed) {
            reproduced.verdict = unchecked("it was stopped before".into());
            return Ok(reproduced);
        }
        let other;
        let mut bound = bound;
        match self.feed(node, bound)? {
            Feed::Recorded => {}
            Feed::Nothing(producer) => {
                reproduced.verdict = unchecked(format!("{} gave nothing", self.id(producer)));
                return Ok(reproduced);
            }
            Feed::Now(producers) => {
                let mut records = self.expected.clone();
                for producer in producers {
                    records.insert(producer, self.made[&producer].clone());
                    reproduced.inputs_from.push(self.id(producer).to_owned());
                }
                let step = self.prepared.steps[&node].as_ref();
                other = bind(self.plan, node, step, &records, &self.session.options)?;
                bound = &other;
            }
        }
        if instance.kind.runs_model || !reproduced.inputs_from.is_empty() {
            reproduced.tolerance = self.tolerance.unwrap_or(MODEL);
        }
        let made = match self.execute(node, bound)? {
            Reply::Made { record, .. } | Reply::Taken { record } => record,
            Reply::Failed(failure) => {
                reproduced.verdict = match self.session.cancel.load(Ordering::Relaxed) {
                    true => unchecked("it was stopped".into()),
                    false => Verdict::Failed { message: failure.message },
                };
                return Ok(reproduced);
            }
        };
        reproduced.seconds = made.made.seconds;
        if !instance.kind.measures {
            reproduced.verdict = self.judge(node, bound, &made, &reproduced)?;
        }
        self.made.insert(node, *made);
        Ok(reproduced)
    }

    /// Makes a step's inputs readable in the scratch store.
    fn feed(&self, node: NodeIndex, bound: &Bound) -> Result<Feed> {
        let mut nowhere = BTreeSet::new();
        for tree in trees_read(&bound.step.params()) {
            if !self.scratch.lend(&tree)? {
                nowhere.insert(tree);
            }
        }
        if nowhere.is_empty() {
            return Ok(Feed::Recorded);
        }
        let mut producers = Vec::new();
        for producer in self.plan.graph.neighbors_directed(node, Direction::Incoming) {
            if self.expected[&producer].ports.values().any(|tree| nowhere.contains(tree)) {
                if !self.made.contains_key(&producer) {
                    return Ok(Feed::Nothing(producer));
                }
                producers.push(producer);
            }
        }
        producers.sort_unstable();
        producers.dedup();
        Ok(Feed::Now(producers))
    }

    /// Runs a step in the scratch store, as often as a run would.
    fn execute(&mut self, node: NodeIndex, bound: &Bound) -> Result<Reply> {
        let (instance, options) = (&self.plan.graph[node], &self.session.options);
        let step = instance.id.0.clone();
        let needs = options.needs(instance);
        let mut slots = Slots::new(options);
        let grant = match options.allows(&needs) {
            Ok(()) => slots.take(&needs).context("the machine has no slot for one step")?,
            Err(fault) => return Ok(self.failed(&step, Failure::of(&fault.into()), None)),
        };
        let mut task = Task {
            run: self.scratch.name.clone(),
            pipeline: self.plan.name.clone(),
            ..Task::of(instance, bound, options, &grant)
        };
        let retry = instance.policy.retry;
        loop {
            let (reply, log) = self.attempt(&task, bound.step.as_ref())?;
            let failure = match reply {
                Reply::Failed(failure) => failure,
                Reply::Made { record, .. } | Reply::Taken { record } => {
                    let (key, facts) = (record.key, record.facts.clone());
                    let (seconds, taken, differs) = (record.made.seconds, false, Vec::new());
                    let done = RunEvent::Finished { step, key, seconds, facts, taken, differs };
                    (self.observe)(&done);
                    return Ok(Reply::Taken { record });
                }
            };
            let stopped = || self.session.cancel.load(Ordering::Relaxed);
            let attempt = task.attempt;
            if attempt > retry.times || failure.store || failure.keep || stopped() {
                return Ok(self.failed(&step, failure, Some(&log)));
            }
            let pause = pause(retry, &task.key, attempt);
            let (of, in_seconds) = (retry.times + 1, pause.as_secs_f64());
            let (step, message) = (step.clone(), failure.message);
            (self.observe)(&RunEvent::Retrying { step, attempt, of, message, in_seconds });
            let since = Instant::now();
            while since.elapsed() < pause && !stopped() {
                std::thread::sleep(Duration::from_millis(20).min(pause));
            }
            task.attempt += 1;
        }
    }

    /// One attempt, and where its log is.
    fn attempt(&mut self, task: &Task, step: &dyn Step) -> Result<(Reply, PathBuf)> {
        let options = &self.session.options;
        let store = &self.scratch.store;
        let dir = scratch::path(store, &task.run, &task.key);
        store.disk().create_dir_all(&dir)?;
        let log_path = dir.with_extension("log");
        let mut log = store.disk().open_append(&log_path)?;
        (self.observe)(&RunEvent::Started {
            step: task.step.clone(),
            attempt: task.attempt,
            threads: task.threads,
            gpus: task.gpus.clone(),
        });
        let (program, session) = (self.program, self.session);
        let (send, receive) = channel();
        let reply = std::thread::scope(|scope| {
            let (dir, log_path) = (&dir, &log_path);
            let running = scope.spawn(move || {
                let say = |said| {
                    // Nobody listens only when all has been given up.
                    let _ = send.send(said);
                };
                let around = Around {
                    store,
                    hub: session.hub,
                    cancel: session.cancel,
                    dirs: &Dirs::default(),
                    spares: &Spares::default(),
                    grace: options.grace,
                    say: &say,
                    secrets: task.secrets_in(options),
                    alone: false,
                    build: machine::BUILD,
                };
                match program.filter(|_| step.isolate()) {
                    Some(program) => {
                        attempt_in_worker(task, dir, log_path, program, options, &around)
                    }
                    None => attempt(task, step, dir, &around),
                }
            });
            for said in &receive {
                let Said::Event(event) = said else { continue };
                if let Event::Log { line } = &event {
                    store.disk().append(&mut log, format!("{line}\n").as_bytes(), log_path)?;
                }
                (self.observe)(&RunEvent::Step { step: task.step.clone(), event });
            }
            anyhow::Ok(running.join())
        })?;
        let panicked = |_| anyhow::anyhow!("the attempt at {} panicked", task.step);
        let reply = reply.map_err(panicked)?;
        // What cannot be removed now goes with the scratch store.
        let _ = store.disk().remove_dir_all(&dir);
        Ok((reply, log_path))
    }

    fn failed(&mut self, step: &str, failure: Failure, log: Option<&Path>) -> Reply {
        let log = log.and_then(|path| std::fs::read(path).ok()).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<String> = log.lines().map(str::to_owned).collect();
        (self.observe)(&RunEvent::Failed {
            step: step.to_owned(),
            message: failure.message.clone(),
            chain: failure.chain.clone(),
            help: failure.help.clone(),
            log_tail: lines[lines.len().saturating_sub(TAIL_LINES)..].to_vec(),
            log_path: None,
        });
        Reply::Failed(failure)
    }

    /// Compares what was made with what is on record, and notes a difference in the ledger.
    fn judge(
        &self,
        node: NodeIndex,
        bound: &Bound,
        made: &Record,
        reproduced: &Reproduced,
    ) -> Result<Verdict> {
        let (kind, record) = (&self.plan.graph[node].kind, &self.expected[&node]);
        let real = &self.session.store;
        let view = |record: &Record, store: &crate::store::Store| View {
            ty: record.ty,
            ports: record.ports.clone(),
            store: store.clone(),
        };
        let old = view(record, real);
        let new = view(made, &self.scratch.store);
        let mut comparison = compare(&old, &new, &reproduced.tolerance)?;
        if bound.key == record.key
            && let Loaded::Found(first) = Record::load(real, &record.key)?
            && first.ports != made.ports
        {
            made.note_difference(real, made.metrics(&self.scratch.store))?;
        }
        if comparison.likeness == Likeness::BitIdentical {
            return Ok(Verdict::Compared(comparison));
        }
        if kind.reads_records && bound.key != record.key {
            return Ok(Verdict::Measured);
        }
        // Numbers of a model say how alike two are; counts of rows say nothing about the rows.
        if comparison.unread.is_some() && kind.runs_model {
            self.judge_by_metrics(record, made, reproduced.tolerance, &mut comparison);
        } else if comparison.unread.is_some() && !reproduced.inputs_from.is_empty() {
            let from = reproduced.inputs_from.join(", ");
            let because = format!("it read another result of {from}; only digests are known");
            return Ok(Verdict::Unchecked { because });
        }
        Ok(Verdict::Compared(comparison))
    }

    /// Where only digests and metrics are known of what is on record, the metrics decide.
    fn judge_by_metrics(
        &self,
        record: &Record,
        made: &Record,
        tolerance: Tolerance,
        comparison: &mut Comparison,
    ) {
        let (old, new) = (record.metrics(&self.session.store), made.metrics(&self.scratch.store));
        let mut floats = 0;
        for (name, old) in old.iter().filter(|(name, _)| !is_measured(name)) {
            let new = new.get(name);
            let both = old.as_f64().zip(new.and_then(serde_json::Value::as_f64));
            let float = old.is_f64();
            floats += usize::from(float);
            let same = match both {
                Some((old, new)) if float => tolerance.allows(old, new),
                _ => Some(old) == new,
            };
            if !same {
                let text = |v: Option<&serde_json::Value>| {
                    v.map_or_else(|| "absent".into(), ToString::to_string)
                };
                let (old, new) = (text(Some(old)), text(new));
                let (file, at) = ("metrics".to_owned(), name.clone());
                comparison.first = Some(Place { file, at, old, new });
                return;
            }
        }
        if floats > 0 {
            comparison.likeness = Likeness::WithinTolerance;
            comparison.first = None;
        }
    }
}

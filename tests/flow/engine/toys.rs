//! Toy kinds, and a bench that runs pipelines of them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Result, bail};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use flow::artifact::{Files, Type};
use flow::digest::Digest;
use flow::engine::{self, Options, Outcome, RunEvent, Session, WorkerCommand};
use flow::hub::{Hub, HubSettings};
use flow::lineage::State;
use flow::pipeline::{Plan, Settings};
use flow::source::Source;
use flow::step::{Context, Cpu, FileInput, Gather, Input, Kind, Needs, Outside, Ports, StepKind};
use flow::store::{Disk, Store};

/// Writes each text as a port.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Emit {
    texts: BTreeMap<String, String>,
}

impl StepKind for Emit {
    const NAME: &'static str = "emit";
    const VERSION: u32 = 1;
    fn ports(&self) -> Ports {
        Ports::named(Type::Files, self.texts.keys())
    }
    fn isolate(&self) -> bool {
        false
    }
    fn run(&self, cx: &mut Context<'_>) -> Result<()> {
        for (port, text) in &self.texts {
            std::fs::write(cx.out_dir(port)?.join("text"), text)?;
        }
        cx.fact("ports", self.texts.len());
        Ok(())
    }
}

/// Upper-cases what it reads; `only` narrows it to some ports.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Upper {
    data: Input<Files>,
    #[serde(default)]
    only: Option<Vec<String>>,
    #[serde(default)]
    suffix: String,
}

impl StepKind for Upper {
    const NAME: &'static str = "upper";
    const VERSION: u32 = 1;
    fn ports(&self) -> Ports {
        let names = self.only.clone().or_else(|| self.data.names());
        Ports::like(Type::Files, names.as_deref())
    }
    fn narrow(&mut self) {
        if let Some(only) = &self.only {
            let only: Vec<&str> = only.iter().map(String::as_str).collect();
            self.data.keep(&only);
        }
    }
    fn isolate(&self) -> bool {
        false
    }
    fn run(&self, cx: &mut Context<'_>) -> Result<()> {
        let Files(view) = cx.open(&self.data)?;
        for port in view.ports.keys() {
            let text = std::fs::read_to_string(view.file(port, "text")?)?;
            let text = text.trim().to_uppercase() + &self.suffix;
            std::fs::write(cx.out_dir(port)?.join("text"), text)?;
        }
        Ok(())
    }
}

/// Joins all points of a step.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Join {
    parts: Gather<Files>,
}

impl StepKind for Join {
    const NAME: &'static str = "join";
    const VERSION: u32 = 1;
    const READS_RECORDS: bool = true;
    fn ports(&self) -> Ports {
        Ports::named(Type::Files, ["all"])
    }
    fn isolate(&self) -> bool {
        false
    }
    fn run(&self, cx: &mut Context<'_>) -> Result<()> {
        let mut all = String::new();
        for member in &self.parts.members {
            anyhow::ensure!(member.input.facts.as_ref().is_some_and(|f| f.contains_key("seconds")));
            let view = cx.view(&member.input)?;
            for port in view.ports.keys() {
                all += &std::fs::read_to_string(view.file(port, "text")?)?;
                all.push('\n');
            }
        }
        std::fs::write(cx.out_dir("all")?.join("text"), all)?;
        Ok(())
    }
}

/// Sleeps, and stops when it is told to.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Nap {
    ms: u64,
    #[serde(default)]
    after: Vec<Input<Files>>,
    #[serde(default = "one")]
    cpu: usize,
    #[serde(default)]
    gpu: usize,
    #[serde(default)]
    exclusive: bool,
    #[serde(default)]
    name: String,
    #[serde(default)]
    isolated: bool,
    /// Ends its own process.
    #[serde(default)]
    die: bool,
    /// Says that its work is done before it sleeps.
    #[serde(default)]
    rests: bool,
    /// Fails this often, by a count in this file.
    #[serde(default)]
    flaky: Option<(PathBuf, usize)>,
}

fn one() -> usize {
    1
}

impl StepKind for Nap {
    const NAME: &'static str = "nap";
    const VERSION: u32 = 1;
    fn ports(&self) -> Ports {
        Ports::named(Type::Files, ["done"])
    }
    fn needs(&self) -> Needs {
        let cpu = if self.cpu == 0 { Cpu::All } else { Cpu::N(self.cpu) };
        Needs { cpu, gpu: self.gpu, exclusive: self.exclusive, ..Needs::ONE }
    }
    fn isolate(&self) -> bool {
        self.isolated
    }
    fn run(&self, cx: &mut Context<'_>) -> Result<()> {
        cx.log(format!("napping for {} ms", self.ms));
        cx.metric("nap/ms", 1, 1.5);
        if self.die {
            println!("last words");
            let own = rustix::process::getpid();
            rustix::process::kill_process(own, rustix::process::Signal::KILL)?;
        }
        if let Some((path, times)) = &self.flaky {
            let failed = std::fs::read_to_string(path).unwrap_or_default().len();
            if failed < *times {
                std::fs::write(path, "x".repeat(failed + 1))?;
                bail!("flaky for the {}. time", failed + 1);
            }
        }
        if self.rests {
            (cx.rest)();
        }
        for done in 0..self.ms.div_ceil(5) {
            cx.stop()?;
            cx.progress(done * 5, self.ms, "ms", "");
            std::thread::sleep(Duration::from_millis(5));
        }
        if let Some(value) = cx.env.get("NAP_ENV").cloned() {
            cx.fact("env", value);
        }
        cx.fact("gpus", std::env::var("CUDA_VISIBLE_DEVICES").unwrap_or_default());
        cx.fact("undeclared", std::env::var("UNDECLARED").unwrap_or_default());
        std::fs::write(cx.out_dir("done")?.join("text"), &self.name)?;
        Ok(())
    }
}

/// Goes wrong in a named way.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Wrong {
    way: String,
    #[serde(default)]
    data: Option<Input<Files>>,
}

impl StepKind for Wrong {
    const NAME: &'static str = "wrong";
    const VERSION: u32 = 1;
    fn ports(&self) -> Ports {
        Ports::named(Type::Files, ["done"])
    }
    fn isolate(&self) -> bool {
        false
    }
    fn check_inputs(&self, _cx: &Context<'_>) -> Result<()> {
        anyhow::ensure!(self.way != "input", "the input does not fit");
        Ok(())
    }
    fn run(&self, cx: &mut Context<'_>) -> Result<()> {
        match self.way.as_str() {
            "error" => {
                let fault = flow::source::Fault::new("it cannot be done").help("do it otherwise");
                Err(anyhow::Error::from(fault).context("while doing it"))
            }
            "panic" => panic!("out of cheese"),
            "port" => cx.out_dir("else").map(|_| ()),
            "nothing" => Ok(()),
            "random" => {
                let nanos = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
                std::fs::write(cx.out_dir("done")?.join("text"), nanos.as_nanos().to_string())?;
                Ok(())
            }
            _ => {
                std::fs::write(cx.out_dir("done")?.join("text"), "fine")?;
                Ok(())
            }
        }
    }
}

/// Copies a local file; `meddle` writes to it meanwhile.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Take {
    file: FileInput,
    #[serde(default)]
    meddle: bool,
    #[serde(default)]
    refer: bool,
}

impl StepKind for Take {
    const NAME: &'static str = "take";
    const VERSION: u32 = 1;
    fn ports(&self) -> Ports {
        Ports::named(Type::Files, ["file"])
    }
    fn resolve(&mut self, outside: &mut Outside<'_>) -> Result<()> {
        outside.file(&mut self.file)
    }
    fn isolate(&self) -> bool {
        false
    }
    fn run(&self, cx: &mut Context<'_>) -> Result<()> {
        if self.refer {
            let origin = flow::store::Origin { path: self.file.path.clone(), hub: None };
            return cx.reference("file", "text", origin);
        }
        let text = std::fs::read(&self.file.path)?;
        std::fs::write(cx.out_dir("file")?.join("text"), &text)?;
        if self.meddle {
            std::fs::write(&self.file.path, [text.as_slice(), b"!"].concat())?;
        }
        Ok(())
    }
}

/// Pins a name through the lock.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Pin {
    url: String,
    #[serde(default)]
    identity: Option<String>,
}

impl StepKind for Pin {
    const NAME: &'static str = "pin";
    const VERSION: u32 = 1;
    fn ports(&self) -> Ports {
        Ports::named(Type::Files, ["pinned"])
    }
    fn resolve(&mut self, outside: &mut Outside<'_>) -> Result<()> {
        let name = self.url.clone();
        self.identity = Some(outside.url(&self.url, |_| match name.strip_prefix("no:") {
            Some(rest) => bail!("there is no {rest}"),
            None => Ok(format!("id-of-{name}")),
        })?);
        Ok(())
    }
    fn isolate(&self) -> bool {
        false
    }
    fn run(&self, cx: &mut Context<'_>) -> Result<()> {
        let text = self.identity.clone().unwrap_or_default();
        std::fs::write(cx.out_dir("pinned")?.join("text"), text)?;
        Ok(())
    }
}

/// Pretends to run a model.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Infer {}

impl StepKind for Infer {
    const NAME: &'static str = "infer";
    const VERSION: u32 = 1;
    const RUNS_MODEL: bool = true;
    const ON_GPU: bool = true;
    fn ports(&self) -> Ports {
        Ports::named(Type::Files, ["out"])
    }
    fn isolate(&self) -> bool {
        false
    }
    fn run(&self, cx: &mut Context<'_>) -> Result<()> {
        std::fs::write(cx.out_dir("out")?.join("text"), "inferred")?;
        cx.fact("score", 0.5);
        Ok(())
    }
}

/// Measures the time.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Clock {}

impl StepKind for Clock {
    const NAME: &'static str = "clock";
    const VERSION: u32 = 1;
    const MEASURES: bool = true;
    fn ports(&self) -> Ports {
        Ports::named(Type::Files, ["out"])
    }
    fn isolate(&self) -> bool {
        false
    }
    fn run(&self, cx: &mut Context<'_>) -> Result<()> {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
        std::fs::write(cx.out_dir("out")?.join("text"), now.as_nanos().to_string())?;
        Ok(())
    }
}

pub(super) const KINDS: &[Kind] = &[
    Kind::of::<Emit>(),
    Kind::of::<Upper>(),
    Kind::of::<Join>(),
    Kind::of::<Nap>(),
    Kind::of::<Wrong>(),
    Kind::of::<Take>(),
    Kind::of::<Pin>(),
    Kind::of::<Infer>(),
    Kind::of::<Clock>(),
    Kind::of::<super::faults::Climb>(),
];

pub(super) fn hub(dir: &Path) -> Hub {
    Hub::new(HubSettings { offline: true, ..HubSettings::new(dir.join("hub")) })
}

/// A folder with a store, and what is needed to run pipelines in it.
pub(super) struct Bench {
    pub(super) dir: tempfile::TempDir,
    hub: Hub,
    pub(super) cancel: AtomicBool,
    pub(super) options: Options,
    pub(super) kinds: &'static [Kind],
}

/// What a run said and how it ended.
pub(super) struct Ran {
    pub(super) outcome: Outcome,
    pub(super) events: Vec<RunEvent>,
}

impl Ran {
    /// Instances in a state, sorted.
    pub(super) fn in_state(&self, state: State) -> Vec<&str> {
        let steps = self.outcome.steps.iter().filter(|(_, s)| *s == state);
        let mut ids: Vec<&str> = steps.map(|(id, _)| id.as_str()).collect();
        ids.sort_unstable();
        ids
    }

    pub(super) fn ran(&self) -> Vec<&str> {
        self.in_state(State::Ran)
    }

    /// Why a step ran, as a line.
    pub(super) fn why(&self, id: &str) -> String {
        let why = self.events.iter().find_map(|e| match e {
            RunEvent::Miss { step, why, .. } if step == id => Some(why.to_string()),
            _ => None,
        });
        why.unwrap_or_else(|| panic!("{id} was no miss"))
    }

    /// The failure of a step: message, chain, help, log.
    pub(super) fn failure(&self, id: &str) -> String {
        let failure = self.events.iter().find_map(|e| match e {
            RunEvent::Failed { step, message, chain, help, log_tail, .. } if step == id => {
                let log = log_tail.join("|");
                Some(format!("{message}: {} (help: {}) [{log}]", chain.join(": "), help.join("; ")))
            }
            _ => None,
        });
        failure.unwrap_or_else(|| panic!("{id} did not fail: {:?}", self.outcome))
    }
}

impl Bench {
    pub(super) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let options =
            Options { jobs: 4, outputs: dir.path().join("outputs"), ..Options::default() };
        Self { hub: hub(dir.path()), dir, cancel: AtomicBool::new(false), options, kinds: KINDS }
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(super) fn store(&self) -> Store {
        Store::open(&self.path("store")).unwrap()
    }

    /// The pipeline is called `toy` unless it says otherwise.
    pub(super) fn plan(&self, steps: &str) -> Plan {
        let name = if steps.starts_with("name:") { "" } else { "name: toy\n" };
        let text = format!("{name}{steps}");
        let env = std::collections::BTreeMap::from([("NAP_ENV".to_owned(), "one".to_owned())]);
        let mut settings = Settings { env, ..Settings::default() };
        settings.env.extend(self.options.environment.clone());
        settings.resources.extend(self.options.resources.keys().cloned());
        let file = self.path("toy.yaml");
        let plan = Plan::new(&file, Source::new("toy.yaml", text), self.kinds, &settings);
        plan.unwrap_or_else(|d| {
            panic!("{:#?}", d.iter().map(|d| (&d.message, &d.help)).collect::<Vec<_>>())
        })
    }

    pub(super) fn session(&self) -> Session<'_> {
        self.session_on(Disk::default()).unwrap()
    }

    pub(super) fn session_on(&self, disk: Disk) -> Result<Session<'_>> {
        let store = Store::open_on(&self.path("store"), disk)?;
        let options = self.options.clone();
        Ok(Session { store, hub: &self.hub, cancel: &self.cancel, options })
    }

    pub(super) fn run(&self, steps: &str) -> Ran {
        self.try_run(steps).unwrap_or_else(|e| panic!("{e:?}"))
    }

    pub(super) fn try_run(&self, steps: &str) -> Result<Ran> {
        self.run_in(&self.session(), steps)
    }

    pub(super) fn run_in(&self, session: &Session<'_>, steps: &str) -> Result<Ran> {
        let mut events = Vec::new();
        let plan = self.plan(steps);
        let outcome = engine::run(&plan, session, &mut |e| events.push(e.clone()))?;
        Ok(Ran { outcome, events })
    }

    /// The outputs of the newest result of a step, by port.
    pub(super) fn ports(&self, id: &str) -> BTreeMap<String, Digest> {
        let records = flow::lineage::Record::all(&self.store()).unwrap();
        let record = records.into_iter().find(|r| r.made.step == id);
        record.unwrap_or_else(|| panic!("{id} has no record")).ports
    }

    /// The text of a port of a step.
    pub(super) fn text(&self, id: &str, port: &str) -> String {
        let store = self.store();
        let tree = store.tree(&self.ports(id)[port]).unwrap().unwrap();
        let path = store.locate(&tree.entries[0].digest).unwrap().unwrap();
        std::fs::read_to_string(path).unwrap()
    }

    /// Runs isolated steps in workers: this test binary, at the ignored test [`worker_entry`].
    pub(super) fn with_workers(mut self) -> Self {
        let args = ["--ignored", "--exact", "--nocapture", "engine::toys::worker_entry"];
        self.options.worker = Some(WorkerCommand {
            exe: std::env::current_exe().unwrap(),
            args: args.map(str::to_owned).to_vec(),
        });
        self
    }
}

#[test]
#[ignore = "is started by other tests as their worker, with an attempt's directory"]
fn worker_entry() {
    let dir = PathBuf::from(std::env::args().next_back().unwrap());
    assert!(dir.is_dir(), "the last argument is an attempt's directory");
    let environment = std::env::vars().collect();
    let done = engine::worker(&dir, KINDS, &hub(&dir), &environment);
    assert!(done.unwrap(), "the attempt failed");
}

/// Tries something for every call of a disk, from the first to the last, on several threads.
pub(super) fn at_every_call(calls: u64, attempt: impl Fn(u64) + Sync) {
    let next = AtomicU64::new(1);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                loop {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    if n > calls {
                        break;
                    }
                    attempt(n);
                }
            });
        }
    });
}

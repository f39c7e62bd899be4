//! What a kind of step is.

use std::collections::BTreeMap;

use anyhow::Result;
use schemars::JsonSchema;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{Context, Outside, key_form};
use crate::artifact::Type;
use crate::source::Severity;

/// What comes out of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ports {
    /// The type of the whole.
    pub ty: Type,
    /// Port names, where they are known before the step has run.
    pub names: Option<Vec<String>>,
}

impl Ports {
    /// An artifact whose type fixes its ports, or whose ports are known only afterwards.
    pub fn of(ty: Type) -> Self {
        let fixed = ty.fixed_ports();
        Self { ty, names: fixed.map(|p| p.iter().map(|&n| n.to_owned()).collect()) }
    }

    /// An artifact with these ports.
    pub fn named(ty: Type, names: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self { ty, names: Some(names.into_iter().map(Into::into).collect()) }
    }

    /// An artifact with the ports of an input, if they are known.
    pub fn like(ty: Type, names: Option<&[String]>) -> Self {
        Self { ty, names: names.map(<[String]>::to_vec) }
    }
}

/// CPU slots that a step takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Cpu {
    /// All that the runner has.
    All,
    /// This many.
    N(usize),
}

/// What a step needs to run. Never part of its key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Needs {
    /// CPU slots.
    pub cpu: Cpu,
    /// Bytes of memory, where it can be said.
    pub memory: Option<u64>,
    /// GPUs.
    pub gpu: usize,
    /// Nothing else may run beside it (timings).
    pub exclusive: bool,
    /// What else there is only so much of (`licence: 1`); how much is said in `flow.toml`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub named: BTreeMap<String, u64>,
}

impl Needs {
    /// One CPU slot.
    pub const ONE: Self = Self::of(Cpu::N(1));
    /// All CPU slots.
    pub const ALL: Self = Self::of(Cpu::All);

    const fn of(cpu: Cpu) -> Self {
        Self { cpu, memory: None, gpu: 0, exclusive: false, named: BTreeMap::new() }
    }
}

/// Something wrong with a step's parameters, found by [`StepKind::check`].
#[derive(Debug, Clone)]
pub struct Problem {
    /// Error or warning.
    pub severity: Severity,
    /// Path of the field under `with`, like `lora.r` or `columns[2]`; empty for the whole step.
    pub path: String,
    /// What is wrong.
    pub message: String,
    /// What to do.
    pub help: Option<String>,
}

impl Problem {
    /// An error at a field.
    pub fn error(path: impl Into<String>, message: impl Into<String>) -> Self {
        Self { severity: Severity::Error, path: path.into(), message: message.into(), help: None }
    }

    /// A warning at a field.
    pub fn warning(path: impl Into<String>, message: impl Into<String>) -> Self {
        Self { severity: Severity::Warning, ..Self::error(path, message) }
    }

    /// With advice.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }
}

/// A field that a kind did not have at first, with the value that means what was done before it
/// was there: with that value, and only that, the field is left out of the key, and results from
/// before stay hits. The value is frozen; if the field's default changes later, the legacy value
/// does not, or old results would be taken for those of the new default.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Added {
    /// Its path under `with`, like `lora.bias`.
    pub field: &'static str,
    /// The value, as JSON.
    pub legacy: &'static str,
}

impl Added {
    /// Takes the field out of parameters in which it has its legacy value.
    fn leave_out(&self, params: &mut Value) {
        let mut names: Vec<&str> = self.field.split('.').collect();
        let last = names.pop().unwrap_or_default();
        let inside = names.iter().try_fold(params, |at, name| at.get_mut(*name));
        let legacy = serde_json::from_str::<Value>(self.legacy).ok();
        if let Some(Value::Object(map)) = inside
            && legacy.is_some()
            && map.get(last) == legacy.as_ref()
        {
            map.remove(last);
        }
    }
}

/// A kind of step: one file under `kinds/`, one row in `kinds::ALL`.
///
/// The doc comment of the struct is what `flow kinds NAME` prints; doc comments of the fields are
/// the descriptions in the JSON Schema. Use `#[serde(deny_unknown_fields)]`, and give defaults
/// with `#[serde(default = …)]` so that they are resolved before the key is taken; never `tag`,
/// `flatten` or `untagged`, which lose the place of a mistake.
///
/// What stands in the key is the resolved value, so writing a default out changes nothing, and
/// another default in the code is another key. `skip_serializing_if` may leave out only what
/// parses back to the same value (`None` where `None` is the default): a step is parsed from its
/// serialised form more than once. A field that is added later changes no key if it is in
/// [`StepKind::ADDED`]; without that all results of the kind are made again, and a test asks for
/// another `VERSION` (`tests/flow/engine/golden.rs`).
pub trait StepKind: Serialize + DeserializeOwned + JsonSchema + Send + Sync + 'static {
    /// As written after `kind:`.
    const NAME: &'static str;
    /// Raised when equal inputs would give other bytes.
    const VERSION: u32;
    /// Whether it runs a model: then device class and compute mode are part of its key.
    const RUNS_MODEL: bool = false;
    /// Whether its model can run on a GPU.
    const ON_GPU: bool = false;
    /// Whether it reads what the records of its inputs say (times, memory, parameter counts):
    /// then those facts are bound to its inputs and are part of its key.
    const READS_RECORDS: bool = false;
    /// Fields that were added after the kind was first released.
    const ADDED: &'static [Added] = &[];

    /// Whether what comes out is a measurement (of time, of memory), so that equal inputs never
    /// give equal bytes: `flow reproduce` makes it again and holds nothing against it.
    const MEASURES: bool = false;

    /// What comes out, as a function of the parameters and of the types bound to the inputs.
    fn ports(&self) -> Ports;

    /// Replaces every outside name (hub revision, local file, URL) by an identity.
    ///
    /// # Errors
    /// When something outside is missing or cannot be reached.
    fn resolve(&mut self, _outside: &mut Outside<'_>) -> Result<()> {
        Ok(())
    }

    /// What can be refused before anything runs, from the parameters alone.
    fn check(&self) -> Vec<Problem> {
        Vec::new()
    }

    /// Drops ports of inputs that this step does not read, so that they are not in its key.
    /// Called with bound inputs.
    fn narrow(&mut self) {}

    /// What can be refused on headers as soon as the inputs exist (schemas, configs, module
    /// names); called before the look-up is a miss for good, and before unrelated work starts.
    ///
    /// # Errors
    /// With what does not fit, and what would.
    fn check_inputs(&self, _cx: &Context<'_>) -> Result<()> {
        Ok(())
    }

    /// What it needs to run.
    fn needs(&self) -> Needs {
        Needs::ONE
    }

    /// Whether it runs in a process of its own (the default) or on a thread of the runner.
    fn isolate(&self) -> bool {
        true
    }

    /// Whether it makes all its folders through the context, and says when it
    /// [leaves them tidy](super::Dirs): then they may be those of an earlier attempt.
    fn shares_dirs(&self) -> bool {
        false
    }

    /// Does the work: reads inputs through `cx.open`, writes each port under `cx.out_dir(port)`.
    ///
    /// # Errors
    /// With a message, and a [`Fault`](crate::source::Fault) where there is advice to give.
    fn run(&self, cx: &mut Context<'_>) -> Result<()>;
}

/// A parameter that does not parse.
#[derive(Debug, Clone)]
pub struct BadField {
    /// Path under `with`, like `lora.r`; empty for the whole.
    pub path: String,
    /// serde's message.
    pub message: String,
}

/// A parsed step, with its kind erased.
pub trait Step: Send + Sync {
    /// Its row.
    fn name(&self) -> &'static str;
    /// Its parameters, complete with defaults, as JSON that parses again (paths included).
    fn params(&self) -> Value;
    /// Its parameters as they enter the key: no paths, no plan-time notes, none of
    /// [`StepKind::ADDED`] that has its legacy value.
    fn key_params(&self) -> Value;
    /// See [`StepKind::ports`].
    fn ports(&self) -> Ports;
    /// See [`StepKind::resolve`].
    ///
    /// # Errors
    /// See there.
    fn resolve(&mut self, outside: &mut Outside<'_>) -> Result<()>;
    /// See [`StepKind::check`].
    fn check(&self) -> Vec<Problem>;
    /// See [`StepKind::narrow`].
    fn narrow(&mut self);
    /// See [`StepKind::check_inputs`].
    ///
    /// # Errors
    /// See there.
    fn check_inputs(&self, cx: &Context<'_>) -> Result<()>;
    /// See [`StepKind::needs`].
    fn needs(&self) -> Needs;
    /// See [`StepKind::isolate`].
    fn isolate(&self) -> bool;
    /// See [`StepKind::shares_dirs`].
    fn shares_dirs(&self) -> bool;
    /// See [`StepKind::run`].
    ///
    /// # Errors
    /// See there.
    fn run(&self, cx: &mut Context<'_>) -> Result<()>;
}

impl<K: StepKind> Step for K {
    fn name(&self) -> &'static str {
        K::NAME
    }
    fn params(&self) -> Value {
        serde_json::to_value(self).unwrap_or(Value::Null)
    }
    fn key_params(&self) -> Value {
        let mut params = key_form(&self.params());
        K::ADDED.iter().for_each(|added| added.leave_out(&mut params));
        params
    }
    fn ports(&self) -> Ports {
        StepKind::ports(self)
    }
    fn resolve(&mut self, outside: &mut Outside<'_>) -> Result<()> {
        StepKind::resolve(self, outside)
    }
    fn check(&self) -> Vec<Problem> {
        StepKind::check(self)
    }
    fn narrow(&mut self) {
        StepKind::narrow(self);
    }
    fn check_inputs(&self, cx: &Context<'_>) -> Result<()> {
        StepKind::check_inputs(self, cx)
    }
    fn needs(&self) -> Needs {
        StepKind::needs(self)
    }
    fn isolate(&self) -> bool {
        StepKind::isolate(self)
    }
    fn shares_dirs(&self) -> bool {
        StepKind::shares_dirs(self)
    }
    fn run(&self, cx: &mut Context<'_>) -> Result<()> {
        StepKind::run(self, cx)
    }
}

/// A row of the table of kinds.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    /// As written after `kind:`.
    pub name: &'static str,
    /// See [`StepKind::VERSION`].
    pub version: u32,
    /// See [`StepKind::RUNS_MODEL`].
    pub runs_model: bool,
    /// See [`StepKind::ON_GPU`].
    pub on_gpu: bool,
    /// See [`StepKind::READS_RECORDS`].
    pub reads_records: bool,
    /// See [`StepKind::MEASURES`].
    pub measures: bool,
    /// Parses `with:`.
    pub parse: fn(&Value) -> Result<Box<dyn Step>, BadField>,
    /// Its JSON Schema; `description` is the documentation for users.
    pub schema: fn() -> Value,
}

impl Kind {
    /// The row of a kind.
    pub const fn of<K: StepKind>() -> Self {
        Self {
            name: K::NAME,
            version: K::VERSION,
            runs_model: K::RUNS_MODEL,
            on_gpu: K::ON_GPU,
            reads_records: K::READS_RECORDS,
            measures: K::MEASURES,
            parse: parse::<K>,
            schema: schema::<K>,
        }
    }

    /// The first line of its documentation.
    pub fn summary(&self) -> String {
        let schema = (self.schema)();
        let doc = schema["description"].as_str().unwrap_or_default().to_owned();
        doc.split("\n\n").next().unwrap_or_default().replace('\n', " ")
    }
}

fn parse<K: StepKind>(with: &Value) -> Result<Box<dyn Step>, BadField> {
    match serde_path_to_error::deserialize::<_, K>(with) {
        Ok(step) => Ok(Box::new(step)),
        Err(e) => {
            let path = e.path().to_string();
            let path = if path == "." { String::new() } else { path };
            Err(BadField { path, message: e.into_inner().to_string() })
        }
    }
}

fn schema<K: StepKind>() -> Value {
    schemars::schema_for!(K).to_value()
}

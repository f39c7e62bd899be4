//! What can be typed.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use crate::artifact::Tolerance;
use crate::pipeline::{bytes, duration};
use crate::step::Device;

const AFTER: &str = "Exit codes: 0 done, 1 a step failed, 2 pipeline or command wrong, \
    3 store, disk or internal, 130 interrupted.\n\
    Environment: FLOW_STORE, HF_ENDPOINT, HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_TOKEN_PATH, \
    HF_HUB_OFFLINE, NO_COLOR.";

/// A declarative runner for fine-tuning experiments.
///
/// A YAML file describes steps (fetch, sample, format, tokenize, train, evaluate, select, merge);
/// `flow run` executes what is not in the cache, and records every run.
#[derive(Debug, Parser)]
#[command(name = "flow", version, after_help = AFTER, max_term_width = 100)]
pub(super) struct Arguments<C: Subcommand = Command> {
    /// Results as JSON on stdout.
    #[arg(long, global = true)]
    pub(super) json: bool,
    /// Where results are kept [default: FLOW_STORE, else flow.toml's, else .flow in the project
    /// root].
    #[arg(long, global = true, value_name = "DIR")]
    pub(super) store: Option<PathBuf>,
    #[command(subcommand)]
    pub(super) command: C,
}

impl Arguments {
    /// What was typed.
    pub(super) fn read() -> Result<Self, clap::Error> {
        // Where nothing has changed, to set up all other commands would be a tenth of a run.
        match Arguments::<OnlyRun>::try_parse() {
            Ok(Arguments { json, store, command: OnlyRun::Run(options) }) => {
                Ok(Self { json, store, command: Command::Run(options) })
            }
            // Another command, help, or a mistake.
            Err(_) => Self::try_parse(),
        }
    }
}

/// The command that is typed most often.
#[derive(Debug, Subcommand)]
enum OnlyRun {
    Run(RunOptions),
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Run a pipeline; what is in the cache is not run again.
    Run(RunOptions),
    /// Say what `run` would do, and why, without doing it.
    Plan(PlanOptions),
    /// Check a pipeline file: all mistakes at once, nothing is run or asked for.
    Validate(PipelineOptions),
    /// Ask for every outside name of a pipeline again, and write what it is now into the lock.
    Update(PipelineOptions),
    /// The DAG of a pipeline in Graphviz's dot language.
    Graph(PipelineOptions),
    /// Why a step ran (or was taken from the cache) in a run.
    Why(StepOptions),
    /// Where a result came from: every record upstream of a step, key or output digest.
    Trace(TraceOptions),
    /// The runs on record, newest first.
    Runs(RunsOptions),
    /// One run, or one step of it: what it read, made and measured.
    Show(ShowOptions),
    /// What differs between two runs, two steps or two keys: fields, inputs, metrics, outputs.
    Diff(DiffOptions),
    /// A table of runs and of the points of a sweep, with their metrics.
    Compare(CompareOptions),
    /// Make results again, in scratch, and say how alike they are; exits with 1 if any differs.
    ///
    /// Each step gets the inputs that are on record, so that one difference does not spoil what
    /// follows; only where their bytes are nowhere does it read what its producer gave now, which
    /// is named. A result is bit-identical; logically equal (the same rows and schema, tensors or
    /// JSON values); within tolerance (no float further from the one on record than
    /// ABSOLUTE + RELATIVE * |value|); or different, with the first difference. Nothing in the
    /// store is replaced; what gave other bytes is noted in the ledger that `flow show STEP` shows.
    Reproduce(ReproduceOptions),
    /// The log of a step.
    Log(StepOptions),
    /// Remove from the store what is not needed any more.
    ///
    /// Without a budget, only what nothing on record refers to. --keep-runs, --older-than and
    /// --max-size let runs go, with all results that no other run needs; what is given together
    /// must all allow it. What a running or pinned run uses never goes, and nothing that a pin
    /// holds.
    Gc(GcOptions),
    /// Keep a run, a step of a run or a key, whatever `gc` is asked to remove.
    Pin(PinOptions),
    /// Read results again and compare them with their digests; what is damaged is set aside.
    Verify(VerifyOptions),
    /// Make a pipeline of DVC's `dvc.yaml`; what has no counterpart is a comment and a warning.
    Import(ImportOptions),
    /// The kinds of step, or the documentation of one.
    Kinds {
        /// The kind.
        kind: Option<String>,
    },
    /// The JSON Schema of pipeline files, or of one kind.
    Schema {
        /// The kind.
        kind: Option<String>,
        /// Write all schemas into this folder.
        #[arg(long, value_name = "DIR", conflicts_with = "kind")]
        write: Option<PathBuf>,
    },
    /// Completions for a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Runs one attempt (started by `flow run`, not by people).
    #[command(hide = true)]
    Worker {
        /// The attempt's folder.
        dir: PathBuf,
    },
}

#[derive(Debug, Args)]
pub(super) struct PipelineOptions {
    /// The pipeline file.
    pub(super) file: PathBuf,
    /// Give a parameter another value, like `--set params.seed=7`; can be given several times.
    /// The value is read as YAML: `--set params.ranks=[4,8]`.
    #[arg(long = "set", value_name = "PATH=VALUE")]
    pub(super) sets: Vec<String>,
    /// Points that a sweep may have if it gives no `cap` of its own.
    #[arg(long, value_name = "POINTS", default_value_t = 256)]
    pub(super) sweep_cap: usize,
}

#[derive(Debug, Args)]
pub(super) struct PlanOptions {
    #[command(flatten)]
    pub(super) pipeline: PipelineOptions,
    /// Only these steps (or points of them, like `train@lora.r=8`) and what they need.
    #[arg(value_name = "STEP")]
    pub(super) steps: Vec<String>,
    /// CPU slots [default: `jobs` of flow.toml, else all cores].
    #[arg(long, short, value_name = "N")]
    pub(super) jobs: Option<usize>,
    /// Where models run [default: a GPU for each step where there are any, else the CPU].
    #[arg(long, value_name = "cpu|cuda", value_parser = device)]
    pub(super) device: Option<Device>,
    /// The arithmetic of models [default: bf16 on a GPU, f32 on the CPU].
    #[arg(long, value_name = "f32|bf16", value_parser = ["f32", "bf16"])]
    pub(super) compute: Option<String>,
    /// Run a step again although it is in the cache; other bytes are recorded as a difference.
    #[arg(long, value_name = "STEP")]
    pub(super) force: Vec<String>,
    /// Refuse to add to the lock file.
    #[arg(long)]
    pub(super) locked: bool,
    /// Ask nothing of the network.
    #[arg(long)]
    pub(super) offline: bool,
}

impl PlanOptions {
    /// The arithmetic of models that run there.
    pub(super) fn compute(&self, device: Device) -> &str {
        let default = if device == Device::Cuda { "bf16" } else { "f32" };
        self.compute.as_deref().unwrap_or(default)
    }
}

pub(super) fn device(text: &str) -> Result<Device, String> {
    match text {
        "cpu" => Ok(Device::Cpu),
        "cuda" => Ok(Device::Cuda),
        _ => Err("`cpu`, or `cuda` for an NVIDIA GPU".to_owned()),
    }
}

#[derive(Debug, Args)]
pub(super) struct RunOptions {
    #[command(flatten)]
    pub(super) plan: PlanOptions,
    /// After a failure, still run everything that does not depend on it.
    #[arg(long, short)]
    pub(super) keep_going: bool,
    /// Seconds that a stopped step gets to end by itself.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub(super) grace: u64,
    /// When all is done, write what the steps gave beside the pipeline (`NAME.results`), for
    /// `flow reproduce FILE`; commit it with the lock.
    #[arg(long)]
    pub(super) record: bool,
}

#[derive(Debug, Args)]
pub(super) struct ReproduceOptions {
    /// A pipeline, which is compared with its results file (`flow run --record`); or a run (a
    /// unique prefix, or `latest`), which is compared with its records.
    #[arg(value_name = "FILE|RUN")]
    pub(super) what: String,
    /// Only these steps (or points of them, like `train@lora.r=8`).
    #[arg(value_name = "STEP")]
    pub(super) steps: Vec<String>,
    /// How far a float may lie from the one on record [default: 1e-3,1e-5 for a step that runs a
    /// model, else 1e-6,1e-9; a half-precision number may always be one step of its format off].
    #[arg(long, value_name = "RELATIVE[,ABSOLUTE]", value_parser = tolerance)]
    pub(super) tolerance: Option<Tolerance>,
    /// CPU slots [default: all cores].
    #[arg(long, short, value_name = "N")]
    pub(super) jobs: Option<usize>,
    /// Where models run [default: where those on record did].
    #[arg(long, value_name = "cpu|cuda", value_parser = device)]
    pub(super) device: Option<Device>,
    /// The arithmetic of models [default: that on record].
    #[arg(long, value_name = "f32|bf16", value_parser = ["f32", "bf16"])]
    pub(super) compute: Option<String>,
    /// Ask nothing of the network.
    #[arg(long)]
    pub(super) offline: bool,
}

fn tolerance(text: &str) -> Result<Tolerance, String> {
    let number = |text: &str| match text.trim().parse::<f64>() {
        Ok(x) if x.is_finite() && x >= 0.0 => Ok(x),
        _ => Err(format!("`{text}` is not a number of 0 or more, like 1e-4")),
    };
    let (relative, absolute) = text.split_once(',').unwrap_or((text, "0"));
    Ok(Tolerance { relative: number(relative)?, absolute: number(absolute)? })
}

#[derive(Debug, Args)]
pub(super) struct DiffOptions {
    /// A run (a unique prefix, or `latest`), a step of the latest run, a step of another one
    /// (`RUN:STEP`), or a key (a unique prefix of at least 6 digits).
    pub(super) a: String,
    /// The same, to compare it with.
    pub(super) b: String,
}

#[derive(Debug, Args)]
pub(super) struct CompareOptions {
    /// The runs [default: latest].
    #[arg(value_name = "RUN")]
    pub(super) runs: Vec<String>,
    /// A metric to show, in place of the usual ones; the best of the first one named comes first.
    /// Can be given several times.
    #[arg(long, value_name = "NAME")]
    pub(super) metric: Vec<String>,
}

#[derive(Debug, Args)]
pub(super) struct StepOptions {
    /// The step, or points of it like `train@lora.r=8`; all steps of the run if left out.
    pub(super) step: Option<String>,
    /// The run (a unique prefix, or `latest`).
    #[arg(long, value_name = "RUN", default_value = "latest")]
    pub(super) run: String,
}

#[derive(Debug, Args)]
pub(super) struct TraceOptions {
    /// A step of the run, a key, an output digest (a unique prefix of at least 6 digits will do).
    pub(super) what: String,
    /// The run that a step is looked up in.
    #[arg(long, value_name = "RUN", default_value = "latest")]
    pub(super) run: String,
}

#[derive(Debug, Args)]
pub(super) struct RunsOptions {
    /// How many.
    #[arg(long, short = 'n', default_value_t = 20)]
    pub(super) limit: usize,
}

#[derive(Debug, Args)]
pub(super) struct ShowOptions {
    /// The run (a unique prefix, or `latest`), or a step of the latest run.
    #[arg(default_value = "latest")]
    pub(super) what: String,
    /// A step of that run.
    pub(super) step: Option<String>,
}

#[derive(Debug, Args)]
pub(super) struct ImportOptions {
    /// A dvc.yaml, or the folder that it is in.
    pub(super) file: PathBuf,
    /// The pipeline file to write, which must not be there yet [default: stdout].
    #[arg(long, short, value_name = "FILE")]
    pub(super) output: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(super) struct GcOptions {
    /// Let go of runs that are not among the newest N of their pipeline [default: 1 with one of
    /// the other budgets]. Counted for every step, so a run that failed early counts for little.
    #[arg(long, value_name = "N")]
    pub(super) keep_runs: Option<usize>,
    /// Let go of runs that ended longer ago (`30d`, `12h`), and of damaged files and attempts that
    /// were set aside before that.
    #[arg(long, value_name = "AGE", value_parser = age)]
    pub(super) older_than: Option<Duration>,
    /// Let go of no more than it takes to get the store down to this size (`20G`), the oldest
    /// first.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(super) max_size: Option<u64>,
    /// Leave files alone that nothing refers to and that are younger than this: another host may
    /// be about to use them.
    #[arg(long, value_name = "AGE", value_parser = age, default_value = "1h")]
    pub(super) grace: Duration,
    /// Only say what would go.
    #[arg(long, short = 'n')]
    pub(super) dry_run: bool,
}

#[derive(Debug, Args)]
pub(super) struct PinOptions {
    /// A run (a unique prefix, or `latest`), a step of a run, or a key or output digest.
    #[arg(required_unless_present_any = ["list", "remove"])]
    pub(super) what: Option<String>,
    /// The run that a step is looked up in.
    #[arg(long, value_name = "RUN", default_value = "latest")]
    pub(super) run: String,
    /// What the pin is called [default: after what it holds].
    #[arg(long, value_name = "NAME", conflicts_with_all = ["list", "remove"])]
    pub(super) name: Option<String>,
    /// The pins there are.
    #[arg(long, conflicts_with_all = ["what", "remove"])]
    pub(super) list: bool,
    /// Remove a pin.
    #[arg(long, value_name = "NAME", conflicts_with = "what")]
    pub(super) remove: Option<String>,
}

#[derive(Debug, Args)]
pub(super) struct VerifyOptions {
    /// A run (a unique prefix, or `latest`), a step of a run, a key or output digest, or `all`.
    #[arg(default_value = "all")]
    pub(super) what: String,
    /// The run that a step is looked up in.
    #[arg(long, value_name = "RUN", default_value = "latest")]
    pub(super) run: String,
}

/// `30d`, `12h`; `0` is no time at all.
fn age(text: &str) -> Result<Duration, String> {
    let zero = (text == "0").then_some(Duration::ZERO);
    let age = zero.or_else(|| duration(text));
    age.ok_or_else(|| "expected a number and a unit, like 30d, 12h or 15m".to_owned())
}

/// `20G`, `20GB`, `500MiB`; `0` is nothing at all.
fn size(text: &str) -> Result<u64, String> {
    let zero = (text == "0").then_some(0);
    // `20G` will do for `20GB`; `20` may be meant as anything.
    let short = text.ends_with(|c: char| c.is_ascii_alphabetic());
    let whole = || short.then(|| bytes(&format!("{text}B"))).flatten();
    let size = zero.or_else(|| bytes(text)).or_else(whole);
    size.ok_or_else(|| "expected a number and a unit, like 20G, 500MB or 8GiB".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_sound() {
        use clap::CommandFactory as _;
        <Arguments>::command().debug_assert();
    }

    #[test]
    fn ages_and_sizes() {
        assert_eq!(age("30d"), Ok(Duration::from_secs(30 * 86400)));
        assert_eq!((age("0"), age("0s")), (Ok(Duration::ZERO), Ok(Duration::ZERO)));
        assert!(age("30").is_err() && age("-1d").is_err() && age("").is_err());
        assert_eq!((size("20G"), size("20GB")), (Ok(20_000_000_000), Ok(20_000_000_000)));
        assert_eq!((size("8GiB"), size("1.5M"), size("0")), (Ok(8 << 30), Ok(1_500_000), Ok(0)));
        assert!(size("20").is_err() && size("G").is_err() && size("20 parsecs").is_err());
    }
}

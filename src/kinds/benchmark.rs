//! `benchmark`.

use std::time::Instant;

use anyhow::Result;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::loading;
use crate::artifact::{AnyModel, ReportFile, Type};
use crate::learn::random::Stream;
use crate::learn::{Batch, Labels, ModelConfig, Task};
use crate::source::Fault;
use crate::step::{Context, Cpu, Input, Needs, Outside, Ports, Problem, StepKind};

/// Measures how fast a model answers and how much memory it takes, with nothing else running.
///
/// Random token ids of a fixed length go through the model a number of times, as far as the class
/// of each row or, for a causal model, the logits of its next token: latency (median and
/// 90th percentile, in milliseconds), rows and tokens per second, seconds to load, peak memory of
/// the process. The processor and its threads are part of the key, so another machine measures
/// anew.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Benchmark {
    /// The model: a base, a merged one, or what training made.
    pub model: Input<AnyModel>,
    /// Rows at a time.
    #[serde(default = "batch_size")]
    pub batch_size: u64,
    /// Tokens of a row.
    #[serde(default = "length")]
    pub length: u64,
    /// Passes before the clock runs.
    #[serde(default = "warmup")]
    pub warmup: u64,
    /// Passes that are measured.
    #[serde(default = "repeats")]
    pub repeats: u64,
    /// The machine; filled in.
    #[serde(default)]
    pub machine: Option<Machine>,
}

/// What a measurement depends on beside the model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Machine {
    /// Processor model.
    pub cpu: String,
    /// Threads it offers.
    pub threads: usize,
}

impl Machine {
    fn here() -> Self {
        let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let line = info.lines().find(|l| l.starts_with("model name"));
        let name = line.and_then(|l| l.split_once(':')).map(|(_, name)| name.trim().to_owned());
        let cpu = name.unwrap_or_else(|| std::env::consts::ARCH.to_owned());
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        Self { cpu, threads }
    }
}

fn batch_size() -> u64 {
    8
}
fn length() -> u64 {
    128
}
fn warmup() -> u64 {
    2
}
fn repeats() -> u64 {
    10
}

/// The value below which a share of sorted values lies (nearest rank).
fn percentile(sorted: &[f64], share: f64) -> f64 {
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or_default()
}

/// Most memory that this process has held so far, in bytes, where the system says so.
fn peak_rss() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with("VmHWM:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}

impl StepKind for Benchmark {
    const NAME: &'static str = "benchmark";
    const VERSION: u32 = 1;
    const RUNS_MODEL: bool = true;
    const ON_GPU: bool = true;
    const MEASURES: bool = true;

    fn ports(&self) -> Ports {
        Ports::of(Type::Report)
    }

    fn resolve(&mut self, _outside: &mut Outside<'_>) -> Result<()> {
        self.machine = Some(Machine::here());
        Ok(())
    }

    fn check(&self) -> Vec<Problem> {
        let fields =
            [("batch_size", self.batch_size), ("length", self.length), ("repeats", self.repeats)];
        let zero = fields.into_iter().filter(|(_, value)| *value == 0);
        zero.map(|(path, _)| Problem::error(path, "expected 1 or more, found 0")).collect()
    }

    fn check_inputs(&self, cx: &Context<'_>) -> Result<()> {
        let config = ModelConfig::read(&cx.open(&self.model)?.base().config()?)?;
        let positions = config.max_positions() as u64;
        if self.length > positions {
            let message = format!(
                "rows of {} tokens do not fit the model's {positions} positions",
                self.length
            );
            return Err(Fault::new(message).help(format!("set `length: {positions}`")).into());
        }
        Ok(())
    }

    fn needs(&self) -> Needs {
        Needs { cpu: Cpu::All, exclusive: true, ..Needs::ONE }
    }

    fn run(&self, cx: &mut Context<'_>) -> Result<()> {
        let any = cx.open(&self.model)?;
        let task = loading::task_of(&any)?.unwrap_or(Task::SequenceClassification { classes: 2 });
        // The machine is in the key, `--jobs` is not: all of its threads, whatever this process
        // was given.
        let machine = self.machine.clone().unwrap_or_else(Machine::here);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(machine.threads).build()?;
        let compute = loading::compute(cx)?;
        let start = Instant::now();
        let model = pool.install(|| loading::load(&any, &task, compute))?;
        let load = start.elapsed().as_secs_f64();
        let (size, length) = (usize::try_from(self.batch_size)?, usize::try_from(self.length)?);
        let vocabulary = model.config().vocab_size() as u64;
        let stream = Stream::new(0, "benchmark");
        let id = |i| stream.below(i, vocabulary) as u32;
        let batch = Batch {
            input_ids: (0..(size * length) as u64).map(id).collect(),
            token_type_ids: None,
            lengths: vec![length; size],
            size,
            length,
            labels: Labels::None,
        };
        let mut times = Vec::new();
        let passes = self.warmup + self.repeats;
        for pass in 0..passes {
            cx.stop()?;
            let start = Instant::now();
            pool.install(|| match task {
                Task::CausalLm => model.next_logits(&batch),
                Task::SequenceClassification { .. } => model.logits(&batch),
            })?;
            if pass >= self.warmup {
                times.push(start.elapsed().as_secs_f64());
            }
            cx.progress(pass + 1, passes, "passes", "");
        }
        times.sort_by(f64::total_cmp);
        let median = percentile(&times, 0.5);
        let rows = self.batch_size as f64 / median.max(1e-12);
        let mut report = ReportFile {
            title: format!("{size} rows of {length} tokens"),
            details: json!({ "machine": machine, "latencies_seconds": times }),
            ..ReportFile::default()
        };
        for (name, value) in [
            ("latency_ms", 1e3 * median),
            ("latency_ms_p90", 1e3 * percentile(&times, 0.9)),
            ("rows_per_second", rows),
            ("tokens_per_second", rows * self.length as f64),
            ("load_seconds", load),
        ] {
            report.metrics.insert(name.into(), value);
        }
        if let Some(bytes) = peak_rss() {
            report.metrics.insert("peak_rss_bytes".into(), bytes as f64);
        }
        cx.log(format!("{:.2} ms median, {rows:.1} rows/s", 1e3 * median));
        let dir = cx.out_dir("report")?;
        cx.write_json(&dir, "report.json", &report)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_rank() {
        let values: Vec<f64> = (1..=10).map(f64::from).collect();
        assert_eq!(percentile(&values, 0.5), 5.0);
        assert_eq!(percentile(&values, 0.9), 9.0);
        assert_eq!(percentile(&[7.0], 0.9), 7.0);
        assert_eq!(percentile(&[], 0.5), 0.0);
    }

    #[test]
    fn the_machine_has_threads() {
        let machine = Machine::here();
        assert!(machine.threads > 0 && !machine.cpu.is_empty());
    }
}

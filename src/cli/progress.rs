//! What a run shows while it goes: bars on a terminal, plain lines elsewhere, JSON lines on stdout
//! with `--json`.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde_json::{Map, Value};

use super::table;
use crate::engine::RunEvent;
use crate::lineage::{Status, Why};
use crate::step::Event;

/// Between two plain lines of one step's progress.
const QUIET: Duration = Duration::from_secs(15);

/// Metrics of an evaluation that are shown while a run goes; reports have all.
const METRICS: [&str; 5] = ["accuracy", "f1", "loss", "matthews", "perplexity"];

/// An observer of a run.
pub(super) struct Screen {
    json: bool,
    /// Nobody reads stdout any more; the run goes on.
    unread: bool,
    bars: Option<MultiProgress>,
    running: BTreeMap<String, Running>,
    width: usize,
    /// The command that goes on from here if the run does not come to its end.
    again: String,
}

struct Running {
    bar: Option<ProgressBar>,
    said: Instant,
    begun: Instant,
    /// Metrics of one evaluation, until they are shown on one line.
    metrics: (u64, Vec<String>),
}

impl Screen {
    pub(super) fn new(json: bool, plain: bool, again: String) -> Self {
        let bars = (!json && !plain).then(MultiProgress::new);
        let running = BTreeMap::new();
        Self { json, unread: false, bars, running, width: 8, again }
    }

    /// Shows an event.
    pub(super) fn show(&mut self, event: &RunEvent) {
        if self.json {
            if let (false, Ok(line)) = (self.unread, serde_json::to_string(event)) {
                self.unread = outln!("{line}").is_err();
            }
            return;
        }
        match event {
            RunEvent::RunStarted { run, pipeline, steps, jobs } => {
                self.width = steps.iter().map(|s| s.chars().count()).max().unwrap_or(8).min(40);
                let n = steps.len();
                let s = |n: usize| if n == 1 { "" } else { "s" };
                let (steps, slots) = (s(n), s(*jobs));
                self.say(format!("{pipeline}: run {run}, {n} step{steps}, {jobs} CPU slot{slots}"));
            }
            RunEvent::Unchanged { run, pipeline, steps, since } => {
                self.say(format!("{pipeline}: run {run}, {steps} steps, unchanged since {since}"));
            }
            RunEvent::Hit { .. } => {}
            RunEvent::Miss { step, why, .. } => self.line(step, &because(why)),
            RunEvent::Waiting { step, holder } => self.line(step, &format!("waits for {holder}")),
            RunEvent::Started { step, attempt, .. } => self.start(step, *attempt),
            RunEvent::Step { step, event } => self.step(step, event),
            RunEvent::Retrying { step, attempt, of, message, in_seconds } => {
                self.end(step);
                let when = table::seconds(*in_seconds);
                let text = format!("attempt {attempt} of {of} failed: {message}; again in {when}");
                self.line(step, &text);
            }
            RunEvent::Finished { step, seconds, facts, taken, differs, .. } => {
                self.end(step);
                let how = if *taken { "made by another run" } else { "done" };
                self.line(step, &format!("{how} in {}{}", table::seconds(*seconds), brief(facts)));
                if !differs.is_empty() {
                    let ports = differs.join(", ");
                    self.line(step, &format!("warning: gave other bytes than before ({ports})"));
                }
            }
            RunEvent::Failed { step, message, chain, help, log_tail, log_path } => {
                self.end(step);
                self.line(step, &format!("FAILED: {message}"));
                for cause in chain.iter().filter(|c| *c != message) {
                    self.say(format!("    because: {cause}"));
                }
                // A command's own advice is the end of its log.
                let tail = log_tail.join("\n");
                let repeats = |line: &String| {
                    let own = line.split_once('\n').map_or("", |(_, own)| own);
                    !tail.is_empty()
                        && !own.is_empty()
                        && (own.ends_with(&tail) || tail.ends_with(own))
                };
                for line in help.iter().filter(|line| !repeats(line)) {
                    self.say(format!("    help: {line}"));
                }
                for line in log_tail {
                    self.say(format!("    | {line}"));
                }
                if let Some(path) = log_path {
                    self.say(format!("    log: {}", path.display()));
                }
            }
            RunEvent::Skipped { step, because } => self.line(step, &format!("skipped: {because}")),
            RunEvent::OutputPublished { name, path, kept } => {
                self.say(format!("{name} -> {}", path.display()));
                if let Some(kept) = kept {
                    self.say(format!("    your edited copy was kept as {}", kept.display()));
                }
            }
            RunEvent::RunFinished { status, ran, hits, failed, skipped, seconds, .. } => {
                let how = match status {
                    Status::Done => "done",
                    Status::Failed => "failed",
                    Status::Interrupted => "interrupted; finished work is kept",
                    Status::Running | Status::Died => "ended",
                };
                let mut text = format!("{how}: {ran} ran, {hits} from the cache");
                if *failed > 0 {
                    text += &format!(", {failed} failed");
                }
                if *skipped > 0 {
                    text += &format!(", {skipped} skipped");
                }
                self.say(format!("{text}; {}", precise(*seconds)));
                if matches!(status, Status::Failed | Status::Interrupted) {
                    self.say(format!("to go on from here: {}", self.again));
                }
            }
        }
    }

    fn start(&mut self, step: &str, attempt: u32) {
        let begun = Instant::now();
        let bar = self.bars.as_ref().map(|bars| {
            let bar = bars.add(ProgressBar::new(0));
            bar.set_style(spinner());
            bar.set_prefix(format!("{step:width$}", width = self.width));
            bar.enable_steady_tick(Duration::from_millis(250));
            bar
        });
        if attempt > 1 {
            self.line(step, &format!("attempt {attempt}"));
        }
        self.running
            .insert(step.to_owned(), Running { bar, said: begun, begun, metrics: (0, Vec::new()) });
    }

    /// Shows the metrics of an evaluation that is over.
    fn flush(&mut self, step: &str) {
        let Some(running) = self.running.get_mut(step) else { return };
        let (at, metrics) = std::mem::take(&mut running.metrics);
        if !metrics.is_empty() {
            let when = if at > 0 { format!("step {at}: ") } else { String::new() };
            self.line(step, &format!("{when}{}", metrics.join(", ")));
        }
    }

    fn end(&mut self, step: &str) {
        self.flush(step);
        if let Some(Running { bar: Some(bar), .. }) = self.running.remove(step) {
            bar.finish_and_clear();
        }
    }

    fn step(&mut self, step: &str, event: &Event) {
        match event {
            Event::Progress { done, total, unit, message } => {
                let Some(running) = self.running.get_mut(step) else { return };
                if let Some(bar) = &running.bar {
                    bar.set_style(if *total > 0 { known(unit) } else { spinner() });
                    bar.set_length(*total);
                    bar.set_position(*done);
                    bar.set_message(message.clone());
                } else if running.said.elapsed() >= QUIET {
                    running.said = Instant::now();
                    let left = time_left(*done, *total, running.begun.elapsed());
                    let text = format!("{done}/{total} {unit}  {message}{left}");
                    self.line(step, &text);
                }
            }
            Event::Metric { name, step: at, value } => {
                let Some(short) = name.strip_prefix("eval/").filter(|n| METRICS.contains(n)) else {
                    return;
                };
                if self.running.get(step).is_some_and(|r| r.metrics.0 != *at) {
                    self.flush(step);
                }
                if let Some(running) = self.running.get_mut(step) {
                    running.metrics.0 = *at;
                    running.metrics.1.push(format!("{short} {value:.4}"));
                }
            }
            Event::Log { line } => {
                let shown = ["trainable params:", "resumes:", "starts over:"];
                if shown.iter().any(|start| line.starts_with(start)) {
                    self.line(step, line);
                }
            }
            Event::Warning { message } => self.line(step, &format!("warning: {message}")),
        }
    }

    fn line(&self, step: &str, text: &str) {
        self.say(format!("{step:width$}  {text}", width = self.width));
    }

    fn say(&self, text: String) {
        match &self.bars {
            Some(bars) => {
                if bars.println(&text).is_err() {
                    errln!("{text}");
                }
            }
            None => errln!("{text}"),
        }
    }
}

fn spinner() -> ProgressStyle {
    let style = ProgressStyle::with_template("{prefix}  {spinner} {elapsed} {msg}");
    style.unwrap_or_else(|_| ProgressStyle::default_spinner())
}

fn known(unit: &str) -> ProgressStyle {
    let template = format!("{{prefix}}  {{bar:24}} {{pos}}/{{len}} {unit}  {{msg}}  {{eta}} left");
    ProgressStyle::with_template(&template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

fn time_left(done: u64, total: u64, so_far: Duration) -> String {
    if done == 0 || total <= done {
        return String::new();
    }
    let left = so_far.as_secs_f64() * (total - done) as f64 / done as f64;
    format!("  {} left", table::seconds(left))
}

fn because(why: &Why) -> String {
    format!("runs: {why}")
}

/// Seconds with enough digits for a run that does nothing.
fn precise(seconds: f64) -> String {
    if seconds < 1.0 { format!("{seconds:.3} s") } else { table::seconds(seconds) }
}

/// The numbers of a record that say most, on one line.
fn brief(facts: &Map<String, Value>) -> String {
    const SHOWN: [&str; 10] = [
        "rows",
        "tokens",
        "chunks",
        "loss",
        "accuracy",
        "f1",
        "perplexity",
        "samples_per_second",
        "selected",
        "trainable_parameters",
    ];
    let mut parts = Vec::new();
    for name in SHOWN {
        match facts.get(name) {
            Some(Value::Number(n)) if n.is_f64() => {
                parts.push(format!("{name} {:.4}", n.as_f64().unwrap_or_default()));
            }
            Some(Value::Number(n)) => parts.push(format!("{name} {n}")),
            Some(Value::String(text)) => parts.push(format!("{name} {text}")),
            _ => {}
        }
    }
    if parts.is_empty() { String::new() } else { format!("  ({})", parts.join(", ")) }
}

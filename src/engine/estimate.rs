//! What a run will cost, judged by what steps like its own cost before.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use petgraph::Direction;
use petgraph::graph::NodeIndex;
use serde::Serialize;

use super::slots::{Grant, Slots};
use super::{Forecast, Options, Prospect};
use crate::lineage::{Likeness, Past, Record};
use crate::pipeline::{Instance, Plan};
use crate::step::Needs;
use crate::store::Store;

/// What a step is expected to cost: what the newest step like it did.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Cost {
    /// Wall-clock seconds.
    pub seconds: f64,
    /// Largest resident memory in bytes; absent where it was not measured (steps without a process
    /// of their own).
    pub peak_rss_bytes: Option<u64>,
    /// Bytes that the store grows by; absent where it has lost what that step made.
    pub output_bytes: Option<u64>,
    /// How much that step is the same.
    pub like: Likeness,
}

impl Cost {
    /// The cost of an instance, if there ever was a step of its kind.
    pub(super) fn expected(
        store: &Store,
        past: &Past,
        instance: &Instance,
    ) -> Result<Option<Self>> {
        let like = past.most_like(instance.kind.name, &instance.step, &instance.id.0)?;
        let Some((like, record)) = like else { return Ok(None) };
        let output_bytes = output_bytes(store, &record)?;
        Ok(Some(Self { output_bytes, like, ..Self::spent(&record) }))
    }

    /// What a result that is there did cost.
    pub(super) fn spent(record: &Record) -> Self {
        let (seconds, peak_rss_bytes) = (record.made.seconds, record.made.peak_rss_bytes);
        Self { seconds, peak_rss_bytes, output_bytes: Some(0), like: Likeness::Instance }
    }
}

/// Bytes of a result that are kept for it: not what it passes on from its inputs, nor files that
/// stay outside the store.
fn output_bytes(store: &Store, record: &Record) -> Result<Option<u64>> {
    let inputs = record.preimage.to_string();
    let mut bytes = 0;
    for digest in record.ports.values().filter(|d| !inputs.contains(&d.to_string())) {
        let Some(tree) = store.tree(digest)? else { return Ok(None) };
        for entry in &tree.entries {
            let outside = store.locate_entry(entry)?.is_some_and(|p| !p.starts_with(store.root()));
            bytes += if outside { 0 } else { entry.size };
        }
    }
    Ok(Some(bytes))
}

/// What a run is expected to cost, if no step turns out to be cut off. Steps of which nothing is
/// known count as nothing, and are counted.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Estimate {
    /// Steps that would run.
    pub steps: usize,
    /// Wall-clock seconds from the first to the last, with the slots that there are.
    pub seconds: f64,
    /// Seconds of all steps together.
    pub work_seconds: f64,
    /// The most memory in bytes that steps which run at one time hold.
    pub peak_rss_bytes: u64,
    /// Bytes that the store grows by, at most.
    pub output_bytes: u64,
    /// Steps whose time is not known.
    pub unknown: usize,
    /// Steps whose memory is not known.
    pub unknown_memory: usize,
    /// Steps whose output's size is not known.
    pub unknown_output: usize,
    /// Steps that are judged by another step of their kind.
    pub guessed: usize,
}

impl Estimate {
    /// Adds up what steps are expected to cost, in plan order.
    pub fn of(plan: &Plan, forecasts: &[Forecast], options: &Options) -> Self {
        let ahead = |f: &&Forecast| {
            matches!(f.prospect, Prospect::WillRun { .. } | Prospect::WaitsOn { .. })
        };
        let ahead: Vec<&Forecast> = forecasts.iter().filter(ahead).collect();
        let costs = || ahead.iter().map(|f| f.cost.as_ref());
        let missing = |has: fn(&Cost) -> bool| costs().filter(|c| !c.is_some_and(has)).count();
        let guess = |c: &Cost| matches!(c.like, Likeness::Kind | Likeness::Name);
        let (seconds, peak_rss_bytes) = schedule(plan, &ahead, options);
        Self {
            steps: ahead.len(),
            seconds,
            // A sum of nothing is -0.0.
            work_seconds: costs().flatten().map(|c| c.seconds).fold(0.0, |a, b| a + b),
            peak_rss_bytes,
            output_bytes: costs().flatten().filter_map(|c| c.output_bytes).sum(),
            unknown: missing(|_| true),
            unknown_memory: missing(|c| c.peak_rss_bytes.is_some()),
            unknown_output: missing(|c| c.output_bytes.is_some()),
            guessed: costs().flatten().filter(|c| guess(c)).count(),
        }
    }
}

/// A step of a schedule.
struct Job<'a> {
    needs: &'a Needs,
    seconds: f64,
    memory: u64,
    /// Steps of the schedule that it waits for.
    open: usize,
    /// Steps that wait for it.
    feeds: Vec<usize>,
}

/// Runs through a schedule as the runner would: in plan order, each step as soon as what it reads
/// is there and its slots are free. Gives the seconds until the last ends, and the most memory that
/// is held at one time.
fn schedule(plan: &Plan, ahead: &[&Forecast], options: &Options) -> (f64, u64) {
    let positions: BTreeMap<&str, usize> =
        ahead.iter().enumerate().map(|(i, f)| (f.step.as_str(), i)).collect();
    let position = |node: NodeIndex| positions.get(plan.graph[node].id.0.as_str()).copied();
    let mut jobs: Vec<Job<'_>> = ahead
        .iter()
        .map(|f| Job {
            needs: &f.needs,
            seconds: f.cost.as_ref().map_or(0.0, |c| c.seconds),
            memory: f.cost.as_ref().and_then(|c| c.peak_rss_bytes).unwrap_or(0),
            open: 0,
            feeds: Vec::new(),
        })
        .collect();
    for node in plan.graph.node_indices() {
        let Some(at) = position(node) else { continue };
        for producer in plan.graph.neighbors_directed(node, Direction::Incoming) {
            if let Some(from) = position(producer) {
                jobs[from].feeds.push(at);
                jobs[at].open += 1;
            }
        }
    }
    simulate(&mut jobs, &mut Slots::new(options))
}

fn simulate(jobs: &mut [Job<'_>], slots: &mut Slots) -> (f64, u64) {
    let mut ready: BTreeSet<usize> = (0..jobs.len()).filter(|&i| jobs[i].open == 0).collect();
    let mut running: Vec<(f64, usize, Grant)> = Vec::new();
    let (mut now, mut held, mut peak) = (0.0_f64, 0_u64, 0_u64);
    loop {
        let candidates: Vec<usize> = ready.iter().copied().collect();
        for at in candidates {
            if slots.is_full() {
                break;
            }
            let Some(grant) = slots.take(jobs[at].needs) else { continue };
            ready.remove(&at);
            held += jobs[at].memory;
            running.push((now + jobs[at].seconds, at, grant));
        }
        peak = peak.max(held);
        let first = running.iter().enumerate().min_by(|(_, a), (_, b)| a.0.total_cmp(&b.0));
        // What is ready now could never run here: nobody waits for it.
        let Some(first) = first.map(|(i, _)| i) else { return (now, peak) };
        let (end, at, grant) = running.swap_remove(first);
        slots.give(grant);
        held -= jobs[at].memory;
        now = end;
        for feed in std::mem::take(&mut jobs[at].feeds) {
            jobs[feed].open -= 1;
            if jobs[feed].open == 0 {
                ready.insert(feed);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::step::Cpu;

    fn run(steps: &[(f64, u64, &Needs, &[usize])], jobs: usize) -> (f64, u64) {
        let mut list: Vec<Job<'_>> = steps
            .iter()
            .map(|&(seconds, memory, needs, after)| {
                let feeds = Vec::new();
                Job { needs, seconds, memory, open: after.len(), feeds }
            })
            .collect();
        for (at, (.., after)) in steps.iter().enumerate() {
            after.iter().for_each(|&from| list[from].feeds.push(at));
        }
        let options = Options { jobs, memory: Some(100), ..Options::default() };
        simulate(&mut list, &mut Slots::new(&options))
    }

    #[test]
    fn wall_time_is_bound_by_slots_and_by_what_waits_for_what() {
        let one = &Needs::ONE;
        let wide = [(10.0, 5, one, &[][..]); 4];
        assert_eq!(run(&wide, 1), (40.0, 5));
        assert_eq!(run(&wide, 2), (20.0, 10));
        assert_eq!(run(&wide, 9), (10.0, 20));
        let chain = [(10.0, 5, one, &[][..]), (5.0, 7, one, &[0][..]), (1.0, 1, one, &[1][..])];
        assert_eq!(run(&chain, 9), (16.0, 7));
        let all = &Needs::ALL;
        assert_eq!(run(&[(10.0, 5, one, &[]), (5.0, 7, all, &[])], 2), (15.0, 7));
    }

    #[test]
    fn memory_that_is_asked_for_holds_steps_back() {
        let large = &Needs { memory: Some(60), ..Needs::ONE };
        assert_eq!(run(&[(10.0, 50, large, &[]), (5.0, 50, large, &[])], 4), (15.0, 50));
        // A step that can never run ends nothing.
        let never = &Needs { memory: Some(101), cpu: Cpu::All, ..Needs::ONE };
        assert_eq!(run(&[(10.0, 1, never, &[]), (5.0, 2, large, &[])], 4), (5.0, 2));
    }
}

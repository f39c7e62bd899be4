//! Which results a store's runs and pins use: what a collection starts from.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::Result;
use serde_json::Value;

use super::record::RecordFile;
use super::runs::RUN_LEASE;
use super::{Loaded, Made, Pin, Run, Runs};
use crate::digest::Digest;
use crate::store::{Item, Store, host};

/// A run, and what it uses.
#[derive(Debug)]
pub(super) struct Use {
    pub(super) run: String,
    pub(super) pipeline: String,
    /// When it ended, or began; Unix milliseconds.
    pub(super) last_unix_ms: u64,
    /// Every key that it came to, with the step's name: made, taken from the cache, or tried.
    pub(super) keys: BTreeMap<Digest, String>,
    /// Trees that it made for keys that had another result already.
    pub(super) differing: Vec<Digest>,
    /// Its process, or one that it started, may be there.
    pub(super) alive: bool,
    pub(super) pinned: bool,
    /// The run whose journal has its steps, if nothing had changed since that one.
    pub(super) since: Option<String>,
    /// Its journal; none if it is only known from its records (they came from another store, or
    /// its journal was deleted).
    pub(super) journal: Option<Item>,
}

/// The name of a step without its point.
fn step_name(id: &str) -> String {
    id.split('@').next().unwrap_or_default().to_owned()
}

/// Keys that a run came to: from its summary, else from its events.
fn keys(run: &Run) -> Result<BTreeMap<Digest, String>> {
    if let Some(summary) = &run.summary {
        let keys = summary.steps.iter().filter_map(|s| Some((s.key?, step_name(&s.id))));
        return Ok(keys.collect());
    }
    if !run.dir.join("events.jsonl").exists() {
        return Ok(BTreeMap::new());
    }
    let named = |event: Value| {
        let key = event["key"].as_str()?.parse().ok()?;
        Some((key, step_name(event["step"].as_str().unwrap_or_default())))
    };
    Ok(run.events()?.into_iter().filter_map(named).collect())
}

/// Who uses a store.
#[derive(Debug)]
pub(super) struct Uses {
    /// Newest first.
    pub(super) runs: Vec<Use>,
    /// Ids of what holds a lease, its own or one of a key: a worker may outlive its runner.
    pub(super) alive: BTreeSet<String>,
    /// Those of them that keep no journal: nobody can tell what they need.
    pub(super) unknown: BTreeSet<String>,
}

/// All runs of a store with what they use, newest first. A record that no run names counts as used
/// by the run that made it.
pub(super) fn uses(
    store: &Store,
    records: &BTreeMap<Digest, RecordFile>,
    pins: &[Pin],
    now_unix_ms: u64,
) -> Result<Uses> {
    let runs = Runs::of(store);
    let host = host();
    let pinned = |run: &str| pins.iter().any(|pin| pin.run.as_deref() == Some(run));
    // A journal stands under a lease from its beginning: so the leases are looked at after it.
    let journals = store.items("runs")?;
    let leased = store.leased();
    let holders = leased.iter().filter_map(|lease| Some(store.holder(lease)?.run));
    let own = leased.iter().filter_map(|lease| lease.strip_prefix(RUN_LEASE));
    let mut unknown: BTreeSet<String> = own.map(str::to_owned).collect();
    let alive: BTreeSet<String> = holders.chain(unknown.iter().cloned()).collect();
    let mut uses: BTreeMap<String, Use> = BTreeMap::new();
    for journal in journals {
        let Ok(run) = runs.load(journal.name()) else { continue };
        unknown.remove(&run.info.id);
        let quiet = now_unix_ms.saturating_sub(journal.modified_unix_ms);
        let elsewhere = run.may_be_elsewhere(&host, Duration::from_millis(quiet));
        let ended = run.summary.as_ref().map(|summary| summary.ended_unix_ms);
        let used = Use {
            keys: keys(&run)?,
            last_unix_ms: ended.unwrap_or(run.info.started_unix_ms),
            differing: Vec::new(),
            alive: elsewhere || alive.contains(&run.info.id),
            pinned: pinned(&run.info.id),
            since: run.info.unchanged.map(|unchanged| unchanged.since),
            journal: Some(journal),
            pipeline: run.info.pipeline,
            run: run.info.id,
        };
        uses.insert(used.run.clone(), used);
    }
    let named: BTreeSet<Digest> = uses.values().flat_map(|u| u.keys.keys().copied()).collect();
    let mut of_maker = |made: &Made, key: Option<Digest>, trees: &BTreeMap<String, Digest>| {
        let used = uses.entry(made.run.clone()).or_insert_with(|| Use {
            run: made.run.clone(),
            pipeline: made.pipeline.clone(),
            last_unix_ms: 0,
            keys: BTreeMap::new(),
            differing: Vec::new(),
            alive: alive.contains(&made.run),
            pinned: pinned(&made.run),
            since: None,
            journal: None,
        });
        if used.journal.is_none() {
            let ended = made.started_unix_ms.saturating_add((made.seconds * 1000.0) as u64);
            used.last_unix_ms = used.last_unix_ms.max(ended);
        }
        match key {
            Some(key) => drop(used.keys.insert(key, step_name(&made.step))),
            None => used.differing.extend(trees.values()),
        }
    };
    for (key, file) in records {
        if let Some((_, Loaded::Found(record))) = &file.record
            && !named.contains(key)
        {
            of_maker(&record.made, Some(*key), &record.ports);
        }
        for difference in file.ledger.iter().flat_map(|(_, differences)| differences) {
            of_maker(&difference.made, None, &difference.ports);
        }
    }
    let mut runs: Vec<Use> = uses.into_values().collect();
    runs.sort_by(|a, b| (b.last_unix_ms, &b.run).cmp(&(a.last_unix_ms, &a.run)));
    Ok(Uses { runs, alive, unknown })
}

/// The runs (by position, of a list from the newest on) that are among the newest `n` of their
/// pipeline, counted for every step by itself: a run that failed early, or ran only some steps,
/// does not take the place of an older one with the results of all.
pub(super) fn newest(uses: &[Use], n: usize, stands: impl Fn(&Digest) -> bool) -> BTreeSet<usize> {
    let mut runs: BTreeMap<&str, usize> = BTreeMap::new();
    let mut steps: BTreeMap<(&str, &str), usize> = BTreeMap::new();
    let counts_in = |count: &mut usize| {
        *count += 1;
        *count <= n
    };
    let mut kept = BTreeSet::new();
    for (i, used) in uses.iter().enumerate() {
        let pipeline = used.pipeline.as_str();
        let mut keep = counts_in(runs.entry(pipeline).or_default());
        let results = used.keys.iter().filter(|(key, _)| stands(key));
        let names: BTreeSet<&str> = results.map(|(_, step)| step.as_str()).collect();
        for step in names {
            keep |= counts_in(steps.entry((pipeline, step)).or_default());
        }
        if keep {
            kept.insert(i);
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    fn used(run: &str, pipeline: &str, steps: &[&str]) -> Use {
        let keys = steps.iter().map(|step| {
            let key = Digest::of(format!("{run} {step}").as_bytes());
            (key, (*step).to_owned())
        });
        Use {
            run: run.into(),
            pipeline: pipeline.into(),
            last_unix_ms: 0,
            keys: keys.collect(),
            differing: Vec::new(),
            alive: false,
            pinned: false,
            since: None,
            journal: None,
        }
    }

    #[test]
    fn the_newest_count_for_every_step() {
        let uses = [
            used("5", "p", &["sample"]),
            used("4", "q", &["sample", "train"]),
            used("3", "p", &["sample", "train"]),
            used("2", "p", &["sample", "train"]),
            used("1", "p", &["sample", "train", "merge"]),
        ];
        let kept = |n, failed: &[&str]| {
            let failed: Vec<Digest> = failed.iter().map(|f| Digest::of(f.as_bytes())).collect();
            newest(&uses, n, |key| !failed.contains(key)).into_iter().collect::<Vec<_>>()
        };
        assert!(kept(0, &[]).is_empty());
        assert_eq!(kept(1, &[]), [0, 1, 2, 4], "4 has the newest merge");
        assert_eq!(kept(2, &[]), [0, 1, 2, 3, 4]);
        assert_eq!(kept(1, &["3 train"]), [0, 1, 3, 4], "a step that failed has no result");
    }
}

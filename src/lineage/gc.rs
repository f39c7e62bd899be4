//! Collection of what is not needed any more: one function makes the plan, one applies it.
//!
//! Runs that are kept, runs that are alive, pins: these are the roots. A run holds every key that
//! it came to, results that it took from the cache included; so all steps of a run that is kept
//! stay, and what is upstream of them with them. A pin holds its results and, by
//! [`Made::sources`](super::Made::sources), all that they were made from. A record holds the trees
//! of its ports, a tree its blobs; a ledger holds what a run that is kept made differently. A
//! pipeline of which a run is alive loses no run at all, since nobody knows what that run will look
//! up next; no pipeline does while something is alive that keeps no journal (a reproduction).
//!
//! Without a budget everything on record is kept, and only what nothing refers to goes.

mod budget;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use serde::{Deserialize, Serialize};

pub use self::budget::Budget;
use super::record::RecordFile;
use super::uses::{Use, Uses, newest, uses};
use super::{Loaded, Pin, Pins, Record};
use crate::digest::Digest;
use crate::store::{Item, KEPT_ATTEMPT, Store, StoreError};

/// A folder of a run or of an attempt appears before what says whose it is.
const HALF_MADE: Duration = Duration::from_secs(60);

/// What a file is, in the order in which such files are removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// The record of a key.
    Record,
    /// Other results of a key whose record goes.
    Ledger,
    /// A manifest.
    Tree,
    /// A blob.
    Object,
    /// Where a blob lies outside the store.
    Origin,
    /// A part of a result, or the list of those that a result was made of.
    Memo,
    /// A checkpoint.
    Checkpoint,
    /// The folder of an attempt.
    Attempt,
    /// A damaged file that was set aside.
    Quarantine,
    /// A file that never got to its place.
    Temporary,
    /// The file of a lock that nobody holds.
    Lease,
    /// What a run that does nothing is recognised by.
    Unchanged,
    /// What was put at a place of an output where nothing lies any more.
    Output,
    /// The journal of a run.
    Run,
}

/// A file or folder that goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Removal {
    /// What it is.
    pub class: Class,
    /// Where it is in the store.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// Of a record: the instance that it is of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step: Option<String>,
}

/// A run that is no longer kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Dropped {
    /// Its id.
    pub run: String,
    /// Its pipeline.
    pub pipeline: String,
    /// When it ended, in Unix milliseconds.
    pub last_unix_ms: u64,
    /// Results that no other run needs.
    pub results: usize,
}

/// What a collection removes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Sweep {
    /// Runs that are no longer kept, oldest first. The journal of one that made a result which
    /// another still needs stays, with its logs.
    pub runs: Vec<Dropped>,
    /// Everything that goes, in the order of removal.
    pub removals: Vec<Removal>,
    /// Bytes of the store before.
    pub bytes_before: u64,
    /// Bytes of the store after.
    pub bytes_after: u64,
    /// Bytes above the budget that nothing may go for.
    pub over_budget: u64,
    /// Ids of the runs, and of reproductions, that are alive; their pipelines lose no run.
    pub alive: Vec<String>,
    /// Records that are damaged; they stay, and what they name with them.
    pub damaged_records: usize,
}

/// What a budget may drop: one after the other, from the first on.
#[derive(Debug)]
enum Candidate {
    /// Kept for inspection.
    Inspection(Class, Item),
    /// A position in the list of runs.
    Run(usize),
}

/// A store as it is read once.
struct Survey<'a> {
    store: &'a Store,
    budget: &'a Budget,
    records: BTreeMap<Digest, RecordFile>,
    /// Trees of a record's ports; damaged records included.
    ports: BTreeMap<Digest, Vec<Digest>>,
    pins: Vec<Pin>,
    uses: Uses,
    trees: BTreeMap<Digest, Item>,
    /// Blobs of the manifests that anything on record names.
    blobs: BTreeMap<Digest, Vec<Digest>>,
    objects: BTreeMap<Digest, Item>,
    origins: BTreeMap<Digest, Item>,
    /// Packs of them.
    memos: BTreeMap<Digest, Item>,
    /// By key of the step whose result was made of them.
    memo_uses: BTreeMap<Digest, (Item, Vec<Digest>)>,
    /// With whether an attempt at the key is under way.
    checkpoints: Vec<(Digest, Item, bool)>,
    unchanged: Vec<Item>,
    /// What goes whatever is kept.
    litter: Vec<Removal>,
    candidates: Vec<Candidate>,
    bytes: u64,
}

/// What is kept.
#[derive(Default)]
struct Marked {
    keys: BTreeSet<Digest>,
    trees: BTreeSet<Digest>,
    blobs: BTreeSet<Digest>,
}

impl<'a> Survey<'a> {
    fn of(store: &'a Store, budget: &'a Budget) -> Result<Self> {
        let records = Record::files(store)?;
        let pins = Pins::of(store).list()?;
        let uses = uses(store, &records, &pins, budget.now_unix_ms)?;
        let mut ports: BTreeMap<Digest, Vec<Digest>> = BTreeMap::new();
        for (key, file) in &records {
            match &file.record {
                Some((_, Loaded::Found(record))) => {
                    ports.insert(*key, record.ports.values().copied().collect());
                }
                Some((item, Loaded::Corrupt(_))) => {
                    ports.insert(*key, Record::trees_of_damaged(&item.path));
                }
                Some((_, Loaded::Absent)) | None => {}
            }
        }
        let differing = uses.runs.iter().flat_map(|used| &used.differing);
        let named: BTreeSet<Digest> = ports.values().flatten().chain(differing).copied().collect();
        let trees = store.by_digest("trees")?;
        let mut blobs = BTreeMap::new();
        for tree in named {
            match store.tree(&tree) {
                Ok(Some(manifest)) => {
                    blobs.insert(tree, manifest.entries.iter().map(|e| e.digest).collect());
                }
                Ok(None) => {}
                // What cannot be read now may be whole: nobody knows what it names.
                Err(e) if e.chain().any(|e| e.is::<StoreError>()) => return Err(e),
                // Damaged: what it named cannot be told any more.
                Err(_) => {}
            }
        }
        let mut checkpoints = Vec::new();
        for item in store.items("checkpoints")? {
            if let Ok(key) = item.name().parse() {
                let under_way = store.is_leased(item.name());
                checkpoints.push((key, item, under_way));
            }
        }
        let mut memo_uses = BTreeMap::new();
        for item in store.items("memo-uses")? {
            if let Ok(key) = item.name().parse() {
                memo_uses.insert(key, (item, store.memos_of(&key)));
            }
        }
        let (litter, candidates, bytes) = (Vec::new(), Vec::new(), 0);
        let (objects, origins) = (store.by_digest("objects")?, store.by_digest("origins")?);
        let mut survey = Self {
            store,
            budget,
            records,
            ports,
            pins,
            uses,
            trees,
            blobs,
            objects,
            origins,
            memos: store.memo_packs()?.0,
            memo_uses,
            checkpoints,
            unchanged: store.items("unchanged")?,
            litter,
            candidates,
            bytes,
        };
        survey.bytes = store.items("")?.iter().map(|item| item.bytes).sum();
        survey.look_at_folders()?;
        survey.look_at_runs();
        Ok(survey)
    }

    fn is_alive(&self, run: &str) -> bool {
        let elsewhere = |used: &Use| used.alive && used.run == run;
        self.uses.alive.contains(run) || self.uses.runs.iter().any(elsewhere)
    }

    fn removal(&self, class: Class, item: &Item, step: Option<String>) -> Removal {
        let path = item.path.strip_prefix(self.store.root()).unwrap_or(&item.path);
        Removal { class, path: path.to_path_buf(), bytes: item.bytes, step }
    }

    /// Attempts, quarantine, temporary files, leases, journals without a beginning.
    fn look_at_folders(&mut self) -> Result<()> {
        let (store, budget) = (self.store, self.budget);
        let stale = |item: &Item, age: Duration| budget.is_past(item.modified_unix_ms, age);
        let mut inspection = Vec::new();
        for item in store.items("attempts")? {
            match Attempt::of(item.name()) {
                Attempt::Kept => inspection.push((Class::Attempt, item)),
                Attempt::OfRun(run) if self.is_alive(run) => {}
                Attempt::OfRun(_) if stale(&item, budget.grace.max(HALF_MADE)) => {
                    self.litter.push(self.removal(Class::Attempt, &item, None));
                }
                Attempt::OfRun(_) => {}
            }
        }
        inspection.extend(store.items("quarantine")?.into_iter().map(|i| (Class::Quarantine, i)));
        inspection.sort_by_key(|(_, item)| item.modified_unix_ms);
        let age = budget.older_than.or(budget.max_bytes.map(|_| budget.grace));
        if let Some(age) = age {
            inspection.retain(|(_, item)| stale(item, age));
            let inspection = inspection.into_iter();
            self.candidates.extend(inspection.map(|(class, i)| Candidate::Inspection(class, i)));
        }
        let mut temporary = store.items("tmp")?;
        for folder in ["trees", "origins", "records"] {
            let files = store.sharded(folder)?.into_iter().map(|(_, item)| item);
            temporary.extend(files.filter(|item| is_temporary(item.name())));
        }
        for folder in ["pins", "outputs", "unchanged", "memo-uses"] {
            temporary.extend(store.items(folder)?.into_iter().filter(|i| is_temporary(i.name())));
        }
        temporary.extend(store.memo_packs()?.1);
        for item in temporary.iter().filter(|item| stale(item, budget.grace)) {
            self.litter.push(self.removal(Class::Temporary, item, None));
        }
        for item in store.items("outputs")? {
            if stale(&item, budget.grace) && is_of_nothing(&item.path) {
                self.litter.push(self.removal(Class::Output, &item, None));
            }
        }
        for item in store.items("leases")? {
            let old = !item.name().starts_with('.') && stale(&item, budget.grace);
            if old && !store.is_leased(item.name()) {
                self.litter.push(self.removal(Class::Lease, &item, None));
            }
        }
        // A folder or a file without a readable beginning.
        let known: BTreeSet<&Path> = self
            .uses
            .runs
            .iter()
            .filter_map(|used| Some(used.journal.as_ref()?.path.as_path()))
            .collect();
        let mut headless = store.items("runs")?;
        headless.retain(|item| {
            let alive = self.uses.alive.contains(item.name());
            let old = stale(item, budget.grace.max(HALF_MADE));
            !known.contains(item.path.as_path()) && old && !alive
        });
        for item in &headless {
            self.litter.push(self.removal(Class::Run, item, None));
        }
        Ok(())
    }

    /// Runs that the budget may drop, oldest first.
    fn look_at_runs(&mut self) {
        let budget = self.budget;
        if !budget.is_set() || !self.uses.unknown.is_empty() {
            return;
        }
        let stands = |key: &Digest| self.ports.contains_key(key);
        let newest = newest(&self.uses.runs, budget.keep_runs.unwrap_or(1), stands);
        let alive: BTreeSet<&str> =
            self.uses.runs.iter().filter(|u| u.alive).map(|u| u.pipeline.as_str()).collect();
        let may_go = |(i, used): &(usize, &Use)| {
            let old = budget.older_than.is_none_or(|age| budget.is_past(used.last_unix_ms, age));
            let held = used.pinned || newest.contains(i) || alive.contains(used.pipeline.as_str());
            old && !held
        };
        let runs: Vec<usize> =
            self.uses.runs.iter().enumerate().filter(may_go).map(|(i, _)| i).rev().collect();
        self.candidates.extend(runs.into_iter().map(Candidate::Run));
    }

    /// Whether a key has its result, as far as names tell.
    fn is_whole(&self, key: &Digest) -> bool {
        let record = self.records.get(key).and_then(|file| file.record.as_ref());
        let stands = |blob| self.objects.contains_key(blob) || self.origins.contains_key(blob);
        let whole = |tree| self.blobs.get(tree).is_some_and(|blobs| blobs.iter().all(stands));
        matches!(record, Some((_, Loaded::Found(_)))) && self.ports[key].iter().all(whole)
    }

    /// Everything that is needed once some runs are dropped.
    fn mark(&self, dropped: &BTreeSet<usize>) -> Marked {
        let mut marked = Marked::default();
        // What a pin holds, and what that was made from.
        let mut queue: Vec<Digest> =
            self.pins.iter().flat_map(|p| p.keys.iter().copied()).collect();
        while let Some(key) = queue.pop() {
            if marked.keys.insert(key)
                && let Some(RecordFile { record: Some((_, Loaded::Found(record))), .. }) =
                    self.records.get(&key)
            {
                queue.extend(record.made.sources.values());
            }
        }
        for (i, used) in self.uses.runs.iter().enumerate() {
            if !dropped.contains(&i) {
                marked.keys.extend(used.keys.keys());
                marked.trees.extend(&used.differing);
            }
        }
        let damaged = |file: &RecordFile| matches!(file.record, Some((_, Loaded::Corrupt(_))));
        marked.keys.extend(self.records.iter().filter(|(_, f)| damaged(f)).map(|(key, _)| *key));
        for key in &marked.keys {
            marked.trees.extend(self.ports.get(key).into_iter().flatten());
        }
        for tree in &marked.trees {
            marked.blobs.extend(self.blobs.get(tree).into_iter().flatten());
        }
        marked
    }

    /// What goes if the first `n` candidates are dropped.
    fn plan(&self, n: usize) -> Sweep {
        let budget = self.budget;
        let mut removals = self.litter.clone();
        let mut dropped = BTreeSet::new();
        for candidate in &self.candidates[..n] {
            match candidate {
                Candidate::Inspection(class, item) => {
                    removals.push(self.removal(*class, item, None));
                }
                Candidate::Run(i) => drop(dropped.insert(*i)),
            }
        }
        let marked = self.mark(&dropped);
        let orphan = |item: &Item| budget.is_past(item.modified_unix_ms, budget.grace);
        for (key, file) in &self.records {
            let stays = marked.keys.contains(key);
            if let (false, Some((item, loaded))) = (stays, &file.record) {
                let step = match loaded {
                    Loaded::Found(record) => Some(record.made.step.clone()),
                    Loaded::Absent | Loaded::Corrupt(_) => None,
                };
                removals.push(self.removal(Class::Record, item, step));
            }
            if let (false, Some((item, _))) = (stays, &file.ledger)
                && (file.record.is_some() || orphan(item))
            {
                removals.push(self.removal(Class::Ledger, item, None));
            }
        }
        // What lost its last reference goes at once; what never had one may be on its way.
        for (tree, item) in &self.trees {
            if !marked.trees.contains(tree) && (self.blobs.contains_key(tree) || orphan(item)) {
                removals.push(self.removal(Class::Tree, item, None));
            }
        }
        let named: BTreeSet<&Digest> = self.blobs.values().flatten().collect();
        for (class, blobs) in [(Class::Object, &self.objects), (Class::Origin, &self.origins)] {
            for (blob, item) in blobs {
                if !marked.blobs.contains(blob) && (named.contains(blob) || orphan(item)) {
                    removals.push(self.removal(class, item, None));
                }
            }
        }
        self.memos_to_remove(&marked, &orphan, &mut removals);
        for (key, item, under_way) in &self.checkpoints {
            let finished = self.is_whole(key);
            let age = match finished {
                true => budget.grace,
                false => budget.older_than.unwrap_or_default().max(budget.grace),
            };
            let needed = !finished && marked.keys.contains(key);
            if !under_way && !needed && budget.is_past(item.modified_unix_ms, age) {
                removals.push(self.removal(Class::Checkpoint, item, None));
            }
        }
        // Logs and curves of a result are in the journal of the run that made it, and the steps of
        // a run without changes in that of an earlier one.
        let kept = self.uses.runs.iter().enumerate().filter(|(i, _)| !dropped.contains(i));
        let mut sources: BTreeSet<&str> = kept.filter_map(|(_, u)| u.since.as_deref()).collect();
        for key in &marked.keys {
            if let Some(RecordFile { record: Some((_, Loaded::Found(record))), .. }) =
                self.records.get(key)
            {
                sources.insert(record.made.run.as_str());
            }
        }
        let mut runs = Vec::new();
        for &i in dropped.iter().rev() {
            let used = &self.uses.runs[i];
            let lost = used.keys.keys().filter(|k| self.ports.contains_key(k));
            let results = lost.filter(|key| !marked.keys.contains(key)).count();
            let journal = used.journal.as_ref().filter(|_| !sources.contains(used.run.as_str()));
            removals.extend(journal.map(|item| self.removal(Class::Run, item, None)));
            // One whose journal and results all stay was dropped before.
            if journal.is_some() || results > 0 {
                let (run, pipeline) = (used.run.clone(), used.pipeline.clone());
                let last_unix_ms = used.last_unix_ms;
                runs.push(Dropped { run, pipeline, last_unix_ms, results });
            }
        }
        // They name runs, and stand only while no record and no manifest comes or goes.
        let stale = [Class::Record, Class::Tree, Class::Run];
        if removals.iter().any(|removal| stale.contains(&removal.class)) {
            let unchanged = self.unchanged.iter().filter(|item| !is_temporary(item.name()));
            removals.extend(unchanged.map(|item| self.removal(Class::Unchanged, item, None)));
        }
        removals.sort_by(|a, b| (a.class, &a.path).cmp(&(b.class, &b.path)));
        let freed: u64 = removals.iter().map(|r| r.bytes).sum();
        let bytes_after = self.bytes.saturating_sub(freed);
        let damaged = |f: &&RecordFile| matches!(f.record, Some((_, Loaded::Corrupt(_))));
        let alive = self.uses.runs.iter().filter(|u| u.alive).map(|u| &u.run);
        Sweep {
            runs,
            removals,
            bytes_before: self.bytes,
            bytes_after,
            over_budget: budget.max_bytes.map_or(0, |max| bytes_after.saturating_sub(max)),
            alive: alive.chain(&self.uses.unknown).cloned().collect(),
            damaged_records: self.records.values().filter(damaged).count(),
        }
    }
}

impl Survey<'_> {
    /// Memos go with the keys whose results were made of them.
    fn memos_to_remove(
        &self,
        marked: &Marked,
        orphan: &dyn Fn(&Item) -> bool,
        removals: &mut Vec<Removal>,
    ) {
        let (mut named, mut used) = (BTreeSet::<&Digest>::new(), BTreeSet::<&Digest>::new());
        for (key, (item, memos)) in &self.memo_uses {
            named.extend(memos);
            if marked.keys.contains(key) {
                used.extend(memos);
            } else {
                removals.push(self.removal(Class::Memo, item, None));
            }
        }
        for (memo, item) in &self.memos {
            if !used.contains(memo) && (named.contains(memo) || orphan(item)) {
                removals.push(self.removal(Class::Memo, item, None));
            }
        }
    }
}

/// Whose folder under `attempts/` it is, by its name.
enum Attempt<'a> {
    /// Nobody's any more: it was set aside.
    Kept,
    OfRun(&'a str),
}

impl<'a> Attempt<'a> {
    fn of(name: &'a str) -> Self {
        match name.split_once('.') {
            _ if name.starts_with(KEPT_ATTEMPT) => Self::Kept,
            Some((run, _)) => Self::OfRun(run),
            None => Self::OfRun(name),
        }
    }
}

/// Whether a note about an output is of a place at which there is nothing. Not known of those that
/// do not name it.
fn is_of_nothing(note: &Path) -> bool {
    #[derive(Deserialize)]
    struct Note {
        path: PathBuf,
    }
    let text = std::fs::read(note).unwrap_or_default();
    let place = serde_json::from_slice(&text).ok().map(|Note { path }| path.symlink_metadata());
    matches!(place, Some(Err(e)) if e.kind() == std::io::ErrorKind::NotFound)
}

fn is_temporary(name: &str) -> bool {
    name.starts_with('.') && name.ends_with(".tmp")
}

/// What a collection would remove now.
///
/// # Errors
/// When something in the store cannot be read: what it refers to is not known then.
pub fn plan_sweep(store: &Store, budget: &Budget) -> Result<Sweep> {
    let survey = Survey::of(store, budget)?;
    let all = survey.candidates.len();
    let Some(max) = budget.max_bytes else { return Ok(survey.plan(all)) };
    // Each candidate more leaves less, so the fewest that will do are found by halving.
    let (mut enough, mut few) = (all, 0);
    while few < enough {
        let half = few.midpoint(enough);
        if survey.plan(half).bytes_after <= max { enough = half } else { few = half + 1 }
    }
    Ok(survey.plan(enough))
}

/// Removes what a plan says: records first, journals last.
fn apply(store: &Store, sweep: &Sweep) -> Result<()> {
    let (records, rest): (Vec<_>, Vec<_>) =
        sweep.removals.iter().partition(|removal| removal.class == Class::Record);
    let mut folders = BTreeSet::new();
    for removal in records {
        let path = store.root().join(&removal.path);
        store.remove(&path)?;
        folders.extend(path.parent().map(Path::to_path_buf));
    }
    // A record must never come back after a crash when what it names is gone.
    folders.iter().try_for_each(|folder| store.disk().sync(folder))?;
    rest.into_iter().try_for_each(|removal| store.remove(&store.root().join(&removal.path)))
}

/// Plans and removes, while nobody else relies on what goes. `wait` is called, once, if others
/// share the store and have to be waited for.
///
/// # Errors
/// When something in the store cannot be read, or the disk refuses. The store is whole then, and
/// the next collection goes on.
pub fn sweep(store: &Store, budget: &Budget, wait: &mut dyn FnMut()) -> Result<Sweep> {
    let mut waited = false;
    let _alone = loop {
        if let Some(alone) = store.try_lock_alone()? {
            break alone;
        }
        if !std::mem::replace(&mut waited, true) {
            wait();
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let sweep = plan_sweep(store, budget)?;
    apply(store, &sweep)?;
    Ok(sweep)
}

//! What a store remembers of earlier steps: the nearest key to a new one, and what steps like it
//! cost.

use std::cell::{OnceCell, RefCell};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;

use anyhow::Result;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::record::record_files;
use super::why::{Since, fields, leaves};
use super::{Loaded, Record, Runs, Why, difference, unix_ms};
use crate::digest::Digest;
use crate::store::Store;

/// A key that is to be explained.
#[derive(Debug, Clone, Copy)]
pub struct Current<'a> {
    /// What the key is the digest of.
    pub preimage: &'a Value,
    /// The key.
    pub key: Digest,
    /// The step's name in the file.
    pub step: &'a str,
    /// The instance.
    pub id: &'a str,
    /// Kind of the step.
    pub kind: &'a str,
    /// The step behind each input, by path in the pre-image.
    pub sources: &'a BTreeMap<String, String>,
}

/// How much an earlier step is the same as another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Likeness {
    /// The same instance of the same pipeline.
    Instance,
    /// The same step of the same pipeline, at another point.
    Step,
    /// A step of the same name and kind in another pipeline.
    Name,
    /// Another step of the same kind.
    Kind,
}

/// What there is to know of a record without reading it again.
#[derive(Debug)]
struct Sketch {
    key: Digest,
    step: String,
    pipeline: String,
    started_unix_ms: u64,
    /// Digests of the fields' paths and values, sorted by path.
    fields: Box<[(u64, u64)]>,
}

/// What of a record goes into its sketch.
#[derive(Deserialize)]
struct Sealed {
    record: Outline,
}

#[derive(Deserialize)]
struct Outline {
    key: Digest,
    kind: String,
    preimage: Value,
    made: OutlineMade,
}

#[derive(Deserialize)]
struct OutlineMade {
    step: String,
    pipeline: String,
    started_unix_ms: u64,
}

fn hash(value: &(impl Hash + ?Sized)) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// Fields as pairs of numbers: to compare them is cheap, and a collision only costs the choice of
/// the nearest its best.
fn digests(preimage: &Value) -> Box<[(u64, u64)]> {
    let leaves = leaves(preimage);
    let mut pairs: Vec<(u64, u64)> =
        leaves.iter().map(|(path, leaf)| (hash(path), hash(&leaf.value.to_string()))).collect();
    pairs.sort_unstable();
    pairs.into()
}

/// How many fields differ; counted up to a limit.
fn distance(a: &[(u64, u64)], b: &[(u64, u64)], limit: usize) -> usize {
    let (mut i, mut j, mut differ) = (0, 0, 0);
    while (i < a.len() || j < b.len()) && differ < limit {
        match (a.get(i), b.get(j)) {
            (Some(x), Some(y)) if x.0 == y.0 => {
                differ += usize::from(x.1 != y.1);
                (i, j) = (i + 1, j + 1);
            }
            (Some(x), Some(y)) if x.0 > y.0 => (j, differ) = (j + 1, differ + 1),
            (None, _) => (j, differ) = (j + 1, differ + 1),
            _ => (i, differ) = (i + 1, differ + 1),
        }
    }
    differ
}

/// Distinct fields of both.
fn union(a: &[(u64, u64)], b: &[(u64, u64)]) -> usize {
    a.iter().chain(b).map(|pair| pair.0).collect::<BTreeSet<u64>>().len()
}

impl Sketch {
    /// From the text of a record; its seal is checked once it is chosen.
    fn read(path: &Path) -> Option<(String, Self)> {
        let Sealed { record } = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
        let Outline { key, kind, preimage, made } = record;
        let OutlineMade { step, pipeline, started_unix_ms } = made;
        let fields = digests(&preimage);
        Some((kind, Self { key, step, pipeline, started_unix_ms, fields }))
    }
}

/// The records of one kind.
#[derive(Debug, Default)]
struct Group {
    /// Newest first.
    sketches: Vec<Sketch>,
    /// Positions by instance, and by step.
    by_id: BTreeMap<String, Vec<usize>>,
    by_step: BTreeMap<String, Vec<usize>>,
}

impl Group {
    fn add(&mut self, sketch: Sketch) {
        let (at, id) = (self.sketches.len(), sketch.step.clone());
        let step = id.split('@').next().unwrap_or_default().to_owned();
        self.by_step.entry(step).or_default().push(at);
        self.by_id.entry(id).or_default().push(at);
        self.sketches.push(sketch);
    }

    fn instance(&self, id: &str) -> impl Iterator<Item = &Sketch> {
        self.by_id.get(id).into_iter().flatten().map(|&at| &self.sketches[at])
    }

    fn step(&self, step: &str) -> impl Iterator<Item = &Sketch> {
        self.by_step.get(step).into_iter().flatten().map(|&at| &self.sketches[at])
    }

    /// The newest of those that are most like an instance.
    fn most_like(&self, pipeline: &str, step: &str, id: &str) -> Option<(Likeness, &Sketch)> {
        let own = |sketch: &&Sketch| sketch.pipeline == pipeline;
        let like = |likeness| move |sketch| (likeness, sketch);
        self.instance(id)
            .find(own)
            .map(like(Likeness::Instance))
            .or_else(|| self.step(step).find(own).map(like(Likeness::Step)))
            .or_else(|| self.step(step).next().map(like(Likeness::Name)))
            .or_else(|| self.sketches.first().map(like(Likeness::Kind)))
    }

    /// The newest of the same instance, else the nearest of the same step, else the nearest of
    /// another step, which explains something only if it is much the same.
    fn nearest(
        &self,
        pipeline: &str,
        current: &Current<'_>,
        fields: &[(u64, u64)],
        tried: &BTreeSet<Digest>,
    ) -> Option<&Sketch> {
        let new = |sketch: &&Sketch| !tried.contains(&sketch.key);
        let own = |sketch: &&Sketch| sketch.pipeline == pipeline && new(sketch);
        let alike =
            |(distance, sketch): &(usize, &Sketch)| 2 * distance <= union(&sketch.fields, fields);
        self.instance(current.id)
            .find(own)
            .or_else(|| Some(closest(self.step(current.step).filter(own), fields)?.1))
            .or_else(|| Some(closest(self.step(current.step).filter(new), fields).filter(alike)?.1))
            .or_else(|| Some(closest(self.sketches.iter().filter(new), fields).filter(alike)?.1))
    }
}

/// The sketch with the fewest fields that differ, and how many; the first of several.
fn closest<'s>(
    sketches: impl Iterator<Item = &'s Sketch>,
    fields: &[(u64, u64)],
) -> Option<(usize, &'s Sketch)> {
    let mut best: Option<(usize, &Sketch)> = None;
    for sketch in sketches {
        let limit = best.map_or(usize::MAX, |(distance, _)| distance);
        let distance = distance(&sketch.fields, fields, limit);
        if distance < limit {
            best = Some((distance, sketch));
        }
        // Another key differs in one field at least.
        if distance <= 1 {
            break;
        }
    }
    best
}

/// Keys by instance, from the newest runs of the pipeline; runs are read as they are needed.
#[derive(Debug)]
struct Journals {
    /// Ids of runs that are not read yet, newest first.
    left: VecDeque<String>,
    /// Of each run that was read, newest first.
    read: Vec<BTreeMap<String, Digest>>,
}

/// Runs of a pipeline that are looked through for an instance, and runs that are read for that.
const RUNS: usize = 10;
const READ: usize = 50;

/// What a store remembers of a pipeline, read once and only when something is to be explained.
#[derive(Debug)]
pub struct Past {
    store: Store,
    pipeline: String,
    /// By kind.
    groups: OnceCell<BTreeMap<String, Group>>,
    journals: RefCell<Option<Journals>>,
    /// What began the chain that each step explained so far belongs to.
    since: RefCell<BTreeMap<String, Since>>,
}

impl Past {
    /// The past of a pipeline, by its name.
    pub fn of(store: &Store, pipeline: &str) -> Self {
        Self {
            store: store.clone(),
            pipeline: pipeline.to_owned(),
            groups: OnceCell::new(),
            journals: RefCell::new(None),
            since: RefCell::new(BTreeMap::new()),
        }
    }

    /// Why a key is not in the store: its difference to the newest record of the same instance,
    /// else of the same step, else of a step of the same kind that is much the same. An input from
    /// a step that was explained before names what began it.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn explain(&self, current: &Current<'_>) -> Result<Why> {
        let why = self.against_nearest(current)?;
        self.note(current.id, &why);
        Ok(why)
    }

    /// Remembers why an instance runs, for those that read it.
    pub fn note(&self, id: &str, why: &Why) {
        self.since.borrow_mut().insert(id.to_owned(), why.since(id));
    }

    fn against_nearest(&self, current: &Current<'_>) -> Result<Why> {
        let Some(near) = self.nearest(current)? else { return Ok(Why::FirstTime) };
        let mut changes = difference(&near.preimage, current.preimage, current.sources);
        let since = self.since.borrow();
        for change in &mut changes {
            change.since = change.from.as_ref().and_then(|step| since.get(step)).cloned();
        }
        Ok(Why::Changed {
            changes,
            of_fields: fields(&near.preimage, current.preimage),
            nearest: near.key,
            age_seconds: unix_ms().saturating_sub(near.made.started_unix_ms) / 1000,
            step: (near.made.step != current.id).then_some(near.made.step),
            run: near.made.run,
        })
    }

    fn nearest(&self, current: &Current<'_>) -> Result<Option<Record>> {
        // The journal of the newest run that has this instance names its key without a search.
        for key in self.journalled(current.id)? {
            if key != current.key
                && let Ok(Loaded::Found(record)) = Record::load(&self.store, &key)
                && record.kind == current.kind
            {
                return Ok(Some(*record));
            }
        }
        let Some(group) = self.groups()?.get(current.kind) else { return Ok(None) };
        let own = digests(current.preimage);
        let mut tried = BTreeSet::from([current.key]);
        while let Some(sketch) = group.nearest(&self.pipeline, current, &own, &tried) {
            if let Loaded::Found(record) = Record::load(&self.store, &sketch.key)? {
                return Ok(Some(*record));
            }
            // Damaged, or gone by now.
            tried.insert(sketch.key);
        }
        Ok(None)
    }

    /// The newest record of the step that is most like an instance, and how much it is.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn most_like(
        &self,
        kind: &str,
        step: &str,
        id: &str,
    ) -> Result<Option<(Likeness, Record)>> {
        let Some(group) = self.groups()?.get(kind) else { return Ok(None) };
        let Some((likeness, sketch)) = group.most_like(&self.pipeline, step, id) else {
            return Ok(None);
        };
        Ok(match Record::load(&self.store, &sketch.key)? {
            Loaded::Found(record) => Some((likeness, *record)),
            Loaded::Absent | Loaded::Corrupt(_) => None,
        })
    }

    /// The keys that an instance had in the newest runs, newest first: those of the first run that
    /// has it and of all that had to be read before it.
    fn journalled(&self, id: &str) -> Result<Vec<Digest>> {
        let runs = Runs::of(&self.store);
        let mut journals = self.journals.borrow_mut();
        if journals.is_none() {
            let left = runs.ids()?.into_iter().take(READ).collect();
            *journals = Some(Journals { left, read: Vec::new() });
        }
        let mut keys = Vec::new();
        let Some(Journals { left, read }) = journals.as_mut() else { return Ok(keys) };
        keys.extend(read.iter().filter_map(|run| run.get(id).copied()));
        while keys.is_empty() && read.len() < RUNS {
            let Some(run) = left.pop_front() else { break };
            let Ok(run) = runs.load(&run) else { continue };
            // One in which nothing had changed says what an earlier one says.
            if run.info.pipeline != self.pipeline
                || run.info.unchanged.is_some() && !read.is_empty()
            {
                continue;
            }
            let steps = run.summary.into_iter().flat_map(|summary| summary.steps);
            let run: BTreeMap<String, Digest> =
                steps.filter_map(|step| Some((step.id, step.key?))).collect();
            keys.extend(run.get(id).copied());
            read.push(run);
        }
        Ok(keys)
    }

    fn groups(&self) -> Result<&BTreeMap<String, Group>> {
        if let Some(groups) = self.groups.get() {
            return Ok(groups);
        }
        let paths = record_files(&self.store)?;
        let mut all: Vec<(String, Sketch)> =
            paths.par_iter().filter_map(|path| Sketch::read(path)).collect();
        all.sort_by(|(_, a), (_, b)| {
            b.started_unix_ms.cmp(&a.started_unix_ms).then_with(|| a.key.cmp(&b.key))
        });
        let mut groups: BTreeMap<String, Group> = BTreeMap::new();
        for (kind, sketch) in all {
            groups.entry(kind).or_default().add(sketch);
        }
        Ok(self.groups.get_or_init(|| groups))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn sketch(step: &str, pipeline: &str, with: &Value) -> Sketch {
        let preimage = json!({ "kind": "k", "with": with });
        Sketch {
            key: Digest::of(format!("{step} {pipeline} {with}").as_bytes()),
            step: step.into(),
            pipeline: pipeline.into(),
            started_unix_ms: 0,
            fields: digests(&preimage),
        }
    }

    /// The step and pipeline of the nearest to `train@r=8` of pipeline `p`.
    fn nearest(sketches: Vec<Sketch>, with: &Value) -> Option<(String, usize)> {
        let mut group = Group::default();
        sketches.into_iter().for_each(|s| group.add(s));
        let preimage = json!({ "kind": "k", "with": with });
        let (id, key, sources) = ("train@r=8", Digest::of(b"new"), BTreeMap::new());
        let current =
            Current { preimage: &preimage, key, step: "train", id, kind: "k", sources: &sources };
        let found = group.nearest("p", &current, &digests(&preimage), &BTreeSet::from([key]))?;
        let at = group.sketches.iter().position(|s| s.key == found.key)?;
        Some((found.step.clone(), at))
    }

    #[test]
    fn the_same_instance_comes_first_then_the_nearest_of_the_step() {
        let with = |r: u32, lr: f64, seed: u32| json!({ "r": r, "lr": lr, "seed": seed, "x": 1 });
        let new = with(8, 0.1, 1);
        // The newest is far, the third is as near as the second and older.
        let mut past = vec![
            sketch("train@r=2", "p", &with(2, 0.2, 2)),
            sketch("train@r=4", "p", &with(4, 0.1, 1)),
            sketch("train@r=16", "p", &with(16, 0.1, 1)),
        ];
        assert_eq!(nearest(past, &new), Some(("train@r=4".into(), 1)));
        past = vec![
            sketch("train@r=4", "p", &with(4, 0.1, 1)),
            sketch("train@r=8", "p", &with(8, 0.3, 3)),
        ];
        assert_eq!(nearest(past, &new), Some(("train@r=8".into(), 1)));
        // However many there are that are further away.
        past = (0..2000).map(|n| sketch("train@r=2", "p", &with(2, 0.2, n + 10))).collect();
        past.push(sketch("train@r=4", "p", &with(4, 0.1, 1)));
        assert_eq!(nearest(past, &new), Some(("train@r=4".into(), 2000)));
    }

    #[test]
    fn another_step_explains_only_if_it_is_much_the_same() {
        let new = json!({ "a": 1, "b": 2, "c": 3, "d": 4 });
        let much = json!({ "a": 1, "b": 2, "c": 3, "d": 5 });
        let other = json!({ "a": 9, "b": 9, "c": 9, "d": 9 });
        let of = |step: &str, pipeline: &str, with: &Value| {
            nearest(vec![sketch(step, pipeline, with)], &new).is_some()
        };
        assert!(of("tune", "p", &much) && of("train", "q", &much) && of("tune", "q", &much));
        assert!(!of("tune", "p", &other) && !of("train", "q", &other));
        assert!(of("train@r=1", "p", &other), "a point of the same step is always compared");
    }

    #[test]
    fn fields_are_counted_like_the_difference_that_is_shown() {
        let values = [
            json!({ "with": { "a": 1, "b": [1, 2], "c": { "d": "x" } }, "env": {} }),
            json!({ "with": { "a": 2, "b": [1, 2], "e": null }, "env": { "N": "1" } }),
            json!({ "with": { "b": [1], "c": { "d": "x", "f": 1.5 } }, "salt": "s" }),
        ];
        for a in &values {
            for b in &values {
                let shown = difference(a, b, &BTreeMap::new()).len();
                let (x, y) = (digests(a), digests(b));
                assert_eq!(distance(&x, &y, usize::MAX), shown, "{a} {b}");
                assert_eq!(union(&x, &y), fields(a, b));
            }
        }
    }
}

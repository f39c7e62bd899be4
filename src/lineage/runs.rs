//! The journal of a run: a folder with `run.json`, `events.jsonl`, `summary.json` and `logs/`; for
//! a run in which nothing had changed, a file with what `run.json` would hold.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use super::Why;
use crate::digest::Digest;
use crate::source::{Fault, suggest};
use crate::store::{Lease, Store, host};

/// How a run ended, or that it has not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Every step has its result.
    Done,
    /// A step failed.
    Failed,
    /// The user stopped it.
    Interrupted,
    /// It is running.
    Running,
    /// Its process ended without a word.
    Died,
}

/// What became of a step in a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Its result was there.
    Hit,
    /// It ran.
    Ran,
    /// It failed.
    Failed,
    /// It was not run.
    Skipped,
}

/// What is known when a run starts (`run.json`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunInfo {
    /// Sortable id, `20261124-033012-ab12` (UTC).
    pub id: String,
    /// The pipeline's name.
    pub pipeline: String,
    /// Its file.
    pub file: PathBuf,
    /// As typed.
    pub command_line: Vec<String>,
    /// `--set` values.
    pub sets: BTreeMap<String, String>,
    /// Unix milliseconds.
    pub started_unix_ms: u64,
    /// Host name.
    pub host: String,
    /// Process id.
    pub pid: u32,
    /// Version of this program.
    pub build: String,
    /// For a run in which nothing had changed: what it stands for. It has no summary and no events
    /// of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unchanged: Option<Unchanged>,
}

/// A run that found every result in the cache, as an earlier one had left it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Unchanged {
    /// The run whose steps and keys are its own.
    pub since: String,
    /// Their number.
    pub steps: usize,
    /// Wall-clock seconds.
    pub seconds: f64,
}

/// A step in a run's summary.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepSummary {
    /// Instance.
    pub id: String,
    /// Its key, where it was reached.
    pub key: Option<Digest>,
    /// What became of it.
    pub state: State,
    /// Wall-clock seconds; 0 unless it ran.
    pub seconds: f64,
    /// Why it ran.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<Why>,
    /// Why it failed or was skipped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// What is known when a run has ended (`summary.json`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// How it ended.
    pub status: Status,
    /// Wall-clock seconds.
    pub seconds: f64,
    /// Unix milliseconds.
    pub ended_unix_ms: u64,
    /// Instances, in plan order.
    pub steps: Vec<StepSummary>,
}

/// A run as it stands in the journal.
#[derive(Debug, Clone)]
pub struct Run {
    /// From its start.
    pub info: RunInfo,
    /// From its end; absent while it runs or if it died.
    pub summary: Option<Summary>,
    /// How it ended, or that it has not.
    pub status: Status,
    /// Its folder.
    pub dir: PathBuf,
}

/// A run of another host that wrote something this recently may be alive, although no lock of it
/// is seen here: not every shared file system carries locks from host to host.
const ELSEWHERE: Duration = Duration::from_secs(24 * 3600);

impl Run {
    /// Whether it may go on where its locks are not seen from this host, having said nothing for
    /// so long.
    pub(super) fn may_be_elsewhere(&self, here: &str, quiet: Duration) -> bool {
        self.summary.is_none() && self.info.host != here && quiet < ELSEWHERE
    }

    /// The log of an instance; there is none for a hit.
    pub fn log_path(&self, step: &str) -> PathBuf {
        log_path(&self.dir, step)
    }

    /// The lines of its event stream, each a JSON object with `t` (Unix milliseconds) and the
    /// fields of `engine::RunEvent`. A torn last line is left out.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn events(&self) -> Result<Vec<serde_json::Value>> {
        let path = self.dir.join("events.jsonl");
        if self.info.unchanged.is_some() {
            return Ok(Vec::new());
        }
        let text = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        Ok(text.split(|&b| b == b'\n').filter_map(|l| serde_json::from_slice(l).ok()).collect())
    }

    /// The instance in its summary.
    pub fn step(&self, id: &str) -> Option<&StepSummary> {
        self.summary.as_ref()?.steps.iter().find(|s| s.id == id)
    }
}

/// Where the log of an instance of a run is; characters that file names should not have are
/// replaced, and a digest keeps such names apart. So it does where there are capitals, which not
/// every file system tells from small letters.
fn log_path(dir: &Path, step: &str) -> PathBuf {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-@=,".contains(c);
    let mut name: String = step.chars().map(|c| if plain(c) { c } else { '_' }).collect();
    let capitals = step.chars().any(|c| c.is_ascii_uppercase());
    if name != step || name.len() > 120 || capitals {
        name.truncate(120);
        name.push('-');
        name.push_str(&Digest::of(step.as_bytes()).short());
    }
    dir.join("logs").join(name + ".log")
}

/// The journals of a store.
#[derive(Debug, Clone)]
pub struct Runs {
    store: Store,
}

impl Runs {
    /// The journals of a store.
    pub fn of(store: &Store) -> Self {
        Self { store: store.clone() }
    }

    fn dir(&self) -> PathBuf {
        self.store.root().join("runs")
    }

    /// Ids of all runs, newest first.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn ids(&self) -> Result<Vec<String>> {
        let dir = self.dir();
        let mut ids = Vec::new();
        match std::fs::read_dir(&dir) {
            Ok(entries) => {
                for entry in entries {
                    let name = entry?.file_name();
                    ids.extend(name.to_str().filter(|n| !n.starts_with('.')).map(str::to_owned));
                }
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(e).with_context(|| format!("reading {}", dir.display())),
        }
        ids.sort_unstable_by(|a, b| b.cmp(a));
        Ok(ids)
    }

    /// All runs, newest first; a folder without a readable `run.json` is left out.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn list(&self) -> Result<Vec<Run>> {
        Ok(self.ids()?.iter().filter_map(|id| self.load(id).ok()).collect())
    }

    /// A run by id, unique beginning of an id, or `latest`.
    ///
    /// # Errors
    /// When there is none, or several begin so; the message names the nearest.
    pub fn find(&self, name: &str) -> Result<Run> {
        let ids = self.ids()?;
        if name == "latest" {
            let newest = ids.iter().find_map(|id| self.load(id).ok());
            return newest.ok_or_else(|| Fault::new("there are no runs yet").into());
        }
        if let Some(id) = ids.iter().find(|id| *id == name) {
            return self.load(id);
        }
        let matching: Vec<&String> = ids.iter().filter(|id| id.starts_with(name)).collect();
        match matching.as_slice() {
            [id] => self.load(id),
            [] => {
                let known: Vec<&str> = ids.iter().take(20).map(String::as_str).collect();
                let help = suggest(name, &known).unwrap_or_else(|| "there are no runs yet".into());
                Err(Fault::new(format!("there is no run `{name}`")).help(help).into())
            }
            [first, .., last] => {
                let fault = Fault::new(format!("{} runs begin with `{name}`", matching.len()));
                Err(fault.help(format!("from {last} to {first}")).into())
            }
        }
    }

    /// A run by its whole id.
    ///
    /// # Errors
    /// When its `run.json` is missing or unreadable.
    pub fn load(&self, id: &str) -> Result<Run> {
        let dir = self.dir().join(id);
        let path = dir.join("run.json");
        let text = match std::fs::read(&path) {
            Err(e) if e.kind() == ErrorKind::NotADirectory => std::fs::read(&dir),
            read => read,
        };
        let text = text.with_context(|| format!("reading {}", path.display()))?;
        let info: RunInfo =
            serde_json::from_slice(&text).with_context(|| path.display().to_string())?;
        let summary = match &info.unchanged {
            Some(unchanged) => Some(self.unchanged_summary(&info, unchanged)),
            None => Self::summary(&dir),
        };
        let status = match &summary {
            Some(summary) => summary.status,
            None if self.is_alive(id) => Status::Running,
            None => Status::Died,
        };
        Ok(Run { info, summary, status, dir })
    }

    fn summary(dir: &Path) -> Option<Summary> {
        serde_json::from_slice(&std::fs::read(dir.join("summary.json")).ok()?).ok()
    }

    /// The steps of the run that it stands for, all from the cache.
    fn unchanged_summary(&self, info: &RunInfo, unchanged: &Unchanged) -> Summary {
        let steps = Self::summary(&self.dir().join(&unchanged.since)).map(|s| s.steps);
        let hit = |step| StepSummary { state: State::Hit, seconds: 0.0, why: None, ..step };
        Summary {
            status: Status::Done,
            seconds: unchanged.seconds,
            ended_unix_ms: info.started_unix_ms + (unchanged.seconds * 1e3) as u64,
            steps: steps.into_iter().flatten().map(hit).collect(),
        }
    }

    /// Whether the process of a run is there.
    pub fn is_alive(&self, id: &str) -> bool {
        self.store.is_leased(&lease_name(id))
    }

    /// Whether the process of a run is there, or may be on another host.
    pub fn may_be_alive(&self, id: &str) -> bool {
        let last_word = |run: &Run| {
            let events = std::fs::metadata(run.dir.join("events.jsonl"));
            let quiet = events.and_then(|meta| meta.modified()).ok().map(|time| time.elapsed());
            // In the future counts as just now.
            quiet.map(Result::unwrap_or_default)
        };
        self.is_alive(id)
            || self.load(id).is_ok_and(|run| {
                last_word(&run).is_some_and(|quiet| run.may_be_elsewhere(&host(), quiet))
            })
    }

    /// Holds an id alive, so that [`Runs::is_alive`] says so and what lies under it is not swept:
    /// for work that keeps no journal.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn hold(&self, id: &str) -> Result<Lease> {
        // Whatever it looks up from now on stays: see `store::gc`.
        let _shared = self.store.lock_shared()?;
        self.store.lease(&lease_name(id), id)
    }

    /// Begins a journal under a new id.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn begin(&self, mut info: RunInfo) -> Result<Journal> {
        let disk = self.store.disk();
        let dir = self.new_place(&mut info, |place, _| Ok(disk.create_new_dir(place)?))?;
        let lease = self.hold(&info.id)?;
        self.store.unsynced().write_atomic(&dir.join("run.json"), &text_of(&info)?)?;
        disk.create_dir_all(&dir.join("logs"))?;
        let events = disk.open_append(&dir.join("events.jsonl"))?;
        Ok(Journal { store: self.store.clone(), info, dir, events, _lease: lease })
    }

    /// Notes a run in which [nothing had changed](Unchanged), and returns its id.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn note(&self, mut info: RunInfo) -> Result<String> {
        let store = self.store.unsynced();
        self.new_place(&mut info, |place, info| {
            Ok(store.disk().write_if_new(place, &text_of(info)?)?)
        })?;
        Ok(info.id)
    }

    /// Finds an id that is nobody else's, named by the time: that of the first place at which
    /// `make` makes something. It says `false` where something is there already.
    fn new_place(
        &self,
        info: &mut RunInfo,
        mut make: impl FnMut(&Path, &RunInfo) -> Result<bool>,
    ) -> Result<PathBuf> {
        let started = jiff::Timestamp::from_millisecond(i64::try_from(info.started_unix_ms)?)?;
        let stamp = started.strftime("%Y%m%d-%H%M%S").to_string();
        // The fraction of the second in 4 digits, so that ids sort by time; the next one if taken.
        let fraction = (info.started_unix_ms % 1000) * 65;
        self.store.disk().create_dir_all(&self.dir())?;
        for n in 0..65_536 {
            info.id = format!("{stamp}-{:04x}", (fraction + n) % 65_536);
            let place = self.dir().join(&info.id);
            if make(&place, info)? {
                return Ok(place);
            }
        }
        anyhow::bail!("no free run id")
    }
}

fn text_of(info: &RunInfo) -> Result<Vec<u8>> {
    let mut text = serde_json::to_vec_pretty(info)?;
    text.push(b'\n');
    Ok(text)
}

/// Begins the names of the leases of runs.
pub(super) const RUN_LEASE: &str = "run-";

fn lease_name(id: &str) -> String {
    format!("{RUN_LEASE}{id}")
}

/// Nanoseconds since 1970.
fn unix_ns() -> u128 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |d| d.as_nanos())
}

/// Milliseconds since 1970.
pub fn unix_ms() -> u64 {
    u64::try_from(unix_ns() / 1_000_000).unwrap_or(u64::MAX)
}

/// The journal of the run that this process is doing.
#[derive(Debug)]
pub struct Journal {
    store: Store,
    /// What was known at the start, the id included.
    pub info: RunInfo,
    /// Its folder.
    pub dir: PathBuf,
    events: std::fs::File,
    _lease: Lease,
}

impl Journal {
    /// Where the log of an instance goes.
    pub fn log_path(&self, step: &str) -> PathBuf {
        log_path(&self.dir, step)
    }

    /// Appends an event with the time.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn event(&mut self, event: &impl Serialize) -> Result<()> {
        #[derive(Serialize)]
        struct Line<'a, E> {
            t: u64,
            #[serde(flatten)]
            event: &'a E,
        }
        let mut line = serde_json::to_vec(&Line { t: unix_ms(), event })?;
        line.push(b'\n');
        self.store.disk().append(&mut self.events, &line, &self.dir)?;
        Ok(())
    }

    /// Ends the journal. That of a run of less than a second is not waited for until the disk
    /// has it.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn finish(self, summary: &Summary) -> Result<()> {
        let mut text = serde_json::to_vec(summary)?;
        text.push(b'\n');
        let path = self.dir.join("summary.json");
        if summary.seconds < 1.0 {
            return Ok(self.store.unsynced().write_atomic(&path, &text)?);
        }
        let disk = self.store.disk();
        disk.sync(&self.dir.join("run.json"))?;
        disk.sync(&self.dir.join("events.jsonl"))?;
        Ok(self.store.write_atomic(&path, &text)?)
    }
}

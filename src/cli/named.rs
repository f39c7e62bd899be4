//! Results as people name them: a run, a step of a run, a key or what it made.

use std::collections::BTreeMap;

use super::error::Failure;
use super::history::record_of;
use super::steps::{steps_named, steps_of};
use crate::digest::Digest;
use crate::lineage::{Record, Run, Runs, trace};
use crate::source::Fault;
use crate::store::Store;

/// Results that were named together.
pub(super) struct Named {
    /// The run, if a whole run was named.
    pub(super) run: Option<Run>,
    /// What they are, for people.
    pub(super) what: String,
    /// Their keys, with the instances that they are of.
    pub(super) keys: BTreeMap<Digest, String>,
}

/// Finds a run (an id, a unique beginning, `latest`), a step of the run `of`, or a key or output
/// digest by a beginning of at least six digits.
pub(super) fn named(store: &Store, what: &str, of: &str) -> Result<Named, Failure> {
    let runs = Runs::of(store);
    match runs.find(what) {
        Ok(run) => {
            let steps = steps_of(&run).into_iter();
            let keys = steps.filter_map(|step| Some((step.key?, step.id))).collect();
            return Ok(Named { what: format!("run {}", run.info.id), run: Some(run), keys });
        }
        // several runs begin so
        Err(error) if what == "latest" || runs.ids()?.iter().any(|id| id.starts_with(what)) => {
            return Err(error.into());
        }
        Err(_) => {}
    }
    let digest = what.len() >= 6 && what.bytes().all(|b| b.is_ascii_hexdigit());
    let steps = runs.find(of).map_err(Failure::from).and_then(|run| {
        let steps = steps_named(&run, Some(what))?;
        let keys: BTreeMap<_, _> = steps.into_iter().filter_map(|s| Some((s.key?, s.id))).collect();
        Ok((run, keys))
    });
    match steps {
        Ok((run, keys)) if keys.is_empty() => {
            let fault = Fault::new(format!("{what} has no result in run {}", run.info.id));
            Err(Failure::Usage(fault.help("name another run with --run").into()))
        }
        Ok((run, keys)) => {
            Ok(Named { run: None, what: format!("{what} of run {}", run.info.id), keys })
        }
        Err(_) if digest && (of == "latest" || runs.find(of).is_ok()) => {
            // A damaged record has its name still.
            let (key, step) = match Record::keys(store, what)?.as_slice() {
                [key] => (*key, record_of(store, Some(*key))?.map(|record| record.made.step)),
                _ => {
                    let record = trace(store, what)?.records.swap_remove(0);
                    (record.key, Some(record.made.step))
                }
            };
            let keys = BTreeMap::from([(key, step.unwrap_or_else(|| "key".to_owned()))]);
            Ok(Named { run: None, what: format!("key {}", key.short()), keys })
        }
        Err(failure) => Err(failure),
    }
}

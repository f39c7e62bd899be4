//! `flow gc`.

use serde_json::json;

use super::arguments::GcOptions;
use super::error::{Exit, Failure};
use super::session::store_here;
use super::{Stage, out, table};
use crate::lineage::{Budget, Class, Sweep, plan_sweep, sweep};

/// `flow gc [--keep-runs N] [--older-than AGE] [--max-size SIZE] [--dry-run]`.
pub(super) fn gc(stage: &Stage, options: &GcOptions) -> Result<Exit, Failure> {
    let store = store_here(stage)?;
    let budget = Budget {
        keep_runs: options.keep_runs,
        older_than: options.older_than,
        max_bytes: options.max_size,
        grace: options.grace,
        ..Budget::none()
    };
    let done = match options.dry_run {
        true => plan_sweep(&store, &budget)?,
        false => sweep(&store, &budget, &mut || {
            errln!("waiting until results that are being published are on record");
        })?,
    };
    if stage.json {
        let plan = serde_json::to_value(&done).map_err(anyhow::Error::from)?;
        outln!("{}", json!({ "applied": !options.dry_run, "plan": plan }))?;
    } else {
        show(&done, options.dry_run)?;
    }
    Ok(Exit::Done)
}

fn show(sweep: &Sweep, dry_run: bool) -> Result<(), Failure> {
    let runs = sweep.runs.iter().map(|run| {
        let (id, pipeline) = (run.run.clone(), run.pipeline.clone());
        vec![id, pipeline, table::when(run.last_unix_ms), run.results.to_string()]
    });
    let runs: Vec<_> = runs.collect();
    if !runs.is_empty() {
        out::text(&table::render(&["run", "pipeline", "ended", "results"], &runs))?;
        outln!("")?;
    }
    let mut rows: Vec<(Class, usize, u64)> = Vec::new();
    for removal in &sweep.removals {
        match rows.last_mut() {
            Some((class, files, bytes)) if *class == removal.class => {
                *files += 1;
                *bytes += removal.bytes;
            }
            _ => rows.push((removal.class, 1, removal.bytes)),
        }
    }
    let cells = |(class, n, bytes): &(Class, usize, u64)| {
        vec![plural(*class).to_owned(), n.to_string(), table::bytes(*bytes)]
    };
    let rows: Vec<_> = rows.iter().map(cells).collect();
    out::text(&table::render(&["what goes", "number", "size"], &rows))?;
    let freed = table::bytes(sweep.bytes_before - sweep.bytes_after);
    let left = table::bytes(sweep.bytes_after);
    let done = if dry_run { "would free" } else { "freed" };
    outln!("{done} {freed}, leaving {left}")?;
    if !sweep.alive.is_empty() {
        let runs = sweep.alive.join(", ");
        errln!("at work now, so nothing goes that they may need: {runs}");
    }
    if sweep.over_budget > 0 {
        let over = table::bytes(sweep.over_budget);
        errln!("{over} more than --max-size; the rest is pinned, in use or kept by the options");
    }
    if sweep.damaged_records > 0 {
        let n = sweep.damaged_records;
        errln!("{n} damaged records stay with what they name; `flow verify` sets them aside");
    }
    Ok(())
}

fn plural(class: Class) -> &'static str {
    match class {
        Class::Record => "records",
        Class::Ledger => "ledgers of differences",
        Class::Tree => "manifests",
        Class::Object => "objects",
        Class::Origin => "references",
        Class::Memo => "parts of results",
        Class::Checkpoint => "checkpoints",
        Class::Attempt => "attempts",
        Class::Quarantine => "damaged files",
        Class::Temporary => "temporary files",
        Class::Lease => "lock files",
        Class::Unchanged => "indexes of unchanged runs",
        Class::Output => "notes of outputs that are gone",
        Class::Run => "journals",
    }
}

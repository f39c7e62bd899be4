//! `flow verify`.

use std::collections::BTreeSet;

use indicatif::{ProgressBar, ProgressStyle};

use super::arguments::VerifyOptions;
use super::error::{Exit, Failure};
use super::named::named;
use super::session::store_here;
use super::{Stage, table};
use crate::digest::Digest;
use crate::lineage::{Checked, Part, verify as read_again};

/// `flow verify [RUN|STEP|KEY|all]`.
pub(super) fn verify(stage: &Stage, options: &VerifyOptions) -> Result<Exit, Failure> {
    let store = store_here(stage)?;
    let keys: Option<BTreeSet<Digest>> = match options.what.as_str() {
        "all" => None,
        what => Some(named(&store, what, &options.run)?.keys.into_keys().collect()),
    };
    let bar = if stage.plain || stage.json { ProgressBar::hidden() } else { ProgressBar::new(0) };
    let style = "{bar:30} {bytes}/{total_bytes}  {bytes_per_sec}  {eta}";
    let style = ProgressStyle::with_template(style);
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    let checked = read_again(&store, keys.as_ref(), &|done, all| {
        bar.set_length(all);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    let checked = checked?;
    if stage.json {
        outln!("{}", serde_json::to_value(&checked).map_err(anyhow::Error::from)?)?;
    } else {
        show(&checked)?;
    }
    Ok(if checked.findings.is_empty() { Exit::Done } else { Exit::StepFailed })
}

fn show(checked: &Checked) -> Result<(), Failure> {
    for finding in &checked.findings {
        let part = match finding.part {
            Part::Record => "record",
            Part::Tree => "manifest",
            Part::Blob => "file",
        };
        let how = if finding.damaged { "damaged, set aside" } else { "lost" };
        outln!("{part} {}  {how}: {}", finding.digest.short(), finding.reason)?;
    }
    for lost in &checked.lost {
        let step = lost.step.as_deref().unwrap_or("a step");
        let time = lost.seconds.map(|s| format!("; it took {}", table::seconds(s)));
        let time = time.unwrap_or_default();
        outln!("{step} (key {})  will be made again when it is needed{time}", lost.key.short())?;
    }
    let Checked { records, trees, blobs, bytes, .. } = checked;
    let bytes = table::bytes(*bytes);
    let findings = match checked.findings.len() {
        0 => "all as it should be".to_owned(),
        1 => "1 finding".to_owned(),
        n => format!("{n} findings"),
    };
    outln!("{records} records, {trees} manifests, {blobs} files ({bytes}): {findings}")?;
    Ok(())
}

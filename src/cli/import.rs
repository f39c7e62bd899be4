//! `flow import`: a pipeline of another tool.

use std::io::Write as _;
use std::path::Path;

use anyhow::Context as _;
use serde_json::json;

use super::Stage;
use super::arguments::ImportOptions;
use super::error::{Exit, Failure, diagnostics_json, show_diagnostics};
use super::out;
use crate::import::{ImportError, dvc};
use crate::pipeline::Settings;
use crate::source::Fault;

/// `flow import dvc.yaml [--output FILE]`.
pub(super) fn import(stage: &Stage, options: &ImportOptions) -> Result<Exit, Failure> {
    let from = &options.file;
    let beside = if from.is_dir() { Some(from.as_path()) } else { from.parent() };
    let target = options.output.as_deref();
    let to = target.map_or(beside, Path::parent).filter(|p| !p.as_os_str().is_empty());
    let to = to.unwrap_or(Path::new("."));
    if let Some(target) = target.filter(|t| t.symlink_metadata().is_ok()) {
        let fault = Fault::new(format!("{} is there already", target.display()));
        return Err(Failure::Usage(fault.help("remove it, or name another file").into()));
    }
    let settings = Settings { env: stage.environment.variables.clone(), ..Settings::default() };
    let imported = dvc::import(from, to, stage.kinds, &settings).map_err(|e| match e {
        ImportError::Refused(source, found) => Failure::Pipeline(source, found),
        ImportError::Unread(error) => Failure::Usage(error),
    })?;
    if stage.json {
        let warnings = diagnostics_json(&imported.source, &imported.warnings);
        let pipeline = target.is_none().then_some(&imported.text);
        outln!("{}", json!({ "pipeline": pipeline, "file": target, "warnings": warnings }))?;
    } else {
        show_diagnostics(&imported.source, &imported.warnings, stage.plain);
    }
    match target {
        Some(target) => {
            // Whole or not at all, and never in place of another.
            let put = || -> anyhow::Result<()> {
                let mut file = tempfile::Builder::new()
                    .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))
                    .tempfile_in(to)?;
                file.write_all(imported.text.as_bytes())?;
                file.as_file().sync_all()?;
                file.persist_noclobber(target)?;
                Ok(())
            };
            put().with_context(|| format!("writing {}", target.display()))?;
            errln!("{}: now `flow plan {0}`", target.display());
        }
        None if !stage.json => out::text(&imported.text)?,
        None => {}
    }
    Ok(Exit::Done)
}

//! A table as a split of a dataset.

use anyhow::Result;

use crate::artifact::{Features, ROWS};
use crate::data::{self, Table};
use crate::step::Context;

/// Writes the split's `data.parquet` and `features.json`.
pub(super) fn write_split(cx: &mut Context<'_>, split: &str, table: &Table) -> Result<()> {
    let dir = cx.out_dir(split)?;
    data::write(table, &dir.join(ROWS))?;
    let fields = table.schema.fields().iter();
    let features = Features {
        rows: table.rows() as u64,
        columns: fields.map(|f| (f.name().clone(), f.data_type().to_string())).collect(),
        classes: table.classes.clone(),
    };
    cx.write_json(&dir, "features.json", &features)?;
    cx.fact(&format!("rows.{split}"), table.rows());
    Ok(())
}

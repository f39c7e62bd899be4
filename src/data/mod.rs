//! Rows: readers of the usual formats, Parquet out, splits, class names, and samples.
//!
//! A [`Table`] is what every reader gives and what [`write()`] takes: Arrow record batches of one
//! schema, with the class names that the file itself knows. The bytes that [`write()`] makes
//! depend on the rows alone: not on how they were cut into batches, on the time or on the machine.

mod card;
mod delimited;
pub mod doctor;
mod format;
mod json;
mod labels;
mod parquet;
mod read;
mod sample;
mod splits;
mod table;
mod text;

pub use card::{Card, Config, DataFiles};
pub use format::{Codec, Format};
pub use labels::{Labels, grouped, looks_sorted};
pub use parquet::write;
pub use read::{OnError, Quote, Reading, read, read_all};
pub use sample::{Draw, Pool, Stratum};
pub use splits::{Found, glob_match, is_split_name, of_config, of_names, with_rows};
pub use table::Table;

//! Rows: readers of the usual formats, Parquet out, splits, class names, and samples.
//!
//! A [`Table`] is what every reader gives and what [`write()`] takes: Arrow record batches of one
//! schema, with the class names that the file itself knows. The bytes that [`write()`] makes
//! depend on the rows alone: not on how they were cut into batches, on the time or on the machine.

mod card;
mod deduplicate;
mod delimited;
pub mod doctor;
mod document;
mod format;
mod gather;
mod group;
mod interleave;
mod json;
mod labels;
mod minhash;
mod parquet;
mod read;
mod reshape;
mod sample;
mod scan;
mod splits;
mod stream;
mod table;
mod text;

pub use card::{Card, Config, DataFiles};
pub use deduplicate::{Deduplicate, Seen};
pub use format::{Codec, Format, is_archive};
pub use gather::{BUDGET, gather};
pub use group::Groups;
pub use interleave::{How, Mix, Stop, interleave, typed};
pub use labels::{Labels, grouped, looks_sorted};
pub use minhash::Near;
pub use parquet::write;
pub use read::{OnError, Quote, Reading, read, read_all};
pub use reshape::{Cast, Reshape, Reshaper, environment};
pub use sample::{Draw, Pool, Stratum};
pub use scan::Scan;
pub use splits::{Found, glob_match, is_split_name, of_config, of_names, with_rows};
pub use stream::{RowStream, RowWriter};
pub use table::Table;

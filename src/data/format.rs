//! What a file holds, from its name.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use anyhow::{Context as _, Result};

use crate::source::Fault;

/// How rows are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Format {
    /// Apache Parquet.
    Parquet,
    /// A JSON object per line.
    Jsonl,
    /// A JSON list of objects, or an object with one in a field.
    Json,
    /// Comma-separated, with a header.
    Csv,
    /// Tab-separated, with a header.
    Tsv,
    /// A row per line, column `text`.
    Text,
}

/// How the bytes are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    /// Not at all.
    Plain,
    /// gzip.
    Gzip,
    /// Zstandard.
    Zstd,
}

impl Format {
    /// Format and packing from a file's name (in a repository or a URL; a cache's path says
    /// nothing), or `None` for a name without a known ending.
    pub fn of_name(name: &str) -> Option<(Self, Codec)> {
        let name = name.rsplit('/').next().unwrap_or(name).to_ascii_lowercase();
        let (name, codec) = match name.rsplit_once('.') {
            Some((stem, "gz" | "gzip")) => (stem, Codec::Gzip),
            Some((stem, "zst" | "zstd")) => (stem, Codec::Zstd),
            _ => (name.as_str(), Codec::Plain),
        };
        let format = match name.rsplit_once('.')?.1 {
            "parquet" | "pq" => Self::Parquet,
            "jsonl" | "ndjson" => Self::Jsonl,
            "json" => Self::Json,
            "csv" => Self::Csv,
            "tsv" => Self::Tsv,
            "txt" | "text" => Self::Text,
            _ => return None,
        };
        Some((format, codec))
    }

    /// Like [`Format::of_name`].
    ///
    /// # Errors
    /// When the ending is not known; the message lists those that are.
    pub fn required(name: &str) -> Result<(Self, Codec)> {
        if is_archive(name) {
            let fault =
                Fault::new(format!("`{name}` is an archive, and archives are not unpacked"));
            return Err(fault.help("unpack it, and name its files under `files`").into());
        }
        Self::of_name(name).ok_or_else(|| {
            Fault::new(format!("`{name}` has no ending that says what it holds"))
                .help(
                    "known are .parquet, .jsonl, .json, .csv, .tsv and .txt, each also .gz or .zst",
                )
                .into()
        })
    }
}

/// Whether a name is that of an archive, which holds files and not rows.
pub fn is_archive(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    let packed = [".gz", ".bz2", ".xz", ".zst"].iter().find_map(|end| name.strip_suffix(end));
    let plain = packed.unwrap_or(&name);
    plain.ends_with(".tar") || [".zip", ".tgz", ".7z", ".rar"].iter().any(|end| name.ends_with(end))
}

impl Codec {
    /// Reads a file as it was before packing.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open(self, path: &Path) -> Result<Box<dyn Read>> {
        let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
        Ok(match self {
            Self::Plain => Box::new(file),
            // Several members in a row are one file, as gzip(1) has it.
            Self::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(BufReader::new(file))),
            Self::Zstd => Box::new(zstd::Decoder::new(file)?),
        })
    }
}

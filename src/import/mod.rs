//! Pipelines of other tools, made into pipelines of this one.
//!
//! What comes out is text, checked as any pipeline is. What has no counterpart here stands in it as
//! a comment, and is a warning at its place in the file it came from.

pub mod dvc;

use crate::source::{Diagnostic, Source};

/// A pipeline that was imported.
#[derive(Debug)]
pub struct Imported {
    /// The pipeline file.
    pub text: String,
    /// The file it was made from.
    pub source: Source,
    /// What of that file could not be taken over.
    pub warnings: Vec<Diagnostic>,
}

/// Why nothing was imported.
#[derive(Debug)]
pub enum ImportError {
    /// A file is wrong, or asks for what cannot be done: all that was found.
    Refused(Source, Vec<Diagnostic>),
    /// A file could not be read.
    Unread(anyhow::Error),
}

//! Writing to people and programs that may have stopped reading.

use std::fmt::Arguments;
use std::io::{self, Write as _};

/// A line of results on stdout. When nobody reads any more (`flow … | head`), that is an error
/// which ends the command in peace: see `Failure`.
macro_rules! outln {
    ($($text:tt)*) => { $crate::cli::out::line(format_args!($($text)*)) };
}

/// A line for people on stderr, if anyone still reads there.
macro_rules! errln {
    ($($text:tt)*) => { $crate::cli::out::note(format_args!($($text)*)) };
}

pub(super) fn line(text: Arguments<'_>) -> io::Result<()> {
    writeln!(io::stdout().lock(), "{text}")
}

pub(super) fn note(text: Arguments<'_>) {
    // In one piece: what others write does not come between.
    let _ = io::stderr().lock().write_all(format!("{text}\n").as_bytes());
}

/// Text that brings its own ends of lines.
pub(super) fn text(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

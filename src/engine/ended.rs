//! What is told of a step that failed, and what cannot run after it.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use petgraph::graph::NodeIndex;
use petgraph::visit::Dfs;

use crate::pipeline::Plan;

/// Lines of a failed step's log that are shown with its failure.
const LINES: usize = 20;

/// Bytes at the end of a log that are looked at: a log may be larger than memory.
const BYTES: u64 = 64 << 10;

/// The last lines of a log; none if it cannot be read.
pub(super) fn last_lines(log: &Path) -> Vec<String> {
    let Ok(mut file) = File::open(log) else { return Vec::new() };
    let size = file.metadata().map_or(0, |m| m.len());
    let start = size.saturating_sub(BYTES);
    let mut text = Vec::new();
    if file.seek(SeekFrom::Start(start)).and_then(|_| file.read_to_end(&mut text)).is_err() {
        return Vec::new();
    }
    let text = String::from_utf8_lossy(&text);
    // The first line may have lost its beginning.
    let lines: Vec<&str> = text.lines().skip(usize::from(start > 0)).collect();
    lines[lines.len().saturating_sub(LINES)..].iter().map(|&l| l.to_owned()).collect()
}

/// A step and everything that reads it, directly or not.
pub(super) fn downstream(plan: &Plan, node: NodeIndex) -> BTreeSet<NodeIndex> {
    let mut found = BTreeSet::new();
    let mut search = Dfs::new(&plan.graph, node);
    while let Some(next) = search.next(&plan.graph) {
        found.insert(next);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_log_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        assert!(last_lines(&log).is_empty());
        std::fs::write(&log, "one\ntwo\n").unwrap();
        assert_eq!(last_lines(&log), ["one", "two"]);
        let long: String = (0..30_000).map(|i| format!("line {i}\n")).collect();
        std::fs::write(&log, long).unwrap();
        let lines = last_lines(&log);
        assert_eq!((lines.len(), lines[0].as_str()), (20, "line 29980"));
    }
}

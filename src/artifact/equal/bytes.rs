//! Files without a form that we know: the first line or byte that differs.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read};
use std::path::Path;

use anyhow::Result;

use super::{Found, shortened};

/// Larger texts are not shown by lines.
const TEXT: u64 = 16 << 20;

/// Where two files first differ; they do.
pub(super) fn compare(old: &Path, new: &Path) -> Result<Found> {
    let small = |path: &Path| Ok::<_, std::io::Error>(std::fs::metadata(path)?.len() <= TEXT);
    if small(old)?
        && small(new)?
        && let (Ok(old), Ok(new)) = (std::fs::read_to_string(old), std::fs::read_to_string(new))
    {
        return Ok(lines(&old, &new));
    }
    let (mut a, mut b) = (BufReader::new(File::open(old)?), BufReader::new(File::open(new)?));
    let mut at = 0;
    loop {
        let (left, right) = (a.fill_buf()?, b.fill_buf()?);
        let n = left.len().min(right.len());
        if let Some(i) = (0..n).find(|&i| left[i] != right[i]) {
            let at = format!("byte {}", at + i);
            return Ok(Found::different(at, hex(&left[i..]), hex(&right[i..])));
        }
        if n == 0 {
            let length = |rest: &mut dyn Read| -> Result<String> {
                let mut left = Vec::new();
                rest.take(1).read_to_end(&mut left)?;
                Ok(if left.is_empty() { "ends".into() } else { "goes on".into() })
            };
            return Ok(Found::different(format!("byte {at}"), length(&mut a)?, length(&mut b)?));
        }
        a.consume(n);
        b.consume(n);
        at += n;
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().take(8).map(|b| format!("{b:02x}")).collect()
}

fn lines(old: &str, new: &str) -> Found {
    let (mut a, mut b) = (old.split('\n'), new.split('\n'));
    for number in 1_usize.. {
        let (left, right) = (a.next(), b.next());
        if left.is_none() && right.is_none() {
            break;
        }
        if left != right {
            let text = |line: Option<&str>| line.map_or_else(|| "(end)".to_owned(), shortened);
            return Found::different(format!("line {number}"), text(left), text(right));
        }
    }
    Found::EQUAL
}

#[cfg(test)]
mod tests {
    use super::*;

    fn both(old: &[u8], new: &[u8]) -> Option<(String, String, String)> {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        std::fs::write(&a, old).unwrap();
        std::fs::write(&b, new).unwrap();
        compare(&a, &b).unwrap().first
    }

    #[test]
    fn the_first_place_is_named() {
        let place = |at: &str, old: &str, new: &str| Some((at.into(), old.into(), new.into()));
        assert_eq!(both(b"one\ntwo", b"one\n2"), place("line 2", "two", "2"));
        assert_eq!(both(b"one", b"one\n"), place("line 2", "(end)", ""));
        assert_eq!(both(b"\xff\x01\x02", b"\xff\x01\x03"), place("byte 2", "02", "03"));
        assert_eq!(both(b"\xff", b"\xff\x01"), place("byte 1", "ends", "goes on"));
    }
}

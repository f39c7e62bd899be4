//! Rows in chunks whose boundaries their content decides, so that a row that comes, goes or
//! changes leaves all chunks but its own as they were.

use std::str::from_utf8;

use anyhow::{Context as _, Result};

use super::piece::{Part, Piece};

/// A file has up to this many chunks of a size before they are made larger.
const CHUNKS: u64 = 512;
/// The smallest size, in bytes of rows on average.
const SMALLEST: u64 = 16 << 10;
/// Chunks do not grow past this size unless a file would have [`MOST`] of them.
const LARGEST: u64 = 2 << 20;
const MOST: u64 = 1 << 14;

/// Rows as bytes: all that decides what becomes of them.
#[derive(Debug, Default)]
pub(super) struct Chunk {
    /// Number of the first row in the file, from 0.
    pub(super) first: u64,
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

/// A row of a chunk.
pub(super) struct RowReader<'a>(&'a [u8]);

const CUT: &str = "a chunk of rows is cut short";

impl<'a> RowReader<'a> {
    /// A label.
    pub(super) fn label(&mut self) -> Result<i32> {
        let (label, rest) = self.0.split_first_chunk().context(CUT)?;
        self.0 = rest;
        Ok(i32::from_le_bytes(*label))
    }

    /// A text.
    pub(super) fn text(&mut self) -> Result<&'a str> {
        let (length, rest) = self.0.split_first_chunk().context(CUT)?;
        let (text, rest) =
            rest.split_at_checked(u32::from_le_bytes(*length) as usize).context(CUT)?;
        self.0 = rest;
        Ok(from_utf8(text)?)
    }

    /// All pieces that are left.
    pub(super) fn pieces(&mut self) -> Result<Vec<Piece>> {
        let mut pieces = Vec::with_capacity(4);
        while let Some((part, rest)) = self.0.split_first() {
            self.0 = rest;
            let part = PARTS.get(usize::from(*part)).context(CUT)?;
            pieces.push(Piece::new(*part, self.text()?));
        }
        Ok(pieces)
    }
}

const PARTS: [Part; 3] = [Part::Template, Part::Input, Part::Target];

/// What a row is made of, as it is added to a chunk.
pub(super) struct RowWriter<'a>(&'a mut Vec<u8>);

impl RowWriter<'_> {
    pub(super) fn label(&mut self, label: i32) {
        self.0.extend(label.to_le_bytes());
    }

    pub(super) fn text(&mut self, text: &str) -> Result<()> {
        let length = u32::try_from(text.len()).context("a text is larger than 4 GiB")?;
        self.0.extend(length.to_le_bytes());
        self.0.extend(text.as_bytes());
        Ok(())
    }

    pub(super) fn piece(&mut self, part: Part, text: &str) -> Result<()> {
        let part = PARTS.iter().position(|p| *p == part).unwrap_or(0);
        self.0.push(u8::try_from(part)?);
        self.text(text)
    }
}

impl Chunk {
    /// Its content.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Where its rows end, as bytes.
    pub(super) fn ends(&self) -> Vec<u8> {
        self.ends.iter().flat_map(|end| (*end as u64).to_le_bytes()).collect()
    }

    /// Number of rows.
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    /// Its rows, in order.
    pub(super) fn rows(&self) -> impl Iterator<Item = RowReader<'_>> {
        let mut start = 0;
        self.ends
            .iter()
            .map(move |end| RowReader(&self.bytes[std::mem::replace(&mut start, *end)..*end]))
    }
}

/// Puts rows into chunks.
#[derive(Debug)]
pub(super) struct Splitter {
    size: u64,
    open: Chunk,
    rows: u64,
}

impl Splitter {
    /// For a file of so many bytes of rows.
    pub(super) fn new(bytes: u64) -> Self {
        let mut size = SMALLEST;
        while size < LARGEST && bytes / size > CHUNKS || bytes / size > MOST {
            size *= 4;
        }
        // 16 KiB, 64 KiB, … are what is asked for; 2 MiB is no such power
        if bytes / LARGEST <= MOST {
            size = size.min(LARGEST);
        }
        Self { size, open: Chunk::default(), rows: 0 }
    }

    /// Adds a row; the chunk that it ends, if it ends one.
    pub(super) fn push(
        &mut self,
        write: impl FnOnce(&mut RowWriter<'_>) -> Result<()>,
    ) -> Result<Option<Chunk>> {
        let start = self.open.bytes.len();
        write(&mut RowWriter(&mut self.open.bytes))?;
        let end = self.open.bytes.len();
        self.open.ends.push(end);
        self.rows += 1;
        let (row, whole) = ((end - start) as u64, end as u64);
        // A row ends a chunk more likely the longer it is: on average one row in so many bytes
        // does. No chunk is so small that it costs more to keep than to make, or too large to
        // hold in memory.
        let average = self.size - self.size / 4;
        let chance = (u64::MAX / average).saturating_mul(row);
        let ends = whole >= self.size / 4 && hash(&self.open.bytes[start..]) <= chance;
        Ok((ends || whole >= 4 * self.size).then(|| self.cut()))
    }

    /// What is left, if anything is.
    pub(super) fn finish(mut self) -> Option<Chunk> {
        (!self.open.ends.is_empty()).then(|| self.cut())
    }

    fn cut(&mut self) -> Chunk {
        let next = Chunk {
            first: self.rows,
            bytes: Vec::with_capacity(self.open.bytes.len()),
            ..Chunk::default()
        };
        std::mem::replace(&mut self.open, next)
    }
}

/// A hash that decides boundaries: fast, the same everywhere and always, and no proof of
/// anything; what a chunk is known by is its BLAKE3.
fn hash(bytes: &[u8]) -> u64 {
    const A: u64 = 0x9e37_79b9_7f4a_7c15;
    const B: u64 = 0xa076_1d64_78bd_642f;
    let fold = |hash: u64, word: u64| {
        let product = u128::from(hash ^ word ^ A) * u128::from(B);
        product as u64 ^ (product >> 64) as u64
    };
    let (words, rest) = bytes.as_chunks::<8>();
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    let hash = words.iter().fold(bytes.len() as u64, |hash, w| fold(hash, u64::from_le_bytes(*w)));
    fold(fold(hash, u64::from_le_bytes(last)), B)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn chunks(rows: &[String], bytes: u64) -> Vec<Chunk> {
        let mut splitter = Splitter::new(bytes);
        let mut chunks: Vec<Chunk> = Vec::new();
        for row in rows {
            chunks.extend(splitter.push(|w| w.piece(Part::Target, row)).unwrap());
        }
        chunks.extend(splitter.finish());
        chunks
    }

    fn numbered(rows: std::ops::Range<u32>) -> Vec<String> {
        rows.map(|i| format!("row {i} {}", "x".repeat((i as usize * 7919) % 400))).collect()
    }

    #[test]
    fn rows_come_back_as_they_were() {
        let mut splitter = Splitter::new(0);
        let added = splitter.push(|row| {
            row.label(-7);
            row.piece(Part::Template, "say ")?;
            row.piece(Part::Target, "é🙂")
        });
        assert!(added.unwrap().is_none());
        splitter.push(|row| row.piece(Part::Input, "")).unwrap();
        let chunk = splitter.finish().unwrap();
        assert_eq!((chunk.len(), chunk.first), (2, 0));
        let mut rows = chunk.rows();
        let mut row = rows.next().unwrap();
        assert_eq!(row.label().unwrap(), -7);
        let said = [Piece::new(Part::Template, "say "), Piece::new(Part::Target, "é🙂")];
        assert_eq!(row.pieces().unwrap(), said);
        assert_eq!(rows.next().unwrap().pieces().unwrap(), [Piece::new(Part::Input, "")]);
        assert!(rows.next().is_none());
        assert!(RowReader(&[1, 2, 3]).text().is_err() && RowReader(&[9]).pieces().is_err());
        assert!(Splitter::new(0).finish().is_none());
    }

    #[test]
    fn sizes_grow_with_the_file() {
        let size = |bytes: u64| Splitter::new(bytes).size;
        assert_eq!([size(0), size(8 << 20), size(9 << 20)], [16 << 10, 16 << 10, 64 << 10]);
        assert_eq!([size(600 << 20), size(10 << 30), size(30 << 30)], [2 << 20; 3]);
        let huge = size(1 << 40);
        assert!(huge > LARGEST && (1_u64 << 40) / huge <= MOST, "{huge}");
    }

    #[test]
    fn chunks_are_of_about_their_size() {
        let rows = numbered(0..20_000);
        let bytes: usize = rows.iter().map(String::len).sum();
        let made = chunks(&rows, bytes as u64);
        let size = bytes / made.len();
        assert!((12 << 10..24 << 10).contains(&size), "{size} bytes in each of {}", made.len());
        assert!(made.iter().all(|chunk| chunk.bytes().len() < 4 * (16 << 10) + 500));
        assert_eq!(made.iter().map(Chunk::len).sum::<usize>(), rows.len());
        let firsts = made.iter().scan(0, |rows, c| Some(std::mem::replace(rows, *rows + c.len())));
        assert!(made.iter().zip(firsts).all(|(chunk, first)| chunk.first == first as u64));
        // rows that are all the same are cut all the same
        let same = vec!["the same".to_owned(); 20_000];
        assert!(chunks(&same, 0).len() > 2);
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            cases: 24, failure_persistence: None, ..Default::default()
        })]
        #[test]
        fn an_edit_changes_few_chunks(
            at in 0usize..8000, what in 0usize..3, more in 1u32..80,
        ) {
            let rows = numbered(0..8000);
            let mut edited = rows.clone();
            match what {
                0 => edited[at] = "edited".into(),
                1 => drop(edited.remove(at)),
                _ => drop(edited.splice(at..at, numbered(9000..9000 + more))),
            }
            let before = chunks(&rows, 0);
            let known: std::collections::HashSet<&[u8]> =
                before.iter().map(Chunk::bytes).collect();
            let after = chunks(&edited, 0);
            let new = after.iter().filter(|chunk| !known.contains(chunk.bytes())).count();
            prop_assert!(new <= 4, "{new} of {} chunks are new", after.len());
        }
    }
}

//! safetensors: the same tensors, floats within a tolerance.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use anyhow::{Result, ensure};
use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

use super::{Found, Likeness, Tolerance};

/// Bytes of a tensor that are read at a time; a multiple of every element's size.
const CHUNK: usize = 1 << 20;

/// The longest header that the format allows, in bytes.
const HEADER: u64 = 100_000_000;

/// Compares the tensors of two files by name. Their order and the notes in the header do not
/// count. Nothing is mapped: a chunk of each is in memory at a time.
pub(super) fn compare(old: &Path, new: &Path, tolerance: &Tolerance) -> Result<Found> {
    let (mut a, mut b) = (Tensors::open(old)?, Tensors::open(new)?);
    let names: BTreeSet<String> = a.index.keys().chain(b.index.keys()).cloned().collect();
    let mut found = Found::EQUAL;
    for name in names {
        let at = format!("tensor `{name}`");
        let text = |info: Option<&TensorInfo>| {
            info.map_or_else(|| "absent".into(), |i| format!("{:?} {:?}", i.dtype, i.shape))
        };
        let (left, right) = (a.index.get(&name).cloned(), b.index.get(&name).cloned());
        match (left, right) {
            (Some(l), Some(r)) if l.dtype == r.dtype && l.shape == r.shape => {
                tensor(&at, (&mut a, &l), (&mut b, &r), tolerance, &mut found)?;
            }
            (l, r) => {
                let different = Found::different(at, text(l.as_ref()), text(r.as_ref()));
                found = Found { largest: found.largest, ..different };
            }
        }
        if found.likeness == Likeness::Different {
            break;
        }
    }
    Ok(found)
}

/// A file and where its tensors are.
struct Tensors {
    file: File,
    start: u64,
    index: BTreeMap<String, TensorInfo>,
}

impl Tensors {
    fn open(path: &Path) -> Result<Self> {
        let mut file = File::open(path)?;
        let mut length = [0; 8];
        file.read_exact(&mut length)?;
        let length = u64::from_le_bytes(length);
        ensure!(length <= HEADER, "the header is too long");
        let mut header = vec![0; usize::try_from(length)?];
        file.read_exact(&mut header)?;
        let metadata: Metadata = serde_json::from_slice(&header)?;
        let tensors = metadata.tensors().into_iter();
        let index = tensors.map(|(name, info)| (name, info.clone())).collect();
        Ok(Self { file, start: 8 + length, index })
    }

    fn seek(&mut self, info: &TensorInfo) -> Result<()> {
        self.file.seek(SeekFrom::Start(self.start + info.data_offsets.0 as u64))?;
        Ok(())
    }
}

/// Compares one tensor that has one type and shape in both files.
fn tensor(
    at: &str,
    (old, left): (&mut Tensors, &TensorInfo),
    (new, right): (&mut Tensors, &TensorInfo),
    tolerance: &Tolerance,
    found: &mut Found,
) -> Result<()> {
    old.seek(left)?;
    new.seek(right)?;
    // No number can be held closer than its own format holds it.
    let step = match left.dtype {
        Dtype::BF16 => 2_f64.powi(-7),
        Dtype::F16 => 2_f64.powi(-10),
        _ => 0.0,
    };
    let tolerance = Tolerance { relative: tolerance.relative.max(step), ..*tolerance };
    let size = left.data_offsets.1 - left.data_offsets.0;
    let (mut a, mut b) = (vec![0; size.min(CHUNK)], vec![0; size.min(CHUNK)]);
    let mut done = 0;
    while done < size {
        let n = (size - done).min(CHUNK);
        old.file.read_exact(&mut a[..n])?;
        new.file.read_exact(&mut b[..n])?;
        if a[..n] != b[..n] {
            elements(at, left, done, (&a[..n], &b[..n]), &tolerance, found);
        }
        if found.likeness == Likeness::Different {
            return Ok(());
        }
        done += n;
    }
    Ok(())
}

/// Compares a chunk that begins at a byte of the tensor.
fn elements(
    at: &str,
    info: &TensorInfo,
    start: usize,
    (old, new): (&[u8], &[u8]),
    tolerance: &Tolerance,
    found: &mut Found,
) {
    let place = |element: usize| format!("{at} {:?}", index(element, &info.shape));
    let mut floats = |size: usize, value: &dyn Fn(&[u8]) -> f64| {
        let pairs = old.chunks_exact(size).zip(new.chunks_exact(size)).enumerate();
        for (i, (a, b)) in pairs.filter(|(_, (a, b))| a != b) {
            found.floats(value(a), value(b), tolerance, || place(start / size + i));
        }
    };
    match info.dtype {
        Dtype::F64 => floats(8, &|b| f64::from_le_bytes(array(b))),
        Dtype::F32 => floats(4, &|b| f64::from(f32::from_le_bytes(array(b)))),
        Dtype::F16 => floats(2, &|b| f16::from_le_bytes(array(b)).to_f64()),
        Dtype::BF16 => floats(2, &|b| bf16::from_le_bytes(array(b)).to_f64()),
        other => {
            let size = (other.bitsize() / 8).max(1);
            let i = old.iter().zip(new).position(|(a, b)| a != b).unwrap_or_default() / size;
            let end = (size * (i + 1)).min(old.len());
            let text = |bytes: &[u8]| -> String {
                bytes[size * i..end].iter().rev().map(|b| format!("{b:02x}")).collect()
            };
            let hex = |bytes| format!("0x{}", text(bytes));
            let different = Found::different(place(start / size + i), hex(old), hex(new));
            *found = Found { largest: found.largest, ..different };
        }
    }
}

fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.try_into().unwrap_or([0; N])
}

/// The index of an element of a tensor stored row by row.
fn index(mut element: usize, shape: &[usize]) -> Vec<usize> {
    let mut index = vec![0; shape.len()];
    for (i, &n) in shape.iter().enumerate().rev() {
        index[i] = element % n.max(1);
        element /= n.max(1);
    }
    index
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use safetensors::tensor::TensorView;

    use super::*;

    type Stored = (Dtype, Vec<usize>, Vec<u8>);

    fn write(path: &Path, tensors: &[(&str, Stored)], note: &str) {
        let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
            (*name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
        });
        let note = HashMap::from([("note".to_owned(), note.to_owned())]);
        std::fs::write(path, safetensors::serialize(views, Some(note)).unwrap()).unwrap();
    }

    fn f32s(shape: &[usize], change: impl Fn(usize, f32) -> f32) -> Stored {
        let n = shape.iter().product();
        let bytes = (0..n).flat_map(|i| change(i, i as f32).to_le_bytes()).collect();
        (Dtype::F32, shape.to_vec(), bytes)
    }

    fn found(old: &[(&str, Stored)], new: &[(&str, Stored)]) -> Found {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        write(&a, old, "one");
        write(&b, new, "another note");
        compare(&a, &b, &Tolerance { relative: 1e-4, absolute: 0.0 }).unwrap()
    }

    #[test]
    fn notes_do_not_count_and_tensors_do() {
        let w = |x: f32| f32s(&[600, 1000], move |i, v| if i == 500_003 { x } else { v });
        let v = || f32s(&[2], |_, v| v);
        let old = [("w", w(500_003.0)), ("v", v())];
        assert_eq!(found(&old, &[("v", v()), ("w", w(500_003.0))]), Found::EQUAL);
        let near = found(&old, &[("w", w(500_004.0)), ("v", v())]);
        assert_eq!((near.likeness, near.largest), (Likeness::WithinTolerance, Some(1.0)));
        let far = found(&old, &[("w", w(7.0)), ("v", v())]);
        let place = ("tensor `w` [500, 3]".into(), "500003".into(), "7".into());
        assert_eq!((far.likeness, far.first), (Likeness::Different, Some(place)));
        let lost = found(&old, &[("w", w(500_003.0))]);
        assert_eq!(lost, Found::different("tensor `v`", "F32 [2]", "absent"));
        let shaped = found(&old, &[("w", w(500_003.0)), ("v", f32s(&[1, 2], |_, v| v))]);
        assert_eq!(shaped, Found::different("tensor `v`", "F32 [2]", "F32 [1, 2]"));
    }

    #[test]
    fn whole_numbers_are_exact_and_halves_have_a_step() {
        let ints = |x: u16| {
            let bytes = [1_u16, x].iter().flat_map(|v| v.to_le_bytes()).collect();
            (Dtype::U16, vec![2], bytes)
        };
        let different = Found::different("tensor `n` [1]", "0x0100", "0x0101");
        assert_eq!(found(&[("n", ints(256))], &[("n", ints(257))]), different);
        let halves = |bits: u16| (Dtype::BF16, vec![1], bits.to_le_bytes().to_vec());
        let one = bf16::from_f32(1.0).to_bits();
        let step = found(&[("h", halves(one))], &[("h", halves(one + 1))]);
        assert_eq!(step.likeness, Likeness::WithinTolerance);
        let far = found(&[("h", halves(one))], &[("h", halves(one + 4))]);
        assert_eq!(far.likeness, Likeness::Different);
        // the two zeroes are one number, and a NaN is a NaN
        let floats = |x: f32| f32s(&[1], move |_, _| x);
        let zero = found(&[("z", floats(0.0))], &[("z", floats(-0.0))]);
        assert_eq!(zero, Found::EQUAL);
        let nan = found(&[("z", floats(f32::NAN))], &[("z", floats(-f32::NAN))]);
        assert_eq!(nan, Found::EQUAL);
        assert_eq!(
            found(&[("z", floats(f32::NAN))], &[("z", floats(1.0))]).likeness,
            Likeness::Different
        );
    }
}

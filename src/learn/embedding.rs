//! Rows of a base's embedding that nothing was ever learnt in.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use half::{bf16, f16};
use safetensors::Dtype;

use super::files::Weights;

/// No trained row is as close to zero in every place (unsloth's bound).
const ZERO: f32 = 1e-16;

/// Ends of the names of the tensor, in the families that there are.
const NAMES: [&str; 2] = ["embed_tokens.weight", "word_embeddings.weight"];

/// What is known of an embedding from its numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Embedding {
    /// Rows, one for each token id.
    pub rows: usize,
    /// Ids whose rows are zero, or equal to the bit to another's, as rows are that were added and
    /// never trained (Llama 3's reserved tokens, tokens added with the mean of all others).
    pub untrained: BTreeSet<u32>,
}

/// Looks at the token embedding of some safetensors files, given as (name, readable path).
///
/// # Errors
/// When there is no such tensor, or it is of a type other than f32, bf16 or f16.
pub fn embedding(files: &[(String, PathBuf)]) -> Result<Embedding> {
    let weights = Weights::open(files)?;
    let name = weights.names().find(|name| NAMES.iter().any(|end| name.ends_with(end)));
    let name = name.context("the weights have no token embedding")?;
    let (bytes, info) = weights.raw(name).context("a tensor of the list")?;
    let [rows, width] = info.shape[..] else {
        anyhow::bail!("`{name}` has {} dimensions, not 2", info.shape.len());
    };
    let near: fn(&[u8]) -> bool = match info.dtype {
        Dtype::F32 => |x| f32::from_le_bytes([x[0], x[1], x[2], x[3]]).abs() <= ZERO,
        Dtype::BF16 => |x| bf16::from_le_bytes([x[0], x[1]]).to_f32().abs() <= ZERO,
        Dtype::F16 => |x| f16::from_le_bytes([x[0], x[1]]).to_f32().abs() <= ZERO,
        other => anyhow::bail!("`{name}` is of type {other:?}, expected F32, BF16 or F16"),
    };
    let size = if info.dtype == Dtype::F32 { 4 } else { 2 };
    let mut untrained = BTreeSet::new();
    let mut seen: BTreeMap<[u8; 32], u32> = BTreeMap::new();
    for (id, row) in bytes.chunks_exact((width * size).max(1)).enumerate() {
        let id = u32::try_from(id)?;
        if row.chunks_exact(size).all(near) {
            untrained.insert(id);
        } else if let Some(first) = seen.insert(*blake3::hash(row).as_bytes(), id) {
            untrained.extend([first, id]);
        }
    }
    Ok(Embedding { rows, untrained })
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor};

    use super::super::files::write;
    use super::*;

    #[test]
    fn zero_and_repeated_rows_are_untrained() {
        let dir = tempfile::tempdir().unwrap();
        let rows = [[0.5f32, 1.0], [0.0, -0.0], [2.0, 3.0], [0.5, -1.0], [2.0, 3.0], [0.0, 1e-17]];
        let table = Tensor::new(&rows, &Device::Cpu).unwrap();
        for (dtype, zero) in [(DType::F32, 5), (DType::BF16, 5), (DType::F16, 5)] {
            let path = dir.path().join("model.safetensors");
            let table = table.to_dtype(dtype).unwrap();
            write(&path, [("model.embed_tokens.weight".to_owned(), table)].into()).unwrap();
            let found = embedding(&[("model.safetensors".into(), path)]).unwrap();
            assert_eq!(found, Embedding { rows: 6, untrained: [1, 2, 4, zero].into() });
        }
    }
}

//! Reading and writing safetensors.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::tensor::{Metadata, SafeTensors, TensorInfo};

use crate::source::Fault;

/// The tensors of one or several safetensors files, mapped.
#[derive(Debug)]
pub(crate) struct Weights {
    maps: Vec<(Mmap, usize)>,
    index: BTreeMap<String, (usize, TensorInfo)>,
}

impl Weights {
    /// Opens files, given as (name, readable path). A name that does not end in `.safetensors` is
    /// passed over.
    ///
    /// # Errors
    /// When there is no such file, or one cannot be read or is damaged.
    pub(crate) fn open(files: &[(String, PathBuf)]) -> Result<Self> {
        let mut weights = Self { maps: Vec::new(), index: BTreeMap::new() };
        for (name, path) in files.iter().filter(|(name, _)| name.ends_with(".safetensors")) {
            let file = File::open(path).with_context(|| format!("cannot open {name}"))?;
            let map = map(&file).with_context(|| format!("cannot map {name}"))?;
            let (start, metadata) = header(&map).map_err(|cause| {
                Fault::new(format!("{name} is not a safetensors file, or is damaged"))
                    .help("fetch it again, and compare its checksum")
                    .cause(cause)
            })?;
            for (tensor, info) in metadata.tensors().into_iter().collect::<BTreeMap<_, _>>() {
                weights.index.insert(tensor, (weights.maps.len(), info.clone()));
            }
            weights.maps.push((map, start));
        }
        if weights.maps.is_empty() {
            let names: Vec<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
            return Err(Fault::new(format!("no safetensors file among [{}]", names.join(", ")))
                .help("only weights in safetensors format can be read")
                .into());
        }
        Ok(weights)
    }

    /// The names of the tensors, sorted.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.index.keys().map(String::as_str)
    }

    /// A tensor's shape.
    pub(crate) fn shape(&self, name: &str) -> Option<&[usize]> {
        self.index.get(name).map(|(_, info)| info.shape.as_slice())
    }

    /// A tensor's bytes in the file, and what they are.
    pub(crate) fn raw(&self, name: &str) -> Option<(&[u8], &TensorInfo)> {
        let (file, info) = self.index.get(name)?;
        let (map, start) = self.maps.get(*file)?;
        let bytes = map.get(start + info.data_offsets.0..start + info.data_offsets.1)?;
        Some((bytes, info))
    }

    /// A copy of a tensor, as stored.
    ///
    /// # Errors
    /// When there is none, or it is of a type other than f32, bf16 or f16.
    pub(crate) fn get(&self, name: &str) -> Result<Tensor> {
        let Some((file, info)) = self.index.get(name) else {
            bail!("the weights have no tensor `{name}`");
        };
        let (map, start) = &self.maps[*file];
        let bytes = &map[start + info.data_offsets.0..start + info.data_offsets.1];
        let dtype = match info.dtype {
            safetensors::Dtype::F32 => DType::F32,
            safetensors::Dtype::BF16 => DType::BF16,
            safetensors::Dtype::F16 => DType::F16,
            other => bail!("`{name}` is of type {other:?}, expected F32, BF16 or F16"),
        };
        Ok(Tensor::from_raw_buffer(bytes, dtype, &info.shape, &Device::Cpu)?)
    }
}

#[expect(unsafe_code, reason = "mapping a file is unsafe by its nature")]
fn map(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: objects of the store and of a hub cache are replaced by rename and never written in
    // place. A user's own file is not ours to hold still: written to while it is mapped it gives
    // torn numbers, cut short it kills this process (SIGBUS). Only plain numbers are read from
    // the mapping, each once, so nothing worse follows; a worker's death costs one attempt.
    unsafe { Mmap::map(file) }
}

/// Where the data begins, and what it holds; checked against the length of the file.
fn header(bytes: &[u8]) -> Result<(usize, Metadata)> {
    let (length, metadata) = SafeTensors::read_metadata(bytes)?;
    let start = length + 8;
    let expected = start + metadata.data_len();
    if bytes.len() != expected {
        bail!("it has {} bytes, its header describes {expected}", bytes.len());
    }
    Ok((start, metadata))
}

/// A tensor, and the type that it is written as.
struct Stored(Tensor, DType);

impl safetensors::View for Stored {
    fn dtype(&self) -> safetensors::Dtype {
        match self.1 {
            DType::BF16 => safetensors::Dtype::BF16,
            DType::F16 => safetensors::Dtype::F16,
            _ => safetensors::Dtype::F32,
        }
    }

    fn shape(&self) -> &[usize] {
        self.0.dims()
    }

    fn data(&self) -> Cow<'_, [u8]> {
        // `write` has made sure that each tensor is of one of these types; an empty answer would
        // be refused by the length check of the format.
        let flat = self.0.flatten_all().and_then(|flat| flat.to_dtype(self.1));
        let bytes = flat.and_then(|flat| {
            Ok(match flat.dtype() {
                DType::BF16 => bytes(&flat.to_vec1::<bf16>()?, |x| x.to_le_bytes()),
                DType::F16 => bytes(&flat.to_vec1::<f16>()?, |x| x.to_le_bytes()),
                _ => bytes(&flat.to_vec1::<f32>()?, |x| x.to_le_bytes()),
            })
        });
        Cow::Owned(bytes.unwrap_or_default())
    }

    fn data_len(&self) -> usize {
        self.0.elem_count() * self.1.size_in_bytes()
    }
}

fn bytes<T: Copy, const N: usize>(data: &[T], of: impl Fn(T) -> [u8; N]) -> Vec<u8> {
    data.iter().flat_map(|x| of(*x)).collect()
}

/// Writes f32, bf16 or f16 tensors as torch would (`{"format": "pt"}`), through a temporary file.
///
/// # Errors
/// When a tensor has another type, or the file cannot be written.
pub(crate) fn write(path: &Path, tensors: BTreeMap<String, Tensor>) -> Result<()> {
    let own = tensors.into_iter().map(|(name, tensor)| {
        let dtype = tensor.dtype();
        (name, (tensor, dtype))
    });
    write_as(path, own.collect())
}

/// The same, each tensor converted to a type as it is written.
///
/// # Errors
/// As [`write`].
pub(crate) fn write_as(path: &Path, tensors: BTreeMap<String, (Tensor, DType)>) -> Result<()> {
    for (name, (_, dtype)) in &tensors {
        if !matches!(dtype, DType::F32 | DType::BF16 | DType::F16) {
            bail!("`{name}` is of type {}, which is not written", dtype.as_str());
        }
    }
    let metadata = [("format".to_owned(), "pt".to_owned())].into_iter().collect();
    let partial = path.with_extension("partial");
    let tensors = tensors.into_iter().map(|(name, (tensor, dtype))| (name, Stored(tensor, dtype)));
    let written = safetensors::serialize_to_file(tensors, Some(metadata), &partial)
        .map_err(anyhow::Error::from)
        .and_then(|()| Ok(std::fs::rename(&partial, path)?));
    written.with_context(|| format!("cannot write {}", path.display()))
}

/// Writes JSON with sorted keys and two spaces, through a temporary file.
///
/// # Errors
/// When the file cannot be written.
pub(crate) fn write_json(path: &Path, value: &BTreeMap<String, serde_json::Value>) -> Result<()> {
    let partial = path.with_extension("partial");
    let text = serde_json::to_string_pretty(value)? + "\n";
    std::fs::write(&partial, text)
        .and_then(|()| std::fs::rename(&partial, path))
        .with_context(|| format!("cannot write {}", path.display()))
}

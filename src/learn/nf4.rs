//! 4-bit NormalFloat (Dettmers et al. 2023) as bitsandbytes stores it: blocks of 64 numbers share
//! a scale, each is the nearest of 16 quantiles; with double quantization the scales are 8-bit
//! numbers in blocks of 256.

use std::ops::Range;
use std::sync::OnceLock;

use anyhow::{Result, bail, ensure};
use candle_core::{DType, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;
use serde_json::json;

use super::ops::with_slices;

/// Numbers that share a scale.
pub const BLOCK: usize = 64;
/// Scales that share a scale.
pub const NESTED_BLOCK: usize = 256;

/// The 16 values of a code, times the block's scale.
pub const CODES: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Where one code ends and the next begins.
const MIDPOINTS: [f32; 15] = [
    -0.848_096_4,
    -0.610_632_9,
    -0.459_995_27,
    -0.339_679_43,
    -0.234_607_41,
    -0.137_911_73,
    -0.045_525_018,
    0.039_790_15,
    0.120_255_25,
    0.203_521_25,
    0.292_013_77,
    0.389_312_54,
    0.501_663_4,
    0.642_786_9,
    0.861_478_4,
];

/// The values of a block's codes, which lie two in a byte, the first in its upper half.
fn look_up(values: &[f32; 16], packed: &[u8], out: &mut [f32; BLOCK]) {
    // Vectors of 16 elements look up 16 codes at once.
    #[cfg(target_arch = "x86_64")]
    if let Some(simd) = pulp::x86::V4::try_new() {
        return simd.vectorize(
            #[inline(always)]
            || {
                let values = pulp::cast(*values);
                for (bytes, out) in packed.chunks_exact(8).zip(out.chunks_exact_mut(16)) {
                    // Two codes in 64 bits, 32 each.
                    let mut codes = [0_u64; 8];
                    for (codes, byte) in codes.iter_mut().zip(bytes) {
                        *codes = u64::from(*byte >> 4) | u64::from(*byte & 15) << 32;
                    }
                    let found = simd.avx512f._mm512_permutexvar_ps(pulp::cast(codes), values);
                    out.copy_from_slice(&pulp::cast::<_, [f32; 16]>(found));
                }
            },
        );
    }
    for (out, byte) in out.chunks_exact_mut(2).zip(packed) {
        out[0] = values[usize::from(byte >> 4)];
        out[1] = values[usize::from(byte & 15)];
    }
}

/// The scales of the blocks.
#[derive(Debug, Clone, PartialEq)]
enum Scales {
    Single(Vec<f32>),
    Double { codes: Vec<u8>, nested: Vec<f32>, offset: f32 },
}

/// A matrix in 4-bit NormalFloat.
#[derive(Debug, Clone, PartialEq)]
pub struct Nf4 {
    rows: usize,
    cols: usize,
    /// Data type of the numbers before quantization; they are rounded to it when unpacked.
    dtype: DType,
    packed: Vec<u8>,
    scales: Scales,
}

/// The bytes of a matrix in 4-bit NormalFloat.
pub(super) struct Parts<'a> {
    /// Two numbers a byte, the first in the upper half.
    pub(super) packed: &'a [u8],
    /// With double quantization the index of each block's scale in the [`dynamic_map`]...
    pub(super) codes: Option<&'a [u8]>,
    /// ...times one of these for each [`NESTED_BLOCK`] blocks, plus the offset. Else the scales.
    pub(super) scales: &'a [f32],
    pub(super) offset: f32,
    /// The numbers are rounded to it.
    pub(super) dtype: DType,
}

/// The signed dynamic map of bitsandbytes: 256 numbers in (-1, 1], 0 at index 127.
pub fn dynamic_map() -> &'static [f32; 256] {
    static MAP: OnceLock<[f32; 256]> = OnceLock::new();
    MAP.get_or_init(|| {
        let mut values = vec![0.0f32, 1.0];
        for i in 0..7 {
            let n = 1i32 << i;
            // As torch's linspace in f32: from the nearer end, each point rounded once.
            let step = f64::from((1.0 - 0.1f32) / n as f32);
            let edge = |k: i32| match k < (n + 1) / 2 {
                true => (f64::from(0.1f32) + step * f64::from(k)) as f32,
                false => (1.0 - step * f64::from(n - k)) as f32,
            };
            let power = 10f64.powi(i - 6) as f32;
            for k in 0..n {
                let value = (edge(k) + edge(k + 1)) / 2.0 * power;
                values.extend([value, -value]);
            }
        }
        values.sort_by(f32::total_cmp);
        let mut map = [0.0; 256];
        map.copy_from_slice(&values);
        map
    })
}

/// The code nearest to a number.
fn code(x: f32) -> u8 {
    MIDPOINTS.iter().filter(|m| **m < x).count() as u8
}

/// The index of the number of the dynamic map that is nearest, after rounding to one of 65,536
/// steps of [-1, 1], as bitsandbytes' table look-up on the CPU does.
fn dynamic_code(x: f32) -> u8 {
    const STEPS: f64 = 65535.0;
    let step = ((f64::from(x.clamp(-1.0, 1.0)) + 1.0) / 2.0 * STEPS).round();
    let x = step / STEPS * 2.0 - 1.0;
    let map = dynamic_map();
    let upper = map.partition_point(|m| f64::from(*m) < x).clamp(1, 255);
    let (low, high) = (f64::from(map[upper - 1]), f64::from(map[upper]));
    (if x - low <= high - x { upper - 1 } else { upper }) as u8
}

fn absmax(block: &[f32]) -> f32 {
    block.iter().fold(0.0, |max, x| x.abs().max(max))
}

fn inverse(scale: f32) -> f32 {
    if scale > 0.0 { 1.0 / scale } else { 0.0 }
}

impl Nf4 {
    /// Quantizes a `[rows, cols]` of f32, bf16 or f16.
    ///
    /// # Errors
    /// When the tensor is not a matrix of one of these types, or has a number that is not finite.
    pub fn quantize(weight: &Tensor, double: bool) -> Result<Self> {
        let (rows, cols) = weight.dims2()?;
        let dtype = weight.dtype();
        ensure!(
            matches!(dtype, DType::F32 | DType::BF16 | DType::F16),
            "weights of type {} cannot be quantized",
            dtype.as_str()
        );
        let wide = weight.to_dtype(DType::F32)?;
        let (packed, scales) = with_slices([&wide], |[x]| {
            if x.iter().any(|x| !x.is_finite()) {
                bail!("a weight that is not finite cannot be quantized");
            }
            let scales: Vec<f32> = x.par_chunks(BLOCK).map(absmax).collect();
            let mut packed = vec![0; x.len().div_ceil(2)];
            let blocks = x.par_chunks(BLOCK).zip(&scales);
            packed.par_chunks_mut(BLOCK / 2).zip(blocks).for_each(|(out, (block, scale))| {
                let inverse = inverse(*scale);
                for (byte, pair) in out.iter_mut().zip(block.chunks(2)) {
                    let low = pair.get(1).map_or(0.0, |x| x * inverse);
                    *byte = code(pair[0] * inverse) << 4 | code(low);
                }
            });
            Ok((packed, scales))
        })??;
        let scales = if double { nest(&scales) } else { Scales::Single(scales) };
        Ok(Self { rows, cols, dtype, packed, scales })
    }

    /// Rows and columns.
    pub fn dims(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// What it is made of, for a kernel elsewhere.
    pub(super) fn parts(&self) -> Parts<'_> {
        let (codes, scales, offset) = match &self.scales {
            Scales::Single(scales) => (None, scales, 0.0),
            Scales::Double { codes, nested, offset } => (Some(codes.as_slice()), nested, *offset),
        };
        Parts { packed: &self.packed, codes, scales, offset, dtype: self.dtype }
    }

    /// The scale of each block of [`BLOCK`] numbers.
    pub fn block_scales(&self) -> Vec<f32> {
        (0..(self.rows * self.cols).div_ceil(BLOCK)).map(|block| self.scale(block)).collect()
    }

    /// The numbers, row-major, rounded to the type that they had.
    pub fn dequantize(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * self.cols];
        self.dequantize_into(&mut out);
        out
    }

    /// The same into memory that is there.
    pub(super) fn dequantize_into(&self, out: &mut [f32]) {
        const PART: usize = 64 * BLOCK;
        out.par_chunks_mut(PART).enumerate().for_each(|(i, out)| {
            self.dequantize_range(i * PART..i * PART + out.len(), out);
        });
    }

    /// The numbers at some places, on this thread.
    pub(super) fn dequantize_range(&self, range: Range<usize>, out: &mut [f32]) {
        let (mut at, mut rest) = (range.start, &mut out[..range.len()]);
        while !rest.is_empty() {
            let block = at / BLOCK;
            let (part, others) = rest.split_at_mut(((block + 1) * BLOCK - at).min(rest.len()));
            let scale = self.scale(block);
            let mut values = CODES;
            values.iter_mut().for_each(|value| *value = self.round(*value * scale));
            let value = |i: usize| {
                let byte = self.packed[i / 2];
                values[usize::from(if i.is_multiple_of(2) { byte >> 4 } else { byte & 15 })]
            };
            match <&mut [f32; BLOCK]>::try_from(&mut *part) {
                Ok(part) => look_up(&values, &self.packed[at / 2..][..BLOCK / 2], part),
                Err(_) => part.iter_mut().zip(at..).for_each(|(x, i)| *x = value(i)),
            }
            at += part.len();
            rest = others;
        }
    }

    /// The scale of a block.
    fn scale(&self, block: usize) -> f32 {
        match &self.scales {
            Scales::Single(scales) => scales[block],
            Scales::Double { codes, nested, offset } => {
                dynamic_map()[usize::from(codes[block])] * nested[block / NESTED_BLOCK] + offset
            }
        }
    }

    fn round(&self, x: f32) -> f32 {
        match self.dtype {
            DType::BF16 => bf16::from_f32(x).to_f32(),
            DType::F16 => f16::from_f32(x).to_f32(),
            _ => x,
        }
    }

    /// The tensors of a bitsandbytes checkpoint, by the ending of their name after the
    /// module's: type, shape and little-endian bytes.
    pub fn tensors(&self) -> Vec<(&'static str, safetensors::Dtype, Vec<usize>, Vec<u8>)> {
        use safetensors::Dtype::{F32, U8};
        let floats =
            |v: &[f32]| -> Vec<u8> { v.iter().copied().flat_map(f32::to_le_bytes).collect() };
        let dtype = match self.dtype {
            DType::BF16 => "bfloat16",
            DType::F16 => "float16",
            _ => "float32",
        };
        let shape = [self.rows, self.cols];
        let mut state = vec![
            ("quant_type", json!("nf4")),
            ("blocksize", json!(BLOCK)),
            ("dtype", json!(dtype)),
            ("shape", json!(shape)),
        ];
        let bytes = self.packed.len();
        let mut out = vec![
            ("weight", U8, vec![bytes, 1], self.packed.clone()),
            ("weight.quant_map", F32, vec![16], floats(&CODES)),
        ];
        match &self.scales {
            Scales::Single(scales) => {
                out.push(("weight.absmax", F32, vec![scales.len()], floats(scales)));
            }
            Scales::Double { codes, nested, offset } => {
                state.push(("nested_blocksize", json!(NESTED_BLOCK)));
                state.push(("nested_dtype", json!("float32")));
                state.push(("nested_offset", json!(f64::from(*offset))));
                out.push(("weight.absmax", U8, vec![codes.len()], codes.clone()));
                out.push(("weight.nested_absmax", F32, vec![nested.len()], floats(nested)));
                let map = floats(dynamic_map());
                out.push(("weight.nested_quant_map", F32, vec![256], map));
            }
        }
        let state = state_text(&state).into_bytes();
        out.push(("weight.quant_state.bitsandbytes__nf4", U8, vec![state.len()], state));
        out
    }
}

/// JSON as Python writes it, with a space after `,` and `:`.
fn state_text(state: &[(&str, serde_json::Value)]) -> String {
    let items = state.iter().map(|(key, value)| match value {
        serde_json::Value::Array(items) => {
            let items: Vec<String> = items.iter().map(ToString::to_string).collect();
            format!("\"{key}\": [{}]", items.join(", "))
        }
        value => format!("\"{key}\": {value}"),
    });
    format!("{{{}}}", items.collect::<Vec<_>>().join(", "))
}

/// Lanes of one vector in torch's sum, and vectors that are summed side by side.
const LANES: usize = 8;
const ROWS: usize = 4;

/// The sum in f32 in the order of torch's on the CPU: 32 sums side by side, cascaded in four
/// levels, so that `nested_offset` has the same bits.
fn torch_sum(x: &[f32]) -> f32 {
    const WIDTH: usize = LANES * ROWS;
    const LEVELS: usize = 4;
    let add = |to: &mut [f32], from: &[f32]| to.iter_mut().zip(from).for_each(|(a, b)| *a += b);
    let blocks = x.len() / WIDTH;
    let log = if blocks > 1 { (blocks - 1).ilog2() + 1 } else { 0 };
    let power = (log / LEVELS as u32).max(4);
    let step = 1usize << power;
    let mut sums = [[0.0f32; WIDTH]; LEVELS];
    for (i, block) in x.chunks_exact(WIDTH).enumerate() {
        add(&mut sums[0], block);
        let done = i + 1;
        if done % step != 0 {
            continue;
        }
        for level in 1..LEVELS {
            let lower = std::mem::replace(&mut sums[level - 1], [0.0; WIDTH]);
            add(&mut sums[level], &lower);
            if done & ((step - 1) << (level as u32 * power)) != 0 {
                break;
            }
        }
    }
    let [mut total, upper @ ..] = sums;
    upper.iter().for_each(|level| add(&mut total, level));
    let (mut lanes, mut rest) = ([0.0; LANES], &x[blocks * WIDTH..]);
    lanes.copy_from_slice(&total[..LANES]);
    while rest.len() >= LANES {
        add(&mut lanes, &rest[..LANES]);
        rest = &rest[LANES..];
    }
    total[LANES..].chunks(LANES).for_each(|row| add(&mut lanes, row));
    let tail: f32 = rest.iter().fold(0.0, |sum, x| sum + x);
    lanes.iter().fold(tail, |sum, x| sum + x)
}

/// Quantizes the scales themselves.
fn nest(scales: &[f32]) -> Scales {
    let offset = torch_sum(scales) / scales.len().max(1) as f32;
    let centred: Vec<f32> = scales.iter().map(|s| s - offset).collect();
    let nested: Vec<f32> = centred.chunks(NESTED_BLOCK).map(absmax).collect();
    let groups = centred.chunks(NESTED_BLOCK).zip(&nested);
    let codes = groups.flat_map(|(group, scale)| {
        // A group without spread gets code 0, as bitsandbytes gives it; its scale is 0.
        let code = |x: f32| if *scale > 0.0 { dynamic_code(x * inverse(*scale)) } else { 0 };
        group.iter().map(move |x| code(*x))
    });
    Scales::Double { codes: codes.collect(), nested: nested.clone(), offset }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use proptest::prelude::*;

    #[test]
    fn tables() {
        let map = dynamic_map();
        assert_eq!((map[127], map[255]), (0.0, 1.0));
        assert!((map[0] + 0.992_968_75).abs() < 1e-7, "{}", map[0]);
        assert!(map.windows(2).all(|w| w[0] < w[1]));
        for (i, c) in CODES.iter().enumerate() {
            assert_eq!(usize::from(code(*c)), i);
        }
        for (i, m) in MIDPOINTS.iter().enumerate() {
            assert!((m - (CODES[i] + CODES[i + 1]) / 2.0).abs() < 1e-7);
        }
    }

    proptest! {
        /// No number moves by more than half the widest gap between codes, times its block's
        /// scale; double quantization adds the error of the scale.
        #[test]
        fn error_is_bounded(
            data in prop::collection::vec(-100.0f32..100.0, 1..400),
            double in any::<bool>(),
        ) {
            let n = data.len();
            let x = Tensor::from_vec(data.clone(), (1, n), &Device::Cpu).unwrap();
            let q = Nf4::quantize(&x, double).unwrap();
            let (back, scales) = (q.dequantize(), q.block_scales());
            for (i, (a, b)) in data.iter().zip(&back).enumerate() {
                let exact = absmax(&data[i / BLOCK * BLOCK..n.min((i / BLOCK + 1) * BLOCK)]);
                let half_gap = (1.0 - 0.696_192_8) / 2.0;
                let bound = half_gap * exact + (exact - scales[i / BLOCK]).abs() + 1e-5;
                prop_assert!((a - b).abs() <= bound, "{a} {b}");
            }
        }
    }

    #[test]
    fn sums_are_sums() {
        for n in [0, 1, 7, 8, 31, 33, 500, 40_000] {
            let x: Vec<f32> = (0..n).map(|i| ((i * 37) % 101) as f32).collect();
            let exact: f64 = x.iter().copied().map(f64::from).sum();
            assert!((f64::from(torch_sum(&x)) - exact).abs() <= 1e-6 * exact, "{n}");
        }
    }

    #[test]
    fn refuses_what_is_not_finite() {
        let x = Tensor::new(&[[1.0f32, f32::NAN]], &Device::Cpu).unwrap();
        assert!(Nf4::quantize(&x, false).is_err());
        let ids = Tensor::new(&[[1u32, 2]], &Device::Cpu).unwrap();
        assert!(Nf4::quantize(&ids, false).is_err());
    }
}

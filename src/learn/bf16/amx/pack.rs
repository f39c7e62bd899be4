//! Rounds f32 to bf16 and lays it out in tiles.
//!
//! In words of two bf16, both of neighbouring k, a tile of the left-hand side is [16 rows][16
//! pairs of k] and one of the right-hand side [16 pairs of k][16 columns]: the transpose. So
//! there are two ways to read 16 lines, by how the source lies in memory, and each of them is
//! the layout of one side and the transpose of that of the other.

use std::arch::x86_64::*;
use std::mem::transmute;

use super::super::pack::{PANEL, STEP, STEP_LEN, Side, TILE_LEN};
use super::Amx;
use crate::learn::matrix::Matrix;

/// Where a panel is read: `[outer, k]`, of which `outer` rows and `k` columns are left.
#[derive(Clone, Copy)]
struct Source {
    first: *const f32,
    outer: usize,
    k: usize,
    /// Elements from one line to the next: along the direction that is not contiguous.
    stride: usize,
    scale: f32,
}

/// Packs `x`, `[outer, k]`, from row `first` on into `out`: panels of 32 rows, `[k / 32][2]` tiles
/// each.
#[expect(unsafe_code, reason = "calls code for vectors that were found at run time")]
pub(super) fn panels(_: Amx, side: Side, x: Matrix<'_>, first: usize, scale: f32, out: &mut [u16]) {
    let ((outer, k), (row, col)) = (x.size(), x.strides());
    if out.is_empty() {
        return;
    }
    let panel = k.div_ceil(STEP) * STEP_LEN;
    assert!(out.len().is_multiple_of(panel), "whole panels");
    assert!(first + out.len() / panel * PANEL < outer + PANEL, "panels outside the matrix");
    assert!(row == 1 || col == 1, "rows or columns without gaps");
    let start = x.data()[first * row..].as_ptr();
    let along_k = col == 1;
    let stride = if along_k { row } else { col };
    let source = Source { first: start, outer: outer - first, k, stride, scale };
    // SAFETY: `Amx` exists only where the features that `tiles` asks for were found. `Matrix`
    // has checked that its last element is in the slice, so all of `source` is.
    unsafe {
        match (along_k, side) {
            (true, Side::Lhs) => tiles::<true, false>(source, out),
            (true, Side::Rhs) => tiles::<true, true>(source, out),
            (false, Side::Rhs) => tiles::<false, false>(source, out),
            (false, Side::Lhs) => tiles::<false, true>(source, out),
        }
    }
}

/// Fills panels. `ALONG_K`: k is contiguous in the source; else the other direction is.
///
/// # Safety
/// The source must be readable: `outer` x `k` elements.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
#[expect(unsafe_code, reason = "reads through pointers, under masks")]
unsafe fn tiles<const ALONG_K: bool, const TRANSPOSE: bool>(x: Source, out: &mut [u16]) {
    let steps = x.k.div_ceil(STEP);
    let panels = out.len() / STEP_LEN / steps;
    for i in 0..panels * steps {
        // As the source lies: across k, a line of it goes through all panels.
        let (panel, step) = if ALONG_K { (i / steps, i % steps) } else { (i % panels, i / panels) };
        let out = &mut out[(panel * steps + step) * STEP_LEN..][..STEP_LEN];
        for (half, out) in out.chunks_exact_mut(TILE_LEN).enumerate() {
            let (i, k) = (panel * PANEL + half * (PANEL / 2), step * STEP);
            let left = (x.outer.saturating_sub(i).min(16), (x.k - k).min(STEP));
            let at = if ALONG_K { i * x.stride + k } else { i + k * x.stride };
            let at = x.first.wrapping_add(at);
            // SAFETY: `left` is what the source has from `at` on.
            let lines = unsafe {
                match (ALONG_K, left == (16, STEP)) {
                    (true, true) => along_k::<true>(at, left, x),
                    (true, false) => along_k::<false>(at, left, x),
                    (false, true) => across_k::<true>(at, left, x),
                    (false, false) => across_k::<false>(at, left, x),
                }
            };
            let lines = if TRANSPOSE { transpose(lines) } else { lines };
            for (line, out) in lines.into_iter().zip(out.chunks_exact_mut(32)) {
                // SAFETY: the chunk has 32 elements of 2 bytes.
                unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), line) };
            }
        }
    }
}

/// Rounds numbers that lie in the order in which they are to lie: whole lines of 32.
#[expect(unsafe_code, reason = "calls code for vectors that were found at run time")]
pub(super) fn round_lines(_: Amx, x: &[f32], out: &mut [u16]) {
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn run(x: &[[f32; 32]], out: &mut [[u16; 32]]) {
        for (x, out) in x.iter().zip(out) {
            // SAFETY: these are 32 elements each.
            unsafe {
                let (low, high) = (_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x[16..].as_ptr()));
                _mm512_storeu_si512(out.as_mut_ptr().cast(), round(low, high, 1.0));
            }
        }
    }
    // SAFETY: `Amx` exists only where these features were found.
    unsafe { run(x.as_chunks().0, out.as_chunks_mut().0) }
}

/// Of 16 elements the first `n`.
fn first(n: usize) -> __mmask16 {
    ((1_u32 << n.min(16)) - 1) as __mmask16
}

/// Two vectors times `scale`, rounded: `low` in the low half.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
#[expect(unsafe_code, reason = "vectors of bf16 have no safe casts")]
fn round(low: __m512, high: __m512, scale: f32) -> __m512i {
    // A product with a subnormal is slow, and the rounding flushes it anyway.
    let (low, high) = if scale == 1.0 {
        (low, high)
    } else {
        let scale = _mm512_set1_ps(scale);
        (_mm512_mul_ps(low, scale), _mm512_mul_ps(high, scale))
    };
    // SAFETY: both types are 64 bytes of numbers.
    unsafe { transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low)) }
}

/// 16 rows of 32 k, of which some are left or, if `WHOLE`, all.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
#[expect(unsafe_code, reason = "reads through pointers, under masks")]
unsafe fn along_k<const WHOLE: bool>(
    at: *const f32,
    left: (usize, usize),
    x: Source,
) -> [__m512i; 16] {
    let (rows, k) = if WHOLE { (16, STEP) } else { left };
    let (low, high) = (first(k), first(k.saturating_sub(16)));
    std::array::from_fn(|i| {
        // SAFETY: row i is there, and the masks let no element past its end be read.
        let (a, b) = unsafe {
            let some = if i < rows { !0 } else { 0 };
            let row = at.wrapping_add(i * x.stride);
            let a = _mm512_maskz_loadu_ps(low & some, row);
            (a, _mm512_maskz_loadu_ps(high & some, row.wrapping_add(16)))
        };
        round(a, b, x.scale)
    })
}

/// 16 pairs of k of 16 columns, of which some are left or, if `WHOLE`, all.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
#[expect(unsafe_code, reason = "reads through pointers, under masks")]
unsafe fn across_k<const WHOLE: bool>(
    at: *const f32,
    left: (usize, usize),
    x: Source,
) -> [__m512i; 16] {
    let (cols, k) = if WHOLE { (16, STEP) } else { left };
    // Alternates the elements of the two halves.
    let order: [u16; 32] = std::array::from_fn(|i| (i / 2 + i % 2 * 16) as u16);
    // SAFETY: both are 64 bytes of numbers.
    let order = unsafe { transmute::<[u16; 32], __m512i>(order) };
    let some = first(cols);
    std::array::from_fn(|pair| {
        let row = |i: usize| at.wrapping_add(i * x.stride);
        let mask = |i: usize| if i < k { some } else { 0 };
        let (i, j) = (2 * pair, 2 * pair + 1);
        // SAFETY: rows below `k` are there, and the masks let no element past their end be read.
        let (a, b) = unsafe {
            (_mm512_maskz_loadu_ps(mask(i), row(i)), _mm512_maskz_loadu_ps(mask(j), row(j)))
        };
        _mm512_permutexvar_epi16(order, round(a, b, x.scale))
    })
}

/// The transpose of 16 x 16 words.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn transpose(r: [__m512i; 16]) -> [__m512i; 16] {
    let mut t = r;
    for i in (0..16).step_by(2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    let mut u = t;
    for i in (0..16).step_by(4) {
        u[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        u[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        u[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        u[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    // Quarter q of u[4 g + c] has column 4 q + c of rows 4 g to 4 g + 3.
    let mut out = u;
    for c in 0..4 {
        let even = _mm512_shuffle_i32x4::<0x88>(u[c], u[4 + c]);
        let odd = _mm512_shuffle_i32x4::<0xdd>(u[c], u[4 + c]);
        let even2 = _mm512_shuffle_i32x4::<0x88>(u[8 + c], u[12 + c]);
        let odd2 = _mm512_shuffle_i32x4::<0xdd>(u[8 + c], u[12 + c]);
        out[c] = _mm512_shuffle_i32x4::<0x88>(even, even2);
        out[4 + c] = _mm512_shuffle_i32x4::<0x88>(odd, odd2);
        out[8 + c] = _mm512_shuffle_i32x4::<0xdd>(even, even2);
        out[12 + c] = _mm512_shuffle_i32x4::<0xdd>(odd, odd2);
    }
    out
}

//! The instructions: 32 x 32 sums over some steps of k.

use std::arch::asm;
use std::arch::x86_64::*;

use super::super::pack::STEP_LEN;
use super::Amx;

/// The shapes of the eight tiles: 16 rows of 64 bytes each.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes: [u16; 16],
    rows: [u8; 16],
}

/// The tiles of this thread, in use until it is dropped; a thread has at most one.
pub(super) struct Tiles(());

impl Tiles {
    /// Shapes the tiles. Costs some 50 ns with the release, which gives the state back so that
    /// the kernel need not save it when it switches threads.
    #[expect(unsafe_code, reason = "an instruction without an intrinsic")]
    pub(super) fn new(_: Amx) -> Self {
        let (mut bytes, mut rows) = ([0; 16], [0; 16]);
        bytes[..8].fill(64);
        rows[..8].fill(16);
        let shapes = Shapes { palette: 1, start_row: 0, reserved: [0; 14], bytes, rows };
        // SAFETY: `Amx` proves that the process may use tiles; the shapes are those of palette 1.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const shapes, options(nostack, readonly)) };
        Self(())
    }
}

impl Drop for Tiles {
    #[expect(unsafe_code, reason = "an instruction without an intrinsic")]
    fn drop(&mut self) {
        // SAFETY: `new` has used the tiles, so they may be used; nothing is kept in them.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// Elements that are fetched ahead in a step.
pub(super) const FETCHED: usize = 128;

/// Steps of k that follow each other in one pair of operands.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Run {
    /// `[steps][2][16 rows][32 k]`.
    pub(super) lhs: *const u16,
    /// `[steps][2][16 pairs of k][16 columns][2]`.
    pub(super) rhs: *const u16,
    /// At least 1.
    pub(super) steps: usize,
}

/// 32 x 32 elements: the first, and the bytes from one row to the next.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Square {
    pub(super) first: *mut f32,
    pub(super) pitch: usize,
}

impl Square {
    /// Whether every row begins a line of the cache.
    pub(super) fn aligned(self) -> bool {
        self.first.addr().is_multiple_of(64) && self.pitch.is_multiple_of(64)
    }
}

/// `to = from + ` the sum of the runs. Without a `from` (null) it starts at 0. Step by
/// step it fetches [`FETCHED`] elements from `next` on, any address, into the second cache.
///
/// # Safety
/// `from` (unless null) and `to` must be 32 x 32 elements, and the runs what they say.
#[inline(always)]
#[expect(unsafe_code, reason = "instructions without intrinsics, on raw pointers")]
pub(super) unsafe fn add_product(
    _: &Tiles,
    runs: &[Run],
    from: Square,
    to: Square,
    next: *const u16,
) {
    // SAFETY: as the caller promises. The values of tiles do not outlive the block; a tile in
    // use has been shaped, which `Tiles` proves.
    unsafe {
        asm!(
            "test {at}, {at}",
            "jz 20f",
            "mov {low}, {pitch}",
            "shl {low}, 4",
            "add {low}, {at}",
            "tileloadd tmm0, [{at} + {pitch}]",
            "tileloadd tmm1, [{at} + {pitch} + 64]",
            "tileloadd tmm2, [{low} + {pitch}]",
            "tileloadd tmm3, [{low} + {pitch} + 64]",
            "jmp 21f",
            "20:",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "21:",
            "test {count}, {count}",
            "jz 40f",
            "mov {line}, 64",
            "30:",
            "mov {lhs}, [{runs}]",
            "mov {rhs}, [{runs} + 8]",
            "mov {steps}, [{runs} + 16]",
            "add {runs}, 24",
            ".p2align 4",
            "31:",
            // Of the left-hand side a tile is read once, so it should not push the panel of the
            // right-hand side out of the first cache.
            "tileloaddt1 tmm4, [{lhs} + {line}]",
            "tileloaddt1 tmm5, [{lhs} + {line} + 1024]",
            "tileloadd tmm6, [{rhs} + {line}]",
            "tileloadd tmm7, [{rhs} + {line} + 1024]",
            "prefetcht1 [{next}]",
            "prefetcht1 [{next} + 64]",
            "prefetcht1 [{next} + 128]",
            "prefetcht1 [{next} + 192]",
            "add {next}, 256",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {lhs}, 2048",
            "add {rhs}, 2048",
            "dec {steps}",
            "jnz 31b",
            "dec {count}",
            "jnz 30b",
            "40:",
            "mov {low}, {to_pitch}",
            "shl {low}, 4",
            "add {low}, {to}",
            "tilestored [{to} + {to_pitch}], tmm0",
            "tilestored [{to} + {to_pitch} + 64], tmm1",
            "tilestored [{low} + {to_pitch}], tmm2",
            "tilestored [{low} + {to_pitch} + 64], tmm3",
            at = in(reg) from.first,
            pitch = in(reg) from.pitch,
            to = in(reg) to.first,
            to_pitch = in(reg) to.pitch,
            runs = inout(reg) runs.as_ptr() => _,
            count = inout(reg) runs.len() => _,
            next = inout(reg) next => _,
            low = out(reg) _,
            line = out(reg) _,
            lhs = out(reg) _,
            rhs = out(reg) _,
            steps = out(reg) _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

/// Writes a square of 32 rows of 128 bytes past the caches, to rows that begin at multiples of
/// 64 bytes. [`settle`] must follow before another thread reads them.
///
/// # Safety
/// `to` must be 32 x 32 elements, and the processor have AVX-512.
#[target_feature(enable = "avx512f")]
#[expect(unsafe_code, reason = "writes through pointers")]
pub(super) unsafe fn write_past(from: &[f32; 1024], to: Square) {
    for (i, row) in from.chunks_exact(32).enumerate() {
        let to = to.first.wrapping_byte_add(i * to.pitch);
        // SAFETY: as the caller promises.
        unsafe {
            _mm512_stream_ps(to, _mm512_loadu_ps(row.as_ptr()));
            _mm512_stream_ps(to.add(16), _mm512_loadu_ps(row.as_ptr().add(16)));
        }
    }
}

/// Copies lines of 32 elements, past the caches if `to` begins at a line of them; [`settle`] must
/// follow before another thread reads them.
#[expect(unsafe_code, reason = "writes through pointers")]
pub(super) fn copy_past(_: Amx, from: &[u16], to: &mut [u16]) {
    if !to.as_ptr().addr().is_multiple_of(64) {
        to.copy_from_slice(from);
        return;
    }
    for (from, to) in from.chunks_exact(32).zip(to.chunks_exact_mut(32)) {
        // SAFETY: both are 64 bytes, and where there are tiles, there is AVX-512.
        unsafe { stream(from.as_ptr().cast(), to.as_mut_ptr().cast()) };
    }
}

/// Begins to fetch a square, at any address, into the first cache.
#[expect(unsafe_code, reason = "an instruction that asks for a feature")]
pub(super) fn fetch(_: Amx, square: *const [u16; STEP_LEN]) {
    for line in 0..STEP_LEN / 32 {
        let line = square.cast::<u16>().wrapping_add(32 * line);
        // SAFETY: it reads nothing, and every processor of 64 bits has it.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) };
    }
}

/// Copies a line past the caches.
///
/// # Safety
/// `to` must be a whole line, and the processor have AVX-512.
#[target_feature(enable = "avx512f")]
#[expect(unsafe_code, reason = "writes through pointers")]
unsafe fn stream(from: *const __m512i, to: *mut __m512i) {
    // SAFETY: as the caller promises.
    unsafe { _mm512_stream_si512(to, _mm512_loadu_si512(from)) };
}

/// Writes some rows and columns of a square to where its rows begin anywhere. Tiles can do that
/// too, but a store across the border between two lines of the cache is slow.
///
/// # Safety
/// `to` must be `rows` x `cols` elements, both at most 32, and the processor have AVX-512.
#[target_feature(enable = "avx512f")]
#[expect(unsafe_code, reason = "writes through pointers, under masks")]
pub(super) unsafe fn write(from: &[f32; 1024], to: Square, rows: usize, cols: usize) {
    for (i, row) in from.chunks_exact(32).take(rows).enumerate() {
        let to = to.first.wrapping_byte_add(i * to.pitch);
        // Elements from the start of the line of 16 that it begins in; a bit for each to write.
        let before = to.addr() % 64 / 4;
        let bits = ((1_u64 << cols) - 1) << before;
        for line in 0..3 {
            let some = (bits >> (16 * line)) as __mmask16;
            let (from, to) = (row.as_ptr().wrapping_add(16 * line), to.wrapping_add(16 * line));
            // SAFETY: the mask lets only elements of the row be read and written.
            unsafe {
                let x = _mm512_maskz_loadu_ps(some, from.wrapping_sub(before));
                _mm512_mask_storeu_ps(to.wrapping_sub(before), some, x);
            }
        }
    }
}

/// Makes what [`write_past`] and [`copy_past`] wrote visible to all.
#[expect(unsafe_code, reason = "an instruction that asks for a feature")]
pub(super) fn settle() {
    // SAFETY: every processor of 64 bits has it.
    unsafe { _mm_sfence() };
}

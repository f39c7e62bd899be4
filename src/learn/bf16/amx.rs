//! The product on the processor's matrix tiles (AMX): Sapphire Rapids and later, under Linux.
//!
//! A tile has 16 rows of 64 bytes. One instruction multiplies a tile of the left-hand side (16
//! rows x 32 k, bf16) with one of the right-hand side (16 pairs of k x 16 columns) and adds the
//! product to a tile of sums (16 x 16, f32).

mod blocks;
mod kernel;
mod pack;

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::sync::OnceLock;

use super::pack::{STEP_LEN, Side};
use super::{Block, Packed, Reread, Take};
use crate::learn::matrix::{Matrix, Threads};

/// Proof that this process may use the tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Amx(());

impl Amx {
    /// Asks the processor whether it has tiles and, once a process, the kernel for leave to use
    /// them. Without that leave the first tile instruction kills the process.
    pub(super) fn detect() -> Option<Self> {
        static FOUND: OnceLock<bool> = OnceLock::new();
        FOUND.get_or_init(|| has_tiles() && permitted()).then_some(Self(()))
    }

    /// Packs `x` (`[rows or columns of the operand, k]`) times `scale`, over all of k, from row
    /// `first` on into `out`: as many panels of 32 rows as that holds. What lies outside `x`
    /// becomes 0.
    pub(super) fn pack(self, side: Side, x: Matrix<'_>, first: usize, scale: f32, out: &mut [u16]) {
        pack::panels(self, side, x, first, scale, out);
    }

    /// `out = beta * out + bias + ` the sum over the terms of lhs times rhs.
    pub(super) fn product(
        self,
        out: Block<'_>,
        beta: bool,
        bias: Option<&[f32]>,
        terms: &[(&Packed, &Packed)],
        reread: Reread,
        threads: Threads,
    ) {
        blocks::product(self, out, beta, bias, terms, reread, threads);
    }

    /// Calls `take` with every square of a product, see [`blocks::squares`].
    pub(super) fn squares(
        self,
        bias: Option<&[f32]>,
        terms: &[(&Packed, &Packed)],
        take: &Take<'_>,
    ) -> bool {
        blocks::squares(self, bias, terms, take)
    }

    /// Copies lines of 32 past the caches: only in a task of [`Amx::squares`], at the end of which
    /// they become visible to other threads.
    pub(super) fn copy_past(self, from: &[u16], to: &mut [u16]) {
        kernel::copy_past(self, from, to);
    }

    /// Rounds lines of 32.
    pub(super) fn round(self, x: &[f32], out: &mut [u16]) {
        pack::round_lines(self, x, out);
    }

    /// Begins to fetch a square.
    pub(super) fn fetch(self, square: *const [u16; STEP_LEN]) {
        kernel::fetch(self, square);
    }
}

/// Whether the processor has tiles of bf16, and the vectors that the packing uses.
fn has_tiles() -> bool {
    const BF16: u32 = 1 << 22;
    const TILE: u32 = 1 << 24;
    __cpuid(0).eax >= 7
        && __cpuid_count(7, 0).edx & (BF16 | TILE) == BF16 | TILE
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512bf16")
}

/// Asks the kernel for the tiles' state in this process: `arch_prctl(ARCH_REQ_XCOMP_PERM, 18)`.
/// An old kernel, or a thread whose signal stack is too small for that state, says no.
#[expect(unsafe_code, reason = "neither std nor rustix has this system call")]
fn permitted() -> bool {
    const ARCH_PRCTL: usize = 158;
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const XTILEDATA: usize = 18;
    let result: isize;
    // SAFETY: the call takes two numbers, touches no memory of ours, and changes nothing but
    // which instructions are allowed. `rcx` and `r11` are what a system call overwrites.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XTILEDATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result == 0
}

//! The blocking: what stays in which cache, and which thread does what.
//!
//! A task is some rows by some columns of the product, over all of k. In it one panel of 32
//! columns of the right-hand side, as far as it fits into the first cache, meets all the rows;
//! the rows' part of the left-hand side is small enough to stay in the second cache. Sums that
//! are not complete wait in a strip beside. Every element is summed over the terms and over k in
//! their order whatever the blocks are, so these change no bit.

use std::mem::MaybeUninit;
use std::ops::Range;
use std::ptr;

use rayon::prelude::*;

use super::super::pack::{PANEL, STEP, STEP_LEN};
use super::super::{Block, MAX_TERMS, Packed, Reread, Take};
use super::Amx;
use super::kernel::{FETCHED, Run, Square, Tiles, add_product, settle, write, write_past};
use crate::learn::matrix::Threads;
use crate::learn::output::Shared;

/// Steps of a panel of columns that stay in the first cache (48 KiB): 36 KiB.
const NEAR_STEPS: usize = 18;
/// Panels of rows of a task, with at most [`MANY_ROWS_STEPS`] of k: 0.83 MB in the second cache.
const MANY_ROWS: usize = 16;
const MANY_ROWS_STEPS: usize = 26;
/// Panels of rows with more of k, and the most of k at a time: the same size.
const FEW_ROWS: usize = 8;
const FAR_STEPS: usize = 52;
/// Panels of columns that are finished together.
const GROUP: usize = 4;
/// Tasks for each thread, so that one that is held up does not hold up all.
const TASKS: usize = 4;
/// From this size on, in bytes, an output is written past the caches: there a store first reads
/// the line that it overwrites, often from memory.
fn large(reread: Reread) -> usize {
    match reread {
        Reread::Soon => 16 << 20,
        Reread::Late => 2 << 20,
    }
}

/// 32 x 32 sums.
#[repr(C, align(64))]
struct Sums([f32; PANEL * PANEL]);

/// Part `i` of `n` nearly equal parts of `range`.
fn part(range: &Range<usize>, n: usize, i: usize) -> Range<usize> {
    let at = |i| range.start + range.len() * i / n;
    at(i)..at(i + 1)
}

/// Where a product goes.
enum Goal<'a> {
    /// Into or onto a matrix; if `past`, past the caches.
    Matrix { out: Shared<'a>, beta: bool, past: bool },
    /// Nowhere but there, see [`squares`].
    Take(&'a Take<'a>),
}

/// One product.
struct Job<'a> {
    amx: Amx,
    goal: Goal<'a>,
    bias: Option<&'a [f32]>,
    terms: &'a [(&'a Packed, &'a Packed)],
    /// Of all terms together.
    steps: usize,
    /// Rows and columns of the product.
    size: (usize, usize),
}

/// `out = beta * out + bias + ` the sum over the terms of lhs times rhs.
pub(super) fn product(
    amx: Amx,
    out: Block<'_>,
    beta: bool,
    bias: Option<&[f32]>,
    terms: &[(&Packed, &Packed)],
    reread: Reread,
    threads: Threads,
) {
    let (steps, size) = (steps(terms), out.size);
    let large = size.0 * size.1 * size_of::<f32>() >= large(reread);
    // Not what is read in between, as a sum in several parts is.
    let past = large && !beta && steps <= FAR_STEPS;
    let goal = Goal::Matrix { out: out.share(), beta, past };
    Job { amx, goal, bias, terms, steps, size }.split(threads);
}

/// Of all terms together.
fn steps(terms: &[(&Packed, &Packed)]) -> usize {
    terms.iter().map(|(lhs, _)| lhs.k().div_ceil(STEP)).sum()
}

/// Calls `take` once with every square of `bias + ` the sum over the terms, on all threads. Rows
/// beyond the last are the bias, columns beyond the last 0. False, and nothing is called, if there
/// is no square, or k is so large that sums have to wait in a matrix.
pub(super) fn squares(
    amx: Amx,
    bias: Option<&[f32]>,
    terms: &[(&Packed, &Packed)],
    take: &Take<'_>,
) -> bool {
    let (steps, size) = (steps(terms), (terms[0].0.outer(), terms[0].1.outer()));
    let fits = steps <= FAR_STEPS && size.0 > 0 && size.1 > 0;
    if fits {
        Job { amx, goal: Goal::Take(take), bias, terms, steps, size }.split(Threads::All);
    }
    fits
}

/// Squares of sums beside the output.
struct Space {
    /// Where sums of a panel of columns wait.
    strip: [MaybeUninit<Sums>; MANY_ROWS],
    /// Stands for a square that is not whole.
    scratch: MaybeUninit<Sums>,
}

/// Runs of steps in both operands of each term, and how far the left one's panels are apart.
struct Runs {
    runs: [Run; MAX_TERMS],
    pitches: [usize; MAX_TERMS],
    len: usize,
}

impl Runs {
    fn new() -> Self {
        let none = Run { lhs: ptr::null(), rhs: ptr::null(), steps: 0 };
        Self { runs: [none; MAX_TERMS], pitches: [0; MAX_TERMS], len: 0 }
    }

    fn get(&self) -> &[Run] {
        &self.runs[..self.len]
    }

    /// Moves on to the next panel of rows.
    fn advance(&mut self) {
        for (run, pitch) in self.runs[..self.len].iter_mut().zip(self.pitches) {
            run.lhs = run.lhs.wrapping_add(pitch);
        }
    }
}

/// Some steps of one panel of columns that stay in the first cache while all rows meet them.
struct Round<'a> {
    runs: Runs,
    /// What to fetch into the second cache on the way.
    next: *const u16,
    bias: Option<&'a [f32; PANEL]>,
    /// The first steps of the product.
    begins: bool,
    /// The last steps of the product.
    ends: bool,
    /// Whether sums wait in the strip before and after.
    waited: bool,
    waits: bool,
}

impl Job<'_> {
    /// All of it, in tasks.
    fn split(&self, threads: Threads) {
        let (rows, cols) = (0..self.size.0.div_ceil(PANEL), 0..self.size.1.div_ceil(PANEL));
        let most = if self.steps > MANY_ROWS_STEPS { FEW_ROWS } else { MANY_ROWS };
        let row_parts = rows.len().div_ceil(most);
        let count = match threads {
            Threads::One => 1,
            Threads::All => rayon::current_num_threads(),
        };
        let wanted = if count == 1 { 1 } else { (count * TASKS).div_ceil(row_parts) };
        let col_parts = wanted.min(cols.len().div_ceil(2));
        let task = |i: usize| {
            let (row, col) = (i / col_parts, i % col_parts);
            self.run(part(&rows, row_parts, row), part(&cols, col_parts, col));
        };
        let tasks = 0..row_parts * col_parts;
        if count == 1 { tasks.for_each(task) } else { tasks.into_par_iter().for_each(task) }
    }

    /// One task: panels of rows by panels of columns.
    fn run(&self, rows: Range<usize>, cols: Range<usize>) {
        let mut space = Space {
            strip: [const { MaybeUninit::uninit() }; MANY_ROWS],
            scratch: MaybeUninit::uninit(),
        };
        let far = self.steps.div_ceil(FAR_STEPS).max(1);
        for i in 0..far {
            let steps = part(&(0..self.steps), far, i);
            for first in cols.clone().step_by(GROUP) {
                let group = first..(first + GROUP).min(cols.end);
                let tiles = Tiles::new(self.amx);
                for col in group {
                    self.column(&tiles, &mut space, &steps, rows.clone(), col);
                }
            }
        }
        if let Goal::Matrix { past: true, .. } | Goal::Take(_) = self.goal {
            settle();
        }
    }

    /// Some steps of one panel of columns, for all rows of a task.
    fn column(
        &self,
        tiles: &Tiles,
        space: &mut Space,
        steps: &Range<usize>,
        rows: Range<usize>,
        col: usize,
    ) {
        let bias = self.bias.map(|bias| {
            let mut padded = [0.0; PANEL];
            let some = &bias[col * PANEL..((col + 1) * PANEL).min(self.size.1)];
            padded[..some.len()].copy_from_slice(some);
            padded
        });
        let near = steps.len().div_ceil(NEAR_STEPS).max(1);
        let after = (col + 1).min((self.size.1 - 1) / PANEL);
        for i in 0..near {
            let some = part(steps, near, i);
            // More of k comes next or, after all of it, more columns.
            let next = if i + 1 < near {
                self.rhs(part(steps, near, i + 1).start, col)
            } else {
                self.rhs(steps.start, after)
            };
            let mut round = Round {
                runs: Runs::new(),
                next,
                bias: bias.as_ref(),
                begins: some.start == 0,
                ends: some.end == self.steps,
                waited: i > 0,
                waits: i + 1 < near,
            };
            self.place(&some, rows.start, col, &mut round.runs);
            for (row, slot) in rows.clone().zip(0..) {
                self.square(tiles, space, &round, (row, slot, col));
                round.runs.advance();
                round.next = round.next.wrapping_add(some.len() * FETCHED);
            }
        }
    }

    /// One square of the output; its sums wait in `slot` of the strip.
    #[expect(unsafe_code, reason = "works on the output through pointers")]
    fn square(
        &self,
        tiles: &Tiles,
        space: &mut Space,
        round: &Round<'_>,
        (row, slot, col): (usize, usize, usize),
    ) {
        let (mut block, beta, past) = match &self.goal {
            Goal::Take(_) => (Block::none(), false, false),
            Goal::Matrix { out, beta, past } => {
                // SAFETY: the task's block, and so this part of it, is held by this thread only.
                let block = unsafe { out.block(elements(row), elements(col)) };
                (block, *beta, *past)
            }
        };
        let whole = block.size == (PANEL, PANEL);
        let there = Square { first: block.first, pitch: block.stride * size_of::<f32>() };
        let past = round.ends && past && whole && there.aligned();
        let waiting = square(&mut space.strip[slot]);
        let from = match round.bias {
            _ if round.waited => waiting,
            // The same row 32 times.
            Some(bias) if round.begins && !beta => {
                Square { first: bias.as_ptr().cast_mut(), pitch: 0 }
            }
            None if round.begins && !beta => Square { first: ptr::null_mut(), pitch: 0 },
            Some(bias) if round.begins => {
                load(&mut block, Some(bias), &mut space.scratch);
                square(&mut space.scratch)
            }
            _ if whole => there,
            _ => {
                load(&mut block, None, &mut space.scratch);
                square(&mut space.scratch)
            }
        };
        let direct = whole && !past && there.aligned();
        let to = match (round.waits, direct) {
            (true, _) => waiting,
            (false, true) => there,
            (false, false) => square(&mut space.scratch),
        };
        // SAFETY: the squares are whole ones of the output, the strip or the scratch; what is
        // read of the strip was written in the last round. The runs lie in the operands, as
        // `place` has seen.
        unsafe { add_product(tiles, round.runs.get(), from, to, round.next) };
        if !round.waits && !direct {
            // SAFETY: the scratch was just written. The square has these rows and columns; if it
            // is to be written past the caches it is whole and aligned, as `past` says. Where
            // there are tiles, there is AVX-512.
            unsafe {
                let sums = &space.scratch.assume_init_ref().0;
                match self.goal {
                    Goal::Take(take) => take(row, col, sums),
                    Goal::Matrix { .. } if past => write_past(sums, there),
                    Goal::Matrix { .. } => write(sums, there, block.size.0, block.size.1),
                }
            }
        }
    }

    /// Where a step, counted over all terms, of a panel of columns lies.
    fn rhs(&self, step: usize, col: usize) -> *const u16 {
        let mut first = 0;
        for (_, rhs) in self.terms {
            let all = rhs.k().div_ceil(STEP);
            if step < first + all {
                return rhs.data()[(col * all + step - first) * STEP_LEN..].as_ptr();
            }
            first += all;
        }
        ptr::null()
    }

    /// Where some steps, counted over all terms, lie in the operands, for one panel of each. In
    /// place: to copy the runs would wait until all the sums stored before are in the cache.
    fn place(&self, steps: &Range<usize>, row: usize, col: usize, runs: &mut Runs) {
        let mut first = 0;
        for (lhs, rhs) in self.terms {
            let all = lhs.k().div_ceil(STEP);
            let (start, end) = (steps.start.max(first), steps.end.min(first + all));
            if start < end {
                let at = |panel: usize| (panel * all + start - first) * STEP_LEN;
                let (lhs, rhs) = (&lhs.data()[at(row)..], &rhs.data()[at(col)..]);
                let steps = end - start;
                runs.runs[runs.len] = Run { lhs: lhs.as_ptr(), rhs: rhs.as_ptr(), steps };
                runs.pitches[runs.len] = all * STEP_LEN;
                runs.len += 1;
            }
            first += all;
        }
    }
}

/// The rows or columns of a panel.
fn elements(panel: usize) -> Range<usize> {
    panel * PANEL..(panel + 1) * PANEL
}

/// As the kernel sees it.
fn square(sums: &mut MaybeUninit<Sums>) -> Square {
    Square { first: sums.as_mut_ptr().cast(), pitch: PANEL * size_of::<f32>() }
}

/// Reads a block, and adds the bias.
fn load(block: &mut Block<'_>, bias: Option<&[f32; PANEL]>, sums: &mut MaybeUninit<Sums>) {
    let sums = sums.write(Sums([0.0; PANEL * PANEL]));
    for (i, sums) in (0..block.size.0).zip(sums.0.chunks_exact_mut(PANEL)) {
        let row = block.row(i);
        sums[..row.len()].copy_from_slice(row);
        if let Some(bias) = bias {
            sums.iter_mut().zip(bias).for_each(|(x, b)| *x += b);
        }
    }
}

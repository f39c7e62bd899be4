//! Launches of the attention kernels (attention.cu).

use anyhow::Result;

use super::device::{Arg, Device, Float, Grid, Kernel, Mat, float, int};
use super::pass::Pass;
use crate::learn::linear::Dropout;

/// Head sizes with kernels of their own for bf16; others take the plain ones.
const SIZES: [usize; 4] = [32, 64, 96, 128];

/// Heads of this size at most have f32 kernels that hold less at once, so that more run.
const SMALL: usize = 64;

/// In the backward of f32 a block takes a whole sequence of up to so many tokens: the weights are
/// then computed once, not once for the keys and once for the queries.
const SHORT: usize = 256;

/// Queries, keys and values, or their gradients.
#[derive(Debug, Clone, Copy)]
pub(super) struct Heads {
    pub(super) q: Mat,
    pub(super) k: Mat,
    pub(super) v: Mat,
}

/// What the gradients of queries and keys go back through at once, where the kernels can: the
/// rotary embedding, and before it a norm of each head, if there is one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Before {
    /// What the norms read, queries and then keys; weight and statistics of either's norm.
    pub(super) norms: Option<(Mat, [(u64, u64); 2])>,
}

/// A kernel and how it is cut.
#[derive(Debug, Clone, Copy)]
struct Tiled {
    kernel: Kernel,
    cut: Cut,
}

/// Rows of a tile, threads of a block, bytes of shared memory.
#[derive(Debug, Clone, Copy)]
struct Cut {
    tile: usize,
    threads: usize,
    shared: usize,
}

/// A kernel, and the one for dropout and hidden keys.
#[derive(Debug, Clone, Copy)]
struct Pair {
    plain: Tiled,
    masked: Tiled,
}

/// The attention of a layer.
#[derive(Debug)]
pub(super) struct Attention {
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head: usize,
    causal: bool,
    window: Option<usize>,
    dropout: Dropout,
    forward: Pair,
    delta: Kernel,
    /// Rows that a block of `delta` sums.
    delta_rows: usize,
    backward_q: Pair,
    backward_kv: Pair,
    /// Without masks they are Hopper's: that of queries comes first and makes the sums that others
    /// have from `delta`, and both take what is before.
    hopper: bool,
    /// All gradients at once, of short sequences.
    backward: Option<Pair>,
}

/// Of forward, backward of queries, backward of keys and values.
type Cuts = [Cut; 3];

/// Of the kernels for any head.
const ANY: Cuts = [Cut { tile: 64, threads: 256, shared: 0 }; 3];

/// Of attention.cu for a head with kernels of its own: tiles lie in shared memory, each row with 16
/// bytes behind it.
fn own_cuts(head: usize) -> Cuts {
    let pitch = 2 * head + 16;
    let (queries, forward_keys) = (128, 64);
    let q_keys = if head <= 64 { 64 } else { 32 };
    let (keys, rows) = if head <= 64 { (128, 32) } else { (64, 64) };
    let cut = |tile, shared| Cut { tile, threads: 128, shared };
    [
        cut(queries, (queries + 4 * forward_keys) * pitch),
        cut(queries, (2 * queries + 4 * q_keys) * pitch),
        cut(keys, (2 * keys + 4 * rows) * pitch + 16 * rows),
    ]
}

/// Of hopper.cu.
fn hopper_cuts(head: usize) -> Cuts {
    let cut = |tile, threads, shared| Cut { tile, threads, shared };
    match head {
        64 => [cut(64, 128, 41_984), cut(64, 128, 50_176), cut(64, 128, 68_096)],
        _ => [cut(64, 128, 82_944), cut(64, 128, 99_328), cut(128, 256, 166_400)],
    }
}

impl Attention {
    /// An attention of `heads` query heads over `kv_heads` heads of keys and values, of `head`
    /// elements each.
    pub(super) fn new(
        device: &Device,
        (heads, kv_heads, head): (usize, usize, usize),
        causal: bool,
        window: Option<usize>,
        dropout: Dropout,
    ) -> Result<Self> {
        let own = device.float == Float::Bf16 && SIZES.contains(&head);
        let suffix = match device.float {
            Float::F32 if head <= SMALL => format!("f32_{SMALL}"),
            Float::F32 => "f32".to_owned(),
            Float::Bf16 if own => format!("bf16_{head}"),
            Float::Bf16 => "bf16".to_owned(),
        };
        let get = |name: &str| Kernel::get(device.attention, &format!("attention_{name}_{suffix}"));
        let tiled = |kernel: Kernel, cut: Cut| -> Result<Tiled> {
            let kernel = if cut.shared > 0 { kernel.shared_memory(cut.shared)? } else { kernel };
            Ok(Tiled { kernel, cut })
        };
        let cuts = if own { own_cuts(head) } else { ANY };
        let pair = |name: &str, i: usize| -> Result<Pair> {
            let plain = tiled(get(name)?, cuts[i])?;
            if !own {
                return Ok(Pair { plain, masked: plain });
            }
            let masked = format!("attention_{name}_{suffix}_masked");
            let masked = tiled(Kernel::get(device.attention, &masked)?, cuts[i])?;
            let Some(module) = device.hopper else { return Ok(Pair { plain, masked }) };
            let kernel = Kernel::get(module, &format!("attention_{name}_{suffix}_sm90"))?;
            Ok(Pair { plain: tiled(kernel, hopper_cuts(head)[i])?, masked })
        };
        let small = device.float == Float::F32 && head <= SMALL && window.is_none();
        let whole = || -> Result<Pair> {
            let one = tiled(get("backward")?, Cut { tile: SHORT, ..ANY[2] })?;
            Ok(Pair { plain: one, masked: one })
        };
        let backward = small.then(whole).transpose()?;
        let delta_rows = match head {
            _ if !own => 8,
            32 => 64,
            64 => 32,
            _ => 16,
        };
        Ok(Self {
            heads,
            kv_heads,
            head,
            causal,
            window,
            dropout,
            forward: pair("forward", 0)?,
            delta: get("delta")?,
            delta_rows,
            backward_q: pair("backward_q", 1)?,
            backward_kv: pair("backward_kv", 2)?,
            hopper: device.hopper.is_some(),
            backward,
        })
    }

    /// Elements of all query heads, and of all key heads.
    pub(super) fn widths(&self) -> (usize, usize) {
        (self.heads * self.head, self.kv_heads * self.head)
    }

    fn launch(&self, p: &Pass<'_>, pair: Pair, heads: usize, mut args: Vec<Arg>) -> Result<()> {
        let mask = self.dropout.mask(p.mode);
        let (threshold, keep, ([k0, k1], [h0, h1])) = match &mask {
            Some(mask) => {
                let (stream, threshold, keep) = mask.parts();
                (threshold, keep, stream.words_of_state())
            }
            None => (0, 1.0, ([0; 2], [0; 2])),
        };
        args.extend([
            p.starts,
            p.hidden,
            int(p.tokens),
            int(self.heads),
            int(self.kv_heads),
            int(self.head),
            int(usize::from(self.causal)),
            int(self.window.unwrap_or(0)),
            float(1.0 / (self.head as f64).sqrt()),
            threshold.into(),
            float(keep.into()),
            k0.into(),
            k1.into(),
            h0.into(),
            h1.into(),
        ]);
        let masked = mask.is_some() || p.hidden != 0;
        let Tiled { kernel, cut } = if masked { pair.masked } else { pair.plain };
        let grid = Grid {
            blocks: (heads, p.sequences, p.longest.div_ceil(cut.tile)),
            threads: (cut.threads, 1),
            shared: cut.shared,
        };
        p.device.launch(kernel, grid, &args)
    }

    /// `out` `[tokens, heads * head]` and, for the backward, the logarithms of the sums of the
    /// exponentials.
    pub(super) fn forward(&self, p: &Pass<'_>, x: Heads, out: Mat, log_sums: u64) -> Result<()> {
        let args = vec![
            x.q.at,
            x.k.at,
            x.v.at,
            out.at,
            log_sums,
            int(x.q.ld),
            int(x.k.ld),
            int(x.v.ld),
            int(out.ld),
        ];
        self.launch(p, self.forward, self.heads, args)
    }

    /// The gradients `d` of queries, keys and values from the result and its gradient. Gives
    /// whether they are already those of what is `before`.
    pub(super) fn backward(
        &self,
        p: &Pass<'_>,
        x: Heads,
        (out, g): (Mat, Mat),
        log_sums: u64,
        d: Heads,
        before: Option<Before>,
    ) -> Result<bool> {
        let mark = p.scratch.mark();
        let delta = p.scratch.alloc(4 * p.tokens * self.heads)?;
        let shared = [x.q.at, x.k.at, x.v.at, g.at, log_sums, delta];
        let lds = [int(x.q.ld), int(x.k.ld), int(x.v.ld), int(g.ld)];
        let of_queries = [&shared[..], &[d.q.at], &lds, &[int(d.q.ld)]].concat();
        let to = [int(d.k.ld), int(d.v.ld)];
        let of_keys = [&shared[..], &[d.k.at, d.v.at], &lds, &to].concat();
        let masked = self.dropout.mask(p.mode).is_some() || p.hidden != 0;
        if self.hopper && !masked {
            let [queries, keys] = self.before(p, before);
            let args = [&[out.at, int(out.ld)], &queries[..], &of_queries].concat();
            self.launch(p, self.backward_q, self.heads, args)?;
            let args = [&keys[..], &of_keys].concat();
            self.launch(p, self.backward_kv, self.kv_heads, args)?;
            p.scratch.release(mark);
            return Ok(before.is_some() && p.rope.is_some());
        }
        let args = [
            out.at,
            g.at,
            delta,
            int(out.ld),
            int(g.ld),
            int(p.tokens),
            int(self.heads),
            int(self.head),
        ];
        let blocks = (p.tokens * self.heads).div_ceil(self.delta_rows);
        p.device.launch(self.delta, Grid::blocks(blocks, 256), &args)?;
        if let Some(pair) = self.backward.filter(|_| p.longest <= SHORT) {
            let to = [int(d.q.ld), int(d.k.ld), int(d.v.ld)];
            let args = [&shared[..], &[d.q.at, d.k.at, d.v.at], &lds, &to].concat();
            self.launch(p, pair, self.kv_heads, args)?;
        } else {
            self.launch(p, self.backward_kv, self.kv_heads, of_keys)?;
            self.launch(p, self.backward_q, self.heads, of_queries)?;
        }
        p.scratch.release(mark);
        Ok(false)
    }

    /// The arguments of what is before the queries, and before the keys.
    fn before(&self, p: &Pass<'_>, before: Option<Before>) -> [[Arg; 7]; 2] {
        let (Some(before), Some((cosines, sines))) = (before, p.rope) else { return [[0; 7]; 2] };
        let none = (Mat { at: 0, ld: 0 }, [(0, 0); 2]);
        let (x, [query, key]) = before.norms.unwrap_or(none);
        let args =
            |x: Mat, (weight, rstd)| [p.positions, cosines, sines, x.at, int(x.ld), weight, rstd];
        [args(x, query), args(p.columns(x, self.widths().0), key)]
    }
}

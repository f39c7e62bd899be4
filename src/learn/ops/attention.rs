//! Scaled dot-product attention over packed sequences.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::dropout::Mask;
use super::{dot, exp, matrix, max, slice, sum, tensor, wide, with_slices};
use crate::learn::matrix::{Matrix, Threads, product};

/// The shape of an attention.
#[derive(Debug, Clone)]
pub(crate) struct Attention {
    /// Query heads.
    pub(crate) heads: usize,
    /// Key and value heads; each serves `heads / kv_heads` query heads.
    pub(crate) kv_heads: usize,
    /// Elements of a head.
    pub(crate) head: usize,
    /// Whether a token sees only itself and those before it.
    pub(crate) causal: bool,
    /// How many tokens a token sees at most, itself included.
    pub(crate) window: Option<usize>,
    /// Drops attention probabilities.
    pub(crate) dropout: Option<Mask>,
    /// Where each sequence begins, and the number of tokens.
    pub(crate) starts: Arc<[usize]>,
    /// Tokens of its sequence that each token does not see among those that it would; empty: none.
    pub(crate) hidden: Arc<[Range<usize>]>,
}

/// One sequence and one key head.
struct Task {
    rows: Range<usize>,
    sequence: usize,
    kv: usize,
}

/// What a task computes: one `[rows, head]` for each of its heads.
type Heads = Vec<Vec<f32>>;

impl Attention {
    fn tasks(&self) -> Vec<Task> {
        let sequences = self.starts.windows(2).enumerate();
        sequences
            .flat_map(|(sequence, w)| {
                let rows = w[0]..w[1];
                (0..self.kv_heads).map(move |kv| Task { rows: rows.clone(), sequence, kv })
            })
            .collect()
    }

    /// Query heads of a key head.
    fn group(&self, kv: usize) -> Range<usize> {
        let size = self.heads / self.kv_heads;
        kv * size..(kv + 1) * size
    }

    /// Keys that a query sees.
    fn keys(&self, query: usize, n: usize) -> Range<usize> {
        let end = if self.causal { query + 1 } else { n };
        let start = self.window.map_or(0, |w| (query + 1).saturating_sub(w));
        start..end
    }

    fn part<'a>(&self, data: &'a [f32], rows: &Range<usize>, heads: usize, i: usize) -> Matrix<'a> {
        let width = heads * self.head;
        let data = &data[rows.start * width + i * self.head..rows.end * width];
        Matrix::strided(data, rows.len(), self.head, width)
    }

    fn scale(&self) -> f32 {
        (1.0 / (self.head as f64).sqrt()) as f32
    }

    fn mask(&self, task: &Task, head: usize) -> Option<Mask> {
        self.dropout.map(|m| m.at((task.sequence * self.heads + head) as u64))
    }

    /// Softmax of the scaled scores, 0 where a key is not seen. `[n, n]`.
    fn probabilities(&self, q: Matrix<'_>, k: Matrix<'_>, rows: &Range<usize>) -> Vec<f32> {
        let n = rows.len();
        let mut p = vec![0.0; n * n];
        product((&mut p, n), 0.0, self.scale(), q, k.t(), Threads::One);
        wide!({
            for (i, row) in p.chunks_exact_mut(n).enumerate() {
                let seen = self.keys(i, n);
                row[..seen.start].fill(0.0);
                row[seen.end..].fill(0.0);
                if let Some(hidden) = self.hidden.get(rows.start + i) {
                    row[hidden.clone()].fill(f32::NEG_INFINITY);
                }
                let row = &mut row[seen];
                let max = max(row);
                for x in row.iter_mut() {
                    *x = exp(*x - max);
                }
                let inverse = 1.0 / sum(row, |x| x);
                for x in row.iter_mut() {
                    *x *= inverse;
                }
            }
        });
        p
    }

    fn forward(&self, q: &[f32], k: &[f32], v: &[f32]) -> Vec<f32> {
        let tasks = self.tasks();
        let done: Vec<Heads> = tasks
            .par_iter()
            .map(|task| {
                let n = task.rows.len();
                let k = self.part(k, &task.rows, self.kv_heads, task.kv);
                let v = self.part(v, &task.rows, self.kv_heads, task.kv);
                let heads = self.group(task.kv).map(|h| {
                    let q = self.part(q, &task.rows, self.heads, h);
                    let mut p = self.probabilities(q, k, &task.rows);
                    if let Some(mask) = self.mask(task, h) {
                        mask.apply_from(0, &mut p);
                    }
                    let mut out = vec![0.0; n * self.head];
                    let p = Matrix::new(&p, n, n);
                    product((&mut out, self.head), 0.0, 1.0, p, v, Threads::One);
                    out
                });
                heads.collect()
            })
            .collect();
        self.assemble(self.heads, &done)
    }

    /// `[tokens, heads * head]` from what the tasks computed.
    fn assemble(&self, heads: usize, done: &[Heads]) -> Vec<f32> {
        let (width, d) = (heads * self.head, self.head);
        let mut out = vec![0.0; self.starts.last().copied().unwrap_or(0) * width];
        let mut rest = out.as_mut_slice();
        let mut sequences = Vec::new();
        for w in self.starts.windows(2) {
            let (first, others) = rest.split_at_mut((w[1] - w[0]) * width);
            sequences.push(first);
            rest = others;
        }
        let done = done.par_chunks(self.kv_heads);
        sequences.into_par_iter().zip(done).for_each(|(out, tasks)| {
            for (h, from) in tasks.iter().flatten().enumerate() {
                for (row, from) in out.chunks_exact_mut(width).zip(from.chunks_exact(d)) {
                    row[h * d..][..d].copy_from_slice(from);
                }
            }
        });
        out
    }

    /// Gradients of queries, keys and values.
    fn backward(&self, q: &[f32], k: &[f32], v: &[f32], g: &[f32]) -> [Vec<f32>; 3] {
        let tasks = self.tasks();
        let done: Vec<(Heads, Vec<f32>, Vec<f32>)> = tasks
            .par_iter()
            .map(|task| {
                let (n, d) = (task.rows.len(), self.head);
                let k = self.part(k, &task.rows, self.kv_heads, task.kv);
                let v = self.part(v, &task.rows, self.kv_heads, task.kv);
                let (mut dk, mut dv) = (vec![0.0; n * d], vec![0.0; n * d]);
                let dq = self.group(task.kv).map(|h| {
                    let q = self.part(q, &task.rows, self.heads, h);
                    let g = self.part(g, &task.rows, self.heads, h);
                    let p = self.probabilities(q, k, &task.rows);
                    let mut ds = vec![0.0; n * n];
                    product((&mut ds, n), 0.0, 1.0, g, v.t(), Threads::One);
                    let kept = self.mask(task, h).map(|mask| {
                        mask.apply_from(0, &mut ds);
                        let mut kept = p.clone();
                        mask.apply_from(0, &mut kept);
                        kept
                    });
                    let kept = Matrix::new(kept.as_ref().unwrap_or(&p), n, n);
                    product((&mut dv, d), 1.0, 1.0, kept.t(), g, Threads::One);
                    wide!({
                        for (p, ds) in p.chunks_exact(n).zip(ds.chunks_exact_mut(n)) {
                            let dot = dot(p, ds);
                            for (ds, p) in ds.iter_mut().zip(p) {
                                *ds = p * (*ds - dot);
                            }
                        }
                    });
                    let ds = Matrix::new(&ds, n, n);
                    let mut dq = vec![0.0; n * d];
                    product((&mut dq, d), 0.0, self.scale(), ds, k, Threads::One);
                    product((&mut dk, d), 1.0, self.scale(), ds.t(), q, Threads::One);
                    dq
                });
                (dq.collect(), dk, dv)
            })
            .collect();
        let (mut dq, mut dk, mut dv) = (Vec::new(), Vec::new(), Vec::new());
        for (q, k, v) in done {
            dq.push(q);
            dk.push(vec![k]);
            dv.push(vec![v]);
        }
        let kv = self.kv_heads;
        [self.assemble(self.heads, &dq), self.assemble(kv, &dk), self.assemble(kv, &dv)]
    }
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let tokens = self.starts.last().copied().unwrap_or(0);
        let (wide, narrow) = (self.heads * self.head, self.kv_heads * self.head);
        if matrix(l1.shape()) != (tokens, wide)
            || matrix(l2.shape()) != (tokens, narrow)
            || matrix(l3.shape()) != (tokens, narrow)
            || self.kv_heads == 0
            || !self.heads.is_multiple_of(self.kv_heads)
        {
            bail!("attention over {tokens} tokens of {:?}, {:?}", l1.dims(), l2.dims());
        }
        let out = self.forward(slice(s1, l1)?, slice(s2, l2)?, slice(s3, l3)?);
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [dq, dk, dv] = with_slices([q, k, v, grad], |[q, k, v, g]| self.backward(q, k, v, g))?;
        let give = |x: &Tensor, d: Vec<f32>| x.track_op().then(|| tensor(d, x.shape())).transpose();
        Ok((give(q, dq)?, give(k, dk)?, give(v, dv)?))
    }
}

/// `softmax(q k^T / sqrt(head)) v` within each sequence. `q` is `[tokens, heads * head]`, `k` and
/// `v` are `[tokens, kv_heads * head]`; the result is as `q`.
pub(crate) fn attention(q: &Tensor, k: &Tensor, v: &Tensor, how: Attention) -> Result<Tensor> {
    q.apply_op3(k, v, how)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{check, normal};
    use super::*;
    use crate::learn::random::Stream;

    fn shape(kv_heads: usize, causal: bool, window: Option<usize>) -> Attention {
        Attention {
            heads: 4,
            kv_heads,
            head: 3,
            causal,
            window,
            dropout: None,
            starts: [0, 5, 6, 13].into(),
            hidden: [].into(),
        }
    }

    #[test]
    fn gradients() {
        let q = normal("q", &[13, 12]);
        for (kv, causal, window) in
            [(4, false, None), (2, true, None), (1, true, Some(3)), (2, false, Some(2))]
        {
            let args = [q.clone(), normal("k", &[13, 3 * kv]), normal("v", &[13, 3 * kv])];
            check(&args, |a| attention(&a[0], &a[1], &a[2], shape(kv, causal, window)));
        }
    }

    #[test]
    fn gradients_with_dropout() {
        let how =
            Attention { dropout: Mask::new(Stream::new(3, "p"), 0.4), ..shape(2, true, None) };
        let args = [normal("q", &[13, 12]), normal("k", &[13, 6]), normal("v", &[13, 6])];
        check(&args, |a| attention(&a[0], &a[1], &a[2], how.clone()));
    }

    /// A score that is not a finite number spoils the tokens that see it, and no others.
    #[test]
    fn what_is_not_a_number_stays_so() {
        let [q, k, v] = ["q", "k", "v"].map(|n| normal(n, &[13, 12]));
        for bad in [f32::NAN, f32::INFINITY] {
            let mut k = k.to_vec2::<f32>().unwrap();
            k[8].iter_mut().for_each(|x| *x = bad);
            let k = Tensor::new(k, v.device()).unwrap();
            let out = attention(&q, &k, &v, shape(4, true, None)).unwrap();
            for (i, row) in out.to_vec2::<f32>().unwrap().iter().enumerate() {
                assert_eq!(row.iter().all(|x| x.is_finite()), i < 8, "{bad} {i}");
            }
        }
    }

    /// Tokens 4 and 5 of the last sequence stand for its tokens 2 and 3.
    #[test]
    fn hidden_tokens_are_as_if_absent() {
        let [q, k, v] = ["q", "k", "v"].map(|n| normal(n, &[13, 12]));
        let mut hidden = vec![0..0; 13];
        hidden[10..12].fill(2..4);
        let how = Attention { hidden: hidden.into(), ..shape(4, true, None) };
        let with = attention(&q, &k, &v, how).unwrap().to_vec2::<f32>().unwrap();
        let keep = |x: &Tensor| {
            let rows = [x.narrow(0, 0, 8).unwrap(), x.narrow(0, 10, 2).unwrap()];
            Tensor::cat(&rows, 0).unwrap()
        };
        let how = Attention { starts: [0, 5, 6, 10].into(), ..shape(4, true, None) };
        let without = attention(&keep(&q), &keep(&k), &keep(&v), how).unwrap();
        for (i, row) in without.to_vec2::<f32>().unwrap().iter().enumerate() {
            let same = &with[if i < 8 { i } else { i + 2 }];
            assert!(row.iter().zip(same).all(|(a, b)| (a - b).abs() < 1e-6), "{i}");
        }
    }

    /// Sequences do not see each other, and a causal token does not see what follows.
    #[test]
    fn stays_inside() {
        let [q, k, v] = ["q", "k", "v"].map(|n| normal(n, &[13, 12]));
        let run = |v: &Tensor| {
            attention(&q, &k, v, shape(4, true, None)).unwrap().to_vec2::<f32>().unwrap()
        };
        let mut moved = v.to_vec2::<f32>().unwrap();
        moved[8].iter_mut().for_each(|x| *x += 1.0);
        let moved = Tensor::new(moved, v.device()).unwrap();
        for (i, (a, b)) in run(&v).iter().zip(run(&moved)).enumerate() {
            assert_eq!(*a == b, i < 8, "{i}");
        }
    }
}

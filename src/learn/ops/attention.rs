//! Scaled dot-product attention over packed sequences.

use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use super::dropout::{Mask, mask, masked, words};
use super::{Buffer, dot, exp, max, sum, wide};
use crate::learn::arithmetic::Arithmetic;
use crate::learn::matrix::Matrix;
use crate::learn::output::{Block, Shared};

/// Queries whose scores are in memory at once. Fixed, so that no sum depends on the threads.
const QUERIES: usize = 64;

/// The shape of an attention.
#[derive(Debug, Clone)]
pub(crate) struct Attention {
    /// In which its products are computed.
    pub(crate) arithmetic: Arithmetic,
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
    /// The tokens that there are queries of, in their order; `None`: all.
    pub(crate) queries: Option<Arc<[u32]>>,
    /// Where each sequence begins, and the number of tokens.
    pub(crate) starts: Arc<[usize]>,
    /// Tokens of its sequence that each token does not see among those that it would; empty: none.
    pub(crate) hidden: Arc<[Range<usize>]>,
}

/// Some queries of one head of a sequence.
struct Queries {
    sequence: usize,
    /// The sequence's tokens in the batch.
    rows: Range<usize>,
    head: usize,
    /// Rows of the queries.
    at: Range<usize>,
}

/// Gradients of an attention's arguments; those that are not wanted are left out.
pub(crate) struct AttentionGradients {
    /// `[tokens, heads * head]`.
    pub(crate) query: Option<Buffer>,
    /// `[tokens, kv_heads * head]`.
    pub(crate) key: Option<Buffer>,
    /// As the key's.
    pub(crate) value: Option<Buffer>,
}

/// What dropout kept of the probabilities: bits by query, head and key, [`Attention::words`] for
/// each head of a query. The first is that of the first key that any query of the block sees.
#[derive(Debug)]
pub(crate) struct KeptProbabilities(Buffer<u16>);

impl Attention {
    fn sequences(&self) -> impl Iterator<Item = (usize, Range<usize>)> + '_ {
        self.starts.windows(2).map(|w| w[0]..w[1]).enumerate()
    }

    /// Rows of the queries of a sequence with these tokens.
    fn queries(&self, rows: &Range<usize>) -> Range<usize> {
        let Some(chosen) = &self.queries else { return rows.clone() };
        let before = |end: usize| chosen.partition_point(|q| (*q as usize) < end);
        before(rows.start)..before(rows.end)
    }

    /// The rows of the queries of a sequence in blocks.
    fn blocks(&self, rows: &Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
        let all = self.queries(rows);
        all.clone().step_by(QUERIES).map(move |first| first..(first + QUERIES).min(all.end))
    }

    /// Where in its sequence a query stands.
    fn position(&self, rows: &Range<usize>, query: usize) -> usize {
        self.queries.as_ref().map_or(query, |chosen| chosen[query] as usize) - rows.start
    }

    /// Keys that a query of a sequence of `n` sees.
    fn keys(&self, query: usize, n: usize) -> Range<usize> {
        let end = if self.causal { query + 1 } else { n };
        let start = self.window.map_or(0, |w| (query + 1).saturating_sub(w));
        start..end
    }

    /// Keys that any of some queries of a sequence sees.
    fn keys_of(&self, at: &Range<usize>, rows: &Range<usize>) -> Range<usize> {
        let keys = |query| self.keys(self.position(rows, query), rows.len());
        keys(at.start).start..keys(at.end - 1).end
    }

    fn part<'a>(&self, data: &'a [f32], rows: Range<usize>, heads: usize, i: usize) -> Matrix<'a> {
        let width = heads * self.head;
        let data = &data[rows.start * width + i * self.head..rows.end * width];
        Matrix::strided(data, rows.len(), self.head, width)
    }

    fn scale(&self) -> f32 {
        (1.0 / (self.head as f64).sqrt()) as f32
    }

    /// Words of bits of a head of a query, in a sequence of `n`.
    fn words(&self, n: usize) -> usize {
        if self.dropout.is_some() { words(n) } else { 0 }
    }

    /// Draws what is kept of a head of some queries. `bits` begin with those of the first query.
    fn draw(&self, these: &Queries, keys: &Range<usize>, bits: &mut [u16]) {
        let Some(mask) = self.dropout else { return };
        let (n, heads, head) = (these.rows.len(), self.heads, these.head);
        let mask = mask.at((these.sequence * heads + head) as u64);
        let each = bits.chunks_exact_mut(heads * self.words(n));
        for (query, bits) in these.at.clone().zip(each) {
            let bits = &mut bits[head * self.words(n)..][..words(keys.len())];
            mask.draw(self.position(&these.rows, query) * n + keys.start, bits);
        }
    }

    /// The bits of a head of each of some queries, which `bits` begin with.
    fn bits<'a>(&self, these: &Queries, bits: &'a [u16]) -> impl Iterator<Item = &'a [u16]> {
        let words = self.words(these.rows.len());
        let head = these.head * words..(these.head + 1) * words;
        bits.chunks_exact((self.heads * words).max(1)).map(move |bits| &bits[head.clone()])
    }

    /// Softmax of the scaled scores of some queries and `keys`, 0 where a key is not seen:
    /// `p` is `[queries, keys]`.
    fn probabilities(
        &self,
        [q, k]: [&[f32]; 2],
        these: &Queries,
        keys: &Range<usize>,
        p: &mut [f32],
    ) {
        let Queries { rows, at, head, .. } = these;
        let (n, m, start) = (rows.len(), keys.len(), rows.start);
        let kv = head / (self.heads / self.kv_heads);
        let q = self.part(q, at.clone(), self.heads, *head);
        let k = self.part(k, start + keys.start..start + keys.end, self.kv_heads, kv);
        self.arithmetic.product((&mut *p, m), 0.0, self.scale(), q, k.t());
        wide!({
            for (query, row) in at.clone().zip(p.chunks_exact_mut(m)) {
                let position = self.position(rows, query);
                let seen = self.keys(position, n);
                row[..seen.start - keys.start].fill(0.0);
                row[seen.end - keys.start..].fill(0.0);
                if let Some(hidden) = self.hidden.get(start + position) {
                    let hidden = hidden.start.max(keys.start)..hidden.end.min(keys.end);
                    if !hidden.is_empty() {
                        row[hidden.start - keys.start..hidden.end - keys.start]
                            .fill(f32::NEG_INFINITY);
                    }
                }
                let row = &mut row[seen.start - keys.start..seen.end - keys.start];
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
    }

    /// `out = softmax(q k^T / sqrt(head)) v` within each sequence. `q` and `out` are
    /// `[queries, heads * head]`, `k` and `v` are `[tokens, kv_heads * head]`. What dropout kept,
    /// [`Attention::backward`] reads again.
    pub(crate) fn forward(
        &self,
        q: &[f32],
        k: &[f32],
        v: &[f32],
        out: &mut [f32],
    ) -> Option<KeptProbabilities> {
        let (width, group) = (self.heads * self.head, self.heads / self.kv_heads);
        let count = |rows: Range<usize>| self.queries(&rows).len() * self.words(rows.len());
        let count: usize = self.sequences().map(|(_, rows)| count(rows)).sum();
        let mut bits = Buffer::new(count * self.heads);
        let mut tasks = Vec::new();
        let (mut rest, mut rest_of_bits) = (out, &mut bits[..]);
        for (sequence, rows) in self.sequences() {
            for at in self.blocks(&rows) {
                let (out, others) = rest.split_at_mut(at.len() * width);
                let words = at.len() * self.heads * self.words(rows.len());
                let (bits, other_bits) = rest_of_bits.split_at_mut(words);
                tasks.push((Queries { sequence, rows: rows.clone(), head: 0, at }, out, bits));
                (rest, rest_of_bits) = (others, other_bits);
            }
        }
        tasks.into_par_iter().for_each(|(mut these, out, bits)| {
            let keys = self.keys_of(&these.at, &these.rows);
            let start = these.rows.start;
            let mut p = Buffer::new(these.at.len() * keys.len());
            for head in 0..self.heads {
                these.head = head;
                self.probabilities([q, k], &these, &keys, &mut p);
                if let Some(dropout) = self.dropout {
                    self.draw(&these, &keys, bits);
                    let mut rows = p.chunks_exact_mut(keys.len()).zip(self.bits(&these, bits));
                    wide!({
                        for (p, bits) in rows.by_ref() {
                            mask(bits, dropout.scale(), p);
                        }
                    });
                }
                let those = start + keys.start..start + keys.end;
                let v = self.part(v, those, self.kv_heads, head / group);
                let p = Matrix::new(&p, these.at.len(), keys.len());
                let out = &mut out[head * self.head..];
                self.arithmetic.product((out, width), 0.0, 1.0, p, v);
            }
        });
        self.dropout.map(|_| KeptProbabilities(bits))
    }

    /// Gradients of queries, keys and values, as far as they are `wanted`.
    pub(crate) fn backward(
        &self,
        [q, k, v]: [&[f32]; 3],
        kept: Option<&KeptProbabilities>,
        grad: &[f32],
        wanted: [bool; 3],
    ) -> AttentionGradients {
        let group = self.heads / self.kv_heads;
        let mut first = 0;
        let mut tasks = Vec::new();
        for (sequence, rows) in self.sequences() {
            tasks.extend((0..self.kv_heads).map(|kv| (sequence, rows.clone(), kv, first)));
            first += self.queries(&rows).len() * self.heads * self.words(rows.len());
        }
        let dropout = self.dropout.zip(kept);
        let new = |i: usize, size: usize| wanted[i].then(|| Buffer::new(size));
        let mut out = [new(0, q.len()), new(1, k.len()), new(2, v.len())];
        let widths = [self.heads, self.kv_heads, self.kv_heads].map(|heads| heads * self.head);
        let shared = out.iter_mut().zip(widths).map(|(out, width)| {
            let out = out.as_mut()?;
            let rows = out.len() / width;
            Some(Block::new((out, width), (rows, width)).share())
        });
        let shared: Vec<Option<Shared<'_>>> = shared.collect();
        tasks.into_par_iter().for_each(|(sequence, rows, kv, first)| {
            let (n, d) = (rows.len(), self.head);
            let all = self.queries(&rows);
            // SAFETY: no other task has these rows and heads.
            #[expect(unsafe_code, reason = "threads fill parts of one slice")]
            let block = |i: usize, rows: &Range<usize>, heads: usize| unsafe {
                let cols = kv * heads * d..(kv + 1) * heads * d;
                Some(shared[i].as_ref()?.block(rows.clone(), cols))
            };
            let mut dq = block(0, &all, group);
            let [mut dk, mut dv] = [1, 2].map(|i| block(i, &rows, 1));
            // Sums over queries begin as zeros, unless the first of these see all keys.
            let first_keys = self.blocks(&rows).next().map(|at| self.keys_of(&at, &rows));
            let begun = first_keys != Some(0..n);
            if begun {
                [&mut dk, &mut dv].into_iter().flatten().for_each(Block::clear);
            }
            let size = all.len().min(QUERIES) * n;
            let [mut p, mut ds] = [(); 2].map(|()| Buffer::new(size));
            let mut dropped = dropout.map(|_| Buffer::new(size));
            for at in self.blocks(&rows) {
                let keys = self.keys_of(&at, &rows);
                let m = keys.len();
                let those = rows.start + keys.start..rows.start + keys.end;
                let k_ = self.part(k, those.clone(), self.kv_heads, kv);
                let v_ = self.part(v, those, self.kv_heads, kv);
                let [p, ds] = [&mut p, &mut ds].map(|x| &mut x[..at.len() * m]);
                for head in kv * group..(kv + 1) * group {
                    let begun = begun || at.start > all.start || head > kv * group;
                    let beta = if begun { 1.0 } else { 0.0 };
                    let rows = rows.clone();
                    let these = Queries { sequence, rows, head, at: at.clone() };
                    let q_ = self.part(q, at.clone(), self.heads, head);
                    let g = self.part(grad, at.clone(), self.heads, head);
                    self.probabilities([q, k], &these, &keys, p);
                    let dropout = dropout.map(|(mask, KeptProbabilities(bits))| {
                        let before = (at.start - all.start) * self.heads * self.words(n);
                        (mask.scale(), &bits[first + before..])
                    });
                    if let Some(dv) = &mut dv {
                        let mut used = &*p;
                        if let (Some((scale, bits)), Some(dropped)) = (dropout, &mut dropped) {
                            let dropped = &mut dropped[..p.len()];
                            let rows = p.chunks_exact(m).zip(dropped.chunks_exact_mut(m));
                            let mut rows = rows.zip(self.bits(&these, bits));
                            wide!({
                                for ((p, dropped), bits) in rows.by_ref() {
                                    masked(bits, scale, p, dropped, |_, p| p);
                                }
                            });
                            used = dropped;
                        }
                        let used = Matrix::new(used, at.len(), m);
                        let out = dv.part(keys.clone(), 0..d);
                        self.arithmetic.product(out, beta, 1.0, used.t(), g);
                    }
                    if dq.is_none() && dk.is_none() {
                        continue;
                    }
                    self.arithmetic.product((&mut *ds, m), 0.0, 1.0, g, v_.t());
                    let mut bits = dropout.map(|(scale, bits)| (scale, self.bits(&these, bits)));
                    wide!({
                        for (p, ds) in p.chunks_exact(m).zip(ds.chunks_exact_mut(m)) {
                            if let Some((scale, bits)) = &mut bits {
                                mask(bits.next().unwrap_or_default(), *scale, ds);
                            }
                            let dot = dot(p, ds);
                            for (ds, p) in ds.iter_mut().zip(p) {
                                *ds = p * (*ds - dot);
                            }
                        }
                    });
                    let ds = Matrix::new(ds, at.len(), m);
                    if let Some(dq) = &mut dq {
                        let (rows, head) = (at.start - all.start, head - kv * group);
                        let rows = rows..rows + at.len();
                        let out = dq.part(rows, head * d..(head + 1) * d);
                        self.arithmetic.product(out, 0.0, self.scale(), ds, k_);
                    }
                    if let Some(dk) = &mut dk {
                        let out = dk.part(keys.clone(), 0..d);
                        self.arithmetic.product(out, beta, self.scale(), ds.t(), q_);
                    }
                }
            }
        });
        drop(shared);
        let [query, key, value] = out;
        AttentionGradients { query, key, value }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{check, normal};
    use super::super::{add_rows, select_rows};
    use super::*;
    use crate::learn::random::Stream;

    fn shape(kv_heads: usize, causal: bool, window: Option<usize>) -> Attention {
        Attention {
            arithmetic: Arithmetic::F32,
            heads: 4,
            kv_heads,
            head: 3,
            causal,
            window,
            dropout: None,
            queries: None,
            starts: [0, 5, 6, 13].into(),
            hidden: [].into(),
        }
    }

    fn run(how: &Attention, a: &[&[f32]]) -> Vec<f32> {
        let mut out = vec![f32::NAN; a[0].len()];
        how.forward(a[0], a[1], a[2], &mut out);
        out
    }

    fn check_gradients(how: &Attention) {
        let tokens = how.starts.last().unwrap();
        let q = normal("q", tokens * how.heads * how.head);
        let [k, v] = ["k", "v"].map(|n| normal(n, tokens * how.kv_heads * how.head));
        let args = [&q[..], &k, &v];
        check(
            &args,
            |a| run(how, a),
            |a, g| {
                let kept = how.forward(a[0], a[1], a[2], &mut vec![0.0; g.len()]);
                let all = how.backward([a[0], a[1], a[2]], kept.as_ref(), g, [true; 3]);
                let all = [all.query, all.key, all.value].map(|x| x.unwrap().to_vec());
                // What is not wanted does not disturb the rest.
                for i in 0..3 {
                    let mut wanted = [false; 3];
                    wanted[i] = true;
                    let one = how.backward([a[0], a[1], a[2]], kept.as_ref(), g, wanted);
                    let one = [one.query, one.key, one.value];
                    assert!(one.iter().enumerate().all(|(j, x)| x.is_some() == (i == j)));
                    assert_eq!(one[i].as_ref().unwrap()[..], all[i][..]);
                }
                all.to_vec()
            },
        );
    }

    #[test]
    fn gradients() {
        for (kv, causal, window) in
            [(4, false, None), (2, true, None), (1, true, Some(3)), (2, false, Some(2))]
        {
            check_gradients(&shape(kv, causal, window));
        }
    }

    #[test]
    fn gradients_with_dropout() {
        let dropout = Mask::new(Stream::new(3, "p"), 0.4);
        check_gradients(&Attention { dropout, ..shape(2, true, None) });
    }

    /// Some of the queries: the same as for all, with and without dropout.
    #[test]
    fn chosen_queries() {
        let [q, k, v] = ["q", "k", "v"].map(|n| normal(n, 13 * 12));
        let chosen = [2u32, 5, 6, 11, 12];
        let take = |x: &[f32]| select_rows(x, 12, &chosen).to_vec();
        for p in [0.0, 0.4] {
            let dropout = Mask::new(Stream::new(3, "p"), p);
            let all = Attention { dropout, ..shape(4, true, Some(4)) };
            let some = Attention { queries: Some(chosen.into()), ..all.clone() };
            let out = run(&some, &[&take(&q), &k, &v]);
            assert_eq!(out, take(&run(&all, &[&q, &k, &v])));
            let g = normal("g", 5 * 12);
            let mut spread = vec![0.0; 13 * 12];
            add_rows(&g, 12, &chosen, None, &mut spread);
            let backward = |how: &Attention, q: &[f32], g: &[f32]| {
                let kept = how.forward(q, &k, &v, &mut vec![0.0; q.len()]);
                how.backward([q, &k, &v], kept.as_ref(), g, [true; 3])
            };
            let want = backward(&all, &q, &spread);
            let found = backward(&some, &take(&q), &g);
            let near = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5);
            assert!(near(&found.query.unwrap(), &take(&want.query.unwrap())));
            assert!(near(&found.key.unwrap(), &want.key.unwrap()));
            assert!(near(&found.value.unwrap(), &want.value.unwrap()));
        }
    }

    /// More queries than are in memory at once: the same as each query on its own, from the
    /// definition, in f64.
    #[test]
    fn long_sequences() {
        let n = 2 * QUERIES + 7;
        let [q, k, v] = ["q", "k", "v"].map(|name| normal(name, n * 6));
        let starts: Arc<[usize]> = [0, n].into();
        for (causal, window) in [(false, None), (true, None), (true, Some(70))] {
            let how = Attention { heads: 2, starts: starts.clone(), ..shape(2, causal, window) };
            let out = run(&how, &[&q, &k, &v]);
            let dot = |i: usize, j: usize, h: usize| -> f64 {
                let pair = |e| f64::from(q[i * 6 + h * 3 + e]) * f64::from(k[j * 6 + h * 3 + e]);
                (0..3).map(pair).sum::<f64>() / 3f64.sqrt()
            };
            for (i, h) in (0..n).flat_map(|i| [(i, 0), (i, 1)]) {
                let seen = how.keys(i, n);
                let weights: Vec<f64> = seen.clone().map(|j| dot(i, j, h).exp()).collect();
                let total: f64 = weights.iter().sum();
                for e in 0..3 {
                    let values = seen.clone().map(|j| f64::from(v[j * 6 + h * 3 + e]));
                    let want: f64 = weights.iter().zip(values).map(|(w, v)| w * v / total).sum();
                    let found = f64::from(out[i * 6 + h * 3 + e]);
                    assert!((want - found).abs() < 1e-5, "{i} {h} {e}: {want} {found}");
                }
            }
        }
    }

    /// The gradients over several blocks of queries, from the definition, in f64; in memory that
    /// held something else. The first sequence has no query.
    #[test]
    fn long_backward() {
        let (skipped, n, d) = (3, 2 * QUERIES + 7, 3);
        let (tokens, m) = (skipped + n, n - 2);
        let chosen: Arc<[u32]> = (skipped..skipped + m).map(|i| i as u32 + 2).collect();
        for (kv, causal, window) in
            [(2, false, None), (1, true, None), (2, true, Some(70)), (1, false, Some(70))]
        {
            let [q, g] = ["q", "g"].map(|name| normal(name, m * 2 * d));
            let [k, v] = ["k", "v"].map(|name| normal(name, tokens * kv * d));
            let starts = [0, skipped, tokens].into();
            let queries = Some(Arc::clone(&chosen));
            let how = Attention { heads: 2, starts, queries, ..shape(kv, causal, window) };
            let at = |x: &[f32], row: usize, heads: usize, h: usize| -> [f64; 3] {
                std::array::from_fn(|e| f64::from(x[(row * heads + h) * d + e]))
            };
            let dot = |a: [f64; 3], b: [f64; 3]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            let mut want = [vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]];
            let scale = 1.0 / 3f64.sqrt();
            for (i, h) in (0..m).flat_map(|i| [(i, 0), (i, 1)]) {
                let (qi, gi, kv_head) = (at(&q, i, 2, h), at(&g, i, 2, h), h * kv / 2);
                let seen = how.keys(i + 2, n);
                let score = |j| (scale * dot(qi, at(&k, skipped + j, kv, kv_head))).exp();
                let total: f64 = seen.clone().map(score).sum();
                let p = |j| score(j) / total;
                let dp = |j| dot(gi, at(&v, skipped + j, kv, kv_head));
                let mean: f64 = seen.clone().map(|j| p(j) * dp(j)).sum();
                for j in seen {
                    let (p, ds) = (p(j), p(j) * (dp(j) - mean) * scale);
                    let (to, row) = ((i * 2 + h) * d, ((skipped + j) * kv + kv_head) * d);
                    let kj = at(&k, skipped + j, kv, kv_head);
                    for e in 0..d {
                        want[0][to + e] += ds * kj[e];
                        want[1][row + e] += ds * qi[e];
                        want[2][row + e] += p * gi[e];
                    }
                }
            }
            for (arithmetic, limit) in [(Arithmetic::F32, 1e-5), (Arithmetic::Bf16, 3e-2)] {
                let how = Attention { arithmetic, ..how.clone() };
                for len in [q.len(), k.len()] {
                    drop(Buffer::of(&vec![f32::NAN; len]));
                }
                let found = how.backward([&q, &k, &v], None, &g, [true; 3]);
                for (found, want) in [found.query, found.key, found.value].iter().zip(&want) {
                    let found = found.as_ref().unwrap();
                    let norm = want.iter().map(|x| x * x).sum::<f64>().sqrt();
                    let apart = found.iter().zip(want).map(|(f, w)| (f64::from(*f) - w).powi(2));
                    let apart = apart.sum::<f64>().sqrt();
                    assert!(apart < limit * norm, "{kv} {causal} {window:?}: {apart} {norm}");
                }
            }
        }
    }

    /// A score that is not a finite number spoils the tokens that see it, and no others.
    #[test]
    fn what_is_not_a_number_stays_so() {
        let [q, mut k, v] = ["q", "k", "v"].map(|n| normal(n, 13 * 12));
        for bad in [f32::NAN, f32::INFINITY] {
            k[8 * 12..9 * 12].fill(bad);
            let out = run(&shape(4, true, None), &[&q, &k, &v]);
            for (i, row) in out.chunks(12).enumerate() {
                assert_eq!(row.iter().all(|x| x.is_finite()), i < 8, "{bad} {i}");
            }
        }
    }

    /// Tokens 4 and 5 of the last sequence stand for its tokens 2 and 3.
    #[test]
    fn hidden_tokens_are_as_if_absent() {
        let [q, k, v] = ["q", "k", "v"].map(|n| normal(n, 13 * 12));
        let mut hidden = vec![0..0; 13];
        hidden[10..12].fill(2..4);
        let how = Attention { hidden: hidden.into(), ..shape(4, true, None) };
        let with = run(&how, &[&q, &k, &v]);
        let keep = |x: &[f32]| [&x[..8 * 12], &x[10 * 12..]].concat();
        let how = Attention { starts: [0, 5, 6, 11].into(), ..shape(4, true, None) };
        let without = run(&how, &[&keep(&q), &keep(&k), &keep(&v)]);
        for (i, row) in without.chunks(12).take(10).enumerate() {
            let same = &with[12 * if i < 8 { i } else { i + 2 }..][..12];
            assert!(row.iter().zip(same).all(|(a, b)| (a - b).abs() < 1e-6), "{i}");
        }
    }

    /// Sequences do not see each other, and a causal token does not see what follows.
    #[test]
    fn stays_inside() {
        let [q, k, mut v] = ["q", "k", "v"].map(|n| normal(n, 13 * 12));
        let how = shape(4, true, None);
        let before = run(&how, &[&q, &k, &v]);
        v[8 * 12..9 * 12].iter_mut().for_each(|x| *x += 1.0);
        let after = run(&how, &[&q, &k, &v]);
        for (i, (a, b)) in before.chunks(12).zip(after.chunks(12)).enumerate() {
            assert_eq!(a == b, i < 8, "{i}");
        }
    }
}

//! Drawing rows: seeded, stratified, disjoint.
//!
//! The order of a pool is that of BLAKE3, keyed by seed and the pool's name, over row numbers: no
//! generator has a state, and what is drawn does not change with a library's version or the
//! number of threads. One part is taken from the front of the order, the others from its end; so
//! the front part stays the same whatever the others ask for, unless rows run short.

use anyhow::Result;

use super::Labels;
use super::labels::grouped;
use crate::source::Fault;

/// Rows of one class, in the order in which they are drawn, with their ranks in the pool.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stratum {
    /// (rank in the pool's order, row).
    rows: Vec<(u64, u64)>,
}

/// What one part got: rows of the pool, in their final order.
pub type Draw = Vec<u64>;

/// The rows of a split, in drawing order, by stratum.
#[derive(Debug, Clone)]
pub struct Pool {
    name: String,
    strata: Vec<Stratum>,
    size: usize,
}

impl Pool {
    /// A pool of `rows` rows. With labels every part holds the classes in the pool's own
    /// proportions; `shuffle` unset keeps the rows' order.
    pub fn new(name: &str, rows: usize, seed: u64, labels: Option<&Labels>, shuffle: bool) -> Self {
        let order = order(name, rows, seed, shuffle);
        let classes = labels.map_or(1, |l| l.values.len());
        let mut strata = vec![Stratum::default(); classes];
        for (rank, row) in order.into_iter().enumerate() {
            let class = labels.map_or(0, |l| l.rows[row as usize] as usize);
            strata[class].rows.push((rank as u64, row));
        }
        Self { name: name.to_owned(), strata, size: rows }
    }

    /// Draws disjoint parts: `front` rows from the front of the order, and each of `back`, one
    /// after the other, from its end.
    ///
    /// # Errors
    /// When there are not so many rows.
    pub fn draw(&self, front: usize, back: &[usize]) -> Result<(Draw, Vec<Draw>)> {
        check_size(&self.name, self.size, front, back)?;
        let sizes: Vec<usize> = self.strata.iter().map(|s| s.rows.len()).collect();
        let mut left = sizes.clone();
        let mut parts = Vec::with_capacity(back.len());
        for n in back {
            let shares = allocate(*n, &sizes, &left);
            let mut rows = Vec::with_capacity(*n);
            for ((stratum, left), share) in self.strata.iter().zip(&mut left).zip(shares) {
                rows.extend_from_slice(&stratum.rows[*left - share..*left]);
                *left -= share;
            }
            parts.push(in_order(rows));
        }
        let shares = allocate(front, &sizes, &left);
        let mut rows = Vec::with_capacity(front);
        for (stratum, share) in self.strata.iter().zip(shares) {
            rows.extend_from_slice(&stratum.rows[..share]);
        }
        Ok((in_order(rows), parts))
    }

    /// The rows outside and inside of one of `k` folds. Rows of a stratum go to the folds in turn,
    /// so that sizes, and the number of rows of a class, differ by one at most.
    ///
    /// # Errors
    /// When there are fewer rows than folds.
    pub fn folds(&self, k: usize, fold: usize) -> Result<(Draw, Draw)> {
        if self.size < k {
            let (size, name) = (self.size, &self.name);
            let message = format!("`{name}` has {size} rows, which {k} folds cannot share");
            return Err(Fault::new(message).help("ask for fewer folds").into());
        }
        let rows = self.strata.iter().flat_map(|stratum| &stratum.rows).copied().enumerate();
        let (inside, outside): (Vec<_>, Vec<_>) = rows.partition(|(at, _)| at % k == fold);
        let rows =
            |part: Vec<(usize, (u64, u64))>| in_order(part.into_iter().map(|p| p.1).collect());
        Ok((rows(outside), rows(inside)))
    }
}

/// Row numbers in the order in which they are drawn.
pub(super) fn order(name: &str, rows: usize, seed: u64, shuffle: bool) -> Vec<u64> {
    let mut order: Vec<u64> = (0..rows as u64).collect();
    if shuffle {
        let mut key = blake3::Hasher::new_derive_key("flow sample v1");
        key.update(&seed.to_le_bytes());
        key.update(name.as_bytes());
        let key = *key.finalize().as_bytes();
        // Half of the hash, for memory; the sort is stable, so rows stay in order if two agree.
        order.sort_by_cached_key(|row| {
            let mut half = [0; 16];
            half.copy_from_slice(&blake3::keyed_hash(&key, &row.to_le_bytes()).as_bytes()[..16]);
            half
        });
    }
    order
}

fn in_order(mut rows: Vec<(u64, u64)>) -> Draw {
    rows.sort_unstable();
    rows.into_iter().map(|(_, row)| row).collect()
}

/// Shares of `n` in proportion to `sizes` by largest remainder (ties to the first), none above
/// its cap. `n` is at most the sum of the caps.
fn allocate(n: usize, sizes: &[usize], caps: &[usize]) -> Vec<usize> {
    let total: u128 = sizes.iter().map(|s| *s as u128).sum();
    if total == 0 {
        return vec![0; sizes.len()];
    }
    let exact = |size: usize| n as u128 * size as u128;
    let mut shares: Vec<usize> =
        sizes.iter().map(|s| usize::try_from(exact(*s) / total).unwrap_or(n)).collect();
    let mut by_remainder: Vec<usize> = (0..sizes.len()).collect();
    by_remainder.sort_by_key(|i| (std::cmp::Reverse(exact(sizes[*i]) % total), *i));
    for (share, cap) in shares.iter_mut().zip(caps) {
        *share = (*share).min(*cap);
    }
    let mut missing = n - shares.iter().sum::<usize>();
    while missing > 0 {
        let before = missing;
        for i in &by_remainder {
            if missing > 0 && shares[*i] < caps[*i] {
                shares[*i] += 1;
                missing -= 1;
            }
        }
        if missing == before {
            break;
        }
    }
    shares
}

/// Refuses parts that are more rows together than there are.
pub(super) fn check_size(name: &str, size: usize, front: usize, back: &[usize]) -> Result<()> {
    let wanted = back.iter().fold(front, |sum, n| sum.saturating_add(*n));
    if wanted > size {
        let (wanted, size) = (grouped(wanted), grouped(size));
        let message = format!("{wanted} rows are asked of `{name}`, which has {size}");
        return Err(Fault::new(message).help("ask for fewer rows").into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use arrow::array::Int64Array;
    use proptest::prelude::*;

    use super::super::Table;
    use super::*;

    fn labels(classes: &[i64]) -> Labels {
        let column = std::sync::Arc::new(Int64Array::from(classes.to_vec()));
        let table = Table::of_columns([("label".to_owned(), column as _)]).unwrap();
        Labels::of(&table, "label").unwrap()
    }

    proptest! {
        #[test]
        fn parts_are_disjoint_whole_and_stable(
            classes in prop::collection::vec(0i64..4, 1..300),
            front in 0usize..150,
            back in prop::collection::vec(0usize..80, 0..3),
            seed: u64,
            shuffle: bool,
            stratify: bool,
        ) {
            let labels = labels(&classes);
            let labels = stratify.then_some(&labels);
            let pool = Pool::new("train", classes.len(), seed, labels, shuffle);
            let wanted = front + back.iter().sum::<usize>();
            let drawn = pool.draw(front, &back);
            if wanted > classes.len() {
                prop_assert!(drawn.is_err());
                return Ok(());
            }
            let (train, rest) = drawn.unwrap();
            prop_assert_eq!(train.len(), front);
            let all: BTreeSet<u64> = train.iter().chain(rest.iter().flatten()).copied().collect();
            prop_assert_eq!(all.len(), wanted);
            for (part, n) in rest.iter().zip(&back) {
                prop_assert_eq!(part.len(), *n);
            }
            let again = Pool::new("train", classes.len(), seed, labels, shuffle);
            prop_assert_eq!(again.draw(front, &back).unwrap(), (train, rest));
        }

        #[test]
        fn strata_keep_their_proportions(
            classes in prop::collection::vec(0i64..5, 1..300),
            share in 0.0f64..1.0,
            seed: u64,
        ) {
            let n = (classes.len() as f64 * share) as usize;
            let labels = labels(&classes);
            let pool = Pool::new("train", classes.len(), seed, Some(&labels), true);
            let (rows, _) = pool.draw(n, &[]).unwrap();
            let everything: Vec<u64> = (0..classes.len() as u64).collect();
            let counts = labels.counts(&rows);
            for (class, of) in labels.counts(&everything) {
                let exact = n as f64 * of as f64 / classes.len() as f64;
                let got = counts.get(&class).copied().unwrap_or(0) as f64;
                prop_assert!((got - exact).abs() < 1.0, "class {class}: {got} for {exact}");
            }
        }

        #[test]
        fn the_front_ignores_the_back_while_rows_last(seed: u64, a in 0usize..40, b in 0usize..40) {
            let classes: Vec<i64> = (0..200).map(|i| i64::from(i >= 90)).collect();
            let labels = labels(&classes);
            let pool = Pool::new("train", 200, seed, Some(&labels), true);
            let (x, parts) = pool.draw(100, &[a]).unwrap();
            let (y, _) = pool.draw(100, &[b]).unwrap();
            prop_assert_eq!(x, y);
            let (_, more) = pool.draw(80, &[a, b]).unwrap();
            prop_assert_eq!(&parts[0], &more[0]);
        }
    }

    proptest! {
        #[test]
        fn folds_are_a_partition_in_proportion(
            classes in prop::collection::vec(0i64..3, 20..200),
            k in 2usize..8,
            seed: u64,
        ) {
            let labels = labels(&classes);
            let pool = Pool::new("train", classes.len(), seed, Some(&labels), true);
            let everything: Vec<u64> = (0..classes.len() as u64).collect();
            let mut seen = BTreeSet::new();
            for fold in 0..k {
                let (outside, inside) = pool.folds(k, fold).unwrap();
                prop_assert_eq!(outside.len() + inside.len(), classes.len());
                let counts = labels.counts(&inside);
                for (class, of) in labels.counts(&everything) {
                    let got = counts.get(&class).copied().unwrap_or(0);
                    prop_assert!(got.abs_diff(of / k) <= 1, "class {class}: {got} of {of}");
                }
                prop_assert!(inside.iter().all(|row| seen.insert(*row)));
            }
            prop_assert_eq!(seen.len(), classes.len());
        }
    }

    /// The order is a promise: a record made by one version is reproduced by the next.
    #[test]
    fn the_order_is_the_same_in_every_version() {
        let pool = Pool::new("train", 10, 42, None, true);
        let (rows, _) = pool.draw(10, &[]).unwrap();
        assert_eq!(rows, [4, 0, 2, 3, 7, 6, 1, 5, 9, 8]);
        let other = Pool::new("train", 10, 43, None, true).draw(10, &[]).unwrap().0;
        assert_ne!(rows, other);
    }

    #[test]
    fn too_many_rows_are_refused_with_both_numbers() {
        let pool = Pool::new("train", 1500, 1, None, true);
        let e = pool.draw(1200, &[500]).unwrap_err().to_string();
        assert!(e.contains("1,700") && e.contains("1,500"), "{e}");
    }

    #[test]
    fn rounding_never_runs_out_of_a_class() {
        let labels = labels(&[0, 0, 0, 1, 1, 1]);
        let pool = Pool::new("train", 6, 7, Some(&labels), true);
        let (train, rest) = pool.draw(3, &[3]).unwrap();
        assert_eq!(train.len() + rest[0].len(), 6);
    }
}

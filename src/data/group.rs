//! Drawing whole groups of rows (all reviews of one film, all turns of one user), so that none is
//! in two parts.

use std::collections::BTreeMap;

use anyhow::Result;

use super::labels::{Labels, grouped};
use super::sample::{Draw, check_size, order};
use crate::source::Fault;

/// The rows of a split by group, in drawing order.
#[derive(Debug, Clone)]
pub struct Groups {
    name: String,
    groups: Vec<Group>,
    /// Rows of each class.
    classes: Vec<u64>,
    size: usize,
}

#[derive(Debug, Clone, Default)]
struct Group {
    /// Rows with their ranks.
    rows: Vec<(u64, u64)>,
    /// Classes with their rows.
    classes: BTreeMap<u32, u64>,
}

impl Groups {
    /// Groups of a split; `of` is the group of each row, `strata` are the classes whose
    /// proportions are kept as far as whole groups allow. A group stands where the first of its
    /// rows stands in the order of the rows, which is that of an ungrouped draw.
    pub fn new(name: &str, of: &[u32], strata: Option<&Labels>, seed: u64, shuffle: bool) -> Self {
        let count = of.iter().max().map_or(0, |most| *most as usize + 1);
        let mut places: Vec<Option<usize>> = vec![None; count];
        let mut groups: Vec<Group> = Vec::new();
        let mut classes = vec![0; strata.map_or(1, |labels| labels.values.len())];
        for (rank, row) in order(name, of.len(), seed, shuffle).into_iter().enumerate() {
            let place = &mut places[of[row as usize] as usize];
            let at = *place.get_or_insert(groups.len());
            if at == groups.len() {
                groups.push(Group::default());
            }
            let class = strata.map_or(0, |labels| labels.rows[row as usize]);
            groups[at].rows.push((rank as u64, row));
            *groups[at].classes.entry(class).or_default() += 1;
            classes[class as usize] += 1;
        }
        Self { name: name.to_owned(), groups, classes, size: of.len() }
    }

    /// Draws disjoint parts of whole groups, of at most so many rows each: `front` from the front
    /// of the order, and each of `back`, one after the other, from its end. A group that does not
    /// fit any more is passed over.
    ///
    /// # Errors
    /// When there are not so many rows, or a part would have none.
    pub fn draw(&self, front: usize, back: &[usize]) -> Result<(Draw, Vec<Draw>)> {
        check_size(&self.name, self.size, front, back)?;
        let mut free: Vec<&Group> = self.groups.iter().collect();
        let mut parts = Vec::with_capacity(back.len());
        for n in back {
            free.reverse();
            parts.push(self.part(&mut free, *n)?);
            free.reverse();
        }
        Ok((self.part(&mut free, front)?, parts))
    }

    /// First the groups by which no class gets more rows than its share, then those that bring
    /// the classes nearer to their shares, each in order.
    fn part(&self, free: &mut Vec<&Group>, n: usize) -> Result<Draw> {
        let mut rows: Vec<(u64, u64)> = Vec::with_capacity(n);
        let mut taken = vec![0; self.classes.len()];
        let all = free.iter().map(|group| group.rows.len()).sum::<usize>() <= n;
        let wanted: Vec<u64> = self.classes.iter().map(|rows| self.share(*rows, n)).collect();
        let fits = |group: &Group, taken: &[u64]| {
            group.classes.iter().all(|(class, rows)| {
                let class = *class as usize;
                taken[class] + rows <= wanted[class]
            })
        };
        let helps = |group: &Group, taken: &[u64]| {
            let nearer = group.classes.iter().map(|(class, rows)| {
                let class = *class as usize;
                let (before, after) = (taken[class], taken[class] + rows);
                wanted[class].abs_diff(before).cast_signed()
                    - wanted[class].abs_diff(after).cast_signed()
            });
            nearer.sum::<i64>() > 0
        };
        for good in [&fits as &dyn Fn(&Group, &[u64]) -> bool, &helps] {
            free.retain(|group| {
                let room = rows.len() + group.rows.len() <= n;
                let takes = room && (all || good(group, &taken));
                if takes {
                    rows.extend_from_slice(&group.rows);
                    group.classes.iter().for_each(|(class, n)| taken[*class as usize] += n);
                }
                !takes
            });
        }
        if rows.is_empty() && n > 0 {
            let (n, name) = (grouped(n), &self.name);
            let message = format!("no group of `{name}` that is left has {n} rows or fewer");
            return Err(Fault::new(message).help("ask for more rows").into());
        }
        rows.sort_unstable();
        Ok(rows.into_iter().map(|(_, row)| row).collect())
    }

    /// Of `n` rows those that a class should have which has so many of all, rounded up.
    fn share(&self, rows: u64, n: usize) -> u64 {
        let share = u128::from(rows) * n as u128;
        u64::try_from(share.div_ceil(self.size.max(1) as u128)).unwrap_or(u64::MAX)
    }

    /// The rows outside and inside of one of `k` folds: larger groups first, each to the fold that
    /// has the smallest share of the group's classes, that is the fewest rows where there is one
    /// class alone.
    ///
    /// # Errors
    /// When there are fewer groups than folds.
    pub fn folds(&self, k: usize, fold: usize) -> Result<(Draw, Draw)> {
        if self.groups.len() < k {
            let (groups, name) = (self.groups.len(), &self.name);
            let message = format!("`{name}` has {groups} groups, which {k} folds cannot share");
            return Err(Fault::new(message).help("ask for fewer folds").into());
        }
        let mut by_size: Vec<&Group> = self.groups.iter().collect();
        by_size.sort_by_key(|group| std::cmp::Reverse(group.rows.len()));
        let mut held = vec![vec![0_u64; self.classes.len()]; k];
        let mut sizes = vec![0; k];
        let (mut outside, mut inside) = (Vec::new(), Vec::new());
        for group in by_size {
            // what the sum of the squares of all shares grows by, but for what is the same in all
            let more = |at: usize| -> f64 {
                let of = group.classes.iter().map(|(class, rows)| {
                    let class = *class as usize;
                    let all = self.classes[class] as f64;
                    held[at][class] as f64 / all * (*rows as f64 / all)
                });
                of.sum()
            };
            let by = |a: &usize, b: &usize| {
                more(*a).total_cmp(&more(*b)).then(sizes[*a].cmp(&sizes[*b])).then(a.cmp(b))
            };
            let least = (0..k).min_by(by).unwrap_or(0);
            sizes[least] += group.rows.len();
            group.classes.iter().for_each(|(class, n)| held[least][*class as usize] += n);
            if least == fold { &mut inside } else { &mut outside }.extend_from_slice(&group.rows);
        }
        let ordered = |mut rows: Vec<(u64, u64)>| {
            rows.sort_unstable();
            rows.into_iter().map(|(_, row)| row).collect()
        };
        Ok((ordered(outside), ordered(inside)))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::Arc;

    use arrow::array::{Int64Array, RecordBatch};
    use proptest::prelude::*;

    use super::super::Table;
    use super::*;

    proptest! {
        #[test]
        fn groups_stay_whole(
            of in prop::collection::vec(0u32..12, 40..120),
            front in 12usize..20,
            back in 12usize..20,
            seed: u64,
            shuffle: bool,
        ) {
            let groups = Groups::new("train", &of, None, seed, shuffle);
            let Ok((train, rest)) = groups.draw(front, &[back]) else { return Ok(()) };
            prop_assert!(train.len() <= front && rest[0].len() <= back);
            let names = |rows: &Draw| {
                rows.iter().map(|r| of[*r as usize]).collect::<BTreeSet<u32>>()
            };
            let (a, b) = (names(&train), names(&rest[0]));
            prop_assert!(a.is_disjoint(&b));
            for (rows, names) in [(&train, a), (&rest[0], b)] {
                let all = of.iter().filter(|g| names.contains(g)).count();
                prop_assert_eq!(rows.len(), all);
            }
        }

        #[test]
        fn folds_are_a_partition(of in prop::collection::vec(0u32..9, 60..100), seed: u64) {
            let groups = Groups::new("train", &of, None, seed, true);
            let k = 3;
            let mut seen = BTreeSet::new();
            for fold in 0..k {
                let Ok((outside, inside)) = groups.folds(k, fold) else { return Ok(()) };
                prop_assert_eq!(outside.len() + inside.len(), of.len());
                let held: BTreeSet<u32> = inside.iter().map(|r| of[*r as usize]).collect();
                prop_assert!(outside.iter().all(|r| !held.contains(&of[*r as usize])));
                prop_assert!(inside.iter().all(|row| seen.insert(*row)));
            }
            prop_assert_eq!(seen.len(), of.len());
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let groups = Groups::new("train", &[0, 0, 0, 1, 1, 1], None, 1, true);
        assert!(groups.draw(2, &[]).unwrap_err().to_string().contains("2 rows or fewer"));
        assert!(groups.folds(3, 0).unwrap_err().to_string().contains("2 groups"));
        assert!(groups.draw(4, &[3]).unwrap_err().to_string().contains("7 rows"));
    }

    /// Groups of 1 to 6 rows of three classes, one of them rare.
    fn films() -> (Vec<u32>, Labels) {
        let (mut of, mut classes) = (Vec::new(), Vec::new());
        for film in 0..200_u32 {
            for row in 0..=film * 7 % 6 {
                of.push(film);
                let class = if film % 20 == 3 { 2 } else { (film / 2 + row / 4) % 2 };
                classes.push(i64::from(class));
            }
        }
        let column: arrow::array::ArrayRef = Arc::new(Int64Array::from(classes));
        let batch = RecordBatch::try_from_iter([("label", column)]).unwrap();
        let table = Table::new(&batch.schema(), vec![batch]).unwrap();
        (of, Labels::of(&table, "label").unwrap())
    }

    fn shares(rows: &Draw, labels: &Labels) -> Vec<f64> {
        let count = |class| rows.iter().filter(|r| labels.rows[**r as usize] == class).count();
        (0..3).map(|class| count(class) as f64 / rows.len() as f64).collect()
    }

    #[test]
    fn whole_groups_keep_the_proportions() {
        let (of, labels) = films();
        let all = shares(&(0..of.len() as u64).collect(), &labels);
        let near = |rows: &Draw, what: &str| {
            let here = shares(rows, &labels);
            let far = here.iter().zip(&all).any(|(a, b)| (a - b).abs() > 0.02);
            assert!(!far, "{what}: {here:?} of {all:?}");
        };
        for seed in 0..5 {
            let groups = Groups::new("train", &of, Some(&labels), seed, true);
            let (train, rest) = groups.draw(of.len() * 7 / 10, &[100, 50]).unwrap();
            near(&train, "train");
            near(&rest[0], "validation");
            let films = |rows: &Draw| rows.iter().map(|r| of[*r as usize]).collect::<BTreeSet<_>>();
            assert!(films(&train).is_disjoint(&films(&rest[0])));
            assert!(
                rest[0].len() > 95 && rest[1].len() > 45,
                "{} {}",
                rest[0].len(),
                rest[1].len()
            );
            for fold in 0..4 {
                let (outside, inside) = groups.folds(4, fold).unwrap();
                near(&outside, "outside");
                near(&inside, "inside");
                assert!(films(&outside).is_disjoint(&films(&inside)));
                assert!(inside.len().abs_diff(of.len() / 4) < 10, "{}", inside.len());
            }
        }
        // what is left is taken whole, whatever it is of
        let groups = Groups::new("train", &of, Some(&labels), 1, true);
        assert_eq!(groups.draw(of.len(), &[]).unwrap().0.len(), of.len());
    }
}

//! Drawing whole groups of rows (all reviews of one film, all turns of one user), so that none is
//! in two parts.

use anyhow::Result;

use super::labels::grouped;
use super::sample::{Draw, check_size, order};
use crate::source::Fault;

/// The rows of a split by group, in drawing order.
#[derive(Debug, Clone)]
pub struct Groups {
    name: String,
    /// Each group's rows with their ranks.
    groups: Vec<Vec<(u64, u64)>>,
    size: usize,
}

impl Groups {
    /// Groups of a split; `of` is the group of each row. A group stands where the first of its
    /// rows stands in the order of the rows, which is that of an ungrouped draw.
    pub fn new(name: &str, of: &[u32], seed: u64, shuffle: bool) -> Self {
        let count = of.iter().max().map_or(0, |most| *most as usize + 1);
        let mut places: Vec<Option<usize>> = vec![None; count];
        let mut groups: Vec<Vec<(u64, u64)>> = Vec::new();
        for (rank, row) in order(name, of.len(), seed, shuffle).into_iter().enumerate() {
            let place = &mut places[of[row as usize] as usize];
            let at = *place.get_or_insert(groups.len());
            if at == groups.len() {
                groups.push(Vec::new());
            }
            groups[at].push((rank as u64, row));
        }
        Self { name: name.to_owned(), groups, size: of.len() }
    }

    /// Draws disjoint parts of whole groups, of at most so many rows each: `front` from the front
    /// of the order, and each of `back`, one after the other, from its end. A group that does not
    /// fit any more is passed over.
    ///
    /// # Errors
    /// When there are not so many rows, or a part would have none.
    pub fn draw(&self, front: usize, back: &[usize]) -> Result<(Draw, Vec<Draw>)> {
        check_size(&self.name, self.size, front, back)?;
        let mut free: Vec<&Vec<(u64, u64)>> = self.groups.iter().collect();
        let mut parts = Vec::with_capacity(back.len());
        for n in back {
            free.reverse();
            parts.push(self.part(&mut free, *n)?);
            free.reverse();
        }
        Ok((self.part(&mut free, front)?, parts))
    }

    fn part(&self, free: &mut Vec<&Vec<(u64, u64)>>, n: usize) -> Result<Draw> {
        let mut rows: Vec<(u64, u64)> = Vec::with_capacity(n);
        free.retain(|group| {
            let fits = rows.len() + group.len() <= n;
            if fits {
                rows.extend_from_slice(group);
            }
            !fits
        });
        if rows.is_empty() && n > 0 {
            let (n, name) = (grouped(n), &self.name);
            let message = format!("no group of `{name}` that is left has {n} rows or fewer");
            return Err(Fault::new(message).help("ask for more rows").into());
        }
        rows.sort_unstable();
        Ok(rows.into_iter().map(|(_, row)| row).collect())
    }

    /// The rows outside and inside of one of `k` folds: larger groups first, each to the fold that
    /// has the fewest rows.
    ///
    /// # Errors
    /// When there are fewer groups than folds.
    pub fn folds(&self, k: usize, fold: usize) -> Result<(Draw, Draw)> {
        if self.groups.len() < k {
            let (groups, name) = (self.groups.len(), &self.name);
            let message = format!("`{name}` has {groups} groups, which {k} folds cannot share");
            return Err(Fault::new(message).help("ask for fewer folds").into());
        }
        let mut by_size: Vec<&Vec<(u64, u64)>> = self.groups.iter().collect();
        by_size.sort_by_key(|group| std::cmp::Reverse(group.len()));
        let mut sizes = vec![0; k];
        let (mut outside, mut inside) = (Vec::new(), Vec::new());
        for group in by_size {
            let least = (0..k).min_by_key(|at| (sizes[*at], *at)).unwrap_or(0);
            sizes[least] += group.len();
            if least == fold { &mut inside } else { &mut outside }.extend_from_slice(group);
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

    use proptest::prelude::*;

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
            let groups = Groups::new("train", &of, seed, shuffle);
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
            let groups = Groups::new("train", &of, seed, true);
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
        let groups = Groups::new("train", &[0, 0, 0, 1, 1, 1], 1, true);
        assert!(groups.draw(2, &[]).unwrap_err().to_string().contains("2 rows or fewer"));
        assert!(groups.folds(3, 0).unwrap_err().to_string().contains("2 groups"));
        assert!(groups.draw(4, &[3]).unwrap_err().to_string().contains("7 rows"));
    }
}

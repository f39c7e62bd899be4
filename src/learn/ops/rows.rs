//! Choosing rows of a matrix.

use rayon::prelude::*;

use super::Buffer;

/// Rows of a `[rows, cols]` by index (which may repeat): `[indices, cols]`.
pub(crate) fn select_rows(data: &[f32], cols: usize, indices: &[u32]) -> Buffer {
    let mut out = Buffer::new(indices.len() * cols);
    out.par_chunks_mut(cols).with_min_len(16).zip(indices).for_each(|(out, i)| {
        out.copy_from_slice(&data[*i as usize * cols..][..cols]);
    });
    out
}

/// Adds rows `[indices, cols]` to those of `into` that they were taken from, in their order; the
/// row `skip` gets nothing, as torch's `padding_idx`.
pub(crate) fn add_rows(
    rows: &[f32],
    cols: usize,
    indices: &[u32],
    skip: Option<u32>,
    into: &mut [f32],
) {
    for (i, from) in indices.iter().zip(rows.chunks_exact(cols)) {
        if Some(*i) != skip {
            let to = &mut into[*i as usize * cols..][..cols];
            to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{check, normal};
    use super::*;

    #[test]
    fn selects_and_adds() {
        let (x, indices) = (normal("x", 35), [3, 0, 3, 1, 3]);
        check(
            &[&x],
            |a| select_rows(a[0], 7, &indices).to_vec(),
            |_, g| {
                let mut dx = vec![0.0; 35];
                add_rows(g, 7, &indices, None, &mut dx);
                vec![dx]
            },
        );
    }

    #[test]
    fn skips_the_padding_row() {
        let mut into = vec![0.0; 6];
        add_rows(&normal("g", 6), 2, &[1, 2, 1], Some(1), &mut into);
        assert!(into[..4].iter().all(|x| *x == 0.0) && into[4..].iter().all(|x| *x != 0.0));
    }
}

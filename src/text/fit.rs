//! Shortening the inputs of a row until it fits.

use anyhow::Result;

use super::encode::{Encoder, Run};
use super::fast;
use super::piece::Part;

/// An input that may be shortened.
struct Input {
    run: usize,
    piece: usize,
    whole: String,
    /// Where its tokens end in it, in bytes.
    ends: Vec<usize>,
    /// How many of them are kept.
    keep: usize,
}

/// An input without its middle.
pub(super) struct Abridged {
    run: usize,
    piece: usize,
    whole: String,
    /// Where its middle was.
    head: usize,
}

/// Bytes that a token has, or less, as far as is hoped.
const TOKEN: usize = 8;
/// What is left of the end of an input: more than what tokens after it depend on.
const TAIL: usize = 256;

/// Takes the middles out of inputs that are much too long for a row of `max` tokens. What is kept
/// of them is at their beginnings, and what their ends have a part in is the tokens after them.
pub(super) fn abridge(runs: &mut [Run], max: usize) -> Vec<Abridged> {
    let mut abridged = Vec::new();
    for (run, of) in runs.iter_mut().enumerate() {
        for (piece, of) in of.pieces.iter_mut().enumerate() {
            if of.part != Part::Input || of.text.len() < 2 * (TOKEN * max + TAIL) {
                continue;
            }
            let head = fast::joint(&of.text, TOKEN * max);
            let tail = fast::joint(&of.text, of.text.len() - 2 * TAIL);
            if let (Some(head), Some(tail)) = (head, tail)
                && head < tail
                && tail + TAIL <= of.text.len()
            {
                let short = [&of.text[..head], &of.text[tail..]].concat();
                let whole = std::mem::replace(&mut of.text, short);
                abridged.push(Abridged { run, piece, whole, head });
            }
        }
    }
    abridged
}

/// Puts them back.
pub(super) fn restore(runs: &mut [Run], abridged: Vec<Abridged>) {
    for Abridged { run, piece, whole, .. } in abridged {
        runs[run].pieces[piece].text = whole;
    }
}

/// Shortens inputs at their ends until the row is within the limit or all of them are empty. The
/// longest lose first, down to a common length. Cuts are at the end of a token, on a character
/// boundary; runs are encoded again as a whole, since tokens at a seam may differ. Other inputs
/// must be whole; `false`, with nothing done, if so little is left of an abridged one that its
/// length matters.
pub(super) fn shorten(
    encoder: &Encoder,
    runs: &mut [Run],
    max: usize,
    abridged: &[Abridged],
) -> Result<bool> {
    let mut inputs = inputs(encoder, runs)?;
    for Abridged { run, piece, head, .. } in abridged {
        let input = inputs.iter().find(|input| (input.run, input.piece) == (*run, *piece));
        let sure = input.map_or(0, |input| input.ends.iter().filter(|end| *end <= head).count());
        if sure <= max {
            return Ok(false);
        }
    }
    loop {
        let over = encoder.length(runs).saturating_sub(max);
        let keeps: Vec<usize> = inputs.iter().map(|input| input.keep).collect();
        if over == 0 || keeps.iter().all(|keep| *keep == 0) {
            return Ok(true);
        }
        let mut first = runs.len();
        for (input, keep) in inputs.iter_mut().zip(levelled(&keeps, over)) {
            if keep == input.keep {
                continue;
            }
            input.keep = keep;
            let end = if keep == 0 { 0 } else { input.ends[keep - 1] };
            let text = &mut runs[input.run].pieces[input.piece].text;
            *text = input.whole[..input.whole.floor_char_boundary(end)].to_owned();
            first = first.min(input.run);
        }
        encoder.encode_runs(runs, first)?;
    }
}

fn inputs(encoder: &Encoder, runs: &[Run]) -> Result<Vec<Input>> {
    let mut found = Vec::new();
    for (at, run) in runs.iter().enumerate() {
        if run.pieces.iter().all(|piece| piece.part != Part::Input) {
            continue;
        }
        // those of a later run depend on what stands before it
        let known = (at == 0).then_some(run.ids.as_slice());
        let places = encoder.tokenizer().places_of(&run.text(), known)?;
        let mut start = 0;
        for (piece, of) in run.pieces.iter().enumerate() {
            let end = start + of.text.len();
            if of.part == Part::Input {
                let inside = places.iter().filter(|(a, b)| *b > start && *a < end);
                let ends: Vec<usize> = inside.map(|(_, to)| (*to).min(end) - start).collect();
                let (whole, keep) = (of.text.clone(), ends.len());
                found.push(Input { run: at, piece, whole, ends, keep });
            }
            start = end;
        }
    }
    Ok(found)
}

/// Lengths that are `over` less in all, the longest shortened first, down to a common length; of
/// equals the earlier ones keep one more where it does not come out even.
fn levelled(lengths: &[usize], over: usize) -> Vec<usize> {
    let room = lengths.iter().sum::<usize>().saturating_sub(over);
    let kept = |level: usize| lengths.iter().map(|n| (*n).min(level)).sum::<usize>();
    let (mut level, mut above) = (0, lengths.iter().copied().max().unwrap_or(0) + 1);
    while above - level > 1 {
        let middle = level.midpoint(above);
        if kept(middle) <= room {
            level = middle;
        } else {
            above = middle;
        }
    }
    let mut left = room - kept(level);
    let keep = lengths.iter().map(|n| {
        let more = usize::from(*n > level && left > 0);
        left -= more;
        (*n).min(level) + more
    });
    keep.collect()
}

#[cfg(test)]
mod tests {
    use super::levelled;

    #[test]
    fn long_inputs_are_levelled() {
        assert_eq!(levelled(&[10, 3, 8], 5), [7, 3, 6]);
        assert_eq!(levelled(&[10, 3, 8], 6), [6, 3, 6]);
        assert_eq!(levelled(&[10, 10], 12), [4, 4]);
        assert_eq!(levelled(&[10, 2], 4), [6, 2]);
        assert_eq!(levelled(&[3, 2], 9), [0, 0]);
        assert_eq!(levelled(&[], 9), [0; 0]);
    }
}

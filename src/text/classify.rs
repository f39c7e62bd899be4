//! Texts for sequence classification, with the tokenizer's special tokens.

use anyhow::Result;
use tokenizers::{TruncationDirection, TruncationParams, TruncationStrategy};

use super::encode::{Encoded, Encoder, Pair, Row, Truncate};
use super::tokenizer::wrong;

/// Token ids with special tokens; which text of a pair each is of.
type Whole = (Vec<u32>, Vec<u32>);

impl Encoder {
    /// Encodes a text, or two, for sequence classification, with the tokenizer's special tokens.
    ///
    /// # Errors
    /// When the tokenizer fails, or it is too long and that is to fail.
    pub fn classification(&self, texts: Pair<'_>) -> Result<Row> {
        let max = self.limits().max_length;
        let found = match self.tokenizer().is_fast() {
            true => self.classified(texts)?,
            false => self.classified_by_the_crate(texts)?,
        };
        let ((input_ids, type_ids), truncated) = match found {
            Ok(found) => found,
            Err(row) => return Ok(row),
        };
        if input_ids.len() > max {
            return self.left_over(input_ids.len());
        }
        Ok(Row::Kept(Encoded {
            positions: input_ids.len(),
            input_ids,
            labels: Vec::new(),
            type_ids: texts.1.map_or_else(Vec::new, |_| type_ids),
            truncated,
            end: None,
        }))
    }

    /// What becomes of a row that is too long; nothing if its end is cut off.
    fn refused(&self, full: usize) -> Result<Option<Row>> {
        match self.limits().truncate.unwrap_or(Truncate::Right) {
            Truncate::Error => Err(self.too_long(full)),
            Truncate::Drop => Ok(Some(Row::TooLong(full))),
            Truncate::Right | Truncate::Input => Ok(None),
        }
    }

    /// Ids first, then their ends cut off, then the special tokens: no more of a text is encoded
    /// than is kept.
    fn classified(&self, (text, pair): Pair<'_>) -> Result<Result<(Whole, bool), Row>> {
        let (max, truncate) = (self.limits().max_length, self.limits().truncate);
        let cuts = !matches!(truncate, Some(Truncate::Error | Truncate::Drop));
        // one more than is kept tells that there is more
        let limit = if cuts { max + 1 } else { usize::MAX };
        let encode = |text: &str, limit| self.tokenizer().encode_up_to(text, limit);
        let (mut first, done) = encode(text, limit)?;
        let mut second = pair.map(|pair| encode(pair, limit)).transpose()?;
        if let (Some(pair), Some((ids, pair_done))) = (pair, &second)
            && first.len().min(ids.len()) >= limit
            && (done < text.len() || *pair_done < pair.len())
        {
            // of two that are too long the longer one keeps one more where it is an odd number
            first = encode(text, usize::MAX)?.0;
            second = Some(encode(pair, usize::MAX)?);
        }
        let added = self.added(pair.is_some());
        let full = first.len() + second.as_ref().map_or(0, |(ids, _)| ids.len()) + added;
        if full > max {
            if let Some(row) = self.refused(full)? {
                return Ok(Err(row));
            }
            let second = second.as_mut().map(|(ids, _)| ids);
            shorten_longest(&mut first, second, max.saturating_sub(added));
        }
        if let (None, Some(suffix)) = (&second, self.tokenizer().suffix()) {
            let whole = [self.tokenizer().prefix(), &first, suffix].concat();
            return Ok(Ok(((whole, Vec::new()), full > max)));
        }
        let second = second.map(|(ids, _)| encoding(ids, 1));
        let whole = self.tokenizer().inner.post_process(encoding(first, 0), second, true);
        let whole = whole.map_err(wrong("adding special tokens"))?;
        Ok(Ok(((whole.get_ids().to_vec(), whole.get_type_ids().to_vec()), full > max)))
    }

    fn classified_by_the_crate(
        &self,
        (text, pair): Pair<'_>,
    ) -> Result<Result<(Whole, bool), Row>> {
        let inner = &self.tokenizer().inner;
        let whole = match pair {
            Some(pair) => inner.encode_fast((text, pair), true),
            None => inner.encode_fast(text, true),
        };
        let mut whole = whole.map_err(wrong("encoding"))?;
        let full = whole.len();
        let truncated = full > self.limits().max_length;
        if truncated {
            if let Some(row) = self.refused(full)? {
                return Ok(Err(row));
            }
            whole = self.truncated(text, pair)?;
        }
        Ok(Ok(((whole.get_ids().to_vec(), whole.get_type_ids().to_vec()), truncated)))
    }

    /// Special tokens that are added to a text, or two.
    fn added(&self, pair: bool) -> usize {
        let post_processor = self.tokenizer().inner.get_post_processor();
        post_processor.map_or(0, |p| tokenizers::PostProcessor::added_tokens(p, pair))
    }

    /// As transformers does with `truncation=True`: the longest text loses its end first, the
    /// special tokens stay.
    fn truncated(&self, text: &str, pair: Option<&str>) -> Result<tokenizers::Encoding> {
        let inner = &self.tokenizer().inner;
        let one = |text: &str| inner.encode_fast(text, false).map_err(wrong("encoding"));
        let room = self.limits().max_length.saturating_sub(self.added(pair.is_some()));
        let params = TruncationParams {
            direction: TruncationDirection::Right,
            max_length: room,
            strategy: TruncationStrategy::LongestFirst,
            stride: 0,
        };
        let (first, second) = (one(text)?, pair.map(one).transpose()?);
        let cut = tokenizers::utils::truncation::truncate_encodings(first, second, &params);
        let (mut first, mut second) = cut.map_err(|e| anyhow::anyhow!("truncating: {e}"))?;
        // what was cut off stays attached, and every two such parts would be joined to a row
        first.take_overflowing();
        if let Some(second) = &mut second {
            second.take_overflowing();
        }
        inner.post_process(first, second, true).map_err(wrong("adding special tokens"))
    }
}

/// Ids as the library has them between its model and its post-processor, which looks at nothing
/// else.
fn encoding(ids: Vec<u32>, of: u32) -> tokenizers::Encoding {
    let n = ids.len();
    let (types, tokens, words) = (vec![of; n], vec![String::new(); n], vec![None; n]);
    let (places, special, attention) = (vec![(0, 0); n], vec![0; n], vec![1; n]);
    let (more, ranges) = (Vec::new(), Default::default());
    tokenizers::Encoding::new(ids, types, tokens, words, places, special, attention, more, ranges)
}

/// As transformers does with `truncation=True`: the longest text loses its end first.
fn shorten_longest(first: &mut Vec<u32>, second: Option<&mut Vec<u32>>, room: usize) {
    let Some(second) = second else { return first.truncate(room) };
    let swapped = first.len() > second.len();
    let (short, long) = if swapped { (second, first) } else { (first, second) };
    let mut keep = (short.len(), room.saturating_sub(short.len()).max(short.len()));
    // not even equal shares fit
    if keep.0 + keep.1 > room {
        keep = (room / 2, room / 2 + room % 2);
    }
    short.truncate(keep.0);
    long.truncate(keep.1);
}

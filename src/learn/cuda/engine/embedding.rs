//! The embeddings, forward and backward.

use anyhow::Result;

use super::{State, Table, Uploaded};
use crate::learn::batch::Packed;
use crate::learn::cuda::device::{Grid, Mat, int};
use crate::learn::cuda::pass::{Moments, Pass};

impl State {
    /// The first layer's input; for an encoder with what the norm's backward needs.
    pub(super) fn embed(
        &self,
        p: &Pass<'_>,
        u: &Uploaded,
        x: Mat,
    ) -> Result<Option<(Mat, Moments)>> {
        let e = &self.embeddings;
        let (places, kinds) = match &e.encoder {
            Some((places, kinds, ..)) => (places.at, kinds.map_or(0, |k| k.at)),
            None => (0, 0),
        };
        let sum = if e.encoder.is_some() { p.saved(self.hidden)? } else { x };
        let args = [
            u.ids,
            e.words.at,
            u.positions,
            places,
            u.types,
            kinds,
            sum.at,
            int(sum.ld),
            int(self.hidden),
            int(p.tokens),
        ];
        self.device.launch(self.device.kernels.embed, Grid::rows(p.tokens, self.hidden), &args)?;
        let Some((_, _, norm, drop)) = &e.encoder else { return Ok(None) };
        let moments = p.moments(p.tokens, norm)?;
        p.layer_norm(norm, (sum, None, sum, x), moments, self.hidden)?;
        p.drop_elements(drop, (x, x), (p.tokens, self.hidden))?;
        Ok(Some((sum, moments)))
    }

    /// Adds the gradients of the embeddings' tables, from that of the first layer's input.
    pub(super) fn embed_backward(
        &self,
        p: &Pass<'_>,
        packed: &Packed,
        kept: Option<(Mat, Moments)>,
        g: Mat,
    ) -> Result<()> {
        let e = &self.embeddings;
        if let (Some((places, kinds, norm, drop)), Some((sum, moments))) = (&e.encoder, kept) {
            p.drop_elements(drop, (g, g), (p.tokens, self.hidden))?;
            p.layer_norm_backward(norm, (sum, g, g), moments, self.hidden)?;
            self.table_gradient(places, &packed.positions, None, g)?;
            if let Some(kinds) = kinds {
                self.table_gradient(kinds, &packed.types, None, g)?;
            }
        }
        self.table_gradient(&e.words, &packed.ids, self.pad, g)
    }

    pub(super) fn table_gradient(
        &self,
        table: &Table,
        ids: &[u32],
        but: Option<u32>,
        g: Mat,
    ) -> Result<()> {
        let Some(gradient) = table.gradient else { return Ok(()) };
        let kept = (0..ids.len() as u32).filter(|i| Some(ids[*i as usize]) != but);
        let mut sorted: Vec<u32> = kept.collect();
        sorted.sort_by_key(|i| ids[*i as usize]);
        let (mut starts, mut distinct) = (Vec::new(), Vec::new());
        for (at, i) in sorted.iter().enumerate() {
            let id = ids[*i as usize];
            if distinct.last() != Some(&id) {
                distinct.push(id);
                starts.push(at as u32);
            }
        }
        if distinct.is_empty() {
            return Ok(());
        }
        starts.push(sorted.len() as u32);
        let mark = self.scratch.mark();
        let put = |values: &[u32]| -> Result<u64> {
            let at = self.scratch.alloc(4 * values.len())?;
            self.device.upload(at, values)?;
            Ok(at)
        };
        let args = [
            g.at,
            int(g.ld),
            put(&sorted)?,
            put(&starts)?,
            put(&distinct)?,
            gradient,
            int(self.hidden),
        ];
        let grid = Grid::blocks(distinct.len(), 256);
        self.device.launch(self.device.kernels.embed_backward, grid, &args)?;
        self.scratch.release(mark);
        Ok(())
    }
}

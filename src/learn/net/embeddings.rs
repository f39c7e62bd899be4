//! The first block: from token ids to vectors.

use anyhow::{Result, ensure};
use candle_core::Tensor;

use super::norm::LayerNorm;
use crate::learn::batch::Packed;
use crate::learn::buffer::Buffer;
use crate::learn::config::ModelConfig;
use crate::learn::gradients::Gradients;
use crate::learn::layout::WORD;
use crate::learn::linear::{Dropout, Parameters, Pass};
use crate::learn::ops::{Kept, add, add_rows, select_rows, with_slices};

#[derive(Debug)]
pub(super) struct Embeddings {
    word: Tensor,
    /// A row of the word table that gets no gradient, as torch's `padding_idx`.
    pad: Option<u32>,
    encoder: Option<Encoder>,
}

/// What the backward pass reads again.
pub(in crate::learn) struct SavedEmbeddings {
    sum: Buffer,
    kept: Option<Kept>,
}

/// What encoders do beyond looking up words.
#[derive(Debug)]
struct Encoder {
    position: Tensor,
    token_type: Option<Tensor>,
    norm: LayerNorm,
    drop: Dropout,
}

fn look_up(table: &Tensor, ids: &[u32]) -> Result<Buffer> {
    let (rows, cols) = table.dims2()?;
    if let Some(id) = ids.iter().find(|i| **i as usize >= rows) {
        anyhow::bail!("row {id} of an embedding of {rows}");
    }
    Ok(with_slices([table], |[table]| select_rows(table, cols, ids))?)
}

impl Embeddings {
    pub(super) fn new(c: &ModelConfig, p: &Parameters) -> Result<Self> {
        if c.is_decoder() {
            return Ok(Self { word: p.tensor(WORD)?, pad: c.pad, encoder: None });
        }
        let prefix = c.family.prefix();
        let table = |name: &str| p.tensor(&format!("{prefix}.embeddings.{name}_embeddings.weight"));
        let encoder = Encoder {
            position: table("position")?,
            token_type: (c.type_vocab > 0).then(|| table("token_type")).transpose()?,
            norm: LayerNorm::new(p, &format!("{prefix}.embeddings.LayerNorm"), c.eps)?,
            drop: p.dropout("embeddings", c.hidden_dropout),
        };
        Ok(Self { word: table("word")?, pad: c.pad, encoder: Some(encoder) })
    }

    /// Whether anything in it is trained.
    pub(super) fn trains(&self) -> bool {
        let encoder = self.encoder.as_ref().is_some_and(|e| {
            let types = e.token_type.as_ref().is_some_and(Tensor::track_op);
            e.position.track_op() || types || e.norm.trains()
        });
        self.word.track_op() || encoder
    }

    /// `[tokens, hidden]`, and what the backward pass reads again.
    pub(super) fn forward(
        &self,
        batch: &Packed,
        pass: Pass<'_>,
    ) -> Result<(Buffer, Option<SavedEmbeddings>)> {
        let mut x = look_up(&self.word, &batch.ids)?;
        let Some(e) = &self.encoder else { return Ok((x, None)) };
        add(&mut x, &look_up(&e.position, &batch.positions)?);
        if let Some(types) = &e.token_type {
            add(&mut x, &look_up(types, &batch.types)?);
        }
        let mut out = e.norm.forward(&x)?;
        let cols = e.norm.width();
        let kept = e.drop.draw((out.len() / cols, cols), pass);
        kept.iter().for_each(|kept| kept.apply(&mut out));
        Ok((out, Some(SavedEmbeddings { sum: x, kept })))
    }

    /// Gradients of the tables from that of the result.
    pub(super) fn backward(
        &self,
        batch: &Packed,
        saved: Option<SavedEmbeddings>,
        mut grad: Buffer,
        gradients: &mut Gradients,
    ) -> Result<()> {
        let mut tables = vec![(&self.word, &batch.ids, self.pad)];
        if let Some((e, SavedEmbeddings { sum, kept })) = self.encoder.as_ref().zip(saved) {
            kept.iter().for_each(|kept| kept.apply(&mut grad));
            e.norm.backward(&sum, &mut grad, gradients)?;
            tables.push((&e.position, &batch.positions, None));
            tables.extend(e.token_type.as_ref().map(|types| (types, &batch.types, None)));
        }
        for (table, ids, skip) in tables {
            if table.track_op() {
                let (_, cols) = table.dims2()?;
                ensure!(grad.len() == ids.len() * cols, "a gradient of another size");
                add_rows(&grad, cols, ids, skip, gradients.sum_from_zero(table));
            }
        }
        Ok(())
    }
}

//! What the layers of one forward or backward pass share, and the operations between products.

use anyhow::Result;

use super::arena::Arena;
use super::attention::Attention;
use super::device::{Device, Grid, Kernel, Mat, float, int};
use super::projection::{Behind, Projection, Shared};
use crate::learn::linear::{Dropout, Mode};

/// One pass over packed sequences.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pass<'a> {
    pub(super) device: &'a Device,
    pub(super) shared: &'a Shared,
    /// What the backward needs, layer upon layer.
    pub(super) saved: &'a Arena,
    /// What is gone at the end of a layer.
    pub(super) scratch: &'a Arena,
    pub(super) tokens: usize,
    pub(super) sequences: usize,
    /// Tokens of the longest sequence.
    pub(super) longest: usize,
    /// Where each sequence begins, and the number of tokens.
    pub(super) starts: u64,
    /// Keys that a token does not see; 0: none.
    pub(super) hidden: u64,
    /// Each token's position in its sequence.
    pub(super) positions: u64,
    /// Cosines and sines by position.
    pub(super) rope: Option<(u64, u64)>,
    /// Decides what is dropped.
    pub(super) mode: Mode,
}

/// A norm's weight and bias, and their gradients where they are trained.
#[derive(Debug, Clone, Copy)]
pub(super) struct Norm {
    pub(super) weight: u64,
    /// 0 for a root-mean-square norm.
    pub(super) bias: u64,
    pub(super) weight_gradient: Option<u64>,
    pub(super) bias_gradient: Option<u64>,
    pub(super) eps: f64,
}

/// A norm's statistics of each row.
#[derive(Debug, Clone, Copy)]
pub(super) struct Moments {
    /// 0 for a root-mean-square norm.
    pub(super) mean: u64,
    pub(super) rstd: u64,
}

/// What the adapters of a projection leave for the backward.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ranks {
    /// Their ranks of the input.
    pub(super) z: Mat,
    /// What their masks keep, see [`Projection::kept_bytes`]; 0 where it is not kept as bits.
    pub(super) kept: u64,
}

impl Device {
    /// Adds, over `rows` rows, the sums of the columns of `g` to a bias's gradient, and of
    /// `g (x - mean) rstd` to a norm weight's; rows hold `group` vectors of `width` side by side.
    pub(super) fn column_sums(
        &self,
        scratch: &Arena,
        (x, g): (Mat, Mat),
        moments: Option<Moments>,
        (weight, bias): (Option<u64>, Option<u64>),
        (rows, width): (usize, usize),
        group: usize,
    ) -> Result<()> {
        let mark = scratch.mark();
        // Fixed, so that sums do not depend on the card.
        let block = rows.div_ceil(128).max(16);
        let blocks = rows.div_ceil(block);
        let part = |wanted: Option<u64>| match wanted {
            Some(_) => scratch.alloc(4 * blocks * width),
            None => Ok(0),
        };
        let (weights, biases) = (part(weight)?, part(bias)?);
        let x = if weight.is_some() { x } else { Mat { at: 0, ld: 0 } };
        let m = moments.unwrap_or(Moments { mean: 0, rstd: 0 });
        let args = [
            x.at,
            int(x.ld),
            m.mean,
            m.rstd,
            g.at,
            int(g.ld),
            weights,
            biases,
            int(width),
            int(rows),
            int(group),
            int(block),
        ];
        let grid = Grid { blocks: (width.div_ceil(128), blocks, 1), threads: (128, 1), shared: 0 };
        self.launch(self.kernels.column_sums, grid, &args)?;
        for (parts, sum) in [(weights, weight), (biases, bias)] {
            if let Some(sum) = sum {
                let args = [parts, sum, int(width), int(blocks)];
                self.launch(self.kernels.add_parts, Grid::each(width), &args)?;
            }
        }
        scratch.release(mark);
        Ok(())
    }
}

impl Pass<'_> {
    fn mat(&self, arena: &Arena, rows: usize, ld: usize) -> Result<Mat> {
        Ok(Mat { at: arena.alloc(rows * ld * self.device.float.size())?, ld })
    }

    /// A matrix of a row for each token, for this layer only.
    pub(super) fn scratch(&self, ld: usize) -> Result<Mat> {
        self.mat(self.scratch, self.tokens, ld)
    }

    /// A matrix of a row for each token, for the backward.
    pub(super) fn saved(&self, ld: usize) -> Result<Mat> {
        self.mat(self.saved, self.tokens, ld)
    }

    /// A matrix of so many rows, for this layer only.
    pub(super) fn scratch_rows(&self, rows: usize, ld: usize) -> Result<Mat> {
        self.mat(self.scratch, rows, ld)
    }

    /// Room for a norm's statistics of so many rows, for the backward.
    pub(super) fn moments(&self, rows: usize, norm: &Norm) -> Result<Moments> {
        let column = || self.saved.alloc(4 * rows);
        Ok(Moments { mean: if norm.bias == 0 { 0 } else { column()? }, rstd: column()? })
    }

    /// The part of a matrix from a column on.
    pub(super) fn columns(&self, mat: Mat, from: usize) -> Mat {
        self.device.part(mat, 0, from)
    }

    /// The root-mean-square norm of rows of `width`.
    pub(super) fn rms_norm(
        &self,
        norm: &Norm,
        (x, out): (Mat, Mat),
        rstd: u64,
        (rows, width): (usize, usize),
    ) -> Result<()> {
        let args = [
            x.at,
            int(x.ld),
            norm.weight,
            out.at,
            int(out.ld),
            rstd,
            int(width),
            int(rows),
            float(norm.eps),
        ];
        self.device.launch(self.device.kernels.rms_norm, Grid::rows(rows, width), &args)
    }

    /// Its gradient: `dx = plus + ...` from the gradient `g` of the result, and those of what is
    /// trained. `dx` may be `g` or `plus`.
    pub(super) fn rms_norm_backward(
        &self,
        norm: &Norm,
        (x, g, plus, dx): (Mat, Mat, Option<Mat>, Mat),
        rstd: u64,
        (rows, width): (usize, usize),
    ) -> Result<()> {
        let moments = Moments { mean: 0, rstd };
        self.norm_gradients(norm, (x, g), moments, (rows, width, 1))?;
        let plus = plus.unwrap_or(Mat { at: 0, ld: 0 });
        let args = [
            x.at,
            int(x.ld),
            norm.weight,
            rstd,
            g.at,
            int(g.ld),
            plus.at,
            int(plus.ld),
            dx.at,
            int(dx.ld),
            int(width),
            int(rows),
        ];
        self.device.launch(self.device.kernels.rms_norm_backward, Grid::rows(rows, width), &args)
    }

    /// The gradients of a norm's weight and bias, where they are trained.
    pub(super) fn norm_gradients(
        &self,
        norm: &Norm,
        (x, g): (Mat, Mat),
        moments: Moments,
        (rows, width, group): (usize, usize, usize),
    ) -> Result<()> {
        if norm.weight_gradient.is_none() && norm.bias_gradient.is_none() {
            return Ok(());
        }
        let sums = (norm.weight_gradient, norm.bias_gradient);
        let size = (rows * group, width);
        self.device.column_sums(self.scratch, (x, g), Some(moments), sums, size, group)
    }

    /// `sum = x + plus`, `out` its layer norm.
    pub(super) fn layer_norm(
        &self,
        norm: &Norm,
        (x, plus, sum, out): (Mat, Option<Mat>, Mat, Mat),
        moments: Moments,
        width: usize,
    ) -> Result<()> {
        let plus = plus.unwrap_or(Mat { at: 0, ld: 0 });
        let args = [
            x.at,
            int(x.ld),
            plus.at,
            int(plus.ld),
            norm.weight,
            norm.bias,
            sum.at,
            int(sum.ld),
            out.at,
            int(out.ld),
            moments.mean,
            moments.rstd,
            int(width),
            int(self.tokens),
            float(norm.eps),
        ];
        let grid = Grid::rows(self.tokens, width);
        self.device.launch(self.device.kernels.layer_norm, grid, &args)
    }

    /// Its gradient from the gradient `g` of the result, and those of what is trained.
    pub(super) fn layer_norm_backward(
        &self,
        norm: &Norm,
        (sum, g, dx): (Mat, Mat, Mat),
        moments: Moments,
        width: usize,
    ) -> Result<()> {
        self.norm_gradients(norm, (sum, g), moments, (self.tokens, width, 1))?;
        let args = [
            sum.at,
            int(sum.ld),
            norm.weight,
            moments.mean,
            moments.rstd,
            g.at,
            int(g.ld),
            dx.at,
            int(dx.ld),
            int(width),
            int(self.tokens),
        ];
        let grid = Grid::rows(self.tokens, width);
        self.device.launch(self.device.kernels.layer_norm_backward, grid, &args)
    }

    /// Turns `heads` heads of every token in place by its position; `sign` -1 turns back.
    pub(super) fn rotate(&self, x: Mat, heads: usize, head: usize, sign: f64) -> Result<()> {
        let Some((cosines, sines)) = self.rope else { return Ok(()) };
        let args = [
            x.at,
            int(x.ld),
            self.positions,
            cosines,
            sines,
            int(heads),
            int(head),
            int(self.tokens),
            float(sign),
        ];
        let grid = Grid::each(self.tokens * heads * head / 16);
        self.device.launch(self.device.kernels.rope, grid, &args)
    }

    /// `out`: the heads of queries and keys of `x`, each behind its norm and turned by its
    /// position.
    pub(super) fn norm_heads(
        &self,
        a: &Attention,
        (query, key): &(Norm, Norm),
        (x, out): (Mat, Mat),
        (of_query, of_key): (Moments, Moments),
    ) -> Result<()> {
        let (cosines, sines) = self.rope.unwrap_or((0, 0));
        let (grid, lanes) = self.each_head(a);
        let args = [
            x.at,
            int(x.ld),
            query.weight,
            key.weight,
            out.at,
            int(out.ld),
            of_query.rstd,
            of_key.rstd,
            self.positions,
            cosines,
            sines,
            int(a.heads),
            int(a.kv_heads),
            int(a.head),
            int(self.tokens),
            int(lanes),
            float(query.eps),
        ];
        self.device.launch(self.device.kernels.norm_heads, grid, &args)
    }

    /// Its gradient, in the place `d` of that of the result; and those of the norms, where they
    /// are trained.
    pub(super) fn norm_heads_backward(
        &self,
        a: &Attention,
        (query, key): &(Norm, Norm),
        (x, d): (Mat, Mat),
        (of_query, of_key): (Moments, Moments),
    ) -> Result<()> {
        let (mut cosines, mut sines) = self.rope.unwrap_or((0, 0));
        if query.weight_gradient.is_some() || key.weight_gradient.is_some() {
            self.rotate(d, a.heads + a.kv_heads, a.head, -1.0)?;
            (cosines, sines) = (0, 0);
            let queries = a.widths().0;
            let size = |heads| (self.tokens, a.head, heads);
            self.norm_gradients(query, (x, d), of_query, size(a.heads))?;
            let mats = (self.columns(x, queries), self.columns(d, queries));
            self.norm_gradients(key, mats, of_key, size(a.kv_heads))?;
        }
        let (grid, lanes) = self.each_head(a);
        let args = [
            x.at,
            int(x.ld),
            query.weight,
            key.weight,
            of_query.rstd,
            of_key.rstd,
            d.at,
            int(d.ld),
            self.positions,
            cosines,
            sines,
            int(a.heads),
            int(a.kv_heads),
            int(a.head),
            int(self.tokens),
            int(lanes),
        ];
        self.device.launch(self.device.kernels.norm_heads_backward, grid, &args)
    }

    /// A launch of so many threads, a power of two, for each head of queries and keys: each has 8
    /// elements of either half.
    fn each_head(&self, a: &Attention) -> (Grid, usize) {
        let lanes = (a.head / 16).next_power_of_two();
        (Grid::each(self.tokens * (a.heads + a.kv_heads) * lanes), lanes)
    }

    /// `out` from `x` elementwise (`swiglu`, `gelu`), `width` elements a row.
    pub(super) fn map(&self, kernel: Kernel, (x, out): (Mat, Mat), width: usize) -> Result<()> {
        let args = [x.at, int(x.ld), out.at, int(out.ld), int(width), int(self.tokens)];
        self.device.launch(kernel, Grid::each(self.tokens * width / 8), &args)
    }

    /// `dx` from `x` and the gradient `g` of what [`Pass::map`] gives, and that again if wanted.
    pub(super) fn map_backward(
        &self,
        kernel: Kernel,
        (x, g, dx, again): (Mat, Mat, Mat, Option<Mat>),
        width: usize,
    ) -> Result<()> {
        let again = again.unwrap_or(Mat { at: 0, ld: 0 });
        let args = [
            x.at,
            int(x.ld),
            g.at,
            int(g.ld),
            dx.at,
            int(dx.ld),
            again.at,
            int(again.ld),
            int(width),
            int(self.tokens),
        ];
        self.device.launch(kernel, Grid::each(self.tokens * width / 8), &args)
    }

    /// Copies rows: `to[i] = from[index[i]]`, or (back) `to[index[i]] = from[i]`.
    pub(super) fn pick(
        &self,
        (from, to): (Mat, Mat),
        index: u64,
        (rows, width): (usize, usize),
        back: bool,
    ) -> Result<()> {
        let args = [
            from.at,
            int(from.ld),
            index,
            to.at,
            int(to.ld),
            int(width),
            int(rows),
            int(usize::from(back)),
        ];
        self.device.launch(self.device.kernels.pick, Grid::rows(rows, width), &args)
    }

    /// Whether a place drops anything in this pass.
    pub(super) fn drops(&self, place: &Dropout) -> bool {
        place.mask(self.mode).is_some()
    }

    /// `to = mask from`, if the place drops anything in this pass.
    pub(super) fn drop_elements(
        &self,
        place: &Dropout,
        (from, to): (Mat, Mat),
        (rows, width): (usize, usize),
    ) -> Result<()> {
        match place.mask(self.mode) {
            Some(mask) => self.device.drop_elements(mask, (from, to), (rows, width), false),
            None => Ok(()),
        }
    }

    /// See [`Projection::forward`].
    pub(super) fn project(
        &self,
        projection: &Projection,
        x: Mat,
        y: Mat,
        plus: Option<Mat>,
        rows: usize,
    ) -> Result<Ranks> {
        let ranks = self.ranks(projection, x, rows)?;
        let mats = (x, y, plus, ranks.kept);
        projection.forward(self.device, self.shared, self.scratch, mats, rows, self.mode)?;
        Ok(ranks)
    }

    /// Room for the ranks of an input.
    fn ranks(&self, projection: &Projection, x: Mat, rows: usize) -> Result<Ranks> {
        let kept = match projection.kept_bytes(rows, self.mode) {
            0 => 0,
            bytes => self.saved.alloc(bytes)?,
        };
        Ok(Ranks { z: projection.ranks_in(self.device, x), kept })
    }

    /// See [`Projection::input_gradient`].
    pub(super) fn input_gradient(
        &self,
        (projection, ranks): (&Projection, Ranks),
        g: Mat,
        dx: Mat,
        plus: Option<Mat>,
        rows: usize,
    ) -> Result<()> {
        let mats = (g, dx, plus, ranks.kept);
        projection.input_gradient(self.device, self.shared, self.scratch, mats, rows, self.mode)
    }

    /// See [`Projection::only_ranks`].
    pub(super) fn only_ranks(&self, projection: &Projection, g: Mat, rows: usize) -> Result<()> {
        projection.only_ranks(self.device, self.scratch, g, rows)
    }

    /// See [`Projection::fill_ranks`].
    pub(super) fn fill_ranks(&self, projection: &Projection, x: Mat, rows: usize) -> Result<Ranks> {
        let ranks = self.ranks(projection, x, rows)?;
        let mats = (x, ranks.kept);
        projection.fill_ranks(self.device, self.scratch, mats, rows, self.mode)?;
        Ok(ranks)
    }

    /// The ranks of an input apart from it, for a backward that will have the rest of it again.
    pub(super) fn keep_ranks(&self, projection: &Projection, ranks: Ranks) -> Result<Ranks> {
        let width = projection.ranks;
        if width == 0 {
            return Ok(ranks);
        }
        let (from, to) = (ranks.z, self.saved(width)?);
        let args = [from.at, int(from.ld), to.at, int(to.ld), int(width), int(self.tokens)];
        let grid = Grid::each(self.tokens * width / 8);
        self.device.launch(self.device.kernels.copy_columns, grid, &args)?;
        Ok(Ranks { z: to, ..ranks })
    }

    /// See [`Projection::parameter_gradients`].
    pub(super) fn parameter_gradients(
        &self,
        projection: &Projection,
        (x, ranks): (Mat, Ranks),
        g: Mat,
        rows: usize,
    ) -> Result<()> {
        let mats = (x, ranks.z, g, ranks.kept);
        let (device, scratch) = (self.device, self.scratch);
        projection.parameter_gradients(device, scratch, mats, None, rows, self.mode)
    }

    /// The same behind a root-mean-square norm, from what that read.
    pub(super) fn gradients_behind(
        &self,
        projection: &Projection,
        norm: &Norm,
        (x, moments, ranks): (Mat, Moments, Ranks),
        g: Mat,
    ) -> Result<()> {
        let (device, scratch, rows) = (self.device, self.scratch, self.tokens);
        let mats = |x| (x, ranks.z, g, ranks.kept);
        if projection.norms_input() {
            let behind = Some(Behind { weight: norm.weight, rstd: moments.rstd });
            return projection.parameter_gradients(
                device,
                scratch,
                mats(x),
                behind,
                rows,
                self.mode,
            );
        }
        let h = self.scratch(projection.inputs)?;
        self.rms_norm(norm, (x, h), moments.rstd, (rows, projection.inputs))?;
        projection.parameter_gradients(device, scratch, mats(h), None, rows, self.mode)
    }
}

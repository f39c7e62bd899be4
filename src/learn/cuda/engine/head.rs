//! What lies behind the last layer: features, logits, losses.

use anyhow::{Result, bail, ensure};

use super::{Head, LOGITS, State, Table};
use crate::learn::batch::Packed;
use crate::learn::cuda::device::{Float, Grid, LOSS_ROOM, Mat, SHARERS, float, int};
use crate::learn::cuda::matmul::Target;
use crate::learn::cuda::pass::{Pass, Ranks};
use crate::learn::linear::Mode;

impl State {
    /// Rows of one block of logits.
    fn block(&self) -> usize {
        (LOGITS / 4 / self.vocab).max(1024)
    }

    /// The losses of the targets, and in `g` the gradient of the last layer's result, if that is
    /// wanted (`below`); adds the gradients of what is trained above it.
    pub(super) fn loss(
        &self,
        p: &Pass<'_>,
        x: Mat,
        (rows, targets, n): (u64, u64, usize),
        scale: f64,
        (losses, g): (u64, Mat),
        below: bool,
    ) -> Result<()> {
        let mark = p.scratch.mark();
        let d = self.hidden;
        let chosen = match &self.head {
            Head::Classes { dense, .. } => p.scratch_rows(n, dense.in_ld())?,
            _ => p.scratch_rows(n, d)?,
        };
        p.pick((x, chosen), rows, (n, d), false)?;
        let d_chosen = p.scratch_rows(n, d)?;
        match &self.head {
            Head::Decoder { norm, table } => {
                let features = p.scratch_rows(n, d)?;
                let d_features = p.scratch_rows(n, d)?;
                let rstd = p.scratch.alloc(4 * n)?;
                p.rms_norm(norm, (chosen, features), rstd, (n, d))?;
                let block = self.block().min(n);
                let ld = self.vocab.next_multiple_of(8);
                let logits = Mat { at: p.scratch.alloc(4 * block * ld)?, ld };
                // Their gradients take the place of the logits.
                let d_logits = Mat { at: logits.at, ld: ld * 4 / self.device.float.size() };
                for start in (0..n).step_by(block) {
                    let m = block.min(n - start);
                    let from = |mat| self.device.part(mat, start, 0);
                    let (x, dx) = (from(features), from(d_features));
                    self.logits_of(x, *table, logits, m)?;
                    let at = |base: u64| base + 4 * start as u64;
                    self.cross_entropy(
                        logits,
                        (at(targets), at(losses)),
                        d_logits,
                        (m, self.vocab),
                        scale,
                    )?;
                    let w = Mat { at: table.at, ld: d };
                    let target = Target {
                        to: dx,
                        float: self.device.float,
                        plus: None,
                        bias: None,
                        alpha: 1.0,
                    };
                    self.device.matmul((m, d, self.vocab), d_logits.n(), w.n(), target)?;
                    if let Some(gradient) = table.gradient {
                        let to = Mat { at: gradient, ld: d };
                        let sum = Target {
                            to,
                            float: Float::F32,
                            plus: Some(to),
                            bias: None,
                            alpha: 1.0,
                        };
                        self.device.matmul((self.vocab, d, m), d_logits.t(), x.n(), sum)?;
                    }
                }
                let mats = (chosen, d_features, None, d_chosen);
                p.rms_norm_backward(norm, mats, rstd, (n, d))?;
            }
            Head::Classes { dense, tanh, drop, classifier } => {
                let classes = classifier.outputs;
                let Classified { active, dropped, ranks, below, logits } =
                    self.classes(p, chosen, n)?;
                let d_logits = p.scratch_rows(n, classifier.out_ld().next_multiple_of(8))?;
                let size = (n, classes);
                self.cross_entropy(logits, (targets, losses), d_logits, size, scale)?;
                let d_y = p.scratch_rows(n, dense.out_ld())?;
                p.input_gradient((classifier, below), d_logits, d_y, None, n)?;
                p.parameter_gradients(classifier, (dropped, below), d_logits, n)?;
                p.drop_elements(drop, (d_y, d_y), (n, d))?;
                let tanh = int(usize::from(*tanh));
                let args = [active.at, d_y.at, int(d_y.ld), int(d), int(n), tanh];
                let kernel = self.device.kernels.activate_backward;
                self.device.launch(kernel, Grid::each(n * d), &args)?;
                p.input_gradient((dense, ranks), d_y, d_chosen, None, n)?;
                p.parameter_gradients(dense, (chosen, ranks), d_y, n)?;
            }
            Head::Bare => bail!("the model has no head"),
        }
        if below {
            self.device.zero(g.at, p.tokens * g.ld * self.device.float.size())?;
            p.pick((d_chosen, g), rows, (n, d), true)?;
        }
        p.scratch.release(mark);
        Ok(())
    }

    fn logits_of(&self, x: Mat, table: Table, logits: Mat, rows: usize) -> Result<()> {
        let w = Mat { at: table.at, ld: self.hidden };
        let target = Target { to: logits, float: Float::F32, plus: None, bias: None, alpha: 1.0 };
        self.device.matmul((rows, self.vocab, self.hidden), x.n(), w.t(), target)
    }

    /// Losses, and the gradients of the logits unless `d_logits.at` is 0.
    fn cross_entropy(
        &self,
        logits: Mat,
        (targets, losses): (u64, u64),
        d_logits: Mat,
        (rows, classes): (usize, usize),
        scale: f64,
    ) -> Result<()> {
        if let (Some(kernels), true) = (self.device.shared_loss, d_logits.at != 0) {
            let each = |sharers: usize| classes.div_ceil(sharers).next_multiple_of(4);
            let fits = |(sharers, _): &(usize, _)| 4 * each(*sharers) <= LOSS_ROOM;
            let found = SHARERS.into_iter().zip(kernels).find(fits);
            let suits = classes > 1024 && logits.ld.is_multiple_of(4);
            if let Some((sharers, kernel)) = found.filter(|_| suits) {
                let each = each(sharers);
                let args = [
                    logits.at,
                    int(logits.ld),
                    targets,
                    losses,
                    d_logits.at,
                    int(d_logits.ld),
                    int(classes),
                    int(each),
                    float(scale),
                ];
                let blocks = (sharers * rows, 1, 1);
                let grid = Grid { blocks, threads: (512, 1), shared: 4 * each };
                return self.device.launch(kernel, grid, &args);
            }
        }
        let args = [
            logits.at,
            int(logits.ld),
            targets,
            losses,
            d_logits.at,
            int(d_logits.ld),
            int(classes),
            float(scale),
        ];
        let grid = Grid::blocks(rows, if classes > 1024 { 512 } else { 32 });
        self.device.launch(self.device.kernels.cross_entropy, grid, &args)
    }

    /// The classifier's logits for chosen rows.
    fn classes(&self, p: &Pass<'_>, chosen: Mat, n: usize) -> Result<Classified> {
        let Head::Classes { dense, tanh, drop, classifier } = &self.head else {
            bail!("the model is not a classifier")
        };
        let d = dense.outputs;
        let y = p.scratch_rows(n, d)?;
        let ranks = p.project(dense, chosen, y, None, n)?;
        let args = [y.at, y.at, int(n * d), int(usize::from(*tanh))];
        self.device.launch(self.device.kernels.activate, Grid::each(n * d), &args)?;
        let mut dropped = y;
        if p.drops(drop) || classifier.ranks > 0 {
            ensure!(classifier.ranks == 0, "an adapter on the classifier");
            dropped = p.scratch_rows(n, d)?;
            p.drop_elements(drop, (y, dropped), (n, d))?;
        }
        let classes = classifier.outputs;
        let part = p.scratch_rows(n, classes.next_multiple_of(8))?;
        let below = p.project(classifier, dropped, part, None, n)?;
        let logits = Mat { at: p.scratch.alloc(4 * n * classes)?, ld: classes };
        self.widen(part, logits, n)?;
        Ok(Classified { active: y, dropped, ranks, below, logits })
    }

    /// Copies a few numbers to f32.
    fn widen(&self, from: Mat, to: Mat, rows: usize) -> Result<()> {
        let args = [from.at, int(from.ld), to.at, int(to.ld), int(to.ld), int(rows)];
        self.device.launch(self.device.kernels.widen, Grid::each(rows * to.ld), &args)
    }

    /// Without dropout: the losses of targets, or the logits of rows.
    pub(super) fn evaluate(
        &mut self,
        packed: &Packed,
        rows: &[u32],
        targets: Option<&[u32]>,
    ) -> Result<Vec<f32>> {
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        let rope = self.rope(packed.positions.iter().max().map_or(0, |p| *p as usize + 1))?;
        let (s, r) = (self.saved.mark(), self.scratch.mark());
        let (u, [rows_at, targets_at]) = self.upload(packed, [rows, targets.unwrap_or(&[])])?;
        let p = self.pass(packed, &u, rope, Mode::Eval);
        let (n, d, ld) = (rows.len(), self.hidden, self.input_ld());
        let (mut x, mut y) = (p.saved(ld)?, p.saved(ld)?);
        self.embed(&p, &u, x)?;
        for i in 0..self.count() {
            let mark = self.saved.mark();
            self.forward(&p, i, x, Some(y))?;
            self.saved.release(mark);
            (x, y) = (y, x);
        }
        let result = match &self.head {
            Head::Decoder { norm, table } => {
                let chosen = p.scratch_rows(n, d)?;
                p.pick((x, chosen), rows_at, (n, d), false)?;
                p.rms_norm(norm, (chosen, chosen), 0, (n, d))?;
                let block = self.block().min(n);
                let logits = Mat { at: p.scratch.alloc(4 * block * self.vocab)?, ld: self.vocab };
                let losses = p.scratch.alloc(4 * block)?;
                let mut out = Vec::new();
                for start in (0..n).step_by(block) {
                    let m = block.min(n - start);
                    self.logits_of(self.device.part(chosen, start, 0), *table, logits, m)?;
                    if targets.is_some() {
                        let at = targets_at + 4 * start as u64;
                        let none = Mat { at: 0, ld: 0 };
                        self.cross_entropy(logits, (at, losses), none, (m, self.vocab), 1.0)?;
                        out.extend(self.device.download::<f32>(losses, m)?);
                    } else {
                        out.extend(self.device.download::<f32>(logits.at, m * self.vocab)?);
                    }
                }
                out
            }
            Head::Classes { dense, classifier, .. } => {
                let chosen = p.scratch_rows(n, dense.in_ld())?;
                p.pick((x, chosen), rows_at, (n, d), false)?;
                let Classified { logits, .. } = self.classes(&p, chosen, n)?;
                let classes = classifier.outputs;
                if targets.is_some() {
                    let losses = p.scratch.alloc(4 * n)?;
                    let none = Mat { at: 0, ld: 0 };
                    self.cross_entropy(logits, (targets_at, losses), none, (n, classes), 1.0)?;
                    self.device.download(losses, n)?
                } else {
                    self.device.download(logits.at, n * classes)?
                }
            }
            Head::Bare => bail!("the model has no head"),
        };
        self.saved.release(s);
        self.scratch.release(r);
        Ok(result)
    }
}

/// What the classifier reads and gives.
struct Classified {
    /// Behind the activation.
    active: Mat,
    /// The same behind dropout.
    dropped: Mat,
    /// Of the dense layer's input.
    ranks: Ranks,
    /// Of the classifier's.
    below: Ranks,
    logits: Mat,
}

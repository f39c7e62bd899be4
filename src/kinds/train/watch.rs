//! How training looks from outside: progress, curves, evaluations.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use anyhow::Result;

use super::{Train, loading};
use crate::artifact::TokensSplit;
use crate::learn::{self, Checkpoint, Measure, Observer, RowReader, StepLog, Task};
use crate::step::Context;

/// Reports progress and evaluates.
pub(super) struct Watch<'a, 'c> {
    cx: &'a Context<'c>,
    task: &'a Task,
    validation: Option<TokensSplit>,
    candidates: Option<Vec<Vec<u32>>>,
    batch_size: usize,
    pub(super) tokens: u64,
    pub(super) rows: u64,
    pub(super) seconds: f64,
    last: Instant,
    saved: Instant,
    steps: u64,
    message: String,
}

impl<'a, 'c> Watch<'a, 'c> {
    pub(super) fn new(
        cx: &'a Context<'c>,
        task: &'a Task,
        validation: Option<TokensSplit>,
        step: &Train,
    ) -> Self {
        // Comparing candidates costs time, so it is done only where it decides.
        let candidates = validation
            .as_ref()
            .filter(|_| step.by_class())
            .map(|split| split.info.candidates.iter().map(|c| c.ids.clone()).collect::<Vec<_>>());
        Self {
            cx,
            task,
            validation,
            candidates: candidates.filter(|c| !c.is_empty()),
            batch_size: usize::try_from(step.eval_batch_size).unwrap_or(usize::MAX),
            tokens: 0,
            rows: 0,
            seconds: 0.0,
            last: Instant::now(),
            saved: Instant::now(),
            steps: 0,
            message: String::new(),
        }
    }
}

impl Watch<'_, '_> {
    /// What an earlier attempt left to go on from.
    pub(super) fn checkpoint(&self, model: &learn::Model) -> Option<Checkpoint> {
        match Checkpoint::open(&self.cx.resume()?, model) {
            Ok(checkpoint) => {
                self.cx.log(format!("resumes: after step {}", checkpoint.steps()));
                Some(checkpoint)
            }
            Err(e) => {
                self.cx.log(format!("starts over: the checkpoint is of no use, {e:#}"));
                None
            }
        }
    }
}

impl Observer for Watch<'_, '_> {
    fn step(&mut self, log: &StepLog, steps: u64) -> Result<()> {
        self.seconds += self.last.elapsed().as_secs_f64();
        self.last = Instant::now();
        self.tokens += log.tokens;
        self.rows += log.rows;
        self.steps = steps;
        let rate = (self.tokens as f64 / self.seconds.max(1e-9)).round() as u64;
        self.message = format!("loss {:.3}  {} tok/s", log.loss, loading::grouped(rate));
        self.cx.progress(log.step, steps, "steps", self.message.clone());
        self.cx.metric("train/loss", log.step, log.loss);
        self.cx.metric("train/learning_rate", log.step, log.learning_rate);
        self.cx.metric("train/grad_norm", log.step, log.grad_norm);
        Ok(())
    }

    fn between(&mut self, save: &mut dyn FnMut(&Path) -> Result<()>) -> Result<()> {
        if self.cx.cancelled() || self.saved.elapsed() >= self.cx.checkpoint_every {
            let dir = self.cx.scratch_dir()?.join("checkpoint");
            std::fs::create_dir(&dir)?;
            save(&dir)?;
            self.cx.checkpoint(&dir)?;
            (self.saved, self.last) = (Instant::now(), Instant::now());
        }
        self.cx.stop()
    }

    fn evaluate(
        &mut self,
        model: &learn::Model,
        step: u64,
    ) -> Result<Option<BTreeMap<String, f64>>> {
        let Some(split) = &self.validation else { return Ok(None) };
        let measure = match (self.task, &self.candidates) {
            (Task::SequenceClassification { classes }, _) => Measure::Classes(*classes),
            (Task::CausalLm, Some(candidates)) => Measure::Candidates(candidates),
            (Task::CausalLm, None) => Measure::Likelihood,
        };
        let all = split.info.rows;
        let mut reader = RowReader::open(&split.rows)?;
        let scores = learn::score(model, &mut reader, self.batch_size, measure, &mut |_, n| {
            let message = format!("{}  evaluating {n}/{all}", self.message);
            self.cx.progress(step, self.steps, "steps", message);
            self.cx.stop()
        })?;
        for (name, value) in &scores.metrics {
            if !matches!(name.as_str(), "n" | "majority" | "target_tokens") {
                self.cx.metric(&format!("eval/{name}"), step, *value);
            }
        }
        self.last = Instant::now();
        Ok(Some(scores.metrics))
    }
}

//! The training loop.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::batch::Batch;
use super::checkpoint::{self, Checkpoint};
use super::gate::GradientGate;
use super::model::Model;
use super::optimizer::{AdamWConfig, clip_factor};
use super::random::Stream;
use super::rows::{Row, collate};
use super::schedule::{LearningRate, Schedule, warmup_steps};
use super::setup::Task;
use super::update::{Gradients, Optimizer};
use crate::source::{Fault, suggest};

/// How long to train.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Duration {
    /// So many passes over the rows.
    Epochs(u64),
    /// So many updates.
    Steps(u64),
}

/// How long the rate rises.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Warmup {
    /// So many updates.
    Steps(u64),
    /// This share of all updates, rounded up.
    Ratio(f64),
}

/// By which metric of the evaluations the best weights are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Best {
    /// Name of the metric, like `loss` or `accuracy`.
    pub metric: String,
    /// Whether more is better.
    pub maximize: bool,
}

/// How to train; the words are those of transformers' `TrainingArguments`.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainingArguments {
    /// Epochs or steps.
    pub duration: Duration,
    /// Rows of a micro-batch.
    pub batch_size: usize,
    /// Micro-batches of an update. Their losses are summed and divided by the targets of all of
    /// them, so that 4 of 2 rows are the same as 1 of 8.
    pub gradient_accumulation: usize,
    /// Rate at the end of warm-up.
    pub learning_rate: f64,
    /// From there on.
    pub schedule: Schedule,
    /// Before that.
    pub warmup: Warmup,
    /// Constants of the optimizer.
    pub optimizer: AdamWConfig,
    /// Gradients are scaled so that their global norm is at most this; `None` leaves them.
    pub max_grad_norm: Option<f64>,
    /// Whether rows are drawn in a new random order in every epoch.
    pub shuffle: bool,
    /// Seeds the order (and, through the model's setup, initial values and dropout).
    pub seed: u64,
    /// Keeps the best weights by evaluation; `None` keeps the last.
    pub best: Option<Best>,
}

/// One update.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepLog {
    /// From 1.
    pub step: u64,
    /// Epochs done, with the fraction of the current one.
    pub epoch: f64,
    /// Mean loss per target, before the update.
    pub loss: f64,
    /// Rate of the update.
    pub learning_rate: f64,
    /// Global norm of the gradients, before clipping.
    pub grad_norm: f64,
    /// Rows of the update.
    pub rows: u64,
    /// Tokens of the update, padding not counted.
    pub tokens: u64,
}

/// One evaluation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvaluationLog {
    /// Updates done.
    pub step: u64,
    /// Epochs done.
    pub epoch: f64,
    /// By name.
    pub metrics: BTreeMap<String, f64>,
}

/// What training did. Holds no times, so that equal runs give equal values.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct History {
    /// Every update.
    pub steps: Vec<StepLog>,
    /// Every evaluation.
    pub evaluations: Vec<EvaluationLog>,
    /// The step whose weights were kept, where the best are kept.
    pub best_step: Option<u64>,
}

/// Watches training and evaluates on its behalf.
pub trait Observer {
    /// After every update, of so many in all. An error ends training.
    ///
    /// # Errors
    /// To end training.
    fn step(&mut self, log: &StepLog, steps: u64) -> Result<()>;

    /// Between two updates: the place to call `save` with an empty folder, which then holds what
    /// [`resume`] needs, and to end training so that it can go on later.
    ///
    /// # Errors
    /// To end training, or when `save` fails.
    fn between(&mut self, save: &mut dyn FnMut(&Path) -> Result<()>) -> Result<()> {
        let _ = save;
        Ok(())
    }

    /// Evaluates after an epoch and at the end; `None` if there is nothing to evaluate on.
    ///
    /// # Errors
    /// When the evaluation fails.
    fn evaluate(&mut self, model: &Model, step: u64) -> Result<Option<BTreeMap<String, f64>>>;
}

/// Where each epoch's updates take their rows from.
struct Plan {
    rows: usize,
    batch_size: usize,
    accumulation: usize,
    per_epoch: u64,
    steps: u64,
}

impl Plan {
    fn new(args: &TrainingArguments, rows: usize) -> Result<Self> {
        ensure!(rows > 0, "there are no rows to train on");
        ensure!(
            args.batch_size > 0 && args.gradient_accumulation > 0,
            "batch size and gradient accumulation are at least 1"
        );
        let per_update = args.batch_size.saturating_mul(args.gradient_accumulation);
        let per_epoch = rows.div_ceil(per_update) as u64;
        let steps = match args.duration {
            Duration::Epochs(n) => n.saturating_mul(per_epoch),
            Duration::Steps(n) => n,
        };
        ensure!(steps > 0, "there is nothing to do: 0 epochs or steps");
        let (batch_size, accumulation) = (args.batch_size, args.gradient_accumulation);
        Ok(Self { rows, batch_size, accumulation, per_epoch, steps })
    }

    /// Rows in the order of an epoch.
    fn order(&self, args: &TrainingArguments, epoch: u64) -> Vec<usize> {
        if args.shuffle {
            Stream::new(args.seed, "order").at(epoch).permutation(self.rows)
        } else {
            (0..self.rows).collect()
        }
    }

    /// The rows of an update of an epoch, by micro-batch.
    fn micro_batches<'a>(&self, order: &'a [usize], update: u64) -> Vec<&'a [usize]> {
        let size = self.batch_size * self.accumulation;
        let start = update as usize * size;
        let end = (start + size).min(order.len());
        order[start..end].chunks(self.batch_size).collect()
    }
}

/// Trains a model in place.
///
/// # Errors
/// When a row does not fit the model or the task, a loss or a gradient is not finite, the
/// [gradient gate](GradientGate) fails, or the observer ends it.
pub fn train(
    model: &Model,
    task: &Task,
    rows: &[Row],
    args: &TrainingArguments,
    observer: &mut dyn Observer,
) -> Result<History> {
    go_on(State::new(model, args)?, model, task, rows, args, observer)
}

/// Goes on with a training from a checkpoint that an [`Observer`] had written, to the same bytes
/// as without the stop. The model is as it was before the first update; task, rows and arguments
/// are the same.
///
/// # Errors
/// As [`train`].
pub fn resume(
    checkpoint: Checkpoint,
    model: &Model,
    task: &Task,
    rows: &[Row],
    args: &TrainingArguments,
    observer: &mut dyn Observer,
) -> Result<History> {
    let mut state = State::new(model, args)?;
    checkpoint.load(&mut state, model)?;
    go_on(state, model, task, rows, args, observer)
}

/// Everything that changes from update to update, beside the weights.
pub(super) struct State {
    pub(super) optimizer: Optimizer,
    pub(super) gate: GradientGate,
    pub(super) kept: Kept,
    pub(super) history: History,
    /// Micro-batches so far.
    pub(super) micro: u64,
}

impl State {
    fn new(model: &Model, args: &TrainingArguments) -> Result<Self> {
        Ok(Self {
            optimizer: Optimizer::new(model, args.optimizer),
            gate: GradientGate::new(model.trainable())?,
            kept: Kept::new(args.best.clone()),
            history: History { steps: Vec::new(), evaluations: Vec::new(), best_step: None },
            micro: 0,
        })
    }

    /// Updates done.
    fn steps(&self) -> u64 {
        self.history.steps.len() as u64
    }

    /// Evaluates if an epoch, or all, is done and that has not been looked at.
    fn evaluate(&mut self, plan: &Plan, model: &Model, observer: &mut dyn Observer) -> Result<()> {
        let Some(StepLog { step, epoch, .. }) = self.history.steps.last().cloned() else {
            return Ok(());
        };
        let due = step % plan.per_epoch == 0 || step == plan.steps;
        let looked_at = self.history.evaluations.last().is_some_and(|e| e.step == step);
        if due
            && !looked_at
            && let Some(metrics) = observer.evaluate(model, step)?
        {
            self.kept.offer(model, step, &metrics)?;
            self.history.evaluations.push(EvaluationLog { step, epoch, metrics });
        }
        Ok(())
    }
}

fn go_on(
    mut state: State,
    model: &Model,
    task: &Task,
    rows: &[Row],
    args: &TrainingArguments,
    observer: &mut dyn Observer,
) -> Result<History> {
    let plan = Plan::new(args, rows.len())?;
    let warmup = match args.warmup {
        Warmup::Steps(n) => n,
        Warmup::Ratio(ratio) => warmup_steps(ratio, plan.steps),
    };
    let (peak, schedule) = (args.learning_rate, args.schedule);
    let rate = LearningRate { peak, schedule, warmup, total: plan.steps };
    // A stop may have come between an update and its evaluation.
    state.evaluate(&plan, model, observer)?;
    let first = state.steps();
    let mut order = Vec::new();
    for step in first..plan.steps {
        let update = step % plan.per_epoch;
        if update == 0 || step == first {
            order = plan.order(args, step / plan.per_epoch);
        }
        let chosen = plan.micro_batches(&order, update);
        let sum = accumulate(model, task, rows, &chosen, &mut state.micro)
            .with_context(|| format!("in step {}", step + 1))?;
        let grad_norm = sum.gradients.global_norm()?;
        let finite = sum.loss.is_finite() && grad_norm.is_finite();
        if !finite {
            return Err(diverged(step + 1, sum.loss, grad_norm, &chosen).into());
        }
        if !state.gate.is_done() {
            sum.gradients.pass(&mut state.gate)?;
        }
        let scale = args.max_grad_norm.map_or(1.0, |max| clip_factor(grad_norm, max));
        let learning_rate = rate.at(step);
        state.optimizer.update(model, &sum.gradients, learning_rate, scale)?;
        if !state.gate.is_done() {
            model.fetch()?;
            state.gate.updated(model.trainable(), learning_rate)?;
        }
        let log = StepLog {
            step: step + 1,
            epoch: (step + 1) as f64 / plan.per_epoch as f64,
            loss: sum.loss,
            learning_rate,
            grad_norm,
            rows: sum.rows,
            tokens: sum.tokens,
        };
        observer.step(&log, plan.steps)?;
        state.history.steps.push(log);
        observer.between(&mut |dir| {
            model.fetch()?;
            checkpoint::save(&state, model, dir)
        })?;
        state.evaluate(&plan, model, observer)?;
    }
    model.fetch()?;
    state.gate.finish(model.trainable())?;
    let State { kept, mut history, .. } = state;
    history.best_step = kept.restore(model)?;
    Ok(history)
}

struct Sum<'a> {
    /// Mean loss per target.
    loss: f64,
    gradients: Gradients<'a>,
    rows: u64,
    tokens: u64,
}

/// Loss and gradients of all micro-batches of an update, over all of their targets.
fn accumulate<'a>(
    model: &'a Model,
    task: &Task,
    rows: &[Row],
    chosen: &[&[usize]],
    micro: &mut u64,
) -> Result<Sum<'a>> {
    let batches = chosen.iter().map(|ids| {
        let refs: Vec<&Row> = ids.iter().map(|i| &rows[*i]).collect();
        collate(&refs, task)
    });
    let batches: Vec<Batch> = batches.collect::<Result<_>>()?;
    let targets: usize = batches.iter().map(Batch::targets).sum();
    ensure!(targets > 0, "no row of it has a target token");
    let denominator = targets as f64;
    let (mut loss, mut tokens) = (0.0, 0);
    let mut gradients = Gradients::new(model);
    for batch in &batches {
        loss += gradients.add(model, batch, *micro, denominator)?;
        *micro += 1;
        tokens += batch.lengths.iter().sum::<usize>() as u64;
    }
    let rows = batches.iter().map(|b| b.size as u64).sum();
    Ok(Sum { loss: loss / denominator, gradients, rows, tokens })
}

fn diverged(step: u64, loss: f64, grad_norm: f64, chosen: &[&[usize]]) -> Fault {
    let ids: Vec<String> = chosen.concat().iter().take(32).map(usize::to_string).collect();
    let what = if loss.is_finite() { "gradient norm" } else { "loss" };
    let value = if loss.is_finite() { grad_norm } else { loss };
    let rows = ids.join(", ");
    Fault::new(format!("the {what} is {value} in step {step} (rows {rows})"))
        .help("lower the learning rate, set max_grad_norm, or look at those rows")
}

/// The best weights so far.
pub(super) struct Kept {
    best: Option<Best>,
    /// Value, step and weights.
    pub(super) found: Option<(f64, u64, BTreeMap<String, Tensor>)>,
    /// The last step that was offered.
    pub(super) last: u64,
}

impl Kept {
    fn new(best: Option<Best>) -> Self {
        Self { best, found: None, last: 0 }
    }

    fn offer(&mut self, model: &Model, step: u64, metrics: &BTreeMap<String, f64>) -> Result<()> {
        let Some(best) = &self.best else { return Ok(()) };
        self.last = step;
        let Some(&value) = metrics.get(&best.metric) else {
            let known: Vec<&str> = metrics.keys().map(String::as_str).collect();
            let fault = Fault::new(format!("the evaluation has no metric `{}`", best.metric));
            let help = suggest(&best.metric, &known).unwrap_or_default();
            return Err(fault.help(help).into());
        };
        model.fetch()?;
        let better = self
            .found
            .as_ref()
            .is_none_or(|(found, ..)| if best.maximize { value > *found } else { value < *found });
        if better && value.is_finite() {
            let copies = model
                .trainable()
                .iter()
                .map(|(name, var)| Ok((name.clone(), var.as_tensor().detach().copy()?)));
            self.found = Some((value, step, copies.collect::<Result<_>>()?));
        }
        Ok(())
    }

    fn restore(self, model: &Model) -> Result<Option<u64>> {
        let Some((_, step, copies)) = self.found else {
            let Some(best) = self.best.filter(|_| self.last > 0) else { return Ok(None) };
            let fault = Fault::new(format!("`{}` was finite in no evaluation", best.metric));
            return Err(fault.help("lower the learning rate, or choose by another metric").into());
        };
        if step != self.last {
            for (name, var) in model.trainable() {
                let copy = copies.get(name).with_context(|| format!("`{name}` was not kept"))?;
                var.set(copy)?;
            }
            model.put()?;
        }
        Ok(Some(step))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments() -> TrainingArguments {
        TrainingArguments {
            duration: Duration::Epochs(2),
            batch_size: 2,
            gradient_accumulation: 2,
            learning_rate: 0.1,
            schedule: Schedule::Linear,
            warmup: Warmup::Steps(0),
            optimizer: AdamWConfig::default(),
            max_grad_norm: None,
            shuffle: true,
            seed: 3,
            best: None,
        }
    }

    #[test]
    fn an_epoch_takes_every_row_once() {
        let args = arguments();
        let plan = Plan::new(&args, 11).unwrap();
        assert_eq!((plan.per_epoch, plan.steps), (3, 6));
        let order = plan.order(&args, 0);
        let mut taken: Vec<usize> =
            (0..3).flat_map(|u| plan.micro_batches(&order, u)).flatten().copied().collect();
        let sizes: Vec<usize> = plan.micro_batches(&order, 2).iter().map(|m| m.len()).collect();
        assert_eq!(sizes, [2, 1]);
        assert_ne!(order, plan.order(&args, 1));
        assert_eq!(order, plan.order(&args, 0));
        taken.sort_unstable();
        assert_eq!(taken, (0..11).collect::<Vec<_>>());
    }

    #[test]
    fn nothing_to_do_is_an_error() {
        assert!(Plan::new(&arguments(), 0).is_err());
        let none = TrainingArguments { duration: Duration::Epochs(0), ..arguments() };
        assert!(Plan::new(&none, 4).is_err());
        let steps = TrainingArguments { duration: Duration::Steps(7), ..arguments() };
        assert_eq!(Plan::new(&steps, 4).unwrap().steps, 7);
    }
}

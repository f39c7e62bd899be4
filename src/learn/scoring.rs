//! Evaluation of a model over a stream of rows; memory does not grow with their number.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};

use super::batch::Labels;
use super::metrics::Confusion;
use super::model::Model;
use super::rows::{Row, collate};
use super::setup::Task;
use crate::source::Fault;

/// What is measured.
#[derive(Debug, Clone, Copy)]
pub enum Measure<'a> {
    /// Classes by the model's classification head.
    Classes(usize),
    /// The same where the rows count the classes in another order than the model: for each class
    /// of the rows the model's.
    ClassesAs(&'a [usize]),
    /// Likelihood of the labelled tokens: loss and perplexity.
    Likelihood,
    /// The same, and the class whose words are likeliest after the prompt; candidates are the
    /// tokens of each class's words in class order.
    Candidates(&'a [Vec<u32>]),
}

/// What the model said about one row.
#[derive(Debug, Clone, PartialEq)]
pub struct Prediction {
    /// Position of the row in the stream.
    pub row: u64,
    /// True class.
    pub label: u32,
    /// The class it chose.
    pub predicted: u32,
    /// Probability of that class: softmax over the classes' logits, or over the candidates'
    /// total log-likelihoods.
    pub score: f64,
}

/// The result of an evaluation.
#[derive(Debug, Clone, PartialEq)]
pub struct Scores {
    /// `loss` (mean negative log-likelihood per row or target token, in nats), `n` (rows), and by
    /// measure `perplexity` (exp of the loss, but at most the largest f64), `target_tokens` and
    /// what [`Confusion::metrics`] gives. All are finite.
    pub metrics: BTreeMap<String, f64>,
    /// Counts of (true, predicted), where there are classes.
    pub confusion: Option<Confusion>,
}

/// Index of the largest value; of equal ones the first, so that ties go to the lower class.
fn argmax(values: &[f64]) -> usize {
    let mut best = 0;
    for (i, v) in values.iter().enumerate() {
        if *v > values[best] {
            best = i;
        }
    }
    best
}

/// `log(sum(exp))`, from the largest down.
fn log_sum_exp(values: &[f64]) -> f64 {
    let top = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if top.is_infinite() {
        return top;
    }
    top + values.iter().map(|v| (v - top).exp()).sum::<f64>().ln()
}

struct Sums {
    rows: u64,
    loss: f64,
    targets: u64,
}

/// Scores a model on rows, `batch_size` at a time. `seen` is called after each batch with its
/// predictions (none without classes) and the number of rows so far; an error from it ends the
/// evaluation.
///
/// Candidates are compared by the total log-likelihood of their tokens, end of sequence included:
/// each is a complete answer, so totals are probabilities of whole answers and candidates of
/// unequal length compare without normalisation. Ties go to the lower class.
///
/// # Errors
/// When a row lacks its label or does not fit the model, or what the model says about one is not a
/// finite number.
pub fn score(
    model: &Model,
    rows: &mut dyn Iterator<Item = Result<Row>>,
    batch_size: usize,
    measure: Measure<'_>,
    seen: &mut dyn FnMut(&[Prediction], u64) -> Result<()>,
) -> Result<Scores> {
    let classes = match measure {
        Measure::Classes(n) => Some(n),
        Measure::ClassesAs(order) => Some(order.len()),
        Measure::Candidates(c) => Some(c.len()),
        Measure::Likelihood => None,
    };
    let same: Vec<usize> = (0..classes.unwrap_or_default()).collect();
    let mut confusion = classes.map(Confusion::new);
    let mut sums = Sums { rows: 0, loss: 0.0, targets: 0 };
    loop {
        let batch: Vec<Row> = rows.take(batch_size.max(1)).collect::<Result<_>>()?;
        if batch.is_empty() {
            break;
        }
        let first = sums.rows;
        let mut predictions = match measure {
            Measure::Classes(_) => classify(model, &batch, &same, &mut sums)?,
            Measure::ClassesAs(order) => classify(model, &batch, order, &mut sums)?,
            Measure::Candidates(c) => choose(model, &batch, c, &mut sums)?,
            Measure::Likelihood => {
                likelihood(model, &batch, &mut sums)?;
                Vec::new()
            }
        };
        sums.rows += batch.len() as u64;
        for (prediction, row) in predictions.iter_mut().zip(first..) {
            prediction.row = row;
            if let Some(confusion) = &mut confusion {
                confusion.add(prediction.label as usize, prediction.predicted as usize)?;
            }
        }
        seen(&predictions, sums.rows)?;
    }
    ensure!(sums.rows > 0, "there are no rows to evaluate");
    let mut metrics = confusion.as_ref().map(Confusion::metrics).unwrap_or_default();
    metrics.insert("n".into(), sums.rows as f64);
    if sums.targets > 0 {
        let loss = sums.loss / sums.targets as f64;
        metrics.insert("loss".into(), loss);
        if !matches!(measure, Measure::Classes(_) | Measure::ClassesAs(_)) {
            metrics.insert("perplexity".into(), perplexity(loss));
            metrics.insert("target_tokens".into(), sums.targets as f64);
        }
    }
    Ok(Scores { metrics, confusion })
}

/// exp(loss), but finite: a report in JSON has no infinity, and what is this bad stays the worst.
fn perplexity(loss: f64) -> f64 {
    loss.exp().min(f64::MAX)
}

/// `x` of a row, which must be a number.
fn finite(x: f64, what: &str, row: u64) -> Result<f64> {
    if x.is_finite() {
        return Ok(x);
    }
    let fault = Fault::new(format!("{what} of row {row} is {x}"));
    let help = "weights of the model are not finite numbers, or so large that its activations \
                are not: look at how it was trained, and try a lower learning rate";
    Err(fault.help(help).into())
}

fn classify(
    model: &Model,
    rows: &[Row],
    order: &[usize],
    sums: &mut Sums,
) -> Result<Vec<Prediction>> {
    let refs: Vec<&Row> = rows.iter().collect();
    let batch = collate(&refs, &Task::SequenceClassification { classes: order.len() })?;
    let logits = model.logits(&batch)?.to_vec2::<f32>()?;
    let Labels::Classes(labels) = &batch.labels else { return Ok(Vec::new()) };
    let mut out = Vec::with_capacity(rows.len());
    for ((logits, &label), row) in logits.iter().zip(labels).zip(sums.rows..) {
        let logits = order.iter().map(|class| {
            let logit = logits.get(*class).context("the model has too few classes")?;
            finite(f64::from(*logit), "a logit", row)
        });
        let logits: Vec<f64> = logits.collect::<Result<_>>()?;
        let all = log_sum_exp(&logits);
        let truth = logits.get(label as usize).context("the model has too few classes")?;
        sums.loss += all - truth;
        sums.targets += 1;
        out.push(predict(label, &logits, all));
    }
    Ok(out)
}

fn predict(label: u32, values: &[f64], all: f64) -> Prediction {
    let best = argmax(values);
    let score = (values[best] - all).exp();
    Prediction { row: 0, label, predicted: best as u32, score }
}

fn likelihood(model: &Model, rows: &[Row], sums: &mut Sums) -> Result<()> {
    let refs: Vec<&Row> = rows.iter().collect();
    let numbers: Vec<u64> = (sums.rows..).take(rows.len()).collect();
    likelihoods(model, &refs, &numbers, sums)
}

/// Rows, and which they are in the stream.
fn likelihoods(model: &Model, rows: &[&Row], numbers: &[u64], sums: &mut Sums) -> Result<()> {
    let scored = model.target_log_probs(&collate(rows, &Task::CausalLm)?)?;
    for ((log_prob, n), row) in scored.into_iter().zip(numbers) {
        sums.loss -= finite(log_prob, "the likelihood", *row)?;
        sums.targets += n as u64;
    }
    Ok(())
}

fn choose(
    model: &Model,
    rows: &[Row],
    candidates: &[Vec<u32>],
    sums: &mut Sums,
) -> Result<Vec<Prediction>> {
    let prompts: Vec<&[u32]> = rows.iter().map(Row::prompt).collect();
    if let Some((_, row)) = prompts.iter().zip(sums.rows..).find(|(prompt, _)| prompt.is_empty()) {
        let fault = Fault::new(format!("row {row} has no prompt for the candidates to follow"));
        return Err(fault.help("label only what comes after a prompt, in the format step").into());
    }
    let totals = model.answer_log_probs(&prompts, candidates)?;
    for (total, row) in totals.iter().zip(sums.rows..) {
        for log_prob in total {
            finite(*log_prob, "the likelihood of a candidate", row)?;
        }
    }
    let (mut others, mut numbers) = (Vec::new(), Vec::new());
    let mut out = Vec::with_capacity(rows.len());
    for ((row, total), number) in rows.iter().zip(&totals).zip(sums.rows..) {
        let label = row.class.context("a row has no `label`")?;
        let own = candidates.get(label as usize);
        let own = own.with_context(|| format!("label {label} has no candidate"))?;
        // The row's own answer is usually one of the candidates, and then it is scored already.
        if row.ids[row.prompt().len()..] == own[..] {
            sums.loss -= total[label as usize];
            sums.targets += own.len() as u64;
        } else {
            others.push(row);
            numbers.push(number);
        }
        out.push(predict(label, total, log_sum_exp(total)));
    }
    if !others.is_empty() {
        likelihoods(model, &others, &numbers, sums)?;
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_go_to_the_lower_class() {
        assert_eq!(argmax(&[1.0, 2.0, 2.0]), 1);
        let values = [-3.0, -3.0];
        let p = predict(1, &values, log_sum_exp(&values));
        assert_eq!((p.predicted, p.label), (0, 1));
        assert!((p.score - 0.5).abs() < 1e-12);
    }

    #[test]
    fn sums_of_exponents_do_not_overflow() {
        assert!((log_sum_exp(&[1000.0, 1000.0]) - 1000.0 - 2f64.ln()).abs() < 1e-9);
        assert!((log_sum_exp(&[-1e4, 0.0])).abs() < 1e-12);
        assert_eq!(log_sum_exp(&[f64::NEG_INFINITY]), f64::NEG_INFINITY);
    }

    #[test]
    fn a_loss_beyond_all_bounds_is_still_a_number() {
        assert_eq!(perplexity(0.0), 1.0);
        assert_eq!(perplexity(1e3), f64::MAX);
        assert!(finite(f64::NAN, "the likelihood", 7).unwrap_err().to_string().contains("row 7"));
    }
}

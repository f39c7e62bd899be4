//! `train`.

mod watch;

use anyhow::{Context as _, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use self::watch::Watch;
use super::{inspect, loading};
use crate::artifact::{Model, Tokens, TokensInfo, TokensSplit, TrainedInfo, Type};
use crate::data::doctor::{Check, Doctor, Limits};
use crate::learn::{
    self, AdamWConfig, Best, Counts, Duration, LoraConfig, Method, ModelConfig, Quantization,
    Schedule, Setup, TargetModules, TrainingArguments, Warmup,
};
use crate::source::{Fault, suggest};
use crate::step::{Added, Context, Input, Needs, Ports, Problem, StepKind};

/// Trains a model on tokens: all of its weights, or a LoRA adapter on a frozen base, which QLoRA
/// keeps in 4 bits.
///
/// The task (sequence classification or causal language modelling) is that of the tokens. The
/// words are those of PEFT and transformers; defaults are theirs unless a field says otherwise.
/// Loss is the sum over targets divided by all targets of an update, so gradient accumulation
/// changes nothing but memory. Weight decay spares biases and norm weights, as transformers'
/// Trainer does. The run fails by name if a trainable parameter gets no gradient or does not move,
/// if a loss is not finite, or if the training rows have nothing to teach (all of one class, rows
/// without a target token or a label); what else is odd about them is a warning, and a step
/// `inspect` looks closer. The result holds the base together with the adapter (a PEFT directory)
/// or the full weights.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Train {
    /// Tokens to learn from.
    pub data: Input<Tokens>,
    /// The base model.
    pub model: Input<Model>,
    /// Split to learn from.
    #[serde(default = "train_split")]
    pub split: String,
    /// Split to evaluate on after every epoch; if not given, `validation` where the data has it.
    #[serde(default)]
    pub validation: Option<String>,
    /// What is trained: `full`, `lora` or `qlora`.
    pub method: Method,
    /// The adapter, for `lora` and `qlora`.
    #[serde(default)]
    pub lora: Option<Lora>,
    /// How the frozen base is stored, for `qlora`; by default NF4 with double quantization.
    #[serde(default)]
    pub quantization: Option<Quantize>,
    /// Learning rate at the end of warm-up; by default 5e-5 for `full` and 2e-4 for adapters.
    #[serde(default)]
    pub learning_rate: Option<f64>,
    /// How the learning rate goes on after warm-up.
    #[serde(default)]
    pub schedule: Schedule,
    /// Share of all updates in which the rate rises from 0.
    #[serde(default)]
    pub warmup_ratio: Option<f64>,
    /// Number of updates in which the rate rises from 0.
    #[serde(default)]
    pub warmup_steps: Option<u64>,
    /// Decoupled weight decay.
    #[serde(default)]
    pub weight_decay: f64,
    /// Passes over the data; 3 if neither this nor `max_steps` is given.
    #[serde(default)]
    pub epochs: Option<u64>,
    /// Number of updates, instead of `epochs`.
    #[serde(default)]
    pub max_steps: Option<u64>,
    /// Rows of a micro-batch.
    #[serde(default = "batch_size")]
    pub batch_size: u64,
    /// Micro-batches of an update.
    #[serde(default = "one")]
    pub gradient_accumulation: u64,
    /// Gradients are scaled down to this global norm; 0 leaves them as they are.
    #[serde(default = "unit")]
    pub max_grad_norm: f64,
    /// On a GPU keeps only the input of each layer for the backward pass, which computes the rest
    /// again: the same results in less memory and more time. On the CPU it changes nothing.
    #[serde(default)]
    pub gradient_checkpointing: bool,
    /// Dropout everywhere in the model, in place of what its config says.
    #[serde(default)]
    pub dropout: Option<f64>,
    /// Draws rows in a new random order in every epoch.
    #[serde(default = "yes")]
    pub shuffle: bool,
    /// Seeds initial values, dropout and the order of rows.
    #[serde(default = "seed")]
    pub seed: u64,
    /// When to evaluate on the validation split.
    #[serde(default)]
    pub eval_strategy: EvalStrategy,
    /// Rows of an evaluation batch.
    #[serde(default = "eval_batch_size")]
    pub eval_batch_size: u64,
    /// Keeps the weights of the best evaluation instead of the last ones.
    #[serde(default = "yes")]
    pub load_best_model_at_end: bool,
    /// The metric of the evaluation that says which is best: `loss`, `perplexity`, or where there
    /// are classes or words for them `accuracy`, `f1`, `precision`, `recall`, `macro_f1`,
    /// `matthews`.
    #[serde(default = "loss")]
    pub metric_for_best: String,
    /// Whether more is better; by default yes, but for `loss` and `perplexity`.
    #[serde(default)]
    pub greater_is_better: Option<bool>,
}

/// A LoRA adapter, in PEFT's words.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Lora {
    /// Rank; 8 by default.
    #[serde(default)]
    pub r: Option<u64>,
    /// The adapter's output is scaled by `alpha / r`; 8 by default.
    #[serde(default)]
    pub alpha: Option<f64>,
    /// Dropout on the adapter's input.
    #[serde(default)]
    pub dropout: f64,
    /// Linear layers that get an adapter: names as in PEFT (exact or the end of a path), or
    /// `all-linear`.
    #[serde(default = "all_linear")]
    pub target_modules: TargetModules,
    /// Scales by `alpha / sqrt(r)` instead (rank-stabilised LoRA).
    #[serde(default)]
    pub use_rslora: bool,
}

/// How a frozen base is stored.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Quantize {
    /// The data type.
    #[serde(default, rename = "type")]
    pub ty: QuantType,
    /// Whether the scales of the blocks are quantized too.
    #[serde(default = "yes")]
    pub double: bool,
}

/// A quantized data type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum QuantType {
    /// 4-bit NormalFloat in blocks of 64, as bitsandbytes does it.
    #[default]
    Nf4,
}

/// When to evaluate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum EvalStrategy {
    /// After every epoch and at the end.
    #[default]
    Epoch,
    /// Not at all.
    No,
}

/// Metrics by likelihood, and by class.
const LIKELIHOODS: [&str; 2] = ["loss", "perplexity"];
const BY_CLASS: [&str; 6] = ["accuracy", "f1", "precision", "recall", "macro_f1", "matthews"];

fn train_split() -> String {
    "train".into()
}
fn loss() -> String {
    "loss".into()
}
fn batch_size() -> u64 {
    8
}
fn eval_batch_size() -> u64 {
    16
}
fn one() -> u64 {
    1
}
fn unit() -> f64 {
    1.0
}
fn yes() -> bool {
    true
}
fn seed() -> u64 {
    42
}
fn all_linear() -> TargetModules {
    TargetModules::AllLinear
}

impl Train {
    fn lora(&self) -> Result<Option<LoraConfig>> {
        if self.method == Method::Full {
            return Ok(None);
        }
        let lora = self.lora.as_ref().context("`lora` is missing")?;
        Ok(Some(LoraConfig {
            r: usize::try_from(lora.r.unwrap_or(8))?,
            alpha: lora.alpha.unwrap_or(8.0),
            dropout: lora.dropout,
            target_modules: lora.target_modules.clone(),
            use_rslora: lora.use_rslora,
        }))
    }

    fn quantization(&self) -> Quantization {
        match (self.method, &self.quantization) {
            (Method::Qlora, None) => Quantization::Nf4 { double: true },
            (Method::Qlora, Some(q)) => Quantization::Nf4 { double: q.double },
            _ => Quantization::None,
        }
    }

    fn rate(&self) -> f64 {
        let default = if self.method == Method::Full { 5e-5 } else { 2e-4 };
        self.learning_rate.unwrap_or(default)
    }

    fn arguments(&self, evaluated: bool) -> Result<TrainingArguments> {
        let maximize = self.greater_is_better.unwrap_or(self.by_class());
        let best = Best { metric: self.metric_for_best.clone(), maximize };
        Ok(TrainingArguments {
            duration: match (self.epochs, self.max_steps) {
                (_, Some(steps)) => Duration::Steps(steps),
                (epochs, None) => Duration::Epochs(epochs.unwrap_or(3)),
            },
            batch_size: usize::try_from(self.batch_size)?,
            gradient_accumulation: usize::try_from(self.gradient_accumulation)?,
            learning_rate: self.rate(),
            schedule: self.schedule,
            warmup: match (self.warmup_ratio, self.warmup_steps) {
                (Some(ratio), None) => Warmup::Ratio(ratio),
                (_, steps) => Warmup::Steps(steps.unwrap_or(0)),
            },
            optimizer: AdamWConfig { weight_decay: self.weight_decay, ..AdamWConfig::default() },
            max_grad_norm: (self.max_grad_norm > 0.0).then_some(self.max_grad_norm),
            shuffle: self.shuffle,
            seed: self.seed,
            best: (evaluated && self.load_best_model_at_end).then_some(best),
        })
    }

    /// Whether the best weights are chosen by a metric of classes.
    fn by_class(&self) -> bool {
        !LIKELIHOODS.contains(&self.metric_for_best.as_str())
    }

    /// Refuses a metric that the evaluations will not have.
    fn check_metric(&self, validation: &TokensInfo) -> Result<()> {
        let causal = validation.task == loading::CAUSAL_LM;
        let metric = &self.metric_for_best;
        let help = if causal && self.by_class() && validation.candidates.is_empty() {
            "the prompts have no words for classes; use `loss`, or give `output.words` in the \
             format step"
        } else if !causal && metric == "perplexity" {
            "a classifier has `loss` and metrics by class"
        } else {
            return Ok(());
        };
        let message = format!("evaluations of this task have no metric `{metric}`");
        Err(Fault::new(message).help(help).into())
    }

    fn validation(&self, data: &Tokens) -> Result<Option<TokensSplit>> {
        let split = self.validation.as_ref().filter(|_| self.eval_strategy == EvalStrategy::Epoch);
        split.map(|s| data.split(s)).transpose()
    }
}

fn range(problems: &mut Vec<Problem>, path: &str, ok: bool, want: &str, got: f64) {
    if !ok {
        problems.push(Problem::error(path, format!("expected {want}, found {got}")));
    }
}

impl StepKind for Train {
    const NAME: &'static str = "train";
    const VERSION: u32 = 2;
    const RUNS_MODEL: bool = true;
    const ON_GPU: bool = true;
    const ADDED: &'static [Added] = &[Added { field: "gradient_checkpointing", legacy: "false" }];

    fn ports(&self) -> Ports {
        Ports::of(Type::TrainedModel)
    }

    fn check(&self) -> Vec<Problem> {
        let mut p = Vec::new();
        let rate = self.rate();
        range(&mut p, "learning_rate", rate > 0.0 && rate < 10.0, "a rate above 0", rate);
        let decay = self.weight_decay;
        range(&mut p, "weight_decay", (0.0..1.0).contains(&decay), "0 or more, below 1", decay);
        range(
            &mut p,
            "max_grad_norm",
            self.max_grad_norm >= 0.0 && self.max_grad_norm.is_finite(),
            "a norm above 0, or 0 for none",
            self.max_grad_norm,
        );
        for (path, value) in [
            ("batch_size", Some(self.batch_size)),
            ("gradient_accumulation", Some(self.gradient_accumulation)),
            ("eval_batch_size", Some(self.eval_batch_size)),
            ("epochs", self.epochs),
            ("max_steps", self.max_steps),
        ] {
            range(&mut p, path, value != Some(0), "1 or more", 0.0);
        }
        if let Some(ratio) = self.warmup_ratio {
            range(&mut p, "warmup_ratio", (0.0..=1.0).contains(&ratio), "0 to 1", ratio);
        }
        if let Some(x) = self.dropout {
            range(&mut p, "dropout", (0.0..1.0).contains(&x), "0 or more, below 1", x);
        }
        if self.warmup_ratio.is_some() && self.warmup_steps.is_some() {
            let message = "`warmup_ratio` and `warmup_steps` exclude each other";
            p.push(Problem::error("warmup_steps", message));
        }
        if self.epochs.is_some() && self.max_steps.is_some() {
            p.push(Problem::error("max_steps", "`epochs` and `max_steps` exclude each other"));
        }
        if self.quantization.is_some() && self.method != Method::Qlora {
            let problem = Problem::error("quantization", "only `qlora` quantizes the base");
            p.push(problem.help("use `method: qlora`, or leave `quantization` out"));
        }
        let metric = self.metric_for_best.as_str();
        let known = [&LIKELIHOODS[..], &BY_CLASS].concat();
        if !known.contains(&metric) {
            let problem = Problem::error("metric_for_best", format!("no metric is `{metric}`"));
            p.push(problem.help(suggest(metric, &known).unwrap_or_default()));
        }
        self.check_lora(&mut p);
        p
    }

    fn narrow(&mut self) {
        let names = self.data.names().unwrap_or_default();
        if self.validation.is_none()
            && self.split != "validation"
            && names.iter().any(|n| n == "validation")
        {
            self.validation = Some("validation".into());
        }
        let mut keep = vec![self.split.as_str()];
        if self.eval_strategy == EvalStrategy::Epoch {
            keep.extend(self.validation.as_deref());
        } else {
            self.validation = None;
        }
        self.data.keep(&keep);
    }

    fn check_inputs(&self, cx: &Context<'_>) -> Result<()> {
        let (data, model) = (cx.open(&self.data)?, cx.open(&self.model)?);
        let config = ModelConfig::read(&model.config()?)?;
        let train = data.split(&self.split)?.info;
        loading::check_fit(&config, &train, &self.split)?;
        if let (Some(split), Some(name)) = (self.validation(&data)?, &self.validation) {
            loading::check_fit(&config, &split.info, name)?;
            self.check_metric(&split.info)?;
            if self.by_class() && split.info.task == loading::CAUSAL_LM {
                loading::check_candidates(&config, &split, name)?;
            }
        }
        if train.rows == 0 {
            let fault = Fault::new(format!("split `{}` has no rows to train on", self.split));
            return Err(fault.into());
        }
        // Where classes have no names their number is not known yet; here it does not matter.
        let task = loading::task(&train.task, train.classes.len().max(2))?;
        config.check_task(&task)?;
        if let Some(lora) = self.lora()? {
            config.check_targets(&task, &lora.target_modules)?;
        }
        Ok(())
    }

    fn needs(&self) -> Needs {
        Needs::ALL
    }

    fn run(&self, cx: &mut Context<'_>) -> Result<()> {
        let (data, base) = (cx.open(&self.data)?, cx.open(&self.model)?);
        let TokensSplit { rows, info } = data.split(&self.split)?;
        let rows = learn::read_rows(&rows)?;
        let classes = class_names(&info, &rows);
        let task = loading::task(&info.task, classes.len())?;
        self.doubt(cx, &rows, &info)?;
        if let Some(warning) = loading::other_tokenizer(&base, &info) {
            cx.warn(warning);
        }
        let setup = Setup {
            task: task.clone(),
            method: self.method,
            lora: self.lora()?,
            quantization: self.quantization(),
            seed: self.seed,
            dropout: self.dropout,
            compute: loading::compute(cx)?,
            gradient_checkpointing: self.gradient_checkpointing,
            frozen: false,
        };
        let model = learn::Model::load(&loading::files(&base)?, &setup)?;
        let counts = model.counts();
        cx.log(parameters_line(counts));
        if let Some(pooler) = model.fresh_modules().iter().find(|name| name.contains("pooler")) {
            cx.warn(format!("the base has no `{pooler}`: a fresh one is trained, as the head is"));
        }
        let validation = self.validation(&data)?;
        if validation.is_none() && self.by_class() {
            cx.warn(format!(
                "`metric_for_best: {}` has no effect: nothing is evaluated, the last weights are \
                 kept",
                self.metric_for_best
            ));
        }
        let args = self.arguments(validation.is_some())?;
        let mut watch = Watch::new(cx, &task, validation, self);
        let history = match watch.checkpoint(&model) {
            Some(from) => learn::resume(from, &model, &task, &rows, &args, &mut watch)?,
            None => learn::train(&model, &task, &rows, &args, &mut watch)?,
        };
        let Watch { tokens: measured, rows: seen, seconds, .. } = watch;
        let tokens: u64 = history.steps.iter().map(|s| s.tokens).sum();

        let dir = cx.out_dir("trained")?;
        let name = base_name(&base)?;
        let (bytes, file) = match self.method {
            Method::Full => {
                model.save_full(&dir, &classes)?;
                ("weights_bytes", "model.safetensors")
            }
            Method::Lora | Method::Qlora => {
                model.save_adapter(&dir, &name)?;
                ("adapter_bytes", "adapter_model.safetensors")
            }
        };
        let trained = TrainedInfo {
            method: serde_json::from_value(serde_json::to_value(self.method)?)?,
            task: info.task.clone(),
            quantization: loading::quantization_name(setup.quantization).into(),
            base: name,
            classes,
            trainable_parameters: counts.trainable,
            all_parameters: counts.all,
        };
        cx.write_json(&dir, "trained.json", &trained)?;
        cx.write_json(&dir, "history.json", &history)?;
        for port in ["config", "tokenizer", "weights"] {
            cx.adopt(port, base.0.port(port)?);
        }
        if let Ok(meta) = std::fs::metadata(dir.join(file)) {
            cx.fact(bytes, meta.len());
        }
        cx.fact("trainable_parameters", counts.trainable);
        cx.fact("all_parameters", counts.all);
        cx.fact("trainable_percent", percent(counts));
        cx.fact("steps", history.steps.len());
        cx.fact("tokens", tokens);
        cx.fact("tokens_per_second", measured as f64 / seconds);
        cx.fact("samples_per_second", seen as f64 / seconds);
        cx.fact("train_seconds", seconds);
        if let Some(last) = history.steps.last() {
            cx.fact("final_loss", last.loss);
        }
        if let Some(step) = history.best_step {
            cx.fact("best_step", step);
        }
        Ok(())
    }
}

impl Train {
    /// What the data doctor says of the training rows alone. What leaves nothing to learn is
    /// refused; the rest is for a step `inspect` to refuse.
    fn doubt(&self, cx: &mut Context<'_>, rows: &[learn::Row], info: &TokensInfo) -> Result<()> {
        let mut doctor = Doctor::new("tokens", Limits::default(), &[]);
        let rows = rows.iter().cloned().map(Ok);
        inspect::survey_tokens(&mut doctor, &self.split, rows, info, None)?;
        for finding in doctor.findings() {
            match finding.check {
                Check::OneClass | Check::NoTarget | Check::NoLabel | Check::LabelOutside => {
                    return Err(Fault::new(finding.line()).help(finding.help).into());
                }
                // Said where they were left out.
                Check::Dropped => {}
                Check::Sorted if self.shuffle => {}
                _ => cx.warn(inspect::told(&finding)),
            }
        }
        Ok(())
    }

    fn check_lora(&self, p: &mut Vec<Problem>) {
        let Some(lora) = &self.lora else {
            if self.method != Method::Full {
                let problem = Problem::error("", "adapters need the field `lora`");
                p.push(problem.help("for example `lora: { r: 8, alpha: 16 }`"));
            }
            return;
        };
        // Without rank and alpha it is what a sweep leaves at a point that drops both.
        if self.method == Method::Full && (lora.r.is_some() || lora.alpha.is_some()) {
            let problem = Problem::error("lora", "`method: full` trains all weights, no adapter");
            p.push(problem.help("use `method: lora`, or leave `lora` out"));
        }
        range(p, "lora.r", lora.r != Some(0), "a rank of 1 or more", 0.0);
        if let Some(alpha) = lora.alpha {
            let ok = alpha > 0.0 && alpha.is_finite();
            range(p, "lora.alpha", ok, "a number above 0", alpha);
        }
        let x = lora.dropout;
        range(p, "lora.dropout", (0.0..1.0).contains(&x), "0 or more, below 1", x);
        if lora.target_modules == TargetModules::Names(Vec::new()) {
            let problem = Problem::error("lora.target_modules", "expected a name or more");
            p.push(problem.help("`all-linear` means every linear layer"));
        }
    }
}

/// Class names of the tokens; without any, transformers' `LABEL_i` for the labels there are.
fn class_names(info: &TokensInfo, rows: &[learn::Row]) -> Vec<String> {
    if info.task == loading::CAUSAL_LM || !info.classes.is_empty() {
        return info.classes.clone();
    }
    let count = rows.iter().filter_map(|r| r.class).max().map_or(0, |m| m + 1);
    (0..count).map(|i| format!("LABEL_{i}")).collect()
}

/// The name that the base's `config` port gives it.
fn base_name(base: &Model) -> Result<String> {
    if base.0.find("config", "source.json")?.is_none() {
        return Ok("base".into());
    }
    let source: Value = base.0.json("config", "source.json")?;
    Ok(source["name"].as_str().unwrap_or("base").to_owned())
}

fn percent(counts: Counts) -> f64 {
    100.0 * counts.trainable as f64 / counts.all.max(1) as f64
}

/// As PEFT's `print_trainable_parameters` says it.
fn parameters_line(counts: Counts) -> String {
    format!(
        "trainable params: {} || all params: {} || trainable%: {:.4}",
        loading::grouped(counts.trainable),
        loading::grouped(counts.all),
        percent(counts)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_as_peft_prints_them() {
        let counts = Counts { trainable: 739_586, all: 67_694_596 };
        assert_eq!(
            parameters_line(counts),
            "trainable params: 739,586 || all params: 67,694,596 || trainable%: 1.0925"
        );
    }
}

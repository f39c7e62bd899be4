//! The training loop on tiny random models.

use std::collections::BTreeMap;

use anyhow::Result;
use candle_core::{Device, Tensor, Var};
use flow::learn::{
    AdamWConfig, Best, Checkpoint, Compute, Duration, GradientGate, History, IGNORE, LoraConfig,
    Measure, Method, Model, Observer, Quantization, Row, Schedule, Setup, StepLog, TargetModules,
    Task, TrainingArguments, Warmup, collate, resume, score, train,
};

use super::{decoder, encoder, model, rows};

const CLASSIFY: Task = Task::SequenceClassification { classes: 2 };

fn setup(task: Task, method: Method) -> Setup {
    let lora = LoraConfig {
        r: 4,
        alpha: 8.0,
        dropout: 0.0,
        target_modules: TargetModules::AllLinear,
        use_rslora: false,
    };
    Setup {
        task,
        method,
        lora: (method != Method::Full).then_some(lora),
        quantization: match method {
            Method::Qlora => Quantization::Nf4 { double: true },
            _ => Quantization::None,
        },
        seed: 5,
        dropout: Some(0.0),
        compute: Compute::Cpu,
        gradient_checkpointing: false,
        frozen: false,
    }
}

fn arguments(steps: u64, learning_rate: f64) -> TrainingArguments {
    TrainingArguments {
        duration: Duration::Steps(steps),
        batch_size: 8,
        gradient_accumulation: 1,
        learning_rate,
        schedule: Schedule::Linear,
        warmup: Warmup::Steps(1),
        optimizer: AdamWConfig::default(),
        max_grad_norm: Some(1.0),
        shuffle: true,
        seed: 9,
        best: None,
    }
}

/// Sees the weights at each evaluation, and says what the evaluation found.
#[derive(Default)]
struct Watch {
    losses: Vec<f64>,
    seen: Vec<BTreeMap<String, Vec<f32>>>,
    steps: u64,
}

impl Observer for Watch {
    fn step(&mut self, _: &StepLog, _: u64) -> Result<()> {
        self.steps += 1;
        Ok(())
    }

    fn evaluate(&mut self, model: &Model, _: u64) -> Result<Option<BTreeMap<String, f64>>> {
        self.seen.push(weights(model));
        let loss = self.losses.get(self.seen.len() - 1);
        Ok(loss.map(|loss| BTreeMap::from([("loss".to_owned(), *loss)])))
    }
}

fn weights(model: &Model) -> BTreeMap<String, Vec<f32>> {
    let values = |var: &Var| var.flatten_all().unwrap().to_vec1().unwrap();
    model.trainable().iter().map(|(name, var)| (name.clone(), values(var))).collect()
}

struct Trained {
    model: Model,
    history: History,
}

fn run(
    config: &serde_json::Value,
    setup: &Setup,
    data: &[Row],
    args: &TrainingArguments,
) -> Result<Trained> {
    let dir = tempfile::tempdir().unwrap();
    let model = Model::load(&model(dir.path(), config), setup)?;
    let history = train(&model, &setup.task, data, args, &mut Watch::default())?;
    Ok(Trained { model, history })
}

fn accuracy(model: &Model, data: &[Row], measure: Measure<'_>) -> f64 {
    let mut stream = data.iter().cloned().map(Ok);
    score(model, &mut stream, 16, measure, &mut |_, _| Ok(())).unwrap().metrics["accuracy"]
}

#[test]
fn lora_learns_and_leaves_the_base_alone() {
    let (data, unseen) = (rows(160, 1, false), rows(100, 2, false));
    let setup = setup(CLASSIFY, Method::Lora);
    let dir = tempfile::tempdir().unwrap();
    let files = model(dir.path(), &encoder());
    let trained = Model::load(&files, &setup).unwrap();
    let frozen = trained.frozen_digest().unwrap();
    let before = accuracy(&trained, &unseen, Measure::Classes(2));
    let args = arguments(60, 1e-2);
    let history = train(&trained, &CLASSIFY, &data, &args, &mut Watch::default()).unwrap();
    let after = accuracy(&trained, &unseen, Measure::Classes(2));
    assert!(after >= 0.9 && after > before, "{before} {after}");
    assert_eq!(trained.frozen_digest().unwrap(), frozen);
    let (first, last) = (history.steps[0].loss, history.steps[59].loss);
    assert!(last < 0.5 * first, "{first} {last}");
    assert_eq!(history.steps[0].learning_rate, 0.0);

    // saved and loaded again it says the same, bit for bit
    let out = dir.path().join("adapter");
    std::fs::create_dir(&out).unwrap();
    trained.save_adapter(&out, "tiny").unwrap();
    let saved = ["adapter_config.json", "adapter_model.safetensors"];
    let saved: Vec<_> = saved.iter().map(|n| ((*n).to_owned(), out.join(n))).collect();
    let loaded = Model::load_trained(&files, &setup, &saved).unwrap();
    let refs: Vec<&Row> = unseen.iter().take(5).collect();
    let batch = collate(&refs, &CLASSIFY).unwrap();
    let logits = |m: &Model| m.logits(&batch).unwrap().to_vec2::<f32>().unwrap();
    assert_eq!(logits(&trained), logits(&loaded));
}

#[test]
fn accumulated_gradients_are_those_of_the_whole() {
    // Rows of unequal numbers of targets, where a mean of means would differ.
    let mut data = rows(24, 3, true);
    for row in data.iter_mut().step_by(3) {
        let labels: Vec<i64> = row.ids.iter().map(|id| i64::from(*id)).collect();
        row.labels = Some(labels);
    }
    let setup = setup(Task::CausalLm, Method::Lora);
    let whole = arguments(6, 1e-2);
    let parts = TrainingArguments { batch_size: 2, gradient_accumulation: 4, ..whole.clone() };
    let a = run(&decoder(), &setup, &data, &whole).unwrap();
    let b = run(&decoder(), &setup, &data, &parts).unwrap();
    for (a, b) in a.history.steps.iter().zip(&b.history.steps) {
        assert!((a.loss - b.loss).abs() < 1e-5 * a.loss, "{a:?} {b:?}");
        assert!((a.grad_norm - b.grad_norm).abs() < 1e-4 * a.grad_norm, "{a:?} {b:?}");
        assert_eq!((a.rows, a.tokens), (b.rows, b.tokens));
    }
}

#[test]
fn runs_repeat_bit_for_bit_on_any_number_of_threads() {
    let data = rows(32, 4, true);
    let mut setup = setup(Task::CausalLm, Method::Qlora);
    setup.dropout = Some(0.1);
    if let Some(lora) = &mut setup.lora {
        lora.dropout = 0.1;
    }
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let trained = run(&decoder(), &setup, &data, &arguments(6, 1e-2)).unwrap();
            (weights(&trained.model), trained.history)
        })
    };
    let one = on(1);
    assert_eq!(one, on(1));
    assert_eq!(one, on(3));
}

#[test]
fn the_best_weights_are_kept() {
    let data = rows(16, 5, false);
    let setup = setup(CLASSIFY, Method::Full);
    let dir = tempfile::tempdir().unwrap();
    let files = model(dir.path(), &encoder());
    let args = TrainingArguments {
        duration: Duration::Epochs(3),
        best: Some(Best { metric: "loss".into(), maximize: false }),
        ..arguments(0, 1e-3)
    };
    let model = Model::load(&files, &setup).unwrap();
    let mut watch = Watch { losses: vec![0.9, 0.5, 0.7], ..Watch::default() };
    let history = train(&model, &CLASSIFY, &data, &args, &mut watch).unwrap();
    assert_eq!((history.best_step, history.evaluations.len(), watch.steps), (Some(4), 3, 6));
    assert_eq!(weights(&model), watch.seen[1]);
    assert_ne!(watch.seen[1], watch.seen[2]);

    // What is not a number never wins, not even as the first.
    let mut watch = Watch { losses: vec![f64::NAN, 0.9, f64::INFINITY], ..Watch::default() };
    let history = train(&model, &CLASSIFY, &data, &args, &mut watch).unwrap();
    assert_eq!(history.best_step, Some(4));
    let mut watch = Watch { losses: vec![f64::NAN; 3], ..Watch::default() };
    let err = train(&model, &CLASSIFY, &data, &args, &mut watch).unwrap_err();
    assert!(err.to_string().contains("`loss` was finite in no evaluation"), "{err}");

    let args =
        TrainingArguments { best: Some(Best { metric: "acuracy".into(), maximize: true }), ..args };
    let mut watch = Watch { losses: vec![0.9], ..Watch::default() };
    let err = train(&model, &CLASSIFY, &data, &args, &mut watch).unwrap_err();
    assert!(err.to_string().contains("no metric `acuracy`"), "{err}");
}

#[test]
fn a_loss_that_explodes_stops_the_run_by_step_and_rows() {
    let data = rows(16, 6, false);
    let args = TrainingArguments { max_grad_norm: None, ..arguments(20, 1e30) };
    let err = run(&encoder(), &setup(CLASSIFY, Method::Full), &data, &args).err().unwrap();
    let text = format!("{err:#}");
    assert!(text.contains("in step ") && text.contains("rows "), "{text}");
}

/// A token that sees only itself attends to itself whatever its query is, so nothing is learnt by
/// the queries: the run fails and says which parameters that are.
#[test]
fn a_parameter_without_effect_fails_the_run_by_name() {
    let mut data = rows(16, 7, false);
    data.iter_mut().for_each(|row| row.ids.truncate(1));
    let mut setup = setup(CLASSIFY, Method::Lora);
    if let Some(lora) = &mut setup.lora {
        lora.target_modules = TargetModules::Names(vec!["q_lin".into(), "v_lin".into()]);
    }
    let err = run(&encoder(), &setup, &data, &arguments(6, 1e-2)).err().unwrap().to_string();
    assert!(err.contains("4 of 12 trainable tensors has been zero"), "{err}");
    assert!(err.contains("layer.0.attention.q_lin.lora_A") && !err.contains("v_lin"), "{err}");
}

/// Rates too small to move a weight fail a run, even one that is over before they add up.
#[test]
fn a_run_that_moves_nothing_fails() {
    let err =
        run(&encoder(), &setup(CLASSIFY, Method::Full), &rows(16, 8, false), &arguments(4, 1e-12));
    let err = err.err().unwrap();
    assert!(err.to_string().contains("have not changed"), "{err}");
}

/// The blocks of an output embedding that is larger than one of them add up.
#[test]
fn gradients_of_a_large_vocabulary_are_those_of_its_rows() {
    let mut config = decoder();
    for (key, value) in [("vocab_size", 1 << 20), ("hidden_size", 4), ("num_attention_heads", 2)] {
        config[key] = value.into();
    }
    let dir = tempfile::tempdir().unwrap();
    let files = model(dir.path(), &config);
    let model = Model::load(&files, &setup(Task::CausalLm, Method::Full)).unwrap();
    let mut data = rows(3, 9, true);
    for row in &mut data {
        row.labels = Some(row.ids.iter().map(|id| i64::from(*id)).collect());
    }
    // 16 logits of a million are one block.
    let gradients = |rows: &[&Row]| {
        let batch = collate(rows, &Task::CausalLm).unwrap();
        (batch.targets(), model.gradients(&batch, 0, 1.0).unwrap())
    };
    let (targets, (loss, whole)) = gradients(&data.iter().collect::<Vec<_>>());
    assert!(targets > 17, "{targets}");
    let parts: Vec<_> = data.iter().map(|row| gradients(&[row])).collect();
    assert!(parts.iter().all(|(targets, _)| *targets <= 16));
    let sum: f64 = parts.iter().map(|(_, (loss, _))| loss).sum();
    assert!((sum - loss).abs() < 1e-4 * loss, "{sum} {loss}");
    for (name, whole) in &whole {
        let mut sum = whole.zeros_like().unwrap();
        for (_, (_, part)) in &parts {
            sum = (sum + &part[name]).unwrap();
        }
        let largest = whole.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        let off = (sum - whole).unwrap().abs().unwrap().max_all().unwrap();
        assert!(off.to_scalar::<f32>().unwrap() < 1e-4 * largest, "{name}");
    }
}

/// Many answers behind one prompt are scored as each of them alone.
#[test]
fn answers_share_a_prompt_exactly() {
    let mut windowed = decoder();
    windowed["model_type"] = "mistral".into();
    windowed["sliding_window"] = 5.into();
    let prompts: Vec<Vec<u32>> = rows(5, 10, false).into_iter().map(|row| row.ids).collect();
    let refs: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
    // Of one token and of several, more than one pass of them, and some that begin alike.
    let answers: Vec<Vec<u32>> =
        (0..20u32).map(|i| (0..=i % 4).map(|j| 8 + i / 2 + j).collect()).collect();
    for config in [decoder(), windowed] {
        let dir = tempfile::tempdir().unwrap();
        let model =
            Model::load(&model(dir.path(), &config), &setup(Task::CausalLm, Method::Full)).unwrap();
        let found = model.answer_log_probs(&refs, &answers).unwrap();
        for (prompt, found) in prompts.iter().zip(&found) {
            assert_eq!(found.len(), answers.len());
            for (answer, found) in answers.iter().zip(found) {
                let ids = [&prompt[..], answer].concat();
                let mut labels = vec![IGNORE; prompt.len()];
                labels.extend(answer.iter().map(|id| i64::from(*id)));
                let row = Row { ids, labels: Some(labels), ..Row::default() };
                let batch = collate(&[&row], &Task::CausalLm).unwrap();
                let (alone, n) = model.target_log_probs(&batch).unwrap()[0];
                assert_eq!(n, answer.len());
                assert!((alone - found).abs() < 1e-5 * alone.abs(), "{alone} {found}");
            }
        }
        assert!(model.answer_log_probs(&refs, &[vec![8; 30]]).is_err());
        assert!(model.answer_log_probs(&[&[]], &answers).is_err());
    }
}

/// candle's own softmax has no backward: what lies before it is cut off without an error.
#[test]
#[expect(clippy::disallowed_methods, reason = "cuts a gradient on purpose")]
fn the_gate_fails_on_a_gradient_that_is_cut() {
    let device = Device::Cpu;
    let below = Var::from_slice(&[0.3f32, -0.2], (1, 2), &device).unwrap();
    let above = Var::from_slice(&[1.0f32, 2.0], (2, 1), &device).unwrap();
    let parameters =
        BTreeMap::from([("above".to_owned(), above.clone()), ("below".to_owned(), below.clone())]);
    let gradients = |cut: bool| -> BTreeMap<String, Vec<f32>> {
        let x = if cut {
            candle_nn::ops::softmax_last_dim(&below).unwrap()
        } else {
            candle_nn::ops::softmax(&below, 1).unwrap()
        };
        let loss = x.matmul(&above).unwrap().sum_all().unwrap();
        let store = loss.backward().unwrap();
        let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1().unwrap();
        let found = parameters.iter().filter_map(|(n, v)| Some((n.clone(), flat(store.get(v)?))));
        found.collect()
    };
    let mut gate = GradientGate::new(&parameters).unwrap();
    gate.gradients(&gradients(false)).unwrap();
    let err = gate.gradients(&gradients(true)).unwrap_err();
    assert_eq!(err.to_string(), "no gradient reaches parameter `below`");
}

/// Evaluates, and stops after a step with a checkpoint.
struct Stop<'a> {
    after: u64,
    dir: std::path::PathBuf,
    steps: u64,
    unseen: &'a [Row],
}

impl Observer for Stop<'_> {
    fn step(&mut self, log: &StepLog, _: u64) -> Result<()> {
        self.steps = log.step;
        Ok(())
    }

    fn between(&mut self, save: &mut dyn FnMut(&std::path::Path) -> Result<()>) -> Result<()> {
        if self.steps == self.after {
            std::fs::create_dir(&self.dir)?;
            save(&self.dir)?;
            anyhow::bail!("stopped");
        }
        Ok(())
    }

    fn evaluate(&mut self, model: &Model, _: u64) -> Result<Option<BTreeMap<String, f64>>> {
        let mut stream = self.unseen.iter().cloned().map(Ok);
        let scores = score(model, &mut stream, 16, Measure::Classes(2), &mut |_, _| Ok(()))?;
        Ok(Some(scores.metrics))
    }
}

#[test]
fn a_stopped_training_goes_on_to_the_same_bytes() {
    let (data, unseen) = (rows(40, 1, false), rows(30, 2, false));
    let mut setup = setup(CLASSIFY, Method::Lora);
    setup.dropout = Some(0.2);
    let best = Best { metric: "loss".into(), maximize: false };
    // 5 updates an epoch: a rate so high that a middle epoch is the best.
    let args = TrainingArguments { best: Some(best), ..arguments(20, 3e-2) };
    let dir = tempfile::tempdir().unwrap();
    let files = model(dir.path(), &encoder());
    let fresh = || Model::load(&files, &setup).unwrap();
    let nowhere = dir.path().join("nowhere");
    let watch = |after, dir: &std::path::Path| Stop {
        after,
        dir: dir.to_path_buf(),
        steps: 0,
        unseen: &unseen,
    };
    let whole = fresh();
    let history = train(&whole, &CLASSIFY, &data, &args, &mut watch(0, &nowhere)).unwrap();
    // In the first epoch, between an update and its evaluation, and after the best one.
    for after in [1, 5, 13, 20] {
        let place = dir.path().join(format!("after{after}"));
        let stopped = train(&fresh(), &CLASSIFY, &data, &args, &mut watch(after, &place));
        assert_eq!(stopped.unwrap_err().to_string(), "stopped");
        let again = fresh();
        let checkpoint = Checkpoint::open(&place, &again).unwrap();
        assert_eq!(checkpoint.steps(), after);
        let mut rest = watch(0, &nowhere);
        let gone_on = resume(checkpoint, &again, &CLASSIFY, &data, &args, &mut rest).unwrap();
        assert_eq!(gone_on, history, "after {after}");
        assert_eq!(weights(&again), weights(&whole), "after {after}");
    }
    // Damage is found before the model is touched.
    let place = dir.path().join("after13");
    let path = place.join("tensors.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let refused = Checkpoint::open(&place, &fresh()).unwrap_err().to_string();
    assert!(refused.contains("damaged"), "{refused}");
}

//! PEFT's adapter directories, both ways, and merged models.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use flow::learn::{
    Labels, LoraConfig, MergeBase, Method, Model, ModelConfig, Quantization, Setup, TargetModules,
    Task, random_weights,
};

use super::{Numbers, batch, classes, files, fixture, lora, numbers, read, relative, setup};

fn pair(dir: &Path, names: [&str; 2]) -> Vec<(String, PathBuf)> {
    names.iter().map(|name| ((*name).to_owned(), dir.join(name))).collect()
}

fn adapter(dir: &Path) -> Vec<(String, PathBuf)> {
    pair(dir, ["adapter_config.json", "adapter_model.safetensors"])
}

fn reference_batch(reference: &Numbers, mask: &Numbers) -> flow::learn::Batch {
    let [size, length] = reference.shape[..] else { panic!("{:?}", reference.shape) };
    let rows: Vec<Vec<u32>> = (0..size)
        .map(|row| {
            let range = row * length..(row + 1) * length;
            let n = mask.data[range.clone()].iter().sum::<f32>() as usize;
            reference.data[range][..n].iter().map(|x| *x as u32).collect()
        })
        .collect();
    batch(&rows.iter().map(Vec::as_slice).collect::<Vec<_>>())
}

/// The reference has logits on the padding too; only the others count.
fn check(model: &Model, batch: &flow::learn::Batch, expected: &Numbers) {
    let found = numbers(&model.logits(batch).unwrap());
    assert_eq!(found.len(), expected.data.len());
    let per_row = found.len() / batch.size;
    for row in 0..batch.size {
        let n = match expected.shape.len() {
            3 => batch.lengths[row] * expected.shape[2],
            _ => per_row,
        };
        let range = row * per_row..row * per_row + n;
        let error = relative(&found[range.clone()], &expected.data[range]);
        assert!(error < 1e-4, "logits of row {row}: {error}");
    }
}

fn interchange(name: &str, task: Task) {
    let dir = fixture(name);
    let base = files(dir.join("config.json"), dir.join("model.safetensors"));
    let setup = setup(task, Method::Lora, Some(lora(&["none"])));
    let model = Model::load_trained(&base, &setup, &adapter(&dir.join("adapter"))).unwrap();
    let reference = read(&dir.join("reference.safetensors"));
    let batch = reference_batch(&reference["input_ids"], &reference["attention_mask"]);
    check(&model, &batch, &reference["logits_adapter"]);

    // Saved again it has the same tensors and settings.
    let out = tempfile::tempdir().unwrap();
    model.save_adapter(out.path(), "some/base").unwrap();
    let (theirs, ours) = (dir.join("adapter"), out.path());
    let tensors = |dir: &Path| std::fs::read(dir.join("adapter_model.safetensors")).unwrap();
    let (a, b) = (tensors(&theirs), tensors(ours));
    let (a, b) = (
        safetensors::SafeTensors::deserialize(&a).unwrap(),
        safetensors::SafeTensors::deserialize(&b).unwrap(),
    );
    let names = |t: &safetensors::SafeTensors<'_>| {
        t.names().into_iter().map(str::to_owned).collect::<BTreeSet<_>>()
    };
    assert_eq!(names(&a), names(&b));
    for name in names(&a) {
        let (a, b) = (a.tensor(&name).unwrap(), b.tensor(&name).unwrap());
        assert_eq!((a.dtype(), a.shape()), (b.dtype(), b.shape()));
        assert!(a.data() == b.data(), "{name} changed");
    }
    let settings = |dir: &Path| -> serde_json::Map<String, serde_json::Value> {
        let text = std::fs::read_to_string(dir.join("adapter_config.json")).unwrap();
        serde_json::from_str(&text).unwrap()
    };
    let (theirs, ours) = (settings(&theirs), settings(ours));
    for (key, value) in &ours {
        let expected = theirs.get(key).unwrap_or_else(|| panic!("PEFT has no {key}"));
        match key.as_str() {
            "base_model_name_or_path" => assert_eq!(value, "some/base"),
            "peft_version" => assert!(value.is_string()),
            "modules_to_save" if value.is_array() => {
                assert_eq!(value, &serde_json::json!(["pre_classifier", "classifier"]));
            }
            "target_modules" => {
                let set = |v: &serde_json::Value| {
                    let names = v.as_array().unwrap().iter();
                    names.map(|n| n.as_str().unwrap().to_owned()).collect::<BTreeSet<_>>()
                };
                assert_eq!(set(value), set(expected));
            }
            key => assert_eq!(value, expected, "{key}"),
        }
    }

    // Merged it is PEFT's merged model.
    let out = tempfile::tempdir().unwrap();
    let report = model.merge(MergeBase::Dequantized, out.path(), &[]).unwrap();
    assert!(report.max_rel_difference < 1e-5 && report.rounding_loss == 0.0, "{report:?}");
    let merged = read(&out.path().join("model.safetensors"));
    let mut expected = read(&dir.join("model.safetensors"));
    expected.extend(read(&dir.join("merged_changed.safetensors")));
    assert_eq!(merged.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    for (name, expected) in &expected {
        assert_eq!(merged[name].shape, expected.shape);
        assert!(relative(&merged[name].data, &expected.data) < 1e-5, "{name}");
    }
    let whole = files(out.path().join("config.json"), out.path().join("model.safetensors"));
    let whole = Model::load(&whole, &Setup { method: Method::Full, ..setup }).unwrap();
    check(&whole, &batch, &reference["logits_merged"]);
}

#[test]
fn distilbert_interchange() {
    interchange("peft_distilbert", classes(3));
}

#[test]
fn llama_interchange() {
    interchange("peft_llama", Task::CausalLm);
}

/// Loads an adapter of these target modules on the base of `peft_llama`; only its tensors that
/// `keep` are there.
fn foreign(targets: &serde_json::Value, keep: impl Fn(&str) -> bool) -> anyhow::Result<Model> {
    let dir = fixture("peft_llama");
    let base = files(dir.join("config.json"), dir.join("model.safetensors"));
    let out = tempfile::tempdir().unwrap();
    let text = std::fs::read_to_string(dir.join("adapter/adapter_config.json")).unwrap();
    let mut settings: serde_json::Value = serde_json::from_str(&text).unwrap();
    settings["target_modules"] = targets.clone();
    std::fs::write(out.path().join("adapter_config.json"), settings.to_string()).unwrap();
    let mut tensors = tensors(&dir.join("adapter/adapter_model.safetensors"));
    tensors.retain(|name, _| keep(name));
    let path = out.path().join("adapter_model.safetensors");
    candle_core::safetensors::save(&tensors, path).unwrap();
    let setup = setup(Task::CausalLm, Method::Lora, None);
    Model::load_trained(&base, &setup, &adapter(out.path()))
}

fn tensors(path: &Path) -> HashMap<String, candle_core::Tensor> {
    candle_core::safetensors::load(path, &candle_core::Device::Cpu).unwrap()
}

/// A missing and a superfluous tensor are both named, however many modules are targets.
#[test]
fn an_adapter_of_another_model_is_refused() {
    let targets = serde_json::json!(["q_proj", "k_proj", "v_proj", "down_proj"]);
    let text = format!("{:#}", foreign(&targets, |_| true).unwrap_err());
    let (missing, unexpected) = text.split_once("unexpected").unwrap();
    assert!(missing.contains("layers.0.mlp.down_proj.lora_A"), "{text}");
    assert!(unexpected.contains("layers.0.self_attn.o_proj.lora_A"), "{text}");

    let targets = serde_json::json!(["q_proj"]);
    let whole = foreign(&targets, |name| name.contains("q_proj")).unwrap();
    let first = |name: &str| name.contains("q_proj") && name.contains("layers.0");
    let text = format!("{:#}", foreign(&targets, first).unwrap_err());
    assert!(text.contains("missing") && text.contains("layers.1.self_attn.q_proj"), "{text}");
    // A regular expression says less than the file.
    let pattern = serde_json::json!(r".*\.0\.self_attn\.q_proj");
    let part = foreign(&pattern, first).unwrap();
    assert!(2 * part.trainable().len() == whole.trainable().len());
    let error = foreign(&pattern, |_| false).unwrap_err();
    assert!(format!("{error:#}").contains("target_modules"), "{error:#}");
}

fn tiny(dir: &Path, config: &serde_json::Value, task: &Task) -> flow::learn::ModelFiles {
    let path = dir.join("config.json");
    std::fs::write(&path, config.to_string()).unwrap();
    let weights = dir.join("model.safetensors");
    let config = ModelConfig::read(&path).unwrap();
    random_weights(&config, Some(task), 5, &weights).unwrap();
    files(path, weights)
}

fn llama() -> serde_json::Value {
    serde_json::json!({
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96,
        "vocab_size": 101, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "initializer_range": 0.2, "tie_word_embeddings": true,
    })
}

fn bert() -> serde_json::Value {
    serde_json::json!({
        "model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 50,
        "max_position_embeddings": 16,
    })
}

fn all_linear() -> LoraConfig {
    LoraConfig { target_modules: TargetModules::AllLinear, ..lora(&[]) }
}

/// Sets every B to something, so that the adapter does something.
fn stir(model: &Model) {
    for (i, (name, var)) in model.trainable().iter().enumerate() {
        if name.contains("lora_B") {
            let n = var.elem_count();
            let data = (0..n).map(|j| ((i + 7 * j) % 11) as f32 * 0.02 - 0.1).collect::<Vec<_>>();
            let data = candle_core::Tensor::from_vec(data, var.shape(), var.device()).unwrap();
            var.set(&data).unwrap();
        }
    }
}

/// A QLoRA adapter fits its quantized base: merged there the logits stay, merged into the
/// original they move by the quantization error.
#[test]
fn qlora_merges_into_either_base() {
    let dir = tempfile::tempdir().unwrap();
    let files = tiny(dir.path(), &llama(), &Task::CausalLm);
    let setup = setup(Task::CausalLm, Method::Qlora, Some(all_linear()));
    let model = Model::load(&files, &setup).unwrap();
    stir(&model);
    let batch = batch(&[&[1, 5, 9, 100, 3], &[4, 4, 2]]);
    let adapted = numbers(&model.logits(&batch).unwrap());
    let merged = |base| {
        let out = tempfile::tempdir().unwrap();
        let report = model.merge(base, out.path(), &[]).unwrap();
        assert!(report.max_rel_difference < 1e-4, "{report:?}");
        let files =
            super::files(out.path().join("config.json"), out.path().join("model.safetensors"));
        let setup = Setup {
            method: Method::Full,
            quantization: Quantization::None,
            lora: None,
            ..setup.clone()
        };
        numbers(&Model::load(&files, &setup).unwrap().logits(&batch).unwrap())
    };
    assert!(relative(&merged(MergeBase::Dequantized), &adapted) < 1e-4);
    assert!(relative(&merged(MergeBase::Original), &adapted) > 1e-3);

    // Saved and loaded again it is the same model.
    let out = tempfile::tempdir().unwrap();
    model.save_adapter(out.path(), "").unwrap();
    let again = Model::load_trained(&files, &setup, &adapter(out.path())).unwrap();
    assert_eq!(numbers(&again.logits(&batch).unwrap()), adapted);
    assert_eq!(again.counts(), model.counts());
}

/// What is no number is not merged, wherever it lies.
#[test]
fn an_adapter_with_nan_is_not_merged() {
    let dir = tempfile::tempdir().unwrap();
    let files = tiny(dir.path(), &llama(), &Task::CausalLm);
    let setup = setup(Task::CausalLm, Method::Lora, Some(all_linear()));
    let model = Model::load(&files, &setup).unwrap();
    stir(&model);
    let name = "base_model.model.model.layers.1.mlp.gate_proj.lora_B.weight";
    let var = &model.trainable()[name];
    let mut data = numbers(var);
    data[7] = f32::NAN;
    let data = candle_core::Tensor::from_vec(data, var.shape(), var.device()).unwrap();
    var.set(&data).unwrap();
    let out = tempfile::tempdir().unwrap();
    let error = model.merge(MergeBase::Original, out.path(), &[]).unwrap_err().to_string();
    assert!(error.contains("base and adapter hold NaN"), "{error}");
    assert_eq!(std::fs::read_dir(out.path()).unwrap().count(), 0);
}

/// A pooler that the base lacks is trained and saved with the head; another seed at loading does
/// not matter.
#[test]
fn a_pooler_that_the_base_lacks_is_saved_with_the_head() {
    let dir = tempfile::tempdir().unwrap();
    let files = tiny(dir.path(), &bert(), &classes(2));
    let path = &files.weights[0].1;
    let mut base = tensors(path);
    base.retain(|name, _| !name.contains("pooler") && !name.contains("classifier"));
    candle_core::safetensors::save(&base, path).unwrap();
    let batch = batch(&[&[1, 5, 9], &[4, 4]]);
    for method in [Method::Lora, Method::Qlora] {
        let setup = setup(classes(2), method, Some(all_linear()));
        let model = Model::load(&files, &setup).unwrap();
        assert_eq!(model.fresh_modules(), ["bert.pooler.dense", "classifier"]);
        stir(&model);
        let logits = numbers(&model.logits(&batch).unwrap());
        let out = tempfile::tempdir().unwrap();
        model.save_adapter(out.path(), "base").unwrap();
        let text = std::fs::read_to_string(out.path().join("adapter_config.json")).unwrap();
        let settings: serde_json::Value = serde_json::from_str(&text).unwrap();
        let saved = serde_json::json!(["classifier", "bert.pooler.dense"]);
        assert_eq!(settings["modules_to_save"], saved);
        // Else PEFT would put an adapter on it, because `dense` names it too.
        assert_eq!(settings["exclude_modules"], serde_json::json!(["bert.pooler.dense"]));

        let other = Setup { seed: 0, ..setup };
        let again = Model::load_trained(&files, &other, &adapter(out.path())).unwrap();
        assert_eq!(numbers(&again.logits(&batch).unwrap()), logits);
        assert!(again.fresh_modules().is_empty());
        let merged = tempfile::tempdir().unwrap();
        again.merge(MergeBase::Dequantized, merged.path(), &[]).unwrap();
        let whole = super::files(
            merged.path().join("config.json"),
            merged.path().join("model.safetensors"),
        );
        let setup = super::setup(classes(2), Method::Full, None);
        let whole = Model::load(&whole, &setup).unwrap();
        assert!(relative(&numbers(&whole.logits(&batch).unwrap()), &logits) < 1e-4);
    }
}

/// Fully trained weights come back as they were, with class names.
#[test]
fn full_weights_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let files = tiny(dir.path(), &bert(), &classes(3));
    let setup = setup(classes(3), Method::Full, None);
    let model = Model::load(&files, &setup).unwrap();
    let mut batch = batch(&[&[1, 5, 9], &[4, 4]]);
    batch.token_type_ids = Some(vec![0, 1, 1, 0, 0, 0]);
    batch.labels = Labels::Classes(vec![2, 0]);
    let logits = numbers(&model.logits(&batch).unwrap());
    let out = tempfile::tempdir().unwrap();
    let names = ["bad", "so-so", "good"].map(str::to_owned);
    model.save_full(out.path(), &names).unwrap();
    let trained = pair(out.path(), ["config.json", "model.safetensors"]);
    let again = Model::load_trained(&files, &setup, &trained).unwrap();
    assert_eq!(numbers(&again.logits(&batch).unwrap()), logits);
    let text = std::fs::read_to_string(out.path().join("config.json")).unwrap();
    let written: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(written["architectures"][0], "BertForSequenceClassification");
    assert_eq!(written["id2label"]["1"], "so-so");
    assert_eq!(written["label2id"]["good"], 2);
    assert_eq!(written["torch_dtype"], "float32");
    assert!(model.save_full(out.path(), &names[..2]).is_err());
    assert!(model.save_adapter(out.path(), "").is_err());
    assert!(model.merge(MergeBase::Original, out.path(), &names).is_err());
}

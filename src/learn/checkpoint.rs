//! A training that stopped between two updates, to go on to the same bytes.
//!
//! Order, dropout and initial values are functions of the seed, so all that there is to keep are
//! the weights, the optimizer's moments, the best weights so far, and what has been counted.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};

use super::files::{Weights, write};
use super::gate::Seen;
use super::model::Model;
use super::trainer::{History, State};
use crate::digest::Digest;

const TENSORS: &str = "tensors.safetensors";
const STATE: &str = "state.json";

/// What has been counted, beside the tensors.
#[derive(Debug, Serialize, Deserialize)]
struct Counted {
    /// Updates of the optimizer.
    updates: u64,
    /// Micro-batches so far: they seed the dropout.
    micro: u64,
    /// The best value so far, and its step.
    best: Option<(f64, u64)>,
    /// The last step whose evaluation was looked at for the best.
    offered: u64,
    gate: Seen,
    history: History,
    /// Content of the tensors' file, against a damaged disk.
    tensors: Digest,
}

/// Writes the state into an empty folder.
pub(super) fn save(state: &State, model: &Model, dir: &Path) -> Result<()> {
    let mut tensors = BTreeMap::new();
    for (name, var) in model.trainable() {
        tensors.insert(format!("weight/{name}"), var.as_tensor().detach());
    }
    tensors.extend(state.optimizer.moments(model)?);
    if let Some((_, _, best)) = &state.kept.found {
        tensors.extend(best.iter().map(|(name, t)| (format!("best/{name}"), t.clone())));
    }
    write(&dir.join(TENSORS), tensors)?;
    let counted = Counted {
        updates: state.optimizer.updates(),
        micro: state.micro,
        best: state.kept.found.as_ref().map(|(value, step, _)| (*value, *step)),
        offered: state.kept.last,
        gate: state.gate.seen(),
        history: state.history.clone(),
        tensors: Digest::of_file(&dir.join(TENSORS))?.0,
    };
    let path = dir.join(STATE);
    std::fs::write(&path, serde_json::to_vec(&counted)?)
        .with_context(|| format!("writing {}", path.display()))
}

/// A checkpoint that was read and fits a model.
#[derive(Debug)]
pub struct Checkpoint {
    counted: Counted,
    weights: Weights,
}

impl Checkpoint {
    /// Reads what an [`Observer`](super::Observer) had saved into a folder.
    ///
    /// # Errors
    /// When it is damaged, or of another model; the model is not changed.
    pub fn open(dir: &Path, model: &Model) -> Result<Self> {
        let text = std::fs::read(dir.join(STATE)).context("its state cannot be read")?;
        let counted: Counted = serde_json::from_slice(&text).context("its state is damaged")?;
        let path = dir.join(TENSORS);
        ensure!(Digest::of_file(&path)?.0 == counted.tensors, "its tensors are damaged");
        let weights = Weights::open(&[(TENSORS.to_owned(), path)])?;
        for (name, var) in model.trainable() {
            let flat = [var.elem_count()];
            let mut wanted =
                vec![("weight", var.dims()), ("mean", &flat[..]), ("square", &flat[..])];
            if counted.best.is_some() {
                wanted.push(("best", var.dims()));
            }
            for (kind, dims) in wanted {
                let found = weights.shape(&format!("{kind}/{name}"));
                ensure!(found == Some(dims), "it is of another model: `{kind}/{name}`");
            }
        }
        Ok(Self { counted, weights })
    }

    /// Updates that were done.
    pub fn steps(&self) -> u64 {
        self.counted.history.steps.len() as u64
    }

    /// Brings the model and a fresh state to where it was written.
    pub(super) fn load(self, state: &mut State, model: &Model) -> Result<()> {
        let Self { counted, weights } = self;
        let get = |kind: &str, name: &str| weights.get(&format!("{kind}/{name}"));
        for (name, var) in model.trainable() {
            var.set(&get("weight", name)?)?;
        }
        model.put()?;
        state.optimizer.go_on(model, counted.updates, &get)?;
        if let Some((value, step)) = counted.best {
            let names = model.trainable().keys();
            let best = names.map(|name| Ok((name.clone(), get("best", name)?)));
            state.kept.found = Some((value, step, best.collect::<Result<_>>()?));
        }
        state.kept.last = counted.offered;
        state.micro = counted.micro;
        state.gate.go_on(counted.gate);
        state.history = counted.history;
        Ok(())
    }
}

//! When the GPU's memory is too small: what was asked of it, and what would fit.

use super::State;
use crate::learn::batch::Packed;
use crate::learn::cuda::arena::OutOfMemory;
use crate::source::Fault;

/// A number of rows of one length, of which some tokens are predicted.
#[derive(Clone, Copy)]
struct Size {
    rows: usize,
    length: usize,
    /// Targets of each row.
    targets: f64,
}

fn gib(bytes: usize) -> f64 {
    bytes as f64 / (1 << 30) as f64
}

/// What to say where the GPU, of so much memory and so much of it free, has no room for the model.
pub(super) fn too_small(e: anyhow::Error, (total, free): (usize, usize)) -> anyhow::Error {
    if e.downcast_ref::<OutOfMemory>().is_none() {
        return e.context("bringing the model to the GPU");
    }
    let message = format!(
        "the model does not fit into the GPU's memory: {:.1} of its {:.1} GiB were free",
        gib(free),
        gib(total)
    );
    Fault::new(message)
        .help(
            "train adapters instead of all weights (`method: lora`), on weights of 4 bits \
             (`method: qlora`), or a smaller model; `nvidia-smi` shows what else uses the GPU",
        )
        .into()
}

/// The largest number up to `most` that fits, if 1 does; what is larger needs more.
fn largest(most: usize, mut fits: impl FnMut(usize) -> bool) -> Option<usize> {
    let (mut low, mut high) = (0, most + 1);
    while low + 1 < high {
        let middle = low.midpoint(high);
        if fits(middle) { low = middle } else { high = middle }
    }
    (low > 0).then_some(low)
}

impl State {
    /// Says what was asked for and what would fit; other errors stay as they are.
    pub(super) fn explain(
        &mut self,
        e: anyhow::Error,
        packed: &Packed,
        targets: usize,
        training: bool,
    ) -> anyhow::Error {
        // What was begun must not go on into what comes next.
        let _ = self.device.synchronize();
        let _ = self.away.copies.synchronize();
        self.saved.release(0);
        self.scratch.release(0);
        if e.downcast_ref::<OutOfMemory>().is_none() {
            return e;
        }
        // A smaller batch may need less of one and more of the other.
        let _ = self.saved.empty().and(self.scratch.empty());
        let (total, room) = self.device.memory().unwrap_or((0, 0));
        // The last of the memory cannot be had in one piece.
        let enough = room.saturating_sub(total / 64);
        let asked = Size {
            rows: packed.starts.len() - 1,
            length: packed.rows().map(|r| r.len()).max().unwrap_or(1),
            targets: targets as f64 / (packed.starts.len() - 1) as f64,
        };
        let (rows, length, here) = (asked.rows, asked.length, self.checkpointing);
        let message = format!(
            "the GPU's memory is too small: a batch of {rows} rows of up to {length} tokens needs \
             {:.1} GiB beside the {:.1} GiB of the model, and {:.1} of its {:.1} GiB are left",
            gib(self.need(asked, training, here)),
            gib(self.weights.mapped()),
            gib(room),
            gib(total),
        );
        let mut fits = |rows, length, checkpointing| {
            let targets = asked.targets * length as f64 / asked.length as f64;
            self.need(Size { rows, length, targets }, training, checkpointing) <= enough
        };
        let mut ways = Vec::new();
        if training && !here {
            match largest(rows, |rows| fits(rows, length, true)) {
                Some(most) if most == rows => {
                    ways.push("`gradient_checkpointing: true`".to_owned())
                }
                Some(most) => {
                    ways.push(format!("`batch_size: {most}` with `gradient_checkpointing: true`"))
                }
                None => {}
            }
        }
        if let Some(most) = largest(rows - 1, |rows| fits(rows, length, here)) {
            ways.push(format!("`batch_size: {most}`"));
        }
        if let Some(most) = largest(length / 8, |eighth| fits(rows, 8 * eighth, here)) {
            ways.push(format!("rows of at most {} tokens (`max_length`)", 8 * most));
        }
        let help = match ways.is_empty() {
            true => "nothing of this model fits: take a smaller one, or weights of \
                     4 bits (`method: qlora`)"
                .to_owned(),
            false => format!(
                "this would fit: {}; `gradient_accumulation` raised by as much as `batch_size` is \
                 lowered gives the same result",
                ways.join(", or ")
            ),
        };
        Fault::new(message).help(help).into()
    }

    /// Bytes that a batch takes beside the model: the pass is gone through without doing anything.
    fn need(&mut self, size: Size, training: bool, checkpointing: bool) -> usize {
        let Size { rows, length, targets } = size;
        let all = rows * length;
        let packed = Packed {
            ids: vec![0; all],
            types: vec![0; all],
            starts: (0..=rows).map(|i| i * length).collect(),
            positions: (0..rows).flat_map(|_| 0..length as u32).collect(),
            hidden: Vec::new(),
        };
        let targets = vec![0; ((targets * rows as f64).ceil() as usize).clamp(1, all)];
        let before = (self.checkpointing, self.rope, self.weights.mark());
        self.checkpointing = checkpointing;
        self.dry(true);
        let ran = match training {
            true => self.step(&packed, &targets, &targets, 0, 1.0).map(drop),
            false => self.evaluate(&packed, &targets, Some(&targets)).map(drop),
        };
        let bytes = self.saved.counted() + self.scratch.counted();
        let more = self.weights.mark() - before.2;
        self.weights.release(before.2);
        self.saved.release(0);
        self.scratch.release(0);
        self.dry(false);
        (self.checkpointing, self.rope) = (before.0, before.1);
        // What cannot be gone through does not fit.
        if ran.is_ok() { bytes + more } else { usize::MAX }
    }

    fn dry(&self, on: bool) {
        self.device.dry.set(on);
        for arena in [&self.weights, &self.saved, &self.scratch] {
            arena.count(on);
        }
    }
}

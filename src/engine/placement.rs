//! Where a step computes, and what it takes from the machine there.

use super::session::Options;
use crate::pipeline::Instance;
use crate::step::{Cpu, Device, Needs};

impl Options {
    /// What a step needs here: what the file says, else what its kind says. Where models run on
    /// GPUs, a kind that can takes one, and its share of the processor, so that as many points of a
    /// sweep run at once as there are GPUs.
    pub fn needs(&self, instance: &Instance) -> Needs {
        let mut needs = instance.needs();
        if self.device == Device::Cuda && instance.kind.on_gpu {
            needs.gpu = instance.policy.gpu.unwrap_or(1);
            if needs.cpu == Cpu::All && needs.gpu > 0 {
                needs.cpu = Cpu::N((self.jobs / self.gpus.len().max(1)).max(1));
            }
        }
        needs
    }

    /// The device and the arithmetic of a step's model, as they stand in its key.
    pub(super) fn place(&self, instance: &Instance) -> (Device, &str) {
        let gpu =
            self.device == Device::Cuda && instance.kind.on_gpu && instance.policy.gpu != Some(0);
        if gpu { (Device::Cuda, &self.compute) } else { (Device::Cpu, "f32") }
    }
}

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

    /// The device and the arithmetic of a step's model, as they stand in its key. A step that is
    /// left on the CPU where others take GPUs computes in f32, as does a kind that has no choice.
    pub(super) fn place(&self, instance: &Instance) -> (Device, &str) {
        match (self.device, instance.kind.on_gpu) {
            (Device::Cuda, true) if instance.policy.gpu != Some(0) => (Device::Cuda, &self.compute),
            (Device::Cpu, true) => (Device::Cpu, &self.compute),
            _ => (Device::Cpu, "f32"),
        }
    }
}

//! What the runner has to lend: CPU slots and GPUs.

use crate::source::Fault;
use crate::step::{Cpu, Needs};

/// What a running step was lent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Grant {
    /// CPU slots; as many threads.
    pub(super) threads: usize,
    pub(super) gpus: Vec<u32>,
}

/// What is left to lend.
#[derive(Debug)]
pub(super) struct Slots {
    jobs: usize,
    cpu: usize,
    gpus: Vec<u32>,
    all_gpus: usize,
}

impl Slots {
    pub(super) fn new(jobs: usize, gpus: &[u32]) -> Self {
        let jobs = jobs.max(1);
        Self { jobs, cpu: jobs, gpus: gpus.to_vec(), all_gpus: gpus.len() }
    }

    /// CPU slots that a step takes here. One that must be alone takes all; none takes none, so
    /// that no step can run beside one that must be alone.
    fn cpu(&self, needs: &Needs) -> usize {
        match needs.cpu {
            Cpu::N(n) if !needs.exclusive => n.clamp(1, self.jobs),
            _ => self.jobs,
        }
    }

    /// Whether the step could run here at all.
    pub(super) fn allows(&self, needs: &Needs) -> Result<(), Fault> {
        if needs.gpu <= self.all_gpus {
            return Ok(());
        }
        let plural = |n| if n == 1 { "GPU" } else { "GPUs" };
        let (wants, has) = (needs.gpu, self.all_gpus);
        let fault = Fault::new(format!("it needs {wants} {}, and there are {has}", plural(wants)));
        Err(fault.help("run it on a machine with GPUs, or choose settings that run on the CPU"))
    }

    /// Lends what a step needs, if it is free.
    pub(super) fn take(&mut self, needs: &Needs) -> Option<Grant> {
        let threads = self.cpu(needs);
        if threads > self.cpu || needs.gpu > self.gpus.len() {
            return None;
        }
        self.cpu -= threads;
        Some(Grant { threads, gpus: self.gpus.drain(..needs.gpu).collect() })
    }

    /// Whether nothing is free, so that no step could start.
    pub(super) fn is_full(&self) -> bool {
        self.cpu == 0
    }

    /// Takes back what was lent.
    pub(super) fn give(&mut self, grant: Grant) {
        self.cpu += grant.threads;
        self.gpus.extend(grant.gpus);
        self.gpus.sort_unstable();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_waits_for_all_and_exclusive_is_alone() {
        let mut slots = Slots::new(4, &[0, 1]);
        let one = slots.take(&Needs::ONE).unwrap();
        assert_eq!(slots.take(&Needs::ALL), None);
        assert_eq!(slots.take(&Needs { exclusive: true, ..Needs::ONE }), None);
        let gpu = slots.take(&Needs { gpu: 1, ..Needs::ONE }).unwrap();
        assert_eq!((gpu.threads, gpu.gpus.as_slice()), (1, &[0][..]));
        slots.give(one);
        slots.give(gpu);
        let all = slots.take(&Needs { exclusive: true, ..Needs::ONE }).unwrap();
        assert_eq!(all.threads, 4);
        assert_eq!(slots.take(&Needs::ONE), None);
        assert!(slots.allows(&Needs { gpu: 3, ..Needs::ONE }).is_err());
    }

    #[test]
    fn more_than_there_is_means_all_there_is() {
        let mut slots = Slots::new(2, &[]);
        assert_eq!(slots.take(&Needs { cpu: Cpu::N(64), ..Needs::ONE }).unwrap().threads, 2);
    }
}

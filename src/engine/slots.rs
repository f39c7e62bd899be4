//! What the runner has to lend: CPU slots, memory, GPUs, and whatever else a project declares.

use std::collections::BTreeMap;

use super::Options;
use super::gpu::Gpu;
use crate::source::Fault;
use crate::step::{Cpu, Needs};

/// What a running step was lent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Grant {
    /// CPU slots; as many threads.
    pub(super) threads: usize,
    pub(super) gpus: Vec<Gpu>,
    memory: u64,
    named: BTreeMap<String, u64>,
}

/// What is left to lend.
#[derive(Debug)]
pub(super) struct Slots {
    jobs: usize,
    cpu: usize,
    gpus: Vec<Gpu>,
    /// Bytes; without end where nothing is known about this machine.
    memory: u64,
    named: BTreeMap<String, u64>,
}

impl Slots {
    pub(super) fn new(options: &Options) -> Self {
        let (jobs, gpus) = (options.jobs.max(1), options.gpus.clone());
        let memory = options.memory.unwrap_or(u64::MAX);
        Self { jobs, cpu: jobs, gpus, memory, named: options.resources.clone() }
    }

    /// CPU slots that a step takes here. One that must be alone takes all; none takes none, so
    /// that no step can run beside one that must be alone.
    fn cpu(&self, needs: &Needs) -> usize {
        match needs.cpu {
            Cpu::N(n) if !needs.exclusive => n.clamp(1, self.jobs),
            _ => self.jobs,
        }
    }

    /// Lends what a step needs, if it is free.
    pub(super) fn take(&mut self, needs: &Needs) -> Option<Grant> {
        let (threads, memory) = (self.cpu(needs), needs.memory.unwrap_or(0));
        let free = |name: &String| self.named.get(name).copied().unwrap_or(0);
        if threads > self.cpu
            || needs.gpu > self.gpus.len()
            || memory > self.memory
            || needs.named.iter().any(|(name, n)| *n > free(name))
        {
            return None;
        }
        self.cpu -= threads;
        self.memory -= memory;
        for (name, n) in &needs.named {
            if let Some(left) = self.named.get_mut(name) {
                *left -= n;
            }
        }
        let gpus = self.gpus.drain(..needs.gpu).collect();
        Some(Grant { threads, gpus, memory, named: needs.named.clone() })
    }

    /// Whether nothing is free, so that no step could start.
    pub(super) fn is_full(&self) -> bool {
        self.cpu == 0
    }

    /// Takes back what was lent.
    pub(super) fn give(&mut self, grant: Grant) {
        self.cpu += grant.threads;
        self.memory += grant.memory;
        for (name, n) in grant.named {
            *self.named.entry(name).or_default() += n;
        }
        self.gpus.extend(grant.gpus);
        self.gpus.sort_unstable();
    }
}

impl Options {
    /// What a step asks for beyond all that there is, like `1 GPU, and there is none`; nothing if
    /// it can run here. CPU slots are never short: a step that asks for more gets all.
    pub fn shortage(&self, needs: &Needs) -> Vec<String> {
        let there = |have: String| match have.as_str() {
            "0" => "there is none".to_owned(),
            "1" => "there is only 1".to_owned(),
            have if have.ends_with("GiB") => format!("there is only {have}"),
            have => format!("there are only {have}"),
        };
        let mut short = Vec::new();
        if needs.gpu > self.gpus.len() {
            let (wants, s) = (needs.gpu, if needs.gpu == 1 { "" } else { "s" });
            let have = there(self.gpus.len().to_string());
            let sought = match self.gpus_sought.as_str() {
                "" => String::new(),
                sought => format!(" ({sought})"),
            };
            short.push(format!("{wants} GPU{s}, and {have}{sought}"));
        }
        if let (Some(wants), Some(have)) = (needs.memory, self.memory)
            && wants > have
        {
            let gib = |bytes: u64| format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30));
            short.push(format!("{} of memory, and {}", gib(wants), there(gib(have))));
        }
        for (name, &wants) in &needs.named {
            let have = self.resources.get(name).copied().unwrap_or(0);
            if wants > have {
                short.push(format!("{wants} of `{name}`, and {}", there(have.to_string())));
            }
        }
        short
    }

    /// Refuses a step that could never run here.
    pub(super) fn allows(&self, needs: &Needs) -> Result<(), Fault> {
        let short = self.shortage(needs);
        if short.is_empty() {
            return Ok(());
        }
        let fault = Fault::new(format!("it needs {}", short.join("; ")));
        Err(fault.help("run it on a larger machine, or let it ask for less"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(jobs: usize, gpus: &[u32]) -> Options {
        let resources = BTreeMap::from([("licence".to_owned(), 2)]);
        let memory = Some(8 << 30);
        let gpus = gpus.iter().copied().map(Gpu::Index).collect();
        let gpus_sought = "looked under the table".to_owned();
        Options { jobs, gpus, gpus_sought, memory, resources, ..Options::default() }
    }

    fn licences(n: u64) -> Needs {
        Needs { named: BTreeMap::from([("licence".to_owned(), n)]), ..Needs::ONE }
    }

    #[test]
    fn all_waits_for_all_and_exclusive_is_alone() {
        let options = options(4, &[0, 1]);
        let mut slots = Slots::new(&options);
        let one = slots.take(&Needs::ONE).unwrap();
        assert_eq!(slots.take(&Needs::ALL), None);
        assert_eq!(slots.take(&Needs { exclusive: true, ..Needs::ONE }), None);
        let gpu = slots.take(&Needs { gpu: 1, ..Needs::ONE }).unwrap();
        assert_eq!((gpu.threads, gpu.gpus.as_slice()), (1, &[Gpu::Index(0)][..]));
        slots.give(one);
        slots.give(gpu);
        let all = slots.take(&Needs { exclusive: true, ..Needs::ONE }).unwrap();
        assert_eq!(all.threads, 4);
        assert_eq!(slots.take(&Needs::ONE), None);
        assert!(options.allows(&Needs { gpu: 3, ..Needs::ONE }).is_err());
    }

    #[test]
    fn more_slots_than_there_are_means_all_there_are() {
        let mut slots = Slots::new(&options(2, &[]));
        assert_eq!(slots.take(&Needs { cpu: Cpu::N(64), ..Needs::ONE }).unwrap().threads, 2);
    }

    #[test]
    fn memory_and_named_resources_are_lent_and_given_back() {
        let options = options(8, &[]);
        let mut slots = Slots::new(&options);
        let gib = |n: u64| Needs { memory: Some(n << 30), ..Needs::ONE };
        let six = slots.take(&gib(6)).unwrap();
        assert_eq!(slots.take(&gib(3)), None);
        let two = slots.take(&gib(2)).unwrap();
        // What says nothing of memory runs all the same.
        let licence = slots.take(&licences(2)).unwrap();
        assert_eq!(slots.take(&licences(1)), None);
        for grant in [six, two, licence] {
            slots.give(grant);
        }
        let (eight, licence) = (slots.take(&gib(8)), slots.take(&licences(1)));
        assert!(eight.is_some() && licence.is_some());
    }

    #[test]
    fn what_is_short_is_named_with_what_there_is() {
        let options = options(1, &[]);
        let needs = Needs { gpu: 2, memory: Some(12 << 30), ..licences(3) };
        assert_eq!(
            options.shortage(&needs),
            [
                "2 GPUs, and there is none (looked under the table)",
                "12.0 GiB of memory, and there is only 8.0 GiB",
                "3 of `licence`, and there are only 2",
            ]
        );
        assert!(options.shortage(&licences(2)).is_empty());
        // Where the system does not say how much memory there is, nothing is refused.
        let blind = Options { memory: None, ..options };
        assert!(blind.shortage(&Needs { memory: Some(u64::MAX), ..Needs::ONE }).is_empty());
    }
}

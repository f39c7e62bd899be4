//! Learning rates by step, as `transformers.get_scheduler` gives them.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How the rate goes from its peak to the end of training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// In a straight line to 0.
    #[default]
    Linear,
    /// Along half a cosine to 0.
    Cosine,
    /// Not at all.
    Constant,
}

/// The learning rate of every step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LearningRate {
    /// The rate at the end of warm-up.
    pub peak: f64,
    /// How it goes on from there.
    pub schedule: Schedule,
    /// Steps of warm-up: the rate rises in a straight line from 0 at step 0.
    pub warmup: u64,
    /// Steps in all.
    pub total: u64,
}

impl LearningRate {
    /// The rate of a step, counted from 0.
    pub fn at(&self, step: u64) -> f64 {
        if step < self.warmup {
            return self.peak * step as f64 / self.warmup as f64;
        }
        let rest = self.total.saturating_sub(self.warmup).max(1) as f64;
        let factor = match self.schedule {
            Schedule::Constant => 1.0,
            Schedule::Linear => self.total.saturating_sub(step) as f64 / rest,
            Schedule::Cosine => {
                let progress = (step - self.warmup) as f64 / rest;
                (0.5 * (1.0 + (std::f64::consts::PI * progress).cos())).max(0.0)
            }
        };
        self.peak * factor
    }
}

/// Steps of warm-up that a ratio means, rounded up as transformers does.
pub fn warmup_steps(ratio: f64, total: u64) -> u64 {
    (ratio * total as f64).ceil() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(schedule: Schedule, warmup: u64, total: u64) -> Vec<f64> {
        let rate = LearningRate { peak: 1.0, schedule, warmup, total };
        (0..=total).map(|s| rate.at(s)).collect()
    }

    #[test]
    fn as_transformers() {
        let linear = rates(Schedule::Linear, 2, 6);
        assert_eq!(linear, [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]);
        assert_eq!(rates(Schedule::Constant, 2, 4), [0.0, 0.5, 1.0, 1.0, 1.0]);
        let cosine = rates(Schedule::Cosine, 1, 5);
        let want = [0.0, 1.0, 0.853_553, 0.5, 0.146_447, 0.0];
        for (got, want) in cosine.iter().zip(want) {
            assert!((got - want).abs() < 1e-6, "{cosine:?}");
        }
        assert_eq!(rates(Schedule::Linear, 0, 2), [1.0, 0.5, 0.0]);
    }

    #[test]
    fn warmup_longer_than_training_never_divides_by_zero() {
        let rate = LearningRate { peak: 1.0, schedule: Schedule::Linear, warmup: 9, total: 3 };
        assert!((0..12).all(|s| rate.at(s).is_finite()));
    }

    #[test]
    fn ratios_round_up() {
        assert_eq!(warmup_steps(0.03, 100), 3);
        assert_eq!(warmup_steps(0.03, 101), 4);
        assert_eq!(warmup_steps(0.0, 101), 0);
    }
}

//! Settings of a run: what decides its weights, and the learning rate of each step.

use serde::{Deserialize, Serialize};

use crate::{
    error::TfmError,
    model::config::ModelConfig,
    prior::{self, PriorConfig},
};

/// Everything that decides the weights of a run, besides the starting point.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PretrainConfig {
    /// Sizes of the model; those of the base when continuing.
    pub model: ModelConfig,
    /// Ranges of the synthetic tables.
    pub prior: PriorConfig,
    /// Optimiser steps.
    pub steps: u64,
    /// Slices per step; each has its own table sizes.
    pub slices_per_step: usize,
    /// Tables per slice.
    pub tables_per_slice: usize,
    /// Seed of weights and tables.
    pub seed: u64,
    /// Worker threads; doesn't change the result.
    pub threads: usize,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Steps of linear warm-up.
    pub warmup_steps: u64,
    /// Decoupled weight decay of matrices.
    pub weight_decay: f64,
    /// Largest gradient norm.
    pub clip_norm: f64,
    /// Steps between validations on the fixed synthetic tables; also done after the last step.
    pub validate_every: u64,
    /// Steps between checkpoints; also written after the last step.
    pub checkpoint_every: u64,
    /// Share of slices drawn from the prior when continuing on a corpus.
    pub replay_share: f64,
    /// How gradients become steps.
    #[serde(default)]
    pub optimiser: Optimiser,
    /// How the learning rate runs over the steps.
    #[serde(default)]
    pub schedule: Schedule,
    /// Digest of the file of the base that the run starts from, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
}

impl PretrainConfig {
    /// Training from scratch with the measured defaults for a model.
    #[must_use]
    pub fn scratch(model: ModelConfig, steps: u64, seed: u64) -> Self {
        Self {
            prior: PriorConfig::for_classes(model.max_classes),
            model,
            steps,
            slices_per_step: 4,
            tables_per_slice: 2,
            seed,
            threads: 1,
            learning_rate: 1.5e-3,
            warmup_steps: 100,
            weight_decay: 1e-3,
            clip_norm: 1.0,
            validate_every: 250,
            checkpoint_every: 250,
            replay_share: 0.25,
            optimiser: Optimiser::AdamW,
            schedule: Schedule::Cosine,
            parent: None,
        }
    }

    /// Continuing from a base on a corpus: a lower rate and a short warm-up.
    #[must_use]
    pub fn continued(model: ModelConfig, steps: u64, seed: u64) -> Self {
        Self { learning_rate: 5e-4, warmup_steps: 20, ..Self::scratch(model, steps, seed) }
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`TfmError::BadConfig`] naming the first field out of range.
    pub fn check(&self) -> Result<(), TfmError> {
        self.model.check()?;
        self.prior.check()?;
        let bad = |field, expected, got: String| Err(TfmError::BadConfig { field, expected, got });
        if self.prior.max_classes > self.model.max_classes {
            return bad(
                "prior.max_classes",
                "at most those of the model",
                self.prior.max_classes.to_string(),
            );
        }
        if self.steps == 0 || self.steps > MAX_STEPS {
            return bad("steps", "from 1 to 100 million", self.steps.to_string());
        }
        for (field, got) in
            [("slices_per_step", self.slices_per_step), ("tables_per_slice", self.tables_per_slice)]
        {
            if got == 0 || got > MAX_SLICE {
                return bad(field, "from 1 to 256", got.to_string());
            }
        }
        if self.threads == 0 || self.threads > MAX_THREADS {
            return bad("threads", "from 1 to 256", self.threads.to_string());
        }
        for (field, got) in [("learning_rate", self.learning_rate), ("clip_norm", self.clip_norm)] {
            if !(got.is_finite() && got > 0.0) {
                return bad(field, "finite and above 0", got.to_string());
            }
        }
        if !(self.weight_decay.is_finite() && self.weight_decay >= 0.0) {
            return bad("weight_decay", "finite and at least 0", self.weight_decay.to_string());
        }
        if !(0.0..=1.0).contains(&self.replay_share) {
            return bad("replay_share", "within [0, 1]", self.replay_share.to_string());
        }
        if self.validate_every == 0 || self.checkpoint_every == 0 {
            return bad("validate_every", "at least 1, as checkpoint_every", "0".into());
        }
        Ok(())
    }

    /// Learning rate of a step counted from 0.
    pub(super) fn rate(&self, step: u64) -> f64 {
        let warm = ((step + 1) as f64 / self.warmup_steps.max(1) as f64).min(1.0);
        let left = match self.schedule {
            Schedule::Cosine => {
                let part = step as f64 / self.steps as f64;
                0.02 + 0.98 * 0.5 * (1.0 + (std::f64::consts::PI * part).cos())
            }
            Schedule::Hold => {
                let falling = (self.steps - self.falls_at()) as f64;
                (self.steps.saturating_sub(step) as f64 / falling).min(1.0)
            }
        };
        self.learning_rate * warm * left
    }

    /// Steps before the rate of [`Schedule::Hold`] falls; fewer than all.
    fn falls_at(&self) -> u64 {
        ((self.steps as f64 * (1.0 - DECAY_PART)) as u64).min(self.steps.saturating_sub(1))
    }

    /// Whether `step` steps of a run of `other` are also the first steps of this one. The number of threads doesn't
    /// change weights, the number of steps not while the rate is held.
    pub(super) fn continues(&self, other: &Self, step: u64) -> bool {
        let steps = match self.schedule {
            Schedule::Hold if step <= self.falls_at().min(other.falls_at()) => self.steps,
            _ => other.steps,
        };
        Self { threads: self.threads, steps, ..other.clone() } == *self
    }

    /// Sizes of the tables that a step from scratch or from a base (counted from 0) draws, slice by slice.
    #[must_use]
    pub fn slices(&self, step: u64) -> Vec<SliceSizes> {
        let sizes = |slice| {
            let mut rng = prior::generator(self.seed, self.stream(step, slice));
            let drawn = prior::draw(&self.prior, self.tables_per_slice, &mut rng);
            SliceSizes {
                tables: drawn.tables,
                rows: drawn.rows,
                context: drawn.context,
                columns: drawn.columns,
                classes: usize::from(drawn.labels.iter().copied().max().unwrap_or(0)) + 1,
            }
        };
        (0..self.slices_per_step).map(sizes).collect()
    }

    /// Number of the generator stream of a slice.
    pub(super) fn stream(&self, step: u64, slice: usize) -> u64 {
        // Stream 0 draws the initial weights.
        1 + step * self.slices_per_step as u64 + slice as u64
    }
}

/// Sizes of the tables of a slice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SliceSizes {
    /// Number of tables.
    pub tables: usize,
    /// Rows of each, the context's first.
    pub rows: usize,
    /// Context rows of each.
    pub context: usize,
    /// Columns of each.
    pub columns: usize,
    /// Most classes of a table.
    pub classes: usize,
}

/// How gradients become steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Optimiser {
    /// AdamW for every tensor (arXiv 1711.05101).
    #[default]
    AdamW,
    /// Orthogonalised momentum for the matrices of blocks, AdamW for the rest.
    Muon,
}

/// How the learning rate runs over the steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Warm-up, then a cosine to 2 %.
    #[default]
    Cosine,
    /// Warm-up, flat, then straight down to 0 over the last [`DECAY_PART`] of the steps (arXiv 2405.18392). Until it
    /// falls the rate doesn't depend on the number of steps, so a run may be resumed with another number.
    Hold,
}

/// Most optimiser steps of a run.
pub const MAX_STEPS: u64 = 100_000_000;
/// Most slices per step and tables per slice.
pub const MAX_SLICE: usize = 256;
/// Most worker threads.
pub const MAX_THREADS: usize = 256;
/// Part of the steps over which [`Schedule::Hold`] lets the rate fall.
pub const DECAY_PART: f64 = 0.3;

#[cfg(test)]
mod tests {
    use super::{PretrainConfig, Schedule};
    use crate::model::config::ModelConfig;

    /// By hand: 10 warm-up steps of 100, flat to step 70, then 30 equal steps down to nought.
    #[test]
    fn held_rate_warms_up_stays_and_falls() {
        let config = PretrainConfig {
            schedule: Schedule::Hold,
            learning_rate: 1.0,
            warmup_steps: 10,
            ..PretrainConfig::scratch(ModelConfig::tiny(), 100, 1)
        };
        for (step, rate) in [(0, 0.1), (4, 0.5), (9, 1.0), (70, 1.0), (85, 0.5), (99, 1.0 / 30.0)] {
            assert!((config.rate(step) - rate).abs() < 1e-12, "step {step}: {}", config.rate(step));
        }
        let longer = PretrainConfig { steps: 1000, threads: 2, ..config.clone() };
        assert!(longer.continues(&config, 70) && config.continues(&longer, 70));
        assert!(!longer.continues(&config, 71) && config.continues(&config, 71));
        let cosine = |steps| PretrainConfig { steps, schedule: Schedule::Cosine, ..config.clone() };
        assert!(!cosine(1000).continues(&cosine(100), 1) && cosine(100).continues(&cosine(100), 1));
        let steeper = PretrainConfig { learning_rate: 2.0, ..config.clone() };
        assert!(!steeper.continues(&config, 1));
        assert!((cosine(100).rate(99) - 0.02).abs() < 0.01);
    }
}

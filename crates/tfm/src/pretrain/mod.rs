//! Pre-training from the synthetic prior, and continued pre-training on a released corpus with replay.
//!
//! One step sums the gradients of a fixed list of slices (a few tables that share their sizes). Slice `i` of step
//! `s` is drawn from (seed, s, i) alone and the sum runs in slice order, so the weights depend neither on the number
//! of worker threads nor on where a run was interrupted. AdamW with linear warm-up and cosine decay, gradient norm
//! clipped. What is validated, exported and returned is a running average of the weights, so that an export from
//! the middle of a run is usable although its learning rate is still high.

pub(crate) mod corpus;
mod state;
mod validation;

use std::{
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use self::state::State;
pub use self::{
    corpus::{Corpus, MAX_CORPUS_CONTEXT, MIN_CORPUS_ROWS},
    state::MAX_CHECKPOINT_BYTES,
    validation::Validation,
};
use crate::{
    error::TfmError,
    model::{Model, config::ModelConfig},
    prior::PriorConfig,
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

    /// Learning rate of a step counted from 0: warm-up, then cosine to 2 %.
    fn rate(&self, step: u64) -> f64 {
        let warm = ((step + 1) as f64 / self.warmup_steps.max(1) as f64).min(1.0);
        let part = step as f64 / self.steps as f64;
        let cosine = 0.5 * (1.0 + (std::f64::consts::PI * part).cos());
        self.learning_rate * warm * (0.02 + 0.98 * cosine)
    }

    /// Number of the generator stream of a slice.
    fn stream(&self, step: u64, slice: usize) -> u64 {
        // Stream 0 draws the initial weights.
        1 + step * self.slices_per_step as u64 + slice as u64
    }
}
/// Where training starts.
#[derive(Debug, Clone)]
pub enum Start {
    /// Random weights, tables from the prior.
    Scratch,
    /// The weights of a base, tables from a corpus with replay of the prior.
    Continue {
        /// The base.
        base: Box<Model>,
        /// Rows to learn from.
        corpus: Corpus,
    },
}

/// State of a run after a step.
#[derive(Debug)]
pub struct Progress<'a> {
    /// Steps done.
    pub step: u64,
    /// Steps planned.
    pub total: u64,
    /// Loss of this step.
    pub loss: f64,
    /// Exponential moving average of the loss (factor 0.98).
    pub loss_ema: f64,
    /// Newest validation figures.
    pub validation: Option<Validation>,
    /// Whether the validation figures are of this very step.
    pub validated: bool,
    /// Tables per second since the start or the resumption.
    pub tables_per_s: f64,
    /// Seconds left at this speed.
    pub eta_s: f64,
    /// The averaged weights, where a checkpoint is due at this step.
    pub checkpoint: Option<&'a Model>,
}

/// Trains a model; resumes from `checkpoint` if that file exists.
///
/// A run that was killed and resumed gives the same weights as one that wasn't. `now` is a monotonic clock; `stop`
/// ends the run after the current step with the state saved.
///
/// # Errors
/// [`TfmError::BadConfig`], [`TfmError::Mismatch`] for a corpus that doesn't fit, [`TfmError::Format`] for a
/// checkpoint of another run, [`TfmError::Diverged`], [`TfmError::Stopped`], [`TfmError::Io`].
pub fn run(
    config: &PretrainConfig,
    start: &Start,
    checkpoint: Option<&Path>,
    now: &dyn Fn() -> Duration,
    progress: &mut dyn FnMut(&Progress<'_>) -> Result<(), TfmError>,
    stop: &AtomicBool,
) -> Result<Model, TfmError> {
    config.check()?;
    let mut state = State::start(config, start)?;
    if let Some(path) = checkpoint.filter(|p| p.exists()) {
        state.resume(config, path)?;
    }
    let tables = validation::tables(config);
    let (began, first_step) = (now(), state.step);
    while state.step < config.steps {
        let loss = state.advance(config, start)?;
        let last = state.step == config.steps;
        let validated = last || state.step.is_multiple_of(config.validate_every);
        if validated {
            state.validation = Some(validation::validate(&state.averaged(config)?, &tables)?);
        }
        let halted = stop.load(Ordering::Relaxed);
        let due = last || halted || state.step.is_multiple_of(config.checkpoint_every);
        if let (true, Some(path)) = (due, checkpoint) {
            state.save(config, path)?;
        }
        let seconds = (now().saturating_sub(began)).as_secs_f64().max(1e-9);
        let steps_per_s = (state.step - first_step) as f64 / seconds;
        let snapshot = if due { Some(state.averaged(config)?) } else { None };
        progress(&Progress {
            step: state.step,
            total: config.steps,
            loss,
            loss_ema: state.loss_ema,
            validation: state.validation,
            validated,
            tables_per_s: steps_per_s * (config.slices_per_step * config.tables_per_slice) as f64,
            eta_s: (config.steps - state.step) as f64 / steps_per_s,
            checkpoint: snapshot.as_ref(),
        })?;
        if halted && !last {
            return Err(TfmError::Stopped { step: state.step, total: config.steps });
        }
    }
    state.averaged(config)
}

/// Steps done according to a training checkpoint; `None` if the file doesn't exist.
///
/// # Errors
/// [`TfmError::Io`] or [`TfmError::Format`] if it can't be read.
pub fn checkpoint_step(path: &Path) -> Result<Option<u64>, TfmError> {
    if path.exists() { state::saved_step(path).map(Some) } else { Ok(None) }
}

/// Most optimiser steps of a run.
pub const MAX_STEPS: u64 = 100_000_000;
/// Most slices per step and tables per slice.
pub const MAX_SLICE: usize = 256;
/// Most worker threads.
pub const MAX_THREADS: usize = 256;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::{cell::Cell, path::Path, sync::atomic::AtomicBool, time::Duration};

    use super::{Corpus, MAX_SLICE, MAX_STEPS, PretrainConfig, Progress, Start, Validation, run};
    use crate::{
        checkpoint::BaseInfo,
        error::TfmError,
        model::{Model, config::ModelConfig},
        prior::PriorConfig,
    };

    fn config(steps: u64) -> PretrainConfig {
        PretrainConfig {
            prior: PriorConfig {
                max_columns: 5,
                max_context: 48,
                large_context: 64,
                queries: 16,
                ..PriorConfig::default()
            },
            warmup_steps: 5,
            checkpoint_every: 3,
            validate_every: 1000,
            learning_rate: 4e-3,
            ..PretrainConfig::scratch(ModelConfig::tiny(), steps, 11)
        }
    }

    fn bytes(model: &Model) -> Vec<u8> {
        model.to_safetensors(&BaseInfo::default()).unwrap()
    }

    fn train(config: &PretrainConfig, start: &Start, path: Option<&Path>) -> Result<Model, TfmError> {
        run(config, start, path, &|| Duration::ZERO, &mut |_| Ok(()), &AtomicBool::new(false))
    }

    /// A run killed between checkpoints (here: an error out of the callback) resumes to the same weights.
    #[test]
    fn killed_and_resumed_equals_uninterrupted_with_any_number_of_threads() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("training");
        let whole = train(&config(8), &Start::Scratch, None).unwrap();
        let mut kill = |p: &Progress<'_>| {
            if p.step == 5 { Err(TfmError::Diverged { step: 5 }) } else { Ok(()) }
        };
        let halted = run(
            &config(8),
            &Start::Scratch,
            Some(&path),
            &|| Duration::ZERO,
            &mut kill,
            &AtomicBool::new(false),
        );
        assert!(halted.is_err());
        assert_eq!(super::checkpoint_step(&path).unwrap(), Some(3));
        let resumed =
            train(&PretrainConfig { threads: 3, ..config(8) }, &Start::Scratch, Some(&path)).unwrap();
        assert_eq!(bytes(&whole), bytes(&resumed));
        let other = train(&PretrainConfig { seed: 12, ..config(8) }, &Start::Scratch, Some(&path));
        assert!(matches!(other, Err(TfmError::Format { .. })));
    }

    #[test]
    fn stop_saves_and_says_where() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("training");
        let stop = AtomicBool::new(true);
        let halted =
            run(&config(8), &Start::Scratch, Some(&path), &|| Duration::ZERO, &mut |_| Ok(()), &stop);
        assert!(matches!(halted, Err(TfmError::Stopped { step: 1, total: 8 })));
        assert_eq!(super::checkpoint_step(&path).unwrap(), Some(1));
    }

    /// A few seconds of training lower the validation loss clearly below that of the random start.
    #[test]
    fn training_learns_to_predict_in_context() {
        let seen: Cell<Option<Validation>> = Cell::new(None);
        let first: Cell<Option<Validation>> = Cell::new(None);
        let config = PretrainConfig { validate_every: 1, ..config(1) };
        let mut note = |p: &Progress<'_>| {
            first.set(p.validation);
            Ok(())
        };
        let stop = AtomicBool::new(false);
        run(&config, &Start::Scratch, None, &|| Duration::ZERO, &mut note, &stop).unwrap();
        let longer = PretrainConfig { steps: 300, validate_every: 300, checkpoint_every: 300, ..config };
        let mut note = |p: &Progress<'_>| {
            seen.set(p.validation);
            Ok(())
        };
        run(&longer, &Start::Scratch, None, &|| Duration::ZERO, &mut note, &stop).unwrap();
        let (before, after) = (first.get().unwrap(), seen.get().unwrap());
        assert!(after.loss < before.loss - 0.1 && after.auc > 0.53, "{before:?} {after:?}");
    }

    #[test]
    fn continuing_on_a_corpus_moves_the_base_and_is_deterministic() {
        let base = train(&config(2), &Start::Scratch, None).unwrap();
        let corpus = Corpus {
            columns: 2,
            values: (0..400).map(|i| ((i * 37) % 17) as f32 / 8.0 - 1.0).collect(),
            labels: (0..200).map(|i| u8::from(i % 3 == 0)).collect(),
            texts: Some(vec![0.1; 2 * 16]),
        };
        let start = Start::Continue { base: Box::new(base.clone()), corpus: corpus.clone() };
        let config = PretrainConfig { replay_share: 0.5, ..config(3) };
        let tuned = train(&config, &start, None).unwrap();
        assert_ne!(bytes(&base), bytes(&tuned));
        assert_eq!(bytes(&tuned), bytes(&train(&config, &start, None).unwrap()));
        let one_class = Corpus { labels: vec![1; 200], ..corpus };
        let start = Start::Continue { base: Box::new(base), corpus: one_class };
        assert!(matches!(train(&config, &start, None), Err(TfmError::Mismatch { .. })));
    }

    #[test]
    fn limits_hold_at_one_above() {
        assert!(PretrainConfig { steps: MAX_STEPS, ..config(1) }.check().is_ok());
        assert!(PretrainConfig { steps: MAX_STEPS + 1, ..config(1) }.check().is_err());
        assert!(PretrainConfig { tables_per_slice: MAX_SLICE + 1, ..config(1) }.check().is_err());
        assert!(PretrainConfig { learning_rate: f64::INFINITY, ..config(1) }.check().is_err());
    }
}

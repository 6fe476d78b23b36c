//! Pre-training on the prior, from scratch or from a base, and continued pre-training on a released corpus with replay.
//!
//! One step sums the gradients of a fixed list of slices (a few tables that share their sizes). Slice `i` of step
//! `s` is drawn from (seed, s, i) alone and the sum runs in slice order, so the weights depend neither on the number
//! of worker threads nor on where a run was interrupted. AdamW or Muon ([`optimiser`]), linear warm-up and a decay
//! ([`Schedule`]), gradient norm clipped. What is validated, exported and returned is a running average of the
//! weights, so that an export from the middle of a run is usable although its learning rate is still high.

mod config;
pub(crate) mod corpus;
mod optimiser;
mod state;
mod validation;

use std::{
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use self::state::State;
pub use self::{
    config::{
        DECAY_PART, MAX_SLICE, MAX_STEPS, MAX_THREADS, Optimiser, PretrainConfig, Schedule, SliceSizes,
    },
    corpus::{Corpus, MAX_CORPUS_CONTEXT, MIN_CORPUS_ROWS},
    state::MAX_CHECKPOINT_BYTES,
    validation::Validation,
};
use crate::{error::TfmError, model::Model};

/// Where training starts.
#[derive(Debug, Clone)]
pub enum Start {
    /// Random weights, tables from the prior.
    Scratch,
    /// The weights of a base, tables from the prior; classes that the base lacks are added at random.
    Base(Box<Model>),
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::{cell::Cell, path::Path, sync::atomic::AtomicBool, time::Duration};

    use super::{
        Corpus, MAX_SLICE, MAX_STEPS, Optimiser, PretrainConfig, Progress, Schedule, Start, Validation, run,
    };
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

    /// Muon with real episodes, killed twice: while the rate is held the number of steps may change, once it falls not.
    #[test]
    fn held_run_resumes_with_another_length() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("training");
        let long = |steps| PretrainConfig {
            optimiser: Optimiser::Muon,
            schedule: Schedule::Hold,
            prior: PriorConfig { real_share: 0.5, ..config(1).prior },
            ..config(steps)
        };
        let kill_at = |config: &PretrainConfig, at: u64| {
            let mut kill = |p: &Progress<'_>| {
                if p.step == at { Err(TfmError::Diverged { step: at }) } else { Ok(()) }
            };
            let stop = AtomicBool::new(false);
            run(config, &Start::Scratch, Some(&path), &|| Duration::ZERO, &mut kill, &stop).unwrap_err()
        };
        let whole = train(&long(10), &Start::Scratch, None).unwrap();
        kill_at(&long(1000), 5);
        assert_eq!(super::checkpoint_step(&path).unwrap(), Some(3));
        kill_at(&PretrainConfig { threads: 2, ..long(10) }, 9);
        // Step 9 of 10 is after the rate began to fall.
        assert_eq!(super::checkpoint_step(&path).unwrap(), Some(9));
        assert!(matches!(train(&long(20), &Start::Scratch, Some(&path)), Err(TfmError::Format { .. })));
        let resumed = train(&long(10), &Start::Scratch, Some(&path)).unwrap();
        assert_eq!(bytes(&whole), bytes(&resumed));
    }

    /// Continuing on the prior from a base, here for more classes; another base's checkpoint isn't taken up.
    #[test]
    fn starts_from_a_base_with_fewer_classes() {
        let base = train(&config(2), &Start::Scratch, None).unwrap();
        let model = ModelConfig { max_classes: 5, ..ModelConfig::tiny() };
        let wider = PretrainConfig { model, parent: Some("a".into()), ..config(2) };
        let start = Start::Base(Box::new(base));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("training");
        let tuned = train(&wider, &start, Some(&path)).unwrap();
        assert_eq!(tuned.config().max_classes, 5);
        assert_eq!(bytes(&tuned), bytes(&train(&wider, &start, None).unwrap()));
        let other = PretrainConfig { parent: Some("b".into()), ..wider.clone() };
        assert!(matches!(train(&other, &start, Some(&path)), Err(TfmError::Format { .. })));
        let deeper = PretrainConfig { model: ModelConfig { ff_factor: 3, ..wider.model.clone() }, ..wider };
        assert!(matches!(train(&deeper, &start, None), Err(TfmError::Mismatch { .. })));
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

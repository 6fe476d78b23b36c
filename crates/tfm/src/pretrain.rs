//! Pre-training from the synthetic prior, and continued pre-training on a released corpus with replay.
//!
//! One step sums the gradients of a fixed list of slices (a few tables that share their sizes). Slice `i` of step
//! `s` is drawn from (seed, s, i) alone and the sum runs in slice order, so the weights depend neither on the number
//! of worker threads nor on where a run was interrupted. AdamW with linear warm-up and cosine decay, gradient norm
//! clipped. What is validated, exported and returned is a running average of the weights, so that an export from
//! the middle of a run is usable although its learning rate is still high.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use candle_core::{D, Device, Tensor, Var};
use rand::Rng;
use rand_chacha::ChaCha20Rng;
use serde::{Deserialize, Serialize};

use crate::{
    checkpoint::{Floats, read_floats, write_durably, write_floats},
    error::TfmError,
    metrics::roc_auc,
    model::{Model, Tables, config::ModelConfig, trainable},
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
}

impl PretrainConfig {
    /// Training from scratch with the measured defaults for a model.
    #[must_use]
    pub fn scratch(model: ModelConfig, steps: u64, seed: u64) -> Self {
        Self {
            model,
            prior: PriorConfig::default(),
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

/// Encoded rows of a released corpus: post-processing of a private release, never private rows.
#[derive(Debug, Clone, PartialEq)]
pub struct Corpus {
    /// Columns of each row, in canonical order.
    pub columns: usize,
    /// Values `(rows, columns)`, standardised.
    pub values: Vec<f32>,
    /// Class of each row.
    pub labels: Vec<u8>,
    /// Hashed feature texts `(columns, feature_text_dim)`, if the model reads them.
    pub texts: Option<Vec<f32>>,
}

impl Corpus {
    fn check(&self, config: &ModelConfig) -> Result<(), TfmError> {
        let rows = self.labels.len();
        if rows < MIN_CORPUS_ROWS {
            return Err(TfmError::mismatch("corpus rows", format!("at least {MIN_CORPUS_ROWS}"), rows));
        }
        let tables = Tables {
            tables: 1,
            rows,
            columns: self.columns,
            context: 1,
            values: self.values.clone(),
            labels: self.labels.clone(),
            texts: self.texts.clone(),
        };
        tables.check(config)?;
        if self.labels.iter().all(|l| Some(l) == self.labels.first()) {
            return Err(TfmError::mismatch("classes in the corpus", "at least 2", 1));
        }
        Ok(())
    }

    /// Tables of random corpus rows with a fixed column order; a random relabelling per table keeps the model
    /// from tying a class index to a meaning.
    fn draw(&self, tables: usize, queries: usize, classes: usize, rng: &mut ChaCha20Rng) -> Tables {
        let rows = self.labels.len();
        let queries = queries.min(rows / 4);
        let most = (rows / 2).min(MAX_CORPUS_CONTEXT);
        let context = (rng.random_range(32f64.ln()..=(most as f64).ln()).exp().round() as usize).min(most);
        let total = context + queries;
        let mut drawn = Tables {
            tables,
            rows: total,
            columns: self.columns,
            context,
            values: Vec::with_capacity(tables * total * self.columns),
            labels: Vec::with_capacity(tables * total),
            texts: self.texts.as_ref().map(|t| t.repeat(tables)),
        };
        let used = usize::from(self.labels.iter().copied().max().unwrap_or(1)) + 1;
        for _ in 0..tables {
            let shift = rng.random_range(0..used.min(classes));
            for i in rand::seq::index::sample(rng, rows, total) {
                drawn.values.extend_from_slice(&self.values[i * self.columns..(i + 1) * self.columns]);
                // Unwrap safety: labels were checked against max_classes <= 64.
                let label = (usize::from(self.labels[i]) + shift) % used;
                drawn.labels.push(u8::try_from(label).expect("class index below 64"));
            }
        }
        drawn
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
        base: Model,
        /// Rows to learn from.
        corpus: Corpus,
    },
}

/// Figures on the fixed synthetic validation tables.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Validation {
    /// Mean log loss over all query rows.
    pub loss: f64,
    /// Mean area under the ROC curve over tables whose queries have both classes.
    pub auc: f64,
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
    let validation = validation_tables(config);
    let (began, first_step) = (now(), state.step);
    while state.step < config.steps {
        let loss = state.advance(config, start)?;
        let last = state.step == config.steps;
        let validated = last || state.step.is_multiple_of(config.validate_every);
        if validated {
            state.validation = Some(validate(&state.averaged(config)?, &validation)?);
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
    if !path.exists() {
        return Ok(None);
    }
    let (saved, _): (Saved, _) = read_floats("training checkpoint", &read(path)?, MAX_CHECKPOINT_BYTES)?;
    Ok(Some(saved.step))
}

/// Scalars of a training checkpoint.
#[derive(Serialize, Deserialize)]
struct Saved {
    format: String,
    config: PretrainConfig,
    step: u64,
    loss_ema: f64,
    validation: Option<Validation>,
}

/// Weights under training and the optimiser's moments.
struct State {
    step: u64,
    loss_ema: f64,
    validation: Option<Validation>,
    model: Model,
    /// Trained tensors in name order.
    vars: Vec<(String, Var)>,
    /// Weights, first and second moments, all variables end to end.
    weights: Vec<f32>,
    first: Vec<f32>,
    second: Vec<f32>,
    /// Running average of the weights.
    average: Vec<f32>,
}

impl State {
    fn start(config: &PretrainConfig, start: &Start) -> Result<Self, TfmError> {
        let initial = match start {
            Start::Scratch => Model::random(&config.model, &mut prior::generator(config.seed, 0))?,
            Start::Continue { base, corpus } => {
                if base.config() != &config.model {
                    return Err(TfmError::mismatch("model sizes", "those of the base", "others"));
                }
                corpus.check(&config.model)?;
                base.clone()
            }
        };
        let (mut tensors, mut vars, mut weights) = (BTreeMap::new(), Vec::new(), Vec::new());
        for (name, tensor) in initial.tensors() {
            if trainable(name) {
                let var = Var::from_tensor(&tensor.copy()?)?;
                weights.extend(tensor.flatten_all()?.to_vec1::<f32>()?);
                tensors.insert(name.clone(), var.as_tensor().clone());
                vars.push((name.clone(), var));
            } else {
                tensors.insert(name.clone(), tensor.clone());
            }
        }
        let size = weights.len();
        Ok(Self {
            step: 0,
            loss_ema: 0.0,
            validation: None,
            model: Model::from_tensors(&config.model, tensors)?,
            vars,
            average: weights.clone(),
            weights,
            first: vec![0.0; size],
            second: vec![0.0; size],
        })
    }

    /// The averaged weights as a model without training variables.
    fn averaged(&self, config: &PretrainConfig) -> Result<Model, TfmError> {
        let mut tensors = self.model.tensors().clone();
        let mut at = 0;
        for (name, var) in &self.vars {
            let part = &self.average[at..at + var.elem_count()];
            tensors.insert(name.clone(), Tensor::from_slice(part, var.dims(), &Device::Cpu)?);
            at += part.len();
        }
        Model::from_tensors(&config.model, tensors)
    }

    /// One optimiser step; returns its loss.
    fn advance(&mut self, config: &PretrainConfig, start: &Start) -> Result<f64, TfmError> {
        let (loss, mut gradient) = self.gradient(config, start)?;
        let norm = gradient.iter().map(|g| f64::from(*g) * f64::from(*g)).sum::<f64>().sqrt();
        if !(loss.is_finite() && norm.is_finite()) {
            return Err(TfmError::Diverged { step: self.step });
        }
        let shrink = (config.clip_norm / (norm + 1e-6)).min(1.0) as f32;
        gradient.iter_mut().for_each(|g| *g *= shrink);
        self.adam(config, &gradient)?;
        self.loss_ema = if self.step == 0 { loss } else { 0.98 * self.loss_ema + 0.02 * loss };
        self.step += 1;
        Ok(loss)
    }

    /// Mean loss and gradient over the slices of this step, summed in slice order.
    fn gradient(&self, config: &PretrainConfig, start: &Start) -> Result<(f64, Vec<f32>), TfmError> {
        let slices = config.slices_per_step;
        let threads = config.threads.min(slices);
        let work = |worker: usize| -> Result<Vec<(usize, f64, Vec<f32>)>, TfmError> {
            (worker..slices).step_by(threads).map(|s| self.slice(config, start, s)).collect()
        };
        let mut parts = if threads == 1 {
            work(0)?
        } else {
            let work = &work;
            std::thread::scope(|scope| {
                let workers: Vec<_> = (0..threads).map(|w| scope.spawn(move || work(w))).collect();
                let mut parts = Vec::with_capacity(slices);
                for worker in workers {
                    // Unwrap safety: a worker only panics on a defect, which must not pass unseen.
                    parts.extend(worker.join().expect("training worker doesn't panic")?);
                }
                Ok::<_, TfmError>(parts)
            })?
        };
        parts.sort_by_key(|part| part.0);
        let share = 1.0 / slices as f32;
        let (mut loss, mut total) = (0f64, vec![0f32; self.weights.len()]);
        for (_, part_loss, gradient) in &parts {
            loss += part_loss / slices as f64;
            for (t, g) in total.iter_mut().zip(gradient) {
                *t += g * share;
            }
        }
        Ok((loss, total))
    }

    fn slice(
        &self,
        config: &PretrainConfig,
        start: &Start,
        slice: usize,
    ) -> Result<(usize, f64, Vec<f32>), TfmError> {
        let mut rng = prior::generator(config.seed, config.stream(self.step, slice));
        let tables = match start {
            Start::Continue { corpus, .. } if !rng.random_bool(config.replay_share) => {
                corpus.draw(config.tables_per_slice, config.prior.queries, config.model.max_classes, &mut rng)
            }
            _ => prior::draw(&config.prior, config.tables_per_slice, &mut rng),
        };
        let loss = query_loss(&self.model, &tables)?;
        let gradients = loss.backward()?;
        let mut flat = Vec::with_capacity(self.weights.len());
        for (_, var) in &self.vars {
            match gradients.get(var) {
                Some(g) => flat.extend(g.flatten_all()?.to_vec1::<f32>()?),
                None => flat.resize(flat.len() + var.elem_count(), 0.0),
            }
        }
        Ok((slice, f64::from(loss.to_scalar::<f32>()?), flat))
    }

    /// AdamW (arXiv 1711.05101), betas 0.9 and 0.98.
    fn adam(&mut self, config: &PretrainConfig, gradient: &[f32]) -> Result<(), TfmError> {
        const BETA1: f32 = 0.9;
        const BETA2: f32 = 0.98;
        let rate = config.rate(self.step) as f32;
        let time = i32::try_from(self.step + 1).unwrap_or(i32::MAX);
        let (c1, c2) = (1.0 - BETA1.powi(time), 1.0 - BETA2.powi(time));
        let mut at = 0;
        for (_, var) in &self.vars {
            let size = var.elem_count();
            let decay = if var.dims().len() > 1 { rate * config.weight_decay as f32 } else { 0.0 };
            let weights = &mut self.weights[at..at + size];
            let moments = self.first[at..at + size].iter_mut().zip(&mut self.second[at..at + size]);
            for ((w, (m, v)), g) in weights.iter_mut().zip(moments).zip(&gradient[at..at + size]) {
                *m = BETA1 * *m + (1.0 - BETA1) * g;
                *v = BETA2 * *v + (1.0 - BETA2) * g * g;
                *w -= decay * *w + rate * (*m / c1) / ((*v / c2).sqrt() + 1e-8);
            }
            var.set(&Tensor::from_slice(weights, var.dims(), &Device::Cpu)?)?;
            at += size;
        }
        // A short memory at the start, so that the random weights are soon forgotten.
        let keep = AVERAGE_KEEP.min((1 + self.step) as f32 / (10 + self.step) as f32);
        for (a, w) in self.average.iter_mut().zip(&self.weights) {
            *a = keep * *a + (1.0 - keep) * w;
        }
        Ok(())
    }

    fn save(&self, config: &PretrainConfig, path: &Path) -> Result<(), TfmError> {
        let saved = Saved {
            format: FORMAT.to_owned(),
            config: config.clone(),
            step: self.step,
            loss_ema: self.loss_ema,
            validation: self.validation,
        };
        let size = self.weights.len();
        let parts = [
            ("weights", &self.weights),
            ("first", &self.first),
            ("second", &self.second),
            ("average", &self.average),
        ];
        let tensors: Floats =
            parts.into_iter().map(|(name, values)| (name.to_owned(), (vec![size], values.clone()))).collect();
        write_durably(path, &write_floats(&saved, &tensors)?)
    }

    fn resume(&mut self, config: &PretrainConfig, path: &Path) -> Result<(), TfmError> {
        const WHAT: &str = "training checkpoint";
        let (saved, mut tensors): (Saved, Floats) = read_floats(WHAT, &read(path)?, MAX_CHECKPOINT_BYTES)?;
        if saved.format != FORMAT {
            return Err(TfmError::format(WHAT, format!("expected {FORMAT:?}, got {:?}", saved.format)));
        }
        // The number of threads doesn't change the result and may differ.
        if (PretrainConfig { threads: config.threads, ..saved.config }) != *config {
            return Err(TfmError::format(WHAT, "it belongs to a run with another configuration or seed"));
        }
        let size = self.weights.len();
        let mut take = |name: &str| match tensors.remove(name) {
            Some((_, values)) if values.len() == size => Ok(values),
            Some((got, _)) => Err(TfmError::WrongShape { name: name.to_owned(), expected: vec![size], got }),
            None => Err(TfmError::MissingTensor { name: name.to_owned() }),
        };
        let (weights, average) = (take("weights")?, take("average")?);
        (self.first, self.second) = (take("first")?, take("second")?);
        let mut at = 0;
        for (_, var) in &self.vars {
            let part = &weights[at..at + var.elem_count()];
            var.set(&Tensor::from_slice(part, var.dims(), &Device::Cpu)?)?;
            at += part.len();
        }
        (self.weights, self.average) = (weights, average);
        (self.step, self.loss_ema, self.validation) = (saved.step, saved.loss_ema, saved.validation);
        Ok(())
    }
}

/// Mean cross-entropy over all query rows.
fn query_loss(model: &Model, tables: &Tables) -> Result<Tensor, TfmError> {
    let scores = model.scores(tables)?.flatten(0, 1)?;
    let targets: Vec<u32> = tables
        .labels
        .chunks_exact(tables.rows)
        .flat_map(|labels| labels[tables.context..].iter().map(|&l| u32::from(l)))
        .collect();
    let count = targets.len();
    let targets = Tensor::from_vec(targets, (count, 1), &Device::Cpu)?;
    let logs = candle_nn::ops::log_softmax(&scores, D::Minus1)?;
    Ok(logs.gather(&targets, 1)?.mean_all()?.neg()?)
}

/// The fixed validation tables of a run: the same for all seeds with equal prior ranges.
fn validation_tables(config: &PretrainConfig) -> Vec<Tables> {
    let prior = PriorConfig { large_share: 0.0, ..config.prior.clone() };
    (0..VALIDATION_SLICES)
        .map(|i| prior::draw(&prior, 2, &mut prior::generator(VALIDATION_SEED, i)))
        .collect()
}

fn validate(model: &Model, slices: &[Tables]) -> Result<Validation, TfmError> {
    let (mut loss, mut auc, mut scored) = (0f64, 0f64, 0f64);
    for tables in slices {
        loss += f64::from(query_loss(model, tables)?.to_scalar::<f32>()?) / slices.len() as f64;
        let queries = tables.rows - tables.context;
        let classes = model.config().max_classes;
        let scores = model.forward(tables)?;
        for (scores, labels) in
            scores.chunks_exact(queries * classes).zip(tables.labels.chunks_exact(tables.rows))
        {
            let margin: Vec<f64> = scores.chunks_exact(classes).map(|s| f64::from(s[1] - s[0])).collect();
            if let Some(value) = roc_auc(&margin, &labels[tables.context..]) {
                auc += value;
                scored += 1.0;
            }
        }
    }
    Ok(Validation { loss, auc: if scored > 0.0 { auc / scored } else { 0.5 } })
}

fn read(path: &Path) -> Result<Vec<u8>, TfmError> {
    std::fs::read(path).map_err(|source| TfmError::Io {
        action: "reading",
        path: path.display().to_string(),
        source,
    })
}

const FORMAT: &str = "tabmesh-training-1";
/// Longest memory of the running average: about 500 steps.
const AVERAGE_KEEP: f32 = 0.998;
const VALIDATION_SEED: u64 = 0x7461_626d_6573_6800;
const VALIDATION_SLICES: u64 = 24;
/// Most optimiser steps of a run.
pub const MAX_STEPS: u64 = 100_000_000;
/// Most slices per step and tables per slice.
pub const MAX_SLICE: usize = 256;
/// Most worker threads.
pub const MAX_THREADS: usize = 256;
/// Fewest rows of a corpus.
pub const MIN_CORPUS_ROWS: usize = 128;
/// Most context rows of a table drawn from a corpus.
pub const MAX_CORPUS_CONTEXT: usize = 512;
/// Largest training checkpoint, bytes.
pub const MAX_CHECKPOINT_BYTES: usize = 1 << 30;

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
        let start = Start::Continue { base: base.clone(), corpus: corpus.clone() };
        let config = PretrainConfig { replay_share: 0.5, ..config(3) };
        let tuned = train(&config, &start, None).unwrap();
        assert_ne!(bytes(&base), bytes(&tuned));
        assert_eq!(bytes(&tuned), bytes(&train(&config, &start, None).unwrap()));
        let one_class = Corpus { labels: vec![1; 200], ..corpus };
        let start = Start::Continue { base, corpus: one_class };
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

//! The state of a run: weights, optimiser moments, running average; one step, saving and resuming.

use std::{collections::BTreeMap, path::Path};

use candle_core::{Device, Tensor, Var};
use rand::Rng;
use serde::{Deserialize, Serialize};

use super::{PretrainConfig, Start, Validation, optimiser::Moments, validation::query_loss};
use crate::{
    checkpoint::{Floats, read_floats, write_durably, write_floats},
    error::TfmError,
    model::{Model, trainable},
    prior,
};

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
pub(super) struct State {
    pub(super) step: u64,
    pub(super) loss_ema: f64,
    pub(super) validation: Option<Validation>,
    model: Model,
    /// Trained tensors in name order.
    vars: Vec<(String, Var)>,
    /// Weights, all variables end to end.
    weights: Vec<f32>,
    moments: Moments,
    /// Running average of the weights.
    average: Vec<f32>,
}

impl State {
    pub(super) fn start(config: &PretrainConfig, start: &Start) -> Result<Self, TfmError> {
        let initial = match start {
            Start::Scratch => Model::random(&config.model, &mut prior::generator(config.seed, 0))?,
            Start::Base(base) => {
                base.with_classes(config.model.max_classes, &mut prior::generator(config.seed, 0))?
            }
            Start::Continue { base, corpus } => {
                corpus.check(&config.model)?;
                base.as_ref().clone()
            }
        };
        if initial.config() != &config.model {
            return Err(TfmError::mismatch("model sizes", "those of the base", "others"));
        }
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
        Ok(Self {
            step: 0,
            loss_ema: 0.0,
            validation: None,
            model: Model::from_tensors(&config.model, tensors)?,
            moments: Moments::new(&vars, config.optimiser),
            vars,
            average: weights.clone(),
            weights,
        })
    }

    /// The averaged weights as a model without training variables.
    pub(super) fn averaged(&self, config: &PretrainConfig) -> Result<Model, TfmError> {
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
    pub(super) fn advance(&mut self, config: &PretrainConfig, start: &Start) -> Result<f64, TfmError> {
        let (loss, mut gradient) = self.gradient(config, start)?;
        let norm = gradient.iter().map(|g| f64::from(*g) * f64::from(*g)).sum::<f64>().sqrt();
        if !(loss.is_finite() && norm.is_finite()) {
            return Err(TfmError::Diverged { step: self.step });
        }
        let shrink = (config.clip_norm / (norm + 1e-6)).min(1.0) as f32;
        gradient.iter_mut().for_each(|g| *g *= shrink);
        self.apply(config, &gradient)?;
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

    /// Moves the weights along a clipped gradient, and the running average after them.
    fn apply(&mut self, config: &PretrainConfig, gradient: &[f32]) -> Result<(), TfmError> {
        self.moments.step(config, self.step, &mut self.weights, gradient)?;
        self.set_variables()?;
        // A short memory at the start, so that the random weights are soon forgotten.
        let keep = AVERAGE_KEEP.min((1 + self.step) as f32 / (10 + self.step) as f32);
        for (a, w) in self.average.iter_mut().zip(&self.weights) {
            *a = keep * *a + (1.0 - keep) * w;
        }
        Ok(())
    }

    fn set_variables(&self) -> Result<(), TfmError> {
        let mut at = 0;
        for (_, var) in &self.vars {
            let part = &self.weights[at..at + var.elem_count()];
            var.set(&Tensor::from_slice(part, var.dims(), &Device::Cpu)?)?;
            at += part.len();
        }
        Ok(())
    }

    pub(super) fn save(&self, config: &PretrainConfig, path: &Path) -> Result<(), TfmError> {
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
            ("first", &self.moments.first),
            ("second", &self.moments.second),
            ("average", &self.average),
        ];
        let tensors: Floats =
            parts.into_iter().map(|(name, values)| (name.to_owned(), (vec![size], values.clone()))).collect();
        write_durably(path, &write_floats(&saved, &tensors)?)
    }

    pub(super) fn resume(&mut self, config: &PretrainConfig, path: &Path) -> Result<(), TfmError> {
        const WHAT: &str = "training checkpoint";
        let (saved, mut tensors): (Saved, Floats) = read_floats(WHAT, &read(path)?, MAX_CHECKPOINT_BYTES)?;
        if saved.format != FORMAT {
            return Err(TfmError::format(WHAT, format!("expected {FORMAT:?}, got {:?}", saved.format)));
        }
        if !config.continues(&saved.config, saved.step) {
            return Err(TfmError::format(WHAT, "it belongs to a run with another configuration or seed"));
        }
        let size = self.weights.len();
        let mut take = |name: &str| match tensors.remove(name) {
            Some((_, values)) if values.len() == size => Ok(values),
            Some((got, _)) => Err(TfmError::WrongShape { name: name.to_owned(), expected: vec![size], got }),
            None => Err(TfmError::MissingTensor { name: name.to_owned() }),
        };
        let (weights, average) = (take("weights")?, take("average")?);
        (self.moments.first, self.moments.second) = (take("first")?, take("second")?);
        (self.weights, self.average) = (weights, average);
        self.set_variables()?;
        (self.step, self.loss_ema, self.validation) = (saved.step, saved.loss_ema, saved.validation);
        Ok(())
    }
}
/// Steps done according to a training checkpoint.
pub(super) fn saved_step(path: &Path) -> Result<u64, TfmError> {
    let (saved, _): (Saved, _) = read_floats("training checkpoint", &read(path)?, MAX_CHECKPOINT_BYTES)?;
    Ok(saved.step)
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
/// Largest training checkpoint, bytes.
pub const MAX_CHECKPOINT_BYTES: usize = 1 << 30;

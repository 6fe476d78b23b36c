//! The server's optimiser: momentum SGD, Adam, Yogi or Adagrad, a cosine schedule, and an average of the last iterates.
//!
//! A step is taken on the mean gradient divided by the clip norm, so one learning rate means the same at any
//! clip. The rate falls by a cosine to 10 % over the plan's rounds. What is shipped is the mean of the iterates
//! of the last third (tail averaging), which halves the noise that the last steps would leave behind. The whole
//! state is serialisable and a step is a pure function of it, so a restarted round repeats the same step bit for
//! bit. FedAdam follows algorithm 2 of Reddi et al. 2021 (arXiv 2003.00295), without bias correction.

use garde::Validate;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{checks, packed};

/// Why a step can't be taken.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum OptimiserError {
    /// Parameters or gradient of another length than the state.
    #[error("optimiser holds {expected} values, got {got}")]
    Shape {
        /// Length of the state.
        expected: usize,
        /// Length given.
        got: usize,
    },
    /// All planned steps are done.
    #[error("all {steps} planned steps are done")]
    Finished {
        /// Planned steps.
        steps: u32,
    },
    /// A gradient or the resulting parameters aren't finite.
    #[error("step {step} gives a value that is not finite; lower the learning rate")]
    NotFinite {
        /// The step, from 0.
        step: u32,
    },
    /// The clip norm isn't above zero.
    #[error("clip norm must be a finite number above 0, got {got}")]
    BadClip {
        /// The value given.
        got: f64,
    },
}

/// The optimiser of a plan.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema, Validate)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum OptimiserSpec {
    /// Gradient descent with heavy-ball momentum.
    Sgd {
        /// Step on the mean gradient divided by the clip norm, in (0, 1000]; default 4.
        #[serde(default = "default_sgd_rate")]
        #[garde(custom(checks::learning_rate))]
        learning_rate: f64,
        /// Momentum in [0, 1); default 0.9.
        #[serde(default = "default_momentum")]
        #[garde(custom(checks::below_one))]
        momentum: f64,
    },
    /// Adam of Reddi et al. 2021: β₁ = 0.9, β₂ = 0.99, τ = 10⁻³.
    Adam {
        /// Step size, in (0, 1000]; default 0.01.
        #[serde(default = "default_adaptive_rate")]
        #[garde(custom(checks::learning_rate))]
        learning_rate: f64,
    },
    /// Yogi of Reddi et al. 2021: figures as for Adam.
    Yogi {
        /// Step size, in (0, 1000]; default 0.01.
        #[serde(default = "default_adaptive_rate")]
        #[garde(custom(checks::learning_rate))]
        learning_rate: f64,
    },
    /// Adagrad of Reddi et al. 2021: no first moment, τ = 10⁻³.
    Adagrad {
        /// Step size, in (0, 1000]; default 0.01.
        #[serde(default = "default_adaptive_rate")]
        #[garde(custom(checks::learning_rate))]
        learning_rate: f64,
    },
}

impl OptimiserSpec {
    /// Its kind in documents.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Sgd { .. } => "sgd",
            Self::Adam { .. } => "adam",
            Self::Yogi { .. } => "yogi",
            Self::Adagrad { .. } => "adagrad",
        }
    }
}

/// Learning rate of momentum SGD if the plan names none.
#[must_use]
pub fn default_sgd_rate() -> f64 {
    4.0
}

/// Momentum if the plan names none.
#[must_use]
pub fn default_momentum() -> f64 {
    0.9
}

/// Learning rate of the adaptive optimisers if none is named.
#[must_use]
pub fn default_adaptive_rate() -> f64 {
    0.01
}

impl Default for OptimiserSpec {
    fn default() -> Self {
        Self::Sgd { learning_rate: default_sgd_rate(), momentum: default_momentum() }
    }
}

/// The optimiser's state between rounds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServerOptimiser {
    spec: OptimiserSpec,
    steps: u32,
    done: u32,
    #[serde(with = "packed")]
    first: Vec<f64>,
    #[serde(with = "packed")]
    second: Vec<f64>,
    #[serde(with = "packed")]
    tail: Vec<f64>,
    tail_count: u32,
}

impl ServerOptimiser {
    /// An optimiser for `steps` steps (rounds) over `len` parameters.
    #[must_use]
    pub fn new(spec: OptimiserSpec, steps: u32, len: usize) -> Self {
        let second = match spec {
            OptimiserSpec::Sgd { .. } => Vec::new(),
            OptimiserSpec::Adam { .. } | OptimiserSpec::Yogi { .. } | OptimiserSpec::Adagrad { .. } => {
                vec![0.0; len]
            }
        };
        Self { spec, steps, done: 0, first: vec![0.0; len], second, tail: vec![0.0; len], tail_count: 0 }
    }

    /// Steps taken.
    #[must_use]
    pub fn done(&self) -> u32 {
        self.done
    }

    /// Takes one step: parameters after it, and the optimiser's state after it.
    ///
    /// `params` are the current iterate, `gradient` the mean gradient in the same units, `clip_norm` the norm
    /// one unit's gradient was clipped to. An abandoned round takes no step: see [`Self::skip`].
    ///
    /// # Errors
    /// [`OptimiserError`] for wrong lengths, a clip norm out of range, more steps than planned, or a result that
    /// isn't finite; nothing changes then.
    pub fn step(
        &self,
        params: &[f64],
        gradient: &[f64],
        clip_norm: f64,
    ) -> Result<(Vec<f64>, Self), OptimiserError> {
        for got in [params.len(), gradient.len()] {
            if got != self.first.len() {
                return Err(OptimiserError::Shape { expected: self.first.len(), got });
            }
        }
        if self.done >= self.steps {
            return Err(OptimiserError::Finished { steps: self.steps });
        }
        if !(clip_norm.is_finite() && clip_norm > 0.0) {
            return Err(OptimiserError::BadClip { got: clip_norm });
        }
        let mut next = self.clone();
        let factor = cosine(self.done, self.steps);
        let direction = next.direction(gradient, clip_norm);
        let rate = factor * self.rate();
        let moved: Vec<f64> = params.iter().zip(&direction).map(|(p, d)| p - rate * d).collect();
        if moved.iter().chain(&next.first).chain(&next.second).any(|v| !v.is_finite()) {
            return Err(OptimiserError::NotFinite { step: self.done });
        }
        next.record(&moved);
        Ok((moved, next))
    }

    /// Counts an abandoned round: the schedule goes on, the iterate stays.
    ///
    /// # Errors
    /// [`OptimiserError`] for a wrong length or more steps than planned.
    pub fn skip(&self, params: &[f64]) -> Result<Self, OptimiserError> {
        if params.len() != self.first.len() {
            return Err(OptimiserError::Shape { expected: self.first.len(), got: params.len() });
        }
        if self.done >= self.steps {
            return Err(OptimiserError::Finished { steps: self.steps });
        }
        let mut next = self.clone();
        next.record(params);
        Ok(next)
    }

    /// What to ship: the mean of the iterates of the last third so far, or `params` while there is none.
    #[must_use]
    pub fn averaged(&self, params: &[f64]) -> Vec<f64> {
        if self.tail_count == 0 { params.to_vec() } else { self.tail.clone() }
    }

    fn rate(&self) -> f64 {
        match self.spec {
            OptimiserSpec::Sgd { learning_rate, .. }
            | OptimiserSpec::Adam { learning_rate }
            | OptimiserSpec::Yogi { learning_rate }
            | OptimiserSpec::Adagrad { learning_rate } => learning_rate,
        }
    }

    /// Updates the moments and gives the descent direction.
    fn direction(&mut self, gradient: &[f64], clip_norm: f64) -> Vec<f64> {
        match self.spec {
            OptimiserSpec::Sgd { momentum, .. } => {
                for (velocity, g) in self.first.iter_mut().zip(gradient) {
                    *velocity = momentum * *velocity + g / clip_norm;
                }
                self.first.clone()
            }
            OptimiserSpec::Adam { .. } | OptimiserSpec::Yogi { .. } | OptimiserSpec::Adagrad { .. } => {
                let beta1 = if matches!(self.spec, OptimiserSpec::Adagrad { .. }) { 0.0 } else { ADAM_BETA1 };
                for ((m, v), g) in self.first.iter_mut().zip(&mut self.second).zip(gradient) {
                    let g = g / clip_norm;
                    let square = g * g;
                    *m = beta1 * *m + (1.0 - beta1) * g;
                    match self.spec {
                        OptimiserSpec::Yogi { .. } => {
                            *v -= (1.0 - ADAM_BETA2) * square * (*v - square).signum();
                        }
                        OptimiserSpec::Adagrad { .. } => *v += square,
                        _ => *v = ADAM_BETA2 * *v + (1.0 - ADAM_BETA2) * square,
                    }
                }
                self.first.iter().zip(&self.second).map(|(m, v)| m / (v.sqrt() + ADAM_TAU)).collect()
            }
        }
    }

    /// Counts an iterate, and averages it in if it belongs to the last third.
    fn record(&mut self, params: &[f64]) {
        self.done += 1;
        if self.done > self.steps - self.steps.div_ceil(3) {
            self.tail_count += 1;
            let weight = 1.0 / f64::from(self.tail_count);
            for (mean, p) in self.tail.iter_mut().zip(params) {
                *mean += (p - *mean) * weight;
            }
        }
    }
}

/// The schedule's factor at step `t` of `steps`: 1 at first, [`COSINE_FLOOR`] at last, half a cosine between.
fn cosine(t: u32, steps: u32) -> f64 {
    let last = f64::from(steps.saturating_sub(1).max(1));
    let falling = 0.5 * (1.0 + (std::f64::consts::PI * f64::from(t) / last).cos());
    COSINE_FLOOR + (1.0 - COSINE_FLOOR) * falling
}

/// Share of the learning rate left at the last step.
pub const COSINE_FLOOR: f64 = 0.1;
/// Decay of Adam's first moment.
pub const ADAM_BETA1: f64 = 0.9;
/// Decay of Adam's second moment.
pub const ADAM_BETA2: f64 = 0.99;
/// Adam's degree of adaptivity.
pub const ADAM_TAU: f64 = 1e-3;

#[cfg(test)]
mod tests {
    #![allow(
        clippy::unwrap_used,
        clippy::float_cmp,
        reason = "tests; exact equality is meant where it stands"
    )]
    use super::*;

    const SPECS: [OptimiserSpec; 4] = [
        OptimiserSpec::Sgd { learning_rate: 4.0, momentum: 0.9 },
        OptimiserSpec::Adam { learning_rate: 0.05 },
        OptimiserSpec::Yogi { learning_rate: 0.05 },
        OptimiserSpec::Adagrad { learning_rate: 0.05 },
    ];

    /// Gradients of a fixed, uneven path.
    fn gradient(t: u32) -> Vec<f64> {
        (0..3).map(|j| f64::from((t * 7 + j * 5) % 11) / 40.0 - 0.1).collect()
    }

    /// The same recursion from the papers, one scalar at a time, whole history kept.
    fn naive(spec: OptimiserSpec, steps: u32, clip: f64) -> (Vec<f64>, Vec<f64>) {
        let (mut last, mut averaged) = (Vec::new(), Vec::new());
        for j in 0..3 {
            let (mut p, mut m, mut v, mut history) = (0.5, 0.0, 0.0, Vec::new());
            for t in 0..steps {
                let phase = std::f64::consts::PI * f64::from(t) / f64::from(steps - 1);
                let decay = 0.1 + 0.45 * (1.0 + phase.cos());
                let g = gradient(t)[j] / clip;
                match spec {
                    OptimiserSpec::Sgd { learning_rate, momentum } => {
                        m = momentum * m + g;
                        p -= learning_rate * decay * m;
                    }
                    OptimiserSpec::Adam { learning_rate } => {
                        m = 0.9 * m + 0.1 * g;
                        v = 0.99 * v + 0.01 * g * g;
                        p -= learning_rate * decay * m / (v.sqrt() + 0.001);
                    }
                    OptimiserSpec::Yogi { learning_rate } => {
                        m = 0.9 * m + 0.1 * g;
                        let g2: f64 = g * g;
                        v = if v < g2 { v + 0.01 * g2 } else { v - 0.01 * g2 };
                        p -= learning_rate * decay * m / (v.sqrt() + 0.001);
                    }
                    OptimiserSpec::Adagrad { learning_rate } => {
                        v += g * g;
                        p -= learning_rate * decay * g / (v.sqrt() + 0.001);
                    }
                }
                history.push(p);
            }
            let tail = &history[history.len() - history.len().div_ceil(3)..];
            last.push(p);
            averaged.push(tail.iter().sum::<f64>() / tail.len() as f64);
        }
        (last, averaged)
    }

    #[test]
    fn all_arms_equal_their_naive_twins_and_survive_a_restart_after_every_step() {
        for spec in SPECS {
            for steps in [2, 3, 12, 20] {
                let mut optimiser = ServerOptimiser::new(spec, steps, 3);
                let mut params = vec![0.5; 3];
                for t in 0..steps {
                    let stored = serde_json::to_string(&optimiser).unwrap();
                    let restored: ServerOptimiser = serde_json::from_str(&stored).unwrap();
                    assert_eq!(restored, optimiser);
                    (params, optimiser) = restored.step(&params, &gradient(t), 2.0).unwrap();
                }
                let (last, averaged) = naive(spec, steps, 2.0);
                for (a, b) in
                    params.iter().zip(&last).chain(optimiser.averaged(&params).iter().zip(&averaged))
                {
                    assert!((a - b).abs() < 1e-12, "{spec:?} {steps}: {a} against {b}");
                }
                let refused = optimiser.step(&params, &gradient(0), 2.0);
                assert_eq!(refused, Err(OptimiserError::Finished { steps }));
            }
        }
    }

    #[test]
    fn a_zero_gradient_is_a_fixed_point() {
        for spec in SPECS {
            let mut optimiser = ServerOptimiser::new(spec, 6, 3);
            let mut params = vec![0.25, -1.0, 3.0];
            for _ in 0..6 {
                (params, optimiser) = optimiser.step(&params, &[0.0; 3], 1.0).unwrap();
            }
            assert_eq!(params, vec![0.25, -1.0, 3.0]);
            assert_eq!(optimiser.averaged(&params), params);
        }
    }

    #[test]
    fn the_clip_norm_is_the_unit_of_the_learning_rate() {
        for spec in SPECS {
            let optimiser = ServerOptimiser::new(spec, 3, 3);
            let (one, _) = optimiser.step(&[0.0; 3], &[0.25, 0.5, -1.0], 1.0).unwrap();
            let (four, _) = optimiser.step(&[0.0; 3], &[1.0, 2.0, -4.0], 4.0).unwrap();
            assert_eq!(one, four);
        }
    }

    #[test]
    fn schedule_ends_at_a_tenth_and_a_single_step_is_full() {
        assert_eq!(cosine(0, 12), 1.0);
        assert!((cosine(11, 12) - COSINE_FLOOR).abs() < 1e-15);
        assert_eq!(cosine(0, 1), 1.0);
        let falling: Vec<f64> = (0..12).map(|t| cosine(t, 12)).collect();
        assert!(falling.windows(2).all(|w| w[0] > w[1]));
    }

    #[test]
    fn skipped_rounds_count_and_bad_input_changes_nothing() {
        let optimiser = ServerOptimiser::new(SPECS[0], 2, 2);
        let once = optimiser.skip(&[1.0, 2.0]).unwrap();
        let twice = once.skip(&[1.0, 2.0]).unwrap();
        assert_eq!((twice.done(), twice.averaged(&[0.0; 2])), (2, vec![1.0, 2.0]));
        assert_eq!(twice.skip(&[1.0, 2.0]), Err(OptimiserError::Finished { steps: 2 }));
        let shape = Err(OptimiserError::Shape { expected: 2, got: 3 });
        assert_eq!(optimiser.step(&[0.0; 2], &[0.0; 3], 1.0), shape);
        assert_eq!(optimiser.step(&[0.0; 2], &[0.0; 2], 0.0), Err(OptimiserError::BadClip { got: 0.0 }));
        for bad in [f64::NAN, f64::INFINITY, f64::MAX] {
            let refused = optimiser.step(&[0.0; 2], &[bad, 0.0], 1e-3);
            assert_eq!(refused, Err(OptimiserError::NotFinite { step: 0 }));
        }
    }
}

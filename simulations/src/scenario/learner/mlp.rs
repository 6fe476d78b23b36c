//! One hidden layer of tanh units, initialised uniformly within ±1/√(inputs) (LeCun et al. 1998, "Efficient BackProp").

use rand::Rng;
use rand_chacha::ChaCha20Rng;

use super::{Learner, sigmoid};

/// Parameters: `hidden` rows of `width` weights and a bias, then `hidden` output weights and a bias.
pub(super) struct Mlp {
    pub(super) width: usize,
    pub(super) hidden: usize,
}

impl Mlp {
    /// The hidden units' values and the logit.
    fn forward(&self, parameters: &[f64], row: &[f32]) -> (Vec<f64>, f64) {
        let (units, output) = parameters.split_at(self.hidden * (self.width + 1));
        let values: Vec<f64> = units
            .chunks_exact(self.width + 1)
            .map(|unit| {
                let dot: f64 = row.iter().zip(unit).map(|(x, w)| f64::from(*x) * w).sum();
                (dot + unit.last().copied().unwrap_or(0.0)).tanh()
            })
            .collect();
        let dot: f64 = values.iter().zip(output).map(|(h, w)| h * w).sum();
        (values, dot + output.last().copied().unwrap_or(0.0))
    }
}

impl Learner for Mlp {
    fn dimension(&self) -> usize {
        self.hidden * (self.width + 1) + self.hidden + 1
    }

    fn initial(&self, rng: &mut ChaCha20Rng) -> Vec<f64> {
        let inner = 1.0 / (self.width.max(1) as f64).sqrt();
        let outer = 1.0 / (self.hidden as f64).sqrt();
        let first = self.hidden * (self.width + 1);
        (0..self.dimension())
            .map(|i| {
                let bound = if i < first { inner } else { outer };
                rng.random_range(-bound..bound)
            })
            .collect()
    }

    fn probability(&self, parameters: &[f64], row: &[f32]) -> f64 {
        sigmoid(self.forward(parameters, row).1)
    }

    fn add_gradient(&self, parameters: &[f64], row: &[f32], label: u8, into: &mut [f64]) {
        let (values, logit) = self.forward(parameters, row);
        let residual = sigmoid(logit) - f64::from(label);
        let first = self.hidden * (self.width + 1);
        let output = &parameters[first..];
        let (units, outer) = into.split_at_mut(first);
        outer.iter_mut().zip(&values).for_each(|(g, h)| *g += residual * h);
        if let Some(bias) = outer.last_mut() {
            *bias += residual;
        }
        for ((unit, h), w) in units.chunks_exact_mut(self.width + 1).zip(&values).zip(output) {
            let back = residual * w * (1.0 - h * h);
            unit.iter_mut().zip(row).for_each(|(g, x)| *g += back * f64::from(*x));
            if let Some(bias) = unit.last_mut() {
                *bias += back;
            }
        }
    }
}

//! Logistic regression: one weight a number, and an intercept, from zero.

use rand_chacha::ChaCha20Rng;

use super::{Learner, sigmoid};

/// Logistic regression on rows of `width` numbers; the intercept is the last parameter.
pub(super) struct Logistic {
    pub(super) width: usize,
}

impl Learner for Logistic {
    fn dimension(&self) -> usize {
        self.width + 1
    }

    fn initial(&self, _rng: &mut ChaCha20Rng) -> Vec<f64> {
        vec![0.0; self.dimension()]
    }

    fn probability(&self, parameters: &[f64], row: &[f32]) -> f64 {
        let dot: f64 = row.iter().zip(parameters).map(|(x, w)| f64::from(*x) * w).sum();
        sigmoid(dot + parameters.last().copied().unwrap_or(0.0))
    }

    fn add_gradient(&self, parameters: &[f64], row: &[f32], label: u8, into: &mut [f64]) {
        let residual = self.probability(parameters, row) - f64::from(label);
        into.iter_mut().zip(row).for_each(|(g, x)| *g += residual * f64::from(*x));
        if let Some(intercept) = into.last_mut() {
            *intercept += residual;
        }
    }
}

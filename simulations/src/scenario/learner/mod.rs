//! Small models for rounds without a foundation model: one file a model, one arm of [`learner`].
//!
//! A learner says what one row's loss and gradient are; clipping, noise and steps are the same for all. Features are coded
//! from contracts alone ([`features`]), so that nothing of the coding has to be released.

pub(crate) mod features;
mod logistic;
mod mlp;
mod ridge;

use rand_chacha::ChaCha20Rng;

use super::document::ModelSpec;

/// A two-class model of a row of numbers.
pub(crate) trait Learner: Send + Sync {
    /// Number of parameters.
    fn dimension(&self) -> usize;

    /// Parameters before the first round.
    fn initial(&self, rng: &mut ChaCha20Rng) -> Vec<f64>;

    /// What predictions are made from: the parameters, unless something has to be solved first.
    fn solved(&self, parameters: &[f64]) -> Vec<f64> {
        parameters.to_vec()
    }

    /// Probability of class 1, from what [`Self::solved`] gave.
    fn probability(&self, solved: &[f64], row: &[f32]) -> f64;

    /// Adds the gradient of the row's log loss to `into`, which has [`Self::dimension`] values.
    fn add_gradient(&self, parameters: &[f64], row: &[f32], label: u8, into: &mut [f64]);
}

/// The model a scenario names, for rows of `width` numbers.
pub(crate) fn learner(spec: ModelSpec, width: usize) -> Box<dyn Learner> {
    match spec {
        ModelSpec::Logistic => Box::new(logistic::Logistic { width }),
        ModelSpec::Ridge => Box::new(ridge::Ridge { width }),
        ModelSpec::Mlp { hidden } => Box::new(mlp::Mlp { width, hidden: hidden as usize }),
    }
}

fn sigmoid(logit: f64) -> f64 {
    1.0 / (1.0 + (-logit).exp())
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    /// Every learner's gradient is the slope of its own loss.
    #[test]
    fn gradients_are_central_differences_of_the_loss() {
        for spec in [ModelSpec::Logistic, ModelSpec::Mlp { hidden: 3 }] {
            let model = learner(spec, 4);
            let mut rng = ChaCha20Rng::seed_from_u64(5);
            let mut at = model.initial(&mut rng);
            at.iter_mut().enumerate().for_each(|(i, p)| *p += 0.1 * (i % 5) as f64 - 0.2);
            let row = [0.5, -1.0, 0.0, 0.25];
            for label in [0, 1] {
                let loss = |p: &[f64]| {
                    let p = model.probability(p, &row);
                    if label == 1 { -p.ln() } else { -(1.0 - p).ln() }
                };
                let mut gradient = vec![0.0; model.dimension()];
                model.add_gradient(&at, &row, label, &mut gradient);
                for (j, g) in gradient.iter().enumerate() {
                    let (mut up, mut down) = (at.clone(), at.clone());
                    up[j] += 1e-5;
                    down[j] -= 1e-5;
                    let slope = (loss(&up) - loss(&down)) / 2e-5;
                    assert!((slope - g).abs() < 1e-7, "{spec:?} {j}: {slope} {g}");
                }
            }
        }
    }
}

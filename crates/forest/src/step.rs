//! What the server makes of a round's noisy sums: leaf values.

use crate::error::ForestError;

/// A Newton step for the leaves of one round's trees.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    /// Trees of the round; each gets its part of the step.
    pub trees: usize,
    /// Variance of the noise in each sum, in squared units of the sums.
    pub noise: f64,
}

impl Step {
    /// Leaf values of noisy sums, laid out as [`crate::Rows::sums`] has them but in units of rows: two sums a leaf.
    ///
    /// A leaf's value has mean zero and variance 1 (squared logits) beforehand. Given it, the sum of `y − p` is, to first order, normal
    /// with mean `H v` and variance `noise + H`, where `H` is the sum of `p (1 − p)`: the value is the posterior mean, so that a
    /// leaf of few rows, or one drowned in noise, says little. A second sum that noise made negative counts as zero.
    ///
    /// # Errors
    /// [`ForestError::Shape`] if sums don't come in pairs, or one isn't a number.
    pub fn values(&self, sums: &[f64]) -> Result<Vec<f32>, ForestError> {
        let (pairs, rest) = sums.as_chunks::<2>();
        if !rest.is_empty() {
            return Err(ForestError::shape("leaf sums", "an even number", sums.len()));
        }
        if sums.iter().any(|sum| !sum.is_finite()) || !self.noise.is_finite() {
            return Err(ForestError::shape("leaf sums", "numbers", "one that is none"));
        }
        let value = |[gradient, second]: &[f64; 2]| {
            let second = second.max(0.0);
            let spread = self.noise.max(0.0) + second;
            let newton = gradient * second / (second * second + spread / PRIOR_VARIANCE + f64::MIN_POSITIVE);
            (newton.clamp(-LARGEST_STEP, LARGEST_STEP) * LEARNING_RATE / self.trees.max(1) as f64) as f32
        };
        Ok(pairs.iter().map(value).collect())
    }
}

/// Variance of a leaf's value before anything is seen, in squared logits.
const PRIOR_VARIANCE: f64 = 1.0;
/// Largest step of a leaf, in logits, before it is shared among the round's trees.
const LARGEST_STEP: f64 = 2.0;
/// Share of a step that is taken.
const LEARNING_RATE: f64 = 1.0;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    /// 40 of 100 rows of class 1 where one half was expected: G = -10, H = 25. Without noise the posterior mean is
    /// -10 · 25 / (625 + 25) = -0.3846; noise of variance 375 makes the divisor 625 + 400.
    #[test]
    fn steps_are_posterior_means() {
        let of = |noise, sums: &[f64]| Step { trees: 1, noise }.values(sums).unwrap();
        let close =
            |got: f32, expected: f64| assert!((f64::from(got) - expected).abs() < 1e-6, "{got} {expected}");
        close(of(0.0, &[-10.0, 25.0])[0], -250.0 / 650.0);
        close(of(375.0, &[-10.0, 25.0])[0], -250.0 / 1025.0);
        close(Step { trees: 4, noise: 0.0 }.values(&[-10.0, 25.0]).unwrap()[0], -250.0 / 2600.0);
        // An empty leaf, and one that noise made negative, stay where they are.
        assert_eq!(of(100.0, &[30.0, 0.0, 30.0, -5.0, 0.0, 0.0]), [0.0; 3]);
        assert_eq!(of(0.0, &[0.0, 0.0]), [0.0]);
        close(of(0.0, &[1e6, 100.0])[0], LARGEST_STEP);
    }

    #[test]
    fn sums_that_are_none_are_refused() {
        let step = Step { trees: 1, noise: 1.0 };
        assert!(step.values(&[1.0]).is_err());
        assert!(step.values(&[f64::NAN, 1.0]).is_err());
        assert!(Step { noise: f64::INFINITY, ..step }.values(&[1.0, 1.0]).is_err());
        assert!(step.values(&[]).unwrap().is_empty());
    }
}

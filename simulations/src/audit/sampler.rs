//! The samplers: do draws have the distribution that every cost is worked out for?
//!
//! Chi-square of draws against the exact probabilities of the discrete Gaussian (Canonne, Kamath and Steinke 2020, arXiv
//! 2004.00010, definition 1) and the discrete Laplace, and their variance against the exact one. Scales go from half an integer
//! step, below what any release may use, to a thousand. Controls: continuous noise rounded to integers, which is what a
//! sampler on floating point gives: at small scales its probabilities are others, and each of them must be told.
//!
//! A shipped sampler fails a row by chance once in [`FALSE_ALARM`]⁻¹ runs.

use anyhow::Result;
use rand::{CryptoRng, Rng, RngCore};
use serde::Serialize;
use tabmesh_privacy::mechanism::{DiscreteGaussian, DiscreteLaplace, SigmaSquared};

use super::bounds::normal;

/// Whose draws.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Sampler {
    /// As agents run it.
    DiscreteGaussian,
    /// As harness and accountants know it.
    DiscreteLaplace,
    /// Control: a continuous Gaussian, rounded.
    RoundedGaussian,
    /// Control: a continuous Laplace, rounded.
    RoundedLaplace,
}

impl Sampler {
    fn is_shipped(self) -> bool {
        matches!(self, Self::DiscreteGaussian | Self::DiscreteLaplace)
    }

    /// In words.
    pub(super) fn words(self) -> &'static str {
        match self {
            Self::DiscreteGaussian => "discrete Gaussian",
            Self::DiscreteLaplace => "discrete Laplace",
            Self::RoundedGaussian => "control: rounded Gaussian",
            Self::RoundedLaplace => "control: rounded Laplace",
        }
    }

    fn is_gaussian(self) -> bool {
        matches!(self, Self::DiscreteGaussian | Self::RoundedGaussian)
    }

    /// What an integer's probability is proportional to.
    fn weight(self, x: f64, scale: f64) -> f64 {
        if self.is_gaussian() { (-x * x / (2.0 * scale * scale)).exp() } else { (-x.abs() / scale).exp() }
    }

    /// Integers from zero on beyond which nothing is expected of any number of draws.
    fn reach(self, scale: f64) -> i64 {
        let scales = if self.is_gaussian() { 12.0 } else { 45.0 };
        (scales * scale).ceil() as i64 + 2
    }

    fn draws<R: RngCore + CryptoRng>(self, scale: (u64, u64), count: usize, rng: &mut R) -> Result<Vec<i64>> {
        let (num, den) = scale;
        let value = num as f64 / den as f64;
        Ok(match self {
            Self::DiscreteGaussian => {
                let square = |part: u64| u128::from(part) * u128::from(part);
                let sigma_squared = SigmaSquared::new(square(num), square(den))?;
                DiscreteGaussian::draws_at(sigma_squared, count, rng)
            }
            Self::DiscreteLaplace => {
                let laplace = DiscreteLaplace::new(num, den)?;
                (0..count).map(|_| laplace.draw(rng)).collect()
            }
            Self::RoundedGaussian => {
                // Box and Muller 1958.
                let mut normal = || {
                    let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt();
                    radius * (std::f64::consts::TAU * rng.random::<f64>()).cos()
                };
                (0..count).map(|_| (value * normal()).round() as i64).collect()
            }
            Self::RoundedLaplace => {
                let mut signed = || {
                    let size = -(1.0 - rng.random::<f64>()).ln();
                    if rng.random() { size } else { -size }
                };
                (0..count).map(|_| (value * signed()).round() as i64).collect()
            }
        })
    }
}

/// How the draws of a sampler at one scale fit.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Fit {
    pub(super) sampler: Sampler,
    /// σ of a Gaussian, t of a Laplace, in integer steps.
    pub(super) scale: f64,
    pub(super) draws: usize,
    /// Sum of (observed − expected)²/expected over cells that expect [`LEAST_EXPECTED`] draws, integers together where one doesn't.
    pub(super) chi_squared: f64,
    /// Cells less one.
    pub(super) degrees: usize,
    /// Chance of so large a sum.
    pub(super) p: f64,
    /// Variance of the draws beside the exact one, in its standard errors.
    pub(super) variance_errors: f64,
}

impl Fit {
    /// Whether the draws aren't those of the distribution.
    pub(super) fn told(&self) -> bool {
        self.p < FALSE_ALARM || self.variance_errors.abs() > VARIANCE_ERRORS
    }

    /// Whether a shipped sampler fits and a control doesn't.
    pub(super) fn as_it_must(&self) -> bool {
        self.told() != self.sampler.is_shipped()
    }
}

/// Tests so many draws of each sampler at each scale.
///
/// # Errors
/// A scale that a sampler refuses.
pub(super) fn audit<R: RngCore + CryptoRng>(draws: usize, rng: &mut R) -> Result<Vec<Fit>> {
    let gaussian = SCALES.into_iter().map(|scale| (Sampler::DiscreteGaussian, scale));
    let laplace = SCALES.into_iter().map(|scale| (Sampler::DiscreteLaplace, scale));
    let small = [(1, 2), (1, 1)];
    let controls = small
        .into_iter()
        .flat_map(|scale| [(Sampler::RoundedGaussian, scale), (Sampler::RoundedLaplace, scale)]);
    gaussian
        .chain(laplace)
        .chain(controls)
        .map(|(sampler, scale)| {
            let drawn = sampler.draws(scale, draws, rng)?;
            Ok(fit(sampler, scale.0 as f64 / scale.1 as f64, &drawn))
        })
        .collect()
}

fn fit(sampler: Sampler, scale: f64, drawn: &[i64]) -> Fit {
    let reach = sampler.reach(scale);
    let weights: Vec<f64> = (-reach..=reach).map(|x| sampler.weight(x as f64, scale)).collect();
    let all: f64 = weights.iter().sum();
    let mut counts = vec![0_u64; weights.len()];
    // Whatever lies further out counts as the outermost: nothing is expected there.
    for x in drawn {
        counts[(x.clamp(&-reach, &reach) + reach) as usize] += 1;
    }
    let n = drawn.len() as f64;
    let (mut chi_squared, mut cells) = (0.0, 0_usize);
    let (mut expected, mut observed) = (0.0, 0_u64);
    let mut left: f64 = n;
    for (weight, count) in weights.iter().zip(&counts) {
        expected += n * weight / all;
        observed += count;
        // The last cell takes the rest, so that none expects too little.
        if expected >= LEAST_EXPECTED && left - expected >= LEAST_EXPECTED {
            chi_squared += (observed as f64 - expected).powi(2) / expected;
            left -= expected;
            cells += 1;
            (expected, observed) = (0.0, 0);
        }
    }
    chi_squared += (observed as f64 - expected).powi(2) / expected;
    let moment = |power: i32| -> f64 {
        (-reach..=reach).zip(&weights).map(|(x, weight)| (x as f64).powi(power) * weight / all).sum()
    };
    let (variance, fourth) = (moment(2), moment(4));
    let seen = drawn.iter().map(|x| (*x as f64).powi(2)).sum::<f64>() / n;
    let error = ((fourth - variance * variance) / n).sqrt();
    Fit {
        sampler,
        scale,
        draws: drawn.len(),
        chi_squared,
        degrees: cells,
        p: upper_tail(chi_squared, cells),
        variance_errors: (seen - variance) / error,
    }
}

/// P[χ² ≥ x], by Wilson and Hilferty's cube root (1931), good to a tenth of the exponent in the far tail.
fn upper_tail(x: f64, degrees: usize) -> f64 {
    let ninth = 2.0 / (9.0 * degrees as f64);
    let z = ((x / degrees as f64).cbrt() - (1.0 - ninth)) / ninth.sqrt();
    normal(-z)
}

/// Scales, as fractions.
const SCALES: [(u64, u64); 5] = [(1, 2), (1, 1), (3, 1), (100, 1), (1_234_567, 1_000)];
/// Draws that a cell expects at least.
const LEAST_EXPECTED: f64 = 25.0;
/// How often a sampler as it should be fails a row.
const FALSE_ALARM: f64 = 1e-7;
/// Standard errors of a variance beyond which it is another one; as rare as that.
const VARIANCE_ERRORS: f64 = 5.4;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use rand::SeedableRng;
    use rand_chacha::ChaCha20Rng;

    use super::*;

    /// A fixed seed: the outcome is the same in every run.
    #[test]
    fn shipped_samplers_fit_and_rounded_ones_do_not() {
        let found = audit(200_000, &mut ChaCha20Rng::seed_from_u64(8)).unwrap();
        assert_eq!(found.len(), 14);
        for fit in &found {
            assert!(fit.as_it_must(), "{fit:?}");
        }
        // A small chi-square would be as wrong as a large one.
        assert!(found.iter().filter(|fit| fit.sampler.is_shipped()).all(|fit| fit.p < 0.999), "{found:?}");
    }

    /// Tables of the chi-square distribution: 5 % and 0.1 % points.
    #[test]
    fn tails_are_those_of_the_tables() {
        for (x, degrees, p) in
            [(7.815, 3, 0.05), (18.307, 10, 0.05), (29.588, 10, 0.001), (149.449, 100, 0.001)]
        {
            let got = upper_tail(x, degrees);
            assert!((got / p - 1.0).abs() < 0.08, "{x} {degrees}: {got}");
        }
    }
}

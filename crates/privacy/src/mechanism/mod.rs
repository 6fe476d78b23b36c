//! Mechanisms: the noise and its cost, one file each.
//!
//! A mechanism adds noise to an integer vector whose L2 sensitivity it was told, and knows the ρ that costs. It is
//! the only way to a [`Private`] besides the ledger's restore. A new mechanism is a new file here and one arm of
//! [`Mechanism`] and of [`MechanismName`]; the conformance test at the bottom then runs over it.

#[cfg(test)]
mod bernoulli;
pub mod discrete_gaussian;
pub mod discrete_laplace;
mod event;
mod exponential;
pub mod shares;
mod staircase;
pub mod threshold;
#[cfg(test)]
mod twin;
mod vector_laplace;

pub use discrete_gaussian::DiscreteGaussian;
pub use discrete_laplace::DiscreteLaplace;
pub use event::{MechanismEvent, MechanismKind, SigmaSquared};
pub use shares::NoiseShares;
pub use threshold::{FoundLevels, ThresholdHistogram};
pub use vector_laplace::VectorLaplace;

use crate::budget::Rho;
use crate::private::Private;
use rand::{CryptoRng, RngCore};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Why a mechanism can't be built. Depends on the plan, never on values.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum MechanismError {
    /// The query claims that no unit can change it.
    #[error("sensitivity must be at least 1 integer unit")]
    ZeroSensitivity,
    /// No budget to spend.
    #[error("rho must be at least 1 unit of 2^-40: nothing can be released for no budget")]
    ZeroRho,
    /// The noise is so small that discrete and continuous Gaussian differ.
    #[error("sigma {sigma} is below {min} integer units: use a finer grid (a larger power-of-two scale)")]
    SigmaTooSmall {
        /// The standard deviation asked for, in integer units.
        sigma: f64,
        /// The smallest one allowed.
        min: f64,
    },
    /// The noise is so large that the sampler's integers could overflow.
    #[error("sigma {sigma} is above {max} integer units: use a coarser grid or more budget")]
    SigmaTooLarge {
        /// The standard deviation asked for, in integer units.
        sigma: f64,
        /// The largest one allowed.
        max: f64,
    },
    /// A fraction with a zero in it, or an unusable one.
    #[error("sigma squared must be a positive fraction, got {num}/{den}")]
    Fraction {
        /// Numerator given.
        num: u128,
        /// Denominator given.
        den: u128,
    },
    /// An event's ρ isn't the cost of its σ² and sensitivity.
    #[error("event states rho {stated} units, its sigma and sensitivity cost {computed} units")]
    Cost {
        /// ρ units in the event.
        stated: u64,
        /// ρ units recomputed.
        computed: u64,
    },
    /// Noise shares beside a mechanism that has none, none beside one that needs them, or shares that don't follow
    /// from the total.
    #[error("noise shares don't go with the mechanism, or don't follow from its variance and assumptions")]
    Shares,
}

/// What every mechanism can do.
pub trait Noise {
    /// One draw of the noise, in integer units.
    fn draw<R: RngCore + CryptoRng>(&self, rng: &mut R) -> i64;

    /// The cost ρ of one use on a query of the mechanism's sensitivity, rounded up.
    fn rho(&self) -> Rho;

    /// Variance of the noise on one coordinate.
    fn variance(&self) -> f64;

    /// A magnitude that a draw passes with probability below 10⁻¹⁷.
    fn reach(&self) -> f64;

    /// The record of one use: what a ledger entry holds.
    fn event(&self, shape: EventShape) -> MechanismEvent;

    /// Adds an independent draw to every coordinate.
    ///
    /// Sums saturate at the ends of `i64`, which is post-processing and can't happen at the sizes limits allow.
    fn privatize<R: RngCore + CryptoRng>(&self, sum: &[i64], rng: &mut R) -> Private<Vec<i64>> {
        Private::new(sum.iter().map(|value| value.saturating_add(self.draw(rng))).collect())
    }
}

/// The public shape of the noised vector, for the event record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EventShape {
    /// Rows one unit can contribute.
    pub rows_per_unit: u32,
    /// Marginals measured together; zero for a gradient.
    pub marginals: u32,
    /// Coordinates of the vector.
    pub dimension: u32,
}

/// Every mechanism there is.
#[derive(Debug, Clone, PartialEq)]
pub enum Mechanism {
    /// Exact discrete Gaussian noise (Canonne, Kamath, Steinke 2020).
    DiscreteGaussian(DiscreteGaussian),
    /// Exact discrete Laplace noise on vectors of bounded L2 norm.
    VectorLaplace(VectorLaplace),
}

/// Names of the mechanisms, as scenarios choose them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum MechanismName {
    /// [`DiscreteGaussian`].
    #[default]
    DiscreteGaussian,
    /// [`VectorLaplace`].
    DiscreteLaplace,
}

impl MechanismName {
    /// The least noise that costs at most `rho` on vectors of so many coordinates and such a sensitivity.
    ///
    /// # Errors
    /// The mechanism's own.
    pub fn from_rho(
        self,
        l2_sensitivity_squared: u64,
        dimension: u32,
        rho: Rho,
    ) -> Result<Mechanism, MechanismError> {
        Ok(match self {
            Self::DiscreteGaussian => {
                Mechanism::DiscreteGaussian(DiscreteGaussian::from_rho(l2_sensitivity_squared, rho)?)
            }
            Self::DiscreteLaplace => {
                Mechanism::VectorLaplace(VectorLaplace::from_rho(l2_sensitivity_squared, dimension, rho)?)
            }
        })
    }
}

impl From<DiscreteGaussian> for Mechanism {
    fn from(mechanism: DiscreteGaussian) -> Self {
        Self::DiscreteGaussian(mechanism)
    }
}

impl Noise for Mechanism {
    fn draw<R: RngCore + CryptoRng>(&self, rng: &mut R) -> i64 {
        match self {
            Self::DiscreteGaussian(mechanism) => mechanism.draw(rng),
            Self::VectorLaplace(mechanism) => mechanism.draw(rng),
        }
    }

    fn rho(&self) -> Rho {
        match self {
            Self::DiscreteGaussian(mechanism) => mechanism.rho(),
            Self::VectorLaplace(mechanism) => mechanism.rho(),
        }
    }

    fn variance(&self) -> f64 {
        match self {
            Self::DiscreteGaussian(mechanism) => mechanism.variance(),
            Self::VectorLaplace(mechanism) => mechanism.variance(),
        }
    }

    fn reach(&self) -> f64 {
        match self {
            Self::DiscreteGaussian(mechanism) => mechanism.reach(),
            Self::VectorLaplace(mechanism) => mechanism.reach(),
        }
    }

    fn event(&self, shape: EventShape) -> MechanismEvent {
        match self {
            Self::DiscreteGaussian(mechanism) => mechanism.event(shape),
            Self::VectorLaplace(mechanism) => mechanism.event(shape),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha20Rng;

    fn all(sensitivity_squared: u64, rho: Rho) -> Vec<Mechanism> {
        [MechanismName::DiscreteGaussian, MechanismName::DiscreteLaplace]
            .map(|name| name.from_rho(sensitivity_squared, 8, rho).unwrap())
            .to_vec()
    }

    // Conformance: what the rest of the house relies on, for every arm and several scales.
    #[test]
    fn every_mechanism_conforms() {
        for (sensitivity_squared, rho) in [(1, 0.01), (4, 0.05), (1 << 40, 0.5), (9 * 120, 0.03)] {
            let rho = Rho::from_f64_round_down(rho).unwrap();
            for mechanism in all(sensitivity_squared, rho) {
                assert!(mechanism.rho() <= rho, "never spends more than it was given");
                let shape = EventShape { rows_per_unit: 1, marginals: 1, dimension: 8 };
                let event = mechanism.event(shape);
                assert_eq!(event.rho, mechanism.rho());
                event.check().unwrap();

                let zeros = vec![0i64; 4096];
                let mut rng = ChaCha20Rng::seed_from_u64(11);
                let noised = mechanism.privatize(&zeros, &mut rng);
                let again = mechanism.privatize(&zeros, &mut ChaCha20Rng::seed_from_u64(11));
                assert_eq!(noised, again, "a stream determines the noise");

                let shifted = mechanism.privatize(&vec![1000; 4096], &mut ChaCha20Rng::seed_from_u64(11));
                let difference: Vec<i64> =
                    shifted.as_slice().iter().zip(noised.as_slice()).map(|(a, b)| a - b).collect();
                assert!(difference.iter().all(|d| *d == 1000), "noise doesn't depend on the values");

                // Mean within 5 standard errors and variance within 20 %: error rate below 1e-6 each at n = 4096 (kurtosis 6).
                let n = 4096.0;
                let mean = noised.as_slice().iter().map(|v| *v as f64).sum::<f64>() / n;
                let second = noised.as_slice().iter().map(|v| (*v as f64).powi(2)).sum::<f64>() / n;
                assert!(mean.abs() <= 5.0 * (mechanism.variance() / n).sqrt(), "mean {mean}");
                assert!((second / mechanism.variance() - 1.0).abs() <= 0.2, "variance {second}");

                let furthest = noised.as_slice().iter().map(|v| v.unsigned_abs()).max().unwrap();
                assert!(
                    (furthest as f64) < mechanism.reach()
                        && mechanism.reach() < 40.0 * mechanism.variance().sqrt()
                );

                let empty = mechanism.privatize(&[], &mut rng);
                assert_eq!(empty.dimension(), 0);
            }
        }
    }
}

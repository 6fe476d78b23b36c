//! Discrete Laplace noise on vectors of bounded L2 norm.
//!
//! A unit that moves a vector of d coordinates by Δ₂ moves it by at most √d·Δ₂ in L1, so that noise of scale t is
//! √d·Δ₂/t-differentially private (pure; for the unit and adjacency that the sensitivity is stated for), and
//! ρ = d·Δ₂²/(2t²) of zero-concentrated (Bun and Steinke 2016, proposition 1.4). At equal ρ its variance is above 2·d times the Gaussian's: for
//! a count it is near, for a gradient it is far, and it is here to be compared.

use super::{
    DiscreteLaplace, EventShape, MechanismError, MechanismEvent, MechanismKind, Noise, SigmaSquared,
};
use crate::budget::Rho;
use rand::{CryptoRng, RngCore};

/// Discrete Laplace noise with the cost it has on its query.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VectorLaplace {
    laplace: DiscreteLaplace,
    scale_squared: SigmaSquared,
    l2_sensitivity_squared: u64,
    dimension: u32,
    rho: Rho,
}

impl VectorLaplace {
    /// The least noise that costs at most `rho` on vectors of `dimension` coordinates.
    ///
    /// # Errors
    /// [`MechanismError::ZeroSensitivity`] and [`MechanismError::ZeroRho`] for zeros, [`MechanismError::SigmaTooLarge`] for a scale
    /// beyond the sampler's, [`MechanismError::Fraction`] for one below 1/8.
    pub fn from_rho(l2_sensitivity_squared: u64, dimension: u32, rho: Rho) -> Result<Self, MechanismError> {
        if l2_sensitivity_squared == 0 || dimension == 0 {
            return Err(MechanismError::ZeroSensitivity);
        }
        if rho == Rho::ZERO {
            return Err(MechanismError::ZeroRho);
        }
        // t² ≥ d·Δ²·2³⁹ / units of ρ.
        let units = u128::from(rho.units());
        let needed = (f64::from(dimension) * l2_sensitivity_squared as f64 / (2.0 * rho.as_f64())).sqrt();
        let most = super::discrete_gaussian::MAX_SIGMA as f64;
        let too_large = MechanismError::SigmaTooLarge { sigma: needed, max: most };
        let product = u128::from(l2_sensitivity_squared) * u128::from(dimension);
        if needed >= most || product >= 1 << (127 - 39) {
            return Err(too_large);
        }
        let product = product << 39;
        // t = m / 2^shift with as many digits as fit: m below 2²⁹, so that m² is a numerator a fraction may have.
        let shift =
            (0..=MAX_SHIFT).rev().find(|shift| needed * f64::from(1u32 << shift) < LARGEST).unwrap_or(0);
        let mut m = (needed * f64::from(1u32 << shift)).ceil().max(1.0) as u64;
        // The square root was a float; what counts is m² · units ≥ product · 4^shift, in integers.
        let enough = |m: u64| match product.checked_mul(1 << (2 * shift)) {
            Some(product) => u128::from(m) * u128::from(m) * units >= product,
            None => false,
        };
        while !enough(m) && m < 1 << NUM_BITS {
            m += 1;
        }
        if m >= 1 << NUM_BITS {
            return Err(too_large);
        }
        let laplace = DiscreteLaplace::new(m, 1 << shift)?;
        let scale_squared = SigmaSquared::new(u128::from(m) * u128::from(m), 1 << (2 * shift))?;
        let shape = (l2_sensitivity_squared, dimension);
        let cost = cost(scale_squared, shape).ok_or(MechanismError::ZeroRho)?;
        Ok(Self { laplace, scale_squared, l2_sensitivity_squared, dimension, rho: cost })
    }

    /// The squared scale t².
    #[must_use]
    pub fn scale_squared(&self) -> SigmaSquared {
        self.scale_squared
    }
}

/// ⌈d·Δ₂²/(2t²) · 2⁴⁰⌉ units; nothing if that overflows.
pub(super) fn cost(
    scale_squared: SigmaSquared,
    (l2_sensitivity_squared, dimension): (u64, u32),
) -> Option<Rho> {
    scale_squared.cost(l2_sensitivity_squared.checked_mul(dimension.into())?)
}

impl Noise for VectorLaplace {
    fn draw<R: RngCore + CryptoRng>(&self, rng: &mut R) -> i64 {
        self.laplace.draw(rng)
    }

    fn rho(&self) -> Rho {
        self.rho
    }

    fn variance(&self) -> f64 {
        let (num, den) = self.laplace.scale();
        let p = (-(den as f64) / num as f64).exp();
        2.0 * p / (1.0 - p).powi(2)
    }

    /// Forty scales: e⁻⁴⁰ is 4·10⁻¹⁸.
    fn reach(&self) -> f64 {
        40.0 * self.scale_squared.sigma() + 1.0
    }

    /// The dimension is the mechanism's own, whatever `shape` says: the cost depends on it.
    fn event(&self, shape: EventShape) -> MechanismEvent {
        MechanismEvent {
            kind: MechanismKind::DiscreteLaplace,
            sigma_squared: self.scale_squared,
            l2_sensitivity_squared: self.l2_sensitivity_squared,
            rows_per_unit: shape.rows_per_unit,
            marginals: shape.marginals,
            dimension: self.dimension,
            rho: self.rho,
            shares: None,
        }
    }
}

/// Bits of a scale's numerator: its square is a variance's.
const NUM_BITS: u32 = 29;
/// The same as a number.
const LARGEST: f64 = (1u32 << NUM_BITS) as f64;
/// Bits of a scale's denominator at most.
const MAX_SHIFT: u32 = 30;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use proptest::prelude::*;

    /// On one coordinate it is the Laplace mechanism: ε = Δ/t, ρ = ε²/2. At ρ = 1/2 and Δ = 1000, t = 1000.
    #[test]
    fn on_one_coordinate_it_is_the_laplace_mechanism() {
        let half = Rho::from_f64_round_down(0.5).unwrap();
        let one = VectorLaplace::from_rho(1_000_000, 1, half).unwrap();
        assert!((one.scale_squared().sigma() - 1_000.0).abs() < 1e-5);
        assert!(one.rho() <= half && one.rho().units() > half.units() - (1 << 14));
        // Discrete and continuous variance, 2t², are alike at large scales.
        assert!((one.variance() / 2e6 - 1.0).abs() < 1e-5);
        // Of a hundred coordinates each costs as much.
        let hundred = VectorLaplace::from_rho(1_000_000, 100, half).unwrap();
        assert!((hundred.scale_squared().sigma() - 10_000.0).abs() < 1e-4);
    }

    #[test]
    fn what_it_cannot_do_is_refused() {
        let rho = Rho::from_units(1);
        assert_eq!(VectorLaplace::from_rho(0, 1, rho), Err(MechanismError::ZeroSensitivity));
        assert_eq!(VectorLaplace::from_rho(1, 0, rho), Err(MechanismError::ZeroSensitivity));
        assert_eq!(VectorLaplace::from_rho(1, 1, Rho::ZERO), Err(MechanismError::ZeroRho));
        for (squared, dimension) in [(u64::MAX, u32::MAX), (u64::MAX, 1), (1 << 40, 1)] {
            let refused = VectorLaplace::from_rho(squared, dimension, rho);
            assert!(matches!(refused, Err(MechanismError::SigmaTooLarge { .. })), "{refused:?}");
        }
        // So much budget that there is hardly any noise.
        let rich = VectorLaplace::from_rho(1, 1, Rho::from_f64_round_down(1e6).unwrap());
        assert!(matches!(rich, Err(MechanismError::Fraction { .. })), "{rich:?}");
    }

    proptest! {
        #[test]
        fn it_never_costs_more_and_hardly_less_than_it_was_given(
            sensitivity in 1u64..1 << 20, dimension in 1u32..100_000, units in 1u64 << 20..1 << 40
        ) {
            let rho = Rho::from_units(units);
            let Ok(mechanism) = VectorLaplace::from_rho(sensitivity * sensitivity, dimension, rho) else {
                return Ok(());
            };
            prop_assert!(mechanism.rho() <= rho);
            prop_assert!(mechanism.rho().as_f64() >= rho.as_f64() * (1.0 - 1e-6) || mechanism.scale_squared().sigma() < 1e3);
            let shape = EventShape { rows_per_unit: 1, marginals: 0, dimension };
            prop_assert_eq!(mechanism.event(shape).check(), Ok(()));
        }
    }
}

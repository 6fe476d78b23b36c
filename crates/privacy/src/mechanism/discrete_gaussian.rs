//! The exact discrete Gaussian on the integers.
//!
//! P[X = x] ∝ exp(-x²/(2σ²)) (Canonne, Kamath, Steinke, "The Discrete Gaussian for Differential Privacy", arXiv
//! 2004.00010), σ² an exact fraction, drawn by rejection from a staircase with exact decisions, so the floating-point
//! attacks on rounded Gaussians don't apply. The paper's own sampler is the tests' twin. Running time depends on the
//! noise drawn (not on the data): draw before sending, on a schedule.
//!
//! A vector of L2 sensitivity Δ costs ρ = Δ²/(2σ²). σ below 5 integer units is refused: there the discrete Gaussian
//! differs visibly from the continuous one and a finer grid is the better choice.

use super::event::MechanismKind;
use super::staircase::{Shape, Staircase};
use super::{EventShape, MechanismError, MechanismEvent, Noise, SigmaSquared};
use crate::budget::Rho;
use rand::{CryptoRng, RngCore};

/// Smallest standard deviation allowed, in integer units.
pub const MIN_SIGMA: u64 = 5;

/// Largest standard deviation allowed, in integer units: 2²⁸.
pub const MAX_SIGMA: u64 = 1 << 28;

/// Discrete Gaussian noise for a query of known sensitivity.
#[derive(Debug, Clone, PartialEq)]
pub struct DiscreteGaussian {
    l2_sensitivity_squared: u64,
    sigma_squared: SigmaSquared,
    rho: Rho,
    sampler: Staircase,
}

impl DiscreteGaussian {
    /// Noise that costs at most `rho` on a query of squared L2 sensitivity `l2_sensitivity_squared` (squared
    /// integer units): σ² = Δ²/(2ρ), rounded up.
    ///
    /// # Errors
    /// [`MechanismError`] names what is out of range: a zero, or σ outside 5 to 2²⁸.
    pub fn from_rho(l2_sensitivity_squared: u64, rho: Rho) -> Result<Self, MechanismError> {
        if l2_sensitivity_squared == 0 {
            return Err(MechanismError::ZeroSensitivity);
        }
        if rho == Rho::ZERO {
            return Err(MechanismError::ZeroRho);
        }
        let (num, den) = (u128::from(l2_sensitivity_squared) << 39, u128::from(rho.units()));
        check_range(num, den)?;
        Self::from_sigma_squared(l2_sensitivity_squared, SigmaSquared::new(num, den)?)
    }

    /// Noise of a given variance, as a ledger or plan states it.
    ///
    /// # Errors
    /// [`MechanismError`] for σ outside 5 to 2²⁸, a zero sensitivity, or a cost beyond the currency.
    pub fn from_sigma_squared(
        l2_sensitivity_squared: u64,
        sigma_squared: SigmaSquared,
    ) -> Result<Self, MechanismError> {
        check_range(sigma_squared.num().into(), sigma_squared.den().into())?;
        Self::unchecked(l2_sensitivity_squared, sigma_squared)
    }

    /// So many draws at any σ: for whoever tests the sampler, also where no release may go. They noise nothing.
    pub fn draws_at<R: RngCore + CryptoRng>(
        sigma_squared: SigmaSquared,
        count: usize,
        rng: &mut R,
    ) -> Vec<i64> {
        let sampler = Staircase::new(Shape::Gaussian { num: sigma_squared.num(), den: sigma_squared.den() });
        (0..count).map(|_| sampler.draw(rng)).collect()
    }

    // Without the lower limit on σ: small variances are only for tests of the sampler.
    fn unchecked(l2_sensitivity_squared: u64, sigma_squared: SigmaSquared) -> Result<Self, MechanismError> {
        if l2_sensitivity_squared == 0 {
            return Err(MechanismError::ZeroSensitivity);
        }
        let rho = sigma_squared.cost(l2_sensitivity_squared).ok_or(MechanismError::ZeroRho)?;
        let sampler = Staircase::new(Shape::Gaussian { num: sigma_squared.num(), den: sigma_squared.den() });
        Ok(Self { l2_sensitivity_squared, sigma_squared, rho, sampler })
    }

    /// σ² as an exact fraction.
    #[must_use]
    pub fn sigma_squared(&self) -> SigmaSquared {
        self.sigma_squared
    }

    /// Squared L2 sensitivity in squared integer units.
    #[must_use]
    pub fn l2_sensitivity_squared(&self) -> u64 {
        self.l2_sensitivity_squared
    }
}

impl Noise for DiscreteGaussian {
    #[inline]
    fn draw<R: RngCore + CryptoRng>(&self, rng: &mut R) -> i64 {
        self.sampler.draw(rng)
    }

    fn rho(&self) -> Rho {
        self.rho
    }

    // The discrete Gaussian's variance is at most σ², and for σ ≥ 5 equal to it within 1e-200.
    fn variance(&self) -> f64 {
        self.sigma_squared.as_f64()
    }

    /// Twelve deviations: 4·10⁻³³.
    fn reach(&self) -> f64 {
        12.0 * self.sigma_squared.sigma()
    }

    fn event(&self, shape: EventShape) -> MechanismEvent {
        MechanismEvent {
            kind: MechanismKind::DiscreteGaussian,
            sigma_squared: self.sigma_squared,
            l2_sensitivity_squared: self.l2_sensitivity_squared,
            rows_per_unit: shape.rows_per_unit,
            marginals: shape.marginals,
            dimension: shape.dimension,
            rho: self.rho,
            shares: None,
        }
    }
}

fn check_range(num: u128, den: u128) -> Result<(), MechanismError> {
    let sigma = || (num as f64 / den as f64).sqrt();
    let square = |limit: u64| u128::from(limit) * u128::from(limit);
    if num / den < square(MIN_SIGMA) {
        return Err(MechanismError::SigmaTooSmall { sigma: sigma(), min: MIN_SIGMA as f64 });
    }
    if num.div_ceil(den) > square(MAX_SIGMA) {
        return Err(MechanismError::SigmaTooLarge { sigma: sigma(), max: MAX_SIGMA as f64 });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::super::staircase::tests::{alike, follows};
    use super::super::twin::Twin;
    use super::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha20Rng;

    fn sampler(num: u128, den: u128) -> DiscreteGaussian {
        DiscreteGaussian::unchecked(1, SigmaSquared::new(num, den).unwrap()).unwrap()
    }

    // σ² as fractions: 0.5², 1², 3², 5², 100², 1234.567².
    const VARIANCES: [(u128, u128); 6] =
        [(1, 4), (1, 1), (9, 1), (25, 1), (10_000, 1), (1_524_155_677_489, 1_000_000)];

    // Error rate below 1e-6 each (see `follows`); n = 1 000 000.
    #[test]
    fn draws_follow_the_exact_pmf() {
        for (num, den) in VARIANCES {
            let gaussian = sampler(num, den);
            let sigma_squared = gaussian.variance();
            let mut rng = ChaCha20Rng::seed_from_u64(20_040_001);
            let weight = |x: i64| (-(x as f64).powi(2) / (2.0 * sigma_squared)).exp();
            let range = (sigma_squared.sqrt() * 12.0).ceil() as i64 + 2;
            follows(1_000_000, range, weight, || gaussian.draw(&mut rng)).unwrap();
        }
    }

    // The paper's algorithms, written for being obviously right, pass the same test: they are a fair twin.
    #[test]
    fn the_twin_follows_the_exact_pmf() {
        for (num, den) in VARIANCES {
            let twin = Twin::new(SigmaSquared::new(num, den).unwrap());
            let sigma_squared = num as f64 / den as f64;
            let mut rng = ChaCha20Rng::seed_from_u64(20_040_003);
            let weight = |x: i64| (-(x as f64).powi(2) / (2.0 * sigma_squared)).exp();
            let range = (sigma_squared.sqrt() * 12.0).ceil() as i64 + 2;
            follows(300_000, range, weight, || twin.draw(&mut rng)).unwrap();
        }
    }

    // The oracle has its own proof and no random seam: two samples of 30 000 are held against each other.
    // Error rate below 1e-6 for each deviation (see `alike`).
    #[test]
    fn draws_are_like_those_of_the_opendp_sampler() {
        let n = 30_000;
        for (sigma, (num, den)) in [0.5f64, 1.0, 3.0, 5.0, 100.0, 1234.567].into_iter().zip(VARIANCES) {
            let gaussian = sampler(num, den);
            let mut rng = ChaCha20Rng::seed_from_u64(99);
            let ours: Vec<i64> = (0..n).map(|_| gaussian.draw(&mut rng)).collect();
            let oracle = || {
                let draw =
                    opendp::traits::samplers::sample_discrete_gaussian(sigma.try_into().unwrap()).unwrap();
                i64::try_from(draw).unwrap()
            };
            let theirs: Vec<i64> = (0..n).map(|_| oracle()).collect();
            alike(&ours, &theirs).unwrap_or_else(|error| panic!("sigma {sigma}: {error}"));
        }
    }

    #[test]
    fn variance_is_within_four_standard_errors_at_release_scales() {
        // Two-sided error rate 6e-5 for each; largest σ allowed included.
        for sigma_squared in [25u128, 1 << 20, 1 << 40, 1 << 56] {
            let gaussian = sampler(sigma_squared, 1);
            let mut rng = ChaCha20Rng::seed_from_u64(4);
            let n = 100_000;
            let second: f64 =
                (0..n).map(|_| (gaussian.draw(&mut rng) as f64).powi(2)).sum::<f64>() / f64::from(n);
            let gap = second / sigma_squared as f64 - 1.0;
            assert!(gap.abs() < 4.0 * (2.0 / f64::from(n)).sqrt(), "{sigma_squared}: {gap}");
        }
    }

    #[test]
    fn a_budget_is_never_overspent_and_nearly_used_up() {
        for (sensitivity_squared, units) in
            [(1, 3_000_000_000), (7, 1 << 30), (1 << 56, (1 << 50) + 1), (300, 12_345)]
        {
            let rho = Rho::from_units(units);
            let gaussian = DiscreteGaussian::from_rho(sensitivity_squared, rho).unwrap();
            assert!(gaussian.rho() <= rho);
            assert!(units - gaussian.rho().units() <= 1 + (units >> 55), "{units}: {:?}", gaussian.rho());
        }
    }

    #[test]
    fn sigma_limits_are_refused_by_name() {
        let five = Rho::from_f64_round_down(0.02).unwrap();
        assert!(DiscreteGaussian::from_rho(1, five).is_ok(), "σ = 5 exactly, rounded up");
        assert!(matches!(
            DiscreteGaussian::from_rho(1, Rho::from_units(five.units() + 2)),
            Err(MechanismError::SigmaTooSmall { .. })
        ));
        let large = SigmaSquared::new(1 << 56, 1).unwrap();
        assert!(DiscreteGaussian::from_sigma_squared(1, large).is_ok());
        let larger = SigmaSquared::new((1 << 56) + 1, 1).unwrap();
        assert!(matches!(
            DiscreteGaussian::from_sigma_squared(1, larger),
            Err(MechanismError::SigmaTooLarge { .. })
        ));
        assert_eq!(DiscreteGaussian::from_rho(0, five), Err(MechanismError::ZeroSensitivity));
        assert_eq!(DiscreteGaussian::from_rho(1, Rho::ZERO), Err(MechanismError::ZeroRho));
    }
}

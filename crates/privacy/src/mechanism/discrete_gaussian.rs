//! The exact discrete Gaussian on the integers.
//!
//! P[X = x] ∝ exp(-x²/(2σ²)), drawn by rejection from a discrete Laplace: Algorithms 1 to 3 of Canonne, Kamath,
//! Steinke, "The Discrete Gaussian for Differential Privacy" (arXiv 2004.00010). σ² is an exact fraction and every
//! acceptance decision compares integers, so the floating-point attacks on rounded Gaussians don't apply. Running
//! time depends on the noise drawn (not on the data): draw before sending, on a schedule.
//!
//! A vector of L2 sensitivity Δ costs ρ = Δ²/(2σ²). σ below 5 integer units is refused: there the discrete Gaussian
//! differs visibly from the continuous one and a finer grid is the better choice.

use super::bernoulli::{exp_minus_fraction, exp_minus_one, exp_minus_small, uniform};
use super::event::MechanismKind;
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
    sampler: Sampler,
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

    // Without the lower limit on σ: small variances are only for tests of the sampler.
    fn unchecked(l2_sensitivity_squared: u64, sigma_squared: SigmaSquared) -> Result<Self, MechanismError> {
        if l2_sensitivity_squared == 0 {
            return Err(MechanismError::ZeroSensitivity);
        }
        let rho = sigma_squared.cost(l2_sensitivity_squared).ok_or(MechanismError::ZeroRho)?;
        Ok(Self { l2_sensitivity_squared, sigma_squared, rho, sampler: Sampler::new(sigma_squared) })
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

    fn event(&self, shape: EventShape) -> MechanismEvent {
        MechanismEvent {
            kind: MechanismKind::DiscreteGaussian,
            sigma_squared: self.sigma_squared,
            l2_sensitivity_squared: self.l2_sensitivity_squared,
            rows_per_unit: shape.rows_per_unit,
            marginals: shape.marginals,
            dimension: shape.dimension,
            rho: self.rho,
        }
    }
}

/// Algorithm 3 with its constants.
#[derive(Debug, Clone, PartialEq)]
struct Sampler {
    /// Scale of the proposal: t = ⌊σ⌋ + 1.
    scale: u64,
    /// t · den.
    slope: u128,
    /// num.
    offset: u128,
    /// 2 · t² · den · num, below 2¹²¹.
    divisor: u128,
}

impl Sampler {
    fn new(sigma_squared: SigmaSquared) -> Self {
        let (num, den) = (u128::from(sigma_squared.num()), u128::from(sigma_squared.den()));
        // ⌊√⌊x⌋⌋ = ⌊√x⌋.
        let scale = (num / den).isqrt() + 1;
        let slope = scale * den;
        // num < 2^58 and t²·den ≤ 15·num (σ² ≥ 1/8), so the product stays below 2^121.
        let divisor = 2 * (scale * slope) * num;
        // σ < 2^29, so the scale fits.
        Self { scale: scale as u64, slope, offset: num, divisor }
    }

    #[inline]
    fn draw<R: RngCore>(&self, rng: &mut R) -> i64 {
        loop {
            let magnitude = self.laplace_magnitude(rng);
            let negative = rng.next_u32() & 1 == 1;
            // Zero would come up twice, once with each sign: Algorithm 2 drops one of them.
            if !(negative && magnitude == 0) && self.accept(magnitude, rng) {
                // The magnitude passed `accept`, so it is below 64 σ < 2^35.
                let value = magnitude as i64;
                return if negative { -value } else { value };
            }
        }
    }

    /// Algorithm 2 without its sign: U + t·V, U with probability ∝ exp(-U/t), V geometric.
    #[inline]
    fn laplace_magnitude<R: RngCore>(&self, rng: &mut R) -> u64 {
        let low = loop {
            let low = uniform(self.scale, rng);
            if exp_minus_small(low, self.scale, rng) {
                break low;
            }
        };
        let mut steps = 0u64;
        while exp_minus_one(rng) {
            steps += 1;
        }
        low + self.scale * steps
    }

    /// Bernoulli(exp(-γ)), γ = (|y| - σ²/t)²/(2σ²) = (|y|·t·den - num)² / (2·t²·den·num).
    #[inline]
    fn accept<R: RngCore>(&self, magnitude: u64, rng: &mut R) -> bool {
        let distance = (u128::from(magnitude) * self.slope).abs_diff(self.offset);
        let Some(square) = distance.checked_mul(distance) else {
            return self.accept_far_tail(rng);
        };
        if square <= self.divisor {
            return exp_minus_fraction(square, self.divisor, rng);
        }
        let (whole, rest) = (square / self.divisor, square % self.divisor);
        (0..whole).all(|_| exp_minus_one(rng)) && exp_minus_fraction(rest, self.divisor, rng)
    }

    /// γ doesn't fit 128 bits, so it is above ⌊2¹²⁸/divisor⌋ - 1 ≥ 127 (above 1400 for σ ≥ 5): accepting has a
    /// probability below e⁻¹⁴⁰⁰ and is left out.
    #[cold]
    fn accept_far_tail<R: RngCore>(&self, rng: &mut R) -> bool {
        let whole = u128::MAX / self.divisor;
        let _ = (0..whole).all(|_| exp_minus_one(rng));
        false
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
    use super::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha20Rng;

    fn sampler(num: u128, den: u128) -> DiscreteGaussian {
        DiscreteGaussian::unchecked(1, SigmaSquared::new(num, den).unwrap()).unwrap()
    }

    // σ² as fractions: 0.5², 1², 3², 5², 100², 1234.567².
    const VARIANCES: [(u128, u128); 6] =
        [(1, 4), (1, 1), (9, 1), (25, 1), (10_000, 1), (1_524_155_677_489, 1_000_000)];

    /// Exact probabilities of x = -range..=range, by direct summation.
    fn pmf(sigma_squared: f64, range: i64) -> Vec<f64> {
        let weights: Vec<f64> =
            (-range..=range).map(|x| (-(x as f64).powi(2) / (2.0 * sigma_squared)).exp()).collect();
        let total: f64 = weights.iter().sum();
        weights.iter().map(|w| w / total).collect()
    }

    // Chi-square against the exact pmf. The statistic of d degrees of freedom exceeds d + 2√(5 ln 10 · 2d)·… with
    // probability p; Laurent and Massart (2000): P[X ≥ d + 2√(dx) + 2x] ≤ e^-x. x = 14: error rate below 1e-6 each.
    #[test]
    fn draws_follow_the_exact_pmf() {
        for (num, den) in VARIANCES {
            let gaussian = sampler(num, den);
            let sigma_squared = gaussian.variance();
            let range = (sigma_squared.sqrt() * 12.0).ceil() as i64 + 2;
            let probabilities = pmf(sigma_squared, range);
            let n = 300_000u32;
            let mut rng = ChaCha20Rng::seed_from_u64(20_040_001);
            let mut counts = vec![0u32; probabilities.len()];
            for _ in 0..n {
                counts[(gaussian.draw(&mut rng) + range) as usize] += 1;
            }
            // Neighbouring values are grouped until 20 draws are expected.
            let (mut chi, mut cells) = (0.0, 0.0);
            let (mut expected, mut observed) = (0.0, 0.0);
            for (p, c) in probabilities.iter().zip(&counts) {
                expected += p * f64::from(n);
                observed += f64::from(*c);
                if expected >= 20.0 {
                    chi += (observed - expected).powi(2) / expected;
                    cells += 1.0;
                    (expected, observed) = (0.0, 0.0);
                }
            }
            let freedom: f64 = cells - 1.0;
            let limit = freedom + 2.0 * (freedom * 14.0).sqrt() + 28.0;
            assert!(cells >= 5.0 && chi < limit, "sigma² {sigma_squared}: chi² {chi} over {cells} cells");
        }
    }

    // The oracle has its own proof and no random seam: moments of two independent samples are compared.
    // n = 20 000 each; 5 standard errors of the difference, two-sided error rate below 6e-7 for each comparison.
    #[test]
    fn moments_agree_with_the_opendp_sampler() {
        let n = 20_000;
        for (sigma, num) in [(1.0f64, 1u128), (5.0, 25), (100.0, 10_000)] {
            let gaussian = sampler(num, 1);
            let mut rng = ChaCha20Rng::seed_from_u64(99);
            let ours: Vec<f64> = (0..n).map(|_| gaussian.draw(&mut rng) as f64).collect();
            let oracle: Vec<f64> = (0..n)
                .map(|_| {
                    let scale = sigma.try_into().unwrap();
                    let draw = opendp::traits::samplers::sample_discrete_gaussian(scale).unwrap();
                    i64::try_from(draw).unwrap() as f64
                })
                .collect();
            let moment = |values: &[f64], power: i32| {
                values.iter().map(|v| (v / sigma).powi(power)).sum::<f64>() / n as f64
            };
            // Variances of x, x², x⁴ of a standard normal are 1, 2 and 96; the discrete ones are close to that.
            for (power, variance) in [(1, 1.0), (2, 2.0), (4, 96.0)] {
                let error = (2.0 * variance * 1.2 / n as f64).sqrt();
                let gap = (moment(&ours, power) - moment(&oracle, power)).abs();
                assert!(gap < 5.0 * error, "sigma {sigma}, moment {power}: gap {gap}");
            }
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

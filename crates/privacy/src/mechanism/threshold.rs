//! A histogram over levels that nobody declared: noise on the counts that there are, and a threshold that hides who made one be.
//!
//! Adding a unit of at most k rows moves the counts of levels that were there by at most k in L2, which the discrete Gaussian noise
//! pays for, and can make at most k levels appear, each of at most k rows. Only levels whose noisy count is at least
//! T = k + ⌈σ√(2 ln(k/δ′))⌉ are released, so that any of those k appears with probability at most δ′: the discrete
//! Gaussian's tail is at most exp(−t²/2σ²) (Canonne, Kamath and Steinke 2020, arXiv 2004.00010, corollary 9). So the release is ρ-zCDP but for
//! an event of probability δ′ (Korolova, Kenthapadi, Mishra and Ntoulas, *Releasing search queries and clicks privately*, WWW 2009;
//! Wilkins, Kifer, Zhang and Karrer, arXiv 2202.01100), add/remove one unit; who draws is trusted.
//!
//! A ledger counts ρ and states ε at one δ. What a threshold takes of δ, it therefore pays in ρ: [`SURCHARGE`] is at least what a
//! grant of any ε up to [`MOST_EPSILON`] shrinks by when its δ, not below [`LEAST_DELTA`], gives away [`THRESHOLD_DELTA`] once more, up to
//! [`MOST_THRESHOLDS`] times.

use std::collections::BTreeMap;

use rand::{CryptoRng, RngCore};
use serde::{Deserialize, Serialize};

use super::discrete_gaussian::MIN_SIGMA;
use super::{DiscreteGaussian, EventShape, MechanismError, MechanismEvent, MechanismKind, Noise};
use crate::budget::Rho;
use crate::private::Private;

/// A histogram of levels, as it is released.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FoundLevels {
    /// Levels in alphabetical order with their noisy counts.
    pub levels: Vec<(String, i64)>,
}

/// The noise of such a histogram, with its threshold.
#[derive(Debug, Clone, PartialEq)]
pub struct ThresholdHistogram {
    noise: DiscreteGaussian,
    rows_per_unit: u32,
    threshold: i64,
}

impl ThresholdHistogram {
    /// The least noise that costs at most `rho`, the threshold's share of δ included, where a unit has at most so many rows; no less
    /// than the mechanism's smallest, whatever `rho` buys.
    ///
    /// # Errors
    /// [`MechanismError::ZeroRho`] for no more than [`SURCHARGE`]; as [`DiscreteGaussian::from_rho`].
    pub fn from_rho(rows_per_unit: u32, rho: Rho) -> Result<Self, MechanismError> {
        let k = u64::from(rows_per_unit);
        let squared = k.saturating_mul(k);
        // ρ = Δ²/(2σ²) in units of 2⁻⁴⁰, at the smallest σ.
        let most = (u128::from(squared) << 39) / u128::from(MIN_SIGMA * MIN_SIGMA);
        let most = Rho::from_units(u64::try_from(most).unwrap_or(u64::MAX));
        let noise = DiscreteGaussian::from_rho(squared, rho.saturating_sub(SURCHARGE).min(most))?;
        let tail =
            noise.sigma_squared().sigma() * (2.0 * (f64::from(rows_per_unit) / THRESHOLD_DELTA).ln()).sqrt();
        // σ is at most 2²⁸ and the root below 13: no cast overflows.
        let threshold = i64::from(rows_per_unit) + tail.ceil() as i64;
        Ok(Self { noise, rows_per_unit, threshold })
    }

    /// The least noisy count that is released.
    #[must_use]
    pub fn threshold(&self) -> i64 {
        self.threshold
    }

    /// Standard deviation of the noise on each count.
    #[must_use]
    pub fn sigma(&self) -> f64 {
        self.noise.sigma_squared().sigma()
    }

    /// What one use costs.
    #[must_use]
    pub fn rho(&self) -> Rho {
        self.noise.rho().checked_add(SURCHARGE).unwrap_or(Rho::from_units(u64::MAX))
    }

    /// The record of one use. How many levels there were isn't in it: it is no public figure.
    #[must_use]
    pub fn event(&self) -> MechanismEvent {
        let shape = EventShape { rows_per_unit: self.rows_per_unit, marginals: 1, dimension: 0 };
        MechanismEvent { kind: MechanismKind::ThresholdHistogram, rho: self.rho(), ..self.noise.event(shape) }
    }

    /// Noises the counts of all levels that there are and keeps what reaches the threshold: a [`FoundLevels`] as JSON.
    ///
    /// `counts` are of at most the stated number of rows of each unit.
    pub fn release<R: RngCore + CryptoRng>(
        &self,
        counts: &BTreeMap<String, i64>,
        rng: &mut R,
    ) -> Private<Vec<u8>> {
        let noised =
            |(level, count): (&String, &i64)| (level.clone(), count.saturating_add(self.noise.draw(rng)));
        let levels = counts.iter().map(noised).filter(|(_, count)| *count >= self.threshold).collect();
        // Unwrap safety: strings and integers always have a JSON form.
        let bytes = serde_json::to_vec(&FoundLevels { levels }).expect("levels have a JSON form");
        Private::new(bytes)
    }
}

/// ⌈k²/(2σ²) · 2⁴⁰⌉ units and the surcharge; nothing if that overflows.
pub(super) fn cost(sigma_squared: super::SigmaSquared, l2_sensitivity_squared: u64) -> Option<Rho> {
    sigma_squared.cost(l2_sensitivity_squared)?.checked_add(SURCHARGE)
}

/// δ′ of one use.
pub const THRESHOLD_DELTA: f64 = 1e-12;
/// Smallest δ of a grant that thresholds can be paid from.
pub const LEAST_DELTA: f64 = 1e-9;
/// Largest ε of such a grant.
pub const MOST_EPSILON: f64 = 20.0;
/// Uses within one account.
pub const MOST_THRESHOLDS: usize = 100;
/// What one use costs beside its noise: 2⁻¹², a thousandth of what ε = 3 at δ = 1e-5 buys.
pub const SURCHARGE: Rho = Rho::from_units(1 << 28);

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use rand::SeedableRng;
    use rand_chacha::ChaCha20Rng;

    use super::*;
    use crate::accountant::zcdp::rho_for;
    use crate::budget::{Delta, Epsilon};

    fn histogram(k: u32, rho: f64) -> ThresholdHistogram {
        ThresholdHistogram::from_rho(k, Rho::from_f64_round_down(rho).unwrap()).unwrap()
    }

    /// The exact tail of the discrete Gaussian from its pmf, summed outward.
    #[test]
    fn a_level_that_one_unit_made_appears_no_more_often_than_its_delta() {
        for (k, rho) in [(1, 0.005), (1, 0.01), (5, 0.05), (20, 0.02)] {
            let histogram = histogram(k, rho);
            let sigma = histogram.sigma();
            let weight = |x: i64| (-(x as f64).powi(2) / (2.0 * sigma * sigma)).exp();
            let reach = (40.0 * sigma) as i64;
            let all: f64 = (-reach..=reach).map(weight).sum();
            let beyond: f64 = (histogram.threshold() - i64::from(k)..=reach).map(weight).sum();
            let chance = f64::from(k) * beyond / all;
            assert!(chance <= THRESHOLD_DELTA, "{k} {rho}: {chance}");
            // And it isn't far above what is needed: three quarters of it would not do.
            let too_low: f64 = ((histogram.threshold() - i64::from(k)) * 3 / 4..=reach).map(weight).sum();
            assert!(f64::from(k) * too_low / all > THRESHOLD_DELTA);
        }
    }

    /// For whatever is granted and however much of it was spent on thresholds before, what is left of the claim's δ
    /// gives the claimed ε.
    #[test]
    fn the_surcharge_pays_for_the_thresholds_share_of_delta() {
        for delta in [LEAST_DELTA, 1e-8, 1e-6, 1e-5, 1e-3] {
            for epsilon in [0.01, 0.1, 0.5, 1.0, 3.0, 8.0, MOST_EPSILON] {
                let epsilon = Epsilon::new(epsilon).unwrap();
                let granted = rho_for(epsilon, Delta::new(delta).unwrap());
                for uses in [1, 2, 10, MOST_THRESHOLDS] {
                    let left = Delta::new(delta - uses as f64 * THRESHOLD_DELTA).unwrap();
                    let shrunk = granted.saturating_sub(rho_for(epsilon, left));
                    let paid = SURCHARGE.share(uses as u64, 1);
                    assert!(paid >= shrunk, "{delta} {epsilon:?} {uses}: {shrunk:?} of {paid:?}");
                }
            }
        }
        // Where δ is smaller it wouldn't.
        let epsilon = Epsilon::new(MOST_EPSILON).unwrap();
        let granted = |delta: f64| rho_for(epsilon, Delta::new(delta).unwrap());
        assert!(granted(1e-11).saturating_sub(granted(1e-11 - THRESHOLD_DELTA)) > SURCHARGE);
    }

    #[test]
    fn levels_with_many_rows_are_found_and_rare_ones_are_not() {
        let histogram = histogram(1, 0.01);
        assert!(histogram.threshold() > 50 && histogram.threshold() < 60, "{}", histogram.threshold());
        let counts = BTreeMap::from([
            ("berlin".to_owned(), 900),
            ("paris".to_owned(), 400),
            ("a person".to_owned(), 1),
        ]);
        let mut rng = ChaCha20Rng::seed_from_u64(5);
        for _ in 0..200 {
            let released = histogram.release(&counts, &mut rng);
            let found: FoundLevels = serde_json::from_slice(released.as_bytes()).unwrap();
            let names: Vec<&str> = found.levels.iter().map(|(level, _)| level.as_str()).collect();
            assert_eq!(names, ["berlin", "paris"]);
            assert!(found.levels.iter().all(|(level, count)| {
                (*count - counts[level]).unsigned_abs() < 60 && *count >= histogram.threshold()
            }));
        }
        // Nothing there, nothing found, and it costs the same.
        let none: FoundLevels =
            serde_json::from_slice(histogram.release(&BTreeMap::new(), &mut rng).as_bytes()).unwrap();
        assert!(none.levels.is_empty());
    }

    #[test]
    fn the_event_states_the_whole_cost_and_nothing_of_the_table() {
        let rho = Rho::from_f64_round_down(0.01).unwrap();
        let histogram = ThresholdHistogram::from_rho(3, rho).unwrap();
        let event = histogram.event();
        event.check().unwrap();
        assert!(event.rho == histogram.rho() && event.rho <= rho && event.dimension == 0);
        let mut cheaper = event;
        cheaper.rho = cheaper.rho.saturating_sub(SURCHARGE);
        assert!(matches!(cheaper.check(), Err(MechanismError::Cost { .. })));
        assert!(matches!(ThresholdHistogram::from_rho(1, SURCHARGE), Err(MechanismError::ZeroRho)));
        let rich = ThresholdHistogram::from_rho(3, Rho::from_f64_round_down(5.0).unwrap()).unwrap();
        assert!((rich.sigma() - 5.0).abs() < 1e-9 && rich.rho().as_f64() < 0.19, "{rich:?}");
        rich.event().check().unwrap();
        assert!(matches!(ThresholdHistogram::from_rho(0, rho), Err(MechanismError::ZeroSensitivity)));
    }
}

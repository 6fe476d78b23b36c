//! The clip norm that follows a quantile of the units' gradient norms, and what following it costs.
//!
//! Andrew, Thakkar, McMahan, Ramaswamy 2021 ("Differentially Private Learning with Adaptive Clipping", Algorithm 1):
//! each round also counts the units whose gradient was within the norm, with noise, and the next norm is
//! C·exp(−η·(b̃ − γ)) for the noisy share b̃, the target γ and a learning rate η.
//!
//! The counts are two more values of the round's vector, weighted: a unit adds [`weight`] integer steps to the first if it is
//! within the norm, and to the second if it is beyond. So they are noised, summed, masked and debited with the gradient, as
//! one Gaussian release of L2 sensitivity √(norm² + weight²) ([`sensitivity`]): what the quantile costs is in the noise of the
//! round, which becomes larger by half a percent, and in no second entry of a ledger. Counting both sides needs no number of
//! units from elsewhere: it holds for units of many rows, sampled rounds and agents that are missing.

use garde::Validate;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::checks;

/// A clip norm that follows a quantile.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema, Validate)]
#[serde(deny_unknown_fields)]
pub struct AdaptiveClip {
    /// Share of units whose gradient should be within the norm, in [0.9, 0.99]. A lower norm clips first what is rare: the
    /// large gradients of a small class, so that the step leans to the other, with or without noise.
    #[garde(custom(high_quantile))]
    pub quantile: f64,
    /// How fast the norm follows, in [0.01, 2]: at 0.2 a norm with every unit above it grows by 0.2 times the quantile a round.
    /// Default 0.2.
    #[serde(default = "learning_rate")]
    #[garde(custom(checks::between(0.01, 2.0)))]
    pub learning_rate: f64,
    /// Norm of the first round, in [0.0001, 10000]; none = the quantile on the corpus. Default none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[garde(inner(custom(checks::between(SMALLEST_NORM, LARGEST_NORM))))]
    pub initial: Option<f64>,
}

impl AdaptiveClip {
    /// The next round's norm, after one in which these noisy numbers of units were within and beyond `norm`.
    #[must_use]
    pub fn next(&self, norm: f64, within: f64, beyond: f64) -> f64 {
        let share = within / (within + beyond);
        // Noise takes a share out of its range. Where it leaves no units at all there is nothing to follow.
        let known = share.is_finite() && within + beyond > 0.0;
        let share = if known { share.clamp(0.0, 1.0) } else { self.quantile };
        (norm * (-self.learning_rate * (share - self.quantile)).exp()).clamp(SMALLEST_NORM, LARGEST_NORM)
    }
}

/// Integer steps that a unit adds to the count of its side, for gradients of at most `norm` integer steps.
#[must_use]
pub fn weight(norm: u64) -> u64 {
    (norm / NORMS_A_COUNT).max(1)
}

/// L2 sensitivity of the vector of gradient and weighted counts, rounded up; `weight` 0 is a gradient alone.
#[must_use]
pub fn sensitivity(norm: u64, weight: u64) -> u64 {
    if weight == 0 {
        return norm;
    }
    let square = |of: u64| u128::from(of) * u128::from(of);
    let square = square(norm).saturating_add(square(weight));
    let root = square.isqrt();
    let up = if root * root < square { root + 1 } else { root };
    u64::try_from(up).unwrap_or(u64::MAX)
}

fn learning_rate() -> f64 {
    0.2
}

fn high_quantile(value: &f64, (): &()) -> garde::Result {
    checks::between(LEAST_QUANTILE, MOST_QUANTILE)(value, &()).map_err(|error| {
        garde::Error::new(format!("{error}: a norm near the median clips a small class's gradients away"))
    })
}

/// Least quantile that a norm may follow.
pub const LEAST_QUANTILE: f64 = 0.9;
/// Largest quantile that a norm may follow.
pub const MOST_QUANTILE: f64 = 0.99;

/// A tenth of the norm for the counts: √(1 + 1/100), so half a percent more noise.
const NORMS_A_COUNT: u64 = 10;
/// Smallest clip norm of a plan.
pub const SMALLEST_NORM: f64 = 1e-4;
/// Largest clip norm of a plan.
pub const LARGEST_NORM: f64 = 1e4;

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha20Rng;

    use super::*;

    fn clip(quantile: f64) -> AdaptiveClip {
        AdaptiveClip { quantile, learning_rate: 0.2, initial: None }
    }

    #[test]
    fn the_joint_sensitivity_is_the_hypotenuse_rounded_up() {
        assert_eq!(sensitivity(3, 4), 5);
        assert_eq!(sensitivity(65_536, weight(65_536)), 65_863, "65862.8");
        assert_eq!((weight(9), weight(65_536)), (1, 6_553));
        assert_eq!(sensitivity(65_536, 0), 65_536);
        assert_eq!(sensitivity(u64::MAX, u64::MAX), u64::MAX, "never below what it stands for by wrapping");
        for (norm, count) in [(32_769, 3_276), (40_000, 1), (65_536, 6_553), (7, 7)] {
            let joint = u128::from(sensitivity(norm, count));
            let square = u128::from(norm) * u128::from(norm) + u128::from(count) * u128::from(count);
            assert!(joint * joint >= square && (joint - 1) * (joint - 1) < square, "{norm}, {count}");
        }
    }

    /// 1000 units with norms uniform in (0, 8): the norm comes to the quantile from both sides, through noise of sd 50 on each
    /// count.
    #[test]
    fn the_norm_comes_to_the_quantile_from_both_sides() {
        let mut rng = ChaCha20Rng::seed_from_u64(3);
        for (quantile, first) in [(0.5, 0.05), (0.5, 100.0), (0.9, 1.0)] {
            let clip = clip(quantile);
            let (mut norm, mut late): (f64, f64) = (first, 0.0);
            for round in 0..400 {
                let mut noise = || (0..12).map(|_| rng.random_range(-0.5..0.5)).sum::<f64>() * 50.0;
                let within = 1_000.0 * (norm / 8.0).min(1.0);
                norm = clip.next(norm, within + noise(), 1_000.0 - within + noise());
                late += if round >= 300 { norm / 100.0 } else { 0.0 };
            }
            // The slope at the fixed point is 0.2 times the quantile a round, so the noise moves the norm by about 4 %; a mean
            // over 100 rounds lies within 5 % of it.
            assert!((late / (8.0 * quantile) - 1.0).abs() < 0.05, "{quantile} from {first}: {late}");
        }
    }

    #[test]
    fn whatever_the_noise_says_the_norm_stays_a_norm() {
        let clip = clip(0.5);
        let same = |(within, beyond): (f64, f64), as_share: f64| {
            let (got, expected) = (clip.next(2.0, within, beyond), clip.next(2.0, as_share, 1.0 - as_share));
            assert!((got - expected).abs() < 1e-12, "{within}, {beyond}: {got}, {expected}");
        };
        for nothing in [(f64::NAN, 1.0), (0.0, 0.0), (-3.0, 1.0), (5.0, -5.0), (f64::INFINITY, 1.0)] {
            same(nothing, 0.5);
        }
        same((30.0, -5.0), 1.0);
        same((-2.0, 9.0), 0.0);
        same((3.0, 1.0), 0.75);
        assert!(clip.next(LARGEST_NORM, 0.0, 9.0) <= LARGEST_NORM);
        assert!(clip.next(SMALLEST_NORM, 9.0, 0.0) >= SMALLEST_NORM);
        assert!(clip.next(2.0, 9.0, 1.0) < 2.0 && clip.next(2.0, 1.0, 9.0) > 2.0);
    }
}

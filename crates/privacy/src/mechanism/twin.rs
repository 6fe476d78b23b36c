//! The naive twin of the discrete Gaussian: Algorithms 1 to 3 of Canonne, Kamath, Steinke (arXiv 2004.00010) as printed.
//!
//! Slow and plain: a discrete Laplace proposal, accepted by coin flips of exact probabilities. For tests only.

use super::SigmaSquared;
use super::bernoulli::{exp_minus_fraction, exp_minus_one, exp_minus_small, uniform};
use rand::RngCore;

/// Algorithm 3 with its constants.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Twin {
    /// Scale of the proposal: t = ⌊σ⌋ + 1.
    scale: u64,
    /// t · den.
    slope: u128,
    /// num.
    offset: u128,
    /// 2 · t² · den · num, below 2¹²¹.
    divisor: u128,
}

impl Twin {
    pub(super) fn new(sigma_squared: SigmaSquared) -> Self {
        let (num, den) = (u128::from(sigma_squared.num()), u128::from(sigma_squared.den()));
        // ⌊√⌊x⌋⌋ = ⌊√x⌋.
        let scale = (num / den).isqrt() + 1;
        let slope = scale * den;
        // num < 2^58 and t²·den ≤ 15·num (σ² ≥ 1/8), so the product stays below 2^121.
        let divisor = 2 * (scale * slope) * num;
        // σ < 2^29, so the scale fits.
        Self { scale: scale as u64, slope, offset: num, divisor }
    }

    pub(super) fn draw<R: RngCore>(&self, rng: &mut R) -> i64 {
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

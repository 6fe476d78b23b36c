//! Exact ε of composed *continuous* Gaussian noise.
//!
//! Gaussian differential privacy with μ = √(2ρ): δ(ε) = Φ(μ/2 - ε/μ) - e^ε Φ(-μ/2 - ε/μ) (Balle, Wang 2018;
//! Dong, Roth, Su 2019). Discrete Gaussian noise costs a little more (0.16 % at σ = 5 units), so this is the second,
//! labelled figure of a report and never the claim.

use super::normal::{TAIL_START, density, mills, upper_tail};
use super::zcdp::EPSILON_FLOOR;
use crate::budget::{Delta, Epsilon, Rho};

/// The ε of continuous Gaussian noise with total loss ρ at a given δ.
#[must_use]
pub fn epsilon(rho: Rho, delta: Delta) -> Epsilon {
    // Unwrap safety: ρ is below 2^24, so μ is below 2^13.
    epsilon_at_mu((2.0 * rho.as_f64()).sqrt(), delta).expect("an integer loss has a finite mu")
}

/// The ε of μ-Gaussian DP at a given δ; noise of multiplier σ run T times has μ = √T/σ.
///
/// Nothing for a μ that is negative, not a number, or above [`MAX_MU`].
#[must_use]
pub fn epsilon_at_mu(mu: f64, delta: Delta) -> Option<Epsilon> {
    if !(0.0..=MAX_MU).contains(&mu) {
        return None;
    }
    let fits = |eps: f64| delta_at(mu, eps) <= delta.get();
    let (mut low, mut high) = (0.0, EPSILON_FLOOR);
    while !fits(high) {
        (low, high) = (high, high * 2.0);
    }
    // Halving until the interval is one rounding step wide; the upper end always fits.
    for _ in 0..BISECTIONS {
        let middle = low + (high - low) / 2.0;
        if fits(middle) {
            high = middle;
        } else {
            low = middle;
        }
    }
    Epsilon::new(high.max(EPSILON_FLOOR)).ok()
}

/// δ(ε) of μ-Gaussian DP, for μ ≥ 0 and ε ≥ 0.
#[must_use]
pub fn delta_at(mu: f64, eps: f64) -> f64 {
    if mu <= 0.0 {
        return 0.0;
    }
    // e^ε φ(ε/μ + μ/2) = φ(ε/μ - μ/2), so no large exponential appears.
    let x = eps / mu - mu / 2.0;
    let far = mills(x + mu);
    if x >= TAIL_START { density(x) * (mills(x) - far) } else { upper_tail(x) - density(x) * far }
}

/// Largest μ: beyond it no ε means anything.
pub const MAX_MU: f64 = 65_536.0;
const BISECTIONS: usize = 70;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::accountant::crosscheck::tests::vectors;

    // `eps_exact`: mpmath with 40 digits from the same formula; stated tolerance 1e-9 relative. ρ itself is rounded
    // to 2^-40, which moves ε by less than that here.
    #[test]
    fn epsilon_matches_the_exact_vectors() {
        let mut seen = 0;
        for row in vectors() {
            let ours = epsilon(row.rho(), Delta::new(row.delta).unwrap()).get();
            assert!((ours / row.eps_exact - 1.0).abs() < 1e-9, "{row:?}: {ours}");
            seen += 1;
        }
        assert_eq!(seen, 28);
    }

    #[test]
    fn no_loss_costs_no_epsilon() {
        assert_eq!(epsilon_at_mu(MAX_MU * 2.0, Delta::new(1e-5).unwrap()), None);
        assert!(epsilon_at_mu(MAX_MU, Delta::new(1e-5).unwrap()).is_some());
        assert!([f64::NAN, -1.0].iter().all(|mu| epsilon_at_mu(*mu, Delta::new(1e-5).unwrap()).is_none()));
        assert!(epsilon(Rho::ZERO, Delta::new(1e-5).unwrap()).get() <= EPSILON_FLOOR);
        assert!(epsilon(Rho::from_units(u64::MAX >> 8), Delta::new(1e-5).unwrap()).get().is_finite());
    }
}

//! Exact ε of composed *continuous* Gaussian noise.
//!
//! Gaussian differential privacy with μ = √(2ρ): δ(ε) = Φ(μ/2 - ε/μ) - e^ε Φ(-μ/2 - ε/μ) (Balle, Wang 2018;
//! Dong, Roth, Su 2019). Discrete Gaussian noise costs a little more (0.16 % at σ = 5 units), so this is the second,
//! labelled figure of a report and never the claim.

use super::zcdp::EPSILON_FLOOR;
use crate::budget::{Delta, Epsilon, Rho};

/// The ε of continuous Gaussian noise with total loss ρ at a given δ.
#[must_use]
pub fn epsilon(rho: Rho, delta: Delta) -> Epsilon {
    let mu = (2.0 * rho.as_f64()).sqrt();
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
    // Unwrap safety: `high` is at least the last `low` ≥ 0 plus a positive step and doubles from 1e-9 to a finite end.
    Epsilon::new(high.max(EPSILON_FLOOR)).expect("a bisection between finite bounds is finite")
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

// Density of the standard normal.
fn density(x: f64) -> f64 {
    (-x * x / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt()
}

// P[N > x].
fn upper_tail(x: f64) -> f64 {
    if x >= TAIL_START {
        return density(x) * mills(x);
    }
    if x <= -TAIL_START {
        return 1.0 - density(x) * mills(-x);
    }
    // Φ(x) - 1/2 = φ(x) Σ x^(2n+1) / (1·3·5···(2n+1)): all terms of one sign.
    let (mut term, mut sum, mut n) = (x, 0.0, 1.0);
    while term.abs() > f64::EPSILON * 1e-3 {
        sum += term;
        n += 2.0;
        term *= x * x / n;
    }
    0.5 - density(x) * sum
}

// Mills' ratio P[N > x] / φ(x) for x > 0.
fn mills(x: f64) -> f64 {
    if x < TAIL_START {
        return upper_tail(x) / density(x);
    }
    // 1/(x + 1/(x + 2/(x + 3/(x + …)))), evaluated from a depth where the rest is below 1e-16 for x ≥ 1.5.
    let mut fraction = 0.0;
    for k in (1..=CONTINUED_FRACTION_DEPTH).rev() {
        fraction = f64::from(k) / (x + fraction);
    }
    1.0 / (x + fraction)
}

/// From here on tails are computed by continued fraction, below it by series.
const TAIL_START: f64 = 1.5;
const CONTINUED_FRACTION_DEPTH: u32 = 300;
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

    // Abramowitz and Stegun, table 26.1 and 26.2.
    #[test]
    fn tails_match_the_tables() {
        for (x, p) in [
            (0.0, 0.5),
            (1.0, 0.158_655_253_931_457),
            (1.5, 0.066_807_201_268_858),
            (3.0, 0.001_349_898_031_630),
            (-1.0, 0.841_344_746_068_543),
            (-2.0, 0.977_249_868_051_821),
            (6.0, 9.865_876_45e-10),
        ] {
            assert!((upper_tail(x) / p - 1.0).abs() < 1e-9, "{x}: {}", upper_tail(x));
        }
    }

    #[test]
    fn series_and_continued_fraction_meet() {
        let below = upper_tail(TAIL_START - 1e-9);
        let above = upper_tail(TAIL_START);
        assert!((below - above - 1e-9 * density(TAIL_START)).abs() < 1e-15);
    }

    #[test]
    fn no_loss_costs_no_epsilon() {
        assert!(epsilon(Rho::ZERO, Delta::new(1e-5).unwrap()).get() <= EPSILON_FLOOR);
        assert!(epsilon(Rho::from_units(u64::MAX >> 8), Delta::new(1e-5).unwrap()).get().is_finite());
    }
}

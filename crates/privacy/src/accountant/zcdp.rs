//! From zero-concentrated DP to (ε, δ): the conversion claims rest on.
//!
//! Canonne, Kamath, Steinke (arXiv 2004.00010), Proposition 12 and Corollary 13: a ρ-zCDP mechanism is (ε, δ)-DP with
//! δ = exp((α-1)(αρ-ε)) / (α-1) · (1-1/α)^α for *every* α > 1. Solved for ε it reads
//! ε(α) = αρ - (ln δ + ln α)/(α-1) + ln(1-1/α), and the smallest over α is taken. Any α gives a valid bound, so an
//! imperfect minimum is only loose, never wrong; results are rounded upward.

use crate::budget::{Delta, Epsilon, Rho};

/// The smallest ε ever claimed: below it, conversions of tiny losses are rounded up to this.
pub const EPSILON_FLOOR: f64 = 1e-9;

/// The (ε, δ) guarantee of a total loss ρ at a given δ, rounded upward.
#[must_use]
pub fn epsilon(rho: Rho, delta: Delta) -> Epsilon {
    let (mut low, mut high) = LOG_ORDER_RANGE;
    // ε(α) is quasi-convex (for fixed ε, ln δ is convex in α), so golden-section search finds its minimum.
    let (mut left, mut right) = (high - GOLDEN * (high - low), low + GOLDEN * (high - low));
    let (mut at_left, mut at_right) = (bound(rho, delta, left), bound(rho, delta, right));
    let mut best = at_left.min(at_right);
    for _ in 0..SEARCH_STEPS {
        if at_left <= at_right {
            (high, right, at_right) = (right, left, at_left);
            left = high - GOLDEN * (high - low);
            at_left = bound(rho, delta, left);
        } else {
            (low, left, at_left) = (left, right, at_right);
            right = low + GOLDEN * (high - low);
            at_right = bound(rho, delta, right);
        }
        best = best.min(at_left).min(at_right);
    }
    // Unwrap safety: ρ is below 2^24 and δ above 0, so every bound is finite, and the floor is above zero.
    Epsilon::new(best.max(EPSILON_FLOOR)).expect("a bound over finite terms is finite")
}

/// The largest ρ whose [`epsilon`] at `delta` isn't above `target`: what a grant of (ε, δ) buys.
///
/// Zero when not even one unit fits.
#[must_use]
pub fn rho_for(target: Epsilon, delta: Delta) -> Rho {
    let fits = |units: u64| epsilon(Rho::from_units(units), delta) <= target;
    if !fits(1) {
        return Rho::ZERO;
    }
    // Invariant: `low` fits, `high` doesn't (or is the end of the range).
    let (mut low, mut high) = (1u64, u64::MAX);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if fits(middle) {
            low = middle;
        } else {
            high = middle;
        }
    }
    Rho::from_units(low)
}

// ε(α) at α = 1 + exp(log_order), with slack for the rounding of its three terms.
fn bound(rho: Rho, delta: Delta, log_order: f64) -> f64 {
    let excess = log_order.exp();
    let order = 1.0 + excess;
    let linear = order * rho.as_f64();
    // Written as one fraction each, so that orders near 1 and very large orders lose nothing:
    // ln α = ln(1 + excess), ln(1 - 1/α) = ln(excess) - ln(α).
    let log_order_plus_one = excess.ln_1p();
    let delta_term = -(delta.get().ln() + log_order_plus_one) / excess;
    let order_term = if excess > 1.0 { (-1.0 / order).ln_1p() } else { log_order - log_order_plus_one };
    let slack = ROUNDING_SLACK * (linear + delta_term.abs() + order_term.abs());
    linear + delta_term + order_term + slack
}

/// ln(α - 1) is searched in this range: α from 1 + 2e-9 to 2e17.
const LOG_ORDER_RANGE: (f64, f64) = (-20.0, 40.0);
const GOLDEN: f64 = 0.618_033_988_749_894_9;
const SEARCH_STEPS: usize = 90;
const ROUNDING_SLACK: f64 = 1e-14;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::accountant::crosscheck::tests::vectors;

    fn delta(value: f64) -> Delta {
        Delta::new(value).unwrap()
    }

    // Vectors: dp_accounting 0.6.0 (rows `zcdp_rho_to_eps`: the same conversion over a dense grid of orders, so ours
    // may be below theirs by the grid's coarseness, 1e-6 here, and must stay above the exact Gaussian).
    #[test]
    fn conversion_matches_the_vectors() {
        let mut seen = 0;
        for row in vectors().into_iter().filter(|row| row.kind.starts_with("zcdp_rho_to_eps")) {
            let rho = Rho::from_f64_round_up(row.q).unwrap();
            let ours = epsilon(rho, delta(row.delta)).get();
            let theirs = row.eps_rdp;
            assert!(ours <= theirs * (1.0 + 1e-6), "rho {}: {ours} against {theirs}", row.q);
            assert!(ours >= theirs * (1.0 - 1e-4), "rho {}: {ours} against {theirs}", row.q);
            assert!(ours >= row.eps_exact, "never below the exact Gaussian");
            seen += 1;
        }
        assert_eq!(seen, 6);
    }

    // The RDP figures of composed Gaussian rows (default orders, coarser) bound the same conversion from above.
    #[test]
    fn composed_gaussians_stay_between_the_exact_and_the_rdp_figure() {
        let mut seen = 0;
        for row in vectors().into_iter().filter(|row| row.kind.starts_with("gaussian")) {
            let ours = epsilon(row.rho(), delta(row.delta)).get();
            assert!(ours >= row.eps_exact && ours <= row.eps_rdp * (1.0 + 1e-6), "{row:?}: {ours}");
            seen += 1;
        }
        assert_eq!(seen, 22);
    }

    #[test]
    fn a_grid_over_orders_never_finds_a_smaller_bound() {
        for units in [1u64, 1 << 10, 1 << 25, 5_497_558_139, 1 << 39, 1 << 43, 1 << 50] {
            for d in [1e-3, 1e-5, 1e-9] {
                let ours = epsilon(Rho::from_units(units), delta(d)).get();
                let grid =
                    (0..60_000).map(|i| bound(Rho::from_units(units), delta(d), -20.0 + f64::from(i) * 1e-3));
                let best = grid.fold(f64::INFINITY, f64::min).max(EPSILON_FLOOR);
                assert!(ours <= best * (1.0 + 1e-9), "{units} units, delta {d}: {ours} against {best}");
            }
        }
    }

    #[test]
    fn epsilon_grows_with_rho_and_falls_with_delta() {
        let mut last = 0.0;
        for units in (20..48).map(|bit| 1u64 << bit) {
            let here = epsilon(Rho::from_units(units), delta(1e-5)).get();
            assert!(here > last || last <= EPSILON_FLOOR, "{units}");
            assert!(epsilon(Rho::from_units(units), delta(1e-7)).get() > here);
            last = here;
        }
        assert!(epsilon(Rho::ZERO, delta(1e-5)).get() <= EPSILON_FLOOR);
        assert!(epsilon(Rho::from_units(u64::MAX), delta(1e-5)).get().is_finite());
    }

    #[test]
    fn a_grant_buys_the_largest_rho_that_keeps_its_epsilon() {
        for (target, d) in [(0.1, 1e-6), (1.0, 1e-5), (3.0, 1e-5), (8.0, 1e-5), (50.0, 1e-9)] {
            let target = Epsilon::new(target).unwrap();
            let rho = rho_for(target, delta(d));
            assert!(epsilon(rho, delta(d)) <= target);
            let more = Rho::from_units(rho.units() + 1 + rho.units() / 1_000_000_000);
            assert!(epsilon(more, delta(d)) > target, "{target}: rho {rho}");
        }
    }
}

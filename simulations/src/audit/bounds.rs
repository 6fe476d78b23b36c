//! Confidence bounds on rates, and what they say about ε: by the Gaussian trade-off, or by counting right guesses of one run.

use tabmesh_privacy::accountant::gdp;
use tabmesh_privacy::budget::Delta;

/// Upper Clopper-Pearson bound: the largest rate at which `events` or fewer in `trials` still happen with probability
/// `failure` (Clopper and Pearson 1934).
pub(super) fn upper_rate(events: usize, trials: usize, failure: f64) -> f64 {
    if events >= trials {
        return 1.0;
    }
    let factorials = log_factorials(trials);
    let at_most = |rate: f64| -> f64 {
        let (yes, no) = (rate.ln(), (-rate).ln_1p());
        (0..=events)
            .map(|i| {
                let ways = factorials[trials] - factorials[i] - factorials[trials - i];
                (ways + i as f64 * yes + (trials - i) as f64 * no).exp()
            })
            .sum()
    };
    bisect(events as f64 / trials as f64, 1.0, |rate| at_most(rate) <= failure)
}

/// Lower Clopper-Pearson bound: the smallest rate at which `events` or more in `trials` still happen with probability
/// `failure`.
pub(super) fn lower_rate(events: usize, trials: usize, failure: f64) -> f64 {
    1.0 - upper_rate(trials.saturating_sub(events), trials, failure)
}

/// The largest ε that right guesses of one run refute at confidence `1 - failure`.
///
/// Each of `canaries` units is in or out by a fair coin; `right` of `guesses` about them are right, the rest is not guessed.
/// If the run is (ε, δ)-private for adding or removing a unit, so many are right with probability at most
/// `P[B ≥ right] + 2 · canaries · δ · max_i P[right > B ≥ right - i] / i` with B binomial over `guesses` at
/// `e^ε / (1 + e^ε)` (Steinke, Nasr and Jagielski 2023, arXiv 2305.08846, section 5; computed as in appendix D).
pub(super) fn one_run_epsilon(
    canaries: usize,
    guesses: usize,
    right: usize,
    delta: Delta,
    failure: f64,
) -> f64 {
    let right = right.min(guesses);
    let likely = |epsilon: f64| one_run_p_value(canaries, guesses, right, epsilon, delta) > failure;
    if likely(0.0) { 0.0 } else { bisect(0.0, LARGEST_EPSILON, likely) }
}

fn one_run_p_value(canaries: usize, guesses: usize, right: usize, epsilon: f64, delta: Delta) -> f64 {
    let (yes, no) = (-(-epsilon).exp().ln_1p(), -epsilon.exp().ln_1p());
    let factorials = log_factorials(guesses);
    let exactly = |i: usize| {
        let ways = factorials[guesses] - factorials[i] - factorials[guesses - i];
        (ways + i as f64 * yes + (guesses - i) as f64 * no).exp()
    };
    let as_many: f64 = (right..=guesses).map(exactly).sum();
    let (mut below, mut steepest) = (0.0, 0.0_f64);
    for i in 1..=right {
        below += exactly(right - i);
        steepest = steepest.max(below / i as f64);
    }
    (as_many + 2.0 * canaries as f64 * delta.get() * steepest).min(1.0)
}

/// Φ, the standard normal distribution function.
pub(super) fn normal(x: f64) -> f64 {
    let within = gdp::delta_at(2.0 * x.abs(), 0.0);
    if x < 0.0 { 0.5 * (1.0 - within) } else { 0.5 * (1.0 + within) }
}

/// The standard normal quantile, by the total variation of two shifted normals: `Φ(x) - Φ(-x) = δ(0)` at `μ = 2x`.
pub(super) fn normal_quantile(p: f64) -> f64 {
    if p < 0.5 {
        return -normal_quantile(1.0 - p);
    }
    bisect(0.0, LARGEST_QUANTILE, |x| gdp::delta_at(2.0 * x, 0.0) >= 2.0 * p - 1.0)
}

/// ln 0!, ln 1!, … ln n!.
fn log_factorials(n: usize) -> Vec<f64> {
    let grown = (1..=n).scan(0.0, |sum, i| {
        *sum += (i as f64).ln();
        Some(*sum)
    });
    std::iter::once(0.0).chain(grown).collect()
}

/// The point of `[low, high]` from which on `holds`, which must hold at `high`.
pub(super) fn bisect(mut low: f64, mut high: f64, holds: impl Fn(f64) -> bool) -> f64 {
    for _ in 0..60 {
        let middle = 0.5 * (low + high);
        if holds(middle) {
            high = middle;
        } else {
            low = middle;
        }
    }
    high
}

/// Beyond it the normal distribution has less than 1e-15.
const LARGEST_QUANTILE: f64 = 8.0;
/// No run of the size that is made here refutes an ε as large.
const LARGEST_EPSILON: f64 = 20.0;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn bounds_are_those_of_the_exact_interval() {
        // No event in n trials: 1 - failure^(1/n). All events: 1.
        assert!((upper_rate(0, 100, 0.025) - (1.0 - 0.025_f64.powf(0.01))).abs() < 1e-9);
        assert!((upper_rate(7, 7, 0.025) - 1.0).abs() < 1e-12);
        // One event in two trials: P[Bin(2, p) <= 1] = 1 - p^2 = .05 at p = sqrt(.95).
        assert!((upper_rate(1, 2, 0.05) - 0.95_f64.sqrt()).abs() < 1e-9);
    }

    #[test]
    fn quantiles_are_the_tabulated_ones() {
        // NIST/SEMATECH e-Handbook of Statistical Methods, table 1.3.6.7.1.
        for (p, x) in [(0.5, 0.0), (0.975, 1.959_963_985), (0.841_344_746, 1.0), (0.001_349_898, -3.0)] {
            assert!((normal_quantile(p) - x).abs() < 1e-6, "{p}");
        }
    }

    #[test]
    fn lower_and_upper_bounds_mirror_each_other() {
        assert!(lower_rate(0, 50, 0.025).abs() < 1e-12);
        // All events in n trials: failure^(1/n).
        assert!((lower_rate(64, 64, 0.025) - 0.025_f64.powf(1.0 / 64.0)).abs() < 1e-9);
        for x in [-3.0, -0.5, 0.0, 1.25, 4.0] {
            assert!((normal_quantile(normal(x)) - x).abs() < 1e-6, "{x}");
        }
    }

    /// With all of r guesses right and δ = 0 the p-value is q^r: ε = ln(q / (1 - q)) at q = failure^(1/r).
    #[test]
    fn one_run_finds_what_can_be_computed_by_hand() {
        let (none, usual) = (Delta::new(f64::MIN_POSITIVE).unwrap(), Delta::new(1e-5).unwrap());
        for r in [50, 100, 500] {
            let q = 0.05_f64.powf(1.0 / r as f64);
            let found = one_run_epsilon(2 * r, r, r, none, 0.05);
            assert!((found - (q / (1.0 - q)).ln()).abs() < 1e-6, "{r}: {found}");
            // δ takes a little off, and more with more canaries.
            let less = one_run_epsilon(2 * r, r, r, usual, 0.05);
            assert!(less < found && one_run_epsilon(100 * r, r, r, usual, 0.05) < less, "{r}: {less}");
        }
        // Coin flips refute nothing. Two guesses, one right: P[B >= 1] = 1 - (1 - q)^2 is above .05 everywhere.
        assert!(one_run_epsilon(100, 100, 50, usual, 0.05) < 1e-9);
        assert!(one_run_epsilon(2, 2, 1, none, 0.05) < 1e-9);
        // At ε = 0, r = 2, v = 2, m = 2, δ = .01: 1/4 + 2·2·.01·max(P[B = 1], P[B <= 1] / 2) = .25 + .04/2.
        let p = one_run_p_value(2, 2, 2, 0.0, Delta::new(0.01).unwrap());
        assert!((p - 0.27).abs() < 1e-12, "{p}");
    }

    /// The same sums in decimal arithmetic of 40 digits (Python's `decimal`, binomials as whole numbers).
    #[test]
    fn one_run_p_values_are_those_of_exact_sums() {
        for (canaries, guesses, right, epsilon, delta, expected) in [
            (2000, 400, 360, 2.0, 1e-5, 0.134_902_124_807_994_6),
            (128, 64, 63, 3.0, 1e-5, 0.187_371_742_764_088_94),
            (1000, 100, 90, 1.5, 1e-5, 0.018_764_588_474_672_012),
            (1000, 100, 90, 2.0, 1e-3, 0.585_832_271_512_826_5),
        ] {
            let p = one_run_p_value(canaries, guesses, right, epsilon, Delta::new(delta).unwrap());
            assert!((p - expected).abs() < 1e-9, "{right} of {guesses}: {p}");
        }
    }
}

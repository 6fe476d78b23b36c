//! Confidence bounds on error rates, and the Gaussian trade-off they are turned into.

use tabmesh_privacy::accountant::gdp;

/// Upper Clopper-Pearson bound: the largest rate at which `events` or fewer in `trials` still happen with probability
/// `failure` (Clopper and Pearson 1934).
pub(super) fn upper_rate(events: usize, trials: usize, failure: f64) -> f64 {
    if events >= trials {
        return 1.0;
    }
    let logarithms: Vec<f64> = (1..=trials).map(|i| (i as f64).ln()).collect();
    let factorials: Vec<f64> = std::iter::once(0.0)
        .chain(logarithms.iter().scan(0.0, |sum, log| {
            *sum += log;
            Some(*sum)
        }))
        .collect();
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

/// The standard normal quantile, by the total variation of two shifted normals: `Φ(x) - Φ(-x) = δ(0)` at `μ = 2x`.
pub(super) fn normal_quantile(p: f64) -> f64 {
    if p < 0.5 {
        return -normal_quantile(1.0 - p);
    }
    bisect(0.0, LARGEST_QUANTILE, |x| gdp::delta_at(2.0 * x, 0.0) >= 2.0 * p - 1.0)
}

/// The point of `[low, high]` from which on `holds`, which must hold at `high`.
fn bisect(mut low: f64, mut high: f64, holds: impl Fn(f64) -> bool) -> f64 {
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

#[cfg(test)]
mod tests {
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
}

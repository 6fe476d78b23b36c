//! ε by Rényi differential privacy: the independent second figure.
//!
//! Rényi losses of an order α add up over steps (Mironov 2017, arXiv 1702.07476); the sampled Gaussian's is
//! ln A(α)/(α-1) with A(α) = E[(1 - q + q e^((2z-1)/2σ²))^α], z ~ N(0, σ²) (Mironov, Talwar, Zhang, arXiv 1908.10530,
//! which also shows that removing a unit is the worse direction). Whole orders take the binomial sum in logarithms.
//! Fractional orders integrate directly: the trapezoid rule converges geometrically for this analytic integrand, so no
//! alternating series and no dropped orders. ε is the least over the orders of the conversion of Canonne, Kamath,
//! Steinke (arXiv 2004.00010, Proposition 12), the same as in [`super::zcdp`].
//!
//! Loose by 8 % for unsampled Gaussians and by factors where few steps or small rates are composed; never below
//! [`super::pld`].

use super::normal::{TAIL_START, mills, upper_tail};
use super::phase::{AccountantError, Adjacency, Phase, Step};
use super::zcdp::EPSILON_FLOOR;
use crate::budget::{Delta, Epsilon};

/// The orders: 1.1 to 10.9 in tenths, 11 to 63, 128, 256, 512, 1024 (those of dp_accounting, so that figures can be
/// compared digit by digit).
pub fn orders() -> impl Iterator<Item = f64> {
    let tenths = (1..100u32).map(|tenth| 1.0 + f64::from(tenth) / 10.0);
    tenths.chain((11..64u32).map(f64::from)).chain([128.0, 256.0, 512.0, 1024.0])
}

/// The ε of a fixed plan at a given δ by Rényi DP, rounded upward.
///
/// # Errors
/// [`AccountantError::Unsupported`] for a sampled step under replace-one, for which no bound is built in;
/// [`AccountantError::Range`] when ε isn't finite.
pub fn epsilon(phases: &[Phase], adjacency: Adjacency, delta: Delta) -> Result<Epsilon, AccountantError> {
    least(phases, adjacency, delta, integrated_log_moment)
}

/// As [`epsilon`], with fractional orders of sampled Gaussians by the alternating series of Mironov, Talwar, Zhang
/// (section 3.3) with every term taken positive, cut off where its terms are below e^-30 of the sum.
///
/// This is how dp_accounting 0.6.0 computes it: an upper bound, by up to a quarter above [`epsilon`] where rates are
/// large and noise is small, and no bound at all at orders whose series doesn't converge in 1000 terms. For comparing
/// figures digit by digit.
///
/// # Errors
/// As [`epsilon`].
pub fn epsilon_by_series(
    phases: &[Phase],
    adjacency: Adjacency,
    delta: Delta,
) -> Result<Epsilon, AccountantError> {
    least(phases, adjacency, delta, series_log_moment)
}

/// The Rényi loss of one step at an order above 1.
///
/// # Errors
/// [`AccountantError::Unsupported`] for a sampled step under replace-one.
pub fn renyi(step: Step, adjacency: Adjacency, order: f64) -> Result<f64, AccountantError> {
    renyi_by(step, adjacency, order, integrated_log_moment)
}

/// ln A(α) of rate, σ and a fractional order.
type LogMoment = fn(f64, f64, f64) -> f64;

fn least(
    phases: &[Phase],
    adjacency: Adjacency,
    delta: Delta,
    fractional: LogMoment,
) -> Result<Epsilon, AccountantError> {
    let mut best = f64::INFINITY;
    for order in orders() {
        let mut loss = 0.0;
        for phase in phases {
            loss += phase.steps() as f64 * renyi_by(phase.step(), adjacency, order, fractional)?;
        }
        best = best.min(convert(order, loss, delta.get()));
    }
    let got = best.max(EPSILON_FLOOR) * (1.0 + SLACK);
    Epsilon::new(got).map_err(|_| AccountantError::Range { what: "epsilon", min: 0.0, max: f64::MAX, got })
}

fn renyi_by(
    step: Step,
    adjacency: Adjacency,
    order: f64,
    fractional: LogMoment,
) -> Result<f64, AccountantError> {
    let factor = match adjacency {
        Adjacency::AddRemove => 1.0,
        Adjacency::ReplaceOne => 2.0,
    };
    let gaussian = |sigma: f64| order * (factor / sigma).powi(2) / 2.0;
    match step {
        Step::Gaussian { sigma } => Ok(gaussian(sigma)),
        Step::SampledGaussian { rate, sigma } if rate >= 1.0 => Ok(gaussian(sigma)),
        Step::SampledGaussian { rate, sigma } => {
            if adjacency == Adjacency::ReplaceOne {
                return Err(AccountantError::Unsupported {
                    accountant: "renyi accountant",
                    step: step.label(),
                    adjacency: adjacency.label(),
                });
            }
            let whole = (order - order.round()).abs() < 1e-9;
            let log_moment = if whole {
                binomial_log_moment(rate, sigma, order.round())
            } else {
                fractional(rate, sigma, order)
            };
            Ok(log_moment.max(0.0) / (order - 1.0))
        }
        // Mironov 2017, table II.
        Step::Laplace { scale } => {
            let top = factor / scale;
            let up = (order / (2.0 * order - 1.0)).ln() + (order - 1.0) * top;
            let down = ((order - 1.0) / (2.0 * order - 1.0)).ln() - order * top;
            Ok((up + (down - up).exp().ln_1p()).max(0.0) / (order - 1.0))
        }
        // Canonne, Kamath, Steinke, Theorem 14: no larger than the continuous Gaussian's.
        Step::DiscreteGaussian { sigma, shift } => Ok(gaussian(sigma / f64::from(shift))),
    }
}

// ln A(α) for whole α: Σ C(α,k) (1-q)^(α-k) q^k e^((k²-k)/2σ²), every term positive.
fn binomial_log_moment(rate: f64, sigma: f64, order: f64) -> f64 {
    let (log_rate, log_rest) = (rate.ln(), (-rate).ln_1p());
    let mut log_binomial = 0.0;
    let mut terms = Vec::new();
    let mut k = 0.0;
    while k <= order {
        let exponent = (k * k - k) / (2.0 * sigma * sigma);
        terms.push(log_binomial + (order - k) * log_rest + k * log_rate + exponent);
        log_binomial += ((order - k) / (k + 1.0)).ln();
        k += 1.0;
    }
    let largest = terms.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    largest + terms.iter().map(|term| (term - largest).exp()).sum::<f64>().ln()
}

// ln A(α) for any α > 1 by the trapezoid rule over z/σ. The integrand is analytic in a strip of half-width min(σ, 1)·π
// around the real axis (singular where the mixture vanishes, at imaginary part πσ²), so steps of 0.06·min(σ, 1) leave
// an error below e^-40.
fn integrated_log_moment(rate: f64, sigma: f64, order: f64) -> f64 {
    let step = TRAPEZOID_STEP * sigma.min(1.0);
    let (low, high) = (-REACH, order / sigma + REACH);
    let log_rate = rate.ln();
    let log_integrand = |u: f64| {
        let exponent = (2.0 * u * sigma - 1.0) / (2.0 * sigma * sigma);
        let mixed = if exponent > 30.0 {
            exponent + log_rate + ((1.0 - rate) / rate * (-exponent).exp()).ln_1p()
        } else {
            (rate * exponent.exp_m1()).ln_1p()
        };
        order * mixed - u * u / 2.0
    };
    let points = ((high - low) / step).ceil() as u32;
    let values: Vec<f64> = (0..=points).map(|i| log_integrand(low + f64::from(i) * step)).collect();
    let largest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = values.iter().map(|value| (value - largest).exp()).sum();
    largest + (sum * step).ln() - (2.0 * std::f64::consts::PI).ln() / 2.0
}

// ln A(α) by the series, split at z₀ where both parts of the mixture are equal; |C(α,i)| in place of C(α,i).
fn series_log_moment(rate: f64, sigma: f64, order: f64) -> f64 {
    let (log_rate, log_rest) = (rate.ln(), (-rate).ln_1p());
    let variance = 2.0 * sigma * sigma;
    let split = sigma * sigma * (log_rest - log_rate) + 0.5;
    let (mut below, mut above, mut log_binomial) = (f64::NEG_INFINITY, f64::NEG_INFINITY, 0.0);
    let mut last = (f64::NEG_INFINITY, f64::NEG_INFINITY);
    let mut i = 0.0;
    while i < MAX_TERMS {
        let j = order - i;
        let first = log_binomial
            + i * log_rate
            + j * log_rest
            + (i * i - i) / variance
            + log_upper_tail((i - split) / sigma);
        let second = log_binomial
            + j * log_rate
            + i * log_rest
            + (j * j - j) / variance
            + log_upper_tail((split - j) / sigma);
        below = log_add(below, first);
        above = log_add(above, second);
        let total = log_add(below, above);
        if first < last.0 && second < last.1 && first.max(second) < total - 30.0 {
            return total;
        }
        last = (first, second);
        log_binomial += ((order - i).abs() / (i + 1.0)).ln();
        i += 1.0;
    }
    f64::INFINITY
}

fn log_add(a: f64, b: f64) -> f64 {
    let (small, large) = if a < b { (a, b) } else { (b, a) };
    if large.is_finite() { large + (small - large).exp().ln_1p() } else { large }
}

fn log_upper_tail(x: f64) -> f64 {
    if x < TAIL_START {
        return upper_tail(x).ln();
    }
    mills(x).ln() - x * x / 2.0 - (2.0 * std::f64::consts::PI).ln() / 2.0
}

// ε at one order. Where √(1 - e^-loss) ≥ total variation is at most δ, no ε is needed at all (Bretagnolle-Huber).
fn convert(order: f64, loss: f64, delta: f64) -> f64 {
    if delta * delta + (-loss).exp_m1() > 0.0 {
        return 0.0;
    }
    loss + (-1.0 / order).ln_1p() - (delta * order).ln() / (order - 1.0)
}

const MAX_TERMS: f64 = 1000.0;
const TRAPEZOID_STEP: f64 = 0.06;
/// Deviations beyond which the integrand is below e^-70 of its peak.
const REACH: f64 = 12.0;
const SLACK: f64 = 1e-12;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn binomial_sum_and_integral_agree() {
        for (rate, sigma) in [(0.001, 0.6), (0.01, 1.0), (0.1, 0.3), (0.5, 5.0), (0.9, 1.0)] {
            for order in [2.0, 3.0, 7.0, 10.0] {
                let sum = binomial_log_moment(rate, sigma, order);
                let integral = integrated_log_moment(rate, sigma, order);
                assert!(
                    (sum - integral).abs() <= 1e-12 + 1e-10 * sum.abs(),
                    "{rate} {sigma} {order}: {sum} {integral}"
                );
            }
        }
    }

    #[test]
    fn the_loss_grows_with_the_order_and_vanishes_with_the_rate() {
        let loss = |rate, order| {
            renyi(Step::SampledGaussian { rate, sigma: 1.0 }, Adjacency::AddRemove, order).unwrap()
        };
        let mut last = 0.0;
        for order in orders() {
            let here = loss(0.05, order);
            assert!(here > last, "order {order}");
            assert!(here <= loss(1.0, order));
            last = here;
        }
        // For small rates the loss is q²(e^(1/σ²) - 1)·α/2 to first order.
        let expected = 1e-8 * (1f64.exp() - 1.0);
        assert!((loss(1e-4, 2.0) / expected - 1.0).abs() < 1e-3);
    }

    // The series bounds the integral from above, closely where rates are small; where it doesn't converge it says so.
    #[test]
    fn the_series_is_an_upper_bound() {
        for (rate, sigma) in [(0.001, 0.6), (0.01, 1.0), (0.1, 2.0), (0.5, 5.0)] {
            for order in [1.1, 2.5, 7.3] {
                let series = series_log_moment(rate, sigma, order);
                let integral = integrated_log_moment(rate, sigma, order);
                assert!(series >= integral - 1e-12, "{rate} {sigma} {order}: {series} {integral}");
                let close = series <= integral * 1.5 + 1e-3;
                assert!(close || rate > 0.05, "{rate} {sigma} {order}: {series} {integral}");
            }
        }
    }

    #[test]
    fn sampled_replace_one_has_no_bound_here() {
        let phase = Phase::new(Step::SampledGaussian { rate: 0.1, sigma: 1.0 }, 3).unwrap();
        let answer = epsilon(&[phase], Adjacency::ReplaceOne, Delta::new(1e-5).unwrap());
        assert!(matches!(answer, Err(AccountantError::Unsupported { .. })));
    }
}

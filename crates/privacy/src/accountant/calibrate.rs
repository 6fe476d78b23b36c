//! The noise, sampling rate or number of steps that meets a target (ε, δ).
//!
//! ε falls as noise grows and rises with the rate and the number of steps, so each is found between two values of
//! which one meets the target and one doesn't. What is returned always meets it; it is within [`TOLERANCE`] of the
//! best there is.

use super::phase::{
    AccountantError, Adjacency, MAX_SIGMA, MAX_STEPS, MIN_RATE, MIN_SAMPLED_SIGMA, Phase, Step, gaussian_mu,
};
use super::{gdp, pld, rdp};
use crate::budget::{Delta, Epsilon};

/// Which bound a figure is by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accountant {
    /// The closed form for unsampled Gaussian plans, the privacy loss distribution for all others.
    Tight,
    /// Rényi DP.
    Renyi,
}

/// What a target is to be met for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Target {
    /// Which bound has to meet it.
    pub accountant: Accountant,
    /// Which datasets count as neighbours.
    pub adjacency: Adjacency,
    /// Largest ε allowed.
    pub epsilon: Epsilon,
    /// δ it is for.
    pub delta: Delta,
}

impl Accountant {
    /// The ε of a fixed plan at a given δ, rounded upward.
    ///
    /// # Errors
    /// As [`pld::epsilon`] and [`rdp::epsilon`].
    pub fn epsilon(
        self,
        phases: &[Phase],
        adjacency: Adjacency,
        delta: Delta,
    ) -> Result<Epsilon, AccountantError> {
        match self {
            Self::Tight => {
                let exact = gaussian_mu(phases, adjacency).and_then(|mu| gdp::epsilon_at_mu(mu, delta));
                exact.map_or_else(|| pld::epsilon(phases, adjacency, delta), Ok)
            }
            Self::Renyi => rdp::epsilon(phases, adjacency, delta),
        }
    }
}

/// The smallest noise multiplier with which `steps` steps at a sampling rate meet the target (rate 1: unsampled).
///
/// # Errors
/// [`AccountantError::Range`] for a rate or step count out of range, [`AccountantError::Unreachable`] if no noise
/// multiplier from 0.1 to 10⁶ will do.
pub fn noise_multiplier(rate: f64, steps: u64, target: Target) -> Result<f64, AccountantError> {
    smallest("noise multiplier", (MIN_SAMPLED_SIGMA, MAX_SIGMA), 1.0, target, |sigma| {
        phase(rate, sigma, steps)
    })
}

/// The largest sampling rate at which `steps` steps of a noise multiplier meet the target.
///
/// # Errors
/// [`AccountantError::Range`] for a noise multiplier or step count out of range, [`AccountantError::Unreachable`] if
/// no rate from 10⁻⁹ up will do.
pub fn sampling_rate(sigma: f64, steps: u64, target: Target) -> Result<f64, AccountantError> {
    let all = phase(1.0, sigma, steps)?;
    if meets(target, all)? {
        return Ok(1.0);
    }
    let limits = (1.0, 1.0 / MIN_RATE);
    let inverse = smallest("sampling rate", limits, 100.0, target, |inverse| {
        phase((1.0 / inverse).max(MIN_RATE), sigma, steps)
    })?;
    Ok((1.0 / inverse).max(MIN_RATE))
}

/// The largest number of steps at a sampling rate and noise multiplier that meets the target.
///
/// # Errors
/// [`AccountantError::Range`] for a rate or noise multiplier out of range, [`AccountantError::Unreachable`] if not even
/// one step will do.
pub fn steps(rate: f64, sigma: f64, target: Target) -> Result<u64, AccountantError> {
    if meets(target, phase(rate, sigma, MAX_STEPS)?)? {
        return Ok(MAX_STEPS);
    }
    if !meets(target, phase(rate, sigma, 1)?)? {
        return Err(AccountantError::Unreachable {
            what: "number of steps",
            min: 1.0,
            max: MAX_STEPS as f64,
        });
    }
    // Invariant: `low` steps meet the target, `high` don't. Doubling first: plans of few steps are the cheap ones.
    let (mut low, mut high) = (1u64, MAX_STEPS);
    while low * 2 < high {
        if !meets(target, phase(rate, sigma, low * 2)?)? {
            high = low * 2;
            break;
        }
        low *= 2;
    }
    while (high - low) as f64 > (low as f64 * TOLERANCE).max(1.0) {
        let middle = low + (high - low) / 2;
        if meets(target, phase(rate, sigma, middle)?)? {
            low = middle;
        } else {
            high = middle;
        }
    }
    Ok(low)
}

fn phase(rate: f64, sigma: f64, steps: u64) -> Result<Phase, AccountantError> {
    let step = if (1.0..=1.0).contains(&rate) {
        Step::Gaussian { sigma }
    } else {
        Step::SampledGaussian { rate, sigma }
    };
    Phase::new(step, steps)
}

fn meets(target: Target, phase: Phase) -> Result<bool, AccountantError> {
    Ok(target.accountant.epsilon(&[phase], target.adjacency, target.delta)? <= target.epsilon)
}

// The smallest x within `limits` whose ε, which falls with x, is at or below the target.
fn smallest(
    what: &'static str,
    limits: (f64, f64),
    start: f64,
    target: Target,
    plan: impl Fn(f64) -> Result<Phase, AccountantError>,
) -> Result<f64, AccountantError> {
    // How far ln ε is above its target at e^log_x.
    let excess = |log_x: f64| -> Result<f64, AccountantError> {
        let x = log_x.exp().clamp(limits.0, limits.1);
        let epsilon = target.accountant.epsilon(&[plan(x)?], target.adjacency, target.delta)?;
        Ok((epsilon.get() / target.epsilon.get()).ln())
    };
    let (bottom, top) = (limits.0.ln(), limits.1.ln());
    let unreachable = AccountantError::Unreachable { what, min: limits.0, max: limits.1 };
    // Bracket: `low` misses the target, `high` meets it.
    let mut here = start.ln();
    let mut at = excess(here)?;
    let (mut low, mut high) = (None, None);
    let mut stride = FIRST_STRIDE;
    while low.is_none() || high.is_none() {
        if at <= 0.0 {
            high = Some((here, at));
            if here <= bottom {
                return Ok(limits.0);
            }
            here = (here - stride).max(bottom);
        } else {
            low = Some((here, at));
            if here >= top {
                return Err(unreachable);
            }
            here = (here + stride).min(top);
        }
        if low.is_none() || high.is_none() {
            stride *= 1.5;
            at = excess(here)?;
        }
    }
    let (Some(mut low), Some(mut high)) = (low, high) else { return Err(unreachable) };
    let mut turn = 0u32;
    while high.0 - low.0 > TOLERANCE {
        // The secant's point, moved by a third of the tolerance to each side in turn: the bracket closes from both.
        let width = high.0 - low.0;
        let secant = low.0 + width * low.1 / (low.1 - high.1);
        let nudge = TOLERANCE / 3.0;
        let point = match turn % 3 {
            0 => secant + nudge,
            1 => secant - nudge,
            _ => low.0 + width / 2.0,
        };
        let point = point.clamp(low.0 + width * 1e-3, high.0 - width * 1e-3);
        let at = excess(point)?;
        if at <= 0.0 {
            high = (point, at);
        } else {
            low = (point, at);
        }
        turn += 1;
    }
    Ok(high.0.exp().clamp(limits.0, limits.1))
}

/// Relative distance from the best value.
pub const TOLERANCE: f64 = 1e-4;
const FIRST_STRIDE: f64 = 0.4;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn target(accountant: Accountant, epsilon: f64) -> Target {
        let (epsilon, delta) = (Epsilon::new(epsilon).unwrap(), Delta::new(1e-5).unwrap());
        Target { accountant, adjacency: Adjacency::AddRemove, epsilon, delta }
    }

    // What is returned meets the target; a little less noise, a higher rate or one step more (over 10⁻⁴) doesn't.
    #[test]
    fn each_answer_meets_the_target_and_is_the_best() {
        for accountant in [Accountant::Tight, Accountant::Renyi] {
            let target = target(accountant, 2.0);
            let fits = |rate, sigma, steps| meets(target, phase(rate, sigma, steps).unwrap()).unwrap();
            for (rate, steps_) in [(1.0, 7), (0.02, 400)] {
                let sigma = noise_multiplier(rate, steps_, target).unwrap();
                assert!(fits(rate, sigma, steps_) && !fits(rate, sigma * (1.0 - 2e-4), steps_), "{sigma}");
            }
            let rate = sampling_rate(1.1, 500, target).unwrap();
            assert!(fits(rate, 1.1, 500) && !fits(rate * (1.0 + 2e-4), 1.1, 500), "{rate}");
            let most = steps(0.02, 1.1, target).unwrap();
            assert!(fits(0.02, 1.1, most) && !fits(0.02, 1.1, most + 1 + most / 5000), "{most}");
        }
    }

    #[test]
    fn what_cannot_be_met_is_said_and_what_is_met_anyway_is_the_limit() {
        let strict = target(Accountant::Tight, 1e-3);
        assert!(matches!(steps(1.0, 1.0, strict), Err(AccountantError::Unreachable { .. })));
        let loose = target(Accountant::Tight, 1e4);
        assert!((noise_multiplier(1.0, 1, loose).unwrap() / MIN_SAMPLED_SIGMA - 1.0).abs() < 1e-12);
        assert!((sampling_rate(1.0, 10, loose).unwrap() - 1.0).abs() < 1e-12);
        assert!(noise_multiplier(2.0, 1, loose).is_err());
    }
}

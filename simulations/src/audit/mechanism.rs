//! The mechanism audit: can someone who sees one noised vector tell whether one unit was in it, more often than ε allows?
//!
//! The worst unit for the claim puts its whole clipped gradient into one coordinate. Vectors with and without it are noised
//! by the code that the agents run (clip, integers, discrete Gaussian), and told apart by that coordinate at a threshold
//! fixed beforehand, half the sensitivity. The two error rates are bounded from above by Clopper-Pearson at 97.5 % each; a
//! Gaussian trade-off that fits both bounds gives μ̂ and with it a lower bound ε̂ on what the mechanism really costs (Nasr
//! et al. 2023, arXiv 2302.07956, section 4). A secure sum is attacked in the same way, by a coordinator with as many colluders and
//! dropouts as the plan assumes. The same is done with errors built in on purpose: an audit that doesn't find
//! those proves nothing.

use anyhow::{Context, Result};
use rand::{CryptoRng, RngCore};
use serde::Serialize;
use tabmesh_privacy::accountant::{gdp, zcdp};
use tabmesh_privacy::budget::{Delta, Rho};
use tabmesh_privacy::clip::{integer_norm, quantize_clipped};
use tabmesh_privacy::mechanism::{DiscreteGaussian, Noise};

use super::bounds::{normal_quantile, upper_rate};
use super::shares::Shares;

/// What is audited: the shipped code, or that with an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Subject {
    /// As the agents run it.
    Shipped,
    /// Control: half the standard deviation that the claim needs.
    HalfSigma,
    /// Control: clipped to √2 times the norm that the claim is for.
    LooseClip,
    /// Control: no noise where there is no row.
    SilentWhenEmpty,
    /// The sum of the honest survivors' noise shares, as the agents run it.
    Shares,
    /// Control: shares of a deviation divided by the number of agents, not by its root.
    ThinShares,
    /// Control: a sum opened with half of the honest survivors that it needs.
    TooFewShares,
}

impl Subject {
    pub(super) const ALL: [Self; 7] = [
        Self::Shipped,
        Self::HalfSigma,
        Self::LooseClip,
        Self::SilentWhenEmpty,
        Self::Shares,
        Self::ThinShares,
        Self::TooFewShares,
    ];

    /// Whether it is the shipped code, which must keep its claim; a control must not.
    pub(super) const fn is_shipped(self) -> bool {
        matches!(self, Self::Shipped | Self::Shares)
    }

    /// Whether what is audited is a secure sum.
    pub(super) const fn is_sum(self) -> bool {
        matches!(self, Self::Shares | Self::ThinShares | Self::TooFewShares)
    }

    /// For people.
    pub(super) const fn words(self) -> &'static str {
        match self {
            Self::Shipped => "the shipped code",
            Self::HalfSigma => "control: half the noise",
            Self::LooseClip => "control: clip off by the root of 2",
            Self::SilentWhenEmpty => "control: no noise for no rows",
            Self::Shares => "the shipped code, secure sum",
            Self::ThinShares => "control: shares of sigma/n",
            Self::TooFewShares => "control: half the honest shares",
        }
    }
}

/// What an audit found.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Finding {
    pub(super) subject: Subject,
    pub(super) trials: usize,
    /// ε of the claim, as ledgers count it.
    pub(super) claimed: f64,
    /// ε of an exact Gaussian account of the same noise: what a perfect audit would find.
    pub(super) exact: f64,
    /// Lower bounds found, the unit taken as added and as removed.
    pub(super) found: [f64; 2],
    /// Whether the larger bound exceeds the claim.
    pub(super) broken: bool,
}

/// Audits one use of the mechanism that costs `rho`.
///
/// # Errors
/// A cost that buys no usable noise.
pub(super) fn audit<R: RngCore + CryptoRng>(
    subject: Subject,
    rho: Rho,
    delta: Delta,
    trials: usize,
    rng: &mut R,
) -> Result<Finding> {
    let sensitivity = integer_norm(CLIP, SCALE)?;
    let spent = if subject == Subject::HalfSigma {
        Rho::from_f64_round_down(4.0 * rho.as_f64()).context("four times the cost")?
    } else {
        rho
    };
    let noise = DiscreteGaussian::from_rho(sensitivity * sensitivity, spent)?;
    let shares = Shares::new(subject, sensitivity * sensitivity, spent)?;
    let mut summed = [Vec::new(), Vec::new()];
    let mut gradient = vec![0.0; DIMENSION];
    gradient[0] = 1e3 * CLIP as f32;
    let clip = if subject == Subject::LooseClip { CLIP * std::f64::consts::SQRT_2 } else { CLIP };
    let canary = quantize_clipped(&gradient, clip, SCALE)?;
    let nothing = vec![0; DIMENSION];
    let threshold = sensitivity as f64 / 2.0;
    let mut wrong = [0_usize; 2];
    for _ in 0..trials {
        for (sum, present) in [(&nothing, false), (&canary, true)] {
            let silent = subject == Subject::SilentWhenEmpty && !present;
            let seen = if silent {
                0
            } else if subject.is_sum() {
                let summed = &mut summed[usize::from(present)];
                if summed.is_empty() {
                    *summed = shares.values(sum.first().copied().unwrap_or_default(), rng)?;
                }
                summed.pop().unwrap_or_default()
            } else {
                noise.privatize(sum, rng).as_slice().first().copied().unwrap_or_default()
            };
            let seen = seen as f64;
            wrong[usize::from(present)] += usize::from((seen > threshold) != present);
        }
    }
    let [taken_for_present, missed] = wrong.map(|events| upper_rate(events, trials, FAILURE));
    let epsilon = |false_positive: f64, false_negative: f64| {
        let mu = normal_quantile(1.0 - false_positive) - normal_quantile(false_negative);
        gdp::epsilon_at_mu(mu.max(0.0), delta).map_or(f64::INFINITY, |epsilon| epsilon.get())
    };
    let found = [epsilon(taken_for_present, missed), epsilon(missed, taken_for_present)];
    let claimed = zcdp::epsilon(rho, delta).get();
    let broken = found.iter().any(|found| *found > claimed);
    Ok(Finding { subject, trials, claimed, exact: gdp::epsilon(rho, delta).get(), found, broken })
}

/// Clip norm; the audit doesn't depend on it.
const CLIP: f64 = 1.0;
/// Integer steps per unit: as for the adapters.
const SCALE: u64 = 1 << 16;
/// Coordinates of a vector; all but the first carry noise alone.
const DIMENSION: usize = 4;
/// Probability that a bound on an error rate is too low.
const FAILURE: f64 = 0.025;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use rand::SeedableRng;
    use rand_chacha::ChaCha20Rng;
    use tabmesh_privacy::accountant::phase::{Adjacency, Phase, Step};
    use tabmesh_privacy::accountant::{pld, rdp};

    use super::*;

    /// Fixed seeds: the outcome is the same in every run.
    #[test]
    fn shipped_noise_keeps_its_claim_and_every_control_is_caught() {
        let (rho, delta) = (Rho::from_f64_round_down(0.5).unwrap(), Delta::new(1e-5).unwrap());
        let mut rng = ChaCha20Rng::seed_from_u64(11);
        for subject in Subject::ALL {
            let found = audit(subject, rho, delta, 20_000, &mut rng).unwrap();
            assert_eq!(found.broken, !subject.is_shipped(), "{found:?}");
            if subject.is_shipped() {
                // The audit has power: it finds nine tenths of what an exact account says.
                assert!(found.found.iter().all(|e| *e > 0.9 * found.exact && *e < found.exact), "{found:?}");
            }
        }
    }

    /// What is found lies below what the loss distribution charges, and that below the Rényi account and the ledger's claim. These
    /// two are one formula, the first at a grid of orders, the second at the best: they differ by less than a thousandth.
    #[test]
    fn what_is_found_is_below_every_account_and_these_are_in_order() {
        let delta = Delta::new(1e-5).unwrap();
        for (seed, rho) in [(1, 0.05), (2, 0.5), (3, 2.0)] {
            let mut rng = ChaCha20Rng::seed_from_u64(seed);
            let rho = Rho::from_f64_round_down(rho).unwrap();
            let found = audit(Subject::Shipped, rho, delta, 20_000, &mut rng).unwrap();
            let sigma = (0.5 / rho.as_f64()).sqrt();
            let plan = [Phase::new(Step::Gaussian { sigma }, 1).unwrap()];
            let by_loss = pld::epsilon(&plan, Adjacency::AddRemove, delta).unwrap().get();
            let by_renyi = rdp::epsilon(&plan, Adjacency::AddRemove, delta).unwrap().get();
            let most = found.found.into_iter().fold(0.0, f64::max);
            assert!(0.0 < most && most < by_loss && by_loss < by_renyi, "{most} {by_loss} {by_renyi}");
            assert!(
                by_loss < found.claimed && (by_renyi / found.claimed - 1.0).abs() < 1e-3,
                "{by_renyi} {found:?}"
            );
        }
    }
}

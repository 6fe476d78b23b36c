//! How often an attacker was right, beside what the claimed ε allows.
//!
//! Each guess is about one secret of one unit, drawn afresh for it. Without the unit nobody is right more often than the
//! prior κ. Under Gaussian DP with parameter μ an event of probability q without the unit has at most Φ(Φ⁻¹(q) + μ) with it
//! (Dong, Roth and Su 2019, arXiv 1905.02383); that is concave in q, so averaged over secrets an attacker is right at most
//! at the rate Φ(Φ⁻¹(κ) + μ) (Hayes, Mahloujifar and Balle 2023, arXiv 2302.07225, section 3). Read backwards a rate that an
//! attacker reached gives a lower bound on μ, and with it on ε. The μ that a claim allows is the one whose ε at the claim's
//! δ is the claimed one. Rates are bounded by Clopper-Pearson at 97.5 % on each side.

use serde::Serialize;
use tabmesh_privacy::accountant::{gdp, zcdp};
use tabmesh_privacy::budget::{Delta, Rho};

use super::bounds::{bisect, lower_rate, normal, normal_quantile, upper_rate};

/// What is attacked: the shipped code, or that with an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Subject {
    /// As agents run it.
    Shipped,
    /// Control: half the standard deviation that the claim needs.
    HalfNoise,
    /// Control: a quarter of it.
    QuarterNoise,
    /// Control: a tenth of it.
    TenthNoise,
    /// Control: no noise.
    NoNoise,
    /// Control: four times the rows of a unit that the claim is for.
    NoUnitBound,
    /// Control: gradients as long as they are.
    NoClip,
}

impl Subject {
    /// In words.
    pub(super) fn words(self) -> &'static str {
        match self {
            Self::Shipped => "the shipped code",
            Self::HalfNoise => "control: half the noise",
            Self::QuarterNoise => "control: a quarter of the noise",
            Self::TenthNoise => "control: a tenth of the noise",
            Self::NoNoise => "control: no noise",
            Self::NoUnitBound => "control: four times the rows of a unit",
            Self::NoClip => "control: no clip",
        }
    }

    /// What the noise costs for what the claim is for: a fraction of the noise is as many times squared the cost.
    /// Nothing where there is no noise.
    pub(super) fn spent(self, claimed: Rho) -> Option<Rho> {
        let times = match self {
            Self::Shipped | Self::NoUnitBound | Self::NoClip => 1,
            Self::HalfNoise => 4,
            Self::QuarterNoise => 16,
            Self::TenthNoise => 100,
            Self::NoNoise => return None,
        };
        Some(claimed.share(times, 1))
    }

    /// Whether a finding is as it must be: the shipped code keeps its claim, and a control breaks it.
    pub(super) fn as_it_must(self, broken: bool) -> bool {
        broken == (self != Self::Shipped)
    }

    /// The finding in words.
    pub(super) fn verdict(self, broken: bool) -> &'static str {
        match (self, broken) {
            (Self::Shipped, false) => "keeps its claim",
            (Self::Shipped, true) => "BREAKS ITS CLAIM",
            (_, true) => "caught",
            (_, false) => "NOT CAUGHT",
        }
    }
}

/// What is claimed to hold.
#[derive(Debug, Clone, Copy)]
pub(super) struct Claim {
    /// The cost as ledgers count it.
    pub(super) rho: Rho,
    /// δ at which it is stated.
    pub(super) delta: Delta,
}

impl Claim {
    /// ε as ledgers state it.
    pub(super) fn epsilon(&self) -> f64 {
        zcdp::epsilon(self.rho, self.delta).get()
    }

    /// ε of an exact Gaussian account: what a perfect attack on the worst unit finds.
    pub(super) fn exact(&self) -> f64 {
        gdp::epsilon(self.rho, self.delta).get()
    }

    /// ε at the claim's δ of Gaussian DP with this parameter.
    pub(super) fn epsilon_at(&self, mu: f64) -> f64 {
        gdp::epsilon_at_mu(mu.max(0.0), self.delta).map_or(f64::INFINITY, |epsilon| epsilon.get())
    }

    /// The largest parameter of Gaussian DP that the claimed ε allows.
    pub(super) fn mu(&self) -> f64 {
        let claimed = self.epsilon();
        bisect(0.0, gdp::MAX_MU.sqrt(), |mu| self.epsilon_at(mu) > claimed)
    }
}

/// How an attack on one subject went.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Guesses {
    /// The attack, in words.
    pub(super) attack: &'static str,
    pub(super) subject: Subject,
    pub(super) trials: usize,
    /// Trials in which the attacker was right.
    pub(super) right: usize,
    /// Share of them.
    pub(super) rate: f64,
    /// Clopper-Pearson bounds of the rate, 97.5 % each.
    pub(super) interval: [f64; 2],
    /// Rate of the best guess without the release or vector; of a test, the upper bound of its false alarms.
    pub(super) prior: f64,
    /// Largest rate that the claim allows.
    pub(super) allowed: f64,
    /// ε of the claim.
    pub(super) claimed: f64,
    /// ε of an exact Gaussian account of the same noise.
    pub(super) exact: f64,
    /// Lower bound on ε that the rate gives.
    pub(super) found: f64,
    /// Whether that exceeds the claim.
    pub(super) broken: bool,
}

impl Guesses {
    /// Guesses of a secret that a prior alone guesses at a rate of `prior`; for tests at a false alarm rate, that rate.
    pub(super) fn of_secrets(
        (attack, subject): (&'static str, Subject),
        claim: &Claim,
        (right, trials): (usize, usize),
        prior: f64,
    ) -> Self {
        let allowed = normal(normal_quantile(prior) + claim.mu());
        let found = |low: f64| normal_quantile(low) - normal_quantile(prior);
        Self::judged((attack, subject), claim, (right, trials), prior, allowed, found)
    }

    /// Guesses which of two runs had the unit, by the larger score: the rate is the area under the ROC curve, which a
    /// parameter μ keeps at Φ(μ / √2) or below.
    pub(super) fn of_pairs(
        (attack, subject): (&'static str, Subject),
        claim: &Claim,
        (right, trials): (usize, usize),
    ) -> Self {
        let root = std::f64::consts::SQRT_2;
        let allowed = normal(claim.mu() / root);
        Self::judged((attack, subject), claim, (right, trials), 0.5, allowed, |low| {
            root * normal_quantile(low)
        })
    }

    fn judged(
        (attack, subject): (&'static str, Subject),
        claim: &Claim,
        (right, trials): (usize, usize),
        prior: f64,
        allowed: f64,
        mu: impl Fn(f64) -> f64,
    ) -> Self {
        let interval = [lower_rate(right, trials, FAILURE), upper_rate(right, trials, FAILURE)];
        let (claimed, found) = (claim.epsilon(), claim.epsilon_at(mu(interval[0])));
        Self {
            attack,
            subject,
            trials,
            right,
            rate: right as f64 / trials.max(1) as f64,
            interval,
            prior,
            allowed,
            claimed,
            exact: claim.exact(),
            found,
            broken: found > claimed,
        }
    }

    /// Whether the finding is as it must be.
    pub(super) fn as_it_must(&self) -> bool {
        self.subject.as_it_must(self.broken)
    }
}

/// Probability that a bound on a rate is on the wrong side.
pub(super) const FAILURE: f64 = 0.025;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn claim() -> Claim {
        Claim { rho: Rho::from_f64_round_down(0.5).unwrap(), delta: Delta::new(1e-5).unwrap() }
    }

    /// At ρ = ½ the exact parameter is 1; the ledger's ε is a little larger, and so is what it allows.
    #[test]
    fn the_allowed_parameter_is_that_of_the_claimed_epsilon() {
        let claim = claim();
        assert!(claim.mu() > 1.0 && claim.mu() < 1.1, "{}", claim.mu());
        assert!((claim.epsilon_at(1.0) - claim.exact()).abs() < 1e-9);
        assert!((claim.epsilon_at(claim.mu()) - claim.epsilon()).abs() < 1e-6);
    }

    #[test]
    fn a_rate_is_broken_exactly_when_its_lower_bound_is_above_what_is_allowed() {
        let claim = claim();
        for (right, trials, prior) in
            [(60, 100, 0.5), (990, 1000, 0.5), (40, 64, 1.0 / 64.0), (2, 64, 1.0 / 64.0)]
        {
            let guesses = Guesses::of_secrets(("test", Subject::Shipped), &claim, (right, trials), prior);
            assert_eq!(guesses.broken, guesses.interval[0] > guesses.allowed, "{guesses:?}");
        }
        for (right, trials) in [(500, 1000), (700, 1000), (900, 1000)] {
            let guesses = Guesses::of_pairs(("test", Subject::Shipped), &claim, (right, trials));
            assert_eq!(guesses.broken, guesses.interval[0] > guesses.allowed, "{guesses:?}");
        }
    }

    /// Nothing but the share of the noise changes what a control spends.
    #[test]
    fn controls_cost_the_square_of_what_they_leave_out() {
        let rho = claim().rho;
        assert_eq!(Subject::HalfNoise.spent(rho), Some(rho.share(4, 1)));
        assert_eq!(Subject::QuarterNoise.spent(rho), Some(rho.share(16, 1)));
        assert_eq!((Subject::Shipped.spent(rho), Subject::NoNoise.spent(rho)), (Some(rho), None));
        assert!(Subject::Shipped.as_it_must(false) && !Subject::HalfNoise.as_it_must(false));
    }
}

//! How a plan's ε and δ are shared out, in integers.
//!
//! ε and δ become one ρ (zero-concentrated DP); shares are parts per million of it, rounded down, so what is given
//! out never adds up to more than what there is.

use serde::{Deserialize, Serialize};
use tabmesh_privacy::accountant::zcdp;
use tabmesh_privacy::budget::{Delta, Epsilon, Rho};

use crate::plan::{Plan, StageShares};

/// Number of release stages.
pub const STAGES: usize = 4;

/// Parts in a whole.
pub(super) const PPM: u64 = 1_000_000;

/// What each part of a plan may cost one privacy unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanBudget {
    /// ρ that ε and δ stand for.
    pub total: Rho,
    /// ρ of the release, second attempts at its sums included.
    pub release: Rho,
    /// ρ of each release stage.
    pub per_stage: [Rho; STAGES],
    /// ρ of all rounds, second attempts at their sums included.
    pub rounds: Rho,
    /// ρ of one round.
    pub per_round: Rho,
}

impl PlanBudget {
    /// Shares a plan's budget out, or says which field is at fault and why.
    pub(super) fn of(plan: &Plan) -> Result<Self, (&'static str, String)> {
        let spec = &plan.privacy;
        let epsilon = Epsilon::new(spec.epsilon).map_err(|error| ("privacy.epsilon", error.to_string()))?;
        let delta = Delta::new(spec.delta).map_err(|error| ("privacy.delta", error.to_string()))?;
        let total = zcdp::rho_for(epsilon, delta);
        let without_rounds = plan.rounds.count == 0;
        let release = if without_rounds { total } else { total.share(ppm(spec.release_share), PPM) };
        let StageShares { one_way, label_pairs, structure, tree } = plan.release.shares;
        // What a second attempt at a sum may cost is set aside, at the price of the dearest stage.
        let retries = plan.secure_sum().map_or(0, |spec| u64::from(spec.retries));
        let shares = [one_way, label_pairs, structure, tree].map(ppm);
        let dearest = shares.iter().max().copied().unwrap_or(0);
        let whole = (shares.iter().sum::<u64>() + retries * dearest).max(PPM);
        let per_stage = shares.map(|share| release.share(share, whole));
        let rounds = total.saturating_sub(release);
        let allowed = rounds.share(1, u64::from(plan.rounds.count.max(1)) + retries);
        if (allowed == Rho::ZERO && !without_rounds) || per_stage.contains(&Rho::ZERO) {
            let message = "epsilon and delta leave nothing for some stage or round".to_owned();
            return Err(("privacy.epsilon", message));
        }
        let per_round = match plan.rounds.noise_multiplier {
            _ if without_rounds => Rho::ZERO,
            None => allowed,
            Some(multiplier) => {
                let field = "rounds.noise_multiplier";
                let needed = Rho::from_f64_round_up(0.5 / (multiplier * multiplier))
                    .map_err(|error| (field, error.to_string()))?;
                if needed > allowed {
                    let least = (0.5 / allowed.as_f64()).sqrt();
                    let message = format!(
                        "{multiplier} costs rho {needed} a round, the budget allows {allowed}: use at least {least:.3}"
                    );
                    return Err((field, message));
                }
                needed
            }
        };
        Ok(Self { total, release, per_stage, rounds, per_round })
    }
}

/// A share as parts per million, to nearest.
pub(super) fn ppm(share: f64) -> u64 {
    // Shares are in [0, 1] by validation; the cast saturates at zero for anything below.
    (share * PPM as f64).round() as u64
}

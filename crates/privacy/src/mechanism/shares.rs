//! Noise in shares: every agent of a secure sum adds a part, and enough honest parts are a whole.
//!
//! With n agents of which at most D are missing and C subtract their own part, a share has the variance
//! σ_l² = σ_c²/(n − D − C), so the noise of the honest rest is at least σ_c². A sum of h discrete Gaussians isn't one
//! itself; Kairouz, Liu, Steinke (2021, arXiv 2102.06387, Theorem 1 and Proposition 14) bound what that costs:
//! ρ = ½·(Δ/(√h·σ_l) + √d·τ)², τ = 10·Σ_{k=1}^{h−1} exp(−2π²σ_l²·k/(k+1)). At σ_l ≥ 5, the least allowed,
//! τ < 10⁻¹⁰⁰, and the cost is the Gaussian's and one unit.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::event::{MechanismEvent, MechanismKind};
use super::{DiscreteGaussian, EventShape, MechanismError, SigmaSquared};
use crate::budget::{RHO_UNITS, Rho};

/// How the noise of a secure sum is divided, and under which assumptions it is enough.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NoiseShares {
    /// Variance of each agent's share: σ_l².
    pub share: SigmaSquared,
    /// Agents asked: n.
    pub agents: u32,
    /// Agents that may be missing: D.
    pub dropouts: u32,
    /// Agents assumed to collude with each other and with the server: C.
    pub colluders: u32,
}

/// What a secure sum costs each unit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SharesCost {
    /// zCDP cost of the sum, as the server and the colluders together see it.
    pub rho: Rho,
    /// How far a sum of discrete Gaussians is from one: τ, zero where it is below the smallest float.
    pub tau: f64,
    /// zCDP cost of one agent's own share alone: what holds if everybody else colludes.
    pub alone: Rho,
}

impl NoiseShares {
    /// Divides a total variance over the agents whose noise can be counted on, rounded up; nothing if there is no such
    /// agent.
    ///
    /// # Errors
    /// [`MechanismError::Fraction`] for a share out of range.
    pub fn of(
        central: SigmaSquared,
        agents: u32,
        dropouts: u32,
        colluders: u32,
    ) -> Result<Option<Self>, MechanismError> {
        let Some(counted) = counted(agents, dropouts, colluders) else { return Ok(None) };
        let den = u128::from(central.den()) * u128::from(counted);
        let share = SigmaSquared::new(central.num().into(), den)?;
        Ok(Some(Self { share, agents, dropouts, colluders }))
    }

    /// Checks that the share follows from the total and can be drawn.
    ///
    /// # Errors
    /// [`MechanismError::Shares`] for another share than the total gives, or what [`DiscreteGaussian`] says about it.
    pub fn check(&self, central: SigmaSquared, l2_sensitivity_squared: u64) -> Result<(), MechanismError> {
        if Self::of(central, self.agents, self.dropouts, self.colluders)? != Some(*self) {
            return Err(MechanismError::Shares);
        }
        DiscreteGaussian::from_sigma_squared(l2_sensitivity_squared, self.share).map(drop)
    }

    /// What the sum costs at the least noise that the assumptions leave; nothing beyond the currency.
    #[must_use]
    pub fn cost(
        &self,
        central: SigmaSquared,
        l2_sensitivity_squared: u64,
        dimension: u32,
    ) -> Option<SharesCost> {
        let alone = self.share.cost(l2_sensitivity_squared)?;
        let gaussian = central.cost(l2_sensitivity_squared)?;
        // τ rises with the number of shares, so all agents are the worst case.
        let tau = tau(self.share, self.agents as usize);
        let spread = f64::from(dimension).sqrt() * tau;
        let root = (l2_sensitivity_squared as f64 / central.as_f64()).sqrt();
        let excess = (root * spread + spread * spread / 2.0) * RHO_UNITS as f64;
        // At least one unit: τ is above zero even where no float can say so. The cast saturates, and then the sum does.
        let units = (excess.ceil() as u64).max(LEAST_EXCESS);
        let rho = gaussian.checked_add(Rho::from_units(units))?;
        Some(SharesCost { rho, tau, alone })
    }

    /// The record of one secure sum: what a ledger entry holds.
    ///
    /// # Errors
    /// [`MechanismError`] for shares that don't follow, or a cost beyond the currency.
    pub fn event(
        &self,
        central: SigmaSquared,
        l2_sensitivity_squared: u64,
        shape: EventShape,
    ) -> Result<MechanismEvent, MechanismError> {
        self.check(central, l2_sensitivity_squared)?;
        let cost = self.cost(central, l2_sensitivity_squared, shape.dimension);
        Ok(MechanismEvent {
            kind: MechanismKind::GaussianShares,
            sigma_squared: central,
            l2_sensitivity_squared,
            rows_per_unit: shape.rows_per_unit,
            marginals: shape.marginals,
            dimension: shape.dimension,
            rho: cost.ok_or(MechanismError::ZeroRho)?.rho,
            shares: Some(*self),
        })
    }
}

/// Agents whose noise can be counted on: n − D − C, if there are any.
#[must_use]
pub fn counted(agents: u32, dropouts: u32, colluders: u32) -> Option<u32> {
    let gone = u64::from(dropouts) + u64::from(colluders);
    let counted = u64::from(agents).checked_sub(gone).filter(|counted| *counted > 0)?;
    // Below `agents`, so the conversion keeps every bit.
    u32::try_from(counted).ok()
}

/// 10·Σ_{k=1}^{n−1} exp(−2π²σ²·k/(k+1)).
#[must_use]
pub fn tau(share: SigmaSquared, agents: usize) -> f64 {
    let rate = 2.0 * std::f64::consts::PI.powi(2) * share.as_f64();
    10.0 * (1..agents).map(|k| (-rate * k as f64 / (k as f64 + 1.0)).exp()).sum::<f64>()
}

/// Units of ρ that a sum of shares costs above the Gaussian at least.
pub const LEAST_EXCESS: u64 = 1;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    const SHAPE: EventShape = EventShape { rows_per_unit: 1, marginals: 0, dimension: 50_000 };

    fn shares() -> (SigmaSquared, NoiseShares) {
        let central = SigmaSquared::new(175, 1).unwrap();
        (central, NoiseShares::of(central, 10, 2, 1).unwrap().unwrap())
    }

    // Figures from Python: ρ = Δ²/(2·175) with Δ² = 16, one unit of 2⁻⁴⁰ more; a share has 175/7 = 25.
    #[test]
    fn an_event_of_shares_costs_one_unit_more_and_checks() {
        let (central, shares) = shares();
        assert_eq!((shares.share.num(), shares.share.den()), (175, 7));
        let event = shares.event(central, 16, SHAPE).unwrap();
        assert_eq!(event.rho.units(), central.cost(16).unwrap().units() + 1);
        assert!((event.rho.as_f64() - 16.0 / 350.0).abs() < 2e-12);
        assert_eq!(event.check(), Ok(()));
        let json = serde_json::to_string(&event).unwrap();
        assert!(
            json.contains(r#""kind":"gaussian_shares""#) && json.contains(r#""shares":{"share""#),
            "{json}"
        );
        assert_eq!(serde_json::from_str::<MechanismEvent>(&json).unwrap(), event);
    }

    #[test]
    fn what_does_not_follow_is_refused() {
        let (central, shares) = shares();
        let event = shares.event(central, 16, SHAPE).unwrap();
        let mut cheap = event.clone();
        cheap.rho = Rho::from_units(event.rho.units() - 1);
        assert!(matches!(cheap.check(), Err(MechanismError::Cost { .. })));
        // The cost of the whole noise under the name of one Gaussian, and the other way round.
        let plain = MechanismEvent { kind: MechanismKind::DiscreteGaussian, ..event };
        let bare = MechanismEvent { shares: None, ..event };
        // Assumptions that would need larger shares.
        let bolder = NoiseShares { dropouts: 3, ..shares };
        let bolder = MechanismEvent { shares: Some(bolder), ..event };
        for refused in [plain, bare, bolder] {
            assert_eq!(refused.check(), Err(MechanismError::Shares), "{refused:?}");
        }
        assert_eq!(NoiseShares::of(central, 3, 2, 1), Ok(None));
        // 174/7 is below 5².
        let small = SigmaSquared::new(174, 1).unwrap();
        let shares = NoiseShares::of(small, 10, 2, 1).unwrap().unwrap();
        assert!(matches!(shares.event(small, 16, SHAPE), Err(MechanismError::SigmaTooSmall { .. })));
    }
}

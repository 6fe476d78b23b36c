//! Noise shares: each agent adds a part of the noise, and the part is large enough that enough honest ones are a
//! whole.
//!
//! With at most D agents missing and C who subtract their own part, σ_l² = σ_c² / (n − D − C): the noise of the
//! honest survivors is at least σ_c². A set of survivors for which it isn't is never unmasked. A sum of h discrete
//! Gaussians isn't one itself; Kairouz, Liu, Steinke (2021, arXiv 2102.06387, Theorem 1 and Proposition 14) bound
//! what that costs: ρ = ½·(Δ/(√h·σ_l) + √d·τ)², τ = 10·Σ_{k=1}^{h−1} exp(−2π²σ_l²·k/(k+1)). At σ_l ≥ 5, the least
//! allowed, τ < 10⁻¹⁰⁰.

use serde::{Deserialize, Serialize};
use tabmesh_privacy::budget::Rho;
use tabmesh_privacy::mechanism::shares::LEAST_EXCESS;
use tabmesh_privacy::mechanism::{DiscreteGaussian, MechanismError, NoiseShares, SigmaSquared};
use thiserror::Error;

/// Why a noise plan is refused.
#[derive(Debug, Clone, Copy, PartialEq, Error)]
pub enum NoiseError {
    /// Nobody would be left whose noise counts.
    #[error(
        "of {agents} agents {dropouts} may drop out and {colluders} collude: no honest one would be left"
    )]
    NobodyLeft {
        /// Agents in the roster.
        agents: usize,
        /// Dropouts tolerated.
        dropouts: u32,
        /// Colluders assumed.
        colluders: u32,
    },
    /// The share stated isn't the one that follows.
    #[error(
        "noise share: expected a variance of {}/{}, got {}/{}",
        expected.num(), expected.den(), got.num(), got.den()
    )]
    Share {
        /// The share that follows from the total.
        expected: SigmaSquared,
        /// The share stated.
        got: SigmaSquared,
    },
    /// Variance or cost out of range.
    #[error(transparent)]
    Mechanism(#[from] MechanismError),
    /// More ρ than the currency can state.
    #[error("the cost of the sum is beyond the currency of privacy budgets")]
    Cost,
}

/// How the noise of a secure sum is divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NoisePlan {
    /// Variance that the sum must have at least, in squared integer steps: σ_c².
    pub central: SigmaSquared,
    /// Variance of each agent's share: σ_l².
    pub share: SigmaSquared,
    /// Agents that may drop out: D.
    pub dropouts: u32,
    /// Agents assumed to collude with each other and with the server: C.
    pub colluders: u32,
}

/// What a secure sum costs each unit, as seen by the server and `colluders` agents together.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Guarantee {
    /// zCDP cost of the sum.
    pub rho: Rho,
    /// How far a sum of discrete Gaussians is from one: τ, zero where it is below the smallest float.
    pub tau: f64,
    /// zCDP cost of one agent's own noise share alone: what holds if everybody else colludes.
    pub local: Rho,
}

impl NoisePlan {
    /// Divides a total variance over the agents whose noise can be counted on, rounded up.
    ///
    /// # Errors
    /// [`NoiseError::NobodyLeft`], or [`NoiseError::Mechanism`] for a share out of range.
    pub fn new(
        central: SigmaSquared,
        agents: usize,
        dropouts: u32,
        colluders: u32,
    ) -> Result<Self, NoiseError> {
        let share = share_of(central, agents, dropouts, colluders)?;
        Ok(Self { central, share, dropouts, colluders })
    }

    /// The division whose sum costs at most `rho` on a query of this sensitivity.
    ///
    /// # Errors
    /// [`NoiseError::Mechanism`] if `rho` buys no usable noise, or shares too small to be drawn;
    /// [`NoiseError::NobodyLeft`].
    pub fn for_cost(
        l2_sensitivity_squared: u64,
        rho: Rho,
        agents: usize,
        dropouts: u32,
        colluders: u32,
    ) -> Result<Self, NoiseError> {
        let rho = rho.saturating_sub(Rho::from_units(LEAST_EXCESS));
        let central = DiscreteGaussian::from_rho(l2_sensitivity_squared, rho)?.sigma_squared();
        let plan = Self::new(central, agents, dropouts, colluders)?;
        plan.check(agents, l2_sensitivity_squared)?;
        Ok(plan)
    }

    /// Checks that the share follows from the rest and can be drawn.
    ///
    /// # Errors
    /// [`NoiseError`] naming what differs.
    pub fn check(&self, agents: usize, l2_sensitivity_squared: u64) -> Result<(), NoiseError> {
        let expected = share_of(self.central, agents, self.dropouts, self.colluders)?;
        if expected != self.share {
            return Err(NoiseError::Share { expected, got: self.share });
        }
        DiscreteGaussian::from_sigma_squared(l2_sensitivity_squared, self.share)?;
        Ok(())
    }

    /// Survivors whose noise can be counted on: h = |U3| − C.
    #[must_use]
    pub fn honest(&self, survivors: usize) -> usize {
        survivors.saturating_sub(self.colluders as usize)
    }

    /// Whether h·σ_l² ≥ σ_c², in exact arithmetic.
    #[must_use]
    pub fn suffices(&self, survivors: usize) -> bool {
        let honest = self.honest(survivors) as u128;
        // h·num_l·den_c ≥ num_c·den_l with numerators below 2⁵⁸ and denominators up to 2⁶⁰: the factors of up to
        // 128 bits are compared as 192-bit numbers, high part first.
        let left = wide_product(honest * u128::from(self.share.num()), self.central.den());
        let right = wide_product(u128::from(self.central.num()), self.share.den());
        left >= right
    }

    /// Cost of the sum at the least noise that [`Self::suffices`] lets through.
    ///
    /// # Errors
    /// [`NoiseError::Cost`] beyond the currency.
    pub fn guarantee(
        &self,
        agents: usize,
        l2_sensitivity_squared: u64,
        dimension: u32,
    ) -> Result<Guarantee, NoiseError> {
        let cost = self.shares(agents).cost(self.central, l2_sensitivity_squared, dimension);
        let cost = cost.ok_or(NoiseError::Cost)?;
        Ok(Guarantee { rho: cost.rho, tau: cost.tau, local: cost.alone })
    }

    /// The plan as a ledger entry has it.
    #[must_use]
    pub fn shares(&self, agents: usize) -> NoiseShares {
        let Self { share, dropouts, colluders, .. } = *self;
        // A roster has at most 1024 agents.
        NoiseShares { share, agents: u32::try_from(agents).unwrap_or(u32::MAX), dropouts, colluders }
    }
}

fn share_of(
    central: SigmaSquared,
    agents: usize,
    dropouts: u32,
    colluders: u32,
) -> Result<SigmaSquared, NoiseError> {
    let shares = NoiseShares::of(central, u32::try_from(agents).unwrap_or(u32::MAX), dropouts, colluders)?;
    Ok(shares.ok_or(NoiseError::NobodyLeft { agents, dropouts, colluders })?.share)
}

/// The 192-bit product of a 128-bit and a 64-bit number, as (high 128 bits, low 64 bits).
fn wide_product(a: u128, b: u64) -> (u128, u64) {
    let low = (a & u128::from(u64::MAX)) * u128::from(b);
    let high = (a >> 64) * u128::from(b) + (low >> 64);
    (high, low as u64)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use proptest::prelude::*;
    use tabmesh_privacy::mechanism::shares::tau;

    use super::*;

    fn sigma_squared(num: u128, den: u128) -> SigmaSquared {
        SigmaSquared::new(num, den).unwrap()
    }

    proptest! {
        // The rule: with D missing and C colluding the rest suffices, and the share is no larger than one part in 2⁵⁰
        // above what that takes.
        #[test]
        fn the_tolerated_dropouts_suffice(
            sigma in 1_000_u64..1 << 28, agents in 4_usize..1000, dropouts in 0_u32..300, colluders in 1_u32..300
        ) {
            let central = sigma_squared(u128::from(sigma) * u128::from(sigma), 3);
            prop_assume!((dropouts + colluders) < agents as u32);
            let plan = NoisePlan::new(central, agents, dropouts, colluders).unwrap();
            let counted = agents - dropouts as usize - colluders as usize;
            prop_assert!(plan.suffices(agents - dropouts as usize));
            let exact = central.as_f64() / counted as f64;
            prop_assert!(plan.share.as_f64() >= exact * (1.0 - 1e-15));
            prop_assert!(plan.share.as_f64() <= exact * (1.0 + 1e-15));
            // One survivor fewer leaves a part of 1/counted out, far more than the rounding gave.
            prop_assert!(!plan.suffices(agents - dropouts as usize - 1));
        }
    }

    #[test]
    fn the_share_is_exact_for_round_numbers() {
        // n = 10, D = 2, C = 1: a seventh.
        let plan = NoisePlan::new(sigma_squared(70_000, 1), 10, 2, 1).unwrap();
        assert_eq!((plan.share.num(), plan.share.den()), (70_000, 7));
        assert!(plan.suffices(8) && !plan.suffices(7));
        assert_eq!((plan.honest(8), plan.honest(0)), (7, 0));
    }

    #[test]
    fn nobody_left_and_stated_shares_that_differ_are_refused() {
        let central = sigma_squared(70_000, 1);
        assert!(matches!(NoisePlan::new(central, 4, 2, 2), Err(NoiseError::NobodyLeft { .. })));
        assert!(matches!(NoisePlan::new(central, 4, u32::MAX, u32::MAX), Err(NoiseError::NobodyLeft { .. })));
        let mut plan = NoisePlan::new(central, 10, 2, 1).unwrap();
        assert_eq!(plan.check(10, 100), Ok(()));
        plan.share = sigma_squared(69_999, 7);
        assert!(matches!(plan.check(10, 100), Err(NoiseError::Share { .. })));
        // A share below σ = 5 can't be drawn: 10·25 is the least for ten counted agents.
        let small = NoisePlan::new(sigma_squared(249, 1), 12, 1, 1).unwrap();
        assert!(matches!(
            small.check(12, 1),
            Err(NoiseError::Mechanism(MechanismError::SigmaTooSmall { .. }))
        ));
        assert!(NoisePlan::new(sigma_squared(250, 1), 12, 1, 1).unwrap().check(12, 1).is_ok());
    }

    #[test]
    fn a_division_for_a_cost_never_costs_more() {
        for units in [3_000_000_u64, 1 << 30, (1 << 31) + 1] {
            let rho = Rho::from_units(units);
            let plan = NoisePlan::for_cost(65_000 * 65_000, rho, 7, 2, 1).unwrap();
            let cost = plan.guarantee(7, 65_000 * 65_000, 416).unwrap().rho;
            assert!(cost <= rho && cost.units() + 2 >= units, "{cost} of {rho}");
        }
        let refused = NoisePlan::for_cost(1, Rho::from_units(1 << 36), 7, 2, 1);
        assert!(matches!(refused, Err(NoiseError::Mechanism(MechanismError::SigmaTooSmall { .. }))));
    }

    // Figures from Python: tau = 10*sum(math.exp(-2*math.pi**2*s2*k/(k+1)) for k in range(1, n));
    // rho = ((D2/vc)**.5 + d**.5*tau)**2/2 with s2 = 25, n = 10, vc = 175, D2 = 16, d = 50000.
    #[test]
    fn the_cost_is_the_gaussians_and_one_unit_for_not_being_one() {
        let plan = NoisePlan::new(sigma_squared(175, 1), 10, 2, 1).unwrap();
        let guarantee = plan.guarantee(10, 16, 50_000).unwrap();
        assert!((guarantee.tau / GOLDEN_TAU - 1.0).abs() < 1e-9, "{}", guarantee.tau);
        let gaussian = plan.central.cost(16).unwrap();
        assert_eq!(guarantee.rho.units(), gaussian.units() + 1);
        assert!((guarantee.rho.as_f64() - 16.0 / 350.0).abs() < 2e-12);
        // Alone an agent's share has a seventh of the variance.
        assert!((guarantee.local.as_f64() - 16.0 / 50.0).abs() < 2e-12);
    }

    // At σ = ½, which the sampler refuses, τ is 0.07 and would be a large part of the cost: the formula isn't a
    // constant.
    #[test]
    fn tau_is_not_negligible_below_the_least_sigma() {
        let tiny = tau(sigma_squared(1, 4), 2);
        let expected = 10.0 * (-std::f64::consts::PI.powi(2) / 4.0).exp();
        assert!((tiny - expected).abs() < 1e-12 && tiny > 0.8);
    }

    #[test]
    fn wide_products_are_exact() {
        // (2¹²⁸ − 1)(2⁶⁴ − 1) = (2¹²⁸ − 2⁶⁴ − 1)·2⁶⁴ + 1.
        assert_eq!(wide_product(u128::MAX, u64::MAX), (u128::MAX - (1 << 64), 1));
        assert_eq!(wide_product(3 << 64, 5), (15, 0));
        assert_eq!(wide_product(7, 6), (0, 42));
    }

    const GOLDEN_TAU: f64 = 6.952351975877423e-107;
}

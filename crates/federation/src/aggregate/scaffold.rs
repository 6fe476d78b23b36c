//! Local steps corrected by control variates: SCAFFOLD of Karimireddy et al. 2020 (arXiv 1910.06378), algorithm 1.
//!
//! Each local gradient gains c − cᵢ, the mean of all agents' controls less the agent's own. After a round with K steps at
//! rate η an agent takes option II, cᵢ⁺ = cᵢ − c + (w₀ − wᵢ)/(Kη). The change of cᵢ is then a function of its change of the
//! model, so nothing beside the change has to be sent: the server takes c⁺ = c + share·(−c + mean(w₀ − wᵢ)/(Kη)) from
//! the mean alone, which a secure sum gives too. cᵢ itself never leaves the agent. Under noise cᵢ must follow from what
//! was sent (post-processing); a control of exact gradients would be a second release.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::aggregate::optimiser::OptimiserSpec;
use crate::aggregate::strategy::{FederatedStrategy, PLAIN_STEP, Point};
use crate::aggregate::{FedSgd, Rule};

/// Local steps with control variates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Scaffold {}

impl Scaffold {
    /// An agent's control after `steps` local steps at `rate`: cᵢ⁺ = cᵢ − c + change/(Kη), where `change` is w₀ − wᵢ.
    #[must_use]
    pub fn own_after(own: &[f64], shared: &[f64], change: &[f64], steps: u32, rate: f64) -> Vec<f64> {
        let factor = 1.0 / (f64::from(steps.max(1)) * rate);
        own.iter().zip(shared).zip(change).map(|((c_i, c), d)| c_i - c + d * factor).collect()
    }

    /// The server's control after a round in which a `share` of all agents took part with the mean change `change`.
    #[must_use]
    pub fn shared_after(shared: &[f64], change: &[f64], share: f64, steps: u32, rate: f64) -> Vec<f64> {
        let factor = 1.0 / (f64::from(steps.max(1)) * rate);
        shared.iter().zip(change).map(|(c, d)| c + share * (d * factor - c)).collect()
    }
}

impl FederatedStrategy for Scaffold {
    fn kind(&self) -> &'static str {
        "scaffold"
    }

    fn paper(&self) -> &'static str {
        "Karimireddy et al. 2020, arXiv 1910.06378"
    }

    fn rule(&self) -> Rule {
        Rule::FedSgd(FedSgd {})
    }

    fn optimiser(&self) -> OptimiserSpec {
        PLAIN_STEP
    }

    fn keeps_controls(&self) -> bool {
        true
    }

    fn correct(&self, at: &Point<'_>, gradient: &mut [f64]) {
        for ((g, shared), own) in gradient.iter_mut().zip(at.shared).zip(at.own) {
            *g += shared - own;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three agents, all in: the mean of the own controls is the shared one, as algorithm 1 has it by definition.
    #[test]
    fn the_shared_control_is_the_mean_of_the_own_ones() {
        let (steps, rate) = (4, 0.1);
        let changes = [[0.3, -0.2], [0.1, 0.5], [-0.4, 0.0]];
        let mut own = vec![vec![0.0; 2]; 3];
        let mut shared = vec![0.0; 2];
        for round in 1..4 {
            let changes: Vec<Vec<f64>> =
                changes.iter().map(|c| c.iter().map(|v| v * f64::from(round)).collect()).collect();
            let mean: Vec<f64> = (0..2).map(|j| changes.iter().map(|c| c[j]).sum::<f64>() / 3.0).collect();
            own = own
                .iter()
                .zip(&changes)
                .map(|(c, d)| Scaffold::own_after(c, &shared, d, steps, rate))
                .collect();
            shared = Scaffold::shared_after(&shared, &mean, 1.0, steps, rate);
            for (j, c) in shared.iter().enumerate() {
                let expected = own.iter().map(|c| c[j]).sum::<f64>() / 3.0;
                assert!((c - expected).abs() < 1e-12, "{shared:?} {own:?}");
            }
        }
    }
}

//! The mean over agents: each agent's mean update counts alike, whatever its size.
//!
//! McMahan et al. 2017 (arXiv 1602.05629) with equal weights: weights by example counts would need private
//! counts, and weights by released totals are [`super::FedSgd`]. Small domains weigh more than in a mean over
//! units, and so does their noise. As a strategy ([`super::strategy`]) agents take local steps and send the change.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::aggregate::optimiser::OptimiserSpec;
use crate::aggregate::strategy::{FederatedStrategy, PLAIN_STEP};
use crate::aggregate::{Aggregate, AggregateError, FedSgd, Rule, Updates};

/// The mean over agents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FedAvg {}

impl Aggregate for FedAvg {
    fn name(&self) -> &'static str {
        "fedavg"
    }

    fn needs_separate_updates(&self) -> bool {
        true
    }

    fn is_linear(&self) -> bool {
        true
    }

    fn mean(&self, updates: &Updates<'_>) -> Result<Vec<f64>, AggregateError> {
        let means = updates.means(self.name())?;
        let weight = 1.0 / means.len() as f64;
        let mut mean = vec![0.0; means.first().map_or(0, Vec::len)];
        for values in &means {
            for (total, value) in mean.iter_mut().zip(values) {
                *total += value * weight;
            }
        }
        Ok(mean)
    }
}

impl FederatedStrategy for FedAvg {
    fn kind(&self) -> &'static str {
        "fedavg"
    }

    fn paper(&self) -> &'static str {
        "McMahan et al. 2017, arXiv 1602.05629"
    }

    /// Changes are weighed by released totals, as the paper weighs them by numbers of examples.
    fn rule(&self) -> Rule {
        Rule::FedSgd(FedSgd {})
    }

    fn optimiser(&self) -> OptimiserSpec {
        PLAIN_STEP
    }
}

//! One mean gradient over all units of all agents: Σ of the agents' sums over the noisy total.
//!
//! McMahan et al. 2017 (arXiv 1602.05629), FedSGD with one full-batch step; the divisor is the released total,
//! so the number of examples of an agent is never used.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::aggregate::optimiser::OptimiserSpec;
use crate::aggregate::strategy::{FederatedStrategy, LocalWork};
use crate::aggregate::{Aggregate, AggregateError, Rule, Updates};

/// The mean over units.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FedSgd {}

impl Aggregate for FedSgd {
    fn name(&self) -> &'static str {
        "fedsgd"
    }

    fn needs_separate_updates(&self) -> bool {
        false
    }

    fn is_linear(&self) -> bool {
        true
    }

    fn mean(&self, updates: &Updates<'_>) -> Result<Vec<f64>, AggregateError> {
        let factor = 1.0 / (updates.scale * updates.divisor()?);
        let mut sum = updates.sum()?;
        sum.iter_mut().for_each(|value| *value *= factor);
        Ok(sum)
    }
}

impl FederatedStrategy for FedSgd {
    fn kind(&self) -> &'static str {
        "fedsgd"
    }

    fn paper(&self) -> &'static str {
        "McMahan et al. 2017, arXiv 1602.05629"
    }

    fn rule(&self) -> Rule {
        Rule::FedSgd(*self)
    }

    fn optimiser(&self) -> OptimiserSpec {
        OptimiserSpec::default()
    }

    fn local_work(&self) -> LocalWork {
        LocalWork::Gradient
    }
}

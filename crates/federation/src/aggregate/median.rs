//! Coordinate-wise median of the agents' means: Yin et al. 2018 (arXiv 1803.01498), algorithm 1, option I.
//!
//! Fewer than half of the agents can't move a position beyond honest values. Not linear, and impossible on a securely
//! aggregated sum.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::aggregate::optimiser::OptimiserSpec;
use crate::aggregate::strategy::{FederatedStrategy, PLAIN_STEP};
use crate::aggregate::{Aggregate, AggregateError, Rule, Updates};

/// The median over agents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Median {}

impl Aggregate for Median {
    fn name(&self) -> &'static str {
        "median"
    }

    fn needs_separate_updates(&self) -> bool {
        true
    }

    fn is_linear(&self) -> bool {
        false
    }

    fn mean(&self, updates: &Updates<'_>) -> Result<Vec<f64>, AggregateError> {
        let means = updates.means(self.name())?;
        let len = means.first().map_or(0, Vec::len);
        let mut column = Vec::with_capacity(means.len());
        let mut median = Vec::with_capacity(len);
        for position in 0..len {
            column.clear();
            column.extend(means.iter().filter_map(|values| values.get(position).copied()));
            column.sort_by(f64::total_cmp);
            let upper = column.get(column.len() / 2).copied().unwrap_or(0.0);
            let lower = column.get((column.len() - 1) / 2).copied().unwrap_or(0.0);
            median.push(0.5 * (lower + upper));
        }
        Ok(median)
    }
}

impl FederatedStrategy for Median {
    fn kind(&self) -> &'static str {
        "median"
    }

    fn paper(&self) -> &'static str {
        "Yin et al. 2018, arXiv 1803.01498"
    }

    fn rule(&self) -> Rule {
        Rule::Median(*self)
    }

    fn optimiser(&self) -> OptimiserSpec {
        PLAIN_STEP
    }
}

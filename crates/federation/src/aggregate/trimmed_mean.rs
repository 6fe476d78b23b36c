//! Coordinate-wise trimmed mean of the agents' means: Yin et al. 2018 (arXiv 1803.01498).
//!
//! At each position the smallest and largest ⌊n·trim⌋ values are left out, so fewer than that many agents can't
//! move the result beyond honest values. Not linear, and impossible on a securely aggregated sum.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::aggregate::optimiser::OptimiserSpec;
use crate::aggregate::strategy::{FederatedStrategy, PLAIN_STEP, default_trim};
use crate::aggregate::{Aggregate, AggregateError, Rule, Updates};

/// The trimmed mean over agents.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TrimmedMean {
    /// Share of agents cut at each end, in [0, 0.5). Default 0.1.
    #[serde(default = "default_trim")]
    pub trim: f64,
}

impl Aggregate for TrimmedMean {
    fn name(&self) -> &'static str {
        "trimmed_mean"
    }

    fn needs_separate_updates(&self) -> bool {
        true
    }

    fn is_linear(&self) -> bool {
        false
    }

    fn mean(&self, updates: &Updates<'_>) -> Result<Vec<f64>, AggregateError> {
        if !(0.0..0.5).contains(&self.trim) {
            return Err(AggregateError::OutOfRange { what: "trim", range: "in [0, 0.5)", got: self.trim });
        }
        let means = updates.means(self.name())?;
        let agents = means.len();
        let cut = (agents as f64 * self.trim).floor() as usize;
        let kept = agents.checked_sub(2 * cut).filter(|kept| *kept > 0);
        let Some(kept) = kept else {
            return Err(AggregateError::TrimsAll { cut, agents });
        };
        let len = means.first().map_or(0, Vec::len);
        let mut column = Vec::with_capacity(agents);
        let mut mean = Vec::with_capacity(len);
        for position in 0..len {
            column.clear();
            column.extend(means.iter().filter_map(|values| values.get(position).copied()));
            column.sort_by(f64::total_cmp);
            mean.push(column.iter().skip(cut).take(kept).sum::<f64>() / kept as f64);
        }
        Ok(mean)
    }
}

impl FederatedStrategy for TrimmedMean {
    fn kind(&self) -> &'static str {
        "trimmed_mean"
    }

    fn paper(&self) -> &'static str {
        "Yin et al. 2018, arXiv 1803.01498"
    }

    fn rule(&self) -> Rule {
        Rule::TrimmedMean(*self)
    }

    fn optimiser(&self) -> OptimiserSpec {
        PLAIN_STEP
    }
}

//! The mean over agents: each agent's mean update counts alike, whatever its size.
//!
//! McMahan et al. 2017 (arXiv 1602.05629) with equal weights: weights by example counts would need private
//! counts, and weights by released totals are [`super::FedSgd`]. Small domains weigh more than in a mean over
//! units, and so does their noise.

use serde::{Deserialize, Serialize};

use crate::aggregate::{Aggregate, AggregateError, Updates};

/// The mean over agents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
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

//! Local steps that stay near the round's model: FedProx of Li et al. 2020 (arXiv 1812.06127), algorithm 2.
//!
//! Each local gradient gains μ·(w − w₀), the gradient of (μ/2)·‖w − w₀‖². The term depends on no row, so it changes no
//! sensitivity and is in no clipped sum. What an agent sends is what [`super::FedAvg`]'s agents send.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::aggregate::optimiser::OptimiserSpec;
use crate::aggregate::strategy::{FederatedStrategy, PLAIN_STEP, Point};
use crate::aggregate::{FedSgd, Rule};

/// Local steps with a proximal term.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FedProx {
    /// Weight μ of the proximal term, in [0, 1000]. Default 0.01, the smallest of the paper's non-zero values' usual grid
    /// {0.001, 0.01, 0.1, 1} that is seldom too strong.
    #[serde(default = "default_proximal")]
    pub proximal: f64,
}

/// μ if none is named.
fn default_proximal() -> f64 {
    0.01
}

impl FederatedStrategy for FedProx {
    fn kind(&self) -> &'static str {
        "fedprox"
    }

    fn paper(&self) -> &'static str {
        "Li et al. 2020, arXiv 1812.06127"
    }

    fn rule(&self) -> Rule {
        Rule::FedSgd(FedSgd {})
    }

    fn optimiser(&self) -> OptimiserSpec {
        PLAIN_STEP
    }

    fn correct(&self, at: &Point<'_>, gradient: &mut [f64]) {
        for ((g, now), start) in gradient.iter_mut().zip(at.now).zip(at.start) {
            *g += self.proximal * (now - start);
        }
    }
}

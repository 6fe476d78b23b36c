//! Averaging with momentum at the server: FedAvgM of Hsu, Qi, Brown 2019 (arXiv 1909.06335).
//!
//! [`super::FedAvg`]'s local steps and weights; the mean change enters a heavy-ball velocity. The paper finds that it
//! helps where label shares differ between agents.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::aggregate::optimiser::{OptimiserSpec, default_momentum};
use crate::aggregate::strategy::FederatedStrategy;
use crate::aggregate::{FedSgd, Rule};

/// Local steps, server momentum.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FedAvgM {
    /// Momentum in [0, 1). Default 0.9, the paper's.
    #[serde(default = "default_momentum")]
    pub momentum: f64,
}

impl FederatedStrategy for FedAvgM {
    fn kind(&self) -> &'static str {
        "fedavgm"
    }

    fn paper(&self) -> &'static str {
        "Hsu, Qi, Brown 2019, arXiv 1909.06335"
    }

    fn rule(&self) -> Rule {
        Rule::FedSgd(FedSgd {})
    }

    /// The step is what keeps the sum of all pushes of one change at its own size.
    fn optimiser(&self) -> OptimiserSpec {
        OptimiserSpec::Sgd { learning_rate: 1.0 - self.momentum, momentum: self.momentum }
    }
}

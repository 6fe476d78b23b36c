//! Averaging with momentum at the server: FedAvgM of Hsu, Qi, Brown 2019 (arXiv 1909.06335).
//!
//! [`super::FedAvg`]'s local steps and weights; the mean change enters a heavy-ball velocity, and the server takes all of the
//! velocity as its step: v ← βv + Δ, w ← w − v. So a change is pushed 1/(1 − β) times its size in all, and where local steps
//! are large already a smaller server rate is to be named. The paper finds that momentum helps where label shares differ
//! between agents.

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

    /// The paper's: the whole velocity.
    fn optimiser(&self) -> OptimiserSpec {
        OptimiserSpec::Sgd { learning_rate: 1.0, momentum: self.momentum }
    }
}

//! The mean over units for an adaptive server optimiser: FedYogi of Reddi et al. 2021 (arXiv 2003.00295), algorithm 2.
//!
//! The rule itself is [`FedSgd`]'s; [`super::optimiser`] keeps the moments: an additive second moment, so that large gradients raise it no faster than small ones.
//! As every adaptive normaliser it turns noise into full-size steps at the signal-to-noise ratios of private rounds.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::aggregate::optimiser::{OptimiserSpec, default_adaptive_rate};
use crate::aggregate::strategy::FederatedStrategy;
use crate::aggregate::{FedSgd, Rule};

/// Local steps, Yogi at the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FedYogi {}

impl FederatedStrategy for FedYogi {
    fn kind(&self) -> &'static str {
        "fedyogi"
    }

    fn paper(&self) -> &'static str {
        "Reddi et al. 2021, arXiv 2003.00295"
    }

    fn rule(&self) -> Rule {
        Rule::FedSgd(FedSgd {})
    }

    fn optimiser(&self) -> OptimiserSpec {
        OptimiserSpec::Yogi { learning_rate: default_adaptive_rate() }
    }
}

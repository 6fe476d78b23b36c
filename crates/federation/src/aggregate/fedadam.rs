//! The mean over units for an adaptive server optimiser: FedAdam of Reddi et al. 2021 (arXiv 2003.00295).
//!
//! The rule itself is [`FedSgd`]'s; the moments live in [`super::optimiser`]. At the signal-to-noise ratios of
//! private rounds (below 1.5) an adaptive normaliser turns noise into full-size steps, so this is an option and
//! not the default.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::aggregate::optimiser::{OptimiserSpec, default_adaptive_rate};
use crate::aggregate::strategy::FederatedStrategy;
use crate::aggregate::{FedSgd, Rule};

/// Local steps, Adam at the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FedAdam {}

impl FederatedStrategy for FedAdam {
    fn kind(&self) -> &'static str {
        "fedadam"
    }

    fn paper(&self) -> &'static str {
        "Reddi et al. 2021, arXiv 2003.00295"
    }

    fn rule(&self) -> Rule {
        Rule::FedSgd(FedSgd {})
    }

    fn optimiser(&self) -> OptimiserSpec {
        OptimiserSpec::Adam { learning_rate: default_adaptive_rate() }
    }
}

//! The mean over units for an adaptive server optimiser: FedAdagrad of Reddi et al. 2021 (arXiv 2003.00295), algorithm 2.
//!
//! The rule itself is [`FedSgd`]'s; [`super::optimiser`] keeps the moments: a second moment that only grows, so that steps only shrink.
//! As every adaptive normaliser it turns noise into full-size steps at the signal-to-noise ratios of private rounds.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::aggregate::optimiser::{OptimiserSpec, default_adaptive_rate};
use crate::aggregate::strategy::FederatedStrategy;
use crate::aggregate::{FedSgd, Rule};

/// Local steps, Adagrad at the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FedAdagrad {}

impl FederatedStrategy for FedAdagrad {
    fn kind(&self) -> &'static str {
        "fedadagrad"
    }

    fn paper(&self) -> &'static str {
        "Reddi et al. 2021, arXiv 2003.00295"
    }

    fn rule(&self) -> Rule {
        Rule::FedSgd(FedSgd {})
    }

    fn optimiser(&self) -> OptimiserSpec {
        OptimiserSpec::Adagrad { learning_rate: default_adaptive_rate() }
    }
}

//! The mean over units for an adaptive server optimiser: FedAdam of Reddi et al. 2021 (arXiv 2003.00295).
//!
//! The rule itself is [`FedSgd`]'s; the moments live in [`super::optimiser`]. At the signal-to-noise ratios of
//! private rounds (below 1.5) an adaptive normaliser turns noise into full-size steps, so this is an option and
//! not the default.

use serde::{Deserialize, Serialize};

use crate::aggregate::{Aggregate, AggregateError, FedSgd, Updates};

/// The mean over units, for Adam.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct FedAdam {}

impl Aggregate for FedAdam {
    fn name(&self) -> &'static str {
        "fedadam"
    }

    fn needs_separate_updates(&self) -> bool {
        false
    }

    fn is_linear(&self) -> bool {
        true
    }

    fn mean(&self, updates: &Updates<'_>) -> Result<Vec<f64>, AggregateError> {
        FedSgd {}.mean(updates)
    }
}

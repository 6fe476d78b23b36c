//! What a scenario aims at, as its document says it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{LOCAL, POOLED};
use crate::scenario::document::{Faulty, Scenario};

/// What a scenario aims at.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Targets {
    /// Sets that aims count on; they shaped nothing. Default: all.
    #[serde(default)]
    pub sets: Vec<String>,
    /// The aims, at most 64.
    pub aims: Vec<Aim>,
}

/// One aim; met when the end of the interval passes it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Aim {
    /// Of the AUC between the best local and the best pooled rival, the part that what is served gains: the sum of gains over
    /// sets divided by the sum of gaps.
    GapClosed {
        /// The flow.
        flow: String,
        /// Least part, in (0, 1].
        least: f64,
    },
    /// What is served is no worse in AUC than the best local rival by more than a margin, and better on the mean.
    NonInferior {
        /// The flow.
        flow: String,
        /// The margin, in (0, 1].
        margin: f64,
    },
    /// What is served to newcomers gains AUC over trees on their own rows and over the best rival.
    Newcomers {
        /// The flow.
        flow: String,
        /// Number of own rows, one of the scenario's.
        rows: u32,
        /// Least gain over trees on own rows, in [0, 1].
        over_trees: f64,
        /// Least gain over the best rival, in [0, 1].
        over_best: f64,
    },
    /// The slope of labels' logit on the served logit, mean over domains, stays between two figures.
    Calibrated {
        /// The flow.
        flow: String,
        /// Least slope.
        low: f64,
        /// Largest slope, above `low`.
        high: f64,
    },
}

impl Aim {
    /// The flow it is about.
    pub(super) fn flow(&self) -> &str {
        match self {
            Self::GapClosed { flow, .. }
            | Self::NonInferior { flow, .. }
            | Self::Newcomers { flow, .. }
            | Self::Calibrated { flow, .. } => flow,
        }
    }
}

impl Targets {
    pub(in crate::scenario) fn faults(&self, scenario: &Scenario, found: &mut Faulty) {
        let known = &scenario.data.sets;
        for (i, set) in self.sets.iter().enumerate() {
            if !known.contains(set) {
                found.say(&format!("targets.sets[{i}]"), &format!("{set} is none of data.sets"));
            }
        }
        if self.aims.is_empty() || self.aims.len() > MOST_AIMS {
            found.say("targets.aims", &format!("must be 1 to {MOST_AIMS} aims"));
        }
        for (i, aim) in self.aims.iter().enumerate() {
            let at = |key: &str| format!("targets.aims[{i}].{key}");
            if !scenario.flows.iter().any(|flow| flow.name == aim.flow()) {
                found.say(&at("flow"), &format!("{} is none of the flows", aim.flow()));
            }
            let rivals = match aim {
                Aim::GapClosed { .. } => [LOCAL, POOLED].concat(),
                Aim::NonInferior { .. } => LOCAL.to_vec(),
                Aim::Newcomers { .. } | Aim::Calibrated { .. } => Vec::new(),
            };
            for rival in
                rivals.iter().filter(|rival| !scenario.rivals.iter().any(|known| known.name() == **rival))
            {
                found.say(&at("kind"), &format!("is held against {rival}, which is none of the rivals"));
            }
            match aim {
                Aim::GapClosed { least, .. } => found.above(&at("least"), *least, 0.0, 1.0),
                Aim::NonInferior { margin, .. } => found.above(&at("margin"), *margin, 0.0, 1.0),
                Aim::Newcomers { rows, over_trees, over_best, .. } => {
                    found.within(&at("over_trees"), *over_trees, 0.0, 1.0);
                    found.within(&at("over_best"), *over_best, 0.0, 1.0);
                    if !scenario.newcomers.as_ref().is_some_and(|n| n.rows.contains(rows)) {
                        found.say(&at("rows"), &format!("no newcomer is scored with {rows} rows"));
                    }
                }
                Aim::Calibrated { low, high, .. } => {
                    if !(low.is_finite() && high.is_finite() && low < high) {
                        found.say(&at("low"), &format!("must be below high, got {low} and {high}"));
                    }
                }
            }
        }
    }
}

/// Most aims of a scenario.
const MOST_AIMS: usize = 64;

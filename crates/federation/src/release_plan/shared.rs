//! What a cohort's contracts share: the features every domain promises, alike.
//!
//! A feature takes part if every contract approves it. Contracts that mean different things by one canonical id
//! (another type, range, scale, cut points, levels or unit) are refused by name, never reconciled silently.

use std::collections::BTreeMap;

use tabmesh_contract::schema::{Feature, FeatureId, FeatureKind, FeatureSchema, SchemaError};
use thiserror::Error;

use crate::id::AgentId;

/// Why contracts have no shared schema.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum SharedError {
    /// No contract at all.
    #[error("no contract to share features over")]
    NoContract,
    /// A contract has another target.
    #[error("{agent} has target {got}, the plan needs {expected}")]
    Target {
        /// Whose contract.
        agent: AgentId,
        /// The plan's target.
        expected: FeatureId,
        /// The contract's target.
        got: FeatureId,
    },
    /// Two contracts declare other classes, or in another order.
    #[error("{first} and {second} declare different classes of {target}")]
    Classes {
        /// The target.
        target: FeatureId,
        /// First agent.
        first: AgentId,
        /// Agent that differs.
        second: AgentId,
    },
    /// Two contracts mean different things by one id.
    #[error("{first} and {second} declare {feature} differently: {what}")]
    Feature {
        /// The feature.
        feature: FeatureId,
        /// First agent.
        first: AgentId,
        /// Agent that differs.
        second: AgentId,
        /// The declaration that differs.
        what: &'static str,
    },
    /// Two contracts bound a unit's rows differently.
    #[error("{first} lets a unit contribute {expected} rows, {second} lets it contribute {got}")]
    RowsPerUnit {
        /// First agent.
        first: AgentId,
        /// Agent that differs.
        second: AgentId,
        /// Rows at the first.
        expected: u32,
        /// Rows at the second.
        got: u32,
    },
    /// No feature is in every contract.
    #[error("no feature is shared: {source}")]
    Empty {
        /// The schema's own refusal.
        source: SchemaError,
    },
}

/// The features every schema has, with the target, from each agent's approved schema.
///
/// Descriptions are those of the first agent by id.
///
/// # Errors
/// [`SharedError`] naming the first difference in agent-id order.
pub fn shared_schema(
    schemas: &BTreeMap<AgentId, FeatureSchema>,
    target: &FeatureId,
) -> Result<FeatureSchema, SharedError> {
    let Some((first, reference)) = schemas.first_key_value() else {
        return Err(SharedError::NoContract);
    };
    for (agent, schema) in schemas {
        if schema.target().id != *target {
            let (expected, got) = (target.clone(), schema.target().id.clone());
            return Err(SharedError::Target { agent: agent.clone(), expected, got });
        }
        if schema.target().classes != reference.target().classes {
            let (first, second) = (first.clone(), agent.clone());
            return Err(SharedError::Classes { target: target.clone(), first, second });
        }
    }
    // Every id is compared over all contracts that have it, so a difference is found even if the feature is
    // missing elsewhere.
    let mut seen: BTreeMap<&FeatureId, (&AgentId, &Feature, usize)> = BTreeMap::new();
    for (agent, schema) in schemas {
        for feature in schema.features() {
            let (owner, known, times) = seen.entry(&feature.id).or_insert((agent, feature, 0));
            *times += 1;
            if let Some(what) = difference(known, feature) {
                let (first, second) = ((*owner).clone(), agent.clone());
                return Err(SharedError::Feature { feature: feature.id.clone(), first, second, what });
            }
        }
    }
    let everywhere = seen.into_values().filter(|(_, _, times)| *times == schemas.len());
    let features = everywhere.map(|(_, feature, _)| feature.clone()).collect();
    FeatureSchema::new(features, reference.target().clone()).map_err(|source| SharedError::Empty { source })
}

/// The number of rows one unit contributes at most, the same in every contract.
///
/// # Errors
/// [`SharedError::RowsPerUnit`] naming the first difference, [`SharedError::NoContract`] for no agents.
pub fn shared_max_rows(max_rows: &BTreeMap<AgentId, u32>) -> Result<u32, SharedError> {
    let Some((first, expected)) = max_rows.first_key_value() else {
        return Err(SharedError::NoContract);
    };
    match max_rows.iter().find(|(_, rows)| *rows != expected) {
        Some((second, got)) => {
            let (first, second) = (first.clone(), second.clone());
            Err(SharedError::RowsPerUnit { first, second, expected: *expected, got: *got })
        }
        None => Ok(*expected),
    }
}

/// What two declarations of one id disagree on, if anything.
fn difference(a: &Feature, b: &Feature) -> Option<&'static str> {
    match (&a.kind, &b.kind) {
        (FeatureKind::Numeric(x), FeatureKind::Numeric(y)) => {
            if x.lower.to_bits() != y.lower.to_bits() || x.upper.to_bits() != y.upper.to_bits() {
                return Some("range");
            }
            if x.scale != y.scale {
                return Some("scale");
            }
            if x.cut_points != y.cut_points {
                return Some("cut points");
            }
        }
        (FeatureKind::Categorical { levels: x }, FeatureKind::Categorical { levels: y }) => {
            if x != y {
                return Some("levels");
            }
        }
        _ => return Some("type"),
    }
    match (&a.unit, &b.unit) {
        (Some(x), Some(y)) if x != y => Some("unit of measure"),
        _ => None,
    }
}

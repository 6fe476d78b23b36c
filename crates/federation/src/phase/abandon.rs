//! The end of a round without a result, and why.
//!
//! An abandoned attempt is final: it is never reopened, and what agents spent on it stays spent. A new attempt is
//! a new descriptor with fresh noise and a new debit.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::id::{AgentId, Digest};
use crate::phase::PhaseName;

/// Why a collection or round ended without a result.
#[derive(Debug, Clone, PartialEq, Eq, Error, Serialize, Deserialize)]
#[serde(tag = "reason", rename_all = "snake_case")]
#[non_exhaustive]
pub enum AbandonReason {
    /// Too few updates at the deadline.
    #[error("quorum not reached: expected {expected} updates, got {got}")]
    QuorumNotReached {
        /// Updates needed.
        expected: usize,
        /// Updates in.
        got: usize,
    },
    /// The deadline passed before the round was announced.
    #[error("never opened before its deadline")]
    NeverOpened,
    /// Deadline and grace passed with the round unfinished.
    #[error("deadline and grace passed in phase {phase}")]
    Overdue {
        /// Where it was.
        phase: PhaseName,
    },
    /// After a restart an accepted update wasn't in the store.
    #[error("update {payload} of {agent} was lost in a restart")]
    PayloadLost {
        /// Whose update.
        agent: AgentId,
        /// Its digest.
        payload: Digest,
    },
    /// After a restart an accepted update was in the store with other content.
    #[error("update {payload} of {agent} came back changed after a restart")]
    PayloadChanged {
        /// Whose update.
        agent: AgentId,
        /// Its digest when it was accepted.
        payload: Digest,
    },
    /// A secure sum ended without a result.
    #[error("secure sum: {cause}")]
    SecureSum {
        /// Why, in seats and steps.
        cause: String,
    },
    /// An operator stopped it.
    #[error("cancelled by {by}")]
    Cancelled {
        /// Who, as an identity.
        by: String,
    },
    /// A step of the coordinator failed for good.
    #[error("failed: {what}")]
    Failed {
        /// What failed, without values.
        what: String,
    },
}

/// An ended round without a result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Abandoned {
    /// Why.
    pub cause: AbandonReason,
    /// When, UTC milliseconds.
    pub at_ms: i64,
}

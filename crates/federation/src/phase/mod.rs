//! The phases of a round, one file each, and the small types they share.
//!
//! `open` → `collect` → `aggregate` → `publish`, and from each of them `abandon`. Every phase is a plain value:
//! it answers an event with the next value and an [`Outcome`], and does no I/O. Whoever drives it stores the next
//! value durably *before* acting on the outcome; a crash in between repeats the event, which changes nothing twice.

pub mod abandon;
pub mod aggregate;
pub mod collect;
pub mod open;
pub mod publish;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::id::{AgentId, CollectionId, Digest};
use crate::screen::ScreenRefusal;

/// The answer to one event: the state to store, and what to tell the sender.
#[derive(Debug, Clone, PartialEq)]
pub struct Step<S> {
    /// The state afterwards.
    pub next: S,
    /// What to answer once `next` is durable.
    pub outcome: Outcome,
    /// Whether `next` differs from the state before: if not, there is nothing to store.
    pub changed: bool,
}

/// What an event led to. Protocol answers only: a failing disk is the driver's error, never an outcome.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// The update is in, exactly once.
    Accepted(Receipt),
    /// The same update was in already; the receipt is the first one, unchanged.
    Duplicate(Receipt),
    /// The event was refused.
    Refused(Refusal),
    /// The event moved or confirmed the state.
    Applied,
}

/// Proof that an update was accepted; a retry gets the same one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Receipt {
    /// Round or release stage.
    pub collection: CollectionId,
    /// Attempt within it, from 1.
    pub attempt: u32,
    /// Who sent it.
    pub agent: AgentId,
    /// Digest of the integers received.
    pub payload: Digest,
    /// When it was accepted, UTC milliseconds.
    pub received_ms: i64,
}

/// Name of a phase, for answers, logs and refusals.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PhaseName {
    /// Prepared, not announced.
    Open,
    /// Accepting updates.
    Collect,
    /// Updates are in, the sum is being turned into a step.
    Aggregate,
    /// The result is durable and about to become visible.
    Publish,
    /// Done: the result is visible.
    Published,
    /// Done without a result.
    Abandoned,
}

impl std::fmt::Display for PhaseName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Open => "open",
            Self::Collect => "collect",
            Self::Aggregate => "aggregate",
            Self::Publish => "publish",
            Self::Published => "published",
            Self::Abandoned => "abandoned",
        })
    }
}

/// Why an event is refused. Nothing has entered a sum.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The sender isn't among the agents this collection was announced to.
    #[error("agent {agent} is not in the roster of this collection")]
    NotInRoster {
        /// The sender.
        agent: AgentId,
    },
    /// The update belongs to another round or stage.
    #[error("wrong round: expected {expected}, got {got}")]
    WrongCollection {
        /// The id of this collection.
        expected: CollectionId,
        /// The id the update names.
        got: CollectionId,
    },
    /// The update belongs to another attempt.
    #[error(
        "wrong attempt: expected {expected}, got {got}; an update for another attempt must not be resent"
    )]
    WrongAttempt {
        /// This attempt.
        expected: u32,
        /// The attempt the update names.
        got: u32,
    },
    /// The agent worked from other announcement bytes.
    #[error("descriptor mismatch: expected {expected}, got {got}")]
    WrongDescriptor {
        /// Digest of the announcement sent out.
        expected: Digest,
        /// Digest the update names.
        got: Digest,
    },
    /// The update came at or after the deadline.
    #[error("late: the deadline was {deadline_ms} ms, it is {now_ms} ms")]
    Late {
        /// First late moment, UTC milliseconds.
        deadline_ms: i64,
        /// Time of arrival, UTC milliseconds.
        now_ms: i64,
    },
    /// The agent sent another update before.
    #[error("conflicting payload from {agent}: {accepted} was accepted, {got} is another one")]
    Conflict {
        /// The sender.
        agent: AgentId,
        /// Digest of the update that counts.
        accepted: Digest,
        /// Digest of the one refused.
        got: Digest,
    },
    /// The update looks like nothing an honest agent sends.
    #[error(transparent)]
    Screened(#[from] ScreenRefusal),
    /// The event has no meaning in this phase.
    #[error("{event} is not possible in phase {phase}")]
    WrongPhase {
        /// The event.
        event: &'static str,
        /// The phase.
        phase: PhaseName,
    },
    /// A result was announced under one digest and now comes under another.
    #[error("result changed: {expected} was recorded, got {got}")]
    ResultChanged {
        /// Digest recorded.
        expected: Digest,
        /// Digest now given.
        got: Digest,
    },
}

//! Collecting one integer vector from each agent: the phase that rounds and release stages share.
//!
//! Owns invariant R1: each agent's vector enters 0 or 1 times, whatever is repeated, lost or restarted. A retry
//! of an accepted update gets the first receipt, at any time; another payload under the same attempt is refused
//! for ever, since two noisy answers to one question would be a second release. The state that is stored holds
//! receipts only; vectors live in the blob store under their digests and are handed back after a restart.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::id::{AgentId, CollectionId, Digest};
use crate::phase::abandon::AbandonReason;
use crate::phase::{Outcome, PhaseName, Receipt, Refusal, Step};
use crate::schedule::{Moment, Window};
use crate::screen::ScreenLimits;
use crate::vector::Vector;

/// Vectors by agent, in the order every sum uses.
pub type ByAgent = BTreeMap<AgentId, Arc<[i64]>>;

/// Stored vectors by payload digest, as read back from the blob store after a restart.
pub type Payloads = BTreeMap<Digest, Arc<[i64]>>;

/// How many updates a collection needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Quorum {
    /// At least so many at the deadline; complete earlier once the whole roster is in.
    AtLeast {
        /// Updates needed, at least 1.
        updates: u32,
    },
    /// The whole roster: the rule under a fixed seed, where results must not depend on timing.
    Everyone,
}

/// What agents are told about a collection, and what the coordinator holds their answers against.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Announcement {
    /// Round or release stage.
    pub id: CollectionId,
    /// Attempt, from 1.
    pub attempt: u32,
    /// SHA-256 of the announcement bytes the agents get; each update names it.
    pub descriptor: Digest,
    /// Agents that may answer.
    pub roster: BTreeSet<AgentId>,
    /// How many must.
    pub quorum: Quorum,
    /// Until when.
    pub window: Window,
    /// What an answer may look like.
    pub limits: ScreenLimits,
}

impl Announcement {
    /// Updates needed at the deadline.
    #[must_use]
    pub fn needed(&self) -> usize {
        match self.quorum {
            Quorum::AtLeast { updates } => updates.max(1) as usize,
            Quorum::Everyone => self.roster.len(),
        }
    }
}

/// One agent's update as it arrives, already authenticated.
#[derive(Debug, Clone, PartialEq)]
pub struct Submission {
    /// Round or stage it is for.
    pub collection: CollectionId,
    /// Attempt it is for.
    pub attempt: u32,
    /// Digest of the announcement the agent worked from.
    pub descriptor: Digest,
    /// Who sent it: the identity of the connection, not a claim in the message.
    pub agent: AgentId,
    /// Digest the agent's ledger names.
    pub payload: Digest,
    /// The noised integers.
    pub vector: Vector,
}

/// Where a collection stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum CollectionState {
    /// Accepting updates.
    Collecting,
    /// Enough updates are in; no more are taken.
    Complete {
        /// Since when, UTC milliseconds.
        at_ms: i64,
    },
    /// Ended without a sum.
    Abandoned {
        /// Why.
        cause: AbandonReason,
        /// Since when, UTC milliseconds.
        at_ms: i64,
    },
}

/// An answer that cannot be summed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SumError {
    /// The collection isn't complete.
    #[error("nothing to sum: the collection is not complete")]
    NotComplete,
    /// Vectors aren't in memory: a restart has to hand them back first.
    #[error("{missing} of {accepted} accepted vectors are not loaded; hand them back with a restart event")]
    NotLoaded {
        /// Vectors missing.
        missing: usize,
        /// Updates accepted.
        accepted: usize,
    },
    /// The sum at a position leaves the range of `i64`.
    #[error("sum overflows at position {position}")]
    Overflow {
        /// First position.
        position: usize,
    },
}

/// A running or ended collection.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Collection {
    announcement: Announcement,
    receipts: BTreeMap<AgentId, Receipt>,
    state: CollectionState,
    latest_ms: i64,
    #[serde(skip)]
    values: ByAgent,
}

impl Collection {
    /// A collection that has just been announced.
    #[must_use]
    pub fn new(announcement: Announcement) -> Self {
        let latest_ms = announcement.window.opened_ms();
        Self {
            announcement,
            receipts: BTreeMap::new(),
            state: CollectionState::Collecting,
            latest_ms,
            values: BTreeMap::new(),
        }
    }

    /// What was announced.
    #[must_use]
    pub fn announcement(&self) -> &Announcement {
        &self.announcement
    }

    /// Where it stands.
    #[must_use]
    pub fn state(&self) -> &CollectionState {
        &self.state
    }

    /// Receipts given out, by agent.
    #[must_use]
    pub fn receipts(&self) -> &BTreeMap<AgentId, Receipt> {
        &self.receipts
    }

    /// The accepted vectors, by agent, as far as they are in memory.
    #[must_use]
    pub fn values(&self) -> &ByAgent {
        &self.values
    }

    /// Answers one update.
    ///
    /// Time is looked at first, so an update at the deadline is late even if no timer fired. A repeated update is
    /// recognised before anything else about it is judged, also after the end.
    #[must_use]
    pub fn submit(&self, submission: &Submission, now_ms: i64) -> Step<Self> {
        let mut next = self.ticked(now_ms);
        let outcome = match next.judge(submission, now_ms) {
            Ok(outcome) => outcome,
            Err(refusal) => Outcome::Refused(refusal),
        };
        next = next.settled();
        let changed = next.differs(self);
        Step { next, outcome, changed }
    }

    /// Lets time pass: completes or abandons at the deadline.
    #[must_use]
    pub fn tick(&self, now_ms: i64) -> Step<Self> {
        let next = self.ticked(now_ms);
        let changed = next.differs(self);
        Step { next, outcome: Outcome::Applied, changed }
    }

    /// Takes accepted vectors back after a restart, or abandons naming the first one that is lost or changed.
    ///
    /// `payloads` may hold more than is needed. A collection that is abandoned already needs none.
    #[must_use]
    pub fn restart(&self, payloads: &Payloads, now_ms: i64) -> Step<Self> {
        let mut next = self.clone();
        if !matches!(self.state, CollectionState::Abandoned { .. }) {
            next.values.clear();
            for (agent, receipt) in &self.receipts {
                let payload = receipt.payload;
                match payloads.get(&payload) {
                    Some(values) if Digest::of_payload(values) == payload => {
                        next.values.insert(agent.clone(), Arc::clone(values));
                    }
                    found => {
                        let agent = agent.clone();
                        let cause = match found {
                            None => AbandonReason::PayloadLost { agent, payload },
                            Some(_) => AbandonReason::PayloadChanged { agent, payload },
                        };
                        next = next.abandoned(cause, now_ms);
                        break;
                    }
                }
            }
        }
        next = next.ticked(now_ms);
        let changed = next.differs(self);
        Step { next, outcome: Outcome::Applied, changed }
    }

    /// Ends it without a sum; refused once it is complete or ended.
    #[must_use]
    pub fn cancel(&self, cause: AbandonReason, now_ms: i64) -> Step<Self> {
        let next = self.ticked(now_ms);
        let (next, outcome) = match next.state {
            CollectionState::Collecting => (next.abandoned(cause, now_ms), Outcome::Applied),
            _ => {
                let refusal = Refusal::WrongPhase { event: "cancelling", phase: next.phase() };
                (next, Outcome::Refused(refusal))
            }
        };
        let changed = next.differs(self);
        Step { next, outcome, changed }
    }

    /// Sum of the accepted vectors, added in agent-id order.
    ///
    /// # Errors
    /// [`SumError`] if it isn't complete, vectors aren't loaded, or a position overflows.
    pub fn sum(&self) -> Result<Vec<i64>, SumError> {
        if !matches!(self.state, CollectionState::Complete { .. }) {
            return Err(SumError::NotComplete);
        }
        let missing = self.receipts.keys().filter(|agent| !self.values.contains_key(agent)).count();
        if missing > 0 {
            return Err(SumError::NotLoaded { missing, accepted: self.receipts.len() });
        }
        let mut sum = vec![0_i64; self.announcement.limits.len];
        for values in self.values.values() {
            for (position, (total, value)) in sum.iter_mut().zip(values.iter()).enumerate() {
                *total = total.checked_add(*value).ok_or(SumError::Overflow { position })?;
            }
        }
        Ok(sum)
    }

    /// The phase this state counts as in answers.
    #[must_use]
    pub fn phase(&self) -> PhaseName {
        match self.state {
            CollectionState::Collecting => PhaseName::Collect,
            CollectionState::Complete { .. } => PhaseName::Aggregate,
            CollectionState::Abandoned { .. } => PhaseName::Abandoned,
        }
    }

    /// The checks on an update, in the order identity, repetition, time, content.
    fn judge(&mut self, submission: &Submission, now_ms: i64) -> Result<Outcome, Refusal> {
        let Announcement { id, attempt, descriptor, roster, window, limits, .. } = &self.announcement;
        if submission.collection != *id {
            return Err(Refusal::WrongCollection { expected: *id, got: submission.collection });
        }
        if submission.attempt != *attempt {
            return Err(Refusal::WrongAttempt { expected: *attempt, got: submission.attempt });
        }
        if submission.descriptor != *descriptor {
            return Err(Refusal::WrongDescriptor { expected: *descriptor, got: submission.descriptor });
        }
        let agent = &submission.agent;
        if !roster.contains(agent) {
            return Err(Refusal::NotInRoster { agent: agent.clone() });
        }
        if let Some(receipt) = self.receipts.get(agent) {
            if receipt.payload == submission.payload {
                return Ok(Outcome::Duplicate(receipt.clone()));
            }
            let (accepted, got) = (receipt.payload, submission.payload);
            return Err(Refusal::Conflict { agent: agent.clone(), accepted, got });
        }
        if self.latest_ms >= window.deadline_ms() {
            return Err(Refusal::Late { deadline_ms: window.deadline_ms(), now_ms });
        }
        if self.state != CollectionState::Collecting {
            return Err(Refusal::WrongPhase { event: "submitting", phase: self.phase() });
        }
        limits.screen(&submission.vector, &submission.payload)?;
        let receipt = Receipt {
            collection: *id,
            attempt: *attempt,
            agent: agent.clone(),
            payload: submission.payload,
            received_ms: self.latest_ms,
        };
        self.values.insert(agent.clone(), Arc::clone(submission.vector.values()));
        self.receipts.insert(agent.clone(), receipt.clone());
        Ok(Outcome::Accepted(receipt))
    }

    /// The same collection with its vectors dropped from memory; receipts stay.
    #[must_use]
    pub(crate) fn without_values(mut self) -> Self {
        self.values.clear();
        self
    }

    fn ticked(&self, now_ms: i64) -> Self {
        let mut next = self.clone();
        next.latest_ms = next.latest_ms.max(now_ms);
        next.settled()
    }

    /// Moves on if the roster is complete or the deadline has passed.
    fn settled(mut self) -> Self {
        if self.state != CollectionState::Collecting {
            return self;
        }
        let (got, expected) = (self.receipts.len(), self.announcement.needed());
        let at_ms = self.latest_ms;
        let due = self.announcement.window.at(at_ms) != Moment::Open;
        if got == self.announcement.roster.len() || (due && got >= expected) {
            self.state = CollectionState::Complete { at_ms };
        } else if due {
            let cause = AbandonReason::QuorumNotReached { expected, got };
            self.state = CollectionState::Abandoned { cause, at_ms };
            self.values.clear();
        }
        self
    }

    fn abandoned(mut self, cause: AbandonReason, now_ms: i64) -> Self {
        self.latest_ms = self.latest_ms.max(now_ms);
        self.state = CollectionState::Abandoned { cause, at_ms: self.latest_ms };
        self.values.clear();
        self
    }

    /// Whether what is stored differs; the latest time alone isn't worth a write.
    fn differs(&self, before: &Self) -> bool {
        self.state != before.state || self.receipts.len() != before.receipts.len()
    }
}

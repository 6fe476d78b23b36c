//! A training round: one value that moves through the phases, and the events that move it.
//!
//! Pure: [`Round::apply`] takes an event and the time and gives the next value and an answer. The driver stores
//! the next value, and new payloads before it, *then* answers. Three invariants hold at any crash point: **R1** an
//! agent's update is in 0 or 1 times; **R2** phases only go forward, a result's digest never changes; **R3** a
//! round is published, or abandoned with a reason, before deadline plus grace has passed, or at the first
//! event after a restart that comes later.

use serde::{Deserialize, Serialize};

use crate::id::{Digest, PlanDigest, RoundId};
use crate::phase::abandon::{AbandonReason, Abandoned};
use crate::phase::aggregate::{Aggregating, same_result};
use crate::phase::collect::{Announcement, Collection, CollectionState, Payloads, Submission};
use crate::phase::open::Open;
use crate::phase::publish::{Published, Publishing};
use crate::phase::{Outcome, PhaseName, Refusal, Step};

/// What happened to a round.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum RoundEvent {
    /// The announcement is about to leave.
    Opened,
    /// An authenticated agent sent an update.
    UpdateReceived(Submission),
    /// A timer fired; the time decides what it means.
    DeadlineReached,
    /// The process restarted; `payloads` are the stored updates by digest.
    Restarted {
        /// Vectors read back from the blob store.
        payloads: Payloads,
    },
    /// The aggregate is computed and durable.
    Aggregated {
        /// Its digest.
        result: Digest,
    },
    /// The result is visible.
    Published {
        /// Its digest.
        result: Digest,
    },
    /// A step failed for good.
    Failed {
        /// What failed, without values.
        what: String,
    },
    /// An operator stopped it.
    Cancelled {
        /// Who, as an identity.
        by: String,
    },
}

/// Where a round is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Prepared, not announced.
    Open(Open),
    /// Accepting updates.
    Collect(Collection),
    /// Waiting for the aggregate.
    Aggregate(Aggregating),
    /// The result is durable.
    Publish(Publishing),
    /// Done.
    Published {
        /// The result.
        end: Published,
        /// Receipts, for late retries.
        collection: Collection,
    },
    /// Ended without a result.
    Abandoned {
        /// Why and when.
        end: Abandoned,
        /// Receipts, for late retries; none if it was never announced.
        collection: Option<Collection>,
    },
}

/// One round.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Round {
    plan: PlanDigest,
    index: u32,
    id: RoundId,
    latest_ms: i64,
    phase: Phase,
}

impl Round {
    /// A prepared round; nothing of it has left yet.
    #[must_use]
    pub fn new(plan: PlanDigest, index: u32, announcement: Announcement) -> Self {
        let (id, latest_ms) = (announcement.id, announcement.window.opened_ms());
        Self { plan, index, id, latest_ms, phase: Phase::Open(Open { announcement }) }
    }

    /// The plan it belongs to.
    #[must_use]
    pub fn plan(&self) -> PlanDigest {
        self.plan
    }

    /// Its number in the plan, from 0.
    #[must_use]
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> RoundId {
        self.id
    }

    /// Where it is, with what it holds.
    #[must_use]
    pub fn phase(&self) -> &Phase {
        &self.phase
    }

    /// Name of the phase it is in.
    #[must_use]
    pub fn phase_name(&self) -> PhaseName {
        match self.phase {
            Phase::Open(_) => PhaseName::Open,
            Phase::Collect(_) => PhaseName::Collect,
            Phase::Aggregate(_) => PhaseName::Aggregate,
            Phase::Publish(_) => PhaseName::Publish,
            Phase::Published { .. } => PhaseName::Published,
            Phase::Abandoned { .. } => PhaseName::Abandoned,
        }
    }

    /// Whether it has ended, published or abandoned.
    #[must_use]
    pub fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Published { .. } | Phase::Abandoned { .. })
    }

    /// The collected updates, once it was announced.
    #[must_use]
    pub fn collection(&self) -> Option<&Collection> {
        match &self.phase {
            Phase::Open(_) => None,
            Phase::Collect(collection) | Phase::Published { collection, .. } => Some(collection),
            Phase::Aggregate(phase) => Some(&phase.collection),
            Phase::Publish(phase) => Some(&phase.collection),
            Phase::Abandoned { collection, .. } => collection.as_ref(),
        }
    }

    /// Answers one event at `now_ms`, UTC milliseconds. Time never goes back: an earlier `now_ms` than seen
    /// before counts as the latest one seen.
    #[must_use]
    pub fn apply(&self, event: RoundEvent, now_ms: i64) -> Step<Self> {
        let now_ms = self.latest_ms.max(now_ms);
        // What time alone has decided comes before the event: an update at the deadline is late. After a restart
        // the payloads must be back first, since a lost one decides otherwise.
        let mut next = match event {
            RoundEvent::Restarted { .. } => self.clone(),
            _ => self.aged(now_ms),
        };
        next.latest_ms = now_ms;
        let outcome = match event {
            RoundEvent::UpdateReceived(submission) => next.submit(&submission, now_ms),
            RoundEvent::Restarted { payloads } => next.restart(&payloads, now_ms),
            RoundEvent::DeadlineReached => Outcome::Applied,
            RoundEvent::Opened => next.open(),
            RoundEvent::Aggregated { result } => next.aggregated(result),
            RoundEvent::Published { result } => next.published(result, now_ms),
            RoundEvent::Failed { what } => next.stop(AbandonReason::Failed { what }, now_ms),
            RoundEvent::Cancelled { by } => next.stop(AbandonReason::Cancelled { by }, now_ms),
        };
        let next = next.aged(now_ms);
        let receipts = |round: &Self| round.collection().map(|c| c.receipts().len());
        let changed = next.phase_name() != self.phase_name() || receipts(&next) != receipts(self);
        Step { next, outcome, changed }
    }

    /// Lets time decide: completes or abandons what is due.
    fn aged(&self, now_ms: i64) -> Self {
        let mut next = self.clone();
        if let Phase::Collect(collection) = &next.phase {
            next.phase = settled(collection.tick(now_ms).next);
        }
        let overdue = match &next.phase {
            Phase::Open(phase) => phase.overdue(now_ms),
            Phase::Aggregate(phase) => phase.overdue(now_ms),
            Phase::Publish(phase) => phase.overdue(now_ms),
            Phase::Collect(_) | Phase::Published { .. } | Phase::Abandoned { .. } => None,
        };
        if let Some(cause) = overdue {
            next.abandon(cause, now_ms);
        }
        next
    }

    fn open(&mut self) -> Outcome {
        match &self.phase {
            Phase::Open(phase) => {
                self.phase = Phase::Collect(phase.opened());
                Outcome::Applied
            }
            Phase::Collect(_) => Outcome::Applied,
            _ => self.wrong_phase("opening"),
        }
    }

    fn submit(&mut self, submission: &Submission, now_ms: i64) -> Outcome {
        // Phases after collecting still know their receipts, so a retry of a lost answer gets the same one.
        let Some(collection) = self.collection() else {
            return self.wrong_phase("submitting");
        };
        let Step { next, outcome, .. } = collection.submit(submission, now_ms);
        if matches!(self.phase, Phase::Collect(_)) {
            self.phase = settled(next);
        }
        outcome
    }

    fn restart(&mut self, payloads: &Payloads, now_ms: i64) -> Outcome {
        match &self.phase {
            Phase::Collect(collection) => {
                self.phase = settled(collection.restart(payloads, now_ms).next);
            }
            Phase::Aggregate(phase) => {
                self.phase = settled(phase.collection.restart(payloads, now_ms).next);
            }
            // Before announcing nothing is lost; from publishing on the result alone counts.
            Phase::Open(_) | Phase::Publish(_) | Phase::Published { .. } | Phase::Abandoned { .. } => {}
        }
        Outcome::Applied
    }

    fn aggregated(&mut self, result: Digest) -> Outcome {
        let recorded = match &self.phase {
            Phase::Aggregate(phase) => {
                self.phase = Phase::Publish(phase.aggregated(result));
                return Outcome::Applied;
            }
            Phase::Publish(phase) => phase.result,
            Phase::Published { end, .. } => end.result,
            _ => return self.wrong_phase("recording an aggregate"),
        };
        answered(same_result(recorded, result))
    }

    fn published(&mut self, result: Digest, now_ms: i64) -> Outcome {
        match &self.phase {
            Phase::Publish(phase) => {
                if let Err(refusal) = same_result(phase.result, result) {
                    return Outcome::Refused(refusal);
                }
                let (end, collection) = (phase.published(now_ms), phase.collection.clone());
                self.phase = Phase::Published { end, collection };
                Outcome::Applied
            }
            Phase::Published { end, .. } => answered(same_result(end.result, result)),
            _ => self.wrong_phase("publishing"),
        }
    }

    /// Ends an unfinished round.
    fn stop(&mut self, cause: AbandonReason, now_ms: i64) -> Outcome {
        match &self.phase {
            Phase::Published { .. } => self.wrong_phase("stopping"),
            Phase::Abandoned { .. } => Outcome::Applied,
            _ => {
                self.abandon(cause, now_ms);
                Outcome::Applied
            }
        }
    }

    fn abandon(&mut self, cause: AbandonReason, at_ms: i64) {
        let collection = self.collection().map(|collection| {
            let stopped = collection.cancel(cause.clone(), at_ms).next;
            stopped.without_values()
        });
        self.phase = Phase::Abandoned { end: Abandoned { cause, at_ms }, collection };
    }

    fn wrong_phase(&self, event: &'static str) -> Outcome {
        Outcome::Refused(Refusal::WrongPhase { event, phase: self.phase_name() })
    }
}

/// The phase a collection puts its round in.
fn settled(collection: Collection) -> Phase {
    match collection.state() {
        CollectionState::Collecting => Phase::Collect(collection),
        CollectionState::Complete { .. } => Phase::Aggregate(Aggregating { collection }),
        CollectionState::Abandoned { cause, at_ms } => {
            let end = Abandoned { cause: cause.clone(), at_ms: *at_ms };
            Phase::Abandoned { end, collection: Some(collection) }
        }
    }
}

fn answered(result: Result<(), Refusal>) -> Outcome {
    match result {
        Ok(()) => Outcome::Applied,
        Err(refusal) => Outcome::Refused(refusal),
    }
}

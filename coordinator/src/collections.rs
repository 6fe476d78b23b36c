//! Open collections: release stages and rounds that wait for their agents' vectors.
//!
//! The state machines are pure; this drives them. A vector is stored before the state that counts it, the state
//! before the receipt is given, so a receipt always means durable. What a restart finds is handed back to the state
//! machine, which resumes or abandons.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tabmesh_federation::id::{CollectionId, Digest as NamedDigest};
use tabmesh_federation::phase::abandon::AbandonReason;
use tabmesh_federation::phase::collect::{Collection, CollectionState, Payloads, Submission};
use tabmesh_federation::phase::{Outcome, PhaseName, Refusal};
use tabmesh_federation::round::{Round, RoundEvent};
use tabmesh_privacy::private::decode_vector;
use tabmesh_store::{BlobStore, Digest, Records};
use tokio::sync::Notify;

use crate::error::CoordinatorError;
use crate::mesh::{Clock, locked, stored};

/// A collection of either kind, as stored.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Open {
    /// One stage of a release.
    Stage(Box<Collection>),
    /// One training round.
    Round(Box<Round>),
}

impl Open {
    /// The collected vectors.
    pub(crate) fn collection(&self) -> Option<&Collection> {
        match self {
            Self::Stage(collection) => Some(collection),
            Self::Round(round) => round.collection(),
        }
    }

    /// Whether no more vectors are taken.
    fn settled(&self) -> bool {
        match self {
            Self::Stage(collection) => !matches!(collection.state(), CollectionState::Collecting),
            Self::Round(round) => !matches!(round.phase_name(), PhaseName::Open | PhaseName::Collect),
        }
    }

    fn submit(&self, submission: &Submission, now_ms: i64) -> (Self, Outcome, bool) {
        match self {
            Self::Stage(collection) => {
                let step = collection.submit(submission, now_ms);
                (Self::Stage(Box::new(step.next)), step.outcome, step.changed)
            }
            Self::Round(round) => {
                let step = round.apply(RoundEvent::UpdateReceived(submission.clone()), now_ms);
                (Self::Round(Box::new(step.next)), step.outcome, step.changed)
            }
        }
    }

    fn tick(&self, now_ms: i64) -> (Self, bool) {
        match self {
            Self::Stage(collection) => {
                let step = collection.tick(now_ms);
                (Self::Stage(Box::new(step.next)), step.changed)
            }
            Self::Round(round) => {
                let step = round.apply(RoundEvent::DeadlineReached, now_ms);
                (Self::Round(Box::new(step.next)), step.changed)
            }
        }
    }

    fn restart(&self, payloads: Payloads, now_ms: i64) -> Self {
        match self {
            Self::Stage(collection) => Self::Stage(Box::new(collection.restart(&payloads, now_ms).next)),
            Self::Round(round) => {
                Self::Round(Box::new(round.apply(RoundEvent::Restarted { payloads }, now_ms).next))
            }
        }
    }

    fn cancel(&self, by: &str, now_ms: i64) -> Self {
        match self {
            Self::Stage(collection) => {
                let cause = AbandonReason::Cancelled { by: by.to_owned() };
                Self::Stage(Box::new(collection.cancel(cause, now_ms).next))
            }
            Self::Round(round) => {
                let event = RoundEvent::Cancelled { by: by.to_owned() };
                Self::Round(Box::new(round.apply(event, now_ms).next))
            }
        }
    }

    /// Milliseconds until time alone may change something.
    fn due_in_ms(&self, now_ms: i64) -> i64 {
        let deadline = self.collection().map_or(now_ms, |c| c.announcement().window.deadline_ms());
        deadline.saturating_sub(now_ms)
    }
}

/// Collections that are open now.
pub(crate) struct Collections {
    records: Arc<dyn Records>,
    blobs: Arc<BlobStore>,
    clock: Clock,
    open: Mutex<BTreeMap<CollectionId, Entry>>,
}

struct Entry {
    state: Open,
    changed: Arc<Notify>,
}

impl Collections {
    pub(crate) fn new(records: Arc<dyn Records>, blobs: Arc<BlobStore>, clock: Clock) -> Self {
        Self { records, blobs, clock, open: Mutex::new(BTreeMap::new()) }
    }

    /// Stores a new collection and takes vectors for it from now on.
    ///
    /// # Errors
    /// [`CoordinatorError::Store`] if it can't be stored.
    pub(crate) fn open(&self, id: CollectionId, state: Open) -> Result<(), CoordinatorError> {
        self.save(id, &state)?;
        locked(&self.open).insert(id, Entry { state, changed: Arc::new(Notify::new()) });
        Ok(())
    }

    /// Takes a stored collection up again after a restart, with its stored vectors.
    ///
    /// # Errors
    /// [`CoordinatorError`] if the record is missing or damaged. A missing *vector* is not an error here: the state
    /// machine abandons and says so.
    pub(crate) fn resume(&self, id: CollectionId) -> Result<(), CoordinatorError> {
        if locked(&self.open).contains_key(&id) {
            return Ok(());
        }
        let state = self.load(id)?;
        let mut payloads = Payloads::new();
        let receipts = state.collection().map(|c| c.receipts().clone()).unwrap_or_default();
        for receipt in receipts.values() {
            let Ok(bytes) = self.blobs.get(&stored(receipt.payload)) else { continue };
            if let Some(values) = decode_vector(&bytes) {
                payloads.insert(receipt.payload, values.into());
            }
        }
        self.open(id, state.restart(payloads, (self.clock)()))
    }

    /// Digest of what a collection asked for; nothing for an unknown one.
    ///
    /// # Errors
    /// [`CoordinatorError`] if the record can't be read.
    pub(crate) fn descriptor(&self, id: CollectionId) -> Result<Option<NamedDigest>, CoordinatorError> {
        let of = |state: &Open| match state {
            Open::Stage(collection) => Some(collection.announcement().descriptor),
            Open::Round(round) => round.collection().map(|c| c.announcement().descriptor),
        };
        if let Some(entry) = locked(&self.open).get(&id) {
            return Ok(of(&entry.state));
        }
        if self.records.get(&key(id))?.is_none() {
            return Ok(None);
        }
        Ok(of(&self.load(id)?))
    }

    /// Judges one vector; what is accepted is durable when this returns.
    ///
    /// # Errors
    /// [`CoordinatorError::Store`] if it can't be stored: nothing is accepted then.
    pub(crate) fn submit(
        &self,
        submission: &Submission,
        payload: &[u8],
    ) -> Result<Option<Outcome>, CoordinatorError> {
        let mut open = locked(&self.open);
        let Some(entry) = open.get_mut(&submission.collection) else {
            drop(open);
            return self.submit_late(submission);
        };
        let (next, outcome, changed) = entry.state.submit(submission, (self.clock)());
        if changed {
            if matches!(outcome, Outcome::Accepted(_)) {
                self.blobs.put(payload)?;
            }
            self.save(submission.collection, &next)?;
            entry.state = next;
            entry.changed.notify_one();
        }
        Ok(Some(outcome))
    }

    /// A vector for a collection that has ended: a retry of an accepted one gets its receipt again.
    fn submit_late(&self, submission: &Submission) -> Result<Option<Outcome>, CoordinatorError> {
        if self.records.get(&key(submission.collection))?.is_none() {
            return Ok(None);
        }
        let (_, outcome, _) = self.load(submission.collection)?.submit(submission, (self.clock)());
        Ok(Some(match outcome {
            Outcome::Accepted(_) => {
                Outcome::Refused(Refusal::WrongPhase { event: "submitting", phase: PhaseName::Abandoned })
            }
            other => other,
        }))
    }

    /// Waits until a collection takes no more vectors, and gives its state.
    ///
    /// # Errors
    /// [`CoordinatorError`] if it isn't open or can't be stored.
    pub(crate) async fn settled(&self, id: CollectionId) -> Result<Open, CoordinatorError> {
        loop {
            let (changed, due_ms) = {
                let mut open = locked(&self.open);
                let entry = open.get_mut(&id).ok_or_else(|| missing(id))?;
                let now_ms = (self.clock)();
                let (next, changed) = entry.state.tick(now_ms);
                if changed {
                    self.save(id, &next)?;
                    entry.state = next;
                }
                if entry.state.settled() {
                    return Ok(entry.state.clone());
                }
                (Arc::clone(&entry.changed), entry.state.due_in_ms(now_ms))
            };
            let due = Duration::from_millis(u64::try_from(due_ms).unwrap_or(0).clamp(1, LONGEST_WAIT_MS));
            // A change in between leaves a permit behind, so it is seen at once; there is one waiter, the pipeline.
            let _ = tokio::time::timeout(due, changed.notified()).await;
        }
    }

    /// Applies an event to an open round and stores the result.
    ///
    /// # Errors
    /// [`CoordinatorError`] if it isn't an open round or can't be stored.
    pub(crate) fn apply(&self, id: CollectionId, event: RoundEvent) -> Result<Round, CoordinatorError> {
        let mut open = locked(&self.open);
        let entry = open.get_mut(&id).ok_or_else(|| missing(id))?;
        let Open::Round(round) = &entry.state else { return Err(missing(id)) };
        let next = round.apply(event, (self.clock)()).next;
        let state = Open::Round(Box::new(next.clone()));
        self.save(id, &state)?;
        entry.state = state;
        entry.changed.notify_one();
        Ok(next)
    }

    /// Ends every open collection on an operator's word.
    ///
    /// # Errors
    /// [`CoordinatorError::Store`] if a state can't be stored.
    pub(crate) fn cancel_all(&self, by: &str) -> Result<(), CoordinatorError> {
        for (id, entry) in locked(&self.open).iter_mut() {
            let next = entry.state.cancel(by, (self.clock)());
            self.save(*id, &next)?;
            entry.state = next;
            entry.changed.notify_one();
        }
        Ok(())
    }

    /// Forgets a collection that has ended; its record stays for late retries.
    pub(crate) fn close(&self, id: CollectionId) {
        locked(&self.open).remove(&id);
    }

    fn save(&self, id: CollectionId, state: &Open) -> Result<(), CoordinatorError> {
        let bytes = serde_json::to_vec(state).map_err(CoordinatorError::stored("collection"))?;
        // States of large cohorts outgrow a record, so the record names a blob.
        let digest = self.blobs.put(&bytes)?;
        let before = self.records.get(&key(id))?;
        self.records.put(&key(id), digest.to_string().as_bytes())?;
        let before = before.and_then(|bytes| String::from_utf8(bytes).ok()?.parse::<Digest>().ok());
        if let Some(old) = before.filter(|old| *old != digest) {
            self.blobs.remove(&old)?;
        }
        Ok(())
    }

    fn load(&self, id: CollectionId) -> Result<Open, CoordinatorError> {
        let record = self.records.get(&key(id))?.ok_or_else(|| missing(id))?;
        let text = String::from_utf8(record).unwrap_or_default();
        let bytes = self.blobs.get(&text.parse::<Digest>()?)?;
        serde_json::from_slice(&bytes).map_err(CoordinatorError::stored("collection"))
    }
}

fn key(id: CollectionId) -> Vec<u8> {
    format!("collection/{id}").into_bytes()
}

fn missing(id: CollectionId) -> CoordinatorError {
    CoordinatorError::NotFound { what: "open collection", id: id.to_string() }
}

/// Longest sleep between two looks at the clock, in milliseconds: a clock that jumps is noticed.
const LONGEST_WAIT_MS: u64 = 500;

//! Open collections: release stages and rounds that wait for their agents' vectors.
//!
//! The state machines are pure; this drives them. A vector is stored before the state that counts it, the state
//! before the receipt is given, so a receipt always means durable. Vectors that arrive while others are being made
//! durable wait and share the next commit. What a restart finds is handed back to the state machine, which resumes
//! or abandons.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tabmesh_federation::id::{AgentId, CollectionId, Digest as NamedDigest};
use tabmesh_federation::phase::abandon::AbandonReason;
use tabmesh_federation::phase::collect::{Collection, CollectionState, Payloads, Submission};
use tabmesh_federation::phase::{Outcome, PhaseName, Refusal};
use tabmesh_federation::round::{Round, RoundEvent};
use tabmesh_federation::vector::Vector;
use tabmesh_privacy::private::decode_vector;
use tabmesh_proto::status::WireError;
use tabmesh_store::record::MAX_VALUE_BYTES;
use tabmesh_store::{BlobStore, Digest, Op, PackStore, Records};
use tokio::sync::{Notify, oneshot};

use crate::error::CoordinatorError;
use crate::mesh::{Clock, locked, named, stored};

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

    /// Digest of what was asked; nothing before it was announced.
    fn descriptor(&self) -> Option<NamedDigest> {
        self.collection().map(|collection| collection.announcement().descriptor)
    }

    /// Milliseconds until time alone may change something.
    fn due_in_ms(&self, now_ms: i64) -> i64 {
        let deadline = self.collection().map_or(now_ms, |c| c.announcement().window.deadline_ms());
        deadline.saturating_sub(now_ms)
    }
}

/// A vector as it arrives, from an authenticated agent.
#[derive(Debug)]
pub(crate) struct Arrival {
    /// Stage or round it is for.
    pub(crate) collection: CollectionId,
    /// Attempt it is for.
    pub(crate) attempt: u32,
    /// Who sent it.
    pub(crate) agent: AgentId,
    /// Digest of the payload.
    pub(crate) digest: NamedDigest,
    /// The noised integers.
    pub(crate) vector: Vector,
    /// The same as bytes, to be stored.
    pub(crate) payload: Vec<u8>,
    /// Removes the assignment it answers, in the commit that accepts it.
    pub(crate) settles: Op,
}

impl Arrival {
    fn submission(&self, descriptor: NamedDigest) -> Submission {
        Submission {
            collection: self.collection,
            attempt: self.attempt,
            descriptor,
            agent: self.agent.clone(),
            payload: self.digest,
            vector: self.vector.clone(),
        }
    }
}

/// Collections that are open now.
pub(crate) struct Collections {
    records: Arc<dyn Records>,
    blobs: Arc<BlobStore>,
    /// The vectors, a pack a collection.
    packs: Arc<PackStore>,
    clock: Clock,
    open: Mutex<BTreeMap<CollectionId, Arc<Entry>>>,
}

struct Entry {
    state: Mutex<Open>,
    waiting: Mutex<Vec<Waiting>>,
    changed: Notify,
}

struct Waiting {
    arrival: Arrival,
    answer: oneshot::Sender<Result<Option<Outcome>, WireError>>,
}

impl Collections {
    pub(crate) fn new(
        records: Arc<dyn Records>,
        blobs: Arc<BlobStore>,
        packs: Arc<PackStore>,
        clock: Clock,
    ) -> Self {
        Self { records, blobs, packs, clock, open: Mutex::new(BTreeMap::new()) }
    }

    /// Stores a new collection, `with` whatever belongs to it in the same commit, and takes vectors for it from now on.
    ///
    /// # Errors
    /// [`CoordinatorError::Store`] if it can't be stored.
    pub(crate) fn open(&self, id: CollectionId, state: Open, with: Vec<Op>) -> Result<(), CoordinatorError> {
        self.save(id, &state, with)?;
        let (state, waiting, changed) = (Mutex::new(state), Mutex::new(Vec::new()), Notify::new());
        locked(&self.open).insert(id, Arc::new(Entry { state, waiting, changed }));
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
        let state = self.load(id)?.ok_or_else(|| missing(id))?;
        let mut payloads = Payloads::new();
        for (digest, bytes) in self.packs.read(&id.to_string())? {
            if let Some(values) = decode_vector(&bytes) {
                payloads.insert(named(digest), values.into());
            }
        }
        self.open(id, state.restart(payloads, (self.clock)()), Vec::new())
    }

    /// Judges one vector; what is accepted is durable when this returns. Nothing for an unknown collection.
    ///
    /// # Errors
    /// [`WireError::Internal`] if it can't be stored: nothing is accepted then.
    pub(crate) async fn submit(self: &Arc<Self>, arrival: Arrival) -> Result<Option<Outcome>, WireError> {
        let collection = arrival.collection;
        let Some(entry) = self.entry(collection) else {
            return self.submit_late(&arrival).map_err(|error| failed(collection, &error));
        };
        let (answer, answered) = oneshot::channel();
        locked(&entry.waiting).push(Waiting { arrival, answer });
        let collections = Arc::clone(self);
        tokio::task::spawn_blocking(move || collections.commit_waiting(collection, &entry));
        answered.await.unwrap_or(Err(WireError::Internal))
    }

    /// Judges and stores every vector that waits, in one commit; whoever came too late for it finds nothing to do.
    fn commit_waiting(&self, id: CollectionId, entry: &Entry) {
        let mut state = locked(&entry.state);
        let batch = std::mem::take(&mut *locked(&entry.waiting));
        if batch.is_empty() {
            return;
        }
        let outcomes = self.commit(id, &mut state, &batch).map_err(|error| failed(id, &error));
        entry.changed.notify_one();
        drop(state);
        match outcomes {
            Ok(outcomes) => {
                for (waiting, outcome) in batch.into_iter().zip(outcomes) {
                    // Whoever hung up asks again and gets the same receipt.
                    let _ = waiting.answer.send(Ok(outcome));
                }
            }
            Err(error) => batch.into_iter().for_each(|waiting| drop(waiting.answer.send(Err(error)))),
        }
    }

    fn commit(
        &self,
        id: CollectionId,
        state: &mut Open,
        batch: &[Waiting],
    ) -> Result<Vec<Option<Outcome>>, CoordinatorError> {
        let mut next = state.clone();
        let (mut outcomes, mut payloads, mut ops, mut changed) = (Vec::new(), Vec::new(), Vec::new(), false);
        for Waiting { arrival, .. } in batch {
            let Some(descriptor) = next.descriptor() else {
                outcomes.push(None);
                continue;
            };
            let (after, outcome, moved) = next.submit(&arrival.submission(descriptor), (self.clock)());
            (next, changed) = (after, changed || moved);
            if matches!(outcome, Outcome::Accepted(_)) {
                payloads.push((stored(arrival.digest), arrival.payload.as_slice()));
            }
            if matches!(outcome, Outcome::Accepted(_) | Outcome::Duplicate(_)) {
                ops.push(arrival.settles.clone());
            }
            outcomes.push(Some(outcome));
        }
        if !payloads.is_empty() {
            self.packs.append(&id.to_string(), &payloads)?;
        }
        if changed {
            self.save(id, &next, ops)?;
            *state = next;
        } else if !ops.is_empty() {
            self.records.commit(&ops)?;
        }
        Ok(outcomes)
    }

    /// A vector for a collection that has ended: a retry of an accepted one gets its receipt again.
    fn submit_late(&self, arrival: &Arrival) -> Result<Option<Outcome>, CoordinatorError> {
        let Some(state) = self.load(arrival.collection)? else { return Ok(None) };
        let Some(descriptor) = state.descriptor() else { return Ok(None) };
        let (_, outcome, _) = state.submit(&arrival.submission(descriptor), (self.clock)());
        Ok(Some(match outcome {
            Outcome::Accepted(_) => {
                Outcome::Refused(Refusal::WrongPhase { event: "submitting", phase: PhaseName::Abandoned })
            }
            other => {
                if matches!(other, Outcome::Duplicate(_)) {
                    self.records.commit(std::slice::from_ref(&arrival.settles))?;
                }
                other
            }
        }))
    }

    /// Waits until a collection takes no more vectors, and gives its state.
    ///
    /// # Errors
    /// [`CoordinatorError`] if it isn't open or can't be stored.
    pub(crate) async fn settled(&self, id: CollectionId) -> Result<Open, CoordinatorError> {
        let entry = self.entry(id).ok_or_else(|| missing(id))?;
        loop {
            let due_ms = {
                let mut state = locked(&entry.state);
                let now_ms = (self.clock)();
                let (next, changed) = state.tick(now_ms);
                if changed {
                    self.save(id, &next, Vec::new())?;
                    *state = next;
                }
                if state.settled() {
                    return Ok(state.clone());
                }
                state.due_in_ms(now_ms)
            };
            let due = Duration::from_millis(u64::try_from(due_ms).unwrap_or(0).clamp(1, LONGEST_WAIT_MS));
            // A change in between leaves a permit behind, so it is seen at once; there is one waiter, the pipeline.
            let _ = tokio::time::timeout(due, entry.changed.notified()).await;
        }
    }

    /// Applies events to an open round, in their order, and stores the result.
    ///
    /// # Errors
    /// [`CoordinatorError`] if it isn't an open round or can't be stored.
    pub(crate) fn apply<const N: usize>(
        &self,
        id: CollectionId,
        events: [RoundEvent; N],
    ) -> Result<Round, CoordinatorError> {
        let entry = self.entry(id).ok_or_else(|| missing(id))?;
        let mut state = locked(&entry.state);
        let Open::Round(round) = &*state else { return Err(missing(id)) };
        let (mut next, mut changed) = (Round::clone(round), false);
        for event in events {
            let step = next.apply(event, (self.clock)());
            (next, changed) = (step.next, changed || step.changed);
        }
        if changed {
            let open = Open::Round(Box::new(next.clone()));
            self.save(id, &open, Vec::new())?;
            *state = open;
            entry.changed.notify_one();
        }
        Ok(next)
    }

    /// Ends every open collection on an operator's word.
    ///
    /// # Errors
    /// [`CoordinatorError::Store`] if a state can't be stored.
    pub(crate) fn cancel_all(&self, by: &str) -> Result<(), CoordinatorError> {
        for (id, entry) in &*locked(&self.open) {
            let mut state = locked(&entry.state);
            let next = state.cancel(by, (self.clock)());
            self.save(*id, &next, Vec::new())?;
            *state = next;
            entry.changed.notify_one();
        }
        Ok(())
    }

    /// Removes the vectors of a collection whose result is recorded.
    ///
    /// # Errors
    /// [`CoordinatorError::Store`] if they can't be removed.
    pub(crate) fn discard(&self, id: CollectionId) -> Result<(), CoordinatorError> {
        Ok(self.packs.remove(&id.to_string())?)
    }

    /// Removes the vectors of all collections but these: what a crash left of collections that had ended.
    ///
    /// # Errors
    /// [`CoordinatorError::Store`] if they can't be removed.
    pub(crate) fn discard_all_but(&self, running: &BTreeSet<CollectionId>) -> Result<(), CoordinatorError> {
        let running: BTreeSet<String> = running.iter().map(ToString::to_string).collect();
        // Names begin with the collection's id; further attempts at a sum have a number behind it.
        let kept = |name: &str| running.iter().any(|id| name.starts_with(id.as_str()));
        for name in self.packs.list()?.iter().filter(|name| !kept(name)) {
            self.packs.remove(name)?;
        }
        Ok(())
    }

    /// Forgets a collection that has ended; its record stays for late retries.
    pub(crate) fn close(&self, id: CollectionId) {
        locked(&self.open).remove(&id);
    }

    fn entry(&self, id: CollectionId) -> Option<Arc<Entry>> {
        locked(&self.open).get(&id).cloned()
    }

    /// Stores a state and whatever goes with it in one commit.
    fn save(&self, id: CollectionId, state: &Open, mut ops: Vec<Op>) -> Result<(), CoordinatorError> {
        let mut bytes = serde_json::to_vec(state).map_err(CoordinatorError::stored("collection"))?;
        let before = self.records.get(&key(id))?.and_then(|record| blob_of(&record));
        if bytes.len() > MAX_VALUE_BYTES {
            // States of large cohorts outgrow a record, so theirs names a blob.
            bytes = self.blobs.put(&bytes)?.to_string().into_bytes();
        }
        let now = blob_of(&bytes);
        ops.push(Op::put(key(id), bytes));
        self.records.commit(&ops)?;
        if let Some(old) = before.filter(|old| Some(*old) != now) {
            self.blobs.remove(&old)?;
        }
        Ok(())
    }

    fn load(&self, id: CollectionId) -> Result<Option<Open>, CoordinatorError> {
        let Some(record) = self.records.get(&key(id))? else { return Ok(None) };
        let bytes = blob_of(&record).map_or(Ok(record), |digest| self.blobs.get(&digest))?;
        serde_json::from_slice(&bytes).map(Some).map_err(CoordinatorError::stored("collection"))
    }
}

/// The blob that a record names; nothing if it is the state itself, which is a JSON object and no digest.
fn blob_of(record: &[u8]) -> Option<Digest> {
    std::str::from_utf8(record).ok()?.parse().ok()
}

fn failed(id: CollectionId, error: &CoordinatorError) -> WireError {
    tracing::error!(collection = %id, %error, "a vector can't be stored");
    error.wire()
}

fn key(id: CollectionId) -> Vec<u8> {
    format!("collection/{id}").into_bytes()
}

fn missing(id: CollectionId) -> CoordinatorError {
    CoordinatorError::NotFound { what: "open collection", id: id.to_string() }
}

/// Longest sleep between two looks at the clock, in milliseconds: a clock that jumps is noticed.
const LONGEST_WAIT_MS: u64 = 500;

//! Open secure sums: what each agent answered, made durable before it counts, and what is asked next.
//!
//! A sum has one attempt or several, one after the other; each has records, keys and vectors of its own.
//! The server's states ([`tabmesh_federation::secagg::server`]) are pure and hold nothing that a restart would lose:
//! they follow from the sum's opening, the answers taken and the steps closed, which are what is stored. After a
//! restart the answers are replayed, and the sum goes on where it was or ends with its reason. Masked vectors lie in
//! a pack until the result is recorded; then everything but opening and end is removed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tabmesh_federation::id::{AgentId, CollectionId, Digest as NamedDigest};
use tabmesh_federation::phase::abandon::AbandonReason;
use tabmesh_federation::plan::MAX_RETRIES;
use tabmesh_federation::secagg::descriptor::{SumDescriptor, SumDescriptorError};
use tabmesh_federation::secagg::document::{self, Outcome, Reply, Request};
use tabmesh_federation::secagg::message::{Complaint, Masked, Step};
use tabmesh_federation::secagg::roster::{Member, Roster, Seat};
use tabmesh_federation::secagg::server::{Accepted, Advertising, Rejection, SecureSum};
use tabmesh_privacy::mechanism::SigmaSquared;
use tabmesh_proto::message::{AssignmentKind, Id};
use tabmesh_proto::status::WireError;
use tabmesh_store::{BlobStore, Digest, Op, PackStore, Records};
use tokio::sync::Notify;

use crate::error::CoordinatorError;
use crate::mesh::{Clock, Mesh, locked, named, stored};
use crate::pipeline::spiffe_id;

use complaint::Complaints;
use phase::{Answer, Asked, Next, Phase, STEPS};

mod complaint;
mod phase;

/// What an attempt at a sum is opened with, as stored.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Opened {
    /// What the agents are told.
    pub(crate) opening: document::Opening,
    /// The roster with the keys that the catalog had.
    pub(crate) members: Vec<Member>,
}

/// How a sum ended.
#[derive(Debug, Clone)]
pub(crate) enum SumEnd {
    /// With a result.
    Summed(Summed),
    /// Without one; what was debited stays debited.
    Abandoned(AbandonReason),
}

/// How an attempt at a sum ended.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum AttemptEnd {
    /// With a result.
    Summed(Summed),
    /// By word: there is no other attempt.
    Abandoned(AbandonReason),
    /// The protocol gave it up.
    Aborted(Aborted),
}

/// An attempt that the protocol gave up; what was debited stays debited.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Aborted {
    /// Its number, from 1.
    pub(crate) attempt: u32,
    /// The step that it ended in.
    pub(crate) step: Step,
    /// Why, in seats and steps.
    pub(crate) cause: String,
    /// Who answered that step and spoilt nothing: those that another attempt can be made with.
    pub(crate) left: BTreeSet<AgentId>,
}

impl Aborted {
    /// Whether an agent may have been debited for it: from the masked vectors on.
    pub(crate) fn charged(&self) -> bool {
        self.step >= Step::Mask
    }
}

/// A masked vector as it arrives.
#[derive(Debug, Clone)]
pub(crate) struct Arrived {
    /// The attempt that it is for.
    pub(crate) attempt: u32,
    /// The words.
    pub(crate) payload: Vec<u8>,
    /// Their digest.
    pub(crate) digest: NamedDigest,
}

/// A sum's result.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Summed {
    /// The noised sum.
    pub(crate) values: Vec<i64>,
    /// Whose vectors are in it.
    pub(crate) survivors: BTreeSet<AgentId>,
    /// Variance of each one's noise.
    pub(crate) share: SigmaSquared,
    outcome: Outcome,
}

/// Why an answer isn't taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refused {
    /// There is no such sum.
    #[error("there is no such sum")]
    Unknown,
    /// It names another agent's seat, or one of an agent outside the roster.
    #[error("the answer names a seat that isn't the sender's")]
    NotYours,
    /// The step is over, or the sum is.
    #[error("step {got} is over or not due")]
    NotDue {
        /// Step of the answer.
        got: Step,
    },
    /// A vector for another attempt.
    #[error("the vector is for attempt {got}, attempt {expected} is open")]
    OtherAttempt {
        /// The attempt that is open.
        expected: u32,
        /// The vector's.
        got: u32,
    },
    /// The protocol refuses it.
    #[error(transparent)]
    Rejected(#[from] Rejection),
    /// It can't be stored; nothing was taken.
    #[error(transparent)]
    Failed(#[from] CoordinatorError),
}

impl Refused {
    /// The code the agent sees.
    pub(crate) fn wire(&self) -> WireError {
        match self {
            Self::Unknown => WireError::NotFound,
            Self::NotYours => WireError::IdentityMismatch,
            Self::NotDue { .. } => WireError::StalePlan,
            Self::OtherAttempt { .. } => WireError::WrongAttempt,
            Self::Rejected(Rejection::Late { .. }) => WireError::DeadlinePassed,
            Self::Rejected(Rejection::Conflict { .. }) => WireError::Conflict,
            Self::Rejected(Rejection::NotExpected { .. } | Rejection::WrongDescriptor { .. }) => {
                WireError::StalePlan
            }
            Self::Rejected(Rejection::BadSignature { .. }) => WireError::Signature,
            Self::Rejected(_) => WireError::Malformed,
            Self::Failed(error) => error.wire(),
        }
    }
}

/// Sums that are open now, and the records of all.
pub(crate) struct Sums {
    records: Arc<dyn Records>,
    blobs: Arc<BlobStore>,
    packs: Arc<PackStore>,
    clock: Clock,
    open: Mutex<BTreeMap<CollectionId, Arc<Entry>>>,
}

struct Entry {
    id: CollectionId,
    /// Where its records are.
    place: String,
    /// Name of the pack of its vectors.
    pack: String,
    descriptor: SumDescriptor,
    digest: NamedDigest,
    roster: Arc<Roster>,
    state: Mutex<State>,
    changed: Notify,
}

struct State {
    phase: Phase,
    asked: Asked,
    complaints: Complaints,
    cancelled: Option<String>,
}

impl State {
    /// Who is waited for: those who neither answered the current step nor said why they can't.
    fn missing(&self) -> BTreeSet<Seat> {
        self.phase.missing().into_iter().filter(|seat| !self.complaints.by(*seat)).collect()
    }
}

impl Sums {
    pub(crate) fn new(
        records: Arc<dyn Records>,
        blobs: Arc<BlobStore>,
        packs: Arc<PackStore>,
        clock: Clock,
    ) -> Self {
        Self { records, blobs, packs, clock, open: Mutex::new(BTreeMap::new()) }
    }

    /// Stores a new attempt at a sum, `with` whatever belongs to it in the same commit; what was answered to the attempt
    /// before is removed.
    ///
    /// # Errors
    /// [`CoordinatorError`] if its descriptor doesn't fit its roster or it can't be stored.
    pub(crate) fn open(
        &self,
        id: CollectionId,
        opened: &Opened,
        mut with: Vec<Op>,
    ) -> Result<(), CoordinatorError> {
        let entry = Entry::new(id, opened)?;
        let bytes = serde_json::to_vec(opened).map_err(CoordinatorError::stored("secure sum"))?;
        with.push(Op::put(key(&entry.place, OPENED), self.blobs.put(&bytes)?.to_string().into_bytes()));
        self.records.commit(&with)?;
        if let Some(before) = entry.descriptor.attempt.checked_sub(1).filter(|before| *before > 0) {
            self.forget(id, before)?;
        }
        locked(&self.open).insert(id, Arc::new(entry));
        Ok(())
    }

    /// What the latest attempt at a sum was opened with.
    ///
    /// # Errors
    /// [`CoordinatorError`] if there is none or it is damaged.
    pub(crate) fn opened(&self, id: CollectionId) -> Result<Opened, CoordinatorError> {
        let missing = || CoordinatorError::NotFound { what: "secure sum", id: id.to_string() };
        let record = self.records.get(&key(&self.latest(id)?, OPENED))?.ok_or_else(missing)?;
        let bytes = self.blobs.get(&String::from_utf8_lossy(&record).parse()?)?;
        serde_json::from_slice(&bytes).map_err(CoordinatorError::stored("secure sum"))
    }

    /// Where the records of a sum's latest attempt are; of its first, if there is none.
    fn latest(&self, id: CollectionId) -> Result<String, CoordinatorError> {
        let mut latest = place(id, 1);
        for attempt in 2..=MAX_ATTEMPTS {
            let next = place(id, attempt);
            if self.records.get(&key(&next, OPENED))?.is_none() {
                break;
            }
            latest = next;
        }
        Ok(latest)
    }

    /// Whether there is or was such a sum.
    ///
    /// # Errors
    /// [`CoordinatorError::Store`] if the record can't be read.
    pub(crate) fn knows(&self, id: CollectionId) -> Result<bool, CoordinatorError> {
        Ok(locked(&self.open).contains_key(&id) || self.records.get(&key(&place(id, 1), OPENED))?.is_some())
    }

    /// Takes an agent's answer to a step; durable when this returns, and taking it again is harmless.
    ///
    /// # Errors
    /// [`Refused`]; nothing has changed then.
    pub(crate) fn reply(
        &self,
        id: CollectionId,
        agent: &AgentId,
        reply: Reply,
        settles: Op,
    ) -> Result<(), Refused> {
        let entry = self.entry(id)?;
        if entry.roster.seat(agent) != Some(reply.seat()) {
            return Err(Refused::NotYours);
        }
        match reply {
            Reply::Complaint(complaint) => self.complain(&entry, &complaint, settles),
            reply => self.take(&entry, Answer::Reply(reply), settles),
        }
    }

    /// Takes an agent's word that it can't go on because of another.
    fn complain(&self, entry: &Entry, complaint: &Complaint, settles: Op) -> Result<(), Refused> {
        let mut state = locked(&entry.state);
        let (step, seat) = (Step::Mask, complaint.seat);
        if state.phase.step() != Some(step) {
            return Err(Refused::NotDue { got: step });
        }
        let expected = entry.digest;
        if complaint.descriptor != expected {
            return Err(Rejection::WrongDescriptor { expected, got: complaint.descriptor }.into());
        }
        let due = state.phase.missing().contains(&seat) || state.complaints.by(seat);
        if !due || complaint.about == seat || entry.roster.member(complaint.about).is_none() {
            return Err(Rejection::NotExpected { step, seat }.into());
        }
        let reply = Reply::Complaint(*complaint);
        let mut ops = vec![settles];
        if !state.complaints.by(seat) {
            tracing::warn!(collection = %entry.id, %seat, about = %complaint.about, "sealed shares don't open");
            ops.push(Op::put(complaint_key(&entry.place, seat), reply.to_bytes()));
        }
        self.records.commit(&ops).map_err(CoordinatorError::from)?;
        state.complaints.take(complaint);
        entry.changed.notify_one();
        Ok(())
    }

    /// Takes an agent's masked vector, as [`Self::reply`] does.
    ///
    /// # Errors
    /// As [`Self::reply`].
    pub(crate) fn masked(
        &self,
        id: CollectionId,
        agent: &AgentId,
        arrived: Arrived,
        settles: Op,
    ) -> Result<(), Refused> {
        let entry = self.entry(id)?;
        let Arrived { attempt: got, payload, digest } = arrived;
        let expected = entry.descriptor.attempt;
        if got != expected {
            return Err(Refused::OtherAttempt { expected, got });
        }
        let seat = entry.roster.seat(agent).ok_or(Refused::NotYours)?;
        let masked = Masked { descriptor: entry.digest, seat, payload, digest };
        self.take(&entry, Answer::Masked(masked), settles)
    }

    fn take(&self, entry: &Entry, answer: Answer, settles: Op) -> Result<(), Refused> {
        let mut state = locked(&entry.state);
        let mut next = state.phase.clone();
        let (step, seat) = (answer.step(), answer.seat());
        if next.accept(&answer, (self.clock)())? == Accepted::Again {
            self.records.commit(&[settles]).map_err(CoordinatorError::from)?;
            return Ok(());
        }
        let value = match answer {
            Answer::Reply(reply) => reply.to_bytes(),
            Answer::Masked(masked) => {
                let part = (stored(masked.digest), masked.payload.as_slice());
                self.packs.append(&entry.pack, &[part]).map_err(CoordinatorError::from)?;
                masked.digest.to_string().into_bytes()
            }
        };
        let ops = [Op::put(answer_key(&entry.place, step, seat), value), settles];
        self.records.commit(&ops).map_err(CoordinatorError::from)?;
        state.phase = next;
        entry.changed.notify_one();
        Ok(())
    }

    /// How a sum's latest attempt ended, if it has.
    ///
    /// # Errors
    /// [`CoordinatorError`] if the record is damaged.
    fn ended(&self, id: CollectionId) -> Result<Option<AttemptEnd>, CoordinatorError> {
        let Some(record) = self.records.get(&key(&self.latest(id)?, ENDED))? else { return Ok(None) };
        let bytes = self.blobs.get(&String::from_utf8_lossy(&record).parse()?)?;
        serde_json::from_slice(&bytes).map(Some).map_err(CoordinatorError::stored("end of a secure sum"))
    }

    /// The open sum; a stored one is replayed.
    fn resume(&self, id: CollectionId) -> Result<Arc<Entry>, CoordinatorError> {
        if let Some(entry) = locked(&self.open).get(&id) {
            return Ok(Arc::clone(entry));
        }
        let entry = Entry::new(id, &self.opened(id)?)?;
        self.replay(&entry)?;
        let entry = Arc::new(entry);
        locked(&self.open).insert(id, Arc::clone(&entry));
        Ok(entry)
    }

    /// Takes every stored answer again, and closes the steps that were closed.
    fn replay(&self, entry: &Entry) -> Result<(), CoordinatorError> {
        let closed = self.records.get(&key(&entry.place, CLOSED))?.unwrap_or_default();
        let closed: i64 = String::from_utf8_lossy(&closed).parse().unwrap_or(0);
        let payloads = self.packs.read(&entry.pack)?;
        let damaged = |reason: String| CoordinatorError::Stored { what: "answer of a secure sum", reason };
        let mut state = locked(&entry.state);
        for (_, value) in self.records.scan_all(complaint_prefix(&entry.place).as_bytes())? {
            match Reply::from_bytes(&value).map_err(|error| damaged(error.to_string()))? {
                Reply::Complaint(complaint) => state.complaints.take(&complaint),
                other => return Err(damaged(format!("expected a complaint, got {other:?}"))),
            }
        }
        for step in STEPS {
            if state.phase.step() != Some(step) {
                continue;
            }
            let prefix = step_prefix(&entry.place, step);
            for (at, value) in self.records.scan_all(prefix.as_bytes())? {
                let answer = if step == Step::Mask {
                    let digest: Digest = String::from_utf8_lossy(&value).parse()?;
                    let seat = seat_of(&at, &prefix);
                    let seat = seat.ok_or_else(|| damaged("a key names no seat".to_owned()))?;
                    let payload = payloads.get(&digest).cloned();
                    let payload = payload.ok_or_else(|| damaged(format!("vector {digest} is lost")))?;
                    Answer::Masked(Masked { descriptor: entry.digest, seat, payload, digest: named(digest) })
                } else {
                    Answer::Reply(Reply::from_bytes(&value).map_err(|error| damaged(error.to_string()))?)
                };
                // What was in time then is in time now.
                let taken = state.phase.accept(&answer, entry.descriptor.opened_ms);
                taken.map_err(|refused| damaged(refused.to_string()))?;
            }
            if step.number() > closed {
                break;
            }
            let phase = std::mem::replace(&mut state.phase, Phase::Over);
            match phase.close().map_err(|abort| damaged(abort.to_string()))? {
                Next::Step(phase, asked) => (state.phase, state.asked) = (*phase, asked),
                Next::Sum(_) => return Err(damaged("the last step is closed, and no end is stored".into())),
            }
        }
        Ok(())
    }

    /// Waits until the current step can be closed, and closes it: the end, if there is nothing left to ask.
    async fn advance(&self, entry: &Entry) -> Result<Option<AttemptEnd>, CoordinatorError> {
        loop {
            let due_ms = {
                let mut state = locked(&entry.state);
                if let Some(by) = &state.cancelled {
                    let cause = AbandonReason::Cancelled { by: by.clone() };
                    return self.end(entry, &mut state, AttemptEnd::Abandoned(cause)).map(Some);
                }
                let Some(step) = state.phase.step() else {
                    return Err(CoordinatorError::Step("a secure sum went on after its end".to_owned()));
                };
                let left_ms = entry.descriptor.deadline_ms(step).saturating_sub((self.clock)());
                if state.missing().is_empty() || left_ms <= 0 {
                    return self.close(entry, &mut state, step);
                }
                left_ms
            };
            let due = Duration::from_millis(u64::try_from(due_ms).unwrap_or(0).clamp(1, LONGEST_WAIT_MS));
            // A change in between leaves a permit behind, so it is seen at once; there is one waiter, the pipeline.
            let _ = tokio::time::timeout(due, entry.changed.notified()).await;
        }
    }

    fn close(
        &self,
        entry: &Entry,
        state: &mut State,
        step: Step,
    ) -> Result<Option<AttemptEnd>, CoordinatorError> {
        match state.phase.clone().close() {
            Ok(Next::Step(phase, asked)) => {
                // Which answers the step closed with is what is stored of them: later ones aren't taken.
                let closed = step.number().to_string().into_bytes();
                self.records.put(&key(&entry.place, CLOSED), &closed)?;
                (state.phase, state.asked) = (*phase, asked);
                Ok(None)
            }
            Ok(Next::Sum(sum)) => {
                let end = AttemptEnd::Summed(entry.summed(*sum));
                self.end(entry, state, end).map(Some)
            }
            Err(abort) => {
                let (attempt, mut left) = (entry.descriptor.attempt, self.answered(entry, step)?);
                let of = |seat: Seat| entry.roster.member(seat).map(|member| member.agent.clone());
                if step == Step::Mask {
                    left.extend(state.complaints.seats().filter_map(of));
                }
                let spoilers = state.complaints.left_out(entry.descriptor.noise.colluders, &abort);
                for agent in spoilers.into_iter().filter_map(of) {
                    tracing::warn!(collection = %entry.id, %agent, "another attempt leaves this agent out");
                    left.remove(&agent);
                }
                let end = AttemptEnd::Aborted(Aborted { attempt, step, cause: abort.to_string(), left });
                self.end(entry, state, end).map(Some)
            }
        }
    }

    /// Who answered a step.
    fn answered(&self, entry: &Entry, step: Step) -> Result<BTreeSet<AgentId>, CoordinatorError> {
        let prefix = step_prefix(&entry.place, step);
        let stored = self.records.scan_all(prefix.as_bytes())?;
        let agent = |(at, _): &(Vec<u8>, Vec<u8>)| {
            let seat = seat_of(at, &prefix)?;
            entry.roster.member(seat).map(|member| member.agent.clone())
        };
        Ok(stored.iter().filter_map(agent).collect())
    }

    fn end(&self, entry: &Entry, state: &mut State, end: AttemptEnd) -> Result<AttemptEnd, CoordinatorError> {
        let bytes = serde_json::to_vec(&end).map_err(CoordinatorError::stored("end of a secure sum"))?;
        let digest = self.blobs.put(&bytes)?;
        self.records.put(&key(&entry.place, ENDED), digest.to_string().as_bytes())?;
        state.phase = Phase::Over;
        state.asked.clear();
        Ok(end)
    }

    /// Ends every open sum on an operator's word.
    pub(crate) fn cancel_all(&self, by: &str) {
        for entry in locked(&self.open).values() {
            locked(&entry.state).cancelled = Some(by.to_owned());
            entry.changed.notify_one();
        }
    }

    /// Removes the answers to a sum whose result is recorded: keys, shares and masked vectors.
    ///
    /// # Errors
    /// [`CoordinatorError::Store`] if they can't be removed.
    pub(crate) fn discard(&self, id: CollectionId) -> Result<(), CoordinatorError> {
        locked(&self.open).remove(&id);
        for attempt in 1..=MAX_ATTEMPTS {
            self.forget(id, attempt)?;
        }
        Ok(())
    }

    /// Removes the answers to one attempt.
    fn forget(&self, id: CollectionId, attempt: u32) -> Result<(), CoordinatorError> {
        let place = place(id, attempt);
        let mut ops: Vec<Op> = Vec::new();
        let steps = STEPS.into_iter().map(|step| step_prefix(&place, step));
        for prefix in steps.chain([complaint_prefix(&place)]) {
            let found = self.records.scan_all(prefix.as_bytes())?;
            ops.extend(found.into_iter().map(|(key, _)| Op::delete(key)));
        }
        for chunk in ops.chunks(OPS_PER_COMMIT) {
            self.records.commit(chunk)?;
        }
        Ok(self.packs.remove(&pack(id, attempt))?)
    }

    fn entry(&self, id: CollectionId) -> Result<Arc<Entry>, Refused> {
        if let Some(entry) = locked(&self.open).get(&id) {
            return Ok(Arc::clone(entry));
        }
        // Stored, and not open: over, or not yet taken up after a restart. The pipeline asks again.
        match self.records.get(&key(&place(id, 1), OPENED)).map_err(CoordinatorError::from)? {
            Some(_) => Err(Refused::NotDue { got: Step::Advertise }),
            None => Err(Refused::Unknown),
        }
    }
}

/// Drives the latest attempt at a sum to its end: asks, waits, closes, step by step.
///
/// # Errors
/// [`CoordinatorError`] if it isn't there, is damaged, or can't be stored. An attempt without a result is no error.
pub(crate) async fn run(mesh: &Mesh, id: CollectionId) -> Result<AttemptEnd, CoordinatorError> {
    let assignment: Id = id.to_string().parse()?;
    let end = match mesh.sums.ended(id)? {
        Some(end) => end,
        None => {
            let entry = mesh.sums.resume(id)?;
            loop {
                entry.ask(mesh, &assignment)?;
                if let Some(end) = mesh.sums.advance(&entry).await? {
                    let everybody: Vec<Seat> = entry.roster.seats().collect();
                    mesh.outbox.withdraw(&entry.peers(everybody)?, &assignment)?;
                    break end;
                }
            }
        }
    };
    if let AttemptEnd::Summed(summed) = &end {
        let peers = summed.survivors.iter().map(spiffe_id).collect::<Result<Vec<_>, _>>()?;
        let told = Request::Ended(summed.outcome.clone()).to_bytes();
        mesh.outbox.assign(&peers, &assignment, AssignmentKind::SecureSum, &told)?;
    }
    Ok(end)
}

impl Entry {
    fn new(id: CollectionId, opened: &Opened) -> Result<Self, CoordinatorError> {
        let roster =
            Roster::new(opened.members.clone()).map_err(|error| CoordinatorError::Sum(error.to_string()))?;
        let roster = Arc::new(roster);
        let bytes = opened.opening.descriptor.as_bytes();
        let descriptor = SumDescriptor::from_bytes(bytes)?;
        let advertising = Advertising::open(bytes, Arc::clone(&roster))
            .map_err(|error| CoordinatorError::Sum(error.to_string()))?;
        let request = Request::Advertise(opened.opening.clone()).to_bytes();
        let asked = vec![(roster.seats().collect(), request)];
        let state = State {
            phase: Phase::Advertise(advertising),
            asked,
            complaints: Complaints::default(),
            cancelled: None,
        };
        let (digest, state) = (NamedDigest::of(bytes), Mutex::new(state));
        let (place, pack) = (place(id, descriptor.attempt), pack(id, descriptor.attempt));
        Ok(Self { id, place, pack, descriptor, digest, roster, state, changed: Notify::new() })
    }

    /// Asks everybody who hasn't answered the current step, and nobody else any more.
    fn ask(&self, mesh: &Mesh, assignment: &Id) -> Result<(), CoordinatorError> {
        let (missing, asked) = {
            let state = locked(&self.state);
            (state.missing(), state.asked.clone())
        };
        let others = self.roster.seats().filter(|seat| !missing.contains(seat));
        mesh.outbox.withdraw(&self.peers(others)?, assignment)?;
        for (seats, document) in asked {
            let peers = self.peers(seats.intersection(&missing).copied())?;
            mesh.outbox.assign(&peers, assignment, AssignmentKind::SecureSum, &document)?;
        }
        Ok(())
    }

    fn peers(
        &self,
        seats: impl IntoIterator<Item = Seat>,
    ) -> Result<Vec<tabmesh_proto::identity::SpiffeId>, CoordinatorError> {
        let member = |seat: Seat| self.roster.member(seat).map(|member| spiffe_id(&member.agent));
        seats.into_iter().filter_map(member).collect()
    }

    fn summed(&self, sum: SecureSum) -> Summed {
        if !sum.wrong_shares.is_empty() {
            tracing::warn!(collection = %self.id, seats = ?sum.wrong_shares, "agents opened wrong shares");
        }
        let agent = |seat: &Seat| self.roster.member(*seat).map(|member| member.agent.clone());
        let outcome = Outcome {
            collection: self.id,
            plan: self.descriptor.plan,
            descriptor: self.digest,
            sum: sum.digest,
            survivors: sum.survivors.clone(),
            rho: sum.guarantee.rho,
        };
        Summed {
            survivors: sum.survivors.iter().filter_map(agent).collect(),
            values: sum.values,
            share: self.descriptor.noise.share,
            outcome,
        }
    }
}

impl From<SumDescriptorError> for CoordinatorError {
    fn from(error: SumDescriptorError) -> Self {
        Self::Sum(error.to_string())
    }
}

/// Where the records of an attempt are.
fn place(id: CollectionId, attempt: u32) -> String {
    match attempt {
        1 => format!("sum/{id}"),
        again => format!("sum/{id}/attempt-{again}"),
    }
}

/// Name of the pack of an attempt's vectors; begins with the sum's id.
fn pack(id: CollectionId, attempt: u32) -> String {
    match attempt {
        1 => id.to_string(),
        again => format!("{id}-{again}"),
    }
}

fn key(place: &str, what: &str) -> Vec<u8> {
    format!("{place}/{what}").into_bytes()
}

fn step_prefix(place: &str, step: Step) -> String {
    format!("{place}/answer/{}/", step.number())
}

fn answer_key(place: &str, step: Step, seat: Seat) -> Vec<u8> {
    // Padded, so that the order of keys is the order of seats.
    format!("{}{:05}", step_prefix(place, step), seat.index()).into_bytes()
}

fn complaint_prefix(place: &str) -> String {
    format!("{place}/answer/complaint/")
}

fn complaint_key(place: &str, seat: Seat) -> Vec<u8> {
    format!("{}{:05}", complaint_prefix(place), seat.index()).into_bytes()
}

/// The seat that an answer's key ends with.
fn seat_of(key: &[u8], prefix: &str) -> Option<Seat> {
    let index = String::from_utf8_lossy(key.get(prefix.len()..)?).parse();
    index.ok().map(Seat::new)
}

const OPENED: &str = "opened";
const CLOSED: &str = "closed";
const ENDED: &str = "ended";
/// Attempts at one sum at most.
const MAX_ATTEMPTS: u32 = MAX_RETRIES + 1;
/// Longest sleep between two looks at the clock, in milliseconds: a clock that jumps is noticed.
const LONGEST_WAIT_MS: u64 = 500;
/// Records written in one commit.
const OPS_PER_COMMIT: usize = 64;

#[cfg(test)]
mod tests;

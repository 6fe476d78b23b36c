//! The durable mailbox: assignments stay until their agent has answered, over reconnects and restarts.
//!
//! An assignment's document is a blob; the record names it. Sessions are told at once when one arrives; an agent
//! that connects later gets everything it still owes, oldest first (ids are UUIDv7, so key order is time order).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use tabmesh_proto::identity::SpiffeId;
use tabmesh_proto::message::{Assignment, AssignmentKind, CoordinatorFrame, GoodbyeReason, Id};
use tabmesh_store::{BlobStore, Digest, Op, Records};
use tokio::sync::mpsc;

use crate::error::CoordinatorError;
use crate::mesh::locked;

/// Signs an assignment; given by the coordinator, which holds the key.
pub(crate) type Sign =
    Arc<dyn Fn(Id, AssignmentKind, Vec<u8>) -> Result<Assignment, CoordinatorError> + Send + Sync>;

/// Assignments by agent, and the sessions that wait for them.
pub(crate) struct Outbox {
    records: Arc<dyn Records>,
    blobs: Arc<BlobStore>,
    sign: Sign,
    sessions: Mutex<BTreeMap<SpiffeId, Session>>,
}

struct Session {
    frames: mpsc::Sender<CoordinatorFrame>,
    number: u64,
    product_version: String,
    last_seen_ms: i64,
}

/// A session's place in the outbox.
pub(crate) struct Opened {
    /// Frames to send.
    pub(crate) frames: mpsc::Receiver<CoordinatorFrame>,
    /// Number of the session, to close this one and not its successor.
    pub(crate) number: u64,
}

/// What is known of an agent's session.
#[derive(Debug, Clone, Default)]
pub(crate) struct SessionFacts {
    pub(crate) connected: bool,
    pub(crate) product_version: String,
    pub(crate) last_seen_ms: i64,
}

#[derive(Serialize, Deserialize)]
struct Owed {
    kind: Kind,
    document: Digest,
}

/// [`AssignmentKind`] as stored.
#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    ReleaseQuery,
    Round,
    Publish,
    ClosePlan,
    Plan,
    SecureSum,
    Witness,
}

impl Outbox {
    pub(crate) fn new(records: Arc<dyn Records>, blobs: Arc<BlobStore>, sign: Sign) -> Self {
        Self { records, blobs, sign, sessions: Mutex::new(BTreeMap::new()) }
    }

    /// Stores one assignment for each agent, then tells those that are connected.
    ///
    /// # Errors
    /// [`CoordinatorError`] if it can't be stored; nobody is told then.
    pub(crate) fn assign(
        &self,
        agents: &[SpiffeId],
        id: &Id,
        kind: AssignmentKind,
        document: &[u8],
    ) -> Result<(), CoordinatorError> {
        let owed = Owed { kind: kind.into(), document: self.blobs.put(document)? };
        let value = serde_json::to_vec(&owed).map_err(CoordinatorError::stored("assignment"))?;
        let ops: Vec<Op> = agents.iter().map(|agent| Op::put(key(agent, id), value.clone())).collect();
        for chunk in ops.chunks(OPS_PER_COMMIT) {
            self.records.commit(chunk)?;
        }
        let assignment = (self.sign)(id.clone(), kind, document.to_vec())?;
        let sessions = locked(&self.sessions);
        for session in agents.iter().filter_map(|agent| sessions.get(agent)) {
            // A full or closed channel is no loss: the record is durable and goes out with the next session.
            let _ = session.frames.try_send(CoordinatorFrame::Assignment(assignment.clone()));
        }
        Ok(())
    }

    /// Marks an assignment as answered; answering twice is harmless.
    ///
    /// # Errors
    /// [`CoordinatorError::Store`] if the record can't be removed.
    pub(crate) fn answered(&self, agent: &SpiffeId, id: &Id) -> Result<(), CoordinatorError> {
        Ok(self.records.delete(&key(agent, id))?)
    }

    /// Withdraws an assignment from every agent.
    ///
    /// # Errors
    /// [`CoordinatorError::Store`] if a record can't be removed.
    pub(crate) fn withdraw(&self, agents: &[SpiffeId], id: &Id) -> Result<(), CoordinatorError> {
        let mut ops = Vec::new();
        for agent in agents {
            if self.owes(agent, id)? {
                ops.push(Self::settles(agent, id));
            }
        }
        for chunk in ops.chunks(OPS_PER_COMMIT) {
            self.records.commit(chunk)?;
        }
        Ok(())
    }

    /// What marks an assignment as answered, for a commit that does more.
    pub(crate) fn settles(agent: &SpiffeId, id: &Id) -> Op {
        Op::delete(key(agent, id))
    }

    /// Whether an agent still owes an answer.
    ///
    /// # Errors
    /// [`CoordinatorError::Store`] if the record can't be read.
    pub(crate) fn owes(&self, agent: &SpiffeId, id: &Id) -> Result<bool, CoordinatorError> {
        Ok(self.records.get(&key(agent, id))?.is_some())
    }

    /// Opens a session: an older one of the same agent is superseded, and what the agent owes is queued.
    ///
    /// # Errors
    /// [`CoordinatorError`] if what is owed can't be read.
    pub(crate) fn open(
        &self,
        agent: &SpiffeId,
        product_version: String,
        now_ms: i64,
    ) -> Result<Opened, CoordinatorError> {
        let (frames, receiver) = mpsc::channel(FRAMES_IN_FLIGHT);
        let number = {
            let mut sessions = locked(&self.sessions);
            let before = sessions.get(agent).map_or(0, |session| session.number);
            let session =
                Session { frames: frames.clone(), number: before + 1, product_version, last_seen_ms: now_ms };
            if let Some(old) = sessions.insert(agent.clone(), session) {
                let _ = old.frames.try_send(CoordinatorFrame::Goodbye(GoodbyeReason::Superseded));
            }
            before + 1
        };
        for assignment in self.owed(agent)? {
            if frames.try_send(CoordinatorFrame::Assignment(assignment)).is_err() {
                break;
            }
        }
        Ok(Opened { frames: receiver, number })
    }

    /// Notes that an agent was heard.
    pub(crate) fn seen(&self, agent: &SpiffeId, now_ms: i64) {
        if let Some(session) = locked(&self.sessions).get_mut(agent) {
            session.last_seen_ms = now_ms;
        }
    }

    /// What is known of an agent's session.
    pub(crate) fn facts(&self, agent: &SpiffeId) -> SessionFacts {
        locked(&self.sessions).get(agent).map_or_else(SessionFacts::default, |session| SessionFacts {
            connected: !session.frames.is_closed(),
            product_version: session.product_version.clone(),
            last_seen_ms: session.last_seen_ms,
        })
    }

    /// Says goodbye to every session.
    pub(crate) fn close_all(&self, reason: GoodbyeReason) {
        for session in locked(&self.sessions).values() {
            let _ = session.frames.try_send(CoordinatorFrame::Goodbye(reason));
        }
        locked(&self.sessions).clear();
    }

    fn owed(&self, agent: &SpiffeId) -> Result<Vec<Assignment>, CoordinatorError> {
        let prefix = prefix(agent);
        let mut found = Vec::new();
        for record in self.records.scan(prefix.as_bytes(), None, FRAMES_IN_FLIGHT)? {
            let id = std::str::from_utf8(record.0.get(prefix.len()..).unwrap_or_default());
            let Some(id) = id.ok().and_then(|text| text.parse::<Id>().ok()) else { continue };
            let owed: Owed =
                serde_json::from_slice(&record.1).map_err(CoordinatorError::stored("assignment"))?;
            found.push((self.sign)(id, owed.kind.into(), self.blobs.get(&owed.document)?)?);
        }
        Ok(found)
    }
}

fn prefix(agent: &SpiffeId) -> String {
    format!("outbox/{agent}#")
}

fn key(agent: &SpiffeId, id: &Id) -> Vec<u8> {
    format!("{}{id}", prefix(agent)).into_bytes()
}

impl From<AssignmentKind> for Kind {
    fn from(kind: AssignmentKind) -> Self {
        match kind {
            AssignmentKind::ReleaseQuery => Self::ReleaseQuery,
            AssignmentKind::Round => Self::Round,
            AssignmentKind::Publish => Self::Publish,
            AssignmentKind::ClosePlan => Self::ClosePlan,
            AssignmentKind::Plan => Self::Plan,
            AssignmentKind::SecureSum => Self::SecureSum,
            AssignmentKind::Witness => Self::Witness,
        }
    }
}

impl From<Kind> for AssignmentKind {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::ReleaseQuery => Self::ReleaseQuery,
            Kind::Round => Self::Round,
            Kind::Publish => Self::Publish,
            Kind::ClosePlan => Self::ClosePlan,
            Kind::Plan => Self::Plan,
            Kind::SecureSum => Self::SecureSum,
            Kind::Witness => Self::Witness,
        }
    }
}

/// Frames that may wait for one agent.
const FRAMES_IN_FLIGHT: usize = 64;
/// Records written in one commit.
const OPS_PER_COMMIT: usize = 64;

//! An agent's state as bytes, and back after a restart.
//!
//! `magic (4) ‖ version (1) ‖ SHA-256 of the payload (32) ‖ payload`, the payload JSON. Holds the secrets of the sum.

use std::sync::Arc;

use tabmesh_privacy::signature::SigningKey;
use thiserror::Error;

use super::{Agent, Answer, Guard, State};
use crate::id::Digest;
use crate::secagg::message::Step;
use crate::secagg::roster::Roster;

/// Why a snapshot can't be taken up again.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SnapshotError {
    /// Not a snapshot, cut off, or changed.
    #[error("not a snapshot of an agent in a secure sum: {reason}")]
    Damaged {
        /// What is wrong.
        reason: String,
    },
    /// Written by a newer build.
    #[error("snapshot version: expected at most {SNAPSHOT_VERSION}, got {got}")]
    UnknownVersion {
        /// Version found.
        got: u8,
    },
    /// Older than the guard: the agent has answered since, and answering again could undo the sum's secrecy.
    #[error("snapshot is rolled back: it has {snapshot:?}, the guard has {guard:?}")]
    RolledBack {
        /// Guard in the snapshot.
        snapshot: Guard,
        /// Guard the caller kept.
        guard: Guard,
    },
    /// The guard lags more than the one answer that a crash explains.
    #[error("guard is behind: the snapshot has {snapshot:?}, the guard has {guard:?}")]
    GuardBehind {
        /// Guard in the snapshot.
        snapshot: Guard,
        /// Guard the caller kept.
        guard: Guard,
    },
    /// The roster or identity given isn't the one of the snapshot.
    #[error("snapshot belongs to another roster or identity")]
    OtherIdentity,
}

impl Agent {
    /// Takes up a stored state, against the guard that was stored beside it.
    ///
    /// A crash between the writes of snapshot and guard leaves the guard one answer behind; that answer hasn't
    /// been sent. In both cases the last request gives the same answer again, as a [`super::Prepared`] whose guard
    /// is to be stored.
    ///
    /// # Errors
    /// [`SnapshotError`] naming what is wrong.
    pub fn restore(
        snapshot: &[u8],
        guard: Guard,
        roster: Arc<Roster>,
        identity: Arc<SigningKey>,
    ) -> Result<Self, SnapshotError> {
        let state = State::open(snapshot)?;
        let own = state.guard;
        if own.answers < guard.answers || own.last_debit < guard.last_debit {
            return Err(SnapshotError::RolledBack { snapshot: own, guard });
        }
        if own.answers > guard.answers + 1 {
            return Err(SnapshotError::GuardBehind { snapshot: own, guard });
        }
        let member = roster.member(state.seat).is_some_and(|m| m.key == identity.verifying_key());
        if !member || roster.digest() != state.descriptor.roster {
            return Err(SnapshotError::OtherIdentity);
        }
        Ok(Self { identity, roster, state })
    }

    /// The step of the latest answer.
    #[must_use]
    pub fn answered_step(&self) -> Step {
        Answer::step(&self.state.last.answer)
    }
}

impl State {
    pub(super) fn seal(&self) -> Vec<u8> {
        // Unwrap safety: structs, numbers, strings and maps with number keys always serialise.
        let payload = serde_json::to_vec(self).expect("a state has a JSON form");
        [MAGIC.as_slice(), &[SNAPSHOT_VERSION], Digest::of(&payload).as_bytes(), &payload].concat()
    }

    fn open(bytes: &[u8]) -> Result<Self, SnapshotError> {
        let damaged = |reason: &str| SnapshotError::Damaged { reason: reason.to_owned() };
        let rest = bytes.strip_prefix(MAGIC).ok_or_else(|| damaged("other magic bytes"))?;
        let (version, rest) = rest.split_first().ok_or_else(|| damaged("cut off"))?;
        if *version != SNAPSHOT_VERSION {
            return Err(SnapshotError::UnknownVersion { got: *version });
        }
        let (digest, payload) = rest.split_first_chunk::<32>().ok_or_else(|| damaged("cut off"))?;
        if Digest::of(payload).as_bytes() != digest {
            return Err(damaged("the payload doesn't hash to its digest"));
        }
        serde_json::from_slice(payload).map_err(|error| SnapshotError::Damaged { reason: error.to_string() })
    }
}

/// Newest version of the snapshot format.
pub const SNAPSHOT_VERSION: u8 = 1;
const MAGIC: &[u8; 4] = b"TMSA";

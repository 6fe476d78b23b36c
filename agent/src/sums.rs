//! Where an agent keeps its part in a secure sum: state and counter, each stored before the answer they belong to.
//!
//! One sum at a time. `opening.json` says what it is about, `state` is the protocol's snapshot with its secrets, and the
//! guard, a counter that only goes up, stands where a restored folder doesn't bring an old one back. The masked vector
//! is the one answer that costs something: its snapshot waits as `next` until its debit is in the ledger. After a crash
//! `next` is taken over if the ledger has the debit, and deleted if not: then nothing was sent, and the step is
//! answered anew with fresh noise.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tabmesh_federation::id::Digest;
use tabmesh_federation::secagg::agent::{Agent, Guard, Prepared, Refusal, SnapshotError};
use tabmesh_federation::secagg::descriptor::SumDescriptorError;
use tabmesh_federation::secagg::document::{NotADocument, Opening};
use tabmesh_federation::secagg::message::Masked;
use tabmesh_federation::secagg::policy::PolicyRefusal;
use tabmesh_federation::secagg::roster::Roster;
use tabmesh_privacy::mechanism::MechanismError;
use tabmesh_privacy::signature::SigningKey;
use thiserror::Error;

use crate::books::BooksError;
use crate::files;
use crate::peers::PeersError;

/// Why a step of a secure sum isn't answered. Stays in the domain.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SumError {
    /// The protocol refuses.
    #[error("secure sum: {0}")]
    Refused(#[from] Refusal),
    /// The stored state can't be taken up.
    #[error("secure sum: {0}")]
    Snapshot(#[from] SnapshotError),
    /// The document isn't one.
    #[error(transparent)]
    Document(#[from] NotADocument),
    /// The descriptor can't be.
    #[error("secure sum: {0}")]
    Descriptor(#[from] SumDescriptorError),
    /// The descriptor isn't the one that follows from plan, roster and what is summed.
    #[error("secure sum: the descriptor is not the one that follows from the plan")]
    OtherDescriptor,
    /// The shares of noise can't be.
    #[error(transparent)]
    Shares(#[from] MechanismError),
    /// Peers are unknown.
    #[error(transparent)]
    Peers(#[from] PeersError),
    /// The plan has no secure sums, or the domain no file of peers.
    #[error("the plan has no secure sums, or this agent's configuration no `peers`")]
    NotPlanned,
    /// What is summed isn't what the assignment is about.
    #[error("the sum is about {got}, its assignment about {expected}")]
    OtherCollection {
        /// The assignment.
        expected: String,
        /// What the document says.
        got: String,
    },
    /// The sum opened too far ahead of this agent's clock.
    #[error("the sum opens at {opened_ms} ms, this agent's clock says {now_ms} ms")]
    Ahead {
        /// When it opened, UTC milliseconds.
        opened_ms: i64,
        /// Now, UTC milliseconds.
        now_ms: i64,
    },
    /// The sum was answered before, and is past this step or its state is gone: a second answer could undo the first
    /// one's secrecy.
    #[error("the sum was answered before; there is no second answer")]
    AnsweredBefore,
    /// Asked for a step of a sum this agent isn't in.
    #[error("this agent is in no such sum")]
    NotIn,
    /// The attempt was answered before, or an attempt after it.
    #[error("{debited} attempts at this sum were debited: attempt {got} is none of those to come")]
    OldAttempt {
        /// Debits for this stage or round.
        debited: usize,
        /// The attempt asked for.
        got: u32,
    },
    /// Ledger or noise.
    #[error(transparent)]
    Books(#[from] BooksError),
    /// A file can't be read or written.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The guard, or what the sum is about, can't be read: without them no answer is safe.
    #[error("{path} is damaged: {reason}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

impl From<PolicyRefusal> for SumError {
    fn from(refusal: PolicyRefusal) -> Self {
        Self::Refused(refusal.into())
    }
}

/// The files of the one sum.
#[derive(Debug)]
pub struct SumStore {
    folder: PathBuf,
    guard: PathBuf,
}

/// A sum this agent is in.
pub struct Current {
    /// Its state.
    pub agent: Agent,
    /// What it is about.
    pub opening: Opening,
}

impl SumStore {
    /// The files under `folder`, and the guard where it is.
    #[must_use]
    pub fn new(folder: PathBuf, guard: PathBuf) -> Self {
        Self { folder, guard }
    }

    /// The guard as stored; the first one before any answer.
    ///
    /// # Errors
    /// [`SumError::Damaged`] or [`SumError::File`].
    pub fn guard(&self) -> Result<Guard, SumError> {
        let Some(bytes) = read(&self.guard)? else { return Ok(Guard::default()) };
        serde_json::from_slice(&bytes)
            .map_err(|error| SumError::Damaged { path: self.guard.clone(), reason: error.to_string() })
    }

    /// What the current sum is about, if there is one.
    ///
    /// # Errors
    /// [`SumError::Damaged`] or [`SumError::File`].
    pub fn opening(&self) -> Result<Option<Opening>, SumError> {
        let Some(bytes) = read(&self.opening_path())? else { return Ok(None) };
        let damaged = |error: serde_json::Error| SumError::Damaged {
            path: self.opening_path(),
            reason: error.to_string(),
        };
        serde_json::from_slice(&bytes).map(Some).map_err(damaged)
    }

    /// Takes the current sum up, if there is one; `debited` says whether a descriptor's digest has a debit.
    ///
    /// # Errors
    /// [`SumError::Snapshot`] for a state that is damaged or rolled back.
    pub fn current(
        &self,
        roster: impl FnOnce(&Opening) -> Result<Roster, SumError>,
        identity: &Arc<SigningKey>,
        debited: impl Fn(&Digest) -> bool,
    ) -> Result<Option<Current>, SumError> {
        let Some(opening) = self.opening()? else { return Ok(None) };
        let roster = Arc::new(roster(&opening)?);
        let digest = Digest::of(opening.descriptor.as_bytes());
        let guard = self.guard()?;
        let restore = |bytes: &[u8], guard: Guard| {
            Agent::restore(bytes, guard, Arc::clone(&roster), Arc::clone(identity))
        };
        if let Some(next) = read(&self.next_path())? {
            if debited(&digest) {
                let agent = restore(&next, guard)?;
                self.take_next()?;
                self.put_guard(agent.guard())?;
            } else {
                self.remove(&self.next_path())?;
            }
        }
        let Some(state) = read(&self.state_path())? else { return Ok(None) };
        // The state of an earlier sum: this one was opened, and a crash kept it from being entered.
        match restore(&state, self.guard()?) {
            Ok(agent) if agent.digest() == digest => Ok(Some(Current { agent, opening })),
            Ok(_) | Err(SnapshotError::OtherIdentity) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Begins a sum: what it is about is stored, an unsent vector of an earlier one is dropped.
    ///
    /// # Errors
    /// [`SumError::File`].
    pub fn begin(&self, opening: &Opening) -> Result<(), SumError> {
        std::fs::create_dir_all(&self.folder).map_err(|source| self.failed(&self.folder, source))?;
        self.remove(&self.next_path())?;
        // Unwrap safety: strings and lists of strings always serialise.
        let bytes = serde_json::to_vec(opening).expect("an opening has a JSON form");
        let path = self.opening_path();
        files::replace(&path, &bytes).map_err(|source| self.failed(&path, source))
    }

    /// Stores an answer's state, then its guard, and gives the answer.
    ///
    /// # Errors
    /// [`SumError`]; nothing may be sent then.
    pub fn keep<M>(&self, prepared: Prepared<M>) -> Result<M, SumError> {
        let path = self.state_path();
        files::write_secret(&path, prepared.snapshot()).map_err(|source| self.failed(&path, source))?;
        self.release(prepared)
    }

    /// Stores the state that goes with a masked vector whose debit isn't in the ledger yet.
    ///
    /// # Errors
    /// [`SumError::File`].
    pub fn prepare(&self, prepared: &Prepared<Masked>) -> Result<(), SumError> {
        let path = self.next_path();
        files::write_secret(&path, prepared.snapshot()).map_err(|source| self.failed(&path, source))
    }

    /// Takes the prepared state over, now that its debit is in the ledger.
    ///
    /// # Errors
    /// [`SumError`]; nothing may be sent then.
    pub fn debited(&self, prepared: Prepared<Masked>) -> Result<Masked, SumError> {
        self.take_next()?;
        self.release(prepared)
    }

    fn release<M>(&self, prepared: Prepared<M>) -> Result<M, SumError> {
        self.put_guard(prepared.guard())?;
        Ok(prepared.release(self.guard()?)?)
    }

    fn put_guard(&self, guard: Guard) -> Result<(), SumError> {
        if let Some(folder) = self.guard.parent() {
            std::fs::create_dir_all(folder).map_err(|source| self.failed(folder, source))?;
        }
        // Unwrap safety: two numbers always serialise.
        let bytes = serde_json::to_vec(&guard).expect("a guard has a JSON form");
        files::replace(&self.guard, &bytes).map_err(|source| self.failed(&self.guard, source))
    }

    fn take_next(&self) -> Result<(), SumError> {
        let (from, to) = (self.next_path(), self.state_path());
        std::fs::rename(&from, &to).map_err(|source| self.failed(&from, source))?;
        let folder = std::fs::File::open(&self.folder).and_then(|folder| folder.sync_all());
        folder.map_err(|source| self.failed(&self.folder, source))
    }

    fn remove(&self, path: &Path) -> Result<(), SumError> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(self.failed(path, error)),
            _ => Ok(()),
        }
    }

    fn failed(&self, path: &Path, source: std::io::Error) -> SumError {
        SumError::File { path: path.to_owned(), source }
    }

    fn opening_path(&self) -> PathBuf {
        self.folder.join("opening.json")
    }

    fn state_path(&self) -> PathBuf {
        self.folder.join("state")
    }

    fn next_path(&self) -> PathBuf {
        self.folder.join("next")
    }
}

fn read(path: &Path) -> Result<Option<Vec<u8>>, SumError> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(source) => Err(SumError::File { path: path.to_owned(), source }),
    }
}

#[cfg(test)]
mod tests;

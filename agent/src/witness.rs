//! Witnessing: checks the coordinator's audit log against what this agent saw of it before, and cosigns it.
//!
//! What was confirmed last lies in one small file, written before the signature leaves. A log that is shorter than that,
//! or isn't its continuation, is never confirmed again: the two signed notes that contradict each other are kept as
//! evidence. An agent that lost the file has no memory and confirms what it is shown next, as a new one does.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ring::signature::Ed25519KeyPair;
use serde::{Deserialize, Serialize};
use tabmesh_federation::id::Digest as NamedDigest;
use tabmesh_federation::witness::{LedgerHead, ProvenLeaf, WitnessReply, WitnessRequest};
use tabmesh_privacy::ledger::ChainedEntry;
use tabmesh_privacy::signature::VerifyingKey;
use tabmesh_store::checkpoint::{Checkpoint, CheckpointError, KeyKind, Note, Signer, VerifierKey};
use tabmesh_store::merkle::{ProofError, leaf_hash, verify_consistency, verify_inclusion};
use tabmesh_store::{Digest, audit_origin};
use thiserror::Error;

use crate::files;

/// Why a checkpoint isn't confirmed.
#[derive(Debug, Error)]
pub enum WitnessError {
    /// The note isn't one of the pinned coordinator's.
    #[error("checkpoint of the audit log: {0}")]
    Note(#[from] CheckpointError),
    /// The log got shorter: it was rolled back.
    #[error(
        "the coordinator's audit log was rolled back: {held} entries were confirmed, it shows {got}; evidence: {evidence}"
    )]
    RolledBack {
        /// Entries confirmed last.
        held: u64,
        /// Entries shown now.
        got: u64,
        /// Where both notes are kept.
        evidence: PathBuf,
    },
    /// The log isn't the continuation of what was confirmed.
    #[error(
        "the coordinator's audit log was rewritten: its {got} entries don't continue the {held} that were confirmed ({proof}); evidence: {evidence}"
    )]
    Forked {
        /// Entries confirmed last.
        held: u64,
        /// Entries shown now.
        got: u64,
        /// What is wrong with the proof.
        proof: ProofError,
        /// Where both notes are kept.
        evidence: PathBuf,
    },
    /// The agent's own head isn't in the log.
    #[error("this agent's ledger isn't in the coordinator's audit log: {reason}")]
    NotIncluded {
        /// What is wrong.
        reason: String,
    },
    /// The file of what was confirmed can't be read or written.
    #[error("{path}: {reason}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system or the parser said.
        reason: String,
    },
}

/// What was confirmed last.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Seen {
    note: String,
}

/// The agent's side of the audit log.
pub struct Witness {
    folder: PathBuf,
    owner: VerifierKey,
    signer: Signer,
}

impl Witness {
    /// A witness that keeps its memory in `folder`, for the log of the coordinator with this SPIFFE id and key; `identity`
    /// and `key` are the agent's.
    ///
    /// # Errors
    /// [`WitnessError::Note`] if an identity can't name a key.
    pub fn new(
        folder: &Path,
        (coordinator, coordinator_key): (&str, &VerifyingKey),
        (identity, key): (&str, &Arc<Ed25519KeyPair>),
    ) -> Result<Self, WitnessError> {
        let owner =
            VerifierKey::new(&audit_origin(coordinator), KeyKind::Ed25519, *coordinator_key.as_bytes())?;
        let signer = Signer::from_pair(identity, KeyKind::CosignatureV1, Arc::clone(key))?;
        Ok(Self { folder: folder.to_owned(), owner, signer })
    }

    /// Checks a checkpoint; confirms it, or says from where a proof is needed. `ledger` is the agent's own.
    ///
    /// # Errors
    /// [`WitnessError`]; nothing is signed then, and what was confirmed before stays.
    pub fn judge(
        &self,
        request: &WitnessRequest,
        product: &str,
        ledger: &[ChainedEntry],
        now_s: u64,
    ) -> Result<WitnessReply, WitnessError> {
        let (checkpoint, mut note) = self.open(&request.note)?;
        if let Some((seen, held_note)) = self.seen()? {
            let evidence = || self.keep_evidence(&held_note, &request.note);
            let (held, got) = (seen.size, checkpoint.size);
            if got < held {
                return Err(WitnessError::RolledBack { held, got, evidence: evidence()? });
            }
            // A repeated request needs no proof, only the same root.
            if got > held && request.old_size != held {
                return Ok(WitnessReply::Held { size: held, root: named(seen.root) });
            }
            let proof: Vec<Digest> = request.consistency.iter().map(stored).collect();
            let proof = if got == held { &[][..] } else { &proof };
            if let Err(proof) = verify_consistency(held, &seen.root, got, &checkpoint.root, proof) {
                return Err(WitnessError::Forked { held, got, proof, evidence: evidence()? });
            }
        }
        self.included(&request.own, &checkpoint, product, ledger)?;
        let path = self.memory();
        let seen = serde_json::to_vec(&Seen { note: request.note.clone() });
        seen.map_err(|error| error.to_string())
            .and_then(|bytes| files::replace(&path, &bytes).map_err(|error| error.to_string()))
            .map_err(|reason| WitnessError::File { path, reason })?;
        note.cosign(&self.signer, now_s)?;
        Ok(WitnessReply::Cosigned { note: note.to_string() })
    }

    fn open(&self, note: &str) -> Result<(Checkpoint, Note), WitnessError> {
        let note = Note::parse(note.as_bytes())?;
        let (checkpoint, _) = note.open(&self.owner, &[], 0)?;
        Ok((checkpoint, note))
    }

    fn seen(&self) -> Result<Option<(Checkpoint, String)>, WitnessError> {
        let path = self.memory();
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(WitnessError::File { path, reason: error.to_string() }),
        };
        let seen: Seen = serde_json::from_slice(&bytes)
            .map_err(|error| WitnessError::File { path: path.clone(), reason: error.to_string() })?;
        let (checkpoint, _) =
            self.open(&seen.note).map_err(|error| WitnessError::File { path, reason: error.to_string() })?;
        Ok(Some((checkpoint, seen.note)))
    }

    /// The agent's own head must be in the log, and must be an entry of its ledger.
    fn included(
        &self,
        own: &ProvenLeaf,
        checkpoint: &Checkpoint,
        product: &str,
        ledger: &[ChainedEntry],
    ) -> Result<(), WitnessError> {
        let refused = |reason: &str| WitnessError::NotIncluded { reason: reason.to_owned() };
        let proof: Vec<Digest> = own.inclusion.iter().map(stored).collect();
        let leaf = leaf_hash(own.payload.as_bytes());
        verify_inclusion(&leaf, own.index, checkpoint.size, &proof, &checkpoint.root)
            .map_err(|error| refused(&error.to_string()))?;
        let head = LedgerHead::of_entry(&own.payload)
            .ok_or_else(|| refused("the entry shown records no ledger's head"))?;
        if head.agent.as_str() != self.signer.verifier().name() || head.product != product {
            return Err(refused("the entry shown is about another agent or product"));
        }
        let entry = usize::try_from(head.seq).ok().and_then(|seq| ledger.get(seq));
        match entry {
            Some(entry) if entry.hash == *head.hash.as_bytes() => Ok(()),
            Some(_) => Err(refused("it records another entry at that place")),
            None => Err(refused("it records more entries than this ledger has")),
        }
    }

    /// Keeps two notes that contradict each other.
    fn keep_evidence(&self, held: &str, shown: &str) -> Result<PathBuf, WitnessError> {
        let path = self.folder.join("audit-conflict.txt");
        let text = format!("confirmed before:\n\n{held}\nshown afterwards:\n\n{shown}");
        files::replace(&path, text.as_bytes())
            .map_err(|error| WitnessError::File { path: path.clone(), reason: error.to_string() })?;
        Ok(path)
    }

    fn memory(&self) -> PathBuf {
        self.folder.join("audit-seen.json")
    }
}

fn stored(digest: &NamedDigest) -> Digest {
    Digest::from_bytes(*digest.as_bytes())
}

fn named(digest: Digest) -> NamedDigest {
    NamedDigest::from_bytes(*digest.as_bytes())
}

#[cfg(test)]
mod tests;

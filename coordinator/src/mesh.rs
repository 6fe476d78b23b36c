//! What every part of a running coordinator shares: clock, stores, keys, and the parts themselves.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rand::RngCore;
use ring::signature::Ed25519KeyPair;
use serde::Serialize;
use tabmesh_contract::policy::PolicyBundle;
use tabmesh_federation::id::AgentId;
use tabmesh_privacy::ledger::Entry;
use tabmesh_privacy::signature::SigningKey;
use tabmesh_proto::identity::SpiffeId;
use tabmesh_proto::message::{AssignmentRefusal, Id};
use tabmesh_store::{BlobStore, Digest, Kind, Log, LogEntry, NewVersion, Records, Registry};

use crate::answers::Answers;

use crate::catalog::Catalog;
use crate::collections::Collections;
use crate::config::Config;
use crate::error::CoordinatorError;
use crate::mirror::Mirror;
use crate::outbox::Outbox;
use crate::pipeline::rounds::Adapters;
use crate::plans::Plans;
use crate::sums::Sums;

/// Reads the time: UTC milliseconds since 1970.
pub type Clock = Arc<dyn Fn() -> i64 + Send + Sync>;

/// A running coordinator.
pub(crate) struct Mesh {
    /// Its configuration.
    pub(crate) config: Config,
    /// Its clock.
    pub(crate) clock: Clock,
    /// Its signing key.
    pub(crate) key: Arc<Ed25519KeyPair>,
    /// Small records.
    pub(crate) records: Arc<dyn Records>,
    /// Models, corpora, documents, payloads.
    pub(crate) blobs: Arc<BlobStore>,
    /// Versions of models, corpora and adapters.
    pub(crate) registry: Registry,
    /// The policy that decides registrations and plans.
    pub(crate) policy: PolicyBundle,
    /// Admitted contracts.
    pub(crate) catalog: Catalog,
    /// Assignments that agents still have to answer.
    pub(crate) outbox: Outbox,
    /// Collections that are open now.
    pub(crate) collections: Arc<Collections>,
    /// Secure sums that are open now.
    pub(crate) sums: Sums,
    pub(crate) adapters: Adapters,
    /// Plans and their jobs.
    pub(crate) plans: Plans,
    /// The agents' ledgers, as they stated them.
    pub(crate) mirror: Mirror,
    /// Answers to assignments that are no vectors.
    pub(crate) answers: Answers,
    /// Its signing key in the form that signs manifests and reports.
    pub(crate) signing_key: SigningKey,
    /// Set to stop tuning after the current step.
    pub(crate) tuning_stop: AtomicBool,
    /// Whether stages and rounds wait for the whole roster.
    pub(crate) waits_for_all: bool,
    pub(crate) audit: Mutex<Log>,
    /// Its own SPIFFE id.
    pub(crate) identity: SpiffeId,
    /// Held while the record of the latest checkpoint is changed.
    pub(crate) witness: Mutex<()>,
    /// Randomness for ids.
    pub(crate) ids: Mutex<Box<dyn RngCore + Send>>,
}

impl Mesh {
    /// The time.
    pub(crate) fn now_ms(&self) -> i64 {
        (self.clock)()
    }

    /// Stops tuning after its current step.
    pub(crate) fn stop_tuning(&self) {
        self.tuning_stop.store(true, Ordering::Relaxed);
    }

    /// Appends one entry to the audit log; durable when it returns. Gives its chain hash.
    ///
    /// # Errors
    /// [`CoordinatorError::Store`] if the log can't be written.
    pub(crate) fn audit<T: Serialize>(
        &self,
        actor: &str,
        action: &'static str,
        facts: T,
    ) -> Result<Digest, CoordinatorError> {
        Ok(self.audit_entry(actor, action, facts)?.hash)
    }

    /// As [`Self::audit`], giving the whole entry.
    ///
    /// # Errors
    /// As [`Self::audit`].
    pub(crate) fn audit_entry<T: Serialize>(
        &self,
        actor: &str,
        action: &'static str,
        facts: T,
    ) -> Result<LogEntry, CoordinatorError> {
        #[derive(Serialize)]
        struct Entry<'a, T> {
            time_ms: i64,
            actor: &'a str,
            action: &'static str,
            facts: T,
        }
        let entry = Entry { time_ms: self.now_ms(), actor, action, facts };
        let bytes = serde_json::to_vec(&entry).map_err(CoordinatorError::stored("audit entry"))?;
        Ok(self.audit_log().append(&bytes)?)
    }

    /// Length and head of the audit log.
    pub(crate) fn audit_log(&self) -> MutexGuard<'_, Log> {
        locked(&self.audit)
    }

    /// Records an agent's answer to an assignment that asks for no vector.
    ///
    /// # Errors
    /// [`CoordinatorError::Store`] if it can't be recorded.
    pub(crate) fn answered(
        &self,
        agent: &SpiffeId,
        id: &Id,
        refusal: Option<AssignmentRefusal>,
    ) -> Result<(), CoordinatorError> {
        if self.outbox.owes(agent, id)? {
            self.outbox.answered(agent, id)?;
            self.answers.note(agent, id, refusal);
        }
        Ok(())
    }

    /// Lets admitted agents fetch a blob.
    ///
    /// # Errors
    /// [`CoordinatorError::Store`] if it can't be recorded.
    pub(crate) fn share(&self, digest: &Digest) -> Result<(), CoordinatorError> {
        Ok(self.records.put(format!("shared/{digest}").as_bytes(), b"")?)
    }

    /// Whether admitted agents may fetch a blob.
    ///
    /// # Errors
    /// [`CoordinatorError::Store`] if the record can't be read.
    pub(crate) fn is_shared(&self, digest: &Digest) -> Result<bool, CoordinatorError> {
        Ok(self.records.get(format!("shared/{digest}").as_bytes())?.is_some())
    }

    /// The base model as stored; the configured file is taken in at start.
    ///
    /// # Errors
    /// [`CoordinatorError`] if it is missing.
    pub(crate) fn base_model(&self) -> Result<Digest, CoordinatorError> {
        let missing = || CoordinatorError::NotFound { what: "base model", id: String::new() };
        let record = self.records.get(BASE_KEY)?.ok_or_else(missing)?;
        Ok(String::from_utf8_lossy(&record).parse()?)
    }

    /// Registers a version; registering it again is harmless.
    ///
    /// # Errors
    /// [`CoordinatorError::Store`] if it can't be recorded.
    pub(crate) fn register(
        &self,
        kind: Kind,
        digest: Digest,
        parents: Vec<Digest>,
    ) -> Result<(), CoordinatorError> {
        if self.registry.find(&digest)?.is_some() {
            return Ok(());
        }
        let mut parents_known = Vec::new();
        for parent in parents {
            if self.registry.find(&parent)?.is_some() && parent != digest {
                parents_known.push(parent);
            }
        }
        let (created_ms, attributes) = (self.now_ms(), BTreeMap::new());
        let mut facts = NewVersion {
            kind,
            digest,
            parents: parents_known,
            created_ms,
            attributes,
            signature: Vec::new(),
        };
        facts.signature = self.key.sign(&facts.signing_bytes()).as_ref().to_vec();
        self.registry.register(facts)?;
        Ok(())
    }

    /// Whether an agent of the cohort states reproducible noise in its ledger, or this coordinator runs for development.
    ///
    /// # Errors
    /// [`CoordinatorError`] if a mirrored ledger can't be read.
    pub(crate) fn tainted(&self, roster: &BTreeSet<AgentId>) -> Result<bool, CoordinatorError> {
        for (agent, admitted) in self.catalog.all() {
            if roster.iter().all(|member| member.as_str() != agent.to_string()) {
                continue;
            }
            let (entries, _) = self.mirror.entries(&agent, &admitted.contract.name)?;
            for entry in entries {
                let entry = Entry::from_json(&entry.payload).map_err(|error| {
                    CoordinatorError::Step(format!("mirrored ledger of {agent}: {error}"))
                })?;
                if entry.reproducible() {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    /// Stores a document as JSON and gives its digest.
    ///
    /// # Errors
    /// [`CoordinatorError::Store`] if the blob can't be written.
    pub(crate) fn put_json<T: Serialize>(&self, document: &T) -> Result<Digest, CoordinatorError> {
        let bytes = serde_json::to_vec(document).map_err(CoordinatorError::stored("document"))?;
        Ok(self.blobs.put(&bytes)?)
    }

    /// Reads a document stored by [`Self::put_json`].
    ///
    /// # Errors
    /// [`CoordinatorError`] if the blob is missing, damaged or doesn't parse.
    pub(crate) fn get_json<T: serde::de::DeserializeOwned>(
        &self,
        digest: Digest,
        what: &'static str,
    ) -> Result<T, CoordinatorError> {
        serde_json::from_slice(&self.blobs.get(&digest)?).map_err(CoordinatorError::stored(what))
    }
}

/// Record that names the base model.
pub(crate) const BASE_KEY: &[u8] = b"base-model";

/// Locks a mutex; a panic elsewhere while it was held leaves state that every reader checks anyway.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A digest as the store spells it.
pub(crate) fn stored(digest: tabmesh_federation::id::Digest) -> Digest {
    Digest::from_bytes(*digest.as_bytes())
}

/// A digest as the federation spells it.
pub(crate) fn named(digest: Digest) -> tabmesh_federation::id::Digest {
    tabmesh_federation::id::Digest::from_bytes(*digest.as_bytes())
}

//! The agents' ledgers as they stated them: a copy each, which may only grow.
//!
//! The ledger that decides stands in the agent. The copy lets compliance read and verify all of them in one place, and
//! shows a roll-back: a statement must begin where the copy ends, or repeat what the copy has.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Mutex;

use tabmesh_privacy::ledger::ChainedEntry;
use tabmesh_proto::identity::SpiffeId;
use tabmesh_proto::message::{Digest, LedgerStatement, SIGNATURE_BYTES};
use tabmesh_store::{Log, LogEntry};

use crate::error::CoordinatorError;
use crate::mesh::locked;

/// Mirrored ledgers of all agents.
pub(crate) struct Mirror {
    folder: PathBuf,
    ledgers: Mutex<BTreeMap<(SpiffeId, String), Copy>>,
}

struct Copy {
    log: Log,
    head: Option<(u64, Digest)>,
    signature: Option<[u8; SIGNATURE_BYTES]>,
}

/// What became of a statement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stated {
    /// Everything in it is in the copy now.
    Held {
        /// Hash of the copy's last entry.
        head: Digest,
    },
    /// It doesn't continue the copy: a gap, a fork or a roll-back.
    Broken,
}

impl Mirror {
    pub(crate) fn new(folder: PathBuf) -> Self {
        Self { folder, ledgers: Mutex::new(BTreeMap::new()) }
    }

    /// Adds a verified statement to the copy; durable when it returns.
    ///
    /// # Errors
    /// [`CoordinatorError`] if the copy can't be read or written.
    pub(crate) fn state(
        &self,
        agent: &SpiffeId,
        statement: &LedgerStatement,
    ) -> Result<Stated, CoordinatorError> {
        let mut ledgers = locked(&self.ledgers);
        let copy = self.copy(&mut ledgers, agent, statement.product())?;
        let mut held = Vec::new();
        for entry in copy.log.entries() {
            held.push(*entry?.hash.as_bytes());
        }
        for entry in statement.entries() {
            let at = usize::try_from(entry.seq).unwrap_or(usize::MAX);
            match held.get(at) {
                Some(known) if *known == entry.hash() => {}
                Some(_) => return Ok(Stated::Broken),
                None if at == held.len() && entry.prev == held.last().copied().unwrap_or_default() => {
                    let appended = copy.log.append(&entry.payload)?;
                    held.push(*appended.hash.as_bytes());
                }
                None => return Ok(Stated::Broken),
            }
        }
        let head = held.last().copied().unwrap_or_default();
        if statement.head().is_some_and(|(_, hash)| hash == head) {
            copy.head = statement.head();
            copy.signature = Some(*statement.head_signature());
            std::fs::write(
                self.path(agent, statement.product()).with_extension("sig"),
                statement.head_signature(),
            )
            .map_err(|e| CoordinatorError::Step(format!("ledger head signature can't be written: {e}")))?;
        }
        Ok(Stated::Held { head })
    }

    /// Entries of one ledger with the agent's signature over the last one, if it was stated.
    ///
    /// # Errors
    /// [`CoordinatorError`] if the copy can't be read.
    pub(crate) fn entries(
        &self,
        agent: &SpiffeId,
        product: &str,
    ) -> Result<(Vec<LogEntry>, Option<[u8; SIGNATURE_BYTES]>), CoordinatorError> {
        let mut ledgers = locked(&self.ledgers);
        let copy = self.copy(&mut ledgers, agent, product)?;
        let entries = copy.log.entries().collect::<Result<Vec<_>, _>>()?;
        Ok((entries, copy.signature))
    }

    /// As [`Self::entries`], in the form that the ledger's own rules read.
    ///
    /// # Errors
    /// As [`Self::entries`].
    pub(crate) fn chained(
        &self,
        agent: &SpiffeId,
        product: &str,
    ) -> Result<(Vec<ChainedEntry>, Option<[u8; SIGNATURE_BYTES]>), CoordinatorError> {
        let (entries, signature) = self.entries(agent, product)?;
        let chained = |entry: LogEntry| ChainedEntry {
            seq: entry.seq,
            prev: *entry.prev.as_bytes(),
            hash: *entry.hash.as_bytes(),
            payload: entry.payload,
        };
        Ok((entries.into_iter().map(chained).collect(), signature))
    }

    fn copy<'a>(
        &self,
        ledgers: &'a mut BTreeMap<(SpiffeId, String), Copy>,
        agent: &SpiffeId,
        product: &str,
    ) -> Result<&'a mut Copy, CoordinatorError> {
        let key = (agent.clone(), product.to_owned());
        if !ledgers.contains_key(&key) {
            std::fs::create_dir_all(&self.folder).map_err(|e| {
                CoordinatorError::Step(format!("{} can't be made: {e}", self.folder.display()))
            })?;
            let path = self.path(agent, product);
            let (log, torn) = Log::open(&path)?;
            if let Some(torn) = torn {
                tracing::warn!(?torn, %agent, product, "a torn entry was cut from a mirrored ledger");
            }
            let signature =
                std::fs::read(path.with_extension("sig")).ok().and_then(|bytes| bytes.try_into().ok());
            ledgers.insert(key.clone(), Copy { log, head: None, signature });
        }
        ledgers
            .get_mut(&key)
            .ok_or_else(|| CoordinatorError::NotFound { what: "ledger of", id: agent.to_string() })
    }

    fn path(&self, agent: &SpiffeId, product: &str) -> PathBuf {
        // Ids and product names hold characters that file names can't; their digest doesn't.
        let name = tabmesh_store::Digest::of(format!("{agent}#{product}").as_bytes());
        self.folder.join(format!("{name}.log"))
    }
}

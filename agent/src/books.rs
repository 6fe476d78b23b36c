//! The domain's books: ledger, stored payloads and noise in the one order that never under-counts.
//!
//! reserve → noise → store payload (fsync) → commit naming its digest (fsync) → send → refund at the plan's end. A retry
//! finds the commit by the digest of what was asked and resends the stored bytes; a payload that was stored but never
//! committed is an orphan and is deleted when the books are opened.

mod levels;

use std::path::{Path, PathBuf};

use rand_chacha::ChaCha20Rng;
use tabmesh_federation::release_plan::LABEL_STAGE;
use tabmesh_federation::secagg::contribution::{Contribution, ContributionError};
use tabmesh_federation::secagg::descriptor::SumDescriptor;
use tabmesh_privacy::budget::Rho;
use tabmesh_privacy::ledger::window::{Standing, standing};
use tabmesh_privacy::ledger::{
    Account, AccountKey, Balance, ChainedEntry, CommitRequest, DebitReceipt, Entry, GrantRequest, Journal,
    JournalError, Ledger, LedgerError, Pace, PlanRequest, Purpose, RefusalRule, Reservation, State, replay,
};
use tabmesh_privacy::mechanism::threshold::{LEAST_DELTA, MOST_EPSILON, MOST_THRESHOLDS};
use tabmesh_privacy::mechanism::{DiscreteGaussian, EventShape, MechanismEvent, Noise};
use tabmesh_privacy::noise::{NoEntropy, NoiseSource, Purpose as NoisePurpose};
use tabmesh_privacy::private::{Digest, Private};
use tabmesh_store::{BlobStore, Log, LogEntry, StoreError};
use thiserror::Error;

use self::levels::pays_thresholds;
use crate::source::SourceError;

/// Why the books can't be kept.
#[derive(Debug, Error)]
pub enum BooksError {
    /// The ledger refuses, or is damaged.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// Files can't be read or written.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// No noise can be drawn.
    #[error(transparent)]
    Entropy(#[from] NoEntropy),
    /// A committed payload is gone: it can't be resent, and sending another would be a second release.
    #[error("committed payload {digest} is missing from {folder}; the answer can't be sent again")]
    PayloadLost {
        /// Its digest in hexadecimal.
        digest: String,
        /// Where it should be.
        folder: PathBuf,
    },
    /// The product is counted under another source, and nobody said that this one's rows came from there.
    #[error(
        "{product} was counted as {known}, the contract's source is {now} now: if rows or people of the one are in the other, write          `derived_from: {lineage:?}` under grant in the policy; if none are, it is another product and needs another name"
    )]
    OtherSource {
        /// The data product.
        product: String,
        /// Entity namespace and source of its account.
        known: String,
        /// Those of the contract.
        now: String,
        /// The known source alone.
        lineage: String,
    },
    /// What was spent per row would be read as if it had been per entity, or per entity of another kind.
    #[error(
        "{product} was counted per {known}, the contract's unit is {now} now: what was spent says nothing about that. Keep the unit, or \
         count another source under another name"
    )]
    OtherUnit {
        /// The data product.
        product: String,
        /// The unit of what was spent.
        known: String,
        /// That of the contract.
        now: String,
    },
    /// No more thresholds can be paid for, or a grant isn't one that they are paid from.
    #[error(
        "{product} was asked for undeclared levels {used} times, under a grant of epsilon {epsilon} at delta {delta}; thresholds are paid \
         up to {MOST_THRESHOLDS} times, from grants up to epsilon {MOST_EPSILON} and from a delta of {LEAST_DELTA}"
    )]
    Thresholds {
        /// The data product.
        product: String,
        /// Times so far.
        used: usize,
        /// The grant's ε.
        epsilon: f64,
        /// The grant's δ.
        delta: f64,
    },
    /// The table can't be read.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// A source to count on from that this ledger doesn't know.
    #[error("grant.derived_from: {got:?} is no source of this ledger; it has {known}")]
    UnknownOrigin {
        /// What the policy says.
        got: String,
        /// Sources there are.
        known: String,
    },
    /// A vector doesn't fit the sum that it is for.
    #[error(transparent)]
    Contribution(#[from] ContributionError),
    /// The plan has no open reservation.
    #[error("plan {plan} has no open reservation for {purpose}; it was refused, refunded or never announced")]
    NotReserved {
        /// Digest of the plan.
        plan: String,
        /// What for.
        purpose: &'static str,
    },
}

/// The ledger's file: an append-only, hash-chained, fsynced log.
pub struct FileJournal(Log);

impl Journal for FileJournal {
    fn append(&mut self, payload: &[u8]) -> Result<ChainedEntry, JournalError> {
        self.0.append(payload).map(chained).map_err(|error| JournalError { reason: error.to_string() })
    }

    fn replay(&mut self) -> Result<Vec<ChainedEntry>, JournalError> {
        let read = |entry: Result<LogEntry, StoreError>| {
            entry.map(chained).map_err(|error| JournalError { reason: error.to_string() })
        };
        self.0.entries().map(read).collect()
    }
}

fn chained(entry: LogEntry) -> ChainedEntry {
    ChainedEntry {
        seq: entry.seq,
        prev: *entry.prev.as_bytes(),
        hash: *entry.hash.as_bytes(),
        payload: entry.payload,
    }
}

/// What a vector answers, and at what price.
#[derive(Debug, Clone)]
pub struct Question<'a> {
    /// Digest of the plan, in hexadecimal.
    pub plan: &'a str,
    /// Release or round.
    pub purpose: Purpose,
    /// Stage of the release, or number of the round.
    pub step: u64,
    /// Digest of the query or descriptor bytes.
    pub digest: Digest,
    /// The noise.
    pub mechanism: &'a DiscreteGaussian,
    /// Shape of the vector, for the record.
    pub shape: EventShape,
}

/// A contribution to a secure sum, and at what price.
#[derive(Debug, Clone)]
pub struct SumQuestion<'a> {
    /// Digest of the plan, in hexadecimal.
    pub plan: &'a str,
    /// Release or round.
    pub purpose: Purpose,
    /// Stage of the release, or number of the round.
    pub step: u64,
    /// The sum's descriptor.
    pub descriptor: &'a SumDescriptor,
    /// Digest of its bytes: an attempt is debited once under it.
    pub digest: Digest,
    /// The shares of noise and their cost.
    pub event: MechanismEvent,
}

/// Noised bytes and the receipt that lets them be sent.
pub type Sendable = (Private<Vec<u8>>, DebitReceipt);

/// Ledger, payloads and noise of one data product.
pub struct Books {
    ledger: Ledger<FileJournal>,
    payloads: BlobStore,
    folder: PathBuf,
    noise: NoiseSource,
    agent: String,
    product: String,
}

impl Books {
    /// Opens the books in a folder and deletes orphaned payloads.
    ///
    /// # Errors
    /// [`BooksError`] if the ledger doesn't verify from its first entry: then nothing may be released.
    pub fn open(folder: &Path, noise: NoiseSource, agent: &str, product: &str) -> Result<Self, BooksError> {
        std::fs::create_dir_all(folder)
            .map_err(|error| JournalError { reason: error.to_string() })
            .map_err(LedgerError::from)?;
        let (log, torn) = Log::open(&folder.join(LEDGER))?;
        if let Some(torn) = torn {
            tracing::warn!(?torn, "a torn entry was cut from the ledger; its payload, if any, is deleted");
        }
        let journal = FileJournal(log);
        let ledger =
            if noise.reproducible() { Ledger::open_reproducible(journal)? } else { Ledger::open(journal)? };
        let payloads = BlobStore::open(&folder.join("payloads"))?;
        for digest in payloads.list()? {
            if ledger.restore(payloads.get(&digest)?).is_none() {
                tracing::warn!(%digest, "an orphaned payload was deleted: it was never committed");
                payloads.remove(&digest)?;
            }
        }
        let (agent, product) = (agent.to_owned(), product.to_owned());
        Ok(Self { ledger, payloads, folder: folder.to_owned(), noise, agent, product })
    }

    /// The data product.
    #[must_use]
    pub fn product(&self) -> &str {
        &self.product
    }

    /// Grants the budget that the local policy names; nothing is written if nothing changed.
    ///
    /// A budget is the source's, not the name's: another source under the same name doesn't start anew. `derived_from` is
    /// the source that this one's rows came from.
    ///
    /// # Errors
    /// [`BooksError::OtherSource`] for another source without that, [`BooksError::UnknownOrigin`] for one that was never
    /// granted a budget here; [`BooksError::OtherUnit`] for a unit that what was spent doesn't speak of; [`BooksError::Ledger`] if
    /// it can't be recorded.
    pub fn grant(
        &mut self,
        request: GrantRequest,
        pace: Option<Pace>,
        derived_from: Option<&str>,
        now_ms: i64,
    ) -> Result<Rho, BooksError> {
        let source = AccountKey {
            entity_namespace: request.entity_namespace.clone(),
            lineage: request.lineage.clone(),
        };
        if let Some(lineage) = derived_from.filter(|lineage| **lineage != source.lineage) {
            let origin = AccountKey { lineage: lineage.to_owned(), ..source.clone() };
            let accounts = &self.ledger.state().accounts;
            if !accounts.contains_key(&self.ledger.state().origin_of(&origin)) {
                let known: Vec<&str> = accounts.keys().map(|key| key.lineage.as_str()).collect();
                let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
                return Err(BooksError::UnknownOrigin { got: lineage.to_owned(), known });
            }
            self.ledger.derive(&source, lineage, &request.signer, now_ms)?;
        }
        if let Some((known, _)) = self.ledger.state().account_of(&request.product)
            && *known != self.ledger.state().origin_of(&source)
        {
            let shown = |key: &AccountKey| format!("{} in {:?}", key.lineage, key.entity_namespace);
            return Err(BooksError::OtherSource {
                product: request.product,
                known: shown(known),
                now: shown(&source),
                lineage: known.lineage.clone(),
            });
        }
        let used = self.thresholds(&self.ledger.state().origin_of(&source));
        let (epsilon, delta) = (request.epsilon.get(), request.delta.get());
        if used > 0 && !pays_thresholds(epsilon, delta) {
            return Err(BooksError::Thresholds { product: request.product, used, epsilon, delta });
        }
        let account = self.ledger.state().accounts.get(&self.ledger.state().origin_of(&source));
        let charged = account.filter(|account| account.spent > Rho::ZERO || account.reserved > Rho::ZERO);
        let mut units =
            charged.into_iter().flat_map(|account| account.grants.values()).map(|grant| &grant.unit);
        if let Some(known) = units.find(|known| !still_covers(known, &request.unit)) {
            let (known, now) = (known.clone(), request.unit);
            return Err(BooksError::OtherUnit { product: request.product, known, now });
        }
        Ok(self.ledger.grant_at_pace(request, pace, now_ms)?)
    }

    /// The namespace in which rows of a source are counted, if they are.
    pub(crate) fn row_namespace(&self, lineage: &str) -> Option<&str> {
        let of_rows = |(key, account): &(&AccountKey, &Account)| {
            key.lineage == lineage && account.grants.values().any(|grant| grant.unit == ROW_UNIT)
        };
        let (key, _) = self.ledger.state().accounts.iter().find(of_rows)?;
        Some(&key.entity_namespace)
    }

    /// Reserves a plan's budget for one purpose, all or nothing.
    ///
    /// # Errors
    /// [`BooksError::Ledger`] with `OverBudget` and its like, each recorded.
    pub fn reserve(
        &mut self,
        plan: &str,
        purpose: Purpose,
        rho: Rho,
        approvals: Vec<String>,
        now_ms: i64,
    ) -> Result<Reservation, BooksError> {
        let request = PlanRequest {
            plan_digest: plan.to_owned(),
            product: self.product.clone(),
            purpose,
            rho,
            approvals,
            planned: Vec::new(),
        };
        Ok(self.ledger.reserve(request, now_ms)?)
    }

    /// Records a refusal of the agent's own.
    ///
    /// # Errors
    /// [`BooksError::Ledger`] if it can't be recorded.
    pub fn refuse(&mut self, plan: &str, rule: RefusalRule, rho: Rho, now_ms: i64) -> Result<(), BooksError> {
        let product = self.product.clone();
        Ok(self.ledger.refuse(plan, &product, rule, rho, now_ms)?)
    }

    /// The stored answer to a question, if there is one: the same bytes, free of charge.
    ///
    /// # Errors
    /// [`BooksError::PayloadLost`] if it was committed and the bytes are gone.
    pub fn answered(&self, digest: &Digest) -> Result<Option<Sendable>, BooksError> {
        let Some(receipt) = self.ledger.find_commit(digest) else { return Ok(None) };
        let payload = tabmesh_store::Digest::from_bytes(*receipt.payload_digest());
        let lost = || BooksError::PayloadLost { digest: payload.to_string(), folder: self.folder.clone() };
        // Read unchecked: the ledger gives bytes their type back by their digest alone.
        let length = self.payloads.length(&payload).map_err(|_| lost())?;
        let length = usize::try_from(length).map_err(|_| lost())?;
        let bytes = self.payloads.open_range(&payload, 0, length).map_err(|_| lost())?;
        self.ledger.restore(bytes).map(Some).ok_or_else(lost)
    }

    /// Noises a vector, stores it, debits it: what comes back may be sent.
    ///
    /// A question that was answered before gets its stored answer, whatever `sum` holds.
    ///
    /// # Errors
    /// [`BooksError`]; whatever fails, nothing may be sent and nothing is under-counted.
    pub fn answer(
        &mut self,
        question: &Question<'_>,
        sum: &[i64],
        now_ms: i64,
    ) -> Result<Sendable, BooksError> {
        if let Some(stored) = self.answered(&question.digest)? {
            return Ok(stored);
        }
        let reservation = self.reserved(question.plan, question.purpose)?;
        let (_, mut stream) = self.next_noise(question.purpose)?;
        let payload = question.mechanism.privatize(sum, &mut stream).encode();
        let event = question.mechanism.event(question.shape);
        let request = CommitRequest { event, step: question.step, query_digest: question.digest };
        self.store_and_commit(&reservation, request, payload, now_ms)
    }

    /// Adds this agent's noise share to a vector, has it masked, stores the masked bytes, debits them: what comes back
    /// may be sent.
    ///
    /// `mask` gets the noised contribution, makes whatever state goes with it durable and gives the masked bytes. The
    /// digest that is debited is theirs: nothing about the contribution itself is on record.
    ///
    /// # Errors
    /// [`BooksError`], or what `mask` says; whatever fails, nothing may be sent and nothing is under-counted.
    pub fn contribute<E: From<BooksError>>(
        &mut self,
        question: &SumQuestion<'_>,
        sum: &[i64],
        now_ms: i64,
        mask: impl FnOnce(&Contribution) -> Result<Private<Vec<u8>>, E>,
    ) -> Result<Sendable, E> {
        let reservation = self.reserved(question.plan, question.purpose)?;
        let (debit, mut stream) = self.next_noise(question.purpose)?;
        let digest = tabmesh_federation::id::Digest::from_bytes(question.digest);
        let contribution = Contribution::noised(sum, question.descriptor, digest, debit, &mut stream)
            .map_err(BooksError::from)?;
        let payload = mask(&contribution)?;
        let (event, step, query_digest) = (question.event.clone(), question.step, question.digest);
        let request = CommitRequest { event, step, query_digest };
        Ok(self.store_and_commit(&reservation, request, payload, now_ms)?)
    }

    /// A generator for keys and shares of secrets; `number` is never used twice.
    ///
    /// # Errors
    /// [`BooksError::Entropy`] when the system gave no randomness.
    pub fn keys(&self, number: u64) -> Result<ChaCha20Rng, BooksError> {
        Ok(self.noise.stream(&self.agent, &self.product, number, NoisePurpose::Keys)?)
    }

    /// What the units of a sampled round are drawn with: secret, and other bits than the noise of the debit that follows.
    ///
    /// # Errors
    /// [`BooksError::Entropy`] when the system gave no randomness.
    pub fn draws(&self) -> Result<ChaCha20Rng, BooksError> {
        let sequence = self.ledger.entries().len() as u64;
        Ok(self.noise.stream(&self.agent, &self.product, sequence, NoisePurpose::Sampling)?)
    }

    /// Whether a question was answered and debited.
    #[must_use]
    pub fn debited(&self, digest: &Digest) -> bool {
        self.ledger.find_commit(digest).is_some()
    }

    /// How often a stage or round of a plan was debited.
    #[must_use]
    pub fn debits(&self, plan: &str, purpose: Purpose, step: u64) -> usize {
        debits(self.ledger.state(), plan, purpose, step)
    }

    /// Whether this domain's rows were counted by label in a plan's release: then a level's code has their labels in it.
    #[must_use]
    pub fn in_release(&self, plan: &str) -> bool {
        in_release(self.ledger.state(), plan)
    }

    fn reserved(&self, plan: &str, purpose: Purpose) -> Result<Reservation, BooksError> {
        let found = self.ledger.find_reservation(plan, &self.product, purpose);
        found.ok_or_else(|| BooksError::NotReserved { plan: plan.to_owned(), purpose: purpose.label() })
    }

    /// The place in the ledger that the next debit will have, and the noise that goes with it.
    fn next_noise(&self, purpose: Purpose) -> Result<(u64, ChaCha20Rng), BooksError> {
        let purpose = match purpose {
            Purpose::Release => NoisePurpose::Release,
            Purpose::Round => NoisePurpose::Round,
        };
        let sequence = self.ledger.entries().len() as u64;
        Ok((sequence, self.noise.stream(&self.agent, &self.product, sequence, purpose)?))
    }

    fn store_and_commit(
        &mut self,
        reservation: &Reservation,
        request: CommitRequest,
        payload: Private<Vec<u8>>,
        now_ms: i64,
    ) -> Result<Sendable, BooksError> {
        self.payloads.put(payload.as_bytes())?;
        match self.ledger.commit(reservation, request, &payload, now_ms) {
            Ok(receipt) => Ok((payload, receipt)),
            Err(error) => {
                // Without a receipt the payload must not survive; if the append's fate is unknown, opening decides.
                if !matches!(error, LedgerError::Journal(_) | LedgerError::Stopped) {
                    self.payloads.remove(&tabmesh_store::Digest::from_bytes(payload.payload_digest()))?;
                }
                Err(error.into())
            }
        }
    }

    /// Ends a plan: what it didn't use is free again.
    ///
    /// # Errors
    /// [`BooksError::Ledger`] if it can't be recorded; it stays charged then.
    pub fn close(&mut self, plan: &str, now_ms: i64) -> Result<(), BooksError> {
        for purpose in [Purpose::Release, Purpose::Round] {
            if let Some(open) = self.ledger.find_reservation(plan, &self.product, purpose) {
                self.ledger.close(&open, now_ms)?;
            }
        }
        Ok(())
    }

    /// Where the budget stands.
    #[must_use]
    pub fn balance(&self) -> Option<Balance> {
        self.ledger.balance(&self.product)
    }

    /// Where the budget stands within the window that the grant sets; nothing without one.
    #[must_use]
    pub fn standing(&self, now_ms: i64) -> Option<Standing> {
        standing(self.ledger.state(), &self.product, now_ms)
    }

    /// What is spent or reserved; cheaper than the [`Self::balance`], which has it as ε too.
    #[must_use]
    pub fn charged(&self) -> Option<Rho> {
        let (_, account) = self.ledger.state().account_of(&self.product)?;
        Some(account.spent.checked_add(account.reserved).unwrap_or(Rho::from_units(u64::MAX)))
    }

    /// All entries from the first.
    #[must_use]
    pub fn entries(&self) -> &[ChainedEntry] {
        self.ledger.entries()
    }

    /// Whether the noise could be drawn again.
    #[must_use]
    pub fn reproducible(&self) -> bool {
        self.noise.reproducible()
    }
}

/// A unit that is a row, as grants write it.
pub const ROW_UNIT: &str = "row";

/// Whether a loss that was counted for one unit holds for another, as grants write them: one unit's loss is its rows' as well, however
/// many may count of it later; a row's isn't that of whoever has several.
fn still_covers(spent: &str, now: &str) -> bool {
    let kind = |unit: &str| unit.split(", at most ").next().unwrap_or_default().to_owned();
    now == ROW_UNIT || kind(spent) == kind(now)
}

/// Reads the ledger of a folder without opening it for writing, verified from its first entry.
///
/// # Errors
/// [`BooksError`] if it is missing or doesn't verify.
pub fn read_entries(folder: &Path) -> Result<Vec<ChainedEntry>, BooksError> {
    let mut entries = Vec::new();
    for entry in tabmesh_store::log::read(&folder.join(LEDGER))? {
        let entry = chained(entry?);
        Entry::from_json(&entry.payload)?;
        entries.push(entry);
    }
    tabmesh_privacy::ledger::verify_chain(&entries)?;
    Ok(entries)
}

/// As [`Books::in_release`], by the ledger of a folder that another part of the process, or another process, has open.
///
/// # Errors
/// [`BooksError`] if the ledger doesn't verify. A folder without a ledger released nothing.
pub fn was_in_release(folder: &Path, plan: &str) -> Result<bool, BooksError> {
    if !folder.join(LEDGER).exists() {
        return Ok(false);
    }
    Ok(in_release(&replay(&read_entries(folder)?)?, plan))
}

fn in_release(state: &State, plan: &str) -> bool {
    debits(state, plan, Purpose::Release, u64::from(LABEL_STAGE)) > 0
}

fn debits(state: &State, plan: &str, purpose: Purpose, step: u64) -> usize {
    let same = state.commits.values().filter(|committed| {
        let entry = &committed.entry;
        committed.plan_digest == plan && entry.purpose == purpose && entry.step == step
    });
    same.count()
}

/// The ledger's file in the folder.
const LEDGER: &str = "ledger.log";

#[cfg(test)]
mod tests;

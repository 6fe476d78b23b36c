//! The privacy ledger of one agent: what was granted, set aside and spent.
//!
//! The order is fixed: [`Ledger::reserve`] → noise → store the payload → [`Ledger::commit`] (durable) → send →
//! [`Ledger::close`], which refunds what the plan didn't use. Only `commit` and [`Ledger::restore`] give a
//! [`DebitReceipt`], and only a receipt lets bytes be sent, so nothing leaves before its cost is on record. After a
//! crash a reservation stays charged until it is refunded: the ledger may over-count spending, never under-count it.
//!
//! Admission is exact integer arithmetic on ρ. Composition is that of zero-concentrated DP, whose filter is lossless
//! for adaptively chosen Gaussian events (Whitehouse, Ramdas, Rogers, Wu, arXiv 2203.05481). opendp is asked as a
//! second opinion on every event. Storage is behind [`Journal`].

mod entry;
mod error;
mod journal;
mod state;
pub mod window;

pub use entry::{
    ADJACENCY, Commit, Derive, Entry, Grant, MAX_APPROVALS, MAX_ENTRY_BYTES, MAX_FIELD_BYTES, Purpose,
    Refund, RefusalRule, Refuse, Reserve, WindowLimit,
};
pub use error::LedgerError;
pub use journal::{ChainedEntry, GENESIS, Journal, JournalError, MemoryJournal, verify_chain};
pub use state::{Account, AccountKey, Committed, OpenReservation, State, epsilon_of};

use crate::accountant::crosscheck::second_opinion;
use crate::accountant::zcdp;
use crate::budget::{Delta, Epsilon, Rho};
use crate::mechanism::{MechanismEvent, MechanismKind};
use crate::private::{Digest, Private};

/// A budget as a domain's policy grants it.
#[derive(Debug, Clone, PartialEq)]
pub struct GrantRequest {
    /// Data product.
    pub product: String,
    /// Who the units are.
    pub entity_namespace: String,
    /// Physical source of the rows.
    pub lineage: String,
    /// What one unit is.
    pub unit: String,
    /// ε over the product's lifetime.
    pub epsilon: Epsilon,
    /// The one fixed δ.
    pub delta: Delta,
    /// Who signed the policy.
    pub signer: String,
}

/// How fast a granted budget may be spent, as a domain's policy says it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pace {
    /// Length of the rolling window in milliseconds.
    pub length_ms: u64,
    /// ε of what may be spent within it.
    pub epsilon: Epsilon,
}

/// A plan that asks for budget.
#[derive(Debug, Clone, PartialEq)]
pub struct PlanRequest {
    /// Digest of the plan.
    pub plan_digest: String,
    /// Data product.
    pub product: String,
    /// What it is for.
    pub purpose: Purpose,
    /// What it may spend.
    pub rho: Rho,
    /// Who approved it.
    pub approvals: Vec<String>,
    /// Events already fixed by the plan: each is cross-checked and together they must fit `rho`. May be empty; every
    /// event is checked again when it is committed.
    pub planned: Vec<MechanismEvent>,
}

/// What a commit says beside the payload.
#[derive(Debug, Clone, PartialEq)]
pub struct CommitRequest {
    /// The mechanism used and its cost.
    pub event: MechanismEvent,
    /// Stage of the release, or number of the round.
    pub step: u64,
    /// Digest of the query or round descriptor the payload answers.
    pub query_digest: Digest,
}

/// An open reservation; made by the ledger alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reservation {
    id: u64,
    plan_digest: String,
    product: String,
    purpose: Purpose,
    rho: Rho,
}

impl Reservation {
    /// Number of the reservation in its ledger.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Digest of the plan.
    #[must_use]
    pub fn plan_digest(&self) -> &str {
        &self.plan_digest
    }

    /// Data product.
    #[must_use]
    pub fn product(&self) -> &str {
        &self.product
    }

    /// What it is for.
    #[must_use]
    pub fn purpose(&self) -> Purpose {
        self.purpose
    }

    /// ρ reserved in all.
    #[must_use]
    pub fn rho(&self) -> Rho {
        self.rho
    }
}

/// Proof that a payload's cost is durable; made by the ledger alone. Sending functions ask for one.
///
/// It can't be made from an entry that nobody committed:
///
/// ```compile_fail,E0451
/// use tabmesh_privacy::ledger::{Committed, DebitReceipt};
///
/// fn receipt(committed: Committed) -> DebitReceipt {
///     DebitReceipt { committed }
/// }
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct DebitReceipt {
    committed: Committed,
}

impl DebitReceipt {
    /// Position of the entry in the chain.
    #[must_use]
    pub fn seq(&self) -> u64 {
        self.committed.seq
    }

    /// Chain hash of the entry.
    #[must_use]
    pub fn hash(&self) -> &Digest {
        &self.committed.hash
    }

    /// SHA-256 of the payload it pays for.
    #[must_use]
    pub fn payload_digest(&self) -> &Digest {
        &self.committed.entry.payload_digest
    }

    /// Digest of the query or round descriptor.
    #[must_use]
    pub fn query_digest(&self) -> &Digest {
        &self.committed.entry.query_digest
    }

    /// The mechanism event.
    #[must_use]
    pub fn event(&self) -> &MechanismEvent {
        &self.committed.entry.event
    }

    /// What it is for.
    #[must_use]
    pub fn purpose(&self) -> Purpose {
        self.committed.entry.purpose
    }

    /// Stage of the release, or number of the round.
    #[must_use]
    pub fn step(&self) -> u64 {
        self.committed.entry.step
    }

    /// Data product.
    #[must_use]
    pub fn product(&self) -> &str {
        &self.committed.product
    }

    /// Digest of the plan.
    #[must_use]
    pub fn plan_digest(&self) -> &str {
        &self.committed.plan_digest
    }

    /// Whether the noise could be drawn again: reproducible, not private.
    #[must_use]
    pub fn reproducible(&self) -> bool {
        self.committed.entry.reproducible
    }

    /// Whether it pays for these bytes.
    #[must_use]
    pub fn covers(&self, payload: &Private<Vec<u8>>) -> bool {
        payload.payload_digest() == self.committed.entry.payload_digest
    }
}

/// Where a product's budget stands.
#[derive(Debug, Clone, PartialEq)]
pub struct Balance {
    /// Data product.
    pub product: String,
    /// Its account.
    pub account: AccountKey,
    /// Its latest grant.
    pub grant: Grant,
    /// Limit of the account.
    pub granted: Rho,
    /// Committed.
    pub spent: Rho,
    /// Reserved and neither committed nor refunded.
    pub reserved: Rho,
    /// Neither spent nor reserved.
    pub left: Rho,
    /// ε of what is spent at the grant's δ; nothing where nothing is spent.
    pub epsilon_spent: Option<Epsilon>,
    /// ε if every open reservation is used up. Figures of ε are never subtracted from each other.
    pub epsilon_charged: Option<Epsilon>,
}

/// The ledger of one agent.
#[derive(Debug)]
pub struct Ledger<J> {
    journal: J,
    state: State,
    entries: Vec<ChainedEntry>,
    reproducible: bool,
    stopped: bool,
}

impl<J: Journal> Ledger<J> {
    /// Reads a ledger and checks every entry: the chain, and that each entry was lawful when it was made.
    ///
    /// # Errors
    /// [`LedgerError::Journal`], [`LedgerError::Chain`], [`LedgerError::Malformed`] or [`LedgerError::Unlawful`]: a
    /// ledger that can't be verified must not release anything.
    pub fn open(mut journal: J) -> Result<Self, LedgerError> {
        let entries = journal.replay()?;
        let state = replay(&entries)?;
        Ok(Self { journal, state, entries, reproducible: false, stopped: false })
    }

    /// As [`Self::open`], with every new entry marked as made under reproducible noise.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_reproducible(journal: J) -> Result<Self, LedgerError> {
        Self::open(journal).map(|ledger| Self { reproducible: true, ..ledger })
    }

    /// Grants a budget; a later grant of a product replaces its earlier one. A grant that changes nothing writes
    /// nothing.
    ///
    /// # Errors
    /// [`LedgerError::Malformed`] for empty or oversized texts, or a storage failure.
    pub fn grant(&mut self, request: GrantRequest, time_ms: i64) -> Result<Rho, LedgerError> {
        self.grant_at_pace(request, None, time_ms)
    }

    /// As [`Self::grant`], with a limit on how fast it may be spent.
    ///
    /// # Errors
    /// As [`Self::grant`], and [`LedgerError::Window`] for a window that can't be.
    pub fn grant_at_pace(
        &mut self,
        request: GrantRequest,
        pace: Option<Pace>,
        time_ms: i64,
    ) -> Result<Rho, LedgerError> {
        let rho = zcdp::rho_for(request.epsilon, request.delta);
        let window = pace.map(|Pace { length_ms, epsilon }| {
            let rho = zcdp::rho_for(epsilon, request.delta);
            WindowLimit { length_ms, epsilon, rho }
        });
        let grant = Grant {
            time_ms,
            reproducible: self.reproducible,
            product: request.product,
            entity_namespace: request.entity_namespace,
            lineage: request.lineage,
            unit: request.unit,
            adjacency: ADJACENCY.to_owned(),
            epsilon: request.epsilon,
            delta: request.delta,
            rho,
            signer: request.signer,
            window,
        };
        let present =
            self.state.account_of(&grant.product).and_then(|(_, account)| account.grants.get(&grant.product));
        if present.is_some_and(|present| Grant { time_ms: present.time_ms, ..grant.clone() } == *present) {
            return Ok(rho);
        }
        self.record(&Entry::Grant(grant))?;
        Ok(rho)
    }

    /// Puts a new physical source under the account of the one its rows came from: after a split, a copy or a move of
    /// the table. Must come before the new source's first grant. Saying the same again writes nothing.
    ///
    /// # Errors
    /// [`LedgerError::Lineage`] if the new source has an account or another origin already, or would be its own origin;
    /// [`LedgerError::Malformed`] for empty or oversized texts; or a storage failure.
    pub fn derive(
        &mut self,
        source: &AccountKey,
        origin: &str,
        signer: &str,
        time_ms: i64,
    ) -> Result<(), LedgerError> {
        if self.state.origins.get(source).is_some_and(|known| known.lineage == origin) {
            return Ok(());
        }
        self.record(&Entry::Derive(Derive {
            time_ms,
            reproducible: self.reproducible,
            entity_namespace: source.entity_namespace.clone(),
            lineage: source.lineage.clone(),
            derived_from: origin.to_owned(),
            signer: signer.to_owned(),
        }))
    }

    /// Everything the entries add up to.
    #[must_use]
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Sets budget aside for a plan, or writes a refusal.
    ///
    /// A plan that already has an open reservation of the same size gets that one back: after a crash the agent asks
    /// again and isn't charged twice.
    ///
    /// # Errors
    /// [`LedgerError::OverBudget`], [`LedgerError::OverWindow`], [`LedgerError::NoGrant`], [`LedgerError::Mechanism`] or
    /// [`LedgerError::CrossCheck`], each after a refusal was recorded; [`LedgerError::PlanReserved`];
    /// [`LedgerError::Malformed`]; or a storage failure. Nothing is charged on any of them.
    pub fn reserve(&mut self, plan: PlanRequest, time_ms: i64) -> Result<Reservation, LedgerError> {
        if let Some(open) = self.find_reservation(&plan.plan_digest, &plan.product, plan.purpose) {
            return if open.rho == plan.rho {
                Ok(open)
            } else {
                Err(LedgerError::PlanReserved { plan_digest: plan.plan_digest, reserved: open.rho })
            };
        }
        let entry = Entry::Reserve(Reserve {
            time_ms,
            reproducible: self.reproducible,
            reservation: self.state.last_reservation.saturating_add(1),
            plan_digest: plan.plan_digest.clone(),
            product: plan.product.clone(),
            purpose: plan.purpose,
            rho: plan.rho,
            approvals: plan.approvals,
        });
        let admitted = check_planned(&plan.planned, plan.rho).and_then(|()| self.state.admit(&entry));
        if let Err(error) = admitted {
            if let Some(rule) = rule_of(&error) {
                self.refuse(&plan.plan_digest, &plan.product, rule, plan.rho, time_ms)?;
            }
            return Err(error);
        }
        self.record(&entry)?;
        Ok(Reservation {
            id: self.state.last_reservation,
            plan_digest: plan.plan_digest,
            product: plan.product,
            purpose: plan.purpose,
            rho: plan.rho,
        })
    }

    /// Charges one use of a mechanism to a reservation; durable when it returns. The payload must be stored before.
    ///
    /// # Errors
    /// [`LedgerError::NotReserved`], [`LedgerError::OverReserved`], [`LedgerError::Mechanism`],
    /// [`LedgerError::CrossCheck`] or [`LedgerError::PayloadSize`] when the event may not be charged; or a storage
    /// failure. Without a receipt the payload must be deleted, never sent.
    pub fn commit(
        &mut self,
        reservation: &Reservation,
        request: CommitRequest,
        payload: &Private<Vec<u8>>,
        time_ms: i64,
    ) -> Result<DebitReceipt, LedgerError> {
        let expected = request.event.dimension as usize * 8;
        // How long a list of found levels is, is part of the answer.
        let has_size = request.event.kind != MechanismKind::ThresholdHistogram;
        if has_size && payload.as_bytes().len() != expected {
            return Err(LedgerError::PayloadSize { expected, got: payload.as_bytes().len() });
        }
        self.check_own(reservation)?;
        request.event.check()?;
        second_opinion(&request.event)?;
        let payload_digest = payload.payload_digest();
        self.record(&Entry::Commit(Box::new(Commit {
            time_ms,
            reproducible: self.reproducible,
            reservation: reservation.id,
            event: request.event,
            purpose: reservation.purpose,
            step: request.step,
            payload_digest,
            query_digest: request.query_digest,
        })))?;
        self.receipt(&payload_digest).ok_or(LedgerError::NotReserved { reservation: reservation.id })
    }

    /// Ends a reservation and frees what wasn't committed.
    ///
    /// # Errors
    /// [`LedgerError::NotReserved`] when it isn't open, or a storage failure (it stays charged then).
    pub fn refund(&mut self, reservation: &Reservation, time_ms: i64) -> Result<Rho, LedgerError> {
        let left = self.check_own(reservation)?;
        self.record(&Entry::Refund(Refund {
            time_ms,
            reproducible: self.reproducible,
            reservation: reservation.id,
            rho: left,
        }))?;
        Ok(left)
    }

    /// Ends a plan: as [`Self::refund`], and nothing to do when it has ended already.
    ///
    /// # Errors
    /// A storage failure.
    pub fn close(&mut self, reservation: &Reservation, time_ms: i64) -> Result<Rho, LedgerError> {
        match self.refund(reservation, time_ms) {
            Err(LedgerError::NotReserved { .. }) => Ok(Rho::ZERO),
            other => other,
        }
    }

    /// Records a refusal the agent's own policy made.
    ///
    /// # Errors
    /// [`LedgerError::Malformed`] for empty or oversized texts, or a storage failure.
    pub fn refuse(
        &mut self,
        plan_digest: &str,
        product: &str,
        rule: RefusalRule,
        rho: Rho,
        time_ms: i64,
    ) -> Result<(), LedgerError> {
        self.record(&Entry::Refuse(Refuse {
            time_ms,
            reproducible: self.reproducible,
            plan_digest: plan_digest.to_owned(),
            product: product.to_owned(),
            rule,
            rho,
        }))
    }

    /// Gives stored bytes back their type, if a committed entry names their digest. For resending after a restart:
    /// the same bytes cost nothing again. An orphan (stored, never committed) gets nothing and must be deleted.
    #[must_use]
    pub fn restore(&self, payload: Vec<u8>) -> Option<(Private<Vec<u8>>, DebitReceipt)> {
        let payload = Private::new(payload);
        let receipt = self.receipt(&payload.payload_digest())?;
        Some((payload, receipt))
    }

    /// The latest commit that answers a query: a retry resends its payload.
    #[must_use]
    pub fn find_commit(&self, query_digest: &Digest) -> Option<DebitReceipt> {
        self.state.queries.get(query_digest).and_then(|payload| self.receipt(payload))
    }

    /// The open reservation of a plan.
    #[must_use]
    pub fn find_reservation(
        &self,
        plan_digest: &str,
        product: &str,
        purpose: Purpose,
    ) -> Option<Reservation> {
        self.open_reservations()
            .into_iter()
            .find(|r| r.plan_digest == plan_digest && r.product == product && r.purpose == purpose)
    }

    /// All open reservations, oldest first.
    #[must_use]
    pub fn open_reservations(&self) -> Vec<Reservation> {
        self.state.reservations.values().map(handle).collect()
    }

    /// Where a product's budget stands.
    #[must_use]
    pub fn balance(&self, product: &str) -> Option<Balance> {
        balance_of(&self.state, product)
    }

    /// Products with a grant, in order of name.
    #[must_use]
    pub fn products(&self) -> Vec<&str> {
        self.state.products.keys().map(String::as_str).collect()
    }

    /// Every entry from the first, for a report.
    #[must_use]
    pub fn entries(&self) -> &[ChainedEntry] {
        &self.entries
    }

    /// The last entry.
    #[must_use]
    pub fn head(&self) -> Option<&ChainedEntry> {
        self.entries.last()
    }

    /// Whether any entry, or the next one, was made under reproducible noise.
    #[must_use]
    pub fn reproducible(&self) -> bool {
        self.reproducible || self.state.reproducible
    }

    /// The journal, for its owner to close.
    #[must_use]
    pub fn into_journal(self) -> J {
        self.journal
    }

    // Admits, appends, then applies. After a failed append it is unknown whether the entry is stored, so nothing more
    // is written until the ledger is opened again.
    fn record(&mut self, entry: &Entry) -> Result<(), LedgerError> {
        if self.stopped {
            return Err(LedgerError::Stopped);
        }
        self.state.admit(entry)?;
        let payload = entry.to_json();
        let (seq, prev) =
            (self.entries.len() as u64, self.entries.last().map_or(GENESIS, |entry| entry.hash));
        let appended = self.journal.append(&payload).inspect_err(|_| self.stopped = true)?;
        if appended != ChainedEntry::following(seq, prev, &payload) {
            self.stopped = true;
            return Err(LedgerError::Chain { seq });
        }
        self.state.apply(appended.seq, appended.hash, entry)?;
        self.entries.push(appended);
        Ok(())
    }

    fn check_own(&self, reservation: &Reservation) -> Result<Rho, LedgerError> {
        match self.state.reservations.get(&reservation.id) {
            Some(open) if handle(open) == *reservation => Ok(open.left()),
            _ => Err(LedgerError::NotReserved { reservation: reservation.id }),
        }
    }

    fn receipt(&self, payload: &Digest) -> Option<DebitReceipt> {
        self.state.commits.get(payload).map(|committed| DebitReceipt { committed: committed.clone() })
    }
}

/// The state a chain of entries adds up to, every entry checked.
///
/// # Errors
/// [`LedgerError::Chain`], [`LedgerError::Malformed`] or [`LedgerError::Unlawful`] for the first entry that is wrong.
pub fn replay(entries: &[ChainedEntry]) -> Result<State, LedgerError> {
    verify_chain(entries)?;
    let mut state = State::default();
    for chained in entries {
        let entry = Entry::from_json(&chained.payload)?;
        state
            .apply(chained.seq, chained.hash, &entry)
            .map_err(|error| LedgerError::Unlawful { seq: chained.seq, rule: error.to_string() })?;
    }
    Ok(state)
}

/// Where a product's budget stands in a state.
#[must_use]
pub fn balance_of(state: &State, product: &str) -> Option<Balance> {
    let (key, account) = state.account_of(product)?;
    let grant = account.grants.get(product)?;
    let charged = account.spent.checked_add(account.reserved)?;
    Some(Balance {
        product: product.to_owned(),
        account: key.clone(),
        grant: grant.clone(),
        granted: account.granted(),
        spent: account.spent,
        reserved: account.reserved,
        left: account.left(),
        epsilon_spent: epsilon_of(account.spent, grant),
        epsilon_charged: epsilon_of(charged, grant),
    })
}

fn handle(open: &OpenReservation) -> Reservation {
    Reservation {
        id: open.entry.reservation,
        plan_digest: open.entry.plan_digest.clone(),
        product: open.entry.product.clone(),
        purpose: open.entry.purpose,
        rho: open.entry.rho,
    }
}

fn check_planned(planned: &[MechanismEvent], rho: Rho) -> Result<(), LedgerError> {
    let mut total = Rho::ZERO;
    for event in planned {
        event.check()?;
        second_opinion(event)?;
        total = total.checked_add(event.rho).unwrap_or(Rho::from_units(u64::MAX));
    }
    if total <= rho { Ok(()) } else { Err(LedgerError::OverReserved { asked: total, left: rho }) }
}

// Errors that are refusals of the plan; the others are the caller's or the disk's.
fn rule_of(error: &LedgerError) -> Option<RefusalRule> {
    match error {
        LedgerError::OverBudget { .. } => Some(RefusalRule::OverBudget),
        LedgerError::OverWindow { .. } => Some(RefusalRule::OverWindow),
        LedgerError::NoGrant { .. } => Some(RefusalRule::NoGrant),
        LedgerError::Mechanism(_) | LedgerError::OverReserved { .. } => Some(RefusalRule::WrongCost),
        LedgerError::CrossCheck(_) => Some(RefusalRule::SecondOpinion),
        _ => None,
    }
}

#[cfg(test)]
mod interleavings;
#[cfg(test)]
mod tests;

//! The state a ledger's entries add up to, and the rules an entry must obey.
//!
//! Pure: [`State::admit`] says whether an entry may follow, [`State::apply`] adds it. Live admission, replay after a
//! crash and a report's verification run the same code. An account is one physical source of rows within one entity
//! namespace, whatever its products are called; the smallest of its products' grants limits it. All sums are
//! integers.

use super::LedgerError;
use super::entry::{Commit, Derive, Entry, Grant, Purpose, Refund, Reserve, WindowLimit};
use super::window::{MAX_WINDOW_MS, Window};
use crate::accountant::zcdp;
use crate::budget::{Epsilon, Rho};
use crate::private::Digest;
use std::collections::BTreeMap;

/// Whose budget it is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct AccountKey {
    /// Who the units are.
    pub entity_namespace: String,
    /// Physical source of the rows.
    pub lineage: String,
}

/// Sums of one account.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Account {
    /// Latest grant of each product.
    pub grants: BTreeMap<String, Grant>,
    /// Committed.
    pub spent: Rho,
    /// Reserved and neither committed nor refunded.
    pub reserved: Rho,
    /// Committed by purpose.
    pub spent_by: BTreeMap<Purpose, Rho>,
}

impl Account {
    /// The limit: the smallest grant.
    #[must_use]
    pub fn granted(&self) -> Rho {
        self.grants.values().map(|grant| grant.rho).min().unwrap_or(Rho::ZERO)
    }

    /// Neither spent nor reserved; zero where a grant was lowered below that.
    #[must_use]
    pub fn left(&self) -> Rho {
        self.granted().saturating_sub(self.spent).saturating_sub(self.reserved)
    }
}

/// A reservation that hasn't been refunded.
#[derive(Debug, Clone, PartialEq)]
pub struct OpenReservation {
    /// Its entry.
    pub entry: Reserve,
    /// The account it is charged to.
    pub account: AccountKey,
    /// Committed so far.
    pub committed: Rho,
}

impl OpenReservation {
    /// Reserved and not committed.
    #[must_use]
    pub fn left(&self) -> Rho {
        self.entry.rho.saturating_sub(self.committed)
    }
}

/// A committed entry with its place in the chain.
#[derive(Debug, Clone, PartialEq)]
pub struct Committed {
    /// Position in the chain.
    pub seq: u64,
    /// Chain hash.
    pub hash: Digest,
    /// Its time, UTC milliseconds since 1970; that of the latest entry before it where the clock had gone back.
    pub dated_ms: i64,
    /// The entry.
    pub entry: Commit,
    /// Product of its reservation.
    pub product: String,
    /// Plan of its reservation.
    pub plan_digest: String,
}

/// Everything the entries add up to.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct State {
    /// Accounts by key.
    pub accounts: BTreeMap<AccountKey, Account>,
    /// Account of each product: that of its latest grant.
    pub products: BTreeMap<String, AccountKey>,
    /// Where sources that came out of others have their rows from; never a circle.
    pub origins: BTreeMap<AccountKey, AccountKey>,
    /// Open reservations by number.
    pub reservations: BTreeMap<u64, OpenReservation>,
    /// Account of every reservation there ever was.
    pub charges: BTreeMap<u64, AccountKey>,
    /// Commits by payload digest.
    pub commits: BTreeMap<Digest, Committed>,
    /// Payload digest of the latest commit for each query digest.
    pub queries: BTreeMap<Digest, Digest>,
    /// Number of the last reservation.
    pub last_reservation: u64,
    /// Whether any entry was made under reproducible noise.
    pub reproducible: bool,
    /// Latest time that an entry states.
    pub latest_ms: Option<i64>,
}

impl State {
    /// The account of a product.
    #[must_use]
    pub fn account_of(&self, product: &str) -> Option<(&AccountKey, &Account)> {
        let key = self.products.get(product)?;
        self.accounts.get(key).map(|account| (key, account))
    }

    /// The account of a source: that of the first source its rows came from.
    #[must_use]
    pub fn origin_of(&self, source: &AccountKey) -> AccountKey {
        let mut here = source;
        // Ends: an entry that closed a circle wasn't admitted.
        while let Some(origin) = self.origins.get(here) {
            here = origin;
        }
        here.clone()
    }

    /// The account a commit was charged to.
    #[must_use]
    pub fn charged_to(&self, committed: &Committed) -> Option<&AccountKey> {
        self.charges.get(&committed.entry.reservation)
    }

    /// A time as the ledger's windows count it: never before an entry that there is, so that a clock that goes back frees
    /// nothing and hides nothing.
    #[must_use]
    pub fn dated(&self, time_ms: i64) -> i64 {
        self.latest_ms.map_or(time_ms, |latest_ms| latest_ms.max(time_ms))
    }

    /// What was charged to an account within a span of the ledger's time.
    #[must_use]
    pub fn spent_within(&self, account: &AccountKey, span: Window) -> Rho {
        let within = self.commits.values().filter(|committed| {
            span.contains(committed.dated_ms) && self.charged_to(committed).is_some_and(|key| key == account)
        });
        // Parts of what the account has spent.
        within.fold(Rho::ZERO, |sum, committed| add(sum, committed.entry.event.rho))
    }

    /// What is left of a window's limit on an account; open reservations count, whenever they will be used.
    #[must_use]
    pub fn left_within(&self, key: &AccountKey, limit: &WindowLimit, now_ms: i64) -> Rho {
        let reserved = self.accounts.get(key).map_or(Rho::ZERO, |account| account.reserved);
        let spent = self.spent_within(key, Window::ending(self.dated(now_ms), limit.length_ms));
        limit.rho.saturating_sub(spent).saturating_sub(reserved)
    }

    /// Whether an entry may come next. Changes nothing.
    ///
    /// # Errors
    /// The refusal the entry meets.
    pub fn admit(&self, entry: &Entry) -> Result<(), LedgerError> {
        entry.check_fields()?;
        match entry {
            Entry::Grant(grant) => admit_grant(grant),
            Entry::Reserve(reserve) => self.admit_reserve(reserve),
            Entry::Commit(commit) => self.admit_commit(commit),
            Entry::Refund(refund) => self.admit_refund(refund),
            Entry::Refuse(_) => Ok(()),
            Entry::Derive(derive) => self.admit_derive(derive),
        }
    }

    /// Adds an entry that [`Self::admit`] allowed.
    ///
    /// # Errors
    /// As [`Self::admit`]; the state is unchanged then.
    pub fn apply(&mut self, seq: u64, hash: Digest, entry: &Entry) -> Result<(), LedgerError> {
        self.admit(entry)?;
        self.reproducible |= entry.reproducible();
        let dated_ms = self.dated(entry.time_ms());
        self.latest_ms = Some(dated_ms);
        match entry {
            Entry::Grant(grant) => {
                let key = self.origin_of(&key_of(grant));
                self.products.insert(grant.product.clone(), key.clone());
                self.accounts.entry(key).or_default().grants.insert(grant.product.clone(), grant.clone());
            }
            Entry::Reserve(reserve) => {
                let (key, _) = self.account_of(&reserve.product).ok_or_else(|| no_grant(&reserve.product))?;
                let account = key.clone();
                self.move_reserved(&account, reserve.rho, Rho::ZERO);
                self.charges.insert(reserve.reservation, account.clone());
                self.last_reservation = reserve.reservation;
                let open = OpenReservation { entry: reserve.clone(), account, committed: Rho::ZERO };
                self.reservations.insert(reserve.reservation, open);
            }
            Entry::Commit(commit) => self.apply_commit(seq, hash, dated_ms, commit),
            Entry::Refund(refund) => {
                if let Some(open) = self.reservations.remove(&refund.reservation) {
                    self.move_reserved(&open.account, Rho::ZERO, refund.rho);
                }
            }
            Entry::Refuse(_) => {}
            Entry::Derive(derive) => {
                let (source, origin) = keys_of(derive);
                self.origins.insert(source, origin);
            }
        }
        Ok(())
    }

    fn admit_reserve(&self, reserve: &Reserve) -> Result<(), LedgerError> {
        let (key, account) = self.account_of(&reserve.product).ok_or_else(|| no_grant(&reserve.product))?;
        if reserve.rho > account.left() {
            return Err(LedgerError::OverBudget { asked: reserve.rho, left: account.left() });
        }
        // As the account's limit is the smallest of its grants, so every window of one of them holds.
        for limit in account.grants.values().filter_map(|grant| grant.window.as_ref()) {
            let left = self.left_within(key, limit, reserve.time_ms);
            if reserve.rho > left {
                let (asked, length_ms) = (reserve.rho, limit.length_ms);
                return Err(LedgerError::OverWindow { asked, left, length_ms });
            }
        }
        if Some(reserve.reservation) == self.last_reservation.checked_add(1) {
            Ok(())
        } else {
            Err(LedgerError::NotReserved { reservation: reserve.reservation })
        }
    }

    fn admit_commit(&self, commit: &Commit) -> Result<(), LedgerError> {
        commit.event.check()?;
        let open = self.open(commit.reservation)?;
        if open.entry.purpose != commit.purpose {
            return Err(LedgerError::NotReserved { reservation: commit.reservation });
        }
        if commit.event.rho > open.left() {
            return Err(LedgerError::OverReserved { asked: commit.event.rho, left: open.left() });
        }
        Ok(())
    }

    fn admit_refund(&self, refund: &Refund) -> Result<(), LedgerError> {
        let left = self.open(refund.reservation)?.left();
        if refund.rho == left { Ok(()) } else { Err(LedgerError::OverReserved { asked: refund.rho, left }) }
    }

    // A source with an account keeps it: moving what was spent would need both owners' figures.
    fn admit_derive(&self, derive: &Derive) -> Result<(), LedgerError> {
        let (source, origin) = keys_of(derive);
        let taken = self.accounts.contains_key(&source) || self.origins.contains_key(&source);
        if taken || self.origin_of(&origin) == source {
            let (lineage, derived_from) = (derive.lineage.clone(), derive.derived_from.clone());
            return Err(LedgerError::Lineage { lineage, derived_from });
        }
        Ok(())
    }

    fn open(&self, reservation: u64) -> Result<&OpenReservation, LedgerError> {
        self.reservations.get(&reservation).ok_or(LedgerError::NotReserved { reservation })
    }

    fn apply_commit(&mut self, seq: u64, hash: Digest, dated_ms: i64, commit: &Commit) {
        let Some(open) = self.reservations.get_mut(&commit.reservation) else { return };
        let rho = commit.event.rho;
        open.committed = add(open.committed, rho);
        let account = open.account.clone();
        let (product, plan_digest) = (open.entry.product.clone(), open.entry.plan_digest.clone());
        self.move_reserved(&account, Rho::ZERO, rho);
        if let Some(account) = self.accounts.get_mut(&account) {
            account.spent = add(account.spent, rho);
            let by_purpose = account.spent_by.entry(commit.purpose).or_default();
            *by_purpose = add(*by_purpose, rho);
        }
        self.queries.insert(commit.query_digest, commit.payload_digest);
        let committed = Committed { seq, hash, dated_ms, entry: commit.clone(), product, plan_digest };
        self.commits.insert(commit.payload_digest, committed);
    }

    fn move_reserved(&mut self, account: &AccountKey, up: Rho, down: Rho) {
        if let Some(account) = self.accounts.get_mut(account) {
            account.reserved = add(account.reserved, up).saturating_sub(down);
        }
    }
}

// The account a grant is for.
fn key_of(grant: &Grant) -> AccountKey {
    AccountKey { entity_namespace: grant.entity_namespace.clone(), lineage: grant.lineage.clone() }
}

// The new source and the one it came from.
fn keys_of(derive: &Derive) -> (AccountKey, AccountKey) {
    let key = |lineage: &String| AccountKey {
        entity_namespace: derive.entity_namespace.clone(),
        lineage: lineage.clone(),
    };
    (key(&derive.lineage), key(&derive.derived_from))
}

/// ε of a loss at the grant's δ; nothing where nothing was spent.
#[must_use]
pub fn epsilon_of(rho: Rho, grant: &Grant) -> Option<Epsilon> {
    (rho > Rho::ZERO).then(|| zcdp::epsilon(rho, grant.delta))
}

fn admit_grant(grant: &Grant) -> Result<(), LedgerError> {
    if grant.rho > Rho::ZERO
        && zcdp::epsilon(grant.rho, grant.delta).get() > grant.epsilon.get() * (1.0 + 1e-9)
    {
        return Err(LedgerError::GrantTooLarge { rho: grant.rho, epsilon: grant.epsilon });
    }
    let Some(WindowLimit { length_ms, epsilon, rho }) = grant.window else { return Ok(()) };
    if !(1..=MAX_WINDOW_MS).contains(&length_ms) {
        let reason = format!("expected a length of 1 to {MAX_WINDOW_MS} ms, got {length_ms}");
        return Err(LedgerError::Window { reason });
    }
    if epsilon > grant.epsilon {
        let reason = format!("its epsilon {epsilon} is above the lifetime's {}", grant.epsilon);
        return Err(LedgerError::Window { reason });
    }
    if rho > Rho::ZERO && zcdp::epsilon(rho, grant.delta).get() > epsilon.get() * (1.0 + 1e-9) {
        return Err(LedgerError::GrantTooLarge { rho, epsilon });
    }
    Ok(())
}

fn no_grant(product: &str) -> LedgerError {
    LedgerError::NoGrant { product: product.to_owned() }
}

// Unwrap safety: admission keeps spent + reserved at or below a grant, which is one u64.
fn add(a: Rho, b: Rho) -> Rho {
    a.checked_add(b).expect("admitted sums stay below the grant")
}

//! Views of what was spent: by time window, by entity namespace, and against thresholds. Pure functions of a [`State`].
//!
//! A budget is for a source's lifetime; windows show how fast it goes and print the lifetime figure beside their own. The
//! unit and adjacency are those of the grants (add or remove one unit), the loss is ρ, and whoever keeps the ledger is
//! trusted to have recorded every release.

use super::state::{AccountKey, State};
use crate::accountant::zcdp;
use crate::budget::{Delta, Epsilon, Rho};
use std::collections::BTreeSet;

/// A span of time: from `from_ms` on, before `until_ms`. Milliseconds since 1970, UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// First millisecond.
    pub from_ms: i64,
    /// The first after.
    pub until_ms: i64,
}

impl Window {
    /// The window of a given length that ends with `now_ms`, that millisecond included.
    #[must_use]
    pub fn ending(now_ms: i64, length_ms: u64) -> Self {
        let until_ms = now_ms.saturating_add(1);
        Self { from_ms: until_ms.saturating_sub_unsigned(length_ms), until_ms }
    }

    /// Whether a time lies within.
    #[must_use]
    pub fn contains(&self, time_ms: i64) -> bool {
        (self.from_ms..self.until_ms).contains(&time_ms)
    }
}

/// What was spent in a window, and ever.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spending {
    /// Committed within the window.
    pub window: Rho,
    /// Committed ever.
    pub lifetime: Rho,
    /// ε of the window; nothing where nothing was spent.
    pub epsilon_window: Option<Epsilon>,
    /// ε ever. Not the sum of the windows' figures: only ρ adds up.
    pub epsilon_lifetime: Option<Epsilon>,
}

/// What one account spent in a window and ever, as ε at `delta`.
///
/// A commit counts where its own time says; a clock that went back moves it between windows, never out of the lifetime.
#[must_use]
pub fn spending(state: &State, account: &AccountKey, window: Window, delta: Delta) -> Spending {
    let account = state.origin_of(account);
    let mut within = Rho::ZERO;
    for committed in state.commits.values() {
        let charged = state.charged_to(committed).is_some_and(|key| *key == account);
        if charged && window.contains(committed.entry.time_ms) {
            within = plus(within, committed.entry.event.rho);
        }
    }
    let lifetime = state.accounts.get(&account).map_or(Rho::ZERO, |account| account.spent);
    let epsilon = |rho: Rho| (rho > Rho::ZERO).then(|| zcdp::epsilon(rho, delta));
    Spending {
        window: within,
        lifetime,
        epsilon_window: epsilon(within),
        epsilon_lifetime: epsilon(lifetime),
    }
}

/// The loss of one unit of a namespace over all its sources: the sum, because a unit may be in every one.
///
/// Sources that their owners declared to have no unit in common (`disjoint`, signed by both; checking that is the
/// caller's) count once, with the largest loss among them.
#[must_use]
pub fn headline(state: &State, entity_namespace: &str, disjoint: &[BTreeSet<AccountKey>]) -> Rho {
    let mut left: BTreeSet<&AccountKey> =
        state.accounts.keys().filter(|key| key.entity_namespace == entity_namespace).collect();
    let spent = |key: &AccountKey| state.accounts.get(key).map_or(Rho::ZERO, |account| account.spent);
    let mut total = Rho::ZERO;
    for group in disjoint {
        // A source is part of one group at most: the first that names it.
        let group: Vec<&AccountKey> = left.iter().copied().filter(|key| group.contains(*key)).collect();
        total = plus(total, group.iter().map(|key| spent(key)).max().unwrap_or(Rho::ZERO));
        group.iter().for_each(|key| {
            left.remove(key);
        });
    }
    left.iter().fold(total, |total, key| plus(total, spent(key)))
}

/// A share of a budget at which somebody wants to hear; in percent, 1 to 100.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Threshold(u8);

impl Threshold {
    /// Wraps a percentage.
    ///
    /// Nothing for 0 or above 100.
    #[must_use]
    pub fn new(percent: u8) -> Option<Self> {
        (1..=100).contains(&percent).then_some(Self(percent))
    }

    /// The percentage.
    #[must_use]
    pub fn percent(self) -> u8 {
        self.0
    }

    /// Whether a loss has reached this share of a grant; exact. Of a grant of nothing every share is reached.
    #[must_use]
    pub fn reached(self, loss: Rho, granted: Rho) -> bool {
        u128::from(loss.units()) * 100 >= u128::from(granted.units()) * u128::from(self.0)
    }
}

/// The thresholds that a change of the loss from `before` to `after` reaches, lowest first: each alert once.
#[must_use]
pub fn crossed(thresholds: &[Threshold], before: Rho, after: Rho, granted: Rho) -> Vec<Threshold> {
    let new =
        |threshold: &&Threshold| threshold.reached(after, granted) && !threshold.reached(before, granted);
    let found: BTreeSet<Threshold> = thresholds.iter().filter(new).copied().collect();
    found.into_iter().collect()
}

// Saturating: a sum over accounts may pass what one grant can hold, and must then stay at the top.
fn plus(a: Rho, b: Rho) -> Rho {
    a.checked_add(b).unwrap_or(Rho::from_units(u64::MAX))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::super::{Account, MemoryJournal};
    use super::*;
    use crate::ledger::Ledger;
    use crate::ledger::tests::{grant, payload, plan};

    fn key(lineage: &str) -> AccountKey {
        AccountKey { entity_namespace: "customers".to_owned(), lineage: lineage.to_owned() }
    }

    #[test]
    fn windows_count_commits_by_their_time_and_print_the_lifetime_beside() {
        let mut ledger = Ledger::open(MemoryJournal::default()).unwrap();
        ledger.grant(grant("p", "db.table", 3.0), 1).unwrap();
        ledger.grant(grant("q", "db.other", 3.0), 1).unwrap();
        let mut costs = Vec::new();
        for (product, query, time) in [("p", 1, 1_000), ("p", 2, 5_000), ("q", 3, 5_000), ("p", 4, 9_999)] {
            let reservation =
                ledger.reserve(plan(&format!("{query}"), product, Rho::from_units(1 << 36)), time).unwrap();
            let (bytes, request) = payload(Rho::from_units(1 << (30 + query)), query);
            costs.push(request.event.rho);
            ledger.commit(&reservation, request, &bytes, time).unwrap();
            // A closed plan's commits still count.
            ledger.close(&reservation, time).unwrap();
        }
        let delta = Delta::new(1e-5).unwrap();
        let at = |window| spending(ledger.state(), &key("db.table"), window, delta);
        let last = at(Window::ending(9_999, 5_000));
        assert_eq!(last.window, plus(costs[1], costs[3]), "from 5000 to 9999, both included");
        assert_eq!(last.lifetime, plus(plus(costs[0], costs[1]), costs[3]));
        assert!(last.epsilon_window.unwrap() < last.epsilon_lifetime.unwrap());
        assert_eq!(at(Window::ending(9_999, 4_999)).window, costs[3]);
        let none = at(Window { from_ms: 20_000, until_ms: 30_000 });
        assert_eq!((none.window, none.epsilon_window), (Rho::ZERO, None));
        assert_eq!(at(Window::ending(i64::MAX, u64::MAX)).window, last.lifetime);
        assert_eq!(
            spending(ledger.state(), &key("elsewhere"), Window::ending(9_999, 99), delta).lifetime,
            Rho::ZERO
        );
    }

    #[test]
    fn a_namespace_sums_its_sources_unless_they_are_declared_disjoint() {
        let mut state = State::default();
        for (lineage, units) in [("a", 5), ("b", 7), ("c", 11)] {
            let account = Account { spent: Rho::from_units(units), ..Account::default() };
            state.accounts.insert(key(lineage), account);
        }
        let other = AccountKey { entity_namespace: "shops".to_owned(), lineage: "a".to_owned() };
        state.accounts.insert(other, Account { spent: Rho::from_units(1000), ..Account::default() });
        let set = |keys: &[&str]| keys.iter().map(|lineage| key(lineage)).collect::<BTreeSet<_>>();
        let total = |disjoint: &[BTreeSet<AccountKey>]| headline(&state, "customers", disjoint).units();
        assert_eq!(total(&[]), 23);
        assert_eq!(total(&[set(&["a", "b"])]), 7 + 11);
        assert_eq!(total(&[set(&["a", "b", "c"])]), 11);
        assert_eq!(total(&[set(&["a", "b"]), set(&["b", "c"])]), 7 + 11, "a source is in one group only");
        assert_eq!(total(&[set(&["nowhere"])]), 23);
    }

    #[test]
    fn each_threshold_is_crossed_once_and_exactly() {
        let thresholds: Vec<Threshold> = [50, 80, 95, 80].into_iter().filter_map(Threshold::new).collect();
        let granted = Rho::from_units(1_000);
        let mut heard = Vec::new();
        let mut before = Rho::ZERO;
        for units in [499, 500, 500, 799, 960, 1_000] {
            let after = Rho::from_units(units);
            heard.push(
                crossed(&thresholds, before, after, granted).iter().map(|t| t.percent()).collect::<Vec<_>>(),
            );
            before = after;
        }
        assert_eq!(heard, [vec![], vec![50], vec![], vec![], vec![80, 95], vec![]]);
        assert!(
            Threshold::new(0).is_none() && Threshold::new(101).is_none() && Threshold::new(100).is_some()
        );
        assert!(Threshold::new(100).unwrap().reached(Rho::from_units(u64::MAX), Rho::from_units(u64::MAX)));
        assert!(Threshold::new(1).unwrap().reached(Rho::ZERO, Rho::ZERO), "nothing is left of nothing");
    }
}

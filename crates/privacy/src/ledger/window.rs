//! Views of what was spent: by time window, and against thresholds. Pure functions of a [`State`].
//!
//! A budget is for a source's lifetime; windows show how fast it goes and print the lifetime figure beside their own. The
//! unit and adjacency are those of the grants (add or remove one unit), the loss is ρ, and whoever keeps the ledger is
//! trusted to have recorded every release, with a clock that doesn't run ahead. If it did, what was recorded then stays within
//! the window until the clock has come past that date by the window's length: too little is admitted, never too much.
//!
//! A grant may limit its pace ([`super::WindowLimit`]). That is enforced when a plan reserves: what was spent in the window
//! that ends then, what is reserved and what is asked must stay within the limit. So it holds for every window of that
//! length: what is committed in one after the last reservation was reserved then, and what was committed before lies in
//! the window that was looked at.

use super::entry::WindowLimit;
use super::state::State;
use crate::budget::Rho;
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

/// Where a product's account stands in the window that its grant sets.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Standing {
    /// The limit.
    pub limit: WindowLimit,
    /// The window that ends now, in the ledger's time.
    pub window: Window,
    /// Committed within it.
    pub spent: Rho,
    /// What a plan may ask for by every window that is set on the account: of other products of its source too.
    pub left: Rho,
    /// When the oldest of what was spent within it has left it, UTC milliseconds; nothing where nothing was spent.
    pub frees_ms: Option<i64>,
}

impl Standing {
    /// Spent within the window or reserved: what a plan may not ask for any more.
    #[must_use]
    pub fn charged(&self) -> Rho {
        self.limit.rho.saturating_sub(self.left)
    }
}

/// Where a product's account stands in its grant's window; nothing without one.
#[must_use]
pub fn standing(state: &State, product: &str, now_ms: i64) -> Option<Standing> {
    let (key, account) = state.account_of(product)?;
    let limit = account.grants.get(product)?.window?;
    let window = Window::ending(state.dated(now_ms), limit.length_ms);
    let own = |committed: &&super::Committed| state.charged_to(committed) == Some(key);
    let dates = state.commits.values().filter(own).map(|committed| committed.dated_ms);
    let oldest = dates.filter(|dated_ms| window.contains(*dated_ms)).min();
    let limits = account.grants.values().filter_map(|grant| grant.window.as_ref());
    let left = limits.map(|limit| state.left_within(key, limit, now_ms)).min()?;
    Some(Standing {
        limit,
        window,
        spent: state.spent_within(key, window),
        left,
        frees_ms: oldest.map(|dated_ms| dated_ms.saturating_add_unsigned(limit.length_ms)),
    })
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

/// Longest window of a grant: ten years, in milliseconds.
pub const MAX_WINDOW_MS: u64 = 3_660 * DAY_MS;
/// A day, in milliseconds.
pub const DAY_MS: u64 = 24 * 3_600 * 1_000;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::super::{Entry, LedgerError, MemoryJournal, Pace, RefusalRule, replay};
    use super::*;
    use crate::budget::Epsilon;
    use crate::ledger::Ledger;
    use crate::ledger::tests::{grant, payload, plan};
    use proptest::prelude::*;

    const QUARTER_MS: u64 = 91 * DAY_MS;

    /// A ledger whose product `p` has ε = 3 for ever and ε = 1 within any quarter.
    fn paced() -> (Ledger<MemoryJournal>, Rho) {
        let mut ledger = Ledger::open(MemoryJournal::default()).unwrap();
        let pace = Pace { length_ms: QUARTER_MS, epsilon: Epsilon::new(1.0).unwrap() };
        ledger.grant_at_pace(grant("p", "db.table", 3.0), Some(pace), 0).unwrap();
        let limit = standing(ledger.state(), "p", 0).unwrap().limit;
        assert!(limit.rho < ledger.balance("p").unwrap().granted);
        (ledger, limit.rho)
    }

    fn plus(a: Rho, b: Rho) -> Rho {
        a.checked_add(b).unwrap()
    }

    /// Reserves, commits as much as one event of at most `rho` takes, and closes; what it cost.
    fn spend(
        ledger: &mut Ledger<MemoryJournal>,
        query: u8,
        rho: Rho,
        time_ms: i64,
    ) -> Result<Rho, LedgerError> {
        let reservation = ledger.reserve(plan(&format!("{query}"), "p", rho), time_ms)?;
        let (bytes, request) = payload(rho, query);
        let cost = request.event.rho;
        ledger.commit(&reservation, request, &bytes, time_ms)?;
        ledger.close(&reservation, time_ms)?;
        Ok(cost)
    }

    #[test]
    fn a_window_admits_its_limit_and_not_one_unit_more() {
        let (mut ledger, limit) = paced();
        let more = Rho::from_units(limit.units() + 1);
        let refused = ledger.reserve(plan("a", "p", more), 10);
        assert_eq!(refused, Err(LedgerError::OverWindow { asked: more, left: limit, length_ms: QUARTER_MS }));
        let all = ledger.reserve(plan("b", "p", limit), 11).unwrap();
        // What is reserved counts, whenever it will be used.
        let one = Rho::from_units(1);
        let full = Err(LedgerError::OverWindow { asked: one, left: Rho::ZERO, length_ms: QUARTER_MS });
        assert_eq!(ledger.reserve(plan("c", "p", one), 12 + 2 * QUARTER_MS as i64), full);
        ledger.close(&all, 13).unwrap();
        assert!(ledger.reserve(plan("d", "p", one), 14 + 2 * QUARTER_MS as i64).is_ok());
        let rules =
            ledger.entries().iter().filter_map(|entry| match Entry::from_json(&entry.payload).unwrap() {
                Entry::Refuse(refuse) => Some(refuse.rule),
                _ => None,
            });
        assert_eq!(rules.collect::<Vec<_>>(), [RefusalRule::OverWindow, RefusalRule::OverWindow]);
    }

    /// A refresh gives time, not privacy: each debit leaves the window by itself, the lifetime keeps it.
    #[test]
    fn what_was_spent_leaves_the_window_to_the_millisecond_and_never_the_lifetime() {
        let (mut ledger, limit) = paced();
        let (at, quarter) = (1_000, QUARTER_MS as i64);
        let spent = spend(&mut ledger, 1, limit, at).unwrap();
        let stood = standing(ledger.state(), "p", at).unwrap();
        assert_eq!((stood.spent, stood.left), (spent, limit.saturating_sub(spent)));
        assert_eq!(stood.frees_ms, Some(at + quarter));
        // One millisecond early, then on time.
        let early = ledger.reserve(plan("2", "p", limit), at + quarter - 1);
        assert!(matches!(early, Err(LedgerError::OverWindow { .. })), "{early:?}");
        assert_eq!(standing(ledger.state(), "p", at + quarter).unwrap().left, limit);
        let mut total = spent;
        for quarters in 1_u8..30 {
            let time_ms = at + i64::from(quarters) * quarter;
            match spend(&mut ledger, 1 + quarters, limit, time_ms) {
                Ok(cost) => total = plus(total, cost),
                // The lifetime's limit ends it, with the window empty.
                Err(error) => {
                    assert!(matches!(error, LedgerError::OverBudget { .. }), "{error}");
                    assert_eq!(standing(ledger.state(), "p", time_ms).unwrap().left, limit);
                    let balance = ledger.balance("p").unwrap();
                    assert_eq!(balance.spent, total);
                    assert!(plus(balance.spent, limit) > balance.granted && balance.spent <= balance.granted);
                    assert!(balance.epsilon_spent.unwrap() <= balance.grant.epsilon);
                    return;
                }
            }
        }
        panic!("the lifetime has room for fewer windows than these");
    }

    #[test]
    fn a_clock_that_goes_back_frees_nothing_and_hides_nothing() {
        let (mut ledger, limit) = paced();
        let (at, quarter) = (10 * QUARTER_MS as i64, QUARTER_MS as i64);
        let half = limit.share(1, 2);
        spend(&mut ledger, 1, half, at).unwrap();
        // Back by five quarters: the debit of the future still counts, and a debit made now counts as late as that one.
        for back in [at - 5 * quarter, 0, i64::MIN] {
            let refused = ledger.reserve(plan("x", "p", limit), back);
            assert!(matches!(refused, Err(LedgerError::OverWindow { .. })), "{refused:?}");
        }
        spend(&mut ledger, 2, half, at - 5 * quarter).unwrap();
        assert!(matches!(
            ledger.reserve(plan("y", "p", half), at + quarter - 1),
            Err(LedgerError::OverWindow { .. })
        ));
        assert!(ledger.reserve(plan("y", "p", half), at + quarter).is_ok());
        // Whoever reads the entries comes to the same.
        assert_eq!(replay(ledger.entries()).unwrap(), *ledger.state());
    }

    /// Two products of one source, one with a tighter window: what stands as left is what a plan of either would get.
    #[test]
    fn the_tightest_window_of_a_source_is_what_is_left() {
        let (mut ledger, limit) = paced();
        let pace = Pace { length_ms: DAY_MS, epsilon: Epsilon::new(0.5).unwrap() };
        ledger.grant_at_pace(grant("q", "db.table", 3.0), Some(pace), 0).unwrap();
        let of = |product: &str| standing(ledger.state(), product, 1).unwrap();
        let (loose, tight) = (of("p"), of("q"));
        assert!(tight.limit.rho < limit && loose.limit.rho == limit);
        assert_eq!((loose.left, tight.left), (tight.limit.rho, tight.limit.rho));
        let more = Rho::from_units(loose.left.units() + 1);
        assert!(matches!(ledger.reserve(plan("a", "p", more), 2), Err(LedgerError::OverWindow { .. })));
        assert!(ledger.reserve(plan("b", "p", loose.left), 3).is_ok());
    }

    #[test]
    fn windows_that_cannot_be_are_refused() {
        let mut ledger = Ledger::open(MemoryJournal::default()).unwrap();
        let mut granted = |length_ms: u64, epsilon: f64| {
            let pace = Pace { length_ms, epsilon: Epsilon::new(epsilon).unwrap() };
            ledger.grant_at_pace(grant("p", "db.table", 3.0), Some(pace), 0).map(drop)
        };
        assert!(granted(MAX_WINDOW_MS, 3.0).is_ok() && granted(1, 0.5).is_ok());
        for (length_ms, epsilon) in [(0, 1.0), (MAX_WINDOW_MS + 1, 1.0), (DAY_MS, 3.001)] {
            let refused = granted(length_ms, epsilon);
            assert!(matches!(refused, Err(LedgerError::Window { .. })), "{refused:?}");
        }
        // One that states more than its epsilon buys isn't believed by a reader either.
        let entries = ledger.entries().to_vec();
        let stated = String::from_utf8(entries.last().unwrap().payload.clone()).unwrap();
        let Entry::Grant(mut generous) = Entry::from_json(stated.as_bytes()).unwrap() else {
            panic!("a grant")
        };
        let window = generous.window.as_mut().unwrap();
        window.rho = Rho::from_units(2 * window.rho.units());
        let refused = State::default().admit(&Entry::Grant(generous));
        assert!(matches!(refused, Err(LedgerError::GrantTooLarge { .. })), "{refused:?}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        /// The naive twin: no span of a window's length, wherever it begins, holds more than the limit.
        #[test]
        fn no_window_anywhere_holds_more_than_its_limit(
            steps in prop::collection::vec((1_u64..60, -20_i64..70, any::<bool>()), 1..24)
        ) {
            let (mut ledger, limit) = paced();
            let day = DAY_MS as i64;
            let (mut now, mut open) = (0_i64, Vec::new());
            for (number, (percent, days, closes)) in steps.into_iter().enumerate() {
                now += days * day;
                let query = u8::try_from(number).unwrap();
                if let Ok(reservation) = ledger.reserve(plan(&format!("{number}"), "p", limit.share(percent, 100)), now) {
                    open.push((query, reservation));
                }
                // Some reservations are used long after they were made, or never.
                if closes && let Some((query, reservation)) = open.pop() {
                    let (bytes, request) = payload(reservation.rho(), query);
                    ledger.commit(&reservation, request, &bytes, now).unwrap();
                    ledger.close(&reservation, now).unwrap();
                }
            }
            let commits: Vec<(i64, u64)> = ledger
                .state()
                .commits
                .values()
                .map(|committed| (committed.dated_ms, committed.entry.event.rho.units()))
                .collect();
            for (begins, _) in &commits {
                let within = commits.iter().filter(|(at, _)| (*begins..begins + QUARTER_MS as i64).contains(at));
                let sum: u64 = within.map(|(_, units)| *units).sum();
                prop_assert!(sum <= limit.units(), "{sum} of {}", limit.units());
            }
        }
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

//! Every order in which plans that compete for one budget can take the ledger's lock, by a model checker (loom).
//!
//! Agents hold one lock around one call. What can go wrong lies between calls: a reservation made on a balance that
//! another thread has changed, a refund of what was committed meanwhile. The checker runs all orders, and the control, a
//! budget that looks and takes under two locks, shows that it would find one.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use loom::sync::{Arc, Mutex, MutexGuard};
use loom::thread;

use super::tests::{grant, payload, plan};
use super::{Ledger, LedgerError, MemoryJournal, replay};
use crate::budget::Rho;

type Shared = Arc<Mutex<Ledger<MemoryJournal>>>;

/// The ledger under its lock, held to its law on the way in.
fn lawful(ledger: &Shared) -> MutexGuard<'_, Ledger<MemoryJournal>> {
    let held = ledger.lock().unwrap();
    let balance = held.balance("p").unwrap();
    let charged = balance.spent.units() + balance.reserved.units();
    assert!(charged <= balance.granted.units(), "{charged} of {}", balance.granted.units());
    held
}

/// A plan that wants three fifths of the budget, spends two fifths of it, and gives the rest back. What it spent, or nothing if
/// it was refused.
fn run(ledger: &Shared, number: u8, granted: Rho) -> Option<Rho> {
    let asked = granted.share(3, 5);
    let reserved = lawful(ledger).reserve(plan(&format!("plan {number}"), "p", asked), 2);
    let reservation = match reserved {
        Ok(reservation) => reservation,
        Err(LedgerError::OverBudget { .. }) => return None,
        Err(error) => panic!("{error}"),
    };
    let (bytes, request) = payload(granted.share(2, 5), number);
    let cost = request.event.rho;
    let receipt = lawful(ledger).commit(&reservation, request, &bytes, 3).unwrap();
    assert!(receipt.covers(&bytes));
    let back = lawful(ledger).close(&reservation, 4).unwrap();
    assert_eq!(back, asked.saturating_sub(cost), "all that it didn't use, and nothing of another's");
    Some(cost)
}

#[test]
fn in_every_order_plans_spend_what_they_reserved_and_no_more() {
    static ORDERS: AtomicUsize = AtomicUsize::new(0);
    static BOTH: AtomicBool = AtomicBool::new(false);
    static ONE: AtomicBool = AtomicBool::new(false);
    loom::model(|| {
        ORDERS.fetch_add(1, Ordering::Relaxed);
        let mut ledger = Ledger::open(MemoryJournal::default()).unwrap();
        let granted = ledger.grant(grant("p", "db.table", 3.0), 1).unwrap();
        let ledger = Arc::new(Mutex::new(ledger));
        let other = Arc::clone(&ledger);
        let second = thread::spawn(move || run(&other, 2, granted));
        let first = run(&ledger, 1, granted);
        let second = second.join().unwrap();
        let spent = first.map_or(0, Rho::units) + second.map_or(0, Rho::units);
        let ledger = lawful(&ledger);
        let balance = ledger.balance("p").unwrap();
        assert_eq!((balance.spent.units(), balance.reserved), (spent, Rho::ZERO));
        assert!(first.is_some() || second.is_some(), "nobody is refused for nothing");
        assert_eq!(replay(ledger.entries()).unwrap(), *ledger.state());
        // One after the other both fit; side by side one is refused.
        let both = if first.is_some() && second.is_some() { &BOTH } else { &ONE };
        both.store(true, Ordering::Relaxed);
    });
    assert!(
        ORDERS.load(Ordering::Relaxed) > 10 && BOTH.load(Ordering::Relaxed) && ONE.load(Ordering::Relaxed)
    );
}

/// The control: looks at what is left under one lock and takes it under the next.
#[test]
fn the_checker_finds_a_budget_that_looks_before_it_takes() {
    static OVERSPENT: AtomicBool = AtomicBool::new(false);
    loom::model(|| {
        let spent = Arc::new(Mutex::new(0_u32));
        let take = |spent: &Mutex<u32>| {
            let fits = *spent.lock().unwrap() + 3 <= 5;
            if fits {
                *spent.lock().unwrap() += 3;
            }
        };
        let other = Arc::clone(&spent);
        let second = thread::spawn(move || take(&other));
        take(&spent);
        second.join().unwrap();
        if *spent.lock().unwrap() > 5 {
            OVERSPENT.store(true, Ordering::Relaxed);
        }
    });
    assert!(OVERSPENT.load(Ordering::Relaxed));
}

//! Tests of the ledger: the order of spending, crashes, failures, and a naive twin under random interleavings.
#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::mechanism::{DiscreteGaussian, EventShape, Noise};
use proptest::prelude::*;
use rand::SeedableRng;
use rand_chacha::ChaCha20Rng;

/// A journal whose next append can be made to fail, before or after it has taken effect.
#[derive(Default)]
struct Flaky {
    inner: MemoryJournal,
    fail: Option<Failure>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Failure {
    BeforeWrite,
    AfterWrite,
}

impl Journal for Flaky {
    fn append(&mut self, payload: &[u8]) -> Result<ChainedEntry, JournalError> {
        let failed = JournalError { reason: "disk".to_owned() };
        match self.fail.take() {
            None => self.inner.append(payload),
            Some(Failure::BeforeWrite) => Err(failed),
            Some(Failure::AfterWrite) => self.inner.append(payload).and(Err(failed)),
        }
    }

    fn replay(&mut self) -> Result<Vec<ChainedEntry>, JournalError> {
        self.inner.replay()
    }
}

pub(super) fn grant(product: &str, lineage: &str, epsilon: f64) -> GrantRequest {
    GrantRequest {
        product: product.to_owned(),
        entity_namespace: "customers".to_owned(),
        lineage: lineage.to_owned(),
        unit: "customer".to_owned(),
        epsilon: Epsilon::new(epsilon).unwrap(),
        delta: Delta::new(1e-5).unwrap(),
        signer: "owner".to_owned(),
    }
}

pub(super) fn plan(digest: &str, product: &str, rho: Rho) -> PlanRequest {
    PlanRequest {
        plan_digest: digest.to_owned(),
        product: product.to_owned(),
        purpose: Purpose::Release,
        rho,
        approvals: vec![],
        planned: vec![],
    }
}

/// A payload of two coordinates and its commit request, for at most `rho`.
pub(super) fn payload(rho: Rho, query: u8) -> (Private<Vec<u8>>, CommitRequest) {
    let mechanism = DiscreteGaussian::from_rho(1 << 20, rho).unwrap();
    let mut rng = ChaCha20Rng::seed_from_u64(u64::from(query));
    let bytes = mechanism.privatize(&[3, 4], &mut rng).encode();
    let event = mechanism.event(EventShape { rows_per_unit: 1, marginals: 1, dimension: 2 });
    (bytes, CommitRequest { event, step: 1, query_digest: [query; 32] })
}

fn ledger() -> Ledger<MemoryJournal> {
    let mut ledger = Ledger::open(MemoryJournal::default()).unwrap();
    ledger.grant(grant("p", "db.table", 3.0), 1).unwrap();
    ledger
}

#[test]
fn a_plan_runs_from_reserve_to_refund() {
    let mut ledger = ledger();
    let granted = ledger.balance("p").unwrap().granted;
    let half = granted.share(1, 2);
    let reservation = ledger.reserve(plan("d", "p", half), 2).unwrap();
    assert_eq!(ledger.balance("p").unwrap().left, granted.saturating_sub(half));

    let (bytes, request) = payload(half.share(1, 3), 7);
    let spent = request.event.rho;
    let receipt = ledger.commit(&reservation, request, &bytes, 3).unwrap();
    assert!(receipt.covers(&bytes) && receipt.seq() == 2);
    assert_eq!((receipt.product(), receipt.plan_digest(), receipt.step()), ("p", "d", 1));
    let balance = ledger.balance("p").unwrap();
    assert_eq!((balance.spent, balance.reserved), (spent, half.saturating_sub(spent)));

    assert_eq!(ledger.close(&reservation, 4).unwrap(), half.saturating_sub(spent));
    assert_eq!(ledger.close(&reservation, 5).unwrap(), Rho::ZERO, "closing twice changes nothing");
    let balance = ledger.balance("p").unwrap();
    assert_eq!((balance.spent, balance.reserved), (spent, Rho::ZERO));
    assert_eq!(balance.epsilon_spent, balance.epsilon_charged);
    assert!(balance.epsilon_spent.unwrap() < Epsilon::new(3.0).unwrap());
    let (late, request) = payload(half.share(1, 3), 8);
    assert_eq!(
        ledger.commit(&reservation, request, &late, 6),
        Err(LedgerError::NotReserved { reservation: 1 })
    );
}

#[test]
fn the_grant_is_a_wall_and_refusals_are_on_record() {
    let mut ledger = ledger();
    let granted = ledger.balance("p").unwrap().granted;
    let first = granted.share(2, 3);
    ledger.reserve(plan("a", "p", first), 2).unwrap();
    let left = granted.saturating_sub(first);
    let asked = Rho::from_units(left.units() + 1);
    assert_eq!(ledger.reserve(plan("b", "p", asked), 3), Err(LedgerError::OverBudget { asked, left }));
    ledger.reserve(plan("c", "p", left), 4).unwrap();
    assert_eq!(ledger.balance("p").unwrap().left, Rho::ZERO);
    assert_eq!(
        ledger.reserve(plan("x", "unknown", asked), 5),
        Err(LedgerError::NoGrant { product: "unknown".to_owned() })
    );
    let rules: Vec<RefusalRule> = ledger
        .entries()
        .iter()
        .filter_map(|entry| match Entry::from_json(&entry.payload).unwrap() {
            Entry::Refuse(refuse) => Some(refuse.rule),
            _ => None,
        })
        .collect();
    assert_eq!(rules, [RefusalRule::OverBudget, RefusalRule::NoGrant]);
}

#[test]
fn renaming_a_product_or_asking_twice_gives_no_fresh_budget() {
    let mut ledger = ledger();
    let granted = ledger.balance("p").unwrap().granted;
    ledger.reserve(plan("a", "p", granted), 2).unwrap();
    ledger.grant(grant("p-v2", "db.table", 3.0), 3).unwrap();
    assert_eq!(ledger.balance("p-v2").unwrap().left, Rho::ZERO, "same source, same namespace: same account");
    ledger.grant(grant("q", "db.other", 3.0), 4).unwrap();
    assert_eq!(ledger.balance("q").unwrap().left, granted, "another source has its own");

    let entries = ledger.entries().len();
    ledger.grant(grant("q", "db.other", 3.0), 5).unwrap();
    assert_eq!(ledger.entries().len(), entries, "an unchanged grant isn't written again");
    let again = ledger.reserve(plan("a", "p", granted), 6).unwrap();
    assert_eq!((again.id(), ledger.entries().len()), (1, entries), "an open plan isn't charged twice");
    let other = Rho::from_units(1);
    assert_eq!(
        ledger.reserve(plan("a", "p", other), 7),
        Err(LedgerError::PlanReserved { plan_digest: "a".to_owned(), reserved: granted })
    );
}

#[test]
fn a_split_or_moved_source_keeps_its_account() {
    let key =
        |lineage: &str| AccountKey { entity_namespace: "customers".to_owned(), lineage: lineage.to_owned() };
    let mut ledger = ledger();
    let granted = ledger.balance("p").unwrap().granted;
    ledger.reserve(plan("a", "p", granted.share(1, 2)), 2).unwrap();
    // The table is split in two, and one half is moved once more.
    ledger.derive(&key("db.table_a"), "db.table", "owner", 3).unwrap();
    ledger.derive(&key("db.table_b"), "db.table", "owner", 3).unwrap();
    ledger.derive(&key("lake/table_b"), "db.table_b", "owner", 4).unwrap();
    for (product, lineage) in [("pa", "db.table_a"), ("pb", "db.table_b"), ("pb-v2", "lake/table_b")] {
        ledger.grant(grant(product, lineage, 3.0), 5).unwrap();
        let balance = ledger.balance(product).unwrap();
        assert_eq!(balance.account, key("db.table"), "{product}");
        assert_eq!(balance.left, granted.saturating_sub(granted.share(1, 2)), "{product}");
    }
    let left = ledger.balance("pb-v2").unwrap().left;
    ledger.reserve(plan("b", "pb-v2", left), 6).unwrap();
    assert_eq!(ledger.balance("p").unwrap().left, Rho::ZERO, "what a half spends is spent for the whole");

    let entries = ledger.entries().len();
    ledger.derive(&key("db.table_a"), "db.table", "owner", 7).unwrap();
    assert_eq!(ledger.entries().len(), entries, "saying the same again writes nothing");
    ledger.grant(grant("q", "db.other", 3.0), 8).unwrap();
    let refused = |lineage: &str, derived_from: &str| {
        Err(LedgerError::Lineage { lineage: lineage.to_owned(), derived_from: derived_from.to_owned() })
    };
    // No way out of an account: not by another origin, not for a source that has spent, not in a circle.
    for (source, origin) in [
        ("db.table_a", "db.other"),
        ("db.other", "db.table"),
        ("db.table", "lake/table_b"),
        ("db.new", "db.new"),
    ] {
        assert_eq!(ledger.derive(&key(source), origin, "owner", 9), refused(source, origin));
    }
    let state = ledger.state.clone();
    assert_eq!(Ledger::open(ledger.into_journal()).unwrap().state, state, "replay rebuilds it");
}

// B2 under concurrency: many plans of the same size race for a budget that holds only some of them.
#[test]
fn threads_racing_for_the_last_of_a_budget_overspend_nothing() {
    const THREADS: usize = 64;
    let ledger = ledger();
    let granted = ledger.balance("p").unwrap().granted;
    let each = granted.share(1, 10);
    let fits = (granted.units() / each.units()) as usize;
    let ledger = std::sync::Mutex::new(ledger);
    let start = std::sync::Barrier::new(THREADS);
    let run = &|thread: usize| {
        start.wait();
        let digest = format!("plan {thread}");
        let reservation = match ledger.lock().unwrap().reserve(plan(&digest, "p", each), 2) {
            Ok(reservation) => reservation,
            Err(LedgerError::OverBudget { .. }) => return None,
            Err(other) => panic!("{other}"),
        };
        // Another thread may come in between every two steps.
        let (bytes, request) = payload(each, thread as u8);
        Some(ledger.lock().unwrap().commit(&reservation, request, &bytes, 3).unwrap().event().rho)
    };
    let spent: Vec<Rho> = std::thread::scope(|scope| {
        #[allow(clippy::needless_collect, reason = "all threads start before the first is waited for")]
        let threads: Vec<_> = (0..THREADS).map(|thread| scope.spawn(move || run(thread))).collect();
        threads.into_iter().filter_map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(spent.len(), fits, "all that fits is given, and no more");
    let ledger = ledger.into_inner().unwrap();
    let balance = ledger.balance("p").unwrap();
    assert_eq!(balance.spent.units(), spent.iter().map(|rho| rho.units()).sum::<u64>());
    assert!(balance.spent.units() + balance.reserved.units() <= granted.units());
    assert!(balance.left < each);
    let refusals = ledger.entries().len() - 1 - 2 * fits;
    assert_eq!(refusals, THREADS - fits, "every refusal is on record");
    assert_eq!(Ledger::open(ledger.into_journal()).unwrap().balance("p").unwrap(), balance);
}

#[test]
fn a_lowered_grant_stops_new_plans() {
    let mut ledger = ledger();
    let granted = ledger.balance("p").unwrap().granted;
    ledger.reserve(plan("a", "p", granted.share(9, 10)), 2).unwrap();
    ledger.grant(grant("p", "db.table", 1.0), 3).unwrap();
    assert_eq!(ledger.balance("p").unwrap().left, Rho::ZERO);
    assert!(matches!(
        ledger.reserve(plan("b", "p", Rho::from_units(1)), 4),
        Err(LedgerError::OverBudget { .. })
    ));
    let reopened = Ledger::open(ledger.into_journal()).unwrap();
    assert_eq!(reopened.balance("p").unwrap().left, Rho::ZERO);
}

#[test]
fn events_that_do_not_add_up_are_not_charged() {
    let mut ledger = ledger();
    let rho = Rho::from_units(1 << 36);
    let reservation = ledger.reserve(plan("a", "p", rho), 2).unwrap();
    let entries = ledger.entries().len();

    let (bytes, mut request) = payload(rho, 1);
    request.event.rho = Rho::from_units(1);
    assert!(matches!(ledger.commit(&reservation, request, &bytes, 3), Err(LedgerError::Mechanism(_))));

    let (bytes, request) = payload(Rho::from_units(2 << 36), 1);
    assert!(matches!(ledger.commit(&reservation, request, &bytes, 3), Err(LedgerError::OverReserved { .. })));

    let (_, request) = payload(rho, 1);
    let short = Private::new(vec![0; 8]);
    assert_eq!(
        ledger.commit(&reservation, request, &short, 3),
        Err(LedgerError::PayloadSize { expected: 16, got: 8 })
    );
    assert_eq!(ledger.entries().len(), entries);

    let (_, request) = payload(rho, 1);
    let mut planned = plan("b", "p", rho);
    planned.planned = vec![request.event.clone(), request.event];
    assert!(matches!(ledger.reserve(planned, 4), Err(LedgerError::OverReserved { .. })));
    assert_eq!(ledger.entries().len(), entries + 1, "the refusal");
}

#[test]
fn a_retry_resends_the_same_bytes_and_an_orphan_gets_nothing() {
    let mut ledger = ledger();
    let rho = Rho::from_units(1 << 36);
    let reservation = ledger.reserve(plan("a", "p", rho), 2).unwrap();
    let (bytes, request) = payload(rho.share(1, 2), 9);
    let (orphan, _) = payload(rho.share(1, 4), 10);
    let receipt = ledger.commit(&reservation, request, &bytes, 3).unwrap();

    let ledger = Ledger::open(ledger.into_journal()).unwrap();
    let found = ledger.find_commit(&[9; 32]).unwrap();
    assert_eq!(found, receipt);
    let (restored, again) = ledger.restore(bytes.as_bytes().to_vec()).unwrap();
    assert_eq!((restored, again), (bytes, receipt));
    assert!(ledger.restore(orphan.into_inner()).is_none());
    assert!(ledger.find_commit(&[10; 32]).is_none());
}

#[test]
fn after_a_crash_a_reservation_stays_charged_until_it_is_refunded() {
    let mut ledger = ledger();
    let rho = ledger.balance("p").unwrap().granted.share(1, 2);
    ledger.reserve(plan("a", "p", rho), 2).unwrap();
    let mut ledger = Ledger::open(ledger.into_journal()).unwrap();
    assert_eq!(ledger.balance("p").unwrap().reserved, rho);
    let open = ledger.open_reservations();
    assert_eq!(open.len(), 1);
    assert_eq!(ledger.refund(&open[0], 3).unwrap(), rho);
    assert_eq!(ledger.balance("p").unwrap().reserved, Rho::ZERO);
}

#[test]
fn a_failed_append_changes_nothing_and_stops_the_ledger() {
    for failure in [Failure::BeforeWrite, Failure::AfterWrite] {
        let mut ledger = Ledger::open(Flaky::default()).unwrap();
        ledger.grant(grant("p", "t", 3.0), 1).unwrap();
        let before = ledger.state.clone();
        ledger.journal.fail = Some(failure);
        let rho = Rho::from_units(1 << 30);
        assert!(matches!(ledger.reserve(plan("a", "p", rho), 2), Err(LedgerError::Journal(_))));
        assert_eq!(ledger.state, before);
        assert_eq!(ledger.reserve(plan("b", "p", rho), 3), Err(LedgerError::Stopped));

        // What was stored after all is charged once the ledger is opened again.
        let reopened = Ledger::open(ledger.into_journal()).unwrap();
        let stored = if failure == Failure::AfterWrite { rho } else { Rho::ZERO };
        assert_eq!(reopened.balance("p").unwrap().reserved, stored);
    }
}

#[test]
fn a_journal_that_returns_another_entry_is_not_trusted() {
    struct Forging(MemoryJournal);
    impl Journal for Forging {
        fn append(&mut self, payload: &[u8]) -> Result<ChainedEntry, JournalError> {
            let mut entry = self.0.append(payload)?;
            entry.seq += 1;
            Ok(entry)
        }
        fn replay(&mut self) -> Result<Vec<ChainedEntry>, JournalError> {
            self.0.replay()
        }
    }
    let mut ledger = Ledger::open(Forging(MemoryJournal::default())).unwrap();
    assert_eq!(ledger.grant(grant("p", "t", 3.0), 1), Err(LedgerError::Chain { seq: 0 }));
    assert_eq!(ledger.grant(grant("p", "t", 3.0), 1), Err(LedgerError::Stopped));
}

#[test]
fn a_record_that_breaks_the_rules_is_not_opened() {
    let ledger = ledger();
    let granted = ledger.balance("p").unwrap().granted;
    let unlawful = |entry: Entry| {
        let mut journal = MemoryJournal::default();
        for entry in ledger.entries() {
            journal.append(&entry.payload).unwrap();
        }
        journal.append(&entry.to_json()).unwrap();
        Ledger::open(journal).err().unwrap()
    };
    let reserve = Reserve {
        time_ms: 2,
        reproducible: false,
        reservation: 1,
        plan_digest: "d".to_owned(),
        product: "p".to_owned(),
        purpose: Purpose::Round,
        rho: Rho::from_units(granted.units() + 1),
        approvals: vec![],
    };
    assert!(matches!(unlawful(Entry::Reserve(reserve.clone())), LedgerError::Unlawful { seq: 1, .. }));
    let skipped = Reserve { reservation: 2, rho: granted, ..reserve };
    assert!(matches!(unlawful(Entry::Reserve(skipped)), LedgerError::Unlawful { seq: 1, .. }));
    let refund = Refund { time_ms: 2, reproducible: false, reservation: 1, rho: granted };
    assert!(matches!(unlawful(Entry::Refund(refund)), LedgerError::Unlawful { seq: 1, .. }));
    let mut generous = match Entry::from_json(&ledger.entries()[0].payload).unwrap() {
        Entry::Grant(grant) => grant,
        other => panic!("{other:?}"),
    };
    generous.rho = Rho::from_units(generous.rho.units() * 2);
    assert!(matches!(unlawful(Entry::Grant(generous)), LedgerError::Unlawful { seq: 1, .. }));
}

#[test]
fn reproducible_noise_taints_entries_receipts_and_the_ledger() {
    let mut ledger = Ledger::open_reproducible(MemoryJournal::default()).unwrap();
    ledger.grant(grant("p", "t", 3.0), 1).unwrap();
    let rho = Rho::from_units(1 << 36);
    let reservation = ledger.reserve(plan("a", "p", rho), 2).unwrap();
    let (bytes, request) = payload(rho, 1);
    assert!(ledger.commit(&reservation, request, &bytes, 3).unwrap().reproducible());
    assert!(ledger.entries().iter().all(|e| Entry::from_json(&e.payload).unwrap().reproducible()));
    assert!(Ledger::open(ledger.into_journal()).unwrap().reproducible(), "the taint survives a restart");
}

// The naive twin: keeps the list of what happened and adds it up from the start for every question.
#[derive(Default)]
struct Twin {
    granted: [u64; 2],
    /// (product, reserved, committed, open)
    plans: Vec<(usize, u64, u64, bool)>,
}

impl Twin {
    fn charged(&self, product: usize) -> u64 {
        self.plans
            .iter()
            .filter(|plan| plan.0 == product)
            .map(|(_, reserved, committed, open)| if *open { *reserved } else { *committed })
            .sum()
    }

    fn spent(&self, product: usize) -> u64 {
        self.plans.iter().filter(|plan| plan.0 == product).map(|plan| plan.2).sum()
    }
}

#[derive(Debug, Clone)]
enum Op {
    Grant(usize, u8),
    Reserve(usize, u64),
    Commit(usize, u64),
    Refund(usize),
    Restart,
    FailNext,
}

fn op() -> impl Strategy<Value = Op> {
    let units = (1u64 << 31)..(1u64 << 37);
    prop_oneof![
        1 => (0usize..2, 0u8..3).prop_map(|(product, level)| Op::Grant(product, level)),
        4 => (0usize..2, units.clone()).prop_map(|(product, units)| Op::Reserve(product, units)),
        6 => (0usize..8, units).prop_map(|(plan, units)| Op::Commit(plan, units)),
        2 => (0usize..8).prop_map(Op::Refund),
        1 => Just(Op::Restart),
        1 => Just(Op::FailNext),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    // B1 and B2 under random interleavings of plans, failures and restarts, against the twin.
    #[test]
    fn spending_never_exceeds_the_grant_and_always_equals_the_twin(ops in prop::collection::vec(op(), 1..60)) {
        const PRODUCTS: [&str; 2] = ["p", "q"];
        let mut ledger = Ledger::open(Flaky::default()).unwrap();
        let mut twin = Twin::default();
        let mut receipts = 0;
        for (n, op) in ops.into_iter().enumerate() {
            let time = n as i64;
            match op {
                Op::Grant(product, level) => {
                    let epsilon = [0.5, 1.0, 3.0][usize::from(level)];
                    if let Ok(rho) = ledger.grant(grant(PRODUCTS[product], PRODUCTS[product], epsilon), time) {
                        twin.granted[product] = rho.units();
                    }
                }
                Op::Reserve(product, units) => {
                    let may = twin.charged(product) + units <= twin.granted[product];
                    match ledger.reserve(plan(&format!("{n}"), PRODUCTS[product], Rho::from_units(units)), time) {
                        Ok(_) => {
                            prop_assert!(may);
                            twin.plans.push((product, units, 0, true));
                        }
                        Err(LedgerError::Journal(_) | LedgerError::Stopped) => {}
                        Err(_) => prop_assert!(!may),
                    }
                }
                Op::Commit(index, units) => {
                    let Some(reservation) = ledger.open_reservations().into_iter().find(|r| r.id() == index as u64 + 1)
                    else {
                        continue;
                    };
                    let (bytes, request) = payload(Rho::from_units(units), n as u8);
                    let cost = request.event.rho.units();
                    let plan = &mut twin.plans[index];
                    match ledger.commit(&reservation, request, &bytes, time) {
                        Ok(receipt) => {
                            prop_assert!(plan.2 + cost <= plan.1);
                            plan.2 += cost;
                            receipts += 1;
                            prop_assert!(receipt.covers(&bytes));
                            // B1: durable when the receipt exists.
                            prop_assert!(ledger.journal.inner.replay().unwrap().iter().any(|e| e.hash == *receipt.hash()));
                        }
                        Err(LedgerError::Journal(_) | LedgerError::Stopped) => {}
                        Err(_) => prop_assert!(plan.2 + cost > plan.1),
                    }
                }
                Op::Refund(index) => {
                    let found = ledger.open_reservations().into_iter().find(|r| r.id() == index as u64 + 1);
                    if let Some(reservation) = found && ledger.refund(&reservation, time).is_ok() {
                        twin.plans[index].3 = false;
                    }
                }
                Op::Restart => {
                    let state = ledger.state.clone();
                    let stopped = ledger.stopped;
                    let mut journal = ledger.into_journal();
                    journal.fail = None;
                    ledger = Ledger::open(journal).unwrap();
                    prop_assert!(stopped || ledger.state == state, "replay rebuilds the state");
                }
                Op::FailNext => {
                    // Only failures before the write here: the twin can't know what a lying disk kept.
                    ledger.journal.fail = Some(Failure::BeforeWrite);
                }
            }
            for (product, name) in PRODUCTS.iter().enumerate() {
                let Some(balance) = ledger.balance(name) else { continue };
                prop_assert_eq!(balance.spent.units(), twin.spent(product));
                prop_assert_eq!(balance.spent.units() + balance.reserved.units(), twin.charged(product));
                prop_assert_eq!(balance.left.units(), twin.granted[product].saturating_sub(twin.charged(product)));
            }
        }
        prop_assert_eq!(ledger.state.commits.len(), receipts);
    }
}

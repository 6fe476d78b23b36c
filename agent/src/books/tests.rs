//! What the books promise: nothing sent that isn't debited, nothing debited twice, and budgets that follow their source.

use std::collections::BTreeMap;

use rand::SeedableRng;
use tabmesh_federation::id::{CollectionId, Digest as NamedDigest, PlanDigest};
use tabmesh_federation::secagg::graph::Topology;
use tabmesh_federation::secagg::mask::{RingVector, Width};
use tabmesh_federation::secagg::noise::NoisePlan;
use tabmesh_federation::secagg::setup;
use tabmesh_privacy::budget::{Delta, Epsilon};
use tabmesh_privacy::mechanism::ThresholdHistogram;

use super::*;

const PLAN: &str = "aa";

fn books(folder: &Path) -> Books {
    Books::open(folder, NoiseSource::Seeded { seed: 7 }, "spiffe://t/agent/a/b", "a.b").unwrap()
}

fn reopened(folder: &Path) -> Books {
    books(folder)
}

fn granted(folder: &Path) -> Books {
    let mut books = books(folder);
    books.grant(request(), None, None, 1).unwrap();
    books
}

fn request() -> GrantRequest {
    GrantRequest {
        product: "a.b".into(),
        entity_namespace: "person".into(),
        lineage: "a.parquet".into(),
        unit: "row".into(),
        epsilon: Epsilon::new(3.0).unwrap(),
        delta: Delta::new(1e-5).unwrap(),
        signer: "owner".into(),
    }
}

fn rho(value: f64) -> Rho {
    Rho::from_f64_round_down(value).unwrap()
}

fn ask(mechanism: &DiscreteGaussian, digest: u8) -> Question<'_> {
    let shape = EventShape { rows_per_unit: 1, marginals: 1, dimension: 3 };
    Question { plan: PLAN, purpose: Purpose::Release, step: 1, digest: [digest; 32], mechanism, shape }
}

#[test]
fn a_retry_resends_the_same_bytes_and_spends_nothing_even_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let mut books = granted(folder.path());
    books.reserve(PLAN, Purpose::Release, rho(0.02), vec![], 2).unwrap();
    let mechanism = DiscreteGaussian::from_rho(1, rho(0.01)).unwrap();
    let (first, receipt) = books.answer(&ask(&mechanism, 1), &[10, 20, 30], 3).unwrap();
    let spent = books.balance().unwrap().spent;
    let (again, _) = books.answer(&ask(&mechanism, 1), &[99, 99, 99], 4).unwrap();
    assert_eq!(first.as_bytes(), again.as_bytes());
    drop(books);
    let books = reopened(folder.path());
    let (stored, same) = books.answered(&[1; 32]).unwrap().unwrap();
    assert_eq!((stored.as_bytes(), same.seq()), (first.as_bytes(), receipt.seq()));
    assert_eq!(books.balance().unwrap().spent, spent);
}

#[test]
fn rows_are_in_a_release_once_they_were_counted_by_label() {
    let folder = tempfile::tempdir().unwrap();
    assert!(!was_in_release(folder.path(), PLAN).unwrap(), "no ledger yet");
    let mut books = granted(folder.path());
    books.reserve(PLAN, Purpose::Release, rho(0.02), vec![], 2).unwrap();
    books.reserve(PLAN, Purpose::Round, rho(0.02), vec![], 2).unwrap();
    let mechanism = DiscreteGaussian::from_rho(1, rho(0.01)).unwrap();
    let both = |books: &Books| (books.in_release(PLAN), was_in_release(folder.path(), PLAN).unwrap());
    books.answer(&ask(&mechanism, 1), &[1, 2, 3], 3).unwrap();
    assert_eq!(both(&books), (false, false), "stage 1 doesn't count by label");
    let round = Question { purpose: Purpose::Round, step: 2, ..ask(&mechanism, 2) };
    books.answer(&round, &[1, 2, 3], 4).unwrap();
    assert_eq!(both(&books), (false, false), "a second round is no second stage");
    books.answer(&Question { step: 2, ..ask(&mechanism, 3) }, &[1, 2, 3], 5).unwrap();
    assert_eq!(both(&books), (true, true));
    books.close(PLAN, 6).unwrap();
    assert_eq!(both(&books), (true, true), "it stays so after the plan");
    assert!(!books.in_release("bb"));
}

/// A moved table keeps what was spent on it; under the same name no other table gets a budget of its own.
#[test]
fn a_budget_follows_its_source_and_not_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let mut books = granted(folder.path());
    books.reserve(PLAN, Purpose::Release, rho(0.02), vec![], 2).unwrap();
    let mechanism = DiscreteGaussian::from_rho(1, rho(0.01)).unwrap();
    books.answer(&ask(&mechanism, 1), &[1, 2, 3], 3).unwrap();
    let spent = books.balance().unwrap().spent;
    let of = |lineage: &str, namespace: &str| GrantRequest {
        entity_namespace: namespace.into(),
        lineage: lineage.into(),
        ..request()
    };
    let entries = books.entries().len();
    let refused = books.grant(of("b.parquet", "person"), None, None, 4).unwrap_err();
    assert!(refused.to_string().contains("derived_from: \"a.parquet\""), "{refused}");
    let other = books.grant(of("a.parquet", "household"), None, None, 5);
    assert!(matches!(other, Err(BooksError::OtherSource { .. })));
    let unknown = books.grant(of("b.parquet", "person"), None, Some("c.parquet"), 6).unwrap_err();
    assert!(unknown.to_string().contains("it has a.parquet"), "{unknown}");
    assert_eq!(books.entries().len(), entries, "nothing was written");

    books.grant(of("b.parquet", "person"), None, Some("a.parquet"), 7).unwrap();
    assert_eq!(books.balance().unwrap().spent, spent);
    // Said again at each start; and moved once more, from what it was called last.
    books.grant(of("b.parquet", "person"), None, Some("a.parquet"), 8).unwrap();
    assert_eq!(books.entries().len(), entries + 2, "the origin and the grant");
    books.grant(of("c.parquet", "person"), None, Some("b.parquet"), 9).unwrap();
    drop(books);
    let mut books = reopened(folder.path());
    assert_eq!(books.balance().unwrap().spent, spent);
    books.grant(of("a.parquet", "person"), None, Some("a.parquet"), 10).unwrap();
    assert_eq!(books.balance().unwrap().spent, spent);
}

/// What was spent per row isn't what an entity of many rows lost; the other way about it is more than a row did.
#[test]
fn a_unit_that_what_was_spent_does_not_speak_of_is_refused() {
    let of = |unit: &str| GrantRequest { product: "a.c".into(), unit: unit.into(), ..request() };
    let folder = tempfile::tempdir().unwrap();
    let mut books = granted(folder.path());
    // Nothing is spent yet: the owner may still think better of it.
    books.grant(of("customer, at most 5 rows"), None, None, 2).unwrap();
    books.grant(of("row"), None, None, 3).unwrap();
    books.reserve(PLAN, Purpose::Release, rho(0.02), vec![], 4).unwrap();
    let entries = books.entries().len();
    let refused = books.grant(of("customer, at most 5 rows"), None, None, 5).unwrap_err();
    assert!(refused.to_string().contains("counted per row"), "{refused}");
    assert_eq!(books.entries().len(), entries, "nothing was written");

    assert!(still_covers("customer, at most 5 rows", "row"));
    assert!(still_covers("customer, at most 5 rows", "customer, at most 9 rows"));
    assert!(!still_covers("customer, at most 5 rows", "household, at most 5 rows"));
    assert!(!still_covers("row", "customer, at most 1 rows"));
}

#[test]
fn levels_are_debited_once_and_told_again_for_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mut books = granted(folder.path());
    let histogram = ThresholdHistogram::from_rho(1, rho(0.02)).unwrap();
    let counts = || Ok(BTreeMap::from([("berlin".to_owned(), 500), ("one".to_owned(), 1)]));
    let first = books.levels("city", &histogram, counts, 2).unwrap();
    let found: tabmesh_privacy::mechanism::FoundLevels = serde_json::from_slice(&first).unwrap();
    assert_eq!(found.levels.iter().map(|(level, _)| level.as_str()).collect::<Vec<_>>(), ["berlin"]);
    let balance = books.balance().unwrap();
    assert_eq!((balance.spent, balance.reserved), (histogram.rho(), Rho::ZERO));
    drop(books);
    let mut books = reopened(folder.path());
    let again = books.levels("city", &histogram, || panic!("the table isn't read again"), 3).unwrap();
    assert_eq!((again, books.balance().unwrap().spent), (first, histogram.rho()));
    // A table that can't be read costs nothing, nor does a question beyond the budget.
    let unread =
        books.levels("town", &histogram, || Err(SourceError::Undeclared { contract: "a".into() }), 4);
    assert!(matches!(unread, Err(BooksError::Source(_))));
    books.reserve(PLAN, Purpose::Release, rho(0.19), vec![], 5).unwrap();
    let dear = ThresholdHistogram::from_rho(1, rho(0.5)).unwrap();
    let counts = || Ok(BTreeMap::new());
    assert!(matches!(books.levels("town", &dear, counts, 5), Err(BooksError::Ledger(_))));
    assert_eq!(books.balance().unwrap().spent, histogram.rho());
    // What a threshold takes isn't there in a much smaller delta, nor paid for under a larger epsilon.
    for (epsilon, delta) in [(3.0, 1e-10), (21.0, 1e-5)] {
        let (epsilon, delta) = (Epsilon::new(epsilon).unwrap(), Delta::new(delta).unwrap());
        let refused = books.grant(GrantRequest { epsilon, delta, ..request() }, None, None, 6);
        assert!(matches!(refused, Err(BooksError::Thresholds { used: 1, .. })), "{refused:?}");
    }
    // Every grant of the account has to bear it, another product's too.
    let rich = GrantRequest { product: "a.c".into(), epsilon: Epsilon::new(21.0).unwrap(), ..request() };
    let other = tempfile::tempdir().unwrap();
    let mut books = granted(other.path());
    books.grant(rich, None, None, 7).unwrap();
    let refused = books.levels("city", &histogram, counts, 8);
    assert!(
        matches!(&refused, Err(BooksError::Thresholds { product, .. }) if product == "a.c"),
        "{refused:?}"
    );
}

#[test]
fn an_orphaned_payload_is_deleted_and_never_sent() {
    let folder = tempfile::tempdir().unwrap();
    drop(granted(folder.path()));
    let payloads = BlobStore::open(&folder.path().join("payloads")).unwrap();
    let orphan = payloads.put(b"noised but never committed").unwrap();
    drop(payloads);
    let books = reopened(folder.path());
    assert!(!books.payloads.contains(&orphan));
}

#[test]
fn more_than_the_reservation_is_refused_and_leaves_no_payload() {
    let folder = tempfile::tempdir().unwrap();
    let mut books = granted(folder.path());
    books.reserve(PLAN, Purpose::Release, rho(0.015), vec![], 2).unwrap();
    let mechanism = DiscreteGaussian::from_rho(1, rho(0.01)).unwrap();
    books.answer(&ask(&mechanism, 1), &[1, 2, 3], 3).unwrap();
    let refused = books.answer(&ask(&mechanism, 2), &[1, 2, 3], 4);
    assert!(matches!(refused, Err(BooksError::Ledger(LedgerError::OverReserved { .. }))), "{refused:?}");
    assert_eq!(books.payloads.list().unwrap().len(), 1);
}

/// A sum of five agents over three values at ρ = 0.01.
fn sum(rho: Rho) -> SumDescriptor {
    let noise = NoisePlan::for_cost(1 << 20, rho, 5, 1, 1).unwrap();
    SumDescriptor {
        collection: CollectionId::new(1, &mut ChaCha20Rng::seed_from_u64(1), None),
        attempt: 1,
        payload: NamedDigest::of(b"query"),
        model: NamedDigest::of(b"model"),
        plan: PlanDigest::of(b"plan"),
        roster: NamedDigest::of(b"roster"),
        dimension: 3,
        width: Width::Bits64,
        max_abs: 1 << 40,
        l2_sensitivity_squared: 1 << 20,
        noise,
        threshold: 4,
        topology: Topology::Complete,
        opened_ms: 0,
        step_s: 10,
        log_head: NamedDigest::of(b"head"),
    }
}

#[test]
fn a_contribution_is_debited_under_the_digest_of_its_masked_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let mut books = granted(folder.path());
    books.reserve(PLAN, Purpose::Round, rho(0.015), vec![], 2).unwrap();
    let descriptor = sum(rho(0.01));
    let shape = EventShape { rows_per_unit: 1, marginals: 0, dimension: 3 };
    let event = setup::event(&descriptor, 5, shape).unwrap();
    let digest = *NamedDigest::of(&descriptor.to_bytes()).as_bytes();
    let ask = |digest: Digest| SumQuestion {
        plan: PLAN,
        purpose: Purpose::Round,
        step: 0,
        descriptor: &descriptor,
        digest,
        event: event.clone(),
    };
    // Whatever fails before the debit leaves neither entry nor payload.
    let entries = books.entries().len();
    let failed = books
        .contribute(&ask(digest), &[1, 2, 3], 3, |_| Err::<Private<Vec<u8>>, BooksError>(NoEntropy.into()));
    assert!(matches!(failed, Err(BooksError::Entropy(_))));
    assert_eq!((books.entries().len(), books.payloads.list().unwrap().len()), (entries, 0));

    let mask = RingVector::Wide(vec![11, 22, 33]);
    let masked = |contribution: &Contribution| {
        assert_eq!(contribution.debit(), entries as u64);
        Ok::<_, BooksError>(contribution.masked(&mask, &descriptor).unwrap())
    };
    let (payload, receipt) = books.contribute(&ask(digest), &[1, 2, 3], 3, masked).unwrap();
    assert_eq!((receipt.seq(), receipt.event()), (entries as u64, &event));
    assert_eq!(*receipt.payload_digest(), payload.payload_digest());
    assert!(books.debited(&digest));
    drop(books);
    // A restart gives the same bytes, free of charge.
    let mut books = reopened(folder.path());
    let (again, _) = books.answered(&digest).unwrap().unwrap();
    assert_eq!(again.as_bytes(), payload.as_bytes());
    // A second sum is more than was reserved: no debit, no payload.
    let refused = books.contribute(&ask([9; 32]), &[1, 2, 3], 4, |contribution| {
        Ok::<_, BooksError>(contribution.masked(&mask, &descriptor).unwrap())
    });
    assert!(matches!(refused, Err(BooksError::Ledger(LedgerError::OverReserved { .. }))));
    assert_eq!(books.payloads.list().unwrap().len(), 1);
}

#[test]
fn a_plan_over_the_grant_is_refused_and_recorded() {
    let folder = tempfile::tempdir().unwrap();
    let mut books = granted(folder.path());
    let refused = books.reserve(PLAN, Purpose::Round, rho(50.0), vec![], 2);
    assert!(matches!(refused, Err(BooksError::Ledger(LedgerError::OverBudget { .. }))));
    let last = Entry::from_json(&books.entries().last().unwrap().payload).unwrap();
    assert!(matches!(last, Entry::Refuse(_)), "{last:?}");
}

#[test]
fn a_damaged_ledger_is_not_opened() {
    let folder = tempfile::tempdir().unwrap();
    drop(granted(folder.path()));
    let path = folder.path().join(LEDGER);
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    assert!(Books::open(folder.path(), NoiseSource::Seeded { seed: 7 }, "x", "a.b").is_err());
}

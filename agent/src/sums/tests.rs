//! Crashes between any two writes around the masked vector, and states that somebody put back.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::collections::{BTreeMap, BTreeSet};

use rand::rngs::OsRng;
use rand::{SeedableRng, TryRngCore};
use rand_chacha::ChaCha20Rng;
use ring::rand::SystemRandom;
use tabmesh_federation::id::{AgentId, CollectionId, PlanDigest};
use tabmesh_federation::plan::SecureSumSpec;
use tabmesh_federation::secagg::agent::{Entry, Joined};
use tabmesh_federation::secagg::contribution::Contribution;
use tabmesh_federation::secagg::descriptor::SumDescriptor;
use tabmesh_federation::secagg::document::Summed;
use tabmesh_federation::secagg::message::{Advert, AdvertList, Delivery, Step};
use tabmesh_federation::secagg::policy::{Expected, Policy};
use tabmesh_federation::secagg::roster::{Member, Seat};
use tabmesh_federation::secagg::setup::{Attempt, Subject};
use tabmesh_privacy::budget::Rho;

use super::*;

const NOW_MS: i64 = 1_000_500;
const AGENTS: usize = 4;

/// Four agents of one sum; the first one's files are under test.
struct World {
    keys: Vec<Arc<SigningKey>>,
    members: Vec<Member>,
    subject: Subject,
    opening: Opening,
}

impl World {
    fn new() -> Self {
        let key = |_| Arc::new(SigningKey::generate(&SystemRandom::new()).unwrap().1);
        let keys: Vec<Arc<SigningKey>> = (0..AGENTS).map(key).collect();
        let member = |(i, key): (usize, &Arc<SigningKey>)| Member {
            agent: agent_id(i),
            key: key.verifying_key(),
            organisation: format!("domain-{i}"),
        };
        let members: Vec<Member> = keys.iter().enumerate().map(member).collect();
        let summed = Summed::Stage("{}".to_owned());
        let expected = Expected {
            collection: CollectionId::new(NOW_MS, &mut ChaCha20Rng::seed_from_u64(1), None),
            payload: summed.digest(),
            model: Digest::of(b"model"),
            plan: PlanDigest::of(b"plan"),
            dimension: 5,
            l2_sensitivity_squared: 1 << 20,
        };
        let rho = Rho::from_f64_round_down(0.01).unwrap();
        let subject = Subject { expected, rho, plausible: 1 << 20, deadline_s: 60 };
        let spec = SecureSumSpec { colluders: 1, dropouts: 1, retries: 0 };
        let roster = Roster::new(members.clone()).unwrap();
        let descriptor = subject
            .describe(
                spec,
                &roster,
                Attempt { number: 1, opened_ms: 1_000_000, log_head: Digest::of(b"head") },
            )
            .unwrap();
        let descriptor = String::from_utf8(descriptor.to_bytes()).unwrap();
        let opening = Opening { descriptor, summed, roster: (0..AGENTS).map(agent_id).collect() };
        Self { keys, members, subject, opening }
    }

    fn enter(&self, i: usize, guard: Guard) -> (Agent, Prepared<Advert>) {
        let policy = Policy {
            min_agents: 4,
            min_organisations: 4,
            colluders: 1,
            max_attempts: 1,
            max_rho: self.subject.rho,
            max_local_rho: Rho::from_units(u64::MAX),
            min_neighbours: 3,
        };
        let entry = Entry {
            agent: &agent_id(i),
            identity: Arc::clone(&self.keys[i]),
            roster: Arc::new(Roster::new(self.members.clone()).unwrap()),
            policy: &policy,
            expected: &self.subject.expected,
            guard,
        };
        Agent::enter(entry, self.opening.descriptor.as_bytes(), &mut OsRng.unwrap_err(), NOW_MS).unwrap()
    }

    fn contribution(&self, seed: u64) -> Contribution {
        let bytes = self.opening.descriptor.as_bytes();
        let descriptor = SumDescriptor::from_bytes(bytes).unwrap();
        let mut noise = ChaCha20Rng::seed_from_u64(seed);
        Contribution::noised(&[1, 2, 3, 4, 5], &descriptor, Digest::of(bytes), 7, &mut noise).unwrap()
    }

    fn current(&self, store: &SumStore, debited: bool) -> Result<Option<Current>, SumError> {
        let roster = |_: &Opening| Ok(Roster::new(self.members.clone()).unwrap());
        store.current(roster, &self.keys[0], |_| debited)
    }

    /// The first agent's files after it has shared, and the delivery that it is asked to mask for.
    fn shared(&self, store: &SumStore) -> Delivery {
        store.begin(&self.opening).unwrap();
        let (_, advert) = self.enter(0, store.guard().unwrap());
        let mut adverts = vec![store.keep(advert).unwrap()];
        let mut others = BTreeMap::new();
        for i in 1..AGENTS {
            let (agent, advert) = self.enter(i, Guard::default());
            let guard = advert.guard();
            adverts.push(advert.release(guard).unwrap());
            others.insert(i, agent);
        }
        let descriptor = Digest::of(self.opening.descriptor.as_bytes());
        let list = AdvertList { descriptor, adverts };
        let own = Seat::new(0);
        let mut sealed = BTreeMap::new();
        for agent in others.values_mut() {
            let joined = agent.adverts(&list, &mut OsRng.unwrap_err(), NOW_MS).unwrap();
            let guard = joined.guard();
            let Joined::Shares(shares) = joined.release(guard).unwrap() else { panic!("complete") };
            sealed.insert(shares.seat, shares.sealed[&own].clone());
        }
        let mut current = self.current(store, false).unwrap().unwrap();
        let joined = current.agent.adverts(&list, &mut OsRng.unwrap_err(), NOW_MS).unwrap();
        store.keep(joined).unwrap();
        let senders = (0..AGENTS).map(|i| Seat::new(u16::try_from(i).unwrap())).collect();
        Delivery { descriptor, senders, sealed }
    }
}

fn agent_id(i: usize) -> AgentId {
    AgentId::new(format!("spiffe://mesh/tabmesh/agent/domain-{i}/one")).unwrap()
}

fn store(folder: &Path) -> SumStore {
    SumStore::new(folder.join("sums"), folder.join("apart").join("sum.guard"))
}

#[test]
fn a_masked_vector_without_a_debit_is_forgotten_and_made_anew() {
    let (world, folder) = (World::new(), tempfile::tempdir().unwrap());
    let store = store(folder.path());
    let delivery = world.shared(&store);
    let before = store.guard().unwrap();
    let mut current = world.current(&store, false).unwrap().unwrap();
    let (prepared, lost) = current.agent.mask_for_debit(&delivery, &world.contribution(1), NOW_MS).unwrap();
    store.prepare(&prepared).unwrap();
    drop((current, prepared));
    // The crash comes before the ledger's entry.
    let mut current = world.current(&store, false).unwrap().unwrap();
    assert_eq!((current.agent.due(), store.guard().unwrap()), (Some(Step::Mask), before));
    assert!(current.agent.masked_before(&delivery).unwrap().is_none());
    assert!(!store.next_path().exists());
    let (prepared, again) = current.agent.mask_for_debit(&delivery, &world.contribution(2), NOW_MS).unwrap();
    assert_ne!(lost.as_bytes(), again.as_bytes(), "fresh noise");
    store.prepare(&prepared).unwrap();
    let masked = store.debited(prepared).unwrap();
    assert_eq!(masked.payload, again.as_bytes());
    assert_eq!(store.guard().unwrap(), Guard { answers: before.answers + 1, last_debit: 7 });
}

#[test]
fn a_debited_vector_is_taken_over_and_given_again() {
    let (world, folder) = (World::new(), tempfile::tempdir().unwrap());
    let store = store(folder.path());
    let delivery = world.shared(&store);
    let before = store.guard().unwrap();
    let mut current = world.current(&store, false).unwrap().unwrap();
    let (prepared, payload) =
        current.agent.mask_for_debit(&delivery, &world.contribution(1), NOW_MS).unwrap();
    store.prepare(&prepared).unwrap();
    drop((current, prepared));
    // The crash comes after the ledger's entry, before the state is taken over.
    let current = world.current(&store, true).unwrap().unwrap();
    assert_eq!(current.agent.due(), Some(Step::Consent));
    assert_eq!(store.guard().unwrap(), Guard { answers: before.answers + 1, last_debit: 7 });
    let again = current.agent.masked_before(&delivery).unwrap().unwrap();
    assert_eq!(store.keep(again).unwrap().payload, payload.as_bytes());
    // Another delivery for the same sum is a second question.
    let mut other = delivery;
    other.senders.pop();
    let refused = current.agent.masked_before(&other).unwrap_err();
    assert_eq!(refused, Refusal::SecondAnswer { step: Step::Mask });
}

#[test]
fn a_state_that_was_put_back_is_refused_and_a_new_sum_can_be_entered() {
    let (world, folder) = (World::new(), tempfile::tempdir().unwrap());
    let store = store(folder.path());
    let delivery = world.shared(&store);
    let old = std::fs::read(store.state_path()).unwrap();
    let mut current = world.current(&store, false).unwrap().unwrap();
    let (prepared, _) = current.agent.mask_for_debit(&delivery, &world.contribution(1), NOW_MS).unwrap();
    store.prepare(&prepared).unwrap();
    store.debited(prepared).unwrap();
    std::fs::write(store.state_path(), &old).unwrap();
    let refused = world.current(&store, true);
    assert!(
        matches!(refused, Err(SumError::Snapshot(SnapshotError::RolledBack { .. }))),
        "an older state doesn't answer again"
    );
    // Another sum begins with the counter where it was.
    let other = World::new();
    let guard = store.guard().unwrap();
    store.begin(&other.opening).unwrap();
    let (_, advert) = other.enter(0, guard);
    store.keep(advert).unwrap();
    assert_eq!(store.guard().unwrap().answers, guard.answers + 1);
    assert_eq!(other.current(&store, false).unwrap().unwrap().agent.due(), Some(Step::Share));
}

#[test]
fn a_guard_that_lags_or_is_damaged_stops_the_sum() {
    let (world, folder) = (World::new(), tempfile::tempdir().unwrap());
    let store = store(folder.path());
    world.shared(&store);
    std::fs::remove_file(&store.guard).unwrap();
    let refused = world.current(&store, false);
    assert!(matches!(refused, Err(SumError::Snapshot(SnapshotError::GuardBehind { .. }))));
    std::fs::write(&store.guard, b"{").unwrap();
    assert!(matches!(store.guard(), Err(SumError::Damaged { .. })));
    assert!(matches!(world.current(&store, false), Err(SumError::Damaged { .. })));
}

#[test]
fn an_opening_whose_sum_was_never_entered_leaves_no_state() {
    let (world, folder) = (World::new(), tempfile::tempdir().unwrap());
    let store = store(folder.path());
    assert!(world.current(&store, false).unwrap().is_none());
    world.shared(&store);
    // The crash comes after the next sum's opening was written, before its first state.
    let mut next = world.opening.clone();
    next.roster = BTreeSet::new();
    next.descriptor.push(' ');
    store.begin(&next).unwrap();
    assert!(world.current(&store, false).unwrap().is_none());
}

//! A whole sum with a restart after every answer, and answers that are none.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use rand::rngs::OsRng;
use rand::{SeedableRng, TryRngCore};
use ring::rand::SystemRandom;
use tabmesh_federation::id::PlanDigest;
use tabmesh_federation::plan::SecureSumSpec;
use tabmesh_federation::secagg::agent::{Agent, Entry as Entering, Guard, Joined, Prepared};
use tabmesh_federation::secagg::contribution::Contribution;
use tabmesh_federation::secagg::graph::{MAX_COMPLETE, Topology};
use tabmesh_federation::secagg::policy::{Expected, Policy};
use tabmesh_federation::secagg::setup::{Attempt, Subject};
use tabmesh_privacy::budget::Rho;
use tabmesh_privacy::signature::SigningKey;
use tabmesh_store::Memory;

use super::*;

const NOW_MS: i64 = 1_000_500;
const AGENTS: usize = 4;
const VALUES: u32 = 5;

/// The stores of a coordinator, over which it is started again and again.
struct Disk {
    records: Arc<dyn Records>,
    blobs: Arc<BlobStore>,
    packs: Arc<PackStore>,
    _folder: tempfile::TempDir,
}

impl Disk {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let blobs = Arc::new(BlobStore::open(&folder.path().join("blobs")).unwrap());
        let packs = Arc::new(PackStore::open(&folder.path().join("packs")).unwrap());
        Self { records: Arc::new(Memory::new()), blobs, packs, _folder: folder }
    }

    fn started(&self, now_ms: i64) -> Sums {
        let (records, blobs) = (Arc::clone(&self.records), Arc::clone(&self.blobs));
        Sums::new(records, blobs, Arc::clone(&self.packs), Arc::new(move || now_ms))
    }
}

struct World {
    id: CollectionId,
    opened: Opened,
    keys: Vec<Arc<SigningKey>>,
    roster: Arc<Roster>,
    subject: Subject,
}

fn rng(seed: u64) -> rand_chacha::ChaCha20Rng {
    rand_chacha::ChaCha20Rng::seed_from_u64(seed)
}

fn agent_id(i: usize) -> AgentId {
    AgentId::new(format!("spiffe://mesh/tabmesh/agent/domain-{i:03}/one")).unwrap()
}

impl World {
    fn new() -> Self {
        Self::of(AGENTS, 1)
    }

    /// An attempt over so many agents.
    fn of(agents: usize, number: u32) -> Self {
        let key = |_| Arc::new(SigningKey::generate(&SystemRandom::new()).unwrap().1);
        let keys: Vec<Arc<SigningKey>> = (0..agents).map(key).collect();
        let member = |(i, key): (usize, &Arc<SigningKey>)| Member {
            agent: agent_id(i),
            key: key.verifying_key(),
            organisation: format!("domain-{i}"),
        };
        let members: Vec<Member> = keys.iter().enumerate().map(member).collect();
        let roster = Arc::new(Roster::new(members.clone()).unwrap());
        let id = CollectionId::new(NOW_MS, &mut rng(1), None);
        let summed = document::Summed::Stage("{}".to_owned());
        let expected = Expected {
            collection: id,
            payload: summed.digest(),
            model: NamedDigest::of(b"model"),
            plan: PlanDigest::of(b"plan"),
            dimension: VALUES,
            l2_sensitivity_squared: 1 << 20,
        };
        let rho = Rho::from_f64_round_down(0.01).unwrap();
        let subject = Subject { expected, rho, plausible: 1 << 20, deadline_s: 60 };
        let spec = SecureSumSpec { colluders: 1, dropouts: 1, retries: 0 };
        let descriptor = subject
            .describe(
                spec,
                &roster,
                Attempt { number, opened_ms: 1_000_000, log_head: NamedDigest::of(b"head") },
            )
            .unwrap();
        let descriptor = String::from_utf8(descriptor.to_bytes()).unwrap();
        let roster_ids = (0..agents).map(agent_id).collect();
        let opening = document::Opening { descriptor, summed, roster: roster_ids };
        Self { id, opened: Opened { opening, members }, keys, roster, subject }
    }

    fn enter(&self, i: usize) -> (Agent, Reply) {
        let policy = Policy {
            min_agents: 4,
            min_organisations: 4,
            colluders: 1,
            max_attempts: 2,
            max_rho: self.subject.rho,
            max_local_rho: Rho::from_units(u64::MAX),
            min_neighbours: 3,
        };
        let entering = Entering {
            agent: &agent_id(i),
            identity: Arc::clone(&self.keys[i]),
            roster: Arc::clone(&self.roster),
            policy: &policy,
            expected: &self.subject.expected,
            guard: Guard::default(),
        };
        let bytes = self.opened.opening.descriptor.as_bytes();
        let (agent, advert) = Agent::enter(entering, bytes, &mut OsRng.unwrap_err(), NOW_MS).unwrap();
        (agent, Reply::Advert(sent(advert)))
    }

    fn contribution(&self, i: usize) -> Contribution {
        let bytes = self.opened.opening.descriptor.as_bytes();
        let descriptor = SumDescriptor::from_bytes(bytes).unwrap();
        let row = vec![i as i64 * 100; VALUES as usize];
        Contribution::noised(&row, &descriptor, NamedDigest::of(bytes), 1, &mut rng(i as u64)).unwrap()
    }
}

fn sent<M>(prepared: Prepared<M>) -> M {
    let guard = prepared.guard();
    prepared.release(guard).unwrap()
}

fn arrived(opened: &Opened, payload: Vec<u8>) -> Arrived {
    let descriptor = SumDescriptor::from_bytes(opened.opening.descriptor.as_bytes()).unwrap();
    let digest = NamedDigest::of(&payload);
    Arrived { attempt: descriptor.attempt, payload, digest }
}

fn nothing() -> Op {
    Op::delete("outbox/none")
}

/// The request that a seat gets in the current step.
fn request(entry: &Entry, i: usize) -> Option<Request> {
    let seat = Seat::new(u16::try_from(i).unwrap());
    let state = locked(&entry.state);
    let asked = state.asked.iter().find(|(seats, _)| seats.contains(&seat));
    asked.map(|(_, document)| Request::from_bytes(document).unwrap())
}

/// An agent's answer to what it is asked, given to a coordinator that has just started.
fn answer(world: &World, disk: &Disk, agents: &mut BTreeMap<usize, Agent>, i: usize) {
    answer_to(&disk.started(NOW_MS), world, agents, i);
}

/// An agent's answer to what it is asked.
fn answer_to(sums: &Sums, world: &World, agents: &mut BTreeMap<usize, Agent>, i: usize) {
    let entry = sums.resume(world.id).unwrap();
    let reply = match request(&entry, i).unwrap() {
        Request::Advertise(_) => {
            let (agent, advert) = world.enter(i);
            agents.insert(i, agent);
            advert
        }
        Request::Share(list) | Request::Reveal(list) => {
            let agent = agents.get_mut(&i).unwrap();
            match sent(agent.adverts(&list, &mut OsRng.unwrap_err(), NOW_MS).unwrap()) {
                Joined::Shares(shares) => Reply::Shares(shares),
                Joined::Reveal(reveal) => Reply::Revealed(reveal),
            }
        }
        Request::Ring(list) => {
            let agent = agents.get_mut(&i).unwrap();
            Reply::Shares(sent(agent.reveals(&list, &mut OsRng.unwrap_err(), NOW_MS).unwrap()))
        }
        Request::Mask(delivery) => {
            let agent = agents.get_mut(&i).unwrap();
            let masked = sent(agent.mask(&delivery, &world.contribution(i), NOW_MS).unwrap());
            // Twice: a lost receipt is asked for again.
            for _ in 0..2 {
                let arrived = arrived(&world.opened, masked.payload.clone());
                sums.masked(world.id, &agent_id(i), arrived, nothing()).unwrap();
            }
            return;
        }
        Request::Consent(survivors) => {
            let agent = agents.get_mut(&i).unwrap();
            Reply::Consent(sent(agent.consent(&survivors, NOW_MS).unwrap()))
        }
        Request::Open(consents) => {
            Reply::Opened(sent(agents.get_mut(&i).unwrap().open(&consents, NOW_MS).unwrap()))
        }
        Request::Ended(_) => panic!("the end asks for nothing"),
    };
    let next = (i + 1) % world.keys.len();
    let stranger = sums.reply(world.id, &agent_id(next), reply.clone(), nothing());
    assert!(matches!(stranger, Err(Refused::NotYours)), "{stranger:?}");
    for _ in 0..2 {
        sums.reply(world.id, &agent_id(i), reply.clone(), nothing()).unwrap();
    }
}

/// Closes the current step in a coordinator that has just started at this time.
async fn closed(world: &World, disk: &Disk, now_ms: i64) -> Option<AttemptEnd> {
    let sums = disk.started(now_ms);
    let entry = sums.resume(world.id).unwrap();
    sums.advance(&entry).await.unwrap()
}

#[tokio::test]
async fn a_restart_after_every_answer_changes_nothing() {
    let (world, disk) = (World::new(), Disk::new());
    disk.started(NOW_MS).open(world.id, &world.opened, Vec::new()).unwrap();
    restarted_after_every_answer(&world, &disk).await;
}

#[tokio::test]
async fn a_restart_within_a_second_attempt_goes_on_with_that_one() {
    let (first, second, disk) = (World::new(), World::of(AGENTS, 2), Disk::new());
    disk.started(NOW_MS).open(first.id, &first.opened, Vec::new()).unwrap();
    let mut agents = BTreeMap::new();
    for i in 0..2 {
        answer(&first, &disk, &mut agents, i);
    }
    let end = closed(&first, &disk, 1_000_000 + 10_000).await;
    assert!(matches!(end, Some(AttemptEnd::Aborted(_))), "{end:?}");
    disk.started(NOW_MS).open(second.id, &second.opened, Vec::new()).unwrap();
    restarted_after_every_answer(&second, &disk).await;
}

async fn restarted_after_every_answer(world: &World, disk: &Disk) {
    let mut agents = BTreeMap::new();
    let mut end = None;
    for step in STEPS.into_iter().filter(|step| *step != Step::Reveal) {
        for i in 0..AGENTS {
            // The last agent falls silent after it has shared: its masks have to be taken off.
            if i + 1 < AGENTS || step < Step::Mask {
                answer(world, disk, &mut agents, i);
            }
        }
        let now_ms = if step == Step::Mask { 1_000_000 + 40_000 } else { NOW_MS };
        end = closed(world, disk, now_ms).await;
        assert_eq!(end.is_some(), step == Step::Open, "{step}");
    }
    let Some(AttemptEnd::Summed(summed)) = end else { panic!("{end:?}") };
    let mut plain = vec![0; VALUES as usize];
    for i in 0..AGENTS - 1 {
        let own = world.contribution(i);
        plain.iter_mut().zip(own.values().as_slice()).for_each(|(total, value)| *total += value);
    }
    assert_eq!(summed.values, plain);
    assert_eq!(summed.survivors, (0..AGENTS - 1).map(agent_id).collect());
    // The end is on disk; what led to it goes once the result is recorded, and late answers are refused.
    let sums = disk.started(NOW_MS);
    assert!(matches!(sums.ended(world.id).unwrap(), Some(AttemptEnd::Summed(_))));
    sums.discard(world.id).unwrap();
    let left: Vec<String> = disk
        .records
        .scan_all(b"sum/")
        .unwrap()
        .iter()
        .map(|(key, _)| String::from_utf8_lossy(key).into())
        .collect();
    assert!(left.iter().all(|key| !key.contains("/answer/")), "{left:?}");
    assert!(disk.packs.list().unwrap().is_empty());
    let vector = || arrived(&world.opened, vec![0; 40]);
    let late = sums.masked(world.id, &agent_id(0), vector(), nothing());
    assert!(matches!(late, Err(Refused::NotDue { .. })), "{late:?}");
    let unknown = CollectionId::new(NOW_MS + 1, &mut rng(9), None);
    let refused = sums.masked(unknown, &agent_id(0), vector(), nothing());
    assert!(matches!(refused, Err(Refused::Unknown)), "{refused:?}");
    assert!(sums.knows(world.id).unwrap() && !sums.knows(unknown).unwrap());
}

#[tokio::test]
async fn too_few_end_a_sum_by_name_and_a_cancelled_one_says_by_whom() {
    let (world, disk) = (World::new(), Disk::new());
    disk.started(NOW_MS).open(world.id, &world.opened, Vec::new()).unwrap();
    let mut agents = BTreeMap::new();
    for i in 0..2 {
        answer(&world, &disk, &mut agents, i);
    }
    let end = closed(&world, &disk, 1_000_000 + 10_000).await;
    let Some(AttemptEnd::Aborted(aborted)) = end else { panic!("{end:?}") };
    assert_eq!(aborted.cause, "step advertise: expected at least 3 agents, got 2");
    assert_eq!(aborted.left, (0..2).map(agent_id).collect());
    assert_eq!((aborted.attempt, aborted.step, aborted.charged()), (1, Step::Advertise, false));

    let (world, disk) = (World::new(), Disk::new());
    let sums = disk.started(NOW_MS);
    sums.open(world.id, &world.opened, Vec::new()).unwrap();
    sums.cancel_all("ops");
    let end = sums.advance(&sums.resume(world.id).unwrap()).await.unwrap();
    let by = "ops".to_owned();
    assert!(
        matches!(&end, Some(AttemptEnd::Abandoned(AbandonReason::Cancelled { by: b })) if *b == by),
        "{end:?}"
    );
}

#[test]
fn late_foreign_and_forged_answers_are_refused_and_leave_nothing() {
    let (world, disk) = (World::new(), Disk::new());
    disk.started(NOW_MS).open(world.id, &world.opened, Vec::new()).unwrap();
    let (_, advert) = world.enter(0);
    let late = disk.started(1_000_000 + 10_000);
    late.resume(world.id).unwrap();
    let refused = late.reply(world.id, &agent_id(0), advert.clone(), nothing()).unwrap_err();
    assert_eq!(refused.wire(), WireError::DeadlinePassed);
    let sums = disk.started(NOW_MS);
    sums.resume(world.id).unwrap();
    let Reply::Advert(mut forged) = advert.clone() else { panic!("an advert") };
    forged.seed_commitment = NamedDigest::of(b"another");
    let refused = sums.reply(world.id, &agent_id(0), Reply::Advert(forged), nothing()).unwrap_err();
    assert_eq!(refused.wire(), WireError::Signature);
    let vector = || arrived(&world.opened, vec![0; 40]);
    let refused = sums.masked(world.id, &agent_id(0), vector(), nothing());
    assert_eq!(refused.unwrap_err().wire(), WireError::StalePlan);
    let other = Arrived { attempt: 2, ..vector() };
    let refused = sums.masked(world.id, &agent_id(0), other, nothing());
    assert_eq!(refused.unwrap_err().wire(), WireError::WrongAttempt);
    let stranger = AgentId::new("spiffe://mesh/tabmesh/agent/domain-9/one").unwrap();
    let refused = sums.masked(world.id, &stranger, vector(), nothing());
    assert_eq!(refused.unwrap_err().wire(), WireError::IdentityMismatch);
    let stored = || {
        let prefix = step_prefix(&place(world.id, 1), Step::Advertise);
        disk.records.scan_all(prefix.as_bytes()).unwrap().len()
    };
    assert_eq!(stored(), 0);
    sums.reply(world.id, &agent_id(0), advert, nothing()).unwrap();
    assert_eq!(stored(), 1);
}

/// One agent more than the complete graph takes: every step over the wire's documents, with a restart between any two.
#[tokio::test]
async fn the_smallest_ring_sums_what_its_agents_gave() {
    let agents = MAX_COMPLETE + 1;
    let (world, disk) = (World::of(agents, 1), Disk::new());
    disk.started(NOW_MS).open(world.id, &world.opened, Vec::new()).unwrap();
    let descriptor = SumDescriptor::from_bytes(world.opened.opening.descriptor.as_bytes()).unwrap();
    let Topology::Regular(shape) = descriptor.topology else { panic!("a ring") };
    assert!((shape.degree as usize) < agents - 1);
    let mut taking_part = BTreeMap::new();
    let mut end = None;
    for step in STEPS {
        let sums = disk.started(NOW_MS);
        // The last agent falls silent after it has shared.
        let answering = if step < Step::Mask { agents } else { agents - 1 };
        for i in 0..answering {
            answer_to(&sums, &world, &mut taking_part, i);
        }
        let now_ms = if step == Step::Mask { 1_000_000 + 40_000 } else { NOW_MS };
        end = closed(&world, &disk, now_ms).await;
        assert_eq!(end.is_some(), step == Step::Open, "{step}");
    }
    let Some(AttemptEnd::Summed(summed)) = end else { panic!("{end:?}") };
    let mut plain = vec![0; VALUES as usize];
    for i in 0..agents - 1 {
        let own = world.contribution(i);
        plain.iter_mut().zip(own.values().as_slice()).for_each(|(total, value)| *total += value);
    }
    assert_eq!(summed.values, plain);
    assert_eq!(summed.survivors.len(), agents - 1);
}

/// On a ring an agent that keeps its part of the order to itself ends the attempt: going on without it would be a choice.
#[tokio::test]
async fn a_part_of_the_order_that_is_missing_ends_a_ring() {
    let agents = MAX_COMPLETE + 1;
    let (world, disk) = (World::of(agents, 1), Disk::new());
    disk.started(NOW_MS).open(world.id, &world.opened, Vec::new()).unwrap();
    let mut taking_part = BTreeMap::new();
    let sums = disk.started(NOW_MS);
    (0..agents).for_each(|i| answer_to(&sums, &world, &mut taking_part, i));
    assert!(closed(&world, &disk, NOW_MS).await.is_none());
    let sums = disk.started(NOW_MS);
    (1..agents).for_each(|i| answer_to(&sums, &world, &mut taking_part, i));
    let end = closed(&world, &disk, 1_000_000 + 20_000).await;
    let Some(AttemptEnd::Aborted(aborted)) = end else { panic!("{end:?}") };
    assert!(aborted.cause.contains("reveal its part"), "{}", aborted.cause);
    assert_eq!((aborted.left.len(), aborted.charged()), (agents - 1, false));
}

/// Complaints outlive restarts: nobody who complained is waited for, and the one they are about is left out.
#[tokio::test]
async fn complaints_are_kept_and_end_the_wait_for_those_who_complain() {
    let (world, disk) = (World::new(), Disk::new());
    disk.started(NOW_MS).open(world.id, &world.opened, Vec::new()).unwrap();
    let mut agents = BTreeMap::new();
    for _ in [Step::Advertise, Step::Share] {
        (0..AGENTS).for_each(|i| answer(&world, &disk, &mut agents, i));
        assert!(closed(&world, &disk, NOW_MS).await.is_none());
    }
    let descriptor = NamedDigest::of(world.opened.opening.descriptor.as_bytes());
    let seat = |i: u16| Seat::new(i);
    let complain = |from: u16, about: u16, descriptor: NamedDigest| {
        let sums = disk.started(NOW_MS);
        sums.resume(world.id).unwrap();
        let complaint = Complaint { descriptor, seat: seat(from), about: seat(about) };
        sums.reply(world.id, &agent_id(from.into()), Reply::Complaint(complaint), nothing())
    };
    let other = complain(0, 3, NamedDigest::of(b"another"));
    assert!(matches!(other, Err(Refused::Rejected(Rejection::WrongDescriptor { .. }))), "{other:?}");
    for about in [0, 4] {
        let nobody = complain(0, about, descriptor);
        assert!(matches!(nobody, Err(Refused::Rejected(Rejection::NotExpected { .. }))), "{nobody:?}");
    }
    // Twice: a lost receipt is asked for again.
    for from in [0, 1, 2, 0, 1] {
        complain(from, 3, descriptor).unwrap();
    }
    answer(&world, &disk, &mut agents, 3);
    let answered = complain(3, 0, descriptor);
    assert!(matches!(answered, Err(Refused::Rejected(Rejection::NotExpected { .. }))), "{answered:?}");
    let end = closed(&world, &disk, NOW_MS).await;
    let Some(AttemptEnd::Aborted(aborted)) = end else { panic!("{end:?}") };
    assert_eq!((aborted.step, aborted.left), (Step::Mask, (0..3).map(agent_id).collect()));
    disk.started(NOW_MS).discard(world.id).unwrap();
    let kept = disk.records.scan_all(b"sum/").unwrap();
    assert!(kept.iter().all(|(key, _)| !String::from_utf8_lossy(key).contains("complaint")), "{kept:?}");
}

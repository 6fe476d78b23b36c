//! Sums that lose more agents than they bear, and what a further attempt with those who are left gives and costs.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rand::rngs::OsRng;
use rand::{SeedableRng, TryRngCore};
use tabmesh_federation::id::{CollectionId, Digest};
use tabmesh_federation::job::JobEvent;
use tabmesh_federation::plan::Plan;
use tabmesh_federation::secagg::agent::{Agent, Entry, Guard, Joined, Prepared};
use tabmesh_federation::secagg::contribution::Contribution;
use tabmesh_federation::secagg::descriptor::SumDescriptor;
use tabmesh_federation::secagg::document::{Reply, Request};
use tabmesh_federation::secagg::message::{Advert, Complaint, Masked, Step};
use tabmesh_federation::secagg::policy::{Expected, Policy};
use tabmesh_federation::secagg::roster::Seat;
use tabmesh_privacy::budget::Rho;
use tabmesh_proto::message::Assignment;
use tabmesh_proto::status::WireError;

use super::*;
use crate::outbox::Outbox;
use crate::sums::{Arrived, Summed as Sum};
use crate::test_mesh::{TestMesh, agent};

const AGENTS: usize = 6;
const VALUES: u32 = 5;
const DEADLINE_S: u32 = 60;

/// Who goes silent, and from which step of which attempt on.
type Losses = [(usize, u32, Step)];

struct World {
    test: TestMesh,
    submitted: Submitted,
    subject: Subject,
    agents: BTreeMap<(usize, u32), Agent>,
    /// What each agent sent and was debited for, by attempt.
    debits: BTreeMap<(usize, u32), Masked>,
    /// Who seals bytes that don't open, and for whom.
    spoils: Vec<(usize, usize)>,
    /// Whose shares, opened in the first attempt, are another's.
    wrong: Option<usize>,
    /// Whether the plan ends while a step's deadline is waited for, and nothing tells the sum.
    ends_while_waiting: bool,
}

fn agent_id(i: usize) -> AgentId {
    AgentId::new(agent(i).to_string()).unwrap()
}

fn sent<M>(prepared: Prepared<M>) -> M {
    let guard = prepared.guard();
    prepared.release(guard).unwrap()
}

impl World {
    /// Six agents of a plan whose sums bear one loss.
    fn new(retries: u32) -> Self {
        Self::with(retries, 4)
    }

    /// As [`Self::new`], with the fewest agents that the plan wants.
    fn with(retries: u32, least: usize) -> Self {
        let test = TestMesh::new(AGENTS);
        let yaml = format!(
            "kind: TabmeshPlan\nname: p\ntarget: sale.fraud\ncohort: {{min_agents: {least}}}\n\
             privacy: {{noise_placement: secure_sum, secure_sum: {{colluders: 1, dropouts: 1, retries: {retries}}}}}\n"
        );
        let yaml = yaml.into_bytes();
        let (plan, digest) = Plan::parse(&yaml, "plan.yaml").unwrap();
        let submitted = Submitted { plan, digest, yaml, by: "operator".to_owned(), created_ms: 0 };
        test.mesh.plans.submit(submitted.clone()).unwrap();
        let summed = Summed::Stage("{}".to_owned());
        let expected = Expected {
            collection: CollectionId::new(1, &mut rand_chacha::ChaCha20Rng::seed_from_u64(1), None),
            payload: summed.digest(),
            model: Digest::of(b"model"),
            plan: digest,
            dimension: VALUES,
            l2_sensitivity_squared: 1 << 20,
        };
        let rho = Rho::from_f64_round_down(0.01).unwrap();
        let subject = Subject { expected, rho, plausible: 1 << 20, deadline_s: DEADLINE_S };
        let (spec, everybody) = (submitted.plan.secure_sum().unwrap(), (0..AGENTS).map(agent_id).collect());
        let now_ms = test.mesh.now_ms();
        open(&test.mesh, spec, &subject, summed, &everybody, now_ms, Vec::new()).unwrap();
        Self {
            test,
            submitted,
            subject,
            agents: BTreeMap::new(),
            debits: BTreeMap::new(),
            spoils: Vec::new(),
            wrong: None,
            ends_while_waiting: false,
        }
    }

    /// Runs the sum to its end with some agents lost.
    async fn run(&mut self, losses: &Losses) -> SumEnd {
        let (mesh, submitted) = (Arc::clone(&self.test.mesh), self.submitted.clone());
        let subject = self.subject.clone();
        let task = tokio::spawn(async move {
            run(&mesh, &submitted, &subject, (Purpose::Release, "release stage 1")).await.unwrap()
        });
        let mut waited = None;
        while !task.is_finished() {
            let mut asked = None;
            let mut busy = false;
            for i in 0..AGENTS {
                for assignment in self.test.owed(i) {
                    let request = Request::from_bytes(assignment.document()).unwrap();
                    let Some(step) = request.step() else { continue };
                    let attempt = self.opened().attempt;
                    asked = Some((attempt, step));
                    let lost = |loss: &(usize, u32, Step)| loss.0 == i && (loss.1, loss.2) <= (attempt, step);
                    if !losses.iter().any(lost) {
                        self.answer(i, &assignment, request);
                        busy = true;
                    }
                }
            }
            // Nobody left has anything to do: the step's deadline passes, once.
            if let Some((attempt, step)) = asked.filter(|asked| !busy && waited != Some(*asked)) {
                waited = Some((attempt, step));
                if self.ends_while_waiting {
                    let cancelled = JobEvent::Cancelled { by: "ops".to_owned() };
                    self.test.mesh.plans.apply(self.submitted.digest, cancelled, 0).unwrap();
                }
                let opened = self.opened();
                self.test.now_ms.fetch_max(opened.deadline_ms(step), Ordering::Relaxed);
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        task.await.unwrap()
    }

    /// Descriptor of the latest attempt.
    fn opened(&self) -> SumDescriptor {
        let opened = self.test.mesh.sums.opened(self.subject.expected.collection).unwrap();
        SumDescriptor::from_bytes(opened.opening.descriptor.as_bytes()).unwrap()
    }

    fn answer(&mut self, i: usize, assignment: &Assignment, request: Request) {
        let id = self.subject.expected.collection;
        let now_ms = self.test.mesh.now_ms();
        let settles = Outbox::settles(&agent(i), assignment.id());
        let key = (i, self.opened().attempt);
        let reply = match request {
            Request::Advertise(opening) => {
                let (agent, advert) = self.enter(i, &opening, now_ms);
                assert!(self.agents.insert(key, agent).is_none(), "an agent enters an attempt once");
                Reply::Advert(advert)
            }
            Request::Share(list) => {
                let agent = self.agents.get_mut(&key).unwrap();
                let Joined::Shares(mut shares) =
                    sent(agent.adverts(&list, &mut OsRng.unwrap_err(), now_ms).unwrap())
                else {
                    panic!("a complete graph has nothing to reveal")
                };
                for (_, victim) in self.spoils.iter().filter(|(spoiler, _)| *spoiler == i) {
                    let seat = self.seat(*victim);
                    shares.sealed.get_mut(&seat).unwrap().0[0] ^= 1;
                }
                Reply::Shares(shares)
            }
            Request::Mask(delivery) => {
                let contribution = self.contribution(i, self.agents[&key].descriptor());
                let agent = self.agents.get_mut(&key).unwrap();
                let masked = match agent.mask(&delivery, &contribution, now_ms) {
                    Ok(prepared) => sent(prepared),
                    Err(refusal) => {
                        let about = refusal.unopened().unwrap();
                        let complaint = Complaint { descriptor: agent.digest(), seat: agent.seat(), about };
                        let reply = Reply::Complaint(complaint);
                        return self.test.mesh.sums.reply(id, &agent_id(i), reply, settles).unwrap();
                    }
                };
                assert!(self.debits.insert(key, masked.clone()).is_none(), "an attempt is debited once");
                let (payload, digest) = (masked.payload, masked.digest);
                let arrived = Arrived { attempt: key.1, payload, digest };
                return self.test.mesh.sums.masked(id, &agent_id(i), arrived, settles).unwrap();
            }
            Request::Consent(survivors) => {
                Reply::Consent(sent(self.agents.get_mut(&key).unwrap().consent(&survivors, now_ms).unwrap()))
            }
            Request::Open(consents) => {
                let wrong = self.wrong.filter(|_| key.1 == 1).map(|owner| self.seat(owner));
                let mut opened = sent(self.agents.get_mut(&key).unwrap().open(&consents, now_ms).unwrap());
                if let Some(owner) = wrong.filter(|owner| opened.seeds.contains_key(owner)) {
                    let other = opened.seeds.iter().find(|(seat, _)| **seat != owner).unwrap().1.clone();
                    opened.seeds.insert(owner, other);
                }
                Reply::Opened(opened)
            }
            other => panic!("not asked on a complete graph: {other:?}"),
        };
        self.test.mesh.sums.reply(id, &agent_id(i), reply, settles).unwrap();
    }

    /// Its seat in the latest attempt.
    fn seat(&self, i: usize) -> Seat {
        let opened = self.test.mesh.sums.opened(self.subject.expected.collection).unwrap();
        Roster::new(opened.members).unwrap().seat(&agent_id(i)).unwrap()
    }

    fn enter(&self, i: usize, opening: &Opening, now_ms: i64) -> (Agent, Advert) {
        let policy = Policy {
            min_agents: 4,
            min_organisations: 4,
            colluders: 1,
            max_attempts: 1 + self.submitted.plan.secure_sum().unwrap().retries,
            max_rho: self.subject.rho,
            max_local_rho: Rho::from_units(u64::MAX),
            min_neighbours: 3,
        };
        let roster = Roster::new(members(&self.test.mesh, &opening.roster).unwrap()).unwrap();
        let entry = Entry {
            agent: &agent_id(i),
            identity: Arc::clone(&self.test.keys[i]),
            roster: Arc::new(roster),
            policy: &policy,
            expected: &self.subject.expected,
            guard: Guard::default(),
        };
        let bytes = opening.descriptor.as_bytes();
        let (agent, advert) = Agent::enter(entry, bytes, &mut OsRng.unwrap_err(), now_ms).unwrap();
        (agent, sent(advert))
    }

    /// An agent's noised vector for an attempt: the same data, other noise.
    fn contribution(&self, i: usize, descriptor: &SumDescriptor) -> Contribution {
        let digest = Digest::of(&descriptor.to_bytes());
        let row = vec![i as i64 * 100; VALUES as usize];
        let seed = i as u64 + 100 * u64::from(descriptor.attempt);
        let mut noise = rand_chacha::ChaCha20Rng::seed_from_u64(seed);
        Contribution::noised(&row, descriptor, digest, 1, &mut noise).unwrap()
    }

    /// The plain sum of what some agents gave to an attempt.
    fn plain(&self, agents: &[usize], attempt: u32) -> Vec<i64> {
        let mut plain = vec![0; VALUES as usize];
        for i in agents {
            let own = self.contribution(*i, self.agents[&(*i, attempt)].descriptor());
            plain.iter_mut().zip(own.values().as_slice()).for_each(|(total, value)| *total += value);
        }
        plain
    }

    /// Which agents were debited for an attempt.
    fn debited(&self, attempt: u32) -> Vec<usize> {
        self.debits.keys().filter(|(_, of)| *of == attempt).map(|(i, _)| *i).collect()
    }

    fn used(&self) -> u32 {
        used(&self.test.mesh, self.submitted.digest, Purpose::Release).unwrap()
    }

    /// Keys under which answers are stored.
    fn answers(&self) -> Vec<String> {
        let kept = self.test.mesh.records.scan_all(b"sum/").unwrap();
        let names = kept.into_iter().map(|(key, _)| String::from_utf8(key).unwrap());
        names.filter(|name| name.contains("/answer/")).collect()
    }
}

fn summed(end: SumEnd) -> Sum {
    match end {
        SumEnd::Summed(summed) => summed,
        SumEnd::Abandoned(cause) => panic!("{cause}"),
    }
}

fn cause(end: SumEnd) -> String {
    match end {
        SumEnd::Summed(_) => panic!("a sum"),
        SumEnd::Abandoned(cause) => cause.to_string(),
    }
}

#[tokio::test]
async fn agents_that_are_left_sum_again_with_fresh_noise_and_another_debit() {
    let mut world = World::new(1);
    let end = world.run(&[(4, 1, Step::Mask), (5, 1, Step::Mask)]).await;
    let left = [0, 1, 2, 3];
    let sum = summed(end);
    assert_eq!(sum.survivors, left.into_iter().map(agent_id).collect());
    assert_eq!(sum.values, world.plain(&left, 2));
    assert_ne!(sum.values, world.plain(&left, 1), "the second attempt has noise of its own");
    // Whoever sent a vector was debited for it, in each attempt.
    assert_eq!((world.debited(1), world.debited(2)), (left.to_vec(), left.to_vec()));
    assert_eq!(world.used(), 1);
    // Nothing of the first attempt is kept once the second is open; all of it goes with the result.
    assert!(world.answers().iter().all(|name| name.contains("/attempt-2/")));
    world.test.mesh.sums.discard(world.subject.expected.collection).unwrap();
    assert!(world.answers().is_empty());
    let audited = world.test.mesh.audit_log().entries().collect::<Result<Vec<_>, _>>().unwrap();
    let opened =
        audited.iter().filter(|entry| String::from_utf8_lossy(&entry.payload).contains("sum_opened"));
    assert_eq!(opened.count(), 2);
}

/// A sum that ends before anybody was asked for a vector has cost nothing, and uses no retry up.
#[tokio::test]
async fn an_attempt_without_masked_vectors_is_no_charge() {
    let mut world = World::new(1);
    let end = world.run(&[(4, 1, Step::Advertise), (5, 1, Step::Advertise)]).await;
    assert_eq!(summed(end).values, world.plain(&[0, 1, 2, 3], 2));
    assert_eq!((world.debited(1), world.debited(2)), (vec![], vec![0, 1, 2, 3]));
    assert_eq!(world.used(), 0);
}

#[tokio::test]
async fn what_a_plan_did_not_pay_for_is_not_attempted() {
    let mut world = World::new(0);
    let end = world.run(&[(4, 1, Step::Mask), (5, 1, Step::Mask)]).await;
    assert_eq!(cause(end), "secure sum: step mask: expected at least 5 agents, got 4");
    assert_eq!(world.opened().attempt, 1);
    assert_eq!(world.debited(1), [0, 1, 2, 3], "what was debited stays debited");

    // The second attempt is lost too, and there is no third.
    let mut world = World::new(1);
    let losses = [(4, 1, Step::Mask), (5, 1, Step::Mask), (2, 2, Step::Consent), (3, 2, Step::Consent)];
    let end = world.run(&losses).await;
    assert_eq!(cause(end), "secure sum: step consent: expected at least 3 agents, got 2");
    assert_eq!((world.opened().attempt, world.debited(2)), (2, vec![0, 1, 2, 3]));
}

#[tokio::test]
async fn fewer_than_the_plan_wants_are_not_asked_again() {
    // Below what the plan wants, and below what any secure sum takes.
    for (least, lost) in [(5, 2), (4, 3)] {
        let mut world = World::with(3, least);
        let losses: Vec<_> = (AGENTS - lost..AGENTS).map(|i| (i, 1, Step::Mask)).collect();
        let end = world.run(&losses).await;
        let left = AGENTS - lost;
        assert_eq!(cause(end), format!("secure sum: step mask: expected at least 5 agents, got {left}"));
        assert_eq!((world.opened().attempt, world.used()), (1, 0));
    }
}

/// A vector that was on its way when its attempt ended is none of the next one's.
#[tokio::test]
async fn a_late_vector_of_an_earlier_attempt_is_refused() {
    let mut world = World::new(1);
    world.run(&[(4, 1, Step::Mask), (5, 1, Step::Mask)]).await;
    let id = world.subject.expected.collection;
    let Masked { payload, digest, .. } = world.debits[&(0, 1)].clone();
    let late = Arrived { attempt: 1, payload, digest };
    let refused = world.test.mesh.sums.masked(id, &agent_id(0), late, Op::delete("outbox/none")).unwrap_err();
    assert_eq!(refused.wire(), WireError::WrongAttempt, "{refused}");
}

/// A plan's end is felt by the sum it waits for.
#[tokio::test]
async fn cancelling_a_plan_ends_its_sum_at_once() {
    let mut world = World::new(2);
    crate::pipeline::cancel(&world.test.mesh, world.submitted.digest, "ops").unwrap();
    let end = world.run(&[]).await;
    assert!(cause(end).contains("cancelled"), "by word");
    assert!(world.debits.is_empty(), "nobody sent a vector");
}

/// The plan ends between the loss of an attempt and the next one: neither opened nor charged.
#[tokio::test]
async fn a_cancelled_plan_makes_no_further_attempt() {
    let losses = [(4, 1, Step::Mask), (5, 1, Step::Mask)];
    let mut control = World::new(2);
    control.run(&losses).await;
    assert_eq!(
        (control.opened().attempt, control.debited(2).is_empty()),
        (2, false),
        "the plan has paid for it"
    );

    let mut world = World { ends_while_waiting: true, ..World::new(2) };
    let end = world.run(&losses).await;
    assert!(cause(end).contains("step mask"), "by its own loss");
    assert_eq!((world.opened().attempt, world.used()), (1, 0));
    assert!(world.debited(2).is_empty());
}

/// One agent seals bytes that nobody can open. All others say so, none of them is debited, and the next attempt leaves it out.
#[tokio::test]
async fn whoever_spoils_a_sum_for_all_is_left_out_of_the_next_attempt() {
    let mut world = World::new(1);
    world.spoils = [0, 1, 2, 4, 5].map(|victim| (3, victim)).to_vec();
    let sum = summed(world.run(&[]).await);
    let left = [0, 1, 2, 4, 5];
    assert_eq!(sum.survivors, left.into_iter().map(agent_id).collect());
    assert_eq!(sum.values, world.plain(&left, 2));
    assert_eq!((world.debited(1), world.debited(2)), (vec![3], left.to_vec()), "a complaint costs nothing");
    assert!(
        world.answers().iter().all(|name| name.contains("/attempt-2/")),
        "complaints go with their attempt"
    );
}

/// As many as may collude can't have an honest agent left out: a word is believed from one more on.
#[tokio::test]
async fn one_complaint_drops_the_one_who_complains_and_nobody_else() {
    let mut world = World::new(1);
    world.spoils = vec![(3, 0)];
    let sum = summed(world.run(&[]).await);
    assert_eq!((sum.survivors, world.opened().attempt), ((1..AGENTS).map(agent_id).collect(), 1));
    // With another loss the attempt ends; the one who complained and the one complained about are both asked again.
    let mut world = World::new(1);
    world.spoils = vec![(3, 0)];
    let sum = summed(world.run(&[(5, 1, Step::Mask)]).await);
    let roster = world.test.mesh.sums.opened(world.subject.expected.collection).unwrap().opening.roster;
    assert_eq!(roster, (0..5).map(agent_id).collect());
    assert_eq!((sum.survivors, world.opened().attempt), ((1..5).map(agent_id).collect(), 2));
}

/// Shares that don't join to what their owner committed to end a sum; the next one is made without the owner.
#[tokio::test]
async fn the_owner_of_wrong_shares_is_left_out_of_the_next_attempt() {
    let mut world = World::new(1);
    world.wrong = Some(2);
    let sum = summed(world.run(&[]).await);
    let left = [0, 1, 3, 4, 5];
    assert_eq!(sum.survivors, left.into_iter().map(agent_id).collect());
    assert_eq!((sum.values, world.opened().attempt), (world.plain(&left, 2), 2));
}

#[tokio::test]
async fn a_complaint_is_taken_in_its_step_from_those_who_owe_a_vector() {
    let world = World::new(1);
    let id = world.subject.expected.collection;
    let digest = Digest::of(&world.opened().to_bytes());
    let complain = |who: usize, about: usize, descriptor| {
        let complaint = Complaint { descriptor, seat: world.seat(who), about: world.seat(about) };
        world.test.mesh.sums.reply(id, &agent_id(who), Reply::Complaint(complaint), Op::delete("outbox/none"))
    };
    // Resumed, so that it is open; no vector is due yet.
    let mesh = Arc::clone(&world.test.mesh);
    let waiting = tokio::spawn(async move { sums::run(&mesh, id).await });
    let mut refused = complain(0, 1, digest).unwrap_err();
    for _ in 0..200 {
        if !matches!(refused, sums::Refused::NotDue { got: Step::Advertise }) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
        refused = complain(0, 1, digest).unwrap_err();
    }
    assert!(matches!(refused, sums::Refused::NotDue { got: Step::Mask }), "{refused}");
    waiting.abort();
}

//! One real agent with its books and files among simulated ones: attempts at a sum, on the complete graph and on a ring.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::Path;

use rand::rngs::OsRng;
use rand::{SeedableRng, TryRngCore};
use rand_chacha::ChaCha20Rng;
use ring::rand::SystemRandom;
use ring::signature::Ed25519KeyPair;
use tabmesh_federation::documents::PlanClosing;
use tabmesh_federation::manifest::Trust;
use tabmesh_federation::release_plan::Release;
use tabmesh_federation::secagg::agent::{Guard, Prepared};
use tabmesh_federation::secagg::contribution::Contribution;
use tabmesh_federation::secagg::graph::MAX_COMPLETE;
use tabmesh_federation::secagg::message::{Complaint, Masked};
use tabmesh_federation::secagg::roster::{Member, Seat};
use tabmesh_federation::secagg::server::{Abort, Advertising, SecureSum};
use tabmesh_privacy::ledger::RefusalRule;
use tabmesh_privacy::noise::{NoiseSource, Purpose as NoisePurpose};
use tabmesh_privacy::signature::SigningKey;
use tabmesh_proto::identity::SpiffeId;
use tabmesh_proto::message::AssignmentKind;

use super::*;
use crate::books::Books;
use crate::config::Config;
use crate::domain::Domain;
use crate::publication::Artefacts;

const CONTRACT: &str = "name: shop.sales
version: '1.0.0'
owner: shop@example.com
schema:
  - {name: label, type: integer, role: target, feature: sale.fraud, categories: ['0', '1']}
  - {name: tid, type: string, role: id, unique: true}
  - {name: amount, type: decimal, range: [0, 100], feature: sale.amount}
privacy: {sensitivity: low, allow_training: true, unit: row, max_units: 100, domain_aggregates: confidential}
source: {type: csv, path: sales.csv}
";
const NOW_MS: i64 = 1_800_000_000_000;
const SEED: u64 = 5;

/// The real agent, the identities of the others, and what is summed.
struct World {
    work: Work,
    own: AgentId,
    product: String,
    keys: BTreeMap<AgentId, Arc<SigningKey>>,
    coordinator: (SpiffeId, Ed25519KeyPair),
    announcement: PlanAnnouncement,
    plan: Plan,
    query: ReleaseQuery,
    collection: CollectionId,
    folder: tempfile::TempDir,
}

fn other(i: usize) -> AgentId {
    AgentId::new(format!("spiffe://acme.example/tabmesh/agent/d{i:03}/one")).unwrap()
}

fn sent<M>(prepared: Prepared<M>) -> M {
    let guard = prepared.guard();
    prepared.release(guard).unwrap()
}

/// The agent whose files are in a folder, as it starts.
fn open(folder: &Path) -> Result<Work, WorkError> {
    let config = Config::load(&folder.join("agent.yaml")).unwrap();
    let identity = SpiffeId::agent("acme.example", &config.domain, &config.name).unwrap();
    let data = config.data_dir.clone();
    std::fs::create_dir_all(&data).unwrap();
    let domain = Arc::new(Domain::load(config, identity.clone(), Some(SEED)).unwrap());
    let pinned = tabmesh_privacy::signature::VerifyingKey::from_bytes([7; 32]);
    let artefacts = Arc::new(Artefacts::open(&data, pinned, Trust::InsecureDev).unwrap());
    let noise = NoiseSource::Seeded { seed: SEED };
    let books =
        Books::open(&data.join("books"), noise, &identity.to_string(), &domain.contract.name).unwrap();
    Work::new(domain, artefacts, books, NOW_MS)
}

/// Why the plan isn't taken on, if it isn't.
type Planned = Result<World, RefusalRule>;

impl World {
    fn new(agents: usize, retries: u32) -> Self {
        Self::planned(agents, retries, "", "").unwrap()
    }

    /// The agent in a cohort of so many, once it was asked to take a plan on; `floor` is its policy for secure sums, `pace`
    /// what its grant says of the time.
    fn planned(agents: usize, retries: u32, floor: &str, pace: &str) -> Planned {
        Self::contracted(CONTRACT, agents, retries, floor, pace)
    }

    fn contracted(contract: &str, agents: usize, retries: u32, floor: &str, pace: &str) -> Planned {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| std::fs::write(folder.path().join(name), bytes).unwrap();
        std::fs::create_dir_all(folder.path().join("keys")).unwrap();
        write("contract.yaml", contract.as_bytes());
        let mut table = "label,tid,amount\n".to_owned();
        (0..40).for_each(|row| writeln!(table, "{},t{row},{row}", row % 2).unwrap());
        write("sales.csv", table.as_bytes());
        let grant = "product: shop.sales, epsilon: '3', delta: '0.00001', signer: owner@example.com";
        write("policy.yaml", format!("grant: {{{grant}{pace}}}\nsecure_sum: {{{floor}}}\n").as_bytes());
        let pkcs8 = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
        write("keys/agent.pk8", pkcs8.as_ref());
        write("keys/coordinator.pub", &[7; 32]);
        write("agent.yaml", format!("{}peers: peers.yaml\n", Config::example()).as_bytes());
        let mut keys = BTreeMap::new();
        let mut peers = "peers:\n".to_owned();
        for i in 1..agents {
            let (_, key) = SigningKey::generate(&SystemRandom::new()).unwrap();
            let public = hex::encode(key.verifying_key().as_bytes());
            writeln!(peers, "  - {{agent: \"{}\", signing_public_key: \"{public}\"}}", other(i)).unwrap();
            keys.insert(other(i), Arc::new(key));
        }
        write("peers.yaml", peers.as_bytes());
        let work = open(folder.path()).unwrap();
        let (agent, product) = (work.domain.identity.to_string(), work.domain.contract.name.clone());

        let yaml = format!(
            "kind: TabmeshPlan\nname: p\ntarget: sale.fraud\ncohort: {{min_agents: 4, max_agents: 1024}}\nprivacy: \
             {{epsilon: 2, noise_placement: secure_sum, secure_sum: {{colluders: 1, dropouts: 1, retries: {retries}}}}}\n"
        );
        let (plan, digest) = Plan::parse(yaml.as_bytes(), "plan.yaml").unwrap();
        let (schema, cohort) = (work.domain.schema.clone(), u32::try_from(agents).unwrap());
        let announcement =
            PlanAnnouncement { plan: yaml, digest, schema, cohort, approvals: vec!["operator".to_owned()] };
        let (budget, max_rows_per_unit) = (plan.budget().unwrap(), work.domain.max_rows());
        let release =
            Release { schema: &work.domain.schema, plan: &plan, digest, budget, max_rows_per_unit, agents };
        let query = release.stage_one().unwrap();
        let own = AgentId::new(agent).unwrap();
        keys.insert(own.clone(), Arc::clone(&work.domain.signer));
        let pair = Ed25519KeyPair::from_seed_unchecked(&[9; 32]).unwrap();
        let coordinator = (SpiffeId::coordinator("acme.example").unwrap(), pair);
        let collection = CollectionId::new(NOW_MS, &mut ChaCha20Rng::seed_from_u64(1), None);
        let world =
            Self { work, own, product, keys, coordinator, announcement, plan, query, collection, folder };
        let document = serde_json::to_vec(&world.announcement).unwrap();
        world.work.plan(&world.assignment(AssignmentKind::Plan, document), NOW_MS).unwrap()?;
        Ok(world)
    }

    fn assignment(&self, kind: AssignmentKind, document: Vec<u8>) -> Assignment {
        let id = self.collection.to_string().parse().unwrap();
        let (name, key) = &self.coordinator;
        Assignment::sign(id, kind, document, name, key).unwrap()
    }

    /// What the agent says to another plan.
    fn announced(&self, plan: String, now_ms: i64) -> Result<(), RefusalRule> {
        let (_, digest) = Plan::parse(plan.as_bytes(), "plan.yaml").unwrap();
        let announcement = PlanAnnouncement { plan, digest, ..self.announcement.clone() };
        let document = serde_json::to_vec(&announcement).unwrap();
        self.work.plan(&self.assignment(AssignmentKind::Plan, document), now_ms).unwrap()
    }

    /// Everybody but some of the others.
    fn without(&self, gone: usize) -> BTreeSet<AgentId> {
        self.keys.keys().skip(gone).cloned().collect()
    }

    /// What a coordinator sends to open an attempt over some agents.
    fn opening(&self, number: u32, agents: &BTreeSet<AgentId>) -> (Opening, Subject, Roster) {
        let member = |agent: &AgentId| Member {
            agent: agent.clone(),
            key: self.keys[agent].verifying_key(),
            organisation: agent.as_str().parse::<SpiffeId>().unwrap().domain().unwrap().to_owned(),
        };
        let roster = Roster::new(agents.iter().map(member).collect()).unwrap();
        let json = self.query.to_json();
        let (digest, deadline_s) = (self.announcement.digest, self.plan.release.deadline_s);
        let subject = Subject::stage(&self.query, Digest::of(&json), self.collection, digest, deadline_s);
        let attempt = Attempt { number, opened_ms: NOW_MS, log_head: Digest::of(b"head") };
        let descriptor = subject.describe(self.plan.secure_sum().unwrap(), &roster, attempt).unwrap();
        let descriptor = String::from_utf8(descriptor.to_bytes()).unwrap();
        let summed = Summed::Stage(String::from_utf8(json).unwrap());
        (Opening { descriptor, summed, roster: agents.clone() }, subject, roster)
    }

    fn ask(&self, request: &Request) -> Result<SumReply, WorkError> {
        self.work.sum(&self.assignment(AssignmentKind::SecureSum, request.to_bytes()), NOW_MS)
    }

    fn document(&self, request: &Request) -> Reply {
        let SumReply::Document(bytes) = self.ask(request).unwrap() else { panic!("a document") };
        // Asked again, as after a lost receipt, it says the same.
        let SumReply::Document(again) = self.ask(request).unwrap() else { panic!("a document") };
        assert_eq!(bytes, again);
        Reply::from_bytes(&bytes).unwrap()
    }

    /// An attempt, in which some of the others send no vector; the sum with the plain one, or why there is none.
    fn attempt(
        &self,
        number: u32,
        agents: &BTreeSet<AgentId>,
        silent: usize,
    ) -> Result<(SecureSum, Vec<i64>), Abort> {
        let (opening, subject, roster) = self.opening(number, agents);
        let (bytes, roster) = (opening.descriptor.as_bytes(), Arc::new(roster));
        let descriptor = SumDescriptor::from_bytes(bytes).unwrap();
        let digest = Digest::of(bytes);
        let mut server = Advertising::open(bytes, Arc::clone(&roster)).unwrap();
        let own = roster.seat(&self.own).unwrap();
        let Reply::Advert(advert) = self.document(&Request::Advertise(opening.clone())) else { panic!() };
        server.accept(advert, NOW_MS).unwrap();
        let policy = self.work.floor(self.plan.secure_sum().unwrap(), subject.rho);
        let mut others: BTreeMap<Seat, Agent> = BTreeMap::new();
        for agent in agents.iter().filter(|agent| **agent != self.own) {
            let entry = Entry {
                agent,
                identity: Arc::clone(&self.keys[agent]),
                roster: Arc::clone(&roster),
                policy: &policy,
                expected: &subject.expected,
                guard: Guard::default(),
            };
            let (entered, advert) = Agent::enter(entry, bytes, &mut OsRng.unwrap_err(), NOW_MS).unwrap();
            server.accept(sent(advert), NOW_MS).unwrap();
            others.insert(entered.seat(), entered);
        }
        let (list, mut revealing) = server.close()?;
        let mut shares = Vec::new();
        let request =
            if revealing.needed() { Request::Reveal(list.clone()) } else { Request::Share(list.clone()) };
        match self.document(&request) {
            Reply::Revealed(reveal) => {
                revealing.accept(&reveal, NOW_MS).unwrap();
            }
            Reply::Shares(own) => shares.push(own),
            other => panic!("{other:?}"),
        }
        for agent in others.values_mut() {
            match sent(agent.adverts(&list, &mut OsRng.unwrap_err(), NOW_MS).unwrap()) {
                Joined::Reveal(reveal) => {
                    revealing.accept(&reveal, NOW_MS).unwrap();
                }
                Joined::Shares(own) => shares.push(own),
            }
        }
        let (reveals, mut sharing) = revealing.close()?;
        if let Some(list) = reveals {
            let Reply::Shares(own) = self.document(&Request::Ring(list.clone())) else { panic!() };
            shares.push(own);
            for agent in others.values_mut() {
                shares.push(sent(agent.reveals(&list, &mut OsRng.unwrap_err(), NOW_MS).unwrap()));
            }
        }
        for own in shares {
            sharing.accept(own, NOW_MS).unwrap();
        }
        let (deliveries, mut masking) = sharing.close()?;
        let place = self.work.books().entries().len() as u64;
        // Shares that don't open: the agent says whose, and nothing is debited.
        let mut spoilt = deliveries[&own].clone();
        let (from, sealed) = spoilt.sealed.iter_mut().next().unwrap();
        let about = *from;
        sealed.0[0] ^= 1;
        let complaint = Complaint { descriptor: digest, seat: own, about };
        assert_eq!(self.document(&Request::Mask(spoilt)), Reply::Complaint(complaint));
        assert_eq!(self.work.books().entries().len() as u64, place);
        let request = Request::Mask(deliveries[&own].clone());
        let SumReply::Vector(answer) = self.ask(&request).unwrap() else { panic!("a vector") };
        assert_eq!(answer.target.attempt, number);
        let payload = answer.payload.as_bytes().to_vec();
        let SumReply::Vector(again) = self.ask(&request).unwrap() else { panic!("a vector") };
        assert_eq!((again.payload.as_bytes(), again.debit.seq()), (payload.as_slice(), place));
        let masked = Masked { descriptor: digest, seat: own, digest: Digest::of(&payload), payload };
        masking.accept(&masked, NOW_MS).unwrap();
        let mut plain = self.contribution(&descriptor, digest, place).values().as_slice().to_vec();
        assert_ne!(masked.payload, plain.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>());
        for (seat, agent) in others.iter_mut().skip(silent) {
            let mut noise = ChaCha20Rng::seed_from_u64(u64::from(seat.index()));
            let zeros = vec![0; plain.len()];
            let given = Contribution::noised(&zeros, &descriptor, digest, 1, &mut noise).unwrap();
            masking.accept(&sent(agent.mask(&deliveries[seat], &given, NOW_MS).unwrap()), NOW_MS).unwrap();
            plain.iter_mut().zip(given.values().as_slice()).for_each(|(total, value)| *total += value);
        }
        let (survivors, mut consenting) = masking.close()?;
        let Reply::Consent(consent) = self.document(&Request::Consent(survivors.clone())) else { panic!() };
        consenting.accept(&consent, NOW_MS).unwrap();
        for agent in others.values_mut().skip(silent) {
            consenting.accept(&sent(agent.consent(&survivors, NOW_MS).unwrap()), NOW_MS).unwrap();
        }
        let (consents, mut unmasking) = consenting.close()?;
        let Reply::Opened(opened) = self.document(&Request::Open(consents.clone())) else { panic!() };
        unmasking.accept(opened, NOW_MS).unwrap();
        for agent in others.values_mut().skip(silent) {
            unmasking.accept(sent(agent.open(&consents, NOW_MS).unwrap()), NOW_MS).unwrap();
        }
        Ok((unmasking.close()?, plain))
    }

    /// What the real agent gave, made anew from its table and the noise of its place in the ledger.
    fn contribution(&self, descriptor: &SumDescriptor, digest: Digest, place: u64) -> Contribution {
        let counts = self.work.count(&self.query, &self.work.domain.schema).unwrap();
        let source = NoiseSource::Seeded { seed: SEED };
        let noise = source.stream(self.own.as_str(), &self.product, place, NoisePurpose::Release);
        Contribution::noised(&counts, descriptor, digest, place, &mut noise.unwrap()).unwrap()
    }

    fn debits(&self) -> usize {
        self.work.books().debits(&self.announcement.digest.to_string(), Purpose::Release, 1)
    }

    /// Why the agent doesn't enter an attempt.
    fn stays_out(&self, number: u32, agents: &BTreeSet<AgentId>) -> String {
        let (opening, _, _) = self.opening(number, agents);
        let before = self.work.books().entries().len();
        let Err(refused) = self.ask(&Request::Advertise(opening)) else {
            panic!("it enters attempt {number}")
        };
        assert_eq!(self.work.books().entries().len(), before);
        refused.to_string()
    }
}

#[test]
fn a_second_attempt_with_those_who_are_left_is_answered_and_debited_again() {
    let world = World::new(6, 1);
    let spent = || world.work.books().balance().unwrap().spent.units();
    let aborted = world.attempt(1, &world.without(0), 2).unwrap_err();
    assert!(matches!(aborted, Abort::TooFew { expected: 5, got: 4, .. }), "{aborted}");
    assert_eq!(world.debits(), 1);
    let once = spent();
    assert!(once > 0);
    // The same attempt, opened anew by a coordinator that would like another vector at the same number.
    let refused = world.stays_out(1, &world.without(2));
    assert!(refused.contains("1 attempts at this sum were debited"), "{refused}");
    let (sum, plain) = world.attempt(2, &world.without(2), 0).unwrap();
    assert_eq!((sum.values, sum.survivors.len()), (plain, 4));
    // The other cohort divides the same cost, rounded down to whole units, over other shares.
    assert_eq!(world.debits(), 2);
    assert!(spent().abs_diff(2 * once) <= 4, "{} {once}", spent());
    for number in [1, 2] {
        let refused = world.stays_out(number, &world.without(1));
        assert!(refused.contains("2 attempts at this sum were debited"), "{refused}");
    }
    // The plan paid for one further attempt.
    let refused = world.stays_out(3, &world.without(2));
    assert!(refused.contains("attempt"), "{refused}");
    assert!(world.folder.path().exists());
}

#[test]
fn attempts_that_plan_or_policy_do_not_allow_are_refused() {
    let world = World::new(6, 0);
    assert!(world.stays_out(2, &world.without(2)).contains("attempt"), "the plan has paid for none");
    let refused = World::planned(6, 2, "max_retries: 1", "").map(drop).unwrap_err();
    assert_eq!(refused, RefusalRule::Policy);
    assert!(World::planned(6, 1, "max_retries: 1", "").is_ok());
}

#[test]
fn the_smallest_ring_is_answered_step_by_step() {
    let world = World::new(MAX_COMPLETE + 1, 0);
    let (sum, plain) = world.attempt(1, &world.without(0), 1).unwrap();
    assert_eq!((sum.values, sum.survivors.len()), (plain, MAX_COMPLETE));
    assert_eq!(world.debits(), 1);
}

/// A ring that hides an agent among fewer neighbours than its domain wants is refused with the plan, and again with the
/// sum: the cohort may have become smaller in between.
#[test]
fn a_graph_below_the_domains_own_bound_is_refused() {
    let ring = |floor: &str| World::planned(MAX_COMPLETE + 1, 0, floor, "").map(drop);
    assert_eq!(ring("min_neighbours: 100"), Err(RefusalRule::Policy));
    assert_eq!(ring("min_neighbours: 6"), Ok(()));
    let world = World::planned(6, 1, "min_neighbours: 5", "").unwrap();
    let refused = world.stays_out(2, &world.without(1));
    assert!(refused.contains("neighbours: this agent's policy has 5, the descriptor 4"), "{refused}");
    assert!(world.attempt(1, &world.without(0), 0).is_ok());
}

/// The contract keeps the domain's aggregates confidential: local noise would show them.
#[test]
fn confidential_aggregates_take_secure_sums_alone() {
    let world = World::new(6, 0);
    let plan = world.announcement.plan.replace("noise_placement: secure_sum", "noise_placement: local");
    let from = plan.find(", secure_sum:").unwrap();
    let plan = format!("{}}}\n", &plan[..from]);
    assert_eq!(world.announced(plan, NOW_MS), Err(RefusalRule::AggregatesConfidential));
    // Nor is a stage of a plan with secure sums answered by a vector of this domain alone.
    let query = world.assignment(AssignmentKind::ReleaseQuery, world.query.to_json());
    assert!(matches!(world.work.release(&query, NOW_MS), Err(WorkError::NeedsSum)));
    assert_eq!(world.debits(), 0);
    assert!(world.attempt(1, &world.without(0), 0).is_ok());
}

/// A table under a new product name and another spelling of its path has the budget that is left of it.
#[test]
fn a_budget_follows_the_file_whatever_contract_and_product_call_it() {
    let world = World::new(6, 0);
    let reserved = |work: &Work| work.books().balance().unwrap().reserved;
    let before = reserved(&world.work);
    assert!(before > Rho::ZERO);
    let folder = world.folder.path().to_owned();
    drop(world.work);
    std::os::unix::fs::symlink(folder.join("sales.csv"), folder.join("orders.csv")).unwrap();
    let contract =
        CONTRACT.replace("path: sales.csv", "path: ./orders.csv").replace("shop.sales", "shop.orders");
    std::fs::write(folder.join("contract.yaml"), contract).unwrap();
    let policy = std::fs::read_to_string(folder.join("policy.yaml")).unwrap();
    std::fs::write(folder.join("policy.yaml"), policy.replace("shop.sales", "shop.orders")).unwrap();
    let again = open(&folder).unwrap();
    assert_eq!(reserved(&again), before);
    drop(again);
    // Another file is another source.
    std::fs::copy(folder.join("sales.csv"), folder.join("other.csv")).unwrap();
    let contract =
        CONTRACT.replace("path: sales.csv", "path: other.csv").replace("shop.sales", "shop.others");
    std::fs::write(folder.join("contract.yaml"), contract).unwrap();
    let policy = std::fs::read_to_string(folder.join("policy.yaml")).unwrap();
    std::fs::write(folder.join("policy.yaml"), policy.replace("shop.orders", "shop.others")).unwrap();
    assert_eq!(reserved(&open(&folder).unwrap()), Rho::ZERO);
}

/// What sets a domain apart is told to others if its own contract says so, and not if it lets the coordinator see its aggregates.
#[test]
fn a_domain_column_needs_published_aggregates() {
    let announced = |aggregates: &str, column: &str| {
        let contract = CONTRACT.replace("confidential", aggregates);
        let world = World::contracted(&contract, 6, 0, "", "").unwrap();
        let plan = format!(
            "kind: TabmeshPlan\nname: q\ntarget: sale.fraud\ncohort: {{min_agents: 4}}\nprivacy: {{epsilon: 1}}\n{column}"
        );
        world.announced(plan, NOW_MS)
    };
    let column = "release: {domain_column: true}\n";
    assert_eq!(announced("open", column), Err(RefusalRule::AggregatesConfidential));
    assert_eq!(announced("published", column), Ok(()));
    assert_eq!(announced("open", ""), Ok(()));
}

/// A domain that lets its budget be spent at a pace refuses a second plan in the same quarter, though the lifetime has room
/// for it, and takes it on once the window has room again: when a plan that used nothing ends, or when time has passed.
#[test]
fn a_plan_beyond_the_budget_window_waits_for_another_time() {
    let world = World::planned(6, 0, "", ", window: {days: 91, epsilon: '2'}").unwrap();
    let another = |name: &str| world.announcement.plan.replace("name: p", &format!("name: {name}"));
    let reserved = || world.work.books().balance().unwrap().reserved;
    let before = reserved();
    assert_eq!(world.announced(another("q"), NOW_MS + 1), Err(RefusalRule::OverWindow));
    assert_eq!(reserved(), before, "a refused plan leaves nothing reserved");
    assert!(world.attempt(1, &world.without(0), 0).is_ok());
    let closing = PlanClosing { plan: world.announcement.digest };
    let closing = world.assignment(AssignmentKind::ClosePlan, serde_json::to_vec(&closing).unwrap());
    world.work.close(&closing, NOW_MS).unwrap();
    // A stage was spent: the whole of a plan doesn't fit into the rest of the quarter, nor after the clock went back.
    let quarter_ms = 91 * 24 * 3600 * 1000;
    // The debit is dated by the refusal before it, which is a millisecond later than the clock was then.
    for now_ms in [NOW_MS + 2, NOW_MS + quarter_ms, NOW_MS - 2 * quarter_ms] {
        assert_eq!(world.announced(another("q"), now_ms), Err(RefusalRule::OverWindow), "{now_ms}");
    }
    assert_eq!(world.announced(another("q"), NOW_MS + quarter_ms + 1), Ok(()));
    let without = World::new(6, 0);
    let plan = without.announcement.plan.replace("name: p", "name: q");
    assert_eq!(without.announced(plan, NOW_MS + 1), Ok(()), "without a window the lifetime decides");
}

/// A table under another path is another source to the agent, until its policy says where the rows came from.
#[test]
fn an_agent_does_not_start_on_a_copied_table_until_its_policy_says_so() {
    let World { work, folder, .. } = World::new(6, 0);
    let reserved = work.books().balance().unwrap().reserved;
    drop(work);
    let edit = |name: &str, from: &str, to: &str| {
        let path = folder.path().join(name);
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{text}");
        std::fs::write(path, text.replace(from, to)).unwrap();
    };
    edit("contract.yaml", "path: sales.csv", "path: copied.csv");
    std::fs::copy(folder.path().join("sales.csv"), folder.path().join("copied.csv")).unwrap();
    let refused = open(folder.path()).err().unwrap().to_string();
    assert!(refused.contains("copied.csv") && refused.contains("derived_from: \"sales.csv\""), "{refused}");
    edit("policy.yaml", "signer: owner@example.com", "signer: owner@example.com, derived_from: sales.csv");
    let work = open(folder.path()).unwrap();
    assert_eq!(work.books().balance().unwrap().reserved, reserved, "what it was charged with stays");
}

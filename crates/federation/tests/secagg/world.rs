//! The stage: identities, a roster, a descriptor, and a driver that carries messages between agents and the server.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use rand::SeedableRng;
use rand_chacha::ChaCha20Rng;
use ring::signature::{Ed25519KeyPair, KeyPair};
use tabmesh_federation::id::{AgentId, CollectionId, Digest, PlanDigest};
use tabmesh_federation::secagg::agent::{Agent, Entry, Guard, Joined, Prepared, Refusal};
use tabmesh_federation::secagg::contribution::Contribution;
use tabmesh_federation::secagg::descriptor::{SumDescriptor, least_threshold};
use tabmesh_federation::secagg::graph::{Regular, Topology};
use tabmesh_federation::secagg::mask::Width;
use tabmesh_federation::secagg::message::{
    Advert, AdvertList, Consents, Delivery, Masked, Opened, RevealList, Step, Survivors,
};
use tabmesh_federation::secagg::noise::NoisePlan;
use tabmesh_federation::secagg::policy::{Expected, Policy};
use tabmesh_federation::secagg::roster::{Member, Roster, Seat};
use tabmesh_federation::secagg::server::{Abort, Advertising, Opening, SecureSum};
use tabmesh_privacy::budget::Rho;
use tabmesh_privacy::mechanism::SigmaSquared;
use tabmesh_privacy::signature::SigningKey;

/// Well before every deadline.
pub(crate) const NOW_MS: i64 = 1_000_500;

/// Everything the parties of one sum know beforehand.
#[derive(Clone)]
pub(crate) struct World {
    pub(crate) keys: Vec<Arc<SigningKey>>,
    pub(crate) roster: Arc<Roster>,
    pub(crate) descriptor: SumDescriptor,
    pub(crate) policy: Policy,
    pub(crate) expected: Expected,
}

/// What a sum needs to be described.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) agents: usize,
    pub(crate) dimension: u32,
    pub(crate) width: Width,
    /// Agents that may drop out.
    pub(crate) dropouts: u32,
    pub(crate) colluders: u32,
    pub(crate) ring: bool,
}

impl Shape {
    pub(crate) fn complete(agents: usize, dimension: u32) -> Self {
        let dropouts = (agents - least_threshold(agents, 1)) as u32;
        Self { agents, dimension, width: Width::Bits64, dropouts, colluders: 1, ring: false }
    }
}

impl World {
    pub(crate) fn new(shape: Shape) -> Self {
        let keys: Vec<Arc<SigningKey>> = (0..shape.agents).map(|i| Arc::new(identity(i as u64))).collect();
        let members = keys.iter().enumerate().map(|(i, key)| Member {
            agent: agent_id(i),
            key: key.verifying_key(),
            organisation: format!("org-{i}"),
        });
        let roster = Arc::new(Roster::new(members.collect()).unwrap());
        let descriptor = describe(shape, &roster);
        let expected = Expected {
            collection: descriptor.collection,
            payload: descriptor.payload,
            model: descriptor.model,
            plan: descriptor.plan,
            dimension: descriptor.dimension,
            l2_sensitivity_squared: descriptor.l2_sensitivity_squared,
        };
        let policy = Policy {
            min_agents: 4,
            min_organisations: 4,
            colluders: 1,
            max_attempts: 3,
            max_rho: Rho::from_f64_round_down(0.1).unwrap(),
            max_local_rho: Rho::from_f64_round_down(100.0).unwrap(),
            min_neighbours: 3,
        };
        Self { keys, roster, descriptor, policy, expected }
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.descriptor.to_bytes()
    }

    pub(crate) fn digest(&self) -> Digest {
        Digest::of(&self.bytes())
    }

    pub(crate) fn enter(&self, i: usize, guard: Guard) -> Result<(Agent, Prepared<Advert>), Refusal> {
        self.enter_with(i, guard, &self.bytes(), &mut rng(1_000 + i as u64))
    }

    pub(crate) fn enter_with(
        &self,
        i: usize,
        guard: Guard,
        bytes: &[u8],
        rng: &mut ChaCha20Rng,
    ) -> Result<(Agent, Prepared<Advert>), Refusal> {
        let id = agent_id(i);
        let entry = Entry {
            agent: &id,
            identity: Arc::clone(&self.keys[i]),
            roster: Arc::clone(&self.roster),
            policy: &self.policy,
            expected: &self.expected,
            guard,
        };
        Agent::enter(entry, bytes, rng, NOW_MS)
    }

    /// An agent's noised contribution; its plain vector is [`row`].
    pub(crate) fn contribution(&self, i: usize, debit: u64) -> Contribution {
        let row = row(i, self.descriptor.dimension as usize);
        let mut rng = rng(2_000 + i as u64 + 10_000 * debit);
        Contribution::noised(&row, &self.descriptor, self.digest(), debit, &mut rng).unwrap()
    }

    /// The sum of the noised contributions of some agents, computed in the clear.
    pub(crate) fn plain_sum(&self, seats: &BTreeSet<Seat>, debit: u64) -> Vec<i64> {
        let mut sum = vec![0; self.descriptor.dimension as usize];
        for seat in seats {
            let contribution = self.contribution(usize::from(seat.index()), debit);
            for (total, value) in sum.iter_mut().zip(contribution.values().as_slice()) {
                *total += value;
            }
        }
        sum
    }
}

pub(crate) fn agent_id(i: usize) -> AgentId {
    AgentId::new(format!("spiffe://mesh/tabmesh/agent/domain-{i:04}/one")).unwrap()
}

/// An identity key from a number, so that runs are equal byte for byte: PKCS#8 version 2 (RFC 8410) around a seed.
pub(crate) fn identity(number: u64) -> SigningKey {
    let mut seed = [0; 32];
    seed[..8].copy_from_slice(&number.to_le_bytes());
    let pair = Ed25519KeyPair::from_seed_unchecked(&seed).unwrap();
    let (head, middle) =
        (hex::decode("3053020101300506032b657004220420").unwrap(), hex::decode("a123032100").unwrap());
    let document = [head.as_slice(), &seed, &middle, pair.public_key().as_ref()].concat();
    SigningKey::from_pkcs8(&document).unwrap()
}

pub(crate) fn rng(seed: u64) -> ChaCha20Rng {
    ChaCha20Rng::seed_from_u64(seed)
}

pub(crate) fn seat(i: usize) -> Seat {
    Seat::new(u16::try_from(i).unwrap())
}

/// Agent `i`'s plain vector: small integers of both signs.
pub(crate) fn row(i: usize, dimension: usize) -> Vec<i64> {
    (0..dimension).map(|j| (i as i64 * 31 + j as i64 * 17) % 201 - 100).collect()
}

fn describe(shape: Shape, roster: &Roster) -> SumDescriptor {
    let central = SigmaSquared::new(1_000_000, 1).unwrap();
    let threshold = shape.agents - shape.dropouts as usize;
    let topology = if shape.ring {
        let ring = Regular::for_cohort(shape.agents, threshold, shape.dropouts, shape.colluders).unwrap();
        Topology::Regular(ring)
    } else {
        Topology::Complete
    };
    SumDescriptor {
        collection: CollectionId::new(1_000_000, &mut rng(7), None),
        attempt: 1,
        payload: Digest::of(b"round descriptor"),
        model: Digest::of(b"model"),
        plan: PlanDigest::of(b"plan"),
        roster: roster.digest(),
        dimension: shape.dimension,
        width: shape.width,
        max_abs: 1 << 20,
        l2_sensitivity_squared: 10_000,
        noise: NoisePlan::new(central, shape.agents, shape.dropouts, shape.colluders).unwrap(),
        threshold: threshold as u32,
        topology,
        opened_ms: 1_000_000,
        step_s: 60,
        log_head: Digest::of(b"log head"),
    }
}

/// Releases an answer as a caller does that has stored it.
pub(crate) fn sent<M>(prepared: Prepared<M>) -> M {
    let guard = prepared.guard();
    prepared.release(guard).unwrap()
}

/// Who falls silent before answering which step.
pub(crate) type Silent = BTreeMap<usize, Step>;

/// One whole sum under the first debit.
pub(crate) fn run(world: &World, silent: &Silent) -> Result<SecureSum, Abort> {
    run_with(world, silent, 1)
}

/// One whole sum; agents silent from a step on answer neither it nor later ones.
pub(crate) fn run_with(world: &World, silent: &Silent, debit: u64) -> Result<SecureSum, Abort> {
    let (mut opening, opened) = opened(world, silent, debit, |_| {})?;
    for own in opened {
        opening.accept(own, NOW_MS).unwrap();
    }
    opening.close()
}

/// A sum up to the opened shares, which the server hasn't got yet; `tamper` sees every masked vector on its way.
pub(crate) fn opened(
    world: &World,
    silent: &Silent,
    debit: u64,
    tamper: impl Fn(&mut Masked),
) -> Result<(Opening, Vec<Opened>), Abort> {
    let speaks = |i: usize, step: Step| silent.get(&i).is_none_or(|from| step < *from);
    let bytes = world.bytes();
    let mut server = Advertising::open(&bytes, Arc::clone(&world.roster))?;
    let mut agents: BTreeMap<usize, Agent> = BTreeMap::new();
    for i in (0..world.keys.len()).filter(|i| speaks(*i, Step::Advertise)) {
        let (agent, advert) = world.enter(i, Guard::default()).unwrap();
        server.accept(sent(advert), NOW_MS).unwrap();
        agents.insert(i, agent);
    }
    let (list, mut revealing) = server.close()?;
    let mut shares = Vec::new();
    for (i, agent) in &mut agents {
        let step = agent.due().unwrap();
        if !speaks(*i, step) {
            continue;
        }
        match sent(agent.adverts(&list, &mut rng(3_000 + *i as u64), NOW_MS).unwrap()) {
            Joined::Reveal(reveal) => {
                revealing.accept(&reveal, NOW_MS).unwrap();
            }
            Joined::Shares(own) => shares.push(own),
        }
    }
    let (reveals, mut sharing) = revealing.close()?;
    if let Some(reveals) = reveals {
        for (i, agent) in agents.iter_mut().filter(|(i, _)| speaks(**i, Step::Share)) {
            shares.push(sent(agent.reveals(&reveals, &mut rng(3_000 + *i as u64), NOW_MS).unwrap()));
        }
    }
    for own in shares {
        sharing.accept(own, NOW_MS).unwrap();
    }
    let (deliveries, mut masking) = sharing.close()?;
    for (i, agent) in agents.iter_mut().filter(|(i, _)| speaks(**i, Step::Mask)) {
        let Some(delivery) = deliveries.get(&seat(*i)) else { continue };
        let mut masked = sent(agent.mask(delivery, &world.contribution(*i, debit), NOW_MS).unwrap());
        tamper(&mut masked);
        masking.accept(&masked, NOW_MS).unwrap();
    }
    let (survivors, mut consenting) = masking.close()?;
    for (_, agent) in agents.iter_mut().filter(|(i, _)| speaks(**i, Step::Consent)) {
        consenting.accept(&sent(agent.consent(&survivors, NOW_MS).unwrap()), NOW_MS).unwrap();
    }
    let (consents, opening) = consenting.close()?;
    let speaking = agents.iter_mut().filter(|(i, _)| speaks(**i, Step::Open));
    let opened = speaking.map(|(_, agent)| sent(agent.open(&consents, NOW_MS).unwrap())).collect();
    Ok((opening, opened))
}

/// Agents of one sum and the messages up to a point, for tests that then deviate.
pub(crate) struct Stage {
    pub(crate) world: World,
    pub(crate) agents: Vec<Agent>,
    pub(crate) adverts: AdvertList,
    pub(crate) deliveries: BTreeMap<Seat, Delivery>,
    pub(crate) masked: Vec<Masked>,
    pub(crate) survivors: Survivors,
    pub(crate) consents: Consents,
}

impl Stage {
    /// A sum over the complete graph in which everybody has signed the full list of survivors and nobody has opened.
    pub(crate) fn signed(world: World) -> Self {
        let mut stage = Self::masked(world);
        let survivors = stage.survivors.clone();
        for agent in &mut stage.agents {
            let consent = sent(agent.consent(&survivors, NOW_MS).unwrap());
            stage.consents.signatures.push((consent.seat, consent.signature));
        }
        stage
    }

    /// A sum over the complete graph in which everybody has sent a masked vector.
    pub(crate) fn masked(world: World) -> Self {
        let mut stage = Self::shared(world);
        for (i, agent) in stage.agents.iter_mut().enumerate() {
            let contribution = stage.world.contribution(i, 1);
            stage.masked.push(sent(agent.mask(&stage.deliveries[&seat(i)], &contribution, NOW_MS).unwrap()));
        }
        let list = stage.masked.iter().map(|masked| (masked.seat, masked.digest)).collect();
        stage.survivors.survivors = list;
        stage
    }

    /// A sum over the complete graph in which everybody has shared.
    pub(crate) fn shared(world: World) -> Self {
        let (mut agents, list) = Self::advertised(&world);
        let mut sealed = Vec::new();
        for (i, agent) in agents.iter_mut().enumerate() {
            match sent(agent.adverts(&list, &mut rng(3_000 + i as u64), NOW_MS).unwrap()) {
                Joined::Shares(shares) => sealed.push(shares),
                Joined::Reveal(_) => panic!("a complete graph has nothing to reveal"),
            }
        }
        let senders: Vec<Seat> = sealed.iter().map(|shares| shares.seat).collect();
        let digest = world.digest();
        let deliveries = senders.iter().map(|to| {
            let from = sealed.iter().filter(|shares| shares.seat != *to);
            let sealed = from.map(|shares| (shares.seat, shares.sealed[to].clone())).collect();
            (*to, Delivery { descriptor: digest, senders: senders.clone(), sealed })
        });
        Self {
            deliveries: deliveries.collect(),
            agents,
            adverts: list,
            masked: Vec::new(),
            survivors: Survivors { descriptor: digest, survivors: Vec::new() },
            consents: Consents { descriptor: digest, signatures: Vec::new() },
            world,
        }
    }

    pub(crate) fn advertised(world: &World) -> (Vec<Agent>, AdvertList) {
        let mut agents = Vec::new();
        let mut adverts = Vec::new();
        for i in 0..world.keys.len() {
            let (agent, advert) = world.enter(i, Guard::default()).unwrap();
            adverts.push(sent(advert));
            agents.push(agent);
        }
        (agents, AdvertList { descriptor: world.digest(), adverts })
    }
}

/// A list of reveals for a ring, honest.
pub(crate) fn revealed(world: &World, agents: &mut [Agent], list: &AdvertList) -> RevealList {
    let mut nonces = BTreeMap::new();
    for agent in agents {
        if let Joined::Reveal(reveal) = sent(agent.adverts(list, &mut rng(9), NOW_MS).unwrap()) {
            nonces.insert(reveal.seat, reveal.nonce);
        }
    }
    RevealList { descriptor: world.digest(), nonces }
}

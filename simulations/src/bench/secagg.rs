//! `bench secagg`: what a secure sum costs an agent and the server, in processor time.

use std::collections::BTreeSet;
use std::sync::Arc;

use anstream::println;
use anyhow::Context;
use clap::Args;
use rand::SeedableRng;
use rand::rngs::OsRng;
use rand_chacha::ChaCha20Rng;
use ring::rand::SystemRandom;
use tabmesh_federation::id::{AgentId, CollectionId, Digest, PlanDigest};
use tabmesh_federation::secagg::agent::{Agent, Entry, Guard, Joined, Prepared};
use tabmesh_federation::secagg::contribution::Contribution;
use tabmesh_federation::secagg::descriptor::SumDescriptor;
use tabmesh_federation::secagg::graph::Topology;
use tabmesh_federation::secagg::keys::Secret;
use tabmesh_federation::secagg::mask::{RingVector, Sign, Width};
use tabmesh_federation::secagg::noise::NoisePlan;
use tabmesh_federation::secagg::policy::{Expected, Policy};
use tabmesh_federation::secagg::roster::{Member, Roster, Seat};
use tabmesh_federation::secagg::server::{Advertising, SecureSum};
use tabmesh_privacy::budget::Rho;
use tabmesh_privacy::mechanism::SigmaSquared;
use tabmesh_privacy::signature::SigningKey;

use crate::bench::cpu_ns;
use crate::cli::Output;

/// What is simulated: every combination of the lists, all agents and the server in this process, one after the other.
#[derive(Debug, Args)]
pub struct Options {
    /// Agents; above 128 a ring in random order instead of the complete graph.
    #[arg(long, value_delimiter = ',', default_values_t = [10, 100])]
    agents: Vec<usize>,
    /// Values of a vector.
    #[arg(long, value_delimiter = ',', default_values_t = [50_000])]
    coordinates: Vec<u32>,
    /// Share of the agents that fall silent after sharing their secrets, which costs the server most; 0 to 0.1.
    #[arg(long, value_delimiter = ',', default_values_t = [0.0, 0.1])]
    dropouts: Vec<f64>,
    /// Bits of the modulus: 32 or 64.
    #[arg(long, default_value_t = 64)]
    bits: u32,
}

/// Processor time spent so far, by whom.
#[derive(Default)]
struct Spent {
    agents_ns: u64,
    noise_ns: u64,
    server_ns: u64,
}

struct Case {
    agents: usize,
    coordinates: u32,
    dropouts: usize,
    width: Width,
}

/// Runs and prints.
///
/// # Errors
/// A case that the protocol doesn't bear, a sum that is not the plain one, or processor time that can't be read.
pub fn run(options: &Options, output: Output) -> anyhow::Result<()> {
    let width = match options.bits {
        32 => Width::Bits32,
        64 => Width::Bits64,
        other => anyhow::bail!("--bits: expected 32 or 64, got {other}"),
    };
    let rate = mask_rate(width)?;
    match output {
        Output::Text => println!("masks: {:.2} GB of keystream added per CPU-second", rate / 1e9),
        Output::Json => {
            println!("{}", serde_json::json!({"bits": options.bits, "mask_bytes_per_cpu_s": rate}))
        }
    }
    for agents in &options.agents {
        for coordinates in &options.coordinates {
            for share in &options.dropouts {
                anyhow::ensure!(
                    (0.0..=TOLERATED).contains(share),
                    "--dropouts: expected 0 to {TOLERATED}, got {share}"
                );
                let dropouts = (*agents as f64 * share).floor() as usize;
                case(&Case { agents: *agents, coordinates: *coordinates, dropouts, width }, output)?;
            }
        }
    }
    Ok(())
}

fn case(case: &Case, output: Output) -> anyhow::Result<()> {
    let random = SystemRandom::new();
    let keys = (0..case.agents)
        .map(|_| Ok(Arc::new(SigningKey::generate(&random)?.1)))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let ids =
        (0..case.agents).map(|i| AgentId::new(format!("agent-{i:04}"))).collect::<Result<Vec<_>, _>>()?;
    let members = keys.iter().zip(&ids).map(|(key, agent)| Member {
        agent: agent.clone(),
        key: key.verifying_key(),
        organisation: agent.to_string(),
    });
    let roster = Arc::new(Roster::new(members.collect())?);
    let descriptor = describe(case, &roster)?;
    let mut spent = Spent::default();
    let (sum, plain) = simulate(case, &descriptor, &roster, &keys, &ids, &mut spent)?;
    anyhow::ensure!(sum.values == plain, "the secure sum differs from the plain one");

    let agent_s = spent.agents_ns as f64 / 1e9 / case.agents as f64;
    let noise_s = spent.noise_ns as f64 / 1e9 / case.agents as f64;
    let server_s = spent.server_ns as f64 / 1e9;
    let degree = descriptor.topology.degree(case.agents);
    let Case { agents, coordinates, dropouts, width } = case;
    match output {
        Output::Text => println!(
            "{agents} agents ({degree} neighbours), {coordinates} values of {} bits, {dropouts} drop out: {agent_s:.4} \
             CPU-seconds an agent (and {noise_s:.4} for its noise), {server_s:.3} the server",
            8 * width.bytes()
        ),
        Output::Json => {
            let line = serde_json::json!({
                "agents": agents, "neighbours": degree, "coordinates": coordinates, "bits": 8 * width.bytes(),
                "dropouts": dropouts, "agent_cpu_s": agent_s, "noise_cpu_s": noise_s, "server_cpu_s": server_s,
            });
            println!("{line}");
        }
    }
    Ok(())
}

/// One whole sum; the last `dropouts` agents fall silent after sharing. Also the plain sum of the survivors.
fn simulate(
    case: &Case,
    descriptor: &SumDescriptor,
    roster: &Arc<Roster>,
    keys: &[Arc<SigningKey>],
    ids: &[AgentId],
    spent: &mut Spent,
) -> anyhow::Result<(SecureSum, Vec<i64>)> {
    let mut rng = ChaCha20Rng::try_from_rng(&mut OsRng).context("randomness of the operating system")?;
    let bytes = descriptor.to_bytes();
    let expected = Expected {
        collection: descriptor.collection,
        payload: descriptor.payload,
        model: descriptor.model,
        plan: descriptor.plan,
        dimension: descriptor.dimension,
        l2_sensitivity_squared: descriptor.l2_sensitivity_squared,
    };
    let mut server = timed(&mut spent.server_ns, || Advertising::open(&bytes, Arc::clone(roster)))??;
    let mut agents = Vec::new();
    for (key, id) in keys.iter().zip(ids) {
        let entry = Entry {
            agent: id,
            identity: Arc::clone(key),
            roster: Arc::clone(roster),
            policy: &POLICY,
            expected: &expected,
            guard: Guard::default(),
        };
        let (agent, advert) = timed(&mut spent.agents_ns, || Agent::enter(entry, &bytes, &mut rng, NOW_MS))??;
        let advert = released(advert)?;
        timed(&mut spent.server_ns, || server.accept(advert, NOW_MS))??;
        agents.push(agent);
    }
    let (list, mut revealing) = timed(&mut spent.server_ns, || server.close())??;
    let mut shared = Vec::new();
    for agent in &mut agents {
        match released(timed(&mut spent.agents_ns, || agent.adverts(&list, &mut rng, NOW_MS))??)? {
            Joined::Reveal(reveal) => {
                timed(&mut spent.server_ns, || revealing.accept(&reveal, NOW_MS))??;
            }
            Joined::Shares(shares) => shared.push(shares),
        }
    }
    let (reveals, mut sharing) = timed(&mut spent.server_ns, || revealing.close())??;
    if let Some(reveals) = reveals {
        for agent in &mut agents {
            let shares = timed(&mut spent.agents_ns, || agent.reveals(&reveals, &mut rng, NOW_MS))??;
            shared.push(released(shares)?);
        }
    }
    for shares in shared {
        timed(&mut spent.server_ns, || sharing.accept(shares, NOW_MS))??;
    }
    let (deliveries, mut masking) = timed(&mut spent.server_ns, || sharing.close())??;

    agents.truncate(case.agents - case.dropouts);
    let mut plain = vec![0_i64; case.coordinates as usize];
    let zeros = plain.clone();
    let digest = Digest::of(&bytes);
    for (agent, delivery) in agents.iter_mut().zip(deliveries.values()) {
        let contribution =
            timed(&mut spent.noise_ns, || Contribution::noised(&zeros, descriptor, digest, 1, &mut rng))??;
        for (total, value) in plain.iter_mut().zip(contribution.values().as_slice()) {
            *total += value;
        }
        let masked = timed(&mut spent.agents_ns, || agent.mask(delivery, &contribution, NOW_MS))??;
        let masked = released(masked)?;
        timed(&mut spent.server_ns, || masking.accept(&masked, NOW_MS))??;
    }
    let (survivors, mut consenting) = timed(&mut spent.server_ns, || masking.close())??;
    for agent in &mut agents {
        let consent = released(timed(&mut spent.agents_ns, || agent.consent(&survivors, NOW_MS))??)?;
        timed(&mut spent.server_ns, || consenting.accept(&consent, NOW_MS))??;
    }
    let (consents, mut opening) = timed(&mut spent.server_ns, || consenting.close())??;
    for agent in &mut agents {
        let opened = released(timed(&mut spent.agents_ns, || agent.open(&consents, NOW_MS))??)?;
        timed(&mut spent.server_ns, || opening.accept(opened, NOW_MS))??;
    }
    let sum = timed(&mut spent.server_ns, || opening.close())??;
    let listed: BTreeSet<Seat> = agents.iter().map(Agent::seat).collect();
    anyhow::ensure!(sum.survivors == listed, "the sum is over other agents than those who answered");
    Ok((sum, plain))
}

/// A tenth of the agents may drop out, a twentieth collude.
fn describe(case: &Case, roster: &Roster) -> anyhow::Result<SumDescriptor> {
    let n = case.agents;
    let dropouts = u32::try_from(n / 10)?;
    let colluders = u32::try_from((n / 20).max(1))?;
    let threshold = n - dropouts as usize;
    let topology = Topology::for_cohort(n, threshold, dropouts, colluders)?;
    let central = SigmaSquared::new(1 << 40, 1)?;
    let mut rng = ChaCha20Rng::seed_from_u64(0);
    let descriptor = SumDescriptor {
        collection: CollectionId::new(0, &mut rng, None),
        attempt: 1,
        payload: Digest::of(b"simulated"),
        model: Digest::of(b"simulated"),
        plan: PlanDigest::of(b"simulated"),
        roster: roster.digest(),
        dimension: case.coordinates,
        width: case.width,
        max_abs: case.width.max_sum() / n as u64,
        l2_sensitivity_squared: 1 << 32,
        noise: NoisePlan::new(central, n, dropouts, colluders)?,
        threshold: u32::try_from(threshold)?,
        topology,
        opened_ms: 0,
        step_s: 3600,
        log_head: Digest::of(b"simulated"),
    };
    descriptor.check(roster)?;
    Ok(descriptor)
}

/// Bytes of mask made and added per second of processor time.
fn mask_rate(width: Width) -> anyhow::Result<f64> {
    let key = Secret::from_bytes([1; 32]);
    let mut vector = RingVector::zeros(width, MASK_VALUES);
    let begun = cpu_ns()?;
    (0..MASK_TURNS).for_each(|_| vector.apply(&key, Sign::Plus));
    let spent = cpu_ns()?.saturating_sub(begun);
    Ok((MASK_TURNS * MASK_VALUES * width.bytes()) as f64 * 1e9 / spent.max(1) as f64)
}

/// Runs something and adds the processor time it took.
fn timed<T>(spent: &mut u64, run: impl FnOnce() -> T) -> anyhow::Result<T> {
    let begun = cpu_ns()?;
    let value = run();
    *spent += cpu_ns()?.saturating_sub(begun);
    Ok(value)
}

/// A message as a caller gets it that has stored its snapshot.
fn released<M>(prepared: Prepared<M>) -> anyhow::Result<M> {
    let guard = prepared.guard();
    Ok(prepared.release(guard)?)
}

/// What a simulated agent accepts.
const POLICY: Policy = Policy {
    min_agents: 4,
    min_organisations: 4,
    colluders: 1,
    max_attempts: 1,
    max_rho: Rho::from_units(1 << 40),
    max_local_rho: Rho::from_units(1 << 60),
    min_neighbours: 3,
};
const NOW_MS: i64 = 1;
/// Share of the agents that may drop out.
const TOLERATED: f64 = 0.1;
const MASK_VALUES: usize = 1 << 20;
const MASK_TURNS: usize = 20;

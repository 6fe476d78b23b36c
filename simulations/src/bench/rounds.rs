//! The exchange of a round by itself: descriptors, noised vectors, receipts and the server's step, without training.
//!
//! The coordinator and every agent are processes of their own on one machine, with mutual TLS, durable records and ledgers.
//! An agent answers with zeros, noised and debited in its books. By default that is done before the clock starts, so
//! the figure is the exchange; `--with-noise` puts it inside.

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anstream::println;
use anyhow::{Context, Result, bail, ensure};
use rand::TryRngCore;
use rand::rngs::OsRng;
use ring::rand::SystemRandom;
use serde::{Deserialize, Serialize};
use tabmesh_agent::Agent;
use tabmesh_agent::books::{Question, Sendable};
use tabmesh_agent::work::Work;
use tabmesh_coordinator::null_rounds::NullRounds;
use tabmesh_coordinator::{Surroundings, open_records};
use tabmesh_federation::descriptor::{RoundDescriptor, scale_for};
use tabmesh_federation::plan::Plan;
use tabmesh_privacy::clip::integer_norm;
use tabmesh_privacy::ledger::Purpose;
use tabmesh_privacy::mechanism::{DiscreteGaussian, EventShape};
use tabmesh_privacy::noise::NoiseSource;
use tabmesh_proto::client::MeshClient;
use tabmesh_proto::connect::{CoordinatorAddress, TcpDial, connect};
use tabmesh_proto::message::{AssignmentKind, ContractRegistration, CoordinatorFrame, SubmissionTarget};

use crate::cli::Output;
use crate::process::{Process, now};
use crate::quickstart::deployed::client_tls;
use crate::quickstart::deployment::{self, Layout};
use crate::quickstart::pki::{self, PkiFolder, Role};

/// What is measured.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Agents, each a process.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(3..=256))]
    agents: u32,
    /// Bytes of one update; eight a value, at most 1 MiB.
    #[arg(long, default_value_t = 1 << 20, value_parser = clap::value_parser!(u32).range(8..=1 << 20))]
    bytes: u32,
    /// Rounds.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=200))]
    rounds: u32,
    /// Draw and debit the noise within the round instead of before it.
    #[arg(long)]
    with_noise: bool,
}

/// What a run is made with, told to every process.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Orders {
    agents: usize,
    values: usize,
    rounds: u32,
    with_noise: bool,
    plan: String,
}

/// What the coordinator's process measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Measured {
    connected_ms: i64,
    seconds: Vec<f64>,
}

#[derive(Debug, Serialize)]
struct Memory {
    idle_mib: f64,
    peak_mib: f64,
}

#[derive(Debug, Serialize)]
struct Outcome {
    agents: u32,
    bytes: u32,
    rounds: u32,
    with_noise: bool,
    seconds_per_round: Quantiles,
    start_to_first_round_s: f64,
    coordinator: Memory,
    largest_agent: Memory,
}

#[derive(Debug, Serialize)]
struct Quantiles {
    median: f64,
    p99: f64,
}

/// Runs the measurement and prints it.
///
/// # Errors
/// A process doesn't come up, or a round fails.
pub fn run(options: &Options, output: Output) -> Result<()> {
    let folder = tempfile::Builder::new().prefix("tabmesh-bench-rounds-").tempdir()?;
    let layout = Layout::at(folder.path());
    let values = options.bytes as usize / 8;
    let plan = plan_yaml(options);
    let orders = Orders {
        agents: options.agents as usize,
        values,
        rounds: options.rounds,
        with_noise: options.with_noise,
        plan,
    };
    prepare(&layout, &orders)?;
    let program = std::env::current_exe().context("finding this program's own file")?;
    let logs = folder.path().join("logs");
    let role = |role: &str, rest: &[&str]| -> Vec<OsString> {
        let root = folder.path().as_os_str().to_owned();
        [OsString::from(role), root].into_iter().chain(rest.iter().map(OsString::from)).collect()
    };
    let start = |name: &str, args: &[OsString]| {
        Process::start(&program, name, "bench-rounds", args, &logs.join(format!("{name}.log")))
    };
    // Agents prepare their answers first: what is timed from here on is a start with everything in place.
    let mut agents = Vec::new();
    for number in 0..orders.agents {
        agents.push(start(&agent(number), &role("agent", &[&number.to_string()]))?);
    }
    for (number, process) in agents.iter_mut().enumerate() {
        process.wait_for_file(&layout.domain(&agent(number)).join(PREPARED), PATIENCE)?;
    }
    let began_ms = now_ms();
    let mut coordinator = start("coordinator", &role("coordinator", &[]))?;
    coordinator.wait_for_file(&folder.path().join(CONNECTED), PATIENCE)?;
    std::thread::sleep(IDLE);
    let idle: Vec<f64> = agents.iter().filter_map(Process::rss_mib).collect();
    let coordinator_idle = coordinator.rss_mib().unwrap_or(f64::NAN);
    std::fs::write(folder.path().join(GO), b"")?;
    let measured = coordinator.wait_for_file(&folder.path().join(MEASURED), PATIENCE)?;
    let mut measured: Measured = serde_json::from_str(&measured).context("the coordinator's figures")?;
    for agent in &mut agents {
        agent.check()?;
    }
    measured.seconds.sort_by(f64::total_cmp);
    let largest = |sizes: &[f64]| sizes.iter().copied().fold(f64::NAN, f64::max);
    let peaks: Vec<f64> = agents.iter().filter_map(Process::peak_rss_mib).collect();
    let outcome = Outcome {
        agents: options.agents,
        bytes: options.bytes,
        rounds: options.rounds,
        with_noise: options.with_noise,
        seconds_per_round: Quantiles {
            median: quantile(&measured.seconds, 0.5),
            p99: quantile(&measured.seconds, 0.99),
        },
        start_to_first_round_s: (measured.connected_ms - began_ms) as f64 / 1000.0,
        coordinator: Memory {
            idle_mib: coordinator_idle,
            peak_mib: coordinator.peak_rss_mib().unwrap_or(f64::NAN),
        },
        largest_agent: Memory { idle_mib: largest(&idle), peak_mib: largest(&peaks) },
    };
    match output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&outcome)?),
        Output::Text => print(&outcome),
    }
    Ok(())
}

fn print(outcome: &Outcome) {
    let Outcome { agents, bytes, rounds, .. } = outcome;
    let noise = if outcome.with_noise { "noise drawn in the round" } else { "noise drawn before" };
    println!("{agents} agents, {bytes} bytes an update, {rounds} rounds, no training, {noise}");
    println!(
        "  seconds a round: median {:.3}, p99 {:.3}",
        outcome.seconds_per_round.median, outcome.seconds_per_round.p99
    );
    println!(
        "  coordinator's start until all agents are in and the first round can open: {:.2} s",
        outcome.start_to_first_round_s
    );
    for (name, memory) in [("coordinator", &outcome.coordinator), ("largest agent", &outcome.largest_agent)] {
        println!(
            "  resident memory, {name}: {:.0} MiB idle, {:.0} MiB at its peak",
            memory.idle_mib, memory.peak_mib
        );
    }
}

/// The smallest value that a share of the sorted values doesn't exceed.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let at = (sorted.len() as f64 * share).ceil() as usize;
    sorted.get(at.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}

/// Takes a part in a measurement: what the processes of [`run`] do.
pub fn take_part(args: &[OsString]) -> ExitCode {
    let outcome = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(anyhow::Error::from)
        .and_then(|runtime| {
            let words: Vec<&str> = args.iter().filter_map(|word| word.to_str()).collect();
            match words.as_slice() {
                ["coordinator", root] => runtime.block_on(coordinator(Path::new(root))),
                ["agent", root, number] => runtime.block_on(agent_process(Path::new(root), number.parse()?)),
                _ => bail!("not a part of this measurement: {words:?}"),
            }
        });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:?}");
            ExitCode::FAILURE
        }
    }
}

async fn coordinator(root: &Path) -> Result<()> {
    let layout = Layout::at(root);
    let orders = orders(root)?;
    let config = tabmesh_coordinator::config::Config::load(&layout.coordinator_config())?;
    let listener = tokio::net::TcpListener::bind(&config.listen).await?;
    let address = listener.local_addr()?.to_string();
    let surroundings = Surroundings {
        records: open_records(&config)?,
        clock: Arc::new(now_ms),
        ids: Box::new(OsRng.unwrap_err()),
    };
    let switches = tabmesh_coordinator::Switches { insecure_dev: true, ..Default::default() };
    let mut rounds = NullRounds::open(config, switches, surroundings, orders.plan.as_bytes(), orders.values)?;
    let (_stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let answering = rounds.answering(listener, async {
        let _ = stopped.await;
    });
    tokio::spawn(answering);
    write(&layout.coordinator_address(), address.as_bytes())?;
    let roster = rounds.connected(orders.agents).await?;
    write(&root.join(CONNECTED), b"")?;
    let connected_ms = now_ms();
    while !root.join(GO).exists() {
        tokio::time::sleep(POLL).await;
    }
    let mut seconds = Vec::new();
    for index in 0..orders.rounds {
        let began = now();
        rounds.round(index, &roster).await?;
        seconds.push(began.elapsed().as_secs_f64());
    }
    write(&root.join(MEASURED), &serde_json::to_vec(&Measured { connected_ms, seconds })?)?;
    std::future::pending().await
}

async fn agent_process(root: &Path, number: usize) -> Result<()> {
    let name = agent(number);
    let layout = Layout::at(root);
    let orders = orders(root)?;
    let config = tabmesh_agent::config::Config::load(&layout.agent_config(&name))?;
    let switches = tabmesh_agent::Switches { insecure_dev: true, reproducible_noise: None };
    let noise = NoiseSource::os(SystemRandom::new());
    let work = Agent::open(config, switches, noise, Arc::new(now_ms))?.work;
    let (plan, digest) = Plan::parse(orders.plan.as_bytes(), "plan")?;
    let budget = plan.budget()?;
    work.books().reserve(&digest.to_string(), Purpose::Round, budget.rounds, Vec::new(), now_ms())?;
    let zeros = vec![0; orders.values];
    let answer = |key: [u8; 32], index: u32, descriptor: Option<&RoundDescriptor>| -> Result<Sendable> {
        let sensitivity = match descriptor {
            Some(descriptor) => descriptor.sensitivity,
            None => integer_norm(CLIP_NORM, scale_for(CLIP_NORM))?,
        };
        let mechanism = DiscreteGaussian::from_rho(sensitivity * sensitivity, budget.per_round)?;
        let dimension = u32::try_from(zeros.len())?;
        let shape = EventShape { rows_per_unit: 1, marginals: 0, dimension };
        let plan = digest.to_string();
        let (purpose, step, mechanism) = (Purpose::Round, u64::from(index), &mechanism);
        let question = Question { plan: &plan, purpose, step, digest: key, mechanism, shape };
        Ok(work.books().answer(&question, &zeros, now_ms())?)
    };
    if !orders.with_noise {
        for index in 0..orders.rounds {
            answer(prepared(index), index, None)?;
        }
    }
    write(&layout.domain(&name).join(PREPARED), b"")?;
    let client = mesh_client(&layout, &name, &work).await?;
    let session = client.session(env!("CARGO_PKG_VERSION")).await?;
    let (sender, mut frames) = session.split();
    tokio::spawn(async move { sender.keep_alive().await });
    while let Some(frame) = frames.next().await? {
        let CoordinatorFrame::Assignment(assignment) = frame else { continue };
        if assignment.kind() != AssignmentKind::Round {
            continue;
        }
        assignment.verify(&Role::Coordinator.spiffe_id().parse()?, work.domain.coordinator_key.as_bytes())?;
        let descriptor = RoundDescriptor::from_bytes(assignment.document())?;
        descriptor.check(&plan, &digest)?;
        ensure!(descriptor.len() == orders.values, "{} values asked for", descriptor.len());
        let key = if orders.with_noise { *assignment.digest() } else { prepared(descriptor.index) };
        let (payload, debit) = answer(key, descriptor.index, Some(&descriptor))?;
        let target = SubmissionTarget {
            assignment_id: assignment.id().clone(),
            plan_digest: *digest.0.as_bytes(),
            stage_or_round: descriptor.index,
            attempt: descriptor.attempt,
        };
        client.submit_update(&target, &payload, &debit).await?;
    }
    Ok(())
}

/// Connects and registers once the coordinator has told its address.
async fn mesh_client(layout: &Layout, name: &str, work: &Work) -> Result<MeshClient> {
    let address = loop {
        match std::fs::read_to_string(layout.coordinator_address()) {
            Ok(address) => break address,
            Err(_) => tokio::time::sleep(POLL).await,
        }
    };
    let pki = PkiFolder::at(layout.certificates());
    let tls = client_tls(&pki, &Role::agent(name))?;
    let address = CoordinatorAddress::new(&address, Role::Coordinator.spiffe_id().parse()?)?;
    let client = MeshClient::new(connect(&address, &tls, TcpDial).await?);
    let domain = &work.domain;
    let (contract, product) = (domain.contract_bytes.clone(), domain.contract.name.clone());
    let registration = ContractRegistration::sign(contract, product, &domain.identity, &domain.key)?;
    let admission = client.register_contract(registration).await?;
    ensure!(admission.admitted, "the contract was refused: {:?}", admission.refusals);
    Ok(client)
}

fn prepare(layout: &Layout, orders: &Orders) -> Result<()> {
    let names: Vec<String> = (0..orders.agents).map(agent).collect();
    let agents = names.iter().map(|name| Role::agent(name));
    let roles: Vec<Role> = std::iter::once(Role::Coordinator).chain(agents).collect();
    pki::write(&layout.certificates(), &roles, time::OffsetDateTime::now_utc())?;
    let base = layout.root().join("base.safetensors");
    std::fs::write(&base, crate::quickstart::deployed::BASE_MODEL)?;
    deployment::write_coordinator(layout, &base, 1, "127.0.0.1:0")?;
    for name in &names {
        write(&layout.contract(name), contract_yaml(name).as_bytes())?;
        deployment::write_policy(layout, name, &format!("{name}.bench"), 3.0)?;
        deployment::write_agent(layout, name, "127.0.0.1:1")?;
    }
    write(&layout.root().join(ORDERS), &serde_json::to_vec(orders)?)
}

fn orders(root: &Path) -> Result<Orders> {
    Ok(serde_json::from_slice(&std::fs::read(root.join(ORDERS))?)?)
}

fn agent(number: usize) -> String {
    format!("domain-{number}")
}

/// Key of an answer that was prepared for a round.
fn prepared(index: u32) -> [u8; 32] {
    let mut key = [0; 32];
    key.iter_mut().zip(index.to_be_bytes()).for_each(|(to, from)| *to = from);
    key
}

fn plan_yaml(options: &Options) -> String {
    format!(
        "kind: TabmeshPlan\nname: null-rounds\ntarget: bench.target\n\
         cohort: {{min_agents: {agents}, max_agents: {agents}}}\n\
         privacy: {{epsilon: 3.0, delta: 1e-5}}\n\
         rounds: {{count: {rounds}, deadline_s: 60, clip_norm: {CLIP_NORM}}}\n",
        agents = options.agents,
        rounds = options.rounds,
    )
}

fn contract_yaml(name: &str) -> String {
    format!(
        "name: {name}.bench\nversion: \"1.0.0\"\nowner: bench\nschema:\n  \
         - {{name: x, type: number, pii: false, role: feature, feature: bench.x, range: [0, 1]}}\n  \
         - {{name: y, type: categorical, pii: false, role: target, feature: bench.target, categories: [a, b]}}\n\
         privacy: {{sensitivity: low, allow_training: true, unit: row, max_units: 10000}}\n\
         source: {{type: parquet, path: none.parquet}}\n"
    )
}

/// Writes a file so that a reader sees all of it or nothing.
fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    Ok(tabmesh_agent::files::replace(path, bytes)?)
}

#[allow(
    clippy::disallowed_methods,
    reason = "two processes share no stopwatch; the figure is a start-up time"
)]
fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

const ORDERS: &str = "orders.json";
const PREPARED: &str = "prepared";
const CONNECTED: &str = "connected";
const GO: &str = "go";
const MEASURED: &str = "measured.json";
/// Clip norm of the plan.
const CLIP_NORM: f64 = 1.0;
/// How long a start or all rounds may take.
const PATIENCE: Duration = Duration::from_secs(600);
/// How long everything rests before idle memory is read.
const IDLE: Duration = Duration::from_secs(1);
/// Pause between two looks for a file.
const POLL: Duration = Duration::from_millis(5);

#[cfg(test)]
mod tests {
    use super::quantile;

    #[test]
    fn quantiles_are_values_of_the_sample() {
        let sorted: Vec<f64> = (1..=100).map(f64::from).collect();
        assert!((quantile(&sorted, 0.5) - 50.0).abs() < f64::EPSILON);
        assert!((quantile(&sorted, 0.99) - 99.0).abs() < f64::EPSILON);
        assert!(quantile(&[], 0.5).is_nan());
    }
}

//! One federation: a coordinator and an agent for each member, over mutual TLS.
//!
//! [`run`] has all of them in this process, linked by pipes in memory, with whatever goes wrong in some domains; [`run_real`] has
//! each as a process of the operating system, linked by sockets. Both run the coordinator's and the agent's own code on the
//! same files with the same seed, so both publish the same bytes.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha20Rng;
use tabmesh_agent::publication::Artefacts;
use tabmesh_agent::serving::Serving;
use tabmesh_agent::{Agent, Local, Switches};
use tabmesh_coordinator::{Surroundings, open_records};
use tabmesh_federation::manifest::Trust;
use tabmesh_federation::plan::Plan;
use tabmesh_privacy::noise::NoiseSource;
use tabmesh_privacy::signature::VerifyingKey;
use tabmesh_proto::client::OperatorClient;
use tabmesh_proto::connect::{CoordinatorAddress, TcpDial, connect};
use tabmesh_store::{BlobStore, Digest};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::liar::{Collusion, Liar};
use super::member::Member;
use super::wire::{self, Pipes};
use crate::process::{Process, now, unix_ms};
use crate::quickstart::deployed::{BASE_MODEL, args, client_tls};
use crate::quickstart::deployment::{self, Layout};
use crate::quickstart::pki::{self, PkiFolder, Role};
use crate::scenario::document::{FlowFaults, Leaving};

/// What is run.
#[derive(Clone, Copy)]
pub(crate) struct Setting<'a> {
    pub(crate) members: &'a [Member],
    pub(crate) plan: &'a Plan,
    /// Noise and secrets come from it.
    pub(crate) seed: u64,
    pub(crate) faults: &'a FlowFaults,
    /// Hears what is being done.
    pub(crate) tell: &'a dyn Fn(&str),
}

/// What a federation left behind.
pub(crate) struct Federated {
    pub(crate) layout: Layout,
    pub(crate) pki: PkiFolder,
    /// How it ended for each member, in their order.
    pub(crate) ends: Vec<End>,
    /// What the rounds published, if anything.
    pub(crate) learnt: Option<Learnt>,
}

/// An adapter or a forest, as published.
pub(crate) struct Learnt {
    pub(crate) bytes: Vec<u8>,
    /// Ending of such a file's name.
    pub(crate) ending: &'static str,
}

/// How a federation ended for a member.
pub(crate) struct End {
    /// What it serves; nothing if it has left or lies.
    pub(crate) serving: Option<Arc<Serving>>,
}

/// A member's part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Honest,
    Late,
    ShortBudget,
    Leaving,
    Liar,
}

/// Runs a plan to its end in this process, until every member that is there serves its choice.
///
/// # Errors
/// A file can't be written, a contract isn't admitted, or the plan doesn't come to its end.
pub(crate) async fn run(root: &Path, setting: Setting<'_>) -> Result<Federated> {
    let Setting { members, plan, seed, faults, tell } = setting;
    let parts = parts(faults, members.len(), seed);
    let (layout, pki, base) = prepared(root, members)?;
    deployment::write_coordinator(&layout, &base, 2, "127.0.0.1:0")?;
    let (stop, stopped) = watch::channel(false);
    let wait = |mut stopped: watch::Receiver<bool>| async move {
        let _ = stopped.wait_for(|stop| *stop).await;
    };

    let config = tabmesh_coordinator::config::Config::load(&layout.coordinator_config())?;
    let (dial, listener) = wire::pipes();
    let clock = Arc::new(unix_ms);
    let ids = Box::new(ChaCha20Rng::seed_from_u64(seed));
    let surroundings = Surroundings { records: open_records(&config)?, clock: clock.clone(), ids };
    let switches = tabmesh_coordinator::Switches {
        insecure_dev: true,
        go_on_without_late: faults.goes_on_without_late(u32::try_from(members.len())?),
    };
    let coordinator = tokio::spawn(tabmesh_coordinator::run(
        config,
        switches,
        listener,
        surroundings,
        wait(stopped.clone()),
    ));

    let liars = parts.iter().filter(|part| **part == Part::Liar).count();
    let collusion = faults.byzantine.as_ref().map(|liar| Collusion::new(liar.attack, liars));
    let open = |member: &Member, part: Part| -> Result<Agent> {
        // Half of ε is less than half of ρ: the plan is over budget.
        let granted =
            if part == Part::ShortBudget { plan.privacy.epsilon / 2.0 } else { plan.privacy.epsilon };
        write_member(&layout, member, members, plan, granted, wire::ADDRESS)?;
        let config = tabmesh_agent::config::Config::load(&layout.agent_config(&member.name()))?;
        let switches = Switches { insecure_dev: true, reproducible_noise: Some(seed) };
        Agent::open(config, switches, NoiseSource::Seeded { seed }, clock.clone())
            .with_context(|| format!("agent of {}", member.domain))
    };
    let start = |member: &Member, part: Part| -> Result<Started> {
        let agent = open(member, part)?;
        if let (Part::Liar, Some(collusion)) = (part, &collusion) {
            let tls = client_tls(&pki, &Role::agent(&member.name()))?;
            let liar = Liar::new(
                &agent,
                coordinator_address()?,
                tls,
                dial.clone(),
                clock.clone(),
                Arc::clone(collusion),
            );
            return Ok(Started { serving: None, task: tokio::spawn(liar.run()) });
        }
        let serving = Some(Arc::clone(&agent.serving));
        let (dial, stopped): (Pipes, _) = (dial.clone(), wait(stopped.clone()));
        let task = tokio::spawn(async move { Ok(agent.run(dial, stopped).await?) });
        Ok(Started { serving, task })
    };
    let mut started: Vec<Option<Started>> = Vec::new();
    for (member, part) in members.iter().zip(&parts) {
        started.push(if *part == Part::Late { None } else { Some(start(member, *part)?) });
    }
    let link =
        connect(&coordinator_address()?, &client_tls(&pki, &deployment::operator())?, dial.clone()).await?;
    let operator = OperatorClient::new(link);
    admitted(&operator, started.iter().flatten().count()).await?;
    // JSON is YAML.
    let id = operator.submit_plan(serde_json::to_vec_pretty(plan)?).await?.plan_id;
    let mut events = operator.watch_plan(&id, 0).await?;
    let mut last = None;
    while let Some(event) = events.next().await? {
        tell(&event.phase);
        if event.phase == "corpus" {
            for ((member, part), place) in members.iter().zip(&parts).zip(&mut started) {
                if *part == Part::Late && place.is_none() {
                    *place = Some(start(member, *part)?);
                }
            }
            admitted(&operator, members.len()).await?;
        }
        if let Some(Leaving { after_rounds, .. }) = faults.leaving
            && event
                .phase
                .strip_prefix("round ")
                .and_then(|n| n.parse().ok())
                .is_some_and(|n: u32| n >= after_rounds)
        {
            for (part, place) in parts.iter().zip(&started) {
                if let (Part::Leaving, Some(started)) = (part, place) {
                    started.task.abort();
                }
            }
        }
        last = Some((event.phase, event.detail));
    }
    ended_well(last)?;
    tell("every member chooses");
    let stays = |part: &Part| !matches!(part, Part::Leaving | Part::Liar);
    let staying: Vec<&Member> =
        members.iter().zip(&parts).filter(|(_, part)| stays(part)).map(|(member, _)| member).collect();
    chosen(&layout, &staying).await?;
    stop.send(true)?;
    let mut ends = Vec::new();
    for (part, place) in parts.iter().zip(started) {
        let Some(Started { serving, task }) = place else { bail!("an agent was never started") };
        if stays(part) {
            task.await??;
        } else {
            task.abort();
        }
        ends.push(End { serving: serving.filter(|_| stays(part)) });
    }
    coordinator.await??;
    let learnt = learnt(&layout, &pki, &staying)?;
    Ok(Federated { layout, pki, ends, learnt })
}

/// Runs a plan to its end with a process for the coordinator and for each agent, over sockets.
///
/// # Errors
/// As [`run`]; faults, which only one process can have; a process that ends early.
pub(crate) async fn run_real(root: &Path, setting: Setting<'_>, program: &Path) -> Result<Federated> {
    let Setting { members, plan, seed, faults, tell } = setting;
    ensure!(*faults == FlowFaults::default(), "--real runs flows in which nothing goes wrong");
    let (layout, pki, base) = prepared(root, members)?;
    deployment::write_coordinator(&layout, &base, 2, "127.0.0.1:0")?;
    let log = |name: &str| root.join("logs").join(format!("{name}.log"));
    let serve = args(&["serve", "--config"], layout.coordinator_config());
    let mut coordinator = Process::start(program, "coordinator", "coordinator", &serve, &log("coordinator"))?;
    let address = coordinator.wait_for_file(&layout.coordinator_address(), PATIENCE)?;
    let mut agents = Vec::new();
    for member in members {
        let name = member.name();
        write_member(&layout, member, members, plan, plan.privacy.epsilon, &address)?;
        let mut run = args(&["run", "--config"], layout.agent_config(&name));
        run.push("--reproducible-noise".into());
        run.push(seed.to_string().into());
        agents.push(Process::start(program, &format!("agent {name}"), "agent", &run, &log(&name))?);
    }
    let address = CoordinatorAddress::new(&address, Role::Coordinator.spiffe_id().parse()?)?;
    let link = connect(&address, &client_tls(&pki, &deployment::operator())?, TcpDial).await?;
    let operator = OperatorClient::new(link);
    admitted(&operator, members.len()).await?;
    let id = operator.submit_plan(serde_json::to_vec_pretty(plan)?).await?.plan_id;
    let mut events = operator.watch_plan(&id, 0).await?;
    let mut last = None;
    while let Some(event) = events.next().await? {
        tell(&event.phase);
        coordinator.check()?;
        agents.iter_mut().try_for_each(Process::check)?;
        last = Some((event.phase, event.detail));
    }
    ended_well(last)?;
    tell("every member chooses");
    let staying: Vec<&Member> = members.iter().collect();
    chosen(&layout, &staying).await?;
    // Whoever is asked to stop has two seconds; then what they serve is read from their folders.
    drop(agents);
    drop(coordinator);
    let mut ends = Vec::new();
    for member in members {
        let config = tabmesh_agent::config::Config::load(&layout.agent_config(&member.name()))?;
        let switches = Switches { insecure_dev: true, reproducible_noise: Some(seed) };
        let serving = Local::open(config, switches, Arc::new(unix_ms))?.serving;
        ensure!(serving.restore()?, "{} serves nothing", member.domain);
        ends.push(End { serving: Some(serving) });
    }
    let learnt = learnt(&layout, &pki, &staying)?;
    Ok(Federated { layout, pki, ends, learnt })
}

/// An agent of this process.
struct Started {
    serving: Option<Arc<Serving>>,
    task: JoinHandle<Result<()>>,
}

/// Who has which part: the same under a seed.
fn parts(faults: &FlowFaults, members: usize, seed: u64) -> Vec<Part> {
    let mut parts = vec![Part::Honest; members];
    let mut order: Vec<usize> = (0..members).collect();
    order.shuffle(&mut ChaCha20Rng::seed_from_u64(seed ^ PARTS));
    let liars = faults.liars(u32::try_from(members).unwrap_or(u32::MAX));
    let leaving = faults.leaving.map_or(0, |leaving| leaving.domains);
    let wanted = [
        (Part::Late, faults.late),
        (Part::ShortBudget, faults.short_budget),
        (Part::Leaving, leaving),
        (Part::Liar, liars),
    ];
    let mut order = order.into_iter();
    for (part, number) in wanted {
        for at in order.by_ref().take(number as usize) {
            if let Some(place) = parts.get_mut(at) {
                *place = part;
            }
        }
    }
    parts
}

/// Certificates and base model.
fn prepared(root: &Path, members: &[Member]) -> Result<(Layout, PkiFolder, PathBuf)> {
    let layout = Layout::at(root);
    let roles: Vec<Role> = [Role::Coordinator, deployment::operator()]
        .into_iter()
        .chain(members.iter().map(|member| Role::agent(&member.name())))
        .collect();
    let pki = pki::write(&layout.certificates(), &roles, time::OffsetDateTime::now_utc())?;
    let base = root.join("base.safetensors");
    std::fs::write(&base, BASE_MODEL)?;
    Ok((layout, pki, base))
}

/// Everything a member's agent reads.
fn write_member(
    layout: &Layout,
    member: &Member,
    all: &[Member],
    plan: &Plan,
    epsilon: f64,
    coordinator: &str,
) -> Result<()> {
    let name = member.name();
    std::fs::create_dir_all(layout.domain(&name))?;
    let contract =
        if plan.release.domain_column { member.published_contract()? } else { member.contract.clone() };
    std::fs::write(layout.contract(&name), contract)?;
    deployment::write_policy(layout, &name, &member.product, epsilon)?;
    if plan.secure_sum().is_some() {
        let names: Vec<String> = all.iter().map(Member::name).collect();
        deployment::write_peers(layout, &name, &names.iter().map(String::as_str).collect::<Vec<_>>())?;
    }
    deployment::write_agent(layout, &name, coordinator)
}

fn coordinator_address() -> Result<CoordinatorAddress> {
    Ok(CoordinatorAddress::new(wire::ADDRESS, Role::Coordinator.spiffe_id().parse()?)?)
}

/// Waits until so many agents are admitted and connected.
async fn admitted(operator: &OperatorClient, agents: usize) -> Result<()> {
    let began = now();
    while operator.list_agents().await?.iter().filter(|agent| agent.connected).count() < agents {
        ensure!(began.elapsed() < PATIENCE, "not every agent was admitted; see the log above");
        tokio::time::sleep(POLL).await;
    }
    Ok(())
}

fn ended_well(last: Option<(String, String)>) -> Result<()> {
    match last {
        Some((phase, _)) if phase == "done" => Ok(()),
        Some((phase, detail)) => bail!("the plan ended as {phase}: {detail}"),
        None => bail!("the plan says nothing"),
    }
}

/// Waits until each of them has chosen what it serves: as long as it takes, while one after the other does.
async fn chosen(layout: &Layout, members: &[&Member]) -> Result<()> {
    let chose = |member: &&&Member| layout.domain(&member.name()).join("data").join("promoted.json").exists();
    let (mut known, mut since) = (0, now());
    loop {
        let done = members.iter().filter(chose).count();
        if done == members.len() {
            return Ok(());
        }
        if done > known {
            (known, since) = (done, now());
        }
        let waiting = members.iter().find(|member| !chose(member)).map_or("nobody", |member| &member.domain);
        ensure!(since.elapsed() < PATIENCE, "{waiting} promotes nothing");
        tokio::time::sleep(POLL).await;
    }
}

/// What the rounds published, from the coordinator's store.
fn learnt(layout: &Layout, pki: &PkiFolder, members: &[&Member]) -> Result<Option<Learnt>> {
    let member = members.first().context("nobody is there at the end")?;
    let key = std::fs::read(pki.signing_public_key(&Role::Coordinator))?;
    let key: [u8; 32] = key.try_into().ok().context("the coordinator's public key has not 32 bytes")?;
    let data_dir = layout.domain(&member.name()).join("data");
    let artefacts = Artefacts::open(&data_dir, VerifyingKey::from_bytes(key), Trust::InsecureDev)?;
    let (_, manifest) = artefacts.current()?.context("nothing was published")?;
    let (digest, ending) = match (manifest.adapter, manifest.forest) {
        (Some(adapter), _) => (adapter, "safetensors"),
        (None, Some(forest)) => (forest, "json"),
        (None, None) => return Ok(None),
    };
    let blobs = BlobStore::open(&layout.coordinator().join("data").join("blobs"))?;
    Ok(Some(Learnt { bytes: blobs.get(&Digest::from_bytes(*digest.as_bytes()))?, ending }))
}

/// How long admissions may take, or nobody chooses.
const PATIENCE: Duration = Duration::from_secs(900);
/// Pause between two looks.
const POLL: Duration = Duration::from_millis(50);
/// Sets the stream of parts apart from that of the experiment.
const PARTS: u64 = 0x7061_7274_735f_6f66;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::document::{Attack, Byzantine};

    #[test]
    fn every_fault_has_domains_of_its_own() {
        let faults = FlowFaults {
            late: 1,
            short_budget: 2,
            leaving: Some(Leaving { domains: 1, after_rounds: 3 }),
            byzantine: Some(Byzantine { share: 0.2, attack: Attack::SignFlip }),
        };
        let of = |seed| parts(&faults, 10, seed);
        let count = |part: Part| of(1).iter().filter(|p| **p == part).count();
        let each = [Part::Late, Part::ShortBudget, Part::Leaving, Part::Liar, Part::Honest].map(count);
        assert_eq!(each, [1, 2, 1, 2, 4]);
        assert_eq!(of(1), of(1));
        assert_ne!(of(1), of(2));
    }
}

//! One federation in this process: a coordinator and an agent for each member, over mutual TLS through pipes in memory.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rand::SeedableRng;
use rand_chacha::ChaCha20Rng;
use tabmesh_agent::serving::Serving;
use tabmesh_agent::{Agent, Switches};
use tabmesh_coordinator::{Surroundings, open_records};
use tabmesh_federation::plan::Plan;
use tabmesh_privacy::noise::NoiseSource;
use tabmesh_proto::client::OperatorClient;
use tabmesh_proto::connect::{CoordinatorAddress, connect};
use tokio::sync::watch;

use super::member::Member;
use super::wire;
use crate::process::now;
use crate::quickstart::deployed::{BASE_MODEL, client_tls};
use crate::quickstart::deployment::{self, Layout};
use crate::quickstart::pki::{self, PkiFolder, Role};

/// What a federation left behind.
pub(crate) struct Federated {
    pub(crate) layout: Layout,
    pub(crate) pki: PkiFolder,
    /// What each member serves, in the order of the members.
    pub(crate) serving: Vec<Arc<Serving>>,
}

/// Runs a plan to its end, until every member serves its choice. Noise and secrets come from `seed`.
///
/// # Errors
/// A file can't be written, a contract isn't admitted, or the plan doesn't come to its end.
pub(crate) async fn run(
    root: &Path,
    members: &[Member],
    plan: &Plan,
    seed: u64,
    tell: &dyn Fn(&str),
) -> Result<Federated> {
    let layout = Layout::at(root);
    let roles: Vec<Role> = [Role::Coordinator, deployment::operator()]
        .into_iter()
        .chain(members.iter().map(|member| Role::agent(&member.name())))
        .collect();
    let pki = pki::write(&layout.certificates(), &roles, time::OffsetDateTime::now_utc())?;
    let base = root.join("base.safetensors");
    std::fs::write(&base, BASE_MODEL)?;
    // JSON is YAML.
    let document = serde_json::to_vec_pretty(plan)?;
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
    let switches = tabmesh_coordinator::Switches { insecure_dev: true };
    let coordinator = tokio::spawn(tabmesh_coordinator::run(
        config,
        switches,
        listener,
        surroundings,
        wait(stopped.clone()),
    ));

    let mut serving = Vec::new();
    let mut agents = Vec::new();
    for member in members {
        let name = member.name();
        std::fs::create_dir_all(layout.domain(&name))?;
        std::fs::write(layout.contract(&name), &member.contract)?;
        deployment::write_policy(&layout, &name, &member.product, plan.privacy.epsilon)?;
        deployment::write_agent(&layout, &name, wire::ADDRESS)?;
        let config = tabmesh_agent::config::Config::load(&layout.agent_config(&name))?;
        let switches = Switches { insecure_dev: true, reproducible_noise: Some(seed) };
        let agent = Agent::open(config, switches, NoiseSource::Seeded { seed }, clock.clone())
            .with_context(|| format!("agent of {}", member.domain))?;
        serving.push(Arc::clone(&agent.serving));
        agents.push(tokio::spawn(agent.run(dial.clone(), wait(stopped.clone()))));
    }
    let address = CoordinatorAddress::new(wire::ADDRESS, Role::Coordinator.spiffe_id().parse()?)?;
    let link = connect(&address, &client_tls(&pki, &deployment::operator())?, dial).await?;
    let operator = OperatorClient::new(link);
    let began = now();
    while operator.list_agents().await?.iter().filter(|agent| agent.connected).count() < members.len() {
        ensure!(began.elapsed() < PATIENCE, "not every agent was admitted; see the log above");
        tokio::time::sleep(POLL).await;
    }
    let id = operator.submit_plan(document).await?.plan_id;
    let mut events = operator.watch_plan(&id, 0).await?;
    let mut last = None;
    while let Some(event) = events.next().await? {
        tell(&event.phase);
        last = Some(event);
    }
    match last {
        Some(event) if event.phase == "done" => {}
        Some(event) => bail!("the plan ended as {}: {}", event.phase, event.detail),
        None => bail!("the plan says nothing"),
    }
    tell("every member chooses");
    for member in members {
        let path = layout.domain(&member.name()).join("data").join("promoted.json");
        let began = now();
        while !path.exists() {
            ensure!(began.elapsed() < PATIENCE, "{} promotes nothing", member.domain);
            tokio::time::sleep(POLL).await;
        }
    }
    stop.send(true)?;
    for agent in agents {
        agent.await??;
    }
    coordinator.await??;
    Ok(Federated { layout, pki, serving })
}

#[allow(
    clippy::disallowed_methods,
    reason = "the harness stands where the command line would: it gives the clock"
)]
fn unix_ms() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// How long admissions or a choice may take.
const PATIENCE: Duration = Duration::from_secs(900);
/// Pause between two looks.
const POLL: Duration = Duration::from_millis(50);

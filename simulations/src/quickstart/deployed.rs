//! A deployment that runs: its processes, how they are reached, killed and started again.
//!
//! The folder is what an operator would have written; every process runs the coordinator's or the agent's own command
//! line on it and is stopped when this is dropped.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tabmesh_contract::contract::DomainAggregates;
use tabmesh_proto::client::{AuditorClient, OperatorClient};
use tabmesh_proto::connect::{CoordinatorAddress, Link, TcpDial, connect};
use tabmesh_proto::identity::DevelopmentCa;
use tabmesh_proto::tls::{ClientTls, DefaultTimeProvider, TlsFiles, TlsMaterial, TlsPolicy};

use super::dataset::{DOMAINS, Domain};
use super::deployment::{self, Layout, PlanChoices};
use super::pki::{self, PkiFolder, Role, Usage};
use crate::process::{Process, now};

/// The base model that ships with the repository.
pub const BASE_MODEL: &[u8] = include_bytes!("../../../models/nano/base.safetensors");

/// What a deployment is made with.
#[derive(Debug, Clone)]
pub struct Setup {
    /// The program that takes the roles; a binary of this crate.
    pub program: PathBuf,
    /// Rows each table is shortened to.
    pub rows: Option<usize>,
    /// The plan written to the folder.
    pub plan: PlanChoices,
    /// Seed of the agents' noise and secrets: reproducible, not private.
    pub seed: Option<u64>,
    /// Lines added to what is written.
    pub more: Lines,
}

/// Lines of YAML, each with its line feed, that a deployment has beyond the quickstart's own.
#[derive(Debug, Clone, Default)]
pub struct Lines {
    /// Of the coordinator's configuration.
    pub coordinator: String,
    /// Of every agent's configuration.
    pub agent: String,
    /// Of every contract's `privacy`, two spaces further in.
    pub privacy: String,
}

/// A running deployment.
#[derive(Debug)]
pub struct Deployment {
    /// Its folder.
    pub layout: Layout,
    /// Its certificates.
    pub pki: PkiFolder,
    /// The coordinator.
    pub coordinator: Process,
    /// Where the coordinator listens.
    pub coordinator_address: String,
    /// The agents, in the order of [`DOMAINS`].
    pub agents: Vec<Process>,
    /// Where the agents answer predictions, in the same order.
    pub agent_addresses: Vec<String>,
    setup: Setup,
}

impl Deployment {
    /// Writes a deployment's folder and starts its processes.
    ///
    /// # Errors
    /// A file can't be written, or a process doesn't come up; the error ends with its log.
    pub fn start(root: &Path, setup: Setup) -> Result<Self> {
        let layout = Layout::at(root);
        let pki = pki::write(&layout.certificates(), &deployment::roles(), time::OffsetDateTime::now_utc())?;
        std::fs::create_dir_all(root.join("models"))?;
        std::fs::write(base_model(&layout), BASE_MODEL)?;
        // What secure sums are for: no domain's own aggregates are seen.
        let aggregates = match setup.plan.secure_sum {
            true => DomainAggregates::Confidential,
            false => DomainAggregates::Open,
        };
        deployment::write_domains(&layout, setup.rows, aggregates)?;
        for domain in &DOMAINS {
            insert(&layout.contract(domain.id), PRIVACY, &setup.more.privacy)?;
        }
        deployment::write_plan(&layout, &setup.plan)?;
        let names: Vec<&str> = DOMAINS.iter().map(|domain| domain.id).collect();
        deployment::write_auditors_peers(&layout, &names)?;
        if setup.plan.secure_sum {
            for domain in &names {
                deployment::write_peers(&layout, domain, &names)?;
            }
        }
        let mut coordinator = start_coordinator(&layout, &setup, "127.0.0.1:0")?;
        let coordinator_address = coordinator.wait_for_file(&layout.coordinator_address(), PATIENCE)?;
        deployment::write_clients(&layout, &coordinator_address)?;
        let mut agents = Vec::new();
        for domain in &DOMAINS {
            agents.push(start_agent(&layout, &setup, domain, &coordinator_address)?);
        }
        let mut agent_addresses = Vec::new();
        for (domain, agent) in DOMAINS.iter().zip(&mut agents) {
            agent_addresses.push(agent.wait_for_file(&layout.agent_address(domain.id), PATIENCE)?);
        }
        Ok(Self { layout, pki, coordinator, coordinator_address, agents, agent_addresses, setup })
    }

    /// Adds lines to the coordinator's configuration, from its next start on.
    pub fn configure_coordinator(&mut self, lines: &str) {
        self.setup.more.coordinator.push_str(lines);
    }

    /// Starts the coordinator again where it listened before, after it was killed.
    ///
    /// # Errors
    /// It doesn't come up.
    pub fn restart_coordinator(&mut self) -> Result<()> {
        // One that didn't come up has written none.
        if let Err(error) = std::fs::remove_file(self.layout.coordinator_address())
            && error.kind() != std::io::ErrorKind::NotFound
        {
            return Err(error.into());
        }
        self.coordinator = start_coordinator(&self.layout, &self.setup, &self.coordinator_address)?;
        self.coordinator.wait_for_file(&self.layout.coordinator_address(), PATIENCE)?;
        Ok(())
    }

    /// Starts an agent again after it was killed; its prediction endpoint gets another port.
    ///
    /// # Errors
    /// There is no such agent, or it doesn't come up.
    pub fn restart_agent(&mut self, at: usize) -> Result<()> {
        let domain = DOMAINS.get(at).context("no such agent")?;
        std::fs::remove_file(self.layout.agent_address(domain.id))?;
        let mut agent = start_agent(&self.layout, &self.setup, domain, &self.coordinator_address)?;
        let address = agent.wait_for_file(&self.layout.agent_address(domain.id), PATIENCE)?;
        if let (Some(process), Some(old)) = (self.agents.get_mut(at), self.agent_addresses.get_mut(at)) {
            (*process, *old) = (agent, address);
        }
        Ok(())
    }

    /// A connection in one of the deployment's roles.
    ///
    /// # Errors
    /// The certificates can't be read, or the coordinator can't be reached.
    pub async fn link(&self, role: &Role) -> Result<Link> {
        let tls = client_tls(&self.pki, role)?;
        let coordinator = Role::Coordinator.spiffe_id().parse()?;
        let address = CoordinatorAddress::new(&self.coordinator_address, coordinator)?;
        Ok(connect(&address, &tls, TcpDial).await?)
    }

    /// A client in the operator's role.
    ///
    /// # Errors
    /// As [`Self::link`].
    pub async fn operator(&self) -> Result<OperatorClient> {
        Ok(OperatorClient::new(self.link(&deployment::operator()).await?))
    }

    /// A client in the auditor's role.
    ///
    /// # Errors
    /// As [`Self::link`].
    pub async fn auditor(&self) -> Result<AuditorClient> {
        Ok(AuditorClient::new(self.link(&deployment::auditor()).await?))
    }

    /// Waits until every agent is admitted and connected.
    ///
    /// # Errors
    /// A process ended, or the time is over.
    pub async fn admitted(&mut self, operator: &OperatorClient) -> Result<()> {
        let began = now();
        loop {
            let agents = operator.list_agents().await?;
            if agents.iter().filter(|agent| agent.connected).count() == DOMAINS.len() {
                return Ok(());
            }
            self.check()?;
            ensure!(began.elapsed() < PATIENCE, "{} of {} agents were admitted", agents.len(), DOMAINS.len());
            tokio::time::sleep(POLL).await;
        }
    }

    /// Waits until every agent serves a promoted version.
    ///
    /// # Errors
    /// A process ended, or the time is over.
    pub async fn promoted(&mut self) -> Result<()> {
        let began = now();
        for domain in &DOMAINS {
            let path = self.layout.domain(domain.id).join("data").join("promoted.json");
            while !path.exists() {
                self.check()?;
                ensure!(began.elapsed() < PATIENCE, "{} promotes nothing; see its log", domain.id);
                tokio::time::sleep(POLL).await;
            }
        }
        Ok(())
    }

    /// Fails with the end of its log if a process has ended.
    ///
    /// # Errors
    /// A process has ended.
    pub fn check(&mut self) -> Result<()> {
        self.coordinator.check()?;
        self.agents.iter_mut().try_for_each(Process::check)
    }

    /// The coordinator, then the agents.
    pub fn processes(&self) -> impl Iterator<Item = &Process> {
        std::iter::once(&self.coordinator).chain(&self.agents)
    }
}

/// TLS identity of a role that dials.
///
/// # Errors
/// The certificates can't be read or used.
pub fn client_tls(pki: &PkiFolder, role: &Role) -> Result<ClientTls> {
    let paths = pki.tls(role, Usage::Client);
    let files =
        TlsFiles { ca: pki.authority(), certificate: paths.certificate, key: paths.key, crls: Vec::new() };
    let policy = TlsPolicy { development: DevelopmentCa::Accept, time: Arc::new(DefaultTimeProvider) };
    Ok(ClientTls::new(&TlsMaterial::read(&files)?, policy)?)
}

fn base_model(layout: &Layout) -> PathBuf {
    layout.root().join("models").join("base.safetensors")
}

fn start_coordinator(layout: &Layout, setup: &Setup, listen: &str) -> Result<Process> {
    deployment::write_coordinator(layout, &base_model(layout), 2, listen)?;
    insert(&layout.coordinator_config(), "", &setup.more.coordinator)?;
    let serve = args(&["serve", "--config"], layout.coordinator_config());
    let log = layout.root().join("logs").join("coordinator.log");
    Process::start(&setup.program, "coordinator", "coordinator", &serve, &log)
}

fn start_agent(layout: &Layout, setup: &Setup, domain: &Domain, coordinator: &str) -> Result<Process> {
    deployment::write_agent(layout, domain.id, coordinator)?;
    insert(&layout.agent_config(domain.id), "", &setup.more.agent)?;
    let mut run = args(&["run", "--config"], layout.agent_config(domain.id));
    if let Some(seed) = setup.seed {
        run.push("--reproducible-noise".into());
        run.push(seed.to_string().into());
    }
    let log = layout.root().join("logs").join(format!("{}.log", domain.id));
    Process::start(&setup.program, &format!("agent {}", domain.id), "agent", &run, &log)
}

/// Puts lines behind a line of a file, or in front of all.
fn insert(path: &Path, behind: &str, lines: &str) -> Result<()> {
    let text = std::fs::read_to_string(path)?;
    let (before, after) = match behind {
        "" => ("", text.as_str()),
        behind => text.split_once(behind).with_context(|| format!("no {behind:?} in {}", path.display()))?,
    };
    Ok(std::fs::write(path, [before, behind, lines, after].concat())?)
}

/// Words of a process's command line, with its configuration.
pub(crate) fn args(words: &[&str], config: PathBuf) -> Vec<OsString> {
    let mut args: Vec<OsString> = words.iter().map(OsString::from).collect();
    args.push(config.into());
    args.push("--insecure-dev".into());
    args.push("--until-stdin-closes".into());
    args
}

/// The line of a contract behind which its privacy section is.
const PRIVACY: &str = "\nprivacy:\n";
/// How long a start-up or a promotion may take.
const PATIENCE: Duration = Duration::from_secs(180);
/// Pause between two looks.
const POLL: Duration = Duration::from_millis(50);

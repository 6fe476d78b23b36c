//! One whole loop in this process: a coordinator, agents behind taps, a plan, until all links are quiet.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use arrow_array::{ArrayRef, RecordBatch, StringArray, UInt32Array};
use arrow_select::concat::concat_batches;
use arrow_select::take::take_record_batch;
use clap::ValueEnum;
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use rand::SeedableRng;
use rand_chacha::ChaCha20Rng;
use serde::Serialize;
use tabmesh_agent::gate::Gate;
use tabmesh_agent::{Agent, Switches};
use tabmesh_contract::contract::DomainAggregates;
use tabmesh_coordinator::Surroundings;
use tabmesh_privacy::noise::NoiseSource;
use tabmesh_proto::client::{AuditorClient, OperatorClient};
use tabmesh_proto::connect::{CoordinatorAddress, TcpDial, connect};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::tap::{Call, Tap};
use crate::quickstart::dataset::{DOMAINS, Domain, LABEL};
use crate::quickstart::deployed::{BASE_MODEL, client_tls};
use crate::quickstart::deployment::{self, Layout, PlanChoices};
use crate::quickstart::pki::{PkiFolder, Role};

/// Whether agents add all of the noise or shares of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Placement {
    /// All of it.
    Local,
    /// Shares, in secure sums.
    SecureSum,
}

impl Placement {
    /// For people.
    #[must_use]
    pub fn words(self) -> &'static str {
        match self {
            Self::Local => "local noise",
            Self::SecureSum => "secure sums",
        }
    }

    /// What the contracts say of a domain's own aggregates.
    fn aggregates(self) -> DomainAggregates {
        match self {
            Self::Local => DomainAggregates::Open,
            Self::SecureSum => DomainAggregates::Confidential,
        }
    }

    /// Agents of the loop: a secure sum needs four.
    pub(crate) fn agents(self) -> usize {
        match self {
            Self::Local => 3,
            Self::SecureSum => 4,
        }
    }
}

/// Rows of each agent's table.
pub(crate) const ROWS: usize = 120;
/// Seed of noise, secrets and ids.
const SEED: u64 = 5;
/// Time for the last connections of a run to close.
const LEAVING: Duration = Duration::from_millis(300);
/// The time, always.
const NOW_MS: i64 = 1_800_000_000_000;

/// Everything outside the agents that a loop left behind.
#[derive(Clone)]
pub(crate) struct Outcome {
    /// Calls of each agent.
    pub(crate) calls: Vec<Vec<Call>>,
    /// What the coordinator logged.
    pub(crate) log: Vec<String>,
    /// The coordinator's audit log and mirrored ledgers, by path.
    pub(crate) files: BTreeMap<String, Vec<u8>>,
    /// The signed report.
    pub(crate) report: Vec<u8>,
}

/// A table of the first domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Table {
    /// The first rows.
    Plain,
    /// One more row, which falls on the gate's side.
    OneMoreAtTheGate,
    /// One more row, which falls on the training side.
    OneMore,
    /// One row less.
    OneLess,
    /// Every row of the same class.
    OneClass,
    /// No row.
    Empty,
}

impl Table {
    /// All of them, the plain one first.
    pub(crate) const ALL: [Self; 6] =
        [Self::Plain, Self::OneMoreAtTheGate, Self::OneMore, Self::OneLess, Self::OneClass, Self::Empty];

    /// For people.
    #[must_use]
    pub fn words(self) -> &'static str {
        match self {
            Self::Plain => "the plain table",
            Self::OneMoreAtTheGate => "one gate row more",
            Self::OneMore => "one training row more",
            Self::OneLess => "one row less",
            Self::OneClass => "one class",
            Self::Empty => "no row",
        }
    }
}

/// Runs the loop with a table of the first domain; the relays take `listeners`, since every request names its host.
///
/// # Errors
/// A file, a process or a link that can't be used, or a plan that doesn't end well.
pub(crate) async fn run(
    root: &Path,
    pki: &PkiFolder,
    listeners: &[TcpListener],
    placement: Placement,
    table: Table,
    log: &Mutex<Vec<String>>,
) -> Result<Outcome> {
    let layout = Layout::at(root);
    log.lock().unwrap_or_else(PoisonError::into_inner).clear();
    let base = root.join("base.safetensors");
    std::fs::write(&base, BASE_MODEL)?;
    let plan = PlanChoices {
        agents: placement.agents(),
        secure_sum: placement == Placement::SecureSum,
        corpus_rows: 600,
        pretrain_steps: 1,
        rounds: 2,
        ..PlanChoices::default()
    };
    deployment::write_plan(&layout, &plan)?;
    deployment::write_coordinator(&layout, &base, 1, "127.0.0.1:0")?;
    let (stop, stopped) = watch::channel(false);
    let wait = |mut stopped: watch::Receiver<bool>| async move {
        let _ = stopped.wait_for(|stop| *stop).await;
    };
    let (coordinator, answering) = start_coordinator(&layout, wait(stopped.clone())).await?;

    let operator = OperatorClient::new(link(pki, coordinator, &deployment::operator()).await?);
    let (mut taps, mut agents) = (Vec::new(), Vec::new());
    let domains = &DOMAINS[..placement.agents()];
    let names: Vec<&str> = domains.iter().map(|domain| domain.id).collect();
    for (at, domain) in domains.iter().enumerate() {
        let tap = Tap::start(pki, &Role::agent(domain.id), &listeners[at], coordinator)?;
        deployment::write_contract(&layout, domain, placement.aggregates())?;
        deployment::write_policy(&layout, domain.id, &deployment::product(domain), 3.0)?;
        if placement == Placement::SecureSum {
            deployment::write_peers(&layout, domain.id, &names)?;
        }
        deployment::write_agent(&layout, domain.id, &listeners[at].local_addr()?.to_string())?;
        domain.write_train(&layout.train_table(domain.id), Some(ROWS))?;
        if at == 0 {
            rewrite(&layout, domain, table)?;
        }
        let agent = open(&layout, domain)?;
        let shutdown = wait(stopped.clone());
        agents.push(tokio::spawn(async move { agent.run(TcpDial, shutdown).await }));
        taps.push(tap);
        // One after the other, so that sessions are numbered alike in every run.
        let connected = async || {
            let agents = operator.list_agents().await?;
            anyhow::Ok(agents.iter().filter(|agent| agent.connected).count())
        };
        while connected().await? <= at {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        // The first heartbeat is acknowledged before anything is asked, or chance would order what the last agent hears.
        while !taps[at].calls()?.iter().any(|call| call.down.messages.len() > 1) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    let yaml = std::fs::read(layout.plan())?;
    let id = operator.submit_plan(yaml).await?.plan_id;
    let mut events = operator.watch_plan(&id, 0).await?;
    let mut last = None;
    while let Some(event) = events.next().await? {
        last = Some(event);
    }
    let phase = last.context("a plan without an event")?.phase;
    ensure!(phase == "done", "the plan ended as {phase}");
    quiet(&layout, domains, &taps).await;
    let auditor = AuditorClient::new(link(pki, coordinator, &deployment::auditor()).await?);
    let report = auditor.report_input(None).await?;
    let calls = taps.iter().map(Tap::calls).collect::<Result<_>>()?;
    let mut files = BTreeMap::new();
    collect(&layout.coordinator().join("data").join("ledgers"), &mut files)?;
    collect(&layout.coordinator().join("data").join("audit.log"), &mut files)?;
    let mut log = std::mem::take(&mut *log.lock().unwrap_or_else(PoisonError::into_inner));
    // Agents answer side by side: the order among them is chance.
    log.sort();
    // Everyone leaves before the next run begins, so that what they say in leaving is in nobody's log.
    stop.send(true)?;
    for agent in agents {
        agent.await??;
    }
    drop((operator, auditor, taps));
    answering.await??;
    tokio::time::sleep(LEAVING).await;
    Ok(Outcome { calls, log, files, report })
}

async fn start_coordinator(
    layout: &Layout,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(SocketAddr, JoinHandle<Result<()>>)> {
    let mut config = tabmesh_coordinator::config::Config::load(&layout.coordinator_config())?;
    // No heartbeat falls into the run: what is compared follows from the work alone.
    config.heartbeat_interval_ms = 600_000;
    let listener = tokio::net::TcpListener::bind(&config.listen).await?;
    let address = listener.local_addr()?;
    let surroundings = Surroundings {
        records: tabmesh_coordinator::open_records(&config)?,
        clock: Arc::new(|| NOW_MS),
        ids: Box::new(ChaCha20Rng::seed_from_u64(SEED)),
    };
    let switches = tabmesh_coordinator::Switches { insecure_dev: true, ..Default::default() };
    let answering = tokio::spawn(async move {
        Ok(tabmesh_coordinator::run(config, switches, listener, surroundings, shutdown).await?)
    });
    Ok((address, answering))
}

fn open(layout: &Layout, domain: &Domain) -> Result<Agent> {
    let config = tabmesh_agent::config::Config::load(&layout.agent_config(domain.id))?;
    let switches = Switches { insecure_dev: true, reproducible_noise: Some(SEED) };
    Ok(Agent::open(config, switches, NoiseSource::Seeded { seed: SEED }, Arc::new(|| NOW_MS))?)
}

async fn link(pki: &PkiFolder, coordinator: SocketAddr, role: &Role) -> Result<tabmesh_proto::connect::Link> {
    let id = Role::Coordinator.spiffe_id().parse()?;
    let address = CoordinatorAddress::new(&coordinator.to_string(), id)?;
    Ok(connect(&address, &client_tls(pki, role)?, TcpDial).await?)
}

/// Waits until every agent has chosen what to serve and no link has carried a byte for a while.
async fn quiet(layout: &Layout, domains: &[Domain], taps: &[Tap]) {
    for domain in domains {
        while !layout.domain(domain.id).join("data").join("promoted.json").exists() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    let volume = || taps.iter().map(Tap::volume).sum::<usize>();
    let mut before = 0;
    while before != volume() {
        before = volume();
        tokio::time::sleep(Duration::from_millis(700)).await;
    }
}

/// Replaces the domain's table.
fn rewrite(layout: &Layout, domain: &Domain, table: Table) -> Result<()> {
    let path = layout.train_table(domain.id);
    let plain = read(&path)?;
    domain.write_train(&path, Some(2 * ROWS))?;
    let spare = read(&path)?;
    let rows = |batch: &RecordBatch, rows: Vec<u32>| take_record_batch(batch, &UInt32Array::from(rows));
    let new = match table {
        Table::Plain => plain,
        Table::OneLess => plain.slice(0, ROWS - 1),
        Table::Empty => plain.slice(0, 0),
        Table::OneClass => {
            let at = plain.schema().index_of(LABEL)?;
            let mut columns = plain.columns().to_vec();
            let labels: ArrayRef = Arc::new(StringArray::from(vec!["0"; ROWS]));
            columns[at] = arrow_cast::cast(&labels, plain.schema().field(at).data_type())?;
            RecordBatch::try_new(plain.schema(), columns)?
        }
        Table::OneMore | Table::OneMoreAtTheGate => {
            let wanted = matches!(table, Table::OneMoreAtTheGate);
            let gate = {
                write(&path, &spare)?;
                let agent = open(layout, domain)?;
                let all = agent.work.domain.rows(&agent.work.domain.schema)?;
                Gate::new(&agent.work.domain.secret("gate")).split(&all).gate
            };
            std::fs::remove_dir_all(layout.domain(domain.id).join("data"))?;
            let found = (ROWS..2 * ROWS).find(|row| gate.contains(row) == wanted).context("no such row")?;
            let more = rows(&spare, vec![u32::try_from(found)?])?;
            concat_batches(&plain.schema(), [&plain, &more])?
        }
    };
    write(&path, &new)
}

fn read(path: &Path) -> Result<RecordBatch> {
    let file = std::fs::File::open(path)?;
    let builder = ParquetRecordBatchReaderBuilder::try_new(file)?;
    let schema = Arc::clone(builder.schema());
    let batches = builder.build()?.collect::<Result<Vec<RecordBatch>, _>>()?;
    Ok(concat_batches(&schema, &batches)?)
}

fn write(path: &Path, batch: &RecordBatch) -> Result<()> {
    let mut writer = ArrowWriter::try_new(std::fs::File::create(path)?, batch.schema(), None)?;
    writer.write(batch)?;
    writer.close()?;
    Ok(())
}

fn collect(path: &Path, files: &mut BTreeMap<String, Vec<u8>>) -> Result<()> {
    if path.is_dir() {
        for entry in std::fs::read_dir(path)? {
            collect(&entry?.path(), files)?;
        }
    } else {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        files.insert(name, std::fs::read(path)?);
    }
    Ok(())
}

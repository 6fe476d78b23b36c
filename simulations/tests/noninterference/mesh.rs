//! One whole loop in this process: a coordinator, agents behind taps, a plan, until all links are quiet.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arrow_array::{ArrayRef, RecordBatch, StringArray, UInt32Array};
use arrow_select::concat::concat_batches;
use arrow_select::take::take_record_batch;
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use rand::SeedableRng;
use rand_chacha::ChaCha20Rng;
use tabmesh_agent::gate::Gate;
use tabmesh_agent::{Agent, Switches};
use tabmesh_contract::contract::DomainAggregates;
use tabmesh_coordinator::Surroundings;
use tabmesh_privacy::noise::NoiseSource;
use tabmesh_proto::client::{AuditorClient, OperatorClient};
use tabmesh_proto::connect::{CoordinatorAddress, TcpDial, connect};
use tabmesh_sim::quickstart::dataset::{DOMAINS, Domain, LABEL};
use tabmesh_sim::quickstart::deployed::client_tls;
use tabmesh_sim::quickstart::deployment::{self, Layout, PlanChoices};
use tabmesh_sim::quickstart::pki::{PkiFolder, Role};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::tap::{Call, Tap};

/// Whether agents add all of the noise or shares of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Placement {
    /// All of it.
    Local,
    /// Shares, in secure sums.
    SecureSum,
}

impl Placement {
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
#[derive(Debug, Clone, Copy)]
pub(crate) enum Table {
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

/// Runs the loop with a table of the first domain; the relays take `listeners`, since every request names its host.
pub(crate) async fn run(
    root: &Path,
    pki: &PkiFolder,
    listeners: &[TcpListener],
    placement: Placement,
    table: Table,
    log: &Mutex<Vec<String>>,
) -> Outcome {
    let layout = Layout::at(root);
    log.lock().unwrap().clear();
    let base = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/nano/base.safetensors");
    let plan = PlanChoices {
        agents: placement.agents(),
        secure_sum: placement == Placement::SecureSum,
        corpus_rows: 600,
        pretrain_steps: 1,
        rounds: 2,
        ..PlanChoices::default()
    };
    deployment::write_plan(&layout, &plan).unwrap();
    deployment::write_coordinator(&layout, Path::new(base), 1, "127.0.0.1:0").unwrap();
    let (stop, stopped) = watch::channel(false);
    let wait = |mut stopped: watch::Receiver<bool>| async move {
        let _ = stopped.wait_for(|stop| *stop).await;
    };
    let (coordinator, answering) = start_coordinator(&layout, wait(stopped.clone())).await;

    let operator = OperatorClient::new(link(pki, coordinator, &deployment::operator()).await);
    let (mut taps, mut agents) = (Vec::new(), Vec::new());
    let domains = &DOMAINS[..placement.agents()];
    let names: Vec<&str> = domains.iter().map(|domain| domain.id).collect();
    for (at, domain) in domains.iter().enumerate() {
        let tap = Tap::start(pki, &Role::agent(domain.id), &listeners[at], coordinator);
        deployment::write_contract(&layout, domain, placement.aggregates()).unwrap();
        deployment::write_policy(&layout, domain.id, &deployment::product(domain), 3.0).unwrap();
        if placement == Placement::SecureSum {
            deployment::write_peers(&layout, domain.id, &names).unwrap();
        }
        deployment::write_agent(&layout, domain.id, &listeners[at].local_addr().unwrap().to_string())
            .unwrap();
        domain.write_train(&layout.train_table(domain.id), Some(ROWS)).unwrap();
        if at == 0 {
            rewrite(&layout, domain, table);
        }
        let agent = open(&layout, domain);
        let shutdown = wait(stopped.clone());
        agents.push(tokio::spawn(async move { agent.run(TcpDial, shutdown).await.unwrap() }));
        taps.push(tap);
        // One after the other, so that sessions are numbered alike in every run.
        let connected = async || {
            let agents = operator.list_agents().await.unwrap();
            agents.iter().filter(|agent| agent.connected).count()
        };
        while connected().await <= at {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        // The first heartbeat is acknowledged before anything is asked, or chance would order what the last agent hears.
        while !taps[at].calls().iter().any(|call| call.down.messages.len() > 1) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    let yaml = std::fs::read(layout.plan()).unwrap();
    let id = operator.submit_plan(yaml).await.unwrap().plan_id;
    let mut events = operator.watch_plan(&id, 0).await.unwrap();
    let mut last = None;
    while let Some(event) = events.next().await.unwrap() {
        last = Some(event);
    }
    assert_eq!(last.unwrap().phase, "done");
    quiet(&layout, domains, &taps).await;
    let auditor = AuditorClient::new(link(pki, coordinator, &deployment::auditor()).await);
    let report = auditor.report_input(None).await.unwrap();
    let calls = taps.iter().map(Tap::calls).collect();
    let mut files = BTreeMap::new();
    collect(&layout.coordinator().join("data").join("ledgers"), &mut files);
    collect(&layout.coordinator().join("data").join("audit.log"), &mut files);
    let mut log = std::mem::take(&mut *log.lock().unwrap());
    // Agents answer side by side: the order among them is chance.
    log.sort();
    // Everyone leaves before the next run begins, so that what they say in leaving is in nobody's log.
    stop.send(true).unwrap();
    for agent in agents {
        agent.await.unwrap();
    }
    drop((operator, auditor, taps));
    answering.await.unwrap();
    tokio::time::sleep(LEAVING).await;
    Outcome { calls, log, files, report }
}

async fn start_coordinator(
    layout: &Layout,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> (SocketAddr, JoinHandle<()>) {
    let mut config = tabmesh_coordinator::config::Config::load(&layout.coordinator_config()).unwrap();
    // No heartbeat falls into the run: what is compared follows from the work alone.
    config.heartbeat_interval_ms = 600_000;
    let listener = tokio::net::TcpListener::bind(&config.listen).await.unwrap();
    let address = listener.local_addr().unwrap();
    let surroundings = Surroundings {
        records: tabmesh_coordinator::open_records(&config).unwrap(),
        clock: Arc::new(|| NOW_MS),
        ids: Box::new(ChaCha20Rng::seed_from_u64(SEED)),
    };
    let switches = tabmesh_coordinator::Switches { insecure_dev: true, ..Default::default() };
    let answering = tokio::spawn(async move {
        tabmesh_coordinator::run(config, switches, listener, surroundings, shutdown).await.unwrap();
    });
    (address, answering)
}

fn open(layout: &Layout, domain: &Domain) -> Agent {
    let config = tabmesh_agent::config::Config::load(&layout.agent_config(domain.id)).unwrap();
    let switches = Switches { insecure_dev: true, reproducible_noise: Some(SEED) };
    Agent::open(config, switches, NoiseSource::Seeded { seed: SEED }, Arc::new(|| NOW_MS)).unwrap()
}

async fn link(pki: &PkiFolder, coordinator: SocketAddr, role: &Role) -> tabmesh_proto::connect::Link {
    let id = Role::Coordinator.spiffe_id().parse().unwrap();
    let address = CoordinatorAddress::new(&coordinator.to_string(), id).unwrap();
    connect(&address, &client_tls(pki, role).unwrap(), TcpDial).await.unwrap()
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
fn rewrite(layout: &Layout, domain: &Domain, table: Table) {
    let path = layout.train_table(domain.id);
    let plain = read(&path);
    let spare = {
        domain.write_train(&path, Some(2 * ROWS)).unwrap();
        read(&path)
    };
    let rows =
        |batch: &RecordBatch, rows: Vec<u32>| take_record_batch(batch, &UInt32Array::from(rows)).unwrap();
    let new = match table {
        Table::Plain => plain,
        Table::OneLess => plain.slice(0, ROWS - 1),
        Table::Empty => plain.slice(0, 0),
        Table::OneClass => {
            let at = plain.schema().index_of(LABEL).unwrap();
            let mut columns = plain.columns().to_vec();
            let labels: ArrayRef = Arc::new(StringArray::from(vec!["0"; ROWS]));
            columns[at] = arrow_cast::cast(&labels, plain.schema().field(at).data_type()).unwrap();
            RecordBatch::try_new(plain.schema(), columns).unwrap()
        }
        Table::OneMore | Table::OneMoreAtTheGate => {
            let wanted = matches!(table, Table::OneMoreAtTheGate);
            let gate = {
                write(&path, &spare);
                let agent = open(layout, domain);
                let all = agent.work.domain.rows(&agent.work.domain.schema).unwrap();
                Gate::new(&agent.work.domain.secret("gate")).split(&all).gate
            };
            std::fs::remove_dir_all(layout.domain(domain.id).join("data")).unwrap();
            let found = (ROWS..2 * ROWS).find(|row| gate.contains(row) == wanted).unwrap();
            let more = rows(&spare, vec![u32::try_from(found).unwrap()]);
            concat_batches(&plain.schema(), [&plain, &more]).unwrap()
        }
    };
    write(&path, &new);
}

fn read(path: &Path) -> RecordBatch {
    let file = std::fs::File::open(path).unwrap();
    let builder = ParquetRecordBatchReaderBuilder::try_new(file).unwrap();
    let schema = Arc::clone(builder.schema());
    let batches: Vec<RecordBatch> = builder.build().unwrap().map(Result::unwrap).collect();
    concat_batches(&schema, &batches).unwrap()
}

fn write(path: &Path, batch: &RecordBatch) {
    let mut writer =
        ArrowWriter::try_new(std::fs::File::create(path).unwrap(), batch.schema(), None).unwrap();
    writer.write(batch).unwrap();
    writer.close().unwrap();
}

fn collect(path: &Path, files: &mut BTreeMap<String, Vec<u8>>) {
    if path.is_dir() {
        for entry in std::fs::read_dir(path).unwrap() {
            collect(&entry.unwrap().path(), files);
        }
    } else {
        files.insert(path.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(path).unwrap());
    }
}

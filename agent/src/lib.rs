//! The agent of one data domain: reads its tables, answers with noised statistics, and serves the merged model.
//!
//! One process, started by [`cli::main`]; [`run`] is the whole agent on a clock, a noise source and a dialler of the
//! caller. It opens every connection itself; what listens is the prediction endpoint alone.

#![forbid(unsafe_code)]

pub mod alerts;
pub mod blend;
pub mod books;
pub mod calibrate;
pub mod choose;
pub mod cli;
mod command;
pub mod config;
pub mod domain;
pub mod files;
pub mod gate;
pub mod lineage;
pub mod peers;
pub mod posterior;
pub mod promote;
pub mod publication;
pub mod serve;
pub mod serving;
pub mod session;
pub mod source;
pub mod student;
pub mod sums;
pub mod train;
pub mod trees;
pub mod witness;
pub mod work;

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use miette::Diagnostic;
use tabmesh_federation::manifest::Trust;
use tabmesh_privacy::budget::Epsilon;
use tabmesh_privacy::ledger::Balance;
use tabmesh_privacy::ledger::window::Standing;
use tabmesh_privacy::noise::NoiseSource;
use tabmesh_proto::connect::{ConnectError, CoordinatorAddress, Dial};
use tabmesh_proto::identity::{DevelopmentCa, SpiffeId};
use tabmesh_proto::tls::{ClientTls, DefaultTimeProvider, TlsError, TlsFiles, TlsMaterial, TlsPolicy};
use thiserror::Error;
use tokio::net::TcpListener;

use crate::alerts::{AlertError, Alerts, Webhook};
use crate::books::{Books, BooksError};
use crate::config::Config;
use crate::domain::{Domain, DomainError};
use crate::publication::{ArtefactError, Artefacts};
use crate::serve::log::{JsonlLog, LogError};
use crate::serve::{BudgetFacts, Clock, Predictor, ServeConfig, ServeError};
use crate::serving::Serving;
use crate::session::Link;
use crate::student::{STUDENT_SUFFIX, StudentService};
use crate::work::{Work, WorkError};

/// Why an agent can't run.
#[derive(Debug, Error, Diagnostic)]
#[non_exhaustive]
pub enum AgentError {
    /// Configuration, contract or policy.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Domain(#[from] DomainError),
    /// TLS files.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The ledger doesn't verify, or files can't be used.
    #[error("books: {0}")]
    Books(#[from] BooksError),
    /// What it serves can't be loaded.
    #[error(transparent)]
    Work(#[from] WorkError),
    /// Artefacts can't be opened.
    #[error(transparent)]
    Artefacts(#[from] ArtefactError),
    /// The prediction endpoint can't start.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// The prediction log can't be opened.
    #[error(transparent)]
    Log(#[from] LogError),
    /// Budget alerts can't be set up.
    #[error(transparent)]
    Alerts(#[from] AlertError),
    /// An address of the configuration is none.
    #[error("{field}: {got:?} is not an address such as {example}")]
    Address {
        /// The field.
        field: &'static str,
        /// The text found.
        got: String,
        /// One that is.
        example: &'static str,
    },
    /// The coordinator's address or id.
    #[error(transparent)]
    Coordinator(#[from] ConnectError),
    /// The operating system refuses.
    #[error("{what}: {source}")]
    System {
        /// What was being done.
        what: &'static str,
        /// Its words.
        source: std::io::Error,
    },
}

/// Switches that only a command line may set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Switches {
    /// Accept the development CA, and artefacts of reproducible noise.
    pub insecure_dev: bool,
    /// A fixed seed for noise and secrets: reproducible, not private. Needs `insecure_dev`.
    pub reproducible_noise: Option<u64>,
}

/// An agent that has been opened: everything but its connections.
pub struct Agent {
    /// What answers assignments.
    pub work: Arc<Work>,
    /// What is served.
    pub serving: Arc<Serving>,
    artefacts: Arc<Artefacts>,
    tls: ClientTls,
    address: CoordinatorAddress,
    switches: Switches,
    clock: Clock,
}

/// What needs neither ledger nor connection: opened beside a running agent too.
pub struct Local {
    /// Configuration, contract, table, secrets.
    pub domain: Arc<Domain>,
    /// What was published.
    pub artefacts: Arc<Artefacts>,
    /// What is served.
    pub serving: Arc<Serving>,
}

impl Local {
    /// Reads configuration and contract, opens the artefacts.
    ///
    /// # Errors
    /// [`AgentError`] for the first thing that can't be used.
    pub fn open(config: Config, switches: Switches, clock: Clock) -> Result<Self, AgentError> {
        let id = client_tls(&config, switches)?.id().clone();
        let domain = Arc::new(Domain::load(config, id, switches.reproducible_noise)?);
        let data_dir = &domain.config.data_dir;
        std::fs::create_dir_all(data_dir)
            .map_err(|source| AgentError::System { what: "data folder", source })?;
        let trust = if switches.insecure_dev { Trust::InsecureDev } else { Trust::Production };
        let artefacts = Arc::new(Artefacts::open(data_dir, domain.coordinator_key, trust)?);
        let serving = Arc::new(Serving::new(Arc::clone(&domain), Arc::clone(&artefacts), clock));
        Ok(Self { domain, artefacts, serving })
    }
}

impl Agent {
    /// Reads configuration and contract, verifies ledger and artefacts.
    ///
    /// # Errors
    /// [`AgentError`] for the first thing that can't be used; nothing has been connected or answered then.
    pub fn open(
        config: Config,
        switches: Switches,
        noise: NoiseSource,
        clock: Clock,
    ) -> Result<Self, AgentError> {
        let tls = client_tls(&config, switches)?;
        let address = address(&config)?;
        let local = Local::open(config, switches, Arc::clone(&clock))?;
        let Local { domain, artefacts, serving } = local;
        let (product, identity) = (&domain.contract.name, domain.identity.to_string());
        let books = Books::open(&domain.config.data_dir.join("books"), noise, &identity, product)?;
        let work = Arc::new(Work::new(domain, Arc::clone(&artefacts), books, clock())?);
        Ok(Self { work, serving, artefacts, tls, address, switches, clock })
    }

    /// Serves predictions and keeps the link to the coordinator until `shutdown`.
    ///
    /// # Errors
    /// [`AgentError`] if the endpoint can't start. A missing coordinator is no error: serving goes on.
    pub async fn run<D: Dial + Clone, F: Future<Output = ()> + Send>(
        self,
        dial: D,
        shutdown: F,
    ) -> Result<(), AgentError> {
        let config = &self.work.domain.config;
        let bind: SocketAddr = config.serve.bind.parse().map_err(|_| AgentError::Address {
            field: "serve.bind",
            got: config.serve.bind.clone(),
            example: "127.0.0.1:8080",
        })?;
        let mut serve = ServeConfig::new(
            bind,
            config.domain.clone(),
            config.serve.model_name.clone(),
            Arc::clone(&self.clock),
        );
        serve.batching = config.serve.batching.into();
        serve.budget = Some({
            let (work, clock) = (Arc::clone(&self.work), Arc::clone(&self.clock));
            Arc::new(move || {
                let books = work.books();
                let window = books.standing(clock());
                books.balance().map(|balance| budget_facts(&balance, window.as_ref()))
            })
        });
        serve.tls = config.serve.tls.as_ref().map(|files| serve::TlsFiles {
            cert: files.cert.clone(),
            key: files.key.clone(),
            client_ca: files.ca.clone(),
        });
        for id in &config.serve.allowed {
            let parsed: SpiffeId = id.parse().map_err(|_| AgentError::Address {
                field: "serve.allowed",
                got: id.clone(),
                example: "spiffe://acme.example/tabmesh/agent/payments/app",
            })?;
            serve.allowed.push(parsed);
        }
        if self.switches.insecure_dev {
            serve.development = DevelopmentCa::Accept;
        }
        serve.check()?;
        let system = |what| move |source| AgentError::System { what, source };
        let listener = TcpListener::bind(bind).await.map_err(system("binding the prediction endpoint"))?;
        let local = listener.local_addr().map_err(system("reading the bound address"))?;
        let log_key = self.work.domain.secret("prediction log");
        let log = Arc::new(JsonlLog::open(&config.data_dir.join("predictions.jsonl"), &log_key)?);
        if let Some(path) = &config.serve.address_file {
            files::replace(path, local.to_string().as_bytes()).map_err(system("writing the address file"))?;
        }
        let webhook = match &config.alerts.webhook {
            Some(url) => {
                Some(Webhook::new(url, config.alerts.webhook_ca.as_deref()).map_err(AlertError::from)?)
            }
            None => None,
        };
        let link = Link {
            alerts: Arc::new(Alerts::open(&config.data_dir, &config.alerts)?),
            webhook,
            address: self.address,
            tls: self.tls,
            dial,
            work: Arc::clone(&self.work),
            serving: Arc::clone(&self.serving),
            clock: self.clock,
            send_slot: Duration::from_millis(config.send_slot_ms),
        };
        let folder = config.data_dir.clone();
        let students = StudentService::new(folder, self.artefacts, Arc::clone(&self.serving));
        let others: Vec<(&str, Arc<dyn Predictor>)> = vec![(STUDENT_SUFFIX, Arc::new(students))];
        let restored = {
            let serving = Arc::clone(&self.serving);
            tokio::task::spawn_blocking(move || serving.restore())
        };
        match restored.await {
            Ok(Ok(true)) => tracing::info!("the promoted model is back in service"),
            Ok(Ok(false)) => tracing::info!("nothing promoted yet"),
            Ok(Err(error)) => tracing::error!(%error, "the promoted model can't be loaded"),
            Err(error) => tracing::error!(%error, "loading the promoted model ended early"),
        }
        let serving = serve::serve(serve, listener, self.serving, others, log, shutdown);
        tokio::select! {
            served = serving => Ok(served?),
            () = link.keep() => Ok(()),
        }
    }
}

/// A balance as a scraper sees it.
fn budget_facts(balance: &Balance, window: Option<&Standing>) -> BudgetFacts {
    let figure = |epsilon: Option<Epsilon>| epsilon.map_or(0.0, Epsilon::get);
    let charged = balance.spent.as_f64() + balance.reserved.as_f64();
    // Of a grant of nothing, all is gone.
    let share = |part: f64, all: f64| if all > 0.0 { part / all } else { 1.0 };
    BudgetFacts {
        product: balance.product.clone(),
        epsilon_granted: balance.grant.epsilon.get(),
        epsilon_spent: figure(balance.epsilon_spent),
        epsilon_charged: figure(balance.epsilon_charged),
        charged_ratio: share(charged, balance.granted.as_f64()),
        window_ratio: window.map(|window| share(window.charged().as_f64(), window.limit.rho.as_f64())),
    }
}

fn client_tls(config: &Config, switches: Switches) -> Result<ClientTls, AgentError> {
    let files = TlsFiles {
        ca: config.tls.ca.clone(),
        certificate: config.tls.cert.clone(),
        key: config.tls.key.clone(),
        crls: Vec::new(),
    };
    let development = if switches.insecure_dev { DevelopmentCa::Accept } else { DevelopmentCa::Refuse };
    let policy = TlsPolicy { development, time: Arc::new(DefaultTimeProvider) };
    Ok(ClientTls::new(&TlsMaterial::read(&files)?, policy)?)
}

fn address(config: &Config) -> Result<CoordinatorAddress, AgentError> {
    let id: SpiffeId = config.coordinator.spiffe_id.parse().map_err(|_| AgentError::Address {
        field: "coordinator.spiffe_id",
        got: config.coordinator.spiffe_id.clone(),
        example: "spiffe://acme.example/tabmesh/coordinator",
    })?;
    Ok(CoordinatorAddress::new(&config.coordinator.address, id)?)
}

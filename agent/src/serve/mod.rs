//! The prediction endpoint that an agent runs beside its tables: Open Inference Protocol v2 over REST.
//!
//! Owns the way from an HTTP request to a [`TypedBatch`], the call of a [`Predictor`], the answer, and the
//! prediction log. Parsing happens once, at the edge (`tensor`); what reaches the model is in the contract's terms.
//!
//! One mode is served, `domain`: the context is the domain's own real rows, so answers lie outside the
//! differential-privacy claim and membership could be guessed from them. Hence the endpoint
//! - listens in the clear on loopback only, and beyond it demands TLS 1.3 with a client certificate whose SPIFFE
//!   id stands on an exact allow list (default deny: an agent of the same domain is not allowed until it is listed);
//! - refuses to put the coordinator, operators, auditors or another domain's agents on that list;
//! - logs ids and keyed digests, never a value.
//!
//! ```text
//! listen (TLS, identity) -> rest (routes, admission) -> oip + binary (wire) -> tensor (typed batch)
//!                        -> batch (queue, threads) -> Predictor -> rest (answer) -> log (ids and digests)
//! ```
//!
//! Protocol: Open Inference Protocol, `inference_rest`, with Triton's binary tensor data extension.

pub mod batch;
mod binary;
mod error;
mod listen;
pub mod log;
mod metrics;
pub mod oip;
mod rest;
mod tensor;
#[cfg(test)]
mod tests;
mod tls;

use std::{future::Future, net::SocketAddr, sync::Arc, time::Duration};

use tabmesh_contract::{
    batch::TypedBatch,
    schema::{FeatureKind, FeatureSchema},
};
use tabmesh_proto::identity::{DevelopmentCa, SpiffeId};
use thiserror::Error;
use tokio::net::TcpListener;

use self::{
    batch::{Batching, MAX_TOGETHER_ROWS, MAX_WAIT},
    log::PredictionLog,
    rest::{Endpoint, Model},
    tls::TlsGate,
};
pub use self::{error::RequestError, metrics::BudgetFacts, oip::Datatype, tls::TlsFiles};

/// Milliseconds since the Unix epoch, from the process's clock.
pub type Clock = Arc<dyn Fn() -> i64 + Send + Sync>;

/// Reads the product's budget for a scrape.
pub type BudgetView = Arc<dyn Fn() -> Option<BudgetFacts> + Send + Sync>;

/// The model in service, as the endpoint sees it. Called from many threads at once.
pub trait Predictor: Send + Sync {
    /// The features and classes of the contract; the same for the life of the process.
    fn schema(&self) -> &FeatureSchema;

    /// The columns a caller sends, read once when the endpoint starts. Features of the schema that no column
    /// names are passed to [`Predictor::predict`] as missing.
    fn input_columns(&self) -> Vec<InputColumn>;

    /// The version in service, `None` before the first promotion. Cheap, called several times a request.
    fn current(&self) -> Option<ServedVersion>;

    /// Class probabilities of each row, `rows × classes`, each finite; a row's answer does not depend on the
    /// rows beside it. Runs on a thread of its own and works on one version from start to end. Values are not
    /// yet clamped to declared ranges; labels are `None` and units are zero.
    ///
    /// # Errors
    /// [`PredictError`] when there is no model or the computation fails.
    fn predict(&self, batch: &TypedBatch) -> Result<Vec<Vec<f32>>, PredictError>;

    /// When the coordinator was last heard from, if this agent has one; answers then carry its age.
    fn coordinator_contact(&self) -> Option<CoordinatorContact> {
        None
    }
}

/// One column a caller sends, under the name its contract uses.
#[derive(Debug, Clone, PartialEq)]
pub struct InputColumn {
    /// The contract's column name, which is the tensor's name.
    pub name: String,
    /// Position of the feature in the schema's canonical order.
    pub feature: usize,
    /// Datatype that the model's metadata advertises.
    pub datatype: Datatype,
    /// Declared values, equal to the schema's.
    pub kind: FeatureKind,
}

/// The version that answers requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServedVersion {
    /// Name for people, e.g. `fraud-v1 round 7`.
    pub name: String,
    /// Digest of the served artefacts in lower-case hex: `model_version` on the wire.
    pub digest: String,
    /// What base model it stands on.
    pub base: String,
    /// The adapter that the publication names, if any.
    pub adapter: Option<String>,
    /// The forest of the rounds that the publication names, if any.
    pub forest: Option<String>,
    /// When this agent promoted it, ms since the Unix epoch.
    pub promoted_at_ms: i64,
    /// When the coordinator published it, ms since the Unix epoch; the age in answers counts from here.
    pub published_at_ms: i64,
}

/// How fresh the agent's link to the coordinator is. Serving goes on without it and says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CoordinatorContact {
    /// Last successful exchange, ms since the Unix epoch.
    pub last_ms: i64,
    /// Age from which the coordinator counts as stale, ms.
    pub stale_after_ms: i64,
}

/// Why a [`Predictor`] gave no answer.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum PredictError {
    /// No version has been promoted yet.
    #[error("no promoted version")]
    NotReady,
    /// The computation failed. The reason stays in the agent's own log and must not carry row values.
    #[error("prediction failed: {reason}")]
    Failed {
        /// What went wrong, without values.
        reason: String,
    },
}

/// What the endpoint is, where it listens, who may call and how much it takes.
#[derive(Clone)]
pub struct ServeConfig {
    /// Address the listener is bound to.
    pub bind: SocketAddr,
    /// Certificate files; required beyond loopback.
    pub tls: Option<TlsFiles>,
    /// The agent's own domain: agents of other domains cannot be allowed.
    pub domain: String,
    /// Agents of the own domain that may call, compared exactly. Required with TLS, refused without.
    pub allowed: Vec<SpiffeId>,
    /// Whether certificates of a development CA are accepted.
    pub development: DevelopmentCa,
    /// The model's name in paths: 1 to [`MAX_MODEL_NAME_BYTES`] of `A-Z a-z 0-9 _ . -`.
    pub model_name: String,
    /// Most rows of one request, at most [`MAX_BATCH_ROWS`].
    pub max_batch_rows: usize,
    /// Most bytes of one request body, at most [`MAX_BODY_BYTES`].
    pub max_body_bytes: usize,
    /// Predictions that run at once, at most [`MAX_CONCURRENCY`].
    pub max_concurrency: usize,
    /// Requests that may wait for their turn, at most [`MAX_QUEUE`]; one more is answered 503.
    pub max_queue: usize,
    /// How requests that arrive together are predicted together.
    pub batching: Batching,
    /// Where the product's budget stands, for metrics.
    pub budget: Option<BudgetView>,
    /// The process's clock.
    pub clock: Clock,
}

impl ServeConfig {
    /// A configuration with default limits, no TLS and nobody allowed: complete for loopback.
    #[must_use]
    pub fn new(
        bind: SocketAddr,
        domain: impl Into<String>,
        model_name: impl Into<String>,
        clock: Clock,
    ) -> Self {
        Self {
            bind,
            tls: None,
            domain: domain.into(),
            allowed: Vec::new(),
            development: DevelopmentCa::Refuse,
            model_name: model_name.into(),
            max_batch_rows: DEFAULT_BATCH_ROWS,
            max_body_bytes: DEFAULT_BODY_BYTES,
            max_concurrency: DEFAULT_CONCURRENCY,
            max_queue: DEFAULT_QUEUE,
            batching: Batching::default(),
            budget: None,
            clock,
        }
    }

    /// Checks every field against the others; [`serve`] does so too, before it accepts a connection.
    ///
    /// # Errors
    /// The first [`ServeError`] found.
    pub fn check(&self) -> Result<(), ServeError> {
        check_plaintext(self.bind, self.tls.is_some())?;
        match (self.tls.is_some(), self.allowed.is_empty()) {
            (true, true) => return Err(ServeError::NobodyAllowed),
            (false, false) => return Err(ServeError::AllowedWithoutTls { got: self.allowed.len() }),
            _ => {}
        }
        for id in &self.allowed {
            tls::check_allowed(id, &self.domain)
                .map_err(|reason| ServeError::AllowedRefused { id: id.to_string(), reason })?;
        }
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-');
        if !(1..=MAX_MODEL_NAME_BYTES).contains(&self.model_name.len()) || !self.model_name.bytes().all(plain)
        {
            return Err(ServeError::BadModelName { got: self.model_name.clone() });
        }
        check_limit("max_batch_rows", self.max_batch_rows, 1, MAX_BATCH_ROWS)?;
        check_limit("max_body_bytes", self.max_body_bytes, 1, MAX_BODY_BYTES)?;
        check_limit("max_concurrency", self.max_concurrency, 1, MAX_CONCURRENCY)?;
        check_limit("max_queue", self.max_queue, 0, MAX_QUEUE)?;
        check_limit("batching.max_batch_rows", self.batching.max_rows, 1, MAX_TOGETHER_ROWS)?;
        let micros = |wait: Duration| usize::try_from(wait.as_micros()).unwrap_or(usize::MAX);
        check_limit("batching.max_wait_us", micros(self.batching.max_wait), 0, micros(MAX_WAIT))
    }
}

impl std::fmt::Debug for ServeConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServeConfig")
            .field("bind", &self.bind)
            .field("tls", &self.tls)
            .field("domain", &self.domain)
            .field("allowed", &self.allowed)
            .field("development", &self.development)
            .field("model_name", &self.model_name)
            .field("max_batch_rows", &self.max_batch_rows)
            .field("max_body_bytes", &self.max_body_bytes)
            .field("max_concurrency", &self.max_concurrency)
            .field("max_queue", &self.max_queue)
            .field("batching", &self.batching)
            .finish_non_exhaustive()
    }
}

/// Why the endpoint refuses to start.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ServeError {
    /// The address is reachable from other machines and there is no TLS.
    #[error(
        "serving on {bind} would expose predictions from real rows in the clear: beyond loopback set tls \
         (cert, key, client_ca) and allowed, or bind 127.0.0.1"
    )]
    PlaintextBeyondLoopback {
        /// The address asked for.
        bind: SocketAddr,
    },
    /// TLS is on and the allow list is empty.
    #[error("serving with tls needs at least one SPIFFE id in allowed: nobody is allowed by default")]
    NobodyAllowed,
    /// There is an allow list and no TLS to enforce it.
    #[error("allowed names {got} callers but there is no tls to identify them: set tls or empty the list")]
    AllowedWithoutTls {
        /// Entries in the list.
        got: usize,
    },
    /// An entry of the allow list is not an agent of this domain.
    #[error("{id} can't be allowed to call: {reason}")]
    AllowedRefused {
        /// The entry.
        id: String,
        /// Why.
        reason: String,
    },
    /// The model's name doesn't fit into a path.
    #[error(
        "model name {got:?} is not 1 to {MAX_MODEL_NAME_BYTES} characters of A-Z, a-z, 0-9, '_', '.', '-'"
    )]
    BadModelName {
        /// The name found.
        got: String,
    },
    /// A configured limit is outside its range.
    #[error("{name} must be {min} to {max}, got {got}")]
    Limit {
        /// The setting.
        name: &'static str,
        /// Value found.
        got: usize,
        /// Least value.
        min: usize,
        /// Greatest value.
        max: usize,
    },
    /// The predictor's columns don't fit its schema.
    #[error("input column {column:?} doesn't fit the schema: {reason}")]
    Layout {
        /// The column.
        column: String,
        /// Why.
        reason: String,
    },
    /// A certificate file can't be read or parsed, or the set is refused by the TLS library.
    #[error("tls file {path}: {reason}")]
    Tls {
        /// The file.
        path: String,
        /// Why; never the contents.
        reason: String,
    },
    /// The listener has no usable local address, or the system has no thread left.
    #[error("listener: {reason}")]
    Listener {
        /// The operating system's words.
        reason: String,
    },
}

/// Serves until `shutdown` completes, then lets running requests finish for up to ten seconds.
///
/// `predictor` is served under [`ServeConfig::model_name`], and the endpoint's readiness is its own; each of `others` is
/// served under that name with its suffix. The caller binds `listener`; its actual address is checked like [`ServeConfig::bind`].
///
/// # Errors
/// [`ServeError`] if the configuration, the certificates or the predictor's columns are refused; nothing has been
/// accepted then.
pub async fn serve(
    config: ServeConfig,
    listener: TcpListener,
    predictor: Arc<dyn Predictor>,
    others: Vec<(&'static str, Arc<dyn Predictor>)>,
    log: Arc<dyn PredictionLog>,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), ServeError> {
    config.check()?;
    let local = listener.local_addr().map_err(|e| ServeError::Listener { reason: e.to_string() })?;
    check_plaintext(local, config.tls.is_some())?;
    let gate = match &config.tls {
        Some(files) => Some(TlsGate::load(files, &config)?),
        None => None,
    };
    let mut models = vec![Model::new(config.model_name.clone(), predictor)?];
    for (suffix, other) in others {
        models.push(Model::new(format!("{}{suffix}", config.model_name), other)?);
    }
    tracing::info!(address = %local, tls = gate.is_some(), model = %config.model_name, mode = "domain", "serving");
    listen::run(listener, gate, Endpoint::new(&config, models, log)?, shutdown).await;
    Ok(())
}

fn check_plaintext(address: SocketAddr, tls: bool) -> Result<(), ServeError> {
    if tls || address.ip().is_loopback() {
        Ok(())
    } else {
        Err(ServeError::PlaintextBeyondLoopback { bind: address })
    }
}

fn check_limit(name: &'static str, got: usize, min: usize, max: usize) -> Result<(), ServeError> {
    if (min..=max).contains(&got) { Ok(()) } else { Err(ServeError::Limit { name, got, min, max }) }
}

/// Longest model name, bytes.
pub const MAX_MODEL_NAME_BYTES: usize = 128;
/// Upper bound of [`ServeConfig::max_batch_rows`], and of the values of one tensor.
pub const MAX_BATCH_ROWS: usize = 65_536;
/// Upper bound of [`ServeConfig::max_body_bytes`].
pub const MAX_BODY_BYTES: usize = 64 * 1024 * 1024;
/// Upper bound of [`ServeConfig::max_concurrency`].
pub const MAX_CONCURRENCY: usize = 256;
/// Upper bound of [`ServeConfig::max_queue`].
pub const MAX_QUEUE: usize = 4_096;
/// Default of [`ServeConfig::max_batch_rows`].
pub const DEFAULT_BATCH_ROWS: usize = 1_024;
/// Default of [`ServeConfig::max_body_bytes`].
pub const DEFAULT_BODY_BYTES: usize = 4 * 1024 * 1024;
/// Default of [`ServeConfig::max_concurrency`].
pub const DEFAULT_CONCURRENCY: usize = 2;
/// Default of [`ServeConfig::max_queue`].
pub const DEFAULT_QUEUE: usize = 16;

//! What a Prometheus scraper reads at `GET /metrics`: agents, plans, and how much of each product's budget is gone.
//!
//! Plain HTTP on loopback, for a scraper or relay on the same machine; off unless the configuration names an address.
//! Figures of budgets are those of the mirrored ledgers, as their agents last stated them.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tabmesh_privacy::accountant::zcdp;
use tabmesh_privacy::budget::Rho;
use tabmesh_privacy::ledger::replay;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::error::CoordinatorError;
use crate::mesh::Mesh;

/// Answers scrapes for as long as it is polled; for ever pending without a configured address.
///
/// # Errors
/// [`CoordinatorError::Transport`] if the address isn't on loopback or can't be listened on.
pub(crate) async fn serve(mesh: Arc<Mesh>) -> Result<(), CoordinatorError> {
    let Some(address) = mesh.config.metrics_listen.clone() else { return std::future::pending().await };
    let failed = |reason: String| CoordinatorError::Transport { what: "metrics_listen", reason };
    let address: SocketAddr = address.parse().map_err(|_| failed(format!("{address:?} is no address")))?;
    if !address.ip().is_loopback() {
        return Err(failed(format!("{address} is beyond loopback: put a relay with TLS in front of it")));
    }
    let listener = TcpListener::bind(address).await.map_err(|error| failed(format!("{address}: {error}")))?;
    tracing::info!(address = ?listener.local_addr().ok(), "metrics");
    let routes = Router::new().route("/metrics", get(move || scrape(Arc::clone(&mesh))));
    let free = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(permit) = Arc::clone(&free).acquire_owned().await else { return Ok(()) };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "accept failed");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let service = TowerToHyperService::new(routes.clone());
        tokio::spawn(async move {
            let _permit = permit;
            let mut http = http1::Builder::new();
            http.timer(TokioTimer::new()).header_read_timeout(CONNECTION_AGE);
            let connection = http.serve_connection(TokioIo::new(stream), service);
            // A connection that ends in disorder is its caller's business.
            let _ = tokio::time::timeout(CONNECTION_AGE, connection).await;
        });
    }
}

async fn scrape(mesh: Arc<Mesh>) -> Response {
    match tokio::task::spawn_blocking(move || text(&mesh)).await {
        Ok(Ok(text)) => ([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response(),
        Ok(Err(error)) => {
            tracing::error!(%error, "metrics can't be read");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

type Labels = Vec<(&'static str, String)>;
type Level = Gauge<f64, AtomicU64>;

/// The text of a scrape: everything is read anew, so what is gone doesn't linger.
fn text(mesh: &Mesh) -> Result<String, CoordinatorError> {
    let mut registry = Registry::with_prefix("tabmesh");
    let agents = Family::<Labels, Gauge>::default();
    registry.register("agents", "Admitted agents, and those of them with an open session", agents.clone());
    let plans = Family::<Labels, Gauge>::default();
    registry.register("plans", "Plans by phase", plans.clone());
    let progress = Family::<Labels, Level>::default();
    registry.register("plan_progress", "Share of a plan that is done, 0 to 1", progress.clone());
    let epsilon = Family::<Labels, Level>::default();
    registry.register("epsilon", "Privacy budget of a product, by state", epsilon.clone());
    let ratio = Family::<Labels, Level>::default();
    let help = "Share of a product's budget (rho) that is spent or reserved";
    registry.register("epsilon_spent_ratio", help, ratio.clone());

    let admitted = mesh.catalog.all();
    let connected = admitted.iter().filter(|(agent, _)| mesh.outbox.facts(agent).connected).count();
    for (state, count) in [("admitted", admitted.len()), ("connected", connected)] {
        let count = i64::try_from(count).unwrap_or(i64::MAX);
        agents.get_or_create(&vec![("state", state.to_owned())]).set(count);
    }
    let mut phases: BTreeMap<String, i64> = BTreeMap::new();
    for plan in mesh.plans.summaries() {
        // The word alone: numbers of rounds and causes would make labels without end.
        let word = plan.phase.split(' ').next().unwrap_or_default().to_owned();
        *phases.entry(word).or_default() += 1;
        progress.get_or_create(&vec![("plan", plan.plan_id.to_string())]).set(plan.progress);
    }
    for (phase, count) in phases {
        plans.get_or_create(&vec![("phase", phase)]).set(count);
    }
    for (agent, admitted) in admitted {
        let product = &admitted.contract.name;
        let (entries, _) = mesh.mirror.chained(&agent, product)?;
        let state = replay(&entries)
            .map_err(|error| CoordinatorError::Step(format!("mirrored ledger of {agent}: {error}")))?;
        let Some((_, account)) = state.account_of(product) else { continue };
        let Some(grant) = account.grants.get(product) else { continue };
        let charged = account.spent.checked_add(account.reserved).unwrap_or(Rho::from_units(u64::MAX));
        let figure = |rho: Rho| if rho > Rho::ZERO { zcdp::epsilon(rho, grant.delta).get() } else { 0.0 };
        for (state, value) in [
            ("granted", grant.epsilon.get()),
            ("spent", figure(account.spent)),
            ("spent_or_reserved", figure(charged)),
        ] {
            let labels = vec![("product", product.clone()), ("state", state.to_owned())];
            epsilon.get_or_create(&labels).set(value);
        }
        let granted = account.granted().as_f64();
        let share = if granted > 0.0 { charged.as_f64() / granted } else { 1.0 };
        ratio.get_or_create(&vec![("product", product.clone())]).set(share);
    }
    let mut text = String::new();
    // Writing to a string doesn't fail.
    let _ = encode(&mut text, &registry);
    Ok(text)
}

/// Scrapes answered at once.
const MAX_CONNECTIONS: usize = 16;
/// Longest life of a connection.
const CONNECTION_AGE: Duration = Duration::from_secs(30);
/// Pause after a failed accept.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

//! The coordinator: admits contracts, runs plans, keeps what agents released, publishes signed models.
//!
//! One process, started by [`cli::main`]; [`run`] is the whole server on a listener and [`Surroundings`] of the caller.
//! Agents open every connection; the coordinator never dials.

#![forbid(unsafe_code)]

mod answers;
mod catalog;
pub mod cli;
mod collections;
mod command;
pub mod config;
pub mod error;
mod mesh;
mod metrics;
mod mirror;
pub mod models;
pub mod null_rounds;
mod outbox;
mod pipeline;
mod plans;
pub mod pretrain_job;
mod report;
mod service;
mod sums;
#[cfg(test)]
mod test_mesh;
pub mod witness;

use std::future::Future;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use rand::RngCore;
use ring::signature::Ed25519KeyPair;
use tabmesh_contract::policy::PolicyBundle;
use tabmesh_privacy::signature::SigningKey;
use tabmesh_proto::accept::{AcceptOptions, Listener, incoming};
use tabmesh_proto::identity::DevelopmentCa;
use tabmesh_proto::message::{Assignment, GoodbyeReason};
use tabmesh_proto::server::{Services, serve};
use tabmesh_proto::tls::{DefaultTimeProvider, ServerTls, TlsFiles, TlsMaterial, TlsPolicy};
use tabmesh_store::{BlobStore, Log, PackStore, Records, Registry, Sled};
use tabmesh_tfm::model::Model;

use crate::catalog::Catalog;
use crate::collections::Collections;
use crate::config::Config;
use crate::error::CoordinatorError;
use crate::mesh::{BASE_KEY, Mesh};
use crate::mirror::Mirror;
use crate::outbox::Outbox;
use crate::pipeline::rounds::Adapters;
use crate::plans::Plans;
use crate::sums::Sums;

pub use crate::mesh::Clock;

/// Switches that only a command line may set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Switches {
    /// Accept the development CA and artefacts of reproducible noise.
    pub insecure_dev: bool,
    /// In a development run too, go on at a deadline with whom the plan's `min_agents` is content with. Without it a
    /// development run waits for everyone, so that no figure depends on who was late.
    pub go_on_without_late: bool,
}

/// What a coordinator takes from the world besides its connections.
pub struct Surroundings {
    /// Where its records are.
    pub records: Arc<dyn Records>,
    /// The time.
    pub clock: Clock,
    /// Randomness for the ids of assignments and rounds; no secret is drawn from it.
    pub ids: Box<dyn RngCore + Send>,
}

/// Serves until `shutdown`: the whole coordinator on a listener and surroundings of the caller.
///
/// # Errors
/// [`CoordinatorError`] if files of the configuration can't be used, the store is damaged, or the transport fails as a
/// whole.
pub async fn run<L: Listener, F: Future<Output = ()> + Send>(
    config: Config,
    switches: Switches,
    listener: L,
    surroundings: Surroundings,
    shutdown: F,
) -> Result<(), CoordinatorError> {
    let tls = server_tls(&config, switches)?;
    let mesh = Arc::new(open(config, switches, surroundings, tls.id().clone())?);
    let unfinished = mesh.plans.unfinished();
    let running = unfinished.iter().filter_map(|digest| mesh.plans.get(*digest)?.1.next()?.collection());
    mesh.collections.discard_all_but(&running.collect())?;
    for digest in unfinished {
        tracing::info!(plan = %digest, "resuming");
        tokio::spawn(pipeline::drive(Arc::clone(&mesh), digest));
    }
    tokio::select! {
        answered = answer(Arc::clone(&mesh), &tls, listener, shutdown) => answered,
        scraped = metrics::serve(mesh) => scraped,
    }
}

/// Answers agents, operators and auditors until `shutdown`.
async fn answer<L: Listener, F: Future<Output = ()> + Send>(
    mesh: Arc<Mesh>,
    tls: &ServerTls,
    listener: L,
    shutdown: F,
) -> Result<(), CoordinatorError> {
    let services = Services {
        mesh: Arc::new(service::mesh::MeshCalls(Arc::clone(&mesh))),
        operator: Arc::new(service::operator::OperatorCalls(Arc::clone(&mesh))),
        auditor: Arc::new(service::auditor::AuditorCalls(Arc::clone(&mesh))),
    };
    let stop = async move {
        shutdown.await;
        mesh.stop_tuning();
        mesh.outbox.close_all(GoodbyeReason::ShuttingDown);
    };
    serve(incoming(listener, tls, AcceptOptions::default()), services, stop)
        .await
        .map_err(|error| transport("serving", &error))
}

fn server_tls(config: &Config, switches: Switches) -> Result<ServerTls, CoordinatorError> {
    let files = TlsFiles {
        ca: config.tls.ca.clone(),
        certificate: config.tls.cert.clone(),
        key: config.tls.key.clone(),
        crls: Vec::new(),
    };
    let development = if switches.insecure_dev { DevelopmentCa::Accept } else { DevelopmentCa::Refuse };
    let policy = TlsPolicy { development, time: Arc::new(DefaultTimeProvider) };
    let material = TlsMaterial::read(&files).map_err(|error| transport("TLS files", &error))?;
    ServerTls::new(&material, policy).map_err(|error| transport("TLS set-up", &error))
}

/// Opens the record store of a configuration.
///
/// # Errors
/// [`CoordinatorError::Store`] if it is damaged or in use.
pub fn open_records(config: &Config) -> Result<Arc<dyn Records>, CoordinatorError> {
    std::fs::create_dir_all(&config.data_dir).map_err(|error| CoordinatorError::File {
        what: "data folder",
        path: config.data_dir.clone(),
        reason: error.to_string(),
    })?;
    Ok(Arc::new(Sled::open(&config.data_dir.join("records"))?))
}

fn open(
    config: Config,
    switches: Switches,
    surroundings: Surroundings,
    identity: tabmesh_proto::identity::SpiffeId,
) -> Result<Mesh, CoordinatorError> {
    let Surroundings { records, clock, ids } = surroundings;
    let blobs = Arc::new(BlobStore::open(&config.data_dir.join("blobs"))?);
    let packs = Arc::new(PackStore::open(&config.data_dir.join("packs"))?);
    let pkcs8 = read("signing key", &config.signing_key)?;
    let bad_key = |reason: String| CoordinatorError::File {
        what: "signing key",
        path: config.signing_key.clone(),
        reason,
    };
    let key = Arc::new(Ed25519KeyPair::from_pkcs8(&pkcs8).map_err(|error| bad_key(error.to_string()))?);
    let signing_key = SigningKey::from_pkcs8(&pkcs8).map_err(|error| bad_key(error.to_string()))?;
    take_base(&config, &records, &blobs)?;
    let (audit, torn) = Log::open(&config.data_dir.join("audit.log"))?;
    if let Some(torn) = torn {
        tracing::warn!(?torn, "a torn entry was cut from the audit log");
    }
    let policy = policy_bundle(config.policy_bundle.as_deref())?;
    let sign = {
        let (key, identity) = (Arc::clone(&key), identity.clone());
        Arc::new(move |id, kind, document| Ok(Assignment::sign(id, kind, document, &identity, &key)?))
            as outbox::Sign
    };
    Ok(Mesh {
        catalog: Catalog::load(Arc::clone(&records), Arc::clone(&blobs))?,
        outbox: Outbox::new(Arc::clone(&records), Arc::clone(&blobs), sign),
        adapters: Adapters::default(),
        collections: Arc::new(Collections::new(
            Arc::clone(&records),
            Arc::clone(&blobs),
            Arc::clone(&packs),
            Arc::clone(&clock),
        )),
        sums: Sums::new(Arc::clone(&records), Arc::clone(&blobs), packs, Arc::clone(&clock)),
        plans: Plans::load(Arc::clone(&records), Arc::clone(&blobs))?,
        mirror: Mirror::new(config.data_dir.join("ledgers")),
        registry: Registry::new(Arc::clone(&records), Arc::clone(&blobs)),
        answers: answers::Answers::default(),
        tuning_stop: AtomicBool::new(false),
        waits_for_all: switches.insecure_dev && !switches.go_on_without_late,
        audit: Mutex::new(audit),
        identity,
        witness: Mutex::new(()),
        ids: Mutex::new(ids),
        config,
        clock,
        key,
        signing_key,
        records,
        blobs,
        policy,
    })
}

/// Takes the configured base model into the blob store, after checking that it is one.
fn take_base(config: &Config, records: &Arc<dyn Records>, blobs: &BlobStore) -> Result<(), CoordinatorError> {
    let bytes = read("base model", &config.base_model)?;
    Model::from_safetensors(&bytes)?;
    let digest = blobs.put(&bytes)?;
    records.put(BASE_KEY, digest.to_string().as_bytes())?;
    records.put(format!("shared/{digest}").as_bytes(), b"")?;
    Ok(())
}

/// The policy bundle of a folder; the built-in one without a folder.
pub(crate) fn policy_bundle(folder: Option<&Path>) -> Result<PolicyBundle, CoordinatorError> {
    let Some(folder) = folder else { return Ok(PolicyBundle::default()) };
    let refused =
        |reason: String| CoordinatorError::File { what: "policy bundle", path: folder.to_owned(), reason };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(|error| refused(error.to_string()))? {
        let path = entry.map_err(|error| refused(error.to_string()))?.path();
        if path.extension().is_some_and(|e| e == "rego" || e == "json") {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let text = std::fs::read_to_string(&path).map_err(|error| refused(error.to_string()))?;
            files.push((name, text));
        }
    }
    files.sort();
    let borrowed: Vec<(&str, &str)> =
        files.iter().map(|(name, text)| (name.as_str(), text.as_str())).collect();
    PolicyBundle::from_files(&borrowed).map_err(|error| refused(error.to_string()))
}

fn read(what: &'static str, path: &Path) -> Result<Vec<u8>, CoordinatorError> {
    std::fs::read(path).map_err(|error| CoordinatorError::File {
        what,
        path: path.to_owned(),
        reason: error.to_string(),
    })
}

fn transport(what: &'static str, error: &dyn std::fmt::Display) -> CoordinatorError {
    CoordinatorError::Transport { what, reason: error.to_string() }
}

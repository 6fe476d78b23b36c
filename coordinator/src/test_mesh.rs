//! A coordinator over records in memory with admitted agents, for tests of what it does between calls.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use rand::SeedableRng;
use ring::rand::SystemRandom;
use ring::signature::Ed25519KeyPair;
use tabmesh_contract::policy::PolicyBundle;
use tabmesh_privacy::signature::SigningKey;
use tabmesh_proto::identity::SpiffeId;
use tabmesh_proto::message::{Assignment, ContractRegistration, CoordinatorFrame};
use tabmesh_store::Memory;

use crate::config::Config;
use crate::mesh::Mesh;
use crate::{Surroundings, Switches, open};

/// The coordinator with what its agents sign with.
pub(crate) struct TestMesh {
    pub(crate) mesh: Arc<Mesh>,
    /// Key of each agent.
    pub(crate) pairs: Vec<Arc<Ed25519KeyPair>>,
    /// The same keys, in the form that signs steps of secure sums.
    pub(crate) keys: Vec<Arc<SigningKey>>,
    /// The coordinator's clock: a millisecond later at every reading, so that no two ids are alike.
    pub(crate) now_ms: Arc<AtomicI64>,
    _folder: tempfile::TempDir,
}

/// The agent of a domain by number.
pub(crate) fn agent(i: usize) -> SpiffeId {
    SpiffeId::agent("acme.example", &domain(i), "one").unwrap()
}

/// Its data product.
pub(crate) fn product(i: usize) -> String {
    format!("{}.sales", domain(i))
}

fn domain(i: usize) -> String {
    format!("d{i}")
}

fn contract(i: usize) -> String {
    format!(
        "name: {}
version: '1.0.0'
owner: shop@example.com
schema:
  - {{name: label, type: integer, role: target, feature: sale.fraud, categories: ['0', '1']}}
  - {{name: tid, type: string, role: id, unique: true}}
  - {{name: amount, type: decimal, range: [0, 100], feature: sale.amount}}
privacy: {{sensitivity: low, allow_training: true, unit: row, max_units: 100}}
source: {{type: csv, path: sales.csv}}
",
        product(i)
    )
}

impl TestMesh {
    /// A coordinator with so many agents.
    pub(crate) fn new(agents: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let key = || Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
        std::fs::create_dir_all(folder.path().join("keys")).unwrap();
        std::fs::create_dir_all(folder.path().join("data")).unwrap();
        std::fs::write(folder.path().join("keys/coordinator.pk8"), key().as_ref()).unwrap();
        std::fs::write(folder.path().join("coordinator.yaml"), Config::example()).unwrap();
        let mut config = Config::load(&folder.path().join("coordinator.yaml")).unwrap();
        config.base_model = Path::new(BASE).to_owned();
        let now_ms = Arc::new(AtomicI64::new(1_700_000_000_000));
        let clock = Arc::clone(&now_ms);
        let surroundings = Surroundings {
            records: Arc::new(Memory::new()),
            clock: Arc::new(move || clock.fetch_add(1, Ordering::Relaxed)),
            ids: Box::new(rand_chacha::ChaCha20Rng::seed_from_u64(7)),
        };
        let identity = SpiffeId::coordinator("acme.example").unwrap();
        let mesh = Arc::new(open(config, Switches::default(), surroundings, identity).unwrap());
        let (mut pairs, mut keys) = (Vec::new(), Vec::new());
        for i in 0..agents {
            let pkcs8 = key();
            let pair = Ed25519KeyPair::from_pkcs8(pkcs8.as_ref()).unwrap();
            let contract = contract(i).into_bytes();
            let registration = ContractRegistration::sign(contract, product(i), &agent(i), &pair).unwrap();
            let judged = mesh.catalog.register(&agent(i), &registration, &PolicyBundle::default()).unwrap();
            assert!(judged.is_ok(), "{judged:?}");
            keys.push(Arc::new(SigningKey::from_pkcs8(pkcs8.as_ref()).unwrap()));
            pairs.push(Arc::new(pair));
        }
        Self { mesh, pairs, keys, now_ms, _folder: folder }
    }

    /// What an agent owes an answer to, oldest first, as a new session of it is told.
    pub(crate) fn owed(&self, i: usize) -> Vec<Assignment> {
        let mut frames = self.mesh.outbox.open(&agent(i), "1.0.0".to_owned(), 0).unwrap().frames;
        let mut owed = Vec::new();
        while let Ok(frame) = frames.try_recv() {
            let CoordinatorFrame::Assignment(assignment) = frame else {
                panic!("a new session gets what is owed")
            };
            owed.push(assignment);
        }
        owed
    }
}

const BASE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/nano/base.safetensors");

//! The model in service: what was promoted last, rebuilt at start, swapped whole.

use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};

use ring::hmac;
use serde::{Deserialize, Serialize};
use tabmesh_contract::batch::TypedBatch;
use tabmesh_contract::schema::FeatureSchema;
use tabmesh_federation::id::Digest;
use tabmesh_federation::manifest::Manifest;

use crate::calibrate::Calibration;
use crate::choose::{Blend, Promotion, choose};
use crate::domain::Domain;
use crate::files;
use crate::gate::Gate;
use crate::promote::{Loaded, Served};
use crate::publication::Artefacts;
use crate::serve::oip::Datatype;
use crate::serve::{Clock, CoordinatorContact, InputColumn, PredictError, Predictor, ServedVersion};
use crate::work::WorkError;
use tabmesh_contract::schema::FeatureKind;

/// What was promoted, as kept over restarts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Held {
    manifest: Digest,
    served: Blend,
    calibration: Calibration,
    promoted_ms: i64,
}

/// A publication with what was chosen from it.
pub struct Promoted {
    /// Its artefacts, loaded.
    pub loaded: Loaded,
    /// Its digest.
    pub manifest: Digest,
    /// Its coding.
    pub preprocessing: Digest,
    /// When it was made, UTC milliseconds.
    pub published_ms: i64,
    /// What is served.
    pub served: Blend,
    /// How its logits are calibrated.
    pub calibration: Calibration,
}

struct InService {
    served: Served,
    version: ServedVersion,
}

/// The model in service of one domain.
pub struct Serving {
    domain: Arc<Domain>,
    artefacts: Arc<Artefacts>,
    clock: Clock,
    current: RwLock<Option<Arc<InService>>>,
    contact_ms: RwLock<Option<i64>>,
}

impl Serving {
    /// Nothing in service yet.
    #[must_use]
    pub fn new(domain: Arc<Domain>, artefacts: Arc<Artefacts>, clock: Clock) -> Self {
        Self { domain, artefacts, clock, current: RwLock::new(None), contact_ms: RwLock::new(None) }
    }

    /// Puts back into service what was promoted before the process ended.
    ///
    /// # Errors
    /// [`WorkError`] if the publication or the table can't be read.
    pub fn restore(&self) -> Result<bool, WorkError> {
        let Some((digest, manifest)) = self.artefacts.current()? else { return Ok(false) };
        let Some(held) = self.held().filter(|held| held.manifest == digest) else {
            // Published but not yet chosen from when the process ended.
            self.promote()?;
            return Ok(true);
        };
        let loaded = self.load(&manifest)?;
        let rows = self.domain.rows(&self.domain.schema)?;
        let served = loaded.serve(held.served.clone(), held.calibration, &rows)?;
        self.put(served, &manifest, &held);
        Ok(true)
    }

    /// Chooses from the current publication and serves what was chosen.
    ///
    /// # Errors
    /// [`WorkError`]; what is in service stays then.
    pub fn promote(&self) -> Result<Option<Promotion>, WorkError> {
        let Some((digest, manifest)) = self.artefacts.current()? else { return Ok(None) };
        let loaded = self.load(&manifest)?;
        let gate = Gate::new(&self.domain.secret("gate"));
        let all = self.domain.rows(&self.domain.schema)?;
        let split = gate.split(&all);
        let champion = self.held().map(|held| held.served);
        let gate_rows = all.take(&split.gate);
        let training = all.take(&split.training);
        let section = self.domain.config.promotion;
        let choice = choose(&loaded, &training, &gate_rows, champion.as_ref(), section)?;
        let calibration = choice.calibration;
        let in_service = loaded.serve(choice.served, calibration, &all)?;
        let served = in_service.blend().clone();
        let now_ms = (self.clock)();
        let record = Promotion {
            time_ms: now_ms,
            manifest: digest,
            served: served.clone(),
            calibration,
            reason: choice.reason,
            gate_rows: gate_rows.rows(),
            gate_minority: choice.gate_minority,
            gate_uses: self.uses(),
            log_loss: choice.log_loss,
        };
        let held = Held { manifest: digest, served, calibration, promoted_ms: now_ms };
        self.put(in_service, &manifest, &held);
        self.keep(&held, &record)?;
        tracing::info!(served = %record.served, "promotion decided");
        Ok(Some(record))
    }

    /// The domain's own rows as contexts are made of them.
    ///
    /// # Errors
    /// [`WorkError`] if the table can't be read.
    pub fn rows(&self) -> Result<TypedBatch, WorkError> {
        Ok(self.domain.rows(&self.domain.schema)?)
    }

    /// What was published last, loaded for this domain; nothing before the first publication.
    ///
    /// # Errors
    /// [`WorkError`] if the publication or the ledger can't be read.
    pub fn published(&self) -> Result<Option<Loaded>, WorkError> {
        let current = self.artefacts.current()?;
        current.map(|(_, manifest)| self.load(&manifest)).transpose()
    }

    /// What is in service, loaded; nothing before the first promotion.
    ///
    /// # Errors
    /// [`WorkError`] if the publication can't be read.
    pub fn promoted(&self) -> Result<Option<Promoted>, WorkError> {
        let Some((digest, manifest)) = self.artefacts.current()? else { return Ok(None) };
        let Some(held) = self.held().filter(|held| held.manifest == digest) else { return Ok(None) };
        Ok(Some(Promoted {
            loaded: self.load(&manifest)?,
            manifest: digest,
            preprocessing: manifest.preprocessing,
            published_ms: manifest.created_ms,
            served: held.served,
            calibration: held.calibration,
        }))
    }

    /// The blend in service, for the domain's own eyes: no endpoint shows it.
    #[must_use]
    pub fn blend(&self) -> Option<Blend> {
        self.service().map(|service| service.served.blend().clone())
    }

    /// Notes that the coordinator was heard.
    pub fn heard(&self) {
        *self.contact_ms.write().unwrap_or_else(PoisonError::into_inner) = Some((self.clock)());
    }

    fn load(&self, manifest: &Manifest) -> Result<Loaded, WorkError> {
        let sizes = self.domain.config.context;
        let secret = self.domain.secret("context rows");
        let counted = self.domain.counted_by(&manifest.plan)?;
        let own = (self.domain.contract.name.as_str(), &self.domain.schema);
        Ok(Loaded::new(&self.artefacts, manifest, own, sizes, &secret, counted)?)
    }

    fn put(&self, served: Served, manifest: &Manifest, held: &Held) {
        let choice = serde_json::to_vec(held).unwrap_or_default();
        let version = ServedVersion {
            // Metadata name the publication, not what was chosen from it.
            name: format!("publication {}", held.manifest),
            // Another choice from the same publication is another version; keyed, since the choice comes from real rows.
            digest: self.keyed("version", &choice),
            base: manifest.tuned.to_string(),
            adapter: manifest.adapter.map(|digest| digest.to_string()),
            forest: manifest.forest.map(|digest| digest.to_string()),
            promoted_at_ms: held.promoted_ms,
            published_at_ms: manifest.created_ms,
        };
        let next = Arc::new(InService { served, version });
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Some(next);
    }

    /// A keyed digest in lower-case hex.
    fn keyed(&self, purpose: &str, bytes: &[u8]) -> String {
        let key = hmac::Key::new(hmac::HMAC_SHA256, &self.domain.secret(purpose));
        hex::encode(hmac::sign(&key, bytes))
    }

    fn service(&self) -> Option<Arc<InService>> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn keep(&self, held: &Held, record: &Promotion) -> Result<(), WorkError> {
        let path = self.path(PROMOTIONS);
        files::append_line(&path, record).map_err(|source| WorkError::File { path, source })?;
        let path = self.path("promoted.json");
        let bytes = serde_json::to_vec(held).unwrap_or_default();
        files::replace(&path, &bytes).map_err(|source| WorkError::File { path, source })
    }

    fn held(&self) -> Option<Held> {
        serde_json::from_slice(&std::fs::read(self.path("promoted.json")).ok()?).ok()
    }

    /// How often a choice was made on the gate rows before; shipped weights served for want of rows are none.
    fn uses(&self) -> usize {
        let Ok(text) = std::fs::read_to_string(self.path(PROMOTIONS)) else { return 0 };
        let judged = |line: &&str| {
            serde_json::from_str::<Promotion>(line).map_or(true, |promotion| !promotion.log_loss.is_empty())
        };
        text.lines().filter(judged).count()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.domain.config.data_dir.join(name)
    }
}

impl Predictor for Serving {
    fn schema(&self) -> &FeatureSchema {
        &self.domain.schema
    }

    fn input_columns(&self) -> Vec<InputColumn> {
        let schema = &self.domain.schema;
        self.domain
            .contract
            .features()
            .filter_map(|column| {
                let feature = schema.position(&column.feature)?;
                let kind = schema.features().get(feature)?.kind.clone();
                let datatype = match kind {
                    FeatureKind::Numeric(_) => Datatype::Fp64,
                    FeatureKind::Categorical { .. } => Datatype::Bytes,
                };
                Some(InputColumn { name: column.name.clone(), feature, datatype, kind })
            })
            .collect()
    }

    fn current(&self) -> Option<ServedVersion> {
        self.service().map(|service| service.version.clone())
    }

    fn predict(&self, batch: &TypedBatch) -> Result<Vec<Vec<f32>>, PredictError> {
        let service = self.service().ok_or(PredictError::NotReady)?;
        service.served.predict(batch).map_err(|error| PredictError::Failed { reason: error.to_string() })
    }

    fn coordinator_contact(&self) -> Option<CoordinatorContact> {
        let last_ms = (*self.contact_ms.read().unwrap_or_else(PoisonError::into_inner))?;
        Some(CoordinatorContact { last_ms, stale_after_ms: STALE_AFTER_MS })
    }
}

/// Every promotion of this agent, a line each.
pub(crate) const PROMOTIONS: &str = "promotions.jsonl";
/// Silence after which the coordinator counts as gone, in milliseconds.
const STALE_AFTER_MS: i64 = 60_000;

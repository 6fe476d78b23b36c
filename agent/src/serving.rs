//! The model in service: what was promoted last, rebuilt at start, swapped whole.

use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};

use serde::{Deserialize, Serialize};
use tabmesh_contract::batch::TypedBatch;
use tabmesh_contract::schema::FeatureSchema;
use tabmesh_federation::id::Digest;
use tabmesh_federation::manifest::Manifest;

use crate::calibrate::Calibration;
use crate::domain::Domain;
use crate::files;
use crate::gate::Gate;
use crate::promote::{self, Candidate, Loaded, Promotion, Tokens, Variant, Weights};
use crate::publication::Artefacts;
use crate::serve::oip::Datatype;
use crate::serve::{Clock, CoordinatorContact, InputColumn, PredictError, Predictor, ServedVersion};
use crate::work::WorkError;
use tabmesh_contract::schema::FeatureKind;

/// What was promoted, as kept over restarts.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
struct Held {
    manifest: Digest,
    served: Candidate,
    #[serde(default)]
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
    pub served: Candidate,
    /// How its logits are calibrated.
    pub calibration: Calibration,
}

struct InService {
    variant: Variant,
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
        self.put(&loaded, &manifest, &held, &rows)?;
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
        let champion = self.held().map_or(Candidate::DEFAULT, |held| held.served);
        let champion = if loaded.candidates().contains(&champion) { champion } else { Candidate::DEFAULT };
        let gate_rows = all.take(&split.gate);
        let choice = promote::choose(&loaded, &all.take(&split.training), &gate_rows, champion)?;
        let (served, calibration) = (choice.served, choice.calibration);
        let now_ms = (self.clock)();
        let record = Promotion {
            time_ms: now_ms,
            manifest: digest,
            served,
            calibration,
            reason: choice.reason,
            gate_rows: gate_rows.rows(),
            gate_uses: self.uses(),
            log_loss: choice.log_loss,
        };
        let held = Held { manifest: digest, served, calibration, promoted_ms: now_ms };
        self.put(&loaded, &manifest, &held, &all)?;
        self.keep(&held, &record)?;
        tracing::info!(served = %record.served, "promotion decided");
        Ok(Some(record))
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

    /// Notes that the coordinator was heard.
    pub fn heard(&self) {
        *self.contact_ms.write().unwrap_or_else(PoisonError::into_inner) = Some((self.clock)());
    }

    fn load(&self, manifest: &Manifest) -> Result<Loaded, WorkError> {
        let sizes = self.domain.config.context;
        let secret = self.domain.secret("context rows");
        let in_release = self.domain.contributes();
        Ok(Loaded::new(&self.artefacts, manifest, &self.domain.schema, sizes, &secret, in_release)?)
    }

    fn put(
        &self,
        loaded: &Loaded,
        manifest: &Manifest,
        held: &Held,
        rows: &TypedBatch,
    ) -> Result<(), WorkError> {
        let Calibration { slope, intercept } = held.calibration;
        let variant = loaded.build(held.served, rows)?.calibrated(held.calibration);
        let weights = match held.served.weights {
            Weights::Base => manifest.base,
            Weights::Tuned => manifest.tuned,
        };
        let adapter = manifest.adapter.filter(|_| held.served.tokens == Tokens::On);
        let version = ServedVersion {
            name: held.served.to_string(),
            // Another choice from the same publication is another version.
            digest: Digest::of(format!("{} {} {slope} {intercept}", held.manifest, held.served).as_bytes())
                .to_string(),
            base: weights.to_string(),
            adapter: adapter.map(|digest| digest.to_string()),
            promoted_at_ms: held.promoted_ms,
            published_at_ms: manifest.created_ms,
        };
        let next = Arc::new(InService { variant, version });
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Some(next);
        Ok(())
    }

    fn service(&self) -> Option<Arc<InService>> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn keep(&self, held: &Held, record: &Promotion) -> Result<(), WorkError> {
        let path = self.path("promotions.jsonl");
        files::append_line(&path, record).map_err(|source| WorkError::File { path, source })?;
        let path = self.path("promoted.json");
        let bytes = serde_json::to_vec(held).unwrap_or_default();
        files::replace(&path, &bytes).map_err(|source| WorkError::File { path, source })
    }

    fn held(&self) -> Option<Held> {
        serde_json::from_slice(&std::fs::read(self.path("promoted.json")).ok()?).ok()
    }

    /// How often the gate was used before.
    fn uses(&self) -> usize {
        std::fs::read_to_string(self.path("promotions.jsonl")).map_or(0, |text| text.lines().count())
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
        service.variant.predict(batch).map_err(|error| PredictError::Failed { reason: error.to_string() })
    }

    fn coordinator_contact(&self) -> Option<CoordinatorContact> {
        let last_ms = (*self.contact_ms.read().unwrap_or_else(PoisonError::into_inner))?;
        Some(CoordinatorContact { last_ms, stale_after_ms: STALE_AFTER_MS })
    }
}

/// Silence after which the coordinator counts as gone, in milliseconds.
const STALE_AFTER_MS: i64 = 60_000;

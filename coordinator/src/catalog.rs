//! Admitted contracts: who promised what, under which signing key, and on whose decision.
//!
//! A contract is parsed and judged once, at registration; the bytes are kept as stored and their digest is the
//! contract's name. The domain comes from the certificate: a contract that claims another is refused.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use tabmesh_contract::contract::{Contract, Purpose};
use tabmesh_contract::error::ContractError;
use tabmesh_contract::policy::{Decision, DecisionKind, PolicyBundle};
use tabmesh_contract::schema::FeatureSchema;
use tabmesh_proto::identity::SpiffeId;
use tabmesh_proto::message::{AdmissionRefusal, ContractRegistration, PUBLIC_KEY_BYTES};
use tabmesh_store::{BlobStore, Digest, Records};

use crate::error::CoordinatorError;
use crate::mesh::locked;

/// A contract that was admitted.
#[derive(Debug, Clone)]
pub(crate) struct Admitted {
    pub(crate) contract: Contract,
    pub(crate) schema: FeatureSchema,
    pub(crate) public_key: [u8; PUBLIC_KEY_BYTES],
}

impl Admitted {
    /// Whether the contract lets its product contribute to training by others; a newcomer only receives.
    pub(crate) fn contributes(&self) -> bool {
        let purposes = &self.contract.privacy.allowed_purposes;
        self.contract.privacy.allow_training
            && purposes.contains(&Purpose::CentralAggregate)
            && purposes.contains(&Purpose::FederatedAdapter)
    }
}

/// Why a registration was refused, in the closed list, with the words for the audit log.
#[derive(Debug)]
pub(crate) struct Refused {
    pub(crate) codes: Vec<AdmissionRefusal>,
    pub(crate) reasons: Vec<String>,
}

#[derive(Serialize, Deserialize)]
struct StoredContract {
    contract: Digest,
    public_key: Digest,
}

/// Admitted contracts by agent.
pub(crate) struct Catalog {
    records: Arc<dyn Records>,
    blobs: Arc<BlobStore>,
    admitted: Mutex<BTreeMap<SpiffeId, Arc<Admitted>>>,
}

impl Catalog {
    /// Reads every admitted contract.
    ///
    /// # Errors
    /// [`CoordinatorError`] if a record is damaged.
    pub(crate) fn load(records: Arc<dyn Records>, blobs: Arc<BlobStore>) -> Result<Self, CoordinatorError> {
        let catalog = Self { records, blobs, admitted: Mutex::new(BTreeMap::new()) };
        for (key, value) in catalog.records.scan_all(PREFIX.as_bytes())? {
            let agent = String::from_utf8_lossy(key.get(PREFIX.len()..).unwrap_or_default()).into_owned();
            let found: StoredContract =
                serde_json::from_slice(&value).map_err(CoordinatorError::stored("contract"))?;
            let text = String::from_utf8_lossy(&catalog.blobs.get(&found.contract)?).into_owned();
            let damaged = |reason: String| CoordinatorError::Stored { what: "contract", reason };
            let (contract, _) = Contract::parse(&agent, &text).map_err(|e| damaged(e.to_string()))?;
            let schema = contract.approved_schema().map_err(|e| damaged(e.to_string()))?;
            let id: SpiffeId = agent.parse().map_err(|_| damaged(format!("{agent:?} is no SPIFFE id")))?;
            let entry = Admitted { contract, schema, public_key: *found.public_key.as_bytes() };
            locked(&catalog.admitted).insert(id, Arc::new(entry));
        }
        Ok(catalog)
    }

    /// Judges a registration; what is admitted is durable when this returns.
    ///
    /// # Errors
    /// [`CoordinatorError::Store`] if it can't be stored. A refusal is not an error.
    pub(crate) fn register(
        &self,
        peer: &SpiffeId,
        registration: &ContractRegistration,
        policy: &PolicyBundle,
    ) -> Result<Result<Decision, Refused>, CoordinatorError> {
        let (entry, decision) = match self.judge(peer, registration, policy) {
            Ok(admitted) => admitted,
            Err(refused) => return Ok(Err(refused)),
        };
        let record = StoredContract {
            contract: self.blobs.put(&registration.contract)?,
            public_key: Digest::from_bytes(registration.signing_public_key),
        };
        let value = serde_json::to_vec(&record).map_err(CoordinatorError::stored("contract"))?;
        self.records.put(format!("{PREFIX}{peer}").as_bytes(), &value)?;
        locked(&self.admitted).insert(peer.clone(), Arc::new(entry));
        Ok(Ok(decision))
    }

    fn judge(
        &self,
        peer: &SpiffeId,
        registration: &ContractRegistration,
        policy: &PolicyBundle,
    ) -> Result<(Admitted, Decision), Refused> {
        let refuse = |code, reason: String| Err(Refused { codes: vec![code], reasons: vec![reason] });
        if registration.verify(peer).is_err() {
            return refuse(
                AdmissionRefusal::Signature,
                "the registration is not signed by the key it carries".into(),
            );
        }
        let Ok(text) = std::str::from_utf8(&registration.contract) else {
            return refuse(AdmissionRefusal::ContractUnreadable, "the contract is not UTF-8".into());
        };
        let (contract, _) = match Contract::parse("contract.yaml", text) {
            Ok(parsed) => parsed,
            Err(error @ ContractError::Syntax { .. }) => {
                return refuse(AdmissionRefusal::ContractUnreadable, error.render());
            }
            Err(error) => return refuse(AdmissionRefusal::ContractInvalid, error.render()),
        };
        if contract.name != registration.product {
            let reason =
                format!("registered as {}, the contract says {}", registration.product, contract.name);
            return refuse(AdmissionRefusal::ProductMismatch, reason);
        }
        if peer.domain() != Some(contract.domain.as_str()) {
            let reason = format!("the certificate is {peer}, the contract says domain {}", contract.domain);
            return refuse(AdmissionRefusal::DomainMismatch, reason);
        }
        if let Some(known) =
            self.get(peer).filter(|known| known.public_key != registration.signing_public_key)
        {
            let reason = format!("{peer} is known with another signing key for {}", known.contract.name);
            return refuse(AdmissionRefusal::KeyChanged, reason);
        }
        let owner = self.all().into_iter().find(|(_, other)| other.contract.name == contract.name);
        if let Some((owner, _)) = owner.filter(|(owner, _)| owner != peer) {
            return refuse(AdmissionRefusal::OwnedByOther, format!("{} is owned by {owner}", contract.name));
        }
        let schema = match contract.approved_schema() {
            Ok(schema) => schema,
            Err(error) => return refuse(AdmissionRefusal::Features, error.render()),
        };
        let decision = policy.decide_contract(DecisionKind::Registration, &contract, None);
        if !decision.allow {
            return Err(Refused { codes: vec![AdmissionRefusal::Policy], reasons: decision.reasons });
        }
        Ok((Admitted { contract, schema, public_key: registration.signing_public_key }, decision))
    }

    /// One agent's contract.
    pub(crate) fn get(&self, agent: &SpiffeId) -> Option<Arc<Admitted>> {
        locked(&self.admitted).get(agent).map(Arc::clone)
    }

    /// All agents with an admitted contract, in id order.
    pub(crate) fn all(&self) -> Vec<(SpiffeId, Arc<Admitted>)> {
        locked(&self.admitted).iter().map(|(agent, entry)| (agent.clone(), Arc::clone(entry))).collect()
    }
}

/// Key prefix of admitted contracts.
const PREFIX: &str = "contract/";

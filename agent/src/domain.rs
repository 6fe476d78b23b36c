//! What an agent knows of its own domain: contract, local policy, secret key, identity; and its word on a plan.
//!
//! The agent never takes anybody's word for what it may answer: features, ranges, privacy unit and budget come from files
//! in the domain, and a plan that differs from them is refused here, whatever the coordinator admitted.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use miette::Diagnostic;
use ring::hkdf;
use ring::rand::{SecureRandom, SystemRandom};
use ring::signature::Ed25519KeyPair;
use tabmesh_contract::batch::TypedBatch;
use tabmesh_contract::contract::{Contract, DomainAggregates, Purpose as ContractPurpose};
use tabmesh_contract::policy::{Aggregation, Decision, DecisionKind, PolicyBundle, RefusalCode, Request};
use tabmesh_contract::schema::{FeatureSchema, PrivacyUnit};
use tabmesh_federation::documents::PlanAnnouncement;
use tabmesh_federation::id::{AgentId, PlanDigest};
use tabmesh_federation::plan::{Plan, SecureSumSpec};
use tabmesh_federation::release_plan::shared_schema;
use tabmesh_federation::secagg::descriptor::least_threshold;
use tabmesh_federation::secagg::graph::Topology;
use tabmesh_privacy::accountant::zcdp;
use tabmesh_privacy::budget::Rho;
use tabmesh_privacy::ledger::window::DAY_MS;
use tabmesh_privacy::ledger::{Balance, GrantRequest, Pace, RefusalRule};
use tabmesh_privacy::release::ReleaseQuery;
use tabmesh_privacy::signature::{SigningKey, VerifyingKey};
use tabmesh_proto::identity::SpiffeId;
use thiserror::Error;

use crate::books::{self, BooksError, ROW_UNIT};
use crate::config::{Config, ConfigError, LocalPolicy};
use crate::gate::Gate;
use crate::peers::Peers;
use crate::source::{self, DomainKey, MarginalError, Source, SourceError, View, marginals};

/// Why an agent can't start.
#[derive(Debug, Error, Diagnostic)]
pub enum DomainError {
    /// The configuration or policy file is refused.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Config(#[from] ConfigError),
    /// The contract is refused.
    #[error("contract {path} is refused:\n{report}")]
    Contract {
        /// The file.
        path: PathBuf,
        /// The rendered refusal with line and caret.
        report: String,
    },
    /// A file can't be used.
    #[error("{what} {path}: {reason}")]
    File {
        /// What it is for.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Policy and contract speak of different products.
    #[error("policy {path} grants a budget for {policy:?}, the contract is about {contract:?}")]
    OtherProduct {
        /// The policy file.
        path: PathBuf,
        /// Product of the policy.
        policy: String,
        /// Product of the contract.
        contract: String,
    },
    /// The certificate identifies another agent than the configuration.
    #[error("the certificate identifies {certificate}, the configuration says agent {domain}/{name}")]
    OtherIdentity {
        /// Identity of the certificate.
        certificate: SpiffeId,
        /// Configured domain.
        domain: String,
        /// Configured name.
        name: String,
    },
}

/// The domain's own facts.
pub struct Domain {
    /// Configuration of the process.
    pub config: Config,
    /// The domain's policy.
    pub policy: LocalPolicy,
    /// The rules that policy is evaluated by.
    pub bundle: PolicyBundle,
    /// The contract.
    pub contract: Contract,
    /// The contract's bytes as stored.
    pub contract_bytes: Vec<u8>,
    /// Features and target that the contract approves.
    pub schema: FeatureSchema,
    /// Who this agent is.
    pub identity: SpiffeId,
    /// Signs registration and ledger heads.
    pub key: Arc<Ed25519KeyPair>,
    /// The same key, in the form that signs steps of secure sums.
    pub signer: Arc<SigningKey>,
    /// The other agents' keys, if the configuration names a file of them.
    pub peers: Option<Peers>,
    /// The coordinator's pinned signing key.
    pub coordinator_key: VerifyingKey,
    secret: [u8; 32],
}

impl Domain {
    /// Reads and checks everything the configuration names.
    ///
    /// `seed` replaces the domain's secret by a derived one, for reproducible runs.
    ///
    /// # Errors
    /// [`DomainError`] for the first file that can't be used.
    pub fn load(config: Config, identity: SpiffeId, seed: Option<u64>) -> Result<Self, DomainError> {
        if identity.domain() != Some(config.domain.as_str()) || identity.name() != Some(config.name.as_str())
        {
            let (domain, name) = (config.domain, config.name);
            return Err(DomainError::OtherIdentity { certificate: identity, domain, name });
        }
        let policy = LocalPolicy::load(&config.policy)?;
        let (contract, contract_bytes) = read_contract(&config.contract)?;
        if policy.grant.product != contract.name {
            let (path, contract) = (config.policy, contract.name);
            return Err(DomainError::OtherProduct { path, policy: policy.grant.product, contract });
        }
        let schema = contract.approved_schema().map_err(|error| DomainError::Contract {
            path: config.contract.clone(),
            report: error.render(),
        })?;
        let bundle = bundle(policy.bundle.as_deref())?;
        let pkcs8 = read("signing key", &config.signing_key)?;
        let key = Ed25519KeyPair::from_pkcs8(&pkcs8)
            .map_err(|error| file("signing key", &config.signing_key, &error))?;
        let signer = SigningKey::from_pkcs8(&pkcs8)
            .map_err(|error| file("signing key", &config.signing_key, &error))?;
        let own =
            AgentId::new(identity.to_string()).map_err(|error| file("peers", &config.signing_key, &error))?;
        let peers = config.peers.as_deref().map(|path| {
            Peers::load(path, (&own, signer.verifying_key())).map_err(|error| file("peers", path, &error))
        });
        let peers = peers.transpose()?;
        let pinned = read("coordinator's public key", &config.coordinator.signing_public_key)?;
        let pinned: [u8; 32] = pinned.try_into().map_err(|bytes: Vec<u8>| {
            let reason = format!("expected 32 bytes, got {}", bytes.len());
            file("coordinator's public key", &config.coordinator.signing_public_key, &reason)
        })?;
        let secret = secret(&config.data_dir, &identity, seed)?;
        Ok(Self {
            config,
            policy,
            bundle,
            contract,
            contract_bytes,
            schema,
            identity,
            key: Arc::new(key),
            signer: Arc::new(signer),
            peers,
            coordinator_key: VerifyingKey::from_bytes(pinned),
            secret,
        })
    }

    /// The domain's secret for keyed hashes of one purpose; never leaves the process.
    #[must_use]
    pub fn secret(&self, purpose: &str) -> [u8; 32] {
        derive(&self.secret, purpose)
    }

    /// Rows one privacy unit contributes at most.
    #[must_use]
    pub fn max_rows(&self) -> u32 {
        self.contract.privacy.unit.max_rows()
    }

    /// The gate whose training rows a plan's release counted by label, by this domain's own ledger; none for a newcomer,
    /// for a domain that came too late, and for one whose policy refused the plan.
    ///
    /// # Errors
    /// [`BooksError`] if the ledger can't be read or doesn't verify.
    pub fn counted_by(&self, plan: &PlanDigest) -> Result<Option<Gate>, BooksError> {
        let there = books::was_in_release(&self.config.data_dir.join("books"), &plan.to_string())?;
        Ok(there.then(|| Gate::new(&self.secret("gate"))))
    }

    /// Hands every batch of the table to `visit`, in this schema's columns, at most k rows of each unit.
    ///
    /// # Errors
    /// [`SourceError`] if the table can't be read, or what `visit` says.
    pub fn visit_rows<E: From<SourceError>>(
        &self,
        schema: &FeatureSchema,
        mut visit: impl FnMut(TypedBatch) -> Result<(), E>,
    ) -> Result<(), E> {
        let source = self.source()?;
        let view = View::new(&*source, &self.contract, schema, DomainKey::new(&self.secret("units")))?;
        for rows in view.capped_rows()? {
            visit(rows?.batch)?;
        }
        Ok(())
    }

    /// Counts a query's cells over the table's training rows: at most k of each unit, none of the gate's.
    ///
    /// # Errors
    /// [`MarginalError`] if the table can't be read, or the query counts what the schema doesn't have.
    pub fn marginals(
        &self,
        schema: &FeatureSchema,
        query: &ReleaseQuery,
        gate: &Gate,
    ) -> Result<Vec<i64>, MarginalError> {
        let source = self.source()?;
        let view = View::new(&*source, &self.contract, schema, DomainKey::new(&self.secret("units")))?;
        view.marginals(query, gate, marginals::resources())
    }

    /// All rows of the table in this schema's columns, at most k of each unit. For contexts and gradients, which need
    /// them together; counting streams instead.
    ///
    /// # Errors
    /// [`SourceError`] if the table can't be read.
    pub fn rows(&self, schema: &FeatureSchema) -> Result<TypedBatch, SourceError> {
        let mut all = TypedBatch::empty(schema);
        self.visit_rows(schema, |batch| {
            all.append(&batch);
            Ok::<(), SourceError>(())
        })?;
        Ok(all)
    }

    /// Rows of each value of a column, whatever the contract declares of it; at most k of each unit.
    ///
    /// # Errors
    /// [`SourceError`] if the table can't be read.
    pub fn level_counts(&self, column: &str) -> Result<BTreeMap<String, i64>, SourceError> {
        let source = self.source()?;
        let key = DomainKey::new(&self.secret("units"));
        View::new(&*source, &self.contract, &self.schema, key)?.level_counts(column)
    }

    fn source(&self) -> Result<Box<dyn Source>, SourceError> {
        let folder = self.config.contract.parent().unwrap_or_else(|| Path::new("."));
        source::open_contract(&self.contract, folder)
    }

    /// The grant of the local policy, for the ledger; the source as the contract calls it.
    #[must_use]
    pub fn grant(&self) -> GrantRequest {
        let grant = &self.policy.grant;
        GrantRequest {
            product: grant.product.clone(),
            entity_namespace: self.contract.privacy.entity_namespace.clone(),
            lineage: self.contract.source.as_ref().map_or_else(String::new, |s| s.path.clone()),
            unit: match &self.contract.privacy.unit {
                PrivacyUnit::Row => ROW_UNIT.to_owned(),
                PrivacyUnit::Entity { column, max_rows } => format!("{column}, at most {max_rows} rows"),
            },
            epsilon: grant.epsilon,
            delta: grant.delta,
            signer: grant.signer.clone(),
        }
    }

    /// Where the rows physically are.
    #[must_use]
    pub fn places(&self) -> BTreeSet<String> {
        self.source().map(|source| source.places()).unwrap_or_default()
    }

    /// How fast the local policy lets the grant be spent, for the ledger.
    #[must_use]
    pub fn pace(&self) -> Option<Pace> {
        let window = self.policy.grant.window?;
        Some(Pace { length_ms: u64::from(window.days) * DAY_MS, epsilon: window.epsilon })
    }

    /// Judges a plan against contract, policy and budget: the plan, or the rule that refuses it.
    ///
    /// # Errors
    /// [`RefusalRule`] with the full reason for the local log.
    pub fn judge(
        &self,
        announcement: &PlanAnnouncement,
        balance: Option<&Balance>,
    ) -> Result<Plan, (RefusalRule, String)> {
        let refuse = |rule, reason: String| Err((rule, reason));
        let (plan, digest) = match Plan::parse(announcement.plan.as_bytes(), "announced plan") {
            Ok(parsed) => parsed,
            Err(error) => return refuse(RefusalRule::ContractMismatch, error.to_string()),
        };
        if digest != announcement.digest {
            return refuse(
                RefusalRule::ContractMismatch,
                "the plan's digest is not that of its bytes".to_owned(),
            );
        }
        if let Err(reason) = self.check_schema(announcement, &plan) {
            return refuse(RefusalRule::ContractMismatch, reason);
        }
        if (announcement.cohort as usize) < self.policy.minimum_cohort {
            let reason = format!(
                "cohort of {}, this domain's minimum is {}",
                announcement.cohort, self.policy.minimum_cohort
            );
            return refuse(RefusalRule::CohortTooSmall, reason);
        }
        // What later steps count with is bounded here.
        let selected = plan.cohort.min_agents..=plan.cohort.max_agents;
        if !selected.contains(&announcement.cohort) {
            let (got, from, to) = (announcement.cohort, selected.start(), selected.end());
            return refuse(
                RefusalRule::ContractMismatch,
                format!("cohort of {got}, the plan selects {from} to {to} agents"),
            );
        }
        match plan.secure_sum() {
            Some(spec) => self.judge_sums(spec, announcement.cohort)?,
            None if self.contract.privacy.domain_aggregates != DomainAggregates::Confidential => {
                let published = self.contract.privacy.domain_aggregates == DomainAggregates::Published;
                if plan.release.domain_column && !published {
                    let reason =
                        "the plan draws a corpus with a domain column, which tells other domains what sets this \
                         one apart; the contract doesn't say domain_aggregates: published"
                            .to_owned();
                    return refuse(RefusalRule::AggregatesConfidential, reason);
                }
            }
            None => {
                let reason = "the contract keeps domain aggregates confidential; local noise would show them"
                    .to_owned();
                return refuse(RefusalRule::AggregatesConfidential, reason);
            }
        }
        let Some(balance) = balance else {
            return refuse(RefusalRule::NoGrant, "the ledger holds no grant".to_owned());
        };
        for (kind, purpose) in [
            (DecisionKind::Release, ContractPurpose::CentralAggregate),
            (DecisionKind::Training, ContractPurpose::FederatedAdapter),
        ] {
            let decision = self.decide(kind, purpose, &plan, announcement.cohort, balance);
            if !decision.allow {
                let rule = match decision.codes().first() {
                    Some(RefusalCode::CohortBelowMinimum) => RefusalRule::CohortTooSmall,
                    Some(RefusalCode::ConfidentialAggregates) => RefusalRule::AggregatesConfidential,
                    _ => RefusalRule::Policy,
                };
                return refuse(rule, decision.reasons.join("; "));
            }
        }
        Ok(plan)
    }

    /// The policy's decision about a plan, at the ε the product would have after it.
    #[must_use]
    pub fn decide(
        &self,
        kind: DecisionKind,
        purpose: ContractPurpose,
        plan: &Plan,
        cohort: u32,
        balance: &Balance,
    ) -> Decision {
        let charged = balance.spent.checked_add(balance.reserved).unwrap_or(balance.granted);
        let asked = plan.budget().map_or(Rho::ZERO, |budget| budget.total);
        let after = charged.checked_add(asked).unwrap_or(balance.granted);
        let epsilon = if after == Rho::ZERO { 0.0 } else { zcdp::epsilon(after, balance.grant.delta).get() };
        let request = Request {
            purpose,
            epsilon,
            delta: balance.grant.delta.get(),
            cohort,
            aggregation: match plan.secure_sum() {
                None => Aggregation::LocalNoise,
                Some(_) => Aggregation::SecureAggregation,
            },
        };
        self.bundle.decide_contract(kind, &self.contract, Some(&request))
    }

    /// Whether secure sums of these assumptions are ones that this domain takes part in.
    fn judge_sums(&self, spec: SecureSumSpec, cohort: u32) -> Result<(), (RefusalRule, String)> {
        let floor = self.policy.secure_sum;
        if self.peers.is_none() {
            let reason = "the plan has secure sums, and this agent's configuration names no file of `peers`";
            return Err((RefusalRule::Policy, reason.to_owned()));
        }
        if cohort < floor.min_agents {
            let reason =
                format!("secure sum over {cohort} agents, this domain's minimum is {}", floor.min_agents);
            return Err((RefusalRule::CohortTooSmall, reason));
        }
        if spec.colluders < floor.colluders {
            let reason = format!(
                "secure sum against {} colluders, this domain wants {}",
                spec.colluders, floor.colluders
            );
            return Err((RefusalRule::Policy, reason));
        }
        if spec.retries > floor.max_retries {
            let reason = format!(
                "the plan sets {} second attempts aside, this domain allows {}",
                spec.retries, floor.max_retries
            );
            return Err((RefusalRule::Policy, reason));
        }
        let agents = cohort as usize;
        let least = least_threshold(agents, spec.colluders);
        let graph = Topology::for_cohort(agents, least, spec.dropouts, spec.colluders)
            .map_err(|error| (RefusalRule::Policy, error.to_string()))?;
        let neighbours = graph.degree(agents);
        if neighbours < floor.min_neighbours as usize {
            let reason = format!(
                "secure sum with {neighbours} neighbours an agent, this domain's minimum is {}",
                floor.min_neighbours
            );
            return Err((RefusalRule::Policy, reason));
        }
        Ok(())
    }

    /// Every announced feature must be one of ours, declared alike.
    fn check_schema(&self, announcement: &PlanAnnouncement, plan: &Plan) -> Result<(), String> {
        let name = |text: &str| AgentId::new(text).map_err(|error| error.to_string());
        let both = BTreeMap::from([
            (name("announced")?, announcement.schema.clone()),
            (name("own")?, self.schema.clone()),
        ]);
        let shared = shared_schema(&both, &plan.target).map_err(|error| error.to_string())?;
        let strangers = announcement.schema.features().iter().filter(|f| shared.position(&f.id).is_none());
        let strangers: Vec<&str> = strangers.map(|f| f.id.as_str()).collect();
        if strangers.is_empty() {
            Ok(())
        } else {
            Err(format!("the plan asks for {}, which the contract does not approve", strangers.join(", ")))
        }
    }
}

/// Reads and parses a contract file.
///
/// # Errors
/// [`DomainError`] with the rendered refusal.
pub fn read_contract(path: &Path) -> Result<(Contract, Vec<u8>), DomainError> {
    let bytes = read("contract", path)?;
    let text = String::from_utf8(bytes).map_err(|error| file("contract", path, &error))?;
    let (contract, warnings) = Contract::parse(&path.display().to_string(), &text)
        .map_err(|error| DomainError::Contract { path: path.to_owned(), report: error.render() })?;
    for warning in warnings {
        tracing::warn!(path = %path.display(), "{}", warning.message());
    }
    Ok((contract, text.into_bytes()))
}

/// The policy bundle of a folder, or the built-in one.
///
/// # Errors
/// [`DomainError::File`] if a file can't be read or the rules don't load.
pub fn bundle(folder: Option<&Path>) -> Result<PolicyBundle, DomainError> {
    let Some(folder) = folder else { return Ok(PolicyBundle::default()) };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(|error| file("policy bundle", folder, &error))? {
        let path = entry.map_err(|error| file("policy bundle", folder, &error))?.path();
        if path.extension().is_some_and(|e| e == "rego" || e == "json") {
            let text = std::fs::read_to_string(&path).map_err(|error| file("policy rules", &path, &error))?;
            files.push((path.file_name().unwrap_or_default().to_string_lossy().into_owned(), text));
        }
    }
    files.sort();
    let borrowed: Vec<(&str, &str)> =
        files.iter().map(|(name, text)| (name.as_str(), text.as_str())).collect();
    PolicyBundle::from_files(&borrowed).map_err(|error| file("policy bundle", folder, &error))
}

/// The domain's secret: made once and kept, or derived from a seed.
fn secret(data_dir: &Path, identity: &SpiffeId, seed: Option<u64>) -> Result<[u8; 32], DomainError> {
    if let Some(seed) = seed {
        let mut material = [0; 32];
        material[..8].copy_from_slice(&seed.to_be_bytes());
        return Ok(derive(&material, &format!("seeded domain secret of {identity}")));
    }
    let path = data_dir.join("domain.secret");
    if path.exists() {
        let bytes = read("domain secret", &path)?;
        return bytes.try_into().map_err(|_| file("domain secret", &path, &"expected 32 bytes"));
    }
    let mut secret = [0; 32];
    SystemRandom::new()
        .fill(&mut secret)
        .map_err(|_| file("domain secret", &path, &"the operating system gave no randomness"))?;
    std::fs::create_dir_all(data_dir).map_err(|error| file("data folder", data_dir, &error))?;
    crate::files::write_secret(&path, &secret).map_err(|error| file("domain secret", &path, &error))?;
    Ok(secret)
}

fn derive(secret: &[u8; 32], purpose: &str) -> [u8; 32] {
    let salt = hkdf::Salt::new(hkdf::HKDF_SHA256, b"tabmesh domain secret v1");
    let mut out = [0; 32];
    let label = [purpose.as_bytes()];
    // Unwrap safety: 32 bytes is one SHA-256 block, far below HKDF's limit of 255 blocks, the only failure there is.
    salt.extract(secret)
        .expand(&label, hkdf::HKDF_SHA256)
        .and_then(|okm| okm.fill(&mut out))
        .expect("32 bytes of HKDF output always fit");
    out
}

fn read(what: &'static str, path: &Path) -> Result<Vec<u8>, DomainError> {
    std::fs::read(path).map_err(|error| file(what, path, &error))
}

fn file(what: &'static str, path: &Path, reason: &dyn std::fmt::Display) -> DomainError {
    DomainError::File { what, path: path.to_owned(), reason: reason.to_string() }
}

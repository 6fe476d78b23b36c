//! Policy as code: Rego decides whether a contract is registered, an aggregate released, a plan trained.
//!
//! Owns the bundle (rules and limits, by digest), its evaluation, and the two renderings of a refusal: rule names
//! with full reasons for the side that decided, and [`RefusalCode`] for the wire. Anything but a derived `allow`
//! refuses: undefined results, evaluation errors, a wrong shape, `allow` beside refusals. Decisions depend on the
//! contract and the request alone, never on rows. Coordinator and agent evaluate their own bundles; the agent's
//! answer is the last word.

use std::num::NonZeroU32;
use std::time::Duration;

use regorus::utils::limits::ExecutionTimerConfig;
use regorus::{Engine, Value as RegoValue};
use ring::digest::{Context, SHA256};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use thiserror::Error;

use crate::contract::{Contract, FeatureType, Purpose, names};
use crate::schema::PrivacyUnit;

/// Why a bundle is refused when it is loaded.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum PolicyError {
    /// The bundle has no file or is too large.
    #[error(
        "a policy bundle has 1 to {MAX_BUNDLE_FILES} files and at most {MAX_BUNDLE_BYTES} bytes, got {files} files, {bytes} bytes"
    )]
    Size {
        /// Files found.
        files: usize,
        /// Bytes found.
        bytes: usize,
    },
    /// A file is neither rules nor data.
    #[error("policy file {file} must end in .rego or .json")]
    Extension {
        /// The file.
        file: String,
    },
    /// A file can't be parsed.
    #[error("policy file {file}: {message}")]
    File {
        /// The file.
        file: String,
        /// What the engine said.
        message: String,
    },
    /// An entry point is missing or fails on a complete sample input.
    #[error("policy entry point {entry} can't be evaluated: {message}")]
    Entry {
        /// The entry point.
        entry: &'static str,
        /// What the engine said.
        message: String,
    },
}

/// What is decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DecisionKind {
    /// Entering a contract into the catalog.
    Registration,
    /// Releasing noised aggregates.
    Release,
    /// Taking part in federated rounds.
    Training,
    /// Bringing in the weights of a model. A bundle without rules for it refuses.
    Model,
}

names!(DecisionKind {
    Registration = "registration",
    Release = "release",
    Training = "training",
    Model = "model",
});

impl DecisionKind {
    fn entry(self) -> &'static str {
        match self {
            Self::Registration => "data.tabmesh.registration",
            Self::Release => "data.tabmesh.release",
            Self::Training => "data.tabmesh.training",
            Self::Model => "data.tabmesh.model",
        }
    }
}

/// How contributions are hidden from the coordinator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Aggregation {
    /// Each domain adds full noise itself; the coordinator sees each domain's noised vector.
    LocalNoise,
    /// The coordinator sees the noised sum of a cohort only.
    SecureAggregation,
}

/// What a plan asks of one data product.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Request {
    /// What the result is for.
    pub purpose: Purpose,
    /// ε of the product after this request, composed with what is already spent.
    pub epsilon: f64,
    /// δ of the product's budget.
    pub delta: f64,
    /// Domains that take part.
    pub cohort: u32,
    /// How contributions are hidden.
    pub aggregation: Aggregation,
}

/// What the weights of a model are brought in for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ModelPurpose {
    /// Any use, including a company's own.
    Commercial,
    /// Research that is published or teaches.
    Research,
    /// Trying out, without use of the results.
    Evaluation,
}

names!(ModelPurpose { Commercial = "commercial", Research = "research", Evaluation = "evaluation" });

/// The input document of a [`DecisionKind::Model`] decision.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ModelImport<'a> {
    /// SHA-256 of the file, hexadecimal.
    pub digest: &'a str,
    /// SPDX identifier of the weights' licence, or one of the bundle's own.
    pub licence: &'a str,
    /// Where the file comes from.
    pub source: &'a str,
    /// What it is for.
    pub purpose: ModelPurpose,
}

/// The name of the rule that refused.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct RuleName(String);

impl RuleName {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The code that may cross the wire: names of a domain's own rules don't.
    #[must_use]
    pub fn code(&self) -> RefusalCode {
        RefusalCode::from_name(&self.0).unwrap_or(RefusalCode::LocalRule)
    }
}

impl std::fmt::Display for RuleName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// All that a peer learns about a refusal: one of a closed list, without values or counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefusalCode {
    /// A pii column is declared a feature or the target.
    PiiFeature,
    /// A feature or the target declares no range or categories.
    UndeclaredRange,
    /// The contract doesn't allow training.
    TrainingNotAllowed,
    /// The purpose isn't among those allowed.
    PurposeNotAllowed,
    /// ε is above the limit of the sensitivity.
    EpsilonAboveLimit,
    /// δ is above 1/(10 × declared units).
    DeltaAboveLimit,
    /// Too few domains take part.
    CohortBelowMinimum,
    /// The domain's own aggregates are confidential.
    ConfidentialAggregates,
    /// The policy derived no decision.
    Undefined,
    /// The policy failed.
    PolicyError,
    /// A rule of the domain's own.
    LocalRule,
}

names!(RefusalCode {
    PiiFeature = "pii_feature",
    UndeclaredRange = "undeclared_range",
    TrainingNotAllowed = "training_not_allowed",
    PurposeNotAllowed = "purpose_not_allowed",
    EpsilonAboveLimit = "epsilon_above_limit",
    DeltaAboveLimit = "delta_above_limit",
    CohortBelowMinimum = "cohort_below_minimum",
    ConfidentialAggregates = "confidential_aggregates",
    Undefined = "undefined",
    PolicyError = "policy_error",
    LocalRule = "local_rule",
});

/// A decision with its reasons. It is for the side that decided; a peer gets [`Decision::codes`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// What was decided.
    pub kind: DecisionKind,
    /// Whether it may go on.
    pub allow: bool,
    /// Rules that refused, sorted by name; empty if allowed.
    pub rules: Vec<RuleName>,
    /// A reason for each of `rules`, in its order.
    pub reasons: Vec<String>,
    /// SHA-256 of the bundle that decided.
    pub bundle_digest: [u8; 32],
}

impl Decision {
    /// The refusal as a peer sees it: codes in order, each once; empty if allowed.
    #[must_use]
    pub fn codes(&self) -> Vec<RefusalCode> {
        let mut codes: Vec<_> = self.rules.iter().map(RuleName::code).collect();
        codes.sort_unstable();
        codes.dedup();
        codes
    }

    /// The decision for the decider's own log: kind, allow, rules with reasons, bundle digest.
    #[must_use]
    pub fn log_entry(&self) -> Value {
        let refusals: Vec<Value> = self
            .rules
            .iter()
            .zip(&self.reasons)
            .map(|(rule, reason)| json!({ "rule": rule, "reason": reason }))
            .collect();
        json!({
            "kind": self.kind,
            "allow": self.allow,
            "refusals": refusals,
            "bundle_sha256": hex::encode(self.bundle_digest),
        })
    }

    fn refused(kind: DecisionKind, bundle_digest: [u8; 32], code: RefusalCode, reason: String) -> Self {
        let rules = vec![RuleName(code.as_str().to_owned())];
        Self { kind, allow: false, rules, reasons: vec![reason], bundle_digest }
    }
}

/// The input document of a decision: what the contract declares, and the request if there is one.
#[must_use]
pub fn input(contract: &Contract, request: Option<&Request>) -> Value {
    let columns: Vec<Value> = contract
        .columns
        .iter()
        .map(|column| {
            let declared = match column.feature_type {
                Some(FeatureType::Numeric) => column.range.is_some(),
                Some(FeatureType::Categorical) => column.categories.is_some(),
                None => false,
            };
            json!({
                "name": column.name,
                "type": column.logical_type,
                "role": column.role,
                "feature": column.feature,
                "feature_type": column.feature_type,
                "pii": column.pii,
                "sensitive": column.sensitive,
                "declared": declared,
            })
        })
        .collect();
    let privacy = &contract.privacy;
    let mut privacy_json = json!({
        "sensitivity": privacy.sensitivity,
        "allow_training": privacy.allow_training,
        "allowed_purposes": privacy.allowed_purposes,
        "unit": match privacy.unit { PrivacyUnit::Row => "row", PrivacyUnit::Entity { .. } => "entity" },
        "max_rows_per_unit": privacy.unit.max_rows(),
        "domain_aggregates": privacy.domain_aggregates,
        "entity_namespace": privacy.entity_namespace,
    });
    if let (Some(units), Some(object)) = (privacy.max_units, privacy_json.as_object_mut()) {
        object.insert("max_units".into(), json!(units));
    }
    let mut document = json!({
        "contract": {
            "name": contract.name,
            "version": contract.version,
            "domain": contract.domain,
            "owner": contract.owner,
            "sha256": contract.digest_hex(),
            "columns": columns,
            "privacy": privacy_json,
        },
    });
    if let (Some(request), Some(object)) = (request, document.as_object_mut()) {
        object.insert("request".into(), json!(request));
    }
    document
}

/// Loaded rules and limits.
#[derive(Clone)]
pub struct PolicyBundle {
    engine: Engine,
    digest: [u8; 32],
}

impl std::fmt::Debug for PolicyBundle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PolicyBundle({})", hex::encode(self.digest))
    }
}

impl Default for PolicyBundle {
    /// The built-in rules and limits.
    fn default() -> Self {
        // Unwrap safety: the files are compiled in, and a test loads them.
        Self::from_files(&[
            (DEFAULT_RULES_FILE, DEFAULT_RULES),
            (DEFAULT_LIMITS_FILE, DEFAULT_LIMITS),
            (MODEL_RULES_FILE, MODEL_RULES),
            (LICENCES_FILE, LICENCES),
        ])
        .expect("the built-in bundle loads: it is fixed at compile time and tested")
    }
}

impl PolicyBundle {
    /// Loads `(name, text)` files: rules in `.rego` (package `tabmesh`, Rego v1), data in `.json` (merged).
    /// [`DEFAULT_RULES`] with other limits is a bundle too. The order of files doesn't matter.
    ///
    /// # Errors
    /// [`PolicyError`] for a file that can't be parsed, data that conflicts, or an entry point
    /// (`registration`, `release`, `training`) that is missing or fails on a complete sample input.
    pub fn from_files(files: &[(&str, &str)]) -> Result<Self, PolicyError> {
        let bytes = files.iter().map(|(_, text)| text.len()).sum();
        if files.is_empty() || files.len() > MAX_BUNDLE_FILES || bytes > MAX_BUNDLE_BYTES {
            return Err(PolicyError::Size { files: files.len(), bytes });
        }
        let mut sorted = files.to_vec();
        sorted.sort_unstable();
        let mut engine = Engine::new();
        engine.set_strict_builtin_errors(true);
        engine.set_execution_timer_config(ExecutionTimerConfig {
            limit: EVALUATION_LIMIT,
            check_interval: NonZeroU32::MIN.saturating_add(63),
        });
        let mut hash = Context::new(&SHA256);
        for (file, text) in sorted {
            for part in [file, text] {
                hash.update(&(part.len() as u64).to_be_bytes());
                hash.update(part.as_bytes());
            }
            let failed = |message: String| PolicyError::File { file: file.to_owned(), message };
            if file.ends_with(".rego") {
                engine
                    .add_policy(file.to_owned(), text.to_owned())
                    .map_err(|error| failed(error.to_string()))?;
            } else if file.ends_with(".json") {
                engine.add_data_json(text).map_err(|error| failed(error.to_string()))?;
            } else {
                return Err(PolicyError::Extension { file: file.to_owned() });
            }
        }
        let mut digest = [0; 32];
        digest.copy_from_slice(hash.finish().as_ref());
        let bundle = Self { engine, digest };
        for kind in [DecisionKind::Registration, DecisionKind::Release, DecisionKind::Training] {
            bundle
                .evaluate(kind, &sample())
                .map_err(|message| PolicyError::Entry { entry: kind.entry(), message })?;
        }
        Ok(bundle)
    }

    /// SHA-256 over the names and texts of the files, sorted by name.
    #[must_use]
    pub fn digest(&self) -> [u8; 32] {
        self.digest
    }

    /// Decides on an input document, see [`input`]. Never fails: what can't be derived is refused.
    #[must_use]
    pub fn decide(&self, kind: DecisionKind, input: &Value) -> Decision {
        let refused = |code, reason: String| Decision::refused(kind, self.digest, code, reason);
        let result = match self.evaluate(kind, input) {
            Ok(result) => result,
            Err(message) => return refused(RefusalCode::PolicyError, message),
        };
        if result == RegoValue::Undefined {
            return refused(RefusalCode::Undefined, format!("{} is undefined for this input", kind.entry()));
        }
        let parsed = serde_json::to_value(&result).and_then(serde_json::from_value::<RegoDecision>);
        let mut outcome = match parsed {
            Ok(outcome) => outcome,
            Err(error) => {
                let reason = format!("{} has not the shape {{allow, refusals}}: {error}", kind.entry());
                return refused(RefusalCode::PolicyError, reason);
            }
        };
        if !outcome.allow && outcome.refusals.is_empty() {
            return refused(RefusalCode::Undefined, "refused without a rule's name".to_owned());
        }
        if outcome.allow && !outcome.refusals.is_empty() {
            return refused(RefusalCode::PolicyError, "allow is true beside refusals".to_owned());
        }
        outcome.refusals.sort();
        let (rules, reasons) = outcome.refusals.into_iter().map(|r| (RuleName(r.rule), r.reason)).unzip();
        Decision { kind, allow: outcome.allow, rules, reasons, bundle_digest: self.digest }
    }

    /// Decides on a contract and, for release and training, a request.
    #[must_use]
    pub fn decide_contract(
        &self,
        kind: DecisionKind,
        contract: &Contract,
        request: Option<&Request>,
    ) -> Decision {
        self.decide(kind, &input(contract, request))
    }

    /// Decides on bringing in a model's weights.
    #[must_use]
    pub fn decide_model(&self, import: &ModelImport<'_>) -> Decision {
        self.decide(DecisionKind::Model, &json!({ "model": import }))
    }

    fn evaluate(&self, kind: DecisionKind, input: &Value) -> Result<RegoValue, String> {
        let mut engine = self.engine.clone();
        engine.set_input_json(&input.to_string()).map_err(|error| error.to_string())?;
        engine.eval_rule(kind.entry().to_owned()).map_err(|error| error.to_string())
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RegoDecision {
    allow: bool,
    #[serde(default)]
    refusals: Vec<RegoRefusal>,
}

#[derive(Deserialize, PartialEq, Eq, PartialOrd, Ord)]
#[serde(deny_unknown_fields)]
struct RegoRefusal {
    rule: String,
    reason: String,
}

/// A complete input, on which every entry point must evaluate without an error.
fn sample() -> Value {
    json!({
        "contract": {
            "name": "sample.product", "version": "1.0.0", "domain": "sample", "owner": "owner", "sha256": "",
            "columns": [{
                "name": "x", "type": "number", "role": "feature", "feature": "x", "feature_type": "numeric",
                "pii": false, "sensitive": false, "declared": true,
            }],
            "privacy": {
                "sensitivity": "low", "allow_training": true, "allowed_purposes": ["central_aggregate"],
                "unit": "row", "max_rows_per_unit": 1, "max_units": 1000, "domain_aggregates": "open",
                "entity_namespace": "sample/row",
            },
        },
        "request": {
            "purpose": "central_aggregate", "epsilon": 1.0, "delta": 1e-6, "cohort": 4,
            "aggregation": "local_noise",
        },
    })
}

/// File name of the built-in rules.
pub const DEFAULT_RULES_FILE: &str = "default.rego";
/// The built-in rules.
pub const DEFAULT_RULES: &str = include_str!("../policy/default.rego");
/// File name of the built-in limits.
pub const DEFAULT_LIMITS_FILE: &str = "limits.json";
/// The built-in limits: ε by sensitivity, δ, cohort by aggregation.
pub const DEFAULT_LIMITS: &str = include_str!("../policy/limits.json");
/// File name of the built-in rules for models.
pub const MODEL_RULES_FILE: &str = "models.rego";
/// The built-in rules for models.
pub const MODEL_RULES: &str = include_str!("../policy/models.rego");
/// File name of the built-in licence terms.
pub const LICENCES_FILE: &str = "licences.json";
/// The built-in licence terms: purposes by licence.
pub const LICENCES: &str = include_str!("../policy/licences.json");
/// Most files of a bundle.
pub const MAX_BUNDLE_FILES: usize = 64;
/// Largest bundle, in bytes.
pub const MAX_BUNDLE_BYTES: usize = 1 << 20;
/// Longest evaluation; a policy that needs longer refuses.
const EVALUATION_LIMIT: Duration = Duration::from_secs(2);

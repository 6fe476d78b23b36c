//! Budget reports: what each product's ledger adds up to, for people and for offline verification.
//!
//! A [`Report`] holds the ledgers' entries byte for byte and everything derived from them. It is signed as one JSON
//! text and rendered as one self-contained HTML page that embeds the signed text; [`verify`](verify::verify) checks
//! the signature, every hash chain, the ledgers' own rules, every derived figure and the page. Nothing in a report
//! depends on rows beyond what was already released.
//!
//! What it can't show: entries cut off the end of a ledger whose head nobody signed, and ledgers left out.

mod build;
mod disjoint;
mod facts;
mod headline;
mod html;
mod picture;
mod section;
mod verify;

pub use build::{build, build_leaving_out};
pub use disjoint::{
    DISJOINT_FORMAT, Declaration, DeclaredSource, DisjointError, MAX_DECLARATION_BYTES, MAX_DECLARATIONS,
    OwnerSignature, SignedDeclaration,
};
pub use facts::{MAX_ATTACKS, MAX_STATED_BYTES, MeasuredAttack, Published, Stated, Transparency};
pub use html::render_html;
pub use section::{
    ByStep, EventKind, EventLine, Granted, Headline, Odds, ProductSection, RefusalLine, Spending,
    WindowFigures,
};
pub use verify::{MAX_REPORT_BYTES, Verified, VerifyError, verify};

use crate::ledger::{ChainedEntry, LedgerError};
use crate::private::{Digest, hex_digest};
use crate::signature::{Context, Signature, SigningKey, VerifyingKey};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Format of a report's JSON.
pub const FORMAT: &str = "tabmesh-report/3";

/// Where the noise is added.
pub const DEPLOYMENT_MODEL: &str =
    "local noise: every agent adds the full noise before anything leaves its domain";

/// Where the noise is added, if every debit is for a secure sum.
pub const DEPLOYMENT_MODEL_SUMS: &str = "distributed noise with secure aggregation: every agent adds a share of the noise and a mask; the coordinator \
     sees sums over the agents and no agent's vector";

/// Where the noise is added, if some debits are for secure sums and some for whole noise.
pub const DEPLOYMENT_MODEL_BOTH: &str = "distributed noise with secure aggregation for the debits that name shares; local noise, added in full by every \
     agent, for all others";

/// What a report with local noise says.
pub const LOCAL_STATEMENT: &str = "Local noise hides rows, not domains: the coordinator sees each domain's noised totals, such as its label rate \
     and marginal counts.";

/// What a report with secure sums says.
pub const SUM_STATEMENTS: [&str; 3] = [
    "The figure of a secure sum holds against the coordinator together with at most as many colluding agents, while at \
     most as many agents are missing, as its entry names. Agents refuse to unmask a sum whose honest rest has less noise. \
     If everybody else colludes, what is left is the agent's own share, whose cost is printed beside.",
    "A sum hides domains among those in it, not against all others of them together, and not what joining or leaving the \
     cohort changes.",
    "What a unit adds in several domains of one namespace adds up within one sum. So the headline multiplies rho of \
     secure sums by the number of the namespace's accounts that a unit may be in, never less than the square of the sum of their roots.",
];

/// What a report on grants with windows says.
pub const WINDOW_STATEMENT: &str = "A budget window limits how fast a budget is spent, not what is lost: it rolls, each debit leaves it by itself, and no \
     refresh takes back what was released. Rho adds up over all windows, so the claim is the lifetime figure, which the \
     grant's own epsilon caps; the window's figure is of the window alone. Times are the agent's clock, never counted \
     backwards.";

/// What a report with declared disjoint sources says.
pub const DISJOINT_STATEMENT: &str = "Sources are taken as disjoint only where both owners signed that no unit is in both; of such sources the totals \
     count the largest loss. That rests on the owners' word: if they err, a unit that is in both loses the sum.";

/// What every report says, whatever the figures are.
pub const STATEMENTS: [&str; 5] = [
    "Composition: zero-concentrated differential privacy, rho added up in exact integers; epsilon by the conversion \
     of Canonne, Kamath and Steinke (2020) at the budget's one fixed delta. The filter holds for plans chosen \
     adaptively (Whitehouse, Ramdas, Rogers and Wu, 2023).",
    "The figure for continuous Gaussian noise is printed second and is not the claim: the noise is discrete.",
    "Figures by step are each step alone. They don't add up to the total, and epsilons are never subtracted.",
    "Noise is the exact discrete Gaussian, drawn with integer arithmetic from a ChaCha20 generator seeded by the \
     operating system. Its running time depends on the noise drawn, not on rows; sends follow the schedule.",
    "Serving inside a domain uses the domain's own rows as context. It stays in the domain and is outside this claim.",
];

/// The months, weeks or days a report is about; the lifetime figures ignore it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Period {
    /// First millisecond since 1970, UTC.
    pub from_ms: i64,
    /// First millisecond after the period.
    pub until_ms: i64,
}

impl Period {
    /// Whether a time lies within.
    #[must_use]
    pub fn contains(&self, time_ms: i64) -> bool {
        (self.from_ms..self.until_ms).contains(&time_ms)
    }
}

/// A fact that leaves a domain without noise: the whole list there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum UnprotectedFact {
    /// What the owner declares in the contract, and that a validation passed or failed at admission.
    ContractFacts,
    /// That an agent is connected.
    Liveness,
    /// That a domain takes part in a release or a round.
    Participation,
    /// When messages are sent; by schedule.
    Timing,
    /// Codes of refusals, from a closed list without values.
    RefusalCodes,
}

impl UnprotectedFact {
    /// Every such fact.
    pub const ALL: [Self; 5] =
        [Self::ContractFacts, Self::Liveness, Self::Participation, Self::Timing, Self::RefusalCodes];

    /// The fact in words.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::ContractFacts => "contract facts: what the owner declares, and pass or fail at admission",
            Self::Liveness => "liveness: that an agent is connected",
            Self::Participation => "participation: that a domain takes part in a release or a round",
            Self::Timing => "timing: when messages are sent, by schedule",
            Self::RefusalCodes => "refusal codes: from a closed list, without values",
        }
    }
}

/// A plan that the coordinator's policy refused, so that no agent's ledger holds the refusal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RefusedRequest {
    /// Time in milliseconds since 1970, UTC.
    pub time_ms: i64,
    /// Digest of the plan.
    pub plan_digest: String,
    /// The product whose contract it doesn't fit.
    pub product: String,
    /// Names of the policy's rules that refused it.
    pub rules: Vec<String>,
}

/// A signature over a ledger's last entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SignedHead {
    /// The agent's signature.
    pub signature: Signature,
    /// The agent's public key.
    pub public_key: VerifyingKey,
}

impl SignedHead {
    /// Signs the last entry of an agent's ledger.
    #[must_use]
    pub fn sign(key: &SigningKey, agent: &str, head: &ChainedEntry) -> Self {
        let signature = key.sign(Context::LedgerHead, &head_statement(agent, head.seq, &head.hash));
        Self { signature, public_key: key.verifying_key() }
    }
}

/// One product of one agent's ledger.
#[derive(Debug, Clone, PartialEq)]
pub struct ProductLedger {
    /// SPIFFE id of the agent.
    pub agent: String,
    /// The product to report on.
    pub product: String,
    /// Every entry of the agent's ledger, from the first.
    pub entries: Vec<ChainedEntry>,
    /// The agent's signature over the last entry.
    pub head: Option<SignedHead>,
}

/// What a report is built from.
#[derive(Debug, Clone, PartialEq)]
pub struct ReportInput {
    /// Name of the deployment.
    pub deployment: String,
    /// What the window figures are about.
    pub period: Period,
    /// Time in milliseconds since 1970, UTC.
    pub generated_at_ms: i64,
    /// Program and version that made the report.
    pub generator: String,
    /// SHA-256 of that program's file, in hexadecimal.
    pub generator_digest: Option<String>,
    /// What whoever runs the deployment states about it.
    pub stated: Stated,
    /// What was published, oldest first.
    pub published: Vec<Published>,
    /// What attacks on the shipped code found.
    pub attacks: Vec<MeasuredAttack>,
    /// Who is trusted for what, in sentences.
    pub trust_model: Vec<String>,
    /// Products with their ledgers.
    pub products: Vec<ProductLedger>,
    /// Plans that policy refused before an agent saw them, oldest first.
    pub refused: Vec<RefusedRequest>,
    /// Owners' declarations that their sources have no unit in common; each with both signatures.
    pub disjoint: Vec<SignedDeclaration>,
    /// Facts that leave without noise.
    pub unprotected_facts: Vec<UnprotectedFact>,
    /// What the coordinator's audit log proves of the ledgers.
    pub audit: Option<AuditProof>,
}

/// What the coordinator's audit log proves of the ledgers: its latest checkpoint, and where in the log their heads are.
///
/// This crate carries and shows it; who has the log's hashes and signatures checks it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AuditProof {
    /// The checkpoint as a signed note with the agents' cosignatures.
    pub note: String,
    /// Heads, in order of agent.
    pub heads: Vec<ProvenHead>,
    /// Audit entries of refused plans and of publications that the report lists, in order of the log.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub entries: Vec<ProvenEntry>,
}

/// An entry of the audit log with its place in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ProvenEntry {
    /// Place of the entry in the log.
    pub index: u64,
    /// The entry, byte for byte.
    pub payload: String,
    /// Hashes from the entry to the checkpoint's root, lowest first, in hexadecimal.
    pub inclusion: Vec<String>,
}

/// A ledger's head as the audit log has it; it covers all entries before it by their chain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ProvenHead {
    /// SPIFFE id of the agent.
    pub agent: String,
    /// Place of the audit entry in the log.
    pub index: u64,
    /// The audit entry, byte for byte.
    pub payload: String,
    /// Hashes from the entry to the checkpoint's root, lowest first, in hexadecimal.
    pub inclusion: Vec<String>,
}

/// A ledger entry inside a report; the payload is the stored text, byte for byte.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RecordedEntry {
    /// Position in the chain.
    pub seq: u64,
    /// Hash of the entry before.
    #[serde(with = "hex_digest")]
    #[schemars(with = "String", regex(pattern = "^[0-9a-f]{64}$"))]
    pub prev: Digest,
    /// Hash of the entry.
    #[serde(with = "hex_digest")]
    #[schemars(with = "String", regex(pattern = "^[0-9a-f]{64}$"))]
    pub hash: Digest,
    /// The stored JSON text.
    pub payload: String,
}

/// One agent's ledger inside a report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LedgerRecord {
    /// SPIFFE id of the agent.
    pub agent: String,
    /// Every entry from the first.
    pub entries: Vec<RecordedEntry>,
    /// The agent's signature over the last entry.
    pub head: Option<SignedHead>,
}

impl LedgerRecord {
    /// The entries as the ledger knows them.
    #[must_use]
    pub fn chained(&self) -> Vec<ChainedEntry> {
        let chained = |e: &RecordedEntry| ChainedEntry {
            seq: e.seq,
            prev: e.prev,
            hash: e.hash,
            payload: e.payload.clone().into_bytes(),
        };
        self.entries.iter().map(chained).collect()
    }
}

/// A budget report.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Report {
    /// [`FORMAT`].
    pub format: String,
    /// Name of the deployment.
    pub deployment: String,
    /// What the window figures are about.
    pub period: Period,
    /// Time in milliseconds since 1970, UTC.
    pub generated_at_ms: i64,
    /// Name of this report: a digest of the ledgers' ends and of the time it was made, in hexadecimal.
    pub id: String,
    /// Program and version that made the report.
    pub generator: String,
    /// SHA-256 of that program's file, in hexadecimal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generator_digest: Option<String>,
    /// What whoever runs the deployment states about it.
    #[serde(default)]
    pub stated: Stated,
    /// Which tier of public transparency the report fills.
    pub transparency: Transparency,
    /// What was published, oldest first.
    #[serde(default)]
    pub published: Vec<Published>,
    /// What attacks on the shipped code found.
    #[serde(default)]
    pub attacks: Vec<MeasuredAttack>,
    /// [`DEPLOYMENT_MODEL`], [`DEPLOYMENT_MODEL_SUMS`] or [`DEPLOYMENT_MODEL_BOTH`], as the debits say.
    pub deployment_model: String,
    /// Who is trusted for what.
    pub trust_model: Vec<String>,
    /// [`LOCAL_STATEMENT`] and [`SUM_STATEMENTS`] where they apply, then [`STATEMENTS`].
    pub statements: Vec<String>,
    /// Whether anything here was made under noise that could be drawn again: reproducible, not private.
    pub reproducible: bool,
    /// One total per entity namespace, over all products and agents.
    pub headlines: Vec<Headline>,
    /// Products, in order of agent and name.
    pub products: Vec<ProductSection>,
    /// Plans that policy refused before an agent saw them, oldest first.
    pub refused: Vec<RefusedRequest>,
    /// Owners' declarations that their sources have no unit in common.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disjoint: Vec<SignedDeclaration>,
    /// Facts that leave without noise.
    pub unprotected_facts: Vec<UnprotectedFact>,
    /// The ledgers, in order of agent.
    pub ledgers: Vec<LedgerRecord>,
    /// What the coordinator's audit log proves of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub audit: Option<AuditProof>,
}

impl Report {
    /// JSON Schema of the text that is signed.
    #[must_use]
    pub fn json_schema() -> serde_json::Value {
        schemars::schema_for!(Self).to_value()
    }

    /// The report as JSON text.
    #[must_use]
    pub fn to_json(&self) -> String {
        // Unwrap safety: strings, finite numbers and lists always serialise, and map keys are field names.
        serde_json::to_string(self).expect("a report has a JSON form")
    }

    /// What the report was built from.
    #[must_use]
    pub fn input(&self) -> ReportInput {
        let ledger = |agent: &str| self.ledgers.iter().find(|ledger| ledger.agent == agent);
        let products = self
            .products
            .iter()
            .map(|section| ProductLedger {
                agent: section.agent.clone(),
                product: section.product.clone(),
                entries: ledger(&section.agent).map(LedgerRecord::chained).unwrap_or_default(),
                head: ledger(&section.agent).and_then(|ledger| ledger.head),
            })
            .collect();
        ReportInput {
            deployment: self.deployment.clone(),
            period: self.period,
            generated_at_ms: self.generated_at_ms,
            generator: self.generator.clone(),
            generator_digest: self.generator_digest.clone(),
            stated: self.stated.clone(),
            published: self.published.clone(),
            attacks: self.attacks.clone(),
            trust_model: self.trust_model.clone(),
            products,
            refused: self.refused.clone(),
            disjoint: self.disjoint.clone(),
            unprotected_facts: self.unprotected_facts.clone(),
            audit: self.audit.clone(),
        }
    }

    /// Signs the report.
    #[must_use]
    pub fn sign(&self, key: &SigningKey) -> SignedReport {
        let payload = self.to_json();
        let signature = key.sign(Context::Report, payload.as_bytes());
        SignedReport { payload, signature, public_key: key.verifying_key() }
    }
}

/// A report with its signature: the JSON file that is kept and passed on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SignedReport {
    /// The report's JSON text, exactly as signed.
    pub payload: String,
    /// Signature over the payload.
    pub signature: Signature,
    /// Key of the signer.
    pub public_key: VerifyingKey,
}

impl SignedReport {
    /// The file's text.
    #[must_use]
    pub fn to_json(&self) -> String {
        // Unwrap safety: three strings always serialise.
        serde_json::to_string(self).expect("a signed report has a JSON form")
    }
}

/// Why a report can't be built.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ReportError {
    /// An agent's ledger doesn't verify.
    #[error("ledger of {agent}: {source}")]
    Ledger {
        /// SPIFFE id of the agent.
        agent: String,
        /// What is wrong.
        source: LedgerError,
    },
    /// The product has no grant in the ledger.
    #[error("product {product:?} has no grant in the ledger of {agent}")]
    UnknownProduct {
        /// SPIFFE id of the agent.
        agent: String,
        /// The product.
        product: String,
    },
    /// Two different ledgers were given for one agent.
    #[error("two different ledgers were given for {agent}")]
    TwoLedgers {
        /// SPIFFE id of the agent.
        agent: String,
    },
    /// A declaration of disjoint sources doesn't count.
    #[error(transparent)]
    Disjoint(#[from] DisjointError),
    /// A declaration names a source that isn't in the ledger of its agent.
    #[error("declared disjoint: {got} isn't in the ledger of {agent}, which has {}", known.join(", "))]
    UnknownSource {
        /// SPIFFE id of the agent.
        agent: String,
        /// What was declared.
        got: String,
        /// What the ledger has.
        known: Vec<String>,
    },
    /// The page can't be drawn.
    #[error("page: {reason}")]
    Page {
        /// The renderer's words.
        reason: String,
    },
}

/// What an agent signs about its ledger's last entry: agent, position and hash, so that a head of one agent can't be shown
/// as another's.
#[must_use]
pub fn head_statement(agent: &str, seq: u64, hash: &Digest) -> Vec<u8> {
    let mut bytes = agent.as_bytes().to_vec();
    bytes.push(0);
    bytes.extend_from_slice(&seq.to_le_bytes());
    bytes.extend_from_slice(hash);
    bytes
}

#[cfg(test)]
mod tests;

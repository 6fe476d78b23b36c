//! The checked form of every message: what services and clients work with.
//!
//! Values of these types that came from a peer have passed [`crate::convert`]: lengths, digests, enums and texts are
//! within bounds. Documents (release queries, round descriptors, plans) stay opaque JSON bytes here; their crates own
//! their meaning. No type here can be turned into a message that carries table-derived bytes: that is
//! [`crate::client::MeshClient`]'s alone.

use std::{fmt, str::FromStr, time::Duration};

use ring::signature::Ed25519KeyPair;
pub use tabmesh_privacy::private::{Digest, sha256};

use crate::{
    convert::ConvertError,
    identity::SpiffeId,
    limits::{MAX_CONTRACT_BYTES, MAX_DOCUMENT_BYTES, MAX_ID_BYTES},
    signing::{SignatureError, Statement},
};

/// Bytes of an Ed25519 public key.
pub const PUBLIC_KEY_BYTES: usize = 32;
/// Bytes of an Ed25519 signature.
pub const SIGNATURE_BYTES: usize = 64;

/// An identifier of an assignment, plan, session or receipt: 1 to 64 of `A-Z a-z 0-9 . _ -`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id(String);

impl Id {
    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Id {
    type Err = ConvertError;

    fn from_str(text: &str) -> Result<Self, ConvertError> {
        if text.len() > MAX_ID_BYTES {
            return Err(ConvertError::TooLarge { field: "id", got: text.len(), max: MAX_ID_BYTES });
        }
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
        if text.is_empty() || !text.bytes().all(allowed) {
            return Err(ConvertError::Text { field: "id", expected: "1 to 64 of A-Z a-z 0-9 . _ -" });
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The first frame of a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// Version of the protocol the agent speaks; see [`crate::PROTOCOL_VERSION`].
    pub protocol_version: u32,
    /// Version of the agent's build, for people.
    pub product_version: String,
}

/// What an agent says within a session after its hello.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AgentFrame {
    /// It is alive.
    Heartbeat,
    /// It holds the whole artefact an assignment announced; says nothing about what it chose to serve.
    ArtefactReceived {
        /// The assignment concerned.
        assignment_id: Id,
    },
    /// It does not take an assignment on.
    AssignmentRefused {
        /// The assignment concerned.
        assignment_id: Id,
        /// Why.
        code: AssignmentRefusal,
    },
}

/// Why an agent does not take an assignment on; follows from contract, policy and budget, never from rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum AssignmentRefusal {
    /// No budget is granted, or less is left than the plan asks for.
    Budget,
    /// The plan differs from the domain's contract.
    Contract,
    /// The domain's own policy forbids it.
    Policy,
    /// Too few agents take part.
    Cohort,
    /// The contract keeps domain aggregates confidential.
    Confidential,
    /// The plan descends from reproducible noise.
    Reproducible,
}

impl fmt::Display for AssignmentRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Budget => "budget",
            Self::Contract => "contract",
            Self::Policy => "policy",
            Self::Cohort => "cohort too small",
            Self::Confidential => "confidential aggregates",
            Self::Reproducible => "reproducible noise",
        })
    }
}

/// What the coordinator says within a session after its welcome.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CoordinatorFrame {
    /// A task.
    Assignment(Assignment),
    /// The answer to a heartbeat; sent by the server itself.
    HeartbeatAck,
    /// The session ends.
    Goodbye(GoodbyeReason),
}

/// The coordinator's answer to a hello.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Welcome {
    /// Name of the session in logs on both sides.
    pub session_id: Id,
    /// Version of the protocol spoken in this session.
    pub protocol_version: u32,
    /// How often the agent sends a heartbeat.
    pub heartbeat_interval: Duration,
}

/// Why a session ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum GoodbyeReason {
    /// The coordinator is stopping; come back.
    ShuttingDown,
    /// The same agent opened a newer session.
    Superseded,
    /// The agent was removed.
    Revoked,
    /// No frame arrived for several heartbeat intervals.
    HeartbeatMissed,
    /// The agent sent a frame that does not parse.
    Protocol,
}

/// What kind of task an assignment is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum AssignmentKind {
    /// Answer one stage of a release.
    ReleaseQuery,
    /// Take part in one training round.
    Round,
    /// Fetch a published artefact.
    Publish,
    /// A plan is over; refund what was not used.
    ClosePlan,
    /// A plan to check and reserve budget for.
    Plan,
    /// Take a step of a secure sum.
    SecureSum,
    /// Check a checkpoint of the audit log against earlier ones, and cosign it.
    Witness,
}

impl AssignmentKind {
    /// The word that is signed and logged.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ReleaseQuery => "release_query",
            Self::Round => "round",
            Self::Publish => "publish",
            Self::ClosePlan => "close_plan",
            Self::Plan => "plan",
            Self::SecureSum => "secure_sum",
            Self::Witness => "witness",
        }
    }
}

/// A declarative task, signed by the coordinator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assignment {
    pub(crate) id: Id,
    pub(crate) kind: AssignmentKind,
    pub(crate) document: Vec<u8>,
    pub(crate) digest: Digest,
    pub(crate) signature: [u8; SIGNATURE_BYTES],
}

impl Assignment {
    /// Signs a task as the coordinator `signer`.
    ///
    /// # Errors
    /// [`ConvertError::TooLarge`] if the document exceeds its limit.
    pub fn sign(
        id: Id,
        kind: AssignmentKind,
        document: Vec<u8>,
        signer: &SpiffeId,
        key: &Ed25519KeyPair,
    ) -> Result<Self, ConvertError> {
        if document.len() > MAX_DOCUMENT_BYTES {
            let got = document.len();
            return Err(ConvertError::TooLarge { field: "document", got, max: MAX_DOCUMENT_BYTES });
        }
        let digest = sha256(&document);
        let statement = Statement::Assignment { coordinator: signer, id: &id, kind, digest: &digest };
        let signature = statement.sign(key);
        Ok(Self { id, kind, document, digest, signature })
    }

    /// Checks the signature against the coordinator's pinned key.
    ///
    /// # Errors
    /// [`SignatureError`] if it is not the coordinator's signature over this task.
    pub fn verify(&self, signer: &SpiffeId, key: &[u8; PUBLIC_KEY_BYTES]) -> Result<(), SignatureError> {
        let (id, kind, digest) = (&self.id, self.kind, &self.digest);
        Statement::Assignment { coordinator: signer, id, kind, digest }.verify(key, &self.signature)
    }

    /// Its identifier, named again by every message that answers it.
    #[must_use]
    pub const fn id(&self) -> &Id {
        &self.id
    }

    /// What kind of task it is.
    #[must_use]
    pub const fn kind(&self) -> AssignmentKind {
        self.kind
    }

    /// The JSON document, as signed.
    #[must_use]
    pub fn document(&self) -> &[u8] {
        &self.document
    }

    /// SHA-256 of the document.
    #[must_use]
    pub const fn digest(&self) -> &Digest {
        &self.digest
    }

    /// The coordinator's signature.
    #[must_use]
    pub const fn signature(&self) -> &[u8; SIGNATURE_BYTES] {
        &self.signature
    }
}

/// A contract offered for admission, with the agent's signing key bound to its SPIFFE id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContractRegistration {
    /// The contract's YAML as stored.
    pub contract: Vec<u8>,
    /// The data product it promises.
    pub product: String,
    /// The agent's Ed25519 public key.
    pub signing_public_key: [u8; PUBLIC_KEY_BYTES],
    /// The agent's signature over contract digest, product, key and SPIFFE id.
    pub signature: [u8; SIGNATURE_BYTES],
}

impl ContractRegistration {
    /// Signs a registration as the agent `signer`.
    ///
    /// # Errors
    /// [`ConvertError::TooLarge`] if the contract exceeds its limit.
    pub fn sign(
        contract: Vec<u8>,
        product: String,
        signer: &SpiffeId,
        key: &Ed25519KeyPair,
    ) -> Result<Self, ConvertError> {
        if contract.len() > MAX_CONTRACT_BYTES {
            let got = contract.len();
            return Err(ConvertError::TooLarge { field: "contract", got, max: MAX_CONTRACT_BYTES });
        }
        let signing_public_key = crate::signing::public_key(key);
        let contract_digest = sha256(&contract);
        let statement = Statement::Registration {
            agent: signer,
            product: &product,
            contract_digest: &contract_digest,
            public_key: &signing_public_key,
        };
        let signature = statement.sign(key);
        Ok(Self { contract, product, signing_public_key, signature })
    }

    /// Checks that the key it carries signed it for this peer.
    ///
    /// # Errors
    /// [`SignatureError`] if not.
    pub fn verify(&self, peer: &SpiffeId) -> Result<(), SignatureError> {
        Statement::Registration {
            agent: peer,
            product: &self.product,
            contract_digest: &self.contract_digest(),
            public_key: &self.signing_public_key,
        }
        .verify(&self.signing_public_key, &self.signature)
    }

    /// SHA-256 of the contract as stored.
    #[must_use]
    pub fn contract_digest(&self) -> Digest {
        sha256(&self.contract)
    }
}

/// Why a contract was not admitted: codes only, the words stay with the coordinator's operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum AdmissionRefusal {
    /// The contract does not parse.
    ContractUnreadable,
    /// The contract breaks its schema or a cross-field rule.
    ContractInvalid,
    /// The contract names another product than the registration.
    ProductMismatch,
    /// The contract names another domain than the certificate.
    DomainMismatch,
    /// The registration's signature does not verify.
    Signature,
    /// Policy does not allow it.
    Policy,
    /// Features lack bounds, types or ids that a release needs.
    Features,
    /// The declared budget is missing or unusable.
    Budget,
    /// Another agent owns the product.
    OwnedByOther,
    /// The agent is known with another signing key.
    KeyChanged,
}

/// The answer to a registration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Admission {
    /// Whether the product takes part.
    pub admitted: bool,
    /// Why not; empty if admitted.
    pub refusals: Vec<AdmissionRefusal>,
    /// SHA-256 of the contract that was judged.
    pub contract_digest: Digest,
}

/// A received vector of noised integers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Submission {
    /// The assignment it answers.
    pub assignment_id: Id,
    /// Digest of the plan it belongs to.
    pub plan_digest: Digest,
    /// Stage of a release or number of a round.
    pub stage_or_round: u32,
    /// Attempt of that stage or round; a new attempt is a new debit.
    pub attempt: u32,
    /// Little-endian 64-bit integers; a multiple of eight bytes.
    pub payload: Vec<u8>,
    /// SHA-256 of the payload, checked.
    pub payload_digest: Digest,
    /// Hash of the ledger entry that committed this payload.
    pub ledger_entry_hash: Digest,
}

impl Submission {
    /// The vector.
    #[must_use]
    pub fn coordinates(&self) -> Vec<i64> {
        self.payload.as_chunks::<8>().0.iter().map(|chunk| i64::from_le_bytes(*chunk)).collect()
    }
}

/// An answer that is a document: to a step of a secure sum, or to a checkpoint; the document's crate owns its meaning.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DocumentAnswer {
    /// The assignment it answers.
    pub assignment_id: Id,
    /// JSON: keys, sealed shares, a signature, a cosigned note.
    pub document: Vec<u8>,
    /// SHA-256 of the document, checked.
    pub digest: Digest,
}

impl DocumentAnswer {
    /// Names a document by its digest.
    #[must_use]
    pub fn new(assignment_id: Id, document: Vec<u8>) -> Self {
        let digest = sha256(&document);
        Self { assignment_id, document, digest }
    }
}

/// What a submission answers; the part of it that holds no data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubmissionTarget {
    /// The assignment it answers.
    pub assignment_id: Id,
    /// Digest of the plan it belongs to.
    pub plan_digest: Digest,
    /// Stage of a release or number of a round.
    pub stage_or_round: u32,
    /// Attempt of that stage or round.
    pub attempt: u32,
}

/// Durable acceptance; a repeated request gets the same receipt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Receipt {
    /// Name of the acceptance.
    pub receipt_id: Id,
    /// Digest of what was accepted: a payload's digest, or the hash of a statement's last entry.
    pub digest: Digest,
    /// When it was accepted, UTC milliseconds since 1970, by the coordinator's clock.
    pub accepted_ms: i64,
}

/// One entry of a mirrored ledger; its hash is checked against its neighbours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChainedEntry {
    /// Position in the ledger, from 0.
    pub seq: u64,
    /// Hash of the entry before, 32 zero bytes for the first.
    pub prev: Digest,
    /// The entry's bytes as stored.
    pub payload: Vec<u8>,
}

impl From<&tabmesh_privacy::ledger::ChainedEntry> for ChainedEntry {
    fn from(entry: &tabmesh_privacy::ledger::ChainedEntry) -> Self {
        Self { seq: entry.seq, prev: entry.prev, payload: entry.payload.clone() }
    }
}

impl ChainedEntry {
    /// `SHA-256(prev ‖ payload)`.
    #[must_use]
    pub fn hash(&self) -> Digest {
        let mut context = ring::digest::Context::new(&ring::digest::SHA256);
        context.update(&self.prev);
        context.update(&self.payload);
        let mut hash = [0; 32];
        hash.copy_from_slice(context.finish().as_ref());
        hash
    }
}

/// A contiguous piece of a product's ledger with the agent's signature over its last entry; never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LedgerStatement {
    pub(crate) product: String,
    pub(crate) entries: Vec<ChainedEntry>,
    pub(crate) head_signature: [u8; SIGNATURE_BYTES],
}

impl LedgerStatement {
    /// Signs a piece of a ledger as the agent `signer`.
    ///
    /// # Errors
    /// [`ConvertError`] if it is empty, too large or its entries don't chain.
    pub fn sign(
        product: String,
        entries: Vec<ChainedEntry>,
        signer: &SpiffeId,
        key: &Ed25519KeyPair,
    ) -> Result<Self, ConvertError> {
        let (seq, hash) = crate::convert::check_chain(&entries)?;
        let statement = Statement::LedgerHead { agent: signer, seq, hash: &hash };
        let head_signature = statement.sign(key);
        Ok(Self { product, entries, head_signature })
    }

    /// Checks the signature of the agent `signer` with its registered key.
    ///
    /// # Errors
    /// [`SignatureError`] if it is not that agent's signature over the last entry.
    pub fn verify(&self, signer: &SpiffeId, key: &[u8; PUBLIC_KEY_BYTES]) -> Result<(), SignatureError> {
        let (seq, hash) = self.head().ok_or(SignatureError)?;
        let statement = Statement::LedgerHead { agent: signer, seq, hash: &hash };
        statement.verify(key, &self.head_signature)
    }

    /// The data product.
    #[must_use]
    pub fn product(&self) -> &str {
        &self.product
    }

    /// The entries, in order and chained.
    #[must_use]
    pub fn entries(&self) -> &[ChainedEntry] {
        &self.entries
    }

    /// Sequence number and hash of the last entry.
    #[must_use]
    pub fn head(&self) -> Option<(u64, Digest)> {
        self.entries.last().map(|entry| (entry.seq, entry.hash()))
    }

    /// The agent's signature over the last entry.
    #[must_use]
    pub const fn head_signature(&self) -> &[u8; SIGNATURE_BYTES] {
        &self.head_signature
    }
}

/// A request for a blob from an offset on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobRequest {
    /// SHA-256 of the whole blob.
    pub digest: Digest,
    /// First byte wanted.
    pub offset: u64,
}

/// A piece of a blob or of a report's input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobChunk {
    /// Position of the first byte.
    pub offset: u64,
    /// Length of the whole.
    pub total_bytes: u64,
    /// The bytes; at most [`crate::limits::MAX_CHUNK_BYTES`].
    pub data: Vec<u8>,
}

/// One remark about a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlanFinding {
    /// Where in the plan, as a dotted path.
    pub path: String,
    /// What is wrong and what to do.
    pub text: String,
}

/// The answer to a plan's validation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlanValidation {
    /// Whether it could be submitted as it is.
    pub valid: bool,
    /// Remarks; errors if not valid, hints otherwise.
    pub findings: Vec<PlanFinding>,
}

/// A plan's state.
#[derive(Debug, Clone, PartialEq)]
pub struct PlanSummary {
    /// Its identifier.
    pub plan_id: Id,
    /// Its name, for people.
    pub name: String,
    /// Its phase.
    pub phase: String,
    /// Fraction done, 0 to 1.
    pub progress: f64,
    /// When it was submitted, UTC milliseconds since 1970.
    pub created_ms: i64,
    /// When its state last changed, UTC milliseconds since 1970.
    pub updated_ms: i64,
    /// JSON of the coordinator's full record; may be empty in lists.
    pub document: Vec<u8>,
}

/// A step in a plan's life.
#[derive(Debug, Clone, PartialEq)]
pub struct PlanEvent {
    /// Position among the plan's events, from 1.
    pub seq: u64,
    /// When it happened, UTC milliseconds since 1970.
    pub time_ms: i64,
    /// Phase after it.
    pub phase: String,
    /// What happened, for people.
    pub detail: String,
    /// Fraction done, 0 to 1.
    pub progress: f64,
}

/// An agent as the coordinator knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgentSummary {
    /// Its identity.
    pub spiffe_id: SpiffeId,
    /// Whether it has a session now.
    pub connected: bool,
    /// Version of its build.
    pub product_version: String,
    /// When a frame last arrived, UTC milliseconds since 1970; 0 if never.
    pub last_seen_ms: i64,
    /// Its admitted data products.
    pub products: Vec<String>,
}

/// The coordinator's state as compliance sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditStatus {
    /// Version of the coordinator's build.
    pub coordinator_version: String,
    /// Entries of the audit log.
    pub audit_entries: u64,
    /// Chain hash of its last entry.
    pub audit_head: Digest,
    /// Admitted data products.
    pub products: u32,
    /// Plans, finished ones included.
    pub plans: u32,
}

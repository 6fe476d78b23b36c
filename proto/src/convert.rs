//! Protobuf messages into checked types and back: parse, don't validate.
//!
//! Refuses missing parts, unknown enum values, wrong lengths, vectors that are not whole 64-bit integers, digests that
//! don't match, ledger pieces that don't chain, texts and lists above their limits, and fractions outside 0 to 1. Each
//! refusal has a name and stays local; the peer sees a [`WireError`].

use std::time::Duration;

use crate::{
    identity::IdentityError,
    limits,
    message::{
        Admission, AdmissionRefusal, AgentFrame, AgentSummary, Assignment, AssignmentKind, AssignmentRefusal,
        AuditStatus, BlobChunk, BlobRequest, ChainedEntry, ContractRegistration, CoordinatorFrame, Digest,
        DocumentAnswer, GoodbyeReason, Hello, LedgerStatement, PlanEvent, PlanFinding, PlanSummary,
        PlanValidation, Receipt, Submission, Welcome, sha256,
    },
    pb,
    status::WireError,
};

/// Why a message does not parse.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConvertError {
    /// A part that must be there is not.
    #[error("{field} is missing")]
    Missing {
        /// The part.
        field: &'static str,
    },
    /// A fixed-size part has another size.
    #[error("{field} has {got} bytes: expected {expected}")]
    Length {
        /// The part.
        field: &'static str,
        /// Bytes it must have.
        expected: usize,
        /// Bytes it has.
        got: usize,
    },
    /// A part exceeds its limit; bytes, or items of a list.
    #[error("{field} of size {got} refused: at most {max}")]
    TooLarge {
        /// The part.
        field: &'static str,
        /// Its size.
        got: usize,
        /// Largest size accepted.
        max: usize,
    },
    /// A vector's bytes are not a multiple of eight.
    #[error("{field} of {got} bytes is not a vector of 64-bit integers")]
    NotAVector {
        /// The part.
        field: &'static str,
        /// Its bytes.
        got: usize,
    },
    /// A text breaks its form.
    #[error("{field} refused: expected {expected}")]
    Text {
        /// The part.
        field: &'static str,
        /// The form it must have.
        expected: &'static str,
    },
    /// An enum has a value this build does not know.
    #[error("{field} has unknown value {got}")]
    UnknownValue {
        /// The part.
        field: &'static str,
        /// The number found.
        got: i32,
    },
    /// A number lies outside its range.
    #[error("{field} out of range: expected {expected}")]
    Range {
        /// The part.
        field: &'static str,
        /// The range.
        expected: &'static str,
    },
    /// Bytes don't hash to the digest that came with them.
    #[error("{field} does not match its digest")]
    DigestMismatch {
        /// The part that was hashed.
        field: &'static str,
    },
    /// A ledger entry does not continue the one before.
    #[error("ledger entry {seq} does not continue the entry before it")]
    ChainBroken {
        /// The entry's sequence number.
        seq: u64,
    },
    /// A SPIFFE id does not parse.
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

impl From<&ConvertError> for WireError {
    fn from(error: &ConvertError) -> Self {
        match error {
            ConvertError::TooLarge { .. } => Self::TooLarge,
            ConvertError::DigestMismatch { .. } => Self::DigestMismatch,
            ConvertError::ChainBroken { .. } => Self::LedgerBroken,
            _ => Self::Malformed,
        }
    }
}

type Result<T> = std::result::Result<T, ConvertError>;

fn at_most(field: &'static str, got: usize, max: usize) -> Result<()> {
    if got > max { Err(ConvertError::TooLarge { field, got, max }) } else { Ok(()) }
}

fn bytes(field: &'static str, value: Vec<u8>, max: usize) -> Result<Vec<u8>> {
    at_most(field, value.len(), max)?;
    Ok(value)
}

fn array<const N: usize>(field: &'static str, value: &[u8]) -> Result<[u8; N]> {
    value.try_into().map_err(|_| ConvertError::Length { field, expected: N, got: value.len() })
}

fn name(field: &'static str, value: String) -> Result<String> {
    at_most(field, value.len(), limits::MAX_NAME_BYTES)?;
    if value.is_empty() || value.chars().any(char::is_control) {
        return Err(ConvertError::Text { field, expected: "text without control characters" });
    }
    Ok(value)
}

fn text(field: &'static str, value: String) -> Result<String> {
    at_most(field, value.len(), limits::MAX_TEXT_BYTES)?;
    if value.chars().any(|c| c.is_control() && c != '\n') {
        return Err(ConvertError::Text { field, expected: "text without control characters" });
    }
    Ok(value)
}

fn fraction(field: &'static str, value: f64) -> Result<f64> {
    if (0.0..=1.0).contains(&value) {
        Ok(value)
    } else {
        Err(ConvertError::Range { field, expected: "0 to 1" })
    }
}

fn list<A, B>(
    field: &'static str,
    max: usize,
    items: Vec<A>,
    parse: impl Fn(A) -> Result<B>,
) -> Result<Vec<B>> {
    at_most(field, items.len(), max)?;
    items.into_iter().map(parse).collect()
}

/// Checks that entries are contiguous and chained, within limits; returns the last one's place.
pub(crate) fn check_chain(entries: &[ChainedEntry]) -> Result<(u64, Digest)> {
    at_most("entries", entries.len(), limits::MAX_LEDGER_ENTRIES)?;
    let total = entries.iter().map(|entry| entry.payload.len()).sum();
    at_most("statement", total, limits::MAX_LEDGER_STATEMENT_BYTES)?;
    let mut last: Option<(u64, Digest)> = None;
    for entry in entries {
        at_most("entry", entry.payload.len(), limits::MAX_LEDGER_ENTRY_BYTES)?;
        let continues = match last {
            Some((seq, hash)) => seq.checked_add(1) == Some(entry.seq) && entry.prev == hash,
            None => entry.seq > 0 || entry.prev == [0; 32],
        };
        if !continues {
            return Err(ConvertError::ChainBroken { seq: entry.seq });
        }
        last = Some((entry.seq, entry.hash()));
    }
    last.ok_or(ConvertError::Missing { field: "entries" })
}

impl TryFrom<pb::Hello> for Hello {
    type Error = ConvertError;

    fn try_from(hello: pb::Hello) -> Result<Self> {
        let product_version = name("product_version", hello.product_version)?;
        Ok(Self { protocol_version: hello.protocol_version, product_version })
    }
}

impl From<Hello> for pb::Hello {
    fn from(hello: Hello) -> Self {
        Self { protocol_version: hello.protocol_version, product_version: hello.product_version }
    }
}

/// The first frame of a session.
pub(crate) fn hello(frame: pb::AgentFrame) -> Result<Hello> {
    match frame.frame {
        Some(pb::agent_frame::Frame::Hello(hello)) => hello.try_into(),
        _ => Err(ConvertError::Missing { field: "hello" }),
    }
}

impl TryFrom<pb::AgentFrame> for AgentFrame {
    type Error = ConvertError;

    fn try_from(frame: pb::AgentFrame) -> Result<Self> {
        use pb::agent_frame::Frame;
        match frame.frame.ok_or(ConvertError::Missing { field: "frame" })? {
            Frame::Heartbeat(pb::Heartbeat {}) => Ok(Self::Heartbeat),
            Frame::ArtefactReceived(received) => {
                Ok(Self::ArtefactReceived { assignment_id: received.assignment_id.parse()? })
            }
            Frame::AssignmentRefused(refused) => Ok(Self::AssignmentRefused {
                assignment_id: refused.assignment_id.parse()?,
                code: assignment_refusal(refused.code)?,
            }),
            Frame::Hello(_) => {
                Err(ConvertError::Text { field: "frame", expected: "one hello, as first frame" })
            }
        }
    }
}

impl From<AgentFrame> for pb::AgentFrame {
    fn from(frame: AgentFrame) -> Self {
        use pb::agent_frame::Frame;
        let frame = match frame {
            AgentFrame::Heartbeat => Frame::Heartbeat(pb::Heartbeat {}),
            AgentFrame::ArtefactReceived { assignment_id } => {
                Frame::ArtefactReceived(pb::ArtefactReceived { assignment_id: assignment_id.to_string() })
            }
            AgentFrame::AssignmentRefused { assignment_id, code } => {
                let (assignment_id, code) =
                    (assignment_id.to_string(), pb::AssignmentRefusal::from(code).into());
                Frame::AssignmentRefused(pb::AssignmentRefused { assignment_id, code })
            }
        };
        Self { frame: Some(frame) }
    }
}

/// The first answer of a session.
pub(crate) fn welcome(frame: pb::CoordinatorFrame) -> Result<Welcome> {
    let Some(pb::coordinator_frame::Frame::Welcome(welcome)) = frame.frame else {
        return Err(ConvertError::Missing { field: "welcome" });
    };
    let heartbeat_interval = Duration::from_millis(welcome.heartbeat_interval_ms.into());
    if !(limits::MIN_HEARTBEAT_INTERVAL..=limits::MAX_HEARTBEAT_INTERVAL).contains(&heartbeat_interval) {
        return Err(ConvertError::Range { field: "heartbeat_interval_ms", expected: "10 ms to 1 h" });
    }
    Ok(Welcome {
        session_id: welcome.session_id.parse()?,
        protocol_version: welcome.protocol_version,
        heartbeat_interval,
    })
}

impl From<Welcome> for pb::CoordinatorFrame {
    fn from(welcome: Welcome) -> Self {
        let interval = welcome.heartbeat_interval.min(limits::MAX_HEARTBEAT_INTERVAL).as_millis();
        let welcome = pb::Welcome {
            session_id: welcome.session_id.to_string(),
            protocol_version: welcome.protocol_version,
            heartbeat_interval_ms: u32::try_from(interval).unwrap_or(u32::MAX),
        };
        Self { frame: Some(pb::coordinator_frame::Frame::Welcome(welcome)) }
    }
}

impl TryFrom<pb::CoordinatorFrame> for CoordinatorFrame {
    type Error = ConvertError;

    fn try_from(frame: pb::CoordinatorFrame) -> Result<Self> {
        use pb::coordinator_frame::Frame;
        match frame.frame.ok_or(ConvertError::Missing { field: "frame" })? {
            Frame::Assignment(assignment) => Ok(Self::Assignment(assignment.try_into()?)),
            Frame::HeartbeatAck(pb::HeartbeatAck {}) => Ok(Self::HeartbeatAck),
            Frame::Goodbye(goodbye) => Ok(Self::Goodbye(goodbye_reason(goodbye.reason)?)),
            Frame::Welcome(_) => {
                Err(ConvertError::Text { field: "frame", expected: "one welcome, as first frame" })
            }
        }
    }
}

impl From<CoordinatorFrame> for pb::CoordinatorFrame {
    fn from(frame: CoordinatorFrame) -> Self {
        use pb::coordinator_frame::Frame;
        let frame = match frame {
            CoordinatorFrame::Assignment(assignment) => Frame::Assignment(assignment.into()),
            CoordinatorFrame::HeartbeatAck => Frame::HeartbeatAck(pb::HeartbeatAck {}),
            CoordinatorFrame::Goodbye(reason) => {
                Frame::Goodbye(pb::Goodbye { reason: pb::GoodbyeReason::from(reason).into() })
            }
        };
        Self { frame: Some(frame) }
    }
}

/// Maps a closed domain enum onto its protobuf twin, both ways.
macro_rules! twin_enum {
    ($parse:ident, $field:literal, $domain:ident, $twin:ident, { $($variant:ident),* $(,)? }) => {
        fn $parse(value: i32) -> Result<$domain> {
            match pb::$twin::try_from(value) {
                $(Ok(pb::$twin::$variant) => Ok($domain::$variant),)*
                Ok(pb::$twin::Unspecified) | Err(_) => Err(ConvertError::UnknownValue { field: $field, got: value }),
            }
        }

        impl From<$domain> for pb::$twin {
            fn from(value: $domain) -> Self {
                match value {
                    $($domain::$variant => Self::$variant,)*
                }
            }
        }
    };
}

twin_enum!(goodbye_reason, "reason", GoodbyeReason, GoodbyeReason, {
    ShuttingDown, Superseded, Revoked, HeartbeatMissed, Protocol,
});
twin_enum!(assignment_kind, "kind", AssignmentKind, AssignmentKind, {
    ReleaseQuery, Round, Publish, ClosePlan, Plan, SecureSum, Witness,
});
twin_enum!(admission_refusal, "refusals", AdmissionRefusal, AdmissionRefusal, {
    ContractUnreadable, ContractInvalid, ProductMismatch, DomainMismatch, Signature, Policy, Features, Budget,
    OwnedByOther, KeyChanged,
});
twin_enum!(assignment_refusal, "code", AssignmentRefusal, AssignmentRefusal, {
    Budget, Contract, Policy, Cohort, Confidential, Reproducible,
});

impl TryFrom<pb::Assignment> for Assignment {
    type Error = ConvertError;

    fn try_from(assignment: pb::Assignment) -> Result<Self> {
        let document = bytes("document", assignment.document, limits::MAX_DOCUMENT_BYTES)?;
        let digest = array("digest", &assignment.digest)?;
        if sha256(&document) != digest {
            return Err(ConvertError::DigestMismatch { field: "document" });
        }
        Ok(Self {
            id: assignment.assignment_id.parse()?,
            kind: assignment_kind(assignment.kind)?,
            document,
            digest,
            signature: array("signature", &assignment.signature)?,
        })
    }
}

impl From<Assignment> for pb::Assignment {
    fn from(assignment: Assignment) -> Self {
        Self {
            assignment_id: assignment.id.to_string(),
            kind: pb::AssignmentKind::from(assignment.kind).into(),
            document: assignment.document,
            digest: assignment.digest.to_vec(),
            signature: assignment.signature.to_vec(),
        }
    }
}

impl TryFrom<pb::ContractRegistration> for ContractRegistration {
    type Error = ConvertError;

    fn try_from(registration: pb::ContractRegistration) -> Result<Self> {
        Ok(Self {
            contract: bytes("contract", registration.contract, limits::MAX_CONTRACT_BYTES)?,
            product: name("product", registration.product)?,
            signing_public_key: array("signing_public_key", &registration.signing_public_key)?,
            signature: array("signature", &registration.signature)?,
        })
    }
}

impl From<ContractRegistration> for pb::ContractRegistration {
    fn from(registration: ContractRegistration) -> Self {
        Self {
            contract: registration.contract,
            product: registration.product,
            signing_public_key: registration.signing_public_key.to_vec(),
            signature: registration.signature.to_vec(),
        }
    }
}

impl TryFrom<pb::Admission> for Admission {
    type Error = ConvertError;

    fn try_from(admission: pb::Admission) -> Result<Self> {
        let max = limits::MAX_ADMISSION_REFUSALS;
        let refusals = list("refusals", max, admission.refusals, admission_refusal)?;
        if admission.admitted != refusals.is_empty() {
            return Err(ConvertError::Text { field: "refusals", expected: "some exactly if not admitted" });
        }
        let contract_digest = array("contract_digest", &admission.contract_digest)?;
        Ok(Self { admitted: admission.admitted, refusals, contract_digest })
    }
}

impl From<Admission> for pb::Admission {
    fn from(admission: Admission) -> Self {
        let refusals = admission.refusals.into_iter();
        Self {
            admitted: admission.admitted,
            refusals: refusals.map(|refusal| pb::AdmissionRefusal::from(refusal).into()).collect(),
            contract_digest: admission.contract_digest.to_vec(),
        }
    }
}

impl TryFrom<pb::Submission> for Submission {
    type Error = ConvertError;

    fn try_from(submission: pb::Submission) -> Result<Self> {
        let payload = bytes("payload", submission.payload, limits::MAX_PAYLOAD_BYTES)?;
        if payload.is_empty() {
            return Err(ConvertError::Missing { field: "payload" });
        }
        if !payload.len().is_multiple_of(8) {
            return Err(ConvertError::NotAVector { field: "payload", got: payload.len() });
        }
        let payload_digest = array("payload_digest", &submission.payload_digest)?;
        if sha256(&payload) != payload_digest {
            return Err(ConvertError::DigestMismatch { field: "payload" });
        }
        Ok(Self {
            assignment_id: submission.assignment_id.parse()?,
            plan_digest: array("plan_digest", &submission.plan_digest)?,
            stage_or_round: submission.stage_or_round,
            attempt: submission.attempt,
            payload,
            payload_digest,
            ledger_entry_hash: array("ledger_entry_hash", &submission.ledger_entry_hash)?,
        })
    }
}

impl TryFrom<pb::DocumentAnswer> for DocumentAnswer {
    type Error = ConvertError;

    fn try_from(answer: pb::DocumentAnswer) -> Result<Self> {
        let document = bytes("document", answer.document, limits::MAX_DOCUMENT_ANSWER_BYTES)?;
        let digest = array("digest", &answer.digest)?;
        if sha256(&document) != digest {
            return Err(ConvertError::DigestMismatch { field: "document" });
        }
        Ok(Self { assignment_id: answer.assignment_id.parse()?, document, digest })
    }
}

impl From<DocumentAnswer> for pb::DocumentAnswer {
    fn from(answer: DocumentAnswer) -> Self {
        let assignment_id = answer.assignment_id.to_string();
        Self { assignment_id, document: answer.document, digest: answer.digest.to_vec() }
    }
}

impl TryFrom<pb::Receipt> for Receipt {
    type Error = ConvertError;

    fn try_from(receipt: pb::Receipt) -> Result<Self> {
        Ok(Self {
            receipt_id: receipt.receipt_id.parse()?,
            digest: array("digest", &receipt.digest)?,
            accepted_ms: receipt.accepted_ms,
        })
    }
}

impl From<Receipt> for pb::Receipt {
    fn from(receipt: Receipt) -> Self {
        Self {
            receipt_id: receipt.receipt_id.to_string(),
            digest: receipt.digest.to_vec(),
            accepted_ms: receipt.accepted_ms,
        }
    }
}

impl TryFrom<pb::LedgerStatement> for LedgerStatement {
    type Error = ConvertError;

    fn try_from(statement: pb::LedgerStatement) -> Result<Self> {
        let entries = list("entries", limits::MAX_LEDGER_ENTRIES, statement.entries, |entry| {
            let prev = array("prev", &entry.prev)?;
            Ok(ChainedEntry { seq: entry.seq, prev, payload: entry.payload })
        })?;
        check_chain(&entries)?;
        let head_signature = array("head_signature", &statement.head_signature)?;
        Ok(Self { product: name("product", statement.product)?, entries, head_signature })
    }
}

impl From<LedgerStatement> for pb::LedgerStatement {
    fn from(statement: LedgerStatement) -> Self {
        let entries = statement.entries.into_iter().map(|entry| pb::ChainedEntry {
            seq: entry.seq,
            prev: entry.prev.to_vec(),
            payload: entry.payload,
        });
        Self {
            product: statement.product,
            entries: entries.collect(),
            head_signature: statement.head_signature.to_vec(),
        }
    }
}

impl TryFrom<pb::BlobRequest> for BlobRequest {
    type Error = ConvertError;

    fn try_from(request: pb::BlobRequest) -> Result<Self> {
        if request.offset > limits::MAX_BLOB_BYTES {
            return Err(ConvertError::Range { field: "offset", expected: "at most the largest blob" });
        }
        Ok(Self { digest: array("digest", &request.digest)?, offset: request.offset })
    }
}

impl TryFrom<pb::BlobChunk> for BlobChunk {
    type Error = ConvertError;

    fn try_from(chunk: pb::BlobChunk) -> Result<Self> {
        let data = bytes("data", chunk.data, limits::MAX_CHUNK_BYTES)?;
        let end = chunk.offset.checked_add(data.len() as u64);
        if chunk.total_bytes > limits::MAX_BLOB_BYTES || end.is_none_or(|end| end > chunk.total_bytes) {
            return Err(ConvertError::Range { field: "offset", expected: "a chunk within its blob" });
        }
        Ok(Self { offset: chunk.offset, total_bytes: chunk.total_bytes, data })
    }
}

impl From<BlobChunk> for pb::BlobChunk {
    fn from(chunk: BlobChunk) -> Self {
        Self { offset: chunk.offset, total_bytes: chunk.total_bytes, data: chunk.data }
    }
}

/// A plan's YAML; its text is the coordinator's to parse.
pub(crate) fn plan_yaml(document: pb::PlanDocument) -> Result<Vec<u8>> {
    bytes("yaml", document.yaml, limits::MAX_PLAN_BYTES)
}

/// The product of a report request; nothing means all.
pub(crate) fn report_product(request: pb::ReportRequest) -> Result<Option<String>> {
    if request.product.is_empty() { Ok(None) } else { name("product", request.product).map(Some) }
}

impl TryFrom<pb::PlanValidation> for PlanValidation {
    type Error = ConvertError;

    fn try_from(validation: pb::PlanValidation) -> Result<Self> {
        let findings = list("findings", limits::MAX_LIST_ITEMS, validation.findings, |finding| {
            Ok(PlanFinding { path: text("path", finding.path)?, text: text("text", finding.text)? })
        })?;
        Ok(Self { valid: validation.valid, findings })
    }
}

impl From<PlanValidation> for pb::PlanValidation {
    fn from(validation: PlanValidation) -> Self {
        let findings = validation.findings.into_iter();
        Self {
            valid: validation.valid,
            findings: findings
                .map(|finding| pb::PlanFinding { path: finding.path, text: finding.text })
                .collect(),
        }
    }
}

impl TryFrom<pb::PlanSummary> for PlanSummary {
    type Error = ConvertError;

    fn try_from(plan: pb::PlanSummary) -> Result<Self> {
        Ok(Self {
            plan_id: plan.plan_id.parse()?,
            name: name("name", plan.name)?,
            phase: name("phase", plan.phase)?,
            progress: fraction("progress", plan.progress)?,
            created_ms: plan.created_ms,
            updated_ms: plan.updated_ms,
            document: bytes("document", plan.document, limits::MAX_DOCUMENT_BYTES)?,
        })
    }
}

impl From<PlanSummary> for pb::PlanSummary {
    fn from(plan: PlanSummary) -> Self {
        Self {
            plan_id: plan.plan_id.to_string(),
            name: plan.name,
            phase: plan.phase,
            progress: plan.progress,
            created_ms: plan.created_ms,
            updated_ms: plan.updated_ms,
            document: plan.document,
        }
    }
}

impl TryFrom<pb::PlanEvent> for PlanEvent {
    type Error = ConvertError;

    fn try_from(event: pb::PlanEvent) -> Result<Self> {
        Ok(Self {
            seq: event.seq,
            time_ms: event.time_ms,
            phase: name("phase", event.phase)?,
            detail: text("detail", event.detail)?,
            progress: fraction("progress", event.progress)?,
        })
    }
}

impl From<PlanEvent> for pb::PlanEvent {
    fn from(event: PlanEvent) -> Self {
        Self {
            seq: event.seq,
            time_ms: event.time_ms,
            phase: event.phase,
            detail: event.detail,
            progress: event.progress,
        }
    }
}

/// A list of plans.
pub(crate) fn plans(answer: pb::PlanList) -> Result<Vec<PlanSummary>> {
    list("plans", limits::MAX_LIST_ITEMS, answer.plans, PlanSummary::try_from)
}

/// A list of agents.
pub(crate) fn agents(answer: pb::AgentList) -> Result<Vec<AgentSummary>> {
    list("agents", limits::MAX_LIST_ITEMS, answer.agents, AgentSummary::try_from)
}

impl TryFrom<pb::AgentSummary> for AgentSummary {
    type Error = ConvertError;

    fn try_from(agent: pb::AgentSummary) -> Result<Self> {
        Ok(Self {
            spiffe_id: agent.spiffe_id.parse()?,
            connected: agent.connected,
            product_version: text("product_version", agent.product_version)?,
            last_seen_ms: agent.last_seen_ms,
            products: list("products", limits::MAX_LIST_ITEMS, agent.products, |product| {
                name("product", product)
            })?,
        })
    }
}

impl From<AgentSummary> for pb::AgentSummary {
    fn from(agent: AgentSummary) -> Self {
        Self {
            spiffe_id: agent.spiffe_id.to_string(),
            connected: agent.connected,
            product_version: agent.product_version,
            last_seen_ms: agent.last_seen_ms,
            products: agent.products,
        }
    }
}

impl TryFrom<pb::AuditStatus> for AuditStatus {
    type Error = ConvertError;

    fn try_from(status: pb::AuditStatus) -> Result<Self> {
        Ok(Self {
            coordinator_version: name("coordinator_version", status.coordinator_version)?,
            audit_entries: status.audit_entries,
            audit_head: array("audit_head", &status.audit_head)?,
            products: status.products,
            plans: status.plans,
        })
    }
}

impl From<AuditStatus> for pb::AuditStatus {
    fn from(status: AuditStatus) -> Self {
        Self {
            coordinator_version: status.coordinator_version,
            audit_entries: status.audit_entries,
            audit_head: status.audit_head.to_vec(),
            products: status.products,
            plans: status.plans,
        }
    }
}

#[cfg(test)]
mod tests;

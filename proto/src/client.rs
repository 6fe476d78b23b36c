//! What agents, operators and auditors call.
//!
//! [`MeshClient::submit_release`] and [`MeshClient::submit_update`] are the only ways to send bytes that depend on
//! table rows, masked vectors of secure sums among them. They take noised bytes as [`Private`], never a bare vector, together with the receipt of the ledger
//! entry that was made durable for exactly these bytes, and refuse if the digests differ. A retry calls them again
//! with the same stored bytes and the same receipt; it spends nothing.

use std::{fmt::Display, future::Future, time::Duration};

use tabmesh_privacy::{ledger::DebitReceipt, private::Private};
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Response, Status, Streaming, transport::Channel};

use crate::{
    connect::{ConnectError, Link},
    convert::{self, ConvertError},
    limits,
    message::{
        Admission, AgentFrame, AgentSummary, AuditStatus, BlobChunk, ContractRegistration, CoordinatorFrame,
        Digest, DocumentAnswer, Hello, Id, LedgerStatement, PlanEvent, PlanSummary, PlanValidation, Receipt,
        SubmissionTarget, Welcome,
    },
    pb,
    status::WireError,
};

/// Why a call failed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// The connection is gone and can't be opened again.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The coordinator refused.
    #[error("coordinator refused: {0}")]
    Refused(#[from] WireError),
    /// The coordinator's answer does not parse.
    #[error("answer refused: {0}")]
    Answer(#[from] ConvertError),
    /// The debit receipt was made for other bytes; nothing was sent.
    #[error("debit receipt is for another payload: nothing was sent")]
    ReceiptMismatch,
    /// The payload is not a vector of 64-bit integers within the limit; nothing was sent.
    #[error("payload of {got} bytes refused: expected a multiple of 8 from 8 to {max}, nothing was sent")]
    Payload {
        /// Its bytes.
        got: usize,
        /// Most bytes accepted.
        max: usize,
    },
    /// The coordinator acknowledged something else than what was sent.
    #[error("coordinator acknowledged another digest")]
    ForeignReceipt,
    /// The coordinator speaks another protocol version.
    #[error("protocol version mismatch: expected {expected}, got {got}")]
    ProtocolVersion {
        /// The version this build speaks.
        expected: u32,
        /// The version offered.
        got: u32,
    },
    /// A chunk does not continue where the last one ended, or the total changed.
    #[error("chunk at {got} refused: expected {expected}")]
    ChunkOrder {
        /// Where it had to begin.
        expected: u64,
        /// Where it began.
        got: u64,
    },
    /// A whole blob does not hash to its name.
    #[error("blob does not match its digest")]
    BlobDigest,
    /// The receiver of chunks failed.
    #[error("chunk could not be stored: {reason}")]
    Sink {
        /// Its reason.
        reason: String,
    },
    /// No answer in time.
    #[error("no answer in time")]
    Timeout,
    /// The session has ended.
    #[error("session has ended")]
    SessionEnded,
}

impl ClientError {
    /// Whether the same call may succeed later without any change.
    #[must_use]
    pub const fn is_retryable(&self) -> bool {
        match self {
            Self::Refused(error) => error.is_retryable(),
            Self::Timeout | Self::SessionEnded => true,
            Self::Connect(error) => matches!(
                error,
                ConnectError::Network { .. } | ConnectError::Timeout | ConnectError::Transport { .. }
            ),
            _ => false,
        }
    }
}

impl From<Status> for ClientError {
    fn from(status: Status) -> Self {
        match std::error::Error::source(&status).and_then(ConnectError::in_chain) {
            Some(error) => Self::Connect(error),
            None => Self::Refused(WireError::from(&status)),
        }
    }
}

type Result<T> = std::result::Result<T, ClientError>;

/// An agent's calls; cheap to clone.
///
/// What it submits is noised and debited, or doesn't compile:
///
/// ```
/// use tabmesh_privacy::{ledger::DebitReceipt, private::Private};
/// use tabmesh_proto::{client::MeshClient, message::SubmissionTarget};
///
/// async fn send(client: MeshClient, to: SubmissionTarget, noised: Private<Vec<u8>>, debit: DebitReceipt) {
///     let _ = client.submit_release(&to, &noised, &debit).await;
/// }
/// ```
///
/// Bytes that no mechanism has noised are refused,
///
/// ```compile_fail,E0308
/// use tabmesh_privacy::ledger::DebitReceipt;
/// use tabmesh_proto::{client::MeshClient, message::SubmissionTarget};
///
/// async fn send(client: MeshClient, to: SubmissionTarget, exact_counts: Vec<u8>, debit: DebitReceipt) {
///     let _ = client.submit_release(&to, &exact_counts, &debit).await;
/// }
/// ```
///
/// noised bytes without the receipt of their ledger entry too,
///
/// ```compile_fail,E0308
/// use tabmesh_privacy::private::Private;
/// use tabmesh_proto::{client::MeshClient, message::SubmissionTarget};
///
/// async fn send(client: MeshClient, to: SubmissionTarget, noised: Private<Vec<u8>>) {
///     let _ = client.submit_update(&to, &noised, &()).await;
/// }
/// ```
///
/// and the generated messages, through which anything could be sent, are out of reach.
///
/// ```compile_fail,E0603
/// use tabmesh_proto::pb::Submission;
/// ```
#[derive(Debug, Clone)]
pub struct MeshClient {
    inner: pb::mesh_client::MeshClient<Channel>,
}

impl MeshClient {
    /// Calls over this connection.
    #[must_use]
    pub fn new(link: Link) -> Self {
        let inner = pb::mesh_client::MeshClient::new(link.channel)
            .max_decoding_message_size(limits::MAX_ANSWER_BYTES)
            .max_encoding_message_size(limits::MAX_MESH_MESSAGE_BYTES);
        Self { inner }
    }

    /// Opens a session: hello, then the coordinator's welcome.
    ///
    /// # Errors
    /// [`ClientError::Refused`] with [`WireError::ProtocolVersion`] if the versions differ; any other refusal.
    pub async fn session(&self, product_version: &str) -> Result<AgentSession> {
        let hello =
            Hello { protocol_version: crate::PROTOCOL_VERSION, product_version: product_version.to_owned() };
        self.session_with(hello).await
    }

    /// Opens a session with a hello of one's own, for tests of version skew.
    ///
    /// # Errors
    /// As [`MeshClient::session`].
    pub async fn session_with(&self, hello: Hello) -> Result<AgentSession> {
        let (sender, receiver) = mpsc::channel(limits::SESSION_QUEUE_FRAMES);
        let first = pb::AgentFrame { frame: Some(pb::agent_frame::Frame::Hello(hello.into())) };
        sender.send(first).await.map_err(|_| ClientError::SessionEnded)?;
        let mut inner = self.inner.clone();
        let opened = timeout(limits::HELLO_TIMEOUT, inner.session(ReceiverStream::new(receiver))).await;
        let mut frames = opened.map_err(|_| ClientError::Timeout)??.into_inner();
        let first =
            timeout(limits::HELLO_TIMEOUT, frames.message()).await.map_err(|_| ClientError::Timeout)??;
        let welcome = convert::welcome(first.ok_or(ClientError::SessionEnded)?)?;
        if welcome.protocol_version != crate::PROTOCOL_VERSION {
            let got = welcome.protocol_version;
            return Err(ClientError::ProtocolVersion { expected: crate::PROTOCOL_VERSION, got });
        }
        let patience = welcome.heartbeat_interval.saturating_mul(limits::HEARTBEATS_MISSED);
        Ok(AgentSession {
            sender: SessionSender { sender, interval: welcome.heartbeat_interval },
            frames: SessionFrames { frames, patience },
            welcome,
        })
    }

    /// Offers a contract for admission.
    ///
    /// # Errors
    /// [`ClientError::ForeignReceipt`] if another contract was judged; any refusal.
    pub async fn register_contract(&self, registration: ContractRegistration) -> Result<Admission> {
        let digest = registration.contract_digest();
        let mut inner = self.inner.clone();
        let admission: Admission =
            call(inner.register_contract(pb::ContractRegistration::from(registration))).await?;
        if admission.contract_digest == digest { Ok(admission) } else { Err(ClientError::ForeignReceipt) }
    }

    /// Sends one stage of a release.
    ///
    /// # Errors
    /// [`ClientError::ReceiptMismatch`] or [`ClientError::Payload`] before anything is sent; any refusal.
    pub async fn submit_release(
        &self,
        target: &SubmissionTarget,
        payload: &Private<Vec<u8>>,
        debit: &DebitReceipt,
    ) -> Result<Receipt> {
        let submission = submission(target, payload, debit)?;
        let mut inner = self.inner.clone();
        acknowledged(call(inner.submit_release(submission)).await?, debit.payload_digest())
    }

    /// Sends one round's update.
    ///
    /// # Errors
    /// As [`MeshClient::submit_release`].
    pub async fn submit_update(
        &self,
        target: &SubmissionTarget,
        payload: &Private<Vec<u8>>,
        debit: &DebitReceipt,
    ) -> Result<Receipt> {
        let submission = submission(target, payload, debit)?;
        let mut inner = self.inner.clone();
        acknowledged(call(inner.submit_update(submission)).await?, debit.payload_digest())
    }

    /// Answers a step of a secure sum other than the masked vector, which goes the way of every noised vector.
    ///
    /// # Errors
    /// [`ClientError::Answer`] for a document above [`limits::MAX_DOCUMENT_ANSWER_BYTES`], before anything is sent; any
    /// refusal.
    pub async fn answer_sum(&self, answer: DocumentAnswer) -> Result<Receipt> {
        let (message, digest) = document(answer)?;
        let mut inner = self.inner.clone();
        acknowledged(call(inner.answer_sum(message)).await?, &digest)
    }

    /// Answers a checkpoint of the coordinator's audit log.
    ///
    /// # Errors
    /// As [`Self::answer_sum`].
    pub async fn answer_witness(&self, answer: DocumentAnswer) -> Result<Receipt> {
        let (message, digest) = document(answer)?;
        let mut inner = self.inner.clone();
        acknowledged(call(inner.answer_witness(message)).await?, &digest)
    }

    /// Mirrors a piece of the ledger.
    ///
    /// # Errors
    /// [`ClientError::Refused`] with [`WireError::LedgerBroken`] if it does not continue the mirror.
    pub async fn mirror_ledger(&self, statement: LedgerStatement) -> Result<Receipt> {
        let (_, head) = statement.head().ok_or(ConvertError::Missing { field: "entries" })?;
        let mut inner = self.inner.clone();
        acknowledged(call(inner.mirror_ledger(pb::LedgerStatement::from(statement))).await?, &head)
    }

    /// Fetches a blob from `offset` on, resuming by itself after interruptions, and returns its total length. Chunks
    /// reach `sink` in order and once. From offset 0 the digest is checked here; from another offset the caller, who
    /// holds the first part, checks it.
    ///
    /// # Errors
    /// [`ClientError::Sink`] if `sink` fails; [`ClientError::BlobDigest`] if the bytes are wrong; the last error after
    /// several interruptions without progress.
    pub async fn fetch_blob<E: Display>(
        &self,
        digest: &Digest,
        offset: u64,
        mut sink: impl FnMut(&BlobChunk) -> std::result::Result<(), E> + Send,
    ) -> Result<u64> {
        let mut transfer = Transfer {
            position: offset,
            total: None,
            hash: (offset == 0).then(|| ring::digest::Context::new(&ring::digest::SHA256)),
        };
        let mut stalled = 0;
        loop {
            let before = transfer.position;
            match self.fetch_some(digest, &mut transfer, &mut sink).await {
                Ok(total) => return transfer.finish(digest).map(|()| total),
                Err(error) if error.is_retryable() => {
                    stalled = if transfer.position > before { 0 } else { stalled + 1 };
                    if stalled > limits::MAX_STALLED_RESUMES {
                        return Err(error);
                    }
                    sleep(RESUME_PAUSE.saturating_mul(1 << stalled)).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// One connection's share of a transfer; retryable if the stream ends early.
    async fn fetch_some<E: Display>(
        &self,
        digest: &Digest,
        transfer: &mut Transfer,
        sink: &mut (impl FnMut(&BlobChunk) -> std::result::Result<(), E> + Send),
    ) -> Result<u64> {
        let mut inner = self.inner.clone();
        let request = pb::BlobRequest { digest: digest.to_vec(), offset: transfer.position };
        let opened = timeout(limits::CHUNK_TIMEOUT, inner.fetch_blob(request)).await;
        let mut chunks = opened.map_err(|_| ClientError::Timeout)??.into_inner();
        loop {
            let next = timeout(limits::CHUNK_TIMEOUT, chunks.message()).await;
            let next = next.map_err(|_| ClientError::Timeout)??;
            let chunk = BlobChunk::try_from(next.ok_or(WireError::Unavailable)?)?;
            if let Some(total) = transfer.take(chunk, sink)? {
                // Read to its end, so that whether the call is reset doesn't depend on timing; all bytes are here already.
                let _ = timeout(limits::CHUNK_TIMEOUT, chunks.message()).await;
                return Ok(total);
            }
        }
    }
}

struct Transfer {
    position: u64,
    total: Option<u64>,
    hash: Option<ring::digest::Context>,
}

impl Transfer {
    /// Takes one chunk; returns the total once all of it has arrived.
    fn take<E: Display>(
        &mut self,
        chunk: BlobChunk,
        sink: &mut impl FnMut(&BlobChunk) -> std::result::Result<(), E>,
    ) -> Result<Option<u64>> {
        let total = *self.total.get_or_insert(chunk.total_bytes);
        if chunk.offset != self.position || chunk.total_bytes != total {
            return Err(ClientError::ChunkOrder { expected: self.position, got: chunk.offset });
        }
        sink(&chunk).map_err(|error| ClientError::Sink { reason: error.to_string() })?;
        if let Some(hash) = &mut self.hash {
            hash.update(&chunk.data);
        }
        self.position += chunk.data.len() as u64;
        Ok((self.position == total).then_some(total))
    }

    fn finish(self, digest: &Digest) -> Result<()> {
        match self.hash.map(ring::digest::Context::finish) {
            Some(hash) if hash.as_ref() != digest => Err(ClientError::BlobDigest),
            _ => Ok(()),
        }
    }
}

/// An open session with its welcome.
#[derive(Debug)]
pub struct AgentSession {
    welcome: Welcome,
    sender: SessionSender,
    frames: SessionFrames,
}

impl AgentSession {
    /// What the coordinator answered to the hello.
    #[must_use]
    pub const fn welcome(&self) -> &Welcome {
        &self.welcome
    }

    /// Separates speaking from listening.
    #[must_use]
    pub fn split(self) -> (SessionSender, SessionFrames) {
        (self.sender, self.frames)
    }
}

/// The agent's voice in a session; cheap to clone. The session ends when all clones are gone.
#[derive(Debug, Clone)]
pub struct SessionSender {
    sender: mpsc::Sender<pb::AgentFrame>,
    interval: Duration,
}

impl SessionSender {
    /// Says one frame.
    ///
    /// # Errors
    /// [`ClientError::SessionEnded`] if nobody listens any more.
    pub async fn send(&self, frame: AgentFrame) -> Result<()> {
        self.sender.send(frame.into()).await.map_err(|_| ClientError::SessionEnded)
    }

    /// Says heartbeats at the interval the coordinator asked for, until the session ends. Run it beside the listener.
    pub async fn keep_alive(&self) {
        while self.send(AgentFrame::Heartbeat).await.is_ok() {
            tokio::select! {
                () = sleep(self.interval) => {}
                () = self.sender.closed() => return,
            }
        }
    }
}

/// The coordinator's voice in a session.
#[derive(Debug)]
pub struct SessionFrames {
    frames: Streaming<pb::CoordinatorFrame>,
    patience: Duration,
}

impl SessionFrames {
    /// Waits for the next frame; nothing once the coordinator has ended the session.
    ///
    /// # Errors
    /// - [`ClientError::Refused`] with [`WireError::HeartbeatMissed`] if nothing, not even an acknowledged heartbeat,
    ///   arrived for three intervals
    /// - [`ClientError::Answer`] if a frame does not parse
    /// - [`ClientError::Connect`] or [`ClientError::Refused`] if the connection breaks
    pub async fn next(&mut self) -> Result<Option<CoordinatorFrame>> {
        let next = timeout(self.patience, self.frames.message()).await;
        let frame = next.map_err(|_| WireError::HeartbeatMissed)??;
        Ok(frame.map(CoordinatorFrame::try_from).transpose()?)
    }
}

/// An operator's calls; cheap to clone.
#[derive(Debug, Clone)]
pub struct OperatorClient {
    inner: pb::operator_client::OperatorClient<Channel>,
}

impl OperatorClient {
    /// Calls over this connection.
    #[must_use]
    pub fn new(link: Link) -> Self {
        let inner = pb::operator_client::OperatorClient::new(link.channel)
            .max_decoding_message_size(limits::MAX_ANSWER_BYTES);
        Self { inner }
    }

    /// Starts a plan.
    ///
    /// # Errors
    /// Any refusal.
    pub async fn submit_plan(&self, yaml: Vec<u8>) -> Result<PlanSummary> {
        let mut inner = self.inner.clone();
        call(inner.submit_plan(pb::PlanDocument { yaml })).await
    }

    /// Checks a plan without starting it.
    ///
    /// # Errors
    /// Any refusal.
    pub async fn validate_plan(&self, yaml: Vec<u8>) -> Result<PlanValidation> {
        let mut inner = self.inner.clone();
        call(inner.validate_plan(pb::PlanDocument { yaml })).await
    }

    /// Describes a plan.
    ///
    /// # Errors
    /// [`WireError::NotFound`] if there is none; any other refusal.
    pub async fn plan_status(&self, plan_id: &Id) -> Result<PlanSummary> {
        let mut inner = self.inner.clone();
        call(inner.plan_status(pb::PlanRequest { plan_id: plan_id.to_string() })).await
    }

    /// Follows a plan's events after `after_seq` (0 for all) until it is over.
    ///
    /// # Errors
    /// As [`OperatorClient::plan_status`].
    pub async fn watch_plan(&self, plan_id: &Id, after_seq: u64) -> Result<PlanEvents> {
        let mut inner = self.inner.clone();
        let request = pb::PlanWatch { plan_id: plan_id.to_string(), after_seq };
        let opened = timeout(limits::RPC_TIMEOUT, inner.watch_plan(request)).await;
        Ok(PlanEvents { events: opened.map_err(|_| ClientError::Timeout)??.into_inner() })
    }

    /// Stops a plan.
    ///
    /// # Errors
    /// As [`OperatorClient::plan_status`].
    pub async fn cancel_plan(&self, plan_id: &Id) -> Result<PlanSummary> {
        let mut inner = self.inner.clone();
        call(inner.cancel_plan(pb::PlanRequest { plan_id: plan_id.to_string() })).await
    }

    /// Lists known agents.
    ///
    /// # Errors
    /// Any refusal.
    pub async fn list_agents(&self) -> Result<Vec<AgentSummary>> {
        let mut inner = self.inner.clone();
        let answer = timely(inner.list_agents(pb::ListAgentsRequest {})).await?;
        Ok(convert::agents(answer)?)
    }

    /// Lists plans, newest first.
    ///
    /// # Errors
    /// Any refusal.
    pub async fn list_plans(&self) -> Result<Vec<PlanSummary>> {
        let mut inner = self.inner.clone();
        let answer = timely(inner.list_plans(pb::ListPlansRequest {})).await?;
        Ok(convert::plans(answer)?)
    }
}

/// A plan's events as they happen.
#[derive(Debug)]
pub struct PlanEvents {
    events: Streaming<pb::PlanEvent>,
}

impl PlanEvents {
    /// Waits for the next event; nothing once the plan is over or the server stops.
    ///
    /// # Errors
    /// Any refusal; [`ClientError::Answer`] if an event does not parse.
    pub async fn next(&mut self) -> Result<Option<PlanEvent>> {
        let event = self.events.message().await?;
        Ok(event.map(PlanEvent::try_from).transpose()?)
    }
}

/// An auditor's calls; cheap to clone.
#[derive(Debug, Clone)]
pub struct AuditorClient {
    inner: pb::auditor_client::AuditorClient<Channel>,
}

impl AuditorClient {
    /// Calls over this connection.
    #[must_use]
    pub fn new(link: Link) -> Self {
        let inner = pb::auditor_client::AuditorClient::new(link.channel)
            .max_decoding_message_size(limits::MAX_ANSWER_BYTES);
        Self { inner }
    }

    /// Fetches the JSON a report is built from, for one product or all.
    ///
    /// # Errors
    /// Any refusal; [`ClientError::ChunkOrder`] if a piece is missing.
    pub async fn report_input(&self, product: Option<&str>) -> Result<Vec<u8>> {
        let mut inner = self.inner.clone();
        let request = pb::ReportRequest { product: product.unwrap_or_default().to_owned() };
        let mut chunks = timely(inner.report_input(request)).await?;
        let mut transfer = Transfer { position: 0, total: None, hash: None };
        let mut json = Vec::new();
        let mut sink = |chunk: &BlobChunk| {
            json.extend_from_slice(&chunk.data);
            Ok::<(), std::convert::Infallible>(())
        };
        loop {
            let next = timeout(limits::CHUNK_TIMEOUT, chunks.message()).await;
            let next = next.map_err(|_| ClientError::Timeout)??;
            let chunk = BlobChunk::try_from(next.ok_or(WireError::Unavailable)?)?;
            if transfer.take(chunk, &mut sink)?.is_some() {
                return Ok(json);
            }
        }
    }

    /// The coordinator's state.
    ///
    /// # Errors
    /// Any refusal.
    pub async fn status(&self) -> Result<AuditStatus> {
        let mut inner = self.inner.clone();
        call(inner.status(pb::StatusRequest {})).await
    }
}

/// The one place where table-derived bytes become a message.
fn submission(
    target: &SubmissionTarget,
    payload: &Private<Vec<u8>>,
    debit: &DebitReceipt,
) -> Result<pb::Submission> {
    let bytes = payload.as_bytes();
    if !debit.covers(payload) {
        return Err(ClientError::ReceiptMismatch);
    }
    let (got, max) = (bytes.len(), limits::MAX_PAYLOAD_BYTES);
    if got == 0 || !got.is_multiple_of(8) || got > max {
        return Err(ClientError::Payload { got, max });
    }
    Ok(pb::Submission {
        assignment_id: target.assignment_id.to_string(),
        plan_digest: target.plan_digest.to_vec(),
        stage_or_round: target.stage_or_round,
        attempt: target.attempt,
        payload: bytes.to_vec(),
        payload_digest: debit.payload_digest().to_vec(),
        ledger_entry_hash: debit.hash().to_vec(),
    })
}

/// A document within its limit, with its digest.
fn document(answer: DocumentAnswer) -> Result<(pb::DocumentAnswer, Digest)> {
    let (got, max) = (answer.document.len(), limits::MAX_DOCUMENT_ANSWER_BYTES);
    if got > max {
        return Err(ConvertError::TooLarge { field: "document", got, max }.into());
    }
    let digest = answer.digest;
    Ok((answer.into(), digest))
}

fn acknowledged(receipt: Receipt, digest: &Digest) -> Result<Receipt> {
    if receipt.digest == *digest { Ok(receipt) } else { Err(ClientError::ForeignReceipt) }
}

async fn timely<T>(answer: impl Future<Output = std::result::Result<Response<T>, Status>>) -> Result<T> {
    let answer = timeout(limits::RPC_TIMEOUT, answer).await.map_err(|_| ClientError::Timeout)?;
    Ok(answer?.into_inner())
}

async fn call<A, B>(answer: impl Future<Output = std::result::Result<Response<A>, Status>>) -> Result<B>
where
    B: TryFrom<A, Error = ConvertError>,
{
    Ok(B::try_from(timely(answer).await?)?)
}

const RESUME_PAUSE: Duration = Duration::from_millis(100);

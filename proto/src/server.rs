//! What the coordinator implements, and the adapters that turn it into gRPC services.
//!
//! The traits speak checked types of [`crate::message`] and get the caller's verified SPIFFE id with every call; no
//! protobuf type leaks. Whether the message belongs to that caller (its domain, its product, its assignment) is the
//! implementation's to check. Streams to peers are bounded queues; a peer that does not read is dropped.

use std::{future::Future, io, pin::Pin, sync::Arc, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{Semaphore, watch},
    time::sleep,
};
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming, transport::Server};

use crate::{
    accept::{PeerIdentity, PeerStream},
    authorise::AuthoriseLayer,
    convert::{self, ConvertError},
    identity::SpiffeId,
    limits,
    message::{
        Admission, AgentFrame, AgentSummary, AuditStatus, BlobChunk, BlobRequest, ContractRegistration,
        CoordinatorFrame, DocumentAnswer, Hello, Id, LedgerStatement, PlanEvent, PlanSummary, PlanValidation,
        Receipt, Submission,
    },
    pb::{self, auditor_server::AuditorServer, mesh_server::MeshServer, operator_server::OperatorServer},
    session,
    status::WireError,
};

/// A boxed stream.
pub type BoxStream<T> = Pin<Box<dyn Stream<Item = T> + Send>>;
/// What an agent says after its hello; ends when it goes, after an error if it went in disorder.
pub type InboundFrames = BoxStream<Result<AgentFrame, WireError>>;
/// A blob or a document in pieces.
pub type ChunkStream = BoxStream<Result<BlobChunk, WireError>>;

/// What a service answers.
pub type Answer<T> = Result<T, WireError>;

/// A session the service has accepted.
pub struct OpenSession {
    /// Its name in logs on both sides.
    pub session_id: Id,
    /// How often the agent shall send a heartbeat; three missed ones end the session.
    pub heartbeat_interval: Duration,
    /// What is said to the agent; the session ends with this stream, or after a goodbye. Dropped when the agent goes.
    pub frames: BoxStream<CoordinatorFrame>,
}

/// What agents ask.
pub trait MeshService: Send + Sync + 'static {
    /// Opens a session; the hello's protocol version has been checked. Heartbeats are acknowledged for you and also
    /// appear in `inbound`.
    fn session(
        &self,
        peer: SpiffeId,
        hello: Hello,
        inbound: InboundFrames,
    ) -> impl Future<Output = Answer<OpenSession>> + Send;

    /// Judges a contract.
    fn register_contract(
        &self,
        peer: SpiffeId,
        registration: ContractRegistration,
    ) -> impl Future<Output = Answer<Admission>> + Send;

    /// Takes one stage of a release; durable when it answers, and the same receipt for the same submission.
    fn submit_release(
        &self,
        peer: SpiffeId,
        submission: Submission,
    ) -> impl Future<Output = Answer<Receipt>> + Send;

    /// Takes one round's update; durable when it answers, and the same receipt for the same submission.
    fn submit_update(
        &self,
        peer: SpiffeId,
        submission: Submission,
    ) -> impl Future<Output = Answer<Receipt>> + Send;

    /// Takes an answer to a step of a secure sum; durable when it answers, and the same receipt for the same answer.
    fn answer_sum(
        &self,
        peer: SpiffeId,
        answer: DocumentAnswer,
    ) -> impl Future<Output = Answer<Receipt>> + Send;

    /// Takes an answer to a checkpoint of the audit log; durable when it answers.
    fn answer_witness(
        &self,
        peer: SpiffeId,
        answer: DocumentAnswer,
    ) -> impl Future<Output = Answer<Receipt>> + Send;

    /// Mirrors a piece of a ledger; its inner chain has been checked, its signature and its place have not.
    fn mirror_ledger(
        &self,
        peer: SpiffeId,
        statement: LedgerStatement,
    ) -> impl Future<Output = Answer<Receipt>> + Send;

    /// Serves a blob from an offset on; see [`chunk_stream`].
    fn fetch_blob(
        &self,
        peer: SpiffeId,
        request: BlobRequest,
    ) -> impl Future<Output = Answer<ChunkStream>> + Send;
}

/// What operators ask.
pub trait OperatorService: Send + Sync + 'static {
    /// Starts a plan.
    fn submit_plan(&self, peer: SpiffeId, yaml: Vec<u8>) -> impl Future<Output = Answer<PlanSummary>> + Send;

    /// Checks a plan without starting it.
    fn validate_plan(
        &self,
        peer: SpiffeId,
        yaml: Vec<u8>,
    ) -> impl Future<Output = Answer<PlanValidation>> + Send;

    /// Describes a plan.
    fn plan_status(&self, peer: SpiffeId, plan_id: Id) -> impl Future<Output = Answer<PlanSummary>> + Send;

    /// Follows a plan's events after `after_seq` (0 for all) until it is over.
    fn watch_plan(
        &self,
        peer: SpiffeId,
        plan_id: Id,
        after_seq: u64,
    ) -> impl Future<Output = Answer<BoxStream<Answer<PlanEvent>>>> + Send;

    /// Stops a plan; cancelling a finished one changes nothing.
    fn cancel_plan(&self, peer: SpiffeId, plan_id: Id) -> impl Future<Output = Answer<PlanSummary>> + Send;

    /// Lists known agents.
    fn list_agents(&self, peer: SpiffeId) -> impl Future<Output = Answer<Vec<AgentSummary>>> + Send;

    /// Lists plans, newest first.
    fn list_plans(&self, peer: SpiffeId) -> impl Future<Output = Answer<Vec<PlanSummary>>> + Send;
}

/// What auditors ask.
pub trait AuditorService: Send + Sync + 'static {
    /// The JSON a report is built from, for one product or all.
    fn report_input(
        &self,
        peer: SpiffeId,
        product: Option<String>,
    ) -> impl Future<Output = Answer<ChunkStream>> + Send;

    /// The coordinator's state.
    fn status(&self, peer: SpiffeId) -> impl Future<Output = Answer<AuditStatus>> + Send;
}

/// The three services of one server; usually the same object thrice.
pub struct Services<M, O, A> {
    /// For agents.
    pub mesh: Arc<M>,
    /// For operators.
    pub operator: Arc<O>,
    /// For auditors.
    pub auditor: Arc<A>,
}

/// The server could not go on.
#[derive(Debug, thiserror::Error)]
#[error("server stopped: {reason}")]
pub struct ServeError {
    /// The transport's text.
    pub reason: String,
}

/// Serves connections of [`crate::accept::incoming`] until `shutdown`: then sessions get their goodbye, open requests
/// [`limits::SHUTDOWN_GRACE`] to end, and the rest is dropped.
///
/// # Errors
/// [`ServeError`] if the transport fails as a whole; a failing connection ends nothing but itself.
pub async fn serve<M, O, A, Io, I, F>(
    incoming: I,
    services: Services<M, O, A>,
    shutdown: F,
) -> Result<(), ServeError>
where
    M: MeshService,
    O: OperatorService,
    A: AuditorService,
    Io: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    I: Stream<Item = io::Result<PeerStream<Io>>> + Send,
    F: Future<Output = ()> + Send,
{
    let (stopping, stop) = watch::channel(false);
    let mesh = MeshAdapter {
        service: services.mesh,
        sessions: Arc::new(Semaphore::new(limits::MAX_SESSIONS)),
        stop: stop.clone(),
    };
    let mesh = MeshServer::new(mesh)
        .max_decoding_message_size(limits::MAX_MESH_MESSAGE_BYTES)
        .max_encoding_message_size(limits::MAX_ANSWER_BYTES);
    let operator = OperatorServer::new(OperatorAdapter { service: services.operator, stop: stop.clone() })
        .max_decoding_message_size(limits::MAX_CONTROL_MESSAGE_BYTES)
        .max_encoding_message_size(limits::MAX_ANSWER_BYTES);
    let auditor = AuditorServer::new(AuditorAdapter { service: services.auditor })
        .max_decoding_message_size(limits::MAX_CONTROL_MESSAGE_BYTES)
        .max_encoding_message_size(limits::MAX_ANSWER_BYTES);
    let serving = Server::builder()
        .timeout(limits::RPC_TIMEOUT)
        .max_concurrent_streams(limits::MAX_STREAMS_PER_CONNECTION)
        .http2_max_header_list_size(limits::MAX_HEADER_BYTES)
        .http2_max_pending_accept_reset_streams(Some(MAX_RESET_STREAMS))
        .http2_keepalive_interval(Some(limits::KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(limits::KEEPALIVE_TIMEOUT))
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_connection_age(limits::MAX_CONNECTION_AGE)
        .max_connection_age_grace(limits::SHUTDOWN_GRACE)
        .layer(AuthoriseLayer::new())
        .add_service(mesh)
        .add_service(operator)
        .add_service(auditor)
        .serve_with_incoming_shutdown(incoming, async move {
            shutdown.await;
            stopping.send_replace(true);
        });
    let mut stop = stop;
    let grace = async move {
        if stop.wait_for(|stopping| *stopping).await.is_ok() {
            sleep(limits::SHUTDOWN_GRACE).await;
        } else {
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        served = serving => served.map_err(|error| ServeError { reason: error.to_string() }),
        () = grace => {
            tracing::warn!("open requests were dropped after the grace period");
            Ok(())
        }
    }
}

/// Cuts a whole of `total_bytes` into chunks from `offset` on; `read(offset, length)` supplies each. An empty rest is
/// one empty chunk, so that the receiver learns the total.
pub fn chunk_stream(
    total_bytes: u64,
    offset: u64,
    mut read: impl FnMut(u64, usize) -> Answer<Vec<u8>> + Send + 'static,
) -> ChunkStream {
    let mut next = Some(offset);
    Box::pin(tokio_stream::iter(std::iter::from_fn(move || {
        let offset = next.take()?;
        let Some(rest) = total_bytes.checked_sub(offset) else { return Some(Err(WireError::Malformed)) };
        let length =
            usize::try_from(rest).map_or(limits::MAX_CHUNK_BYTES, |rest| rest.min(limits::MAX_CHUNK_BYTES));
        let data = match read(offset, length) {
            Ok(data) if data.len() == length => data,
            Ok(_) => return Some(Err(WireError::Internal)),
            Err(error) => return Some(Err(error)),
        };
        let end = offset + length as u64;
        next = (end < total_bytes).then_some(end);
        Some(Ok(BlobChunk { offset, total_bytes, data }))
    })))
}

struct MeshAdapter<S> {
    service: Arc<S>,
    sessions: Arc<Semaphore>,
    stop: watch::Receiver<bool>,
}

struct OperatorAdapter<S> {
    service: Arc<S>,
    stop: watch::Receiver<bool>,
}

struct AuditorAdapter<S> {
    service: Arc<S>,
}

/// Splits a request into its verified caller and its message.
fn split<T>(request: Request<T>) -> Result<(SpiffeId, T), Status> {
    let peer = request.extensions().get::<PeerIdentity>().map(|peer| peer.id.clone());
    let peer = peer.ok_or(WireError::Unauthenticated)?;
    Ok((peer, request.into_inner()))
}

/// Parses a message; the reason is logged, the peer gets its code.
fn parsed<T>(peer: &SpiffeId, message: Result<T, ConvertError>) -> Result<T, Status> {
    message.map_err(|error| {
        tracing::warn!(%peer, %error, "message refused");
        WireError::from(&error).into()
    })
}

fn answer<A, B: From<A>>(answer: Answer<A>) -> Result<Response<B>, Status> {
    Ok(Response::new(answer?.into()))
}

fn chunks(stream: ChunkStream) -> BoxStream<Result<pb::BlobChunk, Status>> {
    Box::pin(stream.map(|chunk| Ok(chunk?.into())))
}

/// Ends a stream with the server.
fn until_stop<T: Send + 'static>(stream: BoxStream<T>, stop: watch::Receiver<bool>) -> BoxStream<T> {
    let stopped = async move {
        let mut stop = stop;
        drop(stop.wait_for(|stopping| *stopping).await);
    };
    Box::pin(Until { stream, stopped: Box::pin(stopped) })
}

struct Until<T> {
    stream: BoxStream<T>,
    stopped: Pin<Box<dyn Future<Output = ()> + Send>>,
}

impl<T> Stream for Until<T> {
    type Item = T;

    fn poll_next(
        mut self: Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<T>> {
        if self.stopped.as_mut().poll(context).is_ready() {
            return std::task::Poll::Ready(None);
        }
        self.stream.as_mut().poll_next(context)
    }
}

#[tonic::async_trait]
impl<S: MeshService> pb::mesh_server::Mesh for MeshAdapter<S> {
    type SessionStream = BoxStream<Result<pb::CoordinatorFrame, Status>>;
    type FetchBlobStream = BoxStream<Result<pb::BlobChunk, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<pb::AgentFrame>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let (peer, mut frames) = split(request)?;
        let permit = Arc::clone(&self.sessions).try_acquire_owned().map_err(|_| WireError::Busy)?;
        let hello = session::read_hello(&mut frames, &peer, limits::HELLO_TIMEOUT).await?;
        let (to_service, inbound) = session::inbound();
        let opened = self.service.session(peer.clone(), hello, inbound).await?;
        let stop = self.stop.clone();
        Ok(Response::new(session::start(peer, frames, to_service, opened, stop, permit)))
    }

    async fn register_contract(
        &self,
        request: Request<pb::ContractRegistration>,
    ) -> Result<Response<pb::Admission>, Status> {
        let (peer, message) = split(request)?;
        let registration = parsed(&peer, message.try_into())?;
        answer(self.service.register_contract(peer, registration).await)
    }

    async fn submit_release(
        &self,
        request: Request<pb::Submission>,
    ) -> Result<Response<pb::Receipt>, Status> {
        let (peer, message) = split(request)?;
        let submission = parsed(&peer, message.try_into())?;
        answer(self.service.submit_release(peer, submission).await)
    }

    async fn submit_update(&self, request: Request<pb::Submission>) -> Result<Response<pb::Receipt>, Status> {
        let (peer, message) = split(request)?;
        let submission = parsed(&peer, message.try_into())?;
        answer(self.service.submit_update(peer, submission).await)
    }

    async fn answer_sum(
        &self,
        request: Request<pb::DocumentAnswer>,
    ) -> Result<Response<pb::Receipt>, Status> {
        let (peer, message) = split(request)?;
        let document = parsed(&peer, message.try_into())?;
        answer(self.service.answer_sum(peer, document).await)
    }

    async fn answer_witness(
        &self,
        request: Request<pb::DocumentAnswer>,
    ) -> Result<Response<pb::Receipt>, Status> {
        let (peer, message) = split(request)?;
        let document = parsed(&peer, message.try_into())?;
        answer(self.service.answer_witness(peer, document).await)
    }

    async fn mirror_ledger(
        &self,
        request: Request<pb::LedgerStatement>,
    ) -> Result<Response<pb::Receipt>, Status> {
        let (peer, message) = split(request)?;
        let statement = parsed(&peer, message.try_into())?;
        answer(self.service.mirror_ledger(peer, statement).await)
    }

    async fn fetch_blob(
        &self,
        request: Request<pb::BlobRequest>,
    ) -> Result<Response<Self::FetchBlobStream>, Status> {
        let (peer, message) = split(request)?;
        let wanted = parsed(&peer, message.try_into())?;
        Ok(Response::new(chunks(self.service.fetch_blob(peer, wanted).await?)))
    }
}

#[tonic::async_trait]
impl<S: OperatorService> pb::operator_server::Operator for OperatorAdapter<S> {
    type WatchPlanStream = BoxStream<Result<pb::PlanEvent, Status>>;

    async fn submit_plan(
        &self,
        request: Request<pb::PlanDocument>,
    ) -> Result<Response<pb::PlanSummary>, Status> {
        let (peer, message) = split(request)?;
        let yaml = parsed(&peer, convert::plan_yaml(message))?;
        answer(self.service.submit_plan(peer, yaml).await)
    }

    async fn validate_plan(
        &self,
        request: Request<pb::PlanDocument>,
    ) -> Result<Response<pb::PlanValidation>, Status> {
        let (peer, message) = split(request)?;
        let yaml = parsed(&peer, convert::plan_yaml(message))?;
        answer(self.service.validate_plan(peer, yaml).await)
    }

    async fn plan_status(
        &self,
        request: Request<pb::PlanRequest>,
    ) -> Result<Response<pb::PlanSummary>, Status> {
        let (peer, message) = split(request)?;
        let plan_id = parsed(&peer, message.plan_id.parse())?;
        answer(self.service.plan_status(peer, plan_id).await)
    }

    async fn watch_plan(
        &self,
        request: Request<pb::PlanWatch>,
    ) -> Result<Response<Self::WatchPlanStream>, Status> {
        let (peer, message) = split(request)?;
        let plan_id = parsed(&peer, message.plan_id.parse())?;
        let events = self.service.watch_plan(peer, plan_id, message.after_seq).await?;
        let events: Self::WatchPlanStream = Box::pin(events.map(|event| Ok(event?.into())));
        Ok(Response::new(until_stop(events, self.stop.clone())))
    }

    async fn cancel_plan(
        &self,
        request: Request<pb::PlanRequest>,
    ) -> Result<Response<pb::PlanSummary>, Status> {
        let (peer, message) = split(request)?;
        let plan_id = parsed(&peer, message.plan_id.parse())?;
        answer(self.service.cancel_plan(peer, plan_id).await)
    }

    async fn list_agents(
        &self,
        request: Request<pb::ListAgentsRequest>,
    ) -> Result<Response<pb::AgentList>, Status> {
        let (peer, _) = split(request)?;
        let agents = self.service.list_agents(peer).await?;
        Ok(Response::new(pb::AgentList { agents: agents.into_iter().map(Into::into).collect() }))
    }

    async fn list_plans(
        &self,
        request: Request<pb::ListPlansRequest>,
    ) -> Result<Response<pb::PlanList>, Status> {
        let (peer, _) = split(request)?;
        let plans = self.service.list_plans(peer).await?;
        Ok(Response::new(pb::PlanList { plans: plans.into_iter().map(Into::into).collect() }))
    }
}

#[tonic::async_trait]
impl<S: AuditorService> pb::auditor_server::Auditor for AuditorAdapter<S> {
    type ReportInputStream = BoxStream<Result<pb::BlobChunk, Status>>;

    async fn report_input(
        &self,
        request: Request<pb::ReportRequest>,
    ) -> Result<Response<Self::ReportInputStream>, Status> {
        let (peer, message) = split(request)?;
        let product = parsed(&peer, convert::report_product(message))?;
        Ok(Response::new(chunks(self.service.report_input(peer, product).await?)))
    }

    async fn status(&self, request: Request<pb::StatusRequest>) -> Result<Response<pb::AuditStatus>, Status> {
        let (peer, _) = split(request)?;
        answer(self.service.status(peer).await)
    }
}

const MAX_RESET_STREAMS: usize = 64;
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 2 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    async fn collect(total: u64, offset: u64) -> Vec<Answer<BlobChunk>> {
        let bytes: Vec<u8> = (0..total).map(|i| (i % 251) as u8).collect();
        let read = move |offset: u64, length: usize| Ok(bytes[offset as usize..][..length].to_vec());
        chunk_stream(total, offset, read).collect().await
    }

    #[tokio::test]
    async fn chunks_cover_the_rest_exactly_once() {
        let max = limits::MAX_CHUNK_BYTES as u64;
        for (total, offset) in [(0, 0), (1, 0), (max, 0), (max + 1, 0), (3 * max + 7, 5), (9, 9)] {
            let mut position = offset;
            for chunk in collect(total, offset).await {
                let chunk = chunk.unwrap();
                assert_eq!((chunk.offset, chunk.total_bytes), (position, total));
                assert!(chunk.data.len() <= limits::MAX_CHUNK_BYTES);
                position += chunk.data.len() as u64;
            }
            assert_eq!(position, total);
        }
        assert_eq!(collect(4, 5).await, [Err(WireError::Malformed)]);
    }
}

//! What agents ask: sessions, registration, vectors, ledger statements, blobs.

use tabmesh_federation::documents;
use tabmesh_federation::id::{AgentId, CollectionId, Digest as NamedDigest};
use tabmesh_federation::phase::{Outcome, Refusal};
use tabmesh_federation::secagg::document::Reply;
use tabmesh_federation::vector::Vector;
use tabmesh_federation::witness::WitnessReply;
use tabmesh_proto::identity::SpiffeId;
use tabmesh_proto::limits::MAX_DOCUMENT_ANSWER_BYTES;
use tabmesh_proto::message::{
    Admission, AgentFrame, BlobRequest, ContractRegistration, DocumentAnswer, Hello, Id, LedgerStatement,
    Receipt, Submission,
};
use tabmesh_proto::server::{Answer, ChunkStream, InboundFrames, MeshService, OpenSession, chunk_stream};
use tabmesh_proto::status::WireError;
use tabmesh_store::{Digest, Op};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;

use super::refused;
use crate::collections::Arrival;
use crate::error::CoordinatorError;
use crate::mesh::Mesh;
use crate::mirror::Stated;
use crate::outbox::Outbox;
use crate::sums::{Arrived, Refused};
use crate::witness;
use std::sync::Arc;
use std::time::Duration;

/// The agents' side of a [`Mesh`].
pub(crate) struct MeshCalls(pub(crate) Arc<Mesh>);

impl MeshService for MeshCalls {
    async fn session(&self, peer: SpiffeId, hello: Hello, inbound: InboundFrames) -> Answer<OpenSession> {
        let mesh = Arc::clone(&self.0);
        let opened = mesh
            .outbox
            .open(&peer, hello.product_version, mesh.now_ms())
            .map_err(refused(&peer, "session"))?;
        tracing::info!(%peer, session = opened.number, "agent connected");
        let session_id = format!("s-{}", opened.number).parse().map_err(|_| WireError::Internal)?;
        tokio::spawn(listen(Arc::clone(&mesh), peer, inbound));
        Ok(OpenSession {
            session_id,
            heartbeat_interval: Duration::from_millis(mesh.config.heartbeat_interval_ms),
            frames: Box::pin(ReceiverStream::new(opened.frames)),
        })
    }

    async fn register_contract(
        &self,
        peer: SpiffeId,
        registration: ContractRegistration,
    ) -> Answer<Admission> {
        let mesh = &self.0;
        let contract_digest = registration.contract_digest();
        let judged = mesh
            .catalog
            .register(&peer, &registration, &mesh.policy)
            .map_err(refused(&peer, "registration"))?;
        let (admission, facts) = match judged {
            Ok(decision) => {
                let facts = decision.log_entry();
                (Admission { admitted: true, refusals: Vec::new(), contract_digest }, facts)
            }
            Err(why) => {
                tracing::warn!(%peer, reasons = ?why.reasons, "contract refused");
                let facts = serde_json::json!({ "refused": why.reasons });
                (Admission { admitted: false, refusals: why.codes, contract_digest }, facts)
            }
        };
        mesh.audit(&peer.to_string(), "register_contract", facts).map_err(refused(&peer, "audit"))?;
        Ok(admission)
    }

    async fn submit_release(&self, peer: SpiffeId, submission: Submission) -> Answer<Receipt> {
        take(&self.0, &peer, submission).await
    }

    async fn submit_update(&self, peer: SpiffeId, submission: Submission) -> Answer<Receipt> {
        take(&self.0, &peer, submission).await
    }

    async fn answer_sum(&self, peer: SpiffeId, answer: DocumentAnswer) -> Answer<Receipt> {
        let reply = Reply::from_bytes(&answer.document).map_err(|error| {
            tracing::warn!(%peer, %error, "answer refused");
            WireError::Malformed
        })?;
        let (digest, mesh) = (answer.digest, Arc::clone(&self.0));
        take_in_sum(&self.0, &peer, answer.assignment_id, digest, move |id, agent, settles| {
            mesh.sums.reply(id, &agent, reply, settles)
        })
        .await
    }

    async fn answer_witness(&self, peer: SpiffeId, answer: DocumentAnswer) -> Answer<Receipt> {
        let DocumentAnswer { assignment_id, document, digest } = answer;
        let reply: WitnessReply = documents::read("witness reply", &document, MAX_DOCUMENT_ANSWER_BYTES)
            .map_err(|error| {
                tracing::warn!(%peer, %error, "answer refused");
                WireError::Malformed
            })?;
        let (mesh, agent, id) = (Arc::clone(&self.0), peer.clone(), assignment_id.clone());
        let taken = tokio::task::spawn_blocking(move || witness::take(&mesh, &agent, &id, reply)).await;
        taken.map_err(|_| WireError::Internal)?.map_err(refused(&peer, "witness"))?;
        Ok(Receipt { receipt_id: assignment_id, digest, accepted_ms: self.0.now_ms() })
    }

    async fn mirror_ledger(&self, peer: SpiffeId, statement: LedgerStatement) -> Answer<Receipt> {
        let mesh = &self.0;
        let admitted = mesh.catalog.get(&peer).ok_or(WireError::NotAdmitted)?;
        if admitted.contract.name != statement.product() {
            return Err(WireError::IdentityMismatch);
        }
        statement.verify(&peer, &admitted.public_key).map_err(|_| WireError::Signature)?;
        match mesh.mirror.state(&peer, &statement).map_err(refused(&peer, "ledger"))? {
            Stated::Held { head } => {
                let receipt_id = format!("ledger-{}", statement.head().map_or(0, |(seq, _)| seq));
                let receipt_id = receipt_id.parse().map_err(|_| WireError::Internal)?;
                // What was stated may end before the copy does; the receipt names what was stated.
                let digest = statement.head().map_or(head, |(_, hash)| hash);
                Ok(Receipt { receipt_id, digest, accepted_ms: mesh.now_ms() })
            }
            Stated::Broken => {
                tracing::error!(%peer, product = statement.product(), "ledger statement does not continue the copy");
                let facts = serde_json::json!({ "product": statement.product() });
                mesh.audit(&peer.to_string(), "ledger_broken", facts).map_err(refused(&peer, "audit"))?;
                Err(WireError::LedgerBroken)
            }
        }
    }

    async fn fetch_blob(&self, peer: SpiffeId, request: BlobRequest) -> Answer<ChunkStream> {
        let mesh = Arc::clone(&self.0);
        let digest = Digest::from_bytes(request.digest);
        // Published artefacts and current documents only: an agent has no business with others' vectors.
        if mesh.catalog.get(&peer).is_none() {
            return Err(WireError::NotAdmitted);
        }
        if !mesh.is_shared(&digest).map_err(refused(&peer, "blob"))? {
            return Err(WireError::NotFound);
        }
        let total = mesh.blobs.length(&digest).map_err(|_| WireError::NotFound)?;
        let blobs = Arc::clone(&mesh.blobs);
        Ok(chunk_stream(total, request.offset, move |offset, length| {
            blobs.open_range(&digest, offset, length).map_err(|error| {
                tracing::error!(%error, "blob can't be read");
                WireError::Internal
            })
        }))
    }
}

/// Hears an agent until it goes.
async fn listen(mesh: Arc<Mesh>, peer: SpiffeId, mut inbound: InboundFrames) {
    while let Some(frame) = inbound.next().await {
        mesh.outbox.seen(&peer, mesh.now_ms());
        match frame {
            Ok(AgentFrame::Heartbeat) => {}
            Ok(AgentFrame::ArtefactReceived { assignment_id }) => {
                if let Err(error) = mesh.answered(&peer, &assignment_id, None) {
                    tracing::error!(%peer, %error, "an answer can't be recorded");
                }
            }
            Ok(AgentFrame::AssignmentRefused { assignment_id, code }) => {
                if let Err(error) = mesh.answered(&peer, &assignment_id, Some(code)) {
                    tracing::error!(%peer, %error, "a refusal can't be recorded");
                }
            }
            Err(error) => {
                tracing::info!(%peer, %error, "session ended in disorder");
                break;
            }
        }
    }
    tracing::info!(%peer, "agent disconnected");
}

/// Takes an answer to a secure sum, away from the tasks that wait for bytes.
async fn take_in_sum(
    mesh: &Arc<Mesh>,
    peer: &SpiffeId,
    assignment_id: Id,
    digest: [u8; 32],
    take: impl FnOnce(CollectionId, AgentId, Op) -> Result<(), Refused> + Send + 'static,
) -> Answer<Receipt> {
    let collection = collection(&assignment_id)?;
    let agent = AgentId::new(peer.to_string()).map_err(|_| WireError::IdentityMismatch)?;
    let settles = Outbox::settles(peer, &assignment_id);
    let taken = tokio::task::spawn_blocking(move || take(collection, agent, settles)).await;
    match taken.map_err(|_| WireError::Internal)? {
        Ok(()) => Ok(Receipt { receipt_id: assignment_id, digest, accepted_ms: mesh.now_ms() }),
        Err(refusal) => {
            tracing::warn!(%peer, %refusal, "answer to a secure sum refused");
            mesh.audit(&peer.to_string(), "sum_answer_refused", refusal.to_string())
                .map_err(refused(peer, "audit"))?;
            Err(refusal.wire())
        }
    }
}

/// The stage or round that an assignment is for.
fn collection(assignment_id: &Id) -> Answer<CollectionId> {
    let uuid = uuid::Uuid::parse_str(assignment_id.as_str()).map_err(|_| WireError::NotFound)?;
    Ok(CollectionId::from_uuid(uuid))
}

/// Takes a vector for the stage or round that its assignment opened.
async fn take(mesh: &Arc<Mesh>, peer: &SpiffeId, submission: Submission) -> Answer<Receipt> {
    let collection = collection(&submission.assignment_id)?;
    let digest = NamedDigest::from_bytes(submission.payload_digest);
    if mesh.sums.knows(collection).map_err(refused(peer, "vector"))? {
        let Submission { assignment_id, attempt, payload, payload_digest, .. } = submission;
        let (sums, arrived) = (Arc::clone(mesh), Arrived { attempt, payload, digest });
        return take_in_sum(mesh, peer, assignment_id, payload_digest, move |id, agent, settles| {
            sums.sums.masked(id, &agent, arrived, settles)
        })
        .await;
    }
    let arrival = Arrival {
        collection,
        attempt: submission.attempt,
        agent: AgentId::new(peer.to_string()).map_err(|_| WireError::IdentityMismatch)?,
        digest,
        vector: Vector::from_checked_bytes(&submission.payload, digest).ok_or(WireError::Malformed)?,
        payload: submission.payload,
        settles: Outbox::settles(peer, &submission.assignment_id),
    };
    match mesh.collections.submit(arrival).await? {
        None => Err(WireError::NotFound),
        Some(Outcome::Accepted(receipt) | Outcome::Duplicate(receipt)) => Ok(Receipt {
            receipt_id: submission.assignment_id,
            digest: *receipt.payload.as_bytes(),
            accepted_ms: receipt.received_ms,
        }),
        Some(Outcome::Refused(refusal)) => {
            tracing::warn!(%peer, %refusal, "vector refused");
            mesh.audit(&peer.to_string(), "vector_refused", refusal.to_string())
                .map_err(refused(peer, "audit"))?;
            Err(code_of(&refusal))
        }
        Some(Outcome::Applied) => Err(WireError::Internal),
    }
}

fn code_of(refusal: &Refusal) -> WireError {
    match refusal {
        Refusal::Late { .. } => WireError::DeadlinePassed,
        Refusal::NotInRoster { .. } => WireError::IdentityMismatch,
        Refusal::WrongAttempt { .. } => WireError::WrongAttempt,
        Refusal::Conflict { .. } => WireError::Conflict,
        Refusal::Screened(_) => WireError::Malformed,
        _ => WireError::StalePlan,
    }
}

impl From<CoordinatorError> for WireError {
    fn from(error: CoordinatorError) -> Self {
        error.wire()
    }
}

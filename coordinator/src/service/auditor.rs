//! What auditors ask: the signed report, and how the logs stand.

use std::sync::Arc;

use tabmesh_proto::identity::SpiffeId;
use tabmesh_proto::message::AuditStatus;
use tabmesh_proto::server::{Answer, AuditorService, ChunkStream, chunk_stream};
use tabmesh_proto::status::WireError;

use super::refused;
use crate::error::CoordinatorError;
use crate::mesh::Mesh;
use crate::report;

/// The auditors' side of a [`Mesh`].
pub(crate) struct AuditorCalls(pub(crate) Arc<Mesh>);

impl AuditorService for AuditorCalls {
    async fn report_input(&self, peer: SpiffeId, product: Option<String>) -> Answer<ChunkStream> {
        let signed = report::signed(&self.0, product.as_deref()).map_err(refused(&peer, "report"))?;
        let facts = serde_json::json!({ "product": product });
        self.0.audit(&peer.to_string(), "report", facts).map_err(refused(&peer, "audit"))?;
        Ok(chunk_stream(signed.len() as u64, 0, move |offset, length| {
            let start = usize::try_from(offset).map_err(|_| WireError::Malformed)?;
            let piece = signed.get(start..start.saturating_add(length)).ok_or(WireError::Malformed)?;
            Ok(piece.to_vec())
        }))
    }

    async fn status(&self, peer: SpiffeId) -> Answer<AuditStatus> {
        let mesh = &self.0;
        let mut entries = 0;
        let mut head = [0; 32];
        for entry in mesh.audit_log().entries() {
            let entry = entry.map_err(|e| refused(&peer, "status")(CoordinatorError::from(e)))?;
            entries += 1;
            head = *entry.hash.as_bytes();
        }
        Ok(AuditStatus {
            coordinator_version: env!("CARGO_PKG_VERSION").to_owned(),
            audit_entries: entries,
            audit_head: head,
            products: u32::try_from(mesh.catalog.all().len()).unwrap_or(u32::MAX),
            plans: u32::try_from(mesh.plans.count()).unwrap_or(u32::MAX),
        })
    }
}

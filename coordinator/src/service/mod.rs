//! The three gRPC services: thin, they check who may say what and hand on.

pub(crate) mod auditor;
pub(crate) mod mesh;
pub(crate) mod operator;

use tabmesh_proto::identity::SpiffeId;
use tabmesh_proto::status::WireError;

use crate::error::CoordinatorError;

/// Logs a failure with its cause and gives the code the peer sees.
pub(crate) fn refused(peer: &SpiffeId, what: &'static str) -> impl FnOnce(CoordinatorError) -> WireError {
    move |error| {
        tracing::warn!(%peer, what, %error, "refused");
        error.wire()
    }
}

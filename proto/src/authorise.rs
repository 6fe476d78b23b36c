//! Who may call what: one table of RPC × role, applied to every request before its body is read.
//!
//! What is not in the table is denied to everybody. The same layer bounds how many submissions are received at once,
//! since each may hold the largest message in memory. Finer rules (an agent acts for its own domain only) need the
//! message and are the services'.

use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use tokio::{sync::Semaphore, time::timeout};
use tonic::{Status, body::Body, codegen::http};
use tower::{Layer, Service};

use crate::{
    accept::PeerIdentity,
    identity::{Role, SpiffeId},
    limits::{MAX_SUBMISSIONS_IN_FLIGHT, SUBMISSION_WAIT},
    status::WireError,
};

include!(concat!(env!("OUT_DIR"), "/methods.rs"));

/// Why a call was denied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Denied {
    /// No such RPC.
    #[error("no such method: {method}")]
    UnknownMethod {
        /// The path that was called.
        method: String,
    },
    /// The caller's role is not in the RPC's row.
    #[error("{peer} may not call {method}")]
    Role {
        /// Who called.
        peer: SpiffeId,
        /// What was called.
        method: String,
    },
}

impl From<&Denied> for WireError {
    fn from(denied: &Denied) -> Self {
        match denied {
            Denied::UnknownMethod { .. } => Self::NotFound,
            Denied::Role { .. } => Self::Role,
        }
    }
}

/// The access table: every RPC with the roles that may call it.
pub const ACCESS: &[(&str, &[Role])] = &[
    ("/tabmesh.v1.Mesh/Session", &[Role::Agent]),
    ("/tabmesh.v1.Mesh/RegisterContract", &[Role::Agent]),
    (SUBMIT_RELEASE, &[Role::Agent]),
    (SUBMIT_UPDATE, &[Role::Agent]),
    ("/tabmesh.v1.Mesh/AnswerSum", &[Role::Agent]),
    ("/tabmesh.v1.Mesh/AnswerWitness", &[Role::Agent]),
    ("/tabmesh.v1.Mesh/MirrorLedger", &[Role::Agent]),
    ("/tabmesh.v1.Mesh/FetchBlob", &[Role::Agent]),
    ("/tabmesh.v1.Operator/SubmitPlan", &[Role::Operator]),
    ("/tabmesh.v1.Operator/ValidatePlan", &[Role::Operator]),
    ("/tabmesh.v1.Operator/PlanStatus", &[Role::Operator, Role::Auditor]),
    ("/tabmesh.v1.Operator/WatchPlan", &[Role::Operator, Role::Auditor]),
    ("/tabmesh.v1.Operator/CancelPlan", &[Role::Operator]),
    ("/tabmesh.v1.Operator/ListAgents", &[Role::Operator, Role::Auditor]),
    ("/tabmesh.v1.Operator/ListPlans", &[Role::Operator, Role::Auditor]),
    ("/tabmesh.v1.Auditor/ReportInput", &[Role::Auditor]),
    ("/tabmesh.v1.Auditor/Status", &[Role::Auditor, Role::Operator]),
];

/// Decides whether `peer` may call the RPC with this HTTP/2 path.
///
/// # Errors
/// [`Denied`] if not.
pub fn authorise(method: &str, peer: &SpiffeId) -> Result<(), Denied> {
    let row = ACCESS.iter().find(|(name, _)| *name == method);
    let (_, roles) = row.ok_or_else(|| Denied::UnknownMethod { method: method.to_owned() })?;
    if roles.contains(&peer.role()) {
        return Ok(());
    }
    Err(Denied::Role { peer: peer.clone(), method: method.to_owned() })
}

/// Applies [`authorise`] and the bound on submissions to every request.
#[derive(Debug, Clone)]
pub struct AuthoriseLayer {
    submissions: Arc<Semaphore>,
}

impl AuthoriseLayer {
    /// With [`MAX_SUBMISSIONS_IN_FLIGHT`].
    #[must_use]
    pub fn new() -> Self {
        Self { submissions: Arc::new(Semaphore::new(MAX_SUBMISSIONS_IN_FLIGHT)) }
    }
}

impl Default for AuthoriseLayer {
    fn default() -> Self {
        Self::new()
    }
}

impl<S> Layer<S> for AuthoriseLayer {
    type Service = Authorised<S>;

    fn layer(&self, inner: S) -> Authorised<S> {
        Authorised { inner, submissions: Arc::clone(&self.submissions) }
    }
}

/// A service behind [`AuthoriseLayer`].
#[derive(Debug, Clone)]
pub struct Authorised<S> {
    inner: S,
    submissions: Arc<Semaphore>,
}

impl<S> Service<http::Request<Body>> for Authorised<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>,
    S: Clone + Send + 'static,
    S::Future: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let method = request.uri().path();
        let refused = |error: WireError| -> Self::Future {
            let response = Status::from(error).into_http();
            Box::pin(std::future::ready(Ok(response)))
        };
        let Some(peer) = request.extensions().get::<PeerIdentity>() else {
            tracing::error!(method, "request without an identified connection");
            return refused(WireError::Unauthenticated);
        };
        if let Err(denied) = authorise(method, &peer.id) {
            tracing::warn!(remote = %peer.remote, %denied, "request denied");
            return refused(WireError::from(&denied));
        }
        if !matches!(method, SUBMIT_RELEASE | SUBMIT_UPDATE) {
            return Box::pin(self.inner.call(request));
        }
        // Vectors wait their turn unread: a whole cohort answers at once, and what waits costs a header only.
        let turn = timeout(SUBMISSION_WAIT, Arc::clone(&self.submissions).acquire_owned());
        let next = self.inner.clone();
        let mut ready = std::mem::replace(&mut self.inner, next);
        Box::pin(async move {
            let Ok(Ok(_permit)) = turn.await else {
                return Ok(Status::from(WireError::Busy).into_http());
            };
            ready.call(request).await
        })
    }
}

const SUBMIT_RELEASE: &str = "/tabmesh.v1.Mesh/SubmitRelease";
const SUBMIT_UPDATE: &str = "/tabmesh.v1.Mesh/SubmitUpdate";

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use super::*;

    fn peer(role: Role) -> SpiffeId {
        match role {
            Role::Agent => SpiffeId::agent("acme.example", "payments", "a"),
            Role::Operator => SpiffeId::operator("acme.example", "o"),
            Role::Auditor => SpiffeId::auditor("acme.example", "c"),
            Role::Coordinator => SpiffeId::coordinator("acme.example"),
        }
        .unwrap()
    }

    #[test]
    fn every_rpc_has_exactly_one_row_and_every_row_is_an_rpc() {
        let declared: BTreeSet<&str> = METHODS.iter().copied().collect();
        let rows: BTreeSet<&str> = ACCESS.iter().map(|(method, _)| *method).collect();
        assert_eq!(rows, declared, "the access table and the services differ");
        assert_eq!(ACCESS.len(), METHODS.len());
        assert!(declared.len() > 10);
    }

    #[test]
    fn every_rpc_is_decided_for_every_role_and_the_coordinator_calls_nothing() {
        for method in METHODS {
            for role in Role::ALL {
                let expected = ACCESS.iter().any(|(name, roles)| name == method && roles.contains(&role));
                let decided = authorise(method, &peer(role));
                assert_eq!(decided.is_ok(), expected, "{method} by {role:?}");
            }
            assert!(authorise(method, &peer(Role::Coordinator)).is_err());
        }
    }

    #[test]
    fn no_role_of_people_reaches_the_mesh_and_no_agent_reaches_control() {
        for method in METHODS {
            let mesh = method.starts_with("/tabmesh.v1.Mesh/");
            assert_eq!(authorise(method, &peer(Role::Agent)).is_ok(), mesh, "{method}");
            for role in [Role::Operator, Role::Auditor] {
                assert!(!(mesh && authorise(method, &peer(role)).is_ok()), "{method} by {role:?}");
            }
        }
    }

    #[test]
    fn auditors_change_nothing() {
        for changing in ["SubmitPlan", "ValidatePlan", "CancelPlan"] {
            let method = format!("/tabmesh.v1.Operator/{changing}");
            let denied = Denied::Role { peer: peer(Role::Auditor), method: method.clone() };
            assert_eq!(authorise(&method, &peer(Role::Auditor)), Err(denied));
        }
    }

    /// Answers once the gate is open.
    #[derive(Clone)]
    struct Held {
        began: Arc<AtomicUsize>,
        gate: tokio::sync::watch::Receiver<bool>,
    }

    impl Service<http::Request<Body>> for Held {
        type Response = http::Response<Body>;
        type Error = Infallible;
        type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, _: http::Request<Body>) -> Self::Future {
            let mut held = self.clone();
            Box::pin(async move {
                held.began.fetch_add(1, Ordering::SeqCst);
                let _ = held.gate.wait_for(|open| *open).await;
                Ok(http::Response::new(Body::default()))
            })
        }
    }

    #[tokio::test]
    async fn submissions_beyond_the_bound_wait_for_their_turn() {
        let (release, gate) = tokio::sync::watch::channel(false);
        let began = Arc::new(AtomicUsize::new(0));
        let inner = Held { began: Arc::clone(&began), gate };
        let layer = AuthoriseLayer::new();
        let mut calls = Vec::new();
        for _ in 0..=MAX_SUBMISSIONS_IN_FLIGHT {
            let mut request = http::Request::new(Body::default());
            *request.uri_mut() = SUBMIT_UPDATE.parse().unwrap();
            let remote = "127.0.0.1:1".parse().unwrap();
            request.extensions_mut().insert(PeerIdentity { id: peer(Role::Agent), remote });
            calls.push(tokio::spawn(layer.layer(inner.clone()).call(request)));
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(began.load(Ordering::SeqCst), MAX_SUBMISSIONS_IN_FLIGHT);
        release.send(true).unwrap();
        for call in calls {
            assert_eq!(call.await.unwrap().unwrap().status(), http::StatusCode::OK);
        }
        assert_eq!(began.load(Ordering::SeqCst), MAX_SUBMISSIONS_IN_FLIGHT + 1);
    }

    #[test]
    fn unknown_methods_are_denied_to_everybody() {
        for method in ["", "/", "/tabmesh.v1.Mesh/", "/tabmesh.v1.Mesh/session", "/tabmesh.v2.Mesh/Session"] {
            for role in Role::ALL {
                let denied = Denied::UnknownMethod { method: method.into() };
                assert_eq!(authorise(method, &peer(role)), Err(denied));
            }
        }
    }
}

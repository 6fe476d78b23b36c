//! The accept loop: connections, their TLS handshakes and identities, and a stop that lets requests finish.
//!
//! Everything a peer can hold is bounded: connections, the time of a handshake, of a header and of a connection.
//! Connections end after [`MAX_CONNECTION_AGE`], so a caller taken off the list or out of the CA is gone then.

use std::{convert::Infallible, future::Future, pin::pin, sync::Arc, time::Duration};

use axum::{Router, body::Body, http::Request};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
    task::JoinSet,
    time::{sleep, timeout},
};
use tower::ServiceExt;

use super::{
    log::Caller,
    rest::{self, Endpoint},
    tls::TlsGate,
};

/// Serves connections of `listener` until `shutdown` completes, then waits up to [`DRAIN_TIMEOUT`] for requests.
pub(super) async fn run(
    listener: TcpListener,
    gate: Option<TlsGate>,
    endpoint: Arc<Endpoint>,
    shutdown: impl Future<Output = ()> + Send,
) {
    let routes = endpoint.router();
    let gate = gate.map(Arc::new);
    let (stop, stopped) = watch::channel(());
    let free = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    let mut background = JoinSet::new();
    if let Some(gate) = gate.clone() {
        background.spawn(async move { gate.reload_for_ever().await });
    }
    let mut shutdown = pin!(shutdown);
    loop {
        let next = async {
            let permit = Arc::clone(&free).acquire_owned().await;
            (listener.accept().await, permit)
        };
        let (accepted, permit) = tokio::select! {
            () = &mut shutdown => break,
            Some(_) = connections.join_next() => continue,
            next = next => next,
        };
        match accepted {
            Ok((stream, _)) => {
                let (gate, routes, stopped) = (gate.clone(), routes.clone(), stopped.clone());
                connections.spawn(async move {
                    let _permit = permit;
                    connection(stream, gate, routes, stopped).await;
                });
            }
            Err(error) => {
                // Out of descriptors, most likely: accepting again at once would spin.
                tracing::warn!(%error, "accept failed");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    drop(stop);
    let drained = timeout(DRAIN_TIMEOUT, async { while connections.join_next().await.is_some() {} }).await;
    if drained.is_err() {
        tracing::warn!(connections = connections.len(), "connections cut off at shutdown");
    }
}

async fn connection(
    stream: TcpStream,
    gate: Option<Arc<TlsGate>>,
    routes: Router,
    stopped: watch::Receiver<()>,
) {
    // Small answers should not wait for more bytes; a socket that refuses still works.
    let _ = stream.set_nodelay(true);
    let Some(gate) = gate else {
        return http(stream, Some(Caller::Loopback), routes, stopped).await;
    };
    match timeout(HANDSHAKE_TIMEOUT, gate.accept(stream)).await {
        Ok(Ok((stream, Ok(caller)))) => http(stream, Some(caller), routes, stopped).await,
        Ok(Ok((stream, Err(reason)))) => {
            tracing::warn!(%reason, "caller refused");
            http(stream, None, rest::refusal(), stopped).await;
        }
        Ok(Err(error)) => tracing::warn!(%error, "tls handshake failed"),
        Err(_) => tracing::warn!("tls handshake timed out"),
    }
}

async fn http<I>(io: I, caller: Option<Caller>, routes: Router, mut stopped: watch::Receiver<()>)
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(move |mut request: Request<Incoming>| {
        if let Some(caller) = &caller {
            request.extensions_mut().insert(caller.clone());
        }
        let routes = routes.clone();
        async move { Ok::<_, Infallible>(into_ok(routes.oneshot(request.map(Body::new)).await)) }
    });
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(MAX_HEADER_BYTES)
        .serve_connection(TokioIo::new(io), service);
    let mut serving = pin!(serving);
    tokio::select! {
        ended = serving.as_mut() => return log_end(ended),
        // The channel only ever closes: that is the signal.
        _ = stopped.changed() => {}
        () = sleep(MAX_CONNECTION_AGE) => {}
    }
    serving.as_mut().graceful_shutdown();
    log_end(serving.await);
}

fn into_ok<T>(result: Result<T, Infallible>) -> T {
    match result {
        Ok(value) => value,
        Err(never) => match never {},
    }
}

fn log_end(ended: Result<(), hyper::Error>) {
    if let Err(error) = ended {
        tracing::debug!(%error, "connection ended early");
    }
}

/// Most open connections; more wait in the listener's backlog.
const MAX_CONNECTIONS: usize = 256;
/// Longest TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest time for a request's headers, and for a connection to stay idle.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
/// Largest request head, bytes.
const MAX_HEADER_BYTES: usize = 64 * 1024;
/// Age at which a connection is closed after its running request.
const MAX_CONNECTION_AGE: Duration = Duration::from_secs(600);
/// Longest wait for running requests at shutdown.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause after a failed accept.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

//! From a listening socket to identified TLS connections: the server's front door.
//!
//! A connection passes here or is closed before any request is read: too many connections or handshakes at once, a
//! handshake that takes too long or fails, another protocol than HTTP/2, or a certificate that does not identify a
//! peer of our trust domain. Afterwards a peer that sends nothing is closed as well. Each refusal is named, logged and
//! handed to an observer; a refused peer learns nothing but the TLS alert.

use std::{
    fmt,
    future::Future,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use rustls::ServerConfig;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpListener,
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch},
    time::{Sleep, sleep, timeout},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::transport::server::Connected;

use crate::{
    identity::{DevelopmentCa, IdentityError, SpiffeId},
    limits,
    tls::{ALPN_HTTP2, ServerTls},
};

/// Where connections come from: a TCP socket, or a simulated one.
pub trait Listener: Send + 'static {
    /// One connection.
    type Io: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// Waits for the next connection.
    fn accept(&mut self) -> impl Future<Output = io::Result<(Self::Io, SocketAddr)>> + Send;
}

impl Listener for TcpListener {
    type Io = tokio::net::TcpStream;

    async fn accept(&mut self) -> io::Result<(Self::Io, SocketAddr)> {
        let (stream, remote) = Self::accept(self).await?;
        stream.set_nodelay(true)?;
        Ok((stream, remote))
    }
}

/// Why a connection was closed before any request was read.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// Too many connections are open.
    #[error("too many connections")]
    Connections,
    /// Too many handshakes are in progress.
    #[error("too many handshakes in progress")]
    Handshakes,
    /// The handshake took too long.
    #[error("handshake timed out")]
    HandshakeTimeout,
    /// TLS failed: no certificate, a foreign CA, an expired or revoked certificate, another TLS version.
    #[error("handshake failed: {0}")]
    Tls(rustls::Error),
    /// The connection broke during the handshake.
    #[error("connection broke during the handshake: {0:?}")]
    Broken(io::ErrorKind),
    /// The peer does not speak HTTP/2.
    #[error("peer does not speak HTTP/2")]
    Protocol,
    /// The certificate is valid and does not identify a peer of ours.
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

/// Called with every refusal, for metrics and tests.
pub type Observer = Arc<dyn Fn(SocketAddr, &Refusal) + Send + Sync>;

/// Limits of the front door; [`AcceptOptions::default`] has those of [`crate::limits`].
#[derive(Clone)]
pub struct AcceptOptions {
    /// Most open connections.
    pub max_connections: usize,
    /// Most handshakes in progress.
    pub max_handshakes: usize,
    /// Longest handshake.
    pub handshake_timeout: Duration,
    /// Longest silence after the handshake.
    pub header_timeout: Duration,
    /// Called with every refusal.
    pub observer: Option<Observer>,
}

impl Default for AcceptOptions {
    fn default() -> Self {
        Self {
            max_connections: limits::MAX_CONNECTIONS,
            max_handshakes: limits::MAX_HANDSHAKES,
            handshake_timeout: limits::HANDSHAKE_TIMEOUT,
            header_timeout: limits::HEADER_TIMEOUT,
            observer: None,
        }
    }
}

impl fmt::Debug for AcceptOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AcceptOptions")
            .field("max_connections", &self.max_connections)
            .field("max_handshakes", &self.max_handshakes)
            .field("handshake_timeout", &self.handshake_timeout)
            .field("header_timeout", &self.header_timeout)
            .finish_non_exhaustive()
    }
}

/// Who is at the other end of a connection; found in every request's extensions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerIdentity {
    /// The verified SPIFFE id.
    pub id: SpiffeId,
    /// The network address, for logs.
    pub remote: SocketAddr,
}

/// An accepted connection of an identified peer.
pub struct PeerStream<Io> {
    tls: TlsStream<Io>,
    peer: PeerIdentity,
    silence: Option<Pin<Box<Sleep>>>,
    _connection: OwnedSemaphorePermit,
}

/// Accepts connections in a task of its own until the returned stream is dropped. Must be called within a tokio
/// runtime.
pub fn incoming<L: Listener>(
    listener: L,
    tls: &ServerTls,
    options: AcceptOptions,
) -> impl Stream<Item = io::Result<PeerStream<L::Io>>> + Send + use<L> {
    let (accepted, stream) = mpsc::channel(READY_CONNECTIONS);
    let door = Door {
        config: tls.subscribe(),
        development: tls.development(),
        trust_domain: tls.id().trust_domain().to_owned(),
        connections: Arc::new(Semaphore::new(options.max_connections)),
        handshakes: Arc::new(Semaphore::new(options.max_handshakes)),
        options,
    };
    tokio::spawn(accept_all(listener, Arc::new(door), accepted));
    ReceiverStream::new(stream)
}

struct Door {
    config: watch::Receiver<Arc<ServerConfig>>,
    development: DevelopmentCa,
    trust_domain: String,
    connections: Arc<Semaphore>,
    handshakes: Arc<Semaphore>,
    options: AcceptOptions,
}

type Accepted<Io> = mpsc::Sender<io::Result<PeerStream<Io>>>;

async fn accept_all<L: Listener>(mut listener: L, door: Arc<Door>, accepted: Accepted<L::Io>) {
    loop {
        let next = tokio::select! {
            () = accepted.closed() => return,
            next = listener.accept() => next,
        };
        let (io, remote) = match next {
            Ok(connection) => connection,
            Err(error) => {
                // Out of descriptors, or the peer has gone already: neither ends the server.
                tracing::warn!(%error, "accepting a connection failed");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(connection) = Arc::clone(&door.connections).try_acquire_owned() else {
            door.refuse(remote, &Refusal::Connections);
            continue;
        };
        let Ok(handshake) = Arc::clone(&door.handshakes).try_acquire_owned() else {
            door.refuse(remote, &Refusal::Handshakes);
            continue;
        };
        let (door, accepted) = (Arc::clone(&door), accepted.clone());
        tokio::spawn(async move {
            let admitted = door.admit(io, remote, connection).await;
            drop(handshake);
            match admitted {
                // A send fails only when the server has stopped; the connection is closed by dropping it.
                Ok(stream) => drop(accepted.send(Ok(stream)).await),
                Err(refusal) => door.refuse(remote, &refusal),
            }
        });
    }
}

impl Door {
    async fn admit<Io: AsyncRead + AsyncWrite + Unpin>(
        &self,
        io: Io,
        remote: SocketAddr,
        connection: OwnedSemaphorePermit,
    ) -> Result<PeerStream<Io>, Refusal> {
        let config = Arc::clone(&self.config.borrow());
        let handshake = TlsAcceptor::from(config).accept(io);
        let tls = timeout(self.options.handshake_timeout, handshake)
            .await
            .map_err(|_| Refusal::HandshakeTimeout)?
            .map_err(|error| match tls_cause(&error) {
                Some(tls) => Refusal::Tls(tls),
                None => Refusal::Broken(error.kind()),
            })?;
        let (_, session) = tls.get_ref();
        if session.alpn_protocol() != Some(ALPN_HTTP2) {
            return Err(Refusal::Protocol);
        }
        let chain = session.peer_certificates().ok_or(IdentityError::NoCertificate)?;
        let id = SpiffeId::of_chain(chain, self.development)?.require_trust_domain(&self.trust_domain)?;
        let silence = Some(Box::pin(sleep(self.options.header_timeout)));
        Ok(PeerStream { tls, peer: PeerIdentity { id, remote }, silence, _connection: connection })
    }

    fn refuse(&self, remote: SocketAddr, refusal: &Refusal) {
        tracing::warn!(%remote, %refusal, "connection refused");
        if let Some(observer) = &self.options.observer {
            observer(remote, refusal);
        }
    }
}

/// The TLS error inside an input/output error, where there is one.
pub(crate) fn tls_cause(error: &io::Error) -> Option<rustls::Error> {
    error.get_ref()?.downcast_ref::<rustls::Error>().cloned()
}

impl<Io: AsyncRead + AsyncWrite + Unpin> AsyncRead for PeerStream<Io> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.tls).poll_read(context, buffer);
        if read.is_ready() {
            self.silence = None;
        } else if let Some(silence) = &mut self.silence
            && silence.as_mut().poll(context).is_ready()
        {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        read
    }
}

impl<Io: AsyncRead + AsyncWrite + Unpin> AsyncWrite for PeerStream<Io> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tls).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tls).poll_write_vectored(context, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.tls.is_write_vectored()
    }
}

impl<Io> Connected for PeerStream<Io> {
    type ConnectInfo = PeerIdentity;

    fn connect_info(&self) -> PeerIdentity {
        self.peer.clone()
    }
}

const READY_CONNECTIONS: usize = 16;
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

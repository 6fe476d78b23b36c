//! The client's way to the coordinator: TCP, mutual TLS, then a check of *who* answered.
//!
//! rustls checks a server's certificate against a host name only, and every agent's certificate may carry
//! `localhost` or a shared host name. So the SPIFFE id of whoever answered must equal the coordinator's, or the
//! connection is closed before a byte is sent. Reconnections pass the same way.

use std::{error::Error, future::Future, io, net::IpAddr, sync::Arc};

use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::watch,
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::transport::{Channel, Endpoint};

use crate::{
    accept::tls_cause,
    identity::{DevelopmentCa, IdentityError, SpiffeId},
    limits,
    tls::{ALPN_HTTP2, ClientTls},
};

/// Where the coordinator listens and who it must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CoordinatorAddress {
    authority: String,
    server_name: ServerName<'static>,
    coordinator: SpiffeId,
}

impl CoordinatorAddress {
    /// Parses `host:port`; the host is checked against the certificate's DNS or IP names.
    ///
    /// # Errors
    /// [`ConnectError::Address`] if it is not `host:port`.
    pub fn new(authority: &str, coordinator: SpiffeId) -> Result<Self, ConnectError> {
        let refused = || ConnectError::Address { authority: authority.to_owned() };
        let (host, port) = authority.rsplit_once(':').ok_or_else(refused)?;
        port.parse::<u16>().map_err(|_| refused())?;
        let literal = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
        let server_name = match literal.unwrap_or(host).parse::<IpAddr>() {
            Ok(ip) => ServerName::IpAddress(ip.into()),
            Err(_) => ServerName::try_from(host.to_owned()).map_err(|_| refused())?,
        };
        Ok(Self { authority: authority.to_owned(), server_name, coordinator })
    }

    /// `host:port`.
    #[must_use]
    pub fn authority(&self) -> &str {
        &self.authority
    }

    /// Who must answer.
    #[must_use]
    pub const fn coordinator(&self) -> &SpiffeId {
        &self.coordinator
    }
}

/// Why there is no connection.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The address is not `host:port`.
    #[error("not an address: expected host:port, got {authority}")]
    Address {
        /// The text given.
        authority: String,
    },
    /// The network refuses.
    #[error("cannot reach the coordinator: {reason}")]
    Network {
        /// The system's classification.
        kind: io::ErrorKind,
        /// The system's text.
        reason: String,
    },
    /// Opening the connection took too long.
    #[error("connecting to the coordinator timed out")]
    Timeout,
    /// TLS failed: a foreign CA, an expired certificate, a wrong host name, or the server refused our certificate.
    #[error("handshake with the coordinator failed: {0}")]
    Tls(rustls::Error),
    /// The server's certificate does not identify anybody.
    #[error("whoever answered is not identified: {0}")]
    Identity(#[from] IdentityError),
    /// Somebody else answered.
    #[error("wrong server: expected {expected}, got {got}")]
    WrongServer {
        /// Who should have answered.
        expected: SpiffeId,
        /// Who did.
        got: SpiffeId,
    },
    /// The server does not speak HTTP/2.
    #[error("the server does not speak HTTP/2")]
    Protocol,
    /// The HTTP/2 connection could not be set up.
    #[error("connection could not be set up: {reason}")]
    Transport {
        /// The transport's text.
        reason: String,
    },
}

impl ConnectError {
    /// Finds the cause inside a transport error.
    pub(crate) fn in_chain(error: &(dyn Error + 'static)) -> Option<Self> {
        let mut next = Some(error);
        while let Some(error) = next {
            if let Some(found) = error.downcast_ref::<Self>() {
                return Some(found.clone());
            }
            if let Some(io) = error.downcast_ref::<io::Error>() {
                if let Some(found) = io.get_ref().and_then(|inner| inner.downcast_ref::<Self>()) {
                    return Some(found.clone());
                }
                if let Some(tls) = tls_cause(io) {
                    return Some(Self::Tls(tls));
                }
                if io.kind() == io::ErrorKind::TimedOut {
                    return Some(Self::Timeout);
                }
            }
            next = error.source();
        }
        None
    }
}

impl From<tonic::transport::Error> for ConnectError {
    fn from(error: tonic::transport::Error) -> Self {
        Self::in_chain(&error).unwrap_or_else(|| Self::Transport { reason: error.to_string() })
    }
}

/// Opens the raw connection: TCP, or a simulated network.
pub trait Dial: Send + Sync + 'static {
    /// One connection.
    type Io: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// Opens a connection to `authority` (`host:port`).
    fn dial(&self, authority: &str) -> impl Future<Output = io::Result<Self::Io>> + Send;
}

/// Dials over TCP.
#[derive(Debug, Clone, Copy, Default)]
pub struct TcpDial;

impl Dial for TcpDial {
    type Io = TcpStream;

    async fn dial(&self, authority: &str) -> io::Result<TcpStream> {
        let stream = TcpStream::connect(authority).await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }
}

/// A connection to the coordinator that reopens itself; cheap to clone. Clients are made from it.
#[derive(Debug, Clone)]
pub struct Link {
    pub(crate) channel: Channel,
}

/// Opens a connection and verifies who answered.
///
/// # Errors
/// Every variant of [`ConnectError`]. A server that refuses *our* certificate does so after the TLS 1.3 handshake is
/// over for us: the first call then fails instead.
pub async fn connect<D: Dial>(
    address: &CoordinatorAddress,
    tls: &ClientTls,
    dial: D,
) -> Result<Link, ConnectError> {
    // The channel's own scheme stays plain: the encryption is ours, below it.
    let endpoint = Endpoint::from_shared(format!("http://{}", address.authority))
        .map_err(|_| ConnectError::Address { authority: address.authority.clone() })?
        .http2_keep_alive_interval(limits::KEEPALIVE_INTERVAL)
        .keep_alive_timeout(limits::KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .http2_max_header_list_size(limits::MAX_HEADER_BYTES);
    let opener = Arc::new(Opener {
        address: address.clone(),
        config: tls.subscribe(),
        development: tls.development(),
        dial,
    });
    let connector = tower::service_fn(move |_| {
        let opener = Arc::clone(&opener);
        async move {
            let opened = timeout(limits::CONNECT_TIMEOUT, opener.open()).await;
            opened.unwrap_or(Err(ConnectError::Timeout)).map(TokioIo::new)
        }
    });
    let channel = endpoint.connect_with_connector(connector).await?;
    Ok(Link { channel })
}

struct Opener<D> {
    address: CoordinatorAddress,
    config: watch::Receiver<Arc<ClientConfig>>,
    development: DevelopmentCa,
    dial: D,
}

impl<D: Dial> Opener<D> {
    async fn open(&self) -> Result<TlsStream<D::Io>, ConnectError> {
        let broken = |error: io::Error| match tls_cause(&error) {
            Some(tls) => ConnectError::Tls(tls),
            None => ConnectError::Network { kind: error.kind(), reason: error.to_string() },
        };
        let io = self.dial.dial(&self.address.authority).await.map_err(broken)?;
        let config = Arc::clone(&self.config.borrow());
        let name = self.address.server_name.clone();
        let tls = TlsConnector::from(config).connect(name, io).await.map_err(broken)?;
        let (_, session) = tls.get_ref();
        if session.alpn_protocol() != Some(ALPN_HTTP2) {
            return Err(ConnectError::Protocol);
        }
        let chain = session.peer_certificates().ok_or(IdentityError::NoCertificate)?;
        let got = SpiffeId::of_chain(chain, self.development)?;
        if got != self.address.coordinator {
            return Err(ConnectError::WrongServer { expected: self.address.coordinator.clone(), got });
        }
        Ok(tls)
    }
}

const STREAM_WINDOW_BYTES: u32 = 1 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 4 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_host_and_port() {
        let id = SpiffeId::coordinator("acme.example").unwrap();
        for good in ["localhost:7443", "127.0.0.1:1", "[::1]:7443", "mesh.acme.example:443"] {
            let address = CoordinatorAddress::new(good, id.clone()).unwrap();
            assert_eq!(address.authority(), good);
        }
        assert!(matches!(
            CoordinatorAddress::new("[::1]:7443", id.clone()).unwrap().server_name,
            ServerName::IpAddress(_)
        ));
        for bad in ["localhost", "localhost:", ":443", "localhost:70000", "https://localhost:443", "a b:1"] {
            let refused = ConnectError::Address { authority: bad.into() };
            assert_eq!(CoordinatorAddress::new(bad, id.clone()), Err(refused), "{bad}");
        }
    }
}

//! A relay between one agent and the coordinator that sees both sides' plain bytes.
//!
//! It holds the coordinator's server certificate and the agent's client certificate, as nobody outside a test does, and
//! takes HTTP/2 apart into streams and gRPC messages. Flow control, settings and pings depend on timing and are left out.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Result, bail, ensure};
use rustls::pki_types::ServerName;
use tabmesh_proto::identity::DevelopmentCa;
use tabmesh_proto::tls::{ClientTls, DefaultTimeProvider, ServerTls, TlsFiles, TlsMaterial, TlsPolicy};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::quickstart::pki::{PkiFolder, Role, Usage};

/// One direction of one HTTP/2 stream.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Direction {
    /// Header blocks: method, path, status and whatever else, without the date.
    pub(crate) headers: Vec<Vec<String>>,
    /// gRPC messages.
    pub(crate) messages: Vec<Vec<u8>>,
}

/// One call: what the agent said and what it was answered.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Call {
    /// From the agent.
    pub(crate) up: Direction,
    /// To the agent.
    pub(crate) down: Direction,
}

type Bytes = Arc<Mutex<Vec<u8>>>;

/// A running relay.
pub(crate) struct Tap {
    accepting: tokio::task::AbortHandle,
    connections: Arc<Mutex<Vec<(Bytes, Bytes)>>>,
}

impl Tap {
    /// Starts a relay from `listener` to `coordinator` in the name of `agent`; the caller's listener stays open.
    ///
    /// # Errors
    /// Certificates or listener can't be used.
    pub(crate) fn start(
        pki: &PkiFolder,
        agent: &Role,
        listener: &TcpListener,
        coordinator: SocketAddr,
    ) -> Result<Self> {
        let policy = || TlsPolicy { development: DevelopmentCa::Accept, time: Arc::new(DefaultTimeProvider) };
        let material = |role: &Role, usage| {
            let paths = pki.tls(role, usage);
            let (ca, certificate, key) = (pki.authority(), paths.certificate, paths.key);
            TlsMaterial::read(&TlsFiles { ca, certificate, key, crls: Vec::new() })
        };
        let server = ServerTls::new(&material(&Role::Coordinator, Usage::Server)?, policy())?;
        let client = ClientTls::new(&material(agent, Usage::Client)?, policy())?;
        let acceptor = TlsAcceptor::from(server.subscribe().borrow().clone());
        let connector = TlsConnector::from(client.subscribe().borrow().clone());
        let listener = tokio::net::TcpListener::from_std(listener.try_clone()?)?;
        let connections: Arc<Mutex<Vec<(Bytes, Bytes)>>> = Arc::default();
        let seen = Arc::clone(&connections);
        let accepting = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (acceptor, connector) = (acceptor.clone(), connector.clone());
                let (up, down) = (Bytes::default(), Bytes::default());
                locked(&seen).push((Arc::clone(&up), Arc::clone(&down)));
                tokio::spawn(async move {
                    let Ok(near) = acceptor.accept(stream).await else { return };
                    let Ok(far) = TcpStream::connect(coordinator).await else { return };
                    let name = ServerName::IpAddress(coordinator.ip().into());
                    let Ok(far) = connector.connect(name, far).await else { return };
                    let (near_read, near_write) = tokio::io::split(near);
                    let (far_read, far_write) = tokio::io::split(far);
                    tokio::join!(copy(near_read, far_write, up), copy(far_read, near_write, down));
                });
            }
        });
        Ok(Self { accepting: accepting.abort_handle(), connections })
    }

    /// Bytes seen so far, both ways, to tell when a link has gone quiet.
    pub(crate) fn volume(&self) -> usize {
        let seen = locked(&self.connections);
        seen.iter().map(|(up, down)| locked(up).len() + locked(down).len()).sum()
    }

    /// Every call so far, connection by connection, in the order they were opened.
    ///
    /// # Errors
    /// What was said isn't HTTP/2 with gRPC messages as this protocol has them.
    pub(crate) fn calls(&self) -> Result<Vec<Call>> {
        let seen = locked(&self.connections);
        let mut calls = Vec::new();
        for (up, down) in seen.iter() {
            let up = locked(up);
            let mut streams: BTreeMap<u32, Call> = BTreeMap::new();
            for (stream, direction) in directions(up.strip_prefix(PREFACE).unwrap_or_default())? {
                streams.entry(stream).or_default().up = direction;
            }
            for (stream, direction) in directions(&locked(down))? {
                streams.entry(stream).or_default().down = direction;
            }
            calls.extend(streams.into_values());
        }
        Ok(calls)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn copy<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(mut from: R, mut to: W, record: Bytes) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(read) = from.read(&mut buffer).await {
        let piece = &buffer[..read];
        if read == 0 {
            break;
        }
        locked(&record).extend_from_slice(piece);
        if to.write_all(piece).await.is_err() || to.flush().await.is_err() {
            break;
        }
    }
    let _ = to.shutdown().await;
}

/// Streams of one direction (RFC 9113, section 4.1), each with its header blocks and messages.
fn directions(mut bytes: &[u8]) -> Result<BTreeMap<u32, Direction>> {
    let mut data: BTreeMap<u32, Vec<u8>> = BTreeMap::new();
    // Header compression has one state for a connection's direction.
    let mut decoder = fluke_hpack::Decoder::new();
    let mut all: BTreeMap<u32, Direction> = BTreeMap::new();
    while let Some((head, rest)) = bytes.split_first_chunk::<9>() {
        let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
        if rest.len() < length {
            break;
        }
        let (frame, rest) = rest.split_at(length);
        let stream = u32::from_be_bytes([head[5] & 0x7f, head[6], head[7], head[8]]);
        match head[3] {
            DATA => data.entry(stream).or_default().extend_from_slice(frame),
            HEADERS => {
                let block =
                    decoder.decode(frame).map_err(|error| anyhow::anyhow!("a header block: {error:?}"))?;
                let text = |(name, value): &(Vec<u8>, Vec<u8>)| {
                    format!("{}: {}", String::from_utf8_lossy(name), String::from_utf8_lossy(value))
                };
                let timeless = block.iter().filter(|(name, _)| name != b"date");
                all.entry(stream).or_default().headers.push(timeless.map(text).collect());
            }
            CONTINUATION => bail!("a header block of this protocol fits in one frame"),
            RST_STREAM => all.entry(stream).or_default().headers.push(vec![format!("reset {frame:?}")]),
            _ => {}
        }
        bytes = rest;
    }
    for (stream, data) in data {
        let mut left = data.as_slice();
        while let Some((head, rest)) = left.split_first_chunk::<5>() {
            let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
            ensure!(head[0] == 0, "messages are not compressed");
            let Some((message, rest)) = rest.split_at_checked(length) else { break };
            all.entry(stream).or_default().messages.push(message.to_vec());
            left = rest;
        }
    }
    Ok(all)
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const CONTINUATION: u8 = 9;

//! The link between agents and coordinator without sockets: pipes in memory, under the same mutual TLS.

use std::future::Future;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};

use tabmesh_proto::accept::Listener;
use tabmesh_proto::connect::Dial;
use tokio::io::{DuplexStream, duplex};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// Opens pipes to one coordinator, whatever address is asked for.
#[derive(Debug, Clone)]
pub(super) struct Pipes(UnboundedSender<DuplexStream>);

/// Where the other ends come out.
#[derive(Debug)]
pub(super) struct Door(UnboundedReceiver<DuplexStream>);

/// A network of pipes to one listener.
pub(super) fn pipes() -> (Pipes, Door) {
    let (sender, receiver) = unbounded_channel();
    (Pipes(sender), Door(receiver))
}

impl Dial for Pipes {
    type Io = DuplexStream;

    fn dial(&self, _authority: &str) -> impl Future<Output = io::Result<DuplexStream>> + Send {
        let (near, far) = duplex(BUFFER_BYTES);
        let sent = self.0.send(far).map_err(|_| io::Error::from(io::ErrorKind::ConnectionRefused));
        async move { sent.map(|()| near) }
    }
}

impl Listener for Door {
    type Io = DuplexStream;

    async fn accept(&mut self) -> io::Result<(DuplexStream, SocketAddr)> {
        match self.0.recv().await {
            Some(io) => Ok((io, SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))),
            // Nobody can dial any more: the coordinator's stop signal ends the wait.
            None => std::future::pending().await,
        }
    }
}

/// Address that the agents' configurations name; nothing is bound to it.
pub(super) const ADDRESS: &str = "127.0.0.1:1";
/// Bytes a pipe holds before its writer waits.
const BUFFER_BYTES: usize = 256 * 1024;

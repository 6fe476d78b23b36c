//! The server's half of one agent session: frames in order, liveness, acknowledgement of heartbeats, a clean end.
//!
//! Two tasks per session. One reads: it checks every frame, answers heartbeats, hands frames to the service and ends
//! the session when none arrives for several intervals or one does not parse. The other writes what the service says,
//! until the service ends, the peer goes, or the server stops. Both queues are bounded.

use std::time::Duration;

use tokio::{
    sync::{mpsc, oneshot, watch},
    time::timeout,
};
use tokio_stream::{StreamExt, wrappers::ReceiverStream};
use tonic::{Status, Streaming};

use crate::{
    convert,
    identity::SpiffeId,
    limits::{HEARTBEATS_MISSED, SESSION_QUEUE_FRAMES},
    message::{AgentFrame, CoordinatorFrame, GoodbyeReason, Hello, Welcome},
    pb,
    server::{BoxStream, InboundFrames, OpenSession},
    status::WireError,
};

/// Reads the first frame.
pub(crate) async fn read_hello(
    frames: &mut Streaming<pb::AgentFrame>,
    peer: &SpiffeId,
    deadline: Duration,
) -> Result<Hello, WireError> {
    let first = timeout(deadline, frames.message()).await.map_err(|_| WireError::HeartbeatMissed)?;
    let first = first.map_err(|status| WireError::from(&status))?.ok_or(WireError::Malformed)?;
    let hello = convert::hello(first).map_err(|error| {
        tracing::warn!(%peer, %error, "session refused");
        WireError::from(&error)
    })?;
    if hello.protocol_version != crate::PROTOCOL_VERSION {
        let (got, expected) = (hello.protocol_version, crate::PROTOCOL_VERSION);
        tracing::warn!(%peer, got, expected, "session refused: protocol version");
        return Err(WireError::ProtocolVersion);
    }
    Ok(hello)
}

/// The queue between the reading task and the service.
pub(crate) fn inbound() -> (mpsc::Sender<Result<AgentFrame, WireError>>, InboundFrames) {
    let (sender, receiver) = mpsc::channel(SESSION_QUEUE_FRAMES);
    (sender, Box::pin(ReceiverStream::new(receiver)))
}

/// Starts both tasks and returns what is sent to the agent, its welcome first.
pub(crate) fn start(
    peer: SpiffeId,
    frames: Streaming<pb::AgentFrame>,
    to_service: mpsc::Sender<Result<AgentFrame, WireError>>,
    opened: OpenSession,
    stop: watch::Receiver<bool>,
    session_permit: tokio::sync::OwnedSemaphorePermit,
) -> BoxStream<Result<pb::CoordinatorFrame, Status>> {
    let (to_peer, from_server) = mpsc::channel(SESSION_QUEUE_FRAMES);
    let (dead, died) = oneshot::channel();
    let welcome = Welcome {
        session_id: opened.session_id.clone(),
        protocol_version: crate::PROTOCOL_VERSION,
        heartbeat_interval: opened.heartbeat_interval,
    };
    let reader = Reader { peer, frames, to_service, to_peer: to_peer.downgrade() };
    let patience = opened.heartbeat_interval.saturating_mul(HEARTBEATS_MISSED);
    let reading = tokio::spawn(reader.run(patience, dead));
    tokio::spawn(async move {
        write(welcome, opened.frames, to_peer, stop, died).await;
        // Whoever still listens learns from the end of its stream; an open request would hold up a stopping server.
        reading.abort();
        drop(session_permit);
    });
    Box::pin(ReceiverStream::new(from_server))
}

type ToPeer = mpsc::Sender<Result<pb::CoordinatorFrame, Status>>;

struct Reader {
    peer: SpiffeId,
    frames: Streaming<pb::AgentFrame>,
    to_service: mpsc::Sender<Result<AgentFrame, WireError>>,
    to_peer: mpsc::WeakSender<Result<pb::CoordinatorFrame, Status>>,
}

impl Reader {
    async fn run(mut self, patience: Duration, dead: oneshot::Sender<GoodbyeReason>) {
        let (error, reason) = match self.read_all(patience).await {
            Ok(()) => return,
            Err(WireError::HeartbeatMissed) => (WireError::HeartbeatMissed, GoodbyeReason::HeartbeatMissed),
            Err(error) => (error, GoodbyeReason::Protocol),
        };
        tracing::warn!(peer = %self.peer, %error, "session ends");
        // Both receivers may be gone already; then nobody needs to be told.
        let _ = self.to_service.try_send(Err(error));
        let _ = dead.send(reason);
    }

    /// Reads until the peer ends the stream, or a frame is missing or wrong.
    async fn read_all(&mut self, patience: Duration) -> Result<(), WireError> {
        loop {
            let next = timeout(patience, self.frames.message()).await;
            let frame = match next.map_err(|_| WireError::HeartbeatMissed)? {
                Ok(Some(frame)) => frame,
                Ok(None) => return Ok(()),
                Err(status) => return Err(WireError::from(&status)),
            };
            let frame = AgentFrame::try_from(frame).map_err(|error| WireError::from(&error))?;
            if frame == AgentFrame::Heartbeat
                && let Some(to_peer) = self.to_peer.upgrade()
            {
                // A full queue means the peer is not reading: it will miss the acknowledgement it does not read.
                drop(to_peer.try_send(Ok(CoordinatorFrame::HeartbeatAck.into())));
            }
            // A service that no longer listens still has its peer's liveness watched.
            drop(self.to_service.send(Ok(frame)).await);
        }
    }
}

async fn write(
    welcome: Welcome,
    mut frames: BoxStream<CoordinatorFrame>,
    to_peer: ToPeer,
    mut stop: watch::Receiver<bool>,
    mut died: oneshot::Receiver<GoodbyeReason>,
) {
    let goodbye = |reason| Ok(CoordinatorFrame::Goodbye(reason).into());
    if to_peer.send(Ok(welcome.into())).await.is_err() {
        return;
    }
    let mut reader_runs = true;
    loop {
        tokio::select! {
            biased;
            () = to_peer.closed() => return,
            () = stopped(&mut stop) => {
                drop(to_peer.try_send(goodbye(GoodbyeReason::ShuttingDown)));
                return;
            }
            reason = &mut died, if reader_runs => match reason {
                Ok(reason) => {
                    drop(to_peer.try_send(goodbye(reason)));
                    return;
                }
                // The peer has ended its direction in good order; ours goes on.
                Err(_) => reader_runs = false,
            },
            frame = frames.next() => {
                let Some(frame) = frame else { return };
                let last = matches!(frame, CoordinatorFrame::Goodbye(_));
                if to_peer.send(Ok(frame.into())).await.is_err() || last {
                    return;
                }
            }
        }
    }
}

async fn stopped(stop: &mut watch::Receiver<bool>) {
    // An error means that the server is gone, which is a stop as well.
    drop(stop.wait_for(|stopping| *stopping).await);
}

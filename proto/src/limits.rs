//! Every size, count and time limit of the wire, each a named constant with its reason.
//!
//! A limit is inclusive: the constant itself is accepted, one more is refused. Times are generous for honest peers on
//! slow links and short against peers that hold resources open.

use std::time::Duration;

/// Most coordinates of one submitted vector (4 Mi): a release of a few thousand marginals, or any adapter.
pub const MAX_COORDINATES: usize = 4 << 20;
/// Most bytes of one submitted vector; eight per coordinate.
pub const MAX_PAYLOAD_BYTES: usize = MAX_COORDINATES * 8;
/// Most bytes of one message to the `Mesh` service: a payload and its envelope.
pub const MAX_MESH_MESSAGE_BYTES: usize = MAX_PAYLOAD_BYTES + 64 * 1024;
/// Most bytes of one message to the `Operator` and `Auditor` services.
pub const MAX_CONTROL_MESSAGE_BYTES: usize = 2 << 20;
/// Most bytes of one message a client accepts from the coordinator.
pub const MAX_ANSWER_BYTES: usize = 16 << 20;
/// Most data bytes of one blob chunk: small enough that other streams are not held up.
pub const MAX_CHUNK_BYTES: usize = 256 * 1024;
/// Most bytes of one blob that a client agrees to fetch.
pub const MAX_BLOB_BYTES: u64 = 1 << 30;
/// Most bytes of one contract as stored.
pub const MAX_CONTRACT_BYTES: usize = 1 << 20;
/// Most bytes of one plan's YAML.
pub const MAX_PLAN_BYTES: usize = 1 << 20;
/// Most bytes of one assignment's or plan record's JSON document.
pub const MAX_DOCUMENT_BYTES: usize = 4 << 20;
/// Most bytes of one answer that is a document: no room for a table beside keys, shares and signatures.
pub const MAX_DOCUMENT_ANSWER_BYTES: usize = 128 << 10;
/// Most entries of one ledger statement; a longer ledger is mirrored in pieces.
pub const MAX_LEDGER_ENTRIES: usize = 1024;
/// Most bytes of one ledger entry.
pub const MAX_LEDGER_ENTRY_BYTES: usize = 64 * 1024;
/// Most bytes of all entries of one ledger statement.
pub const MAX_LEDGER_STATEMENT_BYTES: usize = 8 << 20;
/// Most bytes of an identifier: assignment, plan, session, receipt.
pub const MAX_ID_BYTES: usize = 64;
/// Most bytes of a short text: product names, versions, phases.
pub const MAX_NAME_BYTES: usize = 256;
/// Most bytes of a longer text meant for people: event details, findings.
pub const MAX_TEXT_BYTES: usize = 4096;
/// Most items of a list in an answer: agents, plans, findings, products of an agent.
pub const MAX_LIST_ITEMS: usize = 4096;
/// Most refusal codes of one admission.
pub const MAX_ADMISSION_REFUSALS: usize = 16;
/// Most bytes of a SPIFFE id; the standard allows 2048, ours have four short segments.
pub const MAX_SPIFFE_ID_BYTES: usize = 512;
/// Most bytes of one PEM file.
pub const MAX_PEM_BYTES: u64 = 1 << 20;
/// Most certificates in a presented chain, the leaf included.
pub const MAX_CHAIN_CERTIFICATES: usize = 8;

/// Most open connections; above it new ones are closed at once.
pub const MAX_CONNECTIONS: usize = 4096;
/// Most TLS handshakes in progress; above it new connections are closed at once. Thousands, since each silent peer
/// holds one for [`HANDSHAKE_TIMEOUT`] and must not keep honest ones out.
pub const MAX_HANDSHAKES: usize = 3072;
/// Most open agent sessions.
pub const MAX_SESSIONS: usize = 2048;
/// Most concurrent HTTP/2 streams of one connection.
pub const MAX_STREAMS_PER_CONNECTION: u32 = 32;
/// Most submissions being received at once: bounds memory at about this many times [`MAX_MESH_MESSAGE_BYTES`].
pub const MAX_SUBMISSIONS_IN_FLIGHT: usize = 8;
/// How long a noised vector waits for its turn before it is refused as busy.
pub const SUBMISSION_WAIT: Duration = Duration::from_secs(60);
/// Most bytes of one request's headers.
pub const MAX_HEADER_BYTES: u32 = 16 * 1024;
/// Frames waiting for one session's peer to read them.
pub const SESSION_QUEUE_FRAMES: usize = 64;

/// A TLS handshake must end within this time.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// The first bytes after the handshake must arrive within this time.
pub const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// The first frame of a session, its hello, must arrive within this time.
pub const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// A unary request, its body included, must be answered within this time.
pub const RPC_TIMEOUT: Duration = Duration::from_secs(120);
/// Opening a connection, TLS included, must end within this time on the client's side.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How often an agent sends a heartbeat unless the coordinator says otherwise.
pub const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(10);
/// A session without any frame for this many heartbeat intervals is closed.
pub const HEARTBEATS_MISSED: u32 = 3;
/// Shortest heartbeat interval a client accepts.
pub const MIN_HEARTBEAT_INTERVAL: Duration = Duration::from_millis(10);
/// Longest heartbeat interval a client accepts.
pub const MAX_HEARTBEAT_INTERVAL: Duration = Duration::from_secs(3600);
/// HTTP/2 pings: a peer that is gone is noticed after this and [`KEEPALIVE_TIMEOUT`].
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
/// An HTTP/2 ping must be answered within this time.
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);
/// No chunk of a blob for this long means the transfer is interrupted.
pub const CHUNK_TIMEOUT: Duration = Duration::from_secs(30);
/// Interrupted blob transfers are resumed this often without progress before the client gives up.
pub const MAX_STALLED_RESUMES: u32 = 3;
/// A connection is closed after this time, so that a revoked certificate does not outlive it by more.
pub const MAX_CONNECTION_AGE: Duration = Duration::from_secs(24 * 3600);
/// Open requests get this long to end when a server stops.
pub const SHUTDOWN_GRACE: Duration = Duration::from_secs(8);

//! The one error enum of the store: each variant is a condition a caller or an operator can act on.
//!
//! Infrastructure failures ([`StoreError::Io`], [`StoreError::Engine`]) never share a variant with damage found in
//! stored bytes or with a refused argument.

use std::{io, path::Path, path::PathBuf};

use crate::Digest;

/// Why a frame of an append-only log could not be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameDamage {
    /// The frame does not begin with the log's magic bytes.
    #[error("bad magic bytes")]
    Magic,
    /// The header's own checksum does not match the header.
    #[error("header checksum mismatch")]
    Header,
    /// The header is intact and names a frame version this build does not read.
    #[error("unknown frame version {0}")]
    Version(u8),
    /// The header is intact and names a payload longer than any payload that can be appended.
    #[error("payload length {0} above the limit")]
    Length(u32),
    /// The payload is complete and does not match its checksum.
    #[error("payload checksum mismatch")]
    Payload,
}

/// Everything the store can answer instead of a result.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The operating system refused; `kind` tells a full disk from a missing file.
    #[error("cannot {action} {}: {reason}", path.display())]
    Io {
        /// What was being done, as a verb.
        action: &'static str,
        /// The file or directory concerned.
        path: PathBuf,
        /// The system's classification.
        kind: io::ErrorKind,
        /// The system's text.
        reason: String,
    },
    /// The embedded database failed for a reason other than input and output.
    #[error("record engine failed: {reason}")]
    Engine {
        /// The engine's text.
        reason: String,
    },
    /// The embedded database found damage in its own files; set the directory aside and rebuild from the log.
    #[error("record engine files in {} are damaged: set the directory aside and rebuild it from the log", path.display())]
    EngineDamaged {
        /// The database directory.
        path: PathBuf,
    },
    /// Another process (or another handle of this one) holds the file.
    #[error("{} is in use by another process", path.display())]
    Locked {
        /// The locked file.
        path: PathBuf,
    },
    /// A record key is empty or longer than the limit.
    #[error("record key of {got} bytes refused: expected 1 to {max}")]
    KeyLength {
        /// Bytes given.
        got: usize,
        /// Most bytes accepted.
        max: usize,
    },
    /// A record value is too large; such values belong into a blob.
    #[error("record value of {got} bytes refused: at most {max}, store it as a blob")]
    ValueTooLarge {
        /// Bytes given.
        got: usize,
        /// Most bytes accepted.
        max: usize,
    },
    /// A commit names too many operations.
    #[error("commit of {got} operations refused: at most {max}")]
    BatchTooLarge {
        /// Operations given.
        got: usize,
        /// Most operations accepted.
        max: usize,
    },
    /// An expectation of a commit did not hold; nothing was written.
    #[error("record {key} is not what the commit expected: read it again and retry")]
    Conflict {
        /// The key, as text where it is text.
        key: String,
    },
    /// A stored record's checksum does not match.
    #[error("record {key} is damaged: checksum mismatch")]
    RecordDamaged {
        /// The key, as text where it is text.
        key: String,
    },
    /// Stored bytes carry another magic than the format that was asked for.
    #[error("not a {format} file: bad magic bytes")]
    Magic {
        /// The expected format.
        format: &'static str,
    },
    /// Stored bytes end before their envelope does, or go on after it.
    #[error("{format} envelope of {got} bytes refused: expected {expected}")]
    EnvelopeLength {
        /// The expected format.
        format: &'static str,
        /// Bytes found.
        got: usize,
        /// Bytes the envelope needs.
        expected: usize,
    },
    /// The payload of an envelope does not match its checksum.
    #[error("{format} envelope is damaged: checksum mismatch")]
    EnvelopeDamaged {
        /// The expected format.
        format: &'static str,
    },
    /// Stored bytes were written by a newer build.
    #[error("{format} version {got} is newer than this build reads (up to {newest}): upgrade first")]
    UnknownVersion {
        /// The format.
        format: &'static str,
        /// The version found.
        got: u8,
        /// The newest version this build reads.
        newest: u8,
    },
    /// A pack's name isn't 1 to 64 lower-case letters, digits and dashes.
    #[error("pack name {got:?} refused: expected 1 to 64 lower-case letters, digits and dashes")]
    PackName {
        /// The name given, cut short.
        got: String,
    },
    /// A pack holds a frame that is neither whole nor the torn end of the last write.
    #[error("pack {} is damaged at byte {offset}: set the file aside", path.display())]
    PackDamaged {
        /// The file.
        path: PathBuf,
        /// Offset of the frame's first byte.
        offset: u64,
    },
    /// A log holds a frame that is neither whole nor the torn end of the last write.
    #[error("log {} is damaged at byte {offset} (entry {seq}): {damage}", path.display())]
    LogDamaged {
        /// The log file.
        path: PathBuf,
        /// Offset of the frame's first byte.
        offset: u64,
        /// Sequence number the frame should have.
        seq: u64,
        /// What is wrong.
        damage: FrameDamage,
    },
    /// A log payload is too large.
    #[error("log entry of {got} bytes refused: at most {max}")]
    LogEntryTooLarge {
        /// Bytes given.
        got: usize,
        /// Most bytes accepted.
        max: usize,
    },
    /// An earlier append failed in a way that leaves the end of the file unknown; reopen the log.
    #[error("log {} stopped after a failed write: reopen it", path.display())]
    LogStopped {
        /// The log file.
        path: PathBuf,
    },
    /// A log does not contain the head that somebody else has seen: entries were removed or replaced.
    #[error("log does not contain entry {seq} with hash {hash}: it was rolled back or rewritten")]
    LogRolledBack {
        /// Sequence number of the missing head.
        seq: u64,
        /// Its chain hash.
        hash: Digest,
    },
    /// No blob has this digest.
    #[error("blob {digest} is not stored")]
    BlobMissing {
        /// The digest asked for.
        digest: Digest,
    },
    /// Bytes do not hash to the digest that names them.
    #[error("blob {expected} is damaged: its bytes hash to {got}")]
    BlobDamaged {
        /// The digest in the name.
        expected: Digest,
        /// The digest of the bytes.
        got: Digest,
    },
    /// A blob is larger than the limit.
    #[error("blob of {got} bytes refused: at most {max}")]
    BlobTooLarge {
        /// Bytes given or announced.
        got: u64,
        /// Most bytes accepted.
        max: u64,
    },
    /// A chunk does not continue where the partial blob ends.
    #[error("chunk at offset {got} refused: the partial blob ends at {expected}")]
    BlobOffset {
        /// Where the next chunk must begin.
        expected: u64,
        /// Where it began.
        got: u64,
    },
    /// A blob was finished before all announced bytes arrived, or a chunk or range exceeds its announced length.
    #[error("blob length mismatch: expected {expected} bytes, got {got}")]
    BlobLength {
        /// The announced length.
        expected: u64,
        /// The length found.
        got: u64,
    },
    /// Text is not 64 lowercase hexadecimal digits.
    #[error("not a digest: expected 64 lowercase hexadecimal digits, got {got} bytes of text")]
    DigestText {
        /// Length of the text.
        got: usize,
    },
    /// A version names a parent that is not registered.
    #[error("parent {parent} is not registered: register it first")]
    ParentMissing {
        /// The unknown parent.
        parent: Digest,
    },
    /// A version's field exceeds its limit.
    #[error("version field {field} of size {got} refused: at most {max}")]
    VersionField {
        /// The field's name.
        field: &'static str,
        /// Size given.
        got: usize,
        /// Largest size accepted.
        max: usize,
    },
    /// The digest is registered already with other facts.
    #[error("{digest} is registered already with other facts")]
    VersionConflict {
        /// The digest concerned.
        digest: Digest,
    },
    /// No version with this digest is registered.
    #[error("version {digest} is not registered")]
    VersionMissing {
        /// The digest asked for.
        digest: Digest,
    },
    /// A record of the registry does not parse.
    #[error("registry record {key} cannot be read: {reason}")]
    VersionUnreadable {
        /// The record's key.
        key: String,
        /// What the parser said.
        reason: String,
    },
}

impl StoreError {
    pub(crate) fn io(action: &'static str, path: &Path, error: &io::Error) -> Self {
        Self::Io { action, path: path.to_owned(), kind: error.kind(), reason: error.to_string() }
    }

    /// Whether freeing disk space could cure it.
    #[must_use]
    pub fn is_disk_full(&self) -> bool {
        matches!(self, Self::Io { kind: io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded, .. })
    }
}

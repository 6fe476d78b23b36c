//! The prediction log: who asked which version for how many rows, and keyed digests of what went in and out.
//!
//! No value is ever written. Plain hashes of private bytes could be found by trying likely rows, so digests are
//! HMAC-SHA-256 under a key that stays in the domain; whoever holds the key and kept a request or an answer can prove
//! that it is the logged one. The caller-chosen request id is written as it is and should be opaque.
//!
//! [`JsonlLog`] appends JSON lines and rotates by size: `file`, `file.1` (newest) to `file.8`, the oldest is
//! dropped. A line reaches the operating system before the answer is sent, so it survives a killed process; the disk
//! is synchronised at rotation and close only.

use std::{
    fs::{self, File, OpenOptions},
    io::{Read, Seek, SeekFrom, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use ring::hmac;
use serde::{Serialize, Serializer};
use tabmesh_proto::identity::SpiffeId;
use thiserror::Error;

/// Where predictions are recorded. A prediction that can't be recorded is not given.
pub trait PredictionLog: Send + Sync {
    /// Records one prediction before its answer is sent. Called from many threads at once.
    ///
    /// # Errors
    /// [`LogError`] if the record is not written in full.
    fn append(&self, entry: &PredictionEntry<'_>) -> Result<(), LogError>;
}

/// One prediction. The bytes are digested and dropped; nothing else of them may be kept.
#[derive(Debug, Clone, Copy)]
pub struct PredictionEntry<'a> {
    /// When it was answered, ms since the Unix epoch.
    pub time_ms: i64,
    /// The request's id, if it had one.
    pub id: Option<&'a str>,
    /// Who asked.
    pub caller: &'a Caller,
    /// Digest of the version that answered.
    pub model_version: &'a str,
    /// Rows answered.
    pub rows: usize,
    /// The request's body as received.
    pub input: &'a [u8],
    /// The answer's body as sent.
    pub output: &'a [u8],
}

/// Who is at the other end of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Caller {
    /// A process on this machine, over loopback without TLS.
    Loopback,
    /// The holder of a client certificate with this SPIFFE id, found on the allow list.
    Spiffe(SpiffeId),
}

/// As logged: the SPIFFE id or `loopback`.
impl Serialize for Caller {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Loopback => serializer.serialize_str("loopback"),
            Self::Spiffe(id) => serializer.collect_str(id),
        }
    }
}

/// Why the log can't be opened or written.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum LogError {
    /// The key is too short for its purpose.
    #[error("prediction log key has {got} bytes, expected at least {MIN_KEY_BYTES}")]
    ShortKey {
        /// Bytes of the key.
        got: usize,
    },
    /// The file system refused.
    #[error("prediction log {path}: {action} failed: {reason}")]
    Io {
        /// The file.
        path: String,
        /// What was tried.
        action: &'static str,
        /// The operating system's words.
        reason: String,
    },
}

/// A prediction log in a file of JSON lines.
pub struct JsonlLog {
    path: PathBuf,
    key: hmac::Key,
    max_bytes: u64,
    open: Mutex<Open>,
}

struct Open {
    file: File,
    bytes: u64,
}

/// A line of the log.
#[derive(Serialize)]
struct Line<'a> {
    time_ms: i64,
    id: Option<&'a str>,
    caller: &'a Caller,
    model_version: &'a str,
    rows: usize,
    input_hmac: String,
    output_hmac: String,
}

impl JsonlLog {
    /// Opens or creates the file (mode 0600). A line torn by a crash is closed, so that the next starts afresh.
    ///
    /// # Errors
    /// [`LogError::ShortKey`] for a key under [`MIN_KEY_BYTES`], [`LogError::Io`] if the file can't be opened.
    pub fn open(path: &Path, key: &[u8]) -> Result<Self, LogError> {
        Self::open_with(path, key, MAX_FILE_BYTES)
    }

    fn open_with(path: &Path, key: &[u8], max_bytes: u64) -> Result<Self, LogError> {
        if key.len() < MIN_KEY_BYTES {
            return Err(LogError::ShortKey { got: key.len() });
        }
        let open = Open::at(path).map_err(|e| io_error(path, "open", &e))?;
        let key = hmac::Key::new(hmac::HMAC_SHA256, key);
        Ok(Self { path: path.to_owned(), key, max_bytes, open: Mutex::new(open) })
    }

    /// Keyed digest of a request's body, in hex, as the log's `input_hmac`.
    #[must_use]
    pub fn input_digest(&self, body: &[u8]) -> String {
        self.digest(INPUT_CONTEXT, body)
    }

    /// Keyed digest of an answer's body, in hex, as the log's `output_hmac`.
    #[must_use]
    pub fn output_digest(&self, body: &[u8]) -> String {
        self.digest(OUTPUT_CONTEXT, body)
    }

    fn digest(&self, context: &[u8], bytes: &[u8]) -> String {
        let mut keyed = hmac::Context::with_key(&self.key);
        keyed.update(context);
        keyed.update(bytes);
        hex::encode(keyed.sign())
    }

    /// Moves the file to `.1` after shifting the older ones, and starts an empty one.
    fn rotate(&self, open: &mut Open) -> std::io::Result<()> {
        open.file.sync_data()?;
        for n in (1..KEPT_FILES).rev() {
            let from = self.rotated(n);
            if from.exists() {
                fs::rename(from, self.rotated(n + 1))?;
            }
        }
        // Already moved if an earlier attempt failed after this step.
        if self.path.exists() {
            fs::rename(&self.path, self.rotated(1))?;
        }
        *open = Open::at(&self.path)?;
        Ok(())
    }

    fn rotated(&self, n: u32) -> PathBuf {
        let mut name = self.path.clone().into_os_string();
        name.push(format!(".{n}"));
        name.into()
    }
}

impl PredictionLog for JsonlLog {
    fn append(&self, entry: &PredictionEntry<'_>) -> Result<(), LogError> {
        let line = Line {
            time_ms: entry.time_ms,
            id: entry.id,
            caller: entry.caller,
            model_version: entry.model_version,
            rows: entry.rows,
            input_hmac: self.input_digest(entry.input),
            output_hmac: self.output_digest(entry.output),
        };
        let mut bytes = serde_json::to_vec(&line).map_err(|e| LogError::Io {
            path: self.path.display().to_string(),
            action: "encode",
            reason: e.to_string(),
        })?;
        bytes.push(b'\n');
        let length = bytes.len() as u64;
        // A poisoned lock only means that another append panicked; the file's state is read anew below.
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if open.bytes > 0 && open.bytes + length > self.max_bytes {
            self.rotate(&mut open).map_err(|e| io_error(&self.path, "rotate", &e))?;
        }
        if let Err(error) = open.file.write_all(&bytes) {
            // Part of the line may be there: cut it off, or close it when even that fails.
            let whole = open.bytes;
            let _ = open.file.set_len(whole);
            return Err(io_error(&self.path, "append", &error));
        }
        open.bytes += length;
        Ok(())
    }
}

impl Drop for JsonlLog {
    fn drop(&mut self) {
        let open = self.open.get_mut().unwrap_or_else(PoisonError::into_inner);
        // Nobody is left to tell; every line has already been handed to the operating system.
        let _ = open.file.sync_data();
    }
}

impl Open {
    fn at(path: &Path) -> std::io::Result<Self> {
        let mut file = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path)?;
        let mut bytes = file.metadata()?.len();
        if bytes > 0 {
            let mut last = [0];
            file.seek(SeekFrom::End(-1))?;
            file.read_exact(&mut last)?;
            if last != *b"\n" {
                file.write_all(b"\n")?;
                bytes += 1;
            }
        }
        Ok(Self { file, bytes })
    }
}

fn io_error(path: &Path, action: &'static str, error: &std::io::Error) -> LogError {
    LogError::Io { path: path.display().to_string(), action, reason: error.to_string() }
}

/// Least bytes of the log's key.
pub const MIN_KEY_BYTES: usize = 32;
/// Size at which the file is rotated, bytes.
pub const MAX_FILE_BYTES: u64 = 64 * 1024 * 1024;
/// Rotated files kept beside the current one.
pub const KEPT_FILES: u32 = 8;
/// Separates the digests of requests from those of answers.
const INPUT_CONTEXT: &[u8] = b"tabmesh prediction input v1\0";
/// Separates the digests of answers from those of requests.
const OUTPUT_CONTEXT: &[u8] = b"tabmesh prediction output v1\0";

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const KEY: [u8; 32] = [7; 32];
    const SPIFFE: &str = "spiffe://acme.example/tabmesh/agent/payments/scoring";

    fn entry<'a>(id: &'a str, caller: &'a Caller) -> PredictionEntry<'a> {
        PredictionEntry {
            time_ms: 1_700_000_000_000,
            id: Some(id),
            caller,
            model_version: "ab12",
            rows: 3,
            input: b"in",
            output: b"out",
        }
    }

    #[test]
    fn lines_have_the_documented_fields_and_known_digests() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("predictions.jsonl");
        let log = JsonlLog::open(&path, &KEY).unwrap();
        log.append(&entry("r1", &Caller::Spiffe(SPIFFE.parse().unwrap()))).unwrap();
        let line: serde_json::Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        // python3: hmac.new(b'\x07'*32, b'tabmesh prediction input v1\0in', 'sha256').hexdigest(), and output/out.
        let expected = serde_json::json!({
            "time_ms": 1_700_000_000_000_i64, "id": "r1", "caller": SPIFFE, "model_version": "ab12",
            "rows": 3,
            "input_hmac": "911eec76874bef0f647fd6c033396aefc731da5121a4a53c9e0c4a826dcbf672",
            "output_hmac": "0778be0a8be98d89546ac1b6ac8efd2035306f9e45a8d716dcd60e7f12b65ab2",
        });
        assert_eq!(line, expected);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn rotation_keeps_every_line_until_the_last_file_falls_off() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.jsonl");
        let one_line = {
            let log = JsonlLog::open(&path, &KEY).unwrap();
            log.append(&entry("00", &Caller::Loopback)).unwrap();
            fs::metadata(&path).unwrap().len()
        };
        fs::remove_file(&path).unwrap();
        // Two lines fit a file: at the limit nothing moves, one byte beyond does.
        let log = JsonlLog::open_with(&path, &KEY, 2 * one_line).unwrap();
        for n in 0..2 {
            log.append(&entry(&format!("{n:02}"), &Caller::Loopback)).unwrap();
        }
        assert!(!dir.path().join("p.jsonl.1").exists());
        for n in 2..30 {
            log.append(&entry(&format!("{n:02}"), &Caller::Loopback)).unwrap();
        }
        let ids = |file: &str| -> Vec<String> {
            let text = fs::read_to_string(dir.path().join(file)).unwrap();
            let id = |l: &str| {
                serde_json::from_str::<serde_json::Value>(l).unwrap()["id"].as_str().unwrap().to_owned()
            };
            text.lines().map(id).collect()
        };
        assert_eq!(ids("p.jsonl"), ["28", "29"]);
        assert_eq!(ids("p.jsonl.1"), ["26", "27"]);
        assert_eq!(ids("p.jsonl.8"), ["12", "13"]);
        assert!(!dir.path().join("p.jsonl.9").exists());
    }

    #[test]
    fn a_torn_line_is_closed_at_the_next_start() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.jsonl");
        fs::write(&path, "{\"time_ms\":1}\n{\"time").unwrap();
        JsonlLog::open(&path, &KEY).unwrap().append(&entry("r", &Caller::Loopback)).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        assert_eq!(lines[1], "{\"time");
        assert!(lines[2].contains("\"caller\":\"loopback\""));
    }

    #[test]
    fn short_keys_and_unwritable_paths_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let short = JsonlLog::open(&dir.path().join("p"), &[1; MIN_KEY_BYTES - 1]).err();
        assert_eq!(short, Some(LogError::ShortKey { got: MIN_KEY_BYTES - 1 }));
        let nowhere = JsonlLog::open(&dir.path().join("no/such/p"), &KEY).err();
        assert!(matches!(nowhere, Some(LogError::Io { action: "open", .. })));
    }
}

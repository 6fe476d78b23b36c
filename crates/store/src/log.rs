//! An append-only, hash-chained file: the form of the privacy ledger and of the audit log.
//!
//! A frame is `magic (4) ‖ version (1) ‖ length (4) ‖ payload CRC32 (4) ‖ header CRC32 (4) ‖ payload`, little-endian.
//! The chain is `hash = SHA-256(prev ‖ payload)` with 32 zero bytes before the first entry. The header has a checksum
//! of its own because a flipped length bit would otherwise look like a write that was cut short, and acknowledged
//! entries would be dropped as if they had never been made.
//!
//! What it refuses: opening a file with any damage other than the incomplete last write of a crash (that one is cut
//! off and reported), two writers, and appending after a write whose outcome is unknown. What it can't see alone: a
//! file cut back at an entry's edge, or rewritten with new checksums. For that, somebody else keeps a [`LogHead`] and
//! [`Log::check_contains`] compares.

use std::{
    fs::File,
    io::{self, BufReader, Read},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{Digest, FrameDamage, Hasher, StoreError, disk};

/// Most bytes of one entry's payload.
pub const MAX_ENTRY_BYTES: usize = 1 << 20;

/// The hash before the first entry.
pub const GENESIS: Digest = Digest::from_bytes([0; 32]);

/// One entry, with its place in the chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogEntry {
    /// Position, from 0, without gaps.
    pub seq: u64,
    /// Chain hash of the entry before, or [`GENESIS`].
    pub prev: Digest,
    /// `SHA-256(prev ‖ payload)`.
    pub hash: Digest,
    /// The bytes as appended.
    pub payload: Vec<u8>,
}

impl LogEntry {
    /// Builds the entry that follows `prev`.
    #[must_use]
    pub fn chained(seq: u64, prev: Digest, payload: Vec<u8>) -> Self {
        let hash = chain_hash(&prev, &payload);
        Self { seq, prev, hash, payload }
    }

    /// Returns this entry's place as a head that others can keep.
    #[must_use]
    pub const fn head(&self) -> LogHead {
        LogHead { seq: self.seq, hash: self.hash }
    }
}

/// The last entry somebody has seen: enough to find a log that was cut back or rewritten.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogHead {
    /// Position of the entry.
    pub seq: u64,
    /// Its chain hash.
    pub hash: Digest,
}

/// What was cut off at opening: the incomplete last write of a crashed process, never acknowledged to anybody.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TornTail {
    /// Where the incomplete frame began, and the file now ends.
    pub offset: u64,
    /// Bytes cut off.
    pub bytes: u64,
}

/// An open log; holds the file's exclusive lock until dropped.
#[derive(Debug)]
pub struct Log {
    path: PathBuf,
    file: File,
    next_seq: u64,
    hash: Digest,
    bytes: u64,
    stopped: bool,
}

impl Log {
    /// Opens or creates the log at `path`, verifies every entry from genesis and cuts off a torn last write.
    ///
    /// # Errors
    /// - [`StoreError::Locked`] if another handle or process has it open
    /// - [`StoreError::LogDamaged`] at the first frame that is neither whole nor a torn end
    /// - [`StoreError::Io`] if the system refuses
    pub fn open(path: &Path) -> Result<(Self, Option<TornTail>), StoreError> {
        let file = disk::open_locked(path)?;
        disk::sync_parent(path)?;
        let total = file.metadata().map_err(|error| StoreError::io("read", path, &error))?.len();
        let mut frames = Frames::new(BufReader::with_capacity(BUFFER, At::start(&file)), path);
        while frames.next_frame()?.is_some() {}
        let (next_seq, hash, bytes) = (frames.seq, frames.prev, frames.offset);
        let log = Self { path: path.to_owned(), file, next_seq, hash, bytes, stopped: false };
        if bytes == total {
            return Ok((log, None));
        }
        log.cut_back()?;
        Ok((log, Some(TornTail { offset: bytes, bytes: total - bytes })))
    }

    /// Appends one entry; it is on disk (`fdatasync`) when this returns.
    ///
    /// # Errors
    /// - [`StoreError::LogEntryTooLarge`] above [`MAX_ENTRY_BYTES`]; nothing was written
    /// - [`StoreError::Io`] if the write failed. A write that could be undone leaves the log usable; otherwise, and
    ///   after a failed sync, every later call answers [`StoreError::LogStopped`] until the log is opened anew
    pub fn append(&mut self, payload: &[u8]) -> Result<LogEntry, StoreError> {
        if self.stopped {
            return Err(StoreError::LogStopped { path: self.path.clone() });
        }
        let frame = encode_frame(payload)?;
        if let Err(error) = self.file.write_all_at(&frame, self.bytes) {
            self.stopped = self.cut_back().is_err();
            return Err(StoreError::io("append to", &self.path, &error));
        }
        if let Err(error) = self.file.sync_data() {
            // The kernel may have dropped the dirty pages: neither presence nor absence of the entry is known.
            self.stopped = true;
            return Err(StoreError::io("sync", &self.path, &error));
        }
        let entry = LogEntry::chained(self.next_seq, self.hash, payload.to_vec());
        self.next_seq += 1;
        self.hash = entry.hash;
        self.bytes += frame.len() as u64;
        Ok(entry)
    }

    /// Reads all entries from the file again, verifying each, oldest first.
    pub fn entries(&self) -> impl Iterator<Item = Result<LogEntry, StoreError>> + '_ {
        let reader = At::start(&self.file).take(self.bytes);
        Frames::new(BufReader::with_capacity(BUFFER, reader), &self.path).entries()
    }

    /// Number of entries.
    #[must_use]
    pub const fn len(&self) -> u64 {
        self.next_seq
    }

    /// Whether there is no entry yet.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.next_seq == 0
    }

    /// Chain hash of the last entry, or [`GENESIS`].
    #[must_use]
    pub const fn head_hash(&self) -> Digest {
        self.hash
    }

    /// The last entry's place, if there is one.
    #[must_use]
    pub const fn head(&self) -> Option<LogHead> {
        match self.next_seq.checked_sub(1) {
            Some(seq) => Some(LogHead { seq, hash: self.hash }),
            None => None,
        }
    }

    /// Checks that this log contains an entry somebody else has seen.
    ///
    /// # Errors
    /// [`StoreError::LogRolledBack`] if it doesn't; any error of reading.
    pub fn check_contains(&self, head: &LogHead) -> Result<(), StoreError> {
        let missing = StoreError::LogRolledBack { seq: head.seq, hash: head.hash };
        if head.seq >= self.next_seq {
            return Err(missing);
        }
        for entry in self.entries() {
            let entry = entry?;
            if entry.seq == head.seq {
                return if entry.hash == head.hash { Ok(()) } else { Err(missing) };
            }
        }
        Err(missing)
    }

    /// Shortens the file to its last whole entry, durably.
    fn cut_back(&self) -> Result<(), StoreError> {
        self.file
            .set_len(self.bytes)
            .and_then(|()| self.file.sync_all())
            .map_err(|error| StoreError::io("cut back", &self.path, &error))
    }
}

/// Reads a log without opening it for writing, as an offline verifier does; a torn end is the end.
///
/// # Errors
/// [`StoreError::Io`] if the file can't be opened; each item carries [`StoreError::LogDamaged`] or a read error, after
/// which the iterator ends.
pub fn read(path: &Path) -> Result<impl Iterator<Item = Result<LogEntry, StoreError>>, StoreError> {
    let file = File::open(path).map_err(|error| StoreError::io("open", path, &error))?;
    Ok(Frames::new(BufReader::with_capacity(BUFFER, file), path).entries())
}

/// The chain rule: `SHA-256(prev ‖ payload)`.
#[must_use]
pub fn chain_hash(prev: &Digest, payload: &[u8]) -> Digest {
    let mut hasher = Hasher::new();
    hasher.update(prev.as_bytes());
    hasher.update(payload);
    hasher.finish()
}

fn encode_frame(payload: &[u8]) -> Result<Vec<u8>, StoreError> {
    let too_large = || StoreError::LogEntryTooLarge { got: payload.len(), max: MAX_ENTRY_BYTES };
    if payload.len() > MAX_ENTRY_BYTES {
        return Err(too_large());
    }
    let length = u32::try_from(payload.len()).map_err(|_| too_large())?;
    let mut frame = Vec::with_capacity(HEADER + payload.len());
    frame.extend_from_slice(&MAGIC);
    frame.push(VERSION);
    frame.extend_from_slice(&length.to_le_bytes());
    frame.extend_from_slice(&crc32fast::hash(payload).to_le_bytes());
    let header_crc = crc32fast::hash(&frame);
    frame.extend_from_slice(&header_crc.to_le_bytes());
    frame.extend_from_slice(payload);
    Ok(frame)
}

struct Header {
    length: usize,
    payload_crc: u32,
}

fn decode_header(bytes: &[u8; HEADER]) -> Result<Header, FrameDamage> {
    let [m0, m1, m2, m3, version, l0, l1, l2, l3, p0, p1, p2, p3, h0, h1, h2, h3] = *bytes;
    if [m0, m1, m2, m3] != MAGIC {
        return Err(FrameDamage::Magic);
    }
    let guarded = [m0, m1, m2, m3, version, l0, l1, l2, l3, p0, p1, p2, p3];
    if u32::from_le_bytes([h0, h1, h2, h3]) != crc32fast::hash(&guarded) {
        return Err(FrameDamage::Header);
    }
    if version != VERSION {
        return Err(FrameDamage::Version(version));
    }
    let length = u32::from_le_bytes([l0, l1, l2, l3]);
    if length as usize > MAX_ENTRY_BYTES {
        return Err(FrameDamage::Length(length));
    }
    Ok(Header { length: length as usize, payload_crc: u32::from_le_bytes([p0, p1, p2, p3]) })
}

/// Walks frames; after the last whole one, `offset` is where the file should end.
struct Frames<R> {
    reader: R,
    path: PathBuf,
    seq: u64,
    prev: Digest,
    offset: u64,
}

impl<R: Read> Frames<R> {
    fn new(reader: R, path: &Path) -> Self {
        Self { reader, path: path.to_owned(), seq: 0, prev: GENESIS, offset: 0 }
    }

    /// Returns the next entry, or nothing at the end of the file or at an incomplete last frame.
    fn next_frame(&mut self) -> Result<Option<LogEntry>, StoreError> {
        let mut header = [0; HEADER];
        let got = self.fill(&mut header)?;
        if got < HEADER {
            let start: [u8; 5] = [MAGIC[0], MAGIC[1], MAGIC[2], MAGIC[3], VERSION];
            let cut_short = header.iter().zip(start).take(got).all(|(found, expected)| *found == expected);
            return if cut_short { Ok(None) } else { Err(self.damaged(FrameDamage::Magic)) };
        }
        let header = decode_header(&header).map_err(|damage| self.damaged(damage))?;
        let mut payload = vec![0; header.length];
        if self.fill(&mut payload)? < header.length {
            return Ok(None);
        }
        if crc32fast::hash(&payload) != header.payload_crc {
            return Err(self.damaged(FrameDamage::Payload));
        }
        let entry = LogEntry::chained(self.seq, self.prev, payload);
        self.seq += 1;
        self.prev = entry.hash;
        self.offset += (HEADER + header.length) as u64;
        Ok(Some(entry))
    }

    fn entries(mut self) -> impl Iterator<Item = Result<LogEntry, StoreError>> {
        let mut ended = false;
        std::iter::from_fn(move || {
            if ended {
                return None;
            }
            let next = self.next_frame().transpose();
            ended = !matches!(next, Some(Ok(_)));
            next
        })
    }

    /// Reads until the buffer is full or the file ends; returns the bytes read.
    fn fill(&mut self, mut buffer: &mut [u8]) -> Result<usize, StoreError> {
        let mut total = 0;
        while !buffer.is_empty() {
            match self.reader.read(buffer) {
                Ok(0) => break,
                Ok(got) => {
                    total += got;
                    buffer = buffer.split_at_mut(got).1;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(StoreError::io("read", &self.path, &error)),
            }
        }
        Ok(total)
    }

    fn damaged(&self, damage: FrameDamage) -> StoreError {
        StoreError::LogDamaged { path: self.path.clone(), offset: self.offset, seq: self.seq, damage }
    }
}

/// Reads a file by position, so that the writing handle can be read without moving anything.
struct At<'a> {
    file: &'a File,
    offset: u64,
}

impl<'a> At<'a> {
    const fn start(file: &'a File) -> Self {
        Self { file, offset: 0 }
    }
}

impl Read for At<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.file.read_at(buffer, self.offset)?;
        self.offset += got as u64;
        Ok(got)
    }
}

const MAGIC: [u8; 4] = *b"TMLG";
const VERSION: u8 = 1;
const HEADER: usize = 17;
const BUFFER: usize = 64 * 1024;

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::prelude::*;

    use super::*;

    fn written(path: &Path, payloads: &[&[u8]]) -> Vec<LogEntry> {
        let (mut log, torn) = Log::open(path).unwrap();
        assert_eq!(torn, None);
        payloads.iter().map(|payload| log.append(payload).unwrap()).collect()
    }

    fn all(log: &Log) -> Vec<LogEntry> {
        log.entries().collect::<Result<_, _>>().unwrap()
    }

    #[test]
    fn chains_from_genesis_and_reads_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger.log");
        let entries = written(&path, &[b"one", b"", b"three"]);
        // Recomputed with Python 3 hashlib: h = sha256(bytes(32) + b"one"); h = sha256(h); h = sha256(h + b"three").
        assert_eq!(entries[0].prev, GENESIS);
        assert_eq!(
            entries[0].hash.to_string(),
            "4e233ba6ac7032d3894ecea5974fd96176e564b024af45747eb46357af8d2401"
        );
        assert_eq!(
            entries[2].hash.to_string(),
            "8205c649a5fdf41b8e9a22460edfe02742d4e6030b298feb40a0c9c08e9f6753"
        );
        let (log, torn) = Log::open(&path).unwrap();
        assert_eq!(torn, None);
        assert_eq!(all(&log), entries);
        assert_eq!(log.head(), Some(entries[2].head()));
        assert_eq!(read(&path).unwrap().collect::<Result<Vec<_>, _>>().unwrap(), entries);
    }

    #[test]
    fn every_single_bit_flip_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        written(&path, &[b"reserve 12", b"commit 12", b"refund 3"]);
        let good = fs::read(&path).unwrap();
        for bit in 0..good.len() * 8 {
            let mut flipped = good.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            fs::write(&path, &flipped).unwrap();
            let refused = Log::open(&path).map(|_| ()).unwrap_err();
            assert!(
                matches!(refused, StoreError::LogDamaged { offset, .. } if offset <= bit as u64 / 8),
                "bit {bit}: {refused}"
            );
            assert_eq!(fs::read(&path).unwrap(), flipped, "a damaged log is left as found");
        }
    }

    #[test]
    fn a_torn_tail_recovers_to_the_last_whole_entry_at_every_byte() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let payloads: [&[u8]; 3] = [b"first", b"second entry", b"third"];
        let entries = written(&path, &payloads);
        let good = fs::read(&path).unwrap();
        let ends: Vec<usize> = payloads
            .iter()
            .scan(0, |end, payload| {
                *end += HEADER + payload.len();
                Some(*end)
            })
            .collect();
        for cut in 0..=good.len() {
            fs::write(&path, &good[..cut]).unwrap();
            let whole = ends.iter().filter(|end| **end <= cut).count();
            let edge = if whole == 0 { 0 } else { ends[whole - 1] };
            let (mut log, torn) = Log::open(&path).unwrap();
            assert_eq!(all(&log), entries[..whole], "cut at {cut}");
            let expected =
                (cut > edge).then_some(TornTail { offset: edge as u64, bytes: (cut - edge) as u64 });
            assert_eq!(torn, expected, "cut at {cut}");
            let next = log.append(b"after").unwrap();
            assert_eq!(
                (next.seq, next.prev),
                (whole as u64, if whole == 0 { GENESIS } else { entries[whole - 1].hash })
            );
            drop(log);
            assert_eq!(Log::open(&path).unwrap().0.len(), whole as u64 + 1);
        }
    }

    #[test]
    fn rollback_and_rewrite_are_found_by_a_kept_head() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let entries = written(&path, &[b"a", b"b", b"c"]);
        let kept = entries[2].head();
        Log::open(&path).unwrap().0.check_contains(&kept).unwrap();
        let good = fs::read(&path).unwrap();
        fs::write(&path, &good[..2 * (HEADER + 1)]).unwrap();
        let rolled_back = StoreError::LogRolledBack { seq: 2, hash: kept.hash };
        assert_eq!(Log::open(&path).unwrap().0.check_contains(&kept), Err(rolled_back.clone()));
        fs::remove_file(&path).unwrap();
        written(&path, &[b"a", b"x", b"c"]);
        assert_eq!(Log::open(&path).unwrap().0.check_contains(&kept), Err(rolled_back));
    }

    #[test]
    fn one_writer_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let (log, _) = Log::open(&path).unwrap();
        assert_eq!(Log::open(&path).map(|_| ()), Err(StoreError::Locked { path: path.clone() }));
        drop(log);
        Log::open(&path).unwrap();
    }

    #[test]
    fn the_entry_limit_is_exact() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let (mut log, _) = Log::open(&path).unwrap();
        log.append(&vec![7; MAX_ENTRY_BYTES]).unwrap();
        assert_eq!(
            log.append(&vec![7; MAX_ENTRY_BYTES + 1]),
            Err(StoreError::LogEntryTooLarge { got: MAX_ENTRY_BYTES + 1, max: MAX_ENTRY_BYTES })
        );
        assert_eq!(log.len(), 1);
    }

    #[test]
    fn a_zeroed_block_is_damage_not_a_torn_tail() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        written(&path, &[b"spent", b"spent again"]);
        let mut bytes = fs::read(&path).unwrap();
        let second = HEADER + 5;
        bytes[second..].fill(0);
        fs::write(&path, &bytes).unwrap();
        assert_eq!(
            Log::open(&path).map(|_| ()),
            Err(StoreError::LogDamaged { path, offset: second as u64, seq: 1, damage: FrameDamage::Magic })
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

        /// Arbitrary bytes never panic and never yield an entry whose hash does not chain.
        #[test]
        fn arbitrary_files_are_read_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut frames = Frames::new(bytes.as_slice(), Path::new("memory"));
            while let Ok(Some(entry)) = frames.next_frame() {
                prop_assert_eq!(entry.hash, chain_hash(&entry.prev, &entry.payload));
            }
        }
    }
}

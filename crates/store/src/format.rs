//! Versioned envelopes: how bytes say what they are, which version wrote them, and that they are whole.
//!
//! Two layouts, both little-endian. A *record* value is `version (1) ‖ CRC32 (4) ‖ payload`, its checksum taken over
//! key and payload, so a value that moved to another key is found. A *file* is
//! `magic (4) ‖ version (1) ‖ length (4) ‖ CRC32 (4) ‖ payload`. Every layout ever written stays readable; the golden
//! bytes of each version are pinned by the tests below. Log frames have their own layout in [`crate::log`].

use crate::StoreError;

/// Newest version of the record envelope.
pub const RECORD_VERSION: u8 = 1;

const RECORD_HEADER: usize = 5;
const FILE_HEADER: usize = 13;
const RECORD_FORMAT: &str = "record";

/// Wraps a record's payload for storage under `key`.
#[must_use]
pub fn seal_record(key: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut sealed = Vec::with_capacity(RECORD_HEADER + payload.len());
    sealed.push(RECORD_VERSION);
    sealed.extend_from_slice(&record_crc(key, payload).to_le_bytes());
    sealed.extend_from_slice(payload);
    sealed
}

/// Checks a stored record and returns its payload.
///
/// # Errors
/// - [`StoreError::EnvelopeLength`] if `sealed` is shorter than a header
/// - [`StoreError::UnknownVersion`] if a newer build wrote it
/// - [`StoreError::RecordDamaged`] if key or payload are not those that were sealed
pub fn open_record<'a>(key: &[u8], sealed: &'a [u8]) -> Result<&'a [u8], StoreError> {
    let short =
        || StoreError::EnvelopeLength { format: RECORD_FORMAT, got: sealed.len(), expected: RECORD_HEADER };
    let (&version, rest) = sealed.split_first().ok_or_else(short)?;
    let (crc, payload) = rest.split_first_chunk::<4>().ok_or_else(short)?;
    if version != RECORD_VERSION {
        return Err(StoreError::UnknownVersion {
            format: RECORD_FORMAT,
            got: version,
            newest: RECORD_VERSION,
        });
    }
    if u32::from_le_bytes(*crc) != record_crc(key, payload) {
        return Err(StoreError::RecordDamaged { key: show_key(key) });
    }
    Ok(payload)
}

/// A file format: its name for messages, its magic bytes and the newest version this build writes and reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Format {
    /// Name shown in errors.
    pub name: &'static str,
    /// First four bytes of every such file.
    pub magic: [u8; 4],
    /// Newest version; versions 1 to this one are readable.
    pub newest: u8,
}

impl Format {
    /// Wraps a payload in the newest version.
    ///
    /// # Errors
    /// [`StoreError::ValueTooLarge`] above 4 GiB less one byte.
    pub fn seal(&self, payload: &[u8]) -> Result<Vec<u8>, StoreError> {
        let too_large = || StoreError::ValueTooLarge { got: payload.len(), max: u32::MAX as usize };
        let length = u32::try_from(payload.len()).map_err(|_| too_large())?;
        let mut sealed = Vec::with_capacity(FILE_HEADER + payload.len());
        sealed.extend_from_slice(&self.magic);
        sealed.push(self.newest);
        sealed.extend_from_slice(&length.to_le_bytes());
        sealed.extend_from_slice(&file_crc(self.newest, payload).to_le_bytes());
        sealed.extend_from_slice(payload);
        Ok(sealed)
    }

    /// Checks an envelope and returns its version and payload.
    ///
    /// # Errors
    /// - [`StoreError::EnvelopeLength`] if bytes are missing or left over
    /// - [`StoreError::Magic`] if it is another format
    /// - [`StoreError::UnknownVersion`] if a newer build wrote it
    /// - [`StoreError::EnvelopeDamaged`] if the checksum does not match
    pub fn open<'a>(&self, sealed: &'a [u8]) -> Result<(u8, &'a [u8]), StoreError> {
        let wrong = |expected| StoreError::EnvelopeLength { format: self.name, got: sealed.len(), expected };
        let (magic, rest) = sealed.split_first_chunk::<4>().ok_or_else(|| wrong(FILE_HEADER))?;
        if *magic != self.magic {
            return Err(StoreError::Magic { format: self.name });
        }
        let (&version, rest) = rest.split_first().ok_or_else(|| wrong(FILE_HEADER))?;
        let (length, rest) = rest.split_first_chunk::<4>().ok_or_else(|| wrong(FILE_HEADER))?;
        let (crc, payload) = rest.split_first_chunk::<4>().ok_or_else(|| wrong(FILE_HEADER))?;
        if version == 0 || version > self.newest {
            return Err(StoreError::UnknownVersion { format: self.name, got: version, newest: self.newest });
        }
        let expected = FILE_HEADER.saturating_add(u32::from_le_bytes(*length) as usize);
        if sealed.len() != expected {
            return Err(wrong(expected));
        }
        if u32::from_le_bytes(*crc) != file_crc(version, payload) {
            return Err(StoreError::EnvelopeDamaged { format: self.name });
        }
        Ok((version, payload))
    }
}

/// Shows a key in a message: as text where it is plain ASCII, else in hexadecimal.
pub(crate) fn show_key(key: &[u8]) -> String {
    match std::str::from_utf8(key) {
        Ok(text) if text.bytes().all(|byte| byte.is_ascii_graphic()) => text.to_owned(),
        _ => hex::encode(key),
    }
}

fn record_crc(key: &[u8], payload: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&(key.len() as u64).to_le_bytes());
    crc.update(key);
    crc.update(payload);
    crc.finalize()
}

fn file_crc(version: u8, payload: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&[version]);
    crc.update(payload);
    crc.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTE: Format = Format { name: "note", magic: *b"TMNO", newest: 1 };

    /// Written by version 1; must stay readable by every later build.
    const GOLDEN_RECORD_V1: &str = "0128d3046676616c7565";
    const GOLDEN_FILE_V1: &str = "544d4e4f01050000002fddcba176616c7565";

    #[test]
    fn golden_bytes_of_version_one_are_read_and_written() {
        assert_eq!(hex::encode(seal_record(b"key", b"value")), GOLDEN_RECORD_V1);
        assert_eq!(hex::encode(NOTE.seal(b"value").unwrap()), GOLDEN_FILE_V1);
        let record = hex::decode(GOLDEN_RECORD_V1).unwrap();
        let file = hex::decode(GOLDEN_FILE_V1).unwrap();
        assert_eq!(open_record(b"key", &record).unwrap(), b"value");
        assert_eq!(NOTE.open(&file).unwrap(), (1, b"value".as_slice()));
    }

    #[test]
    fn every_single_bit_flip_and_truncation_is_found() {
        let record = seal_record(b"key", b"value");
        let file = NOTE.seal(b"value").unwrap();
        for bit in 0..record.len() * 8 {
            let mut flipped = record.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(open_record(b"key", &flipped).is_err(), "record bit {bit}");
        }
        for bit in 0..file.len() * 8 {
            let mut flipped = file.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(NOTE.open(&flipped).is_err(), "file bit {bit}");
        }
        for end in 0..record.len() {
            assert!(open_record(b"key", &record[..end]).is_err(), "record cut at {end}");
        }
        for end in 0..file.len() {
            assert!(NOTE.open(&file[..end]).is_err(), "file cut at {end}");
        }
    }

    #[test]
    fn a_value_under_another_key_is_damage() {
        let sealed = seal_record(b"budget/a", b"1");
        assert_eq!(
            open_record(b"budget/b", &sealed),
            Err(StoreError::RecordDamaged { key: "budget/b".into() })
        );
    }

    #[test]
    fn a_newer_version_is_refused_by_name() {
        let newer = Format { newest: 2, ..NOTE }.seal(b"x").unwrap();
        assert_eq!(NOTE.open(&newer), Err(StoreError::UnknownVersion { format: "note", got: 2, newest: 1 }));
        let other = Format { magic: *b"TMXX", ..NOTE }.seal(b"x").unwrap();
        assert_eq!(NOTE.open(&other), Err(StoreError::Magic { format: "note" }));
    }
}

//! Names of things: digests of stored bytes, agents, and rounds that only count upwards.
//!
//! A digest is SHA-256 of bytes exactly as stored and is never computed from a re-serialised value. Ids are
//! UUIDv7 made from the caller's clock and randomness; this module reads neither itself.

use std::str::FromStr;

use rand::RngCore;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use uuid::Uuid;

/// Why a text isn't a digest or an agent id.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum IdError {
    /// Not 64 lower-case hexadecimal digits.
    #[error("a digest is 64 lower-case hexadecimal digits, got {got:?}")]
    BadDigest {
        /// The text found, cut to 80 characters.
        got: String,
    },
    /// Empty, too long, or not printable ASCII.
    #[error(
        "an agent id is 1 to {MAX_AGENT_ID_BYTES} printable ASCII characters without spaces, got {got:?}"
    )]
    BadAgent {
        /// The text found, cut to 80 characters.
        got: String,
    },
}

/// SHA-256 of bytes as stored.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest([u8; 32]);

impl Digest {
    /// Digest of `bytes`.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        let mut out = [0; 32];
        out.copy_from_slice(ring::digest::digest(&ring::digest::SHA256, bytes).as_ref());
        Self(out)
    }

    /// Digest of an update or count vector: SHA-256 of its integers as little-endian 8-byte words, in order.
    #[must_use]
    pub fn of_payload(values: &[i64]) -> Self {
        let mut context = ring::digest::Context::new(&ring::digest::SHA256);
        let mut bytes = Vec::with_capacity(PAYLOAD_CHUNK * size_of::<i64>());
        for chunk in values.chunks(PAYLOAD_CHUNK) {
            bytes.clear();
            chunk.iter().for_each(|value| bytes.extend_from_slice(&value.to_le_bytes()));
            context.update(&bytes);
        }
        let mut out = [0; 32];
        out.copy_from_slice(context.finish().as_ref());
        Self(out)
    }

    /// Takes over 32 bytes that are a digest already.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl std::fmt::Display for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl std::fmt::Debug for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Digest({self})")
    }
}

impl FromStr for Digest {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let refuse = || IdError::BadDigest { got: text.chars().take(80).collect() };
        if text.bytes().any(|b| b.is_ascii_uppercase()) {
            return Err(refuse());
        }
        let mut out = [0; 32];
        hex::decode_to_slice(text, &mut out).map_err(|_| refuse())?;
        Ok(Self(out))
    }
}

impl TryFrom<String> for Digest {
    type Error = IdError;

    fn try_from(text: String) -> Result<Self, IdError> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

/// SHA-256 of a plan's bytes as submitted: the plan's name in every ledger, round and manifest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PlanDigest(pub Digest);

impl PlanDigest {
    /// Digest of the submitted bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(Digest::of(bytes))
    }
}

impl std::fmt::Display for PlanDigest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// Exact identity of an agent, normally its SPIFFE id; orders every sum.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct AgentId(String);

impl AgentId {
    /// Parses 1 to [`MAX_AGENT_ID_BYTES`] printable ASCII characters without spaces.
    ///
    /// # Errors
    /// [`IdError::BadAgent`] for anything else.
    pub fn new(text: impl Into<String>) -> Result<Self, IdError> {
        let text = text.into();
        let fits =
            (1..=MAX_AGENT_ID_BYTES).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic());
        if fits { Ok(Self(text)) } else { Err(IdError::BadAgent { got: text.chars().take(80).collect() }) }
    }

    /// The id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for AgentId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for AgentId {
    type Error = IdError;

    fn try_from(text: String) -> Result<Self, IdError> {
        Self::new(text)
    }
}

impl From<AgentId> for String {
    fn from(id: AgentId) -> Self {
        id.0
    }
}

/// Id of one collection of integer vectors: a training round or a release stage. UUIDv7, so ids rise with time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CollectionId(Uuid);

/// Id of a training round.
pub type RoundId = CollectionId;

impl CollectionId {
    /// Makes an id greater than `after`, even if the clock has jumped back since that one was made.
    ///
    /// `now_ms` is UTC milliseconds since 1970; negative values count as 0.
    #[must_use]
    pub fn new(now_ms: i64, rng: &mut dyn RngCore, after: Option<Self>) -> Self {
        let mut random = [0; 10];
        rng.fill_bytes(&mut random);
        let now = u64::try_from(now_ms).unwrap_or(0);
        let make = |millis| Self(uuid::Builder::from_unix_timestamp_millis(millis, &random).into_uuid());
        let id = make(now);
        match after {
            Some(before) if id <= before => make(before.millis() + 1),
            _ => id,
        }
    }

    /// Takes over a UUID read back from a record or a message.
    #[must_use]
    pub const fn from_uuid(uuid: Uuid) -> Self {
        Self(uuid)
    }

    /// The UUID.
    #[must_use]
    pub const fn as_uuid(&self) -> &Uuid {
        &self.0
    }

    /// The milliseconds in the id's first 48 bits.
    fn millis(self) -> u64 {
        self.0.as_u64_pair().0 >> 16
    }
}

impl std::fmt::Display for CollectionId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// Longest agent id, in bytes.
pub const MAX_AGENT_ID_BYTES: usize = 256;
/// Integers hashed at a time.
const PAYLOAD_CHUNK: usize = 512;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use rand::SeedableRng;
    use rand_chacha::ChaCha20Rng;

    use super::*;

    #[test]
    fn digest_of_abc_is_the_published_vector() {
        // FIPS 180-4, example "abc".
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(Digest::of(b"abc").to_string(), expected);
        assert_eq!(expected.parse::<Digest>().unwrap(), Digest::of(b"abc"));
        assert!(expected.to_uppercase().parse::<Digest>().is_err());
        assert!("ba78".parse::<Digest>().is_err());
    }

    #[test]
    fn payload_digest_is_over_little_endian_words() {
        let mut bytes = Vec::new();
        for value in [1_i64, -2, i64::MAX] {
            bytes.extend_from_slice(&value.to_le_bytes());
        }
        assert_eq!(Digest::of_payload(&[1, -2, i64::MAX]), Digest::of(&bytes));
    }

    #[test]
    fn agent_ids_refuse_spaces_controls_and_one_byte_too_many() {
        assert!(AgentId::new("spiffe://mesh/tabmesh/agent/retail/one").is_ok());
        assert!(AgentId::new("a".repeat(MAX_AGENT_ID_BYTES)).is_ok());
        for bad in [String::new(), "a b".into(), "a\n".into(), "é".into(), "a".repeat(MAX_AGENT_ID_BYTES + 1)]
        {
            assert!(AgentId::new(bad).is_err());
        }
    }

    #[test]
    fn ids_rise_when_the_clock_stands_still_or_jumps_back() {
        let mut rng = ChaCha20Rng::seed_from_u64(1);
        let mut last = CollectionId::new(1_700_000_000_000, &mut rng, None);
        assert_eq!(last.as_uuid().get_version_num(), 7);
        for now in [1_700_000_000_000, 1_700_000_000_000, 1_600_000_000_000, -5, 1_700_000_000_100] {
            let next = CollectionId::new(now, &mut rng, Some(last));
            assert!(next > last, "{next} after {last}");
            assert_eq!(next.as_uuid().get_version_num(), 7);
            last = next;
        }
    }
}
